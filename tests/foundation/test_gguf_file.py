"""GGUFFile against the reader of the `gguf` package, on files that its writer made."""

import gguf
import numpy as np
import pytest

from common.foundation.gguf_file import GGUFFile

SCALARS = {
    "uint8": (200, gguf.GGUFValueType.UINT8),
    "int8": (-100, gguf.GGUFValueType.INT8),
    "uint16": (60_000, gguf.GGUFValueType.UINT16),
    "int16": (-30_000, gguf.GGUFValueType.INT16),
    "uint32": (4_000_000_000, gguf.GGUFValueType.UINT32),
    "int32": (-2_000_000_000, gguf.GGUFValueType.INT32),
    "uint64": (2**63 + 5, gguf.GGUFValueType.UINT64),
    "int64": (-(2**62), gguf.GGUFValueType.INT64),
    "float32": (0.15625, gguf.GGUFValueType.FLOAT32),
    "float64": (1 / 3, gguf.GGUFValueType.FLOAT64),
    "yes": (True, gguf.GGUFValueType.BOOL),
    "no": (False, gguf.GGUFValueType.BOOL),
    "string": ("Schrödinger 日本 \n", gguf.GGUFValueType.STRING),
}
ARRAYS = {
    "strings": ["a", "", "né", "日本" * 50],
    "integers": [0, -1, 2**31 - 1],
    "floats": [0.5, -3.25, 1e30],
    "flags": [True, False, True],
    "bytes": b"\x00\x01\xff",
}
WRITABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_S"]


def written(path, tensors=(), *, alignment=None):
    """A file with all of the metadata above. tensors: (name, array, format)."""
    writer = gguf.GGUFWriter(str(path), "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (value, kind) in SCALARS.items():
        writer.add_key_value(f"scalar.{key}", value, kind)
    for key, values in ARRAYS.items():
        writer.add_array(f"array.{key}", values)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


def test_metadata_of_every_type(tmp_path):
    path = written(tmp_path / "a.gguf")
    found, theirs = GGUFFile(path).metadata, gguf.GGUFReader(path).fields
    for key, (value, _) in SCALARS.items():
        assert found[f"scalar.{key}"] == value
        assert type(found[f"scalar.{key}"]) is type(value)
        assert found[f"scalar.{key}"] == theirs[f"scalar.{key}"].contents()
    for key, values in ARRAYS.items():
        expected = theirs[f"array.{key}"].contents()
        assert found[f"array.{key}"] == (list(values) if key != "floats" else pytest.approx(values))
        assert found[f"array.{key}"] == expected
    assert found["general.architecture"] == "llama"
    assert set(found) == {name for name in theirs if not name.startswith("GGUF.")}


@pytest.mark.parametrize("value", [1e-5, 1e-6, 0.1, 3.0, 500_000.0, 1e-12])
def test_a_float32_is_the_shortest_number_that_it_stands_for(value, tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_float32("epsilon", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFFile(tmp_path / "a.gguf").metadata["epsilon"] == value


@pytest.mark.parametrize("kind", WRITABLE)
def test_tensors_that_can_be_quantised_here(kind, tmp_path):
    form, rows = gguf.GGMLQuantizationType[kind], numbers(7, 512)
    path = written(tmp_path / "a.gguf", [("first", numbers(3), None), ("rows", gguf.quants.quantize(rows, form), form)])
    found = GGUFFile(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(found.tensors) == ["first", "rows"]
    for name, stored in found.tensors.items():
        other = theirs[name]
        assert stored.kind == other.tensor_type
        assert stored.shape == tuple(int(size) for size in other.shape[::-1])
        assert (stored.start, stored.nbytes) == (other.data_offset, other.n_bytes)
        array = found.array(name)
        assert array.dtype == np.float32
        assert np.array_equal(array, gguf.dequantize(other.data, other.tensor_type).reshape(stored.shape))
    most = {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q5_0": 0.05, "Q5_1": 0.05, "TQ1_0": 0.9, "TQ2_0": 0.9}
    error = np.linalg.norm(found.array("rows") - rows) / np.linalg.norm(rows)
    assert error <= most.get(kind, 0.2)
    assert np.array_equal(found.array("first"), numbers(3))


@pytest.mark.parametrize("kind", K_QUANTS)
def test_tensors_that_can_only_be_read_here(kind, tmp_path):
    """K-quants of random bits, with scales that are finite numbers."""
    form = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[form]
    raw = np.random.default_rng(0).integers(0, 60, (5, 512 // block * size), dtype=np.uint8)
    path = written(tmp_path / "a.gguf", [("rows", raw, form)])
    (other,) = gguf.GGUFReader(path).tensors
    found = GGUFFile(path)
    assert found.tensors["rows"].shape == (5, 512)
    assert np.isfinite(found.array("rows")).all()
    assert len(np.unique(found.array("rows"))) > 10
    assert np.array_equal(found.array("rows"), gguf.dequantize(other.data, form))


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_other_alignments(alignment, tmp_path):
    tensors = [(f"t{i}", numbers(i + 1, 3), None) for i in range(4)]
    path = written(tmp_path / "a.gguf", tensors, alignment=alignment)
    found = GGUFFile(path)
    for (name, array, _), other in zip(tensors, gguf.GGUFReader(path).tensors, strict=True):
        assert found.tensors[name].start == other.data_offset
        assert found.tensors[name].start % alignment == 0
        assert np.array_equal(found.array(name), array)


def test_every_number_of_dimensions(tmp_path):
    arrays = {"one": numbers(5), "two": numbers(2, 3), "three": numbers(2, 3, 4), "four": numbers(2, 1, 3, 4)}
    found = GGUFFile(written(tmp_path / "a.gguf", [(name, array, None) for name, array in arrays.items()]))
    for name, array in arrays.items():
        assert np.array_equal(found.array(name), array)


def test_a_tensor_is_computed_in_pieces_that_fit_together(tmp_path):
    kind, rows = gguf.GGMLQuantizationType.Q8_0, numbers(30_001, 32)
    stored = gguf.quants.quantize(rows, kind)
    found = GGUFFile(written(tmp_path / "a.gguf", [("long", stored, kind), ("wide", rows.reshape(1, -1), None)]))
    assert np.array_equal(found.array("long"), gguf.dequantize(stored, kind))
    assert np.array_equal(found.array("wide"), rows.reshape(1, -1))


def test_an_array_belongs_to_who_asked_for_it(tmp_path):
    found = GGUFFile(written(tmp_path / "a.gguf", [("a", numbers(2, 3), None)]))
    found.array("a")[:] = 0
    assert np.array_equal(found.array("a"), numbers(2, 3))


def test_version_2_has_the_same_form(tmp_path):
    path = written(tmp_path / "a.gguf", [("a", numbers(2, 3), None)])
    raw = bytearray(path.read_bytes())
    assert raw[4] == 3
    raw[4] = 2
    path.write_bytes(raw)
    assert np.array_equal(GGUFFile(path).array("a"), numbers(2, 3))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float64])
def test_formats_that_are_no_weights_are_named(dtype, tmp_path):
    found = GGUFFile(written(tmp_path / "a.gguf", [("odd", np.ones((2, 32), dtype=dtype), None)]))
    with pytest.raises(ValueError, match=r"a\.gguf: odd is stored as [IF]\d+, which cannot be read"):
        found.array("odd")


def test_a_file_that_becomes_shorter_is_noticed(tmp_path):
    path = written(tmp_path / "a.gguf", [("a", numbers(20, 30), None)])
    found = GGUFFile(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.gguf ended within a"):
        found.array("a")
