"""Probes of anybody's network: padding, packing, a cache, what it learns, and what it should not.

They train copies, read logits, and know nothing about the inside. The reference of `attend-parity` is a loop in NumPy and
doubles; the source of `entropy-floor` has an entropy that can be worked out.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.diagnostics.core import Reading, probe
from common.diagnostics.probes.models import bare, change, inputs, logits_of
from common.diagnostics.sources import MarkovSource


def losses_of_a_copy(module: nn.Module, batches: Callable[[int], Tensor], steps: int, rate: float) -> list[float]:
    """Losses in nats of a copy of the module, trained on rows (B, T + 1): its own loop trusts no trainer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin = copy.deepcopy(module).train()
        optimizer = torch.optim.Adam(twin.parameters(), lr=rate)
        losses = []
        for step in range(steps):
            rows = batches(step)
            logits = bare(twin(rows[:, :-1]))
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@probe("loss-at-init", "does an untrained model know nothing?")
def loss_at_init(untrained: nn.Module, vocab_size: int, *, band: float = 1.0) -> Reading:
    """Distance of the first loss from ln V, in nats: logits of unit variance add half a nat. Few bugs show here."""
    rows, _ = inputs(None, vocab_size, length=17)
    nats = F.cross_entropy(logits_of(untrained, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    return Reading(abs(float(nats) - math.log(vocab_size)), band, "nats from ln V")


@probe("overfit-one-batch", "can it learn one batch by heart?")
def overfit_one_batch(untrained: nn.Module, vocab_size: int, *, steps: int = 150, limit: float = 0.5) -> Reading:
    """Loss after a few steps on the same four rows of a Markov text, in nats."""
    texts = MarkovSource().texts(4, 17, seed=3)
    rows = torch.tensor([[ord(c) - ord("a") for c in text] for text in texts]) % vocab_size
    return Reading(
        losses_of_a_copy(untrained, lambda _: rows, steps, 1e-2)[-1], limit, f"nats after {steps} steps on one batch"
    )


@probe("entropy-floor", "is the loss too good to be true?")
def entropy_floor(untrained: nn.Module, vocab_size: int, *, steps: int = 100, margin: float = 0.06) -> Reading:
    """How far the loss on a Markov source with known entropy falls below what is possible, in nats.

    The first token of a row has no context, which only raises the loss. The mean over the last ten steps is one over 5,120
    symbols, whose standard error is 0.013 nats; the margin is four and a half of them.
    """
    source = MarkovSource()
    floor = source.entropy_rate * math.log(2)
    texts = source.texts(16 * steps, 33, seed=5)
    ids = torch.tensor([[ord(c) - ord("a") for c in text] for text in texts]) % vocab_size
    losses = losses_of_a_copy(untrained, lambda step: ids[16 * step : 16 * step + 16], steps, 1e-2)
    return Reading(floor - float(np.mean(losses[-10:])), margin, f"nats below the entropy rate, {floor:.3f}")


@probe("parameters-move", "does every parameter take part?")
def parameters_move(module: nn.Module, vocab_size: int) -> Reading:
    """Parameters that are not finite, or that a loss gives no gradient. Frozen ones (requires_grad off) do not count."""
    twin = copy.deepcopy(module).train()
    rows, _ = inputs(None, vocab_size, length=17)
    logits = bare(twin(rows[:, :-1]))
    F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    still = [
        name
        for name, p in twin.named_parameters()
        if p.requires_grad
        and (not p.isfinite().all() or p.grad is None or not p.grad.isfinite().all() or not p.grad.any())
    ]
    return Reading(len(still), 0, f"still or not finite: {', '.join(still[:4]) or 'none'}")


@probe("past-matters", "does an output depend on the past at all?")
def past_matters(model: Callable, vocab_size: int, memory: int, *, least: float = 1e-6) -> Reading:
    """Change the token `memory` places before the last: the last logits must move. The value is 1 if they do not."""
    batch, other = inputs(None, vocab_size, length=max(memory + 1, 2))
    changed = batch.clone()
    changed[:, -1 - memory] = other[:, -1 - memory]
    differ = batch[:, -1 - memory] != changed[:, -1 - memory]
    moved = change(logits_of(model, batch)[differ, -1], logits_of(model, changed)[differ, -1]).max()
    return Reading(float(not moved > least), 0, f"{memory} tokens back moves the last logits by {float(moved):.2g}")


@probe("padding-invariance", "does padding change what a row means?")
def padding_invariance(model: Callable, padded: Callable, vocab_size: int, *, tolerance: float = 1e-3) -> Reading:
    """Rows of different lengths, padded left and right by different amounts, beside a row of nothing but padding.

    Every real token must get the logits that its row gets alone.
    """
    batch, other = inputs(None, vocab_size, length=10)
    worst, where = 0.0, "left and right"
    for side in ("left", "right"):
        for extra in (0, 3):
            lengths = (10, 4, 7, 0)
            width = 10 + extra
            ids, pads = torch.full((4, width), int(other[0, 0])), torch.ones(4, width, dtype=torch.bool)
            for row, length in enumerate(lengths):
                place = slice(width - length, width) if side == "left" else slice(0, length)
                ids[row, place], pads[row, place] = batch[row, :length], False
            found = _raw(padded(ids, pads))
            for row, length in enumerate(lengths[:3]):
                alone = logits_of(model, batch[row : row + 1, :length])[0]
                moved = _moved(found[row][~pads[row]], alone)
                if _worse(moved, worst):
                    worst, where = moved, f"{side}, {width - length} pads"
    return Reading(worst, tolerance, f"largest change of a logit, in deviations ({where})")


def _worse(a: float, b: float) -> bool:
    """True if a is a worse reading than b. NaN is the worst, and stays."""
    return not math.isnan(b) and not a <= b


def _worst(values: Iterable[float]) -> float:
    """The largest, or NaN if there is one: `max` would lose it."""
    worst = -math.inf
    for value in values:
        worst = value if _worse(value, worst) else worst
    return worst


def _moved(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in standard deviations of the expected logits: an untrained model has small ones."""
    return float(change(found, expected).max() / expected[expected.isfinite()].std().clamp(min=1e-12))


def _raw(out: object) -> Tensor:
    return bare(out).detach().double()


@probe("poisoned-padding", "does NaN in padding stay there?")
def poisoned_padding(poisoned: Callable, padded: Callable, vocab_size: int, *, tolerance: float = 1e-3) -> Reading:
    """The embeddings at padding are NaN: the logits of real tokens must be those with ordinary padding."""
    ids, _ = inputs(None, vocab_size, length=10)
    pads = torch.zeros_like(ids, dtype=torch.bool)
    pads[0, :4] = pads[1, 7:] = True
    clean, dirty = _raw(padded(ids, pads)), _raw(poisoned(ids, pads))
    return Reading(
        _moved(dirty[~pads], clean[~pads]), tolerance, "largest change of a real token's logit, in deviations"
    )


@probe("documents-apart", "does a packed document see its neighbours?")
def documents_apart(model: Callable, packed: Callable, vocab_size: int, *, tolerance: float = 1e-3) -> Reading:
    """Three documents in one row get the logits that each gets alone."""
    ids, _ = inputs(None, vocab_size, length=12)
    documents = torch.tensor([[1] * 4 + [2] * 5 + [3] * 3]).expand_as(ids)
    together = _raw(packed(ids, documents))
    alone = torch.cat([logits_of(model, ids[:, a:b]) for a, b in ((0, 4), (4, 9), (9, 12))], dim=1)
    return Reading(_moved(together, alone), tolerance, "largest change of a logit, in deviations")


@probe("cached-equals-uncached", "does a cache change the answer?")
def cached_equals_uncached(
    model: Callable, open_cache: Callable, vocab_size: int, *, tolerance: float = 1e-3
) -> Reading:
    """Every split point, several chunk sizes, token by token; and then another text, on the next cache."""
    batch, other = inputs(None, vocab_size, length=12)
    plans = [[n, 12 - n] for n in range(1, 12)] + [[1] * 12, [5, 1, 1, 5], [4, 4, 4]]
    worst, where = 0.0, "all"
    for ids in (batch, other):
        whole = logits_of(model, ids)
        for plan in plans:
            step, start, made = open_cache(len(ids)), 0, []
            for size in plan:
                with torch.no_grad():
                    made.append(_raw(step(ids[:, start : start + size])))
                start += size
            moved = _moved(torch.cat(made, dim=1), whole)
            if _worse(moved, worst):
                worst, where = moved, str(plan)
    return Reading(worst, tolerance, f"largest change of a logit, in deviations (chunks {where})")


@probe("cache-overflow", "is a full cache an error?")
def cache_overflow(bounded_cache: Callable, vocab_size: int) -> Reading:
    """Six tokens fit into a cache for six and more do not, in three ways: 1 for each that raises nothing."""
    ids, _ = inputs(None, vocab_size, length=8)
    silent = 0
    for plan in ([6, 2], [6, 1], [1] * 7):
        step, start = bounded_cache(6), 0
        for size in plan:
            fits = start + size <= 6
            try:
                step(ids[:1, start : start + size])
            except Exception:
                if fits:  # broken in another way: that is not what an error of a full cache means
                    raise
                break
            start += size
        silent += start > 6
    return Reading(silent, 0, "ways to overflow without an error, of 3")


@probe("rows-sum-to-one", "are attention weights weights?")
def rows_sum_to_one(attention_maps: Callable, vocab_size: int, *, tolerance: float = 1e-4) -> Reading:
    """Largest distance of a query's total weight from one."""
    ids, _ = inputs(None, vocab_size, length=10)
    with torch.no_grad():
        worst = _worst(float((w.double().sum(-1) - 1).abs().max()) for w in attention_maps(ids))
    return Reading(worst, tolerance, "largest distance of a row's sum from one")


@probe("mass-on-the-future", "is a masked key worth exactly nothing?")
def mass_on_the_future(attention_maps: Callable, vocab_size: int) -> Reading:
    """Attention on later tokens, which must be zero and not merely small."""
    ids, _ = inputs(None, vocab_size, length=10)
    with torch.no_grad():
        worst = _worst(float(w.double().triu(1).sum(-1).max()) for w in attention_maps(ids))
    return Reading(worst, 0.0, "largest weight of a query on later tokens")


@probe("attend-parity", "is it attention, head by head?")
def attend_parity(attend: Callable, *, tolerance: float = 1e-5) -> Reading:
    """Against a loop over batch, heads and queries in NumPy: more heads than key-value heads, wider heads, fewer queries."""
    worst = 0.0
    for batch, heads, groups, queries, keys, width in ((2, 4, 2, 5, 5, 3), (1, 6, 2, 2, 7, 8), (2, 2, 2, 4, 4, 64)):
        generator = torch.Generator().manual_seed(width)
        q = torch.randn(batch, heads, queries, width, generator=generator)
        k, v = torch.randn(2, batch, groups, keys, width, generator=generator)
        expected = np.zeros(q.shape)
        for b, h, t in np.ndindex(batch, heads, queries):
            group, seen = h // (heads // groups), keys - queries + t + 1
            scores = k[b, group, :seen].double().numpy() @ q[b, h, t].double().numpy() / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            expected[b, h, t] = weights / weights.sum() @ v[b, group, :seen].double().numpy()
        worst = _worst([worst, float(np.abs(attend(q, k, v).detach().double().numpy() - expected).max())])
    return Reading(worst, tolerance, "largest difference from a loop in NumPy")


@probe("layer-parity", "where does it first differ from the reference?")
def layer_parity(hidden: Callable, reference_hidden: Callable, vocab_size: int, *, tolerance: float = 1e-5) -> Reading:
    """Relative difference after each layer; the note names the first that differs."""
    ids, _ = inputs(None, vocab_size, length=24)
    worst, first = 0.0, "no layer"
    with torch.no_grad():
        for (name, mine), (_, other) in zip(hidden(ids), reference_hidden(ids), strict=True):
            apart = float((mine.double() - other.double()).norm() / other.double().norm())
            if not apart <= tolerance and first == "no layer":
                first = name
            worst = _worst([worst, apart])
    return Reading(worst, tolerance, f"relative difference; first beyond: {first}")


@probe("rotation", "does a rotary position turn by its distance alone?")
def rotation(rotate_at: Callable, *, width: int = 32, tolerance: float = 2e-3) -> Reading:
    """Position 0 changes nothing; and q at p against k at p + d gives the same product for p up to 10,000."""
    generator = torch.Generator().manual_seed(0)
    q, k = F.normalize(torch.randn(2, 1, 1, 1, width, generator=generator), dim=-1)
    worst = float((rotate_at(q, 0) - q).abs().max())
    for distance in (1, 7, 40):
        products = [float((rotate_at(q, p) * rotate_at(k, p + distance)).sum()) for p in (0, 3, 300, 10_000)]
        worst = _worst([worst, *(abs(product - products[0]) for product in products)])
    return Reading(worst, tolerance, "largest change of a product of unit vectors")


@probe("parameter-count", "does it have the parameters that it says, and should?")
def parameter_count_agrees(module: nn.Module, parameter_count: int, expected_parameters: int) -> Reading:
    """Distinct numbers in the module against what it reports and against an independent count."""
    distinct = {p.data_ptr(): p.numel() for p in module.parameters()}
    found = sum(distinct.values())
    wrong = max(abs(found - parameter_count), abs(found - expected_parameters))
    return Reading(wrong, 0, f"has {found:,}, says {parameter_count:,}, should have {expected_parameters:,}")


@probe("weights-survive", "are loaded weights still there?")
def weights_survive(load_weights: Callable, module: nn.Module) -> Reading:
    """Give it other weights, and count the tensors that are not what was loaded."""
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randn(p.shape, generator=generator) for name, p in module.state_dict().items()}
    if "head.weight" in given and "embedding.weight" in given and module.head.weight is module.embedding.weight:
        given["head.weight"] = given["embedding.weight"]
    kept = load_weights({name: tensor.clone() for name, tensor in given.items()}).state_dict()
    changed = [name for name, tensor in given.items() if not torch.equal(kept[name], tensor)]
    return Reading(len(changed), 0, f"changed: {', '.join(changed[:3]) or 'none'}")


@probe("gradient-by-depth", "does the gradient reach the bottom as it left the top?")
def gradient_by_depth(stream: Callable, vocab_size: int, *, powers: float = 3.0) -> Reading:
    """Powers of ten between the largest and the smallest gradient of the stream, before training."""
    rows, _ = inputs(None, vocab_size, length=17)
    logits, states = stream(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    norms = [float(g.norm()) for g in torch.autograd.grad(loss, list(_distinct(states)))]
    smallest = -_worst(-norm for norm in norms)
    return Reading(math.log10(_worst(norms) / max(smallest, 1e-30)), powers, "powers of ten between the layers")


def _distinct(states: Sequence[Tensor]) -> Sequence[Tensor]:
    return list({id(state): state for state in states}.values())
