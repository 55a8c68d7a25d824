"""`benchmarks.kernels` beside the schedules: baselines, dispatch tables, reports; slow: one case, compiled."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import (
    aot,
    attention,
    band,
    baseline,
    calibrate,
    cases,
    dispatch_tables,
    dump,
    report,
    run,
    spills,
    splash,
)
from benchmarks.kernels.case import PEERS, Case, Entry, Program
from benchmarks.kernels.generations import GENERATIONS
from tests.tpu import needs_libtpu


def record(case: str = "band/4b/ours", generation: str = "v5e", cycles: int = 1000) -> dict[str, Any]:
    main = {
        "label": "",
        "runs": 1,
        "bundles": 90,
        "matmul_cycles": 45,
        "stores": 90,
        "spill_stores": 9,
        "spill_loads": 2,
    }
    kernel = {"name": "band", "steps": 4, "cycles": cycles, "vmem_bytes": 2**20, "steady_mfu": 0.5}
    kernel |= {"main": main, "others": []}
    times = {"compute": 2.0, "memory": 1.0, "steps": 0.1}
    return {
        "case": case,
        "generation": generation,
        "blocks": {"forward": {"block_q": 256, "heads": 2}},
        "cycles": cycles,
        "static_mfu": 400 / cycles,
        "milliseconds": times,
        "floor_milliseconds": 0.5,
        "bound": "compute",
        "temp_bytes": 0,
        "compile_seconds": 1.5,
        "kernels": [{**kernel, "tree": "long"}],
    }


def build(_: object) -> Program:
    raise AssertionError("nothing is built here")


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "libtpu_version", lambda: "1.2.3")


@pytest.mark.usefixtures("libtpu")
def test_a_baseline_is_of_one_libtpu_and_keeps_other_cases(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no baseline for libtpu 1\.2\.3.*--update-baseline"):
        baseline.read(tmp_path)
    baseline.update([record(), record(generation="v6e")], tmp_path)
    baseline.update([record(cycles=900), {"error": "no", "case": "band/4b/ours", "generation": "v6e"}], tmp_path)
    known = baseline.read(tmp_path)
    cycles = {name: entry["cycles"] for name, entry in known.items()}
    assert cycles == {
        "band/4b/ours/v5e": 900,
        "band/4b/ours/v6e": 1000,
    }
    assert "tree" not in known["band/4b/ours/v5e"]["kernels"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["libtpu-1.2.3.json"]


def test_more_than_two_percent_more_cycles_is_a_complaint():
    known = {"band/4b/ours/v5e": record()}
    assert baseline.complaints([record(cycles=1020)], known) == []
    (complaint,) = baseline.complaints([record(cycles=1021)], known)
    assert complaint == "band/4b/ours/v5e: 1,021 cycles, 2.1% more than the baseline's 1,000"


def test_failures_and_unknown_cases_are_complaints_and_peers_are_not():
    failed = {"case": "band/4b/ours", "generation": "v6e", "error": "out of VMEM"}
    found = baseline.complaints([failed, record(generation="v5p"), record("band/4b/splash", cycles=9999)], {})
    assert len(found) == 2
    assert "out of VMEM" in found[0]
    assert "no baseline" in found[1]


def spilling(num_spills: int, name: str = "band") -> dict[str, Any]:
    """A record whose kernel has so many spills among its 90 stores."""
    found = record()
    main = {**found["kernels"][0]["main"], "spill_stores": num_spills}
    return {**found, "kernels": [{**found["kernels"][0], "name": name, "main": main}]}


def test_spills_of_over_a_tenth_of_the_stores_want_a_reason(monkeypatch: pytest.MonkeyPatch):
    known = {"band/4b/ours/v5e": spilling(10)}
    assert baseline.complaints([spilling(9)], known) == []
    (complaint,) = baseline.complaints([spilling(10)], known)
    assert complaint.startswith("band/4b/ours/v5e: band: 10 of 90 vector stores are spills, over 10%")
    monkeypatch.setattr(spills, "EXPLAINED", {"ban.": "why"})
    assert baseline.complaints([spilling(10)], known) == []


def test_spills_that_grow_by_over_a_tenth_of_the_stores_are_a_complaint_whatever_the_reason(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(spills, "EXPLAINED", {"band": "why"})
    known = {"band/4b/ours/v5e": spilling(50)}
    assert baseline.complaints([spilling(59)], known) == []
    (complaint,) = baseline.complaints([spilling(60)], known)
    assert "60 of 90 vector stores are spills, 10 more than the baseline's" in complaint


def test_every_kernel_of_the_baseline_that_spills_much_has_a_reason():
    records = [json.loads(path.read_text())["records"] for path in baseline.FOLDER.glob("libtpu-*.json")]
    ours = [record for known in records for record in known.values() if record["case"].split("/")[-1] not in PEERS]
    many = {kernel["name"] for record in ours for kernel in record["kernels"] if spills.share(kernel) > spills.ALLOWED}
    assert not [name for name in many if spills.reason(name) is None]


def test_tables_hold_the_blocks_of_each_kernel_of_an_operation(tmp_path: Path):
    def case(*parts: str) -> Case:
        entry = Entry(kernel="band_attention", shape={"head_dim": 256, "window": 1024}, parts=parts)
        choices = ({part: {"block_q": 128} for part in parts},)
        return Case(kernel="+".join(parts), shape="4b", build=build, choices=choices, entry=entry)

    forward, backward = case("forward"), case("dq", "dkv")
    assert dispatch_tables.blocks_of(forward, "v5e", tmp_path) == {"forward": {"block_q": 128}}
    dispatch_tables.write(forward, "v5e", record(), tmp_path)
    assert dispatch_tables.blocks_of(forward, "v5e", tmp_path) == record()["blocks"]
    assert dispatch_tables.blocks_of(backward, "v5e", tmp_path) == backward.choices[0], "these are not in it yet"
    both = {"dq": {"block_q": 512}, "dkv": {"block_q": 64}}
    dispatch_tables.write(backward, "v5e", {**record(), "blocks": both}, tmp_path)
    (entry,) = json.loads((tmp_path / "v5e.json").read_text())["entries"]
    assert entry["blocks"] == {**record()["blocks"], **both}
    assert entry["cycles"] == {"forward/ours": 1000, "dq+dkv/ours": 1000}


def test_a_sweep_takes_the_best_blocks_of_each_kernel():
    cycles = {"a": (5, 9), "b": (7, 4)}

    class Compiler:
        def figures(self, case: Case, generation: str, blocks: dict[str, str]) -> dict[str, Any]:
            of_dq, of_dkv = cycles[blocks["dq"]][0], cycles[blocks["dkv"]][1]
            kernels = [{**record()["kernels"][0], "cycles": cycles} for cycles in (of_dq, of_dkv)]
            return {
                "cycles": of_dq + of_dkv,
                "milliseconds": {"compute": of_dq + of_dkv},
                "kernels": kernels,
                "bound": "compute",
            }

    entry = Entry(kernel="band_attention", shape={}, parts=("dq", "dkv"))
    case = Case(kernel="band_backward", shape="4b", build=build, entry=entry)
    choices = [{"dq": name, "dkv": name} for name in cycles]
    best = run.best(Compiler(), case, "v5e", choices)  # pyright: ignore[reportArgumentType]
    assert best["blocks"] == {"dq": "a", "dkv": "b"}
    assert best["cycles"] == 9


def test_of_blocks_that_memory_bounds_alike_the_smaller_are_taken():
    class Compiler:
        def figures(self, case: Case, generation: str, blocks: dict[str, int]) -> dict[str, Any]:
            kernels = [{**record()["kernels"][0], "cycles": 9 - blocks["keys"], "vmem_bytes": blocks["keys"]}]
            times = {"compute": 1.0, "memory": 2.0, "steps": 4 / blocks["keys"]}
            return {"cycles": kernels[0]["cycles"], "milliseconds": times, "bound": "memory", "kernels": kernels}

    case = Case(kernel="decode", shape="4b", build=build)
    choices = [{"keys": keys} for keys in (4, 2, 1)]
    best = run.best(Compiler(), case, "v5e", choices)  # pyright: ignore[reportArgumentType]
    assert best["blocks"] == {"keys": 2}


def test_the_report_sets_ours_beside_the_peers():
    records = report.ordered([record("band/4b/splash", cycles=1500), record(), record("alone/4b/ours")])
    assert [entry["case"] for entry in records] == ["alone/4b/ours", "band/4b/ours", "band/4b/splash"]
    lines = report.beside_peers(records).splitlines()
    assert len(lines) == 3
    assert lines[-1] == "| band 4b | v5e | 0.50 (ours) | 0.40 | 0.27 | 1.50x |"
    figures = report.figures(records).splitlines()
    assert "| 256 2 |" in figures[2]
    shown = dict(zip(figures[0].split(" | "), figures[2].split(" | "), strict=True))
    assert (shown["spill stores"], shown["of all stores"], shown["fills"]) == ("9", "10%", "2")


def test_every_case_has_choices_that_fit_its_entry():
    for case in cases.every_case():
        assert case.choices, case.name
        for blocks in case.choices:
            assert case.entry is None or not case.entry.parts or tuple(blocks) == case.entry.parts, case.name


def test_quick_cases_are_few_and_ours(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--list", "--quick"]) == 0
    names = capsys.readouterr().out.split()
    assert 3 <= len(names) <= 8
    assert not any(name.endswith(("/splash", "/tokamax")) for name in names)


@pytest.mark.usefixtures("libtpu")
def test_a_check_without_a_baseline_says_so(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--check", "--quick"]) == 2
    assert "no baseline for libtpu 1.2.3" in capsys.readouterr().err


def test_calls_of_kernels_are_found_wherever_they_are_in_a_program():
    def double(x: jax.Array) -> jax.Array:
        cost = pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=7)
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(copy, out_shape=out, grid=(2, 3), name="double", cost_estimate=cost)(x)

    def copy(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    program = jax.make_jaxpr(lambda x: jax.jit(double)(jax.lax.cond(x[0, 0] > 0, double, double, x)))
    calls = aot.calls(program(jnp.zeros((8, 128))).jaxpr)
    assert calls == {"double": [aot.Call((2, 3), 7)] * 3}


def test_pairs_of_a_window_are_counted_one_by_one():
    for window in (None, 3, 8):
        shape = attention.AttentionShape(name="", query_heads=2, key_heads=1, width=4, tokens=8, window=window)
        pairs = sum(1 for i in range(8) for j in range(i + 1) if window is None or i - j < window)
        assert shape.pairs == pairs
        assert shape.flops == 2 * pairs * 2 * 2 * 4


@pytest.mark.parametrize("window", [1024, None])
def test_splash_visits_as_many_blocks_as_there_are(window: int | None):
    shape = attention.AttentionShape(name="", query_heads=2, key_heads=1, width=128, tokens=4096, window=window)
    whole, edge = band.band_blocks(shape, {"block_q": 512, "block_kv": 512})
    program = splash.forward(shape, splash.CHOICES[0])
    assert program.parts[0].runs["#2 "] == 2 * (whole + edge)


@pytest.mark.slow
@needs_libtpu
def test_one_case_is_compiled_and_weighed(tmp_path: Path):
    quick = next(case for case in cases.every_case() if case.is_quick)
    with run.Compiler() as compiler:
        best = run.best(compiler, quick, "v6e", quick.choices[:1])
    assert "error" not in best, best
    assert 0.1 < best["static_mfu"] < 1
    assert best["temp_bytes"] < 2**20
    assert set(best["milliseconds"]) == {"compute", "memory", "steps"}
    assert len(GENERATIONS) == 4


def test_the_calibration_compares_with_times_as_they_were_published():
    exact = [{"compute": each.milliseconds - 0.1, "memory": 0.0, "steps": 0.0} for each in calibrate.TIMES]
    lines = calibrate.table(exact).splitlines()[2:8]
    assert [line.count("| +0% |") for line in lines] == [1, 1, 0, 0, 1, 1], "a dispatch of 0.1 ms explains all"
    assert "| -11% | +0% |" in lines[4], "which is not hidden: 0.889 ms were published"
    assert "gives the step" in lines[calibrate.GIVES_STEP]


@pytest.mark.slow
@needs_libtpu
def test_the_calibration_is_a_few_percent_below_the_published_times(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--calibrate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| 8192^3, blocks 512 x 1024 x 1024 | 6.1 |") and "| -6% |" in line for line in lines)
