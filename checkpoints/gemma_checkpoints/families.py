"""The name tables: where every format keeps every weight of every family. Pure data (specification of weight names).

Letters: V rows of the vocabulary, D width, N query heads, K key/value heads, H width of a head, F ffw width, L layers;
in SigLIP C is its width, E its ffw width, P the side of a patch. What Gemma 3n adds stands in `gemma3n`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gemma_checkpoints import gemma3n
from gemma_checkpoints.gemma3n import ConformerSizes, MobileNetSizes
from gemma_checkpoints.names import Table
from gemma_checkpoints.reader import Reader
from gemma_checkpoints.rows import At, Placed, Row, norm

STYLES = ("text", "bare", "A", "B", "C")  # of prefixes in Hugging Face's files

_EMBEDDER = Row(
    "embedder/embedding", "V D", At("embed_tokens.weight"), At("embedder/input_embedding"), At("token_embd.weight")
)
_FINAL_NORM = Row("final_norm/scale", "D", At("norm.weight"), At("final_norm/scale"), At("output_norm.weight"))
_HEAD = Row("head/embedding", "V D", At("lm_head.weight"), None, At("output.weight"))


_LAYER = (
    norm("pre_attention_norm", "D", "input_layernorm", "pre_attention_norm", "attn_norm"),
    Row("attn/q/kernel", "D N H", At("self_attn.q_proj.weight", "(N H) D"), At("attn/q_einsum/w", "N D H"),
        At("attn_q.weight", "(N H) D")),
    Row("attn/k/kernel", "D K H", At("self_attn.k_proj.weight", "(K H) D"), At("attn/kv_einsum/w", "K D H", (0, 2)),
        At("attn_k.weight", "(K H) D")),
    Row("attn/v/kernel", "D K H", At("self_attn.v_proj.weight", "(K H) D"), At("attn/kv_einsum/w", "K D H", (1, 2)),
        At("attn_v.weight", "(K H) D")),
    Row("attn/o/kernel", "N H D", At("self_attn.o_proj.weight", "D (N H)"), At("attn/attn_vec_einsum/w"),
        At("attn_output.weight", "D (N H)")),
    Row("mlp/gate/kernel", "D F", At("mlp.gate_proj.weight", "F D"), At("mlp/gating_einsum", "F D", (0, 2)),
        At("ffn_gate.weight", "F D")),
    Row("mlp/up/kernel", "D F", At("mlp.up_proj.weight", "F D"), At("mlp/gating_einsum", "F D", (1, 2)),
        At("ffn_up.weight", "F D")),
    Row("mlp/down/kernel", "F D", At("mlp.down_proj.weight", "D F"), At("mlp/linear"), At("ffn_down.weight", "D F")),
)  # fmt: skip
_QK_NORM = (
    norm("attn/q_norm", "H", "self_attn.q_norm", "attn/_query_norm", "attn_q_norm"),
    norm("attn/k_norm", "H", "self_attn.k_norm", "attn/_key_norm", "attn_k_norm"),
)
_POST_NORMS = (
    norm("pre_ffw_norm", "D", "pre_feedforward_layernorm", "pre_ffw_norm", "ffn_norm"),
    norm("post_attention_norm", "D", "post_attention_layernorm", "post_attention_norm", "post_attention_norm"),
    norm("post_ffw_norm", "D", "post_feedforward_layernorm", "post_ffw_norm", "post_ffw_norm"),
)
# Gemma 1 has no norms after its blocks, and in Hugging Face's names the one before the ffw comes "after attention".
_NO_POST_NORMS = (norm("pre_ffw_norm", "D", "post_attention_layernorm", "pre_ffw_norm", "ffn_norm"),)

_KEYS = {"q": "query", "k": "key", "v": "value"}
_TOWER_LAYER = (
    *(
        Row(f"ln{n}/{ours}", "C", At(f"layer_norm{n}.{theirs}"), At(f"LayerNorm_{n - 1}/{ours}"), At(f"ln{n}.{theirs}"))
        for n in (1, 2)
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        row
        for name, theirs in _KEYS.items()
        for row in (
            Row(f"attn/{name}/kernel", "C N H", At(f"self_attn.{name}_proj.weight", "(N H) C"),
                At(f"MultiHeadDotProductAttention_0/{theirs}/kernel"), At(f"attn_{name}.weight", "(N H) C")),
            Row(f"attn/{name}/bias", "N H", At(f"self_attn.{name}_proj.bias", "(N H)"),
                At(f"MultiHeadDotProductAttention_0/{theirs}/bias"), At(f"attn_{name}.bias", "(N H)")),
        )
    ),
    Row("attn/o/kernel", "N H C", At("self_attn.out_proj.weight", "C (N H)"),
        At("MultiHeadDotProductAttention_0/out/kernel"), At("attn_out.weight", "C (N H)")),
    Row("attn/o/bias", "C", At("self_attn.out_proj.bias"), At("MultiHeadDotProductAttention_0/out/bias"),
        At("attn_out.bias")),
    Row("mlp/fc1/kernel", "C E", At("mlp.fc1.weight", "E C"), At("MlpBlock_0/Dense_0/kernel"),
        At("ffn_up.weight", "E C")),
    Row("mlp/fc1/bias", "E", At("mlp.fc1.bias"), At("MlpBlock_0/Dense_0/bias"), At("ffn_up.bias")),
    Row("mlp/fc2/kernel", "E C", At("mlp.fc2.weight", "C E"), At("MlpBlock_0/Dense_1/kernel"),
        At("ffn_down.weight", "C E")),
    Row("mlp/fc2/bias", "C", At("mlp.fc2.bias"), At("MlpBlock_0/Dense_1/bias"), At("ffn_down.bias")),
)  # fmt: skip
_SIGLIP = "vision_encoder/siglip_encoder"
_TOWER = (
    Row("vision/patch/kernel", "P P 3 C", At("vision_tower.embeddings.patch_embedding.weight", "C 3 P P'"),
        At(f"{_SIGLIP}/embedding/kernel"), At("v.patch_embd.weight", "C 3 P P'")),
    Row("vision/patch/bias", "C", At("vision_tower.embeddings.patch_embedding.bias"), At(f"{_SIGLIP}/embedding/bias"),
        At("v.patch_embd.bias")),
    Row("vision/pos_embedding", "patches C", At("vision_tower.embeddings.position_embedding.weight"),
        At(f"{_SIGLIP}/pos_embedding", "1 patches C"), At("v.position_embd.weight")),
    Row("vision/final_ln/scale", "C", At("vision_tower.post_layernorm.weight"),
        At(f"{_SIGLIP}/Transformer/encoder_norm/scale"), At("v.post_ln.weight")),
    Row("vision/final_ln/bias", "C", At("vision_tower.post_layernorm.bias"),
        At(f"{_SIGLIP}/Transformer/encoder_norm/bias"), At("v.post_ln.bias")),
    Row("mm/soft_norm/scale", "C", At("multi_modal_projector.mm_soft_emb_norm.weight"),
        At("embedder/mm_soft_embedding_norm/scale"), At("mm.soft_emb_norm.weight")),
    Row("mm/proj/kernel", "C D", At("multi_modal_projector.mm_input_projection_weight"),
        At("embedder/mm_input_projection/w"), At("mm.input_projection.weight")),
)  # fmt: skip

_VISION_NAMES = (
    r"(vision_tower|multi_modal_projector|embed_vision|v|mm)\..*|(vision|vision_encoder|mm)/.*|embedder/mm_.*"
)
_AUDIO_NAMES = r"(audio_tower|embed_audio)\..*|(audio|audio_mm)/.*"
# Tensors that may be in a file and are not read, and why; names without prefixes.
_COMPUTED = (
    (r".*\.position_ids|.*rotary_emb\.inv_freq|.*\.embed_scale", "computed from the config"),
    (r"rope_freqs\.weight", "computed from the config"),
)
_TIED_HEAD = (r"lm_head\.weight", "the head is the embedding table")
_DENSE = (r"\d_Dense/linear\.weight|dense_\d(\.weight|/kernel)", "the decoder is read")
_UNUSED = (
    (r"vision_tower\.head\..*", "Gemma 3 takes every patch's vector, not SigLIP's pooled one"),
    (r"embedder/mm_(output_embedding|input_embedding_extra).*", "no Gemma 3 uses it"),
    (r"(opt_state|collections)/.*|step", "the state of a training run"),
)


@dataclass(frozen=True)
class DecoderSizes:
    """What a table needs to know of a decoder. The fields after `dense_widths` are Gemma 3n's."""

    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffw_widths: tuple[int, ...]  # one a layer
    has_qk_norm: bool = True
    has_post_norms: bool = True
    has_tied_head: bool = True
    dense_widths: tuple[int, ...] = ()  # of the layers behind EmbeddingGemma's pooling
    has_zero_centred_norms: bool = True
    num_streams: int | None = None  # of AltUp
    has_corrected_scale: bool = True  # in AltUp
    laurel_rank: int | None = None
    per_layer_table: tuple[int, int] | None = None  # its rows, and its width per layer
    sharing_layers: frozenset[int] = frozenset()  # those that read another's keys and values
    num_spare_rows: int = 0  # of the table of tokens in Hugging Face's files


