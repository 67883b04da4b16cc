"""Benchmark: python bench.py train SIZE BATCH [--quantize int8] [--eager N] [--steps N] [--profile] [--order random|grouped]"""
import argparse, collections, gc, json, os, sys, time, warnings
T0 = time.time()
warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np, torch
import fast_t5 as f
from peft import LoraConfig, TaskType, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, logging
logging.set_verbosity_error()
HERE = os.path.dirname(os.path.abspath(__file__))
GEOMETRY = {"tiny": (64, 128, 2, 4), "small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16),
            "xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}
CUDA = torch.cuda.is_available()
DEV = "cuda" if CUDA else "cpu"
sync = torch.cuda.synchronize if CUDA else (lambda: None)
gib = lambda: torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0

def data(split="train"):
    d = np.load(f"{HERE}/tokens.npz")
    cut = lambda n: np.split(d[f"{split}_{n}"].astype(np.int64), d[f"{split}_{n}_len"].cumsum()[:-1])
    return [x.tolist() for x in cut("source")], [x.tolist() for x in cut("target")]

def build(size, dtype=torch.bfloat16, dropout=0.1, lora_dropout=0.05):
    d, ff, layers, heads = GEOMETRY[size]
    config = T5Config(vocab_size=32128, d_model=d, d_kv=64 if size != "tiny" else 16, d_ff=ff, num_layers=layers, num_decoder_layers=layers, num_heads=heads,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=dropout)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(dtype)
    with torch.device(DEV):
        model = T5ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q", "k", "v", "o"], lora_dropout=lora_dropout, bias="none", task_type=TaskType.SEQ_2_SEQ_LM))
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.float()
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(0, 0.01)
    return model.train()

def flops(size, s, t):
    d, ff, layers, heads = GEOMETRY[size]
    a, m, kv = 4 * d * 64 * heads, 3 * d * ff, 2 * d * 64 * heads
    return 4 * (s * layers * (a + m + kv) + t * (layers * (a + m + kv) + 32128 * d))

def ceiling():
    a, b = (torch.randn(8192, 8192, device=DEV, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3): a @ b
    sync(); s = time.time()
    for _ in range(20): a @ b
    sync(); return 2 * 8192**3 * 20 / (time.time() - s) / 1e12

def order(lengths, batch, kind, seed=42):
    rng = np.random.default_rng([seed, 0])
    o, chunk, out = rng.permutation(len(lengths)), 50 * batch, []
    for start in range(0, len(o), chunk):
        r = o[start:start + chunk].tolist()
        if kind == "grouped": r.sort(key=lambda i: -lengths[i])
        out += [r[i:i + batch] for i in range(0, len(r), batch)]
    out = [b for b in out if len(b) == batch]
    return [out[i] for i in rng.permutation(len(out))]

def padded(sources, targets, rows, multiple=8):
    def pad(lists, fill):
        w = -(-max(map(len, lists)) // multiple) * multiple
        return torch.tensor([x + [fill] * (w - len(x)) for x in lists])
    x = pad([sources[i] for i in rows], 0)
    b = {"input_ids": x, "attention_mask": (x != 0).long(), "labels": pad([targets[i] for i in rows], -100)}
    return {k: v.to(DEV, non_blocking=True) for k, v in b.items()}

def eager(model, sources, targets, batches, warm=3):
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    params = [p for p in model.parameters() if p.requires_grad]
    n = 0
    for k, rows in enumerate(batches):
        if k == warm: sync(); start = time.time(); n = 0
        with torch.autocast(DEV, torch.bfloat16):
            model(**padded(sources, targets, rows), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step(); opt.zero_grad(set_to_none=True); n += len(rows)
    sync(); return n / (time.time() - start)

def kinds_of(name):
    n = name.lower()
    if n.startswith("forward_kernel") or "backward_q_kernel" in n or "backward_kv_kernel" in n: return "our attention"
    if "dequant" in n: return "dequantise"
    if any(x in n for x in ("nvjet", "gemm", "cutlass", "xmma", "cublas", "splitk")): return "products"
    if n.startswith("triton"): return "inductor"
    if "memcpy" in n or "memset" in n: return "copies"
    return "other torch"

def profile(step, n=3, top=28):
    from torch.profiler import ProfilerActivity, profile as prof
    with prof(activities=[ProfilerActivity.CUDA]) as p:
        for i in range(n): step(i)
        sync()
    t, c, kt = collections.Counter(), collections.Counter(), collections.Counter()
    kc = collections.Counter()
    for e in p.events():
        if str(e.device_type).endswith("CUDA"):
            us = e.device_time if hasattr(e, "device_time") else e.cuda_time
            t[e.name] += us / n; c[e.name] += 1 / n; kt[kinds_of(e.name)] += us / n; kc[kinds_of(e.name)] += 1 / n
    print("  by kind (us, launches per step):", {k: (round(v), round(kc[k])) for k, v in kt.most_common()}, "sum", round(sum(kt.values())))
    for name, us in t.most_common(top): print(f"   {us:8.0f} us {c[name]:6.0f} x {us / max(c[name], 1e-9):7.1f}  {name[:110]}")

def train(a):
    torch.cuda.init() if CUDA else None
    start = time.time(); model = build(a.size); sync(); built = time.time() - start
    sources, targets = data()
    grouped = order([len(s) for s in sources], a.batch, "grouped")
    usual = None
    if a.eager:
        try: usual = eager(model, sources, targets, grouped[:a.eager])
        except torch.OutOfMemoryError: usual = "OOM"
        if CUDA: torch.cuda.empty_cache(); peak_usual = gib(); torch.cuda.reset_peak_memory_stats(); print(f"  usual recipe: {usual} rows/s, peak {peak_usual:.1f} GiB", flush=True)
    for p in model.parameters(): p.grad = None
    begin = time.time()
    packed = f.PackedT5(model, compiled=CUDA and not a.no_compile, quantize=a.quantize)
    gc.collect(); CUDA and torch.cuda.empty_cache(); CUDA and torch.cuda.reset_peak_memory_stats()
    flat = torch.nn.Parameter(packed.masters); flat.grad = packed.gradients  # one tensor: one launch
    opt = torch.optim.AdamW([flat], 1e-4, fused=True, **({"capturable": True} if CUDA else {}))
    step = f.GraphedStep(packed, opt, 1.0, 42)
    batches = order([len(s) for s in sources], a.batch, a.order)[:a.steps]
    losses = []
    micro = a.batch // a.micro
    def one(k, rows):
        parts = [rows[i * a.micro:(i + 1) * a.micro] for i in range(micro)]
        n = sum(len(targets[i]) for i in rows)
        for m, part in enumerate(parts):
            b = f.pack([sources[i] for i in part], [targets[i] for i in part], a.micro)
            if CUDA: b = {k2: v.pin_memory() for k2, v in b.items()}
            loss = step.gradients(b, k, 1 / n, m)
        step.update(1e-4)
        return loss
    one(0, batches[0]); sync()
    ready = time.time() - begin
    if a.selfcheck:  # compiled against the same code run eagerly, with all its dropout
        b = {k2: v.to(DEV) for k2, v in (f.pack([sources[i] for i in batches[0]], [targets[i] for i in batches[0]], a.batch) | {"seeds": step.seeds(7)}).items()}
        compiled, raw = (packed.embed, packed.encoder_block, packed.output, packed.decoder_block, packed.output_loss), (f.embed, f.encoder_block, f.output, f.decoder_block, f.output_loss)
        got = []
        for fns in (compiled, raw):
            packed.embed, packed.encoder_block, packed.output, packed.decoder_block, packed.output_loss = fns
            packed.gradients.zero_(); l = packed.backward(b, torch.tensor(1e-3, device=DEV)); got.append((float(l), packed.gradients.clone()))
        packed.embed, packed.encoder_block, packed.output, packed.decoder_block, packed.output_loss = compiled
        packed.gradients.zero_()
        print(f"CHECK compiled against eager with dropout: loss {got[0][0]:.5f} {got[1][0]:.5f}, gradient difference {float((got[0][1] - got[1][1]).norm() / got[1][1].norm()):.4f}", flush=True)
        del got
    if a.wait: wait_for_turn()
    print(f"  {a.size} B={a.batch} {a.quantize or ''} built in {built:.1f} s; first step after {ready:.1f} s (process {time.time() - T0:.0f} s)", flush=True)
    s = time.time()
    for k, rows in enumerate(batches): losses.append(one(k, rows).clone())
    sync(); first_pass = time.time() - s
    for k, rows in enumerate(batches): one(k, rows)
    sync(); first_pass = [round(first_pass, 1), round(time.time() - s - first_pass, 1)]
    best = 0
    for _ in range(2):
        s = time.time()
        for k, rows in enumerate(batches): one(k, rows)
        sync(); rate = a.batch * len(batches) / (time.time() - s); best = max(best, rate)
    real = sum(flops(a.size, sum(len(sources[i]) for i in r), sum(len(targets[i]) for i in r)) for r in batches)
    tf = real / (a.batch * len(batches)) * best / 1e12
    host = time.time()
    for k, rows in enumerate(batches[:20]): f.pack([sources[i] for i in rows], [targets[i] for i in rows], a.batch)
    host = (time.time() - host) / 20 * 1e3
    result = dict(size=a.size, batch=a.batch, quantize=a.quantize, order=a.order, usual=usual, rows_s=round(best, 1), tflops=round(tf, 1), peak=round(gib(), 2), ready=round(ready, 1), built=round(built, 1),
                  shapes=len(step.graphs), capture=round(float(np.median(step.capture_seconds)), 2), first_pass=first_pass, pack_ms=round(host, 2), micro=a.micro,
                  reserved=round(torch.cuda.memory_reserved() / 2**30, 1) if CUDA else 0, loss=[round(float(x), 3) for x in losses[:3]], finite=bool(torch.isfinite(torch.stack(losses)).all()))
    print("RESULT", json.dumps(result), flush=True)
    if a.profile and CUDA:
        k = max(range(len(batches[:8])), key=lambda i: -abs(sum(len(sources[j]) for j in batches[i]) - 150 * a.batch))
        print("  profiled batch: source tokens", sum(len(sources[j]) for j in batches[k]), "target", sum(len(targets[j]) for j in batches[k]))
        profile(lambda i: one(k, batches[k]))

def check(a):
    """Loss and gradients, packed bf16 against the HF model in bf16 and fp32, no dropout."""
    sources, targets = data(); rows = order([len(s) for s in sources], 8, "random")[0]
    def ref(dtype):
        torch.manual_seed(0); m = build(a.size, dtype, 0.0, 0.0)
        b = padded(sources, targets, rows)
        with torch.autocast(DEV, torch.bfloat16, enabled=dtype != torch.float32):
            loss = m(**b, use_cache=False).loss
        loss.backward(); return m, loss.item(), {n: p.grad.float() for n, p in m.named_parameters() if p.requires_grad}
    torch.backends.cuda.matmul.allow_tf32 = False
    m, l16, g16 = ref(torch.bfloat16)
    state = {k: v.clone() for k, v in m.state_dict().items()}
    torch.manual_seed(0); m32 = build(a.size, torch.float32, 0.0, 0.0); m32.load_state_dict({k: v.float() for k, v in state.items()})
    out = m32(**padded(sources, targets, rows), use_cache=False).loss; out.backward(); l32 = out.item()
    g32 = {n: p.grad for n, p in m32.named_parameters() if p.requires_grad}
    for p in m.parameters(): p.grad = None
    packed = f.PackedT5(m, compiled=CUDA and not a.no_compile)
    b = {k: v.to(DEV) for k, v in (f.pack([sources[i] for i in rows], [targets[i] for i in rows], 8) | {"seeds": torch.zeros(2 * GEOMETRY[a.size][2] + 1, f.SITES, dtype=torch.int32)}).items()}
    loss = packed.backward(b, torch.tensor(1 / sum(len(targets[i]) for i in rows), device=DEV))
    gp = {n: p.grad for n, p in m.named_parameters() if p.requires_grad}
    flat = lambda g: torch.cat([g[n].flatten() for n in g32])
    e = lambda x: float((flat(x) - flat(g32)).norm() / flat(g32).norm())
    worst = lambda x: max(float((x[n] - g32[n]).norm() / g32[n].norm().clamp(min=1e-12)) for n in g32)
    print(f"CHECK {a.size} loss fp32 {l32:.5f} hf-bf16 {l16:.5f} packed {float(loss):.5f}; gradient error hf-bf16 {e(g16):.4f} (worst {worst(g16):.3f}) packed {e(gp):.4f} (worst {worst(gp):.3f})", flush=True)

def generate(a):
    """All test dialogues: generate() as the script calls it, against Generator; agreement of tokens."""
    model = build(a.size, dropout=0.0); model.eval()
    sources, targets = data("test"); sources, targets = sources[:a.limit], targets[:a.limit]
    new = 128 if CUDA else 12
    model.merge_adapter(); base = model.base_model.model
    settings = dict(do_sample=False, max_new_tokens=new)
    def hf(rows, batch):
        out, order = {}, sorted(rows, key=lambda i: -len(sources[i]))
        sync(); s = time.time()
        for k in range(0, len(order), batch):
            part = order[k:k + batch]; w = -(-max(len(sources[i]) for i in part) // 64) * 64
            x = torch.tensor([sources[i] + [0] * (w - len(sources[i])) for i in part], device=DEV)
            with torch.inference_mode(): y = base.generate(input_ids=x, attention_mask=(x != 0).long(), **settings)
            for i, r in zip(part, y[:, 1:].tolist()): out[i] = r[:r.index(1)] if 1 in r else r
        sync(); return out, time.time() - s
    packed = f.PackedT5(model, compiled=False)
    rows = min(a.rows, len(sources)); most = max(f.size_class(sum(map(len, sources[i:i + rows]))) for i in range(0, len(sources), rows))
    s = time.time(); g = f.Generator(packed, new, rows, most)
    first = g(sources); sync(); cold = time.time() - s
    s = time.time(); mine = g(sources); sync(); worst = time.time() - s
    lengths = [len(t) for t in targets]
    g(sources, lengths); sync(); s = time.time(); g(sources, lengths); sync(); real = time.time() - s
    print("RESULT", json.dumps(dict(what="generate", size=a.size, rows=rows, cold=round(cold, 2), no_end=round(worst, 2), real_lengths=round(real, 2), same_twice=first == mine, peak=round(gib(), 1), graphs=sorted(g.graphs))), flush=True)
    if CUDA and a.profile:
        g.active = g.rows; g.position.fill_(60); print("  one token of", g.rows, "rows:"); profile(lambda i: g.graphs[g.rows].replay(), 3, 14)
    n = min(32, len(sources)); theirs, seconds = hf(range(len(sources) if a.full else n), 256)
    k = min(8, n); other, _ = hf(range(k), 8)
    agree = lambda x, y, ids: (sum(x[i] == y[i] for i in ids), float(np.mean([next((k for k, (p, q) in enumerate(zip(x[i], y[i])) if p != q), min(len(x[i]), len(y[i]))) for i in ids])))
    print(f"RESULT generate(): {seconds:.1f} s for {len(theirs)} rows; rows equal / mean common prefix: ours-theirs {agree(mine, theirs, theirs)} of {len(theirs)}, theirs-theirs at batch 8 {agree(theirs, other, other)} of {k}, the same rows ours-theirs {agree(mine, theirs, other)}", flush=True)

def wait_for_turn():
    """Timed parts of several processes one after another: A waits for the tuner, B for A."""
    while not os.path.exists("/tmp/turn." + os.environ["TURN"]): time.sleep(0.1)
    if os.path.exists("/tmp/tiles.json"): f.TILES.update(json.load(open("/tmp/tiles.json")))

def tiny(a):
    """200 steps of the real tiny model without dropout: transformers' eager, packed, packed with graphs."""
    from transformers import AutoModelForSeq2SeqLM
    d = np.load(f"{HERE}/tiny_tokens.npz")
    cut = lambda n: [x.tolist() for x in np.split(d[n].astype(np.int64), d[n + "_len"].cumsum()[:-1])]
    sources, targets = cut("source"), cut("target")
    batches = order([len(s) for s in sources], 8, "grouped")[:a.steps]
    curves = {}
    def fresh(drop):
        torch.manual_seed(0)
        m = AutoModelForSeq2SeqLM.from_pretrained(f"{HERE}/../../resource/flan-t5-tiny", dtype=torch.bfloat16, dropout_rate=drop).to(DEV)
        m.config.dropout_rate = drop
        m = get_peft_model(m, LoraConfig(r=16, lora_alpha=32, target_modules=["q", "k", "v", "o"], lora_dropout=drop / 2, task_type=TaskType.SEQ_2_SEQ_LM)).train()
        for p in m.parameters():
            if p.requires_grad: p.data = p.data.float()
        return m
    for drop in (0.0, 0.1):
        for name in ("usual", "usual again", "fast"):
            m = fresh(drop); ps = [p for p in m.parameters() if p.requires_grad]; torch.manual_seed(len(name)); losses = []
            if name.startswith("usual"):
                opt = torch.optim.AdamW(ps, 1e-3, fused=True)
                for rows in batches:
                    with torch.autocast(DEV, torch.bfloat16):
                        loss = m(**padded(sources, targets, rows, 8 if name == "usual" else 64), use_cache=False).loss
                    loss.backward(); torch.nn.utils.clip_grad_norm_(ps, 1.0); opt.step(); opt.zero_grad(); losses.append(loss.detach())
            else:
                packed = f.PackedT5(m, compiled=False); flat = torch.nn.Parameter(packed.masters); flat.grad = packed.gradients
                opt = torch.optim.AdamW([flat], 1e-3, fused=True, **({"capturable": True} if CUDA else {}))
                step = f.GraphedStep(packed, opt, 1.0, 42)
                for k, rows in enumerate(batches):
                    losses.append(step.gradients(f.pack([sources[i] for i in rows], [targets[i] for i in rows], 8), k, 1 / sum(len(targets[i]) for i in rows)).clone()); step.update(1e-3)
            curves[drop, name] = torch.stack(losses).float().cpu().numpy()
        u, v, w = (curves[drop, n] for n in ("usual", "usual again", "fast"))
        print(f"CHECK tiny dropout {drop}: mean loss first 20 / last 20: usual {u[:20].mean():.4f} {u[-20:].mean():.4f}, other padding {v[:20].mean():.4f} {v[-20:].mean():.4f}, fast {w[:20].mean():.4f} {w[-20:].mean():.4f}; mean |difference|: fast-usual {abs(w - u).mean():.5f}, usual-usual {abs(v - u).mean():.5f}; mean difference fast-usual {(w - u).mean():+.5f}", flush=True)

def parse(words):
    p = argparse.ArgumentParser()
    p.add_argument("what"); p.add_argument("size", nargs="?", default="xl"); p.add_argument("batch", type=int, nargs="?", default=8)
    p.add_argument("--quantize"); p.add_argument("--eager", type=int, default=0); p.add_argument("--steps", type=int, default=40)
    p.add_argument("--profile", action="store_true"); p.add_argument("--order", default="random"); p.add_argument("--no-compile", action="store_true"); p.add_argument("--micro", type=int)
    p.add_argument("--rows", type=int, default=410); p.add_argument("--limit", type=int, default=10**6); p.add_argument("--full", action="store_true"); p.add_argument("--selfcheck", action="store_true"); p.add_argument("--wait", action="store_true")
    a = p.parse_args(words); a.micro = a.micro or a.batch
    return a

if __name__ == "__main__":
    torch._dynamo.config.recompile_limit = 64
    for job in " ".join(sys.argv[1:]).split("/"):
        a, start = parse(job.split()), time.time()
        print("JOB", job.strip(), flush=True)
        try:
            if a.what == "ceiling": print(f"CEILING {ceiling():.0f} TFLOP/s on {torch.cuda.get_device_name()}", flush=True)
            else: {"train": train, "check": check, "generate": generate, "tiny": tiny}[a.what](a)
        except Exception as e:
            import traceback; print("FAILED", type(e).__name__, str(e)[:500], flush=True); traceback.print_exc()
        gc.collect()
        if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        print(f"DONE in {time.time() - start:.0f} s, process {time.time() - T0:.0f} s, allocated left {torch.cuda.memory_allocated() / 2**30 if CUDA else 0:.1f} GiB", flush=True)
