"""Fine-tune Flan-T5 with LoRA to summarise dialogues (SAMSum), in one file.

    python flan-t5_samsum.py                              # tiny model, sample data: minutes on a CPU, no network
    python flan-t5_samsum.py --lr 1e-4 --model xl         # Flan-T5-XL on SAMSum, on a GPU
    python flan-t5_samsum.py --model xxl --int8           # the largest one with INT8 weights
    torchrun --nproc_per_node=4 flan-t5_samsum.py --model xl                # the same run on four GPUs
    tensorboard --logdir runs                             # watch it
    python flan-t5_samsum.py --resume                     # go on after an interruption
    python flan-t5_samsum.py --summarize chat.txt         # use what came out
    python flan-t5_samsum.py --evaluate                   # score it again
    python flan-t5_samsum.py --merge DIR                  # write a plain model without an adapter
    python flan-t5_samsum.py --model xl --plan            # before paying: memory, steps, what fits
    python flan-t5_samsum.py --model xl --lr-find         # before guessing: a learning-rate range test
    python flan-t5_samsum.py --compare runs/A runs/B      # afterwards: which run is better, and is that chance?

The file reads in the order in which the data flows:
command line -> files -> data -> model -> scores -> training -> report -> one run -> use -> experiments -> main.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------------------------
# Command line. It stands first, before torch is imported, so that --help and a wrong flag are answered at once.
# ------------------------------------------------------------------------------------------------------------------

MODELS = {
    "tiny": str(HERE / "resource" / "flan-t5-tiny"),
    "small": "google/flan-t5-small",
    "base": "google/flan-t5-base",
    "large": "google/flan-t5-large",
    "xl": "google/flan-t5-xl",
    "xxl": "philschmid/flan-t5-xxl-sharded-fp16",
}
DATASETS = {"samsum": "knkarthick/samsum", "sample": str(HERE / "resource" / "sample")}  # Samsung/samsum is gone
# The recipe of the original experiments; a preset may differ from it.
RECIPE = {"dataset": "samsum", "lr": 1e-4, "epochs": 10}
PRESETS = {"tiny": {"dataset": "sample", "lr": 3e-3, "epochs": 2}}
PREFIX = "summarize: "  # the same in training and in every kind of inference: Flan-T5 reads its task from it


class UserError(Exception):
    """Something the user can mend. It is printed as one line, and the script ends with exit code 2."""


class NotFinite(UserError):
    """The loss or its gradient is infinite or not a number."""


class Interrupted(Exception):
    """Raised inside a long computation after SIGINT or SIGTERM."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def number(kind, low, high=float("inf"), low_included=True):
    """An argparse type: a number of `kind` between `low` and `high`."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high) or value == float("inf") or (value == low and not low_included):
            limits = f"{'at least' if low_included else 'above'} {low}" + (f", at most {high}" if high < 2**64 else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range ({limits})")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def build_parser():
    parser = Parser(
        prog="flan-t5_samsum.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = number(int, 1)

    group = parser.add_argument_group("model and data")
    group.add_argument("--model", metavar="NAME",
                       help=f"{', '.join(MODELS)}, a Hub id or a folder (default: tiny)")
    group.add_argument("--dataset", metavar="NAME",
                       help="samsum, sample, a Hub id, or a file or folder of .jsonl, .json, .csv or .parquet "
                            "(default: sample with --model tiny, else samsum)")
    group.add_argument("--source-column", metavar="NAME", help="column of the dialogues (default: known by its name)")
    group.add_argument("--target-column", metavar="NAME", help="column of the summaries (default: known by its name)")
    group.add_argument("--limit", type=count, metavar="N", help="use only the first N rows of each split")
    group.add_argument("--max-source-length", type=number(int, 8), default=512, metavar="N",
                       help="tokens of a dialogue; longer ones are cut (default: %(default)s)")
    group.add_argument("--max-target-length", type=number(int, 2), default=128, metavar="N",
                       help="tokens of a reference summary in training (default: %(default)s)")

    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=number(float, 0, 1, low_included=False), metavar="X",
                       help="peak learning rate: 5%% warm-up, then linear decay (default: 1e-4; tiny: 3e-3)")
    group.add_argument("--epochs", type=count, metavar="N", help="passes over the data (default: 10; tiny: 2)")
    group.add_argument("--max-steps", type=count, metavar="N", help="stop after N optimiser steps (default: no limit)")
    group.add_argument("--batch-size", type=count, default=8, metavar="N",
                       help="examples per optimiser step, over all GPUs (default: %(default)s)")
    group.add_argument("--micro-batch-size", type=count, metavar="N",
                       help="examples per GPU at a time; the rest is accumulated (default: the whole batch)")
    group.add_argument("--gradient-checkpointing", action="store_true",
                       help="compute activations twice instead of keeping them: less memory, a third slower")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N", help="default: %(default)s")
    group.add_argument("--lora-r", type=number(int, 1, 2**16), default=16, metavar="N",
                       help="LoRA rank (default: %(default)s)")
    group.add_argument("--lora-alpha", type=number(float, 0, low_included=False), default=32, metavar="X",
                       help="LoRA's update is scaled by alpha / rank (default: %(default)s)")
    group.add_argument("--lora-dropout", type=number(float, 0, 0.99), default=0.05, metavar="X",
                       help="default: %(default)s")
    group.add_argument("--lora-targets", nargs="+", default=["q", "k", "v", "o"], metavar="NAME",
                       help="layers that get an adapter (default: q k v o, all attention projections)")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--int8", action="store_true", help="frozen weights in INT8 (bitsandbytes LLM.int8())")
    precision.add_argument("--int4", action="store_true", help="frozen weights in 4-bit NormalFloat (QLoRA)")
    precision.add_argument("--full", action="store_true", help="train all weights, without LoRA")

    group = parser.add_argument_group("summaries (in the evaluation after each epoch, and in use)")
    group.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="default: %(default)s")
    group.add_argument("--num-beams", type=count, default=1, metavar="N", help="1 is greedy (default: %(default)s)")

    group = parser.add_argument_group("files")
    group.add_argument("--output-dir", type=Path, metavar="DIR",
                       help="folder of this run (default: runs/<model>-<dataset>-lr=<lr>, never an existing one)")
    group.add_argument("--cache-dir", type=Path, metavar="DIR",
                       help="downloads and tokenised data (default: Hugging Face's own cache)")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last checkpoint of --output-dir (default: of the newest run)")

    group = parser.add_argument_group("instead of training")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--summarize", nargs="?", const="-", metavar="FILE",
                      help="summarise dialogues: text separated by blank lines, or JSONL; without FILE standard input")
    mode.add_argument("--evaluate", action="store_true", help="score an adapter, or a bare model, on --split")
    mode.add_argument("--merge", type=Path, metavar="DIR", help="write base + adapter as one plain bf16 model to DIR")
    mode.add_argument("--plan", action="store_true", help="print memory, steps and what fits; downloads no weights")
    mode.add_argument("--lr-find", action="store_true",
                      help="learning-rate range test: try rates from 1e-6 to 1 on this model and data")
    mode.add_argument("--plot", nargs="+", type=Path, metavar="LOGDIR",
                      help="draw the training loss of any Trainer's TensorBoard logs (into LOGDIR, or --output-dir)")
    mode.add_argument("--compare", nargs="+", type=Path, metavar="RUN",
                      help="table and plot of finished runs, with a paired bootstrap test for every two of them")
    group.add_argument("--adapter", metavar="DIR",
                       help="run or adapter to use (default: the newest run; 'none': the bare --model)")
    group.add_argument("--split", choices=["train", "validation", "test"], default="test",
                       help="for --evaluate (default: %(default)s)")
    return parser


# What to do and where: no part of a configuration.
NOT_CONFIGURATION = ("resume", "summarize", "evaluate", "merge", "plan", "lr_find", "plot", "compare", "adapter",
                     "split", "output_dir", "cache_dir")
# They change memory and speed; the result only by rounding and by other masks of dropout.
FREE_ON_RESUME = ("micro_batch_size", "gradient_checkpointing")


def parse_arguments(argv=None):
    """The command line with all defaults filled in.

    --resume, --summarize, --evaluate and --merge take their defaults from the configuration of the run that they
    continue or use (its metrics.json), so that nothing has to be typed twice and no score is taken with other settings.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    is_used = args.summarize is not None or args.evaluate or args.merge is not None
    is_training = not (is_used or args.plan or args.lr_find or args.plot or args.compare)
    if args.resume and not is_training:
        parser.error("argument --resume: it goes on with a training, and nothing else can be done with it")
    if args.adapter is not None and not is_used:
        parser.error("argument --adapter: only with --summarize, --evaluate or --merge; to train on, "
                     "--resume --output-dir RUN")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # it would tie T5's head to the embedding, or do nothing
        raise UserError("FSDP does not work with T5's untied head: use torchrun, and --int8 or --int4 for less memory")
    run = find_run(args)
    if run is not None:
        chosen = [name for name in ("int8", "int4", "full") if getattr(args, name)]
        saved = read_metrics(run)["configuration"]
        parser.set_defaults(**saved | (dict.fromkeys(("int8", "int4", "full"), False) if chosen else {}))
        args = parser.parse_args(argv)
        changed = [name for name, value in saved.items() if getattr(args, name) != value and name not in FREE_ON_RESUME]
        if args.resume and changed:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise UserError(f"--resume continues {run} with its own settings, and {flags} differs from them: "
                            "leave it out, or start a new run")
        if args.resume:
            args.output_dir = run
        elif args.adapter is None:
            args.adapter = str(run)
    if args.model is None:
        args.model = "tiny" if args.adapter in (None, "none") else base_of_adapter(Path(args.adapter))
    for name, value in {**RECIPE, **PRESETS.get(args.model, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, presets in (("dataset", DATASETS), ("model", MODELS)):  # a run can be continued from another folder
        if getattr(args, name) not in presets and Path(getattr(args, name)).exists():
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.micro_batch_size is None:
        args.micro_batch_size = max(1, args.batch_size // processes)
    if args.batch_size % (args.micro_batch_size * processes) and not is_used:
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size "
                        f"{args.micro_batch_size} x {processes} process(es)")
    return args


def base_of_adapter(folder):
    """The --model that an adapter without a run around it was trained on, as PEFT noted it; "tiny" if it is none."""
    path = next((path for path in (folder / "adapter", folder) if (path / "adapter_config.json").is_file()), None)
    if path is None:
        return "tiny"  # load_for_use says what is wrong, or loads a whole model
    try:
        name = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        Path(name)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path / 'adapter_config.json'} names no base: give it, --model NAME") from None
    return next((preset for preset, value in MODELS.items() if value == name), name)


def find_run(args):
    """The folder of the run that --resume, --summarize, --evaluate or --merge is about; None for a new run."""
    if args.resume:
        return args.output_dir or newest_run("checkpoint-*")
    if (args.summarize is None and not args.evaluate and args.merge is None) or args.adapter == "none":
        return None
    if args.adapter is None:
        return newest_run("adapter", "model")
    folder = Path(args.adapter)
    candidates = [run for run in (folder, folder.parent) if (run / "metrics.json").is_file()]
    return candidates[0] if candidates else None


def newest_run(*contents):
    runs = [run for run in Path("runs").glob("*") for name in contents if any(run.glob(name))]
    runs = [run for run in runs if (run / "metrics.json").is_file()]
    if not runs:
        raise UserError(f"no run with {' or '.join(contents)} in {Path('runs').resolve()}: "
                        "train first, or name one (--adapter DIR, --output-dir DIR)")
    return max(runs, key=lambda run: (run / "metrics.json").stat().st_mtime)


def read_metrics(run):
    try:
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        return metrics | {"configuration": dict(metrics["configuration"])}
    except OSError:
        raise UserError(f"{run} holds no run (no metrics.json)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'metrics.json'} is damaged ({error!r})") from None


def exit_on_user_error(work, *arguments):
    """Calls `work`; a mistake of the user's becomes one line and exit code 2 instead of a traceback."""
    try:
        return work(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who read the output has gone (`| head`); nothing more may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as if ended by SIGPIPE
    except OSError as error:  # a full disk, a file without permission: the text says which and why
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    ARGUMENTS = exit_on_user_error(parse_arguments)

# ------------------------------------------------------------------------------------------------------------------
# The slow imports, and what must be set before them.
# ------------------------------------------------------------------------------------------------------------------

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning about forked tokenizers
# Threads that wait should sleep: where other programs share the cores, spinning makes a CPU many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "LOCAL_RANK" not in os.environ:  # without torchrun one GPU is used: the Trainer would take all, by slow DataParallel
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for every 8-bit matmul

import contextlib
import csv
import gc
import hashlib
import importlib.metadata
import io
import math
import pickle
import platform
import re
import shlex
import shutil
import textwrap
import threading
import time
import warnings
from datetime import timedelta

import bitsandbytes
import datasets
import evaluate
import huggingface_hub
import matplotlib
import numpy as np
import peft
import pyarrow.parquet
import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rouge_score import rouge_scorer
from safetensors import SafetensorError
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

matplotlib.use("Agg")  # plots go to files: no screen is needed
from matplotlib import pyplot as plt

warnings.filterwarnings("ignore", category=FutureWarning)  # notes between the libraries, not for users
transformers.logging.set_verbosity_error()
if not sys.stderr.isatty():
    transformers.logging.disable_progress_bar()
datasets.logging.set_verbosity_error()
datasets.disable_progress_bars()


def is_main_process():
    return int(os.environ.get("RANK", 0)) == 0


def say(*lines, file=None):
    """Prints, once, however many processes there are."""
    if is_main_process():
        print(*lines, sep="\n", file=file or sys.stdout, flush=True)


# ------------------------------------------------------------------------------------------------------------------
# Files: complete or absent, whatever happens while they are written.
# ------------------------------------------------------------------------------------------------------------------


def write_json(path, content):
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def replace_folder(written, folder):
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


def cannot_write(folder, error):
    """A UserError for a failure to write. torch.save and safetensors report a full disk in errors of their own."""
    reason = getattr(error, "strerror", None) or first_line(error)
    way = "make room, or choose another folder"
    if (folder / "metrics.json").is_file():
        way = f"make room, then go on with --resume --output-dir {folder}"
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return UserError(f"cannot write to {folder}: {reason} ({shutil.disk_usage(disk).free >> 20:,} MiB free); {way}")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def checkpoints(run):
    """The whole checkpoints of a run, the oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def is_complete(checkpoint):
    """Whether all files of a checkpoint are there: the Trainer itself would go on without some of them."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
    return all(any(checkpoint.glob(name)) for name in files)


def find_checkpoint(run):
    """The newest whole checkpoint of a run, or None; one that was being written when the run died is passed over."""
    found = checkpoints(run)
    partial = [path for path in found if not is_complete(path)] + sorted(run.glob("checkpoint.incomplete/checkpoint-*"))
    for path in partial:
        say(f"passed over {path}: it was not written to its end")
    found = [path for path in found if path not in partial]
    say(f"going on from {found[-1]}" if found else f"{run} has no checkpoint yet: it starts with the first step")
    return found[-1] if found else None


@contextlib.contextmanager
def loading_checkpoint(checkpoint):
    way = "delete this folder to go on from the checkpoint before it"
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{checkpoint} is damaged or has code in it, which is not run: {way}") from None
    except Exception as error:
        raise UserError(f"{checkpoint} is damaged ({first_line(error)}): {way}") from None


# ------------------------------------------------------------------------------------------------------------------
# Data: from the Hub, a file or a folder, to rows of id, dialogue and summary, to tokens.
# ------------------------------------------------------------------------------------------------------------------

COLUMNS = {  # known names of the two columns, in lower case; anything else must be named by a flag
    "source": ("dialogue", "dialog", "conversation", "transcript", "document", "article"),
    "target": ("summary", "highlights", "abstract"),
}
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
               "val": "validation", "dev": "validation", "test": "test", "testing": "test"}


def fetch(repo_id, repo_type, cache_dir=None, weights=True):
    """Downloads what is needed of a Hub repository, or finds it in the cache; returns its local folder (a Path).

    Everything after this works on folders, so nothing else can touch the network. Offline (HF_HUB_OFFLINE=1, or no
    connection) the cached copy is used; without one a UserError names the way out.
    """
    files, obstacle = ask_hub(repo_id, repo_type)
    patterns = [f"*{suffix}" for suffix in FILE_TYPES]
    if repo_type == "model":  # the weights only once: a repository may hold them in five formats
        # A .bin that is not in the cache would count as a gap, so .bin is asked for only where the Hub has no other.
        only_bin = files and not any(name.endswith(".safetensors") for name in files)
        patterns = ["*.json", "*.model", *(["*.bin" if only_bin else "*.safetensors"] if weights else [])]
    try:
        with PartialState().main_process_first():
            return Path(huggingface_hub.snapshot_download(repo_id, repo_type=repo_type, allow_patterns=patterns,
                                                          cache_dir=cache_dir, local_files_only=obstacle is not None))
    except huggingface_hub.errors.GatedRepoError:  # the names of its files are shown to everybody
        raise UserError(f"{repo_id} asks for a licence: accept it on its Hub page, then `hf auth login`") from None
    except Exception as error:  # a broken connection, in classes of the Hub client's HTTP library; a full disk
        raise UserError(f"cannot get {repo_type} {repo_id} from the Hub ({obstacle or first_line(error)}), and it is "
                        f"not in the cache. Offline, copy it here and give the folder: --{repo_type} FOLDER") from None


hub_is_silent = threading.Event()  # then it is not waited for a second time


def ask_hub(repo_id, repo_type, seconds=8):
    """The file names of a repository, and None or the reason why the Hub does not answer.

    The Hub's own functions try again for minutes, or wait without end when a server is silent or a name cannot be
    looked up. One attempt, in a thread that can be left behind, tells within `seconds`.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return [], "HF_HUB_OFFLINE is set"
    answer = [[], f"no answer within {seconds} seconds"]

    def ask():
        try:
            info = huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type)
            answer[:] = [file.rfilename for file in info.siblings], None
        except Exception as error:
            answer[:] = [], error

    if not hub_is_silent.is_set():
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
    files, obstacle = answer
    if isinstance(obstacle, str):
        hub_is_silent.set()
    if isinstance(obstacle, (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError)):
        raise UserError(f"there is no {repo_type} {repo_id} on the Hub (or it is private: `hf auth login`)")
    return files, first_line(obstacle) if isinstance(obstacle, Exception) else obstacle


def read_file(path):
    """Rows (dictionaries) of a .jsonl, .json, .csv or .parquet file; UserError with file and line if it is broken."""
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x}): convert it") from None
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if path.suffix == ".csv":
        return read_csv(path, text)
    if path.suffix == ".json":
        rows = [(1, parse_json(path, 1, text))]
        if isinstance(rows[0][1], list):
            rows = [(f"row {i}", row) for i, row in enumerate(rows[0][1], 1)]
    else:
        rows = [(i, parse_json(path, i, line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for place, row in rows:
        if not isinstance(row, dict) or (path.suffix == ".json" and place == 1):
            raise UserError(f"{path}:{place}: expected rows such as {{\"dialogue\": ..., \"summary\": ...}} "
                            f"({'a list of them' if path.suffix == '.json' else 'one a line'}), found "
                            f"{'an object' if isinstance(row, dict) else type(row).__name__}")
    return [row for _, row in rows]


def read_csv(path, text):
    csv.field_size_limit(2**31 - 1)  # a dialogue may be longer than the module's limit of 128 KiB
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:  # the line numbers of the reader are those of the last good row
        raise UserError(f"{path}:{reader.line_num + 1}: broken CSV ({error})") from None
    twice = {name for name in reader.fieldnames or () if reader.fieldnames.count(name) > 1}
    if twice:
        raise UserError(f"{path}: two columns are called {min(twice)}: rename one")
    if any(None in row for row in rows):
        raise UserError(f"{path}: a row has more fields than the header names: quote fields that hold commas")
    return rows


def parse_json(path, line_number, text):
    try:
        return json.loads(text)
    except ValueError as error:
        line_number += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line_number}: not valid JSON ({getattr(error, 'msg', error)})") from None
    except RecursionError:
        raise UserError(f"{path}:{line_number}: not usable JSON (nested too deeply)") from None


def find_files(folder):
    """{split: [files]} of a folder such as SAMSum's: the split is a word in the name of the file or of its folder."""
    splits = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in FILE_TYPES and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            words = re.findall("[a-z]+", path.stem.lower()) or re.findall("[a-z]+", path.parent.name.lower())
            names = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
            if len(names) == 1:
                splits.setdefault(names.pop(), []).append(path)
    for split, paths in splits.items():
        folders = sorted({str(path.parent) for path in paths})
        if len(folders) > 1:  # several configurations of a Hub data set, for example
            raise UserError(f"{folder} has {split} files in several folders: give one of them, {' or '.join(folders)}")
    return splits


def load_splits(name, cache_dir=None):
    """{"train", "validation", "test": rows as they stand in the files} of --dataset."""
    path = Path(DATASETS.get(name, name))
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise UserError(f"{path}: only {', '.join(FILE_TYPES)} files can be read")
        rows = read_file(path)
        tenth = len(rows) // 10
        if not tenth:
            raise UserError(f"{path} has {len(rows)} rows: at least 10 are needed to hold out validation and test")
        say(f"{path.name} is one file: the last {tenth} rows become test, the {tenth} before them validation")
        return {"train": rows[: -2 * tenth], "validation": rows[-2 * tenth : -tenth], "test": rows[-tenth:]}
    if not path.is_dir():
        if looks_like_path(name) or "/" not in str(path):
            raise UserError(f"no dataset {name}: give samsum, sample, a Hub id (owner/name), or a file or folder")
        path = fetch(str(path), "dataset", cache_dir)
    files = find_files(path)
    missing = [split for split in ("train", "validation", "test") if split not in files]
    if missing:
        raise UserError(f"{name} lacks {' and '.join(missing)}: expected train, validation and test (.jsonl, ...) "
                        f"in {path}, found {', '.join(files) or 'none'} (one file alone is split for you)")
    return {split: [row for file in paths for row in read_file(file)] for split, paths in files.items()}


def looks_like_path(name):
    return name.startswith((".", "/", "~")) or name.endswith(FILE_TYPES) or name.count("/") > 1


def find_column(rows, kind, chosen):
    """The column of dialogues (`kind` "source") or summaries ("target"): as chosen, else by its name, never guessed."""
    present = list(dict.fromkeys(column for row in rows[:1000] for column in row))
    if chosen is not None:
        if chosen not in present:
            raise UserError(f"there is no column {chosen} (--{kind}-column); there are: {', '.join(map(str, present))}")
        return chosen
    known = [column for column in present if str(column).lower() in COLUMNS[kind]]
    if len(known) != 1:
        raise UserError(f"cannot tell the {kind} among {', '.join(map(str, present))}: name it, --{kind}-column NAME")
    return known[0]


def normalize_newlines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def load_data(args):
    """A DatasetDict with train, validation and test, each with the text columns id, dialogue and summary.

    Line breaks become "\\n" (most of SAMSum's test rows have "\\r\\n", its train rows do not). Rows without a dialogue
    or a summary cannot be learnt from or scored: they are dropped, and the run says how many.
    """
    splits = load_splits(args.dataset, args.cache_dir)
    if not splits["train"]:
        raise UserError(f"the train split of {args.dataset} is empty")
    source = find_column(splits["train"], "source", args.source_column)
    target = find_column(splits["train"], "target", args.target_column)
    tables = {}
    for split in ("train", "validation", "test"):
        rows = splits[split]
        table, dropped = {"id": [], "dialogue": [], "summary": []}, 0
        for i, row in enumerate(rows, 1):
            texts = []
            for column in (source, target):
                if column not in row:
                    raise UserError(f"row {i} of {split} has no column {column}")
                if row[column] is not None and not isinstance(row[column], str):
                    raise UserError(f"row {i} of {split}: {column} is {type(row[column]).__name__}, not text")
                texts.append(normalize_newlines(row[column] or ""))
            if not all(texts):
                dropped += 1
                continue
            table["id"].append(str(row["id"]) if row.get("id") is not None else f"{split}-{i}")
            table["dialogue"].append(texts[0])
            table["summary"].append(texts[1])
            if len(table["id"]) == args.limit:
                break
        if dropped:
            say(f"{split}: dropped {dropped} row(s) without {source} or {target}")
        if not table["id"]:
            raise UserError(f"the {split} split of {args.dataset} is empty")
        tables[split] = datasets.Dataset.from_dict(table)
    return datasets.DatasetDict(tables)


def fingerprint(*parts):
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def encode(tokenizer, texts, limit):
    """Token ids of `texts`, each cut to `limit` tokens with the end token last, and for each whether it was cut."""
    rows = tokenizer(texts).input_ids
    cut = [row if len(row) <= limit else [*row[: limit - 1], tokenizer.eos_token_id] for row in rows]
    return cut, [len(row) > limit for row in rows]


def tokenize(data, tokenizer, args):
    """Adds input_ids and labels (lists of token ids, the end token last) to each split, and whether they were cut:
    `truncated` and `labels_truncated` (bool).

    `Dataset.map` reuses an explicitly named cache file whatever is in it, so everything that the tokens depend on is in
    the name: the rows, the tokenizer, the prefix and both lengths. And the new columns.
    """
    columns = ("input_ids", "truncated", "labels", "labels_truncated")

    def preprocess(batch):
        sources = encode(tokenizer, [PREFIX + text for text in batch["dialogue"]], args.max_source_length)
        labels = encode(tokenizer, batch["summary"], args.max_target_length)
        return dict(zip(columns, (*sources, *labels), strict=True))

    folder = Path(args.cache_dir or huggingface_hub.constants.HF_HOME) / "tokenized"
    settings = [tokenizer.backend_tokenizer.to_str(), PREFIX, args.max_source_length, args.max_target_length,
                columns]
    result = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with PartialState().main_process_first():
            for split, rows in data.items():
                name = f"{split}-{fingerprint(rows.to_dict(), *settings)}.arrow"
                result[split] = rows.map(preprocess, batched=True, cache_file_name=str(folder / name))
    except OSError as error:
        raise UserError(f"cannot write tokens to {folder}: {error.strerror}; another folder: --cache-dir DIR") from None
    return datasets.DatasetDict(result)


# ------------------------------------------------------------------------------------------------------------------
# Model: a base from the Hub or a folder, in bf16, INT8 or NF4, and its LoRA adapter.
# ------------------------------------------------------------------------------------------------------------------


def get_device():
    """The device of this process, and the precision of its matrix products: bf16 where the hardware has it, else fp32.

    Never fp16: activations of T5 overflow in it. A T4 or V100 only emulates bf16, hence the look at the capability.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu"), torch.float32


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"


def find_model(name, cache_dir=None, weights=True):
    """The local folder of --model: a preset, a folder or a Hub id (downloaded, with or without its weights)."""
    path = Path(MODELS.get(name, name))
    if not path.is_dir():
        if name not in MODELS and (looks_like_path(name) or "/" not in name):
            raise UserError(f"no model {name}: give one of {', '.join(MODELS)}, a Hub id (owner/name) or a folder")
        path = fetch(str(path), "model", cache_dir, weights)
    return path


def load_tokenizer_and_config(folder):
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


def without_weights(config):
    """The model of a T5Config on the meta device: shapes, and no memory."""
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    # transformers 5.23 calls every T5 tied and keeps what the config said in another place.
    if not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def load_base(folder, device, dtype, quantization=None):
    """The pretrained model on `device`, in `dtype`, its linear layers in "int8" or "int4" (NF4) if asked for.

    These are the first two of the three steps of bitsandbytes (configure, load, prepare). The third is left out:
    `prepare_model_for_kbit_training` would keep `wo` and the embeddings in fp32, which takes back much of the memory
    that INT8 saves, and all that training needs of it is frozen weights (LoRA freezes them) and, with gradient
    checkpointing, the non-re-entrant kind (chosen in `train`). So training and inference load alike.
    """
    quantizers = {
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "int4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }
    options = {}
    if quantization:
        options["quantization_config"] = quantizers[quantization]()
    try:
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, output_loading_info=True, **options
        )
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
    # `generate` would fill what its settings leave open from the checkpoint's own (no_repeat_ngram_size, max_length).
    tokens = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(model.config, name) for name in tokens})
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.register_forward_hook(forget_input)
        if isinstance(module, bitsandbytes.nn.Linear4bit) and device.type == "cpu":
            module.support_avx512bf16_for_cpu = False  # its packed inference kernel lets no gradient through afterwards
    return model.eval()


def forget_input(module, inputs, output):
    """Forward hook of an INT8 layer, whose weights are frozen.

    bitsandbytes 0.50 keeps the input for a gradient of the weights all the same, and out of sight of gradient
    checkpointing: for XXL, 2 GiB, with checkpointing 3.
    """
    function = output.grad_fn
    if hasattr(function, "tensors"):  # CUDA
        function.tensors = (None, None, None)
    elif hasattr(function, "A"):  # CPU
        function.A = None


def quantization_of(args):
    return "int8" if args.int8 else "int4" if args.int4 else None


def add_lora(model, args):
    """Wraps `model` with a new adapter (Hu et al. 2021): W x + (alpha / r) B A x, with A random and B zero.

    The base is frozen. The adapter is kept in fp32 whatever the dtype of the base (PEFT's default).
    """
    config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias="none",
                        target_modules=args.lora_targets, task_type=TaskType.SEQ_2_SEQ_LM)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-targets {' '.join(args.lora_targets)}: {first_line(error)}") from None


def load_adapter(model, folder):
    """Puts a trained adapter on its base, for inference: nothing is prepared, moved or cast."""
    try:
        with warnings.catch_warnings():  # it would leave what is missing at its random start
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except torch.OutOfMemoryError:
        raise
    except UserWarning:
        raise UserError(f"the adapter {folder} does not fit {model.config.name_or_path}: it lacks weights") from None
    except pickle.UnpicklingError:
        raise UserError(f"the adapter {folder} has code in it, which is not run: use .safetensors") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        detail = lines[1] if "size mismatch" in str(error) and len(lines) > 1 else lines[0]
        raise UserError(f"the adapter {folder} does not fit {model.config.name_or_path}: {detail[:200]}") from None


@contextlib.contextmanager
def merged_adapter(model):
    """Merges the adapter into the base weights for a while: the same function, and faster to generate with.

    Subtracting the adapter again would not give back the same bits, so the original matrices are kept and put back.
    Price: a copy of the adapted matrices in main memory. Quantised weights are left alone, as merging would round them.
    """
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    if not isinstance(model, PeftModel) or not layers or getattr(model, "is_quantized", False):
        yield model
        return
    weights = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.detach().to("cpu", copy=True) for weight in weights]  # on the host: the GPU may have no room
    model.merge_adapter()
    try:
        yield model
    finally:
        model.unmerge_adapter()
        for weight, original in zip(weights, originals, strict=True):
            weight.data.copy_(original)


def save_model(model, tokenizer, folder, args):
    """Writes a whole model that every version of transformers reads alike and that summarises as long as it did here.

    transformers 5.23 writes `tie_word_embeddings: true` for every T5, also for Flan-T5, whose head is a matrix of its
    own; another version would then tie the two and drop the head.
    """
    model.generation_config.update(max_new_tokens=args.max_new_tokens, num_beams=args.num_beams)  # else 20 tokens
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        path = folder / "config.json"
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"tie_word_embeddings": False})


def save_result(model, tokenizer, folder, args):
    """Writes the adapter in PEFT's format (or, after --full, the model) and the tokenizer; all of it or nothing."""
    temporary = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(temporary, save_embedding_layers=False)
        # The name of the base, not its folder in the Hub's cache. In the model itself it would make PEFT ask the Hub
        # whenever the Trainer saves a checkpoint.
        path, base = temporary / "adapter_config.json", {"base_model_name_or_path": MODELS.get(args.model, args.model)}
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | base)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
        tokenizer.save_pretrained(temporary)
    else:
        save_model(model, tokenizer, temporary, args)
    replace_folder(temporary, folder)


# ------------------------------------------------------------------------------------------------------------------
# Scores: generation, and ROUGE with its bootstrap interval.
# ------------------------------------------------------------------------------------------------------------------

ROUGE_TYPES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


@torch.inference_mode()
def generate_summaries(model, tokenizer, sources, args, precision, batch_size=None, stop=lambda: False):
    """Summaries (strings) of `sources` (lists of token ids), in the order of `sources`.

    All text of this script is generated here. Batches hold rows of similar length, the longest first, so that little is
    padded and memory that does not suffice shows at once: then the batch is halved. Several processes share the rows.
    Without `max_new_tokens` a summary would end after 20 tokens.
    """
    device = model.device
    settings = GenerationConfig(max_new_tokens=args.max_new_tokens, num_beams=args.num_beams, do_sample=False)
    state = PartialState()
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    mine = order[state.process_index :: state.num_processes]
    batch_size = batch_size or max(1, (256 if device.type == "cuda" else 32) // args.num_beams)
    autocast = torch.autocast(device.type, precision, enabled=precision != model.dtype)
    summaries, start = {}, 0
    bar = tqdm(total=len(mine), desc="summaries", unit="row", leave=False, dynamic_ncols=True, disable=None)
    while start < len(mine):
        if stop():
            raise Interrupted
        rows = mine[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [sources[i] for i in rows]}, pad_to_multiple_of=64 if device.type == "cuda"
                              else 8, return_tensors="pt").to(device)
        try:
            with autocast:
                output = model.generate(**batch, generation_config=settings)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            output = None
        if output is None:  # out here, as the exception holds on to what it had computed
            batch_size = len(rows) // 2
            torch.cuda.empty_cache()
            continue
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        summaries.update(zip(rows, (text.strip() for text in texts), strict=True))
        start += len(rows)
        bar.update(len(rows))
    bar.close()
    if state.num_processes > 1:
        parts = [None] * state.num_processes
        torch.distributed.all_gather_object(parts, summaries)
        summaries = {i: text for part in parts for i, text in part.items()}
    return [summaries[i] for i in range(len(sources))]


class Rouge(evaluate.Metric):
    """ROUGE F1 in percent for each row, by rouge_score with the Porter stemmer, as Hugging Face's example reports it.

    A local metric, because `evaluate.load("rouge")` needs the Hub. ROUGE-Lsum compares sentence by sentence, and
    sentences are taken to end at white space after . ! or ? (Lin 2004 leaves the splitting open).
    """

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="ROUGE per row", citation="Lin 2004", inputs_description=__doc__,
                                   features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions, references):
        scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
        rows = [scorer.score(one_sentence_a_line(reference), one_sentence_a_line(prediction))
                for prediction, reference in zip(predictions, references, strict=True)]
        return {kind: [100 * row[kind].fmeasure for row in rows] for kind in ROUGE_TYPES}


