"""Every probe, in the order of the kill matrix: for each month first what everybody looks at, then what finds the bug."""

from common.diagnostics.core import Probe
from common.diagnostics.probes import harness, models, modules, records, samplers, texts, tokens

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
    tokens.shapes_and_ranges,
    tokens.round_trip,
    tokens.reference_ids,
    tokens.reload,
    tokens.injection,
    tokens.byte_lengths,
    tokens.one_opening,
    tokens.stored_ids,
    tokens.pair_coverage,
    tokens.ranks_partition,
    tokens.epochs_differ,
    tokens.exact_resume,
    tokens.document_isolation,
    tokens.token_ledger,
    tokens.item_identity,
    tokens.labels_stay,
    modules.loss_at_init,
    modules.overfit_one_batch,
    modules.entropy_floor,
    modules.parameters_move,
    modules.past_matters,
    modules.padding_invariance,
    modules.poisoned_padding,
    modules.documents_apart,
    modules.cached_equals_uncached,
    modules.cache_overflow,
    modules.rows_sum_to_one,
    modules.mass_on_the_future,
    modules.attend_parity,
    modules.layer_parity,
    modules.rotation,
    modules.parameter_count_agrees,
    modules.weights_survive,
    modules.gradient_by_depth,
)


def by_name(name: str) -> Probe:
    for candidate in ALL:
        if candidate.name == name:
            return candidate
    raise ValueError(f"probe {name!r} is unknown; there are {', '.join(p.name for p in ALL)}")
