"""flan-t5_samsum.py: what a run leaves, what it prints, and that no run overwrites another."""

import importlib.metadata
import json
import re
import shutil

import fake_hub
import numpy as np
import pytest
from conftest import RECIPE, ROWS, SCRIPT
from safetensors.torch import load_file

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SPLITS = ("validation", "test")


@pytest.fixture(scope="module")
def metrics(trained):
    return json.loads((trained.folder / "metrics.json").read_text(encoding="utf-8"))


def predictions(run, split, epoch):
    lines = (run / f"predictions/{split}-epoch-{epoch}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def test_the_folder_has_what_was_promised_and_nothing_half_written(trained):
    assert [path.name for path in (trained.home / "runs").iterdir()] == ["flan-t5-small-chats-lr=1e-2"]
    names = {path.name for path in trained.folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert events and names - events == {"metrics.json", "metrics.jsonl", "training_loss.png", "rouge.png",
                                         "predictions", "adapter", "checkpoints", "lock"}  # fmt: skip
    assert {path.name for path in (trained.folder / "checkpoints").iterdir()} == {"step-00000012", "step-00000018"}
    files = {f"{split}-epoch-{epoch}.jsonl" for split in SPLITS for epoch in range(4)}
    assert {path.name for path in (trained.folder / "predictions").iterdir()} == files


def test_metrics_say_what_was_run_and_on_what(metrics, trained, model_folder, data):
    configuration = metrics["configuration"]
    expected = {"model": str(model_folder), "dataset": str(data), "lr": 1e-2, "epochs": 3, "batch_size": 4,
                "micro_batch_size": 2, "max_new_tokens": 24, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
                "lora_targets": ["q", "k", "v", "o"], "seed": 42, "num_beams": 1, "max_source_length": 512,
                "max_target_length": 128, "int8": False, "int4": False, "full": False}  # fmt: skip
    assert {name: configuration[name] for name in expected} == expected
    for name in ("torch", "transformers", "peft", "datasets", "bitsandbytes", "evaluate", "rouge_score", "accelerate"):
        assert metrics["versions"][name] == importlib.metadata.version(name)
    assert (metrics["status"], metrics["processes"], metrics["precision"]) == ("finished", 1, "float32")
    assert "CPU" in metrics["device"]
    # 24 adapters of two 16 x 64 matrices on: embedding and head 512 x 64; 6 blocks of attention, 4 of 64 x 64; 4 gated
    # feed-forward layers of 3 x 64 x 64; 2 x 2 + 2 x 3 + 2 norms of 64; 2 x 32 relative positions of 4 heads.
    adapters = 24 * 2 * 16 * 64
    base = 2 * 512 * 64 + 6 * 4 * 64 * 64 + 4 * 3 * 64 * 64 + (2 * 2 + 2 * 3 + 2) * 64 + 2 * 32 * 4
    assert (metrics["trainable_parameters"], metrics["parameters"]) == (adapters, adapters + base)
    # The run prints what it is about, and of all other settings those that are not the recipe's.
    head = " ".join(trained.done.out.split("\nrun: ")[0].split())
    for words in (f"model: {model_folder}", f"dataset: {data}", "3 epochs, lr 1e-2, batch 4, seed 42",
                  "--micro-batch-size 2", "--max-new-tokens 24"):  # fmt: skip
        assert words in head
    assert "lora" not in head and "None" not in head
    assert metrics["optimizer"] == {
        "name": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "peak_learning_rate": 1e-2, "schedule": "linear", "warmup": 0.05, "steps": 18}  # fmt: skip


def test_metrics_have_every_epoch_with_intervals_and_the_best_one(metrics):
    epochs = metrics["epochs"]
    assert [(entry["epoch"], entry["step"]) for entry in epochs] == [(0, 0), (1, 6), (2, 12), (3, 18)]
    for entry in epochs:
        for split in SPLITS:
            assert set(entry[split]) == {*KINDS, *(f"{kind}_interval" for kind in KINDS)}
            for kind in KINDS:
                low, high = entry[split][f"{kind}_interval"]
                assert 0 <= low <= entry[split][kind] <= high <= 100
    assert all(epochs[0][split][kind] == 0 for split in SPLITS for kind in KINDS)  # the bare model says only "!"
    scores = [entry["validation"]["rouge1"] for entry in epochs]
    assert max(scores) > 10
    assert [entry["best"] for entry in epochs] == [i == scores.index(max(scores)) for i in range(4)]
    assert metrics["results"]["best_epoch"] == scores.index(max(scores))
    curve = metrics["curve"]
    assert [entry["step"] for entry in curve] == list(range(1, 19))
    for i, entry in enumerate(epochs[1:]):
        losses = [step["loss"] for step in curve[6 * i : 6 * i + 6]]
        assert entry["train_loss"] == pytest.approx(np.mean(losses))


def test_an_epochs_loss_is_the_mean_of_its_steps(flan):
    """However many of them each line of the log stands for: 2, 2, 2, 1; then 4, 4, 4, 7."""
    scores = {split: {"rouge1": 0.0} for split in SPLITS}
    log = [{"loss": 2.0, "step": 3}, {"loss": 1.0, "step": 4}, {"step": 4, "epoch": 1, "seconds": 1, **scores},
           {"loss": 4.0, "step": 7}, {"loss": 7.0, "step": 8}, {"step": 8, "epoch": 2, "seconds": 1, **scores}]
    assert [entry["train_loss"] for entry in flan.Run.epochs(None, log)] == [1.75, 4.75]
    log = [{"loss": 1.0, "step": 10, "skipped_steps": 0}, {"step": 20, "skipped_steps": 10},
           {"loss": 3.0, "step": 30, "skipped_steps": 5}, {"step": 30, "epoch": 1, "seconds": 1, **scores}]
    assert flan.Run.epochs(None, log)[0]["train_loss"] == pytest.approx((10 * 1 + 5 * 3) / 15)


def test_speed_is_rows_and_tokens_over_seconds(metrics, flan, model_folder, data):
    results = metrics["results"]
    assert results["steps"] == 18 and results["epochs"] == 3 and results["skipped_steps"] == 0
    assert results["samples_per_second"] == pytest.approx(3 * ROWS["train"] / results["training_seconds"], rel=0.1)
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    sources = ["summarize: " + row["dialogue"].replace("\r\n", "\n") for row in rows]
    inputs, targets = (tokenizer(texts).input_ids for texts in (sources, [row["summary"] for row in rows]))
    tokens = [len(source) + len(target) for source, target in zip(inputs, targets, strict=True)]
    assert results["tokens_per_second"] == pytest.approx(3 * sum(tokens) / results["training_seconds"], rel=0.1)
    # Also step by step; the loader has read one batch more, but at the end of an epoch.
    sampler = flan.LengthGroupedSampler(list(map(len, inputs)), 4, 42)
    steps = [order[i : i + 4] for order in map(sampler.order, range(3)) for i in range(0, len(order), 4)]
    for entry, step in zip(metrics["curve"], steps, strict=True):
        assert entry["tokens_per_second"] * entry["seconds"] == pytest.approx(sum(tokens[i] for i in step), rel=0.05)
    assert 0.1 < results["peak_memory_gib"] < 50


def test_seconds_are_those_of_the_clock(metrics, events):
    """TensorBoard notes by itself when a point was written: between those of an epoch there is only training."""
    times, curve = [event.wall_time for event in events.Scalars("train/loss")], metrics["curve"]
    for first in (0, 6, 12):
        seconds = sum(entry["seconds"] for entry in curve[first + 1 : first + 6])
        assert 0.5 * (times[first + 5] - times[first]) < seconds < 1.1 * (times[first + 5] - times[first])
    assert metrics["results"]["training_seconds"] == pytest.approx(
        sum(entry["seconds"] for entry in metrics["curve"]), abs=1e-3)
    assert metrics["results"]["evaluation_seconds"] == pytest.approx(
        sum(entry["seconds"] for entry in metrics["epochs"]), abs=0.06)


def test_results_are_those_of_the_best_epoch_in_the_words_of_the_other_script(metrics):
    results, best = metrics["results"], next(entry for entry in metrics["epochs"] if entry["best"])
    assert (results["best_epoch"], results["best_step"]) == (best["epoch"], best["step"])
    for split in SPLITS:
        assert [results[f"{split}_{kind}"] for kind in KINDS] == [best[split][kind] for kind in KINDS]
    shared = {"steps", "epochs", "skipped_steps", "training_seconds", "samples_per_second", "tokens_per_second", "mfu",
              "peak_memory_gib", "best_step"}  # fmt: skip
    source = (SCRIPT.parent / "gpt2_from_scratch.py").read_text("utf-8")
    assert shared <= set(results) and all(f'"{name}": ' in source for name in shared)


@pytest.mark.parametrize("split", SPLITS)
def test_predictions_hold_every_row_with_its_score(trained, metrics, split):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    originals = fake_hub.samsum_rows(split, ROWS[split])
    for epoch in range(4):
        rows = predictions(trained.folder, split, epoch)
        assert [(row["id"], row["dialogue"], row["reference"]) for row in rows] == [
            (row["id"], row["dialogue"].replace("\r\n", "\n"), row["summary"]) for row in originals
        ]
        for row in rows:
            assert list(row) == ["id", "dialogue", "reference", "prediction", "rouge1"]
            by_hand = 100 * scorer.score(row["reference"], row["prediction"])["rouge1"].fmeasure
            assert row["rouge1"] == pytest.approx(by_hand, abs=0.01)
        mean = np.mean([row["rouge1"] for row in rows])
        assert metrics["epochs"][epoch][split]["rouge1"] == pytest.approx(mean, abs=0.01)


def test_the_adapter_loads_with_peft_and_is_that_of_the_best_epoch(flan, trained, metrics, model_folder):
    """Its summaries, generated by transformers and PEFT alone, are the predictions of the best epoch."""
    torch, transformers = flan.torch, flan.transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder / "adapter")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(model_folder)
    base.generation_config = transformers.GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    model = flan.peft.PeftModel.from_pretrained(base, str(trained.folder / "adapter")).eval()
    assert model.peft_config["default"].base_model_name_or_path == str(model_folder)
    for row in predictions(trained.folder, "test", metrics["results"]["best_epoch"]):
        source = tokenizer("summarize: " + row["dialogue"], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**source, max_new_tokens=24, num_beams=1, do_sample=False)
        assert tokenizer.decode(output[0], skip_special_tokens=True).strip() == row["prediction"]


def test_the_best_adapter_is_kept_when_its_checkpoint_is_gone(flan, command, data, model_folder, tmp_path, monkeypatch):
    """Of four epochs the first is made the best: two checkpoints remain, and the adapter is that of the first epoch."""
    calls, first = [], []

    def summaries(summarizer, sources):
        calls.append(1)
        if len(calls) != 3:  # the evaluations before training, 1 and 2, and after the first epoch, 3 and 4
            return ["!"] * len(sources)
        first.append({name: p.clone() for name, p in summarizer.model.named_parameters() if "lora_" in name})
        return ["Femi gives Esra a bike."] * len(sources)

    monkeypatch.setattr(flan.Summarizer, "__call__", summaries)
    done = command("--model", model_folder, "--dataset", data, "--epochs", "4", *RECIPE, "--limit", "4", cwd=tmp_path)
    assert done.code == 0, done
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.glob("checkpoints/step-*")} == {"step-00000003", "step-00000004"}
    for name, value in load_file(run / "adapter/adapter_model.safetensors").items():
        assert value.equal(first[0][name.replace(".weight", ".default.weight")]), name


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard and plots
# ----------------------------------------------------------------------------------------------------------------------


