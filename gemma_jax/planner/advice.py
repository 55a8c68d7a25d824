"""What to change so that a model fits: by arithmetic, from what takes most of a device's memory."""

from collections.abc import Iterator
from dataclasses import replace

from gemma_jax.parallel.hardware import CHIPS, GiB
from gemma_jax.planner import search
from gemma_jax.planner.plan import Plan, Question
from gemma_jax.planner.programs import TRAINING


def changes(plan: Plan) -> tuple[str, ...]:
    """Each of them is enough by itself, temporaries taken to stay as they are; none if the plan fits."""
    if plan.fits:
        return ()
    held = plan.largest.held
    parts = {**held, "temporaries": plan.largest.temporaries or 0}
    most = max(parts, key=lambda name: parts[name])
    lines = [f"most of it are the {most}: {parts[most] / GiB:.2f} GiB"]
    return (*lines, *_more_devices(plan), *_less_cache(plan), *_smaller_steps(plan), *_other_numbers(plan))


def _temporaries(plan: Plan) -> int:
    return max(0, plan.largest.needed - sum(plan.largest.held.values()))


def _fits(plan: Plan, question: Question) -> bool:
    """Whether the same mesh holds a changed question."""
    held = search.held_bytes(question, plan.topology, plan.mesh)
    return held is not None and sum(held.values()) + _temporaries(plan) <= search.ROOM * plan.usable


def _more_devices(plan: Plan) -> Iterator[str]:
    """The smallest topology with a mesh that holds it, and other chips with the same number of devices."""
    room = plan.usable - _temporaries(plan)
    for topology in search.larger(plan.topology):
        found = [one for one in search.candidates(plan.question, topology) if one.nbytes <= search.ROOM * room]
        if found:
            yield f"more devices: {topology.name} with {found[0].mesh} holds {found[0].nbytes / GiB:.2f} GiB on each"
            break
    for chip in CHIPS.values():
        is_same_kind = chip.platform == plan.topology.chip.platform and chip.usable_bytes > plan.usable
        if is_same_kind and plan.largest.needed <= search.ROOM * chip.usable_bytes:
            yield f"larger devices: {chip.name} has {chip.usable_bytes / GiB:.2f} GiB on each"


def _less_cache(plan: Plan) -> Iterator[str]:
    if "cache" not in plan.largest.held:
        return
    rows = plan.question.batch // 2
    while rows and not _fits(plan, replace(plan.question, batch=rows)):
        rows //= 2
    if rows:
        yield f"a smaller batch: {rows}"
    context = plan.context // 2
    while context >= 1024 and not _fits(plan, replace(plan.question, context=context)):
        context //= 2
    if context >= 1024:
        yield f"a shorter context: {context:,} tokens"


def _smaller_steps(plan: Plan) -> Iterator[str]:
    if not plan.largest.temporaries:
        return
    if plan.question.purpose == "prefill":
        yield "fewer tokens at once: --chunk"
    elif plan.question.purpose in TRAINING:
        yield "fewer rows, or shorter ones: what is kept for gradients is less"


def _other_numbers(plan: Plan) -> Iterator[str]:
    question = plan.question
    if question.purpose == "train" and _fits(plan, replace(question, purpose="lora")):
        yield "an adapter instead of all weights: --for lora"
    if question.purpose == "lora":
        rank = question.rank // 2
        while rank and not _fits(plan, replace(question, rank=rank)):
            rank //= 2
        if rank:
            yield f"a smaller rank: --rank {rank}"
    if question.dtype == "float32" and question.purpose != "train" and _fits(plan, replace(question, dtype="bfloat16")):
        yield "weights in half the bytes: --dtype bfloat16"
    elif (
        question.dtype == "bfloat16"
        and question.purpose not in TRAINING
        and _fits(plan, replace(question, dtype="int8"))
    ):
        yield "int8 weights: --dtype int8"
