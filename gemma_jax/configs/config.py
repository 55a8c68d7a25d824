"""The architecture as data: every ingredient of Gemma 1, 2, 3 and 3n is a field here, a published model is an instance.

An ablation is `config.replace("attention.local.window", 256)`. Nothing here imports jax.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gemma_jax.configs.towers import AudioConfig, MobileNetConfig


class ConfigError(ValueError):
    """A configuration that describes no possible model, or an override that names no field."""


@dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """What a layer of one kind sees, and how it knows where it is (Gemma 3 report, sec. 2)."""

    window: int | None  # keys a query sees, itself included; None: all earlier ones
    rope_theta: float
    rope_scale: float = 1.0  # positions are divided by it (position interpolation, arXiv:2306.15595)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention. Layers choose one of two kinds: `local` (sliding window) or `global_`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_pre_attn_scalar: float  # logits are scaled by its inverse square root
    local: AttentionKind
    global_: AttentionKind
    has_qk_norm: bool = True  # RMSNorm on queries and keys, before rope (Gemma 3)
    has_v_norm: bool = False  # RMSNorm without weight on values (3n)
    softcap: float | None = None  # softcap * tanh(logits / softcap) (Gemma 2)
    is_causal: bool = True  # False: EmbeddingGemma; then a window counts half to each side

    @property
    def query_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Root-mean-square normalisation (arXiv:1910.07467) and where it stands."""

    epsilon: float = 1e-6
    is_zero_centred: bool = True  # multiply by 1 + w (Gemma 1 to 3) or by w (3n)
    has_post_norms: bool = True  # also after attention and ffw, before the residual sum (Gemma 2 on)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Everything that may differ between layers, and nothing else. A layer does not know its index."""

    is_local: bool
    ffw_width: int
    activation_sparsity: float = 0.0  # share of gate activations set to zero (3n, gaussian top-k)
    kv_source: int | None = None  # index of the layer whose keys and values are read; None: its own (3n)


@dataclass(frozen=True, kw_only=True)
class AltUpConfig:
    """Alternating updates (arXiv:2301.13310; Gemma 3n)."""

    num_streams: int = 4
    active_stream: int = 0
    coefficient_clip: float | None = 120.0
    has_corrected_scale: bool = True


@dataclass(frozen=True, kw_only=True)
class PerLayerEmbeddingConfig:
    """A second table of token embeddings with one row piece for each layer (Gemma 3n)."""

    num_rows: int
    width: int


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP encoder that stands before the decoder of the 4B, 12B and 27B models."""

    num_layers: int
    width: int
    num_heads: int
    ffw_width: int
    patch_size: int
    image_size: int
    num_soft_tokens: int
    soft_token: int = 262_144  # stands where an image's vectors go; it has no row in the table
    begin_token: int = 255_999
    end_token: int = 256_000


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One Gemma text decoder, complete. Frozen and hashable, so it can be a static argument of jit."""

    name: str
    vocab_size: int
    width: int
    context: int  # positions the model was trained for
    attention: AttentionConfig
    layers: tuple[LayerSpec, ...]
    period: int  # layers in one turn of the local/global pattern; equal periods are scanned
    norm: NormConfig = NormConfig()
    activation: str = "gelu_tanh"  # of the ffw gate; one of ACTIVATIONS
    has_embedding_scale: bool = True  # multiply embeddings by sqrt(width), rounded to the table's dtype
    has_tied_head: bool = True  # logits from the embedding table
    final_softcap: float | None = None
    altup: AltUpConfig | None = None
    laurel_rank: int | None = None  # arXiv:2411.07501
    per_layer_embedding: PerLayerEmbeddingConfig | None = None
    vision: VisionConfig | MobileNetConfig | None = None
    audio: AudioConfig | None = None
    dense_widths: tuple[int, ...] = ()  # of the linear layers after EmbeddingGemma's mean over tokens

    def __post_init__(self) -> None:
        check(self)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def decoder(self) -> "DecoderConfig":
        """The same without what stands around a decoder: towers, and the layers after EmbeddingGemma's pooling."""
        return self.replace_all([("vision", None), ("audio", None), ("dense_widths", ())])

    @property
    def num_ids(self) -> int:
        """How many ids a prompt may have: the vocabulary's, and those of 3n's hard tokens."""
        towers = [t for t in (self.vision, self.audio) if isinstance(t, MobileNetConfig | AudioConfig)]
        return max(self.vocab_size, *(t.first_token + t.num_hard_tokens for t in towers), 0)

    @property
    def generation(self) -> int:
        """1, 2 or 3: the family whose file formats have words for these norms. For writers of files, not for models."""
        return 3 if self.attention.has_qk_norm else 2 if self.norm.has_post_norms else 1

    def kind(self, spec: LayerSpec) -> AttentionKind:
        """The attention kind of one layer."""
        return self.attention.local if spec.is_local else self.attention.global_

    def replace(self, path: str, value: Any) -> "DecoderConfig":
        """A copy with the field at a dotted path changed, for example `replace("attention.local.window", 256)`.

        `global` may be written for `global_`; `layers.3.ffw_width` changes one layer and `layers.*.ffw_width` all.
        Raises ConfigError when the path names no field, or the result is no possible model.
        """
        return self.replace_all([(path, value)])

    def replace_all(self, changes: Iterable[tuple[str, Any]]) -> "DecoderConfig":
        """As `replace` for several changes, made in order; only what results in the end must be a possible model."""
        fields: dict[str, Any] = {}
        for path, value in changes:
            key, *rest = path.split(".")
            name = _field(self, key, path)
            if not rest:
                _check_type(type(self), name, value, path)
            fields[name] = _replaced(fields.get(name, getattr(self, name)), rest, value, path)
        return dataclasses.replace(self, **fields)


