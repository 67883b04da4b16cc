"""flan-t5_samsum.py keeps its word: on steps, status, dropout, checkpoints, advice, names, locks, steps that fail."""

import itertools
import json
import math
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import RECIPE, SCRIPT, start, torchrun, wait, write_jsonl
from safetensors.torch import load_file
from test_flan_t5_resume import assert_same_end, metrics

NAME = "flan-t5-small-chats-lr=1e-2"  # of the run that the fixture `trained` made


@pytest.fixture
def run_it(command, data, model_folder, tmp_path):
    """run_it(flags...): the run of the fixture `trained`, with other flags; its folder and what it printed."""

    def run_it(*flags, code=0):
        done = command("--model", model_folder, "--dataset", data, *RECIPE, "--output-dir", "run", *flags, cwd=tmp_path)
        assert done.code == code, done
        return tmp_path / "run", done

    return run_it


# ----------------------------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------------------------


def test_max_steps_only_shortens_a_run(run_it, command, data, model_folder, tmp_path):
    """24 rows are six batches of four: more steps than that are not taken, planned, printed or scheduled."""
    run, done = run_it("--epochs", "1", "--max-steps", "100")
    assert "\nsteps: 6\n" in done.out
    assert [entry["step"] for entry in metrics(run)["curve"]] == [1, 2, 3, 4, 5, 6]
    assert metrics(run)["curve"][-1]["learning_rate"] == pytest.approx(1e-2 / 5)  # falls to 0 over six steps
    flags = ("--epochs", "1", "--max-steps", "100", "--batch-size", "4")
    done = command("--plan", "--model", model_folder, "--dataset", data, *flags, cwd=tmp_path)
    assert "\nsteps: 6 of 4 rows, 1.0 epochs" in done.out, done
    flags = ("--epochs", "1", "--batch-size", "16")
    done = command("--plan", "--model", model_folder, "--dataset", data, *flags, cwd=tmp_path)
    assert "\nsteps: 2 of 16 rows, 1.0 epochs" in done.out, done  # the second has eight


def test_max_steps_may_be_raised_on_resume_and_the_rate_follows(flan, run_it, command, trained, tmp_path, monkeypatch):
    taken, step = [], flan.FlatAdamW.step

    def noted(self, *rest):
        taken.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(flan.FlatAdamW, "step", noted)
    run, _ = run_it("--epochs", "3", "--max-steps", "6")
    done = command("--resume", "--output-dir", run, "--max-steps", "18", cwd=tmp_path)
    assert done.code == 0, done
    (line,) = [line for line in done.out.splitlines() if "in place of 6" in line]
    assert "18 steps in place of 6: the learning rate at step 6 is 7.06e-3, not 0e0" in line  # 12 / 17 of the peak
    assert taken[6] == pytest.approx(7.06e-3, rel=1e-3)  # and not only said
    found, whole = metrics(run), metrics(trained.folder)
    assert [e["learning_rate"] for e in found["curve"]][6:] == [e["learning_rate"] for e in whole["curve"]][6:]
    done = command("--resume", "--output-dir", run, "--max-steps", "3", cwd=tmp_path)
    assert done.code == 2 and "has already taken 18" in done.err, done


def test_status_is_running_while_it_runs(flan, run_it, tmp_path, monkeypatch):
    """Whatever kills it later: after the scoring before training, in every step, and while it is scored."""
    seen, step_end, summarise = [], flan.Run.on_step_end, flan.Summarizer.__call__

    def look(original):
        return lambda *args, **more: seen.append(metrics(tmp_path / "run")["status"]) or original(*args, **more)

    monkeypatch.setattr(flan.Run, "on_step_end", look(step_end))
    monkeypatch.setattr(flan.Summarizer, "__call__", look(summarise))
    run, _ = run_it("--epochs", "1")
    assert seen == ["running"] * (6 + 4) and metrics(run)["status"] == "finished"


