"""What a folder of sentence-transformers says beside config.json: how EmbeddingGemma makes one vector of a text."""

import json
from collections.abc import Mapping
from typing import Any

from gemma_jax.configs.config import ConfigError, DecoderConfig

KEY = "sentence_transformers"  # of a reader's metadata: modules.json, each with its own config.json
_TYPE = "sentence_transformers.models."


def dense_widths(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Output widths of the dense layers after the pooling; none in a folder without modules.

    Raises ConfigError for modules that EmbeddingGemma has not: another pooling than the mean, biases, activations.
    """
    widths = []
    for module in metadata.get(KEY, ()):
        path, kind, values = module["path"], str(module["type"]).removeprefix(_TYPE), module["config"]
        if kind == "Pooling" and not values.get("pooling_mode_mean_tokens"):
            raise ConfigError(f"{path} does not pool by the mean of the tokens; EmbeddingGemma does")
        if kind != "Dense":
            continue
        if path != f"{len(widths) + 2}_Dense":
            raise ConfigError(f"dense layer {len(widths)} is in {path!r}; wanted {len(widths) + 2}_Dense")
        if values.get("bias") or "Identity" not in str(values.get("activation_function", "Identity")):
            raise ConfigError(f"{path} has a bias or an activation; EmbeddingGemma's dense layers have neither")
        width = values.get("out_features")
        if type(width) is not int or width < 1:
            raise ConfigError(f"{path} has out_features {width!r}; wanted a positive whole number")
        widths.append(width)
    return tuple(widths)


def to_modules(config: DecoderConfig) -> list[dict[str, Any]]:
    """The modules of a folder, each with its config, as a reader's metadata has them."""
    pooling = {
        "word_embedding_dimension": config.width,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "include_prompt": True,
    }
    modules = [_module("", "Transformer", {}), _module("1_Pooling", "Pooling", pooling)]
    width = config.width
    for i, out in enumerate(config.dense_widths):
        dense = {"in_features": width, "out_features": out, "bias": False}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"
        modules.append(_module(f"{i + 2}_Dense", "Dense", dense))
        width = out
    return [*modules, _module(f"{len(modules)}_Normalize", "Normalize", {})]


def to_files(config: DecoderConfig) -> dict[str, bytes]:
    """modules.json and the modules' own configs, by file name."""
    modules = to_modules(config)
    listing = [
        {"idx": i, "name": str(i), "path": module["path"], "type": module["type"]} for i, module in enumerate(modules)
    ]
    files = {"modules.json": listing} | {
        f"{module['path']}/config.json": module["config"] for module in modules if module["config"]
    }
    return {name: (json.dumps(data, indent=2) + "\n").encode() for name, data in files.items()}


def _module(path: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"path": path, "type": _TYPE + kind, "config": config}
