"""The one loss of the year, and checkpoints."""
