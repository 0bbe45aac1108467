"""A small, honest cleaning pipeline: normalise, filter, remove duplicates and near-duplicates, decontaminate, mix.

Every stage is a function from documents to (documents, StageReport); the report says what it removed, in documents and
bytes, with examples. Left out on purpose: language identification by a model, quality classifiers, personal data.
"""

import hashlib
import itertools
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import regex

from common.data.documents import Document

EXAMPLES = 3


@dataclass(frozen=True)
class StageReport:
    """What one stage did. `examples` are (name of the document, why it went)."""

    stage: str
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int
    examples: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        gone, lost = self.documents_in - self.documents_out, self.bytes_in - self.bytes_out
        return (
            f"{self.stage:<18} removed {gone:>4} of {self.documents_in:>4} documents, "
            f"{lost:>9,} of {self.bytes_in:>10,} bytes ({lost / max(1, self.bytes_in):.1%})"
        )


def size_of(documents: Iterable[Document]) -> int:
    """Bytes of all texts."""
    return sum(len(document.text.encode("utf-8")) for document in documents)


def _report(
    stage: str, before: Sequence[Document], after: Sequence[Document], removed: Sequence[tuple[str, str]]
) -> StageReport:
    return StageReport(
        stage, len(before), len(after), size_of(before), size_of(after), list(itertools.islice(removed, EXAMPLES))
    )


# --- normalise --------------------------------------------------------------------------------------------------------


def normalise_text(text: str) -> str:
    r"""One form for what looks the same: line feeds, no control characters, NFC, no white space at line ends.

    Case, punctuation and accents stay. Page breaks and vertical tabs become line ends, so that no words are glued.

    >>> normalise_text("cafe\u0301 \r\n\r\n\r\n\r\nau\x00 lait  ")
    'café\n\nau lait'
    """
    text = regex.sub(r"\r\n|[\r\v\f\x85\u2028\u2029]", "\n", text)
    text = regex.sub(
        r"[^\P{C}\n\t\u200c\u200d]", "", text
    )  # control and unassigned; joiners carry meaning in some scripts
    text = unicodedata.normalize("NFC", text)  # after the controls are gone: one of them may have kept an accent apart
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return regex.sub(r"\n{3,}", "\n\n", text).strip()


def normalise(documents: Sequence[Document]) -> tuple[list[Document], StageReport]:
    """Documents in normal form; those that were only white space go."""
    changed = [replace(document, text=normalise_text(document.text)) for document in documents]
    kept = [document for document in changed if document.text]
    examples = [
        (before.name, f"{len(before.text) - len(after.text)} characters")
        for before, after in zip(documents, changed, strict=True)
        if before.text != after.text
    ]
    return kept, _report("normalise", documents, kept, examples)


# --- filter -----------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    return regex.findall(r"\w+", text.lower())


def _share_of_lines_repeated(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / max(1, len(lines))


# Each rule: name -> (what is measured, lowest and highest value that is kept), after Gopher (Rae et al. 2021).
RULES: Mapping[str, tuple[Callable[[str], float], float, float]] = {
    "words": (lambda text: len(words_of(text)), 30, 100_000),
    "mean word length": (lambda text: float(np.mean([len(w) for w in words_of(text)] or [0])), 3, 10),
    "share of letters": (lambda text: sum(c.isalpha() or c.isspace() for c in text) / max(1, len(text)), 0.8, 1),
    "share of repeated lines": (_share_of_lines_repeated, 0, 0.3),
    "share of lines that end a sentence": (
        lambda text: float(
            np.mean([line.rstrip().endswith((".", "!", "?", '"', "”", ":")) for line in text.splitlines()])
        ),
        0.1,
        1,
    ),
}


def why_not(text: str) -> str | None:
    """The first rule that a text breaks, with its value; None if it passes all.

    >>> why_not("buy now")
    'words: 2, kept from 30 to 100000'
    """
    for name, (measure, low, high) in RULES.items():
        value = measure(text)
        if not low <= value <= high:
            return f"{name}: {value:.3g}, kept from {low:g} to {high:g}"
    return None


def filter_documents(documents: Sequence[Document]) -> tuple[list[Document], StageReport]:
    """Keep what passes all RULES."""
    reasons = [why_not(document.text) for document in documents]
    kept = [document for document, reason in zip(documents, reasons, strict=True) if reason is None]
    removed = [(document.name, reason) for document, reason in zip(documents, reasons, strict=True) if reason]
    return kept, _report("filter", documents, kept, removed)


# --- duplicates -------------------------------------------------------------------------------------------------------


def exact_duplicates(documents: Sequence[Document]) -> tuple[list[Document], StageReport]:
    """Keep the first of all documents whose words are the same; case, punctuation and spacing do not count."""
    first: dict[bytes, str] = {}
    kept, removed = [], []
    for document in documents:
        key = hashlib.sha256((" ".join(words_of(document.text)) or document.text).encode("utf-8")).digest()
        if key in first:
            removed.append((document.name, f"same words as {first[key]}"))
        else:
            first[key] = document.name
            kept.append(document)
    return kept, _report("exact duplicates", documents, kept, removed)


def shingles(text: str, width: int = 5) -> set[tuple[str, ...]]:
    """All runs of `width` words; a shorter text is one shingle."""
    words = words_of(text)
    return {tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1))}


