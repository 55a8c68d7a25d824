"""One process of a run on virtual CPU devices; what the tests of gemma_jax.parallel start.

Arguments: a JSON object with `task`, the name of a function here, `index`, `count` and `port`, and what the task needs.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

LOST_AFTER_S = 5


def say(value: Any) -> None:
    print(f"said {json.dumps(value)}", flush=True)  # noqa: T201


def mesh_of_all(axes: dict[str, int] | None = None) -> jax.sharding.Mesh:
    axes = axes or {"data": jax.device_count()}
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def rule(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
    """The first axis of an array that the devices divide is cut into as many pieces."""
    axes: list[Any] = [None] * len(shape)
    for i, size in enumerate(shape):
        if size and size % mesh.size == 0:
            axes[i] = mesh.axis_names
            break
    return jax.sharding.NamedSharding(mesh, jax.P(*axes))


def rows(mesh: jax.sharding.Mesh, values: np.ndarray) -> jax.Array:
    """A global array of which each process gives its own rows."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
    return jax.make_array_from_process_local_data(sharding, values)


def together(task: dict[str, Any], processes) -> None:
    """A sum over all devices, rows that each process reads for itself, and a checkpoint that each reads a part of."""
    import gemma_jax as gj

    mesh = mesh_of_all()
    own = np.arange(4, dtype=np.float32) + 4 * processes.index
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(rows(mesh, own))
    gemma = gj.load(task["source"], dtype="float32", sharding=lambda dims, shape: rule(mesh, shape), progress=False)
    tokens = rows(mesh, np.arange(8, dtype=np.int32)[None] + processes.index * np.ones((2, 1), np.int32))
    logits = jax.jit(lambda model, tokens: model(tokens), out_shardings=rule(mesh, ()))(gemma.model, tokens)
    say({"sum": float(total), "devices": len(processes.local_devices), "of": jax.device_count()})
    if processes.index == 0:
        np.save(Path(task["logits"]), np.asarray(logits))


def spin(task: dict[str, Any], processes) -> None:
    """Collectives without end; process `victim` does `deed` in the midst of them."""
    mesh = mesh_of_all()
    x = rows(mesh, np.ones((2, 64), np.float32))
    step = jax.jit(lambda x: x * 0.5 + x.sum() * 1e-3, out_shardings=x.sharding)
    for i in range(100_000):
        x = jax.block_until_ready(step(x))
        if i == 20 and processes.index == task["victim"]:
            say(time.time())
            DEEDS[task["deed"]]()
        time.sleep(0.005)


def fail() -> None:
    raise LookupError("batch 20 is missing")


DEEDS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "fails": fail,
    "exits": lambda: sys.exit(3),
    "told": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def early(task: dict[str, Any], processes) -> None:
    """Each is done at another time."""
    time.sleep(processes.index * 0.5)
    say("done")


def train(task: dict[str, Any], processes) -> None:
    """A tiny model on random tokens, saved every second step; process `victim` does `deed` before step 6."""
    import optax
    from flax import nnx

    from gemma_jax import train as training
    from gemma_jax.nn.decoder import Decoder
    from gemma_jax.parallel.checkpoints import Checkpoints

    mesh, optimizer = mesh_of_all(), optax.adam(1e-3)

    def make() -> training.State:
        model = Decoder(config(), rngs=nnx.Rngs(0))
        return training.State(model, optimizer.init(model))

    places = jax.tree.map(lambda leaf: rule(mesh, leaf.shape), jax.eval_shape(make))
    step = training.make_step(optimizer)
    with Checkpoints(task["folder"], keep=2) as checkpoints:
        begin, state, row = 0, jax.jit(make, out_shardings=places)(), 0
        if checkpoints.newest is not None:
            begin, state, position = checkpoints.restore(state)
            row = position["row"]
        for i in range(begin, task["steps"]):
            time.sleep(task.get("pause_s", 0.0))
            if i == 6 and processes.index == task.get("victim"):
                DEEDS[task["deed"]]()
            own = np.split(batch_at(row), processes.count)[processes.index]
            state, metrics = step(state, training.Batch(rows(mesh, own)))
            row += ROWS
            say([i, float(metrics["loss"])])
            must_end = checkpoints.is_preempted(i)
            if must_end or (i + 1) % 2 == 0:
                checkpoints.save(i + 1, state, {"row": row})
            if must_end:
                return


ROWS = 24  # of a batch: divisible by the devices of 1, 3 and 4 processes


def batch_at(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 64, (ROWS, 12), np.int32)


def config():
    from gemma_jax.configs.config import AttentionConfig, AttentionKind, DecoderConfig, LayerSpec

    return DecoderConfig(
        name="tiny", vocab_size=64, width=24, context=64, period=1,
        attention=AttentionConfig(
            num_heads=2, num_kv_heads=1, head_dim=8, query_pre_attn_scalar=8.0,
            local=AttentionKind(window=4, rope_theta=10_000.0), global_=AttentionKind(window=None, rope_theta=1e6),
        ),
        layers=(LayerSpec(is_local=True, ffw_width=48),),
    )  # fmt: skip


def moved(task: dict[str, Any], processes) -> None:
    """Saves on the first of `axes` if nothing is there, and restores on all of them."""
    from gemma_jax.parallel.checkpoints import Checkpoints

    values = {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8), "b": np.arange(8, dtype=np.int32)}

    def places(axes: dict[str, int]) -> dict[str, jax.sharding.NamedSharding]:
        mesh = mesh_of_all(axes)
        names = (*axes, None)[:2]
        specs = {"w": jax.P(*names), "b": jax.P(names[1])}
        return {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in specs.items()}

    with Checkpoints(task["folder"]) as checkpoints:
        if checkpoints.newest is None:
            first = places(task["axes"][0])
            checkpoints.save(1, jax.jit(lambda: values, out_shardings=first)(), {})
            checkpoints.wait()
        for axes in task["axes"]:
            like = {
                name: jax.ShapeDtypeStruct(values[name].shape, values[name].dtype, sharding=place)
                for name, place in places(axes).items()
            }
            state = checkpoints.restore(like).state
            for name, value in state.items():
                assert value.sharding == like[name].sharding
                for shard in value.addressable_shards:
                    np.testing.assert_array_equal(shard.data, values[name][shard.index])
            say("same")


def refused(task: dict[str, Any], processes) -> None:
    """Says the errors for an array of one process alone, and for a folder that is each process's own."""
    from gemma_checkpoints import CheckpointError
    from gemma_jax.parallel.checkpoints import Checkpoints

    folder = Path(task["folder"])
    with Checkpoints(folder / "shared") as checkpoints:
        try:
            checkpoints.save(1, {"w": jax.numpy.ones(3)}, {})
        except TypeError as error:
            say(str(error))
    try:
        Checkpoints(folder / f"own-{processes.index}")
    except CheckpointError as error:
        say(str(error))


def main() -> None:
    task = json.loads(sys.argv[1])
    from gemma_jax.parallel import distributed

    with distributed.start(
        "manual", coordinator=f"127.0.0.1:{task['port']}", processes=task["count"], process=task["index"],
        timeout_s=task.get("timeout_s", 60), lost_after_s=LOST_AFTER_S,
    ) as processes:  # fmt: skip
        globals()[task["task"]](task, processes)


if __name__ == "__main__":
    main()
