"""What Gemma 3n adds to the decoder: against a fixture of transformers, and each ingredient by itself."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

import gemma_jax as gj
from gemma_jax import configs, interp
from gemma_jax.configs.config import ConfigError, LayerSpec
from gemma_jax.generate.engine import prefill
from gemma_jax.nn import host
from gemma_jax.nn.cache import cache_bytes, empty_cache, slot_counts
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import GatedMLP
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters

FIXTURE = Path(__file__).parent.parent / "fixtures" / "gemma3n_text.npz"


def test_logits_and_streams_are_those_of_the_fixture(tmp_path):
    """AltUp amplifies float32's rounding (gemma3n.md, trap 1): 1e-3 is what transformers differs from itself by between
    prefill and decoding; most logits are far nearer. tests/parity compares in float64.
    """
    with np.load(FIXTURE) as file:
        data = dict(file)
    save_file({key[2:]: value for key, value in data.items() if key.startswith("w:")}, tmp_path / "model.safetensors")
    config = {**json.loads(bytes(data["config_json"])), "model_type": "gemma3n_text"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    gemma = gj.load(tmp_path, dtype="float32", progress=False)
    tokens = data["x:input_ids"]
    errors = np.abs(np.asarray(gemma.logits(tokens)) - data["x:logits"])
    assert errors.max() <= 1e-3
    assert errors.mean() <= 3e-5  # 0.9e-5 to 1.1e-5 by the machine's vector units
    states, want = np.asarray(gemma.hidden_states(tokens)), data["x:hidden"]
    assert len(states) == len(want)
    for ours, theirs in zip(states[:-1], want[:-1, 0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("sparsity", [0.95, 0.5, 0.2])
def test_sparse_gates_are_those_above_a_normal_quantile(make_config, sparsity):
    """By numpy: less mean + deviations * population std, then relu, then gelu."""
    deviations = {0.95: 1.6448536, 0.5: 0.0, 0.2: -0.8416212}[sparsity]
    spec = LayerSpec(is_local=True, ffw_width=48, activation_sparsity=sparsity)
    mlp = GatedMLP(make_config(), spec, rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"))
    x = np.random.default_rng(0).normal(size=(2, 3, 32))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.w_gate, mlp.w_up, mlp.w_down))
    z = x @ gate
    z = np.maximum(z - (z.mean(-1, keepdims=True) + deviations * z.std(-1, keepdims=True)), 0)
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), (gelu * (x @ up)) @ down, atol=2e-5)


@pytest.fixture(scope="module")
def small_3n(make_3n, with_random_norms):
    """One turn of the pattern and a layer that shares: as many programs as `tiny_3n` needs, each half as large."""
    model = with_random_norms(Decoder(make_3n(num_layers=5, num_shared=1), rngs=nnx.Rngs(3)))
    for i, layer in enumerate(model.layers):
        layer.altup.correct_scale.set_raw_value(jax.random.normal(jax.random.key(i), (32,)))
    return model


ABLATIONS = {
    "whole": [],
    "without altup": [("altup", None)],
    "without laurel": [("laurel_rank", None)],
    "without pieces": [("per_layer_embedding", None)],
    "without sparsity": [("layers.*.activation_sparsity", 0.0)],
    "without sharing": [("layers.*.kv_source", None)],
    "without v norm": [("attention.has_v_norm", False)],
    "without softcap": [("final_softcap", None)],
    "zero-centred norms": [("norm.is_zero_centred", True)],
    "without corrected scale": [("altup.has_corrected_scale", False)],
    "two streams, the second active": [("altup.num_streams", 2), ("altup.active_stream", 1)],
    "neither altup nor pieces": [("altup", None), ("per_layer_embedding", None)],
}


def greedy(forward, model, prompt, count, length=24):
    """By a whole forward for every token, in one compiled shape."""
    tokens = list(prompt)
    for _ in range(count):
        row = np.zeros((1, length), np.int32)
        row[0, : len(tokens)] = tokens
        where = Places(jnp.where(jnp.arange(length) < len(tokens), jnp.arange(length), -1)[None])
        tokens.append(int(np.asarray(forward(model, row, where))[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


FAST = ("whole", "neither altup nor pieces")  # a program for training and one for generating each


@pytest.mark.parametrize(
    "changes",
    [pytest.param(c, id=name, marks=[] if name in FAST else pytest.mark.slow) for name, c in ABLATIONS.items()],
)
def test_every_ingredient_can_be_switched_off_and_the_model_trains_and_generates(make_3n, forward, changes):
    config = make_3n(num_layers=5, num_shared=1).replace_all(changes)
    model = Decoder(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 12)))

    @jax.jit
    def step(model):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(model)
        return value, gradients, jax.tree.map(lambda w, g: w - 0.02 * g, model, gradients)

    value, gradients, trained = step(model)
    assert step(trained)[0] < value
    untouched = {path.split("/")[-1] for path, g in parameters(gradients).items() if not np.any(np.asarray(g[...]))}
    assert untouched <= ({"correct_scale"} if config.per_layer_embedding is None else set())
    answer = gj.Gemma(config, model).generate([2, 5, 9], max_new_tokens=12, ignore_eos=True).tokens
    assert answer == greedy(forward, model, [2, 5, 9], 12)


@pytest.mark.parametrize("changes", [changes for name, changes in ABLATIONS.items() if name != "whole"])
def test_every_ingredient_reaches_the_logits(small_3n, forward, changes):
    model = Decoder(small_3n.config.replace_all(changes), rngs=nnx.Rngs(0))
    old, new = parameters(small_3n), parameters(model)
    for path, param in new.items():
        if path in old and old[path][...].shape == param[...].shape:
            param.set_raw_value(old[path][...])
    tokens, where = np.random.default_rng(1).integers(0, 128, (1, 24)), Places.plain(1, 24)
    assert np.abs(np.asarray(forward(model, tokens, where)) - forward(small_3n, tokens, where)).max() > 1e-4


def test_layers_that_share_have_no_keys_and_no_cache(tiny_3n):
    config = tiny_3n.config
    sharing = [i for i, spec in enumerate(config.layers) if spec.kv_source is not None]
    assert sharing == [5, 6, 7]
    assert [config.layers[i].kv_source for i in sharing] == [4, 4, 3]
    names = parameters(tiny_3n)
    assert not [n for i in sharing for n in names if n.startswith((f"layers_{i}/attn/k", f"layers_{i}/attn/v"))]
    cache = empty_cache(config, 2, 64, "float32")
    assert [layer.keys.shape[2] for layer in cache.layers] == [6, 6, 6, 64, 6, 0, 0, 0] == list(slot_counts(config, 64))


def test_the_cache_of_e2b_and_e4b_is_that_of_the_specification():
    """gemma3n.md, section 1: at 32K 4 global layers, 256 MiB, and 16 rings, 16 MiB, in bfloat16."""
    for name in ("gemma-3n-e2b", "gemma-3n-e4b"):
        assert cache_bytes(configs.get(name), 1, 32_768) == (256 + 16) * 2**20


@pytest.mark.parametrize("chunk", [1, 16, 512])
def test_prefill_of_the_last_column_alone_is_the_whole_forward(tiny_3n, hidden_states, chunk):
    """Fast prefill, chunk by chunk, rows of unequal lengths, beyond the window: exact (gemma3n.md, 2.6)."""
    rows = [np.random.default_rng(i).integers(0, 128, n).tolist() for i, n in enumerate((23, 9, 16, 1))]
    cache, last = prefill(tiny_3n, rows, 32, chunk)
    assert cache.lengths.tolist() == [23, 9, 16, 1]
    tokens, mask = np.zeros((4, 24), np.int64), np.zeros((4, 24), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    want = np.asarray(hidden_states(tiny_3n, tokens, Places.of(jnp.asarray(mask))))[-1]
    for i, row in enumerate(rows):
        np.testing.assert_allclose(last[i], want[i, len(row) - 1], atol=1e-3)


def test_the_fast_path_computes_sharing_layers_once_a_row(tiny_3n):
    """Compiled operations: with `last` the layers at the end cost a column, not the sequence."""
    tokens = jnp.zeros((1, 256), jnp.int32)
    where = Places.plain(1, 256)

    def flops(**options):
        def run(model, tokens, where, last):
            cache = empty_cache(model.config, 1, 256, "float32")
            chosen = {"last": last} if options else {}
            return model.hidden(tokens, where, cache, is_cache_empty=True, **chosen)

        cost = jax.jit(run).lower(tiny_3n, tokens, where, jnp.asarray([255])).compile().cost_analysis()
        return cost["flops"]

    assert flops(last=True) < 0.72 * flops()


def test_with_edits_all_is_computed_and_agrees(small_3n):
    """Hooks see every column: the full path; what is drawn is the same."""
    gemma = gj.Gemma(small_3n.config, small_3n)
    prompt = np.random.default_rng(4).integers(0, 128, 17).tolist()
    nothing = interp.Scale("layers.4.mlp_out", 1.0 + 1e-7)
    want = gemma.generate(prompt, max_new_tokens=8, ignore_eos=True).tokens
    assert gemma.generate(prompt, max_new_tokens=8, ignore_eos=True, edits=[nothing]).tokens == want
    strong = interp.Scale("layers.4.*_out", -3.0)
    changed = gemma.generate(prompt, max_new_tokens=8, ignore_eos=True, edits=[strong]).tokens
    first = int(np.asarray(gemma.logits([prompt], edits=[strong]))[0, -1].argmax())
    assert changed[0] == first
    assert changed != want
    found = interp.capture(gemma, [prompt], ["layers.4.*"])
    assert {"layers.4.laurel_out", "layers.4.ple_out"} <= set(found)
    assert "layers.4.k" not in found


def test_padding_and_batch_mates_change_nothing(tiny_3n, forward):
    tokens = np.random.default_rng(2).integers(0, 128, (1, 14))
    want = np.asarray(forward(tiny_3n, tokens, Places.plain(1, 14)))[0]
    batch, mask = np.zeros((2, 19), np.int64), np.zeros((2, 19), bool)
    batch[0, 5:], mask[0, 5:] = tokens[0], True
    batch[1, :14], mask[1, :14] = tokens[0], True
    got = np.asarray(forward(tiny_3n, batch, Places.of(jnp.asarray(mask))))
    np.testing.assert_allclose(got[0, 5:], want, atol=1e-3)
    np.testing.assert_allclose(got[1, :14], want, atol=1e-3)


def test_tokens_without_a_row_take_the_first(tiny_3n):
    table = np.asarray(tiny_3n.embedder.ple[...])
    found = np.asarray(tiny_3n.embedder.pieces(jnp.asarray([[3, 119, 120, 127]])))
    np.testing.assert_allclose(found[0], table[[3, 119, 0, 0]] * 8**0.5, rtol=1e-6)


def test_one_stream_has_no_place_for_pieces(make_3n):
    with pytest.raises(ConfigError, match=r"altup.num_streams is 1, but per_layer_embedding goes to the others"):
        make_3n().replace("altup.num_streams", 1)
    config = make_3n().replace_all([("altup.num_streams", 1), ("per_layer_embedding", None)])
    assert np.isfinite(np.asarray(Decoder(config, rngs=nnx.Rngs(0))(jnp.asarray([[1, 2]])))).all()


def test_bfloat16_is_near_float32(tiny_3n, forward):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tiny_3n)
    tokens, where = np.random.default_rng(6).integers(0, 128, (1, 24)), Places.plain(1, 24)
    got, want = forward(half, tokens, where), np.asarray(forward(tiny_3n, tokens, where))
    assert got.dtype == jnp.float32
    assert np.abs(got - want).mean() < 0.1 * np.abs(want).mean()


def test_saved_and_loaded_it_is_the_same(tiny_3n, tmp_path):
    gemma = gj.Gemma(dataclasses.replace(tiny_3n.config, context=256), tiny_3n)
    tokens = np.random.default_rng(8).integers(0, 128, (1, 16))
    for format in ("orbax", "huggingface"):
        gemma.save(tmp_path / format, format=format)
        again = gj.load(tmp_path / format, dtype="float32", progress=False)
        np.testing.assert_allclose(again.logits(tokens), gemma.logits(tokens), atol=1e-3)


@pytest.mark.parametrize(
    ("format", "ple"),
    [("orbax", "host"), ("orbax", "mapped"), pytest.param("huggingface", "mapped", marks=pytest.mark.slow)],
)
def test_pieces_elsewhere_give_the_same_answers(small_3n, tmp_path, format, ple):
    """On the host, or left in the file; prefill and decoding read rows."""
    gj.Gemma(small_3n.config, small_3n).save(tmp_path / "saved", format=format)
    whole = gj.load(tmp_path / "saved", dtype="float32", progress=False)
    other = gj.load(tmp_path / "saved", dtype="float32", ple=ple, progress=False)
    table = parameters(other.model).get("embedder/ple")
    assert (table is None) == (ple == "mapped")
    assert table is None or host.is_on_host(table.get_raw_value())
    prompts = [np.random.default_rng(i).integers(0, 128, n).tolist() for i, n in enumerate((19, 7))]
    found, want = (g.generate(prompts, max_new_tokens=8, ignore_eos=True, logprobs=5) for g in (other, whole))
    for ours, theirs in zip(found, want, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-3)


def test_with_pieces_on_the_host_a_model_is_saved(tiny_3n, tmp_path):
    gj.Gemma(tiny_3n.config, tiny_3n).save(tmp_path / "saved")
    gj.load(tmp_path / "saved", dtype="float32", ple="host", progress=False).save(tmp_path / "again")
    again = gj.load(tmp_path / "again", dtype="float32", progress=False)
    np.testing.assert_array_equal(again.model.embedder.ple[...], tiny_3n.embedder.ple[...])


def test_a_mapped_model_is_neither_saved_nor_sliced(tiny_3n, tmp_path):
    gj.Gemma(tiny_3n.config, tiny_3n).save(tmp_path / "saved")
    mapped = gj.load(tmp_path / "saved", dtype="float32", ple="mapped", progress=False)
    with pytest.raises(ValueError, match="mapped from a checkpoint; convert"):
        mapped.save(tmp_path / "again")
    with pytest.raises(ValueError, match="load the slice itself"):
        gj.matformer.slice(mapped, ffw=8)


def test_a_mapped_slice_reads_the_kept_layers(small_3n, tmp_path):
    gemma = gj.Gemma(small_3n.config, small_3n)
    gemma.save(tmp_path / "saved")
    slicing = gj.matformer.Slicing(skip=(1,), ffw=16)
    mapped = gj.load(tmp_path / "saved", dtype="float32", ple="mapped", slicing=slicing, progress=False)
    tokens = np.random.default_rng(3).integers(0, 128, (1, 12))
    np.testing.assert_allclose(mapped.logits(tokens), gj.matformer.slice(gemma, slicing).logits(tokens), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("ple", "copy"), [("host", True), ("host", False), ("mapped", False)])
def test_slices_of_a_model_with_pieces_elsewhere(tiny_3n, tmp_path, ple, copy):
    gemma = gj.Gemma(tiny_3n.config, tiny_3n)
    gemma.save(tmp_path / "saved")
    slicing = gj.matformer.Slicing(skip=(1, 6), ffw=16)
    whole = gj.load(tmp_path / "saved", dtype="float32", ple=ple, progress=False)
    small = gj.matformer.slice(whole, slicing, copy=copy)
    if ple == "host":
        assert host.is_on_host(small.model.embedder.ple.get_raw_value())
    tokens = np.random.default_rng(3).integers(0, 128, (1, 12))
    np.testing.assert_allclose(small.logits(tokens), gj.matformer.slice(gemma, slicing).logits(tokens), atol=1e-3)


def test_without_pieces_they_have_no_place(make_3n, tmp_path):
    config = make_3n(num_layers=5, num_shared=1).replace("per_layer_embedding", None)
    gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(0))).save(tmp_path / "saved")
    for ple in ("mapped", "host"):
        with pytest.raises(ValueError, match=f"no per-layer embeddings, so ple cannot be '{ple}'"):
            gj.load(tmp_path / "saved", ple=ple)
    with pytest.raises(ValueError, match="ple is 'disk'; wanted 'device', 'host', 'mapped'"):
        gj.load(tmp_path / "saved", ple="disk")
