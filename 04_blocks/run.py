"""April: what makes depth trainable, where the learning rate breaks it, and which part of a block earns its place."""

import math
from dataclasses import dataclass

from common.foundation.evidence import claim, number
from common.foundation.files import sha256_bytes
from common.foundation.parallel import each
from common.foundation.plots import bars, curves, grid, save
from common.foundation.run import Run, script
from common.foundation.statistics import Interval, mean_of_seeds
from common.model.config import PRESETS, ModelConfig
from common.model.cost import flops_per_token, kv_bytes_per_token
from common.studies import depth

INPUTS = ("shakespeare",)
PAIR, RATES = ("pre-norm", "post-norm"), (1e-2, 3e-2)  # compared over seeds
STREAMS = {
    "pre-norm": {},
    "post-norm": {"norm_placement": "post"},
    "no norm": {"norm_placement": "none"},
    "no residual": {"residual": False},
    "pre-norm, branches unscaled": {"residual_scale": math.sqrt(48)},  # undoes the 1 / sqrt(2 L) of the initialisation
}


@dataclass(frozen=True)
class Config:
    """None: what the size implies."""

    size: str = "small"
    seed: int = 0
    layers: int = 24  # of the untrained stacks
    steps: int | None = None  # of each ablation, in steps of the base
    seeds: int | None = None
    knob_steps: int | None = None
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


SIZES = {
    "tiny": {"steps": 3, "seeds": 2, "knob_steps": 2},
    "small": {"steps": 110, "seeds": 3, "knob_steps": 50},
    "medium": {"steps": 2000, "seeds": 3, "knob_steps": 500},
    "large": {"steps": 2000, "seeds": 5, "knob_steps": 500},
}


def main(config: Config) -> None:
    with Run("04_blocks", config, inputs=INPUTS) as run:
        text = depth.Bytes.of_plays()
        figures, rows = stream_study(run, config, text)
        edges, turn, figure = knob_study(run, config, text)
        figures.append(figure)
        each_seed = part_study(run, config, text)
        diverged = {name: sum(map(math.isinf, values)) for name, values in each_seed.items()}
        parts = {name: mean_of_seeds(values) for name, values in each_seed.items() if not diverged[name]}
        axes = {"title": "One part replaced, equal arithmetic", "xlabel": "bits per byte"}
        figure = bars(parts, **axes, highlight=("as it is",))
        caption = f"{config.seeds} seeds; intervals over seeds. Short trainings: what helps at the start."
        figures.append(save(figure, run.path("parts.png"), caption=caption))
        rows += [number(f"{name}: highest rate that learns", edge, "rate", "one seed") for name, edge in edges.items()]
        rows += [number(f"post-norm minus pre-norm at rate {rate:g}", value, "nats") for rate, value in turn.items()]
        for name, value in parts.items():
            paired = mean_of_seeds([a - b for a, b in zip(each_seed[name], each_seed["as it is"], strict=True)])
            note = f"{paired.mean:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}] to the base, seed by seed"
            rows.append(number(f"part, {name}", value, "bits per byte", "the base" if name == "as it is" else note))
        rows += [number(f"part, {name}: diverged", count, "seeds") for name, count in diverged.items() if count]
        for name in PRESETS:
            shape = ModelConfig.preset(name)
            cost = flops_per_token(shape, 1024) / 1e9
            size = kv_bytes_per_token(shape, 2)
            rows.append(number(f"{name}: cache", size, "bytes per token", f"{cost:.3g} GFLOP a token"))
        measured, trained = sha256_bytes(text.held_out.tobytes()), {"steps": config.steps, "seeds": config.seeds}
        run.identify(tokenizer="bytes", model=trained, measurement={"held_out": measured})
        said = []
        if config.size != "tiny":  # that trains for two steps, and claims nothing
            cost = {"bytes for each seed": config.steps * 512}
            said = [
                claim("Three blocks need their residual paths", parts["as it is"], parts["no residual"],
                      better="lower", unit="bits per byte", cost=cost),
                claim("Post-norm against pre-norm: what wins at one learning rate loses at another", turn[RATES[1]],
                      turn[RATES[0]], unit="nats apart", cost={"steps": config.knob_steps, "seeds": config.seeds}),
            ]  # fmt: skip
        title = "Transformer blocks: paths, norms, knobs"
        run.finish({"title": title, "claims": said, "numbers": rows, "figures": figures, "samples": []})


