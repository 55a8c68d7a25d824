"""Weights and the small modules every block is made of.

Dimension letters: B sequences, T query tokens, S key slots, N query heads, K key/value heads, G = N/K, H head width,
D model width, F ffw width, V vocabulary, W window. Fused weights: M = N + 2K, E = 2F. Of Gemma 3n: A streams, L layers,
P width of a layer's piece of a token, R rows of the table of these; W there is LAuReL's rank.
"""

import functools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gemma_jax.configs.config import DecoderConfig, LayerSpec, NormConfig
from gemma_jax.nn import host, logical
from gemma_jax.nn.adapted import Adapted
from gemma_jax.nn.quantised import Int8
from gemma_jax.nn.sites import UNTAPPED, Tap
from gemma_jax.nn.stored import Stored

ACTIVATION: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class Layout:
    """How weights stand in memory. The model that is computed is the same, and so are the names of its weights."""

    table_dims: str = "V D"  # or "D V"; see `Table`
    is_fused: bool = False  # queries, keys and values by one matrix, gate and up by one; see `CPU_LAYOUT`
    gathers_units: bool = False  # of a sparse ffw only the active units' rows are read when decoding


PLAIN_LAYOUT = Layout()
# Measured on two cores, one token: with separate matrices XLA runs products at the same time that hinder each other,
# 33 ms for the layers of the 270M; fused 16 ms. A mesh wants them apart: N and K shard differently.
# Of a sparse ffw (3n, 8192 units, 95 % zeros) the rows of the active units: 10 ms a layer instead of 22, 30 of 49 for
# four tokens. Not measured on accelerators.
CPU_LAYOUT = Layout("D V", is_fused=True, gathers_units=True)
STORED_LAYOUT = Layout("V D", is_fused=True)  # for weights as files have them: tables by their rows; see `stored`
BUDGET = 2.5  # times as many units as are active on average are gathered; with more active ones all rows are read


def dimension_sizes(config: DecoderConfig) -> dict[str, int]:
    """What the letters of a weight's `dims` stand for. F differs by layer and is added there."""
    attention = config.attention
    return {
        "D": config.width,
        "N": attention.num_heads,
        "K": attention.num_kv_heads,
        "M": attention.num_heads + 2 * attention.num_kv_heads,
        "H": attention.head_dim,
        "V": config.vocab_size,
        "A": config.altup.num_streams if config.altup else 0,
        "W": config.laurel_rank or 0,
        "L": config.num_layers,
        "P": config.per_layer_embedding.width if config.per_layer_embedding else 0,
        "R": config.per_layer_embedding.num_rows if config.per_layer_embedding else 0,
    }


Parts = tuple[tuple[str, int, int], ...]  # (weight's name, start, stop) along the second dimension of a fused one


def weight(
    rngs: nnx.Rngs,
    dims: str,
    sizes: Mapping[str, int],
    dtype: jnp.dtype,
    parts: Parts | None = None,
    *,
    inputs: int | None = 1,
) -> nnx.Param:
    """A random parameter whose metadata names its dimensions, as in dims="D N H"; sharding rules read them.

    Normal with variance 1/fan_in: kernels that read the residual stream begin with D, the others end with it.
    `parts` names the weights that a fused one is made of. `inputs` is how many dimensions a product sums over, the
    first ones; 0 for a table, which is read by rows, None for what is neither.
    """
    letters = dims.split()
    shape = tuple(sizes[letter] for letter in letters)
    fan_in = sizes["D"] if "D" in (letters[0], *letters[1:-1]) or "V" in letters else math.prod(shape[:-1])
    value = jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5
    return nnx.Param(value, dims=dims, parts=parts, inputs=inputs)


def product(x: Float[Array, "..."], kernel: nnx.Param | Adapted) -> Float[Array, "..."]:
    """`x` [*batch, *inputs] times a kernel [*inputs, *outputs], however that is held: [*batch, *outputs]."""
    if isinstance(kernel, Adapted):
        return _adapted_product(x, kernel)
    value, num_inputs = kernel[...], kernel.get_metadata("inputs")
    if isinstance(value, Int8):
        whole = _product(x, logical.at_use(kernel, value.codes).astype(x.dtype), num_inputs)
        return whole * value.scales.astype(whole.dtype)
    return _product(x, logical.at_use(kernel, value), num_inputs)


