"""What each TPU kernel says that a call costs, against the same counted here by hand: XLA plans by it, and `benchmarks`
take a call's bytes from it.
"""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from gemma_kernels import reference
from gemma_kernels.tpu.band import Band, BandBlocks, Marks
from gemma_kernels.tpu.band_backward import band_backward
from gemma_kernels.tpu.band_forward import band_forward
from gemma_kernels.tpu.band_tiles import AttentionBlocks, TileBlocks
from gemma_kernels.tpu.decode_attention import DecodeBlocks, decode_attention
from gemma_kernels.tpu.group_quant_matmul import QuantMatmulBlocks, group_quant_matmul
from gemma_kernels.tpu.linear_cross_entropy import Block, Blocks, linear_cross_entropy
from gemma_kernels.tpu.mix_streams import MixBlocks, mix_streams

T, H = 1024, 128  # of the attention; B is 2, N 4, K 2
BYTES = 2  # of a bfloat16
QUERY, KEY, SUMS = 2 * 4 * T * H * BYTES, 2 * 2 * T * H * BYTES, 2 * 4 * T * 4  # bytes of q, of k, of a float32 a query


def costs(function: Callable[..., Any], *arguments: Any) -> dict[str, tuple[int, int, int]]:
    """Of each kernel in a program its estimate: operations, transcendentals, bytes."""
    found: dict[str, tuple[int, int, int]] = {}

    def collect(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                cost = equation.params["cost_estimate"]
                found[equation.params["name"]] = cost.flops, cost.transcendentals, cost.bytes_accessed
                continue
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    collect(getattr(inner, "jaxpr", inner))

    collect(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def shape(*sizes: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def attention_arrays() -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v, sums of each query."""
    return shape(2, 4, T, H), shape(2, 2, T, H), shape(2, 2, T, H), shape(2, 4, T, dtype="float32")


def pairs(window: int | None) -> int:
    """Of all heads and rows, counted one by one."""
    return 2 * 4 * int(reference.band_mask(T, T, window=window).sum())


@pytest.mark.parametrize(
    ("window", "softcap", "keys_read"),
    [
        # 4 blocks of queries, 4 blocks of 128 keys each: the 256 before the block's last query, and 255 more
        (256, None, 4 * 4 * 128),
        (256, 30.0, 4 * 4 * 128),
        # all keys for each block of queries: what is ahead is counted too, though not fetched
        (None, None, 4 * 1024),
    ],
)
def test_the_forward_costs_two_products_of_the_band_and_its_blocks_of_keys(window, softcap, keys_read):
    q, k, v, _ = attention_arrays()
    blocks = BandBlocks(block_q=256, block_kv=128, heads=2)

    def call(q, k, v):
        return band_forward(q, k, v, Marks(), Band(window, softcap), blocks)

    (cost,) = costs(call, q, k, v).values()
    # q is read and the output written once; each group of 2 heads reads its keys and its values
    moved = 2 * QUERY + SUMS + 2 * (2 * 2) * keys_read * H * BYTES
    assert cost == (2 * 2 * pairs(window) * H, pairs(window) * (1 if softcap is None else 2), moved)


OWNED = {
    "band_attention_dq": (3, 4 * QUERY),
    "band_attention_dkv": (4, 4 * KEY),
}  # products; what is read or written once


@pytest.mark.parametrize("tiles", [2, 4])
@pytest.mark.parametrize(
    ("window", "met"),
    [
        (256, 4 * 4 * 128),  # 4 blocks of 256 meet 4 tiles of 128 each
        (None, 4 * 1024),
    ],
)
def test_each_gradient_costs_its_products_of_the_band_and_its_tiles(window, met, tiles):
    q, k, v, sums = attention_arrays()
    dq, dkv = (TileBlocks(*sizes, heads=2, tiles=tiles) for sizes in ((256, 128), (128, 256)))
    blocks = AttentionBlocks(BandBlocks(128, 128, 2), dq, dkv)

    def call(q, k, v, sums):
        return band_backward(q, k, v, q, sums, q, Marks(), Band(window), blocks)

    found = costs(call, q, k, v, sums)
    assert found.keys() == OWNED.keys()
    for name, (products, owned) in OWNED.items():
        passes = 2 * 2 if name == "band_attention_dq" else 2 * 4  # 2 heads of queries share the keys they read
        tiles_read = 2 * passes * met * H * BYTES
        assert found[name] == (2 * products * pairs(window) * H, pairs(window), owned + tiles_read), name


def test_all_gradients_at_once_cost_five_products_of_the_band():
    q, k, v, sums = attention_arrays()
    plain = TileBlocks(128, 128, heads=2)
    blocks = AttentionBlocks(BandBlocks(128, 128, 2), plain, plain, fused=256)

    def call(q, k, v, sums):
        return band_backward(q, k, v, q, sums, q, Marks(), Band(256, softcap=30.0), blocks)

    (cost,) = costs(call, q, k, v, sums).values()
    windows = 2 * (2 * 2) * 4 * 512 * H * BYTES  # of keys and values: each of 4 blocks of queries reads 2 blocks of 256
    assert cost == (2 * 5 * pairs(256) * H, 2 * pairs(256), 4 * QUERY + 2 * KEY + windows)


@pytest.mark.parametrize("is_int8", [False, True])
def test_decoding_costs_two_products_with_the_whole_cache(is_int8):
    q, cache = shape(2, 4, 1, H), shape(2, 2, 512, H, dtype="int8" if is_int8 else "bfloat16")
    scales = (shape(2, 2, 512, dtype="float32"),) * 2 if is_int8 else None

    def call(q, k, v, integers, scales):
        options = {"window": None, "scales": scales, "blocks": DecodeBlocks(keys=128)}
        return decode_attention(q, k, v, integers[:, None], integers, **options)

    (cost,) = costs(call, q, cache, cache, shape(2, dtype="int32"), scales).values()
    logits, numbers = 2 * 4 * 512, 2 * 2 * 2 * 512 * H
    moved = 2 * (2 * 4 * H) * BYTES + (numbers + 2 * 2 * 2 * 512 * 4 if is_int8 else numbers * BYTES)
    assert cost == (2 * 2 * logits * H, logits, moved)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_loss_costs_a_product_and_its_gradients_two_each(softcap):
    tokens, rows, width = 384, 700, 256
    blocks = Blocks(Block(128, 256, 128), Block(128, 128, 128), Block(128, 256, 128))

    def call(hidden, table, targets):
        return linear_cross_entropy(hidden, table, targets, softcap=softcap, blocks=blocks).sum()

    arrays = shape(tokens, width), shape(rows, width), shape(tokens, dtype="int32")
    found = costs(jax.grad(call, argnums=(0, 1)), *arrays)
    product, exponentials = 2 * tokens * rows * width, tokens * rows * (1 if softcap is None else 2)
    hidden, table = tokens * width * BYTES, rows * width * BYTES
    assert found == {
        # for each of 3 blocks of tokens the whole table; targets, and the two numbers kept of each token
        "linear_cross_entropy_forward": (product, exponentials, hidden + 3 * table + 3 * 4 * tokens),
        "linear_cross_entropy_hidden_gradient": (2 * product, exponentials, 2 * hidden + 3 * table),
        "linear_cross_entropy_table_gradient": (2 * product, exponentials, 2 * table + 3 * hidden),
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_product_costs_its_weights_once_for_each_block_of_rows(bits):
    rows, inputs, outputs = 32, 512, 384
    arrays = shape(rows, inputs), shape(inputs, outputs, dtype=f"int{bits}"), shape(inputs // 32, outputs)

    def call(x, values, scales):
        return group_quant_matmul(x, values, scales, blocks=QuantMatmulBlocks(rows=16, inputs=256, outputs=128))

    (cost,) = costs(call, *arrays).values()
    weights = inputs * outputs * bits // 8 + inputs // 32 * outputs * BYTES
    moved = 2 * weights + 3 * rows * inputs * BYTES + rows * outputs * BYTES  # x for each of 3 columns of blocks
    assert cost == (2 * rows * inputs * outputs, 0, moved)


def test_a_mixture_of_streams_costs_each_vector_once():
    tokens, width = 100, 256
    arrays = shape(tokens, 3, 5, dtype="float32"), shape(4, tokens, width), *[shape(tokens, width)] * 2
    d_out = shape(3, tokens, width)

    def call(d_out, *arrays):
        _, pull = jax.vjp(lambda *arrays: mix_streams(*arrays, blocks=MixBlocks(64, 32)), *arrays)
        return pull(d_out)

    product, vector, coefficients = 2 * tokens * width * 3 * 5, tokens * width * BYTES, tokens * 3 * 5 * 4
    assert costs(call, d_out, *arrays) == {
        "mix_streams_forward": (product, 0, coefficients + (6 + 3) * vector),  # 4 + 2 vectors in, 3 out
        # what is sent back and 5 vectors in; the gradients of these and of what was added out
        "mix_streams_backward": (2 * product, 0, 2 * coefficients + (3 + 5 + 6) * vector),
    }
