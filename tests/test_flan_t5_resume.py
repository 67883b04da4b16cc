"""flan-t5_samsum.py: an interrupted run that goes on ends as if nothing had happened, bit for bit, with dropout on."""

import json
import os
import shutil
import signal
import time

import fake_hub
import pytest
from conftest import RECIPE, python, start, wait, write_jsonl
from safetensors.torch import load_file


def metrics(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1])


def assert_same_end(run, reference, last):
    """Weights, optimiser, scores of all epochs and predictions are those of the uninterrupted run."""
    for name in (f"checkpoints/step-{last:08d}/weights", "adapter/adapter_model"):
        weights, expected = (load_file(folder / f"{name}.safetensors") for folder in (run, reference))
        assert set(weights) == set(expected)
        assert all(weights[key].equal(expected[key]) for key in expected), name
    names = sorted(path.name for path in (reference / "predictions").iterdir())
    assert sorted(path.name for path in (run / "predictions").iterdir()) == names
    for name in names:
        assert (run / "predictions" / name).read_bytes() == (reference / "predictions" / name).read_bytes(), name
    found, expected = metrics(run), metrics(reference)
    assert found["status"] == "finished"
    assert [e["epoch"] for e in found["epochs"]] == [e["epoch"] for e in expected["epochs"]]
    for key in ("step", "validation", "test", "best"):
        assert [e[key] for e in found["epochs"]] == [e[key] for e in expected["epochs"]], key
    losses = {entry["step"]: entry["loss"] for entry in expected["curve"]}
    steps = [entry["step"] for entry in found["curve"]]
    assert steps == sorted(set(steps)) and steps[-1] == last, "a step is logged twice, or not at all"
    assert found["curve"][-1]["loss"] == losses[last]
    assert not [*run.rglob("*.incomplete")]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line for line in lines if "loss" in line] == found["curve"]
    assert [line["step"] for line in lines if "validation" in line] == [e["step"] for e in found["epochs"]]


def test_a_run_that_ended_in_mid_epoch_takes_no_further_step(command, data, model_folder, tmp_path):
    flags = ("--model", model_folder, "--dataset", data, "--max-steps", "4", *RECIPE, "--output-dir", "a")
    assert command(*flags, cwd=tmp_path).code == 0
    before = metrics(tmp_path / "a")
    for _ in range(2):
        done = command("--resume", "--output-dir", "a", cwd=tmp_path)
        assert done.code == 0, done
    after = metrics(tmp_path / "a")
    assert after["status"] == "finished" and after["epochs"] == before["epochs"] and after["curve"] == before["curve"]
    assert [step_of(path) for path in sorted((tmp_path / "a/checkpoints").iterdir())][-1] == 4
    assert done.out.endswith("\na is finished, and nothing is left to do: for more of its epochs, raise --max-steps\n")


# ----------------------------------------------------------------------------------------------------------------------
# In this process: the signal comes at exactly the wrong moment
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def train_until(flan, command, data, model_folder, tmp_path, monkeypatch):
    """train_until("step", 8): the run of the fixture `trained`, sent a SIGTERM while it collates step 8's first batch.

    train_until("summary", 3): while it generates summaries for the third time.
    """

    def train_until(what, count, number=signal.SIGTERM):
        with monkeypatch.context() as patch:
            calls = []

            def interrupt():
                calls.append(what)
                if len(calls) == (2 * count - 1 if what == "step" else count):
                    os.kill(os.getpid(), number)

            collate, summarise = flan.Collator.__call__, flan.Summarizer.__call__
            if what == "step":
                patch.setattr(flan.Collator, "__call__", lambda *rest: interrupt() or collate(*rest))
            else:
                patch.setattr(flan.Summarizer, "__call__", lambda *args: interrupt() or summarise(*args))
            done = command("--model", model_folder, "--dataset", data, "--epochs", "3", *RECIPE, cwd=tmp_path)
        assert done.code == 128 + number, done
        run = tmp_path / "runs" / "flan-t5-small-chats-lr=1e-2"
        assert f"--resume --output-dir {run.relative_to(tmp_path)}" in done.out.splitlines()[-1]
        assert metrics(run)["status"] == "interrupted"
        # Before the first epoch has ended there is nothing to use yet, and only the way to go on is told.
        assert ("watch it:" in done.out) is bool(metrics(run)["results"]["best_step"]), done
        return run

    return train_until


