"""The nested loss: against numpy, scoring and models that are cut by hand; its sampler; and its steps."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax import matformer, train
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.slicing import Slicing
from gemma_jax.generate.scoring import score
from gemma_jax.matformer import nested
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 128, (3, 12))
WHERE = Places(
    jnp.asarray([[*range(9), -1, -1, -1], [-1, -1, *range(10)], [*range(5), *range(6), -1]]),
    jnp.asarray([[0] * 12, [0] * 12, [0] * 5 + [1] * 6 + [0]]),
)  # padded right and left, and packed
BATCH = train.Batch(jnp.asarray(TOKENS), WHERE)
NARROW, THIN = Slicing(ffw=24), Slicing(ffw=(12, 5))
MIXTURE = {NARROW: 3.0, Slicing(skip=(1,), ffw=8): 1.0}

loss = jax.jit(train.next_token_loss)


@pytest.fixture(scope="module")
def model(make_config, with_random_norms):
    return with_random_norms(Decoder(make_config(num_layers=2), rngs=nnx.Rngs(5)))


@pytest.fixture(scope="module")
def nested_gradient(model):
    """((loss, losses), gradient) of MIXTURE on BATCH."""
    return jax.jit(jax.value_and_grad(lambda m: nested.nested_loss(m, BATCH, MIXTURE), has_aux=True))(model)


@pytest.fixture(scope="module")
def sgd():
    """A step, compiled once for several tests, that is plain but for a momentum, which shows where it went before."""
    optimizer = optax.sgd(0.05, momentum=0.9)
    return optimizer, nested.make_step(optimizer)


def values(model):
    return {path: np.asarray(param[...]) for path, param in parameters(model).items()}


def in_the_whole(small, whole, kept):
    """A slice's arrays where they stand in arrays of the whole, which are 0 elsewhere."""
    placed = {path: np.zeros_like(value) for path, value in whole.items()}
    for path, value in small.items():
        head, _, rest = path.partition("/")
        if head.startswith("layers_"):
            path = f"layers_{kept[int(head.removeprefix('layers_'))]}/{rest}"
        target = placed[path]
        if path in ("embedder/ple", "ple_proj/kernel"):
            target[:, list(kept)] = value
        else:
            target[tuple(slice(0, size) for size in value.shape)] = value
    return placed


def assert_is_sum_of_slices(model, mixture, found, tolerance):
    """Loss and gradient are those of models that `matformer.slice` cuts, weighted and put where they belong.

    Sums are taken in another order: `tolerance` is relative to the largest value of an array, and not to each.
    """
    (total, losses), gradient = found
    gemma, shares = gj.Gemma(dataclasses.replace(model.config, name="parent"), model), nested.normalised(mixture)
    want = {path: np.zeros_like(value) for path, value in values(model).items()}
    for i, (slicing, share) in enumerate(shares):
        small = matformer.slice(gemma, slicing)
        value, part = jax.jit(jax.value_and_grad(train.next_token_loss))(small.model, BATCH)
        np.testing.assert_allclose(losses[i], value, rtol=tolerance)
        for path, one in in_the_whole(values(part), want, slicing.kept(model.config)).items():
            want[path] += share * one
    np.testing.assert_allclose(total, sum(share * losses[i] for i, (_, share) in enumerate(shares)), rtol=tolerance)
    got = values(gradient)
    assert set(got) == set(want)
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=path)


def test_the_loss_is_the_mean_of_tokens_that_follow_in_their_document(model, forward):
    logits = np.asarray(forward(model, TOKENS, WHERE), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pairs = [(0, t) for t in range(8)] + [(1, t) for t in range(2, 11)] + [(2, t) for t in (0, 1, 2, 3, 5, 6, 7, 8, 9)]
    want = -np.mean([logprobs[row, t, TOKENS[row, t + 1]] for row, t in pairs])
    np.testing.assert_allclose(loss(model, BATCH), want, rtol=1e-5)
    assert int(train.is_target(WHERE).sum()) == len(pairs)


def test_the_loss_of_a_row_is_what_scoring_says(model):
    want = score(model, TOKENS[0].tolist()).nll
    np.testing.assert_allclose(loss(model, train.Batch(jnp.asarray(TOKENS[:1]))), want, rtol=1e-5)


def test_documents_begin_where_positions_or_segments_say():
    positions = jnp.asarray([[0, 1, 0, 1, 2, -1, 0]])
    assert train.is_target(Places(positions)).tolist() == [[True, False, True, True, False, False]]
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0]])
    assert train.is_target(Places(positions, segments)).tolist() == [[True, False, False, True, False, False]]


