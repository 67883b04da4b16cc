#!/usr/bin/env python3
"""GPT-2 from scratch in raw PyTorch: the whole life of a language model in one file.

    python gpt2_from_scratch.py                               # a small GPT-2 on Python's own source: minutes on a CPU
    python gpt2_from_scratch.py --sample "def main("          # let the newest run continue a text; no text: ask for one
    python gpt2_from_scratch.py --model gpt2 --data texts/    # GPT-2 (124M) on a folder of text, on one GPU
    torchrun --nproc_per_node=8 gpt2_from_scratch.py --model gpt2 --data texts/        # the same run on eight GPUs
    python gpt2_from_scratch.py --model gpt2 --data texts/ --plan                      # what that will cost, beforehand
    python gpt2_from_scratch.py --init openai-community/gpt2 --data my.txt             # go on from OpenAI's weights
    python gpt2_from_scratch.py --resume                      # continue the newest run exactly where it stopped
    python gpt2_from_scratch.py --export my-gpt2/             # the newest run's best model, for transformers
    tensorboard --logdir runs                                 # watch all runs

A run leaves in runs/<name>/: checkpoints/ (each loads in Hugging Face transformers as it is), metrics.jsonl (the log),
metrics.json (configuration, versions, device, results), training_loss.png and TensorBoard events.

The sections, in the order in which the data flows: 1 Command line (first, so that --help answers before PyTorch is
loaded), 2 Model, 3 Hugging Face, 4 Tokenizer, 5 Documents, 6 Tokens, 7 Optimiser, 8 Checkpoints, 9 Generation,
10 Training step, 11 Evaluation, 12 Session (how it runs on this machine), 13 Training run, 14 Main.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# ---------- 1. Command line -------------------------------------------------------------------------------------------

# Sizes: Radford et al. 2019, table 2. Learning rates and batches for these sizes: Brown et al. 2020, table 2.1.
PRESETS = {
    "nano": {"layers": 4, "heads": 4, "width": 128, "context": 64, "lr": 4e-3, "batch_tokens": 1024,
             "max_steps": 1500, "vocab_size": 1024},
    "gpt2": {"layers": 12, "heads": 12, "width": 768, "context": 1024, "lr": 6e-4, "batch_tokens": 2**19},
    "gpt2-medium": {"layers": 24, "heads": 16, "width": 1024, "context": 1024, "lr": 3e-4, "batch_tokens": 2**19},
    "gpt2-large": {"layers": 36, "heads": 20, "width": 1280, "context": 1024, "lr": 2.5e-4, "batch_tokens": 2**19},
    "gpt2-xl": {"layers": 48, "heads": 25, "width": 1600, "context": 1024, "lr": 2e-4, "batch_tokens": 2**20},
}
FINE_TUNING = {"model": None, "lr": 1e-4, "batch_tokens": None}  # with --init, without --model; tokens: about 2^15
DEFAULTS = {
    "model": "nano", "init": None, "dropout": 0.0,
    "data": "stdlib", "glob": "*", "text_column": "text", "limit": None, "tokenizer": None, "vocab_size": 50257,
    "val_fraction": None, "schedule": "cosine", "warmup_steps": None, "weight_decay": 0.1, "micro_batch": "auto",
    "epochs": 1.0, "max_steps": None, "eval_every": None, "seed": 0, "dtype": "auto", "compile": True,
    "deterministic": True, "output_dir": None, "cache_dir": "cache", "resume": False, "plan": False, "sample": None,
    "export": None, "max_new_tokens": 200, "temperature": 0.8, "top_k": 50, "top_p": 1.0, "num_samples": 1,
}
# What settings hold besides the flags: the model's name; the folder that --init means; which token files are in use;
# where downloads go (None: to Hugging Face's cache); whether the run is long enough to be compiled; the vocabulary of
# the model (None: not made yet), which with --init may be larger than the tokenizer's.
NOT_FLAGS = {"name": None, "weights": None, "fingerprint": None, "hub_cache": None, "compile_pays": None,
             "model_vocab_size": None}
FREE_ON_RESUME = {"output_dir", "cache_dir", "resume", "max_steps", "micro_batch"}  # the rest stays as the run had it


class UserError(Exception):
    """Something the user can mend. main() prints it as one line, and the script ends with exit code 2."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` (not included with `above`) to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf or (above and value == low):
            limits = f"{'above' if above else 'at least'} {low}" + (f", at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range ({limits})")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse: "invalid whole number value: 'x'"
    return parse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. A flag that was not given is None; resolve_settings() fills in what it is then."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    count, off = number(int, 1), {"action": "store_false", "default": None}

    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=PRESETS, help="a preset of the sizes below (default: nano)")
    flag("--init", metavar="WHAT", help="start with these: a Hub id or a folder of a Hugging Face GPT-2, or a run "
         "(without --model: --lr 1e-4 and about 32768 --batch-tokens by default)")
    flag("--layers", type=count, metavar="N", help="transformer blocks")
    flag("--heads", type=count, metavar="N", help="attention heads per block")
    flag("--width", type=count, metavar="N", help="size of the residual stream")
    flag("--context", type=count, metavar="N", help="tokens that the model sees at once")
    flag("--dropout", type=number(float, 0, 0.99), metavar="P",
         help="on embeddings, attention weights and residual branches (default: 0)")

    flag = parser.add_argument_group("data").add_argument
    flag("--data", metavar="WHAT", help="stdlib (default), a text file, a folder, a .jsonl or .parquet file, or a data "
         "set on the Hub as owner/name or owner/name:subset, which is streamed")
    flag("--glob", metavar="PATTERN", help="files of a folder, for example '*.py' (default: every text file)")
    flag("--text-column", metavar="NAME", help="column of .jsonl, .parquet and Hub data (default: text)")
    flag("--limit", type=count, metavar="N", help="only the first N documents, to try things")
    flag("--tokenizer", metavar="WHAT", help="bpe, trained on the data (default; with --init: that model's own), "
         "bytes, gpt2 (from the Hub), or a folder with tokenizer.json or vocab.json + merges.txt")
    flag("--vocab-size", type=number(int, 257, 2**20), metavar="N",
         help="of --tokenizer bpe (default: 50257; nano: 1024)")
    flag("--val-fraction", type=number(float, 0, 0.5, above=True), metavar="P", help="share of documents (of a single "
         "one: its end) held out for validation (default: 0.05, at most about 20 million characters)")

    flag = parser.add_argument_group("training").add_argument
    flag("--lr", type=number(float, 0, 10, above=True), metavar="X", help="peak learning rate (default: the preset's)")
    flag("--schedule", choices=["cosine", "wsd"], help="cosine down to a tenth (default), or warm-up-stable-decay: "
         "constant, then linear to zero over the last fifth")
    flag("--warmup-steps", type=number(int, 0), metavar="N", help="linear warm-up (default: a twentieth, at most 2000)")
    flag("--weight-decay", type=number(float, 0, 10), metavar="X", help="of matrices; the rest has none (default: 0.1)")
    flag("--batch-tokens", type=count, metavar="N", help="tokens per optimiser step, all processes together")
    flag("--micro-batch", type=lambda text: text if text == "auto" else count(text), metavar="N",
         help="sequences per forward pass and process; the rest accumulates (default: auto, what fits)")
    flag("--epochs", type=number(float, 0, above=True), metavar="X", help="passes over the data (default: 1)")
    flag("--max-steps", type=count, metavar="N", help="optimiser steps, whatever --epochs says (nano: 1500)")
    flag("--eval-every", type=count, metavar="N", help="steps from one evaluation, sample and checkpoint to the next "
         "(default: a fifth of all, at most 1000)")
    flag("--seed", type=number(int, 0, 2**32 - 1), metavar="N", help="of everything that is random (default: 0)")
    flag("--dtype", choices=["auto", "bf16", "fp32"], help="default: bf16 on a GPU that has it; there, fp32 is TF32")
    flag("--no-compile", dest="compile", **off, help="run eagerly, also where torch.compile works")
    flag("--no-deterministic", dest="deterministic", **off, help="let a GPU use faster kernels whose rounding varies "
         "from run to run: a resumed one is then only close to an uninterrupted one")

    flag = parser.add_argument_group("files").add_argument
    flag("--output-dir", metavar="DIR", help="folder of this run (default: runs/gpt2-nano-<data>-lr=<lr>; of the other "
         "presets: runs/<preset>-<data>-lr=<lr>)")
    flag("--cache-dir", metavar="DIR", help="token files, and downloads if given (default: cache, and Hugging Face's)")
    flag("--resume", action="store_true", default=None,
         help="go on from the last checkpoint of --output-dir (default: of the newest run)")

    flag = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    flag("--sample", nargs="?", const="", metavar="PROMPT", help="continue PROMPT with the model of --init (default: "
         "the newest run); without PROMPT, every line of standard input")
    flag("--export", metavar="DIR", help="write the model of --init (default: the newest run) for transformers")
    flag("--plan", action="store_true", default=None, help="print parameters, memory, FLOPs, speed, time to the end; "
         "the data is tokenised first: if it is large, add --limit")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--max-new-tokens", type=count, metavar="N", help="longest continuation (default: 200)")
    flag("--temperature", type=number(float, 0, 100), metavar="X", help="0 takes the likeliest token (default: 0.8)")
    flag("--top-k", type=number(int, 0), metavar="N", help="of the N likeliest tokens only; 0: of all (default: 50)")
    flag("--top-p", type=number(float, 0, 1, above=True), metavar="P",
         help="of the likeliest tokens that together reach probability P (default: 1)")
    flag("--num-samples", type=number(int, 1, 1024), metavar="N", help="continuations in one batch (default: 1)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistyped flags end here, before the imports that take seconds

# Threads that wait should sleep: where other programs share the cores, spinning makes a CPU many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

# ---------- Helpers of all sections: printing, JSON, folders ----------------------------------------------------------


def is_main_process() -> bool:
    """torchrun numbers the processes. The first one writes all files and does all the talking."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str = "", end: str = "\n") -> None:
    """Print at once, and only once however many processes there are."""
    if is_main_process():
        print(text, end=end, flush=True)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """What stands in this block the first process does first; the others follow when it is done."""
    if dist.is_initialized() and not is_main_process():
        dist.barrier()
    yield
    if dist.is_initialized() and is_main_process():
        dist.barrier()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError when it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: dict) -> None:
    """Under a temporary name first, so that whoever reads the file finds the old content or the new."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def make_folder(folder: Path) -> Path:
    """The folder, with those above it. UserError when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"no permission to write to {folder}")
    return folder


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when it is complete and on disk: after a crash it is there or not.

    Until then it is called <name>.tmp-<process id>. A folder that already has the name is replaced.
    """
    part = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        for path in [*part.iterdir(), part] if os.name == "posix" else ():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        remove_folder(folder)
        os.rename(part, folder)
    except OSError as error:
        if error.filename is None:  # a full disk does not say where it is
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Rename first: half-deleted, a folder must not pass for a complete one."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.tmp-deleted")
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# ---------- 2. Model --------------------------------------------------------------------------------------------------
#
# B: sequences in a batch, T: tokens in a sequence, C: width, H: heads, D = C / H: width of a head, V: vocabulary.
# The parameters have OpenAI's names (wte, wpe, h, ln_1, c_attn, ...), so that weights map one to one.


