"""The canonical name of every weight, the same in every file format and for stacked and unstacked decoders."""

from flax import nnx


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a module by canonical path, such as "layers_3/attn/q/kernel" (spec: weight_names.md, 0).

    Attributes become path parts: `layers[3]` is layers_3, `w_q` is q/kernel; all others keep their names.
    """
    return {_canonical(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}


def _canonical(path: tuple[object, ...]) -> str:
    parts: list[str] = []
    for key in path:
        if isinstance(key, int):
            parts[-1] += f"_{key}"
        elif str(key).startswith("w_"):
            parts += [str(key).removeprefix("w_"), "kernel"]
        else:
            parts.append(str(key))
    return "/".join(parts)
