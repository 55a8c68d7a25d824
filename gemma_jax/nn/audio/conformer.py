"""Gemma 3n's ears: a conformer (Universal Speech Model, arXiv:2303.01037; specification of Gemma 3n, 6.2 to 6.4).

Dimension letters here: B clips, T frames of 10 ms, or of 40 ms after the two convolutions; F frequencies, I and O
channels in and out, J = F x O; C the encoder's width, E the ffw's, G = 2C, N heads, H head width, k side of a kernel,
W steps of a block of queries, S = 2W keys that it looks at, R steps that one step sees; M soft tokens, D the decoder's
width. No step sees a later one but through the convolutions, which look 60 ms ahead. A clip is encoded by the same code
in one piece and in chunks: the whole is a stream's first and last chunk.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.config import NormConfig
from gemma_jax.configs.towers import AudioConfig
from gemma_jax.nn.layers import RMSNorm, softcap, wide
from gemma_jax.nn.look import MASKED

NORM = NormConfig(is_zero_centred=False)
KERNEL, STRIDE = 3, 2  # of the convolutions at the entry, in time and in frequency
FFW_FACTOR = 4  # an ffw's units for each of the width
LONGEST_WAVE = 1e4  # of the sines that say how far a key is away, in radians per turn


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """What the cumulative norm knows of all steps so far."""

    steps: jax.Array  # [], how many
    total: jax.Array  # [B], of all values
    squares: jax.Array  # [B], of the distances of each step's values from the mean up to that step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EntryState:
    """What one of the convolutions at the entry has yet to read, and its norm's sums."""

    frames: jax.Array  # [B, at most 2, F, I]
    is_valid: jax.Array  # [B, at most 2]
    sums: Sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockState:
    """What a conformer block remembers."""

    k: jax.Array  # [B, W, N, H], of the last steps
    v: jax.Array  # [B, W, N, H]
    tail: jax.Array  # [B, k - 1, C], what the convolution in time still sees


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stream:
    """Where the encoding of some clips stands."""

    entries: tuple[EntryState, ...]
    blocks: tuple[BlockState, ...]
    is_valid: jax.Array  # [B, W], of the last steps
    phase: int = dataclasses.field(default=0, metadata={"static": True})  # steps so far, modulo the reduction


def _param(rngs: nnx.Rngs, dims: str, sizes: dict[str, int], dtype: jnp.dtype, fan_in: int) -> nnx.Param:
    shape = tuple(sizes[letter] for letter in dims.split())
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5, dims=dims)


class CumulativeNorm(nnx.Module):
    """Each step less the mean of all values up to it, over their deviation, in float32. Padding counts, too.

    The deviation at a step is taken from the squares of each earlier step's distance from the mean that *it* saw.
    """

    def __init__(self, config: AudioConfig, channels: int, dtype: jnp.dtype):
        self.epsilon = config.group_norm_epsilon
        self.scale = nnx.Param(jnp.ones((channels,), dtype), dims="O")

    def __call__(self, x: Float[Array, "B T F O"], sums: Sums) -> tuple[Float[Array, "B T F O"], Sums]:
        values = x.astype(wide(x))
        steps = sums.steps + jnp.arange(1, x.shape[1] + 1)
        counts = steps.astype(values.dtype) * (x.shape[2] * x.shape[3])
        totals = sums.total[:, None] + jnp.cumsum(jnp.sum(values, axis=(2, 3)), axis=1)
        centred = values - (totals / counts)[..., None, None]
        squares = sums.squares[:, None] + jnp.cumsum(jnp.sum(jnp.square(centred), axis=(2, 3)), axis=1)
        normed = centred * jax.lax.rsqrt(squares / counts + self.epsilon)[..., None, None]
        out = (normed * self.scale[...].astype(values.dtype)).astype(x.dtype)
        return out, Sums(steps[-1], totals[:, -1], squares[:, -1])


