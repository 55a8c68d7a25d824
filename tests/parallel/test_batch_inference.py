"""Many prompts: killed and started again, by any number of processes, the answers are those of one process."""

import importlib.util
import json
import time

import pytest

from tests.parallel import runs

SCRIPT = runs.ROOT / "examples/batch_inference.py"
COUNT, BATCH = 90, 2


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("batch_inference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"id": i, "prompt": "the cat " + "sat " * (i % 5)} for i in range(COUNT)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(model_folder, prompts, answers) -> list[str]:
    settings = ["--batch", str(BATCH), "--max-new-tokens", "8", "--temperature", "1"]
    return [str(model_folder), str(prompts), str(answers), *settings]


@pytest.mark.slow
def test_one_process_answers_all_and_does_nothing_twice(example, model_folder, prompts, tmp_path, monkeypatch):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:5]))
    answers = tmp_path / "answers.jsonl"
    real, done = example.answers, []

    def some(gemma, lines, start, args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(start)
        return real(gemma, lines, start, args)

    monkeypatch.setattr(example, "answers", some)
    with pytest.raises(KeyboardInterrupt):
        example.main(arguments(model_folder, few, answers))
    assert done == [0, 2]
    assert not answers.exists()
    done.clear()
    example.main(arguments(model_folder, few, answers))
    assert done == [4]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(5))
    assert all(line["finish_reason"] in ("stop", "length") and line["completion"] is not None for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "few.jsonl"]
    with pytest.raises(SystemExit, match=r"answers\.jsonl is there already"):
        example.main(arguments(model_folder, few, answers))


def test_parts_of_other_settings_are_not_joined(example, tmp_path):
    example.claim(tmp_path / "parts", {"model": "a", "batch": 8, "seed": 0})
    example.claim(tmp_path / "parts", {"model": "a", "batch": 8, "seed": 0})
    with pytest.raises(SystemExit, match="was begun with other batch, model; remove it to begin anew"):
        example.claim(tmp_path / "parts", {"model": "b", "batch": 4, "seed": 0})


@pytest.mark.parametrize(
    ("text", "message"), [("{", "line 2: Expecting"), ("[]", 'line 2: wanted {"prompt"'), ('{"prompt": 1}', "line 2")]
)
def test_a_bad_line_is_named(example, tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + text + "\n")
    with pytest.raises(SystemExit, match=message):
        example.read_prompts(path)


@pytest.mark.slow
def test_two_processes_of_which_one_was_killed_give_the_answers_of_one(model_folder, prompts, tmp_path):
    common = [str(SCRIPT), *arguments(model_folder, prompts, tmp_path / "two.jsonl")]

    def begin():
        where = ["--how", "manual", "--coordinator", f"127.0.0.1:{runs.free_port()}", "--processes", "2"]
        return runs.launch([[*common, *where, "--process", str(i)] for i in range(2)])

    processes = begin()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("two.jsonl.parts/0*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.005)
    processes[1].kill()
    ended = runs.wait(processes)
    assert [each.code for each in ended] == [75, -9], ended[0].errors[-3000:]
    assert "process 1 of 2 was lost" in ended[0].errors
    assert not (tmp_path / "two.jsonl").exists()
    assert 0 < len(list(tmp_path.glob("two.jsonl.parts/0*.jsonl"))) < COUNT // BATCH
    for each in runs.wait(begin()):
        assert each.code == 0, each.errors[-3000:]
    (one,) = runs.wait(runs.launch([[str(SCRIPT), *arguments(model_folder, prompts, tmp_path / "one.jsonl")]]))
    assert one.code == 0, one.errors[-3000:]
    answers = (tmp_path / "two.jsonl").read_text()
    assert answers == (tmp_path / "one.jsonl").read_text()
    assert [json.loads(line)["id"] for line in answers.splitlines()] == list(range(COUNT))


@pytest.mark.slow
def test_two_processes_with_one_model_give_the_answers_of_one(model_folder, prompts, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:6]))
    together = [str(SCRIPT), *arguments(model_folder, few, tmp_path / "two.jsonl"), "--mesh", "data=2,model=2"]
    together += ["--how", "manual", "--coordinator", f"127.0.0.1:{runs.free_port()}", "--processes", "2"]
    alone = [str(SCRIPT), *arguments(model_folder, few, tmp_path / "one.jsonl")]
    for each in runs.wait(runs.launch([[*together, "--process", str(i)] for i in range(2)]) + runs.launch([alone])):
        assert each.code == 0, each.errors[-3000:]
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
