"""Speed of flan-t5_samsum.py beside the usual recipe, on this machine, in one run. Not collected by pytest.

    python tests/benchmark_flan_t5.py                            # everything that this machine can run
    python tests/benchmark_flan_t5.py --only xl8,xl64,generate   # some parts, in this order
    python tests/benchmark_flan_t5.py --json table.json          # and the figures in a file

Three calls of ten minutes on an H200:

    --only ceiling,xl8,xl8-warm,xl64,base8
    --only ceiling,xl8-int8,xl8-int4,xl8-eager,generate
    --only ceiling,xxl8-int8,xxl8-int4,xl-start,xl16x2   # the last needs two GPUs

Each part is a process of its own with a time limit (--timeout), so that one that fails or hangs costs no other. Weights
are random, as speed does not depend on their values, and so are tokens; lengths are those of SAMSum (below). The usual
recipe: the same base and adapter in a plain loop, shuffled batches padded to their longest row, the model's own loss,
fused AdamW; for summaries `generate` with the adapter beside the base. Ours is the script's own Trainer with all that
it does but evaluations and checkpoints, as it is after a while: the batches come three times, the third time counts.
Without a GPU everything runs on a toy: a test of this file, no measurement.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = time.perf_counter()
SCRIPT = Path(__file__).resolve().parents[1] / "flan-t5_samsum.py"

# name: flags, steps of each of the three passes, steps of the usual recipe
PARTS = {
    "ceiling": ("", 0, 0),
    "xl8": ("--model xl", 40, 8),
    "xl8-warm": ("--model xl", 4, 0),  # how long until the first step, now that the compiler's cache is there
    "xl64": ("--model xl --batch-size 64", 12, 4),
    "base8": ("--model base", 60, 12),
    "xl8-int8": ("--model xl --int8", 30, 5),
    "xl8-int4": ("--model xl --int4", 30, 5),
    "xl8-eager": ("--model xl --no-fast", 8, 0),
    "xl-start": ("--model xl", 0, 0),  # the script itself, until its fast step is compared
    "generate": ("--model xl", 0, 0),
    "xxl8-int8": ("--model xxl --int8 --gradient-checkpointing", 4, 3),
    "xxl8-int4": ("--model xxl --int4 --gradient-checkpointing", 4, 3),
    "xl16x2": ("--model xl --batch-size 16", 40, 0),
}

# Tokens of source and target, Flan-T5's tokenizer, with the prefix "summarize: " and cut at 512 and 128: every 41st row
# of SAMSum's training split, sorted by these two numbers. Means 149.5 and 28.9; of the whole split 149.8 and 28.7.
TABLE = """
    19,12 22,15 24,9 25,10 25,18 26,14 27,12 28,6 28,15 29,12 29,31 30,15 31,12 31,25 32,13 32,20 33,12 33,20 34,12
    34,17 35,12 35,20 36,13 36,27 37,15 38,5 38,13 38,24 39,14 39,24 40,14 41,10 41,17 41,40 42,16 43,9 43,16 43,28
    44,16 44,33 45,14 45,23 46,15 46,23 47,11 47,21 48,13 48,21 49,11 49,20 50,13 50,25 51,15 51,32 52,14 52,21 53,11
    53,21 54,12 54,20 55,10 55,17 55,28 56,15 56,27 57,14 57,23 58,14 58,25 59,14 59,23 60,10 60,19 61,9 61,19 61,29
    62,19 62,32 63,19 63,43 64,19 64,31 65,18 65,29 66,15 66,24 67,12 67,20 68,9 68,18 68,26 69,15 69,24 70,13 70,23
    71,9 71,19 71,28 72,14 72,24 73,10 73,20 73,30 74,19 74,30 75,17 75,27 76,18 76,31 77,16 77,29 78,16 78,25 79,15
    79,38 80,21 80,33 81,21 81,44 82,22 82,37 83,19 84,10 84,21 84,45 85,31 86,20 86,42 87,24 88,15 88,32 89,21 90,13
    90,27 91,23 92,15 92,35 93,20 93,33 94,21 95,12 95,30 96,20 96,37 97,22 98,7 98,22 99,5 99,30 100,21 101,7 101,38
    102,28 103,23 104,17 104,36 105,23 106,15 107,11 107,33 108,21 109,16 109,43 110,28 111,24 112,22 113,12 113,32
    114,22 115,13 115,37 116,31 117,18 117,52 118,30 119,23 120,13 120,34 121,25 121,44 122,25 123,16 123,41 124,36
    125,27 126,20 126,61 127,34 128,27 129,18 130,12 130,45 131,35 132,24 133,23 133,56 134,41 135,27 136,19 136,50
    137,50 138,40 139,34 140,37 141,34 142,29 143,25 144,24 145,24 146,18 146,42 147,35 148,32 149,29 150,25 151,19
    151,53 152,34 153,37 154,27 155,35 156,29 157,24 157,52 158,37 159,34 160,33 161,27 162,17 163,16 164,12 165,15
    165,51 166,49 167,39 168,34 169,26 170,21 171,21 172,19 173,23 174,18 174,49 176,20 177,18 178,18 179,29 180,27
    181,27 182,31 183,27 184,33 185,33 186,27 187,38 188,71 190,16 191,29 192,38 193,39 194,41 195,36 196,41 197,44
    199,17 199,62 201,17 202,20 203,18 204,23 205,48 207,18 208,34 209,26 210,40 211,55 213,16 214,18 215,35 216,58
    218,18 219,38 220,60 221,58 223,38 224,51 226,19 227,33 229,23 230,31 231,41 233,16 234,25 235,42 237,33 239,27
    240,71 242,44 243,54 245,64 247,46 249,64 251,65 253,52 255,28 257,35 259,31 261,38 262,46 265,25 267,53 269,58
    271,45 273,53 275,39 277,49 279,54 282,50 285,34 288,22 290,16 293,39 296,35 298,72 302,23 305,37 307,68 311,21
    314,16 317,79 321,38 324,42 328,28 332,40 336,31 341,10 344,41 349,39 353,62 359,40 364,56 370,34 374,72 381,50
    386,52 393,72 399,70 406,57 415,49 426,65 436,54 448,22 458,43 475,46 497,59 512,28 512,43 512,55 512,68