class Entry(nnx.Module):
    """A convolution of stride 2 that looks ahead in time, the cumulative norm, and relu.

    Step t sees the frames 2t, 2t + 1 and 2t + 2; after the last frame come zeros.
    """

    def __init__(self, config: AudioConfig, stage: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        before = 1 if stage == 0 else config.channels[stage - 1]
        sizes = {"k": KERNEL, "I": before, "O": config.channels[stage]}
        self.w_conv = _param(rngs, "k k I O", sizes, dtype, KERNEL * KERNEL * before)
        self.norm = CumulativeNorm(config, config.channels[stage], dtype)

    def __call__(
        self, x: Float[Array, "B T F I"], is_valid: Bool[Array, "B T"], state: EntryState, is_last: bool
    ) -> tuple[Float[Array, "B T2 F2 O"], Bool[Array, "B T2"], EntryState]:
        """As many steps as the frames at hand allow; a step is valid if its first frame is."""
        x = jnp.concatenate([state.frames, x], axis=1)
        is_valid = jnp.concatenate([state.is_valid, is_valid], axis=1)
        length = x.shape[1]
        steps = (length + 1) // STRIDE if is_last else max(length - 1, 0) // STRIDE
        read = STRIDE * steps
        rest = x[:, read:], is_valid[:, read:]
        if steps == 0:
            bins = (x.shape[2] - 1) // STRIDE + 1
            empty = jnp.zeros((len(x), 0, bins, self.w_conv.shape[-1]), x.dtype)
            return empty, is_valid[:, :0], EntryState(*rest, state.sums)
        seen = jnp.pad(x[:, : read + 1], ((0, 0), (0, max(read + 1 - length, 0)), (0, 0), (0, 0)))
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            seen, self.w_conv[...], (STRIDE, STRIDE), ((0, 0), (1, 1)), dimension_numbers=dims
        )
        x, sums = self.norm(x, state.sums)
        return jax.nn.relu(x), is_valid[:, :read:STRIDE], EntryState(*rest, sums)


class FFW(nnx.Module):
    """Half a step along a plain ffw layer, normed before and after."""

    def __init__(self, config: AudioConfig, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.factor = config.residual_weight
        self.pre_norm, self.post_norm = (RMSNorm("C", config.width, NORM, dtype) for _ in range(2))
        self.w1 = _param(rngs, "C E", sizes, dtype, sizes["C"])
        self.w2 = _param(rngs, "E C", sizes, dtype, sizes["E"])

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        hidden = jax.nn.silu(self.pre_norm(x) @ self.w1[...])
        return x + self.factor * self.post_norm(hidden @ self.w2[...])


class Attention(nnx.Module):
    """Each step looks at itself and the steps shortly before it, by content and by distance (arXiv:1901.02860, 3.3)."""

    def __init__(self, config: AudioConfig, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.past, self.softcap = config.past, config.softcap
        self.pre_norm, self.post_norm = (RMSNorm("C", config.width, NORM, dtype) for _ in range(2))
        self.w_q, self.w_k, self.w_v, self.w_pos = (_param(rngs, "C N H", sizes, dtype, config.width) for _ in range(4))
        self.per_dim_scale = nnx.Param(jnp.zeros((sizes["H"],), dtype), dims="H")
        self.w_o = _param(rngs, "N H C", sizes, dtype, config.width)

    def __call__(
        self, x: Float[Array, "B T C"], is_valid: Bool[Array, "B WT"], state: BlockState
    ) -> tuple[Float[Array, "B T C"], BlockState]:
        """`is_valid` tells which keys may be seen: those of the state, then those of `x`."""
        normed = self.pre_norm(x)
        q, k, v = (jnp.einsum("BTC,CNH->BTNH", normed, w[...]) for w in (self.w_q, self.w_k, self.w_v))
        # over ln 2, which is softplus(0)
        scale = jax.nn.softplus(self.per_dim_scale[...].astype(wide(x))) * (q.shape[-1] ** -0.5 / math.log(2))
        q = (q * scale).astype(x.dtype)
        k, v = jnp.concatenate([state.k, k], axis=1), jnp.concatenate([state.v, v], axis=1)
        distances = jnp.asarray(_waves(self.past, x.shape[-1]), x.dtype)
        relative = jnp.einsum("RC,CNH->RNH", distances, self.w_pos[...])
        out = banded(q, k, v, relative, is_valid, self.softcap)
        out = self.post_norm(jnp.einsum("BTNH,NHC->BTC", out, self.w_o[...]))
        count = x.shape[1]
        return x + out, dataclasses.replace(state, k=k[:, count:], v=v[:, count:])


def banded(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B WT N H"],
    v: Float[Array, "B WT N H"],
    relative: Float[Array, "R N H"],
    is_valid: Bool[Array, "B WT"],
    cap: float,
) -> Float[Array, "B T N H"]:
    """softmax(cap * tanh((q k + q relative[distance]) / cap)) v over the valid ones of each query's last R keys.

    W keys come before the first query's own, W >= R - 1. Queries in blocks of W see this block's keys and the one's
    before: time and memory grow with T, not with its square. A query without any valid key gets some average.
    """
    length, width = q.shape[1], k.shape[1] - q.shape[1]
    count = -(-length // width)

    def blocks(x: jax.Array) -> jax.Array:
        missing = -x.shape[1] % width
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0) for _ in x.shape[2:])))
        return x.reshape(len(x), -1, width, *x.shape[2:])

    def pairs(x: jax.Array) -> jax.Array:
        x = blocks(x)
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    distance = width + np.arange(width)[:, None] - np.arange(2 * width)
    is_near = (distance >= 0) & (distance < len(relative))
    queries, keys, values = blocks(q), pairs(k), pairs(v)
    by_distance = jnp.einsum("BnWNH,RNH->BnNWR", queries, relative, preferred_element_type=wide(q))
    index = np.arange(width)[:, None], np.clip(distance, 0, len(relative) - 1)
    scores = jnp.einsum("BnWNH,BnSNH->BnNWS", queries, keys, preferred_element_type=wide(q))
    scores = softcap(scores + by_distance[(..., *index)], cap)
    scores = jnp.where(pairs(is_valid)[:, :, None, None] & is_near, scores, MASKED)
    out = jnp.einsum("BnNWS,BnSNH->BnWNH", jax.nn.softmax(scores, axis=-1).astype(v.dtype), values)
    return out.reshape(len(q), count * width, *q.shape[2:])[:, :length]


