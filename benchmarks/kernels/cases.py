"""Every case. To add one: a function from blocks to a `Program`, and a `Case` that names it."""

import functools
from collections.abc import Iterator

from benchmarks.kernels import attention, band, decode, loss, mix, quant, splash, tokamax
from benchmarks.kernels.case import OURS, Case


def every_case() -> list[Case]:
    """What a full run compiles."""
    cases = [*_band(), *_splash(), *_tokamax(), *_decode(), *_quant(), *_loss(), *_mix()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), names
    return cases


def _band() -> Iterator[Case]:
    for shape in attention.SHAPES:
        yield Case(
            kernel="band_forward",
            shape=shape.name,
            build=functools.partial(band.forward, shape),
            choices=band.choices(shape),
            entry=band.entry(shape, "forward"),
            is_quick=shape.is_quick,
        )
        yield Case(
            kernel="band_backward",
            shape=shape.name,
            build=functools.partial(band.backward, shape),
            choices=band.backward_choices(shape),
            entry=band.entry(shape, "dq", "dkv"),
            is_quick=shape.is_quick,
        )
        if shape.window is not None:
            yield Case(
                kernel="band_backward",
                shape=shape.name,
                implementation="fused",
                build=functools.partial(band.backward, shape),
                choices=band.fused_choices(),
                entry=band.entry(shape, "fused", rival=OURS),
                is_quick=shape.is_quick,
            )


def _splash() -> Iterator[Case]:
    for kernel, build in (("band_forward", splash.forward), ("band_backward", splash.backward)):
        for shape in attention.SHAPES:
            yield Case(
                kernel=kernel,
                shape=shape.name,
                implementation="splash",
                build=functools.partial(build, shape),
                choices=splash.CHOICES,
            )


def _loss() -> Iterator[Case]:
    for shape in loss.SHAPES:
        for kind in loss.KINDS:
            yield Case(
                kernel=f"loss_{kind}",
                shape=shape.name,
                build=functools.partial(loss.program, shape, kind),
                choices=loss.choices(kind),
                entry=shape.entry(kind),
            )


def _mix() -> Iterator[Case]:
    for shape in mix.SHAPES:
        for kind in mix.KINDS:
            yield Case(
                kernel=f"mix_{kind}",
                shape=shape.name,
                build=functools.partial(mix.program, shape, kind),
                choices=mix.choices(kind),
                entry=shape.entry(kind),
                is_quick=shape.is_quick,
            )


def _decode() -> Iterator[Case]:
    for shape in decode.SHAPES:
        yield Case(
            kernel="decode_attention",
            shape=shape.name,
            build=functools.partial(decode.program, shape),
            choices=decode.CHOICES,
            dispatched=shape.dispatched,
            is_quick=shape.is_quick,
        )


def _quant() -> Iterator[Case]:
    for shape in quant.SHAPES:
        yield Case(
            kernel="group_quant_matmul",
            shape=shape.name,
            build=functools.partial(quant.program, shape),
            choices=shape.choices,
            dispatched=shape.dispatched,
            is_quick=shape.is_quick,
        )


def _tokamax() -> Iterator[Case]:
    for kernel, build in (("band_forward", tokamax.forward), ("band_backward", tokamax.backward)):
        for shape in attention.SHAPES:
            yield Case(
                kernel=kernel,
                shape=shape.name,
                implementation="tokamax",
                environment="tokamax",
                build=functools.partial(build, shape),
                choices=tokamax.choices(shape),
            )
