"""The banded attention's forward on TPU: its schedule, its kernels interpreted, and compiled for absent TPUs."""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_kernels import reference
from gemma_kernels.tpu import band as bands
from gemma_kernels.tpu.band import Band, BandBlocks, Marks
from gemma_kernels.tpu.band_forward import band_forward, make_plan, schedule
from tests.tpu import needs_libtpu

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: rows are B = 2 unless said, offsets one per row, all multiples of `multiple`."""

    num_queries: int
    num_keys: int
    band: Band
    blocks: BandBlocks
    offsets: tuple[int, ...] | None = None
    has_segments: bool = False
    num_heads: int = 2
    num_key_heads: int = 1
    dtype: str = "float32"
    width: int = 128
    multiple: int = 1


def marks_of(case: Case, seed: int = 0, rows: int = 2) -> Marks:
    """Random segments that grow along a row, and disjoint spans of at most max_span columns."""
    draw = np.random.default_rng(seed)
    offsets = np.zeros(rows, int) if case.offsets is None else np.array(case.offsets)
    columns = np.clip(offsets[:, None] + np.arange(case.num_queries), 0, None)
    width = int(max(columns.max() + 1, case.num_keys))
    segments = np.sort(draw.integers(0, 3, (rows, width)), axis=1)
    spans = np.zeros((rows, width), int)
    for row in range(rows):
        start = int(draw.integers(0, 40))
        while case.band.max_span and start < width:
            size = int(draw.integers(1, case.band.max_span + 1))
            spans[row, start : start + size] = start + 1
            start += size + int(draw.integers(0, 80))
    row = np.arange(rows)[:, None]

    def pair(ids, has):
        ids = jnp.asarray(ids, jnp.int32)
        return (ids[row, columns], ids[:, : case.num_keys]) if has else (None, None)

    placed = None if case.offsets is None else jnp.asarray(case.offsets, jnp.int32)
    ids = *pair(segments, case.has_segments), *pair(spans, case.band.max_span > 0)
    return Marks(placed, *ids, multiple=case.multiple)


def mask_of(case: Case, marks: Marks) -> jax.Array:
    names = [f"{one}_{kind}" for one in ("query", "key") for kind in ("segments", "spans")]
    fields = {name: getattr(marks, name) for name in names}
    offset = 0 if marks.offsets is None else marks.offsets
    mask = reference.band_mask(case.num_queries, case.num_keys, window=case.band.window, offset=offset, **fields)
    return jnp.broadcast_to(mask, (2, *mask.shape[1:]))


def inputs_of(case: Case, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    draw = np.random.default_rng(seed)
    keys = 2, case.num_key_heads, case.num_keys, case.width
    q = draw.normal(size=(2, case.num_heads, case.num_queries, case.width)) * case.width**-0.5
    q, k, v = (jnp.asarray(x, case.dtype) for x in (q, draw.normal(size=keys), draw.normal(size=keys)))
    return q, k, v


def assert_equals_reference(case: Case, q, k, v, marks: Marks, interpret: Any = True) -> None:
    def both(q, k, v, marks):
        want = reference.attention(q, k, v, mask_of(case, marks), softcap=case.band.softcap)
        return want, band_forward(q, k, v, marks, case.band, case.blocks, interpret=interpret)

    want, got = (jax.jit(both) if interpret is True else both)(q, k, v, marks)
    rounding = 2e-2 if case.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.float32(got[0]), np.float32(want[0]), atol=rounding, rtol=rounding)
    np.testing.assert_allclose(got[1], want[1], atol=1e-4, rtol=1e-5)
    assert got[0].dtype == q.dtype
    assert got[1].dtype == jnp.float32


@st.composite
def cases(draw) -> Case:
    window = draw(st.sampled_from([None, 1, 100, 128, 300]))
    offsets, multiple = draw(
        st.sampled_from([(None, 1), ((0, 128), 1), ((-60, 333), 1), ((0, 128), 128), ((-64, 192), 64)])
    )
    num_keys = draw(st.sampled_from([128, 300, 512, 700]))
    num_key_heads = draw(st.sampled_from([1, 2]))
    heads = draw(st.sampled_from([1, 2]))
    return Case(
        num_keys if offsets is None else draw(st.sampled_from([96, 256, 400])),
        num_keys,
        Band(window, draw(st.sampled_from([None, 5.0])), draw(st.sampled_from([0, 0, 70, 200]))),
        BandBlocks(draw(st.sampled_from([128, 256, 384])), draw(st.sampled_from([128, 256])), heads),
        offsets,
        draw(st.booleans()),
        num_key_heads * heads * draw(st.sampled_from([1, 2])),
        num_key_heads,
        draw(st.sampled_from(["float32", "bfloat16"])),
        draw(st.sampled_from([128, 256])),
        multiple,
    )


@settings(max_examples=4, deadline=None, derandomize=True)
@given(cases())
def test_the_forward_equals_the_reference(case):
    assert_equals_reference(case, *inputs_of(case), marks_of(case))


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_the_forward_equals_the_reference_in_many_cases(case, seed):
    assert_equals_reference(case, *inputs_of(case, seed), marks_of(case, seed))


@pytest.mark.parametrize("block_q", [128, 256])
@pytest.mark.parametrize(
    ("window", "offset", "num_keys"), [(129, 128, 256), (256, 256, 512), (1, 0, 128), (100, -60, 128), (300, None, 256)]
)
def test_keys_that_are_fewer_than_a_step_may_read_are_enough(window, offset, num_keys, block_q):
    """A ring that is full and a prompt's next chunk behind it: no block of keys stands before or after these."""
    offsets, num_queries = (None, num_keys) if offset is None else ((offset, offset), num_keys - offset)
    case = Case(num_queries, num_keys, Band(window), BandBlocks(block_q, 128, 1), offsets=offsets)
    assert_equals_reference(case, *inputs_of(case), marks_of(case))


