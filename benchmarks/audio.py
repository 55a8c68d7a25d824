"""30 seconds of sound through Gemma 3n's whole conformer, beside Hugging Face transformers: time, memory, vectors.

    python -m benchmarks.audio --output benchmarks/results

The weights are random, in the tower's real size (12 blocks of width 1,536); both load the same file and get the same
spectrogram. Each peer is a process of its own; they take turns.
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
from gemma_jax.media.mel import mel

ABOUT = "A clip of 30 seconds through Gemma 3n's conformer, beside Hugging Face transformers."

RATE = 16_000
PEERS = {"gemma_jax": "gemma_jax", "huggingface": "Hugging Face"}


def config() -> DecoderConfig:
    """E2B's ears before a small decoder without eyes."""
    whole = gemma_jax.configs.get("gemma-3n-e2b")
    small = [("vision", None), ("layers", whole.layers[:1]), ("layers.*.ffw_width", 64), ("vocab_size", 512)]
    return whole.replace_all([*small, ("per_layer_embedding", None), ("altup", None), ("laurel_rank", None)])


def make(folder: Path, small: DecoderConfig) -> None:
    """A checkpoint of random weights that both peers read."""
    gemma_jax.Gemma(small, gemma_jax.Decoder(small, rngs=nnx.Rngs(0))).save(folder)


def measure(model: Path, seconds: float, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of each pass, peaks, and how far the vectors are apart."""
    wave = 0.1 * np.random.default_rng(0).normal(size=round(RATE * seconds)).astype(np.float32)
    return turns.measure("audio", "hear", PEERS, model, mel([wave])[0], threads, repeats)


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it says in a sentence."""
    rows = [
        [PEERS[name], *map(tables.number, (statistics.median(row["seconds"]), row["first_seconds"], row["peak_mib"]))]
        for name, row in result["peers"].items()
    ]
    ours, theirs = (statistics.median(result["peers"][name]["seconds"]) for name in PEERS)
    repeats = len(result["peers"]["gemma_jax"]["seconds"])
    return (
        f"{result['machine']['cpu']}, {result['threads']} cores. Medians of {repeats} passes.\n\n"
        f"{tables.table(['', 'one clip, s', 'first call, s', 'peak memory, MiB'], rows)}\n\n"
        f"Speed {theirs / ours:.2f} times Hugging Face's. The vectors differ by at most "
        f"{result['largest_difference']:.1e}, where the largest is {result['scale']:.1f}."
    )


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.audio", description=ABOUT)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for the JSON")
    command.add_argument("--markdown", type=Path, help="a page to write the table into, between its markers")
    arguments = command.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = DEFAULT_WORK / "audio"
    if not model.exists():
        DEFAULT_WORK.mkdir(exist_ok=True)
        make(model, config())
    try:
        result = measure(model, 30.0, arguments.threads, arguments.repeats)
    except PeerError as error:
        print(f"{error}; see benchmarks/setup_peers.sh", file=sys.stderr)
        return 1
    result |= {"machine": machine.describe(), "threads": arguments.threads}
    tables.publish("audio", result, markdown(result), arguments.output, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
