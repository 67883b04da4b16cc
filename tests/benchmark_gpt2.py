"""Speed of gpt2_from_scratch.py beside nanoGPT and transformers, on this machine. Not collected by pytest.

    python tests/benchmark_gpt2.py --nanogpt ../nanoGPT          # everything: about 15 minutes on an H100
    python tests/benchmark_gpt2.py --only gpt2 cold shakespeare --output a.json     # some parts; see --help
    python tests/benchmark_gpt2.py --tiny                        # the same on a tiny geometry, to try the benchmark

Every part runs in a process of its own and ends after its time-out, so that one that fails costs no other. Training:
whole steps on random tokens, the best of three rounds after warming up. nanoGPT (a checkout, for its model.py) runs as
its train.py does: autocast, compiled as a whole, its own AdamW, clipping. Generation: greedy or of the top 50, prompts
of 32 tokens. Shares are of what a large matrix product reaches here ("measured") and of the card's data sheet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_from_scratch as gpt2

VOCABULARY = 50257
SEQUENCES = {"gpt2": 64, "gpt2-medium": 32, "gpt2-large": 32}
TIMEOUTS = {"gpt2": 240, "gpt2-medium": 150, "gpt2-large": 180, "cold": 150, "decode": 180, "shakespeare": 100,
            "cpu": 240, "small-card": 150, "two-gpus": 200}  # seconds
TINY = {"layers": 2, "heads": 2, "width": 64, "block_size": 64}


def make_trainer(arguments: argparse.Namespace, model: str, sequences: int, *flags: str, vocabulary: int = VOCABULARY,
                 **sizes: int | str) -> gpt2.Trainer:
    """The script's own trainer on random tokens, with `flags` of its command line."""
    torch.use_deterministic_algorithms(False)
    words = ["--model", model, "--tokenizer", "gpt2", "--optimizer", "adamw", "--max-steps", "1000000000", *flags]
    settings = gpt2.resolve_settings(gpt2.parse_arguments(words))
    settings = replace(settings, **({"micro_batch_size": sequences} | sizes | (TINY if arguments.tiny else {})))
    batch = int(os.environ.get("WORLD_SIZE", 1)) * sequences * settings.block_size
    settings = replace(settings, batch_tokens=batch, warmup_steps=100, eval_every=1000)
    tokens = np.random.default_rng(0).integers(0, vocabulary, 10**6).astype(np.uint16)
    names = ("block_size", "layers", "heads", "width")
    network = gpt2.GPT(gpt2.GPTConfig(vocabulary, **{name: getattr(settings, name) for name in names}))
    network.initialise(0)
    return gpt2.make_trainer(settings, gpt2.join_processes(), gpt2.TokenData(None, {}, tokens, tokens), network)


def seconds_per_step(step: Callable[[int], object], device: torch.device, count: int) -> float:
    """The best of three rounds of `count` steps, after five to warm up."""
    for number in range(5):
        step(number)
    times = []
    for _ in range(3):
        gpt2.synchronise(device)
        started = time.perf_counter()
        for number in range(5, 5 + count):
            step(number)
        gpt2.synchronise(device)
        times.append((time.perf_counter() - started) / count)
    return min(times)


def measure(name: str, trainer: gpt2.Trainer, step: Callable[[int], object], arguments: argparse.Namespace) -> dict:
    device = trainer.machine.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    values = gpt2.speed(trainer, 1, seconds := seconds_per_step(step, device, 2 if arguments.tiny else 10))
    return report(name, milliseconds=seconds * 1e3, tokens_per_second=values["tokens_per_second"],
                  share_of_measured=values["mfu"], share_of_data_sheet=values["mfu_of_data_sheet"],
                  peak_gib=gpt2.peak_memory(device), mode=trainer.machine.mode)  # fmt: skip


def report(name: str, **values: object) -> dict:
    if gpt2.is_main_process():
        print(json.dumps({"name": name, **values}), flush=True)
    return values


def our_step(trainer: gpt2.Trainer) -> Callable[[int], object]:
    return lambda step: gpt2.training_step(trainer, step, trainer.fetch_batch(step))


