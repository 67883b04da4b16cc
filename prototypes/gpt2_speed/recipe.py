"""Nano recipe runs on CPU or GPU (CUDA graph of the whole step). recipe.py DATA_DIR OUT_JSONL < lines of key=value settings."""
import sys, os, json, math, time
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
import fast_model as fm
dev = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_float32_matmul_precision("high" if dev == "cuda" else "highest")
DEFAULT = dict(layers=4, heads=4, width=128, context=64, vocab=1024, rows=16, steps=1500, opt="adamw", lr=4e-3, muon_lr=0.02, b1=0.9, b2=0.95, wd=0.1, muon_wd=0.1, warmup=0.05,
               schedule="cosine", decay=0.2, final=0.1, zero=0, ns=5, momentum=0.95, mom_warm=0, embed_lr=1.0, head="tied", split=1, cautious=0, clip=1.0, seed=0, emb_std=0.02, scale="match", std=0.02, ramp=0, ema=0, eps=1e-8, nesterov=1, normlr=1.0)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
POLAR = [(8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985)]

def orthogonalise(g, steps, polar=False):
    """(n, a, b) -> the nearest semi-orthogonal matrices, by Newton-Schulz (Jordan et al. 2024)."""
    flip = g.shape[-2] > g.shape[-1]
    x = g.mT if flip else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * (1.02 if polar else 1) + 1e-7)
    for i in range(steps):
        a, b, c = POLAR[i] if polar else COEFFICIENTS
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if flip else x

