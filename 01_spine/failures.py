"""January's failure gallery: one artefact, interpreted by two code paths.

Most of these bugs leave a good model alone and spoil the number, the record or the pairing. That is why the usual
looks (is it better than the unigram? do the samples look right?) stay silent on nearly all of them.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.data.documents import Document
from common.data.problems import addition_problems, solved_documents
from common.diagnostics.core import Failure, Specimen
from common.diagnostics.sources import MarkovSource
from common.evaluation.runner import evaluate
from common.evaluation.task import Addition
from common.evaluation.text import score_documents
from common.foundation.files import append_json_line, read_json_lines
from common.foundation.run import Run, status
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams, sample
from common.model.ngram import NGram
from common.model.output import Output
from common.reasoning.strategies import Ask, Scripted
from common.tokenization.byte import ByteTokenizer
from common.training.checkpoint import load_checkpoint, save_checkpoint
from common.training.loss import bits

MONTH = "01_spine"
TOKENIZER = ByteTokenizer()
TRAIN, HELDOUT = (MarkovSource().texts(count, 600, seed=seed) for count, seed in ((60, 1), (12, 2)))


# --- the healthy spine: each handle of common.diagnostics.core.HANDLES, from common ---------------------------------


def documents(texts: list[str]) -> list[Document]:
    return [Document(str(number), "text", text) for number, text in enumerate(texts)]


def fit(texts: list[str], order: int = 3) -> NGram:
    return NGram.fit_documents(documents(texts), TOKENIZER, order)


def bits_per_byte(model: NGram, texts: list[str], tokenizer: ByteTokenizer = TOKENIZER) -> float:
    score = score_documents(model, tokenizer, documents(texts))
    return bits(sum(score.nats)) / sum(score.bytes)


def train_and_score(train: list[str], heldout: list[str]) -> float:
    return bits_per_byte(fit(train), heldout)


MODEL = fit(TRAIN)
ENGINE = Engine(MODEL, TOKENIZER)


def generate(prompts: list[str], seed: int) -> list[str]:
    params = SamplingParams(max_tokens=24, seed=seed)
    return [row[0].text for row in ENGINE.generate([ENGINE.encode(prompt) for prompt in prompts], params)]


def accuracy(answer: Callable[[str], str]) -> float:
    return evaluate(Addition(), Scripted("given", lambda problem: answer(problem.question)), None, 50).accuracy.mean


def solver(question: str) -> str:
    return str(sum(map(int, question.rstrip("=").split("+"))))


def save(path: Path) -> None:
    save_checkpoint(path.parent, MODEL, TOKENIZER)
    (path.parent / "model.safetensors").replace(path)


def load(path: Path) -> object:
    (path.parent / "model.safetensors").write_bytes(path.read_bytes())
    return load_checkpoint(path.parent, TOKENIZER)


def small_task(setting: int) -> tuple[Addition, Ask, Engine]:
    """One-digit sums; setting 0 asks greedily, setting 1 samples."""
    task, learned = Addition(digits=1), solved_documents(addition_problems(1, "train"))
    engine = Engine(NGram.fit_documents(learned, TOKENIZER, 4), TOKENIZER)
    return task, Ask(task, SamplingParams(temperature=float(setting), max_tokens=4)), engine


def experiment(folder: Path, setting: int, interrupt: bool) -> list[str] | None:
    task, ask, engine = small_task(setting)
    count = 20 if interrupt else 60  # interrupted: the first 20 of the same 60 problems were solved
    report = evaluate(task, ask, engine, count, split="train", trace_path=folder / "traces.jsonl")
    return None if interrupt else [trace["answer"] for trace in report.traces]


@dataclass(frozen=True)
class ScratchConfig:
    size: str = "tiny"
    seed: int = 0


def run_status(body: Callable[[], None]) -> str:
    with tempfile.TemporaryDirectory() as root:
        run = Run(MONTH, ScratchConfig(), root=Path(root))
        try:
            with run:
                body()
                run.finish({"done": True})
        except RuntimeError:
            pass
        return status(run.directory)


def healthy() -> Specimen:
    return {
        "model": MODEL,
        "vocab_size": TOKENIZER.vocab_size,
        "ids": torch.tensor([TOKENIZER.encode(text)[:16] for text in HELDOUT]),
        "tokenizer": TOKENIZER,
        "train_texts": TRAIN,
        "heldout_texts": HELDOUT,
        "bits_per_byte": bits_per_byte,
        "train_and_score": train_and_score,
        "generate": generate,
        "accuracy": accuracy,
        "solver": solver,
        "save": save,
        "load": load,
        "experiment": experiment,
        "run_status": run_status,
    }


# --- the bugs: the same spine with one part exchanged -----------------------------------------------------------------


def with_evaluator(evaluator: Callable[..., float]) -> Specimen:
    """A bug in the evaluator spoils every number that is taken with it."""
    return {
        **healthy(),
        "bits_per_byte": evaluator,
        "train_and_score": lambda train, heldout: evaluator(fit(train), heldout),
    }


def nats_as_bits() -> Specimen:
    return with_evaluator(lambda model, texts: bits_per_byte(model, texts) * np.log(2))


def mean_of_means() -> Specimen:
    def evaluator(model: NGram, texts: list[str]) -> float:
        batches = [texts[i : i + 5] for i in range(0, len(texts), 5)]
        return float(np.mean([bits_per_byte(model, batch) for batch in batches]))

    return with_evaluator(evaluator)


def characters_for_bytes() -> Specimen:
    def evaluator(model: NGram, texts: list[str]) -> float:
        score = score_documents(model, TOKENIZER, documents(texts))
        return bits(sum(score.nats)) / sum(map(len, texts))

    return with_evaluator(evaluator)


class SpecialsFirst(ByteTokenizer):
    """Another version of the tokenizer: the same vocabulary, with the special token at 0 and the bytes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.specials = dict.fromkeys(self.specials, 0)

    def encode(self, text: str, *, allow_special: object = False) -> list[int]:
        return [byte + 1 for byte in text.encode("utf-8")]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - 1]) if token_id else b""


