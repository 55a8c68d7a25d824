"""`decode_attention` for TPU against `reference`, in interpret mode; and compiled for TPUs that need not be there."""

import dataclasses
import functools
import os
from dataclasses import dataclass
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_kernels import reference
from gemma_kernels.tpu import decode_attention as decode
from gemma_kernels.tpu import decode_kernel
from gemma_kernels.tpu.decode_attention import DecodeBlocks
from tests import tpu

BLOCKS = DecodeBlocks(keys=128)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one call, and how it is cut up."""

    B: int = 2
    K: int = 1
    G: int = 2
    T: int = 1
    S: int = 256
    H: int = 128
    window: int | None = None
    softcap: float | None = None
    dtype: str = "float32"
    is_int8: bool = False
    blocks: DecodeBlocks = BLOCKS


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arrays of one call."""

    q: jax.Array
    cache: tuple[jax.Array, jax.Array]
    scales: tuple[jax.Array, jax.Array] | None
    positions: jax.Array
    lengths: jax.Array

    @property
    def plain(self) -> tuple[jax.Array, jax.Array]:
        """The cache without int8."""
        if self.scales is None:
            return self.cache
        k, v = (x * scale[..., None] for x, scale in zip(self.cache, self.scales, strict=True))
        return k, v


def inputs(case: Case, lengths: list[int], num_padding: int = 0, seed: int = 0) -> Inputs:
    """Random arrays of a case; of each row's queries the last `num_padding` are none."""
    rng = np.random.default_rng(seed)
    B, K, S, H, T = case.B, case.K, case.S, case.H, case.T
    q = jnp.asarray(rng.normal(size=(B, K * case.G, T, H)) * H**-0.5, case.dtype)
    k, v = (jnp.asarray(rng.normal(size=(B, K, S, H)), case.dtype) for _ in range(2))
    scales = None
    if case.is_int8:
        k, v = (jnp.asarray(rng.integers(-127, 128, (B, K, S, H)), jnp.int8) for _ in range(2))
        k_scale, v_scale = (jnp.asarray(rng.uniform(0.004, 0.012, (B, K, S)), jnp.float32) for _ in range(2))
        scales = (k_scale, v_scale)
    length, real = jnp.array(lengths, jnp.int32), T - num_padding
    positions = length[:, None] - real + jnp.arange(T)[None]
    positions = jnp.where(jnp.arange(T) < real, jnp.maximum(positions, -1), -1)
    return Inputs(q=q, cache=(k, v), scales=scales, positions=positions, lengths=length)


@functools.lru_cache(maxsize=1)
def kernel(case: Case, interpret: bool | pltpu.InterpretParams = True):
    """The kernel for a case, compiled once for many lengths."""

    def call(x: Inputs) -> jax.Array:
        options = {"window": case.window, "softcap": case.softcap, "blocks": case.blocks, "interpret": interpret}
        return decode.decode_attention(x.q, *x.cache, x.positions, x.lengths, scales=x.scales, **options)

    return jax.jit(call)


def run(case: Case, x: Inputs, interpret: bool | pltpu.InterpretParams = True) -> jax.Array:
    return kernel(case, interpret)(x)


def expected(case: Case, x: Inputs) -> tuple[jax.Array, jax.Array]:
    """The reference's output and sums, in float32."""
    mask = reference.decode_mask(x.positions, x.lengths, case.S, case.window)
    q, k, v = (a.astype(jnp.float32) for a in (x.q, *x.plain))
    return reference.attention(q, k, v, mask, softcap=case.softcap)


def unused_as(value: float, case: Case, x: Inputs) -> Inputs:
    """The same, with `value` in every slot that nothing was stored in."""
    is_unused = jnp.arange(case.S) >= x.lengths[:, None, None]
    if x.scales is None:
        k, v = (jnp.where(is_unused[..., None], value, a) for a in x.cache)
        return dataclasses.replace(x, cache=(k, v))
    k, v = (jnp.where(is_unused, value, a) for a in x.scales)
    return dataclasses.replace(x, scales=(k, v))


