"""Several processes of gpt2_from_scratch.py: sharded optimisers, errors of any of them, and one lock for each run."""

import json
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from test_gpt2_training import SCRIPT, command, losses_of, text, weights_of  # noqa: F401 - two fixtures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

SIZES = ["--tokenizer", "bytes", "--layers", "2", "--heads", "2", "--width", "32", "--block-size", "32",
         "--batch-tokens", "256", "--lr", "1e-2", "--max-steps", "6", "--eval-every", "3", "--micro-batch-size",
         "2", "--schedule", "cosine", "--max-new-tokens", "6"]  # fmt: skip
DRIVER = """
import os, sys
sys.path.insert(0, {folder!r})
import gpt2_from_scratch as gpt2
rank = int(os.environ["RANK"])
{code}
sys.exit(gpt2.main(gpt2.parse_arguments()))
"""


def torchrun(*words, cwd: Path, code: str = "") -> subprocess.CompletedProcess:
    (cwd / "driver.py").write_text(DRIVER.format(folder=str(SCRIPT.parent), code=code))
    words = [*conftest.torchrun(), "driver.py", *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=240)


IN_BF16 = """
import torch
gpt2.choose_dtype = lambda wanted, device: torch.bfloat16
gpt2.measure_matmul_rate = lambda device, dtype: 1e9  # slow in bf16 on a CPU
"""
RECORD = """
original = gpt2.make_trainer
def make_trainer(*arguments):
    trainer = original(*arguments)
    sizes = [sum(p.numel() for g in gpt2.local_part(o).param_groups for p in g["params"]) for o in trainer.optimisers]
    open(f"share {rank}", "w").write(str(sum(sizes)))
    return trainer
gpt2.make_trainer = make_trainer
"""
DIE = """
step = gpt2.training_step
def die(trainer, number, batch, stop=False):
    if number == 4:
        os._exit(9)
    return step(trainer, number, batch, stop)
gpt2.training_step = die
"""


def test_processes_that_do_not_share_the_cache_are_told_so(text, tmp_path):  # noqa: F811
    """As on two machines without a disk that both see."""
    code = "os.makedirs(f'machine {rank}')\nos.chdir(f'machine {rank}')\n"
    done = torchrun("--data", str(text), *SIZES, cwd=tmp_path, code=code)
    assert done.returncode != 0 and done.stderr.count("must lie on a disk that all machines share") == 1, done.stderr
    assert "Traceback" not in done.stderr.partition("ChildFailedError")[0].rpartition("Traceback")[0]
    assert not list(tmp_path.glob("machine */runs/*"))


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_a_sharded_run_equals_a_plain_one_and_one_process_resumes_it(command, text, tmp_path, optimizer):  # noqa: F811
    """Dies after its first checkpoint; then two processes, and one alone, go on to the same end."""
    words = ["--data", str(text), *SIZES, "--optimizer", optimizer, "--dropout", "0"]
    plain = torchrun(*words, "--output-dir", "plain", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    died = torchrun(*words, "--shard-optimizer", "--output-dir", "sharded", cwd=tmp_path, code=RECORD + DIE)
    assert died.returncode != 0 and (tmp_path / "sharded/checkpoints/step-00000003").is_dir(), died.stderr
    shares = [int((tmp_path / f"share {rank}").read_text()) for rank in (0, 1)]
    with torch.device("meta"):
        model = gpt2.GPT(gpt2.GPTConfig(257, block_size=32, layers=2, heads=2, width=32))
    assert sum(shares) == sum(p.numel() for p in model.parameters()) and min(shares) > 0.3 * sum(shares)
    subprocess.run(["cp", "-r", "sharded", "alone"], cwd=tmp_path, check=True)
    again = torchrun("--resume", "--output-dir", "sharded", cwd=tmp_path)
    assert again.returncode == 0 and "resumed from sharded/checkpoints/step-00000003" in again.stdout, again.stderr
    a, b = weights_of(tmp_path / "plain", 6), weights_of(tmp_path / "sharded", 6)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "sharded")
    assert command("--resume", "--output-dir", "alone") == 0
    c = weights_of(Path("alone"), 6)
    # One process adds up in another order; Muon, which iterates in bf16, makes more of such a difference.
    atol = 1e-5 if optimizer == "adamw" else 5e-3
    assert all(torch.allclose(a[name], c[name], rtol=1e-3, atol=atol) for name in a)