def _waves(count: int, width: int) -> Float[np.ndarray, "R C"]:
    """Distances of 0 to count - 1 steps as sines, then cosines, of wavelengths from 2 pi to 2 pi LONGEST_WAVE."""
    half = width // 2
    frequencies = LONGEST_WAVE ** (-np.arange(half) / max(half - 1, 1))
    angles = np.arange(count)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class LightConv(nnx.Module):
    """A gate, a depthwise convolution over this and the last steps, norm and silu, with a residual."""

    def __init__(self, config: AudioConfig, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.pre_norm, self.conv_norm = (RMSNorm("C", config.width, NORM, dtype) for _ in range(2))
        self.start = _param(rngs, "C G", sizes, dtype, config.width)
        self.dw = _param(rngs, "k C", sizes, dtype, config.kernel)
        self.end = _param(rngs, "C C", sizes, dtype, config.width)

    def __call__(self, x: Float[Array, "B T C"], state: BlockState) -> tuple[Float[Array, "B T C"], BlockState]:
        first, second = jnp.split(self.pre_norm(x) @ self.start[...], 2, axis=-1)
        seen = jnp.concatenate([state.tail, first * jax.nn.sigmoid(second)], axis=1)
        count, kernel = x.shape[1], self.dw[...].astype(wide(x))
        # a sum of shifted products: XLA for CPU has no fast depthwise convolution
        mixed = functools.reduce(jnp.add, (seen[:, i : i + count] * kernel[i] for i in range(len(kernel))))
        out = x + jax.nn.silu(self.conv_norm(mixed.astype(x.dtype))) @ self.end[...]
        return out, dataclasses.replace(state, tail=seen[:, count:])


class Block(nnx.Module):
    """One block: half an ffw, attention, convolution, half an ffw. Invalid steps are zero for the convolution."""

    def __init__(self, config: AudioConfig, sizes: dict[str, int], *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.ffw_start, self.ffw_end = (FFW(config, sizes, rngs=rngs, dtype=dtype) for _ in range(2))
        self.attn = Attention(config, sizes, rngs=rngs, dtype=dtype)
        self.lconv = LightConv(config, sizes, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm("C", config.width, NORM, dtype)

    def __call__(
        self, x: Float[Array, "B T C"], is_valid: Bool[Array, "B WT"], state: BlockState
    ) -> tuple[Float[Array, "B T C"], BlockState]:
        """`is_valid` is that of the state's keys and of `x`."""
        x, state = self.attn(self.ffw_start(x), is_valid, state)
        x = jnp.where(is_valid[:, -x.shape[1] :, None], x, 0)
        x, state = self.lconv(x, state)
        return self.norm(self.ffw_end(x)), state


@jax.jit
def _apply(block: Block, x: jax.Array, is_valid: jax.Array, state: BlockState) -> tuple[jax.Array, BlockState]:
    """Calls a block; of equal ones only the first is traced."""
    return block(x, is_valid, state)


class Conformer(nnx.Module):
    """The encoder: a vector for every 160 ms of a clip."""

    def __init__(self, config: AudioConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        sizes = {"C": config.width, "N": config.num_heads, "H": config.width // config.num_heads, "k": config.kernel}
        sizes |= {"E": FFW_FACTOR * config.width, "G": 2 * config.width, "J": config.bins_left * config.channels[-1]}
        self.sscp = nnx.List([Entry(config, i, rngs=rngs, dtype=dtype) for i in range(len(config.channels))])
        self.w_sscp_proj = _param(rngs, "J C", sizes, dtype, sizes["J"])
        self.conf = nnx.List([Block(config, sizes, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])

    def __call__(
        self,
        features: Float[Array, "B T bins"],
        is_valid: Bool[Array, "B T"],
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B M C"], Bool[Array, "B M"]]:
        """Log-mel features, and which frames belong to the clip, to vectors and which of them are valid; others are 0.

        Of T frames come T / 16 vectors, rounded up at each of three steps. A vector does not depend on what comes 7 or
        more frames after its first one: vector m of a clip that is followed by padding is that of the clip alone if
        the clip has 16 m + 7 frames alone. The vectors at the very end may differ: alone zeros follow in the
        convolutions, in a batch the features of silence. With `counts`, how many of the frames each clip has, zeros
        follow there too: then every valid vector is that of the clip alone.
        """
        _, x, kept = self.step(self.start(len(features)), features, is_valid, counts, is_last=True)
        return x, kept

    def start(self, batch: int) -> Stream:
        """Of so many clips at once, nothing heard yet."""
        config, dtype = self.config, self.w_sscp_proj.dtype
        total = jnp.zeros((batch,), jnp.promote_types(dtype, jnp.float32))
        sums = Sums(jnp.zeros((), jnp.int32), total, total)
        entries, bins, before = [], config.num_bins, 1
        for channels in config.channels:
            frames = jnp.zeros((batch, 0, bins, before), dtype)
            entries.append(EntryState(frames, jnp.zeros((batch, 0), bool), sums))
            bins, before = (bins - 1) // STRIDE + 1, channels
        width = max(config.past - 1, 1)
        keys = jnp.zeros((batch, width, config.num_heads, config.width // config.num_heads), dtype)
        block = BlockState(keys, keys, jnp.zeros((batch, config.kernel - 1, config.width), dtype))
        return Stream(tuple(entries), (block,) * config.num_layers, jnp.zeros((batch, width), bool))

    def step(
        self,
        stream: Stream,
        features: Float[Array, "B T bins"],
        is_valid: Bool[Array, "B T"] | None = None,
        counts: Int[Array, " B"] | None = None,
        *,
        is_last: bool = False,
    ) -> tuple[Stream, Float[Array, "B M C"], Bool[Array, "B M"]]:
        """The next frames of each clip, any number of them: the vectors that they complete, and which are valid.

        With `is_last` the stream ends, and the last vectors come too. `counts` is for a stream of one chunk. Under jit
        `is_last` is static, and chunks of 16 frames or multiples compile thrice: the first, all further ones, and the
        last.
        """
        is_valid = jnp.ones(features.shape[:2], bool) if is_valid is None else is_valid
        if features.shape[2:] != (self.config.num_bins,) or is_valid.shape != features.shape[:2]:
            raise ValueError(
                f"features have shape {features.shape} and is_valid {is_valid.shape}; wanted [B, T, "
                f"{self.config.num_bins}] and [B, T]"
            )
        x, entries = features.astype(self.w_sscp_proj.dtype)[..., None], []
        for stage, entry in zip(self.sscp, stream.entries, strict=True):
            if counts is not None:
                is_there = jnp.arange(x.shape[1]) < counts[:, None]
                x, counts = jnp.where(is_there[..., None, None], x, 0), (counts + 1) // STRIDE
            x, is_valid, entry = stage(x, is_valid, entry, is_last)
            entries.append(entry)
        x = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) @ self.w_sscp_proj[...]
        stream = dataclasses.replace(stream, entries=tuple(entries))
        return self._blocks(stream, x, is_valid) if x.shape[1] else (stream, x, is_valid)

    def _blocks(
        self, stream: Stream, x: Float[Array, "B T C"], is_valid: Bool[Array, "B T"]
    ) -> tuple[Stream, Float[Array, "B M C"], Bool[Array, "B M"]]:
        count, blocks = x.shape[1], []
        seen = jnp.concatenate([stream.is_valid, is_valid], axis=1)
        for block, state in zip(self.conf, stream.blocks, strict=True):
            x, state = _apply(block, x, seen, state)
            blocks.append(state)
        first, every = -stream.phase % self.config.reduction, self.config.reduction
        x, kept = x[:, first::every], is_valid[:, first::every]
        phase = (stream.phase + count) % every
        return Stream(stream.entries, tuple(blocks), seen[:, count:], phase), jnp.where(kept[..., None], x, 0), kept


def filled(
    soft: Float[Array, "B M D"], is_valid: Bool[Array, "B M"], padding: Float[Array, " D"], count: int
) -> Float[Array, "B count D"]:
    """Exactly `count` soft tokens of each clip: `padding` where they are invalid and after them (specification, 6.4).

    Raises: ValueError if there are more than `count`.
    """
    if soft.shape[1] > count:
        raise ValueError(f"a clip has {soft.shape[1]} soft tokens; at most {count} fit, that is 30 s of sound")
    tokens = jnp.where(is_valid[..., None], soft, padding.astype(soft.dtype))
    rest = jnp.broadcast_to(padding.astype(soft.dtype), (len(soft), count - soft.shape[1], soft.shape[2]))
    return jnp.concatenate([tokens, rest], axis=1)
