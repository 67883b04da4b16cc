"""Recipes for GPT-2 124M against each other: same data, same validation text, same seconds. Not collected by pytest.

    python tests/benchmark_recipes.py                          # eight minutes on one H100
    python tests/benchmark_recipes.py --seconds 300 --only nanogpt muon --seeds 42 43 44
    python tests/benchmark_recipes.py --tiny --seconds 2       # to try the benchmark itself

Each recipe is a command line of gpt2_from_scratch.py. A few steps of it are timed first, in a run of their own that
also fills the caches; then it trains for as many steps as fill the seconds, so that its schedule ends when they do. The
data is all Python source that this Python has installed (about 100 million tokens where PyTorch is).
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "gpt2_from_scratch.py"
RECIPES = {
    "nanogpt": "--optimizer adamw --lr 6e-4 --schedule cosine",
    "adamw": "--optimizer adamw --lr 1.8e-3 --schedule linear",
    "muon": "--optimizer muon --lr 3e-3 --muon-lr 1e-2 --schedule linear",
    "muon-wsd": "--optimizer muon --lr 3e-3 --muon-lr 1e-2 --schedule wsd",
    "muon-low": "--optimizer muon --lr 3e-3 --muon-lr 5e-3 --schedule linear",
    "muon-high": "--optimizer muon --lr 3e-3 --muon-lr 2e-2 --schedule linear",
}
PROBE_STEPS = 12


def run(folder: Path, recipe: str, steps: int, seed: int, arguments: argparse.Namespace) -> dict:
    """Train; the results of its metrics.json."""
    size = ["--layers", "2", "--width", "64", "--heads", "2", "--block-size", "64"] if arguments.tiny else []
    words = ["--model", "gpt2", "--data", arguments.data, "--glob", "*.py", "--vocab-size", "8192", *size,
             "--batch-tokens", "1024" if arguments.tiny else str(2**18), "--max-steps", str(steps), "--seed", str(seed),
             "--eval-every", str(max(1, steps // 4)), "--max-new-tokens", "1", "--cache-dir", arguments.cache,
             "--output-dir", str(folder), *RECIPES[recipe].split(), *(["--limit", "200"] if arguments.tiny else [])]
    subprocess.run([sys.executable, str(SCRIPT), *words], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.json").read_text())["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seconds", type=float, default=60, help="of training steps, for each (default: 60)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--data", default=sysconfig.get_paths()["purelib"], help="default: installed packages")
    parser.add_argument("--cache", default="cache", metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("benchmark_recipes.json"))
    parser.add_argument("--tiny", action="store_true", help="a tiny geometry, to try the benchmark itself")
    arguments = parser.parse_args()
    rows = []
    for recipe in arguments.only:
        losses = []
        with tempfile.TemporaryDirectory() as folder:
            probe = run(Path(folder) / "probe", recipe, PROBE_STEPS, 0, arguments)
            # Of a run that is just beginning: compiling is not part of it, the first slow steps are.
            steps = max(8, round(arguments.seconds * PROBE_STEPS / probe["training_seconds"]))
            for seed in arguments.seeds:
                row = run(Path(folder) / str(seed), recipe, steps, seed, arguments)
                losses.append(row["validation_loss"])
                rows.append({"recipe": recipe, "flags": RECIPES[recipe], "seed": seed} | row)
                arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{recipe:10} {statistics.fmean(losses):.4f}{spread}  {steps} steps in {row['training_seconds']:.0f} s, "
              f"{row['tokens_per_second']:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