@dataclass(frozen=True)
class GPTConfig:
    """The geometry of a GPT-2."""

    vocab_size: int  # tokens of the tokenizer
    context: int = 1024  # the longest sequence; positions are learned, so there is no going beyond it
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0  # Radford et al. trained with 0.1; for one pass over much data 0 is better

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "dropout" and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.width % self.heads:
            raise UserError(f"the width ({self.width}) must be a multiple of the heads ({self.heads})")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128, which tensor cores multiply faster."""
        return -(-self.vocab_size // 128) * 128


class KVCache:
    """Keys and values of all tokens so far, (layers, B, H, context, D): a new token costs one token's work."""

    def __init__(self, config: GPTConfig, batch: int, device: torch.device):
        shape = (config.layers, batch, config.heads, config.context, config.width // config.heads)
        self.keys, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.length = 0  # tokens so far, counted by GPT.forward()

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' k and v (B, H, T, D) and return those of all tokens, (B, H, length + T, D)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.heads, self.dropout, self.layer = config.heads, config.dropout, layer
        self.c_attn = nn.Linear(config.width, 3 * config.width)  # queries, keys and values in one matrix product
        self.c_proj = nn.Linear(config.width, config.width)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if cache:
            k, v = cache.update(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        # softmax(q k^T / sqrt(D)) v. A single new token sees all before it; several only ever fill an empty cache.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two layers with a GELU between them, applied to every token by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The tanh approximation is what GPT-2 was trained with; the exact GELU would be a slightly wrong function.
        return self.resid_dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it (pre-norm)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token and position embeddings, blocks, a last norm, and a head that shares the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """OpenAI's initialisation, the same on every device: N(0, 0.02), positions N(0, 0.01), biases 0, norms 1.

        Each block adds to the residual stream twice; the matrices that do so are scaled by 1 / sqrt(2 x layers), so
        that the stream's variance does not grow with depth (Radford et al. 2019, section 2.3).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.01 if name == "wpe.weight" else 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.layers)
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
            elif name.endswith("bias"):
                parameter.zero_()
        self.wte.weight[self.config.vocab_size :] = 0

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None) -> torch.Tensor:
        """From tokens (B, T) to logits (B, T, padded V); with `cache`, to those of the last token, (B, 1, padded V).

        The cache must be empty, or T be 1.
        With `targets` (B, T) to the summed cross-entropy in nats, a scalar; targets of -1 do not count. The sum, not
        the mean, because sums of micro-batches add up to exactly the batch's sum.
        """
        start = cache.length if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        if cache:
            cache.length += tokens.shape[1]
            x = x[:, -1:]
        # Padding rows must never be predicted: their logits become minus infinity. So their gradient is zero, and they
        # stay what initialise() makes them, zero.
        rows = torch.arange(self.config.padded_vocab_size, device=tokens.device)
        bias = torch.where(rows < self.config.vocab_size, 0.0, -math.inf)
        logits = F.linear(self.ln_f(x), self.wte.weight, bias)  # (B, T, C) @ (C, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def count_parameters(model: GPT) -> int:
    """Trainable numbers, without the padding rows of the vocabulary."""
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * model.config.width
    return sum(parameter.numel() for parameter in model.parameters()) - padding


def flops_per_token(config: GPTConfig) -> float:
    """Of training, forward and backward: 6 per weight of a matrix product, 12 L C T for attention's scores.

    The count of PaLM (Chowdhery et al. 2022, appendix B), which takes no account of causality. The position embedding
    is no product; the token embedding counts once, as the head.
    """
    matrices = config.layers * 12 * config.width**2 + config.vocab_size * config.width
    return 6 * matrices + 12 * config.layers * config.width * config.context


# ---------- 3. Hugging Face -------------------------------------------------------------------------------------------

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # Hugging Face keeps OpenAI's (in, out) layout
MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt"]
HF_NAMES = {  # our name: that in Hugging Face's GPT2Config
    "vocab_size": "vocab_size", "context": "n_positions", "layers": "n_layer", "heads": "n_head", "width": "n_embd",
}
# Settings of GPT2Config that change the function. With another value it is another model, not GPT-2.
PLAIN_GPT2 = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}


def load_pretrained(folder: Path, context: int | None = None, dropout: float = 0.0) -> GPT:
    """A GPT from a Hugging Face folder: config.json and safetensors, with or without the prefix `transformer.`.

    A shorter `context` drops the positions beyond it. Raises UserError for anything but a plain, complete GPT-2.
    """
    settings = read_json(folder / "config.json")
    for name, value in PLAIN_GPT2.items():
        if settings.get(name, value) != value:
            raise UserError(f"{folder} is no plain GPT-2: {name} is {settings[name]!r}")
    sizes = {ours: settings.get(theirs) for ours, theirs in HF_NAMES.items()}
    learned = GPTConfig(**sizes, dropout=dropout)
    if settings.get("n_inner") not in (None, 4 * learned.width):
        raise UserError(f"{folder} is no plain GPT-2: n_inner is {settings['n_inner']}")
    if context and context > learned.context:
        raise UserError(f"--context {context} is more than the {learned.context} positions that {folder} has learned")

    index = folder / "model.safetensors.index.json"
    shards, weights = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}, {}
    if not isinstance(shards, dict):
        raise UserError(f"{index} has no weight_map")
    for file in sorted(set(shards.values())):
        try:
            weights.update(load_file(folder / file))
        except FileNotFoundError:
            raise UserError(f"{folder} has no {file} (other formats are not read: they can carry code)") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file} is damaged ({first_line(error)})") from None
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}

    model = GPT(GPTConfig(**sizes | {"context": context or learned.context}, dropout=dropout))
    learned_rows = {"wte.weight": learned.vocab_size, "wpe.weight": learned.context}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights:
                raise UserError(f"{folder} lacks the weight {name}")
            tensor = weights[name].t() if name.endswith(TRANSPOSED) else weights[name]
            expected = (learned_rows.get(name, len(parameter)), *parameter.shape[1:])
            if tensor.shape != expected:
                raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not {expected}")
            rows = min(len(tensor), len(parameter))  # fewer of wpe with a shorter context, more of wte with padding
            parameter.zero_()
            parameter[:rows] = tensor[:rows]
    return model


def save_pretrained(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers' GPT2LMHeadModel and AutoTokenizer load; the vocabulary's padding rows stay behind."""
    config, end = model.config, tokenizer.token_to_id(END_OF_TEXT)
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu()[: config.vocab_size if name == "wte.weight" else None]
        weights[f"transformer.{name}"] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], **PLAIN_GPT2, "initializer_range": 0.02,
        **{theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "bos_token_id": end, "eos_token_id": end,
    })
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file() lets nobody else read it
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
    })


HUB_SECONDS = 10  # how long the Hub has to answer
OFFLINE = "Offline, copy its files into a folder and give that:"


def why_no_hub() -> str | None:
    """Why the Hub cannot be used, in one line; None when it answers.

    Asked before any download, because the Hub's client tries again for minutes when nothing answers. In a thread,
    because looking up a name knows no time limit.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    reason = f"{constants.ENDPOINT} did not answer within {HUB_SECONDS} seconds"

    def ask():
        nonlocal reason
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            reason = None
        except Exception as error:  # whichever HTTP library the client uses, it has error classes of its own
            reason = f"{constants.ENDPOINT}: {first_line(error)}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 1)
    return reason


def is_hub_id(name: str) -> bool:
    """owner/name, and no mistyped path: there the folder exists, or the name ends like a file's."""
    is_path = Path(name).parent.is_dir() or Path(name).suffix in (".txt", ".md", ".py", ".json", *COLUMN_FILES)
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not is_path


def fetch(name: str, patterns: list[str], flag: str, cache_dir: str | None) -> Path:
    """The folder `name`, or the files of that model on the Hub: from the cache when there is no connection."""
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise UserError(f"{flag} {name}: no such folder, and no Hub id (owner/name) either")
    from huggingface_hub import errors, snapshot_download

    reason = why_no_hub()
    try:
        where = {"cache_dir": cache_dir, "local_files_only": bool(reason)}
        return Path(snapshot_download(name, allow_patterns=patterns, **where))
    except errors.RepositoryNotFoundError:
        raise UserError(f"{flag} {name}: the Hub has no such model (or it is private: `hf auth login`)") from None
    except Exception as error:
        raise UserError(f"{flag} {name}: not in the cache, and no Hub ({reason or first_line(error)}). {OFFLINE} "
                        f"{flag} FOLDER") from None


# ---------- 4. Tokenizer ----------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"


def byte_level(bpe: models.BPE) -> Tokenizer:
    """A tokenizer that cuts text into words with GPT-2's pattern and its bytes into the pieces of `bpe`."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019, section 2.2).

    It knows all 256 bytes, so any text has an encoding. 257 tokens (with end-of-text) are the bytes alone.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return as_plain_text(tokenizer)


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or from OpenAI's pair vocab.json + merges.txt. UserError if neither can be read."""
    one, vocabulary, merges = (folder / name for name in TOKENIZER_FILES)
    if not one.exists() and not vocabulary.exists():
        raise UserError(f"{folder} has neither tokenizer.json nor vocab.json + merges.txt")
    try:
        tokenizer = (Tokenizer.from_file(str(one)) if one.exists() else
                     byte_level(models.BPE.from_file(str(vocabulary), str(merges))))
    except Exception as error:  # the class that the tokenizers library raises
        raise UserError(f"the tokenizer in {folder} cannot be read ({first_line(error)})") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"the tokenizer in {folder} has no token {END_OF_TEXT}, which joins the documents")
    tokenizer.add_special_tokens([END_OF_TEXT])
    return as_plain_text(tokenizer)


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Switch off what would change a text: cutting, padding, and reading "<|endoftext|>" in it as more than letters."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the largest id plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)


