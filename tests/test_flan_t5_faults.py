"""Harm done to flan-t5_samsum.py for real: killed, stopped twice, out of disk, poisoned, given bombs.

The long versions (fifty kills, 2,000 steps) run with -m slow.
"""

import contextlib
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import fake_hub
import pytest
import torch
from conftest import RECIPE, SCRIPT, start, wait, write_jsonl
from test_flan_t5_resume import assert_same_end, metrics

NAME = "flan-t5-small-chats-lr=1e-2"  # of the run that the fixture `trained` made


def assert_same_run(run, reference, last=18):
    """As assert_same_end, and the optimiser, the schedule and every point of the loss curve are the same."""
    assert_same_end(run, reference, last)
    states = [torch.load(folder / f"checkpoints/step-{last:08d}/optimizer.pt", weights_only=True)
              for folder in (run, reference)]  # fmt: skip
    assert same(*states)
    curves = [
        [{key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate", "epoch")} for entry in
         metrics(folder)["curve"]] for folder in (run, reference)
    ]  # fmt: skip
    assert curves[0] == curves[1]
    assert not list(run.rglob("*.incomplete"))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(done, *words):
    """Exit code 2 and one line on standard error that has all `words`, but for the name of the model in use."""
    assert done.code == 2, done
    (line,) = [line for line in done.err.splitlines() if not line.startswith(("model: ", "trained: "))]
    assert line.startswith("error: "), done.err
    for word in words:
        assert word in done.err, (word, done.err)


# ----------------------------------------------------------------------------------------------------------------------
# Killed, and stopped twice
# ----------------------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")

# Importing takes seconds, so one process imports everything and does nothing but fork: each order, a line of JSON with
# a folder, the words of the command line and code to run before, is answered with a process id and then an exit code.
SERVER = """
import gc, importlib.util, json, os, sys
script = sys.argv[1]
sys.path.insert(0, sys.argv[2])
import forked
spec = importlib.util.spec_from_file_location("flan_t5_samsum", script)
flan = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flan)
flan.torch.set_num_threads(1)
flan.get_device = lambda: (flan.torch.device("cpu"), flan.torch.float32)
forked.load(forked.HUGGING_FACE)  # what transformers would import when it is needed
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(order["folder"])
        for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [script, *order["words"]]
        flan.plot_loss = flan.plot_rouge = lambda *_: None  # see no_plots
        exec(order["before"])
        sys.exit(flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings)))
    print(child, flush=True)
    print(child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    words = [sys.executable, "-c", SERVER, SCRIPT, Path(__file__).parent]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                              env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    yield server
    server.stdin.close()
    server.wait(60)


class Forked:
    """The script in a process of its own."""

    def __init__(self, server, folder, words, before=""):
        self.server, self.folder = server, folder
        order = {"folder": str(folder), "words": [str(word) for word in words], "before": before}
        server.stdin.write(json.dumps(order).encode() + b"\n")
        while len(words := server.stdout.readline().split()) == 2:
            pass  # the end of a process that a failed test did not wait for
        self.pid = int(words[0])

    def ended(self, timeout=0):
        return bool(select.select([self.server.stdout], [], [], timeout)[0])

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def exit_code(self, timeout=180):
        """Negative: the signal that ended it."""
        if not self.ended(timeout):
            self.kill()
        return int(self.server.stdout.readline().split()[1])

    def __str__(self):
        return "".join((self.folder / name).read_text()[-3000:] for name in ("out.txt", "err.txt"))


@pytest.fixture
def launch(server, data, model_folder):
    """launch(home): starts the run of the fixture `trained`, or goes on with it if it is there."""

    def launch(home, before=""):
        run = home / "runs" / NAME
        if (run / "metrics.json").exists():
            words = ("--resume", "--output-dir", run)
        else:
            shutil.rmtree(run, ignore_errors=True)  # killed before it was a run
            words = ("--model", model_folder, "--dataset", data, "--epochs", "3", *RECIPE)
        return Forked(server, home, words, before)

    return launch


def half_written(run):
    """Whether a folder of the run is being written."""
    with contextlib.suppress(FileNotFoundError):  # it was, and has just been renamed
        return any(path.is_dir() and any(path.iterdir()) for path in run.rglob("*.incomplete"))
    return False


def kill_somewhere(process, run, rng, seconds, is_saving):
    """kill -9 at a random moment of the whole run, or of one of its first five times of saving."""
    if not is_saving:
        process.ended(rng.uniform(0, seconds))
    else:
        number, saving = rng.randrange(5), False
        while not process.ended(0.002) and (number >= 0 or not saving):
            now = half_written(run)
            number, saving = number - (now and not saving), now
        process.ended(rng.uniform(0, 0.03))
    process.kill()


SLOW_DISK = "sync = os.fsync; os.fsync = lambda file: flan.time.sleep(0.02) or sync(file)"  # a save can be seen


def kill_and_go_on(launch, trained, tmp_path, kills):
    """Every other run is killed once more while it goes on. Returns how many kills left a folder half-written."""
    (tmp_path / "timed").mkdir()
    begin = time.monotonic()
    assert launch(tmp_path / "timed", SLOW_DISK).exit_code() == 0
    rng, while_saving, killed, attempt = random.Random(0), 0, 0, 0
    seconds = time.monotonic() - begin
    while killed < kills:
        attempt += 1
        home = tmp_path / str(attempt)
        run = home / "runs" / NAME
        home.mkdir()
        for _ in range(1 + attempt % 2):
            process = launch(home, SLOW_DISK)
            kill_somewhere(process, run, rng, seconds, killed % 2)
            if process.exit_code() == -signal.SIGKILL:
                killed += 1
                while_saving += half_written(run)
        process = launch(home)
        assert process.exit_code() == 0, process
        assert_same_run(run, trained.folder)
        shutil.rmtree(home)
    print(f"{killed} kills, {while_saving} while a folder was being written, {attempt} runs")
    return while_saving


def test_killed_at_any_moment_and_resumed_is_the_same_run(launch, trained, tmp_path):
    kill_and_go_on(launch, trained, tmp_path, kills=2)  # one of them while it saves


@pytest.mark.slow
def test_killed_fifty_times_and_resumed_is_the_same_run(launch, trained, tmp_path):
    assert kill_and_go_on(launch, trained, tmp_path, kills=50) >= 10


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_stops_at_once(launch, trained, tmp_path, number):
    """They come while step 10 is prepared: the process is gone before that step, with the checkpoint of step 6."""
    twice = f"""
collate, calls = flan.Collator.__call__, []
def interrupt(*rest):
    calls.append(1)
    if len(calls) == 19:
        os.kill(os.getpid(), {number:d})
        flan.time.sleep(1.1)
        os.kill(os.getpid(), {number:d})
    return collate(*rest)
flan.Collator.__call__ = interrupt
"""
    assert launch(tmp_path, twice).exit_code() == -number
    run = tmp_path / "runs" / NAME
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000006"]
    process = launch(tmp_path)
    assert process.exit_code() == 0, process
    assert_same_run(run, trained.folder)


@pytest.mark.parametrize("dead, number, step, code", [
    ([2], signal.SIGINT, 8, 130), ([1, 2], signal.SIGINT, 8, 141), ([1], 0, 9, 141)])  # fmt: skip
def test_a_reader_that_has_gone_costs_nothing(launch, tmp_path, dead, number, step, code):
    """Ctrl-C in `script | tee log` ends `tee` as well. Without a signal, the first line that nobody reads is one."""
    cut = f"""
step_end = flan.Run.on_step_end
def cut(run, args, state, *rest, **more):
    if state.global_step == 8:
        for descriptor in {dead}:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, descriptor)
        run.last_line = 0  # it prints again
        os.kill(os.getpid(), {number:d})
    return step_end(run, args, state, *rest, **more)
