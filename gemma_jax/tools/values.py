"""Values of JSON: what arguments and results of tools are."""

import json
from typing import Any

MAX_DEPTH = 50  # of lists and objects in each other


def plain(value: Any) -> Any:
    """A copy of a value, made of JSON's kinds alone.

    Raises ValueError that says why it is none: NaN and infinity, numbers of thousands of digits, lone surrogates,
    values that hold themselves or are nested deeper than MAX_DEPTH, objects of other kinds.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error!s:.200}") from None
    copy = json.loads(text)
    level = [copy]
    for _ in range(MAX_DEPTH):
        level = [item for one in level if isinstance(one, list | dict) for item in _items(one)]
        if not level:
            return copy
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
