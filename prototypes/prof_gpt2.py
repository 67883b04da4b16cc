"""Kernels of a step by kind. argv: model flags... ; under torchrun with several GPUs too."""
import os, sys, time, types, collections, torch
sys.path.insert(0, "tests"); import benchmark_gpt2 as b
import gpt2_from_scratch as gpt2
model, *flags = sys.argv[1:]
nograph = "nograph" in flags; flags = [f for f in flags if f != "nograph"]
arguments = types.SimpleNamespace(tiny=False)
t = b.make_trainer(arguments, model, b.SEQUENCES[model], *flags)
if nograph: t.step_graph = None
step = b.our_step(t)
b.measure(f"{model} {flags} nograph={nograph} world={t.machine.world}", t, step, arguments)
KINDS = [("nccl", "exchange"), ("cudnn", "attention"), ("flash", "attention"), ("fmha", "attention"), ("nvjet", "products"), ("gemm", "products"), ("cutlass", "products"), ("tanh", "gelu"), ("gelu","gelu"), ("native_layer_norm", "norms"), ("cross_entropy", "loss"), ("multi_tensor", "optimiser"), ("lpnorm", "optimiser")]
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
    for n in range(5): step(50 + n)
    torch.cuda.synchronize()
N = 5
if gpt2.is_main_process():
    evs = sorted((e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA), key=lambda e: e.time_range.start)
    kinds = collections.Counter()
    for e in p.key_averages():
        low = e.key.lower()
        kinds[next((k for w, k in KINDS if w in low), "other")] += e.self_device_time_total / N / 1e3
    print("KINDS", {k: round(v, 2) for k, v in kinds.most_common()}, "sum", round(sum(kinds.values()), 1))
    for e in sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)[:34]:
        print(f"  {e.self_device_time_total/N/1e3:8.3f} ms {e.count/N:6.1f} {e.key[:100]}")
    # time on the compute stream when nothing but exchange ran; idle
    comp = [(e.time_range.start, e.time_range.end) for e in evs if "nccl" not in e.name.lower()]
    comm = [(e.time_range.start, e.time_range.end) for e in evs if "nccl" in e.name.lower()]
    def union(iv):
        total, end = 0, -1
        for s, t_ in iv:
            if s > end: total += t_ - s; end = t_
            elif t_ > end: total += t_ - end; end = t_
        return total
    span = evs[-1].time_range.end - evs[0].time_range.start
    both = union(sorted(comp + comm))
    print(f"SPAN {span/N/1e3:.2f} ms, compute busy {union(comp)/N/1e3:.2f}, exchange busy {union(comm)/N/1e3:.2f}, exchange alone {(both-union(comp))/N/1e3:.2f}, idle {(span-both)/N/1e3:.2f}")
    gaps = sorted(((b2[0]-max(x[1] for x in comp[max(0,i-3):i+1]))/1e3, i) for i, b2 in enumerate(comp[1:]) )[-8:]
    print("GAPS ms", [round(g, 2) for g, _ in gaps])
t.step_graph = None
if gpt2.dist.is_initialized(): gpt2.dist.barrier(); torch.cuda.synchronize(); import gc; gc.collect(); gpt2.dist.destroy_process_group()
