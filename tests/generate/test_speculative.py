"""Speculative decoding gives what the model gives by itself, whatever the draft."""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax import interp, matformer
from gemma_jax.generate.engine import Session
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.generate.speculative import Draft, SpeculativeSession, _fitted
from gemma_jax.nn.decoder import Decoder

PROMPTS = [np.random.default_rng(n).integers(1, 128, n).tolist() for n in (5, 30, 11)]
SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "logprobs": 2, "seed": [1, 2, 3]}


@pytest.fixture(scope="module")
def gemma(tiny_model):
    return gj.Gemma(tiny_model.config, tiny_model)


@pytest.fixture(scope="module")
def draft(gemma):
    """Good, but not perfect."""
    return matformer.slice(gemma, ffw=40)


@pytest.mark.parametrize("wishes", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_answer_is_the_models_own(gemma, draft, wishes):
    """Beyond the window of 8, in a batch of unequal rows."""
    wishes = {"max_new_tokens": 70, "ignore_eos": True, **wishes}
    for alone, drafted in zip(
        gemma.generate(PROMPTS, **wishes), gemma.generate(PROMPTS, draft=draft, **wishes), strict=True
    ):
        assert drafted.tokens == alone.tokens
        assert drafted.finish_reason == alone.finish_reason == "length"
        assert 0 < drafted.num_accepted_tokens < drafted.num_draft_tokens
        assert alone.num_draft_tokens is None
        if wishes.get("logprobs"):
            np.testing.assert_allclose(drafted.logprobs, alone.logprobs, atol=1e-4)
            assert [list(top) for top in drafted.top_logprobs] == [list(top) for top in alone.top_logprobs]


def run(session):
    rows = [[] for _ in session.prompts]
    for steps in session:
        for row, step in zip(rows, steps, strict=True):
            row += step.tokens
    return rows


def test_rows_end_where_they_would(gemma, draft, plain_greedy):
    """At a stop id in the midst of a round, at a limit of their own, and from outside; the others go on."""
    whole = [plain_greedy(prompt, 40) for prompt in PROMPTS[::2]]
    stop = whole[0][6]
    params = [SamplingParams(max_new_tokens=40), SamplingParams(max_new_tokens=13, ignore_eos=True)]
    session = SpeculativeSession(gemma.model, Draft(draft.model), PROMPTS[::2], params, [stop])
    assert run(session) == [whole[0][: whole[0].index(stop) + 1], whole[1][:13]]
    assert run(session)[1] == whole[1][:13]  # once more from the beginning
    session.finish(1)
    assert len(run(session)[1]) == 1


def test_a_draft_that_is_the_model_is_always_right(gemma):
    """Four and one more in each of five rounds; the first token comes of the prompt."""
    done = gemma.generate(PROMPTS[1], draft=gemma, max_new_tokens=26, ignore_eos=True)
    assert (done.num_draft_tokens, done.num_accepted_tokens) == (20, 20)


def test_a_foolish_draft_only_costs_time(gemma):
    other = gj.Gemma(gemma.config, Decoder(gemma.config, rngs=nnx.Rngs(99)))
    wishes = {"max_new_tokens": 20, "ignore_eos": True}
    done = gemma.generate(PROMPTS[0], draft=other, **wishes)
    assert done.tokens == gemma.generate(PROMPTS[0], **wishes).tokens
    assert done.num_accepted_tokens < done.num_draft_tokens / 4


@pytest.mark.slow
def test_edits_are_of_the_model_and_not_of_the_draft(gemma, draft):
    vector = np.random.default_rng(0).normal(size=32).astype(np.float32)
    wishes = {"max_new_tokens": 20, "ignore_eos": True, "edits": [interp.Add("layers.2.resid_post", 0.5 * vector)]}
    want = gemma.generate(PROMPTS[:1], **wishes)[0].tokens
    assert gemma.generate(PROMPTS[:1], draft=draft, **wishes)[0].tokens == want
    assert want != gemma.generate(PROMPTS[:1], max_new_tokens=20, ignore_eos=True)[0].tokens


@pytest.mark.slow
def test_samples_have_the_models_distribution(make_model):
    """Three tokens of the four most likely at each place: 64 outcomes, whose probabilities are computed one by one.

    The statistic of 4,000 draws is below the 99.9 % quantile of its chi-squared distribution with 63 degrees.
    """
    gemma = make_model(num_layers=2)
    prompt = [2, 17, 40]
    other = gj.Gemma(gemma.config, Decoder(gemma.config, rngs=nnx.Rngs(5)))

    def next_probabilities(tokens):
        rows = jnp.asarray([[*prompt, *row] for row in tokens])
        logits = np.asarray(gemma.logits(rows))[:, -1].astype(np.float64)
        best = np.argsort(-logits, axis=-1)[:, :4]
        kept = np.take_along_axis(logits, best, axis=-1)
        weights = np.exp(kept - kept.max(axis=-1, keepdims=True))
        return best, weights / weights.sum(axis=-1, keepdims=True)

    expected = {(): 1.0}
    for _ in range(3):
        best, probabilities = next_probabilities(list(expected))
        expected = {
            (*before, int(token)): mass * p
            for (before, mass), tokens, ps in zip(expected.items(), best, probabilities, strict=True)
            for token, p in zip(tokens, ps, strict=True)
        }
    counts = collections.Counter()
    for start in range(0, 4000, 500):
        seeds = list(range(start, start + 500))
        done = gemma.generate(
            [prompt] * 500, seed=seeds, draft=other, draft_tokens=2, temperature=1.0, top_k=4, max_new_tokens=3,
            ignore_eos=True,
        )  # fmt: skip
        counts.update(tuple(one.tokens) for one in done)
    assert set(counts) <= set(expected)
    statistic = sum((counts[outcome] - 4000 * p) ** 2 / (4000 * p) for outcome, p in expected.items())
    assert statistic < 103.4


@pytest.fixture
def make_model(tiny_config):
    def make(num_layers):
        config = dataclasses.replace(tiny_config, layers=tiny_config.layers[:num_layers])
        return gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(1)))

    return make


