"""What moves the weights of gpt2_from_scratch.py: AdamW, Muon, schedules, fp16's loss scale, the guard's thresholds."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gpt2_training import CPU, assert_bit_identical, command, losses_of, make_trainer, take_steps, text, weights_of  # noqa: F401 - fixtures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

SIZES = ["--tokenizer", "bytes", "--layers", "2", "--heads", "2", "--width", "32", "--block-size", "32",
         "--batch-tokens", "256", "--lr", "1e-2", "--max-steps", "12", "--eval-every", "4", "--optimizer", "adamw",
         "--schedule", "cosine", "--max-new-tokens", "6"]  # fmt: skip


# AdamW


def test_three_steps_of_adamw_are_those_of_the_paper(tmp_path, text):  # noqa: F811
    """Loshchilov & Hutter 2019, algorithm 2, in double precision: after one step beta2 would not show."""
    trainer = make_trainer(tmp_path, text, "--weight-decay", "0.3", "--warmup-steps", "2")
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    expected = {name: parameter.detach().double() for parameter, name in names.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for step in range(3):
        batch = trainer.fetch_batch(step)
        (trainer.model(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()).backward()
        gradients = {name: parameter.grad.double() for parameter, name in names.items()}
        norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients.values()))
        trainer.model.zero_grad()
        rate = gpt2.learning_rate(step, trainer.settings)
        for name, value in expected.items():
            gradient = gradients[name] * min(1, 1 / norm)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            corrected = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            decay = 0.3 if value.dim() == 2 else 0.0
            expected[name] = value * (1 - rate * decay) - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
        take_steps(trainer, 1, first=step)
        for parameter, name in names.items():
            sure = second[name].sqrt() > 1e-5  # elsewhere rounding of a gradient of about 0 decides
            torch.testing.assert_close(parameter[sure].double(), expected[name][sure], rtol=1e-3, atol=2e-4, msg=name)


# Muon


def test_muon_is_torch_s_and_takes_q_k_and_v_as_three_matrices(tmp_path, text):  # noqa: F811
    ours, theirs = (make_trainer(tmp_path, text, "--optimizer", "muon", "--weight-decay", "0.2") for _ in range(2))
    hidden = [p for p in theirs.model.h.parameters() if p.dim() == 2]
    parts = {p: p.detach().chunk(3 if p.shape[0] == 3 * p.shape[1] else 1) for p in hidden}
    reference = torch.optim.Muon([part for split in parts.values() for part in split], lr=1e-2, weight_decay=0.2,
                                 momentum=gpt2.MOMENTUM, adjust_lr_fn="match_rms_adamw")  # fmt: skip
    optimiser = ours.optimisers[0]
    assert isinstance(optimiser, gpt2.Muon)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            for part, gradient in zip(parts.get(q, ()), p.grad.chunk(len(parts.get(q, (1,)))), strict=False):
                part.grad = gradient.clone()
        for group in optimiser.param_groups:
            group["lr"] = 1e-2
        optimiser.step()
        reference.step()
    for (name, p), q in zip(ours.model.h.named_parameters(), theirs.model.h.parameters(), strict=True):
        if p.dim() == 2:
            # torch iterates in bf16, we do so on a GPU only: a hundredth of an update apart, at most.
            torch.testing.assert_close(p, q, rtol=0, atol=4 * 1e-2 * 0.2 * math.sqrt(p.shape[1]) * 0.02, msg=name)


def test_orthogonalised_matrices_have_singular_values_of_about_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 32, 32), (2, 128, 32), (2, 32, 128)):
        matrices = torch.randn(shape, generator=generator)
        result = gpt2.orthogonalise(matrices).float()
        values = torch.linalg.svdvals(result)
        assert result.shape == shape and values.min() > 0.3 and values.max() < 1.3
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        cosine = torch.cosine_similarity(result.flatten(1), (u @ v).flatten(1))
        assert cosine.min() > 0.95


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(tmp_path, text):  # noqa: F811
    trainer = make_trainer(tmp_path, text, "--optimizer", "muon", "--weight-decay", "0.2")
    muon, adamw = trainer.optimisers
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    of = lambda optimiser: [(names[id(p)], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]]
    assert sorted(name for name, _ in of(muon) + of(adamw)) == sorted(names.values())
    assert {name.split(".", 2)[2] for name, _ in of(muon)} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}  # fmt: skip
    assert {decay for _, decay in of(muon)} == {0.2}
    assert {name for name, decay in of(adamw) if decay} == {"wte.weight", "wpe.weight"}


def test_muon_has_a_learning_rate_of_its_own(tmp_path, text):  # noqa: F811
    trainer = make_trainer(tmp_path, text, "--optimizer", "muon", "--muon-lr", "2e-2", "--warmup-steps", "4")
    take_steps(trainer, 1)
    muon, adamw = ([group["lr"] for group in optimiser.param_groups] for optimiser in trainer.optimisers)
    assert muon == pytest.approx([2e-2 / 4] * 2) and adamw == pytest.approx([1e-2 / 4] * 2)
    settings = lambda *words: gpt2.resolve_settings(gpt2.parse_arguments(words))
    assert (settings().lr, settings().muon_lr) == (8e-3, 0.015)  # the default
    assert settings("--lr", "1e-3").muon_lr is None  # as --lr, then


def test_the_usual_recipe_of_124m_is_one_flag_away():
    recipe = lambda *words: [getattr(gpt2.resolve_settings(gpt2.parse_arguments(("--model", *words))), name)
                             for name in ("optimizer", "lr", "muon_lr", "schedule", "batch_tokens")]  # fmt: skip
    assert recipe("gpt2") == ["muon", 3e-3, 1e-2, "linear", 2**18]
    assert recipe("gpt2", "--optimizer", "adamw") == ["adamw", 6e-4, None, "cosine", 2**19]
    assert recipe("gpt2", "--optimizer", "adamw", "--lr", "1e-3") == ["adamw", 1e-3, None, "cosine", 2**19]
    assert recipe("gpt2-medium") == ["adamw", 3e-4, None, "cosine", 2**19]


def test_a_skipped_step_of_muon_changes_nothing(tmp_path, text):  # noqa: F811
    trainer = make_trainer(tmp_path, text, "--optimizer", "muon")
    take_steps(trainer, 2)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    moments = [trainer.optimisers[0].state[p]["momentum_buffer"].clone() for p in trainer.optimisers[0].state]
    network = trainer.compute_copy.forward
    trainer.compute_copy.forward = lambda *batch: network(*batch) * math.nan
    assert take_steps(trainer, 1, first=2)[0]["skip"]
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    after = [trainer.optimisers[0].state[p]["momentum_buffer"] for p in trainer.optimisers[0].state]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


class Killed(BaseException):
    pass


def run_and_resume(command, monkeypatch, words, step):  # noqa: F811
    """A run, and one that dies in a step and is resumed: both must end alike, to the bit."""
    original = gpt2.training_step

    def die(trainer, number, batch, stop=False):
        if number == step:
            raise Killed
        return original(trainer, number, batch, stop)

    assert command(*words, "--output-dir", "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "training_step", die)
        with pytest.raises(Killed):
            command(*words, "--output-dir", "run")
    assert command("--resume", "--output-dir", "run") == 0
    assert_bit_identical(weights_of(Path("run"), 12), weights_of(Path("straight"), 12))
    assert losses_of(Path("run")) == losses_of(Path("straight"))


@pytest.mark.parametrize("step", [1, 7])
def test_resuming_is_exact_with_muon(command, text, monkeypatch, step):  # noqa: F811
    run_and_resume(command, monkeypatch, ["--data", text, *SIZES, "--dropout", "0.2", "--optimizer", "muon"], step)
    assert any("momentum_buffer.h.0.attn.c_attn.weight" in name for name in weights_of(Path("run"), 12))


# fp16


def test_the_loss_scale_follows_torch_s_grad_scaler():
    """Over 300 steps in which a gradient overflows now and then, with growth every 7 steps."""
    ours = gpt2.LossScale(CPU, enabled=True)
    ours.GROWTH_INTERVAL = 7
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=7)
    parameter = torch.zeros(1, requires_grad=True)
    optimiser, random = torch.optim.SGD([parameter], lr=0.0), np.random.default_rng(0)
    for _ in range(300):
        overflows = random.random() < 0.12
        theirs.scale(parameter.sum()).backward()
        parameter.grad.fill_(math.inf if overflows else 1.0)
        theirs.step(optimiser)
        theirs.update()
        optimiser.zero_grad()
        skipped = ours.overflowed(torch.tensor(2.0), torch.tensor(math.inf if overflows else 1.0))
        assert bool(skipped) == overflows and ours.scale.item() == theirs.get_scale()


def in_fp16(trainer: gpt2.Trainer) -> gpt2.Trainer:
    trainer.machine = replace(trainer.machine, dtype=torch.float16)
    trainer.loss_scale = gpt2.LossScale(CPU, enabled=True)
    return trainer


def test_steps_in_fp16_are_close_to_those_in_float32(tmp_path, text):  # noqa: F811
    one, two = make_trainer(tmp_path, text), in_fp16(make_trainer(tmp_path, text))
    a, b = take_steps(one, 5), take_steps(two, 5)
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-2)
    assert [x["norm"] for x in a] == pytest.approx([x["norm"] for x in b], rel=5e-2)
    assert [x["loss"] for x in a] != [x["loss"] for x in b] and not any(x["skip"] for x in b)


def test_an_overflow_halves_the_scale_and_is_no_fault(tmp_path, text):  # noqa: F811
    """Too large a scale: steps are skipped until it fits, and that is neither counted nor called divergence."""
    trainer = in_fp16(make_trainer(tmp_path, text))
    trainer.loss_scale.state[0] = 2.0**40
    before = trainer.model.wte.weight.clone()
    (first,) = take_steps(trainer, 1)
    assert first["skip"] and first["overflow"] and first["skipped"] == first["in_a_row"] == 0
    assert torch.equal(trainer.model.wte.weight, before) and trainer.loss_scale.scale == 2.0**39
    steps = take_steps(trainer, 30, first=1)
    assert not steps[-1]["skip"] and not any(gpt2.Guard.is_diverging(step) for step in steps)
    assert all(step["skipped"] == 0 for step in steps)


def test_fp16_that_is_not_finite_even_without_a_scale_is_a_fault(tmp_path, text):  # noqa: F811
    trainer = in_fp16(make_trainer(tmp_path, text))
    network = trainer.compute_copy.forward
    trainer.compute_copy.forward = lambda *batch: network(*batch) * math.nan
    steps = take_steps(trainer, 16 + 10)
    assert [step["skipped"] for step in steps] == [0] * 16 + list(range(1, 11))
    assert gpt2.Guard.is_diverging(steps[-1])


def test_resuming_is_exact_in_fp16(command, text, monkeypatch):  # noqa: F811
    """With the scale as it was: it is doubled every third step, until a gradient overflows."""
    monkeypatch.setattr(gpt2, "choose_dtype", lambda wanted, device: torch.float16)
    monkeypatch.setattr(gpt2, "measure_matmul_rate", lambda device, dtype: 1e9)  # slow in fp16 on a CPU
    monkeypatch.setattr(gpt2.LossScale, "GROWTH_INTERVAL", 3)
    run_and_resume(command, monkeypatch, ["--data", text, *SIZES, "--dropout", "0.2"], 7)
    scales = [weights_of(Path("run"), step)["training.safetensors:loss_scale"].tolist() for step in (8, 12)]
    assert scales[0] == [2.0**18, 2.0] and scales[1][0] != 2.0**16


@pytest.mark.parametrize(("before", "after"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_a_run_goes_on_in_another_precision(command, text, monkeypatch, capsys, before, after):  # noqa: F811
    """As where a run of a T4 goes on with an A100: the scale of the loss is not for the other precision."""
    monkeypatch.setattr(gpt2, "measure_matmul_rate", lambda device, dtype: 1e9)  # slow in fp16 on a CPU
    words = ["--data", text, *SIZES, "--eval-every", 4]
    for dtype, more in ((before, [*words, "--max-steps", 4]), (after, ["--resume", "--max-steps", 8])):
        monkeypatch.setattr(gpt2, "choose_dtype", lambda wanted, device, dtype=dtype: dtype)
        assert command(*more, "--output-dir", "run") == 0
    names = [str(dtype).removeprefix("torch.") for dtype in (before, after)]
    assert f"note: this run was in {names[0]}, and goes on in {names[1]}" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert len(norms) == 8 and max(norms[4:]) < 2 * max(norms[:4])
    saved = weights_of(Path("run"), 8).get("training.safetensors:loss_scale")
    assert saved is None if after is torch.float32 else saved[0] == 2.0**16


def test_the_scale_of_the_loss_is_never_below_one():
    scale = gpt2.LossScale(CPU, enabled=True)
    for _ in range(30):
        scale.overflowed(torch.tensor(2.0), torch.tensor(math.inf))
    assert scale.scale == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_exact_in_bf16(command, text, monkeypatch, optimizer):  # noqa: F811
    """The checkpoint holds the float32 weights: what computes is rounded from them anew."""
    monkeypatch.setattr(gpt2, "choose_dtype", lambda wanted, device: torch.bfloat16)
    monkeypatch.setattr(gpt2, "measure_matmul_rate", lambda device, dtype: 1e9)  # slow in bf16 on a CPU
    run_and_resume(command, monkeypatch, ["--data", text, *SIZES, "--dropout", "0.2", "--optimizer", optimizer], 7)
    weight = weights_of(Path("run"), 12)["model.safetensors:transformer.wte.weight"]
    assert weight.dtype is torch.float32 and not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(("capability", "wanted", "expected"), [
    ((9, 0), "auto", torch.bfloat16), ((8, 0), "auto", torch.bfloat16), ((7, 5), "auto", torch.float16),
    ((7, 0), "auto", torch.float16), ((6, 1), "auto", torch.float32), ((7, 5), "fp32", torch.float32),
    ((8, 6), "fp16", torch.float16), ((7, 5), "bf16", None), ((6, 1), "fp16", None)])  # fmt: skip
def test_fp16_is_chosen_where_bf16_is_missing(monkeypatch, capability, wanted, expected):
    """A T4 (7.5) claims bf16 and emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    device = torch.device("cuda")
    if expected is None:
        with pytest.raises(gpt2.UserError, match=f"--dtype {wanted} is for GPUs"):
            gpt2.choose_dtype(wanted, device)
    else:
        assert gpt2.choose_dtype(wanted, device) == expected


