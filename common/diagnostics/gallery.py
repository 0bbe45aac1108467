"""The kill matrix: every failure against every probe that applies, measured.

A row of `gallery.csv` is one (failure, probe) pair. The verdicts: `caught` and `silent` for broken code, `pass` and
`false alarm` for healthy code (rows named healthy/<month>). A probe that does not apply to a specimen has no row.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.diagnostics.core import Failure, Probe, opened
from common.diagnostics.probes import ALL
from common.foundation.files import atomic_path
from common.foundation.months import ROOT, Month, built_months, load

GALLERY = ROOT / "gallery.csv"
COLUMNS = ("failure", "month", "probe", "verdict", "value", "threshold", "cpu_seconds")


@dataclass(frozen=True)
class Cell:
    """One measured pair. `cpu_seconds` is what the probe costs on this specimen."""

    failure: str
    month: str
    probe: str
    verdict: str
    value: float
    threshold: float
    cpu_seconds: float
    note: str = ""


def failures_of(months: Iterable[Month]) -> list[Failure]:
    """The failures of these months, in order. Raises ValueError on a repeated id."""
    found = [
        failure
        for month in months
        if (ROOT / month.folder / "failures.py").exists()
        for failure in load(month.folder, "failures").FAILURES
    ]
    ids = [failure.id for failure in found]
    repeated = {name for name in ids if ids.count(name) > 1}
    if repeated:
        raise ValueError(f"failure ids must be unique; repeated: {sorted(repeated)}")
    return found


def kill_matrix(failures: Sequence[Failure], probes: Sequence[Probe] = ALL) -> list[Cell]:
    """Measure every probe on each distinct healthy specimen, then on the broken one of each failure."""
    cells = []
    healthy = {failure.healthy: failure for failure in failures}
    specimens = [(_healthy_name(f), f.month, f.healthy, True) for f in healthy.values()]
    specimens += [(failure.id, failure.month, failure.broken, False) for failure in failures]
    for name, month, make, is_healthy in tqdm(specimens, desc="gallery", unit="specimen", delay=5):
        with opened(make()) as specimen:
            for probe in probes:
                if not probe.applies_to(specimen):
                    continue
                reading, seconds = probe.examine(specimen)
                words = ("false alarm", "pass") if is_healthy else ("caught", "silent")
                verdict = words[0 if reading.caught else 1]
                cells.append(
                    Cell(name, month, probe.name, verdict, reading.value, reading.threshold, seconds, reading.note)
                )
    return cells


def _healthy_name(failure: Failure) -> str:
    """healthy/01_spine; a month with several healthy specimens adds the function's name."""
    name = failure.healthy.__name__
    return f"healthy/{failure.month}" if name == "healthy" else f"healthy/{failure.month}/{name}"


def problems_with(cells: Sequence[Cell], failures: Sequence[Failure]) -> list[str]:
    """What is wrong with a measured matrix: false alarms, bugs not caught as promised, blind spots that see."""
    verdicts = {(cell.failure, cell.probe): cell for cell in cells}
    wrong = [
        f"{c.failure}: healthy code raises an alarm in {c.probe} ({c.value:.4g} > {c.threshold:.4g}; {c.note})"
        for c in cells
        if c.verdict == "false alarm"
    ]
    for failure in failures:
        mine = {cell.probe: cell.verdict for cell in cells if cell.failure == failure.id}
        if failure.probe is None:
            wrong += [f"{failure.id}: said to survive, but {p} catches it" for p, v in mine.items() if v == "caught"]
        elif mine.get(failure.probe) != "caught":
            cell = verdicts.get((failure.id, failure.probe))
            seen = f"{cell.value:.4g} against {cell.threshold:.4g}" if cell else "which does not apply"
            wrong.append(f"{failure.id}: not caught by {failure.probe} ({seen})")
        wrong += [
            f"{failure.id}: {name} is called a blind spot but says {mine.get(name, 'nothing: it does not apply')}"
            for name in failure.blind_spots
            if mine.get(name) != "silent"
        ]
    return wrong