# ---------- 5. Documents ----------------------------------------------------------------------------------------------

SPLITS = ("train", "validation")
COLUMN_FILES = (".jsonl", ".parquet")
# The part of the standard library that reads like programs: no tests, no tables of characters, no other people's code.
STDLIB_SKIP = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages"}


@dataclass
class Source:
    """Where documents come from."""

    name: str  # for the run's folder
    identity: list  # all that its text depends on, for the fingerprint of its token files
    documents: Callable[[], Iterator[str]]  # begins anew at each call
    files: list[Path]  # empty for a data set on the Hub, which is streamed


def open_source(settings: argparse.Namespace) -> Source:
    """Find what --data names. Raises UserError when there is nothing, or nothing that can be read."""
    path, column = Path(settings.data), settings.text_column
    if settings.data != "stdlib" and not path.exists():
        return open_hub_source(settings)
    if settings.data == "stdlib":
        root, name, has_columns = Path(sysconfig.get_paths()["stdlib"]), "stdlib", False
        files = list_files(root, "*.py", STDLIB_SKIP)
    elif path.is_dir():
        root, name = path, path.resolve().name
        files, has_columns = list_files(path, settings.glob), settings.glob.endswith(COLUMN_FILES)
    else:
        root, name, files, has_columns = path.parent, path.stem, [path], path.suffix in COLUMN_FILES
    if not files:
        raise UserError(f"--data {settings.data}: no file in it matches {settings.glob!r}")

    def documents() -> Iterator[str]:
        for file in files:
            yield from read_column(file, column) if has_columns else read_text(file, is_alone=len(files) == 1)

    identity = [[file.relative_to(root).as_posix(), *size_and_mtime(file)] for file in files]
    first = lambda: itertools.islice(filter(None, documents()), settings.limit)
    return Source(name, [identity, column if has_columns else None], first, files)


def list_files(root: Path, pattern: str, skip: set[str] = frozenset()) -> list[Path]:
    """The files below `root` that match, sorted; nothing hidden, no link to a folder, no folder named in `skip`."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skip and not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        found += [path for path in paths if path.match(pattern) and path.is_file()]
    return found


def size_and_mtime(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns: if both are the same, so is the text (as make takes it)."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def read_text(file: Path, is_alone: bool) -> Iterator[str]:
    """The text of a UTF-8 file, without byte-order mark and carriage returns. In a folder, other files are left out."""
    content = file.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        if b"\0" not in content:
            yield content.decode("utf-8-sig").replace("\r\n", "\n")
            return
    if is_alone:
        raise UserError(f"{file} is not UTF-8 text")


def read_column(file: Path, column: str) -> Iterator[str]:
    """One column of a .jsonl or .parquet file. Raises UserError with the place when it is broken or no text."""
    for place, row in read_rows(file, column):
        if not isinstance(row, dict) or column not in row:
            columns = f"the columns {', '.join(row)}" if isinstance(row, dict) else "no object"
            raise UserError(f"{place} has {columns}: choose one with --text-column")
        text = row[column] if row[column] is not None else ""
        if not isinstance(text, str):
            raise UserError(f"{place}: {column!r} holds {type(text).__name__}, not text")
        yield text.encode("utf-8", "replace").decode("utf-8")  # JSON can spell half a character


def read_rows(file: Path, column: str) -> Iterator[tuple[str, object]]:
    """(place, row) of a .jsonl file, or of a .parquet file: there only `column`, unless it is missing."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        if file.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            columns = [column] if column in table.schema_arrow.names else None
            for batch in table.iter_batches(columns=columns, batch_size=1000):
                yield from ((str(file), row) for row in batch.to_pylist())
            return
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {number}", json.loads(line.decode("utf-8-sig"))
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}{f', line {number}' if number else ''} cannot be read ({first_line(error)})") from None


def open_hub_source(settings: argparse.Namespace) -> Source:
    """A data set on the Hub, streamed. Its identity is its commit; without a connection, the one that was used last."""
    repo, _, subset = settings.data.partition(":")
    if not is_hub_id(repo):
        raise UserError(f"--data {settings.data}: no such file or folder, and no Hub id (owner/name) either")
    from huggingface_hub import HfApi, errors

    reason, note = why_no_hub(), Path(settings.cache_dir) / "hub" / f"{repo.replace('/', '--')}.json"
    try:
        if not reason:
            make_folder(note.parent)
            write_json(note, {"commit": HfApi().dataset_info(repo, timeout=HUB_SECONDS).sha})
    except errors.RepositoryNotFoundError:
        raise UserError(f"--data {repo}: the Hub has no such data set (or it is private: `hf auth login`)") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"--data {repo}: the Hub refuses it ({first_line(error)})") from None
    if not note.exists():
        raise UserError(f"--data {repo}: the Hub cannot be reached ({reason}). {OFFLINE} --data FOLDER "
                        "--glob '*.parquet'")
    commit = read_json(note)["commit"]

    def documents() -> Iterator[str]:
        if reason:
            raise UserError(f"--data {repo}: its tokens are not in {settings.cache_dir}, and the Hub cannot be reached "
                            f"({reason}). {OFFLINE} --data FOLDER")
        import datasets

        try:
            for row in datasets.load_dataset(repo, subset or None, split="train", streaming=True, revision=commit):
                if settings.text_column not in row:
                    raise UserError(f"--data {repo} has the columns {', '.join(row)}: choose one with --text-column")
                yield str(row[settings.text_column] or "")
        except UserError:
            raise
        except Exception as error:  # of the network or of a file format: datasets passes on what it meets
            raise UserError(f"--data {settings.data} cannot be streamed ({first_line(error)})") from None

    first = lambda: itertools.islice(filter(None, documents()), settings.limit)
    return Source(repo.split("/")[1], [settings.data, commit, settings.text_column], first, [])


