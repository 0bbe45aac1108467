"""Probes of a tokenizer and of the loader behind it: text to ids, ids to files, files to batches."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.diagnostics.core import Reading, probe

# Chosen for what goes wrong: runs of white space, line ends, accents in two forms, joined emoji, digits, long runs.
STRANGE = [
    "To be, or not to be: that is the question.",
    "  two  leading and   inner spaces\n\n\nand\tlines \r\n",
    "cafe\u0301 café naïve — déjà vu",
    "日本語のテキスト、句読点。",
    "👩\u200d👩\u200d👧 and 🏳️\u200d🌈!",
    "12345 + 67 = 12412; 3.14, -5",
    "don't I'LL we'Ve 'quoted'",
    "x" * 300 + " " * 40 + "=" * 90,
    "\x00\x1f control \u2028 separator",
    "",
    " ",
    "\n",
]


@probe("shapes-and-ranges", "do inputs and targets have the right shape and the ids the right range?")
def shapes_and_ranges(batches: Callable, vocab_size: int) -> Reading:
    """What everybody looks at: shapes agree, ids are in range, there is something to learn from."""
    made = list(batches(np.arange(100) % vocab_size, 8))
    wrong = sum(i.shape != t.shape or int(i.max()) >= vocab_size or int(t.min()) < 0 for i, t, _ in made)
    return Reading(float(wrong + (not made)), 0.0, "batches with a wrong shape or range")


@probe("round-trip", "does every text come back unchanged?")
def round_trip(encode: Callable, decode: Callable) -> Reading:
    """Share of strange texts that decode(encode(text)) changes."""
    changed = [text for text in STRANGE if decode(encode(text)) != text]
    return Reading(len(changed) / len(STRANGE), 0.0, "share of texts that change")


@probe("reference-ids", "are the ids those of the reference?")
def reference_ids(encode: Callable, reference: Callable) -> Reading:
    """A round trip cannot see a different cut; an independent implementation of the same tokenizer can."""
    differing = [text for text in STRANGE if list(encode(text)) != list(reference(text))]
    return Reading(len(differing) / len(STRANGE), 0.0, "share of texts with other ids than the reference")


@probe("reload", "are the ids the same after saving and loading?")
def reload(encode: Callable, reloaded: Callable) -> Reading:
    """`reloaded()` is the encoder that comes back from disk."""
    again = reloaded()
    differing = [text for text in STRANGE if list(encode(text)) != list(again(text))]
    return Reading(len(differing) / len(STRANGE), 0.0, "share of texts with other ids after loading")


@probe("injection", "can a user's text contain a special token?")
def injection(encode: Callable, special_ids: dict) -> Reading:
    """The name of a special token, in a user's text, must be ordinary text."""
    found = [name for name, token in special_ids.items() if token in encode(f"please {name} ignore this")]
    return Reading(float(len(found)), 0.0, "special tokens that a user can write")


@probe("byte-lengths", "do the bytes of the tokens add up to the text?")
def byte_lengths(encode: Callable, token_length: Callable) -> Reading:
    """Bits per byte divides by these lengths; a token that is half a character has them too."""
    wrong = [text for text in STRANGE if sum(map(token_length, encode(text))) != len(text.encode("utf-8"))]
    return Reading(len(wrong) / len(STRANGE), 0.0, "share of texts whose token lengths do not add up")


@probe("one-opening", "does a prompt begin with exactly one opening token?")
def one_opening(prompt_ids: Callable, special_ids: dict, opening: str) -> Reading:
    """Template and tokenizer may both add one."""
    token, wrong = special_ids[opening], 0
    for text in ("Hello", ""):
        ids = list(prompt_ids(text))
        wrong += ids[:1] != [token] or ids.count(token) != 1
    return Reading(float(wrong), 0.0, "prompts with none, two, or one in the wrong place")


@probe("stored-ids", "do ids survive the file?")
def stored_ids(store: Callable, vocab_size: int) -> Reading:
    """Write the smallest, the largest and the ids around powers of two, and read them back."""
    edges = [0, 1, 255, 256, 32_767, 32_768, 65_535, 65_536, vocab_size - 1]
    ids = np.array([i for i in edges if i < vocab_size])
    with tempfile.TemporaryDirectory() as folder:
        found = np.asarray(store(ids, Path(folder) / "ids"))
    wrong = len(ids) if found.shape != ids.shape else int((found != ids).sum())
    return Reading(float(wrong), 0.0, f"of {len(ids)} ids changed on the way through the file")


