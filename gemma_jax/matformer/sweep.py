"""Many slices of one MatFormer model, measured on a text: what each costs, and how well it predicts."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from gemma_jax import matformer
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.configs.slicing import Slicing
from gemma_jax.model import Gemma
from gemma_jax.nn.cache import cache_bytes
from gemma_jax.nn.paths import parameters

TABLES = ("embedder/embedding", "embedder/ple")  # of which a token takes a row
STEPS = 8  # of the default sweep: widths from an eighth to the whole


@dataclass(frozen=True)
class Point:
    """One slice. Effective parameters are those that a token's forward multiplies with, tables left out."""

    name: str
    num_layers: int
    ffw_widths: tuple[int, ...]
    parameters: int
    effective_parameters: int
    flops_per_token: int  # 2 a weight, the head's too; attention's look at the past left out
    cache_bytes: int  # of a row of `context` tokens
    weight_bytes: int
    nll: float  # mean of a token, in nats
    is_best: bool = False  # no other has as few effective parameters or fewer, and a lower nll


def default_slicings(config: DecoderConfig, steps: int = STEPS) -> dict[str, Slicing]:
    """All ffws narrowed alike, to i/steps of their width."""
    return {
        f"{i}/{steps}": Slicing(ffw=tuple(max(1, spec.ffw_width * i // steps) for spec in config.layers))
        for i in range(steps, 0, -1)
    }


def sweep(
    gemma: Gemma,
    slicings: Mapping[str, Slicing],
    text: str | Sequence[int],
    *,
    context: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """Measures each slice on a text (or token ids); one after another, so that one slice's copies are held at a time.

    Args:
        context: tokens of the row whose cache is counted; None: the model's own.
        say: gets a line for each slice.

    Raises: ConfigError for a slice that the model has not, before any is measured; ValueError for a text too long.
    """
    for slicing in slicings.values():
        slicing.apply(gemma.config)
    tokens = gemma.ids(text)
    points = []
    for name, slicing in slicings.items():
        small = matformer.slice(gemma, slicing)
        points.append(_measured(name, small, tokens, context or gemma.config.context))
        say(f"{name}: {points[-1].effective_parameters:,} parameters, nll {points[-1].nll:.4f}")
    return [dataclasses.replace(point, is_best=_is_best(point, points)) for point in points]


def _measured(name: str, small: Gemma, tokens: Sequence[int], context: int) -> Point:
    sizes = {path: param.get_raw_value().size for path, param in parameters(small.model).items()}
    dtype = small.model.final_norm.scale.dtype
    effective = sum(size for path, size in sizes.items() if path not in TABLES)
    return Point(
        name=name,
        num_layers=small.config.num_layers,
        ffw_widths=tuple(spec.ffw_width for spec in small.config.layers),
        parameters=sum(sizes.values()),
        effective_parameters=effective,
        flops_per_token=2 * (effective + small.config.vocab_size * small.config.width),
        cache_bytes=cache_bytes(small.config, 1, context, dtype),
        weight_bytes=sum(sizes.values()) * jnp.dtype(dtype).itemsize,
        nll=small.score(tokens).nll,
    )


def _is_best(point: Point, points: Sequence[Point]) -> bool:
    return not any(
        other.effective_parameters <= point.effective_parameters and other.nll < point.nll for other in points
    )


def table(points: Sequence[Point]) -> str:
    """As Markdown; the best of their size are marked."""
    lines = [
        "| slice | layers | effective parameters | GFLOP a token | cache, MiB | weights, MiB | nll | best |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for p in points:
        mib = [f"{size / 2**20:,.1f}" for size in (p.cache_bytes, p.weight_bytes)]
        cells = [p.name, str(p.num_layers), f"{p.effective_parameters:,}", f"{p.flops_per_token / 1e9:.3f}", *mib]
        lines.append(f"| {' | '.join(cells)} | {p.nll:.4f} | {'yes' if p.is_best else ''} |")
    return "\n".join(lines) + "\n"


def write(points: Sequence[Point], folder: Path) -> list[Path]:
    """The table as sweep.json and sweep.md, and a picture, sweep.png, if matplotlib is there (extra `bench`).

    Raises FileExistsError if the folder is there.
    """
    folder.mkdir(parents=True)
    files = [folder / "sweep.json", folder / "sweep.md"]
    files[0].write_text(json.dumps([dataclasses.asdict(point) for point in points], indent=1) + "\n")
    files[1].write_text(table(points))
    try:
        import matplotlib
    except ImportError:
        return files
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot, points)
    files.append(folder / "sweep.png")
    figure.savefig(files[-1], dpi=120)
    pyplot.close(figure)
    return files


def draw(pyplot: Any, points: Sequence[Point]) -> Any:
    """Loss against effective parameters; the best of their size joined by a line."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    best = sorted((p for p in points if p.is_best), key=lambda p: p.effective_parameters)
    axes.plot([p.effective_parameters / 1e6 for p in best], [p.nll for p in best], "-", color="tab:blue", zorder=1)
    for is_best, colour, label in ((False, "lightgrey", "others"), (True, "tab:blue", "best of their size")):
        chosen = [p for p in points if p.is_best == is_best]
        x, y = [p.effective_parameters / 1e6 for p in chosen], [p.nll for p in chosen]
        axes.scatter(x, y, color=colour, label=label, zorder=2)
    for p in points:
        axes.annotate(p.name, (p.effective_parameters / 1e6, p.nll), xytext=(4, 4), textcoords="offset points", size=7)
    axes.set_xlabel("effective parameters, millions")
    axes.set_ylabel("negative log-likelihood, nats a token")
    axes.legend(frameon=False)
    return figure
