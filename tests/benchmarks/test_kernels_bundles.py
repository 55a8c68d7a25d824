"""`benchmarks.kernels` on a schedule written by hand: what is read from it, and how its blocks are weighed."""

from pathlib import Path

import pytest

from benchmarks.kernels import dump, estimate
from benchmarks.kernels.bundles import Block, block_tree, matmul_kind, read_bundles, read_units
from benchmarks.kernels.dump import Schedule
from benchmarks.kernels.estimate import Part
from benchmarks.kernels.generations import GENERATIONS

HERE = __file__
STEM = "123-some_kernel.1"
TPU7X = GENERATIONS["tpu7x"]  # one delay slot

# A grid's loop, 0x2..0xd; in it a branch over 0x5..0x7 (copies) and one over 0x9..0xb (two products).
SCHEDULE = f"""
= control target key start
LH: loop header
= control target key end

     0   :  {{ %s0 = smov.u32 0 }} /* Start region 0 */
   0x1   :  {{ %s1 = smov.u32 0 /* a remark ;; sbr.rel target = $region9 */ }}
   0x2 LB: > {{ %p1 = scmp.ge.s32.totalorder %s1, 2 }} /* Start region 1 */
   0x3   : > {{ %9 = sbr.rel (%p1) target = $region2 }}
   0x4   : > {{}} /* End region 1 */
   0x5   : > {{ %v1 = vld [vmem:[%s0] sm:$0xff]  ;;  %10 = dma.local %s1 }}
   0x6   : > {{ %11 = vst [vmem:[#allocation2_spill] sm:$0xff] /*vst_source=*/%v1 }}
   0x7   : > {{}}
   0x8 PF: > {{ %12 = sbr.rel (!%p2) /* loc("{HERE}":7:4 to :8) */ target = $region3 }} /* Start/End empty region 2 */
   0x9   : > {{}}
   0xa   : > {{ %13 = vmatmul.mubr.bf16.gmra.mxu0 %v1  ;;  %14 = vmatmul.mubr.bf16.gmra.mxu1 %v1 }}
   0xb   : > {{ %15 = vst [vmem:[%s0] sm:$0xff] %v1 }}
   0xc   : > {{ %16 = sbr.rel (%p1) target = $region1 }} /* Start region 3 */
   0xd   : > {{}}
   0xe   :  {{ %17 = sfence }}
"""
UTILIZATION = "\n".join(
    ["== CAPACITY:", "MATMUL, VSTORE, VSTORE:SPILL", "    2     2     2", "== UTILIZATION:"]
    + [{0x6: "0 1 1", 0xA: "2 0 0", 0xB: "0 1 0"}.get(i, "0 0 0") for i in range(15)]
)


def tree() -> Block:
    return block_tree(read_bundles(SCHEDULE), read_units(UTILIZATION), TPU7X)


def test_bundles_have_addresses_operations_regions_and_branches():
    bundles = read_bundles(SCHEDULE)
    assert [bundle.address for bundle in bundles] == list(range(15))
    assert bundles[5].operations == ("vld", "dma.local")
    assert bundles[1].target is None, "a remark is no branch"
    assert (bundles[3].target, bundles[8].target, bundles[12].target) == (2, 3, 1)
    assert bundles[8].place == (HERE, 7)
    assert bundles[8].regions == (2,)


def test_units_are_read_by_name():
    assert read_units(UTILIZATION)[6] == {"MATMUL": 0, "VSTORE": 1, "VSTORE:SPILL": 1}


def test_branches_nest_in_the_loop_and_delay_slots_run_in_any_case():
    root = tree()
    (loop,) = root.blocks
    assert (loop.kind, loop.start, loop.end) == ("loop", 0x2, 0xE)
    assert [(block.kind, block.start, block.end) for block in loop.blocks] == [("branch", 5, 8), ("branch", 0xA, 0xC)]
    assert sum(block.num_bundles for block in root.walk()) == 15
    assert loop.num_bundles == 7
    assert loop.blocks[0].units("VSTORE:SPILL") == 1


def test_a_segment_takes_as_long_as_its_bundles_or_its_products():
    products = tree().blocks[0].blocks[1]
    assert products.segments[0].matmuls == {"bf16": 2}
    assert products.matmul_cycles == 2 * 8 / 2
    assert products.cycles == 8, "two bundles, but the units are busy for eight cycles"


@pytest.mark.parametrize(
    ("operation", "kind"),
    [("vmatmul.bf16.gmra.mxu3", "bf16"), ("vmatmul.mubr.f32.gmra.mrb", "f32"), ("vmatprep.subr.bf16.mxu0", None)],
)
def test_products_are_told_from_their_preparation(operation: str, kind: str | None):
    assert matmul_kind(operation) == kind


