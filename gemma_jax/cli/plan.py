"""`gemma-jax plan`: whether a model fits chips that one has not, what it sends, how long it takes at least."""

import argparse
import json
from pathlib import Path
from typing import Any

from gemma_jax.cli import arguments

MOST_DEVICES = 256  # that --search looks at


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    summary = "Compile a model's programs for TPUs that need not be there: memory, collectives, a bound of the time."
    parser = arguments.verb(verbs, "plan", run, summary)
    parser.add_argument("model", help="a model's name, as gemma-3-27b")
    parser.add_argument("--topology", required=True, metavar="CHIPS", help="v5e:4x4, v5p:2x2x2, v6e:2x4, tpu7x:2x2x1")
    parser.add_argument("--mesh", metavar="AXES", help="model=8,data=2 (default: all devices along model, or fsdp)")
    parser.add_argument("--for", dest="purpose", default="decode", choices=("decode", "prefill", "train", "lora"))
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="lora: of the adapter (default: 16)")
    parser.add_argument("--context", type=int, metavar="T", help="tokens of a row (default: the model's)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows in all (default: 1)")
    parser.add_argument("--chunk", type=int, metavar="T", help="prefill: tokens of a row taken at once")
    parser.add_argument("--dtype", default="bfloat16", help="of weights, or what training computes in; int8 to serve")
    parser.add_argument("--ple", default="device", choices=("device", "host"), help="3n: per-layer embeddings")
    parser.add_argument("--text-only", action="store_true", help="without the towers of images and sound")
    parser.add_argument("--no-compile", action="store_true", help="what lies in memory, by arithmetic alone")
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the chip's smallest topology, and a mesh of it",
    )
    parser.add_argument("--plot", metavar="FILE", help="a picture of a device's memory (matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; the exit code is 1 if it does not fit."""
    from gemma_jax import configs
    from gemma_jax.configs import overrides
    from gemma_jax.parallel import hardware
    from gemma_jax.planner import advice, report
    from gemma_jax.planner.plan import Question, plan
    from gemma_jax.planner.search import search

    config = overrides.apply(configs.get(options.model), options.overrides)
    question = Question(
        model=config.name, topology=options.topology, mesh=options.mesh, purpose=options.purpose,
        context=options.context, batch=options.batch, dtype=options.dtype, ple=options.ple, chunk=options.chunk,
        rank=options.rank, is_text_only=options.text_only, is_compiled=not options.no_compile, config=config,
    )  # fmt: skip
    if options.search:
        alone = options.topology.partition(":")[0]
        if options.mesh or alone != options.topology:
            raise ValueError(f"--search chooses topology and mesh; give the chip alone: --topology {alone}")
        chip = hardware.chip_named(alone)
        found = search(question, chip, MOST_DEVICES)
        if not found:
            raise ValueError(f"no {chip.name} of up to {MOST_DEVICES} devices holds it; try a smaller batch or context")
    else:
        found = [plan(question)]
    changes = advice.changes(found[0])
    print(json.dumps(report.as_data(found[0], changes)) if options.json else report.table(found[0], changes))
    if options.plot:
        report.plot(found, Path(options.plot))
    return 0 if found[0].fits else 1
