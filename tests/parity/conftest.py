"""Tiny random models of transformers, and what they compute."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    pytest.importorskip("torch").set_num_threads(1)


def _randomise(model: Any, seed: int) -> Any:
    """Weights that keep every stream and the logits of order 1; norms away from 0, so that a missing one shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if "vision" in name and weight.ndim == 1:
                weight.add_(1.0)
    return model.eval()


@pytest.fixture(scope="session")
def randomise() -> Callable[..., Any]:
    return _randomise


@pytest.fixture(scope="session")
def reference() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """(model, tokens [B, T], mask [B, T]) -> logits [B, T, V] and hidden states [L+1, B, T, D].

    Positions count real tokens; the plain forward of transformers would count padding too.
    """
    import torch

    def run(model: Any, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        with torch.no_grad():
            out = model(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask.astype(np.int64)),
                position_ids=torch.from_numpy(positions),
                output_hidden_states=True,
                use_cache=False,
            )
        return out.logits.float().numpy(), torch.stack(out.hidden_states).numpy()

    return run
