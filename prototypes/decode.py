import importlib.util, sys, time, itertools, torch
from dataclasses import replace
def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path); m = importlib.util.module_from_spec(spec); sys.modules[name] = m
    spec.loader.exec_module(m); return m
g0 = load("gpt2_from_scratch.py", "g0"); g1 = load("prototypes/g2pdl.py", "g1")
dev = torch.device("cuda")
def model_of(g):
    m = g.GPT(g.GPTConfig(50257)); m.initialise(0)
    with torch.no_grad():
        for n, p in m.named_parameters(): p *= 8 if n == "wpe.weight" else 2 if p.dim() == 2 else 1
    return m.requires_grad_(False).eval().to(dev, torch.bfloat16)
prompt, new = list(range(100, 132)), 300
def clock(): torch.cuda.synchronize(); return time.perf_counter()
def trial(g, m, count, temperature, label, profile=False):
    best = None
    for _ in range(4):
        a = clock(); d = g.GraphDecoder(m, count, len(prompt) + new, -1, temperature, 50, 0)
        b = clock(); d.read(prompt); c = clock(); tokens = d.sequence.clone(); del tokens
        e = clock()
        out = list(d.run(prompt)); f = clock()
        for _ in range(100): d.graph.replay()
        h = clock()
        full0 = clock(); whole = list(g.generate(m, prompt, count, new, -1, temperature=temperature, top_k=50)); full = clock() - full0
        row = dict(build=(b-a)*1e3, read=(c-b)*1e3, run=(f-e)*1e3, full=full*1e3, rate_full=count*new/full, rate_run=count*new/(f-e), late_step_us=(h-f)*1e4)
        if best is None or row["full"] < best["full"]: best = row
    print(label, count, temperature, {k: round(v, 1) for k, v in best.items()}, flush=True)
    if profile:
        d.read(prompt)
        for _ in range(150): d.graph.replay()   # ~ the middle: 182 tokens
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            for _ in range(20): d.graph.replay()
            torch.cuda.synchronize()
        tot = 0
        for e in sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)[:14]:
            print(f"   {e.self_device_time_total/20:8.1f} us {e.count/20:6.1f} {e.key[:60]}")
        evs = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        evs.sort(key=lambda e: e.time_range.start)
        busy = sum(e.self_device_time_total for e in p.key_averages())/20
        span = (evs[-1].time_range.end - evs[0].time_range.start)/20
        gaps = [max(0, b.time_range.start - a.time_range.end) for a, b in zip(evs, evs[1:])]
        print(f"   busy {busy:.1f} us span {span:.1f} us, kernels {len(evs)/20}, mean gap {sum(gaps)/len(gaps):.2f} us", flush=True)
        seen = {}
        for e in evs: seen.setdefault(e.name[:40], []).append(e.time_range.end - e.time_range.start)
        n = len(evs)//20
        if n:
            first = evs[10*n:11*n]
            print("   one step:", " ".join(f"{e.name.split('_')[0][:5]}{e.time_range.end-e.time_range.start:.1f}" for e in first), flush=True)
    return out
m0, m1 = model_of(g0), model_of(g1)
ref = trial(g0, m0, 64, 0, "main", True)
for modes in [(0,0,0,0), (2,1,2,1), (1,1,1,1), (2,1,0,1), (0,1,2,1), (2,1,1,1), (2,0,2,1)]:
    g1.MODES = modes
    try:
        out = trial(g1, m1, 64, 0, f"pdl {modes}", modes in ((2,1,2,1),))
        print("   same", out == ref)
    except Exception as e: print(modes, "failed", repr(e)[:300])
trial(g0, m0, 64, 0.8, "main"); 
g1.MODES = (2,1,2,1); trial(g1, m1, 64, 0.8, "pdl"); trial(g1, m1, 8, 0, "pdl 8"); trial(g0, m0, 8, 0, "main 8"); trial(g0, m0, 1, 0, "main 1", True); trial(g0, m0, 1, 0.8, "main 1")
