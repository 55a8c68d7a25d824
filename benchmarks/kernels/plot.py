"""The picture: static MFU beside the peers', and how far the memory-bound kernels are from HBM's speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.case import OURS
from benchmarks.kernels.generations import GENERATIONS

COLOURS = {OURS: "#1a73e8", "fused": "#0b8043", "splash": "#9aa0a6", "tokamax": "#e8710a"}
COLUMNS = 3
WIDTH = 0.2  # of a bar, of one generation's place

Record = Mapping[str, Any]


def draw(records: Sequence[Record], path: Path) -> None:
    """Writes a PNG. Raises ImportError that names the extra when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'gemma-jax[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["case"].rsplit("/", 1)[0], []).append(record)
    rows = -(-len(found) // COLUMNS)
    page, panels = pyplot.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 2.3 * rows), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, (name, group) in zip(panels.flat, found.items(), strict=False):
        _panel(panel, name, group)
    page.suptitle("Static estimates from libtpu's schedules; more is better", size=10)
    page.tight_layout()
    page.savefig(path, dpi=100)
    pyplot.close(page)


def _panel(panel: Any, name: str, group: Sequence[Record]) -> None:
    """Bars of one case, by generation: MFU, or the share of HBM's speed where memory or steps bound ours."""
    panel.axis("on")
    ours = [record for record in group if record["case"].endswith(f"/{OURS}")]
    is_memory = bool(ours) and all(record["bound"] != "compute" or record["static_mfu"] < 0.2 for record in ours)
    implementations = [each for each in COLOURS if any(record["case"].endswith(f"/{each}") for record in group)]
    for i, implementation in enumerate(implementations):
        values = {r["generation"]: _value(r, is_memory) for r in group if r["case"].endswith(f"/{implementation}")}
        places = [
            list(GENERATIONS).index(generation) + (i - (len(implementations) - 1) / 2) * WIDTH for generation in values
        ]
        bars = panel.bar(places, list(values.values()), WIDTH, color=COLOURS[implementation], label=implementation)
        panel.bar_label(bars, fmt="%.2f", size=6)
    panel.set_xticks(range(len(GENERATIONS)), list(GENERATIONS), size=7)
    panel.tick_params(axis="y", labelsize=7)
    panel.set_ylim(0, 1.1)
    panel.set_title(f"{name}: {'of HBM speed, at most' if is_memory else 'static MFU'}", size=8)
    if len(implementations) > 1:
        panel.legend(fontsize=6)


def _value(record: Record, is_memory: bool) -> float:
    times = record["milliseconds"]
    return times["memory"] / max(times.values()) if is_memory else record["static_mfu"]
