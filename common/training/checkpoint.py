"""A checkpoint: a model's tensors in safetensors, everything else in JSON, bound to one tokenizer by its fingerprint.

    <folder>/model.safetensors      the tensors
    <folder>/checkpoint.json        the kind of model, the tokenizer, the hash of the tensors; written last

A checkpoint is a model to use. A training in progress is more than its model: see snapshots.py. Nothing is ever unpickled.
"""

import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from common.foundation.files import atomic_path, read_json, sha256_bytes, sha256_file, write_json
from common.model.config import ModelConfig
from common.model.ngram import PARTS, NGram
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer
from common.tokenization.bpe import BPETokenizer
from common.tokenization.byte import ByteTokenizer
from common.tokenization.protocol import Tokenizer


def describe_model(model: Any) -> dict[str, Any]:
    """The kind and shape of a model as plain values, from which `build_model` makes it again."""
    if isinstance(model, NGram):
        return {"kind": "ngram", "order": model.order, "vocab_size": model.vocab_size}
    if isinstance(model, Transformer):
        return {"kind": "transformer", "config": dataclasses.asdict(model.config)}
    if isinstance(model, Recurrent):
        shape = {"cell": model.kind, "width": model.width, "layers": len(model.layers)}
        return {"kind": "recurrent", "vocab_size": model.vocab_size, **shape}
    raise ValueError(f"a {type(model).__name__} cannot be saved: there are NGram, Transformer, Recurrent")


def build_model(described: dict[str, Any], tensors: dict[str, Tensor], where: str) -> Any:
    """Make a model of that description with these tensors. Raises ValueError with what does not fit."""
    kind = described["kind"]
    if kind == "ngram":
        levels = [{name: tensors[f"level{k}_{name}"] for name in PARTS} for k in range(described["order"])]
        return NGram(described["vocab_size"], levels)
    if kind == "transformer":
        model = Transformer(ModelConfig(**described["config"]))
    elif kind == "recurrent":
        model = Recurrent(described["cell"], described["vocab_size"], described["width"], described["layers"])
    else:
        raise ValueError(f"{where} holds a model of kind {kind!r}; there are ngram, transformer, recurrent")
    load_tensors(model, tensors, where)
    return model.eval()


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Fill every parameter from the tensor of its name. Raises ValueError, before any change, if a name or shape differs."""
    mine = dict(model.named_parameters())
    missing, unexpected = sorted(set(mine) - set(tensors)), sorted(set(tensors) - set(mine))
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(p.shape)} in the model"
        for name, p in mine.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    if missing or unexpected or shapes:  # gallery: pretraining/compiled-names
        said = [f"{len(names)} {what}, such as {names[0]}" for what, names in
                (("missing from the file", missing), ("unknown to the model", unexpected)) if names]  # fmt: skip
        raise ValueError(f"{where} does not fit this model: {'; '.join(said + shapes[:3])}")
    for name, p in mine.items():
        p.copy_(tensors[name])


def save_checkpoint(
    folder: str | Path, model: Any, tokenizer: Tokenizer, *, tensors: dict[str, Tensor] | None = None
) -> Path:
    """Write the model atomically: a folder without a matching checkpoint.json is not a checkpoint.

    Args:
        tensors: the parameters by name, if those in `model` are not whole (because they are sharded).
    """
    folder = Path(folder)
    if tensors is None:
        named = model.state_dict() if isinstance(model, NGram) else dict(model.named_parameters())  # tied ones once
        tensors = {name: t.detach() for name, t in named.items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary)
    described = {
        "format": 1,
        "model": describe_model(model),
        "tokenizer": tokenizer.fingerprint,
        "sha256": sha256_file(folder / "model.safetensors"),
    }
    write_json(folder / "checkpoint.json", described)
    return folder


def load_checkpoint(folder: str | Path, tokenizer: Tokenizer) -> Any:
    """Read a model back, or refuse.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the tensors were truncated or altered, the kind of model is unknown, names or shapes differ, or the
            tokenizer is not the model's. The message says both sides.
    """
    folder = Path(folder)
    described, tensors = read_checkpoint(folder, tokenizer)
    return build_model(described, tensors, str(folder))


def load_with_tokenizer(folder: str | Path) -> tuple[Any, Tokenizer]:
    """A model and the tokenizer in its folder, or the byte tokenizer if there is none."""
    path = Path(folder) / "tokenizer.json"
    tokenizer = BPETokenizer.load(path) if path.exists() else ByteTokenizer()
    return load_checkpoint(folder, tokenizer), tokenizer


def read_checkpoint(folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description of the model, tensors), after checking the tokenizer and the hash of the tensors."""
    for name in ("checkpoint.json", "model.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a checkpoint: it has no {name}")
    described = read_json(folder / "checkpoint.json")
    if described["tokenizer"] != tokenizer.fingerprint:  # gallery: spine/wrong-tokenizer
        raise ValueError(
            f"{folder} was trained with tokenizer {described['tokenizer'][:12]}…, but it is to be used with "
            f"{tokenizer.fingerprint[:12]}…: the same ids would mean other bytes. Load the tokenizer it was saved with."
        )
    found = sha256_file(folder / "model.safetensors")
    if found != described["sha256"]:  # gallery: spine/partial-file
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256 {found[:12]}…, checkpoint.json says "
            f"{described['sha256'][:12]}…: the file was cut off or altered. Make it again."
        )
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())  # not mapped: the file may be moved
    return described["model"], tensors


def model_fingerprint(model: Any) -> str:
    """A hash of the class, the vocabulary and every tensor. Models with equal fingerprints and code compute the same."""
    parts = [f"{type(model).__module__}.{type(model).__qualname__} {model.vocab_size} ".encode()]
    for name, tensor in sorted(model.state_dict().items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        parts.append(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256_bytes(b"".join(parts))
