"""Gemma 3n's eyes: MobileNetV5-300M (specification of Gemma 3n, section 5; timm's mobilenetv5_300m_enc).

Dimension letters here: B images, R and S rows and columns of pixels, C channels, I and O channels in and out, k the
side of a kernel, H head width, Q queries of all heads, P pixels that are looked at, M soft tokens of one image.
Padding is TensorFlow's SAME: of an odd total the larger half lies at the bottom and at the right.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gemma_jax.configs.config import NormConfig
from gemma_jax.configs.towers import ConvBlock, MobileNetConfig
from gemma_jax.nn.layers import RMSNorm, wide

NORM = NormConfig(is_zero_centred=False)
STEM_KERNEL, STEM_STRIDE = 3, 2
QUERY_BLOCK = 512  # queries whose scores are held at once


def _kernel(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """Random, with variance 1 / fan_in; the last dimension is of channels out."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * math.prod(shape[:-1]) ** -0.5, dims=dims)


def _norm(width: int, dtype: jnp.dtype) -> RMSNorm:
    return RMSNorm("C", width, NORM, dtype)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.gelu(x, approximate=True)


def _convolved(x: Float[Array, "B R S I"], kernel: Float[Array, "k k I O"], stride: int) -> Float[Array, "B R2 S2 O"]:
    """Every channel out from all channels in."""
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dims)


