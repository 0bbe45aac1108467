import pytest

from common.foundation.compare import compare_manifests


def manifest(**changes):
    base = {
        "month": "01_spine",
        "tokenizer": "t",
        "code": {"evaluation": "e", "model": "m"},
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
        ({"code__evaluation": "f"}, "measurement"),
        ({"code__model": "n"}, "same"),
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


def test_months_cannot_be_mixed():
    with pytest.raises(ValueError, match="different months"):
        compare_manifests(manifest(), manifest(month="02_tokenization"))
