"""The ears of Gemma 3n: against a fixture of transformers, against a live one, and in chunks against in one piece."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_checkpoints.gemma3n import audio_rows
from gemma_jax import configs, export
from gemma_jax.configs import huggingface_3n
from gemma_jax.configs.towers import AudioConfig
from gemma_jax.nn.audio.conformer import Conformer, banded, filled
from gemma_jax.nn.paths import parameters

FIXTURES = Path(__file__).parent.parent / "fixtures"
TINY = AudioConfig(num_layers=2, width=24, num_heads=3, channels=(6, 4), num_bins=20, past=4)
FLOAT32 = jnp.dtype("float32")


def theirs_of(config):
    """The arguments of transformers' Gemma3nAudioConfig."""
    return {theirs: getattr(config, ours) for ours, theirs in huggingface_3n._AUDIO.items()}


def filled_from(config, weights, dtype=FLOAT32):
    """A conformer with weights under transformers' names, without prefix."""
    sizes = export._audio(config)
    assert sizes is not None
    model = Conformer(config, rngs=nnx.Rngs(0), dtype=dtype)
    ours = {f"audio/{path}": param for path, param in parameters(model).items()}
    for row in audio_rows(sizes, 8):
        entry = row.entry("huggingface")
        assert entry is not None
        if entry.path.startswith("audio/"):
            value = np.empty(entry.shape, np.float64)
            entry.source_view(value)[...] = weights.pop(entry.source.removeprefix("audio_tower."))
            ours.pop(entry.path).set_raw_value(jnp.asarray(value, dtype))
    assert not ours
    assert not weights
    return model


def random_model(config=TINY, seed=0, dtype=FLOAT32):
    """Norms and scales away from their start, so that a missing one shows."""
    model, random = Conformer(config, rngs=nnx.Rngs(seed), dtype=dtype), np.random.default_rng(seed)
    for param in parameters(model).values():
        if param.ndim == 1:
            param.set_raw_value(param[...] + jnp.asarray(random.normal(0, 0.3, param.shape), dtype))
    return model


def sound(batch, length, bins=20, seed=0):
    return np.random.default_rng(seed).normal(-4, 3, (batch, length, bins)).astype(np.float32)


def all_valid(features):
    return np.ones(features.shape[:2], bool)


def until(lengths, length):
    return np.arange(length) < np.asarray(lengths)[:, None]


encode = jax.jit(lambda model, features, is_valid: model(features, is_valid))


def test_paths_shapes_and_counts_are_those_of_the_real_tower():
    config = configs.get("gemma-3n-e2b")
    assert config.audio is not None
    tower = config.audio
    model = nnx.eval_shape(lambda: Conformer(tower, rngs=nnx.Rngs(0), dtype=jnp.dtype("bfloat16")))
    found = {f"audio/{path}": param.shape for path, param in parameters(model).items()}
    entries = export.table("huggingface", config).entries
    assert found == {entry.path: entry.shape for entry in entries if entry.path.startswith("audio/")}
    assert sum(np.prod(shape) for shape in found.values()) == 681_348_640
    embedder = [entry.shape for entry in entries if entry.path.startswith("audio_mm/")]
    assert sum(np.prod(shape) for shape in embedder) == 3_345_408
    for param in parameters(model).values():
        assert len(param.get_metadata("dims").split()) == len(param.shape)


@pytest.mark.parametrize(("seconds", "frames", "tokens"), [(1, 97, 7), (5, 497, 32), (30, 2997, 188)])
def test_so_many_frames_give_so_many_vectors(seconds, frames, tokens):
    model = nnx.eval_shape(lambda: Conformer(TINY, rngs=nnx.Rngs(0), dtype=FLOAT32))
    x, kept = jax.eval_shape(encode, model, np.zeros((1, frames, 20), np.float32), np.ones((1, frames), bool))
    assert x.shape == (1, tokens, 24)
    assert kept.shape == (1, tokens)


