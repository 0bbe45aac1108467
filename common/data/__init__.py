"""Documents, splits and problems: what a model sees, and what it must not see."""
