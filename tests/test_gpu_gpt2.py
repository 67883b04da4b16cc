"""gpt2_from_scratch.py on a GPU: what only one can show. Skipped without CUDA; about five minutes on an H100.

    python -m pytest tests/test_gpu_gpt2.py

Compiled runs that are killed and resumed end with the same bits; precisions and optimisers learn alike; a step in a
CUDA graph is the step; greedy tokens are those of the plain way; and the memory is what --plan says.
"""

import gc
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCRIPT = Path(gpt2.__file__).resolve()
SIZES = ["--tokenizer", "bytes", "--layers", "4", "--heads", "4", "--width", "256", "--block-size", "128",
         "--batch-tokens", "8192", "--lr", "2e-3", "--schedule", "cosine", "--eval-every", "50"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """2 MB of sentences with something to learn in them."""
    choice, file = random.Random(0), tmp_path_factory.mktemp("text") / "words.txt"
    words = ["".join(choice.choices("abcdefghijklmnop", k=choice.randint(2, 8))) for _ in range(300)]
    file.write_text("".join(" ".join(choice.choices(words, k=9)) + ".\n" for _ in range(40_000)))
    return file


def run(cwd: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoints/step-{step:08d}"
    files = ("model.safetensors", "training.safetensors")
    return {f"{file}:{name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("words", [
    ["--optimizer", "adamw"], ["--optimizer", "muon"], ["--optimizer", "adamw", "--dtype", "fp16"],
    ["--optimizer", "adamw", "--gradient-checkpointing"], ["--optimizer", "adamw", "--micro-batch-size", "16"],
    ["--optimizer", "adamw", "--micro-batch-size", "16", "--gradient-checkpointing", "--dtype", "fp16"],
])  # fmt: skip
def test_a_compiled_run_that_was_killed_ends_with_the_same_bits(text, tmp_path, monkeypatch, words):
    """Compiled also though it is short. The second one dies between two checkpoints (kill -9) and is resumed."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport gpt2_from_scratch as gpt2\n"
                      "gpt2.COMPILE_SECONDS = 0\nsys.exit(gpt2.main(gpt2.parse_arguments()))\n")  # fmt: skip
    words = [sys.executable, str(driver), "--data", str(text), *SIZES, "--max-steps", "1000", "--eval-every", "250",
             "--dropout", "0.1", *words]  # fmt: skip
    whole = subprocess.run([*words, "--output-dir", "whole"], cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["mode"] == "compiled", whole.stdout
    process = subprocess.Popen([*words, "--output-dir", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed/checkpoints/step-00000500").is_dir():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/checkpoints/step-00001000").exists(), "it was over before it was killed"
    again = subprocess.run([sys.executable, str(driver), "--resume", "--output-dir", "killed"], cwd=tmp_path,
                           capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 0 and "resumed from" in again.stdout, again.stderr
    a, b = weights(tmp_path / "whole", 1000), weights(tmp_path / "killed", 1000)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_precisions_learn_alike(text, tmp_path):
    """500 steps with each optimiser: bf16 and fp16 end within 1.5% of float32 (with TF32); rounding drifts apart.

    At half the rate of the other tests, where a step that was too long may part them as well.
    """
    for optimizer in ("adamw", "muon"):
        last = {}
        for dtype in ("fp32", "bf16", "fp16"):
            folder = tmp_path / f"{optimizer}-{dtype}"
            run(tmp_path, "--data", text, *SIZES, "--lr", "1e-3", "--max-steps", 500, "--optimizer", optimizer,
                "--dtype", dtype, "--output-dir", folder)  # fmt: skip
            last[dtype] = statistics.fmean(losses(folder)[-20:])
        print(optimizer, last)
        assert last["bf16"] == pytest.approx(last["fp32"], rel=0.015)
        assert last["fp16"] == pytest.approx(last["fp32"], rel=0.015)


def make_trainer(text: Path, folder: Path, *words: str) -> gpt2.Trainer:
    words = ["--data", str(text), "--cache-dir", str(folder / "cache"), *SIZES, "--max-steps", "100", *words]
    settings = gpt2.resolve_settings(gpt2.parse_arguments(words))
    data = gpt2.prepare_tokens(settings)
    model = gpt2.make_model(settings, data.tokenizer)
    return gpt2.make_trainer(settings, gpt2.join_processes(), data, model, True)


@pytest.mark.parametrize("words", [
    ["--optimizer", "adamw"], ["--optimizer", "muon"],
    ["--optimizer", "adamw", "--micro-batch-size", "16", "--dropout", "0.1"]])  # fmt: skip
def test_a_step_in_a_graph_is_the_step(text, tmp_path, words):
    """To the bit, over 20 steps, of which one is skipped; the other trainer takes the same ones without a graph."""
    ours, plain = (make_trainer(text, tmp_path, *words) for _ in range(2))
    assert ours.step_graph is not None and ours.machine.mode == "compiled"
    plain.step_graph.before = 10**9
    for step in range(20):
        values = [gpt2.training_step(trainer, step, trainer.fetch_batch(step)).tolist() for trainer in (ours, plain)]
        assert values[0] == values[1], step
        if step == 10:
            for trainer in (ours, plain):
                trainer.guard.state[1] = -100.0  # the mean loss: the next steps are far above it
                trainer.guard.state[0] = 100.0
        if step == 11:
            assert values[0][gpt2.STATS.index("skip")] == 1.0
            for trainer in (ours, plain):
                trainer.guard.state.copy_(torch.tensor([5, 4.0, 1.0, 1.0, 9.0, 0, 1], device="cuda"))
    assert ours.step_graph.graph is not None and plain.step_graph.graph is None
    for (name, p), q in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_step_takes_the_time_of_the_device_however_late_python_looks():
    """As where the queue of kernels is full, and Python comes back from the next step only when that is nearly over."""
    device = torch.device("cuda")
    values = torch.zeros(len(gpt2.STATS) + len(gpt2.Guard.FIELDS), device=device)
    torch.cuda._sleep(10**7)  # the first call takes longer
    torch.cuda.synchronize()
    start = gpt2.mark_time(device)
    torch.cuda._sleep(10**8)  # cycles: at most 0.1 s
    reading = gpt2.start_reading(values)
    time.sleep(0.5)
    gpt2.finish_reading(reading)
    assert 0.02 < gpt2.seconds_between(start, reading[1]) < 0.2


@pytest.mark.parametrize("size", [50257, 257])
def test_the_fused_loss_is_cross_entropy(size):
    torch.manual_seed(0)
    rows = -(-size // 128) * 128
    x, weight = torch.randn(512, 256, device="cuda"), torch.randn(rows, 256, device="cuda") / 8
    weight[size:] = 0
    targets = torch.randint(size, (512,), device="cuda")
    targets[7] = -1
    x, weight = (tensor.bfloat16().requires_grad_() for tensor in (x, weight))
    loss = gpt2.FusedLoss.apply(x, weight, targets, size)
    loss.backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.cross_entropy((wide[0] @ wide[1].t())[:, :size], targets, ignore_index=-1, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for ours, theirs in zip((x, weight), wide, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() < 0.02 * theirs.grad.norm()


@pytest.fixture(scope="module")
def gpt2_small():
    """124M with random weights that do not repeat themselves, in bf16."""
    model = gpt2.GPT(gpt2.GPTConfig(50257))
    model.initialise(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 8 if name == "wpe.weight" else 2 if parameter.dim() == 2 else 1
    return model.cuda().bfloat16().requires_grad_(False).eval()


def decoded(model: gpt2.GPT, capsys: pytest.CaptureFixture, prompt: list[int], count: int, new: int, **how) -> list:
    """All continuations, by GraphDecoder: that it does not fall back is part of each test."""
    rows = list(zip(*gpt2.generate(model, prompt, count, new, **{"end": -1} | how), strict=True))
    assert gpt2.GraphDecoder.can_run(model, len(prompt) + new) and "slowly" not in capsys.readouterr().err
    return rows


def gaps(model: gpt2.GPT, prompt: list[int], row: tuple[int, ...], rank: int = 1) -> torch.Tensor:
    """How far each token's logit is below the plain way's `rank`-th (0: it is not), in bf16 steps of the largest."""
    tokens = torch.tensor([[*prompt, *row]], device="cuda")
    logits = model(tokens)[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
    least = logits.topk(rank).values[:, -1]
    return (least - chosen).clamp(min=0) / (2**-7 * logits.amax(1).abs().max())


@pytest.mark.parametrize(("count", "start", "new"), [
    (1, 32, 200), (1, 500, 200), (3, 32, 60), (8, 32, 200), (65, 32, 60)])  # fmt: skip
def test_fast_greedy_tokens_are_the_plain_ones(gpt2_small, capsys, count, start, new):
    """Of the fast tokens, each is the plain way's likeliest after the ones before it, or less than rounding away."""
    prompt = list(range(100, 100 + start))
    rows = decoded(gpt2_small, capsys, prompt, count, new, temperature=0)
    assert len(rows) == count and len(rows[0]) == new and len(set(rows)) == 1 and len(set(rows[0])) > new // 4
    gap = gaps(gpt2_small, prompt, rows[0])
    print(f"{(gap == 0).float().mean():.1%} equal, largest gap {gap.max():.2f} roundings")
    assert (gap == 0).float().mean() > 0.95 and gap.max() <= 2
    end = rows[0][new // 2]
    first = rows[0].index(end)
    assert decoded(gpt2_small, capsys, prompt, count, new, temperature=0, end=end) == [rows[0][: first + 1]] * count


@pytest.mark.parametrize("count", [1, 5])
def test_drawn_tokens_are_of_the_plain_top_k_and_depend_on_the_seed(gpt2_small, capsys, count):
    prompt = [5, 6]
    draw = lambda seed: decoded(gpt2_small, capsys, prompt, count, 60, temperature=20.0, top_k=5, seed=seed)
    rows = draw(1)
    assert rows == draw(1) != draw(2) and len(set(rows)) == count
    gap = torch.cat([gaps(gpt2_small, prompt, row, rank=5) for row in rows])
    assert (gap == 0).float().mean() > 0.95 and gap.max() <= 2
    likeliest = torch.cat([gaps(gpt2_small, prompt, row) for row in rows]) == 0
    assert likeliest.float().mean() < 0.9  # so they are drawn


@pytest.mark.parametrize("count", [1, 4])
def test_heads_and_widths_that_are_no_powers_of_two_decode(capsys, count):
    """As gpt2-xl has them."""
    model = gpt2.GPT(gpt2.GPTConfig(300, block_size=128, layers=2, heads=25, width=1600))
    model.initialise(0)
    model = model.cuda().bfloat16().requires_grad_(False).eval()
    (row, *others) = decoded(model, capsys, [7, 8, 9], count, 100, temperature=0)
    assert all(other == row for other in others) and gaps(model, [7, 8, 9], row).max() <= 2


@pytest.mark.parametrize("words", [[], ["--gradient-checkpointing"]])
def test_the_memory_is_what_plan_says(text, tmp_path, words):
    """--plan's peak, from a few steps, beside that of a run."""
    words = ["--data", text, *SIZES, "--max-steps", 60, "--micro-batch-size", "16", *words]
    planned = float(re.search(r"peak memory ([\d.]+) GiB", run(tmp_path, *words, "--plan").stdout)[1])
    run(tmp_path, *words, "--output-dir", "run")
    peak = json.loads((tmp_path / "run/metrics.json").read_text())["results"]["peak_memory_gib"]
    print(f"planned {planned:.2f}, used {peak:.2f} GiB")
    assert peak == pytest.approx(planned, rel=0.15)


def test_checkpointing_saves_memory(text, tmp_path):
    peaks = {}
    for words in ([], ["--gradient-checkpointing"]):
        gc.collect()  # the trainer before
        trainer = make_trainer(text, tmp_path, "--layers", "16", "--micro-batch-size", "64", *words)
        trainer.step_graph = None
        torch.cuda.reset_peak_memory_stats()
        gpt2.training_step(trainer, 0, trainer.fetch_batch(0))
        peaks[bool(words)] = gpt2.peak_memory(trainer.machine.device)
        del trainer
    print(peaks)
    assert peaks[True] < 0.7 * peaks[False]


def test_two_gpus_give_the_losses_of_one(text, tmp_path, monkeypatch):
    """In float32: in bf16, and with TF32, the sums of other micro-batches round otherwise, and drift apart."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    words = ["--data", str(text), *SIZES, "--optimizer", "adamw", "--max-steps", "60", "--dtype", "fp32"]
    run(tmp_path, *words, "--output-dir", "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                str(Path(__file__).with_name("as_two_machines.py"))]  # fmt: skip
    for folder, more in (("two", []), ("sharded", ["--shard-optimizer"])):
        done = subprocess.run([*launcher, str(SCRIPT), *words, *more, "--output-dir", folder], cwd=tmp_path,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert losses(tmp_path / "two") == losses(tmp_path / "sharded")


STOPPED = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import gpt2_from_scratch as gpt2
gpt2.COMPILE_SECONDS = 0
training_step = gpt2.training_step
def step_and_stop(trainer, step, *batch):
    if str(step) == os.environ.get("STOP") and trainer.machine.rank == 0:
        os.kill(os.getpid(), 15)
    return training_step(trainer, step, *batch)
gpt2.training_step = step_and_stop
sys.exit(gpt2.main(gpt2.parse_arguments()))
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_compiled_gpus_learn_as_one_and_a_resumed_training_has_the_same_bits(text, tmp_path, optimizer):
    """In bf16, with gradients that are exchanged while others are computed; one stops in the middle of an epoch."""
    (tmp_path / "driver.py").write_text(STOPPED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                str(Path(__file__).with_name("as_two_machines.py"))]  # fmt: skip
    driver = [str(tmp_path / "driver.py"), str(SCRIPT.parent)]
    words = ["--data", str(text), *SIZES, "--optimizer", optimizer, "--max-steps", "60", "--eval-every", "30"]

    def trained(launcher, *words, stop=""):
        return subprocess.run([*launcher, *driver, *words], cwd=tmp_path, env=os.environ | {"STOP": stop},
                              capture_output=True, text=True)  # fmt: skip

    for folder, how in (("one", [sys.executable]), ("two", launcher)):
        done = trained(how, *words, "--output-dir", folder)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / folder / "metrics.json").read_text())["mode"] == "compiled", done.stdout
    assert trained(launcher, *words, "--output-dir", "halves", stop="41").returncode != 0
    again = trained(launcher, "--resume", "--output-dir", "halves")
    assert again.returncode == 0 and "resumed from" in again.stdout, again.stderr
    assert losses(tmp_path / "two") == losses(tmp_path / "halves")
    a, b = weights(tmp_path / "two", 60), weights(tmp_path / "halves", 60)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    # Later rounding grows, as the two have other micro-batches.
    assert losses(tmp_path / "two")[:10] == pytest.approx(losses(tmp_path / "one")[:10], rel=0.01)
