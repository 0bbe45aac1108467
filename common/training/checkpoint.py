"""A checkpoint: tensors in safetensors, everything else in JSON, and the tokenizer's fingerprint in both directions.

    <folder>/model.safetensors      the tensors
    <folder>/checkpoint.json        what kind of model, which tokenizer, the hash of the tensors; written last

This is a model to use. A training in progress is more than its model: see snapshots.py. Nothing is ever unpickled.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from common.foundation.files import atomic_path, read_json, sha256_file, write_json
from common.model.initialise import without_storage
from common.model.registry import model_class, model_kinds
from common.tokenization.bpe import BPETokenizer
from common.tokenization.byte import ByteTokenizer
from common.tokenization.protocol import Tokenizer

Only = Callable[[str], bool] | Collection[str]  # which tensors to save: a predicate on the name, or the names


def describe_model(model: Any) -> dict[str, Any]:
    """What makes a model of this kind and shape, as plain values. `build_model` is the way back.

    Raises:
        ValueError: the class cannot describe itself, or loading would give another class.
    """
    if not hasattr(model, "describe"):
        raise ValueError(
            f"a {type(model).__name__} cannot be saved: it has no describe(). These kinds can: {', '.join(model_kinds())}"
        )
    described = model.describe()
    # torch gives a sharded model a class of its own, with the model's class behind it; that one counts.
    own = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed."))
    made = model_class(described["kind"])
    if made is not own:
        raise ValueError(
            f"a {own.__name__} describes itself as {described['kind']!r} and would be loaded as a "
            f"{getattr(made, '__name__', 'class that is not registered')}: register the class (common/model/registry.py)"
        )
    return described


def build_model(described: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> Any:
    """A model of that description with these tensors, or ValueError that says what differs."""
    kind = described["kind"]
    made = model_class(kind) if isinstance(kind, str) else None
    if made is None:
        raise ValueError(f"{where} holds a model of kind {kind!r}; there are {', '.join(model_kinds())}")
    model = made.from_description(described)
    if hasattr(model, "resize"):  # counts, whose number only the tensors know
        model.resize({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    load_tensors(model, tensors, where)
    return model.eval()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: parameters, tied ones under their first name alone, and persistent buffers."""
    kept = model.state_dict()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def trainable_names(model: nn.Module) -> set[str]:
    """The names of the parameters that are not frozen."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str, *, some: bool = False) -> None:
    """Fill every tensor of the model, strictly; with `some`, those that are given. Raises ValueError before any changes."""
    mine = named_tensors(model)
    missing = [] if some else sorted(set(mine) - set(tensors))
    unexpected = sorted(set(tensors) - set(mine))
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(p.shape)} in the model"
        for name, p in mine.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    if missing or unexpected or shapes:  # gallery: pretraining/compiled-names
        said = [_some(missing, "missing from the file"), _some(unexpected, "unknown to the model"), *shapes[:3]]
        raise ValueError(f"{where} does not fit this model: {'; '.join(filter(None, said))}")
    for name, tensor in tensors.items():
        mine[name].copy_(tensor)


def _some(names: list[str], what: str) -> str:
    return f"{len(names)} {what}, such as {names[0]}" if names else ""


def save_checkpoint(
    folder: str | Path,
    model: Any,
    tokenizer: Tokenizer,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    only: Only | None = None,
) -> Path:
    """Write the model, atomically: a folder without a matching checkpoint.json is not a checkpoint.

    Args:
        tensors: its tensors by name, if they are not in `model` as they should be saved (gathered from shards).
        only: save these tensors alone, for example the adapters of a frozen model (`trainable_names(model)`). The others are
            the *base*: the checkpoint keeps its fingerprint, and loads onto a model that has it, see `load_checkpoint`.
    Raises:
        ValueError: the model cannot be made again from its description: it has no describe(), or modules have been replaced
            and `only` is not given; or `only` names a tensor that is not there.
    """
    folder, described = Path(folder), describe_model(model)
    tensors = dict(named_tensors(model) if tensors is None else tensors)
    entry: dict[str, Any] = {"format": 1, "model": described, "tokenizer": tokenizer.fingerprint}
    if only is None:
        _refuse_replaced_modules(described, tensors)
    else:
        chosen = {name for name in tensors if only(name)} if callable(only) else set(only)
        if unknown := sorted(chosen - set(tensors)) or ([] if chosen else ["nothing"]):
            raise ValueError(f"only= asks for {unknown[0]}, which this {type(model).__name__} does not have")
        entry["base"] = base_fingerprint(model, chosen)
        tensors = {name: tensors[name] for name in tensors if name in chosen}
    with atomic_path(folder / "model.safetensors") as temporary:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        safetensors.torch.save_file(plain, temporary)
    write_json(folder / "checkpoint.json", {**entry, "sha256": sha256_file(folder / "model.safetensors")})
    return folder


def _refuse_replaced_modules(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a model of this description has other tensors: what is written could not be loaded again."""
    with without_storage():
        plain = set(named_tensors(model_class(described["kind"]).from_description(described)))
    more, less = sorted(set(tensors) - plain), sorted(plain - set(tensors))
    if more or less:
        said = "; ".join(filter(None, [_some(more, "that it would not have"), _some(less, "that it would lack")]))
        raise ValueError(
            f"this model could not be loaded again: its description is that of a plain {described['kind']}, and it has "
            f"tensors {said}. Save adapters with only=trainable_names(model); save a prepacked model before it is prepacked."
        )


