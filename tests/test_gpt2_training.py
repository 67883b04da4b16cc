"""Training with gpt2_from_scratch.py: steps, evaluation, guard, checkpoints, interruption and resuming, processes."""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

SCRIPT = Path(gpt2.__file__).resolve()
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "omicron"]
SIZES = [
    "--tokenizer", "bytes", "--layers", "2", "--heads", "2", "--width", "32", "--block-size", "32", "--batch-tokens",
    "256", "--lr", "1e-2", "--optimizer", "adamw", "--schedule", "cosine",
    "--max-new-tokens", "6",
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """40 kB of text in one file."""
    choice = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    lines = (" ".join(choice.choice(WORDS) for _ in range(8)) + ".\n" for _ in range(900))
    file.write_text("".join(lines))
    return file


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(*words): the script's main() on these arguments, in a folder of its own. Returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    return lambda *words: gpt2.main(gpt2.parse_arguments([str(word) for word in words]))


def make_trainer(folder: Path, text: Path, *words, model=None, **changes) -> gpt2.Trainer:
    """What train() trains with: SIZES, and `words` and `changes` over them."""
    arguments = gpt2.parse_arguments(["--data", str(text), "--cache-dir", str(folder / "cache"), *SIZES, *words])
    settings = replace(gpt2.resolve_settings(arguments), **{"max_steps": 20} | changes)
    data = gpt2.prepare_tokens(settings)
    return gpt2.make_trainer(settings, (0, 1, CPU), data, model or gpt2.make_model(settings, data.tokenizer))


def take_steps(trainer: gpt2.Trainer, count: int, first: int = 0) -> list[dict]:
    readings = []
    for step in range(first, first + count):
        values = gpt2.training_step(trainer, step, trainer.fetch_batch(step))
        readings.append(dict(zip(gpt2.STATS + gpt2.Guard.FIELDS, values.tolist(), strict=True)))
    return readings


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoints/step-{step:08d}"
    files = ("model.safetensors", "training.safetensors")
    return {f"{file}:{name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


def assert_bit_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses_of(run: Path) -> list[tuple]:
    """(step, loss) and (step, validation loss) as logged, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], name, line[name]) for line in lines for name in ("loss", "validation_loss") if name in line]


# One step


def test_decay_groups_cover_every_parameter_once():
    model = gpt2.GPT(gpt2.GPTConfig(300, block_size=16, layers=2, heads=2, width=16))
    decayed, others = gpt2.parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    grouped = [id(parameter) for group in (decayed, others) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-1] for p in others["params"]} == {"bias", "weight"}  # of norms, the latter
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in others["params"])
    assert all(p.dim() == 2 for p in decayed["params"])


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulated_steps_equal_one_large_batch(tmp_path, text, micro_batch):
    one = make_trainer(tmp_path, text, "--micro-batch-size", "8")
    many = make_trainer(tmp_path, text, "--micro-batch-size", str(micro_batch))
    a, b = take_steps(one, 3), take_steps(many, 3)
    for key in ("loss", "norm"):
        assert [x[key] for x in a] == pytest.approx([x[key] for x in b], rel=1e-5)
    for p, q in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_step_is_the_textbook_step(tmp_path, text):
    """Mean cross-entropy, clipping to norm 1 and AdamW written out by hand, on transformers' model."""
    trainer = make_trainer(tmp_path, text, "--warmup-steps", "4", "--weight-decay", "0.5")
    gpt2.save_pretrained(trainer.model, trainer.data.tokenizer, tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    batch = trainer.fetch_batch(0)
    logits = theirs(batch[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in theirs.parameters()))
    assert norm > 1
    (values,) = take_steps(trainer, 1)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5) and values["norm"] == pytest.approx(norm, rel=1e-5)
    rate = 1e-2 / 4  # the first of four warm-up steps
    for name, parameter in theirs.transformer.named_parameters():
        g = parameter.grad / norm
        decay = 0.5 if parameter.dim() == 2 else 0.0
        # After one step both bias-corrected moments are the gradient itself.
        expected = parameter * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)
        ours = dict(trainer.model.named_parameters())[name]
        ours = (ours.t() if name.endswith(gpt2.TRANSPOSED) else ours)[: len(expected)]
        sure = g.abs() > 1e-6  # elsewhere rounding decides the sign
        torch.testing.assert_close(ours[sure], expected[sure], rtol=1e-3, atol=1e-6, msg=name)


def test_padding_rows_stay_zero(tmp_path, text):
    trainer = make_trainer(tmp_path, text)
    take_steps(trainer, 5)
    assert trainer.model.wte.weight[257:].eq(0).all() and len(trainer.model.wte.weight) == 384


def test_a_single_batch_is_overfitted(tmp_path, text):
    trainer = make_trainer(tmp_path, text, "--max-steps", "150", "--warmup-steps", "10", "--width", "64")
    batch = trainer.fetch_batch(0)
    losses = [gpt2.training_step(trainer, step, batch)[0].item() for step in range(150)]
    assert losses[0] > 5 and losses[-1] < 0.1


def test_learning_rate_schedules():
    rate = lambda step, schedule: gpt2.learning_rate(
        step, gpt2.Settings(lr=2.0, schedule=schedule, warmup_steps=10, max_steps=110)
    )
    assert [rate(step, "cosine") for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert rate(60, "cosine") == pytest.approx(0.2 + 1.8 * 0.5)  # half-way between the peak and its tenth
    assert rate(110, "cosine") == pytest.approx(0.2)
    assert [rate(step, "linear") for step in (4, 10, 60, 110)] == pytest.approx([1.0, 2.0, 1.0, 0.0])
    assert [rate(step, "wsd") for step in (0, 10, 87, 88)] == pytest.approx([0.2, 2.0, 2.0, 2.0])
    assert [rate(step, "wsd") for step in (99, 109)] == pytest.approx([1.0, 2 / 22])
    late = [gpt2.learning_rate(step, gpt2.Settings(lr=2.0, schedule="wsd", warmup_steps=90, max_steps=100))
            for step in range(100)]  # fmt: skip
    assert max(abs(b - a) for a, b in itertools.pairwise(late)) < 0.11 and late[-1] == 0.1  # no jump, down to the end


def test_flops_are_those_that_torch_counts():
    config = gpt2.GPTConfig(256, block_size=64, layers=3, heads=2, width=32)
    model = gpt2.GPT(config)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    # The plain form of attention: torch does not count the fused one on a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    assert gpt2.flops_per_token(config) == pytest.approx(3 * counter.get_total_flops() / tokens.numel(), rel=1e-6)


def test_dropout_of_a_step_does_not_depend_on_the_steps_before(tmp_path, text):
    straight, fresh = (make_trainer(tmp_path, text, "--dropout", "0.3") for _ in range(2))
    take_steps(straight, 2)
    torch.randn(17)
    fresh.model.load_state_dict(straight.model.state_dict())
    assert take_steps(straight, 1, first=2)[0]["loss"] == take_steps(fresh, 1, first=2)[0]["loss"]
    assert take_steps(fresh, 1, first=3)[0]["loss"] != take_steps(fresh, 1, first=4)[0]["loss"]


def test_training_and_evaluation_compile_to_one_graph_each(tmp_path, text):
    """Of a block, for all blocks: without a break, and without compiling anew when they take turns."""
    trainer, graphs = make_trainer(tmp_path, text, "--dropout", "0.1"), []
    assert len(trainer.model.h) > 1

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for block in trainer.model.h:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    for first in (0, 2):
        take_steps(trainer, 2, first)
        gpt2.evaluate(trainer)
        list(gpt2.generate(trainer.model, [1, 2, 3], 2, 4, end=-1))  # as it is, whatever the cache holds
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.fixture
def in_bf16(monkeypatch):
    """in_bf16(): from now on trainers are made as on a GPU, with a compute copy in bf16."""

    def switch() -> None:
        monkeypatch.setattr(gpt2, "choose_dtype", lambda wanted, device: torch.bfloat16)
        monkeypatch.setattr(gpt2, "measure_matmul_rate", lambda device, dtype: 1e9)  # slow in bf16 on a CPU

    return switch


def test_a_step_in_bf16_is_close_to_one_in_float32(tmp_path, text, in_bf16):
    one = make_trainer(tmp_path, text)
    in_bf16()
    two = make_trainer(tmp_path, text)
    padding = two.model.wte.weight[257:]
    a, b = take_steps(one, 3), take_steps(two, 3)
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-2)
    assert [x["loss"] for x in a] != [x["loss"] for x in b]
    assert [x["norm"] for x in a] == pytest.approx([x["norm"] for x in b], rel=5e-2)
    assert padding.eq(0).all() and all(p.dtype is torch.float32 and p.isfinite().all() for p in two.model.parameters())
    assert gpt2.evaluate(two) == pytest.approx(gpt2.evaluate(one), rel=1e-2)


def test_what_computes_in_bf16_is_the_rounded_weights(tmp_path, text, in_bf16):
    """Also after weights were loaded, and small updates are not lost in it: they add up in float32."""
    in_bf16()
    trainer = make_trainer(tmp_path, text, lr=1e-6)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    take_steps(trainer, 5)
    gpt2.evaluate(trainer)
    rounded_ones = trainer.compute_copy.parameters()
    for (name, parameter), rounded in zip(trainer.model.named_parameters(), rounded_ones, strict=True):
        assert rounded.dtype is torch.bfloat16 and torch.equal(rounded, parameter.to(torch.bfloat16)), name
        assert not torch.equal(parameter, before[name]), name
    trainer.model.load_state_dict(before)
    gpt2.evaluate(trainer)
    assert torch.equal(trainer.compute_copy.wpe.weight, before["wpe.weight"].to(torch.bfloat16))


def test_gradients_of_micro_batches_in_bf16_add_up_in_float32(tmp_path, text, in_bf16, monkeypatch):
    """The sum of what each micro-batch gives alone, to the last digit of float32."""
    in_bf16()
    trainer, seen = make_trainer(tmp_path, text, "--micro-batch-size", "1"), {}
    monkeypatch.setattr(gpt2.nn.utils, "clip_grad_norm_", lambda parameters, norm: seen.update(
        enumerate(p.grad.clone() for p in parameters)) or torch.zeros(()))  # fmt: skip
    batch = trainer.fetch_batch(0)
    gpt2.training_step(trainer, 0, batch)
    trainer = make_trainer(tmp_path, text, "--micro-batch-size", "1")
    expected = [torch.zeros_like(parameter) for parameter in trainer.model.parameters()]
    for sequence in batch.split(1):
        loss = trainer.compute_copy(sequence[:, :-1], sequence[:, 1:]) / trainer.settings.batch_tokens
        gradients = torch.autograd.grad(loss, list(trainer.compute_copy.parameters()))
        for total, gradient in zip(expected, gradients, strict=True):
            assert gradient.dtype is torch.bfloat16
            total += gradient
    assert all(torch.equal(seen[number], total) for number, total in enumerate(expected))


def test_whether_compiling_pays_is_decided_once(tmp_path, text, monkeypatch):
    """Short runs are not compiled; a resumed one keeps what was decided, however fast the device seems to be now."""
    trainer = make_trainer(tmp_path, text, max_steps=20)
    monkeypatch.setattr(torch, "compile", lambda model, **options: "compiled network")
    monkeypatch.setattr(gpt2, "forward_backward", lambda *arguments: None)
    flops = 20 * 256 * gpt2.flops_per_token(trainer.model.config)

    def on_gpu(seconds: float, compiled: bool | None) -> str:  # so long an eager run would take
        rate = flops / seconds / 0.3
        trainer.machine = argparse.Namespace(device=argparse.Namespace(type="cuda"), world=1, micro_batch_size=2,
                                             matmul_rate=rate, dtype=torch.float32)  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(gpt2, "agree", lambda machine, value, choose: value)  # nothing runs on it here
            return gpt2.compile_compute_copy(trainer, compiled)

    assert "short" in on_gpu(56, None) and on_gpu(70, None) == on_gpu(math.nan, None) == "compiled"
    assert "short" in on_gpu(70, False) and on_gpu(56, True) == "compiled"


def test_speed_counts_all_tokens_of_a_step_and_all_processes(tmp_path, text):
    trainer = make_trainer(tmp_path, text)
    trainer.machine = replace(trainer.machine, matmul_rate=1e9, world=2)
    speed = gpt2.speed(trainer, 10, 4.0)
    assert speed["tokens_per_second"] == 10 * 256 / 4
    assert speed["mfu"] == pytest.approx(640 * gpt2.flops_per_token(trainer.model.config) / 2e9)


# Evaluation


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_evaluation_is_the_mean_over_every_validation_token(tmp_path, text, micro_batch):
    trainer = make_trainer(tmp_path, text, "--micro-batch-size", str(micro_batch), "--dropout", "0.5")
    tokens = torch.from_numpy(np.asarray(trainer.data.validation, np.int64))
    assert (len(tokens) - 1) % 32  # the last window is not full
    total, model = 0.0, trainer.model.eval()
    for first in range(0, len(tokens) - 1, 32):
        window = tokens[first : first + 33]
        logits = model(window[None, :-1])[0, :, :257]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    model.train()
    loss = gpt2.evaluate(trainer)
    assert loss == pytest.approx(total / (len(tokens) - 1), rel=1e-6)
    assert trainer.model.training
    # One token is one byte here.
    size = trainer.data.facts["bytes"]["validation"]
    assert gpt2.bits_per_byte(loss, len(tokens), size) == pytest.approx(loss / math.log(2), rel=1e-3)


# Guard


def poison(trainer: gpt2.Trainer, steps: set[int], factor: float) -> None:
    """Multiply loss and gradient by `factor` in these steps, counted from 0."""
    forward, calls = trainer.compute_copy.forward, iter(range(10**6))

    def poisoned(tokens, targets=None, **more):
        value = forward(tokens, targets, **more)
        return value if targets is None else value * (factor if next(calls) in steps else 1.0)

    trainer.compute_copy.forward = poisoned


@pytest.mark.parametrize("factor", [math.nan, math.inf, 100.0])
def test_a_poisoned_step_is_skipped_and_changes_nothing(tmp_path, text, factor):
    trainer = make_trainer(tmp_path, text, max_steps=60)
    poison(trainer, {30}, factor)
    before = take_steps(trainer, 30)
    assert not any(step["skip"] for step in before)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    moments = {p: trainer.optimisers[0].state[p]["exp_avg"].clone() for p in trainer.model.parameters()}
    (bad,) = take_steps(trainer, 1, first=30)
    assert bad["skip"] and bad["skipped"] == 1 and bad["mean_loss"] == before[-1]["mean_loss"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert all(torch.equal(moments[p], trainer.optimisers[0].state[p]["exp_avg"]) for p in moments)
    after = take_steps(trainer, 5, first=31)
    assert not any(step["skip"] for step in after) and all(math.isfinite(step["loss"]) for step in after)


def test_a_gradient_far_beyond_the_others_is_skipped_though_the_loss_is_as_always(tmp_path, text):
    trainer = make_trainer(tmp_path, text, max_steps=60)
    before = take_steps(trainer, 30)
    network = trainer.compute_copy.forward
    trainer.compute_copy.forward = lambda *batch: Steep.apply(network(*batch))
    (bad,) = take_steps(trainer, 1, first=30)
    assert bad["skip"] and bad["norm"] > 10 * before[-1]["mean_norm"]
    assert bad["loss"] < before[-1]["mean_loss"] + 0.5
    trainer.compute_copy.forward = network
    assert not take_steps(trainer, 1, first=31)[0]["skip"]


class Steep(torch.autograd.Function):
    """The value as it is, its gradient a hundredfold."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return 100 * gradient


def test_guard_statistics_are_means_over_the_good_steps():
    guard = gpt2.Guard(CPU)
    losses = [3.0, 2.5, 2.0, 2.75]
    for loss in [*losses, math.nan]:
        guard.check(torch.tensor(loss), torch.tensor(loss / 2))
    state = dict(zip(guard.FIELDS, guard.state.tolist(), strict=True))
    assert state["steps"] == 4 and state["skipped"] == 1
    assert state["mean_loss"] == pytest.approx(np.mean(losses)) and state["mean_norm"] == pytest.approx(
        np.mean(losses) / 2
    )
    assert state["variance"] == pytest.approx(np.var(losses))


def test_a_slow_rise_of_the_loss_is_divergence():
    guard, diverging = gpt2.Guard(CPU), []
    for step in range(400):
        guard.check(torch.tensor(3.0 + 0.01 * max(0, step - 100)), torch.tensor(1.0))
        diverging.append(guard.is_diverging(dict(zip(guard.FIELDS, guard.state.tolist(), strict=True))))
    assert not any(diverging[:200]) and diverging[-1]


def test_a_run_whose_weights_were_thrown_off_finds_back(tmp_path, text):
    """As a step that was too long does it: gradients are then large whatever the text, and their direction is right."""
    trainer = make_trainer(tmp_path, text, max_steps=150)
    before = take_steps(trainer, 60)
    with torch.no_grad():
        trainer.model.ln_f.weight.mul_(18)
    after = take_steps(trainer, 90, first=60)
    assert [step["skip"] for step in after[:4]] == [1, 1, 1, 0]
    assert not any(gpt2.Guard.is_diverging(step) for step in after)
    assert after[-1]["loss"] < before[-1]["loss"] + 0.1 < after[0]["loss"]


def test_a_run_with_a_poisoned_step_ends_well(command, text, monkeypatch, capsys):
    original, poisoned = gpt2.make_trainer, []

    def open_and_poison(*arguments):
        trainer = original(*arguments)
        poison(trainer, {13}, math.nan)  # counted with the evaluation batches
        forward = trainer.compute_copy.forward

        def noted(inputs, targets=None, **more):
            value = forward(inputs, targets, **more)
            if targets is not None and not torch.isfinite(value):
                poisoned.append(torch.cat([inputs, targets[:, -1:]], dim=1).numpy())
            return value

        trainer.compute_copy.forward = noted
        return trainer

    monkeypatch.setattr(gpt2, "make_trainer", open_and_poison)
    assert command("--data", text, *SIZES, "--max-steps", 12, "--eval-every", 50, "--output-dir", "run") == 0
    said = capsys.readouterr().out
    assert "skipped: loss nan" in said
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    (line,) = [json.loads(line) for line in lines if "sequences" in line]
    starts = line["sequences"].split()
    assert ", ".join(starts) in " ".join(said.split()) and len(starts) == 8
    train = np.fromfile(next(Path("cache").glob("tokens-*/train.bin")), np.uint16)
    read = np.stack([train[int(start) : int(start) + 33] for start in starts])
    assert any(np.array_equal(read, batch) for batch in poisoned)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["status"] == "finished" and metrics["results"]["skipped_steps"] == 1


@pytest.mark.parametrize("every", [4, 50])
def test_a_run_that_keeps_diverging_stops_with_its_last_good_checkpoint(command, text, monkeypatch, capsys, every):
    """Or, if there is none yet, says only what can be done then."""
    original = gpt2.training_step

    def bad_after_five(trainer, step, batch, stop=False):
        if step == 5:
            poison(trainer, set(range(10**6)), math.nan)
        return original(trainer, step, batch, stop)

    monkeypatch.setattr(gpt2, "training_step", bad_after_five)
    assert command("--data", text, *SIZES, "--max-steps", 60, "--eval-every", every, "--output-dir", "run") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: the run diverges at step 15") and "\n" not in error
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "failed"
    if kept := gpt2.find_checkpoints(Path("run")):
        assert str(kept[0]) in error and error.endswith("--init run --lr 2.5e-3")
        assert all(torch.isfinite(tensor).all() for tensor in load_file(kept[0] / "model.safetensors").values())
    else:
        assert error.endswith("; start anew with --lr 2.5e-3")
    assert bool(kept) == (every == 4)


# A whole run, interrupted and resumed

RECIPE = [*SIZES, "--dropout", "0.2", "--micro-batch-size", "4", "--max-steps", "14", "--eval-every", "4"]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert gpt2.main(gpt2.parse_arguments(["--data", str(text), *RECIPE, "--output-dir", "run"])) == 0
    finally:
        os.chdir(before)
    return folder / "run"


def test_a_run_leaves_what_it_promises(uninterrupted):
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["step-00000012", "step-00000014"]
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    assert metrics["status"] == "finished" and metrics["results"]["steps"] == 14
    assert metrics["configuration"]["lr"] == 1e-2 and metrics["versions"]["torch"] == torch.__version__
    # The same names as in the metrics.json of flan-t5_samsum.py.
    assert "CPU" in metrics["device"] and metrics["processes"] == 1 and metrics["precision"] == "float32"
    assert {"skipped_steps", "training_seconds", "samples_per_second", "tokens_per_second", "mfu", "peak_memory_gib"} \
        <= metrics["results"].keys()  # fmt: skip
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 15))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4, 8, 12, 14]
    best = min(line["validation_loss"] for line in lines if "validation_loss" in line)
    assert metrics["results"]["best_validation_loss"] == best
    assert (uninterrupted / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert all(line["sample"] for line in lines if "validation_loss" in line)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted)).Reload()
    assert {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/samples_per_second",
        "train/peak_memory_gib",
        "validation/loss",
        "validation/bits_per_byte",
    } <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("validation/loss")] == pytest.approx(
        [line["validation_loss"] for line in lines if "validation_loss" in line]
    )


def test_a_checkpoint_loads_in_transformers_as_it_is(uninterrupted):
    folder = uninterrupted / "checkpoints/step-00000014"
    theirs, ours = GPT2LMHeadModel.from_pretrained(folder).eval(), gpt2.load_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("alpha beta gamma", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[..., :257], rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(command, text, uninterrupted):
    assert command("--data", text, *RECIPE, "--output-dir", "again") == 0
    assert_bit_identical(weights_of(Path("again"), 14), weights_of(uninterrupted, 14))
    assert losses_of(Path("again")) == losses_of(uninterrupted)
    assert command("--data", text, *RECIPE, "--output-dir", "other", "--seed", 1) == 0
    assert losses_of(Path("other"))[0] != losses_of(uninterrupted)[0]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [0, 1, 4, 7, 13])
def test_stopped_dead_at_any_step_and_resumed_equals_uninterrupted(command, text, uninterrupted, monkeypatch, step):
    original = gpt2.training_step

    def die(trainer, number, batch, stop=False):
        if number == step:
            raise Killed
        return original(trainer, number, batch, stop)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "training_step", die)
        with pytest.raises(Killed):
            command("--data", text, *RECIPE, "--output-dir", "run")
    assert command("--resume", "--output-dir", "run") == 0
    assert_bit_identical(weights_of(Path("run"), 14), weights_of(uninterrupted, 14))
    assert losses_of(Path("run")) == losses_of(uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    command, text, uninterrupted, monkeypatch, capsys, number, code
):
    original = gpt2.training_step

    def send(trainer, step, batch, stop=False):
        if step == 5:
            os.kill(os.getpid(), number)
        return original(trainer, step, batch, stop)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "training_step", send)
        assert command("--data", text, *RECIPE, "--output-dir", "run") == code
    assert "--resume --output-dir run" in capsys.readouterr().out
    assert gpt2.find_checkpoints(Path("run"))[0].name == "step-00000006"  # the step in which it came was finished
    assert Path("run/training_loss.png").exists()
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "interrupted"
    assert command("--resume", "--output-dir", "run") == 0
    assert_bit_identical(weights_of(Path("run"), 14), weights_of(uninterrupted, 14))
    assert losses_of(Path("run")) == losses_of(uninterrupted)


KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import gpt2_from_scratch as gpt2

original, files = gpt2.save_file, []

def save_half(tensors, path, **options):
    original(tensors, path, **options)
    files.append(path)
    if len(files) == {files}:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

gpt2.save_file = save_half
gpt2.main(gpt2.parse_arguments(sys.argv[1:]))
"""


@pytest.mark.parametrize("files", [1, 2, 3, 4])
def test_kill_9_in_the_middle_of_a_save(command, text, uninterrupted, capsys, files):
    """The first or second file of the first or second checkpoint is half written when the process dies."""
    code = KILLED_WHILE_SAVING.format(folder=str(SCRIPT.parent), files=files)
    words = ["--data", str(text), *RECIPE, "--output-dir", "run"]
    died = subprocess.run([*conftest.python(), "-c", code, *words], capture_output=True)
    assert died.returncode == -signal.SIGKILL
    assert any(path.name.endswith(".incomplete") for path in Path("run/checkpoints").iterdir())
    assert command("--resume", "--output-dir", "run") == 0
    out = capsys.readouterr().out
    assert "it was never finished" in out
    assert ("resumed from run/checkpoints/step-00000004" if files > 2 else "no good checkpoint") in out
    assert_bit_identical(weights_of(Path("run"), 14), weights_of(uninterrupted, 14))


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "training.json", "config.json"])
def test_a_damaged_checkpoint_is_passed_over(command, text, uninterrupted, capsys, file):
    """Damaged by the disk: its name says that it is complete."""
    assert command("--data", text, *RECIPE, "--output-dir", "run") == 0
    damaged = Path("run/checkpoints/step-00000014") / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    assert command("--resume", "--output-dir", "run") == 0
    out = capsys.readouterr().out
    assert "step-00000014 is damaged" in out and Path("run/checkpoints/step-00000014.damaged").exists()
    assert "resumed from run/checkpoints/step-00000012" in out
    assert_bit_identical(weights_of(Path("run"), 14), weights_of(uninterrupted, 14))


