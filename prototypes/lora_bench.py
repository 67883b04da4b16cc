"""Old against new of section 14 of flan-t5_samsum.py, in one process: LoRA's branch, attention, a whole step.

    python prototypes/lora_bench.py                        # on a GPU: XL, 64 and 8 rows
    python prototypes/lora_bench.py --only lora --rows 64  # a part
    python prototypes/lora_bench.py --only train           # rows/s of the script's own Trainer
    python prototypes/lora_bench.py --tiny                 # on a CPU, to test this file: TRITON_INTERPRET=1 for kernels

"old" is prototypes/old_flan.py, the script before; its operators have another namespace, as both are loaded. A part of
a step is compiled by torch.compile as the script does it, and timed as a CUDA graph of four calls on different inputs,
so that little is left in the cache. LoRA's branch: `linear` with 64 outputs a module, so that the frozen matrix costs
nearly nothing. Differences are of norms: bf16 has 8 bits, so that a few tenths of a percent are rounding; in a whole
step, through 48 layers, a few percent are.
"""

# ruff: noqa: B023 (each closure is used before the next turn of its loop)
import argparse
import gc
import importlib.util
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


bench = load("benchmark_flan_t5", HERE.parent / "tests" / "benchmark_flan_t5.py")
flans = {"old": load("old_flan", HERE / "old_flan.py"), "new": bench.load_script()}
new, torch = flans["new"], flans["new"].torch
device, dtype = new.get_device()
on_gpu = device.type == "cuda"


def timed(work, inputs):
    """Milliseconds of work(input), and what it returns for the first of the inputs."""
    if not on_gpu:
        start = time.perf_counter()
        result = work(inputs[0])
        return 1000 * (time.perf_counter() - start), result
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = [t.clone() for t in [work(x) for x in inputs for _ in range(2)][0]]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for x in inputs:
            work(x)
    return replayed(graph, 20) / len(inputs), result


def replayed(graph, times):
    """Milliseconds of a replay: the median of five means."""
    means = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        means.append(begin.elapsed_time(end) / times)
    return sorted(means)[2]


def difference(found, expected):
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))


def show(name, times, found, tolerance):
    error = max(difference(results, found["old"]) for key, results in found.items() if key != "old")
    words = ", ".join(f"{key} {ms:.4f}" for key, ms in times.items())
    print(f"{name}: {words} ms; differs by {error:.2%}: {'agrees' if error < tolerance else 'DIFFERS'}", flush=True)
    return times


def fresh(function):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=None) if on_gpu else function


def batch_of(rows, tiny):
    data = bench.random_rows(new, rows, 0, 4000)
    cut = 40 if tiny else 512
    lists = [[ids[:cut] for ids in data[column]] for column in ("input_ids", "labels")]
    batch = new.pack(*lists, rows, (512, 128), 0)
    return {key: tensor.to(device) for key, tensor in batch.items()}


def mask_of(flan, seed, rate=0.05):
    return flan.make_masks(*(torch.tensor(n, dtype=torch.int32, device=device)
                             for n in (seed, int((rate - 0.5) * 2**32))))


