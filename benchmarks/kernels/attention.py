"""Shapes of Gemma's attention, and what a call of each must do."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """A whole sequence of one row in bfloat16; N query heads share K key heads of width H."""

    name: str
    query_heads: int
    key_heads: int
    width: int
    tokens: int
    window: int | None
    is_quick: bool = False

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.query_heads // self.key_heads

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        seen = self.tokens if self.window is None else min(self.window, self.tokens)
        return seen * (seen + 1) // 2 + (self.tokens - seen) * seen

    @property
    def flops(self) -> int:
        """Of the two products of the forward pass."""
        return 4 * self.query_heads * self.width * self.pairs

    @property
    def backward_flops(self) -> int:
        """Of the backward pass's five products, one of them the logits again; not the two more of a split one."""
        return self.flops // 2 * 5

    @property
    def backward_bytes(self) -> int:
        """q, out, d_out, dq; k, v, dk, dv; the sums."""
        return 4 * self.query_bytes + 4 * self.key_bytes + self.sum_bytes

    @property
    def forward_bytes(self) -> int:
        """q and out; k and v; the sums."""
        return 2 * self.query_bytes + 2 * self.key_bytes + self.sum_bytes

    @property
    def query_bytes(self) -> int:
        return 2 * self.query_heads * self.tokens * self.width

    @property
    def key_bytes(self) -> int:
        """Of the keys; as many are the values'."""
        return 2 * self.key_heads * self.tokens * self.width

    @property
    def sum_bytes(self) -> int:
        """Of one float32 for each query and head."""
        return 4 * self.query_heads * self.tokens

    def queries(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, self.query_heads, self.tokens, self.width), jnp.bfloat16)

    def keys(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, self.key_heads, self.tokens, self.width), jnp.bfloat16)

    def sums(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, self.query_heads, self.tokens), jnp.float32)

    def ids(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, self.tokens), jnp.int32)


SHAPES = (
    AttentionShape(name="4b-local-8k", query_heads=8, key_heads=4, width=256, tokens=8192, window=1024, is_quick=True),
    AttentionShape(name="27b-local-8k", query_heads=32, key_heads=16, width=128, tokens=8192, window=1024),
    AttentionShape(name="1b-local-8k", query_heads=4, key_heads=1, width=256, tokens=8192, window=512),
    AttentionShape(name="4b-global-8k", query_heads=8, key_heads=4, width=256, tokens=8192, window=None),
    AttentionShape(name="4b-global-32k", query_heads=8, key_heads=4, width=256, tokens=32768, window=None),
)
