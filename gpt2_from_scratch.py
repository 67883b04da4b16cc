#!/usr/bin/env python3
"""GPT-2 from scratch in raw PyTorch: the whole life of a language model in one file.

    python gpt2_from_scratch.py                               # a small GPT-2 on Python's own source: minutes on a CPU
    python gpt2_from_scratch.py --sample "def main("          # let the newest run continue a text; no text: ask for one
    python gpt2_from_scratch.py --model gpt2 --data texts/    # GPT-2 (124M) on a folder of text, on one GPU
    torchrun --nproc_per_node=8 gpt2_from_scratch.py --model gpt2 --data texts/      # the same run on eight GPUs
    python gpt2_from_scratch.py --model gpt2 --data texts/ --plan                    # what that will cost, beforehand
    python gpt2_from_scratch.py --init openai-community/gpt2 --data my.txt --lr 1e-4 # go on from OpenAI's weights
    python gpt2_from_scratch.py --resume                      # continue the newest run exactly where it stopped
    python gpt2_from_scratch.py --export my-gpt2/             # the newest run's best model, for transformers
    tensorboard --logdir runs                                 # watch all runs

A run leaves in runs/<name>/: checkpoints/ (each loads in Hugging Face transformers as it is), metrics.jsonl (the log),
metrics.json (configuration, versions, device, results), training_loss.png, samples.txt and TensorBoard events.

The sections, in the order in which the data flows:

    1 Command line     every flag. Stands first, so that --help answers before PyTorch is loaded
    2 Model            attention, MLP, block, GPT: exactly GPT-2 (Radford et al. 2019)
    3 Hugging Face     GPT-2 folders read, written, and fetched from the Hub
    4 Tokenizer        byte-level BPE, trained here or GPT-2's own
    5 Data             documents -> token files -> windows of tokens in a seeded order
    6 Optimiser        AdamW, the learning-rate schedule, a guard against bad steps
    7 Checkpoints      exact, atomic, without pickle
    8 Evaluation       the whole validation slice, and a bigram model to compare with
    9 Generation       KV cache, temperature, top-k, top-p
    10 Training step   forward, backward, update: what runs a million times
    11 Session         device, precision, compilation, processes, micro-batch: how it runs here
    12 Training loop   steps, evaluations, checkpoints, log, plot, table
    13 Using a model   --sample, --export, --plan
    14 Main
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
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

# ----------------------------------------------------------------------------------------------------------------------
# 1. Command line
# ----------------------------------------------------------------------------------------------------------------------

# Sizes: Radford et al. 2019, table 2. Learning rates and batches for these sizes: Brown et al. 2020, table 2.1.
PRESETS = {
    "nano": {"layers": 4, "heads": 4, "width": 128, "context": 256, "lr": 4e-3, "batch_tokens": 4096, "max_steps": 500, "vocab_size": 4096},
    "gpt2": {"layers": 12, "heads": 12, "width": 768, "context": 1024, "lr": 6e-4, "batch_tokens": 2**19},
    "gpt2-medium": {"layers": 24, "heads": 16, "width": 1024, "context": 1024, "lr": 3e-4, "batch_tokens": 2**19},
    "gpt2-large": {"layers": 36, "heads": 20, "width": 1280, "context": 1024, "lr": 2.5e-4, "batch_tokens": 2**19},
    "gpt2-xl": {"layers": 48, "heads": 25, "width": 1600, "context": 1024, "lr": 2e-4, "batch_tokens": 2**20},
}
DEFAULTS = {
    "model": "nano", "init": None, "dropout": 0.0,
    "data": "stdlib", "glob": "*", "text_column": "text", "limit": None, "tokenizer": None, "vocab_size": 50257, "val_fraction": 0.05,
    "schedule": "cosine", "warmup_steps": None, "weight_decay": 0.1, "micro_batch": "auto", "epochs": 1.0, "max_steps": None,
    "eval_every": None, "seed": 0, "dtype": "auto", "compile": True, "deterministic": True,
    "output_dir": None, "cache_dir": "cache", "resume": False,
    "plan": False, "sample": None, "export": None, "max_new_tokens": 200, "temperature": 0.8, "top_k": 50, "top_p": 1.0, "num_samples": 1,
}  # fmt: skip
# What the flags below may change when a run is resumed. Everything else is the run's own and stays as it was.
FREE_ON_RESUME = {"output_dir", "cache_dir", "resume", "max_steps", "micro_batch"}


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
    """Read the command line. A flag that was not given is None: section 12 fills in presets, saved runs, defaults."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    count = number(int, 1)
    off = {"action": "store_false", "default": None}

    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=PRESETS, help="a preset of the sizes below (default: nano)")
    flag("--init", metavar="WHAT", help="start from these weights: a Hub id or folder of a Hugging Face GPT-2, or a run")
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
    flag("--tokenizer", metavar="WHAT", help="bpe, trained on the data (default; with --init: that model's own), bytes, "
         "gpt2 (from the Hub), or a folder with tokenizer.json or vocab.json + merges.txt")
    flag("--vocab-size", type=number(int, 257, 2**20), metavar="N",
         help="of --tokenizer bpe (default: 50257; nano: 4096)")
    flag("--val-fraction", type=number(float, 0, 0.5, above=True), metavar="P",
         help="share of documents held out for validation; of a single document, its end (default: 0.05)")

    flag = parser.add_argument_group("training").add_argument
    flag("--lr", type=number(float, 0, 10, above=True), metavar="X", help="peak learning rate (default: the preset's)")
    flag("--schedule", choices=["cosine", "wsd"], help="cosine down to a tenth (default), or warm-up-stable-decay: "
         "constant, then linear to zero over the last fifth")
    flag("--warmup-steps", type=number(int, 0), metavar="N", help="linear warm-up (default: a twentieth, at most 2000)")
    flag("--weight-decay", type=number(float, 0, 10), metavar="X", help="of matrices; nothing else decays (default: 0.1)")
    flag("--batch-tokens", type=count, metavar="N", help="tokens per optimiser step, all processes together")
    flag("--micro-batch", type=lambda text: text if text == "auto" else count(text), metavar="N",
         help="sequences per forward pass and process; the rest accumulates (default: auto, the most that fits)")
    flag("--epochs", type=number(float, 0, above=True), metavar="X", help="passes over the data (default: 1)")
    flag("--max-steps", type=count, metavar="N", help="optimiser steps; goes before --epochs")
    flag("--eval-every", type=count, metavar="N", help="steps from one evaluation, sample and checkpoint to the next "
         "(default: a tenth, at most 1000)")
    flag("--seed", type=number(int, 0, 2**32 - 1), metavar="N", help="of everything that is random (default: 0)")
    flag("--dtype", choices=["auto", "bf16", "fp32"], help="of matrix products (default: bf16 on a GPU that has it)")
    flag("--no-compile", dest="compile", **off, help="run eagerly, also where torch.compile works")
    flag("--no-deterministic", dest="deterministic", **off, help="let a GPU use faster kernels whose rounding varies "
         "from run to run: resuming is then close, no longer bit-identical")

    flag = parser.add_argument_group("files").add_argument
    flag("--output-dir", metavar="DIR", help="folder of this run (default: runs/gpt2-<model>-<data>-lr=<lr>)")
    flag("--cache-dir", metavar="DIR", help="token files, and downloads if given (default: cache, and Hugging Face's)")
    flag("--resume", action="store_true", default=None,
         help="go on from the last checkpoint of --output-dir (default: of the newest run)")

    mode = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    mode.add_argument("--sample", nargs="?", const="", metavar="PROMPT", help="continue PROMPT with the model of --init "
                      "(default: the newest run); without PROMPT, one per line of standard input")
    mode.add_argument("--export", metavar="DIR", help="write the model of --init (default: the newest run) as a folder "
                      "that transformers loads")
    mode.add_argument("--plan", action="store_true", default=None,
                      help="print parameters, memory, FLOPs, speed and time to the end; train nothing")

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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm


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


