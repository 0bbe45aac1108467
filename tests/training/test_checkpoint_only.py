"""Adapters and heads saved alone: what is written, and onto which base it loads. A training with a frozen base resumes."""

import pytest
import safetensors.torch
import torch
from torch import nn

from common.foundation.files import read_json, write_json
from common.model.ngram import NGram
from common.model.recurrent import Recurrent
from common.model.registry import model_class, model_kinds, registered
from common.model.transformer import Transformer
from common.training.checkpoint import (
    base_fingerprint,
    describe_model,
    load_checkpoint,
    model_fingerprint,
    save_checkpoint,
    trainable_names,
)
from common.training.snapshots import Snapshots
from tests.model.adapters import Low, Subclassed, adapted
from tests.training.tiny import CONFIG, V, Words, equal, trainer_of, weights_of

IDS = torch.arange(12).view(2, 6)
PARTS = ("query", "value", "up")


def base(seed=3, **changes):
    return Transformer(CONFIG.but(**changes), seed=seed)


def trained(seed=3, **changes):
    return adapted(base(seed, **changes), *PARTS)


def fresh(seed=3, **changes):
    """The same base with adapters that have learned nothing."""
    model = adapted(base(seed, **changes), *PARTS, seed=9)
    for module in model.modules():
        if isinstance(module, Low):
            nn.init.zeros_(module.b)
    return model


@pytest.mark.parametrize(
    "only", [lambda name: name.endswith((".a", ".b")), trainable_names(trained())], ids=["is", "in"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_trains_is_saved_alone_and_loads_onto_its_base(tmp_path, only, tied):
    model = trained(tied=tied)
    save_checkpoint(tmp_path, model, Words(), only=only)
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert names == trainable_names(model)
    assert len(names) == 2 * 2 * len(PARTS)
    onto = fresh(tied=tied)
    assert not torch.equal(onto(IDS).logits, model(IDS).logits)
    back = load_checkpoint(tmp_path, Words(), onto=onto)
    assert back is onto
    assert not back.training
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    assert trainable_names(back) == names, "what was frozen stays frozen"


def test_the_base_is_the_fingerprint_of_the_plain_model(tmp_path):
    """The number that a record of the base has, so that the two can be told to belong together."""
    for tied in (True, False):
        save_checkpoint(tmp_path, trained(tied=tied), Words(), only=trainable_names(trained()))
        assert read_json(tmp_path / "checkpoint.json")["base"] == model_fingerprint(base(tied=tied))


def test_another_base_is_refused_and_nothing_is_changed(tmp_path):
    save_checkpoint(tmp_path, trained(), Words(), only=trainable_names(trained()))
    other = fresh(seed=4)
    before, (mine, theirs) = weights_of(other), (model_fingerprint(base(seed))[:12] for seed in (3, 4))
    with pytest.raises(ValueError, match=f"on top of the base {mine}.*has the base {theirs}.*Load that base"):
        load_checkpoint(tmp_path, Words(), onto=other)
    assert equal(weights_of(other), before)
    close = fresh()
    with torch.no_grad():
        close.blocks[1].mlp.down.weight.flatten()[5] += 1e-6  # one number
    with pytest.raises(ValueError, match="on top of the base"):
        load_checkpoint(tmp_path, Words(), onto=close)


@pytest.mark.parametrize(
    ("onto", "message"),
    [
        (lambda: None, "holds 12 tensors.*on top of the base.*not a whole model.*onto=model"),
        (lambda: base(), "12 unknown to the model, such as blocks.0.attention.query.a"),
        (lambda: adapted(base(), *PARTS, make=lambda linear: Low(linear, 3)), r"\(2, 16\) in the file and \(3, 16\)"),
        (lambda: fresh(heads=4), "'heads': 2.*'heads': 4"),
        (lambda: nn.Linear(2, 2), "a Linear cannot be saved"),
    ],
    ids=["nothing", "no adapters", "another rank", "another config", "no model"],
)
def test_what_does_not_fit_is_refused(tmp_path, onto, message):
    save_checkpoint(tmp_path, trained(), Words(), only=trainable_names(trained()))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, Words(), onto=onto())


def test_a_whole_checkpoint_loads_onto_a_model_too(tmp_path):
    save_checkpoint(tmp_path, base(3), Words())
    onto = base(4)
    assert torch.equal(load_checkpoint(tmp_path, Words(), onto=onto)(IDS).logits, base(3)(IDS).logits)


def test_a_tied_tensor_is_saved_under_both_of_its_names(tmp_path):
    """What is saved is no part of the base: neither as the embedding nor as the head that shares it."""
    save_checkpoint(tmp_path, base(), Words(), only={"embedding.weight"})
    onto = base()
    with torch.no_grad():
        onto.embedding.weight.zero_()
    assert equal(weights_of(load_checkpoint(tmp_path, Words(), onto=onto)), weights_of(base()))


def test_only_must_name_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="asks for head.bias"):
        save_checkpoint(tmp_path, base(), Words(), only={"head.bias", "embedding.weight"})
    with pytest.raises(ValueError, match="asks for nothing"):
        save_checkpoint(tmp_path, base(), Words(), only=lambda name: False)


@pytest.mark.parametrize("make", [Low, Subclassed])
def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path, make):
    """It would be written and could not be read: better to hear it before the training is over."""
    model = base()
    model.blocks[0].attention.query = make(model.blocks[0].attention.query)
    with pytest.raises(ValueError, match=r"plain transformer.*query\.a.*only=trainable_names"):
        save_checkpoint(tmp_path, model, Words())
    assert not list(tmp_path.iterdir())


