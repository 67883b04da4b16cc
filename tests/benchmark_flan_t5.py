"""Speed of flan-t5_samsum.py beside the usual recipe, on this machine, in one run. Not collected by pytest.

    python tests/benchmark_flan_t5.py                          # the tiny model on a CPU, XL's geometry on a GPU
    python tests/benchmark_flan_t5.py --model xxl --int8       # another size, INT8 weights
    python tests/benchmark_flan_t5.py --only generate

Weights are random, as speed does not depend on their values, and so are the tokens; lengths are spread as those of
messenger dialogues are. The usual recipe: the same base and adapter in a plain loop, shuffled batches padded to their
longest row, the model's own loss, fused AdamW; for summaries `generate` with the adapter beside the base (not merged),
8 rows at a time in the order of the file. Every figure is printed with the ratio of the two.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "flan-t5_samsum.py"
spec = importlib.util.spec_from_file_location("flan_t5_samsum", SCRIPT)
flan = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = flan
spec.loader.exec_module(flan)
np, torch = flan.np, flan.torch


def random_rows(tokenizer, count, seed):
    """A tokenised split: sources of about 150 tokens, targets of about 28, as in SAMSum, at most 512 and 128."""
    rng = np.random.default_rng(seed)
    draw = lambda length: [*rng.integers(300, len(tokenizer), length - 1).tolist(), tokenizer.eos_token_id]
    lengths = [np.clip(rng.lognormal(np.log(middle), 0.6, count), 8, most).astype(int)
               for middle, most in ((125, 512), (24, 128))]
    return flan.datasets.Dataset.from_dict({
        "id": list(map(str, range(count))), "input_ids": [draw(n) for n in lengths[0]],
        "labels": [draw(n) for n in lengths[1]], "truncated": [False] * count,
    })  # fmt: skip


def random_model(args, folder, device, dtype):
    """The script's own load_base and add_lora on a folder of random weights with the geometry of --model."""
    config = flan.geometry(args)
    with torch.device(device):
        model = flan.transformers.T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * config.d_model**-0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    base = flan.load_base(folder, device, dtype, args.quantization)
    return flan.add_lora(base, args)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock(flan.TrainerCallback):
    """Waits for the device and looks at the clock after `warm_up` steps and at the end."""

    def __init__(self, warm_up):
        self.warm_up, self.marks = warm_up, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warm_up, state.max_steps):
            synchronise(args.device)
            self.marks.append(time.perf_counter())


def our_training(args, model, tokenizer, rows, precision, steps, warm_up):
    """Rows per second of the script's Trainer, everything included but evaluations and checkpoints."""
    clock = Clock(warm_up)
    data = {"train": rows, "validation": rows, "test": rows}
    with tempfile.TemporaryDirectory() as folder:
        run = flan.Run(args, Path(folder), {})
        trainer = flan.SummarizationTrainer(run, model, tokenizer, data, steps, model.device, precision,
                                            eval_strategy="no", eval_on_start=False)  # fmt: skip
        trainer.add_callback(clock)
        trainer.train()
    return args.batch_size * (steps - warm_up) / (clock.marks[1] - clock.marks[0])


def usual_training(args, model, tokenizer, rows, precision, steps, warm_up):
    """Rows per second of the plain loop."""
    device = model.device
    order = np.random.default_rng(1).permutation(len(rows))
    collate = flan.DataCollatorForSeq2Seq(tokenizer, model=model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    model.train()
    for step in range(steps):
        if step == warm_up:
            synchronise(device)
            start = time.perf_counter()
        chosen = order[np.arange(step * args.batch_size, (step + 1) * args.batch_size) % len(order)]
        batch = collate([{key: rows[int(i)][key] for key in ("input_ids", "labels")} for i in chosen]).to(device)
        with torch.autocast(device.type, precision, enabled=precision == torch.bfloat16):
            model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronise(device)
    return args.batch_size * (steps - warm_up) / (time.perf_counter() - start)


def our_summaries(args, model, tokenizer, rows, precision):
    with flan.merged_adapter(model.eval()):
        flan.Summarizer(model, tokenizer, args, model.device, precision)(rows["input_ids"])


@torch.inference_mode()
def usual_summaries(args, model, tokenizer, rows, precision):
    model.eval()
    for start in range(0, len(rows), 8):
        batch = tokenizer.pad({"input_ids": rows["input_ids"][start : start + 8]}, return_tensors="pt").to(model.device)
        with torch.autocast(model.device.type, precision, enabled=precision == torch.bfloat16):
            output = model.generate(**batch, max_new_tokens=args.max_new_tokens, num_beams=1, do_sample=False)
        tokenizer.batch_decode(output, skip_special_tokens=True)


def rows_per_second(work, args, model, tokenizer, rows, precision):
    work(args, model, tokenizer, rows.select(range(8)), precision)  # warms up
    synchronise(model.device)
    start = time.perf_counter()
    work(args, model, tokenizer, rows, precision)
    synchronise(model.device)
    return len(rows) / (time.perf_counter() - start)


def main():
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="xl" if has_gpu else "tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--int4", action="store_true")
    parser.add_argument("--steps", type=int, default=60 if has_gpu else 20)
    parser.add_argument("--rows", type=int, default=800 if has_gpu else 200, help="summaries to generate")
    parser.add_argument("--new-tokens", type=int, default=60 if has_gpu else 20, help="per summary")
    parser.add_argument("--tokenizer", default=flan.MODELS["tiny"], help="folder")
    parser.add_argument("--only", choices=["train", "generate"])
    flags = parser.parse_args()
    words = ["--model", flags.model, "--batch-size", str(flags.batch_size), "--max-new-tokens", str(flags.new_tokens)]
    args = flan.parse_settings([*words, *["--int8"] * flags.int8, *["--int4"] * flags.int4])
    device, precision = flan.get_device()
    flan.PartialState(cpu=device.type == "cpu")
    tokenizer = flan.AutoTokenizer.from_pretrained(flags.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(args, Path(folder), device, precision)
    print(f"{flags.model}, {flan.device_name(device)}, {precision}, batch {args.batch_size}", flush=True)
    if flags.only != "generate":
        rows = random_rows(tokenizer, 2 * flags.steps * flags.batch_size, seed=0)
        usual = usual_training(args, model, tokenizer, rows, precision, flags.steps, flags.steps // 4)
        ours = our_training(args, model, tokenizer, rows, precision, flags.steps, flags.steps // 4)
        print(f"training:  {ours:8.1f} rows/s, the usual recipe {usual:8.1f}, ratio {ours / usual:.2f}", flush=True)
    if flags.only != "train":
        rows = random_rows(tokenizer, flags.rows, seed=1)
        ours = rows_per_second(our_summaries, args, model, tokenizer, rows, precision)
        usual = rows_per_second(usual_summaries, args, model, tokenizer, rows, precision)
        print(f"summaries: {ours:8.1f} rows/s, the usual recipe {usual:8.1f}, ratio {ours / usual:.2f}", flush=True)


if __name__ == "__main__":
    main()
