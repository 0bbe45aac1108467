"""What is measured or tried in a process of its own.

    python -m tests.pretrained.apart memory FOLDER                   peak of memory while loading / size of the weights
    python -m tests.pretrained.apart damage COUNT SEED SOURCE...     COUNT copies of each checkpoint, damaged at random

Both print one line of JSON.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import gguf
import safetensors.torch
import torch

from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.pretrained.configs import config_to_hf
from common.pretrained.load import load_pretrained
from common.pretrained.names import GGUF_LLAMA, tensors_to_hf, their_name

LARGE = ModelConfig(vocab_size=2048, layers=6, width=512, heads=8, hidden_width=1408, tied=False)
SMALL = LARGE.but(layers=1, width=64, hidden_width=96)


def status(field):
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def finish(writer):
    """What a GGUFWriter has been given goes to its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(folder):
    """Each load in a child, so that none uses what another has freed."""
    in_a_child(write, folder / "small", SMALL)
    in_a_child(write, folder / "large", LARGE)
    found = {name: in_a_child(peak, folder, name) for name in ("", "F32.gguf", "Q8_0.gguf")}
    shutil.rmtree(folder / "large")
    print(json.dumps({name or "folder": ratio for name, ratio in found.items()}))


def in_a_child(work, *args):
    """What `work` returns there."""
    reader, writer = os.pipe()
    if not os.fork():
        try:
            os.write(writer, json.dumps(work(*args)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = json.loads(answer.read())
    os.wait()
    return found


def peak(folder, name):
    for _ in range(2):  # what is set up or mapped once is no part of the measure
        load_pretrained(folder / "small" / name, tokenizer=False)
    gc.collect()
    before = status("VmRSS")
    model = load_pretrained(folder / "large" / name, tokenizer=False).model
    return (status("VmHWM") - before) / (4 * model.num_parameters())


def write(folder, config):
    folder.mkdir()
    with torch.device("meta"):
        model = Transformer(config)
    weights = {name: 0.02 * torch.randn(p.shape) for name, p in model.named_parameters()}
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    safetensors.torch.save_file(tensors_to_hf(weights, config), folder / "model.safetensors")
    for kind in ("F32", "Q8_0"):
        writer = gguf.GGUFWriter(str(folder / f"{kind}.gguf"), "llama")
        writer.add_context_length(config.context_length)
        writer.add_embedding_length(config.width)
        writer.add_block_count(config.layers)
        writer.add_feed_forward_length(config.hidden)
        writer.add_head_count(config.heads)
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
        for name, weight in weights.items():
            form = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
            writer.add_tensor(their_name(name, GGUF_LLAMA), gguf.quants.quantize(weight.numpy(), form), raw_dtype=form)
        finish(writer)


# --- damage -----------------------------------------------------------------------------------------------------------

ROOM, SECONDS = 1 << 30, 5  # what a load may take beyond what the process has: address space, CPU time
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
ODD = [None, True, False, "", "x", "\ud800", -1, 0, 1, 0.5, 1e300, 10**9, 2**63, 10**40, float("inf"), float("nan"), [], {},
       [1], {"a": 1}, [[[]]], "../x.safetensors", "9" * 30]  # fmt: skip


class TooLong(BaseException):
    """No part of the library catches it."""


def damage(count, seed, sources):
    """What became of the copies; `failures` has those that neither were refused nor gave a whole model."""
    import resource  # not everywhere

    for source in sources:
        load_pretrained(source)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM, resource.RLIM_INFINITY))

    def ring(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, ring)
    found = {}
    for source in sources:
        rng, told = random.Random(seed), {"refused": 0, "loaded": 0, "slowest": 0.0, "failures": []}
        for _ in range(count):
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / source.name
                shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
                done = [damaged_part(copy, rng) for _ in range(rng.choice([1, 1, 2]))]
                try_to_load(copy, done, told)
        found[source.name] = told
    print(json.dumps(found))


def damaged_part(copy, rng):
    """What was done to which file."""
    parts = (
        sorted(path for path in copy.iterdir() if path.name != "generation_config.json") if copy.is_dir() else [copy]
    )
    path = rng.choice(parts)
    raw, what = damaged(path.read_bytes(), path.suffix, rng)
    path.write_bytes(raw)
    return f"{path.name}: {what}"


