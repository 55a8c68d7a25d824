"""What the planner predicts beside live arrays and compiled programs, on 8 virtual CPU devices; see test_arithmetic.py.

Argument: a JSON list of cases [model, mesh, purpose]; a line of JSON for each goes to standard output.
"""

import json
import sys
from typing import Any

import jax
from flax import nnx

from gemma_jax.nn import quantised
from gemma_jax.nn.cache import empty_cache
from gemma_jax.nn.decoder import Decoder
from gemma_jax.parallel import mesh as meshes
from gemma_jax.parallel.partition import Partition
from gemma_jax.parallel.rules import SERVE, TRAIN
from gemma_jax.planner import arithmetic, programs
from gemma_jax.planner.programs import Setting
from gemma_jax.train import lora, start
from tests.parallel.mesh_worker import MODELS

BATCH, CONTEXT = 8, 1024


def held_by_first(tree: Any) -> int:
    """Bytes that the first device holds of live arrays."""
    first = jax.devices()[0]
    shards = (shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first)
    return sum(shard.data.nbytes for shard in shards)


def live(setting: Setting, purpose: str) -> dict[str, int]:
    partition = setting.partition
    model = partition.placed(Decoder(setting.config, rngs=nnx.Rngs(0), dtype=setting.floats))
    model = quantised.quantised(model) if setting.dtype == quantised.DTYPE else model
    if purpose in programs.TRAINING:
        with partition.scope():
            trained = model if purpose == "train" else lora.attach(model, setting.rank)
            state = start(trained, programs.OPTIMIZER)
        found = {"weights": held_by_first(model), "optimizer": held_by_first(state.optimizer_state)}
        return found if purpose == "train" else {**found, "adapter": held_by_first(state.weights)}
    with partition.scope():
        cache = empty_cache(setting.config, BATCH, CONTEXT, setting.floats)
    return {"weights": held_by_first(model), "cache": held_by_first(cache)}


def run(name: str, mesh: str, task: str) -> dict[str, Any]:
    purpose, _, asked = task.partition(" ")
    rules = TRAIN if purpose in programs.TRAINING else SERVE
    dtype = asked or ("float32" if purpose == "train" else "bfloat16")
    partition = Partition(meshes.make(mesh), rules)
    setting = Setting(config=MODELS[name](), partition=partition, target="reference", batch=BATCH, context=CONTEXT,
                      dtype=dtype)  # fmt: skip
    sizes = dict(partition.mesh.shape)
    if purpose == "train":
        predicted = arithmetic.trained(setting.config, rules, sizes)
    elif purpose == "lora":
        predicted = arithmetic.adapted(setting.config, rules, sizes, dtype, setting.rank)
    else:
        predicted = arithmetic.served(setting.config, rules, sizes, BATCH, CONTEXT, dtype, "device")
    program = programs.PURPOSES[purpose](setting)[-1]
    sizes_found: Any = program.lower().compile().memory_analysis()
    return {
        "predicted": predicted,
        "live": live(setting, purpose),
        "abstract": {key: programs.device_bytes(program.held[key]) for key in predicted},
        "arguments": sum(map(programs.device_bytes, program.held.values())),
        "compiled": sizes_found.argument_size_in_bytes,
    }


def main() -> None:
    for case in json.loads(sys.argv[1]):
        sys.stdout.write(json.dumps(run(*case)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
