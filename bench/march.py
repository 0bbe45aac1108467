"""Naive against fused attention, and decoding with a cache against recomputing: ratios within one run, this machine.

python bench/march.py
"""

import json
import statistics

import torch
from timing import in_turn

from common.model.attention import attend, attend_naive
from common.model.config import ModelConfig
from common.model.masks import causal_mask
from common.model.transformer import Transformer


def ratio(slow, fast, repeat=7):
    pairs = in_turn(slow, fast, repeat=repeat)
    found = [a / b for a, b in pairs]
    return {"median": round(statistics.median(found), 2), "range": [round(min(found), 2), round(max(found), 2)]}


def step(form, tensors, **more):
    out = form(*tensors, **more)
    (out[0] if isinstance(out, tuple) else out).sum().backward()


def main():
    torch.manual_seed(0)
    found = {}
    for length in (64, 256, 1024):
        tensors = [torch.randn(4, 8, length, 64, requires_grad=True) for _ in range(3)]
        mask = causal_mask(length)[None, None]
        with torch.no_grad():
            forward = ratio(lambda t=tensors: attend_naive(*t), lambda t=tensors: attend(*t))
        found[f"{length} tokens"] = {
            "forward: naive / fused": forward,
            "forward and backward: naive / fused": ratio(
                lambda t=tensors: step(attend_naive, t), lambda t=tensors: step(attend, t)
            ),
            "forward and backward, explicit mask: naive / fused": ratio(
                lambda t=tensors, m=mask: step(attend_naive, t, mask=m),
                lambda t=tensors, m=mask: step(attend, t, mask=m),
            ),
            "scores that are never stored, MiB": round(4 * 8 * length * length * 4 / 2**20, 1),
        }
    model = Transformer(ModelConfig.preset("small", context_length=512)).eval()
    prompt = torch.randint(4096, (4, 128))

    @torch.inference_mode()
    def recompute():
        ids = prompt
        for _ in range(64):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids

    @torch.inference_mode()
    def cached():
        cache, new, ids = model.new_cache(4, 192), prompt, [prompt]
        for _ in range(64):
            new = model(new, cache=cache).logits[:, -1:].argmax(-1)
            ids.append(new)
        return torch.cat(ids, dim=1)

    assert torch.equal(recompute(), cached())
    found["64 tokens after a prompt of 128, batch 4: recomputed / cached"] = ratio(recompute, cached, repeat=3)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
