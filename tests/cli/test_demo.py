"""The command line as a process of its own, on the real 270M."""

import json
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow


def gemma_jax(*arguments: str, given: str = "") -> str:
    command = [sys.executable, "-m", "gemma_jax", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_knows_the_capital_of_japan():
    assert gemma_jax("generate", "The capital of Japan is", "-n", "8").startswith("The capital of Japan is Tokyo")


def test_chat_and_score_run():
    answer = json.loads(gemma_jax("chat", "--json", "-n", "8", "--seed", "1", given="Hi\n"))
    assert set(answer) == {"text", "finish_reason"}
    assert "perplexity" in gemma_jax("score", "The quick brown fox jumps over the lazy dog.")


def test_an_interruption_ends_with_its_code_and_no_crash():
    """While the program answers: at several moments after its first words."""
    command = [sys.executable, "-m", "gemma_jax", "generate", "Once", "-n", "3000", "--ignore-eos"]
    for seconds in (0.0, 0.3, 0.7, 1.5, 3.0):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(5)  # the prompt and what comes next
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, err.decode()) == (130, "")


def test_an_interruption_that_is_dropped_ends_the_program_too():
    program = (
        "import os, signal, time\n"
        "import gemma_jax.cli.main as cli\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(1)\n"
        "    except BaseException:\n"
        "        time.sleep(30)\n"
        "cli.main, cli.GRACE = main, 0.2\n"
        "cli.entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=25)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interruption_in_a_finaliser_ends_the_program_too():
    """Python only reports what is raised there and goes on."""
    program = (
        "import gemma_jax.cli.main as cli\n"
        "class Broken:\n"
        "    def __del__(self): raise KeyboardInterrupt\n"
        "def main():\n"
        "    Broken()\n"
        "    print('went on')\n"
        "cli.main = main\n"
        "cli.entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
