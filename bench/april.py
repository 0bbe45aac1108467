"""Our forward and training step against transformers' at equal shape and weights: ratios within one run, fp32, this machine.

    python bench/april.py

The shapes have about ten million parameters. Measured in pairs, ours and theirs in turn, so that both meet the same machine;
a ratio above 1 means that ours is faster. The latent form and a mixture of experts stand beside, without a rival.
"""

import json
import statistics
import warnings

import torch
import transformers
from timing import in_turn

from common.pretrained.names import from_transformers
from common.training.loss import language_model_loss

SHAPES = {
    "gpt2": transformers.GPT2Config(
        vocab_size=4096, n_embd=320, n_layer=7, n_head=5, n_positions=256, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=4096, hidden_size=320, intermediate_size=864, num_hidden_layers=7, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip


def main():
    torch.manual_seed(0)
    found = {}
    for name, config in SHAPES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        ours = from_transformers(theirs)
        ids = torch.randint(4096, (8, 257))
        inputs, targets = ids[:, :-1], ids[:, 1:]

        def step(model, inputs=inputs, targets=targets):
            logits = model(inputs).logits
            language_model_loss(logits, targets).mean.backward()

        def forward(model, inputs=inputs):
            with torch.no_grad():
                model(inputs)

        theirs.config.use_cache = False
        row = {"parameters": ours.num_parameters()}
        for label, work in (("forward", forward), ("forward and backward", step)):
            pairs = in_turn(
                lambda work=work, ours=ours: work(ours), lambda work=work, theirs=theirs: work(theirs), repeat=9
            )
            ratios = [there / here for here, there in pairs]
            row[f"{label}: theirs / ours, median"] = round(statistics.median(ratios), 3)
            row[f"{label}: theirs / ours, range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            row[f"{label}: our tokens a second"] = round(inputs.numel() / min(here for here, _ in pairs))
        found[name] = row
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
