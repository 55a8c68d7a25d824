import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.nn.rope import rope


def rotated(x: np.ndarray, positions: np.ndarray, theta: float, scale: float = 1.0) -> np.ndarray:
    """The formula of RoFormer sec. 3.4.2 as complex numbers, component j paired with j + H/2, in float64."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] / scale * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(("theta", "scale"), [(1e4, 1.0), (1e6, 1.0), (1e6, 8.0)])
def test_rope_turns_the_halves_as_complex_numbers(theta, scale):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16))
    positions = np.asarray([[0, 1, 2, 3, 4], [0, 7, 100, 511, 1023]])
    got = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta, scale)
    np.testing.assert_allclose(got, rotated(x, positions, theta, scale), atol=5e-4)


def test_the_first_pair_is_zero_and_half_and_turns_by_one_radian_a_token():
    x = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1.0)
    got = np.asarray(rope(x, jnp.asarray([[2]]), 1e4))[0, 0, 0]
    np.testing.assert_allclose(got, [np.cos(2), 0, 0, 0, np.sin(2), 0, 0, 0], atol=1e-6)


def test_position_zero_changes_nothing_and_no_position_changes_the_length():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.float32)
    positions = jnp.asarray([[0, 3, 99, 131_071]])
    got = rope(x, positions, 1e4)
    np.testing.assert_array_equal(got[:, 0], x[:, 0])
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_products_depend_on_the_distance_alone():
    q, k = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 1, 1, 32)), jnp.float32) for i in (0, 1))

    def product(at: int, back: int) -> float:
        turned = [rope(x, jnp.asarray([[p]]), 1e4) for x, p in ((q, at), (k, at - back))]
        return float(jnp.sum(turned[0] * turned[1]))

    for back in (0, 1, 17):
        np.testing.assert_allclose(product(20, back), product(3020, back), atol=2e-3)


def test_a_scale_of_eight_stretches_positions_by_eight():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.float32)
    positions = jnp.asarray([[1, 5, 77]])
    np.testing.assert_array_equal(rope(x, positions * 8, 1e6, 8.0), rope(x, positions, 1e6))


def test_bfloat16_values_still_tell_neighbouring_positions_apart():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    got = rope(x, jnp.asarray([[256, 257]]), 1e4)
    assert got.dtype == jnp.bfloat16
    want = rotated(np.ones((1, 2, 1, 8)), np.asarray([[256, 257]]), 1e4)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02)
    assert not np.array_equal(got[:, 0], got[:, 1])
