"""The model with kernels, interpreted, equals the model without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma_kernels
from gemma_jax import configs, train
from gemma_jax.configs.config import AttentionConfig, AttentionKind
from gemma_jax.configs.slicing import Slicing
from gemma_jax.generate.engine import Session
from gemma_jax.generate.sampling import sampling_params
from gemma_jax.generate.speculative import Draft, SpeculativeSession
from gemma_jax.nn import kernels
from gemma_jax.nn.cache import LayerCache, store
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.look import Keys, Look
from gemma_jax.nn.masks import Places
from tests import tpu

WINDOW, HEAD_DIM = 40, 128
KINDS = {"local": AttentionKind(window=WINDOW, rope_theta=1e4), "global": AttentionKind(window=None, rope_theta=1e6)}
ATTENTION = AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, query_pre_attn_scalar=1.0,
    local=KINDS["local"], global_=KINDS["global"],
)  # fmt: skip


@pytest.fixture(scope="module")
def config(make_config):
    config = make_config(num_layers=3, window=WINDOW)
    return config.replace_all([("attention.head_dim", HEAD_DIM), ("context", 512)])


@pytest.fixture(scope="module")
def model(config, with_random_norms):
    return with_random_norms(Decoder(config, rngs=nnx.Rngs(5)))


@pytest.fixture(scope="module")
def model_3n(make_3n, with_random_norms):
    config = make_3n().replace_all([("attention.head_dim", HEAD_DIM), ("context", 512)])
    return with_random_norms(Decoder(config, rngs=nnx.Rngs(6)))


@pytest.fixture(scope="module")
def wide_3n(make_3n, with_random_norms):
    """Streams of a width that kernels mix; heads that they do not serve."""
    config = make_3n(num_layers=2, num_shared=0).replace("width", 128)
    return with_random_norms(Decoder(config, rngs=nnx.Rngs(7)))


@pytest.fixture
def spy(monkeypatch):
    """Which forms of attention kernels served."""
    served = []
    for name in ("band_attention", "chunk_attention", "decode_attention", "table_losses"):
        call = getattr(kernels, name)

        def watched(*args, name=name, call=call):
            out = call(*args)
            served.append((name, out is not None))
            return out

        monkeypatch.setattr(kernels, name, watched)
    return served


def arrays(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]


def both(call, *args):
    """What a function gives by XLA and with kernels; compiled anew for each."""
    with gemma_kernels.using("reference"):
        wanted = jax.jit(call)(*args)
    with gemma_kernels.using("interpret"):
        found = jax.jit(call)(*args)
    return found, wanted


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("what", ["plain", "padded", "packed", "blocks"])
def test_attention_of_a_sequence_to_itself_is_the_same(kind, what, spy):
    length, real = 300, 270
    q, k, v = arrays((2, length, 4, HEAD_DIM), (2, 2, length, HEAD_DIM), (2, 2, length, HEAD_DIM))
    where = Places.plain(2, length)
    if what == "padded":
        where = Places.of(jnp.arange(length)[None] < jnp.asarray([[real], [90]]), is_dense=True)
    if what == "packed":
        start = jnp.asarray([[100], [130]])
        column = jnp.arange(length)[None]
        segments = (column >= start).astype(jnp.int32)
        where = Places(jnp.where(column >= start, column - start, column), segments, is_dense=True)
    if what == "blocks":
        blocks = np.zeros((2, length), np.int32)
        blocks[0, 20:50], blocks[0, 110:140], blocks[1, 120:150] = 1, 2, 3
        where = dataclasses.replace(where, blocks=jnp.asarray(blocks))
    look = Look(KINDS[kind], ATTENTION, max_span=30)
    found, wanted = both(lambda *x: look.at(*x, where, where), q * HEAD_DIM**-0.5, k, v)
    assert spy[-1] == ("band_attention", True)
    is_real = np.asarray(where.positions >= 0)
    np.testing.assert_allclose(np.asarray(found)[is_real], np.asarray(wanted)[is_real], atol=1e-5)


@pytest.mark.parametrize(
    ("window", "has_blocks"), [(WINDOW, False), (WINDOW, True), (128, False), (None, False), (None, True)]
)
@pytest.mark.parametrize("lengths", [(150, 60), (0, 7)])
def test_attention_of_a_chunk_to_what_came_before_is_the_same(window, lengths, has_blocks, spy, monkeypatch):
    """With a ring of whole blocks of keys the kernel knows where the chunk stands: (150, 60) fills one and not one."""
    given, call_kernel = [], gemma_kernels.band_attention
    monkeypatch.setattr(gemma_kernels, "band_attention", lambda *x: (given.append(x[3]), call_kernel(*x))[1])
    count, slots = 130, window or 512
    q, k, v, *old = arrays(
        (2, count, 4, HEAD_DIM), *[(2, 2, count, HEAD_DIM)] * 2, *[(2, 2, 200, HEAD_DIM)] * 2, seed=1
    )
    stored = jnp.asarray(lengths, jnp.int32)
    column = jnp.arange(200)[None]
    empty = LayerCache(*(jnp.zeros((2, 2, slots, HEAD_DIM)) for _ in range(2)))
    before = store(empty, *old, Places(jnp.where(column < stored[:, None], column, -1)), jnp.zeros_like(stored))
    column = jnp.arange(count)[None]
    positions = jnp.where(column < jnp.asarray([[count], [99]]), stored[:, None] + column, -1)
    blocks = jnp.where((column >= 30) & (column < 60), 1, 0) * jnp.ones((2, 1), jnp.int32) if has_blocks else None
    where = Places(positions, blocks=blocks, is_dense=True)
    look = Look(AttentionKind(window=window, rope_theta=1e4), ATTENTION, max_span=30)

    def call(q, k, v):
        after = store(before, k, v, where, stored)
        return look.back(q, Keys(k, v, where, before, after), where, stored)

    found, wanted = both(call, q * HEAD_DIM**-0.5, k, v)
    assert spy[-1] == ("chunk_attention", True)
    assert [marks.multiple for marks in given] == [window or 1]
    is_real = np.asarray(positions >= 0)
    np.testing.assert_allclose(np.asarray(found)[is_real], np.asarray(wanted)[is_real], atol=1e-5)


def test_logits_and_gradients_of_a_model_are_the_same(model, spy):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 128, (2, 150)))

    def loss(model):
        return train.next_token_loss(model, train.Batch(tokens))

    (found, theirs), (wanted, gradients) = both(jax.value_and_grad(loss), model)
    assert {name for name, is_served in spy if is_served} == {"band_attention", "table_losses"}
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(theirs), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        pytest.param([("altup.active_stream", 1), ("per_layer_embedding", None)], marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_of_streams_are_the_same(wide_3n, changes):
    """In float32 AltUp amplifies rounding (gemma3n.md, trap 1): tolerances are those of parity, of the largest."""
    model = wide_3n if not changes else Decoder(wide_3n.config.replace_all(changes), rngs=nnx.Rngs(8))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 128, (2, 50)))

    def loss(model):
        return train.next_token_loss(model, train.Batch(tokens))

    with gemma_kernels.recorded() as choices:
        (found, theirs), (wanted, gradients) = both(jax.value_and_grad(loss), model)
    kernels = [choice.kernel for choice in choices if choice.operation == "mix_streams"]
    assert kernels == [None] * 4 + ["tpu"] * 4  # a prediction and a correction of each layer, without and with
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(theirs), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


def test_vectors_of_another_dtype_are_mixed_in_that_of_the_streams():
    """Weights of mixed dtypes: a block's output may be wider than its streams."""
    coefficients, streams, other = arrays((1, 70, 3, 4), (3, 1, 70, 128), (1, 70, 128))
    found, wanted = both(kernels.mix_streams, coefficients, streams.astype("bfloat16"), other, other)
    assert found.dtype == wanted.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype("float32"), wanted.astype("float32"), atol=2e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "model_3n"])
