"""A model on a mesh computes what it computes on one device: served, trained, with caches and keys cut in pieces."""

import json

import pytest

from tests.parallel import runs


def run(cases: list[list[str]]) -> list[dict[str, float]]:
    """The largest differences of each case; see mesh_worker.py."""
    return [found for _, found in runs.lines("parallel/mesh_worker.py", json.dumps(cases))]


SERVED = [
    ("gemma3", "data=2,model=4"),
    ("gemma3", "seq=4,model=2"),  # halo, gathered global keys, cache cut along its slots
    ("gemma3", "seq=8 ring"),
    ("wide window", "seq=8"),
    ("one key head", "seq=2,model=4"),  # keys whole along `model`, which cuts the slots as well
    ("gemma3n", "data=2,seq=2,model=2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mesh"), SERVED)
def test_logits_and_generation_on_a_mesh_are_those_of_one_device(model, mesh):
    (found,) = run([[model, mesh, "serve"]])
    assert found.pop("greedy tokens") == found.pop("sampled tokens") == 0
    assert set(found) == {"logits", "padded", "greedy", "sampled"}
    assert max(found.values()) <= 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("gemma3", "fsdp=2,seq=2,model=2"),
        ("one key head", "data=2,seq=2,model=2 ring"),
        ("small gemma3n", "fsdp=4,model=2"),
    ],
)
def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(model, mesh):
    (found,) = run([[model, mesh, "train"]])
    assert found["loss"] <= 1e-5, found
    assert found["gradient"] <= 1e-4, found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,seq=2,model=2", "fsdp=2,model=4"])  # each device 64 tokens at least
def test_mixtures_of_streams_are_kernels_on_a_mesh_too(mesh):
    """Widths lie along `model`, so that gradients of coefficients are sums over its devices."""
    (found,) = run([["", mesh, "mixed"]])
    assert found["mixed"] <= 1e-5, found


@pytest.mark.slow
def test_draws_on_a_mesh_keep_the_same_tokens_and_send_candidates_only():
    (found,) = run([["", "data=2,model=4", "draw"]])
    assert found["kept otherwise"] == found["best otherwise"] == 0
    assert found["largest collective"] <= 2 * 4 * 128 * 4  # bytes: two rows' candidates of four devices, not 8192


@pytest.mark.slow
def test_a_loaded_model_answers_on_a_mesh_as_on_one_device(model_folder):
    (found,) = run([[str(model_folder), "data=2,seq=2,model=2", "load"]])
    assert found.pop("warned") == 1
    assert found.pop("generate") == found.pop("stream") == found.pop("outside") == 0
    assert found.pop("draft of one device") == found.pop("draft of another mesh") == 0
    assert found.pop("sampled") == found.pop("compiled anew") == found.pop("unreadable") == 0
    assert set(found) == {"logits", "int8", "states", "score", "logprobs"}
    assert max(found.values()) <= 1e-5, found


@pytest.mark.slow
def test_stacked_layers_and_training_steps_on_a_mesh_are_those_of_one_device():
    cases = [["gemma3", "data=2,fsdp=2,model=2", "stacked"], ["gemma3", "fsdp=4,model=2", "steps"]]
    scanned, trained, adapted = run([*cases, ["gemma3", "data=2,fsdp=2,model=2", "adapter"]])
    assert scanned["loss"] <= 1e-5, scanned
    assert scanned["gradient"] <= 1e-4, scanned
    assert trained["loss"] <= 1e-5, trained
    assert trained["weights"] <= 1e-4, trained
    assert adapted["loss"] <= 1e-5, adapted
    assert adapted["factors"] <= 1e-3, adapted  # b starts at 0, where Adam's first steps magnify rounding


@pytest.mark.slow
def test_local_layers_send_a_window_and_only_global_ones_gather():
    (found,) = run([["gemma3", "seq=8", "sent"]])
    window, length, row = 16, 512, 2 * 4 * 8 * 4  # bytes of a token's keys and values in one of 4 layers, half local
    places = 4  # bytes of a token's position, sent once or with each layer
    ffw = 4 * 3 * 32 * 64 * 4  # bytes of the layers' ffws, which lie along `seq` too
    assert 2 * window * row <= found["halo collective-permute"] <= 2 * window * (row + places)
    assert 2 * length * row <= found["halo all-gather"] - ffw <= 2 * length * (row + places)
    assert found["gathered collective-permute"] == 0
    assert 4 * length * row <= found["gathered all-gather"] - ffw <= 4 * length * (row + places)
