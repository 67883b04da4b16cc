import importlib.util, sys, time, torch
def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path); m = importlib.util.module_from_spec(spec); sys.modules[name] = m
    spec.loader.exec_module(m); return m
old = load("prototypes/g2old.py", "old"); new = load("prototypes/g2pdl.py", "new"); dev = "cuda"
def model_of(g):
    m = g.GPT(g.GPTConfig(50257)); m.initialise(0)
    with torch.no_grad():
        for n, p in m.named_parameters(): p *= 8 if n == "wpe.weight" else 2 if p.dim() == 2 else 1
    return m.requires_grad_(False).eval().to(dev, torch.bfloat16)
mo, mn = model_of(old), model_of(new)
prompt = list(range(100, 132))
clock = lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
def trial(g, m, count, T, label, n=300, rounds=4):
    best = [9e9] * 4
    try:
        for _ in range(rounds):
            a = clock(); d = g.GraphDecoder(m, count, len(prompt) + n, -1, T, 50, 0); b = clock(); d.read(prompt); c = clock()
            for _ in range(n - 1): d.graph.replay()
            e = clock(); out = list(g.generate(m, prompt, count, n, -1, temperature=T, top_k=50)); f = clock()
            best = [min(x, y) for x, y in zip(best, (b-a, c-b, e-c, f-e))]
    except Exception as e: print(label, "FAILED", repr(e)[:200], flush=True); return
    print(f"{label:34} {count:3} x {n:3} T={T}: build {best[0]*1e3:5.1f} read {best[1]*1e3:5.1f} steps {best[2]/(n-1)*1e6:7.1f} us each; whole {best[3]*1e3:6.1f} ms, {count*n/best[3]:9,.0f} tokens/s", flush=True)
    return out
for n in (300, 900):
    trial(old, mo, 64, 0, "old", n)
    for keys in ((32,2,3), (64,4,3), (16,1,3)):
        for modes in ((0,0,0,0), (2,1,2,1), (2,1,1,1)):
            new.MODES = modes; new.GraphDecoder.KEYS = (512,16,1), keys
            trial(new, mn, 64, 0, f"{keys} {modes}", n, 3)
    trial(old, mo, 1, 0, "old", n)
    for keys in ((512,16,1), (256,8,1), (128,4,2), (256,8,2)):
        new.GraphDecoder.KEYS = keys, (32,2,3); trial(new, mn, 1, 0, f"one {keys}", n)
new.GraphDecoder.KEYS = (512,16,1), (32,2,3)
for count, T in ((2,0),(8,0),(64,.8),(256,0)):
    trial(old, mo, count, T, "old")
    for modes in ((0,0,0,0), (2,1,2,1)):
        new.MODES = modes; trial(new, mn, count, T, f"new {modes}")
