"""June: somebody else's weights in our spine and ours in theirs, checked; and what pretraining buys."""

import time
from dataclasses import dataclass

from common.foundation.files import read_json
from common.foundation.run import Run, announce, needed, script
from common.generation.engine import Engine
from common.pretrained.export import export_hf
from common.pretrained.load import load_pretrained
from common.studies import base, baselines, platform
from common.training.checkpoint import model_fingerprint

INPUTS = ("05_pretraining", "shakespeare", "wiki", "web", "smollm2", "analogies")


@dataclass(frozen=True)
class Config:
    """None: what the size implies."""

    size: str = "small"
    seed: int = 0
    model: str | None = None  # what load_pretrained reads; "export" is the base model, written and read back
    characters: int | None = None  # of each domain that is scored
    strings: int | None = None  # on which tokenizers are compared
    tokens: int | None = None  # of greedy text for each prompt
    questions: int | None = None  # sums
    analogies: float | None = None  # share of the questions that is asked


SIZES = {
    "tiny": {"model": "export", "characters": 6000, "strings": 200, "tokens": 8, "questions": 4, "analogies": 0.1},
    "small": {"model": "smollm2", "characters": 16_000, "strings": 10_000, "tokens": 200, "questions": 60, "analogies": 1.0},
    "medium": {"model": "smollm2", "characters": 100_000, "strings": 10_000, "tokens": 200, "questions": 500,
               "analogies": 1.0},
    "large": {"model": "smollm2", "characters": 400_000, "strings": 10_000, "tokens": 200, "questions": 1000,
              "analogies": 1.0},
}  # fmt: skip
LABELS = {"smollm2": "SmolLM2-135M-Instruct, 2 trillion tokens", "export": "the base model itself, exported"}


def main(config: Config) -> None:
    with Run("06_baselines", config, inputs=INPUTS) as run:
        may, start = needed("05_pretraining", config.size), time.perf_counter()
        mine = load_pretrained(may)
        source = export_hf(may, run.path("exported")) if config.model == "export" else config.model
        loaded = load_pretrained(source)
        seconds = time.perf_counter() - start
        announce(
            f"{config.model}: {loaded.model.num_parameters():,} parameters, here after {seconds:.1f} s; now transformers'"
        )
        theirs = platform.reference_of(source)
        claims, rows, samples, spent = baselines.platform_checks(
            source, loaded, theirs, strings=config.strings, tokens=config.tokens
        )
        rows += baselines.way_out(may, run.path("base-model"))

        announce("compared; now the n-grams that stand beside the models, then bits per byte")
        theirs_config = read_json(may / "manifest.json")["config"]
        shares = {name: theirs_config[name] for name in ("plays", "wiki", "web", "arithmetic")}
        data = base.base_data(mine.tokenizer, shares, round(1e6 * theirs_config["megabytes"]), theirs_config["seed"])
        counted = base.ngram_of(data.ids, Engine(mine.model, mine.tokenizer).end, mine.tokenizer.vocab_size)
        contenders = baselines.contenders_of(loaded, mine, counted, LABELS.get(config.model, config.model))
        documents = baselines.sampled(base.test_documents(config.seed), config.characters)
        said, more, figures, scored = baselines.table(contenders, documents, run.path)
        sums, written = baselines.plain_sums(contenders, config.questions, config.seed)
        about, words, shown, near = baselines.word_analogies(contenders, config.analogies, run.path, config.seed)
        announce("now the same weights, loaded wrongly")
        wrong, drawn, texts = baselines.loading_mistakes(
            loaded, theirs.model, documents["wiki"][0], run.path, platform.PROMPTS[0], min(40, config.tokens)
        )
        run.spend(**spent, **scored)
        run.identify(
            tokenizer=loaded.tokenizer.fingerprint, model={"weights": model_fingerprint(loaded.model)},
            measurement={"characters": config.characters, "questions": config.questions},
        )  # fmt: skip
        run.finish({"title": "Baselines: other people's weights in our spine, ours in theirs",
                    "claims": claims + said + about, "numbers": rows + more + sums + words + wrong,
                    "figures": figures + shown + drawn, "samples": samples + written + near + texts})  # fmt: skip


if __name__ == "__main__":
    script(__name__)
