"""A kernel with a low-rank addition that can be trained while the kernel stays as it is (LoRA, arXiv:2106.09685)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx


class Factor(nnx.Param):
    """A matrix of an addition; `r` in its `dims` is the rank."""


class Pair(nnx.Module):
    """a [*inputs, r] and b [r, *outputs] of one weight."""

    def __init__(self, a: Factor, b: Factor):
        self.a, self.b = a, b


def refuse_adapted(model: nnx.Module, what: str) -> None:
    """Raises ValueError for a model with an adapter beside its weights."""
    if any(isinstance(node, Adapted) for _, node in nnx.iter_graph(model)):
        raise ValueError(
            f"{what} needs a model without an adapter; save that with train.lora.save, and load with lora="
        )


class Adapted(nnx.Module):
    """In the place of a kernel: `product` with it is x base + scale * (x a) b (arXiv:2106.09685, eq. 3).

    A fused kernel has a pair for each weight in it that is adapted, under that weight's name.
    """

    def __init__(self, base: nnx.Param, pairs: Mapping[str, Pair], scale: float):
        self.base, self.pairs, self.scale = base, nnx.Dict(pairs), scale

    def spans(self) -> list[tuple[Pair | None, int]]:
        """The pairs by what they add to, and how many of the first outputs each one has; None: nothing is added."""
        parts, num_inputs = self.base.get_metadata("parts", None), self.base.get_metadata("inputs")
        if parts is None:
            (pair,) = self.pairs.values()
            return [(pair, self.base.get_raw_value().shape[num_inputs])]
        return [(self.pairs.get(name), stop - start) for name, start, stop in parts]

    def __getitem__(self, index: object) -> jax.Array:
        """Of the whole kernel with its addition, which `...` asks for."""
        value, num_inputs = self.base[...], self.base.get_metadata("inputs")
        added = []
        for pair, size in self.spans():
            shape = (*value.shape[:num_inputs], size, *value.shape[num_inputs + 1 :])
            added.append(jnp.zeros(shape, value.dtype) if pair is None else jnp.tensordot(pair.a[...], pair.b[...], 1))
        return (value + self.scale * jnp.concatenate(added, axis=num_inputs).astype(value.dtype))[index]
