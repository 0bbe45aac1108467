"""January: two models, one spine. From raw plays and raw sums to graded, traced numbers.

A count-based language model of Shakespeare, measured in bits per byte on plays it has not seen; and the same kind of
model, behind the same engine, that answers sums, measured as accuracy on sums it has not seen.
"""

from dataclasses import dataclass
from typing import Any

from common.data.corpora import shakespeare_scenes, split_by_play
from common.data.documents import Document, tokenize_documents
from common.data.problems import addition_problems, column_facts, solved_documents
from common.evaluation.runner import Report, evaluate, regrade
from common.evaluation.task import Addition, Strategy
from common.evaluation.text import score_documents, shuffle_characters
from common.foundation.evidence import claim, number
from common.foundation.files import sha256_json
from common.foundation.plots import alt_text, bars, curves, save
from common.foundation.run import Run, announce, script
from common.foundation.statistics import paired_difference
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.ngram import NGram
from common.reasoning.strategies import Ask, Columns, Scripted
from common.tokenization.byte import ByteTokenizer
from common.training.checkpoint import model_fingerprint, save_checkpoint

INPUTS = ("shakespeare",)
TOKENIZER = ByteTokenizer()
SUM_ORDER = 9  # a context of eight bytes holds a whole question, `<eot>47+38=`, and the first digit of its answer


@dataclass(frozen=True)
class Config:
    """None: what the size implies. The last four fields say how it is measured, the others what."""

    size: str = "small"
    seed: int = 0
    order: int | None = None  # tokens in the longest n-gram of the text model
    plays: int | None = None  # training plays, in alphabetical order
    strategy: str = "columns"  # how sums are solved: "columns" or "ask"
    problems: int | None = None  # held-out sums that are asked
    unit: str = "bits"  # of the text number: "bits" or "nats" per byte
    rule: str = "whole"  # how the answer is found in the text
    normalise: str = "number"  # how it is compared


SIZES = {
    "tiny": {"order": 4, "plays": 4, "problems": 200},
    "small": {"order": 5, "plays": 33, "problems": 1000},
    "medium": {"order": 6, "plays": 33, "problems": 1000},
    "large": {"order": 6, "plays": 33, "problems": 1000},
}


def main(config: Config) -> None:
    with Run("01_spine", config, inputs=INPUTS) as run:
        announce(f"January, size {config.size}: under a minute on two cores -> {run.directory}")
        text, sums = text_half(run, config), sums_half(run, config)
        measured = {name: getattr(config, name) for name in ("problems", "unit", "rule", "normalise")}
        run.identify(
            tokenizer=TOKENIZER.fingerprint,
            model={**text.pop("model"), **sums.pop("model"), "strategy": config.strategy},
            measurement={**text.pop("measurement"), **measured},
        )
        run.finish({"title": "Two models, one spine", **{key: text[key] + sums[key] for key in text}})


def fit(documents: list[Document], order: int) -> NGram:
    return NGram.fit(tokenize_documents(documents, TOKENIZER), order, TOKENIZER.vocab_size)


def text_half(run: Run, config: Config) -> dict[str, Any]:
    """Count models of orders 1 to `order` + 2 on validation plays; the chosen one, once, on test plays."""
    parts = split_by_play(shakespeare_scenes())
    plays = sorted({scene.group for scene in parts["train"]})[: config.plays]
    train = [scene for scene in parts["train"] if scene.group in plays]
    longest = fit(train, config.order + 2)
    by_order = {
        n: score_documents(longest.truncated(n), TOKENIZER, parts["validation"]) for n in range(1, config.order + 3)
    }
    curve = {n: score.bits_per_byte() for n, score in by_order.items()}
    for n, interval in curve.items():
        run.log(order=n, validation_bits_per_byte=interval.mean)
    model = longest.truncated(config.order)
    save_checkpoint(run.path("text"), model, TOKENIZER)

    test, unigram = (score_documents(m, TOKENIZER, parts["test"]) for m in (model, longest.truncated(1)))
    noise = fit(shuffle_characters(train), config.order)
    shuffled = score_documents(noise, TOKENIZER, shuffle_characters(parts["test"], seed=1))
    value, floor, control = (getattr(s, f"{config.unit}_per_byte")() for s in (test, unigram, shuffled))
    trained = sum(len(scene.text.encode()) for scene in train)
    scored = sum(score.tokens for score in (*by_order.values(), test, unigram, shuffled))
    params = SamplingParams(temperature=0.8, max_tokens=240, seed=config.seed)
    engine = Engine(model, TOKENIZER)
    ((sample,),) = engine.generate([engine.encode("ROMEO:\n")], params)
    run.spend(trained=2 * trained, scored=scored, generated=len(sample.ids), flops=scored * model.flops_per_token())

    unit, name = f"{config.unit} per byte", f"{config.order}-gram"
    text, cost = f"A {name} of bytes codes unseen plays below the unigram", {"bytes counted": trained}
    title = "Longer contexts help until they are too rare"
    axes = {"xlabel": "order of the model (tokens in an n-gram)", "ylabel": "bits per byte, unseen plays"}
    figure = curves(list(curve), {"trained on plays": list(curve.values())}, title=title, **axes)
    alt = alt_text("Bits per byte on validation plays, by order of the model", curve)
    return {
        "claims": [claim(text, value, floor, better="lower", unit=unit, cost=cost)],
        "numbers": [
            number(f"{name}, unseen plays", value, unit, f"{len(plays)} training plays"),
            number("unigram, the same plays", floor, unit, "control: no context"),
            number(f"{name}, shuffled characters", control, unit, "control: no order to learn"),
        ],
        "figures": [
            save(figure, run.path("orders.png"), alt=alt, caption="Scored on two plays kept apart for choosing.")
        ],
        "samples": [{"title": f"{name}, temperature 0.8", "text": "ROMEO:\n" + sample.text}],
        "model": {"text": model_fingerprint(model)},
        "measurement": {"text": sha256_json([scene.text for scene in parts["test"]])},
    }


