"""Handles for the probes from a network itself: ours, Hugging Face's, or any `nn.Module` from ids to logits.

What a module can do is read from the parameters of its `forward`, so this imports no library of models.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def handles_of(module: nn.Module, *, untrained: bool = False) -> dict[str, Any]:
    """Every handle that can be made from this module, in the mode in which it is: dropout that is left on should show.

    Args:
        untrained: True if its weights are initial ones, so that probes may ask what it knows (nothing) and train copies.

    A Hugging Face model gets padding, packing (by restarting positions, as its own training does), a cache and, with
    attn_implementation="eager", attention maps. A model without those parameters gets the handles that need none.
    """
    accepts = set(inspect.signature(module.forward).parameters)
    made: dict[str, Any] = {"model": module}
    if any(parameter.requires_grad for parameter in module.parameters()):
        made["module"] = module
    if untrained:
        made["untrained"] = module
    config = getattr(module, "config", None)
    size = getattr(module, "vocab_size", None) or getattr(config, "vocab_size", None)
    if size:
        made["vocab_size"] = size
    if "pad_mask" in accepts:
        made["padded"] = lambda ids, pads: module(ids, pad_mask=pads)
    if "document_ids" in accepts:
        made["packed"] = lambda ids, documents: module(ids, document_ids=documents)
    if {"embeds", "pad_mask"} <= accepts:
        made["poisoned"] = lambda ids, pads: module(
            embeds=module.embedding(ids).masked_fill(pads[..., None], torch.nan), pad_mask=pads
        )
    if {"cache", "want"} <= accepts:
        made["open_cache"] = lambda batch: _ours(module, batch, 64)
        made["bounded_cache"] = lambda capacity: _ours(module, 1, capacity)
        made["attention_maps"] = lambda ids: module(ids, want=["attention"]).aux["attention"]
        made["stream"] = lambda ids: _stream_of_ours(module, ids)
        made["parameter_count"] = module.num_parameters()
    if {"attention_mask", "past_key_values", "position_ids"} <= accepts:
        made["padded"] = lambda ids, pads: module(
            ids, attention_mask=(~pads).long(), position_ids=((~pads).long().cumsum(1) - 1).clamp(min=0)
        )
        made["packed"] = lambda ids, documents: module(ids, position_ids=_restarting(documents), use_cache=False)
        made["open_cache"] = lambda batch: _theirs(module)
        made["stream"] = lambda ids: _stream_of_theirs(module, ids)
        if getattr(config, "_attn_implementation", None) == "eager":
            made["attention_maps"] = lambda ids: module(ids, output_attentions=True).attentions
    if "stream" in made:
        made["hidden"] = lambda ids: _named(made["stream"](ids)[1])
    return made


def _ours(module: nn.Module, batch: int, capacity: int) -> Callable[[Tensor], Tensor]:
    cache = module.new_cache(batch, capacity)

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        return module(ids, cache=cache).logits

    return step


def _theirs(module: nn.Module) -> Callable[[Tensor], Tensor]:
    past = None

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        nonlocal past
        out = module(ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        return out.logits

    return step


def _named(states: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [("embedding", states[0]), *((f"block {i}", state) for i, state in enumerate(states[1:]))]


def _restarting(documents: Tensor) -> Tensor:
    """0, 1, 2 … in each document. Written out again on purpose: a probe shares no code with what it checks."""
    rows = []
    for row in documents.tolist():
        places, count = [], 0
        for i, document in enumerate(row):
            count = count + 1 if i and document == row[i - 1] else 0
            places.append(count)
        rows.append(places)
    return torch.tensor(rows)


def _stream_of_ours(module: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = module(ids, want=["hidden"])
    return out.logits, out.hidden


def _stream_of_theirs(module: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = module(ids, output_hidden_states=True)
    return out.logits, list(out.hidden_states)