@pytest.mark.parametrize("step", [1, 6, 7, 18])
def test_interrupted_in_any_step(command, trained, train_until, tmp_path, step):
    """Six steps make an epoch: the first and the last step of the run, the last of an epoch and the first."""
    run = train_until("step", step)
    last = max(step_of(path) for path in run.glob("checkpoints/step-*"))
    assert last in (step, step - 1, step - 2)  # batches are fetched ahead
    assert (run / "training_loss.png").exists() == bool(metrics(run)["curve"])
    done = command("--resume", cwd=tmp_path)
    assert done.code == 0, done
    assert_same_end(run, trained.folder, 18)
    assert len(list(run.glob("checkpoints/step-*"))) == 2


@pytest.mark.parametrize("evaluation", [2, 3, 7])
def test_interrupted_in_an_evaluation(command, trained, train_until, tmp_path, evaluation):
    """Two splits after each of the epochs 0 to 3: one before training, in the first epoch, and in the last one."""
    run = train_until("summary", evaluation)
    steps = {2: [], 3: [6], 7: [12, 18]}[evaluation]  # a checkpoint comes before it is scored
    assert sorted(step_of(path) for path in run.glob("checkpoints/step-*")) == steps
    done = command("--resume", "--output-dir", run, cwd=tmp_path)
    assert done.code == 0, done
    assert_same_end(run, trained.folder, 18)


@pytest.mark.plots
def test_ctrl_c_leaves_tables_plots_and_metrics(trained, train_until, tmp_path):
    run = train_until("step", 10, signal.SIGINT)
    found = metrics(run)
    assert found["status"] == "interrupted" and [e["epoch"] for e in found["epochs"]] == [0, 1]
    assert found["epochs"][1]["test"] == metrics(trained.folder)["epochs"][1]["test"]
    for name in ("training_loss.png", "rouge.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert (run / "adapter/adapter_model.safetensors").exists()


def test_interrupted_twice(command, trained, train_until, tmp_path, flan, monkeypatch):
    run, collate, calls = train_until("step", 4), flan.Collator.__call__, []

    def interrupt(collator, rows):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return collate(collator, rows)

    with monkeypatch.context() as patch:
        patch.setattr(flan.Collator, "__call__", interrupt)
        assert command("--resume", cwd=tmp_path).code == 130
    assert command("--resume", "--output-dir", run, cwd=tmp_path.parent).code == 0
    assert_same_end(run, trained.folder, 18)


def test_a_half_written_checkpoint_is_passed_over(command, trained, train_until, tmp_path):
    run = train_until("step", 8)
    partial = run / "checkpoints/step-00000009.incomplete"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"\0" * 100)
    done = command("--resume", cwd=tmp_path)
    assert done.code == 0, done
    line = next(line for line in done.out.splitlines() if line.startswith("going on from"))
    assert line.split("step-")[1] in ("00000006", "00000007", "00000008")
    assert_same_end(run, trained.folder, 18)