class MinHash:
    """Signatures whose share of equal places estimates the Jaccard similarity of two sets (Broder 1997).

    Args:
        permutations: places in a signature; the standard error of the estimate is at most 1 / (2 sqrt(permutations)).
    """

    def __init__(self, permutations: int = 128, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.a, self.b = rng.integers(0, 1 << 64, size=(2, permutations), dtype=np.uint64)
        self.a |= np.uint64(1)  # odd, so that multiplying is a permutation of the 64-bit numbers

    def signature(self, items: Iterable[tuple[str, ...]]) -> np.ndarray:
        """The smallest hash of the set under each permutation: multiply-shift (Dietzfelbinger et al. 1997).

        The products must wrap around: without that, the order of the hashes stays and every "permutation" has the same
        smallest item.
        """
        digests = [hashlib.sha256("\0".join(item).encode("utf-8")).digest()[:8] for item in items]
        hashes = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)
        return ((hashes[:, None] * self.a + self.b) >> np.uint64(32)).min(axis=0)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The Jaccard similarity that two signatures suggest."""
    return float((a == b).mean())


def recall_of(bands: int, rows: int, similarity: float) -> float:
    """The probability that two sets of that similarity share at least one band."""
    return 1 - (1 - similarity**rows) ** bands


def bands_for(threshold: float, permutations: int, recall: float = 0.95) -> tuple[int, int]:
    """(bands, rows): the longest rows, so the fewest candidates, that still find a pair at the threshold with `recall`.

    A candidate is checked afterwards, and one that is missed is not.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} must be above 0 and at most 1")
    choices = [(permutations // rows, rows) for rows in range(1, permutations + 1)]
    good = [(bands, rows) for bands, rows in choices if recall_of(bands, rows, threshold) >= recall]
    return max(good, key=lambda choice: choice[1], default=(permutations, 1))


def near_duplicates(
    documents: Sequence[Document], *, threshold: float = 0.7, permutations: int = 128, seed: int = 0
) -> tuple[list[Document], StageReport]:
    """Keep the first of each group of documents whose word shingles overlap by `threshold` or more.

    Candidates share a band of their signatures (locality-sensitive hashing); each is confirmed on the shingles
    themselves, so that an unlucky hash removes nothing.
    """
    bands, rows = bands_for(threshold, permutations)
    minhash = MinHash(permutations, seed)
    seen: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    sets: list[set] = []
    kept, removed = [], []
    for document in documents:
        mine = shingles(document.text)
        signature = minhash.signature(mine)
        keys = [(band, signature[band * rows : (band + 1) * rows].tobytes()) for band in range(bands)]
        candidates = sorted({i for key in keys for i in seen[key]})
        twin = next((i for i in candidates if len(mine & sets[i]) / len(mine | sets[i]) >= threshold), None)
        if twin is not None:
            share = len(mine & sets[twin]) / len(mine | sets[twin])
            removed.append((document.name, f"{share:.0%} of its shingles are those of {kept[twin].name}"))
            continue
        for key in keys:
            seen[key].append(len(kept))
        sets.append(mine)
        kept.append(document)
    return kept, _report("near duplicates", documents, kept, removed)


# --- decontaminate ----------------------------------------------------------------------------------------------------


def decontaminate(
    documents: Sequence[Document], evaluation: Iterable[str], *, width: int = 8
) -> tuple[list[Document], StageReport]:
    """Remove documents that share a run of `width` words with an evaluation text (after Brown et al. 2020).

    Evaluation texts shorter than `width` words are looked for whole.
    """
    forbidden: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for text in evaluation:
        length = min(width, len(words_of(text)))
        if length:
            forbidden[length] |= shingles(text, length)
    kept, removed = [], []
    for document in documents:
        # The smallest one: which member of a set comes first differs from process to process.
        found = min((run for n, runs in forbidden.items() for run in shingles(document.text, n) & runs), default=None)
        if found is None:
            kept.append(document)
        else:
            removed.append((document.name, f"contains {' '.join(found)!r}"))
    return kept, _report("decontaminate", documents, kept, removed)


# --- mix --------------------------------------------------------------------------------------------------------------


def mixture(
    sources: Mapping[str, Sequence[Document]], weights: Mapping[str, float], *, bytes_in_all: int, seed: int = 0
) -> tuple[list[Document], dict[str, dict[str, float]]]:
    """Documents of several sources in stated shares of bytes, shuffled.

    A source with too little text is repeated, and the report says how often: repeating is a decision, not an accident.

    Returns:
        The documents, and for each source its wanted and actual share and its number of passes.
    """
    if set(sources) != set(weights) or any(weight <= 0 for weight in weights.values()):
        raise ValueError(f"weights must be positive and name each source once: {sorted(sources)}, got {dict(weights)}")
    rng, total = np.random.default_rng(seed), sum(weights.values())
    chosen: list[Document] = []
    taken: dict[str, int] = {}
    for name, documents in sources.items():
        budget, taken[name] = bytes_in_all * weights[name] / total, 0
        if not size_of(documents):
            raise ValueError(f"source {name!r} has no text")
        while taken[name] < budget:
            for i in rng.permutation(len(documents)):
                if taken[name] >= budget:
                    break
                chosen.append(documents[i])
                taken[name] += size_of([documents[i]])
    mixed = [chosen[i] for i in rng.permutation(len(chosen))]
    everything = sum(taken.values())
    return mixed, {
        name: {
            "wanted": weights[name] / total,
            "share": taken[name] / everything,
            "bytes": taken[name],
            "passes": math.ceil(100 * taken[name] / size_of(sources[name])) / 100,
        }
        for name in sources
    }
