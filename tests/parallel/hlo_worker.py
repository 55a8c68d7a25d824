"""Compiles small programs on eight virtual CPU devices and prints what `hlo` reads in them, as JSON."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gemma_jax.parallel import hlo

AXES = {"data": 2, "model": 4}


def report(step, *arguments) -> dict:
    """Collectives as [kind, bytes, executions, axes, group size], and operations."""
    _, program = hlo.compile_readable(jax.jit(step).lower(*arguments), "cpu")
    found = [
        (each.kind, each.nbytes, each.executions.count, each.axes, each.group_size)
        for each in hlo.collectives(program, AXES)
    ]
    operations = hlo.operations(program)
    return {"collectives": sorted(found), "by_type": operations.by_type, "uncounted": operations.uncounted}


def main() -> None:
    P = PartitionSpec
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Explicit,) * 2)
    jax.set_mesh(mesh)

    def layers(x, w_up, w_down):
        """Tensor parallel layers: one sum over `model` a layer."""

        def layer(x, weights):
            inner = jnp.einsum("BD,DF->BF", x, weights[0], out_sharding=P("data", "model"))
            return jnp.einsum("BF,FD->BD", inner, weights[1], out_sharding=P("data", None)), None

        return jax.lax.scan(layer, x, (w_up, w_down))[0]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data", "model"), out_specs=P("data", "model"))
    def exchanges(x):
        """One of each; two equal sums in a loop of three, the same again outside it."""
        gathered = jax.lax.all_gather(x, "model", axis=1, tiled=True)
        x = x + jax.lax.psum_scatter(gathered, "model", scatter_dimension=1, tiled=True)
        x = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        x = x + jax.lax.all_to_all(x, "model", 0, 0, tiled=True)
        turn = lambda _, x: jax.lax.psum(jax.lax.psum(x, "data") * x, "data") * x  # noqa: E731
        return jax.lax.psum(jax.lax.fori_loop(0, 3, turn, x), "data") * x

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    weights = array((6, 64, 128), None, None, "model"), array((6, 128, 64), None, "model", None)
    found = {
        "layers": report(layers, array((16, 64), "data", None), *weights),
        "exchanges": report(exchanges, array((16, 64), "data", "model")),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
