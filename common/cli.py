"""The command line of the spine: `python -m common COMMAND`.

Torch is imported only by the commands that need it, so that the help answers at once.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import tyro

from common.cli_models import Positional, Size, chat, doctor, evaluate, finish, parity, sample
from common.foundation import months as calendar
from common.foundation import published
from common.foundation import trainings as records
from common.foundation.evidence import ClaimFailed

app = tyro.extras.SubcommandApp()


@app.command(name="year")
def year(size: Size = "small", months: str = "1-12") -> None:
    """Run the finished months in order and write runs/report.html.

    An unchanged month is skipped; a month that was killed is resumed. A month whose input cannot be fetched is named in
    the report, and the year goes on.
    """
    from common.foundation.assets import AssetUnavailable
    from common.foundation.report import write_report
    from common.foundation.run import announce, ensure, result

    wanted = calendar.months_in(months)
    done, notes = {}, {}
    for month in wanted:
        if not calendar.is_built(month.folder):
            continue
        announce(f"== {month.name}: {month.title}")
        try:
            with redirect_stdout(sys.stderr):
                done[month.folder] = result(ensure(month.folder, size))
        except AssetUnavailable as error:
            notes[month.folder] = str(error)
            announce(str(error))
    missing = [month.folder for month in wanted if not calendar.is_built(month.folder)]
    if missing:
        announce(f"not built yet: {', '.join(missing)}")
    report = write_report(size, notes)
    announce(f"report: {report}")
    compared, moved = against_published(done) if size == "small" else (0, [])
    if compared:
        announce(published.sentence(compared, moved))
    print(json.dumps({"size": size, "months": done, "skipped": notes, "report": str(report), "moved": len(moved)}))
    if notes:
        sys.exit(1)


def against_published(summaries: Mapping[str, Any]) -> tuple[int, list[published.Departure]]:
    """(numbers compared, those that are not where they were published) of these months at the size of the tables."""
    compared, moved = 0, []
    for folder, summary in summaries.items():
        spreads = {}
        if folder == "05_pretraining":
            from common.studies.base import RECIPE_NAME

            spreads = records.spreads(records.of(records.read(), RECIPE_NAME))
        count, found = published.departures(folder, summary, spreads=spreads)
        compared, moved = compared + count, moved + found
    return compared, moved


@app.command(name="month")
def month(number: Positional[int], size: Size = "small", force: bool = False, set: tuple[str, ...] = ()) -> None:
    """Run one month and print its summary as JSON.

    Args:
        number: 1 for January.
        size: the one dial.
        force: run again although nothing changed; the old run is set aside, not deleted.
        set: overrides of the month's config, such as `--set order=4 rule=last_digit`.
    """
    from common.foundation.report import show_value
    from common.foundation.run import announce, ensure, result

    folder = calendar.month(number).folder
    config = calendar.load(folder, "run").Config
    with redirect_stdout(sys.stderr):
        directory = ensure(folder, size, force=force, **overrides(config, set))
    found = result(directory)
    for row in found["numbers"]:
        announce(f"  {row['name']:<44} {show_value(row['value']):<24} {row['unit']}")
    announce(f"record and figures: {directory}")
    print(json.dumps(found))


def overrides(config: type, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Typed values of `field=value` texts. Raises ValueError that names the field or the value."""
    values = {}
    names = [field.name for field in dataclasses.fields(config) if field.name != "size"]
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--set {pair}: write field=value with one of {', '.join(names)}")
        values[name] = getattr(tyro.cli(config, args=[f"--{name.replace('_', '-')}", text]), name)
    return values


@app.command(name="gallery")
def gallery(months: Positional[str] = "1-12", write: bool = False, check: bool = False, json: bool = False) -> None:
    """Run the failure gallery: every bug against every probe that applies.

    Args:
        months: a month or a range, such as 01 or 1-3.
        write: replace the rows of these months in gallery.csv.
        check: fail if the measured verdicts are not the committed ones.
    """
    from common.diagnostics import gallery as rooms

    wanted = [month for month in calendar.months_in(months) if calendar.is_built(month.folder)]
    if not wanted:
        raise ValueError(f"months {months}: none of them has a gallery yet")
    measured, failures = rooms.measure(wanted)
    print(rooms.as_text(measured, failures))
    wrong = rooms.problems_with(measured, failures)
    if write:
        rooms.write_csv(rooms.merged(measured))
    if check:
        wrong += rooms.disagreements(measured, rooms.read_csv())
    print("\n".join(wrong) if wrong else f"{len(failures)} failures: each as its entry says; healthy code passes")
    finish({"failures": len(failures), "cells": len(measured), "problems": wrong}, json)
    if wrong:
        sys.exit(1)