CASES = {
    "one token, global": Case(),
    "one token, ring": Case(window=256, S=256, H=256, K=1, G=4, blocks=DecodeBlocks(keys=256)),
    "ring with slack that chunks do not divide": Case(window=256, S=272, T=3, softcap=20.0),
    "speculation over a global cache": Case(T=4, S=512, G=1, blocks=DecodeBlocks(keys=256, buffers=3)),
    "window below the slots": Case(K=2, T=2, window=100, S=384),
    "cache of less than a chunk": Case(S=48, window=40, H=64),
    "sequences side by side": Case(B=3, K=1, window=128, blocks=DecodeBlocks(keys=128, rows=2)),
    "two parts and two groups": Case(K=2, S=640, blocks=DecodeBlocks(keys=128, parts=2, head_groups=2, buffers=4)),
    "int8": Case(K=2, is_int8=True, T=2, window=200, S=384, blocks=DecodeBlocks(keys=128, head_groups=2)),
}


@pytest.mark.parametrize("name", CASES)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_it_equals_the_reference_whatever_the_lengths_and_reads_no_slot_beyond_them(name: str, data: st.DataObject):
    case = CASES[name]
    full = st.sampled_from([0, 1, case.T, 127, 128, 129, case.S - 1, case.S, case.S + 1, 2 * case.S])
    lengths = data.draw(st.lists(full | st.integers(0, 3 * case.S), min_size=case.B, max_size=case.B))
    if case.window is None:
        lengths = [min(length, case.S) for length in lengths]
    x = inputs(case, lengths, num_padding=data.draw(st.integers(0, case.T - 1)))
    out = run(case, unused_as(jnp.nan, case, x))
    np.testing.assert_allclose(out, expected(case, x)[0], atol=3e-6, rtol=3e-6)


