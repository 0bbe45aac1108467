"""An engine beside a training: the mode is its own in every call, and nothing outlives the weights it was computed with."""

import pytest
import torch

from common.generation.cached import Cached, Weights
from common.generation.decode import Decoder, GrowingRow
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.output import Output
from tests.generation.letters import END, RAGGED, Letters, model_of

GREEDY = SamplingParams(temperature=0, max_tokens=15, logprobs=True)
PROMPT = [3, 1, 4, 1, 5]


def calls(engine):
    """One of each call, as values that can be compared."""
    return [
        [(c.ids, c.logprobs) for (c,) in engine.generate(RAGGED, GREEDY)],
        list(engine.stream(PROMPT, GREEDY)),
        [s.logprobs for s in engine.score([PROMPT, [2]], [[6, 7], [1, 2, 3]])],
    ]


@pytest.mark.parametrize("cached", [True, False])
def test_an_engine_writes_the_same_while_the_model_is_trained(cached):
    model = model_of(dropout=0.5)
    engine = Engine(model, Letters(), cached=cached)
    expected = calls(engine)
    model.train()  # as a trainer does before each update
    frozen = model.blocks[0].mlp.eval()
    assert calls(engine) == expected
    modes = {name: module.training for name, module in model.named_modules()}
    still = {name for name, module in frozen.named_modules(prefix="blocks.0.mlp")}
    assert all(mode is (name not in still) for name, mode in modes.items()), "each part is back in its own mode"
    other = Engine(model, Letters(), cached=cached)
    assert model.training, "to make an engine changes nothing"
    assert calls(other) == expected


def test_the_mode_comes_back_after_an_exception():
    class Breaks(torch.nn.Module):
        vocab_size, context_length, bounded = END + 1, 8, True

        def forward(self, ids, **_):
            assert not self.training
            raise RuntimeError("deliberate")

    model = Breaks().train()
    engine = Engine(model, Letters())
    for call in (
        lambda: engine.generate([[1]], GREEDY),
        lambda: next(engine.stream([1], GREEDY)),
        lambda: engine.score([[1]], [[2]]),
    ):
        with pytest.raises(RuntimeError, match="deliberate"):
            call()
        assert model.training


def test_a_stream_leaves_the_mode_alone_between_its_pieces():
    model = model_of(dropout=0.5).train()
    stream = Engine(model, Letters(), ends=()).stream(PROMPT, SamplingParams(max_tokens=12))
    next(stream)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert model.training


def optimizer_step(model, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, **settings)
    model(torch.tensor([PROMPT])).logits.square().sum().backward()
    optimizer.step()


@torch.no_grad()
def in_place(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def other_state(model):
    return {k: v.flip(0) + 0.1 for k, v in model.state_dict().items()}


@torch.no_grad()
def one_block_exchanged(model):
    model.blocks[0].attention.value.weight = torch.nn.Parameter(torch.randn(16, 16))


CHANGES = {
    "an optimizer, one parameter at a time": lambda m: optimizer_step(m, foreach=False),
    "an optimizer, many parameters at once": lambda m: optimizer_step(m, foreach=True),
    "a fused optimizer": lambda m: optimizer_step(m, fused=True),
    "in place": in_place,
    "load_state_dict": lambda m: m.load_state_dict(other_state(m)),
    "load_state_dict, assigned": lambda m: m.load_state_dict(other_state(m), assign=True),
    "numbers through .data": lambda m: [p.data.mul_(1.5).add_(0.1) for p in m.parameters()],
    "another parameter object": one_block_exchanged,
    "another number format": lambda m: m.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_remembered_outlives_a_change_of_the_weights(change):
    model = model_of(context_length=64)
    engine = Engine(model, Letters(), ends=(), remember=True)
    weights = Weights(model)
    assert weights.are_those_of(model)
    list(engine.stream(PROMPT, GREEDY))
    asked = [*engine.prefix.tokens, 2, 4]
    assert engine.prefix.shared(asked, model) == len(asked) - 2, "as long as nothing changes, everything is used"
    CHANGES[change](model)
    assert not weights.are_those_of(model)
    fresh = list(Engine(model, Letters(), ends=()).stream(asked, GREEDY))
    assert list(engine.stream(asked, GREEDY)) == fresh
    assert engine.prefix.shared(asked, model) == len(asked) - 1, "and what is remembered now belongs to the new weights"


def test_reading_changes_nothing_and_what_is_not_seen_can_be_said():
    model = model_of(context_length=64)
    engine, weights = Engine(model, Letters(), ends=(), remember=True), Weights(model)
    calls(engine)
    model(torch.tensor([PROMPT])).logits.sum().backward()
    model.train().eval()
    assert weights.are_those_of(model)
    list(engine.stream(PROMPT, GREEDY))
    model.blocks[0].attention.value.weight.data[3, 5] += 50.0
    assert weights.are_those_of(model), "one number through .data is not seen, as the docstring says"
    engine.weights_changed()
    assert list(engine.stream(PROMPT, GREEDY)) == list(Engine(model, Letters(), ends=()).stream(PROMPT, GREEDY))


@pytest.mark.parametrize("how", ["another parameter", "another memory"])
def test_an_exchange_is_seen_where_the_sampled_numbers_are_the_same(how):
    model = model_of()
    before = Weights(model)
    old = model.blocks[0].mlp.up.weight
    changed = old.detach().clone()
    changed.flatten()[1] += 1.0  # a number that is not among the sampled ones
    if how == "another parameter":
        model.blocks[0].mlp.up.weight = torch.nn.Parameter(changed)
    else:
        old.data = changed
    assert all(map(torch.equal, Weights(model).numbers, before.numbers)), "the numbers alone do not tell"
    assert not before.are_those_of(model)


def test_weights_that_count_no_versions_are_never_trusted():
    with torch.inference_mode():
        model = model_of(context_length=64)
    engine = Engine(model, Letters(), ends=(), remember=True)
    first = list(engine.stream(PROMPT, GREEDY))
    assert engine.prefix.shared(PROMPT, model) == 0
    assert list(engine.stream(PROMPT, GREEDY)) == first


@pytest.mark.parametrize("change", ["in place", "an optimizer, many parameters at once"])
def test_rows_that_run_while_the_weights_change_go_on_with_the_new_ones(change):
    """Cached equals uncached here as well: each token comes from the weights of its moment."""
    texts = []
    for cached in (True, False):
        model = model_of()
        decoder = Decoder(model, Letters(), (), next_logits=Cached(model) if cached else None)
        rows = [GrowingRow(p, SamplingParams(max_tokens=20, seed=1), i) for i, p in enumerate(RAGGED)]
        decoder.add(rows)
        for step in range(20):
            if step in (4, 11):
                CHANGES[change](model)
            decoder.step()
        texts.append([row.tokens for row in rows])
    assert texts[0] == texts[1]


def test_a_model_without_modules_has_no_mode_and_no_weights():
    class Bare:
        vocab_size, context_length = END + 1, 4

        def __call__(self, ids, **_):
            return Output(torch.zeros(*ids.shape, END + 1))

    assert Engine(Bare(), Letters()).generate([[1]], GREEDY)[0][0].ids == [0] * 15
    assert Weights(Bare()).are_those_of(Bare())
