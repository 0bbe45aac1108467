"""Probes of what a run leaves behind: files, resumed work, status."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from common.diagnostics.core import Reading, probe


@probe("truncation", "is a file that was cut off ever read as a whole one?")
def truncation(save: Callable, load: Callable) -> Reading:
    """Cut the saved file at eight places and flip one byte in the middle: every load must raise."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        save(path)
        whole = path.read_bytes()
        load(path)  # healthy content must load
        middle = len(whole) // 2
        damaged = [whole[: len(whole) * part // 8] for part in range(8)]
        damaged.append(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        accepted = 0
        for content in damaged:
            path.write_bytes(content)
            try:
                load(path)
                accepted += 1
            except Exception:
                continue
        return Reading(accepted, 0.0, f"of {len(damaged)} damaged files were read without an error")


@probe("resume-equals-fresh", "does work left by another run leak into this one?")
def resume_equals_fresh(experiment: Callable) -> Reading:
    """Run setting 1 after setting 0 was left in the same folder, half done and done: same as fresh, or refused.

    Then the same setting interrupted and resumed: same as undisturbed.
    """
    differences = []
    with tempfile.TemporaryDirectory() as root:

        def in_folder(name: str, setting: int, interrupt: bool = False) -> object:
            folder = Path(root) / name
            folder.mkdir(exist_ok=True)
            return experiment(folder, setting, interrupt)

        fresh = in_folder("fresh", 1)
        for name, interrupt in (("half", True), ("done", False)):
            in_folder(name, 0, interrupt)
            try:
                found = in_folder(name, 1)
            except ValueError:  # a refusal is a right answer
                continue
            differences.append(float(found != fresh))
        in_folder("same", 1, interrupt=True)
        differences.append(float(in_folder("same", 1) != fresh))
    return Reading(sum(differences), 0.0, "resumed results that differ from a fresh one")


@probe("crash-status", "does a run that crashed look finished?")
def crash_status(run_status: Callable) -> Reading:
    """A body that raises must not leave "finished"; a body that ends well must."""

    def crash() -> None:
        raise RuntimeError("deliberate")

    wrong = float(run_status(crash) == "finished") + float(run_status(lambda: None) != "finished")
    return Reading(wrong, 0.0, "runs with the wrong status")
