"""The decoder with equal layers stacked and scanned: a small program for training and for compiling large models.

The layers are cut into turns of the local/global pattern; equal neighbouring turns become one `lax.scan`. On one
period of a stack the code is that of `Decoder`. For generation use `Decoder`: a scan would copy the caches.
"""

import itertools
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemma_jax.configs.config import ConfigError, DecoderConfig, LayerSpec
from gemma_jax.nn.decoder import Decoder, Layer, Stem
from gemma_jax.nn.layers import PLAIN_LAYOUT, Layout
from gemma_jax.nn.masks import Places
from gemma_jax.nn.shapes import shapes
from gemma_jax.nn.stored import refuse_stored

AnyStem = TypeVar("AnyStem", bound=Stem)


def segments(config: DecoderConfig) -> list[tuple[tuple[LayerSpec, ...], int]]:
    """Turns of the pattern and how often each repeats: 62 layers of 5:1 -> [(6 specs, 10), (2 specs, 1)]."""
    turns = [config.layers[i : i + config.period] for i in range(0, config.num_layers, config.period)]
    return [(turn, len(list(same))) for turn, same in itertools.groupby(turns)]


class Turn(nnx.Module):
    """One turn of the pattern, layer after layer."""

    def __init__(self, layers: list[Layer]):
        self.layers = nnx.List(layers)

    def __call__(
        self, x: Float[Array, "B T D"], where: Places, *, is_remat: bool = False
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P B T D"]]:
        def apply(layer: Layer, x: jax.Array) -> jax.Array:
            return layer(x, where)[0]

        apply, states = jax.checkpoint(apply) if is_remat else apply, []
        for layer in self.layers:
            x = apply(layer, x)
            states.append(x)
        return x, jnp.stack(states)


class ScannedDecoder(Stem):
    """`Decoder` with stacked layers; the same results, without cache and taps. `stack` makes one from a `Decoder`."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype | str = "float32",
        layout: Layout = PLAIN_LAYOUT,
    ):
        refuse_unstacked(config)
        super().__init__(config, rngs=rngs, dtype=dtype, layout=layout)
        kind = jnp.dtype(dtype)

        def turns(specs: tuple[LayerSpec, ...], count: int) -> Turn:
            def turn(rngs: nnx.Rngs) -> Turn:
                return Turn([Layer(config, spec, rngs=rngs, dtype=kind, layout=layout) for spec in specs])

            return nnx.vmap(turn)(rngs.split(count))

        self.turns = nnx.List([turns(specs, count) for specs, count in segments(config)])

    def __call__(self, tokens: Int[Array, "B T"], where: Places | None = None) -> Float[Array, "B T V"]:
        """Logits of every position, float32. `where` defaults to rows without padding."""
        return self.logits(self.hidden(tokens, where or Places.plain(*tokens.shape))[0])

    def hidden(
        self, tokens: Int[Array, "B T"], where: Places, *, is_remat: bool = False
    ) -> tuple[Float[Array, "B T D"], None]:
        """The last hidden vectors, after the final norm, and no cache; see `Decoder.hidden`."""
        x, _ = self._run(self.embed(tokens), where, keep=False, is_remat=is_remat)
        return self.final_norm(x), None

    def hidden_states(self, tokens: Int[Array, "B T"], where: Places) -> Float[Array, "L+1 B T D"]:
        """As `Decoder.hidden_states`."""
        x = self.embed(tokens)
        last, states = self._run(x, where, keep=True)
        return jnp.concatenate([x[None], *states[:-1], states[-1][:-1], self.final_norm(last)[None]])

    def _run(
        self, x: jax.Array, where: Places, *, keep: bool, is_remat: bool = False
    ) -> tuple[jax.Array, list[jax.Array]]:
        def turn(x: jax.Array, weights: Turn) -> tuple[jax.Array, jax.Array | None]:
            x, states = weights(x, where, is_remat=is_remat)
            return x, states if keep else None

        kept = []
        for weights in self.turns:
            x, states = jax.lax.scan(turn, x, weights)
            kept.append(states if states is None else states.reshape(-1, *x.shape))
        return x, kept


def refuse_unstacked(config: DecoderConfig) -> None:
    """Raises ConfigError for ingredients of Gemma 3n that pass from layer to layer beside the stream."""
    names = [name for name in ("altup", "per_layer_embedding") if getattr(config, name) is not None]
    names += ["layers.*.kv_source"] if any(spec.kv_source is not None for spec in config.layers) else []
    if names:
        raise ConfigError(
            f"config {config.name!r} sets {', '.join(names)}: ScannedDecoder has no place for these; use Decoder"
        )


def stack(decoder: Decoder) -> ScannedDecoder:
    """The same weights, stacked (copied: two sets of layers are alive while it runs)."""
    refuse_stored(decoder, "a stack of layers")
    layers = list(decoder.layers)
    scanned = nnx.eval_shape(lambda: ScannedDecoder(decoder.config, rngs=nnx.Rngs(0)))
    turns, start = [], 0
    for specs, count in segments(decoder.config):
        each = [Turn(layers[start + i * len(specs) : start + (i + 1) * len(specs)]) for i in range(count)]
        turns.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
        start += count * len(specs)
    scanned.turns = nnx.List(turns)
    return _with_stem(scanned, decoder)


def unstack(scanned: ScannedDecoder) -> Decoder:
    """One module per layer from stacked weights, for generation (copied, as `stack`)."""
    decoder = shapes(scanned.config)
    layers = []
    for (_, count), turns in zip(segments(scanned.config), scanned.turns, strict=True):
        for i in range(count):
            layers += list(jax.tree.map(lambda leaf, i=i: leaf[i], turns).layers)
    decoder.layers = nnx.List(layers)
    return _with_stem(decoder, scanned)


def _with_stem(to: AnyStem, source: Stem) -> AnyStem:
    to.embedder, to.final_norm = source.embedder, source.final_norm
    if source.config.vision is not None:
        to.vision, to.mm = source.vision, source.mm
    if not source.config.has_tied_head:
        to.head = source.head
    return to
