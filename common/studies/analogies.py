"""Word analogies on token embeddings: a is to b as c is to whom? (Mikolov et al. 2013)

The answer is the token nearest, by cosine, to b - a + c. Nobody trained the table for that: what it knows about words fell
off from predicting the next one. Which tokens may be the answer decides the score, so it is an argument.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from common.foundation.statistics import Interval, mean_ci
from common.tokenization.protocol import Tokenizer

AT_ONCE = 512  # questions in one product with the whole table


@dataclass(frozen=True)
class Questions:
    """Questions whose four words are one token each. `kinds[i]` is the kind of row i of `ids`, (N, 4)."""

    kinds: list[str]
    ids: Int[Tensor, "N 4"]
    of: int

    def __len__(self) -> int:
        return len(self.kinds)

    def some(self, share: float) -> Self:
        """An even share of them."""
        step = max(1, round(1 / share))
        return type(self)(self.kinds[::step], self.ids[::step], self.of)


def questions(path: str | Path, tokenizer: Tokenizer) -> Questions:
    """Those of the file whose words are single tokens, as they stand inside of a text: with a space in front.

    Raises:
        ValueError: a line is neither a title (": name") nor four words; names the line.
    """
    tokens: dict[str, int | None] = {}

    def token_of(word: str) -> int | None:
        if word not in tokens:
            ids = tokenizer.encode(f" {word}")
            tokens[word] = ids[0] if len(ids) == 1 else None
        return tokens[word]

    kind, kinds, rows, of = "", [], [], 0
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if line.startswith(":"):
            kind = line[1:].strip()
            continue
        if len(words) != 4:
            raise ValueError(f"{path}, line {number}: four words are a question, got {line!r}")
        of += 1
        ids = [token_of(word) for word in words]
        if None not in ids:
            kinds.append(kind)
            rows.append(ids)
    return Questions(kinds, torch.tensor(rows, dtype=torch.int64).reshape(-1, 4), of)


@torch.no_grad()
def right(
    table: Float[Tensor, "V C"], asked: Questions, tokenizer: Tokenizer, *, whole_words: bool = True
) -> list[float]:
    """1 for each question that is answered right, 0 for the others.

    Args:
        whole_words: only words with a space in front may be answers, and none of the three given ones in other letters
            ("King", "KING"), as in the usual evaluations. False: every token but those three.
    """
    unit, texts = F.normalize(table.float(), dim=1), [tokenizer.decode([i]) for i in range(len(table))]
    number: dict[str, int] = {}
    same = torch.tensor([number.setdefault(text.strip().casefold(), len(number)) for text in texts])
    word = torch.tensor([re.fullmatch(r" [^\W\d_]+", text) is not None for text in texts])
    found = []
    for a, b, c, d in (part.T for part in asked.ids.split(AT_ONCE)):
        scores = (unit[b] - unit[a] + unit[c]) @ unit.T  # (N, V)
        if whole_words:
            scores.masked_fill_(~word, -torch.inf)
            for given in (a, b, c):
                scores.masked_fill_(same[None, :] == same[given][:, None], -torch.inf)
        scores.scatter_(1, torch.stack([a, b, c], dim=1), -torch.inf)
        found += (scores.argmax(dim=1) == d).float().tolist()
    return found


def by_kind(answers: list[float], asked: Questions) -> dict[str, Interval]:
    """The rate of each kind. Questions of a kind share words, so the interval is for these words."""
    groups = defaultdict(list)
    for kind, answer in zip(asked.kinds, answers, strict=True):
        groups[kind].append(answer)
    return {kind: mean_ci(values) for kind, values in groups.items()}


@torch.no_grad()
def nearest(
    table: Float[Tensor, "V C"], tokenizer: Tokenizer, words: tuple[str, str, str], count: int = 5
) -> list[str]:
    """The tokens nearest to b - a + c, best first."""
    a, b, c = (tokenizer.encode(f" {word}")[0] for word in words)
    unit = F.normalize(table.float(), dim=1)
    scores = (unit[b] - unit[a] + unit[c]) @ unit.T
    scores[[a, b, c]] = -torch.inf
    return [tokenizer.decode([i]) for i in scores.topk(count).indices.tolist()]