# ----------------------------------------------------------------------------------------------------------------------
# Dropout
# ----------------------------------------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_step_and_rank(flan, run_it, monkeypatch):
    """And on the micro-batch: what the generator is at both of each step of a run, as rank 0 and as rank 1."""
    shared, ours, plain, seen = flan.PartialState._shared_state, flan.SummarizationTrainer, flan.Seq2SeqTrainer, []
    step, forward = ours.training_step, plain.training_step

    def look(self, *args, **kwargs):
        seen.append(str(flan.torch.get_rng_state().tolist()))
        return forward(self, *args, **kwargs)

    def states(rank, *flags):
        def as_rank(self, *args, **kwargs):
            shared["process_index"] = rank
            try:
                return step(self, *args, **kwargs)
            finally:
                shared["process_index"] = 0

        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ours, "training_step", as_rank)
            patch.setattr(plain, "training_step", look)
            run, _ = run_it("--epochs", "1", "--max-new-tokens", "2", "--limit", "12", *flags)
        shutil.rmtree(run)
        return list(seen)

    first, second, again, other = states(0), states(1), states(0), states(0, "--seed", "7")
    assert len(first) == 6 and first == again
    assert len({*first, *second, *other}) == 18


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("where, checkpoint", [("step", 9), ("scoring", 12)])
def test_nothing_older_than_the_last_checkpoint_is_lost(
    flan, command, run_it, trained, tmp_path, monkeypatch, where, checkpoint
):
    """Saved all the time, in the middle of an epoch, and before each scoring: what goes on from there is the same."""
    calls, limit = [], {"step": 21, "scoring": 5}[where]
    holder = {"step": flan.Collator, "scoring": flan.Summarizer}[where]
    original = holder.__call__

    def cut(*args):
        calls.append(1)
        if len(calls) == limit:
            raise PowerCut
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(holder, "__call__", cut)
        patch.setattr(flan, "SAVE_SECONDS", 0 if where == "step" else 600)
        with pytest.raises(PowerCut):
            run_it("--epochs", "3")
    run = tmp_path / "run"
    done = command("--resume", "--output-dir", run, cwd=tmp_path)
    assert done.code == 0 and re.search(rf"going on from .*/step-0000000?{checkpoint}\n", done.out), done
    assert_same_end(run, trained.folder, 18)


def test_a_checkpoint_comes_every_ten_minutes(flan, run_it, monkeypatch):
    """Of a clock by which steps take 599 s and 2 s in turn: not sooner, not later, and not because of an older one."""
    clock, saved, step_end, save = [0], [], flan.Run.on_step_end, flan.save_checkpoint

    def tick(*args, **more):
        clock[0] += 599 if args[2].global_step % 2 else 2
        return step_end(*args, **more)

    monkeypatch.setattr(flan.Run, "on_step_end", tick)
    monkeypatch.setattr(flan, "save_checkpoint", lambda *args: saved.append(args[-1].global_step) or save(*args))
    monkeypatch.setattr(flan, "time", SimpleNamespace(**vars(flan.time) | {"monotonic": lambda: clock[0]}))
    run_it("--epochs", "1", "--batch-size", "2", "--max-new-tokens", "2")
    assert saved == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("agreed", [True, False])
def test_processes_save_together(flan, monkeypatch, agreed):
    """Whether a checkpoint is due is what they agree on: a clock of one alone would make it wait for the others."""
    run = flan.Run(flan.parse_settings([]), None, {})
    monkeypatch.setattr(run.stop, "agreed", lambda device, is_due: (agreed,))
    run.saved_at -= (1 - agreed) * 2 * flan.SAVE_SECONDS  # by the own clock it is the other way round
    control = SimpleNamespace(should_training_stop=False, should_save=False, should_log=False)
    args = SimpleNamespace(world_size=2, logging_steps=1, device=None)
    run.on_step_end(args, SimpleNamespace(global_step=1), control)
    assert control.should_save is agreed and not control.should_training_stop


