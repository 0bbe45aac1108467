"""March's failure gallery: masks, shapes and caches that are wrong while every shape is right.

The specimen is a tiny random Transformer. A bug replaces one function of `common` by a version that somebody once shipped,
for as long as the probes look. Nearly all of them train: the loss falls, on one batch to nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from common.diagnostics.core import Failure, Specimen, replaced
from common.diagnostics.handles import handles_of
from common.model import attention, masks, transformer
from common.model.attention import attend_naive
from common.model.cache import Cache
from common.model.config import ModelConfig
from common.model.masks import causal_mask
from common.model.transformer import Transformer
from common.pretrained.names import from_transformers

MONTH = "03_attention"
TINY = ModelConfig(
    vocab_size=31, context_length=64, layers=2, width=16, heads=4, key_value_heads=2, init="fan_in", tied=False
)


# --- the healthy specimens --------------------------------------------------------------------------------------------


def specimen(config: ModelConfig) -> dict[str, Any]:
    return {
        **handles_of(Transformer(config), untrained=True),
        "memory": 8 if config.window is None else config.layers * (config.window - 1),
        "attend": lambda q, k, v: attention.attend(q, k, v),
    }


def healthy() -> Specimen:
    return specimen(TINY)


def multi_head() -> Specimen:
    return specimen(TINY.but(key_value_heads=None))


def with_window() -> Specimen:
    return specimen(TINY.but(window=4))


def with_learned_positions() -> Specimen:
    return specimen(TINY.but(positions="learned"))


def with_alibi() -> Specimen:
    return specimen(TINY.but(positions="alibi"))


def beside_llama() -> Specimen:
    """The same weights as a transformers Llama, so that layers can be compared."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = from_transformers(theirs)
    return {
        **handles_of(ours),
        "reference_hidden": handles_of(theirs)["hidden"],
    }


# --- the bugs: attention ----------------------------------------------------------------------------------------------


def attending(by: Callable[..., tuple[Tensor, Tensor]], make: Callable[[], Specimen] = healthy) -> Iterator[Specimen]:
    """The specimen with another attention, (output, weights) as `attend_naive` gives them, in both forms."""

    @contextmanager
    def both() -> Iterator[Specimen]:
        only_output = lambda *tensors, dropout=0.0, **more: by(*tensors, **more)[0]  # noqa: E731
        with patch.object(attention, "attend", only_output), patch.object(attention, "attend_naive", by):
            yield make()

    return both()


def own(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    return causal_mask(q.shape[2], k.shape[2]) if mask is None else mask


def grouped(q: Tensor, *shared: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in shared]


def top_left_causal() -> Iterator[Specimen]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()  # query 0 at key 0, wherever it stands
        return attend_naive(q, k, v, mask=mask, **more)

    return attending(wrong)


def chunk_unmasked() -> Iterator[Specimen]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        if mask is None and q.shape[2] != k.shape[2]:  # "with a cache there is one query, which may see all"
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        return attend_naive(q, k, v, mask=mask, **more)

    return attending(wrong)


def leak_by_one() -> Iterator[Specimen]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        if mask is None:
            queries, keys = q.shape[2], k.shape[2]
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries + 1)  # without the + 1 it is right
        return attend_naive(q, k, v, mask=mask, **more)

    return attending(wrong)


def masked_after_softmax() -> Iterator[Specimen]:
    def wrong(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, bias: Any = None, scale: Any = None
    ) -> Any:
        k, v = grouped(q, k, v)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) * own(q, k, mask)
        return weights @ v, weights

    return attending(wrong)


def masked_with_a_small_number() -> Iterator[Specimen]:
    def wrong(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, bias: Any = None, scale: Any = None
    ) -> Any:
        k, v = grouped(q, k, v)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~own(q, k, mask), -10.0)
        weights = scores.softmax(-1)
        return weights @ v, weights

    return attending(wrong)


def softmax_over_queries() -> Iterator[Specimen]:
    def wrong(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, bias: Any = None, scale: Any = None
    ) -> Any:
        k, v = grouped(q, k, v)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~own(q, k, mask), -torch.inf)
        weights = scores.softmax(-2).nan_to_num()
        return weights @ v, weights

    return attending(wrong)


def no_scale() -> Iterator[Specimen]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        return attend_naive(q, k, v, scale=1.0, **more)

    return attending(wrong)


def heads_tiled() -> Iterator[Specimen]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        tiled = [x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v)]  # 0 1 0 1 where 0 0 1 1 is meant
        return attend_naive(q, *tiled, **more)

    return attending(wrong)


