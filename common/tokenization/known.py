"""Tokenizers that everybody knows, from their published files: GPT-2, GPT-4 and GPT-4o."""

import functools

import tiktoken.load

from common.foundation.assets import asset
from common.tokenization.bpe import BPETokenizer
from common.tokenization.interop import merges_of_ranks
from common.tokenization.patterns import GPT2_PATTERN, GPT4_GROUPS_PATTERN, O200K_PATTERN
from common.tokenization.protocol import END_OF_TEXT

# name -> (pattern, ids of the special tokens), as published with tiktoken
KNOWN = {
    "gpt2": (GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "cl100k": (
        GPT4_GROUPS_PATTERN,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k": (O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


@functools.cache
def known_ranks(name: str) -> dict[bytes, int]:
    """token bytes -> rank of "gpt2", "cl100k" or "o200k"."""
    if name == "gpt2":
        return tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(asset("gpt2_merges")), encoder_json_file=str(asset("gpt2_vocabulary"))
        )
    return tiktoken.load.load_tiktoken_bpe(str(asset(name)))


def known_encoding(name: str) -> tiktoken.Encoding:
    """tiktoken's own encoder on those ranks: the oracle for ours."""
    pattern, specials = KNOWN[name]
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=known_ranks(name), special_tokens=specials)


@functools.cache
def known(name: str) -> BPETokenizer:
    """The same tokenizer as one of ours. Deriving the merges of a large one takes some seconds."""
    pattern, specials = KNOWN[name]
    ranks = known_ranks(name)
    return BPETokenizer({rank: raw for raw, rank in ranks.items()}, merges_of_ranks(ranks), pattern, specials)
