"""What cannot be written is refused by name, and what is interrupted leaves nothing."""

import dataclasses
import json
import os

import pytest

from common.data.documents import Document
from common.model.ngram import NGram
from common.model.recurrent import Recurrent
from common.pretrained import export
from common.pretrained.export import export_hf
from common.pretrained.load import Pretrained
from common.tokenization.byte import ByteTokenizer
from common.tokenization.chat import CHATML
from tests.pretrained.small import GPT2, made, small_tokenizer

LATENT = {"attention": "latent", "latent_width": 6, "rope_head_width": 4, "value_head_width": 5}
FORMLESS = {
    "latent": (LATENT, "attention='latent'"),
    "alibi": ({"positions": "alibi"}, "positions='alibi'"),
    "sinusoidal": ({"positions": "sinusoidal"}, "positions='sinusoidal'"),
    "no positions": ({"positions": "none"}, "positions='none'"),
    "ntk": ({"rope_scaling": "ntk", "rope_factor": 2.0}, "rope_type 'ntk'"),
    "softcap": ({"logit_softcap": 30.0}, "logit_softcap=30.0"),
    "post": ({"norm_placement": "post"}, "norm_placement='post'"),
    "sandwich": ({"norm_placement": "sandwich"}, "norm_placement='sandwich'"),
    "no norm": ({"norm_placement": "none"}, "norm_placement='none'"),
    "no residual": ({"residual": False}, "residual=False"),
    "residual scale": ({"residual_scale": 0.5}, "residual_scale=0.5"),
    "embedding scale": ({"embedding_scale": 4.0}, "embedding_scale=4.0"),
    "attention scale": ({"attention_scale": 0.3}, "attention_scale=0.3"),
    "output bias": ({"attention_bias": True, "output_bias": False}, "output_bias=False"),
    "only an output bias": ({"output_bias": True}, "output_bias=True"),
    "LayerNorm": ({"norm": "layer"}, "norm='layer'"),
    "MLP": ({"mlp": "gelu"}, "mlp='gelu'"),
    "no MLP": ({"mlp": "none"}, "mlp='none'"),
    "norms and window": ({"qk_norm": True, "window": 5}, "window=5"),
    "norms and experts": ({"qk_norm": True, "experts": 4}, "qk_norm=True"),
    "norms and MLP biases": ({"qk_norm": True, "mlp_bias": True}, "mlp_bias=True"),
    "window and biases": ({"window": 5, "attention_bias": True}, "attention_bias=True"),
    "window and MLP biases": ({"window": 5, "mlp_bias": True}, "mlp_bias=True"),
    "experts and biases": ({"experts": 4, "attention_bias": True}, "attention_bias=True"),
    "gpt2 with RMSNorm": ({**GPT2, "norm": "rms"}, "norm='rms'"),
    "gpt2 grouped": ({**GPT2, "key_value_heads": 2}, "key_value_heads=2"),
    "gpt2 with a window": ({**GPT2, "window": 5}, "window=5"),
    "gpt2 with wide heads": ({**GPT2, "head_width": 10}, "head_width=10"),
    "gpt2 with a narrow MLP": ({**GPT2, "hidden_width": 40}, "n_inner=40"),
    "gpt2 with relu2": ({**GPT2, "mlp": "relu2"}, "relu2"),
    "gpt2 gated": ({**GPT2, "mlp": "swiglu", "hidden_width": 128}, "swiglu"),
    "gpt2 without biases": ({**GPT2, "attention_bias": False}, "attention_bias=False"),
    "gpt2 without MLP biases": ({**GPT2, "mlp_bias": False}, "mlp_bias=False"),
    "gpt2 with norms": ({**GPT2, "qk_norm": True}, "qk_norm=True"),
}


