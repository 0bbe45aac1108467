"""February: clean the year's texts, train its tokenizer on them, and write them to shards that lose nothing."""

from dataclasses import dataclass

import numpy as np

from common.data import cleaning
from common.data.corpora import year_sources
from common.data.documents import Document
from common.data.shards import Shards, write_shards
from common.data.stream import BatchStream
from common.foundation.evidence import claim, number
from common.foundation.files import sha256_json
from common.foundation.plots import bars, curves, save
from common.foundation.run import Run, announce, script
from common.tokenization.bpe import BPETokenizer, show_token
from common.tokenization.compression import bytes_per_token

INPUTS = ("shakespeare", "wiki", "web")


@dataclass(frozen=True)
class Config:
    """None: what the size implies."""

    size: str = "small"
    seed: int = 0
    vocab_size: int | None = None  # tokens in all, specials included
    train_bytes: int | None = None  # of the mixture
    plays: float = 0.6  # shares of the mixture, in bytes
    wiki: float = 0.15
    web: float = 0.15
    sums: float = 0.1
    near_duplicate: float = 0.7  # shingles shared by documents that count as one
    length: int = 256  # tokens in a row of the loader


SIZES = {
    "tiny": {"vocab_size": 512, "train_bytes": 200_000},
    "small": {"vocab_size": 4096, "train_bytes": 5_000_000},
    "medium": {"vocab_size": 8192, "train_bytes": 5_000_000},
    "large": {"vocab_size": 8192, "train_bytes": 5_000_000},
}


def main(config: Config) -> None:
    with Run("02_tokenization", config, inputs=INPUTS) as run:
        train, validation, test = (year_sources(split) for split in ("train", "validation", "test"))
        train["web"], stages = clean(run, train["web"], test, config.near_duplicate)
        weights = {name: getattr(config, name) for name in train}
        mixed, shares = cleaning.mixture(train, weights, bytes_in_all=config.train_bytes, seed=config.seed)
        tokenizer = BPETokenizer.train((document.text for document in mixed), config.vocab_size)
        tokenizer.save(run.path("tokenizer.json"))
        shards = write_shards(mixed, tokenizer, run.path("train"))
        for name, documents in validation.items():
            write_shards(documents, tokenizer, run.path(f"validation-{name}"))
        wrong, padded = one_epoch(shards, config)

        domains = {name: bytes_per_token(tokenizer.encode, texts(documents)) for name, documents in test.items()}
        sizes = [512 << i for i in range(10) if 512 << i <= config.vocab_size]
        plays = texts(test["plays"])
        curve = {size: bytes_per_token(tokenizer.truncated(size).encode, plays) for size in sizes}
        learned = cleaning.size_of(mixed)
        run.spend(trained=learned, written=len(shards))
        run.identify(
            tokenizer=tokenizer.fingerprint,
            model={"mixture": sha256_json(texts(mixed)), "vocab_size": config.vocab_size},
            measurement={"text": sha256_json(plays), "length": config.length},
        )
        unit, pairs = "bytes per token", len(shards) - 1
        figure = bars(domains, title="Bytes that a token holds, on unseen text", xlabel=unit)
        caption = "Sums are low on purpose: every digit is a token of its own."
        figures = [save(figure, run.path("domains.png"), caption=caption)]
        axes = {"title": "Each doubling of the vocabulary buys less", "xlabel": "vocabulary size", "ylabel": unit}
        figure = curves(sizes, {"unseen plays": list(curve.values())}, **axes)
        figures.append(save(figure, run.path("vocabulary.png"), caption="The same tokenizer, stopped early."))
        numbers = [number(f"{name}, unseen", v, unit, f"interval over {v.n} documents") for name, v in domains.items()]
        numbers += [
            number("pairs lost, repeated or invented in an epoch", wrong, "pairs", f"of {pairs:,}; {padded:,} padded")
        ]
        for stage in stages:
            gone = f"{stage.documents_in - stage.documents_out} documents"
            numbers.append(number(f"web, {stage.stage}: removed", stage.bytes_in - stage.bytes_out, "bytes", gone))
        for name, share in shares.items():
            passes = f"wanted {share['wanted']:.2f}; read {share['passes']:.2f} times"
            numbers.append(number(f"mixture, {name}", share["share"], "share of bytes", passes))
        cost = {"bytes learned from": learned}
        text = "An epoch of the loader holds the pairs of the stream, each as often as the stream does"
        run.finish(
            {
                "title": "Tokenization and data that don't lie",
                "claims": [
                    claim(
                        "A token of the year holds more than a byte of unseen plays",
                        domains["plays"],
                        1.0,
                        unit=unit,
                        cost=cost,
                    ),
                    claim(text, wrong, 1, better="lower", unit="pairs wrong", cost={"pairs": pairs, "padded": padded}),
                ],
                "numbers": numbers,
                "figures": figures,
                "samples": [{"title": "the twelve longest tokens", "text": longest_tokens(tokenizer, 12)}],
            }
        )


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def clean(run: Run, documents: list[Document], test: dict, threshold: float) -> tuple[list[Document], list]:
    """The web sample through every stage; each says what it removed."""
    held_out = [text for documents in test.values() for text in texts(documents)]
    stages = []
    for stage in (
        cleaning.normalise,
        cleaning.filter_documents,
        cleaning.exact_duplicates,
        lambda documents: cleaning.near_duplicates(documents, threshold=threshold),
        lambda documents: cleaning.decontaminate(documents, held_out),
    ):
        documents, report = stage(documents)
        stages.append(report)
        announce(f"  {report}")
        run.log(stage=report.stage, documents=report.documents_out, bytes=report.bytes_out, examples=report.examples)
    return documents, stages


def one_epoch(shards: Shards, config: Config) -> tuple[int, int]:
    """(pairs that an epoch has too often or too rarely, places padded): every batch is read, every pair compared."""
    about = {"length": config.length, "end_of_text": shards.about["end_of_text"], "seed": config.seed}
    stream, size, ids = BatchStream(shards, batch_size=16, **about), shards.about["vocab_size"], shards[:]
    read = [(b.inputs * size + b.targets)[b.loss_mask].numpy() for b in stream.epoch_batches()]
    pairs, often = np.unique(ids[:-1] * size + ids[1:], return_counts=True)
    found, times = np.unique(np.concatenate(read), return_counts=True)
    both = np.union1d(pairs, found)
    wanted, got = np.zeros(len(both), dtype=int), np.zeros(len(both), dtype=int)
    wanted[np.searchsorted(both, pairs)], got[np.searchsorted(both, found)] = often, times
    return int(np.abs(wanted - got).sum()), stream.ledger.padded


def longest_tokens(tokenizer: BPETokenizer, count: int) -> str:
    return "  ".join(show_token(raw) for raw in sorted(tokenizer.tokens.values(), key=len)[-count:])


if __name__ == "__main__":
    script(__name__)
