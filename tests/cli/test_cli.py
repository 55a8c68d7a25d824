"""Every verb in this process, on a tiny model."""

import io
import json

import pytest

import gemma_jax as gj
from gemma_jax.cli.main import main


@pytest.fixture
def run(capsys, model_folder):
    """Runs a command; exit code, standard output, standard error."""

    def run(*arguments: str, model: bool = True) -> tuple[int, str, str]:
        extra = ["--model", str(model_folder), "--no-compilation-cache"] if model else []
        try:
            code = main([*arguments, *extra])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_generate_streams_what_generate_gives(run, model_folder):
    want = gj.load(model_folder).generate("hello", max_new_tokens=6).text
    assert run("generate", "hello", "-n", "6")[:2] == (0, f"hello{want}\n")


def test_generate_batches_prompts_and_speaks_json(run, model_folder):
    code, out, _ = run("generate", "hello", "the user", "-n", "4", "--logprobs", "1", "--json")
    report = json.loads(out)
    want = gj.load(model_folder).generate(["hello", "the user"], max_new_tokens=4)
    assert code == 0
    assert [c["tokens"] for c in report["completions"]] == [done.tokens for done in want]
    assert [c["prompt"] for c in report["completions"]] == ["hello", "the user"]
    assert all(len(c["logprobs"]) == len(c["tokens"]) for c in report["completions"])


def test_generate_takes_a_draft(run, model_folder):
    code, out, _ = run("generate", "hello", "-n", "7", "--json", "--draft", str(model_folder), "--draft-tokens", "2")
    (done,) = json.loads(out)["completions"]
    assert code == 0
    assert done["tokens"] == gj.load(model_folder).generate("hello", max_new_tokens=7).tokens
    assert done["num_accepted_tokens"] > 0
    code, _, err = run("generate", "hello", "--draft-tokens", "2")
    assert (code, "there is no draft" in err) == (2, True)


def test_generate_reads_standard_input_without_a_prompt(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    code, out, _ = run("generate", "-n", "2")
    assert code == 0
    assert out.startswith("hello")


def test_score_gives_each_token_and_the_perplexity(run, model_folder):
    want = gj.load(model_folder).score("hello world")
    code, out, _ = run("score", "hello world", "--json")
    report = json.loads(out)
    assert (code, report["tokens"]) == (0, want.tokens)
    assert report["perplexity"] == pytest.approx(want.perplexity, rel=1e-5)
    assert f"perplexity {want.perplexity:.3f}" in run("score", "hello world")[1]


def test_chat_answers_each_line_and_keeps_history(run, monkeypatch, model_folder):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nthe user\n/reset\nhello\n/quit\nnever read\n"))
    code, out, _ = run("chat", "-n", "5", "-t", "0", "--json")
    answers = [json.loads(line)["text"] for line in out.splitlines()]
    assert (code, len(answers)) == (0, 3)
    gemma = gj.load(model_folder)
    first = [{"role": "user", "content": "hello"}]
    options = {"max_new_tokens": 5, "temperature": 0.0}
    assert answers[0] == answers[2] == gemma.chat(first, **options).text
    both = [*first, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "the user"}]
    assert answers[1] == gemma.chat(both, **options).text


def test_inspect_reports_a_published_model_without_weights(run):
    code, out, _ = run("inspect", "gemma-3-1b", "--context", "2048", "--json", model=False)
    report = json.loads(out)
    assert code == 0
    assert report["parameters"]["all"] == 999_885_952  # gemma3.md, section 1.1
    assert report["config"]["attention"]["local"]["window"] == 512
    assert report["cache_bytes"] == 2 * 2 * 256 * (22 * 512 + 4 * 2048)  # keys and values, bfloat16; 22 local layers


