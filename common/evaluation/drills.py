"""Bare additions that no drill states: which digits of the result a model has right, without generating anything.

A look at a training must be cheap. So whole documents of drills are read once, and a result counts as right if each of its
tokens is the most probable one after what stands before it. Greedy decoding would write the same result at that place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.data.documents import Document, scoring_batches, tokenize_documents
from common.generation.decode import device_of
from common.model.output import LanguageModel, is_bounded
from common.tokenization.protocol import Tokenizer

RESULT = re.compile("=([0-9]+)")


@dataclass(frozen=True)
class DrillScore:
    """Rates over all results: the whole number right, its first digit, its last digit."""

    whole: float
    first: float
    last: float


@torch.no_grad()  # not inference mode: see evaluation/text.py
def score_drills(model: LanguageModel, tokenizer: Tokenizer, documents: Sequence[Document]) -> DrillScore:
    """Read documents of lines such as `44+26=70`.

    A token that holds any digit of a result belongs to it, so that the rates mean the same for every tokenizer. Results
    beyond the model's context are not counted.
    """
    sequences = tokenize_documents(documents, tokenizer)
    length = max(map(len, sequences))  # each document in one window
    if not is_bounded(model):
        length = min(length, model.context_length)
        sequences = [ids[: length + 1] for ids in sequences]
    right: dict[int, np.ndarray] = {}  # document -> for each of its targets, whether it is the most probable token
    for batch in scoring_batches(sequences, length=length, overlap=0):
        inputs, ids = batch.inputs.to(device_of(model)), batch.document_ids.to(device_of(model))
        guesses = model(inputs, document_ids=ids).logits.argmax(-1).cpu()
        for row, mask in enumerate(batch.loss_mask):
            right[int(batch.document_ids[row, 0])] = (guesses[row] == batch.targets[row])[mask].numpy()
    rights: list[tuple[bool, bool, bool]] = []
    for number, document in enumerate(documents):
        ends = np.cumsum([len(tokenizer.token_bytes(i)) for i in sequences[number][1:].tolist()])
        starts = np.concatenate([[0], ends[:-1]])
        for found in RESULT.finditer(document.text):
            begin, end = found.span(1)
            if end <= ends[-1]:
                own = right[number][(ends > begin) & (starts < end)]
                rights.append((bool(own.all()), bool(own[0]), bool(own[-1])))
    return DrillScore(*np.mean(rights, axis=0).tolist())
