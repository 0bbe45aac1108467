"""Fixtures for all tests: one thread, and small models that many tests share."""

import pytest
import torch

from common.data.problems import addition_problems, solved_documents
from common.generation.engine import Engine
from common.model.ngram import NGram
from common.tokenization.byte import ByteTokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def adder(tokenizer):
    """An engine on a model of one-digit sums: small, fast, and right about what it has seen."""
    documents = solved_documents(addition_problems(1, "train"))
    return Engine(NGram.fit_documents(documents, tokenizer, 6), tokenizer)
