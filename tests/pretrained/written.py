"""Tiny checkpoints with random weights, written the way others write them: by transformers and by llama.cpp's package."""

import contextlib
import json
import sys
import time
import warnings

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from common.tokenization.bpe import BPETokenizer
from common.tokenization.interop import to_characters
from common.tokenization.patterns import GPT2_PATTERN
from common.tokenization.protocol import SPECIALS
from tests.pretrained.apart import finish, status

ROWS = 272  # of the embedding: a few more than the tokenizer has ids
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
LLAMA = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=ROWS, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1,
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-biased": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "llama-scaled": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=24),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=4),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4, sliding_window=None),
}  # fmt: skip


def theirs_of(family, **changes):
    """A model of transformers; norms and biases are random, too, so that none can be left out."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.update(changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return theirs


def ids_of(rows=2, length=13):
    return torch.randint(ROWS, (rows, length), generator=torch.Generator().manual_seed(1))


def tokenizer_of(specials=SPECIALS):
    """262 ids: the bytes, two merges, the special tokens."""
    tokens = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    named = {name: 258 + i for i, name in enumerate(specials)}
    return BPETokenizer(tokens, [(ord("t"), ord("h")), (256, ord("e"))], GPT2_PATTERN, named)


def add_tokenizer(writer, tokenizer):
    """As llama.cpp's converter describes it in the metadata."""
    tokens = [to_characters(raw) for _, raw in sorted(tokenizer.tokens.items())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *tokenizer.specials])
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(tokenizer.specials)
    writer.add_token_types(kinds)
    texts = {token: to_characters(raw) for token, raw in tokenizer.tokens.items()}
    writer.add_token_merges([f"{texts[a]} {texts[b]}" for a, b in tokenizer.merges])


def as_stored(tensor, kind):
    """(numbers as the file has them, their format): norms are kept in float32 whatever the rest is."""
    stored = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
    return gguf.quants.quantize(tensor.detach().float().numpy(), stored), stored


def round_to(theirs, kind):
    """Give a model the weights that are left of its own after being stored."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            stored, form = as_stored(parameter, kind)
            parameter.copy_(torch.from_numpy(gguf.dequantize(stored, form).copy()).view_as(parameter))
    return theirs


def permuted(weights, heads):
    """What llama.cpp's converter does to the rows of Q and K of the Llama family."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weights.shape)


def write_gguf(path, theirs, kind="F32", *, tokenizer=None, template=None, alignment=None):
    """A Llama or Qwen3 of transformers as llama.cpp's converter writes it; names from its own table."""
    config, family = theirs.config, theirs.config.model_type
    writer = gguf.GGUFWriter(str(path), family)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    if template is not None:
        writer.add_chat_template(template)
    arch = gguf.MODEL_ARCH.LLAMA if family == "llama" else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = torch.from_numpy(permuted(tensor.numpy(), heads))
        stored, form = as_stored(tensor, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=form)
    finish(writer)
    return path


def edit(path, change):
    """`change` alters what a JSON file holds."""
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def rewrite(folder, change):
    """`change` alters the dictionary of tensors."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


# --- what damaged ones must lead to -----------------------------------------------------------------------------------


def refused(read, path, message, kind=ValueError):
    """`read(path)` raises one error that has this in it and names the path: within three CPU seconds and 512 MB."""
    start = time.process_time()
    with contextlib.ExitStack() as stack:
        if sys.platform == "linux":
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (1 << 29), hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        with pytest.raises(kind, match=message) as caught:
            read(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert time.process_time() - start < 3