@app.command(name="trainings")
def trainings(write: bool = False, check: bool = False, size: Size = "small", json: bool = False) -> None:
    """Train the base model with several seeds and number formats: how far apart do they end?

    Without an option the committed trainings are tabled.

    Args:
        write: train what 05_pretraining/trainings.json does not have yet; about eight minutes each on a core.
        check: train once, as the year does on this machine, and fail if a number leaves the spread of the committed ones.
    """
    from common.foundation.device import pick_device
    from common.foundation.plots import save
    from common.foundation.run import configure, ensure, runs_root
    from common.studies import base
    from common.studies.trainings import FORMATS, PICTURE, SEEDS, figure, measure

    config = configure(calendar.load("05_pretraining", "run"), size=size)
    known = records.read() if records.TRAININGS.exists() else []
    wrong = []
    if write or check:
        with redirect_stdout(sys.stderr):
            words = ensure("02_tokenization", size) / "tokenizer.json"
        given = {
            "tokenizer": str(words), "shape": dataclasses.asdict(config.shape()), "shares": base.shares_of(config),
            "bytes_in_all": round(1e6 * config.megabytes), "rows": config.rows, "questions": config.questions,
            "rates": {name: getattr(config, name) for name in ("optimizer", "learning_rate", "weight_decay")},
        }  # fmt: skip
        scratch = runs_root() / "05_pretraining" / "trainings"
    if write:

        def keep(record: records.Record) -> None:
            known.append(record)
            records.write(known)

        measure(list(base.RECIPES)[::-1], SEEDS, FORMATS, scratch, keep=keep, known=known, **given)
        save(figure(known), PICTURE, caption="")
    if check:
        format = str(pick_device().dtype).removeprefix("torch.")
        (fresh,) = measure([base.RECIPE_NAME], [config.seed], [format], scratch, **given)
        wrong = records.departures(records.numbers_of(fresh), records.of(known, base.RECIPE_NAME))
        print(
            "\n".join(wrong) if wrong else "the base model: every number within the spread of the committed trainings"
        )
    else:
        print(records.table(known))
    finish({"trainings": len(known), "problems": wrong}, json)
    if wrong:
        sys.exit(1)


@app.command(name="assets")
def assets(fetch: Positional[tuple[str, ...]] = (), all: bool = False, json: bool = False) -> None:
    """List the real inputs, or fetch some by name.

    Args:
        fetch: names of assets; none lists all.
        all: fetch everything that can be had from packages or the mirror.
    """
    from common.foundation import assets as store

    rows = {}
    if all:
        fetch = tuple(name for name, entry in store.catalogue().items() if entry.package)
    for name, entry in store.catalogue().items():
        path = store.asset(name) if name in fetch else None
        rows[name] = {"about": entry.about, "licence": entry.licence, "cached": store.is_cached(name)}
        if path or not fetch:
            print(f"{name:<16} {'here' if rows[name]['cached'] else 'not fetched':<12} {entry.about} ({entry.licence})")
    for name in fetch:
        store.find(name)
    finish(rows, json)


@app.command(name="report")
def report(size: Size = "small", readme: bool = False, json: bool = False) -> None:
    """Write runs/report.html from the finished runs.

    Args:
        readme: also write the numbers of these runs into the tables of the READMEs.
    """
    from common.foundation.readme import update_readmes
    from common.foundation.report import write_report

    path = write_report(size)
    changed = update_readmes(size) if readme else []
    print(path, *changed, sep="\n")
    finish({"report": str(path), "readmes": [str(one) for one in changed]}, json)


@app.command(name="reproduce")
def reproduce(run: Positional[Path | None] = None, json: bool = False) -> None:
    """Hold the finished months against the published numbers; or run a finished run again and compare it with itself.

    Args:
        run: a run directory, such as runs/01_spine/small-…; without one, the months of `make year` are compared with the
            numbers in the READMEs, and nothing is run.
    """
    from common.foundation.reproduce import reproduce as again
    from common.foundation.run import official, result

    if run is None:
        runs = {month.folder: official(month.folder, "small") for month in calendar.built_months()}
        compared, moved = against_published({folder: result(path) for folder, path in runs.items() if path})
        print(published.sentence(compared, moved))
        finish({"compared": compared, "moved": [str(one) for one in moved]}, json)
        if moved or not compared:
            sys.exit(1)
        return
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        outcome = again(run, Path(folder))
    print(outcome)
    finish(outcome.as_dict(), json)
    if not outcome.agrees:
        sys.exit(1)


@app.command(name="compare")
def compare(a: Positional[Path], b: Positional[Path], json: bool = False) -> None:
    """Two runs of a month: did the model change, or only the measurement?

    Args:
        a: a run directory, such as runs/01_spine/small-….
        b: another one.
    """
    from common.foundation.compare import compare as answer

    found = answer(a, b)
    print(found)
    finish({"verdict": found.verdict, **dataclasses.asdict(found)}, json)


for command in (sample, chat, parity, doctor, evaluate):
    app.command(name=command.__name__)(command)


def main() -> None:
    """Errors that a person can act on are one sentence, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # models write any character, also into a pipe
    try:
        app.cli(prog="python -m common", description="Foundations to Reasoning: one spine, twelve months.")
    except (ValueError, OSError, RuntimeError, ClaimFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