def load_checkpoint(folder: str | Path, tokenizer: Tokenizer, *, onto: nn.Module | None = None) -> Any:
    """Read a model back, or refuse.

    Args:
        onto: a model to fill instead of a new one. Needed for a checkpoint that was saved with `only`: build the same base,
            put the same (untrained) adapters or head on it, and give it here. It is changed in place and returned.
    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: truncated or altered tensors, an unknown kind of model, names or shapes that differ, a tokenizer other
            than the model's, or a base other than the one that the tensors were trained on. The message says both sides.
    """
    folder = Path(folder)
    saved, tensors = read_checkpoint(folder, tokenizer)
    if onto is not None:
        load_onto(onto, saved, tensors, str(folder))
        return onto.eval()
    if "base" in saved:
        raise ValueError(
            f"{folder} holds {len(tensors)} tensors that were trained on top of the base {saved['base'][:12]}…, not a whole "
            "model: load that base, put the same adapters or head on it, and call load_checkpoint(..., onto=model)"
        )
    return build_model(saved["model"], tensors, str(folder))


def load_onto(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill this model from what `read_checkpoint` returned. Raises ValueError, with nothing changed, if it does not fit."""
    there, here = saved["model"], describe_model(model)
    if there != here:  # the shapes alone would not tell: another number of heads has the same
        raise ValueError(f"{where} holds the model {there}, this one is {here}")
    if "base" in saved and not set(tensors) - set(named_tensors(model)):  # else load_tensors says what is unknown
        base = base_fingerprint(model, tensors)
        if base != saved["base"]:
            raise ValueError(
                f"{where} was trained on top of the base {saved['base'][:12]}…, and this model has the base {base[:12]}…: "
                "what was learned is a difference from those weights, and means nothing on top of others. Load that base."
            )
    load_tensors(model, tensors, where, some="base" in saved)


def load_with_tokenizer(folder: str | Path) -> tuple[Any, Tokenizer]:
    """A model and the tokenizer that lies beside it; bytes where there is none."""
    path = Path(folder) / "tokenizer.json"
    tokenizer = BPETokenizer.load(path) if path.exists() else ByteTokenizer()
    return load_checkpoint(folder, tokenizer), tokenizer


def read_checkpoint(folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(checkpoint.json, tensors), checked against the tokenizer and against their hash."""
    for name in ("checkpoint.json", "model.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a checkpoint: it has no {name}")
    described = read_json(folder / "checkpoint.json")
    if described["tokenizer"] != tokenizer.fingerprint:  # gallery: spine/wrong-tokenizer
        raise ValueError(
            f"{folder} was trained with tokenizer {described['tokenizer'][:12]}…, but it is to be used with "
            f"{tokenizer.fingerprint[:12]}…: the same ids would mean other bytes. Load the tokenizer it was saved with."
        )
    found = sha256_file(folder / "model.safetensors")
    if found != described["sha256"]:  # gallery: spine/partial-file
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256 {found[:12]}…, checkpoint.json says "
            f"{described['sha256'][:12]}…: the file was cut off or altered. Make it again."
        )
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())  # not mapped: the file may be moved
    return described, tensors


def model_fingerprint(model: Any) -> str:
    """A hash of the class, the vocabulary and every tensor of the state_dict.

    Equal fingerprints and equal code mean equal functions. That holds if a module keeps nothing that it computes with
    outside its state_dict; PrepackedLinear puts a digest there.
    """
    return _fingerprint(type(model), model.vocab_size, model.state_dict().items())


def base_fingerprint(model: nn.Module, saved: Collection[str]) -> str:
    """The fingerprint of a model without the tensors of these names, as it was before adapters or a head were put on it.

    A wrapper keeps what it wraps as `.base`, so names lose that part: a frozen Transformer with adapters has a base with
    the `model_fingerprint` of the plain Transformer, and so has a head on top of a frozen Transformer.
    """
    parameters = dict(model.named_parameters())
    learned = {id(parameters[name]) for name in saved if name in parameters}  # under each of the names of a tied one
    state = model.state_dict(keep_vars=True)
    kept = {_without_base(n): t for n, t in state.items() if n not in saved and id(t) not in learned}
    inner = getattr(model, "base", None)
    return _fingerprint(type(inner) if isinstance(inner, nn.Module) else type(model), model.vocab_size, kept.items())


def _without_base(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base")


def _fingerprint(kind: type, vocab_size: int, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {vocab_size} ".encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
