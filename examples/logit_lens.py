"""Draws what Gemma 3 270M would say after each of its layers: python examples/logit_lens.py logit_lens.png

Needs the extras demo (the weights) and bench (matplotlib).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import gemma_jax as gj
from gemma_jax import interp

PROMPT = "The capital of Japan is"


def look(gemma: gj.Gemma, prompt: str) -> tuple[list[str], list[list[str]], np.ndarray]:
    """The prompt's tokens as text, and of each layer and place the likeliest next token and its probability."""
    tokenizer = gemma.tokenizer
    assert tokenizer is not None
    ids = gemma.ids(prompt)
    lens = interp.logit_lens(gemma, np.asarray([ids]), 1)
    best = np.asarray(lens.ids)[:, 0, :, 0]
    words = [[shown(tokenizer.decode([token])) for token in row] for row in best.tolist()]
    return ["<bos>", *(shown(tokenizer.decode([token])) for token in ids[1:])], words, np.exp(lens.logprobs)[:, 0, :, 0]


def shown(text: str) -> str:
    """A token as a font without other scripts can draw it: \\n as such, what is not Latin or Greek as its code."""
    text = "".join(c if c.isprintable() and ord(c) < 0x500 else f"\\u{ord(c):04x}" for c in text.replace("\n", "\\n"))
    if text.isspace():
        return "(blank)"
    return text if len(text) <= 12 else text[:11] + "…"


def draw(pyplot: Any, prompt: list[str], words: list[list[str]], chances: np.ndarray) -> Any:
    """Layers from the bottom up, places from left to right."""
    figure, axes = pyplot.subplots(figsize=(1.15 * len(prompt) + 1.6, 0.34 * len(words) + 1.2), layout="constrained")
    image = axes.imshow(chances, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for (layer, place), chance in np.ndenumerate(chances):
        colour = "white" if chance > 0.55 else "black"
        # with $ as it stands, and not as the beginning of a formula
        axes.text(place, layer, words[layer][place], ha="center", va="center", size=8, color=colour, parse_math=False)
    axes.set_xticks(range(len(prompt)), prompt)
    axes.set_yticks(range(len(words)), ["embedding", *(f"layer {i}" for i in range(len(words) - 1))], size=8)
    axes.set_xlabel("token read")
    axes.set_title("Gemma 3 270M: likeliest next token after each layer", size=10)
    figure.colorbar(image, label="its probability", aspect=40)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="where the PNG is written")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--model", default="gemma-3-270m")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: pip install 'gemma-jax[bench]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = draw(pyplot, *look(gj.load(args.model), args.prompt))
    figure.savefig(args.picture, dpi=110)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
