"""What each kernel computes, in plain `jnp`: the oracle of their tests, and the path where no kernel is chosen.

Dimension letters: B sequences, T query tokens, S key columns, N query heads, K key/value heads, G = N/K, H head width,
I and O the inputs and outputs of a matrix, or vectors that are mixed and made, D model width, V vocabulary, A streams.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -2.3819763e38  # finite: a row without any key gives numbers and not NaN


def wide(x: jax.Array) -> jnp.dtype:
    """The dtype in which sums over `x` are taken: float32, or float64 for float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap); None leaves x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def band_mask(
    num_queries: int,
    num_keys: int,
    *,
    window: int | None = None,
    offset: int | Int[Array, " B"] = 0,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    query_spans: Int[Array, "B T"] | None = None,
    key_spans: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """True where a query may look; B is 1 where nothing differs between rows.

    Query i stands in key column c = offset + i. It sees column j if j <= c, and also j > c where both have the same
    span above 0 (an image's tokens see each other); if c - j < window; and if both are of the same segment.
    """
    column = jnp.reshape(jnp.asarray(offset, jnp.int32), (-1, 1, 1)) + jnp.arange(num_queries)[None, :, None]
    distance = column - jnp.arange(num_keys)[None, None, :]
    seen = distance >= 0
    if query_spans is not None and key_spans is not None:
        seen |= (query_spans[:, :, None] == key_spans[:, None, :]) & (query_spans[:, :, None] > 0)
    if window is not None:
        seen &= distance < window
    if query_segments is not None and key_segments is not None:
        seen &= query_segments[:, :, None] == key_segments[:, None, :]
    return seen


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    softcap: float | None = None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Softmax attention of queries that are scaled already, and the logarithm of each softmax's sum.

    Consecutive query heads share a key head. A query that sees nothing gives 0, and a sum of 0 (its logarithm is
    MASKED). Logits, softmax and sums are `wide`; weights are rounded to v's dtype before their product with v.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    logits = jnp.einsum("BKGTH,BKSH->BKGTS", grouped, k, preferred_element_type=wide(q))
    mask = mask[:, None, None]
    logits = jnp.where(mask, capped(logits, softcap), MASKED)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=wide(q))
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    log_sum = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), MASKED)
    return out.reshape(q.shape).astype(q.dtype), log_sum[..., 0].reshape(q.shape[:-1])


def decode_mask(
    positions: Int[Array, "B T"], lengths: Int[Array, " B"], num_slots: int, window: int | None
) -> Bool[Array, "B T S"]:
    """Which slots of a ring each query sees: slot s holds the last position below `lengths` that is s modulo S.

    `lengths` tokens are stored, the queries among them; a position of -1 is padding, which sees nothing.
    """
    last = lengths[:, None] - 1
    slot = jnp.arange(num_slots)[None, :]
    held = last - (last - slot) % num_slots
    distance = positions[:, :, None] - held[:, None, :]
    seen = (distance >= 0) & (held >= 0)[:, None, :] & (positions >= 0)[:, :, None]
    return seen if window is None else seen & (distance < window)


def dequantised(
    values: Int[Array, "I O"], scales: Float[Array, "groups O"], dtype: str | jnp.dtype = "float32"
) -> Float[Array, "I O"]:
    """values times the scale of their group: I / groups consecutive inputs of one output share one."""
    size = values.shape[0] // scales.shape[0]
    return values.astype(dtype) * jnp.repeat(scales.astype(dtype), size, axis=0)


def cross_entropy(
    hidden: Float[Array, "T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    softcap: float | None = None,
) -> Float[Array, " T"]:
    """-log softmax(cap(hidden table^T))[target] of each token, in nats, float32 (float64 of float64)."""
    logits = capped(jnp.einsum("TD,VD->TV", hidden, table, preferred_element_type=wide(hidden)), softcap)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def mix_streams(
    coefficients: Float[Array, "*batch O I"],
    streams: Float[Array, "A *batch D"],
    other: Float[Array, "*batch D"] | None = None,
    added: Float[Array, "*batch D"] | None = None,
) -> Float[Array, "O *batch D"]:
    """out[o] = sum over i of coefficients[o, i] vectors[i], + added where o > 0; the vectors are streams, then `other`.

    Sums are `wide`, and rounded once to the streams' dtype.
    """
    vectors = [x.astype(wide(x)) for x in (*streams, *(() if other is None else (other,)))]
    coefficients = coefficients.astype(vectors[0].dtype)
    out = []
    for o in range(coefficients.shape[-2]):
        total = sum(coefficients[..., o, i, None] * x for i, x in enumerate(vectors))
        out.append(total if added is None or o == 0 else total + added.astype(vectors[0].dtype))
    return jnp.stack(out).astype(streams.dtype)
