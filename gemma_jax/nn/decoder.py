"""The decoder of Gemma 1, 2, 3 and 3n: one implementation, all sizes. Start reading at `Decoder.__call__`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.config import DecoderConfig, LayerSpec
from gemma_jax.nn import kernels, logical, mesh_losses
from gemma_jax.nn.attention import Attention
from gemma_jax.nn.cache import Cache, LayerCache, advance
from gemma_jax.nn.gemma3n import AltUp, Laurel, PerLayerInput, as_large
from gemma_jax.nn.layers import (
    PLAIN_LAYOUT,
    GatedMLP,
    Layout,
    RMSNorm,
    Table,
    dimension_sizes,
    product,
    softcap,
    weight,
)
from gemma_jax.nn.look import Keys
from gemma_jax.nn.masks import Places
from gemma_jax.nn.senses import Senses
from gemma_jax.nn.sites import UNTAPPED, Fixed, Tap, Taps


class Layer(nnx.Module):
    """One block: attention, then the gated ffw, each normed before and (Gemma 2 on) after, each added to the stream.

    With AltUp there are A streams, [A, B, T, D], of which the block makes one anew (gemma3n.md, 2.3).
    """

    def __init__(
        self, config: DecoderConfig, spec: LayerSpec, *, rngs: nnx.Rngs, dtype: jnp.dtype, layout: Layout = PLAIN_LAYOUT
    ):
        def norm() -> RMSNorm:
            return RMSNorm("D", config.width, config.norm, dtype)

        self.has_post_norms, self.has_altup = config.norm.has_post_norms, config.altup is not None
        self.has_laurel, self.has_piece = config.laurel_rank is not None, config.per_layer_embedding is not None
        self.pre_attention_norm, self.pre_ffw_norm = norm(), norm()
        if self.has_post_norms:
            self.post_attention_norm, self.post_ffw_norm = norm(), norm()
        self.attn = Attention(config, spec, rngs=rngs, dtype=dtype, layout=layout)
        self.mlp = GatedMLP(config, spec, rngs=rngs, dtype=dtype, layout=layout)
        if self.has_altup:
            self.altup = AltUp(config, rngs=rngs, dtype=dtype)
        if self.has_laurel:
            self.laurel = Laurel(config, rngs=rngs, dtype=dtype)
        if self.has_piece:
            self.ple = PerLayerInput(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "*A B T D"],
        where: Places,
        cache: LayerCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        tap: Tap = UNTAPPED,
        *,
        shared: Keys | None = None,
        piece: Float[Array, "B T P"] | None = None,
    ) -> tuple[Float[Array, "*A B T D"], Keys]:
        """The streams, and the keys that were looked at, the new cache among them.

        `shared` are those of another layer, for a layer without its own; `piece` is this layer's own embedding.
        """
        if not self.has_altup:
            y, keys = self._block(x, where, cache, lengths, tap, shared)
            return y if piece is None else y + tap("ple_out", self.ple(y, piece)), keys
        mixture = self.altup.mixture(x)
        predicted = self.altup.predicted(x, mixture)
        y, keys = self._block(predicted, where, cache, lengths, tap, shared)
        shares, added = self.altup.shares(y), None
        if piece is not None:
            added = tap("ple_out", self.ple(self.altup.gated(predicted, y, shares), piece))
        return self.altup.corrected(x, mixture, y, shares, added), keys

    def _block(
        self,
        x: Float[Array, "B T D"],
        where: Places,
        cache: LayerCache | None,
        lengths: Int[Array, " B"] | None,
        tap: Tap,
        shared: Keys | None,
    ) -> tuple[Float[Array, "B T D"], Keys]:
        x = tap("resid_pre", x)
        normed = tap("attn_in", self.pre_attention_norm(x))
        attended, keys = self.attn(normed, where, cache, lengths, tap, shared)
        attended = tap("attn_out", self.post_attention_norm(attended) if self.has_post_norms else attended)
        if self.has_laurel:
            x = (x + attended + tap("laurel_out", self.laurel(normed))) * jnp.asarray(2**-0.5, x.dtype)
        else:
            x = x + attended
        x = tap("resid_mid", _between(x))
        mixed = self.mlp(tap("mlp_in", self.pre_ffw_norm(x)), tap)
        mixed = self.post_ffw_norm(mixed) if self.has_post_norms else mixed
        return tap("resid_post", _between(x + tap("mlp_out", mixed))), keys


def _between(x: Float[Array, "*A B T D"]) -> Float[Array, "*A B T D"]:
    """The stream as it lies on a mesh between the parts of a block."""
    return logical.constrain(x, "batch", "act_seq", "act_embed")


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
    layer: Layer,
    x: jax.Array,
    where: Places,
    cache: LayerCache | None,
    lengths: jax.Array | None,
    tap: Tap,
    *,
    shared: Keys | None,
    piece: jax.Array | None,
) -> tuple[jax.Array, Keys]:
    """Calls a layer. Of equal layers only the first is traced; XLA puts the calls in line again."""
    return layer(x, where, cache, lengths, tap, shared=shared, piece=piece)


class Linear(nnx.Module):
    """A linear layer without bias."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, dims: str = "I O"):
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (width, out), dtype) * width**-0.5, dims=dims, inputs=1
        )

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        return product(x, self.kernel)


