"""GGUF files that are cut off, altered or made to deceive: one clear error, at once, and without memory."""

import struct

import gguf
import numpy as np
import pytest

import common.foundation.gguf_file
from common.foundation.gguf_file import GGUFFile
from common.pretrained.load import load_pretrained
from tests.pretrained.written import TEMPLATE, refused, theirs_of, tokenizer_of, write_gguf

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def string(text, length=None):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def pair(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def u32(key, value):
    return pair(key, U32, struct.pack("<I", value))


def array(key, inner, count, values=b""):
    return pair(key, ARRAY, struct.pack("<IQ", inner, count) + values)


def row(name, shape, offset=0, kind=0, dimensions=None):
    """Of the table of tensors; kind 0 is float32, `shape` in the order of the file."""
    count = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def gguf_bytes(pairs=(), rows=(), data=b"", *, magic=b"GGUF", version=3, tensors=None, entries=None, alignment=32):
    counts = len(rows) if tensors is None else tensors, len(pairs) if entries is None else entries
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *rows])
    return head + bytes(-len(head) % alignment) + data


def of(tmp_path, *args, **options):
    path = tmp_path / "made.gguf"
    path.write_bytes(gguf_bytes(*args, **options))
    return path


def test_what_is_made_here_can_be_read(tmp_path):
    pairs = [u32("a", 7), pair("b", STRING, string("né")), array("c", I32, 2, struct.pack("<2i", 1, -1))]
    rows = [row("x", [3, 2]), row("y", [1], 32)]
    found = GGUFFile(of(tmp_path, pairs, rows, struct.pack("<6f", *range(6)) + bytes(8) + struct.pack("<f", 9)))
    assert found.metadata == {"a": 7, "b": "né", "c": [1, -1]}
    assert found.array("x").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.array("y").tolist() == [9]


