"""124M on source text: recipes against each other, same data, slice and seconds.
python final.py data                                    # finds text on this machine, tokenises on all cores -> /tmp/text
python final.py run NAME SECONDS key=value ...          # recipe = nanogpt | adamw | muon
One 10-minute call: see final.sh."""
import sys, os, json, math, time, copy, glob, random
import numpy as np, torch, torch.nn as nn
import fast_model as fm
OUT, DATA = os.environ.get("OUT", "/tmp"), os.environ.get("TEXT", "/tmp/text")

def prepare(limit=10**9):
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.BPE.from_file("tok/vocab.json", "tok/merges.txt")); tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = []
    for root in sys.path[1:] + ["/usr/lib/python3", "/usr/include", "/usr/local/cuda/include", "/usr/share/doc", "/opt"]:
        for folder, _, names in os.walk(root or "."): files += [os.path.join(folder, n) for n in names if n.endswith((".py", ".pyi", ".h", ".hpp", ".cuh", ".c", ".txt", ".rst", ".md", ".js"))]
    files = sorted({os.path.realpath(f) for f in files}); random.Random(0).shuffle(files)
    seen, texts, size = set(), [], 0
    for f in files:
        try: b = open(f, "rb").read()
        except OSError: continue
        if not 200 < len(b) < 2**20 or b"\0" in b or hash(b) in seen: continue
        try: t = b.decode()
        except UnicodeDecodeError: continue
        seen.add(hash(b)); texts.append(t); size += len(b)
        if size > limit: break
    print(f"{len(texts)} files, {size / 1e6:.0f} MB", flush=True); t0 = time.time(); os.makedirs(DATA, exist_ok=True)
    cut = max(2, min(len(texts) // 20, 400)); held = sum(len(t.encode()) for t in texts[:cut])
    for split, part in (("val", texts[:cut]), ("train", texts[cut:])):
        with open(f"{DATA}/{split}.bin", "wb") as f:
            for a in range(0, len(part), 512):
                for e in tok.encode_batch_fast(part[a : a + 512]): f.write(np.array([50256, *e.ids], np.uint16).tobytes())
    json.dump({"val_bytes": held}, open(f"{DATA}/facts.json", "w"))
    print({s: os.path.getsize(f"{DATA}/{s}.bin") // 2 for s in ("train", "val")}, f"tokens in {time.time() - t0:.0f} s", flush=True)

from recipe import orthogonalise, Order
class Muon:
    """Muon for the hidden matrices, stacked by shape; q, k and v are three."""
    def __init__(self, matrices, momentum, weight_decay):
        self.groups, self.momentum, self.wd = {}, momentum, weight_decay
        for name, p in matrices:
            for part in (range(3) if "c_attn" in name else [None]):
                shape = (p.shape[0] // 3, p.shape[1]) if part is not None else tuple(p.shape)
                self.groups.setdefault(shape, []).append((p, part))
        self.buffers = {shape: torch.zeros(len(e), *shape, device=e[0][0].device) for shape, e in self.groups.items()}
    @staticmethod
    def update(g, buffer, momentum):
        buffer.lerp_(g, 1 - momentum)
        u = torch.lerp(g, buffer, momentum)
        return orthogonalise(u.bfloat16() if u.is_cuda else u, 5)
    @torch.no_grad()
    def step(self, lr, scale):
        view = lambda t, part: t if part is None else t.chunk(3)[part]
        for shape, entries in self.groups.items():
            g = torch.stack([view(p.grad, part) for p, part in entries]) * scale
            u = self.update(g, self.buffers[shape], self.momentum).float()
            weights = [view(p, part) for p, part in entries]
            torch._foreach_mul_(weights, 1 - lr * self.wd)
            torch._foreach_add_(weights, list(u.unbind()), alpha=-lr * 0.2 * math.sqrt(max(shape)))

RECIPES = {"nanogpt": dict(lr=6e-4, schedule="cosine", final=0.1, warm=0.05, zero=0, wd=0.1, b2=0.95),
           "adamw": dict(lr=1.8e-3, schedule="linear", final=0.0, warm=0.05, zero=0, wd=0.1, b2=0.95),
           "muon": dict(lr=3e-3, muon_lr=0.01, schedule="wsd", decay=0.6, final=0.0, warm=0.02, zero=1, wd=0.1, b2=0.95, momentum=0.95)}
def run(name, seconds, opt):
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    s = dict(recipe="muon", size="gpt2", rows=64, accumulate=4, seed=0, muon_lr=0.0, momentum=0.95, decay=0.6, evals=12, context=0) | RECIPES[opt.get("recipe", "muon")]
    for k, v in opt.items(): s[k] = type(s[k])(v) if k in s else v
    fm.FLAGS["ce"] = "fused"; fm.CE.update(BLOCK=4096, num_warps=8)
    torch.manual_seed(s["seed"]); kw = dict(fm.SIZES[s["size"]]); kw["vocab_size"] = 50257
    if s["context"]: kw["context"] = s["context"]
    c = fm.Config(**kw); T = c.context; rows, acc = s["rows"], s["accumulate"]
    train, val = (np.memmap(f"{DATA}/{x}.bin", np.uint16, "r") for x in ("train", "val")); bytes_ = json.load(open(f"{DATA}/facts.json"))["val_bytes"]
    model = fm.GPT(c, zero_proj=bool(s["zero"])).to(dev); twin = copy.deepcopy(model).to(torch.bfloat16 if dev == 'cuda' else torch.float32)
    params, halves = list(model.parameters()), list(twin.parameters())
    for p in params: p.grad = torch.zeros_like(p)
    hidden = [(n, p) for n, p in model.named_parameters() if p.dim() == 2 and ".h." in "." + n] if s["recipe"] == "muon" else []
    ids = {id(p) for _, p in hidden}; rest = [p for p in params if id(p) not in ids]
    adam = torch.optim.AdamW([dict(params=[p for p in rest if p.dim() > 1], weight_decay=s["wd"]), dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)], lr=s["lr"], betas=(0.9, s["b2"]), fused=True)
    muon = Muon(hidden, s["momentum"], s["wd"]) if hidden else None
    network = torch.compile(twin, dynamic=False) if dev == "cuda" else twin
    def batch(i):
        starts = order.starts(i * rows, rows)
        b = torch.from_numpy(np.stack([train[a : a + T + 1] for a in starts]).astype(np.int64)); b = b.pin_memory().to(dev, non_blocking=True) if dev == "cuda" else b
        return b[:, :-1], b[:, 1:]
    order = Order(train, T, s["seed"])
    def step(i, rate):
        total = 0
        for k in range(acc):
            x, y = batch(i * acc + k); loss = network(x, y) / (acc * rows * T); loss.backward(); total = total + loss.detach()
            torch._foreach_add_([p.grad for p in params], [p.grad for p in halves])
            for p in halves: p.grad = None
        with torch.no_grad():
            norm = nn.utils.get_total_norm([p.grad for p in params]); adam.grad_scale, adam.found_inf = norm.clamp(min=1.0), (~torch.isfinite(norm)).float()
            for g in adam.param_groups: g["lr"] = s["lr"] * rate
            if muon: muon.step(s["muon_lr"] * rate, 1.0)  # orthogonalising makes the scale of a gradient irrelevant
            adam.step(); torch._foreach_zero_([p.grad for p in params]); torch._foreach_copy_(halves, params)
        return total
    sync = torch.cuda.synchronize if dev == "cuda" else (lambda: None)
    for i in range(3): step(i, 0.0)  # compiles; the rate is zero
    sync(); t = time.perf_counter()
    for i in range(3): step(i, 0.0)
    sync(); per = (time.perf_counter() - t) / 3; last = max(4, int(seconds / per))
    adam.state.clear()
    if muon: [b.zero_() for b in muon.buffers.values()]
    def evaluate():
        n = min(2**21, (len(val) - 1)) // (rows * T) * rows * T; total = 0.0
        with torch.no_grad():
            for a in range(0, n, rows * T):
                v = torch.from_numpy(val[a : a + rows * T + 1].astype(np.int64)).to(dev); total += float(network(v[:-1].view(rows, T), v[1:].view(rows, T)))
        return total / n
    spent, curve = 0.0, []; t = time.perf_counter()
    for i in range(last):
        w, d = s["warm"] * last, s["decay"]
        if i < w: rate = (i + 1) / w
        elif s["schedule"] == "cosine": rate = s["final"] + (1 - s["final"]) * 0.5 * (1 + math.cos(math.pi * (i - w) / (last - w)))
        elif s["schedule"] == "linear": rate = 1 - (1 - s["final"]) * (i - w) / (last - w)
        else: rate = min(1.0, (last - i) / (d * last)) * (1 - s["final"]) + s["final"]
        loss = step(i, rate)
        if (i + 1) % max(1, last // s["evals"]) == 0 or i + 1 == last:
            sync(); spent += time.perf_counter() - t; v = evaluate(); curve.append((i + 1, round(spent, 1), round(float(loss), 4), round(v, 4))); sync(); t = time.perf_counter()
    res = dict(name=name, **s, steps=last, seconds=spent, tokens=last * acc * rows * T, tokens_per_s=last * acc * rows * T / spent, val=v, curve=curve)
    with open(f"{OUT}/final.jsonl", "a") as f: f.write(json.dumps(res) + "\n")
    print(f"{name:22s} val {v:.4f} after {spent:.0f} s, {last} steps, {res['tokens_per_s']/1e3:.0f}k tok/s | " + " ".join(f"{a}:{b}" for _, a, _, b in curve), flush=True)
if __name__ == "__main__":
    if sys.argv[1] == "data": prepare(int(sys.argv[2]) if len(sys.argv) > 2 else 10**9)
    else: run(sys.argv[2], float(sys.argv[3]), dict(a.split("=", 1) for a in sys.argv[4:]))
