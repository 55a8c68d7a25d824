"""One process of a run on virtual CPU devices; what tests/test_sharding.py starts.

Arguments: a JSON object with `index`, `count` and `port` of the processes, `source`, `mesh` ({axis: size}), and
`save` (a folder), `values` (an .npz file for the weights, gathered) or `slice` (an .npz file for logits of a
slice, made with and without a copy). Writes the bytes
that it read of the source to standard output.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

RULES = {"V": "model", "N": "model", "K": "model", "F": "model", "D": "data"}


def main() -> None:
    task = json.loads(sys.argv[1])
    if task["count"] > 1:
        jax.distributed.initialize(f"127.0.0.1:{task['port']}", task["count"], task["index"])
    import gemma_jax as gj
    from gemma_checkpoints.orbax import OrbaxReader
    from gemma_checkpoints.reader import Reader
    from gemma_jax import loading
    from gemma_jax.nn.layers import PLAIN_LAYOUT
    from gemma_jax.nn.paths import weights

    read = []
    real_piece, real_pieces = Reader._piece, OrbaxReader._pieces

    def piece(self, info, start, stop):
        read.append((stop - start) * info.encoding.size)
        return real_piece(self, info, start, stop)

    def pieces(self, name, chunks):
        for number, values in real_pieces(self, name, chunks):
            read.append(values.nbytes)
            yield number, values

    Reader._piece, OrbaxReader._pieces = piece, pieces
    loading.CPU_LAYOUT = PLAIN_LAYOUT  # as on accelerators
    sizes = task["mesh"]
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)

    def sharding(dims: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        axes, used = [], set()
        for letter, size in zip(dims.split(), shape, strict=True):
            axis = RULES.get(letter)
            fits = axis in sizes and axis not in used and size % sizes[axis] == 0
            axes.append(axis if fits else None)
            used.add(axis)
        return jax.sharding.NamedSharding(mesh, jax.P(*axes))

    gemma = gj.load(task["source"], dtype="float32", sharding=sharding, progress=False)
    sys.stdout.write(f"{sum(read)}\n")
    for place in weights(gemma.model).values():
        value = place.param.get_raw_value()
        assert value.sharding.mesh.shape == sizes
    if task.get("save"):
        gemma.save(task["save"], format="orbax")
    if task.get("values"):
        arrays = {path: place.view(np.asarray(place.param[...])) for path, place in weights(gemma.model).items()}
        np.savez(Path(task["values"]), **arrays)
    if task.get("slice"):
        np.savez(Path(task["slice"]), **sliced_logits(gemma, sizes))


def sliced_logits(gemma, sizes) -> dict[str, np.ndarray]:
    """What is cut stays sharded as the whole is: along D and F."""
    from gemma_jax import matformer

    found = {}
    for name, copy in (("own", True), ("shared", False)):
        small = matformer.slice(gemma, ffw=24, skip=(5, 6), copy=copy)
        found[name] = np.asarray(small.logits(np.arange(16).reshape(2, 8)))
        if copy:
            down = small.model.layers[0].mlp.w_down[...]
            assert down.sharding.shard_shape(down.shape) == (24 // sizes["model"], 32 // sizes["data"])
    return found


if __name__ == "__main__":
    main()