def content_hash(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


VALIDATION_TEXT = 2 * 10**7  # characters held out without --val-fraction, at most about


def split_documents(source: Source, val_fraction: float | None) -> tuple[Callable[[], Iterator], int | None]:
    """How to iterate over (split, document), and the length of all text (None for a stream: it is not read for that).

    A document is held out by the hash of its content, so equal documents never stand on both sides. At least one is for
    validation; if there is only one, its end is. `val_fraction` None: 0.05, or less to stay at VALIDATION_TEXT.
    """
    lowest, highest, length = math.inf, -math.inf, 0
    for text in source.documents() if source.files else ():
        value = content_hash(text)
        lowest, highest, length = min(lowest, value), max(highest, value), length + len(text)
    if source.files and not length:
        raise UserError(f"--data {source.name}: there is no text in it")
    share = val_fraction or min(0.05, VALIDATION_TEXT / max(1, length))
    threshold = max(int(share * 2**64), lowest + 1 if source.files else 0)

    def labelled() -> Iterator[tuple[str, str]]:
        room, held_out = VALIDATION_TEXT if val_fraction is None else math.inf, set()  # of a stream: the first ones
        for text in source.documents():
            if lowest == highest:  # a single document
                end = round(len(text) * (1 - share))
                yield from (("train", text[:end]), ("validation", text[end:]))
                return
            value = content_hash(text)
            if value < threshold and (room > 0 or value in held_out):
                held_out.add(value)
                room -= len(text)
                yield "validation", text
            else:
                yield "train", text

    return labelled, length or None


# ---------- 6. Tokens -------------------------------------------------------------------------------------------------
#
# Documents become two files of tokens, train.bin and validation.bin, with an end-of-text token before each document.
# They lie in the cache under a fingerprint of everything they depend on: a second run reads them at once.

PIECE = 2**18  # characters: long documents are tokenised in pieces of about this size, so that one keeps all cores busy
TOKENIZER_TEXT = 10**8  # characters that a tokenizer is trained on, at most; more hardly changes its merges
LINE_END = re.compile(r"\S\n(?=\S)")


@dataclass
class TokenData:
    """The two token files of a data set, and what is known of them."""

    tokenizer: Tokenizer
    facts: dict  # facts.json: the source's name, and by split: documents, tokens, bytes of text
    train: np.memmap  # (tokens,) of uint16 or uint32
    validation: np.memmap


def prepare_tokens(settings: argparse.Namespace) -> TokenData:
    """Token files for these settings: from the cache, or made now, by the first process while the others wait."""
    cache = Path(settings.cache_dir)
    if settings.fingerprint and (cache / f"tokens-{settings.fingerprint}").exists():
        return open_tokens(cache / f"tokens-{settings.fingerprint}")  # a resumed run needs its tokens, not the data
    with main_process_first():
        source, tokenizer, vocab_size = open_source(settings), None, settings.vocab_size
        if settings.tokenizer == "bytes":
            vocab_size = 257
        elif settings.tokenizer != "bpe":
            name = "openai-community/gpt2" if settings.tokenizer == "gpt2" else settings.tokenizer
            tokenizer = load_tokenizer(fetch(name, TOKENIZER_FILES, "--tokenizer", settings.hub_cache))
        kind = tokenizer.to_str() if tokenizer else vocab_size
        identity = [source.identity, settings.limit, settings.val_fraction, kind]
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        if settings.fingerprint not in (None, fingerprint):
            raise UserError(f"--data {settings.data} has changed since this run began, and the tokens it then gave are "
                            f"no longer in {cache}: start a new run")
        settings.fingerprint, folder = fingerprint, cache / f"tokens-{fingerprint}"
        if not folder.exists():
            write_tokens(folder, source, settings.val_fraction, tokenizer, vocab_size)
        return open_tokens(folder)


def open_tokens(folder: Path) -> TokenData:
    facts = read_json(folder / "facts.json")
    dtype = np.dtype(facts["dtype"])
    for split in SPLITS:
        file = folder / f"{split}.bin"
        if not file.exists() or file.stat().st_size != facts["tokens"][split] * dtype.itemsize:
            raise UserError(f"{file} is damaged: delete {folder}, and it is made anew")
    streams = (np.memmap(folder / f"{split}.bin", dtype, "r") for split in SPLITS)
    return TokenData(load_tokenizer(folder), facts, *streams)


def write_tokens(folder: Path, source: Source, val_fraction: float | None, tokenizer: Tokenizer | None,
                 vocab_size: int) -> None:
    """Train a tokenizer, unless there is one, and turn all documents into the files of `folder`."""
    for part in make_folder(folder.parent).glob("tokens-*.tmp-*"):  # of processes that were killed
        if time.time() - part.stat().st_mtime > 86400:
            shutil.rmtree(part, ignore_errors=True)
    started, before = time.perf_counter(), [size_and_mtime(file) for file in source.files]
    documents, length = split_documents(source, val_fraction)
    if tokenizer is None:
        tokenizer = train_tokenizer(training_text(documents()), vocab_size)
        say(f"tokenizer: byte-level BPE with {vocabulary_size(tokenizer):,} tokens, trained on the training documents "
            f"in {time.perf_counter() - started:.1f} s")
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    facts = {"name": source.name, "dtype": dtype.name}
    facts |= {name: dict.fromkeys(SPLITS, 0) for name in ("documents", "tokens", "bytes")}
    with new_folder(folder) as part:
        bar = tqdm(total=length, unit="char", unit_scale=True, desc="tokenising", disable=None)  # at terminals only
        with open(part / "train.bin", "wb") as train, open(part / "validation.bin", "wb") as validation, bar:
            outputs = {"train": train, "validation": validation}
            for characters in tokenise(documents(), tokenizer, outputs, facts):
                bar.update(characters)
        for split in SPLITS:
            if facts["tokens"][split] < 2:  # one to read and one to predict
                raise UserError(f"too little text fell to {split} (--val-fraction says how much does)")
        if before != [size_and_mtime(file) for file in source.files]:
            raise UserError(f"--data {source.name}: a file changed while it was being read")
        tokenizer.save(str(part / "tokenizer.json"))
        write_json(part / "facts.json", facts)
    documents, size, tokens = (sum(facts[name].values()) for name in ("documents", "bytes", "tokens"))
    seconds = time.perf_counter() - started
    say(f"tokenised: {documents:,} documents, {size / 1e6:.1f} MB, {tokens:,} tokens in {seconds:.1f} s")


def training_text(documents: Iterator[tuple[str, str]]) -> Iterator[str]:
    """Text for the tokenizer: of the training documents only."""
    left = TOKENIZER_TEXT
    for text in (text for split, document in documents if split == "train" for text in pieces(document)):
        left -= len(text)
        if left < 0:
            return
        yield text


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where a line ends between two visible characters: GPT-2's word pattern always cuts there too."""
    start = 0
    while len(text) - start > PIECE and (match := LINE_END.search(text, start + PIECE)):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def tokenise(documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, outputs: dict, facts: dict) -> Iterator[int]:
    """Write every document's tokens to the file of its split, and count. Yields how many characters are done."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = ((split, text, i == 0) for split, document in documents for i, text in enumerate(pieces(document)))
    while batch := list(itertools.islice(parts, 64)):  # shared out among the cores
        encodings = tokenizer.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        for (split, text, begins), encoding in zip(batch, encodings, strict=True):
            tokens = np.array([end, *encoding.ids] if begins else encoding.ids, facts["dtype"])
            outputs[split].write(tokens.tobytes())
            for name, amount in (("documents", int(begins)), ("tokens", len(tokens)), ("bytes", len(text.encode()))):
                facts[name][split] += amount
        yield sum(len(text) for _, text, _ in batch)


class TrainingOrder:
    """Which windows of the token stream each training step reads: a seeded permutation, without replacement.

    An epoch cuts the stream at a random offset into windows of `context` + 1 tokens that overlap by one (so each token
    is a target once), and visits all of them in random order. A position in this endless order is one whole number, so
    the step tells where a resumed run is, and neither micro-batch nor processes change what a step learns from.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int):
        if len(tokens) <= context:
            raise UserError(f"too little text: {len(tokens):,} training tokens do not fill one context of {context}")
        self.tokens, self.context, self.seed, self.epoch = tokens, context, seed, -1
        self.per_epoch = max(1, (len(tokens) - context) // context)  # windows that fit after any offset

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows number `first` to `first + count` of the order: (count, context + 1) of int64."""
        starts = [self.start(number) for number in range(first, first + count)]
        return np.stack([self.tokens[start : start + self.context + 1] for start in starts]).astype(np.int64)

    def start(self, number: int) -> int:
        """The token at which window `number` starts."""
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            self.offset = int(random.integers(len(self.tokens) - self.per_epoch * self.context))
            self.order, self.epoch = random.permutation(self.per_epoch), epoch
        return self.offset + int(self.order[index]) * self.context


# ---------- 7. Optimiser ----------------------------------------------------------------------------------------------

BETAS, CLIP = (0.9, 0.95), 1.0  # and the largest gradient norm: Brown et al. 2020, appendix B


def parameter_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Weight decay for matrices (embeddings too); none for biases and norms, which have no reason to be small."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(step: int, settings: argparse.Namespace) -> float:
    """For step 0, 1, ...: linear warm-up, then cosine to a tenth, or constant and linear to zero (wsd)."""
    warmup, last = settings.warmup_steps, settings.max_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "wsd":  # Hu et al. 2024 (MiniCPM), section 4
        return settings.lr * min(1.0, (last - step) / max(1, last // 5))
    progress = (step - warmup) / max(1, last - warmup)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


class Guard:
    """Watches loss and gradient norm, on the device, so that no step has to wait for their values.

    A step is skipped when one of them is not finite, when the loss lies 10 standard deviations (and half a nat) above
    its running mean, or the gradient norm (beyond the clipping) at 10 times its own. A run that has skipped 10 steps in
    a row, or whose running mean has risen by a whole nat over its lowest value, is diverging.
    """

    FIELDS = ("steps", "mean_loss", "variance", "mean_norm", "lowest", "in_a_row", "skipped")
    LEARN = 20  # steps that are watched before any counts as an outlier

    def __init__(self, device: torch.device):
        self.state = torch.tensor([0, 0, 0, 0, math.inf, 0, 0], device=device)

    @torch.no_grad()
    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Take note of a step. Returns 1.0 on the device if it must be skipped, otherwise 0.0."""
        steps, mean, variance, mean_norm, lowest, in_a_row, skipped = self.state.unbind()
        is_far = loss > mean + torch.clamp(10 * variance.sqrt(), min=0.5)
        is_steep = norm > torch.clamp(10 * mean_norm, min=CLIP)
        skip = ~torch.isfinite(loss + norm) | ((steps >= self.LEARN) & (is_far | is_steep))
        bad = torch.stack([steps, mean, variance, mean_norm, lowest, in_a_row + 1, skipped + 1])
        rate = torch.clamp(1 / (steps + 1), min=0.02)  # a plain mean at first, then an exponential one
        variance = (1 - rate) * (variance + rate * (loss - mean) ** 2)
        mean, mean_norm = mean + rate * (loss - mean), mean_norm + rate * (norm - mean_norm)
        lowest = torch.where(steps >= self.LEARN, torch.minimum(lowest, mean), lowest)
        good = torch.stack([steps + 1, mean, variance, mean_norm, lowest, torch.zeros_like(steps), skipped])
        self.state = torch.where(skip, bad, good)
        return skip.float()

    @staticmethod
    def is_diverging(state: dict[str, float]) -> bool:
        return state["in_a_row"] >= 10 or state["mean_loss"] > state["lowest"] + 1


# ---------- 8. Checkpoints --------------------------------------------------------------------------------------------
#
# checkpoints/step-00000500/ is a Hugging Face folder (section 3) with two more files: training.safetensors (AdamW's
# moments, the guard's statistics) and training.json (step, position in the data, time, best loss). Learning rate and
# order of the data are functions of step and seed. There is no generator state to keep either: every step seeds all
# generators from (seed, step, process), see section 10, so that they are restored by knowing the step.


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimiser steps taken
    seconds: float = 0.0  # spent on training steps
    validation_loss: float | None = None  # the last one, nats per token
    best_loss: float | None = None
    best_step: int = 0


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def find_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def save_checkpoint(run: Path, model: GPT, optimiser: torch.optim.AdamW, guard: Guard, progress: Progress,
                    tokenizer: Tokenizer) -> None:
    """Write a checkpoint; then keep the last two and the best."""
    tensors = {"guard": guard.state}
    for name, parameter in model.named_parameters():  # exp_avg, exp_avg_sq and step of each
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in optimiser.state[parameter].items()}
    with new_folder(checkpoint_folder(run, progress.step)) as folder:
        save_pretrained(model, tokenizer, folder)
        save_file(tensors, folder / "training.safetensors")
        write_json(folder / "training.json", vars(progress))
    for old in find_checkpoints(run)[2:]:
        if old != checkpoint_folder(run, progress.best_step):
            remove_folder(old)


def load_checkpoint(folder: Path, model: GPT, optimiser: torch.optim.AdamW, guard: Guard) -> Progress:
    """Fill model, optimiser and guard from a checkpoint. UserError, and nothing is filled, when it is damaged."""
    saved, values = load_pretrained(folder), read_json(folder / "training.json")
    shapes, expected = ([tensor.shape for tensor in network.parameters()] for network in (saved, model))
    if shapes != expected:
        raise UserError(f"{folder} is the checkpoint of a model of another shape")
    try:
        progress = Progress(**{name: values[name] for name in vars(Progress())})
        tensors = load_file(folder / "training.safetensors")
        keys = ("step", "exp_avg", "exp_avg_sq") if progress.step else ()  # at step 0 there are none yet
        moments = {parameter: {key: tensors[f"{key}.{name}"].to(parameter.device) for key in keys}
                   for name, parameter in model.named_parameters()}
        guard.state.copy_(tensors["guard"])
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"its training state is damaged ({first_line(error)})") from None
    model.load_state_dict(saved.state_dict())
    optimiser.state.update(moments)
    return progress


def resume(run: Path, model: GPT, optimiser: torch.optim.AdamW, guard: Guard, weights: str | None) -> Progress:
    """Continue from the newest checkpoint that can be read; put aside those that cannot, and say so.

    Without any, from the start: with `weights`, those of --init, or else the model as it is.
    """
    with main_process_first():
        for part in (run / "checkpoints").glob("*.tmp-*") if is_main_process() else ():
            say(f"passed over {part.name}: it was never finished")
            shutil.rmtree(part, ignore_errors=True)
        for folder in find_checkpoints(run):
            try:
                progress = load_checkpoint(folder, model, optimiser, guard)
            except UserError as error:
                say(f"passed over {folder.name}: {error}")
                damaged = folder.with_name(f"{folder.name}.damaged")
                remove_folder(damaged)
                os.rename(folder, damaged)
                continue
            say(f"resumed from {folder} ({progress.step:,} steps done)")
            return progress
    say(f"no good checkpoint in {run}: starting at step 0")
    if weights:
        model.load_state_dict(load_pretrained(Path(weights), model.config.context).state_dict())
    return Progress()


