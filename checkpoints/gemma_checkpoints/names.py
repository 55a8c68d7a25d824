"""Name tables: which tensor of a file is which weight of ours, and how it lies there. Pure data and its use.

Our names and shapes are those of the specification of weight names: kernels stand (in, out) with heads split out, norm
scales are zero-centred. Files store a kernel as the matrix [out, in].
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_checkpoints.reader import CheckpointError, Reader

SOURCES = ("gguf", "huggingface")


@dataclass(frozen=True)
class Entry:
    """One weight: `path` is our name for it, `source` the file's (for Hugging Face without the family's prefix)."""

    path: str
    source: str
    num_inputs: int | None = None  # our leading dimensions that are inputs; files have [out, in]. None: as ours
    offset: float = 0.0  # added to the stored values: GGUF stores 1 + scale
    has_spare_rows: bool = False  # the file may have more rows than we: padding of the vocabulary

    def source_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The stored shape of a weight that has `shape` here."""
        if self.num_inputs is None:
            return tuple(shape)
        return int(np.prod(shape[self.num_inputs :])), int(np.prod(shape[: self.num_inputs]))

    def source_view(self, ours: np.ndarray) -> np.ndarray:
        """An array of ours seen as the file stores it; writing to the view writes to the array."""
        return ours if self.num_inputs is None else ours.reshape(self.source_shape(ours.shape)[::-1]).T

    def stored(self, ours: np.ndarray) -> np.ndarray:
        """What the file holds for an array of ours."""
        source = self.source_view(ours)
        return source.astype(np.float32) - np.float32(self.offset) if self.offset else source


# ours: (GGUF, Hugging Face, leading input dimensions; None is a norm)
_LAYER: Mapping[str, tuple[str, str, int | None]] = {
    "pre_attention_norm/scale": ("attn_norm", "input_layernorm", None),
    "attn/q/kernel": ("attn_q", "self_attn.q_proj", 1),
    "attn/k/kernel": ("attn_k", "self_attn.k_proj", 1),
    "attn/v/kernel": ("attn_v", "self_attn.v_proj", 1),
    "attn/o/kernel": ("attn_output", "self_attn.o_proj", 2),
    "pre_ffw_norm/scale": ("ffn_norm", "pre_feedforward_layernorm", None),
    "mlp/gate/kernel": ("ffn_gate", "mlp.gate_proj", 1),
    "mlp/up/kernel": ("ffn_up", "mlp.up_proj", 1),
    "mlp/down/kernel": ("ffn_down", "mlp.down_proj", 1),
}
_QK_NORM = {
    "attn/q_norm/scale": ("attn_q_norm", "self_attn.q_norm", None),
    "attn/k_norm/scale": ("attn_k_norm", "self_attn.k_norm", None),
}
_POST_NORMS = {
    "post_attention_norm/scale": ("post_attention_norm", "post_attention_layernorm", None),
    "post_ffw_norm/scale": ("post_ffw_norm", "post_feedforward_layernorm", None),
}
# Gemma 1 has no norms after its blocks, and in Hugging Face's names the one before the ffw comes "after attention".
_GEMMA1 = {"pre_ffw_norm/scale": ("ffn_norm", "post_attention_layernorm", None)}

_TOWERS = r"(vision_tower|multi_modal_projector)\..*"
# Tensors that may be in a file and are not read: by Hugging Face's name without prefix, and why.
_IGNORED = {
    "huggingface": (
        (_TOWERS, "the text part is read"),
        (r".*\.position_ids|.*rotary_emb\.inv_freq|.*\.embed_scale", "computed from the config"),
    ),
    "gguf": ((r"rope_freqs\.weight", "computed from the config"),),
}
_TIED_HEAD = (r"lm_head\.weight", "the head is the embedding table")


@dataclass(frozen=True)
class Table:
    """The weights of one model in one kind of file."""

    source: str
    entries: tuple[Entry, ...]
    ignored: tuple[tuple[str, str], ...]  # pattern and reason

    def normalised(self, name: str) -> str:
        """The name without what varies between a family's files."""
        return huggingface_name(name) if self.source == "huggingface" else name

    def written(self, entry: Entry) -> str:
        """The full name under which an entry is written: for Hugging Face in the style of text models."""
        has_prefix = self.source == "huggingface" and not entry.source.startswith("lm_head.")
        return f"model.{entry.source}" if has_prefix else entry.source

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern, _ in self.ignored)

    def left_out(self, reader: Reader) -> list[str]:
        """The tensors of a file that are weights and that no entry reads: the vision tower of a multimodal model."""
        is_tower = re.compile(_TOWERS).fullmatch
        return [name for name in reader.tensors if is_tower(self.normalised(name))]


