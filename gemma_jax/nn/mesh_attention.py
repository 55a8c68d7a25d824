"""Attention on a mesh: which keys travel between devices, and how. Each function here is one `jax.shard_map`.

Tokens lie along the axes of "act_seq" in equal consecutive pieces, heads along those of "q_heads" and "kv_heads", the
slots of a global cache along those of "kv_seq". The forms:

* tokens and themselves: a local layer takes the W keys before its first token from the devices before it (a halo, by
  `ppermute`); a global one gathers all keys, or passes them round in a ring (arXiv:2310.01889).
* tokens and a global cache: every device has looked at its own slots, and the softmaxes are put together (as
  flash-decoding does): the queries travel, which are few, and the cache never does.
* tokens and a ring: it lies whole on every device, and goes in front of the first device's tokens as its halo.

Fewer key heads than devices along the heads: the keys lie whole there, and each device takes the head of its queries.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gemma_jax.nn import cache as caching
from gemma_jax.nn import kernels, logical
from gemma_jax.nn.cache import LayerCache, advance, slot_names, slot_places
from gemma_jax.nn.logical import Axes, LogicalAxisError
from gemma_jax.nn.look import Keys, Look, Online
from gemma_jax.nn.masks import Places

Tree = Any


def attend(
    look: Look, q: Float[Array, "B T N H"], where: Places, keys: Keys, lengths: Int[Array, " B"] | None
) -> Float[Array, "B T N H"]:
    """As `Attention._look` on one device; `lengths` is None for an empty cache."""
    if keys.before is None or keys.after is None:
        return _among_themselves(look, q, where, keys)
    if q.shape[1] == 1:
        stored = jnp.zeros((len(q),), jnp.int32) if lengths is None else lengths
        return _to_cache(look, q, where, keys.after, advance(stored, keys.where))
    if lengths is None:
        return _among_themselves(look, q, where, keys)
    if look.window is None:
        return _to_cache(look, q, where, keys.after, advance(lengths, where), lengths)
    return _to_ring(look, q, where, keys, lengths)


def _among_themselves(look: Look, q: jax.Array, where: Places, keys: Keys) -> jax.Array:
    lies, rules = _Lies(q, keys.k, None), logical.current()
    assert rules is not None
    passes_round = rules.is_ring and look.window is None and look.is_causal and where.blocks is None

    def body(q: jax.Array, k: jax.Array, v: jax.Array, where: Places) -> jax.Array:
        k, v = lies.own_heads(k), lies.own_heads(v)
        if not lies.tokens:
            return look.at(q, k, v, where, where)
        if passes_round:
            return _round(look, q, k, v, where, lies.tokens)
        if _has_halo(look, where, q.shape[1], lies.tokens):
            assert look.window is not None
            (before_k, before_v), before = _halo((k, v), where, look.window, lies.tokens)
            return look.at(q, _behind(before_k, k), _behind(before_v, v), where, _behind(before, where, 1),
                           look.window)  # fmt: skip
        start = jax.lax.axis_index(lies.tokens) * q.shape[1]
        k, v, key = _gathered(k, 2, lies.tokens), _gathered(v, 2, lies.tokens), _gathered(where, 1, lies.tokens)
        return look.at(q, k, v, where, key, start)

    run = _mapped(body, (lies.q, lies.k, lies.k, lies.rows), lies.q)
    return run(q, keys.k, keys.v, where)


def _to_ring(look: Look, q: jax.Array, where: Places, keys: Keys, lengths: jax.Array) -> jax.Array:
    """A prompt's next tokens in a local layer: they see the ring as it was before them, and each other."""
    assert keys.before is not None
    lies = _Lies(q, keys.k, keys.before)

    def body(q: jax.Array, k: jax.Array, v: jax.Array, where: Places, ring: LayerCache, lengths: jax.Array):
        k, v, ring = lies.own_heads(k), lies.own_heads(v), jax.tree.map(lies.own_heads, ring)
        if not lies.tokens:
            return look.back(q, Keys(k, v, where, ring), where, lengths)
        if _has_halo(look, where, q.shape[1], lies.tokens):
            assert look.window is not None
            before, there = _halo((k, v), where, look.window, lies.tokens)
            before, there = _filled(before, there, ring, lengths, q.shape[1], lies.tokens)
            k, v = (_behind(old, new) for old, new in zip(before, (k, v), strict=True))
            return look.at(q, k, v, where, _behind(there, where, 1), look.window)
        k, v, key = _gathered(k, 2, lies.tokens), _gathered(v, 2, lies.tokens), _gathered(where, 1, lies.tokens)
        return look.back(q, Keys(k, v, key, ring), where, lengths)

    specs = (lies.q, lies.k, lies.k, lies.rows, lies.cache, lies.batch)
    return _mapped(body, specs, lies.q)(q, keys.k, keys.v, where, keys.before, lengths)


