"""Where a step of 124M goes: python3 prototypes/profile_gpt2.py OUT VARIANT..."""
import os, sys, json, argparse, time, pathlib
root = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root / "tests"), str(root)]
import torch
import benchmark_gpt2 as b
gpt2 = b.gpt2
args = argparse.Namespace(tiny=not torch.cuda.is_available(), nanogpt=str(root / "nanogpt"))
out = pathlib.Path(sys.argv[1])
name = sys.argv[2]
flags = [] if name.startswith("det") else ["--no-deterministic"]
if "cudnn" in name:
    from torch.nn.attention import sdpa_kernel, SDPBackend
    ctx = sdpa_kernel([SDPBackend.CUDNN_ATTENTION]); ctx.__enter__()
if "reduced" in name:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
trainer = b.make_trainer(args, "gpt2", 2 if args.tiny else 64, *flags)
if "whole" in name:
    for block in trainer.twin.h: block._compiled_call_impl = None
    trainer.twin.compile(dynamic=False)
if "graph" in name:
    trainer.step_graph = gpt2.StepGraph(trainer)
if "auto" in name:
    import torch._inductor.config as ic
    ic.max_autotune_gemm = True; ic.benchmark_epilogue_fusion = True
    try: ic.triton.enable_persistent_tma_matmul = True
    except Exception as e: print(e)
    torch.compiler.reset()
    for block in trainer.twin.h: block._compiled_call_impl = None; block.compile(dynamic=False)
step = b.our_step(trainer) if "nanogpt" not in name else b.nanogpt_step(args.nanogpt, trainer)
row = b.measure(name, trainer, step, args)
from torch.profiler import profile, ProfilerActivity
if "prof" in name:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        for n in range(100, 103):
            step(n)
        gpt2.synchronise(trainer.machine.device)
    (out / f"prof_{name}.txt").write_text(json.dumps(row) + "\n" + p.key_averages().table(sort_by="self_cuda_time_total" if not args.tiny else "self_cpu_time_total", row_limit=60, max_name_column_width=110))
