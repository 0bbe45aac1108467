"""AdamW and Muon against torch's, the iteration against an SVD, and every parameter in one group."""

import pytest
import torch
from torch import nn

from common.model.config import ModelConfig
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer
from common.training.optimizers import (
    QUINTIC,
    AdamW,
    Muon,
    Optimizers,
    groups_of,
    kind_of,
    make_optimizers,
    orthogonalised,
)
from tests.training.tiny import CONFIG, equal, stream_of, trainer_of, weights_of

RATES = [1e-2 * (1 + step % 7) / 7 for step in range(100)]


def random_parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def stepped(optimizer, parameters, rates, seed=1):
    """Noisy gradients of a quadratic, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        for i, p in enumerate(parameters):
            p.grad = 10.0 ** (i - 2) * (p.detach() + torch.randn(p.shape, generator=generator))
        optimizer.step()


def test_adamw_is_that_of_torch():
    shapes = ((5, 7), (3, 4, 5), (6,), (2, 2))
    made = []
    for kind, options in ((AdamW, {}), (torch.optim.AdamW, {"fused": True})):
        parameters = random_parameters(*shapes)
        groups = [
            {"params": parameters[:2], "weight_decay": 0.3},
            {"params": parameters[2:3], "weight_decay": 0.0, "factor": 0.5},
            {"params": parameters[3:], "weight_decay": 0.01, "betas": (0.8, 0.999), "eps": 1e-3},
        ]
        stepped(kind(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, **options), parameters, RATES)
        made.append(parameters)
    for ours, theirs in zip(*made, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_adamw_leaves_alone_what_has_no_gradient_and_keeps_fp32():
    one, other = random_parameters((2, 3), (2, 3))
    half = nn.Parameter(torch.randn(3).bfloat16())
    optimizer, before = AdamW([one, other, half], lr=0.1, weight_decay=0.5), other.detach().clone()
    one.grad, half.grad = torch.ones(2, 3), torch.ones(3).bfloat16()
    optimizer.step()
    assert torch.equal(other, before)
    assert half.dtype == torch.bfloat16
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float32}


def with_singular_values(rows, columns, values, seed=0):
    torch.manual_seed(seed)
    u, v = torch.linalg.qr(torch.randn(rows, rows))[0], torch.linalg.qr(torch.randn(columns, columns))[0]
    return u[:, : len(values)] @ torch.diag(values) @ v[:, : len(values)].mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (8, 40), (40, 8), (1, 6)])
def test_singular_values_go_to_one_and_vectors_stay(rows, columns, dtype):
    count = min(rows, columns)
    stack = torch.stack([with_singular_values(rows, columns, 7 * torch.linspace(0.1, 1, count), i) for i in range(3)])
    made = orthogonalised(stack, dtype=dtype)
    assert made.shape == stack.shape
    assert made.dtype == torch.float32
    for x, y in zip(stack, made, strict=True):
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        inside = u.mT @ y @ vt.mT  # diagonal if the vectors stayed
        assert inside.diagonal().min() > 0.6
        assert inside.diagonal().max() < 1.3
        off = (inside - torch.diag(inside.diagonal())).abs().max() if count > 1 else 0.0
        assert off < (1e-4 if dtype == torch.float32 else 0.05)
        assert (y - u @ inside @ vt).abs().max() < (1e-4 if dtype == torch.float32 else 0.05), "and nothing beside them"
    torch.testing.assert_close(made[1:2], orthogonalised(stack[1:2], dtype=dtype)), "each matrix on its own"
    assert orthogonalised(torch.zeros(1, 3, 2)).eq(0).all()


def by_decomposition(x):
    """The polynomial on the singular values, in double precision."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    return (u * s) @ vt


