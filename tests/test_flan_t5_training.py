"""flan-t5_samsum.py: training is what a plain PyTorch loop does, whatever the micro-batch, precision or processes."""

import contextlib
import itertools
import json
import math
import random
import shutil
import subprocess

import fake_hub
import pytest
from conftest import start, torchrun, wait, write_jsonl
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def no_dropout(model_folder, tmp_path_factory):
    """The model without dropout, so that two ways of computing can be compared."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("model") / "no-dropout")
    config = json.loads((folder / "config.json").read_text()) | {"dropout_rate": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Eleven training rows whose summaries have 5 to 62 words: a mean of means would be far from the mean."""
    folder = tmp_path_factory.mktemp("data") / "uneven"
    rows = [{"dialogue": f"Femi: row {i}{' and so on' * (i % 4)}", "summary": "Esra gives" + " Femi a tent" * length}
            for i, length in enumerate((1, 20, 2, 15, 1, 3, 9, 1, 6, 18, 2))]  # fmt: skip
    write_jsonl(folder / "train.jsonl", rows)
    for split in ("validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows[:1])
    return folder


class Recorder:
    """Watches one training: the starting weights, the rows of each forward pass, the gradient of each step."""

    def __init__(self, flan, monkeypatch):
        self.batches, self.gradients, self.model, self.start = [], [], None, None
        torch, collate, add_lora, load_base = flan.torch, flan.Collator.__call__, flan.add_lora, flan.load_base

        def watch(model):
            self.model = model
            self.start = {name: value.clone() for name, value in model.state_dict().items()}
            return model

        def watched_add_lora(model, args):
            model = add_lora(model, args)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at first, when no gradient would reach A
                    torch.nn.init.normal_(parameter, std=0.05)
            return watch(model)

        def watched_collate(collator, rows):
            self.batches.append([(row["input_ids"], row["labels"]) for row in rows])
            return collate(collator, rows)

        def clip(accelerator, parameters, max_norm, norm_type=2):
            parameters = list(parameters)
            self.gradients.append({name: p.grad.clone() for name, p in self.named() if p.grad is not None})
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

        monkeypatch.setattr(flan, "add_lora", watched_add_lora)
        monkeypatch.setattr(flan, "load_base", lambda *args: watch(load_base(*args)))
        monkeypatch.setattr(flan.Collator, "__call__", watched_collate)
        monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", clip)

    def named(self):
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def plain_loop(torch, model, steps, learning_rates):
    """AdamW over `steps`, lists of (source, target) ids, row by row and without padding; loss and gradient per step."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    model.train()
    losses, gradients = [], []
    for rows, lr in zip(steps, learning_rates, strict=True):
        optimizer.zero_grad()
        tokens = sum(len(target) for _, target in rows)
        loss = 0
        for source, target in rows:
            shifted = torch.tensor([[0, *target[:-1]]])
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=shifted).logits[0]
            loss -= torch.log_softmax(logits, -1)[range(len(target)), target].sum() / tokens
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return losses, gradients


def curve(run):
    return json.loads((run / "metrics.json").read_text())["curve"]


@pytest.mark.parametrize("kind, micro_batch_size", [("lora", 8), ("lora", 4), ("lora", 2), ("lora", 1), ("full", 2)])
def test_training_is_a_plain_loop_whatever_the_micro_batch(
    flan, command, no_dropout, uneven, tmp_path, monkeypatch, kind, micro_batch_size
):
    """Losses, gradients and final weights over four steps of 8, 3, 8 and 3 rows."""
    torch = flan.torch
    with monkeypatch.context() as patch:
        seen = Recorder(flan, patch)
        done = command(
            "--model", no_dropout, "--dataset", uneven, "--output-dir", tmp_path / "run", "--epochs", "2",
            "--batch-size", "8", "--micro-batch-size", micro_batch_size, "--lr", "1e-3", "--max-new-tokens", "2",
            "--lora-dropout", "0", *(["--full"] if kind == "full" else []), cwd=tmp_path,
        )  # fmt: skip
    assert done.code == 0, done
    rows = [row for batch in seen.batches for row in batch]
    assert max(map(len, seen.batches)) == micro_batch_size
    assert sorted(rows[:11]) == sorted(rows[11:]) and len({str(row) for row in rows[:11]}) == 11
    steps = [rows[:8], rows[8:11], rows[11:19], rows[19:]]

    reference = flan.load_base(no_dropout, torch.device("cpu"), torch.float32)
    if kind == "lora":
        reference = flan.peft.get_peft_model(reference, seen.model.peft_config["default"])
    else:
        reference.requires_grad_(True)
    reference.load_state_dict(seen.start)
    # One step of warm-up (5% of 4, rounded up) from 0, then down to 0 after the last.
    losses, gradients = plain_loop(torch, reference, steps, [0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    logged = curve(tmp_path / "run")
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-5)
    assert [e["learning_rate"] for e in logged] == pytest.approx([0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    means = [torch.tensor([len(target) for _, target in step]).float().std() for step in steps]
    assert min(means) > 5  # tokens per row: uneven indeed
    assert len(seen.gradients) == 4
    for step, (found, expected) in enumerate(zip(seen.gradients, gradients, strict=True)):
        assert set(found) == set(expected)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in expected.values()))
        assert logged[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=2e-5 * norm, rtol=1e-3)
    trained = dict(reference.named_parameters())
    for name, parameter in seen.named():
        assert not parameter.equal(seen.start[name]), name
        # Adam makes a whole step of a gradient that is nothing but rounding: compared as a whole, these hardly count.
        update = (trained[name] - seen.start[name]).norm()
        assert (parameter - trained[name]).norm() < 0.02 * update, name
    frozen = {name for name, _ in seen.model.named_parameters()} - {name for name, _ in seen.named()}
    assert all(seen.model.get_parameter(name).equal(seen.start[name]) for name in frozen)
    assert bool(frozen) == (kind == "lora")


def test_gradient_checkpointing_changes_nothing(command, no_dropout, uneven, tmp_path):
    losses = {}
    for flags in ((), ("--gradient-checkpointing",), ("--gradient-checkpointing", "--int8"), ("--int8",)):
        run = tmp_path / " ".join(("run", *flags))
        done = command("--model", no_dropout, "--dataset", uneven, "--output-dir", run, "--max-steps", "4", "--lr",
                       "1e-2", "--lora-dropout", "0", "--max-new-tokens", "2", *flags, cwd=tmp_path)  # fmt: skip
        assert done.code == 0, done
        losses[flags] = [entry["loss"] for entry in curve(run)]
    assert losses["--gradient-checkpointing",] == pytest.approx(losses[()], rel=1e-5)
    assert losses["--gradient-checkpointing", "--int8"] == pytest.approx(losses["--int8",], rel=1e-4)
    assert losses[()][3] < losses[()][0]


def test_learning_rate_warms_up_over_5_percent_and_falls_linearly(trained):
    """18 steps: one of warm-up, then a line from the peak to 0."""
    found = [entry["learning_rate"] for entry in curve(trained.folder)]
    assert found == pytest.approx([0, *(1e-2 * (18 - step) / 17 for step in range(1, 18))])


def test_learning_rate_of_many_steps(flan):
    """100 steps: five of warm-up. And transformers' schedule of that name is the same for any number of steps."""
    rates = [2e-3 * flan.learning_rate_factor(step, 100) for step in range(100)]
    for steps in (1, 2, 3, 19, 20, 21, 500):
        optimizer = flan.torch.optim.SGD([flan.torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = flan.transformers.get_scheduler("linear", optimizer, -(-steps // 20), steps)
        for step in range(steps):
            assert flan.learning_rate_factor(step, steps) == pytest.approx(schedule.get_last_lr()[0]), (step, steps)
            optimizer.step()
            schedule.step()
    assert rates == pytest.approx([2e-3 * i / 5 for i in range(5)] + [2e-3 * (100 - i) / 95 for i in range(5, 100)])


# ----------------------------------------------------------------------------------------------------------------------
# The order of the rows
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(flan):
    """sample(rows, batch_size, seed, epoch): the lengths of the rows and the order of one epoch."""

    def sample(rows=1003, batch_size=8, seed=1, epoch=0):
        lengths = random.Random(rows).choices(range(5, 500), k=rows)
        sampler = flan.LengthGroupedSampler(lengths, batch_size, seed)
        sampler.epoch = epoch
        assert len(sampler) == rows
        return lengths, list(sampler)

    return sample


def padded(lengths, order, size):
    """Tokens after padding each batch to its longest row, per real token."""
    batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(map(sum, batches))


@pytest.mark.parametrize("rows, batch_size", [(1003, 8), (8, 8), (7, 8), (1, 1), (401, 8), (400, 8), (50, 1), (9, 4)])
def test_every_epoch_is_a_permutation(sample, rows, batch_size):
    for epoch in range(3):
        _, order = sample(rows, batch_size, epoch=epoch)
        assert sorted(order) == list(range(rows))


@pytest.mark.parametrize("rows, together", [(21, 4), (8, 8), (1, 4), (403, 6)])
def test_an_epoch_of_several_processes_is_filled_with_empty_rows_not_with_others(flan, rows, together):
    sampler = flan.LengthGroupedSampler([5] * rows, 24, 1, together // 2, 2)
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % together == 0 and len(order) - rows < together
    assert sorted(order[:rows]) == list(range(rows)) and set(order[rows:]) <= {rows}


@pytest.mark.parametrize("processes, micro_batch_size", [(2, 8), (4, 4), (2, 4)])
def test_processes_take_rows_of_about_the_same_length_in_all(flan, processes, micro_batch_size):
    """The step waits for the slowest. Dealt in sorted order, the first would have 5 to 14% more than the mean."""
    lengths = random.Random(3).choices(range(5, 500), k=640)
    alone = flan.LengthGroupedSampler(lengths, 16, 1).order(0)
    order = flan.LengthGroupedSampler(lengths, 16, 1, micro_batch_size, processes).order(0)
    batches = [[sorted(rows[start : start + 16]) for start in range(0, 640, 16)] for rows in (alone, order)]
    assert batches[0] == batches[1]
    totals = [sum(lengths[i] for i in order[start : start + micro_batch_size])
              for start in range(0, 640, micro_batch_size)]
    at_once = [totals[i : i + processes] for i in range(0, len(totals), processes)]
    assert sum(map(max, at_once)) * processes < 1.02 * sum(totals)


def test_rows_of_a_batch_have_similar_lengths_but_batches_come_in_random_order(sample):
    lengths, order = sample(epoch=3)
    assert padded(lengths, order, 8) < 1.05 < 1.5 < padded(lengths, range(len(lengths)), 8)
    longest = [max(lengths[i] for i in order[start : start + 8]) for start in range(0, 1000, 8)]
    rises = sum(a < b for a, b in itertools.pairwise(longest))
    assert 0.35 * len(longest) < rises < 0.65 * len(longest)


@pytest.mark.parametrize("rows, most", [(96, 0.5), (400, 0.25), (2000, 0.15)])
def test_few_rows_too_meet_other_rows(sample, rows, most):
    """Sorted as one chunk, 96 rows would make the same batches in every epoch."""
    def pairs(epoch):
        _, order = sample(rows, epoch=epoch)
        return {pair for i in range(0, rows, 8) for pair in itertools.combinations(sorted(order[i : i + 8]), 2)}

    first, second = pairs(0), pairs(1)
    assert len(first & second) < most * len(first)


def test_rows_meet_other_rows_in_other_epochs(sample):
    """Sorting all rows by length would make the same batches in every epoch."""
    batches = [{frozenset(order[start : start + 8]) for start in range(0, 1000, 8)}
               for order in (sample(epoch=epoch)[1] for epoch in (1, 2))]  # fmt: skip
    assert not batches[0] & batches[1]


def test_the_longest_batch_comes_first_so_that_memory_that_does_not_suffice_shows(sample):
    lengths, order = sample()
    assert max(lengths) == max(lengths[i] for i in order[:8])


def test_the_order_follows_from_seed_and_epoch_alone(flan, sample):
    flan.transformers.set_seed(5)
    orders = [sample(seed=1, epoch=4)[1]]
    flan.transformers.set_seed(6)
    orders += [sample(seed=1, epoch=4)[1], sample(seed=2, epoch=4)[1], sample(seed=1, epoch=5)[1]]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]


def test_a_run_takes_a_new_order_in_each_epoch(flan, command, no_dropout, uneven, tmp_path, monkeypatch):
    seen = Recorder(flan, monkeypatch)
    done = command("--model", no_dropout, "--dataset", uneven, "--epochs", "3", "--batch-size", "1",
                   "--max-new-tokens", "2", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    rows = [batch[0] for batch in seen.batches]
    epochs = [rows[:11], rows[11:22], rows[22:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2] and epochs[0] != epochs[2]


# ----------------------------------------------------------------------------------------------------------------------
# Precision
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, base_dtype", [("--int8", "int8"), ("--int4", "uint8")])
def test_quantised_training_evaluates_and_reloads(
    flan, command, model_folder, data, tmp_path, monkeypatch, flag, base_dtype
):
    with monkeypatch.context() as patch:
        seen = Recorder(flan, patch)
        done = command("--model", model_folder, "--dataset", data, "--epochs", "4", "--lr", "5e-3", "--batch-size", "4",
                       "--micro-batch-size", "2", "--max-new-tokens", "24", flag, cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    query = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.base_layer"
    weight = seen.model.get_submodule(query).weight.data
    assert str(weight.dtype) == f"torch.{base_dtype}" and weight.equal(seen.start[f"{query}.weight"])
    assert {"lora" in name for name, _ in seen.named()} == {True}

    run = next((tmp_path / "runs").iterdir())
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["configuration"][flag.strip("-")] is True
    losses = [entry["loss"] for entry in metrics["curve"]]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6]), losses
    best = next(entry for entry in metrics["epochs"] if entry["best"])
    assert best["epoch"] > 0 and best["test"]["rouge1"] > metrics["epochs"][0]["test"]["rouge1"]

    evaluated = command("--evaluate", cwd=tmp_path)  # the precision is that of the run
    assert evaluated.code == 0, evaluated
    assert f"{best['test']['rouge1']:.2f}" in evaluated.out.splitlines()[2]
    predictions = (run / f"predictions/test-epoch-{best['epoch']:g}.jsonl").read_text("utf-8").splitlines()
    predictions = [json.loads(line) for line in predictions]
    file = write_jsonl(tmp_path / "chats.jsonl", [{"dialogue": row["dialogue"]} for row in predictions])
    assert command("--summarize", file, cwd=tmp_path).out.splitlines() == [row["prediction"] for row in predictions]


def test_full_trains_all_weights_and_leaves_a_model(flan, command, model_folder, data, tmp_path):
    done = command("--model", model_folder, "--dataset", data, "--epochs", "2", "--lr", "3e-3", "--batch-size", "4",
                   "--max-new-tokens", "24", "--full", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    run = next((tmp_path / "runs").iterdir())
    metrics = json.loads((run / "metrics.json").read_text())
    stored = fake_hub_weights(model_folder)
    assert metrics["trainable_parameters"] == metrics["parameters"] == sum(p.numel() for p in stored.values())
    model = flan.AutoModelForSeq2SeqLM.from_pretrained(run / "model")
    assert all(not model.get_parameter(name).equal(value) for name, value in stored.items())
    assert not (run / "adapter").exists()
    assert not model.lm_head.weight.equal(model.shared.weight)
    best = next(entry for entry in metrics["epochs"] if entry["best"])
    assert best["epoch"] > 0
    evaluated = command("--evaluate", "--split", "validation", cwd=tmp_path)
    assert evaluated.code == 0 and f"{best['validation']['rouge1']:.2f}" in evaluated.out.splitlines()[2], evaluated


def fake_hub_weights(folder):
    return load_file(folder / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# Two processes
# ----------------------------------------------------------------------------------------------------------------------


def test_two_processes_are_one(flan, command, process, no_dropout, tmp_path):
    """Same losses to rounding as one process with the same batch, every row scored once and in order, one writer."""
    data = tmp_path / "chats"
    for split, count in {"train": 21, "validation": 7, "test": 5}.items():
        write_jsonl(data / f"{split}.jsonl", fake_hub.samsum_rows(split, count))
    flags = ("--model", no_dropout, "--dataset", data, "--lr", "1e-3", "--epochs", "2", "--batch-size", "8",
             "--micro-batch-size", "4", "--lora-dropout", "0", "--max-new-tokens", "24", "--lora-r", "4")  # fmt: skip
    one = command(*flags, "--output-dir", tmp_path / "one", cwd=tmp_path)
    assert one.code == 0, one
    two = process(*flags, "--output-dir", tmp_path / "two", cwd=tmp_path, launcher=torchrun(), timeout=240)
    assert two.code == 0, two
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [m["processes"] for m in metrics] == [1, 2]
    losses = [[entry["loss"] for entry in m["curve"]] for m in metrics]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    norms = [[entry["grad_norm"] for entry in m["curve"]] for m in metrics]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    # The first process's tokens, twice: rows are dealt so that it has half of them, but for a short last batch.
    tokens = [[entry["tokens_per_second"] * entry["seconds"] for entry in m["curve"]] for m in metrics]
    assert tokens[1][:2] == pytest.approx(tokens[0][:2], rel=0.1)
    for split, count in (("validation", 7), ("test", 5)):
        for epoch in (0, 1, 2):
            lines = (tmp_path / f"two/predictions/{split}-epoch-{epoch}.jsonl").read_text("utf-8").splitlines()
            expected = (tmp_path / f"one/predictions/{split}-epoch-{epoch}.jsonl").read_text("utf-8").splitlines()
            assert len(lines) == count and lines == expected
    assert two.out.count("Scores:") == 1 and two.out.count("\ndevice: ") == 1
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*.0"))) == 1


# The second process has a loss that is infinite in its second step, with gradients like any other.
ONE_BAD_LOSS = """
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(sys.argv.pop(1)), "tests"))
import conftest
flan = conftest.load_script(conftest.SCRIPT)
token_mean_loss, calls = flan.token_mean_loss, iter(range(99))
def bad(*words, **more):
    is_bad = next(calls) == 1 and os.environ["RANK"] == "1"
    return token_mean_loss(*words, **more) + (float("inf") if is_bad else 0)
flan.token_mean_loss = bad
step_end = flan.Run.on_step_end
def noted(run, args, state, control, model=None, **more):
    total = sum(p.double().abs().sum().item() for p in model.parameters() if p.requires_grad)
    print(total, file=open("weights " + os.environ["RANK"], "a"))
    return step_end(run, args, state, control, model=model, **more)
flan.Run.on_step_end = noted
sys.exit(flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings)))
"""


def test_a_step_that_is_bad_in_one_process_is_skipped_in_all(model_folder, data, tmp_path):
    (tmp_path / "bad.py").write_text(ONE_BAD_LOSS)
    words = ("--model", model_folder, "--dataset", data, "--batch-size", 4, "--micro-batch-size", 2, "--max-steps", 4,
             "--lr", "1e-2", "--max-new-tokens", 2, "--output-dir", "run")  # fmt: skip
    done = wait(start(*words, cwd=tmp_path, launcher=[*torchrun(), tmp_path / "bad.py"]), 240)
    assert done.code == 0, done
    first, second = ((tmp_path / f"weights {rank}").read_text().split() for rank in (0, 1))
    assert first == second and first[1] == first[0] and len(set(first)) == 3
    assert json.loads((tmp_path / "run/metrics.json").read_text())["results"]["skipped_steps"] == 1


def test_an_error_that_all_processes_meet_is_printed_once(model_folder, tmp_path):
    done = wait(start("--model", model_folder, "--dataset", "nothing.csv", cwd=tmp_path, launcher=torchrun()), 120)
    assert done.code != 0 and done.err.count("error: no dataset nothing.csv") == 1, done


# The script with the fast path of test_flan_t5_fast.py, without a GPU.
FAST = """
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(sys.argv.pop(1)), "tests"))
import conftest
import test_flan_t5_fast as fast
flan = conftest.load_script(conftest.SCRIPT)
flan.Attention, flan.attention = fast.PlainAttention, lambda *args: (fast.reference_attention(*args), None)
flan.why_not_here = flan.why_not_fast = lambda *_: None
sys.exit(flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings)))
"""


def test_two_fast_processes_are_one(command, data, no_dropout, tmp_path):
    """The usual one. Gradients are summed over processes, and divided by their number: norms say so, as clipping hides
    a factor. The last step of an epoch has half of its rows."""
    flags = ("--model", no_dropout, "--dataset", data, "--lr", "1e-3", "--epochs", 2, "--batch-size", 16,
             "--micro-batch-size", 4, "--max-new-tokens", 2, "--lora-dropout", 0)  # fmt: skip
    (tmp_path / "fast.py").write_text(FAST)
    # Else accelerate moves the model from "cpu" to "cpu:0", which copies all parameters. A GPU has one name.
    environment = {"ACCELERATE_TORCH_DEVICE": "cpu"}
    two = wait(start(*flags, "--output-dir", "two", cwd=tmp_path, env=environment,
                     launcher=[*torchrun(), tmp_path / "fast.py"]), 240)  # fmt: skip
    one = command(*flags, "--output-dir", "one", cwd=tmp_path)
    assert one.code == 0 and two.code == 0, (one, two)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [(m["processes"], m["fast_step"]) for m in metrics] == [(1, False), (2, True)], two
    for name in ("loss", "grad_norm"):
        expected, found = ([entry[name] for entry in m["curve"]] for m in metrics)
        assert len(expected) == 4 and found == pytest.approx(expected, rel=1e-3)
    expected, found = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-4, name


# ----------------------------------------------------------------------------------------------------------------------
# FSDP2: accelerate shards on GPUs only. Told that these were GPUs, it does so in two processes of a CPU.
# ----------------------------------------------------------------------------------------------------------------------

SHARDED = """
import importlib.util, os, sys, time
from accelerate import PartialState
from accelerate.utils import DistributedType
init = PartialState.__init__
def as_on_gpus(state, *args, **options):
    init(state, *args, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = as_on_gpus
script = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location("flan_t5_samsum", script)
flan = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flan)
step_end = flan.Run.on_step_end
def watched_step_end(run, args, state, control, model=None, **more):
    parameters = dict(model.named_parameters())
    assert all(isinstance(p, flan.DTensor) for p in parameters.values())
    assert len([name for name in parameters if "shared" in name or "embed_tokens" in name]) == 1
    assert any(name.endswith("lm_head.weight") for name in parameters)
    blocks = [module for module in model.modules() if "T5Block" in type(module).__name__]
    assert blocks and all("FSDP" in type(block).__name__ for block in blocks)
    if str(state.global_step) == os.environ.get("STOP"):
        os.kill(os.getpid(), 15)
    return step_end(run, args, state, control, model=model, **more)
flan.Run.on_step_end = watched_step_end
finish = flan.Run.finish
def slow_finish(*words):
    time.sleep(2 if "STOP" in os.environ else 0)  # the other process has nothing to do here, and must wait
    finish(*words)
flan.Run.finish = slow_finish
generate = flan.transformers.T5ForConditionalGeneration.generate
def small_memory(model, *args, **more):
    if os.environ["RANK"] == os.environ.get("NO_ROOM"):
        raise flan.torch.OutOfMemoryError("no room")
    return generate(model, *args, **more)
flan.transformers.T5ForConditionalGeneration.generate = small_memory
sys.exit(flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings)))
"""
# What `accelerate launch --use_fsdp --fsdp_version 2` sets.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "true"}  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_sharded_over_two_processes_is_one(command, no_dropout, tmp_path, kind):
    """The same losses and predictions; stopped and resumed it ends as it does uninterrupted; the result is whole."""
    data = tmp_path / "chats"
    for split, count in {"train": 21, "validation": 7, "test": 5}.items():
        write_jsonl(data / f"{split}.jsonl", fake_hub.samsum_rows(split, count))
    flags = ("--model", no_dropout, "--dataset", data, "--lr", "1e-3", "--epochs", "2", "--batch-size", "8",
             "--micro-batch-size", "2", "--lora-dropout", "0", "--max-new-tokens", "6", "--lora-r", "4",
             *(["--full"] if kind == "full" else []))  # fmt: skip
    (tmp_path / "sharded.py").write_text(SHARDED)
    launcher = [*torchrun(), tmp_path / "sharded.py"]

    def sharded(*words, **env):
        return wait(start(*words, cwd=tmp_path, launcher=launcher, env=FSDP | env), 240)

    done = [command(*flags, "--output-dir", "one", cwd=tmp_path), sharded(*flags, "--output-dir", "two"),
            sharded(*flags, "--output-dir", "three", STOP="4"),
            sharded("--resume", "--output-dir", "three")]  # fmt: skip
    assert [end.code == 0 for end in done] == [True, True, False, True], done
    assert "interrupted; go on with: accelerate launch --use_fsdp" in done[2].out
    steps = [path.name for path in (tmp_path / "three/checkpoints").iterdir()]
    assert "going on from three/checkpoints/step-00000004" in done[3].out and "step-00000006" in steps
    curves = [curve(tmp_path / name) for name in ("one", "two", "three")]
    for name, rel in (("loss", 1e-4), ("grad_norm", 1e-3)):
        values = [[entry[name] for entry in found] for found in curves]
        assert values[1] == pytest.approx(values[0], rel=rel) and len(values[0]) == 6
        assert values[2] == values[1]
    for path in (tmp_path / "two/predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "one/predictions" / path.name).read_bytes()
    result = {"lora": "adapter/adapter_model", "full": "model/model"}[kind]
    weights = [load_file(tmp_path / name / f"{result}.safetensors") for name in ("one", "two", "three")]
    for name, expected in weights[0].items():
        assert weights[1][name].float().sub(expected).abs().max() < 2e-3, name
        assert weights[2][name].equal(weights[1][name]), name
    used = command("--evaluate", "--adapter", "two", cwd=tmp_path)  # in one process, which reads it like any other
    best = json.loads((tmp_path / "two/metrics.json").read_text())
    (best,) = [entry for entry in best["epochs"] if entry["best"]]
    assert used.code == 0 and f"{best['test']['rouge1']:.2f}" in used.out.splitlines()[2], used


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_sharded_a_process_without_memory_to_score_ends_the_run(model_folder, data, tmp_path, rank):
    """The others wait for its shards, and would go on waiting."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    words = ("--model", model_folder, "--dataset", data, "--full", "--batch-size", "2", "--output-dir", "run")
    process = start(*words, cwd=tmp_path, launcher=[*torchrun(), tmp_path / "sharded.py"], env=FSDP | {"NO_ROOM": rank})
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    is_over = process.returncode is not None
    process.terminate()  # and not killed, as torchrun's processes would outlive it
    done = wait(process)
    assert is_over and done.code != 0 and "error: out of memory: try " in done.err, done


def test_where_accelerate_ties_the_head_to_the_embedding(flan, no_dropout):
    """The cause: T5Config says that every T5 is tied, and `tie_weights` believes it whenever it is called again."""
    plain = flan.AutoModelForSeq2SeqLM.from_pretrained(no_dropout)
    assert plain.lm_head.weight is not plain.shared.weight
    plain.tie_weights()
    ours = flan.load_base(no_dropout, flan.torch.device("cpu"), flan.torch.float32)
    ours.tie_weights()
    assert ours.lm_head.weight is not ours.shared.weight and ours.encoder.embed_tokens.weight is ours.shared.weight
    assert plain.lm_head.weight is plain.shared.weight, "transformers has mended it: load_base need not"
