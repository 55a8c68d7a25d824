"""A config as plain data for a JSON file, whole and without loss: also of models that no other format can describe."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from gemma_jax.configs.config import MAX_LAYERS, ConfigError, DecoderConfig

VERSION = 1


def to_data(config: DecoderConfig) -> dict[str, Any]:
    """What `from_data` reads."""
    return {"version": VERSION, "config": dataclasses.asdict(config)}


def from_data(data: Mapping[str, Any], name: str) -> DecoderConfig:
    """The config in the content of a JSON file. Raises ConfigError that names the field for anything else."""
    if data.get("version") != VERSION:
        raise ConfigError(f"the config has version {data.get('version')!r}; this program reads {VERSION}")
    config = _object(DecoderConfig, data.get("config"), "config")
    return dataclasses.replace(config, name=name)


def _object(kind: Any, data: Any, path: str) -> Any:
    """One of our dataclasses. Fields that are not in the data keep their defaults; unknown ones are an error."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} is {data!r}; wanted an object")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise ConfigError(f"{path} has the unknown field {unknown[0]!r}; was it written by a newer version?")
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise ConfigError(f"{path} has no field {missing[0]!r}")
    return kind(**{name: _value(hints[name], value, f"{path}.{name}") for name, value in data.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping) and _fits(kind, value, kinds):
            return _object(kind, value, path)
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            if len(value) > MAX_LAYERS:
                raise ConfigError(f"{path} has {len(value)} items; wanted at most {MAX_LAYERS}")
            item = typing.get_args(kind)[0]
            return tuple(_value(item, one, f"{path}.{i}") for i, one in enumerate(value))
        if kind is float and type(value) in (int, float):
            return value
        if isinstance(kind, type) and type(value) is kind:
            return value
    wanted = " or ".join("None" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ConfigError(f"{path} is {value!r}; wanted {wanted}")


def _fits(kind: Any, value: Mapping[str, Any], kinds: tuple[Any, ...]) -> bool:
    """Of several kinds of objects that may stand at a place, the one with these fields."""
    objects = [one for one in kinds if dataclasses.is_dataclass(one)]
    return len(objects) == 1 or set(value) <= {field.name for field in dataclasses.fields(kind)}