def fixture(name):
    """The config, the weights without prefix, and the rest of a fixture."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        data = dict(file)
    values = json.loads(bytes(data["config_json"]))
    given = values.get("audio", values)
    found = {ours: given[theirs] for ours, theirs in huggingface_3n._AUDIO.items() if theirs in given}
    prefix = "w:model.audio_tower." if "audio" in values else "w:"
    weights = {key.removeprefix(prefix): data[key] for key in data if key.startswith(prefix)}
    return AudioConfig(**found | {"channels": tuple(found["channels"])}), weights, data


def test_vectors_are_those_of_the_fixture():
    config, weights, data = fixture("gemma3n_audio_encoder")
    x, kept = encode(filled_from(config, weights), data["x:mel"], data["x:valid"])
    np.testing.assert_allclose(x, data["x:encodings"], atol=1e-5)
    np.testing.assert_array_equal(kept, data["x:out_valid"])
    assert not kept.all()


def live(config, seed):
    """Transformers' encoder with random weights, and ours with the same."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    torch.set_num_threads(1)
    theirs = modeling.Gemma3nAudioEncoder(transformers.Gemma3nAudioConfig(**theirs_of(config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in theirs.parameters():
            offset, scale = (0.8, 0.3) if weight.ndim == 1 else (0.0, weight[0].numel() ** -0.5)
            weight.copy_(offset + scale * torch.randn(weight.shape, generator=generator))
    return theirs, filled_from(config, {name: value.numpy() for name, value in theirs.state_dict().items()})


def run(theirs, features, is_valid):
    import torch

    with torch.no_grad():
        out = theirs(torch.from_numpy(features).to(theirs.dtype), ~torch.from_numpy(is_valid))
    return out.last_hidden_state.numpy(), ~out.audio_mel_mask.numpy()


@pytest.mark.parity
def test_with_the_weights_of_the_multimodal_fixture_vectors_are_transformers():
    torch = pytest.importorskip("torch")
    config, weights, data = fixture("gemma3n_multimodal")
    theirs, _ = live(config, seed=0)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    features, is_valid = data["x:mel"], data["x:mel_valid"].astype(bool)
    want, want_kept = run(theirs, features, is_valid)
    x, kept = encode(filled_from(config, weights), features, is_valid)
    np.testing.assert_allclose(x, want, atol=1e-5)
    np.testing.assert_array_equal(kept, want_kept)


CONFIGS = {
    "tiny": TINY,
    "published window": dataclasses.replace(TINY, past=13),
    "one key": dataclasses.replace(TINY, past=1),
    "window longer than a chunk": dataclasses.replace(TINY, past=9, chunk=4),
    "window shorter than a chunk": dataclasses.replace(TINY, past=3, chunk=12),
    "odd bins, wide kernel, no reduction": dataclasses.replace(TINY, num_bins=19, kernel=7, reduction=1),
    "kernel of one": dataclasses.replace(TINY, kernel=1, reduction=3),
    "low softcap, other residual": dataclasses.replace(TINY, softcap=0.5, residual_weight=0.7),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_transformers(name):
    compare(name, [61])


def compare(name, lengths):
    config = CONFIGS[name]
    theirs, ours = live(config, seed=len(name))
    for length in lengths:
        features = sound(2, length, config.num_bins, seed=length)
        is_valid = until([length, max(1, 2 * length // 3)], length)
        want, want_kept = run(theirs, features, is_valid)
        x, kept = encode(ours, features, is_valid)
        np.testing.assert_allclose(x, want, atol=1e-5)
        np.testing.assert_array_equal(kept, want_kept)
        assert 0.1 < np.abs(want).max() < 100


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_transformers_for_clips_of_many_lengths(name):
    compare(name, [1, 2, 3, 4, 7, 16, 17, 200, 750])


@pytest.mark.parity
def test_vectors_are_transformers_with_gaps_of_padding():
    """Masks that no spectrogram has: padding first, in the middle, everywhere."""
    theirs, ours = live(TINY, seed=3)
    features = sound(4, 90)
    is_valid = np.ones((4, 90), bool)
    is_valid[0, :30] = is_valid[1, 20:70] = is_valid[2] = False
    is_valid[3] = np.random.default_rng(0).random(90) < 0.5
    want, want_kept = run(theirs, features, is_valid)
    x, kept = encode(ours, features, is_valid)
    np.testing.assert_allclose(x, want, atol=1e-5)
    np.testing.assert_array_equal(kept, want_kept)


@pytest.mark.parity
def test_in_float64_only_what_transformers_does_in_float32_differs():
    """Its norms and softmax stay in float32."""
    theirs, ours = live(TINY, seed=5)
    features = sound(1, 150)
    want, _ = run(theirs.double(), features, all_valid(features))
    with jax.enable_x64(True):
        for param in parameters(ours).values():
            param.set_raw_value(jnp.asarray(param[...], jnp.float64))
        x, _ = encode(ours, jnp.asarray(features, jnp.float64), all_valid(features))
    assert x.dtype == jnp.float64
    np.testing.assert_allclose(x, want, atol=1e-5)


def test_in_bfloat16_vectors_are_near():
    model = random_model()
    features = sound(1, 200)
    want, _ = encode(model, features, all_valid(features))
    for param in parameters(model).values():
        param.set_raw_value(param[...].astype(jnp.bfloat16))
    x, _ = encode(model, features, all_valid(features))
    assert x.dtype == jnp.bfloat16
    assert np.abs(np.asarray(x, np.float32) - want).mean() < 0.03 * np.abs(want).mean()


@pytest.mark.parametrize("lengths", [(200, 130), (200, 55), (200, 16), (193, 192)])
def test_in_a_padded_batch_a_clips_vectors_are_its_own_but_for_those_at_its_end(lengths):
    """Of a clip of n frames vector m is the same if 16 m + 7 <= n: those after it see what follows the clip."""
    model, length = random_model(), max(lengths)
    alone = [sound(1, count, seed=count) for count in lengths]
    padding = np.log(1e-5)
    batch = np.concatenate(
        [np.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)), constant_values=padding) for x in alone]
    )
    x, kept = encode(model, batch, until(lengths, length))
    for row, clip in enumerate(alone):
        want, _ = encode(model, clip, all_valid(clip))
        assert kept[row].sum() == want.shape[1]
        same = (clip.shape[1] - 7) // 16 + 1
        np.testing.assert_allclose(x[row, :same], want[0, :same], atol=1e-5)
        assert want.shape[1] - same <= 1
        assert not np.asarray(x[row, want.shape[1] :]).any()


def test_batched_clips_of_one_length_are_the_clips():
    model, features = random_model(), sound(3, 77)
    x, _ = encode(model, features, all_valid(features))
    for row in range(3):
        one = features[row : row + 1]
        np.testing.assert_allclose(x[row], encode(model, one, all_valid(one))[0][0], atol=1e-5)


def test_a_vector_depends_on_nothing_later():
    """Of 16 m + 6 the last frame counts for vector m, and 12 + 12 steps of 4 frames back the attention ends."""
    model, features = random_model(), sound(1, 100)
    gradient = jax.jit(jax.jacrev(lambda f: jnp.abs(model(f, all_valid(features))[0][0, 3]).sum()))(
        jnp.asarray(features)
    )
    seen = np.flatnonzero(np.abs(gradient[0]).sum(-1))
    assert seen.max() == 16 * 3 + 6
    assert np.isfinite(gradient).all()


STEP = jax.jit(lambda model, *args, is_last: model.step(*args, is_last=is_last), static_argnames="is_last")


def streamed(model, features, is_valid, cuts):
    stream, found, kept = model.start(len(features)), [], []
    edges = [0, *cuts, features.shape[1]]
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        is_last = i == len(edges) - 2
        stream, x, valid = STEP(model, stream, features[:, start:stop], is_valid[:, start:stop], is_last=is_last)
        found.append(x)
        kept.append(valid)
    return np.concatenate(found, axis=1), np.concatenate(kept, axis=1)


@pytest.mark.parametrize("cuts", [(), (32,), (0, 3, 3, 41), (6, 7, 77, 77)])
def test_chunks_give_the_vectors_of_the_whole(cuts):
    model, features = random_model(), sound(2, 77)
    is_valid = until([77, 30], 77)
    x, kept = streamed(model, features, is_valid, cuts)
    want, want_kept = encode(model, features, is_valid)
    np.testing.assert_allclose(x, want, atol=1e-5)
    np.testing.assert_array_equal(kept, want_kept)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 150), st.sampled_from(sorted(CONFIGS)), st.data())
def test_chunks_of_any_sizes_give_the_vectors_of_the_whole_for_every_config(length, name, data):
    config = CONFIGS[name]
    model, features = random_model(config), sound(1, length, config.num_bins, seed=length)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    x, _ = streamed(model, features, all_valid(features), cuts)
    np.testing.assert_allclose(x, encode(model, features, all_valid(features))[0], atol=1e-5)


def test_frame_by_frame_is_the_whole_and_vectors_come_as_early_as_they_can():
    model, features = random_model(), sound(1, 40)
    stream, found = model.start(1), []
    for i in range(40):
        stream, x, _ = STEP(model, stream, features[:, i : i + 1], is_last=False)
        found.append(x)
        assert sum(one.shape[1] for one in found) == (i - 6) // 16 + 1
    _, x, _ = STEP(model, stream, features[:, :0], is_last=True)
    want, _ = encode(model, features, all_valid(features))
    np.testing.assert_allclose(np.concatenate([*found, x], axis=1), want, atol=1e-5)


def test_equal_chunks_compile_thrice():
    traced = []

    @jax.jit
    def step(model, stream, features):
        traced.append(features.shape)
        return model.step(stream, features)[:2]

    model, features = random_model(), sound(1, 32 * 9)
    stream = model.start(1)
    for part in np.split(features, 9, axis=1):
        stream, _ = step(model, stream, part)
    assert len(traced) == 2  # the last one, with is_last, is the third


def test_nothing_heard_gives_nothing():
    model, features = random_model(), sound(2, 0)
    x, kept = encode(model, features, all_valid(features))
    assert x.shape == (2, 0, 24)
    assert kept.shape == (2, 0)


def test_features_of_another_shape_are_refused():
    model = random_model()
    with pytest.raises(ValueError, match=r"wanted \[B, T, 20\]"):
        model(np.zeros((1, 9, 21), np.float32), np.ones((1, 9), bool))
    with pytest.raises(ValueError, match=r"is_valid \(1, 8\)"):
        model(np.zeros((1, 9, 20), np.float32), np.ones((1, 8), bool))


@pytest.mark.parametrize("past", [1, 2, 5, 13])
@pytest.mark.parametrize("length", [1, 4, 12, 31])
def test_banded_attention_is_full_attention_with_a_mask(past, length):
    random = np.random.default_rng(length)
    width = max(past - 1, 1)
    q = random.normal(size=(2, length, 3, 8)).astype(np.float32)
    k, v = random.normal(size=(2, 2, width + length, 3, 8)).astype(np.float32)
    relative = random.normal(size=(past, 3, 8)).astype(np.float32)
    is_valid = random.random((2, width + length)) < 0.8
    is_valid[:, width:] |= length < 3
    distance = width + np.arange(length)[:, None] - np.arange(width + length)
    is_near = (distance >= 0) & (distance < past)
    by_distance = np.einsum("BTNH,TSNH->BNTS", q, relative[np.clip(distance, 0, past - 1)])
    scores = 5 * np.tanh((np.einsum("BTNH,BSNH->BNTS", q, k) + by_distance) / 5)
    weights = np.exp(scores) * (is_near & is_valid[:, None])[:, None]
    has_keys = weights.sum(-1) > 0
    weights = weights / np.where(has_keys, weights.sum(-1), 1)[..., None]
    want = np.einsum("BNTS,BSNH->BTNH", weights, v)
    found = np.asarray(jax.jit(banded)(q, k, v, relative, is_valid, 5.0))
    has_keys = has_keys.swapaxes(1, 2)
    np.testing.assert_allclose(found[has_keys], want[has_keys], atol=1e-5)
    assert np.isfinite(found).all()


def test_cost_grows_with_the_length_and_not_with_its_square():
    """XLA keeps one copy more of the entry's values from some length on; no temporary is a matrix of scores."""
    model = random_model(dataclasses.replace(TINY, past=13))

    def cost(length):
        shape = jax.ShapeDtypeStruct((1, length, 20), jnp.float32), jax.ShapeDtypeStruct((1, length), bool)
        compiled = encode.lower(model, *shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes / length, compiled.cost_analysis()["flops"] / length

    memory, work = zip(*(cost(length) for length in (4096, 4 * 4096, 16 * 4096)), strict=True)
    assert max(memory) < 2 * min(memory)
    assert max(work) < 1.1 * min(work)
    assert memory[-1] < 1024  # bytes for each frame; a matrix of float32 scores alone would take 4 * 16,384 / 4


def test_clips_are_filled_up_with_the_padding_vector():
    soft, padding = jnp.ones((2, 5, 3)), jnp.full((3,), 7.0)
    tokens = filled(soft, jnp.asarray(until([5, 2], 5)), padding, 8)
    assert tokens.shape == (2, 8, 3)
    np.testing.assert_array_equal(tokens[..., 0], [[1, 1, 1, 1, 1, 7, 7, 7], [1, 1, 7, 7, 7, 7, 7, 7]])
    with pytest.raises(ValueError, match="5 soft tokens; at most 4 fit"):
        filled(soft, jnp.ones((2, 5), bool), padding, 4)
