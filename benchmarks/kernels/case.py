"""What is compiled: a kernel at a shape, by one implementation. The cases are in `cases`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.estimate import Part

OURS = "ours"
PEERS = ("splash", "tokamax")  # all other implementations are ours
Blocks = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A function for abstract arguments, and what a call of it is about."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # arrays or jax.ShapeDtypeStruct, nested
    parts: tuple[Part, ...]
    flops: float  # that any implementation must do; masked and repeated work does not count
    min_bytes: float  # inputs read once, results written once


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where the blocks of a case stand in the dispatch tables.

    parts: an operation of several kernels has blocks for each by name, and a case may be about some of them; its own
    blocks then have just these names.
    """

    kernel: str
    shape: Mapping[str, float]
    parts: tuple[str, ...] = ()
    rival: str | None = None  # implementation without which these parts are written as null: they serve only if faster


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel at a shape. `choices` are blocks a sweep tries; the first serves where no table names any."""

    kernel: str
    shape: str
    build: Callable[[Blocks], Program]
    choices: tuple[Blocks, ...] = ({},)
    entry: Entry | None = None
    dispatched: Callable[[], Blocks | None] | None = None  # what `gemma_kernels` itself chooses, where a rule does
    implementation: str = OURS
    environment: str | None = None  # below benchmarks/.venvs; None: the python that runs the harness
    is_quick: bool = False  # among the few that continuous integration compiles

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.shape}/{self.implementation}"

    @property
    def is_ours(self) -> bool:
        return self.implementation not in PEERS