def nan_row() -> Iterator[Specimen]:
    def wrong(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, bias: Any = None, scale: Any = None
    ) -> Any:
        k, v = grouped(q, k, v)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~own(q, k, mask), -torch.inf)
        weights = scores.softmax(-1)  # of a row of -inf: NaN
        return weights @ v, weights

    return attending(wrong)


# --- the bugs: shapes -------------------------------------------------------------------------------------------------


class HeadsByView(attention.Attention):
    """(B, T, H D) seen as (B, H, T, D) at once: right shape, and a head is a stretch of time."""

    def forward(self, x: Tensor, context: attention.AttentionContext | None = None) -> Tensor:
        batch, length, _ = x.shape
        config = self.config
        q, k, v = self.query(x), self.key(x), self.value(x)
        q = q.view(batch, config.heads, length, config.d_head)
        k, v = (y.view(batch, config.groups, length, config.d_head) for y in (k, v))
        return self.output(self.together(context.attend(q, k, v, scale=None, dropout=0.0)))

    def together(self, mixed: Tensor) -> Tensor:
        """The heads, (B, H, T, D), side by side again."""
        return mixed.transpose(1, 2).flatten(2)


class HeadsByViewTwice(HeadsByView):
    """The same view on the way in and on the way out: nothing leaks, and a token sees little more than its neighbour."""

    def together(self, mixed: Tensor) -> Tensor:
        return mixed.reshape(len(mixed), mixed.shape[2], -1)


class RowsMixed(attention.Attention):
    """The heads are put back together as (T, B, C) and read as (B, T, C): tokens of one row go to another."""

    def forward(self, x: Tensor, context: attention.AttentionContext | None = None) -> Tensor:
        mixed = super().forward(x, context)
        return mixed.transpose(0, 1).reshape(mixed.shape)


class TransposedWeights(attention.Attention):
    """y = x W where y = x W^T is meant. It runs because the matrix is square."""

    def forward(self, x: Tensor, context: attention.AttentionContext | None = None) -> Tensor:
        with patch.object(self.query, "forward", lambda y: F.linear(y, self.query.weight.T)):
            return super().forward(x, context)


def with_attention(kind: type, make: Callable[[], Specimen] = healthy) -> Iterator[Specimen]:
    return replaced(transformer, "Attention", kind, make)


# --- the bugs: padding, documents, cache ------------------------------------------------------------------------------


def nan_in_padding() -> Iterator[Specimen]:
    """Padding is masked, but not cleared: 0 * NaN is NaN."""
    clear = Tensor.masked_fill

    def not_at_the_embedding(tensor: Tensor, mask: Tensor, value: float) -> Tensor:
        return tensor if value == 0.0 and mask.shape[-1] == 1 and tensor.ndim == 3 else clear(tensor, mask, value)

    return replaced(Tensor, "masked_fill", not_at_the_embedding, healthy)


def positions_count_padding() -> Iterator[Specimen]:
    def wrong(document_ids: Tensor | None, pad_mask: Tensor | None = None) -> Tensor:
        shape_of = pad_mask if document_ids is None else document_ids
        return torch.arange(shape_of.shape[1]).expand_as(shape_of)

    return replaced(transformer, "positions_of", wrong, with_learned_positions)


def documents_ignored() -> Iterator[Specimen]:
    right = masks.attention_mask

    def wrong(document_ids: Tensor | None = None, *, positions: Tensor, **more: Any) -> Tensor:
        return right(None, positions=positions, **more)

    return replaced(transformer, "attention_mask", wrong, healthy)


def cache_not_reset() -> Specimen:
    """One cache for all requests, rewound by nobody."""
    made = healthy()
    model = made["module"]
    kept = {}

    def open_cache(batch: int) -> Callable[[Tensor], Tensor]:
        cache = kept.setdefault(batch, model.new_cache(batch, 2000))

        @torch.no_grad()
        def step(ids: Tensor) -> Tensor:
            return model(ids, cache=cache).logits

        return step

    return {**made, "open_cache": open_cache}


def overflow_overwrites() -> Iterator[Specimen]:
    """A full cache drops its oldest places to make room, and nobody is told."""
    right = Cache.begin

    def wrong(self: Cache, shape: tuple[int, int], *more: Any) -> None:
        over = self.length + shape[1] - self.capacity
        if over > 0:
            self.length = max(0, self.length - over)
            self.capacity = max(self.capacity, shape[1])
            self.layers = [
                tuple(F.pad(t, (0, 0, 0, max(0, shape[1] - t.shape[2]))) for t in layer) for layer in self.layers
            ]
            room = max(0, shape[1] - self.pad_mask.shape[1])
            self.pad_mask, self.document_ids = F.pad(self.pad_mask, (0, room)), F.pad(self.document_ids, (0, room))
        right(self, shape, *more)

    return replaced(Cache, "begin", wrong, healthy)


