"""Small models with every parameter random, and a small tokenizer, for tests of the way out."""

import functools

import torch

from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.tokenization.bpe import BPETokenizer
from common.tokenization.protocol import SPECIALS
from tests.tokenization.strange import strange_texts

CONTEXT = 64
BIASES = {"attention_bias": True, "mlp_bias": True}
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu_tanh", **BIASES}


@functools.cache
def small_tokenizer():
    texts = ["To be, or not to be: that is the question. né 日本"] * 3 + strange_texts(40, seed=4)
    return BPETokenizer.train(texts, 300, specials=SPECIALS)


def made(changes, vocab_size=300, seed=0):
    """A model with every parameter random, norms and biases as well."""
    given = {"layers": 2, "width": 32, "heads": 4, "context_length": CONTEXT, "init_std": 0.2, **changes}
    model = Transformer(ModelConfig(vocab_size=vocab_size, **given), seed=seed).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids_of(rows=3, length=50, below=300):
    return torch.randint(below, (rows, length), generator=torch.Generator().manual_seed(2))
