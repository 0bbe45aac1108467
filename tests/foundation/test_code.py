from common.foundation.code import _parse, code_hashes
from common.foundation.months import ROOT


def test_closure_follows_imports():
    hashes = code_hashes(ROOT / "01_spine" / "run.py")
    assert "run.py" in hashes
    assert "common.model.ngram" in hashes
    assert "common.data.split" in hashes, "reached through corpora only"
    assert not any("diagnostics" in name or name == "common.cli" for name in hashes), "what a run does not use"


def test_imports_inside_functions_and_packages_count(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from common.training.loss import bits\n    return bits\n")
    assert {"common.training.loss", "common.training", "common"} <= set(code_hashes(path))


def parsed(tmp_path, text):
    path = tmp_path / f"{abs(hash(text))}.py"
    path.write_text(text)
    return _parse(path)[0]


def test_comments_and_docstrings_do_not_count_but_code_does(tmp_path):
    first = parsed(tmp_path, '"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n')
    assert parsed(tmp_path, "def f(x):\n    return x + 1\n") == first
    assert parsed(tmp_path, "def f(x):\n    return x + 2\n") != first
