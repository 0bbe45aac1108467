"""Trainings of one recipe: the table, the curves, and what counts as a departure. The trainings themselves are committed."""

import pytest

from common.data.arithmetic import drill_documents
from common.foundation import trainings
from common.studies import base
from common.studies.trainings import figure


def record(recipe, seed, format, sums):
    return {
        "recipe": recipe, "seed": seed, "format": format,
        "right": {"sums of 3": sums}, "bits per byte": {"plays": 2.2},
        "drills": [[0.0, 0.0, 0.1], [0.5, sums, sums], [1.0, 1.0, 1.0]],
    }  # fmt: skip


RECORDS = [
    record(recipe, seed, "float32", sums)
    for recipe, all_sums in (("uniform drills", (0.0, 0.9, 0.4)), ("skewed drills", (0.95, 0.97, 0.99)))
    for seed, sums in enumerate(all_sums)
]


def test_the_table_has_the_spread_of_each_recipe():
    assert trainings.table(RECORDS).splitlines()[2:] == [
        "| half of the held-out additions right, share of the training | 0.833 [0.500, 1.000] | 0.500 [0.500, 0.500] |",
        "| sums of 3, unseen: right answers | 0.433 [0.000, 0.900] | 0.970 [0.950, 0.990] |",
        "| plays, test: base model | 2.200 [2.200, 2.200] | 2.200 [2.200, 2.200] |",
    ]


def test_a_training_that_could_not_add_is_a_departure():
    known = trainings.of(RECORDS, "skewed drills")
    (said,) = trainings.departures({"sums of 3, unseen: right answers": 0.03}, known)
    assert said == "sums of 3, unseen: right answers: 0.030, published 0.970 [0.950, 0.990]"
    assert not trainings.departures({"sums of 3, unseen: right answers": 0.96, "another row": 7.0}, known)


def test_the_transition_is_where_half_is_right_for_the_first_time():
    assert trainings.transition(RECORDS[1]) == 0.5
    assert trainings.transition(RECORDS[2]) == 1.0
    assert trainings.transition({"drills": [[0.0, 0.0, 0.0]]}) is None


def test_records_are_kept_in_one_order_and_the_figure_has_a_line_for_each(tmp_path):
    path = tmp_path / "trainings.json"
    with pytest.raises(FileNotFoundError, match="trainings --write"):
        trainings.read(path)
    trainings.write(RECORDS[::-1], path)
    assert sorted(trainings.read(path), key=trainings.key) == sorted(RECORDS, key=trainings.key)
    assert trainings.read(path)[0]["recipe"] == base.RECIPE_NAME  # whose spread stands beside the year's numbers
    assert len(figure(RECORDS).axes[0].get_lines()) == len(RECORDS)


def test_held_out_drills_are_in_no_drill_of_either_recipe():
    asked = {line for document in base.held_out_drills() for line in document.text.splitlines()}
    for recipe in base.RECIPES.values():
        documents = drill_documents(2000, 0, skewed=recipe.skewed)
        assert not asked & {line for document in documents for line in document.text.splitlines()}
