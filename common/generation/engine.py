"""One engine for every model: generate, stream and score, batched.

The engine turns prompts into rows of ids, lets a `Decoder` grow them (decode.py), and turns what grew into completions.
Scoring needs no loop: it is one forward pass. Left out on purpose: drafts by a smaller model.
"""

import codecs
import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from common.generation import decode
from common.generation.cached import Cached, PrefixCache
from common.generation.decode import Decoder, GrowingRow, device_of, evaluation_mode, modules_of, padded
from common.generation.protocol import Completion, Prompt, TokenScores
from common.generation.sampling import SamplingParams
from common.model.logprobs import token_logprobs
from common.model.output import LanguageModel, is_bounded
from common.tokenization.chat import encode_chat
from common.tokenization.protocol import Tokenizer, document_end
from common.training.checkpoint import model_fingerprint


class Engine:
    """Runs a model on prompts.

    Wherever a prompt is taken, it may be a text, a conversation (a list of messages), or the ids that `encode` made of one.
    A model that is not bounded (see LanguageModel) is never shown more than `context_length` tokens; decode.context_start
    says which. For each call the model is put into evaluation mode, and afterwards back into the mode it was in.

    Args:
        model: see LanguageModel.
        tokenizer: the one that the model was trained with.
        template: source of the chat template that renders conversations; None for a model that only continues text.
        opening: ids that a text prompt begins with; by default the token that ends a document, because that is what stands
            before a document in training. `()` for models that were trained without one, or to compare with libraries that
            add none. A conversation begins as its template says.
        batch_size: rows in one forward pass.
        cached: False runs each step on everything again, as for a model without a cache: slow, and what the cache is
            tested against.
        ends: ids that end a text; by default the end of a document. A chat model also ends its turns.
        remember: `stream` begins from what it read and wrote the last time, as far as the next prompt is the same: for
            conversations. Costs the memory of one cache. What is remembered is dropped when the weights have changed; see
            cached.Weights for what is seen, and call `weights_changed` after a change that is not.
    Raises:
        ValueError: the tokenizer makes ids that the model has no row for.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        template: str | None = None,
        opening: Sequence[int] | None = None,
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
        self.model, self.tokenizer, self.template, self.batch_size = model, tokenizer, template, batch_size
        self.cached = cached and hasattr(model, "new_cache")
        self.end = document_end(tokenizer)
        self.ends = frozenset([self.end] if ends is None else ends)
        self.opening = [self.end] if opening is None else list(opening)
        self.prefix = PrefixCache() if remember and self.cached else None

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt is fed to the model as. How a prompt begins is decided here and nowhere else.

        A text begins with `opening`. A conversation is rendered by the template, which says itself how it begins, and ends
        with the opening of the assistant's next message.

        Raises:
            ValueError: a conversation, and the engine has no template; or the template refuses the conversation.
        """
        if isinstance(prompt, str):
            return [*self.opening, *self.tokenizer.encode(prompt)]
        if self.template is None:
            raise ValueError(
                "this engine has no chat template, so it cannot render messages: ask with a text, or give template=… "
                "(load_pretrained returns the model's as chat_template)"
            )
        return encode_chat(prompt, self.template, self.tokenizer).ids

    def identity(self) -> dict[str, Any]:
        """What decides the answers of this engine besides the code, as plain values: for the header of a trace file."""
        return {
            "model": model_fingerprint(self.model),
            "tokenizer": self.tokenizer.fingerprint,
            "template": None if self.template is None else hashlib.sha256(self.template.encode("utf-8")).hexdigest(),
            "context_length": self.model.context_length,
            "opening": self.opening,
            "ends": sorted(self.ends),
        }

    def weights_changed(self) -> None:
        """Forget what was computed with the old weights. Needed after changes that cached.Weights does not see."""
        if self.prefix is not None:
            self.prefix.clear()

    def decoder(self, *, prefix: PrefixCache | None = None) -> Decoder:
        """A loop of one's own, whose rows join and leave at any time: for serving, tools and agents."""
        reader = Cached(self.model, prefix) if self.cached else None
        return Decoder(self.model, self.tokenizer, self.ends, next_logits=reader)

    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        indices: Sequence[int] | None = None,
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt.

        Args:
            prompts: texts, conversations, or ids, at least one each (an empty text still begins with end-of-text).
            params: for all prompts, or one for each.
            indices: the number of each prompt for its random draws; its position by default. Give the problem's own
                number when only some of a set are run, so that a resumed run draws what the first would have drawn.
            forced: for each prompt, the ids that its completions begin with, as if the model had drawn them.
        Raises:
            ValueError: a prompt is empty, or one of the lists has another length than `prompts`.
        """
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        indices = range(len(prompts)) if indices is None else indices
        forced = [()] * len(prompts) if forced is None else forced
        for name, given in (("indices", indices), ("params", every), ("forced", forced)):
            if len(given) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts need as many {name}, got {len(given)}")
        tokens = self._ids_of(prompts)
        rows = [
            [GrowingRow(ids, one, index, k, start) for k in range(one.n)]
            for ids, one, index, start in zip(tokens, every, indices, forced, strict=True)
        ]
        waiting = [row for samples in rows for row in samples]
        waiting.sort(key=lambda row: (len(row.tokens), row.tokens))  # little padding, and equal prompts side by side
        seconds: dict[GrowingRow, float] = {}
        for first in range(0, len(waiting), self.batch_size):
            batch, start = waiting[first : first + self.batch_size], time.perf_counter()
            # Each batch runs to its end before the next one begins. Rows that joined where others left would keep the batch
            # full, but each arrival copies the cache; `decoder` is there for work that comes in as it comes.
            loop = self.decoder()
            loop.add(batch)
            while loop.rows:
                loop.step()
            seconds.update(dict.fromkeys(batch, (time.perf_counter() - start) / len(batch)))
        return [[completion_of(row, seconds[row]) for row in samples] for samples in rows]

    def stream(self, prompt: Prompt | Sequence[int], params: SamplingParams, *, index: int = 0) -> Iterator[str]:
        """The text of one completion in pieces, each as soon as it is certain. Together they are `generate`'s text.

        Bytes of a character that is not complete are held back, and so is what may be the beginning of a stop text.

        Args:
            params: with n = 1.
            index: the number of the prompt for its random draws, as in `generate`.
        Raises:
            ValueError: n is not 1, or the prompt is empty; at once, not at the first piece.
        """
        if params.n != 1:
            raise ValueError(f"a stream is one completion, and n is {params.n}: set n=1, or use generate")
        (ids,) = self._ids_of([prompt])
        return self._pieces(GrowingRow(ids, params, index))

    def _pieces(self, row: GrowingRow) -> Iterator[str]:
        sent, incremental = 0, codecs.getincrementaldecoder("utf-8")(errors="replace")
        loop = self.decoder(prefix=self.prefix)
        loop.add([row])
        while loop.rows:
            loop.step()
            certain = len(row.raw) - (0 if row.reason else undecided(row.raw, row.stops))
            piece = incremental.decode(row.raw[sent:certain], final=row.reason is not None)
            sent = certain
            if piece:
                yield piece

    def score(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
    ) -> list[TokenScores]:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`.

        It is the natural logarithm, over the tokenizer's vocabulary.

        At temperature 1 these are the numbers that `generate` returns as `Completion.logprobs` for the same tokens.

        Args:
            continuations: ids; an empty one has no scores.
            temperature: divides the logits. With it the scores are those of sampling at that temperature without filters.
        Raises:
            ValueError: a prompt is empty (the first token of nothing has no probability), the temperature is not positive,
                or a row does not fit into the context of a model that is not bounded.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations: need as many of each")
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: scores need a temperature above 0; 1 is the model itself")
        starts = self._ids_of(prompts)
        rows = [[*prompt, *continuation] for prompt, continuation in zip(starts, continuations, strict=True)]
        for i, continuation in enumerate(continuations):
            if len(continuation) and not 0 <= min(continuation) <= max(continuation) < self.tokenizer.vocab_size:
                raise ValueError(
                    f"continuation {i} has ids from {min(continuation)} to {max(continuation)}, outside the "
                    f"{self.tokenizer.vocab_size} tokens of the tokenizer: they have no probability"
                )
        for i, row in enumerate(rows):  # the last token is scored, not shown
            if not is_bounded(self.model) and len(row) - 1 > self.model.context_length:
                raise ValueError(
                    f"prompt {i} and its continuation show the model {len(row) - 1} tokens > context_length "
                    f"{self.model.context_length}: shorten the prompt from the left, or score a text in windows "
                    "(common.evaluation.text.score_documents)"
                )
        scores = [TokenScores([])] * len(rows)
        with evaluation_mode(modules_of(self.model)), torch.inference_mode():
            for batch in self._batches([len(row) if len(continuations[i]) else 0 for i, row in enumerate(rows)]):
                # Padding on the right: a position depends on earlier tokens alone, so nothing real sees it.
                ids, pad_mask = padded([rows[i] for i in batch], left=False, device=device_of(self.model))
                logits = self.model(ids[:, :-1], pad_mask=pad_mask[:, :-1]).logits  # (B, T - 1, V)
                for row, i in enumerate(batch):
                    scored = slice(len(starts[i]), len(rows[i]))
                    before = slice(scored.start - 1, scored.stop - 1)  # position t scores token t + 1
                    logprobs = token_logprobs(
                        logits[row, before],
                        ids[row, scored],
                        vocab_size=self.tokenizer.vocab_size,
                        temperature=temperature,
                    )
                    scores[i] = TokenScores(logprobs.tolist())
        return scores

    def _ids_of(self, prompts: Sequence[Prompt | Sequence[int]]) -> list[list[int]]:
        """The ids of each prompt. Raises ValueError that names the first empty one."""
        made = []
        for i, prompt in enumerate(prompts):
            # A conversation is a sequence of mappings, which hold no ids; an empty list is empty whichever it was meant as.
            asked = isinstance(prompt, str) or (len(prompt) > 0 and hasattr(prompt[0], "keys"))
            ids = self.encode(prompt) if asked else [int(token) for token in prompt]
            if not ids:
                raise ValueError(f"prompt {i} is empty: begin it with the end-of-text token (Engine.encode does)")
            made.append(ids)
        return made

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


def completion_of(row: GrowingRow, seconds: float = 0.0) -> Completion:
    """What an ended row of a Decoder has written.

    Raises:
        ValueError: the row has not ended.
    """
    if row.reason is None:
        raise ValueError("this row has not ended: take rows that Decoder.step returned")
    return Completion(
        ids=row.tokens[row.prompt_tokens :],
        text=row.raw.decode("utf-8", errors="replace"),
        logprobs=row.logprobs if row.params.logprobs else None,
        finish_reason=row.reason,
        prompt_tokens=row.prompt_tokens,
        seconds=seconds,
        sampled_logprobs=row.sampled_logprobs if row.params.logprobs else None,
        forced=row.was_forced if any(row.was_forced) else None,
    )


def undecided(raw: bytes, stops: Sequence[bytes]) -> int:
    """How many of the last bytes may be the beginning of a stop text.

    >>> undecided(b"to be", [b"be or", b"ear"])
    2
    """
    return max((k for stop in stops for k in range(1, len(stop)) if raw.endswith(stop[:k])), default=0)
