"""`Gemma` without files: what users call, and what they get told when they call it wrongly."""

import types

import jax
import numpy as np
import pytest

from gemma_jax.model import Gemma


@pytest.fixture(scope="module")
def gemma(tiny_model) -> Gemma:
    return Gemma(tiny_model.config, tiny_model)


def test_one_prompt_gives_an_answer_and_several_a_list(gemma, plain_greedy):
    prompt = [5, 9, 20]
    want = plain_greedy(prompt, 6)
    stop = next((i for i, token in enumerate(want) if token in gemma.stop_ids), None)
    want = want if stop is None else want[: stop + 1]
    assert gemma.generate(prompt, max_new_tokens=6).tokens == want
    assert gemma.generate(np.array(prompt), max_new_tokens=6).tokens == want
    assert [done.tokens for done in gemma.generate([prompt, prompt], max_new_tokens=6)] == [want, want]
    streamed = [token for piece in gemma.stream(prompt, max_new_tokens=6) for token in piece.tokens]
    assert streamed == want


def test_equal_seeds_draw_alike_and_a_list_gives_each_row_its_own(gemma):
    options = {"temperature": 2.0, "max_new_tokens": 8, "ignore_eos": True}
    a, b = gemma.generate([[5], [5]], seed=3, **options)
    assert a.tokens == b.tokens
    a, b = gemma.generate([[5], [5]], seed=[3, 4], **options)
    assert a.tokens != b.tokens
    assert b.tokens == gemma.generate([5], seed=4, **options).tokens


def test_logits_and_hidden_states_take_padding_on_either_side(gemma, plain_logits):
    tokens = [5, 9, 20, 3, 77]
    want = plain_logits(tokens)
    left, right = np.zeros((2, 2, 8), np.int32)
    left[:, 3:], right[:, :5] = tokens, tokens
    columns = np.arange(8)
    masks = np.stack([columns >= 3] * 2), np.stack([columns < 5] * 2)
    for padded, mask, real in ((left, masks[0], slice(3, 8)), (right, masks[1], slice(0, 5))):
        np.testing.assert_allclose(gemma.logits(padded, mask=mask)[0, real], want, atol=1e-4, rtol=0)
        states = gemma.hidden_states(padded, mask=mask)
        assert states.shape == (gemma.config.num_layers + 1, 2, 8, gemma.config.width)
        last = jax.jit(lambda model, x: model.logits(x))(gemma.model, states[-1, 0, real])
        np.testing.assert_allclose(last, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"min_p": 2}, "min_p is 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens is 1\.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 prompts"),
        ({"stop": ""}, "stop"),
        ({"stop": "x"}, "tokenizer"),
        ({"temperature": 10**400}, "temperature is 1000"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(gemma, options, words):
    with pytest.raises(ValueError, match=words):
        gemma.generate([5, 9], **options)


def test_the_smallest_top_p_or_temperature_takes_the_best_token_and_seeds_may_be_of_numpy(gemma):
    best = gemma.generate([5, 9], max_new_tokens=4).tokens
    for changes in ({"top_p": 1e-46}, {"top_p": 5e-324}, {"temperature": 2e-38}, {"temperature": 1e-40}):
        options = {"temperature": 1.0, "seed": np.int32(3), **changes}
        assert gemma.generate([5, 9], max_new_tokens=4, **options).tokens == best


def test_the_tokenizer_says_which_ids_end_an_answer(gemma):
    """`<end_of_turn>` is 106 in Gemma 3's vocabulary and 107 in its forerunners'."""
    tokenizer = types.SimpleNamespace(stop_ids=(1, 107))
    assert Gemma(gemma.config, gemma.model, tokenizer).stop_ids == (1, 107)
    assert Gemma(gemma.config, gemma.model).stop_ids == (1, 106)


def test_an_unknown_option_is_refused_with_those_there_are(gemma):
    with pytest.raises(TypeError, match=r"max_tokens; there are max_new_tokens"):
        gemma.generate([5], max_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], ValueError, "batch is empty"),
        ([[]], ValueError, "prompt 0 is empty"),
        ([999], ValueError, "id 999"),
        ([2] * 400, ValueError, "at most 320"),
        ("text", ValueError, "tokenizer"),
        (7, TypeError, "int"),
        (b"text", TypeError, "bytes"),
    ],
)
def test_bad_prompts_are_refused(gemma, prompt, error, words):
    with pytest.raises(error, match=words):
        gemma.generate(prompt)


def test_a_stream_has_one_prompt_and_chat_needs_a_tokenizer(gemma):
    with pytest.raises(ValueError, match="one prompt"):
        gemma.stream([[1], [2]])
    with pytest.raises(ValueError, match="tokenizer"):
        gemma.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("tokens", "mask", "words"),
    [
        ([1, 2], None, r"shape \(2,\)"),
        ([[]], None, r"shape \(1, 0\)"),
        ([[1, 128]], None, "id 128"),
        ([[1, 2]], [[True]], r"mask has shape \(1, 1\)"),
    ],
)
def test_bad_arrays_are_refused(gemma, tokens, mask, words):
    for call in (gemma.logits, gemma.hidden_states):
        with pytest.raises(ValueError, match=words):
            call(tokens, mask=mask)