def read_events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def events(trained):
    return read_events(trained.folder)


def test_tensorboard_has_every_curve(events, metrics):
    tags = set(events.Tags()["scalars"])
    names = ("loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second", "peak_memory_gib")
    wanted = {f"train/{name}" for name in names} | {f"{split}/{kind}" for split in SPLITS for kind in KINDS}
    assert wanted <= tags
    assert "train/mfu" not in tags and metrics["results"]["mfu"] is None  # no data sheet for this CPU
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(e["step"], pytest.approx(e[name], rel=1e-6)) for e in metrics["curve"]]
    for split in SPLITS:
        for kind in KINDS:
            found = [(event.step, event.value) for event in events.Scalars(f"{split}/{kind}")]
            assert found == [(e["step"], pytest.approx(e[split][kind], rel=1e-6)) for e in metrics["epochs"]]


def test_tensorboard_has_the_hyper_parameters(events, metrics):
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    information = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    values = {name: value.number_value or value.string_value for name, value in information.hparams.items()}
    assert values["lr"] == 1e-2 and str(values["lora_r"]) in ("16", "16.0") and "flan-t5-small" in values["model"]
    best = metrics["epochs"][metrics["results"]["best_epoch"]]
    (event,) = events.Scalars("test/best_rouge1")
    assert event.value == pytest.approx(best["test"]["rouge1"])