def lora(rows, tiny):
    """Of each product of a layer: forward, and forward with backward."""
    batch = batch_of(rows, tiny)
    source, target = len(batch["source"]), len(batch["target"])
    d, rank, total = (64 if tiny else 2048), 16, {}
    for name, tokens, n, calls in (("encoder q k v", source, 3, 24), ("cross k v", source, 2, 24),
                                   ("encoder o", source, 1, 24), ("decoder q k v", target, 3, 24),
                                   ("decoder q, o or cross o", target, 1, 72)):
        make = lambda *shape: torch.randn(*shape, device=device).to(dtype)
        torch.manual_seed(0)
        a, b = make(n, rank, d) * d**-0.5, make(n, 64, rank)
        matrix = torch.zeros(n * 64, d + -(-n * rank // 64) * 64, device=device, dtype=dtype)
        matrix[:, :d] = make(n * 64, d) * d**-0.5
        for i in range(n):
            matrix[i * 64 : (i + 1) * 64, d + i * rank : d + (i + 1) * rank] = b[i]
        leaves = [t.requires_grad_() for t in (a, b)]
        inputs = [make(tokens, d).requires_grad_() for _ in range(4 if on_gpu else 1)]
        dy = make(tokens, n * 64)
        times, found = {}, {}
        for key, flan in flans.items():
            run = fresh(flan.linear)
            weight, shape, mask = flan.Weight(matrix, None, None, a, b), flan.Shape(32, 1e-6, 2.0, (512, 128)), mask_of(
                flan, 5)

            def forward(x):
                return [run(x, weight, mask, shape)]

            def both(x):
                y, = forward(x)
                return [y.detach(), *torch.autograd.grad(y, [x, *leaves], dy)]

            # The gradients' values are compared, so the times of both follow one another.
            times[f"{key} forward"], _ = timed(lambda x: [forward(x)[0].detach()], inputs)
            times[f"{key} both"], found[key] = timed(both, inputs)
            for part in ("forward", "both"):
                total[f"{key} {part}"] = total.get(f"{key} {part}", 0) + calls * times[f"{key} {part}"]
        show(f"lora, {rows} rows, {name} ({tokens} tokens)", times, found, 0.02)
    print(f"lora, {rows} rows, of a step: " + ", ".join(f"{key} {ms:.2f} ms" for key, ms in total.items()), flush=True)


def attention(rows, tiny):
    """Forward, and forward with backward; also with tiles of 64 queries everywhere."""
    if new.triton is None:
        return print("attention: Triton is not installed")
    batch, (heads, width) = batch_of(rows, tiny), (2, 16) if tiny else (32, 64)
    make = lambda *shape: (torch.randn(*shape, device=device) * 0.3).to(dtype)
    for name, kind in (("encoder", 0), ("decoder", 1), ("cross", 2)):
        torch.manual_seed(0)
        q_rows, k_rows = batch["target_rows" if kind else "source_rows"], batch["source_rows"] if kind == 2 else None
        tokens = len(batch["target" if kind else "source"])
        inner, bias = heads * width, None if kind == 2 else make(heads, 257)
        count = 4 if on_gpu else 1
        inputs = [[make(tokens, inner * (1 if kind == 2 else 3)).requires_grad_(),
                   *([make(len(batch["source"]), 2 * inner).requires_grad_()] if kind == 2 else [])]
                  for _ in range(count)]
        dout, longest = make(tokens, inner), ((512, 512), (128, 128), (128, 512))[kind]
        times, found, block = {}, {}, new.query_block
        for key, flan in (*flans.items(), ("new, 64 queries", new)):
            new.query_block = (lambda longest: 64) if "64" in key else block
            mask = mask_of(flan, 5, 0.1)

            def forward(leaves):
                return [flan.Attention.apply(leaves[0], leaves[1] if kind == 2 else None, bias, mask, q_rows, k_rows,
                                             heads, *longest, kind == 1)]

            def both(leaves):
                out, = forward(leaves)
                return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

            times[f"{key} forward"], _ = timed(lambda leaves: [forward(leaves)[0].detach()], inputs)
            times[f"{key} both"], found[key] = timed(both, inputs)
        new.query_block = block
        show(f"attention, {rows} rows, {name}", times, found, 0.02)


def settings_of(flan, rows, tiny):
    return flan.parse_settings(["--fast", "--model", "xl", "--batch-size", str(rows), "--micro-batch-size", str(rows),
                                *(["--max-source-length", "64", "--max-target-length", "64"] if tiny else [])])


def step(rows, tiny):
    """Forward and backward of FastT5, the same rows, weights and masks: three batches of different sizes."""
    if new.triton is None:
        return print("step: Triton is not installed")
    times, found = {}, {}
    for key, flan in flans.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        settings = settings_of(flan, rows, tiny)
        model = bench.random_model(flan, settings, device, dtype).train()
        fast = flan.FastT5(model, settings)
        fast.key.fill_(7)
        data, results, means = bench.random_rows(new, 3 * rows, 0, 4000), [], []
        start = time.perf_counter()
        for first in range(0, 3 * rows, rows):
            part = [{name: data[i][name][: 40 if tiny else 512] for name in ("input_ids", "labels")}
                    for i in range(first, first + rows)]
            batch = {name: tensor.to(device) for name, tensor in fast.pack(part).items()}
            fast.scale.fill_(1 / int((batch["labels"] >= 0).sum()))
            for _ in range(3 if on_gpu else 1):
                fast.flat.grad.zero_()
                begin = time.perf_counter()
                loss = fast.run(batch)
                means.append(1000 * (time.perf_counter() - begin))
            results += [loss.clone().view(1), fast.flat.grad.clone()]
            if on_gpu:
                means[-3:] = [replayed(fast.graphs[tuple(map(len, batch.values()))][1], 5)]
        print(f"step, {rows} rows, {key}: built, compiled and run in {time.perf_counter() - start:.0f} s", flush=True)
        times[key], found[key] = sum(means) / len(means), results
        del model, fast, loss
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    show(f"step, {rows} rows", times, found, 0.05)
    show(f"step, {rows} rows, losses alone", times, {key: results[::2] for key, results in found.items()}, 0.002)


def train(rows, tiny):
    """The Trainer's rows/s, as in tests/benchmark_flan_t5.py."""
    if tiny:
        return print("train: not here")
    for key, flan in flans.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        settings = settings_of(flan, rows, tiny)
        model, steps = bench.random_model(flan, settings, device, dtype), 10 if rows > 8 else 30
        result = bench.our_training(flan, settings, model, bench.random_rows(flan, steps * rows, 0, 4000), dtype, steps)
        print(f"train, {rows} rows, {key}: {result['rows_per_second']:.1f} rows/s, graphs alone "
              f"{result['graphs_alone_rows_per_second']}, peak {result['peak_gib']:.1f} GiB", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def main():
    parts = {"lora": lora, "attention": attention, "step": step, "train": train}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=["lora", "attention", "step"])
    parser.add_argument("--rows", type=lambda text: list(map(int, text.split(","))), default=[64, 8])
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    new.PartialState(cpu=not on_gpu)
    if not on_gpu and new.triton is not None:  # in Triton's interpreter
        new.has_lora_kernels = lambda x, a, mask: mask is not None
    for name in flags.only:
        for rows in [3] if flags.tiny else flags.rows:
            parts[name](rows, flags.tiny)


if __name__ == "__main__":
    main()
