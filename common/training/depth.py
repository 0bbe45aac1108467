"""What makes depth trainable: norms of signal and gradient by depth, and the edge of divergence."""
