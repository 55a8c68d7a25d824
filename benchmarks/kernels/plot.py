"""The picture: static MFU beside the peers', and how near the others come to HBM's speed at most."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.case import OURS

COLOURS = {"v5e": "#1a73e8", "v5p": "#0b8043", "v6e": "#e8710a", "tpu7x": "#a142f4"}
MARKERS = {OURS: "o", "fused": "D", "splash": "x", "tokamax": "+"}
HEIGHT, SPREAD = 0.3, 0.6  # inches of a case's row, and the part of it over which the generations' marks stand

Record = Mapping[str, Any]


def draw(records: Sequence[Record], path: Path) -> None:
    """Writes a PNG. Raises ImportError that names the extra when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'gemma-jax[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["case"].rsplit("/", 1)[0], []).append(record)
    for_memory = {name for name, group in found.items() if _is_memory_bound(group)}
    sides = {
        "static MFU": {name: group for name, group in found.items() if name not in for_memory},
        "of HBM's speed, at most": {name: group for name, group in found.items() if name in for_memory},
    }
    height = HEIGHT * max(map(len, sides.values())) + 1.2
    page, panels = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
    for panel, (title, groups) in zip(panels, sides.items(), strict=True):
        _panel(panel, groups, is_memory=title != "static MFU")
        panel.set_title(title, size=10)
    kinds = {record["case"].rsplit("/", 1)[1] for record in records}
    dots = [Line2D([], [], color=colour, marker="o", ls="", label=name) for name, colour in COLOURS.items()]
    marks = [
        Line2D([], [], color="#5f6368", marker=m, ls="", label=name) for name, m in MARKERS.items() if name in kinds
    ]
    page.legend(handles=dots + marks, ncols=len(dots + marks), loc="outside lower center", fontsize=8, frameon=False)
    page.suptitle("Static estimates from libtpu's schedules; more is better", size=11)
    page.savefig(path, dpi=100)
    pyplot.close(page)


def _is_memory_bound(group: Sequence[Record]) -> bool:
    """Whether memory or steps bound ours, or what bounds it is no matrix unit."""
    ours = [record for record in group if record["case"].endswith(f"/{OURS}")]
    return bool(ours) and all(record["bound"] != "compute" or record["static_mfu"] < 0.2 for record in ours)


def _panel(panel: Any, groups: Mapping[str, Sequence[Record]], *, is_memory: bool) -> None:
    """A row for each case, a colour for each generation, a mark for each implementation."""
    generations = list(COLOURS)
    for row, group in enumerate(groups.values()):
        for record in group:
            place = generations.index(record["generation"]) / (len(generations) - 1) - 0.5
            kind = record["case"].rsplit("/", 1)[1]
            panel.plot(
                _value(record, is_memory),
                row + SPREAD * place,
                MARKERS[kind],
                color=COLOURS[record["generation"]],
                ms=4.5,
            )
    panel.set_yticks(range(len(groups)), list(groups), size=8)
    panel.set_xlim(0, 1.03)
    panel.set_ylim(len(groups) - 0.5, -0.5)
    panel.grid(axis="x", color="#dadce0")
    panel.set_yticks([row + 0.5 for row in range(len(groups) - 1)], minor=True)
    panel.tick_params(axis="y", which="both", length=0)
    panel.grid(axis="y", which="minor", color="#f1f3f4")
    panel.set_axisbelow(True)


def _value(record: Record, is_memory: bool) -> float:
    times = record["milliseconds"]
    return times["memory"] / max(times.values()) if is_memory else record["static_mfu"]
