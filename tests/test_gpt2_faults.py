"""Harm done to gpt2_from_scratch.py for real: killed, stopped, out of disk, given bombs. Long versions: -m slow."""

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import torchrun
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

SCRIPT = Path(gpt2.__file__).resolve()
RECIPE = [
    "--tokenizer", "bytes", "--layers", "2", "--heads", "2", "--width", "32", "--block-size", "32", "--batch-tokens",
    "256", "--micro-batch-size", "4", "--dropout", "0.2", "--lr", "1e-2", "--max-steps", "14", "--eval-every", "2",
    "--max-new-tokens", "5",
]  # fmt: skip

# Processes for the harm are forked from one that has only imported things, since that takes seconds. It reads lines of
# JSON: what to run the script with, where, and code to run before. It answers with the process id, then the exit code.
SERVER = """
import json, os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import matplotlib.pyplot, torch._dynamo, torch.utils.tensorboard
import gpt2_from_scratch as gpt2

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(order["folder"])
        for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdin = open(os.devnull)
        sys.argv = sys.argv[1:]
        exec(order["code"])
        sys.exit(gpt2.main(gpt2.parse_arguments(order["words"])))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Process:
    """The script in a process of its own, and what it printed once it has ended."""

    def __init__(self, server: subprocess.Popen, folder: Path, words: list, code: str):
        self.server, self.folder = server, folder
        order = {"folder": str(folder), "words": [str(word) for word in words], "code": code}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; minus the signal's number when a signal ended it."""
        code = int(self.server.stdout.readline())
        self.out, self.err = ((self.folder / name).read_text() for name in ("out.txt", "err.txt"))
        return code