@dataclass(frozen=True)
class SiglipSizes:
    """What a table needs to know of Gemma 3's vision tower."""

    num_layers: int
    width: int
    num_heads: int
    ffw_width: int
    patch_size: int
    num_patches: int


class NoPlaceError(ValueError):
    """A format has no word for a weight."""


def gemma(
    format: str,
    sizes: DecoderSizes,
    vision: SiglipSizes | MobileNetSizes | None = None,
    audio: ConformerSizes | None = None,
    style: str | None = None,
) -> Table:
    """The table of a Gemma 1, 2, 3 or 3n, of one with its towers, or of EmbeddingGemma.

    Args:
        format: one of `FORMATS`.
        vision, audio: the towers; None for a text model, and for the text part alone: those in a file are ignored then.
        style: of prefixes when Hugging Face's names are written, one of `STYLES`. None: as the releases do it.

    Raises: NoPlaceError for a weight that the format does not have; ValueError for another style.
    """
    placed = [*_decoder_rows(sizes)]
    if vision is not None:
        rows_of = gemma3n.vision_rows if isinstance(vision, MobileNetSizes) else _tower_rows
        placed += rows_of(vision, sizes.width)  # pyright: ignore[reportArgumentType]
    placed += gemma3n.audio_rows(audio, sizes.width) if audio else ()
    norm_offset = 1.0 if format == "gguf" and sizes.has_zero_centred_norms else 0.0
    num_spare_rows = sizes.num_spare_rows if format == "huggingface" else 0
    entries = []
    for row in placed:
        entry = row.entry(format, norm_offset, num_spare_rows)
        if entry is None:
            raise NoPlaceError(f"{format} has no place for {row.path}")
        entries.append(entry)
    is_3n = sizes.num_streams is not None or sizes.per_layer_table is not None
    usual = "bare" if sizes.dense_widths else "text" if not (vision or audio) else "B" if is_3n else "A"
    if style is not None and style not in STYLES:
        raise ValueError(f"the style of prefixes is {style!r}; wanted {', '.join(STYLES)}")
    normalised, written = {
        "huggingface": (huggingface_name, functools.partial(styled, style or usual)),
        "deepmind": (deepmind_name, str),
    }.get(format, (str, str))
    return Table(format, tuple(entries), _ignored(sizes, bool(vision), bool(audio)), normalised, written)


