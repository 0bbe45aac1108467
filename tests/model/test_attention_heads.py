"""Scores of attention maps on maps that are known, removal of heads, and the geometry of embeddings on a made-up table."""

import numpy as np
import pytest
import torch

from common.model.attention_heads import induction_score, previous_token_score, without_heads
from common.model.config import ModelConfig
from common.model.geometry import cohesion, directions, like_in_frequency, nearest, pair_cosines, spelling_pairs
from common.model.transformer import Transformer
from common.tokenization.bpe import BPETokenizer

IDS = torch.tensor([[7, 3, 9, 7, 3, 9, 7]])


def test_scores_are_one_for_heads_that_do_only_that():
    weights = torch.zeros(1, 3, 7, 7)
    weights[0, 0, 0, 0] = 1
    weights[0, 0, range(1, 7), range(6)] = 1  # the token before
    weights[0, 1, range(3, 7), range(1, 5)] = 1  # what followed the same token three back
    weights[0, 2] = torch.eye(7)
    assert previous_token_score(weights).tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    # The last query has seen its token twice: a head may look at either continuation.
    assert induction_score(weights, IDS).tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_a_head_is_silenced_and_comes_back():
    model = Transformer(ModelConfig(vocab_size=11, width=12, heads=3, layers=2, init="fan_in"))
    ids = IDS % 11
    whole = model(ids).logits
    with without_heads(model, [(0, 1)]):
        less = model(ids).logits
    assert not torch.allclose(whole, less)
    assert torch.equal(model(ids).logits, whole)
    with torch.no_grad():
        model.blocks[0].attention.value.weight[4:8] = 0  # the same head, silenced by hand
    torch.testing.assert_close(model(ids).logits, less)


def test_geometry_of_a_table_that_is_known():
    table = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.1], [-0.9, 0.0]]) + 5
    unit = directions(table)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(6))
    assert nearest(unit, 0, 2)[0][0] == 1
    assert nearest(unit, 0, 2)[0][1] == pytest.approx(float(unit[0] @ unit[1]))
    expected = torch.stack([unit[0] @ unit[1], unit[2] @ unit[5]])
    torch.testing.assert_close(pair_cosines(unit, [(0, 1), (2, 5)]), expected)
    group = [0, 1, 3]
    by_hand = [sum(float(unit[a] @ unit[b]) for b in group if b != a) / 2 for a in group]
    assert cohesion(unit, group).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_controls_are_as_frequent_and_outside_the_group():
    counts = np.array([100, 90, 50, 49, 10, 9, 1])
    found = like_in_frequency([0, 2], counts)
    assert found == [1, 3]
    assert like_in_frequency([0, 1, 2], counts) == [3, 4, 5]


def test_spelling_pairs_are_one_word_twice():
    tokenizer = BPETokenizer.train(["word word Word word Word the word Word\n" * 50], 269)
    pairs = spelling_pairs(tokenizer)
    assert pairs
    for first, second in pairs:
        a, b = (tokenizer.token_bytes(token).strip().lower() for token in (first, second))
        assert a == b
        assert first != second