def test_padding_changes_nothing_and_its_tokens_are_not_read(model):
    document, length = TOKENS[0, :7], 12
    want, found = loss(model, train.Batch(jnp.asarray(document[None]))), []
    for start, junk in ((0, 0), (0, 127), (5, 3), (2, 10**6)):
        row, mask = np.full((2, length), junk), np.zeros((2, length), bool)
        row[0, start : start + 7], mask[0, start : start + 7] = document, True  # the second row is padding alone
        batch = train.Batch(jnp.asarray(row), Places.of(jnp.asarray(mask)))
        found.append(float(loss(model, batch)))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert loss(model, train.Batch(batch.tokens, Places(jnp.full((2, length), -1)))) == 0


def test_the_joint_loss_and_its_gradient_are_sums_over_models_that_are_cut(model, nested_gradient):
    assert_is_sum_of_slices(model, MIXTURE, nested_gradient, 1e-4)


@pytest.mark.slow
def test_so_they_are_for_gemma_3n(make_3n, with_random_norms):
    """In float64: in float32 AltUp's gradients differ by 1e-4 of their largest."""
    mixture = [Slicing(), Slicing(skip=(1,), ffw=(64, 8, 40, 1))]
    with jax.enable_x64(True):
        model = with_random_norms(Decoder(make_3n(5, 1), rngs=nnx.Rngs(3), dtype="float64"))
        found = jax.jit(jax.value_and_grad(lambda m: nested.nested_loss(m, BATCH, mixture), has_aux=True))(model)
        assert_is_sum_of_slices(model, mixture, found, 1e-10)


def test_outside_of_the_slices_the_gradient_is_zero(nested_gradient):
    gradient = values(nested_gradient[1])
    for layer, width in ((0, 24), (1, 24)):
        gate, up, down = (gradient[f"layers_{layer}/mlp/{name}/kernel"] for name in ("gate", "up", "down"))
        assert not gate[:, width:].any()
        assert not up[:, width:].any()
        assert not down[width:].any()
        assert gate[:, :width].any(axis=0).all()
        assert down[:width].any(axis=1).all()


def test_plain_descent_leaves_the_outside_alone_and_momentum_moves_it(model, sgd):
    optimizer, step = sgd
    before = values(model)
    state, metrics = step(train.start(model, optimizer), BATCH, NARROW)
    first = values(state.weights)
    name = "layers_1/mlp/down/kernel"
    np.testing.assert_array_equal(first[name][24:], before[name][24:])
    assert (first[name][:24] != before[name][:24]).all()
    assert metrics["losses"].shape == (1,)
    assert metrics["loss"] == metrics["losses"][0]
    np.testing.assert_array_equal(values(model)[name], before[name])  # the caller's model is not donated
    state, _ = step(state, BATCH, Slicing())
    second = values(state.weights)
    state, _ = step(state, BATCH, NARROW)
    assert (values(state.weights)[name][24:] != second[name][24:]).any()


def test_a_step_takes_its_state_over(model, sgd):
    optimizer, step = sgd
    state = train.start(model, optimizer)
    step(state, BATCH, NARROW)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.weights))


def test_a_few_steps_of_either_kind_make_every_width_better(model, sgd):
    widths, (optimizer, step) = (Slicing(), NARROW), sgd
    state = train.start(model, optimizer)
    state, begin = step(state, BATCH, widths)
    for i in range(12):
        state, _ = step(state, BATCH, nested.sampled(widths, seed=1, step=i))
    state, middle = step(state, BATCH, widths)
    assert (middle["losses"] < begin["losses"] - 0.2).all()
    for _ in range(5):
        state, end = step(state, BATCH, widths)
    assert (end["losses"] < middle["losses"] - 0.1).all()
    np.testing.assert_allclose(end["loss"], end["losses"].mean(), rtol=1e-6)
    assert float(end["gradient_norm"]) > 0


