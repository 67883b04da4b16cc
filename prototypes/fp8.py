"""GPT-2's products in FP8 (e4m3; gradients e5m2), static scales: speed, and losses beside bf16.

    python prototypes/fp8.py speed VARIANT...           # 124M, 64 x 1024 tokens, as tests/benchmark_gpt2.py measures
    python prototypes/fp8.py train VARIANT [flags of gpt2_from_scratch.py]      # a training with it

VARIANT: bf16, or letters of what is in FP8: f (forward of the blocks), d (gradients of inputs in the MLP), a (with d: in
attention too),
h (forward of the head), g (gradient of the head's input). Weights' gradients stay in bf16.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import gpt2_from_scratch as gpt2

if gpt2.triton:
    triton, tl = gpt2.triton, gpt2.tl
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
SCALES = {"x": 16.0, "w": 256.0, "head_w": 256.0, "gradient": 32768.0}  # a gradient of the summed loss is of order 1
VARIANT = ""


def eight(x, scale, dtype=E4):
    return (x * scale).clamp(-448, 448).to(dtype) if dtype is E4 else (x * scale).clamp(-57344, 57344).to(dtype)


def product(a, b, scale_a, scale_b, bias=None):
    """a (M, K) @ b (N, K)^T of FP8, in bf16."""
    inverse = lambda s: torch.full((), 1 / s, device=a.device)
    return torch._scaled_mm(a, b.t(), inverse(scale_a), inverse(scale_b), bias=bias, out_dtype=torch.bfloat16,
                            use_fast_accum=True)


class Product8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, has_d):
        flat = x.flatten(0, -2)
        ctx.save_for_backward(flat, weight)
        ctx.scale, ctx.has_d = scale, has_d
        y = product(eight(flat, SCALES["x"]), eight(weight, SCALES["w"]), SCALES["x"], SCALES["w"], bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        shape, dy = dy.shape, dy.flatten(0, -2)
        if ctx.has_d:
            dx = product(eight(dy, ctx.scale, E5), eight(weight.t().contiguous(), SCALES["w"]), ctx.scale, SCALES["w"])
        else:
            dx = dy @ weight
        return dx.view(*shape[:-1], -1), dy.t() @ x, dy.sum(0), None, None


class Linear8(nn.Linear):
    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        return Product8.apply(x, self.weight, self.bias, self.gradient_scale, self.has_d)


if gpt2.triton:
    @triton.jit
    def cross_entropy_kernel8(logits, eighth, targets, losses, SCALE: tl.constexpr, HAS8: tl.constexpr,
                              SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
        """gpt2.cross_entropy_kernel, with the gradient in FP8 as well."""
        LOG2_E: tl.constexpr = 1.4426950408889634
        row = tl.program_id(0).to(tl.int64)
        logits += row * STRIDE
        eighth += row * STRIDE
        target = tl.load(targets + row)
        largest = tl.full((BLOCK,), -1e30, tl.float32)
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
        tl.debug_barrier()
        for start in range(0, STRIDE, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < SIZE, other=float("-inf")).to(tl.float32)
            gradient = tl.exp2(x * LOG2_E - log_total) - tl.where(columns == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(logits + columns, gradient, mask=columns < STRIDE)
            if HAS8:
                tl.store(eighth + columns, (gradient * SCALE).to(tl.float8e5), mask=columns < STRIDE)


class FusedLoss8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, size):
        if "h" in VARIANT and x.requires_grad:
            w8 = eight(weight, SCALES["head_w"])
            logits = product(eight(x, SCALES["x"]), w8, SCALES["x"], SCALES["head_w"])
        else:
            logits = x @ weight.t()
        losses, has8 = torch.empty(len(x), device=x.device), "g" in VARIANT
        eighth = torch.empty_like(logits, dtype=E5) if has8 else logits
        cross_entropy_kernel8[(len(x),)](logits, eighth, targets, losses, SCALES["gradient"], has8, size, len(weight),
                                         BLOCK=2048, num_warps=4)
        ctx.save_for_backward(x, weight, logits, eighth)
        return losses.sum()

    @staticmethod
    def backward(ctx, scale):
        x, weight, gradient, eighth = ctx.saved_tensors
        if "g" in VARIANT:
            w8t = eight(weight.t().contiguous(), SCALES["head_w"])
            dx = product(eighth, w8t, SCALES["gradient"], SCALES["head_w"])
        else:
            dx = gradient @ weight
        return dx * scale, (gradient.t() @ x) * scale, None, None


def compile_in_eight(trainer, compiled):
    # The loss that is differentiated is the step's mean: its gradients are that much smaller than those of the sum.
    for name, module in trainer.compute_copy.named_modules():
        if isinstance(module, nn.Linear) and "f" in VARIANT:
            module.__class__ = Linear8
            module.gradient_scale = float(trainer.settings.batch_tokens) * 64
            module.has_d = "d" in VARIANT and (".mlp." in name or "a" in VARIANT)
    return real_compile(trainer, compiled)


real_compile = gpt2.compile_compute_copy


def choose(variant):
    global VARIANT
    VARIANT = "" if variant == "bf16" else variant
    gpt2.compile_compute_copy = compile_in_eight
    if set(VARIANT) & set("hg") and gpt2.triton:
        gpt2.FusedLoss = FusedLoss8


if sys.argv[1] == "train":
    choose(sys.argv[2])
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    sys.exit(gpt2.main(gpt2.parse_arguments()))
import benchmark_gpt2 as benchmark

tiny = "--tiny" in sys.argv
for variant in [word for word in sys.argv[2:] if word != "--tiny"]:
    choose(variant)
    arguments = argparse.Namespace(tiny=tiny)
    torch.compiler.reset()
    trainer = benchmark.make_trainer(arguments, "gpt2", 2 if tiny else 64, "--no-deterministic")
    benchmark.measure(variant, trainer, benchmark.our_step(trainer), arguments)
    if "a" not in variant and variant in ("bf16", "fdh", "fdhg") and torch.cuda.is_available():
        from torch.profiler import ProfilerActivity, profile
        trainer.step_graph = None
        step = benchmark.our_step(trainer)
        for number in range(2):
            step(number)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for number in range(3):
                step(number)
            torch.cuda.synchronize()
        for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:40]:
            print(f"PROFILE {variant} {event.self_device_time_total / 3e3:8.3f} ms {event.count / 3:6.1f} {event.key[:110]}")
    trainer.step_graph = None
    del trainer
    torch.cuda.empty_cache() if torch.cuda.is_available() else None
    gpt2.FusedLoss = gpt2.FusedLoss if gpt2.triton is None else FusedLoss8
