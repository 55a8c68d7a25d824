"""Grouped-query attention: its weights, and which keys its queries look at; `nn.look` has the softmax."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemma_jax.configs.config import DecoderConfig, LayerSpec, VisionConfig
from gemma_jax.nn import logical, mesh_attention
from gemma_jax.nn.cache import LayerCache, advance, store
from gemma_jax.nn.layers import (
    PLAIN_LAYOUT,
    Layout,
    RMSNorm,
    dimension_sizes,
    product,
    rms_scaled,
    weight,
)
from gemma_jax.nn.look import Keys, Look
from gemma_jax.nn.masks import Places
from gemma_jax.nn.rope import rope
from gemma_jax.nn.sites import MAPS, UNTAPPED, Tap


class Attention(nnx.Module):
    """Grouped-query attention with QK-norm and rope (Gemma 3 report, sec. 2; GQA: arXiv:2305.13245).

    A layer with a `kv_source` has queries only.
    """

    def __init__(
        self, config: DecoderConfig, spec: LayerSpec, *, rngs: nnx.Rngs, dtype: jnp.dtype, layout: Layout = PLAIN_LAYOUT
    ):
        self.config, self.kind = config.attention, config.kind(spec)
        self.has_keys, self.epsilon = spec.kv_source is None, config.norm.epsilon
        self.max_span = config.vision.num_soft_tokens if isinstance(config.vision, VisionConfig) else 0
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
        self.w_o = weight(rngs, "N H D", sizes, dtype, inputs=2)
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
        look = Look(self.kind, self.config, self.max_span)
        tap.watch(MAPS, lambda: look.weights(q, keys.k, where))
        out = tap("heads", self._look(look, q, where, keys, lengths))
        return product(out, self.w_o), keys

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
        if logical.current() is None:
            return Keys(k, v, where, cache, store(cache, k, v, where, stored))
        after = mesh_attention.store(cache, k, v, where, stored, is_global=self.kind.window is None)
        return Keys(k, v, where, cache, after)

    def _look(
        self, look: Look, q: Float[Array, "B T N H"], where: Places, keys: Keys, lengths: Int[Array, " B"] | None
    ) -> Float[Array, "B T N H"]:
        """The form of the softmax for the keys at hand."""
        if logical.current() is not None:
            return mesh_attention.attend(look, q, where, keys, lengths)
        if keys.before is None or keys.after is None:
            return look.at(q, keys.k, keys.v, where, keys.where)
        if q.shape[1] == 1:
            # What is stored already holds the last token, and all it sees: the slot that it takes in a ring is the one
            # that it no longer sees. Written before it is read, for XLA writes in place only what is not read before.
            stored = jnp.zeros((len(q),), jnp.int32) if lengths is None else lengths
            return look.within(q, keys.after, where, advance(stored, keys.where))
        if lengths is None:
            return look.at(q, keys.k, keys.v, where, keys.where)
        return look.back(q, keys, where, lengths)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], if they are its own."""
        if self.is_fused:
            ends = [self.config.num_heads, self.config.num_heads + self.config.num_kv_heads]
            q, k, v = jnp.split(product(x, self.w_qkv), ends, axis=2)
            return q, k, v
        q = logical.constrain(product(x, self.w_q), "batch", "act_seq", "q_heads", None)
        if not self.has_keys:
            return q, None, None
        k, v = (product(x, kernel) for kernel in (self.w_k, self.w_v))
        k, v = (logical.constrain(one, "batch", "act_seq", "kv_heads", None) for one in (k, v))
        return q, k, v
