"""Thousands of damaged configs in each dialect: a possible model, or an error that says what is wrong."""

import contextlib
import json
import random
import re

import pytest

from gemma_jax import configs, export
from gemma_jax.configs import serialise
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.huggingface import from_huggingface, to_huggingface

COUNT = 600
STRANGE = (
    "0",
    "-1",
    "1",
    "1.5",
    str(2**31),
    str(2**64),
    "1e400",
    "null",
    "true",
    "[]",
    "{}",
    '"x"',
    "[[3]]",
    '[{"a": 1}]',
)
SEEING = configs.get("gemma-3-4b").replace("layers", configs.get("gemma-3-4b").layers[:3])
HEARING = configs.get("gemma-3n-e2b")
DIALECTS = {
    "Gemma 3 of Hugging Face": (to_huggingface(SEEING, "bfloat16"), from_huggingface),
    "Gemma 3n of Hugging Face": (to_huggingface(HEARING, "bfloat16"), from_huggingface),
    "Gemma 3 of ours": (serialise.to_data(SEEING), serialise.from_data),
    "Gemma 3n of ours": (serialise.to_data(HEARING), serialise.from_data),
}


def hurt(text: str, chance: random.Random) -> str:
    """One to three values or names become others."""
    for _ in range(chance.randint(1, 3)):
        spot = chance.choice(list(re.finditer(r'-?\d+(\.\d+)?|"[^"]*"|true|false|null', text)))
        text = text[: spot.start()] + chance.choice(STRANGE) + text[spot.end() :]
    return text


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_damaged_config_is_read_or_refused(dialect):
    data, read = DIALECTS[dialect]
    whole, chance, refused = json.dumps(data), random.Random(dialect), 0
    for _ in range(COUNT):
        try:
            damaged = json.loads(hurt(whole, chance))
        except ValueError:  # a name became a number
            continue
        try:
            config = read(damaged, "damaged")
        except ConfigError:
            refused += 1
            continue
        with contextlib.suppress(ConfigError):
            export.table("huggingface", config)
    assert refused > COUNT // 8
