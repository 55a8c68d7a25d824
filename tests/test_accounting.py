"""What weights take, by place: against the specification, and against arrays."""

from collections import Counter

import jax
import pytest

import gemma_jax as gj
from gemma_jax import accounting, configs
from gemma_jax.nn.paths import parameters

# gemma3n.md, section 1: effective, layers that share keys, per-layer embeddings
PUBLISHED = {
    "gemma-3n-e2b": (1_905_495_648, 10, 2_013_265_920),
    "gemma-3n-e4b": (3_980_491_248, 15, 2_348_810_240),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_effective_sizes_are_the_published_ones(name):
    """On the device: these, less 2,097,408 unused in each layer that shares, the rows of 262,144 tokens, and towers."""
    effective, num_sharing, pieces = PUBLISHED[name]
    config = configs.get(name)
    assert accounting.effective_parameters(config) == effective
    assert accounting.unused_parameters(config) == 2_097_408 * num_sharing
    towers = 294_126_912 + 4_460_544 + 681_348_640 + 3_345_408
    device = effective - 2_097_408 * num_sharing + 262_144 * 2048 + towers
    for ple, place in (("host", "host"), ("mapped", "file"), ("device", None)):
        held = accounting.weights_held(config, "bfloat16", ple)
        found = {key: (part.parameters, part.nbytes) for key, part in held.items() if part.parameters}
        elsewhere = {} if place is None else {place: (pieces, 2 * pieces)}
        here = device + (pieces if place is None else 0)
        assert found == {"device": (here, 2 * here), **elsewhere}


def test_models_without_per_layer_embeddings_are_on_the_device():
    config = configs.get("gemma-3-1b")
    assert accounting.weights_held(config, "float32")["device"] == accounting.Held(999_885_952, 4 * 999_885_952)
    with pytest.raises(ValueError, match="ple is 'host'; gemma-3-1b wants 'device'"):
        accounting.weights_held(config, ple="host")
    with pytest.raises(ValueError, match="ple is 'disk'; gemma-3n-e2b wants 'device', 'host' or 'mapped'"):
        accounting.weights_held(configs.get("gemma-3n-e2b"), ple="disk")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_the_arrays_of_a_loaded_model_take(tiny_3n, tmp_path, dtype):
    gj.Gemma(tiny_3n.config, tiny_3n).save(tmp_path / "saved")
    for ple in accounting.WHERE:
        gemma = gj.load(tmp_path / "saved", dtype=dtype, ple=ple, progress=False)
        arrays = {id(leaf): leaf for leaf in jax.tree.leaves(gemma.model)}.values()
        assert len(arrays) == len(parameters(gemma.model))
        counts, sizes = Counter(), Counter()
        for array in arrays:
            place = {"pinned_host": "host"}.get(array.sharding.memory_kind, array.sharding.memory_kind)
            counts[place] += array.size
            sizes[place] += array.nbytes
        held = accounting.weights_held(gemma.config, dtype, ple)
        in_memory = {key: part for key, part in held.items() if part.parameters and key != "file"}
        assert {key: accounting.Held(counts[key], sizes[key]) for key in counts} == in_memory
        assert held["file"].parameters == (tiny_3n.embedder.ple[...].size if ple == "mapped" else 0)
