"""Shared fixtures: flan-t5_samsum.py as a module, a tiny random Flan-T5, a few dialogues, and one finished run.

Nothing here touches the network, a GPU or the user's own cache.
"""

import atexit
import contextlib
import functools
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

# Before any Hugging Face library is imported, as they read these once. With one thread all sums have one order.
CACHE = tempfile.TemporaryDirectory(prefix="test-cache-")
os.environ.update(HF_HOME=CACHE.name, HF_HUB_OFFLINE="1", HF_UPDATE_DOWNLOAD_COUNTS="0", OMP_NUM_THREADS="1",
                  COLUMNS="160")  # wide tables

import fake_hub  # noqa: E402
import forked  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[1] / "flan-t5_samsum.py"
FORKED = str(Path(__file__).with_name("forked.py"))


class Done(NamedTuple):
    """What a command left: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def load_script(path: Path):
    """A script as a module; its name may hold a dash."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path.stem), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quick_plots(request, monkeypatch):
    """Drawing is a third of a small training. Only tests of plots (by module, or marked) and fixtures of more than one
    test wait for it; elsewhere the file says that it was not drawn."""
    of_plots = request.module.__name__.endswith(("_screen", "_experiments"))
    if not of_plots and not request.node.get_closest_marker("plots"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", forked.not_drawn)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """What earlier modules left, results and fixtures, no collection needs to look at: trainings collect often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def rate_measured_once():
    """A third of a second, for each training of GPT-2."""
    gpt2 = sys.modules.get("gpt2_from_scratch")
    if gpt2 and not hasattr(gpt2.measure_matmul_rate, "cache_info"):
        gpt2.measure_matmul_rate = functools.cache(gpt2.measure_matmul_rate)


@pytest.fixture(scope="session")
def make_tiny():
    return load_script(SCRIPT.parent / "resource/make_flan-t5-tiny.py")


@pytest.fixture(scope="session")
def flan():
    """The script as a module, on one CPU thread whatever the machine has."""
    module = load_script(SCRIPT)
    gc.collect()
    gc.freeze()  # as the script does: collections need not look at what the imports have made
    module.torch.set_num_threads(1)
    module.get_device_of_this_machine = module.get_device
    module.get_device = lambda: (module.torch.device("cpu"), module.torch.float32)
    return module


@pytest.fixture(scope="session")
def command(flan):
    """command(*words, cwd=folder): the script in this process, as its last line runs it (imports take seconds)."""

    def run(*words, cwd):
        words = [str(word) for word in words]
        out, err = io.StringIO(), io.StringIO()
        before = os.getcwd(), sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        os.chdir(cwd)
        sys.argv = [str(SCRIPT), *words]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = flan.exit_on_user_error(flan.main, flan.exit_on_user_error(flan.parse_settings, words))
        except SystemExit as exit:
            code = exit.code
        finally:
            os.chdir(before[0])
            sys.argv = before[1]
            for number, handler in before[2].items():
                signal.signal(number, handler)
        return Done(code, out.getvalue(), err.getvalue())

    return run


@functools.cache
def python() -> list[str]:
    """The words that run Python: `[*python(), script, ...]` for a process that has its imports from forked.py."""
    if not hasattr(os, "fork"):
        return [sys.executable]
    address = os.path.join(CACHE.name, "forked")
    server = subprocess.Popen([sys.executable, FORKED, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert server.stdout.readline() == b"ready\n"
    atexit.register(server.wait, 60)
    atexit.register(server.stdin.close)  # called first: with its input the server ends
    return [sys.executable, "-S", FORKED, address]


def torchrun(*options) -> list[str]:
    """The words of torchrun with these options, for `[*torchrun(), script, ...]`: it and its processes are forked."""
    options = options or ("--standalone", "--nproc_per_node=2")
    return [*python(), importlib.util.find_spec("torch.distributed.run").origin, *options, "--no-python", *python()]


def start(*words, cwd, env=None, launcher=()):
    """The script as a process of its own, without a GPU; `env` adds to (or, as None, takes from) the environment."""
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "NO_PLOTS": "1"} | (env or {})
    return subprocess.Popen(
        [*(launcher or python()), str(SCRIPT), *map(str, words)], cwd=cwd,
        env={key: value for key, value in environment.items() if value is not None},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait(process, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return Done(process.returncode, out, err)


@pytest.fixture(scope="session")
def process():
    """process(*words, cwd=folder, env={...}): the script in a process of its own."""
    return lambda *words, timeout=120, **options: wait(start(*words, **options), timeout)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = {"train": 24, "validation": 7, "test": 5}  # odd numbers, so that no batch size divides them


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of dialogues, three JSONL files. Most line breaks are \\r\\n, as in SAMSum."""
    folder = tmp_path_factory.mktemp("data") / "chats"
    for split, count in ROWS.items():
        write_jsonl(folder / f"{split}.jsonl", fake_hub.samsum_rows(split, count))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE with Flan-T5's special tokens, trained on more such dialogues: no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    rows = fake_hub.samsum_rows("tokenizer", 60)
    tokenizer.train_from_iterator((row[column] for row in rows for column in ("dialogue", "summary")), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_folder):
    """A Flan-T5 of two layers that knows the dialogues, but not the task: after "summarize: " it says only "!".

    So the ROUGE of the bare model is exactly 0, an adapter soon brings real and different summaries, and nothing
    depends on luck with random weights. The generation settings of the folder would spoil every summary.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "flan-t5-small"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # 4-bit weights come in blocks of 64, and bitsandbytes wants a width to be a multiple of that on a CPU.
    config = fake_hub.FLAN_T5_CONFIG | {"d_model": 64, "d_kv": 16, "vocab_size": 512}
    assert len(tokenizer) < config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = fake_hub._random_flan_t5(config, seed=0)
    stored = [name for name in weights if "embed_tokens" not in name]  # which are shared.weight once more
    save_file({name: weights[name] for name in stored}, folder / "model.safetensors", fake_hub.SAFETENSORS_METADATA)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    rows = fake_hub.samsum_rows("pretraining", 120)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        steps = 140
        for step in range(steps):
            # Down to 0, so that it ends in a calm place, whatever the rounding of this machine's kernels.
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
            chosen = [rows[(step * 16 + i) % len(rows)] for i in range(16)]
            dialogues = [row["dialogue"].replace("\r\n", "\n") for row in chosen]
            sources = [*("summarize: " + text for text in dialogues[:4]), *dialogues[4:]]
            targets = ["!"] * 4 + [row["summary"] for row in chosen[4:]]
            batch = tokenizer(sources, padding=True, return_tensors="pt")
            labels = tokenizer(targets, padding=True, return_tensors="pt").input_ids
            model(**batch, labels=labels.masked_fill(labels == 0, -100)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = model.state_dict()
    save_file({name: weights[name] for name in stored}, folder / "model.safetensors", fake_hub.SAFETENSORS_METADATA)
    settings = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
                "max_length": 20, "num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


# Enough training to change every summary. Dropout is on, and a batch of 4 is accumulated from 2 x 2.
RECIPE = ("--lr", "1e-2", "--batch-size", "4", "--micro-batch-size", "2", "--max-new-tokens", "24")


class Run(NamedTuple):
    """A finished training: the folder it was started in, its run folder, and what it printed."""

    home: Path
    folder: Path
    done: Done


@pytest.fixture(scope="session")
def trained(command, data, model_folder, tmp_path_factory):
    """Three epochs of six steps, with the default names; several tests look at what is left. Do not write into it."""
    home = tmp_path_factory.mktemp("home")
    done = command("--model", model_folder, "--dataset", data, "--epochs", "3", *RECIPE, cwd=home)
    assert done.code == 0, done
    return Run(home, home / "runs" / "flan-t5-small-chats-lr=1e-2", done)
