"""The tables of rules: which mesh axes the dimensions of weights, activations and caches lie on. Change them here.

Axes, outer to inner: `replica` (between pods, DCN), `data`, `fsdp` (data whose weights are divided, ZeRO-3), `seq`
(context parallelism) and `model` (tensor parallelism).

Weights that no rule names (norms, towers, AltUp's and LAuReL's small matrices) lie whole on every device.
"""

from gemma_jax.nn.logical import Rules

AXES = ("replica", "data", "fsdp", "seq", "model")
BATCH = ("replica", "data", "fsdp")

# Prefill and decoding. Weights stay where they are; a decoding step divides its ffw along `seq` too, whose devices
# have nothing else to do then: inside `model`, so that a prompt's chunk gathers along `seq` alone. Key heads that
# `model` does not divide lie whole, and the slots of global caches are divided by it instead; a ring is short.
SERVE = Rules.of(
    "serve",
    {
        "embed": (), "q_heads": "model", "kv_heads": "model", "ffw": ("model", "seq"), "vocab": "model",
        "ple_rows": "model",
        "batch": BATCH, "act_seq": "seq", "act_embed": (), "act_ffw": ("model", "seq"), "act_vocab": "model",
        "kv_seq": ("seq", "model"), "kv_win": (),
    },
    whole=("kv_heads", "ple_rows"),
)  # fmt: skip

# Training: weights and the optimizer's state are divided along D as well and gathered at use; the stream between
# layers is divided along D by `model`, so that what is kept for gradients is.
TRAIN = Rules.of(
    "train",
    {
        "embed": ("fsdp", "seq"), "q_heads": "model", "kv_heads": "model", "ffw": "model", "vocab": "model",
        "ple_rows": "model",
        "batch": BATCH, "act_seq": "seq", "act_embed": "model", "act_ffw": "model", "act_vocab": "model",
        "kv_seq": ("seq", "model"), "kv_win": (),
    },
    whole=("kv_heads", "ple_rows"),
)  # fmt: skip

TABLES = {rules.name: rules for rules in (SERVE, TRAIN)}
