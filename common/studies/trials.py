"""May's small studies as one list of jobs for the pool, longest first, and what is drawn and tabled from the answers.

    classic     nanoGPT's recipe against ours, and ours with one choice taken back at a time
    law         loss against size on four sizes, asked about a fifth that is not in the fit
    noise       learning rates and batch sizes over seeds
    abilities   three objectives, three questions
    leak        the test text in the training data
    range       the learning rate that breaks
    lstm        a recurrent network on the stream of the base model, at equal tokens

Answers are plain JSON values, so that a killed month does not ask twice.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.data.stream import BatchStream
from common.foundation.evidence import claim, number
from common.foundation.files import read_json, write_json
from common.foundation.parallel import each
from common.foundation.plots import curves, grid, save
from common.foundation.statistics import mean_ci, mean_of_seeds
from common.model.recurrent import Recurrent
from common.studies import abilities, classic, leak, scaling
from common.studies.base import BaseData, Looks, curve_point, ngram_of
from common.tokenization.bpe import BPETokenizer
from common.tokenization.protocol import END_OF_TEXT
from common.training.quick import quick_training
from common.training.trainer import Trainer

Answers = dict[str, Any]  # "study/name/seed" -> what the job returned
RATES, ROWS, SEEDS = (1e-3, 4e-3, 1.6e-2), (8, 32), (0, 1, 2)
# Updates of our recipe: enough for the loss of nanoGPT's, and as many characters as that reads.
SHORT, LONG = 300, 1000


@functools.cache
def text(share: float = 1.0) -> classic.Characters:
    """Once in each process. `share` of the held-out text is scored."""
    return classic.Characters.of_shakespeare().scored_on(share)


def lstm(
    stream: str, tokenizer: str, width: int, updates: int, rows: int, length: int, looks: Looks, seed: int
) -> dict[str, Any]:
    """An LSTM of about the size of the base model, after so many updates on the same batches."""
    words = BPETokenizer.load(tokenizer)
    model, end = Recurrent("lstm", words.vocab_size, width=width), words.specials[END_OF_TEXT]
    batches = BatchStream(np.load(stream), length=length, batch_size=rows, end_of_text=end, seed=seed)
    quick_training(model, batches, updates, optimizer="adamw", label="LSTM").train()
    return {"parameters": model.num_parameters(), "bits_per_byte": curve_point(model, words, looks)}


WORK: dict[str, Callable[..., Any]] = {
    "classic": lambda name, text, **given: classic.run_recipe(classic.RECIPES[name], text, **given),
    "law": lambda name, text, **given: scaling.loss_of_width(int(name), text, **given),
    "noise": lambda name, text, rate, rows, **given: scaling.loss_of_setting(rate, rows, text, **given),
    "abilities": lambda name, text, **given: dataclasses.asdict(abilities.train_and_ask(name, text, **given)),
    "leak": lambda name, text, **given: dataclasses.asdict(leak.watch(text, leaked=name == "leaked", **given)),
    "range": lambda name, text, **given: leak.range_test(name, text, **given),
    "lstm": lambda name, text, **given: lstm(**given),
}


def work(study: str, name: str, share: float, **given: Any) -> Any:
    """Do one job, in a process of its own."""
    return WORK[study](name, text(share), **given)


def jobs(scale: float, stream: str, tokenizer: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All of them, the longest first: two cores are then busy to the end.

    Args:
        scale: 1 is what the article shows; less is shorter, for tests.
        given: of the LSTM's job.
    """

    def part(steps: int) -> int:
        return max(2, round(steps * scale))

    made: list[dict[str, Any]] = []

    def add(study: str, name: str, seeds: tuple[int, ...] = (0,), **more: Any) -> None:
        share = scale * (1.0 if study in ("classic", "leak") else 0.25)
        made.extend({"study": study, "name": name, "seed": seed, "share": share, **more} for seed in seeds)

    add("classic", "nanoGPT", steps=part(2000), every=part(200))
    add("classic", "ours, longer", steps=part(LONG), every=part(LONG // 10))
    add("lstm", "lstm", stream=stream, tokenizer=tokenizer, **given)
    add("classic", "ours", SEEDS, steps=part(SHORT), every=part(SHORT // 10))
    for name in classic.WITHOUT:
        add("classic", name, steps=part(SHORT))
    for name in abilities.OBJECTIVES:
        add("abilities", name, steps=part(250), windows=part(200))
    for width in (scaling.ASKED, *scaling.WIDTHS[::-1]):
        add("law", str(width), SEEDS, characters=part(300_000))
    for rate in RATES:
        for rows in ROWS:
            add("noise", f"{rate:g} x {rows}", SEEDS, rate=rate, rows=rows, characters=part(150_000))
    for name in ("clean", "leaked"):
        add("leak", name, SEEDS[:2], characters=max(2000, part(40_000)), steps=part(450))
    for name in ("adamw", "muon"):
        add("range", name, low=1e-4, high=3.0, steps=part(100))
    return made


def answers(asked: list[dict[str, Any]], path: Path) -> Answers:
    """Of all jobs, over processes; what an earlier attempt left at `path` is not asked again."""
    known = read_json(path) if path.exists() else {}

    def keep(job: Mapping[str, Any], found: Any) -> None:
        known[_key(job)] = found
        write_json(path, known)

    each(work, [job for job in asked if _key(job) not in known], label="studies", seen=keep)
    return known


def _key(job: Mapping[str, Any]) -> str:
    return f"{job['study']}/{job['name']}/{job['seed']}"


def of(found: Answers, study: str, name: str) -> list[Any]:
    """The answers of all seeds."""
    return [value for key, value in found.items() if key.startswith(f"{study}/{name}/")]


def classic_report(
    found: Answers, place: Callable[[str], Path], scale: float
) -> tuple[list[dict], list[dict], list[dict]]:
    """(claims, rows, figures)."""
    (old,), (longer,) = of(found, "classic", "nanoGPT"), of(found, "classic", "ours, longer")
    ours = of(found, "classic", "ours")
    target = old["curve"][-1]["nats"]
    there = characters_to(old["curve"], target)
    fewer = [there / characters_to(one["curve"], target) for one in ours]  # 0 where it was never reached
    cheaper = [ratio * old["flops_per_character"] / ours[0]["flops_per_character"] for ratio in fewer]
    rows = [
        number("nanoGPT's recipe", old["nats"], "nats", f"{old['curve'][-1]['step']:,} updates of 12 windows; one seed"),
        number("ours", mean_of_seeds([one["nats"] for one in ours]), "nats",
               f"{ours[0]['curve'][-1]['step']:,} updates of 24 windows; three seeds"),
        number("ours, longer", longer["nats"], "nats", f"{longer['curve'][-1]['step']:,} updates; one seed"),
        number("ours, longer, minus nanoGPT's", longer["nats"] - old["nats"], "nats"),
        number("characters to the loss of nanoGPT's, its own / ours", mean_of_seeds(fewer), "times", "over our seeds"),
        number("arithmetic to the loss of nanoGPT's, its own / ours", mean_of_seeds(cheaper), "times", "over our seeds"),
    ]  # fmt: skip
    for name in classic.WITHOUT:
        (one,) = of(found, "classic", name)
        note = f"{one['nats'] - ours[0]['nats']:+.3f} to ours of the same seed"
        rows.append(number(f"ours, but {name}", one["nats"], "nats", note))
    lines = {"nanoGPT's recipe": old, "ours": ours[0], "ours, longer": longer}
    for_plot = {name: [p for p in one["curve"] if p["step"]] for name, one in lines.items()}
    figure = curves(
        {name: [p["characters"] / 1e6 for p in points] for name, points in for_plot.items()},
        {name: [p["nats"] for p in points] for name, points in for_plot.items()},
        title="Shakespeare by characters: held-out loss against text read", xlabel="million characters read",
        ylabel="nats per character", level=("nanoGPT's recipe at its end", target),
    )  # fmt: skip
    caption = "The same held-out windows scored. A character costs about as much arithmetic in both."
    text = "Today's recipe reaches the loss of nanoGPT's after fewer characters"
    cost = {"updates": ours[0]["curve"][-1]["step"], "seeds": len(ours)}
    said = [claim(text, mean_of_seeds(fewer), 1.0, unit="times fewer", cost=cost)] if scale >= 1 else []
    return said, rows, [save(figure, place("classic.png"), caption=caption)]


def characters_to(curve: list[Mapping[str, float]], nats: float) -> float:
    """Characters after which a curve first reaches this loss, a straight line between looks; infinite if it never does."""
    for before, after in itertools.pairwise(curve):
        if after["nats"] <= nats:
            share = (before["nats"] - nats) / (before["nats"] - after["nats"])
            return before["characters"] + share * (after["characters"] - before["characters"])
    return float("inf")


def law_report(found: Answers, place: Callable[[str], Path]) -> tuple[list[dict], list[dict]]:
    """(rows, figures)."""
    sizes = {
        width: scaling.hidden_parameters(scaling.shape(width, len(text().alphabet)))
        for width in (*scaling.WIDTHS, scaling.ASKED)
    }
    losses = {width: mean_of_seeds(of(found, "law", str(width))) for width in sizes}
    laws = [
        scaling.fit_power_law(
            [sizes[w] for w in scaling.WIDTHS], [of(found, "law", str(w))[seed] for w in scaling.WIDTHS]
        )
        for seed in range(len(SEEDS))
    ]
    predicted = mean_of_seeds([law(sizes[scaling.ASKED]) for law in laws])
    measured = losses[scaling.ASKED]
    rows = [
        number(
            "scaling: exponent",
            mean_of_seeds([law.b for law in laws]),
            "",
            f"four sizes, {sizes[16]:,} to {sizes[48]:,}",
        ),
        number("scaling: predicted for the fifth", predicted, "nats", f"{sizes[scaling.ASKED]:,} parameters"),
        number("scaling: measured, not in the fit", measured, "nats", f"off by {measured.mean - predicted.mean:+.3f}"),
        number("scaling: no change, the control", losses[scaling.WIDTHS[-1]], "nats", "loss of the largest fitted"),
    ]
    law = scaling.fit_power_law([sizes[w] for w in scaling.WIDTHS], [losses[w].mean for w in scaling.WIDTHS])
    figure = curves(
        {"fitted": [sizes[w] for w in scaling.WIDTHS], "asked": [sizes[scaling.ASKED]], "the law": list(sizes.values())},
        {"fitted": [losses[w] for w in scaling.WIDTHS], "asked": [measured], "the law": [law(n) for n in sizes.values()]},
        title="Loss against size, equal data", xlabel="parameters without the embedding", ylabel="nats per character",
        logarithmic="xy",
    )  # fmt: skip
    caption = "The law knows the four small sizes; the fifth is not in the fit. Intervals over three seeds."
    return rows, [save(figure, place("scaling.png"), caption=caption)]


def noise_report(found: Answers, place: Callable[[str], Path]) -> tuple[list[dict], list[dict]]:
    """(rows, figures)."""
    cells = {(rate, rows): of(found, "noise", f"{rate:g} x {rows}") for rate in RATES for rows in ROWS}
    table = [
        number(f"rate {rate:g}, {rows} rows", mean_of_seeds(values), "nats", "equal characters, three seeds")
        for (rate, rows), values in cells.items()
    ]
    spread = float(np.mean([np.std(values, ddof=1) for values in cells.values()]))
    table.append(number("standard deviation over seeds", spread, "nats", "mean over the cells above"))
    shown = {f"{rows} rows": [float(np.mean(cells[rate, rows])) for rate in RATES] for rows in ROWS}
    highest = max(max(values) for values in shown.values())
    figure = grid(shown, [f"{r:g}" for r in RATES], title="Held-out nats at equal characters", xlabel="learning rate",
                  limit=highest + 0.01)  # fmt: skip
    return table, [
        save(figure, place("noise.png"), caption=f"Means of three seeds; seeds differ by {spread:.3f} nats.")
    ]


def ability_report(found: Answers) -> list[dict]:
    """Rows."""
    rows = []
    for name in abilities.OBJECTIVES:
        runs = of(found, "abilities", name)
        for ability in ("continue_text", "fill_in", "fill_in_by_trying"):
            values = [np.mean([run[ability][i] for run in runs]) for i in range(len(runs[0][ability] or ()))]
            if values:
                said = ability.replace("_", " ")
                rows.append(
                    number(
                        f"{name}: {said}",
                        mean_ci(values),
                        "nats",
                        f"over windows; {runs[0]['targets']:,} targets in training",
                    )
                )
    return rows


def leak_report(found: Answers, place: Callable[[str], Path]) -> tuple[list[dict], list[dict]]:
    """(rows, figures)."""
    clean, leaked = of(found, "leak", "clean"), of(found, "leak", "leaked")
    rows = [
        number(f"{what} text, {name}", mean_of_seeds([run[what][-1] for run in runs]), "nats", "two seeds")
        for what in ("tested", "fresh", "trained") for name, runs in (("clean", clean), ("leaked", leaked))
    ]  # fmt: skip
    lines = {"trained": clean[0]["trained"], "fresh": clean[0]["fresh"], "tested, clean": clean[0]["tested"],
             "tested, leaked": leaked[0]["tested"], "fresh, leaked": leaked[0]["fresh"]}  # fmt: skip
    figure = curves(clean[0]["updates"], lines, title="Sixty thousand characters, again and again", xlabel="updates",
                    ylabel="nats per character")  # fmt: skip
    caption = "One seed. Leaked: a third of the training text is the tested one; clean: as much of another play."
    return rows, [save(figure, place("leak.png"), caption=caption)]


def range_report(found: Answers, place: Callable[[str], Path]) -> list[dict]:
    """Figures."""
    runs = {}
    for name in ("adamw", "muon"):
        rates, losses = of(found, "range", name)[0]
        end = next((i for i, loss in enumerate(losses) if loss > 1.5 * losses[0]), len(losses))  # broken from there on
        runs[name] = rates[:end], losses[:end]
    figure = curves(
        {name: rates for name, (rates, _) in runs.items()}, {name: losses for name, (_, losses) in runs.items()},
        title="Learning-rate range test", xlabel="learning rate", ylabel="training loss, nats", logarithmic="x",
    )  # fmt: skip
    return [
        save(
            figure,
            place("range.png"),
            caption="One update at each rate, no clipping. Lines end where the loss is half again the first.",
        )
    ]


def equal_tokens_report(found: Answers, trainer: Trainer, data: BaseData, tokenizer: BPETokenizer) -> list[dict]:
    """Rows: the base model on its way, an LSTM and the counts, each after the same number of tokens."""
    (recurrent,) = of(found, "lstm", "lstm")
    first = trainer.evaluations[1]
    tokens = int(sum(row["targets"] for row in trainer.history[: first["step"]]))
    counted = curve_point(
        ngram_of(data.ids[:tokens], tokenizer.specials[END_OF_TEXT], tokenizer.vocab_size), tokenizer, data.looks
    )
    rows = []
    for look in ("plays, held out", "arithmetic, held out"):
        for name, value, note in (
            ("base model on its way", first[look], "at its full rate, not yet annealed"),
            ("LSTM", recurrent["bits_per_byte"][look], f"{recurrent['parameters']:,} parameters, annealed"),
            ("5-gram", counted[look], "counts"),
        ):
            rows.append(number(f"early, {look}: {name}", value, "bits per byte", f"after {tokens:,} tokens; {note}"))
    return rows


def report(
    found: Answers,
    place: Callable[[str], Path],
    trainer: Trainer,
    data: BaseData,
    tokenizer: BPETokenizer,
    scale: float,
) -> tuple[list[dict], list[dict], list[dict]]:
    """(claims, rows, figures) of everything. Shortened studies claim nothing."""
    rows, figures = equal_tokens_report(found, trainer, data, tokenizer), []
    claims, more, shown = classic_report(found, place, scale)
    parts = [
        law_report(found, place),
        noise_report(found, place),
        (ability_report(found), []),
        leak_report(found, place),
    ]
    for some_rows, some_figures in [(more, shown), *parts, ([], range_report(found, place))]:
        rows, figures = rows + some_rows, figures + some_figures
    return claims, rows, figures