def one_sentence_a_line(text):
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


def bootstrap_interval(scores, samples=1000, seed=0):
    """95% percentile bootstrap interval (Efron and Tibshirani 1993) of the mean of `scores` [rows]: (low, high)."""
    scores, rng = np.asarray(scores), np.random.default_rng(seed)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(samples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def score(model, tokenizer, rows, args, precision, stop=lambda: False):
    """Summarises `rows` (a tokenised split) and compares with the references.

    Returns the scores, {"rouge1": mean, "rouge1_interval": [low, high], ...}, and the rows with their predictions.
    The raw references are compared, not the labels, which may be truncated.
    """
    predictions = generate_summaries(model, tokenizer, rows["input_ids"], args, precision, stop=stop)
    metric = Rouge(keep_in_memory=True)
    per_row = metric.compute(predictions=predictions, references=list(rows["summary"]))
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


def protocol(args, data):
    """How the scores were taken. Only scores of one and the same protocol can be compared."""
    return {
        "decoding": "greedy" if args.num_beams == 1 else f"beam search with {args.num_beams} beams",
        "max_new_tokens": args.max_new_tokens, "prefix": PREFIX, "rouge": "rouge_score F1", "stemmer": True,
        "sentences": "split at white space after . ! ?", "interval": "95% percentile bootstrap over rows, 1000 samples",
        "max_source_length": args.max_source_length,
        "rows": {split: len(rows) for split, rows in data.items()},
        "truncated": {split: round(float(np.mean(rows["truncated"])), 4) for split, rows in data.items()},
    }


def describe(protocol):
    rows = ", ".join(f"{count} {split} ({protocol['truncated'][split]:.1%} truncated)"
                     for split, count in protocol["rows"].items() if split != "train" or len(protocol["rows"]) == 1)
    return (f"Protocol: {protocol['decoding']}, at most {protocol['max_new_tokens']} new tokens; {protocol['rouge']} "
            f"with stemmer, sentences {protocol['sentences']}; rows: {rows} to {protocol['max_source_length']} tokens; "
            f"in brackets the {protocol['interval']}.")


# ------------------------------------------------------------------------------------------------------------------
# Training: Seq2SeqTrainer, with an exact loss, resumable order, scores after each epoch and whole checkpoints.
# ------------------------------------------------------------------------------------------------------------------


class StopSignal:
    """Remembers the first SIGINT or SIGTERM, so that the step can end and be saved; a second one stops at once.

    The same signal within a second is taken for the first: torchrun passes on what a scheduler, or Ctrl-C, has already
    sent to each process.
    """

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if not self.number:
            self.number, self.received = number, time.monotonic()
            say("\nstopping after this step and saving (once more: stop at once)", file=sys.stderr)
        elif number != self.number or time.monotonic() - self.received > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __call__(self):
        return bool(self.number)


class LengthGroupedSampler(torch.utils.data.Sampler):
    """A new permutation of the rows for each epoch, in which the rows of one optimiser step have similar lengths.

    The rows are shuffled, cut into chunks of 50 batches, sorted by length within each chunk and shuffled again batch by
    batch: little padding, nearly full randomness. The order is a function of seed and epoch alone (the Trainer's own
    sampler draws from the global generator), so a resumed run sees the same batches.

    An epoch is filled up to a multiple of `multiple_of` rows with the index len(lengths), an empty row: where the last
    batch does not suffice for all processes, they would otherwise be given rows of the first batch once more.
    """

    def __init__(self, lengths, batch_size, seed, multiple_of=1):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.multiple_of = multiple_of

    def __len__(self):
        return len(self.lengths) + -len(self.lengths) % self.multiple_of

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(self.order(self.epoch))

    def order(self, epoch):
        rng = np.random.default_rng([self.seed, epoch])
        order, chunk = rng.permutation(len(self.lengths)), 50 * self.batch_size
        batches = []
        for start in range(0, len(order), chunk):
            rows = sorted(order[start : start + chunk].tolist(), key=lambda i: -self.lengths[i])
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a smaller batch must come last
        batches = [batches[i] for i in rng.permutation(len(batches))]
        longest = max(range(len(batches)), key=lambda b: self.lengths[batches[b][0]], default=0)
        if epoch == 0 and batches:  # memory that does not suffice shows in the first step
            batches[0], batches[longest] = batches[longest], batches[0]
        empty = [len(self.lengths)] * (len(self) - len(self.lengths))
        return [i for batch in batches + last for i in batch] + empty


class Collator(DataCollatorForSeq2Seq):
    """Pads a batch, labels with -100, and counts its real tokens (source and target) on the host."""

    tokens = 0

    def __call__(self, rows):
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        self.tokens += sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
        return super().__call__(rows)


def token_mean_loss(outputs, labels, num_items_in_batch):
    """Cross-entropy in nats per target token: `logits` [batch, target, vocabulary], `labels` [batch, target].

    Divided by the tokens of the whole optimiser step, not of this micro-batch: a mean of means would weigh the tokens
    of short micro-batches more. (The Trainer leaves the division to T5, which ignores it: transformers issue 47688.)
    """
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(),
                                             ignore_index=-100, reduction="sum")
    return loss / num_items_in_batch