@pytest.mark.parametrize(("window", "offset"), [(256, 256), (200, 256), (300, 384)])
@pytest.mark.parametrize("multiple", [64, 128])
def test_offsets_of_a_known_multiple_equal_the_reference(window, offset, multiple):
    case = Case(
        256, offset + 256, Band(window), BandBlocks(256, 128, 2), (offset, offset - multiple), multiple=multiple
    )
    assert_equals_reference(case, *inputs_of(case), marks_of(case))


@pytest.mark.parametrize("window", [512, 1024])
@pytest.mark.parametrize("block_kv", [128, 256])
def test_a_chunk_behind_a_full_ring_needs_no_masks_but_the_bands(window, block_kv):
    """A model's next 512 tokens: their columns are those behind the ring's, which is known when traced."""
    blocks, num_keys, offsets = BandBlocks(512, block_kv, 2), window + 512, jnp.full((1,), window, jnp.int32)

    def is_plain(multiple: int) -> list[int]:
        marks = Marks(offsets, multiple=multiple)
        plan = make_plan(Band(window), blocks, marks, (512, num_keys), num_keys, jnp.dtype("bfloat16"))
        return schedule(plan, marks, 1, 512, is_window=True).is_plain.tolist()

    assert is_plain(window) == [1]
    assert is_plain(1) == [0]  # a block of keys more may be needed than there is


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("window", [100, None], ids=["window", "stream"])
def test_heads_of_either_width_equal_the_reference(window, width):
    case = Case(256, 256, Band(window, 5.0), BandBlocks(128, 128, 2), has_segments=True, width=width)
    assert_equals_reference(case, *inputs_of(case), marks_of(case))


@pytest.mark.parametrize("window", [256, None], ids=["window", "stream"])
@pytest.mark.parametrize("block_q", [256, 512])
def test_queries_of_several_chunks_of_the_widest_mxu_equal_the_reference(window, block_q):
    case = Case(1024, 1024, Band(window), BandBlocks(block_q, 256 if window else 512, 2))
    assert_equals_reference(case, *inputs_of(case), marks_of(case))


