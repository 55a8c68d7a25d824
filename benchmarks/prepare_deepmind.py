"""In DeepMind's environment: python -m benchmarks.prepare_deepmind HUGGINGFACE_FOLDER TARGET_FOLDER."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def nested(weights: Mapping[str, np.ndarray], num_heads: int, num_kv_heads: int, num_layers: int) -> dict[str, Any]:
    """The library's parameters from transformers' names: q [N, D, H], kv [2, K, D, H], o [N, H, D], ffw [2, F, D]."""

    def scale(name: str) -> dict[str, np.ndarray]:
        return {"scale": weights[f"model.{name}.weight"]}

    def heads(name: str, count: int) -> np.ndarray:
        weight = weights[f"model.{name}.weight"]  # [count * H, D]
        return weight.reshape(count, -1, weight.shape[1]).swapaxes(1, 2)

    def layer(at: str) -> dict[str, Any]:
        attention, ffw = f"{at}.self_attn", f"{at}.mlp"
        keys_values = [heads(f"{attention}.{name}_proj", num_kv_heads) for name in "kv"]
        output = weights[f"model.{attention}.o_proj.weight"]
        gate_up = [weights[f"model.{ffw}.{name}_proj.weight"] for name in ("gate", "up")]
        return {
            "pre_attention_norm": scale(f"{at}.input_layernorm"),
            "attn": {
                "q_einsum": {"w": heads(f"{attention}.q_proj", num_heads)},
                "kv_einsum": {"w": np.stack(keys_values)},
                "attn_vec_einsum": {"w": output.T.reshape(num_heads, -1, output.shape[0])},
                "_query_norm": scale(f"{attention}.q_norm"),
                "_key_norm": scale(f"{attention}.k_norm"),
            },
            "post_attention_norm": scale(f"{at}.post_attention_layernorm"),
            "pre_ffw_norm": scale(f"{at}.pre_feedforward_layernorm"),
            "mlp": {"gating_einsum": np.stack(gate_up), "linear": weights[f"model.{ffw}.down_proj.weight"].T},
            "post_ffw_norm": scale(f"{at}.post_feedforward_layernorm"),
        }

    tree = {f"layer_{i}": layer(f"layers.{i}") for i in range(num_layers)}
    embedding = {"input_embedding": weights["model.embed_tokens.weight"]}
    return {**tree, "embedder": embedding, "final_norm": scale("norm")}


def main() -> None:
    import jax
    import jax.numpy as jnp
    from gemma import gm
    from safetensors.numpy import load_file

    source, target = (Path(argument) for argument in sys.argv[1:])
    config = gm.nn.Gemma3_270M.config
    tree = nested(load_file(source / "model.safetensors"), config.num_heads, config.num_kv_heads, config.num_layers)
    shutil.rmtree(target, ignore_errors=True)
    gm.ckpts.save_params(jax.tree.map(jnp.asarray, tree), target, wait_until_finished=True)


if __name__ == "__main__":
    main()
