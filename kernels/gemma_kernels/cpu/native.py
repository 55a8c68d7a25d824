"""The native library: built from the C++ beside this file when the package is installed and a compiler is there.

It is loaded at its first use, not at import. Without it everything works by `chunked`, more slowly.
"""

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemma_kernels import dispatch
from gemma_kernels.cpu.encodings import Encoding

VERSION = 1  # must equal native.cc's
PATH = Path(__file__).with_name("_native.so")
PRODUCT, DECODE = "gemma_kernels_product", "gemma_kernels_decode"
MULTIPLE = 32  # inputs that are decoded at once


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library with its functions registered, or None; and why not."""
    if not PATH.exists():
        return None, "it was not built: install gemma-jax where there is a C++ compiler (g++, clang++, or CXX)"
    try:
        library = ctypes.CDLL(str(PATH))
        version = library.GemmaKernelsVersion()
        built_for = library.GemmaKernelsFfiMajor(), library.GemmaKernelsFfiMinor()
        if version != VERSION:
            return None, f"{PATH} has version {version}, wanted {VERSION}: install gemma-jax again"
        if built_for[0] != (here := _interface())[0] or built_for > here:
            return None, f"{PATH} was built for XLA FFI {built_for}, this jaxlib has {here}: install gemma-jax again"
        for name, function in ((PRODUCT, library.GemmaKernelsProduct), (DECODE, library.GemmaKernelsDecode)):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    except (OSError, AttributeError, IndexError, jax.errors.JaxRuntimeError) as error:
        return None, f"{PATH} cannot be used here ({error}): install gemma-jax again"
    library.GemmaKernelsLevel.restype = ctypes.c_char_p
    return library, ""


def _interface() -> tuple[int, int]:
    """Version of XLA's foreign function interface in the installed jaxlib, from its header.

    A library for a newer one must not even be registered: XLA then refuses to start the CPU at all.
    """
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0] for part in ("MAJOR", "MINOR"))
    return int(major), int(minor)


def is_available() -> bool:
    """Whether products on a CPU are the library's; not in programs traced under `using("reference")`."""
    return not reason()


def reason() -> str:
    """Why the library is not available; empty if it is."""
    return "no kernel for reference" if dispatch.target() == dispatch.REFERENCE else _load()[1]


def levels() -> list[str]:
    """Instruction sets for which this machine can run the library's kernels, the one in use by default first."""
    library = _load()[0]
    if library is None:
        return []
    names = (library.GemmaKernelsLevel(index) for index in range(8))
    return [name.decode() for name in names if name]


@contextlib.contextmanager
def level(name: str) -> Iterator[None]:
    """Runs the kernels of another instruction set: for tests. For all threads, and what is already compiled."""
    library, why = _load()
    if library is None:
        raise ValueError(f"the native library is not available: {why}")
    if name not in levels():
        raise ValueError(f"level {name!r} cannot run on this machine; wanted one of {levels()}")
    library.GemmaKernelsUseLevel(levels().index(name))
    try:
        yield
    finally:
        library.GemmaKernelsUseLevel(0)


def product(x: jax.Array, parts: Sequence[tuple[jax.Array, Encoding]]) -> jax.Array:
    """x [M, I] times each of the transposed weights [O, width] -> [M, sum of O]; I is a multiple of MULTIPLE."""
    shape = jax.ShapeDtypeStruct((len(x), sum(len(data) for data, _ in parts)), jnp.float32)
    encodings = np.array([encoding.number for _, encoding in parts], np.int32)
    call = jax.ffi.ffi_call(PRODUCT, shape, vmap_method="sequential")
    return call(x, *(data for data, _ in parts), encodings=encodings)


def dequantised(data: jax.Array, encoding: Encoding) -> jax.Array:
    """Every weight as float32: [O, width] -> [O, I]; I is a multiple of MULTIPLE."""
    shape = jax.ShapeDtypeStruct((len(data), encoding.num_values(data.shape[1])), jnp.float32)
    return jax.ffi.ffi_call(DECODE, shape, vmap_method="sequential")(data, encoding=np.int32(encoding.number))