def test_a_padded_table_is_no_other_vocabulary():
    """Rows beyond the smaller table stand for no token; those that the draft lacks it never proposes."""
    logits = jnp.arange(6.0).reshape(1, 6)
    np.testing.assert_array_equal(_fitted(logits, 4), logits[:, :4])
    np.testing.assert_array_equal(_fitted(logits, 7), [[0, 1, 2, 3, 4, 5, -np.inf]])


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"draft_tokens": 3}, "draft_tokens is 3, but there is no draft"),
        ({"draft": "x"}, "draft is a str; wanted a Gemma"),
        ({"draft_tokens": 0}, "draft_tokens is 0; wanted a whole number from 1 to 64"),
        ({"draft_tokens": True}, "draft_tokens is True"),
        ({"draft_tokens": 2.0}, "draft_tokens is 2.0"),
    ],
)
def test_what_cannot_draft_is_refused(gemma, draft, wishes, words):
    given = wishes if "draft" in wishes or wishes.get("draft_tokens") == 3 else {"draft": draft, **wishes}
    with pytest.raises(ValueError, match=words):
        gemma.generate(PROMPTS[0], max_new_tokens=4, **given)


def test_another_vocabulary_is_refused(gemma, tiny_config):
    config = tiny_config.replace("vocab_size", 64)
    other = gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="another vocabulary than tiny"):
        gemma.generate(PROMPTS[0], draft=other)
    with pytest.raises(ValueError, match="capacity is 40; prompt and answer need 42 slots"):
        SpeculativeSession(
            gemma.model, Draft(gemma.model), [PROMPTS[1]], [SamplingParams(max_new_tokens=9)], [], capacity=40
        )


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "capacity"), [(1, None), (7, None), (7, 128)])
def test_sizes_of_rounds_and_caches_do_not_matter(gemma, draft, ahead, capacity):
    params = [SamplingParams(max_new_tokens=80, ignore_eos=True, temperature=1.0, seed=i) for i in range(3)]
    want = run(Session(gemma.model, PROMPTS, params, []))
    assert (
        run(SpeculativeSession(gemma.model, Draft(draft.model, ahead), PROMPTS, params, [], capacity=capacity)) == want
    )


@pytest.mark.slow
def test_a_slice_of_gemma_3n_drafts(tiny_3n):
    """Shared keys, AltUp, skipped layers; one row alone and beside others."""
    gemma = gj.Gemma(tiny_3n.config, tiny_3n)
    small = matformer.slice(gemma, ffw=(60, 40, 40, 60, 40, 40), skip=(5, 6))
    wishes = {"max_new_tokens": 50, "ignore_eos": True}
    want = gemma.generate(PROMPTS, **wishes)
    done = gemma.generate(PROMPTS, draft=small, **wishes)
    assert [one.tokens for one in done] == [one.tokens for one in want]
    alone = gemma.generate(PROMPTS[1], draft=small, **wishes)
    assert (alone.tokens, alone.num_accepted_tokens) == (done[1].tokens, done[1].num_accepted_tokens)