def _to_cache(
    look: Look,
    q: jax.Array,
    where: Places,
    cache: LayerCache,
    lengths: jax.Array,
    before: jax.Array | None = None,
) -> jax.Array:
    """Tokens that a cache holds already, among `lengths` in all; `before` them were so many."""
    lies = _Lies(q, None, cache, is_global=look.window is None)
    if look.window is None and where.blocks is not None and before is not None:
        blocks = kernels.placed(where.blocks, before, cache.keys.shape[2])
    else:
        blocks = None
    slots, axes = cache.keys.shape[2], lies.slots

    def body(q: jax.Array, cache: LayerCache, where: Places, lengths: jax.Array, blocks: jax.Array | None):
        if not axes:
            own = jax.tree.map(lies.own_heads, cache)
            if q.shape[1] == 1:
                return look.within(q, own, where, lengths)
            stored = Places(slot_places(lengths, slots).positions, blocks=blocks)
            return look.along(q, own, where, stored, jnp.max(lengths)).mean().astype(q.dtype)
        wide_q, wide_where = lies.with_all_queries(q, where)
        cache = cache if lies.sees_all_heads else jax.tree.map(lies.own_heads, cache)
        here = cache.keys.shape[2]
        first = jax.lax.axis_index(axes) * here
        stored = Places(slot_places(lengths, slots).positions, blocks=blocks)
        stored = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, here, 1), stored)
        filled = jnp.clip(jnp.max(lengths) - first, 0, here)
        found = _together(look.along(wide_q, cache, wide_where, stored, filled), axes).mean()
        return lies.own_queries(found, q.shape).astype(q.dtype)

    specs = (lies.q, lies.cache, lies.rows, lies.batch, lies.whole_rows)
    return _mapped(body, specs, lies.q)(q, cache, where, lengths, blocks)


class _Lies:
    """Where the arrays of one layer's attention lie, by the rules in scope; and what follows from it."""

    def __init__(self, q: jax.Array, k: jax.Array | None, cache: LayerCache | None, is_global: bool = False):
        self.q = logical.spec(("batch", "act_seq", "q_heads", None), q.shape)
        self.rows = PartitionSpec(*self.q[:2])
        self.batch, self.whole_rows = PartitionSpec(self.q[0]), PartitionSpec(self.q[0], None)
        self.tokens, self.heads = logical.axes_at(self.q, 1), logical.axes_at(self.q, 2)
        self.slots: Axes = ()
        held = q
        if k is not None:
            self.k, held = logical.spec(("batch", "kv_heads", "act_seq", None), k.shape), k
            self._key_heads = logical.axes_at(self.k, 1)
        if cache is not None:
            held = cache.keys
            self.cache = logical.spec(slot_names(is_global=is_global), cache.keys.shape)
            self._key_heads, self.slots = logical.axes_at(self.cache, 1), logical.axes_at(self.cache, 2)
        self._num_key_heads = held.shape[1]
        self.sees_all_heads = bool(self.slots) and not self._key_heads and set(self.heads) <= set(self.slots)
        self._check_heads(q.shape[2])

    def _check_heads(self, num_heads: int) -> None:
        count, keys = logical.count(self.heads), self._num_key_heads
        if self._key_heads != self.heads and (self._key_heads or count % keys):
            raise LogicalAxisError(
                f"{num_heads} query heads are on {count} devices, and {keys} key heads are not divided so: then a "
                "device's queries have to look at one key head; choose another size of the axes of 'q_heads', or give "
                "'kv_heads' the same axes"
            )

    def own_heads(self, x: Float[Array, "B K S H"]) -> Float[Array, "B k S H"]:
        """Of keys whole on every device the head that this device's queries look at."""
        if self._key_heads == self.heads:
            return x
        each = jax.lax.axis_size(self.heads) // x.shape[1]  # devices that share a key head
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.div(jax.lax.axis_index(self.heads), each), 1, axis=1)

    def with_all_queries(self, q: jax.Array, where: Places) -> tuple[jax.Array, Places]:
        """The queries of all devices that hold other slots than this one."""
        q, where = _gathered(q, 1, self.tokens), _gathered(where, 1, self.tokens)
        return _gathered(q, 2, self.heads) if self.sees_all_heads else q, where

    def own_queries(self, out: Float[Array, "B T N H"], shape: tuple[int, ...]) -> jax.Array:
        """The inverse: of what all queries found, this device's."""
        for axis, axes in ((1, self.tokens), (2, self.heads if self.sees_all_heads else ())):
            if axes:
                out = jax.lax.dynamic_slice_in_dim(out, jax.lax.axis_index(axes) * shape[axis], shape[axis], axis)
        return out


