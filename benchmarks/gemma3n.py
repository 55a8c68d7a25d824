"""Gemma 3n's decoder beside Hugging Face transformers: prefill, decoding and memory, in one run.

    python -m benchmarks.gemma3n --layers 15 --output benchmarks/results

Random weights in E2B's shape, with fewer layers where memory asks for it (a third of them share keys, as in E2B); both
load the same bfloat16 file as float32. Ours twice: with the per-layer embeddings in memory, and left in the file.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import machine, tables
from benchmarks.protocol import PeerError, Worker
from benchmarks.registry import DEFAULT_WORK, chosen, python_of
from gemma_jax import configs, export
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.configs.gemma3n import layer_specs

ABOUT = "Gemma 3n's decoder beside Hugging Face transformers: prefill, decoding and memory."

MIB = 2**20
PEERS = {  # column: (module of benchmarks.peers, whose python)
    "gemma_jax": ("gemma_jax", "gemma_jax"),
    "gemma_jax, mapped": ("gemma3n_mapped", "gemma_jax"),
    "Hugging Face": ("huggingface", "huggingface"),
}
FIGURES = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s", "peak_mib": "peak memory, MiB"}


def config(num_layers: int) -> DecoderConfig:
    """E2B with so many layers, the first third of them sparse and the last third without keys of their own."""
    whole, third = configs.get("gemma-3n-e2b").decoder, num_layers // 3
    spec = whole.layers[0]
    layers = layer_specs(
        [(i + 1) % whole.period != 0 for i in range(num_layers)],
        [spec.ffw_width] * num_layers,
        [spec.activation_sparsity if i < third else 0.0 for i in range(num_layers)],
        third,
    )
    return dataclasses.replace(whole, name=f"e2b-{num_layers}", layers=layers)


def make(folder: Path, shape: DecoderConfig) -> None:
    """Writes random weights tensor by tensor; small ones, so that no stream grows beyond float32."""
    table = export.table("huggingface", shape)
    random = (0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)).astype(ml_dtypes.bfloat16)
    with export.writer(folder, shape, table, export.Precision("bfloat16"), None) as writer:
        for name, layout in writer.tensors.items():
            writer.put(name, np.resize(random, layout.shape))


def measure(model: Path, settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each peer in a process of its own, one after another: together they would not fit into memory."""
    found: dict[str, dict[str, Any]] = {}
    for name, (module, environment) in PEERS.items():
        print(name, file=sys.stderr, flush=True)
        python = str(python_of(chosen(environment)[0]))
        with Worker([python, "-m", "benchmarks.worker", module, str(settings.threads)]) as worker:
            row: dict[str, Any] = {"versions": worker.ask("start")}
            row["load_seconds"] = worker.ask("load", model=str(model))["seconds"]
            worker.ask("prefill", tokens=settings.prompt)
            took = [worker.ask("prefill", tokens=settings.prompt)["seconds"] for _ in range(settings.repeats)]
            row["prefill_samples"] = [settings.prompt / seconds for seconds in took]
            decode = {"batch": 1, "prompt_tokens": 64, "new_tokens": settings.new_tokens}
            worker.ask("decode", **decode)
            runs = [worker.ask("decode", **decode) for _ in range(settings.repeats)]
            row["decode_samples"] = [run["tokens"] / run["seconds"] for run in runs]
            row["first_tokens"] = runs[0]["first_row"]
            row["peak_mib"] = worker.ask("peak") / MIB
            row |= {key: statistics.median(row[f"{key}_samples"]) for key in ("prefill", "decode")}
            found[name] = row
    return found


def markdown(result: dict[str, Any]) -> str:
    """The figures, and ours as ratios to transformers'."""
    peers = result["peers"]
    rows = [[name, *(tables.number(row[key]) for key in FIGURES)] for name, row in peers.items()]
    theirs = peers["Hugging Face"]
    for name in list(peers)[:-1]:
        rows.append([f"{name}, ratio", *(f"{peers[name][key] / theirs[key]:.2f}x" for key in FIGURES)])
    about = (
        f"{result['machine']['cpu']}, {result['threads']} cores; E2B's shape with {result['layers']} layers, a prompt "
        f"of {result['prompt']} tokens, medians of {result['repeats']}."
    )
    return f"{about}\n\n{tables.table(['', *FIGURES.values()], rows)}"


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.gemma3n", description=ABOUT)
    command.add_argument("--layers", type=int, default=15, help="a multiple of 15")
    command.add_argument("--prompt", type=int, default=512)
    command.add_argument("--new-tokens", type=int, default=32)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for the JSON")
    command.add_argument("--markdown", type=Path, help="a page to write the table into, between its markers")
    settings = command.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    model = DEFAULT_WORK / f"gemma3n-{settings.layers}"
    if not model.exists():
        DEFAULT_WORK.mkdir(exist_ok=True)
        make(model, config(settings.layers))
    try:
        peers = measure(model, settings)
    except PeerError as error:
        print(f"{error}; see benchmarks/setup_peers.sh", file=sys.stderr)
        return 1
    kept = {key: getattr(settings, key) for key in ("layers", "prompt", "threads", "repeats")}
    result = {"machine": machine.describe(), "peers": peers, **kept}
    tables.publish("gemma3n", result, markdown(result), settings.output, settings.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