def test_slicings_are_drawn_with_their_weights_and_again_the_same():
    mixture = {Slicing(): 5, NARROW: 3, THIN: 2}
    drawn = [nested.sampled(mixture, seed=7, step=i) for i in range(4000)]
    counts = collections.Counter(drawn)
    for slicing, weight in mixture.items():  # four standard deviations
        share = weight / 10
        assert abs(counts[slicing] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert drawn[:50] == [nested.sampled(mixture, seed=7, step=i) for i in range(50)]
    assert drawn[:50] != [nested.sampled(mixture, seed=8, step=i) for i in range(50)]
    assert nested.sampled(NARROW, seed=0, step=0) == NARROW


def test_weights_are_normalised_and_what_is_listed_twice_counts_twice():
    assert nested.normalised([Slicing(), NARROW, Slicing(), THIN]) == ((Slicing(), 0.5), (NARROW, 0.25), (THIN, 0.25))
    assert nested.normalised(iter([NARROW])) == nested.normalised({NARROW: 9}) == ((NARROW, 1.0),)


def test_halves_are_the_whole_and_its_halves(make_3n):
    config = make_3n(num_layers=5, num_shared=1)
    assert nested.halves(config, 1) == (Slicing(),)
    whole, *others = nested.halves(config)
    assert whole == Slicing()
    assert [one.ffw for one in others] == [(64 // d, 48 // d, 48 // d, 64 // d, 48 // d) for d in (2, 4, 8)]


def test_mixed_slicings_are_different_possible_and_the_same_again(make_3n):
    config = make_3n()
    widths = nested.halves(config, 3)
    mixed = nested.mix_and_match(config, widths, 20, seed=3)
    assert len(set(mixed)) == 20
    assert mixed == nested.mix_and_match(config, widths, 20, seed=3)
    assert mixed != nested.mix_and_match(config, widths, 20, seed=4)
    for slicing in mixed:
        for spec, width in zip(config.layers, slicing.apply(config).layers, strict=True):
            assert spec.ffw_width / width.ffw_width in (1, 2, 4)
    few = nested.mix_and_match(config, [Slicing((5, 6), 8), Slicing((5, 6), (8, 8, 8, 8, 16, 8))], 2, seed=0)
    assert set(few) == {Slicing((5, 6), (8,) * 6), Slicing((5, 6), (8, 8, 8, 8, 16, 8))}


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ([], "the mixture has no slicing"),
        ({NARROW: 0.0}, "has the weight 0.0; wanted a number above 0"),
        ({NARROW: 1.0, THIN: float("nan")}, "has the weight nan"),
        ({THIN: float("inf")}, "has the weight inf"),
        ([8], "the mixture has 8; wanted slicings"),
    ],
)
def test_what_is_no_mixture_is_refused(model, mixture, words):
    with pytest.raises(ValueError, match=words):
        nested.sampled(mixture, seed=0, step=0)
    with pytest.raises(ValueError, match=words):
        nested.nested_loss(model, BATCH, mixture)


def test_impossible_slices_and_batches_are_refused_before_the_state_is_taken(model, sgd):
    optimizer, step = sgd
    state = train.start(model, optimizer)
    with pytest.raises(ConfigError, match="ffw is 49 in layer 0; wanted 1 to 48"):
        step(state, BATCH, [Slicing(), Slicing(ffw=49)])
    for batch, words in (
        (train.Batch(BATCH.tokens[0]), r"tokens are int32\[12\]; wanted integers \[B, T\]"),
        (train.Batch(BATCH.tokens[:, :1]), "T from 2 on"),
        (train.Batch(BATCH.tokens * 1.0), "tokens are float32"),
        (train.Batch(BATCH.tokens[:2], WHERE), r"where.positions is \[3, 12\], the tokens \[2, 12\]"),
        (train.Batch(BATCH.tokens, Places(WHERE.positions, WHERE.positions[:1])), "where.segments"),
    ):
        with pytest.raises(ValueError, match=words):
            step(state, batch, NARROW)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.weights))


def test_other_bad_requests_are_refused(make_config, make_3n):
    config = make_config(num_layers=2)
    widths = nested.halves(config, 2)
    for call, words in (
        (lambda: nested.sampled(NARROW, seed=-1, step=0), "seed is -1 and step 0"),
        (lambda: nested.sampled(NARROW, seed=0, step=-2), "seed is 0 and step -2"),
        (lambda: nested.halves(config, 0), "count is 0; tiny, with an ffw of 48, can be halved to 1 to 6 widths"),
        (lambda: nested.halves(config, 7), "count is 7"),
        (lambda: nested.mix_and_match(config, widths, 5, seed=0), "count is 5; 4 slicings can be mixed"),
        (lambda: nested.mix_and_match(config, [], 1, seed=0), "no slicings to mix"),
        (lambda: nested.mix_and_match(config, [*widths, Slicing((1,))], 1, seed=0), "same layers can be mixed"),
        (lambda: nested.mix_and_match(config, [Slicing(ffw=64)], 1, seed=0), "ffw is 64 in layer 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    mapped = nnx.eval_shape(lambda: Decoder(make_3n(), rngs=nnx.Rngs(0)))
    mapped.embedder.map_pieces(lambda index: np.zeros((*index.shape, 8, 8)), (120, 8, 8))
    with pytest.raises(ValueError, match="mapped from a checkpoint"):
        train.start(mapped, optax.sgd(0.1))
