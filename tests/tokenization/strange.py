"""Texts on which tokenizers differ: runs of white space, emoji, combining marks, invisible characters, long lines."""

import random

PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\r",
    "a",
    "the",
    " the",
    "Ä",
    "é",
    "e\u0301",
    "日本",
    "😀",
    "👩\u200d👩\u200d👧",
    "'s",
]
PIECES += [
    "'LL",
    "'",
    "12",
    "7",
    "\u00a0",
    "\u3000",
    "--",
    "...",
    "_",
    "\x00",
    "ñ",
    "½",
    "\u200d",
    "٣",
    "x" * 70,
    "=" * 90,
]
PIECES += [
    "<|endoftext|>",
    "<|im_start|>",
    "\ufeff",
    "\U0001f1e9\U0001f1ea",
    "don't",
    "I'Ve",
    "\u2028",
    "Ω",
    "ß",
    "\u0130",
]


def strange_texts(count, seed=0):
    """`count` texts, the same for the same seed."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.1:
            made.append(rng.choice(PIECES) * rng.randint(1, 300))
        elif kind < 0.25:
            points = (rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x30000)]) for _ in range(40))
            made.append("".join(map(chr, points)))
        else:
            made.append("".join(rng.choice(PIECES) for _ in range(rng.randint(1, 50))))
    return made