def test_prompts_and_answers_beyond_the_window_are_the_same(name, request, spy):
    model = request.getfixturevalue(name)
    prompts = [np.random.default_rng(3).integers(0, 100, count).tolist() for count in (150, 37)]

    def answers(target, draft=None):
        params = [sampling_params(temperature=0.0, max_new_tokens=12, ignore_eos=True, logprobs=1)] * 2
        with gemma_kernels.using(target):
            session = (
                Session(model, prompts, params, [], prefill_chunk=64)
                if draft is None
                else SpeculativeSession(model, Draft(draft, 3), prompts, params, [], prefill_chunk=64)
            )
            rows = [[], []]
            for steps in session:
                for row, step in zip(rows, steps, strict=True):
                    row += zip(step.tokens, step.logprobs, strict=True)
        return rows

    wanted, found, speculated = answers("reference"), answers("interpret"), answers("interpret", draft=model)
    assert {name for name, is_served in spy if is_served} >= {"band_attention", "chunk_attention", "decode_attention"}
    for row, other, third in zip(wanted, found, speculated, strict=True):
        assert [token for token, _ in row] == [token for token, _ in other] == [token for token, _ in third][: len(row)]
        tolerance = 1e-4 if name == "model_3n" else 2e-5  # those of parity
        np.testing.assert_allclose([value for _, value in row], [value for _, value in other], atol=tolerance)


def test_places_with_gaps_are_left_to_xla(model, forward, spy):
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 128, (1, 64)))
    mask = jnp.ones((1, 64), bool).at[0, 20:23].set(False)
    with gemma_kernels.using("interpret"):
        found = forward(model, tokens, Places.of(mask))
    with gemma_kernels.using("reference"):
        wanted = forward(model, tokens, Places.of(mask))
    assert spy
    assert not any(is_served for name, is_served in spy if name != "table_losses")
    np.testing.assert_array_equal(found, wanted)


@tpu.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_a_real_width_compiles_for_tpu_with_its_kernels(target):
    config = Slicing(skip=(*range(4), *range(6, 18))).apply(configs.get("gemma-3-270m"))  # a local and a global layer
    where = tpu.sharding(target)
    model = tpu.abstract_model(config, where)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=where)
    step = jax.jit(jax.grad(lambda model, tokens: train.next_token_loss(model, train.Batch(tokens))))
    with gemma_kernels.using(target):
        programs = tpu.lowered_decoding(model, where), step.lower(model, tokens)
    for program in programs:
        program.compile()
    decoding, training = (program.as_text() for program in programs)  # jaxlib 0.10.2 cannot print some compiled ones
    assert decoding.count("decode_attention") >= 2
    for name in ("band_window_forward", "band_stream_forward", "band_attention_gradients", "band_attention_dkv"):
        assert name in training
    for name in ("linear_cross_entropy_forward", "linear_cross_entropy_hidden", "linear_cross_entropy_table"):
        assert name in training
