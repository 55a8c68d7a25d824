"""Tiny random models, saved by transformers and loaded by us: the same logits and hidden states, in float32."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

import gemma_jax
from gemma_checkpoints import CheckpointError

transformers = pytest.importorskip("transformers")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # the bound on logits of order 1, in float32
LENGTH, VOCAB = 29, 97
GEMMA3: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,  # one turn of 5:1 and a local layer
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "query_pre_attn_scalar": 12,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}
EARLIER: dict[str, Any] = {**GEMMA3, "num_hidden_layers": 3, "max_position_embeddings": 64}
SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of transformers, by its family's name, and how its config differs from the base above."""

    family: str
    changes: dict[str, Any]

    def config(self) -> Any:
        base = GEMMA3 if self.family == "Gemma3Text" else EARLIER
        values = {**base, **self.changes}
        if self.family == "Gemma":
            del values["query_pre_attn_scalar"], values["sliding_window"]
        return getattr(transformers, f"{self.family}Config")(**values)

    def model(self) -> Any:
        return getattr(transformers, f"{self.family.removesuffix('Text')}ForCausalLM")(self.config())


CASES = {
    "gemma 3": Case("Gemma3Text", {}),
    "one key head for all": Case("Gemma3Text", {"num_key_value_heads": 1, "num_attention_heads": 4}),
    "a key head each, wide heads": Case("Gemma3Text", {"num_key_value_heads": 4, "head_dim": 16}),
    "global positions scaled": Case("Gemma3Text", {"rope_parameters": SCALED, "query_pre_attn_scalar": 3}),
    "window of one": Case("Gemma3Text", {"sliding_window": 1, "num_hidden_layers": 6}),
    "other turns, head apart, soft cap": Case(
        "Gemma3Text",
        {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2 + ["full_attention"],
            "tie_word_embeddings": False,
            "final_logit_softcapping": 1.5,
            "sliding_window": 40,  # longer than the text
        },
    ),
    "gemma 2": Case("Gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.5}),
    "gemma 1": Case("Gemma", {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, randomise, tmp_path_factory):
    """A model of transformers, and ours from the folder it saved; some folders have several shards."""
    theirs = randomise(CASES[request.param].model(), seed=list(CASES).index(request.param))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder, max_shard_size="40KB" if request.param == "gemma 3" else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "gemma 3")
    return theirs, gemma_jax.load(folder, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def batch():
    """Token ids of two rows, both longer than the window, and a mask that pads the second on the left."""
    tokens = np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH))
    mask = np.ones((2, LENGTH), bool)
    mask[1, :9] = False
    return tokens, mask


def largest(got: Any, want: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - want).max())


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "left padded"])
def test_logits_equal_those_of_transformers(pair, batch, reference, is_padded):
    theirs, ours = pair
    tokens, mask = batch[0], batch[1] | (not is_padded)
    want, _ = reference(theirs, tokens, mask)
    got = np.asarray(ours.logits(tokens, mask=mask))
    assert 0.3 < want[mask].std() < 5  # of order 1, so that the bound means something
    assert largest(got[mask], want[mask]) <= TOLERANCE


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "left padded"])
def test_every_hidden_state_equals_that_of_transformers(pair, batch, reference, is_padded):
    theirs, ours = pair
    tokens, mask = batch[0], batch[1] | (not is_padded)
    _, want = reference(theirs, tokens, mask)
    got = np.asarray(ours.hidden_states(tokens, mask=mask))
    assert got.shape == want.shape
    scale = np.abs(want[:, mask]).max(axis=(1, 2))  # of each layer: the stream grows
    errors = np.abs(got[:, mask] - want[:, mask]).max(axis=(1, 2))
    assert (errors <= TOLERANCE * np.maximum(scale, 1)).all(), dict(enumerate(errors))


@pytest.fixture(scope="module")
def multimodal(randomise, tmp_path_factory):
    """A model with a vision tower, and its folder."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**GEMMA3, "rope_parameters": SCALED},
        vision_config={**vision, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4},
        mm_tokens_per_image=16,
        image_token_index=VOCAB - 1,
        attn_implementation="eager",
    )
    theirs = randomise(transformers.Gemma3ForConditionalGeneration(config), seed=99)
    folder = tmp_path_factory.mktemp("multimodal")
    theirs.save_pretrained(folder)
    return theirs, folder


def test_the_text_part_of_a_multimodal_model_equals_transformers(multimodal, batch, reference):
    theirs, folder = multimodal
    tokens, mask = batch[0] % (VOCAB - 1), batch[1]  # no image tokens
    want, _ = reference(theirs, tokens, mask)
    ours = gemma_jax.load(folder, dtype="float32", progress=False)
    assert largest(np.asarray(ours.logits(tokens, mask=mask))[mask], want[mask]) <= TOLERANCE


# weight_names.md, section 3: what stands before the decoder's, the tower's and the projector's names in a release
STYLES = {
    "A": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "B": ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
    "C": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "ShieldGemma 2": (
        "model.language_model.model.",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_names_is_the_same_model(multimodal, tmp_path, style):
    theirs, folder = multimodal
    weights = {}
    for name, weight in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        for memory, file in zip(STYLES["C"], STYLES[style], strict=True):
            if name.startswith(memory):
                weights[file + name.removeprefix(memory)] = weight.numpy()
                break
        else:
            raise AssertionError(name)
    safetensors_numpy.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours = gemma_jax.load(tmp_path, dtype="float32", progress=False)
    embedding = theirs.get_input_embeddings().weight.detach().numpy()
    tokens = np.arange(9)[None]
    np.testing.assert_array_equal(
        np.asarray(ours.model.embed(tokens)), embedding[tokens] * np.float32(GEMMA3["hidden_size"] ** 0.5)
    )


def test_an_untied_head_that_is_missing_is_named(multimodal, tmp_path):
    theirs, folder = multimodal
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    weights = {name: w.numpy() for name, w in theirs.state_dict().items() if name != "lm_head.weight"}
    safetensors_numpy.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing"):
        gemma_jax.load(tmp_path, progress=False)
