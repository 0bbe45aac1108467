"""Folders that are cut off, altered or made to deceive: one clear error, at once, without memory, and nothing is run."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from common.pretrained.load import load_pretrained
from tests.pretrained.written import SCALED, TEMPLATE, edit, refused, rewrite, theirs_of, tokenizer_of, write_gguf

INDEX, UP = "model.safetensors.index.json", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("name", ["one", "shards", "gpt2", "mixtral"])
def test_the_originals_are_read(name, fresh):
    model, tokenizer, template = load_pretrained(fresh(name))
    assert all(p.isfinite().all() for p in model.parameters())
    assert tokenizer.vocab_size == 262
    assert template == TEMPLATE


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 8, 100, 1000, 0.5, -1])
def test_a_file_that_was_cut_off(left, folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(left * len(raw)) if isinstance(left, float) else left])
    refused(load_pretrained, folder, r"model\.safetensors cannot be read as safetensors")


def test_a_file_with_something_behind_it(folder):
    with (folder / "model.safetensors").open("ab") as opened:
        opened.write(b"more")
    refused(load_pretrained, folder, r"model\.safetensors cannot be read as safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"{UP} \(I8\) is not in F32"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), rf"{UP} \(F8_E4M3\) is not in F32"),
        (
            lambda t: t.update({UP: t[UP].T.contiguous()}),
            rf"{UP} gives .*up\.weight the shape \(64, 96\), .*\(96, 64\)",
        ),
        (lambda t: t.update({UP: t[UP][:, :, None]}), rf"{UP} gives"),
        (lambda t: t.update({UP: t[UP][None, None, None]}), rf"model\.safetensors: {UP} has the shape"),
        (lambda t: t.update({UP: t[UP][:0]}), rf"model\.safetensors: {UP} has the shape \(0, 64\)"),
        (lambda t: t.pop(UP), f"missing {UP}"),
        (lambda t: t.update({"extra": torch.ones(1)}), "left over extra"),
        (lambda t: t.update({UP.replace("1", "2"): torch.ones(96, 64)}), r"left over model\.layers\.2"),
        (lambda t: t.update({"lm_head.bias": torch.ones(272)}), r"left over lm_head\.bias"),
        (lambda t: t.clear(), "config says 2 layers, and there are 0 tensors"),
        (lambda t: t[UP][3].fill_(torch.nan), f"{UP} holds infinities or NaN"),
        (lambda t: t[UP][-1, -1].fill_(-torch.inf), f"{UP} holds infinities or NaN"),
        (lambda t: t["model.norm.weight"].fill_(torch.inf), r"model\.norm\.weight holds infinities"),
    ],
)
def test_tensors_that_are_not_those_of_the_model(change, message, folder):
    rewrite(folder, change)
    refused(load_pretrained, folder, message)


def test_numbers_that_the_wanted_format_cannot_hold(folder):
    rewrite(folder, lambda tensors: tensors[UP][0, 0].fill_(1e6))
    load_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"{UP} holds infinities or NaN in torch\.float16"):
        load_pretrained(folder, dtype=torch.float16)


def of(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE, TWO = (json.dumps(of(start, start + 4, [1])) for start in (0, 4))
NEST = b"[" * 100_000
LIES = {  # (header, bytes of data, length that is claimed)
    "beyond the end": ({"a": of(0, 800, [200])}, 8, None),
    "far beyond the end": ({"a": of(0, 2**62, [2**60])}, 8, None),
    "overlapping": ({"a": of(0, 8, [2]), "b": of(4, 12, [2])}, 12, None),
    "a hole": ({"a": of(0, 4, [1]), "b": of(8, 12, [1])}, 12, None),
    "backwards": ({"a": of(8, 0, [2])}, 8, None),
    "another shape": ({"a": of(0, 8, [3])}, 8, None),
    "a shape that overflows": ({"a": of(0, 8, [2**40, 2**40])}, 8, None),
    "an unknown format": ({"a": of(0, 8, [2], "X9")}, 8, None),
    "a negative size": ({"a": of(0, 8, [-2])}, 8, None),
    "a text for a shape": ({"a": of(0, 8, "two")}, 8, None),
    "a name twice": (f'{{"a":{ONE},"a":{TWO}}}'.encode(), 8, None),
    "nested without end": (NEST, 0, None),
    "not text": (b'{"\xff": 1}', 0, None),
    "a long header": ({}, 8, 2**62),
    "the longest header": ({}, 8, 2**64 - 1),
    "a header longer than the file": ({}, 0, 3),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie, folder):
    header, data, length = LIES[lie]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(data))
    refused(load_pretrained, folder, r"model\.safetensors cannot be read as safetensors")


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**62], [1] * 50_000])
def test_a_shape_that_is_none(shape, folder):
    text = json.dumps({"a": of(0, 0 if 0 in shape else 4, shape)}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(0 if 0 in shape else 4))
    refused(load_pretrained, folder, r"model\.safetensors: a has the shape")


@pytest.mark.parametrize("name", ["1.w1", "0.w2", "3.w3"])
def test_an_expert_that_is_missing(name, fresh):
    folder = fresh("mixtral")
    name = f"model.layers.1.block_sparse_moe.experts.{name}.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(load_pretrained, folder, f"has no {name}")


def test_experts_of_which_the_last_is_missing(fresh):
    folder, last = fresh("mixtral"), "model.layers.1.block_sparse_moe.experts.3"
    rewrite(folder, lambda tensors: [tensors.pop(f"{last}.{kind}.weight") for kind in ("w1", "w2", "w3")])
    refused(load_pretrained, folder, r"model\.layers\.1\.mlp\.experts\.gate_up_proj gives .* \(3, 96, 64\)")


def test_an_expert_of_another_shape(fresh):
    folder, name = fresh("mixtral"), "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    refused(load_pretrained, folder, r"missing model\.layers\.1\.mlp\.experts\.gate_up_proj")


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "model.bin", "", 7, ["a"]])
def test_an_index_that_points_elsewhere(name, fresh):
    """Even if there is such a file."""
    folder = fresh("shards")
    safetensors.torch.save_file({UP: torch.ones(96, 64)}, folder.parent / "x.safetensors")
    name = str(folder.parent / "x.safetensors") if name == "/x.safetensors" else name
    edit(folder / INDEX, lambda found: found["weight_map"].update({UP: name}))
    refused(load_pretrained, folder, f"{INDEX} names .*: only safetensors files beside it are read")


def test_an_index_that_names_a_missing_file(fresh):
    folder = fresh("shards")
    gone = max(folder.glob("*.safetensors"))
    gone.unlink()
    refused(load_pretrained, folder, f"{gone.name} is missing", FileNotFoundError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: found["weight_map"].update(more=found["weight_map"][UP]),
            "disagree about 1 tensors, such as more",
        ),
        (lambda found: found["weight_map"].pop(UP), f"disagree about 1 tensors, such as {UP}"),
        (lambda found: found.pop("weight_map"), "has no weight_map"),
        (lambda found: found.update(weight_map=["a"]), "has no weight_map"),
        (lambda found: found.update(weight_map={}), "has no weight_map"),
    ],
)
def test_an_index_of_other_tensors(change, message, fresh):
    folder = fresh("shards")
    edit(folder / INDEX, change)
    refused(load_pretrained, folder, message)


def test_the_same_tensor_in_two_files(fresh):
    folder = fresh("shards")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    more = safetensors.torch.load_file(second) | safetensors.torch.load_file(first)
    safetensors.torch.save_file(more, second)
    refused(load_pretrained, folder, rf"{second.name}: .* is in {first.name} as well")


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "config.json is not JSON"),
        (b'{"model_type": "llama"', "config.json is not JSON"),
        (b"[1, 2]", "config.json holds a list, not an object"),
        (b"null", "config.json holds a NoneType"),
        (b"\xff\xfe{}", "config.json is not JSON"),
        (NEST, "config.json is not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
        (b"{}", "config.json: model_type None is unknown"),
    ],
)
def test_a_config_that_is_none(raw, message, folder):
    (folder / "config.json").write_bytes(raw)
    refused(load_pretrained, folder, message)


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    refused(load_pretrained, folder, "has no config.json", FileNotFoundError)


SIZES = ["vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads",
         "intermediate_size"]  # fmt: skip


@pytest.mark.parametrize("field", [*SIZES, "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", ["2", -1, 0, 2.5, 2.0, True, [2], {}, 10**15, 10**40, float("nan")])
def test_a_size_that_is_none(field, value, folder):
    edit(folder / "config.json", lambda found: found.update({field: value}))
    refused(load_pretrained, folder, f"config.json: {field} is .*, not a whole number")


@pytest.mark.parametrize("field", [*SIZES, "rms_norm_eps"])
@pytest.mark.parametrize("how", ["gone", "null"])
def test_a_field_that_is_missing(field, how, folder):
    edit(folder / "config.json", lambda found: found.pop(field) if how == "gone" else found.update({field: None}))
    refused(load_pretrained, folder, f"config.json: it has no usable '{field}'")


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 271), ("vocab_size", 10**9), ("num_hidden_layers", 1), ("num_hidden_layers", 3),
     ("num_hidden_layers", 10**9), ("hidden_size", 128), ("hidden_size", 2**30), ("num_attention_heads", 8),
     ("num_key_value_heads", 4), ("head_dim", 32), ("intermediate_size", 95), ("intermediate_size", 2**31 - 1),
     ("num_attention_heads", 2**30), ("model_type", "qwen3"), ("attention_bias", True), ("tie_word_embeddings", False)],
)  # fmt: skip
def test_a_config_of_another_model(field, value, folder):
    edit(folder / "config.json", lambda found: found.update({field: value}))
    refused(load_pretrained, folder, "tensors do not fit|config says|is not a multiple of|lm_head")


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", ["1e-5", -1.0, float("nan"), float("inf"), 10**40, [1.0], True])
def test_a_number_that_is_none(field, value, folder):
    edit(folder / "config.json", lambda found: found.update({field: value}))
    refused(load_pretrained, folder, f"config.json: {field} is .*, not a number")


@pytest.mark.parametrize("change", [{"factor": "4"}, {"factor": 0}, {"low_freq_factor": [1.0]}, {"rope_type": ["llama3"]},
                                    {"rope_theta": float("inf")}, {"original_max_position_embeddings": 0},
                                    {"rope_type": "linear", "factor": 1e-320}, {"rope_type": "yarn", "beta_fast": 0},
                                    {"rope_type": "yarn", "beta_slow": 0}])  # fmt: skip
def test_rotary_positions_that_turn_by_nothing(change, folder):
    edit(folder / "config.json", lambda found: found.update(rope_parameters=SCALED | change))
    refused(load_pretrained, folder, "|".join([*change, "no finite frequencies"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tie_word_embeddings", "false"), ("attention_bias", 0), ("rope_parameters", [1]), ("rope_parameters", "default")],
)
def test_a_field_of_another_kind(field, value, folder):
    edit(folder / "config.json", lambda found: found.update({field: value}))
    refused(load_pretrained, folder, f"config.json: {field} is")


@pytest.mark.parametrize(
    "field", ["n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon", "activation_function"]
)
def test_fields_of_gpt2(field, fresh):
    folder = fresh("gpt2")
    edit(folder / "config.json", lambda found: found.update({field: ["7"]}))
    refused(load_pretrained, folder, rf"config.json: {field} is \['7'\]")


@pytest.mark.parametrize("field", ["num_local_experts", "num_experts_per_tok"])
@pytest.mark.parametrize("value", [0, 10**9, "4"])
def test_fields_of_mixtral(field, value, fresh):
    folder = fresh("mixtral")
    edit(folder / "config.json", lambda found: found.update({field: value}))
    refused(load_pretrained, folder, f"{field} is|experts")


# --- at random --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_damage_at_random_is_refused_or_does_no_harm(fresh, tmp_path):
    """See apart.py: bytes, pieces, lengths, counts and values of every part of a checkpoint are altered."""
    count, paths = 150, [fresh("shards"), fresh("gpt2"), fresh("mixtral")]
    for family, kind in (("llama", "F32"), ("qwen3", "Q8_0")):
        words = {"tokenizer": tokenizer_of(), "template": TEMPLATE}
        paths.append(write_gguf(tmp_path / f"{family}.gguf", theirs_of(family), kind, **words))
    command = [sys.executable, "-m", "tests.pretrained.apart", "damage", str(count), "0", *map(str, paths)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == [path.name for path in paths]
    for name, told in found.items():
        assert told["failures"] == [], name
        assert told["refused"] + told["loaded"] == count, name
        assert told["refused"] > count / 2, name
        assert told["loaded"] > count / 20, name  # not every change can be seen
        assert told["slowest"] < 5, name  # seconds of CPU time
