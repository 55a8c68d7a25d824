"""What Gemma 3n has beside a Gemma 3 decoder: the rows of its text part, vision tower and audio tower.

Letters as in `families`, and: A AltUp streams, R rows of the per-layer table, P its width per layer, W LAuReL's rank;
in the towers C width, I and O channels in and out, k the side of a kernel.
Paths of the vision tower follow timm's modules: vision/blocks_2_9/query/kernel is query.proj of block 9 of stage 2.
Source: specification of weight names, sections 4 and 5; google/gemma-3n's files, timm's mobilenetv5_300m_enc.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gemma_checkpoints.rows import At, Placed, Row, norm

PER_LAYER_TABLE = (
    Row("embedder/ple", "R L P", At("embed_tokens_per_layer.weight", "R (L P)"),
        At("embedder/per_layer_input_embedding"), At("per_layer_token_embd.weight", "R (L P)")),
    Row("ple_proj/kernel", "D L P", At("per_layer_model_projection.weight", "(L P) D"),
        At("embedder/per_layer_input_projection/w"), At("per_layer_model_proj.weight", "(L P) D")),
    norm("ple_proj_norm", "P", "per_layer_projection_norm", "embedder/per_layer_projection_norm",
         "per_layer_proj_norm"),
)  # fmt: skip
PER_LAYER = (
    Row("ple/gate/kernel", "D P", At("per_layer_input_gate.weight", "P D"),
        At("per_layer_mapping/per_layer_input_gate/w"), At("inp_gate.weight", "P D")),
    Row("ple/proj/kernel", "P D", At("per_layer_projection.weight", "D P"),
        At("per_layer_mapping/per_layer_projection/w"), At("proj.weight", "D P")),
    norm("ple/norm", "D", "post_per_layer_input_norm", "per_layer_mapping/post_per_layer_input_norm", "post_norm"),
)  # fmt: skip
ALTUP = (
    norm("altup/router_norm", "D", "altup.router_norm", "altup/router_norm_layer", "altup_router_norm"),
    Row("altup/router/kernel", "D A", At("altup.modality_router.weight", "A D"), At("altup/modality_router/w"),
        At("altup_router.weight", "A D")),
    Row("altup/prediction", "A A A", At("altup.prediction_coefs.weight", "(A' A'') A"), At("altup/prediction_coefs"),
        At("altup_predict_coef.weight", "(A' A'') A")),
    Row("altup/correction", "A A", At("altup.correction_coefs.weight", "A' A"), At("altup/correction_coefs"),
        At("altup_correct_coef.weight", "A' A")),
)  # fmt: skip
ALTUP_SCALE = Row("altup/correct_scale", "D", At("altup.correct_output_scale"), At("altup/correct_output_scale"),
                  At("altup_correct_scale.weight"))  # fmt: skip
LAUREL = (
    Row("laurel/left/kernel", "D W", At("laurel.linear_left.weight", "W D"), At("laurel/linear_left/w"),
        At("laurel_l.weight", "W D")),
    Row("laurel/right/kernel", "W D", At("laurel.linear_right.weight", "D W"), At("laurel/linear_right/w"),
        At("laurel_r.weight", "D W")),
    norm("laurel/norm", "D", "laurel.post_laurel_norm", "post_laurel_norm", "laurel_post_norm"),
)  # fmt: skip
QK_NORM = (  # DeepMind's names lost an underscore
    norm("attn/q_norm", "H", "self_attn.q_norm", "attn/query_norm", "attn_q_norm"),
    norm("attn/k_norm", "H", "self_attn.k_norm", "attn/key_norm", "attn_k_norm"),
)
# What layers compute only if their keys and values are their own; of the others files may hold it, unused.
OWN_KEYS = ("attn/k/kernel", "attn/v/kernel", "attn/k_norm/scale")
UNUSED_KEYS = r"layers\.{0}\.self_attn\.(k_proj|v_proj|k_norm)\.weight|blk\.{0}\.attn_(k|v|k_norm)\.weight"

UNUSED_SCALE = r".*altup[._/]correct_(output_)?scale.*", "the model does not scale what the gate sees"


def altup_projections(num_streams: int) -> Iterator[Row]:
    """Between the one stream of the embeddings and the streams of AltUp; GGUF stacks them."""
    for ours, theirs, gguf in (
        ("altup_proj", "altup_projection", "altup_proj"),
        ("altup_unembed", "altup_unembed_projection", "altup_unembd_proj"),
    ):
        for k in range(num_streams - 1):
            name = f"{theirs}_{k}"
            yield Row(f"{ours}_{k}/kernel", "D D", At(f"{theirs}s.{k}.weight", "D' D"), At(f"{name}/{name}"),
                      At(f"{gguf}.weight", "D' D", (k, num_streams - 1)))  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One block of MobileNetV5 (see `configs.towers.ConvBlock`): of kind "edge", "inverted" or "attention"."""

    kind: str
    width: int  # channels out
    expansion: int = 1
    start_kernel: int = 0  # side of the depthwise kernel before the expansion; 0: none
    kernel: int = 0  # of an edge block's convolution, or of the depthwise one after the expansion; 0: none
    num_heads: int = 0
    head_dim: int = 0
    key_kernel: int = 0  # of the depthwise convolution that shrinks keys and values; 0: none