def _convolved_depthwise(
    x: Float[Array, "B R S C"], kernel: Float[Array, "k k C"], stride: int
) -> Float[Array, "B R2 S2 C"]:
    """Each channel by itself: a sum of shifted products in `wide(x)`. XLA's grouped convolution is several times slower
    on CPU; without the loop over the kernel's rows XLA writes every shifted image to memory.
    """
    side, counts = len(kernel), [-(-size // stride) for size in x.shape[1:3]]
    missing = [max((n - 1) * stride + side - size, 0) for n, size in zip(counts, x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)))
    rows, columns = ((n - 1) * stride + 1 for n in counts)

    @jax.checkpoint  # a gradient slices again
    def added(total: jax.Array | float, row: jax.Array | int, weights: jax.Array) -> jax.Array:
        band = jax.lax.dynamic_slice_in_dim(padded, row, rows, axis=1)[:, ::stride].astype(wide(x))
        for j in range(side):
            total = total + band[:, :, j : j + columns : stride] * weights[j]
        return jnp.asarray(total)

    def step(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return added(total, *at), None

    first = added(0.0, 0, kernel[0])  # zeros to begin with would stand in memory from the program's start
    return jax.lax.scan(step, first, (jnp.arange(1, side), kernel[1:]))[0].astype(x.dtype)


class Convolution(nnx.Module):
    """Without a bias."""

    def __init__(self, side: int, before: int, after: int, stride: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.stride = stride
        self.kernel = _kernel(rngs, "k k I O", (side, side, before, after), dtype)

    def __call__(self, x: Float[Array, "B R S I"]) -> Float[Array, "B R2 S2 O"]:
        return _convolved(x, self.kernel[...], self.stride)


class Depthwise(nnx.Module):
    """Without a bias."""

    def __init__(self, side: int, width: int, stride: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.stride = stride
        self.kernel = _kernel(rngs, "k k 1 C", (side, side, 1, width), dtype)

    def __call__(self, x: Float[Array, "B R S C"]) -> Float[Array, "B R2 S2 C"]:
        return _convolved_depthwise(x, self.kernel[...][:, :, 0], self.stride)


class Pointwise(nnx.Module):
    """A convolution with a kernel of side 1: the same matrix at each pixel."""

    def __init__(self, before: int, after: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.kernel = _kernel(rngs, "k k I O", (1, 1, before, after), dtype)

    def __call__(self, x: Float[Array, "B R S I"]) -> Float[Array, "B R S O"]:
        return x @ self.kernel[...][0, 0]


class Stem(nnx.Module):
    """gelu(norm(convolution + bias)), at half the image's size."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.kernel = _kernel(rngs, "k k I O", (STEM_KERNEL, STEM_KERNEL, 3, width), dtype)
        self.bias = nnx.Param(jnp.zeros((width,), dtype), dims="O")
        self.norm = _norm(width, dtype)

    def __call__(self, pixels: Float[Array, "B R S 3"]) -> Float[Array, "B R2 S2 O"]:
        return _gelu(self.norm(_convolved(pixels, self.kernel[...], STEM_STRIDE) + self.bias[...]))


class Edge(nnx.Module):
    """A full convolution into many channels, then a product into few ("fused" in arXiv:2003.02838, sec. 3)."""

    def __init__(self, block: ConvBlock, before: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        middle = block.expansion * before
        self.has_skip = block.stride == 1 and block.width == before
        self.expand = Convolution(block.kernel, before, middle, block.stride, rngs=rngs, dtype=dtype)
        self.expand_norm = _norm(middle, dtype)
        self.project = Pointwise(middle, block.width, rngs=rngs, dtype=dtype)
        self.project_norm = _norm(block.width, dtype)

    def __call__(self, x: Float[Array, "B R S C"]) -> Float[Array, "B R2 S2 C2"]:
        out = self.project_norm(self.project(_gelu(self.expand_norm(self.expand(x)))))
        return x + out if self.has_skip else out


class Inverted(nnx.Module):
    """Products per pixel around depthwise convolutions ("universal inverted bottleneck", arXiv:2404.10518, sec. 3)."""

    def __init__(self, block: ConvBlock, before: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        middle = block.expansion * before
        self.has_skip = block.stride == 1 and block.width == before
        if block.start_kernel:
            stride = 1 if block.kernel else block.stride  # the later depthwise convolution strides
            self.start = Depthwise(block.start_kernel, before, stride, rngs=rngs, dtype=dtype)
            self.start_norm = _norm(before, dtype)
        else:
            self.start = None
        self.expand = Pointwise(before, middle, rngs=rngs, dtype=dtype)
        self.expand_norm = _norm(middle, dtype)
        if block.kernel:
            self.mid = Depthwise(block.kernel, middle, block.stride, rngs=rngs, dtype=dtype)
            self.mid_norm = _norm(middle, dtype)
        else:
            self.mid = None
        self.project = Pointwise(middle, block.width, rngs=rngs, dtype=dtype)
        self.project_norm = _norm(block.width, dtype)
        self.layer_scale = nnx.Param(jnp.ones((block.width,), dtype), dims="C")

    def __call__(self, x: Float[Array, "B R S C"]) -> Float[Array, "B R2 S2 C2"]:
        out = x if self.start is None else self.start_norm(self.start(x))
        out = _gelu(self.expand_norm(self.expand(out)))
        out = out if self.mid is None else _gelu(self.mid_norm(self.mid(out)))
        out = self.project_norm(self.project(out)) * self.layer_scale[...]
        return x + out if self.has_skip else out


@jax.checkpoint  # a gradient makes the scores again
def _attended(q: Float[Array, "Q H"], k: Float[Array, "P H"], v: Float[Array, "P H"]) -> Float[Array, "Q H"]:
    scores = jnp.einsum("QH,PH->QP", q, k, preferred_element_type=wide(q))
    return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v


def _attend(q: Float[Array, "B Q H"], k: Float[Array, "B P H"], v: Float[Array, "B P H"]) -> Float[Array, "B Q H"]:
    """Attention of the queries of all heads. Scores are made for a block of queries of one image at a time, so they
    stay in the processor's cache.
    """
    batch, count, width = q.shape
    block = max(size for size in range(1, min(count, QUERY_BLOCK) + 1) if count % size == 0)
    blocks = q.reshape(batch, count // block, block, width)

    def image(of: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, keys, values = of
        return jax.lax.map(lambda some: _attended(some, keys, values), queries)

    return jax.lax.map(image, (blocks, k, v)).reshape(q.shape)


class Attention(nnx.Module):
    """Multi-query attention over pixels; keys and values may be shrunk before (arXiv:2404.10518, sec. 4)."""

    def __init__(self, block: ConvBlock, before: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.head_dim, heads = block.head_dim, block.num_heads * block.head_dim
        self.norm = _norm(before, dtype)
        self.query = Pointwise(before, heads, rngs=rngs, dtype=dtype)
        if block.key_kernel:
            down = functools.partial(Depthwise, block.key_kernel, before, 2, rngs=rngs, dtype=dtype)
            self.key_down, self.value_down = down(), down()
            self.key_norm, self.value_norm = _norm(before, dtype), _norm(before, dtype)
        else:
            self.key_down, self.value_down = None, None
        self.key = Pointwise(before, block.head_dim, rngs=rngs, dtype=dtype)
        self.value = Pointwise(before, block.head_dim, rngs=rngs, dtype=dtype)
        self.output = Pointwise(heads, block.width, rngs=rngs, dtype=dtype)
        self.layer_scale = nnx.Param(jnp.ones((block.width,), dtype), dims="C")

    def __call__(self, x: Float[Array, "B R S C"]) -> Float[Array, "B R S C"]:
        batch, rows, columns, _ = x.shape
        seen = self.norm(x)
        keys = seen if self.key_down is None else self.key_norm(self.key_down(seen))
        values = seen if self.value_down is None else self.value_norm(self.value_down(seen))
        parts = self.query(seen) * self.head_dim**-0.5, self.key(keys), self.value(values)
        out = _attend(*(part.reshape(batch, -1, self.head_dim) for part in parts))
        return x + self.output(out.reshape(batch, rows, columns, -1)) * self.layer_scale[...]


class Fusion(nnx.Module):
    """Puts the outputs of the two last stages together, and averages squares of pixels to soft tokens."""

    def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        widths = [stage[-1].width for stage in config.stages[-2:]]
        self.tokens, self.width = math.isqrt(config.num_soft_tokens), widths[0]
        middle = config.fusion_expansion * sum(widths)
        self.expand = Pointwise(sum(widths), middle, rngs=rngs, dtype=dtype)
        self.expand_norm = _norm(middle, dtype)
        self.project = Pointwise(middle, config.width, rngs=rngs, dtype=dtype)
        self.project_norm, self.norm = _norm(config.width, dtype), _norm(config.width, dtype)

    def __call__(self, fine: Float[Array, "B R S I"], coarse: Float[Array, "B R2 S2 J"]) -> Float[Array, "B M C"]:
        kernel, ratio = self.expand.kernel[...][0, 0], fine.shape[1] // coarse.shape[1]
        small = coarse @ kernel[self.width :]  # before it is enlarged: fewer pixels, the same products
        large = jnp.repeat(jnp.repeat(small, ratio, axis=1), ratio, axis=2)
        x = _gelu(self.expand_norm(fine @ kernel[: self.width] + large))
        x = self.project_norm(self.project(x))
        pool = x.shape[1] // self.tokens
        squares = x.reshape(len(x), self.tokens, pool, self.tokens, pool, -1)
        return self.norm(jnp.mean(squares, axis=(2, 4)).reshape(len(x), self.tokens**2, -1))


Block = Edge | Inverted | Attention
KINDS: Mapping[str, Callable[..., Block]] = {"edge": Edge, "inverted": Inverted, "attention": Attention}


@jax.jit
def _apply(block: Stem | Block, x: jax.Array) -> jax.Array:
    """Calls a block; of equal ones only the first is traced."""
    return block(x)


class MobileNetV5(nnx.Module):
    """The encoder: of an image a square of soft tokens."""

    def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        self.stem = Stem(config.stem_width, rngs=rngs, dtype=dtype)
        width, stages = config.stem_width, []
        for stage in config.stages:
            blocks = []
            for block in stage:
                blocks.append(KINDS[block.kind](block, width, rngs=rngs, dtype=dtype))
                width = block.width
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)
        self.fusion = Fusion(config, rngs=rngs, dtype=dtype)

    def __call__(self, pixels: Float[Array, "B height width 3"]) -> Float[Array, "B M C"]:
        """Soft tokens row by row, from the top left. Pixels are red, green and blue between 0 and 1.

        Raises ValueError unless the image is a square that comes down evenly to a square of pixels for each token.
        """
        unit, sides = side_unit(self.config), pixels.shape[1:-1]
        if pixels.shape[-1] != 3 or len(sides) != 2 or sides[0] != sides[1] or sides[0] % unit or not sides[0]:
            raise ValueError(
                f"pixels have shape {pixels.shape}; wanted [B, side, side, 3] with a side a multiple of {unit}; "
                f"resize images to {self.config.image_size}"
            )
        x = _apply(self.stem, pixels.astype(self.stem.kernel[...].dtype))
        ends = []
        for stage in self.blocks:
            for block in stage:
                x = _apply(block, x)
            ends.append(x)
        return self.fusion(*ends[-2:])


def side_unit(config: MobileNetConfig) -> int:
    """What the side of an image must be a multiple of: 256 pixels for the published tower."""
    *before, last = (math.prod(block.stride for block in stage) for stage in config.stages)
    fine = STEM_STRIDE * math.prod(before)
    return math.lcm(fine * math.isqrt(config.num_soft_tokens), fine * last)
