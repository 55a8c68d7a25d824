"""Slices of a MatFormer model: against a hand-cut model, from files and in memory, and the published configurations."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_jax as gj
from gemma_jax import configs, interp, matformer
from gemma_jax.cli.main import main
from gemma_jax.configs import slicing as slices
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.slicing import Slicing
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import CPU_LAYOUT
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.sliced import SharedSlice
from tests import tpu

TOKENS = np.random.default_rng(0).integers(0, 128, (1, 16))
LOGIT_TOLERANCE = 1e-3  # float32: a sparsity threshold amplifies rounding, which varies by vector units
SLICINGS = {
    "narrow": Slicing(ffw=24),
    "skip a turn of sharers": Slicing(skip=(5, 6)),
    "mix and match": Slicing(skip=(1, 6), ffw=(64, 8, 48, 40, 1, 33)),
    "whole": Slicing(),
}


@pytest.fixture(scope="module")
def gemma(tiny_3n):
    return gj.Gemma(dataclasses.replace(tiny_3n.config, name="parent"), tiny_3n)


def by_hand(model, slicing):
    """The slice's weights cut with numpy, by canonical path."""
    config = model.config
    kept = [i for i in range(config.num_layers) if i not in slicing.skip]
    widths = (
        slicing.ffw if isinstance(slicing.ffw, tuple) else [slicing.ffw or config.layers[i].ffw_width for i in kept]
    )
    found = {}
    for path, param in parameters(model).items():
        value = np.asarray(param[...])
        if path in ("embedder/ple", "ple_proj/kernel"):
            value = value[:, kept]
        if path.startswith("layers_"):
            layer, rest = path.removeprefix("layers_").split("/", 1)
            if int(layer) not in kept:
                continue
            new = kept.index(int(layer))
            if rest in ("mlp/gate/kernel", "mlp/up/kernel"):
                value = value[:, : widths[new]]
            elif rest == "mlp/down/kernel":
                value = value[: widths[new]]
            path = f"layers_{new}/{rest}"
        found[path] = value
    return found


@pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS)
def test_a_slice_is_the_leading_part_of_what_is_kept(gemma, slicing):
    small = matformer.slice(gemma, slicing)
    want, found = by_hand(gemma.model, slicing), parameters(small.model)
    assert set(found) == set(want)
    for path, value in want.items():
        np.testing.assert_array_equal(found[path][...], value, err_msg=path)
    shared = [p for p in found if found[p].get_raw_value() is parameters(gemma.model).get(p, found[p]).get_raw_value()]
    assert "embedder/embedding" in shared


def test_a_slice_generates(gemma):
    small = matformer.slice(gemma, SLICINGS["mix and match"])
    assert len(small.generate([2, 5, 9], max_new_tokens=4, ignore_eos=True).tokens) == 4


def test_kinds_sparsity_and_sources_of_keys_go_along(gemma):
    config = SLICINGS["mix and match"].apply(gemma.config)
    assert [spec.is_local for spec in config.layers] == [True, True, False, True, True, False]
    assert [spec.activation_sparsity for spec in config.layers] == [0.95, 0, 0, 0, 0, 0]
    assert [spec.kv_source for spec in config.layers] == [None, None, None, None, 3, 2]
    assert config.name == "parent-slice"


def test_a_fused_model_is_cut_alike(gemma):
    fused = Decoder(gemma.config, rngs=nnx.Rngs(0), layout=CPU_LAYOUT)
    small = matformer.slice(gj.Gemma(gemma.config, fused), SLICINGS["mix and match"])
    whole = fused.layers[2].mlp.w_gate_up[...]
    cut = small.model.layers[1].mlp.w_gate_up[...]
    width = gemma.config.layers[2].ffw_width
    np.testing.assert_array_equal(cut, np.concatenate([whole[:, :8], whole[:, width : width + 8]], axis=1))