def test_tensorboard_has_dialogues_with_reference_and_prediction(events, trained):
    (tag,) = [tag for tag in events.Tags()["tensors"] if "examples" in tag]
    pages = events.Tensors(tag)
    assert [page.step for page in pages] == [0, 6, 12, 18]
    for epoch, page in enumerate(pages):
        text = page.tensor_proto.string_val[0].decode()
        for row in predictions(trained.folder, "validation", epoch)[:3]:
            assert row["reference"] in text and row["prediction"] in text
            assert all(line in text for line in row["dialogue"].splitlines())


def test_mfu_is_the_work_of_the_weights_over_the_data_sheet(
    flan, command, data, model_folder, tmp_path, monkeypatch
):
    """On a CPU that has bf16 and a data sheet. The work is counted from the geometry of the model, by hand."""
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    sources = ["summarize: " + row["dialogue"].replace("\r\n", "\n") for row in rows]
    source, target = (np.mean([len(ids) for ids in tokenizer(texts).input_ids])
                      for texts in (sources, [row["summary"] for row in rows]))  # fmt: skip
    square = 64 * 64  # every matrix of the two encoder and two decoder layers, but for the head of 64 x 512
    weights = 2 * (4 + 3 + 2) * source + (2 * (4 + 2 + 3) + 8) * target  # keys and values of the source are its own
    work = 4 * square * weights
    monkeypatch.setattr(flan, "get_device", lambda: (flan.torch.device("cpu"), flan.torch.bfloat16))
    monkeypatch.setitem(flan.DATA_SHEET, "CPU", 0.5)
    run = tmp_path / "run"
    for words, more in (((), 1), (("--full",), 1.5)):
        done = command("--model", model_folder, "--dataset", data, "--max-steps", "2", "--max-new-tokens", "2", *words,
                       "--output-dir", run, cwd=tmp_path)  # fmt: skip
        assert done.code == 0, done
        found = json.loads((run / "metrics.json").read_text())
        rate = found["results"]["samples_per_second"]
        assert found["results"]["mfu"] == pytest.approx(more * work * rate / 0.5e12, rel=1e-3)
        scalars = {tag: [event.value for event in read_events(run).Scalars(tag)]
                   for tag in ("train/mfu", "train/samples_per_second")}  # fmt: skip
        assert scalars["train/mfu"] == pytest.approx(
            [more * work * rate / 0.5e12 for rate in scalars["train/samples_per_second"]])
        shutil.rmtree(run)


