import random

import pytest

from gemma_jax.generate.stopping import StopText


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop = StopText(stops)
    text = "".join(stop.push(piece) for piece in pieces)
    return text + ("" if stop.is_stopped else stop.finish()), stop.is_stopped


@pytest.mark.parametrize(
    ("stops", "text", "want"),
    [
        (["END"], "the END of it", "the "),
        (["END"], "ENEND", "EN"),
        (["aab"], "aaaab!", "aa"),
        (["abab", "ba"], "xababa", "xa"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["é"], "cafés", "caf"),
        (["yes", "no"], "maybe", "maybe"),
        (["long stop", "long"], "a long stop", "a "),
        ([], "anything", "anything"),
        (["a"], "abc", ""),
    ],
)
def test_text_ends_at_the_first_stop_however_it_is_cut(stops, text, want):
    generator = random.Random(0)
    for _ in range(30):
        pieces, rest = [], text
        while rest:
            size = generator.randint(0, 3)
            pieces, rest = [*pieces, rest[:size]], rest[size:]
        assert shown(stops, pieces) == (want, any(stop in text for stop in stops))


def test_no_more_is_held_back_than_may_begin_a_stop():
    stop = StopText(["END"])
    assert [stop.push(piece) for piece in ("a", "E", "N", "x", "E")] == ["a", "", "", "ENx", ""]
    assert stop.finish() == "E"


def test_nothing_is_shown_after_a_stop():
    stop = StopText(["."])
    assert (stop.push("a.b"), stop.push("c"), stop.finish(), stop.is_stopped) == ("a", "", "", True)