flan.Run.on_step_end = cut
"""
    process = launch(tmp_path, cut)
    assert process.exit_code() == code, process
    run = tmp_path / "runs" / NAME
    assert metrics(run)["status"] == "interrupted" and not (tmp_path / "err.txt").read_text()
    assert sorted(path.name for path in run.glob("checkpoints/*")) == ["step-00000006", f"step-{step:08d}"]


def test_a_signal_that_comes_twice_at_once_counts_once(flan, monkeypatch):
    """As with torchrun, which passes on what a scheduler, or Ctrl-C, sends to each process anyway."""
    killed, now = [], [100.0]
    monkeypatch.setattr(flan.signal, "signal", lambda *_: None)
    monkeypatch.setattr(flan.os, "kill", lambda _, number: killed.append(number))
    monkeypatch.setattr(flan.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("builtins.print", lambda *_: pytest.fail("print can be interrupted by itself"))
    stop = flan.StopSignal()
    for seconds, number, expected in [(0, 15, []), (0.9, 15, []), (0.95, 2, []), (1.1, 15, [15])]:
        now[0] = 100 + seconds
        stop.receive(number, None)
        assert killed == expected and stop.number == 15


@pytest.fixture
def no_plots(flan, monkeypatch):
    """They take most of the time of so small a run."""
    for name in ("plot_loss", "plot_rouge"):
        monkeypatch.setattr(flan, name, lambda *_: None)


@pytest.mark.usefixtures("no_plots")
def test_a_resumed_run_logs_the_same_means(command, data, model_folder, tmp_path):
    """40 steps, of which two are averaged for each point of the curve, in epochs of five."""
    run = tmp_path / "run"
    flags = ("--limit", "20", "--epochs", "8", *RECIPE[:-1], "2", "--output-dir", run)
    assert command("--model", model_folder, "--dataset", data, *flags, cwd=tmp_path).code == 0
    whole = shutil.copytree(run, tmp_path / "whole")
    assert [entry["step"] for entry in metrics(whole)["curve"]][:6] == [2, 4, 5, 6, 8, 10]
    shutil.rmtree(run / "checkpoints/step-00000040")
    assert command("--resume", "--output-dir", run, cwd=tmp_path).code == 0
    assert_same_run(run, whole, last=40)


def test_a_checkpoint_without_all_its_files_is_put_aside(flan, command, trained, tmp_path, capsys):
    """Not what a kill leaves, but a disk that lost files. The Trainer itself would go on with a new optimiser."""
    home = shutil.copytree(trained.home, tmp_path / "home")
    run = home / "runs" / NAME
    last, before = (run / f"checkpoints/step-{step:08d}" for step in (18, 12))
    for name in ("trainer_state.json", "weights.safetensors", "optimizer.pt"):
        (last / name).rename(tmp_path / name)
        assert flan.find_checkpoint(run) == before
        put_aside, going_on = capsys.readouterr().out.splitlines()
        assert str(last) in put_aside and "put aside as step-00000018.damaged" in put_aside and str(before) in going_on
        assert not last.exists() and (run / "checkpoints/step-00000018.damaged").is_dir()
        if name != "optimizer.pt":
            (run / "checkpoints/step-00000018.damaged").rename(last)
            (tmp_path / name).rename(last / name)
    done = command("--resume", cwd=home)
    assert done.code == 0, done
    assert_same_run(run, trained.folder)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the name of an open file is read from /proc")
def test_what_gets_its_name_is_on_the_disk(flan, tmp_path, monkeypatch):
    """A power cut cannot be had here: what is seen is that all parts are flushed to the disk, then renamed."""
    done, fsync, replace, rename = [], os.fsync, Path.replace, Path.rename
    name_of = lambda number: Path(os.readlink(f"/proc/self/fd/{number}")).name
    monkeypatch.setattr(flan.os, "fsync", lambda number: done.append(name_of(number)) or fsync(number))
    for name, move in (("replace", replace), ("rename", rename)):
        monkeypatch.setattr(Path, name, lambda path, to, move=move: done.append(f"{path.name} -> {to.name}")
                            or move(path, to))  # fmt: skip
    flan.write_json(tmp_path / "a.json", {"a": 1})
    assert done == ["a.json.incomplete", "a.json.incomplete -> a.json"]
    for content in ("old", "new"):
        done.clear()
        with flan.new_folder(tmp_path / "b") as folder:
            (folder / "deep").mkdir()
            for name in ("x", "deep/y"):
                (folder / name).write_text(content)
        assert sorted(done[:4]) == ["b.incomplete", "deep", "x", "y"] and done[-1] == "b.incomplete -> b"
    assert (tmp_path / "b/deep/y").read_text() == "new" and len(list(tmp_path.iterdir())) == 2
    with contextlib.suppress(ValueError), flan.new_folder(tmp_path / "c") as folder:
        (folder / "x").write_text("half")
        raise ValueError
    assert len(list(tmp_path.iterdir())) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Disks that are full or may not be written to
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk, free):
    """Leaves `free` bytes."""
    statistics = os.statvfs(disk)
    with open(disk / "filler", "ab") as file:
        file.write(b"\0" * max(0, statistics.f_bavail * statistics.f_frsize - free))


FULL = [
    ("SummarizationTrainer._save_checkpoint", 2, 500_000, 6),  # room for the weights, none for the optimiser
    ("save_result", 2, 100_000, 6),  # the adapter of the first epoch, after its checkpoint
    ("SummarizationTrainer._save_checkpoint", 2, 100_000, 6),  # no room for the weights
    ("SummarizationTrainer._save_checkpoint", 1, 0, None),
    ("write_jsonl", 6, 0, 12),  # predictions of the second epoch
    ("Run.write", 3, 0, 6),  # metrics.json after the first epoch
    ("Run.on_log", 10, 0, 6),  # metrics.jsonl and TensorBoard
]


SHORT_AND_SLOW = [*FULL[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in FULL[2:])]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("where, call, free, last", SHORT_AND_SLOW)
def test_a_full_disk_is_one_line_and_costs_nothing(
    flan, command, data, model_folder, trained, disk, monkeypatch, where, call, free, last
):
    holder, name = flan, where
    if "." in where:
        holder, name = getattr(flan, where.split(".")[0]), where.split(".")[1]
    original, calls, run = getattr(holder, name), [], disk / "run"

    def filling(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            fill(disk, free)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, filling)
        done = command("--model", model_folder, "--dataset", data, "--epochs", "3", *RECIPE, "--output-dir", run,
                       cwd=disk.parent)  # fmt: skip
    assert_one_line(done, str(run), "MiB free", "make room", f"--resume --output-dir {run}")
    steps = [int(path.name.split("-")[1]) for path in run.glob("checkpoints/step-*")]
    assert sorted(steps)[-1:] == ([last] if last else [])
    assert not list(run.rglob("*.incomplete/*"))
    (disk / "filler").unlink()
    done = command("--resume", "--output-dir", run, cwd=disk.parent)
    assert done.code == 0, done
    assert_same_run(run, trained.folder)


def test_no_room_for_the_tokens_or_the_merged_model(command, data, model_folder, trained, disk):
    fill(disk, 4096)
    flags = ("--model", model_folder, "--dataset", data, *RECIPE)
    done = command(*flags, "--cache-dir", disk / "cache", cwd=disk.parent)
    assert_one_line(done, str(disk / "cache"), "No space left on device", "--cache-dir DIR")
    done = command("--export", disk / "merged", "--adapter", trained.folder, cwd=disk.parent)
    assert_one_line(done, str(disk), "MiB free", "another folder")
    done = command(*flags, "--output-dir", disk / "run", cwd=disk.parent)
    assert_one_line(done, str(disk / "run"), "No space left on device")
    assert sorted(path.name for path in disk.iterdir()) == ["cache", "filler"]


@pytest.fixture
def locked(tmp_path, request):
    """A folder that may not be written to, with the finished run `trained` in it, not quite finished."""

    def locked(content=None):
        folder = tmp_path / "disk"
        if os.geteuid():
            folder.mkdir()
        else:  # who may do everything is stopped only by a read-only file system
            request.getfixturevalue("disk")
        if content:
            shutil.copytree(content, folder / "run")
            shutil.rmtree(folder / "run" / "checkpoints/step-00000018")
        if os.geteuid():
            folder.chmod(0o500)
            request.addfinalizer(lambda: folder.chmod(0o700))
        else:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        return folder

    return locked


def test_folders_that_may_not_be_written_to(command, data, model_folder, trained, locked):
    folder = locked(trained.folder)
    before = files_of(folder)
    flags = ("--model", model_folder, "--dataset", data, *RECIPE)
    for words, expected in (
        ((*flags, "--output-dir", folder / "new"), [str(folder / "new")]),
        ((*flags, "--cache-dir", folder / "cache"), [str(folder / "cache"), "--cache-dir DIR"]),
        (("--export", folder / "merged", "--adapter", trained.folder), [str(folder)]),
        (("--resume", "--output-dir", folder / "run"), [str(folder / "run")]),
    ):
        assert_one_line(command(*words, cwd=folder.parent), *expected)
    assert files_of(folder) == before


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are no numbers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what, step", [("nan", 7), ("inf", 8), ("gradient", 7), ("gradient", 8)])
def test_a_step_that_is_not_finite_is_skipped_and_named_with_its_rows(
    flan, command, data, model_folder, tmp_path, monkeypatch, what, step
):
    """48 steps of one row each, of which every second one is logged: steps 7 and 8 are looked at together."""
    token_mean_loss, collate, seen = flan.token_mean_loss, flan.Collator.__call__, []

    def watched(collator, rows):
        seen.extend(row["input_ids"] for row in rows)
        return collate(collator, rows)

    steps = []

    def poisoned(*args, **kwargs):
        loss = token_mean_loss(*args, **kwargs)
        steps.append(1)
        if len(steps) == step and what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss * float(what) if len(steps) == step and what != "gradient" else loss

    monkeypatch.setattr(flan.Collator, "__call__", watched)
    monkeypatch.setattr(flan, "token_mean_loss", poisoned)
    run = tmp_path / "run"
    done = command("--model", model_folder, "--dataset", data, "--epochs", "2", "--batch-size", "1", "--output-dir",
                   run, "--max-new-tokens", "2", cwd=tmp_path)  # fmt: skip
    word = "gradient is not finite" if what == "gradient" else f"loss is {what}"
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    (guilty,) = [row["id"] for row in rows
                 if tokenizer("summarize: " + row["dialogue"].replace("\r\n", "\n")).input_ids == seen[step - 1]]
    assert done.code == 0 and done.out.count("is skipped") == 1, done
    assert f"step {step} is skipped: its {word}; its rows: {guilty}\n" in done.out
    found = metrics(run)
    assert found["status"] == "finished" and found["results"]["skipped_steps"] == 1
    assert [entry["step"] for entry in found["curve"]] == list(range(2, 49, 2))
    assert all(math.isfinite(entry["loss"] + entry["grad_norm"]) for entry in found["curve"])


def test_rows_that_are_skipped_are_named_in_later_epochs_too(flan, command, data, model_folder, tmp_path, monkeypatch):
    """Step 8 is the second of the second epoch; it has four rows in two micro-batches, and the second is poisoned."""
    token_mean_loss, collate, calls, seen = flan.token_mean_loss, flan.Collator.__call__, [], []

    def watched(collator, rows):
        seen.append([row["input_ids"] for row in rows])
        return collate(collator, rows)

    def poisoned(*args, **kwargs):
        calls.append(1)
        return token_mean_loss(*args, **kwargs) * (float("nan") if len(calls) == 16 else 1)

    monkeypatch.setattr(flan.Collator, "__call__", watched)
    monkeypatch.setattr(flan, "token_mean_loss", poisoned)
    done = command("--model", model_folder, "--dataset", data, "--epochs", "3", *RECIPE, cwd=tmp_path)
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    rows = {tuple(tokenizer("summarize: " + row["dialogue"].replace("\r\n", "\n")).input_ids): row["id"] for row in
            map(json.loads, (data / "train.jsonl").read_text("utf-8").splitlines())}  # fmt: skip
    guilty = {rows[tuple(source)] for source in seen[14] + seen[15]}
    assert done.code == 0, done
    named = re.search("step 8 is skipped: .*; its rows: (.*)", done.out)[1]
    assert len(guilty) == 4 and set(named.split(", ")) == guilty


# ----------------------------------------------------------------------------------------------------------------------
# Code in what was only to be read
# ----------------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled it leaves the file `mark` behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """Where a bomb shows that it went off; at the end of a test that it did not, but could."""
    mark = tmp_path / "exploded"
    torch.save(Bomb(mark), tmp_path / "bomb")
    yield mark
    assert not mark.exists()
    torch.load(tmp_path / "bomb", weights_only=False)
    assert mark.exists(), "not a real bomb"


def test_a_bomb_in_a_checkpoint_is_not_run(command, trained, mark, tmp_path):
    home = shutil.copytree(trained.home, tmp_path / "home")
    run = home / "runs" / NAME
    torch.save({"state": Bomb(mark)}, run / "checkpoints/step-00000018/optimizer.pt")
    done = command("--resume", cwd=home)
    (line,) = [line for line in done.out.splitlines() if "damaged" in line]
    assert done.code == 0 and "step-00000018" in line and "code in it, which is not run" in line, done
    shutil.rmtree(run / "checkpoints/step-00000018.damaged")
    assert_same_run(run, trained.folder)


def test_bombs_that_are_not_needed_are_not_opened(command, trained, mark, tmp_path):
    """Which the Trainer by itself, or an older version of this script, would read."""
    home = shutil.copytree(trained.home, tmp_path / "home")
    run = home / "runs" / NAME
    shutil.rmtree(run / "checkpoints/step-00000018")
    for name in ("training_args.bin", "adapter_model.bin", "optimizer.bin", "scheduler.pt", "rng_state.pth",
                 "pytorch_model.bin"):  # fmt: skip
        torch.save(Bomb(mark), run / "checkpoints/step-00000012" / name)
    done = command("--resume", cwd=home)
    assert done.code == 0, done
    assert_same_run(run, trained.folder)


@pytest.mark.parametrize(("name", "damage"), [
    *[(name, damage) for name in ("optimizer.pt", "weights.safetensors", "trainer_state.json")
      for damage in ("cut short", "nonsense")], ("trainer_state.json", "another's")])  # fmt: skip
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(command, trained, tmp_path, name, damage):
    home = shutil.copytree(trained.home, tmp_path / "home")
    run = home / "runs" / NAME
    file = run / "checkpoints/step-00000018" / name
    content = file.read_bytes()
    damaged = {"cut short": content[: len(content) // 2], "nonsense": b"nonsense" * 99, "another's": b"{}"}
    file.write_bytes(damaged[damage])
    done = command("--resume", cwd=home)
    assert done.code == 0, done
    (line,) = [line for line in done.out.splitlines() if "damaged" in line]
    assert "step-00000018 is damaged" in line and "put aside as step-00000018.damaged" in line
    assert f"going on from {run.relative_to(home)}/checkpoints/step-00000012\n" in done.out
    shutil.rmtree(run / "checkpoints/step-00000018.damaged")
    assert_same_run(run, trained.folder)


def test_a_bomb_as_an_adapter_is_refused(command, trained, data, mark, tmp_path):
    adapter = shutil.copytree(trained.folder / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"lora": Bomb(mark)}, adapter / "adapter_model.bin")
    chat = tmp_path / "chat.txt"
    chat.write_text("Ada: hi")
    for words in (("--summarize", chat), ("--evaluate", "--dataset", data), ("--export", tmp_path / "merged")):
        assert_one_line(command(*words, "--adapter", adapter, cwd=tmp_path), str(adapter))
    assert not (tmp_path / "merged").exists()


def test_a_bomb_as_a_model_is_refused(command, model_folder, data, mark, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    done = command("--model", folder, "--dataset", data, cwd=tmp_path)
    assert_one_line(done, str(folder), "code", "not run", ".safetensors")
    assert not (tmp_path / "runs").exists()


def test_code_beside_models_adapters_and_data_is_ignored(command, model_folder, data, trained, mark, tmp_path):
    """Modules named in auto_map, a loading script, and pickles in a data folder: the same losses as without them."""
    model = shutil.copytree(model_folder, tmp_path / "model" / "flan-t5-small")
    chats = shutil.copytree(data, tmp_path / "chats")
    code = f"open({str(mark)!r}, 'w')\n"
    for name, entry in (("config.json", {"AutoConfig": "modeling_x.C", "AutoModelForSeq2SeqLM": "modeling_x.X"}),
                        ("tokenizer_config.json", {"AutoTokenizer": ["modeling_x.T", "modeling_x.T"]}),
                        ("generation_config.json", {"GenerationConfig": "modeling_x.G"})):  # fmt: skip
        content = json.loads((model / name).read_text()) | {"auto_map": entry, "custom_generate": "x"}
        (model / name).write_text(json.dumps(content))
    for file in (model / "modeling_x.py", model / "custom_generate" / "generate.py", chats / "chats.py",
                 chats / "train.py", chats / "conftest.py"):  # fmt: skip
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    for name in ("train.pkl", "train.pt", "test.pickle", "train.bin"):
        torch.save(Bomb(mark), chats / name)
    done = command("--model", model, "--dataset", chats, "--epochs", "3", "--max-steps", "2", *RECIPE, cwd=tmp_path)
    assert done.code == 0, done
    (run,) = (tmp_path / "runs").iterdir()
    expected = metrics(trained.folder)["curve"][0]["loss"]
    assert metrics(run)["curve"][0]["loss"] == expected
    shutil.copy(model / "modeling_x.py", run / "adapter")
    chat = tmp_path / "chat.txt"
    chat.write_text("Ada: hi")
    assert command("--summarize", chat, cwd=tmp_path).code == 0


# ----------------------------------------------------------------------------------------------------------------------
# Precision that is what it is said to be
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, stored", [((), "bfloat16"), (("--int8",), "int8"), (("--int4",), "uint8")])
def test_bf16_and_quantised_weights_are_never_silently_fp32(
    flan, command, data, model_folder, tmp_path, monkeypatch, flags, stored
):
    """On a CPU told to use bf16: what every attention projection holds and computes, in training and in scoring."""
    seen = {True: set(), False: set()}  # by whether the model trains
    add_lora = flan.add_lora

    def watched(model, args):
        model = add_lora(model, args)
        for module in model.modules():
            if isinstance(module, flan.peft.tuners.lora.LoraLayer):
                module.register_forward_hook(lambda layer, _, output: seen[layer.training].add(
                    (str(layer.get_base_layer().weight.dtype), str(output.dtype))))  # fmt: skip
        return model

    monkeypatch.setattr(flan, "add_lora", watched)
    monkeypatch.setattr(flan, "get_device", lambda: (torch.device("cpu"), torch.bfloat16))
    done = command("--model", model_folder, "--dataset", data, "--max-steps", "2", "--max-new-tokens", "3", *flags,
                   cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    expected = {(f"torch.{stored}", "torch.bfloat16")}
    assert seen == {True: expected, False: expected}
    (run,) = (tmp_path / "runs").iterdir()
    assert metrics(run)["precision"] == "bfloat16"


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def grown(flan, command, model_folder, tmp_path, monkeypatch, rows, steps, warm_up):
    """The share by which resident memory grows between the steps `warm_up` and `steps`; an epoch has rows / 2 steps."""
    for split, count in {"train": rows, "validation": 5, "test": 5}.items():
        write_jsonl(tmp_path / f"chats/{split}.jsonl", fake_hub.samsum_rows(split, count))
    resident, original = {}, flan.Run.on_step_end

    def watch(reporter, args, state, control, **kwargs):
        resident[state.global_step] = int(Path("/proc/self/statm").read_text().split()[1])
        return original(reporter, args, state, control, **kwargs)

    monkeypatch.setattr(flan.Run, "on_step_end", watch)
    done = command("--model", model_folder, "--dataset", "chats", "--batch-size", "2", "--micro-batch-size", "1",
                   "--max-new-tokens", "4", "--epochs", "1000", "--max-steps", steps, cwd=tmp_path)  # fmt: skip
    assert done.code == 0 and len(resident) == steps, done
    print({step: resident[step] for step in range(100, steps + 1, 100)})
    return max(resident[step] for step in range(warm_up, steps + 1)) / resident[warm_up] - 1


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")


@needs_proc
def test_memory_stays_flat(flan, command, model_folder, tmp_path, monkeypatch):
    """An evaluation with its plots every 8 steps: they, not the steps, are what can pile up."""
    assert grown(flan, command, model_folder, tmp_path, monkeypatch, rows=16, steps=120, warm_up=24) < 0.02


@needs_proc
@pytest.mark.slow
def test_memory_stays_flat_over_2000_steps(flan, command, model_folder, tmp_path, monkeypatch):
    """With an evaluation, its plots and a checkpoint every 100 steps."""
    assert grown(flan, command, model_folder, tmp_path, monkeypatch, rows=200, steps=2000, warm_up=100) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Two processes
# ----------------------------------------------------------------------------------------------------------------------

WRAPPER = """
import importlib.util, os, signal, sys, time
script = sys.argv[1]
spec = importlib.util.spec_from_file_location("flan_t5_samsum", script)
flan = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flan)
rank, encode, step_end = int(os.environ["RANK"]), flan.encode, flan.Run.on_step_end
def watched_encode(tokenizer, texts, limit):
    with open(f"encoded-{rank}", "a") as file:
        file.write(f"{len(texts)} ")
    return encode(tokenizer, texts, limit)
