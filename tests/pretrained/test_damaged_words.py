"""What lies beside the weights, damaged: tokenizer, chat template, pickles, and checkpoints of our own."""

import io
import os
import pickle

import pytest
import torch

from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.pretrained.load import load_pretrained
from common.tokenization.byte import ByteTokenizer
from common.training.checkpoint import save_checkpoint
from tests.pretrained.written import TEMPLATE, edit, refused

NEST = b"[" * 100_000

# --- the tokenizer and the chat template ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model"), "byte-level BPE"),
        (lambda t: t.update(model=[1]), "byte-level BPE"),
        (lambda t: t["model"].pop("merges"), "byte-level BPE"),
        (lambda t: t["model"].update(merges=[1, 2]), "byte-level BPE"),
        (lambda t: t["model"].update(merges=["a b c"]), "byte-level BPE"),
        (lambda t: t["model"]["vocab"].update({"日": 5}), "stands for no byte"),
        (lambda t: t["model"]["vocab"].update({"zz": 2**70}), "the model has rows for 272"),
        (lambda t: t["model"]["vocab"].update({"zz": 272}), "makes 273 ids, the model has rows for 272"),
        (lambda t: t["model"]["vocab"].update({"zz": -1}), "the tokenizer has the id or special token -1"),
        (lambda t: t["model"]["vocab"].update({"zz": 265.5}), "the tokenizer has the id or special token 265.5"),
        (lambda t: t["model"]["vocab"].update({"zz": "265"}), r"tokenizer\.json"),
        (lambda t: t.update(added_tokens=[{"id": 265, "content": 7}]), "id or special token 7"),
        (lambda t: t["added_tokens"].append({"id": 265, "content": 7, "special": False}), r"tokenizer\.json"),
        (lambda t: t.update(normalizer=7), r"tokenizer\.json"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("), r"tokenizer\.json"),
        (lambda t: t["pre_tokenizer"].update(pretokenizers=["x"]), r"tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_is_none(change, message, folder):
    edit(folder / "tokenizer.json", change)
    refused(load_pretrained, folder, message)
    assert load_pretrained(folder, tokenizer=False).tokenizer is None


@pytest.mark.parametrize("raw", [b"", NEST, b"\xff", b"[]"])
def test_a_tokenizer_that_is_no_json(raw, folder):
    (folder / "tokenizer.json").write_bytes(raw)
    refused(load_pretrained, folder, r"tokenizer\.json")


@pytest.mark.parametrize("template", [7, {"a": "b"}, [{"name": "default", "template": 7}], True])
def test_a_chat_template_that_is_no_text(template, folder):
    edit(folder / "tokenizer_config.json", lambda found: found.update(chat_template=template))
    refused(load_pretrained, folder, r"tokenizer_config\.json: chat_template is .*, not a text")


@pytest.mark.parametrize("template", [["x"], [7, None], []])
def test_a_list_of_no_chat_templates(template, folder):
    edit(folder / "tokenizer_config.json", lambda found: found.update(chat_template=template))
    assert load_pretrained(folder).chat_template is None


@pytest.mark.parametrize("raw", [b"\xff\xfe", TEMPLATE.encode() + b"\xc3"])
def test_a_chat_template_in_no_encoding(raw, folder):
    (folder / "chat_template.jinja").write_bytes(raw)
    refused(load_pretrained, folder, r"chat_template\.jinja is not text")


# --- pickles ----------------------------------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "model.gguf", "tokenizer.json"])
def test_a_pickle_is_never_opened(name, form, folder, tmp_path):
    sprung, path = tmp_path / "sprung", folder / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(str(sprung))))
    else:
        torch.save({"a": Trap(str(sprung))}, path, _use_new_zipfile_serialization=form == "torch")
    if name.endswith((".bin", ".pt")):
        (folder / "model.safetensors").unlink()
        refused(load_pretrained, folder, f"no model.safetensors: it has {name}, a pickle", FileNotFoundError)
    if name in ("model.safetensors", "tokenizer.json"):
        refused(load_pretrained, folder, name)
    refused(load_pretrained, path, "is not a GGUF file")
    assert not sprung.exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert sprung.exists()  # the trap works
    if name == "model.gguf":  # the magic of the format does not help
        sprung.rmdir()
        path.write_bytes(b"GGUF" + path.read_bytes())
        refused(load_pretrained, path, "cannot be read as GGUF")
        assert not sprung.exists()


# --- our own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("tokenizer"),
        lambda found: found.pop("sha256"),
        lambda found: found.pop("model"),
        lambda found: found["model"].pop("kind"),
        lambda found: found["model"]["config"].update(colour="red"),
        lambda found: found["model"]["config"].update(layers="2"),
        lambda found: found["model"]["config"].update(layers=3),
        lambda found: found["model"]["config"].update(width=16),
    ],
)
def test_a_checkpoint_of_ours_that_was_altered(change, tmp_path):
    model = Transformer(ModelConfig.preset("tiny"))
    folder = save_checkpoint(tmp_path / "run" / "model", model, ByteTokenizer())
    edit(folder / "checkpoint.json", change)
    refused(load_pretrained, folder, "checkpoint.json|does not fit")


def test_a_checkpoint_of_ours_that_was_cut_off(tmp_path):
    folder = save_checkpoint(tmp_path / "model", Transformer(ModelConfig.preset("tiny")), ByteTokenizer())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(load_pretrained, folder, "cut off or altered")
