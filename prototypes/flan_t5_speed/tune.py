"""Best tiles of the attention kernels at XL, batch 64. `tune.py compile I` compiles configuration I into Triton's cache."""
import sys, json, time, numpy as np, torch, fast_t5 as f
from triton.testing import do_bench
CONFIGS = [(64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (128, 32, 8), (32, 32, 2), (128, 64, 8), (64, 128, 8), (16, 64, 2)]
def cases(tokens=64):
    d = np.load("tokens.npz"); rng = np.random.default_rng(0); rows = rng.permutation(len(d["train_source_len"]))[:tokens]
    st = lambda n: torch.tensor([0, *d[n][rows].cumsum()], dtype=torch.int32, device="cuda")
    s, t = st("train_source_len"), st("train_target_len"); H = 32
    r = lambda n, w: torch.randn(n, w, device="cuda", dtype=torch.bfloat16)
    S, T = int(s[-1]), int(t[-1]); bias = r(H, 257); seed = torch.randint(0, 2**31 - 1, (13,), dtype=torch.int32, device="cuda")
    yield "encoder", (r(S, 6144), None, bias, s, s), (512, 512), False, S, seed
    yield "decoder", (r(T, 6144), None, bias, t, t), (128, 128), True, T, seed
    yield "cross", (r(T, 2048), r(S, 4096), None, t, s), (128, 512), False, T, seed
def main(only=None):
    best = {k: dict(v) for k, v in f.TILES.items()}
    for kind, (q, kv, bias, qs, ks), longest, causal, n, seed in cases():
        times = {}
        for c in CONFIGS if only is None else [CONFIGS[only]]:
            try:
                f.TILES[kind] = dict.fromkeys(("forward", "q", "kv"), c)
                fw = lambda: f.attention(q, kv, bias, qs, ks, seed, 1, 0.1, 32, longest[0], causal)
                out, lse = fw(); dout = torch.randn_like(out)
                bw = lambda: f.attention_backward(dout, q, kv, out, lse, bias, qs, ks, seed, 1, 0.1, 32, *longest, causal)
                bw(); torch.cuda.synchronize()
                if only is not None: continue
                times[c] = {"forward": do_bench(fw, 5, 20) * 1e3}
                from torch.profiler import profile, ProfilerActivity
                with profile(activities=[ProfilerActivity.CUDA]) as p:
                    for _ in range(5): bw()
                    torch.cuda.synchronize()
                for e in p.events():
                    for k in ("q", "kv"):
                        if e.name.startswith(f"backward_{k}_kernel"): times[c][k] = times[c].get(k, 0) + e.device_time / 5
            except Exception as e: print(kind, c, type(e).__name__, str(e)[:100])
        if only is None:
            for k in ("forward", "q", "kv"):
                best[kind][k] = min(times, key=lambda c: times[c].get(k, 1e9))
                print("TUNE", kind, k, "best", best[kind][k], {"x".join(map(str, c)): round(t.get(k, 0)) for c, t in times.items()}, flush=True)
    if only is None: json.dump(best, open("/tmp/tiles.json", "w"))
main(int(sys.argv[2]) if len(sys.argv) > 1 else None)
