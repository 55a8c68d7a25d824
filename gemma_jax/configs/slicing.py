"""MatFormer slicing as data: which part of a model is a smaller model (arXiv:2310.07707; gemma3n.md, section 3).

A slice keeps some layers, and of each one's ffw the first units. Nothing here imports jax.
"""

import ast
import csv
import dataclasses
import io
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.configs.config import MAX_LAYERS, MAX_POSITION, ConfigError, DecoderConfig

Number = int | tuple[int, ...]
MAX_TEXT = 10_000  # characters of arithmetic
NAME, WIDTHS, SKIPPED = "name", "FFN Hidden Dims", "Layers Skipped"  # columns of google/gemma3n-slicing-configs


@dataclass(frozen=True)
class Slicing:
    """A slice of a model. `skip` are layers of the whole model, `ffw` the width of all kept layers or of each of them;
    None: as it is.
    """

    skip: tuple[int, ...] = ()
    ffw: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = [*_whole_numbers("skip", self.skip), *_whole_numbers("ffw", self.ffw)]
        if given:
            raise ConfigError(f"no slice: {'; '.join(given)}")

    @staticmethod
    def of(skip: Iterable[int] = (), ffw: int | Iterable[int] | None = None) -> "Slicing":
        """From any sequences, of numpy's numbers too. Raises ConfigError for anything else."""
        try:
            widths = ffw if ffw is None or np.ndim(ffw) else operator.index(ffw)  # pyright: ignore
            many = tuple(map(operator.index, widths)) if isinstance(widths, Iterable) else widths
            return Slicing(tuple(map(operator.index, skip)), many)
        except TypeError:
            raise ConfigError(
                f"no slice: skip is {skip!r}, ffw {ffw!r}; wanted layers, and a width or widths"
            ) from None

    def then(self, other: "Slicing", config: DecoderConfig) -> "Slicing":
        """The slice of `config` that is `other` of this slice of it. Raises ConfigError as `apply`."""
        small, kept = self.apply(config), self.kept(config)
        other.apply(small)
        return Slicing((*self.skip, *(kept[i] for i in other.skip)), other.widths(small))

    def kept(self, config: DecoderConfig) -> tuple[int, ...]:
        """The layers of the whole model that are kept."""
        return tuple(i for i in range(config.num_layers) if i not in self.skip)

    def widths(self, config: DecoderConfig) -> tuple[int, ...]:
        """The ffw width of each kept layer."""
        kept = self.kept(config)
        if self.ffw is None:
            return tuple(config.layers[i].ffw_width for i in kept)
        return (self.ffw,) * len(kept) if isinstance(self.ffw, int) else self.ffw

    def apply(self, config: DecoderConfig) -> DecoderConfig:
        """The config of the slice. Layers keep their kind, their sparsity and the layer whose keys they read.

        Raises ConfigError for layers that are not there, a layer left out whose keys a kept one reads, widths beyond
        the layer's own, and another number of widths than of kept layers.
        """
        kept, widths = self.kept(config), self.widths(config)
        if problems := [*self._problems(config, kept, widths)]:
            raise ConfigError(f"{config.name} has no such slice:\n  " + "\n  ".join(problems))
        place = {old: new for new, old in enumerate(kept)}
        layers = []
        for old, width in zip(kept, widths, strict=True):
            spec = config.layers[old]
            source = None if spec.kv_source is None else place[spec.kv_source]
            layers.append(dataclasses.replace(spec, ffw_width=width, kv_source=source))
        return dataclasses.replace(config, name=f"{config.name}-slice", layers=tuple(layers))

    def _problems(self, config: DecoderConfig, kept: tuple[int, ...], widths: tuple[int, ...]) -> Iterable[str]:
        if outside := sorted(i for i in self.skip if not 0 <= i < config.num_layers):
            yield f"skip has {outside[0]}; layers are 0 to {config.num_layers - 1}"
        if len(set(self.skip)) < len(self.skip):
            yield f"skip names a layer twice: {self.skip}"
        if not kept:
            yield "skip leaves no layer"
        for i in kept:
            source = config.layers[i].kv_source
            if source in self.skip:
                yield f"skip has layer {source}, but layer {i} is kept and reads its keys and values"
        if len(widths) != len(kept):
            yield f"ffw has {len(widths)} widths, but {len(kept)} layers are kept"
            return
        for i, width in zip(kept, widths, strict=True):
            whole = config.layers[i].ffw_width
            if not 1 <= width <= whole:
                yield f"ffw is {width} in layer {i}; wanted 1 to {whole}"


