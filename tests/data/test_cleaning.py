"""The cleaning stages, with planted rubbish; MinHash against datasketch."""

import numpy as np
import pytest
from datasketch import MinHash as Reference
from hypothesis import example, given
from hypothesis import strategies as st

from common.data.cleaning import (
    MinHash,
    bands_for,
    decontaminate,
    exact_duplicates,
    filter_documents,
    mixture,
    near_duplicates,
    normalise,
    normalise_text,
    recall_of,
    shingles,
    similarity,
    size_of,
    why_not,
)
from common.data.documents import Document

PROSE = "The harbour was quiet that morning, and the boats lay still on the water. Nobody had come back from the sea. "


def document(name, text):
    return Document(name, "g", text)


def prose(seed, sentences=12):
    rng = np.random.default_rng(seed)
    words = [
        "river",
        "stone",
        "winter",
        "letter",
        "garden",
        "window",
        "silver",
        "morning",
        "shadow",
        "market",
        "bridge",
    ]
    return " ".join(" ".join(rng.choice(words, 9)).capitalize() + "." for _ in range(sentences))


@example("e\x00\u0301")
@example("page one\x0cpage two\x85three\x0bfour")
@given(st.text(max_size=80))
def test_normal_form_is_stable_and_keeps_letters(text):
    once = normalise_text(text)
    assert normalise_text(once) == once
    assert "\r" not in once
    assert not any(line != line.rstrip() for line in once.split("\n"))


def test_normalise_glues_no_words_and_takes_linear_time():
    assert normalise_text("one\x0ctwo\x85three\x0bfour") == "one\ntwo\nthree\nfour"
    assert normalise_text("e\x00\u0301") == "é"
    assert len(normalise_text("a" + " " * 300_000 + "x")) == 300_002  # seconds, not minutes


def test_documents_are_judged_one_by_one_whatever_their_names():
    kept, _ = filter_documents([document("a", "bad"), document("a", PROSE * 3)])
    assert [d.text for d in kept] == [PROSE * 3]
    kept, _ = exact_duplicates([document("a", "😀"), document("b", "!!")])
    assert len(kept) == 2


def test_normalise_reports_and_drops_the_empty():
    kept, report = normalise([document("a", "cafe\u0301\r\n"), document("b", " \n\t")])
    assert [d.text for d in kept] == ["café"]
    assert (report.documents_in, report.documents_out) == (2, 1)
    assert report.bytes_out == 5


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("too short", "words"),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f.", "mean word length"),
        (
            "price 12345 % $ # @ ! 67890 & * ( 4711 ) = + 12 34 56 78 90 word word word word word word word. " * 3,
            "share of letters",
        ),
        ("\n".join(["Click here to continue reading this page."] * 12), "share of repeated lines"),
        ("\n".join(f"menu entry number {w} and more" for w in "abcdefghijkl"), "share of lines that end a sentence"),
    ],
)
def test_each_rule_removes_what_it_is_for(text, rule):
    assert why_not(text).startswith(rule)
    kept, report = filter_documents([document("bad", text), document("good", PROSE * 3)])
    assert [d.name for d in kept] == ["good"]
    assert report.examples[0][0] == "bad"
    assert rule in report.examples[0][1]


def test_exact_duplicates_ignore_case_and_punctuation_and_keep_the_first():
    kept, report = exact_duplicates([document("a", "One, two!"), document("b", "one two"), document("c", "two one")])
    assert [d.name for d in kept] == ["a", "c"]
    assert report.examples == [("b", "same words as a")]


