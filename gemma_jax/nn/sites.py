"""The named places of a forward pass where values can be looked at and changed, and what a forward calls there.

In the order in which a token meets them; T is the number of tokens, other letters as in `nn/layers.py`:

    embed                    [B, T, D]     rows of the table, scaled; soft tokens of images in their places
    layers.{i}.resid_pre     [B, T, D]     the stream as layer i gets it
    layers.{i}.attn_in       [B, T, D]     ... after the norm before attention
    layers.{i}.q, k, v       [B, T, N, H]  (k, v: K heads) after norm and rope; q before its scale
    layers.{i}.attn_weights  [B, N, T, S]  attention maps, float32; to be captured only, and only without a cache
    layers.{i}.heads         [B, T, N, H]  what each head brings, before w_o
    layers.{i}.attn_out      [B, T, D]     what attention adds to the stream, after the norm that follows it (if any)
    layers.{i}.laurel_out    [B, T, D]     what LAuReL adds to it (3n)
    layers.{i}.resid_mid     [B, T, D]     the stream between attention and ffw
    layers.{i}.mlp_in        [B, T, D]     ... after the norm before the ffw
    layers.{i}.mlp_hidden    [B, T, F]     activation(gate) * up: the neurons
    layers.{i}.mlp_out       [B, T, D]     what the ffw adds to the stream, after the norm that follows it (if any)
    layers.{i}.resid_post    [B, T, D]     the stream as layer i leaves it
    layers.{i}.ple_out       [B, T, D]     what the layer's own embedding of the token adds to it (3n)
    final                    [B, T, D]     after the final norm
    logits                   [B, T, V]     float32

With AltUp the stream is the active one: resid_pre as predicted, resid_post as the block made it, before it corrects the
others. Layers that read other layers' keys have no k and v.

A pattern names several, as a shell's: "layers.*.resid_post", "layers.1[0-7].*_out".
"""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from gemma_jax.configs.config import DecoderConfig, LayerSpec
from gemma_jax.nn.masks import Places

MAPS = "attn_weights"


class Change(Protocol):
    """A change at the sites that `site` names; see `nn/edits.py`."""

    @property
    def site(self) -> str: ...

    def __call__(self, x: jax.Array, where: Places) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tap:
    """What a forward calls at its sites. This one leaves all as it is: the plain forward has no trace of it."""

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """The value to go on with."""
        return x

    def watch(self, name: str, make: Callable[[], jax.Array]) -> None:
        """Offers a value that the forward itself has no use for, and that is made only if it is asked for."""

    def within(self, prefix: str) -> "Tap":
        """The tap of a part, whose sites begin with `prefix`."""
        return self


UNTAPPED = Tap()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed(Tap):
    """Edits and captures nothing, but keeps the sites apart, as `Taps` promises."""

    where: Places

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, self.where.positions, cpu=_choice, default=_barrier)


def _barrier(x: jax.Array, positions: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x)


def _choice(x: jax.Array, positions: jax.Array) -> jax.Array:
    """A branch that is always taken. XLA on CPU drops barriers before it fuses; conditionals it computes apart."""
    return jax.lax.cond(jnp.all(positions > -2), lambda x: x, lambda x: x * 2, x)


def along(places: jax.Array, x: jax.Array) -> jax.Array:
    """[B, T] -> [B, T, 1, ...], to stand beside `x`."""
    return places.reshape(*places.shape, *[1] * (x.ndim - places.ndim))


class Taps:
    """Edits and captures of one forward. Made while tracing: `captured` fills as the forward passes the sites.

    A forward with taps, whichever they are, rounds the value of every site to its dtype and computes it from those
    before as if alone. So any two such forwards agree bit for bit up to the first value that an edit changes. The
    plain forward does not promise this: XLA fuses across sites, contracts a product and a sum into one operation
    without a rounding between, and keeps bfloat16 values in float32 on the way; it differs in the last bits.
    """

    def __init__(self, config: DecoderConfig, edits: Sequence[Change] = (), sites: Iterable[str] = ()):
        self.names = shapes(config)
        self.edits, self.wanted = tuple(edits), frozenset(find(config, sites))
        self.captured: dict[str, jax.Array] = {}

    def at(self, where: Places, is_cached: bool = False) -> Tap:
        """The tap of a forward whose tokens stand at `where`."""
        if is_cached and any(name.endswith(MAPS) for name in self.wanted):
            raise ValueError(f"{MAPS} can be captured only in a forward without a cache")
        return _At(self, Fixed(where), "")


@dataclass(frozen=True)
class _At(Tap):
    taps: Taps
    fixed: Fixed
    prefix: str

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        name, x = self.prefix + name, self.fixed(name, x)
        for edit in self.taps.edits:
            if fnmatch.fnmatchcase(name, edit.site):
                x = self.fixed(name, edit(x, self.fixed.where))
        if name in self.taps.wanted:
            self.taps.captured[name] = x
        return x

    def watch(self, name: str, make: Callable[[], jax.Array]) -> None:
        if self.prefix + name in self.taps.wanted:
            self.taps.captured[self.prefix + name] = make()

    def within(self, prefix: str) -> Tap:
        """Only fixed for a part without any edit or capture: equal layers then still share one trace."""
        names = [name for name in self.taps.names if name.startswith(self.prefix + prefix)]
        is_used = not self.taps.wanted.isdisjoint(names) or any(
            fnmatch.filter(names, edit.site) for edit in self.taps.edits
        )
        return _At(self.taps, self.fixed, self.prefix + prefix) if is_used else self.fixed


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """All sites of a model and what of their shape follows [B, T]; of attention maps nothing does."""
    of_layers = {f"layers.{i}.{k}": s for i, spec in enumerate(config.layers) for k, s in _of_layer(config, spec)}
    return {"embed": (config.width,)} | of_layers | {"final": (config.width,), "logits": (config.vocab_size,)}


def _of_layer(config: DecoderConfig, spec: LayerSpec) -> list[tuple[str, tuple[int, ...]]]:
    attention, stream = config.attention, (config.width,)
    query, key = ((heads, attention.head_dim) for heads in (attention.num_heads, attention.num_kv_heads))
    keys = [("k", key), ("v", key)] if spec.kv_source is None else []
    laurel = [("laurel_out", stream)] if config.laurel_rank is not None else []
    piece = [("ple_out", stream)] if config.per_layer_embedding is not None else []
    return [
        ("resid_pre", stream), ("attn_in", stream), ("q", query), *keys, (MAPS, ()), ("heads", query),
        ("attn_out", stream), *laurel, ("resid_mid", stream), ("mlp_in", stream), ("mlp_hidden", (spec.ffw_width,)),
        ("mlp_out", stream), ("resid_post", stream), *piece,
    ]  # fmt: skip


def find(config: DecoderConfig, patterns: Iterable[str]) -> list[str]:
    """The sites that names or patterns mean, in the order of the forward.

    Raises ValueError for a pattern that means none, with what there is.
    """
    patterns, names = list(patterns), list(shapes(config))
    unknown = [repr(pattern) for pattern in patterns if not fnmatch.filter(names, pattern)]
    if unknown:
        of_layer = ", ".join(name for name, _ in _of_layer(config, config.layers[0]))
        raise ValueError(
            f"no site is called {', '.join(unknown)}; {config.name} has embed, final, logits, and layers.0 to "
            f"layers.{config.num_layers - 1} each with {of_layer} (as in 'layers.0.resid_post', 'layers.*.q')"
        )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
