"""A result as a picture: one panel a figure, one bar a peer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.registry import US
from benchmarks.summary import figures_of
from benchmarks.tables import number

OURS, THEIRS = "#1a73e8", "#9aa0a6"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG. Raises ImportError that names the extra when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'gemma-jax[bench]', or use --no-plot") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = result["medians"]
    figures = figures_of(table)
    columns = 4
    rows = -(-len(figures) // columns)
    page, panels = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for panel in panels.flat[len(figures) :]:
        panel.axis("off")
    for panel, figure in zip(panels.flat, figures, strict=False):
        peers = [peer for peer in table if figure.key in table[peer]]
        values = [table[peer][figure.key] for peer in peers]
        colours = [OURS if peer == US else THEIRS for peer in peers]
        bars = panel.barh([result["labels"].get(peer, peer) for peer in peers], values, color=colours)
        panel.bar_label(bars, labels=[number(value) for value in values], padding=2)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_title(figure.label + ("\nmore is better" if figure.is_better_high else "\nless is better"), size=9)
    page.tight_layout()
    page.savefig(path, dpi=120)
    pyplot.close(page)
