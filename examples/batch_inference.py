"""Continues many prompts, in one process or on all hosts of a pod, and goes on where a run that was killed ended.

    python examples/batch_inference.py gemma-3-270m prompts.jsonl answers.jsonl --max-new-tokens 64
    python examples/batch_inference.py MODEL prompts.jsonl answers.jsonl --how tpu   # the same on each host of a pod
    python examples/batch_inference.py MODEL prompts.jsonl answers.jsonl --how manual \\
        --coordinator 10.0.0.1:8476 --processes 2 --process 0                       # and 1, on another machine
    python examples/batch_inference.py MODEL prompts.jsonl answers.jsonl --how tpu --mesh data=4,model=16

Each line of the prompts is {"prompt": "...", ...}; the answers have the same lines in the same order, with "completion"
and "finish_reason" added. Lines are taken in batches; of n processes, process i does every n-th of them on a model of
its own, spread over its devices. With --mesh they have one model together, larger than a host holds, and do each batch
together. A batch's answers are written to answers.jsonl.parts/ and renamed when whole;
in the end process 0 joins them. So the same command, by any number of processes, does the batches that are missing,
nothing twice, and the answers are the same. The folder is one that all processes see.
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import gemma_jax as gj
from gemma_jax.parallel import distributed, mesh


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    with group(args) as (index, count):
        lines = read_prompts(args.prompts)
        parts = args.answers.with_name(f"{args.answers.name}.parts")
        if args.answers.exists():
            raise SystemExit(f"{args.answers} is there already; remove it to answer the prompts again")
        claim(parts, settings(args))
        todo = missing(parts, range(0, len(lines), args.batch))
        todo = todo if args.mesh is not None else todo[index::count]
        if todo:
            gemma = model_of(args)
            for start in todo:
                text = answers(gemma, lines, start, args)
                if args.mesh is None or index == 0:
                    write_whole(part(parts, start), text)
    if index == 0:  # all are done, or this would not be reached
        join(parts, range(0, len(lines), args.batch), args.answers)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or a checkpoint, as gemma_jax.load takes it")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--batch", type=int, default=8, help="prompts that run at once, and are lost with a process")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", help="one model for all processes, as data=4,model=16; see parallel.rules")
    parser.add_argument("--how", choices=distributed.HOWS, help="who starts the processes; left out: there is one")
    parser.add_argument("--coordinator", help="host:port of process 0, for --how manual")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args(arguments)
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; wanted at least 1")
    return args


@contextlib.contextmanager
def group(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """This process's index and their count. At its end all processes have come to it."""
    if args.how is None:
        yield 0, 1
        return
    started = distributed.start(
        args.how, coordinator=args.coordinator, processes=args.processes, process=args.process
    )  # fmt: skip
    with started as processes:
        yield processes.index, processes.count


def model_of(args: argparse.Namespace) -> gj.Gemma:
    """One model for all processes, or one for each, on its devices: tensor parallel as far as these go."""
    if args.mesh is not None:
        return gj.load(args.model, mesh=args.mesh, progress=False)
    devices = jax.local_devices()
    if len(devices) == 1:
        return gj.load(args.model, progress=False)
    return gj.load(args.model, mesh=mesh.make({"model": len(devices)}, devices), progress=False)


def missing(parts: Path, starts: Sequence[int]) -> list[int]:
    """The batches that are not there, as process 0 sees the folder: with one model all processes do the same."""
    wanted = np.asarray([not part(parts, start).exists() for start in starts])
    if jax.process_count() > 1:
        wanted = multihost_utils.broadcast_one_to_all(wanted)
    return [start for start, is_missing in zip(starts, wanted, strict=True) if is_missing]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines. Ends the program with the number of one that is not as it should be."""
    lines = []
    whole = path.read_text(encoding="utf-8").rstrip("\n")
    for number, text in enumerate(whole.split("\n") if whole else [], 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise SystemExit(f"{path}, line {number}: {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            raise SystemExit(f'{path}, line {number}: wanted {{"prompt": "..."}}, got {text[:80]}')
        lines.append(line)
    return lines


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that the answers and their places depend on."""
    return {
        "model": args.model,
        "prompts": hashlib.sha256(args.prompts.read_bytes()).hexdigest(),
        "batch": args.batch,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
    }


def claim(parts: Path, wanted: dict[str, Any]) -> None:
    """Makes the folder of parts, or ends the program if those in it come from other prompts or settings."""
    parts.mkdir(parents=True, exist_ok=True)
    path = parts / "settings.json"
    if not path.exists():
        write_whole(path, json.dumps(wanted, indent=2))
    found = json.loads(path.read_text())
    differing = sorted(name for name in wanted if found.get(name) != wanted[name])
    if differing:
        raise SystemExit(f"{parts} was begun with other {', '.join(differing)}; remove it to begin anew")


def answers(gemma: gj.Gemma, lines: list[dict[str, Any]], start: int, args: argparse.Namespace) -> str:
    """The lines of the batch that begins at line `start`. A line's seed is its own, so that its draws are too."""
    batch = lines[start : start + args.batch]
    done = gemma.generate(
        [line["prompt"] for line in batch], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        seed=[args.seed + start + i for i in range(len(batch))],
    )  # fmt: skip
    found = [
        {**line, "completion": one.text, "finish_reason": one.finish_reason}
        for line, one in zip(batch, done, strict=True)
    ]
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found)


def part(parts: Path, start: int) -> Path:
    return parts / f"{start:012d}.jsonl"


def write_whole(path: Path, text: str) -> None:
    """The file is there with all of the text, or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def join(parts: Path, starts: Sequence[int], answers: Path) -> None:
    write_whole(answers, "".join(part(parts, start).read_text(encoding="utf-8") for start in starts))
    shutil.rmtree(parts)


if __name__ == "__main__":
    main()