@dataclass(frozen=True)
class MobileNetSizes:
    """What a table needs to know of a MobileNetV5 and of the embedder behind it."""

    stem_width: int
    stages: tuple[tuple[Block, ...], ...]
    width: int  # channels out
    fusion_expansion: int
    num_tokens: int  # rows of the embedder's own table


@dataclass(frozen=True)
class ConformerSizes:
    """What a table needs to know of the audio tower and of the embedder behind it."""

    num_layers: int
    width: int
    num_heads: int
    ffw_width: int
    channels: tuple[int, int]
    num_bins: int  # frequencies after the two convolutions
    kernel: int  # of the depthwise convolution in time
    num_tokens: int


def vision_rows(tower: MobileNetSizes, width: int) -> Iterator[Placed]:
    """The tower and its embedder; `width` is the decoder's."""
    yield from _rows(_STEM, {"O": tower.stem_width, "I": 3, "k": 3}, "vision/", "vision_tower.timm_model.")
    channels = tower.stem_width
    for s, stage in enumerate(tower.stages):
        for b, block in enumerate(stage):
            prefixes = f"vision/blocks_{s}_{b}/", f"vision_tower.timm_model.blocks.{s}.{b}."
            yield from _block_rows(block, channels, *prefixes)
            channels = block.width
    joined = tower.stages[-2][-1].width + channels
    sizes = {"I": joined, "M": tower.fusion_expansion * joined, "O": tower.width, "U": 1, "k": 1}
    yield from _rows(_FUSION, sizes, "vision/fusion/", "vision_tower.timm_model.msfa.")
    sizes = {"S": tower.num_tokens, "C": tower.width, "D": width}
    yield from _rows(_EMBEDDER, sizes, "mm/", "embed_vision.")


