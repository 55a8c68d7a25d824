"""Gemma 3n's encoders of images and sound, as data."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ConvBlock:
    """One block of MobileNetV5. Its middle has `expansion` times the channels that come in (attention: none).

    `kind` is "edge" (a full convolution, then a product per pixel), "inverted" (products per pixel around depthwise
    convolutions) or "attention" (multi-query attention over pixels). Kernels of 0 are not there.
    """

    kind: str
    width: int  # channels out
    stride: int = 1
    expansion: int = 1
    start_kernel: int = 0  # of the depthwise convolution before the expansion
    kernel: int = 0  # of an edge block's convolution, and of the depthwise one after an inverted block's expansion
    num_heads: int = 0
    head_dim: int = 0
    key_kernel: int = 0  # of the depthwise convolution of stride 2 that shrinks keys and values


@dataclass(frozen=True, kw_only=True)
class MobileNetConfig:
    """MobileNetV5 and the embedder behind it: the eyes of Gemma 3n."""

    stages: tuple[tuple[ConvBlock, ...], ...]
    stem_width: int = 64
    width: int = 2048  # of a soft token, before the embedder
    fusion_expansion: int = 2  # of the two last stages' channels together
    image_size: int = 768
    num_soft_tokens: int = 256
    num_hard_tokens: int = 128  # rows of the embedder's own table, whose ids begin with the first token
    first_token: int = 262_144
    begin_token: int = 255_999
    end_token: int = 262_144
    soft_token: int = 262_145  # stands where an image's vectors go


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The conformer and the embedder behind it: the ears of Gemma 3n (Universal Speech Model, arXiv:2303.01037)."""

    num_layers: int = 12
    width: int = 1536
    num_heads: int = 8
    channels: tuple[int, ...] = (128, 32)  # of the two convolutions of stride 2 at the entry
    num_bins: int = 128  # mel frequencies
    kernel: int = 5  # of the depthwise convolution in time
    past: int = 13  # frames a frame sees, itself included
    chunk: int = 12  # of HF's implementation; no part of the function
    softcap: float = 50.0  # of attention logits
    reduction: int = 4  # of every so many frames one is kept at the end
    residual_weight: float = 0.5  # of the ffw layers
    group_norm_epsilon: float = 1e-3
    num_soft_tokens: int = 188  # a clip takes
    num_hard_tokens: int = 128  # rows of the embedder's own table, whose ids begin with the first token
    first_token: int = 262_272
    begin_token: int = 256_000
    end_token: int = 262_272
    soft_token: int = 262_273  # stands where a clip's vectors go

    @property
    def padding_token(self) -> int:
        """The last hard token: it fills a clip's places up."""
        return self.first_token + self.num_hard_tokens - 1

    @property
    def bins_left(self) -> int:
        """Frequencies after the two convolutions of stride 2, kernel 3 and padding 1."""
        bins = self.num_bins
        for _ in self.channels:
            bins = (bins - 1) // 2 + 1
        return bins


def _inverted(width: int, start: int, expansion: int, kernel: int = 0, stride: int = 1) -> ConvBlock:
    return ConvBlock(
        kind="inverted", width=width, start_kernel=start, expansion=expansion, kernel=kernel, stride=stride
    )


def _attention(width: int, num_heads: int, head_dim: int, key_kernel: int) -> ConvBlock:
    return ConvBlock(kind="attention", width=width, num_heads=num_heads, head_dim=head_dim, key_kernel=key_kernel)


MOBILENET_V5_300M = MobileNetConfig(  # timm's mobilenetv5_300m_enc
    stages=(
        tuple(ConvBlock(kind="edge", width=128, kernel=3, stride=stride, expansion=4) for stride in (2, 1, 1)),
        (_inverted(256, 3, 6, kernel=5, stride=2), *(_inverted(256, start, 4) for start in (5, 3, 5, 3))),
        (
            _inverted(640, 5, 6, kernel=5, stride=2),
            *(_inverted(640, 5, 4) for _ in range(7)),
            _inverted(640, 0, 1),
            *(block for _ in range(14) for block in (_attention(640, 12, 64, 3), _inverted(640, 0, 2))),
        ),
        (
            _inverted(1280, 5, 6, kernel=5, stride=2),
            *(block for _ in range(19) for block in (_attention(1280, 16, 96, 0), _inverted(1280, 0, 2))),
        ),
    )
)