def test_the_best_epoch_is_the_first_of_equals_on_validation(flan):
    scores = lambda value: dict.fromkeys(flan.ROUGE_TYPES, value)
    log = [{"epoch": epoch, "step": 6 * epoch, "validation": scores(validation), "test": scores(test), "seconds": 1}
           for epoch, (validation, test) in enumerate([(10, 90), (30, 20), (30, 60), (20, 70)])]
    found = flan.Run(flan.parse_settings([]), None, {}).epochs(log)
    assert [entry["best"] for entry in found] == [False, True, False, False]


def test_a_resumed_run_asks_for_the_data_that_it_began_with(command, data, run_it, tmp_path, flan):
    copy = shutil.copytree(data, tmp_path / "copy")
    run, _ = run_it("--dataset", copy, "--epochs", "2", "--max-steps", "6", "--max-new-tokens", "2")
    (file,) = copy.glob("train.*")
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("e", "o", 1), encoding="utf-8")
    done = command("--resume", "--output-dir", run, "--max-steps", "12", cwd=tmp_path)
    assert done.code == 2 and "are not those that" in done.err and "bring them back" in done.err, done
    file.write_text(text, encoding="utf-8")
    done = command("--resume", "--output-dir", run, cwd=tmp_path)
    assert done.code == 0 and "nothing is left to do: for more of its epochs, raise --max-steps\n" in done.out, done


def test_a_resumed_run_has_each_step_once_in_tensorboard(command, run_it, tmp_path):
    """As TensorBoard itself reads it: what was logged after the checkpoint, and is logged again, is purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = run_it("--epochs", "2", "--max-new-tokens", "2")
    (run / "checkpoints/step-00000012/optimizer.pt").write_bytes(b"damaged")
    assert command("--resume", "--output-dir", run, cwd=tmp_path).code == 0
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for tag, steps in (("train/loss", [*range(1, 13)]), ("validation/rouge1", [0, 6, 12])):
        assert [event.step for event in events.Scalars(tag)] == steps


def test_what_may_be_changed_on_resume_is_asked_of_the_checkpoint_that_is_taken(command, run_it, tmp_path):
    """Not of a newer one that is damaged."""
    run, _ = run_it("--epochs", "3", "--max-steps", "9", "--max-new-tokens", "2")
    (run / "checkpoints/step-00000009/optimizer.pt").write_bytes(b"damaged")
    done = command("--resume", "--output-dir", run, "--max-steps", "7", cwd=tmp_path)
    assert done.code == 0 and "7 steps in place of 9: the learning rate at step 6 is" in done.out, done


def test_resume_with_other_processes_is_refused_as_that(flan, command, run_it, tmp_path, monkeypatch):
    run, _ = run_it("--max-steps", "1", "--max-new-tokens", "2", "--micro-batch-size", "4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(flan.UserError, match=r"was trained by 1 process\(es\), now there are 2: resume it"):
        flan.parse_settings(["--resume", "--output-dir", str(run)])


def test_a_run_remembers_where_its_downloads_are(flan, run_it, tmp_path, monkeypatch):
    run, _ = run_it("--max-steps", "1", "--max-new-tokens", "2", "--cache-dir", "here")
    monkeypatch.chdir(run)
    for words in (("--resume", "--output-dir", run), ("--evaluate", "--adapter", run)):
        assert flan.parse_settings([*map(str, words)]).cache_dir == tmp_path / "here"
    assert flan.parse_settings(["--evaluate", "--adapter", str(run), "--cache-dir", "x"]).cache_dir == flan.Path("x")


def test_the_batch_that_fitted_holds_for_the_rest_of_the_run(flan, command, run_it, tmp_path, monkeypatch):
    """Also where it is resumed. Each of the scorings has 7 rows of validation and 5 of test, and memory for 3."""
    model, sizes = flan.transformers.T5ForConditionalGeneration, []
    generate = model.generate

    def small_memory(self, *args, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise flan.torch.OutOfMemoryError("no room")
        return generate(self, *args, **inputs)

    monkeypatch.setattr(model, "generate", small_memory)
    run_it("--epochs", "3", "--max-steps", "6", "--max-new-tokens", "2")
    assert sizes == [7, *[3, 3, 1, 3, 2] * 2]
    sizes.clear()
    done = command("--resume", "--output-dir", "run", "--max-steps", "12", cwd=tmp_path)
    assert done.code == 0 and sizes == [3, 3, 1, 3, 2], done


def test_what_a_run_leaves_is_whole_or_absent(flan, run_it, monkeypatch):
    """All but TensorBoard's log, which grows, is written aside and gets its name when it is there."""
    renamed = set()
    for name in ("replace", "rename"):
        move = getattr(flan.Path, name)
        monkeypatch.setattr(flan.Path, name, lambda path, to, move=move: renamed.add(to.resolve()) or move(path, to))
    run, _ = run_it("--epochs", "1", "--limit", "4", "--max-new-tokens", "2")
    files = [path for path in run.rglob("*") if path.is_file() and not {path, *path.parents} & renamed]
    assert {path.name.split(".")[0] for path in files} == {"events", "lock"}
    assert {run / "rouge.png", run / "predictions/test-epoch-1.jsonl"} <= renamed


