"""Gemma 3 (arXiv:2503.19786): the published sizes as data."""

import dataclasses

from gemma_jax.configs.config import AttentionConfig, AttentionKind, DecoderConfig, LayerSpec, VisionConfig

VOCAB_SIZE, PADDED_VOCAB_SIZE = 262_144, 262_208  # multimodal files pad the table by 64 rows that stand for no token
PERIOD = 6  # five local layers, then one global

SIGLIP_SO400M = VisionConfig(
    num_layers=27, width=1152, num_heads=16, ffw_width=4304, patch_size=14, image_size=896, num_soft_tokens=256
)


def five_to_one(num_layers: int, ffw_width: int) -> tuple[LayerSpec, ...]:
    """Layers 5, 11, 17, ... are global; the pattern is cut at `num_layers`, so the last layer need not be."""
    return tuple(LayerSpec(is_local=(i + 1) % PERIOD != 0, ffw_width=ffw_width) for i in range(num_layers))


def _gemma3(
    name: str,
    *,
    width: int,
    num_layers: int,
    ffw_width: int,
    heads: tuple[int, int, int],  # query heads, key/value heads, width of a head
    window: int,
    query_pre_attn_scalar: float = 256.0,
    rope_scale: float = 8.0,
    context: int = 131_072,
    vision: VisionConfig | None = SIGLIP_SO400M,
    is_causal: bool = True,
) -> DecoderConfig:
    num_heads, num_kv_heads, head_dim = heads
    return DecoderConfig(
        name=name,
        vocab_size=VOCAB_SIZE,
        width=width,
        context=context,
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            query_pre_attn_scalar=query_pre_attn_scalar,
            local=AttentionKind(window=window, rope_theta=10_000.0),
            global_=AttentionKind(window=None, rope_theta=1_000_000.0, rope_scale=rope_scale),
            is_causal=is_causal,
        ),
        layers=five_to_one(num_layers, ffw_width),
        period=PERIOD,
        vision=vision,
    )


GEMMA3_270M = _gemma3(
    "gemma-3-270m",
    width=640,
    num_layers=18,
    ffw_width=2048,
    heads=(4, 1, 256),
    window=512,
    rope_scale=1.0,
    context=32_768,
    vision=None,
)
GEMMA3_1B = _gemma3(
    "gemma-3-1b",
    width=1152,
    num_layers=26,
    ffw_width=6912,
    heads=(4, 1, 256),
    window=512,
    rope_scale=1.0,
    context=32_768,
    vision=None,
)
GEMMA3_4B = _gemma3("gemma-3-4b", width=2560, num_layers=34, ffw_width=10_240, heads=(8, 4, 256), window=1024)
GEMMA3_12B = _gemma3("gemma-3-12b", width=3840, num_layers=48, ffw_width=15_360, heads=(16, 8, 256), window=1024)
GEMMA3_27B = _gemma3(
    "gemma-3-27b",
    width=5376,
    num_layers=62,
    ffw_width=21_504,
    heads=(32, 16, 128),
    window=1024,
    query_pre_attn_scalar=168.0,  # width / query heads; the other sizes use the width of a head
)
EMBEDDING_GEMMA = dataclasses.replace(  # arXiv:2509.20354
    _gemma3(
        "embeddinggemma-300m",
        width=768,
        num_layers=24,
        ffw_width=1152,
        heads=(3, 1, 256),
        window=512,
        rope_scale=1.0,
        context=2048,
        vision=None,
        is_causal=False,
    ),
    dense_widths=(3072, 768),
)
DERIVED = tuple(  # other weights and templates, the same architecture
    dataclasses.replace(base, name=name)
    for base, names in (
        (GEMMA3_270M, ["functiongemma-270m"]),
        (GEMMA3_4B, ["shieldgemma-2-4b", "medgemma-4b", "medgemma-1.5-4b", "translategemma-4b"]),
        (GEMMA3_12B, ["translategemma-12b"]),
        (GEMMA3_27B, ["medgemma-27b", "translategemma-27b"]),
        (dataclasses.replace(GEMMA3_27B, vision=None), ["medgemma-27b-text"]),
    )
    for name in names
)