def try_to_load(copy, done, told):
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        check(load_pretrained(copy))
        told["loaded"] += 1
    except (ValueError, FileNotFoundError) as error:
        told["refused"] += 1
        if str(copy) not in str(error):
            told["failures"].append([done, f"does not name the file: {error!r}"])
    except BaseException:
        told["failures"].append([done, traceback.format_exc()[-1500:]])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    told["slowest"] = max(told["slowest"], time.process_time() - start)


@torch.no_grad()
def check(found):
    """Whole: every parameter of the model that the config describes, finite, in memory; and it runs."""
    model, tokenizer, template = found
    with torch.device("meta"):
        wanted = dict(Transformer(model.config).named_parameters())
    made = dict(model.named_parameters())
    if made.keys() != wanted.keys() or any(made[name].shape != p.shape for name, p in wanted.items()):
        raise AssertionError("parameters are missing, or have other shapes")
    if any(p.is_meta or not p.isfinite().all() for p in made.values()):
        raise AssertionError("a parameter is not there, or not finite")
    if model(torch.tensor([[0, 1]])).logits.shape != (1, 2, model.vocab_size):
        raise AssertionError("the logits have another shape")
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise AssertionError("the tokenizer makes ids that the model does not have")
    if not isinstance(template, str | None):
        raise AssertionError(f"the chat template is {template!r}")


def damaged(raw, suffix, rng):
    """(other bytes, what was done to them)."""
    if len(raw) < 100:  # little is left of an earlier cut
        return raw, "nothing"
    head = header_of(raw, suffix)
    kinds = [flip, flip, cut, extend, double, extreme, extreme]
    kinds += {".json": [odd_json] * 7, ".safetensors": [odd_header] * 5, ".gguf": [odd_entry] * 5}.get(suffix, [])
    kind = rng.choice(kinds)
    return kind(bytearray(raw), head if rng.random() < 0.8 else len(raw), rng), kind.__name__


def header_of(raw, suffix):
    if suffix == ".safetensors":
        return min(8 + struct.unpack("<Q", raw[:8])[0], len(raw))
    if suffix == ".gguf":
        return min(max(raw.rfind(b"output_norm"), raw.rfind(b"blk.1.")) + 64, len(raw))
    return len(raw)


def flip(raw, head, rng):
    for _ in range(rng.choice([1, 1, 3, 30])):
        raw[rng.randrange(head)] = rng.randrange(256)
    return bytes(raw)


def cut(raw, head, rng):
    return bytes(raw[: rng.randrange(head)])


def extend(raw, head, rng):
    return bytes(raw) + rng.randbytes(rng.choice([1, 32, 5000]))


def double(raw, head, rng):
    start = rng.randrange(head)
    return bytes(raw[: start + rng.randrange(1, 400)] + raw[start:])


def extreme(raw, head, rng):
    start = rng.randrange(head - 8)
    raw[start : start + 8] = struct.pack("<Q", rng.choice(EXTREMES))
    return bytes(raw)


def odd_entry(raw, head, rng):
    """Behind the name of an entry of a GGUF file: its type, or the beginning of its value, is another."""
    name = rng.choice(
        re.findall(rb"(?:general|llama|qwen3|tokenizer)\.[a-z_.]+|blk\.[a-z_.0-9]+|token_embd\.weight", bytes(raw))
    )
    start = raw.find(name) + len(name) + rng.choice([0, 4, 8, 12, 20])
    new = struct.pack("<I", rng.randrange(14)) if rng.random() < 0.5 else struct.pack("<Q", rng.choice(EXTREMES))
    raw[start : start + len(new)] = new
    return bytes(raw)


def odd_header(raw, head, rng):
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    header = odd_json(raw[8:length], 0, rng)
    return struct.pack("<Q", len(header)) + header + bytes(raw[length:])


def odd_json(raw, head, rng):
    """A value somewhere in it is another, or missing."""
    try:
        whole = json.loads(bytes(raw))
    except ValueError:
        return bytes(raw)
    place = whole
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            if rng.random() < 0.25:
                del place[key]
            else:
                place[key] = rng.choice(ODD)
            break
        place = place[key]
    return json.dumps(whole).encode()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "memory":
        memory(Path(sys.argv[2]))
    else:
        damage(int(sys.argv[2]), int(sys.argv[3]), [Path(source) for source in sys.argv[4:]])