# ----------------------------------------------------------------------------------------------------------------------
# 2. Model
#
# B: sequences in a batch, T: tokens in a sequence, C: width, H: heads, D = C / H: width of a head, V: vocabulary.
# The parameters have OpenAI's names (wte, wpe, h, ln_1, c_attn, ...), so that weights map one to one.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The geometry of a GPT-2."""

    vocab_size: int  # tokens of the tokenizer
    context: int = 1024  # the longest sequence; positions are learned, so there is no going beyond it
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0  # Radford et al. trained with 0.1; for one pass over much data 0 is better

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128, which tensor cores multiply faster."""
        return -(-self.vocab_size // 128) * 128


class KVCache:
    """Keys and values of all tokens so far, so that generating a token costs one token's work.

    Its size is fixed, (layers, B, H, context, D) for each of keys and values: the shapes never change on the way.
    """

    def __init__(self, config: GPTConfig, batch: int, device: torch.device):
        shape = (config.layers, batch, config.heads, config.context, config.width // config.heads)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.slots = torch.arange(config.context, device=device)
        self.length = 0  # tokens held so far

    def advance(self, tokens: int) -> None:
        """Make room for `tokens` new ones: their positions (T,), and who sees whom as a mask (T, context)."""
        self.positions = self.slots[self.length : self.length + tokens]
        self.mask = self.slots <= self.positions[:, None]
        self.length += tokens

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' k and v (B, H, T, D) and return those of all slots, (B, H, context, D)."""
        self.keys[layer].index_copy_(2, self.positions, k)
        self.values[layer].index_copy_(2, self.positions, v)
        return self.keys[layer], self.values[layer]


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
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # softmax(q k^T / sqrt(D)) v
        else:
            k, v = cache.update(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
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

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """From tokens (B, T) to logits (B, T, padded V).

        With `targets` (B, T) to the summed cross-entropy in nats, a scalar; targets of -1 do not count. The sum, not
        the mean, because sums of micro-batches add up to exactly the batch's sum.
        """
        T = tokens.shape[1]
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
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


# ----------------------------------------------------------------------------------------------------------------------
# 3. Hugging Face
# ----------------------------------------------------------------------------------------------------------------------

TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # Hugging Face keeps OpenAI's (in, out) layout
MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt"]
# Settings of Hugging Face's GPT2Config that change the function. Whatever differs is another model, not GPT-2.
PLAIN_GPT2 = {
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}  # fmt: skip


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


def load_pretrained(folder: Path, context: int | None = None, dropout: float = 0.0) -> GPT:
    """A GPT from a Hugging Face folder: config.json and safetensors, with or without the prefix `transformer.`.

    A shorter `context` drops the positions beyond it. Raises UserError for anything but a plain, complete GPT-2.
    """
    settings = read_json(folder / "config.json")
    for name, allowed in PLAIN_GPT2.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise UserError(f"{folder} is no plain GPT-2: {name} is {settings[name]!r}")
    try:
        sizes = {ours: settings[theirs] for ours, theirs in HF_NAMES.items()}
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} does not say {error}") from None
    if settings.get("n_inner") not in (None, 4 * sizes["width"]):
        raise UserError(f"{folder} is no plain GPT-2: n_inner is {settings['n_inner']}")
    if context and context > sizes["context"]:
        raise UserError(f"--context {context} is more than the {sizes['context']} positions that {folder} has learned")
    config = GPTConfig(**sizes | {"context": context or sizes["context"], "dropout": dropout})
    check_geometry(config)

    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    weights = {}
    for file in files:
        try:
            weights.update(load_file(folder / file))
        except FileNotFoundError:
            raise UserError(f"{folder} has no {file} (weights in other formats are not read: they can run code)") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file} is damaged ({error})") from None
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}

    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights:
                raise UserError(f"{folder} lacks the weight {name}")
            tensor = weights[name].t() if name.endswith(TRANSPOSED) else weights[name]
            rows = {"wte.weight": config.vocab_size, "wpe.weight": config.context}.get(name, parameter.shape[0])
            if name == "wpe.weight":
                tensor = tensor[:rows]
            if tensor.shape != (rows, *parameter.shape[1:]):
                raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not {(rows, *parameter.shape[1:])}")
            parameter.zero_()  # the padding rows of wte stay so
            parameter[:rows] = tensor
    return model


HF_NAMES = {  # GPTConfig: Hugging Face's GPT2Config
    "vocab_size": "vocab_size", "context": "n_positions", "layers": "n_layer", "heads": "n_head", "width": "n_embd",
}  # fmt: skip


def save_pretrained(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers' GPT2LMHeadModel and AutoTokenizer load; the padding rows of the vocabulary stay behind."""
    config = model.config
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu()
        if name == "wte.weight":
            tensor = tensor[: config.vocab_size]
        weights[f"transformer.{name}"] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.token_to_id(END_OF_TEXT)
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        **{theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()},
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True,
        "bos_token_id": end, "eos_token_id": end,
    })  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
    })  # fmt: skip


def check_geometry(config: GPTConfig) -> None:
    """UserError for sizes that make no transformer."""
    for name, value in vars(config).items():
        if name != "dropout" and (not isinstance(value, int) or value < 1):
            raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
    if config.width % config.heads:
        raise UserError(f"the width ({config.width}) must be a multiple of the heads ({config.heads})")


HUB_SECONDS = 10  # how long the Hub has to answer


def why_hub_is_unreachable() -> str | None:
    """One line, or None when the Hub answers.

    Asked before any download, because the Hub's client tries again for minutes when nothing answers. In a thread,
    because looking up a name knows no time limit.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer = [f"{constants.ENDPOINT} did not answer within {HUB_SECONDS} seconds"]

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answer[0] = None
        except Exception as error:  # whichever HTTP library the client uses, it has error classes of its own
            answer[0] = f"{constants.ENDPOINT}: {first_line(error)}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 1)
    return answer[0]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def fetch(name: str, patterns: list[str], flag: str, cache_dir: str | None = None) -> Path:
    """The folder `name`, or the files of that model repository on the Hub: from the cache when there is no connection."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"{flag} {name}: no such folder, and no Hub id (owner/name) either")
    from huggingface_hub import errors, snapshot_download

    reason = why_hub_is_unreachable()
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=cache_dir, local_files_only=bool(reason)))
    except errors.RepositoryNotFoundError:
        raise UserError(f"{flag} {name}: the Hub has no such model (or it is private: `hf auth login`)") from None
    except Exception as error:
        raise UserError(f"{flag} {name}: not in the cache, and the Hub cannot be reached ({reason or first_line(error)}). "
                        f"Offline, copy its files into a folder and give that: {flag} FOLDER") from None


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tokenizer
# ----------------------------------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARACTERS = 100_000_000  # text that a tokenizer is trained on, at most; more hardly changes its merges


def train_tokenizer(pieces: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's word pattern (Radford et al. 2019, section 2.2).

    Its 256 first tokens are the bytes, so any text has an encoding; 257 tokens (with end-of-text) are bytes alone.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return plain(tokenizer)


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or from OpenAI's pair vocab.json + merges.txt."""
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise UserError(f"{folder} has neither tokenizer.json nor vocab.json + merges.txt")
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            tokenizer = Tokenizer(bpe)
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(f"the tokenizer in {folder} cannot be read ({first_line(error)})") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"the tokenizer in {folder} has no token {END_OF_TEXT}, which joins the documents")
    tokenizer.add_special_tokens([END_OF_TEXT])
    return plain(tokenizer)


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Switch off what would change the text's tokens: cutting, padding, and reading "<|endoftext|>" in it as a token."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs: the largest id plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Data
#
# Documents become two files of tokens, train.bin and validation.bin, with an end-of-text token before each document.
# They lie in the cache under a fingerprint of everything they depend on: a second run reads them at once.
# ----------------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation")
STDLIB_SKIP = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages"}
COLUMN_FILES = (".jsonl", ".parquet")
PIECE_CHARACTERS = 2**18  # long documents are tokenised in pieces of about this size, so that one keeps all cores busy
BATCH_CHARACTERS = 2**22  # tokenised at a time
LINE_END = re.compile(r"\S\n(?=\S)")


@dataclass
class Source:
    """Where documents come from."""

    name: str  # for the run's folder
    identity: list  # JSON of all that its text depends on
    documents: Callable[[], Iterator[str]]  # starts again at each call
    files: list[Path]  # empty for a Hub data set
    passed_over: set  # files that are no UTF-8 text


def open_source(settings: argparse.Namespace) -> Source:
    """Find what --data names. Raises UserError when there is nothing, or nothing that can be read."""
    path, column, passed_over = Path(settings.data), settings.text_column, set()
    if settings.data != "stdlib" and not path.exists():
        return open_hub_source(settings)
    if settings.data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        name, files, rows = "stdlib", list_files(root, "*.py", STDLIB_SKIP), False
    elif path.is_dir():
        root, rows = path, settings.glob.endswith(COLUMN_FILES)  # in a folder of text a .jsonl is text like any other
        name, files = path.resolve().name, list_files(path, settings.glob)
    else:
        root, name, files, rows = path.parent, path.stem, [path], path.suffix in COLUMN_FILES
    if not files:
        raise UserError(f"--data {settings.data}: no file in it matches {settings.glob!r}")

    def documents() -> Iterator[str]:
        for file in files:
            if rows:
                yield from read_rows(file, column)
            else:
                text = read_text(file)
                if text is None and len(files) == 1:
                    raise UserError(f"{file} is not UTF-8 text")
                elif text is None:
                    passed_over.add(file)
                else:
                    yield text

    identity = [[file.relative_to(root).as_posix(), *stamp(file)] for file in files]
    return Source(name, [identity, column if rows else None], limited(documents, settings.limit), files, passed_over)


