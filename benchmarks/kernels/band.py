"""Our banded attention: forward with the sums of its softmax, and backward; with segments, all tokens of one."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.attention import AttentionShape
from benchmarks.kernels.case import Blocks, Entry, Program
from benchmarks.kernels.estimate import Part
from gemma_kernels.tpu import band_tiles
from gemma_kernels.tpu.band import Band, BandBlocks, Marks
from gemma_kernels.tpu.band_backward import band_backward
from gemma_kernels.tpu.band_forward import band_forward, make_plan, schedule
from gemma_kernels.tpu.band_inputs import scalars_of
from gemma_kernels.tpu.band_softmax import PIECE, chunk_size
from gemma_kernels.tpu.band_tiles import AttentionBlocks, Plan, TileBlocks

WINDOW_SIZES = ((256, 256), (128, 128), (256, 512), (512, 512), (128, 256))  # queries and keys of a block
STREAM_SIZES = ((512, 512), (512, 1024), (1024, 1024), (1024, 512), (256, 1024))


def choices(shape: AttentionShape) -> tuple[Blocks, ...]:
    """Of the forward pass; all heads of a group are worth stacking before any are not."""
    sizes = STREAM_SIZES if shape.window is None else WINDOW_SIZES
    heads = [n for n in (8, 4, 2, 1) if shape.group % n == 0]
    return tuple({"forward": {"block_q": q, "block_kv": k, "heads": n}} for n in heads for q, k in sizes)


def backward_choices(shape: AttentionShape) -> tuple[Blocks, ...]:
    """The same for both kernels: a sweep takes the best of each."""
    sizes = ((512, 512), (256, 512), (512, 256)) if shape.window is None else ((256, 256), (128, 128), (512, 256))
    heads = [n for n in (8, 4, 2, 1) if shape.group % n == 0]
    tiles = (2, 4) if shape.window is None else (8,)
    found = ({"block_q": q, "block_kv": k, "heads": n, "tiles": m} for m in tiles for n in heads for q, k in sizes)
    return tuple({"dq": one, "dkv": {**one, "block_q": one["block_kv"], "block_kv": one["block_q"]}} for one in found)


def fused_choices() -> tuple[Blocks, ...]:
    """Of the kernel that makes all gradients of a window."""
    return tuple({"fused": size} for size in (256, 128, 512))


def entry(shape: AttentionShape, *parts: str, rival: str | None = None) -> Entry:
    """One for each width, group and window: of contexts of several lengths the one swept last decides."""
    sizes = {"head_dim": shape.width, "group": shape.group, "window": shape.window or 0}
    return Entry(kernel="band_attention", shape=sizes, parts=parts, rival=rival)


def forward(shape: AttentionShape, blocks: Blocks) -> Program:
    """The forward pass with segments."""
    sizes = blocks["forward"]
    part = _stream_part if shape.window is None else _window_part

    def function(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        marks = Marks(query_segments=ids, key_segments=ids)
        return band_forward(q, k, v, marks, Band(shape.window), BandBlocks(**sizes))

    return Program(
        function=function,
        arguments=(shape.queries(), shape.keys(), shape.keys(), shape.ids()),
        parts=(part(shape, BandBlocks(**sizes)),),
        flops=shape.flops,
        min_bytes=shape.forward_bytes,
    )


def _step_flops(shape: AttentionShape, rows: int, products: int) -> float | None:
    """Of a step that sees a whole window: `rows` queries or keys against it."""
    return None if shape.window is None else 2.0 * products * rows * shape.window * shape.width


def _window_part(shape: AttentionShape, blocks: BandBlocks) -> Part:
    """Steps at the start of the sequence, where the window is cut, are masked; by the kernel's own schedule."""
    ids = jnp.zeros((1, shape.tokens), jnp.int32)
    marks, band = Marks(query_segments=ids, key_segments=ids), Band(shape.window)
    plan = make_plan(band, blocks, marks, (shape.tokens, shape.tokens), shape.tokens, jnp.dtype(jnp.bfloat16))
    is_plain = np.asarray(schedule(plan, marks, 1, shape.tokens, True).is_plain)
    copies, plain = shape.query_heads // blocks.heads, int(is_plain.sum())
    return Part(
        pattern="band_window_forward",
        runs={
            r"not\(is_plain": copies * (is_plain.size - plain),
            r"?\(is_plain": copies * plain,
            "is_unsafe": 0,  # logits that grow by 2**64 within a window
        },
        trips={"?^loop": blocks.block_q / chunk_size(blocks)},
        main_flops=_step_flops(shape, blocks.heads * blocks.block_q, 2),
    )