def read_slicings(source: str | os.PathLike) -> dict[str, Slicing]:
    """The slices of a file in the published form (dataset google/gemma3n-slicing-configs), by name.

    Its columns hold arithmetic, as `[2_048 * 8] * 10 + [2_048 * 4]`, which is computed and never evaluated as Python.
    Raises ConfigError that names the row and column; OSError.
    """
    rows = csv.DictReader(io.StringIO(Path(source).read_text(encoding="utf-8-sig")))
    columns = rows.fieldnames or []
    if missing := [column for column in (NAME, WIDTHS, SKIPPED) if column not in columns]:
        raise ConfigError(f"{source} has no column {missing[0]!r}; it has {', '.join(columns)}")
    found: dict[str, Slicing] = {}
    for number, row in enumerate(rows, 2):
        values = {}
        for column in (WIDTHS, SKIPPED):
            try:
                values[column] = parse_list(row[column] or "")
            except ConfigError as error:
                raise ConfigError(f"{source}, line {number}, {column}: {error}") from None
        name = row[NAME] or f"line {number}"
        if name in found:
            raise ConfigError(f"{source}, line {number}: a second slice is called {name!r}")
        found[name] = Slicing(values[SKIPPED], values[WIDTHS] or None)
    return found


def parse_numbers(text: str) -> Number:
    """A whole number, or several, from arithmetic such as "8192", "2_048 * 4" or "[8192] * 30". Raises ConfigError."""
    if len(text) > MAX_TEXT:
        raise ConfigError(f"the text has {len(text)} characters; wanted numbers and + - * // [ ]")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"{text!r:.100} cannot be read; wanted numbers and + - * // [ ]") from None
    try:
        return _computed(tree)
    except RecursionError:
        raise ConfigError(f"{text!r:.100} is nested too deeply") from None


def parse_list(text: str) -> tuple[int, ...]:
    """As `parse_numbers`; one number is a list too, and nothing is the empty one."""
    if text.strip().lower() in ("", "none", "nan", "-"):
        return ()
    value = parse_numbers(text)
    return value if isinstance(value, tuple) else (value,)


def _computed(node: ast.expr) -> Number:
    """The value of whole numbers, lists of them, sums, products and repetitions, within bounds."""
    value: Number
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.List | ast.Tuple):
        items = [_computed(item) for item in node.elts]
        if not all(isinstance(item, int) for item in items):
            raise ConfigError("a list holds a list; wanted whole numbers")
        value = tuple(item for item in items if isinstance(item, int))
    elif isinstance(node, ast.BinOp):
        value = _combined(node.op, _computed(node.left), _computed(node.right))
    else:
        raise ConfigError(f"{ast.unparse(node)!r:.60} is neither a number nor a list; wanted numbers and + - * // [ ]")
    if isinstance(value, tuple) and len(value) > MAX_LAYERS:
        raise ConfigError(f"a list has {len(value)} numbers; wanted at most {MAX_LAYERS}")
    if isinstance(value, int) and abs(value) > MAX_POSITION:
        raise ConfigError(f"{value} is beyond {MAX_POSITION}")
    return value


def _combined(operation: ast.operator, a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int):
        if isinstance(operation, ast.Add):
            return a + b
        if isinstance(operation, ast.Sub):
            return a - b
        if isinstance(operation, ast.Mult):
            return a * b
        if isinstance(operation, ast.FloorDiv) and b:
            return a // b
    if isinstance(operation, ast.Add) and isinstance(a, tuple) and isinstance(b, tuple):
        return a + b
    if isinstance(operation, ast.Mult) and isinstance(a, tuple) != isinstance(b, tuple):
        items, times = (a, b) if isinstance(a, tuple) else (b, a)
        if isinstance(items, tuple) and isinstance(times, int) and 0 <= times <= MAX_LAYERS:
            return items * times
    raise ConfigError("an operation is neither arithmetic of whole numbers nor a sum or repetition of lists")


def _whole_numbers(name: str, value: Any) -> Iterable[str]:
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    if wrong := [one for one in values if type(one) is not int]:
        yield f"{name} has {wrong[0]!r}; wanted whole numbers"


E2B = Slicing(skip=(20, 21, 22, 23, 24), ffw=8192)  # of E4B: what was released as E2B