class Head(nn.Module):
    """A classifier on a frozen model, as a later month may make one: registered and described outside checkpoint.py."""

    def __init__(self, inner, classes):
        super().__init__()
        self.base, self.classes, self.vocab_size = inner.requires_grad_(False), classes, inner.vocab_size
        self.scores = nn.Linear(inner.config.width, classes)

    def forward(self, ids):
        return self.scores(self.base(ids, head=False).hidden[-1][:, -1])

    def describe(self):
        return {"kind": "head of a test", "classes": self.classes, "base": self.base.describe()}

    @classmethod
    def from_description(cls, described):
        return cls(Transformer.from_description(described["base"]), described["classes"])


@pytest.fixture
def known():
    from common.model import registry

    before = dict(registry._CLASSES)
    registered("head of a test")(Head)
    yield
    registry._CLASSES.clear()
    registry._CLASSES.update(before)


@pytest.mark.usefixtures("known")
def test_a_new_kind_of_model_is_saved_whole_or_alone_without_a_change_here(tmp_path):
    model = Head(base(), 5).eval()
    whole = load_checkpoint(save_checkpoint(tmp_path / "whole", model, Words()), Words())
    assert type(whole) is Head
    assert torch.equal(whole(IDS), model(IDS))
    folder = save_checkpoint(tmp_path / "alone", model, Words(), only=trainable_names(model))
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == {"scores.weight", "scores.bias"}
    assert read_json(folder / "checkpoint.json")["base"] == model_fingerprint(base())
    assert torch.equal(load_checkpoint(folder, Words(), onto=Head(base(), 5))(IDS), model(IDS))
    with pytest.raises(ValueError, match="on top of the base"):
        load_checkpoint(folder, Words(), onto=Head(base(4), 5))


def test_a_class_that_is_not_registered_cannot_be_saved(tmp_path):
    class Mine(Transformer):
        pass

    with pytest.raises(
        ValueError, match="a Mine describes itself as 'transformer' and would be loaded as a Transformer"
    ):
        save_checkpoint(tmp_path, Mine(CONFIG), Words())
    with pytest.raises(ValueError, match="a Head .*'head of a test'.*not registered"):
        save_checkpoint(tmp_path, Head(base(), 2), Words())


def test_every_kind_describes_itself_and_comes_back():
    assert {"ngram", "recurrent", "transformer"} <= set(model_kinds())
    models = [base(), Recurrent("lstm", V, 8, 2), NGram.fit([torch.arange(9)], 3, V)]
    for model in models:
        described = describe_model(model)
        assert model_class(described["kind"]) is type(model)
        again = type(model).from_description(described)
        assert describe_model(again) == described
    with pytest.raises(ValueError, match="two classes are registered as 'ngram'"):
        registered("ngram")(Head)


@pytest.mark.parametrize("kind", ["os.system", "common.model.transformer.Transformer", "", None, ["transformer"], 3])
def test_a_file_chooses_among_registered_kinds_and_imports_nothing(tmp_path, kind):
    save_checkpoint(tmp_path, base(), Words())
    described = read_json(tmp_path / "checkpoint.json")
    write_json(tmp_path / "checkpoint.json", {**described, "model": {"kind": kind}})
    with pytest.raises(ValueError, match="holds a model of kind .*; there are ngram, recurrent, transformer"):
        load_checkpoint(tmp_path, Words())


def test_the_base_fingerprint_sees_what_is_frozen_and_nothing_else():
    model = trained()
    saved = trainable_names(model)
    before = base_fingerprint(model, saved)
    assert before == base_fingerprint(fresh(), saved)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[0] += 1
            assert (base_fingerprint(model, saved) == before) == (name in saved), name
            parameter.copy_(kept)


def with_adapters(folder, **options):
    return trainer_of(model=fresh(), snapshots=Snapshots(folder), tokenizer=Words(), steps=6, save_every=2, **options)


def test_a_training_of_adapters_resumes_bit_for_bit_and_does_not_write_the_base(tmp_path):
    whole = with_adapters(tmp_path / "whole").train()
    with_adapters(tmp_path / "killed").train(4)
    saved = safetensors.torch.load_file(tmp_path / "killed" / "step-00000004" / "model.safetensors")
    assert set(saved) == trainable_names(whole.model)
    after = with_adapters(tmp_path / "killed")
    assert after.resume()
    assert after.done == 4
    after.train()
    assert after.history == whole.history
    assert equal(weights_of(after.model), weights_of(whole.model))
    back = load_checkpoint(tmp_path / "whole" / "step-00000006", Words(), onto=fresh())
    assert torch.equal(back(IDS).logits, whole.model(IDS).logits)


def test_a_training_of_adapters_does_not_resume_on_another_base(tmp_path):
    with_adapters(tmp_path).train(2)
    other = with_adapters(tmp_path)
    with torch.no_grad():
        other.model.embedding.weight[0, 0] += 1
    before = weights_of(other.model)
    with pytest.raises(ValueError, match="on top of the base"):
        other.resume()
    assert equal(weights_of(other.model), before)
    thawed = with_adapters(tmp_path)
    thawed.model.requires_grad_(True)
    with pytest.raises(ValueError, match="missing in the snapshot"):
        thawed.resume()
