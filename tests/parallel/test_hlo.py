"""Collectives and operations read from HLO text: programs compiled here, and texts with known answers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gemma_jax.parallel import hardware, hlo, hlo_text
from tests import tpu
from tests.parallel import runs

MESH = {"data": 2, "model": 4}
SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""


def program(body: str, before: str = "") -> hlo_text.Program:
    """A program whose entry has these lines."""
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return hlo_text.parse(
        f"HloModule m, num_partitions=8\n{SUM}{before}\nENTRY %main (p: f32[8,4]) -> f32[] {{\n{lines}\n}}\n"
    )


def only(body: str, before: str = "") -> hlo.Collective:
    (found,) = hlo.collectives(program(body, before), MESH)
    return found


def loop(start: str, condition: str, step: str, attributes: str = "") -> tuple[str, str]:
    """The entry's lines and the computations of a loop with one all-reduce a turn; it carries (counter, x, limit)."""
    carried = "(s32[], f32[4], s32[])"
    before = f"""
%body (c: {carried}) -> {carried} {{
  %c = {carried} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[4]{{0}} get-tuple-element(%c), index=1
  %limit = s32[] get-tuple-element(%c), index=2
  {step}
  %y = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%sum
  ROOT %t = {carried} tuple(%next, %y, %limit)
}}

%condition (c.1: {carried}) -> pred[] {{
  %c.1 = {carried} parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %limit.1 = s32[] get-tuple-element(%c.1), index=2
  {condition}
}}
"""
    body = f"""
        %start = s32[] {start}
        %seven = s32[] constant(7)
        %x.0 = f32[4]{{0}} parameter(1)
        %init = {carried} tuple(%start, %x.0, %seven)
        ROOT %w = {carried} while(%init), condition=%condition, body=%body{attributes}"""
    return body, before


LESS = "%n = s32[] constant(10)\n  ROOT %lt = pred[] compare(%i.1, %n), direction=LT"
ONE = "%one = s32[] constant(1)\n  %next = s32[] add(%i, %one)"


@pytest.fixture(scope="module")
def compiled() -> dict:
    """What the worker reads in programs for eight virtual devices."""
    (found,) = runs.lines("parallel/hlo_worker.py")
    return found


def test_tensor_parallel_layers_have_one_all_reduce_each(compiled):
    assert compiled["layers"]["collectives"] == [["all-reduce", 8 * 64 * 4, 6, ["model"], 4]]
    assert compiled["layers"]["by_type"] == {"f32": 6 * 2 * (2 * 8 * 64 * 32)}
    assert compiled["layers"]["uncounted"] == {}


def test_every_kind_of_exchange_is_counted_and_equal_ones_are_not_merged(compiled):
    assert compiled["exchanges"]["collectives"] == [
        ["all-gather", 2048, 1, ["model"], 4],
        ["all-reduce", 512, 1, ["data"], 2],
        ["all-reduce", 512, 3, ["data"], 2],
        ["all-reduce", 512, 3, ["data"], 2],
        ["all-to-all", 512, 1, ["model"], 4],
        ["collective-permute", 512, 1, ["data"], 2],
        ["reduce-scatter", 2048, 1, ["model"], 4],
    ]


@pytest.mark.parametrize(
    ("start", "condition", "step", "turns"),
    [
        ("constant(0)", LESS, ONE, 10),
        ("constant(4)", LESS, ONE, 6),
        ("constant(12)", LESS, ONE, 0),
        ("constant(1)", LESS.replace("LT", "LE"), ONE.replace("constant(1)", "constant(3)"), 4),
        ("constant(1)", LESS.replace("LT", "NE"), ONE.replace("constant(1)", "constant(3)"), 3),
        ("constant(20)", LESS.replace("LT", "GT"), ONE.replace("constant(1)", "constant(-4)"), 3),
        ("constant(20)", LESS.replace("LT", "GE"), ONE.replace("add", "subtract"), 11),
        ("constant(0)", LESS.replace("compare(%i.1, %n), direction=LT", "compare(%n, %i.1), direction=GT"), ONE, 10),
        ("constant(0)", "ROOT %lt = pred[] compare(%i.1, %limit.1), direction=LT", ONE, 7),
        ("parameter(2)", LESS, ONE, None),
        ("constant(0)", LESS, "%next = s32[] multiply(%i, %i)", None),
        ("constant(0)", LESS.replace("LT", "GE"), ONE, 0),
        ("constant(0)", LESS, ONE.replace("constant(1)", "constant(0)"), None),
    ],
)
def test_turns_of_a_loop_follow_from_start_step_and_limit(start, condition, step, turns):
    found = only(*loop(start, condition, step))
    assert found.executions == hlo_text.Executions(turns)
    assert found.total_bytes == (None if turns is None else 16 * turns)


