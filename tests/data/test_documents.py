import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.documents import Document, scoring_batches, tokenize_documents


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    length=st.integers(2, 12),
    overlap=st.integers(0, 11),
    batch_tokens=st.integers(1, 60),
)
def test_every_target_counts_exactly_once_with_enough_context(lengths, length, overlap, batch_tokens):
    overlap = min(overlap, length - 1)
    # Distinct tokens, so that a (document, position) is recognised by its value.
    sequences, start = [], 0
    for size in lengths:
        sequences.append(torch.arange(start, start + size + 1))
        start += size + 1
    seen = collections.Counter()
    for batch in scoring_batches(sequences, length=length, overlap=overlap, batch_tokens=batch_tokens):
        assert batch.inputs.shape == batch.targets.shape == batch.loss_mask.shape == batch.document_ids.shape
        for row, t in batch.loss_mask.nonzero().tolist():
            document, value = int(batch.document_ids[row, t]), int(batch.targets[row, t])
            assert int(batch.inputs[row, t]) == value - 1, "the target is the next token"
            assert sequences[document][0] < value <= sequences[document][-1]
            position = value - 1 - int(sequences[document][0])
            context = min(position, overlap)
            assert int(batch.inputs[row, t - context]) == value - 1 - context, "the context is in the window"
            seen[document, value] += 1
    expected = {(d, int(v)): 1 for d, ids in enumerate(sequences) for v in ids[1:]}
    assert seen == expected


def test_windows_must_move_on():
    with pytest.raises(ValueError, match="windows of 4 tokens cannot overlap by 4"):
        list(scoring_batches([torch.arange(9)], length=4, overlap=4))


def test_documents_are_opened_and_closed(tokenizer):
    (ids,) = tokenize_documents([Document("a", "a", "hi")], tokenizer)
    assert ids.tolist() == [256, 104, 105, 256]
