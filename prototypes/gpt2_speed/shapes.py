import torch, json, os, fcntl
def t(f, n=20):
    for _ in range(3): f()
    torch.cuda.synchronize(); a, b = torch.cuda.Event(True), torch.cuda.Event(True); best = 1e9
    for _ in range(3):
        a.record()
        for _ in range(n): f()
        b.record(); torch.cuda.synchronize(); best = min(best, a.elapsed_time(b) / n)
    return best
lock = open("/tmp/gpu.time.lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
r = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
a, b = r(8192, 8192), r(8192, 8192); ms = t(lambda: a @ b); rate = 2 * 8192**3 / ms / 1e9; print(f"matmul 8192: {rate:.0f} TFLOP/s"); open("/tmp/rate", "w").write(str(rate * 1e12))
big = r(2**30); c = torch.empty_like(big); ms = t(lambda: c.copy_(big)); print(f"copy {4 * 2**30 / ms / 1e9:.2f} TB/s"); del big, c
M, total = 65536, 0
for n, k, count, what in ((2304, 768, 12, "c_attn"), (768, 768, 12, "c_proj"), (3072, 768, 12, "c_fc"), (768, 3072, 12, "mlp.c_proj"), (50304, 768, 1, "head")):
    x, w, g = r(M, k), r(n, k), r(M, n); row = []
    bias = r(n)
    for kind, f in (("fwd", lambda: torch.addmm(bias, x, w.T)), ("dx", lambda: g @ w), ("dw", lambda: g.T @ x)):
        ms = t(f, 5); total += ms * count; row.append(f"{kind} {ms:.3f} ms {2*M*n*k/ms/1e9:.0f} TF")
    print(f"{what:11s} x{count}", " | ".join(row))
print(f"all products of a 124M step: {total:.1f} ms")
from torch.nn.attention import SDPBackend, sdpa_kernel
qkv = r(64, 1024, 3, 12, 64).requires_grad_(); q, k, v = (p.transpose(1, 2) for p in qkv.unbind(2)); do = r(64, 12, 1024, 64)
for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
    with sdpa_kernel(b):
        f = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        fw = t(f, 5); y = f(); bw = t(lambda: torch.autograd.grad(y, (q, k, v), do, retain_graph=True), 5); flop = 4 * 64 * 12 * 1024 * 1024 * 64 / 2
        print(f"{b} fwd {fw:.3f} ms {flop/fw/1e9:.0f} TF, bwd {bw:.3f} ms {2.5*flop/bw/1e9:.0f} TF, x12 {12*(fw+bw):.1f} ms")
