"""What AltUp costs a layer of Gemma 3n on TPUs: the bytes that it adds, with our kernels and by XLA alone.

python -m benchmarks.kernels.altup      # needs libtpu, no TPU

A layer is compiled by itself, with AltUp and without, for a prompt's chunk; the figures are differences of the bytes
that their instructions move in HBM. By XLA alone predictions are all made before the block and corrected behind it, by
products in the streams' dtype: of the forms that were tried it moves the least. Beside them stands the least that each
way moves: predict reads all streams, and writes all or only the active one; correct reads them and the block's output,
and writes them. Of an array that a fusion takes a part of all counts; arrays that XLA keeps in VMEM do not.
"""

import argparse
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import tables
from gemma_jax import configs
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn.decoder import Layer
from gemma_jax.nn.masks import Places
from gemma_jax.nn.sites import UNTAPPED
from gemma_jax.parallel import hlo, hlo_text
from gemma_jax.parallel.hlo_text import Computation, Instruction
from gemma_kernels import using
from tests import tpu

TOKENS = 4096
MOVES_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "async-done")
_ARRAY = re.compile(r"([a-z]\w*\[[\d,]*\])(\{[^}]*\})?")


class SeparateSteps(Layer):
    """A layer of which XLA makes all of AltUp."""

    def __call__(self, x: jax.Array, where: Places, *_: Any, piece: jax.Array | None = None, **__: Any) -> Any:
        """As `Layer`, without a cache and without taps."""
        active, mixture = self.altup.config.active_stream, self.altup.mixture(x)
        mixture = (mixture - jnp.eye(len(x), dtype=mixture.dtype)).astype(x.dtype)
        predicted = x + jnp.einsum("BTOJ,JBTD->OBTD", mixture, x)
        y, keys = self._block(predicted[active], where, None, None, UNTAPPED, None)
        shares = jnp.moveaxis(self.altup.shares(y), -1, 0)[..., None].astype(y.dtype)
        x = predicted + shares * (y - predicted[active])
        gated = x[active] * self.altup.correct_scale[...].astype(x.dtype)
        assert piece is not None
        return jnp.concatenate([x[:1], x[1:] + self.ple(gated, piece)]), keys


def layer_bytes(config: DecoderConfig, tokens: int, generation: str, kind: type[Layer] = Layer) -> int:
    """Bytes that a local layer's forward of some tokens moves through HBM."""
    where = tpu.sharding(generation)

    def shape(*sizes: int, dtype: Any = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    layer = nnx.eval_shape(lambda: kind(config, config.layers[0], rngs=nnx.Rngs(0), dtype=jnp.dtype("bfloat16")))
    layer = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), layer)
    assert config.per_layer_embedding is not None
    streams = () if config.altup is None else (config.altup.num_streams,)
    x, piece = shape(*streams, 1, tokens, config.width), shape(1, tokens, config.per_layer_embedding.width)

    def forward(layer: Layer, x: jax.Array, piece: jax.Array) -> jax.Array:
        return layer(x, Places.plain(1, tokens), piece=piece)[0]

    with using(generation):
        _, program = hlo.compile_readable(jax.jit(forward).lower(layer, x, piece), "tpu")
    entry = program.computations[program.entry]
    return sum(_moved(instruction, entry) for instruction in entry.values())


def _moved(instruction: Instruction, computation: Computation) -> int:
    """Bytes that an instruction reads from HBM and writes there; of a copy both sides, of a slice what is taken."""
    if instruction.opcode in MOVES_NOTHING:
        return 0
    sources = {_source(name, computation) for name in instruction.operands}
    operands = sum(_hbm(computation[name].result) for name in sources)
    if instruction.opcode == "copy-start":  # gives (target, source, context)
        return _hbm(instruction.result)
    if instruction.opcode == "async-start":  # gives ((sources), target, context)
        target = _ARRAY.findall(instruction.result)[-2]
        taken = hlo_text.nbytes(target[0])
        return taken * (bool(operands) + ("S(" not in target[1]))
    if instruction.opcode == "slice":
        return hlo_text.nbytes(instruction.result) * bool(operands) + _hbm(instruction.result)
    return operands + _hbm(instruction.result)


def _source(name: str, computation: Computation) -> str:
    """The instruction whose array one is, perhaps seen otherwise."""
    while computation[name].opcode == "bitcast":
        (name,) = computation[name].operands
    return name


def _hbm(type_text: str) -> int:
    """Bytes of the arrays of a type that lie in HBM: their layouts name no other memory space."""
    return sum(hlo_text.nbytes(array) for array, layout in _ARRAY.findall(type_text) if "S(" not in layout)


def main() -> None:
    """Compiles, and prints a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config = configs.get("gemma-3n-e2b").decoder
    assert config.altup is not None
    plain, rows = dataclasses.replace(config, altup=None), []
    streams, vector = config.altup.num_streams, TOKENS * config.width * 2
    ways = {
        "XLA alone": (SeparateSteps, 4 * streams + 1),
        "kernels": (Layer, 3 * streams + 2),
    }
    for generation in ("v5e", "v6e"):
        without = layer_bytes(plain, TOKENS, generation)
        for name, (kind, least) in ways.items():
            whole = layer_bytes(config, TOKENS, generation, kind)
            rows.append(
                [generation, name, *(f"{size / 1e6:,.0f}" for size in (whole, whole - without, least * vector))]
            )
    print(tables.table(["generation", "AltUp by", "layer, MB", "of it AltUp, MB", "least, MB"], rows))


if __name__ == "__main__":
    main()
