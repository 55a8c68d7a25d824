"""Gemma 1 (arXiv:2403.08295): the published sizes as data."""

from gemma_jax.configs.config import AttentionConfig, AttentionKind, DecoderConfig, LayerSpec, NormConfig


def _gemma1(name: str, width: int, num_layers: int, ffw_width: int, num_heads: int, num_kv_heads: int) -> DecoderConfig:
    everything = AttentionKind(window=None, rope_theta=10_000.0)
    return DecoderConfig(
        name=name,
        vocab_size=256_000,
        width=width,
        context=8192,
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=256,
            query_pre_attn_scalar=256.0,
            local=everything,
            global_=everything,
            has_qk_norm=False,
        ),
        layers=(LayerSpec(is_local=False, ffw_width=ffw_width),) * num_layers,
        period=1,
        norm=NormConfig(has_post_norms=False),
    )


GEMMA1_2B = _gemma1("gemma-2b", 2048, 18, 16_384, 8, 1)
GEMMA1_7B = _gemma1("gemma-7b", 3072, 28, 24_576, 16, 16)
