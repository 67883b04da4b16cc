"""flan-t5_samsum.py: where settings come from, and which of them may differ from those of an earlier run."""

import json
import os
import re
import subprocess

import pytest
from conftest import SCRIPT, python, write_jsonl


@pytest.fixture
def settings(flan, monkeypatch):
    """settings(*words, processes=1): the parsed command line, or the UserError."""

    def parse(*words, processes=1):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return flan.parse_settings([str(word) for word in words])

    return parse


HEAD = {"processes": 1, "optimizer": {}, "data": {}}  # what --resume compares


def run_with(folder, **configuration):
    """A folder that counts as a run with an adapter; its configuration is that of `--model small`, but for this."""
    saved = {"model": "small", "dataset": "samsum", "lr": 1e-4, "epochs": 10, "batch_size": 8, "micro_batch_size": 8,
             "int8": False, "int4": False, "full": False, "gradient_checkpointing": False, "max_steps": None,
             "max_new_tokens": 64}  # fmt: skip
    (folder / "adapter").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(HEAD | {"configuration": saved | configuration}))
    return folder


def test_the_recipe_and_the_preset(settings):
    xl, tiny = settings("--model", "xl"), settings()
    own = settings("--lr", "5e-4", "--epochs", "2", "--dataset", "samsum")
    assert (xl.dataset, xl.lr, xl.epochs, xl.batch_size) == ("samsum", 1e-4, 10, 8)
    assert (xl.lora_r, xl.lora_alpha, xl.lora_dropout, xl.lora_targets) == (16, 32, 0.05, ["q", "k", "v", "o"])
    assert (tiny.model, tiny.dataset) == ("tiny", "sample") and tiny.lr > xl.lr and tiny.epochs < xl.epochs
    assert (own.model, own.dataset, own.lr, own.epochs) == ("tiny", "samsum", 5e-4, 2)


