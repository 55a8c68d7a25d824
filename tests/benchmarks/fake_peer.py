"""A peer without a model: `python fake_peer.py ROOT`. It prints where it should not, as real ones do."""

import sys

sys.path.insert(0, sys.argv[1])

from benchmarks.protocol import private_stdout, serve


def fail() -> None:
    raise ValueError("no such weights")


def die() -> None:
    sys.exit("out of memory")


answers = private_stdout()
print("a library says hello on stdout")  # noqa: T201
serve({"double": lambda value: 2 * value, "fail": fail, "die": die}, sys.stdin, answers)
