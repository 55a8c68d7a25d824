"""Medians, ratios and the goals they are held against. Pure functions of recorded samples."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFILL_TOKENS = (512, 2048)
DECODE_BATCHES = (1, 4, 8)


@dataclass(frozen=True)
class Figure:
    """One row of the tables."""

    key: str
    label: str
    is_better_high: bool


_COLD_AND_MEMORY = (
    Figure("cold_start_empty", "cold start, empty compile cache, s", False),
    Figure("cold_start_warm", "cold start, warm, s", False),
    Figure("peak_mib", "peak memory, MiB", False),
)


def figures_of(table: Mapping[str, Mapping[str, object]]) -> list[Figure]:
    """The figures that any peer has, in the order of the tables: prefill, decode, cold start, memory."""
    keys = {key for figures in table.values() for key in figures}
    found = []
    for kind, unit in (("prefill", "prefill {} tokens, tokens/s"), ("decode", "decode batch {}, tokens/s")):
        sizes = sorted(int(key.split("_")[1]) for key in keys if key.startswith(kind))
        found += [Figure(f"{kind}_{size}", unit.format(size), True) for size in sizes]
    return found + [figure for figure in _COLD_AND_MEMORY if figure.key in keys]


@dataclass(frozen=True)
class Goal:
    """At least `ratio` times as good as a peer in a figure."""

    figure: str
    peer: str
    ratio: float


_DEEPMIND = tuple(Goal(key, "deepmind", 1.1) for key in ("prefill_512", "prefill_2048", "decode_4", "decode_8"))
GOALS = (
    Goal("decode_1", "huggingface", 1.3),
    Goal("decode_8", "huggingface", 1.2),
    Goal("prefill_2048", "huggingface", 1.1),
    Goal("peak_mib", "huggingface", 1.0),
    Goal("decode_1", "deepmind", 3.0),
    *_DEEPMIND,
    Goal("cold_start_warm", "deepmind", 1.1),
    Goal("peak_mib", "deepmind", 2.0),
    Goal("decode_1", "llama_cpp_f32", 1.0),
)
BOUND_GOAL = 0.75  # of the memory bound, decoding one row
COLD_START_GOAL = 8.0  # seconds to the first token with a warm compile cache

Samples = Mapping[str, Sequence[float]]  # figure -> one value a repeat


def medians(samples: Mapping[str, Samples]) -> dict[str, dict[str, float]]:
    """Peer -> figure -> median; figures without samples are left out."""
    return {
        peer: {figure: statistics.median(values) for figure, values in figures.items() if len(values)}
        for peer, figures in samples.items()
    }


def ratios(table: Mapping[str, Mapping[str, float]], us: str) -> dict[str, dict[str, float]]:
    """Peer -> figure -> how many times as good we are: above 1 is better, whichever way the figure counts."""
    ours, result = table.get(us, {}), {}
    for peer, figures in table.items():
        if peer == us:
            continue
        result[peer] = {
            figure.key: ours[figure.key] / figures[figure.key]
            if figure.is_better_high
            else figures[figure.key] / ours[figure.key]
            for figure in figures_of(table)
            if figure.key in ours and figure.key in figures
        }
    return result


def verdicts(table: Mapping[str, Mapping[str, float]], us: str, bound: float | None) -> list[dict[str, object]]:
    """Each goal with what was reached; `is_met` is None where a figure is missing. `bound`: tokens/s at batch 1."""
    got = ratios(table, us)
    rows = [
        _verdict(f"{goal.figure} against {goal.peer}", got.get(goal.peer, {}).get(goal.figure), goal.ratio)
        for goal in GOALS
    ]
    decode, cold = table.get(us, {}).get("decode_1"), table.get(us, {}).get("cold_start_warm")
    rows.append(_verdict("decode_1 of the memory bound", decode / bound if decode and bound else None, BOUND_GOAL))
    reached = None if cold is None else cold <= COLD_START_GOAL
    rows.append({"goal": "cold_start_warm, s", "wanted": COLD_START_GOAL, "reached": cold, "is_met": reached})
    return rows


def _verdict(goal: str, reached: float | None, wanted: float) -> dict[str, object]:
    is_met = None if reached is None else reached >= wanted
    return {"goal": goal, "wanted": wanted, "reached": reached, "is_met": is_met}


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how noisy the samples are."""
    return (max(values) - min(values)) / statistics.median(values)
