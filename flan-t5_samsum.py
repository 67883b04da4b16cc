"""Fine-tune Flan-T5 with LoRA to summarise dialogues (SAMSum), in one file.

    python flan-t5_samsum.py                              # tiny model, sample data: minutes on a CPU, no network
    python flan-t5_samsum.py --lr 1e-4 --model xl         # Flan-T5-XL on SAMSum, on a GPU
    python flan-t5_samsum.py --model xxl --int8           # the largest one with INT8 weights
    torchrun --nproc-per-node=4 flan-t5_samsum.py --model xl                # the same run on four GPUs
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 flan-t5_samsum.py --model xl --full   # sharded
    tensorboard --logdir runs                             # watch it
    python flan-t5_samsum.py --resume                     # go on after an interruption
    python flan-t5_samsum.py --summarize chat.txt         # use what came out
    python flan-t5_samsum.py --evaluate                   # score it again
    python flan-t5_samsum.py --export DIR                 # write a plain model without an adapter
    python flan-t5_samsum.py --model xl --plan            # before paying: memory, steps, what fits
    python flan-t5_samsum.py --model xl --lr-find         # before guessing: a learning-rate range test
    python flan-t5_samsum.py --compare runs/A runs/B      # afterwards: which run is better, and by how much?

How to read it: sections 2 to 6 (data; model; loss, order of the rows, learning rate; training; scores) are the method,
in the order in which a row goes from a file to a score, and all that one needs to know how Flan-T5 is fine-tuned here.
Section 1 is the command line. Sections 7 to 15 make it safe and comfortable (checkpoints, reports, errors, plans,
comparisons) and can be skipped, as can section 14, which takes the same step and generates the same way on a GPU many
times faster, but for rounding and for the masks of dropout.

Where to look: a long dialogue is cut in `encode`; `load_base` (section 3) loads INT8 and NF4, `merged_adapter` says how
they are scored; section 4 begins with the optimiser's settings, has the normalisation of the loss in `token_mean_loss`
and the order of rows in `LengthGroupedSampler.order`; dropout is seeded in `SummarizationTrainer.training_step`; a step
that is not finite is skipped in `_clip_grad_norm`; `evaluate` saves a checkpoint and the adapter, if it is the best
(`Run.epochs`, section 10); ROUGE's interval is `bootstrap_interval`; `train` (10) puts all together; `Run.on_step_end`
(10) decides when else a checkpoint is due, `save_checkpoint` (7) what is in it; `StopSignal` (9) is what a signal does;
`begin_fast` (14) compares the fast step with the usual one. Where memory does not suffice, `Summarizer` (6) halves its
batch; a training ends, in `main` (15), with `out_of_memory_advice` (10).
"""

import argparse
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

# ---------- 1. Settings: the command line, before torch is imported, so that --help answers at once -------------------

HERE = Path(__file__).resolve().parent
MODELS = {
    "tiny": str(HERE / "resource" / "flan-t5-tiny"),
    "small": "google/flan-t5-small",
    "base": "google/flan-t5-base",
    "large": "google/flan-t5-large",
    "xl": "google/flan-t5-xl",
    "xxl": "philschmid/flan-t5-xxl-sharded-fp16",
}
DATASETS = {"samsum": "knkarthick/samsum", "sample": str(HERE / "resource" / "sample")}  # Samsung/samsum is gone
# That of the original experiments, and what a model changes of it. In one epoch dropout has nothing to prevent: with
# 0.1 and 0.05 the tiny model learns less, and a CPU takes half as long again.
RECIPE = {"model": "tiny", "dataset": "samsum", "lr": 1e-4, "epochs": 10, "lora_dropout": 0.05}
PRESETS = {"tiny": {"dataset": "sample", "lr": 1e-3, "epochs": 1, "lora_dropout": 0.0}}
PREFIX = "summarize: "  # the same in training and in every kind of inference: Flan-T5 reads its task from it


class UserError(Exception):
    """Something the user can mend. It is printed as one line, and the script ends with exit code 2."""