def to_csv(cells: Sequence[Cell]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in cells:
        values = asdict(cell)
        values.update(
            value=f"{cell.value:.4g}", threshold=f"{cell.threshold:.4g}", cpu_seconds=f"{cell.cpu_seconds:.2f}"
        )
        writer.writerow([values[column] for column in COLUMNS])
    return text.getvalue()


def write_csv(cells: Sequence[Cell], path: Path = GALLERY) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(to_csv(cells), encoding="utf-8", newline="\n")


def read_csv(path: Path = GALLERY) -> list[Cell]:
    """The committed matrix. Raises ValueError that names file and line where it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; measure it with: python -m common gallery --write")
    cells = []
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}, line 1: the columns must be {', '.join(COLUMNS)}")
        for row in rows:
            try:
                numbers = {name: float(row[name]) for name in ("value", "threshold", "cpu_seconds")}
                cells.append(Cell(**{**row, **numbers}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    return cells


def merged(measured: Sequence[Cell], path: Path = GALLERY) -> list[Cell]:
    """The committed matrix with the rows of the measured months replaced."""
    months = {cell.month for cell in measured}
    kept = [cell for cell in read_csv(path) if cell.month not in months] if path.exists() else []
    return sorted([*kept, *measured], key=lambda cell: cell.month)  # stable: the order within a month stays


def disagreements(measured: Sequence[Cell], committed: Sequence[Cell]) -> list[str]:
    """Pairs whose verdict differs, or that only one of the two matrices has. Values may differ in their digits."""
    months = {cell.month for cell in measured}
    now = {(cell.failure, cell.probe): cell.verdict for cell in measured}
    then = {(cell.failure, cell.probe): cell.verdict for cell in committed if cell.month in months}
    return [
        f"{failure} × {probe}: committed {then.get((failure, probe), 'nothing')}, "
        f"measured {now.get((failure, probe), 'nothing')}"
        for failure, probe in [*now, *(pair for pair in then if pair not in now)]
        if now.get((failure, probe)) != then.get((failure, probe))
    ]


def as_text(cells: Sequence[Cell], failures: Sequence[Failure]) -> str:
    """The matrix for a terminal: a row for each specimen, a column for each probe, and the CPU seconds of both."""
    names = list(dict.fromkeys(cell.failure for cell in cells))
    probes = list(dict.fromkeys(cell.probe for cell in cells))
    named = {failure.id: failure.probe for failure in failures}
    marks = {"caught": "x", "silent": ".", "pass": "-", "false alarm": "!"}
    table = {(cell.failure, cell.probe): cell for cell in cells}
    width = max(map(len, names))
    lines = [f"{' ' * width}  {' '.join(f'{i:>2}' for i in range(1, len(probes) + 1))}   seconds"]
    for name in names:
        row = [table.get((name, probe)) for probe in probes]
        shown = [
            "  " if cell is None else f"{'>' if named.get(name) == cell.probe else ' '}{marks[cell.verdict]}"
            for cell in row
        ]
        lines.append(f"{name:<{width}}  {' '.join(shown)}   {sum(c.cpu_seconds for c in row if c):7.2f}")
    lines.append("")
    for number, probe in enumerate(probes, 1):
        mine = [cell for cell in cells if cell.probe == probe]
        caught = sum(cell.verdict == "caught" for cell in mine)
        lines.append(
            f"{number:>2} {probe:<20} catches {caught:>2}, {sum(c.cpu_seconds for c in mine):6.2f} CPU seconds"
        )
    lines.append("x caught (>x by its named probe)   . silent   - healthy code passes   ! false alarm")
    return "\n".join(lines)


def measure(months: Sequence[Month] | None = None) -> tuple[list[Cell], list[Failure]]:
    """Run the gallery of these months (of all that are built), in one thread: the specimens are tiny."""
    failures = failures_of(built_months() if months is None else months)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return kill_matrix(failures), failures
    finally:
        torch.set_num_threads(threads)
