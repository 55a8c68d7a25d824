"""LoRA adapters, merged and by themselves: against the formula on Hugging Face's own matrices."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_checkpoints
import gemma_jax as gj
from gemma_checkpoints import CheckpointError, GGUFReader
from gemma_jax import loading

TOKENS = [[2, 9, 30, 5, 5, 77]]
TARGETS = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48, "down_proj": 32}
INPUTS = {"o_proj": 32, "down_proj": 48}  # all others read the stream, 32 wide


def module(layer: int, target: str) -> str:
    room = "self_attn" if target[0] in "qkvo" and target != "up_proj" else "mlp"
    return f"layers.{layer}.{room}.{target}"


def write_adapter(path: Path, *, ranks=None, prefix="base_model.model.model.", suffix="", **config) -> dict[str, tuple]:
    """A PEFT folder as PEFT writes it; (A, B) by module."""
    random, pairs = np.random.default_rng(0), {}
    for layer in range(3):
        for target, outputs in TARGETS.items():
            name = module(layer, target)
            rank = (ranks or {}).get(name, 4)
            a = random.normal(size=(rank, INPUTS.get(target, 32))).astype(np.float32) * 0.2
            pairs[name] = a, random.normal(size=(outputs, rank)).astype(np.float32) * 0.2
    path.mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{prefix}{name}.lora_A{suffix}.weight": a, f"{prefix}{name}.lora_B{suffix}.weight": b}
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "bias": "none", **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return pairs


def merged(model_folder: Path, target: Path, pairs: dict[str, tuple], scale) -> Path:
    """The base with W + scale * B @ A, by numpy."""
    tensors = load_file(model_folder / "model.safetensors")
    for name, (a, b) in pairs.items():
        tensors[f"model.{name}.weight"] = tensors[f"model.{name}.weight"] + np.float32(scale(name, len(a))) * (b @ a)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (target / file).write_bytes((model_folder / file).read_bytes())
    return target


def weights(path: Path) -> dict[str, np.ndarray]:
    with gemma_checkpoints.open(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


CASES = {
    "plain": ({}, lambda name, rank: 8 / rank),
    "rank-stabilised": ({"use_rslora": True}, lambda name, rank: 8 / math.sqrt(rank)),
    "alphas by pattern": (
        {"alpha_pattern": {"layers.1.mlp.up_proj": 32, "q_proj": 2}},
        lambda name, rank: {"q_proj": 2, "up_proj": 32 if ".1." in name else 8}.get(name.split(".")[-1], 8) / rank,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("naming", [{}, {"suffix": ".default"}, {"prefix": "base_model.model.model.language_model."}])
def test_a_merged_model_is_the_formula(model_folder, tmp_path, case, naming):
    config, scale = CASES[case]
    ranks = {module(1, "q_proj"): 2, module(2, "down_proj"): 8}
    pairs = write_adapter(
        tmp_path / "adapter", ranks=ranks, rank_pattern={n: r for n, r in ranks.items()}, **naming, **config
    )
    want = merged(model_folder, tmp_path / "want", pairs, scale)
    gj.convert(model_folder, tmp_path / "got", to="huggingface", lora=tmp_path / "adapter", verify=True)
    found, wanted = weights(tmp_path / "got"), weights(want)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    logits = gj.load(model_folder, lora=tmp_path / "adapter").logits(TOKENS)
    np.testing.assert_allclose(logits, gj.load(want).logits(TOKENS), atol=2e-5)
    assert np.abs(logits - gj.load(model_folder).logits(TOKENS)).max() > 0.1


@pytest.mark.parametrize("to", ["orbax", "deepmind"])
def test_merging_works_into_every_format(model_folder, tmp_path, to):
    pairs = write_adapter(tmp_path / "adapter")
    want = merged(model_folder, tmp_path / "want", pairs, lambda name, rank: 2.0)
    gj.convert(model_folder, tmp_path / "got", to=to, lora=tmp_path / "adapter")
    np.testing.assert_allclose(gj.load(tmp_path / "got").logits(TOKENS), gj.load(want).logits(TOKENS), atol=2e-5)


def test_a_region_of_a_merged_weight_is_what_the_whole_has_there(model_folder, tmp_path):
    write_adapter(tmp_path / "adapter")
    with gemma_checkpoints.open(model_folder) as reader:
        config = loading.read_config(reader, model_folder)
        source = loading.open_weights(reader, config, tmp_path / "adapter")
        for path in ("layers_0/attn/q/kernel", "layers_1/attn/o/kernel", "layers_2/mlp/down/kernel"):
            whole = np.empty(source.entries[path].shape, np.float32)
            source.read(path, whole)
            region = tuple(slice(1, size - 1) for size in whole.shape)
            part = np.empty([size - 2 for size in whole.shape], np.float32)
            source.read(path, part, region)
            np.testing.assert_allclose(part, whole[region], atol=1e-6)


@pytest.mark.parametrize("between", ["huggingface", "gguf", "orbax"])
def test_adapters_come_back_bit_for_bit_through_every_format(model_folder, tmp_path, between):
    ranks = {module(1, "q_proj"): 2}
    pairs = write_adapter(tmp_path / "adapter", ranks=ranks, alpha_pattern={} if between == "gguf" else {"k_proj": 3})
    gj.convert_lora(tmp_path / "adapter", tmp_path / "between", base=model_folder, to=between)
    report = gj.convert_lora(tmp_path / "between", tmp_path / "back", base=model_folder, to="huggingface")
    assert report.num_tensors == 2 * len(pairs)
    found = load_file(tmp_path / "back" / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    config = loading.read_config(gemma_checkpoints.open(model_folder), model_folder)
    first, second = (loading.read_lora(tmp_path / name, config) for name in ("adapter", "back"))
    assert {path: change.scale for path, change in first.items()} == {path: c.scale for path, c in second.items()}
    assert gj.verify(tmp_path / "between").problems == ()
    assert gj.verify(tmp_path / "between").is_sealed


def test_a_gguf_adapter_is_as_llama_cpp_reads_it(model_folder, tmp_path):
    """Of one alpha for all: what differs goes into the second factor."""
    pairs = write_adapter(tmp_path / "adapter", alpha_pattern={"k_proj": 16})
    gj.convert_lora(tmp_path / "adapter", tmp_path / "a.gguf", base=model_folder, to="gguf")
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert reader.metadata["general.type"] == "adapter"
        assert reader.metadata["adapter.type"] == "lora"
        assert reader.metadata["general.architecture"] == "gemma3"
        assert reader.metadata["adapter.lora.alpha"] == 8.0
        a, b = pairs[module(0, "q_proj")]
        np.testing.assert_array_equal(reader.read("blk.0.attn_q.weight.lora_a"), a)
        np.testing.assert_array_equal(reader.read("blk.0.attn_q.weight.lora_b"), b)
        np.testing.assert_array_equal(reader.read("blk.2.attn_k.weight.lora_b"), 2 * pairs[module(2, "k_proj")][1])
    with pytest.raises(CheckpointError, match="is a LoRA adapter; load its model"):
        gj.load(tmp_path / "a.gguf")
    logits = [gj.load(model_folder, lora=tmp_path / name).logits(TOKENS) for name in ("adapter", "a.gguf")]
    np.testing.assert_allclose(*logits, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"peft_type": "IA3"}, "does not describe LoRA"),
        ({"lora_alpha": "big"}, "lora_alpha of .* is 'big'"),
        ({"alpha_pattern": [3]}, "alpha_pattern is"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "only names of modules are read"),
        ({"alpha_pattern": {"[": 3}}, "only names of modules are read"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(model_folder, tmp_path, change, problem):
    write_adapter(tmp_path / "adapter", **change)
    with pytest.raises(CheckpointError, match=problem):
        gj.convert(model_folder, tmp_path / "out", to="huggingface", lora=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", np.ones((4, 32)), "no matrix of the model"),
        (
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
            np.ones((4, 31)),
            r"has shapes \[4, 31\] and \[48",
        ),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", np.ones((3, 32)), r"the model wants \[r, 32\]"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", np.ones((4, 32)), "no lora_A or lora_B of a linear"),
        ("base_model.model.model.norm.lora_A.weight", np.ones((4, 32)), "'norm.weight' is no matrix"),
    ],
)
def test_an_adapter_of_another_model_is_refused_before_anything_is_written(
    model_folder, tmp_path, name, array, problem
):
    write_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {name: array.astype(np.float32)}, file)
    with pytest.raises(CheckpointError, match=problem):
        gj.convert(model_folder, tmp_path / "out", to="huggingface", lora=tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=problem):
        gj.load(model_folder, lora=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_lacks_a_factor_or_is_a_pickle_is_refused(model_folder, tmp_path):
    write_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    del whole["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(whole, file)
    with pytest.raises(CheckpointError, match=r"'layers.1.mlp.up_proj.weight' has A; wanted A and B"):
        gj.load(model_folder, lora=tmp_path / "adapter")
    file.rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles .* are never read"):
        gj.load(model_folder, lora=tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="is no adapter"):
        gj.load(model_folder, lora=model_folder)
    with pytest.raises(FileNotFoundError, match="give the folder or file of an adapter"):
        gj.load(model_folder, lora=tmp_path / "none")
    write_adapter(tmp_path / "good")
    with pytest.raises(ValueError, match="adapters are written as"):
        gj.convert_lora(tmp_path / "good", tmp_path / "out", base=model_folder, to="deepmind")


@pytest.mark.parity
def test_transformers_computes_the_same_with_merged_weights(model_folder, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra brings the reference")
    transformers = pytest.importorskip("transformers")
    pairs = write_adapter(tmp_path / "adapter")
    model = transformers.Gemma3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            model.get_submodule(f"model.{name}").weight += 2.0 * torch.from_numpy(b) @ torch.from_numpy(a)
        want = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(gj.load(model_folder, lora=tmp_path / "adapter").logits(TOKENS), want, atol=2e-5)
