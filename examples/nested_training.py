"""Trains a tiny model plainly and as a MatFormer, and draws how good their slices are.

    python examples/nested_training.py docs/nested_training.png

Bytes of Python's standard library are the tokens, every tenth file is held out. All runs begin with the same weights
and see the same batches, so that the figures are the same again with the same versions of Python and JAX. One step of
the sampled loss costs less than a plain one, and of the joint loss more: both are trained once for as many steps as the
plain model, and once for what its training costs. In the end slices draft for the whole (`generate(draft=)`), and how
many of their bytes it takes is counted. Some eight minutes on two cores. Needs the extra bench (matplotlib).
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gemma_jax as gj
from gemma_jax import matformer, train
from gemma_jax.configs.config import AttentionConfig, AttentionKind, DecoderConfig, LayerSpec
from gemma_jax.configs.slicing import Slicing
from gemma_jax.matformer import nested
from gemma_jax.matformer.sweep import default_slicings
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.sliced import cut

CONFIG = DecoderConfig(
    name="tiny-bytes",
    vocab_size=256,
    width=64,
    context=128,
    attention=AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16.0,
        local=AttentionKind(window=32, rope_theta=10_000.0),
        global_=AttentionKind(window=None, rope_theta=1_000_000.0),
    ),
    layers=tuple(LayerSpec(is_local=i % 2 == 0, ffw_width=512) for i in range(4)),
    period=2,
)
ROWS, LENGTH, PEAK = 8, 128, 3e-3  # the peak of the learning rate: the same for all, not tuned for any
HELD_OUT = 32  # batches
WIDTHS = nested.halves(CONFIG)  # what is trained: 1, 1/2, 1/4, 1/8
EVALUATED = default_slicings(CONFIG) | {"mixed": Slicing(ffw=(64, 128, 256, 512))}
TRAINED = ("8/8", "4/8", "2/8", "1/8")
STYLES = ("k-", "C1-", "C1--", "C0-", "C0--")


measured = jax.jit(train.next_token_loss)


@dataclass(frozen=True)
class Run:
    """A trained model."""

    name: str
    steps: int
    flops: float  # of its training
    seconds: float  # compilation left out
    nll: dict[str, float]  # of each slice on held-out text, in nats a byte
    model: Decoder


def text() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to learn from, and held-out ones."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    joined = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 9) == held) for held in (False, True)]
    return np.frombuffer(joined[0], np.uint8), np.frombuffer(joined[1], np.uint8)


def batches(data: np.ndarray, count: int, seed: int) -> Iterator[train.Batch]:
    """Rows from random places."""
    for i in range(count):
        starts = np.random.default_rng((seed, i)).integers(0, len(data) - LENGTH, ROWS)
        yield train.Batch(jnp.asarray(np.stack([data[s : s + LENGTH] for s in starts]), jnp.int32))


@functools.cache
def flops(slicing: Slicing) -> float:
    """Of a training step: 6 for a token and weight, the head's too; attention's look at the past left out."""
    model = nnx.eval_shape(lambda: Decoder(slicing.apply(CONFIG), rngs=nnx.Rngs(0)))
    return 6.0 * ROWS * LENGTH * sum(leaf.size for leaf in jax.tree.leaves(model))


def train(name: str, data: tuple[np.ndarray, np.ndarray], steps: int, choose: Callable[[int], nested.Mixture]) -> Run:
    """Trains with what `choose` says for each step, and evaluates all slices."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state, step = train.start(Decoder(CONFIG, rngs=nnx.Rngs(0)), optimizer), nested.make_step(optimizer)
    total, seconds, seen = 0.0, 0.0, set[nested.Shares]()
    for i, batch in enumerate(batches(data[0], steps, seed=1)):
        shares = nested.normalised(choose(i))
        begin = time.perf_counter()
        state, metrics = step(state, batch, dict(shares))
        loss = float(metrics["loss"])
        seconds += time.perf_counter() - begin if shares in seen else 0.0
        seen.add(shares)
        total += sum(flops(slicing) for slicing, _ in shares)
        if i % 100 == 99:
            print(f"  {name}, step {i + 1}: {loss:.3f}", flush=True)
    nll = {label: held_out_nll(cut(state.weights, slicing), data[1]) for label, slicing in EVALUATED.items()}
    return Run(name, steps, total, seconds, nll, state.weights)


def held_out_nll(model: Decoder, data: np.ndarray) -> float:
    """In nats a byte, of rows from random places: a byte is read with at most LENGTH - 1 before it."""
    return float(np.mean([measured(model, batch) for batch in batches(data, HELD_OUT, seed=2)]))


