"""Probes and failures: what a diagnostic is, and what a bug is, as code.

A probe takes *handles*: plain callables and values with a stated meaning, listed in HANDLES. It names the ones it needs
as its parameters and returns one number with its threshold. So a reader can hand it their own model, sampler, grader or
loader, and the gallery can run every probe on every bug that has the handles.

A probe never shares code with what it checks: an evaluator that aligns targets with the loader's own function cannot
see a wrong shift.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

Specimen = Mapping[str, Any]  # handle name -> callable or value

HANDLES = {
    "model": "callable: ids (B, T) int64 -> logits (B, T, V)",
    "vocab_size": "int: V",
    "ids": "optional: typical token ids (B, T) for the model; random ones find less where most ids are rare",
    "tokenizer": "the tokenizer of the model: encode(text) -> ids, decode(ids) -> text, vocab_size",
    "train_texts": "list of texts the model was trained on",
    "heldout_texts": "list of texts it is evaluated on",
    "bits_per_byte": "callable: (model, texts) -> float, the evaluator under test",
    "train_and_score": "callable: (train texts, held-out texts) -> bits per byte of a model trained on the spot",
    "generate": "callable: (prompts: list of texts, seed: int) -> list of texts, one for each prompt",
    "accuracy": "callable: (answer: question text -> answer text) -> float, the harness under test with any answerer",
    "solver": "callable: question text -> right answer text, independent of the harness",
    "save": "callable: (path) -> None, writes an artifact",
    "load": "callable: (path) -> object, reads it back or raises",
    "experiment": "callable: (folder, setting: 0 or 1, interrupt: bool) -> result, None if interrupted",
    "encode": "callable: text -> ids",
    "decode": "callable: ids -> text",
    "reference": "callable: text -> ids, an independent implementation of the same tokenizer",
    "reloaded": "callable: () -> encode of the tokenizer after saving and loading",
    "special_ids": "dict: name of a special token -> its id",
    "opening": "text: the name of the special token that opens a prompt",
    "token_length": "callable: id -> length in bytes, as bits per byte counts it",
    "prompt_ids": "callable: text -> ids as they are fed to the model",
    "store": "callable: (ids, path) -> ids read back from the file",
    "batches": "callable: (tokens, length) -> (inputs, targets, mask) of one epoch",
    "rank_batches": "callable: (tokens, rank, world size) -> (inputs, targets, mask) of one epoch",
    "two_epochs": "callable: () -> two lists, the order of rows in two epochs",
    "resumed_batches": "callable: (stops) -> 12 batches as lists, state saved and loaded anew after each stop",
    "packed_mask": "callable: document ids (B, T) -> (B, T, T), True where a query may see a key",
    "pack_documents": "callable: (lengths, row length) -> number of (input, target) pairs that end up in a row",
    "item": "callable: index -> item of a dataset",
    "labelled": "callable: () -> (item, label) pairs as the trainer gets them",
    "label_of": "callable: item -> its right label",
    "run_status": "callable: (body: callable) -> status text of a run whose body is called",
    "module": "nn.Module: called with ids (B, T) it returns logits, bare or in an object with `.logits`",
    "untrained": "the same with initial weights; copies of it are trained",
    "padded": "callable: (ids (B, T), pad_mask (B, T), True at padding) -> logits",
    "poisoned": "callable: (ids, pad_mask) -> logits, with NaN in place of the embeddings at padding",
    "packed": "callable: (ids (B, T), document_ids (B, T)) -> logits",
    "open_cache": "callable: (batch) -> step, a callable: next ids (B, t) -> their logits, continuing a fresh cache",
    "bounded_cache": "callable: (capacity) -> step, as open_cache for one row, with room for so many tokens",
    "attention_maps": "callable: ids (B, T) -> list of attention weights (B, H, T, T), one for each layer",
    "attend": "callable: q (B, H, T, D), k and v (B, G, S, D) -> causal attention (B, H, T, D)",
    "hidden": "callable: ids -> list of (name, tensor), the stream after each layer",
    "reference_hidden": "the same of an independent implementation with the same weights",
    "rotate_at": "callable: (x (1, 1, 1, D), position) -> x turned to that position",
    "parameter_count": "int: what the model says that it has",
    "expected_parameters": "int: what a model of this shape has by an independent count",
    "load_weights": "callable: (named tensors) -> nn.Module that should hold them",
    "stream": "callable: ids -> (logits, list of hidden states with their graph, bottom to top)",
    "memory": "int: how many tokens back an output must be able to depend",
    "losses": "callable: tokens, one epoch of a text as ids -> the reported training losses, nats per target",
    "training_loss": "callable: micro-batches (inputs, targets, mask) -> the loss that one update on them reports",
    "training_bits_per_byte": "callable: micro-batches -> the bits per byte that one update on them reports",
    "gradients": "callable: micro-batches -> named gradients that the optimizer gets, without dropout and clipping",
    "gradient_norm": "callable: micro-batches -> the norm of the gradient that is compared with the limit",
    "validation_loss": "callable: rows (B, T + 1) -> the validation loss that is reported, nats per target",
    "evaluated": "callable: (updates between evaluations, or None) -> named weights after a short training",
    "training": "callable: (updates, folder or None) -> named weights; goes on from what is saved there, and saves",
    "poisoned_training": "callable: () -> (named weights, what was said); the loss of the third update is NaN",
    "trained_rate": "callable: seed -> a rate of the model that is trained with it, on the same questions for all seeds",
    "printed_interval": "callable: () -> (low, high) as it is printed beside that rate",
    "rates": "callable: (updates, micro-batches in each) -> the learning rate of each update",
    "warmup": "int: updates in which the learning rate rises",
    "top_rate": "float: the highest learning rate",
    "make_optimizer": "callable: nn.Module -> its optimizer, with step(), as the training makes it",
    "optimizer_settings": "dict: lr, betas, eps, weight_decay that it has, if it is an AdamW",
    "save_numbered": "callable: (folder, number) -> None, saves a snapshot of that number, keeping one",
    "newest_number": "callable: (folder) -> number of the snapshot that a resumed training would take, or None",
    "reference_model": "as `model`: an independent implementation with the same weights",
    "reference_context": "int: how many tokens the reference is meant for",
    "context_length": "int: how many tokens the model is meant for, as it was loaded",
    "parity_tolerance": "optional: how far logits may be apart, in deviations of the reference's; if not in float32",
    "greedy": "callable: (prompt: list of ids, count) -> the most probable ids after it, one at a time",
    "reference_greedy": "the same of the reference",
    "checkpoint": "dict: named tensors of somebody else's model, as its files have them",
    "load_foreign": "callable: named tensors of that kind -> model, as `model`; raises where they do not fit",
    "load_named": "callable: (name of a folder or model) -> model: the same files under that name",
    "idle_tensors": "optional: names in the checkpoint that no output depends on, by arithmetic",
    "exported": "callable: () -> model, as `model`: written to a folder and loaded again by somebody else",
    "next_probabilities": "callable: ids (B, T) -> probabilities (B, V) that the next token is drawn from",
    "generated_logprobs": "callable: (prompts as lists of ids, seed) -> for each (generated ids, their log-probabilities)",
    "score_tokens": "callable: (prompts, continuations, both as lists of ids) -> for each the log-probabilities in nats",
    "remembering": "callable: () -> an engine on `module` that keeps what it can between calls, as `greedy`",
    "makeable_ids": "set of the ids that the tokenizer can make",
    "conversation_ids": "callable: list of messages, each with role and content -> ids fed to the model",
    "reference_conversation_ids": "the same of the reference",
    "fingerprint_with": "callable: named tensors, as in `checkpoint` -> fingerprint of the model with them, as it is used",
    "adapted": "nn.Module from ids to logits, of which the adapter is trainable and nothing else",
    "transformations": "dict: what is done -> callable: such a module -> module that must compute the same, or ValueError",
}


@dataclass(frozen=True)
class Reading:
    """A number that measures a violation, and the largest value that healthy code may show."""

    value: float
    threshold: float
    note: str = ""

    @property
    def caught(self) -> bool:
        return not self.value <= self.threshold  # NaN is caught


@dataclass(frozen=True)
class Probe:
    """A named diagnostic. Call it with its handles: `future_perturbation(model=mine, vocab_size=50257)`."""

    name: str
    question: str
    measure: Callable[..., Reading]

    @property
    def needs(self) -> tuple[str, ...]:
        """The handles without which the probe does not apply."""
        parameters = inspect.signature(self.measure).parameters.values()
        return tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)

    def applies_to(self, specimen: Specimen) -> bool:
        return all(name in specimen for name in self.needs)

    def __call__(self, **handles: Any) -> Reading:
        return self.measure(**handles)

    def examine(self, specimen: Specimen) -> tuple[Reading, float]:
        """The reading on a specimen, and the CPU seconds it took. An exception is a reading of infinity."""
        start = time.process_time()
        try:
            wanted = inspect.signature(self.measure).parameters
            reading = self.measure(**{name: specimen[name] for name in wanted if name in specimen})
        except Exception as error:
            reading = Reading(float("inf"), 0.0, f"{type(error).__name__}: {error}")
        return reading, time.process_time() - start


def probe(name: str, question: str) -> Callable[[Callable[..., Reading]], Probe]:
    """Make a Probe of a function whose parameters are handles. Those with a default are optional, or settings."""

    def wrap(measure: Callable[..., Reading]) -> Probe:
        made = Probe(name, question, measure)
        unknown = [handle for handle in made.needs if handle not in HANDLES]
        if unknown:
            raise ValueError(f"probe {name!r} needs {unknown}, which are not in HANDLES: name and describe them there")
        return made

    return wrap


@dataclass(frozen=True)
class Failure:
    """A bug that happens to people, as code.

    Attributes:
        id: `<room>/<what>`, stable.
        story: what happens, in two sentences, with a public source.
        symptom: what one sees.
        blind_spots: names of probes that apply and see nothing; tests check that.
        broken, healthy: make the specimen with and without the bug (or a context manager that yields it).
        probe: the name of the probe that catches it; None where nothing does.
        survives: why nothing catches it, if nothing does.
    """

    id: str
    month: str
    title: str
    story: str
    symptom: str
    fix: str
    broken: Callable[[], Specimen | AbstractContextManager[Specimen]]
    healthy: Callable[[], Specimen | AbstractContextManager[Specimen]]
    probe: str | None
    blind_spots: tuple[str, ...] = ()
    survives: str = ""
    source: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if (self.probe is None) != bool(self.survives):
            raise ValueError(f"failure {self.id}: name a probe, or say in `survives` why none catches it; not both")


@contextmanager
def replaced(what: Any, name: str, by: Any, make: Callable[[], Specimen]) -> Iterator[Specimen]:
    """A specimen while `what.name` is something else: most bugs are one function of `common`, replaced."""
    with patch.object(what, name, by):
        yield make()


def opened(made: Specimen | AbstractContextManager[Specimen]) -> AbstractContextManager[Specimen]:
    """A specimen as a context manager, whether or not it needs one."""
    return made if isinstance(made, AbstractContextManager) else nullcontext(made)