def test_muon_in_fp32_is_its_formula():
    for p in random_parameters((6, 10), (10, 6), (3, 5, 4)):
        start, m, wanted = p.detach().clone(), torch.zeros_like(p).double(), p.detach().double().clone()
        optimizer = Muon([p], lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
        for step in range(5):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            m = 0.9 * m + 0.1 * p.grad.double()
            ahead = 0.9 * m + 0.1 * p.grad.double()
            made = torch.stack([by_decomposition(x) for x in ahead.view(-1, *p.shape[-2:])]).view(p.shape)
            wanted = wanted * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(p.shape[-2:]) ** 0.5 * made
            optimizer.step()
        assert (p.double() - wanted).norm() < 1e-3 * (wanted - start).norm()


def test_muon_is_that_of_torch():
    shapes, made = ((8, 24), (24, 8), (8, 24), (12, 12)), []
    settings = {"lr": 1.0, "momentum": 0.95, "weight_decay": 0.3}
    for kind in (
        lambda p: Muon(p, **settings),
        lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw", **settings),
    ):
        parameters = random_parameters(*shapes)
        stepped(kind(parameters), parameters, RATES[:40])
        made.append(parameters)
    for ours, theirs, start in zip(*made, random_parameters(*shapes), strict=True):
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_muon_has_the_step_size_of_adamw():
    """What the factor is for: the root mean square of an update is about 0.2 times the rate."""
    for shape in ((16, 64), (64, 16), (32, 32)):
        (p,) = random_parameters(shape)
        start = p.detach().clone()
        p.grad = torch.randn(shape)
        Muon([p], lr=1.0).step()
        assert float((p.detach() - start).square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices, got a parameter of shape .3,.: use AdamW"):
        Muon(random_parameters((2, 3), (3,)))


TINY = {"vocab_size": 29, "context_length": 16, "layers": 2, "width": 24, "heads": 4}
LATENT = {"attention": "latent", "latent_width": 6, "rope_head_width": 4, "value_head_width": 5}
MODELS = {
    "gpt2": lambda: Transformer(ModelConfig.preset("gpt2", **TINY)),
    "llama": lambda: Transformer(ModelConfig.preset("llama-3.2-1b", **TINY, key_value_heads=2, hidden_width=32)),
    "untied": lambda: Transformer(ModelConfig.preset("mistral-7b", **TINY, key_value_heads=2, hidden_width=32)),
    "qwen3": lambda: Transformer(ModelConfig.preset("qwen3-0.6b", **TINY, key_value_heads=2, hidden_width=32)),
    "experts": lambda: Transformer(ModelConfig.preset("mixtral-8x7b", **TINY, key_value_heads=2, hidden_width=32)),
    "latent": lambda: Transformer(ModelConfig(**TINY, **LATENT, query_latent_width=8)),
    "sandwich": lambda: Transformer(ModelConfig(**TINY, norm_placement="sandwich", norm="layer")),
    "bare": lambda: Transformer(ModelConfig(**TINY, norm_placement="none", mlp="none")),
    "lstm": lambda: Recurrent("lstm", 29, 8, 2),
    "rnn": lambda: Recurrent("rnn", 29, 8),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_norms_are_not_decayed(name, kind):
    model = MODELS[name]()
    optimizers = make_optimizers(model, kind, learning_rate=0.1, weight_decay=0.7, muon_dtype=torch.float32)
    held = [id(p) for group in optimizers.groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    for part in optimizers.parts:
        for group in part.param_groups:
            for p in group["params"]:
                plain = "norm" in names[id(p)] or names[id(p)].endswith("bias")
                table = names[id(p)].startswith(("embedding", "position_table", "head")) or "router" in names[id(p)]
                assert group["weight_decay"] == (0.0 if plain else 0.7), names[id(p)]
                assert isinstance(part, Muon) == (kind == "muon" and not plain and not table), names[id(p)]
    tied = name not in ("untied", "experts", "lstm", "rnn")
    assert ("head.weight" in optimizers.names) is not tied
    before = weights_of(model)
    model(torch.arange(12).view(2, 6)).logits.square().sum().backward()
    optimizers.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert {n.rpartition(".")[2] for n in moved} >= {"weight"}
    assert "embedding.weight" in moved


def test_what_is_frozen_is_left_out_and_wrappers_are_looked_through():
    model = Transformer(CONFIG)
    model.embedding.weight.requires_grad_(False)
    groups = groups_of(model)
    assert not groups["table"]
    assert sum(len(group) for group in groups.values()) == len(list(model.parameters())) - 1
    wrapper = nn.Module()
    wrapper._orig_mod = model
    assert groups_of(wrapper) == groups
    make_optimizers(model, learning_rate=0.1)


def test_kinds_by_name():
    matrix = torch.zeros(2, 2)
    assert kind_of("blocks.0.mlp.router.weight", matrix) == "table"
    assert kind_of("blocks.0.attention.overhead.weight", matrix) == "hidden", "names are compared whole"
    assert kind_of("embedding.weight", torch.zeros(3)) == "plain"


def test_overlap_and_omission_are_refused():
    one, other = random_parameters((2, 2), (3, 3))
    names = {"one": one, "other": other}
    with pytest.raises(ValueError, match="2 parameters, 1 places.*Left out: other"):
        Optimizers([AdamW([one])], names)
    with pytest.raises(ValueError, match="2 parameters, 3 places.*Left out: none"):
        Optimizers([AdamW([one, other]), Muon([one])], names)
    with pytest.raises(ValueError, match="1 parameters, 2 places"):
        Optimizers([AdamW([one, other])], {"one": one})
    with pytest.raises(ValueError, match="optimizer 'sgd' is unknown; there are adamw, muon"):
        make_optimizers(Transformer(CONFIG), "sgd", learning_rate=0.1)


def test_each_group_has_its_own_top_rate():
    one, other = random_parameters((2, 2), (3,))
    both = Optimizers([Muon([one], lr=0.3), AdamW([other], lr=0.1)], {"one": one, "other": other})
    for factor in (0.5, 1.0, 0.1):  # of the top, not of the last
        both.set_rate(factor)
        assert [group["lr"] for group in both.groups] == [0.3 * factor, 0.1 * factor]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_round_trip(kind):
    """Half way, the state goes to a new optimizer of a copy, and both go on alike."""
    first = trainer_of(kind=kind, steps=8).train(4)
    state = {name: t.clone() for name, t in first.optimizers.state_tensors().items()}
    second = trainer_of(kind=kind, steps=8, stream=stream_of())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizers.load(state)
    second.optimizers.load_counters(first.optimizers.counters())
    second.load_progress(first.progress_state())
    assert equal(second.optimizers.state_tensors(), state)
    first.train()
    assert all(t.abs().sum() > 0 for t in state.values())
    assert not equal(first.optimizers.state_tensors(), state), "a copy was taken"
    second.train()
    assert equal(weights_of(first.model), weights_of(second.model))
    assert len(state) == sum(
        1 if p.ndim > 1 and kind == "muon" and "emb" not in n else 2 for n, p in first.model.named_parameters()
    )


def test_state_of_another_is_refused():
    adam, muon = trainer_of(kind="adamw").optimizers, trainer_of(kind="muon").optimizers
    before = {name: t.clone() for name, t in adam.state_tensors().items()}
    with pytest.raises(ValueError, match="the optimizer here has .16, 16., the file nothing"):
        adam.load(muon.state_tensors())
    wrong = {**before, "embedding.weight/first": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="embedding.weight/first the optimizer here has .31, 16., the file .2, 2."):
        adam.load({name: t + 1 for name, t in wrong.items()})
    assert equal(adam.state_tensors(), before)
    with pytest.raises(ValueError, match="zip"):
        adam.load_counters([1])