class Stem(Senses):
    """What stands around the layers: token table, towers, final norm, head. `Decoder`, `ScannedDecoder` add layers."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype | str, layout: Layout):
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
            raise ValueError(
                f"dtype is {dtype.name}; wanted float32 or bfloat16: Gemma's residual stream passes 65504, "
                "the end of float16"
            )
        self.config, self.layout = config, layout
        self.kept: tuple[int, ...] | None = None  # which layers' pieces to take from a table that has more
        has_pieces = config.per_layer_embedding is not None
        self.embedder = Table(config, layout.table_dims, rngs=rngs, dtype=dtype, has_pieces=has_pieces)
        if not config.has_tied_head:
            self.head = Table(config, layout.table_dims, rngs=rngs, dtype=dtype)
        self.final_norm = RMSNorm("D", config.width, config.norm, dtype)
        self._build_senses(config, rngs, dtype)
        widths = (config.width, *config.dense_widths)
        self.dense = nnx.List([Linear(*sizes, rngs=rngs, dtype=dtype) for sizes in itertools.pairwise(widths)])
        if config.altup is not None:

            def squares(count: int) -> nnx.List:
                sizes = config.width, config.width
                return nnx.List([Linear(*sizes, rngs=rngs, dtype=dtype, dims="D D") for _ in range(count)])

            self.altup_proj, self.altup_unembed = (squares(config.altup.num_streams - 1) for _ in range(2))
        if config.per_layer_embedding is not None:
            self.w_ple_proj = weight(rngs, "D L P", dimension_sizes(config), dtype)
            self.ple_proj_norm = RMSNorm("P", config.per_layer_embedding.width, config.norm, dtype)

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
        x = self.with_hard_tokens(tokens, x)
        return _between(x if inserted is None else inserted.into(x))

    def pieces(self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Sequence[Float[Array, "B T P"] | None]:
        """Each layer's own embedding of the tokens, from its table and from the stream `x` at the entry (3n, 2.1)."""
        if self.config.per_layer_embedding is None:
            return [None] * self.config.num_layers
        rows = self.embedder.pieces(tokens).astype(x.dtype)
        rows = rows if self.kept is None else rows[:, :, np.asarray(self.kept)]
        context = product(x, self.w_ple_proj) * jnp.asarray(self.config.width**-0.5, x.dtype)
        made = (self.ple_proj_norm(context) + rows) * jnp.asarray(2**-0.5, x.dtype)
        return [made[:, :, i] for i in range(self.config.num_layers)]

    def spread(self, x: Float[Array, "B T D"]) -> Float[Array, "*A B T D"]:
        """The streams that the first layer gets: with AltUp `x` and products of it with its magnitude (3n, 2.2)."""
        if self.config.altup is None:
            return x
        return jnp.stack([x, *(as_large(project(x), x) for project in self.altup_proj)])

    def gathered(self, x: Float[Array, "*A B T D"]) -> Float[Array, "B T D"]:
        """One stream of what the last layer left: the mean of the first and of products of the others (3n, 2.5)."""
        if self.config.altup is None:
            return x
        others = zip(self.altup_unembed, x[1:], strict=True)
        return jnp.mean(jnp.stack([x[0], *(as_large(project(one), x[0]) for project, one in others)]), axis=0)

    def active(self, x: Float[Array, "*A B T D"]) -> Float[Array, "B T D"]:
        """The stream that blocks work on."""
        return x if self.config.altup is None else x[self.config.altup.active_stream]

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Unnormalised log-probabilities in float32 of hidden vectors that have passed the final norm."""
        table = self.embedder if self.config.has_tied_head else self.head
        names = ("batch", "act_seq")[: x.ndim - 1]
        return softcap(logical.constrain(table.logits(x), *names, "act_vocab"), self.config.final_softcap)

    def losses(self, x: Float[Array, "*batch D"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """-log probability of each target, in nats, float32, of hidden vectors that have passed the final norm.

        Never are all logits held, nor are they kept for gradients.
        """
        table = self.embedder if self.config.has_tied_head else self.head
        if logical.current() is not None:
            return mesh_losses.losses(x, targets, table.dims, table.embedding, self.config.final_softcap)
        flat, wanted = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        losses = kernels.table_losses(table.dims, table.embedding[...], flat, wanted, self.config.final_softcap)
        if losses is None:
            total, chosen = mesh_losses.sums(self.logits, flat, wanted, self.config.vocab_size)
            losses = total - chosen
        return losses.reshape(targets.shape)


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
        last: Int[Array, " B"] | None = None,
        taps: Taps | None = None,
        is_remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The last hidden vectors, after the final norm, and the cache with the real tokens at hand added.

        With a cache, `where.positions` must go on from `cache.lengths`, real tokens first in each row.
        `inserted` takes the place of tokens; of an image all of it, and `where.blocks` says so.
        `is_cache_empty` promises that these are 0: the first chunk of a prompt then need not look at empty slots.
        `last` asks for one column of each row alone, [B, 1, D], and with a cache: layers at the end that read others'
        keys then compute nothing else (3n, 2.6); with taps all is computed.
        `taps` look at the values of the pass, or change them; see `nn/sites.py`.
        `is_remat` keeps for gradients what goes into layers alone; they are computed again. Not with taps in the open.
        """
        tap = UNTAPPED if taps is None else taps.at(where, is_cached=cache is not None)
        x = tap("embed", self.embed(tokens, inserted))
        states, cache = self._run(tokens, x, where, cache, is_cache_empty, tap, last, is_remat)
        return tap("final", self.final_norm(self.gathered(states[-1]))), cache

    def hidden_states(
        self, tokens: Int[Array, "B T"], where: Places, inserted: Inserted | None = None, taps: Taps | None = None
    ) -> Float[Array, "L+1 B T D"]:
        """The stream before the first layer and after each, the last after the final norm (Hugging Face's order).

        Of AltUp's streams the active one.
        """
        tap = UNTAPPED if taps is None else taps.at(where)
        x = tap("embed", self.embed(tokens, inserted))
        states, _ = self._run(tokens, x, where, None, False, tap, None)
        final = tap("final", self.final_norm(self.gathered(states[-1])))
        return jnp.stack([*map(self.active, states[:-1]), final])

    def _run(
        self,
        tokens: jax.Array,
        x: jax.Array,
        where: Places,
        cache: Cache | None,
        is_cache_empty: bool,
        tap: Tap,
        last: jax.Array | None,
        is_remat: bool = False,
    ) -> tuple[list[jax.Array], Cache | None]:
        pieces, x = self.pieces(tokens, x), self.spread(x)
        states, keys, begin = [x], [], where
        lengths = None if cache is None or is_cache_empty else cache.lengths
        narrow_at = self._first_reader() if last is not None and tap is UNTAPPED else len(self.layers)
        for i, (layer, spec) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            if i == narrow_at:
                assert last is not None
                x, where = column(x, last), where.column(last)
                pieces = [None if piece is None else column(piece, last) for piece in pieces]
            before, inner = None if cache is None else cache.layers[i], tap.within(f"layers.{i}.")
            shared = None if spec.kv_source is None else keys[spec.kv_source]
            with jax.named_scope(f"layer_{i}"):
                # with edits or captures in the open: what is captured in an inner jit cannot leave it
                apply = _apply if inner is UNTAPPED or isinstance(inner, Fixed) else Layer.__call__
                apply = jax.checkpoint(_apply) if is_remat and apply is _apply else apply
                x, found = apply(layer, x, where, before, lengths, inner, shared=shared, piece=pieces[i])
            states.append(x)
            keys.append(found)
        if last is not None and where is begin:
            states[-1] = column(states[-1], last)
        if cache is None:
            return states, None
        caches = [
            old if spec.kv_source is not None else found.after
            for old, found, spec in zip(cache.layers, keys, self.config.layers, strict=True)
        ]
        return states, Cache(tuple(caches), advance(cache.lengths, begin))

    def _first_reader(self) -> int:
        """The first of the layers at the end that all read keys of others."""
        own = [i for i, spec in enumerate(self.config.layers) if spec.kv_source is None]
        return own[-1] + 1


def column(x: Float[Array, "*A B T C"], index: Int[Array, " B"]) -> Float[Array, "*A B 1 C"]:
    """One column of each row."""
    return jnp.take_along_axis(x, jnp.expand_dims(index[:, None, None], range(x.ndim - 3)), axis=-2)