@pytest.mark.slow
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_it_equals_the_reference_over_shapes(data: st.DataObject):
    def draw(*options):
        return data.draw(st.sampled_from(options))

    K, is_int8, keys = draw(1, 2, 4), draw(False, True), draw(128, 256)
    blocks = DecodeBlocks(keys=keys, rows=draw(1, 2, 4), buffers=draw(2, 3), parts=draw(1, 2), head_groups=draw(1, K))
    case = Case(
        B=draw(1, 2, 5), K=K, G=draw(1, 2, 4, 8), T=draw(1, 2, 8), S=draw(128, 256, 384, 640), H=draw(128, 256),
        window=draw(None, 64, 128, 250), softcap=draw(None, 10.0), is_int8=is_int8, blocks=blocks,
    )  # fmt: skip
    lengths = data.draw(st.lists(st.integers(0, 2 * case.S), min_size=case.B, max_size=case.B))
    x = inputs(case, lengths)
    out = run(case, unused_as(jnp.nan, case, x))
    np.testing.assert_allclose(out, expected(case, x)[0], atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("window", [100, None])
def test_heads_of_either_width_equal_the_reference(window: int | None, width: int):
    case = Case(H=width, T=2, window=window)
    x = inputs(case, [130, 256])
    np.testing.assert_allclose(run(case, unused_as(jnp.nan, case, x)), expected(case, x)[0], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("is_int8", [False, True])
def test_bfloat16_is_as_near_as_its_rounding(is_int8: bool):
    case = Case(dtype="bfloat16", is_int8=is_int8, T=2)
    x = inputs(case, [200, 256])
    out = run(case, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected(case, x)[0], atol=0.02)


def test_an_idle_row_gives_zeros():
    case = Case(B=3, S=128)
    out = run(case, unused_as(jnp.nan, case, inputs(case, [0, 5, 0])))
    assert not out[0].any()
    assert not out[2].any()
    assert out[1].any()


@pytest.mark.parametrize("rows", [1, 2])
def test_chunks_beyond_a_length_are_not_copied(rows: int, monkeypatch: pytest.MonkeyPatch):
    """Counts the copies that the interpreted kernel starts."""
    copied = []
    make = pltpu.make_async_copy

    def counted(source, target, semaphore):
        copy = make(source, target, semaphore)

        class Copy:
            def start(self) -> None:
                jax.debug.callback(lambda: copied.append(1))
                copy.start()

            wait = copy.wait

        return Copy()

    monkeypatch.setattr(decode_kernel.pltpu, "make_async_copy", counted)
    case = Case(B=4, K=1, G=1, S=1024, blocks=DecodeBlocks(keys=128, rows=rows))
    lengths = [300, 0, 128, 129]
    jax.block_until_ready(run(case, inputs(case, lengths)))
    jax.effects_barrier()
    assert len(copied) == 2 * (3 + 0 + 1 + 2)


def test_the_kernel_has_no_race_and_reads_nothing_uninitialised():
    case = Case(B=3, K=1, G=1, S=256, T=2, window=250, blocks=DecodeBlocks(keys=128, rows=2))
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    x = inputs(case, [300, 100, 0])
    out = run(case, unused_as(jnp.nan, case, x), params)
    np.testing.assert_allclose(out, expected(case, x)[0], atol=3e-6)
    # jax 0.10 tells of races nowhere else; 0.12 raises.
    races = getattr(interpret_pallas_call, "races", None)
    assert races is None or not races.races_found


def test_caches_cut_along_their_slots_make_the_whole_by_their_sums():
    case = Case(T=2, S=512, blocks=DecodeBlocks(keys=128, parts=2))
    x = inputs(case, [400, 100])
    attend = functools.partial(decode.decode_attention_parts, window=None, blocks=case.blocks, interpret=True)
    attend, outs = jax.jit(attend), []
    for start in (0, 256):
        k, v = (a[:, :, start : start + 256] for a in x.cache)
        lengths = jnp.clip(x.lengths - start, 0, 256)
        outs.append(attend(x.q, k, v, jnp.maximum(x.positions - start, -1), lengths))
    out, sums = decode.merged_parts(*(jnp.stack(part) for part in zip(*outs, strict=True)))
    wanted, wanted_sums = expected(case, x)
    np.testing.assert_allclose(out, wanted, atol=3e-6)
    np.testing.assert_allclose(sums, wanted_sums, atol=3e-6)


def test_a_row_that_sees_nothing_has_the_sum_zero():
    case = Case(S=128)
    x = inputs(case, [0, 3])
    out, sums = decode.decode_attention_parts(
        x.q, *x.cache, x.positions, x.lengths, window=None, blocks=case.blocks, interpret=True
    )
    assert not out[0].any()
    np.testing.assert_array_equal(sums[0], np.float32(reference.MASKED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": jnp.zeros((2, 3), jnp.int32)}, "positions has shape"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, "lengths has shape"),
        ({"scales": (jnp.ones((2, 1, 256)),) * 2}, "scales with int8 only"),
        ({"cache": (jnp.zeros((2, 4, 256, 128)),) * 2}, "each must divide the former"),
        ({"cache": (jnp.zeros((2, 1, 260, 128), jnp.bfloat16),) * 2}, "allocate more slots"),
    ],
)
def test_what_it_does_not_serve_is_refused(change: dict, message: str):
    case = Case()
    x = dataclasses.replace(inputs(case, [1, 2]), **change)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(kernel(case), x)


def test_blocks_without_a_second_buffer_are_refused():
    with pytest.raises(ValueError, match="buffers must be 2"):
        DecodeBlocks(keys=128, buffers=1)


COMPILED = {
    "27B ring": Case(B=8, K=16, G=2, S=1024, window=1024, dtype="bfloat16", blocks=DecodeBlocks(keys=256)),
    "1B ring": Case(B=8, K=1, G=4, S=512, H=256, window=512, dtype="bfloat16", blocks=DecodeBlocks(keys=512, rows=4)),
    "4B global int8": Case(
        B=8, K=4, G=2, S=32768, H=256, dtype="bfloat16", is_int8=True, blocks=DecodeBlocks(keys=1024)
    ),
    "speculation in two parts": Case(
        B=2, K=4, G=2, T=8, S=131072, H=256, dtype="bfloat16", blocks=DecodeBlocks(keys=512, parts=2)
    ),
    "float32": Case(B=1, K=2, S=4096, H=256, blocks=DecodeBlocks(keys=512)),
}


@pytest.mark.slow
@tpu.needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_for_each_generation_without_a_copy_of_the_cache(name: str, topology: str):
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    case = COMPILED[name]
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    where = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    cache = array("int8" if case.is_int8 else case.dtype, case.B, case.K, case.S, case.H)
    scale = array("float32", case.B, case.K, case.S)
    shapes: Any = {
        "q": array(case.dtype, case.B, case.K * case.G, case.T, case.H),
        "cache": (cache, cache),
        "scales": (scale, scale) if case.is_int8 else None,
        "positions": array("int32", case.B, case.T),
        "lengths": array("int32", case.B),
    }
    compiled = kernel(case, False).lower(Inputs(**shapes)).compile()
    # The queries' and results' other layouts, and the parts' results; a cache is 8 MiB at least.
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**19