def test_the_grids_loop_runs_each_step_and_named_branches_as_often_as_said():
    found = {visit.label: visit for visit in estimate.visits(tree(), 10, Part(pattern="", runs={"#1 products": 4}))}
    assert found["loop 0"].runs == 10
    assert found["branch"].runs == 10, "copies are taken to run each step"
    assert next(visit for label, visit in found.items() if label.endswith("#1 products")).runs == 4
    assert sum(visit.cycles for visit in found.values()) == 3 + 10 * (7 + 3) + 4 * 8


def test_a_name_that_names_nothing_is_refused_unless_it_may():
    with pytest.raises(ValueError, match=r"nowhere.*in: \n(.|\n)*loop 0: 10 runs"):
        estimate.visits(tree(), 10, Part(pattern="", runs={"nowhere": 4}))
    estimate.visits(tree(), 10, Part(pattern="", runs={"?nowhere": 4}))


def test_a_loop_that_is_not_the_grid_must_be_named():
    with pytest.raises(ValueError, match="loop 0"):
        estimate.visits(tree(), 1, Part(pattern=""))
    assert estimate.visits(tree(), 1, Part(pattern="", trips={"loop": 6}))[1].runs == 6
    assert estimate.visits(tree(), 10, Part(pattern="", trips={"loop": 6}))[1].runs == 10, "the grid has its steps"


def test_figures_of_a_kernel_and_of_a_call():
    schedule = Schedule("some_kernel.3", tree(), 15, 4096, 12)
    kernel = estimate.kernel_figures(schedule, Part(pattern="", main_flops=1e6), 10, TPU7X)
    assert kernel["name"] == "some_kernel"
    assert kernel["cycles"] == 3 + 10 * (7 + 3 + 8)
    assert kernel["main"]["bundles"] == 2
    assert kernel["steady_mfu"] == pytest.approx(1e6 / ((8 + 7 + 3) * TPU7X.matmul_flops))
    call = estimate.call_figures([{**kernel, "moved_bytes": None}], 1e7, 1e6, TPU7X)
    assert call["static_mfu"] == pytest.approx(1e7 / (183 * TPU7X.matmul_flops))
    assert call["moved_bytes"] == 1e6, "no estimate of its own: inputs and results once"
    assert call["bound"] == "steps"
    assert call["milliseconds"]["steps"] == pytest.approx(10 * 0.35e-3)


@pytest.mark.parametrize(("name", "teraflops"), [("v5e", 197), ("v5p", 459 / 2), ("v6e", 918), ("tpu7x", 2307 / 2)])
def test_peaks_are_the_published_ones(name: str, teraflops: float):
    generation = GENERATIONS[name]
    assert generation.matmul_flops * generation.gigahertz / 1e3 == pytest.approx(teraflops, rel=0.005)


def write_dump(folder: Path) -> None:
    texts = {
        "06-final_bundles": SCHEDULE,
        "05-schedule-analysis_final_bundles": "",
        "04-final_hlo-static-per-bundle-utilization": UTILIZATION,
        "03-pre-finalize-registers-and-allocations": (
            "  #allocation1 [shape = 's32[1]{0}', space=sflag, size = 0x4, scoped, tag = 'a']\n"
            "  #allocation2 [shape = 'u32[144,128]{1,0}', space=vmem, size = 0x1000, scoped, tag = 'b']\n"
        ),
        "01-critical-path": "\nNew basic block in region: region0 {}\n  Length to end: 13, %s0\n  Length to end: 7\n",
    }
    for name, text in texts.items():
        (folder / f"{STEM}-{name}.txt").write_text(text)


def test_a_dump_is_read_by_the_kernels_whole_name(tmp_path: Path):
    write_dump(tmp_path)
    (schedule,) = dump.schedules(tmp_path, "some_.*", TPU7X)
    assert (schedule.name, schedule.num_bundles) == ("some_kernel.1", 15)
    assert (schedule.vmem_bytes, schedule.critical_cycles) == (4096, 13)


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_missing_dump_says_what_is_there(is_empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dump, "libtpu_version", lambda: "1.2.3")
    if not is_empty:
        write_dump(tmp_path)
    there = "nothing: its flags have no effect" if is_empty else r"some_kernel\.1"
    with pytest.raises(dump.MissingDump, match=rf"libtpu 1\.2\.3 wrote no schedule of 'some'; it wrote {there}"):
        dump.schedules(tmp_path, "some", TPU7X)
