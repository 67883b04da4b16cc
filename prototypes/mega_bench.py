"""The whole generation in one kernel beside GraphDecoder: tokens/s, and whether the greedy tokens are the same."""
import sys, time, json, argparse, pathlib, os
root = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root / "prototypes"), str(root / "tests"), str(root)]
import torch, mega, benchmark_gpt2 as b
gpt2 = b.gpt2
model = b.make_model(argparse.Namespace(tiny=False)).to("cuda", torch.bfloat16)
prompt, new = list(range(100, 132)), 300
old = gpt2.GraphDecoder
def tokens(kind, count, temperature=0.0, top_k=50, n=new):
    gpt2.GraphDecoder = kind
    return list(gpt2.generate(model, prompt, count, n, -1, temperature=temperature, top_k=top_k))
def rate(kind, count, **how):
    tokens(kind, count, **how)
    best = 9e9
    for _ in range(3):
        torch.cuda.synchronize(); t = time.perf_counter(); tokens(kind, count, **how); best = min(best, time.perf_counter() - t)
    return count * new / best
def plain(count, n):
    can = old.can_run
    old.can_run = staticmethod(lambda *a: False); gpt2.GraphDecoder = old
    try: return list(gpt2.generate(model, prompt, count, n, -1, temperature=0.0))
    finally: old.can_run = can
choices = {
    1: [{}, {"BLOCK_N": 8, "HEAD_N": 8}, {"BLOCK_N": 32, "HEAD_N": 32}, {"num_warps": 16}, {"num_warps": 16, "BLOCK_N": 32, "HEAD_N": 32}, {"KEYS": 256}, {"per": 2, "num_warps": 4}, {"per": 2, "num_warps": 4, "BLOCK_N": 8, "HEAD_N": 8}],
    8: [{}, {"BLOCK_N": 32}, {"BLOCK_K": 256}],
    64: [{}, {"BLOCK_N": 32}, {"BLOCK_K": 256}, {"BLOCK_K": 64}, {"KEYS": 256}, {"KEYS": 64}, {"HEAD_N": 128}, {"per": 2, "num_warps": 4, "KEYS": 64}],
}
for count in (1, 8, 64):
    a = tokens(old, count); p = plain(count, 40)
    print(count, "old", f"{rate(old, count):,.0f}", "top-k", f"{rate(old, count, temperature=0.8):,.0f}", "plain same:", p == a[:40], flush=True)
    for how in choices[count]:
        how = dict(how); mega.MegaDecoder.PROGRAMS = how.pop("per", 1); mega.MegaDecoder.SIZES = how
        try:
            m = tokens(mega.MegaDecoder, count)
            same = sum(x == y for x, y in zip(a, m)) / new
            print(count, mega.MegaDecoder.PROGRAMS, how, f"{rate(mega.MegaDecoder, count):,.0f}", "top-k", f"{rate(mega.MegaDecoder, count, temperature=0.8):,.0f}", f"same as old {same:.2f} as plain {sum(x == y for x, y in zip(p, m)) / 40:.2f}", flush=True)
        except Exception as e:
            print(count, how, "failed", repr(e)[:150], flush=True)