@pytest.mark.parametrize("window", [256, None], ids=["window", "stream"])
@pytest.mark.parametrize("column", [3, 140, 300])
def test_a_key_far_above_those_beside_the_diagonal_is_weighed_exactly(window, column):
    case = Case(512, 512, Band(window), BandBlocks(128, 128, 2))
    q, k, v = inputs_of(case)
    q = q.at[..., 0].set(1.0)
    k = k.at[:, :, column, 0].set(300.0)
    assert_equals_reference(case, q, k, v, marks_of(case))


@pytest.mark.parametrize("window", [128, None], ids=["window", "stream"])
def test_a_query_that_sees_nothing_gives_zero_and_the_logarithm_of_no_sum(window):
    case = Case(256, 256, Band(window), BandBlocks(128, 128, 2))
    q, k, v = inputs_of(case)
    segments = jnp.zeros((2, 256), jnp.int32)
    marks = Marks(None, segments.at[:, 100:].set(7), segments)
    out, log_sum = band_forward(q, k, v, marks, case.band, case.blocks, interpret=True)
    assert not np.any(out[:, :, 100:])
    assert np.all(log_sum[:, :, 100:] == np.float32(reference.MASKED))
    assert np.all(np.isfinite(out))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 2**16))
def test_the_schedule_covers_what_is_seen_and_leaves_unmasked_only_what_is_all_seen(case, seed):
    marks = marks_of(case, seed)
    some, every, reach, any_seen, all_seen = jax.jit(lambda marks: block_facts(case, marks))(marks)
    assert not np.any(some & ~any_seen)
    assert not np.any(all_seen & ~every)
    lengths = case.num_keys, case.num_queries
    for reached, axis, length, most in zip(
        reach, (2, 1), lengths, (bands.most_key_blocks, bands.most_query_blocks), strict=True
    ):
        assert not np.any(some & ~reached)
        assert reached.sum(axis).max() <= most(case.band, case.blocks, length, marks.step)


def block_facts(case: Case, marks: Marks) -> tuple:
    """Of each pair of blocks: is any key seen, is every key, is it reached, and what the schedule says of both."""
    block_q, block_kv = case.blocks.block_q, case.blocks.block_kv
    nq, nk = -(-case.num_queries // block_q), -(-case.num_keys // block_kv)
    padded = bands.padded_marks(marks, case.blocks)
    tables = (
        bands.extents(padded.query_segments, padded.query_spans, (2, nq * block_q), block_q),
        bands.extents(padded.key_segments, padded.key_spans, (2, nk * block_kv), block_kv),
    )
    query = bands.block_table(marks.columns(2), block_q, tables[0])
    key = bands.block_table(jnp.zeros(2, jnp.int32), block_kv, tables[1])
    pair = bands.Block(*(x[:, :, None] for x in query)), bands.Block(*(x[:, None] for x in key))
    seen = jnp.pad(mask_of(case, marks), [(0, 0), (0, 0), (0, nk * block_kv - case.num_keys)])
    more = [(0, 0), (0, nq * block_q - case.num_queries), (0, 0)]
    some, every = (jnp.pad(seen, more, constant_values=x).reshape(2, nq, block_q, nk, -1) for x in (False, True))
    sizes = case.band, case.blocks, marks.columns(2), case.num_queries, case.num_keys
    (low, high), index = bands.key_blocks(*sizes), jnp.arange(nk)
    keys = (index >= low[:, :, None]) & (index <= high[:, :, None])
    (low, high), index = bands.query_blocks(*sizes), jnp.arange(nq)[:, None]
    queries = (index >= low[:, None]) & (index <= high[:, None])
    facts = bands.any_seen(case.band, *pair), bands.all_seen(case.band, *pair, case.num_keys)
    return some.any((2, 4)), every.all((2, 4)), (keys, queries), *facts


@pytest.mark.parametrize("window", [1024, None])
def test_a_context_of_128k_costs_the_host_no_more_than_one_of_8k(window):
    def traced(length):
        marks: Any = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, length), (1, length)))
        marks = Marks(*marks)
        q, k = (jax.ShapeDtypeStruct((1, heads, length, 256), jnp.bfloat16) for heads in (4, 1))
        blocks = BandBlocks(512, 256, 4)
        call = jax.make_jaxpr(lambda q, k, v, marks: band_forward(q, k, v, marks, Band(window), blocks))
        return call(q, k, k, marks)

    short, long = traced(8192), traced(131072)
    assert len(str(long)) < 1.02 * len(str(short))
    assert sum(np.size(x) for x in long.consts) < 1024


