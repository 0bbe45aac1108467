"""Packed or alone, an example teaches the same; each is whole, seen once an epoch, and resumed to the exact batch."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.packing import Example, ExampleStream, pack
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.training.objectives import NextToken, PreparedTokens

V, PAD = 31, 30


def examples_of(sizes, seed=0):
    """Random ids with random masks; the last of each counts."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, size in enumerate(sizes):
        mask = torch.rand(size, generator=generator) < 0.5
        mask[-1] = True
        made.append(Example(torch.randint(V - 1, (size,), generator=generator), mask, f"e{number}"))
    return made


def contents(batch):
    """(ids, mask of the targets) of each document, read back out of the rows."""
    found = collections.Counter()
    for inputs, targets, mask, documents in zip(
        batch.inputs, batch.targets, batch.loss_mask, batch.document_ids, strict=True
    ):
        for number in range(int(documents.max()) + 1):
            here = documents == number
            places = here.nonzero().flatten()
            assert (places.diff() == 1).all(), "in one piece"
            assert torch.equal(inputs[here][1:], targets[here][:-1]), "targets are the inputs one place later"
            found[(*inputs[here].tolist(), int(targets[here][-1])), tuple(mask[here].tolist())] += 1
    return found


def expected(examples):
    return collections.Counter((tuple(e.ids.tolist()), tuple(e.loss_mask[1:].tolist())) for e in examples)


sizes_of_examples = st.lists(st.integers(2, 13), min_size=1, max_size=15)


@settings(max_examples=80, deadline=None)
@given(sizes=sizes_of_examples, seed=st.integers(0, 5))
def test_every_example_is_whole_and_counts_where_its_mask_says(sizes, seed):
    examples = examples_of(sizes, seed)
    rows, ledger = pack(examples, 12, pad_id=PAD)
    assert contents(rows) == expected(examples)
    padding = rows.document_ids < 0
    assert not rows.loss_mask[padding].any()
    assert (rows.inputs[padding] == PAD).all()
    counted = sum(int(e.loss_mask[1:].sum()) for e in examples)
    assert (ledger.pairs, ledger.counted, ledger.cropped) == (counted, counted, 0)
    assert ledger.padded == rows.inputs.numel() - sum(n - 1 for n in sizes)
    # Best fit: no two rows could be one. So all of them together are less than half empty, but for one.
    used = (~padding).sum(1)
    assert len(used) == 1 or int(used.sort().values[:2].sum()) > 12


def test_the_rows_by_hand():
    """5, 3 and 2 places into rows of 6: the third joins the second, for the first has room for one."""
    examples = [Example(torch.arange(a, a + n)) for a, n in ((10, 3), (20, 6), (30, 4))]
    rows, ledger = pack(examples, 6, pad_id=PAD)
    assert rows.inputs.tolist() == [[20, 21, 22, 23, 24, PAD], [30, 31, 32, 10, 11, PAD]]
    assert rows.targets.tolist() == [[21, 22, 23, 24, 25, 0], [31, 32, 33, 11, 12, 0]], "no 10 after 32"
    assert rows.document_ids.tolist() == [[0, 0, 0, 0, 0, -1], [0, 0, 0, 1, 1, -1]]
    assert rows.loss_mask.equal(rows.document_ids >= 0)
    assert (ledger.pairs, ledger.counted, ledger.padded) == (10, 10, 2)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_packed_rows_have_the_loss_and_the_gradient_of_the_examples_one_by_one(positions, norm):
    shape = {"vocab_size": V, "context_length": 16, "layers": 2, "width": 16, "heads": 2, "init": "fan_in"}
    model = Transformer(ModelConfig(**shape, positions=positions, norm=norm), seed=1).double()
    examples, loss = examples_of([9, 3, 5, 7, 2, 4, 12, 6]), NextToken().loss
    rows, _ = pack(examples, 15, pad_id=PAD)
    assert len(rows.inputs) < 5
    together = loss(model, PreparedTokens(rows))
    gradients = torch.autograd.grad(together.sum, list(model.parameters()))
    single = [pack([example], len(example.ids) - 1)[0] for example in examples]
    alone = [loss(model, PreparedTokens(batch)) for batch in single]
    assert int(together.count) == sum(int(one.count) for one in alone)
    total = sum(one.sum for one in alone)
    torch.testing.assert_close(together.sum, total, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(total, list(model.parameters())), strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_too_long_is_an_error_that_names_the_example_unless_cutting_is_asked_for():
    examples = [*examples_of([4]), Example(torch.arange(9), name="essay 7")]
    for make in (lambda **o: pack(examples, 7, **o), lambda **o: stream_of(examples, length=7, **o)):
        with pytest.raises(
            ValueError, match="example 'essay 7' has 9 ids and needs 8 places; a row has 7.*truncate=True"
        ):
            make()
    rows, ledger = pack(examples, 7, truncate=True)
    assert rows.targets[0].tolist() == list(range(1, 8))
    assert (ledger.pairs - ledger.counted, ledger.cropped) == (1, 1)
    assert stream_of(examples, length=7, truncate=True).ledger.cropped == 1
    pack(examples, 8)
    with pytest.raises(ValueError, match="example 1 has 9 ids"):
        pack([examples[0], Example(torch.arange(9))], 7)


def test_impossible_examples_are_refused():
    with pytest.raises(ValueError, match="example 'x' has ids of shape .1,.: it needs at least two"):
        Example(torch.tensor([1]), name="x")
    with pytest.raises(ValueError, match="example 'x' has 3 ids and a loss_mask of shape .2,."):
        Example(torch.arange(3), torch.ones(2), "x")
    with pytest.raises(ValueError, match="no examples"):
        stream_of([])
    with pytest.raises(ValueError, match="rank=2"):
        stream_of(examples_of([3]), rank=2, world_size=2)


def stream_of(examples, **options):
    return ExampleStream(examples, **{"length": 12, "batch_size": 2, "pad_id": PAD, **options})


def epoch_of(stream):
    return [stream.next_batch() for _ in range(stream.steps_per_epoch)]


def sum_of(batches):
    return sum((contents(batch) for batch in batches), collections.Counter())


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of_examples, batch=st.integers(1, 3), world=st.integers(1, 3), packed=st.booleans())
def test_every_example_exactly_once_an_epoch_over_all_ranks(sizes, batch, world, packed):
    examples, seen, steps, padded = examples_of(sizes), collections.Counter(), set(), 0
    for rank in range(world):
        stream = stream_of(examples, batch_size=batch, rank=rank, world_size=world, pack=packed)
        batches = epoch_of(stream)
        assert stream.epoch == 1
        assert all(one.inputs.shape == (batch, 12) for one in batches)
        seen += sum_of(batches)
        steps.add(len(batches))
        padded += sum(int((one.document_ids < 0).sum()) for one in batches)
        if not packed:
            assert all(int(one.document_ids.max()) <= 0 for one in batches)
    assert seen == expected(examples)
    assert len(steps) == 1, "all ranks take the same number of steps"
    assert stream.ledger.padded == padded
    assert stream.ledger.pairs == stream.ledger.counted == sum(e.targets for e in examples)


