"""The softmax over keys, in forms that never hold a large score matrix: pieces of the queries, blocks of a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.config import AttentionConfig, AttentionKind
from gemma_jax.nn import kernels
from gemma_jax.nn.cache import LayerCache, slot_places
from gemma_jax.nn.layers import softcap, wide
from gemma_jax.nn.masks import Places, visible
from gemma_kernels import Band

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Online:
    """A softmax over some of the keys, to which others can be added (online softmax, arXiv:1805.02867)."""

    peak: jax.Array  # [B, K, G, T], the largest score so far
    total: jax.Array  # [B, K, G, T], the sum of exp(score - peak)
    out: jax.Array  # [B, K, G, T, H], the values' sum with these weights

    @staticmethod
    def nothing(q: Float[Array, "B T N H"], num_kv_heads: int) -> "Online":
        """Over no key."""
        rows, dtype = grouped(q, num_kv_heads).shape, wide(q)
        return Online(jnp.full(rows[:-1], MASKED, dtype), jnp.zeros(rows[:-1], dtype), jnp.zeros(rows, dtype))

    def by_tokens(self) -> tuple[jax.Array, ...]:
        """The arrays as [B, T, ...]."""
        return tuple(jnp.moveaxis(one, 3, 1) for one in (self.peak, self.total, self.out))

    @staticmethod
    def of_tokens(arrays: tuple[jax.Array, ...]) -> "Online":
        """The inverse of `by_tokens`."""
        return Online(*(jnp.moveaxis(one, 1, 3) for one in arrays))

    def faded(self, peak: Float[Array, "B K G T"]) -> "Online":
        """The same, by a peak that is no smaller."""
        fade = jnp.exp(self.peak - peak)
        return Online(peak, self.total * fade, self.out * fade[..., None])

    def plus(self, other: "Online") -> "Online":
        """Over the keys of both."""
        peak = jnp.maximum(self.peak, other.peak)
        first, second = self.faded(peak), other.faded(peak)
        return Online(peak, first.total + second.total, first.out + second.out)

    def mean(self) -> Float[Array, "B T N H"]:
        """The values' mean, which is what attention gives; 0 where no key was seen."""
        return ungrouped(self.out / jnp.maximum(self.total, jnp.finfo(jnp.float32).tiny)[..., None])


