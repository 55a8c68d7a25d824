"""Rows read from a checkpoint as tokens come."""

import functools

import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax import loading, mapped


@pytest.fixture(scope="module")
def open_rows(tiny_3n, tmp_path_factory):
    """Opens the saved model's rows, and says which reads of the file they come from."""
    folder = tmp_path_factory.mktemp("saved")

    def of(format):
        path = folder / format
        if not path.exists():
            gj.Gemma(tiny_3n.config, tiny_3n).save(path, format=format)
        rows = mapped.MappedRows(path, functools.partial(loading.open_weights, config=tiny_3n.config), "float32")
        reads, read = [], rows._weights.read

        def noted(path, out, region):
            reads.append((region[0].start, region[0].stop))
            read(path, out, region)

        rows._weights.read = noted
        return rows, reads

    return of


@pytest.mark.parametrize("format", ["orbax", "huggingface"])
def test_rows_are_those_of_the_table(open_rows, tiny_3n, format):
    rows, _ = open_rows(format)
    tokens = np.asarray([[3, 119, 3], [0, 50, 49]])
    np.testing.assert_array_equal(rows(tokens), np.asarray(tiny_3n.embedder.ple[...])[tokens])
    assert rows(tokens[0, 0]).shape == rows.shape[1:]


def test_rows_of_a_stored_piece_are_read_together(open_rows):
    """Orbax reads and verifies a piece whole for each of them; safetensors reads a row alone."""
    for format, want in (("orbax", [(3, 8)]), ("huggingface", [(3, 4), (5, 6), (7, 8)])):
        rows, reads = open_rows(format)
        rows(np.asarray([7, 3, 5, 3]))
        assert reads == want
    rows, reads = open_rows("orbax")
    rows._num_together = 5
    rows(np.asarray([9, 1, 4, 5]))
    assert reads == [(1, 5), (5, 10)]


def test_rows_seen_last_are_kept(open_rows, tiny_3n, monkeypatch):
    monkeypatch.setattr(mapped, "NUM_RECENT", 2)
    rows, reads = open_rows("huggingface")
    for token in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2
        np.testing.assert_array_equal(rows(np.asarray([token]))[0], tiny_3n.embedder.ple[...][token])
    assert [start for start, _ in reads] == [1, 2, 3, 2]
    assert len(rows(np.asarray([4, 5, 6]))) == 3  # more at once than are kept
    assert list(rows._recent) == [5, 6]