def _pairs(made: Any) -> collections.Counter:
    seen: collections.Counter = collections.Counter()
    for inputs, targets, mask in made:
        seen.update(zip(inputs[mask].tolist(), targets[mask].tolist(), strict=True))
    return seen


@probe("pair-coverage", "does every (input, target) pair occur exactly once in an epoch?")
def pair_coverage(batches: Callable, *, length: int = 8) -> Reading:
    """Streams of distinct tokens around a multiple of the length: missing, repeated and shifted pairs all count."""
    wrong = 0
    for n in (2, length - 1, length, length + 1, length + 2, 5 * length + 3):
        tokens = np.arange(n)
        expected = collections.Counter((i, i + 1) for i in range(n - 1))
        try:
            found = _pairs(batches(tokens, length))
        except ValueError:
            continue  # refusing is not losing
        wrong += ((expected - found) + (found - expected)).total()
    return Reading(float(wrong), 0.0, "pairs lost, repeated or invented over six lengths")


@probe("ranks-partition", "do the ranks together see everything once?")
def ranks_partition(rank_batches: Callable, *, world_size: int = 3) -> Reading:
    """The same random numbers in every worker show as repetitions."""
    tokens = np.arange(400)
    seen: collections.Counter = collections.Counter()
    for rank in range(world_size):
        seen += _pairs(rank_batches(tokens, rank, world_size))
    expected = collections.Counter((i, i + 1) for i in range(399))
    wrong = ((expected - seen) + (seen - expected)).total()
    return Reading(wrong / 399, 0.0, "pairs lost or repeated, as a share of all")


@probe("epochs-differ", "is the order another one in the next epoch?")
def epochs_differ(two_epochs: Callable) -> Reading:
    """`two_epochs()` gives the first token of each row, in order, for two epochs."""
    first, second = two_epochs()
    return Reading(float(list(first) == list(second)), 0.0, "1 if both epochs have the same order")


@probe("exact-resume", "does a resumed loader go on with the very next batch, the second time as well?")
def exact_resume(resumed_batches: Callable) -> Reading:
    """`resumed_batches(stops)` gives the batches of 12 steps, saved and loaded anew after each stop."""
    undisturbed = resumed_batches([])
    wrong = sum(list(resumed_batches(stops)) != list(undisturbed) for stops in ([1], [5], [3, 4]))
    return Reading(float(wrong), 0.0, "of three interrupted runs see other batches")


@probe("document-isolation", "can a token see another document in its row?")
def document_isolation(packed_mask: Callable) -> Reading:
    """`packed_mask(document_ids (B, T))` gives (B, T, T): True where a query may see a key."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    mask = torch.as_tensor(packed_mask(ids)).bool()
    crossing = mask & (ids[:, :, None] != ids[:, None, :])
    return Reading(float(crossing.sum()), 0.0, "pairs of tokens that see each other across documents")


@probe("token-ledger", "are tokens in equal to tokens out?")
def token_ledger(pack_documents: Callable) -> Reading:
    """`pack_documents(lengths, row)` packs documents of these lengths; returns how many of their pairs are in a row."""
    lengths = [5, 30, 8, 9, 17, 2, 64, 11]
    return Reading(abs(sum(n - 1 for n in lengths) - pack_documents(lengths, 16)), 0.0, "pairs lost in packing")


@probe("item-identity", "is item i the same whenever it is asked for?")
def item_identity(item: Callable) -> Reading:
    """Ask forwards, then backwards."""
    forwards = [item(i) for i in range(8)]
    backwards = [item(i) for i in reversed(range(8))][::-1]
    return Reading(float(sum(a != b for a, b in zip(forwards, backwards, strict=True))), 0.0, "of 8 items that changed")


@probe("labels-stay", "does each item keep its label?")
def labels_stay(labelled: Callable, label_of: Callable) -> Reading:
    """`labelled()` gives (item, label) as the trainer gets them; `label_of(item)` is the truth."""
    made = list(labelled())
    return Reading(float(sum(label_of(item) != label for item, label in made)), 0.0, f"of {len(made)} labels are wrong")
