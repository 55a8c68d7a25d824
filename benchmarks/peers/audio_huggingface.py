"""Gemma 3n's conformer in Hugging Face transformers on torch, float32."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder

import gemma_checkpoints
from benchmarks.worker import peak_bytes, timed
from gemma_checkpoints.names import Weights
from gemma_jax import export
from gemma_jax.loading import read_config


class Peer:
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def load(self, model: str, threads: int) -> float:
        """The weights stand in a file of ours: transformers' whole model would ask for eyes too."""
        torch.set_num_threads(threads)

        def load() -> None:
            self.model = Gemma3nAudioEncoder(transformers.Gemma3nAudioConfig()).eval()
            with gemma_checkpoints.open(Path(model)) as reader:
                config = read_config(reader, Path(model))
                weights = Weights(reader, export.table("orbax", config))
                names = {e.path: e for e in export.table("huggingface", config).entries if e.path.startswith("audio/")}
                state = {}
                for path, entry in names.items():
                    value = np.empty(entry.shape, np.float32)
                    weights.read(path, value)
                    name = entry.source.removeprefix("audio_tower.")
                    state[name] = torch.from_numpy(np.ascontiguousarray(entry.stored(value)))
            self.model.load_state_dict(state, strict=True)

        return timed(load)[1]["seconds"]

    @torch.inference_mode()
    def hear(self, values: str, output: str) -> float:
        """As the other peer's; its masks mark padding."""
        features = torch.from_numpy(np.load(values))
        padding = torch.zeros(features.shape[:2], dtype=torch.bool)
        found, took = timed(lambda: self.model(features, padding).last_hidden_state.numpy())
        np.save(output, found)
        return took["seconds"]

    def peak(self) -> int:
        return peak_bytes()
