"""Compile times for the shape of a model far too large for this machine: nothing is allocated, all is abstract.

    python -m benchmarks.compile_time --model gemma-3-27b --output benchmarks/results

Tracing, lowering and compiling are timed apart, for the forward pass as a scan over the repeating group of layers
(`nn.scanned`) and layer by layer (`nn.decoder`), and for the two programs of generation, which are layer by layer.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import machine, tables
from benchmarks.registry import DEFAULT_WORK
from benchmarks.worker import peak_bytes
from gemma_jax.configs import gemma3
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.generate import engine, sampling
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.nn.cache import empty_cache
from gemma_jax.nn.decoder import Decoder, Stem
from gemma_jax.nn.masks import Places
from gemma_jax.nn.scanned import ScannedDecoder

ABOUT = "Compile times for the shape of a model far too large for this machine, without allocating it."

Times = dict[str, float]  # seconds, and bytes of the program

CONFIGS = {
    "gemma-3-270m": gemma3.GEMMA3_270M,
    "gemma-3-1b": gemma3.GEMMA3_1B,
    "gemma-3-4b": gemma3.GEMMA3_4B,
    "gemma-3-12b": gemma3.GEMMA3_12B,
    "gemma-3-27b": gemma3.GEMMA3_27B,
}


@jax.jit
def forward(model: Stem, tokens: jax.Array, where: Places) -> jax.Array:
    """Logits of the last token, so that the head is the same small part of every program."""
    return model(tokens, where)[:, -1]  # pyright: ignore[reportCallIssue]


def timed_compile(function: Any, *arguments: Any, **static: Any) -> Times:
    """Seconds to trace, to lower to StableHLO and to compile, and the size of the program."""
    marks = [time.perf_counter()]

    def mark(value: Any) -> Any:
        marks.append(time.perf_counter())
        return value

    lowered = mark(mark(function.trace(*arguments, **static)).lower())
    mark(lowered.compile())
    traced, low, compiled = (after - before for before, after in itertools.pairwise(marks))
    size = len(lowered.as_text())
    return {"trace": traced, "lower": low, "compile": compiled, "total": marks[-1] - marks[0], "stablehlo_bytes": size}


def abstract(make: Callable[[], Any]) -> Any:
    """What `make` would return, as shapes."""
    return nnx.eval_shape(make)


def programs(config: DecoderConfig, dtype: str, tokens: int, capacity: int) -> dict[str, Callable[[], Times]]:
    """What is compiled, by name. Each builds its shapes when called."""
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    where = jax.eval_shape(lambda: Places.plain(1, tokens))
    row = SamplingParams()

    def decoder() -> Decoder:
        return abstract(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))

    def cache() -> Any:
        return jax.eval_shape(lambda: empty_cache(config, 1, capacity, dtype))

    def scanned() -> Times:
        model = abstract(lambda: ScannedDecoder(config, rngs=nnx.Rngs(0), dtype=dtype))
        return timed_compile(forward, model, ids, where)

    def prefill() -> Times:
        count = jax.ShapeDtypeStruct((1,), jnp.int32)
        last = jax.ShapeDtypeStruct((1, config.width), jnp.dtype(dtype))
        return timed_compile(engine.prefill_chunk, decoder(), ids, count, cache(), last, is_first=False)

    def decode() -> Times:
        one = jax.ShapeDtypeStruct((1,), jnp.int32)
        state = engine.State(cache(), one, one, jax.ShapeDtypeStruct((1,), jnp.bool_), None)
        rows = jax.eval_shape(lambda: sampling.sampler([SamplingParams(seed=0)], config.vocab_size))
        limits = engine.Limits(one, jax.ShapeDtypeStruct((1, engine.MAX_STOP_IDS), jnp.int32))
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        plan = sampling.plan([row])
        return timed_compile(
            engine.decode_chunk, decoder(), state, rows, limits, steps, plan=plan, size=engine.DECODE_CHUNK
        )

    return {
        "forward, scan": scanned,
        "forward, per layer": lambda: timed_compile(forward, decoder(), ids, where),
        "prefill chunk, per layer": prefill,
        "decode loop, per layer": decode,
    }


def markdown(result: dict[str, Any]) -> str:
    columns = ("trace", "lower", "compile", "total")
    rows = [[name, *(tables.number(row[key]) for key in columns)] for name, row in result["programs"].items()]
    about = f"{result['model']}, {result['dtype']}, {result['tokens']} tokens, capacity {result['capacity']}, for "
    about += f"{result['backend']}; {result['machine']['cpu']}, peak memory {result['peak_mib']:,.0f} MiB. Seconds:"
    return f"{about}\n\n{tables.table(['program', *columns], rows)}"


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=ABOUT)
    command.add_argument("--model", choices=CONFIGS, default="gemma-3-27b")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    command.add_argument("--tokens", type=int, default=engine.PREFILL_CHUNK, help="tokens of the chunk (default: 512)")
    command.add_argument("--capacity", type=int, default=4096, help="slots of global caches (default: 4096)")
    command.add_argument("--only", help="names of programs that contain this text")
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for the JSON")
    command.add_argument("--markdown", type=Path, help="a page to write the table into, between its markers")
    return command


def main() -> int:
    arguments = parser().parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    config = CONFIGS[arguments.model]
    times = {}
    for name, compiled in programs(config, arguments.dtype, arguments.tokens, arguments.capacity).items():
        if arguments.only is None or arguments.only in name:
            print(name, file=sys.stderr, flush=True)
            times[name] = compiled()
    result = {
        "model": config.name,
        **{key: getattr(arguments, key) for key in ("dtype", "tokens", "capacity")},
        "backend": jax.default_backend(),
        "machine": machine.describe(),
        "peak_mib": peak_bytes() / 2**20,
        "programs": times,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    tables.publish("compile_time", result, markdown(result), arguments.output, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
