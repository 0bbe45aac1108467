"""Which positions count and who sees whom: by perturbation, by hand, and against a bidirectional model of transformers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import parametrizations

from common.data.documents import Batch
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer
from common.pretrained.names import from_transformers
from common.training import objectives
from common.training.objectives import Masked, NextToken, Prefix, PreparedTokens, plain_head, several_documents
from tests.training.tiny import CONFIG, V, stream_of

LONG, MASK = 12, V - 1


def batch_of(rows=16, length=LONG, documents=1, padded=0, seed=0):
    """Random tokens below MASK; `documents` in each row, then `padded` places of padding."""
    ids = torch.randint(1, MASK, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    document_ids = (torch.arange(length) * documents // length).expand(rows, length).clone()
    real = torch.arange(length).expand(rows, length) < length - padded
    return Batch(ids[:, :-1], ids[:, 1:], real, document_ids.masked_fill(~real, -1))


def model_of(**changes):
    """In double precision, so that what does not depend is equal and what does is not."""
    return Transformer(CONFIG.but(**changes)).double()


def dependence(model, ids, **options):
    """(T, T): does the output at t depend on the token at s? By changing one token at a time, in one row."""
    found = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    with torch.no_grad():
        before = model(ids, **options).logits
        for place in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, place] = (changed[0, place] + 1) % V
            found[:, place] = ((model(changed, **options).logits - before).abs().amax(-1) > 1e-12)[0]
    return found


def causal(length):
    return torch.ones(length, length).tril().bool()


@pytest.mark.parametrize("positions", ["rope", "learned", "alibi", "none"])
def test_a_prefix_sees_itself_and_nothing_behind_it(positions):
    model, ids = model_of(positions=positions), batch_of(1).inputs
    assert torch.equal(dependence(model, ids), causal(LONG))
    for cut in (0, 1, 2, 7, LONG - 1, LONG):
        inside = torch.arange(LONG) < cut
        expected = causal(LONG) | (inside[:, None] & inside)
        # Two layers: what sees one that sees is the same set, for the prefix is closed.
        assert torch.equal(dependence(model, ids, prefix=torch.tensor([cut])), expected), cut


def test_rows_have_prefixes_of_their_own():
    model, batch = model_of(), batch_of(3)
    together = model(batch.inputs, prefix=torch.tensor([2, 5, 12])).logits
    for row, cut in enumerate((2, 5, 12)):
        alone = model(batch.inputs[row : row + 1], prefix=torch.tensor([cut])).logits[0]
        torch.testing.assert_close(together[row], alone)


def test_a_prefix_stays_in_its_document():
    batch = batch_of(1, documents=2)  # places 0-5 and 6-11
    found = dependence(model_of(), batch.inputs, prefix=torch.tensor([9]), document_ids=batch.document_ids)
    first, inside = torch.arange(LONG) < 6, torch.arange(LONG) < 9
    same = first[:, None] == first
    assert torch.equal(found, same & (causal(LONG) | (inside[:, None] & inside)))


def test_a_full_prefix_is_a_bidirectional_model_of_transformers():
    settings = transformers.LlamaConfig(
        vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    ours, ids = from_transformers(theirs).eval(), batch_of(3).inputs
    everything = torch.zeros(3, 1, LONG, LONG)  # added to the scores: nobody is hidden
    with torch.no_grad():
        whole = theirs(input_ids=ids, attention_mask=everything).logits
        assert (theirs(input_ids=ids).logits - whole).abs().max() > 1e-2, "their mask is used"
        torch.testing.assert_close(ours(ids, prefix=torch.full((3,), LONG)).logits, whole, rtol=1e-4, atol=1e-4)


def test_next_token_is_the_batch_itself():
    batch = stream_of().next_batch()
    assert NextToken().prepare(batch, 3) == PreparedTokens(batch, None)


@pytest.mark.parametrize("padded", [0, 5])
def test_prefix_counts_what_comes_after_the_cut(padded):
    batch = batch_of(200, padded=padded)
    prepared = Prefix().prepare(batch, 0)
    assert torch.equal(prepared.batch.inputs, batch.inputs)
    assert torch.equal(prepared.batch.targets, batch.targets)
    for row in range(200):
        cut = int(prepared.prefix[row])
        # The target at t is token t + 1: tokens from the cut on count, and no token before it.
        counted = [t + 1 for t in range(LONG) if prepared.batch.loss_mask[row, t]]
        assert counted == [token for token in range(1, LONG + 1) if token >= cut and token - 1 < LONG - padded]
    assert set(prepared.prefix.tolist()) == set(range(1, LONG)), "every cut"
    assert (prepared.batch.loss_mask.sum(1) > 0).all() or padded


def test_no_target_of_a_prefix_is_seen():
    """The loss of each counted position, one at a time, against each token from its target on."""
    model, batch = model_of(), batch_of(8)
    prepared = Prefix(seed=4).prepare(batch, 1)
    for row in range(8):
        options = {"prefix": prepared.prefix[row : row + 1]}
        found = dependence(model, batch.inputs[row : row + 1], **options)
        for t in range(LONG):
            if prepared.batch.loss_mask[row, t]:
                assert not found[t, t + 1 :].any()
                assert found[t, : t + 1].all(), "and everything before it is"


@pytest.mark.parametrize(
    "make", [lambda seed: Prefix(seed), lambda seed: Masked(MASK, V, seed=seed)], ids=["prefix", "masked"]
)
def test_chance_is_a_function_of_the_number(make):
    batch = batch_of()

    def drawn(seed, number):
        torch.rand(3)  # the global generator plays no part
        prepared = make(seed).prepare(batch, number)
        return prepared.batch.inputs.tolist(), prepared.batch.loss_mask.tolist(), prepared.prefix.tolist()

    assert drawn(0, 7) == drawn(0, 7)
    assert drawn(0, 7) != drawn(0, 8)
    assert drawn(0, 7) != drawn(1, 7)


def test_masked_is_that_of_bert():
    batch = batch_of(2000, padded=3)
    prepared = Masked(MASK, V, share=0.15).prepare(batch, 0)
    made, chosen, real = prepared.batch, prepared.batch.loss_mask, batch.document_ids >= 0
    assert torch.equal(made.targets, batch.inputs), "targets are the tokens themselves, at their own places"
    assert torch.equal(made.inputs[~chosen], batch.inputs[~chosen]), "only chosen ones are changed"
    assert not chosen[~real].any(), "padding is not chosen"
    assert prepared.prefix.tolist() == [LONG] * 2000
    assert float(chosen[real].float().mean()) == pytest.approx(0.15, abs=0.01)
    now, then = made.inputs[chosen], batch.inputs[chosen]
    shares = [float(x.float().mean()) for x in (now == MASK, (now != MASK) & (now != then), now == then)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    others = now[(now != MASK) & (now != then)]
    assert others.unique().tolist() == list(range(MASK))
    place = chosen.float().mean(0)[: LONG - 3]
    assert place.min() > 0.1, "every place may be chosen"
    assert batch.inputs.max() < MASK, "the stream's own batch is as it was"


def test_a_masked_model_learns_from_both_sides():
    """A counted position depends on tokens before and after, through its own place only as far as its input goes."""
    batch = batch_of(1)
    prepared = Masked(MASK, V, share=0.4, seed=1).prepare(batch, 0)
    found = dependence(model_of(), prepared.batch.inputs, prefix=prepared.prefix)
    assert found.all()


@pytest.mark.parametrize("objective", [NextToken(), Prefix(), Masked(MASK, V, 0.5)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(
    "changes", [{}, {"tied": False, "logit_softcap": 1.5}, {"z_loss": 0.1}, {"experts": 4}], ids=str
)
@pytest.mark.parametrize("documents", [1, 3])
def test_the_loss_is_the_cross_entropy_written_out(objective, changes, documents):
    model = Transformer(CONFIG.but(**changes))
    prepared = objective.prepare(batch_of(5, documents=documents, padded=2), 0)
    batch = prepared.batch
    out = model(batch.inputs, document_ids=batch.document_ids, prefix=prepared.prefix)
    mask = batch.loss_mask
    by_hand = F.cross_entropy(out.logits[mask], batch.targets[mask], reduction="sum")
    loss = objective.loss(model, prepared)
    penalty = loss.penalty
    assert int(prepared.units) == int(loss.count) == int(mask.sum())
    torch.testing.assert_close(loss.sum, by_hand)
    torch.testing.assert_close(torch.as_tensor(penalty), torch.as_tensor(out.aux["penalty"]))
    assert float(torch.as_tensor(penalty).detach()) > 0 or not ("z_loss" in changes or "experts" in changes)
    totals = (loss.sum + penalty, by_hand + out.aux["penalty"])
    grads = [torch.autograd.grad(total, list(model.parameters())) for total in totals]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm() + 1e-7


def test_the_loss_of_a_recurrent_network():
    model, batch = Recurrent("lstm", V, 8), batch_of(3, documents=2)
    loss = NextToken().loss(model, PreparedTokens(batch))
    logits = model(batch.inputs, document_ids=batch.document_ids).logits
    torch.testing.assert_close(loss.mean, F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    assert loss.penalty == 0.0


def test_several_documents():
    one, two = batch_of(2).document_ids, batch_of(2, documents=2).document_ids
    assert several_documents(one) is None
    assert several_documents(two) is two
    assert several_documents(torch.tensor([[4, 4], [7, 7]])) is None, "one to a row"
    assert several_documents(batch_of(2, padded=1).document_ids) is not None, "padding is no part of it"


def test_packed_documents_are_kept_apart_in_training():
    model, batch = Transformer(CONFIG), batch_of(4, documents=2)
    joined = dataclasses.replace(batch, document_ids=batch.document_ids * 0)
    with torch.no_grad():
        loss = NextToken().loss
        assert loss(model, PreparedTokens(batch)).sum != loss(model, PreparedTokens(joined)).sum


class Adapted(nn.Module):
    """A low-rank adapter around a layer, which stays as it is."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):  # what would be read behind its back
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Inherited(nn.Linear):
    """The same as a subclass."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_forward_replaced(head):
    right = head.forward
    head.forward = lambda x: 2 * right(x)
    return head


def with_hook(head):
    head.register_forward_hook(lambda _m, _i, output: 2 * output)
    return head


def with_hook_before(head):
    head.register_forward_pre_hook(lambda _m, inputs: (2 * inputs[0],))
    return head


def with_bias(head):
    made = nn.Linear(head.in_features, head.out_features)
    nn.init.ones_(made.bias[: V // 2].detach())
    return made


HEADS = {
    "adapter": Adapted,
    "subclass": lambda head: Inherited(head.in_features, head.out_features, bias=False),
    "parametrised": lambda head: parametrizations.weight_norm(
        nn.Linear(head.in_features, head.out_features, bias=False)
    ),
    "hook": with_hook,
    "hook before": with_hook_before,
    "forward replaced": with_forward_replaced,
    "bias": with_bias,
}


@pytest.mark.parametrize("name", HEADS)
def test_nothing_around_the_head_is_bypassed(name):
    """The loss is that of the logits that the model itself returns, and what is around the head gets its gradient."""
    model = Transformer(CONFIG.but(tied=False), seed=1)
    model.head = HEADS[name](model.head)
    prepared = PreparedTokens(batch_of(3, padded=2))
    batch = prepared.batch
    mask, logits = batch.loss_mask, model(batch.inputs, document_ids=batch.document_ids).logits
    by_hand = F.cross_entropy(logits[mask], batch.targets[mask], reduction="sum")
    loss = NextToken().loss(model, prepared).sum
    torch.testing.assert_close(loss, by_hand)
    assert plain_head(model) is None
    ours, theirs = (torch.autograd.grad(one, list(model.parameters())) for one in (loss, by_hand))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_plain_head_is_left_to_the_chunked_loss(monkeypatch):
    model, calls = Transformer(CONFIG, seed=1), []
    assert plain_head(model) is model.head
    monkeypatch.setattr(model.head, "forward", lambda x: calls.append(x))  # would be seen, and makes it not plain
    assert plain_head(model) is None
    monkeypatch.undo()
    chunked = objectives.chunked_language_model_loss
    monkeypatch.setattr(
        objectives, "chunked_language_model_loss", lambda *a, **o: (calls.append("chunked"), chunked(*a, **o))[1]
    )
    NextToken().loss(model, PreparedTokens(batch_of(2)))
    assert calls == ["chunked"]

    class Louder(Transformer):
        def logits_of(self, x):
            return 2 * super().logits_of(x)

    assert plain_head(Louder(CONFIG)) is None
    assert plain_head(Recurrent("lstm", V, 8)) is None
    assert plain_head(Transformer(CONFIG.but(z_loss=0.1))) is None