def nanogpt_step(folder: str, trainer: gpt2.Trainer) -> Callable[[int], object]:
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    config, machine = trainer.model.config, trainer.machine
    model = GPT(GPTConfig(block_size=config.block_size, vocab_size=config.padded_vocab_size, n_layer=config.layers,
                          n_head=config.heads, n_embd=config.width, dropout=0.0, bias=True)).to(machine.device)
    optimiser = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), machine.device.type)
    network = torch.compile(model) if machine.device.type == "cuda" else model

    def step(number: int) -> None:
        batch = trainer.fetch_batch(number)
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.device.type == "cuda"):
            _, loss = network(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def forget(trainer: gpt2.Trainer) -> None:
    """Free a trainer's memory for what is measured next. The hooks of its compute copy would keep it for ever, and the
    graph for a while."""
    trainer.compute_copy, trainer.step_graph, trainer.optimisers = None, None, []
    trainer.model.to("meta")


def throughput(arguments: argparse.Namespace, model: str) -> None:
    """Training: as it comes, without determinism, and nanoGPT."""
    sequences = 2 if arguments.tiny else SEQUENCES[model]
    trainer = make_trainer(arguments, model, sequences)
    report(f"{model}, ceiling", flops_per_second=trainer.machine.matmul_rate,
           data_sheet=gpt2.data_sheet_rate(gpt2.device_name(trainer.machine.device)))  # fmt: skip
    default = measure(f"{model}, default", trainer, our_step(trainer), arguments)
    forget(trainer)
    del trainer
    trainer = make_trainer(arguments, model, sequences, "--no-deterministic")
    fast = measure(f"{model}, --no-deterministic", trainer, our_step(trainer), arguments)
    report(f"{model}, cost of determinism", ratio=default["milliseconds"] / fast["milliseconds"])
    if arguments.nanogpt:
        forget(trainer)
        torch.compiler.reset()
        theirs = measure(f"{model}, nanoGPT", trainer, nanogpt_step(arguments.nanogpt, trainer), arguments)
        for name, ours in (("default", default), ("--no-deterministic", fast)):
            report(f"{model}, {name} / nanoGPT", ratio=ours["tokens_per_second"] / theirs["tokens_per_second"])


def two_gpus(arguments: argparse.Namespace) -> None:
    """124M on one GPU, and on two with twice the batch."""
    if torch.cuda.device_count() < 2 and not arguments.tiny:
        report("two-gpus", needs="two GPUs")
        return
    if "WORLD_SIZE" in os.environ:  # one of the processes that the lines below start
        trainer = make_trainer(arguments, "gpt2", 2 if arguments.tiny else 64)
        measure(f"gpt2, GPUs: {trainer.machine.world}", trainer, our_step(trainer), arguments)
        if trainer.machine.world > 1:
            gpt2.dist.destroy_process_group()
        return
    rates = []
    for count in (1, 2):
        words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", __file__, "--part",
                 "two-gpus", *(["--tiny"] if arguments.tiny else [])]  # fmt: skip
        output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(output, end="", flush=True)
        rates.append(json.loads(output)["tokens_per_second"])
    report("gpt2, two GPUs / one", ratio=rates[1] / rates[0])


def cold_start(arguments: argparse.Namespace) -> None:
    """From the start of the process to the end of the first step of 124M: without any cache, and once more."""
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in ("cold", "warm"):
            started = time.perf_counter()
            words = [sys.executable, __file__, "--part", "first-step", *(["--tiny"] if arguments.tiny else [])]
            subprocess.run(words, env=dict(os.environ) | caches, check=True, stdout=subprocess.DEVNULL)
            report(f"first step, {name}", seconds=time.perf_counter() - started)


def first_step(arguments: argparse.Namespace) -> None:
    trainer = make_trainer(arguments, "gpt2", 2 if arguments.tiny else 64)
    our_step(trainer)(0).tolist()


