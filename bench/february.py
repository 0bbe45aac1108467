"""What February's fast forms gain, and how far they are from compiled ones: ratios within one run.

    python bench/february.py [--gigabyte]

`--gigabyte` also tokenizes a stream of 1 GB to shards and reports the peak memory.
"""

import itertools
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import regex
import rustbpe
from timing import cpu

from common.data.corpora import tiny_shakespeare
from common.data.documents import Document
from common.data.shards import write_shards
from common.tokenization.bpe import BPETokenizer
from common.tokenization.patterns import GPT4_PATTERN
from common.tokenization.train import best_pair, count_words, fast_merges_of_words, merge


def whole_text_merges(text, count):
    """The way most tutorials train: every occurrence of every word, counted again at each step."""
    words = [list(word.encode()) for word in regex.findall(GPT4_PATTERN, text)]
    for new in range(256, 256 + count):
        counts = Counter()
        for ids in words:
            counts.update(itertools.pairwise(ids))
        pair = best_pair(counts)
        words = [merge(ids, pair, new) for ids in words]


def train_reference(text):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter([text]), 4096, pattern=GPT4_PATTERN)


def gigabyte(tokenizer):
    """Peak resident megabytes while 100 MB and 1 GB are written to shards."""
    text = tiny_shakespeare()[:100_000]
    peaks = {}
    for label, count in (("100 MB", 1000), ("1 GB", 10_000)):
        with tempfile.TemporaryDirectory() as folder:
            documents = (Document(str(i), "g", text) for i in range(count))
            start = time.perf_counter()
            write_shards(documents, tokenizer, Path(folder), batch=16)
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peaks[label] = {"peak MiB": round(peak), "MB a second": round(count / 10 / seconds, 1)}
    return peaks


def main():
    text = tiny_shakespeare()
    ours, merges = cpu(lambda: fast_merges_of_words(count_words([text], GPT4_PATTERN), 4096 - 256))
    steps = 8
    slow, _ = cpu(lambda: whole_text_merges(text, steps), repeat=1)
    theirs, _ = cpu(lambda: train_reference(text))
    tokenizer = BPETokenizer.train([text], 4096)
    encoded, ids = cpu(lambda: BPETokenizer(tokenizer.tokens, tokenizer.merges, GPT4_PATTERN, {}).encode(text))
    tik = tokenizer.to_tiktoken()
    tik_seconds, tik_ids = cpu(lambda: tik.encode_ordinary(text))
    assert ids == tik_ids
    size = len(text.encode()) / 1e6
    found = {
        "merges": len(merges),
        "training: counting everything again / ours": round(slow / steps * len(merges) / ours),
        "training: ours / rustbpe": round(ours / theirs, 1),
        "encoding in Python, MB a CPU second (cold cache)": round(size / encoded, 1),
        "encoding with tiktoken, MB a CPU second": round(size / tik_seconds, 1),
    }
    if "--gigabyte" in sys.argv:
        found["shards"] = gigabyte(tokenizer)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
