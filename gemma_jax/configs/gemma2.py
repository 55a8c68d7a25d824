"""Gemma 2 (arXiv:2408.00118): the published sizes as data."""

from gemma_jax.configs.config import AttentionConfig, AttentionKind, DecoderConfig, LayerSpec


def _gemma2(
    name: str, width: int, num_layers: int, ffw_width: int, heads: tuple[int, int, int], query_pre_attn_scalar: float
) -> DecoderConfig:
    num_heads, num_kv_heads, head_dim = heads
    return DecoderConfig(
        name=name,
        vocab_size=256_000,
        width=width,
        context=8192,
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            query_pre_attn_scalar=query_pre_attn_scalar,
            local=AttentionKind(window=4096, rope_theta=10_000.0),
            global_=AttentionKind(window=None, rope_theta=10_000.0),
            has_qk_norm=False,
            softcap=50.0,
        ),
        layers=tuple(LayerSpec(is_local=i % 2 == 0, ffw_width=ffw_width) for i in range(num_layers)),
        period=2,
        final_softcap=30.0,
    )


GEMMA2_2B = _gemma2("gemma-2-2b", 2304, 26, 9216, (8, 4, 256), 256.0)
GEMMA2_9B = _gemma2("gemma-2-9b", 3584, 42, 14_336, (16, 8, 256), 256.0)
GEMMA2_27B = _gemma2("gemma-2-27b", 4608, 46, 36_864, (32, 16, 128), 144.0)  # width / query heads
