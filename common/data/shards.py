"""Token ids on disk: shards that are memory-mapped, with a checked dtype, and written in one pass with flat memory.

    <folder>/shard-00000.bin, …     ids, little-endian
    <folder>/shards.json            dtype, counts, hashes, tokenizer; written last: without it there are no shards

Two bytes an id where the vocabulary allows it, four where it does not. The choice is made from the vocabulary and every
id is checked against it: an id that does not fit would wrap around silently (gallery: tokens/uint16-wrap).
"""

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from tqdm import tqdm

from common.data.documents import Document
from common.foundation.files import atomic_path, read_json, sha256_file, sha256_json, write_json
from common.tokenization.bpe import BPETokenizer
from common.tokenization.protocol import Tokenizer, document_end


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest of two types that holds every id below `vocab_size`.

    >>> dtype_for(65_536).name, dtype_for(65_537).name
    ('uint16', 'uint32')
    """
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def checked(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` in the dtype of the vocabulary. Raises ValueError if one of them is not in it."""
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"ids run from {ids.min()} to {ids.max()}, outside a vocabulary of {vocab_size}")
    return ids.astype(dtype_for(vocab_size))


def bulk_encoder(tokenizer: Tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
    """A function from texts to ids, at tiktoken's speed where the tokenizer is ours."""
    if isinstance(tokenizer, BPETokenizer):
        with contextlib.suppress(ValueError):  # its merges are not what tiktoken would do: encode ourselves
            return tokenizer.to_tiktoken().encode_ordinary_batch
    return tokenizer.encode_batch


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    shard_tokens: int = 10_000_000,
    batch: int = 256,
) -> "Shards":
    """Tokenize a stream of documents to shards: `<eot> d1 <eot> d2 … <eot>`.

    Documents are read once and in batches, so memory does not grow with the stream.

    Args:
        shard_tokens: tokens in a shard; the last one has fewer. Documents may continue in the next shard.
        batch: documents that are encoded together.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shards.json").unlink(missing_ok=True)  # from here until the end there are no whole shards
    for old in folder.glob("shard-*.bin"):
        old.unlink()
    encode, end = bulk_encoder(tokenizer), document_end(tokenizer)
    shards: list[dict] = []
    waiting = [np.array([end], dtype=dtype_for(tokenizer.vocab_size))]  # not yet in a shard
    counts = {"documents": 0, "bytes": 0, "tokens": 0}

    def flush(ids: np.ndarray) -> None:
        name = f"shard-{len(shards):05d}.bin"
        with atomic_path(folder / name) as temporary:
            ids.tofile(temporary)
        shards.append({"file": name, "tokens": len(ids), "sha256": sha256_file(folder / name)})
        counts["tokens"] += len(ids)

    bar = tqdm(desc="tokenizing", unit="B", unit_scale=True, delay=5)
    for group in batched(documents, batch):
        texts = [document.text for document in group]
        size = sum(len(text.encode("utf-8")) for text in texts)
        ids = np.fromiter(itertools.chain.from_iterable([*one, end] for one in encode(texts)), dtype=np.int64)
        waiting.append(checked(ids, tokenizer.vocab_size))
        counts["documents"] += len(texts)
        counts["bytes"] += size
        bar.update(size)
        if sum(map(len, waiting)) >= shard_tokens:
            ids = np.concatenate(waiting)
            whole = len(ids) - len(ids) % shard_tokens
            for start in range(0, whole, shard_tokens):
                flush(ids[start : start + shard_tokens])
            waiting = [ids[whole:].copy()]
    bar.close()
    if not counts["documents"]:
        raise ValueError("no documents: there is nothing to write")
    if sum(map(len, waiting)):
        flush(np.concatenate(waiting))
    described = {
        "format": "spine-shards-1",
        "dtype": dtype_for(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "end_of_text": end,
        **counts,
        "shards": shards,
    }
    write_json(folder / "shards.json", described)
    return Shards(folder)


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """Items in tuples of `size`; the last may be shorter. (Python 3.12 has it in itertools.)"""
    iterator = iter(items)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


class Shards(Sequence):
    """The shards of a folder as one sequence of ids: `shards[10:20]` is an int64 array, whichever shards it spans.

    Files are opened for each read: a map that stays open keeps every page that was ever read in memory.

    Raises ValueError where a file is missing, has another length than shards.json says, or (with `verify`) another hash.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        if not (self.folder / "shards.json").exists():
            raise ValueError(f"{folder} has no shards.json: the shards were not finished, or this is another folder")
        self.about = read_json(self.folder / "shards.json")
        self.dtype = np.dtype(self.about["dtype"])
        if self.dtype != dtype_for(self.about["vocab_size"]):
            raise ValueError(
                f"{folder}: dtype {self.dtype.name} does not fit a vocabulary of {self.about['vocab_size']:,}; "
                f"it should be {dtype_for(self.about['vocab_size']).name}"
            )
        for shard in self.about["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.exists() else -1
            if size != shard["tokens"] * self.dtype.itemsize:
                raise ValueError(f"{path}: {size} bytes, but shards.json says {shard['tokens'] * self.dtype.itemsize}")
            if verify and sha256_file(path) != shard["sha256"]:
                raise ValueError(f"{path} was altered since it was written: its sha256 differs")
        self._ends = np.cumsum([shard["tokens"] for shard in self.about["shards"]])

    @classmethod
    def for_tokenizer(cls, folder: str | Path, tokenizer: Tokenizer) -> Self:
        """Open shards and refuse those of another tokenizer."""
        made = cls(folder)
        if made.about["tokenizer"] != tokenizer.fingerprint:
            raise ValueError(
                f"{folder} was written with tokenizer {made.about['tokenizer'][:12]}…, not {tokenizer.fingerprint[:12]}…: "
                "its ids mean other bytes. Tokenize the text again."
            )
        return made

    @property
    def fingerprint(self) -> str:
        """What these ids are: the hashes of the files and the tokenizer."""
        return sha256_json([self.about["tokenizer"], [shard["sha256"] for shard in self.about["shards"]]])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice | int) -> np.ndarray:
        if not isinstance(where, slice):
            place = operator.index(where)
            place += len(self) if place < 0 else 0
            if not 0 <= place < len(self):
                raise IndexError(f"token {where} of {len(self)}")
            return self[place : place + 1][0]
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("shards are read in one direction: no step")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[shard]) - self.about["shards"][shard]["tokens"]
            take = min(stop, int(self._ends[shard])) - start
            path = self.folder / self.about["shards"][shard]["file"]
            opened = np.memmap(path, dtype=self.dtype, mode="r")
            parts.append(opened[start - first : start - first + take].astype(np.int64))
            del opened
            start, shard = start + take, shard + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
