"""Programs of tiny models on meshes of 8 virtual CPU devices beside one device; started by test_mesh.py.

Argument: a JSON list of cases [model, mesh, task]; a line of JSON for each goes to standard output: the largest
differences, by name.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gemma_jax as gj
import gemma_kernels
from gemma_jax import train as training
from gemma_jax.configs.config import (
    AltUpConfig,
    AttentionConfig,
    AttentionKind,
    DecoderConfig,
    LayerSpec,
    PerLayerEmbeddingConfig,
)
from gemma_jax.configs.gemma3n import layer_specs
from gemma_jax.generate import embedding, engine, filters
from gemma_jax.generate.engine import Session
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.nn import kernels, logical
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.logical import ReplicationWarning
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.scanned import stack
from gemma_jax.parallel import hlo
from gemma_jax.parallel import mesh as meshes
from gemma_jax.parallel.partition import Partition
from gemma_jax.parallel.rules import SERVE, TRAIN
from gemma_jax.train import Batch, lora, next_token_loss

WINDOW, LENGTH, BATCH = 16, 64, 4
TEXTS = np.random.default_rng(0).integers(0, 128, (4, BATCH, LENGTH))
OPTIMIZER = optax.adam(1e-3)


def config(num_layers: int = 4, window: int = WINDOW, num_kv_heads: int = 4) -> DecoderConfig:
    attention = AttentionConfig(
        num_heads=8, num_kv_heads=num_kv_heads, head_dim=8, query_pre_attn_scalar=12.0,
        local=AttentionKind(window=window, rope_theta=10_000.0),
        global_=AttentionKind(window=None, rope_theta=1_000_000.0, rope_scale=8.0),
    )  # fmt: skip
    layers = tuple(LayerSpec(is_local=i % 2 == 0, ffw_width=64) for i in range(num_layers))
    return DecoderConfig(name="tiny", vocab_size=128, width=32, context=2048, attention=attention, layers=layers,
                         period=2)  # fmt: skip


def gemma3n(num_layers: int = 8, num_shared: int = 3) -> DecoderConfig:
    base = config(num_layers, num_kv_heads=2)
    is_local = [(i + 1) % 4 != 0 for i in range(num_layers)]
    sparsity = [0.95 if i < 2 else 0.0 for i in range(num_layers)]
    layers = layer_specs(is_local, [64] * num_layers, sparsity, num_shared)
    attention = dataclasses.replace(base.attention, has_v_norm=True, query_pre_attn_scalar=1.0)
    return dataclasses.replace(
        base, attention=attention, layers=layers, period=4, altup=AltUpConfig(num_streams=3), laurel_rank=4,
        final_softcap=30.0, per_layer_embedding=PerLayerEmbeddingConfig(num_rows=120, width=8),
    )  # fmt: skip


MODELS: dict[str, Callable[[], DecoderConfig]] = {
    "gemma3": config,
    "gemma3n": gemma3n,
    "small gemma3n": lambda: gemma3n(5, 1),
    "one key head": lambda: config(num_kv_heads=1),
    "wide window": lambda: config(window=40),  # wider than a device's piece of the tokens: it comes in several hops
}


def session(model: Decoder, prompts: list[list[int]], **sampling: Any) -> tuple[list[list[int]], np.ndarray]:
    """Tokens and log-probabilities; prompts are read in chunks, so that later ones look at the cache."""
    params = [SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=2, **sampling) for _ in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for steps in Session(model, prompts, params, (), prefill_chunk=32):
        for row, step in enumerate(steps):
            rows[row] += step.tokens
            logprobs[row] += step.logprobs
    return rows, np.asarray(logprobs)


def serve(model: Decoder, placed: Decoder, partition: Partition) -> dict[str, float]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 128, (BATCH, LENGTH))
    prompts = [random.integers(0, 128, n).tolist() for n in (3, 97, 41, 64)]
    forward = jax.jit(lambda model, tokens: model(tokens))
    padded = Places.of(jnp.arange(LENGTH)[None] < jnp.asarray([[64], [10], [33], [50]]), is_dense=True)
    masked = jax.jit(lambda model, tokens, where: model.hidden(tokens, where)[0])
    calls: dict[str, Callable[[Decoder], Any]] = {
        "logits": lambda model: forward(model, tokens),
        "padded": lambda model: masked(model, tokens, padded) * (padded.positions >= 0)[..., None],
        "greedy": lambda model: session(model, prompts),
        "sampled": lambda model: session(model, prompts, temperature=1.0, top_k=50, top_p=0.9, seed=1),
    }
    found = {}
    for name, call in calls.items():
        wanted = jax.device_get(call(model))
        with partition.scope():
            got = jax.device_get(call(placed))
        if isinstance(got, tuple):
            found[f"{name} tokens"] = float(got[0] != wanted[0])
            got, wanted = got[1], wanted[1]
        found[name] = float(np.abs(got - wanted).max())
    return found


def train(model: Decoder, placed: Decoder, partition: Partition) -> dict[str, float]:
    """The loss of packed rows, and its gradient in all weights relative to the largest of each."""
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, 128, (BATCH, LENGTH)))
    starts = jnp.asarray([[20], [33], [40], [1]])
    column = jnp.arange(LENGTH)[None]
    segments = (column >= starts).astype(jnp.int32)
    where = Places(jnp.where(column >= starts, column - starts, column), segments, is_dense=True)
    step = jax.jit(jax.value_and_grad(lambda model: next_token_loss(model, Batch(tokens, where))))
    loss, gradients = jax.device_get(step(model))
    with partition.scope():
        found = step(placed)
    for path, param in parameters(found[1]).items():
        wanted = parameters(partition.weights(model))[path].get_raw_value()
        value = param.get_raw_value()
        if value.ndim == 1:  # XLA places the vectors' gradients
            continue
        assert value.sharding.is_equivalent_to(wanted, value.ndim), f"{path} lies as {value.sharding}"
    got_loss, got = jax.device_get(found)
    return {"loss": float(abs(got_loss - loss)), "gradient": _largest(got, gradients)}


def draw(partition: Partition) -> dict[str, float]:
    """Filters and best tokens of random rows, easy and hard, beside one device; and what a row's filters send."""
    random, vocab = np.random.default_rng(0), 8192
    flat = random.normal(0, 0.01, (BATCH, vocab))  # whose nucleus is larger than all candidates
    easy = random.normal(0, 5, (BATCH, vocab))
    ties = np.round(random.normal(0, 2, (BATCH, vocab)))
    whole = np.full(BATCH, vocab)
    settings = [
        (np.array([1, 5, 64, 100]), 1.0), (whole, 0.9), (np.array([50, vocab, 3000, 7]), 0.95),
        (whole, 1.0), (np.array([64] * 4), 0.95), (whole, 1e-30),
    ]  # fmt: skip
    filtered, best = jax.jit(filters.filtered), jax.jit(filters.best, static_argnums=1)
    differing, order = 0, 0
    for logits in (flat, easy, ties):
        values = jnp.asarray(logits, jnp.float32)
        for top_k, top_p in settings:
            rows = (jnp.asarray(top_k, jnp.int32), jnp.full(BATCH, top_p), jnp.full(BATCH, 0.02 if top_p == 0.9 else 0))
            wanted = np.isfinite(filtered(values, *rows))
            with partition.scope():
                differing += int(np.sum(np.isfinite(filtered(values, *rows)) != wanted))
        wanted = jax.device_get(best(values, 20))
        with partition.scope():
            order += sum(int(np.sum(a != b)) for a, b in zip(jax.device_get(best(values, 20)), wanted, strict=True))
    with partition.scope():
        _, program = hlo.compile_readable(filtered.lower(values, *rows), "cpu")
    sent = hlo.collectives(program, dict(partition.mesh.shape))
    return {
        "kept otherwise": differing,
        "best otherwise": order,
        "largest collective": max(one.nbytes for one in sent),
    }


