"""Look into a forward pass and change it: capture, steer, patch, ablate, logit lens. All compiled, also in generation.

    from gemma_jax import interp

    acts = interp.capture(gemma, tokens, ["layers.*.resid_post", "layers.3.attn_weights"])
    steered = gemma.generate("I feel", edits=[interp.Add("layers.9.resid_post", vector, scale=4.0)])
    logits = gemma.logits(tokens, edits=[interp.Patch("layers.5.resid_post", acts["layers.5.resid_post"])])
    without = interp.run(gemma, tokens, edits=[interp.Ablate("layers.7.heads", units=[2])])

The sites are listed in `gemma_jax/nn/sites.py`, the edits in `gemma_jax/nn/edits.py`. A new vector, or other positions
of the same number, compile nothing anew. A zero vector and a factor of 1 are left out: that is the plain forward.

Forwards that are edited or captured agree bit for bit where no edit changed anything. The plain forward is fused
otherwise by XLA and differs from them in the last bits. `run` without edits is the baseline to compare with, and in
generation `edits=[Apply("embed", function)]` with a function that gives back what it got.
"""

from gemma_jax.interp.activations import capture, encode, run
from gemma_jax.interp.lens import Lens, logit_lens
from gemma_jax.nn.edits import Ablate, Add, Apply, Edit, Patch, Scale
from gemma_jax.nn.sites import Taps

__all__ = ["Ablate", "Add", "Apply", "Edit", "Lens", "Patch", "Scale", "Taps", "capture", "encode", "logit_lens", "run"]