def test_a_run_in_use_is_locked_and_the_lock_of_a_dead_process_is_none(flan, command, trained, tmp_path):
    home = shutil.copytree(trained.home, tmp_path / "home")
    run = home / "runs" / NAME
    assert (run / "lock").exists()  # of a process that is gone
    with flan.lock(run):
        before = sorted(run.rglob("*"))
        done = command("--resume", cwd=home)
        assert done.code == 2 and "is being trained by another process" in done.err and done.err.count("\n") == 1, done
        assert sorted(run.rglob("*")) == before
    assert command("--resume", cwd=home).code == 0


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are no numbers
# ----------------------------------------------------------------------------------------------------------------------


def poison(flan, monkeypatch, bad):
    """The loss of the micro-batches whose numbers, from 1, are in `bad`."""
    token_mean_loss, calls = flan.token_mean_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return token_mean_loss(*args, **kwargs) * (float("nan") if len(calls) in bad else 1)

    monkeypatch.setattr(flan, "token_mean_loss", poisoned)


def test_a_skipped_step_changes_neither_weights_nor_moments(flan, run_it, monkeypatch):
    kept, step_end = [], flan.Run.on_step_end

    def watch(run, args, state, control, model=None, optimizer=None, **more):
        moments = [value for values in optimizer.state_dict()["state"].values() for value in values.values()]
        kept.append([tensor.clone() for tensor in [*flan.trained_parameters(model).values(), *moments]])
        return step_end(run, args, state, control, model=model, optimizer=optimizer, **more)

    monkeypatch.setattr(flan.Run, "on_step_end", watch)
    poison(flan, monkeypatch, {6})  # the second micro-batch of step 3
    run, done = run_it("--epochs", "1")
    assert "step 3 is skipped: its loss is nan" in done.out and metrics(run)["results"]["skipped_steps"] == 1
    same = [all(map(flan.torch.equal, a, b)) for a, b in itertools.pairwise(kept)]
    assert same == [False, True, False, False, False]


def test_ten_in_a_row_end_the_run_with_the_last_good_checkpoint(flan, run_it, monkeypatch):
    poison(flan, monkeypatch, range(15, 1000))  # from step 8 on
    run, done = run_it("--epochs", "3", code=2)
    assert done.err.count("\n") == 1 and "10 steps in a row" in done.err and "up to step 17" in done.err, done
    assert str(run.name) + "/checkpoints/step-00000012" in done.err  # whose weights are those of step 7
    assert metrics(run)["status"] == "failed" and metrics(run)["results"]["skipped_steps"] == 10
    assert all(math.isfinite(e["loss"]) for e in metrics(run)["curve"])


