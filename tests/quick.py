"""Programs of tests are compiled quickly: most run once, on tiny arrays."""

import importlib.util
import os

import jax

# Instructions as XLA emits them, by one LLVM module each: a third of the default's time.
FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def compile_quickly() -> None:
    """Gives XLA `FLAGS`, then those of the environment, unless an accelerator may run the tests.

    XLA reads XLA_FLAGS once. Processes that tests start must not inherit ours, and libtpu does not know them.
    """
    plugins = map(importlib.util.find_spec, ("libtpu", "jax_plugins"))
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(plugins):
        return
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{FLAGS} {given or ''}"
    jax.devices()
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given