def number(kind: type, low: float, high: float = float("inf"), low_included: bool = True) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` between `low` and `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high) or value == float("inf") or (value == low and not low_included):
            limits = f"{'at least' if low_included else 'above'} {low}" + (f", at most {high}" if high < 2**64 else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range ({limits})")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def flag(default: Any, help: str, metavar: str | None = None, **options: Any) -> Any:
    """A field of Settings, with what argparse needs to know of it. `options` may hold `group`, which begins a group of
    --help, and `excludes`, the name of a set of flags of which only one may be given."""
    return field(metadata={"default": default, "help": help, "metavar": metavar, **options})


COUNT = number(int, 1)


@dataclass(frozen=True)
class Settings:
    """The command line. Each field is the flag of its name: `lora_r` is --lora-r. Made by `parse_settings` only."""

    model: str = flag(None, f"{', '.join(MODELS)}, a Hub id or a folder (default: tiny)", "NAME",
                      group="model and data")
    dataset: str = flag(None, "samsum, sample, a Hub id, or a file or folder of .jsonl, .json, .csv or .parquet "
                              "(default: sample with --model tiny, else samsum)", "NAME")
    source_column: str | None = flag(None, "column of the dialogues (default: known by its name)", "NAME")
    target_column: str | None = flag(None, "column of the summaries (default: known by its name)", "NAME")
    limit: int | None = flag(None, "use only the first N rows of each split", "N", type=COUNT)
    max_source_length: int = flag(512, "tokens of a dialogue and its prefix; more are cut", "N", type=number(int, 8))
    max_target_length: int = flag(128, "tokens of a reference summary in training", "N", type=number(int, 2))

    lr: float = flag(None, "peak learning rate: 5%% warm-up, then linear decay (default: 1e-4; tiny: 1e-3)", "X",
                     type=number(float, 0, 1, low_included=False), group="training")
    epochs: int = flag(None, "passes over the data (default: 10; tiny: 1)", "N", type=COUNT)
    max_steps: int | None = flag(None, "stop after N optimiser steps, if the epochs have more", "N", type=COUNT)
    batch_size: int = flag(8, "examples per optimiser step, over all GPUs", "N", type=COUNT)
    micro_batch_size: int = flag(None, "examples per GPU at a time; the rest is accumulated (default: the whole batch)",
                                 "N", type=COUNT)
    gradient_checkpointing: bool = flag(False, "compute activations twice instead of keeping them: less memory, a "
                                               "third slower")
    fast: bool | None = flag(None, "the fast step, compiled for a CUDA GPU, or the usual one of sections 2 to 6 "
                                   "(default: fast, where a run is long enough to gain by it)",
                             action=argparse.BooleanOptionalAction)
    seed: int = flag(42, "of everything random", "N", type=number(int, 0, 2**32 - 1))
    lora_r: int = flag(16, "LoRA rank", "N", type=number(int, 1, 2**16))
    lora_alpha: float = flag(32, "LoRA's update is scaled by alpha / rank", "X",
                             type=number(float, 0, low_included=False))
    lora_dropout: float = flag(None, "dropout in front of LoRA's matrices (default: 0.05; tiny: 0)", "X",
                               type=number(float, 0, 0.99))
    lora_targets: list[str] = flag(["q", "k", "v", "o"], "layers that get an adapter (default: q k v o, all attention "
                                                         "projections)", "NAME", nargs="+")
    int8: bool = flag(False, "frozen weights in INT8 (bitsandbytes LLM.int8())", excludes="precision")
    int4: bool = flag(False, "frozen weights in 4-bit NormalFloat (QLoRA)", excludes="precision")
    full: bool = flag(False, "train all weights, without LoRA", excludes="precision")

    max_new_tokens: int = flag(128, "most tokens of a summary", "N", type=COUNT,
                               group="summaries (in the evaluation after each epoch, and in use)")
    num_beams: int = flag(1, "1 is greedy (default: 1; 8 where the tiny model summarises your text)", "N", type=COUNT)

    output_dir: Path | None = flag(None, "folder of this run (default: runs/<model>-<dataset>-lr=<lr>, never an "
                                         "existing one)", "DIR", type=Path, group="files")
    cache_dir: Path | None = flag(None, "downloads and tokenised data (default: Hugging Face's own cache)", "DIR",
                                  type=Path)
    resume: bool = flag(False, "go on from the last checkpoint of --output-dir (default: of the newest run)")

    summarize: str | None = flag(None, "summarise dialogues: text separated by blank lines, or JSONL; without FILE "
                                       "standard input", "FILE", nargs="?", const="-", excludes="mode",
                                 group="instead of training")
    evaluate: bool = flag(False, "score an adapter, or a bare model, on --split", excludes="mode")
    export: Path | None = flag(None, "write base + adapter as one plain bf16 model to DIR", "DIR", type=Path,
                               excludes="mode")
    plan: bool = flag(False, "print memory, steps and what fits; downloads no weights", excludes="mode")
    lr_find: bool = flag(False, "learning-rate range test: try rates from 1e-6 to 1 on this model and data",
                         excludes="mode")
    plot: list[Path] | None = flag(None, "draw the training loss of any Trainer's TensorBoard logs (into LOGDIR, or "
                                         "--output-dir)", "LOGDIR", type=Path, nargs="+", excludes="mode")
    compare: list[Path] | None = flag(None, "table and plot of runs, with a paired bootstrap test for every two of "
                                            "them", "RUN", type=Path, nargs="+", excludes="mode")
    adapter: str | None = flag(None, "run or adapter to use (default: the newest run; 'none': the bare --model)", "DIR")
    split: str = flag("test", "for --evaluate", choices=["train", "validation", "test"])

    @property
    def quantization(self) -> str | None:
        return "int8" if self.int8 else "int4" if self.int4 else None

    @property
    def mode(self) -> str:
        """What is to be done: "train", or the name of the flag that says something else."""
        return next((name for name in MODES if getattr(self, name) not in (None, False)), "train")

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings that decide about a result, for metrics.json: not what is to be done, and where."""
        names = [item.name for item in fields(self)]
        return {name: getattr(self, name) for name in names[: names.index("output_dir")]}


DEFAULTS = {item.name: item.metadata["default"] for item in fields(Settings)}
WEIGHT_FLAGS, MODES = ([item.name for item in fields(Settings) if item.metadata.get("excludes") == kind]
                       for kind in ("precision", "mode"))
USES = ("summarize", "evaluate", "export")  # the modes that use a result
# They change memory and speed, and by rounding and other masks of dropout the result; max_steps the rate as well.
FREE_ON_RESUME = ("micro_batch_size", "gradient_checkpointing", "max_steps", "fast")


def recipe_of(model: str) -> dict[str, Any]:
    """The defaults that depend on --model."""
    return RECIPE | PRESETS.get(model, {})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        words = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        meant = [flag for word in words for flag in difflib.get_close_matches(word, self._option_string_actions, 1)]
        hint = f"did you mean {' '.join(meant)}?" if meant else "--help lists all flags"
        self.exit(2, f"error: {message} ({hint})\n" if is_first_to_say(message) else None)


def build_parser() -> Parser:
    parser = Parser(prog="flan-t5_samsum.py", description=__doc__.split("\nHow to read")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    exclusive = {}
    for item in fields(Settings):
        options = {key: value for key, value in item.metadata.items() if value is not None}
        if "group" in options:
            group = parser.add_argument_group(options.pop("group"))
        default, excludes = options.pop("default", None), options.pop("excludes", None)
        if default is False:
            options["action"] = "store_true"
        elif default is not None and "default:" not in options["help"]:
            options["help"] += f" (default: {default})"
        if excludes and excludes not in exclusive:
            exclusive[excludes] = group.add_mutually_exclusive_group()
        place = exclusive[excludes] if excludes else group
        place.add_argument("--" + item.name.replace("_", "-"), **options)
    return parser


def parse_settings(argv: list[str] | None = None) -> Settings:
    """The command line with all defaults filled in; UserError or exit code 2 where it makes no sense.

    --resume, --summarize, --evaluate and --export take their defaults from the configuration of the run that they
    continue or use (its metrics.json), so that nothing has to be typed twice and no score is taken with other settings.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    for before, word in zip(["", *words], words, strict=False):
        if not word or re.fullmatch("--[a-z-]+=", word):  # as a shell passes on a variable that is not set
            parser.error(f"argument {word.rstrip('=') or before}: it is empty")
    given = vars(parser.parse_args(argv))
    is_use = any(name in given for name in USES)
    if "resume" in given and any(name in given for name in MODES):
        parser.error("argument --resume: it goes on with a training, and nothing else can be done with it")
    if "adapter" in given and not is_use:
        parser.error("argument --adapter: only with --summarize, --evaluate or --export; to train on, "
                     "--resume --output-dir RUN")
    if "output_dir" in given and is_use:
        parser.error("argument --output-dir: only for what is written; the run to use is --adapter RUN")
    for name, presets in (("dataset", DATASETS), ("model", MODELS)):  # a run can be continued from another folder
        if name in given and given[name] not in presets and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    folder = find_run(given, is_use)
    if folder and is_of_gpt2(folder):
        raise UserError(f"{folder} was made by gpt2_from_scratch.py")
    metrics = read_metrics(folder) if folder else {"configuration": {}}
    if "resume" in given and not {"processes", "optimizer", "data"} <= metrics.keys():
        raise UserError(f"{folder} was made by another version of this script: start a new run")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if "resume" in given and metrics["processes"] != processes:
        raise UserError(f"{folder} was trained by {metrics['processes']} process(es), now there are {processes}: "
                        "resume it with as many")
    saved = {name: value for name, value in metrics["configuration"].items() if name in DEFAULTS}
    if "evaluate" in given:  # on the path on which the run was scored
        best = next((epoch for epoch in metrics.get("epochs", ()) if epoch.get("best")), {})
        saved["fast"] = saved.get("fast") if best.get("fast") is None else best["fast"]
    changed = [name for name in given if name in saved and given[name] != saved[name] and name not in FREE_ON_RESUME]
    if "resume" in given and changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise UserError(f"--resume continues {folder} with its own settings, and {flags} differs from them: "
                        "leave it out, or start a new run")
    if any(name in given for name in WEIGHT_FLAGS):  # one that is given replaces that of the run
        saved |= dict.fromkeys(WEIGHT_FLAGS, False)
    if folder and metrics.get("cache_dir"):  # what the run has downloaded is there
        given.setdefault("cache_dir", Path(metrics["cache_dir"]))
    if folder and "resume" in given:
        given["output_dir"] = folder
    elif folder:
        given.setdefault("adapter", str(folder))
    elif given.get("adapter", "none") != "none" and "model" not in given:
        given["model"] = base_of_adapter(Path(given["adapter"]))
    values = DEFAULTS | recipe_of(given.get("model", saved.get("model", RECIPE["model"]))) | saved | given
    if "summarize" in given and "num_beams" not in given and (values["model"], values["num_beams"]) == ("tiny", 1):
        values["num_beams"] = 8  # half again as many main facts as greedily: EXPERIMENTS, "The tiny model"
    values["micro_batch_size"] = values["micro_batch_size"] or max(1, values["batch_size"] // processes)
    if values["batch_size"] % (values["micro_batch_size"] * processes) and not is_use:
        raise UserError(f"--batch-size {values['batch_size']} is not a multiple of --micro-batch-size "
                        f"{values['micro_batch_size']} x {processes} process(es)")
    return Settings(**values)


def base_of_adapter(folder: Path) -> str:
    """The --model that an adapter without a run around it was trained on, as PEFT noted it; "tiny" if it is none."""
    path = next((path / "adapter_config.json" for path in (folder / "adapter", folder)
                 if (path / "adapter_config.json").is_file()), None)
    if path is None:
        return "tiny"  # load_for_use says what is wrong, or loads a whole model
    try:
        name = os.fspath(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} names no base: give it, --model NAME") from None
    return next((preset for preset, value in MODELS.items() if value == name), name)


def find_run(given: dict[str, Any], is_use: bool) -> Path | None:
    """The folder of the run that --resume or a mode of use is about; None for a new run or a bare adapter."""
    if "resume" in given:
        return given.get("output_dir") or newest_run()
    if not is_use or given.get("adapter") == "none":
        return None
    if "adapter" not in given:
        folder = newest_run("adapter", "model")
        metrics = read_metrics(folder)
        status = metrics.get("status", "not finished").replace("running", "not finished")  # it may have been killed
        if status != "finished":
            epoch = metrics.get("results", {}).get("best_epoch")
            best = f"its best epoch so far is {epoch:g}" if epoch else "its model is as good as untrained so far"
            print(f"note: {folder} is {status}; {best}", file=sys.stderr)
        return folder
    adapter = Path(given["adapter"])
    return next((folder for folder in (adapter, adapter.parent) if (folder / "metrics.json").is_file()), None)


def newest_run(*contents: str) -> Path:
    found = [path.parent for depth in ("*", "*/*") for path in Path("runs").glob(f"{depth}/metrics.json")]
    runs = [folder for folder in found if not is_of_gpt2(folder)
            and (not contents or any((folder / name).is_dir() for name in contents))]
    if not runs:
        what = f"run with {' or '.join(contents)}" if contents else "run"
        raise UserError(f"no {what} in {Path('runs').resolve()}: train first, or name one "
                        f"({'--adapter' if contents else '--output-dir'} DIR)")
    return max(runs, key=lambda folder: (folder / "metrics.json").stat().st_mtime)


def is_of_gpt2(folder: Path) -> bool:
    """runs/ may hold those of the other script, too."""
    try:
        return "block_size" in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["configuration"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # damaged: read_metrics says so


def read_metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return metrics | {"configuration": dict(metrics["configuration"])}
    except OSError:
        raise UserError(f"{folder} holds no run (no metrics.json)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'metrics.json'} is damaged ({error!r})") from None


def exit_on_user_error(work: Callable, *arguments: Any) -> Any:
    """Calls `work`; a mistake of the user's becomes one line and exit code 2 instead of a traceback."""
    try:
        return work(*arguments)
    except BrokenPipeError:  # who read the output has gone (`| head`); nothing more may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as if ended by SIGPIPE
    except (UserError, OSError) as error:  # OSError: a full disk, a file without permission; it says which and why
        if is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def is_first_to_say(message: str) -> bool:
    """Of several processes that meet the same error, one prints it: the first that asks torchrun's store for it."""
    if "torch" not in globals():  # not imported yet: the command line is wrong, for all of a machine
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                           timeout=timedelta(seconds=5))
        return store.add(f"said: {message}", 1) == 1
    except Exception:  # a process alone, or whoever held the store has gone: better twice than not at all
        return True


if __name__ == "__main__":
    SETTINGS = exit_on_user_error(parse_settings)
    if sys.stderr.isatty():  # the first line takes its place
        print("loading PyTorch ...", end="\r", file=sys.stderr, flush=True)

# The slow imports, and what must be set before them. Threads that wait should sleep: where other programs share the
# cores, spinning makes a CPU many times slower. Without torchrun one GPU is used: the Trainer would take all, by the
# slow DataParallel.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "LOCAL_RANK" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import contextlib
import csv
import errno
import functools
import gc
import glob
import hashlib
import importlib.metadata
import io
import itertools
import logging
import math
import pickle
import platform
import shlex
import shutil
import socket
import textwrap
import threading
import time
import urllib.request
import warnings
from datetime import timedelta

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line when imported, and for each INT8 product

import bitsandbytes
import datasets
import evaluate
import huggingface_hub
import numpy as np
import pandas
import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rouge_score import rouge_scorer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with torch for CUDA; without it there is no fast path
    triton = tl = None
try:
    import fcntl
except ImportError:  # Windows: no lock on a run's folder
    fcntl = None

warnings.filterwarnings("ignore", category=FutureWarning)  # notes between the libraries, not for users
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it refuses is explained here, in one line
datasets.disable_progress_bars()

Row = dict[str, Any]  # of a data set, by the names of its columns
Tokens = list[int]  # the ids of one text, the end token last
Scores = dict[str, Any]  # {"rouge1": mean, "rouge1_interval": [low, high], ...} in percent

# ---------- 2. Data: from a file, a folder or the Hub to rows of id, dialogue and summary, to tokens ------------------

COLUMNS = {  # known names of the two columns, in lower case; anything else must be named by a flag
    "source": ("dialogue", "dialog", "conversation", "transcript", "document", "article"),
    "target": ("summary", "highlights", "abstract"),
}
SPLITS = ("train", "validation", "test")
# From below: `read_splits`, `explain`, `cache_folder` and `fingerprint` (section 8); `say`, which prints (9).


def load_data(settings: Settings) -> datasets.DatasetDict:
    """train, validation and test of --dataset, each with the text columns id, dialogue and summary.

    Line breaks become "\\n" (most of SAMSum's test rows have "\\r\\n", its train rows do not). Rows without a dialogue
    or a summary cannot be learnt from or scored: they are dropped, and the run says how many.
    """
    splits, files = read_splits(settings.dataset, settings.cache_dir)
    if not splits["train"]:
        raise UserError(f"the train split of {settings.dataset} is empty")
    source = find_column(list(splits["train"][0]), "source", settings.source_column)
    target = find_column(list(splits["train"][0]), "target", settings.target_column)
    result, before = {}, 0  # rows of the same file
    for split in SPLITS:
        rows, dropped = [], []
        for i, row in enumerate(splits[split], 1):
            dialogue, summary = (text_of(row, column, f"row {i} of {split}", files) for column in (source, target))
            if not dialogue or not summary:
                dropped.append(str(before + i))
                continue
            name = str(row["id"]) if row.get("id") is not None else f"{split}-{i}"
            rows.append({"id": name, "dialogue": dialogue, "summary": summary})
            if len(rows) == settings.limit:
                break
        if dropped:
            say(f"{split}: dropped {len(dropped)} row(s) without {source} or {target}: "
                + ", ".join(dropped[:5] + ["..."] * (len(dropped) > 5)))
        if not rows:
            raise UserError(f"the {split} split of {settings.dataset} is empty")
        result[split] = datasets.Dataset.from_list(rows)
        before += len(splits[split]) if len(files) == 1 else 0
    return datasets.DatasetDict(result)


def find_column(present: list[str], kind: str, chosen: str | None) -> str:
    """The column of dialogues (`kind` "source") or summaries ("target"): as chosen, else by its name, never guessed."""
    if chosen is not None:
        if chosen not in present:
            raise UserError(f"there is no column {chosen} (--{kind}-column); there are: {', '.join(map(str, present))}")
        return chosen
    known = [column for column in present if str(column).lower() in COLUMNS[kind]]
    if len(known) != 1:
        if len(present) == 1 and re.search("[;\t|]", str(present[0])):
            raise UserError(f"the columns {present[0]!r} are not separated by commas: save it with commas")
        raise UserError(f"cannot tell the {kind} among {', '.join(map(str, present))}: name the columns, "
                        "--source-column NAME --target-column NAME")
    return known[0]


def text_of(row: Row, column: str, place: str, files: list[Path]) -> str:
    if column not in row:
        raise UserError(f"{place} has no column {column}")
    if row[column] is not None and not isinstance(row[column], str):
        for path in files:
            explain(path, column)
        raise UserError(f"{place}: {column} is {type(row[column]).__name__}, not text")
    return normalize_newlines(row[column] or "")


def normalize_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def encode(tokenizer: Any, texts: list[str], limit: int) -> tuple[list[Tokens], list[bool]]:
    """Token ids of `texts`, each cut to `limit` tokens with the end token last, and for each whether it was cut."""
    rows = tokenizer(texts).input_ids
    cut = [row if len(row) <= limit else [*row[: limit - 1], tokenizer.eos_token_id] for row in rows]
    return cut, [len(row) > limit for row in rows]


def tokenize(data: datasets.DatasetDict, tokenizer: Any, settings: Settings) -> datasets.DatasetDict:
    """Adds input_ids and labels (Tokens) to each split, and whether they were cut: truncated, labels_truncated (bool).

    `Dataset.map` reuses an explicitly named cache file whatever is in it, so everything that the tokens depend on is in
    the name: the rows, the tokenizer, the prefix and both lengths. And the new columns.
    """
    columns = ("input_ids", "truncated", "labels", "labels_truncated")

    def add_tokens(batch: dict[str, list]) -> dict[str, list]:
        sources = encode(tokenizer, [PREFIX + text for text in batch["dialogue"]], settings.max_source_length)
        labels = encode(tokenizer, batch["summary"], settings.max_target_length)
        return dict(zip(columns, (*sources, *labels), strict=True))

    depends_on = [tokenizer.backend_tokenizer.to_str(), PREFIX, settings.max_source_length, settings.max_target_length,
                  columns]
    result = {}
    with cache_folder(settings.cache_dir, "tokenized") as folder:
        for split, rows in data.items():
            name = f"{split}-{fingerprint(rows.to_dict(), *depends_on)}.arrow"
            result[split] = rows.map(add_tokens, batched=True, cache_file_name=str(folder / name))
    return datasets.DatasetDict(result)


# ---------- 3. Model: a base in bf16, INT8 or NF4, and its LoRA adapter -----------------------------------------------
#
#            base weights  trained, in fp32  products in training (autocast)   products in scoring
# (default)  bf16          LoRA              bf16                              bf16, LoRA's fp32
# --int8     INT8          LoRA              INT8, outliers fp16; LoRA's bf16  INT8, outliers fp16; LoRA's fp32
# --int4     NF4           LoRA              NF4 to bf16, LoRA's bf16          NF4 to bf16, LoRA's fp32
# --full     fp32          all               bf16                              bf16
#
# On the fast path of section 14 quantised weights become bf16 for each product, and all products are in bf16. Where
# bf16 is missing (CPU, T4, V100) fp32 takes its place, and scoring merges the adapter into the base for a while.
# The large `wo` of the feed-forward layers, embeddings, norms and head are never quantised. --export writes bf16.
# T5's own dropout (0.1; of the tiny model 0) is on in training, as is LoRA's.
#
# From below: `find_on_disk`, `load_tokenizer_and_config`, `read_weights` and `forget_input` (section 8); `is_sharded`
# and `first_line` (9).


def get_device() -> tuple[torch.device, torch.dtype]:
    """The device of this process, and the precision of its matrix products: bf16 where the hardware has it, else fp32.

    Never fp16: activations of T5 overflow in it (only the inputs of INT8 layers, which follow a norm, pass through it
    inside bitsandbytes). A T4 or V100 only emulates bf16, hence the look at the capability.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # with T5's bias its backward is NaN (PyTorch 2.11 on an H100)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which cuBLAS is deterministic
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
        return device, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu"), torch.float32


def load_base(folder: Path, device: torch.device, dtype: torch.dtype, quantization: str | None = None
              ) -> transformers.PreTrainedModel:
    """The pretrained model on `device`, in `dtype`, its linear layers in "int8" or "int4" (NF4) if asked for.

    These are the first two of the three steps of bitsandbytes (configure, load, prepare). The third is left out:
    `prepare_model_for_kbit_training` would keep `wo` and the embeddings in fp32, which takes back much of the memory
    that INT8 saves, and all that training needs of it is frozen weights (LoRA freezes them) and, with gradient
    checkpointing, the non-re-entrant kind. So training and inference load alike.
    """
    options = {"int8": {"load_in_8bit": True},
               "int4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}}
    config = BitsAndBytesConfig(**options[quantization]) if quantization else None
    model = read_weights(folder, dtype=dtype, device_map={"": device}, quantization_config=config)
    # transformers calls every T5 tied, whatever its config says, and finds out only when it loads that Flan-T5's head
    # is a matrix of its own. Whoever ties again later (accelerate, for FSDP2) would put the embedding in its place.
    if model.lm_head.weight is not model.shared.weight:
        model._tied_weights_keys = {name: tied for name, tied in model._tied_weights_keys.items()
                                    if name != "lm_head.weight"}
    model.set_input_embeddings(model.shared)  # one module instead of three that share a weight: FSDP2 shards modules
    # `generate` would fill what its settings leave open from the checkpoint's own (no_repeat_ngram_size, max_length).
    tokens = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(model.config, name) for name in tokens})
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.register_forward_hook(forget_input)
        if isinstance(module, bitsandbytes.nn.Linear4bit) and device.type == "cpu":
            module.support_avx512bf16_for_cpu = False  # its packed inference kernel lets no gradient through afterwards
    return model.eval()


def add_lora(model: transformers.PreTrainedModel, settings: Settings) -> PeftModel:
    """Wraps `model` with a new adapter (Hu et al. 2021): W x + (alpha / r) B A x, with A random and B zero.

    The base is frozen. The adapter is kept in fp32 whatever the dtype of the base (PEFT's default).
    """
    if {"shared", "embed_tokens"} & set(settings.lora_targets):  # one module here, and PEFT would adapt a copy of it
        raise UserError("--lora-targets: the embedding cannot have an adapter")
    config = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
                        target_modules=settings.lora_targets, bias="none", task_type=TaskType.SEQ_2_SEQ_LM)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-targets {' '.join(settings.lora_targets)}: {first_line(error)}") from None


def load_for_training(settings: Settings, device: torch.device, precision: torch.dtype
                      ) -> tuple[torch.nn.Module, Any, datasets.DatasetDict]:
    """The model with everything that is to be trained in it, its tokenizer, and the tokenised data."""
    transformers.set_seed(settings.seed)
    folder = find_on_disk("model", settings.model, settings.cache_dir)
    tokenizer, _ = load_tokenizer_and_config(folder)
    data = tokenize(load_data(settings), tokenizer, settings)
    cut = np.mean(data["train"]["labels_truncated"])
    if cut:
        say(f"{cut:.1%} of the training references are cut to {settings.max_target_length} tokens "
            "(--max-target-length)")
    dtype = torch.float32 if settings.full else precision  # all weights trained: in fp32, autocast computes in bf16
    # Sharded, a model may be larger than one GPU: it is put together in main memory.
    model = load_base(folder, torch.device("cpu") if is_sharded() else device, dtype, settings.quantization)
    model = model.requires_grad_(True) if settings.full else add_lora(model, settings)
    if settings.gradient_checkpointing:  # the re-entrant kind would need gradients at the frozen embeddings' output
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer, data


@contextlib.contextmanager
def merged_adapter(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Merges the adapter into fp32 base weights for a while: the same function, and faster to generate with.

    Only fp32 ones: bf16 would round the update away in part, INT8 and NF4 even more, and their scores would be those of
    another model. There, and where the weights are sharded, the adapter stays beside the base. Subtracting it again
    would not give back the same bits, so the original matrices are kept and put back: a copy of them is the price.
    """
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    weights = [layer.get_base_layer().weight for layer in layers]
    is_exact = layers and all(weight.dtype == torch.float32 for weight in weights)
    if not is_exact or is_sharded() or getattr(model, "is_quantized", False):
        yield model
        return
    originals = [weight.detach().clone() for weight in weights]
    model.merge_adapter()
    try:
        yield model
    finally:
        model.unmerge_adapter()
        for weight, original in zip(weights, originals, strict=True):
            weight.data.copy_(original)


# ---------- 4. Loss, order of the rows, learning rate -----------------------------------------------------------------

ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
MAX_GRAD_NORM = 1.0  # the gradient of all trained weights together is clipped to it
WARMUP = 0.05  # share of the steps


def token_mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """Cross-entropy in nats per target token: `logits` [batch, target, vocabulary], `labels` [batch, target].

    Divided by the tokens of the whole optimiser step, not of this micro-batch: a mean of means would weigh the tokens
    of short micro-batches more. `num_items_in_batch` counts those of all processes, and the Trainer multiplies by their
    number, which DDP's mean over them takes back. (The Trainer leaves the division to T5, which ignores it:
    transformers issue 47688.)
    """
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(),
                                             ignore_index=-100, reduction="sum")
    return loss / num_items_in_batch


def learning_rate_factor(step: int, steps: int) -> float:
    """What the peak learning rate is multiplied with in `step` (from 0) of `steps`: up from 0, then linearly to 0.

    As in transformers, the first step has a rate of 0.
    """
    warmup = math.ceil(WARMUP * steps)
    return step / warmup if step < warmup else max(0, steps - step) / max(1, steps - warmup)


def number_of_steps(settings: Settings, rows: int) -> int:
    """Optimiser steps of a run with `rows` training rows: those of its epochs, or --max-steps if these are fewer."""
    steps = math.ceil(rows / settings.batch_size) * settings.epochs
    return min(steps, settings.max_steps or steps)


class LengthGroupedSampler(torch.utils.data.Sampler, TrainerCallback):
    """A new permutation of the rows for each epoch, in which the rows of one optimiser step have similar lengths.

    The rows are shuffled, cut into chunks of 50 batches (about four chunks if rows are few, so that others meet in each
    epoch), sorted by length within each chunk and shuffled again batch by batch: little padding, much randomness. The
    order is a function of the settings and the epoch (the Trainer's own sampler draws from the global generator), so a
    resumed run sees the same batches, of which the Trainer skips those that its step says were taken.

    Several processes take consecutive micro-batches at the same time and wait for the slowest: the rows of all batches
    but the last are dealt to them so that these have about the same length in all. An epoch is filled up with the index
    len(lengths), an empty row, where the last batch does not suffice for all: they would otherwise be given rows of the
    first batch once more.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, micro_batch_size: int = 1, processes: int = 1
                 ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.micro_batch_size, self.processes = micro_batch_size, processes

    def __len__(self) -> int:
        together = self.micro_batch_size * self.processes if self.processes > 1 else 1
        return len(self.lengths) + -len(self.lengths) % together

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.epoch = int(state.epoch or 0)  # the Trainer's own message is lost when several processes resume in one

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        chunk = max(1, min(50, len(order) // (4 * self.batch_size))) * self.batch_size
        batches = []
        for start in range(0, len(order), chunk):
            rows = sorted(order[start : start + chunk].tolist(), key=lambda i: -self.lengths[i])
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        last = batches.pop() if len(batches[-1]) < self.batch_size else []  # a smaller batch must come last
        batches = [batches[i] for i in rng.permutation(len(batches))]
        longest = max(range(len(batches)), key=lambda b: self.lengths[batches[b][0]], default=0)
        if epoch == 0 and batches:  # too little memory shows at once: most of it is for sources
            batches[0], batches[longest] = batches[longest], batches[0]
        empty = [len(self.lengths)] * (len(self) - len(self.lengths))
        return [i for batch in batches for i in self.deal(batch)] + last + empty

    def deal(self, rows: list[int]) -> list[int]:
        """A batch that is sorted by length, like cards: to two processes the rows 0, 2, 4 ... and 1, 3, 5 ..."""
        hands = np.reshape(rows, (-1, self.micro_batch_size, self.processes))  # [micro-steps, micro-batch, processes]
        return hands.swapaxes(1, 2).flatten().tolist()


class Collator(DataCollatorForSeq2Seq):
    """Pads a batch, labels with -100, and counts its real tokens (source and target) on the host."""

    # `pack` adds the same rows without padding, for the fast path; once that is proven, they alone are needed.
    pack, is_padding = None, True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
        packed = self.pack and self.pack(rows)
        batch = {"tokens": tokens, **(super().__call__(rows) if self.is_padding else {"labels": packed["labels"]})}
        # As a dict: a BatchEncoding brings only its own tensors to the GPU, not those inside of "packed".
        return {**batch, "packed": packed} if packed else batch


# ---------- 5. Training: Seq2SeqTrainer, with an exact loss, scores after each epoch and whole checkpoints ------------

# From below: `score` (section 6); what saves and loads (7); `agree` and `peak_memory_gib` (9); `Run` (10); the fast
# step and `FlatAdamW`, which is AdamW on one long vector (14).


def training_arguments(settings: Settings, folder: Path, steps: int, device: torch.device, precision: torch.dtype,
                       **changes: Any) -> Seq2SeqTrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    arguments = {
        "output_dir": str(folder),  # nothing is saved there by the Trainer: see `_save_checkpoint`
        "max_steps": steps, "seed": settings.seed, "learning_rate": settings.lr, "max_grad_norm": MAX_GRAD_NORM,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // (settings.micro_batch_size * processes),
        "bf16": precision == torch.bfloat16, "use_cpu": device.type == "cpu",
        "eval_strategy": "epoch", "eval_on_start": True, "save_strategy": "no",
        "logging_steps": max(1, min(10, steps // 20)),
        "logging_nan_inf_filter": False,  # the filter would wait for the GPU
        "report_to": [], "disable_tqdm": True, "ddp_find_unused_parameters": False, "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda", "accelerator_config": {"non_blocking": device.type == "cuda"},
    }
    return Seq2SeqTrainingArguments(**arguments | changes)


class NoStepLeft(Exception):
    """Raised in place of a step beyond the last one."""


@dataclass
class StepRecord:
    """What is kept of a step until it is logged, on the device, so that nothing waits for it before."""

    step: int
    loss: torch.Tensor  # this process's share, the sum over its micro-batches so far
    norm: torch.Tensor | None = None  # of the gradient, before it is clipped


class SummarizationTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer, which runs the loop: batches, accumulation, autocast, processes. Where it differs:

    - `training_step` is the one place where a (micro-)step is run, with dropout that depends on seed, step and rank;
    - a step whose loss or gradient is not finite changes nothing (`_clip_grad_norm`) and is counted (`log`);
    - the order of the rows comes from `LengthGroupedSampler`, the learning rate from `schedule`;
    - `evaluate` saves a checkpoint, scores validation and test by generation, and keeps the best epoch's adapter;
    - a checkpoint is whole or absent (section 7).
    """

    def __init__(self, run: "Run", model: torch.nn.Module, tokenizer: Any, data: datasets.DatasetDict, steps: int,
                 device: torch.device, precision: torch.dtype, schedule: Callable[[int], float] | None = None,
                 **changes: Any) -> None:
        self.run, self.settings, self.data = run, run.settings, data
        self.schedule = schedule or functools.partial(learning_rate_factor, steps=steps)
        lengths = [len(tokens) for tokens in data["train"]["input_ids"]]
        args = training_arguments(self.settings, run.folder, steps, device, precision, **changes)
        self.fast = make_fast(model, self.settings, steps * args.gradient_accumulation_steps)  # section 14
        self.summarizer = Summarizer(model, tokenizer, run.settings, device, precision, self.fast, run.stop)
        self.sampler = LengthGroupedSampler(lengths, self.settings.batch_size, self.settings.seed,
                                            self.settings.micro_batch_size, PartialState().num_processes)
        rows = data["train"].select_columns(["input_ids", "labels"])
        if len(self.sampler) > len(rows):
            empty = datasets.Dataset.from_dict({"input_ids": [[0]], "labels": [[-100]]}, features=rows.features)
            rows = datasets.concatenate_datasets([rows, empty])
        super().__init__(
            model=model, processing_class=tokenizer, train_dataset=rows, eval_dataset=data["validation"], args=args,
            callbacks=[run, self.sampler],
            data_collator=Collator(tokenizer, model=model, pad_to_multiple_of=64 if device.type == "cuda" else 8),
            compute_loss_func=token_mean_loss)
        self.data_collator.pack = self.fast and self.fast.pack
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is complete; T5 has no use for the number of tokens
        self.recent: list[StepRecord] = []  # since the last log
        self.skipped_in_a_row, self.saved_step = 0, 0
        self.restart_clock()

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return self.sampler

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        trained = trained_parameters(self.model).values()
        self.optimizer = FlatAdamW(trained, lr=self.settings.lr, fused=True, **ADAMW)
        return self.optimizer

    def create_scheduler(self, *_: Any, **__: Any) -> torch.optim.lr_scheduler.LRScheduler:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        return self.lr_scheduler

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
                      ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss, on the device."""
        step, packed = self.state.global_step, inputs.pop("packed", None)
        self.tokens += inputs.pop("tokens")
        if step >= self.state.max_steps:
            raise NoStepLeft  # resumed after the last step; the Trainer would ask only behind one more
        is_first = not self.recent or self.recent[-1].step != step  # micro-batch of a step
        if self.fast and not self.fast.is_proved["training"]:
            begin_fast(self)
        if is_first:
            model.zero_grad = self.optimizer.zero_grad  # the model's own looks for gradients in all its modules
            # The Trainer seeds all ranks alike, which would give them equal masks of dropout, and once: a resumed run
            # would have to bring back the generators' states.
            seeds = np.random.SeedSequence([self.settings.seed, step, PartialState().process_index])
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
            self.recent.append(StepRecord(step, torch.zeros((), device=self.args.device)))
        if self.fast:
            loss = self.fast.training_step(packed, num_items_in_batch, is_first, self.accelerator.sync_gradients)
        else:
            # Strict: told only to warn, PyTorch keeps the backward pass of attention that varies from run to run.
            torch.use_deterministic_algorithms(self.args.device.type == "cuda")
            try:
                loss = super().training_step(model, {**inputs, "use_cache": False}, num_items_in_batch)
            finally:
                torch.use_deterministic_algorithms(False)
        self.recent[-1].loss += loss
        return torch.zeros_like(loss)  # the Trainer's own sum could not be used again after a loss that is not finite

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer would walk through all modules in each step; `flops_per_row` does once

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clips, and tells AdamW to leave weights and moments alone if loss or gradient norm is not finite.

        `found_inf` is what GradScaler uses for this: the GPU decides, and nothing waits for it.
        """
        norm = super()._clip_grad_norm(self.fast or model)
        self.recent[-1].norm = norm = whole(norm)  # of the gradient of all processes
        skip = (~(self.recent[-1].loss + norm).isfinite()).float()
        if self.args.world_size > 1:  # the norm is that of all ranks, the loss is not
            torch.distributed.all_reduce(skip, op=torch.distributed.ReduceOp.MAX)
        self.optimizer.optimizer.found_inf = skip
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds speed and memory to the loss of the last steps; names the steps that were skipped, and ends the run
        after `MAX_SKIPPED` of them in a row."""
        if "train_loss" in logs:  # the Trainer's last word, about the sum that training_step does not keep
            return
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        # A rank's share of the loss is scaled so that the mean over ranks is the mean over all tokens.
        losses = self.accelerator.reduce(torch.stack([record.loss for record in self.recent]), "mean").tolist()
        steps = [(record.step, loss, float(record.norm)) for record, loss in zip(self.recent, losses, strict=True)]
        self.recent.clear()
        good = [(loss, norm) for _, loss, norm in steps if math.isfinite(loss + norm)]
        seconds = time.perf_counter() - self.since
        (self.run.is_slow,) = agree(self.args.device, seconds > len(steps))
        logs |= {
            "seconds": round(seconds, 3), "skipped_steps": len(steps) - len(good),
            "samples_per_second": round(len(steps) * self.settings.batch_size / seconds, 2),
            "tokens_per_second": round(self.tokens * self.args.world_size / seconds, 1),
            "peak_memory_gib": peak_memory_gib(self.args.device),
        }
        del logs["loss"], logs["grad_norm"]  # the Trainer does not know what was skipped
        if good:
            logs |= {"loss": sum(loss for loss, _ in good) / len(good), "grad_norm": good[-1][1]}
        self.restart_clock()
        super().log(logs, start_time)
        for step, loss, norm in steps:
            self.skipped_in_a_row = 0 if math.isfinite(loss + norm) else self.skipped_in_a_row + 1
            if self.skipped_in_a_row:
                self.run.report_skipped(self, step, loss, self.skipped_in_a_row)

    def restart_clock(self) -> None:
        """So that speed and memory in the log are those of training alone, without evaluations and checkpoints."""
        self.since, self.tokens = time.perf_counter(), 0  # real tokens of this process
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores validation and test, logs them, and keeps the adapter if validation ROUGE-1 is the best so far.

        Called by the Trainer before the first step (where a resumed run may have been scored) and after each epoch.
        """
        step, scored = self.state.global_step, [e["step"] for e in self.state.log_history if "validation" in e]
        is_mid_epoch = not float(self.state.epoch or 0).is_integer() and step < self.state.max_steps
        if self.run.stop.is_set or is_mid_epoch or step in scored:
            return {}
        if step:
            self._save_checkpoint()
        fitted = [line["batch_size"] for line in self.state.log_history if "batch_size" in line]  # before a resume
        self.summarizer.batch_size = min([self.summarizer.batch_size, *fitted])
        start, scores, examples, self.summarizer.is_fast = time.perf_counter(), {}, {}, False
        self.model.eval()
        with merged_adapter(self.model):
            for split in ("validation", "test"):
                self.summarizer.what = f"summaries of {split}"
                scores[split], examples[split] = score(self.summarizer, self.data[split])
        self.model.train()
        self.log(scores | {"seconds": round(time.perf_counter() - start, 2), "fast": self.summarizer.is_fast,
                           "batch_size": self.summarizer.batch_size})
        if self.run.epochs(self.state.log_history)[-1]["best"]:
            save_result(self.run.folder, self.model, self.processing_class, self.settings)
        self.run.on_scored(self.state, examples)
        self.restart_clock()
        if self.run.bar is not None:
            self.run.bar.unpause()  # the time left is that of training alone
        return {}

    def _save_checkpoint(self, *_: Any) -> None:
        if self.saved_step != self.state.global_step:
            save_checkpoint(self.run.folder, self.model, self.optimizer, self.state)
            self.saved_step, self.run.saved_at = self.state.global_step, time.monotonic()
        self.restart_clock()

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(checkpoint))
        self.saved_step = step_of(Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass  # the Trainer would unpickle a file of others; nothing random is left in the generators (training_step)


# ---------- 6. Scores: generation, and ROUGE with its bootstrap interval ----------------------------------------------

ROUGE_TYPES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
# From below: `agree` asks all processes, `StopSignal` whether to stop, `new_bar` shows how far it is (section 9);
# `FastT5.generate` (14).


NO_REPEAT = 6  # tokens in a row that no summary of a beam search holds twice


def decoding_of(settings: Settings) -> dict[str, int]:
    """Of GenerationConfig. Without max_new_tokens a summary would end after 20 tokens. Beams are compared by their mean
    log-likelihood, which a loop raises: so none holds the same tokens twice."""
    return {"max_new_tokens": settings.max_new_tokens, "num_beams": settings.num_beams,
            "no_repeat_ngram_size": NO_REPEAT if settings.num_beams > 1 else 0}


class Summarizer:
    """Summaries of token ids. All text of this script is generated here, in `generate`.

    Batches hold rows of similar length, the longest first, so that little is padded and memory that does not suffice
    shows at once: then the batch is halved, for good. Several processes share the rows and go from batch to batch
    together, so that all of them halve it, or end because of a signal, in the same place. Not where the weights are
    sharded: those who wait for the shards of a process without room would never hear of it, so it ends, and they too.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, settings: Settings, device: torch.device,
                 precision: torch.dtype, fast: "FastT5 | None" = None, stop: "StopSignal | None" = None) -> None:
        self.model, self.tokenizer, self.device, self.precision = model, tokenizer, device, precision
        self.fast, self.stop = fast, stop or StopSignal()
        self.config = GenerationConfig(**decoding_of(settings), do_sample=False)
        self.batch_size = max(1, (256 if device.type == "cuda" else 32) // settings.num_beams)
        self.is_fast = False  # whether the fast path has generated something
        self.what = "summaries"  # what stands beside the bar

    def __call__(self, sources: list[Tokens]) -> list[str]:
        """The summaries of `sources`, in their order. Raises Interrupted if the process was told to stop."""
        state = PartialState()
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        order += (order * state.num_processes)[: -len(order) % state.num_processes]  # as many for each process
        mine, summaries, start = order[state.process_index :: state.num_processes], {}, 0
        bar = new_bar(len(mine), self.what, "row")
        while start < len(mine):
            rows = mine[start : start + self.batch_size]
            texts = self.generate([sources[i] for i in rows])
            (no_room,) = self.stop.agreed(self.device, texts is None)
            if self.stop.is_set:
                raise Interrupted
            if no_room:  # out here, as the exception would hold on to what it had computed
                self.batch_size = len(rows) // 2
                torch.cuda.empty_cache()
                continue
            summaries.update(zip(rows, texts, strict=True))
            start += len(rows)
            bar.update(len(rows))
        bar.close()
        if state.num_processes > 1:
            parts = [None] * state.num_processes
            torch.distributed.all_gather_object(parts, summaries)
            summaries = {i: text for part in parts for i, text in part.items()}
        return [summaries[i] for i in range(len(sources))]

    @torch.no_grad()
    def generate(self, sources: list[Tokens]) -> list[str] | None:
        """The summaries of one batch; None if there was no room for it in the GPU's memory.

        They break off when the process is told to stop: a batch may take longer than torchrun waits before it kills.
        """
        # Each forward pass needs the shards of all processes: one whose summaries have ended goes on with the others.
        more = {"synced_gpus": True} if is_sharded() else {}
        is_told = lambda ids, scores, **_: torch.full((len(ids),), self.stop.number > 0, device=ids.device)
        try:
            output = self.fast and self.fast.generate(sources, self.config, self.stop)
            self.is_fast |= output is not None
            if output is None:
                batch = self.tokenizer.pad({"input_ids": sources}, return_tensors="pt",
                                           pad_to_multiple_of=64 if self.device.type == "cuda" else 8).to(self.device)
                with torch.autocast(self.device.type, self.precision, enabled=self.precision != self.model.dtype):
                    output = self.model.generate(**batch, generation_config=self.config, stopping_criteria=[is_told],
                                                 **more)
        except torch.OutOfMemoryError:
            if len(sources) == 1 or is_sharded():
                raise
            return None
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]


class Rouge(evaluate.Metric):
    """ROUGE F1 in percent for each row, by rouge_score with the Porter stemmer.

    A local metric, because `evaluate.load("rouge")` needs the Hub. ROUGE-Lsum compares sentence by sentence, and
    sentences are taken to end at white space after . ! or ? (Lin 2004 leaves the splitting open).
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="ROUGE per row", citation="Lin 2004", inputs_description=self.__doc__,
                                   features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
        rows = [scorer.score(one_sentence_a_line(reference), one_sentence_a_line(prediction))
                for prediction, reference in zip(predictions, references, strict=True)]
        return {kind: [100 * row[kind].fmeasure for row in rows] for kind in ROUGE_TYPES}


def one_sentence_a_line(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


def bootstrap_interval(scores: list[float], samples: int = 1000, seed: int = 0) -> list[float]:
    """95% percentile bootstrap interval (Efron and Tibshirani 1993) of the mean of `scores` [rows]: [low, high]."""
    return np.percentile(resampled_means(np.asarray(scores), samples, seed), [2.5, 97.5]).tolist()


def resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """The means of so many samples, each of as many `values` [rows], drawn with replacement: [samples]."""
    rng, rows = np.random.default_rng(seed), len(values)
    at_once = max(1, 10**6 // rows)  # samples: memory for a million rows
    return np.concatenate([values[rng.integers(0, rows, (min(at_once, samples - done), rows))].mean(1)
                           for done in range(0, samples, at_once)])


def score(summarizer: Summarizer, rows: datasets.Dataset) -> tuple[Scores, list[dict[str, Any]]]:
    """Summarises `rows` (a tokenised split) and compares with the references.

    Returns the scores, and the rows with their predictions. The raw references are compared, not the labels, which may
    be truncated.
    """
    predictions = summarizer(rows["input_ids"])
    per_row = Rouge(keep_in_memory=True).compute(predictions=predictions, references=list(rows["summary"]))
    scores = {}
    for kind, values in per_row.items():
        scores[kind] = float(np.mean(values))
        scores[kind + "_interval"] = bootstrap_interval(values)
    examples = [
        {"id": i, "dialogue": dialogue, "reference": reference, "prediction": prediction, "rouge1": round(rouge1, 2)}
        for i, dialogue, reference, prediction, rouge1 in zip(
            rows["id"], rows["dialogue"], rows["summary"], predictions, per_row["rouge1"], strict=True)
    ]
    return scores, examples


# ---------- 7. Files and checkpoints: whole or absent, whatever happens while they are written ------------------------

SAVE_SECONDS = 600  # nothing of a training that is older is lost, unless a disk damages the newest checkpoint


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes a file aside, and renames it when it is on the disk: after a crash `path` is whole, old or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".incomplete")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def change_json(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace_folder(written: Path, folder: Path) -> None:
    """Renames a written folder once it is on disk, so that after a crash or power cut `folder` is whole or absent."""
    for path in [*written.rglob("*"), written] if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = folder.with_name(folder.name + ".old.incomplete")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, aside, which takes the place of `folder` when that is done."""
    written = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        replace_folder(written, folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def remove_incomplete(folder: Path) -> None:
    for path in list(folder.rglob("*.incomplete")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_to(folder: Path, kinds: tuple = (OSError, RuntimeError, SafetensorError)) -> Iterator[None]:
    """Makes a UserError of a failure to write. torch.save and safetensors report a full disk in errors of their own."""
    try:
        yield
    except (torch.OutOfMemoryError, BrokenPipeError):  # the latter: no disk, but who reads what is printed
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        advice = "make room, or choose another folder"
        if (folder / "metrics.json").is_file():
            advice = f"make room, then go on with --resume --output-dir {shlex.quote(str(folder))}"
        disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(disk).free >> 20
        raise UserError(f"cannot write to {folder}: {reason} ({free:,} MiB free); {advice}") from None


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: Any) -> Any:
    """The tensor itself, put together from all processes if it is sharded; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_host(tensor: torch.Tensor) -> torch.Tensor | None:
    """The whole tensor in main memory; None but in the first process, which is the one that writes."""
    tensor = whole(tensor.detach())
    return tensor.cpu().contiguous() if is_main_process() else None


def sharded_like(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, whole and in main memory (of the first process)."""
    return {name: on_host(parameter) for name, parameter in trained_parameters(model).items()}


def save_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Writes checkpoints/step-<number> of a run: the trained weights, AdamW's moments, the Trainer's state and log.

    Nothing else is needed: order of the rows, dropout and learning rate follow from seed and step. The last two are
    kept. Sharded tensors are put together, so that a checkpoint is the same under any launcher.
    """
    weights, moments = trained_weights(model), optimizer.state_dict()
    moments["state"] = {i: {name: on_host(tensor) for name, tensor in values.items()}
                        for i, values in moments["state"].items()}
    if is_main_process():
        with writing_to(folder):
            with new_folder(folder / "checkpoints" / f"step-{state.global_step:08d}") as written:
                save_file(weights, written / "weights.safetensors")
                torch.save(moments, written / "optimizer.pt")
                state.save_to_json(str(written / "trainer_state.json"))
            for old in checkpoints(folder)[:-2]:
                shutil.rmtree(old)
    PartialState().wait_for_everyone()


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    weights = load_file(checkpoint / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(sharded_like(weights[name], parameter))


def load_optimizer(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, checkpoint: Path
                   ) -> None:
    """AdamW's moments; and the learning rate of this step, which may be another one if --max-steps has changed."""
    moments = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    parameters = optimizer.param_groups[0]["params"]
    for i, values in moments["state"].items():
        values.update({name: sharded_like(value, parameters[i]) for name, value in values.items()})
    optimizer.load_state_dict(moments)
    scheduler.last_epoch = step_of(checkpoint)
    rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch)
    scheduler._last_lr = [rate]
    optimizer.param_groups[0]["lr"] = rate


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    return sorted(path for path in folder.glob("checkpoints/step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read, or None; what cannot be read is put aside, and named."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            with safe_open(checkpoint / "weights.safetensors", "pt"):
                pass
            torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            has_code = isinstance(error, pickle.UnpicklingError)
            reason = "it has code in it, which is not run" if has_code else first_line(error)
            aside = checkpoint.with_name(checkpoint.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            say(f"{checkpoint} is damaged ({reason}): put aside as {aside.name}")
        else:
            say(f"going on from {checkpoint}")
            return checkpoint
    say(f"{folder} has no checkpoint: it starts with the first step")
    return None


def result_name(settings: Settings) -> str:
    return "model" if settings.full else "adapter"


def save_result(folder: Path, model: torch.nn.Module, tokenizer: Any, settings: Settings) -> None:
    """Writes the adapter in PEFT's format (or, after --full, the model) and the tokenizer; all of it or nothing."""
    weights = trained_weights(model)
    if not is_main_process():
        return
    with writing_to(folder), new_folder(folder / result_name(settings)) as written:
        if not isinstance(model, PeftModel):
            return save_model(model, tokenizer, written, settings, weights)
        model.save_pretrained(written, state_dict=weights, save_embedding_layers=False)
        let_others_read(written / "adapter_config.json")
        # The name of the base, not its folder in the Hub's cache. In the model itself it would make PEFT ask the Hub.
        change_json(written / "adapter_config.json", base_model_name_or_path=MODELS.get(settings.model, settings.model))
        (written / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
        tokenizer.save_pretrained(written)


def let_others_read(config: Path) -> None:
    """safetensors writes files that only their owner may read; beside `config` they get its permissions."""
    for file in config.parent.glob("*.safetensors"):
        shutil.copymode(config, file)


def save_model(model: torch.nn.Module, tokenizer: Any, folder: Path, settings: Settings,
               weights: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a whole model that every version of transformers reads alike and that summarises as long as it did here.

    transformers 5 writes `tie_word_embeddings: true` for every T5, also for Flan-T5, whose head is a matrix of its own;
    another version would then tie the two and drop the head.
    """
    model.generation_config.update(**decoding_of(settings))
    model.save_pretrained(folder, state_dict=weights)
    let_others_read(folder / "config.json")
    tokenizer.save_pretrained(folder)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        change_json(folder / "config.json", tie_word_embeddings=False)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Two trainings must not write to one folder. The lock of a process that is gone is none."""
    if fcntl is None or not is_main_process():
        yield
        return
    with writing_to(folder):
        file = open(folder / "lock", "a")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is being trained by another process: wait for it, or choose another run "
                            "(--output-dir DIR)") from None
        yield


# ---------- 8. Reading models and data: the Hub, folders, and what is wrong with a file -------------------------------

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
               "val": "validation", "dev": "validation", "test": "test", "testing": "test"}


def fetch(repo_id: str, repo_type: str, cache_dir: Path | None = None, weights: bool = True) -> Path:
    """Downloads what is needed of a Hub repository, or finds it in the cache; returns its local folder.

    Everything after this works on folders, so nothing else can touch the network. Offline (HF_HUB_OFFLINE=1, or no
    connection) the cached copy is used; without one a UserError names the way out.
    """
    reason, files = ask_hub(repo_id, repo_type)
    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    if repo_type == "model":  # the weights only once: a repository may hold them in five formats
        # A .bin that is not in the cache would count as a gap, so .bin is asked for only where the Hub has no other.
        only_bin = files and not any(name.endswith(".safetensors") for name in files)
        patterns = ["*.json", "*.model", *(["*.bin" if only_bin else "*.safetensors"] if weights else [])]
    try:
        with PartialState().main_process_first():
            return Path(huggingface_hub.snapshot_download(repo_id, repo_type=repo_type, allow_patterns=patterns,
                                                          cache_dir=cache_dir, local_files_only=reason is not None))
    except huggingface_hub.errors.GatedRepoError:  # the names of its files are shown to everybody
        raise UserError(f"{repo_id} asks for a licence: accept it on its Hub page, then `hf auth login`") from None
    except Exception as error:  # a broken connection, in classes of the Hub client's HTTP library; a full disk
        raise UserError(f"cannot get {repo_type} {repo_id} from the Hub ({reason or first_line(error)}), and it is "
                        f"not in the cache. Offline, copy it here and give the folder: --{repo_type} FOLDER") from None


hub_silence: list[str] = []  # why the Hub is not waited for a second time


def ask_hub(repo_id: str, repo_type: str) -> tuple[str | None, list[str]]:
    """None or the reason why the Hub does not answer, and the names of the files in a repository.

    The functions that download would try again for minutes. And looking up a name may take without end, so that is
    done first, in a thread which is left behind after 3 seconds.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE or hub_silence:
        return (hub_silence or ["HF_HUB_OFFLINE is set"])[0], []
    host = huggingface_hub.constants.ENDPOINT.split("//")[-1].split(":")[0]

    def look_up() -> None:
        with contextlib.suppress(OSError):  # the next request says it better
            socket.getaddrinfo(host, None)

    thread = threading.Thread(target=look_up, daemon=True)
    if not urllib.request.getproxies():  # a proxy looks names up by itself
        thread.start()
        thread.join(3)
    if thread.is_alive():
        hub_silence.append(f"the name {host} cannot be looked up")
        return hub_silence[0], []
    try:
        return None, [file.rfilename for file in huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type,
                                                                                   timeout=5).siblings]
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise UserError(f"there is no {repo_type} {repo_id} on the Hub (or it is private: `hf auth login`)") from None
    except Exception as error:
        if type(error).__name__.endswith("Timeout"):
            hub_silence.append("no answer within 5 seconds")
        return (hub_silence or [first_line(error)])[0], []


def find_on_disk(kind: str, name: str, cache_dir: Path | None, weights: bool = True) -> Path:
    """Where --model (or all but its weights) or --dataset is: a preset, a path, or a Hub id, which is downloaded."""
    presets = MODELS if kind == "model" else DATASETS
    path = Path(presets.get(name, name))
    if path.is_dir() or (path.is_file() and kind == "dataset"):
        return path
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(tuple(SUFFIXES)) or name.count("/") > 1
    if looks_like_path or "/" not in str(path):
        raise UserError(f"no {kind} {name}: give {', '.join(presets)}, a Hub id (owner/name) or "
                        f"{'a folder' if kind == 'model' else 'a file or folder'}")
    return fetch(str(path), kind, cache_dir, weights)


def read_splits(name: str, cache_dir: Path | None = None) -> tuple[dict[str, list[Row]], list[Path]]:
    """{"train", "validation", "test": rows as they stand in the files} of --dataset, and these files."""
    path = find_on_disk("dataset", name, cache_dir)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: only {', '.join(SUFFIXES)} files can be read")
        rows = read_files([path], cache_dir)
        tenth = len(rows) // 10
        if not tenth:
            raise UserError(f"{path} has {len(rows)} rows: at least 10 are needed to hold out validation and test")
        say(f"{path.name} is one file: its last tenth ({tenth} of {len(rows)} rows) is test, the one before validation")
        return {"train": rows[: -2 * tenth], "validation": rows[-2 * tenth : -tenth], "test": rows[-tenth:]}, [path]
    files = find_files(path)
    missing = [split for split in SPLITS if split not in files]
    if missing:
        raise UserError(f"{name} lacks {' and '.join(missing)}: expected train, validation and test (.jsonl, ...) "
                        f"in {path}, found {', '.join(files) or 'none'} (one file alone is split for you)")
    return {split: read_files(files[split], cache_dir) for split in SPLITS}, list(itertools.chain(*files.values()))


def find_files(folder: Path) -> dict[str, list[Path]]:
    """{split: files} of a folder such as SAMSum's: the split is a word in the name of the file or of its folder."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            words = re.findall("[a-z]+", path.stem.lower()) or re.findall("[a-z]+", path.parent.name.lower())
            names = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
            if len(names) == 1:
                splits.setdefault(names.pop(), []).append(path)
    for split, paths in splits.items():
        folders = sorted({str(path.parent) for path in paths})
        if len(folders) > 1:  # several configurations of a Hub data set, for example
            raise UserError(f"{folder} has {split} files in several folders: give one of them, {' or '.join(folders)}")
    return splits


def read_files(paths: list[Path], cache_dir: Path | None) -> list[Row]:
    """The rows of files of one kind, by `datasets.load_dataset`; UserError with file and line if it refuses."""
    kind, options = SUFFIXES[paths[0].suffix], {}
    other = next((path for path in paths if SUFFIXES[path.suffix] != kind), None)
    if other:
        raise UserError(f"{paths[0]} and {other} are of two kinds: leave one out")
    digest = hashlib.blake2b(digest_size=8)  # `datasets` knows a file by its time, which a copy may share with another
    try:
        for path in paths:
            content = path.read_bytes()
            digest.update(content)
            if path.suffix == ".json" and not re.match(rb"(\xef\xbb\xbf)?\s*(\[|$)", content[:1000]):
                explain(path)  # pyarrow would make columns of an object, and end the process at a null
        files = [glob.escape(str(path)) for path in paths if path.stat().st_size or kind == "parquet"]
        if kind == "csv" and files:  # all fields are text, "NA" and "7" too, and none of them is the name of its row
            names = csv_header(next(path for path in paths if path.stat().st_size))
            options = {"keep_default_na": False, "index_col": False, "encoding": "utf-8-sig",
                       "features": datasets.Features({name: datasets.Value("string") for name in names})}
        with warnings.catch_warnings(), cache_folder(cache_dir, "datasets") as folder:
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            return datasets.load_dataset(kind, data_files={"train": files}, cache_dir=str(folder / digest.hexdigest()),
                                         split="train", **options).to_list() if files else []
    except UserError:
        raise
    except Exception as error:
        for path in paths:
            explain(path)
        if "no data" in str(error):  # nothing but a header
            return []
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise UserError(f"cannot write to {folder}: {cause.strerror}; another folder: --cache-dir DIR") from None
        what = "not a readable Parquet file" if kind == "parquet" else "not readable"
        raise UserError(f"{', '.join(map(str, paths))}: {what} ({first_line(cause)})") from None


def csv_header(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    refuse_twice(names, f"{path}: two columns")
    return [name or f"Unnamed: {i}" for i, name in enumerate(names)]  # as pandas calls them


def refuse_twice(names: list[str], what: str) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{what} are called {min(twice)}: rename one")


def explain(path: Path, column: str | None = None) -> None:
    """UserError with the place of what is wrong in a .jsonl, .json or .csv file, or what is no text in `column`;
    returns if nothing is found."""
    if path.suffix == ".parquet":
        return
    text = decode(path)
    if path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # a dialogue may be longer than the module's limit of 128 KiB
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        width, line = 0, 1
        try:
            for row in reader:
                width = width or len(row)
                if len(row) > width:
                    raise UserError(f"{path}:{line}: more fields than the header names: quote fields that hold commas")
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: broken CSV ({error})") from None
        return
    if path.suffix == ".jsonl":
        rows, form, content = read_json_lines(path, text), "one a line", None
    else:
        content, form = parse_json(path, 1, text), "a list of them"
        rows = [(f"row {i}", row) for i, row in enumerate(content, 1)] if isinstance(content, list) else [(1, content)]
    for place, row in rows:
        if not isinstance(row, dict) or row is content:
            found = "an object" if isinstance(row, dict) else type(row).__name__
            raise UserError(f'{path}:{place}: expected rows such as {{"dialogue": ..., "summary": ...}} ({form}), '
                            f"found {found}")
        if column and not isinstance(row.get(column), str | None):
            raise UserError(f"{path}:{place}: {column} is {type(row[column]).__name__}, not text")


def decode(path: Path, content: bytes | None = None) -> str:
    """The text of a file, or `content` in its place; UserError with the place if it is none."""
    try:
        return (path.read_bytes() if content is None else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x}): convert it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_json_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    """(line number, content) of each line that is not blank."""
    return [(i, parse_json(path, i, line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_json(path: Path, line_number: int, text: str) -> Any:
    def to_row(pairs: list[tuple[str, Any]]) -> Row:
        refuse_twice([name for name, _ in pairs], f"{path}:{line_number}: two columns")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=to_row if path.suffix == ".jsonl" else None)
        json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError:
        raise UserError(f"{path}:{line_number}: half a character (a surrogate without its other half)") from None
    except ValueError as error:
        line_number += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line_number}: not valid JSON ({getattr(error, 'msg', error)})") from None
    except RecursionError:
        raise UserError(f"{path}:{line_number}: not usable JSON (nested too deeply)") from None


@contextlib.contextmanager
def cache_folder(cache_dir: Path | None, name: str) -> Iterator[Path]:
    """A folder for what can be made again, first for the main process and then for those that find it there."""
    folder = Path(cache_dir or huggingface_hub.constants.HF_HOME) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with PartialState().main_process_first():
            yield folder
    except FileNotFoundError:  # a file to read
        raise
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; another folder: --cache-dir DIR") from None


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def load_tokenizer_and_config(folder: Path) -> tuple[Any, transformers.PretrainedConfig]:
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError,
            huggingface_hub.errors.StrictDataclassError) as error:
        raise UserError(f"{folder} holds no usable model: {first_line(error)}") from None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):  # it would be an empty one
        raise UserError(f"{folder} holds no tokenizer: it needs a tokenizer.json or spiece.model")
    if config.model_type not in ("t5", "mt5"):
        raise UserError(f"{folder} is a {config.model_type} model, not T5")
    if None in (tokenizer.eos_token_id, tokenizer.pad_token_id, config.decoder_start_token_id):
        raise UserError(f"{folder}: a T5 needs an end and a padding token and, in config.json, decoder_start_token_id")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its embedding {config.vocab_size} rows")
    tokenizer.model_max_length = sys.maxsize  # lengths are cut in one place, tokenize(), which also counts them
    return tokenizer, config


def read_weights(folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """`from_pretrained`, and a UserError if it fails or if weights are missing, which it would make up."""
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if size > 2**30 and sys.stderr.isatty() and is_main_process():
        transformers.logging.enable_progress_bar()
    try:
        model, report = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, **options)
    except pickle.UnpicklingError:
        raise UserError(f"{folder} has weights with code in them, which is not run: use .safetensors") from None
    except (OSError, ValueError, RuntimeError, ImportError, EOFError, SafetensorError) as error:
        if "out of memory" in str(error):  # while quantising, transformers wraps it in an error of its own
            raise torch.OutOfMemoryError(str(error)) from None
        raise UserError(f"cannot load the weights in {folder}: {first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    untied = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings") is False
    if untied and model.lm_head.weight is model.shared.weight:  # which transformers takes in place of a lost head
        missing.append("lm_head.weight")
    if missing:
        raise UserError(f"{folder} lacks weights: {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}: copy it again")
    return model


def forget_input(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """Forward hook of an INT8 layer, whose weights are frozen.

    bitsandbytes 0.50 keeps the input for a gradient of the weights all the same, and out of sight of gradient
    checkpointing: for XXL, 2 GiB, with checkpointing 3.
    """
    function = output.grad_fn
    if hasattr(function, "tensors"):  # CUDA
        function.tensors = (None, None, None)
    elif hasattr(function, "A"):  # CPU
        function.A = None


def load_adapter(model: transformers.PreTrainedModel, folder: Path) -> PeftModel:
    """Puts a trained adapter on its base, for inference: nothing is prepared, moved or cast."""
    misfit = f"the adapter {folder} does not fit {model.config.name_or_path}"
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise UserError(f"the adapter {folder} has no weights")  # PEFT would look for them on the Hub
    try:
        with warnings.catch_warnings():  # it would leave what is missing at its random start
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except torch.OutOfMemoryError:
        raise
    except UserWarning:
        raise UserError(f"{misfit}: it lacks weights") from None
    except pickle.UnpicklingError:
        raise UserError(f"the adapter {folder} has code in it, which is not run: use .safetensors") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{misfit}: {lines['size mismatch' in str(error) and len(lines) > 1][:200]}") from None


# ---------- 9. Processes, signals and what is printed -----------------------------------------------------------------


class Interrupted(Exception):
    """Raised inside a long computation after SIGINT or SIGTERM."""


class StopSignal:
    """The one place of stopping. `receive` remembers the first SIGINT or SIGTERM in `number`; a second stops at once.

    What the first leads to is decided in `agreed`, by all processes together: after a step of a training, which saves
    and ends (`Run.on_step_end`), or of a range test (`RangeTest.on_log`), and after a batch of summaries
    (`Summarizer`), which ends within a few tokens in a process that was told.

    Signals within a second are taken for one: torchrun passes on what a scheduler, or Ctrl-C, has already sent to each
    process. The handler runs in the middle of anything, so it only sets fields and writes without a buffer.
    """

    def __init__(self, *heard: int) -> None:
        self.number, self.received, self.is_set = 0, 0.0, False  # the last: decided, in all processes
        for number in heard:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self.received = number, time.monotonic()
            if is_main_process():
                with contextlib.suppress(OSError):  # the same Ctrl-C has ended `tee`
                    os.write(2, b"\nstopping soon (once more: stop at once)\n")
        elif time.monotonic() - self.received > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def note(self) -> None:
        """Counts as a SIGTERM if no signal has come."""
        self.number = self.number or signal.SIGTERM

    def agreed(self, device: torch.device, *flags: Any) -> list[bool]:
        """As `agree`, for `flags`; decides at the same time whether to stop."""
        *flags, self.is_set = agree(device, *flags, self.number)
        if self.is_set:
            self.note()  # maybe only another process was told
        return flags


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def is_sharded() -> bool:
    """Whether `accelerate launch --use_fsdp` has started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_sharding(settings: Settings) -> None:
    """UserError where FSDP could not do what is asked for; and each T5 block is to be gathered by itself."""
    if not is_sharded():
        return
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if str(PartialState().distributed_type) in ("DistributedType.NO", "DistributedType.MULTI_CPU"):
        raise UserError("FSDP shards over several GPUs only: start this with python or torchrun")
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("only FSDP 2 is supported: accelerate launch --use_fsdp --fsdp_version 2")
    if settings.quantization or settings.mode != "train":
        raise UserError("FSDP is for training in bf16 or with --full: for anything else use python or torchrun")


def agree(device: torch.device, *flags: Any) -> list[bool]:
    """For each flag whether it is set in any process; all of them must ask together."""
    if PartialState().num_processes == 1:
        return [bool(flag) for flag in flags]
    flags = torch.tensor([float(bool(flag)) for flag in flags], device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def from_main_process(work: Callable[[], Any]) -> Any:
    """What `work` returns in the main process, in all of them."""
    return broadcast_object_list([work() if is_main_process() else None])[0]


def this_script(launcher: str = "python") -> str:
    """The words that start it, where the user stands."""
    return f"{launcher} {shlex.quote(sys.argv[0])}"


def this_script_again() -> str:
    """The words that start it with as many processes."""
    processes, here = PartialState().num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    several, launcher = here < processes, f"torchrun --nproc-per-node={here}"
    if is_sharded():
        nodes = f"--num_machines {processes // here} --machine_rank RANK --main_process_ip HOST " * several
        launcher = f"accelerate launch --use_fsdp --fsdp_version 2 {nodes}--num_processes {processes}"
    elif several:
        launcher += f" --nnodes={processes // here} --rdzv-endpoint=HOST:PORT --rdzv-backend=c10d"
    return this_script() if processes == 1 else this_script(launcher)


def say(*lines: str, file: Any = None) -> None:
    """Prints, once, however many processes there are."""
    if lines and is_main_process():
        print(*lines, sep="\n", file=file, flush=True)


def fold(text: str) -> str:
    """In lines of at most 79 characters."""
    return textwrap.fill(text, 79, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def say_list(label: str, items: Iterable[str]) -> None:
    """Prints `label: item, item, ...` in lines of at most 79 characters that break between items."""
    joined = ", ".join(item.replace(" ", "\0") for item in items)  # no break inside an item
    say(fold(f"{label} {joined}").replace("\0", " "))


def table(header: list[str], rows: Iterable[list[str]], text: tuple[int, ...] = (0,)) -> str:
    """A Markdown table as wide as its widest cells, with the numbers of the columns that hold text."""
    columns = []
    for i, cells in enumerate(zip(header, *rows, strict=True)):
        width, is_text = max(map(len, cells)), i in text
        head, *rest = (f" {cell:{'<' if is_text else '>'}{width}} " for cell in cells)
        columns.append([head, ":" * is_text + "-" * (width + 1) + ":" * (not is_text), *rest])
    return "\n".join(f"|{'|'.join(line)}|" for line in zip(*columns, strict=True))


def is_wide() -> bool:
    """Whether the terminal has room for the interval of each score."""
    return shutil.get_terminal_size().columns >= 140


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def new_bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar of at most 79 columns, at a terminal only, of the main process."""
    return tqdm(total=total, desc=what, unit=unit, initial=initial, leave=unit == "step", ncols=79, nrows=20,
                disable=None if is_main_process() else True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining} {desc}")


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(getrusage(RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"


# ---------- 10. A run: its folder, what it shows while it goes, and its report ----------------------------------------

MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient end a run
# Dense bf16 TFLOP/s of NVIDIA's data sheets, without sparsity, by a part of the card's name; the first that fits.
DATA_SHEET = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A40": 149.7, "A10": 125,
              "L40S": 362, "L4": 121, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71}


def train(settings: Settings) -> int:
    """Trains, scores after every epoch, and leaves a run folder; returns the exit code."""
    device, precision = get_device()
    model, tokenizer, data = load_for_training(settings, device, precision)
    steps = number_of_steps(settings, len(data["train"]))
    description = describe_run(settings, model, data, device, precision)
    folder = settings.output_dir if settings.resume else new_run_folder(settings, run_name(settings))
    with lock(folder):
        checkpoint = None
        if settings.resume:
            with writing_to(folder):
                checkpoint = from_main_process(lambda: find_checkpoint(folder))
            check_resumable(folder, description, settings, steps, checkpoint)
            if checkpoint and step_of(checkpoint) == steps and read_metrics(folder).get("status") == "finished":
                more = "for more epochs, start a new run"
                if steps < number_of_steps(replace(settings, max_steps=None), len(data["train"])):
                    more = "for more of its epochs, raise --max-steps"
                say(f"{folder} is finished, and nothing is left to do: {more}")
                return 0
        show_description(description, settings, steps, folder)
        run = Run(settings, folder, description)
        trainer = SummarizationTrainer(run, model, tokenizer, data, steps, device, precision)
        with writing_to(folder):
            run.begin(checkpoint)
        status = "failed"
        try:
            with writing_to(folder, OSError), contextlib.suppress(NoStepLeft, Interrupted):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            status = "interrupted" if run.stop.is_set else "finished"
        finally:
            if is_main_process():
                with writing_to(folder):
                    run.finish(trainer.state.log_history, status)
    if status == "interrupted":
        say(f"interrupted; go on with: {this_script_again()} --resume --output-dir {shlex.quote(str(folder))}")
        return 128 + run.stop.number
    return 0


def describe_run(settings: Settings, model: torch.nn.Module, data: datasets.DatasetDict, device: torch.device,
                 precision: torch.dtype) -> dict[str, Any]:
    """What is known of a run before its first step: the head of its metrics.json."""
    # PEFT counts packed 4-bit weights as what they are, two to a byte.
    trainable, total = [model.num_parameters()] * 2 if settings.full else model.get_nb_trainable_parameters()
    packages = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "evaluate", "rouge_score", "accelerate")
    rate = next((tera * 1e12 for card, tera in DATA_SHEET.items() if card in device_name(device)), None)
    return {
        "configuration": settings.configuration,
        "optimizer": {"name": "AdamW", **ADAMW, "max_grad_norm": MAX_GRAD_NORM, "peak_learning_rate": settings.lr,
                      "schedule": "linear", "warmup": WARMUP,
                      "steps": number_of_steps(settings, len(data["train"]))},
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name)
                                                             for name in packages},
        "cache_dir": settings.cache_dir and str(settings.cache_dir.resolve()),
        "device": device_name(device), "processes": PartialState().num_processes,
        "precision": str(precision).removeprefix("torch."), "fast_step": False,  # `begin_fast` may find that it is
        "parameters": total, "trainable_parameters": trainable,
        "flops_per_row": flops_per_row(model, data["train"], settings.full),
        "data_sheet_flops_per_second": rate if precision == torch.bfloat16 else None,
        "scoring": describe_scoring(settings, data),
        "data": {split: fingerprint(rows.to_dict()) for split, rows in data.items()},
    }


def flops_per_row(model: torch.nn.Module, rows: datasets.Dataset, full: bool) -> float:
    """What one training row of mean length costs: for each weight and token 2 FLOP forward and 2 for the gradient of
    the layer's input; 2 more for that of the weight, if it is trained. Padding, LoRA's and attention's own products,
    a few percent here, are not counted: MFU (PaLM, Chowdhery et al. 2022) is about the model, not about what ran."""
    tokens = {column: float(np.mean([len(row) for row in rows[column]])) for column in ("input_ids", "labels")}
    total = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".lora_" not in name:
            sees_target = re.search(r"lm_head|decoder\.(?!.*EncDecAttention\.[kv]\b)", name)
            total += layer.in_features * layer.out_features * tokens["labels" if sees_target else "input_ids"]
    return (6 if full else 4) * total


def describe_scoring(settings: Settings, data: dict[str, datasets.Dataset]) -> dict[str, Any]:
    """How scores are taken. Only those taken in the same way can be compared."""
    return {
        "decoding": "greedy" if settings.num_beams == 1 else (
            f"beam search with {settings.num_beams} beams, no {NO_REPEAT} tokens twice"),
        "max_new_tokens": settings.max_new_tokens, "prefix": PREFIX, "rouge": "rouge_score F1", "stemmer": True,
        "sentences": "split at white space after . ! ?", "interval": "95% percentile bootstrap over rows, 1000 samples",
        "max_source_length": settings.max_source_length,
        "rows": {split: len(rows) for split, rows in data.items()},
        "truncated": {split: round(float(np.mean(rows["truncated"])), 4) for split, rows in data.items()},
    }


def rows_in_words(scoring: dict[str, Any], splits: Iterable[str]) -> list[str]:
    """With how many of them are cut, if any."""
    return [f"{scoring['rows'][split]} {split}" + f" ({share:.1%} truncated to {scoring['max_source_length']} tokens)"
            * (share > 0) for split, share in ((split, scoring["truncated"][split]) for split in splits)]


def scoring_in_words(scoring: dict[str, Any]) -> str:
    rows = ", ".join(rows_in_words(scoring, [s for s in scoring["rows"] if s != "train" or len(scoring["rows"]) == 1]))
    return textwrap.fill(
        f"Scores: {scoring['decoding']}, at most {scoring['max_new_tokens']} new tokens; {scoring['rouge']} with "
        f"stemmer, sentences {scoring['sentences']}; rows: {rows}"
        + f"; intervals: {scoring['interval']}" * is_wide() + ".", 79)


def show_description(description: dict[str, Any], settings: Settings, steps: int, folder: Path) -> None:
    """A run's settings in a few lines: model, data, device, and which flags are not at their defaults."""
    total, trained, processes = (description[name] for name in ("parameters", "trainable_parameters", "processes"))
    say_list("model:", [settings.model, f"{total:,} parameters", f"trained {trained:,} ({trained / total:.2%})"])
    say(f"dataset: {settings.dataset}")
    say_list("rows:", rows_in_words(description["scoring"], SPLITS))
    say_list("device:", [description["device"], description["precision"],
                         f"{processes} process{'es' * (processes > 1)}"])
    say(f"training: {settings.epochs} epoch{'s' * (settings.epochs > 1)}, lr {as_power_of_ten(settings.lr)}, "
        f"batch {settings.batch_size}, seed {settings.seed}")
    usual = DEFAULTS | recipe_of(settings.model) | {"model": settings.model, "dataset": settings.dataset}
    usual["micro_batch_size"] = max(1, settings.batch_size // processes)
    changed = {"--" + name.replace("_", "-"): value for name, value in settings.configuration.items()
               if value != usual[name]}
    if changed:
        say_list("flags:", [flag if value is True else flag.replace("--", "--no-", 1) if value is False else
                            f"{flag} {' '.join(value) if isinstance(value, list) else value}"
                            for flag, value in changed.items()])
    say(f"steps: {steps}", f"run: {folder}", "")


def run_name(settings: Settings) -> str:
    """For example flan-t5-xl-samsum-lr=1e-4."""
    return f"{base_name(settings)}-{Path(settings.dataset).stem}-lr={as_power_of_ten(settings.lr)}"


def base_name(settings: Settings) -> str:
    return Path(MODELS.get(settings.model, settings.model)).name


def as_power_of_ten(value: float) -> str:
    """1e-4 for 0.0001: as people write learning rates."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def refuse_used_folder(settings: Settings) -> None:
    """UserError, before any work, if --output-dir is given for a new run and is a file or not empty."""
    folder = None if settings.resume or settings.mode not in ("train", "lr_find") else settings.output_dir
    try:
        if folder and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
            resume = "--resume, or " * (settings.mode == "train" and folder.is_dir())
            raise UserError(f"{folder} is {'a file' if folder.is_file() else 'not empty'}: {resume}choose another "
                            "--output-dir")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def new_run_folder(settings: Settings, name: str) -> Path:
    """Makes the folder of a new run, runs/<name> or --output-dir, never an existing one; all processes get the same."""
    wanted = settings.output_dir or Path("runs") / name

    def make() -> Path:
        refuse_used_folder(settings)  # somebody may have filled it since the start
        try:
            for n in itertools.count(1):
                folder = wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}")
                with contextlib.suppress(*([] if settings.output_dir else [FileExistsError])):
                    folder.mkdir(parents=True, exist_ok=settings.output_dir is not None)
                    return folder
        except OSError as error:
            raise UserError(f"cannot write to {wanted}: {error.strerror}") from None

    return from_main_process(make)


def check_resumable(folder: Path, description: dict[str, Any], settings: Settings, steps: int,
                    checkpoint: Path | None) -> None:
    """UserError unless the data is that which the run began with. Says what another --max-steps does."""
    began = read_metrics(folder)
    if began.get("data") != description["data"]:
        raise UserError(f"the rows of {settings.dataset} or their tokens are not those that {folder} began with: "
                        "bring them back, or start a new run")
    before = began["optimizer"]["steps"]
    if before != steps and checkpoint:
        step = step_of(checkpoint)
        if steps < step:
            raise UserError(f"--max-steps {steps}: {folder} has already taken {step}")
        rates = [as_power_of_ten(float(f"{settings.lr * learning_rate_factor(step, n):.3g}")) for n in (before, steps)]
        say(f"{steps} steps in place of {before}: the learning rate at step {step} is {rates[1]}, not {rates[0]}")


class Run(TrainerCallback):
    """The one owner of a run's folder, state and report: metrics.json, metrics.jsonl, TensorBoard, plots, predictions,
    the progress bar and the table. All but examples is made from the Trainer's log, which the checkpoints carry."""

    def __init__(self, settings: Settings, folder: Path, description: dict[str, Any]) -> None:
        self.settings, self.folder, self.description = settings, folder, description
        self.stop = StopSignal(signal.SIGINT, signal.SIGTERM)
        self.is_slow = True  # whether a step takes over a second, in all processes alike; unknown before the first log
        self.saved_at = self.last_line = time.monotonic()
        self.bar = self.board = None
        self.header_shown = False
        self.drawn = (0, 0)  # how many losses and evaluations the plots show

    def begin(self, checkpoint: Path | None) -> None:
        """From now on the folder counts as a run. What an earlier try logged after `checkpoint` is taken back."""
        if not is_main_process():
            return
        remove_incomplete(self.folder)
        log = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["log_history"] if checkpoint else []
        # TensorBoard's thread prints a traceback when the disk is full; the same error then comes in ours as well.
        is_tensorboard = lambda thread: type(thread).__module__.startswith("tensorboard.")
        threading.excepthook = lambda hook: is_tensorboard(hook.thread) or threading.__excepthook__(hook)
        first_step = step_of(checkpoint) + 1 if checkpoint else 0
        try:
            self.write(log, "running")
            write_jsonl(self.folder / "metrics.jsonl", log)
            self.board = SummaryWriter(self.folder, purge_step=first_step if self.settings.resume else None)
        except OSError:
            if not self.settings.resume:
                shutil.rmtree(self.folder)
            raise

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if is_main_process():
            self.bar = new_bar(state.max_steps, "", "step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stops and saves. Processes do so together; while steps are short, they compare notes only when the loss is
        logged, which waits for the GPU anyway."""
        if self.bar is not None:
            self.bar.update()
        if args.world_size == 1 or self.is_slow or state.global_step % args.logging_steps == 0:
            is_due = time.monotonic() - self.saved_at > SAVE_SECONDS
            (is_due,) = self.stop.agreed(args.device, is_due)
            control.should_training_stop |= self.stop.is_set
            if is_due or self.stop.is_set:
                control.should_save = control.should_log = True  # so that no mean spans a checkpoint

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.board is None:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(state.log_history[-1], ensure_ascii=False) + "\n")
        scalars = {f"train/{name}": logs.get(name) for name in (
            "loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second", "peak_memory_gib")}
        scalars["train/mfu"] = self.mfu(logs["samples_per_second"]) if "samples_per_second" in logs else None
        scalars |= {f"{split}/{kind}": logs[split][kind] for split in ("validation", "test") if split in logs
                    for kind in ROUGE_TYPES}
        for tag, value in scalars.items():
            if value is not None:
                self.board.add_scalar(tag, value, state.global_step)
        if "loss" in logs:
            now = f"loss {logs['loss']:.4f}  {logs['samples_per_second']:.1f} rows/s"
            self.bar.set_description_str(now)
            if self.bar.disable and time.monotonic() - self.last_line > 10:  # in a log file: a line now and then
                self.last_line = time.monotonic()
                self.show(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  "
                          f"lr {logs['learning_rate']:.2e}  {now}")

    def mfu(self, rows_per_second: float) -> float | None:
        """Model FLOPs utilisation, of what the card's maker promises; None for a card that is not in the table."""
        rate = self.description["data_sheet_flops_per_second"]
        return rate and self.description["flops_per_row"] * rows_per_second / (rate * self.description["processes"])

    def report_skipped(self, trainer: SummarizationTrainer, step: int, loss: float, in_a_row: int) -> None:
        """Names a step that changed nothing, because its loss or gradient was not finite, and its rows; ends the run
        after too many of them."""
        size, ids = self.settings.batch_size, trainer.data["train"]["id"]
        epoch, place = divmod(step, math.ceil(len(ids) / size))
        rows = [ids[i] for i in trainer.sampler.order(epoch)[place * size : (place + 1) * size] if i < len(ids)]
        problem = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
        self.show(f"step {step + 1} is skipped: its {problem}; its rows: {', '.join(rows)}")
        if in_a_row >= MAX_SKIPPED:
            last = checkpoints(self.folder)
            raise UserError(f"{in_a_row} steps in a row had no finite loss and gradient, up to step {step + 1}: try a "
                            f"lower --lr; the last good checkpoint is {last[-1] if last else 'none'}")

    def show(self, text: str) -> None:
        """Prints beside the progress bar. If nobody reads it any more, that counts as a signal."""
        if self.bar is not None:
            try:
                self.bar.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:
                self.stop.note()

    def on_scored(self, state: Any, examples: dict[str, list[dict[str, Any]]]) -> None:
        """Called after an evaluation: predictions, report and table; the checkpoint learns that it has been scored."""
        if not is_main_process():
            return
        epoch = self.epochs(state.log_history)[-1] | {"best": False}  # known only when the run is over
        for split, rows in examples.items():
            write_jsonl(predictions_file(self.folder, split, epoch["epoch"]), rows)
        self.write(state.log_history, "running")
        gc.collect()  # the objects of a plot hold one another; left alone they would pile up, megabytes an epoch
        checkpoint = self.folder / "checkpoints" / f"step-{state.global_step:08d}" / "trainer_state.json"
        if checkpoint.exists():
            change_json(checkpoint, log_history=state.log_history)
        text = "\n\n---\n\n".join(
            f"**{row['id']}**\n\n{textwrap.indent(row['dialogue'], '    ')}\n\n**reference:** {row['reference']}\n\n"
            f"**prediction:** {row['prediction']}" for row in examples["validation"][:5])
        self.board.add_text("validation/examples", text, state.global_step)
        self.board.flush()
        lines = score_table([epoch]).splitlines()
        self.show("\n".join(lines[2:] if self.header_shown else lines))
        self.header_shown = True

    def epochs(self, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One dictionary per evaluation: epoch, step, mean training loss since the last one, scores of both splits."""
        result, losses, counts, last = [], [], [], 0  # a logged loss is the mean of the steps since the one before
        for line in log:
            if "loss" in line or "skipped_steps" in line:  # without a loss if all steps were skipped
                losses.append(line.get("loss", 0.0))
                counts.append(line["step"] - last - line.get("skipped_steps", 0))
                last = line["step"]
            elif "validation" in line:
                result.append({"epoch": epoch_number(line.get("epoch")), "step": line["step"],
                               "train_loss": float(np.average(losses, weights=counts)) if any(counts) else None,
                               "validation": line["validation"], "test": line["test"], "seconds": line["seconds"],
                               "fast": line.get("fast")})
                losses, counts = [], []
        best = max(result, key=lambda e: e["validation"]["rouge1"], default=None)  # the first of equals
        return [epoch | {"best": epoch is best} for epoch in result]

    def results(self, log: list[dict[str, Any]]) -> dict[str, Any]:
        """What has come out so far, for metrics.json."""
        curve, epochs = [line for line in log if "loss" in line], self.epochs(log)
        seconds = sum(line["seconds"] for line in curve)
        mean = lambda name: round(sum(e[name] * e["seconds"] for e in curve) / seconds, 2) if seconds else None
        best = next((epoch for epoch in epochs if epoch["best"]), None)
        return {
            "steps": curve[-1]["step"] if curve else 0, "epochs": round(curve[-1]["epoch"], 4) if curve else 0,
            "skipped_steps": sum(line.get("skipped_steps", 0) for line in log),
            "training_seconds": round(seconds, 3),
            "evaluation_seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
            "samples_per_second": mean("samples_per_second"), "tokens_per_second": mean("tokens_per_second"),
            "mfu": self.mfu(mean("samples_per_second") or 0) or None,
            "peak_memory_gib": max((line["peak_memory_gib"] for line in curve), default=None),
            "best_epoch": best and best["epoch"], "best_step": best and best["step"],
            **{f"{split}_{kind}": best and best[split][kind] for split in ("validation", "test")
               for kind in ROUGE_TYPES},
        }

    def write(self, log: list[dict[str, Any]], status: str) -> dict[str, Any]:
        """Writes metrics.json and the plots; returns what it holds."""
        curve, epochs = [line for line in log if "loss" in line], self.epochs(log)
        metrics = {"status": status, **self.description, "results": self.results(log),
                   "examples": self.before_and_after(epochs), "epochs": epochs, "curve": curve}
        write_json(self.folder / "metrics.json", metrics)
        if self.drawn != (len(curve), len(epochs)):
            if curve:
                plot_loss(curve, self.folder / "training_loss.png", self.folder.name)
            if epochs:
                plot_rouge(epochs, self.folder / "rouge.png", self.folder.name)
            self.drawn = (len(curve), len(epochs))
        return metrics

    def before_and_after(self, epochs: list[dict[str, Any]], count: int = 2) -> list[dict[str, str]]:
        """Held-out dialogues with what the model said before training and in the best epoch."""
        names = [epochs[0]["epoch"], next(e["epoch"] for e in epochs if e["best"])] if epochs else []
        files = [predictions_file(self.folder, "test", epoch) for epoch in names]
        if len(epochs) < 2 or not all(file.is_file() for file in files):
            return []
        before, after = ([row for _, row in read_json_lines(file, decode(file))[:count]] for file in files)
        return [{"id": a["id"], "dialogue": a["dialogue"], "reference": a["reference"], "before": a["prediction"],
                 "after": b["prediction"]} for a, b in zip(before, after, strict=True)]

    def finish(self, log: list[dict[str, Any]], status: str) -> None:
        """Writes everything once more, in its last state, and says what there is and how to use it."""
        if self.bar is not None:
            self.bar.close()
        remove_incomplete(self.folder)  # room, if the disk is full
        metrics = self.write(log, status)
        epochs, results = metrics["epochs"], metrics["results"]
        with self.board:  # closed even if nobody reads what is printed
            if epochs:
                self.report_scores(metrics)
        if results["skipped_steps"]:
            say("", f"{results['skipped_steps']} step(s) were skipped: their loss or gradient was not finite")
        if epochs and (status == "finished" or (status == "interrupted" and results["best_step"])):
            say("", f"{result_name(self.settings) + '/':18} best epoch on validation ({results['best_epoch']:g})",
                "predictions/       every evaluation, row by row",
                "metrics.json       configuration, versions, scores, speed", "training_loss.png  rouge.png",
                f"all in {self.folder}", "",
                *[f"use it:    {this_script()} --summarize --adapter {shlex.quote(str(self.folder))}"][
                    : results["best_step"]],
                f"watch it:  tensorboard --logdir {shlex.quote(str(self.folder.parent))}")
            say_if_toy(self.settings, self.description["parameters"])

    def report_scores(self, metrics: dict[str, Any]) -> None:
        """The table of several epochs, and two held-out dialogues before and after, which also go to TensorBoard."""
        epochs, results = metrics["epochs"], metrics["results"]
        values = {key: str(value) for key, value in self.settings.configuration.items()} | {"lr": self.settings.lr}
        scores = {f"{split}/best_rouge1": results[f"{split}_rouge1"] for split in ("validation", "test")}
        self.board.add_hparams(values, scores, run_name=".")
        examples = [in_words(example) for example in metrics["examples"]]
        self.board.add_text("test/before_and_after", "\n\n".join(textwrap.indent(text, "    ") for text in examples),
                            results["best_step"])
        if len(epochs) > 2:  # of two, nothing but the best one's mark would be new
            say("", score_table(epochs))
        if len(epochs) > 1:
            say("", scoring_in_words(self.description["scoring"]))
            if results["best_step"] == 0:
                say("No epoch was better than the model before training:", "another --lr, or more --epochs?")
        for i, example in enumerate(examples, 1):
            say("", f"Held-out dialogue {i}:", textwrap.indent(example, "  "))


def in_words(example: dict[str, str]) -> str:
    fill = lambda label, text: textwrap.fill(f"{label} {text}", 76, subsequent_indent=" " * 11)
    lines = example["dialogue"].split("\n")
    shown = [textwrap.shorten(line, 76) for line in lines[:8]] + ["..."] * (len(lines) > 8)
    return "\n".join([*shown, fill("reference:", example["reference"]), fill("before:   ", example["before"]),
                      fill("after:    ", example["after"])])


def say_if_toy(settings: Settings, parameters: int, file: Any = None) -> None:
    if settings.model == "tiny":
        words = ["--model", "base"]
        for name in ("dataset", "source_column", "target_column") if settings.dataset != "sample" else ():
            if (value := getattr(settings, name)) is not None:
                words += ["--" + name.replace("_", "-"), str(value)]
        size = f"{parameters / 1e6:.2g} million parameters"
        say(f"A toy ({size}). On a GPU: {this_script()} {shlex.join(words)}", file=file)


def epoch_number(epoch: float | None) -> float | int:
    """As files are named: 0, 1, 2, or, where --max-steps ended a run, 1.333333. Never that of another evaluation, in
    epochs of up to a million steps."""
    epoch = round(epoch or 0, 6)
    return int(epoch) if epoch == int(epoch) else epoch


def predictions_file(folder: Path, split: str, epoch: float | int) -> Path:
    return folder / "predictions" / f"{split}-epoch-{epoch:.9g}.jsonl"


def score_table(epochs: list[dict[str, Any]]) -> str:
    """Two rows per epoch. All cells have a width of their own, so that rows fit under those that came before."""
    rows = []
    for epoch in epochs:
        name = f"{epoch['epoch']:.{0 if isinstance(epoch['epoch'], int) else 2}f}" + " (best)" * epoch["best"]
        loss = "" if epoch["train_loss"] is None else f"{epoch['train_loss']:.4f}"
        rows += [[name, loss, split, *score_cells(epoch[split])] for split in ("validation", "test")]
    return table([f"{'epoch':11}", f"{'loss':6}", f"{'split':10}", *score_names()], rows, text=(2,))


def score_names() -> list[str]:
    return [f"{name:{20 if is_wide() else 0}}" for name in ROUGE_TYPES.values()]


def score_cells(scores: Scores) -> list[str]:
    """The scores in the order of `ROUGE_TYPES`; where there is room, each with its 95% interval."""
    intervals = {kind: " {:>14}".format("[{:.1f}, {:.1f}]".format(*scores[kind + "_interval"])) if is_wide() else ""
                 for kind in ROUGE_TYPES}
    return [f"{scores[kind]:5.2f}{intervals[kind]}" for kind in ROUGE_TYPES]


def out_of_memory_advice(settings: Settings) -> str:
    """What makes room, in flags that are accepted in place of those given."""
    share = settings.batch_size // int(os.environ.get("WORLD_SIZE", 1))
    smaller = [n for n in range(1, settings.micro_batch_size) if share % n == 0]
    is_training, is_export = settings.mode not in USES, settings.mode == "export"
    is_free = not settings.resume  # which keeps what is computed, and so all but FREE_ON_RESUME
    can_quantise = is_free and not (is_export or settings.full or is_sharded())
    flags = {
        f"--micro-batch-size {max(smaller, default=1)}": is_training and smaller,
        "--gradient-checkpointing": is_training and not settings.gradient_checkpointing,
        "no --full": is_free and is_training and settings.full,
        "--int8": can_quantise and not settings.quantization,
        "--int4": can_quantise and not settings.int4,
        "--num-beams 1": is_free and settings.num_beams > 1,
        f"--max-source-length {settings.max_source_length // 2}":
            is_free and settings.max_source_length >= 16 and not is_export,
        "the CPU (CUDA_VISIBLE_DEVICES= in front of the command)": is_export,
        f"a {'new run of a ' * settings.resume}smaller --model": is_training,
    }
    remedies = [flag for flag, helps in flags.items() if helps]
    if is_free and settings.mode == "train" and settings.output_dir and any(settings.output_dir.glob("*")):
        remedies[-1] += "; and another --output-dir"
    return f"out of memory: try {', '.join(remedies or ['a smaller model'])}"


# ---------- 11. Plots -------------------------------------------------------------------------------------------------

LOSS_AXES = {"xlabel": "optimiser step", "ylabel": "training loss (nats per token)"}


@contextlib.contextmanager
def new_plot(path: Path, columns: int = 1, **labels: Any) -> Iterator[Any]:
    """Axes to draw on; when that is done they get labels, a grid and a legend beside them, and go to `path`."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")  # not of pyplot, which would keep it
    axes = figure.subplots(1, columns, sharey=True)
    yield axes
    figure.axes[0].set(**labels)
    for one in figure.axes:
        one.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    replace_file(path, picture.getvalue())


def smallest_loss(curve: list[dict[str, Any]], name: str) -> int:
    """Index of the smallest finite training loss of the run `name`; UserError if none is finite."""
    finite = [i for i, line in enumerate(curve) if math.isfinite(line["loss"])]
    if not finite:
        raise UserError(f"{name}: no logged training loss is finite, so there is nothing to plot")
    return min(finite, key=lambda i: curve[i]["loss"])


def smoothed(values: Iterable[float], reach: int = 3) -> list[float]:
    """The mean of the values at most `reach` places away: unlike an exponential mean it does not lag behind."""
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def around(curve: list[dict[str, Any]], place: int, reach: int = 40) -> list[dict[str, Any]]:
    return curve[max(0, place - reach) : place + reach + 1]


def common_limits(curves: list[list[dict[str, Any]]], **axes: str) -> dict[str, tuple[float, float]]:
    """{"ylim": (low, high)} for ylim="loss": one scale for several plots, if there are several; 5% more at each end."""
    limits = {}
    for axis, name in axes.items() if len(curves) > 1 else ():
        values = [line[name] for curve in curves for line in curve if math.isfinite(line[name])]
        margin = 0.05 * (max(values) - min(values))
        limits[axis] = (min(values) - margin, max(values) + margin)
    return limits


def plot_loss(curve: list[dict[str, Any]], path: Path, title: str, **limits: Any) -> None:
    """Raw and smoothed training loss over steps; the smallest raw value is marked with its step and learning rate."""
    steps, losses = [e["step"] for e in curve], [e["loss"] for e in curve]
    low = smallest_loss(curve, title)
    rate = curve[low]["learning_rate"]
    label = f"smallest: {losses[low]:.4f}\nat step {steps[low]}" + (f",\nlr {rate:.2e}" if rate is not None else "")
    highest, is_long = max(loss for loss in losses if math.isfinite(loss)), len(losses) >= 50
    if "ylim" not in limits and 0 < 4 * losses[low] < highest:
        limits["yscale"] = "log"  # on a linear one such a fall would flatten all that follows
    with new_plot(path, title=title, **LOSS_AXES, **limits) as axes:
        axes.plot(steps, losses, color="tab:blue", alpha=0.35 if is_long else 1, label="as logged")
        if is_long:
            axes.plot(steps, smoothed(losses, reach=len(losses) // 40), color="tab:blue", label="smoothed")
        axes.plot(steps[low], losses[low], "o", color="tab:red", label=label)


def plot_smallest(curve: list[dict[str, Any]], low: int, path: Path, title: str, **limits: Any) -> None:
    """The neighbourhood of the smallest loss, with the learning rate there."""
    near, point = around(curve, low), curve[low]
    steps = [e["step"] for e in near]
    with new_plot(path, title=title, **LOSS_AXES, **limits) as axes:
        axes.plot(steps, [e["loss"] for e in near], marker=".", color="tab:blue", label="training loss, as logged")
        axes.plot(point["step"], point["loss"], "o", color="tab:red",
                  label=f"smallest: {point['loss']:.4f}\nat step {point['step']}")
        if point["learning_rate"] is not None:
            right = axes.twinx()
            right.plot(steps, [e["learning_rate"] for e in near], color="tab:orange")
            right.plot(point["step"], point["learning_rate"], "o", color="tab:orange")
            right.set_ylabel(f"learning rate (there {point['learning_rate']:.2e})", color="tab:orange")


def plot_range_test(rates: list[float], losses: list[float], best: float, default: float, path: Path, title: str
                    ) -> None:
    with new_plot(path, title=title, **LOSS_AXES | {"xlabel": "learning rate"}) as axes:
        axes.plot(rates, losses, color="tab:blue", alpha=0.35, label="every step")
        axes.plot(rates, smoothed(losses), color="tab:blue", label="smoothed")
        axes.axvline(best, color="tab:red", linestyle="--", label=f"suggested: {as_power_of_ten(best)}")
        axes.axvline(default, color="grey", linestyle=":", label=f"without it: {as_power_of_ten(default)}")
        axes.set_xscale("log")
        axes.set_ylim(top=min(max(losses), 1.5 * max(losses[:10])))  # a diverging end would flatten everything else


def plot_rouge(epochs: list[dict[str, Any]], path: Path, title: str) -> None:
    """Both splits after each epoch, ROUGE-1 with its 95% interval; the chosen epoch is marked."""
    x, best = [e["epoch"] for e in epochs], next(e["epoch"] for e in epochs if e["best"])
    low, high = np.array([e["test"]["rouge1_interval"] for e in epochs]).T
    with new_plot(path, title=title, xlabel="epoch", ylabel="ROUGE F1 (%)") as axes:
        for split, style in (("validation", "--"), ("test", "-")):
            for i, (kind, label) in enumerate(ROUGE_TYPES.items()):
                scores = [e[split][kind] for e in epochs]
                axes.plot(x, scores, style, marker=".", color=f"C{i}", label=f"{label}, {split}")
        axes.fill_between(x, low, high, color="C0", alpha=0.15, label="95% interval, ROUGE-1, test")
        axes.axvline(best, color="grey", linestyle=":", label=f"best on validation: epoch {best:g}")
        axes.xaxis.get_major_locator().set_params(integer=True)


def plot_comparison(runs: list[dict[str, Any]], path: Path) -> None:
    """Left: test ROUGE-1 after each epoch. Right: that of the chosen epoch, with its 95% interval."""
    with new_plot(path, columns=2, xlabel="epoch", ylabel="ROUGE-1 F1 on test (%)",
                  title="after each epoch (dot: chosen on validation)") as (left, right):
        for i, run in enumerate(runs):
            epochs, scores = zip(*((e["epoch"], e["test"]["rouge1"]) for e in run["epochs"]), strict=True)
            best, score = run["best"]["epoch"], run["best"]["test"]["rouge1"]
            left.plot(epochs, scores, ".-", color=f"C{i}", label=run["name"])
            left.plot(best, score, "o", color=f"C{i}")
            right.plot([i, i], run["best"]["test"]["rouge1_interval"], color=f"C{i}", linewidth=3)
            right.plot(i, score, "o", color=f"C{i}")
            right.annotate(f" {score:.2f}", (i, score))
        right.set(title="chosen epoch, 95% interval", xlim=(-0.5, len(runs) - 0.3))
        right.set_xticks(range(len(runs)), [run["name"].replace("-lr=", "\nlr=") for run in runs], fontsize="small")
        left.xaxis.get_major_locator().set_params(integer=True)


# ---------- 12. Use: base (quantised or not) + adapter, eval(), nothing else: no Trainer is built ---------------------


def load_for_use(settings: Settings) -> tuple[torch.nn.Module, Any, Summarizer]:
    """The model with --adapter on it (or bare, or a fully trained one), its tokenizer, and a Summarizer of both."""
    device, precision = get_device()
    name, adapter = settings.model, None
    if settings.adapter not in (None, "none"):
        given = Path(settings.adapter)
        adapter = next((given / name for name in ("adapter", "model") if (given / name).is_dir()), given)
        if not (adapter / "adapter_config.json").is_file():
            if not (adapter / "config.json").is_file():
                raise UserError(f"{settings.adapter} holds no adapter (no adapter_config.json)")
            name, adapter = str(adapter), None  # the whole model of a run with --full
    folder = find_on_disk("model", name, settings.cache_dir)
    tokenizer, _ = load_tokenizer_and_config(folder)
    # Merging into quantised weights would round: for --export the base is loaded anew in bf16.
    quantization = None if settings.export else settings.quantization
    model = load_base(folder, device, torch.float32 if settings.full else precision, quantization)
    if adapter:
        model = load_adapter(model, adapter)
    say(f"model: {name}" + (f", adapter: {adapter}" if adapter else ""), *how_good(settings), file=sys.stderr)
    fast = None if settings.export else make_fast(model, settings)
    return model, tokenizer, Summarizer(model, tokenizer, settings, device, precision, fast)


def how_good(settings: Settings) -> list[str]:
    """A line about the run that is used, if it is one: the newest may have been a trial of a few steps."""
    run = Path(settings.adapter or "none")
    epochs = read_metrics(run).get("epochs", []) if (run / "metrics.json").is_file() else []
    best = next((epoch for epoch in epochs if epoch["best"]), None)
    return [f"trained: {best['step']} steps, test ROUGE-1 {best['test']['rouge1']:.2f}"] if best else []


def read_dialogues(name: str, column: str | None = None) -> Iterator[str]:
    """Dialogues from a file, standard input ("-"), or a terminal: blank lines separate them; or JSONL."""
    if name == "-" and sys.stdin.isatty():
        print("Type or paste a dialogue, a line per message (Anna: hi!).\nAn empty line ends it, Ctrl-D leaves.",
              file=sys.stderr)
        yield from split_at_blank_lines(sys.stdin)
        return
    path = Path("standard input" if name == "-" else name)
    if path.suffix in SUFFIXES and path.suffix != ".jsonl":
        raise UserError(f"{path}: --summarize reads text and .jsonl")
    text = decode(path, sys.stdin.buffer.read() if name == "-" else None)
    if path.suffix == ".jsonl" or (name == "-" and text.lstrip().startswith('{"')):
        rows = read_json_lines(path, text)
        present = list(dict.fromkeys(key for _, row in rows if isinstance(row, dict) for key in row))
        column = find_column(present, "source", column)
        for i, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column].strip():
                raise UserError(f"{path}:{i}: no text in {column}")
            yield normalize_newlines(row[column])  # as in training
    else:
        yield from split_at_blank_lines(normalize_newlines(text).split("\n"))


def split_at_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines that are not blank, joined; each as soon as it has ended. Nothing is read behind the end."""
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line.strip())
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def summarize(settings: Settings) -> int:
    """Prints one summary per dialogue, in order, each on its own line; everything else goes to standard error."""
    dialogues = read_dialogues(settings.summarize, settings.source_column)
    if settings.summarize == "-" and sys.stdin.isatty():  # they come, and are answered, one by one
        groups = ([dialogue] for dialogue in dialogues)
    else:
        groups = [list(dialogues)]
        if not groups[0]:
            name = "standard input" if settings.summarize == "-" else settings.summarize
            raise UserError(f"{name} holds no dialogue")
    model, tokenizer, summarizer = load_for_use(settings)
    say_if_toy(settings, model.num_parameters(), file=sys.stderr)
    done = 0
    with merged_adapter(model):
        for group in groups:
            sources, cut = encode(tokenizer, [PREFIX + dialogue for dialogue in group], settings.max_source_length)
            for i in np.flatnonzero(cut):
                say(f"dialogue {done + i + 1}: cut to {settings.max_source_length} tokens (--max-source-length)",
                    file=sys.stderr)
            for i, dialogue in enumerate(group if (settings.model, settings.dataset) == ("tiny", "sample") else ()):
                if not re.search(r"^[^\n:]{1,40}: ", dialogue, re.MULTILINE):
                    say(f"note: dialogue {done + i + 1} has no line like 'Anna: hi!', which is all that the toy knows",
                        file=sys.stderr)
            for summary in summarizer(sources):
                done += 1
                say(f"{done}. " * (sys.stdout.isatty() and len(group) > 1) + " ".join(summary.split()))
    return 0


def evaluate_split(settings: Settings) -> int:
    """Scores the model on --split with the function, settings, rows and, if it runs here and for so few rows, the path
    of the training."""
    data = load_data(settings)
    model, tokenizer, summarizer = load_for_use(settings)
    rows = tokenize(datasets.DatasetDict({settings.split: data[settings.split]}), tokenizer, settings)
    with merged_adapter(model):
        scores, _ = score(summarizer, rows[settings.split])
    say(table(["split", *score_names()], [[settings.split, *score_cells(scores)]]), "",
        scoring_in_words(describe_scoring(settings, rows)))
    return 0


def export(settings: Settings) -> int:
    """Writes base + adapter as one bf16 model that `AutoModelForSeq2SeqLM.from_pretrained` loads."""
    folder = settings.export
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder} exists and is not empty: choose another folder")
    if not folder.name:  # the folder comes by renaming, which would take the current one away
        raise UserError(f"--export {folder}: choose a folder with a name")
    model, tokenizer, _ = load_for_use(settings)
    if not is_main_process():
        return 0
    if isinstance(model, PeftModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the embeddings are no longer tied: they never were
            model = model.merge_and_unload(safe_merge=True)
    with writing_to(folder.parent), new_folder(folder) as temporary:
        save_model(model.to(torch.bfloat16), tokenizer, temporary, settings)
    say(f"exported: AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r}) loads it")
    return 0


# ---------- 13. Experiments: what will it cost (--plan), which rate (--lr-find), which run is better (--compare) ------

# d_model, d_ff, layers (of encoder and of decoder each), heads: T5 v1.1, the architecture of Flan-T5. All other numbers
# are the same for all sizes. Source: the config.json of google/flan-t5-*.
T5_SIZES = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16),
            "xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}
PRECISION_NAMES = {"fp32": "fp32", "bf16": "bf16", "int8": "INT8", "int4": "NF4"}
GIB = 2**30
GPU_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GiB of the usual cards
GPU_RESERVE = 1.5  # GiB that are not ours: the CUDA context, and what the allocator cannot use


def geometry(settings: Settings) -> transformers.T5Config:
    """The configuration of --model, known for the presets, else from its config.json; no weights are downloaded."""
    if settings.model not in T5_SIZES:
        return load_tokenizer_and_config(find_on_disk("model", settings.model, settings.cache_dir, weights=False))[1]
    d_model, d_ff, layers, heads = T5_SIZES[settings.model]
    return transformers.T5Config(
        vocab_size=32128, d_model=d_model, d_kv=64, d_ff=d_ff, num_layers=layers, num_decoder_layers=layers,
        num_heads=heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)


def is_tied(config: transformers.T5Config) -> bool:
    """Whether the head is the embedding, as in T5 1.0. transformers calls every T5 tied, and keeps what the config said
    in another place, which mT5 lacks: that never is."""
    return config.model_type != "mt5" and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)


def without_weights(config: transformers.T5Config) -> transformers.PreTrainedModel:
    """The model of a configuration on the meta device: shapes, and no memory."""
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    if not is_tied(config):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def weight_bytes(model: torch.nn.Module, precision: str) -> int:
    """Bytes of the frozen weights of `model` (on the meta device, without adapter) as they load in `precision`.

    bitsandbytes quantises linear layers, but not the head, and transformers keeps T5's `wo`, over a sixth of all
    weights, out of it (`_keep_in_fp32_modules`); these and the embeddings stay in bf16. INT8 has one fp32 scale per
    output row (Dettmers et al. 2022), NF4 half a byte per weight and an fp32 scale per 64 (Dettmers et al. 2023).
    """
    total = 0
    for name, parameter in model.named_parameters():  # the embedding that encoder and decoder share comes once
        layer = name.removesuffix(".weight")  # T5 has no biases
        is_linear = isinstance(model.get_submodule(layer), torch.nn.Linear)
        quantised = is_linear and layer.rpartition(".")[2] not in ("wo", "lm_head")
        if quantised and precision == "int8":
            total += parameter.numel() + 4 * len(parameter)
        elif quantised and precision == "int4":
            total += parameter.numel() // 2 + 4 * math.ceil(parameter.numel() / 64)
        else:
            total += parameter.numel() * (4 if precision == "fp32" else 2)
    return total


def activation_bytes(config: transformers.T5Config, rank: int, batch: int, source: int, target: int,
                     checkpointing: bool = False) -> int:
    """Bytes that forward keeps for backward in the usual step of LoRA on q, k, v, o in bf16, and the loss's own.

    `batch` rows of `source` and `target` tokens, as padded. Counted from the operations of transformers' T5 with SDPA
    and of PEFT: a frozen layer keeps nothing but what its adapter needs, GELU's pow runs in fp32 and makes its
    neighbours fp32, dropout keeps a byte per number. Rows are taken to be padded: then every layer adds the mask to the
    position bias anew and keeps the sum. With checkpointing, a layer's input, and one layer at a time.
    """
    width, inner, heads = config.d_model, config.num_heads * config.d_kv, config.num_heads
    norm = (4 + 2) * width  # its input in fp32 (squared) and in bf16 (scaled)
    adapter = lambda features: 3 * features + 2 * rank  # dropout's mask and output, and B's input
    attention = 2 * 4 * inner + 4 * heads + adapter(inner) + width  # q, k, v, output, log-sum-exp; last dropout
    self_attention = norm + 3 * adapter(width) + attention
    # ReLU keeps its output in bf16, and dropout its mask.
    feed_forward = norm + (21 if config.is_gated_act else 3) * config.d_ff + width
    encoder_layer = batch * source * (self_attention + feed_forward) + 2 * batch * heads * source * source
    decoder_layer = batch * target * (self_attention + norm + adapter(width) + attention - 4 * inner + feed_forward)
    decoder_layer += batch * source * (2 * adapter(width) + 4 * inner)  # keys and values of the encoder's output
    decoder_layer += 2 * heads * target * (target + batch * source)  # the causal mask is the same for all rows
    # Logits in bf16 and fp32, their softmax, and the gradients of both when backward begins.
    loss = batch * target * config.vocab_size * (2 + 4 + 4 + 4)
    if checkpointing:
        inputs = 2 * width * batch * (config.num_layers * source + config.num_decoder_layers * target)
        biases = 2 * heads * (source * source + target * target + target * source)
        return inputs + biases + max(loss, encoder_layer, decoder_layer)
    return config.num_layers * encoder_layer + config.num_decoder_layers * decoder_layer + loss


def fast_activation_bytes(config: transformers.T5Config, rank: int, source: int, target: int,
                          checkpointing: bool = False) -> int:
    """The same of the fast step (section 14), for so many tokens in all: what its functions keep, once compiled.

    A block keeps what goes into its products and its attention, in bf16; norms, GELU and dropout are computed again.
    """
    width, inner, heads = config.d_model, config.num_heads * config.d_kv, config.num_heads
    feed_forward = 2 * (width + 2 * config.d_ff) + 4  # its input, both halves of `wi`, the root of the norm
    # Queries, what comes out, input before and after the norm (LoRA's kernel reads that); log-sum-exp, the norm's root.
    attention = 2 * (2 * inner + 2 * width) + 4 * heads + 4
    in_layer = source * (attention + 2 * 2 * inner + 4 * 2 * rank + feed_forward)
    in_decoder_layer = target * (2 * attention + 2 * 2 * inner + 6 * 2 * rank + feed_forward)
    in_decoder_layer += source * 2 * (2 * inner + 2 * rank)  # keys and values of the encoder's output
    loss = target * config.vocab_size * (2 + 2 + 4)  # logits, their gradient, and softmax
    outputs = 2 * width * (2 * source + target)
    if checkpointing:
        inputs = 2 * width * (config.num_layers * source + config.num_decoder_layers * target)
        return inputs + outputs + max(loss, in_layer)  # a layer of the decoder keeps less than the loss
    return config.num_layers * in_layer + config.num_decoder_layers * in_decoder_layer + outputs + loss


def fast_extra_bytes(config: transformers.T5Config, rank: int, precision: str) -> int:
    """What else the fast step needs: LoRA's columns beside the frozen matrices, and working memory.

    The second is a tenth of a GiB by measurement, and for a moment the largest matrix as it is dequantised: that of the
    feed-forward layers, or q, k and v twice, as bitsandbytes returns NF4 and with LoRA's columns.
    """
    inner, width = config.num_heads * config.d_kv, config.d_model
    columns = lambda modules: 64 * math.ceil(modules * rank / 64)
    self_attention = 3 * inner * columns(3) + width * columns(1)
    cross_attention = (inner + width) * columns(1) + 2 * inner * columns(2)
    layers = config.num_layers * self_attention + config.num_decoder_layers * (self_attention + cross_attention)
    feed_forward, qkv = 2 * config.d_ff * width, 3 * inner * (width + columns(3))
    largest = {"bf16": 0, "int8": feed_forward, "int4": max(feed_forward, 2 * qkv)}[precision]
    return 2 * layers + GIB // 10 + 2 * largest


def plan(settings: Settings) -> int:
    """Prints what a run would need, from the geometry of the model and the lengths of the data; trains nothing."""
    config = geometry(settings)
    model = without_weights(config)
    weights = {name: weight_bytes(model, name) for name in PRECISION_NAMES}
    total = trained = model.num_parameters()
    if not settings.full:
        model = add_lora(model, settings)
        trained = model.get_nb_trainable_parameters()[0]
    say(f"{base_name(settings)}: {total:,} parameters, {trained:,} trained ({trained / total:.2%})")
    say_list("weights:", [f"{PRECISION_NAMES[name]} {size / GIB:.2f} GiB" for name, size in weights.items()])
    sources, targets, micro_steps = plan_data(settings)
    if settings.full or set(settings.lora_targets) != {"q", "k", "v", "o"}:
        say("peak memory is predicted for LoRA on q k v o only")
    elif config.feed_forward_proj not in ("gated-gelu", "relu"):
        say(f"peak memory is not known for {config.feed_forward_proj} layers, only for gated-gelu and relu")
    else:
        reason = why_not_fast(model, settings, micro_steps)
        if torch.cuda.is_available():  # else it is planned for another machine
            reason = reason or why_not_here(*get_device())
        is_fast = reason is None
        rows = plan_memory(settings, config, weights, trained, sources, targets, is_fast)
        source, target = longest_batch(sources, targets, settings.micro_batch_size, is_fast)
        say(f"longest batch: {settings.micro_batch_size} rows, {source:,} + {target:,} tokens", "",
            fold("predicted peak memory in GiB with the " + (
                "fast step (the usual one: --no-fast):" if is_fast else f"usual step ({reason}):")),
            table(["micro-batch", "checkpointing", *(PRECISION_NAMES[name] for name in rows[0][2])],
                  [[str(size), "yes" if checkpointing else "no", *(f"{peak:.2f}" for peak in peaks.values())]
                   for size, checkpointing, peaks in rows], text=()), "", *where_it_fits(rows, settings))
    return 0


def plan_data(settings: Settings) -> tuple[list[int], list[int], int | None]:
    """Prints steps, tokens and truncated rows; returns the lengths of sources and of targets, the longest first, and
    the number of micro-batches of one process, if known."""
    try:
        folder = find_on_disk("model", settings.model, settings.cache_dir, weights=False)
        train = tokenize(load_data(settings), load_tokenizer_and_config(folder)[0], settings)["train"]
    except UserError as error:
        say(fold(f"data: not counted, so the longest rows allowed are assumed: {error}"))
        size = settings.micro_batch_size
        return [settings.max_source_length] * size, [settings.max_target_length] * size, None
    sources, targets = (sorted(map(len, train[column]), reverse=True) for column in ("input_ids", "labels"))
    tokens, steps = sum(sources) + sum(targets), number_of_steps(settings, len(train))
    epochs = steps / math.ceil(len(train) / settings.batch_size)
    say(fold(f"data: {len(train):,} training rows, {tokens:,} tokens, {np.mean(train['truncated']):.1%} of the rows "
             f"truncated to {settings.max_source_length} tokens"),
        f"steps: {steps:,} of {settings.batch_size} rows, {epochs:.1f} epochs, about {epochs * tokens:,.0f} tokens")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return sources, targets, steps * settings.batch_size // (settings.micro_batch_size * processes)


def longest_batch(sources: list[int], targets: list[int], rows: int, is_fast: bool) -> tuple[int, int]:
    """Tokens of a micro-batch of the longest sources and targets: packed, or each padded to a multiple of 64."""
    return tuple(size_class(sum(lengths[:rows])) if is_fast else rows * 64 * math.ceil(lengths[0] / 64)
                 for lengths in (sources, targets))


def fast_bytes(config: transformers.T5Config, rank: int, precision: str, weights: int, trained: int, source: int,
               target: int, checkpointing: bool) -> int:
    """The most that a training with the fast step takes: in a step, or before the first one.

    Activations count once, as CUDA graphs share them. A trained number costs 18 bytes: itself, its gradient and AdamW's
    two moments in fp32, and itself in bf16.
    """
    extra = fast_extra_bytes(config, rank, precision)
    activations = fast_activation_bytes(config, rank, source, target, checkpointing)
    step = weights + 18 * trained + extra + activations
    # While q, k and v of all layers become one tensor, they are there twice: quantised ones are merged layer by layer.
    twice = config.num_layers * 2 * 3 * config.d_model * config.num_heads * config.d_kv * (precision == "bf16")
    merging = weights + 10 * trained + twice
    compared = max(activation_bytes(config, rank, 1, *tokens) for tokens in COMPARED)  # without checkpointing
    comparison = weights + 26 * trained + extra + compared
    return max(step, merging, comparison)


def plan_memory(settings: Settings, config: transformers.T5Config, weights: dict[str, int], trained: int,
                sources: list[int], targets: list[int], is_fast: bool) -> list[tuple[int, bool, dict[str, float]]]:
    """[(micro-batch, checkpointing, {precision: peak in GiB})], the fastest first.

    In the usual step a trained number costs 16 bytes: itself, its gradient and AdamW's two moments, in fp32.
    """
    no_bf16 = torch.cuda.is_available() and get_device()[1] == torch.float32
    sizes = [settings.micro_batch_size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    rows = []
    for checkpointing, size in itertools.product((False, True), sizes):
        source, target = longest_batch(sources, targets, size, is_fast)
        activations = activation_bytes(config, settings.lora_r, size, source // size, target // size, checkpointing)
        peaks = {name: (fast_bytes(config, settings.lora_r, name, weights[name], trained, source, target, checkpointing)
                        if is_fast else weights[name] + 16 * trained + activations) / GIB
                 for name in ("fp32" if no_bf16 else "bf16", "int8", "int4")}
        rows.append((size, checkpointing, peaks))
    return rows


def where_it_fits(rows: list[tuple[int, bool, dict[str, float]]], settings: Settings) -> list[str]:
    """Lines that say which flags, besides those given, make the run fit where, and whether INT8 helps."""
    given = settings.quantization

    def fitting_flags(memory: float) -> list[str] | None:
        """The fastest way to fit into `memory` GiB, or None. INT8 and NF4 cost most time, small micro-batches least."""
        for precision in [given] if given else rows[0][2]:
            for micro_batch, checkpointing, peaks in rows:
                if peaks[precision] + GPU_RESERVE <= memory and checkpointing >= settings.gradient_checkpointing:
                    return [*[f"--{precision}"] * (precision in WEIGHT_FLAGS and not given),
                            *[f"--micro-batch-size {micro_batch}"] * (micro_batch < rows[0][0]),
                            *["--gradient-checkpointing"] * (checkpointing and not settings.gradient_checkpointing)]
        return None

    lines, cards = [], {f"a GPU of {size} GiB": size for size in GPU_SIZES}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(get_device()[0]).total_memory / GIB
        cards = {f"this GPU ({device_name(get_device()[0])}, {memory:.0f} GiB)": memory}
    for name, memory in cards.items():
        flags = fitting_flags(memory)
        lines.append(f"on {name}: " + ("does not fit" if flags is None else " ".join(flags) or "fits as it is"))
        if flags == []:
            break
    plain, int8 = (next((size for size in GPU_SIZES if size >= least + GPU_RESERVE), None)
                   for least in list(rows[-1][2].values())[:2])  # in the smallest configuration
    if plain is not None and plain == int8 and given != "int4":
        lines.append(fold(f"INT8 does not help at this size: it is slower, and needs a GPU of {plain} GiB like bf16"))
    return lines


RANGE_TEST = np.geomspace(1e-6, 1, 100)  # the learning rates of --lr-find, one optimiser step each


class RangeTest(TrainerCallback):
    """Takes the place of a Run: notes the loss of every step, and ends when it diverges."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder, self.stop = settings, Path("."), StopSignal(signal.SIGINT, signal.SIGTERM)
        self.losses: list[float] = []
        self.description: dict[str, Any] = {}  # SummarizationTrainer may note something in it
        self.bar = new_bar(len(RANGE_TEST), "range test", "")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if "skipped_steps" in logs:
            self.losses.append(logs.get("loss", math.nan))
            self.bar.update()
            self.stop.agreed(args.device)
            control.should_training_stop |= self.stop.is_set or diverges(self.losses)

    def report_skipped(self, *_: Any) -> None:
        pass


def diverges(losses: list[float]) -> bool:
    """Whether the smoothed loss is twice its lowest, or the last one is no number."""
    smooth = smoothed(losses)
    return not math.isfinite(losses[-1]) or (len(losses) > 7 and smooth[-1] > 2 * min(smooth))


def lr_find(settings: Settings) -> int:
    """Learning-rate range test (Smith 2017, section 3.3) with the real model, data and batch.

    Every step has a larger rate, from 1e-6 to 1, until the loss diverges. Nothing of the model is kept.
    """
    device, precision = get_device()
    model, tokenizer, data = load_for_training(settings, device, precision)
    test = RangeTest(settings)
    factor = lambda step: RANGE_TEST[min(step, len(RANGE_TEST) - 1)] / settings.lr
    SummarizationTrainer(test, model, tokenizer, data, len(RANGE_TEST), device, precision, schedule=factor,
                         logging_steps=1, eval_strategy="no", eval_on_start=False).train()
    test.bar.close()
    if test.stop.is_set:
        say("interrupted: nothing is kept", file=sys.stderr)
        return 128 + test.stop.number
    rates, losses = RANGE_TEST[: len(test.losses)].tolist(), test.losses
    best = suggest_learning_rate(rates, losses)
    there = np.interp(math.log(settings.lr), np.log(rates), smoothed(losses), right=math.nan)  # nan: diverged before
    say(f"tried {len(rates)} learning rates, from {rates[0]:.1e} (loss {losses[0]:.3f}) to {rates[-1]:.1e} "
        f"(loss {losses[-1]:.3f})",
        f"suggested: {as_power_of_ten(best)}, a tenth of that with the smallest smoothed loss",
        f"without it: {as_power_of_ten(settings.lr)}, {settings.lr / best:.2g} times that, smoothed loss "
        f"{there:.3f}; the smallest is {np.nanmin(smoothed(losses)):.3f}",
        f"train: {this_script_again()} {shlex.join(with_rate(sys.argv[1:], best))}")
    folder = new_run_folder(settings, f"{base_name(settings)}-{Path(settings.dataset).stem}-lr-find")
    if is_main_process():
        plot_range_test(rates, losses, best, settings.lr, folder / "lr_find.png", folder.name)
        write_json(folder / "lr_find.json", {
            "configuration": settings.configuration, "suggestion": best, "learning_rates": rates,
            "losses": [loss if math.isfinite(loss) else None for loss in losses]})
    say(f"plot:  {folder / 'lr_find.png'}")
    return 0


def with_rate(words: list[str], rate: float) -> list[str]:
    """The user's own command line, as a training with this learning rate."""
    changed = ("--lr", "--output-dir")  # the folder is taken by the range test
    kept = [word for i, word in enumerate(words) if word not in ("--lr-find", *changed)
            and not word.startswith(tuple(f"{name}=" for name in changed)) and (not i or words[i - 1] not in changed)]
    return [*kept, "--lr", as_power_of_ten(rate)]


def suggest_learning_rate(rates: list[float], losses: list[float]) -> float:
    """A tenth of the rate with the smallest smoothed loss: where it still falls steeply, and far from divergence."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        raise UserError("the loss is not finite even at the smallest learning rate: are the model's weights whole?")
    return float(f"{rates[int(np.argmin(smoothed(finite)))] / 10:.1e}")


def plot(settings: Settings) -> int:
    """Draws the loss, and its smallest value, from the TensorBoard logs of any Trainer; several runs on one scale."""
    if settings.output_dir:
        refuse_twice([folder.resolve().name for folder in settings.plot], "two of the folders")
    runs = [(folder, *read_tensorboard(folder)) for folder in settings.plot]
    lows = [smallest_loss(curve, folder.resolve().name) for folder, curve, _ in runs]
    wide = common_limits([curve for _, curve, _ in runs], xlim="step", ylim="loss")
    near = common_limits([around(curve, low) for (_, curve, _), low in zip(runs, lows, strict=True)], ylim="loss")
    for (folder, curve, totals), low in zip(runs, lows, strict=True):
        name = folder.resolve().name
        place = settings.output_dir / name if settings.output_dir else folder
        plot_loss(curve, place / "training_loss.png", name, **wide)
        plot_smallest(curve, low, place / "smallest_training_loss.png", name, **near)
        point, last = curve[low], [line["loss"] for line in curve[-100:]]
        say(f"{name}: smallest training loss {point['loss']:.4f} at step {point['step']}"
            + (f", learning rate {point['learning_rate']:.2e}" if point["learning_rate"] is not None else ""),
            f"  mean of the last {len(last)} logged losses: {np.mean(last):.4f}")
        if totals:
            say(f"  {totals['train_samples_per_second']:.1f} samples/s, {totals['train_runtime'] / 3600:.1f} hours")
        say(f"  {place / 'training_loss.png'}", f"  {place / 'smallest_training_loss.png'}")
    return 0


def read_tensorboard(folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The training loss in the event files of a folder: [{"step", "loss", "learning_rate" (or None)}], by step.

    And what the Trainer logs at the end, if it does: {"train_samples_per_second", "train_runtime" (seconds)} or {}.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        raise UserError(f"--plot {folder}: there is no such folder")
    holders = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})
    found = []
    for holder in holders:
        events = EventAccumulator(str(holder), size_guidance={"scalars": 0}).Reload()
        scalars = {tag.removeprefix("train/"): events.Scalars(tag) for tag in events.Tags()["scalars"]}
        if "loss" in scalars:
            rates = {event.step: event.value for event in scalars.get("learning_rate", ())}
            curve = [{"step": event.step, "loss": event.value, "learning_rate": rates.get(event.step)}
                     for event in scalars["loss"]]
            totals = ("train_samples_per_second", "train_runtime")
            found.append((curve, {tag: scalars[tag][-1].value for tag in totals} if {*totals} <= {*scalars} else {}))
    if len(found) != 1:
        problem = f"{len(found)} runs" if found else "no train/loss in the event files" if holders else "no event files"
        raise UserError(f"--plot {folder}: {problem} in it; give the folder of one run")
    return found[0]


def compare(settings: Settings) -> int:
    """Tables and a picture of runs, and for each two of them a paired bootstrap over the test rows."""
    refuse_twice([folder.resolve().name for folder in settings.compare], "two of the folders")
    runs = [read_run(folder) for folder in settings.compare]
    check_comparable(runs)
    for run, name in zip(runs, without_common_start([run["name"] for run in runs]), strict=True):
        run["name"] = name  # so that the tables fit a terminal
    fast = [run["name"] for run in runs if run["best"].get("fast")]
    if len(fast) not in (0, len(runs)):
        say(fold(f"scored on the fast path, where rounding differs a little: only {', '.join(fast)}"))
    unfinished = {run["name"]: run.get("status", "unknown") for run in runs if run.get("status") != "finished"}
    say(*(f"{name} is not finished: {status}" for name, status in unfinished.items()),
        epoch_table(runs), "", run_table(runs), *different_settings(runs))
    pairs = [(a, b, *paired_bootstrap(a["rouge1"], b["rouge1"])) for i, a in enumerate(runs) for b in runs[i + 1 :]]
    if pairs:
        corrected = holm([p for *_, p in pairs])
        say("", f"ROUGE-1 on the same {len(runs[0]['rouge1'])} test rows, paired bootstrap with 10,000 samples:", "",
            table(["A", "B", "B - A", "95% interval", "p", "p (Holm)"],
                  [[a["name"], b["name"], f"{difference:+.2f}", f"[{low:+.2f}, {high:+.2f}]", f"{p:.4f}", f"{q:.4f}"]
                   for (a, b, difference, low, high, p), q in zip(pairs, corrected, strict=True)], text=(0, 1)), "",
            textwrap.fill("p is about these test rows: would others of their kind say the same? It is not about seeds: "
                          "the same settings with another --seed give another run. The last column corrects p for the "
                          f"number of pairs ({len(pairs)}).", 79))
    path = (settings.output_dir or settings.compare[0].resolve().parent) / "comparison.png"
    plot_comparison(runs, path)
    say("", f"plot: {path}")
    return 0


def read_run(folder: Path) -> dict[str, Any]:
    """metrics.json of a run, with its name and, of the best epoch, the rows of both splits and the test ROUGE-1."""
    metrics = read_metrics(folder)
    if is_of_gpt2(folder):
        raise UserError(f"{folder} was made by gpt2_from_scratch.py")
    best = next((epoch for epoch in metrics.get("epochs") or () if epoch.get("best")), None)
    if not best or not metrics.get("curve"):
        raise UserError(f"{folder} has no finished epoch yet")
    metrics |= {"name": folder.resolve().name, "best": best, "rows": {}}
    for split in ("validation", "test"):
        path = predictions_file(folder, split, metrics["best"]["epoch"])
        rows = [row for _, row in read_json_lines(path, path.read_text("utf-8"))]
        try:
            metrics["rows"][split] = [(row["id"], row["dialogue"], row["reference"]) for row in rows]
            metrics["rouge1"] = np.array([row["rouge1"] for row in rows])
        except (KeyError, TypeError):
            raise UserError(f"{path} is damaged: score the run again") from None
    return metrics


def without_common_start(names: list[str]) -> list[str]:
    """["flan-t5-xl-lr=1e-3", "flan-t5-xl-lr=1e-4"] -> ["lr=1e-3", "lr=1e-4"].

    Of each the same number of words, and never all. A word ends at a hyphen before a small letter: 1e-3 stays whole.
    """
    words = [re.split("-(?=[a-z])", name) for name in names]
    equal = [len(set(column)) == 1 < len(names) for column in zip(*words, strict=False)]
    common = min([*equal, False].index(False), min(map(len, words)) - 1)
    return ["-".join(rest[common:]) for rest in words]


def check_comparable(runs: list[dict[str, Any]]) -> None:
    """UserError unless all runs were scored on the same rows in the same way."""
    first = runs[0]
    for other in runs[1:]:
        refusal = f"{first['name']} and {other['name']} cannot be compared:"
        for name in ("decoding", "max_new_tokens", "prefix", "rouge", "stemmer", "sentences", "max_source_length"):
            a, b = first["scoring"][name], other["scoring"][name]
            if a != b:
                raise UserError(f"{refusal} {name} is {a!r} in one, {b!r} in the other: train both with the same flag")
        for split, rows in first["rows"].items():
            if rows != other["rows"][split]:
                raise UserError(f"{refusal} their {split} rows differ ({len(rows)} and {len(other['rows'][split])} "
                                "rows): train both with the same --dataset and --limit")


def epoch_table(runs: list[dict[str, Any]]) -> str:
    """ROUGE-1 on test after each epoch, one column per run; what validation picked is bold."""
    scores = [{e["epoch"]: "**" * e["best"] + f"{e['test']['rouge1']:.2f}" + "**" * e["best"] for e in run["epochs"]}
              for run in runs]
    epochs = sorted({epoch for column in scores for epoch in column})
    return table(["Epoch", *(run["name"] for run in runs)],
                 [[f"{epoch:g}", *(column.get(epoch, "") for column in scores)] for epoch in epochs], text=())


def run_table(runs: list[dict[str, Any]]) -> str:
    """What each run reached and what it cost."""
    rows = []
    for run in runs:
        test, results = run["best"]["test"], run["results"]
        minutes = (results["training_seconds"] + results["evaluation_seconds"]) / 60
        row = {"Run": run["name"], "best": f"{run['best']['epoch']:g}", "ROUGE-1": f"{test['rouge1']:.2f}"}
        if is_wide():
            row |= {"95% interval": "[{:.2f}, {:.2f}]".format(*test["rouge1_interval"]),
                    "trained": f"{run['trainable_parameters'] / run['parameters']:.2%}"}
        rows.append(row | {"rows/s": f"{results['samples_per_second']:.1f}",
                           "peak GiB": f"{results['peak_memory_gib']:.1f}", "minutes": f"{minutes:.1f}"})
    return table(list(rows[0]), [list(row.values()) for row in rows])


def different_settings(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each run with the settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run["configuration"])
    different = [name for name in names if any(run["configuration"].get(name) != runs[0]["configuration"].get(name)
                                               for run in runs)]
    lines = [f"{run['name']}: " + ", ".join(f"{name.replace('_', '-')} {run['configuration'].get(name)}"
                                            for name in different) for run in runs]
    return ["", *lines] if different else []


def paired_bootstrap(a: Any, b: Any, samples: int = 10_000, seed: int = 0) -> tuple[float, float, float, float]:
    """Is the mean of `b` [rows] really different from that of `a`? Returns (difference, low, high, p).

    Rows are drawn with replacement, both scores of a row together (Koehn 2004): a percentile interval of the mean
    difference. p is the share of samples in which a mean difference of zero would, by drawing alone, look at least as
    large as the one seen (Efron and Tibshirani 1993, section 16.4; two-sided, never exactly 0).
    """
    differences = np.asarray(b) - np.asarray(a)
    seen, means = differences.mean(), resampled_means(differences, samples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    as_large = np.abs(means - seen) >= abs(seen) - 1e-9
    return float(seen), float(low), float(high), float((1 + as_large.sum()) / (1 + samples))


def holm(values: list[float]) -> list[float]:
    """p values of several tests, corrected so that one false alarm among all of them stays as rare (Holm 1979)."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


# ---------- 14. The fast path: packed rows, own attention kernels, one CUDA graph per size ----------------------------

# Run as it stands in section 5, a step of XL spends nine tenths of its time waiting for the host, which starts some ten
# thousand small pieces of work (kernels) on the GPU one by one. What follows computes the same function with the same
# parameters, and keeps the GPU busy (XL on an H200, batch 8 of SAMSum's lengths: 296 rows/s; PEFT in a plain loop: 14):
#
# - Packing. The tokens of a batch stand one after another, [tokens, d_model], unpadded (section 5's padding to
#   multiples of 64 makes them 1.4 times as many).
#   Only attention knows where a row begins. Its kernels are written here in Triton: softmax(q k^T + bias) v tile by
#   tile, without a matrix of all scores, and with a bias that depends on the distance of two tokens alone.
# - Fewer, larger products. What multiplies one input is one matrix: q, k and v, for example. LoRA's B are more columns
#   of it: [x | s x A^T] [W | B]^T = x W^T + s x A^T B^T. In training two more kernels in Triton make [x | s x A^T] and
#   its gradient, and read x once for all modules.
# - The rest (norms, GELU, dropout, loss) is fused by torch.compile, once for batches of any size (40 s, or less
#   from its cache on disk). Dropout's masks are a hash of seed and position: computed again in backward, not kept.
# - A CUDA graph records the thousands of kernels of a step, and replays them with one call. It holds for one size, so
#   batches are filled up to one of few sizes (see `size_class`), each recorded when it first comes. No two graphs run
#   at once: all use the same pool of memory.
# - All adapters lie in one vector, as do their gradients: clipping and AdamW are a few kernels, not hundreds.
#
# Before its first step it is compared with section 5 on two rows. Where it does not apply or agree, section 5 does it.

F = torch.nn.functional
# Of a kernel's parameters only constants have a type hint: Triton compiles for the types that it finds there.
jit, constexpr = (lambda kernel: kernel, Any) if triton is None else (triton.jit, tl.constexpr)


@jit
def load_rows(pointer, begin, index, count, stride, column, D: constexpr, K: constexpr):
    """Rows begin + index of a matrix and D of its columns, as a tile of width K; zeros where index >= count."""
    c = tl.arange(0, K)
    at = pointer + (begin + index).to(tl.int64)[:, None] * stride + column + c[None, :]
    return tl.load(at, mask=(index < count)[:, None] & (c < D)[None, :], other=0.0)


@jit
def store_rows(pointer, tile, begin, index, count, stride, column, D: constexpr, K: constexpr):
    c = tl.arange(0, K)
    at = pointer + (begin + index).to(tl.int64)[:, None] * stride + column + c[None, :]
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=(index < count)[:, None] & (c < D)[None, :])


@jit
def scores_of(q, k, i, j, nq, nk, bias, head, LIMIT: constexpr, CAUSAL: constexpr):
    """Scores of the queries i [BM] and keys j [BN] of one row and head; -inf where there is no such key."""
    scores = tl.dot(q, tl.trans(k))
    distance = j[None, :] - i[:, None] - (nk - nq)  # the last query stands at the last key
    if LIMIT > 0:
        near = tl.minimum(tl.maximum(distance, -LIMIT), LIMIT) + LIMIT
        scores += tl.load(bias + head * (2 * LIMIT + 1) + near).to(tl.float32)
    allowed = (j < nk)[None, :] & (i < nq)[:, None]
    if CAUSAL:
        allowed = allowed & (distance <= 0)
    return tl.where(allowed, scores, -float("inf"))


@jit
def base_2(x):
    """e^x = 2^base_2(x). GPUs have 2^x alone; here the factor becomes one operation with the subtraction after it."""
    return x * 1.4426950408889634


@jit
def hashed_tile(x):
    """`hashed`, in Triton."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return (x ^ (x >> 16)).to(tl.int32, bitcast=True)


@jit
def dropped_scores(p, i, j, q0, head, mask, H: constexpr):
    """Dropout of a tile: a place is known by query, head and key."""
    seed, threshold, scale = tl.load(mask), tl.load(mask + 1), tl.load(mask + 2).to(tl.float32, bitcast=True)
    of_query = hashed_tile(((q0 + i) * H + head) ^ seed)
    return tl.where(hashed_tile(of_query[:, None] ^ j[None, :]) >= threshold, p * scale, 0.0)


@jit
def forward_kernel(q_, k_, v_, out_, lse_, bias, mask, q_rows, k_rows, q_stride, k_stride, tokens, H: constexpr,
                   D: constexpr, K: constexpr, LIMIT: constexpr, CAUSAL: constexpr,
                   DROP: constexpr, BM: constexpr, BN: constexpr):
    """One program: BM queries of a row and head, over all its keys (FlashAttention, Dao et al. 2022, algorithm 1)."""
    row, head = tl.program_id(1) // H, tl.program_id(1) % H
    q0, k0 = tl.load(q_rows + 2 * row), tl.load(k_rows + 2 * row)
    nq, nk = tl.load(q_rows + 2 * row + 1) - q0, tl.load(k_rows + 2 * row + 1) - k0
    first = tl.program_id(0) * BM
    if first >= nq:
        return
    i = first + tl.arange(0, BM)
    q = load_rows(q_, q0, i, nq, q_stride, head * D, D, K)
    top, total = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, K], tl.float32)
    last = tl.minimum(nk, first + BM + nk - nq) if CAUSAL else nk
    for start in range(0, last, BN):
        j = start + tl.arange(0, BN)
        k = load_rows(k_, k0, j, nk, k_stride, head * D, D, K)
        v = load_rows(v_, k0, j, nk, k_stride, head * D, D, K)
        scores = scores_of(q, k, i, j, nq, nk, bias, head, LIMIT, CAUSAL)
        new = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp2(base_2(scores) - base_2(new)[:, None]), tl.exp(top - new)
        total = total * shrink + tl.sum(p, 1)
        if DROP:
            p = dropped_scores(p, i, j, q0, head, mask, H)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = new
    total = tl.where(total == 0.0, 1.0, total)  # a row without keys
    store_rows(out_, acc / total[:, None], q0, i, nq, H * D, head * D, D, K)
    tl.store(lse_ + head * tokens + q0 + i, base_2(top) + tl.log2(total), mask=i < nq)


@jit
def backward_q_kernel(q_, k_, v_, out_, dout_, lse_, delta_, dq_, bias, mask, q_rows, k_rows, q_stride, k_stride,
                      dq_stride, tokens, H: constexpr, D: constexpr, K: constexpr,
                      LIMIT: constexpr, CAUSAL: constexpr, DROP: constexpr, BM: constexpr,
                      BN: constexpr):
    """Gradient of BM queries, and delta, the sum of out x dout, for the next kernel."""
    row, head = tl.program_id(1) // H, tl.program_id(1) % H
    q0, k0 = tl.load(q_rows + 2 * row), tl.load(k_rows + 2 * row)
    nq, nk = tl.load(q_rows + 2 * row + 1) - q0, tl.load(k_rows + 2 * row + 1) - k0
    first = tl.program_id(0) * BM
    if first >= nq:
        return
    i = first + tl.arange(0, BM)
    q = load_rows(q_, q0, i, nq, q_stride, head * D, D, K)
    out = load_rows(out_, q0, i, nq, H * D, head * D, D, K)
    dout = load_rows(dout_, q0, i, nq, H * D, head * D, D, K)
    lse = tl.load(lse_ + head * tokens + q0 + i, mask=i < nq, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ + head * tokens + q0 + i, delta, mask=i < nq)
    dq = tl.zeros([BM, K], tl.float32)
    last = tl.minimum(nk, first + BM + nk - nq) if CAUSAL else nk
    for start in range(0, last, BN):
        j = start + tl.arange(0, BN)
        k = load_rows(k_, k0, j, nk, k_stride, head * D, D, K)
        v = load_rows(v_, k0, j, nk, k_stride, head * D, D, K)
        p = tl.exp2(base_2(scores_of(q, k, i, j, nq, nk, bias, head, LIMIT, CAUSAL)) - lse[:, None])
        dp = tl.dot(dout, tl.trans(v))
        if DROP:
            dp = dropped_scores(dp, i, j, q0, head, mask, H)
        dq += tl.dot((p * (dp - delta[:, None])).to(k.dtype), k)
    store_rows(dq_, dq, q0, i, nq, dq_stride, head * D, D, K)


@jit
def backward_kv_kernel(q_, k_, v_, dout_, lse_, delta_, dk_, dv_, bias, mask, q_rows, k_rows, q_stride, k_stride,
                       dk_stride, tokens, H: constexpr, D: constexpr, K: constexpr,
                       LIMIT: constexpr, CAUSAL: constexpr, DROP: constexpr, BM: constexpr,
                       BN: constexpr):
    """Gradient of BN keys and values."""
    row, head = tl.program_id(1) // H, tl.program_id(1) % H
    q0, k0 = tl.load(q_rows + 2 * row), tl.load(k_rows + 2 * row)
    nq, nk = tl.load(q_rows + 2 * row + 1) - q0, tl.load(k_rows + 2 * row + 1) - k0
    start = tl.program_id(0) * BN
    if start >= nk:
        return
    j = start + tl.arange(0, BN)
    k = load_rows(k_, k0, j, nk, k_stride, head * D, D, K)
    v = load_rows(v_, k0, j, nk, k_stride, head * D, D, K)
    dk, dv = tl.zeros([BN, K], tl.float32), tl.zeros([BN, K], tl.float32)
    for first in range(start // BM * BM if CAUSAL else 0, nq, BM):  # causal: as many queries as keys
        i = first + tl.arange(0, BM)
        q = load_rows(q_, q0, i, nq, q_stride, head * D, D, K)
        dout = load_rows(dout_, q0, i, nq, H * D, head * D, D, K)
        lse = tl.load(lse_ + head * tokens + q0 + i, mask=i < nq, other=0.0)
        delta = tl.load(delta_ + head * tokens + q0 + i, mask=i < nq, other=0.0)
        p = tl.exp2(base_2(scores_of(q, k, i, j, nq, nk, bias, head, LIMIT, CAUSAL)) - lse[:, None])
        dp, kept = tl.dot(dout, tl.trans(v)), p
        if DROP:
            dp, kept = (dropped_scores(dp, i, j, q0, head, mask, H), dropped_scores(p, i, j, q0, head, mask, H))
        dv += tl.dot(tl.trans(kept).to(dout.dtype), dout)
        dk += tl.dot(tl.trans(p * (dp - delta[:, None])).to(q.dtype), q)
    store_rows(dk_, dk, k0, j, nk, dk_stride, head * D, D, K)
    store_rows(dv_, dv, k0, j, nk, dk_stride, head * D, D, K)


def launch(kernel: Any, blocks: int, bias: Any, q_rows: torch.Tensor, heads: int, inner: int,
           causal: bool, mask: Any, block: int, arguments: tuple) -> None:
    width = inner // heads
    kernel[(blocks, len(q_rows) * heads)](
        *arguments, H=heads, D=width, K=max(16, triton.next_power_of_2(width)), CAUSAL=causal, DROP=mask is not None,
        LIMIT=0 if bias is None else bias.shape[1] // 2, BM=block, BN=64, num_warps=4)


def split_qkv(q: torch.Tensor, kv: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of queries, keys and values, [tokens, inner] each, in what `attention` is given."""
    inner, beside = (q.shape[1] // 3, q) if kv is None else (q.shape[1], kv)
    return q[:, :inner], beside[:, -2 * inner : -inner], beside[:, -inner:]


@torch.library.custom_op("flan_t5::attention", mutates_args=())
def attention(q: torch.Tensor, kv: torch.Tensor | None, bias: torch.Tensor | None, mask: torch.Tensor | None,
              q_rows: torch.Tensor, k_rows: torch.Tensor, heads: int, longest_q: int, longest_k: int, causal: bool
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """dropout(softmax(q k^T + bias)) v for packed rows; of row r, the queries q_rows[r, 0] to q_rows[r, 1] attend to
    the keys k_rows[r, 0] to k_rows[r, 1].

    Self-attention: `q` is [tokens, 3 x inner], with q, k and v side by side, and `kv` None. Cross-attention: `q` is
    [target tokens, inner], `kv` [source tokens, 2 x inner]. `bias` [heads, 2 x limit + 1] is by distance. Also returns
    the base-2 logarithm of each softmax's denominator [heads, tokens], from which backward has the softmax again.
    """
    queries, k, v = split_qkv(q, kv)
    out, lse = q.new_empty(queries.shape), q.new_empty(heads, len(q), dtype=torch.float32)
    block = 64 if longest_q > 1 else 16  # 16 is the least that the tensor cores take
    launch(forward_kernel, -(-longest_q // block), bias, q_rows, heads, out.shape[1], causal, mask, block, (
        queries, k, v, out, lse, bias, mask, q_rows, k_rows, q.stride(0), k.stride(0), len(q)))
    return out, lse


@attention.register_fake
def _(q: torch.Tensor, kv: Any, bias: Any, mask: Any, q_rows: Any, k_rows: Any, heads: int, *_: Any
      ) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(split_qkv(q, kv)[0].shape), q.new_empty(heads, q.shape[0], dtype=torch.float32)


@torch.library.custom_op("flan_t5::attention_backward", mutates_args=())
def attention_backward(dout: torch.Tensor, q: torch.Tensor, kv: torch.Tensor | None, out: torch.Tensor,
                       lse: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None, q_rows: torch.Tensor,
                       k_rows: torch.Tensor, heads: int, longest_q: int, longest_k: int, causal: bool
                       ) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `q` and `kv` as they came; the second is empty in self-attention."""
    dq, dkv = torch.empty_like(q), q.new_empty(0) if kv is None else torch.empty_like(kv)
    queries, k, v = split_qkv(q, kv)
    dqueries, dk, dv = split_qkv(dq, None if kv is None else dkv)
    delta, dout, inner = torch.empty_like(lse), dout.contiguous(), out.shape[1]
    rest = (bias, mask, q_rows, k_rows, q.stride(0), k.stride(0))
    launch(backward_q_kernel, -(-longest_q // 64), bias, q_rows, heads, inner, causal, mask, 64, (
        queries, k, v, out, dout, lse, delta, dqueries, *rest, dq.stride(0), len(q)))
    launch(backward_kv_kernel, -(-longest_k // 64), bias, q_rows, heads, inner, causal, mask, 64, (
        queries, k, v, dout, lse, delta, dk, dv, *rest, dk.stride(0), len(q)))
    return dq, dkv


@attention_backward.register_fake
def _(dout: Any, q: torch.Tensor, kv: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(0) if kv is None else torch.empty_like(kv)


class Attention(torch.autograd.Function):
    """`attention` with its gradients; k_rows None: those of q (a tensor given twice cannot be traced by Dynamo)."""

    @staticmethod
    def forward(ctx: Any, q: Any, kv: Any, bias: Any, mask: Any, q_rows: Any, k_rows: Any, *rest: Any) -> torch.Tensor:
        out, lse = attention(q, kv, bias, mask, q_rows, q_rows if k_rows is None else k_rows, *rest)
        ctx.save_for_backward(q, kv, out, lse, bias, mask, q_rows, k_rows)
        ctx.rest = rest
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:
        *saved, q_rows, k_rows = ctx.saved_tensors  # asked for once: gradient checkpointing forgets them then
        dq, dkv = attention_backward(dout, *saved, q_rows, q_rows if k_rows is None else k_rows, *ctx.rest)
        return dq, None if saved[1] is None else dkv, *[None] * 8


def hashed(x: torch.Tensor) -> torch.Tensor:
    """Of int32: murmur3's finaliser, whose result looks random."""
    x = (x ^ (x >> 16 & 0xFFFF)) * (0x85EBCA6B - 2**32)
    x = (x ^ (x >> 13 & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def dropped(x: torch.Tensor, mask: torch.Tensor, seed_at: int = 0) -> torch.Tensor:
    """Dropout by one of `make_masks`, by the seed that stands at 0 (for forward) or at 3 (for backward) in it."""
    places = torch.arange(math.prod(x.shape), dtype=torch.int32, device=x.device).view(x.shape)
    return torch.where(hashed(places ^ mask[seed_at]) >= mask[1], x * mask[2].view(torch.float32), 0)


def make_masks(seeds: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """int32 [..., 4]: a seed; the threshold that a place's hash must reach to be kept; the bits of the float by which
    it is multiplied then; and the seed again. A rate has the threshold (rate - 1/2) x 2^32: with a rate of 0 everything
    is kept, by the same operations. Backward reads the other seed: a compiler that sees the same mask made twice keeps
    it from forward on, and with it what was dropped."""
    scales = 1 / (0.5 - thresholds / 2**32)
    return torch.stack((seeds, thresholds, scales.view(torch.int32), seeds), -1)


class Dropout(torch.autograd.Function):
    """The mask is not kept for backward but computed again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return dropped(x, mask)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        return dropped(dy, *ctx.saved_tensors, 3), None


def dropout(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else Dropout.apply(x, mask)


class Weight(NamedTuple):
    """Frozen matrices with the same input, one below the other, and LoRA's matrices B in the columns after theirs.

    matrix  [out, in + columns of tail] in bf16; or quantised, [out, in] in INT8 or [out x in / 2] in NF4
    scale   None; of INT8 [out], of NF4 one for every 64 weights
    tail    of quantised ones, the columns of B, with zeros up to a multiple of 64 of them (none without an adapter)
    a, b    LoRA's in bf16: [modules, rank, in], [modules, out / modules, rank]
    """

    matrix: torch.Tensor
    scale: torch.Tensor | None
    tail: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


@torch.library.custom_op("flan_t5::dequantized", mutates_args=())
def dequantized(matrix: torch.Tensor, scale: torch.Tensor, tail: torch.Tensor, width: int, is_backward: bool
                ) -> torch.Tensor:
    """[W | tail] of a quantised W, for a moment. As the compiler sees two different calls, it does not keep the first
    one's result for backward, which would cost the memory that INT8 and NF4 save."""
    nf4 = lambda: torch.ops.bitsandbytes.dequantize_4bit(matrix, scale, 64, "nf4", [len(tail), width], tail.dtype)
    if matrix.dtype != torch.int8 and not tail.shape[1]:
        return nf4()
    result = tail.new_empty(len(tail), width + tail.shape[1])
    if matrix.dtype == torch.int8:
        torch.mul(matrix, scale[:, None], out=result[:, :width])
    else:
        result[:, :width] = nf4()
    result[:, width:] = tail
    return result


@dequantized.register_fake
def _(matrix: Any, scale: Any, tail: torch.Tensor, width: int, is_backward: bool) -> torch.Tensor:
    return tail.new_empty(tail.shape[0], width + tail.shape[1])


@jit
def kept_tile(place, column, seed, threshold):
    """[BM, BK]: which of the places place [BM] + column [BK] `dropped` keeps. A place is a multiple of a power of two
    that is above every column, so that + is ^, and of the first line of `hashed` nearly all is done once for a row."""
    x = (place ^ seed).to(tl.uint32, bitcast=True)
    x = ((x ^ (x >> 16))[:, None] ^ column.to(tl.uint32)[None, :]) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return (x ^ (x >> 16)).to(tl.int32, bitcast=True) >= threshold


@jit
def lora_kernel(x_, a_, mask, wide_, u_, s, tokens, N: constexpr, R: constexpr, D: constexpr, WIDTH: constexpr,
                K: constexpr, BM: constexpr, BK: constexpr):
    """One program: BM tokens, for all N modules. Columns come in blocks of BK; the rank R is filled up to K."""
    t, r, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, K), tl.arange(0, BK)
    inside, row, of_rank = (t < tokens)[:, None], t.to(tl.int64)[:, None], (r < R)[None, :]
    seed, threshold, scale = tl.load(mask), tl.load(mask + 1), tl.load(mask + 2).to(tl.float32, bitcast=True)
    u = (tl.zeros([BM, K], tl.float32),) * N
    for first in range(0, D, BK):
        x = tl.load(x_ + row * D + first + c[None, :], mask=inside, other=0.0)
        tl.store(wide_ + row * WIDTH + first + c[None, :], x, mask=inside)
        new = ()
        for i in tl.static_range(N):
            a = tl.load(a_ + (i * R + r)[None, :] * D + first + c[:, None], mask=of_rank, other=0.0)
            kept = kept_tile((i * tokens + t) * D + first, c, seed, threshold)
            new += (tl.dot(tl.where(kept, x, 0.0), a, u[i]),)
        u = new
    for i in tl.static_range(N):
        result, at = (u[i] * (scale * s)).to(u_.dtype.element_ty), i * R + r[None, :]
        tl.store(u_ + row * (N * R) + at, result, mask=inside & of_rank)
        tl.store(wide_ + row * WIDTH + D + at, result, mask=inside & of_rank)
    rest = D + N * R + tl.arange(0, 64)[None, :]
    tl.store(wide_ + row * WIDTH + rest, tl.zeros([BM, 64], u_.dtype.element_ty), mask=inside & (rest < WIDTH))


@jit
def lora_backward_kernel(x_, dwide_, a_, mask, dx_, da_, s, tokens, span, N: constexpr, R: constexpr, D: constexpr,
                         WIDTH: constexpr, K: constexpr, BM: constexpr, BK: constexpr):
    """One program: BK columns of `span` tokens, whose part of A's gradient is summed with others later, in fixed order:
    adding atomically would give other bits in every run."""
    column, r, c = tl.program_id(0) * BK, tl.arange(0, K), tl.arange(0, BK)
    at_a = r[:, None] * D + column + c[None, :]
    seed, threshold, scale = tl.load(mask), tl.load(mask + 1), tl.load(mask + 2).to(tl.float32, bitcast=True) * s
    da = (tl.zeros([K, BK], tl.float32),) * N
    begin = tl.program_id(1) * span
    for first in range(begin, tl.minimum(begin + span, tokens), BM):
        t = first + tl.arange(0, BM)
        inside, row = (t < tokens)[:, None], t.to(tl.int64)[:, None]
        x = tl.load(x_ + row * D + column + c[None, :], mask=inside, other=0.0)
        dx, new = tl.zeros([BM, BK], tl.float32), ()
        for i in tl.static_range(N):
            du = tl.load(dwide_ + row * WIDTH + D + i * R + r[None, :], mask=inside & (r < R)[None, :], other=0.0)
            a = tl.load(a_ + i * R * D + at_a, mask=(r < R)[:, None], other=0.0)
            # Both as one tile: else the compiler makes the mask twice, once for the registers of each.
            both = tl.join(x.to(tl.float32), tl.dot(du, a))
            kept = kept_tile((i * tokens + t) * D + column, c, seed, threshold)
            kept_x, kept_dx = tl.split(tl.where(kept[:, :, None], both, 0.0))
            dx += kept_dx
            new += (tl.dot(tl.trans(du), kept_x.to(du.dtype), da[i]),)
        da = new
        dx = dx * scale + tl.load(dwide_ + row * WIDTH + column + c[None, :], mask=inside, other=0.0)
        tl.store(dx_ + row * D + column + c[None, :], dx.to(x.dtype), mask=inside)
    for i in tl.static_range(N):
        tl.store(da_ + (tl.program_id(1) * N + i) * R * D + at_a, da[i] * scale, mask=(r < R)[:, None])


def has_lora_kernels(x: torch.Tensor, a: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the two apply: in training on a GPU, to widths that a power of two divides, and to ranks up to 64, beyond
    which registers do not suffice."""
    return x.is_cuda and mask is not None and math.gcd(a.shape[2], 128) >= 16 and a.shape[1] <= 64


@torch.library.custom_op("flan_t5::lora", mutates_args=())
def lora(x: torch.Tensor, a: torch.Tensor, mask: torch.Tensor, s: float, width: int
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """[x | u | 0] [tokens, width], and u = s dropout(x) A^T [tokens, modules x rank] by itself, to be kept for B's
    gradient: the wide one is not kept."""
    (n, r, d), rank = a.shape, max(16, triton.next_power_of_2(a.shape[1]))
    wide, u = x.new_empty(len(x), width), x.new_empty(len(x), n * r)
    lora_kernel[(-(-len(x) // 16),)](x.contiguous(), a, mask, wide, u, s, len(x), N=n, R=r, D=d, WIDTH=width, K=rank,
                                     BM=16, BK=min(math.gcd(d, 128), 2048 // rank))
    return wide, u


@lora.register_fake
def _(x: torch.Tensor, a: torch.Tensor, mask: Any, s: float, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], a.shape[0] * a.shape[1])


@torch.library.custom_op("flan_t5::lora_backward", mutates_args=())
def lora_backward(x: torch.Tensor, dwide: torch.Tensor, a: torch.Tensor, mask: torch.Tensor, s: float
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradient of [x | u | 0]: that of x, and 16 summands (in fp32) of that of A."""
    dx, parts = x.new_empty(x.shape), a.new_empty(16, *a.shape, dtype=torch.float32)
    (n, r, d), block = a.shape, math.gcd(x.shape[1], 64)
    lora_backward_kernel[(d // block, 16)](
        x.contiguous(), dwide.contiguous(), a, mask, dx, parts, s, len(x), 32 * -(-len(x) // 512), N=n, R=r, D=d,
        WIDTH=dwide.shape[1], K=max(16, triton.next_power_of_2(r)), BM=32, BK=block, num_stages=2)
    return dx, parts


@lora_backward.register_fake
def _(x: torch.Tensor, dwide: Any, a: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), a.new_empty(16, *a.shape, dtype=torch.float32)


class Linear(torch.autograd.Function):
    """x [tokens, in] -> x W^T + s dropout(x) A^T B^T [tokens, out], with a mask of its own for each module's A.

    B's values are read from `matrix` or `tail`; `b` is given for its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, matrix: Any, scale: Any, tail: Any, a: Any, b: Any, mask: Any, s: float
                ) -> torch.Tensor:
        w = matrix if scale is None else dequantized(matrix, scale, tail, x.shape[1], False)
        wide, u = x, None
        if a is not None and has_lora_kernels(x, a, mask):
            wide, u = lora(x, a, mask, s, w.shape[1])
        elif a is not None:
            kept = x.expand(len(a), *x.shape)
            u = torch.bmm(kept if mask is None else dropped(kept, mask), a.transpose(1, 2)) * s  # [modules, tokens, r]
            u = u.transpose(0, 1).flatten(1)
            wide = torch.cat((x, u, x.new_zeros(len(x), w.shape[1] - x.shape[1] - u.shape[1])), 1)
        ctx.save_for_backward(x, u, matrix, scale, tail, a, mask)
        ctx.s = s
        return wide @ w.t()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        x, u, matrix, scale, tail, a, mask = ctx.saved_tensors
        wide = dy @ (matrix if scale is None else dequantized(matrix, scale, tail, x.shape[1], True))
        if a is None:
            return wide, *[None] * 7
        n, r, d = a.shape
        db = torch.bmm(dy.unflatten(1, (n, -1)).permute(1, 2, 0), u.unflatten(1, (n, r)).transpose(0, 1))
        if has_lora_kernels(x, a, mask):
            dx, parts = lora_backward(x, wide, a, mask, ctx.s)
            return dx, None, None, None, parts.sum(0).to(a.dtype), db, None, None
        du, kept = wide[:, d : d + n * r].unflatten(1, (n, r)).transpose(0, 1) * ctx.s, x.expand(n, *x.shape)
        dx = torch.bmm(du, a)
        if mask is not None:
            kept, dx = dropped(kept, mask, 3), dropped(dx, mask, 3)
        return wide[:, :d] + dx.sum(0), None, None, None, torch.bmm(du.transpose(1, 2), kept), db, None, None


class Shape(NamedTuple):
    """What is the same in all layers, and fixed when the code is compiled."""

    heads: int
    eps: float
    s: float  # alpha / rank
    longest: tuple[int, int]  # tokens of a dialogue and of a summary, at most


class Layer(NamedTuple):
    """A T5 block. The encoder's have no cross-attention."""

    self_norm: torch.Tensor
    qkv: Weight
    o: Weight
    ff_norm: torch.Tensor
    wi: Weight
    wo: Weight
    cross_norm: torch.Tensor | None = None
    q: Weight | None = None
    kv: Weight | None = None
    cross_o: Weight | None = None


# The masks of a layer: of what LoRA's A is given for each product, of softmaxes, and of what is added to x.
(A_QKV, SELF_SOFTMAX, A_O, SELF_ADDED, HIDDEN, FF_ADDED,
 A_Q, A_KV, CROSS_SOFTMAX, A_CROSS_O, CROSS_ADDED) = SITES = range(11)


def linear(x: torch.Tensor, w: Weight, mask: torch.Tensor | None, shape: Shape) -> torch.Tensor:
    return Linear.apply(x, *w, mask, shape.s)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Rounded where transformers' T5LayerNorm rounds."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + shape.eps)).to(x.dtype)


def gated_gelu(both: torch.Tensor) -> torch.Tensor:
    gate, value = both.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * value


def feed_forward(x: torch.Tensor, w: Layer, masks: Any, shape: Shape) -> torch.Tensor:
    hidden = gated_gelu(linear(rms_norm(x, w.ff_norm, shape), w.wi, None, shape))
    return x + dropout(linear(dropout(hidden, masks[HIDDEN]), w.wo, None, shape), masks[FF_ADDED])


def self_attention(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, w: Layer, masks: Any, shape: Shape,
                   causal: bool) -> torch.Tensor:
    qkv, longest = linear(rms_norm(x, w.self_norm, shape), w.qkv, masks[A_QKV], shape), shape.longest[int(causal)]
    mixed = Attention.apply(qkv, None, bias, masks[SELF_SOFTMAX], rows, None, shape.heads, longest, longest, causal)
    return x + dropout(linear(mixed, w.o, masks[A_O], shape), masks[SELF_ADDED])


def encoder_block(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor, w: Layer, masks: Any, shape: Shape
                  ) -> torch.Tensor:
    return feed_forward(self_attention(x, rows, bias, w, masks, shape, False), w, masks, shape)


def decoder_block(x: torch.Tensor, source: torch.Tensor, rows: torch.Tensor, source_rows: torch.Tensor,
                  bias: torch.Tensor, w: Layer, masks: Any, shape: Shape) -> torch.Tensor:
    x = self_attention(x, rows, bias, w, masks, shape, True)
    q = linear(rms_norm(x, w.cross_norm, shape), w.q, masks[A_Q], shape)
    kv = linear(source, w.kv, masks[A_KV], shape)
    mixed = Attention.apply(q, kv, None, masks[CROSS_SOFTMAX], rows, source_rows, shape.heads, *shape.longest[::-1],
                            False)
    x = x + dropout(linear(mixed, w.cross_o, masks[A_CROSS_O], shape), masks[CROSS_ADDED])
    return feed_forward(x, w, masks, shape)


def embed(ids: torch.Tensor, table: torch.Tensor, mask: Any) -> torch.Tensor:
    return dropout(F.embedding(ids, table), mask)


def stack_output(x: torch.Tensor, norm: torch.Tensor, mask: Any, shape: Shape) -> torch.Tensor:
    return dropout(rms_norm(x, norm, shape), mask)


def summed_loss(x: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, mask: Any, shape: Shape
                ) -> torch.Tensor:
    logits = F.linear(stack_output(x, norm, mask, shape), head)
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def size_class(tokens: int) -> int:
    """`tokens` rounded up to one of few sizes, by an eighth at most (or to a multiple of 64)."""
    step = max(64, 2 ** (max(tokens - 1, 1).bit_length() - 1) // 8)
    return -(-tokens // step) * step


def pack(sources: list[Tokens], targets: list[Tokens], rows: int, longest: tuple[int, int], start: int
         ) -> dict[str, torch.Tensor]:
    """A batch of `rows` rows (those that are missing are empty) without padding.

    source, target, labels  ids [tokens], one row after another, filled up to a size_class
    source_rows, target_rows  [rows + some, 2]: first token of each row and the one after its last. What fills up is
                            rows too, which nobody reads: as many as it takes with rows of at most `longest` tokens.
    """
    batch = {}
    for name, lists, most in (("source", sources, longest[0]), ("labels", targets, longest[1])):
        ids = torch.tensor([token for tokens in lists for token in tokens], dtype=torch.int64)
        size, ends = size_class(len(ids)), np.cumsum([len(tokens) for tokens in lists] + [0] * (rows - len(lists)))
        filling = np.minimum(len(ids) + most * np.arange(1, 2 + rows // 8), size)
        ends = np.concatenate([[0], ends, filling])
        batch[name] = F.pad(ids, (0, size - len(ids)), value=0 if name == "source" else -100)
        batch[name + "_rows"] = torch.tensor(np.stack([ends[:-1], ends[1:]], 1), dtype=torch.int32)
    target = batch["labels"].roll(1).clamp(min=0)
    batch["target_rows"] = batch.pop("labels_rows")
    firsts = batch["target_rows"][:, 0].long()
    target[firsts[firsts < len(target)]] = start
    return batch | {"target": target}


FAST_PAYS = 6000  # layers x micro-steps: in the usual step on an H100 each takes some 10 ms, and compiling 40 to 60 s


def why_not_fast(model: torch.nn.Module, settings: Settings, micro_steps: int | None = None) -> str | None:
    """Why the fast path does not apply to `model`, or to a training of so many steps; or None."""
    if settings.fast is False:
        return "--no-fast" if settings.mode != "evaluate" else "the run was not scored on it, or --no-fast"
    config, lora = model.config, getattr(model, "peft_config", {}).get("default")
    adapted = [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")]
    attentions = config.num_layers + 2 * config.num_decoder_layers
    reasons = {
        "it is made for LoRA on q, k, v and o": lora is None or sorted(adapted) != sorted("qkvo" * attentions)
            or lora.use_dora or lora.bias != "none" or bool(lora.rank_pattern or lora.alpha_pattern),
        "the weights are sharded": is_sharded(),
        "so short a training is over before it is compiled (--fast insists)": settings.fast is None and
            micro_steps is not None and micro_steps * (config.num_layers + config.num_decoder_layers) < FAST_PAYS,
        "the model is not of Flan-T5's kind": config.feed_forward_proj != "gated-gelu" or is_tied(config),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it does not run here, or None."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return "it is made for CUDA GPUs with bf16"
    return "Triton is not installed" if triton is None else None


def make_fast(model: torch.nn.Module, settings: Settings, micro_steps: int | None = None) -> "FastT5 | None":
    reason = why_not_fast(model, settings, micro_steps) or why_not_here(model.device, model.dtype)
    if reason and (model.device.type == "cuda" or settings.fast):
        say(f"the usual step is used, not the fast one: {reason}", file=sys.stderr)
    return None if reason else FastT5(model, settings)


class FastT5:
    """The PeftModel `model`, for packed rows. All weights are shared with it, so that it goes on working as it is.

    PEFT's fp32 matrices A and B become views of the vector `flat`, in whose `grad` this class adds up gradients. Before
    each micro-batch `flat` is rounded to the bf16 vector `working`, of which the products read A, and B is copied from
    there to its columns beside W (`columns`: pairs of where to and where from). `leaves`, views of `working` in the
    order of `flat`, are what autograd gives gradients of.

    A CUDA graph repeats its kernels on the same addresses. So whatever changes from step to step has a place of its own
    that is filled before a replay: the batch (`static` in `by_graph`), the seed of dropout (`key`), the `scale` of the
    loss. And whatever it computes is found in the same place after it: the gradient in `flat.grad`, the loss.
    """

    def __init__(self, model: PeftModel, settings: Settings) -> None:
        self.model, base, config = model, model.base_model.model, model.config
        self.device, self.dtype, self.uses_graphs = model.device, model.dtype, model.device.type == "cuda"
        lora = base.encoder.block[0].layer[0].SelfAttention.q
        longest = tuple(max(64, n) for n in (settings.max_source_length, settings.max_target_length))
        self.shape = Shape(config.num_heads, config.layer_norm_epsilon, lora.scaling["default"], longest)
        self.micro_batch_size, self.start = settings.micro_batch_size, config.decoder_start_token_id
        self.table, self.head = base.shared.weight, base.lm_head.weight
        self.norms = [stack.final_layer_norm.weight.detach() for stack in (base.encoder, base.decoder)]
        stacks = [[block.layer for block in stack.block] for stack in (base.encoder, base.decoder)]
        groups = {}  # (stack, field of Layer): for each layer, the modules that share an input
        for i, layers in enumerate(stacks):
            selfs = [layer[0].SelfAttention for layer in layers]
            groups |= {(i, "qkv"): [(m.q, m.k, m.v) for m in selfs], (i, "o"): [(m.o,) for m in selfs]}
        crosses = [layer[1].EncDecAttention for layer in stacks[1]]
        groups |= {(1, "q"): [(m.q,) for m in crosses], (1, "kv"): [(m.k, m.v) for m in crosses],
                   (1, "cross_o"): [(m.o,) for m in crosses]}
        self.adapter = [getattr(module, kind)["default"].weight for layers in groups.values()
                        for kind in ("lora_A", "lora_B") for modules in layers for module in modules]
        # Of each matrix: which others do the same in other layers.
        self.kinds = [(key, kind, i) for key, layers in groups.items() for kind in ("lora_A", "lora_B")
                      for modules in layers for i in range(len(modules))]
        for i, layers in enumerate(stacks):
            dense = [layer[-1].DenseReluDense for layer in layers]
            groups |= {(i, "wi"): [(m.wi_0, m.wi_1) for m in dense], (i, "wo"): [(m.wo,) for m in dense]}
        size = sum(p.numel() for p in self.adapter)
        self.flat = torch.nn.Parameter(torch.empty(size, device=self.device))
        self.flat.grad = torch.zeros_like(self.flat)
        for p, part in zip(self.adapter, self.split(self.flat.data), strict=True):
            part.copy_(p.data)
            p.data = part
        self.working = torch.empty(size, device=self.device, dtype=self.dtype)  # what the products read of `flat`
        self.leaves, self.columns, self.taken = [], [], 0
        weights = {key: self.merge(layers) for key, layers in groups.items()}
        norms = (("self_norm", 0), ("ff_norm", -1)), (("self_norm", 0), ("cross_norm", 1), ("ff_norm", -1))
        self.encoder, self.decoder = (
            [Layer(**{name: layer[at].layer_norm.weight.detach() for name, at in norms[i]},
                   **{name: group[n] for (stack, name), group in weights.items() if stack == i})
             for n, layer in enumerate(layers)] for i, layers in enumerate(stacks))
        self.biases = [bias_by_distance(layers[0][0].SelfAttention) for layers in stacks]
        layers = len(self.encoder) + len(self.decoder)
        rates = torch.full((layers + 1, len(SITES)), config.dropout_rate, dtype=torch.float64)
        rates[:, [A_QKV, A_O, A_Q, A_KV, A_CROSS_O]] = getattr(lora.lora_dropout["default"], "p", 0.0)
        rates[-1] = config.dropout_rate  # of embeddings and of what the stacks return
        self.thresholds = ((rates - 0.5) * 2**32).to(torch.int32).to(self.device)
        self.key = torch.zeros((), dtype=torch.int32, device=self.device)  # of this micro-batch's masks
        self.scale = torch.ones((), device=self.device)
        compiled = functools.partial(torch.compile, dynamic=None) if self.uses_graphs else lambda function: function
        self.embed, self.encoder_block, self.decoder_block, self.stack_output, self.summed_loss = map(
            compiled, (embed, encoder_block, decoder_block, stack_output, summed_loss))
        if settings.gradient_checkpointing:  # masks come from their seeds: no generator to bring back
            again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
            self.encoder_block, self.decoder_block = (functools.partial(again, block) for block in (
                self.encoder_block, self.decoder_block))
        self.pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None
        self.stream = torch.cuda.Stream() if self.uses_graphs else None
        # Holds the pool while there is no other graph, as after a generation: PyTorch cannot use an emptied one again.
        self.holder = self.record(lambda: torch.zeros((), device=self.device)) if self.uses_graphs else None
        self.graphs: dict[tuple, Any] = {}
        self.is_proved: dict[str, bool | None] = {"training": False, "generation": False}  # None: it is wrong
        self.decoding = None

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Views of a vector like `flat`, one in the shape of each matrix of the adapter."""
        parts = vector.split([p.numel() for p in self.adapter])
        return [part.view(p.shape) for part, p in zip(parts, self.adapter, strict=True)]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.flat]

    def take(self, *shape: int) -> torch.Tensor:
        """The next places of `working`."""
        start, self.taken = self.taken, self.taken + math.prod(shape)
        return self.working[start : self.taken].view(shape)

    @torch.no_grad()
    def merge(self, layers: list[tuple[torch.nn.Module, ...]]) -> list[Weight]:
        """The modules of each layer as one Weight; what they hold becomes views of it."""
        bases = [[getattr(m, "base_layer", m) for m in modules] for modules in layers]
        count, out, width = len(bases[0]), bases[0][0].out_features, bases[0][0].in_features
        rank = len(layers[0][0].lora_A["default"].weight) if hasattr(layers[0][0], "lora_A") else 0
        is_plain = bases[0][0].weight.is_floating_point()
        new = functools.partial(torch.zeros, dtype=self.dtype, device=self.device)
        size = count * out, is_plain * width + -(-count * rank // 64) * 64
        # With an adapter those of all layers are one tensor, so that one operation brings B there. The others are made
        # one by one, and what they were made of is free again.
        tails = new(len(layers), *size) if rank else (new(size) for _ in layers)
        weights = []
        for tail, modules in zip(tails, bases, strict=True):
            if is_plain:
                for module, part in zip(modules, tail[:, :width].chunk(count), strict=True):
                    part.copy_(module.weight)
                    module.weight.data = part
                weights.append(Weight(tail, None, None))
            else:
                weights.append(Weight(*merge_quantized(modules), tail))
        if rank:
            a, b = self.take(len(layers), count, rank, width), self.take(len(layers), count, out, rank)
            for i in range(count):
                first = is_plain * width + i * rank
                self.columns.append((tails[:, i * out : (i + 1) * out, first : first + rank], b[:, i]))
            a, b = ([layer.detach().requires_grad_() for layer in group] for group in (a, b))
            self.leaves += a + b
            weights = [w._replace(a=a[n], b=b[n]) for n, w in enumerate(weights)]
        return weights

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the adapter to where the products read it."""
        self.working.copy_(self.flat)
        for columns, b in self.columns:
            columns.copy_(b)

    def loss(self, batch: dict[str, torch.Tensor], masks: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, summed over the target tokens of a packed batch."""
        def any_size(x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.maybe_mark_dynamic(x, 0)  # so that the code is compiled for any number of tokens at once
            return x

        # The last row of `masks` is for what no layer holds: embeddings and output of the encoder, then the decoder's.
        rows, source_rows = any_size(batch["target_rows"]), any_size(batch["source_rows"])
        x = self.embed(any_size(batch["source"]), self.table, masks[-1, 0]).requires_grad_()
        for w, mask in zip(self.encoder, masks, strict=False):
            x = self.encoder_block(any_size(x), source_rows, self.biases[0], w, mask, self.shape)
        source = any_size(self.stack_output(any_size(x), self.norms[0], masks[-1, 1], self.shape))
        x = self.embed(any_size(batch["target"]), self.table, masks[-1, 2]).requires_grad_()
        for w, mask in zip(self.decoder, masks[len(self.encoder) :], strict=False):
            x = self.decoder_block(any_size(x), source, rows, source_rows, self.biases[1], w, mask, self.shape)
        return self.summed_loss(any_size(x), self.norms[1], self.head, any_size(batch["labels"]), masks[-1, 3],
                                self.shape)

    def forward_backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Adds the gradients of scale x loss to `flat.grad`, and returns scale x loss. This is what a graph records."""
        self.refresh()
        sites = torch.arange(self.thresholds.numel(), dtype=torch.int32, device=self.device).view_as(self.thresholds)
        loss = self.loss(batch, make_masks(hashed(hashed(sites) + self.key), self.thresholds)) * self.scale
        gradients = torch.autograd.grad(loss, self.leaves)
        self.flat.grad.add_(torch.cat([gradient.flatten() for gradient in gradients]))
        return loss.detach()

    def training_step(self, batch: dict[str, torch.Tensor], tokens: torch.Tensor, is_first: bool, is_last: bool
                      ) -> torch.Tensor:
        """Like that of the Trainer, for one micro-batch of `pack` in a step with so many target `tokens`."""
        self.decoding, processes = None, PartialState().num_processes
        if is_first:
            self.flat.grad.zero_()
        self.key.fill_(int(torch.randint(2**31, ())))  # from torch's generator, which training_step has seeded
        self.scale.fill_(processes / tokens)
        loss = self.by_graph(batch)
        if is_last and processes > 1:
            torch.distributed.all_reduce(self.flat.grad)
            self.flat.grad.div_(processes)
        return loss

    def by_graph(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`forward_backward` by a graph, recorded when a size of batch is met. (On a CPU, in tests, without.)

        A batch for which code must be compiled, as the first, runs without: that cannot be done in a recording.
        """
        sizes = tuple(map(len, batch.values()))
        if not self.uses_graphs:
            return self.forward_backward(batch)
        if sizes not in self.graphs:
            static = {name: tensor.clone() for name, tensor in batch.items()}
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    self.graphs[sizes] = static, *self.record(lambda: self.forward_backward(static))
            except RuntimeError as error:
                if "fail_on_recompile" not in str(error):
                    raise
                # On the stream of recordings: autograd's nodes of the leaves remember the one they were made on.
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    loss = self.forward_backward(batch)
                torch.cuda.current_stream().wait_stream(self.stream)
                return loss
        static, graph, loss = self.graphs[sizes]
        for name, tensor in batch.items():
            static[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return loss

    def record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        """A CUDA graph of the kernels that `work` starts, and what it returns: memory that each replay fills anew."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # Only this thread must keep still: the one that pins batches need not.
        recording = functools.partial(torch.cuda.graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with recording(graph, pool=self.pool):
                return graph, work()
        except BaseException:  # torch's generator of random numbers believes in a recording until one has succeeded
            with recording(torch.cuda.CUDAGraph()):
                torch.zeros((), device=self.device)
            raise
        finally:
            torch.cuda.set_stream(before)  # a recording whose end fails leaves its own behind

    def pack(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return pack([row["input_ids"] for row in rows], [row["labels"] for row in rows], self.micro_batch_size,
                    self.shape.longest, self.start)

    def generate(self, sources: list[Tokens], config: GenerationConfig, stop: StopSignal) -> list[Tokens] | None:
        """Greedy summaries of a batch, each up to its end token; None where plain `generate` is to be used: for a few
        dialogues, before whose end nothing would be compiled, and where the proof (see `agrees`) has failed."""
        is_small = self.decoding is None and len(sources) < 32
        if is_small or config.num_beams > 1 or self.is_proved["generation"] is None:
            return None
        self.refresh()
        room, problem = size_class(sum(map(len, sources))), "its tokens are not those of transformers' model"
        try:
            if self.decoding is None or not self.decoding.fits(len(sources), room):
                self.decoding = None  # its memory first
                self.decoding = Decoding(self, len(sources), room, config.max_new_tokens)
            summaries = self.decoding(sources, stop)
            if stop.number or self.is_proved["generation"]:
                return summaries
            self.is_proved["generation"] = self.agrees(sources[:8], summaries[:8])
            if self.is_proved["generation"]:
                return summaries
        except torch.OutOfMemoryError:
            self.decoding = None
            raise
        except Exception as error:  # of the compiler, as in begin_fast
            problem = f"{type(error).__name__}: {first_line(error)}"
        self.decoding, self.is_proved["generation"] = None, None
        say(f"plain generate() is used, not the fast one: {problem}", file=sys.stderr)
        return None

    def agrees(self, sources: list[Tokens], summaries: list[Tokens]) -> bool:
        """Whether transformers' model, after the same beginning, would go on with the same token in 85% of the places
        of `summaries`; in the others two tokens may be as likely but for rounding, above all that of INT8."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids, chosen = (pad([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1).to(self.device)
                       for rows in (sources, summaries))
        before = F.pad(chosen[:, :-1], (1, 0), value=self.start).clamp(min=0)
        seen = (ids >= 0).long()
        logits = self.model(input_ids=ids.clamp(min=0), attention_mask=seen, decoder_input_ids=before).logits
        return bool((logits.argmax(-1) == chosen)[chosen >= 0].float().mean() >= 0.85)


def bias_by_distance(attention: torch.nn.Module) -> torch.Tensor:
    """T5's relative position bias for each distance of key and query up to the limit, from where it is constant."""
    limit = attention.relative_attention_max_distance
    distance = torch.arange(-limit, limit + 1, device=attention.relative_attention_bias.weight.device)
    bucket = attention._relative_position_bucket(distance, bidirectional=not attention.is_decoder, max_distance=limit,
                                                 num_buckets=attention.relative_attention_num_buckets)
    return attention.relative_attention_bias.weight.detach()[bucket].t().contiguous()


def merge_quantized(modules: list[torch.nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' matrices of several modules below one another, and their scales; each module keeps a view (of
    INT8's scales a copy: there are few)."""
    weights = [module.weight for module in modules]
    merged = torch.cat([weight.data for weight in weights])
    for module, part in zip(modules, merged.chunk(len(modules)), strict=True):
        module.weight.data = part
        for holder in (module.weight, getattr(module, "state", None)):  # of INT8; the second after its first use
            if getattr(holder, "CB", None) is not None:
                holder.CB = module.weight.data
    if merged.dtype == torch.int8:
        scales = [m.weight.SCB if getattr(m.weight, "SCB", None) is not None else m.state.SCB for m in modules]
        return merged, torch.cat([scale.flatten() for scale in scales]).float() / 127
    scales = torch.cat([weight.quant_state.absmax for weight in weights])
    for weight, part in zip(weights, scales.chunk(len(weights)), strict=True):
        weight.quant_state.absmax = part
    return merged, scales


class Decoding:
    """Greedy decoding of up to `rows` dialogues at once, one CUDA graph for each token of all of them.

    Keys and values of the dialogues lie packed, those of a summary have `new_tokens` places. When half of the rows have
    ended, the others go on in a graph of half the size: only the numbers that say where a row's keys are have to move.
    """

    def __init__(self, fast: FastT5, rows: int, room: int, new_tokens: int) -> None:
        self.fast, self.new_tokens, self.room = fast, new_tokens, room
        self.rows = 2 ** max(4, (rows - 1).bit_length())
        number = functools.partial(torch.zeros, device=fast.device, dtype=torch.int32)
        width = 2 * len(fast.decoder[0].q.matrix if fast.decoder[0].q.scale is None else fast.decoder[0].q.tail)
        store = functools.partial(torch.empty, device=fast.device, dtype=fast.dtype)
        self.crosses = [store(room, width) for _ in fast.decoder]
        self.caches = [store(self.rows * new_tokens, width) for _ in fast.decoder]
        self.queries = torch.stack((torch.arange(self.rows), torch.arange(self.rows) + 1), 1).to(number(1))
        self.source_rows, self.cached = number(self.rows, 2), number(self.rows, 2)  # places in `crosses`, in `caches`
        self.row, self.token = number(self.rows, dtype=torch.int64), number(self.rows, dtype=torch.int64)
        self.done, self.position = number(self.rows, dtype=torch.bool), number((), dtype=torch.int64)
        self.output = number(self.rows, new_tokens, dtype=torch.int64)
        self.graphs: dict[int, Any] = {}
        compiled = functools.partial(torch.compile, dynamic=True) if fast.uses_graphs else lambda function: function
        self.linear, self.rms_norm, self.gated_gelu = map(compiled, (linear, rms_norm, gated_gelu))

    def fits(self, rows: int, room: int) -> bool:
        return rows <= self.rows and room <= self.room

    def encode(self, sources: list[Tokens]) -> None:
        """Fills `crosses`, and sets all rows to their beginning."""
        fast, n = self.fast, len(sources)
        batch = {name: tensor.to(fast.device) for name, tensor in pack(
            sources, [[0]] * n, n, fast.shape.longest, fast.start).items()}
        x, no_masks = F.embedding(batch["source"], fast.table), [None] * len(SITES)
        for w in fast.encoder:
            x = encoder_block(x, batch["source_rows"], fast.biases[0], w, no_masks, fast.shape)
        x = rms_norm(x, fast.norms[0], fast.shape)
        for w, cross in zip(fast.decoder, self.crosses, strict=True):
            cross[: len(x)] = linear(x, w.kv, None, fast.shape)
        self.source_rows.zero_()
        self.source_rows[:n] = batch["source_rows"][:n]
        torch.arange(self.rows, out=self.row)
        self.cached.copy_((self.row * self.new_tokens)[:, None].expand(-1, 2))
        self.token.fill_(fast.start)
        self.position.zero_()
        torch.ge(self.row, n, out=self.done)

    def one_token(self, n: int) -> None:
        """The next token of the first n rows: `decoder_block` for one token, with earlier keys and values in caches."""
        fast, shape, rows = self.fast, self.fast.shape, self.queries[:n]
        place = self.cached[:n, 1].long()
        self.cached[:n, 1] += 1
        x = F.embedding(self.token[:n], fast.table)
        for w, cache, cross in zip(fast.decoder, self.caches, self.crosses, strict=True):
            qkv = self.linear(self.rms_norm(x, w.self_norm, shape), w.qkv, None, shape)
            inner = qkv.shape[1] // 3
            cache.index_copy_(0, place, qkv[:, inner:])
            mixed, _ = attention(qkv[:, :inner], cache, fast.biases[1], None, rows, self.cached[:n], shape.heads, 1,
                                 self.new_tokens, False)
            x = x + self.linear(mixed, w.o, None, shape)
            q = self.linear(self.rms_norm(x, w.cross_norm, shape), w.q, None, shape)
            mixed, _ = attention(q, cross, None, None, rows, self.source_rows[:n], shape.heads, 1, shape.longest[0],
                                 False)
            x = x + self.linear(mixed, w.cross_o, None, shape)
            both = self.linear(self.rms_norm(x, w.ff_norm, shape), w.wi, None, shape)
            x = x + self.linear(self.gated_gelu(both), w.wo, None, shape)
        config = fast.model.config
        chosen = F.linear(self.rms_norm(x, fast.norms[1], shape), fast.head).argmax(-1)
        chosen = torch.where(self.done[:n], config.pad_token_id, chosen)
        self.token[:n] = chosen
        self.done[:n] |= chosen == config.eos_token_id
        self.output.index_put_((self.row[:n], self.position.expand(n)), chosen)
        self.position += 1

    def halve(self, n: int) -> int:
        """How many rows have to go on, of the first n: these come to the front, and are a power of two, or none."""
        left = n - int(self.done[:n].sum())
        fewer = n
        while fewer >= 32 and left <= fewer // 2:
            fewer //= 2
        if fewer < n:
            order = torch.argsort(self.done[:n].to(torch.int8), stable=True)[:fewer]
            for state in (self.row, self.token, self.source_rows, self.cached, self.done):
                state[:fewer] = state[order]
        return fewer if left else 0

    @torch.no_grad()
    def __call__(self, sources: list[Tokens], stop: StopSignal) -> list[Tokens]:
        """The summaries of `sources`, which break off when the process is told to stop."""
        self.encode(sources)
        n = self.rows
        for position in range(self.new_tokens):
            if position % 8 == 0:  # looking waits for the GPU
                n = 0 if stop.number else self.halve(n)
            if not n:
                break
            if not self.fast.uses_graphs or n not in self.graphs:
                self.one_token(n)  # the first time compiles, which cannot be recorded
                self.graphs[n] = None
                continue
            if self.graphs[n] is None:
                self.graphs[n], _ = self.fast.record(functools.partial(self.one_token, n))
            self.graphs[n].replay()
        end = self.fast.model.config.eos_token_id
        rows = self.output[: len(sources), : position + 1].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]


@contextlib.contextmanager
def calmed(fast: FastT5) -> Iterator[None]:
    """For a while, norms give 1/32 of their output to attention and 1/8 to feed-forward layers (exactly: powers of 2).

    A trained T5 attends so sharply, above all the tiny one, that rounding to bf16 alone may change a gradient by three
    times its norm. Calmed, by 2% (the tiny one on a CPU; 30%, and once 90%, with 1/4), while q and k that lose theirs
    show by more than 80%, and a feed-forward layer by more than 50% in the encoder behind its first one. In the decoder
    none does.
    """
    norms = [(norm, factor) for w in (*fast.encoder, *fast.decoder) for norm, factor in (
        (w.self_norm, 1 / 32), (w.cross_norm, 1 / 32), (w.ff_norm, 1 / 8)) if norm is not None]
    for norm, factor in norms:
        norm.mul_(factor)
    try:
        yield
    finally:
        for norm, factor in norms:
            norm.div_(factor)


COMPARED = (80, 16), (16, 80)  # tokens of source and target of two rows: a tile of attention holds 64 keys


def begin_fast(trainer: SummarizationTrainer) -> None:
    """Before the first fast step: compiles it and compares it with section 5, on two rows of any tokens.

    Loss and gradients, without dropout, with some noise on the adapter (as long as B is zero, A has no gradient), on
    few tokens (`fast_bytes` counts what that takes), and with a `calmed` model. Then rounding to bf16 changes the
    gradient of a matrix by a few percent of its norm (with INT8 by more: bitsandbytes rounds activations as well); one
    that is lost, as a version of the compiler did, by 100%. From then on the collator packs rows only, or not at all.
    """
    fast, start = trainer.fast, time.perf_counter()
    if fast.uses_graphs:
        say("compiling the fast step: about a minute, less when its cache on disk is warm")
    rows = [{name: list(range(2, 2 + min(tokens, most)))
             for name, tokens, most in zip(("input_ids", "labels"), row, fast.shape.longest, strict=True)}
            for row in COMPARED]
    original, thresholds = fast.flat.detach().clone(), fast.thresholds.clone()
    noise = torch.Generator(fast.device).manual_seed(0)
    try:
        fast.flat.data.add_(torch.randn(original.shape, generator=noise, device=fast.device), alpha=0.01)
        fast.thresholds.fill_(-(2**31))
        fast.model.eval()
        fast.scale.fill_(1)
        batch = {name: tensor.to(fast.device) for name, tensor in fast.pack(rows).items()}
        with calmed(fast):
            loss, expected = 0.0, [torch.zeros_like(p) for p in fast.adapter]
            for row in rows:
                one = {name: torch.tensor([ids], device=fast.device) for name, ids in row.items()}
                part = token_mean_loss(fast.model(**one, use_cache=False), one["labels"], 1)  # accelerate's autocast
                for total, gradient in zip(expected, torch.autograd.grad(part, fast.adapter), strict=True):
                    total += gradient
                loss += part.detach()
            for _ in range(2 if fast.uses_graphs else 1):  # as it stands, then by a graph: the last one counts
                fast.flat.grad.zero_()
                found_loss = fast.by_graph(batch)
        found = fast.split(fast.flat.grad)
        norms, errors = (torch.stack([g.norm() for g in gradients]).cpu() for gradients in (
            expected, [a - b for a, b in zip(found, expected, strict=True)]))
        # Beside the matrices of its own kind: those of q and k are small, as attention is calmed.
        typical = {kind: norms[[other == kind for other in fast.kinds]].square().mean().sqrt()
                   for kind in set(fast.kinds)}
        worst = float((errors / (norms + 0.1 * torch.stack([typical[kind] for kind in fast.kinds]))).max())
        loss_error = float((found_loss / loss - 1).abs())
        is_same = worst < (0.5 if trainer.settings.int8 else 0.3) and loss_error < 0.02
        reason = f"it differs from the usual step: loss by {loss_error:.2%}, gradients by up to {worst:.1%}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, for a card or a version that nobody has tried
        is_same, reason = False, f"{type(error).__name__}: {first_line(error)}"
    finally:
        fast.flat.data.copy_(original)
        fast.flat.grad.zero_()
        fast.thresholds.copy_(thresholds)
        fast.model.train()
    if any(agree(fast.device, not is_same)):
        trainer.fast = trainer.data_collator.pack = None
        say(f"the fast step is not used: {reason if not is_same else 'it differs in another process'}")
        return
    trainer.data_collator.is_padding = False
    trainer.optimizer.optimizer.flatten(fast)
    fast.is_proved["training"] = trainer.run.description["fast_step"] = True
    if fast.uses_graphs:
        say(f"the fast step agrees with the usual one (gradients within {worst:.1%}), after "
            f"{time.perf_counter() - start:.0f} s")


class FlatAdamW(torch.optim.AdamW):
    """AdamW; after `flatten`, over one vector that holds all parameters. Its state dict stays as it is."""

    flat: torch.optim.AdamW | None = None

    def flatten(self, fast: FastT5) -> None:
        state = {name: torch.zeros_like(fast.flat) for name in ("exp_avg", "exp_avg_sq")}
        steps = [self.state[p]["step"] for p in fast.adapter if p in self.state]
        state["step"] = steps[0].clone() if steps else torch.zeros((), device=fast.device)
        for name in ("exp_avg", "exp_avg_sq"):
            for p, part in zip(fast.adapter, fast.split(state[name]), strict=True):
                if steps:
                    part.copy_(self.state[p][name])
                self.state[p][name] = part
                self.state[p]["step"] = state["step"]
        self.flat = torch.optim.AdamW(fast.parameters(), fused=True, **ADAMW)
        self.flat.state[fast.flat] = state

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()  # each parameter with a `step` of its own: the usual AdamW adds 1 for each
        own = {i: state | {"step": state["step"].clone()} for i, state in whole["state"].items()}
        return whole | {"state": own}

    def step(self, closure: Callable | None = None) -> Any:
        if self.flat is None:
            return super().step(closure)
        self.flat.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.flat.found_inf = self.found_inf
        return self.flat.step()


# ---------- 15. What the command line starts --------------------------------------------------------------------------


def main(settings: Settings) -> int:
    """Does what the command line says; returns the exit code."""
    # Joins the processes of torchrun, on a CPU through gloo. Hours, because the others wait while one downloads.
    PartialState(cpu=get_device()[0].type == "cpu", timeout=timedelta(hours=12))
    check_sharding(settings)
    refuse_used_folder(settings)
    work = {"train": train, "summarize": summarize, "evaluate": evaluate_split, "export": export, "plan": plan,
            "lr_find": lr_find, "plot": plot, "compare": compare}[settings.mode]
    try:
        code = work(settings)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(out_of_memory_advice(settings)) from None
    if PartialState().num_processes > 1:
        PartialState().wait_for_everyone()  # torchrun kills the others once one has ended with another code than 0
        gc.collect()  # DDP's cycles hold the process group, whose threads must not outlive the interpreter
        PartialState().destroy_process_group()
    return code


if __name__ == "__main__":
    gc.freeze()  # collections, one after each scoring, need not look at what the imports have made
    sys.exit(exit_on_user_error(main, SETTINGS))