X, DATA = [row("x", [2])], bytes(8)
LIES = {
    "other magic": (gguf_bytes(magic=b"GGML"), "does not begin with 'GGUF'"),
    "version 0": (gguf_bytes(version=0), r"version 0; versions \(2, 3\) are known"),
    "version 1": (gguf_bytes(version=1), "version 1;"),
    "version 99": (gguf_bytes(version=99), "version 99;"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "too many tensors": (gguf_bytes(tensors=2**60), "it announces .* tensors, for which it has no room"),
    "most tensors": (gguf_bytes(tensors=2**64 - 1), "it announces .* tensors"),
    "one tensor more": (gguf_bytes(rows=X, tensors=2, data=DATA), "bytes are wanted|is empty|dimensions|no room"),
    "too many entries": (gguf_bytes(entries=2**60), "it announces .* metadata entries"),
    "one entry more": (gguf_bytes([u32("a", 7)], X, DATA, entries=2), ".*"),
    "long key": (gguf_bytes(pairs=[string("a", 2**60) + bytes(12)]), "1,152,921,504,606,846,976 bytes are wanted"),
    "longest key": (gguf_bytes(pairs=[string("a", 2**64 - 1) + bytes(12)]), "bytes are wanted"),
    "long text": (gguf_bytes(pairs=[pair("a", STRING, string("b", 2**62))]), "bytes are wanted"),
    "long array": (gguf_bytes(pairs=[array("a", I32, 2**60)]), "announces .* values of a"),
    "overflowing array": (gguf_bytes(pairs=[array("a", U64, 2**61)]), "announces .* values of a"),
    "long array of texts": (gguf_bytes(pairs=[array("a", STRING, 2**60)]), "announces .* values of a"),
    "array of arrays": (gguf_bytes(pairs=[array("a", ARRAY, 1, struct.pack("<IQ", U32, 0))]), "array of the unknown type 9"),
    "array of the unknown": (gguf_bytes(pairs=[array("a", 13, 1, bytes(8))]), "array of the unknown type 13"),
    "unknown type": (gguf_bytes(pairs=[pair("a", 13, bytes(8))]), "a has the unknown type 13"),
    "key twice": (gguf_bytes(pairs=[u32("a", 7), u32("a", 7)]), "the key 'a' occurs twice"),
    "key in no encoding": (gguf_bytes(pairs=[u32(b"\xff", 7)]), "utf-8"),
    "text in no encoding": (gguf_bytes(pairs=[pair("a", STRING, string(b"\xc3"))]), "utf-8"),
    "name in no encoding": (gguf_bytes(rows=[row(b"\xfe", [2])], data=DATA), "utf-8"),
    "tensor twice": (gguf_bytes(rows=X * 2, data=DATA), "the tensor 'x' occurs twice"),
    "same bytes": (gguf_bytes(rows=[*X, row("y", [2])], data=DATA), "x and y share bytes"),
    "overlap": (gguf_bytes(rows=[row("x", [9]), row("y", [2], 32)], data=bytes(64)), "x and y share bytes"),
    "no dimension": (gguf_bytes(rows=[row("x", [])], data=DATA), "x has 0 dimensions"),
    "five dimensions": (gguf_bytes(rows=[row("x", [1] * 5)], data=DATA), "x has 5 dimensions"),
    "many dimensions": (gguf_bytes(rows=[row("x", [1], dimensions=2**31)], data=DATA), "x has 2147483648 dimensions"),
    "empty": (gguf_bytes(rows=[row("x", [2, 0])], data=DATA), "x is empty"),
    "larger than the file": (gguf_bytes(rows=[row("x", [3])], data=DATA), "x .* ends at byte .* the file at"),
    "overflow to zero": (gguf_bytes(rows=[row("x", [2**32, 2**32])], data=DATA), "x .* ends at byte"),
    "overflow to 8 bytes": (gguf_bytes(rows=[row("x", [2**63 + 1, 2])], data=DATA), "x .* ends at byte"),
    "largest": (gguf_bytes(rows=[row("x", [2**64 - 1] * 4)], data=DATA), "x .* ends at byte"),
    "beyond the end": (gguf_bytes(rows=[row("x", [2], 32)], data=DATA), "x .* ends at byte"),
    "far beyond the end": (gguf_bytes(rows=[row("x", [2], 2**64 - 32)], data=DATA), "x .* ends at byte"),
    "not aligned": (gguf_bytes(rows=[row("x", [2], 4)], data=bytes(64)), "x begins at 4, which is no multiple"),
    "unknown format": (gguf_bytes(rows=[row("x", [2], kind=99)], data=DATA), "x is stored in the unknown format 99"),
    "format of the past": (gguf_bytes(rows=[row("x", [2], kind=4)], data=DATA), "x is stored in the unknown format 4"),
    "half a block": (gguf_bytes(rows=[row("x", [16], kind=8)], data=bytes(64)), "x has rows of 16, not a multiple of"),
    "alignment 0": (gguf_bytes(pairs=[u32("general.alignment", 0)], rows=X, data=DATA), "general.alignment is 0"),
    "alignment 3": (gguf_bytes(pairs=[u32("general.alignment", 3)], rows=X, data=DATA), "general.alignment is 3"),
    "alignment in words": (
        gguf_bytes(pairs=[pair("general.alignment", STRING, string("32"))], rows=X, data=DATA), "general.alignment is '32'"
    ),
    "alignment of a list": (
        gguf_bytes(pairs=[array("general.alignment", U32, 1, bytes(4))], rows=X, data=DATA), r"general.alignment is \[0\]"
    ),
    "huge alignment": (gguf_bytes(pairs=[u32("general.alignment", 2**31)], rows=X, data=DATA), "x .* ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies(lie, tmp_path):
    raw, message = LIES[lie]
    (tmp_path / "made.gguf").write_bytes(raw)
    refused(GGUFFile, tmp_path / "made.gguf", rf"cannot be read as GGUF: .*{message}")
    if lie != "other magic":
        refused(load_pretrained, tmp_path / "made.gguf", message)


def test_arrays_that_would_fill_the_memory(tmp_path, monkeypatch):
    """A list takes several times what it takes in the file; together they are limited."""
    monkeypatch.setattr(common.foundation.gguf_file, "MOST_VALUES", 1000)
    half = struct.pack("<600i", *range(600))
    assert len(GGUFFile(of(tmp_path, [array("a", I32, 600, half)])).metadata["a"]) == 600
    two = [array("a", I32, 600, half), array("b", STRING, 600, bytes(4800))]
    refused(GGUFFile, of(tmp_path, two), "its arrays, up to b, have 1,200 values; 1,000 are read")


def test_a_file_that_is_not_there(tmp_path):
    refused(GGUFFile, tmp_path / "a.gguf", "there is no file", FileNotFoundError)
    refused(load_pretrained, tmp_path / "a.gguf", "there is no", FileNotFoundError)
    refused(GGUFFile, tmp_path, "there is no file", FileNotFoundError)


# --- as models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, theirs_of("llama-tied"), tokenizer=tokenizer_of(), template=TEMPLATE)


@pytest.fixture
def changed(tiny, tmp_path):
    """A copy whose entries (key -> value, or ... for none) and tensors (name -> array, or ...) are others."""

    def copy(pairs, tensors):
        reader, path = gguf.GGUFReader(tiny), tmp_path / "changed.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        old = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        for key, value in (old | pairs).items():
            if value is ...:
                continue
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                kind = gguf.GGUFValueType.get_type(value)
                writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if isinstance(value, int) and 0 <= value < 2**32
                                     and kind != gguf.GGUFValueType.BOOL else kind)  # fmt: skip
        if pairs.get("general.architecture") is ...:
            del writer.kv_data[0]["general.architecture"]
        for name, value in ({tensor.name: tensor.data for tensor in reader.tensors} | tensors).items():
            if value is not ...:
                writer.add_tensor(name, np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return copy


def test_the_copy_is_read(changed):
    model, tokenizer, template = load_pretrained(changed({}, {}))
    assert model.config.layers == 2
    assert tokenizer.vocab_size == 262
    assert template == TEMPLATE


SIZES = ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "rope.dimension_count"]  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, 2**32 - 1, -1, 2.0, "2", True, [2, 2]])
def test_a_size_that_is_none(name, value, changed):
    refused(load_pretrained, changed({f"llama.{name}": value}, {}), rf"llama\.{name} is .*, not a whole number")