def test_a_folder_named_like_a_preset_does_not_take_its_place(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("samsum", "sample", "small"):
        (tmp_path / name).mkdir()
    assert settings().dataset == "sample" and settings("--model", "small").dataset == "samsum"
    assert settings("--model", "small").model == "small"
    assert settings("--dataset", "./samsum").dataset == str(tmp_path / "samsum")


@pytest.mark.parametrize("flag", ["--evaluate", "--summarize", "--export"])
def test_use_takes_the_settings_of_the_run(settings, tmp_path, flag):
    run = run_with(tmp_path / "run")
    value = {"--export": ["out"], "--summarize": ["-"]}.get(flag, [])
    args = settings(flag, *value, "--adapter", run)
    assert (args.model, args.dataset, args.max_new_tokens) == ("small", "samsum", 64)
    # However many processes share the work: the batch of the training is no concern of theirs.
    assert settings("--evaluate", "--adapter", run, processes=3).max_new_tokens == 64
    assert settings("--evaluate", "--adapter", run, "--max-new-tokens", "9").max_new_tokens == 9


@pytest.mark.parametrize("saved, flag", [("int8", "int4"), ("int4", "int8"), ("full", "int8")])
def test_a_precision_that_is_given_replaces_that_of_the_run(settings, tmp_path, saved, flag):
    run = run_with(tmp_path / "run", **{saved: True})
    args = settings("--evaluate", "--adapter", run)
    assert {name for name in ("int8", "int4", "full") if getattr(args, name)} == {saved}
    args = settings("--evaluate", "--adapter", run, f"--{flag}")
    assert {name for name in ("int8", "int4", "full") if getattr(args, name)} == {flag}


def test_resume_may_change_memory_but_no_result(flan, settings, tmp_path):
    run = run_with(tmp_path / "run")
    args = settings("--resume", "--output-dir", run, "--micro-batch-size", "2", "--gradient-checkpointing")
    assert (args.micro_batch_size, args.gradient_checkpointing, args.batch_size) == (2, True, 8)
    for words in (["--int8"], ["--lr", "1e-3"], ["--max-new-tokens", "128"], ["--seed", "1"]):
        if words[0] == "--seed":
            (run / "metrics.json").write_text(json.dumps(HEAD | {"configuration": {"seed": 42}}))
        with pytest.raises(flan.UserError, match=words[0]):
            settings("--resume", "--output-dir", run, *words)


def test_an_adapter_that_lies_alone_names_its_base(flan, settings, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": "google/flan-t5-xl"}))
    args = settings("--evaluate", "--adapter", folder)
    assert (args.model, args.dataset, args.lr) == ("xl", "samsum", 1e-4)  # the recipe of that size, not of tiny
    assert settings("--evaluate", "--adapter", folder, "--model", "large").model == "large"
    path.write_text(json.dumps({"base_model_name_or_path": "somebody/t5"}))
    assert settings("--evaluate", "--adapter", folder).model == "somebody/t5"
    for damaged in ("{", "{}", '{"base_model_name_or_path": null}', "[]"):
        path.write_text(damaged)
        with pytest.raises(flan.UserError, match="--model NAME"):
            settings("--evaluate", "--adapter", folder)


@pytest.mark.parametrize("given, seen", [(None, "0"), ("", ""), ("3", "3"), ("2,5", "2")])
def test_without_torchrun_one_gpu_is_used(given, seen):
    """Else the Trainer takes all it sees, by the slow DataParallel, and multiplies the batch by their number."""
    code = ("import importlib.util as u, os; s = u.spec_from_file_location('s', {!r}); m = u.module_from_spec(s); "
            "s.loader.exec_module(m); print(repr(os.environ['CUDA_VISIBLE_DEVICES']))")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    done = subprocess.run([*python(), "-c", code.format(str(SCRIPT))], env=environment, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == repr(seen)


@pytest.mark.parametrize("words", [("--epoch", "3"), ("--lr-f",), ("--summ", "x.txt")])
def test_flags_cannot_be_abbreviated(command, tmp_path, words):
    done = command(*words, cwd=tmp_path)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and words[0] in done.err


def test_out_of_memory_is_never_called_damage(flan, command, trained, tmp_path, monkeypatch):
    """Whoever reads "damaged" deletes good work. The advice names flags of what was asked for."""

    def no_room(*args, **kwargs):
        raise flan.torch.OutOfMemoryError("CUDA out of memory")

    chat = write_jsonl(tmp_path / "chats.jsonl", [{"dialogue": "Ada: Hi!"}])
    for name, words in (("PeftModel", ("--summarize", chat)), ("AutoModelForSeq2SeqLM", ("--summarize", chat)),
                        ("AutoModelForSeq2SeqLM", ("--export", "out"))):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(getattr(flan, name), "from_pretrained", no_room)
            done = command(*words, "--adapter", trained.folder, cwd=tmp_path)
        assert done.code == 2 and done.err.splitlines()[-1].startswith("error: out of memory"), done
        assert "--micro-batch-size" not in done.err and ("--int8" in done.err) == (words[0] != "--export")
    wrapped = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("CUDA out of memory. Tried to allocate"))
    monkeypatch.setattr(flan.AutoModelForSeq2SeqLM, "from_pretrained", wrapped)  # as when it quantises
    done = command("--summarize", chat, "--adapter", trained.folder, cwd=tmp_path)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: out of memory"), done
    with pytest.raises(flan.torch.OutOfMemoryError), flan.writing_to(tmp_path):
        no_room()


def test_no_memory_on_a_cpu_is_one_line_and_other_errors_are_none(flan, command, trained, tmp_path, monkeypatch):
    chat = write_jsonl(tmp_path / "chats.jsonl", [{"dialogue": "Ada: Hi!"}])
    for error in (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()):
        monkeypatch.setattr(flan, "summarize", lambda settings, error=error: (_ for _ in ()).throw(error))
        done = command("--summarize", chat, "--adapter", trained.folder, cwd=tmp_path)
        assert done.code == 2 and done.err.count("\n") == 1 and "memory" in done.err, done
    monkeypatch.setattr(flan, "summarize", lambda settings: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        command("--summarize", chat, "--adapter", trained.folder, cwd=tmp_path)


def test_help_says_what_the_tiny_model_takes(flan):
    texts = {field.name: field.metadata.get("help", "") for field in flan.fields(flan.Settings)}
    said = {name: float(found[1]) for name, text in texts.items() if (found := re.search(r"tiny: ([\d.e-]+)", text))}
    assert said == {name: value for name, value in flan.PRESETS["tiny"].items() if name != "dataset"}


def test_a_run_of_the_other_script_is_never_taken(flan, settings, tmp_path, monkeypatch):
    """runs/ holds those of both."""
    monkeypatch.chdir(tmp_path)
    own = run_with(tmp_path / "runs/sample/own")  # as in the README's experiments
    other = run_with(tmp_path / "runs/other", block_size=1024)  # newer
    for run in (own, other):
        (run / "checkpoints/step-00000001").mkdir(parents=True)
    assert settings("--resume").output_dir.name == "own" and settings("--evaluate").adapter == "runs/sample/own"
    for words in (("--resume", "--output-dir", other), ("--evaluate", "--adapter", other)):
        with pytest.raises(flan.UserError, match=r"gpt2_from_scratch\.py"):
            settings(*words)


def test_who_uses_an_unfinished_run_is_told(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = run_with(tmp_path / "runs/own")
    metrics = json.loads((run / "metrics.json").read_text())
    for status, results in (("finished", {"best_epoch": 1}), ("interrupted", {"best_epoch": 0}),
                            ("interrupted", {"best_epoch": 2}), ("running", {"best_epoch": None}), ("running", {})):
        (run / "metrics.json").write_text(json.dumps(metrics | {"status": status, "results": results}))
        settings("--summarize")
        word = "not finished" if status == "running" else status  # killed
        best = "its best epoch so far is 2" if results.get("best_epoch") == 2 else "its model is as good as untrained"
        assert (f"is {word}; {best}" in capsys.readouterr().err) is (status != "finished")


@pytest.mark.parametrize(("words", "beams"), [
    (["--summarize", "x", "--model", "tiny"], 8), (["--summarize", "x", "--model", "tiny", "--num-beams", "1"], 1),
    (["--evaluate", "--model", "tiny"], 1), (["--summarize", "x", "--model", "base"], 1)])  # fmt: skip
def test_the_toy_summarises_with_beams_and_is_scored_greedily(flan, words, beams):
    assert flan.parse_settings([*words, "--adapter", "none"]).num_beams == beams


def test_the_beams_of_a_toy_s_run_are_kept(flan, tmp_path):
    (tmp_path / "adapter").mkdir()
    for beams, expected in ((4, 4), (1, 8)):
        (tmp_path / "metrics.json").write_text(json.dumps({"configuration": {"model": "tiny", "num_beams": beams}}))
        assert flan.parse_settings(["--summarize", "x", "--adapter", str(tmp_path)]).num_beams == expected
