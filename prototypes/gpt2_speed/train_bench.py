"""One variant of the training step: compiles beside other processes, times alone (a lock).
usage: train_bench.py NAME SIZE BATCH key=value ..."""
import contextlib, copy, fcntl, json, os, statistics, sys, time, traceback
import torch, torch.nn as nn, torch._functorch.config, torch._inductor.config
import fast_model as fm
from torch.nn.attention import SDPBackend, sdpa_kernel
name, size, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
opt = dict(kind="twin", ce="plain", attention="default", embedding="plain", mode="default", det="0", graph="0", clip="scale", steps="12", prof="0", compile="1", tma="0", coord="0")
opt |= dict(a.split("=", 1) for a in sys.argv[4:])
out = os.environ.get("OUT", "/tmp"); dev = "cuda" if torch.cuda.is_available() else "cpu"
config = fm.Config(**fm.SIZES[size]); T = config.context
for key in ("ce", "attention", "embedding"): fm.FLAGS[key] = opt[key]
torch.manual_seed(0); torch.set_float32_matmul_precision("high")
if hasattr(torch._functorch.config, 'force_non_lazy_backward_lowering'): torch._functorch.config.force_non_lazy_backward_lowering = True
if opt["det"] == "1":
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=opt.get("warn") == "1"); torch.utils.deterministic.fill_uninitialized_memory = False
if opt["tma"] == "1": torch._inductor.config.triton.enable_persistent_tma_matmul = True
if opt["coord"] == "1": torch._inductor.config.coordinate_descent_tuning = True
if "mor" in opt: torch._inductor.config.triton.mix_order_reduction = opt["mor"] == "1"
if opt["kind"] == "nanogpt":
    import nanogpt_model
    with contextlib.redirect_stdout(None):
        model = nanogpt_model.GPT(nanogpt_model.GPTConfig(block_size=T, vocab_size=config.padded, n_layer=config.layers, n_head=config.heads, n_embd=config.width, dropout=0.0, bias=True))