def test_training_seconds_are_those_of_a_device_that_works_behind_python(tmp_path, text, monkeypatch):
    """A clock that only the device moves: a step takes a second, and is queued; evaluating takes a hundred. The queue
    is short: before an evaluation Python comes back from it when the step is nearly over."""
    trainer = make_trainer(tmp_path, text, max_steps=14, eval_every=4)
    clock, ready = [0.0], [0.0]
    train, finish, evaluate = gpt2.training_step, gpt2.finish_reading, gpt2.evaluate

    def queue(*arguments):
        ready.append(max(ready[-1], clock[0]) + 1)
        if len(ready) % 4 == 1:
            clock[0] = ready[-1] - 0.1
        return train(*arguments)

    def wait(reading):
        clock[0] = max(clock[0], reading[1])
        return finish(reading)

    def wait_and_evaluate(trainer):
        clock[0] = max(clock[0], ready[-1]) + 100
        return evaluate(trainer)

    monkeypatch.setattr(gpt2, "time", argparse.Namespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(gpt2, "training_step", queue)
    monkeypatch.setattr(gpt2, "start_reading", lambda values: (values, ready[-1]))
    monkeypatch.setattr(gpt2, "finish_reading", wait)
    monkeypatch.setattr(gpt2, "evaluate", wait_and_evaluate)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert gpt2.Run(trainer, gpt2.Progress(), tmp_path / "run", math.nan, 0.0).train() == 0
    results = json.loads((tmp_path / "run/metrics.json").read_text())["results"]
    assert results["process_seconds"] == 14 + 5 * 100  # and five evaluations
    assert results["training_seconds"] == 14 and results["tokens_per_second"] == 256
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["tokens_per_second"] for line in lines if "tokens_per_second" in line} == {256}