def open_hub_source(settings: argparse.Namespace) -> Source:
    """A data set on the Hub, streamed. Its fingerprint holds the commit; offline, the one that was used last."""
    repo, _, subset = settings.data.partition(":")
    if not is_hub_id(repo):
        raise UserError(f"--data {settings.data}: no such file or folder, and no Hub id (owner/name) either")
    known = Path(settings.cache_dir) / "hub-commits" / f"{repo.replace('/', '--')}.json"
    reason = why_hub_is_unreachable()
    if reason is None:
        from huggingface_hub import HfApi, errors

        try:
            commit = HfApi().dataset_info(repo, timeout=HUB_SECONDS).sha
        except errors.RepositoryNotFoundError:
            raise UserError(f"--data {repo}: the Hub has no such data set (or it is private: `hf auth login`)") from None
        except Exception as error:
            raise UserError(f"--data {repo}: the Hub gave no answer ({first_line(error)})") from None
        if is_main_process():
            make_folder(known.parent)
            write_json(known, {"commit": commit})
    elif known.exists():
        commit = read_json(known)["commit"]
    else:
        raise UserError(f"--data {repo}: the Hub cannot be reached ({reason}). "
                        "Offline, copy its files into a folder and give that: --data FOLDER --glob '*.parquet'")

    def documents() -> Iterator[str]:
        if reason:
            raise UserError(f"--data {repo}: its tokens are not in {settings.cache_dir}, and {reason}")
        import datasets

        try:
            stream = datasets.load_dataset(repo, subset or None, split="train", streaming=True, revision=commit)
            for row in stream:
                if settings.text_column not in row:
                    raise UserError(f"--data {repo} has the columns {', '.join(row)}: choose one with --text-column")
                if row[settings.text_column]:
                    yield str(row[settings.text_column])
        except UserError:
            raise
        except Exception as error:  # of the network, of the file formats: datasets passes on what it meets
            raise UserError(f"--data {settings.data} cannot be streamed: {first_line(error)}") from None

    identity = [settings.data, commit, settings.text_column]
    return Source(repo.split("/")[1], identity, limited(documents, settings.limit), [], set())


def is_hub_id(name: str) -> bool:
    """owner/name, and no path that was mistyped: there the folder exists, or the name ends like a file's."""
    is_path = Path(name).parent.is_dir() or Path(name).suffix in (".txt", ".md", ".py", ".json", *COLUMN_FILES)
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not is_path


def limited(documents: Callable[[], Iterator[str]], limit: int | None) -> Callable[[], Iterator[str]]:
    """The first `limit` documents that are not empty."""
    return lambda: (text for _, text in zip(range(limit or sys.maxsize), filter(None, documents()), strict=False))


def list_files(root: Path, pattern: str, skip: set[str] = frozenset()) -> list[Path]:
    """The files below `root` that match, sorted; nothing hidden, no link to a folder, no folder named in `skip`."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skip and not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        found += [path for path in paths if path.match(pattern) and path.is_file()]
    return found


def stamp(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: like make, this takes both unchanged for the same text."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def read_text(file: Path) -> str | None:
    """The text of a UTF-8 file, without a byte-order mark and with line feeds alone; None if it is something else."""
    content = file.read_bytes()
    try:
        return None if b"\0" in content else content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def read_rows(file: Path, column: str) -> Iterator[str]:
    """One column of a .jsonl or .parquet file. Empty and null fields are passed over."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(file)
            if column not in table.schema_arrow.names:
                raise UserError(f"{file} has the columns {', '.join(table.schema_arrow.names)}: choose --text-column")
            for batch in table.iter_batches(columns=[column], batch_size=1000):
                for value in batch.column(0).to_pylist():
                    if value is not None and not isinstance(value, str):
                        raise UserError(f"{file}: column {column!r} holds {type(value).__name__}, not text")
                    yield value or ""
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read as Parquet ({first_line(error)})") from None
        return
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise UserError(f"{file}, line {number}: no JSON ({first_line(error)})") from None
            if not isinstance(row, dict) or column not in row:
                columns = f"the columns {', '.join(row)}" if isinstance(row, dict) else "no object"
                raise UserError(f"{file}, line {number}: {columns}: choose one with --text-column")
            if row[column] is not None and not isinstance(row[column], str):
                raise UserError(f"{file}, line {number}: {column!r} holds {type(row[column]).__name__}, not text")
            yield (row[column] or "").encode("utf-8", "replace").decode("utf-8")  # JSON can spell half a character


def content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def split_documents(source: Source, val_fraction: float) -> tuple[Callable[[], Iterator[tuple[str, str]]], int | None]:
    """How to iterate over (split, document), and the length of all text (None for a stream, which is read only once).

    A document's split depends on its content alone, so equal documents never stand on both sides. At least one document
    is for validation; if there is only one, it is cut, and its last `val_fraction` is.
    """
    threshold, lowest, highest, length = int(val_fraction * 2**64), math.inf, -math.inf, 0
    for text in source.documents() if source.files else ():
        value = content_hash(text)
        lowest, highest, length = min(lowest, value), max(highest, value), length + len(text)
    if source.files and not length:
        raise UserError("the data hold no text")

    def whole() -> Iterator[tuple[str, str]]:
        for text in source.documents():
            yield SPLITS[content_hash(text) < max(threshold, lowest + 1 if source.files else 0)], text

    def cut() -> Iterator[tuple[str, str]]:
        text = next(source.documents())
        end = round(len(text) * (1 - val_fraction))
        yield from (("train", text[:end]), ("validation", text[end:]))

    return cut if lowest == highest else whole, length or None


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where a line ends between two visible characters: GPT-2's word pattern always cuts there too."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (match := LINE_END.search(text, start + PIECE_CHARACTERS)):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


@dataclass
class TokenData:
    """The two token files of a data set, and what is known of them."""

    folder: Path
    tokenizer: Tokenizer
    facts: dict  # meta.json: name, and by split: documents, tokens, bytes of text
    train: np.memmap  # (tokens,) of uint16 or uint32
    validation: np.memmap


def prepare_tokens(settings: argparse.Namespace) -> TokenData:
    """Token files for these settings: from the cache, or made now.

    With several processes the first one makes them while the others wait.
    """
    if settings.fingerprint and (cached := Path(settings.cache_dir) / f"tokens-{settings.fingerprint}").exists():
        return open_tokens(cached)  # a resumed run needs its tokens, not the data
    with main_process_first():
        return find_or_write_tokens(settings)


def find_or_write_tokens(settings: argparse.Namespace) -> TokenData:
    source = open_source(settings)
    ready_made = None
    if settings.tokenizer not in ("bpe", "bytes"):
        name = "openai-community/gpt2" if settings.tokenizer == "gpt2" else settings.tokenizer
        ready_made = load_tokenizer(fetch(name, TOKENIZER_FILES, "--tokenizer", settings.hub_cache))
    vocab_size = 257 if settings.tokenizer == "bytes" else settings.vocab_size
    identity = [source.identity, settings.limit, settings.val_fraction, ready_made.to_str() if ready_made else vocab_size]
    fingerprint = hashlib.sha256(json.dumps([1, identity]).encode()).hexdigest()[:16]
    if settings.fingerprint not in (None, fingerprint):
        raise UserError(f"--data {settings.data} has changed since this run began, and its tokens are gone from the cache")
    settings.fingerprint = fingerprint
    folder = Path(settings.cache_dir) / f"tokens-{fingerprint}"
    if not folder.exists():
        write_tokens(folder, source, settings.val_fraction, ready_made, vocab_size)
    return open_tokens(folder)


def open_tokens(folder: Path) -> TokenData:
    facts = read_json(folder / "facts.json")
    dtype = np.dtype(facts["dtype"])
    for split in SPLITS:
        file = folder / f"{split}.bin"
        if not file.exists() or file.stat().st_size != facts["tokens"][split] * dtype.itemsize:
            raise UserError(f"{file} is damaged: delete {folder}, and it is made anew")
    arrays = [np.memmap(folder / f"{split}.bin", dtype, mode="r") for split in SPLITS]
    return TokenData(folder, load_tokenizer(folder), facts, *arrays)


