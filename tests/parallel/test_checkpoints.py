"""A training's checkpoint gives back every array, on any mesh and in any number of processes, or says what is wrong."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_checkpoints import CheckpointError
from gemma_jax import train
from gemma_jax.parallel import checkpoints
from gemma_jax.parallel.checkpoints import Checkpoints
from tests.parallel import runs


def tree(scale: float = 1.0):
    return {"w": jnp.arange(6.0).reshape(2, 3) * scale, "more": [jnp.ones(4, jnp.bfloat16), jnp.int32(7)]}


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 3, 5 and 8; that of step 8 holds `tree(8)`."""
    with Checkpoints(tmp_path / "run") as all_of_it:
        for step in (3, 5, 8):
            all_of_it.save(step, tree(step), {"row": 10 * step})
    return tmp_path / "run"


def test_a_model_and_its_optimizer_come_back(tiny_model, tmp_path):
    state = train.start(tiny_model, optax.adamw(1e-3))
    with Checkpoints(tmp_path) as made:
        made.save(4, state, {"epoch": 1, "row": 96})
        made.wait()
        step, found, position = made.restore(jax.tree.map(jnp.zeros_like, state))
    assert (step, position) == (4, {"epoch": 1, "row": 96})
    assert_same(found, state)


def test_the_newest_is_restored_or_the_one_asked_for(saved):
    with Checkpoints(saved) as found:
        assert (found.steps, found.newest) == ([3, 5, 8], 8)
        assert_same(found.restore(tree()).state, tree(8))
        assert found.restore(tree(), step=3).position == {"row": 30}


def test_only_some_are_kept(saved):
    with Checkpoints(saved, keep=2) as found:
        found.save(9, tree(), {})
        found.wait()
        assert found.steps == [8, 9]
    assert sorted(path.name for path in saved.iterdir()) == ["8", "9"]


def test_what_a_killed_run_left_half_written_is_removed(saved):
    (saved / "9.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpoints(saved) as found:
        assert found.newest == 8
        found.save(10, tree(), {})
    assert sorted(path.name for path in saved.iterdir()) == ["10", "5", "8"]


def test_an_empty_folder_has_no_newest(tmp_path):
    with Checkpoints(tmp_path / "new") as found:
        assert found.newest is None
        with pytest.raises(CheckpointError, match=f"no whole checkpoint in {tmp_path}/new"):
            found.restore(tree())


def test_a_step_that_is_not_there_is_refused(saved):
    with Checkpoints(saved) as found, pytest.raises(CheckpointError, match=r"step 4 in .*; there are 3, 5, 8"):
        found.restore(tree(), step=4)


@pytest.mark.parametrize("step", [8, 2])
def test_a_step_that_is_not_new_is_refused(saved, step):
    with Checkpoints(saved) as found, pytest.raises(ValueError, match=f"step {step} is not new, the newest .* is of 8"):
        found.save(step, tree(), {})


def test_all_that_does_not_fit_is_named(saved):
    like = {"w": jnp.zeros((3, 2)), "more": [jnp.ones(4), jnp.int32(0), jnp.zeros(1)]}
    with Checkpoints(saved) as found, pytest.raises(CheckpointError) as raised:
        found.restore(like)
    message = str(raised.value)
    for part in (
        f"{saved}/8 does not fit",
        "more/2 is missing",
        "w is float32[2, 3], wanted float32[3, 2]",
        "more/0 is bfloat16[4], wanted float32[4]",
        "Is it of another model or optimizer?",
    ):
        assert part in message
    with (
        Checkpoints(saved) as found,
        pytest.raises(CheckpointError, match="more/0 is not wanted; more/1 is not wanted"),
    ):
        found.restore({"w": jnp.zeros((2, 3))})


def test_many_mismatches_are_counted(saved):
    with Checkpoints(saved) as found, pytest.raises(CheckpointError, match="and 15 more"):
        found.restore({i: jnp.zeros(1) for i in range(20)})


@pytest.mark.parametrize("item", ["state", "position"])
def test_an_incomplete_checkpoint_says_what_is_missing(saved, item):
    shutil.rmtree(saved / "8" / item)
    with Checkpoints(saved) as found:
        with pytest.raises(
            CheckpointError, match=rf"8 is incomplete, its {item} is missing; give step=5, or one of 3, 5"
        ):
            found.restore(tree())
        assert found.restore(tree(), step=5).step == 5


# TensorStore's callbacks come after Orbax has closed its event loop because of the first error
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "state/_METADATA", "position/metadata"])
def test_a_damaged_checkpoint_is_refused(saved, file):
    (saved / "8" / file).unlink()
    with Checkpoints(saved) as found, pytest.raises(CheckpointError, match=r"8 cannot be read \(.*\); give step=5"):
        found.restore(tree())