def test_turns_that_xla_noted_are_taken():
    noted = ', backend_config={"known_trip_count":{"n":"48"},"known_init_step":{"init":"0","step":"1"}}'
    assert only(*loop("parameter(2)", LESS, ONE, noted)).executions.count == 48


def test_a_loop_in_a_loop_multiplies():
    inner, before = loop("constant(0)", LESS, ONE)
    before = before.replace("%body", "%inner").replace("%condition", "%until")
    inner = inner.replace("%body", "%inner").replace("%condition", "%until").replace("ROOT %w", "%w")
    outer, around = loop("constant(0)", LESS.replace("10", "5"), ONE)
    call = inner.replace("parameter(1)", "copy(%x)") + "\n  %z = f32[4]{0} get-tuple-element(%w), index=1\n  %y = "
    around = around.replace("  %y = ", call)
    found = hlo.collectives(program(outer, before + around), MESH)
    assert sorted(each.executions.count for each in found) == [5, 50]


def test_a_branch_counts_at_most_once():
    before = """
%yes (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} all-reduce(%x), replica_groups={}, to_apply=%sum
}

%no (x.1: f32[4]) -> f32[4] {
  ROOT %x.1 = f32[4]{0} parameter(0)
}
"""
    body = """
        %which = s32[] parameter(0)
        %x.2 = f32[4]{0} parameter(1)
        ROOT %c = f32[4]{0} conditional(%which, %x.2, %x.2), branch_computations={%yes, %no}"""
    found = only(body, before)
    assert found.executions == hlo_text.Executions(1, is_at_most=True)
    assert found.axes == ("data", "model")


def test_an_asynchronous_gather_of_two_arrays_counts_once_with_its_results():
    types = "((bf16[8,4]{1,0:T(8,128)(2,1)}, f32[2]{0}), (bf16[32,4]{1,0}, /*index=1*/f32[8]{0}))"
    body = f"""
        %p = bf16[8,4]{{1,0}} parameter(0)
        %q = f32[2]{{0}} parameter(1)
        %s = {types} all-gather-start(%p, %q), replica_groups=[2,4]<=[8], dimensions={{0}}
        ROOT %d = (bf16[32,4]{{1,0}}, f32[8]{{0}}) all-gather-done(%s)"""
    found = only(body)
    assert (found.kind, found.nbytes, found.axes, found.group_size) == ("all-gather", 32 * 4 * 2 + 8 * 4, ("model",), 4)


def test_an_asynchronous_wrapper_counts_once():
    before = """
%wrapped (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[2]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
}
"""
    body = """
        %p = f32[8]{0} parameter(0)
        %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped
        ROOT %d = f32[2]{0} async-done(%s), calls=%wrapped"""
    found = only(body, before)
    assert (found.kind, found.nbytes, found.executions.count) == ("reduce-scatter", 32, 1)


def test_a_collective_given_to_a_sparse_core_counts_once():
    before = """
%given (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%sum
}, execution_thread="sparsecore"

%wrapped (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %y.1 = f32[8]{0} custom-call(%x.1), custom_call_target="TODO", called_computations={%given}
}, execution_thread="sparsecore"
"""
    body = """
        %p = f32[8]{0} parameter(0)
        %s = ((), f32[8]{0}, u32[]) async-start(), calls=%wrapped, async_execution_thread="sparsecore"
        %u = ((f32[8]{0}), f32[8]{0}, u32[]) async-update(%s, %p)
        ROOT %d = f32[8]{0} async-done(%u)"""
    found = only(body, before)
    assert (found.kind, found.nbytes, found.executions.count, found.axes) == ("all-reduce", 32, 1, ("model",))
    assert hlo.operations(program(body, before)).uncounted == {}


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    before = """
%all-reduce-scatter.3 (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %y = f32[2]{0} dynamic-slice(%r, %zero), dynamic_slice_sizes={2}
}
"""
    body = """
        %p = f32[8]{0} parameter(0)
        ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3"""
    assert only(body, before).kind == "reduce-scatter"


def test_repeated_collectives_of_asynchronous_fusion_are_refused():
    before = """
%async_collective_fusion.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%sum
}
"""
    body = """
        %p = f32[8]{0} parameter(0)
        ROOT %f = f32[8]{0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.1"""
    with pytest.raises(ValueError, match="xla_tpu_enable_async_collective_fusion"):
        only(body, before)


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={}", ("data", "model"), 8),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("model",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("model",), 2),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("replica_groups=[2,4]<=[8]", ("model",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=mesh['data'=2,'model'=4] {'model'}", ("model",), 4),
        ("replica_groups=mesh['data'=2,'model'=4] {'data'}", ("data",), 2),
        ("replica_groups=mesh['data'=2,'model'=4] {'data','model'}", ("data", "model"), 8),
        ("replica_groups=mesh['data'=2,'model'=4] {'model':(2)2}", ("model",), 2),
        ("replica_groups=mesh['x'=8], device_ids=([7]) {'x'}", None, 8),
        ("no_groups=true", None, 8),
    ],
)
def test_axes_follow_from_the_groups(groups, axes, size):
    body = f"%p = f32[4]{{0}} parameter(0)\nROOT %r = f32[4]{{0}} all-reduce(%p), {groups}, to_apply=%sum"
    found = only(body)
    assert (found.axes, found.group_size) == (axes, size)


