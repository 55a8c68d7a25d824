"""DeepMind's `gemma` library, float32: the prefill and the jitted loop of its own `gm.text.Sampler`, fed with ids.

Its cache gets exactly the length that is needed, not the sampler's default of 4096, which would cost it time.
"""

import dataclasses
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from gemma import gm
from gemma.gm.text import _prefill, _sampler_loop
from gemma.gm.utils import _types

NO_TOKEN = -1  # as the only end token: nothing ends the loop early


class Peer:
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("gemma", "kauldron", "jax", "flax")}

    def load(self, model: str, threads: int) -> None:
        """`threads` is heeded by XLA through the process's CPU affinity."""
        self.model = gm.nn.Gemma3_270M(dtype=jnp.float32)
        self.params = jax.block_until_ready(gm.ckpts.load_params(model))

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> Any:
        """The library's prefill draws no token; where more than one is wanted its loop draws the first one here.

        That loop reads the last prompt token a second time: a step that a lone prefill is not charged with.
        """
        length = len(prompts[0]) + new_tokens
        state = _prefill.prefill(
            model=self.model,
            params=self.params,
            input=_types.Input(text=jnp.asarray(prompts), images=None, config=self.model.config.input_config),
            last_state=None,
            cache_length=length,
            max_out_length=new_tokens,
            rng=jax.random.key(0),
            sharding=None,
        )
        loop = _sampler_loop.SamplerLoop(
            model=self.model,
            end_tokens=(NO_TOKEN,),
            forbidden_tokens=None,
            sampling=gm.text.Greedy(),
            cache_length=length,
            special_tokens=self.model.config.input_config.special_tokens,
        )
        return loop, jax.block_until_ready(self._draw(loop, state, 1) if new_tokens > 1 else state)

    def decode(self, state: Any, new_tokens: int) -> list[list[int]]:
        loop, state = state
        return self._draw(loop, state, new_tokens + 1).predicted_tokens.tolist()

    def _draw(self, loop: Any, state: Any, until: int) -> Any:
        """Runs the loop until `until` tokens are drawn.

        At its end the loop hides the places after the last token from the next turn; here the same turn goes on.
        """
        after = loop.sample(params=self.params, init_state=state, max_new_tokens=jnp.asarray(until))
        return dataclasses.replace(after, full_attention_mask=state.full_attention_mask)
