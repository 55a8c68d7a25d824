"""Weights that stay as a file has them, against the same file loaded in float32."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gemma_checkpoints
import gemma_jax as gj
import gemma_kernels
from gemma_jax import accounting, loading, train
from gemma_jax.cli import arguments
from gemma_jax.configs.gemma3 import GEMMA3_270M, five_to_one
from gemma_jax.interp import Scale
from gemma_jax.loading import DEMO_PACKAGE, find
from gemma_jax.model import Gemma
from gemma_jax.nn import scanned
from gemma_jax.nn.cache import empty_cache
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.stored import Piece, Stored
from gemma_kernels import blocks
from gemma_kernels.cpu import native

TOKENS = np.array([[2, 30, 17, 34, 5, 9, 9, 120, 33, 20, 7, 8], [2, 8, 7, 120, 9, 9, 33, 5, 34, 17, 30, 20]])
HOW = {
    "q8_0": {"format": "gguf", "quantize": "q8_0"},
    "q4_0": {"format": "gguf", "quantize": "q4_0"},
    "bf16": {"format": "gguf", "dtype": "bfloat16"},
    "bf16 of Hugging Face's": {"format": "huggingface", "dtype": "bfloat16"},
    "bf16 of ours": {"format": "orbax", "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def configs(make_3n):
    """What GGUF can describe, with rows of whole blocks of 32."""
    sizes = {"vocab_size": 128, "width": 32, "context": 256, "layers": five_to_one(2, 64)}
    heads = {"num_kv_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16.0, "local.window": 8}
    attention = {f"attention.{name}": value for name, value in heads.items()}
    small = {"laurel_rank": 64, "per_layer_embedding.width": 32, "per_layer_embedding.num_rows": 128}
    with_pieces = make_3n(num_layers=3, num_shared=1)
    layers = tuple(dataclasses.replace(spec, ffw_width=64) for spec in with_pieces.layers)
    return {
        "gemma3": GEMMA3_270M.replace_all([("name", "tiny"), *sizes.items(), *attention.items()]),
        "gemma3n": with_pieces.replace_all([*small.items(), ("layers", layers), ("period", 1)]),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, configs, with_random_norms):
    """Checkpoints of tiny models, written when first asked for: (family, how) -> path."""
    paths = {}

    def path_of(family, how):
        if (family, how) not in paths:
            model = with_random_norms(Decoder(configs[family], rngs=nnx.Rngs(7)))
            name = "model.gguf" if HOW[how]["format"] == "gguf" else "model"
            paths[family, how] = tmp_path_factory.mktemp("stored") / name
            Gemma(configs[family], model).save(paths[family, how], **HOW[how])
        return paths[family, how]

    return path_of


@pytest.fixture(scope="module")
def pair(saved):
    """A checkpoint's model as stored, and in float32."""
    models = {}

    def pair_of(family="gemma3", how="q8_0"):
        if (family, how) not in models:
            path = saved(family, how)
            models[family, how] = tuple(gj.load(path, dtype=dtype, progress=False) for dtype in ("stored", "float32"))
        return models[family, how]

    return pair_of


def encodings(gemma):
    values = {path: param.get_raw_value() for path, param in parameters(gemma.model).items()}
    return {path: value.encodings if isinstance(value, Stored) else None for path, value in values.items()}


def assert_close(got, want, error=1e-5):
    assert np.abs(np.asarray(got) - np.asarray(want)).max() <= error * np.abs(np.asarray(want)).max()


@pytest.mark.parametrize("how", HOW)
def test_logits_are_those_of_the_same_file_in_float32(pair, how):
    stored, floats = pair("gemma3", how)
    assert_close(stored.logits(TOKENS), floats.logits(TOKENS))


def test_logits_of_a_3n_are_too(pair):
    """Its streams are mixed by what they hold, which makes roundings larger: 4e-5 of logits up to 3.6 was seen."""
    stored, floats = pair("gemma3n")
    assert_close(stored.logits(TOKENS), floats.logits(TOKENS), 1e-4)


