"""Our cross entropy over a vocabulary: the forward pass, and the gradients of hidden states and of the table."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import Blocks, Entry, Program
from benchmarks.kernels.estimate import Part
from gemma_kernels.tpu import linear_cross_entropy as loss

SIZES = ((1024, 1024, 512), (1024, 512, 512), (512, 512, 512), (512, 1024, 512), (2048, 512, 512))
KINDS = ("forward", "hidden_gradient", "table_gradient")


def choices(kind: str) -> tuple[Blocks, ...]:
    """Tokens, rows of the table and columns of D of one kernel's step."""
    return tuple({kind: {"tokens": tokens, "vocab": vocab, "width": width}} for tokens, vocab, width in SIZES)


@dataclass(frozen=True)
class LossShape:
    """Tokens in bfloat16 against a whole table."""

    name: str
    tokens: int
    width: int
    vocab: int = 262144

    @property
    def product(self) -> int:
        """Operations of one product of hidden states and table."""
        return 2 * self.tokens * self.width * self.vocab

    def entry(self, kind: str) -> Entry:
        shape = {"width": self.width, "tokens": self.tokens, "bytes": 2}
        return Entry(kernel="linear_cross_entropy", shape=shape, parts=(kind,))

    @property
    def bytes(self) -> int:
        """Of hidden states and table."""
        return 2 * (self.tokens + self.vocab) * self.width


SHAPES = (LossShape("4b-4k", 4096, 2560), LossShape("27b-4k", 4096, 5376))


def program(shape: LossShape, kind: str, blocks: Blocks) -> Program:
    """One of the kernels. A gradient's products are two: the logits, which no pass may store, and its own."""
    sizes = blocks[kind]
    block = loss.Block(**sizes)
    every = loss.Blocks(block, block, block)

    def mean(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        return loss.linear_cross_entropy(hidden, table, targets, blocks=every).sum()

    is_forward = kind == "forward"
    chunks = shape.width // _chunk(shape.width, sizes["width"])
    trips = {"loop 1": chunks - 1.0} if chunks > 2 else {}  # the first chunk of D stands before; one more is no loop
    if not is_forward and chunks > 1:
        trips["loop 2" if trips else "loop 1"] = chunks
    own = shape.vocab // sizes["vocab"] if kind == "table_gradient" else shape.tokens // sizes["tokens"]
    written = {"forward": 0, "hidden_gradient": shape.tokens, "table_gradient": shape.vocab}[kind]
    part = Part(pattern=f".*linear_cross_entropy_{kind}_*", trips=trips, runs={"#[12]$": own})
    return Program(
        function=mean if is_forward else jax.grad(mean, argnums=0 if kind == "hidden_gradient" else 1),
        arguments=(
            jax.ShapeDtypeStruct((shape.tokens, shape.width), jnp.bfloat16),
            jax.ShapeDtypeStruct((shape.vocab, shape.width), jnp.bfloat16),
            jax.ShapeDtypeStruct((shape.tokens,), jnp.int32),
        ),
        parts=(part,),
        flops=shape.product * (1 if is_forward else 2),
        min_bytes=shape.bytes + 2 * shape.width * written,
    )


def _chunk(width: int, limit: int) -> int:
    """Columns of D that one product takes: the largest multiple of 128 that divides D, up to the limit."""
    return max(size for size in range(128, limit + 1, 128) if width % size == 0)