# ----------------------------------------------------------------------------------------------------------------------
# Advice
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, flags", [
    (1, ["--batch-size", "9"]), (1, []), (3, ["--batch-size", "9"]), (2, ["--batch-size", "12"]),
    (1, ["--batch-size", "7"]), (1, ["--micro-batch-size", "1"]), (1, ["--int8", "--num-beams", "4"]),
    (1, ["--output-dir", "run"]), (2, ["--resume", "--output-dir", "run"]),
    (1, ["--resume", "--output-dir", "run", "--micro-batch-size", "1", "--gradient-checkpointing"]),
])  # fmt: skip
def test_advice_for_memory_is_accepted(flan, monkeypatch, tmp_path, processes, flags):
    """By the run itself, too, which has filled its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if "run" in flags:
        flan.write_json(tmp_path / "run/metrics.json", {"configuration": flan.parse_settings([]).configuration,
                                                        "processes": processes, "optimizer": {}, "data": {}})
    settings = flan.parse_settings(flags)
    advice, _, folder = flan.out_of_memory_advice(settings).split("try ")[1].partition("; and another ")
    assert advice.count(",") > 1 or settings.resume
    assert ("smaller --model" in advice) and ("a new run" in advice) == settings.resume
    for words in advice.split(", "):
        if words.startswith("--"):
            kept = [flag for flag in flags if flag != "--int8" or words != "--int4"]  # which takes its place
            less = flan.parse_settings([*kept, *words.split(), *([folder, "another"] if folder else [])])
            assert less.micro_batch_size <= settings.micro_batch_size
            assert less.resume or flan.new_run_folder(less, "name")


@pytest.mark.parametrize("flags, expected", [
    (["--evaluate", "--adapter", "none", "--int4", "--max-source-length", "8"], ["a smaller model"]),
    (["--evaluate", "--adapter", "none"], ["--int8", "--int4", "--max-source-length 256"]),
    (["--summarize", "--adapter", "none", "--int8", "--num-beams", "4"], ["--int4", "--num-beams 1",
                                                                          "--max-source-length 256"]),
    (["--export", "x", "--adapter", "none"], ["the CPU (CUDA_VISIBLE_DEVICES= in front of the command)"]),
    (["--lr-find", "--int8"], ["--micro-batch-size 4", "--gradient-checkpointing", "--int4", "--max-source-length 256",
                               "a smaller --model"]),
    (["--lr-find", "--int4", "--micro-batch-size", "1", "--gradient-checkpointing", "--max-source-length", "8"],
     ["a smaller --model"]),
])  # fmt: skip
def test_advice_for_memory_is_never_empty_and_accepted_in_every_mode(flan, flags, expected):
    assert flan.out_of_memory_advice(flan.parse_settings(flags)) == f"out of memory: try {', '.join(expected)}"
    for words in expected:
        if words.startswith("--"):
            kept = [flag for flag in flags if flag != "--int8" or words != "--int4"]  # which takes its place
            assert flan.parse_settings([*kept, *words.split()]).mode == flan.parse_settings(flags).mode


@pytest.mark.parametrize("is_sharded, processes, here, expected", [
    (False, 1, 1, "python"), (False, 4, 4, "torchrun --nproc-per-node=4"),
    (False, 16, 8, "torchrun --nproc-per-node=8 --nnodes=2 --rdzv-endpoint=HOST:PORT --rdzv-backend=c10d"),
    (True, 8, 8, "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8"),
    (True, 16, 8, "accelerate launch --use_fsdp --fsdp_version 2 --num_machines 2 --machine_rank RANK "
                  "--main_process_ip HOST --num_processes 16"),
])  # fmt: skip
def test_the_command_to_go_on_names_all_machines_and_the_script_as_it_was_called(
    flan, monkeypatch, is_sharded, processes, here, expected
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(is_sharded).lower())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr(flan, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    monkeypatch.setattr(flan.sys, "argv", ["my scripts/flan-t5_samsum.py", "--lr", "1e-3"])
    assert flan.this_script_again() == f"{expected} 'my scripts/flan-t5_samsum.py'"
    assert flan.this_script() == "python 'my scripts/flan-t5_samsum.py'"


def test_shards_are_for_training(flan, monkeypatch):
    """A range test, which has never been run with them, is refused as the others are."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(flan, "PartialState", lambda: SimpleNamespace(distributed_type="DistributedType.FSDP"))
    flan.check_sharding(flan.parse_settings(["--full"]))
    for flags in (["--lr-find"], ["--evaluate", "--adapter", "none"], ["--int8"]):
        with pytest.raises(flan.UserError, match="FSDP is for training"):
            flan.check_sharding(flan.parse_settings(flags))


