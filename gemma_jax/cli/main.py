"""`gemma-jax VERB`. Nothing heavy is imported before a verb runs, so that help comes at once.

Exit codes: 0 done, 1 failed (files, weights), 2 bad usage (arguments, prompts, configs), 130 interrupted.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from gemma_jax.cli import chat, classify, convert, embed, generate, inspect, plan, score, slice, transcribe, verify

INTERRUPTED = 130
GRACE = 10.0  # seconds in which an interrupted command may tidy up
VERBS = (generate, chat, transcribe, score, embed, classify, inspect, convert, slice, verify, plan)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser("gemma-jax", description="Gemma 3 in JAX and Flax.")
    verbs = root.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # who reads our output has gone; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"gemma-jax: error: {error}", file=sys.stderr)
        return _exit_code(error)
    return code


def entry() -> int:
    """`main` as a program. After an interruption it ends at once: tearing down Python while XLA still computes on
    another thread crashes now and then.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        """Python drops what is raised in a finaliser, and an interruption can come there as anywhere."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _end()
        usual(unraisable)

    def interrupt(*_: Any) -> None:
        """Wherever it comes, the program ends: some libraries drop exceptions that are raised in their callbacks."""
        timer = threading.Timer(GRACE, _end)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    sys.unraisablehook = hook
    signal.signal(signal.SIGINT, interrupt)
    code = main()
    if code == INTERRUPTED:
        _end()
    return code


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _exit_code(error: Exception) -> int:
    from gemma_checkpoints import CheckpointError

    is_usage = isinstance(error, ValueError | TypeError) and not isinstance(error, CheckpointError)
    return 2 if is_usage else 1
