"""`gemma-jax inspect`: what a model or file is, without loading weights."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from gemma_jax.cli import arguments


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    parser = arguments.verb(verbs, "inspect", run, "Config, parameters, cache size; of a file also its tensors.")
    parser.add_argument("source", help="a model's name, or a checkpoint (a folder or a .gguf file)")
    parser.add_argument("--context", type=int, metavar="T", help="tokens the cache is for (default: all)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows the cache is for")
    parser.add_argument("--cache-dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "stored"), help="of weights in memory"
    )
    arguments.add_ple(parser)
    parser.add_argument(
        "--kernels",
        nargs="?",
        const="",
        metavar="TARGET",
        help="which kernel serves each operation: on v5e, v5p, v6e, tpu7x, gpu, cpu (default: the device at hand)",
    )


def run(options: argparse.Namespace) -> None:
    """Prints a report."""
    report = _report(options)
    if options.json:
        print(json.dumps(report))
        return
    print(json.dumps(report["config"], indent=2))
    for part, count in report["parameters"].items():
        print(f"{count:>16,}  {part}")
    for place, held in report["memory"].items():
        print(f"{held['nbytes']:>16,}  bytes of {options.dtype} weights, {place}: {held['parameters']:,} parameters")
    if "effective_parameters" in report:
        print(f"{report['effective_parameters']:>16,}  effective parameters, as published: without the two tables")
    size = f"{options.batch} x {report['context']} tokens"
    print(f"{report['cache_bytes']:>16,}  bytes of {options.cache_dtype} cache, {size}")
    for program, choices in report.get("kernels", {}).items():
        print(f"{program}:")
        for choice in choices:
            print(f"    {choice}")
    for tensor in report.get("tensors", ()):
        print(f"{tensor['nbytes']:>12,}  {tensor['dtype']:8} {tensor['shape']!s:16} {tensor['name']}")


def _report(options: argparse.Namespace) -> dict[str, Any]:
    import gemma_checkpoints
    from gemma_jax import accounting, configs
    from gemma_jax.configs import overrides
    from gemma_jax.loading import read_config, stored_bytes
    from gemma_jax.nn.cache import cache_bytes

    if not options.source:
        raise ValueError("the source is an empty text; give a model's name or a checkpoint")
    path, tensors, stored = Path(options.source), None, None
    if path.exists():
        with gemma_checkpoints.open(path) as reader:
            config = read_config(reader, path)
            tensors = [
                {"name": info.name, "shape": info.shape, "dtype": info.dtype, "nbytes": info.nbytes}
                for info in reader.tensors.values()
            ]
            stored = stored_bytes(reader, config) if options.dtype == "stored" else None
    elif path.suffix or len(path.parts) > 2:
        raise FileNotFoundError(f"{options.source} does not exist")
    else:
        config = configs.get(options.source)
    if options.dtype == "stored" and stored is None:
        raise ValueError("what stored weights take depends on the file; give a checkpoint as the source")
    config = overrides.apply(config, options.overrides)
    context = config.context if options.context is None else options.context
    if not 1 <= context <= config.context or options.batch < 1:
        raise ValueError(
            f"context {context} and batch {options.batch}: wanted 1 to {config.context} tokens and at least one row"
        )
    held = accounting.weights_held(config, options.dtype, options.ple, stored)
    report = {
        "config": dataclasses.asdict(config),
        "parameters": _parameters(config),
        "context": context,
        "memory": {place: dataclasses.asdict(part) for place, part in held.items() if part.parameters},
        "cache_bytes": cache_bytes(config, options.batch, context, options.cache_dtype),
    }
    if config.per_layer_embedding is not None:
        report["effective_parameters"] = accounting.effective_parameters(config)
    if options.kernels is not None:
        report["kernels"] = _kernels(config, options, context)
    return report if tensors is None else {**report, "tensors": tensors}


def _kernels(config: Any, options: argparse.Namespace, context: int) -> dict[str, list[str]]:
    from gemma_jax.kernel_choices import kernel_choices

    target = options.kernels or None
    found = kernel_choices(config, target, dtype=options.dtype, batch=options.batch, context=context)
    return {name: [str(choice) for choice in choices] for name, choices in found.items()}


def _parameters(config: Any) -> dict[str, int]:
    """How many there are, by part; towers included."""
    import math
    from collections import Counter

    from gemma_jax import export

    counts: Counter[str] = Counter()
    for entry in export.table("orbax", config).entries:
        first, *rest = entry.path.split("/")
        is_layer = first.startswith("layers_")
        part = first if not is_layer else "norms" if "norm" in entry.path else f"layers/{rest[0]}"
        counts[part] += math.prod(entry.shape)
    return {**counts, "all": sum(counts.values())}
