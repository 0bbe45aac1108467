"""What the fast forms of January gain: ratios within one run, because absolute times say more about the machine.

    python bench/january.py

Not a test: nothing here fails. Numbers that prose quotes come from this script.
"""

import json

import torch
from timing import cpu

from common.data.corpora import shakespeare_scenes, split_by_play
from common.data.documents import tokenize_documents
from common.evaluation.text import score_documents
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.ngram import NaiveNGram, NGram
from common.tokenization.byte import ByteTokenizer


def main():
    torch.set_num_threads(1)
    tokenizer = ByteTokenizer()
    scenes = split_by_play(shakespeare_scenes())["train"]
    sequences = tokenize_documents(scenes[:120], tokenizer)
    lists = [ids.tolist() for ids in sequences]
    tokens = sum(len(ids) - 1 for ids in lists)

    slow_fit, naive = cpu(lambda: NaiveNGram(lists, 5, 257), repeat=1)
    fast_fit, fast = cpu(lambda: NGram.fit(sequences, 5, 257))
    few = lists[0][:400]
    slow_read, _ = cpu(lambda: [naive.probability(few[:t], w) for t in range(1, 400, 10) for w in range(257)], 1)
    fast_score, score = cpu(lambda: score_documents(fast, tokenizer, scenes[:40]))

    engine = Engine(fast, tokenizer)
    one = SamplingParams(max_tokens=100)
    many = SamplingParams(max_tokens=100, n=64)
    alone, _ = cpu(lambda: [engine.generate([engine.encode("ROMEO:\n")], one) for _ in range(8)], 1)
    together, _ = cpu(lambda: engine.generate([engine.encode("ROMEO:\n")], many))
    print(
        json.dumps(
            {
                "tokens counted": tokens,
                "fit: naive / fast, CPU seconds": round(slow_fit / fast_fit, 1),
                "distribution at one position: naive / fast": round(
                    (slow_read / 40) / (fast_score / sum(score.tokens)), 1
                ),
                "sampling a row alone / in a batch of 64": round((alone / 8) / (together / 64), 1),
                "scored tokens a CPU second": round(sum(score.tokens) / fast_score),
            }
        )
    )


if __name__ == "__main__":
    main()