class Order:
    def __init__(self, tokens, context, seed):
        self.context, self.n = context, max(1, (len(tokens) - context) // context); self.seed, self.len = seed, len(tokens)
    def starts(self, first, count):
        out = []
        while count:
            epoch, index = divmod(first, self.n)
            if epoch != getattr(self, "epoch", None):
                rng = np.random.default_rng([self.seed, epoch]); self.epoch = epoch
                self.offset = int(rng.integers(self.len - self.n * self.context)); self.order = rng.permutation(self.n)
            order = self.order[index : index + count]
            out.append(self.offset + order * self.context); first += len(order); count -= len(order)
        return np.concatenate(out)

def schedule(s, step, last):
    warm = s["warmup"] * last if s["warmup"] < 1 else s["warmup"]
    if step < warm: return (step + 1) / max(1, warm)
    if s["schedule"] == "cosine": return s["final"] + (1 - s["final"]) * 0.5 * (1 + math.cos(math.pi * (step - warm) / (last - warm)))
    if s["schedule"] == "linear": return max(s["final"], 1 - (1 - s["final"]) * (step - warm) / (last - warm))
    if s["schedule"] == "sqrt": d = s["decay"]; p = (step / last - (1 - d)) / d; return 1.0 if p < 0 else 1 - math.sqrt(p)
    return min(1.0, (last - step) / max(1, s["decay"] * last)) * (1 - s["final"]) + s["final"]

def run(s, data, max_seconds=None):
    s = DEFAULT | s; torch.manual_seed(s["seed"])
    train, val, nbytes = data[s["vocab"]]
    c = fm.Config(vocab_size=s["vocab"], context=s["context"], layers=s["layers"], heads=s["heads"], width=s["width"])
    m = fm.GPT(c, zero_proj=bool(s["zero"]))
    with torch.no_grad():
        m.wte.weight[: s["vocab"]] *= s["emb_std"] / 0.02
        for n, p in m.named_parameters():
            if p.dim() == 2 and "h." in n: p.mul_(s["std"] / 0.02)
    m.to(dev)
    ctx, rows, last = s["context"], s["rows"], s["steps"]
    order = Order(train, ctx, s["seed"]); starts = torch.from_numpy(order.starts(0, last * rows).reshape(last, rows)).to(dev)
    window = torch.arange(ctx + 1, device=dev)
    hidden = [(n, p) for n, p in m.named_parameters() if p.dim() == 2 and "h." in n] if s["opt"] == "muon" else []
    ids = {id(p) for _, p in hidden}
    rest = [(n, p) for n, p in m.named_parameters() if id(p) not in ids]
    one = lambda: torch.tensor(0.0, device=dev) if dev == "cuda" else 0.0
    groups = [dict(params=[p for n, p in rest if p.dim() == 2 and not n.startswith("wte")], weight_decay=s["wd"], lr=one()), dict(params=[p for n, p in rest if p.dim() < 2], weight_decay=0.0, lr=one()),
              dict(params=[m.wte.weight], weight_decay=s["wd"], lr=one())]
    factors = [1.0, s["normlr"], s["embed_lr"]]
    groups, factors = zip(*[(g, f) for g, f in zip(groups, factors) if g["params"]])
    adam = torch.optim.AdamW(list(groups), betas=(s["b1"], s["b2"]), eps=s["eps"], fused=True, **({"capturable": True} if dev == "cuda" else {}))
    # Muon on stacked matrices of one shape
    parts = {}
    for n, p in hidden:
        for k in range(3 if "c_attn" in n and s["split"] else 1):
            parts.setdefault((p.shape[0] // (3 if "c_attn" in n and s["split"] else 1), p.shape[1]), []).append((p, k, 3 if "c_attn" in n and s["split"] else 1))
    stacks = [(shape, entries, torch.zeros(len(entries), *shape, device=dev)) for shape, entries in parts.items()]
    muon_lr, momentum = torch.zeros((), device=dev), torch.full((), s["momentum"], device=dev)
    def piece(t, k, n): return t.chunk(n)[k] if n > 1 else t
    @torch.no_grad()
    def muon_step(lr):
        for shape, entries, buffer in stacks:
            g = torch.stack([piece(p.grad, k, n) for p, k, n in entries])
            buffer.lerp_(g, 1 - momentum)
            u = torch.lerp(g, buffer, momentum) if s["nesterov"] else buffer
            u = orthogonalise(u, s["ns"] % 10, s["ns"] > 10)
            f = 0.2 * math.sqrt(max(shape)) if s["scale"] == "match" else math.sqrt(max(1, shape[0] / shape[1]))
            for (p, k, n), w in zip(entries, u):
                t = piece(p, k, n)
                if s["cautious"]:
                    t.sub_(lr * s["muon_wd"] * t * ((w * t) > 0))
                elif s["muon_wd"]: t.mul_(1 - lr * s["muon_wd"])
                t.add_(w * (-lr * f))
    x_buf = torch.zeros(rows, ctx + 1, dtype=torch.int64, device=dev)
    train_t = train.to(dev)
    params = [p for p in m.parameters()]
    def step():
        loss = m(x_buf[:, :-1], x_buf[:, 1:]) / (rows * ctx)
        loss.backward()
        with torch.no_grad():
            if s["clip"]:
                norm = nn.utils.get_total_norm([p.grad for p in params]); torch._foreach_mul_([p.grad for p in params], (s["clip"] / (norm + 1e-6)).clamp(max=1.0))
            if hidden: muon_step(muon_lr)
            adam.step()
            for p in params: p.grad = None if dev == "cpu" else p.grad.zero_()
        return loss.detach()
    def set_rates(i):
        f = schedule(s, i, last)
        for g, e in zip(adam.param_groups, factors):
            if dev == "cuda": g["lr"].fill_(s["lr"] * f * e)
            else: g["lr"] = s["lr"] * f * e
        muon_lr.fill_(s["muon_lr"] * f)
        if s["mom_warm"]: momentum.fill_(0.85 + (s["momentum"] - 0.85) * min(1, i / s["mom_warm"]))
    graph, loss_out = None, None
    if dev == "cuda":
        state = {k: v.clone() for k, v in m.state_dict().items()}
        st = torch.cuda.Stream(); st.wait_stream(torch.cuda.current_stream()); set_rates(0)
        for g in adam.param_groups: g["lr"].zero_()
        muon_lr.zero_()
        with torch.cuda.stream(st):
            for _ in range(2): step()
        torch.cuda.current_stream().wait_stream(st)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): loss_out = step()
        m.load_state_dict(state)
        for p in params: p.grad.zero_()
        for v in adam.state.values():
            for t in v.values(): t.zero_()
        for _, _, b in stacks: b.zero_()
    losses, began = [], time.perf_counter()
    for i in range(last):
        set_rates(i); x_buf.copy_(train_t[starts[i][:, None] + window])
        if graph: graph.replay(); loss = loss_out
        else: loss = step()
        if i % 25 == 0: losses.append(float(loss))
        if i % 25 == 0 and not math.isfinite(losses[-1]): break
    if dev == "cuda": torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        total, v = 0.0, val.to(dev); n = (len(val) - 1) // ctx * ctx
        inputs, targets = v[:n].view(-1, ctx), v[1 : n + 1].view(-1, ctx)
        for a in range(0, len(inputs), 256): total += float(m(inputs[a : a + 256], targets[a : a + 256]))
    loss = total / n
    return dict(s, val=loss, bpb=loss * n / nbytes / math.log(2), seconds=seconds, ms=seconds / last * 1e3, tokens=last * rows * ctx, curve=losses[::4])

def load(folder):
    data = {}
    for v in (1024, 2048):
        f = os.path.join(folder, f"v{v}")
        if os.path.exists(f + ".train.bin"):
            t, w = (torch.from_numpy(np.fromfile(f"{f}.{x}.bin", np.uint16).astype(np.int64)) for x in ("train", "validation"))
            data[v] = (t, w, 400564)
    return data

if __name__ == "__main__":
    data = load(sys.argv[1])
    for line in sys.stdin:
        if not line.strip(): continue
        s = {}
        for item in line.split():
            k, v = item.split("=", 1); s[k] = type(DEFAULT[k])(v) if not isinstance(DEFAULT[k], str) else v
        try:
            r = run(s, data)
            print(f"{r['val']:.4f} nats {r['bpb']:.4f} bpb {r['seconds']:.1f} s {r['ms']:.1f} ms | {line.strip()}", flush=True)
            with open(sys.argv[2], "a") as f: f.write(json.dumps(r) + "\n")
        except Exception as e: print("FAILED", line.strip(), type(e).__name__, str(e)[:200], flush=True)