def wrong_tokenizer() -> Specimen:
    other = SpecialsFirst()
    engine = Engine(MODEL, other)

    def generate(prompts: list[str], seed: int) -> list[str]:
        params = SamplingParams(max_tokens=24, seed=seed)
        return [row[0].text for row in engine.generate([engine.encode(prompt) for prompt in prompts], params)]

    return {
        **healthy(),
        "tokenizer": other,
        "bits_per_byte": lambda model, texts: bits_per_byte(model, texts, other),
        "generate": generate,
    }


def train_in_heldout() -> Specimen:
    return {**healthy(), "heldout_texts": [*HELDOUT[:9], *TRAIN[:3]]}


def recast(model: NGram, broken: type[NGram]) -> NGram:
    """The same counts behind another forward."""
    return broken(model.vocab_size, model.levels())


def sees_the_target() -> Specimen:
    class Peeking(NGram):
        def forward(self, ids: torch.Tensor, **masks: torch.Tensor) -> Output:
            logits = super().forward(ids, **masks).logits
            target = torch.nn.functional.one_hot(ids.roll(-1, dims=1), self.vocab_size)
            return Output((logits.exp() + target).log())

    return {
        **healthy(),
        "model": recast(MODEL, Peeking),
        "train_and_score": lambda train, heldout: bits_per_byte(recast(fit(train), Peeking), heldout),
    }


def rows_in_one_line() -> Specimen:
    class Flattening(NGram):
        def forward(self, ids: torch.Tensor, **_: torch.Tensor) -> Output:
            return Output(super().forward(ids.reshape(1, -1)).logits.reshape(*ids.shape, -1))

    return {**healthy(), "model": recast(MODEL, Flattening)}


def sampling_with(draw: Callable[[int, int, int], float]) -> Specimen:
    """A sampler that takes its random number for (seed, prompt, step) from `draw`."""

    def generate(prompts: list[str], seed: int) -> list[str]:
        rows, written = [ENGINE.encode(prompt) for prompt in prompts], [[] for _ in prompts]
        for step in range(24):
            uniforms = torch.tensor([draw(seed, i, step) for i in range(len(rows))])
            context = torch.tensor(
                [(row + new)[-MODEL.context_length :] for row, new in zip(rows, written, strict=True)]
            )
            for new, token in zip(
                written, sample(MODEL(context).logits[:, -1], SamplingParams(), uniforms)[0], strict=True
            ):
                new.append(int(token))
        return [TOKENIZER.decode(new) for new in written]

    return {**healthy(), "generate": generate}


def unseeded_sampling() -> Specimen:
    rng = np.random.default_rng()
    return sampling_with(lambda seed, i, step: rng.random())


def shared_generator() -> Specimen:
    state: dict[str, np.random.Generator] = {}

    def draw(seed: int, i: int, step: int) -> float:
        if i == 0 and step == 0:
            state["rng"] = np.random.default_rng(seed)
        return state["rng"].random()

    return sampling_with(draw)


