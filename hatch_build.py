"""Builds gemma_kernels' native library on installation, if there is a C++ compiler.

Without one, or if it fails, the installation goes on with a warning, and kernels work by plain JAX. The compiler is
that of the environment variable CXX, else c++, g++ or clang++. Headers come from jaxlib: the one that is installed
already, else one that pip gets for the build. XLA runs libraries built for an older XLA, but not for a newer one.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from importlib import util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = "kernels/gemma_kernels/cpu"
LIBRARY = "_native.so"
JAXLIB = ["jaxlib>=0.10,<0.11; python_version<'3.15'", "jaxlib; python_version>='3.15'"]  # the oldest that we support
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-w"]  # no product and sum in one but where it is written
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
X86_LEVELS = {"avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}


class NativeBuildHook(BuildHookInterface):
    PLUGIN_NAME = "custom"
    folder: Path | None = None  # of a library on its way into a wheel

    def dependencies(self) -> list[str]:
        return JAXLIB if compiler() and not headers() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        is_editable = version == "editable"
        in_tree = Path(self.root, SOURCES, LIBRARY)
        if is_editable:
            folder = in_tree.parent
            in_tree.unlink(missing_ok=True)  # a running program keeps the file it has
        else:
            folder = self.folder = Path(tempfile.mkdtemp(prefix="gemma_kernels"))
        if problem := build(Path(self.root, SOURCES), folder / LIBRARY):
            self.app.display_warning(f"gemma_kernels has no native library and is slower on CPUs: {problem}")
        elif not is_editable:
            build_data["force_include"][str(folder / LIBRARY)] = f"gemma_kernels/cpu/{LIBRARY}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag()}"  # no Python is in it

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.folder:
            shutil.rmtree(self.folder)


def compiler() -> list[str] | None:
    """The command of the C++ compiler."""
    if os.name == "nt":
        return None
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        return command if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def headers() -> Path | None:
    """XLA's headers in jaxlib: pip hides what is installed from the build, but the same Python will use it."""
    installed = [Path(sysconfig.get_path(name), "jaxlib") for name in ("platlib", "purelib")]
    spec = util.find_spec("jaxlib")
    folders = installed + [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return next((folder / "include" for folder in folders if (folder / "include/xla/ffi/api/ffi.h").exists()), None)


def platform_tag() -> str:
    return sysconfig.get_platform().replace("universal2", platform.machine()).replace("-", "_").replace(".", "_")


def build(sources: Path, library: Path) -> str | None:
    """Compiles and links; what went wrong, if anything did."""
    command, include = compiler(), headers()
    if command is None:
        return "no C++ compiler was found (c++, g++, clang++, or CXX)"
    if include is None:
        return "no jaxlib with XLA's headers was found"
    levels = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {}
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "native": [str(sources / "native.cc"), f"-I{include}"],
            **{
                level: [str(sources / "kernels.cc"), f"-DKERNELS=kernels_{level}", *flags]
                for level, flags in {"base": [], **levels}.items()
            },
        }
        commands = [[*command, *FLAGS, "-c", *step, "-o", f"{folder}/{name}.o"] for name, step in steps.items()]
        link = [*command, "-shared", "-pthread", *(f"{folder}/{name}.o" for name in steps), "-o", f"{folder}/{LIBRARY}"]
        if problem := run(commands) or run([link]):
            return problem
        shutil.copy(f"{folder}/{LIBRARY}", library)
    return None


def run(commands: list[list[str]]) -> str | None:
    """Runs commands at the same time; the end of the first failed one's output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    running = [subprocess.Popen(command, **pipes) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    failed = (i for i, process in enumerate(running) if process.returncode)
    return next((f"{shlex.join(commands[i])} failed: {outputs[i][-2000:]}" for i in failed), None)