@pytest.mark.parametrize(
    "format", ["huggingface", *(pytest.param(f, marks=pytest.mark.slow) for f in ("orbax", "gguf"))]
)
def test_from_a_file_only_the_slice_is_read_and_it_is_the_same(gemma, tmp_path, format):
    slicing = SLICINGS["mix and match"]
    source = tmp_path / ("parent.gguf" if format == "gguf" else "parent")
    if format == "gguf":  # it says neither the rank nor the rows
        config = gemma.config.replace_all([("laurel_rank", 64), ("per_layer_embedding.num_rows", 128)])
        gemma = gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(0)))
    gemma.save(source, format=format)
    want = np.asarray(matformer.slice(gemma, slicing).logits(TOKENS))
    loaded = gj.load(source, dtype="float32", slicing=slicing, progress=False)
    np.testing.assert_allclose(loaded.logits(TOKENS), want, atol=LOGIT_TOLERANCE)
    report = gj.convert(source, tmp_path / "small", to="orbax", slicing=slicing, verify=True, progress=False)
    assert report.is_verified
    assert report.logit_difference == 0
    np.testing.assert_allclose(gj.load(tmp_path / "small", progress=False).logits(TOKENS), want, atol=LOGIT_TOLERANCE)


def test_the_verb_writes_a_slice(gemma, tmp_path, capsys):
    gemma.save(tmp_path / "parent")
    arguments = ["slice", str(tmp_path / "parent"), str(tmp_path / "small"), "--skip", "5,6", "--ffw", "[8]*2+[2*4]*4"]
    assert main([*arguments, "--to", "huggingface", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_verified"]
    config = gj.load(tmp_path / "small", progress=False).config
    assert [spec.ffw_width for spec in config.layers] == [8] * 6
    (tmp_path / "c.csv").write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        'Small,6,0.1,50.9%,"[2_4 // 3] * 6","[5, 6]"\nMain,8,0.2,60%,"[64, 48, 48, 64] + [48] * 2 + [64, 48]",\n'
    )
    named = ["--configs", str(tmp_path / "c.csv"), "--config"]
    assert main([*arguments[:2], str(tmp_path / "named"), *named, "Small"]) == 0
    assert gj.load(tmp_path / "named", progress=False).config.layers == config.layers
    for more, words in (
        (["--config", "x"], "there is no slice 'x'; there are e2b"),
        ([*named, "x"], "there are Small, Main"),
        ([], "nothing to cut"),
        (["--config", "e2b", "--ffw", "8"], "not both"),
        (named[:2], "needs --config"),
        (["--ffw", "__import__('os')"], "neither a number nor a list"),
        (["--skip", "99"], "skip has 99; layers are 0 to 7"),
    ):
        capsys.readouterr()
        assert main([*arguments[:2], str(tmp_path / "other"), *more]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("slicing", "words"),
    [
        (Slicing(skip=(3,)), "skip has layer 3, but layer 7 is kept and reads its keys"),
        (Slicing(skip=(4,)), "skip has layer 4, but layer 5 is kept"),
        (Slicing(skip=(8,)), "skip has 8; layers are 0 to 7"),
        (Slicing(skip=(5, 5)), "names a layer twice"),
        (Slicing(skip=tuple(range(8))), "leaves no layer"),
        (Slicing(ffw=49), "ffw is 49 in layer 1; wanted 1 to 48"),
        (Slicing(ffw=0), "ffw is 0 in layer 0"),
        (Slicing(ffw=(8, 8)), "ffw has 2 widths, but 8 layers are kept"),
    ],
)
def test_impossible_slices_are_refused_by_name(gemma, slicing, words):
    with pytest.raises(ConfigError, match=words):
        matformer.slice(gemma, slicing)


@pytest.mark.parametrize("given", [{"skip": 1}, {"ffw": 8.5}, {"ffw": "wide"}, {"ffw": [8.5]}])
def test_what_is_no_slice_is_refused(gemma, given):
    with pytest.raises(ConfigError, match="no slice: skip is"):
        matformer.slice(gemma, **given)
    with pytest.raises(TypeError, match="a int was given; wanted a Gemma, and a Slicing"):
        matformer.slice(gemma, 32)
    with pytest.raises(TypeError, match="a Decoder was given"):
        matformer.slice(gemma.model, ffw=8)


def test_producers_may_go_with_all_their_readers(gemma):
    config = Slicing(skip=(3, 7)).apply(gemma.config)
    assert [spec.kv_source for spec in config.layers] == [None, None, None, None, 3, 3]


def test_the_official_slice_of_e4b_is_e2b():
    """gemma3n.md, section 1 and 3.1."""
    small, e2b = matformer.E2B.apply(configs.get("gemma-3n-e4b")), configs.get("gemma-3n-e2b")
    assert dataclasses.replace(small, name=e2b.name) == e2b


def count(config):
    model = nnx.eval_shape(lambda: Decoder(config.decoder, rngs=nnx.Rngs(0)))
    return {path: int(np.prod(p.get_raw_value().shape)) for path, p in parameters(model).items()}


@pytest.mark.parametrize(
    ("name", "effective", "pieces"),
    [("gemma-3n-e4b", 3_980_491_248, 2_348_810_240), ("gemma-3n-e2b", 1_905_495_648, 2_013_265_920)],
)
def test_parameters_are_those_of_the_specification(name, effective, pieces):
    """gemma3n.md, section 1: files hold 2,097,408 unused parameters in each layer that shares; tables beside."""
    config = configs.get(name)
    found = count(config)
    unused = 2_097_408 * sum(spec.kv_source is not None for spec in config.layers)
    assert found.pop("embedder/ple") == pieces
    del found["embedder/embedding"]
    assert sum(found.values()) + unused == effective


@pytest.mark.parametrize(
    ("wide", "billions"),
    [(6, 2.52), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((0, 2.22), (15, 2.97), (35, 3.98)))],
)
def test_effective_parameters_of_the_published_slices(wide, billions):
    """gemma3n.md, 3.2: 2,218,883,568 + 50,331,648 for each layer of 16,384 units."""
    parent = configs.get("gemma-3n-e4b")
    config = Slicing(ffw=(16_384,) * wide + (8192,) * (35 - wide)).apply(parent)
    found = count(config)
    del found["embedder/ple"], found["embedder/embedding"]
    effective = sum(found.values()) + 2_097_408 * 15
    assert effective == 2_218_883_568 + 50_331_648 * wide
    assert round(effective / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("8192", 8192),
        ("2_048 * 4", 8192),
        ("[2_048 * 8, 2_048*4]", (16_384, 8192)),
        ("[8] * 3 + 2 * [4]", (8, 8, 8, 4, 4)),
        ("20, 21", (20, 21)),
        ("(9 - 1) // 3", 2),
        ("[]", ()),
    ],
)
def test_arithmetic(text, want):
    assert slices.parse_numbers(text) == want


