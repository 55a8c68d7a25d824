"""The least that devices have to send each other for a step, by arithmetic: what a program's collectives are beside."""

import math
from collections.abc import Mapping

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.parallel.rules import BATCH


def decoding(config: DecoderConfig, sizes: Mapping[str, int], batch: int, itemsize: int = 2) -> int:
    """Bytes of all-reduces on one device in a decoding step of Gemma 3, weights divided between devices.

    Of each layer two sums over the devices that divide it: of attention's output, by heads, and of the ffw's; and one
    of the token's row, by vocabulary. A global layer whose cache is cut along its slots puts its softmaxes together:
    of each of a device's heads a maximum, a total and a vector, in float32. Sampling sends a few numbers more.
    """
    heads, model, seq = config.attention, sizes.get("model", 1), sizes.get("seq", 1)
    rows = batch // math.prod(sizes.get(axis, 1) for axis in BATCH)
    is_cut_by_model = model > 1 and heads.num_kv_heads % model != 0
    stream = rows * config.width * itemsize
    sums = stream * (config.num_layers * ((model > 1) + (model * seq > 1)) + (model > 1))
    if seq == 1 and not is_cut_by_model:
        return sums
    own_heads = heads.num_heads if is_cut_by_model else heads.num_heads // model
    softmax = rows * own_heads * (heads.head_dim + 2) * 4
    return sums + softmax * sum(not spec.is_local for spec in config.layers)
