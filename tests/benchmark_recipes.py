"""Recipes for GPT-2 124M against each other: same data, same validation text, same seconds. Not collected by pytest.

    python tests/benchmark_recipes.py --only nanogpt adamw muon            # three minutes of training on one GPU
    python tests/benchmark_recipes.py --gpus 4 --only sweep                # rates, decay and warm-up: 60 s each
    python tests/benchmark_recipes.py --gpus 4 --only nanogpt:600 muon:300 --seeds 42 43 44     # twice as fast?
    python tests/benchmark_recipes.py --tiny --seconds 2                   # to try the benchmark itself

Each recipe is a command line of gpt2_from_scratch.py. How many steps fill its seconds is found out first, by a run of
its optimiser that is stopped after a few of them, and that also fills the caches. So its schedule ends when the
seconds do; under about 40 of them a run is not compiled, and takes longer. The data is all Python source that this
Python has installed (about 100 million tokens where PyTorch is). With --gpus each run has a GPU of its own.
"""

import argparse
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
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "gpt2_from_scratch.py"
ADAMW, MUON = "--optimizer adamw --schedule linear", "--optimizer muon --schedule linear"
RECIPES = {
    "nanogpt": "--optimizer adamw --lr 6e-4 --schedule cosine",
    "adamw": f"{ADAMW} --lr 1.8e-3",
    "muon": f"{MUON} --lr 3e-3 --muon-lr 1e-2",
    "adamw-9": f"{ADAMW} --lr 9e-4",
    "adamw-12": f"{ADAMW} --lr 1.2e-3",
    "adamw-27": f"{ADAMW} --lr 2.7e-3",
    "adamw-cosine": "--optimizer adamw --schedule cosine --lr 1.8e-3",
    "adamw-wsd": "--optimizer adamw --schedule wsd --lr 1.8e-3",
    "adamw-decay": f"{ADAMW} --lr 1.8e-3 --weight-decay 0.3",
    "adamw-warmup": f"{ADAMW} --lr 1.8e-3 --warmup-steps 60",
    "muon-5": f"{MUON} --lr 3e-3 --muon-lr 5e-3",
    "muon-20": f"{MUON} --lr 3e-3 --muon-lr 2e-2",
    "muon-rest": f"{MUON} --lr 1.5e-3 --muon-lr 1e-2",
    "muon-rest-6": f"{MUON} --lr 6e-3 --muon-lr 1e-2",
    "muon-cosine": "--optimizer muon --schedule cosine --lr 3e-3 --muon-lr 1e-2",
    "muon-wsd": "--optimizer muon --schedule wsd --lr 3e-3 --muon-lr 1e-2",
    "muon-decay": f"{MUON} --lr 3e-3 --muon-lr 1e-2 --weight-decay 0.03",
    "muon-half-batch": f"{MUON} --lr 3e-3 --muon-lr 1e-2 --batch-tokens {2**17}",
}
PROBE_STEPS = 40


def command(folder: Path, flags: str, steps: int, seed: int, arguments: argparse.Namespace) -> list[str]:
    size = ["--layers", "2", "--width", "64", "--heads", "2", "--block-size", "64"] if arguments.tiny else []
    batch = [] if "--batch-tokens" in flags else ["--batch-tokens", str(2**18)]
    words = ["--model", "gpt2", "--data", arguments.data, "--glob", "*.py", "--vocab-size", "8192", *size, *batch,
             "--max-steps", str(steps), "--seed", str(seed), "--eval-every", str(max(1, steps // 4)),
             "--max-new-tokens", "1", "--cache-dir", arguments.cache, "--output-dir", str(folder), *flags.split(),
             *(["--limit", "200", "--batch-tokens", "1024"] if arguments.tiny else [])]
    return [sys.executable, str(SCRIPT), *words]


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
    shutil.rmtree(folder)  # its checkpoints
    return results


def wanted(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """[(recipe, seconds)]"""
    chosen = []
    for word in arguments.only:
        name, _, seconds = word.partition(":")
        names = [n for n in RECIPES if n != "nanogpt"] if name == "sweep" else [name]
        chosen += [(name, float(seconds or arguments.seconds)) for name in names]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["nanogpt", "adamw", "muon"], metavar="RECIPE[:SECONDS]",
                        help=f"sweep (all but nanogpt), or {', '.join(RECIPES)}")
    parser.add_argument("--seconds", type=float, default=60, help="of training steps, for each (default: 60)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--gpus", type=int, default=1, help="runs at once, each on a GPU of its own (default: 1)")
    parser.add_argument("--data", default=sysconfig.get_paths()["purelib"], help="default: installed packages")
    parser.add_argument("--cache", default="cache", metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("benchmark_recipes.json"))
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
    for name, seconds in sorted(set(chosen)):
        losses = [row["validation_loss"] for row in rows if (row["recipe"], row["seconds"]) == (name, seconds)]
        if losses:
            spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            print(f"{name:16} {seconds:4.0f} s  {statistics.fmean(losses):.4f}{spread}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
