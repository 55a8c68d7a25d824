"""A result as Markdown, and its place in a page: between <!-- benchmark:NAME --> and <!-- /benchmark:NAME -->."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.summary import figures_of, spread


def sections(result: Mapping[str, Any]) -> dict[str, str]:
    """The named parts of a result file (see compare.py) as Markdown."""
    return {
        "machine": _machine(result),
        "medians": _medians(result),
        "ratios": _ratios(result),
        "goals": _goals(result),
    }


def fill(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part between its markers. Raises ValueError for a marker that is missing or not closed."""
    for name, text in parts.items():
        begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"the page wants one {begin} followed by one {end}")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}"
    return page


def fill_file(path: Path, parts: Mapping[str, str]) -> None:
    """`fill` for a file, in place."""
    path.write_text(fill(path.read_text(), parts))


def publish(name: str, result: Mapping[str, Any], text: str, folder: Path, page: Path | None) -> None:
    """A benchmark's result: as JSON into a folder, its table on a page, if one is named, and on the screen."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if page is not None:
        fill_file(page, {name: text})
    print(text)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None) -> str:
    """Three digits that count; a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _label(result: Mapping[str, Any], peer: str) -> str:
    return result["labels"].get(peer, peer)


def _medians(result: Mapping[str, Any]) -> str:
    columns = list(result["medians"])
    rows = []
    for figure in figures_of(result["medians"]):
        cells = [number(result["medians"][peer].get(figure.key)) for peer in columns]
        rows.append([figure.label, *cells])
    noise = [spread(values) for figures in result["samples"].values() for values in figures.values() if len(values) > 1]
    text = table(["", *(_label(result, peer) for peer in columns)], rows)
    if noise:
        text += f"\n\nMedians of {result['settings']['repeats']}; (largest - smallest) / median is "
        text += f"{statistics.median(noise):.0%} for the middle figure and {max(noise):.0%} for the noisiest."
    skipped = [f"- {_label(result, peer)}: skipped: {reason}" for peer, reason in result["skipped"].items()]
    return "\n".join([text, "", *skipped]) if skipped else text


def _ratios(result: Mapping[str, Any]) -> str:
    if not any(result["ratios"].values()):
        return "There is nothing to compare: we or all peers were not measured."
    rows = []
    for figure in figures_of(result["ratios"]):
        cells = [figures.get(figure.key) for figures in result["ratios"].values()]
        rows.append([figure.label, *("–" if value is None else f"{value:.2f}x" for value in cells)])
    return table(["we are better by", *(_label(result, peer) for peer in result["ratios"])], rows)


def _goals(result: Mapping[str, Any]) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        [goal["goal"], number(goal["wanted"]), number(goal["reached"]), words[goal["is_met"]]]
        for goal in result["goals"]
    ]
    bound = result["bound"]
    text = table(["goal", "wanted", "reached", "met"], rows)
    if bound:
        text += f"\n\nMemory bound: {bound['bytes_per_second'] / 1e9:.1f} GB/s read ({bound['way']}), "
        text += f"{bound['bytes_per_step'] / 1e9:.3f} GB of float32 parameters a step, so at most "
        text += f"{bound['tokens_per_second']:.1f} tokens/s at batch 1."
    return text


def _machine(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {result['settings']['threads']} of {machine['cores']} cores used, "
        f"{machine['memory_gib']:.0f} GiB of memory, {machine['system']}. {machine['date']}.",
        "",
    ]
    for peer, versions in result["versions"].items():
        stated = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"- {_label(result, peer)}: {stated}")
    return "\n".join(lines)