# ---------- 9. Generation ---------------------------------------------------------------------------------------------


def sample_token(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator) -> torch.Tensor:
    """Draw one token for each row of logits (B, V): (B, 1). Temperature 0 takes the likeliest.

    top_k keeps the k likeliest tokens (Fan et al. 2018); top_p the smallest set of them that reaches probability p
    (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ordered, order = (logits.float() / temperature).sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    if top_k:
        probabilities[:, top_k:] = 0
    if top_p < 1:
        # The sum of the likelier tokens, on the CPU: on a GPU, cumsum is not deterministic.
        before = probabilities.cpu().cumsum(dim=-1).to(logits.device) - probabilities
        probabilities[before >= top_p * probabilities.sum(dim=-1, keepdim=True)] = 0
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(model: GPT, prompt: list[int], count: int, max_new_tokens: int, end: int, temperature: float = 0.8,
             top_k: int = 50, top_p: float = 1.0, seed: int = 0) -> Iterator[list[int]]:
    """Continue `prompt` `count` times in one batch. Yields, token by token, the newest token of every continuation.

    A continuation that has reached `end` stays there; the last yield is when all have. When the context is full, its
    newer half is read again as if it were the prompt.
    """
    device, context = model.wte.weight.device, model.config.context
    generator = torch.Generator(device).manual_seed(seed)
    sequence = torch.tensor([prompt] * count, device=device)
    visible, cache = min(len(prompt), context), None  # `visible`: how many of the newest tokens the model sees
    finished = torch.zeros(count, 1, dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if visible > context:
                visible, cache = max(1, context // 2), None
            new = 1 if cache else visible
            cache = cache or KVCache(model.config, count, device)
            logits = model(sequence[:, -new:], cache=cache)[:, -1]  # (count, V)
            token = sample_token(logits, temperature, top_k, top_p, generator).masked_fill(finished, end)
            sequence, visible = torch.cat([sequence, token], dim=1), visible + 1
            finished |= token == end
            yield token[:, 0].tolist()
            if finished.all():
                return
    finally:
        model.train(was_training)


def sample_texts(model: GPT, tokenizer: Tokenizer, prompt: str, settings: argparse.Namespace,
                 on_text: Callable[[str], None] = lambda text: None) -> list[str]:
    """Continuations of a prompt as texts, without the prompt. `on_text` gets the first one bit by bit, as it grows."""
    end, printed = tokenizer.token_to_id(END_OF_TEXT), ""
    tokens = [[] for _ in range(settings.num_samples)]
    for step in generate(model, encode(tokenizer, prompt) or [end], settings.num_samples, settings.max_new_tokens, end,
                         settings.temperature, settings.top_k, settings.top_p, settings.seed):
        for sequence, token in zip(tokens, step, strict=True):
            sequence.extend([token] if token != end else [])
        text = decode(tokenizer, tokens[0])
        if not text.endswith("\ufffd"):  # half a character: its other bytes come with the next token
            on_text(text[len(printed) :])
            printed = text
    on_text(text[len(printed) :])
    return [decode(tokenizer, sequence) for sequence in tokens]


# ---------- 10. Training step -----------------------------------------------------------------------------------------


@dataclass
class Session:
    """Everything a training step needs. Section 12 puts it together."""

    settings: argparse.Namespace
    rank: int  # number of this process, of `world`
    world: int
    device: torch.device
    dtype: torch.dtype  # of matrix products: bfloat16 by autocast, or float32
    data: TokenData
    order: TrainingOrder
    model: GPT  # the weights: saved, sampled from
    network: Callable  # the same model, compiled and wrapped for several processes: trained and evaluated through
    optimiser: torch.optim.AdamW
    guard: Guard
    micro_batch: int  # sequences per forward pass and process
    mode: str  # "compiled", or why not
    matmul_rate: float  # FLOP/s that a large matrix product reaches here

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    @property
    def rows(self) -> int:
        """Windows per training step, all processes together."""
        return self.settings.batch_tokens // self.order.context

    def fetch_batch(self, step: int) -> torch.Tensor:
        """This process's windows of a step: (rows / world, context + 1), on their way to the device.

        A step reads the same windows however many processes share it: each takes its own part of them.
        """
        share = self.rows // self.world
        batch = torch.from_numpy(self.order.windows(step * self.rows + self.rank * share, share))
        is_cuda = self.device.type == "cuda"  # from pinned memory the copy overlaps with the step before
        return (batch.pin_memory() if is_cuda else batch).to(self.device, non_blocking=is_cuda)

    def speed(self, steps: int, seconds: float) -> dict[str, float]:
        """Tokens per second, and MFU (model FLOPs utilisation): the share of the measured matmul rate that they use."""
        rate = steps * self.settings.batch_tokens / seconds
        return {"tokens_per_second": rate,
                "mfu": rate * flops_per_token(self.model.config) / (self.matmul_rate * self.world)}


STATS = ("loss", "norm", "skip", "stop")  # what a training step returns, before Guard.FIELDS


def training_step(session: Session, step: int, batch: torch.Tensor, stop: bool = False) -> torch.Tensor:
    """One optimiser step on `batch` (rows, context + 1). Returns STATS and Guard.FIELDS as a vector on the device.

    Nothing in here waits for the device: even whether the step is skipped is decided there. `stop` says that this
    process was asked to end; it comes back positive in all processes, so that all of them end after the same step.
    """
    settings, optimiser = session.settings, session.optimiser
    # Every step seeds all generators: dropout depends on nothing that came before, so that resuming is exact.
    torch.manual_seed(int(np.random.SeedSequence([settings.seed, step, session.rank]).generate_state(1, np.uint64)[0]))
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, settings)
    totals = torch.zeros(2, device=session.device)  # loss and stop, summed over micro-batches and processes
    micro_batches = batch.split(session.micro_batch)
    for windows in micro_batches:
        # Processes exchange gradients during the last backward pass only: before, they just add up.
        is_last = windows is micro_batches[-1]
        with contextlib.nullcontext() if is_last or session.world == 1 else session.network.no_sync():
            with session.autocast():
                # Divided by all targets of the step, so that each counts the same whatever the micro-batch is.
                loss = session.network(windows[:, :-1], windows[:, 1:]) / settings.batch_tokens
            (loss * session.world).backward()  # DDP takes the mean over processes; this makes it the sum
        totals[0] += loss.detach()
    totals[1] += float(stop)
    if session.world > 1:
        dist.all_reduce(totals)
    norm = nn.utils.clip_grad_norm_(session.model.parameters(), CLIP)
    skip = session.guard.judge(totals[0], norm)
    optimiser.found_inf = skip  # the fused kernel leaves weights and moments alone where this is 1
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return torch.cat([torch.stack([totals[0], norm, skip, totals[1]]), session.guard.state])


# ---------- 11. Evaluation --------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(session: Session) -> float:
    """Mean loss in nats over every token of the validation slice but the first, in windows of one context.

    Batches have one shape; what is missing to fill the last has target -1 and does not count. Each process takes every
    world-th batch, and the sums are added up.
    """
    tokens, context, rows = session.data.validation, session.model.config.context, session.micro_batch
    losses = [torch.zeros((), device=session.device)]
    session.model.eval()
    for first in range(session.rank * rows * context, len(tokens) - 1, session.world * rows * context):
        stretch = torch.from_numpy(np.asarray(tokens[first : first + rows * context + 1], np.int64))
        batch = torch.stack([torch.zeros(rows * context, dtype=torch.long), torch.full((rows * context,), -1)])
        batch[0, : len(stretch) - 1], batch[1, : len(stretch) - 1] = stretch[:-1], stretch[1:]
        inputs, targets = batch.view(2, rows, context).to(session.device)
        with session.autocast():
            losses.append(session.network(inputs, targets))
    session.model.train()
    total = torch.stack(losses).cpu().double().sum()
    if session.world > 1:
        total = total.to(session.device)
        dist.all_reduce(total)
    return total.item() / (len(tokens) - 1)


def bits_per_byte(loss: float, data: TokenData) -> float:
    """Validation loss in bits per byte of text: unlike nats per token, it can be compared across tokenizers."""
    return loss * (len(data.validation) - 1) / data.facts["bytes"]["validation"] / math.log(2)


BIGRAM_TOKENS = 50_000_000  # training tokens that the bigram model counts at most; it is tried on a tenth of that


def bigram_loss(train: np.ndarray, validation: np.ndarray) -> float:
    """Validation loss in nats per token of a bigram model, the baseline that a language model must beat.

    Interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999, section 2.7): every count is discounted
    by d = n1 / (n1 + 2 n2), and what that frees goes to tokens by the number of different tokens they follow.
    """
    train, validation = train[:BIGRAM_TOKENS].astype(np.int64), validation[: BIGRAM_TOKENS // 10].astype(np.int64)
    size = int(max(train.max(), validation.max())) + 1
    pairs, counts = np.unique(train[:-1] * size + train[1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    followers = np.bincount(pairs // size, minlength=size)  # different tokens seen after each token
    total = np.bincount(pairs // size, counts, size)
    preceders = np.bincount(pairs % size, minlength=size) + 0.5  # the half: no token may have probability 0

    first, second = validation[:-1], validation[1:]
    place = np.minimum(np.searchsorted(pairs, first * size + second), len(pairs) - 1)
    count = np.where(pairs[place] == first * size + second, counts[place], 0)
    seen = np.maximum(total[first], 1)
    freed = np.where(total[first] > 0, discount * followers[first] / seen, 1)
    probability = np.maximum(count - discount, 0) / seen + freed * (preceders / preceders.sum())[second]
    return float(-np.log(probability).mean())


# ---------- 12. Session -----------------------------------------------------------------------------------------------

COMPILE_SECONDS = 60  # a run that takes longer without torch.compile is compiled: that takes half a minute


def join_processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. torchrun puts the first two into the environment; alone, they are 0 and 1."""
    rank, world, local, here = (int(os.environ.get(name, alone)) for name, alone in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        if here > torch.cuda.device_count():
            raise UserError(f"{here} processes need as many GPUs, and this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if world > 1 and not dist.is_initialized():  # hours, because the others wait while the first one tokenises
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=6), device_id=own)
    return rank, world, device