class EpochForSampler(TrainerCallback):
    """Tells the sampler which epoch it is: the Trainer's own message is lost when several processes resume in one."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class SummarizationTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer, and where it differs:

    - `evaluate` scores validation and test by generation (`score`), and keeps the adapter of the best epoch;
    - the order of the rows comes from `LengthGroupedSampler`;
    - a checkpoint is complete or absent: it is written aside and renamed;
    - the log has samples/s, tokens/s and memory.
    """

    def __init__(self, *, run, data, settings, precision, stop, **kwargs):
        self.run, self.data, self.settings, self.precision, self.stop = run, data, settings, precision, stop
        lengths = [len(tokens) for tokens in data["train"]["input_ids"]]
        processes = PartialState().num_processes
        together = settings.micro_batch_size * processes if processes > 1 else 1
        self.sampler = LengthGroupedSampler(lengths, settings.batch_size, settings.seed, multiple_of=together)
        rows = data["train"].select_columns(["input_ids", "labels"])
        if len(self.sampler) > len(rows):
            empty = datasets.Dataset.from_dict({"input_ids": [[0]], "labels": [[-100]]}, features=rows.features)
            rows = datasets.concatenate_datasets([rows, empty])
        super().__init__(train_dataset=rows, eval_dataset=data["validation"], compute_loss_func=token_mean_loss,
                         **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is complete; T5 has no use for the number of tokens
        self.since, self.tokens_since, self.step_since = time.perf_counter(), 0, 0
        self.recent = []  # step and loss of each micro-batch since the last log
        self.add_callback(EpochForSampler(self.sampler))

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.recent.append((self.state.global_step, loss))  # stays on its device: nothing has to wait for it
        return loss

    def stop_at_bad_loss(self):
        """Ends the run with a UserError that names the first step whose loss is not finite, and its rows."""
        losses = self.accelerator.reduce(torch.stack([loss for _, loss in self.recent]), "sum")
        bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
        step, loss = (self.recent[bad[0]][0], f"loss is {losses[bad[0]]}") if bad else (
            self.recent[-1][0], "gradient is not finite")
        epoch, place = divmod(step, math.ceil(len(self.data["train"]) / self.settings.batch_size))
        size = self.settings.batch_size
        rows = [self.data["train"]["id"][i] for i in self.sampler.order(epoch)[place * size : (place + 1) * size]
                if i < len(self.data["train"])]
        raise NotFinite(f"the {loss} in step {step + 1}, with the rows {', '.join(rows)}: look at these, "
                        "or try a lower --lr")

    def log(self, logs, start_time=None):
        if "loss" in logs:
            now = time.perf_counter()
            seconds, steps = now - self.since, self.state.global_step - self.step_since
            tokens = (self.data_collator.tokens - self.tokens_since) * self.args.world_size
            logs["seconds"] = round(seconds, 3)
            logs["samples_per_second"] = round(steps * self.settings.batch_size / seconds, 2)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            logs["peak_memory_gib"] = peak_memory_gib(self.args.device)
            self.restart_clock()
            if not math.isfinite(logs["loss"] + logs["grad_norm"]):
                self.stop_at_bad_loss()
            self.recent.clear()
        super().log(logs, start_time)

    def restart_clock(self):
        """So that speed and memory in the log are those of training alone, without evaluations and checkpoints."""
        self.since, self.tokens_since = time.perf_counter(), self.data_collator.tokens
        self.step_since = self.state.global_step
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)

    def evaluate(self, *args, **kwargs):
        """Scores validation and test, logs them, and keeps the adapter if validation ROUGE-1 is the best so far.

        Called by the Trainer before the first step (a resumed run may have been scored there) and after each epoch.
        """
        done = evaluations(self.state.log_history)
        at_start_of_resumed_epoch = self.state.global_step and not float(self.state.epoch).is_integer()
        if any(e["step"] == self.state.global_step for e in done) or (
            at_start_of_resumed_epoch and self.state.global_step < self.state.max_steps
        ):
            return {}
        start, entry, examples = time.perf_counter(), {}, {}
        stop = self.stop if self.args.world_size == 1 else lambda: False  # ranks must not part company
        self.model.eval()
        try:
            with merged_adapter(self.model):
                for split in ("validation", "test"):
                    entry[split], examples[split] = score(self.model, self.processing_class, self.data[split],
                                                          self.settings, self.precision, stop=stop)
        except Interrupted:
            if self.state.global_step == 0 or (self.run / f"checkpoint-{self.state.global_step}").is_dir():
                raise  # nothing has been trained since the last checkpoint
            self.control.should_training_stop = True  # the Trainer saves next; scored when the run goes on
            return {}
        entry["seconds"] = round(time.perf_counter() - start, 2)
        epoch = epoch_number(self.state.epoch)
        if self.is_world_process_zero():
            try:
                for split, rows in examples.items():
                    write_jsonl(self.run / "predictions" / f"{split}-epoch-{epoch}.jsonl", rows)
                if all(entry["validation"]["rouge1"] > e["validation"]["rouge1"] for e in done):
                    save_result(self.model, self.processing_class, self.run / result_name(self.settings), self.settings)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise cannot_write(self.run, error) from None
        self.log(entry)
        self.callback_handler.call_event("on_evaluate", self.args, self.state, self.control, examples=examples)
        self.model.train()
        self.restart_clock()
        return {}

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)  # into args.output_dir, which is a folder aside
        except (OSError, RuntimeError, SafetensorError) as error:
            raise cannot_write(self.run, error) from None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"checkpoint-{self.state.global_step}"
            replace_folder(Path(self.args.output_dir) / name, self.run / name)
            for old in checkpoints(self.run)[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()  # at its end the Trainer of each process looks at what is being renamed
        self.restart_clock()

    # The Trainer reads a checkpoint in three places, all without running code that it may hold (weights_only=True).
    def _load_from_checkpoint(self, checkpoint, *args):
        with loading_checkpoint(checkpoint):
            super()._load_from_checkpoint(checkpoint, *args)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with loading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with loading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)