def test_inspect_counts_the_towers_and_what_layers_share(run):
    """gemma3.md 1.2 and gemma3n.md 1: E2B stores keys in 4 global layers and 16 rings of 512."""
    report = json.loads(run("inspect", "gemma-3-4b", "--json", model=False)[1])
    assert report["parameters"]["all"] == 4_300_079_472 - 64 * 2560
    report = json.loads(run("inspect", "gemma-3n-e2b", "--json", model=False)[1])
    assert report["parameters"]["audio"] == 681_348_640
    assert report["effective_parameters"] == 1_905_495_648
    assert set(report["memory"]) == {"device"}
    report = json.loads(run("inspect", "gemma-3n-e2b", "--ple", "host", "--json", model=False)[1])
    assert report["memory"]["host"] == {"parameters": 2_013_265_920, "nbytes": 4_026_531_840}
    assert report["cache_bytes"] == (256 + 16) * 2**20


@pytest.mark.parametrize(
    ("target", "words"),
    [("v6e", "decode_attention: tpu {"), ("reference", "decode_attention: XLA (no kernel for reference)")],
)
def test_inspect_prints_which_kernels_serve(run, target, words):
    code, out, _ = run("inspect", "gemma-3-270m", "--kernels", target, "--context", "1024", model=False)
    assert code == 0
    choices = out[out.index("\ndecoding:\n") :]
    assert words in choices
    assert ("XLA" in choices) == (target == "reference")


def test_inspect_names_the_kernels_targets_for_another_one(run):
    code, _, err = run("inspect", "gemma-3-270m", "--kernels", "v4", "--context", "1024", model=False)
    assert code == 2
    assert "the kernels' target is 'v4'; wanted one of reference" in err


def test_inspect_lists_the_tensors_of_a_folder(run, model_folder):
    code, out, _ = run("inspect", str(model_folder), model=False)
    assert code == 0
    assert "model.layers.2.mlp.down_proj.weight" in out
    assert '"head_dim": 8' in out


def test_fields_are_set_by_path(run):
    out = run("inspect", "gemma-3-1b", "--set", "attention.local.window=256", "--json", model=False)[1]
    assert json.loads(out)["config"]["attention"]["local"]["window"] == 256


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", ""], 2, "prompt is empty"),
        (["generate", "x", "--top-p", "1.5"], 2, "top_p is 1.5"),
        (["generate", "x", "-t", "nan"], 2, "temperature is nan"),
        (["generate", "x", "-n", "0"], 2, "max_new_tokens is 0"),
        (["generate", "x", "-n", "many"], 2, "many"),
        (["generate", "z" * 400], 2, "at most 320"),
        (["generate", "x", "--set", "attention.window=3"], 2, "no field 'window'"),
        (["score", ""], 2, "prompt is empty"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(run, arguments, code, words):
    got, _, err = run(*arguments)
    assert got == code
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("no/such/file.gguf", 1, "does not exist"),
        ("gemma-3-271m", 2, "gemma-3-270m"),
        ("gemma-3-27b", 1, "gemma-3-27b-pt is not"),
    ],
)
def test_models_that_are_not_there_are_refused(run, model, code, words):
    for verb in (["generate", "x", "--model"], ["inspect"]):
        if verb == ["inspect"] and model == "gemma-3-27b":
            continue  # its config is known
        got, _, err = run(*verb, model, model=False)
        assert (got, words in err) == (code, True), err


