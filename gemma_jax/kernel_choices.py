"""Which kernels a model's programs use, by tracing them; nothing is computed and no device is needed."""

import contextlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

import gemma_kernels
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.generate.engine import PREFILL_CHUNK
from gemma_jax.nn.cache import Cache, empty_cache
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places
from gemma_jax.nn.shapes import shapes
from gemma_jax.train import Batch, next_token_loss
from gemma_kernels import Choice


def kernel_choices(
    config: DecoderConfig, target: str | None = None, *, dtype: str = "bfloat16", batch: int = 1, context: int = 4096
) -> Mapping[str, Sequence[Choice]]:
    """Of the programs of a model every choice of a kernel that is made, each once.

    Args:
        target: what they are compiled for; see `gemma_kernels.using`. None: what programs are traced for here, which
            is the device at hand if nothing else was asked for.
        context: tokens of a row in training, and slots of the cache.

    Raises ValueError for another target.
    """
    model = shapes(config, dtype)
    cache = jax.eval_shape(lambda: empty_cache(config, batch, context, dtype))
    chunk = min(PREFILL_CHUNK, context)

    def rows(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def first(model: Decoder, tokens: jax.Array, cache: Cache) -> jax.Array:
        return _chunk(model, tokens, cache, is_first=True)

    def later(model: Decoder, tokens: jax.Array, cache: Cache) -> jax.Array:
        return _chunk(model, tokens, cache, is_first=False)

    programs = {
        f"training, {context} tokens": lambda: jax.eval_shape(_trained, model, rows(context)),
        f"a prompt's first {chunk} tokens": lambda: jax.eval_shape(first, model, rows(chunk), cache),
        f"its next {chunk}": lambda: jax.eval_shape(later, model, rows(chunk), cache),
        "decoding": lambda: jax.eval_shape(later, model, rows(1), cache),
    }
    if not config.attention.is_causal:
        programs = dict(list(programs.items())[:1])
    found: dict[str, Sequence[Choice]] = {}
    for name, trace in programs.items():
        forced = contextlib.nullcontext() if target is None else gemma_kernels.using(target)
        with forced, gemma_kernels.recorded() as choices:
            trace()
        found[name] = list(dict.fromkeys(choices))
    return found


def _chunk(model: Decoder, tokens: jax.Array, cache: Cache, is_first: bool) -> jax.Array:
    where = Places(tokens, is_dense=True)  # any numbers: nothing is computed
    return model.hidden(tokens, where, cache, is_cache_empty=is_first, last=cache.lengths)[0]


def _trained(model: Decoder, tokens: jax.Array) -> jax.Array:
    return next_token_loss(model, Batch(tokens))