def audio_rows(tower: ConformerSizes, width: int) -> Iterator[Placed]:
    """The tower and its embedder; `width` is the decoder's."""
    before = 1
    for n, channels in enumerate(tower.channels):
        prefixes = f"audio/sscp_{n}/", f"audio_tower.subsample_conv_projection.conv_{n}."
        yield from _rows(_SUBSAMPLING, {"k": 3, "I": before, "O": channels}, *prefixes)
        before = channels
    heads = {"N": tower.num_heads, "H": tower.width // tower.num_heads}
    sizes = {"C": tower.width, "E": tower.ffw_width, "G": 2 * tower.width, "U": 1, "k": tower.kernel, **heads}
    sizes["B"] = tower.num_bins * before
    yield from _rows(_SUBSAMPLED, sizes, "audio/", "audio_tower.subsample_conv_projection.")
    for i in range(tower.num_layers):
        yield from _rows(_CONFORMER, sizes, f"audio/conf_{i}/", f"audio_tower.conformer.{i}.")
    yield from _rows(_EMBEDDER, {**sizes, "S": tower.num_tokens, "D": width}, "audio_mm/", "embed_audio.")


def _rows(rows: tuple[Row, ...], sizes: Mapping[str, int], path: str, name: str) -> Iterator[Placed]:
    for row in rows:
        yield Placed(row, sizes, path, {"huggingface": name})


def _conv(path: str, name: str, depthwise: bool = False) -> Row:
    """A convolution's kernel: (height, width, in, out) here and (out, in, height, width) there."""
    dims = "k k U C" if depthwise else "k k I O"
    return Row(f"{path}/kernel", dims, At(f"{name}.weight", "C U k k'" if depthwise else "O I k k'"))


_STEM = (
    _conv("stem", "conv_stem.conv"),
    Row("stem/bias", "O", At("conv_stem.conv.bias"), is_optional=True),
    norm("stem/norm", "O", "conv_stem.bn"),
)
_FUSION = (
    Row("expand/kernel", "k k I M", At("ffn.pw_exp.conv.weight", "M I k k'")),
    norm("expand_norm", "M", "ffn.pw_exp.bn"),
    Row("project/kernel", "k k M O", At("ffn.pw_proj.conv.weight", "O M k k'")),
    norm("project_norm", "O", "ffn.pw_proj.bn"),
    norm("norm", "O", "norm"),
)
_EMBEDDER = (
    Row("embedding", "S C", At("embedding.weight")),
    norm("hard_norm", "C", "hard_embedding_norm"),
    norm("soft_norm", "C", "soft_embedding_norm"),
    Row("proj/kernel", "C D", At("embedding_projection.weight", "D C")),
)


def _block_rows(block: Block, channels: int, path: str, name: str) -> Iterator[Placed]:
    """The rows of one block; `channels` come in. A kernel of 1 is a product with a matrix."""

    def rows(*rows: Row, **sizes: int) -> Iterator[Placed]:
        return _rows(rows, {"U": 1, **sizes}, path, name)

    middle = block.expansion * channels
    if block.kind == "edge":
        yield from rows(
            _conv("expand", "conv_exp"), norm("expand_norm", "O", "bn1"), k=block.kernel, I=channels, O=middle
        )
        yield from rows(_conv("project", "conv_pwl"), norm("project_norm", "O", "bn2"), k=1, I=middle, O=block.width)
        return
    if block.kind == "attention":
        yield from _attention_rows(block, channels, path, name)
    else:
        if block.start_kernel:
            start = _conv("start", "dw_start.conv", True), norm("start_norm", "C", "dw_start.bn")
            yield from rows(*start, k=block.start_kernel, C=channels)
        expand = _conv("expand", "pw_exp.conv"), norm("expand_norm", "O", "pw_exp.bn")
        yield from rows(*expand, k=1, I=channels, O=middle)
        if block.kernel:
            yield from rows(
                _conv("mid", "dw_mid.conv", True), norm("mid_norm", "C", "dw_mid.bn"), k=block.kernel, C=middle
            )
        project = _conv("project", "pw_proj.conv"), norm("project_norm", "O", "pw_proj.bn")
        yield from rows(*project, k=1, I=middle, O=block.width)
    yield from rows(Row("layer_scale", "O", At("layer_scale.gamma")), O=block.width)


def _attention_rows(block: Block, channels: int, path: str, name: str) -> Iterator[Placed]:
    """Multi-query attention over pixels: many heads of queries, one of keys and values."""

    def rows(*rows: Row, **sizes: int) -> Iterator[Placed]:
        return _rows(rows, {"U": 1, **sizes}, path, name)

    heads = block.num_heads * block.head_dim
    yield from rows(norm("norm", "C", "norm"), C=channels)
    yield from rows(_conv("query", "attn.query.proj"), k=1, I=channels, O=heads)
    for part in ("key", "value"):
        if block.key_kernel:
            down = _conv(f"{part}_down", f"attn.{part}.down_conv", True), norm(f"{part}_norm", "C", f"attn.{part}.norm")
            yield from rows(*down, k=block.key_kernel, C=channels)
        yield from rows(_conv(part, f"attn.{part}.proj"), k=1, I=channels, O=block.head_dim)
    yield from rows(_conv("output", "attn.output.proj"), k=1, I=heads, O=block.width)


_SUBSAMPLING = (
    Row("conv/kernel", "k k I O", At("conv.weight", "O I k k'")),
    norm("norm", "O", "norm"),
)
_SUBSAMPLED = (Row("sscp_proj/kernel", "B C", At("input_proj_linear.weight", "C B")),)
_CONFORMER = (
    *(
        row
        for part in ("start", "end")
        for row in (
            norm(f"ffw_{part}/pre_norm", "C", f"ffw_layer_{part}.pre_layer_norm"),
            Row(f"ffw_{part}/w1", "C E", At(f"ffw_layer_{part}.ffw_layer_1.weight", "E C")),
            Row(f"ffw_{part}/w2", "E C", At(f"ffw_layer_{part}.ffw_layer_2.weight", "C E")),
            norm(f"ffw_{part}/post_norm", "C", f"ffw_layer_{part}.post_layer_norm"),
        )
    ),
    norm("attn/pre_norm", "C", "attention.pre_attn_norm"),
    *(
        Row(f"attn/{name}/kernel", "C N H", At(f"attention.attn.{theirs}.weight", "(N H) C"))
        for name, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"),
                             ("pos", "relative_position_embedding.pos_proj"))
    ),
    Row("attn/per_dim_scale", "H", At("attention.attn.per_dim_scale")),
    Row("attn/o/kernel", "N H C", At("attention.post.weight", "C (N H)")),
    norm("attn/post_norm", "C", "attention.post_norm"),
    norm("lconv/pre_norm", "C", "lconv1d.pre_layer_norm"),
    Row("lconv/start", "C G", At("lconv1d.linear_start.weight", "G C")),
    Row("lconv/dw", "k C", At("lconv1d.depthwise_conv1d.weight", "C 1 k")),
    norm("lconv/conv_norm", "C", "lconv1d.conv_norm"),
    Row("lconv/end", "C C", At("lconv1d.linear_end.weight", "C' C")),
    norm("norm", "C", "norm"),
)  # fmt: skip
