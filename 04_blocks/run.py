"""April: what makes depth trainable, where the learning rate breaks it, and which part of a block earns its place."""

import math
from dataclasses import dataclass

from common.foundation.evidence import claim, number
from common.foundation.files import sha256_bytes
from common.foundation.parallel import each
from common.foundation.plots import bars, curves, grid, save
from common.foundation.run import Run, announce, script
from common.foundation.statistics import Interval, mean_of_seeds
from common.model.config import PRESETS, ModelConfig
from common.model.cost import flops_per_token, kv_bytes_per_token
from common.training import depth

INPUTS = ("shakespeare",)
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
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


SIZES = {
    "tiny": {"steps": 3, "seeds": 2, "knob_steps": 2},
    "small": {"steps": 130, "seeds": 3, "knob_steps": 40},
    "medium": {"steps": 2000, "seeds": 3, "knob_steps": 500},
    "large": {"steps": 2000, "seeds": 5, "knob_steps": 500},
}


def main(config: Config) -> None:
    with Run("04_blocks", config, inputs=INPUTS) as run:
        text = depth.Bytes.of_plays()
        figures, rows = stream_study(run, config, text)
        edges, figure = knob_study(run, config, text)
        figures.append(figure)
        parts = part_study(run, config, text)
        base = parts["as it is"]
        figure = bars(
            parts, title="One part replaced, equal arithmetic", xlabel="bits per byte", highlight=("as it is",)
        )
        caption = f"{config.seeds} seeds; intervals over seeds. Short trainings: they say what helps at the start."
        figures.append(save(figure, run.path("parts.png"), caption=caption))
        rows += [number(f"{name}: highest rate that trains", edge, "rate") for name, edge in edges.items()]
        for name, value in parts.items():
            apart = value.low > base.high or value.high < base.low
            rows.append(
                number(f"part, {name}", value, "bits per byte", "" if apart else "within the noise of the base")
            )
        for name in PRESETS:
            shape = ModelConfig.preset(name)
            cost = flops_per_token(shape, 1024) / 1e9
            rows.append(
                number(f"{name}: cache", kv_bytes_per_token(shape, 2), "bytes per token", f"{cost:.3g} GFLOP a token")
            )
        run.identify(
            tokenizer="bytes",
            model={"steps": config.steps, "seeds": config.seeds},
            measurement={"held_out": sha256_bytes(text.held_out.tobytes())},
        )
        said = []
        if config.size != "tiny":  # that trains for two steps, and claims nothing
            cost = {"bytes for each seed": config.steps * 512}
            said = [
                claim("Without residual paths a block learns nothing that counts", base, parts["no residual"],
                      better="lower", unit="bits per byte", cost=cost),
                claim("Norms before each branch allow a higher learning rate than none", edges["pre-norm"],
                      edges["no norm"], unit="rate", cost={"steps": config.knob_steps}),
            ]  # fmt: skip
        run.finish({"title": "Transformer blocks: paths, norms, knobs", "claims": said, "numbers": rows,
                    "figures": figures, "samples": []})  # fmt: skip


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
    announce("  signal and gradient by depth")
    return figures, rows


def knob_study(run: Run, config: Config, text: depth.Bytes) -> tuple[dict[str, float], dict]:
    """(highest learning rate at which each variant still learns, the grid as a figure)."""
    jobs = [
        {"knob": knob, "text": text, "steps": config.knob_steps, "learning_rate": rate}
        for knob in depth.KNOBS
        for rate in config.rates
    ]
    losses = each(depth.loss_at_rate, jobs, label="knobs")
    run.spend(trained=len(jobs) * config.knob_steps * 512)
    limit, edges, table = depth.unigram_nats(text) - 0.1, {}, {}
    for job, loss in zip(jobs, losses, strict=True):
        run.log(knob=job["knob"], rate=job["learning_rate"], loss=loss if math.isfinite(loss) else None)
        table.setdefault(job["knob"], []).append(loss)
        if loss < limit:
            edges[job["knob"]] = max(job["learning_rate"], edges.get(job["knob"], 0.0))
    title = f"Loss after {config.knob_steps} steps, {depth.DEEP.layers} blocks"
    figure = grid(table, [f"{rate:g}" for rate in config.rates], title=title, xlabel="learning rate", limit=limit)
    return {knob: edges.get(knob, 0.0) for knob in depth.KNOBS}, save(
        figure, run.path("knobs.png"), caption="No clipping."
    )


def part_study(run: Run, config: Config, text: depth.Bytes) -> dict[str, Interval]:
    jobs = [
        {"name": name, "text": text, "steps": config.steps, "seed": seed}
        for name in depth.PARTS
        for seed in range(config.seeds)
    ]
    values = each(depth.ablation, jobs, label="parts")
    run.spend(
        trained=sum(depth.equal_steps(depth.BASE.but(**depth.PARTS[job["name"]]), config.steps) * 512 for job in jobs)
    )
    found: dict[str, list[float]] = {}
    for job, value in zip(jobs, values, strict=True):
        run.log(part=job["name"], seed=job["seed"], bits_per_byte=value)
        found.setdefault(job["name"], []).append(value)
    return {name: mean_of_seeds(values) for name, values in found.items()}


if __name__ == "__main__":
    script(__name__)
