"""Our spine as a platform: the same file in our code and in transformers, compared in all that a user would notice.

Ids of strange strings, every stage of a forward pass, greedy text. transformers is imported here alone, when it is needed:
it is the reference, not a part of the machine.
"""

import functools
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from tqdm import tqdm

from common.foundation.assets import asset, catalogue
from common.foundation.gguf_file import GGUFFile
from common.generation.decode import padded
from common.generation.engine import Completion, Engine
from common.generation.prepacked import prepacked
from common.generation.sampling import SamplingParams
from common.pretrained.load import Pretrained
from common.pretrained.parity import Parity, parity_report
from common.tokenization.protocol import Tokenizer

PASSAGE = (
    "The old bridge had been closed since spring, and the ferry ran only twice a day. On Tuesday 14 March 2017 a letter "
    'arrived: "Come at once. Bring the maps, the lamp and 250 metres of rope; say nothing to anybody." We left that '
    "night, three of us in a borrowed van, and reached the coast before sunrise. Nobody had told us that the tide was "
    "already turning. "
)
PROMPTS = (
    "The capital of France is", "Water boils at", "Once upon a time there was", "The three branches of government are",
    "def fibonacci(n):", "The opposite of cold is", "To be, or not to be,", "In 1969, two men", "The recipe needs flour,",
    "My favourite season is", "A triangle has", "The doctor said that", "Dear Sir or Madam,", "The sun rises in the",
    "Plants make their food by", "She opened the door and", "The largest planet is", "Two plus two is", "Music is",
    "The first rule of",
)  # fmt: skip

PIECES = (
    " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "a", "The", " the", "'s", "'LL", "12", "7", "½", "٣", "é", "e\u0301",
    "ñ", "日本", "😀", "👩\u200d👧", "\u200d", "--", "...", "_", "=" * 20, "x" * 30, "\x00", "\x7f", "ﬁ",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The same source elsewhere: transformers' model in evaluation mode, and a tokenizer (None where there is none).

    Attributes:
        converted: of a GGUF file, the tokenizer that transformers makes of it; it takes every file's words for GPT-2's.
    """

    model: nn.Module
    tokenizer: Any
    converted: Any = None


def reference_of(source: str | Path) -> Reference:
    """Load a GGUF file, a folder or a hub name with transformers, in float32."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = str(source)
    path = asset(name) if name in catalogue() and not Path(name).exists() else Path(name)
    more = {"gguf_file": path.name} if path.is_file() else {}
    place = path.parent if path.is_file() else name
    bars = functools.partial(tqdm, disable=True)  # in a notebook its bar would be a widget
    with warnings.catch_warnings(), patch.object(modeling_gguf_pytorch_utils, "tqdm", bars):
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **more).eval()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **more)
        except (OSError, ValueError, TypeError, KeyError):  # a folder without a tokenizer
            tokenizer = None
    if path.is_file():
        return Reference(model, _tokenizer_of_gguf(path), tokenizer)
    return Reference(model, tokenizer)


def _tokenizer_of_gguf(path: Path) -> Any:
    """The tokenizers library on the vocabulary and merges of the file, words cut as `tokenizer.ggml.pre` says."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers

    found = GGUFFile(path).metadata
    vocabulary = {text: i for i, text in enumerate(found["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in found["tokenizer.ggml.merges"]]
    cut = {
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }  # fmt: skip
    pre = found.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in cut:
        raise ValueError(f"{path}: words are cut as {pre!r}; there is a reference for {', '.join(cut)}")
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(cut[pre]())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def strange_texts(count: int, seed: int = 0) -> list[str]:
    """Strings that tokenizers disagree about: spaces, digits, contractions, marks, scripts, characters from anywhere."""
    drawn = random.Random(seed)

    def piece() -> str:
        if drawn.random() < 0.6:
            return drawn.choice(PIECES)
        first, last = drawn.choice(((32, 127), (160, 0x3000), (0x1F300, 0x1F650)))
        return chr(drawn.randrange(first, last))

    return ["".join(piece() for _ in range(drawn.randrange(1, 12))) for _ in range(count)]


def differing_ids(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> list[str]:
    """The texts of which the two make other ids. Special tokens in a text are none, for both."""
    made = theirs(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [text for text, ids in zip(texts, made, strict=True) if ours.encode(text) != ids]


def forward_parity(loaded: Pretrained, theirs: nn.Module, *, tokens: int = 256) -> Parity:
    """Every stage on one long row and its beginning: of a passage, or of random ids where there is no tokenizer."""
    model, tokens = loaded.model, min(tokens, loaded.model.context_length)
    if loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (1, tokens), generator=generator)
    else:
        one = loaded.tokenizer.encode(PASSAGE)
        ids = torch.tensor([(one * (1 + tokens // len(one)))[:tokens]])
    return parity_report(model, theirs, ids)


def greedy_parity(
    loaded: Pretrained, theirs: nn.Module, prompts: Sequence[str] = PROMPTS, *, tokens: int = 200
) -> tuple[list[bool], list[Completion]]:
    """(is it the same text, our completion) of each prompt: `tokens` more, or up to the end of a document or of the context.

    Both run all prompts in one batch, with padding on the left.
    """
    engine = Engine(prepacked(loaded.model), loaded.tokenizer, opening=())  # transformers puts nothing in front, either
    ids = [engine.encode(prompt) for prompt in prompts]
    room = loaded.model.context_length - max(map(len, ids))  # beyond it, each engine has rules of its own
    params = SamplingParams(temperature=0, max_tokens=max(1, min(tokens, room)))
    ours = [completion for (completion,) in engine.generate(ids, params)]
    rows, pads = padded(ids, left=True, device=torch.device("cpu"))
    with torch.inference_mode():
        made = theirs.generate(
            rows, attention_mask=(~pads).long(), max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=engine.end,
            pad_token_id=engine.end,
        )  # fmt: skip
    same = [row[rows.shape[1] :][: len(mine.ids)].tolist() == mine.ids for row, mine in zip(made, ours, strict=True)]
    return same, ours