def test_the_command_that_trains_with_a_rate_is_the_users_own(flan, monkeypatch):
    """Also one that only so many processes accept."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = ["--lr-find", "--batch-size", "9", "--lr", "1e-3", "--source-column", "the text", "--lr=5e-3"]
    changed = flan.with_rate(words, 2.5e-4)
    assert changed == ["--batch-size", "9", "--source-column", "the text", "--lr", "2.5e-4"]
    assert flan.with_rate([*words, "--output-dir", "x"], 2.5e-4) == changed  # the range test has taken that folder
    settings = flan.parse_settings(changed)
    assert (settings.mode, settings.lr, settings.batch_size) == ("train", 2.5e-4, 9)


# ----------------------------------------------------------------------------------------------------------------------
# Names, texts and tables
# ----------------------------------------------------------------------------------------------------------------------


def test_a_text_file_is_text_whatever_it_begins_with(flan, tmp_path):
    content = '{"dialogue": "x"}\nAda: hi\n\n{smiles}\n'
    (tmp_path / "chat.txt").write_text(content)
    assert list(flan.read_dialogues(str(tmp_path / "chat.txt"))) == ['{"dialogue": "x"}\nAda: hi', "{smiles}"]


def test_names_of_evaluations_never_collide(flan):
    """Also of a run whose --max-steps is raised step by step."""
    name = lambda epoch: flan.predictions_file(flan.Path("run"), "test", flan.epoch_number(epoch)).name
    for steps in (1, 3, 4, 7, 1842, 35889):
        for whole in (0, 1, 9):
            steps_taken = [*range(min(steps, 40) + 1), *range(steps - min(steps, 40), steps + 1), steps // 3]
            epochs = {whole + taken / steps for taken in steps_taken}
            assert len({name(epoch) for epoch in epochs}) == len(epochs)
    assert name(None) == "test-epoch-0.jsonl" and name(2.0) == name(2 - 1e-12) == "test-epoch-2.jsonl"


def test_holm_on_paper(flan):
    """The smallest of three p values is multiplied by 3, the next by 2, and none may fall below the one before it."""
    assert flan.holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert flan.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and flan.holm([0.7, 0.6]) == [1, 1]


def test_compare_corrects_p_for_the_number_of_pairs(flan, command, trained, tmp_path):
    """Three runs: one better on every row, one on most of them."""
    best = metrics(trained.folder)["results"]["best_epoch"]
    for name, gains in {"B": [1, 1, 1, 1, 1], "C": [3, -1, 2, 0, 1]}.items():
        file = shutil.copytree(trained.folder, tmp_path / name) / f"predictions/test-epoch-{best}.jsonl"
        rows = [json.loads(line) for line in file.open("rb")]
        write_jsonl(file, [row | {"rouge1": row["rouge1"] + gain} for row, gain in zip(rows, gains, strict=True)])
    done = command("--compare", trained.folder, tmp_path / "B", tmp_path / "C", "--output-dir", ".", cwd=tmp_path)
    rows = [line.split("|")[5:7] for line in done.out.splitlines() if re.search(r"\| \[[+-]", line)]
    p, corrected = zip(*([float(cell) for cell in row] for row in rows), strict=True)
    assert len({*p}) == 3 and corrected == pytest.approx(flan.holm(p), abs=3e-4), done
    assert corrected[0] == pytest.approx(3 * p[0], abs=3e-4)


def test_compare_says_which_runs_are_not_finished(command, trained, tmp_path):
    other = shutil.copytree(trained.folder, tmp_path / "other")
    content = json.loads((other / "metrics.json").read_text()) | {"status": "interrupted"}
    (other / "metrics.json").write_text(json.dumps(content))
    done = command("--compare", trained.folder, other, "--output-dir", tmp_path, cwd=tmp_path)
    assert done.code == 0 and "other is not finished: interrupted\n" in done.out, done
    assert done.out.count("is not finished") == 1
    assert "not about seeds" in " ".join(done.out.split()) and "p (Holm)" in done.out


def test_tables_and_settings_fit_80_columns(flan, trained, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    changes = {"epoch": 1.333, "best": True, "train_loss": 1.4239}
    epochs = [entry | changes for entry in metrics(trained.folder)["epochs"]]
    lines = flan.score_table(epochs).splitlines()
    assert {len(line) for line in lines} == {80} and "[" not in lines[2] and "1.33 (best)" in lines[2]
    head = trained.done.out.split("\n| epoch")[0].splitlines()
    assert len(head) < 16 and all(len(line) < 80 for line in head if "/" not in line)


def test_a_run_ends_with_two_held_out_dialogues_before_and_after(trained):
    found = metrics(trained.folder)
    rows = [[json.loads(line) for line in (trained.folder / f"predictions/test-epoch-{epoch}.jsonl").open("rb")]
            for epoch in (0, found["results"]["best_epoch"])]  # fmt: skip
    assert len(found["examples"]) == 2
    for i, example in enumerate(found["examples"]):
        assert example["before"] == rows[0][i]["prediction"] != example["after"] == rows[1][i]["prediction"]
        assert example["reference"] == rows[0][i]["reference"] and example["dialogue"] == rows[0][i]["dialogue"]
        shown = " ".join(trained.done.out.split(f"Held-out dialogue {i + 1}:")[1].split())
        for name in ("reference", "before", "after"):
            assert " ".join(f"{name}: {example[name]}".split()) in shown


def test_a_line_separator_in_a_held_out_dialogue_ends_no_line_of_a_file(command, data, model_folder, tmp_path):
    chats = shutil.copytree(data, tmp_path / "chats")
    rows = [json.loads(line) for line in (chats / "test.jsonl").open("rb")]
    rows[0]["dialogue"] += "\u2028and more"
    write_jsonl(chats / "test.jsonl", rows)
    done = command("--model", model_folder, "--dataset", chats, "--epochs", 1, "--max-new-tokens", 4,
                   "--output-dir", "run", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    assert metrics(tmp_path / "run")["examples"][0]["dialogue"].endswith("\u2028and more")


def test_the_interval_is_one_of_95_percent(flan):
    """Of 100,000 rows the ends are known to a hundredth of the width: at 90% they would be 16% nearer."""
    scores = np.random.default_rng(1).uniform(0, 100, 100_000)
    low, high = flan.bootstrap_interval(scores, samples=4000)
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / np.sqrt(len(scores)), rel=0.06)


# ----------------------------------------------------------------------------------------------------------------------
# Two processes on two machines, as far as loopback is one
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_are_two_processes(data, model_folder, tmp_path):
    """Two agents with the README's flags that meet on loopback; both folders are one, as on a shared file system."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ("--model", model_folder, "--dataset", data, "--epochs", "1", *RECIPE, "--output-dir", "run")
    readme = " ".join(SCRIPT.with_name("README.md").read_text("utf-8").split())
    (flags,) = re.findall("`torchrun (--nnodes 2 --nproc-per-node 8 .*?HOST:29500) SCRIPT ...`", readme)
    flags = flags.replace("node 8", "node 1").replace("HOST:29500", f"127.0.0.1:{port}").split()
    agents = [start(*words, cwd=tmp_path, launcher=torchrun(*flags)) for _ in range(2)]
    done = [wait(agent, 240) for agent in agents]
    assert [end.code for end in done] == [0, 0], done
    assert metrics(tmp_path / "run")["processes"] == 2
    assert sum(end.out.count("Scores:") for end in done) == 1
    assert load_file(tmp_path / "run/adapter/adapter_model.safetensors")


