"""Speed of gpt2_from_scratch.py beside transformers' GPT-2, on this machine, in one run. Not collected by pytest.

    python tests/benchmark_gpt2.py                             # nano on a CPU, the 124M model on a GPU
    python tests/benchmark_gpt2.py --model gpt2-xl --sequences 8    # another size and batch
    python tests/benchmark_gpt2.py --only compiled generate    # some of the measurements

Training: whole steps (forward, backward, clipping, AdamW) on random tokens, the median of --steps after warming up.
transformers runs the same step on its own model and the same precision, with clip_grad_norm_ and fused AdamW, as most
training scripts do. Generation: greedy, 8 sequences of 32 + 128 tokens (or as many as fit the block) in float32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

VOCABULARY = 50257


def make_trainer(arguments: argparse.Namespace, *flags: str) -> gpt2.Trainer:
    """The script's own trainer on random tokens, with `flags` of its command line."""
    processes = gpt2.join_processes()
    words = ["--model", arguments.model, "--tokenizer", "gpt2", "--max-steps", "1000000000", *flags]
    settings = gpt2.resolve_settings(gpt2.parse_arguments(words))
    sizes = {"batch_tokens": arguments.sequences * settings.block_size, "micro_batch_size": arguments.sequences}
    settings = replace(settings, **sizes)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 10**6).astype(np.uint16)
    data = gpt2.TokenData(None, {}, tokens, tokens)
    sizes = {name: getattr(settings, name) for name in ("block_size", "layers", "heads", "width")}
    model = gpt2.GPT(gpt2.GPTConfig(VOCABULARY, **sizes))
    model.initialise(0)
    return gpt2.make_trainer(settings, processes, data, model)


def seconds_per_call(call: Callable[[int], object], device: torch.device, count: int) -> float:
    """The median of `count` calls, each waited for, after three to warm up."""
    for number in range(3):
        call(number)
    gpt2.synchronise(device)
    times = []
    for number in range(count):
        started = time.perf_counter()
        call(number)
        gpt2.synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def our_step(trainer: gpt2.Trainer) -> Callable[[int], object]:
    return lambda step: gpt2.training_step(trainer, step, trainer.fetch_batch(step))


def their_model(trainer: gpt2.Trainer) -> GPT2LMHeadModel:
    sizes = {theirs: getattr(trainer.model.config, ours) for ours, theirs in gpt2.HF_NAMES.items()}
    config = GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False)
    return GPT2LMHeadModel(config).to(trainer.machine.device)


def their_step(trainer: gpt2.Trainer, is_compiled: bool) -> Callable[[int], object]:
    model = their_model(trainer).train()
    network = torch.compile(model, dynamic=False) if is_compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> None:
        tokens = trainer.fetch_batch(number)[:, :-1]
        with trainer.machine.autocast():
            loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def generations(trainer: gpt2.Trainer, rows: int, new: int) -> dict[str, Callable]:
    """Greedy continuations of `rows` equal prompts of 32 tokens by `new` tokens."""
    model, tokens = their_model(trainer).eval(), list(range(32))
    inputs = torch.tensor([tokens] * rows, device=trainer.machine.device)
    how = {"do_sample": False, "use_cache": True, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    return {
        "this script": lambda _: list(gpt2.generate(trainer.model, tokens, rows, new, end=-1, temperature=0)),
        "transformers": lambda _: model.generate(inputs, attention_mask=torch.ones_like(inputs), **how),
    }


def report(name: str, trainer: gpt2.Trainer, step: Callable, count: int) -> None:
    if trainer.machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_call(step, trainer.machine.device, count)
    values = gpt2.speed(trainer, 1, seconds)
    rate, mfu = values["tokens_per_second"], values["mfu"] or float("nan")
    memory = gpt2.peak_memory(trainer.machine.device)
    print(f"| {name:34} | {seconds * 1e3:10,.1f} | {rate:12,.0f} | {mfu:5.1%} | {memory:8.2f} |", flush=True)


def main() -> None:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=gpt2.PRESETS, default="gpt2" if is_gpu else "nano")
    parser.add_argument("--sequences", type=int, default=64 if is_gpu else 8, help="sequences per step")
    parser.add_argument("--steps", type=int, default=20)
    kinds = ["compiled", "nondeterministic", "eager", "transformers", "transformers-compiled", "generate"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    trainer = make_trainer(arguments, "--no-compile")
    config, machine = trainer.model.config, trainer.machine
    print(f"{arguments.model}: {arguments.sequences} x {config.block_size} tokens, {gpt2.device_name(machine.device)}, "
          f"{machine.dtype}, torch {torch.__version__}, matrix products {machine.matmul_rate / 1e12:.2f} TFLOP/s\n")
    print("| training                           | ms / step  | tokens/s     | MFU   | GiB      |")
    print("|------------------------------------|-----------:|-------------:|------:|---------:|")
    if "eager" in arguments.only:
        report("this script, eager", trainer, our_step(trainer), arguments.steps)
    if "transformers" in arguments.only:
        report("transformers, eager", trainer, their_step(trainer, False), arguments.steps)
    if is_gpu and "transformers-compiled" in arguments.only:
        report("transformers, compiled", trainer, their_step(trainer, True), arguments.steps)
    if is_gpu and "compiled" in arguments.only:
        compiled = make_trainer(arguments)
        report("this script, " + compiled.machine.mode, compiled, our_step(compiled), arguments.steps)
        del compiled
    if is_gpu and "nondeterministic" in arguments.only:
        torch.use_deterministic_algorithms(False)
        compiled = make_trainer(arguments, "--no-deterministic")
        report("... with --no-deterministic", compiled, our_step(compiled), arguments.steps)
        del compiled
    if "generate" in arguments.only:
        torch.use_deterministic_algorithms(False)
        rows, new = 8, min(128, config.block_size - 32)
        for name, call in generations(trainer, rows, new).items():
            seconds = seconds_per_call(call, trainer.machine.device, 3)
            print(f"generation, {name}: {rows * new / seconds:,.0f} tokens/s ({seconds / new * 1e3:.2f} ms per step)")


if __name__ == "__main__":
    main()
