"""The decoding loop, and the slow form of what it asks a model at each step.

A `GrowingRow` is one sample while it grows. A `Decoder` holds the rows that are running: `add` lets rows join at any time,
and each `step` gives every row one more token and returns the rows that ended with it. The decoder asks a function for the
logits after each row. There are two: `recompute`, here, shows the model the whole of every row at each step and is the
explanation; `Cached` (cached.py) computes the same from what it remembers and is what runs for a transformer.

Left out on purpose: paged memory.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.generation.sampling import SamplingParams, sample, uniform_numbers
from common.model.logprobs import token_logprobs
from common.model.output import LanguageModel, is_bounded
from common.tokenization.protocol import Tokenizer

LOGITS_AT_ONCE = 2**27  # numbers in the logits of one forward pass, B * T * V: half a gigabyte of float32


@dataclass(eq=False)
class GrowingRow:
    """One sample while it grows. Two rows are equal only if they are the same object.

    Args:
        tokens: the prompt to begin with; the tokens that follow are appended to it.
        params: how this row is sampled, whatever the others do.
        index: number of the prompt, and
        sample_index: number of the sample, for the random draws: with the seed they decide all of them.
        forced: ids that are given and not drawn, first come first served; more may be appended while the row runs. A forced
            token never ends a row, so that a whole turn of somebody else can be inserted.
    Attributes:
        prompt_tokens: how many of `tokens` are the prompt.
        uniforms: the number in [0, 1) that each position after the prompt is drawn with, (max_tokens,).
        was_forced: for each token after the prompt, True if it was given.
        logprobs, sampled_logprobs: of the tokens after the prompt, if asked for; see Completion.
        raw: the bytes after the prompt, without the stop text that ended them.
        reason: why the row ended ("end_of_text", "stop" or "length"), or None while it runs.
    Raises:
        ValueError: the prompt is empty, so that there is nothing a first token could follow.
    """

    tokens: list[int]
    params: SamplingParams
    index: int = 0
    sample_index: int = 0
    forced: deque[int] = field(default_factory=deque)
    prompt_tokens: int = field(init=False)
    uniforms: np.ndarray = field(init=False, repr=False)
    was_forced: list[bool] = field(init=False, default_factory=list)
    logprobs: list[float] = field(init=False, default_factory=list)
    sampled_logprobs: list[float] = field(init=False, default_factory=list)
    raw: bytes = field(init=False, default=b"")
    reason: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise ValueError("the prompt is empty: begin it with the end-of-text token (Engine.encode does)")
        self.tokens = [int(token) for token in self.tokens]
        self.forced = deque(self.forced)
        self.prompt_tokens = len(self.tokens)
        self.uniforms = uniform_numbers(self.params.seed, self.index, self.sample_index, self.params.max_tokens)
        self.stops = [text.encode("utf-8") for text in self.params.stop]

    @property
    def generated(self) -> int:
        """How many tokens follow the prompt so far."""
        return len(self.tokens) - self.prompt_tokens


class Decoder:
    """Rows that grow together, one token a step. Rows may join and leave between any two steps.

    What a row writes depends on its own tokens, params, index and sample_index alone, never on which other rows are running.

    Args:
        model: see LanguageModel. For each step it is put into evaluation mode, and afterwards back into the mode it was in.
        tokenizer: the one that the model was trained with.
        ends: ids that end a row when they are drawn.
        next_logits: from rows to the logits of the token after each, (B, V); by default `recompute` with this model.
    Attributes:
        rows: those that are running, in the order in which they joined. Remove one to break it off.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        ends: Collection[int],
        *,
        next_logits: Callable[[list[GrowingRow]], Float[Tensor, "B V"]] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.ends = model, tokenizer, frozenset(ends)
        self.next_logits = next_logits or (lambda rows: recompute(model, rows))
        self.rows: list[GrowingRow] = []
        self.modules = modules_of(model)  # listed once: to walk through a model costs as much as a step of a small one

    def add(self, rows: Iterable[GrowingRow]) -> None:
        """Let rows join. They are read at the next step, together with what the running rows need.

        Raises:
            ValueError: a row has ended, or is running already.
        """
        for row in rows:
            if row.reason is not None or row in self.rows:
                state = "is running already" if row.reason is None else f"has ended ({row.reason})"
                raise ValueError(
                    f"row {row.index}, sample {row.sample_index}, {state}: add each row once, while it is new"
                )
            self.rows.append(row)

    def step(self) -> list[GrowingRow]:
        """Append one token to every running row. Returns the rows that ended with it, which leave; [] if none runs."""
        if not self.rows:
            return []
        with evaluation_mode(self.modules), torch.inference_mode():
            # The rows of a padded head beyond the vocabulary are no tokens: they must be neither drawn nor counted.
            logits = self.next_logits(self.rows)[:, : self.tokenizer.vocab_size]  # (B, V)
            numbers = [row.uniforms[len(row.was_forced)] for row in self.rows]  # of the position that comes now
            uniforms = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
            params = self.rows[0].params
            if all(row.params is params for row in self.rows):  # the usual case needs no copies
                self._append(self.rows, logits, uniforms)
            else:
                for members in self._alike():
                    part = torch.tensor(members, device=logits.device)
                    self._append([self.rows[i] for i in members], logits[part], uniforms[part])
        ended = [row for row in self.rows if row.reason is not None]
        if ended:
            self.rows = [row for row in self.rows if row.reason is None]
        return ended

    def _alike(self) -> list[list[int]]:
        """The numbers of the running rows, in groups whose tokens can be drawn together."""
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault((row.params.distribution, row.params.logprobs), []).append(i)
        return list(groups.values())

    def _append(self, rows: list[GrowingRow], logits: Float[Tensor, "B V"], uniforms: Float[Tensor, "B"]) -> None:
        """One more token for each of these rows, which all draw in the same way."""
        params = rows[0].params
        ids, drawn_logprobs = sample(logits, params, uniforms)
        tokens, forced = ids.tolist(), [bool(row.forced) for row in rows]
        # A given token takes the place of the drawn one. The draw is made anyway, because a number belongs to a position:
        # what follows a forced token is drawn with the same numbers as if that token had been drawn.
        if any(forced):
            tokens = [row.forced.popleft() if row.forced else token for row, token in zip(rows, tokens, strict=True)]
        if params.logprobs:
            ids = torch.tensor(tokens, device=logits.device)
            model_logprobs = token_logprobs(logits, ids, vocab_size=self.tokenizer.vocab_size)
            lists = zip(rows, model_logprobs.tolist(), drawn_logprobs.tolist(), forced, strict=True)
            for row, logprob, drawn, given in lists:
                row.logprobs.append(logprob)
                row.sampled_logprobs.append(0.0 if given else drawn)
        for row, token, given in zip(rows, tokens, forced, strict=True):
            row.tokens.append(token)
            row.was_forced.append(given)
            row.reason = self._reason_to_end(row, token, given)

    def _reason_to_end(self, row: GrowingRow, token: int, given: bool) -> str | None:
        """Why the row ends with this token, or None. Stop texts are looked for behind the prompt only."""
        if token in self.ends and not given:
            return "end_of_text"
        before = len(row.raw)
        row.raw += self.tokenizer.token_bytes(token)
        # A stop text counts only if a drawn token completes it: a tool's output may contain whatever it likes.
        if row.stops and not given:
            # It may begin in older bytes but must end in the new ones, because the older ones were searched before.
            found = [row.raw.find(stop, max(0, before - len(stop) + 1)) for stop in row.stops]
            places = [place for place in found if place >= 0]
            if places:
                row.raw = row.raw[: min(places)]  # the earliest, whatever the order in which the stop texts were given
                return "stop"
        return "length" if len(row.was_forced) >= row.params.max_tokens else None


