"""The benchmark of 3n's decoder: its shape is E2B's, its file loads, its table says ratios."""

import numpy as np

import gemma_jax as gj
from benchmarks import gemma3n
from gemma_jax import configs


def test_with_all_layers_it_is_e2b():
    whole = configs.get("gemma-3n-e2b").decoder
    assert gemma3n.config(30).layers == whole.layers
    small = gemma3n.config(15)
    assert [spec.kv_source for spec in small.layers[10:]] == [8, 8, 8, 8, 9]


def test_its_weights_load_and_run(tmp_path):
    changes = [("vocab_size", 64), ("width", 32), ("layers.*.ffw_width", 48), ("per_layer_embedding.num_rows", 64)]
    shape = gemma3n.config(15).replace_all([*changes, ("per_layer_embedding.width", 8)])
    gemma3n.make(tmp_path / "model", shape)
    gemma = gj.load(tmp_path / "model", dtype="float32", progress=False)
    assert np.isfinite(np.asarray(gemma.logits([[2, 5, 9]]))).all()


def test_the_table_has_ratios():
    row = {"prefill": 300.0, "decode": 12.0, "peak_mib": 500.0}
    peers = {
        "gemma_jax": row,
        "gemma_jax, mapped": row,
        "Hugging Face": {"prefill": 100.0, "decode": 10.0, "peak_mib": 1000.0},
    }
    text = gemma3n.markdown(
        {"peers": peers, "machine": {"cpu": "c"}, "layers": 15, "prompt": 8, "threads": 2, "repeats": 1}
    )
    assert "| gemma_jax, ratio | 3.00x | 1.20x | 0.50x |" in text