def test_a_stop_while_two_processes_score_ends_at_once(data, model_folder, tmp_path):
    """Of a scoring in which a single batch takes longer than torchrun waits before it kills: each token takes 4 s."""
    (tmp_path / "slow.py").write_text(HEAD + SLOW + MAIN)
    words = ("--model", model_folder, "--dataset", data, "--epochs", "1", *RECIPE, "--output-dir", "run")
    process = start(*words, cwd=tmp_path, launcher=[*torchrun(), tmp_path / "slow.py"])
    while process.poll() is None and not (tmp_path / "scoring").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    done = wait(process, 25)
    assert metrics(tmp_path / "run")["status"] == "interrupted", done
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]


# A script as a module, with something between the two.
HEAD = """
import importlib.util, os, pathlib, signal, sys, time, types
script = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location("flan_t5_samsum", script)
flan = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flan)
"""
MAIN = """
sys.exit(flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings)))
"""
SLOW = """
forward = flan.transformers.T5ForConditionalGeneration.forward
def slow(*args, **more):
    if pathlib.Path("run/checkpoints/step-00000006").exists():
        pathlib.Path("scoring").touch()
        time.sleep(4)
    return forward(*args, **more)
flan.transformers.T5ForConditionalGeneration.forward = slow
"""


@pytest.fixture(scope="module")
def two_processes(data, model_folder, tmp_path_factory):
    """A range test of six rates and then a training in the same two processes, which cost time to start; its folder.

    60 steps, of which every third is logged: short up to step 3, long from then on. Rank 1 is told to stop in step 8.
    """
    home = tmp_path_factory.mktemp("two")
    (home / "long.py").write_text(HEAD + LONG + MAIN)
    words = ("--model", model_folder, "--dataset", data, "--epochs", 5, "--batch-size", 2, "--micro-batch-size", 1,
             "--max-new-tokens", 2, "--lr", "1e-2")  # fmt: skip
    return home, wait(start(*words, cwd=home, launcher=[*torchrun(), home / "long.py"]))


