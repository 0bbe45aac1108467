"""A checkpoint: tensors in safetensors, everything else in JSON, and the tokenizer's fingerprint in both directions.

    <folder>/model.safetensors      the tensors
    <folder>/checkpoint.json        what kind of model, which tokenizer, the hash of the tensors; written last

January saves count models; May adds optimizer, schedule and loader state. Nothing is ever unpickled.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.foundation.files import atomic_path, read_json, sha256_bytes, sha256_file, write_json
from common.model.ngram import PARTS, NGram
from common.tokenization.protocol import Tokenizer


def save_checkpoint(folder: str | Path, model: NGram, tokenizer: Tokenizer) -> Path:
    """Write the model, atomically: a folder without a matching checkpoint.json is not a checkpoint."""
    folder = Path(folder)
    with atomic_path(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file({name: t.contiguous() for name, t in model.state_dict().items()}, temporary)
    described = {
        "format": 1,
        "model": {"kind": "ngram", "order": model.order, "vocab_size": model.vocab_size},
        "tokenizer": tokenizer.fingerprint,
        "sha256": sha256_file(folder / "model.safetensors"),
    }
    write_json(folder / "checkpoint.json", described)
    return folder


def load_checkpoint(folder: str | Path, tokenizer: Tokenizer) -> NGram:
    """Read a model back, or refuse.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: truncated or altered tensors, an unknown kind of model, or a tokenizer other than the model's.
            The message says both sides.
    """
    folder = Path(folder)
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
    kind = described["model"]["kind"]
    if kind != "ngram":
        raise ValueError(f"{folder} holds a model of kind {kind!r}; this version can load 'ngram'")
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())  # not mapped: the file may be moved
    levels = [{name: tensors[f"level{k}_{name}"] for name in PARTS} for k in range(described["model"]["order"])]
    return NGram(described["model"]["vocab_size"], levels)


def model_fingerprint(model: Any) -> str:
    """A hash of the class, the vocabulary and every tensor: equal fingerprints and equal code, equal functions."""
    parts = [f"{type(model).__module__}.{type(model).__qualname__} {model.vocab_size} ".encode()]
    for name, tensor in sorted(model.state_dict().items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        parts.append(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256_bytes(b"".join(parts))