@pytest.mark.parametrize("leaf", [np.zeros(3), 1.5, jax.random.key(0)], ids=["numpy", "float", "key"])
def test_leaves_that_are_no_arrays_are_refused_by_path(tmp_path, leaf):
    with Checkpoints(tmp_path) as made, pytest.raises(TypeError, match=r"a/0 is .*, wanted a jax\.Array"):
        made.save(1, {"a": [leaf]}, {})


def test_what_is_restored_needs_a_sharding(saved):
    like = jax.eval_shape(tree)
    with Checkpoints(saved) as found, pytest.raises(ValueError, match=r"more/0 is bfloat16\[4\] and has no sharding"):
        found.restore(like)


def test_a_position_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with Checkpoints(tmp_path) as made:
        with pytest.raises(TypeError, match="not JSON serializable"):
            made.save(1, tree(), {"row": object()})
        assert made.steps == []


def test_paths_that_coincide_are_refused():
    with pytest.raises(ValueError, match="two leaves of the tree have the same path"):
        checkpoints.named({"a/b": 1, "a": {"b": 2}})


def test_nothing_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


STEPS = 8


def losses(ended) -> dict[int, float]:
    """The loss of each step, the same in all processes."""
    said = [dict(each.said) for each in ended]
    assert all(each == said[0] for each in said)
    return said[0]


@pytest.mark.slow
def test_a_training_of_which_one_process_was_killed_resumes_in_any_number_of_processes(tmp_path):
    whole = losses(runs.run(1, task="train", folder=str(tmp_path / "whole"), steps=STEPS))
    ended = runs.wait(runs.start(3, task="train", folder=str(tmp_path / "run"), steps=STEPS, deed="killed", victim=1))
    assert [each.code for each in ended] == [75, -9, 75], ended[0].errors[-3000:]
    for each in (ended[0], ended[2]):
        assert "process 1 of 3 was lost" in each.errors
    before = dict(ended[0].said)
    for count in (1, 3, 4):
        folder = tmp_path / f"run of {count}"
        shutil.copytree(tmp_path / "run", folder)
        again = losses(runs.run(count, task="train", folder=str(folder), steps=STEPS))
        begin = min(again)
        assert begin in (2, 4)  # the newest that was whole when the process was killed
        assert again == pytest.approx({i: whole[i] for i in range(begin, STEPS)}, rel=1e-6), count
        if count == 3:
            assert [again[i] for i in range(begin, 6)] == [before[i] for i in range(begin, 6)]


@pytest.mark.slow
def test_a_process_told_to_end_makes_all_save_at_the_same_step(tmp_path):
    ended = runs.run(2, task="train", folder=str(tmp_path), steps=200, pause_s=0.1, deed="told", victim=1)
    done = losses(ended)
    with Checkpoints(tmp_path) as found:
        assert found.newest == max(done) + 1
    assert 6 <= max(done) < 199


@pytest.mark.slow
def test_arrays_of_two_processes_are_restored_on_other_meshes(tmp_path):
    axes = ({"data": 4}, {"data": 1, "model": 4}, {"data": 2, "model": 2})
    for each in runs.run(2, task="moved", folder=str(tmp_path), axes=axes):
        assert each.said == ["same", "same", "same"]
    (one,) = runs.run(1, devices=8, task="moved", folder=str(tmp_path), axes=({"data": 8}, {"data": 2, "model": 4}))
    assert one.said == ["same", "same"]


@pytest.mark.slow
def test_what_only_some_processes_could_save_or_see_is_refused(tmp_path):
    for each in runs.run(2, task="refused", folder=str(tmp_path)):
        own, elsewhere = each.said
        assert "w is on devices of process" in own
        assert "processes [1] do not see the folder" in elsewhere