def decoder(
    source: str, num_layers: int, *, has_qk_norm: bool = True, has_post_norms: bool = True, has_tied_head: bool = True
) -> Table:
    """The table of a Gemma 1, 2 or 3 decoder. `source` is "gguf" or "huggingface"."""
    column = SOURCES.index(source)
    layer = {**_LAYER, **(_QK_NORM if has_qk_norm else {}), **(_POST_NORMS if has_post_norms else _GEMMA1)}
    scale_offset = -1.0 if source == "gguf" else 0.0
    embedding, norm, head, prefix = (
        ("token_embd", "output_norm", "output", "blk"),
        ("embed_tokens", "norm", "lm_head", "layers"),
    )[column]
    entries = [Entry("embedder/embedding", f"{embedding}.weight", has_spare_rows=True)]
    for i in range(num_layers):
        for path, names in layer.items():
            num_inputs = names[2]
            offset = scale_offset if num_inputs is None else 0.0
            entries.append(Entry(f"layers_{i}/{path}", f"{prefix}.{i}.{names[column]}.weight", num_inputs, offset))
    entries.append(Entry("final_norm/scale", f"{norm}.weight", offset=scale_offset))
    if not has_tied_head:
        entries.append(Entry("head/embedding", f"{head}.weight", has_spare_rows=True))
    ignored = _IGNORED[source] + ((_TIED_HEAD,) if has_tied_head and source == "huggingface" else ())
    return Table(source, tuple(entries), ignored)


def huggingface_name(name: str) -> str:
    """A tensor's name without the prefixes that differ between releases (specification of weight names, section 3)."""
    while name.startswith("model."):
        name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.(model\.|(?=lm_head))", lambda m: "language_model." if m[1] else "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    return name.removeprefix("language_model.")


def stream(
    reader: Reader,
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    destination: Callable[[str], np.ndarray],
) -> Iterator[str]:
    """Reads every weight of a table straight into `destination(path)`, tensor by tensor in the order of the files.

    Args:
        shapes: the shape of each weight by our path.
        destination: gives the array to fill, of this shape and any dtype; of a kernel all but the
            first dimension must be C-contiguous.

    Yields: the path of each weight once it is filled.
    Raises: CheckpointError before anything is read that lists all tensors that are missing, unknown or of another
        shape, naming the file.
    """
    names = _matched(reader, table, shapes)
    infos = {entry: reader.tensors[names[entry.source]] for entry in table.entries}
    for entry in sorted(infos, key=lambda entry: (infos[entry].file, infos[entry].offset)):
        target = entry.source_view(destination(entry.path))
        if entry.offset:
            target[...] = reader.read(names[entry.source]) + np.float32(entry.offset)
        else:
            reader.read(names[entry.source], out=target)
        yield entry.path


def _matched(reader: Reader, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """From the source name of each entry to the full name in the file."""
    problems: list[str] = []
    names: dict[str, str] = {}
    wanted = {entry.source for entry in table.entries}
    for name in reader.tensors:
        short = table.normalised(name)
        if short in names:
            problems.append(f"{names[short]!r} and {name!r} are the same weight")
        elif short in wanted:
            names[short] = name
        elif not table.is_ignored(short):
            problems.append(f"{name!r} is unknown")
    for entry in table.entries:
        if entry.source not in names:
            problems.append(f"{entry.source!r} is missing")
            continue
        stored, ours = reader.tensors[names[entry.source]].shape, entry.source_shape(shapes[entry.path])
        has_room = entry.has_spare_rows and stored[1:] == ours[1:] and stored[:1] >= ours[:1]
        if stored != ours and not has_room:
            problems.append(f"{names[entry.source]!r} has shape {list(stored)}, but the config says {list(ours)}")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(f"the tensors of {reader.path} do not fit its config:\n  " + "\n  ".join(shown))
    return names
