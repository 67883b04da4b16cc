"""Recipes for GPT-2 124M against each other: same data, same validation text, same seconds. Not collected by pytest.

    python tests/benchmark_recipes.py --only nanogpt adamw muon            # three minutes of training on one GPU
    python tests/benchmark_recipes.py --gpus 4 --only sweep --small        # everything there is, on a smaller model
    python tests/benchmark_recipes.py --gpus 4 --only nanogpt:600 muon:300 --seeds 42 43 44     # twice as fast?
    python tests/benchmark_recipes.py --nano --only usual:240 default:120 --plot curves.png      # on a CPU
    python tests/benchmark_recipes.py --tiny --seconds 2                   # to try the benchmark itself

Each recipe is a command line of gpt2_from_scratch.py. How many steps fill its seconds is found out first, by a run of
its optimiser that is stopped after a few of them, and that also fills the caches. So its schedule ends when the
seconds do. The data is all Python source that this Python has installed (about 100 million tokens where PyTorch is).
With --gpus each run has a GPU of its own.

Some recipes are no flags of the script, as none of them has paid: VARIANTS change it in the process that runs it.
"""

import argparse
import importlib.util
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

SCRIPT = Path(__file__).resolve().parents[1] / "gpt2_from_scratch.py"
ADAMW, MUON = "--optimizer adamw --schedule linear", "--optimizer muon --schedule linear"
RECIPES = {
    "nanogpt": "--optimizer adamw --lr 6e-4 --schedule cosine",
    "usual": "--optimizer adamw",  # of the script as it is; so is the next
    "default": "--optimizer muon",
    "adamw": f"{ADAMW} --lr 1.8e-3",
    "muon": f"{MUON} --lr 3e-3 --muon-lr 1e-2",
    "adamw-9": f"{ADAMW} --lr 9e-4",
    "adamw-12": f"{ADAMW} --lr 1.2e-3",
    "adamw-27": f"{ADAMW} --lr 2.7e-3",
    "adamw-40": f"{ADAMW} --lr 4e-3",
    "adamw-cosine": "--optimizer adamw --schedule cosine --lr 1.8e-3",
    "adamw-wsd": "--optimizer adamw --schedule wsd --lr 1.8e-3",
    "adamw-decay": f"{ADAMW} --lr 1.8e-3 --weight-decay 0.3",
    "adamw-warmup": f"{ADAMW} --lr 1.8e-3 --warmup-steps 100",
    "adamw-betas": f"{ADAMW} --lr 1.8e-3 --variant long-memory",
    "adamw-tuned": "--optimizer adamw --schedule wsd --lr 1.8e-3 --warmup-steps 100 --variant long-memory",
    "muon-5": f"{MUON} --lr 3e-3 --muon-lr 5e-3",
    "muon-20": f"{MUON} --lr 3e-3 --muon-lr 2e-2",
    "muon-rest": f"{MUON} --lr 1.5e-3 --muon-lr 1e-2",
    "muon-rest-6": f"{MUON} --lr 6e-3 --muon-lr 1e-2",
    "muon-cosine": "--optimizer muon --schedule cosine --lr 3e-3 --muon-lr 1e-2",
    "muon-wsd": "--optimizer muon --schedule wsd --lr 3e-3 --muon-lr 1e-2",
    "muon-decay": f"{MUON} --lr 3e-3 --muon-lr 1e-2 --weight-decay 0.03",
    "muon-half-batch": f"{MUON} --lr 3e-3 --muon-lr 1e-2 --batch-tokens HALF",
    "muon-ramp": f"{MUON} --lr 3e-3 --muon-lr 1e-2 --variant ramp",
    "muon-zero": f"{MUON} --lr 3e-3 --muon-lr 1e-2 --variant zero-projections",
    "muon-cautious": f"{MUON} --lr 3e-3 --muon-lr 1e-2 --variant cautious-decay",
}
PROBE_STEPS = 40
RAMP = 1 / 3  # of a ramp's steps have half the batch: so many more steps make up for it
SMALL = "--layers 6 --width 512 --heads 8 --block-size 512"


def long_memory(script: ModuleType) -> None:
    """AdamW's second moment over 100 steps in place of 20."""
    script.BETAS = (0.9, 0.99)


def zero_projections(script: ModuleType) -> None:
    """What a block adds to the residual stream is nothing at the start (Goyal et al. 2017, section 5.1, for norms)."""
    usual = script.GPT.initialise

    def initialise(model: torch.nn.Module, seed: int) -> None:
        usual(model, seed)
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.data.zero_()

    script.GPT.initialise = initialise


