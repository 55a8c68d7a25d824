"""One image through Gemma 3's whole tower, beside Hugging Face transformers: time, memory, the same soft tokens.

    python -m benchmarks.vision --output benchmarks/results

The weights are random, in the tower's real size (27 layers, 896 x 896 pixels, 4,096 patches), behind a decoder of one
small layer; both load the same file. Each peer is a process of its own; they take turns.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import gemma_jax
from benchmarks import machine, tables, turns
from benchmarks.protocol import PeerError
from benchmarks.registry import DEFAULT_WORK
from gemma_jax.configs.config import DecoderConfig

ABOUT = "One image through Gemma 3's whole tower, beside Hugging Face transformers."

PEERS = {"gemma_jax": "gemma_jax", "huggingface": "Hugging Face"}


def config() -> DecoderConfig:
    """The 4B's tower before a small decoder."""
    whole = gemma_jax.configs.get("gemma-3-4b")
    return whole.replace_all([("vocab_size", 512), ("layers", whole.layers[:1]), ("layers.*.ffw_width", 64)])


def make(folder: Path, small: DecoderConfig) -> None:
    """A checkpoint of random weights that both peers read."""
    gemma_jax.Gemma(small, gemma_jax.Decoder(small, rngs=nnx.Rngs(0))).save(folder, format="huggingface")


def measure(model: Path, size: int, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of each pass, peaks, and how far the soft tokens are apart."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    return turns.measure("vision", "see", PEERS, model, pixels, threads, repeats)


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it says in a sentence."""
    header = ["", "one image, s", "first call, s", "peak memory, MiB", "of it after load"]
    rows = [
        [PEERS[name], *(tables.number(v) for v in (
            statistics.median(row["seconds"]), row["first_seconds"], row["peak_mib"], row["load_mib"]
        ))]
        for name, row in result["peers"].items()
    ]  # fmt: skip
    ours, theirs = (statistics.median(result["peers"][name]["seconds"]) for name in PEERS)
    repeats = len(result["peers"]["gemma_jax"]["seconds"])
    return (
        f"{result['machine']['cpu']}, {result['threads']} cores. Medians of {repeats} passes.\n\n"
        f"{tables.table(header, rows)}\n\n"
        f"Speed {theirs / ours:.2f} times Hugging Face's. The soft tokens differ by at most "
        f"{result['largest_difference']:.1e}, where the largest is {result['scale']:.1f}."
    )


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=ABOUT)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for the JSON")
    command.add_argument("--markdown", type=Path, help="a page to write the table into, between its markers")
    arguments = command.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, small = DEFAULT_WORK / "vision", config()
    if not model.exists():
        DEFAULT_WORK.mkdir(exist_ok=True)
        make(model, small)
    assert small.vision is not None
    try:
        result = measure(model, small.vision.image_size, arguments.threads, arguments.repeats)
    except PeerError as error:
        print(f"{error}; see benchmarks/setup_peers.sh", file=sys.stderr)
        return 1
    result |= {"machine": machine.describe(), "threads": arguments.threads}
    tables.publish("vision", result, markdown(result), arguments.output, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
