"""What a long prompt costs: time and peak memory by length, each in a fresh process.

    python -m benchmarks.long_context --output benchmarks/results

Prefill is chunked and caches have their exact size, so memory should grow by the global layers' cache and a chunk's
scores (chunk x length), never by length squared; the table shows the growth beside the cache's computed bytes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, tables
from benchmarks.protocol import PeerError, Worker
from benchmarks.registry import DEFAULT_WORK, US, chosen

ABOUT = "What a long prompt costs: time and peak memory by length, each in a fresh process."

MIB = 2**20
LENGTHS = (8192, 16_384, 32_768)


def cost(length: int, model: str, threads: int, cache: Path) -> dict[str, Any]:
    """Seconds and peak bytes of one prompt: first call (compiling) and second call, in a process of its own."""
    entry = chosen(US)[0]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "benchmarks.worker", entry.module, str(threads)]
    with Worker(command, environment) as worker:
        worker.ask("start")
        worker.ask("load", model=model)
        loaded = worker.ask("peak")
        first = worker.ask("prefill", tokens=length)
        peak = worker.ask("peak")
        second = worker.ask("prefill", tokens=length)
    return {
        "tokens": length,
        "first_seconds": first["seconds"],
        "seconds": second["seconds"],
        "tokens_per_second": length / second["seconds"],
        "peak_mib": peak / MIB,
        "peak_mib_after_load": loaded / MIB,
        "cache_mib": cache_bytes(length) / MIB,
        "square_scores_mib": 4 * 4 * length**2 / MIB,  # one layer's float32 [N, T, T] with the 4 heads of the 270M
    }


def cache_bytes(length: int) -> int:
    """What the engine allocates for a float32 cache of a prompt of this length."""
    from gemma_jax.configs.gemma3 import GEMMA3_270M
    from gemma_jax.nn import cache

    return cache.cache_bytes(GEMMA3_270M, 1, cache.capacity_bucket(length), "float32")


def markdown(result: dict[str, Any]) -> str:
    header = [
        "prompt, tokens", "seconds", "first call, s", "tokens/s", "peak memory, MiB", "of it after load", "cache, MiB",
        "one [N, T, T] would be, MiB",
    ]  # fmt: skip
    keys = (
        "tokens", "seconds", "first_seconds", "tokens_per_second", "peak_mib", "peak_mib_after_load", "cache_mib",
        "square_scores_mib",
    )  # fmt: skip
    rows = [[tables.number(row[key]) for key in keys] for row in result["prompts"]]
    return f"{result['machine']['cpu']}, {result['threads']} cores.\n\n{tables.table(header, rows)}"


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description=ABOUT)
    command.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of each prompt")
    command.add_argument("--model", default=str(DEFAULT_WORK / "demo.gguf"), help="weights of the 270M")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for the JSON")
    command.add_argument("--markdown", type=Path, help="a page to write the table into, between its markers")
    arguments = command.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    prompts = []
    for length in arguments.lengths:
        print(f"{length} tokens", file=sys.stderr, flush=True)
        try:
            prompts.append(cost(length, arguments.model, arguments.threads, arguments.output / "compile_cache"))
        except PeerError as error:
            print(f"{length} tokens failed: {error}", file=sys.stderr)
            return 1
    result = {"machine": machine.describe(), "threads": arguments.threads, "prompts": prompts}
    tables.publish("long_context", result, markdown(result), arguments.output, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
