"""Training so that each slice of a model is a model that can be used: MatFormer's nested loss (arXiv:2310.07707).

    widths = nested.halves(config)                           # the whole, and ffws of 1/2, 1/4, 1/8
    state, step = train.start(model, optimizer), nested.make_step(optimizer)
    for i, batch in enumerate(batches):
        state, metrics = step(state, batch, nested.sampled(widths, seed=0, step=i))   # one width a step
    state, metrics = step(state, batch, widths)                                       # or all at once: the joint loss

Slicings with weights, a `Mixture`, say what is trained. A sampled step descends one of them, drawn with the weights as
probabilities; a joint step descends the weighted mean of all. The first costs one forward, the second one for each
slicing, and for one state, the mean gradient of the first is the gradient of the second.

Each tuple of slicings is a program of its own and compiles when first seen: draw from a few that are fixed beforehand.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gemma_jax.configs.config import ConfigError, DecoderConfig
from gemma_jax.configs.slicing import Slicing
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.sliced import cut
from gemma_jax.train.losses import Batch, next_token_loss
from gemma_jax.train.step import Metrics, State, updated

Mixture = Slicing | Iterable[Slicing] | Mapping[Slicing, float]  # without weights all count alike
Shares = tuple[tuple[Slicing, float], ...]  # weights that sum to 1


Step = Callable[[State, Batch, Mixture], tuple[State, Metrics]]


def nested_loss(model: Decoder, batch: Batch, mixture: Mixture) -> tuple[Float[Array, ""], Float[Array, " G"]]:
    """The weighted mean of G slices' losses on one batch, in nats, and each one's loss, in the mixture's order.

    Weights that no slice of the mixture has get a gradient of exactly 0. The G forwards are in one program, and what
    they keep for their gradients may be held at once.
    Source: arXiv:2310.07707.
    Raises: ConfigError for a slice that the model has not; ValueError for a mixture that is none.
    """
    shares = normalised(mixture)
    losses = jnp.stack([next_token_loss(cut(model, slicing), batch) for slicing, _ in shares])
    return jnp.sum(losses * jnp.asarray([share for _, share in shares], losses.dtype)), losses


def make_step(optimizer: optax.GradientTransformation) -> Step:
    """A training step, compiled: `state, metrics = step(state, batch, mixture)`; a single slicing is a mixture too.

    Metrics: `loss`, `losses` [G] of each slicing, `gradient_norm`; of the weights before the step.

    Outside of the slices gradients are 0, but the whole model goes through the optimizer: momentum, Adam's moments and
    weight decay move also the weights that a sampled step does not use. Each tuple of slicings and weights compiles.
    Raises: as `nested_loss`, and ValueError for a batch of another shape, before anything is computed or donated.
    """

    @functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
    def program(state: State, batch: Batch, shares: Shares) -> tuple[State, Metrics]:
        after, value, losses, norm = updated(optimizer, state, lambda model: nested_loss(model, batch, dict(shares)))
        return after, {"loss": value, "losses": losses, "gradient_norm": norm}

    def step(state: State, batch: Batch, mixture: Mixture) -> tuple[State, Metrics]:
        shares = normalised(mixture)
        for slicing, _ in shares:
            slicing.apply(state.weights.config)
        batch.check()
        return program(state, batch, shares)

    return step


def normalised(mixture: Mixture) -> Shares:
    """The slicings of a mixture and their weights, which are made to sum to 1. A slicing listed twice counts twice.

    Raises ValueError if there are none, or a weight is not above 0.
    """
    weights = Counter([mixture] if isinstance(mixture, Slicing) else mixture)
    if not weights:
        raise ValueError("the mixture has no slicing; the whole model is Slicing()")
    for slicing, weight in weights.items():
        if not isinstance(slicing, Slicing):
            raise ValueError(f"the mixture has {slicing!r}; wanted slicings")
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{slicing} has the weight {weight}; wanted a number above 0")
    total = math.fsum(weights.values())
    return tuple((slicing, weight / total) for slicing, weight in weights.items())


def sampled(mixture: Mixture, seed: int, step: int) -> Slicing:
    """The slicing that a step trains, drawn with the mixture's weights as probabilities; a function of its arguments.

    Source: arXiv:2310.07707 (there all are equally likely).
    Raises ValueError as `normalised` does, and for a negative seed or step.
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed is {seed} and step {step}; wanted both from 0 on")
    slicings, shares = zip(*normalised(mixture), strict=True)
    drawn = np.random.default_rng((seed, step)).random()
    return slicings[min(int(np.searchsorted(np.cumsum(shares), drawn, side="right")), len(slicings) - 1)]


def halves(config: DecoderConfig, count: int = 4) -> tuple[Slicing, ...]:
    """The whole model, and slices whose ffws are all a half, a quarter, ... as wide: `count` in all.

    Source: arXiv:2310.07707: four widths, each twice the one before.
    Raises ConfigError if an ffw is too narrow.
    """
    narrowest = min(spec.ffw_width for spec in config.layers)
    if not 1 <= count <= narrowest.bit_length():
        raise ConfigError(f"count is {count}; {config.name}, with an ffw of {narrowest}, can be halved to 1 to "
                          f"{narrowest.bit_length()} widths")  # fmt: skip
    narrowed = [Slicing(ffw=tuple(spec.ffw_width >> i for spec in config.layers)) for i in range(1, count)]
    return (Slicing(), *narrowed)


def mix_and_match(config: DecoderConfig, slicings: Sequence[Slicing], count: int, seed: int) -> tuple[Slicing, ...]:
    """`count` different slicings, in each of which every layer has the width of one of the given, chosen at random.

    All are drawn beforehand, so that training with them compiles `count` programs and not one for every step.
    Source: arXiv:2310.07707, mix'n'match.
    Raises: ConfigError for slicings that the model has not, or that leave out different layers; ValueError if there are
    fewer than `count`.
    """
    if not slicings:
        raise ValueError("there are no slicings to mix; give at least one")
    if len({slicing.skip for slicing in slicings}) > 1:
        raise ConfigError("only slicings that leave out the same layers can be mixed")
    for slicing in slicings:
        slicing.apply(config)
    choices = [sorted(set(layer)) for layer in zip(*(one.widths(config) for one in slicings), strict=True)]
    if not 0 <= count <= (possible := math.prod(map(len, choices))):
        raise ValueError(f"count is {count}; {possible} slicings can be mixed of these")
    random, found = np.random.default_rng(seed), dict[Slicing, None]()
    while len(found) < count:
        widths = tuple(layer[random.integers(len(layer))] for layer in choices)
        found[Slicing(slicings[0].skip, widths)] = None
    return tuple(found)
