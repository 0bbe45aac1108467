"""Text to ids and back, without loss: bytes now, byte pair encoding from February."""