def stacked(model: Decoder, partition: Partition) -> dict[str, float]:
    """Gradients of stacked and scanned layers, beside one device."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (BATCH, LENGTH)))
    scanned = stack(model)
    step = jax.jit(jax.value_and_grad(lambda model: next_token_loss(model, Batch(tokens))))
    loss, gradients = jax.device_get(step(scanned))
    with partition.scope():
        found, got = jax.device_get(step(partition.placed(scanned)))
    return {"loss": float(abs(found - loss)), "gradient": _largest(got, gradients)}


def steps(model: Decoder, partition: Partition) -> dict[str, float]:
    """Losses of training with Adam, whose moments lie as the weights do, and the weights in the end."""
    step, optimizer = training.make_step(OPTIMIZER), OPTIMIZER

    def trained(model: Decoder) -> tuple[list[float], Any]:
        state, losses = training.start(model, optimizer), []
        for tokens in TEXTS:
            state, metrics = step(state, Batch(jnp.asarray(tokens)))
            losses.append(float(metrics["loss"]))
        for moment in (state.weights, *(s for s in jax.tree.leaves(state.optimizer_state[0].mu, is_leaf=_is_model))):
            for path, param in parameters(moment).items():
                value, wanted = param.get_raw_value(), parameters(model)[path].get_raw_value().sharding
                assert value.sharding.is_equivalent_to(wanted, value.ndim), f"{path} lies as {value.sharding}"
        return losses, jax.device_get(state.weights)

    losses, weights = trained(model)
    with partition.scope():
        found, placed = trained(partition.placed(model))
    return {"loss": float(np.abs(np.asarray(found) - losses).max()), "weights": _largest(placed, weights)}


def adapter(model: Decoder, partition: Partition) -> dict[str, float]:
    """The same of an adapter beside weights that stay, stacked as a training of a large model has them."""
    step = training.make_step(OPTIMIZER)

    def trained(model: Any, places: Any = None) -> tuple[list[float], Any]:
        adapted = lora.attach(model, 4, alpha=8, seed=1)
        state, losses = training.start(adapted, OPTIMIZER), []
        for tokens in TEXTS:
            state, metrics = step(state, Batch(jnp.asarray(tokens)), adapted)
            losses.append(float(metrics["loss"]))
        wanted = None if places is None else parameters(places.weights(adapted))
        for path, factor in state.weights.items() if wanted else ():
            value = factor.get_raw_value()
            assert value.sharding.is_equivalent_to(wanted[path].get_raw_value(), value.ndim), path
        return losses, jax.device_get(state.weights)

    model = stack(model)
    for other in (optax.adafactor(1e-3), optax.sm3(1e-3), optax.novograd(1e-3)):
        with partition.scope():  # whose states have other shapes than the weights
            placed = partition.placed(model)
            training.make_step(other)(training.start(placed, other), Batch(jnp.asarray(TEXTS[0])))
    losses, factors = trained(model)
    with partition.scope():
        found, placed = trained(partition.placed(model), partition)
    return {"loss": float(np.abs(np.asarray(found) - losses).max()), "factors": _largest(placed, factors)}


def _is_model(x: Any) -> bool:
    return isinstance(x, Decoder)


def loaded(folder: str, mesh: str) -> dict[str, float]:
    """What a user asks of a loaded model, beside one device."""
    one = gj.load(folder, dtype="float32", progress=False)
    many = gj.load(folder, dtype="float32", mesh=mesh, progress=False)
    tokens = np.random.default_rng(0).integers(5, 30, (BATCH, 16))
    prompts = [row[: 4 + i].tolist() for i, row in enumerate(tokens)]
    wishes = {"max_new_tokens": 8, "ignore_eos": True}
    found = {
        "logits": _largest(jax.device_get(many.logits(tokens)), jax.device_get(one.logits(tokens))),
        "states": _largest(jax.device_get(many.hidden_states(tokens)), jax.device_get(one.hidden_states(tokens))),
        "generate": float([c.tokens for c in many.generate(prompts, **wishes)]
                          != [c.tokens for c in one.generate(prompts, **wishes)]),
    }  # fmt: skip
    small = [gj.load(folder, dtype="int8", mesh=where, progress=False) for where in (None, mesh)]
    found["int8"] = _largest(*(jax.device_get(gemma.logits(tokens)) for gemma in reversed(small)))
    before = engine.decode_chunk._cache_size()
    wishes |= {"repetition_penalty": 1.3, "temperature": 1.0, "seed": 1, "logprobs": 0}
    drawn = many.generate(prompts, **wishes)  # in several chunks
    found["compiled anew"] = float(engine.decode_chunk._cache_size() - before != 1)
    wanted = one.generate(prompts, **wishes)
    found["sampled"] = float([c.tokens for c in drawn] != [c.tokens for c in wanted])
    found["logprobs"] = _largest(*(np.asarray([c.logprobs for c in each]) for each in (drawn, wanted)))
    with many.scope():  # every process can read what the host asks for
        vectors = embedding._embed(many.model, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
        chosen = engine._chosen_logits(many.model, vectors, jnp.arange(3))
        found["unreadable"] = float(not (vectors.is_fully_replicated and chosen.is_fully_replicated))
    wishes = {"max_new_tokens": 8, "ignore_eos": True}
    with warnings.catch_warnings(record=True) as seen:  # a batch of one on two devices along `data`
        warnings.simplefilter("always")
        pieces = [piece.tokens for piece in many.stream(prompts[0], **wishes)]
        score = many.score(prompts[3])
    found["warned"] = float(any("batch is 1" in str(w.message) for w in seen))
    found["stream"] = float(pieces != [piece.tokens for piece in one.stream(prompts[0], **wishes)])
    found["score"] = float(np.abs(np.asarray(score.logprobs) - one.score(prompts[3]).logprobs).max())
    found["outside"] = float(logical.current() is not None)
    other = gj.load(folder, dtype="float32", mesh="seq=8", progress=False)
    for name, draft in {"draft of one device": one, "draft of another mesh": other}.items():
        try:
            many.generate(prompts, draft=draft, **wishes)
        except ValueError as error:
            found[name] = float("load both with one mesh" not in str(error))
    return found


def sent(model: Decoder, partition: Partition) -> dict[str, float]:
    """Bytes that a forward of 512 tokens receives on each device, by how keys travel."""
    length, found = 512, {}
    tokens = jnp.zeros((1, length), jnp.int32)
    forward = jax.jit(lambda model, tokens, where: model.hidden(tokens, where)[0])
    for name, where in {"halo": Places.plain(1, length), "gathered": Places.of(tokens == 0)}.items():
        with partition.scope():
            _, program = hlo.compile_readable(forward.lower(partition.placed(model), tokens, where), "cpu")
        for kind in ("collective-permute", "all-gather"):
            moved = [one for one in hlo.collectives(program, dict(partition.mesh.shape)) if one.kind == kind]
            assert all(one.axes == ("seq",) for one in moved)
            found[f"{name} {kind}"] = sum(one.nbytes * one.executions.count for one in moved)
    return found


def mixed(partition: Partition) -> dict[str, float]:
    """Mixtures of streams by the kernel, interpreted, beside the plain form on one device: value and gradients."""
    random = np.random.default_rng(0)
    shapes = (BATCH, 64, 3, 4), (3, BATCH, 64, 512), (BATCH, 64, 512), (BATCH, 64, 512)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]

    def call(*arrays: jax.Array) -> Any:
        out, pull = jax.vjp(kernels.mix_streams, *arrays)
        return out, pull(jnp.cos(out))

    wanted = jax.device_get(jax.jit(call)(*arrays))
    with partition.scope(), gemma_kernels.using("interpret"), gemma_kernels.recorded() as choices:
        found = jax.device_get(jax.jit(call)(*arrays))
    assert [choice.kernel for choice in choices] == ["tpu"], choices
    return {"mixed": _largest(found, wanted)}


def _largest(found: Any, wanted: Any) -> float:
    """The largest difference of two trees, relative to the largest value of each array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs)


def run(name: str, mesh: str, task: str) -> dict[str, float]:
    if task == "load":
        return loaded(name, mesh)
    if task == "draw":
        return draw(Partition(meshes.make(mesh)))
    if task == "mixed":
        return mixed(Partition(meshes.make(mesh), TRAIN))
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    model = Decoder(MODELS[name](), rngs=nnx.Rngs(0), dtype=dtype)
    rules = SERVE if task in ("serve", "sent") else TRAIN
    mesh, _, form = mesh.partition(" ")
    rules = dataclasses.replace(rules, is_ring=form == "ring")
    partition = Partition(meshes.make(mesh), rules)
    if task in ("stacked", "steps", "sent", "adapter"):
        return {"stacked": stacked, "steps": steps, "sent": sent, "adapter": adapter}[task](model, partition)
    return (train if task == "train" else serve)(model, partition.placed(model), partition)


def main() -> None:
    warnings.simplefilter("error", ReplicationWarning)
    for case in json.loads(sys.argv[1]):
        with jax.enable_x64("gemma3n" in case[0]):  # whose sparsity makes much of rounding
            found = run(*case)
        sys.stdout.write(json.dumps([case, found]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
