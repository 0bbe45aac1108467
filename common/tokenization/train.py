"""Byte pair encoding: learn which pairs of tokens to merge, most frequent first (Gage 1994; Sennrich et al. 2016).

Three trainers with one rule, *most frequent pair first, on a tie the smallest pair of ids*, so that they agree merge for
merge: `merges_of_text` (the idea, on one list of ids), `merges_of_words` (the same after cutting, by counting everything
again at each step) and `fast_merges_of_words` (what runs: it only touches the words that a merge changes).

Left out on purpose: dropout, byte fallback and unigram models.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import regex
from tqdm import tqdm

Pair = tuple[int, int]


def merge(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """Replace each occurrence of `pair`, from left to right, by `new`.

    >>> merge([1, 1, 1, 2], (1, 1), 9)
    [9, 1, 2]
    """
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def best_pair(counts: Counter[Pair]) -> Pair:
    """The most frequent pair; on a tie the smallest."""
    return min(counts, key=lambda pair: (-counts[pair], pair))


def merges_of_text(text: bytes, count: int) -> list[Pair]:
    """The first `count` merges of a text in one piece. New tokens are numbered from 256.

    >>> merges_of_text(b"aaabdaaabac", 3)       # aa, then ab (a tie with (aa, a): smaller ids first), then aa+ab
    [(97, 97), (97, 98), (256, 257)]
    """
    ids, merges = list(text), []
    for new in range(256, 256 + count):
        counts = Counter(itertools.pairwise(ids))
        if not counts:
            break
        merges.append(best_pair(counts))
        ids = merge(ids, merges[-1], new)
    return merges


def finder(pattern: str) -> Callable[[str], list[str]]:
    """The function that cuts a text into words. Raises ValueError for a pattern with groups, which would cut out parts."""
    compiled = regex.compile(pattern)
    if compiled.groups:
        raise ValueError(f"the pattern has {compiled.groups} capturing group(s); write (?:…) instead of (…)")
    return compiled.findall


def count_words(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    """How often each word occurs; words are what `pattern` matches. Texts are read one at a time."""
    find, words = finder(pattern), Counter()
    for text in texts:
        words.update(find(text))
    return Counter({word.encode("utf-8"): count for word, count in words.items()})


def merges_of_words(words: Counter[bytes], count: int) -> list[Pair]:
    """The first `count` merges within words, counting all pairs again at each step. Slow: for reading and checking."""
    split = {word: list(word) for word in words}
    merges = []
    for new in range(256, 256 + count):
        counts: Counter[Pair] = Counter()
        for word, ids in split.items():
            for pair in itertools.pairwise(ids):
                counts[pair] += words[word]
        if not counts:
            break
        merges.append(best_pair(counts))
        split = {word: merge(ids, merges[-1], new) for word, ids in split.items()}
    return merges


def fast_merges_of_words(words: Counter[bytes], count: int) -> list[Pair]:
    """The same merges. Each pair knows the words that contain it, and a heap keeps the most frequent on top.

    Counts in the heap may be out of date; an entry that does not match the count of today is dropped or pushed back when
    it comes up. A merge then costs the words that it changes, not the corpus.
    """
    ids_of = [list(word) for word in words]
    weight = list(words.values())
    counts: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, ids in enumerate(ids_of):
        for pair in itertools.pairwise(ids):
            counts[pair] += weight[index]
            where[pair].add(index)
    heap = [(-total, pair) for pair, total in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    bar = tqdm(total=count, desc="byte pair merges", unit="merge", delay=5)
    while heap and len(merges) < count:
        total, pair = heapq.heappop(heap)
        today = counts.get(pair, 0)
        if -total != today:
            if today > 0:
                heapq.heappush(heap, (-today, pair))
            continue
        if not today:
            continue
        new = 256 + len(merges)
        merges.append(pair)
        bar.update()
        raised = set()
        for index in where.pop(pair):
            before = ids_of[index]
            after = merge(before, pair, new)
            if len(after) == len(before):  # an earlier merge took the pair out of this word
                continue
            ids_of[index], times = after, weight[index]
            for old in itertools.pairwise(before):
                counts[old] -= times
            for fresh in itertools.pairwise(after):
                counts[fresh] += times
                if new in fresh:
                    where[fresh].add(index)
                    raised.add(fresh)
        counts.pop(pair)
        for fresh in raised:
            if fresh in counts:
                heapq.heappush(heap, (-counts[fresh], fresh))
    bar.close()
    return merges
