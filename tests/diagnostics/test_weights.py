"""Probes of other people's weights on a loader that is not ours: plain torch, with a switch for each bug."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from common.diagnostics.probes import ALL, weights

NAN = float("nan")
V, WIDTH, CONTEXT, WORDS, REACH = 24, 12, 64, 20, 24  # 20 of the 24 rows are words
PROBES = [probe for probe in ALL if inspect.getmodule(probe.measure) is weights]
BEGIN, USER, END = 0, 1, 2


class Recent(torch.nn.Module):
    """The sum of the last tokens, a norm with a bias, a layer. Nothing that is ours."""

    def __init__(self, reach=REACH):
        super().__init__()
        self.table, self.norm, self.head = (
            torch.nn.Embedding(V, WIDTH),
            torch.nn.LayerNorm(WIDTH),
            torch.nn.Linear(WIDTH, V),
        )
        self.reach = reach

    def forward(self, ids):
        x = self.table(ids)
        total = x.cumsum(1)
        late = F.pad(total, (0, 0, self.reach, 0))[:, : ids.shape[1]]
        return self.head(self.norm(x + (total - late) / 8))


def checkpoint():
    generator = torch.Generator().manual_seed(0)
    shapes = {"words": (V, WIDTH), "scale": (WIDTH,), "shift": (WIDTH,), "out": (WIDTH, V), "out_bias": (V,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["out_bias"][WORDS:] = -60.0  # rows that fill up, and were trained to be never seen
    return made


NAMES = {
    "words": "table.weight", "scale": "norm.weight", "shift": "norm.bias", "out": "head.weight", "out_bias": "head.bias",
}  # fmt: skip


def load(tensors, bugs=(), name="model"):
    torch.manual_seed(1)
    made = Recent(reach=CONTEXT if "far" in bugs else REACH)
    state = {NAMES.get(key, key): tensor.T if key == "out" else tensor for key, tensor in tensors.items()}
    if "no bias" in bugs:
        state["norm.bias"] = made.norm.bias
    if "renamed to nothing" in bugs:
        state = {key: tensor for key, tensor in state.items() if key in NAMES.values()}
    made.load_state_dict(state, strict="renamed to nothing" not in bugs)
    if "small" in bugs or ("by name" in bugs and "Llama-3" in name):
        made.norm.eps = 1e-2
    return made.eval()


def written(model, bugs):
    twin = Recent()
    twin.load_state_dict({key: t.half().float() if "half" in bugs else t for key, t in model.state_dict().items()})
    return twin.eval()


def writes(model):
    def greedy(prompt, count):
        ids = torch.tensor([prompt])
        for _ in range(count):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[0, len(prompt) :].tolist()

    return greedy


def drawing(model, bugs):
    def draw(ids):
        logits = model(ids[:, -8:] if "cropped" in bugs else ids)[:, -1].clone()
        if "rows of zeros" in bugs:
            logits[:, WORDS:] = 0.0
        return logits.softmax(-1)

    return draw


def conversation(messages, bugs=()):
    ids = [BEGIN] * (2 if "twice" in bugs else 0 if "never" in bugs else 1)
    for message in messages:
        ids += [USER, *(3 + ord(letter) % 17 for letter in message["content"]), *([] if "no end" in bugs else [END])]
    return ids


def specimen(*bugs):
    theirs, ours = load(checkpoint()), load(checkpoint(), bugs)
    return {
        "model": ours,
        "vocab_size": V,
        "reference_model": theirs,
        "reference_context": CONTEXT,
        "context_length": CONTEXT // 2 if "said" in bugs else CONTEXT,
        "greedy": writes(ours),
        "reference_greedy": writes(theirs),
        "checkpoint": checkpoint(),
        "load_foreign": lambda tensors: load(tensors, bugs),
        "load_named": lambda name: load(checkpoint(), bugs, name),
        "exported": lambda: written(ours, bugs),
        "next_probabilities": drawing(ours, bugs),
        "makeable_ids": set(range(WORDS)),
        "conversation_ids": lambda messages: conversation(messages, bugs),
        "reference_conversation_ids": lambda messages: torch.tensor(conversation(messages)),
        "special_ids": {"begin": BEGIN},
        "opening": "begin",
    }


def test_no_false_alarm_on_a_plain_loader():
    found = {probe.name: probe.examine(specimen())[0] for probe in PROBES}
    assert len(found) == 10
    assert not [f"{name}: {reading}" for name, reading in found.items() if reading.caught]


PARITY = {"logit-parity", "long-range-parity"}
CATCHES = {
    "far": {"long-range-parity", "context-agrees"},
    "small": {*PARITY, "export-reload", "context-agrees"},
    "by name": {"name-invariance"},
    "no bias": {*PARITY, "every-tensor-counts", "greedy-parity", "context-agrees"},
    "renamed to nothing": {"loads-or-refuses"},
    "half": {"export-reload"},
    "rows of zeros": {"dead-rows", "context-agrees"},
    "cropped": {"context-agrees"},
    "said": {"context-agrees"},
    "twice": {"template-parity"},
    "never": {"template-parity"},
    "no end": {"template-parity"},
}


@pytest.mark.parametrize("bug", CATCHES)
def test_a_bug_is_caught_by_its_probes_and_by_no_other(bug):
    made = specimen(bug)
    assert {probe.name for probe in PROBES if probe.examine(made)[0].caught} == CATCHES[bug]


def test_the_first_place_that_differs_is_named():
    theirs = load(checkpoint())

    def late(ids):
        logits = theirs(ids).clone()
        logits[:, 5:] += 0.1 * torch.arange(V)
        return logits

    handles = {**specimen(), "model": late}
    assert weights.logit_parity.examine(handles)[0].note.endswith("the first place beyond is 5")
    assert weights.long_range_parity.examine(handles)[0].note.endswith(f"the first place beyond is {CONTEXT * 3 // 4}")
    assert weights.logit_parity.examine({**handles, "model": theirs})[0].note.endswith("no place beyond")


def test_rows_that_are_masked_with_a_large_number_hide_nothing():
    def masked(model):
        return lambda ids: model(ids).masked_fill(torch.arange(V) >= WORDS, -1e9)

    made = specimen("small")
    made |= {"model": masked(made["model"]), "reference_model": masked(made["reference_model"])}
    assert weights.logit_parity.examine(made)[0].caught
    made["model"] = made["reference_model"]
    assert weights.logit_parity.examine(made)[0].value == 0
    minus = lambda ids: load(checkpoint())(ids).masked_fill(torch.arange(V) >= WORDS, -torch.inf)  # noqa: E731
    assert weights.logit_parity.examine({**made, "model": minus, "reference_model": minus})[0].value == 0
    assert weights.logit_parity.examine({**made, "model": minus})[0].caught


def test_a_model_in_another_format_brings_its_tolerance():
    made = specimen()
    made["model"] = load(checkpoint()).bfloat16()
    assert weights.logit_parity.examine(made)[0].caught
    assert not weights.logit_parity.examine({**made, "parity_tolerance": 0.1})[0].caught
    assert not weights.long_range_parity.examine({**made, "parity_tolerance": 0.1})[0].caught


def test_other_shapes_are_an_alarm():
    made = specimen()
    wide = lambda ids: F.pad(made["model"](ids), (0, 8))  # noqa: E731
    for probe, handle in ((weights.logit_parity, "model"), (weights.export_reload, "model")):
        reading = probe.examine({**made, handle: wide})[0]
        assert reading.caught
        assert "shape" in reading.note


def test_what_is_refused_does_no_harm_and_what_never_loads_does():
    made = specimen()

    def picky(name):
        if name != "Meta-Llama-3-8B":
            raise ValueError("unknown")
        return made["load_named"](name)

    assert weights.name_invariance.examine({**made, "load_named": picky})[0].value == 0
    reading = weights.name_invariance.examine({**made, "load_named": lambda name: 1 / 0})[0]
    assert reading.caught
    assert "none of the names" in reading.note
    assert weights.loads_or_refuses.examine({**made, "load_foreign": lambda tensors: 1 / 0})[0].caught


def test_a_tensor_that_cannot_count_is_excused_by_name():
    def without_bias(tensors):
        return load(tensors, ("no bias",))

    handles = {**specimen(), "load_foreign": without_bias}
    assert weights.every_tensor_counts.examine(handles)[0].note.endswith("shift")
    assert not weights.every_tensor_counts.examine({**handles, "idle_tensors": {"shift"}})[0].caught
    zeros = {**checkpoint(), "shift": torch.zeros(WIDTH), "places": torch.arange(9)}
    ours = lambda tensors: load({n: t for n, t in tensors.items() if n != "places"})  # noqa: E731
    assert not weights.every_tensor_counts.examine({**handles, "checkpoint": zeros, "load_foreign": ours})[0].caught


def test_a_context_is_two_numbers_and_an_answer():
    only = {"context_length": CONTEXT, "reference_context": CONTEXT, "vocab_size": V}
    assert weights.context_agrees.examine(only)[0].value == 0
    assert weights.context_agrees.examine({**only, "context_length": 2 * CONTEXT})[0].value == 1
    assert weights.context_agrees.examine({**specimen("cropped"), "context_length": CONTEXT})[0].caught


def nan_at(place):
    healthy = load(checkpoint())

    def spoiled(ids):
        logits = healthy(ids).clone()
        logits[0, place, 3] = NAN
        return logits

    return spoiled


def test_nan_is_never_lost():
    made = specimen()
    draw = made["next_probabilities"]

    def spoiled_draw(ids):
        drawn = draw(ids).clone()
        drawn[0, V - 1] = NAN
        return drawn

    def load_spoiled(tensors):
        return nan_at(3) if float(tensors["words"].sum()) != float(checkpoint()["words"].sum()) else load(tensors)

    def lenient(tensors):
        return load({**checkpoint(), **tensors}) if set(tensors) == set(checkpoint()) else nan_at(3)

    for probe, handles in (
        (weights.logit_parity, {"model": nan_at(-1)}),
        (weights.logit_parity, {"reference_model": nan_at(2)}),
        (weights.logit_parity, {"model": nan_at(2), "reference_model": nan_at(2)}),
        (weights.long_range_parity, {"model": nan_at(-1)}),
        (weights.export_reload, {"exported": lambda: nan_at(0)}),
        (weights.name_invariance, {"load_named": lambda name: nan_at(1) if "gpt2" in name else load(checkpoint())}),
        (weights.name_invariance, {"load_named": lambda name: nan_at(1)}),
        (weights.loads_or_refuses, {"load_foreign": lenient}),
        (weights.every_tensor_counts, {"load_foreign": load_spoiled}),
        (weights.every_tensor_counts, {"load_foreign": lambda tensors: nan_at(1)}),
        (weights.dead_rows, {"next_probabilities": spoiled_draw}),
        (weights.context_agrees, {"next_probabilities": spoiled_draw}),
        (weights.context_agrees, {"context_length": NAN}),
    ):
        assert probe.examine({**made, **handles})[0].caught, probe.name
