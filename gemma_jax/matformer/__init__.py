"""MatFormer: smaller models that lie within a larger one, as an operation on its parameters (arXiv:2310.07707).

    from gemma_jax import matformer

    small = matformer.slice(gemma, matformer.E2B)                        # of E4B: what was released as E2B
    small = matformer.slice(gemma, ffw=[16384] * 5 + [8192] * 30)        # mix and match
    small = gemma_jax.load("google/gemma-3n-e4b-it", slicing=matformer.E2B)   # reads no more than the slice
    named = matformer.read_slicings("configs.csv")                       # the published file

A slice keeps some layers, and the first units of each one's ffw; nothing else changes its width. It is a model like any
other: it runs, trains, is saved and converted. `gemma-jax slice` makes one from file to file.
"""

from collections.abc import Iterable

from gemma_jax.configs.slicing import E2B, Slicing, read_slicings
from gemma_jax.model import Gemma
from gemma_jax.nn.sliced import cut

__all__ = ["E2B", "Slicing", "read_slicings", "slice"]


def slice(
    gemma: Gemma,
    slicing: Slicing | None = None,
    *,
    ffw: int | Iterable[int] | None = None,
    skip: Iterable[int] = (),
) -> Gemma:
    """A smaller model within a larger one.

    Args:
        slicing: or else:
        ffw: the width of all kept layers, or of each of them; None: as they are.
        skip: layers to leave out.

    What is not cut is shared with `gemma`, not copied; what is cut is a copy, sharded as the whole is.
    Raises: ConfigError for a slice that the model has not; see `Slicing.apply`.
    """
    if slicing is not None and (ffw is not None or tuple(skip)):
        raise ValueError("give a slicing, or ffw and skip, not both")
    if gemma.model.embedder.fetch is not None:
        raise ValueError("the per-layer embeddings are mapped from a checkpoint; load the slice itself with slicing=")
    small = cut(gemma.model, slicing or Slicing.of(skip, ffw))
    return Gemma(small.config, small, gemma.tokenizer)
