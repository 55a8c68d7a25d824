"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float, scale: float = 1.0
) -> Float[Array, "B T N H"]:
    """Rotates each pair (x[..., i], x[..., i + H/2]) by the angle positions * theta ** (-2i/H) / scale, in radians.

    Angles are computed in float32 (float64 for a float64 x): bfloat16 cannot tell position 257 from 256.
    Source: RoFormer, arXiv:2104.09864 sec. 3.4.2; position interpolation (`scale`), arXiv:2306.15595; Gemma 3 report,
    sec. 2. The cosine and sine are rounded to the type of x before the product, as Hugging Face does in bfloat16.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(0, x.shape[-1], 2, dtype=wide) / x.shape[-1])
    angle = positions.astype(wide)[:, :, None, None] / scale * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