MAX_LAYERS = 1024  # that a file may claim: far more than any Gemma has, and few enough to look at
MAX_POSITION = 2**31 - 1  # of int32
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu")


def _replaced(node: Any, keys: list[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, tuple):
        chosen = range(len(node)) if key == "*" else [_layer_index(key, len(node), path)]
        if not rest:
            _check_items((value,), type(node[0]), path)
        return tuple(_replaced(item, rest, value, path) if i in chosen else item for i, item in enumerate(node))
    name = _field(node, key, path)
    if not rest:
        _check_type(type(node), name, value, path)
    return dataclasses.replace(node, **{name: _replaced(getattr(node, name), rest, value, path)})


def _field(node: Any, key: str, path: str) -> str:
    """The name of the field that `key` means."""
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise ConfigError(f"{path!r}: there is no field {key!r} below a {type(node).__name__}; it has no fields")
    names = [field.name for field in dataclasses.fields(node)]
    name = key if key in names else f"{key}_"
    if name not in names:
        raise ConfigError(f"{path!r}: {type(node).__name__} has no field {key!r}; it has {', '.join(names)}")
    return name


def _check_type(owner: type, name: str, value: Any, path: str) -> None:
    wanted: Any = next(field.type for field in dataclasses.fields(owner) if field.name == name)
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if typing.get_origin(wanted) is tuple and isinstance(value, tuple):
        _check_items(value, typing.get_args(wanted)[0], path)
    is_number = isinstance(value, int) and not isinstance(value, bool) and float in kinds
    if not is_number and type(value) not in kinds:
        names = " or ".join("None" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ConfigError(f"{path!r} is set to {value!r}, {type(value).__name__}; wanted {names}")


def _check_items(values: tuple[Any, ...], kind: type, path: str) -> None:
    for value in values:
        if type(value) is not kind:
            raise ConfigError(f"{path!r} is set to {value!r}, {type(value).__name__}; wanted {kind.__name__}")


def _layer_index(key: str, length: int, path: str) -> int:
    if not key.isdecimal() or int(key) >= length:
        raise ConfigError(f"{path!r}: {key!r} is no layer; wanted 0 to {length - 1}, or * for all")
    return int(key)


def check(config: DecoderConfig) -> None:
    """Raises one ConfigError that lists every contradiction, each naming the fields at odds."""
    problems = [
        *_size_problems(config),
        *_attention_problems(config),
        *_layer_problems(config),
        *_optional_problems(config),
    ]
    if problems:
        raise ConfigError(f"config {config.name!r} is impossible:\n  " + "\n  ".join(problems))


def check_same(config: DecoderConfig, described: DecoderConfig, where: str) -> None:
    """Raises ConfigError that names the fields in which `described`, read back from what a format can say, differs.

    `period` is left out: it only says what is scanned.
    """
    wanted = dataclasses.replace(config, period=described.period)
    differences = list(_differences(dataclasses.asdict(wanted), dataclasses.asdict(described), ""))
    if differences:
        raise ConfigError(f"{where} cannot describe config {config.name!r}:\n  " + "\n  ".join(differences[:10]))


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from _differences(value, theirs[key], f"{path}.{key}".strip("._"))
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{path}.{i}")
    elif ours != theirs:
        yield f"{path} is {ours!r}; it would be read as {theirs!r}"


def _positive(name: str, value: Any, whole: bool = True) -> Iterator[str]:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= sys.float_info.max:
        yield f"{name} is {value!r}; wanted a positive {'whole number' if whole else 'number'}"


def _size_problems(config: DecoderConfig) -> Iterator[str]:
    for name in ("vocab_size", "width", "context", "period"):
        yield from _positive(name, getattr(config, name))
    if config.activation not in ACTIVATIONS:
        yield f"activation is {config.activation!r}; wanted one of {', '.join(ACTIVATIONS)}"
    for name in ("final_softcap", "laurel_rank"):
        if (value := getattr(config, name)) is not None:
            yield from _positive(name, value, whole=name == "laurel_rank")
    yield from _positive("norm.epsilon", config.norm.epsilon, whole=False)


def _attention_problems(config: DecoderConfig) -> Iterator[str]:
    attention = config.attention
    sizes = [*_positive("attention.num_heads", attention.num_heads)]
    sizes += _positive("attention.num_kv_heads", attention.num_kv_heads)
    sizes += _positive("attention.head_dim", attention.head_dim)
    yield from sizes
    if not sizes and attention.num_heads % attention.num_kv_heads:
        yield (
            f"attention.num_heads {attention.num_heads} is not a multiple of "
            f"attention.num_kv_heads {attention.num_kv_heads}"
        )
    if not sizes and attention.head_dim % 2:
        yield f"attention.head_dim is {attention.head_dim}; rope turns pairs, so it must be even"
    yield from _positive("attention.query_pre_attn_scalar", attention.query_pre_attn_scalar, whole=False)
    if attention.softcap is not None:
        yield from _positive("attention.softcap", attention.softcap, whole=False)
    for name, kind in (("attention.local", attention.local), ("attention.global", attention.global_)):
        if kind.window is not None:
            yield from _positive(f"{name}.window", kind.window)
            if isinstance(kind.window, int) and kind.window > MAX_POSITION:
                yield f"{name}.window is {kind.window}; positions are int32, so wanted at most {MAX_POSITION}"
        yield from _positive(f"{name}.rope_theta", kind.rope_theta, whole=False)
        yield from _positive(f"{name}.rope_scale", kind.rope_scale, whole=False)
    if attention.global_.window is not None:
        yield f"attention.global.window is {attention.global_.window}, but a global layer sees everything; wanted None"
    if any(spec.is_local for spec in config.layers) and attention.local.window is None:
        yield "attention.local.window is None, but layers has local layers; wanted a window, or layers.*.is_local False"


def _layer_problems(config: DecoderConfig) -> Iterator[str]:
    if not config.layers:
        yield "layers is empty; wanted at least one LayerSpec"
    for i, spec in enumerate(config.layers):
        yield from _positive(f"layers.{i}.ffw_width", spec.ffw_width)
        if not 0.0 <= spec.activation_sparsity < 1.0:
            yield f"layers.{i}.activation_sparsity is {spec.activation_sparsity}; wanted at least 0 and below 1"
        source = spec.kv_source
        if source is None:
            continue
        if not 0 <= source < i:
            yield f"layers.{i}.kv_source is {source}; wanted an earlier layer, 0 to {i - 1}"
        elif config.layers[source].kv_source is not None:
            yield f"layers.{i}.kv_source is {source}, but layer {source} has no keys of its own either"
        elif config.layers[source].is_local != spec.is_local:
            yield f"layers.{i}.kv_source is {source}, but layers.{source}.is_local differs from layers.{i}.is_local"


def _optional_problems(config: DecoderConfig) -> Iterator[str]:
    """What only some models have."""
    if (altup := config.altup) is not None:
        sizes = [*_positive("altup.num_streams", altup.num_streams)]
        yield from sizes
        if not sizes and (type(altup.active_stream) is not int or not 0 <= altup.active_stream < altup.num_streams):
            yield f"altup.active_stream is {altup.active_stream}, but altup.num_streams is {altup.num_streams}"
        if altup.num_streams == 1 and config.per_layer_embedding is not None:
            yield "altup.num_streams is 1, but per_layer_embedding goes to the others; wanted 2 or more, or altup None"
        if altup.coefficient_clip is not None:
            yield from _positive("altup.coefficient_clip", altup.coefficient_clip, whole=False)
    if (table := config.per_layer_embedding) is not None:
        sizes = [*_positive("per_layer_embedding.num_rows", table.num_rows)]
        yield from [*sizes, *_positive("per_layer_embedding.width", table.width)]
        if not sizes and table.num_rows > config.vocab_size:
            yield f"per_layer_embedding.num_rows is {table.num_rows}, more than vocab_size {config.vocab_size}"
    for i, width in enumerate(config.dense_widths):
        yield from _positive(f"dense_widths.{i}", width)
    if (audio := config.audio) is not None:
        for name in ("num_layers", "width", "num_heads", "num_bins", "kernel"):
            yield from _positive(f"audio.{name}", getattr(audio, name))
        if len(audio.channels) != 2:
            yield f"audio.channels is {audio.channels}; wanted the widths of two convolutions"
    if isinstance(vision := config.vision, MobileNetConfig):
        if len(vision.stages) < 2 or not all(vision.stages):
            yield "vision.stages has not two stages with blocks, whose outputs are put together"
    elif vision is not None:
        sizes = [p for name, value in dataclasses.asdict(vision).items() for p in _positive(f"vision.{name}", value)]
        yield from sizes
        if not sizes and vision.width % vision.num_heads:
            yield f"vision.width {vision.width} is not a multiple of vision.num_heads {vision.num_heads}"
        if not sizes and vision.image_size % vision.patch_size:
            yield f"vision.image_size {vision.image_size} is not a multiple of vision.patch_size {vision.patch_size}"