def watched_step_end(reporter, args, state, control, **more):
    if state.global_step == 8:
        open(f"step-8-{rank}", "w")
        exec(os.environ.get("STEP_8", ""))
    return step_end(reporter, args, state, control, **more)
flan.encode, flan.Run.on_step_end = watched_encode, watched_step_end
save, replace = flan.SummarizationTrainer._save_checkpoint, flan.replace_folder
def slow_replace(*folders):
    time.sleep(0.5)
    replace(*folders)
def watched_save(trainer, *more):
    save(trainer, *more)
    folder = trainer.run.folder / f"checkpoints/step-{trainer.state.global_step:08d}"
    assert folder.is_dir(), "not all waited for the checkpoint"
flan.SummarizationTrainer._save_checkpoint, flan.replace_folder = watched_save, slow_replace
sys.argv.pop(0)
sys.exit(flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings)))
"""


@pytest.fixture
def torchrun(tmp_path, data, model_folder):
    """torchrun(*words, step_8=code): the run of `trained` or its continuation in two processes; code runs in step 8."""

    def torchrun(*words, step_8=""):
        (tmp_path / "wrapper.py").write_text(WRAPPER)
        launcher = [*conftest.torchrun(), tmp_path / "wrapper.py"]
        words = words or ("--model", model_folder, "--dataset", data, "--epochs", "3", *RECIPE, "--cache-dir", "cache")
        return start(*words, cwd=tmp_path, launcher=launcher, env={"STEP_8": step_8})

    return torchrun


def test_a_rank_that_dies_takes_the_run_down(torchrun, tmp_path):
    """And only the first rank has tokenised. The checkpoint of step 6 stays."""
    process = torchrun(step_8="if rank == 1: os.kill(os.getpid(), signal.SIGKILL)")
    while not (tmp_path / "step-8-1").exists() and process.poll() is None:
        time.sleep(0.1)
    done = wait(process, 60)  # it is over within a minute of the death
    assert done.code not in (0, 2) and (tmp_path / "step-8-1").exists(), done
    assert "Signal 9 (SIGKILL)" in done.err and re.search(r"rank\s*: 1 ", done.err)
    run = tmp_path / "runs" / NAME
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000006"]
    assert (tmp_path / "encoded-0").read_text().split() == ["24", "24", "7", "7", "5", "5"]
    assert not (tmp_path / "encoded-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL of rank 0", "SIGKILL of rank 1", "SIGTERM", "Ctrl-C"])
def test_two_processes_interrupted_and_resumed_are_the_same_run(torchrun, tmp_path, how):
    done = wait(torchrun(), 240)
    assert done.code == 0, done
    whole = (tmp_path / "runs" / NAME).rename(tmp_path / "whole")
    if "SIGKILL" in how:
        process = torchrun(step_8=f"if rank == {how[-1]}: os.kill(os.getpid(), signal.SIGKILL)")
    else:
        (tmp_path / "step-8-0").unlink()
        process = torchrun(step_8="time.sleep(1)")
        while not (tmp_path / "step-8-0").exists() and process.poll() is None:
            time.sleep(0.05)
        if how == "Ctrl-C":  # a terminal sends it to all processes
            os.killpg(process.pid, signal.SIGINT)
        else:  # torchrun passes it on
            process.send_signal(signal.SIGTERM)
    done = wait(process, 120)
    assert done.code != 0, done
    run = tmp_path / "runs" / NAME
    steps = sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoints/step-*"))
    assert steps == ([6] if "SIGKILL" in how else [6, 8]), done
    done = wait(torchrun("--resume", "--output-dir", run), 240)
    assert done.code == 0, done
    assert_same_run(run, whole)