def test_axes_of_a_permute_follow_from_its_pairs():
    pairs = "{{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}"
    body = f"""
        %p = bf16[4]{{0}} parameter(0)
        ROOT %r = bf16[4]{{0}} collective-permute(%p), source_target_pairs={pairs}, metadata={{op_name="halo"}}"""
    assert only(body) == hlo.Collective("collective-permute", 8, hlo_text.Executions(1), ("model",), 4, "halo")


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"8 devices, the mesh .* has 4"):
        hlo.collectives(program("ROOT %p = f32[4]{0} parameter(0)"), {"model": 4})


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_text.parse("HloModule m\n")


class Unprintable:
    """A program that neither the compiler nor jaxlib prints."""

    def compile(self, compiler_options):
        return self

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure in hlo_instruction.cc")


def test_a_program_that_nothing_prints_is_an_error_of_its_own():
    with pytest.raises(hlo.UnreadableProgram, match=r"RET_CHECK.*0\.12"):
        hlo.compile_readable(Unprintable(), "tpu")


def test_operations_of_convolutions_leave_out_padding():
    window = "{size=16 stride=15 pad=0_0 lhs_dilate=16}"  # a product of 16 matrices each
    body = f"""
        %x = bf16[16,8,64]{{2,1,0}} parameter(0)
        %w = bf16[16,64,32]{{2,1,0}} parameter(1)
        ROOT %y = bf16[16,8,32]{{2,1,0}} convolution(%x, %w), window={window}, dim_labels=0bf_0io->0bf"""
    assert hlo.operations(program(body)).by_type == {"bf16": 16 * 2 * 8 * 64 * 32}


def test_operations_of_kernels_are_as_they_say_or_reported_missing():
    estimate = '{"custom_call_config":{"cost_estimate":{"flops":"4096","transcendentals":"0"}}}'
    target = 'custom_call_target="tpu_custom_call"'
    body = f"""
        %x = s8[16]{{0}} parameter(0)
        %y = bf16[16]{{0}} parameter(1)
        %a = f32[4]{{0}} custom-call(%x, %y), {target}, backend_config={estimate}
        %b = f32[4]{{0}} custom-call(%x), {target}
        ROOT %c = f32[4]{{0}} custom-call(%b), custom_call_target="Sharding" """
    found = hlo.operations(program(body))
    assert (found.by_type, found.uncounted) == ({"bf16": 4096}, {"tpu_custom_call": 1})


def test_operations_in_a_loop_of_unknown_length_are_reported_missing():
    body, before = loop("parameter(2)", LESS, ONE)
    dot = "  %d = f32[] dot(%x, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}\n  %y ="
    found = hlo.operations(program(body, before.replace("  %y =", dot)))
    assert (found.by_type, found.uncounted) == ({}, {"loop": 1})
    body, before = loop("constant(0)", LESS, ONE)
    assert hlo.operations(program(body, before.replace("  %y =", dot))).by_type == {"f32": 10 * 8}


def test_bytes_of_narrow_types_are_those_of_their_bits():
    assert (
        hlo_text.nbytes("(s4[3]{0}, pred[2]{0}, token[], f8e4m3fn[5], bf16[2,<=3]{1,0:T(8,128)(2,1)S(1)})")
        == 2 + 2 + 5 + 12
    )
    with pytest.raises(ValueError, match="element type 'mystery'"):
        hlo_text.nbytes("mystery[4]")


@tpu.needs_libtpu
@pytest.mark.parametrize("name", ["v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"])
def test_a_program_for_tpus_is_read(name):
    devices = hardware.devices(hardware.topology(name))
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=devices, axis_types=(AxisType.Explicit,) * 2)
    P = PartitionSpec

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def layer(x, weights):
        inner = jnp.einsum("BD,DF->BF", x, weights[0], out_sharding=P("data", "model"))
        return jnp.einsum("BF,FD->BD", inner, weights[1], out_sharding=P("data", None)), None

    weights = array((6, 512, 2048), None, None, "model"), array((6, 2048, 512), None, "model", None)
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(array((16, 512), "data", None), weights)
    _, program = hlo.compile_readable(lowered, "tpu")
    (found,) = hlo.collectives(program, dict(mesh.shape))
    assert (found.kind, found.nbytes, found.executions.count, found.axes) == ("all-reduce", 8 * 512 * 2, 6, ("model",))
    assert hlo.operations(program).by_type == {"bf16": 6 * 2 * (2 * 8 * 512 * 512)}
