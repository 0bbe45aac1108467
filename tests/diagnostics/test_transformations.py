"""Probes of fingerprints and transformations on modules that are not ours."""

import hashlib

import pytest
import torch
from torch import nn

from common.diagnostics.probes import transformations

V = 12
fingerprint, survives = transformations.fingerprint_sees_every_weight, transformations.adapter_survives


def state():
    generator = torch.Generator().manual_seed(0)
    tensors = {"table": torch.randn(V, 4, generator=generator), "out": torch.randn(4, V, generator=generator) - 9}
    return {**tensors, "narrow": torch.randn(3, generator=generator).bfloat16() * 1000, "counts": torch.arange(3)}


def digest(tensors, seen=lambda name: True, salt=""):
    parts = [t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in sorted(tensors.items()) if seen(name)]
    return hashlib.sha256(b"".join(parts) + salt.encode()).hexdigest()


@pytest.mark.parametrize("name", [None, *state()])
def test_a_tensor_that_is_not_hashed_is_named(name):
    reading = fingerprint(checkpoint=state(), fingerprint_with=lambda tensors: digest(tensors, lambda n: n != name))
    assert reading.caught == (name is not None)
    assert reading.value == (name is not None)
    assert name is None or name in reading.note


def test_a_fingerprint_that_changes_by_itself_is_no_fingerprint():
    calls = []
    reading = fingerprint(
        checkpoint=state(), fingerprint_with=lambda t: digest(t, salt=str(calls.append(0) or len(calls)))
    )
    assert reading.caught


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(V, 4), nn.Linear(4, V)
        self.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(V, 2))

    def forward(self, ids):
        x = self.table(ids)
        return self.out(x) + x @ self.a.T @ self.b.T


def merged(module):
    module.out.weight += module.b @ module.a
    nn.init.zeros_(module.b)
    return module


def dropped(module):
    nn.init.zeros_(module.b)
    return module


def merged_twice(module):
    module.out.weight += 2 * module.b @ module.a
    return dropped(module)


def refused(module):
    raise ValueError("not with an adapter")


@torch.no_grad()
@pytest.mark.parametrize(
    ("what", "count"),
    [({"merged": merged}, 0), ({"refused": refused}, 0), ({"dropped": dropped, "merged": merged}, 1),
     ({"twice": merged_twice, "dropped": dropped}, 2)],
)  # fmt: skip
def test_an_adapter_that_is_dropped_or_doubled_is_seen(what, count):
    module = Adapted()
    reading = survives(adapted=module, transformations=what, vocab_size=V)
    assert reading.value == count
    assert all(name in reading.note for name in what if count and name != "merged")
    assert not module.b.any(), "the probe works on copies"


def test_an_adapter_that_does_nothing_shows_nothing():
    frozen = Adapted().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing trainable changes the logits"):
        survives(adapted=frozen, transformations={"dropped": dropped}, vocab_size=V)


def test_another_error_is_not_a_refusal():
    def broken(module):
        raise KeyError("query")

    with pytest.raises(KeyError):
        survives(adapted=Adapted(), transformations={"broken": broken}, vocab_size=V)
