"""The twelve months, and how their folders are found and loaded.

A month folder starts with a digit, so it is not a package: its `run.py` and `failures.py` are loaded by path.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Month:
    number: int
    folder: str
    name: str
    title: str


MONTHS = (
    Month(1, "01_spine", "January", "Two models, one spine"),
    Month(2, "02_tokenization", "February", "Tokenization and data that don't lie"),
    Month(3, "03_attention", "March", "Attention: masks, shapes and order"),
    Month(4, "04_blocks", "April", "Transformer blocks: paths, norms, knobs"),
    Month(5, "05_pretraining", "May", "Pretraining with an honest loop"),
    Month(6, "06_baselines", "June", "Baselines: other people's weights"),
    Month(7, "07_classification", "July", "Fine-tuning to classify"),
    Month(8, "08_instruction", "August", "Fine-tuning to follow instructions"),
    Month(9, "09_evaluation", "September", "Evaluating reasoning"),
    Month(10, "10_scaling_one", "October", "Inference scaling I: sampling and voting"),
    Month(11, "11_scaling_two", "November", "Inference scaling II: scoring and refining"),
    Month(12, "12_rl_distill", "December", "Reinforcement learning and distillation"),
)


def month(which: int | str) -> Month:
    """Find a month by number, folder or the first digits of its folder (1, "1", "01", "01_spine").

    >>> month("01").folder
    '01_spine'
    """
    for candidate in MONTHS:
        if str(which) in (candidate.folder, f"{candidate.number:02d}", str(candidate.number)):
            return candidate
    raise ValueError(f"month {which!r} is unknown; choose 1 to 12 or one of {', '.join(m.folder for m in MONTHS)}")


def is_built(folder: str) -> bool:
    """True if the month has landed: its script is there."""
    return (ROOT / folder / "run.py").exists()


def built_months() -> list[Month]:
    return [candidate for candidate in MONTHS if is_built(candidate.folder)]


def load(folder: str, file: str) -> ModuleType:
    """Import `<folder>/<file>.py`. Raises ValueError if the month has not been built yet."""
    path = ROOT / month(folder).folder / f"{file}.py"
    if not path.exists():
        raise ValueError(
            f"{path.relative_to(ROOT)} does not exist: {month(folder).name} has not landed yet. "
            f"Built so far: {', '.join(m.folder for m in built_months())}."
        )
    name = f"month_{path.parent.name}_{file}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def months_in(text: str) -> list[Month]:
    """Parse a range such as "1-12", "3" or "1,4-6" into months, in order.

    >>> [m.number for m in months_in("1,4-6")]
    [1, 4, 5, 6]
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise ValueError(f"months {text!r}: {part!r} is not a month or a range such as 1-12") from None
        if not 1 <= low <= high <= 12:
            raise ValueError(f"months {text!r}: {part!r} is not within 1-12")
        numbers.update(range(low, high + 1))
    return [MONTHS[number - 1] for number in sorted(numbers)]
