"""Every probe, in the order of the kill matrix: first what everybody looks at, then what finds the bug."""

from common.diagnostics.core import Probe
from common.diagnostics.probes import harness, models, records, samplers, texts

ALL: tuple[Probe, ...] = (
    texts.beats_unigram,
    samplers.samples_look_right,
    models.repeatable,
    models.future_perturbation,
    models.cross_row,
    texts.known_source,
    texts.uniform_model,
    texts.batch_composition,
    texts.own_text,
    texts.overlap,
    samplers.seed_determinism,
    samplers.batch_independence,
    samplers.distinct_samples,
    harness.oracle_solver,
    harness.answer_attacks,
    records.truncation,
    records.resume_equals_fresh,
    records.crash_status,
)


def by_name(name: str) -> Probe:
    for candidate in ALL:
        if candidate.name == name:
            return candidate
    raise ValueError(f"probe {name!r} is unknown; there are {', '.join(p.name for p in ALL)}")
