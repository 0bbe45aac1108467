import pytest

from common.foundation.compare import compare, compare_manifests


def manifest(**changes):
    base = {
        "month": "01_spine",
        "tokenizer": "t",
        "code": {"common.evaluation.task": "e", "common.model.ngram": "m", "common.data.split": "d", "run.py": "r"},
        "inputs": {"shakespeare": "s"},
        "packages": {"torch": "2.13.0"},
        "identity": {"model": {"text": "w"}, "measurement": {"rule": "whole", "unit": "bits"}},
    }
    for path, value in changes.items():
        place = base
        *parents, last = path.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return base


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "same"),
        ({"identity__model__text": "v"}, "model"),
        ({"tokenizer": "u"}, "model"),
        ({"identity__measurement__rule": "last_digit"}, "measurement"),
        ({"code__common.evaluation.task": "f"}, "measurement"),
        ({"code__common.training.loss": "new"}, "measurement"),
        ({"code__common.foundation.statistics": "new"}, "measurement"),
        ({"code__common.model.ngram": "n"}, "model"),
        ({"code__common.reasoning.strategies": "new"}, "model"),
        ({"code__common.data.split": "n"}, "unclear"),
        ({"code__run.py": "n"}, "unclear"),
        ({"inputs__shakespeare": "other"}, "unclear"),
        ({"packages__torch": "2.14.0"}, "unclear"),
        ({"tokenizer": "u", "identity__measurement__unit": "nats"}, "both"),
    ],
)
def test_verdict(changes, verdict):
    found = compare_manifests(manifest(), manifest(**changes))
    assert found.verdict == verdict
    assert str(found)


def test_a_key_that_only_one_has_is_a_difference():
    longer = manifest()
    longer["identity"]["measurement"]["n"] = 5
    assert compare_manifests(manifest(), longer).measurement == {"n": (None, 5)}
    assert compare_manifests(longer, manifest()).measurement == {"n": (5, None)}


def test_only_finished_runs_are_compared(tmp_path):
    with pytest.raises(ValueError, match="not a finished run"):
        compare(tmp_path, tmp_path)


def test_months_cannot_be_mixed():
    with pytest.raises(ValueError, match="different months"):
        compare_manifests(manifest(), manifest(month="02_tokenization"))
