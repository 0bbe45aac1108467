"""Snapshots of a training in progress: whole or absent, and enough to go on with the same bits.

    <folder>/step-00000120/model.safetensors, checkpoint.json     a checkpoint like any other
                           training.safetensors                   optimizer state
                           shards/                                instead of both, from processes with sharded weights
                           progress.json                          everything else, and the hashes of the files

A snapshot is written beside its place and renamed into it when it is complete; only then are older ones deleted. Sharded
ones use `torch.distributed.checkpoint` and can be read by any number of processes.
"""

import os
import shutil
import warnings
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from common.foundation.files import read_json, sha256_file, write_json
from common.training.checkpoint import describe_model, load_onto, read_checkpoint, save_checkpoint, trainable_names
from common.training.distributed import gathered, inner, is_sharded

if TYPE_CHECKING:
    from common.training.trainer import Trainer


class Snapshots:
    """A folder of them, the newest `keep` of which stay."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} snapshots would leave none to resume from: keep at least 1")
        self.folder, self.keep = Path(folder), keep

    def all(self) -> list[Path]:
        """Newest first. A name is given only to a complete snapshot."""
        return sorted(self.folder.glob("step-????????"), reverse=True)

    def save(self, trainer: "Trainer") -> Path:
        """Write a snapshot of this trainer; all processes call it."""
        place = self.folder / f"step-{trainer.done:08d}"
        partial = place.with_name(f".{place.name}.partial")
        first, model = trainer.world.rank == 0, inner(trainer.model)
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        trainer.world.meet()
        if is_sharded(trainer.model):
            import torch.distributed.checkpoint as dcp  # half a second, for few

            with _quiet():
                dcp.save(_tensors_of(trainer), checkpoint_id=partial / "shards")
        elif first:
            learns, parameters = trainable_names(model), dict(model.named_parameters())
            # What is frozen is not written again and again: the checkpoint keeps its fingerprint.
            only = learns if 0 < len(learns) < len(parameters) else None
            save_checkpoint(partial, model, trainer.tokenizer, only=only)
            state = {name: t.detach().cpu().contiguous() for name, t in trainer.optimizers.state_tensors().items()}
            safetensors.torch.save_file(state, partial / "training.safetensors")
        trainer.world.meet()
        if first:
            files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
            progress = {
                **trainer.progress_state(),
                "tokenizer": trainer.tokenizer.fingerprint,
                "model": describe_model(model),
                "files": {path.relative_to(partial).as_posix(): sha256_file(path) for path in files},
            }
            write_json(partial / "progress.json", progress)
            aside = place.with_name(f".{place.name}.old")
            if place.exists():  # saved twice: never a moment without one
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(place, aside)
            os.replace(partial, place)
            shutil.rmtree(aside, ignore_errors=True)
            # Count only snapshots up to this step. A newer one on disk was found damaged when we resumed; it must not count
            # toward `keep` and evict a good one.
            behind = [path for path in self.all() if path.name <= place.name]
            for old in behind[self.keep :]:  # gallery: pretraining/delete-before-write
                shutil.rmtree(old)
        trainer.world.meet()
        return place

    def load_newest(self, trainer: "Trainer") -> bool:
        """Continue from the newest snapshot whose files are whole; False if there is none.

        Raises:
            ValueError: it belongs to another tokenizer, model, optimizer or stream. Says both sides.
        """
        for place in self.all():
            try:
                progress = read_json(place / "progress.json")
                for name, digest in progress["files"].items():
                    if sha256_file(place / name) != digest:
                        raise ValueError(f"{place / name} is not what progress.json says")
            except (OSError, ValueError) as damage:
                warnings.warn(f"snapshot passed over, an older one is tried: {damage}", stacklevel=2)
                continue
            self._load(trainer, place, progress)
            return True
        return False

    def _load(self, trainer: "Trainer", place: Path, progress: dict[str, Any]) -> None:
        if progress["tokenizer"] != trainer.tokenizer.fingerprint:
            raise ValueError(
                f"{place} was trained with tokenizer {progress['tokenizer'][:12]}…, this training uses "
                f"{trainer.tokenizer.fingerprint[:12]}…: remove the snapshots to begin anew, or take that tokenizer"
            )
        there, here = progress["model"], describe_model(inner(trainer.model))
        if there != here:  # not only shapes: another number of heads has the same
            raise ValueError(f"{place} holds the model {there}, this training has {here}: resume with the model saved")
        if len(progress["counters"]) != len(trainer.optimizers.groups):
            raise ValueError(
                f"{place} has {len(progress['counters'])} groups of parameters, the optimizer here "
                f"{len(trainer.optimizers.groups)}: resume with the optimizer that was saved"
            )
        # Everything is compared before anything is changed.
        copy(trainer.stream).load_state_dict(progress["stream"])
        if (place / "shards").exists():
            import torch.distributed.checkpoint as dcp

            saved = dcp.FileSystemReader(place / "shards").read_metadata().state_dict_metadata
            _compare(trainer, {name: tuple(there.size) for name, there in saved.items()}, place)
            with _quiet():  # by name, in place, into whatever layout is here
                dcp.load(_tensors_of(trainer), checkpoint_id=place / "shards", no_dist=not dist.is_initialized())
        else:
            if is_sharded(trainer.model):
                raise ValueError(f"{place} was saved whole: resume it without sharding, or begin anew")
            saved, tensors = read_checkpoint(place, trainer.tokenizer)
            state = safetensors.torch.load((place / "training.safetensors").read_bytes())
            both = (("model", tensors), ("optimizer", state))
            _compare(trainer, {f"{kind}/{n}": tuple(t.shape) for kind, part in both for n, t in part.items()}, place)
            load_onto(inner(trainer.model), saved, tensors, str(place))
            trainer.optimizers.load(state)
        trainer.optimizers.load_counters(progress["counters"])
        trainer.load_progress(progress)


def whole_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters by name, gathered from all processes where they are sharded; every process calls it."""
    return {name: gathered(p).detach() for name, p in inner(model).named_parameters()}


def _tensors_of(trainer: "Trainer") -> dict[str, Tensor]:
    """Everything that a snapshot holds, by name: what `torch.distributed.checkpoint` writes, and what it fills.

    Frozen parameters are left out, as in `save`, except from shards: their fingerprint would have to be gathered first.
    """
    bare = inner(trainer.model)
    learns = trainable_names(bare)
    everything = is_sharded(trainer.model) or not learns
    model = {f"model/{name}": p.detach() for name, p in bare.named_parameters() if everything or name in learns}
    return model | {f"optimizer/{name}": t for name, t in trainer.optimizers.state_tensors().items()}


def _compare(trainer: "Trainer", saved: dict[str, tuple[int, ...]], place: Path) -> None:
    """Raises ValueError if the snapshot's tensors are those of another model or optimizer."""
    mine = {name: tuple(t.shape) for name, t in _tensors_of(trainer).items()}
    wrong = [name for name in sorted(mine.keys() | saved.keys()) if mine.get(name) != saved.get(name)]
    if wrong:
        raise ValueError(
            f"{place} does not fit, {len(wrong)} tensors: {wrong[0]} is {saved.get(wrong[0], 'missing')} in the snapshot "
            f"and {mine.get(wrong[0], 'missing')} here. Resume with the model and optimizer that were saved."
        )


def _quiet() -> warnings.catch_warnings:
    """torch warns about planning in one process; that is what is meant."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
