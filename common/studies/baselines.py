"""June's report: is the platform right, what does pretraining buy, what do loading mistakes cost?

A model of somebody else's and the base model of May beside it, on the same held-out documents and the same problems.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.data import arithmetic
from common.data.documents import Document
from common.evaluation.extraction import extract_answer
from common.evaluation.text import TextScore, score_documents
from common.foundation.assets import asset
from common.foundation.evidence import claim, number
from common.foundation.plots import bars, save
from common.foundation.statistics import mean_ci, paired_difference
from common.generation.engine import Engine
from common.generation.prepacked import prepacked
from common.generation.sampling import SamplingParams
from common.model.output import LanguageModel
from common.model.transformer import Transformer
from common.pretrained.export import export_hf
from common.pretrained.load import Pretrained, load_pretrained
from common.pretrained.parity import parity_report
from common.studies import analogies, platform
from common.studies.base import a_few
from common.studies.misloaded import mistakes
from common.tokenization.protocol import Tokenizer

Rows = list[dict[str, Any]]
PLACE = Callable[[str], Path]
SHOTS = 8  # worked examples in front of a sum, for a model that has never seen our notation


@dataclass(frozen=True)
class Contender:
    """A model in the table. `trained` says on how much text, for the reader."""

    model: LanguageModel
    tokenizer: Tokenizer
    trained: str
    parameters: int | None = None


def scores(
    contenders: Mapping[str, Contender], documents: Mapping[str, Sequence[Document]]
) -> dict[str, dict[str, tuple[TextScore, float]]]:
    """domain -> name -> (score, CPU seconds that scoring took)."""
    found: dict[str, dict[str, tuple[TextScore, float]]] = {domain: {} for domain in documents}
    with tqdm(total=len(documents) * len(contenders), desc="scoring", delay=2) as bar:
        for domain, few in documents.items():
            for name, one in contenders.items():
                start = time.process_time()
                score = score_documents(one.model, one.tokenizer, few)
                found[domain][name] = (score, time.process_time() - start)
                bar.update()
    return found


def table(
    contenders: Mapping[str, Contender], documents: Mapping[str, Sequence[Document]], place: PLACE
) -> tuple[Rows, Rows, Rows, dict[str, int]]:
    """(claims, rows, figures, tokens spent): bits per byte of every domain, and differences paired by document."""
    found, rows, claims = scores(contenders, documents), [], []
    for domain, by_name in found.items():
        for name, (score, seconds) in by_name.items():
            size = (
                "counts"
                if contenders[name].parameters is None
                else f"{contenders[name].parameters / 1e6:.1f} M parameters"
            )
            note = f"{len(score.names)} documents; {size}; {contenders[name].trained}; {seconds:.1f} CPU seconds"
            rows.append(number(f"{domain}: {name}", score.bits_per_byte(), "bits per byte", note))
        ours, theirs = by_name["base model"][0], by_name["pretrained"][0]
        apart = paired_difference(theirs.per_document(), ours.per_document())
        rows.append(
            number(f"{domain}: pretrained less base model", apart, "bits per byte", "mean over documents, paired")
        )
    shown = {
        f"{domain}: {name}": by_name[name][0].bits_per_byte() for domain, by_name in found.items() for name in by_name
    }
    figure = bars(shown, title="Bits per byte of held-out text", xlabel="bits per byte",
                  highlight=[name for name in shown if name.endswith("pretrained")])  # fmt: skip
    figures = [save(figure, place("table.png"), caption="Lower is better. Intervals over documents.")]
    if contenders["pretrained"].parameters != contenders["base model"].parameters:  # not the base model itself
        web = {name: found["web"][name][0].bits_per_byte() for name in ("pretrained", "base model")}
        claims.append(claim("A model pretrained on trillions of tokens codes web pages better than the base model",
                            web["pretrained"], web["base model"], better="lower", unit="bits per byte"))  # fmt: skip
        sums = {name: found["arithmetic"][name][0].bits_per_byte() for name in ("pretrained", "base model")}
        claims.append(claim("The base model codes its own worked arithmetic better than the pretrained one",
                            sums["base model"], sums["pretrained"], better="lower", unit="bits per byte"))  # fmt: skip
    spent = {"scored": sum(sum(score.tokens) for by_name in found.values() for score, _ in by_name.values())}
    return claims, rows, figures, spent


def plain_sums(contenders: Mapping[str, Contender], questions: int, seed: int) -> tuple[Rows, Rows]:
    """(rows, samples): unseen sums of three numbers at once. The pretrained model is shown worked examples first."""
    problems = arithmetic.problems("plain_sum", "test", questions, seed)
    shown = arithmetic.problems("plain_sum", "train", SHOTS, seed + 1)

    def natural(problem: Any) -> str:
        return " + ".join(map(str, problem.numbers)) + " ="

    examples = "".join(f"{natural(problem)} {problem.answer}\n" for problem in shown)
    rows, samples = [], []
    for name, prompts in (
        ("base model", [problem.question + "\n" for problem in problems]),
        ("pretrained", [examples + natural(problem) for problem in problems]),
    ):
        one = contenders[name]
        engine = Engine(one.model, one.tokenizer)
        params = SamplingParams(temperature=0, max_tokens=12, stop=("\n",) if name == "pretrained" else ())
        made = engine.generate([engine.encode(prompt) for prompt in prompts], params)
        answers = [extract_answer(completion.text, "first_number") for (completion,) in made]
        right = mean_ci([float(answer == problem.answer) for answer, problem in zip(answers, problems, strict=True)])
        how = f"{SHOTS} examples in the prompt" if name == "pretrained" else "its own notation, as it was trained"
        rows.append(number(f"sums of three at once: {name}", right, "rate", how))
        samples.append({"title": f"A sum, {name}", "text": prompts[0] + made[0][0].text})
    return rows, samples


def word_analogies(
    contenders: Mapping[str, Contender], share: float, place: PLACE, seed: int
) -> tuple[Rows, Rows, Rows, Rows]:
    """(claims, rows, figures, samples) of the token embeddings, with random ones of the same shape as a control."""
    rows, figures, claims, samples = [], [], [], []
    for name in ("pretrained", "base model"):
        one = contenders[name]
        asked = analogies.questions(asset("analogies"), one.tokenizer).some(share)
        note = f"{len(asked):,} of {asked.of:,} questions have four single tokens"
        if not len(asked):
            continue
        embeddings = one.model.embedding.weight.detach()
        noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed))
        answers = analogies.right(embeddings, asked, one.tokenizer)
        random = analogies.right(noise, asked, one.tokenizer)
        rows.append(number(f"analogies: {name}", mean_ci(answers), "rate", note))
        rows.append(number(f"analogies: random embeddings, tokens of the {name}", mean_ci(random), "rate"))
        if name == "pretrained":
            every = analogies.right(embeddings, asked, one.tokenizer, whole_words=False)
            rows.append(
                number("analogies: pretrained, every token a candidate", mean_ci(every), "rate", "the same questions")
            )
            kinds = analogies.by_kind(answers, asked)
            figure = bars(
                kinds, title="Analogies on the pretrained token embeddings", xlabel="share answered right", limit=1.15
            )
            figures.append(
                save(figure, place("analogies.png"), caption="Single-token words; 95 % intervals over questions.")
            )
            if len(asked) >= 100:
                claims.append(claim("Pretrained token embeddings answer word analogies; random ones do not",
                                    mean_ci(answers), mean_ci(random), unit="rate"))  # fmt: skip
            near = analogies.nearest(embeddings, one.tokenizer, ("man", "king", "woman"))
            samples.append({"title": "king - man + woman", "text": "\n".join(near)})
    return claims, rows, figures, samples


def loading_mistakes(
    loaded: Pretrained, theirs: torch.nn.Module, document: Document, place: PLACE, prompt: str, tokens: int
) -> tuple[Rows, Rows, Rows]:
    """(rows, figures, samples): the loss, the text and the first divergence of each mistake."""
    model, words = loaded.model, loaded.tokenizer
    ids = torch.tensor([words.encode(document.text)[: min(256, model.context_length)]])
    params, rows, samples, shown = SamplingParams(temperature=0, max_tokens=tokens), [], [], {}

    def look(name: str, wrong: Transformer, note: str) -> None:
        score = score_documents(wrong, words, [document]).mean()
        ((completion,),) = Engine(wrong, words, opening=()).generate([prompt], params)  # as transformers begins
        rows.append(number(f"loaded wrongly: {name}", score, "bits per byte", note))
        samples.append({"title": f"Loaded wrongly: {name}", "text": prompt + completion.text})
        shown[name] = score

    look("not at all (the control)", model, "")
    for mistake in tqdm(mistakes(model), desc="loading mistakes", delay=2):
        wrong = mistake.make(model)
        with mistake.also() if mistake.also else contextlib.nullcontext():
            found = parity_report(wrong, theirs, ids)
            first = "no stage differs" if found.first is None else f"first: {found.first.stage.name}; {found.cause}"
            look(mistake.name, wrong, first)
    figure = bars(shown, title="What a loading mistake costs", xlabel="bits per byte of one passage",
                  highlight=["not at all (the control)"])  # fmt: skip
    caption = "One passage, one model: the order of the mistakes may be another elsewhere."
    return rows, [save(figure, place("mistakes.png"), caption=caption)], samples


def platform_checks(
    source: str | Path, loaded: Pretrained, theirs: platform.Reference, *, strings: int, tokens: int
) -> tuple[Rows, Rows, Rows, dict[str, int]]:
    """(claims, rows, samples, tokens spent): ids, stages and greedy text against transformers."""
    texts = platform.strange_texts(strings)
    odd = platform.differing_ids(loaded.tokenizer, theirs.tokenizer, texts)
    other = theirs.converted or theirs.tokenizer
    converted = platform.differing_ids(loaded.tokenizer, other, texts)
    found = platform.forward_parity(loaded, theirs.model)
    same, ours = platform.greedy_parity(loaded, theirs.model, tokens=tokens)
    rows = [
        number("platform: strings with other ids", len(odd), f"of {strings:,}", "against the tokenizers library"),
        number("platform: strings with other ids, as transformers converts the file", len(converted), f"of {strings:,}",
               "it leaves out the digits step, so white space before a digit is cut otherwise" if converted else ""),
        number("platform: stages that differ", len(found.wrong), f"of {len(found.rows)}", "on the reference's own inputs"),
        number("platform: largest difference of a logit", 1e6 * found.logits, "millionths", "fp32, 256 tokens"),
        number("platform: prompts with another greedy text", same.count(False), f"of {len(same)}", f"{tokens} tokens each"),
    ]  # fmt: skip
    claims = [claim("The same file gives the same logits in our model and in transformers, to one thousandth",
                    1e6 * found.logits, 1000.0, better="lower", unit="millionths of a logit")]  # fmt: skip
    samples = [{"title": f"Greedy, after {prompt!r}", "text": prompt + completion.text}
               for prompt, completion in list(zip(platform.PROMPTS, ours, strict=True))[:3]]  # fmt: skip
    return claims, rows, samples, {"generated": sum(len(completion.ids) for completion in ours)}


def way_out(run: Path, folder: Path) -> Rows:
    """Our base model as a Hugging Face folder, read by transformers and by ourselves."""
    loaded = load_pretrained(export_hf(run, folder))
    theirs, ours = platform.reference_of(folder), load_pretrained(run)
    found = platform.forward_parity(ours, theirs.model)
    odd = platform.differing_ids(ours.tokenizer, theirs.tokenizer, platform.strange_texts(1000))
    exact = all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), loaded.model.parameters(), strict=True))
    return [
        number(
            "export: largest difference of a logit", 1e6 * found.logits, "millionths", "the base model in transformers"
        ),
        number("export: strings with other ids", len(odd), "of 1,000", "against transformers' tokenizer"),
        number("export: weights that come back unchanged", float(exact), "rate"),
    ]


def contenders_of(loaded: Pretrained, base: Pretrained, counted: Any, label: str) -> dict[str, Contender]:
    """The four of the table: the counts and May's model were trained on the same stream."""
    stream = "trained on May's stream"
    return {
        "unigram": Contender(counted.truncated(1), base.tokenizer, stream),
        "5-gram": Contender(counted, base.tokenizer, stream),
        "base model": Contender(prepacked(base.model), base.tokenizer, stream, base.model.num_parameters()),
        "pretrained": Contender(prepacked(loaded.model), loaded.tokenizer, label, loaded.model.num_parameters()),
    }


def sampled(documents: Mapping[str, Sequence[Document]], characters: int) -> dict[str, list[Document]]:
    """So many characters of each domain, evenly spread; worked arithmetic takes more tokens a character, so less of it."""
    return {
        name: a_few(few, characters // 2 if name == "arithmetic" else characters) for name, few in documents.items()
    }