@pytest.mark.parametrize("name", FORMLESS)
def test_a_model_without_a_form_is_refused_by_field(name, tmp_path):
    changes, said = FORMLESS[name]
    with pytest.raises(ValueError, match="this model has no Hugging Face form: ") as caught:
        export_hf(Pretrained(made(changes), None, None), tmp_path / "out")
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_field_is_accounted_for(tmp_path):
    """A field that is changed is exported, or refused, or known to change nothing: none is lost."""
    plain = made({}).config
    others = {int: lambda v: 2 * v + 2 * (not v), float: lambda v: v + 1.0, bool: lambda v: not v}
    harmless = {"dropout", "init", "init_std", "balance_loss", "z_loss", "rope_layout", "rope_original_context",
                "rope_low_frequency", "rope_high_frequency", "yarn_fast", "yarn_slow", "experts_per_token"}  # fmt: skip
    none = {"key_value_heads": 2, "head_width": 10, "output_bias": True, "window": 5, "attention_scale": 0.3,
            "hidden_width": 40, "logit_softcap": 9.0}  # fmt: skip
    seen = set()
    for field in dataclasses.fields(plain):
        value = getattr(plain, field.name)
        if isinstance(value, str) or field.name in harmless or (value is None and field.name not in none):
            continue
        new = none[field.name] if value is None else others[type(value)](value)
        try:
            config = plain.but(**{field.name: new})
            made_config = export.config_to_hf(config)
        except ValueError:
            continue
        seen.add(field.name)
        assert made_config != export.config_to_hf(plain), field.name
    assert seen == {
        "vocab_size", "context_length", "layers", "width", "heads", "key_value_heads", "head_width", "window",
        "attention_bias", "qk_norm", "rope_base", "norm_epsilon", "hidden_width", "mlp_bias", "experts", "tied",
    }  # fmt: skip


def test_other_models_are_refused_by_name(tmp_path):
    tokenizer = ByteTokenizer()
    for model in (NGram.fit_documents([Document("a", "a", "abc")], tokenizer, 2), Recurrent("lstm", 257, 8, 1)):
        with pytest.raises(ValueError, match=f"a {type(model).__name__} has no Hugging Face form"):
            export_hf(Pretrained(model, tokenizer, None), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    model = Pretrained(made({}), small_tokenizer(), None)
    folder = tmp_path / "out"
    folder.mkdir()
    export_hf(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (folder, file):
        with pytest.raises(FileExistsError, match="is not empty"):
            export_hf(model, place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_files_are_as_readable_as_any_other(tmp_path):
    folder = export_hf(Pretrained(made({}), small_tokenizer(), CHATML), tmp_path / "out")
    (tmp_path / "usual").write_text("")
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert set(modes.values()) == {(tmp_path / "usual").stat().st_mode}, modes
    assert set(modes) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                          "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert os.access(folder, os.R_OK | os.X_OK)
    assert folder.stat().st_mode & 0o777 == 0o755


# --- interruption -----------------------------------------------------------------------------------------------------


class Cut(BaseException):
    """As Ctrl-C: nothing that is caught on the way."""


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("where", ["replace", "write_text", "save_file"])
def test_an_interrupted_export_leaves_nothing(where, there, tmp_path, monkeypatch):
    owner, name = {
        "replace": (os, "replace"),
        "write_text": (export.Path, "write_text"),
        "save_file": (export.safetensors.torch, "save_file"),
    }[where]
    plain, model, count = getattr(owner, name), Pretrained(made({}), small_tokenizer(), CHATML), 0
    while True:
        left = [count]

        def cut(*given, left=left, **more):
            if left[0] == 0:
                raise Cut
            left[0] -= 1
            return plain(*given, **more)

        place = tmp_path / str(count)
        place.mkdir()
        if there:
            (place / "out").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, cut)
            try:
                export_hf(model, place / "out")
            except Cut:
                assert not [path for path in place.rglob("*") if path != place / "out"]
                assert not (place / "out").is_file()
            else:
                break
        export_hf(model, place / "out")
        assert len(list((place / "out").iterdir())) == 6
        count += 1
    assert count == {"replace": 5, "write_text": 5, "save_file": 1}[where]
    assert json.loads((place / "out" / "config.json").read_text())["model_type"] == "llama"
