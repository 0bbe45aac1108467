"""The base model of the year: what it is trained on, and how it is looked at while it trains.

A mixture in stated shares of bytes: Shakespeare, encyclopedia, web text, and worked arithmetic. Every document is whole in
the stream; rows of the loader cut it where they end. Held-out documents are of plays, articles, pages and problems that the
training text does not contain.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.data import arithmetic
from common.data.cleaning import mixture
from common.data.corpora import year_sources
from common.data.documents import Document, tokenize_documents
from common.data.stream import BatchStream
from common.evaluation.drills import score_drills
from common.evaluation.text import score_documents, token_sizes
from common.foundation.device import Device
from common.foundation.evidence import claim, number
from common.foundation.plots import curves, save
from common.foundation.statistics import Interval, mean_ci
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.config import ModelConfig
from common.model.cost import flops_per_token
from common.model.initialise import without_storage
from common.model.ngram import NGram
from common.model.output import LanguageModel
from common.model.transformer import Transformer
from common.tokenization.bpe import BPETokenizer
from common.tokenization.protocol import END_OF_TEXT, Tokenizer
from common.training.distributed import Parallel, World, inner
from common.training.optimizers import make_optimizers
from common.training.schedules import Schedule
from common.training.snapshots import Snapshots
from common.training.trainer import Settings, Trainer

# Tested at these numbers of numbers: three to eight in training. The seed is that of the questions, the same for every
# training, and was not used while the recipe was chosen.
QUESTIONS_SEED = 12
LOOKS = (("plain_sum", 3), ("checksum", 6), ("mod_chain", 6), ("sums", 3), ("sums", 5), ("sums", 7))
PROMPTS = ("ROMEO:\n", "The history of the city ")
ARITHMETIC_BYTES = 190  # of a worked document and its share of drills: only to know how many are enough


Looks = dict[str, list[Document]]  # "plays, seen" -> a few documents of that domain


@dataclass(frozen=True)
class ArithmeticRecipe:
    """What the arithmetic of a training text is made of.

    Attributes:
        families: shares of the worked documents. Sums have the most to learn: carrying, and lists that change.
        drills: documents of bare additions for each worked one, in training only: digits are learned there.
        skewed: the share of drill lines with mostly small digits, see `arithmetic.drill_documents`.
    """

    families: Mapping[str, float]
    drills: float
    skewed: float


RECIPES = {
    # The digits of the drills are uniform. Whether a training learns to add with them is decided near its end.
    "uniform drills": ArithmeticRecipe({"sums": 0.6, "checksum": 0.13, "mod_chain": 0.14, "plain_sum": 0.13}, 0.5, 0.0),
    "skewed drills": ArithmeticRecipe({"sums": 0.55, "checksum": 0.18, "mod_chain": 0.16, "plain_sum": 0.11}, 0.3, 1.0),
}
RECIPE_NAME = "skewed drills"
RECIPE = RECIPES[RECIPE_NAME]


@dataclass(frozen=True)
class BaseData:
    """Token ids to train on, how they are made up, and a few documents of each domain, seen and held out."""

    ids: np.ndarray
    shares: dict[str, dict[str, float]]
    looks: Looks


def shares_of(config: Any) -> dict[str, float]:
    """The shares of the mixture among a config's fields."""
    return {name: getattr(config, name) for name in ("plays", "wiki", "web", "arithmetic")}


