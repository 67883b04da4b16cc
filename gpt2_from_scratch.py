#!/usr/bin/env python3
"""GPT-2 from scratch in raw PyTorch: the whole life of a language model in one file.

    python gpt2_from_scratch.py                               # a small GPT-2 on Python's own source: minutes on a CPU
    python gpt2_from_scratch.py --sample "def main("          # let the newest run continue a text; no text: ask for one
    python gpt2_from_scratch.py --model gpt2 --data texts/    # GPT-2 (124M) on a folder of text, on one GPU
    torchrun --nproc-per-node=8 gpt2_from_scratch.py --model gpt2 --data texts/        # the same run on eight GPUs
    python gpt2_from_scratch.py --model gpt2 --data texts/ --plan                      # what that will cost, beforehand
    python gpt2_from_scratch.py --init openai-community/gpt2 --data my.txt             # go on from OpenAI's weights
    python gpt2_from_scratch.py --init openai-community/gpt2 --evaluate my.txt         # their loss on a text
    python gpt2_from_scratch.py --resume                      # continue the newest run exactly where it stopped
    python gpt2_from_scratch.py --export my-gpt2/             # the newest run's best model, for transformers
    tensorboard --logdir runs                                 # watch all runs

A run leaves in runs/<name>/: checkpoints/ (each loads in Hugging Face transformers as it is), metrics.jsonl (the log),
metrics.json (configuration, versions, device, results), training_loss.png and TensorBoard events.

Sections 2 to 7 are the heart: 2 Model, 3 Data, 4 Optimiser, 5 Training step, 6 Evaluation, 7 Generation. Around it:
1 Settings (first, so that --help answers before PyTorch is loaded), 8 Machine (processes, precision, speed,
compilation), 9 Text and token files, 10 Hugging Face, 11 Checkpoints, 12 Training run (the loop and its log), 13 Other
commands, 14 Helpers (printing, JSON, folders, locks), 15 GPU kernels (the same faster), 16 Main.
"""

import argparse
import contextlib
import copy
import difflib
import functools
import gc
import hashlib
import importlib.metadata
import io
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
import textwrap
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

# ---------- 1. Settings -----------------------------------------------------------------------------------------------

# Sizes: Radford et al. 2019, table 2. Batches and AdamW's learning rates for these sizes: Brown et al. 2020, table 2.1.
# gpt2's recipe with Muon was measured with a smaller vocabulary (resource/EXPERIMENTS.md, "Recipes").
PRESETS = {
    "nano": {"layers": 4, "heads": 4, "width": 128, "block_size": 64, "lr": 8e-3, "batch_tokens": 1024,
             "max_steps": 1250, "vocab_size": 1024, "optimizer": "muon", "muon_lr": 0.015, "schedule": "linear"},
    "gpt2": {"layers": 12, "heads": 12, "width": 768, "block_size": 1024, "lr": 3e-3, "batch_tokens": 2**18,
             "optimizer": "muon", "muon_lr": 0.01, "schedule": "linear"},
    "gpt2-medium": {"layers": 24, "heads": 16, "width": 1024, "block_size": 1024, "lr": 3e-4, "batch_tokens": 2**19},
    "gpt2-large": {"layers": 36, "heads": 20, "width": 1280, "block_size": 1024, "lr": 2.5e-4, "batch_tokens": 2**19},
    "gpt2-xl": {"layers": 48, "heads": 25, "width": 1600, "block_size": 1024, "lr": 2e-4, "batch_tokens": 2**20},
}
ADAMW = {"nano": {"lr": 4e-3, "max_steps": 1500, "schedule": "cosine", "muon_lr": None},  # with --optimizer adamw
         "gpt2": {"lr": 6e-4, "batch_tokens": 2**19, "schedule": "cosine", "muon_lr": None}}
FINE_TUNING = {"model": None, "lr": 1e-4}  # with --init


