"""Parameter counts of every registered model, by shapes alone, against published tables."""

import dataclasses
import functools
from collections import Counter

import pytest
from flax import nnx

from gemma_jax import configs
from gemma_jax.configs.gemma3 import DERIVED
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.paths import parameters

# gemma3.md, 1.2: embedding, decoder without embedding, projector, total. Of the three with vision the embedding there
# has 262,208 rows; ours has the 262,144 that stand for tokens.
PADDING_ROWS = 64
VISION_TOWER = 416_866_032
GEMMA3 = {
    "gemma-3-270m": (167_772_160, 100_326_016, 0, 268_098_176),
    "gemma-3-1b": (301_989_888, 697_896_064, 0, 999_885_952),
    "gemma-3-4b": (671_252_480, 3_209_010_688, 2_950_272, 4_300_079_472),
    "gemma-3-12b": (1_006_878_720, 10_759_155_456, 4_424_832, 12_187_325_040),
    "gemma-3-27b": (1_409_630_208, 25_599_716_096, 6_194_304, 27_432_406_640),
}
# Rows and columns of the files' q, k (= v) and o matrices: weight_names.md, section 1.
MATRICES = {
    "gemma-3-270m": ((1024, 640), (256, 640), (640, 1024)),
    "gemma-3-1b": ((1024, 1152), (256, 1152), (1152, 1024)),
    "gemma-3-4b": ((2048, 2560), (1024, 2560), (2560, 2048)),
    "gemma-3-12b": ((4096, 3840), (2048, 3840), (3840, 4096)),
    "gemma-3-27b": ((4096, 5376), (2048, 5376), (5376, 4096)),
}
# arXiv:2403.08295, table 2, and arXiv:2408.00118, table 2: embedding (with 256,128 rows, 128 of them for no token) and
# the rest.
EARLIER = {
    "gemma-2b": (524_550_144, 1_981_884_416),
    "gemma-7b": (786_825_216, 7_751_248_896),
    "gemma-2-2b": (590_118_912, 2_024_517_888),
    "gemma-2-9b": (917_962_752, 8_324_201_984),
    "gemma-2-27b": (1_180_237_824, 26_047_480_320),
}


@pytest.fixture(scope="module")
def counts():
    """Of a registered model: parameters by part (embedder, attn, mlp, norms, vision, mm). Nothing is allocated.

    Of layers that are alike one is built, which counts as often as they are.
    """

    @functools.cache
    def count(name: str) -> Counter[str]:
        config = configs.get(name)
        times = Counter(config.layers)
        alike = dataclasses.replace(config, layers=tuple(times))
        found: Counter[str] = Counter()
        for path, param in parameters(nnx.eval_shape(lambda: Decoder(alike, rngs=nnx.Rngs(0)))).items():
            parts = path.split("/")
            is_layer = parts[0].startswith("layers_")
            often = times[alike.layers[int(parts[0].removeprefix("layers_"))]] if is_layer else 1
            part = parts[1] if is_layer else parts[0]
            part = "norms" if "norm" in path and part not in ("vision", "mm") else part
            found[part] += often * param.get_raw_value().size
        return found

    return count


@pytest.mark.parametrize("name", GEMMA3)
def test_gemma_3_has_the_parameters_of_the_specification(counts, name):
    embedding, rest, projector, total = GEMMA3[name]
    config, found = configs.get(name), counts(name)
    padding = PADDING_ROWS * config.width if projector else 0
    assert found["embedder"] == embedding - padding
    assert found["attn"] + found["mlp"] + found["norms"] == rest
    assert found["vision"] == (VISION_TOWER if projector else 0)
    assert found["mm"] == projector
    assert sum(found.values()) + padding == total


@pytest.mark.parametrize("name", MATRICES)
def test_attention_mlp_and_norms_have_their_shares(counts, name):
    """Four block norms of width D, two of a head's width, one final; three matrices of the ffw; q, k, v, o."""
    config, found = configs.get(name), counts(name)
    q, kv, o = ((rows * columns) for rows, columns in MATRICES[name])
    num_layers, (_, width), head_dim = len(config.layers), MATRICES[name][0], 128 if name == "gemma-3-27b" else 256
    assert found["attn"] == num_layers * (q + 2 * kv + o)
    assert found["norms"] == num_layers * (4 * width + 2 * head_dim) + width
    assert found["mlp"] == GEMMA3[name][1] - found["attn"] - found["norms"]
    assert set(found) - {"vision", "mm"} == {"embedder", "attn", "mlp", "norms"}


@pytest.mark.parametrize("name", EARLIER)
def test_gemma_1_and_2_have_the_parameters_of_their_reports(counts, name):
    embedding, rest = EARLIER[name]
    found = counts(name)
    assert found["embedder"] == embedding - 128 * configs.get(name).width
    assert sum(found.values()) - found["embedder"] == rest


def test_every_registered_model_is_counted_here():
    third_n = {name for name in configs.names() if name.startswith("gemma-3n")}  # tests/test_conversion_3n.py
    derived = {config.name for config in DERIVED}  # tests/configs/test_registry.py: their bases' shapes
    assert {*GEMMA3, *EARLIER, "embeddinggemma-300m"} == set(configs.names()) - third_n - derived


def test_embeddinggemma(counts):
    """gemma3.md, 1.2."""
    found = counts("embeddinggemma-300m")
    assert found["embedder"] == 201_326_592
    assert found["dense_0"] + found["dense_1"] == 4_718_592
    assert sum(found.values()) == 307_581_696
