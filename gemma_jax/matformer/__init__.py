"""MatFormer: smaller models that lie within a larger one, as an operation on its parameters (arXiv:2310.07707).

    from gemma_jax import matformer

    small = matformer.slice(gemma, matformer.E2B)                        # of E4B: what was released as E2B
    small = matformer.slice(gemma, ffw=[16384] * 5 + [8192] * 30)        # mix and match
    small = matformer.slice(gemma, ffw=8192, copy=False)                 # one copy of the weights for all slices
    small = gemma_jax.load("google/gemma-3n-e4b-it", slicing=matformer.E2B)   # reads no more than the slice
    named = matformer.read_slicings("configs.csv")                       # the published file

A slice keeps some layers, and the first units of each one's ffw; nothing else changes its width. It is a model like any
other: it runs, trains, is saved and converted. `gemma-jax slice` makes one from file to file.
`matformer.nested` trains a model so that its slices are good ones, `matformer.sweep` measures them.
"""

from collections.abc import Iterable

from gemma_jax.configs.slicing import E2B, Slicing, read_slicings
from gemma_jax.model import Gemma
from gemma_jax.nn.sliced import SharedSlice, composed, cut

__all__ = ["E2B", "Slicing", "read_slicings", "slice"]


def slice(
    gemma: Gemma,
    slicing: Slicing | None = None,
    *,
    ffw: int | Iterable[int] | None = None,
    skip: Iterable[int] = (),
    copy: bool = True,
) -> Gemma:
    """A smaller model within a larger one.

    Args:
        slicing: or else:
        ffw: the width of all kept layers, or of each of them; None: as they are.
        skip: layers to leave out.
        copy: what is cut is a copy, sharded as the whole is; what is not cut is shared. False: nothing is copied, and
            programs read the whole's weights, so that slices of any widths are served from one copy of them, each
            request by the slice it asks for. On TPU that costs neither memory nor time; XLA for CPU copies the cut
            parts whenever a program runs.

    Raises: ConfigError for a slice that the model has not; see `Slicing.apply`.
    """
    wanted = Slicing.of(skip, ffw)
    if slicing is not None and wanted != Slicing():
        raise ValueError("give a slicing, or ffw and skip, not both")
    if not isinstance(gemma, Gemma) or not isinstance(slicing, Slicing | None):
        given = gemma if not isinstance(gemma, Gemma) else slicing
        raise TypeError(f"a {type(given).__name__} was given; wanted a Gemma, and a Slicing or ffw= and skip=")
    whole, slicing = composed(gemma.model, slicing or wanted)
    small = cut(whole, slicing) if copy else SharedSlice(whole, slicing)
    return Gemma(small.config, small, gemma.tokenizer, gemma.partition)