def _ignored(sizes: DecoderSizes, has_vision: bool, has_audio: bool) -> tuple[tuple[str, str], ...]:
    ignored = [*_COMPUTED, *_UNUSED]
    ignored += [] if has_vision else [(_VISION_NAMES, "the text part is read")]
    ignored += [] if has_audio else [(_AUDIO_NAMES, "the text part is read")]
    ignored += [_TIED_HEAD] if sizes.has_tied_head else []
    ignored += [] if sizes.dense_widths else [_DENSE]
    ignored += [gemma3n.UNUSED_SCALE] if sizes.num_streams and not sizes.has_corrected_scale else []
    if sizes.sharing_layers:
        layers = "(" + "|".join(map(str, sorted(sizes.sharing_layers))) + ")"
        ignored.append((gemma3n.UNUSED_KEYS.replace("{0}", layers), "the layer reads another's keys and values"))
    return tuple(ignored)


def _decoder_rows(sizes: DecoderSizes) -> Iterator[Placed]:
    rows, width = sizes.per_layer_table or (0, 0)
    letters = {
        "V": sizes.vocab_size,
        "D": sizes.width,
        "N": sizes.num_heads,
        "K": sizes.num_kv_heads,
        "H": sizes.head_dim,
        "A": sizes.num_streams or 0,
        "W": sizes.laurel_rank or 0,
        "R": rows,
        "P": width,
        "L": len(sizes.ffw_widths),
    }
    outer = [_EMBEDDER, _FINAL_NORM, *([] if sizes.has_tied_head else [_HEAD])]
    outer += gemma3n.PER_LAYER_TABLE if sizes.per_layer_table else ()
    outer += gemma3n.altup_projections(sizes.num_streams) if sizes.num_streams else ()
    for row in outer:
        yield Placed(row, letters)
    layer = _layer_rows(sizes)
    for i, ffw_width in enumerate(sizes.ffw_widths):
        names = {"huggingface": f"layers.{i}.", "deepmind": f"layer_{i}/", "gguf": f"blk.{i}."}
        for row in layer:
            if i not in sizes.sharing_layers or row.path not in gemma3n.OWN_KEYS:
                yield Placed(row, {**letters, "F": ffw_width}, f"layers_{i}/", names)
    width = sizes.width
    for i, out in enumerate(sizes.dense_widths):  # modules 2 and 3 of the sentence-transformers folder
        places = At(f"{i + 2}_Dense/linear.weight", "O I"), None, At(f"dense_{i + 2}.weight", "O I")
        yield Placed(Row(f"dense_{i}/kernel", "I O", *places), {"I": width, "O": out})
        width = out