def cautious_decay(script: ModuleType) -> None:
    """Weights decay only where the step makes them smaller anyway (Chen et al. 2025, cautious weight decay)."""
    usual = script.make_optimisers

    def step_with(optimiser: torch.optim.Optimizer) -> None:
        step, decays = optimiser.step, [group["weight_decay"] for group in optimiser.param_groups]
        for group in optimiser.param_groups:
            group["weight_decay"] = 0.0

        @torch.no_grad()
        def cautious() -> None:
            pairs = [(p, p.clone(), decay * group["lr"]) for group, decay in zip(optimiser.param_groups, decays,
                     strict=True) if decay for p in group["params"]]  # fmt: skip
            step()
            for parameter, before, decay in pairs:
                parameter.sub_(decay * before * ((before - parameter) * before > 0))

        optimiser.step = cautious

    def make_optimisers(*arguments: object) -> list[torch.optim.Optimizer]:
        optimisers = usual(*arguments)
        for optimiser in optimisers:
            step_with(optimiser)
        return optimisers

    script.make_optimisers = make_optimisers


def ramp(script: ModuleType) -> None:
    """Half the batch in the first third of the steps (Brown et al. 2020, section 2.3, ramp it from 32k tokens)."""
    make, step = script.make_trainer, script.training_step

    def first_steps(settings: object) -> int:
        return round(RAMP * settings.max_steps)

    def fetch_batch(trainer: object, number: int) -> torch.Tensor:
        few = first_steps(trainer.settings)
        half = trainer.sequences_per_step // 2
        first = min(number, few) * half + max(0, number - few) * 2 * half
        batch = torch.from_numpy(trainer.order.sequences(first, half if number < few else 2 * half))
        return batch.to(trainer.machine.device)

    def make_trainer(*arguments: object) -> object:
        trainer = make(*arguments)
        if trainer.step_graph:
            trainer.graphs = trainer.step_graph, script.StepGraph(trainer)
        return trainer

    def training_step(trainer: object, number: int, batch: torch.Tensor, stop: bool = False) -> torch.Tensor:
        is_first, settings = number < first_steps(trainer.settings), trainer.settings
        if trainer.step_graph:
            trainer.step_graph = trainer.graphs[is_first]
        if is_first:
            trainer.settings = replace(settings, batch_tokens=settings.batch_tokens // 2)
        values = step(trainer, number, batch, stop)
        trainer.settings = settings
        return values

    script.Trainer.fetch_batch, script.make_trainer, script.training_step = fetch_batch, make_trainer, training_step


VARIANTS = {"none": lambda script: None, "long-memory": long_memory, "zero-projections": zero_projections,
            "cautious-decay": cautious_decay, "ramp": ramp}  # fmt: skip


def run_variant(name: str, words: list[str]) -> int:
    """The script, changed, in this process."""
    spec = importlib.util.spec_from_file_location("gpt2_from_scratch", SCRIPT)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.COMPILE_SECONDS = 0  # a short run stands for a long one
    VARIANTS[name](script)
    return script.main(script.parse_arguments(words))


def command(folder: Path, flags: str, steps: int, seed: int, arguments: argparse.Namespace) -> list[str]:
    size = ["--layers", "2", "--width", "64", "--heads", "2", "--block-size", "64"] if arguments.tiny else []
    size = SMALL.split() if arguments.small else size
    flags, _, variant = flags.partition(" --variant ")
    tokens = 1024 if arguments.tiny or arguments.nano else 2**17 if arguments.small else 2**18
    flags = flags.replace("HALF", str(tokens // 2))
    batch = [] if "--batch-tokens" in flags else ["--batch-tokens", str(tokens)]
    model = ["--model", "gpt2", "--data", arguments.data, "--glob", "*.py", "--vocab-size", "8192", *size, *batch]
    words = [*([] if arguments.nano else model), "--max-steps", str(steps), "--seed", str(seed), "--eval-every",
             str(max(1, steps // arguments.evaluations)),
             "--max-new-tokens", "1", "--cache-dir", arguments.cache, "--output-dir", str(folder), *flags.split(),
             *(["--limit", "200"] if arguments.tiny else [])]
    return [sys.executable, __file__, "--variant", variant or "none", *words]


def seconds_of_a_step(folder: Path, flags: str, arguments: argparse.Namespace) -> float:
    """Of a long run, which is compiled where a GPU compiles, and stopped after a few steps."""
    words = [*command(folder, flags, 10**5, 0, arguments), "--eval-every", str(10**5)]
    log = folder / "metrics.jsonl"
    with open(folder.with_suffix(".txt"), "w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        while not log.exists() or log.read_text().count("\n") < PROBE_STEPS:
            if process.poll() is not None:
                output.seek(0)
                raise RuntimeError(f"{' '.join(words)}:\n{output.read()[-3000:]}")
            time.sleep(0.2)
        process.terminate()  # it finishes its step, and saves
        process.wait()
    results = json.loads((folder / "metrics.json").read_text())["results"]
    shutil.rmtree(folder)
    return results["training_seconds"] / results["steps"]


def run(folder: Path, flags: str, steps: int, seed: int, gpu: int, arguments: argparse.Namespace) -> dict:
    """Train; the results of its metrics.json."""
    words = command(folder, flags, steps, seed, arguments)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(gpu)} if arguments.gpus > 1 else {})
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    results = json.loads((folder / "metrics.json").read_text())["results"]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)  # its checkpoints
    seconds_per_step = results["training_seconds"] / results["steps"]  # evaluations left out
    curve = [(line["step"] * seconds_per_step, line["validation_loss"]) for line in log if "validation_loss" in line]
    return results | {"curve": curve}


def plot(file: Path, rows: list[dict]) -> None:
    """Validation loss by seconds of training: of every recipe the mean over its seeds, and from least to most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, flags) in enumerate(sorted({(row["recipe"], row["flags"]) for row in rows})):
        curves = [row["curve"][1:] for row in rows if row["recipe"] == name]  # not the loss before training
        points = list(zip(*curves, strict=True))  # of one length: a recipe's runs are evaluated alike
        seconds = [statistics.fmean(point[0] for point in at) for at in points]
        losses = [[point[1] for point in at] for at in points]
        axes.plot(seconds, list(map(statistics.fmean, losses)), "o-", color=f"C{number}", label=f"{name}: {flags}")
        axes.fill_between(seconds, list(map(min, losses)), list(map(max, losses)), color=f"C{number}", alpha=0.25)
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    figure.savefig(file, dpi=120)


def wanted(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """[(recipe, seconds)]"""
    chosen = []
    for word in arguments.only:
        name, _, seconds = word.partition(":")
        names = [n for n in RECIPES if n not in ("nanogpt", "usual", "default")] if name == "sweep" else [name]
        chosen += [(name, float(seconds or arguments.seconds)) for name in names]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["nanogpt", "adamw", "muon"], metavar="RECIPE[:SECONDS]",
                        help=f"sweep (all that have rates of their own), or {', '.join(RECIPES)}")
    parser.add_argument("--seconds", type=float, default=60, help="of training steps, for each (default: 60)")
    parser.add_argument("--evaluations", type=int, default=4, help="in each run (default: 4)")
    parser.add_argument("--small", action="store_true", help=f"a smaller model: {SMALL}, and half the batch")
    parser.add_argument("--nano", action="store_true", help="the script's own default model, data and batch: for a CPU")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--gpus", type=int, default=1, help="runs at once, each on a GPU of its own (default: 1)")
    parser.add_argument("--data", default=sysconfig.get_paths()["purelib"], help="default: installed packages")
    parser.add_argument("--cache", default="cache", metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("benchmark_recipes.json"))
    parser.add_argument("--plot", type=Path, help="draw the curves there", metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="a tiny geometry, to try the benchmark itself")
    arguments = parser.parse_args()
    chosen = wanted(arguments)
    if unknown := {name for name, _ in chosen} - set(RECIPES):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are: sweep, {', '.join(RECIPES)}")
    kind = lambda name: (RECIPES[name].split()[1], "--batch-tokens" in RECIPES[name])  # of one speed
    jobs, rows, failed, started = queue.Queue(), [], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seconds_per_step = {}
        for name, _ in chosen:
            if kind(name) not in seconds_per_step:
                probe = Path(folder) / f"probe-{name}"
                seconds_per_step[kind(name)] = seconds_of_a_step(probe, RECIPES[name], arguments)
        for name, seconds in sorted(chosen, key=lambda job: -job[1]):  # the longest first
            for seed in arguments.seeds:
                jobs.put((name, seconds, seed))

        def work(gpu: int) -> None:
            while True:
                try:
                    name, seconds, seed = jobs.get_nowait()
                except queue.Empty:
                    return
                steps = max(8, round(seconds / seconds_per_step[kind(name)]))
                if "--variant ramp" in RECIPES[name]:  # in the same time
                    steps = round(steps / (1 - RAMP / 2))
                try:
                    row = run(Path(folder) / f"{name}-{seconds}-{seed}", RECIPES[name], steps, seed, gpu, arguments)
                except RuntimeError as error:  # the others go on
                    print(error, flush=True)
                    failed.append(name)
                    continue
                rows.append({"recipe": name, "flags": RECIPES[name], "seed": seed, "seconds": seconds} | row)
                arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
                print(f"{time.perf_counter() - started:5.0f} s  {name:16} seed {seed}: "
                      f"{row['validation_loss']:.4f} after {steps} steps in {row['training_seconds']:.0f} s, "
                      f"{row['tokens_per_second']:,.0f} tokens/s", flush=True)

        threads = [threading.Thread(target=work, args=(gpu,)) for gpu in range(arguments.gpus)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if arguments.plot and rows:
        plot(arguments.plot, rows)
    for name, seconds in sorted(set(chosen)):
        losses = [row["validation_loss"] for row in rows if (row["recipe"], row["seconds"]) == (name, seconds)]
        if losses:
            spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            print(f"{name:16} {seconds:4.0f} s  {statistics.fmean(losses):.4f}{spread}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--variant"]:
        sys.exit(run_variant(sys.argv[2], sys.argv[3:]))
    main()
