"""Gemma 3n: the published sizes as data (specification of Gemma 3n, section 1)."""

from gemma_jax.configs.config import (
    AltUpConfig,
    AttentionConfig,
    AttentionKind,
    ConfigError,
    DecoderConfig,
    LayerSpec,
    NormConfig,
    PerLayerEmbeddingConfig,
)
from gemma_jax.configs.towers import MOBILENET_V5_300M, AudioConfig

VOCAB_SIZE, NUM_SPARE_ROWS = 262_144, 256  # files have rows for hard tokens of images and sound, copies of the first
PERIOD = 5  # four local layers, then one global
NUM_SPARSE, SPARSITY = 10, 0.95  # first layers, and the share of their gate activations that is set to zero


def layer_specs(
    is_local: list[bool], ffw_widths: list[int], sparsities: list[float], num_shared: int
) -> tuple[LayerSpec, ...]:
    """The layers: the last `num_shared` read the keys and values of the last layer of their kind before them.

    Raises ConfigError if there is none.
    """
    first = len(is_local) - num_shared
    sources = {kind: max((i for i in range(first) if is_local[i] == kind), default=None) for kind in (True, False)}
    for i in range(first, len(is_local)):
        if sources[is_local[i]] is None:
            kind = "local" if is_local[i] else "global"
            raise ConfigError(f"layer {i} is to share keys, but no {kind} layer before layer {first} has its own")
    return tuple(
        LayerSpec(
            is_local=local,
            ffw_width=width,
            activation_sparsity=sparsity,
            kv_source=sources[local] if i >= first else None,
        )
        for i, (local, width, sparsity) in enumerate(zip(is_local, ffw_widths, sparsities, strict=True))
    )


def _gemma3n(name: str, num_layers: int, ffw_width: int, num_shared: int) -> DecoderConfig:
    return DecoderConfig(
        name=name,
        vocab_size=VOCAB_SIZE,
        width=2048,
        context=32_768,
        attention=AttentionConfig(
            num_heads=8,
            num_kv_heads=2,
            head_dim=256,
            query_pre_attn_scalar=1.0,
            local=AttentionKind(window=512, rope_theta=10_000.0),
            global_=AttentionKind(window=None, rope_theta=1_000_000.0),
            has_v_norm=True,
        ),
        layers=layer_specs(
            [(i + 1) % PERIOD != 0 for i in range(num_layers)],
            [ffw_width] * num_layers,
            [SPARSITY if i < NUM_SPARSE else 0.0 for i in range(num_layers)],
            num_shared,
        ),
        period=PERIOD,
        norm=NormConfig(is_zero_centred=False),
        final_softcap=30.0,
        altup=AltUpConfig(),
        laurel_rank=64,
        per_layer_embedding=PerLayerEmbeddingConfig(num_rows=VOCAB_SIZE, width=256),
        vision=MOBILENET_V5_300M,
        audio=AudioConfig(),
    )


GEMMA3N_E2B = _gemma3n("gemma-3n-e2b", 30, 8192, 10)
GEMMA3N_E4B = _gemma3n("gemma-3n-e4b", 35, 16_384, 15)