def test_speed_in_the_log_is_that_of_the_steps_since_the_last_line(tmp_path, text, monkeypatch):
    """A clock that moves a second per step and a hundred per evaluation, on a device that works while Python waits."""
    trainer = make_trainer(tmp_path, text, max_steps=40, eval_every=8)  # a line every second step
    clock, train, evaluate = [0.0], gpt2.training_step, gpt2.evaluate

    def wait_for(seconds, call):
        clock[0] += seconds
        return call

    monkeypatch.setattr(gpt2, "time", argparse.Namespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(gpt2, "training_step", lambda *arguments: wait_for(1, train)(*arguments))
    monkeypatch.setattr(gpt2, "evaluate", lambda trainer: wait_for(100, evaluate)(trainer))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert gpt2.Run(trainer, gpt2.Progress(), tmp_path / "run", math.nan, 0.0).train() == 0
    speeds = [line["tokens_per_second"] for line in gpt2.read_log(tmp_path / "run") if "tokens_per_second" in line]
    assert speeds == [256] * 20


@pytest.mark.parametrize(("documents", "data", "prompt"), [
    (1, None, "\n"), (99, None, "\n"), (100, None, ""), (100, "stdlib", "class Cat")])  # fmt: skip
def test_samples_begin_with_a_document_only_if_the_model_has_seen_many(
    tmp_path, text, monkeypatch, documents, data, prompt
):
    trainer, prompts = make_trainer(tmp_path, text, max_steps=1), []
    trainer.data.facts["documents"]["train"] = documents
    trainer.settings = replace(trainer.settings, data=data or trainer.settings.data)
    monkeypatch.setattr(gpt2, "sample_texts", lambda _model, _tokenizer, prompt, _: prompts.append(prompt) or ["?"])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert gpt2.Run(trainer, gpt2.Progress(), tmp_path / "run", math.nan, 0.0).train() == 0
    assert prompts == [prompt] * 3  # before and after training, and at the end
    logged = [line["sample"] for line in gpt2.read_log(tmp_path / "run") if "sample" in line]
    assert logged == [prompt.strip() + "?"] * 2


def test_more_steps_can_be_asked_for(command, text):
    assert command("--data", text, *SIZES, "--max-steps", 4, "--output-dir", "run", "--schedule", "wsd") == 0
    assert command("--resume", "--output-dir", "run", "--max-steps", 6) == 0
    assert gpt2.find_checkpoints(Path("run"))[0].name == "step-00000006"


def test_a_finished_run_has_nothing_left_to_resume(command, text, capsys):
    """Nothing of it changes, not even the time of a file."""
    assert command("--data", text, *SIZES, "--max-steps", 4, "--output-dir", "run") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    for words in ([], ["--max-steps", 4]):
        capsys.readouterr()
        assert command("--resume", "--output-dir", "run", *words) == 0
        assert capsys.readouterr().out.endswith("nothing is left to do: for more steps, --max-steps\n")
    assert command("--resume", "--output-dir", "run", "--max-steps", 3) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: --max-steps 3 is less than the 4 steps") and error.count("\n") == 1
    assert "learning rate" not in out  # there is none behind the end of a schedule
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_a_micro_batch_that_no_longer_divides_can_be_chosen_anew(command, text, tmp_path):
    """As after resuming with more processes."""
    trainer = make_trainer(tmp_path, text, "--micro-batch-size", "8")
    with pytest.raises(gpt2.UserError, match=r"give --micro-batch-size auto$"):
        gpt2.complete_settings(trainer.settings, trainer.order, 2)
    assert command("--data", text, *SIZES, "--micro-batch-size", 2, "--max-steps", 4, "--output-dir", "run") == 0
    assert command("--resume", "--output-dir", "run", "--micro-batch-size", "auto", "--max-steps", 6) == 0
    assert json.loads(Path("run/metrics.json").read_text())["configuration"]["micro_batch_size"] == 8


def test_weights_that_training_only_makes_worse_stay_the_best_checkpoint(command, text, uninterrupted):
    """Fine-tuning with an absurd learning rate: what --init gave can still be had, and the run be resumed."""
    words = ["--data", text, "--init", uninterrupted, "--lr", 5, "--batch-tokens", 256, "--eval-every", 2]
    assert command(*words, "--max-steps", 4, "--output-dir", "run") == 0
    assert json.loads(Path("run/metrics.json").read_text())["results"]["best_step"] == 0
    assert command("--resume", "--output-dir", "run", "--max-steps", 6) == 0
    assert command("--init", "run", "--export", "best") == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (Path("best"), weights_in(uninterrupted)))
    assert_bit_identical(one, two)