"""
LENGTHS = [tuple(map(int, pair.split(","))) for pair in TABLE.split()]


def load_script():
    spec = importlib.util.spec_from_file_location("flan_t5_samsum", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def random_rows(flan, count, seed, vocabulary):
    """A tokenised split whose rows have SAMSum's lengths, shuffled: all of the table's, or every so many, as it is
    sorted."""
    rng = flan.np.random.default_rng(seed)
    order = rng.permutation((flan.np.arange(count) + 0.5) * len(LENGTHS) // count).astype(int)
    draw = lambda length: [*rng.integers(300, vocabulary, length - 1).tolist(), 1]
    return flan.datasets.Dataset.from_dict({
        "id": list(map(str, range(count))), "input_ids": [draw(LENGTHS[i][0]) for i in order],
        "labels": [draw(LENGTHS[i][1]) for i in order],
    })  # fmt: skip


def random_model(flan, settings, device, dtype):
    """What load_base and add_lora return, with random weights that are made where they stay, in seconds."""
    torch = flan.torch
    config = flan.geometry(settings) if device.type == "cuda" else flan.transformers.T5Config(
        vocab_size=5120, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = flan.transformers.T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * config.d_model**-0.5)
    torch.set_default_dtype(torch.float32)
    model.set_input_embeddings(model.shared)
    for parent in list(model.modules()) if settings.quantization else ():
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear and name not in ("lm_head", "wo"):
                setattr(parent, name, quantised(flan, linear, settings, device, dtype))
    flan_model = flan.add_lora(model.requires_grad_(False), settings)
    for name, parameter in flan_model.named_parameters():
        if "lora_B" in name:  # zero would leave out half of the gradients
            torch.nn.init.normal_(parameter, 0, 0.01)
    if settings.gradient_checkpointing:
        flan_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return flan_model


def quantised(flan, linear, settings, device, dtype):
    """As transformers and bitsandbytes load it."""
    nn, shape = flan.bitsandbytes.nn, {"bias": False, "device": "meta"}
    if settings.int8:
        layer = nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0, **shape)
        layer.weight = nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        layer.register_forward_hook(flan.forget_input)
        return layer
    layer = nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=dtype, quant_type="nf4",
                          compress_statistics=False, **shape)
    layer.weight = nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False,
                                 module=layer)._quantize(device)
    if device.type == "cpu":
        layer.support_avx512bf16_for_cpu = False
    return layer


def useful_flops(config, sources, targets):
    """Of training on so many tokens: two for each weight and token forward, and as many backward (LoRA's are few)."""
    attention = 4 * config.d_model * config.num_heads * config.d_kv
    layer = attention + 3 * config.d_model * config.d_ff
    source = config.num_layers * layer + config.num_decoder_layers * attention / 2  # k and v of cross-attention
    target = config.num_decoder_layers * (layer + attention / 2) + config.vocab_size * config.d_model
    return 4 * (source * sources + target * targets)


def synchronise(torch):
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_ceiling(torch):
    """TFLOP/s of a large bf16 product."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (512, "cpu")
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for repeats in (5, 20):
        synchronise(torch)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronise(torch)
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def usual_training(flan, settings, model, rows, precision, steps, warm_up=2):
    """Rows per second of the plain loop, and its peak memory; None where memory does not suffice."""
    torch, device = flan.torch, model.device
    order = flan.np.random.default_rng(1).permutation(len(rows))
    collate = flan.DataCollatorForSeq2Seq(flan.AutoTokenizer.from_pretrained(flan.MODELS["tiny"]), model=model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    model.train()
    try:
        for step in range(steps + warm_up):
            if step == warm_up:
                synchronise(torch)
                start = time.perf_counter()
            chosen = order[flan.np.arange(step * settings.batch_size, (step + 1) * settings.batch_size) % len(order)]
            batch = collate([{key: rows[int(i)][key] for key in ("input_ids", "labels")} for i in chosen]).to(device)
            with torch.autocast(device.type, precision, enabled=precision == torch.bfloat16):
                model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        synchronise(torch)
        return steps * settings.batch_size / (time.perf_counter() - start), flan.peak_memory_gib(device)
    except torch.OutOfMemoryError:
        return None, None
    finally:
        model.zero_grad()


def our_training(flan, settings, model, rows, precision, steps):
    """The script's Trainer over the same `steps` batches three times.

    `new_size_seconds` is what recording a size of batch costs beside the step, on average. A training meets most of its
    sizes in the first epoch. `first_peak_gib` is that until the first step is over, with the comparison before it.
    """
    torch, marks, sizes, peaks, run_batch = flan.torch, {}, [], [], flan.FastT5.by_graph
    flan.FastT5.by_graph = lambda self, batch: sizes.append(tuple(map(len, batch.values()))) or run_batch(self, batch)

    class Clock(flan.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (1, 2 * steps, 3 * steps):
                synchronise(torch)
                marks[state.global_step] = time.perf_counter()
            if state.global_step == 1:  # the comparison before it is not a step's memory
                marks["peak"] = flan.peak_memory_gib(model.device)
                trainer.restart_clock()

        def on_log(self, args, state, control, logs, **kwargs):  # every ten steps, as a run does; all peaks count
            peaks.append(logs.get("peak_memory_gib") or 0.0)

    tokenizer = flan.AutoTokenizer.from_pretrained(flan.MODELS["tiny"])
    with tempfile.TemporaryDirectory() as folder:
        run = flan.Run(settings, Path(folder), {})
        begin = time.perf_counter()
        data = dict.fromkeys(flan.SPLITS, rows)
        trainer = flan.SummarizationTrainer(run, model, tokenizer, data, 3 * steps, model.device, precision,
                                            eval_strategy="no", eval_on_start=False, logging_steps=10)
        order = trainer.sampler.order(0)
        trainer.sampler.order = lambda epoch: order
        trainer.add_callback(Clock())
        trainer.train()
    peak = max([*peaks, torch.cuda.max_memory_allocated() / 2**30]) if model.device.type == "cuda" else 0.0
    reserved = torch.cuda.memory_reserved() / 2**30 if model.device.type == "cuda" else 0.0
    alone = None
    if trainer.fast and trainer.fast.uses_graphs:  # the graphs of the third pass and nothing else: what Python costs
        synchronise(torch)
        begin_alone = time.perf_counter()
        for size in sizes[len(sizes) * 2 // 3 :]:
            trainer.fast.graphs[size][1].replay()
        synchronise(torch)
        alone = steps * settings.batch_size / (time.perf_counter() - begin_alone)
    longest = [max(size[i] for size in sizes) for i in (0, 2)] if sizes else None  # source and target, see `pack`
    pass_seconds, graphs = marks[3 * steps] - marks[2 * steps], len(trainer.fast.graphs) if trainer.fast else 0
    return {
        "graphs_alone_rows_per_second": alone, "rows_per_second": steps * settings.batch_size / pass_seconds,
        "new_size_seconds": (marks[2 * steps] - marks[1] - 2 * pass_seconds) / graphs if graphs else None,
        "first_two_passes_seconds": marks[2 * steps] - begin, "first_step_seconds": marks[1] - begin,
        "from_start_of_process_seconds": marks[1] - START, "first_peak_gib": marks["peak"], "peak_gib": peak,
        "reserved_gib": reserved, "longest_tokens": longest,
        "is_fast": trainer.fast is not None, "graphs": graphs,
    }


def judged(flan, summarizer, sources, rows):
    """What the usual model, after the same beginning, holds of each token of the summaries `rows`: the share where it
    prefers another, the share where it does so by more than two steps of bf16 at its top logit, and the largest
    difference of logits.

    Summaries are hardly ever the same as generate()'s in bf16: with random weights two tokens are often as likely but
    for rounding, and after the first other token all differ. What must come out: figures of ours that are about as
    small as generate()'s own, which computes with a cache and so rounds in other places than its judge does; beyond two
    steps hardly any. (A toy in bf16 on a CPU: other tokens 1.4% of ours, 0.7% of generate()'s, none beyond two steps.
    With an error, cross-attention that gives half of its output: 32%, and 28% beyond two steps.)
    """
    torch, model, pad = flan.torch, summarizer.model, flan.torch.nn.utils.rnn.pad_sequence
    gaps, steps = [], []
    for start in range(0, len(rows), 16):
        ids, labels = (pad(list(map(torch.tensor, part[start : start + 16])), batch_first=True, padding_value=-100).to(
            summarizer.device) for part in (sources, rows))
        with torch.no_grad(), torch.autocast(summarizer.device.type, summarizer.precision,
                                             enabled=summarizer.precision != model.dtype):
            logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=labels).logits.float()
        top, chosen = logits.amax(-1), logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        gaps.append((top - chosen)[labels >= 0])
        steps.append(torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent - 8)[labels >= 0])  # 8 bits
    gaps, steps = torch.cat(gaps), torch.cat(steps)
    shares = {"other_tokens": gaps > 0, "beyond_two_steps": gaps > 2 * steps}
    return {name: float(share.float().mean()) for name, share in shares.items()} | {"largest_gap": float(gaps.max())}


def generation(flan, settings, model, precision, vocabulary):
    """All 819 dialogues, which with random weights nearly never end before the last token; and 63 by generate(), too,
    whose tokens and ours are `judged`."""
    torch, count = flan.torch, 819 if model.device.type == "cuda" else 40
    sources = random_rows(flan, count, 1, vocabulary)["input_ids"]
    tokenizer = flan.AutoTokenizer.from_pretrained(flan.MODELS["tiny"])
    summarizer, result = flan.Summarizer(
        model.eval(), tokenizer, settings, model.device, precision, flan.make_fast(model, settings)), {}
    for name in ("cold", "warm", "between_epochs"):
        if name == "between_epochs" and summarizer.fast:
            summarizer.fast.decoding = None  # what a training step does: its graphs are recorded anew
        start = time.perf_counter()
        summarizer(sources)
        synchronise(torch)
        result[f"{name}_seconds"] = time.perf_counter() - start
    result["is_fast"] = bool(summarizer.fast and summarizer.fast.is_proved["generation"])
    some = sorted(sources, key=len, reverse=True)[::13]
    batch = tokenizer.pad({"input_ids": some}, return_tensors="pt", pad_to_multiple_of=64).to(model.device)
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(model.device.type, precision, enabled=precision != model.dtype):
        theirs = model.generate(**batch, generation_config=summarizer.config)[:, 1:].tolist()
    synchronise(torch)
    result["usual_seconds_for_some"], result["some"] = time.perf_counter() - start, len(some)
    theirs = [row[: row.index(1) + 1] if 1 in row else row for row in theirs]
    ours = summarizer.fast.generate(some, summarizer.config, summarizer.stop) if result["is_fast"] else None
    for name, rows in {"ours": ours, "generate": theirs}.items():
        figures = judged(flan, summarizer, some, rows) if rows else {}
        result |= {f"{name}_{key}": value for key, value in figures.items()}
    return result


def start_of_the_script(flan, model):
    """Seconds from the start of the script, as a user calls it, to the end of its first scores and to its first fast
    step: with no cache, and with those of the compiler and of tokenised data. Weights of this size and as many rows as
    SAMSum has, of its lengths, lie on the disk, random both."""
    tokenizer, rng, result = flan.AutoTokenizer.from_pretrained(flan.MODELS["tiny"]), flan.np.random.default_rng(0), {}
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "\u0120" and token[1:].isalpha())
    rows = {"train": 14732, "validation": 818, "test": 819} if flan.torch.cuda.is_available() else dict.fromkeys(
        flan.SPLITS, 40)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.unload().save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "data").mkdir()
        for split, count in rows.items():
            lengths = [LENGTHS[i] for i in rng.integers(0, len(LENGTHS), count)]
            lines = [json.dumps({"dialogue": " ".join(rng.choice(words, source)),
                                 "summary": " ".join(rng.choice(words, target))}) for source, target in lengths]
            (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines))
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "HF_DATASETS_CACHE": "datasets"}
        env = os.environ | {key: str(folder / name) for key, name in caches.items()} | {"PYTHONUNBUFFERED": "1"}
        for name in ("cold", "warm"):
            command = [sys.executable, str(SCRIPT), "--model", str(folder / "model"), "--dataset", str(folder / "data"),
                       "--cache-dir", str(folder / "cache"), "--output-dir", str(folder / name)]
            start = time.perf_counter()
            process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("|           0 |"):
                    result[f"{name}_first_scores_seconds"] = time.perf_counter() - start
                if line.startswith(("the fast step agrees", "step ")):
                    result[f"{name}_seconds"] = time.perf_counter() - start
                    result[f"{name}_is_fast"] = line.startswith("the fast step")
                    break
            process.kill()
            process.wait()
            if f"{name}_seconds" not in result:
                raise RuntimeError("no step was taken")  # stderr above says why
    return result


def run_part(name):
    """Measures one part, and prints its figures as a line of JSON."""
    flags, steps, usual_steps = PARTS[name]
    flan = load_script()
    torch, has_gpu = flan.torch, flan.torch.cuda.is_available()
    settings = flan.parse_settings(["--fast", *flags.split()])
    device, precision = flan.get_device()
    flan.PartialState(cpu=not has_gpu)
    result = {"part": name, "flags": flags, "device": flan.device_name(device)}
    if name == "ceiling":
        result["tflops"] = matmul_ceiling(torch)
    else:
        if not has_gpu:
            steps, usual_steps = min(steps, 2), min(usual_steps, 2)
            settings = dataclasses.replace(settings, max_new_tokens=5)
        begin = time.perf_counter()
        model = random_model(flan, settings, device, precision)
        synchronise(torch)
        result["built_seconds"] = time.perf_counter() - begin
        vocabulary = min(4000, model.config.vocab_size)
        if name == "xl-start":
            result |= start_of_the_script(flan, model)
        elif name == "generate":
            result |= generation(flan, settings, model, precision, vocabulary)
        else:
            rows = random_rows(flan, steps * settings.batch_size, 0, vocabulary)
            if usual_steps:
                result["usual_rows_per_second"], result["usual_peak_gib"] = usual_training(
                    flan, settings, model, rows, precision, usual_steps)
                flan.gc.collect()
                torch.cuda.empty_cache()
            result |= our_training(flan, settings, model, rows, precision, steps)
            tokens = [sum(map(len, rows[column])) for column in ("input_ids", "labels")]
            flops = useful_flops(model.config, *tokens) / len(rows)
            result["useful_tflops"] = flops * result["rows_per_second"] / 1e12
    if flan.is_main_process():
        print("RESULT " + json.dumps(result), flush=True)


def show(result, ceiling):
    """A part in a line or two."""
    words = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in result.items()
             if name not in ("part", "flags", "device")}
    if result.get("usual_rows_per_second"):
        words["ratio"] = f"{result['rows_per_second'] / result['usual_rows_per_second']:.1f}"
    if ceiling and "useful_tflops" in result:
        words["share of the ceiling"] = f"{result['useful_tflops'] / ceiling:.0%}"
    print(f"{result['part']}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items()),
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), metavar="PART,...")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each part (default: 240)")
    parser.add_argument("--json", type=Path, help="write the figures there", metavar="FILE")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    unknown = set(flags.only) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if flags.part:
        return run_part(flags.part)
    results, ceiling = [], None
    with tempfile.TemporaryDirectory() as cache:  # of the compiler: cold at first
        folders = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in flags.only:
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"] if name == "xl16x2" else []
            command = [sys.executable, *launcher, __file__, "--part", name]
            try:
                done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True,
                                      timeout=flags.timeout)
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                error = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            except subprocess.TimeoutExpired as expired:
                lines, error = [], f"not done after {flags.timeout:.0f} s\n{(expired.stdout or b'')[-2000:]!r}"
            result = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"part": name, "error": error}
            results.append(result)
            ceiling = result.get("tflops", ceiling)
            show(result, ceiling)
            if flags.json:
                flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
