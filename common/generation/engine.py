"""One engine for every model: generate and score, batched.

This is the smallest honest form: each step runs the model on the last `context_length` tokens of every unfinished row.
For an n-gram that is all it can see, so nothing is recomputed in vain; a transformer will bring its cache in May,
behind the same two methods.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.generation.sampling import SamplingParams, sample, uniform_numbers
from common.model.output import LanguageModel
from common.tokenization.protocol import END_OF_TEXT, Tokenizer


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


@dataclass
class _Row:
    place: int  # position in the flat list of results
    prompt: list[int]
    uniforms: np.ndarray
    ids: list[int]
    logprobs: list[float]
    raw: bytes = b""


class Engine:
    """Runs a model on prompts of token ids.

    Args:
        model: see LanguageModel.
        tokenizer: the one that the model was trained with.
        batch_size: rows in one forward pass.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, batch_size: int = 256) -> None:
        if model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the model scores {model.vocab_size} tokens, the tokenizer makes {tokenizer.vocab_size}: "
                "they do not belong together"
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.end = tokenizer.specials[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """The prompt of a text as a document begins: end-of-text, then the text."""
        return [self.end, *self.tokenizer.encode(text)]

    @torch.inference_mode()
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
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {number} is empty: begin it with the end-of-text token (Engine.encode does)")
        rows = [
            _Row(i * params.n + k, list(prompt), uniform_numbers(params.seed, indices[i], k, params.max_tokens), [], [])
            for i, prompt in enumerate(prompts)
            for k in range(params.n)
        ]
        done: list[Completion | None] = [None] * len(rows)
        for first in range(0, len(rows), self.batch_size):
            for place, completion in self._run(rows[first : first + self.batch_size], params):
                done[place] = completion
        return [done[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]

    def _run(self, rows: list[_Row], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """Advance all rows token by token; a row leaves the batch when it is finished."""
        start, count, stops = time.perf_counter(), len(rows), [text.encode("utf-8") for text in params.stop]
        finished = []
        for step in range(params.max_tokens):
            logits = self._next_logits([(row.prompt + row.ids)[-self.model.context_length :] for row in rows])  # (B, V)
            uniforms = torch.from_numpy(np.array([row.uniforms[step] for row in rows])).to(logits.device)
            tokens = sample(logits, params, uniforms)
            chosen = [None] * len(rows)
            if params.logprobs:
                chosen = torch.log_softmax(logits.double(), dim=1).gather(1, tokens[:, None]).squeeze(1).tolist()
            going = []
            for row, token, logprob in zip(rows, tokens.tolist(), chosen, strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
                reason = self._reason_to_end(row, token, stops)
                if reason or step + 1 == params.max_tokens:
                    finished.append((row, reason or "length"))
                else:
                    going.append(row)
            rows = going
            if not rows:
                break
        seconds = (time.perf_counter() - start) / count
        for row, reason in finished:
            logprobs = row.logprobs if params.logprobs else None
            text = row.raw.decode("utf-8", errors="replace")
            yield row.place, Completion(row.ids, text, logprobs, reason, len(row.prompt), seconds)

    def _reason_to_end(self, row: _Row, token: int, stops: list[bytes]) -> str | None:
        """Why the row ends with this token, or None. Stop texts are looked for in generated bytes only."""
        if token == self.end:
            return "end_of_text"
        before = len(row.raw)
        row.raw += self.tokenizer.token_bytes(token)
        places = [row.raw.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
        found = [at for at in places if at >= 0]
        if not found:
            return None
        row.raw = row.raw[: min(found)]  # the earliest, whatever the order in which the stop texts were given
        return "stop"

    def _next_logits(self, contexts: list[list[int]]) -> torch.Tensor:
        """Logits of the token after each context, (B, V). Shorter contexts are padded on the left and masked."""
        width = max(map(len, contexts))
        ids = torch.zeros((len(contexts), width), dtype=torch.int64)
        pad_mask = torch.ones((len(contexts), width), dtype=torch.bool)
        for row, context in enumerate(contexts):
            ids[row, width - len(context) :] = torch.tensor(context)
            pad_mask[row, width - len(context) :] = False
        return self.model(ids, pad_mask=pad_mask).logits[:, -1]

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`, natural log.

        Raises ValueError where a prompt is empty: the first token of nothing has no probability.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations: need as many of each")
        scores: list[TokenScores | None] = [None] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(continuations[i]))
        for first in range(0, len(by_length), self.batch_size):
            batch = by_length[first : first + self.batch_size]
            rows = [[*prompts[i], *continuations[i]] for i in batch]
            width = max(map(len, rows))
            ids = torch.zeros((len(rows), width), dtype=torch.int64)
            pad_mask = torch.ones((len(rows), width), dtype=torch.bool)
            for row, tokens in enumerate(rows):  # padded on the right: a causal model never looks there
                ids[row, : len(tokens)] = torch.tensor(tokens)
                pad_mask[row, : len(tokens)] = False
            logprobs = torch.log_softmax(self.model(ids[:, :-1], pad_mask=pad_mask[:, :-1]).logits.double(), dim=-1)
            chosen = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)  # (B, T - 1)
            for row, i in enumerate(batch):
                start = len(prompts[i])
                if not start:
                    raise ValueError(f"prompt {i} is empty: begin it with the end-of-text token (Engine.encode does)")
                scores[i] = TokenScores(chosen[row, start - 1 : start - 1 + len(continuations[i])].tolist())
        return scores
