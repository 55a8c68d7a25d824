"""Prefill and decoding against the plain forward of tests/conftest.py: whole sequence, no cache, no neighbours."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.generate import engine
from gemma_jax.generate.engine import Session, chunk_sizes, prefill
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.nn.decoder import Decoder

TOLERANCE = 1e-4
head = jax.jit(lambda model, x: model.logits(x))


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, length).tolist()


def drawn(model, prompts, count=12, stop_ids=(), **options) -> list[list[int]]:
    session_options = {key: options.pop(key) for key in ("prefill_chunk", "capacity") if key in options}
    params = SamplingParams(max_new_tokens=count, **options)
    rows: list[list[int]] = [[] for _ in prompts]
    for steps in Session(model, prompts, [params] * len(prompts), stop_ids, **session_options):
        for row, step in zip(rows, steps, strict=True):
            row += step.tokens
    return rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([16, 32]), st.sampled_from([48, 64]))
@settings(max_examples=15, deadline=None)
def test_logits_after_a_prompt_do_not_depend_on_batch_mates_chunks_or_capacity(
    tiny_model, plain_logits, lengths, chunk, capacity
):
    """Lengths cross the window (8) and the chunks; rows stand padded to the longest."""
    prompts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    _, last = prefill(tiny_model, prompts, capacity, chunk)
    got = head(tiny_model, last)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row], plain_logits(prompt)[-1], atol=TOLERANCE, rtol=0)


def test_greedy_tokens_are_those_of_whole_forwards_beyond_the_window(tiny_model, plain_greedy):
    prompts = [tokens(5), tokens(21, 1), tokens(1, 2)]
    got = drawn(tiny_model, prompts, count=30)
    assert got == [plain_greedy(prompt, 30) for prompt in prompts]


@pytest.mark.parametrize("options", [{"prefill_chunk": 16}, {"capacity": 64}, {"capacity": 384}])
def test_greedy_tokens_do_not_depend_on_chunk_or_capacity(tiny_model, plain_greedy, options):
    """384 slots: rings of 8 beside a cache that is mostly empty."""
    prompt = tokens(37)
    assert drawn(tiny_model, [prompt], **options) == [plain_greedy(prompt, 12)]


def test_a_cache_looked_at_in_blocks_gives_what_one_look_gives(tiny_model, forward):
    """Global caches above 512 slots go block by block; the last block of the prompt is partly filled."""
    model = Decoder(tiny_model.config.replace("context", 2048), rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(tiny_model))
    prompts = [tokens(700), tokens(530, 1)]
    _, last = prefill(model, prompts, 1024)
    for row, prompt in enumerate(prompts):
        want = forward(model, np.asarray([prompt], np.int32), None)[0, -1]
        np.testing.assert_allclose(head(model, last)[row], want, atol=TOLERANCE, rtol=0)
    in_blocks, at_once = drawn(model, prompts, 8, capacity=1024), drawn(model, prompts, 8, capacity=768 - 1)
    assert in_blocks == at_once


def test_a_row_ends_at_a_stop_id_and_leaves_the_others_alone(tiny_model, plain_greedy):
    prompts = [tokens(6, 3), tokens(9, 4)]
    want = [plain_greedy(prompt, 20) for prompt in prompts]
    stop = want[0][4]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in want]
    assert len(cut[0]) <= 5
    assert drawn(tiny_model, prompts, 20, (stop,)) == cut
    assert drawn(tiny_model, prompts, 20, (stop,), ignore_eos=True) == want


def test_a_row_can_be_ended_from_outside(tiny_model, plain_greedy):
    prompts = [tokens(6, 3), tokens(9, 4)]
    params = [SamplingParams(max_new_tokens=20)] * 2
    session, rows = Session(tiny_model, prompts, params, ()), [[], []]
    for steps in session:
        for row, step in zip(rows, steps, strict=True):
            row += step.tokens
        session.finish(0)
    assert rows[0] == plain_greedy(prompts[0], 20)[: len(rows[0])]
    assert len(rows[0]) < 20
    assert rows[1] == plain_greedy(prompts[1], 20)


def test_rows_have_their_own_number_of_tokens(tiny_model, plain_greedy):
    prompts = [tokens(6), tokens(6)]
    params = [SamplingParams(max_new_tokens=n) for n in (3, 17)]
    rows = [[], []]
    for steps in Session(tiny_model, prompts, params, ()):
        for row, step in zip(rows, steps, strict=True):
            row += step.tokens
    assert rows == [plain_greedy(prompts[0], 3), plain_greedy(prompts[1], 17)]


def test_an_answer_ends_with_the_context(tiny_model):
    """The last token needs no place of its own."""
    context = tiny_model.config.context
    assert len(drawn(tiny_model, [tokens(context - 2)], 50)[0]) == 3
    assert len(drawn(tiny_model, [tokens(context)], 50)[0]) == 1


def test_log_probabilities_are_those_of_the_plain_forward(tiny_model, plain_logits):
    prompt = tokens(7)
    ids, chosen, tops = [], [], []
    params = SamplingParams(max_new_tokens=10, logprobs=3, temperature=1.0, top_k=5, seed=1)
    for (step,) in Session(tiny_model, [prompt], [params], ()):
        ids, chosen, tops = ids + step.tokens, chosen + step.logprobs, tops + step.top_logprobs
    logits = plain_logits([*prompt, *ids])[len(prompt) - 1 : -1]
    want = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_allclose(chosen, want[np.arange(10), ids], atol=TOLERANCE)
    for row, top in zip(want, tops, strict=True):
        assert list(top) == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:3], atol=TOLERANCE)


def test_the_repetition_penalty_counts_prompt_and_answer(tiny_model, plain_logits):
    prompt, penalty = tokens(7), 1.5
    want: list[int] = []
    for _ in range(8):
        logits = plain_logits([*prompt, *want])[-1].copy()
        seen = np.isin(np.arange(128), [*prompt, *want])
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        want.append(int(logits.argmax()))
    assert drawn(tiny_model, [prompt], 8, repetition_penalty=penalty) == [want]


def test_a_draw_depends_on_its_seed_and_not_on_its_neighbours(tiny_model):
    prompt, options = tokens(7), {"temperature": 1.0, "top_p": 0.9}
    alone = drawn(tiny_model, [prompt], 12, seed=5, **options)[0]
    assert drawn(tiny_model, [tokens(20, 1), prompt, tokens(2, 2)], 12, seed=5, **options)[1] == alone
    assert drawn(tiny_model, [prompt], 12, seed=6, **options)[0] != alone


@given(st.integers(1, 5000), st.sampled_from([16, 64, 512]))
def test_chunks_cover_a_prompt_with_few_sizes_and_little_waste(length, chunk):
    sizes = chunk_sizes(length, chunk)
    assert sum(sizes) >= length > sum(sizes[:-1])
    assert set(sizes) <= {16 * 2**i for i in range(6)}
    assert max(sizes) <= chunk
    assert sum(sizes) - length < 64


def test_new_prompt_lengths_seldom_compile_anew(tiny_model):
    engine.prefill_chunk.clear_cache()
    engine.decode_chunk.clear_cache()
    for length in range(1, 200, 7):
        drawn(tiny_model, [tokens(length)], 2)
    assert engine.prefill_chunk._cache_size() <= 8
    assert engine.decode_chunk._cache_size() <= 2


def test_what_cannot_be_prefilled_is_refused(tiny_model):
    params = SamplingParams(max_new_tokens=5)
    for prompts, words in [
        ([], "batch is empty"),
        ([[]], "prompt 0 is empty"),
        ([[1], [5, 128]], "prompt 1 has id 128 at place 1; wanted 0 to 127"),
        ([[-1]], "id -1"),
        ([[1.5]], "float64"),
        ([[1] * 321], "has 321 tokens; tiny reads at most 320"),
    ]:
        with pytest.raises(ValueError, match=words):
            Session(tiny_model, prompts, [params] * len(prompts), ())
    with pytest.raises(ValueError, match="capacity is 4"):
        Session(tiny_model, [[1, 2, 3]], [params], (), capacity=4)
    with pytest.raises(ValueError, match="9 stop ids"):
        Session(tiny_model, [[1]], [params], range(9))


def test_more_logprobs_than_tokens_are_refused(fixture_model):
    size = fixture_model.config.vocab_size
    with pytest.raises(ValueError, match=f"logprobs is {size + 1}, but there are only {size} tokens"):
        Session(fixture_model, [[2, 3]], [SamplingParams(logprobs=size + 1)], ())