@pytest.mark.parametrize(
    "text",
    ["", "x", "f()", "1.5", "'a'", "[1] * 10**9", "[1] * 2000", "9**9**9", "[[1]]", "[1] + 1", "1 // 0", "-1 * [1]",
     "lambda: 0", "(" * 500, "2_147_483_647 * 2", "1 if 1 else 2", "[i for i in range(3)]", "1 +" * 4000, "True"],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(text):
    with pytest.raises(ConfigError):
        slices.parse_numbers(text)


@given(st.text(alphabet="0123456789[](),+-*/ _abc.", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_arithmetic_or_refused(text):
    try:
        value = slices.parse_numbers(text)
    except ConfigError:
        return
    assert isinstance(value, int | tuple)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column 'name'"),
        ('name,FFN Hidden Dims,Layers Skipped\nx,"[1",\n', "line 2, FFN Hidden Dims: .* cannot be read"),
        ('name,FFN Hidden Dims,Layers Skipped\nx,[1],\nx,[1],\n', "a second slice is called 'x'"),
    ],
)  # fmt: skip
def test_bad_files_of_slices_are_refused_by_place(tmp_path, text, words):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ConfigError, match=words):
        matformer.read_slicings(tmp_path / "c.csv")


def test_a_sharded_model_stays_sharded(gemma):
    """One device is one shard; more are in tests/test_sharding.py's processes."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    small = matformer.slice(gemma, ffw=16)
    assert small.model.layers[0].mlp.w_down[...].sharding == sharding
    with pytest.raises(ValueError, match="not both"):
        matformer.slice(gemma, matformer.E2B, ffw=8)


@pytest.mark.parity
def test_transformers_computes_the_same_from_a_slice(gemma, tmp_path):
    """Its config.json names each width, kind and sparsity, and its model has the slice's shapes."""
    torch = pytest.importorskip("torch", reason="the parity extra brings the reference")
    transformers = pytest.importorskip("transformers")
    small = matformer.slice(gemma, SLICINGS["mix and match"])
    small.save(tmp_path / "small", format="huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    got = np.asarray(small.logits(TOKENS))
    np.testing.assert_allclose(got, want[..., : got.shape[-1]], atol=LOGIT_TOLERANCE)


def test_slices_of_one_copy_are_the_slices(gemma, tmp_path):
    """Generation, edits, scores and files; all weights are the whole's own arrays."""
    slicing = SLICINGS["mix and match"]
    own, small = matformer.slice(gemma, slicing), matformer.slice(gemma, slicing, copy=False)
    theirs = {id(leaf) for leaf in jax.tree.leaves(gemma.model)}
    assert {id(leaf) for leaf in jax.tree.leaves(small.model)} == theirs
    assert small.config == own.config
    np.testing.assert_allclose(small.logits(TOKENS), own.logits(TOKENS), atol=LOGIT_TOLERANCE)
    wishes = {"max_new_tokens": 9, "ignore_eos": True}
    assert small.generate([2, 5, 9], **wishes).tokens == own.generate([2, 5, 9], **wishes).tokens
    again = matformer.slice(small, ffw=np.full(5, 1), skip=np.array([1]), copy=False)
    assert {id(leaf) for leaf in jax.tree.leaves(again.model)} == theirs
    twice = matformer.slice(matformer.slice(gemma, slicing), ffw=1, skip=(1,))
    assert again.config.layers == twice.config.layers
    np.testing.assert_allclose(again.logits(TOKENS), twice.logits(TOKENS), atol=LOGIT_TOLERANCE)
    small.save(tmp_path / "small")
    saved = parameters(gj.load(tmp_path / "small", progress=False).model)
    assert sum(p[...].size for p in saved.values()) == sum(p[...].size for p in parameters(own.model).values())


@pytest.mark.slow
def test_slices_of_one_copy_draft_score_and_are_looked_into(gemma):
    small = matformer.slice(gemma, ffw=24, copy=False)
    own = matformer.slice(gemma, ffw=24)
    want = gemma.generate([2, 5, 9], max_new_tokens=12, ignore_eos=True).tokens
    done = gemma.generate([2, 5, 9], draft=small, max_new_tokens=12, ignore_eos=True)
    assert done.tokens == want
    assert small.score(TOKENS[0].tolist()).nll == pytest.approx(own.score(TOKENS[0].tolist()).nll, abs=LOGIT_TOLERANCE)
    np.testing.assert_allclose(small.hidden_states(TOKENS), own.hidden_states(TOKENS), atol=LOGIT_TOLERANCE)
    found = interp.capture(small, TOKENS, ["layers.1.mlp_hidden"])
    assert found["layers.1.mlp_hidden"].shape == (1, 16, 24)


@pytest.mark.slow
@tpu.needs_libtpu
def test_on_tpu_slices_read_the_one_copy_in_place():
    """Seven layers in E4B's shape for a v5e: 578 MB would be copied, and temporaries stay below 16 MB."""
    where, e4b = tpu.sharding(), configs.get("gemma-3n-e4b").decoder
    pieces = dataclasses.replace(e4b.per_layer_embedding, num_rows=2048)
    config = dataclasses.replace(e4b, vocab_size=2048, layers=e4b.layers[8:15], per_layer_embedding=pieces)
    whole = tpu.abstract_model(config, where)
    small = SharedSlice(whole, Slicing(ffw=8192, skip=(2,)))
    memory = tpu.decode_program(small, where).memory_analysis()
    assert memory.temp_size_in_bytes < 2**24
    copied = 6 * 3 * 2048 * 8192 * 2  # bytes of the six layers' ffws
    weights = sum(p.get_raw_value().size for p in parameters(whole).values()) * 2
    assert copied < memory.argument_size_in_bytes < weights + 2**24
