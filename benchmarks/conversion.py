"""What conversions cost: peak memory and speed on a checkpoint of random weights in the shape of a large model.

    python -m benchmarks.conversion --model gemma-3-4b --output benchmarks/results

The checkpoint is written first (Hugging Face, bfloat16, sharded), then each conversion runs in a process of its own and
its result is deleted. Peak memory is VmHWM of that process; the bound is 3 x the largest tensor (as stored) + 500 MiB.
Needs some 20 GB of disk for the 4B.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import machine, tables
from benchmarks.registry import DEFAULT_WORK
from benchmarks.worker import peak_bytes
from gemma_jax import configs, conversion, export

ABOUT = "What conversions cost: peak memory and speed on random weights in the shape of a large model."

MIB = 2**20
RUNS: dict[str, dict[str, Any]] = {
    "Hugging Face bfloat16 to Hugging Face bfloat16": {"to": "huggingface"},
    "Hugging Face bfloat16 to Orbax bfloat16": {"to": "orbax"},
    "Hugging Face bfloat16 to DeepMind bfloat16": {"to": "deepmind"},
    "Hugging Face bfloat16 to GGUF BF16": {"to": "gguf"},
    "Hugging Face bfloat16 to GGUF Q8_0": {"to": "gguf", "quantize": "q8_0"},
    "Hugging Face bfloat16 to GGUF Q4_0": {"to": "gguf", "quantize": "q4_0"},
    "Orbax bfloat16 to Hugging Face bfloat16": {"to": "huggingface", "source": "orbax"},
}


def make(folder: Path, name: str) -> int:
    """Writes random weights; bytes of the largest tensor."""
    config = configs.get(name).replace("vision", None)
    table = export.table("huggingface", config)
    random = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)
    with export.writer(folder, config, table, export.Precision("bfloat16"), None) as writer:
        for name, layout in writer.tensors.items():
            writer.put(name, np.resize(random, layout.shape))
    return max(layout.nbytes for layout in writer.tensors.values())


def run_one(source: str, destination: str, options: dict[str, Any]) -> dict[str, float]:
    """One conversion in this process."""
    start = time.perf_counter()
    report = conversion.convert(source, destination, progress=False, **options)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": report.num_bytes, "peak_mib": peak_bytes() / MIB}


def markdown(result: dict[str, Any]) -> str:
    about = (
        f"{result['model']}, {result['source_bytes'] / 1e9:.1f} GB, largest tensor {result['largest_mib']:,.0f} MiB; "
    )
    about += f"{result['machine']['cpu']}. Bound on memory: {result['bound_mib']:,.0f} MiB."
    header = ["conversion", "seconds", "MB/s read", "written, GB", "peak memory, MiB"]
    rows = [
        [name, *map(tables.number, (row["seconds"], row["mb_per_second"], row["bytes"] / 1e9, row["peak_mib"]))]
        for name, row in result["runs"].items()
    ]
    return f"{about}\n\n{tables.table(header, rows)}"


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=ABOUT)
    command.add_argument("--model", default="gemma-3-4b")
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for the JSON")
    command.add_argument("--markdown", type=Path, help="a page to write the table into, between its markers")
    command.add_argument("--one", help=argparse.SUPPRESS)  # how the processes are started
    arguments = command.parse_args()
    if arguments.one:
        print(json.dumps(run_one(**json.loads(arguments.one))))
        return 0
    DEFAULT_WORK.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=DEFAULT_WORK, prefix="conversion-"))
    try:
        largest = make(work / "source", arguments.model)
        size = sum(path.stat().st_size for path in (work / "source").iterdir())
        runs = {}
        for name, options in RUNS.items():
            print(name, file=sys.stderr, flush=True)
            target, source = work / "target", work / options.get("source", "source")
            given = {name: value for name, value in options.items() if name != "source"}
            one = json.dumps({"source": str(source), "destination": str(target), "options": given})
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.conversion", "--one", one], stdout=subprocess.PIPE, check=True
            )
            runs[name] = json.loads(done.stdout)
            runs[name]["mb_per_second"] = size / 1e6 / runs[name]["seconds"]
            if given["to"] == "orbax":
                target.rename(work / "orbax")  # the source of a later run
            else:
                shutil.rmtree(target) if target.is_dir() else target.unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    bound = 3 * largest / MIB + 500
    result = {
        "model": arguments.model,
        "machine": machine.describe(),
        "source_bytes": size,
        "largest_mib": largest / MIB,
        "bound_mib": bound,
        "runs": runs,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    tables.publish("conversion", result, markdown(result), arguments.output, arguments.markdown)
    return 0 if all(run["peak_mib"] <= bound for run in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
