"""Probes of other people's weights: a loader, an exporter, a template, beside an independent implementation.

They know no library: a checkpoint is named tensors, a model a callable. What is compared is divided by the deviation of the
reference's logits, so that one tolerance serves models of any scale. In float32 two right implementations differ by 1e-6
(two layers) to 3e-5 (SmolLM2's thirty), and the smallest mistake of June's gallery, the other GELU, by 1e-3: the tolerance
is between. In bfloat16 rounding alone makes some hundredths, and `parity_tolerance` must say so.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from common.diagnostics.core import Reading, probe
from common.diagnostics.probes.models import change, inputs, logits_of

PARITY = 3e-4
SAME = 1e-6  # two runs of one model on the same rows
NAMES = ("model", "CodeLlama-34b", "Meta-Llama-3-8B", "gpt2-to-qwen3-mistral", "v1.5 final")
CONVERSATIONS = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "café, 2 + 2\n  and  日本?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": ""},
    ],
)


def apart(found: Tensor, expected: Tensor) -> Tensor:
    """Largest difference at each position, (B, T, V) to (B, T), in deviations of the expected logits."""
    if found.shape != expected.shape:
        raise ValueError(f"the logits have shape {tuple(found.shape)}, those of the reference {tuple(expected.shape)}")
    return change(found.double(), expected.double()).amax(-1) / _spread(expected.double())


def _spread(logits: Tensor) -> Tensor:
    """The deviation of the logits, from the median: rows of the vocabulary that are masked with -1e9 must not count."""
    finite = logits[logits.isfinite()]
    typical = 1.4826 * (finite - finite.median()).abs().median()  # as of a normal distribution
    return typical if typical > 0 else finite.std().clamp(min=1e-12)


def _compared(found: Tensor, expected: Tensor, tolerance: float, first: int = 0) -> Reading:
    wrong = apart(found, expected)
    beyond = (~(wrong <= tolerance)).any(0).nonzero().flatten()
    where = f"the first place beyond is {first + int(beyond[0])}" if len(beyond) else "no place beyond"
    return Reading(float(wrong.max()), tolerance, f"largest difference of a logit, in deviations; {where}")


def _same(found: Tensor, right: Tensor) -> bool:
    return found.shape == right.shape and bool((apart(found, right) <= SAME).all())


@probe("logit-parity", "are the logits of a sentence those of the reference?")
def logit_parity(
    model: Callable,
    reference_model: Callable,
    vocab_size: int,
    ids: Tensor | None = None,
    *,
    parity_tolerance: float = PARITY,
) -> Reading:
    """Rows of 16 tokens, what one looks at first. What shows only far out does not show here."""
    batch, _ = inputs(ids, vocab_size)
    return _compared(logits_of(model, batch), logits_of(reference_model, batch), parity_tolerance)


@probe("long-range-parity", "is the end of a long row that of the reference?")
def long_range_parity(
    model: Callable,
    reference_model: Callable,
    vocab_size: int,
    reference_context: int,
    ids: Tensor | None = None,
    *,
    parity_tolerance: float = PARITY,
    most: int = 2048,
) -> Reading:
    """The last quarter of a row as long as the context. A longer one than `most` tokens must be asked for."""
    length = min(reference_context, most)
    batch, _ = inputs(ids, vocab_size, rows=2, length=length)
    late = batch.shape[1] - batch.shape[1] // 4
    found, expected = (
        torch.cat([logits_of(one, row[None])[:, late:] for row in batch]) for one in (model, reference_model)
    )
    return _compared(found, expected, parity_tolerance, late)


@probe("greedy-parity", "does it write what the reference writes?")
def greedy_parity(greedy: Callable, reference_greedy: Callable, vocab_size: int, *, count: int = 12) -> Reading:
    """The most probable tokens after four short prompts. In float32: in bfloat16 two candidates may tie."""
    batch, _ = inputs(None, vocab_size, length=6)
    other = [
        i for i, row in enumerate(batch.tolist()) if list(greedy(row, count)) != list(reference_greedy(row, count))
    ]
    return Reading(float(len(other)), 0.0, f"of {len(batch)} prompts that go on otherwise")


def _without(checkpoint: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in checkpoint.items() if key != name}


def _misfits(checkpoint: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The checkpoint with one thing wrong with it, and what."""
    for name, tensor in checkpoint.items():
        rest = _without(checkpoint, name)
        yield f"{name} missing", rest
        yield f"{name} under another name", {**rest, f"wrapped.{name}": tensor.clone()}
        if tensor.ndim:
            yield f"{name} one row short", {**rest, name: tensor[:-1].clone()}


@probe("loads-or-refuses", "is a checkpoint with one tensor that does not fit refused?")
def loads_or_refuses(checkpoint: Mapping, load_foreign: Callable, vocab_size: int) -> Reading:
    """Each tensor missing, renamed, too short. An error is right, and so is a model that is none the worse."""
    batch, _ = inputs(None, vocab_size)
    right, taken, count = logits_of(load_foreign(dict(checkpoint)), batch), [], 0
    for what, tensors in _misfits(checkpoint):
        count += 1
        try:
            found = logits_of(load_foreign(tensors), batch)
        except Exception:
            continue
        if not _same(found, right):
            taken.append(what)
    return Reading(float(len(taken)), 0.0, f"of {count} taken without a word: {', '.join(taken[:3]) or 'none'}")