@pytest.fixture
def drawn(flan, monkeypatch):
    """The axes of the last figure that was drawn."""
    figures, figure = [], flan.Figure

    def new(*args, **options):
        figures.append(figure(*args, **options))
        return figures[-1]

    monkeypatch.setattr(flan, "Figure", new)
    return lambda: figures[-1].axes[0]


@pytest.mark.plots
def test_the_loss_plot_marks_the_smallest_loss(flan, drawn, tmp_path):
    losses = [5.0, 4.0, 1.25, 4.5, 3.0, 2.0]
    curve = [{"step": 10 * i, "loss": loss, "learning_rate": i * 1e-3} for i, loss in enumerate(losses, 1)]
    flan.plot_loss(curve, tmp_path / "loss.png", "title")
    raw, mark = (list(zip(*line.get_data(), strict=True)) for line in drawn().get_lines())
    assert raw == [(10 * i, loss) for i, loss in enumerate(losses, 1)] and mark == [(30, 1.25)]
    assert re.search(r"(?s)1\.25.*step 30.*3\.00e-03", drawn().get_lines()[1].get_label())
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    losses = list(np.random.default_rng(0).uniform(1, 2, 80))
    flan.plot_loss([{"step": i, "loss": loss, "learning_rate": 1e-3} for i, loss in enumerate(losses)],
                   tmp_path / "long.png", "title")  # fmt: skip
    means = [np.mean(losses[max(0, i - 2) : i + 3]) for i in range(80)]  # of up to five neighbours
    assert list(drawn().get_lines()[1].get_ydata()) == pytest.approx(means)