def _layer_rows(sizes: DecoderSizes) -> list[Row]:
    rows = [*_LAYER, *(_POST_NORMS if sizes.has_post_norms else _NO_POST_NORMS)]
    if sizes.has_qk_norm:
        rows += _QK_NORM if sizes.has_zero_centred_norms else gemma3n.QK_NORM
    if sizes.num_streams:
        rows += [*gemma3n.ALTUP, *([gemma3n.ALTUP_SCALE] if sizes.has_corrected_scale else [])]
    rows += gemma3n.LAUREL if sizes.laurel_rank else ()
    rows += gemma3n.PER_LAYER if sizes.per_layer_table else ()
    return rows


def _tower_rows(tower: SiglipSizes, width: int) -> Iterator[Placed]:
    letters = {
        "D": width,
        "C": tower.width,
        "E": tower.ffw_width,
        "N": tower.num_heads,
        "H": tower.width // tower.num_heads,
        "P": tower.patch_size,
        "patches": tower.num_patches,
    }
    for row in _TOWER:
        yield Placed(row, letters)
    for j in range(tower.num_layers):
        names = {
            "huggingface": f"vision_tower.encoder.layers.{j}.",
            "deepmind": f"{_SIGLIP}/Transformer/encoderblock_{j}/",
            "gguf": f"v.blk.{j}.",
        }
        for row in _TOWER_LAYER:
            yield Placed(row, letters, f"vision/layers_{j}/", names)


def huggingface_name(name: str) -> str:
    """A tensor's name without the prefixes that differ between releases (specification of weight names, section 3)."""
    name = re.sub(r"^(?:model\.)+", "", name)
    name = re.sub(r"^language_model\.(model\.|(?=lm_head))", lambda m: "language_model." if m[1] else "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    return name.removeprefix("language_model.")


_ROOMS = ("vision_tower.", "multi_modal_projector.", "audio_tower.", "embed_vision.", "embed_audio.")


def styled(style: str, name: str) -> str:
    """The full name of a tensor in one style of prefixes; `huggingface_name` undoes it."""
    if "/" in name or style == "bare":  # a module of its own in a subfolder
        return name
    if style in "AB" and name.startswith("vision_tower.") and not name.startswith("vision_tower.timm_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}" if style == "A" else name
    if name.startswith(_ROOMS):
        return name if style == "A" else f"model.{name}"
    return {"text": "model.", "A": "language_model.model."}.get(style, "model.language_model.") + name


_ROOTS = ("params/", "rlx_networks/policy_network/", "transformer/")


def deepmind_name(name: str) -> str:
    """The nested name of a tensor of any of DeepMind's layouts (specification of weight names, section 6)."""
    for root in _ROOTS:
        name = name.removeprefix(root)
    name = re.sub(r"^SigLiPFromPatches_0/", "vision_encoder/", name)
    return re.sub(r"(/mlp/(?:linear|gating_einsum))/w$", r"\1", name)


_STACKED = re.compile(r"stacked_layers/attention_type_(\d+)/")


def period_of_stack(reader: Reader) -> int | None:
    """The number of attention types of a checkpoint that stacks layers by them; None if it does not."""
    found = [_STACKED.match(deepmind_name(name)) for name in reader.tensors]
    return max((int(match[1]) + 1 for match in found if match), default=None)


def stacked(table: Table, period: int) -> Table:
    """The table of DeepMind's stacked layout: layer r * period + j is row r of the tensors of attention type j."""
    layers = [re.match(r"layer_(\d+)/", entry.source) for entry in table.entries]
    num_layers = 1 + max(int(match[1]) for match in layers if match)
    entries = []
    for entry, match in zip(table.entries, layers, strict=True):
        if match:
            row, kind = divmod(int(match[1]), period)
            source = f"stacked_layers/attention_type_{kind}/{entry.source[match.end() :]}"
            count = len(range(kind, num_layers, period))
            entry = dataclasses.replace(entry, source=source, index=(row, *entry.index), stack=(count, *entry.stack))
        entries.append(entry)
    return dataclasses.replace(table, entries=tuple(entries))
