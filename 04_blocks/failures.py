"""April's failure gallery: blocks whose parts are each plausible, and together another model.

Most specimens are tiny models of transformers with the same weights in ours, because a wrong variant trains as well as the
right one: only a reference can tell them apart.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common.diagnostics.core import Failure, Specimen, replaced
from common.diagnostics.handles import handles_of
from common.model import attention, mlp, norms, recurrent, transformer
from common.model.config import ModelConfig
from common.model.initialise import initialise
from common.model.positions import rope_frequencies, wide
from common.model.positions import turn as right_turn
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer
from common.pretrained.names import from_transformers

MONTH = "04_blocks"
SHAPE = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=31, n_embd=16, n_layer=3, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
}  # fmt: skip


# --- the healthy specimens --------------------------------------------------------------------------------------------


@cache
def reference(family: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


def rotate_at(x: Tensor, position: int) -> Tensor:
    """With whatever `turn` and `rope_angles` the model has at this moment."""
    config = ModelConfig(vocab_size=9, width=x.shape[-1], heads=1)
    angles = transformer.rope_angles(torch.tensor([position]), rope_frequencies(config)[0])
    return attention.turn(x, *wide(*angles, "half"), "half")


def beside(family: str, change: Callable[[Transformer], None] | None = None) -> Specimen:
    """Ours with the weights of a tiny random model of transformers, and that model as the reference."""
    theirs = reference(family)
    ours = from_transformers(theirs)
    if change:
        change(ours)
    return {
        **handles_of(ours),
        "memory": 2,
        "reference_hidden": handles_of(theirs)["hidden"],
        "rotate_at": rotate_at,
        "expected_parameters": theirs.num_parameters(),
        "load_weights": lambda tensors: loaded(ours.config, tensors),
    }


def loaded(config: ModelConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    made = Transformer(config)
    made.load_state_dict(tensors)
    return made


def healthy() -> Specimen:
    return beside("llama")


def gpt2() -> Specimen:
    return beside("gpt2")


def mixtral() -> Specimen:
    return beside("mixtral")


DEEP = ModelConfig(vocab_size=31, context_length=64, layers=24, width=16, heads=2, init="fan_in", tied=False)


def deep(**changes: Any) -> Specimen:
    """In doubles: without residual paths 24 blocks make of the last digit of a float the third, where kernels differ."""
    return {**handles_of(Transformer(DEEP.but(**changes)).double(), untrained=True), "memory": 2}


def deep_stack() -> Specimen:
    return deep()


def lstm() -> Specimen:
    return {**handles_of(Recurrent("lstm", 31, width=16), untrained=True), "memory": 2}


# --- the bugs ---------------------------------------------------------------------------------------------------------


def cos_and_sin_swapped() -> Iterator[Specimen]:
    return replaced(attention, "turn", lambda x, cos, sin, layout: right_turn(x, sin, cos, layout), healthy)


def other_layout() -> Iterator[Specimen]:
    """The weights are for pairs (i, i + D/2), the code turns (2i, 2i + 1)."""

    def wrong(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
        half = x.shape[-1] // 2
        return right_turn(x, *wide(cos[..., :half], sin[..., half:], "interleaved"), "interleaved")

    return replaced(attention, "turn", wrong, healthy)


def tables_in_bf16() -> Iterator[Specimen]:
    def wrong(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].bfloat16() * frequencies.bfloat16()
        return angles.cos().float(), angles.sin().float()

    return replaced(transformer, "rope_angles", wrong, healthy)


def default_base() -> Iterator[Specimen]:
    def wrong(config: ModelConfig) -> tuple[Tensor, float]:
        return rope_frequencies(config.but(rope_base=10_000.0))

    return replaced(transformer, "rope_frequencies", wrong, healthy)


def exact_gelu() -> Iterator[Specimen]:
    return replaced(mlp, "ACTIVATIONS", {**mlp.ACTIVATIONS, "gelu_tanh": F.gelu}, gpt2)


def unbiased_variance() -> Iterator[Specimen]:
    def wrong(self: norms.Norm, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.epsilon) * self.weight + self.bias

    return replaced(norms.Norm, "forward", wrong, gpt2)


def normed_residual() -> Iterator[Specimen]:
    """norm(x) + f(norm(x)): the stream itself is normed at each branch."""

    def wrong(self: transformer.Block, x: Tensor, context: Any, pad_mask: Any = None) -> tuple[Tensor, None]:
        x = self.attention_norm(x)
        x = x + self.attention(x, context)
        x = self.mlp_norm(x)
        return x + self.mlp(x), None

    return replaced(transformer.Block, "forward", wrong, healthy)


def residual_forgotten() -> Specimen:
    return deep(residual=False)


def branches_unscaled() -> Specimen:
    """The last matrix of each branch starts as large as any other: 48 branches add up."""
    return deep(residual_scale=math.sqrt(2 * DEEP.layers))


def one_norm_for_all() -> Specimen:
    def change(model: Transformer) -> None:
        for block in model.blocks:
            block.mlp_norm = block.attention_norm

    return beside("llama", change)


def uninitialised_parameter() -> Specimen:
    """A parameter that came with a new feature is missing from the table; memory happened to hold zeros."""

    def change(model: Transformer) -> None:
        with torch.no_grad():
            model.blocks[1].mlp_norm.weight.zero_()

    return beside("llama", change)


def initialised_after_loading() -> Specimen:
    def load_weights(tensors: Mapping[str, Tensor]) -> nn.Module:
        made = loaded(reference_config(), tensors)
        initialise(made, seed=0)  # "every new model is initialised"
        return made

    return {**healthy(), "load_weights": load_weights}


def reference_config() -> ModelConfig:
    return from_transformers(reference("llama")).config


def tied_counted_twice() -> Specimen:
    made = beside("gpt2")
    model = made["module"]
    return {**made, "parameter_count": sum(t.numel() for t in model.state_dict().values())}


def dropout_left_on() -> Specimen:
    """torch.no_grad() does not switch dropout off; eval() does."""
    model = Transformer(reference_config().but(dropout=0.1))
    made = {**handles_of(model), "memory": 2}
    model.train()
    return made


def router_not_renormalised() -> Iterator[Specimen]:
    def wrong(self: mlp.MixtureOfExperts, x: Tensor, pad_mask: Tensor | None = None) -> tuple[Tensor, mlp.Routing]:
        out, routing = right_experts(self, x, pad_mask)
        chosen = self.router(x).float().softmax(-1).topk(self.chosen, dim=-1).values
        return out * chosen.sum(-1, keepdim=True), routing

    return replaced(mlp.MixtureOfExperts, "forward", wrong, mixtral)


right_experts = mlp.MixtureOfExperts.forward


def state_never_kept() -> Iterator[Specimen]:
    """Each token is read with the state of the beginning."""

    def wrong(projected: Tensor, state: Tensor, layer: nn.Linear) -> Tensor:
        return recurrent.lstm_step(projected, torch.zeros_like(state), layer)

    return replaced(recurrent, "STEPS", {**recurrent.STEPS, "lstm": (wrong, 4, 2)}, lstm)


# --- the entries ------------------------------------------------------------------------------------------------------

MODEL = ("repeatable", "future-perturbation", "cross-row", "padding-invariance", "cached-equals-uncached")
Entry = partial(Failure, month=MONTH)

FAILURES = [
    Entry(
        id="blocks/cos-sin-swapped",
        title="Cosine and sine change places",
        story="A function takes sin and cos in one order and is called in the other. Products still depend on distance "
        "in some way, so a model trained with it learns.",
        source="rasbt/LLMs-from-scratch#381",
        symptom="own models train; imported weights speak in tongues",
        fix="Position 0 must turn nothing: test that.",
        broken=cos_and_sin_swapped,
        healthy=healthy,
        probe="rotation",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/rope-layout",
        title="Rotary pairs in the other memory layout",
        story="The paper turns neighbouring coordinates, Hugging Face's Llama those half a head apart. Files exist in "
        "both layouts, and nothing in a file says which.",
        source="huggingface/transformers#25199, rasbt/LLMs-from-scratch#747",
        symptom="the first tokens are fine, then it drifts into garbage",
        fix="Permute the rows of the query and key matrices, or turn in the layout of the file.",
        broken=other_layout,
        healthy=healthy,
        probe="layer-parity",
        blind_spots=("rotation", *MODEL),
    ),
    Entry(
        id="blocks/bf16-rope",
        title="Rotary tables in bf16",
        story="bf16 has eight bits for a number: 256 and 257 are the same position. Angles are wrong by whole turns "
        "far out.",
        source="EleutherAI/gpt-neox#1003 (fp16), huggingface/transformers#29285",
        symptom="long contexts lose order; short ones look right",
        fix="Compute angles, cosines and sines in fp32.",
        broken=tables_in_bf16,
        healthy=healthy,
        probe="rotation",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/rope-base",
        title="The default base instead of the model's",
        story="Llama 3 turns with a base of 500,000. Code that knows 10,000 reads its first tokens well and its last "
        "ones badly.",
        source="pytorch-labs/gpt-fast#181",
        symptom="short prompts fluent, long ones gibberish",
        fix="Read the base from the config, and compare hidden states at length.",
        broken=default_base,
        healthy=healthy,
        probe="layer-parity",
        blind_spots=("rotation", *MODEL),
    ),
    Entry(
        id="blocks/gelu-variant",
        title="The exact GELU for the approximate one",
        story="GPT-2 was trained with the tanh form. The exact one differs by up to 5e-4, which tolerances of 1e-3 let "
        "pass.",
        source="Lightning-AI/litgpt#1004, kyutai-labs/pocket-tts#278",
        symptom="none that anybody would see",
        fix="Compare in fp32 with a tolerance that the difference exceeds.",
        broken=exact_gelu,
        healthy=gpt2,
        probe="layer-parity",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/unbiased-variance",
        title="LayerNorm with the unbiased standard deviation",
        story="std() divides by C - 1 unless told otherwise. At width 8 the result is smaller by a factor of 0.935, at "
        "width 768 by 0.9993; and epsilon stands outside the root.",
        source="harvardnlp/annotated-transformer, codertimo/BERT-pytorch#30",
        symptom="trains as well; imported weights lose a little everywhere",
        fix="Divide by C, epsilon under the root.",
        broken=unbiased_variance,
        healthy=gpt2,
        probe="layer-parity",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/normed-residual",
        title="The norm is applied to the residual path",
        story="norm(x) + f(norm(x)) instead of x + f(norm(x)): one variable is reused, and the stream that should run "
        "through untouched is rescaled in each block.",
        source="Howuhh/faster-trajectory-transformer#3",
        symptom="trains, worse with depth",
        fix="Norm a copy.",
        broken=normed_residual,
        healthy=healthy,
        probe="layer-parity",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/no-residual",
        title="A block without its residual path",
        story="x = f(norm(x)): nothing runs through. Two such layers train, twenty do not.",
        source="kyegomez/BitNet#32, znxlwm/UGATIT-pytorch#32",
        symptom="shallow models are a little worse, deep ones stay at the byte frequencies",
        fix="x + f(norm(x)), and a look at gradients by depth.",
        broken=residual_forgotten,
        healthy=deep_stack,
        probe="gradient-by-depth",
        blind_spots=("loss-at-init", *MODEL),
    ),
    Entry(
        id="blocks/branches-unscaled",
        title="Branches are not made smaller with depth",
        story="GPT-2 divides the initial weights at the end of each branch by the square root of their number. Without "
        "that, the stream grows with depth and later blocks weigh less.",
        source="Radford et al. 2019, section 2.3",
        symptom="needs a longer warm-up or a lower rate",
        fix="Scale by 1 / sqrt(2 · layers), or start branches at zero.",
        broken=branches_unscaled,
        healthy=deep_stack,
        probe="gradient-by-depth",
        blind_spots=("loss-at-init", "overfit-one-batch", *MODEL),
    ),
    Entry(
        id="blocks/shared-norm",
        title="One norm serves two places",
        story="The same module is used before attention and before the MLP. It has half the parameters and trains well.",
        source="allenai/OLMo#222",
        symptom="a parameter count that nobody compared",
        fix="Compare the number of parameters with an independent count.",
        broken=one_norm_for_all,
        healthy=healthy,
        probe="parameter-count",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/uninitialised",
        title="A parameter that nobody initialised",
        story="Models are made on the meta device and filled by a function that names its parts. A part that was added "
        "later keeps what memory held: often zeros, which look like a choice.",
        source="karpathy/nanochat#686, Lightning-AI/litgpt#1150",
        symptom="one branch is silent",
        fix="Fail on a parameter that no rule covers; look for parameters that do not move.",
        broken=uninitialised_parameter,
        healthy=healthy,
        probe="parameters-move",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/initialised-after-loading",
        title="Weights are loaded, then initialised",
        story="A helper initialises every model that is made, and is called on one that has just been loaded.",
        source="huggingface/transformers#46620, #45591",
        symptom="fine-tuning starts at the loss of a random model",
        fix="Initialise in the constructor, load afterwards, and compare.",
        broken=initialised_after_loading,
        healthy=healthy,
        probe="weights-survive",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/tied-miscounted",
        title="A tied matrix is counted wrongly",
        story="Embedding and head share one matrix. Counting names counts it twice; subtracting it by hand after a "
        "library has already left out the copy loses it.",
        source="pytorch/torchtitan#3225",
        symptom="parameters, FLOPs and utilisation off by a quarter for a small model",
        fix="Count distinct tensors.",
        broken=tied_counted_twice,
        healthy=gpt2,
        probe="parameter-count",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/dropout-left-on",
        title="Dropout stays on in evaluation",
        story="torch.no_grad() is taken for evaluation mode. It is not: dropout goes on dropping.",
        source="ipolharvard/ethos-ares#20, facebookresearch/vision-language-models-are-bows#17",
        symptom="evaluation a little worse than training, and different each time",
        fix="model.eval(), and a probe that asks twice.",
        broken=dropout_left_on,
        healthy=healthy,
        probe="repeatable",
        blind_spots=("parameters-move",),
    ),
    Entry(
        id="blocks/router-not-renormalised",
        title="The chosen experts' weights do not sum to one",
        story="The softmax runs over all experts, the best two are taken, and their shares are used as they are. Some "
        "models were trained so, Mixtral was not; the field that says so is easily passed over.",
        source="pytorch/torchtitan#1448, lablup/mlxcel#391",
        symptom="MLP outputs too small by a factor that varies from token to token",
        fix="Renormalise if the config says so; compare with the reference.",
        broken=router_not_renormalised,
        healthy=mixtral,
        probe="layer-parity",
        blind_spots=MODEL,
    ),
    Entry(
        id="blocks/frozen-state",
        title="A recurrent state that is never updated",
        story="Each step starts from the state of the beginning. The model is a bigram with extra steps, and its loss "
        "falls.",
        source="karpathy/makemore, pull request 3",
        symptom="loss falls to that of a bigram and stops",
        fix="Keep the state; ask whether a token two places back matters.",
        broken=state_never_kept,
        healthy=lstm,
        probe="past-matters",
        blind_spots=("repeatable", "future-perturbation", "cross-row", "loss-at-init", "entropy-floor"),
    ),
]