def test_smoothing_a_constant_gives_the_constant(flan):
    assert flan.smoothed([2.5] * 40) == pytest.approx([2.5] * 40)


def test_the_rouge_plot_has_both_splits_and_the_best_epoch(flan, drawn, metrics, tmp_path):
    flan.plot_rouge(metrics["epochs"], tmp_path / "rouge.png", "title")
    curves = {line.get_label(): list(line.get_ydata()) for line in drawn().get_lines()}
    for split in SPLITS:
        for kind, name in zip(KINDS, ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"), strict=True):
            assert curves[f"{name}, {split}"] == [entry[split][kind] for entry in metrics["epochs"]]
    (label,) = [label for label in curves if "best" in label]
    assert label.endswith(f"epoch {metrics['results']['best_epoch']}")


# ----------------------------------------------------------------------------------------------------------------------
# The output
# ----------------------------------------------------------------------------------------------------------------------


def test_the_table_is_markdown_with_every_score(trained, metrics):
    lines = trained.done.out.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("| epoch"))
    header, ruler, *rows = lines[last : last + 10]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "epoch", "loss", "split", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"]  # fmt: skip
    assert re.fullmatch(r"\|(:?-+:?\|){7}", ruler)
    for row, (entry, split) in zip(rows, [(e, s) for e in metrics["epochs"] for s in SPLITS], strict=True):
        epoch, loss, name, *scores = (cell.strip() for cell in row.strip("|").split("|"))
        assert epoch == f"{entry['epoch']:g}" + (" (best)" if entry["best"] else "")
        assert (loss, name) == ("" if entry["train_loss"] is None else f"{entry['train_loss']:.4f}", split)
        for cell, kind in zip(scores, KINDS, strict=True):
            score, low, high = map(float, re.findall(r"[\d.]+", cell))
            assert score == pytest.approx(entry[split][kind], abs=0.005)
            assert [low, high] == pytest.approx(entry[split][f"{kind}_interval"], abs=0.05)


def test_the_table_grows_while_the_run_goes(trained):
    """Each epoch's rows come once during training, and once more in the table at the end."""
    for epoch in range(4):
        found = re.findall(rf"(?m)^\| +{epoch}(?: \(best\))? +\| .* \| test ", trained.done.out)
        assert len(found) == 2, epoch