# The guard's thresholds


def judged(values: list[tuple[float, float]]) -> list[bool]:
    guard = gpt2.Guard(CPU)
    return [bool(guard.check(torch.tensor(loss), torch.tensor(norm))) for loss, norm in values]


CALM = [(3.0 + 0.1 * (-1) ** step, 0.8) for step in range(40)]  # deviation 0.1


@pytest.mark.parametrize("far", [(4.3, 0.8), (3.0, 60.0), (4.3, 60.0)])
def test_after_three_outliers_in_a_row_steps_are_taken_again(far):
    """The weights are at fault then, and no step at all would leave them there. A good step ends the row."""
    assert judged([*CALM, *[far] * 5, CALM[0], (12.0, 200.0)])[40:] == [True] * 3 + [False] * 2 + [False, True]


def test_a_loss_that_is_never_finite_is_skipped_for_good():
    assert judged([*CALM, *[(math.nan, 0.8)] * 5, (math.inf, 0.8), (3.0, math.nan)])[40:] == [True] * 7


def test_a_loss_within_ten_deviations_is_an_ordinary_one():
    assert judged([*CALM, (3.0 + 0.95, 0.8)])[-1] is False
    assert judged([*CALM, (3.0 + 1.10, 0.8)])[-1] is True


def test_half_a_nat_above_the_mean_is_never_an_outlier():
    quiet = [(3.0, 0.8)] * 40  # no deviation at all
    assert judged([*quiet, (3.49, 0.8)])[-1] is False and judged([*quiet, (3.52, 0.8)])[-1] is True


