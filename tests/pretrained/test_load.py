"""Loading: the same function as transformers computes from the same files, folders and GGUF; and in the memory it takes."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers

import common.pretrained.load
from common.foundation.assets import AssetUnavailable
from common.foundation.files import write_json
from common.model.config import ModelConfig
from common.model.ngram import NGram
from common.model.transformer import Transformer
from common.pretrained.load import load_pretrained
from common.pretrained.names import from_transformers
from common.tokenization.byte import ByteTokenizer
from common.tokenization.chat import render_chat
from common.training.checkpoint import save_checkpoint
from tests.pretrained.written import (
    FAMILIES,
    ROWS,
    TEMPLATE,
    edit,
    ids_of,
    rewrite,
    round_to,
    theirs_of,
    tokenizer_of,
    write_gguf,
)

INDEX = "model.safetensors.index.json"
by_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def apart(ours, theirs):
    """The largest difference of logits."""
    ids = ids_of()
    other = theirs(ids)
    return float((ours(ids).logits - other.logits).abs().max())


def saved(folder, family="llama-tied", **changes):
    theirs = theirs_of(family, **changes)
    theirs.save_pretrained(folder)
    return theirs


def tensors_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


# --- folders ----------------------------------------------------------------------------------------------------------


@by_family
def test_a_folder_computes_what_transformers_does(family, tmp_path):
    theirs = saved(tmp_path, family)
    found = load_pretrained(tmp_path)
    assert apart(found.model, theirs) <= 1e-5
    assert not found.model.training
    assert found.tokenizer is None
    assert found.chat_template is None


@by_family
def test_shards_are_put_together(family, tmp_path):
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert apart(load_pretrained(tmp_path).model, theirs) <= 1e-5


def test_shards_of_mixtral_may_split_the_experts_of_a_layer(tmp_path):
    theirs = theirs_of("mixtral")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    where = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    assert len({file for name, file in where.items() if "layers.0.block_sparse_moe.experts" in name}) > 1
    same = from_transformers(theirs).state_dict()
    for name, tensor in load_pretrained(tmp_path).model.state_dict().items():
        assert torch.equal(tensor, same[name]), name


@by_family
def test_numbers_keep_their_format_unless_another_is_asked_for(family, tmp_path):
    theirs_of(family).to(torch.bfloat16).save_pretrained(tmp_path)
    kept, wide = load_pretrained(tmp_path).model, load_pretrained(tmp_path, dtype=torch.float32).model
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for mine, other in zip(kept.parameters(), wide.parameters(), strict=True):
        assert torch.equal(mine.float(), other)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert apart(wide, theirs) <= 1e-5


def test_the_format_is_that_of_the_embedding_where_a_file_has_several(tmp_path):
    saved(tmp_path)
    mixed = {name: t if t.ndim == 1 else t.to(torch.bfloat16) for name, t in tensors_of(tmp_path).items()}
    assert mixed[min(mixed)].dtype == torch.bfloat16
    mixed["model.layers.0.mlp.up_proj.weight"] = mixed["model.layers.0.mlp.up_proj.weight"].double()
    write_tensors(tmp_path, mixed)
    assert {p.dtype for p in load_pretrained(tmp_path).model.parameters()} == {torch.bfloat16}


def test_weights_are_not_made_whole_numbers(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"dtype torch\.int8"):
        load_pretrained(tmp_path, dtype=torch.int8)


@pytest.mark.parametrize("mask", [torch.bool, torch.uint8, torch.float32])
def test_gpt2_in_its_old_form(mask, tmp_path):
    """Names without `transformer.`, and buffers among them, of which the first by name is no weight."""
    theirs = saved(tmp_path, "gpt2")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path).items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().to(mask)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert min(old) == "h.0.attn.bias"
    write_tensors(tmp_path, old)
    assert apart(load_pretrained(tmp_path).model, theirs) <= 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_tied_parameters_are_one(family, tmp_path):
    theirs = saved(tmp_path, family)
    model = load_pretrained(tmp_path).model
    assert model.head.weight is model.embedding.weight
    assert model.num_parameters() == theirs.num_parameters()
    assert all(p.requires_grad for p in model.parameters())
    model(ids_of()).logits.sum().backward()
    with torch.no_grad():
        model.embedding.weight.add_(1)
    assert torch.equal(model.head.weight, model.embedding.weight)


def test_untied_parameters_are_two(tmp_path):
    saved(tmp_path, "llama")
    model = load_pretrained(tmp_path).model
    assert not torch.equal(model.head.weight, model.embedding.weight)


def test_a_file_may_hold_the_head_though_it_is_tied(tmp_path):
    theirs = saved(tmp_path)
    tensors = tensors_of(tmp_path)
    write_tensors(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    model = load_pretrained(tmp_path).model
    assert apart(model, theirs) <= 1e-5
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_a_model_saved_without_its_head_can_be_read_where_the_head_is_the_embedding(family, tmp_path):
    theirs = theirs_of(family)
    theirs.base_model.save_pretrained(tmp_path)
    assert "wte.weight" in tensors_of(tmp_path) or "embed_tokens.weight" in tensors_of(tmp_path)
    assert apart(load_pretrained(tmp_path).model, theirs) <= 1e-5


def test_a_model_saved_without_a_head_of_its_own_is_refused(tmp_path):
    theirs_of("llama").base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        load_pretrained(tmp_path)


def test_what_was_loaded_does_not_depend_on_the_file_any_more(tmp_path):
    theirs = saved(tmp_path)
    model = load_pretrained(tmp_path).model
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-100_000, 2)
        file.write(b"\xff" * 100_000)
    assert apart(model, theirs) <= 1e-5


def test_more_rows_than_the_tokenizer_has_ids_is_usual(tmp_path):
    saved(tmp_path)
    tokenizer = tokenizer_of()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_hf_json(), encoding="utf-8")
    model, found, _ = load_pretrained(tmp_path)
    assert (model.vocab_size, found.vocab_size) == (ROWS, 262)
    assert found.encode("the other", allow_special=True) == tokenizer.encode("the other")
    assert load_pretrained(tmp_path, tokenizer=False).tokenizer is None


def test_fewer_rows_than_ids_is_a_mistake(tmp_path):
    saved(tmp_path, vocab_size=261)
    (tmp_path / "tokenizer.json").write_text(tokenizer_of().to_hf_json(), encoding="utf-8")
    with pytest.raises(ValueError, match="makes 262 ids, the model has rows for 261"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, tokenizer=False).model.vocab_size == 261


SEVERAL = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]


@pytest.mark.parametrize("written", [TEMPLATE, SEVERAL], ids=["text", "list"])
def test_a_chat_template_in_the_config_of_the_tokenizer(written, tmp_path):
    saved(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": written})
    assert load_pretrained(tmp_path).chat_template == TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("its own file", encoding="utf-8")
    assert load_pretrained(tmp_path).chat_template == "its own file"


def test_without_a_default_chat_template_there_is_none(tmp_path):
    saved(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "no"}]})
    assert load_pretrained(tmp_path).chat_template is None


@pytest.mark.parametrize(
    ("written", "window"), [({"sliding_window": 7}, 7), ({"sliding_window": None}, None), ({}, 4096)]
)
def test_mistrals_window_is_none_only_where_it_is_null(written, window, tmp_path):
    saved(tmp_path, "mistral")
    edit(tmp_path / "config.json", lambda found: (found.pop("sliding_window"), found.update(written)))
    assert load_pretrained(tmp_path).model.config.window == window


# --- by name, and our own ---------------------------------------------------------------------------------------------


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
    asked, theirs = [], saved(tmp_path / "fetched")

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "fetched")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert apart(load_pretrained("some-one/tiny").model, theirs) <= 1e-5
    assert asked[0][0] == "some-one/tiny"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in asked[0][1])
    load_pretrained(tmp_path / "fetched")
    load_pretrained("fetched")
    assert len(asked) == 1


@pytest.mark.parametrize("error", [OSError("no network\nat all"), RuntimeError(""), KeyError("x")])
def test_a_name_that_cannot_be_fetched_is_one_error(error, tmp_path, monkeypatch):
    def fetch(name, allow_patterns):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="'some/one' is no file or folder here"):
        load_pretrained("some/one")


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_pretrained(tmp_path / "nothing")


def test_smollm2_is_an_asset(tmp_path, monkeypatch):
    theirs = theirs_of("llama-tied")
    path = write_gguf(tmp_path / "tiny.gguf", theirs, tokenizer=tokenizer_of())
    monkeypatch.setattr(common.pretrained.load, "asset", lambda name: {"smollm2": path}[name])
    monkeypatch.chdir(tmp_path)
    assert apart(load_pretrained("smollm2").model, theirs) <= 1e-5


def test_smollm2_without_a_network_says_so(tmp_path, monkeypatch):
    def unavailable(name):
        raise AssetUnavailable(name)

    monkeypatch.setattr(common.pretrained.load, "asset", unavailable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssetUnavailable, match="smollm2"):
        load_pretrained("smollm2")


@pytest.mark.parametrize("place", ["", "model"])
@pytest.mark.parametrize("trained", [True, False])
def test_our_own_checkpoint_or_the_run_that_has_it(place, trained, tmp_path):
    tokenizer = tokenizer_of() if trained else ByteTokenizer()
    model = Transformer(ModelConfig.preset("tiny"), seed=3).eval()
    folder = save_checkpoint(tmp_path / place, model, tokenizer)
    if trained:
        tokenizer.save(folder / "tokenizer.json")
    found = load_pretrained(tmp_path)
    assert torch.equal(found.model(ids_of()).logits, model(ids_of()).logits)
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    half = load_pretrained(tmp_path, dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_our_own_counts_of_n_grams(tmp_path):
    model = NGram.fit([torch.arange(9)], 2, 257)
    save_checkpoint(tmp_path, model, ByteTokenizer())
    assert isinstance(load_pretrained(tmp_path).model, NGram)


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
def test_a_gguf_file_holds_the_model_that_it_was_written_from(family, kind, tmp_path):
    """Exactly: to quantise rows and to reorder them can be done in either order."""
    theirs = theirs_of(family)
    path = write_gguf(tmp_path / "tiny.gguf", theirs, kind, tokenizer=tokenizer_of(), template=TEMPLATE)
    model, tokenizer, template = load_pretrained(path)
    expected = from_transformers(round_to(theirs, kind)).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == torch.float32
    assert apart(model, theirs) <= 1e-5
    assert (model.head.weight is model.embedding.weight) == (family == "llama-tied")
    assert tokenizer.encode("the other<|im_end|>", allow_special=True) == tokenizer_of().encode(
        "the other<|im_end|>", allow_special=True
    )
    assert tokenizer.specials == tokenizer_of().specials
    assert template == TEMPLATE


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("llama-tied", {}), ("qwen3", {"head_dim": 128})])
def test_transformers_reads_the_same_from_a_gguf_file(family, changes, kind, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", theirs_of(family, **changes), kind, tokenizer=tokenizer_of())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    assert apart(load_pretrained(path).model, theirs) <= 1e-4


def test_a_gguf_file_in_another_format_of_numbers(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", theirs_of("llama-tied"), "Q8_0", tokenizer=tokenizer_of())
    half = load_pretrained(path, dtype=torch.bfloat16).model
    for mine, other in zip(half.parameters(), load_pretrained(path).model.parameters(), strict=True):
        assert torch.equal(mine, other.to(torch.bfloat16))


def test_small_numbers_of_gguf_are_the_ones_that_were_meant(tmp_path):
    """They are written in 32 bits; 1e-05 would come out as 9.999999747378752e-06."""
    path = write_gguf(tmp_path / "tiny.gguf", theirs_of("llama", rms_norm_eps=1e-5), tokenizer=tokenizer_of())
    config = load_pretrained(path).model.config
    assert config.norm_epsilon == 1e-05
    assert config.rope_base == 10_000.0
    path = write_gguf(tmp_path / "other.gguf", theirs_of("llama", rms_norm_eps=1e-6), tokenizer=tokenizer_of())
    assert load_pretrained(path).model.config.norm_epsilon == 1e-06


def test_a_gguf_file_whose_tokenizer_we_cannot_read(tmp_path):
    theirs = theirs_of("llama-tied")
    path = write_gguf(tmp_path / "tiny.gguf", theirs)
    with pytest.raises(ValueError, match=r"tiny\.gguf: no readable tokenizer"):
        load_pretrained(path)
    found = load_pretrained(path, tokenizer=False)
    assert found.tokenizer is None
    assert apart(found.model, theirs) <= 1e-5


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process's memory from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """The peak while 90 MB are loaded, over the size of the weights, measured in processes of its own."""
    root, command = Path(__file__).parents[2], [sys.executable, "-m", "tests.pretrained.apart", "memory", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"folder", "F32.gguf", "Q8_0.gguf"}
    assert all(0.9 < ratio < 1.3 for ratio in found.values()), found


@pytest.mark.parametrize(
    "token", ["<s>", {"content": "<s>"}, 'a "quoted" é', "<🤖>"], ids=["text", "object", "odd", "rare"]
)
def test_a_template_brings_the_special_tokens_that_it_asks_for(token, tmp_path):
    saved(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": token, "eos_token": None})
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", encoding="utf-8"
    )
    template = load_pretrained(tmp_path).chat_template
    expected = token["content"] if isinstance(token, dict) else token
    assert render_chat([{"role": "user", "content": "hello"}], template) == f"{expected}hello"


def test_a_head_that_contradicts_the_config_is_refused(tmp_path):
    """transformers unties such a model with a warning, and older versions of it did not."""
    saved(tmp_path, "llama-tied")
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="another matrix"):
        load_pretrained(tmp_path)
