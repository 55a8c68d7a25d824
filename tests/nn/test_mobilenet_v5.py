"""MobileNetV5 and the embedder behind it, against timm and formulas in numpy."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax import configs, export
from gemma_jax.configs.towers import MOBILENET_V5_300M, ConvBlock, MobileNetConfig
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.soft_tokens import Embedder
from gemma_jax.nn.vision import mobilenet_v5
from gemma_jax.nn.vision.mobilenet_v5 import MobileNetV5

FIXTURES = Path(__file__).parent.parent / "fixtures"
E2B = configs.get("gemma-3n-e2b")
TOWER, EMBEDDER = 294_126_912, 4_460_544  # gemma3n.md, section 1
STAGES = (  # the fixture's, in the words of its config: er and uir, kernels (a start, k mid), expansions, channels
    tuple(ConvBlock(kind="edge", width=16, kernel=3, stride=stride, expansion=4) for stride in (2, 1)),
    (
        ConvBlock(kind="inverted", width=24, start_kernel=3, kernel=5, stride=2, expansion=6),
        ConvBlock(kind="inverted", width=24, start_kernel=5, expansion=4),
        ConvBlock(kind="inverted", width=24, start_kernel=3, expansion=4),
    ),
    (
        ConvBlock(kind="inverted", width=32, start_kernel=5, kernel=5, stride=2, expansion=6),
        ConvBlock(kind="inverted", width=32, start_kernel=5, expansion=4),
        ConvBlock(kind="inverted", width=32, expansion=1),
        ConvBlock(kind="attention", width=32, num_heads=3, head_dim=8, key_kernel=3),
        ConvBlock(kind="inverted", width=32, expansion=2),
    ),
    (
        ConvBlock(kind="inverted", width=40, start_kernel=5, kernel=5, stride=2, expansion=6),
        ConvBlock(kind="attention", width=40, num_heads=4, head_dim=8),
        ConvBlock(kind="inverted", width=40, expansion=2),
    ),
)
TINY = MobileNetConfig(stages=STAGES, stem_width=8, image_size=192, num_soft_tokens=16)
FEW = dataclasses.replace(  # one block of each form; compiles sooner
    TINY, stages=(STAGES[0][:1], STAGES[1][:1], (STAGES[2][0], STAGES[2][3]), (STAGES[3][0], STAGES[3][1])), width=32
)
see = jax.jit(lambda tower, pixels: tower(pixels))


def empty(config: MobileNetConfig) -> MobileNetV5:
    return nnx.eval_shape(lambda: MobileNetV5(config, rngs=nnx.Rngs(0), dtype=jnp.dtype("float32")))


def filled(tower: MobileNetV5, weights: dict[str, np.ndarray]) -> MobileNetV5:
    """The tower with timm's weights: names by our table, kernels (out, in, height, width) turned by hand."""
    prefix, params = "vision_tower.timm_model.", parameters(tower)
    table = export.table("huggingface", dataclasses.replace(E2B, vision=tower.config))
    sources = {entry.path: entry.source.removeprefix(prefix) for entry in table.entries}
    assert set(weights) == {sources[f"vision/{path}"] for path in params}
    for path, param in params.items():
        value = weights[sources[f"vision/{path}"]]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        assert value.shape == param.get_raw_value().shape, path
        param.set_raw_value(jnp.asarray(value))
    return tower


@pytest.fixture(scope="module")
def fixture() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "mobilenetv5_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def tower(fixture) -> MobileNetV5:
    """The fixture's, with its weights."""
    weights = {name[2:]: value for name, value in fixture.items() if name.startswith("w:")}
    return filled(empty(TINY), weights)


@pytest.fixture(scope="module")
def few() -> MobileNetV5:
    """A smaller one with random weights, among them those that start at 1."""
    tower, random = empty(FEW), np.random.default_rng(0)
    for param in parameters(tower).values():
        shape = param.get_raw_value().shape
        value = random.normal(size=shape) * math.prod(shape[:-1]) ** -0.5
        param.set_raw_value(jnp.asarray(value if len(shape) > 1 else 1 + 0.3 * value, jnp.float32))
    return tower


def images(count: int, side: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, side, side, 3), np.float32)


def test_the_tiny_config_is_the_fixtures(fixture):
    data = json.loads(bytes(fixture["config_json"]))
    assert [len(stage) for stage in data["arch"]] == [len(stage) for stage in STAGES]
    assert (data["stem"], data["msfa_out"], data["msfa_resolution"] ** 2) == (8, TINY.width, TINY.num_soft_tokens)


def test_a_small_tower_computes_what_timm_computed(fixture, tower):
    got = np.asarray(see(tower, fixture["x:image_nchw"].transpose(0, 2, 3, 1)))
    want = fixture["x:out_nchw"]
    want = want.reshape(*want.shape[:2], -1).transpose(0, 2, 1)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_paths_and_shapes_are_those_of_checkpoints():
    f32 = jnp.dtype("float32")
    make = {
        "vision": lambda: empty(MOBILENET_V5_300M),
        "mm": lambda: Embedder(128, 2048, E2B.width, 262_144, rngs=nnx.Rngs(0), dtype=f32),
        "audio_mm": lambda: Embedder(128, 1536, E2B.width, 262_272, rngs=nnx.Rngs(0), dtype=f32),
    }
    ours = {
        f"{name}/{path}": param.get_raw_value().shape
        for name, module in make.items()
        for path, param in parameters(nnx.eval_shape(module)).items()
    }
    entries = export.table("huggingface", E2B).entries
    assert ours == {entry.path: entry.shape for entry in entries if entry.path.split("/")[0] in make}
    count = {name: sum(math.prod(s) for path, s in ours.items() if path.split("/")[0] == name) for name in make}
    assert (count["vision"], count["mm"]) == (TOWER, EMBEDDER)


