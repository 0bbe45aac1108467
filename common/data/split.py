"""Splits by hash: where an item belongs depends on the item alone.

Not on its position in a file, on the seed or on what else is in the data. So adding items moves none of the old ones
from test to train, and two programs that never met agree on what is held out.
"""

import hashlib
from collections.abc import Mapping

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def hash_split(key: str, fractions: Mapping[str, float] = FRACTIONS, *, salt: str = "") -> str:
    """The name of the split that `key` belongs to.

    Args:
        key: what identifies the item, in a normal form (for a sum, the same for 3+8 and 8+3).
        fractions: split -> share; they must add up to 1.
        salt: another salt is another split of the same items.

    >>> hash_split("hamlet"), hash_split("hamlet", salt="2")
    ('train', 'train')
    """
    if abs(sum(fractions.values()) - 1) > 1e-9:
        raise ValueError(f"split fractions must add up to 1, got {dict(fractions)}")
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    edge = 0.0
    for name, share in fractions.items():
        edge += share
        if place < edge:
            return name
    return name
