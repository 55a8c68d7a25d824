"""Spills: what a kernel stores only because its vector registers are full, as a share of all that it stores.

Of the main block, in which most cycles are spent. A kernel that spills much is on the list below with a reason, or
`--check` fails.
"""

import re
from collections.abc import Mapping
from typing import Any

ALLOWED = 0.10  # of all vector stores

# Pattern of a kernel's whole name -> why its spills stay. Figures: `--sweep` of the shape named, libtpu 0.0.52.
EXPLAINED: Mapping[str, str] = {
    "band_window_forward": (
        "a block's logits against its whole window are one straight piece of code, which no registers hold. 128 "
        "queries of one head against blocks of 128 keys still spill 150 of 168 stores, and take 2.3 times the cycles "
        "(4b-local-8k, v6e)"
    ),
    "band_stream_forward": (
        "blocks of 512 in place of 1024 still spill 345 of 859 stores, and take 1.5 times the cycles (4b-global-8k, "
        "v6e)"
    ),
    "band_attention_gradients": (
        "blocks of 128 in place of 256 still spill 1,225 of 1,801 stores, and take 1.4 times the cycles (4b-local-8k, "
        "v6e)"
    ),
    "band_attention_(dq|dkv)": (
        "one head at a time in place of two still spills 363 of 461 and 368 of 496 stores, and takes 1.2 times the "
        "cycles. Blocks of 128, whose window takes two steps, spill 9 of 73 and none, and take 3.7 times the cycles "
        "(4b-local-8k, v6e)"
    ),
    "linear_cross_entropy_forward": (
        "the matrix unit's 2,048 cycles on v5e, and 5,120 on tpu7x, hide the block's 1,701 and 3,671 bundles. On v6e "
        "products of 512 columns of D in place of 1280 spill 2 of 514 stores, and take 1.2 times the cycles (4b-4k)"
    ),
    ".*linear_cross_entropy_hidden_gradient_*": (
        "the matrix unit's cycles hide the block's bundles, spills among them: 2,048 beside 1,936 on v5e, 5,120 beside "
        "3,522 on tpu7x (4b-4k)"
    ),
    ".*linear_cross_entropy_table_gradient_*": (
        "as for hidden's on v5e and tpu7x. On v6e blocks of 512 tokens and products of 512 columns of D spill 0 of "
        "256 stores, and take 1.3 times the cycles (4b-4k)"
    ),
    "decode_attention": (
        "of int8 caches, and of 27B's on tpu7x; HBM bounds most of them. On tpu7x one sequence at a time in place of "
        "two spills 1 of 16 stores, and takes 1 % more cycles (4b-ring-int8)"
    ),
    "mix_streams_forward": (
        "each token's coefficients stand in registers of their own, and more tiles are under way than the others hold; "
        "HBM bounds it but for tpu7x. A loop over 4 tiles of the width in place of all of it still spills 60 % of its "
        "stores, and takes 1.2 times the cycles on v5e and 1.4 times on tpu7x (3n-correct-4k)"
    ),
    ".*mix_streams_backward_*": (
        "as forward. A loop over 4 tiles of the width still spills 71 to 75 % of its stores, and takes 1.05 to 1.16 "
        "times the cycles (3n-correct-4k)"
    ),
    "group_quant_matmul": (
        "only of many rows on tpu7x. 512 outputs in place of 1024 spill 0 of 262 stores, and take 1.1 times the "
        "cycles (4b-up-2048)"
    ),
}


def share(kernel: Mapping[str, Any]) -> float:
    """Of a kernel's vector stores those that are spills."""
    main = kernel["main"]
    return main["spill_stores"] / max(main["stores"], 1)


def text(kernel: Mapping[str, Any]) -> str:
    """For people."""
    return f"{kernel['main']['spill_stores']:,} of {kernel['main']['stores']:,} vector stores are spills"


def reason(name: str) -> str | None:
    """Why the kernel of that name spills as much as it does, if it is on the list."""
    return next((why for pattern, why in EXPLAINED.items() if re.fullmatch(pattern, name)), None)


def reasons() -> str:
    """The list, as Markdown."""
    return "\n".join(f"- `{pattern}`: {why}." for pattern, why in EXPLAINED.items())


def complaint(kernel: Mapping[str, Any], before: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a kernel's spills: many and not explained, or many more than `before`, in the baseline."""
    if share(kernel) > ALLOWED and reason(kernel["name"]) is None:
        return f"{kernel['name']}: {text(kernel)}, over {ALLOWED:.0%}, and benchmarks/kernels/spills.py has no reason"
    if before is None:
        return None
    more = kernel["main"]["spill_stores"] - before["main"]["spill_stores"]
    if more > ALLOWED * before["main"]["stores"]:
        return f"{kernel['name']}: {text(kernel)}, {more:,} more than the baseline's, over {ALLOWED:.0%} of its stores"
    return None