def sums_half(run: Run, config: Config) -> dict[str, Any]:
    """The same engine on two-digit sums: asked directly (seen, unseen), graded leniently, and column by column."""
    task, facts = Addition(rule=config.rule, normalise=config.normalise), column_facts()
    models = {
        "ask": fit(solved_documents(addition_problems(2, "train")), SUM_ORDER),
        "columns": fit(solved_documents(facts, reverse_answer=True), SUM_ORDER),
        "nonsense": fit(solved_documents(facts, reverse_answer=True, shuffle_answers=config.seed), SUM_ORDER),
    }
    for name, model in models.items():
        save_checkpoint(run.path(name), model, TOKENIZER)
    engines = {name: Engine(model, TOKENIZER) for name, model in models.items()}

    def measure(name: str, strategy: Strategy, engine: Engine | None, split: str = "test") -> Report:
        path = run.path(f"traces-{name}.jsonl")
        report = evaluate(task, strategy, engine, config.problems, split=split, trace_path=path)
        run.spend(prompted=report.cost["prompt_tokens"], generated=report.cost["generated_tokens"])
        run.log(evaluation=name, accuracy=report.accuracy.mean, tokens=report.tokens)
        return report

    seen = measure("seen", Ask(task), engines["ask"], "train")
    unseen = measure("unseen", Ask(task), engines["ask"])
    columns = measure("columns", Columns(), engines["columns"])
    nonsense = measure("nonsense", Columns(), engines["nonsense"])
    guess = measure("guess", Scripted("random guess", task.random_guess), None)
    rows = {
        "asked, sums seen in training": seen.accuracy,
        "asked, unseen sums": unseen.accuracy,
        "the same answers, last digit only": regrade(Addition(rule="last_digit"), unseen.traces).accuracy,
        "column by column, unseen sums": columns.accuracy,
        "column by column, shuffled facts": nonsense.accuracy,
        "random guess": guess.accuracy,
    }
    gain = paired_difference(columns.right(), unseen.right())
    chosen = columns if config.strategy == "columns" else unseen
    text = "Column by column, unseen sums come out right more often than by guessing"
    caption = "The second and third bar are the same answers of the same model; only the extraction rule differs."
    figure = bars(rows, title="The same counts, asked and graded in different ways", xlabel="accuracy", limit=1.15)
    steps = [f"{step['prompt']}{step['text']}" for step in columns.traces[0]["steps"]]
    return {
        "claims": [claim(text, columns.accuracy, guess.accuracy, unit="accuracy", cost={"tokens": columns.tokens})],
        "numbers": [number("unseen sums", chosen.accuracy, "accuracy", f"strategy {config.strategy!r}")]
        + [number(name, interval, "accuracy", f"{interval.n:,} sums") for name, interval in rows.items()]
        + [number("gain of columns over asking", gain, "accuracy", f"paired, McNemar p = {gain.p_value:.1g}")],
        "figures": [save(figure, run.path("accuracy.png"), alt=alt_text("Accuracy", rows), caption=caption)],
        "samples": [{"title": f"{columns.traces[0]['question']} column by column", "text": "\n".join(steps)}],
        "model": {name: model_fingerprint(model) for name, model in models.items()},
    }


if __name__ == "__main__":
    script(__name__)
