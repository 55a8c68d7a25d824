"""The operations: for each a `choose_...`, which says what would serve it, and the call of the kernel it chose.

A choice whose `kernel` is None leaves the operation to the caller's own XLA code, which knows more than a kernel does.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_kernels import dispatch
from gemma_kernels.dispatch import Choice
from gemma_kernels.gpu import window_attention as gpu
from gemma_kernels.tpu import band_attention as bands
from gemma_kernels.tpu import decode_attention as decoding
from gemma_kernels.tpu import group_quant_matmul as quantised
from gemma_kernels.tpu import linear_cross_entropy as losses
from gemma_kernels.tpu import mix_streams as mixing
from gemma_kernels.tpu.band import LANES, Band, BandBlocks, Marks
from gemma_kernels.tpu.band_tiles import AttentionBlocks, TileBlocks

MOST_DECODE_QUERIES = 16  # of more of them `band_attention` makes better use of the matrix unit
TILE_BYTES = 32  # of the slots that lie in one register of a TPU, one below the other
LARGEST_FUSED_WINDOW = 2048
FEWEST_MIXED = 64  # tokens; AltUp of E2B then moves 4 MB a layer, beside 120 of weights (not timed)
QUANT_ROWS = 16  # a register's rows of bfloat16: blocks of some of x's rows, and not all, are multiples of it
INTERPRETED = "v5e"  # the generation whose blocks the interpreter uses
PARTITIONED = "XLA divides this program between devices, and cannot divide a kernel; see jax.shard_map"
DTYPES = (jnp.bfloat16, jnp.float32)


def _tpu_choice(operation: str, shape: Mapping[str, float], refusal: str | None) -> Choice:
    """The TPU kernel with the blocks of the table, unless something speaks against it."""
    return dispatch.noted(_unnoted_tpu_choice(operation, shape, refusal))


def _unnoted_tpu_choice(operation: str, shape: Mapping[str, float], refusal: str | None) -> Choice:
    target = dispatch.target()
    is_interpreted = target == dispatch.INTERPRET
    if target not in dispatch.GENERATIONS and not is_interpreted:
        return Choice(operation, None, f"no kernel for {target}")
    if refusal is None and dispatch.is_partitioned():
        refusal = PARTITIONED
    if refusal is not None:
        return Choice(operation, None, refusal)
    generation = INTERPRETED if is_interpreted else target
    blocks = dispatch.nearest(generation, operation, shape)
    if blocks is None:
        return Choice(operation, None, f"{generation}: its table has no entry for it")
    return Choice(operation, "tpu", f"{target}, the table's entry nearest to {shape}", blocks, is_interpreted)


def _attention_refusal(q: jax.Array, k: jax.Array) -> str | None:
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        return f"queries are {q.dtype.name} and keys {k.dtype.name}: wanted both bfloat16 or float32"
    if q.shape[-1] % LANES:
        return f"head width {q.shape[-1]} is no multiple of {LANES}"
    return None


def choose_band_attention(q: jax.Array, k: jax.Array, band: Band, *, has_offsets: bool = False) -> Choice:
    """What serves `band_attention`; of the arrays only shapes and dtypes are looked at.

    has_offsets: whether it will be given Marks.offsets.
    """
    refusal = _attention_refusal(q, k)
    if refusal is None and q.shape[2] <= MOST_DECODE_QUERIES:
        refusal = f"{q.shape[2]} queries are too few to fill a block"
    if dispatch.target() == dispatch.GPU:
        return _gpu_choice(q, k, band, has_offsets, refusal)
    # no dtype: blocks were found for bfloat16, and those of float32 fit into VMEM as well, which a test compiles
    shape = {"head_dim": q.shape[3], "group": q.shape[1] // k.shape[1], "window": band.window or 0}
    return _tpu_choice("band_attention", shape, refusal)


def _gpu_choice(q: jax.Array, k: jax.Array, band: Band, has_offsets: bool, refusal: str | None) -> Choice:
    if q.shape[3] not in gpu.HEAD_WIDTHS:
        refusal = f"head width {q.shape[3]} is none of {', '.join(map(str, gpu.HEAD_WIDTHS))}"
    if band.max_span:
        refusal = "images see ahead, which the kernel for GPUs cannot"
    if refusal is None and (has_offsets or q.shape[2] != k.shape[2]):
        refusal = "the queries' columns are known only when it runs"
    if refusal is None and dispatch.is_partitioned():
        refusal = PARTITIONED
    if refusal is not None:
        return dispatch.noted(Choice("band_attention", None, refusal))
    return dispatch.noted(Choice("band_attention", "gpu", f"Triton, head width {q.shape[3]}", {}))


def band_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    marks: Marks,
    band: Band,
    choice: Choice,
) -> Float[Array, "B N T H"]:
    """Softmax attention under `reference.band_mask`, differentiable in q, k and v.

    Queries are scaled already; consecutive query heads share a key head; a query that sees nothing gives 0.
    `choice`: what `choose_band_attention` gave for these arrays. Raises ValueError for shapes that do not fit.
    """
    assert choice.blocks is not None
    if choice.kernel == "gpu":
        if marks.offsets is not None:
            raise ValueError("offsets are given, which the kernel for GPUs does not read: choose with has_offsets=True")
        return gpu.window_attention(
            q, k, v, window=band.window, softcap=band.softcap,
            query_segments=marks.query_segments, key_segments=marks.key_segments,
        )  # fmt: skip
    forward, dq, dkv = (_fitted(choice.blocks[name], q, k) for name in ("forward", "dq", "dkv"))
    fused = _fused_size(choice.blocks.get("fused"), band)
    blocks = AttentionBlocks(BandBlocks(**forward), TileBlocks(**dq), TileBlocks(**dkv), fused)
    return bands.band_attention(q, k, v, marks, band, blocks, interpret=choice.is_interpreted)


def _fitted(sizes: Mapping[str, int], q: jax.Array, k: jax.Array) -> dict[str, int]:
    """Sizes of the table for these arrays: no larger than they are, and of heads that there are."""
    group = q.shape[1] // k.shape[1]
    heads = max(n for n in range(1, sizes["heads"] + 1) if group % n == 0)
    block_q, block_kv = (
        min(size, _rounded_up(length, LANES))
        for size, length in ((sizes["block_q"], q.shape[2]), (sizes["block_kv"], k.shape[2]))
    )
    return {**sizes, "block_q": block_q, "block_kv": block_kv, "heads": heads}


def _fused_size(size: int | None, band: Band) -> int | None:
    """Of the kernel that makes all gradients of a window: at most half of it, and none of a window that is unrolled
    into too much code.
    """
    if size is None or band.window is None or not 2 * LANES <= band.window <= LARGEST_FUSED_WINDOW:
        return None
    return min(size, band.window // 2 // LANES * LANES)


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def choose_decode_attention(q: jax.Array, k: jax.Array, band: Band) -> Choice:
    """What serves `decode_attention`; of the arrays only shapes and dtypes are looked at."""
    refusal = _attention_refusal(q, q if k.dtype == jnp.int8 else k)
    if refusal is None and q.shape[2] > MOST_DECODE_QUERIES:
        refusal = f"{q.shape[2]} queries are more than {MOST_DECODE_QUERIES}"
    tile = TILE_BYTES // k.dtype.itemsize if k.dtype != jnp.int8 else LANES
    if refusal is None and k.shape[2] % tile:
        refusal = f"{k.shape[2]} slots are no multiple of {tile}"
    choice = _unnoted_tpu_choice("decode_attention", {"bytes": k.dtype.itemsize}, refusal)
    sizes = None if choice.blocks is None else _decode_sizes(choice.blocks, k, band)
    return dispatch.noted(replace(choice, blocks=sizes))


def _decode_sizes(rule: Mapping[str, int], k: jax.Array, band: Band) -> dict[str, int]:
    """Sizes by the table's rule: chunks of so many bytes, whole rings of several sequences where one is smaller, and
    the key heads in so many groups, a group for each core.
    """
    num_rows, key_heads, slots, width = k.shape
    groups = rule["cores"] if key_heads % rule["cores"] == 0 else 1
    sizes = {"buffers": 2, "head_groups": groups, "parts": rule["cores"] // groups}
    keys = groups * rule["chunk_bytes"] // (2 * key_heads * width * k.dtype.itemsize) // LANES * LANES
    if keys < slots:
        return {"keys": max(keys, LANES), **sizes}
    # a ring is full sooner or later: rows of unequal lengths, of which all are computed, do not stay so
    together = 1 if band.window is None else max(1, min(rule["rows"], num_rows, keys // slots))
    return {"keys": slots, "rows": together, **sizes}


def decode_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"] | Int[Array, "B K S H"],
    v: Float[Array, "B K S H"] | Int[Array, "B K S H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    band: Band,
    choice: Choice,
    scales: tuple[Float[Array, "B K S"], Float[Array, "B K S"]] | None = None,
) -> Float[Array, "B N T H"]:
    """Attention of one query, or a few, to a ring of slots under `reference.decode_mask`; no gradients.

    `scales`: of int8 keys and values. `choice`: what `choose_decode_attention` gave for these arrays.
    """
    assert choice.blocks is not None
    return decoding.decode_attention(
        q, k, v, positions, lengths,
        window=band.window, softcap=band.softcap, scales=scales,
        blocks=decoding.DecodeBlocks(**choice.blocks), interpret=choice.is_interpreted,
    )  # fmt: skip


def choose_linear_cross_entropy(hidden: jax.Array, table: jax.Array) -> Choice:
    """What serves `linear_cross_entropy`; of the arrays only shapes and dtypes are looked at."""
    refusal = None if table.dtype in DTYPES else f"the table is {table.dtype.name}: wanted bfloat16 or float32"
    shape = {"width": table.shape[1], "tokens": hidden.shape[0], "bytes": table.dtype.itemsize}
    choice = _unnoted_tpu_choice("linear_cross_entropy", shape, refusal)
    if choice.blocks is not None and table.dtype == jnp.float32:
        choice = replace(choice, blocks={name: _halved(sizes) for name, sizes in choice.blocks.items()})
    return dispatch.noted(choice)


def _halved(sizes: Mapping[str, int]) -> dict[str, int]:
    """Blocks of the table, which are for bfloat16, for numbers twice as wide: else VMEM has no room for 27B's."""
    return {**sizes, **{name: max(sizes[name] // 2 // LANES, 1) * LANES for name in ("tokens", "vocab")}}


def linear_cross_entropy(
    hidden: Float[Array, "T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " T"],
    softcap: float | None,
    choice: Choice,
    weights: Float[Array, " T"] | None = None,
) -> Float[Array, " T"]:
    """weights * -log softmax(cap(hidden table^T))[target], in nats, float32, differentiable; see `reference`.

    `choice`: what `choose_linear_cross_entropy` gave for these arrays.
    """
    assert choice.blocks is not None
    blocks = losses.Blocks(**{name: losses.Block(**sizes) for name, sizes in choice.blocks.items()})
    return losses.linear_cross_entropy(
        hidden, table, targets, weights, softcap=softcap, blocks=blocks, interpret=choice.is_interpreted
    )


def choose_group_quant_matmul(x: jax.Array, values: jax.Array, scales: jax.Array) -> Choice:
    """What serves `group_quant_matmul`; of the arrays only shapes and dtypes are looked at."""
    refusal = None
    if any(size % LANES for size in values.shape):
        refusal = f"a matrix of {values.shape[0]} x {values.shape[1]}: wanted multiples of {LANES}"
    elif x.dtype not in DTYPES:
        refusal = f"x is {x.dtype.name}: wanted bfloat16 or float32"
    elif scales.shape[0] == 1 and values.dtype == jnp.int8:
        refusal = "XLA does as well where each channel has one scale"
    shape = {"rows": x.shape[0], "bits": 4 if values.dtype == jnp.int4 else 8}
    choice = _unnoted_tpu_choice("group_quant_matmul", shape, refusal)
    sizes = None if choice.blocks is None else _quant_sizes(choice.blocks, x.shape[0], values)
    return dispatch.noted(replace(choice, blocks=sizes))


def _quant_sizes(wanted: Mapping[str, int], num_rows: int, values: jax.Array) -> dict[str, int]:
    """The largest sizes that divide the matrix and are not above those of the table; all of it where none divides.

    A table's blocks for fewer rows hold all rows as well, and scale weights: sums of groups are for as many as it says.
    """
    inputs, outputs = (
        max((n for n in range(step, size + 1, step) if size % n == 0 and n <= wanted[name]), default=size)
        for name, size, step in (("inputs", values.shape[0], 2 * LANES), ("outputs", values.shape[1], LANES))
    )
    sizes = {**wanted, "inputs": inputs, "outputs": outputs}
    if num_rows > wanted["rows"] and wanted["rows"] % QUANT_ROWS:
        sizes |= {"rows": _rounded_up(num_rows, QUANT_ROWS), "sums_groups": False}
    return sizes


def group_quant_matmul(
    x: Float[Array, "M I"],
    values: Int[Array, "I O"],
    scales: Float[Array, "groups O"],
    choice: Choice,
) -> Float[Array, "M O"]:
    """x times `reference.dequantised(values, scales)`, summed in float32, in x's dtype; differentiable in x alone.

    `choice`: what `choose_group_quant_matmul` gave for these arrays.
    """
    assert choice.blocks is not None
    blocks = quantised.QuantMatmulBlocks(**choice.blocks)
    return quantised.group_quant_matmul(x, values, scales, blocks=blocks, interpret=choice.is_interpreted)


def choose_mix_streams(coefficients: jax.Array, streams: jax.Array) -> Choice:
    """What serves `mix_streams`; of the arrays only shapes and dtypes are looked at."""
    refusal, (num_tokens, width) = None, streams.shape[1:]
    if streams.dtype not in DTYPES:
        refusal = f"streams are {streams.dtype.name}: wanted bfloat16 or float32"
    elif width % LANES:
        refusal = f"width {width} is no multiple of {LANES}"
    elif num_tokens < FEWEST_MIXED:
        refusal = f"{num_tokens} tokens are too few to fill a block"
    return _tpu_choice("mix_streams", {"width": width, "vectors": sum(coefficients.shape[1:])}, refusal)


def mix_streams(
    coefficients: Float[Array, "T O I"],
    streams: Float[Array, "A T D"],
    other: Float[Array, "T D"] | None,
    added: Float[Array, "T D"] | None,
    choice: Choice,
) -> Float[Array, "O T D"]:
    """Sums of each token's vectors by coefficients of its own, differentiable; see `reference.mix_streams`.

    `choice`: what `choose_mix_streams` gave for these arrays.
    """
    assert choice.blocks is not None
    blocks = mixing.MixBlocks(**choice.blocks)
    return mixing.mix_streams(coefficients, streams, other, added, blocks=blocks, interpret=choice.is_interpreted)
