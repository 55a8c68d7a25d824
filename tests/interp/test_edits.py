"""Edits against plain forwards of models that were changed by hand, and against themselves in chunks and caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax import interp
from gemma_jax.generate import engine, forward
from gemma_jax.generate.engine import Session
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.interp import Ablate, Add, Apply, Patch, Scale
from gemma_jax.model import Gemma
from gemma_jax.nn import sites
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.edited import edited
from gemma_jax.nn.masks import Places

TOLERANCE = 2e-5
VECTOR = np.random.default_rng(1).normal(size=32)


def same(x: jax.Array) -> jax.Array:
    return x


BASELINE = Apply("embed", same)  # changes nothing, in the arithmetic of edited forwards


def changed(gemma: Gemma, path: str, change) -> Gemma:
    """The model with one weight changed."""
    decoder = nnx.clone(gemma.model)
    part = decoder
    for name in path.split("."):
        part = part[int(name)] if name.isdigit() else getattr(part, name)
    part.set_raw_value(change(part[...]))
    return Gemma(gemma.config, decoder)


def drawn(gemma, prompts, edits, count=10, **options):
    """Tokens and log-probabilities of rows."""
    params = [SamplingParams(max_new_tokens=count, logprobs=0)] * len(prompts)
    rows = [([], []) for _ in prompts]
    for steps in Session(edited(gemma.model, edits, len(prompts)), prompts, params, (), **options):
        for (ids, logprobs), step in zip(rows, steps, strict=True):
            ids += step.tokens
            logprobs += step.logprobs
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_site_patched_with_its_own_values_changes_nothing_bit_for_bit(make_config, with_random_norms, dtype):
    """All at once, and one alone, against the captured logits and the baseline."""
    config = make_config("own", num_layers=1)
    gemma = Gemma(config, with_random_norms(Decoder(config, rngs=nnx.Rngs(3), dtype=dtype)))
    tokens = np.random.default_rng(2).integers(0, 128, (2, 16))
    names = [name for name in sites.shapes(config) if not name.endswith("attn_weights")]
    if dtype == "bfloat16":  # where XLA would keep values unrounded; compiling for bfloat16 takes long on CPU
        names = [name for name in names if name.endswith(("embed", "heads", "_mid", "_out", "_post", "logits"))]
    own = interp.capture(gemma, tokens, names)
    assert own["layers.0.heads"].dtype == dtype
    want = np.asarray(interp.run(gemma, tokens))
    np.testing.assert_array_equal(own["logits"], want)
    np.testing.assert_array_equal(gemma.logits(tokens, edits=[Patch(name, own[name]) for name in names]), want)
    np.testing.assert_array_equal(
        gemma.logits(tokens, edits=[Patch("layers.0.mlp_out", own["layers.0.mlp_out"])]), want
    )
    if dtype == "bfloat16":
        return
    zeros = [Apply(name, add_zero, (jnp.zeros(2),)) for name in names]
    np.testing.assert_array_equal(gemma.logits(tokens, edits=zeros), want)


def add_zero(x: jax.Array, zero: jax.Array) -> jax.Array:
    """Steering by zeros that nothing leaves out."""
    return x + zero[0].astype(x.dtype)


def test_steering_with_zero_is_the_plain_forward_bit_for_bit(gemma, tokens):
    for edit in (Add("*.resid_post", np.zeros(32)), Add("embed", VECTOR, 0), Scale("layers.1.heads", 1.0)):
        np.testing.assert_array_equal(gemma.logits(tokens, edits=[edit]), gemma.logits(tokens))
        prompts = [tokens[0, :11].tolist(), tokens[1, :3].tolist()]
        plain = gemma.generate(prompts, max_new_tokens=6, logprobs=1)
        assert gemma.generate(prompts, max_new_tokens=6, logprobs=1, edits=[edit]) == plain


def test_generation_with_edits_that_change_nothing_is_the_baseline_bit_for_bit(gemma):
    """Zeros that nothing leaves out, and own activations of a prompt: prefill in chunks and the decode loop."""
    prompt = np.random.default_rng(5).integers(0, 128, 16).tolist()
    long = np.random.default_rng(6).integers(0, 128, 45).tolist()
    want = drawn(gemma, [prompt], [BASELINE])
    own = interp.capture(gemma, [prompt], ["layers.0.resid_post"])["layers.0.resid_post"]
    assert drawn(gemma, [prompt], [Patch("layers.0.resid_post", own)]) == want
    zero = Apply("layers.*.resid_post", add_zero, (jnp.zeros(2),))
    assert drawn(gemma, [long], [zero], prefill_chunk=16) == drawn(gemma, [long], [BASELINE], prefill_chunk=16)


def test_a_plain_forward_has_no_trace_of_the_sites(gemma, tokens):
    """What keeps the sites of an edited forward apart is a conditional on CPU, a barrier elsewhere."""
    decoder, array, where = gemma.model, jnp.asarray(tokens), Places.plain(2, 16)
    steered = edited(decoder, [Add("embed", VECTOR)], 2)
    plain, other = (jax.jit(lambda m, *inputs: m(*inputs)).lower(m, array, where).as_text() for m in (decoder, steered))
    for trace in ("stablehlo.case", "optimization_barrier"):
        assert trace not in plain
    assert "stablehlo.case" in other or "optimization_barrier" in other


def test_a_stream_is_edited_as_generation_is(gemma, tokens):
    prompt, edits = tokens[0].tolist(), [Add("layers.1.resid_post", VECTOR, 5.0, [15])]
    pieces = gemma.stream(prompt, max_new_tokens=6, edits=edits)
    want = gemma.generate(prompt, max_new_tokens=6, edits=edits).tokens
    assert [token for piece in pieces for token in piece.tokens] == want
    assert want != gemma.generate(prompt, max_new_tokens=6).tokens


def test_an_edited_forward_differs_from_the_plain_one_by_rounding_alone(gemma, tokens):
    np.testing.assert_allclose(interp.run(gemma, tokens), gemma.logits(tokens), atol=TOLERANCE, rtol=0)


def test_a_patch_from_another_prompt_gives_what_the_layers_above_make_of_it(gemma, tokens):
    """The stream after layer 0, at positions 3 to 6 that of another prompt, through layer 1, norm and head by hand."""
    other = np.random.default_rng(9).integers(0, 128, (1, 16))
    values = interp.capture(gemma, other, ["layers.0.resid_post"])["layers.0.resid_post"]
    x = gemma.hidden_states(tokens)[1].at[:, 3:7].set(values[:, 3:7])
    decoder = gemma.model
    x, _ = jax.jit(lambda layer, x: layer(x, Places.plain(2, 16)))(decoder.layers[1], x)
    want = decoder.logits(decoder.final_norm(x))
    for positions in (range(3, 7), slice(3, 7), [3, 4, 5, 6], jnp.arange(3, 7)):
        got = gemma.logits(tokens, edits=[Patch("layers.0.resid_post", values, positions)])
        np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    assert np.abs(got - gemma.logits(tokens)).max() > 0.1


def test_an_ablated_head_is_a_head_without_its_rows_of_w_o(gemma, tokens):
    want = changed(gemma, "layers.1.attn.w_o", lambda w: w.at[2].set(0.0)).logits(tokens)
    for edit in (Ablate("layers.1.heads", [2]), Scale("layers.1.heads", 0.0, [2])):
        np.testing.assert_allclose(gemma.logits(tokens, edits=[edit]), want, atol=TOLERANCE, rtol=0)
    half = changed(gemma, "layers.1.attn.w_o", lambda w: w.at[2].mul(0.5)).logits(tokens)
    got = gemma.logits(tokens, edits=[Scale("layers.1.heads", 0.5, [2])])
    np.testing.assert_allclose(got, half, atol=TOLERANCE, rtol=0)


def test_an_ablated_layer_is_a_layer_less(gemma, tokens):
    config = gemma.config
    decoder = Decoder(config.replace("layers", (config.layers[0],)), rngs=nnx.Rngs(0))
    decoder.embedder, decoder.final_norm = gemma.model.embedder, gemma.model.final_norm
    decoder.layers = nnx.List([gemma.model.layers[0]])
    want = Gemma(decoder.config, decoder).logits(tokens)
    got = gemma.logits(tokens, edits=[Ablate("layers.1.*_out")])
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_a_mean_takes_the_place_of_neurons_and_edits_go_in_the_order_given(gemma, tokens):
    site, mean = "layers.0.mlp_hidden", np.linspace(-1, 1, 48)
    got = interp.capture(gemma, tokens, [site], edits=[Ablate(site, [0, 47], mean), Scale(site, 2.0), Add(site, 1.0)])
    want = 2 * np.asarray(interp.capture(gemma, tokens, [site])[site])
    want[..., [0, 47]] = [-2.0, 2.0]
    np.testing.assert_allclose(got[site], want + 1.0, atol=1e-6)


EDITS = [
    Add("layers.1.resid_post", VECTOR, 2.0),
    Add("layers.0.v", np.ones((2, 8)), positions=slice(20, None)),
    Patch("layers.1.mlp_out", np.random.default_rng(3).normal(size=(1, 40, 32)), [2, 17, 18, 36, 39]),
    Scale("layers.0.heads", 0.3, [1, 3], range(5, 30)),
    Add("logits", np.random.default_rng(4).normal(size=128), 3.0, slice(37, None)),
]


@pytest.mark.parametrize("chunk", [16, 512])
def test_generation_with_edits_is_the_whole_forward_with_edits_again_and_again(gemma, chunk):
    """Two rows of unequal length; positions before, in and after the prompts; a patch that ends in the answer."""
    prompts = [np.random.default_rng(seed).integers(0, 128, length).tolist() for seed, length in ((7, 35), (8, 6))]
    got = drawn(gemma, prompts, EDITS, prefill_chunk=chunk)
    for prompt, (ids, logprobs) in zip(prompts, got, strict=True):
        row = np.zeros((1, 48), np.int32)
        row[0, : len(prompt) + 10] = prompt + ids
        logits = np.asarray(gemma.logits(row, edits=EDITS))[0, len(prompt) - 1 : len(prompt) + 9]
        assert ids == logits.argmax(-1).tolist()
        np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[np.arange(10), ids], atol=1e-4)
        assert ids != np.asarray(gemma.logits(row))[0, len(prompt) - 1 : len(prompt) + 9].argmax(-1).tolist()


def test_padding_does_not_move_the_positions_of_edits(gemma):
    tokens = np.random.default_rng(1).integers(0, 128, (1, 12))
    edits = [Add("layers.1.resid_post", VECTOR, positions=[4]), Patch("embed", np.ones((1, 3, 32)))]
    want = gemma.logits(tokens, edits=edits)
    padded, mask = np.pad(tokens, ((0, 0), (4, 0))), np.arange(16)[None] >= 4
    got = gemma.logits(padded, mask=mask, edits=edits)
    np.testing.assert_allclose(got[:, 4:], want, atol=TOLERANCE, rtol=0)


def test_new_vectors_and_positions_compile_nothing_anew(gemma, tokens):
    def steer(vector, scale, place):
        edits = [Add("layers.1.resid_post", vector, scale, [place])]
        gemma.logits(tokens, edits=edits)
        gemma.generate(tokens[0].tolist(), max_new_tokens=3, edits=edits)
        return forward.logits._cache_size(), engine.prefill_chunk._cache_size(), engine.decode_chunk._cache_size()

    sizes = steer(VECTOR, 1.0, 3)
    assert steer(jnp.asarray(-VECTOR), 2, 7) == sizes
    assert steer(VECTOR.astype(np.float32), np.float64(3), 0) == sizes


def test_edits_are_differentiable(gemma, tokens):
    def loss(vector):
        return jnp.mean(interp.run(gemma, tokens, edits=[Add("layers.0.resid_post", vector)])[..., 5])

    gradient, step = jax.grad(loss)(jnp.zeros(32)), 1e-2 * VECTOR
    want = (loss(jnp.asarray(step)) - loss(jnp.asarray(-step))) / 2
    np.testing.assert_allclose(gradient @ step, want, rtol=2e-2)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (Add("layers.9.resid_post", VECTOR), ValueError, "no site is called 'layers.9.resid_post'"),
        (Add("embed", np.ones(31)), ValueError, r"Add at 'embed': vector has shape \(31,\); wanted \[32\]"),
        (Add("layers.0.q", np.ones((2, 8))), ValueError, r"wanted \[4, 8\]"),
        (Add("embed", VECTOR, np.ones(2)), ValueError, r"scale has shape \(2,\); wanted a number"),
        (Patch("embed", np.ones((3, 4, 32))), ValueError, r"shape \(3, 4, 32\); wanted \[1 or 2, T, 32\]"),
        (Patch("embed", np.ones(32)), ValueError, r"wanted \[1 or 2, T, 32\]"),
        (Scale("layers.*.heads", 0.0, [4]), ValueError, r"units is \[4\]; wanted a list of numbers, 0 to 3"),
        (Ablate("layers.0.attn_weights"), ValueError, "can be captured, not changed"),
        (Ablate("layers.0.attn_out", mean=np.ones(3)), ValueError, r"mean has shape \(3,\)"),
        (Apply("embed", lambda x: x[0]), ValueError, r"gave shape \(16, 32\) for \(2, 16, 32\)"),
        ("embed", TypeError, "wanted a list of Add, Patch"),
    ],
)
def test_edits_that_do_not_fit_are_refused(gemma, tokens, edit, error, words):
    with pytest.raises(error, match=words):
        gemma.logits(tokens, edits=[edit])


@pytest.mark.parametrize("positions", [(0.5,), 3, slice(5, 2), slice(0, 8, 2), [-1], "ab"])
def test_what_are_no_positions_is_refused(positions):
    with pytest.raises((TypeError, ValueError), match="positions is"):
        Add("embed", VECTOR, positions=positions)