@pytest.mark.parametrize("how", ["q8_0", "q4_0", "bf16"])
@pytest.mark.parametrize("family", ["gemma3", "gemma3n"])
def test_matrices_keep_the_encoding_of_the_file_and_norms_are_float32(pair, family, how):
    stored, _ = pair(family, how)
    for path, held in encodings(stored).items():
        if path.endswith("/scale") or path.rpartition("/")[2] in ("prediction", "correction", "correct_scale"):
            assert held is None, path
        else:
            assert held == ["q8_0" if path == "embedder/embedding" and how == "q4_0" else how], path


def test_the_model_takes_the_bytes_of_the_file(pair, saved):
    stored, floats = pair()
    nbytes, wide = (sum(leaf.nbytes for leaf in jax.tree.leaves(gemma.model)) for gemma in (stored, floats))
    with gemma_checkpoints.open(saved("gemma3", "q8_0")) as reader:
        assert nbytes == sum(info.nbytes for info in reader.tensors.values())
    assert nbytes < 0.4 * wide


def test_what_has_no_kernel_is_float32(pair, tmp_path):
    path = tmp_path / "wide.gguf"
    pair()[1].save(path, format="gguf")
    stored = gj.load(path, dtype="stored", progress=False)
    assert set(encodings(stored).values()) == {None}
    assert_close(stored.logits(TOKENS), gj.load(path, progress=False).logits(TOKENS))


def test_generate_gives_the_same_tokens(pair):
    stored, floats = pair()
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1].tolist(), [2]]
    options = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    want = [done.tokens for done in floats.generate(prompts, **options)]
    assert [done.tokens for done in stored.generate(prompts, **options)] == want


def test_a_prompt_in_pieces_gives_what_it_gives_at_once(pair):
    model, where = pair()[0].model, Places.plain(*TOKENS.shape)

    @jax.jit
    def both(model, tokens, where):
        cache, found = empty_cache(model.config, 2, 64, "float32"), []
        for columns in (slice(0, 5), slice(5, 6), slice(6, None)):
            x, cache = model.hidden(tokens[:, columns], Places(where.positions[:, columns]), cache)
            found.append(x)
        return model.hidden(tokens, where)[0], jnp.concatenate(found, axis=1)

    whole, in_pieces = both(model, TOKENS, where)
    assert_close(in_pieces, whole)


def test_scores_and_edits_are_the_same(pair):
    stored, floats = pair()
    prompt, halved = TOKENS[0].tolist(), [Scale("layers.1.mlp_out", 0.5)]
    assert stored.score(prompt).nll == pytest.approx(floats.score(prompt).nll, rel=1e-5)
    assert_close(stored.logits(TOKENS, edits=halved), floats.logits(TOKENS, edits=halved))


def test_gradients_reach_activations(pair):
    def loss(x, model):
        return jnp.sum(model.logits(model.layers[0].mlp(x)) ** 2)

    def slope(gemma):
        return jax.jit(jax.grad(loss))(jnp.linspace(-1, 1, 2 * 3 * 32).reshape(2, 3, 32), gemma.model)

    stored, floats = pair()
    assert_close(slope(stored), slope(floats), 1e-4)


