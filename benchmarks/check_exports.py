"""Do other libraries read what we write? The real 270M, exported to each format, run by the library of that format.

    python -m benchmarks.check_exports [--output FOLDER]

Each library runs in its own environment (`setup_peers.sh`): DeepMind's gemma on our DeepMind checkpoint, llama.cpp on
our GGUF in float32, with a float32 cache. Compared with us: logits after each prompt, and greedy tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.protocol import ROOT
from benchmarks.registry import DEFAULT_WORK, chosen, python_of

ABOUT = "Do other libraries read what we write? The real 270M, exported and run by them."
MODEL = "gemma-3-270m"
NEW_TOKENS = 24
PROMPTS = (
    "The capital of Japan is",
    "def fibonacci(n):\n    ",
    "Die Donau fließt durch",
    "Once upon a time there was a",
    "1, 1, 2, 3, 5, 8,",
)
# Sums in another order; llama.cpp looks its GELU up in a table of float16.
LOGIT_BOUND = {"deepmind": 2e-4, "llama_cpp_f32": 5e-2}
EXPORTS = {"deepmind": "deepmind", "llama_cpp_f32": "gguf"}


def deepmind(model: str, prompts: list[list[int]]) -> tuple[list[np.ndarray], list[list[int]]]:
    """In DeepMind's environment: last logits and greedy tokens, every token by a whole forward."""
    import jax
    import jax.numpy as jnp
    from gemma import gm

    network = gm.nn.Gemma3_270M(dtype=jnp.float32)
    params = gm.ckpts.load_params(model)
    length = max(map(len, prompts)) + NEW_TOKENS

    @jax.jit
    def forward(params: Any, tokens: Any, count: Any) -> Any:
        return network.apply({"params": params}, tokens).logits[0, count - 1]

    firsts, answers = [], []
    for prompt in prompts:
        tokens = list(prompt)
        for step in range(NEW_TOKENS):
            row = jnp.asarray([tokens + [0] * (length - len(tokens))])
            logits = np.asarray(forward(params, row, len(tokens)))
            if step == 0:
                firsts.append(logits)
            tokens.append(int(logits.argmax()))
        answers.append(tokens[len(prompt) :])
    return firsts, answers


def llama_cpp(model: str, prompts: list[list[int]]) -> tuple[list[np.ndarray], list[list[int]]]:
    """In llama.cpp's environment."""
    import llama_cpp as library

    library.llama_backend_init()
    weights = library.llama_model_load_from_file(model.encode(), library.llama_model_default_params())
    if not weights:
        raise RuntimeError(f"llama.cpp cannot load {model}")
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(weights))
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.type_k = params.type_v = library.GGML_TYPE_F32
    params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = library.llama_init_from_model(weights, params)
    firsts, answers = [], []
    for prompt in prompts:
        library.llama_memory_clear(library.llama_get_memory(context), True)
        part, answer = list(prompt), []
        for step in range(NEW_TOKENS):
            array = (library.llama_token * len(part))(*part)
            if library.llama_decode(context, library.llama_batch_get_one(array, len(part))):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), shape=(size,)).copy()
            if step == 0:
                firsts.append(logits)
            part = [int(logits.argmax())]
            answer += part
        answers.append(answer)
    return firsts, answers


def llama_cpp_tower(model: str, prompts: list[list[int]]) -> tuple[list[np.ndarray], list[list[int]]]:
    """In llama.cpp's environment: does it take the tower beside the model? It runs it once while it starts."""
    import llama_cpp as library
    from llama_cpp import mtmd_cpp

    library.llama_backend_init()
    folder = Path(model)
    weights = library.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), library.llama_model_default_params()
    )
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu = False
    context = mtmd_cpp.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), weights, params)
    if not context or not mtmd_cpp.mtmd_support_vision(context):
        raise RuntimeError(f"llama.cpp cannot load the tower of {model}")
    return [np.zeros(1)], [[1]]


def export_with_tower(folder: Path) -> None:
    """The real 270M beside a small random vision tower of its width, as two GGUF files."""
    import gemma_checkpoints
    from gemma_checkpoints.names import Assembly, Weights
    from gemma_jax import configs, export, loading
    from gemma_jax.configs.config import VisionConfig

    tower = VisionConfig(
        num_layers=2, width=96, num_heads=4, ffw_width=160, patch_size=14, image_size=896, num_soft_tokens=256
    )
    config = configs.get(MODEL).replace("vision", tower)
    assembly, path = Assembly(export.table("gguf", config)), loading.find(MODEL)
    random = np.random.default_rng(0)
    with gemma_checkpoints.open(path) as reader:
        source = Weights(reader, loading.table_of(reader, config.decoder))
        tokenizer = loading.read_tokenizer(reader, path)
        precision = export.Precision("float32")
        with export.writer(folder, config, assembly.table, precision, tokenizer) as writer:
            for entry in assembly.table.entries:
                values = 0.02 * random.standard_normal(entry.shape, np.float32)
                if entry.path in source.entries:
                    source.read(entry.path, values)
                for name, stored in assembly.add(entry.path, values):
                    writer.put(name, stored)