class UserError(Exception):
    """Something the user can mend. main() prints it as one line, and the script ends with exit code 2."""


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` (not included with `above`) to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf or (above and value == low):
            limits = f"{'above' if above else 'at least'} {low}" + (f", at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range ({limits})")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse: "invalid whole number value: 'x'"
    return parse


COUNT, SHARE = number(int, 1), number(float, 0, 0.5, above=True)


def count_or_auto(text: str) -> int | str:
    return text if text == "auto" else COUNT(text)


def flag(default: Any, help: str, kind: Callable | None = None, **options: Any) -> Any:
    """A field of Settings. `free`: may differ when a run is resumed; all other options are argparse's."""
    if default is not None and not isinstance(default, bool):
        help += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    return field(default=default, metadata={"help": help, "free": False, "type": kind} | options)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says: every field with a help text is a flag, `lr` is --lr.

    None means that the value follows from something else: the preset, the weights of --init, or the data. What follows
    from the preset is filled in by resolve_settings(), what follows from the data by complete_settings().
    """

    # model
    model: str | None = flag("nano", "the sizes below, with their recipe", choices=list(PRESETS))
    init: str | None = flag(None, "start with these weights: a Hub id, a folder of a Hugging Face GPT-2, or a run "
                            "(with --lr 1e-4, about 32768 --batch-tokens)", metavar="WHAT")
    layers: int | None = flag(None, "transformer blocks", COUNT)
    heads: int | None = flag(None, "attention heads per block", COUNT)
    width: int | None = flag(None, "size of the residual stream", COUNT)
    block_size: int | None = flag(None, "tokens that the model sees at once", COUNT)
    dropout: float = flag(0.0, "on embeddings, attention weights and residual branches", number(float, 0, 0.99))
    # data
    data: str = flag("stdlib", "Python's own source; a text, .jsonl, .json or .parquet file or a folder of such, also "
                     ".gz or .zst; or a data set on the Hub, owner/name or owner/name:subset, streamed", metavar="WHAT")
    glob: str = flag("*", "which files of a folder, such as '*.py'", metavar="PATTERN")
    text_column: str = flag("text", "column of JSON, .parquet and Hub data", metavar="NAME")
    limit: int | None = flag(None, "only the first N documents, to try things", COUNT)
    split_on_eot: bool = flag(False, "<|endoftext|> in a text is the border between two documents, not text")
    tokenizer: str | None = flag(None, "bpe, trained on the data (default; with --init: the model's own), bytes, gpt2 "
                                 "(from the Hub), or a folder with tokenizer.json or vocab.json + merges.txt",
                                 metavar="WHAT")
    vocab_size: int = flag(50257, "of --tokenizer bpe; nano: 1024", number(int, 257, 2**20))
    val_fraction: float | None = flag(None, "share of the text held out for validation (default: 0.05, at most about "
                                      "20 million characters)", SHARE)
    # training
    lr: float | None = flag(None, "peak learning rate (default: the preset's)", number(float, 0, 10, above=True))
    optimizer: str = flag("adamw", "muon: for the matrices of the blocks, and adamw for the rest; nano and gpt2: muon",
                          choices=["adamw", "muon"])
    muon_lr: float | None = flag(None, "peak learning rate of muon's matrices (default: --lr, if given; else nano: "
                                       "0.015, gpt2: 0.01)", number(float, 0, 10, above=True))
    schedule: str = flag("cosine", "after warm-up: cosine down to a tenth; linear to zero; constant, then linear to "
                         "zero over the last fifth (wsd); nano, and gpt2 with muon: linear",
                         choices=["cosine", "linear", "wsd"])
    warmup_steps: int | None = flag(None, "linear warm-up (default: a twentieth, at most 2000)", number(int, 0))
    weight_decay: float = flag(0.1, "of matrices; the rest has none", number(float, 0, 10))
    batch_tokens: int | None = flag(None, "tokens per optimiser step, all processes together", COUNT)
    micro_batch_size: int | str = flag("auto", "sequences per forward pass and process, the rest accumulates; auto: "
                                       "what fits", count_or_auto, free=True)
    gradient_checkpointing: bool = flag(False, "keep one activation per block and compute the others again in the "
                                        "backward pass: much less memory, a quarter to a third slower", free=True)
    shard_optimizer: bool = flag(False, "each process keeps the optimiser's state of its share of the parameters "
                                 "(ZeRO-1): less memory, one more exchange per step", free=True)
    epochs: float = flag(1.0, "passes over the data", number(float, 0, above=True))
    max_steps: int | None = flag(None, "optimiser steps, whatever --epochs says (nano: 1250)", COUNT, free=True)
    eval_every: int | None = flag(None, "steps from one evaluation, sample and checkpoint to the next (default: a "
                                  "fifth of all, at most 1000)", COUNT)
    seed: int = flag(42, "of everything that is random", number(int, 0, 2**32 - 1))
    dtype: str = flag("auto", "auto: bf16 on a GPU that has it, fp16 with a loss scale on an older one, else fp32 (on "
                      "a GPU TF32)", choices=["auto", "bf16", "fp16", "fp32"])
    compile: bool = flag(True, "run eagerly, also where torch.compile works")
    deterministic: bool = flag(True, "let a GPU use faster kernels whose rounding varies from run to run: a resumed "
                               "one is then only close to an uninterrupted one")
    # files
    output_dir: str | None = flag(None, "folder of this run (default: runs/<model>-<data>-lr=<lr>)", metavar="DIR",
                                  free=True)
    cache_dir: str = flag("cache", "token files, and downloads if given", metavar="DIR", free=True)
    resume: bool = flag(False, "go on from the last checkpoint of --output-dir (default: of the newest run)", free=True)
    # instead of training, with the model of --init (default: the newest run)
    sample: str | None = flag(None, "continue PROMPT; without PROMPT, every line of standard input", nargs="?",
                              const="", metavar="PROMPT")
    evaluate: str | None = flag(None, "loss, perplexity and bits per byte on DATA, as for --data (default: the run's "
                                "validation text)", nargs="?", const="", metavar="DATA")
    export: str | None = flag(None, "write a folder for transformers", metavar="DIR")
    plan: bool = flag(False, "say what training would take: parameters, memory, speed, time (the data is tokenised "
                      "first: if it is large, add --limit)")
    # sampling
    max_new_tokens: int = flag(200, "longest continuation", COUNT)
    temperature: float = flag(0.8, "0 takes the likeliest token", number(float, 0, 100))
    top_k: int = flag(50, "of the N likeliest tokens only; 0: of all", number(int, 0))
    top_p: float = flag(1.0, "of the likeliest tokens that together reach probability X (below 1 slower on a GPU)",
                        number(float, 0, 1, above=True))
    num_samples: int = flag(1, "continuations in one batch", number(int, 1, 1024))
    # no flags, but what resolve_settings() finds: the folder that --init means; where downloads go
    weights: str | None = None
    hub_cache: str | None = None

    @property
    def name(self) -> str:
        """Of the model, for folders and titles."""
        return self.model or Path(self.init).name

    @property
    def data_flag(self) -> str:
        """The flag that `data` came by, for messages."""
        return "--evaluate" if self.evaluate else "--data"


FLAGS = {field.name: field for field in fields(Settings) if field.metadata}
GROUPS = {"model": "model", "data": "data", "lr": "training", "output_dir": "files",  # which flag begins a group
          "sample": "instead of training, with the model of --init (default: the newest run)",
          "max_new_tokens": "sampling"}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        words = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        meant = [flag for word in words for flag in difflib.get_close_matches(word, self._option_string_actions, 1)]
        hint = f"did you mean {' '.join(meant)}?" if meant else "--help lists all flags"
        self.exit(2, f"error: {message} ({hint})\n")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. A flag that was not given is None: resolve_settings() makes Settings of it."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__.split("\nSections")[0], formatter_class=layout, allow_abbrev=False)
    for name, setting in FLAGS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
            group = group.add_mutually_exclusive_group() if name == "sample" else group
        options = {key: value for key, value in setting.metadata.items() if key != "free" and value is not None}
        word = "--" + name.replace("_", "-")
        if setting.type is bool:
            word, action = ("--no-" + word[2:], "store_false") if setting.default else (word, "store_true")
            options |= {"action": action}
        elif "choices" not in options and "metavar" not in options:
            options["metavar"] = "X" if setting.type in (float, float | None) else "N"
        group.add_argument(word, dest=name, default=None, **options)
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # --help and mistyped flags end here, before the imports that take seconds
    if sys.stderr.isatty():  # the first line takes its place
        print("loading PyTorch ...", end="\r", file=sys.stderr, flush=True)

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
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---------- 2. Model --------------------------------------------------------------------------------------------------
#
# B: sequences in a batch, T: tokens in a sequence, C: width, H: heads, D = C / H: width of a head, V: vocabulary.
# The parameters have OpenAI's names (wte, wpe, h, ln_1, c_attn, ...), so that weights map one to one.


@dataclass(frozen=True)
class GPTConfig:
    """The geometry of a GPT-2."""

    vocab_size: int  # tokens of the tokenizer
    block_size: int = 1024  # the longest sequence; positions are learned, so there is no going beyond it
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0  # Radford et al. trained with 0.1; for one pass over much data 0 is better

    def __post_init__(self) -> None:
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
    """Keys and values of all tokens so far, (layers, B, H, size, D): a new token costs one token's work."""

    def __init__(self, config: GPTConfig, batch: int, size: int, device: torch.device,
                 dtype: torch.dtype = torch.float32):
        shape = (config.layers, batch, config.heads, size, config.width // config.heads)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.size, self.length = size, 0  # tokens that there is room for; tokens so far, counted by GPT.forward()

    def resize(self, batch: int, size: int) -> None:
        """Make room for `size` tokens, and of one sequence make `batch` equal ones."""
        kept = (part[:, :, :, : self.length].expand(-1, batch, -1, -1, -1) for part in (self.keys, self.values))
        self.keys, self.values = (F.pad(part, (0, 0, 0, size - self.length)) for part in kept)
        self.size = size

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
        q, k, v = self.c_attn(x).chunk(3, dim=2)  # (B, T, C) each
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        dropout, mask = self.dropout if self.training else 0.0, None
        if cache:
            k, v = cache.update(self.layer, k, v)
            if cache.length and T > 1:  # new token i has position length + i and sees the positions up to that
                mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        # softmax(q k^T / sqrt(D)) v. A single new token sees all that came before it, and needs no mask.
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T > 1 and mask is None)
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
        self.gradient_checkpointing = False  # in training, keep only the input of every block (Chen et al. 2016)
        self.is_loss_fused = False  # compiled in bf16: the loss with its gradient, by FusedLoss in section 15
        self.wte = nn.Embedding(config.padded_vocab_size, config.width)
        self.wpe = nn.Embedding(config.block_size, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        # Added to the logits: padding rows must never be predicted. So their gradient is zero, and they stay what
        # initialise() makes them, zero.
        padding = torch.arange(config.padded_vocab_size) >= config.vocab_size
        self.register_buffer("mask", torch.zeros(len(padding)).masked_fill(padding, -math.inf), persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """OpenAI's initialisation, the same on every device: N(0, 0.02), positions N(0, 0.01), biases 0.

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

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.wte.weight, self.mask)  # (B, T, C) @ (C, V)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None) -> torch.Tensor:
        """From tokens (B, T) to logits (B, T, padded V); with `cache`, to those of the last token, (B, 1, padded V).

        With `targets` (B, T) to the summed cross-entropy in nats, a scalar; targets of -1 do not count. The sum, not
        the mean, because sums of micro-batches add up to exactly the batch's sum.
        """
        start = cache.length if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:  # block.forward is never compiled: it would be anew for every length of the cache
                x = block.forward(x, cache) if cache else block(x)
        if cache:
            cache.length += tokens.shape[1]
            x = x[:, -1:]
        x = self.ln_f(x)
        if self.is_loss_fused and targets is not None:
            return FusedLoss.apply(x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size)
        logits = self.head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum")


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
    return 6 * matrices + 12 * config.layers * config.width * config.block_size


# ---------- 3. Data ---------------------------------------------------------------------------------------------------
#
# Text becomes two streams of tokens, train and validation, in which the documents stand one behind the other, each
# begun with an end-of-text token. The model reads sequences of one block, cut from a stream wherever they fall: a short
# document shares its sequence with others, which attention sees too, as in GPT-2; one longer than a block goes on in
# another sequence.
#
# A share of the text is held out for validation (--val-fraction; a twentieth, of much text less): whole documents,
# chosen by a hash of their text. Where these would miss the share, the end of one document is held out, so that a
# single file gives its last twentieth (split_threshold() below). Of a stream, which is read only once, it is a share of
# the documents, whatever their sizes. Where the text comes from, Split, and where the tokens are kept: section 9.

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "validation")
Part = tuple[bool, str]  # does a document begin here? And text of it: a large file comes in many
PIECE = 2**15  # characters: longer parts are tokenised in pieces of about this size, so that one keeps all cores busy
LINE_END, WORD_OR_LINE_END = re.compile(r"\S\n(?=\S)"), re.compile(r"\S(?= \S)|\S\n(?=\S)")
NO_END_OF_TEXT = re.compile(rf"[^<\s]{{{len(END_OF_TEXT) - 1}}}")  # a cut behind this is in none
TOLERANCE = 0.05  # how far the held-out share may be off before a document is cut, as a part of the share


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


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut a long text where a line ends between two visible characters, or, in a very long line, before a space between
    two: GPT-2's word pattern always cuts there too. A million characters without either are cut in a word."""
    text, start, searched = "", 0, 0
    for more in texts:
        text, start = text[start:] + more, 0
        while match := (LINE_END.search(text, start + PIECE, start + 4 * PIECE)
                        or WORD_OR_LINE_END.search(text, max(start + 4 * PIECE, searched), start + 32 * PIECE)
                        or NO_END_OF_TEXT.search(text, start + 32 * PIECE)):
            yield text[start : match.end()]
            start = match.end()
        searched = max(0, len(text) - start - 2)
    yield text[start:]


def tokenise(labelled: Iterator[tuple[str, bool, str]], tokenizer: Tokenizer) -> Iterator[tuple]:
    """From (split, does a document begin, text) to (split, tokens, does a document begin, text), in pieces."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    all_pieces = ((split, begins and index == 0, piece) for split, begins, text in labelled
                  for index, piece in enumerate(pieces([text])))
    while batch := list(itertools.islice(all_pieces, 64)):  # shared out among the cores
        encodings = tokenizer.encode_batch_fast([text for _, _, text in batch], add_special_tokens=False)
        for (split, begins, text), encoding in zip(batch, encodings, strict=True):
            yield split, [end, *encoding.ids] if begins else encoding.ids, begins, text


def split_threshold(hashes: np.ndarray, lengths: np.ndarray, share: float) -> tuple[int, float]:
    """(threshold, end): documents whose hash is below the threshold are held out whole, about `share` of all text.

    Of the document that has just this hash, the last `end` (0 to 1) of its text is held out: a single file gives its
    end to validation. It is not cut (`end` is 0 or 1) where whole documents come within TOLERANCE of the share, which
    is at most a half. Equal documents have equal hashes, so they are on one side, or are cut alike.
    """
    values, index = np.unique(hashes, return_inverse=True)  # equal documents count together
    totals = np.bincount(index, lengths)
    ends, wanted = np.cumsum(totals), share * totals.sum()
    place = int(np.searchsorted(ends, wanted))  # the first document that reaches the share
    missing = wanted - (ends[place] - totals[place])
    if missing <= TOLERANCE * wanted:
        return int(values[place]), 0.0
    if ends[place] - wanted <= TOLERANCE * wanted:
        return int(values[place]), 1.0
    return int(values[place]), float(missing / totals[place])


@dataclass
class TokenData:
    """The two streams of a data set, and what is known of them."""

    tokenizer: Tokenizer
    facts: dict  # the source's name; by split its documents, tokens, characters, bytes; what was left out
    train: np.ndarray  # (tokens,) of uint16 or uint32, memory-mapped
    validation: np.ndarray
    fingerprint: str = ""


class TrainingOrder:
    """Which sequences each training step reads: a seeded permutation, without replacement.

    An epoch cuts the token stream at a random offset into sequences of `block_size` + 1 tokens that overlap by one (so
    each token is a target at most once), and visits all of them in random order. A position in this endless order is
    one whole number, so the step tells where a resumed run is, and neither micro-batch nor processes change which text
    a step learns from (masks of dropout do depend on both).
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int):
        if len(tokens) <= block_size:
            raise UserError(f"too little text: {len(tokens):,} training tokens do not fill one block of {block_size}")
        self.tokens, self.block_size, self.seed, self.epoch = tokens, block_size, seed, -1
        self.per_epoch = max(1, (len(tokens) - block_size) // block_size)  # sequences that fit after any offset

    def sequences(self, first: int, count: int) -> np.ndarray:
        """Sequences number `first` to `first + count` of the order: (count, block_size + 1) of int64."""
        starts = [self.start(position) for position in range(first, first + count)]
        return np.stack([self.tokens[start : start + self.block_size + 1] for start in starts]).astype(np.int64)

    def start(self, position: int) -> int:
        """The token at which the sequence at this position of the order starts."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            self.offset = int(random.integers(len(self.tokens) - self.per_epoch * self.block_size))
            self.order, self.epoch = random.permutation(self.per_epoch), epoch
        return self.offset + int(self.order[index]) * self.block_size


# ---------- 4. Optimiser ----------------------------------------------------------------------------------------------

BETAS, CLIP = (0.9, 0.95), 1.0  # and the largest gradient norm: Brown et al. 2020, appendix B
MOMENTUM = 0.9  # of Muon


def parameter_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Weight decay for matrices (embeddings too); none for biases and norms, which have no reason to be small."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimisers(model: GPT, settings: Settings, is_sharded: bool = False) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    Sharded, each process keeps the state of a part of the parameters (ZeRO stage 1, Rajbhandari et al. 2020), updates
    those, and sends them to the others: the numbers are the same.
    """

    def make(kind: type, groups: list[dict], **options: Any) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(groups, kind, **options) if is_sharded else kind(groups, **options)

    groups, optimisers = parameter_groups(model, settings.weight_decay), []
    if settings.optimizer == "muon":
        hidden = {parameter: 3 if name.endswith("c_attn.weight") else 1
                  for name, parameter in model.h.named_parameters() if parameter.dim() == 2}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in hidden]
        muon_groups = [{"params": [p for p, n in hidden.items() if n == matrices], "matrices": matrices,
                        "weight_decay": settings.weight_decay, "rate": (settings.muon_lr or settings.lr) / settings.lr}
                       for matrices in (1, 3)]
        optimisers.append(make(Muon, muon_groups, lr=0.0))
    return [*optimisers, make(torch.optim.AdamW, groups, lr=0.0, betas=BETAS, fused=True)]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one (Jordan et al. 2024).

    But for rounding the same update as torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al. 2025, section
    2.2: it is as large as one of AdamW). Here `found_inf`, as for fused AdamW, skips a step without asking the device;
    a parameter may hold several matrices, one below the other; and those of one shape are handled together.
    """

    STATE = ("momentum_buffer",)

    def __init__(self, params: list[dict], lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "matrices": 1})
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        skip = self.found_inf > 0
        batches: dict[tuple, list] = {}  # shape: (weight, direction) of every matrix with it
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"]
                gradient = torch.where(skip, momentum, parameter.grad)  # then the momentum stays what it is, to the bit
                momentum.lerp_(gradient, 1 - MOMENTUM)
                direction = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
                for weight, part in zip(*(tensor.chunk(group["matrices"]) for tensor in (parameter, direction)),
                                        strict=True):
                    batches.setdefault((part.shape, group["weight_decay"], group["lr"]), []).append((weight, part))
        for (shape, weight_decay, rate), pairs in batches.items():
            rate = torch.where(skip, 0.0, rate)
            updates = orthogonalise(torch.stack([part for _, part in pairs])).float()
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.mul_(1 - rate * weight_decay).sub_(update * (rate * 0.2 * math.sqrt(max(shape))))


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) to about U V^T of each one's singular value decomposition U S V^T.

    Five steps of a quintic Newton-Schulz iteration with Jordan's coefficients: fast rather than exact, the singular
    values end between about 0.7 and 1.2. In bf16 where a GPU has it; CPUs are slow at it.
    """
    has_bf16 = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.bfloat16() if has_bf16 else matrices.float()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


def learning_rate(step: int, settings: Settings) -> float:
    """For step 0, 1, ...: linear warm-up, then cosine to a tenth, linear to zero, or constant and then linear (wsd)."""
    warmup, last = settings.warmup_steps, settings.max_steps
    if settings.schedule == "wsd":  # Hu et al. 2024 (MiniCPM), section 4
        return settings.lr * min(1.0, (step + 1) / max(1, warmup), (last - step) / decay_steps(last))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, last - warmup)
    if settings.schedule == "linear":
        return settings.lr * (1 - progress)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def decay_steps(max_steps: int) -> int:
    """The last fifth of a warm-up-stable-decay run."""
    return max(1, max_steps // 5)


class LossScale:
    """Small gradients vanish in fp16: the loss is multiplied before the backward pass, and the gradients divided after.

    Micikevicius et al. 2018, section 3.2. Halved when a gradient overflows, doubled after 2,000 good steps: rule and
    constants of torch.amp.GradScaler, but decided on the device, so that no step has to wait. Without fp16 it is 1.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.state = torch.tensor([2.0**16 if enabled else 1.0, 0.0], device=device)  # scale, good steps with it

    @property
    def scale(self) -> torch.Tensor:
        return self.state[0]

    def overflowed(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Take note of a step. True on the device if its gradients overflowed because the scale was too large."""
        if not self.enabled:
            return torch.zeros_like(norm, dtype=torch.bool)
        scale, steps = self.state.unbind()
        overflow, grows = ~torch.isfinite(loss + norm), steps + 1 >= self.GROWTH_INTERVAL
        good = torch.stack([torch.where(grows, 2 * scale, scale), torch.where(grows, 0.0, steps + 1)])
        bad = torch.stack([torch.clamp(scale / 2, min=1), torch.zeros_like(steps)])
        self.state = torch.where(overflow, bad, good)
        return overflow & (scale > 1)


class Guard:
    """Watches loss and gradient norm, on the device, so that no step has to wait for their values.

    A step is skipped when one of them is not finite, or is an outlier: the loss lies 10 standard deviations (and half a
    nat) above its running mean, or the gradient norm (beyond the clipping) at 10 times its own. After three outliers in
    a row it is not the text that is at fault but the weights, after a step that was too long: then steps, which
    clipping makes short, lead back, and are taken. A run that has skipped 10 steps in a row, or whose running mean has
    risen by a whole nat over its lowest value, is diverging.
    """

    FIELDS = ("steps", "mean_loss", "variance", "mean_norm", "lowest", "in_a_row", "skipped")
    LEARN = 20  # steps that are watched before any counts as an outlier
    OUTLIERS = 3  # in a row are skipped

    def __init__(self, device: torch.device):
        self.state = torch.tensor([0, 0, 0, 0, math.inf, 0, 0], device=device)

    @torch.no_grad()
    def check(self, loss: torch.Tensor, norm: torch.Tensor, overflowed: torch.Tensor | bool = False) -> torch.Tensor:
        """Take note of a step. Returns 1.0 on the device if it must be skipped, otherwise 0.0.

        One that is skipped because fp16 overflowed is no fault: it does not count.
        """
        steps, mean, variance, mean_norm, lowest, in_a_row, skipped = self.state.unbind()
        is_far = loss > mean + torch.clamp(10 * variance.sqrt(), min=0.5)
        is_steep = norm > torch.clamp(10 * mean_norm, min=CLIP)
        is_outlier = (steps >= self.LEARN) & (is_far | is_steep)
        skip = ~torch.isfinite(loss + norm) | is_outlier & (in_a_row < self.OUTLIERS)
        bad = torch.stack([steps, mean, variance, mean_norm, lowest, in_a_row + 1, skipped + 1])
        rate = torch.clamp(1 / (steps + 1), min=0.02)  # a plain mean at first, then an exponential one
        variance = (1 - rate) * (variance + rate * (loss - mean) ** 2)
        mean, mean_norm = mean + rate * (loss - mean), mean_norm + rate * (norm - mean_norm)
        lowest = torch.where(steps >= self.LEARN, torch.minimum(lowest, mean), lowest)
        good = torch.stack([steps + 1, mean, variance, mean_norm, lowest, in_a_row * is_outlier, skipped])
        bad = torch.where(torch.as_tensor(overflowed, device=bad.device), self.state, bad)
        self.state.copy_(torch.where(skip, bad, good))
        return skip.float()

    @staticmethod
    def is_diverging(state: dict[str, float]) -> bool:
        return state["in_a_row"] >= 10 or state["mean_loss"] > state["lowest"] + 1


# ---------- 5. Training step ------------------------------------------------------------------------------------------
#
# Several processes take one step together, each on its share of the batch: fetch_batch() reads this process's
# sequences, take_gradient() starts the sum over processes as soon as a gradient is there, forward_backward_update()
# adds up the loss, and with --shard-optimizer make_optimisers() (section 4) gives each a part of the optimiser's state.


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found out about the machine, and how the model runs on it."""

    rank: int = 0  # number of this process, of `world`
    world: int = 1
    device: torch.device
    dtype: torch.dtype  # of matrix products: bfloat16 (see make_compute_copy()), float16 (by autocast), or float32
    micro_batch_size: int  # sequences per forward pass and process
    mode: str = "eager"  # "compiled", or why not
    matmul_rate: float  # FLOP/s that a large matrix product reaches here; nan: other programs disturbed the measurement

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is torch.float16)


@dataclass(kw_only=True)
class Trainer:
    """Everything a training step needs. make_trainer() puts it together."""

    settings: Settings
    machine: Machine
    data: TokenData
    order: TrainingOrder
    model: GPT  # the float32 weights: optimised, saved, sampled from
    compute_copy: GPT  # of these master weights, perhaps compiled: make_compute_copy(), compile_compute_copy()
    optimisers: list[torch.optim.Optimizer]
    guard: Guard
    loss_scale: LossScale
    is_last_pass: bool = False  # the backward pass during which processes exchange gradients
    exchanges: list[dist.Work] = field(default_factory=list)  # that have been started
    step_graph: Callable | None = None  # on a GPU: see StepGraph in section 15

    def __post_init__(self) -> None:
        for parameter, copied in zip(self.model.parameters(), self.compute_copy.parameters(), strict=True):
            copied.register_post_accumulate_grad_hook(functools.partial(self.take_gradient, parameter))

    def take_gradient(self, parameter: nn.Parameter, copied: nn.Parameter) -> None:
        """Called when a backward pass has computed the gradient of a parameter of the compute copy.

        It is added up in float32. In the last pass of a step the processes add theirs while others are still computed.
        """
        if copied is not parameter:
            parameter.grad = copied.grad.float() if parameter.grad is None else parameter.grad.add_(copied.grad)
            copied.grad = None
        if self.is_last_pass and self.machine.world > 1:
            self.exchanges.append(dist.all_reduce(parameter.grad, async_op=True))

    @torch.no_grad()
    def refresh_compute_copy(self) -> None:
        """Round the weights to what computes, at the start of whatever computes with them."""
        if self.compute_copy is not self.model:
            torch._foreach_copy_(list(self.compute_copy.parameters()), list(self.model.parameters()))

    @property
    def sequences_per_step(self) -> int:
        """Of all processes together."""
        return self.settings.batch_tokens // self.order.block_size

    def fetch_batch(self, step: int) -> torch.Tensor:
        """This process's sequences of a step, on the device: (sequences_per_step / world, block_size + 1).

        A step reads the same sequences however many processes share it: each takes its own part of them.
        """
        share = self.sequences_per_step // self.machine.world
        first = step * self.sequences_per_step + self.machine.rank * share
        batch = torch.from_numpy(self.order.sequences(first, share))
        is_cuda = self.machine.device.type == "cuda"  # from pinned memory Python need not wait for the copy
        return (batch.pin_memory() if is_cuda else batch).to(self.machine.device, non_blocking=is_cuda)


def make_compute_copy(model: GPT, dtype: torch.dtype) -> GPT:
    """What computes in this dtype: for bfloat16 a copy of the model in it, residual stream and all; else the model.

    Autocast would convert the weights at every step and keep the residual stream in float32. The optimiser works on the
    float32 weights, to which it can add what is too small for bfloat16 (Micikevicius et al. 2018, section 3.1).
    """
    return copy.deepcopy(model).to(dtype) if dtype is torch.bfloat16 else model


STATS = ("loss", "norm", "skip", "overflow", "stop")  # what a training step returns, before Guard.FIELDS


def training_step(trainer: Trainer, step: int, batch: torch.Tensor, stop: bool = False) -> torch.Tensor:
    """One optimiser step on `batch` (sequences, block_size + 1). Returns STATS and Guard.FIELDS, on the device.

    A step whose loss or gradient is not finite, or far out, is skipped (see Guard). Nothing in here waits for the
    device: even that is decided there. `stop` says that this process was asked to end; with several, it comes back
    positive in all of them, so that they end after the same step.
    """
    settings, machine = trainer.settings, trainer.machine
    # Every step seeds all generators: dropout depends on nothing that came before, so that resuming is exact.
    torch.manual_seed(int(np.random.SeedSequence([settings.seed, step, machine.rank]).generate_state(1, np.uint64)[0]))
    for group in (group for optimiser in trainer.optimisers for group in optimiser.param_groups):
        rate = learning_rate(step, settings) * group.get("rate", 1.0)
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
    return trainer.step_graph(batch) if trainer.step_graph else forward_backward_update(trainer, batch, stop)


def forward_backward_update(trainer: Trainer, batch: torch.Tensor, stop: bool = False) -> torch.Tensor:
    """The step itself, whatever its number: the same work on the device every time."""
    settings, machine, parameters = trainer.settings, trainer.machine, list(trainer.model.parameters())
    trainer.refresh_compute_copy()
    totals = torch.zeros(2, device=machine.device)  # loss and stop, summed over micro-batches and processes
    micro_batches = batch.split(machine.micro_batch_size)
    for sequences in micro_batches:
        trainer.is_last_pass = sequences is micro_batches[-1]
        with machine.autocast():
            # Divided by all targets of the step, so that each counts the same whatever the micro-batch is.
            loss = trainer.compute_copy(sequences[:, :-1], sequences[:, 1:]) / settings.batch_tokens
        (loss * trainer.loss_scale.scale).backward()
        totals[0] += loss.detach()
    trainer.is_last_pass = False
    totals[1] += float(stop)
    if machine.world > 1:
        dist.all_reduce(totals)
        while trainer.exchanges:
            trainer.exchanges.pop().wait()
    if trainer.loss_scale.enabled:
        torch._foreach_div_([parameter.grad for parameter in parameters], trainer.loss_scale.scale)
    norm = nn.utils.clip_grad_norm_(parameters, CLIP)
    overflow = trainer.loss_scale.overflowed(totals[0], norm)
    skip = trainer.guard.check(totals[0], norm, overflow)
    for optimiser in trainer.optimisers:
        local_part(optimiser).found_inf = skip  # what torch's GradScaler sets: at 1, weights and moments stay
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return torch.cat([torch.stack([totals[0], norm, skip, overflow.float(), totals[1]]), trainer.guard.state])


def local_part(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser itself, or, sharded, that of this process's parameters."""
    return optimiser.optim if isinstance(optimiser, ZeroRedundancyOptimizer) else optimiser


# ---------- 6. Evaluation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(trainer: Trainer) -> float:
    """Mean loss in nats over every token of the validation text but the first, of all processes together."""
    machine = trainer.machine
    trainer.refresh_compute_copy()
    trainer.compute_copy.eval()
    total = summed_loss(trainer.compute_copy, trainer.data.validation, trainer.order.block_size, machine)
    trainer.compute_copy.train()
    if machine.world > 1:
        total = total.to(machine.device)
        dist.all_reduce(total)
    return total.item() / (len(trainer.data.validation) - 1)


@torch.no_grad()
def summed_loss(network: Callable, tokens: np.ndarray, block_size: int, machine: Machine) -> torch.Tensor:
    """The loss in nats of this process's share of a text, in blocks side by side: a scalar on the CPU.

    Batches have one shape; what is missing to fill the last has target -1 and does not count. Each process takes every
    world-th batch.
    """
    size, losses = machine.micro_batch_size * block_size, [torch.zeros((), device=machine.device)]
    for first in range(machine.rank * size, len(tokens) - 1, machine.world * size):
        stretch = torch.from_numpy(np.asarray(tokens[first : first + size + 1], np.int64))
        batch = torch.stack([torch.zeros(size, dtype=torch.long), torch.full((size,), -1)])
        batch[0, : len(stretch) - 1], batch[1, : len(stretch) - 1] = stretch[:-1], stretch[1:]
        inputs, targets = batch.view(2, machine.micro_batch_size, block_size).to(machine.device)
        with machine.autocast():
            losses.append(network(inputs, targets))
    return torch.stack(losses).cpu().double().sum()


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """Loss in bits per byte of text: unlike nats per token, it can be compared across tokenizers."""
    return loss * (tokens - 1) / size / math.log(2)


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


# ---------- 7. Generation ---------------------------------------------------------------------------------------------

CACHE_STEP = 256  # tokens by which the cache grows
GREEDY = 1e-4  # below this temperature the likeliest token is taken: all others have a probability of about 0


def sample_token(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator) -> torch.Tensor:
    """Draw one token for each row of logits (B, V): (B, 1). Temperature 0 takes the likeliest.

    top_k keeps the k likeliest tokens (Fan et al. 2018); top_p the smallest set of them that reaches probability p
    (Holtzman et al. 2020).
    """
    if temperature < GREEDY:
        return logits.argmax(dim=-1, keepdim=True)
    ordered, order = (logits.float() / temperature).topk(min(top_k or logits.shape[1], logits.shape[1]))
    probabilities = ordered.softmax(dim=-1)
    if top_p < 1:
        # The sum of the likelier tokens, on the CPU: on a GPU, cumsum is not deterministic.
        before = probabilities.cpu().cumsum(dim=-1).to(logits.device) - probabilities
        probabilities[before >= top_p * probabilities.sum(dim=-1, keepdim=True)] = 0
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate(model: GPT, prompt: list[int], count: int, max_new_tokens: int, end: int, temperature: float = 0.8,
             top_k: int = 50, top_p: float = 1.0, seed: int = 0) -> Iterator[list[int]]:
    """Continue `prompt` `count` times in one batch. Yields, token by token, the newest token of every continuation.

    A continuation that has reached `end` stays there; when all have, that was the last. The prompt is read once for all
    of them. When the block is full, its newer half is read again as if it were the prompt. What fits the block is left
    to GraphDecoder (section 15) by a model in bf16 on a GPU, if `top_p` is 1. (On a CPU see `speed_up_products`.)
    """
    weight, block_size = model.wte.weight, model.config.block_size
    generator = torch.Generator(weight.device).manual_seed(seed)
    tokens = [torch.tensor([prompt[-block_size:]], device=weight.device)]  # (1, T); then (count, 1) of every step
    new, cache, last = tokens[0], None, len(tokens[0][0]) + max_new_tokens
    finished = torch.zeros(count, 1, dtype=torch.bool, device=weight.device)
    was_training = model.training
    model.eval()
    try:
        if top_p == 1 and (decoder := graph_decoder(model, count, last, end, temperature, top_k, seed)):
            yield from decoder.run(prompt)
            return
        for _ in range(max_new_tokens):
            if cache is None:
                cache = KVCache(model.config, len(new), new.shape[1], weight.device, weight.dtype)
            elif cache.length == cache.size:
                cache.resize(count, min(block_size, last, cache.size + CACHE_STEP))
            logits = model(new, cache=cache)[:, -1].expand(count, -1)  # (count, V)
            new = sample_token(logits, temperature, top_k, top_p, generator).masked_fill(finished, end)
            tokens.append(new)
            finished |= new == end
            yield new[:, 0].tolist()
            if finished.all():
                return
            if cache.length == block_size:
                text = torch.cat([tokens[0].expand(count, -1), *tokens[1:]], dim=1)
                new, cache = text[:, -max(1, block_size // 2) :], None
    finally:
        model.train(was_training)


def sample_texts(model: GPT, tokenizer: Tokenizer, prompt: str, settings: Settings,
                 on_text: Callable[[str], None] = lambda text: None) -> list[str]:
    """Continuations of a prompt as texts, without the prompt. `on_text` gets the first one bit by bit, as it grows."""
    end, shown = tokenizer.token_to_id(END_OF_TEXT), 0  # so many tokens of the first one have been given to `on_text`
    tokens = [[] for _ in range(settings.num_samples)]
    for step in generate(model, encode(tokenizer, prompt) or [end], settings.num_samples, settings.max_new_tokens, end,
                         settings.temperature, settings.top_k, settings.top_p, settings.seed):
        for continuation, token in zip(tokens, step, strict=True):
            continuation.extend([token] if token != end else [])
        text = decode(tokenizer, tokens[0][shown:])
        if not text.endswith("\ufffd"):  # half a character: its other bytes come with the next token
            on_text(text)
            shown = len(tokens[0])
    on_text(decode(tokenizer, tokens[0][shown:]))
    return [decode(tokenizer, continuation) for continuation in tokens]


# ---------- 8. Machine ------------------------------------------------------------------------------------------------

COMPILE_SECONDS = 60  # a run that would take longer without torch.compile is compiled: that takes some 10 to 30 s
EAGER_SHARE = 0.3  # of the matmul rate, that a run reaches without torch.compile, about
PATIENCE = timedelta(minutes=30)  # how long processes wait for one another in training before they give up
# Dense bf16 (T4, V100: fp16) TFLOP/s of NVIDIA's data sheets, without sparsity, by a part of the device's name.
DATA_SHEET = {"B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A40": 149.7,
              "A10": 125, "L40S": 362, "L4": 121, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71, "V100": 125,
              "T4": 65}
PATIENT_GROUP = None  # the processes once more, for waits that may take days: made by join_processes()


def is_main_process() -> bool:
    """torchrun numbers the processes. The first one writes all files and does all the talking."""
    return int(os.environ.get("RANK", 0)) == 0


def join_processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. torchrun puts the first two into the environment; alone, they are 0 and 1."""
    global PATIENT_GROUP
    rank, world, local, here = (int(os.environ.get(name, alone)) for name, alone in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        if here > torch.cuda.device_count():
            raise UserError(f"{here} processes need as many GPUs, and this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for products of float32
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if world > 1 and not dist.is_initialized():
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=PATIENCE, device_id=own)
        PATIENT_GROUP = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # it notices a process that dies
    return rank, world, device


def on_main_process(task: Callable[[], Any]) -> Any:
    """What `task` returns, which the first process does while the others wait. If it fails, all processes do."""
    result, error = None, None
    if is_main_process():
        try:
            result = task()
        except Exception as failure:
            error = failure
    if dist.is_initialized():
        message = error if error is None or isinstance(error, UserError) else UserError(first_line(error))
        outcome = [result, message]
        dist.broadcast_object_list(outcome, src=0, group=PATIENT_GROUP)
        result, error = outcome[0], error or outcome[1]
    if error:
        raise error
    return result


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Of matrix products: bf16 where the hardware really has it (older GPUs claim it, but emulate it), else fp16."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    least = {"bf16": (8, 0), "fp16": (7, 0), "fp32": (0, 0)}  # Ampere, Volta: the first with tensor cores for it
    if wanted == "auto":
        wanted = next(name for name, needed in least.items() if capability >= needed)
    if capability < least[wanted]:
        raise UserError(f"--dtype {wanted} is for GPUs of compute capability {'.'.join(map(str, least[wanted]))} or "
                        f"more, not for {device_name(device)}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} ({platform.machine()}, {plural(torch.get_num_threads(), 'thread')})"


def data_sheet_rate(name: str) -> float | None:
    """FLOP/s that a card's maker promises for bf16 products; None for a card that is not in the table."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    rates = (tera * 1e12 for card, tera in DATA_SHEET.items() if set(card.upper().split()) <= words)
    return None if {"LAPTOP", "NVL", "MIG", "D"} & words else next(rates, None)  # other chips, or parts of one


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in `dtype`: what the hardware reaches, and what MFU is relative to.

    nan where the times vary so much that other programs must have been running.
    """
    size = {"cuda": 8192, "mps": 2048, "cpu": 512}[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(15):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(3):
            a @ b
        synchronise(device)
        seconds.append((time.perf_counter() - started) / 3)
    settled = sorted(seconds[5:])  # the first ones warm up
    return math.nan if settled[len(settled) // 2] > 1.25 * settled[0] else 2 * size**3 / settled[0]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
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


def speed(trainer: Trainer, steps: int, seconds: float) -> dict[str, float | None]:
    """Tokens and sequences per second, and MFU (model FLOPs utilisation) of the measured and the promised matmul rate.

    An MFU above 1 says that something disturbed the measurement of the rate: then it is None.
    """
    machine, settings = trainer.machine, trainer.settings
    rate, sheet = steps * settings.batch_tokens / seconds, data_sheet_rate(device_name(machine.device))
    flops = rate * flops_per_token(trainer.model.config) / machine.world
    mfu = flops / machine.matmul_rate
    return {"tokens_per_second": rate, "samples_per_second": rate / trainer.order.block_size,
            "mfu": mfu if mfu <= 1 else None, "mfu_of_data_sheet": flops / sheet if sheet else None}


def make_trainer(settings: Settings, processes: tuple[int, int, torch.device], data: TokenData, model: GPT,
                 compiled: bool | None = None) -> Trainer:
    """Put the model on the device and find out how it runs best there.

    `compiled`: what a resumed run was, as one that is compiled rounds in another way. None: find out if it pays.
    """
    rank, world, device = processes
    order = TrainingOrder(data.train, model.config.block_size, settings.seed)
    settings = complete_settings(settings, order, world)
    dtype = choose_dtype(settings.dtype, device)
    if device.type == "cuda" and settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # strict: told to warn only, attention's backward pass varies
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    model.to(device).train()
    model.gradient_checkpointing = settings.gradient_checkpointing
    micro_batch_size = settings.micro_batch_size if settings.micro_batch_size != "auto" else 1
    machine = Machine(rank=rank, world=world, device=device, dtype=dtype, micro_batch_size=micro_batch_size,
                      matmul_rate=measure_matmul_rate(device, dtype))
    trainer = Trainer(settings=settings, machine=machine, data=data, order=order, model=model,
                      optimisers=make_optimisers(model, settings, settings.shard_optimizer and world > 1),
                      compute_copy=make_compute_copy(model, dtype), guard=Guard(device),
                      loss_scale=LossScale(device, dtype is torch.float16))
    if settings.micro_batch_size == "auto":
        trainer.machine = replace(machine, micro_batch_size=largest_micro_batch(trainer))
    trainer.machine = replace(trainer.machine, mode=compile_compute_copy(trainer, compiled))
    if settings.micro_batch_size == "auto" and trainer.machine.mode == "compiled":
        trainer.machine = replace(trainer.machine, micro_batch_size=larger_when_compiled(trainer))
    if StepGraph.can_run(trainer):
        trainer.step_graph = StepGraph(trainer)
    return trainer


def complete_settings(settings: Settings, order: TrainingOrder, world: int) -> Settings:
    """Check the batch, and fill in what depends on the length of the data."""
    block = order.block_size
    batch = settings.batch_tokens or max(1, 2**15 // (block * world)) * block * world
    share, rest = divmod(batch, block * world)
    if rest:
        raise UserError(f"--batch-tokens {batch} is no multiple of {block} (block size) x {world} (processes)")
    if settings.micro_batch_size != "auto" and share % settings.micro_batch_size:
        raise UserError(f"--micro-batch-size {settings.micro_batch_size} does not divide the {share} sequences that "
                        "each process has per step (--batch-tokens / block size / processes): give --micro-batch-size "
                        "auto")
    steps = settings.max_steps or max(1, round(settings.epochs * order.per_epoch * block / batch))
    if settings.max_steps is None and steps < 200 and settings.model not in (None, "nano"):
        say_wrapped(f"note: only {plural(steps, 'step')}: more --epochs or a smaller --batch-tokens would help")
    found = {"batch_tokens": batch, "max_steps": steps, "warmup_steps": min(2000, steps // 20),
             "eval_every": min(1000, max(1, steps // 5))}
    return replace(settings, **{name: value for name, value in found.items() if getattr(settings, name) is None})


def forward_backward(trainer: Trainer, sequences: int) -> None:
    """A forward and a backward pass on so many sequences, leaving nothing behind."""
    tokens = torch.zeros(sequences, trainer.order.block_size + 1, dtype=torch.long, device=trainer.machine.device)
    with trainer.machine.autocast():
        loss = trainer.compute_copy(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    trainer.model.zero_grad(set_to_none=True)


def micro_batch_sizes(trainer: Trainer) -> list[int]:
    """Divisors of a process's sequences, the largest first; of up to 2^16 tokens on a GPU, 2^13 elsewhere."""
    share = trainer.sequences_per_step // trainer.machine.world
    limit = 2**16 if trainer.machine.device.type == "cuda" else 2**13
    return [n for n in range(share, 0, -1) if share % n == 0 and n * trainer.order.block_size <= limit] or [1]


def bytes_beside_a_pass(trainer: Trainer, size: int) -> int:
    """The optimiser's moments, and, where a step takes several passes, the gradients that these add up."""
    world = trainer.machine.world
    moments = 2 / (world if trainer.settings.shard_optimizer else 1)
    copies = moments + (size < trainer.sequences_per_step // world)
    return 4 * int(copies * sum(p.numel() for p in trainer.model.parameters()))


def memory_limit(device: torch.device) -> float:
    """In GiB, of a GPU; what is above it is lost in gaps."""
    return 0.95 * torch.cuda.get_device_properties(device).total_memory / 2**30


def fits(trainer: Trainer, size: int) -> bool:
    """Whether a GPU has the memory for passes of so many sequences."""
    device, reserve = trainer.machine.device, None
    torch.cuda.reset_peak_memory_stats()
    try:
        reserve = torch.empty(bytes_beside_a_pass(trainer, size), dtype=torch.uint8, device=device)
        forward_backward(trainer, size)
        return peak_memory(device) < memory_limit(device)
    except torch.OutOfMemoryError:
        trainer.model.zero_grad(set_to_none=True)
        return False
    finally:
        del reserve
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def largest_micro_batch(trainer: Trainer) -> int:
    """The largest of micro_batch_sizes() that fits."""
    sizes = micro_batch_sizes(trainer)
    if trainer.machine.device.type != "cuda":
        return sizes[0]
    size = next((size for size in sizes if fits(trainer, size)), None)
    if size is None:
        raise torch.OutOfMemoryError("not even one sequence fits")
    return int(agree(trainer.machine, size, dist.ReduceOp.MIN))


def larger_when_compiled(trainer: Trainer) -> int:
    """The micro-batch of a compiled step, which takes less memory: the largest that fits by what it takes now."""
    machine = trainer.machine
    now, before = machine.micro_batch_size, torch.cuda.memory_allocated()
    each = (torch.cuda.max_memory_allocated() - before) / now  # since largest_micro_batch(): of a compiled pass
    size = next((size for size in micro_batch_sizes(trainer) if size > now and before + size * each
                 + bytes_beside_a_pass(trainer, size) < memory_limit(machine.device) * 2**30), now)  # fmt: skip
    size = int(agree(machine, size, dist.ReduceOp.MIN))
    if size > now:
        size = size if agree(machine, fits(trainer, size), dist.ReduceOp.MIN) else now
        forward_backward(trainer, size)  # for peak_memory()
    return size


def agree(machine: Machine, value: float, choose: dist.ReduceOp) -> float:
    """The smallest (ReduceOp.MIN) or largest (MAX) of what the processes have found."""
    values = torch.tensor(float(value), device=machine.device)  # one type in all of them
    if machine.world > 1:
        dist.all_reduce(values, choose)
    return values.item()


def compile_compute_copy(trainer: Trainer, compiled: bool | None) -> str:
    """Compile the compute copy's blocks if it pays; returns in a few words how it runs.

    Compiled on a GPU, unless the run would take less than COMPILE_SECONDS without (`compiled`: see make_trainer()).
    """
    settings, machine, network = trainer.settings, trainer.machine, trainer.compute_copy
    if not settings.compile:
        return "eager (--no-compile)"
    if machine.device.type != "cuda":
        return f"eager (compiling rarely pays on {machine.device.type.upper()})"
    if compiled is None:
        flops = settings.max_steps * settings.batch_tokens * flops_per_token(network.config)
        seconds = agree(machine, flops / (EAGER_SHARE * machine.matmul_rate * machine.world), dist.ReduceOp.MAX)
        compiled = not seconds < COMPILE_SECONDS  # nan: the rate is not known
    if not compiled:
        return "eager (so short a run is over before it is compiled)"
    try:
        # Block by block, which all share one graph: on an H100 2% slower than the whole model, but ready after 12
        # seconds instead of 30.
        for block in network.h:
            block.compile(dynamic=False)
        network.is_loss_fused = machine.dtype is torch.bfloat16
        forward_backward(trainer, machine.micro_batch_size)
        return "compiled"
    except Exception as error:  # no C compiler, no Triton for this GPU: there are many ways, and eager always works
        network.is_loss_fused = False
        for block in network.h:
            block._compiled_call_impl = None  # what block.compile() has set
        trainer.model.zero_grad(set_to_none=True)
        return f"eager (torch.compile failed: {first_line(error)[:100]})"


# ---------- 9. Text and token files -----------------------------------------------------------------------------------
#
# Text comes from files or a stream of the Hub. Its tokens lie in the cache under a fingerprint of all that they depend
# on: train.bin, validation.bin, facts.json and the tokenizer, which a second run only reads.

COLUMN_FILES, COMPRESSED = (".jsonl", ".ndjson", ".jsonlines", ".json", ".parquet"), {".gz": "gzip", ".zst": "zstd"}
TABLES = (".csv", ".tsv")  # would be read as one long text
BOM = b"\xef\xbb\xbf"  # the byte-order mark that some programs write before UTF-8
# The part of the standard library that reads like programs: no tests, no tables of characters, no other people's code.
STDLIB_SKIP = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages"}
VALIDATION_TEXT = 2 * 10**7  # characters held out without --val-fraction, at most about
TOKENIZER_TEXT = 10**8  # characters that a tokenizer is trained on, at most; more hardly changes its merges
SHARD = 1000  # rows of a stream: so often its position is noted, and an interrupted one goes on from there
COUNTED = ("documents", "tokens", "characters", "bytes")  # by split
TOKEN_FILES = "6"  # version of what is in them: to be raised when the same text would give others
FILE_CHANGED = "--data: a file changed while it was being read"


@dataclass
class Source:
    """Where documents come from: files, or a stream of the Hub."""

    name: str  # for the run's folder
    identity: list  # all that its text depends on, for the fingerprint of its token files
    files: list[Path]  # empty for a stream
    read: Callable[[Any], Iterator[Part]]  # the parts of a file; of a stream, from a position (None: its start) on
    position: Callable[[], dict] | None = None  # of a stream: behind the last row that was read


class NotText(Exception):
    """A file that holds no UTF-8 text, and why."""


def open_source(settings: Settings) -> Source:
    """Find what --data names. Raises UserError when there is nothing, or nothing that can be read."""
    path, column = Path(settings.data), settings.text_column
    if settings.data == "stdlib":
        path, name = Path(sysconfig.get_paths()["stdlib"]), "stdlib"
        files = list_files(path, "*.py", STDLIB_SKIP)
    elif path.is_dir():
        name, files = path.resolve().name, list_files(path, settings.glob)
    elif path.exists():
        name, files = path.name.split(".")[0], [path]
    else:
        return open_hub_source(settings)
    if not files:
        raise UserError(f"{settings.data_flag} {settings.data}: no file in it matches {settings.glob!r}")
    identity = [[file.relative_to(path.parent).as_posix(), *size_and_mtime(file)] for file in files]
    return Source(name, [identity, column], files, lambda file: read_file(file, column))


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


def kind_of(file: Path) -> str:
    """The suffix that tells how to read a file: of texts.JSONL.gz it is .jsonl."""
    return Path(re.sub(r"\.(gz|zst)$", "", file.name.lower())).suffix


def read_file(file: Path, column: str) -> Iterator[Part]:
    """A column of a JSON or .parquet file, a document per row; any other file as one document, piece by piece.

    A text file without its byte-order mark and carriage returns, a row as it is. Raises NotText for a file that is no
    text, and UserError with the place for broken rows.
    """
    if kind_of(file) in TABLES:
        raise NotText("a table: .parquet and .jsonl are read")
    if kind_of(file) not in COLUMN_FILES:
        try:
            with io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig") as stream:
                for number, piece in enumerate(pieces(iter(lambda: stream.read(PIECE), ""))):
                    if "\0" in piece:
                        raise NotText("binary")
                    yield number == 0, piece
        except UnicodeDecodeError:
            raise NotText("not UTF-8") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read ({first_line(error)})") from None
        return
    for place, row in read_rows(file, column):
        yield True, text_of(row, column, place)


def text_of(row: object, column: str, place: str) -> str:
    """The text in a row. JSON can spell half a character, which no file could hold."""
    if not isinstance(row, dict):
        raise UserError(f"{place} holds {type(row).__name__}, not an object with a column {column!r}")
    if column not in row:
        raise UserError(f"{place} has the columns {', '.join(row)}: choose one with --text-column")
    if not isinstance(row[column], str | None):
        raise UserError(f"{place}: {column!r} holds {type(row[column]).__name__}, not text")
    return (row[column] or "").encode("utf-8", "replace").decode("utf-8")


def open_bytes(file: Path) -> io.IOBase:
    """The content of a file, decompressed if its suffix says so."""
    if not (compression := COMPRESSED.get(file.suffix.lower())):
        return open(file, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression))


def read_rows(file: Path, column: str) -> Iterator[tuple[str, object]]:
    """(place, row) of a file of JSON lines, of one JSON array, or of a .parquet file: of that only `column`, if there.

    Not read by `datasets`, which guesses types: texts that look like dates would become dates.
    """
    import pyarrow
    import pyarrow.parquet

    place = str(file)
    try:
        if kind_of(file) == ".parquet":
            is_plain = file.suffix.lower() == ".parquet"
            table = pyarrow.parquet.ParquetFile(file if is_plain else io.BytesIO(open_bytes(file).read()))
            columns = [column] if column in table.schema_arrow.names else None
            for batch in table.iter_batches(columns=columns, batch_size=1000):
                yield from ((place, row) for row in batch.to_pylist())
            return
        with open_bytes(file) as lines:
            if kind_of(file) == ".json" and lines.peek(1).removeprefix(BOM).lstrip()[:1] == b"[":
                yield from ((place, row) for row in json.load(lines))
            for number, line in enumerate(lines, 1):
                place = f"{file}, line {number}"
                if line.strip():
                    yield place, json.loads(line.decode("utf-8-sig"))
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place} cannot be read ({first_line(error)})") from None


def open_hub_source(settings: Settings) -> Source:
    """A data set on the Hub, streamed. Its identity is its commit; without a connection, the one that was used last."""
    repo, _, subset = settings.data.partition(":")
    commit, reason = ask_hub(repo, "dataset", settings.data_flag)
    unreachable = UserError(f"{settings.data_flag} {repo}: its tokens are not in {settings.cache_dir}, and the Hub "
                            f"cannot be reached ({reason}). {OFFLINE} {settings.data_flag} FOLDER")
    last_used = Path(settings.cache_dir) / "hub" / f"{repo.replace('/', '--')}.json"
    if commit:
        last_used.parent.mkdir(parents=True, exist_ok=True)
        write_json(last_used, {"commit": commit})
    elif not last_used.exists():
        raise unreachable
    rows, commit = None, read_json(last_used)["commit"]

    def read(position: dict | None) -> Iterator[Part]:
        nonlocal rows
        if reason:
            raise unreachable
        import datasets

        try:
            rows = datasets.load_dataset(repo, subset or None, split="train", streaming=True, revision=commit)
            if position:
                rows.load_state_dict(position)
            for row in rows:
                yield True, text_of(row, settings.text_column, f"{settings.data_flag} {repo}")
        except UserError:
            raise
        except Exception as error:  # of the network or of a file format: datasets passes on what it meets
            raise UserError(f"{settings.data_flag} {settings.data} cannot be streamed ({first_line(error)}); what is "
                            "tokenised is kept, and the same command goes on behind it") from None

    identity = [settings.data, commit, settings.text_column]
    return Source(repo.split("/")[1], identity, [], read, lambda: rows.state_dict())


def documents_of(parts: Iterable[Part], settings: Settings, before: int = 0) -> Iterator[Part]:
    """Without empty documents, split at <|endoftext|> if that was asked for, and no more than --limit documents.

    `before`: how many documents came before these parts.
    """
    begins = follows_end = False
    for starts, text in parts:
        begins, follows_end = begins or starts, follows_end and not starts
        for index, stretch in enumerate(text.split(END_OF_TEXT) if settings.split_on_eot else [text]):
            if index:
                begins = follows_end = True
            if follows_end:  # its line break may come with the next part
                stretch = stretch.lstrip("\n")
            if not stretch:
                continue
            before += begins
            if settings.limit and before > settings.limit:
                return
            yield begins, stretch
            begins = follows_end = False


class Split:
    """Which text is held out for validation, by the hashes of its documents: see split_threshold() in section 3.

    Of files all text is read once before, to know how much there is. Of a stream the threshold is a share of all
    hashes, and without --val-fraction only the first documents below it are held out.
    """

    def __init__(self, source: Source, settings: Settings):
        # Of files; measure() fills these: with text, without and why, characters, what of each document to train on.
        self.files, self.left_out, self.characters, self.cuts = [] if source.files else [None], {}, None, None
        self.empty_rows = 0  # since they were last added to the facts
        # Of a stream: hashes below this are held out, so many more characters of them, and what they have been so far.
        self.threshold = (settings.val_fraction or 0.05) * 2**64
        self.budget = VALIDATION_TEXT if settings.val_fraction is None else math.inf
        self.held_out = set()
        if source.files:
            self.measure(source, settings)

    def measure(self, source: Source, settings: Settings) -> None:
        """Read all files to find out which are text, and how many characters of each document are for training."""
        hashes, lengths = array("Q"), array("Q")
        for file in source.files:
            known = len(hashes)
            if settings.limit and known == settings.limit:
                break
            try:
                parts = source.read(file)
                if kind_of(file) in COLUMN_FILES:
                    parts = self.counted(parts)
                for begins, text in documents_of(parts, settings, known):
                    if begins:
                        digest = hashlib.blake2b(digest_size=8)
                        hashes.append(0)
                        lengths.append(0)
                    digest.update(text.encode("utf-8"))
                    hashes[-1] = int.from_bytes(digest.digest(), "big")
                    lengths[-1] += len(text)
                if len(hashes) == known:
                    raise NotText("empty")
                self.files.append(file)
            except (NotText, UserError) as error:
                if isinstance(error, UserError):
                    # A package.json among texts is no fault; a row that is broken, after good ones, is.
                    if kind_of(file) != ".json" or len(source.files) == 1 or len(hashes) > known:
                        raise
                    error = NotText(f"JSON without a column {settings.text_column!r}")
                self.left_out[str(file)] = str(error)
                del hashes[known:], lengths[known:]
        if not hashes:
            reasons = [f"{Path(file).name} is {reason}" for file, reason in list(self.left_out.items())[:3]]
            raise UserError(f"{settings.data_flag} {settings.data}: there is no text in it ({', '.join(reasons)})")
        self.characters = sum(lengths)
        share = settings.val_fraction or min(0.05, VALIDATION_TEXT / self.characters)
        threshold, end = split_threshold(np.array(hashes), np.array(lengths), share)
        shares = (1.0 if value < threshold else end if value == threshold else 0.0 for value in hashes)
        self.cuts = array("Q", (length - round(length * share) for length, share in zip(lengths, shares, strict=True)))

    def counted(self, rows: Iterable[Part]) -> Iterator[Part]:
        """The same, while those without text are counted."""
        for begins, text in rows:
            self.empty_rows += begins and not text
            yield begins, text

    def cut_in_stream(self, text: str) -> int:
        """How many characters of a stream's document are for training: all or none."""
        value = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
        is_held_out = value < self.threshold and (self.budget > 0 or value in self.held_out)
        if is_held_out and self.budget < math.inf:
            self.held_out.add(value)
            self.budget -= len(text)
        return 0 if is_held_out else len(text)

    def read(self, source: Source, settings: Settings) -> Iterator[Part]:
        """All documents: of files, those that were text when they were measured."""
        try:
            yield from documents_of(itertools.chain.from_iterable(map(source.read, self.files)), settings)
        except NotText:
            raise UserError(FILE_CHANGED) from None

    def label(self, parts: Iterator[Part]) -> Iterator[tuple[str, bool, str]]:
        """(split, does a document begin, text) for the parts of all files, or for some whole documents of a stream."""
        cuts = None if self.cuts is None else iter(self.cuts)
        for begins, text in parts:
            if begins:
                done, cut = 0, next(cuts, 0) if cuts else self.cut_in_stream(text)  # 0: a file grew, see write_tokens()
            here = min(max(0, cut - done), len(text))  # characters of this part that are for training
            if text[:here]:
                yield "train", begins, text[:here]
            if text[here:]:
                yield "validation", done + here == cut, text[here:]
            done += len(text)


def labelled_shards(source: Source, split: Split, settings: Settings, position: dict | None = None,
                    before: int = 0) -> Iterator[Iterator[tuple[str, bool, str]]]:
    """All parts of the files in one go; of a stream, from a position with `before` documents on, shard by shard."""
    if source.files:
        yield split.label(split.read(source, settings))
        return
    rows = source.read(position)
    while shard := list(itertools.islice(rows, min(SHARD, settings.limit - before) if settings.limit else SHARD)):
        parts = list(documents_of(split.counted(shard), settings, before))
        before += len(parts)
        yield split.label(parts)


def training_text(labelled: Iterator[tuple[str, bool, str]]) -> Iterator[str]:
    """Text for the tokenizer: of the training documents only."""
    left = TOKENIZER_TEXT
    for piece in (piece for split, _, text in labelled if split == "train" for piece in pieces([text])):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def prepare_tokens(settings: Settings, fingerprint: str | None = None) -> TokenData:
    """Token files for these settings: from the cache, or made now, by the first process while the others wait.

    `fingerprint`: of a resumed run, which needs its tokens and not the data.
    """
    made = on_main_process(lambda: make_tokens(settings, fingerprint))
    folder = Path(settings.cache_dir) / f"tokens-{made}"
    if dist.is_initialized():
        found = [False] * dist.get_world_size()
        dist.all_gather_object(found, folder.is_dir(), group=PATIENT_GROUP)
        if not all(found):
            raise UserError(f"not all processes find {folder.name}: --cache-dir must lie on a disk that all machines "
                            "share")
    return open_tokens(folder)


def make_tokens(settings: Settings, expected: str | None) -> str:
    """Write the token files unless they are there, and return their fingerprint. UserError if another is expected."""
    cache = Path(settings.cache_dir)
    if expected and (cache / f"tokens-{expected}").exists():
        return expected
    source, tokenizer = open_source(settings), None
    vocab_size = 257 if settings.tokenizer == "bytes" else settings.vocab_size
    if settings.tokenizer not in ("bpe", "bytes"):
        name = "openai-community/gpt2" if settings.tokenizer == "gpt2" else settings.tokenizer
        tokenizer = load_tokenizer(fetch(name, TOKENIZER_FILES, "--tokenizer", settings.hub_cache))
    kind = tokenizer.to_str() if tokenizer else vocab_size
    identity = [source.identity, settings.limit, settings.val_fraction, settings.split_on_eot, kind]
    fingerprint = hashlib.sha256(json.dumps([TOKEN_FILES, *identity]).encode()).hexdigest()[:16]
    if expected not in (None, fingerprint):
        raise UserError(f"--data {settings.data} has changed since this run began, and the tokens it then gave are no "
                        f"longer in {cache}: start a new run")
    folder = cache / f"tokens-{fingerprint}"
    unfinished = folder.with_name(f"{folder.name}.incomplete")
    for stale in cache.glob("tokens-*.incomplete"):  # of processes that were killed, or of streams given up
        if stale != unfinished and time.time() - stale.stat().st_mtime > 7 * 86400:
            shutil.rmtree(stale, ignore_errors=True)
    while not folder.exists():
        unfinished.mkdir(parents=True, exist_ok=True)
        descriptor = lock(unfinished, wait=True)  # another run may be making the same files
        try:
            if unfinished.exists() and not folder.exists():
                with new_folder(folder, is_kept=True):  # which `unfinished` then becomes
                    write_tokens(unfinished, source, settings, tokenizer, vocab_size)
        except Exception:
            if source.files:  # of a stream, the shards that are finished stay
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)
    return fingerprint


def open_tokens(folder: Path) -> TokenData:
    facts = read_json(folder / "facts.json")
    dtype = np.dtype(facts["dtype"])
    for split in SPLITS:
        file = folder / f"{split}.bin"
        if not file.exists() or file.stat().st_size != facts["tokens"][split] * dtype.itemsize:
            raise UserError(f"{file} is damaged: delete {folder}, and it is made anew")
    streams = (np.memmap(folder / f"{split}.bin", dtype, "r") for split in SPLITS)
    return TokenData(load_tokenizer(folder), facts, *streams, folder.name.removeprefix("tokens-"))


def write_tokens(folder: Path, source: Source, settings: Settings, tokenizer: Tokenizer | None,
                 vocab_size: int) -> None:
    """Train a tokenizer, unless there is one, and turn all documents into the files of `folder`."""
    started, before = time.perf_counter(), [size_and_mtime(file) for file in source.files]
    split = Split(source, settings)
    saved = read_json(folder / "position.json") if (folder / "position.json").exists() else {}
    if saved:  # of a stream that broke off
        tokenizer, split.budget, split.held_out = load_tokenizer(folder), saved["budget"], set(saved["held_out"])
        say(f"going on behind the {plural(sum(saved['facts']['tokens'].values()), 'token')} of the last start")
    elif tokenizer is None:
        # Of a stream with a Split of its own, because labelling counts what is held out.
        shards = labelled_shards(source, split if source.files else Split(source, settings), settings)
        tokenizer = train_tokenizer(training_text(itertools.chain.from_iterable(shards)), vocab_size)
        say_wrapped(f"tokenizer: byte-level BPE, {vocabulary_size(tokenizer):,} tokens, trained on the training text "
                    f"in {time.perf_counter() - started:.1f} s")
    tokenizer.save(str(folder / "tokenizer.json"))
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    facts = saved.get("facts") or {
        "name": source.name, "dtype": dtype.name, "end_of_text_in_text": 0, "empty_rows": 0} | {
        name: dict.fromkeys(SPLITS, 0) for name in COUNTED}
    facts["left_out"] = split.left_out
    write_shards(folder, source, split, settings, tokenizer, facts, saved.get("stream"))
    for name in SPLITS:
        if facts["tokens"][name] < 2:  # one to read and one to predict
            raise UserError(f"too little text fell to {name} (--val-fraction says how much does)")
    if before != [size_and_mtime(file) for file in source.files]:
        raise UserError(FILE_CHANGED)
    write_json(folder / "facts.json", facts)
    (folder / "position.json").unlink(missing_ok=True)
    documents, size, tokens = (sum(facts[name].values()) for name in ("documents", "bytes", "tokens"))
    say(f"tokenised: {plural(documents, 'document')}, {size / 1e6:.1f} MB, {plural(tokens, 'token')} in "
        f"{time.perf_counter() - started:.1f} s")


def write_shards(folder: Path, source: Source, split: Split, settings: Settings, tokenizer: Tokenizer,
                 facts: dict, position: dict | None) -> None:
    """Append the tokens of all documents to the files of `folder`; count in `facts`; note how far a stream has come."""
    done, dtype = sum(facts["documents"].values()), np.dtype(facts["dtype"])
    bar = tqdm(total=split.characters, unit="char", unit_scale=True, desc="tokenising", disable=None, ncols=79)
    with open(folder / "train.bin", "ab") as train, open(folder / "validation.bin", "ab") as validation, bar:
        outputs = dict(zip(SPLITS, (train, validation), strict=True))
        for name, file in outputs.items():
            file.truncate(facts["tokens"][name] * dtype.itemsize)  # what a dead process wrote behind its last note
        for shard in labelled_shards(source, split, settings, position, done):
            for name, tokens, begins, text in tokenise(shard, tokenizer):
                outputs[name].write(np.array(tokens, dtype).tobytes())
                for what, amount in zip(COUNTED, (begins, len(tokens), len(text), len(text.encode())), strict=True):
                    facts[what][name] += int(amount)
                facts["end_of_text_in_text"] += text.count(END_OF_TEXT)
                bar.update(len(text))
            facts["empty_rows"], split.empty_rows = facts["empty_rows"] + split.empty_rows, 0
            if not source.files:
                for name, file in outputs.items():
                    file.flush()
                    sync(folder / f"{name}.bin")
                write_json(folder / "position.json", {"stream": source.position(), "facts": facts,
                                                      "budget": split.budget, "held_out": sorted(split.held_out)})


# ---------- 10. Hugging Face ------------------------------------------------------------------------------------------

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # Hugging Face keeps OpenAI's (in, out) layout
MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt"]
HF_NAMES = {  # our name: that in Hugging Face's GPT2Config
    "vocab_size": "vocab_size", "block_size": "n_positions", "layers": "n_layer", "heads": "n_head", "width": "n_embd",
}
# Settings of GPT2Config that change the function. With another value it is another model, not GPT-2.
PLAIN_GPT2 = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}


def load_pretrained(folder: Path, block_size: int | None = None, dropout: float = 0.0) -> GPT:
    """A GPT from a Hugging Face folder: config.json and safetensors, with or without the prefix `transformer.`.

    A shorter `block_size` drops the positions beyond it. Raises UserError for anything but a plain, complete GPT-2.
    """
    described = read_json(folder / "config.json")
    for name, value in PLAIN_GPT2.items():
        if described.get(name, value) != value:
            raise UserError(f"{folder} is no plain GPT-2: {name} is {described[name]!r}")
    sizes = {ours: described.get(theirs) for ours, theirs in HF_NAMES.items()}
    learned = GPTConfig(**sizes, dropout=dropout)
    if described.get("n_inner") not in (None, 4 * learned.width):
        raise UserError(f"{folder} is no plain GPT-2: n_inner is {described['n_inner']}")
    if block_size and block_size > learned.block_size:
        raise UserError(f"--block-size {block_size} is more than the {learned.block_size} positions of {folder}")
    weights = read_weights(folder)
    model = GPT(replace(learned, block_size=block_size or learned.block_size))
    learned_rows = {"wte.weight": learned.vocab_size, "wpe.weight": learned.block_size}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights:
                raise UserError(f"{folder} lacks the weight {name}")
            tensor = weights[name].t() if name.endswith(TRANSPOSED) else weights[name]
            expected = (learned_rows.get(name, len(parameter)), *parameter.shape[1:])
            if tensor.shape != expected:
                raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not {expected}")
            rows = min(len(tensor), len(parameter))  # fewer of wpe with a shorter block, more of wte with padding
            parameter.zero_()
            parameter[:rows] = tensor[:rows]
    return model


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names, without the prefix `transformer.`."""
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
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}


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
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
    })


HUB_SECONDS = 10  # how long the Hub has to answer
OFFLINE = "Offline, copy its files into a folder and give that:"


def ask_hub(name: str, kind: str, flag: str) -> tuple[str | None, str | None]:
    """The commit of a model or data set, or else why the Hub cannot be asked. UserError when it has no such thing.

    Asked before any download, because the Hub's client tries again for minutes when nothing answers.
    """
    # A mistyped path is no Hub id either: there the folder exists, or the name ends like a file's.
    is_path = Path(name).parent.is_dir() or Path(name).suffix in (".txt", ".md", ".py", *COMPRESSED, *COLUMN_FILES)
    if is_path or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UserError(f"{flag} {name}: no such file, no such folder, and no Hub id (owner/name)")
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS).sha, None
    except errors.RepositoryNotFoundError:
        what = {"model": "model", "dataset": "data set"}[kind]
        raise UserError(f"{flag} {name}: the Hub has no such {what} (or it is private: `hf auth login`)") from None
    except Exception as error:  # whichever HTTP library the client uses, it has error classes of its own
        return None, first_line(error)


def fetch(name: str, patterns: list[str], flag: str, cache_dir: str | None) -> Path:
    """The folder `name`, or the files of that model on the Hub: from the cache when there is no connection."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    commit, reason = ask_hub(name, "model", flag)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=cache_dir,
                                      local_files_only=commit is None))
    except Exception as error:
        raise UserError(f"{flag} {name}: not in the cache, and no Hub ({reason or first_line(error)}). {OFFLINE} "
                        f"{flag} FOLDER") from None


# ---------- 11. Checkpoints -------------------------------------------------------------------------------------------
#
# checkpoints/step-00000500/ is a Hugging Face folder (section 10) with two more files: training.safetensors (the
# optimisers' moments, the guard's statistics, fp16's loss scale) and training.json (step, time, best loss). All else
# follows from seed and step: the learning rate, the place in the data, and the state of all generators, which every
# step seeds (section 5). Run.loop() writes one after each evaluation (at step 0 only with --init), when asked to stop,
# and before a decay (wsd); the last two are kept, the best, and the one before a decay.


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimiser steps taken
    seconds: float = 0.0  # spent on training steps
    validation_loss: float | None = None  # the last one, nats per token
    best_loss: float | None = None  # of the evaluated checkpoints; None: none of them is
    best_step: int | None = None


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def find_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def state_names(optimiser: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimiser keeps for each parameter."""
    return getattr(local_part(optimiser), "STATE", ("step", "exp_avg", "exp_avg_sq"))  # the latter: AdamW's


def training_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors beside the weights that the next step depends on. All processes must ask, as each may have a part."""
    tensors = {"guard": trainer.guard.state}
    if trainer.loss_scale.enabled:
        tensors["loss_scale"] = trainer.loss_scale.state
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for optimiser in trainer.optimisers:
        mine = local_part(optimiser)
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            for key in state_names(optimiser):
                value = mine.state.get(parameter, {}).get(key)
                if mine is not optimiser:  # one process has it, the others add nothing
                    shape = () if key == "step" else parameter.shape
                    value = torch.zeros(shape, device=parameter.device) if value is None else value.clone()
                    dist.reduce(value, 0)
                if value is not None:
                    tensors[f"{key}.{names[parameter]}"] = value.contiguous()
    return tensors


def save_checkpoint(run: Path, model: GPT, tensors: dict[str, torch.Tensor], progress: Progress, tokenizer: Tokenizer,
                    keep: set[int]) -> None:
    """Write a checkpoint; then keep the last two, and those of the steps in `keep`."""
    with new_folder(checkpoint_folder(run, progress.step)) as folder:
        save_pretrained(model, tokenizer, folder)
        save_file(tensors, folder / "training.safetensors")
        write_json(folder / "training.json", vars(progress))
    for old in find_checkpoints(run)[2:]:
        if int(old.name.removeprefix("step-")) not in keep:
            remove_folder(old)


def load_checkpoint(folder: Path, trainer: Trainer) -> Progress:
    """Fill a trainer from a checkpoint. UserError, and nothing is filled, when it is damaged."""
    saved, values = load_pretrained(folder, dropout=trainer.model.config.dropout), read_json(folder / "training.json")
    if saved.config != trainer.model.config:
        raise UserError(f"{folder} is the checkpoint of a model of another shape")
    names, states = {parameter: name for name, parameter in trainer.model.named_parameters()}, []
    try:
        progress = Progress(**{name: values[name] for name in vars(Progress())})
        tensors = load_file(folder / "training.safetensors")
        for optimiser in trainer.optimisers:
            keys = state_names(optimiser) if progress.step else ()  # at step 0 there are none yet
            for parameter in (p for group in local_part(optimiser).param_groups for p in group["params"]):
                state = {key: tensors[f"{key}.{names[parameter]}"].to(parameter.device) for key in keys}
                states.append((local_part(optimiser), parameter, state))
        guard = tensors["guard"]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"its training state is damaged ({first_line(error)})") from None
    trainer.model.load_state_dict(saved.state_dict())
    for optimiser, parameter, state in states:
        optimiser.state[parameter] = state
    trainer.guard.state.copy_(guard)
    if trainer.loss_scale.enabled and "loss_scale" in tensors:  # not from, nor into, a run in another precision
        trainer.loss_scale.state.copy_(tensors["loss_scale"])
    return progress


def resume(run: Path, trainer: Trainer) -> Progress:
    """Continue from the newest checkpoint that can be read; put aside those that cannot, and say so.

    A warm-up-stable-decay run that shall train longer than it did goes on from before its decay. Without any
    checkpoint a run starts again, with the weights of --init if it had some.
    """
    settings, saved = trainer.settings, read_json(run / "metrics.json")
    before = saved.get("configuration", {}).get("max_steps", settings.max_steps)

    last = math.inf  # step that shall be gone on from, if possible: where a decay began that is undone
    if settings.schedule == "wsd" and settings.max_steps > before:
        last = before - decay_steps(before)
    folder, progress = on_main_process(lambda: load_newest(run, trainer, last))
    if folder is None:
        say(f"no good checkpoint in {run}: starting at step 0")
        if settings.weights:
            model = load_pretrained(Path(settings.weights), trainer.order.block_size)
            trainer.model.load_state_dict(model.state_dict())
        return progress
    say(f"resumed from {folder} ({plural(progress.step, 'step')} done)")
    precision = str(trainer.machine.dtype).removeprefix("torch.")
    if saved.get("precision") not in (None, precision):
        say_wrapped(f"note: this run was in {saved['precision']}, and goes on in {precision}")
    if trainer.machine.rank:
        load_checkpoint(folder, trainer)
    if progress.step > settings.max_steps:
        raise UserError(f"--max-steps {settings.max_steps} is less than the {progress.step} steps that {run} has done")
    if settings.max_steps != before:
        old, new = (learning_rate(max(0, progress.step - 1), replace(settings, max_steps=n)) for n in
                    (before, settings.max_steps))
        rates = "" if math.isclose(old, new, rel_tol=1e-3) else (
            f"; at step {progress.step:,} the learning rate would have been {new:.2e} in place of {old:.2e}")
        say_wrapped(f"--max-steps: {before:,} -> {settings.max_steps:,}{rates}")
    return progress


def load_newest(run: Path, trainer: Trainer, last: float) -> tuple[Path | None, Progress]:
    """Fill a trainer from the newest checkpoint up to step `last`, or else from a later one, and return which it was.

    Those after it become *.decayed, those that are damaged *.damaged. The best one may be among them: then it is this
    one, if it was evaluated, or none.
    """
    for unfinished in (run / "checkpoints").glob("*.incomplete"):
        say(f"{unfinished.name} is deleted: it was never finished")
        shutil.rmtree(unfinished, ignore_errors=True)
    found = find_checkpoints(run)
    decayed = [folder for folder in found if int(folder.name.removeprefix("step-")) > last]
    for folder in sorted(found, key=decayed.__contains__):  # otherwise newest first, as they are
        try:
            progress = load_checkpoint(folder, trainer)
        except UserError as error:
            say(f"{folder.name} is damaged ({error}): put aside as {folder.name}.damaged")
            put_aside(folder, "damaged")
            continue
        if decayed and folder not in decayed:
            say_wrapped(f"the decay that began at step {last:,} is undone: its checkpoints become *.decayed")
            for other in decayed:
                put_aside(other, "decayed")
        if progress.best_step is not None and not checkpoint_folder(run, progress.best_step).is_dir():
            own = [line["validation_loss"] for line in read_log(run)
                   if line["step"] == progress.step and line.get("validation_loss") is not None]
            progress.best_loss, progress.best_step = (own[-1], progress.step) if own else (None, None)
        return folder, progress
    return None, Progress()


def put_aside(folder: Path, reason: str) -> None:
    """Under a name that says why it is no checkpoint."""
    target = folder.with_name(f"{folder.name}.{reason}")
    remove_folder(target)
    os.rename(folder, target)


# ---------- 12. Training run ------------------------------------------------------------------------------------------


class StopRequest:
    """SIGINT and SIGTERM ask the loop to end after the step; a second one ends the process at once.

    One that follows within a second is the same once more: a scheduler (or Ctrl-C) signals torchrun and its processes,
    and torchrun passes on to them what it gets.
    """

    def __init__(self) -> None:
        self.number = None
        self.former = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame: object) -> None:
        if self.number is None:
            self.number, self.noted = number, time.monotonic()
            if is_main_process():
                with contextlib.suppress(OSError):  # the same Ctrl-C has ended `tee`
                    os.write(2, b"\nstopping after this step and saving; a second signal stops at once\n")
        elif time.monotonic() > self.noted + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


def train(settings: Settings) -> int:
    """Train, from the start or from where a run stopped. Returns the exit code: 0, or 130 / 143 after a signal."""
    folder = Path(settings.output_dir or "runs")
    if settings.output_dir and not settings.resume and is_in_use(folder):
        way_out = "--resume continues the run in it; or " if is_run(folder) else ""
        raise UserError(f"--output-dir {folder} is not empty: {way_out}choose another")
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):  # said before minutes of work, not after
        raise UserError(f"cannot write to {parent}, where {folder} should be")
    started, processes = time.perf_counter(), join_processes()
    held = on_main_process(lambda: lock_run(folder)) if settings.resume else None
    try:
        saved = read_json(folder / "metrics.json") if settings.resume else {}
        data = prepare_tokens(settings, saved.get("data", {}).get("fingerprint"))
        model = make_model(settings, data.tokenizer, saved.get("model"))
        trainer = make_trainer(settings, processes, data, model, saved.get("mode") == "compiled" if saved else None)
        settings, progress = trainer.settings, Progress()
        if settings.resume:
            progress = resume(folder, trainer)
            if progress.step == settings.max_steps and saved.get("status") == "finished":
                say("nothing is left to do: for more steps, --max-steps")
                return 0
        describe(trainer)
        bigram = bigram_loss(data.train, data.validation) if is_main_process() else math.nan
        some = "the same" if len(data.train) <= BIGRAM_TOKENS else f"the first {BIGRAM_TOKENS:,} of the same"
        say(f"baseline: validation loss {bigram:.4f} of a bigram model on {some} tokens")
        if not settings.resume:
            folder = on_main_process(lambda: new_run_folder(settings, data.facts["name"]))
            held = on_main_process(lambda: lock_run(folder))
        say(f"folder: {folder}\n")
        return Run(trainer, progress, folder, bigram, started).train()
    finally:
        if is_main_process() and held is not None:
            os.close(held)


def lock_run(folder: Path) -> int:
    """Take the lock of a run's folder: two processes must not write into one. The lock of a dead process is free."""
    if not (folder / "lock").exists():
        (folder / "lock").touch()
    return lock(folder / "lock")


def new_run_folder(settings: Settings, data_name: str) -> Path:
    """Make this run's folder, which no other run has: a default name that is taken gets a suffix."""
    if settings.output_dir:
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    model = settings.name if settings.name.startswith("gpt2") else f"gpt2-{settings.name}"
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            folder = Path("runs", f"{model}-{data_name}-lr={short(settings.lr)}{suffix}")
            folder.mkdir(parents=True)
            return folder


def short(value: float) -> str:
    """0.00025 as 2.5e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def make_model(settings: Settings, tokenizer: Tokenizer, saved: dict | None = None) -> GPT:
    """A fresh model, or that of --init. For a resumed run, one of the geometry that it had: resume() fills it."""
    size = vocabulary_size(tokenizer)
    if settings.weights and not saved:
        model = load_pretrained(Path(settings.weights), settings.block_size, settings.dropout)
        if size > model.config.vocab_size:
            raise UserError(f"--tokenizer {settings.tokenizer} has {size} tokens, more than the "
                            f"{model.config.vocab_size} that the model of --init knows")
        return model
    names = ("block_size", "layers", "heads", "width", "dropout")
    sizes = saved or {"vocab_size": size} | {name: getattr(settings, name) for name in names}
    model = GPT(GPTConfig(**sizes))
    model.initialise(settings.seed)
    return model


def describe(trainer: Trainer) -> None:
    """Say on a few lines what is about to run where, and what looks wrong about it."""
    settings, machine, config, facts = trainer.settings, trainer.machine, trainer.model.config, trainer.data.facts
    parameters, characters, tokens = count_parameters(trainer.model), facts["characters"], facts["tokens"]
    epochs = settings.max_steps * trainer.sequences_per_step / trainer.order.per_epoch
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[machine.dtype]
    dtype = "TF32" if (dtype, machine.device.type) == ("fp32", "cuda") else dtype
    rate = machine.matmul_rate / 1e12
    reach = "could not be timed (other programs run)" if math.isnan(rate) else f"reach {rate:.2f} TFLOP/s"
    defaults = {name: flag.default for name, flag in FLAGS.items()} | PRESETS.get(settings.model, {})
    shown = ("dropout", "weight_decay", "gradient_checkpointing", "shard_optimizer")
    muon = f", Muon's {short(settings.muon_lr or settings.lr)}" if settings.optimizer == "muon" else ""
    other = "".join(f", {name.replace('_', '-')} {getattr(settings, name)}" for name in shown
                    if getattr(settings, name) not in (None, defaults.get(name)))
    say_wrapped(f"model: {settings.name}, {parameters:,} parameters ({plural(config.layers, 'layer')}, "
                f"{plural(config.heads, 'head')}, width {config.width}, block size {config.block_size}, vocabulary "
                f"{config.vocab_size:,})")
    say_wrapped(f"data: {facts['name']}, {tokens['train']:,} training and {tokens['validation']:,} validation tokens "
                f"({characters['train']:,} and {characters['validation']:,} characters: "
                f"{characters['validation'] / sum(characters.values()):.2%} for validation)")
    say_wrapped(f"device: {machine.world} x {device_name(machine.device)}, {dtype}, {machine.mode}; matrix products "
                f"{reach}")
    say_wrapped(f"training: {plural(settings.max_steps, 'step')} of {trainer.sequences_per_step} x {config.block_size} "
                f"tokens ({epochs:.2f} epochs), micro-batch {machine.micro_batch_size}, learning rate "
                f"{short(settings.lr)}{muon} ({settings.schedule}, {plural(settings.warmup_steps, 'step')} warm-up), "
                f"seed {settings.seed}{other}")
    note_faults(facts["left_out"], facts["empty_rows"], facts["end_of_text_in_text"])
    if tokens["train"] < parameters and not settings.weights:
        say_wrapped(f"note: {plural(tokens['train'], 'training token')} are few for {parameters:,} parameters: the "
                    "model will learn them by heart; a smaller model or more text would do better")


def note_faults(left_out: dict[str, str], empty_rows: int, ends_of_text: int) -> None:
    """Say what gave no text: files, and why; rows. And how often the text holds an end-of-text token as letters."""
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(left_out.values()).items())
        names = ", ".join(Path(file).name for file in list(left_out)[:3])
        say_wrapped(f"left out: {plural(len(left_out), 'file')} ({reasons}): {names}{', ...' * (len(left_out) > 3)}")
    if empty_rows:
        say(f"left out: {plural(empty_rows, 'row')} without text")
    if ends_of_text:
        say_wrapped(f"note: {END_OF_TEXT} stands {plural(ends_of_text, 'time')} in the text and is text like any "
                    "other; if it is the border between documents, --split-on-eot")


class Run:
    """The training loop and what stands around a step: log, evaluations, checkpoints, results."""

    def __init__(self, trainer: Trainer, progress: Progress, folder: Path, bigram: float, started: float):
        self.trainer, self.settings, self.progress = trainer, trainer.settings, progress
        self.folder, self.bigram, self.started, self.log = folder, bigram, started, None
        steps = self.settings.max_steps
        self.report_every = max(1, steps // 20)
        # The step whose checkpoint a warm-up-stable-decay run can be made longer from.
        self.decay_start = steps - decay_steps(steps) if self.settings.schedule == "wsd" else None
        self.reported = self.began = (progress.step, progress.seconds)
        self.validation_size = (len(trainer.data.validation), trainer.data.facts["bytes"]["validation"])
        # What samples begin with: a document, if the model sees enough of them to know how they begin.
        self.prompt = "" if trainer.data.facts["documents"]["train"] >= 100 else "\n"
        if self.settings.data == "stdlib":  # whose documents begin with imports
            self.prompt = "class Cat"

    def train(self) -> int:
        """Run to the end, to a signal, or to divergence. Unless killed, it leaves log, metrics.json and plot."""
        progress, settings, status = self.progress, self.settings, "failed"
        self.request = request = StopRequest()
        try:
            if is_main_process():
                (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                self.write_metrics("running")
                self.log = RunLog(self.folder, progress.step)
            if progress.step == 0:
                self.validate(is_saved=settings.weights is not None)
                if settings.weights:  # of --init: if training only makes them worse, they stay the best checkpoint
                    self.save()
            self.loop(request)
            status = "finished" if progress.step >= settings.max_steps else "interrupted"
        except BrokenPipeError:  # whoever read the output has gone: main() ends quietly
            status = "interrupted"
            raise
        except OSError as error:  # of the log: a full disk, most of all
            raise UserError(f"step {progress.step} cannot be logged in {self.folder} ({first_line(error)}); the last "
                            f"good checkpoint is {self.last_checkpoint()}") from None
        finally:
            request.restore()
            with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
                if self.log:  # on a full disk this fails too, and the first error is the one to show
                    self.write_metrics(status)
                    self.log.close(settings, self.results())
                    plot(self.folder, self.bigram)
        if self.log:
            self.finish(status)
        return 0 if status == "finished" else 128 + (request.number or signal.SIGTERM)

    def loop(self, request: StopRequest) -> None:
        """Step after step. The values of a step are read one step later, so that the device never waits for Python."""
        trainer, progress, settings = self.trainer, self.progress, self.settings
        batch, waiting, stop = trainer.fetch_batch(progress.step), None, False
        self.clock = mark_time(trainer.machine.device)
        while progress.step < settings.max_steps and not stop:
            values = training_step(trainer, progress.step, batch, request.number is not None)
            progress.step += 1
            batch = trainer.fetch_batch(progress.step)  # read from the files while the device works on the step
            previous, waiting = waiting, (progress.step, start_reading(values))
            stop = previous is not None and self.log_step(*previous)
            stop = stop or (trainer.machine.world == 1 and request.number is not None)
            is_due = progress.step in (settings.max_steps, self.decay_start) or progress.step % settings.eval_every == 0
            if is_due or stop:
                stop = self.log_step(*waiting) or stop
                waiting = None
                if is_due:
                    self.validate(is_saved=True)
                    stop = stop or (trainer.machine.world == 1 and request.number is not None)
                self.save()
                self.clock = mark_time(trainer.machine.device)

    def save(self) -> None:
        """A checkpoint, and metrics.json. UserError when there is no room for them."""
        trainer, tensors = self.trainer, training_state(self.trainer)

        def write() -> None:
            try:
                save_checkpoint(self.folder, trainer.model, tensors, self.progress, trainer.data.tokenizer,
                                keep={self.progress.best_step, self.decay_start})
                self.write_metrics("running")
            except (OSError, SafetensorError) as error:  # a full disk, most of all
                raise UserError(f"step {self.progress.step} cannot be saved in {self.folder} ({first_line(error)}); "
                                f"the last good checkpoint is {self.last_checkpoint()}") from None

        on_main_process(write)

    def log_step(self, step: int, reading: tuple) -> bool:
        """Take in the values of a step: log them, report now and then. True if some process was asked to stop.

        Raises UserError when the run is diverging.
        """
        values, done, settings = finish_reading(reading), reading[1], self.settings
        self.progress.seconds, self.clock = self.progress.seconds + seconds_between(self.clock, done), done
        line = {"loss": values["loss"], "grad_norm": values["norm"], "learning_rate": learning_rate(step - 1, settings)}
        if self.trainer.loss_scale.enabled:
            line["overflow"] = values["overflow"]
        if values["skip"] and not values["overflow"]:
            line |= self.skipped(step, values)
        is_report = step % self.report_every == 0 or step == settings.max_steps
        if is_report:
            seconds_per_step = (self.progress.seconds - self.reported[1]) / (step - self.reported[0])
            self.reported = (step, self.progress.seconds)
            line |= speed(self.trainer, 1, seconds_per_step)
            line["peak_memory_gib"] = peak_memory(self.trainer.machine.device)
            left = timedelta(seconds=round((settings.max_steps - step) * seconds_per_step))
            mfu = "" if line["mfu"] is None else f"  MFU {line['mfu']:.0%}"
            self.show(f"step {step:>{len(str(settings.max_steps))}}/{settings.max_steps}  loss {values['loss']:.4f}  "
                      f"norm {values['norm']:.2f}  {line['tokens_per_second']:,.0f} tokens/s{mfu}  {left} left")
        if self.log:
            self.log.write(step, on_board=is_report or step % 10 == 0, **line)
        if Guard.is_diverging(values):
            last, lower = self.last_checkpoint(), f"--lr {short(settings.lr / 4)}"
            advice = f"start anew with {lower}" if last == "none" else (
                f"the last good checkpoint is {last}. Start anew with a lower --lr, or from what was good: the same "
                f"command with --init {shlex.quote(str(self.folder))} {lower}")  # fmt: skip
            cause = "10 steps skipped in a row" if values["in_a_row"] >= 10 else "it has risen by a nat"
            raise UserError(f"the run diverges at step {step} (mean loss {values['mean_loss']:.3f}: {cause}); {advice}")
        return values["stop"] > 0

    def skipped(self, step: int, values: dict[str, float]) -> dict:
        """Say which text a step was skipped for, and return it for the log."""
        count, order = self.trainer.sequences_per_step, self.trainer.order
        starts = [str(order.start(position)) for position in range((step - 1) * count, step * count)]
        self.show(f"step {step} skipped: loss {values['loss']:.3f}, gradient norm {values['norm']:.3g}; its "
                  f"sequences of {order.block_size} tokens begin at tokens {', '.join(starts[:8])}"
                  f"{', ...' if count > 8 else ''} of train.bin (all of them: metrics.jsonl)", say_wrapped)
        return {"skipped": values["skipped"], "sequences": " ".join(starts)}

    def show(self, text: str, write: Callable[[str], None] | None = None) -> None:
        """Print while the run goes. If nobody reads it any more, that counts as a signal."""
        try:
            (write or say)(text)
        except BrokenPipeError:
            self.request.number = self.request.number or signal.SIGTERM

    def last_checkpoint(self) -> Path | str:
        return next(iter(find_checkpoints(self.folder)), "none")

    def validate(self, is_saved: bool) -> None:
        """Validation loss and a sample, to the terminal and the log. `is_saved`: a checkpoint of this step follows."""
        trainer, progress = self.trainer, self.progress
        progress.validation_loss = loss = evaluate(trainer)
        if is_saved and math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step = loss, progress.step
        if self.log:
            text = self.sample_text(min(100, self.settings.max_new_tokens))
            bits = bits_per_byte(loss, *self.validation_size)
            shown = f"; sample:\n    {repr(text[:70])[:74]}" if text else ""  # untrained, a model may end at once
            self.show(f"  validation loss {loss:.4f}, {bits:.3f} bits per byte{shown}")
            self.log.write(progress.step, validation_loss=loss, bits_per_byte=bits, sample=text)

    def sample_text(self, max_new_tokens: int) -> str:
        """One sample with the prompt that it continues."""
        settings = replace(self.settings, num_samples=1, max_new_tokens=max_new_tokens)
        text = sample_texts(self.trainer.model, self.trainer.data.tokenizer, self.prompt, settings)[0]
        return self.prompt.lstrip("\n") + text

    def results(self) -> dict:
        """What has come out so far."""
        progress, trainer, best = self.progress, self.trainer, self.progress.best_loss
        steps, seconds = progress.step - self.began[0], progress.seconds - self.began[1]  # since this process began
        return {
            "parameters": count_parameters(trainer.model),
            "steps": progress.step,
            "tokens": progress.step * self.settings.batch_tokens,
            "epochs": progress.step * trainer.sequences_per_step / trainer.order.per_epoch,
            "skipped_steps": int(trainer.guard.state[Guard.FIELDS.index("skipped")]),
            "training_seconds": progress.seconds,
            "process_seconds": time.perf_counter() - self.started,  # of this process: all but the imports
            **(speed(trainer, steps, seconds) if seconds else {}),
            "peak_memory_gib": peak_memory(trainer.machine.device),
            "validation_loss": progress.validation_loss,
            "best_validation_loss": best,
            "best_step": progress.best_step,
            "best_bits_per_byte": None if best is None else bits_per_byte(best, *self.validation_size),
            "bigram_validation_loss": self.bigram,
        }

    def write_metrics(self, status: str) -> None:
        """metrics.json: what ran, with what, where, and what came out. --resume reads the configuration from it."""
        trainer, machine, name = self.trainer, self.trainer.machine, device_name(self.trainer.machine.device)
        packages = ("torch", "tokenizers", "safetensors", "numpy")
        write_json(self.folder / "metrics.json", finite({
            "status": status,
            "configuration": asdict(self.settings) | {"micro_batch_size": machine.micro_batch_size},
            "model": asdict(trainer.model.config),
            "versions": {"python": platform.python_version()} | {package: importlib.metadata.version(package)
                                                                 for package in packages},
            "device": name, "processes": machine.world, "precision": str(machine.dtype).removeprefix("torch."),
            "mode": machine.mode, "matmul_flops_per_second": machine.matmul_rate,
            "data_sheet_flops_per_second": data_sheet_rate(name),
            "data": trainer.data.facts | {"fingerprint": trainer.data.fingerprint},
            "results": self.results(),
        }))

    def finish(self, status: str) -> None:
        """The table, a sample, and how to go on."""
        results, trainer = self.results(), self.trainer
        validated = max((line["step"] for line in read_log(self.folder) if "validation_loss" in line), default=0)
        script, folder = shlex.quote(sys.argv[0]), shlex.quote(str(self.folder))
        for name, value in ((name, value) for name, value in results.items() if value is not None):
            shown = f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:,.4f}"
            name += f" (step {validated})" * (name == "validation_loss" and validated != results["steps"])
            name = name.replace("_", " ").replace("mfu", "MFU").replace("gib", "GiB")
            say(f"| {name:22} | {shown:>14} |")
        best, best_step = self.progress.best_loss, self.progress.best_step
        if best is not None and self.progress.validation_loss > best + 0.05:
            cause = ("The model learns its text by heart: more text, fewer steps (--max-steps) or --dropout help."
                     if results["epochs"] > 1 else "A lower --lr may help.")
            say_wrapped(f"note: the validation loss was lowest at step {best_step:,} and has risen since. {cause}")
        elif best is not None and best > self.bigram:
            say_wrapped("note: that is worse than the bigram model, which looks at one token only: the model has "
                        "learnt too little. More steps, more text or a smaller model help.")
        last = f"sample of the last step (--sample and --export take step {best_step}):"
        say("\n" + ("sample:" if best_step in (None, results["steps"]) else last))
        say(self.sample_text(self.settings.max_new_tokens) + "\n")
        say(f"{self.folder} holds checkpoints/, training_loss.png,\nmetrics.json, metrics.jsonl, TensorBoard events.")
        if status == "finished":
            say(f"Try it: python {script} --init {folder} --sample")
        else:
            world, steps = trainer.machine.world, plural(results["steps"], "step")
            python = "python" if world == 1 else f"torchrun --nproc-per-node={world}"
            say(f"Stopped after {steps}. Go on: {python} {script} --resume --output-dir {folder}")


Moment = float | torch.cuda.Event


def mark_time(device: torch.device) -> Moment:
    """When the device is done with all that it was asked for: on a GPU, Python may be far ahead of it."""
    if device.type != "cuda":
        return time.perf_counter()
    moment = torch.cuda.Event(enable_timing=True)
    moment.record()
    return moment


def seconds_between(start: Moment, end: Moment) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000


def start_reading(values: torch.Tensor) -> tuple[torch.Tensor, Moment]:
    """Send the values of a step on their way to the CPU, with the moment of their arrival. CUDA is not waited for."""
    is_cuda = values.device.type == "cuda"
    host = torch.empty(values.shape, pin_memory=is_cuda).copy_(values, non_blocking=is_cuda)
    return host, mark_time(values.device)


def finish_reading(reading: tuple[torch.Tensor, Moment]) -> dict[str, float]:
    """Wait for what start_reading() sent: the values by name."""
    values, arrival = reading
    if isinstance(arrival, torch.cuda.Event):
        arrival.synchronize()
    return dict(zip(STATS + Guard.FIELDS, values.tolist(), strict=True))


def finite(value: Any) -> Any:
    """The same with None for what is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


TAGS = {"validation_loss": "validation/loss", "bits_per_byte": "validation/bits_per_byte", "sample": "samples"}


class RunLog:
    """The log of a run: metrics.jsonl, one JSON object per line, and the same in TensorBoard."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        kept = [line for line in read_log(run) if line["step"] <= step and step]  # what a resumed run does again goes
        replace_file(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = open(run / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close()
        self.board = SummaryWriter(str(run), purge_step=step + 1)

    def write(self, step: int, on_board: bool = True, **values: float | str | None) -> None:
        """One line; with `on_board`, TensorBoard too."""
        values = finite(values)
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            tag = TAGS.get(name, f"train/{name}")
            if on_board and isinstance(value, str):
                self.board.add_text(tag, f"```\n{value}\n```", step)
            elif on_board and value is not None:
                self.board.add_scalar(tag, value, step)

    def close(self, settings: Settings, results: dict) -> None:
        """With what TensorBoard's page of hyperparameters shows."""
        from torch.utils.tensorboard.summary import hparams

        plain = {name: value for name, value in asdict(settings).items() if isinstance(value, (int, float, str))}
        best = results["best_validation_loss"]
        for summary in hparams(plain, {"validation/loss": best} if best is not None else {}):
            self.board.file_writer.add_summary(summary)
        self.lines.close()
        self.board.close()


def read_log(run: Path) -> list[dict]:
    """The lines of metrics.jsonl. The last one of a killed run may be half a line: it is left out."""
    lines, log = [], run / "metrics.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def plot(run: Path, bigram: float) -> None:
    """training_loss.png: every step's loss and smoothed, validation with its minimum marked, and the bigram model."""
    from matplotlib.figure import Figure

    lines = read_log(run)
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") and "skipped" not in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss")]
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    if training:
        steps, losses = np.array(training).T
        window = np.ones(min(len(losses), max(3, len(losses) // 50)))  # the mean of 2 % of the run
        smooth, counts = (np.convolve(values, window, "same") for values in (losses, np.ones(len(losses))))
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="training, every step")
        axes.plot(steps, smooth / counts, color="C0", label="training, smoothed")
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
    figure.legend(loc="outside right upper")  # beside the curves, not on them
    unfinished = run / "training_loss.png.incomplete"
    figure.savefig(unfinished, dpi=120, format="png")
    os.replace(unfinished, run / "training_loss.png")


# ---------- 13. Other commands ----------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Of this script: runs/ may hold those of the other one, too."""
    configuration = {}
    with contextlib.suppress(UserError):  # damaged, or not there
        configuration = read_json(folder / "metrics.json").get("configuration", {})
    return (folder / "metrics.json").is_file() and (folder / "checkpoints").is_dir() and "lora_r" not in configuration


def newest_run(is_usable: Callable[[Path], object]) -> Path:
    found = [path.parent for depth in ("*", "*/*") for path in Path("runs").glob(f"{depth}/metrics.json")]
    runs = [folder for folder in found if is_run(folder) and is_usable(folder)]
    if not runs:
        raise UserError(f"no run of this script in {Path('runs').resolve()}: train one first, or name one: --init, or "
                        "to go on with its training --output-dir")
    return max(runs, key=lambda folder: (folder / "metrics.json").stat().st_mtime)


def find_weights(settings: Settings) -> Path:
    """The folder that --init means: a run's best checkpoint (default: the newest run's), itself, or one on the Hub."""
    run = Path(settings.init) if settings.init else newest_run(find_checkpoints)
    if (run / "metrics.json").is_file() and (run / "checkpoints").is_dir() and not is_run(run):
        raise UserError(f"{run} was not made by this script")
    if not (run / "checkpoints").is_dir():
        return fetch(settings.init, MODEL_FILES + TOKENIZER_FILES, "--init", settings.hub_cache)
    for folder in find_checkpoints(run):
        try:
            best = read_json(folder / "training.json").get("best_step")
        except UserError as error:
            print(f"passed over {folder.name}: {error}", file=sys.stderr)
            continue
        return checkpoint_folder(run, best) if best is not None and checkpoint_folder(run, best).exists() else folder
    raise UserError(f"{run} has no finished checkpoint")


def load_for_use(settings: Settings) -> tuple[GPT, Tokenizer, Path]:
    """The model of --init (default: the newest run's best), its tokenizer, and where they were."""
    folder = Path(settings.weights) if settings.weights else find_weights(settings)
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer in {folder} has more tokens than the model's {model.config.vocab_size}")
    run = folder.parent.parent
    status = read_json(run / "metrics.json").get("status", "finished") if is_run(run) else "finished"
    if status != "finished":
        print(f"note: {run} is {status}; this is its {folder.name}", file=sys.stderr)
    return model.eval(), tokenizer, folder


def sample(settings: Settings) -> int:
    """Continue a prompt, or one after the other from standard input. On a GPU in bf16 and by GraphDecoder: those during
    a run, in TF32 and with another random stream, differ."""
    model, tokenizer, folder = load_for_use(settings)
    _, _, device = join_processes()
    model = make_compute_copy(model.to(device), choose_dtype(settings.dtype, device))
    if device.type == "cpu":
        speed_up_products(model)
    say(f"model: {folder}")
    for number, prompt in enumerate([settings.sample] if settings.sample else read_prompts()):
        if re.search("[\ud800-\udfff]", prompt):  # surrogates: how Python passes on bytes that are not UTF-8
            raise UserError(f"the prompt {prompt!a} is not UTF-8 text")
        if settings.num_samples == 1:
            say("\n" * (number > 0) + prompt, end="")
            sample_texts(model, tokenizer, prompt, settings, on_text=lambda text: say(text, end=""))
            say()
        else:
            for position, text in enumerate(sample_texts(model, tokenizer, prompt, settings), 1):
                say(f"--- {position}\n{prompt}{text}")
    return 0


LARGE = 2**18  # numbers of a matrix that no cache near a core holds


class NumpyProduct:
    """x W^T + b, as nn.Linear computes it, in float32 and without gradients, by NumPy's BLAS."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        self.matrix, self.bias = weight.detach().t().numpy(), bias  # the same memory

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = x.reshape(-1, x.shape[-1]).numpy() @ self.matrix
        return torch.from_numpy(product).view(*x.shape[:-1], -1) + self.bias


def speed_up_products(model: GPT) -> None:
    """For text on a CPU: turns matrices with more outputs than inputs round in memory, and leaves large ones to NumPy.

    A new token multiplies each matrix with one vector, so a CPU does little but read them: on two cores torch's BLAS at
    12 GB/s (by columns at 15 to 22), that of NumPy, if it is OpenBLAS, at 28 to 37. Then torch gets by with one thread,
    in the whole process: more would be in the way of OpenBLAS's wherever torch's threads spin while they wait, as they
    do if it was imported before this script (see OMP_WAIT_POLICY).
    """
    has_openblas = "openblas" in str(np.show_config(mode="dicts"))
    for layer in [model.wte, *(module for module in model.modules() if isinstance(module, nn.Linear))]:
        if layer.weight.shape[0] > layer.weight.shape[1]:
            layer.weight.data = layer.weight.data.t().contiguous().t()
        if has_openblas and layer.weight.dtype is torch.float32 and layer.weight.numel() >= LARGE:
            torch.set_num_threads(1)
            if layer is model.wte:
                model.head = NumpyProduct(layer.weight, model.mask)
            else:
                layer.forward = NumpyProduct(layer.weight, layer.bias)


def read_prompts() -> Iterator[str]:
    """Lines of standard input until it ends; at a terminal, asked for."""
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # as in the command line's arguments: sample() refuses both
    if is_terminal:
        say("Type the beginning of a text (an empty line: a new document). Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if is_terminal else "")


def export(settings: Settings) -> int:
    target = Path(settings.export)
    if is_in_use(target):
        raise UserError(f"--export {target}: this is not empty, choose another folder")
    model, tokenizer, source = load_for_use(settings)
    with new_folder(target.resolve()) as folder:
        save_pretrained(model, tokenizer, folder)
    say_wrapped(f"{source} -> {target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it")
    return 0


def evaluate_text(settings: Settings) -> int:
    """Print the loss of a model on a text, each block read by itself: the first tokens of a block know little."""
    model, tokenizer, folder = load_for_use(settings)
    _, _, device = join_processes()
    tokens, size = tokens_of_text(settings, tokenizer) if settings.evaluate else tokens_of_run(folder)
    block_size = model.config.block_size
    machine = Machine(device=device, dtype=choose_dtype(settings.dtype, device), matmul_rate=math.nan,
                      micro_batch_size=max(1, 2**13 // block_size))
    if len(tokens) < 2:
        raise UserError(f"--evaluate {settings.evaluate}: too little text")
    network = make_compute_copy(model.to(device), machine.dtype)
    loss = summed_loss(network, tokens, block_size, machine).item() / (len(tokens) - 1)
    say(f"model: {folder}")
    say_wrapped(f"text: {settings.evaluate or 'validation text of the run'}, {plural(len(tokens), 'token')}, "
                f"{plural(size, 'byte')}")
    for name, value in (("loss", loss), ("perplexity", math.exp(min(loss, 700))),
                        ("bits per byte", bits_per_byte(loss, len(tokens), size))):
        say(f"| {name:13} | {value:12,.4f} |")
    return 0


def tokens_of_text(settings: Settings, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All tokens of the data that --evaluate names, and how many bytes of text they are."""
    settings = replace(settings, data=settings.evaluate)
    source, arrays, size, ends_of_text = open_source(settings), [np.zeros(0, np.uint32)], 0, 0
    split = Split(source, settings)
    for _, tokens, _, text in tokenise((("all", *part) for part in split.read(source, settings)), tokenizer):
        arrays.append(np.array(tokens, np.uint32))
        size, ends_of_text = size + len(text.encode()), ends_of_text + text.count(END_OF_TEXT)
    note_faults(split.left_out, split.empty_rows, ends_of_text)
    return np.concatenate(arrays), size


def tokens_of_run(checkpoint: Path) -> tuple[np.ndarray, int]:
    """The validation tokens of the run that a checkpoint belongs to, and how many bytes of text they are."""
    run = checkpoint.parent.parent
    if not is_run(run):
        raise UserError(f"{checkpoint} belongs to no run and has no validation text: --evaluate DATA")
    saved = read_json(run / "metrics.json")
    folder = Path(saved["configuration"]["cache_dir"]) / f"tokens-{saved['data']['fingerprint']}"
    if not folder.exists():
        raise UserError(f"the validation text of {run} is no longer in {folder}: --evaluate DATA")
    data = open_tokens(folder)
    return data.validation, data.facts["bytes"]["validation"]


PLAN_SECONDS = 20  # of trying, at most about this
CHINCHILLA = 20  # training tokens per parameter that a given amount of compute is best spent on: Hoffmann et al. 2022


def plan(settings: Settings) -> int:
    """Print what a run needs, try a few of its steps, and leave nothing behind but the token files."""
    processes = join_processes()
    data = prepare_tokens(settings)
    trainer = make_trainer(settings, processes, data, make_model(settings, data.tokenizer))
    settings, machine, model = trainer.settings, trainer.machine, trainer.model
    describe(trainer)
    parameters, stored = count_parameters(model), sum(parameter.numel() for parameter in model.parameters())
    moments = sum(p.numel() * len(set(state_names(optimiser)) - {"step"})
                  for optimiser in trainer.optimisers for group in optimiser.param_groups for p in group["params"])
    moments /= machine.world if settings.shard_optimizer else 1
    tokens = settings.max_steps * settings.batch_tokens
    say(f"compute: {flops_per_token(model.config) / 1e9:.4f} GFLOP per token, forward and backward")
    rounded = 2 * stored if trainer.compute_copy is not model else 0  # its weights; each of its gradients goes at once
    say(f"memory: {(4 * (2 * stored + moments) + rounded) / 2**30:.2f} GiB for weights, gradients and optimiser")
    say(f"tokens: {tokens:,}, {tokens / parameters:.1f} per parameter (usual: {CHINCHILLA})")
    say(f"one epoch: {trainer.order.per_epoch * trainer.order.block_size:,} tokens, "
        f"{trainer.order.per_epoch / trainer.sequences_per_step:,.1f} steps")
    say(f"each evaluation reads {plural(len(data.validation), 'token')}")
    seconds = seconds_per_step(trainer)
    values, rest = speed(trainer, 1, seconds), timedelta(seconds=round(seconds * settings.max_steps))
    mfu, sheet = ("n/a" if value is None else f"{value:.0%}" for value in (values["mfu"], values["mfu_of_data_sheet"]))
    say_wrapped(f"measured: {seconds:.3f} s per step, {values['tokens_per_second']:,.0f} tokens/s, MFU {mfu} (of the "
                f"data sheet: {sheet}), peak memory {peak_memory(machine.device):.2f} GiB")
    say(f"to the end: {rest} for {plural(settings.max_steps, 'step')}, without evaluations")
    return 0


def seconds_per_step(trainer: Trainer) -> float:
    """By trying whole steps, if they are one pass or one graph; else steps of one and of two micro-batches: they differ
    by a pass, and the rest comes once a step."""
    machine, count, tried = trainer.machine, 6, 0
    passes = trainer.sequences_per_step // (machine.micro_batch_size * machine.world)
    sizes = (passes,) if passes == 1 or trainer.step_graph else (1, 2)
    times = {size: [] for size in sizes}
    while tried < count:
        for size in sizes:
            batch = trainer.fetch_batch(0)[: size * machine.micro_batch_size]
            synchronise(machine.device)
            started = time.perf_counter()
            training_step(trainer, tried, batch)
            synchronise(machine.device)
            times[size].append(time.perf_counter() - started)
        tried += 1
        if tried == 1:  # as many more as there is time for, and as many in every process
            possible = 1 + PLAN_SECONDS // sum(times[size][0] for size in sizes)
            count = int(agree(machine, min(count, possible), dist.ReduceOp.MIN))
    fastest = min(times[sizes[0]])
    return fastest if sizes == (passes,) else fastest + (passes - 1) * max(0.0, min(times[2]) - fastest)


# ---------- 14. Helpers -----------------------------------------------------------------------------------------------


def say(text: str = "", end: str = "\n") -> None:
    """Print at once, and only once however many processes there are."""
    if is_main_process():
        print(text, end=end, flush=True)


def say_wrapped(text: str) -> None:
    """In lines that fit a terminal of 80 columns."""
    say(textwrap.fill(text, 79, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def plural(count: int, noun: str) -> str:
    """1 step, 1,500 steps."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError when it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        reason = "no object"
    except (ValueError, OSError) as error:
        reason = first_line(error)
    what = f"{path} cannot be read as JSON ({reason})" if path.exists() else f"{path.parent} has no {path.name}"
    raise UserError(what)


def write_json(path: Path, value: dict) -> None:
    replace_file(path, json.dumps(value, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Whole or not at all: a reader finds the old content or the new."""
    unfinished = path.with_name(f"{path.name}.incomplete")
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, path)


def sync(path: Path) -> None:
    """Wait until a file (or the list of a folder's files) is on the disk: a rename must never overtake the content."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """Whether it is a file, or a folder with anything in it."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


@contextlib.contextmanager
def new_folder(folder: Path, is_kept: bool = False) -> Iterator[Path]:
    """A folder to fill, called <name>.incomplete until it is whole and on disk. One that has the name is replaced.

    `is_kept`: what is unfinished stays after an error, and the next start goes on with it.
    """
    unfinished = folder.with_name(f"{folder.name}.incomplete")
    if not is_kept:
        shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        for path in [*unfinished.iterdir(), unfinished]:
            sync(path)
        remove_folder(folder)
        os.rename(unfinished, folder)
    except BaseException as error:
        if not is_kept:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where it is
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise


def remove_folder(folder: Path) -> None:
    """Rename first: half-deleted, a folder must not pass for a whole one."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.deleted.incomplete")
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def lock(path: Path, wait: bool = False) -> int:
    """Take the lock of a file or folder: a descriptor, which holds it until it is closed or the process dies.

    Raises UserError when another process has it (with `wait`, waits for that one). Where the system has no such locks
    nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # of some network file systems
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{path.parent} is in use: another process is training in it") from None
    return descriptor


# ---------- 15. GPU kernels -------------------------------------------------------------------------------------------
#
# In Triton (Tillet et al. 2019), for what PyTorch does in more passes over the memory. Sections 2 and 7 say the same in
# plain PyTorch, which runs wherever these do not.

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton, tl = None, argparse.Namespace(constexpr=float)  # so much do the kernels' definitions need
jit = triton.jit if triton else lambda function: function
LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def cross_entropy_kernel(logits, targets, losses, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one row of logits (N, STRIDE), SIZE of them without padding: its loss. The row becomes the loss's gradient.

    Every column of a block keeps a maximum and a sum of its own, relative to the largest so far (Milakov & Gimelshein
    2018), so that the threads need to meet at the end only. In powers of two, which are cheaper.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    target = tl.load(targets + row)
    largest = tl.full((BLOCK,), -1e30, tl.float32)  # not infinite: a column without logits is to be a sum of 0
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < SIZE, other=float("-inf")).to(tl.float32) * LOG2_E
        new = tl.maximum(largest, x)
        total = total * tl.exp2(largest - new) + tl.exp2(x - new)
        largest = new
    overall = tl.max(largest, 0)
    log_total = overall + tl.log2(tl.sum(total * tl.exp2(largest - overall), 0))
    counts = target >= 0
    hit = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, log_total / LOG2_E - hit, 0.0))
    tl.debug_barrier()  # the target's logit is read before another thread overwrites it
    for start in range(0, STRIDE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < SIZE, other=float("-inf")).to(tl.float32)
        gradient = tl.exp2(x * LOG2_E - log_total) - tl.where(columns == target, 1.0, 0.0)
        tl.store(logits + columns, tl.where(counts, gradient, 0.0), mask=columns < STRIDE)


class FusedLoss(torch.autograd.Function):
    """The summed cross-entropy of x (N, C) times the head's weight (padded V, C)^T, as in GPT.forward().

    The logits, most of what a step writes, are written once and become their own gradient: 2% faster on an H100, and a
    third of the memory. They are always computed with that, also where nobody asks for it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
        logits, losses = x @ weight.t(), torch.empty(len(x), device=x.device)
        grid, options = (len(x),), {"BLOCK": 2048, "num_warps": 4}  # the fastest of those tried on an H200
        cross_entropy_kernel[grid](logits, targets, losses, size, len(weight), **options)
        ctx.save_for_backward(x, weight, logits)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple:
        x, weight, gradient = ctx.saved_tensors
        return (gradient @ weight) * scale, (gradient.t() @ x) * scale, None, None


class StepGraph:
    """forward_backward_update() as one CUDA graph: a small model's is over sooner than Python can launch it.

    124M, 64 x 1024 tokens, gains 2% on an H200. The first steps of a process are launched one by one, to compile what
    they need; the result is the same to the bit. What the graph keeps between steps is not in peak_memory().
    """

    @staticmethod
    def can_run(trainer: Trainer) -> bool:
        machine = trainer.machine
        if (machine.device.type != "cuda" or machine.mode != "compiled" or machine.dtype is not torch.bfloat16
                or machine.world > 1 or trainer.settings.gradient_checkpointing
                or trainer.sequences_per_step > 8 * machine.micro_batch_size):  # fmt: skip
            return False
        # A graph keeps what its step uses, and an evaluation needs as much beside it. Still to come: the moments, and
        # gradients that add up over passes.
        step = peak_memory(machine.device) + 12 * count_parameters(trainer.model) / 2**30
        return 2 * step < torch.cuda.get_device_properties(machine.device).total_memory / 2**30

    def __init__(self, trainer: Trainer):
        self.trainer, self.graph, self.before = trainer, None, 3  # steps before the graph
        for group in (group for optimiser in trainer.optimisers for group in optimiser.param_groups):
            group["lr"] = torch.zeros((), device=trainer.machine.device)  # a graph reads what is in it then
            if "capturable" in group:
                group["capturable"] = True

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        if self.before:
            self.before -= 1
            return forward_backward_update(self.trainer, batch)
        if self.graph is None:
            self.batch, self.graph = batch.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.values = forward_backward_update(self.trainer, self.batch)
        self.batch.copy_(batch)
        self.graph.replay()
        return self.values.clone()


# Programmatic dependent launch (PDL): on an H100 or newer a kernel may start while the one before it still runs, once
# all programs of that one have called gdc_launch_dependents(). It can load weights, until gdc_wait() waits for what
# that one writes. A kernel with more programs than the GPU takes at once calls it late, as the next one takes room.


@jit
def row_kernel(x, gain, shift, weight, bias, out, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
               GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
               PDL: tl.constexpr):
    """out (N) = [out +] [GELU] ([layer norm] of x (K) @ weight (N, K)^T [+ bias]), for a single row.

    The time is that in which the weights arrive, so they are asked for first. It rounds where PyTorch does.
    """
    if PDL:
        gdc_launch_dependents()
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w = tl.load(weight + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
    if NORM:
        g, b = tl.load(gain + k, mask=k < K, other=0.0), tl.load(shift + k, mask=k < K, other=0.0)
    if BIAS:
        c = tl.load(bias + n, mask=n < N, other=0.0)
    if PDL:
        gdc_wait()
    row = tl.load(x + k, mask=k < K, other=0.0)
    if ADD:
        before = tl.load(out + n, mask=n < N, other=0.0)
    if NORM:
        row = normalised(row, g, b, K)
    result = tl.sum(w.to(tl.float32) * row.to(tl.float32)[None, :], 1)
    if BIAS:
        result += c.to(tl.float32)
    result = result.to(w.dtype).to(tl.float32)
    if GELU:
        result = gelu(result)
    if ADD:
        result += before.to(tl.float32)
    tl.store(out + n, result.to(w.dtype), mask=n < N)


@jit
def normalised(row, gain, shift, K: tl.constexpr):
    """Layer norm of a row of K values. What is beyond them must be 0 in all three."""
    value = row.to(tl.float32)
    mean = tl.sum(value, 0) / K
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / K - mean * mean + 1e-5)
    return ((value - mean) * scale * gain.to(tl.float32) + shift.to(tl.float32)).to(row.dtype)


@jit
def gelu(x):
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u)"""
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


def tuned(function: Callable) -> Callable:
    """How the work may be cut: which way is fastest on this GPU is tried once and kept on disk."""
    if not triton:
        return function
    choices = [(16, 16, 256, 4, 3), (16, 32, 128, 4, 4), (32, 32, 128, 4, 4), (64, 16, 128, 4, 4), (64, 32, 64, 4, 5),
               (64, 32, 128, 4, 4), (64, 64, 64, 4, 4), (64, 64, 128, 8, 4), (64, 128, 64, 8, 4)]
    configs = [triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
               for m, n, k, warps, stages in choices]
    suitable = lambda configs, arguments, **_: [config for config in configs
                                                if config.kwargs["BLOCK_M"] <= max(16, arguments["rows"])]
    return triton.autotune(configs, key=["rows", "N", "K", "PARTS"], cache_results=True,
                           prune_configs_by={"early_config_prune": suitable})(function)


@tuned
@jit
def matmul_kernel(x, weight, bias, out, rows, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
                  GELU: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """out (PARTS, rows, N) = [GELU] of x (rows, K) @ weight (N, K)^T [+ bias]. Each part sums its share of K."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PDL:
        gdc_wait()
    for start in range(0, K // PARTS, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k, mask = part * (K // PARTS) + j, (j < K // PARTS)[None, :]
        values = tl.load(x + m[:, None] * K + k[None, :], mask=(m < rows)[:, None] & mask, other=0.0)
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & mask, other=0.0)
        result = tl.dot(values, tl.trans(w), result, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        result = gelu(result.to(x.dtype.element_ty).to(tl.float32))
    place = (part * rows + m)[:, None] * N + n[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])


@jit
def norm_kernel(x, parts, bias, gain, shift, out, rows, K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                PDL: tl.constexpr):
    """x (rows, K) += the sum of `parts` (PARTS, rows, K) + bias; out (rows, K) = the layer norm of x."""
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * K + k, mask=k < K, other=0.0)
    if PARTS:
        total = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(parts + (part * rows + row) * K + k, mask=k < K, other=0.0)
        value = (value.to(tl.float32) + total.to(value.dtype).to(tl.float32)).to(value.dtype)
        tl.store(x + row * K + k, value, mask=k < K)
    g, b = tl.load(gain + k, mask=k < K, other=0.0), tl.load(shift + k, mask=k < K, other=0.0)
    tl.store(out + row * K + k, normalised(value, g, b, K), mask=k < K)


@jit
def attention_kernel(qkv, keys, values, positions, out, H: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
                     BLOCK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    """One query per row and head over the tokens that are cached (B, H, SIZE, D) and its own, which it appends.

    As in cross_entropy_kernel, every place in a block keeps a maximum and sums of its own, so that only the end adds up
    over threads. Blocks are loaded STAGES ahead.
    """
    if PDL and EARLY:
        gdc_launch_dependents()
    if PDL:
        gdc_wait()
    h, b = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + b)
    d, slot = tl.arange(0, D), tl.arange(0, BLOCK)
    new = qkv + b * 3 * H * D + h * D + d
    q, k, v = tl.load(new).to(tl.float32), tl.load(new + H * D), tl.load(new + 2 * H * D)
    cache = (b.to(tl.int64) * H + h) * SIZE * D
    tl.store(keys + cache + position * D + d, k)
    tl.store(values + cache + position * D + d, v)
    q *= LOG2_E / tl.sqrt(D * 1.0)
    best = tl.where(slot == 0, tl.sum(q * k.to(tl.float32), 0), -1e30)  # the row's own token comes first
    total = tl.where(slot == 0, 1.0, 0.0)
    result = tl.where((slot == 0)[:, None], v.to(tl.float32)[None, :], 0.0)
    for start in tl.range(0, position, BLOCK, num_stages=STAGES):
        t = start + slot
        place, mask = cache + t[:, None] * D + d[None, :], (t < position)[:, None]
        some_keys = tl.load(keys + place, mask=mask, other=0.0)
        some_values = tl.load(values + place, mask=mask, other=0.0)
        score = tl.where(t < position, tl.sum(some_keys.to(tl.float32) * q[None, :], 1), float("-inf"))
        new_best = tl.maximum(best, score)
        p = tl.exp2(score - new_best)
        old = tl.exp2(best - new_best)
        total = total * old + p
        result = result * old[:, None] + p[:, None] * some_values.to(tl.float32)
        best = new_best
    if PDL and not EARLY:
        gdc_launch_dependents()
    share = tl.exp2(best - tl.max(best, 0))
    y = tl.sum(result * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + b * H * D + h * D + d, y.to(out.dtype.element_ty))


@jit
def ordered(logit):
    """A logit, rounded to bf16, as an integer of 16 bits: the same order."""
    bits = logit.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFF, bits)


@jit
def reached(counts, top_k):
    """The largest of 256 values that at least top_k logits reach, by how many have each value."""
    digit = tl.arange(0, 256)
    reach = tl.cumsum(tl.load(counts + digit), 0, reverse=True)
    return tl.sum(((reach >= top_k) & (digit > 0)).to(tl.int32), 0)


@jit
def count_kernel(logits, counts, top_k, V: tl.constexpr, STRIDE: tl.constexpr, BYTE: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr):
    """How many logits of a row have each higher byte; or each lower one, of those whose higher byte is the top k's."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counts += row * 512
    value = ordered(tl.load(logits + row * STRIDE + n, mask=n < V, other=float("-inf"))) + 32768
    high = value >> 8
    if BYTE == 0:
        tl.atomic_add(counts + tl.arange(0, 256), tl.histogram(high, 256, mask=n < V), sem="relaxed")
    else:
        some = tl.histogram(value & 255, 256, mask=(n < V) & (high == reached(counts, top_k)))
        tl.atomic_add(counts + 256 + tl.arange(0, 256), some, sem="relaxed")


@jit
def draw_kernel(logits, counts, best, arrived, sequence, positions, finished, x, wte, wpe, end, temperature, top_k,
                seed, V: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr,
                BLOCK_C: tl.constexpr, SAMPLE: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
                PDL: tl.constexpr):
    """Draw a row's next token from its logits, append it to `sequence` (B, SIZE), and embed it into x (B, C).

    The largest logit / temperature - log(exponential noise) is a draw from their softmax. Several programs look at the
    logits of a row; the last of them does the rest.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + row) + 1
    value = tl.load(logits + row * STRIDE + n, mask=n < V, other=float("-inf"))
    score = value.to(tl.float32)
    counts += row * 512
    if SAMPLE:
        noise = -tl.log(tl.maximum(tl.rand(seed + position * tl.num_programs(0) + row, n), 1e-10))
        score = score / temperature - tl.log(noise)
        if TOP_K:
            high = reached(counts, top_k)
            above = tl.sum(tl.where(tl.arange(0, 256) > high, tl.load(counts + tl.arange(0, 256)), 0), 0)
            threshold = high * 256 + reached(counts + 256, top_k - above) - 32768
            score = tl.where(ordered(value) >= threshold, score, float("-inf"))
        score = tl.where(n < V, score, float("-inf"))
    largest, index = tl.max(score, 0, return_indices=True)
    # One number for both, in the order of the scores; of equal ones the first token is the largest.
    bits = largest.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    tl.atomic_max(best + row, (bits << 32) + (V - tl.program_id(1) * BLOCK - index).to(tl.int64), sem="relaxed")
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        token = V - (tl.atomic_max(best + row, -0x7FFFFFFFFFFFFFFF, sem="relaxed") & 0xFFFFFFFF)
        is_finished = tl.load(finished + row)
        token = tl.where(is_finished != 0, end, token)
        tl.store(finished + row, tl.where(token == end, 1, is_finished))
        position = tl.minimum(position, SIZE - 1)
        tl.store(sequence + row * SIZE + position, token)
        tl.store(positions + row, position)
        tl.store(best + row, -0x7FFFFFFFFFFFFFFF)  # for the next step
        tl.store(arrived + row, 0)
        if TOP_K:
            tl.store(counts + tl.arange(0, 512), tl.zeros((512,), tl.int32))
        c = tl.arange(0, BLOCK_C)
        read = tl.where(token < 0, 0, token)  # of logits that are NaN any index may come
        embedding = tl.load(wte + read * C + c, mask=c < C).to(tl.float32)
        embedding += tl.load(wpe + position * C + c, mask=c < C).to(tl.float32)
        tl.store(x + row * C + c, embedding.to(x.dtype.element_ty), mask=c < C)


def graph_decoder(model: GPT, count: int, size: int, *how: Any) -> "GraphDecoder | None":
    """A GraphDecoder for texts of `size` tokens, or None where there can be none."""
    if not GraphDecoder.can_run(model, size):
        return None
    try:
        return GraphDecoder(model, count, size, *how)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton stumbles over (no Python.h, a GPU that it does not know)
        print(f"note: text comes slowly, as its kernels do not work here ({first_line(error)[:100]})", file=sys.stderr)
        return None


class GraphDecoder:
    """generate() for bf16 on a GPU: five kernels a layer (seven for several rows), and a whole step in one CUDA graph.

    Greedy tokens are those of the plain way, but where two are equal within rounding. Drawn ones are others; they
    depend on the seed, and by rounding on GPU and `count`. All logits equal to the last of the top k are kept.
    """

    CHUNK = 16  # tokens that are computed before the CPU looks at them
    TILE = 8192  # weights that a program of row_kernel reads
    LOGITS = 2048  # that a program of draw_kernel looks at
    KEYS = (256, 8, 1), (32, 2, 3)  # for one row, for several: BLOCK of attention_kernel, warps, STAGES

    @staticmethod
    def can_run(model: GPT, size: int) -> bool:
        config, weight = model.config, model.wte.weight
        width, compilers = config.width // config.heads, (os.environ.get("CC", "cc"), "gcc", "clang")
        return (triton is not None and weight.is_cuda and weight.dtype is torch.bfloat16 and size <= config.block_size
                and width >= 16 and width & (width - 1) == 0 and any(map(shutil.which, compilers)))

    @torch.no_grad()
    def __init__(self, model: GPT, count: int, size: int, end: int, temperature: float, top_k: int, seed: int):
        config, weight, self.last = model.config, model.wte.weight, size
        size = min(config.block_size, -(-size // 256) * 256)  # every other size compiles kernels anew
        new = lambda *shape, dtype=weight.dtype: torch.zeros(shape, device=weight.device, dtype=dtype)
        self.model, self.end, self.graph = model, end, None
        self.keys, self.values = (new(config.layers, count, config.heads, size, config.width // config.heads)
                                  for _ in range(2))
        self.x, self.y, self.z = new(count, config.width), new(count, config.width), new(count, 4 * config.width)
        self.qkv, self.logits = new(count, 3 * config.width), new(count, config.padded_vocab_size)
        self.parts = new(2, count, config.width, dtype=torch.float32)
        self.sequence, self.best = (new(count, n, dtype=torch.int64) for n in (size, 1))
        self.best.fill_(-(2**63 - 1))
        self.counts, self.positions, self.finished, self.arrived = (
            new(count, n, dtype=torch.int32) for n in (512, 1, 1, 1))
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) // 4  # those of two seeds do not overlap
        self.how = (max(temperature, GREEDY), top_k, seed)
        self.switches = {"SAMPLE": temperature >= GREEDY, "TOP_K": 0 < top_k < config.vocab_size}
        has_pdl = (weight.is_cuda and not torch.version.hip
                   and torch.cuda.get_device_capability(weight.device) >= (9, 0))
        self.launch = {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}
        if weight.is_cuda:
            self.step()  # compiles the kernels, and tries which way is fastest: that cannot be captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.graph = graph

    def row(self, x: torch.Tensor, layer: nn.Module, out: torch.Tensor, norm: nn.Module | None = None,
            gelu: bool = False, add: bool = False) -> None:
        bias, (size, width) = getattr(layer, "bias", None), layer.weight.shape
        block = triton.next_power_of_2(width)
        rows = max(1, self.TILE // block)
        row_kernel[(triton.cdiv(size, rows),)](
            x, norm.weight if norm else x, norm.bias if norm else x, layer.weight, x if bias is None else bias, out,
            N=size, K=width, NORM=norm is not None, GELU=gelu, ADD=add, BIAS=bias is not None, BLOCK_N=rows,
            BLOCK_K=block, num_warps=8, **self.launch)  # fmt: skip

    def matmul(self, x: torch.Tensor, layer: nn.Module, out: torch.Tensor, parts: int = 0, gelu: bool = False) -> None:
        """With `parts`, x @ weight^T is left in so many parts, without the bias."""
        bias, (size, width) = getattr(layer, "bias", None), layer.weight.shape
        grid = lambda sizes: (triton.cdiv(len(x), sizes["BLOCK_M"]), triton.cdiv(size, sizes["BLOCK_N"]), parts or 1)
        matmul_kernel[grid](x, layer.weight, x if bias is None else bias, out, len(x), N=size, K=width,
                            PARTS=parts or 1, GELU=gelu, BIAS=bias is not None and not parts, **self.launch)

    def add_and_norm(self, parts: int, bias: torch.Tensor, norm: nn.Module) -> None:
        count, width = self.x.shape
        norm_kernel[(count,)](self.x, self.parts, bias, norm.weight, norm.bias, self.y, count, K=width, PARTS=parts,
                              BLOCK=triton.next_power_of_2(width), **self.launch)

    def attention(self, number: int) -> None:
        count, heads, size, width = self.keys[number].shape
        block, warps, stages = self.KEYS[count > 1]
        attention_kernel[(heads, count)](self.qkv, self.keys[number], self.values[number], self.positions, self.y,
                                         H=heads, D=width, SIZE=size, BLOCK=block, STAGES=stages, EARLY=count == 1,
                                         num_warps=warps, **self.launch)

    def step(self) -> None:
        """Read the newest token of every row, and draw the next."""
        norms = [*(block.ln_1 for block in self.model.h), self.model.ln_f]
        if len(self.x) == 1:
            for number, block in enumerate(self.model.h):
                self.row(self.x, block.attn.c_attn, self.qkv, block.ln_1)
                self.attention(number)
                self.row(self.y, block.attn.c_proj, self.x, add=True)
                self.row(self.x, block.mlp.c_fc, self.z, block.ln_2, gelu=True)
                self.row(self.z, block.mlp.c_proj, self.x, add=True)
            self.row(self.x, self.model.wte, self.logits, norms[-1])
        else:
            self.add_and_norm(0, norms[0].bias, norms[0])  # adds nothing
            for number, block in enumerate(self.model.h):
                self.matmul(self.y, block.attn.c_attn, self.qkv)
                self.attention(number)
                self.matmul(self.y, block.attn.c_proj, self.parts, parts=1)
                self.add_and_norm(1, block.attn.c_proj.bias, block.ln_2)
                self.matmul(self.y, block.mlp.c_fc, self.z, gelu=True)
                self.matmul(self.z, block.mlp.c_proj, self.parts, parts=2)
                self.add_and_norm(2, block.mlp.c_proj.bias, norms[number + 1])
            self.matmul(self.y, self.model.wte, self.logits)
        self.draw()

    def draw(self) -> None:
        (count, size), (_, stride), (_, width) = self.sequence.shape, self.logits.shape, self.x.shape
        sizes = {"V": self.model.config.vocab_size, "STRIDE": stride, "BLOCK": self.LOGITS, "num_warps": 8}
        grid = (count, triton.cdiv(sizes["V"], self.LOGITS))
        if all(self.switches.values()):
            for byte in range(2):
                count_kernel[grid](self.logits, self.counts, self.how[1], BYTE=byte, **sizes, **self.launch)
        draw_kernel[grid](self.logits, self.counts, self.best, self.arrived, self.sequence, self.positions,
                          self.finished, self.x, self.model.wte.weight, self.model.wpe.weight, self.end, *self.how,
                          SIZE=size, C=width, BLOCK_C=triton.next_power_of_2(width), **self.switches, **sizes,
                          **self.launch)  # fmt: skip

    @torch.no_grad()
    def read(self, prompt: list[int]) -> None:
        """The prompt, once for all rows; and draw the first token of each."""
        device, length = self.x.device, len(prompt)
        cache = KVCache(self.model.config, 1, length, device, self.x.dtype)
        self.logits.copy_(self.model(torch.tensor([prompt], device=device), cache=cache)[:, -1].expand_as(self.logits))
        self.keys[:, :, :, :length], self.values[:, :, :, :length] = cache.keys, cache.values
        self.positions.fill_(length - 1)
        self.finished.zero_()
        self.draw()

    def run(self, prompt: list[int]) -> Iterator[list[int]]:
        self.read(prompt)
        ready, done = len(prompt) + 1, len(prompt)  # tokens that are computed, and yielded
        while done < self.last:
            for step in self.sequence[:, done:ready].t().tolist():
                yield step
                if all(token == self.end for token in step):
                    return
            done, ready = ready, min(self.last, ready + self.CHUNK)
            for _ in range(ready - done):
                self.graph.replay() if self.graph else self.step()


# ---------- 16. Main --------------------------------------------------------------------------------------------------


def resolve_settings(arguments: argparse.Namespace) -> Settings:
    """All settings: what was given, over a resumed run's own, over the preset's, over the defaults."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in given:
        if given[name] == "" and name not in ("sample", "evaluate"):  # as a shell passes on a variable that is not set
            raise UserError(f"--{name.replace('_', '-')} is empty")
    if "output_dir" in given and {"sample", "export", "evaluate"} & given.keys():
        raise UserError("--output-dir is for training: what uses a model takes the run that --init names")
    if {"data", "evaluate"} <= given.keys():
        raise UserError(f"--data is for training: --evaluate takes a text itself (--evaluate {given['data']})")
    for name, words in (("data", ["stdlib"]), ("tokenizer", ["bpe", "bytes", "gpt2"]), ("init", [])):
        if name in given and given[name] not in words and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())  # so that a run can go on from another folder
    if "cache_dir" in given:
        given["hub_cache"] = str(Path(given["cache_dir"]).resolve() / "hub")
    saved = saved_settings(given) if given.get("resume") else {}
    model = given.get("model") or saved.get("model") or "nano"
    preset = FINE_TUNING if "init" in given else PRESETS[model]
    if given.get("optimizer") == "adamw":
        preset = preset | ADAMW.get(model, {})
    for name, follows in (("epochs", "max_steps"), ("lr", "muon_lr")):
        if name in given:
            preset = preset | {follows: None}
    values = preset | saved | given
    values["cache_dir"] = str(Path(values.get("cache_dir", "cache")).resolve())
    if "init" in given and not saved:
        for name in {"model", "layers", "heads", "width"} & given.keys():
            raise UserError(f"--{name} cannot be chosen: --init {given['init']} has its own")
        values |= {"layers": None, "heads": None, "width": None, "block_size": given.get("block_size")}
        values["weights"] = str(find_weights(Settings(**values)))
    settings = Settings(**values)
    return replace(settings, tokenizer=settings.tokenizer or settings.weights or "bpe")


def saved_settings(given: dict) -> dict:
    """The settings of the run that --resume means. Puts its folder into `given`. UserError where they contradict."""
    for name in {"plan", "sample", "export", "evaluate"} & given.keys():
        raise UserError(f"--{name} does not go together with --resume, which continues training")
    run = Path(given["output_dir"]) if "output_dir" in given else newest_run(is_run)
    if not is_run(run):
        raise UserError(f"--resume: there is no run of this script in {run}")
    given["output_dir"] = str(run)
    saved = read_json(run / "metrics.json").get("configuration", {})
    if saved.keys() != {setting.name for setting in fields(Settings)}:
        raise UserError(f"--resume: {run} was made by another version of this script")
    for name in given.keys() & FLAGS.keys():
        if saved[name] != given[name] and not FLAGS[name].metadata["free"]:
            raise UserError(f"--{name.replace('_', '-')} is {saved[name]} in {run}, not {given[name]}, and a resumed "
                            "run keeps its settings: leave it out, or start a new run")
    return saved


def is_first_to_say(message: str) -> bool:
    """Of several processes that meet the same error, one prints it: the first that asks torchrun's store for it."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"said: {message}", 1) == 1
    except Exception:  # a process alone, or whoever held the store has gone: better twice than not at all
        return True


def main(arguments: argparse.Namespace) -> int:
    """Do what the command line says. Returns the exit code."""
    sys.stdout.reconfigure(errors="replace")  # samples hold any character, and not every terminal has all of them
    try:
        settings = resolve_settings(arguments)
        commands = {"sample": sample, "evaluate": evaluate_text, "export": export, "plan": plan}
        asked = [name for name in commands if getattr(settings, name) not in (None, False)]
        if asked and asked[0] != "plan" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"--{asked[0]} runs in one process")
        code = commands[asked[0]](settings) if asked else train(settings)
        if dist.is_initialized():
            dist.barrier(PATIENT_GROUP)  # torchrun kills the others once one has ended with another exit code than 0
            gc.collect()  # cycles may hold the process group, whose threads must not outlive the interpreter
            dist.destroy_process_group()
        return code
    except (UserError, OSError) as error:  # the latter: a full disk, a file without permission, named in its text
        if isinstance(error, BrokenPipeError):  # who read the output has gone (`| head`): flush nothing more to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + 13  # as if ended by SIGPIPE
        message = first_line(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        message = ("the memory is too small for this: choose a smaller --micro-batch-size, --block-size or --model, or "
                   "--gradient-checkpointing")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if is_first_to_say(message):
        print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
