"""How text is cut into words before byte pairs are merged: merges never cross a cut.

The patterns need the `regex` module (Unicode classes such as \\p{L}). Each matches every character of every text, so that
cutting loses nothing; a test checks it.
"""

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# GPT-4's cuts contractions in either case, keeps a newline with the punctuation before it, and lets a word begin with one
# character that is no letter. Numbers are cut into groups of up to three digits.
GPT4_GROUPS_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Ours by default: the same, with every digit on its own. A model that adds 47 and 38 must see four digits; where 47 is one
# token and 138 another, the columns of a sum are not in the text any more.
GPT4_PATTERN = GPT4_GROUPS_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# GPT-4o's distinguishes the case of letters; only used for reading o200k_base.
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# SmolLM2 cuts out single digits first and applies GPT-2's pattern to the pieces between them. In one pattern: white space
# before a digit ends its piece, so nothing of it is kept back for the next word.
SMOLLM_PATTERN = r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
