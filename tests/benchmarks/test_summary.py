"""Medians, ratios and goals of recorded samples."""

import pytest

from benchmarks import summary

OURS = {"decode_1": 26.0, "prefill_512": 400.0, "peak_mib": 1000.0, "cold_start_warm": 6.0}
THEIRS = {"decode_1": 13.0, "prefill_512": 500.0, "peak_mib": 1500.0}


def test_a_median_is_that_of_each_figure_and_empty_ones_are_left_out():
    samples = {"us": {"decode_1": [3.0, 100.0, 1.0], "decode_4": []}}
    assert summary.medians(samples) == {"us": {"decode_1": 3.0}}


def test_a_ratio_above_one_is_better_for_speed_and_for_memory():
    ratios = summary.ratios({"us": OURS, "them": THEIRS}, "us")
    assert ratios == {"them": {"prefill_512": 0.8, "decode_1": 2.0, "peak_mib": 1.5}}


def test_there_are_no_ratios_without_our_own_figures():
    assert summary.ratios({"them": THEIRS}, "us") == {"them": {}}


def test_figures_stand_in_order_of_kind_and_size():
    table = {"us": dict.fromkeys(("peak_mib", "decode_8", "prefill_2048", "decode_1", "prefill_512", "other"), 1.0)}
    keys = [figure.key for figure in summary.figures_of(table)]
    assert keys == ["prefill_512", "prefill_2048", "decode_1", "decode_8", "peak_mib"]


def test_a_goal_is_met_missed_or_not_measured():
    goals = summary.verdicts({"us": OURS, "huggingface": THEIRS}, "us", bound=40.0)
    met = {goal["goal"]: goal["is_met"] for goal in goals}
    assert met["decode_1 against huggingface"] is True
    assert met["decode_1 of the memory bound"] is False
    assert met["decode_8 against huggingface"] is None
    assert met["cold_start_warm, s"] is True


def test_every_goal_names_a_peer_and_a_figure_that_exist():
    from benchmarks.registry import ENTRIES

    for goal in summary.GOALS:
        assert goal.peer in {entry.name for entry in ENTRIES}
        assert [figure.key for figure in summary.figures_of({"us": {goal.figure: 1.0}})] == [goal.figure]


def test_spread_is_relative_to_the_median():
    assert summary.spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
