"""January: a language model and an adder that both only count, on one engine, from raw text to graded traces."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from common.data.corpora import shakespeare_scenes, split_by_play
from common.data.problems import addition_problems, column_facts, solved_documents
from common.evaluation.runner import Report, evaluate, regrade, trace_text
from common.evaluation.task import Addition, Strategy
from common.evaluation.text import score_documents, shuffle_characters
from common.foundation.evidence import claim, number
from common.foundation.files import sha256_json
from common.foundation.plots import bars, curves, save
from common.foundation.run import Run, script
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
class Config:  # None: what the size implies. The last three fields say how it is measured.
    size: str = "small"
    seed: int = 0
    order: int | None = None  # tokens in the longest n-gram of the text model
    plays: int | None = None  # training plays, in alphabetical order
    strategy: Literal["columns", "ask"] = "columns"  # how sums are solved
    problems: int | None = None  # held-out sums that are asked
    unit: Literal["bits", "nats"] = "bits"  # of the text number, per byte
    rule: str = "whole"  # how the answer is found in the text
    normalise: str = "number"  # how it is compared


SIZES = {
    "tiny": {"order": 4, "plays": 4, "problems": 200},
    "small": {"order": 5, "plays": 33, "problems": 1000},
    "medium": {"order": 6, "plays": 33, "problems": 1000},
    "large": {"order": 6, "plays": 33, "problems": 1000},  # as medium: better hardware does not help counts
}


def main(config: Config) -> None:
    with Run("01_spine", config, inputs=INPUTS) as run:
        text, sums = text_half(run, config), sums_half(run, config)
        run.identify(
            tokenizer=TOKENIZER.fingerprint,
            model=text.pop("model") | sums.pop("model"),
            measurement=text.pop("measurement") | sums.pop("measurement"),
        )
        run.finish({"title": "Two models, one spine", **{key: text[key] + sums[key] for key in text}})


def text_half(run: Run, config: Config) -> dict:
    """Count models of orders 1 to `order` + 2 on validation plays; that of `order`, fixed in advance, on test plays."""
    parts = split_by_play(shakespeare_scenes())
    plays = sorted({scene.group for scene in parts["train"]})[: config.plays]
    train = [scene for scene in parts["train"] if scene.group in plays]
    longest = NGram.fit_documents(train, TOKENIZER, config.order + 2)
    noise = NGram.fit_documents(shuffle_characters(train), TOKENIZER, config.order)
    by_order = [longest.truncated(n) for n in range(1, config.order + 3)]
    validation = [score_documents(m, TOKENIZER, parts["validation"]) for m in by_order]
    curve = {n: score.bits_per_byte() for n, score in enumerate(validation, start=1)}
    model = by_order[config.order - 1]
    save_checkpoint(run.path("text"), model, TOKENIZER)
    run.log(validation_bits_per_byte={n: interval.mean for n, interval in curve.items()})
    scores = [score_documents(m, TOKENIZER, parts["test"]) for m in (model, by_order[0])]
    scores.append(score_documents(noise, TOKENIZER, shuffle_characters(parts["test"], seed=1)))
    value, floor, control = (getattr(score, f"{config.unit}_per_byte")() for score in scores)
    gain = paired_difference(scores[0].per_document(), scores[1].per_document(), weights=scores[0].bytes)
    engine, params = Engine(model, TOKENIZER), SamplingParams(temperature=0.8, seed=config.seed)
    ((sample,),) = engine.generate([engine.encode("ROMEO:\n")], params)
    trained, scored = sum(len(scene.text.encode()) for scene in train), sum(sum(s.tokens) for s in scores + validation)
    run.spend(trained=2 * trained, scored=scored, generated=len(sample.ids), flops=scored * model.flops_per_token())
    unit, name = f"{config.unit} per byte", f"{config.order}-gram"
    axes = {"title": "Longer contexts help, until they are too rare", "xlabel": "order", "ylabel": "bits per byte"}
    figure = curves(list(curve), {"validation plays": list(curve.values())}, **axes)
    text, cost = f"A {name} of bytes codes unseen plays below the unigram", {"bytes counted": trained}
    return {
        "claims": [claim(text, value, floor, better="lower", unit=unit, cost=cost)],
        "numbers": [
            number(f"{name}, unseen plays", value, unit, "interval over the scenes of three plays"),
            number("unigram, the same plays", floor, unit, "control: no context"),
            number(f"{name} minus unigram", gain, "bits per byte", "paired by scene"),
            number(f"{name}, shuffled characters", control, unit, "control: no order to learn"),
        ],
        "figures": [save(figure, run.path("orders.png"), caption="On two plays kept apart for choosing.")],
        "samples": [{"title": f"{name}, temperature 0.8", "text": "ROMEO:\n" + sample.text}],
        "model": {"text": model_fingerprint(model)},
        "measurement": {"text": sha256_json([scene.text for scene in parts["test"]]), "unit": config.unit},
    }


def sums_half(run: Run, config: Config) -> dict:
    """The same engine on two-digit sums: asked directly (seen, unseen), graded leniently, and column by column."""
    task = Addition(rule=config.rule, normalise=config.normalise)
    facts = partial(solved_documents, column_facts(), reverse_answer=True)
    solved = solved_documents(addition_problems(2, "train"))
    texts = {"ask": solved, "columns": facts(), "none": facts(shuffle_answers=0)}
    models = {name: NGram.fit_documents(documents, TOKENIZER, SUM_ORDER) for name, documents in texts.items()}
    for name, model in models.items():
        save_checkpoint(run.path(name), model, TOKENIZER)

    def measure(name: str, strategy: Strategy, model: str | None, split: str = "test") -> Report:
        engine, path = model and Engine(models[model], TOKENIZER), run.path(f"traces-{name}.jsonl")
        report = evaluate(task, strategy, engine, config.problems, split=split, trace_path=path)
        run.spend(asked=report.tokens)
        return report

    seen, unseen = measure("seen", Ask(task), "ask", "train"), measure("unseen", Ask(task), "ask")
    columns, nonsense = measure("columns", Columns(), "columns"), measure("nonsense", Columns(), "none")
    guess = measure("guess", Scripted("random guess", task.random_guess), None)
    rows = {
        "asked, sums seen in training": seen.accuracy,
        "asked, unseen sums": unseen.accuracy,
        "the same answers, last digits compared": regrade(Addition(rule="last_digit"), unseen.traces).accuracy,
        "column by column, unseen sums": columns.accuracy,
        "column by column, shuffled facts": nonsense.accuracy,
        "random guess": guess.accuracy,
        "random guess, last digits compared": regrade(Addition(rule="last_digit"), guess.traces).accuracy,
    }
    chosen = {"ask": unseen, "columns": columns}[config.strategy]
    numbers = [number("unseen sums", chosen.accuracy, "accuracy", f"strategy {config.strategy!r}")]
    numbers += [number(name, interval, "accuracy", f"{interval.n:,} sums") for name, interval in rows.items()]
    text, asked = "Column by column, unseen sums come out right", [trace["question"] for trace in columns.traces]
    title, caption = "One kind of model, asked and graded differently", "Orange: the bar above, graded differently."
    figure = bars(rows, title=title, xlabel="accuracy", limit=1.15, highlight=[row for row in rows if "last" in row])
    return {
        "claims": [claim(text, columns.accuracy, nonsense.accuracy, unit="accuracy", cost={"tokens": columns.tokens})],
        "numbers": numbers,
        "figures": [save(figure, run.path("accuracy.png"), caption=caption)],
        "samples": [{"title": "one sum, column by column", "text": trace_text(columns.traces[0])}],
        "model": {"strategy": config.strategy, "sums": model_fingerprint(models[config.strategy])},
        "measurement": {
            "sums": [config.problems, sha256_json(asked)],
            "rule": config.rule,
            "normalise": config.normalise,
        },
    }


if __name__ == "__main__":
    script(__name__)
