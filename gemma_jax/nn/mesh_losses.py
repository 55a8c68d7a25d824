"""Log-probabilities of targets without all logits: some rows at a time, and on a mesh each device by its own rows of
the table.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gemma_jax.nn import logical
from gemma_jax.nn.layers import softcap, wide

LOGITS_AT_ONCE = 2**24  # of tokens times vocabulary: 64 MiB of float32


def sums(
    logits_of: Callable[[Float[Array, "T D"]], Float[Array, "T V"]],
    x: Float[Array, "T D"],
    targets: Int[Array, " T"],
    vocab_size: int,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """log sum exp of each row's logits, and the target's logit (0 for a target that is none of 0 to V - 1)."""
    rows = min(len(x), max(1, LOGITS_AT_ONCE // vocab_size))
    padding = -len(x) % rows

    @jax.checkpoint
    def some(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits, wanted = logits_of(inputs[0]), inputs[1]
        chosen = jnp.take_along_axis(logits, jnp.clip(wanted, 0, vocab_size - 1)[:, None], axis=-1)[:, 0]
        is_here = (wanted >= 0) & (wanted < vocab_size)
        return jax.nn.logsumexp(logits, axis=-1), jnp.where(is_here, chosen, 0.0)

    pieces = jnp.pad(x, [(0, padding), (0, 0)]), jnp.pad(targets, (0, padding))
    pieces = jax.tree.map(lambda a: a.reshape(-1, rows, *a.shape[1:]), pieces)
    total, chosen = jax.lax.map(some, pieces)
    return total.reshape(-1)[: len(x)], chosen.reshape(-1)[: len(x)]


def losses(
    x: Float[Array, "*batch D"], targets: Int[Array, "*batch"], dims: str, table: nnx.Param, cap: float | None
) -> Float[Array, "*batch"]:
    """-log probability of each target, in nats, on the mesh in scope. `dims` is the order of the table's dimensions."""
    rules = logical.current()
    assert rules is not None
    value = table.get_raw_value()
    rest = logical.weight_spec(rules, dims, value.shape, logical.sizes())
    vocab = logical.axes_at(rest, dims.split().index("V"))
    spread = PartitionSpec(*((vocab or None) if letter == "V" else None for letter in dims.split()))
    names = (None, "act_seq") if targets.ndim == 1 else ("batch", "act_seq")
    batched, wanted = (x[None], targets[None]) if targets.ndim == 1 else (x, targets)
    rows = logical.spec(names, wanted.shape)

    def body(x: jax.Array, targets: jax.Array, table: jax.Array) -> jax.Array:
        here = table.shape[dims.split().index("V")]
        first = jax.lax.axis_index(vocab) * here if vocab else 0

        def logits_of(x: jax.Array) -> jax.Array:
            equation = f"TD,{dims.replace(' ', '')}->TV"
            return softcap(jnp.einsum(equation, x.astype(table.dtype), table, preferred_element_type=wide(table)), cap)

        total, chosen = sums(logits_of, x.reshape(-1, x.shape[-1]), targets.reshape(-1) - first, here)
        if vocab:
            peak = jax.lax.pmax(jax.lax.stop_gradient(total), vocab)
            total = peak + jnp.log(jax.lax.psum(jnp.exp(total - peak), vocab))
            chosen = jax.lax.psum(chosen, vocab)
        return (total - chosen).reshape(targets.shape)

    run = jax.shard_map(body, in_specs=(PartitionSpec(*rows, None), rows, spread), out_specs=rows, check_vma=False)
    return run(batched, wanted, logical.at_use(table, value)).reshape(targets.shape)
