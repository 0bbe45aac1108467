"""Our model as an ordinary Hugging Face folder: what transformers, and therefore lm-eval, TRL or vLLM, load.

config.json, generation_config.json     the shape, the end of a document
model.safetensors                       the weights under their names; a tied head once
tokenizer.json, tokenizer_config.json   the same ids
chat_template.jinja                     where there is one
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from common.foundation.files import atomic_path, write_json
from common.model.transformer import Transformer
from common.pretrained.configs import config_to_hf
from common.pretrained.load import Pretrained, load_pretrained
from common.pretrained.names import tensors_to_hf
from common.tokenization.bpe import BPETokenizer
from common.tokenization.byte import ByteTokenizer
from common.tokenization.interop import to_hf_json
from common.tokenization.patterns import GPT2_PATTERN
from common.tokenization.protocol import PADDING, TURN_ENDS, Tokenizer, document_end


def export_hf(source: str | Path | Pretrained, folder: str | Path) -> Path:
    """Write a model that transformers loads with the same ids and, up to rounding, the same logits.

    Written beside the folder first and put in place whole: an interrupted export leaves nothing behind.

    Args:
        source: a run of ours, or anything that `load_pretrained` reads or returned.
        folder: made; must not exist, or be empty.
    Raises:
        ValueError: a model that no family of theirs has (n-grams, latent attention, ...), naming the field.
        FileExistsError: the folder has something in it.
    """
    model, tokenizer, template = source if isinstance(source, Pretrained) else load_pretrained(source)
    folder = Path(folder)
    if not isinstance(model, Transformer):
        raise ValueError(f"a {type(model).__name__} has no Hugging Face form: only transformers have")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another folder, or remove it")
    described = config_to_hf(model.config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with torch.no_grad():
            tensors = _as_published(tensors_to_hf(dict(model.named_parameters()), model.config))
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        with atomic_path(temporary / "model.safetensors") as weights:
            safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        described["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
        if tokenizer is not None:
            end = document_end(tokenizer)
            described |= {"bos_token_id": end, "eos_token_id": end}
            turns = [tokenizer.specials[name] for name in TURN_ENDS if name in tokenizer.specials]
            ends = end if template is None else turns  # a chat model ends where a turn ends, too
            write_json(temporary / "generation_config.json", {"bos_token_id": end, "eos_token_id": ends})
            _write_tokenizer(temporary, tokenizer, model.context_length)
        write_json(temporary / "config.json", described)
        if template is not None:
            (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _as_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one, under the names that Mixtral was published with: what every reader knows.

    transformers stacks them when it loads them.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".mlp.")
        if part == "gate.weight":
            found[f"{layer}.block_sparse_moe.gate.weight"] = tensor
        elif part == "experts.down_proj":
            found |= {f"{layer}.block_sparse_moe.experts.{e}.w2.weight": one for e, one in enumerate(tensor)}
        elif part == "experts.gate_up_proj":
            for e, one in enumerate(tensor):
                gate, up = one.chunk(2)
                found[f"{layer}.block_sparse_moe.experts.{e}.w1.weight"] = gate
                found[f"{layer}.block_sparse_moe.experts.{e}.w3.weight"] = up
        else:
            found[name] = tensor
    return found


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    if isinstance(tokenizer, ByteTokenizer):  # the same ids: bytes, and nothing to merge
        tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [], GPT2_PATTERN, tokenizer.specials)
    (folder / "tokenizer.json").write_text(to_hf_json(tokenizer), encoding="utf-8")
    names = {token: text for text, token in tokenizer.specials.items()}
    end = names[document_end(tokenizer)]
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    if PADDING in tokenizer.specials:
        described["pad_token"] = PADDING
    write_json(folder / "tokenizer_config.json", described)