@pytest.mark.parametrize("window", [1024, None])
def test_a_schedule_of_128k_is_built_in_a_tenth_of_a_second(window):
    band, blocks, marks = Band(window), BandBlocks(512, 256, 2), Marks()
    plan = make_plan(band, blocks, marks, (131072, 131072), 131072, jnp.dtype("bfloat16"))
    build = jax.jit(lambda: schedule(plan, marks, 1, 131072, window is not None))
    scalars = build()
    assert sum(x.size for x in scalars) < 16 * 131072 / 256
    fastest = min(timed(build) for _ in range(5))
    assert fastest < 0.1


def timed(build) -> float:
    start = time.perf_counter()
    jax.block_until_ready(build())
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": BandBlocks(100, 128, 1)}, "block_q is 100"),
        ({"q": jnp.zeros((2, 2, 256, 128), "float16")}, "q, k and v are float16, float32"),
        ({"blocks": BandBlocks(128, 0, 1)}, "block_kv is 0"),
        ({"blocks": BandBlocks(128, 128, 3)}, "blocks.heads is 3"),
        ({"band": Band(None, None, 8)}, "max_span is 8 and spans are not given"),
        ({"marks": Marks(query_segments=jnp.zeros((2, 256), jnp.int32))}, "segments are given of queries or of keys"),
        ({"marks": Marks(offsets=jnp.zeros(3, jnp.int32))}, "offsets have shape"),
        ({"marks": Marks(offsets=jnp.zeros(2, jnp.int32), multiple=0)}, "multiple is 0"),
        ({"k": jnp.zeros((2, 1, 256, 64)), "v": jnp.zeros((2, 1, 256, 64))}, "q, k and v have shapes"),
        ({"q": jnp.zeros((2, 2, 256, 64)), "k": jnp.zeros((2, 1, 256, 64)), "v": jnp.zeros((2, 1, 256, 64))}, "width"),
    ],
)
def test_what_does_not_fit_is_a_value_error_that_says_what(change, message):
    case = Case(256, 256, Band(None), BandBlocks(128, 128, 2))
    arguments = dict(zip("qkv", inputs_of(case), strict=True)) | {"marks": Marks(), "band": case.band}
    with pytest.raises(ValueError, match=message):
        band_forward(**(arguments | {"blocks": case.blocks} | change))


@pytest.mark.parametrize("fields", [{"window": 0}, {"window": 4, "softcap": 0.0}, {"window": 4, "max_span": -1}])
def test_a_band_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match="wanted"):
        Band(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("window", [128, None], ids=["window", "stream"])
def test_no_step_races_or_reads_what_nobody_wrote(window):
    case = Case(300, 300, Band(window, None, 60), BandBlocks(128, 128, 2), has_segments=True)
    careful = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    assert_equals_reference(case, *inputs_of(case), marks_of(case), careful)
    assert not races_found()


def races_found() -> bool:
    """What jax 0.10 notes of races; later ones raise where they find one."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = getattr(interpret_pallas_call, "races", None)
    return races is not None and races.races_found


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("window", [1024, None], ids=["window", "stream"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_forward_compiles_without_temporaries(topology, window, dtype, monkeypatch):
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    place = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((1, heads, 8192, 256), dtype, sharding=place) for heads in (8, 4))
    ids: Any = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=place)
    blocks = BandBlocks(256, 256, 2)
    call = jax.jit(lambda q, k, v, marks: band_forward(q, k, v, marks, Band(window, 30.0, 256), blocks))
    memory = call.lower(q, k, k, Marks(None, ids, ids, ids, ids)).compile().memory_analysis()
    assert memory is not None
    # The logarithms, padded to 8 of a register's rows, are the largest array there may be beside what goes in and out.
    assert memory.temp_size_in_bytes <= 8 * 8192 * 8 * 4
