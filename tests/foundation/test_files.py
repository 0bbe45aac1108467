import json
import os

import pytest

from common.foundation.files import (
    append_json_line,
    atomic_path,
    canonical_json,
    read_json,
    read_json_lines,
    set_aside,
    write_json,
)


def test_atomic_write_leaves_the_old_file_when_the_block_raises(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"], "no temporary file stays behind"


def test_reader_of_an_atomic_file_never_sees_the_temporary_one(tmp_path):
    path = tmp_path / "a.json"
    with atomic_path(path) as temporary:
        temporary.write_text("{}")
        assert not path.exists()
    assert path.exists()


def test_canonical_json_does_not_depend_on_order():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1})


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_damaged_json_names_file_and_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1,\n"b": }')
    with pytest.raises(ValueError, match=r"a\.json, line 2"):
        read_json(path)


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_unfinished_last_line_is_an_error_or_is_repaired(tmp_path, cut):
    path = tmp_path / "t.jsonl"
    append_json_line(path, {"n": 1}, {"n": 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    if cut in (8,):  # cut exactly at a line end: a whole file with one line
        assert read_json_lines(path) == [{"n": 1}]
        return
    with pytest.raises(ValueError, match="cut off or altered"):
        read_json_lines(path)
    kept = read_json_lines(path, repair=True)
    assert kept == ([{"n": 1}] if cut < 8 else [])
    append_json_line(path, {"n": 3})
    assert read_json_lines(path) == [*kept, {"n": 3}]


def test_damage_in_the_middle_is_never_repaired(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_json_lines(path, repair=True)
    assert path.read_text().count("\n") == 3


def test_set_aside_never_overwrites(tmp_path):
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "x").write_text(str(number))
        set_aside(tmp_path / "run")
    assert (tmp_path / "run.1" / "x").read_text() == "1"
    assert (tmp_path / "run.2" / "x").read_text() == "2"


def test_json_lines_round_trip_unicode(tmp_path):
    append_json_line(tmp_path / "t", {"text": "né\u2028 日本"})
    assert read_json_lines(tmp_path / "t") == [{"text": "né\u2028 日本"}]
    assert json.loads((tmp_path / "t").read_bytes())
