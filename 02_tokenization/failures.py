"""February's failure gallery: the first place where one can train on garbage while everything looks fine.

Every bug leaves shapes, ranges and (mostly) the round trip intact. A loss would fall on all of them.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from common.data.packing import Example, pack
from common.data.problems import addition_problems
from common.data.shards import checked, dtype_for
from common.data.stream import BatchStream
from common.diagnostics.core import Failure, Specimen
from common.diagnostics.probes.tokens import STRANGE
from common.model.masks import attention_mask, positions_of
from common.tokenization.bpe import BPETokenizer
from common.tokenization.protocol import END_OF_TEXT

MONTH = "02_tokenization"
CORPUS = [
    "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 3,
    "café naïve déjà vu — 日本語のテキスト don't we'll 12 345  two  spaces\n\n" * 3,
]
BPE = BPETokenizer.train(CORPUS, 320)
END = BPE.specials[END_OF_TEXT]
LARGE = 100_000  # a vocabulary that needs more than two bytes an id
Made = Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


# --- the healthy pipeline ---------------------------------------------------------------------------------------------


def rows(stream: BatchStream) -> Made:
    for batch in stream.epoch_batches():
        yield batch.inputs, batch.targets, batch.loss_mask


def batches(tokens: np.ndarray, length: int) -> Made:
    return rows(BatchStream(tokens, length=length, batch_size=2, end_of_text=END))


def rank_batches(tokens: np.ndarray, rank: int, world_size: int) -> Made:
    return rows(BatchStream(tokens, length=8, batch_size=2, end_of_text=END, rank=rank, world_size=world_size))


def two_epochs(stream_type: type[BatchStream] = BatchStream) -> tuple[list[int], list[int]]:
    stream = stream_type(np.arange(400), length=8, batch_size=2, end_of_text=END)
    first, second = ([int(row) for batch in stream.epoch_batches() for row in batch.inputs[:, 0]] for _ in range(2))
    return first, second


def resumed_batches(stops: list[int], stream_type: type[BatchStream] = BatchStream) -> list[list[int]]:
    def fresh() -> BatchStream:
        return stream_type(np.arange(120), length=8, batch_size=2, end_of_text=END)

    stream, made = fresh(), []
    for stop in stops:
        made += [stream.next_batch().inputs[:, 0].tolist() for _ in range(stop)]
        state, stream = stream.state_dict(), fresh()
        stream.load_state_dict(state)
    return made + [stream.next_batch().inputs[:, 0].tolist() for _ in range(12 - len(made))]


def store(ids: np.ndarray, path: Path) -> np.ndarray:
    checked(ids, LARGE).tofile(path)
    return np.fromfile(path, dtype=dtype_for(LARGE))


def reloaded() -> Callable[[str], list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        BPE.save(Path(folder) / "tokenizer.json")
        return BPETokenizer.load(Path(folder) / "tokenizer.json").encode


def pack_documents(lengths: list[int], row: int) -> int:
    """A document that is longer than a row is cut into pieces; each begins with the last token of the one before."""
    whole = [torch.arange(n) for n in lengths]
    pieces = [Example(ids[start : start + row + 1]) for ids in whole for start in range(0, len(ids) - 1, row)]
    return int(pack(pieces, row)[0].loss_mask.sum())


def item(index: int) -> str:
    rng = np.random.default_rng((0, index))
    return f"{rng.integers(100)}+{rng.integers(100)}="


PROBLEMS = addition_problems(2, "test")[:40]


def labelled() -> list[tuple[str, str]]:
    return [(PROBLEMS[i].question, PROBLEMS[i].answer) for i in np.random.default_rng(0).permutation(len(PROBLEMS))]


def label_of(question: str) -> str:
    return str(sum(map(int, question.rstrip("=").split("+"))))


def healthy() -> Specimen:
    return {
        "encode": BPE.encode,
        "decode": BPE.decode,
        "reference": BPE.to_tiktoken().encode_ordinary,
        "reloaded": reloaded,
        "special_ids": BPE.specials,
        "opening": END_OF_TEXT,
        "token_length": lambda token: len(BPE.token_bytes(token)),
        "prompt_ids": lambda text: [END, *BPE.encode(text)],
        "store": store,
        "vocab_size": LARGE,
        "batches": batches,
        "rank_batches": rank_batches,
        "two_epochs": two_epochs,
        "resumed_batches": resumed_batches,
        "packed_mask": attention_mask,
        "pack_documents": pack_documents,
        "item": item,
        "labelled": labelled,
        "label_of": label_of,
    }


# --- the bugs ---------------------------------------------------------------------------------------------------------


def uint16_wrap() -> Specimen:
    def store(ids: np.ndarray, path: Path) -> np.ndarray:
        ids.astype("<u2").tofile(path)
        return np.fromfile(path, dtype="<u2")

    return {**healthy(), "store": store}


def lengths_by_round_trip() -> Specimen:
    return {**healthy(), "token_length": lambda token: len(BPE.decode([token]).encode("utf-8"))}


def dropped_newlines() -> Specimen:
    def encode(text: str) -> list[int]:
        return [token for word in text.split("\n") for token in BPE.encode(word)]

    return {**healthy(), "encode": encode, "reloaded": lambda: encode}


def spaces_cut_elsewhere() -> Specimen:
    """A pattern without the look-ahead: a run of spaces keeps the one that belongs to the next word."""
    pattern = BPE.pattern.replace(r"|\s+(?!\S)", "")
    other = BPETokenizer(BPE.tokens, BPE.merges, pattern, BPE.specials)
    return {**healthy(), "encode": other.encode, "reloaded": lambda: other.encode}


def specials_in_user_text() -> Specimen:
    encode = functools.partial(BPE.encode, allow_special=True)
    return {**healthy(), "encode": encode, "reloaded": lambda: encode}


def double_opening() -> Specimen:
    def add_opening(ids: list[int]) -> list[int]:
        return [END, *ids]

    def prompt_ids(text: str) -> list[int]:
        rendered = f"{END_OF_TEXT}{text}"  # the template brings one
        return add_opening(BPE.encode(rendered, allow_special=True))  # and the tokenizer another

    return {**healthy(), "prompt_ids": prompt_ids}


def pattern_lost_on_load() -> Specimen:
    """A tokenizer with a pattern of its own, whole lines, so that merges cross spaces; loading cuts into words again."""
    lines = BPETokenizer.train([*CORPUS, *STRANGE * 9], 400, pattern=r"[^\n]+|\n")
    default = BPETokenizer(lines.tokens, lines.merges, BPE.pattern, lines.specials)
    return {
        **healthy(),
        "encode": lines.encode,
        "decode": lines.decode,
        "reference": lines.to_tiktoken().encode_ordinary,
        "reloaded": lambda: default.encode,
        "token_length": lambda token: len(lines.token_bytes(token)),
    }


def made_of(windows: Iterator[tuple[np.ndarray, np.ndarray]]) -> Made:
    for inputs, targets in windows:
        rows = torch.from_numpy(inputs[None].astype(np.int64)), torch.from_numpy(targets[None].astype(np.int64))
        yield *rows, torch.ones(1, len(inputs), dtype=torch.bool)


def with_windows(windows: Callable[[np.ndarray, int], Iterator]) -> Specimen:
    return {**healthy(), "batches": lambda tokens, length: made_of(windows(tokens, length))}


def unshifted_targets() -> Specimen:
    return with_windows(lambda t, n: ((t[i : i + n], t[i : i + n]) for i in range(0, len(t) - 1, n)))


def shifted_twice() -> Specimen:
    return with_windows(lambda t, n: ((t[i : i + n], t[i + 2 : i + n + 2]) for i in range(0, len(t) - n - 1, n)))


def boundary_pairs_lost() -> Specimen:
    """Each chunk of n + 1 tokens gives n pairs, and the next chunk starts after it: the pair between them is lost."""
    return with_windows(lambda t, n: ((t[i : i + n], t[i + 1 : i + n + 1]) for i in range(0, len(t) - n, n + 1)))


def last_chunk_dropped() -> Specimen:
    """The length is checked before the shift: a chunk needs n + 1 tokens, and one that has exactly those is refused."""
    return with_windows(lambda t, n: ((t[i : i + n], t[i + 1 : i + n + 1]) for i in range(0, len(t) - n - 1, n)))


def short_stream_wraps() -> Specimen:
    """Random offsets below len - n: unsigned arithmetic makes a short stream a very long one; here it wraps around."""

    def windows(tokens: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(0)
        for start in rng.integers(0, len(tokens), size=max(1, len(tokens) // length)):
            at = (start + np.arange(length + 1)) % len(tokens)
            yield tokens[at[:-1]], tokens[at[1:]]

    return with_windows(windows)


def same_order_in_every_worker() -> Specimen:
    def rank_batches(tokens: np.ndarray, rank: int, world_size: int) -> Made:
        rng = np.random.default_rng(0)  # forked with the parent's state
        for start in rng.integers(0, len(tokens) - 9, size=16):
            yield from made_of(iter([(tokens[start : start + 8], tokens[start + 1 : start + 9])]))

    return {**healthy(), "rank_batches": rank_batches}


class OneOrder(BatchStream):
    def _order_of(self, epoch: int) -> np.ndarray:
        return super()._order_of(0)


def epoch_not_in_the_seed() -> Specimen:
    return {**healthy(), "two_epochs": lambda: two_epochs(OneOrder)}


class OneTooFar(BatchStream):
    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict({**state, "consumed": state["consumed"] + self.batch_size})


class SecondTimeFromZero(BatchStream):
    def load_state_dict(self, state: dict) -> None:
        if state.get("resumed"):
            state = {**state, "epoch": 0, "consumed": 0}
        super().load_state_dict(state)
        self.resumed = True

    def state_dict(self) -> dict:
        return {**super().state_dict(), "resumed": getattr(self, "resumed", False)}


def resume_off_by_one() -> Specimen:
    return {**healthy(), "resumed_batches": lambda stops: resumed_batches(stops, OneTooFar)}


def second_resume_from_zero() -> Specimen:
    return {**healthy(), "resumed_batches": lambda stops: resumed_batches(stops, SecondTimeFromZero)}


def positions_alone() -> Specimen:
    """Positions restart at each document, and the mask is the causal one: the document before stays in view."""

    def packed_mask(document_ids: torch.Tensor) -> torch.Tensor:
        positions_of(document_ids)
        length = document_ids.shape[1]
        return torch.ones(len(document_ids), length, length, dtype=torch.bool).tril()

    return {**healthy(), "packed_mask": packed_mask}


def tails_cropped() -> Specimen:
    return {**healthy(), "pack_documents": lambda lengths, row: sum(min(n, row + 1) - 1 for n in lengths)}


def moving_generator() -> Specimen:
    rng = np.random.default_rng(0)
    return {**healthy(), "item": lambda index: f"{rng.integers(100)}+{rng.integers(100)}="}


def labels_left_behind() -> Specimen:
    def labelled() -> list[tuple[str, str]]:
        questions = [problem.question for problem in PROBLEMS]
        answers = [problem.answer for problem in PROBLEMS]
        np.random.default_rng(0).shuffle(questions)
        return list(zip(questions, answers, strict=True))

    return {**healthy(), "labelled": labelled}


def trained_on_the_test_text() -> Specimen:
    seen = BPETokenizer.train([*CORPUS, "the test plays, word for word " * 9], 320)
    encode = seen.encode
    return {
        **healthy(),
        "encode": encode,
        "decode": seen.decode,
        "reference": seen.to_tiktoken().encode_ordinary,
        "reloaded": lambda: encode,
        "special_ids": seen.specials,
        "token_length": lambda token: len(seen.token_bytes(token)),
        "prompt_ids": lambda text: [seen.specials[END_OF_TEXT], *encode(text)],
    }


february = functools.partial(Failure, month=MONTH, healthy=healthy)
USUAL = ("shapes-and-ranges",)
BOTH = ("shapes-and-ranges", "round-trip")

FAILURES = [
    february(
        id="tokens/uint16-wrap",
        title="Ids of a large vocabulary in two bytes",
        story="Ids are written as uint16 because the last vocabulary fitted. Every id above 65,535 wraps around to another "
        "token, silently.",
        source="huggingface/datatrove#118, ids beyond uint16",
        symptom="a loss that stops falling early; decoded samples of the file are nearly text",
        fix="Choose the type from the vocabulary and check every id against it when it is written.",
        broken=uint16_wrap,
        probe="stored-ids",
        blind_spots=(*BOTH, "reference-ids", "pair-coverage"),
    ),
    february(
        id="tokens/lengths-by-round-trip",
        title="Byte lengths of tokens taken from decoded text",
        story="A token that is half a character decodes to U+FFFD, which is three bytes long. The denominator of bits per "
        "byte is wrong, a little in English and a lot elsewhere.",
        source="karpathy/nanochat#693",
        symptom="bits per byte slightly too good",
        fix="Keep the raw bytes of each token and count those.",
        broken=lengths_by_round_trip,
        probe="byte-lengths",
        blind_spots=(*BOTH, "reference-ids", "reload"),
    ),
    february(
        id="tokens/dropped-newlines",
        title="The encoder drops line ends",
        story="Text is split into lines, and the separators are not put back.",
        source="rasbt/LLMs-from-scratch#495, a split that dropped newlines",
        symptom="samples without paragraphs",
        fix="Cut with a pattern that matches every character, and test that it does.",
        broken=dropped_newlines,
        probe="round-trip",
        blind_spots=(*USUAL, "reload", "injection"),
    ),
    february(
        id="tokens/spaces-cut-elsewhere",
        title="Runs of spaces are cut in another place",
        story="The pattern lacks its look-ahead, so the last space of a run no longer goes with the word after it. Text "
        "comes back unchanged, and the ids are not those the model was trained on.",
        source="a relative: rasbt/LLMs-from-scratch#944, several spaces in a row",
        symptom="a pretrained model that is worse on code and tables",
        fix="Compare ids with an independent implementation, on texts with runs of white space.",
        broken=spaces_cut_elsewhere,
        probe="reference-ids",
        blind_spots=(*BOTH, "reload", "byte-lengths"),
    ),
    february(
        id="tokens/special-token-injection",
        title="A user can write a special token",
        story="Everything is encoded with special tokens allowed. A text that contains <|im_start|> opens a message of its "
        "own.",
        source="a relative: rasbt/LLMs-from-scratch#616, special tokens only where allowed",
        symptom="none, until somebody tries",
        fix="Treat special tokens in text as text unless the caller names them.",
        broken=specials_in_user_text,
        probe="injection",
        blind_spots=(*USUAL, "round-trip", "reference-ids", "reload"),
    ),
    february(
        id="tokens/double-opening",
        title="Two opening tokens",
        story="The template begins with the opening token, and the tokenizer adds another. The model has never seen two.",
        source="sgl-project/sglang#888, a rendered template encoded again",
        symptom="a model that is a few points worse than its card says",
        fix="Render first, then encode without adding anything.",
        broken=double_opening,
        probe="one-opening",
        blind_spots=(*BOTH, "reference-ids"),
    ),
    february(
        id="tokens/pattern-lost-on-load",
        title="Saving and loading changes the ids",
        story="The pattern is saved as text and not compiled again on loading, so a default cuts the words. The round trip "
        "passes before and after.",
        source="karpathy/minbpe, base.py: load restores the pattern and does not compile it again",
        symptom="a model that is fine in the notebook and poor in the service",
        fix="Compare ids before saving and after loading; keep a fingerprint of everything that changes ids.",
        broken=pattern_lost_on_load,
        probe="reload",
        blind_spots=(*BOTH, "reference-ids", "injection"),
    ),
    february(
        id="data/unshifted-targets",
        title="The target is the input",
        story="The shift was left out, or done twice and undone once. The model learns to copy, and its loss is the best of "
        "the year.",
        source="a relative: Lightning-AI/litgpt#407",
        symptom="loss near zero within minutes",
        fix="Build a stream of distinct tokens and look at the pairs.",
        broken=unshifted_targets,
        probe="pair-coverage",
        blind_spots=(*BOTH, "ranks-partition"),
    ),
    february(
        id="data/shifted-twice",
        title="The targets are shifted twice",
        story="The loader shifts, and the model shifts again. It learns to predict the token after the next, which is "
        "harder and possible.",
        source="huggingface/transformers#47395, a model trained on the token after the next",
        symptom="a loss that is too high by a constant",
        fix="One place shifts; a test counts the pairs.",
        broken=shifted_twice,
        probe="pair-coverage",
        blind_spots=BOTH,
    ),
    february(
        id="data/boundary-pairs-lost",
        title="The pair between two chunks is never seen",
        story="Chunks of n + 1 tokens are cut side by side. The last token of one and the first of the next are "
        "never a pair.",
        source="widely known",
        symptom="none; one pair in n + 1 is missing, always the same ones",
        fix="Let the chunks overlap by one token.",
        broken=boundary_pairs_lost,
        probe="pair-coverage",
        blind_spots=BOTH,
    ),
    february(
        id="data/last-chunk-dropped",
        title="A chunk of exactly the right length is dropped",
        story="The length is compared before the shift. A document that fits exactly, and every remainder, is left out.",
        source="pytorch/torchtitan#4268, the length checked before the shift",
        symptom="fewer tokens an epoch than the corpus has",
        fix="Test with lengths around a multiple of the chunk.",
        broken=last_chunk_dropped,
        probe="pair-coverage",
        blind_spots=(*BOTH, "token-ledger"),
    ),
    february(
        id="data/short-stream-wraps",
        title="Random offsets instead of an epoch",
        story="Windows start at random places, and a stream shorter than a window wraps around. Some pairs are seen often, "
        "some never, and some do not exist in the text.",
        source="a relative: maderix/ANE#17, an unsigned difference that underflows",
        symptom="validation on a small set that changes from run to run",
        fix="Walk a permutation of chunks; refuse what is too short.",
        broken=short_stream_wraps,
        probe="pair-coverage",
        blind_spots=(*BOTH, "exact-resume"),
    ),
    february(
        id="data/same-order-in-every-worker",
        title="Every worker draws the same windows",
        story="Workers are forked with the parent's random state. Eight of them read the same rows eight times.",
        source="pytorch/pytorch#5059, the same NumPy numbers in every worker",
        symptom="an epoch that is over eight times as fast, and overfits",
        fix="Shuffle once, then deal the result out to the ranks.",
        broken=same_order_in_every_worker,
        probe="ranks-partition",
        blind_spots=(*BOTH, "pair-coverage", "epochs-differ"),
    ),
    february(
        id="data/epoch-not-in-the-seed",
        title="The same order in every epoch",
        story="The generator is seeded by the seed alone.",
        source="a relative: pytorch/pytorch#41329, the same NumPy numbers in every epoch",
        symptom="a saw-tooth in the loss with the period of an epoch",
        fix="Seed with (seed, epoch).",
        broken=epoch_not_in_the_seed,
        probe="epochs-differ",
        blind_spots=(*BOTH, "pair-coverage", "exact-resume"),
    ),
    february(
        id="data/resume-off-by-one",
        title="A resumed loader skips a batch",
        story="The state is saved after the batch was handed out and advanced once more on loading.",
        source="allenai/open-instruct#52, a skip counter that is off by one",
        symptom="a resumed run whose loss differs from the undisturbed one in the third digit",
        fix="Compare the next batches of a resumed and an undisturbed run.",
        broken=resume_off_by_one,
        probe="exact-resume",
        blind_spots=(*BOTH, "pair-coverage"),
    ),
    february(
        id="data/second-resume-from-zero",
        title="The second resume starts over",
        story="The first resume restores the position, and does not save that it did.",
        source="pytorch/torchtitan#3907, a stream that restarts on the second resume",
        symptom="a long run with several restarts overfits its first shard",
        fix="Resume twice in the test.",
        broken=second_resume_from_zero,
        probe="exact-resume",
        blind_spots=(*BOTH, "pair-coverage", "epochs-differ"),
    ),
    february(
        id="data/positions-alone",
        title="Positions restart, attention does not",
        story="Packed documents get their own positions and the ordinary causal mask. Each document still sees the one "
        "before it.",
        source="huggingface/nanoVLM#204, resetting positions alone is not enough",
        symptom="none in training; packed and unpacked evaluation disagree",
        fix="Mask by document, and change one document to see whether the next one notices.",
        broken=positions_alone,
        probe="document-isolation",
        blind_spots=(*BOTH, "pair-coverage", "token-ledger"),
    ),
    february(
        id="data/tails-cropped",
        title="Packing crops the tails",
        story="Documents longer than a row are cut, and what is cut off is thrown away: the ends of the longest texts.",
        source="karpathy/nanochat#544, what best-fit cropping discards",
        symptom="models that are poor at endings",
        fix="Count tokens in and tokens out.",
        broken=tails_cropped,
        probe="token-ledger",
        blind_spots=(*BOTH, "pair-coverage", "document-isolation"),
    ),
    february(
        id="data/moving-generator",
        title="An item changes when it is asked for again",
        story="Items are drawn from one generator that moves on. Item 5 depends on who asked before.",
        source="widely known",
        symptom="evaluations of the same index that are not of the same item",
        fix="Seed each item by (seed, index).",
        broken=moving_generator,
        probe="item-identity",
        blind_spots=(*BOTH, "labels-stay"),
    ),
    february(
        id="data/labels-left-behind",
        title="The questions are shuffled, the labels are not",
        story="Two lists, one shuffle.",
        source="allenai/open-instruct#1484",
        symptom="accuracy at chance whatever is trained",
        fix="Keep item and label in one record.",
        broken=labels_left_behind,
        probe="labels-stay",
        blind_spots=(*BOTH, "item-identity"),
    ),
    february(
        id="tokens/trained-on-the-test-text",
        title="The tokenizer was trained on the test text",
        story="Merges are learned from the whole corpus before it is split. Test text is then compressed by merges made "
        "for it.",
        source="widely known",
        symptom="bytes per token on the test text a little too good",
        fix="Split first, then train the tokenizer.",
        broken=trained_on_the_test_text,
        probe=None,
        survives="Every mechanism is right; what is wrong is the order of two steps. Only the record of what the tokenizer "
        "was trained on can show it, and the manifest of the run has its hash.",
    ),
]