def _product(x: Float[Array, "..."], value: jax.Array | Stored, num_inputs: int) -> Float[Array, "..."]:
    if num_inputs > 1 and logical.current() is None:
        # as one matrix: of a product over N and H XLA on CPU makes one over H and N, and copies the weight each time
        x = x.reshape(*x.shape[: x.ndim - num_inputs], -1)
        value = value if isinstance(value, Stored) else value.reshape(x.shape[-1], *value.shape[num_inputs:])
        num_inputs = num_inputs if isinstance(value, Stored) else 1
    if isinstance(value, Stored):
        return value.product(x).reshape(*x.shape[:-1], *value.shape[num_inputs:])
    return jnp.tensordot(x, value, num_inputs)


def _adapted_product(x: Float[Array, "..."], kernel: Adapted) -> Float[Array, "..."]:
    whole = product(x, kernel.base)
    axis = x.ndim - kernel.base.get_metadata("inputs")  # of the outputs' first dimension
    added = []
    for pair, size in kernel.spans():
        shape = (*whole.shape[:axis], size, *whole.shape[axis + 1 :])
        added.append(jnp.zeros(shape, x.dtype) if pair is None else product(product(x, pair.a), pair.b))
    added = added[0] if len(added) == 1 else jnp.concatenate(added, axis=axis)
    return whole + jnp.asarray(kernel.scale, whole.dtype) * added


def _rows(table: jax.Array | Stored, index: Int[Array, "B T"]) -> Float[Array, "B T *row"]:
    """Rows of a table, however and wherever it is held; `index` is within bounds."""
    return table.rows(index) if isinstance(table, Stored) else host.rows(table, index)


def wide(x: jax.Array) -> jnp.dtype:
    """The dtype in which sums over `x` are taken: float32, or float64 for float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rms_scaled(x: Float[Array, "*batch D"], epsilon: float) -> Float[Array, "*batch D"]:
    """x / rms(x), in `wide(x)` (arXiv:1910.07467)."""
    x = x.astype(wide(x))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale), or * scale, in float32 (arXiv:1910.07467). `dim` is the letter normalised over."""

    def __init__(self, dim: str, size: int, config: NormConfig, dtype: jnp.dtype):
        self.config = config
        start = jnp.zeros if config.is_zero_centred else jnp.ones
        self.scale = nnx.Param(start((size,), dtype), dims=dim)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gain = self.scale[...].astype(wide(x))
        gain = 1.0 + gain if self.config.is_zero_centred else gain
        return (rms_scaled(x, self.config.epsilon) * gain).astype(x.dtype)


