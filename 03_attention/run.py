"""March: what attention needs (order), what it does (recall, look-up), and what tokens come to mean by being used."""

from dataclasses import dataclass

from common.data import synthetic
from common.data.shards import Shards
from common.foundation.evidence import claim, number
from common.foundation.parallel import each
from common.foundation.plots import bars, curves, save
from common.foundation.run import Run, announce, needed, script
from common.foundation.statistics import Interval, mean_of_seeds
from common.model.transformer import Transformer
from common.studies import attending
from common.tokenization.bpe import BPETokenizer
from common.training.fit import Fit

INPUTS = ("02_tokenization",)
KINDS = ("none", "learned", "sinusoidal", "alibi", "rope")
LENGTHS = (32, 64, 128)  # trained at the first
NAMES = (b" he", b" was", b" king", b"ROMEO", b"7")


@dataclass(frozen=True)
class Config:
    """None: what the size implies."""

    size: str = "small"
    seed: int = 0
    seeds: int | None = None  # trainings of each way to write order
    steps: int | None = None  # of each of them, and of each recall
    look_up_steps: int | None = None
    word_steps: int | None = None
    gaps: tuple[int, ...] = (4, 16, 48)  # tokens of noise between a thing and its recall


SIZES = {
    "tiny": {"seeds": 2, "steps": 30, "look_up_steps": 40, "word_steps": 20},
    "small": {"seeds": 3, "steps": 250, "look_up_steps": 700, "word_steps": 250},
    "medium": {"seeds": 5, "steps": 1000, "look_up_steps": 2000, "word_steps": 2000},
    "large": {"seeds": 5, "steps": 1000, "look_up_steps": 2000, "word_steps": 5000},
}


def main(config: Config) -> None:
    with Run("03_attention", config, inputs=INPUTS) as run:
        february = needed("02_tokenization", config.size)
        tokenizer = BPETokenizer.load(february / "tokenizer.json")
        order, recalled = order_study(run, config), recall_study(run, config)
        shards, seed = Shards.for_tokenizer(february / "train", tokenizer), config.seed
        jobs = [
            {"work": attending.learn_words, "shards": shards, "steps": config.word_steps, "seed": seed},
            {"work": attending.watched_look_up, "steps": config.look_up_steps, "seed": seed},
        ]
        learned, (model, result, steps, seen) = each(attending.study, jobs, label="look-up and embeddings")
        test = synthetic.repeated(128, 48, attending.VOCABULARY, attending.UNSEEN)
        without = attending.silenced(spend(run, model, result, "look-up"), test)
        words, untrained = spend(run, *learned, "embeddings"), attending.learn_words(shards, steps=0, seed=seed)[0]
        cosines = attending.word_geometry(words, untrained, tokenizer, shards)
        run.identify(
            tokenizer=tokenizer.fingerprint,
            model={"steps": [config.steps, config.look_up_steps, config.word_steps], "seeds": config.seeds},
            measurement={"unseen": attending.UNSEEN, "gaps": list(config.gaps), "lengths": list(LENGTHS)},
        )
        axes = {"title": "Which token came before? Trained at 32 tokens", "xlabel": "tokens", "ylabel": "accuracy"}
        lines = {kind: [*row, *[float("nan")] * (len(LENGTHS) - len(row))] for kind, row in order.items()}
        figure = curves(LENGTHS, lines, **axes, level=("chance", 1 / attending.VOCABULARY))
        caption = "Learned positions end with their table, at 64; the rows beyond 32 were never trained."
        figures = [save(figure, run.path("order.png"), caption=caption)]
        axes = {"title": "Recall across noise", "xlabel": "tokens between", "ylabel": "accuracy"}
        figure = curves(config.gaps, recalled, **axes, level=("chance", 1 / 8))
        caption = "One layer each, equally wide, equal steps: a state must survive every step, attention looks back."
        figures.append(save(figure, run.path("recall.png"), caption=caption))
        axes = {"title": "Two layers learn to look up", "xlabel": "step", "ylabel": "accuracy, or share of attention"}
        figure = curves(steps, seen, **axes)
        caption = "Accuracy rises when a head of the second layer has found where to look."
        figures.append(save(figure, run.path("look-up.png"), caption=caption))
        figure = bars(without, title="Look-up with one head silenced", xlabel="accuracy", highlight=("induction head",))
        caption = "Heads of the second layer: the one with the best induction score, and the other as the control."
        figures.append(save(figure, run.path("heads.png"), caption=caption))
        unit, rows = "accuracy", []
        for kind, values in order.items():
            rows += [number(f"order by {kind}, {n} tokens", v, unit) for n, v in zip(LENGTHS, values, strict=False)]
        for kind, values in recalled.items():
            rows += [number(f"{kind}, recall after {n}", v, unit) for n, v in zip(config.gaps, values, strict=True)]
        rows += [number(f"look-up, silenced: {name}", value, unit) for name, value in without.items()]
        rows += [number(f"cosine, {name}", value, "cosine", f"over {value.n}") for name, value in cosines.items()]
        control = next(value for name, value in without.items() if name.startswith("control"))
        said, cost = [], {"steps": config.steps}
        if config.size != "tiny":  # that trains for seconds, and claims nothing
            said = [
                claim("With rotary positions a layer knows what came before", order["rope"][0], order["none"][0], cost=cost),
                claim("After equal steps attention recalls over 48 tokens, an LSTM does not", recalled["attention"][-1],
                      recalled["lstm"][-1], unit=unit, cost=cost),
                claim("Look-up needs its induction head more than the other", without["induction head"], control,
                      better="lower", unit=unit, cost={"steps": config.look_up_steps}),
                claim("Names of speakers end up near each other", cosines["speakers' names"],
                      cosines["speakers' names: others as frequent"], unit="cosine", cost={"steps": config.word_steps}),
            ]  # fmt: skip
        text = attending.neighbours(words, tokenizer, NAMES)
        samples = [{"title": "nearest neighbours after a short training", "text": text}]
        title = "Attention: masks, shapes and order"
        run.finish({"title": title, "claims": said, "numbers": rows, "figures": figures, "samples": samples})


