"""What tables are written in: a row is one weight, our path and dimensions and its place in each format."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_checkpoints.names import Entry

FORMATS: tuple[str, ...] = ("orbax", "huggingface", "deepmind", "gguf")


@dataclass(frozen=True)
class At:
    """A place in a file: a tensor's name, its dimensions if they are not ours, and (which, of how many) in a stack."""

    name: str
    axes: str = ""
    member: tuple[int, int] | None = None


@dataclass(frozen=True)
class Row:
    """One weight: our path, our dimensions, and its place in each format; None where a format has no word for it.

    A dimension is a letter of the table's sizes or a number; V and R are tables of tokens, which files may pad.
    """

    path: str
    dims: str
    huggingface: At | None
    deepmind: At | None = None
    gguf: At | None = None
    is_optional: bool = False  # files may leave it out; then it is zero


@dataclass(frozen=True)
class Placed:
    """A row in a model: the sizes of its letters, and what goes before our path and the file's name in each format."""

    row: Row
    sizes: Mapping[str, int]
    path_prefix: str = ""
    name_prefixes: Mapping[str, str] | None = None

    @property
    def path(self) -> str:
        return self.path_prefix + self.row.path

    def entry(self, format: str, norm_offset: float = 0.0, num_spare_rows: int = 0) -> Entry | None:
        """The entry in one format's table; None where the format has no word for it.

        Args:
            norm_offset: what files of the format have more than we in the scale of a norm.
            num_spare_rows: rows that are added to the table of tokens when it is written.
        """
        row = self.row
        place = At(self.path) if format == "orbax" else getattr(row, format)
        if place is None:
            return None
        letters = row.dims.split()
        return Entry(
            self.path,
            tuple(self.sizes[letter] if letter in self.sizes else int(letter) for letter in letters),
            place.name if format == "orbax" else (self.name_prefixes or {}).get(format, "") + place.name,
            f"{_named(letters)} -> {place.axes}" if place.axes else "",
            () if place.member is None else (place.member[0],),
            () if place.member is None else (place.member[1],),
            offset=-norm_offset if row.path.endswith("norm/scale") else 0.0,
            has_spare_rows=letters[0] in ("V", "R"),
            num_spare_rows=num_spare_rows if letters[0] == "V" else 0,
            is_optional=row.is_optional,
        )


def norm(path: str, dims: str, huggingface: str, deepmind: str | None = None, gguf: str | None = None) -> Row:
    """The row of a norm's scale, which all formats store as a vector."""
    theirs = At(f"{deepmind}/scale") if deepmind else None
    return Row(f"{path}/scale", dims, At(f"{huggingface}.weight"), theirs, At(f"{gguf}.weight") if gguf else None)


def _named(dims: list[str]) -> str:
    """Dimensions as names: one that comes twice gets a prime, as in "P P' 3 C"."""
    seen: list[str] = []
    for name in dims:
        while name in seen:
            name += "'"
        seen.append(name)
    return " ".join(seen)
