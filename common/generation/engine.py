"""One engine for every model: generate, stream and score, batched.

A step shows the model what its rows may see (decode.py: with a cache where the model has one), draws one token for each
row, and lets the finished ones go. `generate` and `stream` share that loop. Left out on purpose: prompts that arrive while
others are being answered, and drafts by a smaller model.
"""

import codecs
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from common.generation import decode
from common.generation.decode import Cached, Row, device_of, padded, recompute
from common.generation.sampling import SamplingParams, sample, uniform_numbers
from common.model.output import LanguageModel, is_bounded
from common.tokenization.protocol import Tokenizer, document_end


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        ids: every token that was generated, with the end-of-text token or the stop text that ended it.
        text: the text before that end.
        logprobs: natural log-probability of each of `ids`, or None if not asked for.
        finish_reason: "end_of_text", "stop" or "length".
        prompt_tokens: length of the prompt.
        seconds: this row's share of the wall time of its batch.
    """

    ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: str
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class TokenScores:
    """Natural log-probabilities of the tokens of one continuation, given its prompt."""

    logprobs: list[float]

    @property
    def sum(self) -> float:
        return float(np.sum(self.logprobs))


class Engine:
    """Runs a model on prompts of token ids.

    A model that is not bounded (see LanguageModel) is never shown more than `context_length` tokens; which ones, says
    decode.context_start.

    Args:
        model: see LanguageModel.
        tokenizer: the one that the model was trained with.
        batch_size: rows in one forward pass.
        cached: False runs each step on everything again, as for a model without a cache: slow, and what the cache is
            tested against.
        ends: ids that end a text; by default the end of a document. A chat model also ends its turns.
        remember: `stream` begins from what it read and wrote the last time, as far as the next prompt is the same: for
            conversations. Costs the memory of one cache.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 256,
        cached: bool = True,
        ends: Collection[int] | None = None,
        remember: bool = False,
    ) -> None:
        if model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the model scores {model.vocab_size} tokens, the tokenizer makes {tokenizer.vocab_size}: "
                "they do not belong together"
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        if isinstance(model, torch.nn.Module):
            model.eval()  # dropout would be drawn from a generator that belongs to nobody
        self.cached = cached and hasattr(model, "new_cache")
        self.end = document_end(tokenizer)
        self.ends = frozenset([self.end] if ends is None else ends)
        self.memory = decode.Memory() if remember and self.cached else None

    def encode(self, text: str) -> list[int]:
        """The prompt of a text as a document begins: end-of-text, then the text."""
        return [self.end, *self.tokenizer.encode(text)]

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt.

        Args:
            prompts: token ids, at least one each (an empty text still begins with end-of-text).
            indices: the number of each prompt for its random draws; its position by default. Give the problem's own
                number when only some of a set are run, so that a resumed run draws what the first would have drawn.
        """
        indices = range(len(prompts)) if indices is None else indices
        if len(indices) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many indices, got {len(indices)}")
        _check_not_empty(prompts)
        rows = [
            _new_row(i * params.n + k, prompt, params, indices[i], k)
            for i, prompt in enumerate(prompts)
            for k in range(params.n)
        ]
        done: list[Completion | None] = [None] * len(rows)
        rows.sort(key=lambda row: (len(row.tokens), row.tokens))  # little padding, and equal prompts side by side
        for first in range(0, len(rows), self.batch_size):
            batch, start = rows[first : first + self.batch_size], time.perf_counter()
            for _ in self._steps(batch, params):
                pass
            seconds = (time.perf_counter() - start) / len(batch)
            for row in batch:
                done[row.place] = Completion(
                    ids=row.tokens[row.prompt_tokens :],
                    text=row.raw.decode("utf-8", errors="replace"),
                    logprobs=row.logprobs if params.logprobs else None,
                    finish_reason=row.reason,
                    prompt_tokens=row.prompt_tokens,
                    seconds=seconds,
                )
        return [done[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]

    def stream(self, prompt: Sequence[int], params: SamplingParams, *, index: int = 0) -> Iterator[str]:
        """The text of one completion in pieces, each as soon as it is certain. Together they are `generate`'s text.

        Held back: bytes of a character that is not complete, and what may be the beginning of a stop text.

        Args:
            params: with n = 1.
            index: the number of the prompt for its random draws, as in `generate`.
        """
        if params.n != 1:
            raise ValueError(f"a stream is one completion, and n is {params.n}: set n=1, or use generate")
        _check_not_empty([prompt])
        return self._pieces(_new_row(0, prompt, params, index, 0), params)

    def _pieces(self, row: Row, params: SamplingParams) -> Iterator[str]:
        stops, sent = [text.encode("utf-8") for text in params.stop], 0
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for _ in self._steps([row], params, self.memory):
            certain = len(row.raw) - (0 if row.reason else undecided(row.raw, stops))
            piece = decoder.decode(row.raw[sent:certain], final=row.reason is not None)
            sent = certain
            if piece:
                yield piece

    @torch.inference_mode()  # torch enters it while this generator runs, and leaves it at each yield
    def _steps(self, rows: list[Row], params: SamplingParams, memory: decode.Memory | None = None) -> Iterator[None]:
        """Advance all rows until each has a reason to have ended. Yields after each token."""
        stops = [text.encode("utf-8") for text in params.stop]
        cached = Cached(self.model, params.max_tokens, memory) if self.cached else None
        next_logits = cached or partial(recompute, self.model)
        for step in range(params.max_tokens):
            logits = next_logits(rows)[:, : self.tokenizer.vocab_size]  # (B, V); padded rows of the head are no tokens
            if memory is not None:
                cached.remember()
            uniforms = torch.tensor([row.uniforms[step] for row in rows], dtype=torch.float64, device=logits.device)
            tokens = sample(logits, params, uniforms)
            if params.logprobs:
                chosen = torch.log_softmax(logits.double(), dim=1).gather(1, tokens[:, None]).squeeze(1).tolist()
                for row, logprob in zip(rows, chosen, strict=True):
                    row.logprobs.append(logprob)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.tokens.append(token)
                row.reason = self._reason_to_end(row, token, stops)
                if row.reason is None and step + 1 == params.max_tokens:
                    row.reason = "length"
            yield
            rows = [row for row in rows if row.reason is None]
            if not rows:
                return

    def _reason_to_end(self, row: Row, token: int, stops: list[bytes]) -> str | None:
        """Why the row ends with this token, or None. Stop texts are looked for in generated bytes only."""
        if token in self.ends:
            return "end_of_text"
        before = len(row.raw)
        row.raw += self.tokenizer.token_bytes(token)
        places = [row.raw.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
        found = [at for at in places if at >= 0]
        if not found:
            return None
        row.raw = row.raw[: min(found)]  # the earliest, whatever the order in which the stop texts were given
        return "stop"

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`, natural log.

        Raises:
            ValueError: a prompt is empty (the first token of nothing has no probability), or a row does not fit into the
                context of a model that is not bounded.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations: need as many of each")
        _check_not_empty(prompts)
        rows = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
        for i, row in enumerate(rows):  # the last token is scored, not shown
            if not is_bounded(self.model) and len(row) - 1 > self.model.context_length:
                raise ValueError(
                    f"prompt {i} and its continuation show the model {len(row) - 1} tokens > context_length "
                    f"{self.model.context_length}: shorten the prompt from the left, or score a text in windows "
                    "(common.evaluation.text.score_documents)"
                )
        scores = [TokenScores([])] * len(rows)
        for batch in self._batches([len(row) if len(continuations[i]) else 0 for i, row in enumerate(rows)]):
            ids, pad_mask = padded([rows[i] for i in batch], left=False, device=device_of(self.model))
            logits = self.model(ids[:, :-1], pad_mask=pad_mask[:, :-1]).logits  # (B, T - 1, V)
            for row, i in enumerate(batch):
                scored = slice(len(prompts[i]), len(rows[i]))
                before = slice(scored.start - 1, scored.stop - 1)  # position t scores token t + 1
                logprobs = torch.log_softmax(logits[row, before].double(), dim=-1)
                scores[i] = TokenScores(logprobs.gather(1, ids[row, scored, None]).squeeze(1).tolist())
        return scores

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Numbers of the rows that are not empty, by length, in batches whose logits fit into LOGITS_AT_ONCE."""
        batch: list[int] = []
        for i in sorted((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__):
            numbers = (len(batch) + 1) * lengths[i] * self.model.vocab_size  # this row would be the longest
            if batch and (len(batch) == self.batch_size or numbers > decode.LOGITS_AT_ONCE):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def undecided(raw: bytes, stops: Sequence[bytes]) -> int:
    """How many of the last bytes may be the beginning of a stop text.

    >>> undecided(b"to be", [b"be or", b"ear"])
    2
    """
    return max((k for stop in stops for k in range(1, len(stop)) if raw.endswith(stop[:k])), default=0)


def _new_row(place: int, prompt: Sequence[int], params: SamplingParams, index: int, k: int) -> Row:
    """Sample k of the prompt with this index."""
    uniforms = uniform_numbers(params.seed, index, k, params.max_tokens)
    return Row(place, [int(token) for token in prompt], len(prompt), uniforms)


def _check_not_empty(prompts: Sequence[Sequence[int]]) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: begin it with the end-of-text token (Engine.encode does)")