def make_model(settings: argparse.Namespace, tokenizer: Tokenizer) -> GPT:
    """A fresh model, or that of --init. Notes its geometry in the settings.

    For a resumed run, a fresh one of the geometry it had: resume() fills it, and the weights of --init may be gone.
    """
    size = vocabulary_size(tokenizer)
    if settings.weights and settings.model_vocab_size is None:
        model = load_pretrained(Path(settings.weights), settings.context, settings.dropout)
        if size > model.config.vocab_size:
            raise UserError(f"--tokenizer {settings.tokenizer} has {size} tokens, more than the "
                            f"{model.config.vocab_size} that the model of --init knows")
    else:
        names = ("context", "layers", "heads", "width", "dropout")
        model = GPT(GPTConfig(settings.model_vocab_size or size, **{name: getattr(settings, name) for name in names}))
        model.initialise(settings.seed)
    vars(settings).update({name: getattr(model.config, name) for name in ("context", "layers", "heads", "width")})
    settings.model_vocab_size = model.config.vocab_size
    return model


def open_session(settings: argparse.Namespace, processes: tuple, data: TokenData, model: GPT) -> Session:
    """Put the model on the device and find out how it runs best there. Fills in the settings that were still open."""
    rank, world, device = processes
    order = TrainingOrder(data.train, settings.context, settings.seed)
    rows = complete_settings(settings, order, world)
    dtype = choose_dtype(settings, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that autocast leaves in float32
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # strict: told to warn only, attention's backward pass varies
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time

    model.to(device).train()
    optimiser = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=0.0, betas=BETAS, fused=True)
    guard = Guard(device)
    session = Session(settings, rank, world, device, dtype, data, order, model, model, optimiser, guard, rows, "",
                      measure_matmul_rate(device, dtype))
    if settings.micro_batch == "auto":
        settings.micro_batch = largest_micro_batch(session, rows)  # from now on fixed: a resumed run must use the same
    session.micro_batch = settings.micro_batch
    session.network, session.mode = compile_network(session)
    if world > 1:
        session.network = nn.parallel.DistributedDataParallel(session.network, gradient_as_bucket_view=True)
    return session


