"""Gemma 3's tower and projector in Hugging Face transformers on torch, float32, with its own choice of attention."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

from benchmarks.worker import peak_bytes, timed


class Peer:
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def load(self, model: str, threads: int) -> float:
        torch.set_num_threads(threads)
        kind = transformers.Gemma3ForConditionalGeneration

        def load() -> None:
            self.model = kind.from_pretrained(model, dtype=torch.float32).eval().model

        return timed(load)[1]["seconds"]

    @torch.inference_mode()
    def see(self, values: str, output: str) -> float:
        """As the other peer's; its images have their channels first, turned before the clock runs."""
        images = torch.from_numpy(np.ascontiguousarray(np.load(values).transpose(0, 3, 1, 2)))
        found, took = timed(lambda: self.model.get_image_features(images).pooler_output.numpy())
        np.save(output, found)
        return took["seconds"]

    def peak(self) -> int:
        return peak_bytes()