@pytest.fixture(scope="module")
def server():
    words = [sys.executable, "-c", SERVER, str(SCRIPT)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def start(server, text):
    """start(folder, *words): the script on a short text. `code` runs before it, in the same process."""
    words = ["--data", text, "--cache-dir", text.parent / "cache"]
    return lambda folder, *more, code="": Process(server, folder, [*words, *more], code)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """40 kB of text in one file."""
    choice = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    file.write_text("".join(" ".join(choice.choice(words) for _ in range(8)) + ".\n" for _ in range(900)))
    return file


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """A finished run. Do not write into it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, *RECIPE, "--output-dir", "run")
    assert process.wait() == 0, process.err
    return folder / "run"


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the finished run, to be harmed."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


def wait_for(file: Path, lines: int = 0, seconds: float = 60) -> None:
    """Until the file is there and has so many lines."""
    deadline = time.monotonic() + seconds
    while not file.exists() or file.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, f"no {file} of {lines} lines after {seconds} s"
        time.sleep(0.001)


def assert_ends_as(run: Path, undisturbed: Path) -> None:
    """Bit-identical weights, moments and guard after the last step, and the same losses in the log."""
    for file in ("model.safetensors", "training.safetensors"):
        one, two = (load_file(folder / "checkpoints/step-00000014" / file) for folder in (run, undisturbed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert losses_of(run) == losses_of(undisturbed)


def losses_of(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], name, line[name]) for line in lines for name in ("loss", "validation_loss") if name in line]


# Killed


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_loses_nothing(start, undisturbed, tmp_path, count):
    """Spread evenly over the log's lines, and a little later. Every second step saves: some kills fall into that."""
    moment, killed, half_written, total = random.Random(count), 0, 0, len(losses_of(undisturbed))
    while killed < count:
        folder = tmp_path / str(killed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        process = start(folder, *RECIPE, "--output-dir", "run")
        wait_for(folder / "run/metrics.jsonl", lines=moment.randrange(total))
        time.sleep(moment.uniform(0, 0.03))
        process.send(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            assert process.out and not process.err  # it was faster, and finished
            continue
        killed += 1
        half_written += any((folder / "run").glob("checkpoints/*.incomplete"))
        process = start(folder, "--resume", "--output-dir", "run")
        assert process.wait() == 0, (process.out, process.err)
        assert_ends_as(folder / "run", undisturbed)
        assert not list((folder / "run").glob("checkpoints/*.incomplete"))
    print(f"{half_written} of {killed} kills left a half-written checkpoint")


@pytest.mark.parametrize("harm", ["step", "exp_avg.wte.weight", "guard"])
def test_a_checkpoint_that_lacks_a_part_is_passed_over(start, undisturbed, finished, harm):
    """Its files can be read, but something is not in them."""
    folder = finished / "checkpoints/step-00000014"
    if harm == "step":
        values = json.loads((folder / "training.json").read_text())
        (folder / "training.json").write_text(json.dumps({key: values[key] for key in values if key != harm}))
    else:
        tensors = load_file(folder / "training.safetensors")
        del tensors[harm]
        save_file(tensors, folder / "training.safetensors")
    process = start(finished.parent, "--resume", "--output-dir", "run")
    assert process.wait() == 0, process.err
    assert "step-00000014 is damaged" in process.out and harm in process.out
    assert_ends_as(finished, undisturbed)


def test_a_run_whose_checkpoints_are_all_damaged_starts_again(start, undisturbed, finished):
    for _ in range(2):  # the second time, step-00000014.damaged is already there
        for file in finished.glob("checkpoints/step-????????/model.safetensors"):
            file.write_bytes(b"\0" * 1000)
        process = start(finished.parent, "--resume", "--output-dir", "run")
        assert process.wait() == 0, process.err
        assert "step-00000014 is damaged" in process.out and "starting at step 0" in process.out
        assert_ends_as(finished, undisturbed)


def test_a_folder_that_holds_no_run_is_not_resumed(start, tmp_path):
    """As a kill between making the folder and writing metrics.json leaves it: its settings are not known."""
    (tmp_path / "run").mkdir()
    process = start(tmp_path, "--resume", "--output-dir", "run")
    assert process.wait() == 2 and process.err == "error: --resume: there is no run of this script in run\n"


def test_the_newest_run_is_resumed_also_before_its_first_checkpoint(start, tmp_path):
    assert start(tmp_path, *RECIPE, "--max-steps", "2").wait() == 0
    process = start(tmp_path, *RECIPE, "--eval-every", "10", code=WAIT_IN_STEP)
    wait_for(tmp_path / "in step")
    process.send(signal.SIGKILL)
    process.wait()
    process = start(tmp_path, "--resume")
    assert process.wait() == 0 and "no good checkpoint in runs/gpt2-nano-words-lr=1e-2-2: starting" in process.out


# Stopped

WAIT_IN_STEP = """
import pathlib, time
original = gpt2.training_step

def step(trainer, number, batch, stop=False):
    if number == 5:
        pathlib.Path("in step").touch()
        deadline = time.monotonic() + 20
        while not pathlib.Path("go on").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    return original(trainer, number, batch, stop)

gpt2.training_step = step
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_checkpoint_table_plot_and_the_command_to_go_on(start, undisturbed, tmp_path, number, code):
    process = start(tmp_path, *RECIPE, "--output-dir", "my run", code=WAIT_IN_STEP)
    wait_for(tmp_path / "in step")
    process.send(number)
    (tmp_path / "go on").touch()
    assert process.wait() == code
    assert process.err == "\nstopping after this step and saving; a second signal stops at once\n"
    assert "best validation loss" in process.out and (tmp_path / "my run/training_loss.png").exists()
    assert (tmp_path / "my run/checkpoints/step-00000006").is_dir()
    told = shlex.split(process.out.strip().splitlines()[-1].partition("Go on: python ")[2])
    assert told == [str(SCRIPT), "--resume", "--output-dir", "my run"]
    process = start(tmp_path, *told[1:])
    assert process.wait() == 0, process.err
    assert_ends_as(tmp_path / "my run", undisturbed)


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_stops_at_once(start, tmp_path, first, second):
    process = start(tmp_path, *RECIPE, "--output-dir", "run", code=WAIT_IN_STEP)
    wait_for(tmp_path / "in step")
    process.send(first)
    deadline = time.monotonic() + 10
    while "a second signal" not in (tmp_path / "err.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.1)  # sooner, it would count as the first
    process.send(second)
    assert process.wait() == -second  # a shell reports 128 + its number
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(("dead", "number", "code"), [
    ([2], signal.SIGINT, 130), ([1, 2], signal.SIGINT, 141), ([1], 0, 141)])  # fmt: skip
def test_a_reader_that_has_gone_costs_nothing(start, tmp_path, dead, number, code):
    """Ctrl-C in `script | tee log` ends `tee` as well. Without a signal, the first line that nobody reads is one."""
    cut = f"""
original = gpt2.training_step

def step(trainer, number, *rest):
    if number == 5:
        for descriptor in {dead}:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, descriptor)
        os.kill(os.getpid(), {number:d})
    return original(trainer, number, *rest)

gpt2.training_step = step
"""
    process = start(tmp_path, *RECIPE, "--eval-every", "9", "--output-dir", "run", code=cut)
    assert process.wait() == code and not process.err
    assert json.loads((tmp_path / "run/metrics.json").read_text())["status"] == "interrupted"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]


def test_a_signal_that_comes_twice_within_a_second_counts_once(monkeypatch):
    """A scheduler sends it to torchrun and to its processes, and torchrun passes on what it got."""
    clock, ended = [100.0], []
    monkeypatch.setattr(gpt2, "time", argparse.Namespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(number))
    request = gpt2.StopRequest()
    try:
        for seconds in (0, 0, 0.9):
            clock[0] = 100 + seconds
            signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGTERM and not ended
        clock[0] = 101.5
        signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        request.restore()


# No room, no permission


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options): a file system in memory, mounted with these options."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def mount(options: str) -> Path:
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(start, undisturbed, small_disk, tmp_path):
    """Two checkpoints fit (Muon has one moment where AdamW has two); the third must be there before the first goes."""
    disk = small_disk("size=950k")
    process = start(tmp_path, *RECIPE, "--output-dir", "disk/run")
    assert process.wait() == 2
    assert process.err.startswith("error: step 6 cannot be saved in disk/run ") and process.err.count("\n") == 1
    assert "No space left on device" in process.err and "disk/run/checkpoints/step-00000004" in process.err
    names = sorted(path.name for path in (disk / "run/checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]
    for name in names:
        gpt2.load_pretrained(disk / "run/checkpoints" / name)
    subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
    process = start(tmp_path, "--resume", "--output-dir", "disk/run")
    assert process.wait() == 0, process.err
    assert_ends_as(disk / "run", undisturbed)


def test_a_disk_that_is_full_before_the_first_checkpoint_is_one_line(start, small_disk, tmp_path):
    """Not even the log has room, nor have the token files."""
    small_disk("size=8k")
    for words in (["--output-dir", "disk/run"], ["--output-dir", "run", "--cache-dir", "disk/cache"]):
        process = start(tmp_path, *RECIPE, *words)
        assert process.wait() == 2
        assert "No space left on device" in process.err and "disk" in process.err and process.err.count("\n") == 1
        shutil.rmtree(tmp_path / "disk/run", ignore_errors=True)


@pytest.mark.parametrize("words", [["--output-dir", "disk/run"], ["--cache-dir", "disk/cache"], ["--export", "disk/x"]])
def test_a_read_only_folder_is_one_line(start, finished, small_disk, tmp_path, words):
    small_disk("ro")
    process = start(tmp_path, *words, *(["--init", "run"] if "--export" in words else RECIPE))
    assert process.wait() == 2 and "disk" in process.err and process.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# Nothing executed


class Bomb:
    """Pickled, it leaves a file in the current folder when it is loaded."""

    def __reduce__(self):
        return open, ("exploded", "w")


CODE = "open('exploded', 'w')\nclass Model: pass\n"


def arm(folder: Path) -> None:
    """Everything that loaders of other programs have been known to execute."""
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pt", "training.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"wte.weight": Bomb(), "state": Bomb()}, folder / name)
    for name in ("modeling_gpt2.py", "configuration_gpt2.py", "tokenization_gpt2.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(CODE)
    classes = {"AutoConfig": "configuration_gpt2.Model", "AutoModelForCausalLM": "modeling_gpt2.Model",
               "AutoTokenizer": ["tokenization_gpt2.Model", None]}  # fmt: skip
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text()) | {"auto_map": classes, "trust_remote_code": True}
        (folder / name).write_text(json.dumps(settings))


def test_the_bombs_are_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, "bomb.pt")
    torch.load("bomb.pt", weights_only=False)
    assert Path("exploded").exists()
    Path("exploded").unlink()
    exec(CODE)
    assert Path("exploded").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--init", "run/checkpoints/step-00000014", "--sample", "alpha", "--max-new-tokens", "3"],
        ["--init", "run", "--export", "exported"],
        ["--init", "run", "--batch-tokens", "256", "--max-steps", "1", "--output-dir", "more"],
        ["--resume", "--output-dir", "run"],
    ],
)
def test_bombs_beside_the_weights_are_ignored(start, finished, words):
    for folder in finished.glob("checkpoints/*"):
        arm(folder)
    process = start(finished.parent, *words)
    assert process.wait() == 0, process.err
    assert not list(finished.parent.rglob("exploded"))


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors"])
def test_a_bomb_in_place_of_a_checkpoint_s_tensors_is_passed_over(start, undisturbed, finished, file):
    torch.save({"wte.weight": Bomb()}, finished / "checkpoints/step-00000014" / file)
    process = start(finished.parent, "--resume", "--output-dir", "run")
    assert process.wait() == 0, process.err
    assert "step-00000014 is damaged" in process.out and not list(finished.parent.rglob("exploded"))
    assert_ends_as(finished, undisturbed)


def test_weights_that_are_only_a_pickle_are_refused(start, finished):
    folder = finished / "checkpoints/step-00000014"
    arm(folder)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
    for expected in ("no model.safetensors", "damaged"):
        process = start(finished.parent, "--init", folder, "--sample", "alpha")
        assert process.wait() == 2 and expected in process.err and process.err.count("\n") == 1
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not list(finished.parent.rglob("exploded"))


# Several processes


DRIVER = """
import os, pathlib, sys, time
sys.path.insert(0, {folder!r})
import gpt2_from_scratch as gpt2

original = gpt2.training_step

def step(trainer, number, batch, stop=False):
    if number == 5 and trainer.machine.rank == 1:
        pathlib.Path("pid.tmp").write_text(str(os.getpid()))
        os.rename("pid.tmp", "pid")
        time.sleep({seconds})
    return original(trainer, number, batch, stop)

def slow_plot(*words):
    time.sleep(min({seconds}, 2))  # the other rank has nothing left to do, and must wait
    plot(*words)

gpt2.training_step, plot, gpt2.plot = step, gpt2.plot, slow_plot
sys.exit(gpt2.main(gpt2.parse_arguments()))
"""


def start_two_ranks(text: Path, folder: Path, seconds: int) -> subprocess.Popen:
    """A run of two processes, of which the second one waits in its sixth step."""
    (folder / "driver.py").write_text(DRIVER.format(folder=str(SCRIPT.parent), seconds=seconds))
    launcher = [*torchrun(), "driver.py"]
    words = [*launcher, "--data", str(text), "--cache-dir", str(text.parent / "cache"), *RECIPE, "--output-dir", "run"]
    process = subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(folder / "pid", seconds=120)
    return process


def test_a_rank_that_dies_takes_the_run_down_with_its_error_shown(text, tmp_path):
    """While the other one waits for its gradients."""
    process = start_two_ranks(text, tmp_path, seconds=600)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "SIGKILL" in error and "rank      : 1" in error
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, "torchrun"), (signal.SIGTERM, "torchrun"),
                                            (signal.SIGTERM, "rank 1")])  # fmt: skip
def test_a_signal_ends_all_ranks_after_the_same_step(text, tmp_path, number, to):
    """torchrun passes the signal on to all, and itself ends with exit code 1. Resumed, they end as if undisturbed."""
    process = start_two_ranks(text, tmp_path, seconds=2)
    os.kill(process.pid if to == "torchrun" else int((tmp_path / "pid").read_text()), number)
    out, error = process.communicate(timeout=60)
    told = out.strip().splitlines()[-1].partition("Go on: torchrun --nproc-per-node=2 driver.py ")[2]
    assert told == "--resume --output-dir run", (out, error)
    last = max(int(folder.name.removeprefix("step-")) for folder in (tmp_path / "run/checkpoints").glob("step-*"))
    assert 6 <= last < 14  # it comes in step 6 or soon after, and takes up to two steps to be agreed on
    assert "best validation loss" in out and (tmp_path / "run/training_loss.png").exists()
    launcher = [*torchrun(), "driver.py"]
    done = subprocess.run([*launcher, *told.split()], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (tmp_path / "straight").mkdir()
    straight = start_two_ranks(text, tmp_path / "straight", seconds=0)
    output = straight.communicate(timeout=240)
    assert straight.returncode == 0, output
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight/run")


# Memory

RECORD_MEMORY = """
import pathlib
original, sizes = gpt2.training_step, []

def step(*arguments):
    values = original(*arguments)
    sizes.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]))  # resident pages
    if len(sizes) == LAST:
        pathlib.Path("sizes").write_text(" ".join(map(str, sizes)))
    return values

gpt2.training_step = step
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_resident_memory_stays_flat(start, tmp_path, steps):
    """Evaluations, samples, checkpoints and the log included. The first 100 steps load and reserve what is needed."""
    warm_up = 100
    words = [*RECIPE, "--max-steps", steps + warm_up, "--eval-every", 20, "--output-dir", "run"]
    process = start(tmp_path, *words, code=RECORD_MEMORY.replace("LAST", str(steps + warm_up)))
    assert process.wait() == 0, process.err
    sizes = [int(size) for size in (tmp_path / "sizes").read_text().split()]
    before, after = max(sizes[:warm_up]), max(sizes[-20:])
    print(f"resident memory: {before * 4 / 1024:.1f} MiB, after {steps} more steps {after / before - 1:+.2%}")
    assert after < 1.02 * before
