"""Programs compiled for TPUs that need not be there, by libtpu alone."""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.generate import engine, sampling
from gemma_jax.nn import host
from gemma_jax.nn.cache import empty_cache
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.paths import parameters

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def needs_libtpu(test: Any) -> Any:
    """Marks a test as one of `make test-aot`, which has libtpu."""
    skip = pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, the compiler for TPU: tpu extra, make test-aot")
    return pytest.mark.aot(skip(test))


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def sharding(generation: str = "v5e") -> NamedSharding:
    """One chip, or half of a tpu7x."""
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    device = topologies.get_topology_desc(TOPOLOGIES[generation], "tpu").devices[0]
    return NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())


def abstract_model(config: DecoderConfig, where: NamedSharding, *, is_table_on_host: bool = False) -> Decoder:
    """A decoder in bfloat16 of which only shapes and places are known."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    for path, param in parameters(model).items():
        place = host.host_sharding(where) if is_table_on_host and path == "embedder/ple" else where
        value = param.get_raw_value()
        param.set_raw_value(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place))
    return model


def decode_program(model: Decoder, where: NamedSharding) -> jax.stages.Compiled:
    """The loop that decodes one row."""
    return lowered_decoding(model, where).compile()


def lowered_decoding(model: Decoder, where: NamedSharding) -> jax.stages.Lowered:
    """The loop that decodes one row, not yet compiled."""
    rows = [sampling.sampling_params(temperature=0.0)]
    plan = sampling.plan(rows)

    def inputs():
        idle = jnp.zeros((1,), jnp.int32)
        state = engine.State(empty_cache(model.config, 1, 1024, "bfloat16"), idle, idle, idle > 0, None)
        limits = engine.Limits(idle, jnp.zeros((1, engine.MAX_STOP_IDS), jnp.int32))
        return state, sampling.sampler(rows, model.config.vocab_size), limits, jnp.int32(0)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(inputs))
    return engine.decode_chunk.lower(model, *shapes, plan, 32)
