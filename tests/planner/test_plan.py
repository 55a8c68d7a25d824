"""Questions that cannot be, what plans say of them, the search's arithmetic, and reports; nothing is compiled."""

import dataclasses
import json

import pytest
from jax.experimental import topologies

from gemma_jax.cli import main as command
from gemma_jax.parallel import hardware
from gemma_jax.parallel import mesh as meshes
from gemma_jax.parallel.hardware import GiB
from gemma_jax.parallel.hlo import Operations
from gemma_jax.parallel.roofline import Roofline
from gemma_jax.planner import advice, least, report, search
from gemma_jax.planner.plan import Exchange, Plan, ProgramPlan, Question, needed
from tests.parallel.mesh_worker import config

QUESTION = Question(model="tiny", topology="v5e:2x2", mesh="model=4", context=1024, batch=8, config=config())
TIME = Roofline(compute=1e-3, memory=2e-3, communication=5e-4, by_axes={("model",): 5e-4}, unknown=())


def planned(question: Question = QUESTION, temporaries: int = GiB, **held: int) -> Plan:
    program = ProgramPlan(
        name="decode", held=held, arguments=sum(held.values()), temporaries=temporaries,
        peak=sum(held.values()) + temporaries, operations=Operations({"bf16": 10**9}, {}, False),
        attention_flops=10**6, exchanges=(Exchange("all-reduce", ("model",), 9, 4096),), roofline=TIME, tokens=8,
        compile_seconds=3.0,
    )  # fmt: skip
    return Plan(question=question, topology=hardware.topology(question.topology), mesh={"model": 4}, context=1024,
                programs=(program,), host_bytes=0, notes=())  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gemma-4 --topology v5e:4x4", "there is no model 'gemma-4'"),
        ("gemma-3-1b --topology v9:4x4", "no chip 'v9'; wanted one of v5e"),
        ("gemma-3-1b --topology v5e:3x3", "there is no such v5e; there are v5e:1x1"),
        ("gemma-3-1b --topology v5e:4x4 --mesh model=8", "has 8 devices and v5e:4x4 has 16"),
        ("gemma-3-1b --topology v5e:2x2 --mesh heads=4", "mesh has 'heads=4'; wanted axis=size"),
        ("gemma-3-1b --topology v5e:1x1 --context 99999999", "at most the 32768 tokens"),
        ("gemma-3-1b --topology v5e:1x1 --batch 0", "at least one of each"),
        ("gemma-3n-e4b --topology v5e:1x1 --ple host --for lora", "with which no training runs here"),
        ("gemma-3-1b --topology v5e:1x1 --search", "give the chip alone: --topology v5e"),
        ("gemma-3-1b --topology v5e --mesh model=2 --search", "--search chooses topology and mesh"),
        ("gemma-3-1b --topology v5e:1x1 --dtype int4", "wanted bfloat16 or float32 or int8"),
        ("gemma-3-1b --topology v5e:1x1 --dtype int8 --for train", "int8', which is for serving"),
        ("gemma-3-1b --topology v5e:1x1 --ple host", "'host' of a model with per-layer embeddings"),
        ("gemma-3n-e4b --topology v5e:2x2 --ple host", "which is for one device; v5e:2x2 has 4"),
        ("embeddinggemma-300m --topology v5e:1x1", "makes embeddings"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(arguments, message, capsys):
    assert command.main(["plan", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
    def missing(*_):
        raise NotImplementedError("no tpu")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    assert command.main(["plan", "gemma-3-270m", "--topology", "v5e:1x1"]) == 1
    assert "pip install gemma-jax[tpu]" in capsys.readouterr().err


def test_without_the_cuda_plugin_it_says_what_to_install(monkeypatch, capsys):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    assert command.main(["plan", "gemma-3-270m", "--topology", "h100:4"]) == 1
    assert "needs JAX's CUDA plugin and ptxas: pip install gemma-jax[aot]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("Ran out of memory in memory space hbm. Used 34.15G of 15.75G hbm. Exceeded", int(34.15 * GiB)),
        ("the total memory required for HLO temporaries (25.93G) exceeds available HBM (15.75G).", int(26.93 * GiB)),
        ("INTERNAL: Mosaic failed", None),
    ],
)
def test_the_compiler_tells_what_it_would_need(message, wanted):
    assert needed(message, GiB) == pytest.approx(wanted, abs=16)


def test_candidates_hold_least_first_and_never_repeat_work():
    found = search.candidates(QUESTION, hardware.topology("v5e:2x2"))
    sizes = [one.nbytes for one in found]
    assert sizes == sorted(sizes)
    assert {"model=4", "data=2,model=2", "data=4"} <= {one.mesh for one in found}
    odd = dataclasses.replace(QUESTION, batch=3)
    assert not any("data" in one.mesh for one in search.candidates(odd, hardware.topology("v5e:2x2")))


def test_a_model_too_large_for_a_topology_has_no_candidates_there():
    question = Question(model="gemma-3-27b", topology="v5e:1x1", context=131_072, batch=8)
    assert search.candidates(question, hardware.topology("v5e:2x4")) == []
    best = search.candidates(question, hardware.topology("v5e:4x4"))[0]
    assert best.nbytes < 10 * GiB


def test_what_does_not_fit_is_told_what_to_change():
    question = Question(model="gemma-3-27b", topology="v5e:2x2", mesh="model=4", context=131_072, batch=8)
    held = search.held_bytes(question, hardware.topology("v5e:2x2"), {"model": 4})
    assert held is not None
    plan = dataclasses.replace(planned(question, **held), context=131_072)
    found = advice.changes(plan)
    assert found[0].startswith("most of it are the cache: 20.81 GiB")
    assert any(line.startswith("more devices: v5e:4x4 with ") for line in found)
    assert any(line.startswith("larger devices: v5p") for line in found)
    assert advice.changes(planned(weights=GiB, cache=GiB)) == ()


def held_by(question: Question) -> Plan:
    """What a question's model needs at least, by arithmetic."""
    assert question.mesh is not None
    sizes = meshes.parse(question.mesh)
    held = search.held_bytes(question, hardware.topology(question.topology), sizes)
    assert held is not None
    mesh = {axis: size for axis, size in sizes.items() if size > 1}
    return dataclasses.replace(planned(question, temporaries=0, **held), mesh=mesh)


@pytest.mark.parametrize(
    ("model", "topology", "mesh", "purpose", "dtype", "wanted", "others"),
    [
        ("gemma-3-12b", "v5e:2x2", "fsdp=4", "train", "bfloat16", "--for lora", ()),
        ("gemma-3-27b", "v5e:1x1", "fsdp=1", "train", "bfloat16", None, ("--for lora",)),
        ("gemma-3-4b", "v5e:1x1", "model=1", "decode", "float32", "--dtype bfloat16", ()),
        ("gemma-3-27b", "v5e:1x1", "model=1", "decode", "float32", None, ("--dtype",)),
        ("gemma-3-12b", "v5e:2x2", "model=4", "decode", "bfloat16", None, ()),
    ],
)
def test_what_is_advised_is_enough_by_itself(model, topology, mesh, purpose, dtype, wanted, others):
    question = Question(model=model, topology=topology, mesh=mesh, context=8192, batch=8, purpose=purpose, dtype=dtype,
                        is_text_only=True)  # fmt: skip
    found = " ".join(advice.changes(held_by(question)))
    assert wanted is None or wanted in found, found
    assert not any(other in found for other in others), found


def test_int8_is_advised_where_it_is_enough():
    question = Question(model="gemma-3-12b", topology="v5e:1x1", mesh="model=1", context=1024, is_text_only=True)
    assert "int8 weights: --dtype int8" in advice.changes(held_by(question))


def test_a_smaller_rank_is_advised_where_it_is_enough():
    question = Question(model="gemma-3-1b", topology="v5e:1x1", context=1024, purpose="lora", rank=100_000,
                        mesh="fsdp=1")  # fmt: skip
    assert any(line.startswith("a smaller rank: --rank ") for line in advice.changes(held_by(question)))


def test_what_is_not_compiled_has_no_times():
    whole = planned(weights=2 * GiB, cache=GiB)
    program = dataclasses.replace(whole.programs[0], operations=None, exchanges=None, temporaries=None, peak=None)
    text = report.table(dataclasses.replace(whole, programs=(program,)))
    assert "not known, for it is not compiled" in text
    assert "tokens/s" not in text


def test_a_table_says_what_fits_and_which_numbers_are_estimates():
    text = report.table(planned(weights=2 * GiB, cache=GiB))
    assert "peak              4.000 GiB  25 %" in text
    assert "all-reduce              9 x         0.004 MB along model" in text
    assert "at least 2 ms, bound by memory" in text
    assert "estimate" in text
    assert text.endswith("fits: 4.00 of 15.75 GiB")
    assert "does not fit: 19.00 of 15.75 GiB" in report.table(planned(weights=18 * GiB), ["fewer weights"])


def test_a_plan_is_json_with_numbers():
    data = json.loads(json.dumps(report.as_data(planned(weights=2 * GiB, cache=GiB))))
    (program,) = data["programs"]
    assert (data["fits"], program["held"], program["peak"]) == (True, {"weights": 2 * GiB, "cache": GiB}, 4 * GiB)
    assert program["exchanges"] == [{"kind": "all-reduce", "axes": ["model"], "count": 9, "nbytes": 4096}]
    assert program["roofline"]["is_estimate"]
    assert program["roofline"]["seconds"] == 2e-3


def test_a_picture_has_all_that_a_device_holds(tmp_path, monkeypatch):
    drawn = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path: (drawn.append(self), kept(self, path)))
    held = dict.fromkeys(("weights", "adapter", "optimizer", "cache", "inputs"), GiB)
    report.plot([planned(**held)], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    bars = [bar for bars in drawn[0].axes[0].containers for bar in bars]
    assert sum(bar.get_width() for bar in bars) == 6  # temporaries too


def test_the_least_of_a_decoding_step_is_two_sums_a_layer_and_one():
    tiny = config(4)  # 8 query and 4 key heads of 8, width 32, 2 global layers
    assert least.decoding(tiny, {"model": 4}, batch=8) == (2 * 4 + 1) * 8 * 32 * 2
    assert least.decoding(tiny, {"model": 4, "data": 2}, batch=8) == (2 * 4 + 1) * 4 * 32 * 2
    merged = 2 * 8 * 2 * (8 + 2) * 4
    assert least.decoding(tiny, {"model": 4, "seq": 2}, batch=8) == (2 * 4 + 1) * 8 * 32 * 2 + merged
    assert least.decoding(tiny, {"data": 8}, batch=8) == 0