@pytest.mark.parametrize("name", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1", True])
def test_a_number_that_is_none(name, value, changed):
    refused(load_pretrained, changed({f"llama.{name}": value}, {}), rf"llama\.{name} is .*, not a number")


NORM, UP = "blk.1.ffn_norm.weight", "blk.1.ffn_up.weight"
ONES = np.ones((96, 64), dtype=np.float32)
ODD = {
    "no architecture": ({"general.architecture": ...}, {}, "general.architecture None is unknown"),
    "another architecture": ({"general.architecture": "bert"}, {}, "general.architecture 'bert' is unknown"),
    "a list of them": ({"general.architecture": ["llama"]}, {}, "general.architecture .* is unknown"),
    "no width": ({"llama.embedding_length": ...}, {}, "it has no llama.embedding_length"),
    "no layers": ({"llama.block_count": ...}, {}, "it has no llama.block_count"),
    "another layer": ({"llama.block_count": 3}, {}, r"missing blk\.2\."),
    "a layer less": ({"llama.block_count": 1}, {}, r"left over blk\.1\."),
    "another width": ({"llama.embedding_length": 128, "llama.rope.dimension_count": 32}, {}, "the config says"),
    "other heads": ({"llama.attention.head_count": 8}, {}, "rope.dimension_count: only whole heads"),
    "part of heads": ({"llama.rope.dimension_count": 8}, {}, "only whole heads can be turned"),
    "other scaling": ({"llama.rope.scaling.type": "yarn"}, {}, "rope.scaling.type 'yarn' is unknown"),
    "scaling of a list": ({"llama.rope.scaling.type": ["none"]}, {}, "rope.scaling.type is .*, not a str"),
    "scaling by zero": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, {}, "rope_factor"),
    "no embedding": ({}, {"token_embd.weight": ...}, "has no token_embd.weight"),
    "missing": ({}, {UP: ...}, f"missing {UP}"),
    "left over": ({}, {"rope_freqs.weight": ONES[0]}, r"left over rope_freqs\.weight"),
    "transposed": ({}, {UP: ONES.T}, rf"{UP} gives .* the shape \(64, 96\)"),
    "a row": ({}, {"token_embd.weight": ONES[0]}, "the model has rows for 64"),
    "whole numbers": ({}, {UP: ONES.astype(np.int8)}, f"{UP} is stored as I8, which cannot be read"),
    "not a number": ({}, {UP: ONES * np.nan}, f"{UP} holds infinities or NaN"),
    "infinite": ({}, {NORM: np.full(64, np.inf, dtype=np.float32)}, f"{NORM} holds infinities or NaN"),
    "template": ({"tokenizer.chat_template": 7}, {}, "tokenizer.chat_template is 7, not a text"),
    "tokenizer": ({"tokenizer.ggml.model": "llama"}, {}, "no readable tokenizer: its tokenizer is 'llama'"),
    "pattern": ({"tokenizer.ggml.pre": "viking"}, {}, "it cuts text as 'viking'"),
    "no tokens": ({"tokenizer.ggml.tokens": ...}, {}, r"no readable tokenizer: .*tokenizer\.ggml\.tokens"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, {}, "262 tokens have 2 types"),
    "merges": ({"tokenizer.ggml.merges": ["t h e"]}, {}, "no readable tokenizer"),
    "other merges": ({"tokenizer.ggml.merges": ["t x"]}, {}, "no readable tokenizer: merge 0"),
    "numbers for tokens": ({"tokenizer.ggml.tokens": list(range(262))}, {}, "no readable tokenizer"),
    "more tokens": ({"tokenizer.ggml.tokens": [*map(chr, range(300, 323))], "tokenizer.ggml.token_type": [1] * 23},
                    {}, "no readable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_a_file_that_is_no_model_of_ours(odd, changed):
    *changes, message = ODD[odd]
    refused(load_pretrained, changed(*changes), message)


def test_more_ids_than_rows(changed):
    tokens = gguf.GGUFReader(changed({}, {})).fields["tokenizer.ggml.tokens"].contents()
    more = [*tokens, *(f"<|{i}|>" for i in range(11))]
    types = [*[1] * 258, *[3] * 15]
    path = changed({"tokenizer.ggml.tokens": more, "tokenizer.ggml.token_type": types}, {})
    refused(load_pretrained, path, "makes 273 ids, the model has rows for 272")


@pytest.mark.parametrize("left", [0, 3, 4, 23, 24, 100, 5000, 0.5, -1])
def test_a_file_that_was_cut_off(left, tiny, tmp_path):
    raw = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw[: int(left * len(raw)) if isinstance(left, float) else left])
    refused(load_pretrained, path, "GGUF")
    refused(GGUFFile, path, "GGUF")


def test_scales_that_are_not_numbers(tmp_path, recwarn):
    """NaN in a quantised format shows where it is computed; nothing is said on the way."""
    path = write_gguf(tmp_path / "a.gguf", theirs_of("llama-tied"), "Q8_0", tokenizer=tokenizer_of())
    stored = GGUFFile(path).tensors[UP]
    raw = bytearray(path.read_bytes())
    raw[stored.start : stored.start + 2] = b"\x00\x7e"
    path.write_bytes(raw)
    refused(load_pretrained, path, f"{UP} holds infinities or NaN")
    raw[stored.start : stored.start + 34] = b"\x00\x7c" + bytes(32)  # infinity, by which zeros are multiplied
    path.write_bytes(raw)
    refused(load_pretrained, path, f"{UP} holds infinities or NaN")
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
