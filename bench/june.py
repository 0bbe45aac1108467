"""SmolLM2 decoded by our engine and by transformers' `generate`: tokens a second, ratios within one run.

    python bench/june.py

Greedy, the same prompts, the same number of new tokens, the same number format, prefill included; measured in pairs, in
turn. Ours is the engine with packed matrices (common/generation/prepacked.py), and once more without them.
`share of the bandwidth` is bytes of weights read for each step, over the bytes a second that this machine sums: at batch 1
decoding can be no faster than reading the weights. Also: loading the file, and the first token of a conversation's next turn
with and without what is remembered of the turns before.
"""

import json
import statistics
import time
import warnings

import torch
from timing import in_turn

from common.generation.conversation import Conversation, chat_engine
from common.generation.engine import Engine
from common.generation.prepacked import prepacked
from common.generation.sampling import SamplingParams
from common.pretrained.load import load_pretrained
from common.studies.platform import PASSAGE, reference_of

TOKENS = 48
REPEAT = 3


def bandwidth():
    """Bytes a second at which this machine sums numbers, the best of several."""
    numbers, best = torch.zeros(100_000_000), 0.0
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def ours(engine, prompts):
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    made = engine.generate(prompts, params)
    assert all(len(completion.ids) == TOKENS for (completion,) in made)


def theirs(model, prompts):
    rows = torch.tensor(prompts)
    with torch.inference_mode():
        made = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                              do_sample=False, pad_token_id=0)  # fmt: skip
    assert made.shape[1] == rows.shape[1] + TOKENS


def ratio(first, second):
    """Median and range of second / first, and the best time of the first."""
    pairs = in_turn(first, second, repeat=REPEAT)
    ratios = [there / here for here, there in pairs]
    return {
        "median": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
        "our tokens a second": None,
    }, min(here for here, _ in pairs)


def decoding(loaded, reference, dtype):
    model, found = loaded.model.to(dtype), {}
    fast, plain = Engine(prepacked(model), loaded.tokenizer, ends=()), Engine(model, loaded.tokenizer, ends=())
    reference = reference.to(dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for batch in (1, 16):
        ids = loaded.tokenizer.encode(PASSAGE)[:24]
        prompts = [[*ids[:-1], 300 + i] for i in range(batch)]
        against, best = ratio(lambda p=prompts: ours(fast, p), lambda p=prompts: theirs(reference, p))
        against["our tokens a second"] = round(batch * TOKENS / best)
        unpacked, _ = ratio(lambda p=prompts: ours(fast, p), lambda p=prompts: ours(plain, p))
        found[f"batch {batch}"] = {"theirs / ours": against, "unpacked / packed": unpacked["median"]}
        if batch == 1:
            found["share of the bandwidth, batch 1"] = round(weights * TOKENS / best / bandwidth(), 2)
    return found


def next_turn(loaded):
    """Seconds to the first piece of a reply after a long conversation, with and without memory."""

    def turn(remember):
        engine = chat_engine(loaded.model, loaded.tokenizer, loaded.chat_template)
        if not remember:
            engine.prefix = None
        talk = Conversation(engine)
        talk.messages = [{"role": "user", "content": PASSAGE * 4}]
        params = SamplingParams(temperature=0, max_tokens=8)
        "".join(talk.reply("Why?", params))
        start = time.perf_counter()
        next(talk.reply("Go on.", params))
        return time.perf_counter() - start

    pairs = [(turn(True), turn(False)) for _ in range(3)]
    return {"without / with memory": round(statistics.median(b / a for a, b in pairs), 1),
            "seconds with": round(min(a for a, _ in pairs), 2)}  # fmt: skip


def main():
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    loaded = load_pretrained("smollm2")
    here = time.perf_counter() - start
    start = time.perf_counter()
    reference = reference_of("smollm2").model
    there = time.perf_counter() - start
    found = {"loading, theirs / ours": round(there / here, 1), "loading, our seconds": round(here, 1)}
    found["gigabytes a second that are read"] = round(bandwidth() / 1e9, 1)
    found["next turn of a conversation"] = next_turn(loaded)
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = decoding(loaded, reference, dtype)
    print(json.dumps(found | {"threads": torch.get_num_threads()}, indent=2))


if __name__ == "__main__":
    main()
