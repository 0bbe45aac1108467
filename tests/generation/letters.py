"""A vocabulary of twelve tokens and tiny transformers over it: random texts that end, stop and break characters often."""

import torch

from common.model.config import ModelConfig
from common.model.output import is_bounded
from common.model.transformer import Transformer
from common.tokenization.protocol import END_OF_TEXT
from tests.model.kinds import KINDS

PIECES = [b"a", b"b", b"ab", b"b ", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", "€a".encode(), b"ba", b"\xf0\x9f"]
END = len(PIECES)
CONTEXT = 12


class Letters:
    """Tokens of one to four bytes, some of which are parts of characters."""

    vocab_size, specials, fingerprint = END + 1, {END_OF_TEXT: END}, "letters"

    def token_bytes(self, token_id):
        return b"" if token_id == END else PIECES[token_id]


TINY = {"vocab_size": END + 1, "context_length": CONTEXT, "layers": 2, "width": 16, "heads": 4, "init": "fan_in"}


def model_of(kind="rope", **changes):
    return Transformer(ModelConfig(**{**TINY, **KINDS[kind], **changes}), seed=1).eval()


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(END, (length,), generator=generator).tolist() for length in lengths]


RAGGED = prompts_of(1, 5, CONTEXT, 3, 2 * CONTEXT + 5, 5, 9)


class Watched:
    """A model that keeps each input, its shape and its real tokens; it has a cache if the model has one."""

    def __init__(self, model):
        self.model, self.shapes, self.shown = model, [], []
        self.vocab_size, self.context_length = model.vocab_size, model.context_length
        self.bounded = is_bounded(model)
        if hasattr(model, "new_cache"):
            self.new_cache = model.new_cache

    def __call__(self, ids, **more):
        self.shapes.append(tuple(ids.shape))
        pads = more.get("pad_mask")
        pads = torch.zeros_like(ids, dtype=torch.bool) if pads is None else pads
        self.shown.append([row[~pad].tolist() for row, pad in zip(ids, pads, strict=True)])
        return self.model(ids, **more)