def test_images_of_a_batch_do_not_see_each_other(tower):
    batch = images(3)
    together = np.asarray(see(tower, batch))
    for i in range(3):
        np.testing.assert_allclose(together[i : i + 1], see(tower, batch[i : i + 1]), atol=5e-5, rtol=0)


def test_other_sizes_that_pool_to_whole_tokens_are_taken(tower):
    for side in (64, 128, 256):
        assert jax.eval_shape(tower, images(2, side)).shape == (2, 16, TINY.width)


@pytest.mark.parametrize("shape", [(1, 96, 96, 3), (1, 64, 128, 3), (1, 0, 0, 3), (64, 64, 3), (1, 64, 64, 4)])
def test_images_that_do_not_pool_to_whole_tokens_are_refused(tower, shape):
    with pytest.raises(ValueError, match=r"wanted \[B, side, side, 3\] with a side a multiple of 64"):
        tower(np.zeros(shape, np.float32))


def test_the_published_tower_takes_multiples_of_256():
    assert mobilenet_v5.side_unit(MOBILENET_V5_300M) == 256


def test_every_weight_has_a_finite_gradient(few):
    def loss(model, pixels):
        return jnp.mean(jnp.square(model(pixels) - 1))

    gradients, of_pixels = jax.jit(jax.grad(loss, argnums=(0, 1)))(few, images(2))
    for path, param in parameters(gradients).items():
        values = np.asarray(param.get_raw_value())
        assert np.isfinite(values).all(), path
        assert values.any(), path
    assert np.isfinite(of_pixels).all()


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_shifted_products_are_a_grouped_convolution(side, stride, size):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, *size, 6)).astype(np.float32)
    kernel = random.normal(size=(side, side, 6)).astype(np.float32)

    def grouped(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        strides, groups = (stride, stride), x.shape[-1]
        return jax.lax.conv_general_dilated(
            x, kernel[:, :, None], strides, "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    want, want_gradient = jax.vjp(grouped, x, kernel)
    got, gradient = jax.vjp(lambda x, kernel: mobilenet_v5._convolved_depthwise(x, kernel, stride), x, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for ours, theirs in zip(gradient(want), want_gradient(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def test_attention_by_blocks_is_attention():
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, n, 8)).astype(np.float32) for n in (1200, 20, 20))

    def plain(q, k, v):
        return jnp.einsum("BQP,BPH->BQH", jax.nn.softmax(jnp.einsum("BQH,BPH->BQP", q, k)), v)

    want, want_gradient = jax.vjp(plain, q, k, v)
    got, gradient = jax.vjp(mobilenet_v5._attend, q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for ours, theirs in zip(gradient(want), want_gradient(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_bfloat16_stays_near_float32(few):
    pixels = images(1)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), few)
    got = see(narrow, pixels)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(see(few, pixels))
    assert np.corrcoef(np.asarray(got, np.float32).ravel(), want.ravel())[0, 1] > 0.99


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    random, model = np.random.default_rng(1), Embedder(8, 12, 16, 100, rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"))
    for norm in (model.hard_norm, model.soft_norm):
        norm.scale.set_raw_value(jnp.asarray(random.normal(size=12), jnp.float32))
    return model


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)


def test_hard_tokens_are_rows_of_the_table_normed_projected_and_normed(embedder):
    ids = np.array([[100, 107, 103]])
    rows = np.asarray(embedder.embedding[...], np.float64)[ids - 100]
    want = rms(rms(rows) * np.asarray(embedder.hard_norm.scale[...]) @ np.asarray(embedder.w_proj[...]))
    np.testing.assert_allclose(embedder.hard(ids), want, atol=1e-6)


def test_soft_tokens_are_normed_projected_and_normed(embedder):
    x = np.random.default_rng(2).normal(size=(2, 3, 12)).astype(np.float32)
    want = rms(rms(x) * np.asarray(embedder.soft_norm.scale[...]) @ np.asarray(embedder.w_proj[...]))
    np.testing.assert_allclose(embedder.soft(x), want, atol=1e-5)


@pytest.fixture(scope="module")
def published_pair():
    """timm's tower with random weights that leave no block without effect (its own start is 1e-5), and ours."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
        # PyPI's torchvision is made for CUDA's torch, and with another wants these declared; timm uses neither
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobilenetv5_300m_enc", pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            scale = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if weight.ndim == 1 and not name.endswith("bias"):
                weight.add_(1.0)
    weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return theirs, filled(empty(MOBILENET_V5_300M), weights)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("side", [256, 512, 768])
def test_the_published_tower_computes_what_timm_computes(published_pair, side):
    import torch

    theirs, ours = published_pair
    pixels = images(1, side, seed=side)
    with torch.no_grad():
        want = theirs.forward_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()
    want = want.reshape(*want.shape[:2], -1).transpose(0, 2, 1)
    got = np.asarray(see(ours, pixels))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
