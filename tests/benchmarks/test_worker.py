"""What a worker measures, with a peer that only counts."""

import pytest

from benchmarks.worker import Measurements, peak_bytes, prompt, timed


class Counter:
    """Draws the numbers 0, 1, 2 ...; `short` of them fewer than asked for."""

    def __init__(self, short: int = 0):
        self.short = short

    def versions(self) -> dict[str, str]:
        return {}

    def load(self, model: str, threads: int) -> None:
        self.loaded = (model, threads)

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> int:
        return len(prompts)

    def decode(self, state: int, new_tokens: int) -> list[list[int]]:
        return [list(range(new_tokens + 1 - self.short))] * state


def test_prompts_are_the_same_in_every_process_and_differ_by_row():
    assert prompt(5) == prompt(5)
    assert prompt(5, row=1) != prompt(5)
    assert [len(prompt(n)) for n in (1, 8)] == [1, 8]
    assert prompt(8)[0] == 2


def test_tokens_of_all_rows_count():
    took = Measurements(Counter(), threads=1).decode(batch=4, prompt_tokens=8, new_tokens=16)
    assert (took["tokens"], took["first_row"]) == (64, list(range(17)))
    assert took["seconds"] > 0


def test_a_peer_that_draws_too_few_tokens_is_not_measured():
    with pytest.raises(RuntimeError, match=r"drew \[2, 2\] tokens a row; wanted 3 each"):
        Measurements(Counter(short=1), threads=1).decode(batch=2, prompt_tokens=4, new_tokens=2)


def test_loading_hands_over_weights_and_threads():
    peer = Counter()
    assert Measurements(peer, threads=2).load("weights")["seconds"] >= 0
    assert peer.loaded == ("weights", 2)


def test_timing_gives_the_result_and_both_clocks():
    result, took = timed(lambda: "done")
    assert result == "done"
    assert set(took) == {"seconds", "cpu_seconds"}


def test_peak_memory_is_that_of_a_python_process():
    assert 2**22 < peak_bytes() < 2**38