def small_card(arguments: argparse.Namespace) -> None:
    """124M with the micro-batch that `auto` finds, on a GPU of 8 and of 12 GiB: this one, with its memory limited."""
    if not torch.cuda.is_available():
        report("small-card", needs="a GPU")
        return
    real, total = torch.cuda.get_device_properties(0), torch.cuda.get_device_properties(0).total_memory
    properties = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    for gib, optimizer in ((8, "adamw"), (8, "muon"), (12, "adamw")):
        limited = argparse.Namespace(**properties | {"total_memory": gib * 2**30})
        torch.cuda.get_device_properties = lambda *_, limited=limited: limited
        torch.cuda.set_per_process_memory_fraction((gib - 0.6) * 2**30 / total)  # CUDA itself takes the rest
        trainer = make_trainer(arguments, "gpt2", 64, "--optimizer", optimizer, micro_batch_size="auto")
        name = f"gpt2 in {gib} GiB, {optimizer}, micro-batch {trainer.machine.micro_batch_size}"
        measure(name, trainer, our_step(trainer), arguments)
        forget(trainer)


def shakespeare(arguments: argparse.Namespace) -> None:
    """nanoGPT's character model, 64 x 256 tokens: Python launches slower than the GPU computes."""
    sizes = {"layers": 6, "heads": 6, "width": 384, "block_size": 256}
    for name, flags in (("default", []), ("eager", ["--no-compile"])):
        trainer = make_trainer(arguments, "nano", 64, *flags, vocabulary=257, **sizes)
        measure(f"shakespeare, {name}", trainer, our_step(trainer), arguments)
        forget(trainer)
        if trainer.step_graph:
            trainer.step_graph.before = 10**9
            trainer.step_graph.graph = None
            measure("shakespeare, without a graph", trainer, our_step(trainer), arguments)


def make_model(arguments: argparse.Namespace, is_nano: bool = False) -> gpt2.GPT:
    """Random weights whose greedy text does not repeat itself."""
    config = gpt2.GPTConfig(1024, 64, 4, 4, 128) if is_nano else gpt2.GPTConfig(VOCABULARY)
    model = gpt2.GPT(replace(config, **TINY | {"block_size": 160}) if arguments.tiny and not is_nano else config)
    model.initialise(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 8 if name == "wpe.weight" else 2 if parameter.dim() == 2 else 1
    return model.requires_grad_(False).eval()


def transformers_model(model: gpt2.GPT) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(**{name: getattr(model.config, ours) for ours, name in gpt2.HF_NAMES.items()},
                                        bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()  # fmt: skip
    weights = {f"transformer.{name}": tensor.t() if name.endswith(gpt2.TRANSPOSED) else tensor
               for name, tensor in model.state_dict().items()}  # fmt: skip
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: model.config.vocab_size]
    theirs.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    return theirs.to(model.wte.weight.device, model.wte.weight.dtype)


def best_of(call: Callable[[], object], rounds: int) -> tuple[float, object]:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - started)
    return min(times), result


def decode(arguments: argparse.Namespace) -> None:
    """Greedy in bf16 on the GPU, batch 1 and 64, and drawn; the first token; transformers beside."""
    device = gpt2.join_processes()[2]
    model = make_model(arguments).to(device, torch.bfloat16)
    new, prompt, theirs = 16 if arguments.tiny else 300, list(range(100, 132)), transformers_model(model)
    for count in (1, 64):
        call = lambda count=count, **how: list(gpt2.generate(model, prompt, count, new, -1, **how))
        cold, _ = best_of(lambda call=call: call(temperature=0), 1)  # compiles, if the kernels are not in the cache
        first, _ = best_of(lambda count=count: next(gpt2.generate(model, prompt, count, new, -1, temperature=0)), 3)
        seconds, _ = best_of(lambda call=call: call(temperature=0), 3)
        tokens = torch.tensor([prompt] * count, device=device)
        how = {"do_sample": False, "max_new_tokens": min(new, 64), "attention_mask": torch.ones_like(tokens)}
        other, _ = best_of(lambda tokens=tokens, how=how: theirs.generate(tokens, **how).tolist(), 2)
        ours, other = count * new / seconds, count * min(new, 64) / other
        report(f"decode, {count}", tokens_per_second=ours, transformers=other, ratio=ours / other,
               first_token_milliseconds=first * 1e3, first_call_seconds=cold)
        seconds, _ = best_of(lambda call=call: call(temperature=0.8, top_k=50), 3)
        report(f"decode, {count}, top-k 50", tokens_per_second=count * new / seconds)


