"""Ourselves, as a user has us: `gj.load`, then the engine behind `Gemma.generate`."""

from importlib.metadata import version
from typing import Any

import jax

import gemma_jax as gj
from gemma_jax.generate.engine import Session
from gemma_jax.generate.sampling import SamplingParams


class Peer:
    dtype = "float32"

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}

    def load(self, model: str, threads: int) -> None:
        """`threads` is heeded by XLA through the process's CPU affinity."""
        self.gemma = gj.load(model, dtype=self.dtype, progress=False)
        jax.block_until_ready(self.gemma.model)

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> Any:
        params = [SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)] * len(prompts)
        steps = iter(Session(self.gemma.model, prompts, params, ()))
        return steps, [list(step.tokens) for step in next(steps)]

    def decode(self, state: Any, new_tokens: int) -> list[list[int]]:
        """To the end of the session: it was told at the prefill how many tokens are wanted."""
        steps, rows = state
        for chunk in steps:
            for row, step in zip(rows, chunk, strict=True):
                row += step.tokens
        return rows