def recompute(model: LanguageModel, rows: Iterable[GrowingRow]) -> Float[Tensor, "B V"]:
    """Logits of the token after each row, from everything the model may see of it. Nothing is kept from the step before."""
    length = model.context_length
    if is_bounded(model):  # exactly what its output can depend on
        windows = [row.tokens[-length:] for row in rows]
    else:
        windows = [row.tokens[context_start(len(row.tokens), length) :] for row in rows]
    ids, pad_mask = padded(windows, left=True, device=device_of(model))
    rows_at_once = max(1, LOGITS_AT_ONCE // (ids.shape[1] * model.vocab_size))
    parts = zip(ids.split(rows_at_once), pad_mask.split(rows_at_once), strict=True)
    return torch.cat([model(part, pad_mask=pads).logits[:, -1] for part, pads in parts])


def context_start(length: int, context_length: int) -> int:
    """The first token that an unbounded model is shown of a row of `length` tokens.

    A row is shown whole while it fits into the context. Beyond that the start moves by half a context at a time, to the
    smallest multiple of context_length // 2 from which the rest fits. If it moved by one token at each step, every token
    would get a new position each time and nothing in a cache could be kept; this way a row is read again once in half a
    context.
    The start depends on the row's own length alone, so that a row reads the same whatever its neighbours are.

    >>> [context_start(length, 8) for length in (1, 8, 9, 12, 13, 16, 17)]
    [0, 0, 4, 4, 8, 8, 12]
    """
    if length <= context_length:
        return 0
    stride = max(1, context_length // 2)
    return -(-(length - context_length) // stride) * stride


def padded(
    rows: Sequence[Sequence[int]], *, left: bool, device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """(ids, pad_mask) of rows of any lengths, filled up with zeros on one side; the mask is True at padding."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    fill = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, fill, strict=True)])
    place = torch.arange(width).expand(len(rows), -1)
    pad_mask = place < width - lengths[:, None] if left else place >= lengths[:, None]
    return ids.to(device), pad_mask.to(device)


def device_of(model: LanguageModel) -> torch.device:
    """Where the model's tensors are; the CPU for a model that has none."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def modules_of(model: LanguageModel) -> list[nn.Module]:
    """Every module of a model, itself included; none if it is not made of modules."""
    return list(model.modules()) if isinstance(model, nn.Module) else []


@contextlib.contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put these modules into evaluation mode, and each back into its own mode afterwards, also after an exception.

    A training leaves its model in training mode, where dropout would draw from a generator that no sample's seed knows.
    Modules that were in evaluation mode before (a frozen part, say) stay in it.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