def spend(run: Run, model: Transformer, fit: Fit, what: str) -> Transformer:
    announce(f"  {what}: {fit.losses[-1]:.3f} nats after {len(fit.losses)} steps")
    run.spend(trained=fit.tokens, flops=3 * fit.tokens * model.flops_per_token(48))
    run.log(what=what, losses=fit.losses[::10])
    return model


def order_study(run: Run, config: Config) -> dict[str, list[Interval]]:
    """Accuracy at each length that the positions allow, over all seeds."""
    jobs = [
        {"positions": kind, "steps": config.steps, "seed": seed}
        for kind in KINDS
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    models: dict[str, list[Transformer]] = {kind: [] for kind in KINDS}
    for job, learned in zip(jobs, each(attending.learn_order, jobs, label="order"), strict=True):
        models[job["positions"]].append(spend(run, *learned, f"order by {job['positions']}, seed {job['seed']}"))
    tests = [synthetic.previous(64, n, attending.VOCABULARY, attending.UNSEEN) for n in LENGTHS]
    found = {}
    for kind, them in models.items():
        most = them[0].context_length if kind == "learned" else max(LENGTHS)
        tests_of = [test for test in tests if test.inputs.shape[1] <= most]
        found[kind] = [mean_of_seeds([attending.scored([one], test).mean for one in them]) for test in tests_of]
    return found


def recall_study(run: Run, config: Config) -> dict[str, list[Interval]]:
    jobs = [
        {"kind": kind, "gap": n, "steps": config.steps, "seed": config.seed}
        for kind in ("attention", "lstm", "rnn")
        for n in config.gaps
    ]
    found: dict[str, list[Interval]] = {}
    for job, learned in zip(jobs, each(attending.learn_recall, jobs, label="recall"), strict=True):
        model = spend(run, *learned, f"{job['kind']}, recall after {job['gap']}")
        test = synthetic.recall(500, job["gap"], 24, attending.UNSEEN, pairs=1)
        found.setdefault(job["kind"], []).append(attending.scored([model], test))
    return found


if __name__ == "__main__":
    script(__name__)
