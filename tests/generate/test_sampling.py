import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.generate import sampling
from gemma_jax.generate.sampling import Plan, SamplingParams

VOCAB = 12
DRAWS = 4000

sample = jax.jit(sampling.sample, static_argnames="plan")


def draw(logits: np.ndarray, rows: list[SamplingParams], step: int = 0, seen: np.ndarray | None = None) -> np.ndarray:
    steps = jnp.full((len(rows),), step, jnp.int32)
    rows_as_arrays = sampling.sampler(rows, logits.shape[1])
    seen = None if seen is None else jnp.asarray(seen)
    return np.asarray(sample(jnp.asarray(logits, jnp.float32), rows_as_arrays, sampling.plan(rows), steps, seen))


def reference(logits: np.ndarray, params: SamplingParams, seen: np.ndarray | None = None) -> np.ndarray:
    """The probabilities to draw from, float64, sorted and cut step by step as the papers say; ties are kept."""
    x = np.asarray(logits, np.float64).copy()
    if seen is not None:
        r = params.repetition_penalty
        x = np.where(seen, np.where(x > 0, x / r, x * r), x)
    x /= params.temperature
    kept = np.ones(len(x), bool)
    if params.top_k is not None:
        kept &= x >= np.sort(x)[::-1][min(params.top_k, len(x)) - 1]
    p = np.where(kept, np.exp(x - x.max()), 0)
    p /= p.sum()
    ordered = np.sort(p)[::-1]
    last = int(np.searchsorted(np.cumsum(ordered), params.top_p * (1 - 1e-9)))
    kept &= p >= ordered[min(last, len(x) - 1)]
    kept &= p >= params.min_p * p.max()
    p = np.where(kept, p, 0)
    return p / p.sum()


def frequencies(logits: np.ndarray, params: SamplingParams, seen: np.ndarray | None = None) -> np.ndarray:
    """Counts of DRAWS tokens, one a seed, drawn at once as a batch."""
    keys = jnp.stack([jnp.zeros(DRAWS, jnp.uint32), jnp.arange(DRAWS, dtype=jnp.uint32)], axis=1)
    one = sampling.sampler([params], len(logits))
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (DRAWS, *leaf.shape[1:])), one)
    many = sampling.Sampler(*(getattr(many, n) for n in ("temperature", "top_k", "top_p", "min_p")),
                            many.repetition_penalty, keys)  # fmt: skip
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    marks = None if seen is None else jnp.broadcast_to(jnp.asarray(seen), batch.shape)
    tokens = sample(batch, many, sampling.plan([params]), jnp.zeros(DRAWS, jnp.int32), marks)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7},
    {"repetition_penalty": 1.7, "top_p": 0.9},
    {"repetition_penalty": 0.5},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_distribution_of_a_plain_reference(options):
    """Chi-square against the reference, with fixed seeds; a token the reference forbids is never drawn."""
    logits = np.random.default_rng(5).normal(0, 2, VOCAB).astype(np.float32)
    seen = np.arange(VOCAB) % 3 == 0 if "repetition_penalty" in options else None
    params = SamplingParams(**({"temperature": 1.0} | options))
    want, counts = reference(logits, params, seen), frequencies(logits, params, seen)
    assert not counts[want == 0].any()
    likely = want * DRAWS >= 5
    excess = np.sum((counts[likely] - want[likely] * DRAWS) ** 2 / (want[likely] * DRAWS))
    degrees = max(int(likely.sum()) - 1, 1)
    assert excess < degrees + 4 * math.sqrt(2 * degrees) + 4  # beyond four standard deviations


@given(
    values=st.lists(st.integers(-4, 4), min_size=VOCAB, max_size=VOCAB),
    top_k=st.sampled_from([None, 1, 2, 5, VOCAB]),
    top_p=st.sampled_from([1.0, 0.9, 0.47, 0.1]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**62),
)
@settings(deadline=None, max_examples=150)
def test_a_token_is_only_drawn_if_the_reference_keeps_it_with_ties(values, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    plain = SamplingParams(temperature=1.0, top_p=0.99999, seed=seed)  # keeps the compiled program the same
    logits = np.asarray([values, values], np.float32)
    token = draw(logits, [params, plain])[0]
    assert reference(np.asarray(values), params)[token] > 0


def test_equal_logits_at_the_edge_of_top_k_are_all_kept():
    counts = frequencies(np.asarray([1.0, 0.0, 0.0, 0.0, -1.0]), SamplingParams(temperature=1.0, top_k=2))
    assert (counts[:4] > 0).all()
    assert counts[4] == 0


def test_zero_temperature_is_the_most_likely_token_and_the_first_of_equals():
    logits = np.asarray([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 5.0, 5.0]])
    assert draw(logits, [SamplingParams()] * 2).tolist() == [1, 0]


