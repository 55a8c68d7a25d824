import jax
import numpy as np

from gemma_jax import interp


def test_a_lens_shows_each_layer_through_the_final_norm_and_the_head(gemma, tokens):
    lens = interp.logit_lens(gemma, tokens, 3)
    states = np.asarray(gemma.hidden_states(tokens))[:2]
    model = gemma.model
    want = np.stack([*(model.logits(model.final_norm(state)) for state in states), gemma.logits(tokens)])
    want = np.asarray(jax.nn.log_softmax(want, axis=-1))
    best = np.argsort(-want, axis=-1)[..., :3]
    np.testing.assert_array_equal(lens.ids, best)
    np.testing.assert_allclose(lens.logprobs, np.take_along_axis(want, best, -1), atol=2e-5, rtol=0)
    chosen = interp.logit_lens(gemma, tokens, [7, 100])
    np.testing.assert_allclose(chosen.logprobs, want[..., [7, 100]], atol=2e-5, rtol=0)
    assert (np.asarray(chosen.ids) == [7, 100]).all()