def same_draw_for_every_row() -> Specimen:
    return sampling_with(lambda seed, i, step: np.random.default_rng((seed, step)).random())


def with_grader(score: Callable[[str, str], bool], *, shuffle: bool = False) -> Specimen:
    """A harness of its own: questions and right answers in two lists, and a grader of texts."""

    def accuracy(answer: Callable[[str], str]) -> float:
        problems = Addition().problems("test", 50, 0)
        golds = [problem.answer for problem in problems]
        if shuffle:
            problems = [problems[i] for i in np.random.default_rng(0).permutation(len(problems))]
        right = [score(answer(p.question), gold) for p, gold in zip(problems, golds, strict=True)]
        return float(np.mean(right))

    return {**healthy(), "accuracy": accuracy}


def shuffled_golds() -> Specimen:
    return with_grader(lambda text, gold: text == gold, shuffle=True)


def substring_grading() -> Specimen:
    return with_grader(lambda text, gold: text in gold)


def last_digit_grading() -> Specimen:
    return with_grader(lambda text, gold: text[-1:] == gold[-1:])


def partial_file() -> Specimen:
    def save(path: Path) -> None:
        append_json_line(path, *({"problem": i, "correct": i % 2 == 0} for i in range(40)))

    def load(path: Path) -> list[dict]:
        whole = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                whole.append(json.loads(line))
            except ValueError:
                continue  # "the last line may be incomplete"
        return whole

    return {**healthy(), "save": save, "load": load}


def resume_other_config() -> Specimen:
    def experiment(folder: Path, setting: int, interrupt: bool) -> list[str] | None:
        task, ask, engine = small_task(setting)
        problems = task.problems("train", 20 if interrupt else 60, 0)
        path = folder / "traces.jsonl"
        done = {trace["problem"]: trace["answer"] for trace in read_json_lines(path)}
        waiting = [problem for problem in problems if problem.name not in done]
        for problem, solution in zip(waiting, ask.solve(waiting, engine), strict=True):
            append_json_line(path, {"problem": problem.name, "answer": solution.answer})
            done[problem.name] = solution.answer
        return None if interrupt else [done[problem.name] for problem in problems]

    return {**healthy(), "experiment": experiment}


def position_as_index() -> Specimen:
    def experiment(folder: Path, setting: int, interrupt: bool) -> list[str] | None:
        task, ask, engine = small_task(setting)
        problems = task.problems("train", 20 if interrupt else 60, 0)
        path = folder / f"traces-{setting}.jsonl"
        done = {trace["problem"]: trace["answer"] for trace in read_json_lines(path)}
        waiting = [problem for problem in problems if problem.name not in done]
        prompts = [engine.encode(problem.question) for problem in waiting]
        for problem, (completion,) in zip(waiting, engine.generate(prompts, ask.params), strict=True):
            append_json_line(path, {"problem": problem.name, "answer": completion.text})
            done[problem.name] = completion.text
        return None if interrupt else [done[problem.name] for problem in problems]

    return {**healthy(), "experiment": experiment}


