"""The transformer of the year: one class, every published variant a value of `ModelConfig`.

    ids -> embedding (+ positions) -> layers x [attention, MLP] -> norm -> logits

Each block adds to a stream of width C that runs through the model untouched: the residual path. Read `Transformer.forward`
first; everything else in this folder is called from there. Left out on purpose: gradient checkpointing and tensor
parallelism (data parallelism is in training/distributed.py).
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.model import cost
from common.model.attention import Attention, AttentionContext
from common.model.cache import Cache
from common.model.config import ModelConfig
from common.model.initialise import initialise
from common.model.latent import LatentAttention
from common.model.masks import attention_mask, positions_of
from common.model.mlp import MLP, MixtureOfExperts, Routing
from common.model.norms import Norm
from common.model.output import Output
from common.model.positions import alibi_bias, alibi_slopes, rope_angles, rope_frequencies, sinusoidal_table, wide
from common.model.registry import registered

WANTS = ("hidden", "attention")


class Block(nn.Module):
    """Attention, then an MLP, each on a branch of the residual stream. `norm_placement` says where the norms sit."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attention = (LatentAttention if config.attention == "latent" else Attention)(config, layer)
        self.mlp = None
        if config.mlp != "none":
            self.mlp = MixtureOfExperts(config) if config.experts else MLP(config)
        branches = ["attention"] + (["mlp"] if self.mlp is not None else [])
        for branch in branches if config.norm_placement != "none" else []:
            self.add_module(f"{branch}_norm", Norm(config.norm, config.width, config.norm_epsilon))
            if config.norm_placement == "sandwich":
                self.add_module(f"{branch}_norm_after", Norm(config.norm, config.width, config.norm_epsilon))

    def _before(self, branch: str, x: Tensor) -> Tensor:
        return getattr(self, f"{branch}_norm")(x) if self.config.norm_placement in ("pre", "sandwich") else x

    def _add(self, branch: str, x: Tensor, made: Tensor) -> Tensor:
        """Add what a branch made to the stream, with the norms, dropout and scale that the config asks for."""
        config = self.config
        if config.norm_placement == "sandwich":
            made = getattr(self, f"{branch}_norm_after")(made)
        if config.dropout and self.training:
            made = F.dropout(made, config.dropout)
        if config.residual_scale != 1.0:
            made = made * config.residual_scale
        out = x + made if config.residual else made
        return getattr(self, f"{branch}_norm")(out) if config.norm_placement == "post" else out

    def forward(
        self, x: Float[Tensor, "B T C"], context: AttentionContext, pad_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T C"], Routing | None]:
        x = self._add("attention", x, self.attention(self._before("attention", x), context))
        if self.mlp is None:
            return x, None
        y, routing = self._before("mlp", x), None
        if isinstance(self.mlp, MixtureOfExperts):
            y, routing = self.mlp(y, pad_mask)
        else:
            y = self.mlp(y)
        return self._add("mlp", x, y), routing


@registered("transformer")
class Transformer(nn.Module):
    """A decoder-only language model. See LanguageModel for the interface that all models of the year share.

    Args:
        config: the architecture.
        seed: of the initial weights. They depend on the config and the seed and on nothing else.
    """

    bounded = False

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.context_length = config.vocab_size, config.context_length
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_table = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = None
        if config.norm_placement in ("pre", "sandwich"):
            self.final_norm = Norm(config.norm, config.width, config.norm_epsilon)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._rotation: tuple[Tensor, Tensor] | None = None  # cos and sin of positions 0, 1, 2 …, computed when needed
        initialise(self, seed, init=config.init, branches=2 * config.layers, embedding_std=config.init_std)

    def forward(
        self,
        ids: Int[Tensor, "B T"] | None = None,
        *,
        embeds: Float[Tensor, "B T C"] | None = None,
        cache: Cache | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        pad_mask: Bool[Tensor, "B T"] | None = None,
        prefix: Int[Tensor, "B"] | None = None,
        want: Collection[str] = (),
        head: bool = True,
    ) -> Output:
        """Logits of the next token at each position, (B, T, V).

        Args:
            ids, embeds: one of the two; `embeds` come in place of the token embeddings.
            cache: holds the tokens before these T, which are appended to it.
            positions: by default real tokens are counted from 0 in each document, going on from those in the cache.
            Positions
                of your own are possible with learned, sinusoidal and rotary positions without a window. They never change
                the masks, which compare places in the row.
            document_ids: a token sees only tokens with the same id.
            pad_mask: True at padding, on either side of the row. No token sees it, and the outputs there mean nothing.
            prefix: length of the bidirectional prefix of each row (prefix-LM). T makes the whole row bidirectional, as in an
                encoder. Not possible with a cache.
            want: "hidden" puts the stream into `Output.hidden`: the embeddings, then the output of each block, the last of
                them after the final norm. "attention" puts the weights into `aux`, (B, H, T, S) for each layer, before
                dropout.
            head: False computes no logits, and `Output.hidden` has the normed stream as its only entry. This is for a loss
                that applies the head itself, piece by piece (training/loss.py).
        Returns:
            Output. Its `aux` has "penalty", which training adds to the loss, and with experts "load", (layers, experts), and
            "balance".
        Raises:
            ValueError: ids are out of range, positions are beyond a learned table, shapes disagree, or the cache is full.
        """
        x = self._embed(ids, embeds)  # (B, T, C)
        batch, length, _ = x.shape
        for name, given in (("document_ids", document_ids), ("pad_mask", pad_mask), ("positions", positions)):
            if given is not None and given.shape != (batch, length):
                raise ValueError(f"{name} has shape {tuple(given.shape)}, the tokens {(batch, length)}")
        if set(want) - set(WANTS):
            raise ValueError(f"want={sorted(want)}: there is {', '.join(WANTS)}")
        if positions is not None and (self.config.window is not None or self.config.positions == "alibi"):
            raise ValueError(
                "windows and ALiBi count positions themselves, also those in a cache: leave `positions` out"
            )
        if positions is not None and positions.numel() and int(positions.min()) < 0:
            raise ValueError(f"positions start at 0, got {int(positions.min())}")
        if cache is not None:
            if cache.config != self.config:
                raise ValueError("this cache was made for another config: take model.new_cache(...)")
            if prefix is not None:
                raise ValueError("a prefix that sees itself must come in one pass, without a cache")
            cache.begin((batch, length), document_ids, pad_mask)
        if prefix is not None and document_ids is None:
            document_ids = torch.zeros((batch, length), dtype=torch.int64, device=x.device)
        context, places = self._attention_context(
            x, cache, positions, document_ids, pad_mask, "attention" in want, prefix
        )
        x = self._add_positions(x, places)
        if pad_mask is not None:
            # Whatever stood there, a NaN included: a weight of 0 would not keep it out, because 0 * NaN is NaN.
            x = x.masked_fill(pad_mask[..., None], 0.0)
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        hidden, routings = [x], []
        for block in self.blocks:
            x, routing = block(x, context, pad_mask)
            hidden.append(x)
            routings.append(routing)
        if self.final_norm is not None:
            x = hidden[-1] = self.final_norm(x)
        if cache is not None:
            cache.advance(length)
        logits = self.logits_of(x) if head else None
        aux = self._aux(logits, routings, pad_mask)
        if context.weights is not None:
            aux["attention"] = context.weights
        if not head and "hidden" not in want:
            hidden = [x]
        return Output(logits, hidden if "hidden" in want or not head else None, aux)

    def logits_of(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... V"]:
        """The logits from the normed stream: the head, and the soft cap where the config has one."""
        cap, logits = self.config.logit_softcap, self.head(x)
        return cap * torch.tanh(logits / cap) if cap else logits

    def _embed(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if (ids is None) == (embeds is None):
            raise ValueError("give ids or embeds, one of the two")
        if embeds is None:
            if ids.ndim != 2:
                raise ValueError(f"ids must have shape (B, T), got {tuple(ids.shape)}")
            if ids.numel() and not ids.is_cuda and (ids.min() < 0 or ids.max() >= self.vocab_size):
                raise ValueError(
                    f"token ids run from {int(ids.min())} to {int(ids.max())}, outside a vocabulary of "
                    f"{self.vocab_size}: was the text encoded with another tokenizer?"
                )
            embeds = self.embedding(ids)
        return embeds if self.config.embedding_scale == 1.0 else embeds * self.config.embedding_scale

    def _attention_context(
        self,
        x: Tensor,
        cache: Cache | None,
        positions: Tensor | None,
        document_ids: Tensor | None,
        pad_mask: Tensor | None,
        keep_weights: bool,
        prefix: Tensor | None = None,
    ) -> tuple[AttentionContext, Tensor]:
        """Returns (what the attention layers share, the positions of the T tokens).

        One rule covers every case: positions and masks are worked out for all S tokens, and those of the last T are used.
        """
        config, (_batch, length, _) = self.config, x.shape
        if cache is not None:
            document_ids, pad_mask = cache.seen(length)
        total = length if cache is None else cache.length + length  # S
        structured = document_ids is not None or pad_mask is not None
        counted = positions_of(document_ids, pad_mask) if structured else torch.arange(total, device=x.device)[None]
        counted_on = counted[:, total - length :]
        places = counted_on if positions is None else positions  # (B or 1, T)
        context = AttentionContext(cache=cache, weights=[] if keep_weights else None)
        if structured or config.window is not None:
            context.mask = attention_mask(
                document_ids, pad_mask=pad_mask, positions=counted, window=config.window, prefix=prefix, queries=length
            )[:, None]
        if config.positions == "alibi":
            context.bias = alibi_bias(alibi_slopes(config.heads).to(x), counted_on, counted)
        if config.positions == "rope":
            # (B or 1, 1, T, D), so that it broadcasts over heads
            context.rotation = tuple(part[:, None] for part in self._angles(places, straight=places is counted_on))
        return context, places

    def _angles(self, places: Int[Tensor, "B T"], *, straight: bool) -> tuple[Tensor, Tensor]:
        """cos and sin at these positions, (B or 1, T, D), looked up in a table that grows when it must.

        `straight`: the positions are 0, 1, 2 … as counted here, not passed in by the caller, so a slice of the table can be
        returned instead of a gather.
        """
        table = self._rotation
        most = int(places.max()) + 1 if places.numel() else 1
        if table is None or len(table[0]) < most or table[0].device != places.device:
            frequencies, factor = rope_frequencies(self.config)
            size = max(most, min(self.context_length, 4096), 0 if table is None else 2 * len(table[0]))
            with torch.inference_mode(False):  # a table made while sampling must serve training, too
                every = torch.arange(size, device=places.device)
                angles = rope_angles(every, frequencies.to(places.device), factor)
                table = self._rotation = wide(*angles, self.config.rope_layout)
        first, count = int(places[0, 0]) if places.numel() else 0, places.shape[1]
        if straight and len(places) == 1 and int(places[:, -1:].sum()) == first + max(count - 1, 0):
            return tuple(part[first : first + count][None] for part in table)  # the common case: no copy
        return tuple(part[places] for part in table)

    def _add_positions(self, x: Tensor, places: Tensor) -> Tensor:
        if self.config.positions == "learned":
            if places.numel() and int(places.max()) >= self.context_length:
                raise ValueError(
                    f"position {int(places.max())} is beyond the learned table of {self.context_length}: crop the input, "
                    "or raise context_length and train it"
                )
            return x + self.position_table(places)
        if self.config.positions == "sinusoidal":
            return x + sinusoidal_table(places, self.config.width).to(x.dtype)
        return x

    def _aux(self, logits: Tensor | None, routings: list[Routing | None], pad_mask: Tensor | None) -> dict[str, Any]:
        aux: dict[str, Any] = {"penalty": 0.0}
        if self.config.experts:
            aux["load"] = torch.stack([routing.load for routing in routings])  # (layers, experts)
            aux["balance"] = torch.stack([routing.balance for routing in routings]).mean()
            aux["penalty"] = self.config.balance_loss * aux["balance"]
        if self.config.z_loss and self.training:
            if logits is None:
                raise ValueError("z_loss needs the logits: train with head=True, or without z_loss")
            z = logits.float().logsumexp(dim=-1).square()  # PaLM, section 5: keeps logits from drifting
            z = z.flatten() if pad_mask is None else z[~pad_mask]
            aux["penalty"] = aux["penalty"] + self.config.z_loss * z.sum() / max(len(z), 1)
        return aux

    def new_cache(self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for this model with room for `capacity` tokens, `context_length` by default."""
        weight = self.embedding.weight
        return Cache(
            self.config, batch, capacity or self.context_length, dtype=dtype or weight.dtype, device=weight.device
        )

    def describe(self) -> dict[str, Any]:
        """See registry.Describable."""
        return {"kind": "transformer", "config": dataclasses.asdict(self.config)}

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Self:
        return cls(ModelConfig(**described["config"]))

    def num_parameters(self) -> int:
        """The number of trainable and frozen parameters. Tied ones are counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, context: int) -> int:
        """See cost.flops_per_token."""
        return cost.flops_per_token(self.config, context)

    def kv_bytes_per_token(self, bytes_per_number: int = 4) -> int:
        """See cost.kv_bytes_per_token."""
        return cost.kv_bytes_per_token(self.config, bytes_per_number)
