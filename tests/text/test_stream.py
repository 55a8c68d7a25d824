from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.text.stream import StreamDecoder


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_tokens_in_any_chunks_give_what_decode_gives(tokenizer, data):
    """Any ids, so also bytes that are no UTF-8."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    stream = StreamDecoder(tokenizer)
    chunks = [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(map(stream.push, chunks)) + stream.finish() == tokenizer.decode(ids)


@given(text=st.text(max_size=12), size=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_no_piece_holds_part_of_a_character(tokenizer, text, size):
    ids, stream, shown = tokenizer.encode(text, bos=False), StreamDecoder(tokenizer), ""
    for start in range(0, len(ids), size):
        piece = stream.push(ids[start : start + size])
        assert text.startswith(shown + piece)  # a broken character would be U+FFFD here
        shown += piece
    assert shown + stream.finish() == text


def test_a_character_comes_with_its_last_byte(tokenizer):
    ids, stream = tokenizer.encode("☃", bos=False), StreamDecoder(tokenizer)
    assert [stream.push([i]) for i in ids] == ["", "", "☃"]
    assert stream.push(ids[:2]) == ""
    assert stream.finish() == "\ufffd"


def test_a_row_beyond_the_vocabulary_is_shown_as_a_broken_character(tokenizer):
    decoder = StreamDecoder(tokenizer)
    assert decoder.push([tokenizer.vocab_size + 3, *tokenizer.encode("hi", bos=False)]) == "\ufffdhi"
