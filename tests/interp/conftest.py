import numpy as np
import pytest
from flax import nnx

from gemma_jax.model import Gemma
from gemma_jax.nn.decoder import Decoder


@pytest.fixture(scope="session")
def gemma(make_config, with_random_norms) -> Gemma:
    """A local layer (window 8) and a global one."""
    config = make_config("interp", num_layers=2)
    return Gemma(config, with_random_norms(Decoder(config, rngs=nnx.Rngs(7))))


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 128, (2, 16))
