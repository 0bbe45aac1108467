"""Language models behind one interface: ids in, logits out. Saved models are found by name in registry.py."""
