"""Hugging Face transformers on torch, float32: the bare forward loop with its cache, without `generate`'s overhead."""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers


class Peer:
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def load(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], new_tokens: int) -> Any:
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def decode(self, state: Any, new_tokens: int) -> list[list[int]]:
        cache, token = state
        drawn = [token]
        for _ in range(new_tokens):
            out = self.model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            drawn.append(token)
        return torch.cat(drawn, dim=1).tolist()
