"""Language models behind one interface: ids in, logits out."""
