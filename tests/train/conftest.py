"""Models that train quickly."""

import dataclasses

import pytest
from flax import nnx

from gemma_jax.nn.decoder import Decoder


@pytest.fixture(scope="session")
def small(make_config, with_random_norms):
    return with_random_norms(Decoder(make_config(num_layers=2), rngs=nnx.Rngs(5)))


@pytest.fixture(scope="session")
def small_3n(make_3n, with_random_norms):
    config = make_3n(num_layers=3, num_shared=1)
    layers = tuple(dataclasses.replace(spec, activation_sparsity=0.0) for spec in config.layers)
    return with_random_norms(Decoder(dataclasses.replace(config, layers=layers), rngs=nnx.Rngs(3)))