def test_estimated_similarity_is_that_of_the_reference_and_near_the_truth():
    ours = MinHash(permutations=512)
    for overlap in (0.1, 0.4, 0.8):
        base = {(f"w{i}",) for i in range(400)}
        other = {(f"w{i}",) for i in range(int(400 * (1 - overlap)), int(400 * (1 - overlap)) + 400)}
        truth = len(base & other) / len(base | other)
        estimates = similarity(ours.signature(base), ours.signature(other))
        references = [Reference(num_perm=512) for _ in range(2)]
        for reference, items in zip(references, (base, other), strict=True):
            for item in items:
                reference.update(item[0].encode())
        assert estimates == pytest.approx(truth, abs=0.1)
        assert estimates == pytest.approx(references[0].jaccard(references[1]), abs=0.12)


def test_near_duplicates_are_found_and_others_kept():
    base = prose(0, 40)
    changed = base.replace("river", "brook", 3)
    documents = [
        document("a", base),
        document("b", prose(1, 40)),
        document("a2", changed),
        document("a3", base + " The end."),
    ]
    kept, report = near_duplicates(documents)
    assert [d.name for d in kept] == ["a", "b"]
    assert "those of a" in report.examples[0][1]
    shared = len(shingles(base) & shingles(changed)) / len(shingles(base) | shingles(changed))
    assert near_duplicates(documents[:3], threshold=min(1.0, shared + 0.01))[1].documents_out == 3


def test_a_candidate_below_the_threshold_is_kept():
    """Four hashes make nearly every pair a candidate; only the shingles themselves decide."""
    half = document("half", prose(0, 40)[:1400] + prose(2, 40)[:700])
    documents = [document("a", prose(0, 40)[:2100]), half]
    shared = len(shingles(documents[0].text) & shingles(half.text)) / len(
        shingles(documents[0].text) | shingles(half.text)
    )
    assert 0.4 < shared < 0.6
    kept = [near_duplicates(documents, threshold=0.7, permutations=4, seed=seed)[1].documents_out for seed in range(6)]
    assert kept == [2] * 6


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_banding_finds_pairs_at_the_threshold(threshold):
    bands, rows = bands_for(threshold, 128)
    assert bands * rows <= 128
    assert recall_of(bands, rows, threshold) >= 0.95
    rng = np.random.default_rng(0)
    agree = rng.random((4000, bands, rows)) < threshold  # places of two signatures that agree
    assert agree.all(axis=2).any(axis=1).mean() == pytest.approx(recall_of(bands, rows, threshold), abs=0.02)
    with pytest.raises(ValueError, match="above 0"):
        bands_for(0.0, 128)


def test_decontamination_finds_long_runs_and_whole_short_texts():
    test_text = "to be or not to be that is the question whether it is nobler"
    documents = [
        document("quote", f"He said: To be, or not to be, that is the question! {PROSE}"),
        document("few", f"To be or not. {PROSE}"),
        document("sum", "We know that 47 + 38 is a sum."),
        document("clean", PROSE),
    ]
    kept, report = decontaminate(documents, [test_text, "47+38"])
    assert [d.name for d in kept] == ["few", "clean"]
    assert len(report.examples) == 2
    assert report.examples[0] == ("quote", "contains 'be or not to be that is the'"), (
        "the smallest run, in every process"
    )


def test_mixture_keeps_its_shares_and_says_what_it_repeated():
    sources = {
        "big": [document(f"b{i}", "x" * 100) for i in range(100)],
        "small": [document(f"s{i}", "y" * 50) for i in range(20)],
    }
    mixed, report = mixture(sources, {"big": 3, "small": 1}, bytes_in_all=8000)
    assert size_of(mixed) == pytest.approx(8000, abs=150)
    assert report["big"]["share"] == pytest.approx(0.75, abs=0.02)
    assert report["small"]["passes"] == pytest.approx(2.0, abs=0.1)
    assert mixture(sources, {"big": 3, "small": 1}, bytes_in_all=8000)[0] == mixed
    with pytest.raises(ValueError, match="weights"):
        mixture(sources, {"big": 1}, bytes_in_all=10)
    with pytest.raises(ValueError, match="no text"):
        mixture({"empty": []}, {"empty": 1}, bytes_in_all=10)