def table(runs: Sequence[Run]) -> str:
    """As Markdown: the held-out loss of each slice, and what training cost."""
    lines = [
        f"| ffw | {' | '.join(run.name for run in runs)} |",
        f"| --- |{' ---: |' * len(runs)}",
    ]
    for label in EVALUATED:
        mark = " (trained in the nested runs)" if label in TRAINED else ""
        lines.append(f"| {label}{mark} | {' | '.join(f'{run.nll[label]:.3f}' for run in runs)} |")
    lines.append(f"| steps | {' | '.join(str(run.steps) for run in runs)} |")
    lines.append(f"| training, TFLOP | {' | '.join(f'{run.flops / 1e12:.2f}' for run in runs)} |")
    lines.append(f"| training, seconds | {' | '.join(f'{run.seconds:.0f}' for run in runs)} |")
    return "\n".join(lines)


def acceptance(run: Run, data: np.ndarray, slicing: Slicing, temperature: float) -> float:
    """The share of a slice's drafts that the whole draws too: 4 at once, 80 bytes after each of 8 held-out prompts."""
    whole = gj.Gemma(CONFIG, run.model)
    prompts = np.asarray(next(batches(data, 1, seed=3)).tokens)[:, :40].tolist()
    done = whole.generate(
        prompts, draft=matformer.slice(whole, slicing), temperature=temperature, seed=list(range(len(prompts))),
        max_new_tokens=80, ignore_eos=True,
    )  # fmt: skip
    return sum(one.num_accepted_tokens for one in done) / sum(one.num_draft_tokens for one in done)


def draft_table(runs: Sequence[Run], data: np.ndarray) -> str:
    """As Markdown: acceptance rates, greedy and at temperature 1."""
    lines = [
        "| slice that drafts, of | greedy: 4/8 | 2/8 | 1/8 | sampled: 4/8 | 2/8 | 1/8 |",
        f"| --- |{' ---: |' * 6}",
    ]
    for run in runs:
        rates = [acceptance(run, data, EVALUATED[f"{i}/8"], t) for t in (0.0, 1.0) for i in (4, 2, 1)]
        lines.append(f"| {run.name} | {' | '.join(f'{rate:.0%}' for rate in rates)} |")
    return "\n".join(lines)


def draw(pyplot: Any, runs: Sequence[Run]) -> Any:
    """Held-out loss against the width of the ffw; widths that were trained are filled."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for run, style in zip(runs, STYLES, strict=True):
        labels = [label for label in EVALUATED if label != "mixed"]
        x, y = [int(label[0]) / 8 for label in labels], [run.nll[label] for label in labels]
        trained = ("8/8",) if run.name == "plain" else TRAINED
        line = f"{run.name}: {run.steps} steps, {run.flops / 1e12:.1f} TFLOP"
        (drawn,) = axes.plot(x, y, style, label=line)
        filled = [drawn.get_color() if label in trained else "white" for label in labels]
        axes.scatter(x, y, c=filled, edgecolors=drawn.get_color(), zorder=3)
    axes.set_xlabel("width of the ffws, of the whole (filled: trained)")
    axes.set_ylabel("held-out negative log-likelihood, nats a byte")
    axes.set_title("Slices of a tiny model, trained plainly and as a MatFormer", size=10)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="where the PNG is written")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: pip install 'gemma-jax[bench]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    data = text()
    print(f"{len(data[0]):,} bytes to learn from, {len(data[1]):,} held out")
    # a joint step costs so many plain ones, and a sampled one on average a part of that
    cost = sum(map(flops, WIDTHS)) / flops(Slicing())
    many, few = round(args.steps * len(WIDTHS) / cost), round(args.steps / cost)
    runs = [
        train("plain", data, args.steps, lambda i: Slicing()),
        train("sampled", data, args.steps, lambda i: nested.sampled(WIDTHS, seed=0, step=i)),
        train("sampled, plain's cost", data, many, lambda i: nested.sampled(WIDTHS, seed=0, step=i)),
        train("joint", data, args.steps, lambda i: WIDTHS),
        train("joint, plain's cost", data, few, lambda i: WIDTHS),
    ]
    print(table(runs))
    print(draft_table([run for run in runs if run.name in ("plain", "sampled, plain's cost")], data[1]))
    figure = draw(pyplot, runs)
    figure.savefig(args.picture, dpi=110)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
