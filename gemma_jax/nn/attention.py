"""Grouped-query attention: the weights, and the three ways to take a softmax over keys without a large score matrix."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.config import AttentionKind, DecoderConfig, LayerSpec
from gemma_jax.nn.cache import LayerCache, advance, slot_places, store
from gemma_jax.nn.layers import PLAIN_LAYOUT, Layout, RMSNorm, dimension_sizes, rms_scaled, softcap, weight, wide
from gemma_jax.nn.masks import Places, visible
from gemma_jax.nn.rope import rope
from gemma_jax.nn.sites import MAPS, UNTAPPED, Tap

BLOCK = 512  # keys looked at together in a long cache, and queries at once in a long sequence
MASKED = -2.3819763e38  # finite, so that a row without any key gives numbers and not NaN; DeepMind's gemma uses it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keys:
    """What a layer's queries look at, and what layers without keys of their own read of it (KV sharing, 3n)."""

    k: jax.Array  # [B, K, T, H], of the tokens at hand, after norm and rope
    v: jax.Array  # [B, K, T, H]
    where: Places  # of these tokens
    before: LayerCache | None = None  # what came before them
    after: LayerCache | None = None  # ... and they


class Attention(nnx.Module):
    """Grouped-query attention with QK-norm and rope (Gemma 3 report, sec. 2; GQA: arXiv:2305.13245).

    A layer with a `kv_source` has queries only.
    """

    def __init__(
        self, config: DecoderConfig, spec: LayerSpec, *, rngs: nnx.Rngs, dtype: jnp.dtype, layout: Layout = PLAIN_LAYOUT
    ):
        self.config, self.kind = config.attention, config.kind(spec)
        self.has_keys, self.epsilon = spec.kv_source is None, config.norm.epsilon
        self.is_fused = layout.is_fused and self.has_keys
        sizes = dimension_sizes(config)
        if self.is_fused:
            q, k, v = sizes["N"], sizes["N"] + sizes["K"], sizes["M"]
            self.w_qkv = weight(rngs, "D M H", sizes, dtype, (("q", 0, q), ("k", q, k), ("v", k, v)))
        else:
            self.w_q = weight(rngs, "D N H", sizes, dtype)
        if self.has_keys and not self.is_fused:
            self.w_k = weight(rngs, "D K H", sizes, dtype)
            self.w_v = weight(rngs, "D K H", sizes, dtype)
        self.w_o = weight(rngs, "N H D", sizes, dtype)
        if self.config.has_qk_norm:
            self.q_norm = RMSNorm("H", self.config.head_dim, config.norm, dtype)
        if self.config.has_qk_norm and self.has_keys:
            self.k_norm = RMSNorm("H", self.config.head_dim, config.norm, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        where: Places,
        cache: LayerCache | None,
        lengths: Int[Array, " B"] | None,
        tap: Tap = UNTAPPED,
        shared: Keys | None = None,
    ) -> tuple[Float[Array, "B T D"], Keys]:
        """Attends to `x` itself, or with a cache to all that came before too; gives the keys, the new cache in them.

        `lengths` is the number of tokens in the cache; None promises that it is empty. With `shared` keys those are
        looked at, and `x` may be some of their tokens only: the last one of each row.
        """
        q, k, v = self._project(x)
        q = self.q_norm(q) if self.config.has_qk_norm else q
        q = tap("q", self._turn(q, where)) * self.config.query_scale
        if shared is None:
            assert k is not None
            assert v is not None
            keys = self._keys(k, v, where, cache, lengths, tap)
        else:
            keys = shared
        look = Look(self.kind, self.config.is_causal, self.config.softcap)
        tap.watch(MAPS, lambda: look.weights(q, keys.k, where))
        out = tap("heads", self._look(look, q, where, keys, lengths))
        # as one matrix: of a product over N and H XLA on CPU makes one over H and N, and copies the weight each time
        out = out.reshape(*out.shape[:2], -1)
        return out @ self.w_o[...].reshape(out.shape[-1], -1), keys

    def _turn(self, x: jax.Array, where: Places) -> jax.Array:
        return rope(x, where.positions, self.kind.rope_theta, self.kind.rope_scale)

    def _keys(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        where: Places,
        cache: LayerCache | None,
        lengths: Int[Array, " B"] | None,
        tap: Tap,
    ) -> Keys:
        k = self.k_norm(k) if self.config.has_qk_norm else k
        v = rms_scaled(v, self.epsilon).astype(v.dtype) if self.config.has_v_norm else v
        k, v = (one.swapaxes(1, 2) for one in (tap("k", self._turn(k, where)), tap("v", v)))
        if cache is None:
            return Keys(k, v, where)
        stored = jnp.zeros((len(k),), jnp.int32) if lengths is None else lengths
        return Keys(k, v, where, cache, store(cache, k, v, where, stored))

    def _look(
        self, look: "Look", q: Float[Array, "B T N H"], where: Places, keys: Keys, lengths: Int[Array, " B"] | None
    ) -> Float[Array, "B T N H"]:
        """The form of the softmax for the keys at hand."""
        if keys.before is None or keys.after is None:
            return look.at(q, keys.k, keys.v, where, keys.where)
        if q.shape[1] == 1:
            # What is stored already holds the last token, and all it sees: the slot that it takes in a ring is the one
            # that it no longer sees. Written before it is read, for XLA writes in place only what is not read before.
            stored = jnp.zeros((len(q),), jnp.int32) if lengths is None else lengths
            return look.within(q, keys.after, where, advance(stored, keys.where))
        if lengths is None:
            return look.at(q, keys.k, keys.v, where, keys.where)
        return look.back(q, keys.k, keys.v, where, keys.before, lengths)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], if they are its own."""
        if self.is_fused:
            ends = [self.config.num_heads, self.config.num_heads + self.config.num_kv_heads]
            q, k, v = jnp.split(jnp.einsum("BTD,DMH->BTMH", x, self.w_qkv[...]), ends, axis=2)
            return q, k, v
        q = jnp.einsum("BTD,DNH->BTNH", x, self.w_q[...])
        if not self.has_keys:
            return q, None, None
        return q, jnp.einsum("BTD,DKH->BTKH", x, self.w_k[...]), jnp.einsum("BTD,DKH->BTKH", x, self.w_v[...])


class Look:
    """The softmax over keys that one layer takes: which keys (`kind`), and the form that fits the sizes at hand."""

    def __init__(self, kind: AttentionKind, is_causal: bool, cap: float | None):
        self.window, self.is_causal, self.cap = kind.window, is_causal, cap

    def at(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        query: Places,
        key: Places,
    ) -> Float[Array, "B T N H"]:
        """Softmax over all S keys, for at most BLOCK queries at a time, so that no [T, S] is held for a long T."""
        length = q.shape[1]
        if length <= BLOCK * 2:
            return self._direct(q, k, v, visible(query, key, self.window, self.is_causal))
        padding = -length % BLOCK
        pieces = jax.tree.map(lambda a: _pieces(a, padding), (q, query))

        @jax.checkpoint
        def piece(inputs: tuple[jax.Array, Places]) -> jax.Array:
            return self._direct(inputs[0], k, v, visible(inputs[1], key, self.window, self.is_causal))

        out = jax.lax.map(piece, pieces)  # [pieces, B, BLOCK, N, H]
        return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]

    def _direct(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Bool[Array, "B T S"]) -> jax.Array:
        weights = jax.nn.softmax(self._logits(_grouped(q, k.shape[1]), k, mask), axis=-1).astype(v.dtype)
        return _ungrouped(jnp.einsum("BKGTS,BKSH->BKGTH", weights, v))

    def weights(self, q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], where: Places) -> Float[Array, "B N T T"]:
        """Attention maps of a sequence, all T * T at once. At padding rows stand weights that mean nothing."""
        mask = visible(where, where, self.window, self.is_causal)
        weights = jax.nn.softmax(self._logits(_grouped(q, k.shape[1]), k, mask), axis=-1)
        return weights.reshape(weights.shape[0], -1, *weights.shape[3:])

    def _logits(
        self, q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B K G T S"]:
        return jnp.where(mask[:, None, None], softcap(_scores(q, k), self.cap), MASKED)

    def back(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K T H"],
        v: Float[Array, "B K T H"],
        where: Places,
        cache: LayerCache,
        lengths: Int[Array, " B"],
    ) -> Float[Array, "B T N H"]:
        """Softmax over what a cache holds and over the new keys. The cache is read before they are stored in it: in a
        ring they may overwrite slots that their own first queries still see.
        """
        stored = slot_places(lengths, cache.keys.shape[2])
        k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
        q, own = _grouped(q, k.shape[1]), visible(where, where, self.window, self.is_causal)
        if self._is_long(cache):
            return _ungrouped(self._along(q, cache, where, stored, lengths, (k, v, own))).astype(v.dtype)
        seen = visible(where, stored, self.window, self.is_causal)
        logits = jnp.concatenate([self._logits(q, cache.keys, seen), self._logits(q, k, own)], axis=-1)
        before, now = jnp.split(jax.nn.softmax(logits, axis=-1).astype(v.dtype), [seen.shape[-1]], axis=-1)
        out = jnp.einsum("BKGTS,BKSH->BKGTH", before, cache.values) + jnp.einsum("BKGTS,BKSH->BKGTH", now, v)
        return _ungrouped(out)

    def within(
        self, q: Float[Array, "B T N H"], cache: LayerCache, where: Places, lengths: Int[Array, " B"]
    ) -> Float[Array, "B T N H"]:
        """Softmax over what a cache holds, the new keys among it."""
        stored = slot_places(lengths, cache.keys.shape[2])
        if self._is_long(cache):
            out = self._along(_grouped(q, cache.keys.shape[1]), cache, where, stored, lengths)
            return _ungrouped(out).astype(cache.values.dtype)
        return self._direct(q, cache.keys, cache.values, visible(where, stored, self.window, self.is_causal))

    def _is_long(self, cache: LayerCache) -> bool:
        slots = cache.keys.shape[2]
        return self.window is None and slots > BLOCK and slots % BLOCK == 0

    def _along(
        self,
        q: Float[Array, "B K G T H"],
        cache: LayerCache,
        where: Places,
        stored: Places,
        lengths: Int[Array, " B"],
        new: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    ) -> Float[Array, "B K G T H"]:
        """The same for a long cache, BLOCK of its keys at a time: work and memory follow the real length.

        `new` are keys and values that are not in the cache, and their mask. The running maximum and sum are those of
        online softmax (arXiv:1805.02867).
        """

        def add(state: tuple[jax.Array, jax.Array, jax.Array], keys: jax.Array, values: jax.Array, mask: jax.Array):
            peak, total, out = state
            logits = self._logits(q, keys, mask)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
            weights = jnp.where(mask[:, None, None], jnp.exp(logits - new_peak[..., None]), 0.0)
            fade = jnp.exp(peak - new_peak)
            values = jnp.einsum(
                "BKGTS,BKSH->BKGTH", weights.astype(values.dtype), values, preferred_element_type=wide(q)
            )
            return new_peak, total * fade + jnp.sum(weights, axis=-1), out * fade[..., None] + values

        def block(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            keys, values = (
                jax.lax.dynamic_slice_in_dim(a, i * BLOCK, BLOCK, axis=2) for a in (cache.keys, cache.values)
            )
            key = Places(jax.lax.dynamic_slice_in_dim(stored.positions, i * BLOCK, BLOCK, axis=1))
            return add(state, keys, values, visible(where, key, self.window, self.is_causal))

        rows = q.shape[:-1]
        start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q.shape))
        num_blocks = (jnp.max(lengths) + BLOCK - 1) // BLOCK
        start = start if new is None else add(start, *new)
        _, total, out = jax.lax.fori_loop(0, num_blocks, block, start)
        return out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def _grouped(q: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K G T H"]:
    """Consecutive query heads share a key head."""
    return q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)


def _ungrouped(out: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _scores(q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"]) -> Float[Array, "B K G T S"]:
    """Products of queries and keys in float32 (float64 of float64)."""
    if q.shape[3] == 1:  # the keys first: XLA on CPU then transposes the few queries and not the many keys
        scores = jnp.einsum("BKSH,BKGTH->BKSGT", k, q, preferred_element_type=wide(q))
        return jnp.moveaxis(scores, 2, -1)
    return jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=wide(q))


def _pieces(x: jax.Array, padding: int) -> jax.Array:
    """[B, T, ...] -> [pieces, B, BLOCK, ...]; what pads the last piece is cut off again by the caller."""
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    return jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)