class Table(nnx.Module):
    """The token table, read by row at the entry and, when the head is tied, as a matrix at the exit.

    Its two dimensions may stand in memory in either order, `dims="V D"` or "D V": one token's product with a table
    stored "D V" runs at memory speed on CPU and at half of it otherwise (XLA cannot choose, gathers fix the order).
    """

    def __init__(self, config: DecoderConfig, dims: str, *, rngs: nnx.Rngs, dtype: jnp.dtype, has_pieces: bool = False):
        self.dims = dims
        self.embedding = weight(rngs, dims, dimension_sizes(config), dtype, inputs=0)
        self.fetch, self.fetched = None, None
        if has_pieces:
            self.ple = weight(rngs, "R L P", dimension_sizes(config), dtype, inputs=0)

    def map_pieces(self, fetch: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int, int]) -> None:
        """Takes the rows from `fetch`, int [...] -> [..., L, P], instead of a parameter: the table of `shape` [R, L, P]
        then takes no memory, and a program calls back for the rows of the tokens at hand.
        """
        dtype = self.ple.get_raw_value().dtype
        del self.ple
        self.fetch, self.fetched = fetch, (shape, dtype.name)

    def pieces(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T L P"]:
        """Each layer's own embedding of the tokens, times sqrt(P); tokens without a row take the first (3n, 2.1).

        Rows alone come to the device where the table is on the host (see `host`) or is mapped.
        """
        shape, dtype = (self.ple.get_raw_value().shape, "") if self.fetched is None else self.fetched
        index = jnp.where((tokens >= 0) & (tokens < shape[0]), tokens, 0)
        if self.fetch is None:
            table = self.ple.get_raw_value()  # not [...]: outside a program that copies to the device
            rows = _rows(logical.at_use(self.ple, table), index)
        else:
            wanted = jax.ShapeDtypeStruct((*index.shape, *shape[1:]), dtype)
            rows = jax.pure_callback(self.fetch, wanted, index, vmap_method="expand_dims")
        return rows * jnp.asarray(shape[2] ** 0.5, rows.dtype)

    def matrix(self) -> jax.Array | Stored:
        """The table as it is multiplied."""
        return logical.at_use(self.embedding, self.embedding[...])

    def rows(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The row of each token, unscaled. A token outside 0..V-1 is the caller's error and gives a clamped row."""
        table, axis = self.matrix(), self.dims.split().index("V")
        if isinstance(table, Stored):
            return table.rows(tokens)
        rows = jnp.take(table, tokens, axis=axis, mode="clip")
        return jnp.moveaxis(rows, 0, -1) if axis else rows

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Products with every row, accumulated in float32."""
        table = self.matrix()
        if isinstance(table, Stored):
            return table.product(x)
        equation = f"...D,{self.dims.replace(' ', '')}->...V"
        return jnp.einsum(equation, x.astype(table.dtype), table, preferred_element_type=wide(table))


class GatedMLP(nnx.Module):
    """(activation(x w_gate) * (x w_up)) w_down, without biases (arXiv:2002.05202).

    With sparsity s only gates above the quantile s of a normal distribution with their mean and deviation are kept,
    less that threshold (Gemma 3n; statistical top-k, arXiv:2506.06644).
    """

    def __init__(
        self, config: DecoderConfig, spec: LayerSpec, *, rngs: nnx.Rngs, dtype: jnp.dtype, layout: Layout = PLAIN_LAYOUT
    ):
        ffw_width, sparsity = spec.ffw_width, spec.activation_sparsity
        self.activation, self.is_fused = config.activation, layout.is_fused
        # rounded as the references round it: the last digits show in float64
        self.deviations = float(np.float32(statistics.NormalDist().inv_cdf(sparsity))) if sparsity else None
        gathers = layout.gathers_units and sparsity
        self.budget = max(1, round(BUDGET * (1 - sparsity) * ffw_width)) if gathers else ffw_width
        sizes = dimension_sizes(config) | {"F": ffw_width, "E": 2 * ffw_width}
        if self.is_fused:
            parts = (("gate", 0, ffw_width), ("up", ffw_width, 2 * ffw_width))
            self.w_gate_up = weight(rngs, "D E", sizes, dtype, parts)
        else:
            self.w_gate = weight(rngs, "D F", sizes, dtype)
            self.w_up = weight(rngs, "D F", sizes, dtype)
        self.w_down = weight(rngs, "F D", sizes, dtype)

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = UNTAPPED) -> Float[Array, "B T D"]:
        if self.is_fused:
            gate, up = jnp.split(product(x, self.w_gate_up), 2, axis=-1)
        else:
            gate, up = product(x, self.w_gate), product(x, self.w_up)
        gate, up = (logical.constrain(one, "batch", "act_seq", "act_ffw") for one in (gate, up))
        gate = gate if self.deviations is None else _above(gate, self.deviations)
        hidden = tap("mlp_hidden", ACTIVATION[self.activation](gate) * up)
        num_tokens, ffw_width = math.prod(hidden.shape[:-1]), hidden.shape[-1]
        if 2 * num_tokens * self.budget > ffw_width:  # little or nothing to win
            return product(hidden, self.w_down)
        return _sparse_product(hidden, self.w_down[...], self.budget)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sparse_product(hidden: Float[Array, "B T F"], down: Float[Array, "F D"], budget: int) -> Float[Array, "B T D"]:
    """`hidden` times `down`, of which only the rows of active units are read if no token has more than `budget`."""

    def gathered(hidden: jax.Array) -> jax.Array:
        rank = jnp.cumsum(hidden != 0, axis=-1).reshape(-1, hidden.shape[-1])
        wanted = jnp.arange(1, budget + 1)
        unit = jax.vmap(lambda row: jnp.searchsorted(row, wanted))(rank).reshape(*hidden.shape[:-1], -1)
        # ranks that no unit has find the end: they take some row times zero
        chosen = jnp.take_along_axis(hidden, unit, axis=-1, mode="fill", fill_value=0)
        return jnp.einsum("BTF,BTFD->BTD", chosen, jnp.take(down, unit, axis=0, mode="clip"))

    few = jnp.max(jnp.sum(hidden != 0, axis=-1)) <= budget
    return jax.lax.cond(few, gathered, lambda h: h @ down, hidden)


@_sparse_product.defjvp
def _sparse_product_jvp(budget: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]):
    """Of the whole product: units that are zero have a derivative too."""
    (hidden, down), (d_hidden, d_down) = primals, tangents
    return _sparse_product(hidden, down, budget), d_hidden @ down + hidden @ d_down


def _above(gate: Float[Array, "B T F"], deviations: float) -> Float[Array, "B T F"]:
    """What of each value lies above its token's mean by more than so many (population) standard deviations, else 0."""
    x = gate.astype(wide(gate))
    threshold = jnp.mean(x, axis=-1, keepdims=True) + deviations * jnp.std(x, axis=-1, keepdims=True)
    return jax.nn.relu(gate - threshold.astype(gate.dtype))


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap): keeps values inside (-cap, cap); None leaves them (Gemma 2 report, sec. 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
