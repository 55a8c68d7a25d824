"""Checkpoints of a training: any tree of sharded arrays, and where in its data it was, by Orbax's CheckpointManager.

    with Checkpoints(folder) as checkpoints:
        if checkpoints.newest is not None:
            start, state, position = checkpoints.restore(state)  # onto the shardings of this state
        ...
        checkpoints.save(step, state, {"row": row})  # returns once the arrays are copied; written meanwhile

All processes of a run make the same calls, and each writes and reads its own shards. What was saved by some processes
on one mesh is restored by any number of them on any other. A checkpoint is either whole or not there: Orbax writes it
under another name, and renames it. A model alone, for use, is written by `Gemma.save`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from gemma_checkpoints import CheckpointError

STATE, POSITION = "state", "position"  # the items of a checkpoint
MAX_SHOWN = 8  # mismatches in a message


class Restored(NamedTuple):
    """What was in a checkpoint."""

    step: int
    state: Any
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder, one a step.

    Args:
        folder: on a file system that all processes see. Made if need be. "gs://..." goes to Orbax as it is (untested).
        keep: how many of the newest stay; older ones are deleted.

    Raises: CheckpointError for a folder that is not the same in all processes; OSError for one that cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep is {keep}; wanted at least 1")
        text = os.fspath(folder)
        self.folder = epath.Path(text if "://" in text else Path(text).expanduser().absolute())
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        _check_shared(self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        handlers: Any = {STATE: ocp.StandardCheckpointHandler(), POSITION: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, or one that is being written by this run."""
        return sorted(self._manager.all_steps())

    @property
    def newest(self) -> int | None:
        """The last of `steps`; None for an empty folder."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Writes a checkpoint. Returns once the arrays are copied to the host, so they may be donated then.

        Args:
            step: larger than all steps before.
            state: a tree of jax.Arrays; in a run of several processes of global ones.
            position: of the data, as JSON; the same in all processes.

        Raises: ValueError for a step that is not new; TypeError for a leaf that is no jax.Array, or is of this process
            alone, by its path; what went wrong while the checkpoint before was written.
        """
        self._manager.check_for_errors()
        newest = self.newest
        if newest is not None and step <= newest:
            raise ValueError(f"{self.folder}: step {step} is not new, the newest checkpoint is of {newest}")
        arrays = named(state)
        _check_leaves(arrays)
        text = json.dumps(dict(position))  # before anything is written
        items = {STATE: ocp.args.StandardSave(arrays), POSITION: ocp.args.JsonSave(json.loads(text))}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Reads a checkpoint.

        Args:
            like: a tree as the saved one, of arrays or `jax.ShapeDtypeStruct`s with shardings; each says where its
                array goes, on whatever mesh.
            step: which; the newest if None.

        Raises: CheckpointError if there is none, it is damaged, or its arrays have other paths, shapes or dtypes than
            `like`: none is left out, cut or cast. ValueError for a leaf of `like` without a sharding.
        """
        step = self._found(step)
        folder = self.folder / str(step)
        wanted = {path: _abstract(path, leaf) for path, leaf in named(like).items()}
        for item in (STATE, POSITION):
            if not (folder / item).exists():
                raise CheckpointError(f"{folder} is incomplete, its {item} is missing; {self._others(step)}")
        items: Any = {STATE: ocp.args.StandardRestore(wanted), POSITION: ocp.args.JsonRestore()}
        try:
            _check_fit(f"{folder}", self._stored(step), wanted)
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (CheckpointError, jax.errors.JaxRuntimeError):  # the latter of devices, such as one whose memory is full
            raise
        except Exception as error:  # Orbax raises no narrower one for pieces that cannot be read
            raise CheckpointError(f"{folder} cannot be read ({_reason(error)}); {self._others(step)}") from error
        state = jax.tree.unflatten(jax.tree.structure(like), [read[STATE][path] for path in wanted])
        return Restored(step, state, read[POSITION])

    def is_preempted(self, step: int) -> bool:
        """True in all processes at the same step, once one of them was told to end (SIGTERM): time to save and stop.

        To be asked at each step, with the same step in all. In runs of one process always False.
        """
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns once the last checkpoint is written. Raises what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None or jax.process_count() == 1:  # after an error the others might never come to the end of a save
            self.close()

    def _found(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise CheckpointError(f"no whole checkpoint in {self.folder}")
        if step is not None and step not in steps:
            raise CheckpointError(f"no whole checkpoint of step {step} in {self.folder}; there are {_listed(steps)}")
        return steps[-1] if step is None else step

    def _others(self, step: int) -> str:
        others = [each for each in self.steps if each != step]
        return f"give step={others[-1]}, or one of {_listed(others)}" if others else "there is no other"

    def _stored(self, step: int) -> dict[str, Any]:
        """The metadata of the stored arrays by path."""
        metadata = self._manager.item_metadata(step)[STATE]
        if metadata is None:
            raise OSError("its metadata cannot be read")
        return dict(metadata.items())


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as "model/layers/0/mlp/w_down/value", in the tree's order."""
    flat, _ = jax.tree.flatten_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(names) != len(flat):
        raise ValueError("two leaves of the tree have the same path; do not use '/' in the keys of its dicts")
    return names


def _check_leaves(arrays: Mapping[str, Any]) -> None:
    for path, leaf in arrays.items():
        if not isinstance(leaf, jax.Array) or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"{path} is {_shown(leaf)}, wanted a jax.Array; of a random key give its jax.random.key_data"
            )
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise TypeError(
                f"{path} is on devices of process {jax.process_index()} alone ({leaf.sharding}), wanted a global "
                "array: make the state in a jax.jit with out_shardings on the mesh"
            )


def _abstract(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        raise ValueError(
            f"{path} is {_shown(leaf)} and has no sharding, which says where to restore it; give jax.Arrays, or "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_fit(folder: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError that names all that differs."""
    problems = [f"{path} is missing" for path in wanted if path not in stored]
    problems += [f"{path} is not wanted" for path in stored if path not in wanted]
    for path in wanted:
        if path in stored and _shown(stored[path]) != _shown(wanted[path]):
            problems.append(f"{path} is {_shown(stored[path])}, wanted {_shown(wanted[path])}")
    if problems:
        more = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise CheckpointError(
            f"{folder} does not fit: {'; '.join(problems[:MAX_SHOWN])}{more}. Is it of another model or optimizer?"
        )


def _shown(leaf: Any) -> str:
    """As "float32[4, 8]"."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return type(leaf).__name__ if shape is None or dtype is None else f"{dtype}{list(shape)}"


def _reason(error: BaseException) -> str:
    """The first line of what began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))


def _check_shared(folder: epath.Path) -> None:
    """Raises CheckpointError in all processes if some do not see the folder of process 0."""
    if jax.process_count() == 1:
        return
    marker = folder / f".shared-by-{jax.process_count()}"
    if jax.process_index() == 0:
        marker.write_text("")
    multihost_utils.sync_global_devices("gemma_jax.checkpoints.shared")
    seen = multihost_utils.process_allgather(np.asarray(marker.exists()))
    if jax.process_index() == 0:
        marker.unlink()
    blind = np.flatnonzero(~seen).tolist()
    if blind:
        raise CheckpointError(
            f"{folder}: processes {blind} do not see the folder that process 0 made; give a folder on a file system "
            "that all share"
        )
