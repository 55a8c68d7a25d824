"""Records as tables, and their place in docs/kernels.md."""

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import tables
from benchmarks.kernels import calibrate, dump, plot, spills
from benchmarks.kernels.case import OURS, PEERS
from benchmarks.kernels.generations import GENERATIONS
from benchmarks.protocol import ROOT

PAGE = ROOT / "docs" / "kernels.md"
PICTURE = ROOT / "docs" / "kernels.png"

Record = Mapping[str, Any]


def publish(known: Mapping[str, Record]) -> None:
    """Writes the generated parts of the page, and its picture."""
    records = ordered(known.values())
    note = f"Static estimates: libtpu {dump.libtpu_version()}, jax {importlib.metadata.version('jax')}, one TensorCore."
    parts = {
        "kernels-calibration": calibrate.text(),
        "kernels-peers": f"{note}\n\n{beside_peers(records)}",
        "kernels": f"{note}\n\n{figures(records)}",
        "kernels-spills": spills.reasons(),
    }
    tables.fill_file(PAGE, parts)
    plot.draw(records, PICTURE)


def ordered(records: Iterable[Record]) -> list[Record]:
    """By kernel, shape, generation in order of age, ours first."""
    ages = list(GENERATIONS)

    def place(record: Record) -> tuple[Any, ...]:
        kernel, shape, implementation = record["case"].split("/")
        return kernel, shape, ages.index(record["generation"]), implementation != OURS, implementation

    return sorted(records, key=place)


def beside_peers(records: Sequence[Record]) -> str:
    """Ours and the peers' static MFU, and cycles, where a peer has the case too."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        kernel, shape, implementation = record["case"].split("/")
        found.setdefault((kernel, shape, record["generation"]), {})[implementation] = record
    found = {key: row for key, row in found.items() if row.keys() & set(PEERS) and row.keys() - set(PEERS)}
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    names.sort(key=lambda name: name in PEERS)
    peers = [name for name in names if name in PEERS]
    rows = []
    for (kernel, shape, generation), row in found.items():
        best = min((record for name, record in row.items() if name not in PEERS), key=lambda record: record["cycles"])
        cells = [f"{row[name]['static_mfu']:.2f}" if name in row else "–" for name in names]
        cells += [f"{row[peer]['cycles'] / best['cycles']:.2f}x" if peer in row else "–" for peer in peers]
        rows.append([f"{kernel} {shape}", generation, _steady(best), *cells])
    header = ["", "generation", "best of ours, steady", *names, *(f"{peer} / best of ours, cycles" for peer in peers)]
    return tables.table(header, rows)


def _steady(record: Record) -> str:
    """Also of which of our implementations it is."""
    values = [kernel["steady_mfu"] for kernel in record["kernels"]]
    name = record["case"].split("/")[-1]
    return f"{values[0]:.2f} ({name})" if len(values) == 1 and values[0] else "–"


def figures(records: Sequence[Record]) -> str:
    """What the compiler says of each case: one row for each of its kernels, the call's figures in the first."""
    header = ["", "generation", "blocks", "MFU", "cycles", "compute ms", "memory ms", "steps ms", "bound"]
    header += ["of HBM's speed, at most", "main block: bundles", "MXU busy", "other paths"]
    header += ["spill stores", "of all stores", "fills", "VMEM MiB", "temp MiB", "compile s"]
    rows = []
    for record in records:
        times = record["milliseconds"]
        cells = [record["case"], record["generation"], _blocks(record["blocks"]), f"{record['static_mfu']:.2f}"]
        cells += [f"{record['cycles']:,}", *(tables.number(times[name]) for name in ("compute", "memory", "steps"))]
        cells += [record["bound"], f"{record['floor_milliseconds'] / max(times.values()):.0%}"]
        ends = [tables.number(record["temp_bytes"] / 2**20), tables.number(record["compile_seconds"])]
        for i, kernel in enumerate(record["kernels"]):
            start = cells if len(record["kernels"]) == 1 else [f"{record['case']}: {kernel['name']}", *cells[1:]]
            start = start if i == 0 else [start[0], record["generation"], *[""] * (len(cells) - 2)]
            rows.append([*start, *_kernel_cells(kernel), *(ends if i == 0 else ["", ""])])
    return tables.table(header, rows)


def _kernel_cells(kernel: Mapping[str, Any]) -> list[str]:
    main = kernel["main"]
    busy = main["matmul_cycles"] / max(main["bundles"], main["matmul_cycles"])
    others = ", ".join(f"{other['bundles']:,} x {other['runs']:,.0f}" for other in kernel["others"]) or "–"
    return [
        f"{main['bundles']:,} x {main['runs']:,.0f}",
        f"{busy:.0%}",
        others,
        f"{main['spill_stores']:,}",
        f"{spills.share(kernel):.0%}",
        f"{main['spill_loads']:,}",
        tables.number(kernel["vmem_bytes"] / 2**20),
    ]


def _blocks(blocks: Mapping[str, Any]) -> str:
    """Short, for a cell: the names are in the tables of `gemma_kernels`."""
    if any(isinstance(value, Mapping) for value in blocks.values()):
        return ", ".join(_blocks(value) for value in blocks.values())
    return " ".join(str(value) for value in blocks.values())