def test_how_the_scores_were_taken_is_one_paragraph(trained):
    line = " ".join(trained.done.out[trained.done.out.index("Scores:") :].split("\n\n")[0].splitlines())
    words = ("greedy", "at most 24 new tokens", "stemmer", "sentences", "7 validation", "5 test", "95%", "bootstrap")
    assert [word for word in words if word not in line] == []
    assert "truncated" not in line


def test_the_truncated_share_is_printed(command, data, model_folder, tmp_path, flan):
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    lengths = {}
    for split in ROWS:
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text("utf-8").splitlines()]
        texts = ["summarize: " + row["dialogue"].replace("\r\n", "\n") for row in rows]
        lengths[split] = [len(ids) for ids in tokenizer(texts).input_ids]
    limit = int(np.median(lengths["train"]))
    done = command("--model", model_folder, "--dataset", data, "--max-steps", "1", "--max-source-length", limit,
                   "--max-new-tokens", "2", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    shares = {split: np.mean([length > limit for length in lengths[split]]) for split in ROWS}
    assert 0 < shares["train"] < 1
    for split, share in shares.items():
        cut = f" ({share:.1%} truncated to {limit} tokens)" if share else ""
        assert re.search(re.escape(f"{ROWS[split]} {split}{cut}") + r"[,;.\n]", done.out.replace("\n  ", " "))
    assert "references are cut" not in done.out


def test_the_share_of_cut_references_is_printed(command, data, model_folder, tmp_path, flan):
    """Of the training rows, for only there are they labels; a reference of just as many tokens is not cut."""
    tokenizer = flan.load_tokenizer_and_config(model_folder)[0]
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").splitlines()]
    lengths = [len(tokenizer(row["summary"]).input_ids) for row in rows]
    limit = sorted(lengths)[len(lengths) // 2]
    share = np.mean([length > limit for length in lengths])
    assert 0 < share < 1 and limit in lengths
    done = command("--model", model_folder, "--dataset", data, "--max-steps", "1", "--max-target-length", limit,
                   "--max-new-tokens", "2", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done
    assert f"{share:.1%} of the training references are cut to {limit} tokens" in done.out


def test_the_last_lines_name_the_files_and_a_command_that_works(trained, command, tmp_path):
    tail = trained.done.out.splitlines()[-9:]
    folder = str(trained.folder.relative_to(trained.home))
    for name in ("adapter/", "predictions/", "metrics.json", "training_loss.png", "rouge.png", folder):
        assert any(name in line for line in tail), name
    (line,) = [line for line in tail if "--summarize" in line]
    words = line.split("flan-t5_samsum.py ")[1].split()
    chat = tmp_path / "chat.txt"
    chat.write_text("Ada: Hi Femi!\nFemi: I lost the tent :(")
    used = command(words[0], chat, *words[1:], cwd=trained.home)
    assert used.code == 0 and len(used.out.splitlines()) == 1 and used.out.strip(), used


def test_max_steps_ends_in_mid_epoch_with_everything(command, data, model_folder, tmp_path):
    done = command("--model", model_folder, "--dataset", data, "--max-steps", "8", *RECIPE, cwd=tmp_path)
    assert done.code == 0, done
    (run,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["status"] == "finished" and metrics["results"]["steps"] == 8
    assert [entry["step"] for entry in metrics["epochs"]] == [0, 6, 8]
    # The rate falls to 0 over the eight steps, not over the epochs.
    assert metrics["curve"][-1]["learning_rate"] == pytest.approx(1e-2 / 7)
    assert (run / "checkpoints/step-00000008").is_dir() and (run / "adapter").is_dir()


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(command, data, model_folder, tmp_path):
    def losses(*flags):
        flags = ("--model", model_folder, "--dataset", data, "--max-steps", "3", *RECIPE, *flags)
        done = command(*flags, cwd=tmp_path)
        assert done.code == 0, done
        run = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [entry["loss"] for entry in json.loads((run / "metrics.json").read_text())["curve"]]

    first = losses()
    assert losses() == first and losses("--seed", "7") != first


# ----------------------------------------------------------------------------------------------------------------------
# The name of a run
# ----------------------------------------------------------------------------------------------------------------------


def new_run_folder(flan, args):
    return flan.new_run_folder(args, flan.run_name(args))


@pytest.mark.parametrize("flags, name", [
    ([], "flan-t5-tiny-sample-lr=1e-3"),
    (["--model", "xl", "--lr", "1e-4"], "flan-t5-xl-samsum-lr=1e-4"),
    (["--model", "small", "--lr", "0.001"], "flan-t5-small-samsum-lr=1e-3"),
    (["--model", "base", "--lr", "2.5e-5", "--dataset", "me/my-chats"], "flan-t5-base-my-chats-lr=2.5e-5"),
    (["--model", "xxl", "--int8"], "flan-t5-xxl-sharded-fp16-samsum-lr=1e-4"),
    (["--model", "some/t5", "--dataset", "../chats.v2.jsonl"], "t5-chats.v2-lr=1e-4"),
])  # fmt: skip
def test_default_names(flan, tmp_path, monkeypatch, flags, name):
    monkeypatch.chdir(tmp_path)
    for expected in (name, f"{name}-2", f"{name}-3"):
        assert new_run_folder(flan, flan.parse_settings(flags)) == flan.Path("runs") / expected
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [name, f"{name}-2", f"{name}-3"]


def test_a_second_run_gets_a_suffix_and_leaves_the_first_alone(command, data, model_folder, tmp_path):
    flags = ("--model", model_folder, "--dataset", data, "--max-steps", "1", "--max-new-tokens", "2", "--lr", "1e-3")
    assert command(*flags, cwd=tmp_path).code == 0
    first = tmp_path / "runs" / "flan-t5-small-chats-lr=1e-3"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    done = command(*flags, "--seed", "1", cwd=tmp_path)
    assert done.code == 0 and "flan-t5-small-chats-lr=1e-3-2" in done.out, done
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert (tmp_path / "runs" / "flan-t5-small-chats-lr=1e-3-2" / "metrics.json").exists()


def test_an_explicit_folder_that_holds_a_run_is_refused(command, trained, data, model_folder):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    done = command("--model", model_folder, "--dataset", data, "--output-dir", trained.folder, cwd=trained.home)
    assert done.code == 2 and len(done.err.splitlines()) == 1, done
    assert str(trained.folder) in done.err and "--resume" in done.err and "--output-dir" in done.err
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == before


def test_an_explicit_folder_may_be_new_or_empty(flan, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/and/deep"):
        args = flan.parse_settings(["--output-dir", str(tmp_path / name)])
        assert new_run_folder(flan, args) == tmp_path / name and (tmp_path / name).is_dir()


def test_out_of_gpu_memory_names_the_flags_that_help(flan, command, data, model_folder, tmp_path, monkeypatch):
    def training_step(self, *args, **kwargs):
        raise flan.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(flan.Seq2SeqTrainer, "training_step", training_step)
    flags = ("--model", model_folder, "--dataset", data, "--limit", "4", *RECIPE)
    for more, expected, useless in (
        ((), ["--micro-batch-size 1", "--gradient-checkpointing", "--int8", "--int4", "--max-source-length"], "--full"),
        (("--int4", "--gradient-checkpointing"), ["--micro-batch-size 1", "--max-source-length"], "--int"),
        (("--lr-find",), ["--micro-batch-size 1", "--int8"], "--full"),
    ):
        done = command(*flags, *more, cwd=tmp_path)
        assert done.code == 2 and len(done.err.splitlines()) == 1, done
        assert done.err.startswith("error: out of memory")
        assert all(flag in done.err for flag in expected) and useless not in done.err
