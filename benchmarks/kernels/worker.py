"""The process that compiles: `python -m benchmarks.kernels.worker FOLDER`; see `benchmarks.protocol`.

One process has one folder of schedules, for libtpu reads its flags once; it may die of a compiler's own failure.
"""

import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.kernels import dump
from benchmarks.protocol import private_stdout, serve

SHOWN_ERROR_CHARACTERS = 2000


def main() -> int:
    folder = Path(sys.argv[1])
    dump.set_environment(folder)
    from benchmarks.kernels import calibrate, cases  # after the environment is set: they import jax

    known = {case.name: case for case in (*cases.every_case(), *calibrate.cases())}

    def estimate(name: str, generation: str, blocks: dict[str, int], limit: int) -> dict[str, Any]:
        from benchmarks.kernels import measure

        signal.alarm(limit)  # ends the process: a compiler that hangs cannot be interrupted
        try:
            return measure.figures(known[name], generation, blocks, folder)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
            return {"error": f"{type(error).__name__}: {error}"[:SHOWN_ERROR_CHARACTERS]}
        finally:
            signal.alarm(0)

    serve({"estimate": estimate}, sys.stdin, private_stdout())
    return 0


if __name__ == "__main__":
    sys.exit(main())
