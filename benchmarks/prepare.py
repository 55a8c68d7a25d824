"""Makes, from one GGUF, the same weights in every peer's format: python -m benchmarks.prepare [--gguf FILE].

Needs the packages gguf and safetensors (the `parity` extra has them). In the work folder it leaves

    demo.gguf        the file itself (a link): ourselves, llama.cpp as it is
    demo-f32.gguf    every tensor dequantised to float32: llama.cpp F32
    demo-q8_0.gguf, demo-q4_0.gguf, demo-bf16.gguf    encoded anew: stored weights, and llama.cpp's
    huggingface/     config.json and model.safetensors, float32: transformers, and the source for
    deepmind/        an Orbax checkpoint in the library's own layout; made by prepare_deepmind.py in that environment

About 5 GB of disk. The gguf library takes some 20 seconds just to open the file.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.protocol import ROOT
from benchmarks.registry import DEFAULT_WORK, chosen, python_of

ABOUT = "Makes, from one GGUF, the same weights in every peer's format."

STORED: dict[str, dict[str, str]] = {  # GGUF files by name: how `gemma_jax.convert` stores matrices
    "demo-q8_0.gguf": {"quantize": "q8_0"},
    "demo-q4_0.gguf": {"quantize": "q4_0"},
    "demo-bf16.gguf": {"dtype": "bfloat16"},
}
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def huggingface_name(name: str) -> str:
    """The transformers name of a GGUF tensor, as "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name in OUTER:
        return OUTER[name]
    block, layer, part, kind = name.split(".")
    if block != "blk" or kind != "weight" or part not in HF_NAMES:
        raise ValueError(f"{name} is no tensor of a Gemma 3 text model")
    return f"model.layers.{layer}.{HF_NAMES[part]}.weight"


def huggingface_weight(name: str, weight: np.ndarray) -> np.ndarray:
    """GGUF stores norm scales with 1 added; transformers adds it when it runs."""
    return weight - np.float32(1) if "norm" in name else weight


def huggingface_config(fields: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """config.json of a Gemma 3 text model from GGUF metadata."""
    values = {key.removeprefix("gemma3."): value for key, value in fields.items() if key.startswith("gemma3.")}
    num_layers = int(values["block_count"])
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": vocab_size,
        "hidden_size": int(values["embedding_length"]),
        "intermediate_size": int(values["feed_forward_length"]),
        "num_hidden_layers": num_layers,
        "num_attention_heads": int(values["attention.head_count"]),
        "num_key_value_heads": int(values["attention.head_count_kv"]),
        "head_dim": int(values["attention.key_length"]),
        "query_pre_attn_scalar": int(values["attention.key_length"]),
        "max_position_embeddings": int(values["context_length"]),
        "sliding_window": int(values["attention.sliding_window"]),
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(num_layers)],
        "rms_norm_eps": float(values["attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(values["rope.freq_base"]),
        "rope_local_base_freq": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def float32_tensors(reader: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a gguf.GGUFReader, dequantised, one at a time."""
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        yield tensor.name, np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)


def write_huggingface(reader: Any, folder: Path) -> None:
    """config.json and model.safetensors; token ids are all the benchmark needs, so no tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {huggingface_name(name): huggingface_weight(name, w) for name, w in float32_tensors(reader)}
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("gemma3.")}
    config = huggingface_config(fields, weights["model.embed_tokens.weight"].shape[0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_gguf(reader: Any, path: Path) -> None:
    """The same file with float32 tensors; metadata copied field by field."""
    import gguf

    writer = gguf.GGUFWriter(path, arch=reader.fields["general.architecture"].contents())
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"}
    for key, field in reader.fields.items():
        if key in own:
            continue
        value = int(gguf.LlamaFileType.ALL_F32) if key == "general.file_type" else field.contents()
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], inner)
    for name, weight in float32_tensors(reader):
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def demo_gguf() -> Path:
    """The file of the `demo` extra."""
    from gemma_jax.loading import find

    return find("gemma-3-270m")


def write_stored(source: Path, work: Path) -> None:
    """What `stored` measures: the same weights in the encodings that our exporter writes."""
    import gemma_jax

    for name, precision in STORED.items():
        (work / name).unlink(missing_ok=True)
        gemma_jax.convert(source, work / name, to="gguf", progress=False, **precision)


def write_deepmind(work: Path) -> str | None:
    """Runs prepare_deepmind.py in the peer's environment. Returns why it could not."""
    python = python_of(chosen("deepmind")[0])
    if not python.exists():
        return "there is no environment for it: run benchmarks/setup_peers.sh deepmind"
    source, target = (work / name for name in ("huggingface", "deepmind"))
    command = [str(python), "-m", "benchmarks.prepare_deepmind", str(source.resolve()), str(target.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr[-600:] if done.returncode else None


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=ABOUT)
    command.add_argument("--gguf", type=Path, help="the weights (default: those of the demo extra)")
    command.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder to fill")
    arguments = command.parse_args()
    import gguf

    source, work = arguments.gguf or demo_gguf(), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    link = work / "demo.gguf"
    link.unlink(missing_ok=True)
    link.symlink_to(source.resolve())
    print(f"opening {source}")
    reader = gguf.GGUFReader(source)
    print("writing huggingface/")
    write_huggingface(reader, work / "huggingface")
    print("writing demo-f32.gguf")
    write_gguf(reader, work / "demo-f32.gguf")
    print(f"writing {', '.join(STORED)}")
    write_stored(source, work)
    problem = write_deepmind(work)
    print(f"deepmind/ left out: {problem}" if problem else "wrote deepmind/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