def test_greedy_and_sampled_rows_share_a_batch():
    logits = np.tile(np.random.default_rng(0).normal(size=VOCAB), (3, 1))
    rows = [SamplingParams(), SamplingParams(temperature=1.0, top_k=1, seed=1), SamplingParams(temperature=9.0, seed=4)]
    got = draw(logits, rows)
    assert got[0] == got[1] == logits[0].argmax()
    assert got[2] == draw(logits[:1], [rows[2]])[0]


def test_a_row_draws_the_same_whatever_its_neighbours_are():
    logits = np.random.default_rng(0).normal(size=(4, VOCAB))
    rows = [SamplingParams(temperature=1.0, seed=7), SamplingParams(temperature=0.5, top_p=0.4, seed=1),
            SamplingParams(), SamplingParams(temperature=2.0, min_p=0.2, top_k=3, seed=2**63 - 1)]  # fmt: skip
    together = draw(logits, rows, step=3)
    alone = [int(draw(logits[i : i + 1], [row], step=3)[0]) for i, row in enumerate(rows)]
    assert together.tolist() == alone


def test_seeds_and_steps_change_the_draw_and_equal_ones_repeat_it():
    logits = np.zeros((1, 4096))
    at = {(seed, step): int(draw(logits, [SamplingParams(temperature=1.0, seed=seed)], step)[0])
          for seed in (0, 1, 2**32, 2**32 + 1, 2**63 - 1) for step in range(3)}  # fmt: skip
    assert len(set(at.values())) >= len(at) - 1  # all 64 bits of a seed count
    assert at[1, 2] == int(draw(logits, [SamplingParams(temperature=1.0, seed=1)], 2)[0])


def test_without_a_seed_draws_differ():
    draws = {int(draw(np.zeros((1, 4096)), [SamplingParams(temperature=1.0)])[0]) for _ in range(6)}
    assert len(draws) > 1


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.asarray([[2.0, 1.5, -1.0], [-1.0, -1.5, -9.0]])
    seen = np.asarray([[True, False, False], [True, False, False]])
    rows = [SamplingParams(repetition_penalty=2.0)] * 2
    assert draw(logits, rows, seen=seen).tolist() == [1, 1]
    assert draw(logits, [SamplingParams(repetition_penalty=1.1)] * 2, seen=seen).tolist() == [0, 0]


def test_logprobs_are_the_log_softmax_with_the_best_first():
    logits = np.random.default_rng(0).normal(0, 3, (2, VOCAB)).astype(np.float32)
    chosen, best, ids = sampling.logprobs(jnp.asarray(logits), jnp.asarray([3, 4]), 5)
    want = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(chosen, want[[0, 1], [3, 4]], atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :5])
    np.testing.assert_allclose(best, -np.sort(-want, axis=1)[:, :5], atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in (math.nan, math.inf, -0.1, "1", None, True)],
        *[("top_p", v) for v in (0, 0.0, 1.5, -1, math.nan, "0.9", None)],
        *[("top_k", v) for v in (0, -1, 1.5, "3", True, math.nan)],
        *[("min_p", v) for v in (1.1, -0.1, math.nan, None)],
        *[("repetition_penalty", v) for v in (0, 0.0, -1, math.nan, math.inf, None)],
        *[("max_new_tokens", v) for v in (0, -3, 2.5, "5", None, True)],
        *[("seed", v) for v in (-1, 2**63, 1.5, "0")],
        *[("logprobs", v) for v in (-1, 101, 1.0, True)],
        *[("stop", v) for v in ("text", ("",), (3,), (b"x",))],
    ],
)
def test_a_bad_parameter_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        SamplingParams(**{field: value})
    assert repr(value) in str(caught.value)


def test_numpy_numbers_are_numbers():
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(0), max_new_tokens=np.int32(4))


def test_a_program_holds_only_what_some_row_asks_for():
    greedy, sampled = SamplingParams(), SamplingParams(temperature=1.0)
    assert sampling.plan([greedy, greedy]) == Plan(is_greedy=True, filters=False, penalises=False, num_logprobs=None)
    assert sampling.plan([greedy, sampled]) == Plan(is_greedy=False, filters=False, penalises=False, num_logprobs=None)
    assert sampling.plan([SamplingParams(temperature=1.0, top_p=0.9, logprobs=2)]) == Plan(False, True, False, 2)
    assert sampling.plan([SamplingParams(top_k=5)]).filters is False  # greedy needs no filter