def complete_settings(settings: argparse.Namespace, order: TrainingOrder, world: int) -> int:
    """Check the batch, and fill in what depends on the length of the data. Returns a process's windows per step."""
    if settings.batch_tokens is None:
        settings.batch_tokens = max(1, 2**15 // (settings.context * world)) * settings.context * world
    rows, rest = divmod(settings.batch_tokens, settings.context * world)
    if rest:
        raise UserError(f"--batch-tokens {settings.batch_tokens} is no multiple of {settings.context} (context) x "
                        f"{world} (processes)")
    if settings.micro_batch != "auto" and rows % settings.micro_batch:
        raise UserError(f"--micro-batch {settings.micro_batch} does not divide the {rows} sequences that each process "
                        "has per step (--batch-tokens / context / processes): give --micro-batch auto")
    if settings.max_steps is None:
        settings.max_steps = max(1, round(settings.epochs * order.per_epoch / rows / world))
        if settings.max_steps < 200 and not settings.weights and settings.name != "nano":
            say(f"only {settings.max_steps} steps: more --epochs or a smaller --batch-tokens would teach it more")
    if settings.warmup_steps is None:
        settings.warmup_steps = min(2000, settings.max_steps // 20)
    if settings.eval_every is None:
        settings.eval_every = min(1000, max(1, settings.max_steps // 5))
    return rows


def choose_dtype(settings: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Of matrix products: bf16 where the hardware really has it (older GPUs claim it too, but emulate it)."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if settings.dtype == "bf16" and not has_bf16:
        raise UserError(f"--dtype bf16 is for GPUs of compute capability 8.0 or more, not for {device_name(device)}")
    return torch.bfloat16 if has_bf16 and settings.dtype != "fp32" else torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} ({platform.machine()}, {torch.get_num_threads()} threads)"


def largest_micro_batch(session: Session, rows: int) -> int:
    """The largest divisor of `rows` that fits a GPU, tried out from 2^16 tokens down; elsewhere, of at most 2^13."""
    limit = 2**16 if session.device.type == "cuda" else 2**13
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0 and size * session.order.context <= limit] or [1]
    if session.device.type != "cuda":
        return sizes[0]
    # Room for what comes later: AdamW's two moments, and the buffers in which processes exchange gradients.
    reserve = [torch.empty_like(p) for p in session.model.parameters() for _ in range(2 + (session.world > 1))]
    limit = 0.95 * torch.cuda.get_device_properties(session.device).total_memory / 2**30  # the rest is lost in gaps
    for size in sizes:
        torch.cuda.reset_peak_memory_stats()
        try:
            run_once(session, session.model, size)
            if peak_memory(session.device) < limit:
                break
        except torch.OutOfMemoryError:
            session.optimiser.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    else:
        raise torch.OutOfMemoryError("not even one sequence fits")
    del reserve
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(agree(session, size, dist.ReduceOp.MIN))


def agree(session: Session, value: float, choose: dist.ReduceOp) -> float:
    """The smallest (ReduceOp.MIN) or largest (MAX) of what the processes have found."""
    values = torch.tensor(float(value), device=session.device)  # one type in all of them
    if session.world > 1:
        dist.all_reduce(values, choose)
    return values.item()


def run_once(session: Session, network: Callable, rows: int) -> None:
    """A forward and a backward pass on `rows` sequences, leaving nothing behind."""
    tokens = torch.zeros(rows, session.order.context + 1, dtype=torch.long, device=session.device)
    with session.autocast():
        loss = network(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    session.optimiser.zero_grad(set_to_none=True)


def compile_network(session: Session) -> tuple[Callable, str]:
    """torch.compile where it works and pays; otherwise the model as it is, and the reason in a few words."""
    settings = session.settings
    if not settings.compile:
        return session.model, "eager (--no-compile)"
    if session.device.type != "cuda":
        return session.model, f"eager (compiling rarely pays on {session.device.type.upper()})"
    if settings.compile_pays is None:  # decided once: a resumed run rounds as it did before
        settings.compile_pays = eager_seconds(session) >= COMPILE_SECONDS
    if not settings.compile_pays:
        return session.model, "eager (so short a run is over before it is compiled)"
    try:
        network = torch.compile(session.model, dynamic=False)
        run_once(session, network, session.micro_batch)
        return network, "compiled"
    except Exception as error:  # no C compiler, no Triton for this GPU: there are many ways, and eager always works
        session.optimiser.zero_grad(set_to_none=True)
        return session.model, f"eager (torch.compile failed: {first_line(error)[:100]})"


def eager_seconds(session: Session) -> float:
    """How long the forward and backward passes of the whole run would take without torch.compile, from timing one.

    Infinite when they do not fit the memory: compiled, they need less.
    """
    try:
        for _ in range(2):  # the first warms up
            synchronise(session.device)
            started = time.perf_counter()
            run_once(session, session.model, session.micro_batch)
            synchronise(session.device)
            seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        seconds = math.inf
        session.optimiser.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    passes = session.rows // (session.micro_batch * session.world) * session.settings.max_steps
    return agree(session, seconds * passes, dist.ReduceOp.MAX)


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in `dtype`: what the hardware reaches, and what MFU is relative to."""
    size = {"cuda": 8192, "mps": 2048, "cpu": 512}[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(15):  # the best of many: the first ones warm up, and other programs may be running
        synchronise(device)
        started = time.perf_counter()
        for _ in range(3):
            a @ b
        synchronise(device)
        seconds.append((time.perf_counter() - started) / 3)
    return 2 * size**3 / min(seconds)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GiB: of the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---------- 13. Training run ------------------------------------------------------------------------------------------


class StopRequest:
    """SIGINT and SIGTERM ask the loop to end after the step; a second one ends the process at once.

    One that follows within a second is the same once more: a scheduler (or Ctrl-C) signals torchrun and its processes,
    and torchrun passes on to them what it gets.
    """

    def __init__(self):
        self.number = None
        self.former = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame: object) -> None:
        if self.number is None:
            self.number, self.noted = number, time.monotonic()
            if is_main_process():
                os.write(2, b"\nstopping after this step and saving; a second signal stops at once\n")
        elif time.monotonic() > self.noted + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


class RunLog:
    """The log of a run: metrics.jsonl, one JSON object per line, and the same in TensorBoard."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        kept = [line for line in read_log(run) if line["step"] <= step and step]  # what a resumed run does again goes
        part = run / "metrics.jsonl.tmp"
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, run / "metrics.jsonl")
        self.lines = open(run / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close()
        self.board = SummaryWriter(str(run), purge_step=step + 1)

    def write(self, step: int, board: bool = True, **values: float | str) -> None:
        """One line; with `board`, TensorBoard too. What is not finite becomes null: JSON has no word for it."""
        values = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if board and isinstance(value, str):
                self.board.add_text(name, f"```\n{value}\n```", step)
            elif board and value is not None:
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.lines.close()
        self.board.close()


def read_log(run: Path) -> list[dict]:
    """The lines of metrics.jsonl. The last one of a killed run may be half a line: it is left out."""
    lines = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def claim_run_folder(settings: argparse.Namespace, data_name: str) -> Path:
    """Make this run's folder, which no other run has: a default name that is taken gets a suffix."""
    if settings.output_dir:
        return make_folder(Path(settings.output_dir))
    model = settings.name if settings.name.startswith("gpt2") else f"gpt2-{settings.name}"
    runs = make_folder(Path("runs"))
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            folder = runs / f"{model}-{data_name}-lr={short(settings.lr)}{suffix}"
            folder.mkdir()
            return folder


def short(value: float) -> str:
    """0.00025 as 2.5e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def train(settings: argparse.Namespace) -> int:
    """Train, from the start or from where a run stopped. Returns the exit code: 0, or 130 / 143 after a signal."""
    folder = Path(settings.output_dir or "runs")
    is_new = settings.output_dir and not settings.resume
    if is_new and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        way_out = "--resume continues the run in it; or " if is_run(folder) else ""
        raise UserError(f"--output-dir {folder} is not empty: {way_out}choose another")
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):  # said before minutes of work, not after
        raise UserError(f"cannot write to {parent}, where {folder} should be")
    started, processes = time.perf_counter(), join_processes()
    data = prepare_tokens(settings)
    session = open_session(settings, processes, data, make_model(settings, data.tokenizer))
    progress = Progress()
    if settings.resume:
        progress = resume(folder, session.model, session.optimiser, session.guard, settings.weights)
        if progress.step > settings.max_steps:
            raise UserError(f"--max-steps {settings.max_steps} is less than the {progress.step} steps that {folder} "
                            "has done")
        if progress.step == settings.max_steps and read_json(folder / "metrics.json").get("status") == "finished":
            say("nothing is left to do: for more steps, --max-steps")
            return 0
    describe(session)
    folder, bigram = None, math.nan
    if is_main_process():
        bigram = bigram_loss(data.train, data.validation)
        tokens = "the same" if len(data.train) <= BIGRAM_TOKENS else f"the first {BIGRAM_TOKENS:,} of the same"
        say(f"baseline: validation loss {bigram:.4f} of a bigram model on {tokens} tokens")
        folder = claim_run_folder(settings, data.facts["name"])
        say(f"folder: {folder}\n")
    return Run(session, progress, folder, bigram, started).train()


def describe(session: Session) -> None:
    """Say on a few lines what is about to run where."""
    settings, config, facts = session.settings, session.model.config, session.data.facts
    rows, tokens, dtype = session.rows, facts["tokens"], str(session.dtype).removeprefix("torch.")
    if dtype == "float32" and session.device.type == "cuda":
        dtype += " (TF32 products)"
    say(f"model: {settings.name}, {count_parameters(session.model):,} parameters ({config.layers} layers, "
        f"{config.heads} heads, width {config.width}, context {config.context}, vocabulary {config.vocab_size:,})")
    say(f"data: {facts['name']}, {tokens['train']:,} training and {tokens['validation']:,} validation tokens of "
        f"{facts['bytes']['validation'] / tokens['validation']:.2f} bytes")
    say(f"device: {session.world} x {device_name(session.device)}, {dtype}, {session.mode}; "
        f"matrix products reach {session.matmul_rate / 1e12:.2f} TFLOP/s")
    say(f"training: {settings.max_steps:,} steps of {rows} x {config.context} tokens "
        f"({settings.max_steps * rows / session.order.per_epoch:.2f} epochs), micro-batch {session.micro_batch}, "
        f"learning rate {short(settings.lr)} ({settings.schedule}, {settings.warmup_steps} steps warm-up)")


class Run:
    """The training loop and what stands around a step: readings, log, evaluations, checkpoints, results."""

    def __init__(self, session: Session, progress: Progress, folder: Path | None, bigram: float, started: float):
        self.session, self.settings, self.progress = session, session.settings, progress
        self.folder, self.bigram, self.started = folder, bigram, started  # folder: of the main process only
        self.report_every = max(1, self.settings.max_steps // 20)
        self.reported = self.began = (progress.step, progress.seconds)
        # What samples begin with: a document, if the model sees enough of them to know how they begin.
        self.prompt = "" if session.data.facts["documents"]["train"] >= 100 else "\n"

    def train(self) -> int:
        """Run to the end, to a signal, or to divergence. Whatever happens, log, metrics.json and plot are written."""
        progress, settings, request, status = self.progress, self.settings, StopRequest(), "failed"
        if self.folder:
            make_folder(self.folder / "checkpoints")
            self.write_metrics("running")
            self.log = RunLog(self.folder, progress.step)
        try:
            if progress.step == 0:
                self.evaluate()
                if settings.weights:  # of --init: if training only makes them worse, they stay the best checkpoint
                    self.save()
            self.loop(request)
            status = "finished" if progress.step >= settings.max_steps else "stopped"
        except BrokenPipeError:  # whoever read the output has gone: main() ends quietly
            raise
        except OSError as error:  # of the log: a full disk, most of all
            raise UserError(f"step {progress.step} cannot be logged in {self.folder} ({first_line(error)}); the last "
                            f"good checkpoint is {self.last_checkpoint()}") from None
        finally:
            request.restore()
            with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
                if self.folder:  # on a full disk this fails too, and the first error is the one to show
                    self.write_metrics(status)
                    self.log.close()
                    plot(self.folder, self.bigram)
        self.finish(status)
        return 0 if status == "finished" else 128 + (request.number or signal.SIGTERM)

    def loop(self, request: StopRequest) -> None:
        """Step after step. The values of a step are read one step later, so that the device never waits for Python."""
        session, progress, settings = self.session, self.progress, self.settings
        batch, waiting, stop = session.fetch_batch(progress.step), None, False
        self.clock = time.perf_counter()
        while progress.step < settings.max_steps and not stop:
            values = training_step(session, progress.step, batch, request.number is not None)
            progress.step += 1
            batch = session.fetch_batch(progress.step)
            arrived, waiting = waiting, (progress.step, start_reading(values))
            stop = arrived is not None and self.log_step(*arrived)
            stop = stop or (session.world == 1 and request.number is not None)
            is_due = progress.step % settings.eval_every == 0 or progress.step == settings.max_steps
            if is_due or stop:
                stop = self.log_step(*waiting) or stop
                waiting = None
                if is_due:
                    self.evaluate()
                self.save()
                self.clock = time.perf_counter()

    def save(self) -> None:
        """A checkpoint, and metrics.json. UserError when there is no room for them."""
        session = self.session
        if not self.folder:
            return
        try:
            save_checkpoint(self.folder, session.model, session.optimiser, session.guard, self.progress,
                            session.data.tokenizer)
            self.write_metrics("running")
        except (OSError, SafetensorError) as error:  # a full disk, most of all
            raise UserError(f"step {self.progress.step} cannot be saved in {self.folder} ({first_line(error)}); the "
                            f"last good checkpoint is {self.last_checkpoint()}") from None

    def log_step(self, step: int, reading: tuple) -> bool:
        """Take in the values of a step: log them, report now and then. True if some process was asked to stop.

        Raises UserError when the run is diverging.
        """
        (values, done), settings = finish_reading(reading), self.settings
        self.progress.seconds, self.clock = self.progress.seconds + done - self.clock, done
        rate = learning_rate(step - 1, settings)
        line = {"loss": values["loss"], "gradient_norm": values["norm"], "learning_rate": rate}
        if values["skip"]:
            rows, order = self.session.rows, self.session.order
            starts = [str(order.start(number)) for number in range((step - 1) * rows, step * rows)]
            line |= {"skipped": values["skipped"], "windows": " ".join(starts)}
            say(f"step {step} skipped: loss {values['loss']:.3f}, gradient norm {values['norm']:.3g}; its windows of "
                f"{order.context} tokens begin at tokens {', '.join(starts[:8])}{', ...' if rows > 8 else ''} of "
                "train.bin (all of them: metrics.jsonl)")
        is_report = step % self.report_every == 0 or step == settings.max_steps
        if is_report:
            seconds_per_step = (self.progress.seconds - self.reported[1]) / (step - self.reported[0])
            self.reported = (step, self.progress.seconds)
            line |= self.session.speed(1, seconds_per_step) | {"memory_gib": peak_memory(self.session.device)}
            left = timedelta(seconds=round((settings.max_steps - step) * seconds_per_step))
            say(f"step {step:>{len(str(settings.max_steps))}}/{settings.max_steps} | loss {values['loss']:.4f} | norm "
                f"{values['norm']:.2f} | lr {rate:.2e} | {line['tokens_per_second']:,.0f} tokens/s | "
                f"MFU {line['mfu']:.0%} | {left} left")
        if self.folder:
            self.log.write(step, board=is_report or step % 10 == 0, **line)
        if Guard.is_diverging(values):
            raise UserError(f"the run diverges at step {step} (mean loss {values['mean_loss']:.3f}, "
                            f"{values['in_a_row']:.0f} steps skipped in a row); the last good checkpoint is "
                            f"{self.last_checkpoint()}. Start anew with a lower --lr, or from what was good: "
                            f"--init {shlex.quote(str(self.folder or 'RUN'))} --lr {short(settings.lr / 4)}")
        return values["stop"] > 0

    def last_checkpoint(self) -> Path | str:
        return next(iter(find_checkpoints(self.folder)), "none") if self.folder else "with the first process"

    def evaluate(self) -> None:
        """Validation loss and a sample, to the terminal and the log."""
        session, progress = self.session, self.progress
        progress.validation_loss = loss = evaluate(session)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, progress.step
        if self.folder:
            bits = bits_per_byte(loss, session.data)
            shorter = {"num_samples": 1, "max_new_tokens": min(100, self.settings.max_new_tokens)}
            shorter = argparse.Namespace(**vars(self.settings) | shorter)
            text = sample_texts(session.model, session.data.tokenizer, self.prompt, shorter)[0]
            say(f"  validation loss {loss:.4f}, {bits:.3f} bits per byte; sample: {text[:60]!r}")
            self.log.write(progress.step, validation_loss=loss, bits_per_byte=bits, sample=text)

    def results(self) -> dict:
        """What has come out so far."""
        progress, session, best = self.progress, self.session, self.progress.best_loss
        steps, seconds = progress.step - self.began[0], progress.seconds - self.began[1]  # since this process began
        return {
            "parameters": count_parameters(session.model),
            "steps": progress.step,
            "tokens": progress.step * self.settings.batch_tokens,
            "epochs": progress.step * session.rows / session.order.per_epoch,
            "skipped_steps": int(session.guard.state[Guard.FIELDS.index("skipped")]),
            "training_seconds": progress.seconds,
            "total_seconds": time.perf_counter() - self.started,  # of this process: all but the imports
            **(session.speed(steps, seconds) if seconds else {}),
            "peak_memory_gib": peak_memory(session.device),
            "validation_loss": progress.validation_loss,
            "best_validation_loss": best,
            "best_step": progress.best_step,
            "bits_per_byte": None if best is None else bits_per_byte(best, session.data),
            "bigram_validation_loss": self.bigram,
        }

    def write_metrics(self, status: str) -> None:
        """metrics.json: what ran, with what, where, and what came out. --resume reads the configuration from it."""
        session, versions = self.session, {"python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
        write_json(self.folder / "metrics.json", {
            "status": status,
            "configuration": vars(self.settings),
            "versions": versions,
            "device": {"name": device_name(session.device), "processes": session.world, "mode": session.mode,
                       "dtype": str(session.dtype), "matmul_flops_per_second": session.matmul_rate},
            "data": session.data.facts,
            "results": self.results(),
        })

    def finish(self, status: str) -> None:
        """The table, a sample, and how to go on."""
        results, session = self.results(), self.session
        script, folder = shlex.quote(sys.argv[0]), shlex.quote(str(self.folder))
        if not self.folder or results["best_validation_loss"] is None:
            return
        for name, value in results.items():
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if value < 1000 else f"{value:,.0f}"
            name = name.replace("_", " ").replace("mfu", "MFU").replace("gib", "GiB")
            say(f"| {name:22} | {shown:>14} |")
        say(f"\nsample:\n{sample_texts(session.model, session.data.tokenizer, self.prompt, self.settings)[0]}\n")
        say(f"{self.folder} holds checkpoints/, training_loss.png, metrics.json, metrics.jsonl and TensorBoard events.")
        if status == "finished":
            say(f"Try it: python {script} --init {folder} --sample")
        else:
            python = "python" if session.world == 1 else f"torchrun --nproc_per_node={session.world}"
            say(f"Stopped after step {results['steps']}. Go on: {python} {script} --resume --output-dir {folder}")


def start_reading(values: torch.Tensor) -> tuple[torch.Tensor, object]:
    """Send the values of a step on their way to the CPU, without waiting for them."""
    if values.device.type == "cpu":
        return values, time.perf_counter()  # there the step is over already
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return host, arrival


def finish_reading(reading: tuple[torch.Tensor, object]) -> tuple[dict[str, float], float]:
    """Wait for what start_reading() sent: the values by name, and the time at which the step was over."""
    values, arrival = reading
    if isinstance(arrival, torch.cuda.Event):
        arrival.synchronize()
    values = dict(zip(STATS + Guard.FIELDS, values.tolist(), strict=True))
    return values, arrival if isinstance(arrival, float) else time.perf_counter()


def plot(run: Path, bigram: float) -> None:
    """training_loss.png: every step's loss and smoothed, validation with its minimum marked, and the bigram model."""
    from matplotlib.figure import Figure

    lines = read_log(run)
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") and "skipped" not in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss")]
    figure = Figure(figsize=(9, 5), layout="tight")
    axes = figure.subplots()
    if training:
        steps, losses = np.array(training).T
        reach, places = max(1, len(losses) // 100), np.arange(len(losses))  # the mean of 2 % of the run
        low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(losses))
        sums = np.cumsum([0, *losses])
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="training, every step")
        axes.plot(steps, (sums[high] - sums[low]) / (high - low), color="C0", label="training, smoothed")
    if validation:
        best = min(validation, key=lambda point: point[1])
        axes.plot(*zip(*validation, strict=True), "o-", color="C1", label="validation")
        axes.plot(*best, "*", color="C3", markersize=14, label=f"smallest: {best[1]:.4f} at step {best[0]:,}")
    axes.axhline(bigram, color="0.4", linestyle="--", label=f"bigram model: {bigram:.4f}")
    if training:  # beside the steep fall of the first steps all that follows would look flat
        late = [loss for step, loss in training + validation if 20 * step >= training[-1][0]]
        late += [bigram] * math.isfinite(bigram)
        margin = np.ptp(late) / 10 or 0.1
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "training_loss.png", dpi=120)