@dataclass(frozen=True)
class Pretraining:
    """All that a process needs to know to train the base model, in files and plain values.

    Attributes:
        stream, tokenizer, snapshots: paths.
        rows: of an update, over all processes and micro-batches.
        every: updates between two evaluations; snapshots are taken twice as often.
        peak_flops: of one process.
    """

    shape: ModelConfig
    stream: str
    tokenizer: str
    snapshots: str
    looks: Looks
    rows: int
    every: int
    seed: int = 0
    accumulate: int = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    dtype: str = "float32"
    peak_flops: float = 0.0
    parallel: Parallel = "none"

    def trainer(self, world: World) -> Trainer:
        """Killed and made again, it goes on where its last snapshot was."""
        words = BPETokenizer.load(self.tokenizer)
        rows, left = divmod(self.rows, world.size * self.accumulate)
        if left:
            raise ValueError(
                f"rows {self.rows} cannot be dealt to {world.size} processes with accumulate {self.accumulate}: choose a "
                f"multiple of {world.size * self.accumulate}"
            )
        length = self.shape.context_length
        stream = BatchStream(
            np.load(self.stream), length=length, batch_size=rows, end_of_text=words.specials[END_OF_TEXT],
            seed=self.seed, rank=world.rank, world_size=world.size,
        )  # fmt: skip
        steps, model = stream.rows // self.rows, world.wrap(Transformer(self.shape, seed=self.seed), self.parallel)
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        return Trainer(
            model,
            stream,
            make_optimizers(model, self.optimizer, **rates, muon_dtype=getattr(torch, self.dtype)),
            Schedule(steps, steps // 50, "wsd", floor=0.0),
            Settings(
                seed=self.seed,
                accumulate=self.accumulate,
                dtype=getattr(torch, self.dtype),
                evaluate_every=self.every,
                save_every=max(1, self.every // 2),
            ),
            evaluate=lambda model, _: self.look(inner(model), words),
            snapshots=Snapshots(self.snapshots),
            tokenizer=words,
            byte_lengths=token_sizes(words),
            world=world,
            label="base model",
            flops_per_token=flops_per_token(self.shape, length),
            peak_flops=self.peak_flops,
        )

    def look(self, model: Transformer, words: BPETokenizer) -> dict[str, Any]:
        """A point of the curves, and what the model writes by now."""
        found: dict[str, Any] = dict(curve_point(model, words, self.looks))
        drills = score_drills(model, words, held_out_drills())
        found |= {"drills": drills.whole, "drills, last digit": drills.last}
        if self.parallel != "shards":  # gathered weights and the engine's inference mode do not go together
            found["sample"] = continued(Engine(model, words), PROMPTS[:1], 40, temperature=0.8)[0]
        return found


def train(world: World, job: Pretraining) -> None:
    """What each process does; the result is the last snapshot."""
    job.trainer(world).train()


def sources(
    split: str, arithmetic_documents: int, seed: int, recipe: ArithmeticRecipe = RECIPE
) -> dict[str, list[Document]]:
    """The documents of the year in one split, January's bare sums replaced by worked arithmetic."""
    found = year_sources(split)
    del found["sums"]  # January's sums are replaced: its test sums are pairs of numbers, and ours are longer
    worked = arithmetic.training_documents(split, arithmetic_documents, seed, families=recipe.families)
    count = round(recipe.drills * arithmetic_documents) if split == "train" else 0
    return {**found, "arithmetic": worked + arithmetic.drill_documents(count, seed, skewed=recipe.skewed)}


@functools.cache
def held_out_drills() -> list[Document]:
    """Additions with uniform digits, as traces have them, that no drill of any training states."""
    return arithmetic.drill_documents(30, 0, skewed=0.0, split="validation")


def base_data(
    tokenizer: BPETokenizer,
    shares: Mapping[str, float],
    bytes_in_all: int,
    seed: int,
    recipe: ArithmeticRecipe = RECIPE,
) -> BaseData:
    """The mixture as one stream of ids, and a few documents of each domain, seen and held out."""
    count = round(1.3 * bytes_in_all * shares["arithmetic"] / ARITHMETIC_BYTES)
    train = sources("train", count, seed, recipe)
    documents, report = mixture(train, shares, bytes_in_all=bytes_in_all, seed=seed)
    ids = np.concatenate([ids[:-1].numpy() for ids in tokenize_documents(documents, tokenizer)])
    shown = {document.name for document in documents}
    seen = {name: [d for d in train[name] if d.name in shown and d.group != "drill"] for name in train}
    parts = {"seen": seen, "held out": sources("validation", 400, seed)}
    looks = {f"{name}, {what}": a_few(part[name]) for what, part in parts.items() for name in part}
    return BaseData(ids, report, looks)


def a_few(documents: Sequence[Document], size: int = 10_000, cut: int = 2_000) -> list[Document]:
    """Documents evenly spread over the list, the beginning of each, of about `size` characters together."""
    whole = sum(min(cut, len(document.text)) for document in documents)
    step = max(1, round(whole / size))
    return [Document(document.name, document.group, document.text[:cut]) for document in documents[::step]]


def curve_point(model: LanguageModel, tokenizer: Tokenizer, looks: Looks) -> dict[str, float]:
    """Bits per byte of each domain, seen and held out. Alignment here is the evaluator's own, not that of the loader."""
    return {name: score_documents(model, tokenizer, few).mean() for name, few in looks.items()}


def continued(
    engine: Engine, prompts: Sequence[str] = PROMPTS, max_tokens: int = 80, temperature: float = 0.0
) -> list[str]:
    """What the model writes after fixed prompts, with the same draws each time: changes are the model's."""
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    made = engine.generate([engine.encode(prompt) for prompt in prompts], params)
    return [prompt + completions[0].text for prompt, completions in zip(prompts, made, strict=True)]


def solve(engine: Engine, family: str, size: int, n: int, *, split: str, seed: int = 0) -> dict[str, Any]:
    """Greedy answers to unseen problems: rates of right answers and of traces without any wrong step, and one answer."""
    sizes = None if family == "plain_sum" else (size,)
    problems = arithmetic.problems(family, split, n, seed, sizes=sizes)
    params = SamplingParams(temperature=0, max_tokens=engine.model.context_length)
    made = engine.generate([engine.encode(problem.question + "\n") for problem in problems], params)
    verdicts = [arithmetic.check_trace(p, c[0].text) for p, c in zip(problems, made, strict=True)]
    right = [float(str(verdict.answer) == p.answer) for verdict, p in zip(verdicts, problems, strict=True)]
    return {
        "answer": mean_ci(right),
        "trace": mean_ci([float(verdict.ok) for verdict in verdicts]),
        "tokens": sum(len(c[0].ids) for c in made),
        "example": f"{problems[0].question}\n{made[0][0].text}",
    }


def answers(engine: Engine, questions: int) -> dict[str, dict[str, Any]]:
    """`solve` at every family and size of LOOKS, by "sums of 5". The same questions for every model."""
    return {
        f"{family} of {size}": solve(engine, family, size, questions, split="test", seed=QUESTIONS_SEED)
        for family, size in LOOKS
    }


def test_documents(seed: int) -> dict[str, list[Document]]:
    """The test split by domain, for the numbers at the end."""
    return {name: a_few(documents, 100_000) for name, documents in sources("test", 1000, seed).items()}


def by_domain(
    model: LanguageModel, tokenizer: Tokenizer, documents: Mapping[str, Sequence[Document]]
) -> dict[str, Interval]:
    """Bits per byte of each domain, over documents."""
    return {name: score_documents(model, tokenizer, few).bits_per_byte() for name, few in documents.items()}


def ngram_of(ids: np.ndarray, end: int, vocab_size: int, order: int = 5) -> NGram:
    """January's model on a stretch of the stream. Each document once: counts take a repetition for evidence."""
    edges = np.flatnonzero(ids == end)
    texts = [ids[a : b + 1] for a, b in zip(edges, [*edges[1:], len(ids)], strict=True)]
    return NGram.fit(
        [torch.from_numpy(one) for one in {one.tobytes(): one for one in texts}.values()], order, vocab_size
    )


def report(
    model: Transformer,
    tokenizer: BPETokenizer,
    data: BaseData,
    trainer: Trainer,
    place: Callable[[str], Path],
    *,
    seed: int,
    questions: int,
) -> tuple[list[dict], list[dict], list[dict], list[dict], dict[str, int]]:
    """(claims, rows, figures, samples, tokens spent) of the finished base model."""
    engine, tested = Engine(model, tokenizer), test_documents(seed)
    counted = ngram_of(data.ids, engine.end, tokenizer.vocab_size)
    others = {"base model": model, "5-gram": counted, "unigram": counted.truncated(1)}
    scores = {name: by_domain(other, tokenizer, tested) for name, other in others.items()}
    rows = [
        number(f"{domain}, test: {name}", scores[name][domain], "bits per byte", f"{len(tested[domain])} documents")
        for domain in tested for name in others
    ]  # fmt: skip
    claims = [
        claim("The base model beats the 5-gram of the same text on unseen plays",
              scores["base model"]["plays"], scores["5-gram"]["plays"], better="lower", unit="bits per byte",
              cost={"tokens": len(data.ids)})
    ] if questions >= 20 else []  # fmt: skip
    samples, spent = [], {"generated": 0}
    for what, solved in answers(engine, questions).items():
        note = f"every step right: {solved['trace'].mean:.2f}; {solved['tokens'] / questions:.0f} tokens each"
        rows.append(number(f"{what}, unseen: right answers", solved["answer"], "rate", note))
        samples.append({"title": f"{what.replace(' of ', ', ')} numbers, greedy", "text": solved["example"]})
        spent["generated"] += solved["tokens"]
    samples += [
        {"title": f"After {row['step']:,} updates, at temperature 0.8", "text": row["sample"]}
        for row in (trainer.evaluations[i] for i in (0, 1, len(trainer.evaluations) // 2))
        if "sample" in row
    ]
    for temperature, how in ((0.8, "at temperature 0.8"), (0.0, "greedy")):
        for prompt, text in zip(PROMPTS, continued(engine, temperature=temperature), strict=True):
            samples.append({"title": f"At the end, after {prompt.strip()!r}, {how}", "text": text})
    points = trainer.evaluations[1:]  # before any update every token is as likely as any other
    at = [row["step"] * trainer.history[0]["targets"] / 1e6 for row in points]
    lines = {name: [row[name] for row in points] for name in data.looks}
    figures = []
    for what in ("seen", "held out"):
        mine = {name: values for name, values in lines.items() if name.endswith(what)}
        figure = curves(
            at, mine, title=f"Bits per byte, {what} documents", xlabel="million tokens", ylabel="bits per byte"
        )
        caption = "Scored by the evaluator, which aligns targets on its own. The same documents at every look."
        figures.append(save(figure, place(f"curves-{what.replace(' ', '-')}.png"), caption=caption))
    found = {"the whole number": "drills", "its last digit": "drills, last digit"}
    figure = curves(
        at, {label: [row[name] for row in points] for label, name in found.items()},
        title="Additions that no drill states", xlabel="million tokens", ylabel="rate right", level=("guessed digit", 0.1),
    )  # fmt: skip
    caption = "Results such as that of 65+468=533, read within documents of bare additions."
    figures.append(save(figure, place("drills.png"), caption=caption))
    return claims, rows, figures, samples, spent


def plan(job: Pretraining, data: BaseData, device: Device, processes: int, share: float = 0.35) -> str:
    """What a training will take, before it starts. `share` is the part of the measured peak that is reached in practice."""
    shape, tokens = job.shape, len(data.ids)
    with without_storage():  # counted without being there
        parameters = Transformer(shape).num_parameters()
    flops = 3 * flops_per_token(shape, shape.context_length) * tokens
    bytes_held = 16 * parameters  # fp32 weights, gradients, and at most two moments
    together = job.rows // (processes * job.accumulate) * shape.context_length
    activations = 2 * together * shape.layers * 34 * shape.width  # bf16, all kept for the backward pass
    passes = ", ".join(f"{name} {part['passes']:.1f}" for name, part in data.shares.items())
    return (
        f"plan: {parameters:,} parameters, {tokens:,} tokens ({tokens / parameters:.1f} for each), {flops:.3g} FLOP; "
        f"{bytes_held / 2**20:,.0f} MiB of weights, gradients, optimizer state, about {activations / 2**20:,.0f} MiB of "
        f"activations in a process; {flops / (share * processes * job.peak_flops) / 3600:.2g} hours at {share:.0%} of "
        f"the measured peak of {device}; passes over the text: {passes}"
    )
