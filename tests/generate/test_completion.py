import pytest

from gemma_jax.generate.completion import answers, complete, pieces
from gemma_jax.generate.engine import Session
from gemma_jax.generate.sampling import SamplingParams

PROMPTS = [[5, 9, 20, 3], [7, 1]]


@pytest.fixture
def run(tiny_model, characters):
    def run(prompts=PROMPTS, stop_ids=(), tokenizer=characters, **options):
        options = {"max_new_tokens": 24, **options}
        session = Session(tiny_model, prompts, [SamplingParams(**options)] * len(prompts), stop_ids)
        return complete(session, tokenizer, stop_ids)

    return run


def test_an_answer_is_the_text_of_its_tokens(run, plain_greedy, characters):
    for prompt, done in zip(PROMPTS, run(), strict=True):
        assert done.tokens == plain_greedy(prompt, 24)
        assert done.text == characters.decode(done.tokens)
        assert (done.finish_reason, done.prompt_tokens, done.logprobs) == ("length", len(prompt), None)


def test_a_stop_text_across_tokens_ends_the_answer_and_is_not_in_it(run, characters):
    whole = run()[0]
    stop = whole.text[10:13]  # three tokens, and chunks end after 1, 3, 7 and 15
    at = whole.text.index(stop)
    done = run(stop=(stop, "never there"))[0]
    assert (done.text, done.finish_reason) == (whole.text[:at], "stop")
    assert done.tokens == whole.tokens[: at + 3]


def test_rows_stop_each_for_itself(run):
    whole = run()
    stop = whole[0].text[4:6]
    done = run(stop=(stop,))
    assert done[0].finish_reason == "stop"
    if stop not in whole[1].text:
        assert done[1].text == whole[1].text


def test_a_stop_id_is_among_the_tokens_and_not_in_the_text(run, characters):
    whole = run()[0]
    stop = whole.tokens[6]
    at = whole.tokens.index(stop)
    done = run(PROMPTS[:1], stop_ids=(stop,))[0]
    assert done.tokens == whole.tokens[: at + 1]
    assert done.text == characters.decode(whole.tokens[:at])
    assert done.finish_reason == "stop"
    assert run(PROMPTS[:1], stop_ids=(stop,), ignore_eos=True)[0].tokens == whole.tokens


def test_a_stream_is_the_answer_in_pieces(tiny_model, characters, run):
    params = [SamplingParams(max_new_tokens=24, stop=("zz",))]
    session = Session(tiny_model, PROMPTS[:1], params, ())
    parts = [part for (part,) in pieces(session, answers(session, characters, ()))]
    done = run(PROMPTS[:1], stop=("zz",))[0]
    assert "".join(part.text for part in parts) == done.text
    assert [token for part in parts for token in part.tokens] == done.tokens
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason == done.finish_reason
    assert len(parts) > 3


def test_log_probabilities_come_as_many_as_were_asked_for(run):
    done = run(logprobs=0)[0]
    assert len(done.logprobs) == 24
    assert done.top_logprobs is None
    done = run(logprobs=2)[0]
    assert [len(top) for top in done.top_logprobs] == [2] * 24
    assert all(max(top.values()) == chosen for top, chosen in zip(done.top_logprobs, done.logprobs, strict=True))


def test_without_a_tokenizer_there_are_tokens_and_no_text(run):
    done = run(tokenizer=None)[0]
    assert done.text is None
    assert len(done.tokens) == 24
