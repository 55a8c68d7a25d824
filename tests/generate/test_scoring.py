import math

import jax
import numpy as np
import pytest

from gemma_jax.generate.scoring import score


@pytest.mark.parametrize("length", [2, 17, 60])
def test_scores_are_the_log_softmax_of_the_plain_forward(tiny_model, plain_logits, length):
    tokens = np.random.default_rng(length).integers(0, 128, length).tolist()
    got = score(tiny_model, tokens, chunk=16)
    want = np.asarray(jax.nn.log_softmax(plain_logits(tokens), axis=-1))[np.arange(length - 1), tokens[1:]]
    np.testing.assert_allclose(got.logprobs, want, atol=1e-4)
    assert got.tokens == tokens
    assert got.nll == pytest.approx(-want.mean(), abs=1e-4)
    assert got.perplexity == pytest.approx(math.exp(-want.mean()), rel=1e-4)


def test_one_token_has_nothing_to_be_scored_against(tiny_model):
    with pytest.raises(ValueError, match="at least two"):
        score(tiny_model, [2])