def test_damaged_files_are_code_1(run, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_text("a text, not a model, though its name says so")
    for verb in (["generate", "x", "--model"], ["inspect"]):
        code, _, err = run(*verb, str(path), model=False)
        assert code == 1
        assert "not a GGUF" in err


def test_debug_shows_the_traceback(run):
    assert "Traceback" in run("generate", "x", "--top-p", "1.5", "--debug")[2]


@pytest.mark.parametrize(
    "verb", [[], *([verb] for verb in ("generate", "chat", "score", "inspect", "convert", "verify"))]
)
def test_help_explains_every_verb(run, verb):
    code, out, _ = run(*verb, "--help", model=False)
    assert code == 0
    assert "usage: gemma-jax" in out


def test_an_unknown_verb_is_bad_usage(run):
    code, _, err = run("sing", model=False)
    assert code == 2
    assert "generate" in err


def test_convert_writes_another_format_and_reports(run, model_folder, tmp_path):
    target = str(tmp_path / "copy")
    code, out, _ = run("convert", str(model_folder), target, "--to", "huggingface", "--verify", "--json", model=False)
    report = json.loads(out)
    assert code == 0
    assert (report["num_tensors"], report["is_verified"]) == (3 * 13 + 2, True)
    assert report["logit_difference"] < 1e-5
    code, out, err = run("convert", str(model_folder), target, "--to", "huggingface", model=False)
    assert (code, out) == (1, "")
    assert err.startswith(f"gemma-jax: error: {target} is there already")


@pytest.mark.parametrize("format", ["orbax", "huggingface", "deepmind"])
def test_inspect_and_verify_know_every_format(run, model_folder, tmp_path, format):
    target = tmp_path / "copy"
    assert run("convert", str(model_folder), str(target), "--to", format, model=False)[0] == 0
    code, out, _ = run("inspect", str(target), "--json", model=False)
    report = json.loads(out)
    assert (code, report["config"]["width"], len(report["tensors"])) == (0, 32, 35 if format == "deepmind" else 41)
    code, out, _ = run("verify", str(target), model=False)
    assert code == 0
    assert out.startswith("whole: ")
    (target / "more").write_text("x")
    code, out, _ = run("verify", str(target), "--json", model=False)
    assert code == 1
    assert json.loads(out)["problems"] == ["more is foreign: it was not written with the checkpoint"]


@pytest.mark.parametrize("format", ["orbax", "huggingface", "deepmind"])
def test_paths_may_be_relative_and_end_in_a_slash(run, model_folder, tmp_path, monkeypatch, format):
    monkeypatch.chdir(tmp_path)
    assert run("convert", str(model_folder), "out/", "--to", format, "--verify", model=False)[0] == 0
    assert run("verify", "out/", model=False)[0] == 0
    assert run("convert", "out", "again", "--to", "huggingface", model=False)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]
    code, _, err = run("convert", "out", "no/such/place", "--to", format, model=False)
    assert (code, "is no folder; make it first" in err) == (1, True)


def test_verify_says_that_others_files_have_no_digests(run, model_folder, tmp_path):
    code, out, _ = run("verify", str(model_folder), model=False)
    assert code == 0
    assert "holds no digests" in out
    code, out, _ = run("convert", str(model_folder), str(tmp_path / "x"), "--to", "gguf", model=False)
    assert code == 2  # two local layers and a global one are no pattern of GGUF's
    assert run("verify", str(tmp_path / "none"), model=False)[0] == 1


def test_a_conversation_that_outgrew_the_context_goes_on_at_a_terminal(run, monkeypatch):
    """320 tokens of context; the second line is too long, and the third answers to the first two turns alone."""
    lines = "hello\n" + "hello " * 400 + "\nthe user\n"
    for is_terminal, code_wanted in ((True, 0), (False, 2)):
        stdin = io.StringIO(lines)
        stdin.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, err = run("chat", "-n", "3", "-t", "0", "--json")
        assert code == code_wanted
        assert out.count("finish_reason") == (2 if is_terminal else 1)
        assert "reads at most 320" in err


def test_a_prompt_is_checked_before_it_is_shown(run):
    code, out, err = run("generate", "hello " * 400)
    assert (code, out) == (2, "")
    assert "reads at most 320" in err


def test_an_empty_name_is_no_model(run):
    for arguments in (("generate", "hi", "--model", ""), ("inspect", "")):
        code, _, err = run(*arguments, model=False)
        assert code == 2
        assert "is an empty text" in err