def _stream_part(shape: AttentionShape, blocks: BandBlocks) -> Part:
    """A stream's first block of keys is the diagonal one, if blocks are square, else it is added exactly."""
    copies, steps = shape.query_heads // blocks.heads, shape.tokens // blocks.block_q
    whole, edge = band_blocks(shape, {"block_q": blocks.block_q, "block_kv": blocks.block_kv})
    is_square = blocks.block_q == blocks.block_kv
    pieces = blocks.block_q / math.gcd(blocks.block_q, PIECE)
    return Part(
        pattern="band_stream_forward",
        runs={
            r"not\(is_whole": copies * (edge - steps),
            "is_whole": copies * whole,
            r"?when\(is_diagonal": copies * steps * is_square,
            "is_unsafe": copies * steps * (not is_square),
            r"step == 0": copies * steps * (not is_square),
            "step == plan.slots - 1": copies * steps,
        },
        trips={"?^loop .*unroll": pieces if pieces % 2 else pieces / 2, "?^loop": pieces},
    )


def band_blocks(shape: AttentionShape, blocks: Blocks) -> tuple[int, int]:
    """Blocks of one head's logits in which all is seen, and in which only some is."""
    whole = edge = 0
    for first in range(0, shape.tokens, blocks["block_q"]):
        last = first + blocks["block_q"] - 1
        for key in range(0, last + 1, blocks["block_kv"]):
            last_key = key + blocks["block_kv"] - 1
            if shape.window is not None and first - last_key >= shape.window:
                continue
            is_whole = last_key <= first and (shape.window is None or last - key < shape.window)
            whole, edge = whole + is_whole, edge + (not is_whole)
    return whole, edge


def backward(shape: AttentionShape, blocks: Blocks) -> Program:
    """The two kernels of the backward pass, or, with "fused", the one that makes all gradients; with segments."""
    fused = blocks.get("fused")
    plain = {"block_q": 128, "block_kv": 128, "heads": 1}
    sizes = {name: TileBlocks(**blocks.get(name, plain)) for name in ("dq", "dkv")}
    every = AttentionBlocks(BandBlocks(**plain), **sizes, fused=fused)

    def function(ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return band_backward(*arrays, Marks(query_segments=ids, key_segments=ids), Band(shape.window), every)

    queries, keys = shape.queries(), shape.keys()
    parts = tuple(_gradient_part(shape, name, sizes[name]) for name in sizes)
    return Program(
        function=function,
        arguments=(shape.ids(), queries, keys, keys, queries, shape.sums(), queries),
        parts=parts if fused is None else (_fused_part(shape, fused),),
        flops=shape.backward_flops,
        min_bytes=shape.backward_bytes,
    )


def _schedule(shape: AttentionShape, blocks: TileBlocks, owns_queries: bool) -> tuple[Plan, int, int, int]:
    """A kernel's plan, and by its own schedule, for one group of heads: steps, the clear ones, tiles of the others."""
    ids = jnp.zeros((1, shape.tokens), jnp.int32)
    marks = Marks(query_segments=ids, key_segments=ids)
    plan = band_tiles.plan_of(
        Band(shape.window), blocks, (shape.tokens, shape.tokens, shape.group), marks, owns_queries
    )
    table = np.asarray(scalars_of(plan, blocks, marks, 1, shape.tokens).table)
    steps = [band_tiles.step_at(plan, table, i, j) for i in range(plan.num_blocks) for j in range(plan.chunks)]
    clear = sum(bool(step.is_clear) for step in steps)
    tiles = sum(max(int(step.end) - int(step.first), 0) for step in steps if not step.is_clear)
    return plan, len(steps), clear, tiles


def _gradient_part(shape: AttentionShape, name: str, blocks: TileBlocks) -> Part:
    plan, steps, clear, tiles = _schedule(shape, blocks, name == "dq")
    copies = shape.query_heads // blocks.heads if name == "dq" else shape.key_heads * plan.groups
    ends = steps - clear if plan.steps == 1 else plan.num_blocks / plan.groups
    rows, products = (blocks.block_q, 3) if name == "dq" else (blocks.block_kv, 4)
    return Part(
        pattern=f"band_attention_{name}",
        runs={
            "any_seen": copies * tiles,
            "?loop 1": copies * tiles,
            "?fori_loop": copies * (steps - clear),
            "#.* products": copies * clear,
            "?number == 0": copies * plan.num_blocks,
            "?#": copies * ends,
        },
        main_flops=_step_flops(shape, blocks.heads * rows, products),
    )


def _fused_part(shape: AttentionShape, block: int) -> Part:
    blocks = TileBlocks(block, block, shape.group, tiles=-(-shape.tokens // block))
    _, steps, clear, tiles = _schedule(shape, blocks, True)
    assert shape.window is not None
    late = -((1 - shape.window) // block)  # steps after the last queries, which write the last keys
    copies = shape.key_heads
    return Part(
        pattern="band_attention_gradients",
        runs={
            "any_seen": copies * tiles,
            "?loop 1": copies * tiles,
            "#.* products": copies * clear,
            "?block == 0": copies,
            "?block < plan": copies * (steps - clear),
            "?fori_loop": copies * (steps - clear),
            "?#": copies * (steps - clear + late),
        },
        main_flops=_step_flops(shape, shape.group * block, 5),
    )