def write_tokens(folder: Path, source: Source, val_fraction: float, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Train the tokenizer unless there is one, tokenise everything once, and rename the finished folder into place."""
    make_folder(folder.parent)
    remove_leftovers(folder.parent, "tokens-*.tmp-*", seconds=86400)
    started, stamps = time.perf_counter(), [stamp(file) for file in source.files]
    documents, length = split_documents(source, val_fraction)
    if tokenizer is None:

        def training_text() -> Iterator[str]:
            left = TOKENIZER_CHARACTERS
            for split, text in documents():
                for piece in pieces(text) if split == "train" else ():
                    yield piece
                    left -= len(piece)
                    if left < 0:
                        return

        tokenizer = train_tokenizer(training_text(), vocab_size)
        say(f"tokenizer: byte-level BPE, {vocabulary_size(tokenizer):,} tokens, trained on the training documents "
            f"in {time.perf_counter() - started:.1f} s")  # fmt: skip
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    counts = {name: dict.fromkeys(SPLITS, 0) for name in ("documents", "tokens", "bytes")}
    part = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    part.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            files = {split: stack.enter_context(open(part / f"{split}.bin", "wb")) for split in SPLITS}
            bar = stack.enter_context(tqdm(total=length, unit=" characters", unit_scale=True, desc="tokenising", disable=None))

            def write(batch: list[tuple[str, str, bool]]) -> None:
                encodings = tokenizer.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
                for (split, text, first), encoding in zip(batch, encodings, strict=True):
                    tokens = np.array([end, *encoding.ids] if first else encoding.ids, dtype)
                    files[split].write(tokens.tobytes())
                    for name, amount in (("documents", first), ("tokens", len(tokens)), ("bytes", len(text.encode()))):
                        counts[name][split] += int(amount)
                    bar.update(len(text))

            batch, characters = [], 0
            for split, document in documents():
                for i, text in enumerate(pieces(document)):
                    batch.append((split, text, i == 0))
                    characters += len(text)
                    if characters >= BATCH_CHARACTERS:
                        write(batch)
                        batch, characters = [], 0
            write(batch)
        for split in SPLITS:
            if not counts["tokens"][split]:
                raise UserError(f"too little text: no document fell to {split} (--val-fraction {val_fraction})")
        if stamps != [stamp(file) for file in source.files]:
            raise UserError(f"--data {source.name}: a file changed while it was being read")
        tokenizer.save(str(part / "tokenizer.json"))
        write_json(part / "facts.json", {"name": source.name, "dtype": dtype.name, **counts})
        publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    passed_over = f", {len(source.passed_over)} files that are no UTF-8 text passed over" if source.passed_over else ""
    say(f"tokenised: {sum(counts['documents'].values()):,} documents, {sum(counts['bytes'].values()) / 1e6:.1f} MB, "
        f"{sum(counts['tokens'].values()):,} tokens in {time.perf_counter() - started:.1f} s{passed_over}")  # fmt: skip


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write to {folder}")
    except OSError as error:
        raise UserError(f"cannot make or write the folder {folder} ({error})") from None
    return folder


def publish(part: Path, folder: Path) -> None:
    """Put a finished folder in its place in one step: on disk first, so that after a crash it is complete or absent."""
    for file in [*part.iterdir(), part] if os.name == "posix" else ():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not folder.exists():  # another process may have been first, with the same content
        os.rename(part, folder)


def remove_leftovers(folder: Path, pattern: str, seconds: float) -> list[Path]:
    """Delete folders that a killed process left unfinished: those in which nothing has changed for so long."""
    parts = list(folder.glob(pattern))
    old = [part for part in parts if time.time() - max(file.stat().st_mtime for file in [part, *part.iterdir()]) > seconds]
    for part in old:
        shutil.rmtree(part, ignore_errors=True)
    return old


class TrainingOrder:
    """Which windows of the token stream each training step reads: a seeded permutation, without replacement.

    An epoch cuts the stream at a random offset into windows of `context` + 1 tokens that overlap by one (each token is
    once a target), and visits all of them in random order. A position in this endless order is one whole number, so a
    checkpoint needs no more than that, and neither micro-batch nor number of processes changes what a step learns from.
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
            slack = len(self.tokens) - 1 - self.per_epoch * self.context
            self.offset, self.order, self.epoch = int(random.integers(slack + 1)), random.permutation(self.per_epoch), epoch
        return self.offset + int(self.order[index]) * self.context


# ----------------------------------------------------------------------------------------------------------------------
# 6. Optimiser
# ----------------------------------------------------------------------------------------------------------------------

BETAS = (0.9, 0.95)  # Brown et al. 2020, appendix B, as is the clipping
CLIP = 1.0  # largest gradient norm


def parameter_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Weight decay for matrices (embeddings too); none for biases and norms, which have no reason to be small."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimiser(model: GPT, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), its whole update in one fused kernel."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=BETAS, eps=1e-8, fused=True)


def learning_rate(step: int, settings: argparse.Namespace) -> float:
    """For step 0, 1, ...: linear warm-up, then cosine to a tenth, or constant and linear to zero (wsd)."""
    warmup, last = settings.warmup_steps, settings.max_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "wsd":  # Hu et al. 2024 (MiniCPM), section 4
        decay = max(1, last // 5)
        return settings.lr * min(1.0, (last - step) / decay)
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
    PATIENCE = 10

    def __init__(self, device: torch.device):
        self.state = torch.zeros(len(self.FIELDS), device=device)
        self.state[self.FIELDS.index("lowest")] = math.inf

    @torch.no_grad()
    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Take note of a step. Returns 1.0 on the device if it must be skipped, otherwise 0.0."""
        steps, mean, variance, mean_norm, lowest, in_a_row, skipped = self.state.unbind()
        far = loss > mean + torch.clamp(10 * variance.sqrt(), min=0.5)
        steep = norm > torch.clamp(10 * mean_norm, min=CLIP)
        skip = ~torch.isfinite(loss + norm) | ((steps >= self.LEARN) & (far | steep))
        rate = torch.clamp(1 / (steps + 1), min=0.02)  # a plain mean at first, then an exponential one
        change = loss - mean
        mean = mean + rate * change
        variance = (1 - rate) * (variance + rate * change**2)
        mean_norm = mean_norm + rate * (norm - mean_norm)
        lowest = torch.where(steps >= self.LEARN, torch.minimum(lowest, mean), lowest)
        good = torch.stack([steps + 1, mean, variance, mean_norm, lowest, torch.zeros_like(steps), skipped])
        bad = torch.stack([*self.state.unbind()[:5], in_a_row + 1, skipped + 1])
        self.state = torch.where(skip, bad, good)
        return skip.float()

    @classmethod
    def is_diverging(cls, state: dict[str, float]) -> bool:
        return state["in_a_row"] >= cls.PATIENCE or state["mean_loss"] > state["lowest"] + 1


# ----------------------------------------------------------------------------------------------------------------------
# 7. Checkpoints
#
# checkpoints/step-00000500/ is a Hugging Face folder (section 3) with two more files: training.safetensors (AdamW's
# moments, the guard's statistics) and training.json (step, position in the data, time, best loss). There is no
# generator state to keep: every step seeds all generators from (seed, step, process), see section 10, and the order of
# the data is a function of the seed. The learning rate is a function of the step.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come: whole numbers and floats only, so that JSON keeps it exactly."""

    step: int = 0  # optimiser steps taken
    windows: int = 0  # position in the training order
    seconds: float = 0.0  # spent on training steps
    validation_loss: float = math.inf  # the last one, nats per token
    best_loss: float = math.inf
    best_step: int = 0


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run: Path, model: GPT, optimiser: torch.optim.AdamW, guard: Guard, progress: Progress,
                    tokenizer: Tokenizer) -> None:  # fmt: skip
    """Write a checkpoint under a temporary name and rename it; then keep the last two and the best."""
    folder = checkpoint_folder(run, progress.step)
    part = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        save_pretrained(model, tokenizer, part)
        tensors = {"guard": guard.state}
        for name, parameter in model.named_parameters():
            for key, value in optimiser.state[parameter].items():  # exp_avg, exp_avg_sq, step
                tensors[f"{key}.{name}"] = value.contiguous()
        save_file(tensors, part / "training.safetensors")
        write_json(part / "training.json", vars(progress))
        publish(part, folder)
    except (OSError, SafetensorError) as error:
        kept = find_checkpoints(run)
        raise UserError(f"the checkpoint of step {progress.step} cannot be written ({first_line(error)}); "
                        f"the last good one is {kept[0] if kept else 'none'}") from None  # fmt: skip
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in find_checkpoints(run)[2:]:
        if old != checkpoint_folder(run, progress.best_step):
            doomed = old.with_name(f"{old.name}.tmp-0")
            os.rename(old, doomed)  # first out of sight: half-deleted, it must not pass for a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def find_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def load_checkpoint(folder: Path, model: GPT, optimiser: torch.optim.AdamW, guard: Guard) -> Progress:
    """Fill model, optimiser and guard from a checkpoint. Raises UserError, and leaves them alone, when it is damaged."""
    progress = Progress(**read_json(folder / "training.json"))
    saved = load_pretrained(folder)
    try:
        tensors = load_file(folder / "training.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / 'training.safetensors'} is damaged ({first_line(error)})") from None
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    if shapes != [(name, parameter.shape) for name, parameter in saved.named_parameters()]:
        raise UserError(f"{folder} is the checkpoint of a model of another shape")
    model.load_state_dict(saved.state_dict())
    for name, parameter in model.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
        optimiser.state[parameter] = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in keys}
    guard.state.copy_(tensors["guard"])
    return progress


def resume(run: Path, model: GPT, optimiser: torch.optim.AdamW, guard: Guard) -> Progress:
    """Continue from the newest checkpoint that can be read; put aside those that cannot, and say so."""
    with main_process_first():
        if is_main_process():
            for part in remove_leftovers(run / "checkpoints", "step-*.tmp-*", seconds=0):
                say(f"passed over {part.name}: it was never finished")
        for folder in find_checkpoints(run):
            try:
                progress = load_checkpoint(folder, model, optimiser, guard)
            except UserError as error:
                say(f"passed over {folder.name}: {error}")
                os.rename(folder, folder.with_name(f"{folder.name}.damaged"))
                continue
            say(f"resumed from {folder} ({progress.step:,} steps done)")
            return progress
    say(f"{run} has no checkpoint yet: starting at step 0")
    return Progress()


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluation
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(session: "Session") -> float:
    """Mean loss in nats over every token of the validation slice but the first, in windows of one context.

    Batches have one shape; what is missing to fill the last has target -1 and does not count. Each process takes every
    world-th batch, and the sums are added up.
    """
    tokens, context, rows = session.data.validation, session.model.config.context, session.micro_batch
    targets_in_all = len(tokens) - 1
    total = torch.zeros((), dtype=torch.float64)
    session.model.eval()
    for first in range(session.rank * rows * context, targets_in_all, session.world * rows * context):
        stretch = np.asarray(tokens[first : first + rows * context + 1], np.int64)
        inputs, targets = np.zeros(rows * context, np.int64), np.full(rows * context, -1)
        inputs[: len(stretch) - 1], targets[: len(stretch) - 1] = stretch[:-1], stretch[1:]
        batch = torch.from_numpy(np.stack([inputs, targets])).view(2, rows, context).to(session.device)
        with session.autocast():
            total += session.network(batch[0], batch[1]).double().cpu()
    session.model.train()
    total = total.to(session.device, torch.float32 if session.device.type == "mps" else torch.float64)
    if session.world > 1:
        dist.all_reduce(total)
    return total.item() / targets_in_all