def test_a_finished_run_has_nothing_left_to_do(command, trained, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(trained.home, home)
    run = home / trained.folder.relative_to(trained.home)
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    done = command("--resume", cwd=home)
    assert done.code == 0, done
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    assert_same_end(run, trained.folder, 18)


def test_a_stop_that_only_another_process_heard_is_one(flan, command, data, model_folder, tmp_path, monkeypatch):
    """While scoring, too: the run is interrupted, not failed, and says how to go on."""
    with monkeypatch.context() as patch:
        summarise, agree, calls = flan.Summarizer.__call__, flan.agree, []
        told = lambda device, *flags: [*agree(device, *flags)[:-1], True]

        def call(self, sources):
            calls.append(len(sources))
            if len(calls) == 3:
                patch.setattr(flan, "agree", told)
            return summarise(self, sources)

        patch.setattr(flan.Summarizer, "__call__", call)
        done = command("--model", model_folder, "--dataset", data, *RECIPE, "--output-dir", "a", cwd=tmp_path)
    assert done.code == 128 + signal.SIGTERM and "--resume --output-dir a" in done.out.splitlines()[-1], done
    assert metrics(tmp_path / "a")["status"] == "interrupted"


def test_a_signal_behind_the_last_scores_is_too_late(flan, command, data, model_folder, tmp_path, monkeypatch):
    scored = flan.Run.on_scored

    def on_scored(self, state, examples):
        scored(self, state, examples)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(flan.Run, "on_scored", on_scored)
    flags = ("--model", model_folder, "--dataset", data, "--max-steps", "2", *RECIPE, "--output-dir", "a")
    assert command(*flags, cwd=tmp_path).code == 0
    assert metrics(tmp_path / "a")["status"] == "finished"


@pytest.mark.parametrize("flags", [("--lr", "1e-3"), ("--batch-size", "2"), ("--epochs", "4"), ("--lora-r", "8"),
                                   ("--int8",), ("--model", "small")])  # fmt: skip
def test_resume_with_other_settings_is_refused(command, trained, flags):
    before = sorted(trained.folder.rglob("*"))
    done = command("--resume", *flags, cwd=trained.home)
    assert (done.code, done.out) == (2, "")
    assert flags[0] in done.err and len(done.err.splitlines()) == 1
    assert sorted(trained.folder.rglob("*")) == before


def test_resume_with_the_same_settings_said_again(command, trained, data, model_folder, tmp_path):
    shutil.copytree(trained.home, tmp_path / "home")
    done = command("--resume", "--model", model_folder, "--dataset", data, "--lr", "0.01", cwd=tmp_path / "home")
    assert done.code == 0, done


def test_resume_takes_the_newest_run_though_it_has_no_checkpoint_yet(command, train_until, tmp_path):
    run = train_until("step", 8)
    other = tmp_path / "runs" / "newer"
    shutil.copytree(run, other)
    for checkpoint in other.glob("checkpoints/step-*"):
        shutil.rmtree(checkpoint)
    os.utime(other / "metrics.json", (time.time() + 60,) * 2)
    done = command("--resume", cwd=tmp_path)
    assert done.code == 0 and metrics(run)["status"] == "interrupted" and metrics(other)["status"] == "finished", done


def test_what_a_kill_left_in_a_checkpoint_is_deleted(flan, train_until):
    run = train_until("step", 8)
    (checkpoint, *_) = run.glob("checkpoints/step-*")
    (checkpoint / "trainer_state.json.incomplete").write_text("{")
    flan.remove_incomplete(run)
    assert checkpoint.is_dir() and not list(run.rglob("*.incomplete"))


# ----------------------------------------------------------------------------------------------------------------------
# For real: a process of its own, which is killed in the middle of its second epoch
# ----------------------------------------------------------------------------------------------------------------------

STEPS = 20  # of an epoch

AT_STEP_26 = """
import importlib.util, os, signal, sys
number, script = int(sys.argv.pop(1)), sys.argv.pop(1)
spec = importlib.util.spec_from_file_location("flan_t5_samsum", script)
flan = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flan)
step_end = flan.Run.on_step_end
def signalled(run, args, state, control, **more):
    if state.global_step == 26:
        os.kill(os.getpid(), number)
    return step_end(run, args, state, control, **more)
flan.Run.on_step_end = signalled
sys.exit(flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings)))
"""


@pytest.fixture(scope="module")
def killed(command, model_folder, tmp_path_factory):
    """Two processes that train the same; at the end of step 26 one is sent a SIGTERM and one killed."""
    home = tmp_path_factory.mktemp("killed")
    (home / "wrapper.py").write_text(AT_STEP_26)
    for split, count in {"train": 4 * STEPS - 1, "validation": 3, "test": 2}.items():
        write_jsonl(home / f"chats/{split}.jsonl", fake_hub.samsum_rows(split, count))
    flags = ("--model", model_folder, "--dataset", home / "chats", "--epochs", "2", *RECIPE)
    numbers = {"term": signal.SIGTERM, "kill": signal.SIGKILL}
    running = {name: start(*flags, "--output-dir", home / name, cwd=home,
                           launcher=(*python(), home / "wrapper.py", str(int(number))))
               for name, number in numbers.items()}
    done = {name: wait(process) for name, process in running.items()}
    uninterrupted = command(*flags, "--output-dir", home / "uninterrupted", cwd=home)
    assert uninterrupted.code == 0, uninterrupted
    return home, done


def test_sigterm_in_the_middle_of_an_epoch(command, killed):
    home, done = killed
    assert done["term"].code == 128 + signal.SIGTERM, done
    assert "Traceback" not in done["term"].err
    run = home / "term"
    steps = sorted(step_of(path) for path in run.glob("checkpoints/step-*"))
    assert steps == [STEPS, 26]
    again = command("--resume", "--output-dir", run, cwd=home)
    assert again.code == 0, again
    assert_same_end(run, home / "uninterrupted", 2 * STEPS)


def test_kill_9_after_a_checkpoint(command, killed):
    home, done = killed
    assert done["kill"].code == -signal.SIGKILL, done
    run = home / "kill"
    assert [path.name for path in run.glob("checkpoints/step-*")] == [f"step-{STEPS:08d}"]
    again = command("--resume", "--output-dir", run, cwd=home)
    assert again.code == 0, again
    assert_same_end(run, home / "uninterrupted", 2 * STEPS)