def _mapped(body: Callable[..., Any], specs: tuple[Any, ...], out: Any) -> Callable[..., Any]:
    return jax.shard_map(body, in_specs=specs, out_specs=out, check_vma=False)


def _gathered(x: Tree, axis: int, axes: Axes) -> Tree:
    if not axes:
        return x
    return jax.tree.map(lambda a: jax.lax.all_gather(a, axes, axis=axis, tiled=True), x)


def _behind(first: Tree, second: Tree, axis: int = 2) -> Tree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=axis), first, second)


def _has_halo(look: Look, where: Places, length: int, axes: Axes) -> bool:
    """Whether a layer sees only some columns back, and fewer than there are."""
    is_local = look.window is not None and look.is_causal and where.is_dense and where.blocks is None
    return is_local and (look.window or 0) <= length * (jax.lax.axis_size(axes) - 1)


def _halo(keys: tuple[jax.Array, ...], where: Places, window: int, axes: Axes) -> tuple[tuple[jax.Array, ...], Places]:
    """The `window` columns before this device's: keys [B, K, W, H] and their places, -1 where there are none.

    They come from the device before, and if that has too few from those before it.
    """
    length, devices = where.positions.shape[1], jax.lax.axis_size(axes)
    sent = (*keys, jax.tree.map(lambda a: a + 1, where))  # devices without a sender get zeros
    parts = []
    for hop in range(-(-window // length), 0, -1):
        columns = min(length, window - (hop - 1) * length)
        pairs = [(i, i + hop) for i in range(devices - hop)]

        def last(x: jax.Array, columns: int = columns, pairs: list[tuple[int, int]] = pairs) -> jax.Array:
            x = jax.lax.slice_in_dim(x, length - columns, length, axis=2 if x.ndim == 4 else 1)
            return jax.lax.ppermute(x, axes, pairs)

        parts.append(jax.tree.map(last, sent))
    *found, there = jax.tree.map(lambda *a: jnp.concatenate(a, axis=2 if a[0].ndim == 4 else 1), *parts)
    return tuple(found), jax.tree.map(lambda a: a - 1, there)


def _filled(
    before: tuple[jax.Array, ...], there: Places, ring: LayerCache, lengths: jax.Array, length: int, axes: Axes
) -> tuple[tuple[jax.Array, ...], Places]:
    """A halo whose columns before the first device's tokens are those that the ring holds."""
    slots, window = ring.keys.shape[2], there.positions.shape[1]
    column = jax.lax.axis_index(axes) * length - window + jnp.arange(window)  # from the first device's first token
    place = jnp.clip(slots + column, 0, slots - 1)  # in the ring in the order of its positions
    held = lengths[:, None] + column[None, :]
    positions = jnp.where((held >= 0) & (column >= -slots)[None, :], held, -1)

    def filled(old: jax.Array, halo: jax.Array) -> jax.Array:
        old = jnp.take(kernels.unrolled(old, lengths), place, axis=2)
        return jnp.where((column < 0)[None, None, :, None], old, halo.astype(old.dtype))

    found = filled(ring.keys, before[0]), filled(ring.values, before[1])
    return found, Places(jnp.where(column[None, :] < 0, positions, there.positions), is_dense=there.is_dense)


def _round(look: Look, q: jax.Array, k: jax.Array, v: jax.Array, where: Places, axes: Axes) -> jax.Array:
    """Global attention whose keys go from device to device until each has seen all before it (arXiv:2310.01889)."""
    devices, own = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]

    def step(carry: tuple[Online, Tree], hop: jax.Array) -> tuple[tuple[Online, Tree], None]:
        sofar, (k, v, key) = carry
        sofar = jax.lax.cond(  # keys of a device behind this one are all ahead of its queries
            hop <= own, lambda: sofar.plus(look.reach(q, k, v, where, key)), lambda: sofar
        )
        return (sofar, jax.tree.map(lambda a: jax.lax.ppermute(a, axes, pairs), (k, v, key))), None

    start = Online.nothing(q, k.shape[1])
    (found, _), _ = jax.lax.scan(step, (start, (k, v, where)), jnp.arange(devices))
    return found.mean().astype(v.dtype)


def _together(found: Online, axes: Axes) -> Online:
    """The softmax over the keys of all devices: a maximum and one sum."""
    peak = jax.lax.pmax(found.peak, axes)
    faded = found.faded(peak)
    summed = jax.lax.psum(jnp.concatenate([faded.out, faded.total[..., None]], axis=-1), axes)
    return Online(peak, summed[..., -1], summed[..., :-1])


def store(
    cache: LayerCache, keys: jax.Array, values: jax.Array, where: Places, lengths: jax.Array, *, is_global: bool
) -> LayerCache:
    """As `cache.store`, each device its slots; the new keys [B, K, T, H] lie along their tokens."""
    slots, held = cache.keys.shape[2], logical.spec(slot_names(is_global=is_global), cache.keys.shape)
    new = logical.spec(("batch", "kv_heads", "act_seq", None), keys.shape)
    tokens, cut = logical.axes_at(new, 2), logical.axes_at(held, 2)

    def body(cache: LayerCache, keys: jax.Array, values: jax.Array, where: Places, lengths: jax.Array) -> LayerCache:
        if tokens and not cut:
            return _stored_in_parts(cache, (keys, values), where, lengths, tokens)
        keys, values, where = _gathered(keys, 2, tokens), _gathered(values, 2, tokens), _gathered(where, 1, tokens)
        share = (jax.lax.axis_index(cut) * cache.keys.shape[2], slots) if cut else None
        return caching.store(cache, keys, values, where, lengths, share)

    specs = (held, new, new, PartitionSpec(new[0], new[2]), PartitionSpec(new[0]))
    return _mapped(body, specs, held)(cache, keys, values, where, lengths)


def _stored_in_parts(
    cache: LayerCache, new: tuple[jax.Array, jax.Array], where: Places, lengths: jax.Array, axes: Axes
) -> LayerCache:
    """A cache that lies whole on every device: each gives the tokens that it has, and the rest comes as zeros."""
    count, slots = where.positions.shape[1], cache.keys.shape[2]
    index = slot_places(lengths + jax.lax.psum(advance(0 * lengths, where), axes), slots).positions - lengths[:, None]
    here = index - jax.lax.axis_index(axes) * count
    has = ((here >= 0) & (here < count))[:, None, :, None]
    here, is_new = jnp.clip(here, 0, count - 1)[:, None, :, None], (index >= 0)[:, None, :, None]

    def renewed(old: jax.Array, new: jax.Array) -> jax.Array:
        mine = jnp.where(has, jnp.take_along_axis(new, here, axis=2), 0).astype(old.dtype)
        return jnp.where(is_new, jax.lax.psum(mine, axes), old)

    return LayerCache(renewed(cache.keys, new[0]), renewed(cache.values, new[1]))