else: model = fm.GPT(config)
model.to(dev); twin = opt["kind"] in ("twin", "nanogpt_bf16")
network = copy.deepcopy(model).to(torch.bfloat16) if twin else model
params, halves = list(model.parameters()), list(network.parameters())
groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1}, {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
graph = opt["graph"] == "1"
optimiser = torch.optim.AdamW(groups, lr=torch.tensor(6e-4, device=dev) if graph else 6e-4, betas=(0.9, 0.95), fused=True, capturable=graph and dev == "cuda")
tokens = torch.randint(config.vocab_size, (batch, T + 1), device=dev); x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
auto = lambda: torch.autocast(dev, torch.bfloat16, enabled=not twin)
def loss_of(x, y):
    with auto():
        return network(x, y)[1] if opt["kind"] == "nanogpt" else network(x, y) / y.numel()
mode = None if opt["mode"] == "default" else opt["mode"]
fn = torch.compile(loss_of, dynamic=False, mode=mode) if opt["compile"] == "1" else loss_of
if opt["compile"] == "region":
    for block in network.h: block.compile(dynamic=False)
    if opt["kind"] == "twin": fm.head_loss_region = torch.compile(fm.head_loss_region, dynamic=False)
backend = {"cudnn": [SDPBackend.CUDNN_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}.get(opt["attention"])
context = (lambda: sdpa_kernel(backend)) if backend and dev == "cuda" else contextlib.nullcontext
if twin:
    for p in params: p.grad = torch.zeros_like(p)
found = torch.zeros((), device=dev)
@torch.enable_grad()
def forward_backward():
    with context(): loss = fn(x, y)
    loss.backward()
    return loss
@torch.no_grad()
def step():
    loss = forward_backward()
    if twin:
        torch._foreach_copy_([p.grad for p in params], [p.grad for p in halves])
        for p in halves: p.grad = None
    if opt["clip"] == "scale":
        norm = nn.utils.get_total_norm([p.grad for p in params])
        optimiser.grad_scale, optimiser.found_inf = norm.clamp(min=1.0), (~torch.isfinite(norm)).float()
    else:
        norm = nn.utils.clip_grad_norm_(params, 1.0)
    optimiser.step()
    if twin: torch._foreach_copy_(halves, params)
    else: optimiser.zero_grad(set_to_none=not graph)
    return loss
def sync():
    if dev == "cuda": torch.cuda.synchronize()
res = dict(name=name, size=size, batch=batch, **opt)
t0 = time.time()
if dev == "cuda" and opt["compile"] != "0":
    torch.cuda.set_per_process_memory_fraction(float(opt.get("frac", "0.03")))
    try:
        with context(): fn(x, y)
    except torch.OutOfMemoryError: pass
    torch.cuda.set_per_process_memory_fraction(1.0); torch.cuda.empty_cache()
res["compile_s"] = time.time() - t0
lock = open("/tmp/gpu.time.lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
if os.path.exists('/tmp/ce.json') and opt.get('bestce') == '1': fm.CE.update(json.load(open('/tmp/ce.json')))
try:
    if dev == "cuda": torch.cuda.reset_peak_memory_stats()
    side = torch.cuda.Stream() if graph and dev == 'cuda' else None
    if side: torch.cuda.set_stream(side)
    t1 = time.time(); step(); sync(); res["first_s"] = time.time() - t1
    for _ in range(3): loss = step()
    sync()
    if graph and dev == "cuda":
        s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(s):
            for _ in range(3): step()
        torch.cuda.current_stream().wait_stream(s)
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): step()
        run = g.replay
    else: run = step
    run(); sync(); times = []
    for _ in range(3):
        n = int(opt["steps"]) // 3; sync(); s = time.perf_counter()
        for _ in range(n): run()
        sync(); times.append((time.perf_counter() - s) / n)
    d = min(times); rate = float(os.environ.get("RATE", "790e12"))
    res |= dict(ms=d * 1e3, spread=max(times) / d - 1, tokens_per_s=batch * T / d, tflops=batch * T / d * fm.flops_per_token(config) / 1e12,
                share=batch * T / d * fm.flops_per_token(config) / rate, loss=float(loss.detach()))
    if dev == "cuda": res["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if opt.get("repeat") == "1":  # are two gradients of one state equal to the bit?
        grads = []
        for _ in range(2):
            forward_backward()
            grads.append([p.grad.clone() for p in halves])
            for p in halves: p.grad = None
        res["repeatable"] = all(torch.equal(a, b) for a, b in zip(*grads))
        res["differs"] = [n for (n, _), a, b in zip(network.named_parameters(), *grads) if not torch.equal(a, b)][:4]
        del grads
    if opt["prof"] == "1" and dev == "cuda":
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(3): run()
            sync()
        with open(f"{out}/prof-{name}.txt", "w") as f:
            rows = sorted(p.key_averages(), key=lambda r: -r.self_device_time_total)
            for r in rows[:70]: f.write(f"{r.self_device_time_total/3e3:8.3f} ms {r.count//3:5d} {r.key[:150]}\n")
            f.write(f"sum {sum(r.self_device_time_total for r in rows)/3e3:.1f} ms\n")
except Exception as error:
    res["error"] = f"{type(error).__name__}: {str(error)[:300]}"; traceback.print_exc()
with open(f"{out}/train.jsonl", "a") as f: f.write(json.dumps(res) + "\n")
print(f"{name:26s} {size:11s} " + (res.get("error") or f"{res['ms']:8.2f} ms {res['tokens_per_s']/1e3:7.1f}k tok/s {res['tflops']:5.0f} TF {res['share']:.1%} spread {res['spread']:.1%} peak {res.get('peak_gib', 0):.1f} GiB compile {res['compile_s']:.0f}+{res['first_s']:.0f} s loss {res['loss']:.3f} {res.get('repeatable', '')} {res.get('differs','')}"), flush=True)
