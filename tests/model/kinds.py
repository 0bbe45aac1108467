"""Every kind of attention and position, for tests that hold for all of them: what is changed in a small config."""

LATENT = {
    "attention": "latent",
    "latent_width": 6,
    "rope_head_width": 4,
    "value_head_width": 5,
    "rope_layout": "interleaved",
}
KINDS = {
    "rope": {},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "alibi": {"positions": "alibi"},
    "none": {"positions": "none"},
    "grouped": {"key_value_heads": 2, "qk_norm": True},
    "multi-query": {"key_value_heads": 1},
    "window": {"window": 3},
    "window-alibi": {"window": 4, "positions": "alibi"},
    "latent": LATENT,
    "experts": {"experts": 4},
}