@probe("every-tensor-counts", "does every tensor of the file reach the model?")
def every_tensor_counts(
    checkpoint: Mapping, load_foreign: Callable, vocab_size: int, idle_tensors: Collection[str] = ()
) -> Reading:
    """Change one tensor at a time, load, and see whether any logit moves. Equal logits cannot show what was never read.

    In a model without rotary positions a key bias moves nothing, by arithmetic: name it in `idle_tensors`.
    """
    batch, _ = inputs(None, vocab_size)
    generator = torch.Generator().manual_seed(0)
    right, dead = logits_of(load_foreign(dict(checkpoint)), batch), []
    for name, tensor in checkpoint.items():
        if name in idle_tensors or not tensor.is_floating_point():
            continue
        size = float(tensor.double().square().mean().sqrt()) or 1.0
        noise = (size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        moved = apart(logits_of(load_foreign({**checkpoint, name: tensor + noise}), batch), right).max()
        if not moved > SAME:
            dead.append(name)
    return Reading(float(len(dead)), 0.0, f"change nothing: {', '.join(dead[:3]) or 'none'}")


@probe("name-invariance", "does the name of a checkpoint change the model?")
def name_invariance(load_named: Callable, vocab_size: int) -> Reading:
    """The same tensors and config under several names must make one model. A name that is refused does no harm."""
    batch, _ = inputs(None, vocab_size)
    made: dict[str, Tensor] = {}
    for name in NAMES:
        try:
            model = load_named(name)
        except Exception:
            continue
        made[name] = logits_of(model, batch)
    if not made:
        raise ValueError(f"it loads under none of the names {', '.join(NAMES)}")
    first, *others = made.values()
    wrong = [name for name, one in zip(list(made)[1:], others, strict=True) if not _same(one, first)]
    return Reading(float(len(wrong)), 0.0, f"of {len(made)} names; another model as {', '.join(wrong) or 'none'}")


@probe("export-reload", "is an exported model the same where it is loaded again?")
def export_reload(
    model: Callable,
    exported: Callable,
    vocab_size: int,
    ids: Tensor | None = None,
    *,
    parity_tolerance: float = PARITY,
) -> Reading:
    """Written by us, read by somebody else, on rows of 16 tokens. A file that cannot be read is an alarm, too."""
    batch, _ = inputs(ids, vocab_size)
    return _compared(logits_of(exported(), batch), logits_of(model, batch), parity_tolerance)


def _drawn(next_probabilities: Callable, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return next_probabilities(ids).double()


@probe("dead-rows", "can it draw an id that is no token?")
def dead_rows(next_probabilities: Callable, makeable_ids: Collection[int], *, limit: float = 1e-6) -> Reading:
    """Probability of all ids that the tokenizer cannot make. At the limit, a million tokens contain one."""
    able = torch.tensor(sorted(makeable_ids))
    batch = able[inputs(None, len(able), rows=8)[0]]
    drawn = _drawn(next_probabilities, batch)
    dead = torch.ones(drawn.shape[-1], dtype=torch.bool)
    dead[able] = False
    return Reading(
        float(drawn[:, dead].sum(-1).max()), limit, f"probability of {int(dead.sum())} ids that are no token"
    )


@probe("context-agrees", "is it meant for as many tokens as the reference, and does it read them all?")
def context_agrees(
    context_length: int,
    reference_context: int,
    vocab_size: int,
    next_probabilities: Callable | None = None,
    reference_model: Callable | None = None,
    *,
    limit: float = 1e-3,
    most: int = 2048,
) -> Reading:
    """The two numbers; and where it can be asked, what is drawn from after a full row against what the reference says.

    The value is the larger of the two: the difference of the numbers as a share, and the total variation after a row of the
    reference's length, or of `most` tokens.
    """
    worst, note = abs(context_length - reference_context) / reference_context, f"{context_length:,} tokens"
    if next_probabilities is not None and reference_model is not None:
        batch, _ = inputs(None, vocab_size, rows=2, length=min(reference_context, most))
        expected = torch.cat([logits_of(reference_model, row[None])[:, -1] for row in batch]).softmax(-1)
        moved = float((change(_drawn(next_probabilities, batch), expected).sum(-1) / 2).max())
        note += f"; share of probability elsewhere after {batch.shape[1]}: {moved:.2g}"
        worst = float(torch.tensor([worst, moved], dtype=torch.float64).max())  # NaN stays NaN
    return Reading(worst, limit, f"{note}; the reference is meant for {reference_context:,}")


@probe("template-parity", "are the ids of a conversation those of the reference?")
def template_parity(
    conversation_ids: Callable,
    reference_conversation_ids: Callable,
    special_ids: Mapping[str, int] | None = None,
    opening: str | None = None,
) -> Reading:
    """Three conversations. Where there is an opening token, each must begin with it and have no second one.

    The second question is asked of our ids alone: template and tokenizer may add one each in the reference as well.
    """
    wrong = 0
    for messages in CONVERSATIONS:
        ids = _plain(conversation_ids(messages))
        doubled = False
        if opening is not None and special_ids is not None:
            token = special_ids[opening]
            doubled = ids[:1] != [token] or ids.count(token) != 1
        wrong += doubled or ids != _plain(reference_conversation_ids(messages))
    return Reading(float(wrong), 0.0, f"of {len(CONVERSATIONS)} conversations with other ids, or not one opening")


def _plain(ids: Sequence[int] | Tensor) -> list[int]:
    return [int(one) for one in ids]
