"""flan-t5_samsum.py: what a run leaves is used: --summarize, --evaluate, --export.

The references are the table and the predictions of the run itself (test_flan_t5_runs.py compares these with plain
transformers and PEFT), transformers without this script, and W + (alpha / r) B A by hand.
"""

import io
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import RECIPE, ROWS, SCRIPT, python
from rouge_score import rouge_scorer
from safetensors.torch import load_file

TOKENS = int(RECIPE[-1])  # --max-new-tokens of the runs


def best_predictions(run, split="test"):
    """The rows of the evaluation that the run's adapter comes from."""
    epoch = json.loads((run / "metrics.json").read_text("utf-8"))["results"]["best_epoch"]
    lines = (run / f"predictions/{split}-epoch-{epoch}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows(trained):
    """The test rows in another order than in the run, so that a summary of another row shows."""
    rows = best_predictions(trained.folder)[::-1]
    assert len(rows) == ROWS["test"] and len({row["prediction"] for row in rows}) > 2
    return rows


@pytest.fixture(scope="module")
def quantised(command, data, model_folder, tmp_path_factory):
    """The folder of a finished run with --int8."""
    home = tmp_path_factory.mktemp("int8")
    done = command("--model", model_folder, "--dataset", data, "--epochs", "2", "--int8", *RECIPE, cwd=home)
    assert done.code == 0, done
    return next((home / "runs").iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# --export
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bf16", "int8"])
def merged(request, command, trained, tmp_path_factory):
    """(run, folder with its merged model), after an ordinary run and after one with --int8."""
    run = trained.folder if request.param == "bf16" else request.getfixturevalue("quantised")
    folder = tmp_path_factory.mktemp("merged") / "new" / "model"
    done = command("--export", folder, cwd=run.parents[1])  # of the newest run
    assert done.code == 0 and str(folder) in done.out, done
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing half-written beside it
    return run, folder


def test_merged_weights_are_the_base_plus_the_adapter_rounded_once(flan, merged, model_folder):
    """Of the bf16 base: INT8 would show as a rounding to 1/127 of a row's largest weight."""
    run, folder = merged
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    written, changed = load_file(folder / "model.safetensors"), 0
    for name, weight in load_file(model_folder / "model.safetensors").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            delta = 32 / 16 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            changed += bool(delta.abs().max() > 0.02)  # the weights are about 0.1 to 1
            weight = weight + delta
        assert written[name].dtype == flan.torch.bfloat16
        flan.torch.testing.assert_close(written[name].float(), weight, rtol=2**-8, atol=1e-7)  # 8 bits
    assert changed == 24  # q, k, v, o of two encoder layers and twice in two decoder layers


def test_plain_transformers_loads_the_merged_model_and_summarises_alike(flan, merged, model_folder):
    """In bf16, as the adapter on its base: logits that differ by far less than the adapter changes them, same tokens.

    Not every token: with 8 bits the two best ones of this tiny model are at times exactly equal.
    """
    torch, transformers = flan.torch, flan.transformers
    run, folder = merged
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    for config in (folder / "config.json", run / "adapter/adapter_config.json"):  # others may read the weights, too
        assert {file.stat().st_mode for file in config.parent.iterdir()} == {config.stat().st_mode}
    assert model.dtype == torch.bfloat16 and not model.lm_head.weight.equal(model.shared.weight)
    assert json.loads((folder / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False  # older versions
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    greedy = {"max_new_tokens": TOKENS, "num_beams": 1, "decoder_start_token_id": 0, "eos_token_id": 1,
              "pad_token_id": 0}  # fmt: skip
    base.generation_config = transformers.GenerationConfig(**greedy)
    assert {name: getattr(model.generation_config, name) for name in greedy} == greedy  # those of the run
    adapted = flan.peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    rows = [*best_predictions(run), *best_predictions(run, "validation")]
    same, difference, effect = 0, 0, 0
    for row in rows:
        source = tokenizer("summarize: " + row["dialogue"], return_tensors="pt")
        with torch.inference_mode():
            summary, expected = model.generate(**source), adapted.generate(**source)
            assert summary.equal(model.generate(**source, generation_config=base.generation_config))
            logits = [net(**source, decoder_input_ids=expected).logits.float() for net in (model, adapted)]
            with adapted.disable_adapter():
                bare = adapted(**source, decoder_input_ids=expected).logits.float()
        same += summary.equal(expected)
        difference += (logits[0] - logits[1]).square().sum()
        effect += (bare - logits[1]).square().sum()
    assert same >= 0.75 * len(rows) and difference.sqrt() < 0.1 * effect.sqrt()


def test_merging_into_an_empty_folder(command, trained, tmp_path, recwarn):
    (tmp_path / "empty").mkdir()
    done = command("--export", "empty", "--adapter", trained.folder, cwd=tmp_path)
    assert done.code == 0 and (tmp_path / "empty/model.safetensors").is_file(), done
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert [line.split(": ")[0] for line in done.err.splitlines()] == ["model", "trained"]
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_of_several_processes_one_exports(flan, command, trained, tmp_path, monkeypatch):
    """Two would delete and rename each other's folder."""
    monkeypatch.setattr(flan, "is_main_process", lambda: False)
    done = command("--export", "merged", "--adapter", trained.folder, cwd=tmp_path)
    assert done.code == 0 and not [*tmp_path.iterdir()], done


def test_the_current_folder_holds_a_run_but_no_merged_model(command, trained, data, model_folder, tmp_path):
    """A merged model comes by renaming, which would leave the user in a folder that is gone."""
    done = command("--export", ".", "--adapter", trained.folder, cwd=tmp_path)
    assert done.code == 2 and done.err == "error: --export .: choose a folder with a name\n", done
    done = command("--model", model_folder, "--dataset", data, "--max-steps", "1", "--output-dir", ".", cwd=tmp_path)
    assert done.code == 0 and (tmp_path / "adapter").is_dir(), done


# ----------------------------------------------------------------------------------------------------------------------
# --summarize: one line per dialogue, in order, and nothing else on standard output
# ----------------------------------------------------------------------------------------------------------------------


def as_text(rows):
    """A chat file as people make them: Windows line breaks, and any number of blank lines."""
    return ("\n\n \n\n".join(row["dialogue"] for row in rows) + "\n\n").replace("\n", "\r\n")


def as_jsonl(rows):
    return "\n".join(json.dumps({"id": row["id"], "dialogue": row["dialogue"]}) + "\n" for row in rows)


@pytest.mark.parametrize("name, form", [("chat.txt", as_text), ("chat.jsonl", as_jsonl), ("-", as_text),
                                        ("-", as_jsonl), (None, as_text)])  # fmt: skip
def test_summaries_of_a_file_and_of_standard_input(command, trained, rows, tmp_path, monkeypatch, name, form):
    content = form(rows).encode()
    if name in ("-", None):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    else:
        name = tmp_path / name
        name.write_bytes(content)
    words = [word for word in ("--summarize", name) if word]
    done = command(*words, cwd=trained.home)  # with the newest run there, and its --max-new-tokens
    assert done.code == 0, done
    assert done.out == "".join(row["prediction"] + "\n" for row in rows)


def test_a_dialogue_that_is_cut_is_named(flan, command, trained, model_folder, tmp_path):
    """On standard error; one that has just the permitted length is not cut."""
    chats = ["Ada: hi", "Ada: hello Femi, how are you?", "Ada: hi"]
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    limit = len(tokenizer("summarize: " + chats[0]).input_ids)
    (tmp_path / "chats.txt").write_text("\n\n".join(chats))
    done = command("--summarize", "chats.txt", "--adapter", trained.folder, "--max-source-length", limit, cwd=tmp_path)
    assert done.code == 0 and len(done.out.splitlines()) == 3, done
    lines = [line for line in done.err.splitlines() if line.startswith("dialogue")]
    assert lines == [f"dialogue 2: cut to {limit} tokens (--max-source-length)"]


def test_dialogues_typed_at_a_terminal_are_answered_one_by_one(trained, rows):
    """An empty line ends a dialogue, which is summarised before the next is typed; Ctrl-D ends the last and leaves."""
    terminal, stdin = pty.openpty()
    process = subprocess.Popen(
        [*python(), str(SCRIPT), "--summarize"], cwd=trained.home, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    patience = threading.Timer(100, process.kill)
    patience.start()
    try:
        for row in rows[:2]:
            os.write(terminal, f"{row['dialogue']}\n\n".encode())
            assert process.stdout.readline() == row["prediction"] + "\n"
        os.write(terminal, f"{rows[2]['dialogue']}\n\x04".encode())
        out, err = process.communicate()
    finally:
        patience.cancel()
        process.kill()
        os.close(terminal)
        os.close(stdin)
    assert process.returncode == 0 and out == rows[2]["prediction"] + "\n", (out, err)
    lines = err.splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == ["model", "trained"] and len(lines) == 4, err
    assert "An empty line ends it" in err


# ----------------------------------------------------------------------------------------------------------------------
# --evaluate
# ----------------------------------------------------------------------------------------------------------------------


def score_cells(line):
    """The four scores with their intervals, as they stand in a row of a table: text, compared to the last digit."""
    return [cell.strip() for cell in line.strip("| ").split("|")][-4:]


def in_the_runs_table(trained, split):
    """The row of the best epoch in the table that the run printed at its end."""
    (line,) = [line for line in trained.done.out.splitlines() if "(best)" in line and f"| {split} " in line]
    return score_cells(line)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluating_a_finished_run_gives_the_numbers_of_its_table(command, trained, split):
    done = command("--evaluate", "--split", split, cwd=trained.home)
    assert done.code == 0, done
    header, _, line, *_ = done.out.splitlines()
    assert header.split("|")[2].strip() == "ROUGE-1" and line.split("|")[1].strip() == split
    assert score_cells(line) == in_the_runs_table(trained, split) and not score_cells(line)[0].startswith("0.00")


def test_evaluating_a_bare_model(flan, command, merged, trained, data):
    """Although there is a run with an adapter. The model is a merged one, as the bare base scores 0 on everything."""
    torch, transformers = flan.torch, flan.transformers
    _, folder = merged
    words = ("--evaluate", "--adapter", "none", "--dataset", data, "--max-new-tokens", TOKENS)
    done = command(*words, "--model", folder, cwd=trained.home)
    assert done.code == 0 and "adapter" not in done.err, done
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    scorer, scores = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True), []
    for line in (data / "test.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        source = tokenizer("summarize: " + row["dialogue"].replace("\r\n", "\n"), return_tensors="pt")
        summary = tokenizer.decode(model.generate(**source)[0], skip_special_tokens=True)
        scores.append(100 * scorer.score(row["summary"], summary)["rouge1"].fmeasure)
    assert np.mean(scores) > 10
    assert score_cells(done.out.splitlines()[2])[0].startswith(f"{np.mean(scores):.2f} ")


def test_evaluating_an_adapter_without_a_run_around_it(flan, command, trained, data, model_folder, tmp_path):
    """Its base is the one that PEFT noted. The rest of the run's settings went with the run, so they are given."""
    shutil.copytree(trained.folder / "adapter", tmp_path / "alone")
    words = ("--evaluate", "--adapter", "alone", "--dataset", data, "--max-new-tokens", TOKENS)
    done = command(*words, cwd=tmp_path)
    assert done.code == 0 and f"model: {model_folder}, adapter: alone\n" == done.err, done
    in_run = command("--evaluate", "--adapter", trained.folder, cwd=tmp_path)
    best = next(epoch for epoch in flan.read_metrics(trained.folder)["epochs"] if epoch["best"])
    assert f"/adapter\ntrained: {best['step']} steps, test ROUGE-1 {best['test']['rouge1']:.2f}\n" in in_run.err, in_run
    assert score_cells(done.out.splitlines()[2]) == in_the_runs_table(trained, "test")


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    """`| head` closes the pipe when it has enough."""
    words = f"set -o pipefail; {shlex.join(python())} {SCRIPT} --model small --plan | true"
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