def stream_study(run: Run, config: Config, text: depth.Bytes) -> tuple[list[dict], list[dict]]:
    """Size of signal and gradient at each depth of untrained stacks: figures, and rows for the table."""
    signals, gradients, rows = {}, {}, []
    for name, changes in STREAMS.items():
        shape = depth.BASE.but(layers=config.layers, **changes)
        signal, gradient = depth.norms_by_depth(shape, text.batch(0, 4), config.seed)
        signals[name], gradients[name] = ([math.log10(max(v, 1e-12)) for v in x] for x in (signal, gradient))
        ratio = math.log10(max(gradient[0], 1e-12) / max(gradient[-1], 1e-12))
        rows.append(
            number(f"{name}: gradient, bottom / top", ratio, "powers of ten", f"{config.layers} untrained blocks")
        )
    places, figures = list(range(config.layers + 1)), []
    for lines, what, file in ((signals, "signal", "signal"), (gradients, "gradient", "gradient")):
        title = f"Size of the {what} by depth, before training"
        figure = curves(places, lines, title=title, xlabel="blocks passed", ylabel="log10")
        figures.append(save(figure, run.path(f"{file}.png"), caption="One batch of text, no training."))
    return figures, rows


def knob_study(run: Run, config: Config, text: depth.Bytes) -> tuple[dict[str, float], dict[float, Interval], dict]:
    """(highest rate at which each variant still learns, post-norm minus pre-norm at two rates, the grid as a figure)."""
    seeds = range(config.seed, config.seed + config.seeds)
    asked = [(knob, rate, config.seed) for knob in depth.KNOBS for rate in config.rates]
    asked += [(knob, rate, seed) for knob in PAIR for rate in RATES for seed in seeds[1:]]
    fixed = {"text": text, "steps": config.knob_steps}
    jobs = [{"knob": knob, "learning_rate": rate, "seed": seed, **fixed} for knob, rate, seed in asked]
    losses = each(depth.loss_at_rate, jobs, label="knobs")
    run.spend(trained=len(jobs) * config.knob_steps * 512)
    limit, edges, table = depth.unigram_nats(text) - 0.1, {}, {}
    for (knob, rate, seed), loss in zip(asked, losses, strict=True):
        run.log(knob=knob, rate=rate, seed=seed, loss=loss if math.isfinite(loss) else None)
        if seed == config.seed:
            table.setdefault(knob, []).append(loss)
            edges[knob] = max(edges.get(knob, 0.0), rate if loss < limit else 0.0)
    found = dict(zip(asked, losses, strict=True))
    turn = {r: mean_of_seeds([found[PAIR[1], r, s] - found[PAIR[0], r, s] for s in seeds]) for r in RATES}
    title = f"Loss after {config.knob_steps} steps, {depth.DEEP.layers} blocks"
    figure = grid(table, [f"{rate:g}" for rate in config.rates], title=title, xlabel="learning rate", limit=limit)
    caption = (
        "Crossed out: little better than byte frequencies, too slow on the left or broken on the right. No clipping."
    )
    return edges, turn, save(figure, run.path("knobs.png"), caption=caption)


def part_study(run: Run, config: Config, text: depth.Bytes) -> dict[str, list[float]]:
    """Bits per byte of each seed, with each part replaced."""
    fixed, seeds = {"text": text, "steps": config.steps}, range(config.seed, config.seed + config.seeds)
    jobs = [{"name": name, "seed": seed, **fixed} for name in depth.PARTS for seed in seeds]
    values = each(depth.ablation, jobs, label="parts")
    run.spend(
        trained=sum(depth.equal_steps(depth.BASE.but(**depth.PARTS[job["name"]]), config.steps) * 512 for job in jobs)
    )
    found: dict[str, list[float]] = {}
    for job, value in zip(jobs, values, strict=True):
        run.log(part=job["name"], seed=job["seed"], bits_per_byte=value)
        found.setdefault(job["name"], []).append(value)
    return found


if __name__ == "__main__":
    script(__name__)