# ---------- 14. Main --------------------------------------------------------------------------------------------------


def resolve_settings(arguments: argparse.Namespace) -> argparse.Namespace:
    """All settings: what was given, over a resumed run's own, over the preset's, over the defaults."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in given:
        if given[name] == "" and name != "sample":  # as a shell passes on a variable that is not set
            raise UserError(f"--{name.replace('_', '-')} is empty")
    if "output_dir" in given and {"sample", "export"} & given.keys():
        raise UserError("--output-dir is for training: --sample and --export take the run that --init names")
    for name in {"data", "tokenizer", "init"} & given.keys():  # absolute, so that a run can go on from another folder
        if given[name] not in ("stdlib", "bpe", "bytes", "gpt2") and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    saved = {}
    if given.get("resume"):
        for name in {"plan", "sample", "export"} & given.keys():
            raise UserError(f"--{name} does not go together with --resume, which continues training")
        run = Path(given["output_dir"]) if "output_dir" in given else newest_run(is_run)
        if not is_run(run):
            raise UserError(f"--resume: there is no run of this script in {run}")
        given["output_dir"] = str(run)
        saved = read_json(run / "metrics.json").get("configuration", {})
        for name in given.keys() & saved.keys() - FREE_ON_RESUME:
            if saved[name] != given[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {saved[name]} in {run}, not {given[name]}, and a resumed run keeps its "
                                f"settings: leave {flag} out, or start a new run")
    name = given.get("model") or saved.get("model") or DEFAULTS["model"]
    preset = FINE_TUNING if "init" in given and "model" not in given else PRESETS[name]
    preset = preset | ({"max_steps": None} if "epochs" in given else {})
    settings = argparse.Namespace(**NOT_FLAGS | {"name": name} | DEFAULTS | preset | saved | given)
    settings.cache_dir = str(Path(settings.cache_dir).resolve())
    if "cache_dir" in given:
        settings.hub_cache = str(Path(settings.cache_dir) / "hub")
    if settings.init and not saved:
        for name in {"layers", "heads", "width"} & given.keys():
            raise UserError(f"--{name} cannot be chosen: --init {settings.init} has its own")
        settings.name, settings.context = Path(settings.init).name, given.get("context")  # None: that of the weights
        settings.weights = str(find_weights(settings))
    settings.tokenizer = settings.tokenizer or settings.weights or "bpe"
    return settings


def is_run(folder: Path) -> bool:
    return (folder / "metrics.json").is_file() and (folder / "checkpoints").is_dir()


def newest_run(is_usable: Callable[[Path], object]) -> Path:
    runs = [folder for folder in Path("runs").glob("*") if is_run(folder) and is_usable(folder)]
    if not runs:
        raise UserError(f"no run of this script in {Path('runs').resolve()}: train one first, or name it with its flag")
    return max(runs, key=lambda folder: (folder / "metrics.json").stat().st_mtime)


def find_weights(settings: argparse.Namespace) -> Path:
    """The folder that --init means: a run's best checkpoint (default: the newest run's), itself, or one on the Hub."""
    run = Path(settings.init) if settings.init else newest_run(find_checkpoints)
    if not (run / "checkpoints").is_dir():
        return fetch(settings.init, MODEL_FILES + TOKENIZER_FILES, "--init", settings.hub_cache)
    for folder in find_checkpoints(run):
        best = checkpoint_folder(run, read_json(folder / "training.json").get("best_step", 0))
        return best if best.exists() else folder
    raise UserError(f"{run} has no finished checkpoint")


def load_for_use(settings: argparse.Namespace) -> tuple[GPT, Tokenizer, Path]:
    """The model of --init (default: the newest run's best), its tokenizer, and where they were."""
    folder = Path(settings.weights) if settings.weights else find_weights(settings)
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer in {folder} has more tokens than the model's {model.config.vocab_size}")
    return model.eval(), tokenizer, folder


def sample(settings: argparse.Namespace) -> int:
    """Continue a prompt, or one after the other from standard input."""
    model, tokenizer, folder = load_for_use(settings)
    _, _, device = join_processes()
    model.to(device)
    say(f"model: {folder}")
    for prompt in [settings.sample] if settings.sample else read_prompts():
        if re.search("[\ud800-\udfff]", prompt):  # surrogates: how Python passes on bytes that are not UTF-8
            raise UserError(f"the prompt {prompt!a} is not UTF-8 text")
        if settings.num_samples == 1:
            say(prompt, end="")
            sample_texts(model, tokenizer, prompt, settings, on_text=lambda text: say(text, end=""))
            say()
        else:
            for number, text in enumerate(sample_texts(model, tokenizer, prompt, settings), 1):
                say(f"--- {number}\n{prompt}{text}")
    return 0


def read_prompts() -> Iterator[str]:
    """Lines of standard input until it ends; at a terminal, asked for."""
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # as in the command line's arguments: sample() refuses both
    if is_terminal:
        say("Type the beginning of a text and press Enter. An empty line begins a new document, Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if is_terminal else "")


def export(settings: argparse.Namespace) -> int:
    """Write a folder for transformers."""
    target = Path(settings.export)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--export {target}: this is not empty, choose another folder")
    model, tokenizer, source = load_for_use(settings)
    make_folder(target.resolve().parent)
    with new_folder(target.resolve()) as folder:
        save_pretrained(model, tokenizer, folder)
    say(f"{source} -> {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it")
    return 0


PLAN_SECONDS = 20  # of trying, at most about this


def plan(settings: argparse.Namespace) -> int:
    """Print what a run needs, try a few of its steps, and leave nothing behind but the token files."""
    processes = join_processes()
    data = prepare_tokens(settings)
    model = make_model(settings, data.tokenizer)
    config, numbers = model.config, sum(parameter.numel() for parameter in model.parameters())
    say(f"compute: {flops_per_token(config) / 1e9:.4f} GFLOP per token, forward and backward")
    say(f"memory: {16 * numbers / 2**30:.2f} GiB for weights, gradients and AdamW's two moments, 4 bytes each")
    session, seconds = open_session(settings, processes, data, model), []
    describe(session)
    say(f"one epoch: {len(data.train):,} tokens, {len(data.train) / settings.batch_tokens:,.1f} steps; each evaluation "
        f"reads {len(data.validation):,} tokens")
    count = 6
    while len(seconds) < count:  # steps of one micro-batch each
        batch = session.fetch_batch(0)[: session.micro_batch]
        synchronise(session.device)
        started = time.perf_counter()
        training_step(session, len(seconds), batch)
        synchronise(session.device)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == 1:  # as many more as there is time for, and as many in every process
            count = int(agree(session, min(count, 1 + PLAN_SECONDS // seconds[0]), dist.ReduceOp.MIN))
    seconds_per_step = session.rows // (session.micro_batch * session.world) * min(seconds)
    speed, rest = session.speed(1, seconds_per_step), timedelta(seconds=round(seconds_per_step * settings.max_steps))
    say(f"measured: {seconds_per_step:.3f} s per step, {speed['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {speed['mfu']:.0%}, peak memory {peak_memory(session.device):.2f} GiB")
    say(f"to the end: {rest} for {settings.max_steps:,} steps, without evaluations")
    return 0


def main(arguments: argparse.Namespace) -> int:
    """Do what the command line says. Returns the exit code."""
    sys.stdout.reconfigure(errors="replace")  # samples hold any character, and not every terminal has all of them
    try:
        settings = resolve_settings(arguments)
        if settings.sample is not None:
            return sample(settings)
        code = export(settings) if settings.export else plan(settings) if settings.plan else train(settings)
        if dist.is_initialized():
            gc.collect()  # DDP's cycles hold the process group, whose threads must not outlive the interpreter
            dist.destroy_process_group()
        return code
    except UserError as error:  # all processes of a machine meet the same one
        message = str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    except BrokenPipeError:  # who read the output has gone (`| head`); nothing more may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if ended by SIGPIPE
    except OSError as error:  # a full disk, a file without permission: its text names the file and the reason
        message = first_line(error)
    except torch.OutOfMemoryError:
        message = "the GPU's memory is too small for this: choose a smaller --micro-batch, --context or --model"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        message = "the memory is too small for this: choose a smaller --micro-batch, --context or --model"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if message:
        print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
