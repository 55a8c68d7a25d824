"""The committed fixture is what the installed transformers computes from its weights."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


def test_transformers_computes_the_outputs_again(text_fixture):
    config = transformers.Gemma3TextConfig(**json.loads(bytes(text_fixture["config_json"])))
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForCausalLM(config).eval()
    weights = {name[2:]: torch.from_numpy(value) for name, value in text_fixture.items() if name.startswith("w:")}
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unknown
    ids = torch.from_numpy(text_fixture["x:input_ids"])
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)
        padded = model(
            ids,
            attention_mask=torch.from_numpy(text_fixture["x:pad_mask"]),
            position_ids=torch.from_numpy(text_fixture["x:pad_positions"]),
        )
    np.testing.assert_allclose(plain.logits, text_fixture["x:logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.stack(plain.hidden_states), text_fixture["x:hidden"], atol=5e-5, rtol=0)
    real = text_fixture["x:pad_mask"].astype(bool)
    np.testing.assert_allclose(padded.logits[real], text_fixture["x:pad_logits"][real], atol=1e-5, rtol=0)