def test_epochs_differ_and_seeds_differ_and_the_same_seed_repeats():
    def order(seed):
        stream = stream_of(examples_of([12] * 20), seed=seed)
        return [torch.cat([batch.inputs for batch in epoch_of(stream)]).tolist() for _ in range(2)]

    first, second = order(1)
    assert first != second
    assert sorted(first) == sorted(second)
    assert order(1) == [first, second]
    assert order(2)[0] != first


@pytest.mark.parametrize("stops", [[0], [1], [5], [3, 4], [2, 2, 9], [9, 10]])
def test_resumed_at_any_batch_any_number_of_times(stops):
    def fresh():
        return stream_of(examples_of([12, 11, 3, 4, 7, 8, 9] * 4))

    def batches(stream, count):
        return [stream.next_batch().inputs.tolist() for _ in range(count)]

    undisturbed = batches(fresh(), 30)
    assert 2 * fresh().steps_per_epoch < 30, "more than two epochs"
    got, stream = [], fresh()
    for stop in stops:
        got += batches(stream, stop)
        state, stream = stream.state_dict(), fresh()
        stream.load_state_dict(state)
    assert got + batches(stream, 30 - len(got)) == undisturbed


def test_resumed_on_another_number_of_ranks_nothing_is_lost_or_repeated():
    examples = examples_of([12] * 41)
    streams = [stream_of(examples, rank=rank, world_size=2) for rank in range(2)]
    seen = sum_of(stream.next_batch() for stream in streams for _ in range(3))
    for rank in range(3):
        stream = stream_of(examples, rank=rank, world_size=3)
        stream.load_state_dict(streams[0].state_dict())
        while stream.epoch == 0:
            seen += contents(stream.next_batch())
    assert seen == expected(examples)


CHANGES = {
    "seed": {"seed": 1},
    "length": {"length": 13},
    "layout": {"pack": False},
    "padding": {"pad_id": 0},
    "ids": {"examples": examples_of([5, 6, 7], seed=1)},
    "mask": {"examples": [Example(e.ids) for e in examples_of([5, 6, 7])]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_of_another_stream_is_refused(change):
    state = stream_of(examples_of([5, 6, 7])).state_dict()
    options = {"examples": examples_of([5, 6, 7]), **CHANGES[change]}
    other = stream_of(options.pop("examples"), **options)
    before = other.state_dict()
    with pytest.raises(ValueError, match="belongs to another stream"):
        other.load_state_dict(state)
    assert other.state_dict() == before