def test_what_needs_floats_says_how_to_load_them(pair, saved, tmp_path):
    stored, path = pair()[0], saved("gemma3", "q8_0")
    advice = r"load the model with dtype='float32'"
    with pytest.raises(ValueError, match=rf"training needs weights in floats.* q8_0; {advice}"):
        train.start(stored.model, optax.sgd(0.1))
    with pytest.raises(ValueError, match=advice):
        gj.matformer.slice(stored, ffw=32)
    with pytest.raises(ValueError, match=advice):
        gj.matformer.slice(stored, ffw=32, copy=False)
    with pytest.raises(ValueError, match=advice):
        scanned.stack(stored.model)
    with pytest.raises(ValueError, match=advice):
        stored.save(tmp_path / "new")
    with pytest.raises(TypeError, match=advice):
        np.asarray(stored.model.embedder.embedding[...])
    for given in (
        {"lora": tmp_path},
        {"slicing": gj.matformer.Slicing.of((), 32)},
        {"sharding": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
    ):
        with pytest.raises(ValueError, match=f"without {next(iter(given))}; {advice}"):
            gj.load(path, dtype="stored", **given)


@pytest.mark.parametrize("name", ["q8_0", "bf16"])
def test_no_copy_of_a_table_is_held_by_a_loop_that_reads_and_multiplies_it(name):
    """As decoding does. XLA takes out of the loop what it can, such as another view of the whole table."""
    width, num_rows, encoding = 1024, 8192, blocks.ENCODINGS[name]
    data = jax.ShapeDtypeStruct((num_rows, encoding.width(width)), encoding.dtype)
    table = Stored((Piece(data, name),), (num_rows, width))

    @jax.jit
    def steps(table, x, index):
        def step(_, state):
            x, index = state
            logits = table.product(x + table.rows(index))
            return x * 0.5, jnp.argmax(logits, axis=-1)

        return jax.lax.fori_loop(0, 4, step, (x, index))

    for num_tokens in (1, 4, 128):
        x, index = jnp.zeros((1, num_tokens, width)), jnp.zeros((1, num_tokens), jnp.int32)
        memory = steps.lower(table, x, index).compile().memory_analysis()
        logits = 4 * num_tokens * num_rows
        assert memory.temp_size_in_bytes < 3 * logits + 2**20 < 4 * width * num_rows / 2


def test_bytes_are_known_before_anything_is_read(pair, saved):
    for family, how in (("gemma3", "q4_0"), ("gemma3n", "q8_0")):
        stored = pair(family, how)[0]
        with gemma_checkpoints.open(saved(family, how)) as reader:
            sizes = loading.stored_bytes(reader, stored.config)
        held = accounting.weights_held(stored.config, "stored", stored=sizes)["device"]
        assert held.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(stored.model))
        assert held.parameters == sum(param.get_raw_value().size for param in parameters(stored.model).values())


def test_the_command_line_stores_ggufs_where_native_kernels_are(saved, model_folder):
    path = saved("gemma3", "q8_0")
    assert loading.inference_dtype(path) == ("stored" if native.is_available() else "auto")
    assert loading.inference_dtype(path.parent) == loading.inference_dtype(path)
    assert loading.inference_dtype(model_folder) == "auto"
    with gemma_kernels.using("reference"):
        assert loading.inference_dtype(path) == "auto"
    parser = argparse.ArgumentParser()
    arguments.add_model(parser)
    parser.set_defaults(overrides=[])
    for given, want in (([], native.is_available()), (["--dtype", "float32"], False), (["--dtype", "stored"], True)):
        options = parser.parse_args(["--model", str(path), "--no-compilation-cache", *given])
        assert any(encodings(arguments.load(options)).values()) == want


@pytest.mark.slow
def test_the_real_model_is_the_same_as_stored():
    """Gemma 3 270M in Q4_K_M: a mixture of five encodings, three of them in one fused matrix."""
    pytest.importorskip(DEMO_PACKAGE)
    stored, floats = (gj.load("gemma-3-270m", dtype=dtype, progress=False) for dtype in ("stored", "float32"))
    assert {name for held in encodings(stored).values() for name in held or ()} == {"q8_0", "q5_0", "q4_k", "q6_k"}
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(stored.model))
    assert nbytes < find("gemma-3-270m").stat().st_size
    tokens = np.array([stored.tokenizer.encode("The capital of Japan is Tokyo, and that of France is")])
    assert_close(stored.logits(tokens), floats.logits(tokens), 1e-4)
    prompts = ["The capital of Japan is", "Es war einmal", "def fibonacci(n):"]
    options = {"max_new_tokens": 32, "temperature": 0, "ignore_eos": True}
    want = [done.tokens for done in floats.generate(prompts, **options)]
    assert [done.tokens for done in stored.generate(prompts, **options)] == want
    assert stored.generate(prompts[0], **options).tokens == want[0]
    assert stored.generate(prompts[1], draft=stored, **options).tokens == want[1]
