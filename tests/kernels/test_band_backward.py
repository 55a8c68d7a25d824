"""The gradients of `band_attention` against those of the plain reference, and what they cost on each TPU."""

import dataclasses
import functools
import inspect
import os

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
from gemma_kernels.tpu.band import Band, BandBlocks, Marks
from gemma_kernels.tpu.band_attention import band_attention
from gemma_kernels.tpu.band_backward import band_backward
from gemma_kernels.tpu.band_tiles import AttentionBlocks, TileBlocks
from tests.tpu import needs_libtpu

GENERATIONS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def blocks_of(block_q: int, block_kv: int, heads: int, tiles: int, fused: int | None = None) -> AttentionBlocks:
    """The same tiles for both gradients: each owns the larger size."""
    dq, dkv = TileBlocks(block_q, block_kv, heads, tiles), TileBlocks(block_kv, block_q, heads, tiles)
    return AttentionBlocks(BandBlocks(128, 128, heads), dq, dkv, fused)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is fixed of a compiled gradient; B is 2, K is 1."""

    band: Band
    blocks: AttentionBlocks
    num_heads: int = 2
    num_queries: int = 512
    num_keys: int = 512
    marks: str = ""  # some of: segments spans offsets
    width: int = 128
    multiple: int = 1  # of offsets

    @functools.cached_property
    def gradients(self):
        """(q, k, v, d_out, marks) -> gradients of the kernels, and of the reference."""

        def both(q, k, v, d_out, marks):
            names = [f"{one}_{kind}" for one in ("query", "key") for kind in ("segments", "spans")]
            ids = {name: getattr(marks, name) for name in names}
            offset = 0 if marks.offsets is None else marks.offsets
            sizes = self.num_queries, self.num_keys
            mask = reference.band_mask(*sizes, window=self.band.window, offset=offset, **ids)
            plain = functools.partial(reference.attention, mask=mask, softcap=self.band.softcap)
            (out, log_sum), pullback = jax.vjp(plain, q, k, v)
            kernels = functools.partial(band_backward, interpret=True)
            got = kernels(q, k, v, out, log_sum, d_out, marks, self.band, self.blocks)
            return got, pullback((d_out, jnp.zeros_like(log_sum)))

        return jax.jit(both)

    def arrays(self, seed: int, dtype: str = "float32") -> list[jax.Array]:
        rng = np.random.default_rng(seed)
        query, key = (2, self.num_heads, self.num_queries, self.width), (2, 1, self.num_keys, self.width)
        arrays = [rng.standard_normal(shape) for shape in (query, key, key, query)]
        arrays[0] *= self.width**-0.5
        return [jnp.asarray(x, dtype) for x in arrays]

    def marks_of(self, seed: int) -> Marks:
        """Random packing, image spans and chunk offsets, of the kinds the case has."""
        rng = np.random.default_rng(seed)
        queries, keys = (2, self.num_queries), (2, self.num_keys)
        longest = max(queries[1], keys[1])
        marks = {}
        if "segments" in self.marks:
            ids = np.sort(rng.integers(1, 5, (2, longest)), axis=1)
            if rng.integers(2):
                ids = rng.permutation(6)[ids]  # ids that do not rise along a row
            marks |= {"query_segments": ids[:, : queries[1]], "key_segments": ids[:, : keys[1]]}
        if "spans" in self.marks:
            ids = np.zeros((2, longest), np.int32)
            for row, begin in ((0, 60), (0, 300), (1, int(rng.integers(longest)))):
                ids[row, begin : begin + int(rng.integers(1, self.band.max_span + 1))] = begin + 1
            marks |= {"query_spans": ids[:, : queries[1]], "key_spans": ids[:, : keys[1]]}
        if "offsets" in self.marks:
            marks["offsets"] = self.multiple * rng.integers(-queries[1] // self.multiple, keys[1] // self.multiple, 2)
        return Marks(**{name: jnp.asarray(x, jnp.int32) for name, x in marks.items()}, multiple=self.multiple)


CASES = {
    "window in one step": Case(Band(256), blocks_of(128, 128, 2, 4), marks="segments"),
    "window that is no multiple of a tile": Case(Band(130), blocks_of(256, 128, 1, 4)),
    "window in several steps": Case(Band(300), blocks_of(128, 128, 2, 2), marks="segments"),
    "window tile by tile": Case(Band(130), blocks_of(128, 128, 2, 1), 2, 256, 256, marks="segments"),
    "window with softcap": Case(Band(128, softcap=2.0), blocks_of(256, 128, 2, 4)),
    "window with images": Case(Band(256, max_span=128), blocks_of(128, 128, 2, 4), marks="segments spans"),
    "chunk against a cache": Case(Band(200), blocks_of(128, 128, 2, 8), 2, 300, 700, marks="offsets"),
    "chunk behind a ring": Case(Band(200), blocks_of(256, 128, 2, 8), 2, 256, 512, "offsets segments", multiple=128),
    "chunk behind an odd ring": Case(Band(200), blocks_of(128, 128, 2, 3), 2, 300, 500, "offsets", multiple=64),
    "global": Case(Band(None, softcap=5.0), blocks_of(128, 128, 1, 2), 4, marks="segments"),
    "global with images": Case(Band(None, max_span=100), blocks_of(256, 128, 2, 2), marks="spans"),
    "global chunk": Case(Band(None), blocks_of(128, 128, 2, 2), 2, 300, 700, marks="offsets segments"),
    "fused": Case(Band(256), blocks_of(128, 128, 2, 4, 128), marks="segments"),
    "fused with images": Case(Band(200, softcap=3.0, max_span=160), blocks_of(128, 128, 2, 4, 128), marks="spans"),
    "fused with more keys than queries": Case(Band(130), blocks_of(128, 128, 2, 4, 128), 2, 300, 500),
    "fused where queries see only themselves": Case(Band(1), blocks_of(128, 128, 2, 4, 128), marks="segments"),
    "lengths that are no multiples": Case(Band(140), blocks_of(256, 128, 2, 3), 2, 333, 333, marks="segments"),
}


def assert_close(got, want, tolerance=1e-4):
    for name, x, y in zip(("dq", "dk", "dv"), got, want, strict=True):
        size = max(float(jnp.abs(y).max()), 1.0)
        np.testing.assert_allclose(x, y, atol=tolerance * size, rtol=0, err_msg=name)


QUICK = (
    "window in several steps",
    "chunk against a cache",
    "chunk behind a ring",
    "global",
    "fused",
    "fused with images",
)
PARAMS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", PARAMS)
def test_gradients_are_those_of_the_reference(name):
    case = CASES[name]

    @settings(max_examples=8, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed):
        assert_close(*case.gradients(*case.arrays(seed), case.marks_of(seed)))

    check()


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("name", ["window in one step", "global", "fused"])
def test_gradients_of_heads_of_either_width_are_those_of_the_reference(name, width):
    case = dataclasses.replace(CASES[name], num_queries=256, num_keys=256, width=width)
    assert_close(*case.gradients(*case.arrays(0), case.marks_of(0)))


def test_a_query_that_sees_nothing_has_no_gradient_and_gives_none():
    case = CASES["chunk against a cache"]
    marks = Marks(offsets=jnp.asarray([-300, 900], jnp.int32))  # all queries before, and all far behind, the keys
    got, _ = case.gradients(*case.arrays(0), marks)
    assert not any(bool(jnp.any(x)) for x in got)


@pytest.mark.slow
def test_gradients_in_bfloat16_are_near_those_in_float32():
    case = dataclasses.replace(CASES["window in one step"], marks="")
    got, _ = case.gradients(*case.arrays(0, "bfloat16"), Marks())
    _, want = case.gradients(*case.arrays(0), Marks())
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert_close([x.astype(jnp.float32) for x in got], want, tolerance=2e-2)


def test_attention_can_be_differentiated_within_jit_and_remat():
    case = CASES["window in one step"]
    q, k, v, d_out = case.arrays(1)
    marks = case.marks_of(1)

    def loss(q, k, v):
        attend = functools.partial(band_attention, marks=marks, band=case.band, blocks=case.blocks, interpret=True)
        return jnp.sum(jax.checkpoint(attend)(q, k, v) * d_out)

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert_close(got, case.gradients(q, k, v, d_out, marks)[1])


def test_no_array_of_a_long_context_is_larger_than_its_queries():
    case, length = CASES["global"], 131072
    query = jax.ShapeDtypeStruct((1, 2, length, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1, length, 128), jnp.bfloat16)
    sums, ids = jax.ShapeDtypeStruct((1, 2, length), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    blocks = blocks_of(256, 256, 2, 8)
    backward = functools.partial(inspect.unwrap(band_backward), band=case.band, blocks=blocks)
    marks = jax.eval_shape(lambda x: Marks(None, x, x), ids)
    program = jax.make_jaxpr(backward)(query, key, key, query, sums, query, marks)
    sizes = [x.aval.size for equation in program.eqns for x in equation.outvars if hasattr(x.aval, "size")]
    assert max(sizes) == 2 * length * 128


def test_shapes_that_do_not_fit_are_named():
    case = CASES["window in one step"]
    q, k, v, d_out = case.arrays(0)
    with pytest.raises(ValueError, match=r"log_sum have shapes .* pass what band_forward gave"):
        band_backward(q, k, v, q, q[..., 0, 0], d_out, Marks(), case.band, case.blocks)
    with pytest.raises(ValueError, match=r"blocks\.heads is 2"):
        band_backward(q[:, :1], k, v, q[:, :1], q[:, :1, :, 0], q[:, :1], Marks(), case.band, case.blocks)
    with pytest.raises(ValueError, match="tiles is 0"):
        TileBlocks(128, 128, 1, 0)


RACED = ("window in one step", "global with images", "fused")


@pytest.mark.parametrize("name", ["window tile by tile", *(pytest.param(x, marks=pytest.mark.slow) for x in RACED)])
def test_no_race_no_unset_memory_and_no_read_out_of_bounds(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    case = CASES[name]
    case = dataclasses.replace(case, num_queries=min(case.num_queries, 384), num_keys=min(case.num_keys, 384))
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    q, k, v, d_out = case.arrays(0)
    marks = case.marks_of(0)
    attend = functools.partial(band_attention, marks=marks, band=case.band, blocks=case.blocks, interpret=params)
    pullback = jax.vjp(attend, q, k, v)[1]
    assert_close(pullback(d_out), case.gradients(q, k, v, d_out, marks)[1])
    races = interpreter.races
    assert races is not None
    assert not races.races_found


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("window", "fused"), [(1024, 256), (1024, None), (None, None)])
def test_memory_of_the_gradients_grows_with_the_context_only_by_sums(generation, window, fused):
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    device = topologies.get_topology_desc(GENERATIONS[generation], "tpu").devices[0]
    where = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    length = 32768

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *dims), dtype, sharding=where)

    query, key, sums = shape(8, length, 256), shape(4, length, 256), shape(8, length, dtype=jnp.float32)
    ids = shape(length, dtype=jnp.int32)
    backward = functools.partial(band_backward, band=Band(window), blocks=blocks_of(256, 256, 2, 5, fused))
    marks = jax.tree.map(lambda x: shape(*x.shape[1:], dtype=x.dtype), jax.eval_shape(lambda x: Marks(None, x, x), ids))
    memory = jax.jit(backward).lower(query, key, key, query, sums, query, marks).compile().memory_analysis()
    # log_sum and delta of 8 heads are 2 MiB; [T, T] would be 1024 MiB a head.
    assert memory is not None
    assert memory.temp_size_in_bytes < 8 * 2**20
