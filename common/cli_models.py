"""The commands that talk to a model: doctor, sample, chat, parity, evaluate. `common/cli.py` offers them.

Torch is imported inside of each, so that the help answers at once.
"""

import dataclasses
import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import tyro

from common.foundation import months as calendar

Size = Literal["tiny", "small", "medium", "large"]
Positional = tyro.conf.Positional


def finish(value: Any, as_json: bool) -> None:
    """With --json, the result as one JSON object on the last line."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(one) for key, one in item.items()}
        if isinstance(item, list | tuple):
            return [finite(one) for one in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    if as_json:
        print(json.dumps(finite(value), allow_nan=False))


def doctor(hf: str | None = None, size: Size = "small", run: Path | None = None, json: bool = False) -> None:
    """Point the model probes at a model: a Hugging Face folder or hub name, or our latest one.

    Args:
        hf: what `AutoModelForCausalLM.from_pretrained` accepts.
        size: size of our run, without --hf.
        run: a run directory, instead of the one of that size.
    """
    from common.diagnostics.doctor import doctor as examine

    text = "Now is the winter of our discontent\nMade glorious summer by this sun of York; "
    if hf is not None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(hf).eval()
        vocab_size = model.config.vocab_size
        try:
            encode = AutoTokenizer.from_pretrained(hf).encode
        except (OSError, ValueError):  # a folder without a tokenizer: random ids, and the report says so
            encode = None
    else:
        engine = text_engine(None, size, run)
        model, vocab_size, encode = engine.model, engine.model.vocab_size, engine.encode
    ids = None
    if encode is not None:
        import torch

        tokens = (encode(text) * 4)[:64]
        ids = torch.tensor([tokens[i : i + 16] for i in range(0, 64, 16)])
    found = examine(lambda ids: model(ids).logits, vocab_size, ids=ids)
    print(found)
    finish({"healthy": found.healthy, "readings": {n: r.value for n, r in found.readings.items()}}, json)
    if not found.healthy:
        sys.exit(1)


def sample(
    prompt: Positional[str] = "ROMEO:\\n",
    month: int | None = None,
    max_tokens: int = 300,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    n: int = 1,
    seed: int = 0,
    size: Size = "small",
    run: Path | None = None,
    json: bool = False,
) -> None:
    """Let a text model continue a prompt; one sample is shown as it is written.

    Args:
        prompt: where it begins; \\n is a new line.
        month: whose model, 1 (an n-gram) or 5 (the base model); by default the latest that has been run at that size.
        run: a run directory, instead of the one of that month and size.
    """
    from common.generation.sampling import SamplingParams

    engine = text_engine(month, size, run)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, n=n, seed=seed, logprobs=True
    )
    text = prompt.replace("\\n", "\n")
    if n == 1 and not json:
        print(text, end="", flush=True)
        for piece in engine.stream(engine.encode(text), params):
            print(piece, end="", flush=True)
        print()
        return
    (completions,) = engine.generate([engine.encode(text)], params)
    for completion in completions:
        print(text + completion.text, end="\n\n")
    finish([dataclasses.asdict(completion) for completion in completions], json)


def chat(
    model: str = "smollm2",
    prompt: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    system: str | None = None,
    json: bool = False,
) -> None:
    """Talk with a model; it writes as it thinks. An empty line or Ctrl-D ends, Ctrl-C breaks a reply off, /new starts anew.

    Args:
        model: smollm2, a run of ours, a GGUF file, a Hugging Face folder or hub name.
        prompt: one message; the reply is printed and that is all.
        system: the first message of the conversation.
    """
    from common.foundation.run import announce
    from common.generation.conversation import Conversation, chat_engine
    from common.generation.sampling import SamplingParams
    from common.pretrained.load import load_pretrained

    loaded = load_pretrained(model)
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer.json: a conversation needs one")
    if loaded.chat_template is None:
        announce(f"{model} has no chat template: it continues your text, and nobody has taught it to answer")
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    talk = Conversation(chat_engine(loaded.model, loaded.tokenizer, loaded.chat_template))
    talk.messages += [{"role": "system", "content": system}] if system else []

    def answer(text: str) -> None:
        try:
            for piece in talk.reply(text, params):
                print(piece, end="", flush=not json, file=sys.stderr if json else sys.stdout)
        except KeyboardInterrupt:
            announce(" (broken off)")
        print(file=sys.stderr if json else sys.stdout)

    if prompt is not None:
        answer(prompt)
        finish(talk.messages, json)
        return
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if not text:
            break
        if text == "/new":
            talk.messages = [{"role": "system", "content": system}] if system else []
            continue
        try:
            answer(text)
        except ValueError as error:
            announce(f"error: {error}")
    finish(talk.messages, json)


def parity(hf: str = "smollm2", tokens: int = 256, json: bool = False) -> None:
    """Compare a model in our code with the same files in transformers: stage by stage, ids, greedy text.

    Args:
        hf: a Hugging Face folder or hub name, a GGUF file, or smollm2.
        tokens: length of the row that is compared; long rows show what short ones hide.
    """
    from common.foundation.run import announce
    from common.pretrained.load import load_pretrained
    from common.studies import platform

    try:
        loaded = load_pretrained(hf)
    except ValueError as error:  # weights can be compared without a tokenizer that we read
        loaded = load_pretrained(hf, tokenizer=False)
        announce(f"compared on random ids: {error}")
    theirs = platform.reference_of(hf)
    found = platform.forward_parity(loaded, theirs.model, tokens=tokens)
    print(found)
    agreed = {"parity": found.first is None, "first": found.first and found.first.stage.name, "cause": found.cause}
    if loaded.tokenizer is not None and theirs.tokenizer is not None:
        texts = platform.strange_texts(2000)
        odd = platform.differing_ids(loaded.tokenizer, theirs.tokenizer, texts)
        print(
            f"tokenizer: {len(odd)} of {len(texts):,} strange strings have other ids"
            + (f", such as {odd[0]!r}" if odd else "")
        )
        same, _ = platform.greedy_parity(loaded, theirs.model, platform.PROMPTS[:5], tokens=50)
        print(f"greedy text: {sum(same)} of {len(same)} prompts the same for 50 tokens")
        agreed |= {"strings": len(odd), "prompts": same}
    finish({**agreed, "logits": found.logits, "stages": {row.stage.name: row.forced for row in found.rows}}, json)
    if found.first is not None:
        sys.exit(1)


def evaluate(
    strategy: Literal["columns", "ask"] = "columns",
    n: int = 200,
    rule: str = "whole",
    normalise: str = "number",
    split: Literal["train", "validation", "test"] = "test",
    seed: int = 0,
    traces: Path | None = None,
    size: Size = "small",
    run: Path | None = None,
    json: bool = False,
) -> None:
    """Solve and grade sums with the latest models.

    Args:
        traces: a file for the traces; an interrupted evaluation continues from it.
        run: a run directory, instead of the one of that size.
    """
    from common.evaluation.runner import evaluate as measure
    from common.evaluation.task import Addition
    from common.reasoning.strategies import Ask, Columns

    task = Addition(rule=rule, normalise=normalise)
    chosen = Columns() if strategy == "columns" else Ask(task)
    found = measure(task, chosen, trained(strategy, size, run), n, split=split, seed=seed, trace_path=traces)
    print(found)
    finish({"accuracy": found.accuracy.as_dict(), "unparsed": found.unparsed, "cost": found.cost}, json)


def text_engine(month: int | None, size: str, run: Path | None) -> Any:
    """An engine on the text model of a month: of that run, or of the month's own, made now if there is none."""
    from common.foundation.run import ensure, official
    from common.generation.engine import Engine
    from common.training.checkpoint import load_with_tokenizer

    places = {"01_spine": "text", "05_pretraining": "model"}
    if run is not None and month is not None:
        raise ValueError("give --month or --run, not both: a run belongs to its month")
    if run is None:
        if month is None:
            month = 5 if official("05_pretraining", size) else 1
        folder = calendar.month(month).folder
        if folder not in places:
            raise ValueError(f"{folder} has no text model; choose --month 1 or 5")
        with redirect_stdout(sys.stderr):
            run = official(folder, size) or ensure(folder, size)  # at once, also where the code has changed since
    name = next((name for name in places.values() if (run / name / "checkpoint.json").exists()), "model")
    return Engine(*load_with_tokenizer(run / name))


def trained(name: str, size: str, run: Path | None) -> Any:
    """An engine on a checkpoint of a January run: that one, or the one of the size, made now if there is none."""
    from common.foundation.run import ensure
    from common.generation.engine import Engine
    from common.training.checkpoint import load_with_tokenizer

    with redirect_stdout(sys.stderr):
        folder = run or ensure("01_spine", size)
    return Engine(*load_with_tokenizer(folder / name))