def test_a_norm_below_ten_times_the_mean_or_the_clipping_is_an_ordinary_one():
    steep = [(3.0, 2.0)] * 40
    assert judged([*steep, (3.0, 19.0)])[-1] is False and judged([*steep, (3.0, 21.0)])[-1] is True
    flat = [(3.0, 0.01)] * 40
    assert judged([*flat, (3.0, 0.99)])[-1] is False and judged([*flat, (3.0, 1.01)])[-1] is True


def test_the_first_twenty_steps_are_only_watched():
    wild = [(3.0, 0.8)] * 19 + [(30.0, 80.0)]
    assert judged(wild) == [False] * 20
    assert judged([(3.0, 0.8)] * 20 + [(30.0, 80.0)])[-1] is True
    assert judged([(math.nan, 0.8)]) == [True]  # what is not finite is never a step


# Dropout


def test_dropout_masks_differ_by_step_and_by_process(tmp_path, text):  # noqa: F811
    """On the same batch and the same weights, only the seed of the step can make a difference."""
    losses = {}
    for step, rank in ((3, 0), (4, 0), (3, 1), (3, 0)):
        trainer = make_trainer(tmp_path, text, "--dropout", "0.3")
        batch = trainer.fetch_batch(0)
        trainer.machine = replace(trainer.machine, rank=rank)
        loss = gpt2.training_step(trainer, step, batch)[0].item()
        assert losses.setdefault((step, rank), loss) == loss
    assert len(set(losses.values())) == 3
