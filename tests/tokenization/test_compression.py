import pytest
import torch

from common.tokenization.byte import ByteTokenizer
from common.tokenization.compression import bytes_per_token, embedding_parameters, fertility


def test_a_byte_tokenizer_holds_one_byte():
    tokenizer = ByteTokenizer()
    assert bytes_per_token(tokenizer.encode, ["né", "to be"]).mean == 1.0
    assert fertility(tokenizer.encode, ["ab cd", "e f"]).mean == pytest.approx(8 / 4)
    assert embedding_parameters(tokenizer, 64) == 257 * 64
    assert embedding_parameters(tokenizer, 64, tied=False) == 2 * 257 * 64


def test_an_embedding_is_a_lookup_that_equals_one_hot_times_matrix():
    table = torch.nn.Embedding(11, 4)
    ids = torch.tensor([[3, 0, 10], [3, 3, 7]])
    one_hot = torch.nn.functional.one_hot(ids, 11).float()
    torch.testing.assert_close(one_hot @ table.weight, table(ids))
    # and so are their gradients: only rows that were looked up receive any
    (one_hot @ table.weight).sum().backward()
    dense = table.weight.grad.clone()
    table.weight.grad = None
    table(ids).sum().backward()
    torch.testing.assert_close(dense, table.weight.grad)
    assert dense[[1, 2, 4, 5, 6, 8, 9]].abs().sum() == 0
