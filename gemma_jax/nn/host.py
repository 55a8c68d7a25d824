"""Tables in the host's memory beside a device: their rows are gathered there, and nothing else goes to the device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

KIND = "pinned_host"  # JAX's name of memory that the host owns and a device reads by itself

# what JAX 0.12 calls compute_on: 0.10 has that name for a context manager, whose constants lie on the device
_compute_on: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)


def host_sharding(sharding: Sharding | None = None) -> Sharding:
    """The same devices (None: JAX's default one) and the same shards, in the host's memory beside each.

    Raises ValueError that names the kinds of memory there are, where that is not among them.
    """
    if sharding is None:
        sharding = SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    device = next(iter(sharding.device_set))
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND not in kinds:
        raise ValueError(
            f"{device} has no memory of kind {KIND!r}, which tables on the host need; it has {', '.join(kinds)}"
        )
    return sharding.with_memory_kind(KIND)


def is_on_host(table: Float[Array, "R *row"]) -> bool:
    """Whether an array, traced or not, lies in the host's memory."""
    return jax.typeof(table).memory_space == jax.memory.Space.Host


def rows(table: Float[Array, "R *row"], index: Int[Array, "B T"]) -> Float[Array, "B T *row"]:
    """Rows of a table on the device, gathered where the table lies. `index` is 0 to R - 1.

    Of a table on the host they are gathered by the host, in the program; on the device there is never more of it.
    """
    return _gather_there(table, index, 0, jax.memory.Space.Device) if is_on_host(table) else jnp.take(table, index, 0)


def kept(table: Float[Array, "*dims"], places: Sequence[int], axis: int) -> Float[Array, "*kept"]:
    """Some places along an axis of an array, in their order; the result lies where the array does."""
    index = jnp.asarray(places)
    return (
        _gather_there(table, index, axis, jax.memory.Space.Host) if is_on_host(table) else jnp.take(table, index, axis)
    )


def _gather_there(table: jax.Array, index: jax.Array, axis: int, to: Any) -> jax.Array:
    """`jnp.take` by the host, for an index within bounds.

    Not by `jnp.take` itself: the constants that it compares the index with would lie on the device.
    """
    offsets = [i for i in range(table.ndim - 1 + index.ndim) if not axis <= i < axis + index.ndim]
    dimensions = jax.lax.GatherDimensionNumbers(tuple(offsets), collapsed_slice_dims=(axis,), start_index_map=(axis,))
    sizes = tuple(1 if i == axis else size for i, size in enumerate(table.shape))

    def gather(table: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.gather(table, index[..., None], dimensions, sizes, mode="promise_in_bounds")

    run = _compute_on(gather, compute_type="device_host", out_memory_spaces=to)
    return run(table, jax.device_put(index, jax.memory.Space.Host))
