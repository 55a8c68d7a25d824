"""Meshes and rules that cannot be are refused, or said, by name: nothing lies whole on all devices in silence."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import gemma_jax as gj
from gemma_jax.nn.logical import LogicalAxisError, ReplicationWarning
from gemma_jax.parallel import mesh as meshes
from gemma_jax.parallel.mesh import MeshError
from gemma_jax.parallel.partition import Partition
from gemma_jax.parallel.rules import SERVE

SIZES = {"data": 2, "seq": 2, "model": 2}


def mesh_of(axes: dict[str, int], kind: AxisType = AxisType.Auto) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("", "mesh is ''; wanted sizes of some of replica, data"),
        ({}, "mesh is {}; wanted sizes"),
        (8, "mesh is 8; wanted sizes"),
        ("tensor=1", "mesh has 'tensor=1'"),
        ("data=1,data=1", "each axis once"),
        ("model=0", "mesh has 'model=0'"),
        ({"model": 1.0}, "mesh has model=1.0; wanted whole numbers from 1 on"),
        ({"model": "1"}, "mesh has model='1'"),
        ({"model": True}, "mesh has model=True"),
        ("data=512,model=2", "mesh data=512 x model=2 has 1024 devices, but there are"),
    ],
)
def test_sizes_that_make_no_mesh_are_named(sizes, words):
    with pytest.raises(MeshError, match=words):
        meshes.make(sizes)


def test_an_axis_that_no_rule_names_is_refused():
    Partition(mesh_of({"data": 2, "model": 4, "other": 1}))  # pyright: ignore[reportArgumentType]
    with pytest.raises(MeshError, match="mesh has tensor=4, an axis that none of the rules 'serve' names"):
        Partition(mesh_of({"data": 2, "tensor": 4}))  # pyright: ignore[reportArgumentType]


def test_a_mesh_of_explicit_axes_is_refused():
    with pytest.raises(MeshError, match="axes of kind Explicit, Explicit; wanted Auto"):
        Partition(mesh_of({"data": 2, "model": 4}, AxisType.Explicit))  # pyright: ignore[reportArgumentType]


def test_a_weight_that_no_axis_divides_is_an_error_unless_it_may_lie_whole():
    partition = Partition(mesh_of({"model": 4}))  # pyright: ignore[reportArgumentType]
    with pytest.raises(LogicalAxisError, match="q_heads is 6, which model=4 of the mesh does not divide"):
        partition.weight("D N H", (32, 6, 8))
    assert partition.weight("D K H", (32, 2, 8)).spec == PartitionSpec(None, None, None)
    assert partition.weight("D K H", (32, 8, 8)).spec == PartitionSpec(None, "model", None)
    with pytest.raises(LogicalAxisError, match="several in one"):
        partition.weight("D M H", (32, 12, 8))


def test_an_activation_that_no_axis_divides_lies_whole_and_says_so():
    with pytest.warns(ReplicationWarning, match="batch is 3, which data=2 of the mesh does not divide"):
        spec = SERVE.spec(("batch", "act_seq", "act_ffw"), (3, 8, 64), SIZES)
    assert spec == PartitionSpec(None, ("seq",), ("model",))
    one = SERVE.spec(("batch", "act_seq", "act_ffw"), (4, 1, 64), SIZES)  # of one token there are no parts
    assert one == PartitionSpec(("data",), None, ("model", "seq"))
    with pytest.raises(LogicalAxisError, match="the rules 'serve' have no 'batches'"):
        SERVE.axes_of("batches")


def test_rules_that_are_no_table_are_named(model_folder):
    for rules in ("serve", "train"):
        assert gj.load(model_folder, mesh="model=1", rules=rules, progress=False).partition.rules.name == rules
    with pytest.raises(ValueError, match="rules are 'training'; wanted 'serve' or 'train', or a table"):
        gj.load(model_folder, mesh="model=1", rules="training", progress=False)


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        ({"vocab": ("modle",)}, MeshError, "put 'vocab' on 'modle'; wanted some of"),
        ({"kv_win": ("seq",)}, LogicalAxisError, "put 'kv_win' on seq=2, but local layers' rings lie whole"),
    ],
)
def test_rules_that_would_do_something_else_in_silence_are_refused(axes, error, words):
    rules = dataclasses.replace(SERVE, axes=tuple((dict(SERVE.axes) | axes).items()))
    with pytest.raises(error, match=words):
        Partition(mesh_of(SIZES), rules)  # pyright: ignore[reportArgumentType]