def test_two_processes_in_bf16_add_up_like_one(text, tmp_path):  # noqa: F811
    """Gradients of the same sequences one by one, added up in float32: the order of the sums is all that differs."""
    words = ["--data", str(text), *SIZES, "--optimizer", "adamw", "--micro-batch-size", "1"]
    two = torchrun(*words, "--output-dir", "two", cwd=tmp_path, code=IN_BF16)
    assert two.returncode == 0, two.stderr
    (tmp_path / "one.py").write_text(DRIVER.format(folder=str(SCRIPT.parent), code=IN_BF16).replace(
        'int(os.environ["RANK"])', "0"))  # fmt: skip
    one = subprocess.run([sys.executable, "one.py", *words, "--output-dir", "one"], cwd=tmp_path, capture_output=True,
                         text=True)  # fmt: skip
    assert one.returncode == 0, one.stderr
    a, b = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(a) == len(b) and [x[2] for x in a] == pytest.approx([x[2] for x in b], rel=2e-4)
    assert a[0][2] == pytest.approx(b[0][2], rel=1e-6)


def test_an_error_of_any_process_is_shown(text, tmp_path):  # noqa: F811
    """Of the second one alone: it has its own words, and the run ends soon."""
    code = """
original = gpt2.make_trainer
def make_trainer(*arguments):
    if rank == 1:
        raise gpt2.UserError("the second process has a trouble of its own")
    return original(*arguments)
gpt2.make_trainer = make_trainer
"""
    done = torchrun("--data", text, *SIZES, cwd=tmp_path, code=code)
    assert done.returncode == 1
    assert done.stderr.count("error: the second process has a trouble of its own") == 1, done.stderr


def test_no_process_waits_for_the_first_when_that_fails(text, tmp_path):  # noqa: F811
    """Tokenising breaks in the first process: the other one ends by itself, with the error."""
    code = """
def write_tokens(*arguments):
    raise gpt2.UserError("the stream broke off")
gpt2.write_tokens = write_tokens
if rank == 1:
    try:
        gpt2.train(gpt2.resolve_settings(gpt2.parse_arguments()))
    except gpt2.UserError as error:
        open("heard", "w").write(str(error))
        os._exit(2)
"""
    done = torchrun("--data", text, *SIZES, cwd=tmp_path, code=code)
    assert done.returncode == 1 and done.stderr.count("error: the stream broke off") == 1, done.stderr
    assert (tmp_path / "heard").read_text() == "the stream broke off"


def test_two_processes_never_train_in_one_folder(command, text, tmp_path, capsys):  # noqa: F811
    assert command("--data", text, *SIZES, "--output-dir", "run") == 0
    held = gpt2.lock_run(Path("run"))
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    capsys.readouterr()
    code = subprocess.run([sys.executable, str(SCRIPT), "--resume", "--output-dir", "run", "--max-steps", "8"],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert code.returncode == 2 and code.stderr == "error: run is in use: another process is training in it\n"
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    gpt2.os.close(held)
    assert command("--resume", "--output-dir", "run", "--max-steps", 8) == 0


def test_the_lock_of_a_dead_process_is_no_obstacle(command, text, tmp_path):  # noqa: F811
    assert command("--data", text, *SIZES, "--output-dir", "run") == 0
    code = f"import sys, os; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpt2_from_scratch as gpt2; " \
           "gpt2.lock_run(gpt2.Path('run')); os.kill(os.getpid(), 9)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -9
    assert command("--resume", "--output-dir", "run", "--max-steps", 8) == 0
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "finished"