def test_a_range_test_by_two_processes(two_processes):
    """It makes one folder, suggests a rate and a training by as many processes, and all of them go on."""
    home, done = two_processes
    assert sorted(path.name for path in (home / "runs").iterdir()) == ["flan-t5-small-chats-lr-find", NAME], done
    found = json.loads((home / "runs/flan-t5-small-chats-lr-find/lr_find.json").read_text())
    assert len(found["losses"]) == 6 and all(map(math.isfinite, found["losses"]))
    (line,) = [line for line in done.out.splitlines() if line.startswith("train:")]
    assert line.split()[1:3] == ["torchrun", "--nproc-per-node=2"] and line.split()[3].endswith("/long.py")
    assert float(line.split()[-1]) == pytest.approx(found["suggestion"])


def test_two_processes_told_to_stop_finish_the_step_if_steps_are_long(two_processes):
    """Short steps do not compare notes: the GPU would have to be waited for."""
    home, done = two_processes
    assert metrics(home / "runs" / NAME)["status"] == "interrupted", done
    assert [path.name for path in (home / "runs" / NAME / "checkpoints").iterdir()] == ["step-00000008"]
    assert (home / "compared").read_text().split() == ["1", "2", "3", "6", "7", "8"]  # 1 and 2 are not yet known


LONG = """
flan.RANGE_TEST = flan.RANGE_TEST[60:66]
flan.PartialState(cpu=True)
flan.lr_find(flan.parse_settings([*sys.argv[1:], "--lr-find"]))
clock, step_end, agree = [0], flan.Run.on_step_end, flan.agree
def told(run, args, state, *rest, **more):
    def noted(*flags):
        if os.environ["RANK"] == "0":
            print(state.global_step, file=open("compared", "a"))
        return agree(*flags)
    clock[0] += 0.1 if state.global_step < 4 else 5
    if state.global_step == 8 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    flan.agree = noted
    step_end(run, args, state, *rest, **more)
    flan.agree = agree
flan.Run.on_step_end = told
flan.time = types.SimpleNamespace(**vars(flan.time) | {"perf_counter": lambda: clock[0]})
"""
