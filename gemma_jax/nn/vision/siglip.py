"""Gemma 3's eyes: the SigLIP encoder (arXiv:2303.15343) and the projector into the decoder's stream.

Dimension letters here: B images, P the side of a patch, S patches, C the encoder's width, N heads, H head width, E ffw
width, M soft tokens of one image, D the decoder's width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gemma_jax.configs.config import NormConfig, VisionConfig
from gemma_jax.nn.layers import RMSNorm

EPSILON = 1e-6  # of the encoder's layer norms
QUERY_BLOCK = 512  # queries whose scores are held at once


def _param(rngs: nnx.Rngs, dims: str, sizes: dict[str, int], dtype: jnp.dtype, fan_in: int) -> nnx.Param:
    shape = tuple(sizes[letter] if letter in sizes else int(letter) for letter in dims.split())
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5, dims=dims)


class Linear(nnx.Module):
    """A kernel and a bias; which dimensions are summed over says the caller's einsum."""

    def __init__(self, dims: str, bias: str, sizes: dict[str, int], fan_in: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.kernel = _param(rngs, dims, sizes, dtype, fan_in)
        self.bias = nnx.Param(jnp.zeros([sizes[letter] for letter in bias.split()], dtype), dims=bias)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.einsum(equation, x, self.kernel[...]) + self.bias[...]


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias, in float32 (arXiv:1607.06450)."""

    def __init__(self, width: int, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype), dims="C")
        self.bias = nnx.Param(jnp.zeros((width,), dtype), dims="C")

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPSILON)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def _attend(q: Float[Array, "R S H"], k: Float[Array, "R S H"], v: Float[Array, "R S H"]) -> Float[Array, "R S H"]:
    """Attention of each head of each image (R of them). Scores are made for one head's block of queries at a time, so
    they stay in the processor's cache, and what comes out is written over the queries.
    """
    rows, count, _ = q.shape
    block = max(size for size in range(1, min(count, QUERY_BLOCK) + 1) if count % size == 0)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        row, start = i // (count // block), i % (count // block) * block
        queries = jax.lax.dynamic_slice(x, (row, start, 0), (1, block, x.shape[2]))[0]
        scores = jnp.einsum("TH,SH->TS", queries, k[row], preferred_element_type=jnp.float32)
        out = jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v[row]
        return jax.lax.dynamic_update_slice(x, out[None], (row, start, 0))

    return jax.lax.fori_loop(0, rows * (count // block), step, q)


class Attention(nnx.Module):
    """All patches look at all patches of their image."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: jnp.dtype):
        width, self.scale = sizes["C"], sizes["H"] ** -0.5
        self.q, self.k, self.v = (Linear("C N H", "N H", sizes, width, rngs=rngs, dtype=dtype) for _ in range(3))
        self.o = Linear("N H C", "C", sizes, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        q, k, v = (jnp.swapaxes(one("BSC,CNH->BSNH", x), 1, 2) for one in (self.q, self.k, self.v))
        out = _attend(*(one.reshape(-1, *one.shape[2:]) for one in (q * self.scale, k, v)))
        return self.o("BNSH,NHC->BSC", out.reshape(q.shape))


class MLP(nnx.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.fc1 = Linear("C E", "E", sizes, sizes["C"], rngs=rngs, dtype=dtype)
        self.fc2 = Linear("E C", "C", sizes, sizes["E"], rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        return self.fc2("BSE,EC->BSC", jax.nn.gelu(self.fc1("BSC,CE->BSE", x), approximate=True))


class Layer(nnx.Module):
    """One block of the encoder, normed before each half."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.ln1, self.ln2 = LayerNorm(sizes["C"], dtype), LayerNorm(sizes["C"], dtype)
        self.attn, self.mlp = Attention(sizes, rngs=rngs, dtype=dtype), MLP(sizes, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


@jax.jit
def _apply(layer: Layer, x: jax.Array) -> jax.Array:
    """Calls a layer; of equal ones only the first is traced."""
    return layer(x)


class Siglip(nnx.Module):
    """The encoder, without a pooling head: a vector for each patch."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        side = config.image_size // config.patch_size
        sizes = {"C": config.width, "N": config.num_heads, "H": config.width // config.num_heads}
        sizes |= {"E": config.ffw_width, "P": config.patch_size, "S": side * side}
        patch = config.patch_size**2 * 3
        self.patch = Linear("P P 3 C", "C", sizes, patch, rngs=rngs, dtype=dtype)
        self.pos_embedding = _param(rngs, "S C", sizes, dtype, config.width)
        self.layers = nnx.List([Layer(sizes, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_ln = LayerNorm(config.width, dtype)

    def __call__(self, pixels: Float[Array, "B height width 3"]) -> Float[Array, "B S C"]:
        """Patches row by row, from the top left. Pixels lie between -1 and 1 and the image has the config's size."""
        count, side = self.config.image_size // self.config.patch_size, self.config.patch_size
        x = pixels.astype(self.pos_embedding[...].dtype).reshape(-1, count, side, count, side, 3)
        x = self.patch("BiPjQc,PQcC->BijC", x).reshape(len(pixels), count * count, -1) + self.pos_embedding[...]
        for layer in self.layers:
            x = _apply(layer, x)
        return self.final_ln(x)


class Projector(nnx.Module):
    """Averages squares of patches to soft tokens, norms them, and turns them into the decoder's width."""

    def __init__(self, config: VisionConfig, width: int, norm: NormConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.side = config.image_size // config.patch_size
        self.tokens = math.isqrt(config.num_soft_tokens)
        self.soft_norm = RMSNorm("C", config.width, norm, dtype)
        self.w_proj = _param(rngs, "C D", {"C": config.width, "D": width}, dtype, config.width)

    def __call__(self, patches: Float[Array, "B S C"]) -> Float[Array, "B M D"]:
        pool = self.side // self.tokens
        squares = patches.reshape(len(patches), self.tokens, pool, self.tokens, pool, -1)
        pooled = jnp.mean(squares, axis=(2, 4)).reshape(len(patches), self.tokens**2, -1)
        return self.soft_norm(pooled) @ self.w_proj[...]