def result_name(args):
    return "model" if args.full else "adapter"


def peak_memory_gib(device):
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(getrusage(RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def training_arguments(args, run, device, precision, steps, **changes):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    arguments = {
        "output_dir": str(run / "checkpoint.incomplete"),
        "num_train_epochs": args.epochs, "max_steps": args.max_steps or -1, "seed": args.seed,
        "per_device_train_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.batch_size // (args.micro_batch_size * processes),
        "learning_rate": args.lr, "lr_scheduler_type": "linear", "warmup_steps": 0.05, "optim": "adamw_torch_fused",
        "bf16": precision == torch.bfloat16, "use_cpu": device.type == "cpu",
        "eval_strategy": "epoch", "eval_on_start": True, "save_strategy": "epoch",
        "logging_steps": max(1, min(10, steps // 20)),
        "logging_nan_inf_filter": False,  # the filter would wait for the GPU
        "report_to": [], "disable_tqdm": True, "ddp_find_unused_parameters": False, "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
    }
    return Seq2SeqTrainingArguments(**arguments | changes)


class Reporter(TrainerCallback):
    """Shows a run while it goes: progress bar or lines, TensorBoard, the growing table, metrics.json and plots."""

    def __init__(self, run, report, stop, writer):
        self.run, self.report, self.stop, self.writer = run, report, stop, writer
        self.bar, self.last_line, self.header_shown = None, 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True,
                            disable=None)  # a bar at a terminal only
            self.last_line = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)
        if self.stop_is_agreed(args, state):
            control.should_training_stop = control.should_save = control.should_log = True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = True  # so that no mean spans a checkpoint: a resumed run logs what the other one does
        if self.stop() and control.should_training_stop:
            control.should_evaluate = control.should_save = False  # saved already; scored when the run goes on

    def stop_is_agreed(self, args, state):
        """Processes must stop at the same step. They compare notes only when the loss is logged, which waits anyway."""
        if args.world_size == 1:
            return self.stop()
        if state.global_step % args.logging_steps:
            return False
        flag = torch.tensor(int(self.stop()), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag:
            self.stop.number = self.stop.number or signal.SIGTERM
        return bool(flag)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.writer is None:
            return
        if "loss" in logs:
            for name in ("loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second",
                         "peak_memory_gib"):
                self.writer.add_scalar(f"train/{name}", logs[name], state.global_step)
            self.show_progress(state, logs)
        for split in ("validation", "test"):
            for kind in ROUGE_TYPES if split in logs else ():
                self.writer.add_scalar(f"{split}/{kind}", logs[split][kind], state.global_step)

    def show_progress(self, state, logs):
        line = (f"epoch {state.epoch:.2f}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
                f"{logs['samples_per_second']:.1f} samples/s  {logs['peak_memory_gib']:.1f} GiB")
        if not self.bar.disable:
            self.bar.set_description(line)
        elif time.perf_counter() - self.last_line > 10:  # in a log file: a line now and then
            self.last_line = time.perf_counter()
            print(f"step {state.global_step}/{state.max_steps}  {line}", flush=True)

    def on_evaluate(self, args, state, control, examples=None, **kwargs):
        if self.writer is None:
            return
        text = "\n\n---\n\n".join(
            f"**{row['id']}**\n\n{indented(row['dialogue'])}\n\n**reference:** {row['reference']}\n\n"
            f"**prediction:** {row['prediction']}" for row in examples["validation"][:5])
        self.writer.add_text("validation/examples", text, state.global_step)
        self.writer.flush()
        self.report.write(state.log_history)
        entry = self.report.epochs(state.log_history)[-1] | {"best": False}  # known only when the run is over
        lines = table([entry]).splitlines()
        self.bar.write("\n".join(lines[2:] if self.header_shown else lines), file=sys.stdout)
        self.header_shown = True
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def indented(dialogue):
    return textwrap.indent(dialogue, "    ")  # a code block in TensorBoard's Markdown


# ------------------------------------------------------------------------------------------------------------------
# Report: everything a run leaves is made from the Trainer's log, which its checkpoints carry.
# ------------------------------------------------------------------------------------------------------------------


def epoch_number(epoch):
    """As it is shown and as files are named: 0, 1, 2, or, where --max-steps ended a run, 1.333."""
    epoch = round(epoch or 0, 3)
    return int(epoch) if epoch == int(epoch) else epoch


def evaluations(log):
    return [entry for entry in log if "validation" in entry]


class Report:
    """Writes metrics.json and the plots of a run; `facts` is what is known before training starts."""

    def __init__(self, run, facts):
        self.run, self.facts, self.status = run, facts, "running"

    def epochs(self, log):
        """One dictionary per evaluation: epoch, step, mean training loss since the last one, scores of both splits."""
        result, losses = [], []
        for entry in log:
            if "loss" in entry:
                losses.append(entry["loss"])
            elif "validation" in entry:
                result.append({"epoch": epoch_number(entry.get("epoch")), "step": entry["step"],
                               "train_loss": float(np.mean(losses)) if losses else None,
                               "validation": entry["validation"], "test": entry["test"], "seconds": entry["seconds"]})
                losses = []
        best = max(result, key=lambda e: e["validation"]["rouge1"], default=None)  # the first of equals
        for entry in result:
            entry["best"] = entry is best
        return result

    def write(self, log):
        curve = [entry for entry in log if "loss" in entry]
        epochs = self.epochs(log)
        seconds = sum(entry["seconds"] for entry in curve)
        training = {}
        if seconds:
            training = {
                "steps": curve[-1]["step"], "seconds": round(seconds, 1),
                "samples_per_second": round(sum(e["samples_per_second"] * e["seconds"] for e in curve) / seconds, 2),
                "tokens_per_second": round(sum(e["tokens_per_second"] * e["seconds"] for e in curve) / seconds, 1),
                "peak_memory_gib": max(e["peak_memory_gib"] for e in curve),
                "evaluation_seconds": round(sum(e["seconds"] for e in epochs), 1),
            }
        best = next((e["epoch"] for e in epochs if e["best"]), None)
        write_json(self.run / "metrics.json", {**self.facts, "status": self.status, "best_epoch": best,
                                               "training": training, "epochs": epochs, "curve": curve})
        if curve:
            plot_loss(curve, self.run / "training_loss.png", self.run.name)
        if epochs:
            plot_rouge(epochs, self.run / "rouge.png", self.run.name)
        gc.collect()  # closed figures hold one another; left alone they would pile up, megabytes an epoch


def table(epochs):
    """The scores as a Markdown table: two rows per epoch, each score with its 95% interval."""
    names = " | ".join(f"{name:20}" for name in ROUGE_TYPES.values())
    lines = [f"| {'epoch':8} | {'loss':7} | {'split':10} | {names} |",
             "|---------:|--------:|:-----------|" + "---------------------:|" * len(ROUGE_TYPES)]
    for entry in epochs:
        loss = "" if entry["train_loss"] is None else f"{entry['train_loss']:.4f}"
        epoch = f"{entry['epoch']:g}" + (" (best)" if entry["best"] else "")
        for split in ("validation", "test"):
            lines.append(f"| {epoch:>8} | {loss:>7} | {split:10} | {format_scores(entry[split])} |")
    return "\n".join(lines)


def format_scores(scores):
    intervals = {kind: "[{:.1f}, {:.1f}]".format(*scores[kind + "_interval"]) for kind in ROUGE_TYPES}
    return " | ".join(f"{scores[kind]:5.2f} {intervals[kind]:>14}" for kind in ROUGE_TYPES)


@contextlib.contextmanager
def new_plot(path, **labels):
    """Axes to draw on; when that is done they get labels, a legend and a grid, and the picture goes to `path`."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    yield axes
    axes.set(**labels)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def smallest_loss(curve, name):
    """Index of the smallest finite training loss of the run `name`; UserError if none is finite."""
    losses = np.array([e["loss"] for e in curve], dtype=float)
    losses[~np.isfinite(losses)] = np.nan
    if np.isnan(losses).all():
        raise UserError(f"{name}: no logged training loss is finite, so there is nothing to plot")
    return int(np.nanargmin(losses))


def plot_loss(curve, path, title):
    """Raw and smoothed training loss over steps; the smallest raw value is marked with its step and learning rate."""
    steps, losses = [e["step"] for e in curve], np.array([e["loss"] for e in curve])
    low = smallest_loss(curve, title)
    rate = curve[low]["learning_rate"]
    label = f"smallest: {losses[low]:.4f} at step {steps[low]}" + (f", lr {rate:.2e}" if rate is not None else "")
    with new_plot(path, title=title, xlabel="optimiser step", ylabel="training loss (nats per token)") as axes:
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="as logged")
        axes.plot(steps, smoothed(losses, reach=max(2, len(losses) // 40)), color="tab:blue", label="smoothed")
        axes.plot(steps[low], losses[low], "o", color="tab:red", label=label)


def smoothed(values, reach=3):
    """The mean of the values at most `reach` places away: unlike an exponential mean it does not lag behind."""
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def plot_rouge(epochs, path, title):
    """Both splits after each epoch, ROUGE-1 with its 95% interval; the chosen epoch is marked."""
    x, best = [e["epoch"] for e in epochs], next(e["epoch"] for e in epochs if e["best"])
    low, high = np.array([e["test"]["rouge1_interval"] for e in epochs]).T
    with new_plot(path, title=title, xlabel="epoch", ylabel="ROUGE F1 (%)") as axes:
        for split, style in (("validation", "--"), ("test", "-")):
            for i, (kind, label) in enumerate(ROUGE_TYPES.items()):
                scores = [e[split][kind] for e in epochs]
                axes.plot(x, scores, style, marker=".", color=f"C{i}", label=f"{label}, {split}")
        axes.fill_between(x, low, high, color="C0", alpha=0.15, label="95% interval, ROUGE-1, test")
        axes.axvline(best, color="grey", linestyle=":", label=f"best on validation: epoch {best}")
        axes.xaxis.get_major_locator().set_params(integer=True)


def versions():
    packages = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "evaluate", "rouge_score", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


# ------------------------------------------------------------------------------------------------------------------
# One run, from the settings to the last line it prints.
# ------------------------------------------------------------------------------------------------------------------


def run_name(args):
    """For example flan-t5-xl-samsum-lr=1e-4."""
    return f"{base_name(args)}-{Path(args.dataset).stem}-lr={as_power_of_ten(args.lr)}"


def base_name(args):
    return Path(MODELS.get(args.model, args.model)).name


def as_power_of_ten(value):
    """1e-4 for 0.0001: as people write learning rates."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def new_run_folder(args, name):
    """Makes the folder of a new run, runs/<name> or --output-dir, never an existing one; all processes get the same."""
    wanted = args.output_dir or Path("runs") / name
    folder = [wanted]
    if is_main_process():
        try:
            for suffix in ("", *(f"-{n}" for n in range(2, 10000))):
                folder = [wanted.with_name(wanted.name + suffix) if suffix else wanted]
                try:
                    folder[0].mkdir(parents=True)
                    break
                except FileExistsError:
                    if args.output_dir and folder[0].is_dir() and not any(folder[0].iterdir()):
                        break
                    if args.output_dir:
                        raise UserError(f"{wanted} is not empty: --resume, or choose another --output-dir") from None
        except OSError as error:
            raise UserError(f"cannot write to {wanted}: {error.strerror}") from None
    if PartialState().num_processes > 1:
        torch.distributed.broadcast_object_list(folder)
    return folder[0]


def configuration(args):
    return {name: value for name, value in vars(args).items() if name not in NOT_CONFIGURATION}


def as_flags(args):
    """The words of a command line that gives this configuration."""
    usual, words = vars(parse_arguments(["--model", args.model])), ["--model", args.model]
    for name, value in configuration(args).items():
        if value != usual[name]:
            value = value if isinstance(value, list) else [] if value is True else [value]
            words += ["--" + name.replace("_", "-"), *map(str, value)]
    return words


def number_of_steps(args, rows):
    """Optimiser steps of a run with `rows` training rows."""
    steps = math.ceil(rows / args.batch_size) * args.epochs
    return min(steps, args.max_steps or steps)


def load_for_training(args, device, precision):
    """The model with everything that is to be trained in it, its tokenizer, and the tokenised data."""
    transformers.set_seed(args.seed)
    folder = find_model(args.model, args.cache_dir)
    tokenizer, config = load_tokenizer_and_config(folder)
    data = tokenize(load_data(args), tokenizer, args)
    cut = np.mean(data["train"]["labels_truncated"])
    if cut:
        say(f"{cut:.1%} of the training references are cut to {args.max_target_length} tokens (--max-target-length)")
    steps = number_of_steps(args, len(data["train"]))
    warn_about_slow_hardware(config, data, device, min(steps, len(RANGE_TEST)) if args.lr_find else steps, args)
    dtype = torch.float32 if args.full else precision  # all weights trained: fp32 masters, autocast computes in bf16
    model = load_base(folder, device, dtype, quantization_of(args))
    model = model.requires_grad_(True) if args.full else add_lora(model, args)
    if args.gradient_checkpointing:  # the re-entrant kind would need gradients at the frozen embeddings' output
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer, data


def make_trainer(args, run, model, tokenizer, data, precision, stop, callback, **changes):
    """The Trainer of this run; `changes` go over its Seq2SeqTrainingArguments."""
    device = model.device
    trainer = SummarizationTrainer(
        run=run, data=data, settings=args, precision=precision, stop=stop, model=model, processing_class=tokenizer,
        args=training_arguments(args, run, device, precision, number_of_steps(args, len(data["train"])), **changes),
        data_collator=Collator(tokenizer, model=model, pad_to_multiple_of=64 if device.type == "cuda" else 8),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def facts_of(args, model, data, device, precision):
    """What is known of a run before its first step: the head of its metrics.json."""
    # PEFT counts packed 4-bit weights as what they are, two to a byte.
    trainable, total = [model.num_parameters()] * 2 if args.full else model.get_nb_trainable_parameters()
    return {
        "configuration": configuration(args), "versions": versions(), "device": device_name(device),
        "processes": PartialState().num_processes, "precision": str(precision).removeprefix("torch."),
        "parameters": total, "trainable_parameters": trainable, "protocol": protocol(args, data),
        "data": {split: fingerprint(rows.to_dict()) for split, rows in data.items()},
    }


def show_facts(facts, run):
    for name, value in facts["configuration"].items():
        say(f"{name.replace('_', '-')}: {' '.join(value) if isinstance(value, list) else value}")
    rows = facts["protocol"]["rows"]
    shares = facts["protocol"]["truncated"]
    args = argparse.Namespace(**facts["configuration"])
    say(f"device: {facts['device']}, {facts['precision']}, {facts['processes']} process(es)",
        "rows: " + ", ".join(f"{rows[split]} {split} ({shares[split]:.1%} truncated)" for split in rows),
        f"parameters: {facts['parameters']:,}, of which trained {facts['trainable_parameters']:,} "
        f"({facts['trainable_parameters'] / facts['parameters']:.2%})",
        f"steps: {number_of_steps(args, rows['train'])}", f"run: {run}", "")


def check_resumable(run, facts):
    """UserError unless the processes and the data are those that the run began with."""
    began = read_metrics(run)
    if began["processes"] != facts["processes"]:
        raise UserError(f"{run} was trained by {began['processes']} process(es), now there are {facts['processes']}: "
                        "resume it with as many")
    if began.get("data") != facts["data"]:
        raise UserError(f"the rows of {facts['configuration']['dataset']} or their tokens are not those that {run} "
                        "began with: bring them back, or start a new run")


def open_board(run, first_step):
    """TensorBoard's writer; what an earlier try wrote from `first_step` on is no longer shown."""
    # Its thread prints a traceback when the disk is full; the same error is then raised in ours as well.
    is_tensorboard = lambda thread: type(thread).__module__.startswith("tensorboard.")
    threading.excepthook = lambda hook: is_tensorboard(hook.thread) or threading.__excepthook__(hook)
    return SummaryWriter(run, purge_step=first_step)


def train(args):
    """Trains, scores after every epoch, and leaves a run folder; returns the exit code."""
    device, precision = get_device()
    model, tokenizer, data = load_for_training(args, device, precision)
    facts = facts_of(args, model, data, device, precision)
    checkpoint = find_checkpoint(args.output_dir) if args.resume else None
    run = args.output_dir if args.resume else new_run_folder(args, run_name(args))
    if args.resume:
        check_resumable(run, facts)
    show_facts(facts, run)

    stop, report, writer = StopSignal(), Report(run, facts), None
    if is_main_process():
        if not checkpoint:
            try:
                report.write([])  # from now on the folder counts as a run
            except OSError as error:
                if not args.resume:
                    shutil.rmtree(run)
                raise cannot_write(run, error) from None
        done = int(checkpoint.name.split("-")[1]) if checkpoint else -1
        writer = open_board(run, first_step=done + 1 if args.resume else None)
    trainer = make_trainer(args, run, model, tokenizer, data, precision, stop, Reporter(run, report, stop, writer))
    report.status = "failed"
    try:
        try:
            with contextlib.suppress(Interrupted):  # in the scoring before the first step
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            report.status = "interrupted" if stop() else "finished"
        finally:
            if is_main_process():
                finish(run, report, trainer.state.log_history, writer, args)
    except OSError as error:
        raise cannot_write(run, error) from None
    if stop():
        say(f"interrupted; go on with: {launcher()} flan-t5_samsum.py --resume --output-dir {run}")
        return 128 + stop.number
    return 0


def launcher():
    processes = PartialState().num_processes
    return "python" if processes == 1 else f"torchrun --nproc_per_node={processes}"


def warn_about_slow_hardware(config, data, device, steps, args):
    """Says how long a training on the CPU would take, if that is more than an hour. Nothing is refused."""
    if device.type != "cpu":
        return
    parameters = without_weights(config).num_parameters()
    tokens = sum(len(row) for column in ("input_ids", "labels") for row in data["train"][column]) / len(data["train"])
    a = torch.randn(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    flops = 4 * 2 * 1024**3 / (time.perf_counter() - start)
    # Forward and backward through frozen weights: 2 x 2 operations per parameter and token, and encoder and decoder
    # each hold about half of the parameters. Real models reach about half the speed of a large matrix product.
    hours = steps * args.batch_size * tokens * 4 * parameters / 2 / (flops / 2) / 3600
    if hours > 1:
        say(f"warning: no GPU: {steps} steps with {parameters / 1e6:,.0f} million parameters will take about "
            f"{hours:,.0f} hours on this CPU; --model tiny, --limit or --max-steps make it shorter", file=sys.stderr)


def out_of_memory_advice(args):
    training = args.summarize is None and not args.evaluate and args.merge is None
    ways = {
        f"--micro-batch-size {args.micro_batch_size // 2}": training and args.micro_batch_size > 1,
        "--gradient-checkpointing": training and not args.gradient_checkpointing,
        "no --full": training and args.full,
        "--int8": args.merge is None and not (args.full or args.int8 or args.int4),
        "--int4": args.merge is None and not (args.full or args.int4),
        "--num-beams 1": args.num_beams > 1,
        f"--max-source-length {args.max_source_length // 2}": args.merge is None,
        "the CPU (CUDA_VISIBLE_DEVICES= in front of the command)": args.merge is not None,
        "a smaller --model": training,
    }
    return f"out of GPU memory: try {', '.join(way for way, open_to_us in ways.items() if open_to_us)}"


def finish(run, report, log, writer, args):
    """Writes everything once more, in its last state, and says what there is and how to use it."""
    for leftover in run.glob("*.incomplete"):  # room, if the disk is full
        shutil.rmtree(leftover, ignore_errors=True)
    report.write(log)
    epochs = report.epochs(log)
    if epochs:
        best = next(e for e in epochs if e["best"])
        values = {key: str(value) for key, value in report.facts["configuration"].items()} | {"lr": args.lr}
        scores = {f"{split}/best_rouge1": best[split]["rouge1"] for split in ("validation", "test")}
        writer.add_hparams(values, scores, run_name=".")
        say("", table(epochs), "", describe(report.facts["protocol"]))
        if best["step"] == 0 and len(epochs) > 1:
            say("No epoch was better than the model before training: another --lr, or more --epochs?")
    writer.close()
    if epochs and report.status != "failed":
        result = run / result_name(args)
        say("", f"{result.name + '/':18} best epoch on validation ({best['epoch']:g})",
            "predictions/       every evaluation, row by row",
            "metrics.json       configuration, versions, scores, speed", "training_loss.png  rouge.png",
            f"all in {run}", "", f"use it:    python flan-t5_samsum.py --summarize --adapter {result}",
            "watch it:  tensorboard --logdir runs")


# ------------------------------------------------------------------------------------------------------------------
# Use: summarise, evaluate, merge. Base (quantised or not) + adapter, eval(), nothing else: no Trainer is built.
# ------------------------------------------------------------------------------------------------------------------


def load_for_use(args):
    """The model with --adapter on it (or bare, or a fully trained one), its tokenizer and its precision."""
    device, precision = get_device()
    adapter = None
    if args.adapter not in (None, "none"):
        adapter = Path(args.adapter)
        adapter = next((adapter / name for name in ("adapter", "model") if (adapter / name).is_dir()), adapter)
        if not (adapter / "adapter_config.json").is_file():
            if (adapter / "config.json").is_file():  # the whole model of a run with --full
                args.model, adapter = str(adapter), None
            else:
                raise UserError(f"{args.adapter} holds no adapter (no adapter_config.json)")
    folder = find_model(args.model, args.cache_dir)
    tokenizer, _ = load_tokenizer_and_config(folder)
    dtype = torch.float32 if args.full else precision  # as in training
    model = load_base(folder, device, dtype, quantization_of(args))
    if adapter:
        model = load_adapter(model, adapter)
    say(f"model: {args.model}" + (f", adapter: {adapter}" if adapter else ""), file=sys.stderr)
    return model, tokenizer, precision


def read_dialogues(name, column=None):
    """Dialogues (strings) from a file, standard input, or a terminal: blank lines separate them; or JSONL."""
    if name == "-" and sys.stdin.isatty():
        print("Type or paste a dialogue, a line per message (Anna: hi!); an empty line ends it, Ctrl-D leaves.",
              file=sys.stderr)
        yield from split_at_blank_lines(sys.stdin)
        return
    path = Path("standard input" if name == "-" else name)
    try:
        text = (sys.stdin.buffer.read() if name == "-" else path.read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if path.suffix == ".jsonl" or text.lstrip().startswith("{"):
        rows = [(i, parse_json(path, i, line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        column = find_column([row for _, row in rows if isinstance(row, dict)], "source", column)
        for i, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column].strip():
                raise UserError(f"{path}:{i}: no text in {column}")
            yield normalize_newlines(row[column])  # as in training
    else:
        yield from split_at_blank_lines(normalize_newlines(text).split("\n"))


def split_at_blank_lines(lines):
    """Runs of lines that are not blank, joined."""
    block = []
    for line in lines:
        if line.strip():
            block.append(line.strip())
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def summarize(args):
    """Prints one summary per dialogue, in order, each on its own line; everything else goes to standard error."""
    dialogues = read_dialogues(args.summarize, args.source_column)
    if args.summarize == "-" and sys.stdin.isatty():  # they come, and are answered, one by one
        groups = ([dialogue] for dialogue in dialogues)
    else:
        groups = [list(dialogues)]
        if not groups[0]:
            raise UserError(f"{'standard input' if args.summarize == '-' else args.summarize} holds no dialogue")
    model, tokenizer, precision = load_for_use(args)
    done = 0
    with merged_adapter(model):
        for group in groups:
            sources, cut = encode(tokenizer, [PREFIX + dialogue for dialogue in group], args.max_source_length)
            for i in np.flatnonzero(cut):
                say(f"dialogue {done + i + 1}: cut to {args.max_source_length} tokens (--max-source-length)",
                    file=sys.stderr)
            done += len(group)
            for summary in generate_summaries(model, tokenizer, sources, args, precision):
                say(" ".join(summary.split()))
    return 0


def evaluate_split(args):
    """Scores the model on --split with the same function, settings and rows as during training."""
    data = load_data(args)
    model, tokenizer, precision = load_for_use(args)
    rows = tokenize(datasets.DatasetDict({args.split: data[args.split]}), tokenizer, args)
    with merged_adapter(model):
        scores, _ = score(model, tokenizer, rows[args.split], args, precision)
    say("| split | " + " | ".join(ROUGE_TYPES.values()) + " |", "|:---|" + "---:|" * len(ROUGE_TYPES),
        f"| {args.split} | {format_scores(scores)} |", "", describe(protocol(args, rows)))
    return 0


def merge(args):
    """Writes base + adapter as one bf16 model that `AutoModelForSeq2SeqLM.from_pretrained` loads."""
    if args.merge.exists() and any(args.merge.iterdir() if args.merge.is_dir() else [args.merge]):
        raise UserError(f"{args.merge} exists and is not empty: choose another folder")
    if not args.merge.name:  # the folder comes by renaming, which would take the current one away
        raise UserError(f"--merge {args.merge}: choose a folder with a name")
    args.int8 = args.int4 = False  # merging into quantised weights would round: the base is loaded anew in bf16
    model, tokenizer, _ = load_for_use(args)
    if isinstance(model, PeftModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the embeddings are no longer tied: they never were
            model = model.merge_and_unload(safe_merge=True)
    model = model.to(torch.bfloat16)
    temporary = args.merge.with_name(args.merge.name + ".incomplete")
    try:
        save_model(model, tokenizer, temporary, args)
        replace_folder(temporary, args.merge)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(args.merge.parent, error) from None
    say(f"merged: AutoModelForSeq2SeqLM.from_pretrained({str(args.merge)!r}) loads it")
    return 0


# ------------------------------------------------------------------------------------------------------------------
# Experiments: what will it cost (--plan), which learning rate (--lr-find), which run is better (--plot, --compare).
# ------------------------------------------------------------------------------------------------------------------

# d_model, d_ff, layers (of encoder and of decoder each), heads: T5 v1.1, the architecture of Flan-T5. All other numbers
# are the same for all sizes. Source: the config.json of google/flan-t5-*.
T5_SIZES = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16),
            "xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "int8": "INT8", "int4": "NF4"}
GIB = 2**30
GPU_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GiB of the usual cards
GPU_RESERVE = 1.5  # GiB that are not ours: the CUDA context, and what the allocator cannot use


def geometry(args):
    """The T5Config of --model, known for the presets, else from its config.json; no weights are downloaded."""
    if args.model not in T5_SIZES:
        return load_tokenizer_and_config(find_model(args.model, args.cache_dir, weights=False))[1]
    d_model, d_ff, layers, heads = T5_SIZES[args.model]
    return transformers.T5Config(
        vocab_size=32128, d_model=d_model, d_kv=64, d_ff=d_ff, num_layers=layers, num_decoder_layers=layers,
        num_heads=heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )


def weight_bytes(model, precision):
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


def activation_bytes(config, rank, batch, source, target, checkpointing=False):
    """Bytes that forward keeps for backward, of a LoRA training on q, k, v, o in bf16 autocast, and the loss's own.

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
    feed_forward = norm + 21 * config.d_ff + width
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


def plan(args):
    """Prints what a run would need, from the geometry of the model and the lengths of the data; trains nothing."""
    config = geometry(args)
    model = without_weights(config)
    weights = {name: weight_bytes(model, name) for name in PRECISIONS}
    total = model.num_parameters()
    trainable = total if args.full else add_lora(model, args).get_nb_trainable_parameters()[0]
    say(f"{base_name(args)}: {total:,} parameters, {trainable:,} trained ({trainable / total:.2%})",
        "weights: " + ", ".join(f"{PRECISIONS[name]} {size / GIB:.2f} GiB" for name, size in weights.items()))
    source, target = plan_data(args)
    if args.full or set(args.lora_targets) != {"q", "k", "v", "o"}:
        say("peak memory is predicted for LoRA on q k v o only")
        return 0
    rows = plan_memory(args, config, weights, trainable, source, target)
    plain, checkpointed = (activation_bytes(config, args.lora_r, args.micro_batch_size, source, target, checkpointing)
                           / GIB for checkpointing in (False, True))
    say(f"activations of {args.micro_batch_size} rows of {source} + {target} tokens (the longest batch): "
        f"{plain:.2f} GiB, with --gradient-checkpointing {checkpointed:.2f} GiB", "", "predicted peak memory in GiB:",
        "| micro-batch | checkpointing | " + " | ".join(PRECISIONS[name] for name in rows[0][2]) + " |",
        "|---:|:---|" + "---:|" * len(rows[0][2]))
    say(*(f"| {micro_batch} | {'yes' if checkpointing else 'no'} | "
          + " | ".join(f"{size:.2f}" for size in sizes.values()) + " |" for micro_batch, checkpointing, sizes in rows))
    say("", *advice(rows))
    return 0


def plan_data(args):
    """Prints steps, tokens and truncated rows; returns the padded length of the longest source and target."""
    source, target = args.max_source_length, args.max_target_length
    try:
        folder = find_model(args.model, args.cache_dir, weights=False)
        data = tokenize(load_data(args), load_tokenizer_and_config(folder)[0], args)
    except UserError as error:
        say(f"data: not counted, so the longest rows allowed are assumed: {error}")
        return source, target
    train = data["train"]
    lengths = {column: [len(tokens) for tokens in train[column]] for column in ("input_ids", "labels")}
    steps = number_of_steps(args, len(train))
    tokens = sum(map(sum, lengths.values()))
    epochs = steps * args.batch_size / len(train)
    say(f"data: {len(train):,} training rows, {tokens:,} tokens, {np.mean(train['truncated']):.1%} of the rows "
        f"truncated to {source} tokens",
        f"steps: {steps:,} of {args.batch_size} rows, {epochs:.1f} epochs, about {epochs * tokens:,.0f} tokens")
    padded = lambda length: 64 * math.ceil(length / 64)
    return padded(max(lengths["input_ids"])), padded(max(lengths["labels"]))


def plan_memory(args, config, weights, trainable, source, target):
    """Rows of (micro-batch, checkpointing, {precision: predicted peak in GiB}), the fastest first.

    A trained number costs 16 bytes: itself, its gradient and AdamW's two moments, in fp32.
    """
    precisions = ["bf16", "int8", "int4"]
    if torch.cuda.is_available() and get_device()[1] == torch.float32:  # no bf16 on this GPU
        precisions[0] = "fp32"
    sizes = [args.micro_batch_size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    rows = []
    for checkpointing in (False, True):
        for size in sizes:
            activations = activation_bytes(config, args.lora_r, size, source, target, checkpointing)
            peak = {name: (weights[name] + 16 * trainable + activations) / GIB for name in precisions}
            rows.append((size, checkpointing, peak))
    return rows


def advice(rows):
    """Lines that say which flags make the run fit where, and whether INT8 helps."""

    def fitting_flags(memory):
        """The fastest way to fit into `memory` GiB, or None. INT8 and NF4 cost most time, small micro-batches least."""
        by_time = sorted(rows, key=lambda row: (row[1], -row[0]))
        for precision in rows[0][2]:
            for micro_batch, checkpointing, sizes in by_time:
                if sizes[precision] + GPU_RESERVE <= memory:
                    return [*[f"--{precision}"] * (precision in ("int8", "int4")),
                            *[f"--micro-batch-size {micro_batch}"] * (micro_batch < rows[0][0]),
                            *["--gradient-checkpointing"] * checkpointing]
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
    least = list(rows[-1][2].values())[:2]  # unquantised and INT8, in the smallest configuration
    card = [next((size for size in GPU_SIZES if size >= need + GPU_RESERVE), None) for need in least]
    if card[0] is not None and card[0] == card[1]:
        lines.append(f"INT8 does not help at this size: a GPU of {card[0]} GiB is needed with and without it, "
                     "and it is slower")
    return lines


RANGE_TEST = np.geomspace(1e-6, 1, 100)  # the learning rates of --lr-find, one optimiser step each


class RangeTest(TrainerCallback):
    """Notes the loss of every step, and ends the test when it diverges: twice the lowest, both smoothed."""

    def __init__(self):
        self.losses = []
        self.bar = tqdm(total=len(RANGE_TEST), desc="range test", unit="step", leave=False, dynamic_ncols=True,
                        disable=None if is_main_process() else True)  # a bar at a terminal only

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.bar.update(1)
            control.should_training_stop |= diverges(self.losses)


def diverges(losses):
    smooth = smoothed(losses)
    return not math.isfinite(losses[-1]) or (len(losses) > 7 and smooth[-1] > 2 * min(smooth))


def lr_find(args):
    """Learning-rate range test (Smith 2017, section 3.3) with the real model, data and batch.

    Every step has a larger rate, from 1e-6 to 1, until the loss diverges. Nothing of the model is kept.
    """
    device, precision = get_device()
    model, tokenizer, data = load_for_training(args, device, precision)
    run, test = new_run_folder(args, f"{base_name(args)}-{Path(args.dataset).stem}-lr-find"), RangeTest()
    trainer = make_trainer(args, run, model, tokenizer, data, precision, None, test, max_steps=len(RANGE_TEST),
                           logging_steps=1, eval_strategy="no", eval_on_start=False, save_strategy="no")
    trainer.create_optimizer()
    rate = lambda step: RANGE_TEST[min(step, len(RANGE_TEST) - 1)] / args.lr
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, rate)
    try:
        trainer.train()
    except BaseException as error:
        has_diverged = isinstance(error, NotFinite) and test.losses  # which is how the test ends
        if not has_diverged:
            if is_main_process():
                shutil.rmtree(run)
            if isinstance(error, KeyboardInterrupt):
                say("interrupted: nothing is kept", file=sys.stderr)
            raise
    finally:
        test.bar.close()
    rates = RANGE_TEST[: len(test.losses)].tolist()
    best = suggest_learning_rate(rates, test.losses)
    if is_main_process():
        shutil.rmtree(run / "checkpoint.incomplete", ignore_errors=True)  # made by the Trainer, empty
        plot_range_test(rates, test.losses, best, run / "lr_find.png", run.name)
        write_json(run / "lr_find.json", {"configuration": configuration(args), "suggestion": best,
                                          "learning_rates": rates, "losses": test.losses})
    args.lr = best
    say(f"tried {len(rates)} learning rates, from {rates[0]:.1e} (loss {test.losses[0]:.3f}) to {rates[-1]:.1e} "
        f"(loss {test.losses[-1]:.3f})",
        f"suggested: {as_power_of_ten(best)}, a tenth of the one with the smallest smoothed loss",
        f"plot:  {run / 'lr_find.png'}", f"train: {launcher()} flan-t5_samsum.py {shlex.join(as_flags(args))}")
    return 0


def suggest_learning_rate(rates, losses):
    """A tenth of the rate with the smallest smoothed loss: where it still falls steeply, and far from divergence."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    smallest = int(np.argmin(smoothed(finite)))
    return float(f"{rates[smallest] / 10:.1e}")


def plot_range_test(rates, losses, best, path, title):
    with new_plot(path, title=title, xlabel="learning rate", ylabel="training loss (nats per token)") as axes:
        axes.plot(rates, losses, color="tab:blue", alpha=0.35, label="every step")
        axes.plot(rates, smoothed(losses), color="tab:blue", label="smoothed")
        axes.axvline(best, color="tab:red", linestyle="--", label=f"suggested: {as_power_of_ten(best)}")
        axes.set_xscale("log")
        axes.set_ylim(top=min(max(losses), 1.5 * max(losses[:10])))  # a diverging end would flatten everything else


def plot(args):
    """Draws training_loss.png and smallest_training_loss.png from the TensorBoard logs of any Trainer run."""
    if args.output_dir:
        check_names(args.plot)
    for folder in args.plot:
        curve, totals = read_tensorboard(folder)
        name = folder.resolve().name
        low = smallest_loss(curve, name)
        place = args.output_dir / name if args.output_dir else folder
        place.mkdir(parents=True, exist_ok=True)
        plot_loss(curve, place / "training_loss.png", name)
        plot_smallest(curve, low, place / "smallest_training_loss.png", name)
        point, last = curve[low], [entry["loss"] for entry in curve[-100:]]
        say(f"{name}: smallest training loss {point['loss']:.4f} at step {point['step']}"
            + (f", learning rate {point['learning_rate']:.2e}" if point["learning_rate"] is not None else ""),
            f"  mean of the last {len(last)} logged losses: {np.mean(last):.4f}")
        if totals:
            say(f"  {totals['train_samples_per_second']:.1f} samples/s, {totals['train_runtime'] / 3600:.1f} hours")
        say(f"  {place / 'training_loss.png'}", f"  {place / 'smallest_training_loss.png'}")
    return 0


def check_names(folders):
    """UserError if two folders have one name: their results could not be told apart."""
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of the folders are called {name}: rename one of them, or give it alone")


def read_tensorboard(folder):
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


def plot_smallest(curve, low, path, title, reach=40):
    """The neighbourhood of the smallest loss, `reach` logged points to each side, with the learning rate there."""
    near = curve[max(0, low - reach) : low + reach + 1]
    steps, point = [e["step"] for e in near], curve[low]
    with new_plot(path, title=title, xlabel="optimiser step", ylabel="training loss (nats per token)") as axes:
        axes.plot(steps, [e["loss"] for e in near], marker=".", color="tab:blue", label="training loss, as logged")
        axes.plot(point["step"], point["loss"], "o", color="tab:red",
                  label=f"smallest: {point['loss']:.4f} at step {point['step']}")
        if point["learning_rate"] is not None:
            right = axes.twinx()
            right.plot(steps, [e["learning_rate"] for e in near], color="tab:orange")
            right.plot(point["step"], point["learning_rate"], "o", color="tab:orange")
            right.set_ylabel(f"learning rate (there {point['learning_rate']:.2e})", color="tab:orange")
            axes.set_zorder(right.get_zorder() + 1)  # the legend over the line
            axes.patch.set_visible(False)


def compare(args):
    """Tables and a picture of finished runs, and for each two of them a paired bootstrap over the test rows."""
    check_names(args.compare)
    runs = [read_run(folder) for folder in args.compare]
    check_comparable(runs)
    say(epoch_table(runs), "", run_table(runs), *different_settings(runs))
    pairs = [(a, b, *paired_bootstrap(a["rouge1"], b["rouge1"])) for i, a in enumerate(runs) for b in runs[i + 1 :]]
    if pairs:
        say("", f"ROUGE-1 on the same {len(runs[0]['rouge1'])} test rows, paired bootstrap with 10,000 samples:", "",
            "| A | B | B - A | 95% interval | p |", "|:---|:---|---:|---:|---:|")
        say(*(f"| {a['name']} | {b['name']} | {difference:+.2f} | [{low:+.2f}, {high:+.2f}] | {p:.4f} |"
              for a, b, difference, low, high, p in pairs))
    path = (args.output_dir or args.compare[0].resolve().parent) / "comparison.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_comparison(runs, path)
    say("", f"plot: {path}")
    return 0


def read_run(folder):
    """metrics.json of a run, with its name and, of the best epoch, the rows of both splits and the test ROUGE-1."""
    metrics = read_metrics(folder)
    if not metrics.get("epochs") or not metrics.get("training"):
        raise UserError(f"{folder} has no finished epoch yet")
    metrics |= {"name": folder.resolve().name, "best": next(e for e in metrics["epochs"] if e["best"]), "rows": {}}
    for split in ("validation", "test"):
        path = folder / "predictions" / f"{split}-epoch-{metrics['best_epoch']:g}.jsonl"
        rows = read_file(path)
        metrics["rows"][split] = [(row["id"], row["dialogue"], row["reference"]) for row in rows]
        metrics["rouge1"] = np.array([row["rouge1"] for row in rows])
    return metrics


def check_comparable(runs):
    """UserError unless all runs were scored on the same rows in the same way."""
    first = runs[0]
    for other in runs[1:]:
        for name in ("decoding", "max_new_tokens", "prefix", "rouge", "stemmer", "sentences", "max_source_length"):
            a, b = first["protocol"][name], other["protocol"][name]
            if a != b:
                raise UserError(f"{first['name']} and {other['name']} cannot be compared: {name} is {a!r} in one, "
                                f"{b!r} in the other: train both with the same flag")
        for split in ("validation", "test"):
            if first["rows"][split] != other["rows"][split]:
                raise UserError(f"{first['name']} and {other['name']} cannot be compared: their {split} rows differ "
                                f"({len(first['rows'][split])} and {len(other['rows'][split])} rows)")


def epoch_table(runs):
    """ROUGE-1 on test after each epoch, one column per run; what validation picked is bold."""
    scores = [{e["epoch"]: f"**{e['test']['rouge1']:.2f}**" if e["best"] else f"{e['test']['rouge1']:.2f}"
               for e in run["epochs"]} for run in runs]
    lines = ["| Epoch | " + " | ".join(run["name"] for run in runs) + " |", "|---:|" + "---:|" * len(runs)]
    for epoch in sorted({epoch for column in scores for epoch in column}):
        lines.append(f"| {epoch:g} | " + " | ".join(column.get(epoch, "") for column in scores) + " |")
    return "\n".join(lines)


def run_table(runs):
    """What each run reached and what it cost."""
    lines = ["| Run | best epoch | test ROUGE-1 | 95% interval | trained | samples/s | peak GiB | minutes |",
             "|:---|---:|---:|---:|---:|---:|---:|---:|"]
    for run in runs:
        test, cost = run["best"]["test"], run["training"]
        low, high = test["rouge1_interval"]
        minutes = (cost["seconds"] + cost["evaluation_seconds"]) / 60
        lines.append(f"| {run['name']} | {run['best']['epoch']:g} | {test['rouge1']:.2f} | [{low:.2f}, {high:.2f}] | "
                     f"{run['trainable_parameters'] / run['parameters']:.2%} | {cost['samples_per_second']:.1f} | "
                     f"{cost['peak_memory_gib']:.1f} | {minutes:.1f} |")
    return "\n".join(lines)


def different_settings(runs):
    """A line for each run with the settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run["configuration"])
    values = [{name: run["configuration"].get(name) for name in names} for run in runs]
    different = [name for name in names if any(value[name] != values[0][name] for value in values)]
    lines = [f"{run['name']}: " + ", ".join(f"{name.replace('_', '-')} {value[name]}" for name in different)
             for run, value in zip(runs, values, strict=True)]
    return ["", *lines] if different else []


def paired_bootstrap(a, b, samples=10_000, seed=0):
    """Is the mean of `b` [rows] really different from that of `a`? Returns (difference, low, high, p).

    Rows are drawn with replacement, both scores of a row together (Koehn 2004): a percentile interval of the mean
    difference. p is the share of samples in which a mean difference of zero would, by drawing alone, look at least as
    large as the one seen (Efron and Tibshirani 1993, section 16.4; two-sided, never exactly 0).
    """
    differences, rng = np.asarray(b) - np.asarray(a), np.random.default_rng(seed)
    seen, rows = differences.mean(), len(differences)
    means = np.array([differences[rng.integers(0, rows, rows)].mean() for _ in range(samples)])
    low, high = np.percentile(means, [2.5, 97.5])
    as_large = np.abs(means - seen) >= abs(seen) - 1e-9
    return float(seen), float(low), float(high), float((1 + as_large.sum()) / (1 + samples))


def plot_comparison(runs, path):
    """Left: test ROUGE-1 after each epoch. Right: that of the chosen epoch, with its 95% interval."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for i, run in enumerate(runs):
        epochs, scores = zip(*((e["epoch"], e["test"]["rouge1"]) for e in run["epochs"]), strict=True)
        left.plot(epochs, scores, ".-", color=f"C{i}", label=run["name"])
        left.plot(run["best"]["epoch"], run["best"]["test"]["rouge1"], "o", color=f"C{i}")
        low, high = run["best"]["test"]["rouge1_interval"]
        right.plot([i, i], [low, high], color=f"C{i}", linewidth=3)
        right.plot(i, run["best"]["test"]["rouge1"], "o", color=f"C{i}")
        right.annotate(f" {run['best']['test']['rouge1']:.2f}", (i, run["best"]["test"]["rouge1"]))
    left.set(xlabel="epoch", ylabel="ROUGE-1 F1 on test (%)", title="after each epoch (dot: chosen on validation)")
    right.set(title="chosen epoch, 95% interval", xlim=(-0.5, len(runs) - 0.3))
    right.set_xticks(range(len(runs)), [run["name"].replace("-lr=", "\nlr=") for run in runs], fontsize="small")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    """Does what the command line says; returns the exit code."""
    # Joins the processes of torchrun, on a CPU through gloo. Hours, because the others wait while one downloads.
    PartialState(cpu=get_device()[0].type == "cpu", timeout=timedelta(hours=12))
    try:
        code = run_mode(args)
    except torch.OutOfMemoryError:
        raise UserError(out_of_memory_advice(args)) from None
    if PartialState().num_processes > 1:
        gc.collect()  # DDP's cycles hold the process group, whose threads must not outlive the interpreter
        PartialState().destroy_process_group()
    return code


def run_mode(args):
    if args.summarize is not None:
        return summarize(args)
    if args.evaluate:
        return evaluate_split(args)
    if args.merge is not None:
        return merge(args)
    if args.plot is not None:
        return plot(args)
    if args.compare is not None:
        return compare(args)
    return plan(args) if args.plan else lr_find(args) if args.lr_find else train(args)


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, ARGUMENTS))