def on_cpu(arguments: argparse.Namespace) -> None:
    """Greedy in float32 on the CPU: nano and 124M."""
    compare_on_cpu("nano", make_model(arguments, is_nano=True), list(range(5, 13)), 40, arguments)
    compare_on_cpu("124M", make_model(arguments), list(range(5, 37)), 24, arguments)


def tokens_per_second_of_memory(model: gpt2.GPT) -> float:
    """How often all weights could be read in a second, which every token needs: by the sum of a tensor that is too
    large for caches."""
    numbers = torch.ones(2**27)  # 512 MiB
    seconds, _ = best_of(numbers.sum, 5)
    return numbers.nbytes / seconds / sum(parameter.nbytes for parameter in model.parameters())


def compare_on_cpu(name: str, model: gpt2.GPT, prompt: list[int], new: int, arguments: argparse.Namespace) -> None:
    """This script and transformers in turns, and whether their tokens are the same."""
    theirs, tokens, cores = transformers_model(model), torch.tensor([prompt]), torch.get_num_threads()
    how = {"do_sample": False, "max_new_tokens": new, "attention_mask": torch.ones_like(tokens)}
    ceiling = tokens_per_second_of_memory(model)
    gpt2.speed_up_products(model)  # as --sample does
    calls = [(torch.get_num_threads(), lambda: [
                  step[0] for step in gpt2.generate(model, prompt, 1, new, -1, temperature=0)]),
             (cores, lambda: theirs.generate(tokens, **how)[0, len(prompt) :].tolist())]  # fmt: skip
    rounds = []
    for _ in range(2 if arguments.tiny else 6):
        rounds.append([])
        for threads, call in calls:
            torch.set_num_threads(threads)
            rounds[-1].append(best_of(call, 1))
    (ours, a), (other, b) = (min(results) for results in zip(*rounds, strict=True))
    report(f"cpu, {name}", tokens_per_second=new / ours, transformers=new / other, ratio=other / ours, same=a == b,
           ceiling_of_memory=ceiling)  # fmt: skip


PARTS = {name: lambda arguments, name=name: throughput(arguments, name) for name in SEQUENCES} | {
    "cold": cold_start, "decode": decode, "shakespeare": shakespeare, "cpu": on_cpu, "small-card": small_card,
    "two-gpus": two_gpus, "first-step": first_step}  # fmt: skip


def run_part(part: str, arguments: argparse.Namespace) -> list[dict]:
    """A part in a process of its own. What it reported before it ended, and why it failed if it did."""
    words = [sys.executable, __file__, "--part", part, *(["--tiny"] if arguments.tiny else []),
             *(["--nanogpt", arguments.nanogpt] if arguments.nanogpt else [])]  # fmt: skip
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if part == "cpu" else {}
    process = subprocess.Popen(words, env=dict(os.environ) | hidden, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=arguments.timeout or TIMEOUTS[part])
        error = f"exit code {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        process.kill()
        output, error = process.communicate()[0], "timed out"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    rows += [{"name": part, "error": error}] if error else []
    for row in rows:
        values = {name: f"{value:,.3g}" if isinstance(value, float) and abs(value) < 100 else
                  f"{value:,.0f}" if isinstance(value, float) else value for name, value in row.items()}  # fmt: skip
        print(f"{values.pop('name'):36} " + "  ".join(f"{key} {value}" for key, value in values.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TIMEOUTS, default=list(TIMEOUTS))
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--output", type=Path, default=Path("benchmark_gpt2.json"))
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of each part (default: 100 to 240)")
    parser.add_argument("--tiny", action="store_true", help="a tiny geometry, to try the benchmark itself")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part](arguments)
        return
    device = gpt2.device_name(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    results = {"device": device, "torch": torch.__version__, "rows": []}
    print(f"{device}, torch {torch.__version__}")
    for part in arguments.only:
        results["rows"] += run_part(part, arguments)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