def window_ignored_when_decoding() -> Iterator[Specimen]:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        return attend_naive(q, k, v, mask=None if q.shape[2] == 1 else mask, **more)

    return attending(wrong, with_window)


def alibi_lost_when_decoding() -> Iterator[Specimen]:
    """Distances are taken within the queries: for a single one, all are zero."""

    def wrong(slopes: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        distance = (queries[:, :, None] - queries[:, None, :]).to(slopes.dtype)
        bias = -slopes[None, :, None, None] * distance[:, None]
        return F.pad(bias, (keys.shape[1] - queries.shape[1], 0))

    return replaced(transformer, "alibi_bias", wrong, with_alibi)


# --- the entries ------------------------------------------------------------------------------------------------------

LEARNS = ("loss-at-init", "overfit-one-batch")
Entry = partial(Failure, month=MONTH)

FAILURES = [
    Entry(
        id="attention/top-left-causal",
        title="The causal mask is aligned at the wrong corner",
        story="With a cache there are fewer queries than keys, and a flag called causal puts the triangle at the upper "
        "left: the newest token sees the first key and nothing else. Training never meets the case.",
        source="pytorch/pytorch#144858, #103082, #108108",
        symptom="training and evaluation are right; generated text is nonsense from the second token on",
        fix="Align the mask at the lower right: the queries are the last T of the S keys.",
        broken=top_left_causal,
        healthy=healthy,
        probe="cached-equals-uncached",
        blind_spots=("future-perturbation", *LEARNS),
    ),
    Entry(
        id="attention/chunk-unmasked",
        title="A chunk that follows a cache sees its own future",
        story="The mask is left out whenever there are more keys than queries, because a single new token may see "
        "everything. A prompt that is read in chunks then looks ahead within each.",
        source="mlx-node/mlx-node#24 (a review comment); lablup/mlxcel#1001",
        symptom="long prompts, which are read in chunks, are continued worse than short ones",
        fix="Build the mask from the offset, not from whether there is one.",
        broken=chunk_unmasked,
        healthy=healthy,
        probe="cached-equals-uncached",
        blind_spots=("future-perturbation", *LEARNS),
    ),
    Entry(
        id="attention/mask-leaks-one",
        title="The causal mask lets every position see one token ahead",
        story="A triangle with its diagonal off by one shows each position the token that it has to predict. "
        "The model learns to copy it.",
        source="widely known; A. Karpathy, A Recipe for Training Neural Networks, on errors that fail silently",
        symptom="the best training loss anybody has seen, and samples that are garbage",
        fix="Perturb the future and see that nothing moves, before the first training.",
        broken=leak_by_one,
        healthy=healthy,
        probe="future-perturbation",
        blind_spots=LEARNS,
    ),
    Entry(
        id="attention/masked-after-softmax",
        title="The mask is applied after the softmax",
        story="Weights of later keys are set to zero once they are normalised. What is left no longer sums to one, and "
        "how much is left depends on the future.",
        source="widely known",
        symptom="loss falls as usual; early positions are faint",
        fix="Mask the scores with -inf, then take the softmax.",
        broken=masked_after_softmax,
        healthy=healthy,
        probe="rows-sum-to-one",
        blind_spots=LEARNS,
    ),
    Entry(
        id="attention/small-number-mask",
        title="The mask is a small negative number",
        story="Masked scores are set to -10 and not to minus infinity. A forbidden key keeps a weight that is small "
        "where scores are small, and larger as they grow.",
        source="hyunwoongko/transformer#10",
        symptom="a weak leak from the future that no shape and no first loss shows",
        fix="-inf, and a row that is masked everywhere treated apart.",
        broken=masked_with_a_small_number,
        healthy=healthy,
        probe="mass-on-the-future",
        blind_spots=LEARNS,
    ),
    Entry(
        id="attention/softmax-over-queries",
        title="The softmax runs over the queries",
        story="dim=-2 instead of dim=-1: columns sum to one and rows do not. Shapes are the same, because T by T is "
        "square.",
        source="labmlai/annotated_deep_learning_paper_implementations#146",
        symptom="it trains, a little worse; each weight depends on queries that come later",
        fix="Softmax over the keys, and a test that rows sum to one.",
        broken=softmax_over_queries,
        healthy=healthy,
        probe="rows-sum-to-one",
        blind_spots=LEARNS,
    ),
    Entry(
        id="attention/no-scale",
        title="Scores are not divided by the square root of the head's width",
        story="Products of D random numbers spread like sqrt(D). Unscaled, the softmax of a wide head is close to "
        "one-hot before anything is learned, and its gradient close to zero.",
        source="Vaswani et al. 2017, section 3.2.1; as a bug: mlc-ai/mlc-llm#3426",
        symptom="it trains, slower at larger widths; at width 4 nobody can tell",
        fix="Scale by 1 / sqrt(D), with D of a head and not of the model.",
        broken=no_scale,
        healthy=healthy,
        probe="attend-parity",
        blind_spots=("future-perturbation", "cached-equals-uncached", *LEARNS),
    ),
    Entry(
        id="attention/heads-tiled",
        title="Key-value heads are paired with the wrong queries",
        story="Grouped-query attention repeats each key-value head for its group: 0 0 1 1. Tiling gives 0 1 0 1. "
        "Trained from scratch it is another numbering; with somebody's weights it is another model.",
        source="apple/axlearn#842, onnx/onnx#7274",
        symptom="nothing at all when trained from scratch; fluent nonsense with imported weights",
        fix="repeat_interleave, not repeat.",
        broken=heads_tiled,
        healthy=healthy,
        probe="attend-parity",
        blind_spots=("future-perturbation", "cached-equals-uncached", *LEARNS),
    ),
    Entry(
        id="attention/nan-row",
        title="A row that may see nothing becomes NaN, and spreads",
        story="The softmax of a row of minus infinities is 0/0. It stands at padding, where nobody looks; in the next "
        "layer it is a value with weight zero, and zero times NaN is NaN.",
        source="pytorch/pytorch#103749, #41508",
        symptom="NaN in batches with padding, and only there",
        fix="A fully masked row gives zeros.",
        broken=nan_row,
        healthy=healthy,
        probe="padding-invariance",
        blind_spots=("future-perturbation", "cached-equals-uncached", *LEARNS),
    ),
    Entry(
        id="attention/heads-by-view",
        title="Heads are cut by a view across time",
        story="(B, T, H D) is viewed as (B, H, T, D) without the transpose between. The shape is right; a head now "
        "holds a stretch of time with all widths mixed, and the causal mask is about something else.",
        source="A. Karpathy, A Recipe for Training Neural Networks: view where transpose is meant",
        symptom="it trains, and better than it should",
        fix="View to (B, T, H, D), then transpose.",
        broken=lambda: with_attention(HeadsByView),
        healthy=healthy,
        probe="future-perturbation",
        blind_spots=LEARNS,
    ),
    Entry(
        id="attention/heads-by-view-twice",
        title="Heads are cut by a view, and joined by one",
        story="The same slip on both sides. Each head is a stretch of time, so nothing leaks from the future, and "
        "nothing arrives from far in the past either.",
        source="this month's notebook, section on broadcasting",
        symptom="it trains like a model with a short context, because it is one",
        fix="Ask whether the past arrives, not only whether the future stays out.",
        broken=lambda: with_attention(HeadsByViewTwice, multi_head),
        healthy=multi_head,
        probe="past-matters",
        blind_spots=("future-perturbation", "cross-row", *LEARNS),
    ),
    Entry(
        id="attention/rows-mixed",
        title="Rows of the batch are mixed on the way back",
        story="The result is put together as (T, B, C) and reshaped to (B, T, C). Each token gets the attention of "
        "another row; the residual path carries the rest.",
        source="A. Karpathy, A Recipe for Training Neural Networks; jsbaan/transformer-from-scratch#6",
        symptom="loss a little higher; with a batch of one everything is right",
        fix="Perturb one row, see that the others stay.",
        broken=lambda: with_attention(RowsMixed),
        healthy=healthy,
        probe="cross-row",
        blind_spots=LEARNS,
    ),
    Entry(
        id="attention/transposed-weight",
        title="A weight is used transposed, and square enough to run",
        story="Weights of shape (out, in) are multiplied as if they were (in, out). With as many outputs as inputs "
        "nothing complains; trained from scratch nothing is lost, imported weights are.",
        source="rasbt/LLMs-from-scratch#893",
        symptom="loaded weights give text that is nearly right",
        fix="Test with shapes where nothing is square; compare layer by layer with a reference.",
        broken=lambda: with_attention(TransposedWeights, beside_llama),
        healthy=beside_llama,
        probe="layer-parity",
        blind_spots=("future-perturbation", "cross-row", "cached-equals-uncached"),
    ),
    Entry(
        id="attention/nan-in-padding",
        title="What stands at padding is multiplied by zero and not removed",
        story="Padding is masked in the scores, but its values are whatever memory held. Zero times NaN is NaN.",
        source="pytorch/pytorch#101967; Dao-AILab/flash-attention#2374",
        symptom="now and then a NaN, never on the same machine",
        fix="Clear what stands at padding before it is used.",
        broken=nan_in_padding,
        healthy=healthy,
        probe="poisoned-padding",
        blind_spots=("padding-invariance", "future-perturbation", *LEARNS),
    ),
    Entry(
        id="attention/left-padding-positions",
        title="Positions count the padding",
        story="Shorter prompts are padded on the left, and position 0 is a pad. With learned positions every shorter "
        "row of a batch is read at places where it never stood.",
        source="ndif-team/nnsight#673; unslothai/unsloth#3699",
        symptom="answers depend on which other prompts are in the batch",
        fix="Positions count real tokens.",
        broken=positions_count_padding,
        healthy=with_learned_positions,
        probe="padding-invariance",
        blind_spots=("future-perturbation", "cached-equals-uncached", *LEARNS),
    ),
    Entry(
        id="attention/documents-ignored",
        title="Packed documents see each other",
        story="The loader packs documents into rows and says which is which; the mask is made without it.",
        source="widely known",
        symptom="loss as usual; a document's probability depends on its neighbours",
        fix="Document ids go into the mask.",
        broken=documents_ignored,
        healthy=healthy,
        probe="documents-apart",
        blind_spots=("future-perturbation", "cached-equals-uncached", *LEARNS),
    ),
    Entry(
        id="attention/cache-not-reset",
        title="The second request continues the first",
        story="The cache and its position pointer live on the model and are not rewound between two prompts. "
        "The first answer is right.",
        source="rasbt/LLMs-from-scratch#925",
        symptom="the first request of a process is answered well",
        fix="A cache belongs to a request; generate twice and compare.",
        broken=cache_not_reset,
        healthy=healthy,
        probe="cached-equals-uncached",
        blind_spots=("future-perturbation", *LEARNS),
    ),
    Entry(
        id="attention/cache-overflow",
        title="A full cache quietly forgets",
        story="When capacity is reached the oldest entries are overwritten or positions are clamped, and generation "
        "goes on.",
        source="rasbt/LLMs-from-scratch#925 (a window larger than the context)",
        symptom="long generations lose their thread at a fixed length",
        fix="A full cache is an error.",
        broken=overflow_overwrites,
        healthy=healthy,
        probe="cache-overflow",
        blind_spots=("cached-equals-uncached", *LEARNS),
    ),
    Entry(
        id="attention/window-ignored-when-decoding",
        title="Decoding ignores the sliding window",
        story="The fast path for a single query leaves out the mask, since that query is the last. "
        "A window then is a window in training only.",
        source="karpathy/nanochat#452, #456",
        symptom="generated text differs from what the model would score, from the window's length on",
        fix="The window applies to one query as to many.",
        broken=window_ignored_when_decoding,
        healthy=with_window,
        probe="cached-equals-uncached",
        blind_spots=("future-perturbation", *LEARNS),
    ),
    Entry(
        id="attention/alibi-lost-when-decoding",
        title="Distances vanish while decoding",
        story="The bias of ALiBi is built over the queries. For a single one, the only distance is zero: every key is "
        "as near as every other.",
        source="keras-team/keras-hub#2861, #2977",
        symptom="training is right, decoding rambles",
        fix="Distances from the position of the query to that of each key.",
        broken=alibi_lost_when_decoding,
        healthy=with_alibi,
        probe="cached-equals-uncached",
        blind_spots=("future-perturbation", *LEARNS),
    ),
    Entry(
        id="attention/untrained-positions",
        title="The table is longer than the training",
        story="Learned positions have a row for each place up to the context length; training used the first half. The "
        "rest are the random numbers of the start, and nothing refuses them.",
        source="this month's notebook, section on order: from 1.000 to 0.52 at twice the length",
        symptom="good up to the length of training, broken beyond",
        fix="A context length that was trained; evaluate at the length that is promised.",
        broken=with_learned_positions,
        healthy=with_learned_positions,
        probe=None,
        survives="Every row is a row of numbers, and the model is as consistent with them as with trained ones. Only text "
        "of that length, after training, shows it.",
    ),
]