def compare(name: str, folder: Path, ours: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """One library on our export of the model."""
    import gemma_jax as gj

    path = folder / name
    gj.convert(MODEL, path, to=EXPORTS[name], dtype="float32", progress=False)
    (entry,) = chosen(name)
    task = json.dumps({"model": str(path), "prompts": prompts, "output": str(folder / f"{name}.npz")})
    command = [str(python_of(entry)), "-m", "benchmarks.check_exports", "--run", entry.module, "--task", task]
    subprocess.run(command, check=True, cwd=ROOT)
    with np.load(folder / f"{name}.npz") as theirs:
        row = {
            "logit_difference": float(np.abs(theirs["logits"] - ours["logits"]).max()),
            "bound": LOGIT_BOUND[name],
            "same_tokens": int((theirs["tokens"] == ours["tokens"]).sum()),
            "tokens": int(ours["tokens"].size),
            "same_texts": int((theirs["tokens"] == ours["tokens"]).all(axis=1).sum()),
            "texts": len(prompts),
        }
        own = DEFAULT_WORK / entry.model  # made by the library's own writer, see `prepare`
        if own.exists():
            task = json.dumps({"model": str(own), "prompts": prompts, "output": str(folder / "own.npz")})
            subprocess.run([*command[:-1], task], check=True, cwd=ROOT)
            with np.load(folder / "own.npz") as reference:
                row["equals_its_own_file"] = all((theirs[key] == reference[key]).all() for key in ("logits", "tokens"))
    return row


RUNS = {"deepmind": deepmind, "llama_cpp": llama_cpp, "llama_cpp_tower": llama_cpp_tower}


def tower_loads(folder: Path) -> bool:
    """Whether llama.cpp takes our two files of a model that sees."""
    export_with_tower(folder / "tower")
    (entry,) = chosen("llama_cpp_f32")
    task = json.dumps({"model": str(folder / "tower"), "prompts": [], "output": str(folder / "tower.npz")})
    command = [str(python_of(entry)), "-m", "benchmarks.check_exports", "--run", "llama_cpp_tower", "--task", task]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.check_exports", description=ABOUT)
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for the JSON")
    command.add_argument("--peers", default="deepmind,llama_cpp_f32")
    command.add_argument("--run", help=argparse.SUPPRESS)  # how a library's own process is started
    command.add_argument("--task", help=argparse.SUPPRESS)
    arguments = command.parse_args()
    if arguments.run:
        task = json.loads(arguments.task)
        logits, tokens = RUNS[arguments.run](task["model"], task["prompts"])
        np.savez(task["output"], logits=np.stack(logits), tokens=np.array(tokens))
        return 0
    import gemma_jax as gj

    gemma = gj.load(MODEL, progress=False)
    assert gemma.tokenizer is not None
    prompts = [gemma.tokenizer.encode(text, bos=True) for text in PROMPTS]
    done = gemma.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    ours = {
        "logits": np.stack([np.asarray(gemma.logits([prompt]))[0, -1] for prompt in prompts]),
        "tokens": np.array([one.tokens for one in done]),
    }
    DEFAULT_WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DEFAULT_WORK, prefix="exports-") as folder:
        results = {name: compare(name, Path(folder), ours, prompts) for name in arguments.peers.split(",")}
        is_tower_taken = "llama_cpp_f32" not in results or tower_loads(Path(folder))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "exports.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results.items():
        print(f"{name}: logits differ by {row['logit_difference']:.2g} (bound {row['bound']:g})")
        print(f"  greedy: {row['same_tokens']} of {row['tokens']} tokens, {row['same_texts']} of {row['texts']} texts")
        if "equals_its_own_file" in row:
            print(f"  bit for bit as with a file of its own: {row['equals_its_own_file']}")
    print(f"llama.cpp takes a model and its tower: {is_tower_taken}")
    good = is_tower_taken and all(
        row["logit_difference"] <= row["bound"] and row.get("equals_its_own_file", True) for row in results.values()
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