BIGRAM_TOKENS = 50_000_000  # training tokens that the bigram model counts, at most


def bigram_loss(train: np.ndarray, validation: np.ndarray) -> float:
    """Validation loss in nats per token of a bigram model, the yardstick that a language model must beat.

    Interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999, section 2.7): every count is discounted
    by d = n1 / (n1 + 2 n2), and what that frees goes to tokens by the number of different tokens they follow.
    """
    train, validation = train[:BIGRAM_TOKENS].astype(np.int64), validation.astype(np.int64)
    size = int(max(train.max(), validation.max())) + 1
    pairs, counts = np.unique(train[:-1] * size + train[1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5
    followers = np.bincount(pairs // size, minlength=size)  # different tokens seen after each token
    total = np.bincount(pairs // size, counts, size)
    preceders = np.bincount(pairs % size, minlength=size) + 0.5  # the half: no token may have probability 0
    lower = preceders / preceders.sum()

    first, second = validation[:-1], validation[1:]
    place = np.minimum(np.searchsorted(pairs, first * size + second), len(pairs) - 1)
    count = np.where(pairs[place] == first * size + second, counts[place], 0)
    seen = np.maximum(total[first], 1)
    freed = np.where(total[first] > 0, discount * followers[first] / seen, 1)
    return float(-np.log(np.maximum(count - discount, 0) / seen + freed * lower[second]).mean())


# ----------------------------------------------------------------------------------------------------------------------
# 9. Generation
# ----------------------------------------------------------------------------------------------------------------------


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> torch.Tensor:
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
        before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier tokens, together
        probabilities[before >= top_p * probabilities.sum(dim=-1, keepdim=True)] = 0
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT, prompt: list[int], count: int, max_new_tokens: int, end: int, temperature: float = 0.8, top_k: int = 50,
    top_p: float = 1.0, seed: int = 0, cached: bool = True,
) -> Iterator[list[int]]:  # fmt: skip
    """Continue `prompt` `count` times in one batch. Yields, token by token, the newest token of every continuation.

    A continuation that has reached `end` stays there; the last yield is when all have. When the context is full, its
    newer half is read again as if it were the prompt. `cached=False` computes everything anew for each token, with the
    same result: it is there to check the cache against.
    """
    device, context = model.wte.weight.device, model.config.context
    generator = torch.Generator(device).manual_seed(seed)
    sequence = torch.tensor([prompt] * count, device=device)
    visible, cache = min(len(prompt), context), None  # `visible`: the newest tokens, those that the model sees
    finished = torch.zeros(count, 1, dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if visible > context:
                visible, cache = max(1, context // 2), None
            if cached and cache is None:
                cache, new = KVCache(model.config, count, device), visible
            else:
                new = 1 if cached else visible
            if cached:
                cache.advance(new)
            logits = model(sequence[:, -new:], cache=cache)[:, -1]  # (count, V)
            token = choose(logits, temperature, top_k, top_p, generator).masked_fill(finished, end)
            sequence, visible = torch.cat([sequence, token], dim=1), visible + 1
            finished |= token == end
            yield token[:, 0].tolist()
            if finished.all():
                return
    finally:
        model.train(was_training)


def sample_texts(model: GPT, tokenizer: Tokenizer, prompt: str, settings: argparse.Namespace,
                 listen: Callable[[str], None] | None = None) -> list[str]:  # fmt: skip
    """Continuations of a prompt as texts, without prompt and end of text. `listen` gets the first one's text as it grows."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    start = encode(tokenizer, prompt) or [end]  # without a prompt: a new document
    columns, told = [[] for _ in range(settings.num_samples)], ""
    for tokens in generate(model, start, settings.num_samples, settings.max_new_tokens, end, settings.temperature,
                           settings.top_k, settings.top_p, settings.seed):  # fmt: skip
        for column, token in zip(columns, tokens, strict=True):
            if token != end:
                column.append(token)
        if listen:
            text = decode(tokenizer, columns[0])
            if not text.endswith("\ufffd"):  # half a character: its other bytes come with the next token
                listen(text[len(told) :])
                told = text
    return [decode(tokenizer, column) for column in columns]


# ----------------------------------------------------------------------------------------------------------------------
# 10. Training step
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """Everything a training step needs, put together in section 11."""

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

    def autocast(self) -> contextlib.AbstractContextManager:
        on = self.dtype is torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if on else contextlib.nullcontext()

    def fetch_batch(self, first_window: int) -> torch.Tensor:
        """This process's windows of the step that begins at `first_window`: (rows, context + 1), on its way to the device.

        A step reads the same windows however many processes share it: each takes its own stretch of them.
        """
        rows = self.settings.batch_tokens // self.order.context // self.world
        batch = torch.from_numpy(self.order.windows(first_window + self.rank * rows, rows))
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch.to(self.device)


STATS = ("loss", "norm", "skip", "stop")  # what a training step returns, followed by the guard's fields


def training_step(session: Session, step: int, batch: torch.Tensor, stop: bool = False) -> torch.Tensor:
    """One optimiser step on `batch` (rows, context + 1). Returns STATS and Guard.FIELDS as a vector on the device.

    Nothing in here waits for the device: skipping a bad step happens there. `stop` says that this process was asked to
    end; it comes back as a number that is positive in all processes, so that all end after the same step.
    """
    seed_step(session.settings.seed, step, session.rank)
    for group in session.optimiser.param_groups:
        group["lr"] = learning_rate(step, session.settings)
    micro_batches = batch.split(session.micro_batch)
    targets = session.settings.batch_tokens  # over all micro-batches and processes: each token counts the same
    totals = torch.zeros(2, device=session.device)
    for number, windows in enumerate(micro_batches):
        # Processes exchange gradients during the last backward pass only: the earlier ones just add up.
        is_last = number == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last or session.world == 1 else session.network.no_sync():
            with session.autocast():
                loss = session.network(windows[:, :-1], windows[:, 1:]) / targets
            (loss * session.world).backward()  # DDP divides by the number of processes, this takes it back
        totals[0] += loss.detach()
    totals[1] += float(stop)
    if session.world > 1:
        dist.all_reduce(totals)
    norm = nn.utils.clip_grad_norm_(session.model.parameters(), CLIP)
    skip = session.guard.judge(totals[0], norm)
    session.optimiser.found_inf = skip  # the fused kernel leaves weights and moments alone where this is 1
    session.optimiser.step()
    session.optimiser.zero_grad(set_to_none=True)
    return torch.cat([torch.stack([totals[0], norm, skip, totals[1]]), session.guard.state])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all generators for one step, so that dropout depends on nothing that came before: resuming is exact."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


# ----------------------------------------------------------------------------------------------------------------------
# 11. Session
# ----------------------------------------------------------------------------------------------------------------------


def join_processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device. torchrun says the first two in the environment; alone, they are 0 and 1."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if world > 1 and not dist.is_initialized():  # the others wait long while the first one tokenises
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return rank, world, device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware really has it: a GPU of compute capability 8.0. (Older ones emulate it, slower than fp32.)"""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "bf16" and not has_bf16:
        raise UserError(f"--dtype bf16: {device_name(device)} does not have it")
    return torch.bfloat16 if has_bf16 and wanted != "fp32" else torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def make_model(settings: argparse.Namespace, tokenizer: Tokenizer) -> GPT:
    """A fresh model, or that of --init. Notes the geometry in the settings, for a resumed run and for the log."""
    size = vocabulary_size(tokenizer)
    if settings.init:
        model = load_pretrained(Path(settings.init), settings.context, settings.dropout)
        if size > model.config.vocab_size:
            raise UserError(f"--tokenizer {settings.tokenizer} has {size} tokens, the model of --init only "
                            f"{model.config.vocab_size}")  # fmt: skip
    else:
        config = GPTConfig(size, settings.context, settings.layers, settings.heads, settings.width, settings.dropout)
        check_geometry(config)
        model = GPT(config)
        model.initialise(settings.seed)
    for name in ("context", "layers", "heads", "width"):
        setattr(settings, name, getattr(model.config, name))
    return model


def finish_settings(settings: argparse.Namespace, windows_per_epoch: int) -> None:
    """Fill in what depends on the data: steps, warm-up, evaluation interval."""
    if settings.max_steps is None:
        steps = settings.epochs * windows_per_epoch * settings.context / settings.batch_tokens
        settings.max_steps = max(1, round(steps))
    if settings.warmup_steps is None:
        settings.warmup_steps = min(2000, settings.max_steps // 20)
    if settings.eval_every is None:
        settings.eval_every = min(1000, max(1, settings.max_steps // 10))


def open_session(settings: argparse.Namespace, processes: tuple, data: TokenData, model: GPT) -> Session:
    """Put the model on the device, and find out how it runs best there."""
    rank, world, device = processes
    context = model.config.context
    order = TrainingOrder(data.train, context, settings.seed)
    if settings.batch_tokens % (context * world):
        raise UserError(f"--batch-tokens {settings.batch_tokens} is no multiple of {context} (context) x {world} (processes)")
    rows = settings.batch_tokens // context // world
    if settings.micro_batch != "auto" and rows % settings.micro_batch:
        raise UserError(f"--micro-batch {settings.micro_batch} does not divide the {rows} sequences that each process has "
                        "per step (--batch-tokens / context / processes)")  # fmt: skip
    finish_settings(settings, order.per_epoch)
    dtype = choose_dtype(settings.dtype, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    model.to(device).train()
    optimiser = make_optimiser(model, settings.weight_decay)
    session = Session(settings, rank, world, device, dtype, data, order, model, model, optimiser, Guard(device), rows, "")
    session.micro_batch = settings.micro_batch if settings.micro_batch != "auto" else largest_micro_batch(session, rows)
    session.network, session.mode = compile_network(session)
    if world > 1:
        session.network = nn.parallel.DistributedDataParallel(session.network)
    return session


def largest_micro_batch(session: Session, rows: int) -> int:
    """The largest divisor of `rows` that fits: tried out on a GPU, a fixed number of tokens elsewhere."""
    divisors = [size for size in range(rows, 0, -1) if rows % size == 0]
    if session.device.type != "cuda":
        return next(size for size in divisors if size == 1 or size * session.order.context <= 8192)
    # Room for what comes later: AdamW's two moments, and the buffers in which processes exchange gradients.
    reserve = [torch.empty_like(p) for p in session.model.parameters() for _ in range(2 + (session.world > 1))]
    for size in divisors:
        try:
            run_once(session, session.model, size)
            break
        except torch.OutOfMemoryError:
            session.optimiser.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    else:
        raise UserError("not even one sequence fits this GPU: choose a smaller --model or --context")
    del reserve
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if session.world > 1:  # all processes must agree
        smallest = torch.tensor(size, device=session.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        size = int(smallest)
    return size


def run_once(session: Session, network: Callable, rows: int) -> None:
    """A forward and a backward pass on `rows` sequences, leaving nothing behind."""
    tokens = torch.zeros(rows, session.order.context + 1, dtype=torch.long, device=session.device)
    with session.autocast():
        loss = network(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    session.optimiser.zero_grad(set_to_none=True)


def compile_network(session: Session) -> tuple[Callable, str]:
    """torch.compile where it works and pays; otherwise the model as it is, and one line of reason."""
    settings = session.settings
    if not settings.compile:
        return session.model, "eager (--no-compile)"
    if session.device.type != "cuda":
        return session.model, f"eager (compiling rarely pays on {session.device.type.upper()})"
    if flops_per_token(session.model.config) * settings.batch_tokens * settings.max_steps < COMPILE_FLOPS * session.world:
        return session.model, "eager (so short a run is over before it is compiled)"
    try:
        network = torch.compile(session.model)
        run_once(session, network, session.micro_batch)
        return network, "compiled"
    except Exception as error:  # no C compiler, no Triton for this GPU: there are many ways, and eager always works
        session.optimiser.zero_grad(set_to_none=True)
        return session.model, f"eager (torch.compile failed: {first_line(error)[:100]})"


COMPILE_FLOPS = 1e15  # about a minute of an older GPU, and what compiling takes


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in `dtype`: what the hardware reaches, as the yardstick for MFU."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 10)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(3):  # the first warms up
        synchronise(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / repeats)
    return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GiB: of the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ----------------------------------------------------------------------------------------------------------------------
# 12. Training loop
# ----------------------------------------------------------------------------------------------------------------------


def resolve(arguments: argparse.Namespace) -> argparse.Namespace:
    """All settings: what was given, over the resumed run's own, over the preset's, over the defaults."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in ("data", "tokenizer", "init", "cache_dir"):  # so that a run can be resumed from another folder
        if name in given and Path(given[name]).exists() and given[name] not in ("stdlib", "bpe", "bytes", "gpt2"):
            given[name] = str(Path(given[name]).resolve())
    saved = {}
    if given.get("resume"):
        run = Path(given["output_dir"]) if "output_dir" in given else newest_run()
        if not run.is_dir():
            raise UserError(f"--resume: there is no run in {run}")
        given["output_dir"] = str(run)
        if (run / "metrics.json").exists():
            saved = read_json(run / "metrics.json").get("configuration", {})
        for name in given.keys() - FREE_ON_RESUME:
            if name in saved and saved[name] != given[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {saved[name]} in {run}, not {given[name]}: a resumed run keeps its settings. "
                                f"Leave {flag} out, or start a new run")  # fmt: skip
    preset = PRESETS[given.get("model") or saved.get("model") or DEFAULTS["model"]]
    if "epochs" in given:
        preset = preset | {"max_steps": None}
    settings = {"fingerprint": None, "hub_cache": None, "name": given.get("model") or DEFAULTS["model"]}
    settings |= DEFAULTS | preset | saved | given
    if "cache_dir" in given:
        settings["hub_cache"] = str(Path(given["cache_dir"]) / "hub")
    settings = argparse.Namespace(**settings)
    settings.cache_dir = str(Path(settings.cache_dir).resolve())
    if settings.init and not saved:
        for name in ("layers", "heads", "width"):
            if name in given:
                raise UserError(f"--{name} cannot be changed: --init {settings.init} has its own")
        settings.context = given.get("context")  # None: that of the weights
        settings.name = Path(settings.init).name
        settings.init = str(find_weights(settings))
    if settings.tokenizer is None:
        settings.tokenizer = settings.init or "bpe"
    return settings


def newest_run() -> Path:
    runs = sorted(Path("runs").glob("*/metrics.json"), key=lambda file: file.stat().st_mtime)
    runs = [file.parent for file in runs if (file.parent / "checkpoints").is_dir()]
    if not runs:
        raise UserError(f"no run of this script in {Path('runs').resolve()}: train one first, or name it with its flag")
    return runs[-1]


def find_weights(settings: argparse.Namespace) -> Path:
    """The Hugging Face folder that --init means: itself, a run's best checkpoint (default: the newest run's), the Hub's."""
    run = Path(settings.init) if settings.init else newest_run()
    if (run / "checkpoints").is_dir():
        for folder in find_checkpoints(run):
            best = checkpoint_folder(run, read_json(folder / "training.json")["best_step"])
            return best if best.exists() else folder
        raise UserError(f"{run} has no finished checkpoint")
    return fetch(settings.init, MODEL_FILES + TOKENIZER_FILES, "--init", settings.hub_cache)


def short(value: float) -> str:
    """0.00025 as 2.5e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def claim_run_folder(settings: argparse.Namespace, data_name: str) -> Path:
    """Make this run's folder, which no other run has: a taken default name gets a suffix."""
    if settings.output_dir:
        return make_folder(Path(settings.output_dir))
    size = settings.name if settings.name.startswith("gpt2") else f"gpt2-{settings.name}"
    base = f"{size}-{data_name}-lr={short(settings.lr)}"
    make_folder(Path("runs"))
    for number in range(1, 10_000):
        folder = Path("runs") / (base if number == 1 else f"{base}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise UserError(f"runs/{base} and its numbered successors are all taken: clear up, or choose --output-dir")


def check_output_dir(settings: argparse.Namespace) -> None:
    """Refuse a folder that holds something, before minutes of work are done for it."""
    folder = Path(settings.output_dir or "runs")
    if settings.output_dir and not settings.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: add --resume to continue the run in it, or choose another --output-dir")
    parent = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise UserError(f"cannot write to {parent}, where {folder} should be")


class StopRequest:
    """SIGINT and SIGTERM ask the loop to end after the step; a second one ends the process at once."""

    def __init__(self):
        self.number = None
        self.former = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame: object) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        os.write(2, b"\nstopping after this step and saving; a second signal stops at once\n" if is_main_process() else b"")

    def restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


class RunLog:
    """The log of a run: a JSON object per line in metrics.jsonl, the same in TensorBoard, samples in samples.txt."""

    def __init__(self, run: Path, step: int):
        kept = [line for line in read_log(run) if line["step"] <= step and step]  # what a resumed run does again goes
        self.lines = open(run / "metrics.jsonl", "w", encoding="utf-8", buffering=1)
        for line in kept:
            self.lines.write(json.dumps(line) + "\n")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run), purge_step=step + 1)
        self.samples = open(run / "samples.txt", "a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: dict[str, float], board: bool = True) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON knows no NaN
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items() if board else ():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def sample(self, step: int, text: str) -> None:
        self.samples.write(f"--- step {step}\n{text}\n")
        self.board.add_text("sample", f"```\n{text}\n```", step)

    def close(self) -> None:
        for file in (self.lines, self.board, self.samples):
            file.close()


def read_log(run: Path) -> list[dict]:
    """The lines of metrics.jsonl. The last one of a killed run may be half a line: it is left out."""
    lines = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def train(settings: argparse.Namespace) -> int:
    """Train, from the start or from where a run stopped. Returns the exit code: 0, or 130 / 143 after a signal."""
    if is_main_process():
        check_output_dir(settings)
    processes = join_processes()
    data = prepare_tokens(settings)
    session = open_session(settings, processes, data, make_model(settings, data.tokenizer))
    progress = Progress()
    if settings.resume:
        progress = resume(Path(settings.output_dir), session.model, session.optimiser, session.guard)
    facts = describe(session)
    folder = None
    if is_main_process():
        folder = claim_run_folder(settings, data.facts["name"])
        facts["bigram_loss"] = bigram_loss(data.train, data.validation)
        say(f"yardstick: a bigram model of the same tokens has validation loss {facts['bigram_loss']:.3f}")
        say(f"folder: {folder}\n")
    return Run(session, progress, folder, facts).train()


def describe(session: Session) -> dict:
    """Say on a few lines what is about to run where. Returns the figures among it that the results need."""
    settings, config, facts = session.settings, session.model.config, session.data.facts
    rate = measure_matmul_rate(session.device, session.dtype)
    rows = settings.batch_tokens // config.context
    epochs = settings.max_steps * rows / session.order.per_epoch
    say(f"model: {settings.name}, {count_parameters(session.model):,} parameters ({config.layers} layers, {config.heads} "
        f"heads, width {config.width}, context {config.context}, vocabulary {config.vocab_size:,})")  # fmt: skip
    say(f"data: {facts['name']}, {facts['tokens']['train']:,} training and {facts['tokens']['validation']:,} validation "
        f"tokens of {facts['bytes']['validation'] / facts['tokens']['validation']:.2f} bytes")  # fmt: skip
    say(f"device: {session.world} x {device_name(session.device)}, {str(session.dtype).removeprefix('torch.')}, "
        f"{session.mode}; matrix products at {rate / 1e12:.2f} TFLOP/s")  # fmt: skip
    say(f"training: {settings.max_steps:,} steps of {rows} x {config.context} tokens ({epochs:.2f} epochs), micro-batch "
        f"{session.micro_batch}, learning rate {settings.lr:g} ({settings.schedule}, {settings.warmup_steps} steps warm-up)")
    return {"parameters": count_parameters(session.model), "matmul_flops_per_second": rate}


class Run:
    """The training loop and what stands around a step: readings, log, evaluations, checkpoints, results."""

    def __init__(self, session: Session, progress: Progress, folder: Path | None, facts: dict):
        self.session, self.settings, self.progress = session, session.settings, progress
        self.folder, self.facts = folder, facts  # no folder: not the main process, which writes for all
        self.report_every = max(1, self.settings.max_steps // 20)
        self.reported = self.began = (progress.step, progress.seconds)

    def train(self) -> int:
        """Run to the end, to a signal, or to divergence. Whatever happens, log, table and plot are written."""
        progress, settings, request = self.progress, self.settings, StopRequest()
        if self.folder:
            self.write_metrics("running")
            self.log = RunLog(self.folder, progress.step)
        status = "failed"
        try:
            if progress.step == 0:
                self.evaluate()
            self.loop(request)
            status = "finished" if progress.step == settings.max_steps else "stopped"
        finally:
            request.restore()
            if self.folder:
                self.write_metrics(status)
                self.log.close()
                plot(self.folder, self.facts["bigram_loss"])
        self.finish()
        if status == "finished":
            return 0
        say(f"\nstopped after step {progress.step}. To go on: "
            f"python {Path(sys.argv[0]).name} --resume --output-dir {self.folder}")  # fmt: skip
        return 128 + (request.number or signal.SIGTERM)

    def loop(self, request: StopRequest) -> None:
        """Step after step. The values of a step are read one step later, so that the device never waits for Python."""
        session, progress, settings = self.session, self.progress, self.settings
        windows_per_step = settings.batch_tokens // session.order.context
        batch, waiting, stop = session.fetch_batch(progress.windows), None, False
        clock = time.perf_counter()
        while progress.step < settings.max_steps and not stop:
            values = training_step(session, progress.step, batch, request.number is not None)
            progress.step, progress.windows = progress.step + 1, progress.windows + windows_per_step
            batch = session.fetch_batch(progress.windows)
            arrived, waiting = waiting, (progress.step, start_reading(values))
            stop = arrived is not None and self.note(*arrived) or (request.number is not None and session.world == 1)
            now = time.perf_counter()
            progress.seconds, clock = progress.seconds + now - clock, now
            is_due = progress.step % settings.eval_every == 0 or progress.step == settings.max_steps
            if is_due or stop:
                stop = self.note(*waiting) or stop
                waiting = None
                if is_due:
                    self.evaluate()
                self.save()
                clock = time.perf_counter()

    def note(self, step: int, reading: tuple) -> bool:
        """Take in the values of a step: log them, report now and then. True if some process was asked to stop.

        Raises UserError when the run is diverging.
        """
        values, progress = read(reading), self.progress
        line = {"loss": values["loss"], "gradient_norm": values["norm"], "learning_rate": learning_rate(step - 1, self.settings)}
        if values["skip"]:
            line["skipped"] = True
            first = (step - 1) * (self.settings.batch_tokens // self.session.order.context)
            say(f"step {step:,} skipped: loss {values['loss']:.3f}, gradient norm {values['norm']:.3g} "
                f"(windows {first:,} and following; {values['skipped']:.0f} steps skipped so far)")  # fmt: skip
        is_report = step % self.report_every == 0 or step == self.settings.max_steps
        if is_report and step > self.reported[0]:
            steps, seconds = step - self.reported[0], progress.seconds - self.reported[1]
            self.reported = (step, progress.seconds)
            line |= self.speed(steps, seconds) | {"memory_gib": peak_memory(self.session.device)}
            left = (self.settings.max_steps - step) * seconds / steps
            say(f"step {step:>{len(str(self.settings.max_steps))}}/{self.settings.max_steps} | loss {values['loss']:.4f} | "
                f"norm {values['norm']:.2f} | lr {line['learning_rate']:.2e} | {line['tokens_per_second']:,.0f} tokens/s | "
                f"MFU {line['mfu']:.0%} | {duration(left)} left")  # fmt: skip
        if self.folder:
            self.log.write(step, line, board=is_report or step % 10 == 0)
        if Guard.is_diverging(values):
            kept = find_checkpoints(self.folder) if self.folder else []
            raise UserError(f"the run diverges at step {step} (loss {values['mean_loss']:.3f} on average, {values['in_a_row']:.0f} "
                            f"steps skipped in a row): try a lower --lr or a longer --warmup-steps. "
                            f"The last good checkpoint is {kept[0] if kept else 'none'}")  # fmt: skip
        return values["stop"] > 0

    def speed(self, steps: int, seconds: float) -> dict[str, float]:
        """Tokens per second, and model FLOPs utilisation: the share of the measured matmul rate that training reaches."""
        rate = steps * self.settings.batch_tokens / max(seconds, 1e-9)
        peak = self.facts["matmul_flops_per_second"] * self.session.world
        return {"tokens_per_second": rate, "mfu": rate * flops_per_token(self.session.model.config) / peak}

    def evaluate(self) -> None:
        """Validation loss and a sample, to the terminal and the log."""
        session, progress = self.session, self.progress
        progress.validation_loss = loss = evaluate(session)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, progress.step
        if not self.folder:
            return
        short = argparse.Namespace(**vars(self.settings) | {"num_samples": 1, "max_new_tokens": 100})
        text = sample_texts(session.model, session.data.tokenizer, "", short)[0]
        say(f"  validation loss {loss:.4f} ({bits_per_byte(loss, session.data):.3f} bits per byte)")
        say(f"  sample: {text[:90]!r}")
        self.log.write(progress.step, {"validation_loss": loss, "bits_per_byte": bits_per_byte(loss, session.data)})
        self.log.sample(progress.step, text)

    def save(self) -> None:
        if self.folder:
            session = self.session
            save_checkpoint(self.folder, session.model, session.optimiser, session.guard, self.progress, session.data.tokenizer)
            self.write_metrics("running")

    def results(self) -> dict:
        """What came out so far, for metrics.json and the table."""
        progress, session = self.progress, self.session
        steps, seconds = progress.step - self.began[0], progress.seconds - self.began[1]  # of this process, not before
        return {
            "steps": progress.step,
            "tokens": progress.step * self.settings.batch_tokens,
            "epochs": progress.windows / session.order.per_epoch,
            "training_seconds": progress.seconds,
            **(self.speed(steps, seconds) if steps else {}),
            "peak_memory_gib": peak_memory(session.device),
            "skipped_steps": int(session.guard.state[Guard.FIELDS.index("skipped")]),
            "validation_loss": progress.validation_loss,
            "best_validation_loss": progress.best_loss,
            "best_step": progress.best_step,
            "bits_per_byte": bits_per_byte(progress.best_loss, session.data),
            "bigram_validation_loss": self.facts["bigram_loss"],
        }

    def write_metrics(self, status: str) -> None:
        packages = ("torch", "tokenizers", "safetensors", "numpy")
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
        session = self.session
        device = {"name": device_name(session.device), "processes": session.world, "dtype": str(session.dtype),
                  "mode": session.mode, "micro_batch": session.micro_batch}  # fmt: skip
        write_json(self.folder / "metrics.json", {
            "status": status, "configuration": vars(self.settings), "versions": versions, "device": device,
            "parameters": self.facts["parameters"], "matmul_flops_per_second": self.facts["matmul_flops_per_second"],
            "data": session.data.facts, "results": self.results(),
        })  # fmt: skip

    def finish(self) -> None:
        """The table, a sample, and where everything is."""
        if not self.folder:
            return
        results, session = self.results(), self.session
        rows = {
            "parameters": f"{self.facts['parameters']:,}",
            "training tokens": f"{results['tokens']:,} ({results['epochs']:.2f} epochs, {results['steps']:,} steps, "
                               f"{results['skipped_steps']} skipped)",
            "training time": duration(results["training_seconds"]),
            "speed": f"{results.get('tokens_per_second', 0):,.0f} tokens/s, MFU {results.get('mfu', 0):.0%}",
            "peak memory": f"{results['peak_memory_gib']:.2f} GiB",
            "validation loss": f"{results['validation_loss']:.4f} nats per token",
            "best validation loss": f"{results['best_validation_loss']:.4f} at step {results['best_step']:,} "
                                    f"({results['bits_per_byte']:.3f} bits per byte)",
            "bigram model": f"{results['bigram_validation_loss']:.4f} nats per token",
        }  # fmt: skip
        width = max(map(len, rows))
        say("\n" + "\n".join(f"| {name:{width}} | {value}" for name, value in rows.items()))
        say(f"\nsample:\n{sample_texts(session.model, session.data.tokenizer, '', self.settings)[0]}")
        script = Path(sys.argv[0]).name
        say(f"\n{self.folder}: checkpoints/, training_loss.png, metrics.json, metrics.jsonl, samples.txt, TensorBoard events")
        say(f"use it: python {script} --init {self.folder} --sample")


def start_reading(values: torch.Tensor) -> tuple[torch.Tensor, object]:
    """Send a vector on its way to the CPU, without waiting for it."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def read(reading: tuple[torch.Tensor, object]) -> dict[str, float]:
    """Wait for what start_reading() sent, by name."""
    values, arrival = reading
    if arrival:
        arrival.synchronize()
    return dict(zip(STATS + Guard.FIELDS, values.tolist(), strict=True))


def bits_per_byte(loss: float, data: TokenData) -> float:
    """Validation loss in bits per byte of text: unlike nats per token it can be compared across tokenizers."""
    return loss * (data.facts["tokens"]["validation"] - 1) / data.facts["bytes"]["validation"] / math.log(2)


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def plot(run: Path, bigram: float) -> None:
    """training_loss.png: the loss of every step and smoothed, validation with its minimum marked, and the bigram model."""
    import matplotlib

    matplotlib.use("Agg")  # draw into files: no screen is needed
    from matplotlib import pyplot

    lines = read_log(run)
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None and "skipped" not in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(9, 5))
    if training:
        steps, losses = np.array(training).T
        reach = max(1, len(losses) // 50)  # smoothed over a fiftieth of the run to both sides, less at the ends
        sums = np.cumsum([0, *losses])
        low, high = np.maximum(np.arange(len(losses)) - reach, 0), np.minimum(np.arange(len(losses)) + reach + 1, len(losses))
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="training, every step")
        axes.plot(steps, (sums[high] - sums[low]) / (high - low), color="C0", label="training, smoothed")
    if validation:
        best = min(validation, key=lambda point: point[1])
        axes.plot(*zip(*validation, strict=True), "o-", color="C1", label="validation")
        axes.plot(*best, "*", color="C3", markersize=14, label=f"smallest: {best[1]:.4f} at step {best[0]:,}")
    axes.axhline(bigram, color="0.4", linestyle="--", label=f"bigram model: {bigram:.4f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(run / "training_loss.png", dpi=120)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# 13. Using a model
# ----------------------------------------------------------------------------------------------------------------------


def load_for_use(settings: argparse.Namespace) -> tuple[GPT, Tokenizer, Path]:
    """The model of --init (default: the newest run's best) and its tokenizer."""
    folder = find_weights(settings)
    tokenizer = load_tokenizer(folder)
    model = load_pretrained(folder)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer in {folder} has more tokens than the model ({model.config.vocab_size})")
    return model.eval(), tokenizer, folder


def sample(settings: argparse.Namespace) -> int:
    """Continue a prompt, or one prompt after another from standard input."""
    model, tokenizer, folder = load_for_use(settings)
    model.to(join_processes()[2])
    say(f"model: {folder}")
    prompts = [settings.sample] if settings.sample else read_prompts()
    for prompt in prompts:
        if settings.num_samples == 1:
            say(prompt, end="")
            sample_texts(model, tokenizer, prompt, settings, listen=lambda text: say(text, end=""))
            say()
        else:
            for number, text in enumerate(sample_texts(model, tokenizer, prompt, settings), 1):
                say(f"--- {number}\n{prompt}{text}")
    return 0


def read_prompts() -> Iterator[str]:
    """Lines of standard input until it ends; at a terminal, asked for."""
    if sys.stdin.isatty():
        say("type the beginning of a text and Enter; an empty line starts a new document; Ctrl-D ends")
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def export(settings: argparse.Namespace) -> int:
    """Write a Hugging Face folder."""
    target = Path(settings.export)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--export {target}: not empty")
    model, tokenizer, folder = load_for_use(settings)
    part = make_folder(target.resolve().parent) / f"{target.name}.tmp-{os.getpid()}"
    part.mkdir()
    try:
        save_pretrained(model, tokenizer, part)
        if target.exists():
            target.rmdir()
        publish(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"{folder} -> {target}: transformers.GPT2LMHeadModel.from_pretrained({str(target)!r}) loads it")
    return 0


def plan(settings: argparse.Namespace) -> int:
    """Print what a run needs, measure a few steps of it, and leave nothing behind but the token files."""
    processes = join_processes()
    data = prepare_tokens(settings)
    model = make_model(settings, data.tokenizer)
    config, numbers = model.config, sum(parameter.numel() for parameter in model.parameters())
    say(f"parameters: {count_parameters(model):,}, and {numbers - count_parameters(model):,} of padding")
    say(f"compute: {flops_per_token(config) / 1e9:.3f} GFLOP per token, forward and backward")
    tokens = data.facts["tokens"]
    say(f"data: {tokens['train']:,} training tokens = {tokens['train'] / settings.batch_tokens:,.1f} steps of "
        f"{settings.batch_tokens:,} tokens per epoch; {tokens['validation']:,} validation tokens")  # fmt: skip
    fixed = 16 * numbers / 2**30
    say(f"memory: {fixed:.2f} GiB for weights, gradients and AdamW's two moments (4 bytes each, on every device)")
    session = open_session(settings, processes, data, model)
    rows = session.micro_batch
    estimate = activation_bytes(config, session.dtype) * rows * config.context / 2**30
    say(f"        about {estimate:.2f} GiB for activations at a micro-batch of {rows} x {config.context}, uncompiled")
    facts = describe(session)
    windows = settings.batch_tokens // config.context
    session.settings.max_steps, steps = max(settings.max_steps, 1), 0
    for step in range(3 + PLAN_STEPS):
        if step == 3:  # the first ones warm up
            synchronise(session.device)
            started = time.perf_counter()
        training_step(session, step, session.fetch_batch(step * windows))
        steps += step >= 3
        if step > 3 and session.device.type == "cpu" and time.perf_counter() - started > PLAN_SECONDS:
            break
    synchronise(session.device)
    seconds = (time.perf_counter() - started) / steps
    speed = Run(session, Progress(), None, facts).speed(1, seconds)
    say(f"measured: {steps} steps, {seconds:.3f} s per step, {speed['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {speed['mfu']:.0%}, peak memory {peak_memory(session.device):.2f} GiB")  # fmt: skip
    say(f"the whole run: {duration(seconds * settings.max_steps)} for {settings.max_steps:,} steps, without evaluations")
    return 0


PLAN_STEPS, PLAN_SECONDS = 20, 20.0


def activation_bytes(config: GPTConfig, dtype: torch.dtype) -> float:
    """Memory per token for what the backward pass needs, uncompiled: an estimate, to 20% or so.

    Per block: the inputs of both norms (float32), and in the products' dtype both norms' outputs, q, k, v, attention's
    output, and the MLP's four-fold width before and after the GELU: 2 x 4 + 14 x its size, per unit of width. Then the
    logits and the cross-entropy's copies of them in float32.
    """
    size = 2 if dtype is torch.bfloat16 else 4
    return config.layers * config.width * (2 * 4 + 14 * size) + config.padded_vocab_size * (2 * size + 8)


# ----------------------------------------------------------------------------------------------------------------------
# 14. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(arguments: argparse.Namespace) -> int:
    """Do what the command line says. Returns the exit code."""
    try:
        settings = resolve(arguments)
        if settings.sample is not None:
            return sample(settings)
        if settings.export:
            return export(settings)
        return plan(settings) if settings.plan else train(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is too small for this: lower --micro-batch, --context or --model", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
