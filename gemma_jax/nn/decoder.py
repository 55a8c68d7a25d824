"""The decoder of Gemma 1, 2 and 3: one implementation, all sizes. Start reading at `Decoder.__call__`."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.config import ConfigError, DecoderConfig, LayerSpec, VisionConfig
from gemma_jax.nn.attention import Attention
from gemma_jax.nn.cache import Cache, LayerCache, advance
from gemma_jax.nn.layers import PLAIN_LAYOUT, GatedMLP, Layout, RMSNorm, Table, softcap
from gemma_jax.nn.masks import Places
from gemma_jax.nn.sites import UNTAPPED, Fixed, Tap, Taps
from gemma_jax.nn.vision.siglip import Projector, Siglip


class Layer(nnx.Module):
    """One block: attention, then the gated ffw, each normed before and (Gemma 2 on) after, each added to the stream."""

    def __init__(
        self, config: DecoderConfig, spec: LayerSpec, *, rngs: nnx.Rngs, dtype: jnp.dtype, layout: Layout = PLAIN_LAYOUT
    ):
        def norm() -> RMSNorm:
            return RMSNorm("D", config.width, config.norm, dtype)

        self.has_post_norms = config.norm.has_post_norms
        self.pre_attention_norm, self.pre_ffw_norm = norm(), norm()
        if self.has_post_norms:
            self.post_attention_norm, self.post_ffw_norm = norm(), norm()
        self.attn = Attention(config, spec, rngs=rngs, dtype=dtype, layout=layout)
        self.mlp = GatedMLP(config, spec.ffw_width, rngs=rngs, dtype=dtype, layout=layout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: Places,
        cache: LayerCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        tap: Tap = UNTAPPED,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        x = tap("resid_pre", x)
        attended, cache = self.attn(tap("attn_in", self.pre_attention_norm(x)), where, cache, lengths, tap)
        attended = self.post_attention_norm(attended) if self.has_post_norms else attended
        x = tap("resid_mid", x + tap("attn_out", attended))
        mixed = self.mlp(tap("mlp_in", self.pre_ffw_norm(x)), tap)
        mixed = self.post_ffw_norm(mixed) if self.has_post_norms else mixed
        return tap("resid_post", x + tap("mlp_out", mixed)), cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inserted:
    """Vectors that stand in the stream in place of tokens' own: what an encoder made of images."""

    vectors: jax.Array  # [S, D]
    index: jax.Array  # int32 [B, T]; which of the vectors, -1 for a token's own row

    def blocks(self, num_soft_tokens: int) -> Int[Array, "B T"]:
        """From 1 on the image that each place is a part of, 0 for text; see `Places.blocks`."""
        return jnp.where(self.index >= 0, self.index // num_soft_tokens + 1, 0)

    def into(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream with the vectors in their places; they are not scaled as rows are."""
        chosen = jnp.take(self.vectors, jnp.maximum(self.index, 0), axis=0)
        return jnp.where((self.index >= 0)[..., None], chosen.astype(x.dtype), x)


@jax.jit
def _apply(
    layer: Layer, x: jax.Array, where: Places, cache: LayerCache | None, lengths: jax.Array | None, tap: Tap
) -> tuple[jax.Array, LayerCache | None]:
    """Calls a layer. Of equal layers only the first is traced; XLA puts the calls in line again."""
    return layer(x, where, cache, lengths, tap)


class Dense(nnx.Module):
    """A linear layer without bias behind EmbeddingGemma's mean."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width, out), dtype) * width**-0.5, dims="I O")

    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        return x @ self.kernel[...].astype(x.dtype)


class Stem(nnx.Module):
    """What stands around the layers: token table, tower, final norm, head. `Decoder`, `ScannedDecoder` add layers."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype | str, layout: Layout):
        refuse_unbuilt(config)
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
            raise ValueError(
                f"dtype is {dtype.name}; wanted float32 or bfloat16: Gemma's residual stream passes 65504, "
                "the end of float16"
            )
        self.config = config
        self.embedder = Table(config, layout.table_dims, rngs=rngs, dtype=dtype)
        if not config.has_tied_head:
            self.head = Table(config, layout.table_dims, rngs=rngs, dtype=dtype)
        self.final_norm = RMSNorm("D", config.width, config.norm, dtype)
        if isinstance(config.vision, VisionConfig):
            self.vision = Siglip(config.vision, rngs=rngs, dtype=dtype)
            self.mm = Projector(config.vision, config.width, config.norm, rngs=rngs, dtype=dtype)
        widths = (config.width, *config.dense_widths)
        self.dense = nnx.List([Dense(*sizes, rngs=rngs, dtype=dtype) for sizes in itertools.pairwise(widths)])

    def see(self, pixels: Float[Array, "B height width 3"], *, is_tower_trained: bool = False) -> Float[Array, "B M D"]:
        """The soft tokens of images; pixels between -1 and 1, in the size that the config's tower wants.

        No gradient reaches the tower unless `is_tower_trained`: Gemma 3 was trained with a frozen one (report, sec. 2).
        """
        patches = self.vision(pixels)
        return self.mm(patches if is_tower_trained else jax.lax.stop_gradient(patches))

    def pool(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
        """EmbeddingGemma's vector of a text, not normalised: the mean over all real tokens, BOS, prompt and EOS among
        them, through the dense layers; in float32.
        """
        total = jnp.sum(jnp.where(mask[..., None], x.astype(jnp.float32), 0.0), axis=1)
        mean = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        for layer in self.dense:
            mean = layer(mean)
        return mean

    def embed(self, tokens: Int[Array, "B T"], inserted: Inserted | None = None) -> Float[Array, "B T D"]:
        """Rows of the table times sqrt(D), that factor rounded to the table's dtype first (1152: 34.0 in bfloat16)."""
        x = self.embedder.rows(tokens)
        x = x * jnp.asarray(self.config.width**0.5, x.dtype) if self.config.has_embedding_scale else x
        return x if inserted is None else inserted.into(x)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Unnormalised log-probabilities in float32 of hidden vectors that have passed the final norm."""
        table = self.embedder if self.config.has_tied_head else self.head
        return softcap(table.logits(x), self.config.final_softcap)


class Decoder(Stem):
    """A module per layer: the form for generation, each layer's cache is its own array and is updated in place.

    Weights are random until loaded. `dtype`: float32 or bfloat16. `layout`: how they stand in memory.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype | str = "float32",
        layout: Layout = PLAIN_LAYOUT,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, layout=layout)
        dtype = jnp.dtype(dtype)
        self.layers = nnx.List([Layer(config, spec, rngs=rngs, dtype=dtype, layout=layout) for spec in config.layers])

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        where: Places | None = None,
        inserted: Inserted | None = None,
        taps: Taps | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every position, float32. `where` defaults to rows without padding; `taps`: see `hidden`."""
        where = where or Places.plain(*tokens.shape)
        logits = self.logits(self.hidden(tokens, where, inserted=inserted, taps=taps)[0])
        return logits if taps is None else taps.at(where)("logits", logits)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        where: Places,
        cache: Cache | None = None,
        *,
        inserted: Inserted | None = None,
        is_cache_empty: bool = False,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The last hidden vectors, after the final norm, and the cache with the real tokens at hand added.

        With a cache, `where.positions` must go on from `cache.lengths`, real tokens first in each row.
        `inserted` takes the place of tokens; of an image all of it, and `where.blocks` says so.
        `is_cache_empty` promises that these are 0: the first chunk of a prompt then need not look at empty slots.
        `taps` look at the values of the pass, or change them; see `nn/sites.py`.
        """
        tap = UNTAPPED if taps is None else taps.at(where, is_cached=cache is not None)
        states, cache = self._run(tap("embed", self.embed(tokens, inserted)), where, cache, is_cache_empty, tap)
        return tap("final", self.final_norm(states[-1])), cache

    def hidden_states(
        self, tokens: Int[Array, "B T"], where: Places, inserted: Inserted | None = None, taps: Taps | None = None
    ) -> Float[Array, "L+1 B T D"]:
        """The stream before the first layer and after each, the last after the final norm (Hugging Face's order)."""
        tap = UNTAPPED if taps is None else taps.at(where)
        states, _ = self._run(tap("embed", self.embed(tokens, inserted)), where, None, False, tap)
        return jnp.stack([*states[:-1], tap("final", self.final_norm(states[-1]))])

    def _run(
        self, x: jax.Array, where: Places, cache: Cache | None, is_cache_empty: bool, tap: Tap
    ) -> tuple[list[jax.Array], Cache | None]:
        states, caches = [x], []
        lengths = None if cache is None or is_cache_empty else cache.lengths
        for i, layer in enumerate(self.layers):
            before, inner = None if cache is None else cache.layers[i], tap.within(f"layers.{i}.")
            with jax.named_scope(f"layer_{i}"):
                # with edits or captures in the open: what is captured in an inner jit cannot leave it
                apply = _apply if inner is UNTAPPED or isinstance(inner, Fixed) else Layer.__call__
                x, layer_cache = apply(layer, x, where, before, lengths, inner)
            states.append(x)
            caches.append(layer_cache)
        return states, None if cache is None else Cache(tuple(caches), advance(cache.lengths, where))


def refuse_unbuilt(config: DecoderConfig) -> None:
    """Raises ConfigError for ingredients that the config can say and this decoder cannot yet do: those of Gemma 3n."""
    unbuilt = {
        "altup": config.altup is not None,
        "laurel_rank": config.laurel_rank is not None,
        "per_layer_embedding": config.per_layer_embedding is not None,
        "attention.has_v_norm": config.attention.has_v_norm,
        "layers.*.kv_source": any(spec.kv_source is not None for spec in config.layers),
        "audio": config.audio is not None,
        "vision": config.vision is not None and not isinstance(config.vision, VisionConfig),
        "layers.*.activation_sparsity": any(spec.activation_sparsity for spec in config.layers),
    }
    found = [name for name, is_set in unbuilt.items() if is_set]
    if found:
        raise ConfigError(
            f"config {config.name!r} sets {', '.join(found)}: these belong to Gemma 3n, which the decoder does not "
            "build yet; unset them"
        )
