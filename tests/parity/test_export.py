"""What we write, transformers loads unchanged: the same logits, in float32."""

import numpy as np
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax.configs.gemma1 import GEMMA1_2B
from gemma_jax.configs.gemma2 import GEMMA2_2B
from gemma_jax.configs.gemma3 import GEMMA3_4B
from gemma_jax.nn.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
SMALL = [
    ("vocab_size", 97),
    ("width", 32),
    ("context", 128),
    ("attention.num_heads", 4),
    ("attention.num_kv_heads", 2),
    ("attention.head_dim", 8),
]
CONFIGS = {
    "gemma 3, positions scaled": GEMMA3_4B.replace_all(
        [
            *SMALL,
            ("layers", GEMMA3_4B.layers[:7]),
            ("layers.*.ffw_width", 48),
            ("attention.local.window", 6),
            ("attention.query_pre_attn_scalar", 12.0),
        ]
    ),
    "gemma 2": GEMMA2_2B.replace_all(
        [*SMALL, ("layers", GEMMA2_2B.layers[:3]), ("layers.*.ffw_width", 48), ("attention.local.window", 6)]
    ),
    "gemma 1": GEMMA1_2B.replace_all(
        [*SMALL, ("layers", GEMMA1_2B.layers[:2]), ("layers.*.ffw_width", 48), ("attention.query_pre_attn_scalar", 8.0)]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_logits_from_our_export(name, tmp_path, with_random_norms):
    config = CONFIGS[name].replace("vision", None)
    gemma = gj.Gemma(config, with_random_norms(Decoder(config, rngs=nnx.Rngs(1))))
    gemma.save(tmp_path / "out", format="huggingface")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 29))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(gemma.logits(tokens), wanted, atol=TOLERANCE, rtol=0)