def crash_looks_finished() -> Specimen:
    def run_status(body: Callable[[], None]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            summary = Path(folder) / "summary.json"
            summary.write_text("{}", encoding="utf-8")  # "so that other tools can already find it"
            try:
                body()
                summary.write_text('{"done": true}', encoding="utf-8")
            except RuntimeError:
                pass
            return "finished" if summary.exists() else "crashed"

    return {**healthy(), "run_status": run_status}


def tuned_on_test() -> Specimen:
    def train_and_score(train: list[str], heldout: list[str]) -> float:
        return min(bits_per_byte(fit(train, order), heldout) for order in (1, 2, 3, 4))

    return {**healthy(), "train_and_score": train_and_score}


USUAL = ("beats-unigram", "samples-look-right", "repeatable")

january = functools.partial(Failure, month=MONTH, healthy=healthy)

FAILURES = [
    january(
        id="spine/nats-as-bits",
        title="Nats reported as bits",
        story="The loss is in nats; the table says bits. A factor of 0.69 looks like the best result of the year.",
        source="PyTorch's cross_entropy is in nats; no public report known to us",
        symptom="bits per byte 31 % lower than anybody else's, on every model alike",
        fix="Convert in one place, and check it with a model whose code length is known: log2(V) bits a token.",
        broken=nats_as_bits,
        probe="uniform-model",
        blind_spots=USUAL,
    ),
    january(
        id="spine/mean-of-means",
        title="The mean of batch means",
        story="Each batch reports its mean, and the means are averaged. The short last batch counts as much as a long "
        "one, so the number moves with the batch size and the order of the documents.",
        source="huggingface/transformers#34191, the same average in gradient accumulation; keras-team/keras-hub#2958",
        symptom="the metric changes in the third digit when the batch size does",
        fix="Carry sums and counts to the end and divide once.",
        broken=mean_of_means,
        probe="batch-composition",
        blind_spots=(*USUAL, "known-source"),
    ),
    january(
        id="spine/characters-for-bytes",
        title="Bits per character under the name bits per byte",
        story="The text is divided by len(text). On English the two agree, so nobody notices until the first accent.",
        source="a relative: karpathy/nanochat#693, byte lengths taken from decoded text",
        symptom="numbers agree on Shakespeare and differ by half on other languages",
        fix="Count the raw bytes of the tokens that were scored.",
        broken=characters_for_bytes,
        probe="uniform-model",
        blind_spots=(*USUAL, "known-source", "batch-composition"),
    ),
    january(
        id="spine/wrong-tokenizer",
        title="A tokenizer of another fingerprint",
        story="Another release of the tokenizer puts the special token first. The vocabulary has the same size, so "
        "every shape fits, and every id means the byte beside it.",
        source="a relative: allenai/open-instruct#1497, cached ids reused after the chat template changed",
        symptom="the loss of a good model is worse than that of a model without context",
        fix="Store the fingerprint in the checkpoint and refuse to load with another.",
        broken=wrong_tokenizer,
        probe="own-text",
        blind_spots=("repeatable", "known-source", "uniform-model"),
    ),
    january(
        id="spine/train-in-heldout",
        title="A training play among the held-out ones",
        story="The split was made by scene, or on a shuffled list of files, so part of a training "
        "play is evaluated as unseen text.",
        source="widely known",
        symptom="held-out loss a little too good; the gap to training closes",
        fix="Split by hash of the group, and look for shared spans.",
        broken=train_in_heldout,
        probe="overlap",
        blind_spots=(*USUAL, "known-source"),
    ),
    january(
        id="spine/sees-the-target",
        title="The prediction has seen the token to be predicted",
        story="A window, a mask or a statistic includes the next token, and the prediction mixes it in. The loss has never "
        "been better.",
        source="a relative, where the loss got worse: Lightning-AI/litgpt#407, a validation loss without the shift",
        symptom="loss below the entropy of the source; samples are unchanged, because nothing can be copied there",
        fix="Change the future and see that nothing before it moves.",
        broken=sees_the_target,
        probe="future-perturbation",
        blind_spots=USUAL,
    ),
    january(
        id="spine/rows-in-one-line",
        title="Rows of a batch read as one text",
        story="A reshape lays the rows end to end, so the first tokens of a row are predicted from the row above it. "
        "Only a few positions of each row are wrong, and the loss hardly moves.",
        source="A. Karpathy, A Recipe for Training Neural Networks (2019): view instead of transpose",
        symptom="nothing in the loss",
        fix="Change one row and see that the others stay.",
        broken=rows_in_one_line,
        probe="cross-row",
        blind_spots=("samples-look-right", "repeatable"),
    ),
    january(
        id="spine/unseeded-sampling",
        title="The sampler ignores the seed",
        story="A fresh generator is made inside the sampler. Every run reports other samples and another accuracy.",
        source="Lightning-AI/litgpt#1425, a seed that was accepted and never passed on",
        symptom="results that cannot be repeated, and differences that are not there",
        fix="Make the random numbers a function of (seed, prompt, sample).",
        broken=unseeded_sampling,
        probe="seed-determinism",
        blind_spots=USUAL,
    ),
    january(
        id="spine/shared-generator",
        title="One generator for the whole batch",
        story="Rows draw from one generator in turn. Adding a prompt changes the samples of all others, so a resumed "
        "or regrouped evaluation is another evaluation.",
        source="widely known",
        symptom="accuracy changes with the batch size, within the noise",
        fix="Give every row its own numbers.",
        broken=shared_generator,
        probe="batch-independence",
        blind_spots=(*USUAL, "seed-determinism", "distinct-samples"),
    ),
    january(
        id="spine/same-draw-for-every-row",
        title="Every sample gets the same random numbers",
        story="The generator is seeded inside the loop over samples. Sixteen samples of a prompt are one sample, "
        "sixteen times, and voting over them cannot help.",
        source="relatives: karpathy/nanochat#38, the first sampled token broadcast to all rows; vllm-project/vllm#11953",
        symptom="pass@16 equals pass@1",
        fix="Put the sample index into the seed; count distinct samples.",
        broken=same_draw_for_every_row,
        probe="distinct-samples",
        blind_spots=("beats-unigram", "repeatable", "seed-determinism", "batch-independence"),
    ),
    january(
        id="spine/shuffled-golds",
        title="Questions paired with other answers",
        story="Problems are shuffled, the list of right answers is not. A model that can do nothing looks the same as "
        "one that can do everything.",
        source="allenai/open-instruct#1484, a second shuffle that left the answers behind",
        symptom="accuracy near chance whatever the model",
        fix="Keep question and answer in one record, and run a perfect answerer through the harness.",
        broken=shuffled_golds,
        probe="oracle-solver",
        blind_spots=(*USUAL, "answer-attacks"),
    ),
    january(
        id="spine/substring-grading",
        title="An answer counts if it occurs in the right one",
        story="`answer in gold` forgives formatting. It also forgives saying nothing: the empty text is in every text.",
        source="Liuziyu77/Visual-RFT#176, the empty answer always rewarded",
        symptom="accuracy rises as answers get shorter",
        fix="Extract, normalise, compare for equality; attack the grader with answers that are surely wrong.",
        broken=substring_grading,
        probe="answer-attacks",
        blind_spots=(*USUAL, "oracle-solver"),
    ),
    january(
        id="spine/last-digit-grading",
        title="The extraction rule keeps the last digit",
        story="A pattern without a quantifier takes one digit where it should take a number, from the answer and from the "
        "right answer alike. In January's own task this turns an accuracy of 0 % into 100 %.",
        source="measured in the notebook of this month",
        symptom="a model that has learned the ones column is reported to add",
        fix="Grade answers that share a part with the right one; they must score nothing.",
        broken=last_digit_grading,
        probe="answer-attacks",
        blind_spots=(*USUAL, "oracle-solver"),
    ),
    january(
        id="spine/partial-file",
        title="A partial file taken for a whole one",
        story="The reader skips lines that do not parse, because a killed writer may leave one. So it also accepts a "
        "file that lost half its lines, and reports the accuracy of the rest.",
        source="a relative: volcengine/verl#4873, the old checkpoint deleted before the new one was complete",
        symptom="n is smaller than it was; nobody prints n",
        fix="Write atomically, record the hash, and refuse what does not match.",
        broken=partial_file,
        probe="truncation",
        blind_spots=USUAL,
    ),
    january(
        id="spine/resume-other-config",
        title="A resumed run continues another run's traces",
        story="The evaluation continues whatever trace file it finds. After a change of the sampling settings, the "
        "first third of the answers is the old system's.",
        source="EleutherAI/lm-evaluation-harness#3881, a cache key without the generation settings",
        symptom="a change has a smaller effect than it should",
        fix="Put the identity of the evaluation at the head of its file and compare before continuing.",
        broken=resume_other_config,
        probe="resume-equals-fresh",
        blind_spots=USUAL,
    ),
    january(
        id="spine/position-as-index",
        title="A resumed run draws other random numbers",
        story="Random draws are seeded by the position in the batch. After a restart only the remaining problems are "
        "run, so every position has moved, and the finished result depends on when the run was killed.",
        source="a relative: pytorch/torchtitan#3907, a data stream that restarts on the second resume",
        symptom="an interrupted run ends with other numbers than an undisturbed one",
        fix="Seed by the problem's own index.",
        broken=position_as_index,
        probe="resume-equals-fresh",
        blind_spots=(*USUAL, "seed-determinism"),
    ),
    january(
        id="spine/crash-looks-finished",
        title="A crashed run looks finished",
        story="Other tools look for summary.json, so it is written early. A run that dies leaves one behind.",
        source="a relative: huggingface/OpenEnv#1025, a crashed verifier recorded as a score of 0",
        symptom="a table with a row from a run that never ended",
        fix="Make the status the last thing that is written.",
        broken=crash_looks_finished,
        probe="crash-status",
        blind_spots=USUAL,
    ),
    january(
        id="spine/tuned-on-test",
        title="The order of the model was chosen on the test plays",
        story="Four orders are tried and the one with the best test number is reported as the test number.",
        source="widely known; the reason for a third split",
        symptom="a result that shrinks on new text",
        fix="Choose on validation plays; look at the test plays once.",
        broken=tuned_on_test,
        probe=None,
        survives="The number is computed correctly; what is wrong is how often it was looked at. Only a text that "
        "nobody has looked at shows the difference.",
    ),
]