class Look:
    """The softmax over keys that one layer takes: which keys (`kind`), and the form that fits the sizes at hand.

    By a kernel where one serves, and else by XLA; `max_span` is the length of an image's block, for kernels.
    """

    def __init__(self, kind: AttentionKind, config: AttentionConfig, max_span: int = 0):
        self.window, self.is_causal, self.cap = kind.window, config.is_causal, config.softcap
        self.max_span = max_span

    def at(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        query: Places,
        key: Places,
        start: int | jax.Array = 0,
    ) -> Float[Array, "B T N H"]:
        """Softmax over all S keys, for at most BLOCK queries at a time, so that no [T, S] is held for a long T.

        `start` is the keys' column at which the first query stands.
        """
        length = q.shape[1]
        # not of the last tokens of each row alone, whose columns are unknown
        if self.is_causal and (isinstance(start, jax.Array) or start + length == k.shape[2]):
            served = kernels.band_attention(q, k, v, (query, key), start, self._band(query))
            if served is not None:
                return served
        return _in_pieces(lambda q, query: self._direct(q, k, v, self._seen(query, key)), q, query)

    def reach(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        query: Places,
        key: Places,
    ) -> Online:
        """The same over some of the keys."""

        def some(q: jax.Array, query: Places) -> tuple[jax.Array, ...]:
            return self._over(grouped(q, k.shape[1]), k, v, self._seen(query, key)).by_tokens()

        return Online.of_tokens(_in_pieces(some, q, query))

    def _over(self, q: Float[Array, "B K G T H"], k: jax.Array, v: jax.Array, mask: Bool[Array, "B T S"]) -> Online:
        logits = self._logits(q, k, mask)
        peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        weights = jnp.where(mask[:, None, None], jnp.exp(logits - peak[..., None]), 0.0)
        out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=wide(q))
        return Online(peak, jnp.sum(weights, axis=-1), out)

    def _band(self, where: Places) -> Band:
        return Band(self.window, self.cap, 0 if where.blocks is None else self.max_span)

    def _seen(self, query: Places, key: Places) -> Bool[Array, "B T S"]:
        return visible(query, key, self.window, self.is_causal)

    def _direct(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Bool[Array, "B T S"]) -> jax.Array:
        weights = jax.nn.softmax(self._logits(grouped(q, k.shape[1]), k, mask), axis=-1).astype(v.dtype)
        return ungrouped(jnp.einsum("BKGTS,BKSH->BKGTH", weights, v))

    def weights(self, q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], where: Places) -> Float[Array, "B N T T"]:
        """Attention maps of a sequence, all T * T at once. At padding rows stand weights that mean nothing."""
        weights = jax.nn.softmax(self._logits(grouped(q, k.shape[1]), k, self._seen(where, where)), axis=-1)
        return weights.reshape(weights.shape[0], -1, *weights.shape[3:])

    def _logits(
        self, q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B K G T S"]:
        return jnp.where(mask[:, None, None], softcap(_scores(q, k), self.cap), MASKED)

    def back(
        self, q: Float[Array, "B T N H"], keys: Keys, where: Places, lengths: Int[Array, " B"]
    ) -> Float[Array, "B T N H"]:
        """Softmax over what a cache holds and over the new keys; `lengths` tokens were stored before them.

        The cache is read as it was before: in a ring they may overwrite slots that their own first queries still see.
        """
        assert keys.before is not None
        if self.is_causal and keys.after is not None and q.shape[1] == keys.k.shape[2]:
            caches = keys.before, keys.after
            served = kernels.chunk_attention(q, keys.k, keys.v, where, caches, lengths, self._band(where))
            if served is not None:
                return served
        cache, k, v = keys.before, keys.k, keys.v
        stored = slot_places(lengths, cache.keys.shape[2])
        k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
        if self._is_long(cache):
            new = self.reach(q, k, v, where, keys.where)
            return new.plus(self.along(q, cache, where, stored, jnp.max(lengths))).mean().astype(v.dtype)
        q, own, seen = grouped(q, k.shape[1]), self._seen(where, keys.where), self._seen(where, stored)
        logits = jnp.concatenate([self._logits(q, cache.keys, seen), self._logits(q, k, own)], axis=-1)
        before, now = jnp.split(jax.nn.softmax(logits, axis=-1).astype(v.dtype), [seen.shape[-1]], axis=-1)
        out = jnp.einsum("BKGTS,BKSH->BKGTH", before, cache.values) + jnp.einsum("BKGTS,BKSH->BKGTH", now, v)
        return ungrouped(out)

    def within(
        self, q: Float[Array, "B T N H"], cache: LayerCache, where: Places, lengths: Int[Array, " B"]
    ) -> Float[Array, "B T N H"]:
        """Softmax over what a cache holds, the new keys among it."""
        served = kernels.decode_attention(q, cache, where, lengths, self._band(where)) if self.is_causal else None
        if served is not None:
            return served
        stored = slot_places(lengths, cache.keys.shape[2])
        if self._is_long(cache):
            return self.along(q, cache, where, stored, jnp.max(lengths)).mean().astype(cache.values.dtype)
        return self._direct(q, cache.keys, cache.values, self._seen(where, stored))

    def _is_long(self, cache: LayerCache) -> bool:
        slots = cache.keys.shape[2]
        return self.window is None and slots > BLOCK and slots % BLOCK == 0

    def along(
        self,
        q: Float[Array, "B T N H"],
        cache: LayerCache,
        where: Places,
        stored: Places,
        filled: Int[Array, ""],
    ) -> Online:
        """Over the first `filled` slots of a cache, which hold `stored`.

        Of a long cache BLOCK slots at a time: work and memory follow the real length.
        """
        heads = cache.keys.shape[1]
        if not self._is_long(cache):
            return self.reach(q, cache.keys, cache.values, where, stored)

        def some(q: jax.Array, query: Places) -> tuple[jax.Array, ...]:
            def block(i: jax.Array, sofar: Online) -> Online:
                def part(x: jax.Array, axis: int) -> jax.Array:
                    return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis)

                k, v, key = part(cache.keys, 2), part(cache.values, 2), jax.tree.map(lambda x: part(x, 1), stored)
                return sofar.plus(self._over(grouped(q, heads), k, v, self._seen(query, key)))

            start = Online.nothing(q, heads)
            return jax.lax.fori_loop(0, (filled + BLOCK - 1) // BLOCK, block, start).by_tokens()

        return Online.of_tokens(_in_pieces(some, q, where))


def grouped(q: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K G T H"]:
    """Consecutive query heads share a key head."""
    return q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)


def ungrouped(out: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """The inverse of `grouped`."""
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _scores(q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"]) -> Float[Array, "B K G T S"]:
    """Products of queries and keys in float32 (float64 of float64)."""
    if q.shape[3] == 1:  # the keys first: XLA on CPU then transposes the few queries and not the many keys
        scores = jnp.einsum("BKSH,BKGTH->BKSGT", k, q, preferred_element_type=wide(q))
        return jnp.moveaxis(scores, 2, -1)
    return jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=wide(q))


def _in_pieces(some: Callable[[jax.Array, Places], Any], q: Float[Array, "B T N H"], query: Places) -> Any:
    """What `some` makes, [B, T, ...], of the queries, of BLOCK at a time if there are many."""
    length = q.shape[1]
    if length <= BLOCK * 2:
        return some(q, query)
    padding = -length % BLOCK
    pieces = jax.tree.map(lambda a: _pieces(a, padding), (q, query))
    out = jax.lax.map(jax.checkpoint(lambda inputs: some(*inputs)), pieces)  # [pieces, B, BLOCK, ...]
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(q.shape[0], -1, *a.shape[3:])[:, :length], out)


def _pieces(x: jax.Array, padding: int) -> jax.Array:
    """[B, T, ...] -> [pieces, B, BLOCK, ...]; what pads the last piece is cut off again by the caller."""
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    return jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)