def weights_in(run: Path) -> Path:
    return gpt2.find_weights(gpt2.resolve_settings(gpt2.parse_arguments(["--init", str(run)])))


def test_a_run_that_died_before_its_first_step_is_resumed_from_the_weights_of_init(
    command, text, uninterrupted, monkeypatch, capsys
):
    words = ["--data", text, "--init", uninterrupted, "--batch-tokens", 256, "--max-steps", 3]
    assert command(*words, "--output-dir", "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(gpt2.Run, "loop", lambda self, request: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command(*words, "--output-dir", "run")
    assert command("--resume", "--output-dir", "run") == 0
    assert "resumed from run/checkpoints/step-00000000" in capsys.readouterr().out
    assert_bit_identical(weights_of(Path("run"), 3), weights_of(Path("straight"), 3))


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_the_weights_of_init_are_needed_only_until_the_first_checkpoint(
    command, text, uninterrupted, monkeypatch, capsys, has_checkpoint
):
    shutil.copytree(weights_in(uninterrupted), "source")
    config = json.loads(Path("source/config.json").read_text())
    weights = load_file("source/model.safetensors")
    weights["transformer.wte.weight"] = F.pad(weights["transformer.wte.weight"], (0, 0, 0, 43))
    save_file(weights, "source/model.safetensors")  # rows for more tokens than the tokenizer has
    Path("source/config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    words = ["--data", text, "--init", "source", "--batch-tokens", 256, "--max-steps", 3]
    assert command(*words, "--output-dir", "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(gpt2.Run, "loop", lambda self, request: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command(*words, "--output-dir", "run")
    if not has_checkpoint:
        shutil.rmtree("run/checkpoints/step-00000000")
        assert command("--resume", "--output-dir", "run") == 0
        assert_bit_identical(weights_of(Path("run"), 3), weights_of(Path("straight"), 3))
        return
    shutil.rmtree("source")
    assert command("--resume", "--output-dir", "run") == 0, capsys.readouterr().err
    assert_bit_identical(weights_of(Path("run"), 3), weights_of(Path("straight"), 3))


def test_without_a_preset_init_trains_gently_for_an_epoch(uninterrupted, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("alpha beta gamma delta\n" * 10_000)
    words = ["--data", str(text), "--init", str(uninterrupted), "--cache-dir", str(tmp_path)]
    settings = gpt2.resolve_settings(gpt2.parse_arguments([*words, "--block-size", "30", "--dropout", "0.3"]))
    data = gpt2.prepare_tokens(settings)
    trainer = gpt2.make_trainer(settings, (0, 1, CPU), data, gpt2.make_model(settings, data.tokenizer))
    settings = trainer.settings
    assert settings.lr == 1e-4 and trainer.model.h[0].mlp.resid_dropout.p == 0.3
    assert settings.batch_tokens == 2**15 // 30 * 30  # whole contexts
    assert settings.max_steps == round(len(data.train) / settings.batch_tokens)


def test_the_last_two_and_the_best_checkpoint_are_kept(command, text, monkeypatch):
    losses = iter([9, 5, 3, 4, 6, 7, 8])  # at steps 0, 2, 4, ...
    monkeypatch.setattr(gpt2, "evaluate", lambda trainer: next(losses))
    assert command("--data", text, *SIZES, "--max-steps", 12, "--eval-every", 2, "--output-dir", "run") == 0
    assert [path.name for path in gpt2.find_checkpoints(Path("run"))] == [f"step-{n:08d}" for n in (12, 10, 4)]
    settings = gpt2.resolve_settings(gpt2.parse_arguments(["--init", "run"]))
    assert Path(settings.weights).name == "step-00000004"


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(command, text, monkeypatch, capsys):
    original, saved = gpt2.save_file, []

    def fill_up(tensors, path, **options):
        saved.append(path)
        if len(saved) == 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(gpt2, "save_file", fill_up)
    assert command("--data", text, *RECIPE, "--output-dir", "run") == 2
    error = capsys.readouterr().err.strip()
    assert "No space left on device" in error and "step-00000004" in error and "\n" not in error
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000004"]


# Several processes

DRIVER = """
import os, sys
sys.path.insert(0, {folder!r})
import gpt2_from_scratch as gpt2

original = gpt2.write_tokens

def write_tokens(*arguments):
    with open("tokenised by", "a") as file:
        file.write(os.environ["RANK"])
    original(*arguments)

gpt2.write_tokens = write_tokens
sys.exit(gpt2.main(gpt2.parse_arguments()))
"""


def torchrun(*words, cwd: Path) -> subprocess.CompletedProcess:
    (cwd / "driver.py").write_text(DRIVER.format(folder=str(SCRIPT.parent)))
    words = [*conftest.torchrun(), "driver.py", *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_two_processes_equal_one(command, text, tmp_path):
    """Same losses, weights and validation loss up to rounding; with accumulation, and with one writer."""
    words = ["--data", str(text), *SIZES, "--max-steps", "6", "--eval-every", "3", "--micro-batch-size", "2"]
    done = torchrun(*words, "--output-dir", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best validation loss") == 1
    assert (tmp_path / "tokenised by").read_text() == "0"  # the other one waited
    assert command(*words, "--output-dir", "one") == 0
    one, two = losses_of(Path("one")), losses_of(Path("two"))
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    assert [entry[2] for entry in one] == pytest.approx([entry[2] for entry in two], rel=1e-5)
    a, b = weights_of(Path("one"), 6), weights_of(Path("two"), 6)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)


def test_a_plan_of_two_processes_tries_as_many_steps_in_each(text, tmp_path, monkeypatch):
    """Whichever is the slower one: otherwise one would wait for the other for ever."""
    monkeypatch.setitem(globals(), "DRIVER", DRIVER.replace("sys.exit", SLOW_AND_FAST + "sys.exit"))
    done = torchrun("--data", text, *SIZES, "--max-steps", "6", "--plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"steps of {rank}").read_text() for rank in (0, 1)] == ["0", "0"]


SLOW_AND_FAST = """
gpt2.PLAN_SECONDS = 1e-9 if os.environ["RANK"] == "0" else 1e9
original_step = gpt2.training_step

def step(trainer, number, batch):
    with open(f"steps of {{trainer.machine.rank}}", "a") as file:
        file.write(str(number))
    return original_step(trainer, number, batch)

gpt2.training_step = step
"""


def test_an_error_that_all_processes_meet_is_printed_once(text, tmp_path):
    done = torchrun("--data", text, *SIZES, "--batch-tokens", "32", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("error: --batch-tokens 32 is no multiple of") == 1, done.stderr


# Longer runs, and what is kept


def test_more_steps_say_what_becomes_of_the_rate(command, text, capsys):
    """Of a cosine it jumps up again: the line says from where to where."""
    assert command("--data", text, *SIZES, "--max-steps", 10, "--output-dir", "run") == 0
    capsys.readouterr()
    assert command("--resume", "--output-dir", "run", "--max-steps", 20) == 0
    cosine = lambda step, last: 1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / last)))  # no warm-up: 10 // 20
    said = f"--max-steps: 10 -> 20; at step 10 the learning rate would have been {cosine(9, 20):.2e} in "
    said += f"place of {cosine(9, 10):.2e}"
    assert said in " ".join(capsys.readouterr().out.split())


def test_wsd_goes_on_from_before_its_decay(command, text, capsys):
    """The run of 20 steps decays from step 16 on. Made longer, it is what a run of 30 steps would have been."""
    words = ["--data", text, *SIZES, "--schedule", "wsd", "--eval-every", 6, "--warmup-steps", 2]
    assert command(*words, "--max-steps", 20, "--output-dir", "run") == 0
    assert "step-00000016" in [path.name for path in gpt2.find_checkpoints(Path("run"))]
    capsys.readouterr()
    assert command("--resume", "--output-dir", "run", "--max-steps", 30) == 0
    out = capsys.readouterr().out
    assert "the decay that began at step 16 is undone" in out and "resumed from run/checkpoints/step-00000016" in out
    assert Path("run/checkpoints/step-00000020.decayed").is_dir()
    assert command(*words, "--max-steps", 30, "--output-dir", "straight") == 0
    assert_bit_identical(weights_of(Path("run"), 30), weights_of(Path("straight"), 30))
    assert losses_of(Path("run"))[-1] == losses_of(Path("straight"))[-1]


def interrupt_at(monkeypatch, step: int) -> None:
    """A signal, before this step (counted from 0) is taken."""
    original = gpt2.training_step

    def send(trainer, number, batch, stop=False):
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer, number, batch, stop)

    monkeypatch.setattr(gpt2, "training_step", send)


def wsd(text, *words) -> list:
    schedule = ["--schedule", "wsd", "--eval-every", 6, "--warmup-steps", 2, "--max-steps", 20]
    return ["--data", text, *SIZES, *schedule, *words]


def test_wsd_keeps_its_decay_while_nothing_from_before_it_can_be_read(command, text, capsys):
    assert command(*wsd(text, "--output-dir", "run")) == 0
    for folder in gpt2.find_checkpoints(Path("run")):
        if folder.name != "step-00000020":
            (folder / "training.safetensors").write_bytes(b"x")
    assert command("--resume", "--output-dir", "run", "--max-steps", 24) == 0
    out = capsys.readouterr().out
    assert "step-00000016 is damaged" in out and "is undone" not in out
    assert "resumed from run/checkpoints/step-00000020" in out


def test_wsd_stopped_in_its_decay_goes_on_there(command, text, monkeypatch, capsys):
    assert command(*wsd(text, "--output-dir", "straight")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 18)
        assert command(*wsd(text, "--output-dir", "run")) == 130
    assert command("--resume", "--output-dir", "run") == 0
    assert "is undone" not in capsys.readouterr().out
    assert_bit_identical(weights_of(Path("run"), 20), weights_of(Path("straight"), 20))


@pytest.mark.parametrize("step", [16, 18])
def test_a_best_checkpoint_that_is_gone_is_not_the_best(command, text, monkeypatch, step):
    """As where a decay is undone in which another was the best. Step 18 was not evaluated."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 17)
        assert command("--data", text, *SIZES, "--max-steps", 40, "--eval-every", 8, "--output-dir", "run") == 130
    if step == 16:
        gpt2.remove_folder(Path("run/checkpoints/step-00000018"))
    file = Path(f"run/checkpoints/step-{step:08d}/training.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best_step": 8, "best_loss": 0.5}))
    gpt2.remove_folder(Path("run/checkpoints/step-00000008"))
    assert command("--resume", "--output-dir", "run") == 0
    results = json.loads(Path("run/metrics.json").read_text())["results"]
    assert Path(f"run/checkpoints/step-{results['best_step']:08d}").is_dir()
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    found = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    kept = {int(folder.name[5:]) for folder in gpt2.find_checkpoints(Path("run"))} & found.keys()
    assert results["best_validation_loss"] == found[results["best_step"]] == min(found[step] for step in kept)


def test_best_is_always_a_checkpoint(command, text, monkeypatch):
    """Stopped before the second evaluation: the loss at step 0, of which there is no checkpoint, is not the best."""
    interrupt_at(monkeypatch, 2)
    assert command("--data", text, *SIZES, "--max-steps", 12, "--eval-every", 6, "--output-dir", "run") == 130
    results = json.loads(Path("run/metrics.json").read_text())["results"]
    assert results["best_step"] is None and results["best_validation_loss"] is None
    assert weights_in(Path("run").resolve()).name == "step-00000003"


def test_a_run_says_when_it_ends_above_the_bigram_model(command, text, capsys):
    assert command("--data", text, *SIZES, "--max-steps", 2, "--output-dir", "run") == 0
    assert "worse than the bigram model" in capsys.readouterr().out
    results = json.loads(Path("run/metrics.json").read_text())["results"]
    assert results["best_validation_loss"] > results["bigram_validation_loss"]


def test_a_run_says_when_the_text_is_too_little_for_the_model(command, text, capsys):
    """41,889 tokens: few for 200,000 parameters, enough for 34,720."""
    assert command("--data", text, *SIZES, "--width", 96, "--max-steps", 1, "--output-dir", "large") == 0
    assert "the model will learn them by heart" in " ".join(capsys.readouterr().out.split())
    assert command("--data", text, *SIZES, "--max-steps", 1, "--output-dir", "small") == 0
    assert "by heart" not in " ".join(capsys.readouterr().out.split())


def test_what_a_run_prints_fits_80_columns(command, text, monkeypatch, capsys):
    """Whatever happens: with a skipped step, resumed with more steps, and with the default's tokenizer."""
    original = gpt2.make_trainer

    def make_and_poison(*arguments):
        trainer = original(*arguments)
        poison(trainer, {40}, math.nan)
        return trainer

    monkeypatch.setattr(gpt2, "make_trainer", make_and_poison)
    first = ["--data", text, *RECIPE, "--tokenizer", "bpe", "--vocab-size", 1024, "--output-dir", "run"]
    said = ""
    for words in (first, ["--resume", "--output-dir", "run", "--max-steps", 24]):
        assert command(*words) == 0
        said += capsys.readouterr().out.partition("\nsample:")[0]
    assert "tokenizer: byte-level BPE" in said and "--max-steps: 14 -> 24" in said and "skipped" in said
    lines = said.splitlines()
    assert max(map(len, lines)) < 80, max(lines, key=len)


def test_the_legend_stands_beside_the_curves(uninterrupted, tmp_path, monkeypatch):
    """Where the picture is drawn, no part of the legend's box is within the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: drawn.append(self) or Path(file).touch())
    (tmp_path / "metrics.jsonl").write_text((uninterrupted / "metrics.jsonl").read_text())
    gpt2.plot(tmp_path, 4.0)
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    (legend,), (axes,) = figure.legends, figure.axes
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1
    assert {"validation", "training, smoothed"} <= {text.get_text() for text in legend.get_texts()}


def test_metrics_say_running_whatever_ends_the_run_later(command, text, monkeypatch):
    seen, original = [], gpt2.training_step

    def look(trainer, step, batch, stop=False):
        seen.append(json.loads(Path("run/metrics.json").read_text())["status"])
        return original(trainer, step, batch, stop)

    monkeypatch.setattr(gpt2, "training_step", look)
    assert command("--data", text, *SIZES, "--max-steps", 4, "--output-dir", "run") == 0
    assert set(seen) == {"running"}


def test_tensorboard_has_samples_and_hyperparameters(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(uninterrupted)).Reload()
    assert "samples/text_summary" in tags.Tags()["tensors"]
    assert any(tag.startswith("_hparams_") for tag in tags.summary_metadata)


def test_nothing_takes_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """Every file of a folder, and the folder, are synchronised before the rename; so is a single file."""
    done = []
    paths = {}
    open_, fsync, rename, replace_ = os.open, os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "open", lambda path, *more: paths.setdefault(open_(path, *more), Path(path)) and max(paths))
    monkeypatch.setattr(os, "fsync", lambda number: done.append(("sync", paths.pop(number).name)) or fsync(number))
    monkeypatch.setattr(os, "rename", lambda a, b: done.append(("rename", Path(b).name)) or rename(a, b))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("rename", Path(b).name)) or replace_(a, b))
    with gpt2.new_folder(tmp_path / "step") as folder:
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")
    assert set(done[:3]) == {("sync", "one"), ("sync", "two"), ("sync", "step.incomplete")}
    assert done[3] == ("rename", "step")
    done.clear()
    gpt2.write_json(tmp_path / "value.json", {})
    assert done == [("sync", "value.json.incomplete"), ("rename", "value.json")]


@pytest.mark.parametrize("suffix", [".incomplete", ".damaged", ".decayed", ".deleted.incomplete"])
def test_what_is_no_checkpoint_is_never_used(command, text, uninterrupted, suffix):
    """Neither by --sample nor by --export, which do not clean up first."""
    shutil.copytree(uninterrupted, "run")
    shutil.copytree("run/checkpoints/step-00000014", f"run/checkpoints/step-00000099{suffix}")
    assert [path.name for path in gpt2.find_checkpoints(Path("run"))] == ["step-00000014", "step-00000012"]
    assert weights_in(Path("run").resolve()).name in ("step-00000014", "step-00000012")


def test_a_checkpoint_of_another_shape_is_passed_over(command, text, uninterrupted, capsys):
    shutil.copytree(uninterrupted, "run")
    other = gpt2.GPT(gpt2.GPTConfig(257, block_size=16, layers=1, heads=1, width=8))
    folder = Path("run/checkpoints/step-00000014")
    gpt2.save_pretrained(other, gpt2.load_tokenizer(folder), folder)
    assert command("--resume", "--output-dir", "run") == 0
    assert "of a model of another shape" in capsys.readouterr().out
    assert_bit_identical(weights_of(Path("run"), 14), weights_of(uninterrupted, 14))


# What a run costs


@pytest.mark.parametrize(("total", "passes", "expected"), [(80, 8, True), (60, 8, False), (80, 9, False)])
def test_a_step_becomes_a_graph_where_there_is_room_for_an_evaluation_beside_it(monkeypatch, total, passes, expected):
    """A peak of 30 GiB so far, and 2.5 GiB of moments and gradients to come: 65 GiB."""
    machine = SimpleNamespace(device=torch.device("cuda"), mode="compiled", dtype=torch.bfloat16, world=1,
                              micro_batch_size=4)  # fmt: skip
    trainer = SimpleNamespace(machine=machine, model=None, sequences_per_step=4 * passes,
                              settings=SimpleNamespace(gradient_checkpointing=False))  # fmt: skip
    monkeypatch.setattr(gpt2, "peak_memory", lambda device: 30.0)
    monkeypatch.setattr(gpt2, "count_parameters", lambda model: 2.5 * 2**30 / 12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total * 2**30))
    assert gpt2.StepGraph.can_run(trainer) is expected
    for name, other in (("world", 2), ("mode", "eager"), ("dtype", torch.float16), ("device", torch.device("cpu"))):
        trainer.machine = SimpleNamespace(**vars(machine) | {name: other})
        assert not gpt2.StepGraph.can_run(trainer), name
    trainer.machine, trainer.settings.gradient_checkpointing = machine, True
    assert not gpt2.StepGraph.can_run(trainer)


def test_plan_counts_a_pass_for_each_micro_batch_and_the_rest_once(tmp_path, text, monkeypatch):
    """A clock that a pass moves by 3 seconds, and a step by 5 more: 8 micro-batches take 29 seconds and not 64."""
    trainer, clock = make_trainer(tmp_path, text, "--micro-batch-size", "1"), [0.0]

    def step(trainer, number, batch):
        clock[0] += 5 + 3 * len(batch)

    monkeypatch.setattr(gpt2, "time", argparse.Namespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(gpt2, "training_step", step)
    assert gpt2.seconds_per_step(trainer) == pytest.approx(8 * 3 + 5)
    trainer.step_graph = object()  # a graph holds for whole steps only

    def step_by_graph(trainer, number, batch):
        clock[0] += 2 if len(batch) == 8 else 100

    monkeypatch.setattr(gpt2, "training_step", step_by_graph)
    assert gpt2.seconds_per_step(trainer) == pytest.approx(2)


def test_mfu_is_given_only_for_a_rate_that_nothing_disturbed(tmp_path, text, monkeypatch):
    trainer = make_trainer(tmp_path, text)
    flops = 640 * gpt2.flops_per_token(trainer.model.config)
    for rate, expected in ((2 * flops, 0.5), (math.nan, None), (0.8 * flops, None)):  # the last would be 125%
        trainer.machine = replace(trainer.machine, matmul_rate=rate)
        assert gpt2.speed(trainer, 10, 4.0)["mfu"] == (expected and pytest.approx(expected))
    for name, expected in (("NVIDIA H200", flops / 989e12), ("NVIDIA T4", flops / 65e12), ("a CPU", None)):
        monkeypatch.setattr(gpt2, "device_name", lambda device, name=name: name)
        assert gpt2.speed(trainer, 10, 4.0)["mfu_of_data_sheet"] == (expected and pytest.approx(expected))
    clock, seconds = [0.0], iter([1, 1] * 4 + [1, 2, 1, 3, 2, 1, 4, 1, 2, 3] * 9)
    tick = lambda: clock.append(clock[-1] + next(seconds)) or clock[-1]
    monkeypatch.setattr(gpt2, "time", argparse.Namespace(perf_counter=tick))
    assert math.isnan(gpt2.measure_matmul_rate.__wrapped__(CPU, torch.float32))


@pytest.mark.parametrize(("name", "tera"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
    ("Tesla T4", 65), ("NVIDIA A10G", None), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("Tesla V100-SXM2-16GB", 125),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 NVL", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090 D", None), ("CPU (x86_64, 2 threads)", None),
])  # fmt: skip
def test_the_rate_of_the_data_sheet(name, tera):
    """NVIDIA's data sheets, dense bf16 (fp16 before Ampere). A card that is not named there has none."""
    assert gpt2.data_sheet_rate(name) == (tera and tera * 1e12)


def test_a_model_that_cannot_be_compiled_runs_eagerly_and_says_why(tmp_path, text, monkeypatch):
    trainer = make_trainer(tmp_path, text)
    monkeypatch.setattr(torch, "compile", lambda model, **options: (_ for _ in ()).throw(RuntimeError("no compiler")))
    trainer.machine = argparse.Namespace(device=argparse.Namespace(type="cuda"), world=1, micro_batch_size=1)
    assert gpt2.compile_compute_copy(trainer, True) == "eager (torch.compile failed: no compiler)"


def test_a_signal_in_an_evaluation_ends_the_run_with_its_checkpoint(command, text, monkeypatch):
    """No step more, and no second checkpoint. In the last evaluation the run is finished."""
    evaluate, calls = gpt2.evaluate, []

    def interrupted(trainer):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(trainer)

    monkeypatch.setattr(gpt2, "evaluate", interrupted)
    for at, code, steps in ((2, 143, [2]), (3, 0, [2, 4])):
        calls.clear()
        words = ("--data", text, *SIZES, "--max-steps", 4, "--eval-every", 2, "--output-dir", f"run-{at}")
        assert command(*words) == code
        saved = sorted(path.name for path in Path(f"run-{at}/checkpoints").iterdir())
        assert saved == [f"step-{step:08d}" for step in steps]


def test_a_training_draws_one_sample_and_says_nothing_of_what_is_not_set(command, text, monkeypatch, capsys):
    sample_texts, drawn = gpt2.sample_texts, []
    monkeypatch.setattr(gpt2, "sample_texts", lambda *words: drawn.append(words[3].num_samples) or sample_texts(*words))
    words = ("--data", text, *SIZES, "--max-steps", 2, "--lr", "1e-3", "--num-samples", 7, "--optimizer", "muon")
    assert command(*words, "--output-dir", "run") == 0
    assert set(drawn) == {1} and "None" not in capsys.readouterr().out


RISEN, LITTLE = "lowest at step 2 and has risen since", "worse than the bigram model"


@pytest.mark.parametrize(("losses", "flags", "notes", "sample"), [
    ([6.0, 3.0, 5.0], (), [RISEN, "A lower --lr"], "--sample and --export take step 2)"),
    ([6.0, 3.0, 5.0], ("--batch-tokens", 2**14), [RISEN, "by heart: more text"], "--sample and --export take step 2)"),
    ([6.0, 5.9, 5.8], (), [LITTLE], "\nsample:\n"), ([6.0, 1.0, 0.9], (), [], "\nsample:\n"),
    ([6.0, 1.0, 1.01], (), [], "--sample and --export take step 2)")])  # fmt: skip
def test_what_the_end_says_of_validation(command, text, monkeypatch, capsys, losses, flags, notes, sample):
    """Evaluated at the start, after two steps and after four."""
    values = iter(losses)
    monkeypatch.setattr(gpt2, "evaluate", lambda trainer: next(values))
    words = ("--data", text, *SIZES, "--max-steps", 4, "--eval-every", 2, *flags)
    assert command(*words, "--output-dir", "run") == 0
    out = capsys.readouterr().out
    assert sample in out
    end = " ".join(out[out.index("| steps") :].split())
    assert [note for note in (RISEN, "A lower --lr", "by heart: more text", LITTLE) if note in end] == notes


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A trainer on a GPU of 16,000 bytes that is a pretence: 8 sequences a step, of which passes of up to 2 fit."""
    trainer = types.SimpleNamespace(
        machine=types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), world=1, micro_batch_size=1),
        sequences_per_step=8, order=types.SimpleNamespace(block_size=16), model=torch.nn.Linear(10, 10, bias=False),
        settings=types.SimpleNamespace(shard_optimizer=False), largest=2, tried=[], kept=[])  # fmt: skip

    def forward_backward(trainer, size):
        trainer.tried.append(size)
        if size > trainer.largest:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(gpt2, "forward_backward", forward_backward)
    monkeypatch.setattr(gpt2, "peak_memory", lambda device: 0)
    monkeypatch.setattr(gpt2, "agree", lambda machine, value, choose: value)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: trainer.kept.append(size))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=16_000))
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return trainer


def test_room_is_kept_for_gradients_where_passes_add_up(pretended_gpu):
    """Beside one pass: two moments for each parameter, and its gradient where a step has several passes."""
    assert gpt2.largest_micro_batch(pretended_gpu) == 2
    assert (pretended_gpu.tried, pretended_gpu.kept) == ([8, 4, 2], [800, 1200, 1200])  # bytes


@pytest.mark.parametrize(("used", "largest", "wanted"), [
    (3_500, 8, 4),  # 3,100 for each sequence: four of them, 400 and 1,200 are less than 95% of 16,000 bytes
    (2_100, 8, 8),  # eight, 400 and 800, as one pass needs no room for gradients
    (2_200, 8, 4), (3_900, 8, 2), (8_000, 8, 1),
    (3_500, 2, 1)])  # passes of four do not fit after all
def test_a_compiled_step_may_take_a_larger_micro_batch(pretended_gpu, monkeypatch, used, largest, wanted):
    """By what a compiled pass of one sequence took: `used` bytes, with 400 of weights."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 400)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: used)
    pretended_gpu.largest = largest
    assert gpt2.larger_when_compiled(pretended_gpu) == wanted
    assert (pretended_gpu.tried or [1])[-1] == wanted  # so that peak_memory() is that of the micro-batch
