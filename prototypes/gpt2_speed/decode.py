"""Prototype: GPT-2 decoding, five Triton kernels a layer, the step of all layers and the sampler in one CUDA graph."""
import math, os, time
import torch, torch.nn as nn, torch.nn.functional as F
import triton, triton.language as tl
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

def configs():
    if INTERPRET: return [triton.Config(dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32), num_warps=4)]
    one = [triton.Config(dict(BLOCK_M=1, BLOCK_N=n, BLOCK_K=k), num_warps=w) for n, k, w in
           ((4, 1024, 4), (8, 1024, 4), (8, 1024, 8), (16, 1024, 8), (16, 512, 4), (32, 512, 8), (4, 512, 2), (2, 1024, 2))]
    many = [triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k), num_warps=w, num_stages=s) for m, n, k, w, s in
            ((16, 16, 256, 4, 3), (16, 32, 128, 4, 4), (32, 32, 128, 4, 4), (64, 16, 128, 4, 4), (64, 32, 64, 4, 5), (64, 32, 128, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 128, 64, 8, 4))]
    return one + many
def prune(cs, args, **kw):
    rows = args["rows"]
    if INTERPRET: return cs
    if rows == 1: return [c for c in cs if c.kwargs["BLOCK_M"] == 1]
    return [c for c in cs if c.kwargs["BLOCK_M"] == 16 or 1 < c.kwargs["BLOCK_M"] <= rows]

@triton.autotune(configs(), key=["rows", "N", "K", "NORM", "GELU", "RESIDUAL"], prune_configs_by={"early_config_prune": prune})
@triton.jit
def linear_kernel(x, gain, shift, weight, bias, residual, out, rows, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
                  GELU: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out = [residual +] [gelu](norm(x) @ weight.T + bias) for a few rows: (rows, K) -> (rows, N); rounds where PyTorch does."""
    dtype = out.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if NORM:
        total = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, K, BLOCK_K):
            kk = begin + tl.arange(0, BLOCK_K)
            xx = tl.load(x + m[:, None] * K + kk[None, :], mask=(m[:, None] < rows) & (kk[None, :] < K), other=0.0).to(tl.float32)
            total += tl.sum(xx, 1)
            squares += tl.sum(xx * xx, 1)
        mean = total / K
        scale = 1 / tl.sqrt(squares / K - mean * mean + 1e-5)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        part = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < K), other=0.0)
        if NORM:
            g = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            b = tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
            part = ((part.to(tl.float32) - mean[:, None]) * scale[:, None] * g[None, :] + b[None, :]).to(dtype)
        if BLOCK_M == 1:
            acc += tl.sum(w.to(tl.float32) * part.to(tl.float32), 1)[None, :]
        else:
            acc = tl.dot(part, tl.trans(w), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = acc.to(dtype).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (acc + 0.044715 * acc * acc * acc)
        acc = acc / (1 + tl.exp(-2 * inner))  # 0.5 x (1 + tanh u) = x sigmoid(2 u)
    place = m[:, None] * N + n[None, :]
    mask = (m[:, None] < rows) & (n[None, :] < N)
    if RESIDUAL:
        acc += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(dtype), mask=mask)

@triton.jit
def attention_kernel(qkv, keys, values, positions, out, partial, counter, H: tl.constexpr, D: tl.constexpr, CONTEXT: tl.constexpr,
                     SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """One query per row and head over the `position` cached tokens and the new one, whose key and value it appends."""
    h, b, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + b)
    d = tl.arange(0, D)
    new = qkv + b * 3 * H * D + h * D + d
    q, k, v = tl.load(new).to(tl.float32), tl.load(new + H * D), tl.load(new + 2 * H * D)
    cache = (b * H + h) * CONTEXT * D
    q *= 1.4426950408889634 / tl.sqrt(D * 1.0)  # powers of two are cheaper than powers of e
    if split == 0:
        tl.store(keys + cache + position * D + d, k)
        tl.store(values + cache + position * D + d, v)
        best = tl.sum(q * k.to(tl.float32), 0)
        total = best * 0 + 1.0
        acc = v.to(tl.float32)
    else:
        best = tl.sum(q * 0, 0) - 1e30
        total = best * 0
        acc = q * 0
    share = tl.cdiv(tl.cdiv(position, BLOCK), SPLITS) * BLOCK
    for start in range(split * share, tl.minimum(split * share + share, position), BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = (t < position)[:, None]
        ks = tl.load(keys + cache + t[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        vs = tl.load(values + cache + t[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        score = tl.where(t < position, tl.sum(ks * q[None, :], 1), float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 0))
        p = tl.exp2(score - new_best)
        old = tl.exp2(best - new_best)
        total = total * old + tl.sum(p, 0)
        acc = acc * old + tl.sum(p[:, None] * vs, 0)
        best = new_best
    if SPLITS == 1:
        tl.store(out + b * H * D + h * D + d, (acc / total).to(out.dtype.element_ty))
    else:  # the program that comes last puts the parts together
        part = partial + ((b * H + h) * SPLITS + split) * (D + 2)
        tl.store(part + d, acc)
        tl.store(part + D, best)
        tl.store(part + D + 1, total)
        tl.debug_barrier()
        done = tl.atomic_add(counter + b * H + h, 1, sem="acq_rel")
        if done == SPLITS - 1:
            s = tl.arange(0, SPLITS)
            parts = partial + ((b * H + h) * SPLITS + s) * (D + 2)
            bests = tl.load(parts + D, volatile=True)
            totals = tl.load(parts + D + 1, volatile=True)
            accs = tl.load(parts[:, None] + d[None, :], volatile=True)
            w = tl.exp2(bests - tl.max(bests, 0))
            acc = tl.sum(accs * w[:, None], 0) / tl.sum(totals * w, 0)
            tl.store(out + b * H * D + h * D + d, acc.to(out.dtype.element_ty))
            tl.store(counter + b * H + h, 0)

@triton.jit
def sample_kernel(logits, sequence, positions, finished, x, wte, wpe, end, temperature, top_k, top_p, seed, V: tl.constexpr, STRIDE: tl.constexpr,
                  CONTEXT: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, SAMPLE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):
    """Draw the next token of a row, append it to `sequence`, and embed it into x.

    The threshold of top-k is found bit by bit: the largest 16-bit number that at least k logits reach; of top-p alike,
    with probabilities instead of counts. argmax(logit / temperature - log(exponential noise)) draws from the softmax.
    """
    row = tl.program_id(0)
    position = tl.load(positions + row) + 1
    start_row = logits + row * STRIDE
    threshold = -32768
    if SAMPLE and (TOP_K or TOP_P):
        if TOP_K:
            for bit in tl.static_range(0, 16):
                candidate = threshold + (32768 >> bit)
                counts = tl.zeros((BLOCK,), tl.int32)
                for start in range(0, V, BLOCK):
                    n = start + tl.arange(0, BLOCK)
                    bits = tl.load(start_row + n, mask=n < V, other=float("-inf")).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
                    key = tl.where(bits < 0, bits ^ 0x7FFF, bits)
                    counts += (key >= candidate).to(tl.int32)
                threshold = tl.where(tl.sum(counts, 0) >= top_k, candidate, threshold)
        if TOP_P:
            largest = float("-inf")
            for start in range(0, V, BLOCK):
                n = start + tl.arange(0, BLOCK)
                largest = tl.maximum(largest, tl.max(tl.load(start_row + n, mask=n < V, other=float("-inf")).to(tl.float32), 0))
            floor = threshold
            goal = 0.0
            for bit in tl.static_range(-1, 16):
                candidate = floor if bit < 0 else threshold + (32768 >> bit)
                if bit == 0: threshold = floor * 0 - 32768; candidate = threshold + 32768
                masses = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, V, BLOCK):
                    n = start + tl.arange(0, BLOCK)
                    logit = tl.load(start_row + n, mask=n < V, other=float("-inf"))
                    bits = logit.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
                    key = tl.where(bits < 0, bits ^ 0x7FFF, bits)
                    p = tl.exp((logit.to(tl.float32) - largest) / temperature)
                    masses += tl.where((key >= candidate) & (key >= floor), p, 0.0)
                mass = tl.sum(masses, 0)
                if bit < 0: goal = mass * top_p
                else: threshold = tl.where(mass >= goal, candidate, threshold)
            threshold = tl.maximum(threshold, floor)
    best = float("-inf")
    token = 0
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        raw = tl.load(start_row + n, mask=n < V, other=float("-inf"))
        score = raw.to(tl.float32)
        if SAMPLE:
            noise = -tl.log(tl.maximum(tl.rand(seed + position * tl.num_programs(0) + row, n), 1e-10))
            score = score / temperature - tl.log(tl.maximum(noise, 1e-20))
            bits = raw.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
            key = tl.where(bits < 0, bits ^ 0x7FFF, bits)
            score = tl.where((key >= threshold) & (n < V), score, float("-inf"))
        value, index = tl.max(score, 0, return_indices=True)
        token = tl.where(value > best, start + index, token)
        best = tl.maximum(best, value)
    is_finished = tl.load(finished + row)
    token = tl.where(is_finished != 0, end, token)
    tl.store(finished + row, tl.where(token == end, 1, is_finished))
    tl.store(sequence + row * CONTEXT + tl.minimum(position, CONTEXT - 1), token)
    tl.store(positions + row, tl.minimum(position, CONTEXT - 1))
    c = tl.arange(0, BLOCK_C)
    e = tl.load(wte + token * C + c, mask=c < C).to(tl.float32) + tl.load(wpe + tl.minimum(position, CONTEXT - 1) * C + c, mask=c < C).to(tl.float32)
    tl.store(x + row * C + c, e.to(x.dtype.element_ty), mask=c < C)

@triton.jit
def norm_kernel(x, gain, shift, out, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    mean = tl.sum(v, 0) / C
    d = tl.where(c < C, v - mean, 0.0)
    v = d / tl.sqrt(tl.sum(d * d, 0) / C + 1e-5) * tl.load(gain + c, mask=c < C).to(tl.float32) + tl.load(shift + c, mask=c < C).to(tl.float32)
    tl.store(out + row * C + c, v.to(out.dtype.element_ty), mask=c < C)

SEPARATE_NORM_ROWS = 9
class Decoder:
    """Continues one prompt `rows` times. `step()` adds a token to every row, in one CUDA graph."""
    def __init__(self, model, rows, context=None, end=-1, temperature=0.0, top_k=0, top_p=1.0, seed=0, splits=1, block=128, warps=4):
        c = model.config; p = model.wte.weight; dev, dtype = p.device, p.dtype
        self.model, self.rows, self.end, self.config = model, rows, end, c
        self.context = context or c.context
        self.D = c.width // c.heads
        new = lambda *shape, dtype=dtype: torch.zeros(shape, device=dev, dtype=dtype)
        self.keys, self.values = (new(c.layers, rows, c.heads, self.context, self.D) for _ in range(2))
        self.n = new(rows, c.width); self.x, self.y, self.z = new(rows, c.width), new(rows, c.width), new(rows, 4 * c.width)
        self.qkv, self.logits = new(rows, 3 * c.width), new(rows, c.padded)
        self.sequence = new(rows, self.context, dtype=torch.int64)
        self.positions, self.finished = new(rows, dtype=torch.int32), new(rows, dtype=torch.int32)
        self.partial, self.counter = new(rows * c.heads * splits * (self.D + 2), dtype=torch.float32), new(rows * c.heads, dtype=torch.int32)
        self.sampling = (temperature, top_k, top_p, seed); self.splits, self.block, self.warps = splits, block, warps
        self.graph = None

    def linear(self, x, layer, out, norm=None, gelu=False, residual=None, bias=True):
        weight = layer.weight; N, K = weight.shape
        if norm and self.rows >= SEPARATE_NORM_ROWS:
            norm_kernel[(self.rows,)](x, norm.weight, norm.bias, self.n, C=K, BLOCK=triton.next_power_of_2(K), num_warps=4)
            x, norm = self.n, None
        grid = lambda meta: (triton.cdiv(self.rows, meta["BLOCK_M"]), triton.cdiv(N, meta["BLOCK_N"]))
        linear_kernel[grid](x, norm.weight if norm else x, norm.bias if norm else x, weight, layer.bias if bias else weight, residual if residual is not None else out, out, self.rows,
                            N=N, K=K, NORM=norm is not None, GELU=gelu, RESIDUAL=residual is not None, BIAS=bias)

    def attend(self, layer):
        H = self.config.heads
        attention_kernel[(H, self.rows, self.splits)](self.qkv, self.keys[layer], self.values[layer], self.positions, self.y, self.partial, self.counter,
            H=H, D=self.D, CONTEXT=self.context, SPLITS=self.splits, BLOCK=self.block, num_warps=self.warps)

    def run_step(self):
        m = self.model
        for i, block in enumerate(m.h):
            self.linear(self.x, block.attn.c_attn, self.qkv, norm=block.ln_1)
            self.attend(i)
            self.linear(self.y, block.attn.c_proj, self.x, residual=self.x)
            self.linear(self.x, block.mlp.c_fc, self.z, norm=block.ln_2, gelu=True)
            self.linear(self.z, block.mlp.c_proj, self.x, residual=self.x)
        self.linear(self.x, m.wte, self.logits, norm=m.ln_f, bias=False)
        self.sample()

    def sample(self):
        t, k, p, seed = self.sampling; m, C = self.model, self.config.width
        sample_kernel[(self.rows,)](self.logits, self.sequence, self.positions, self.finished, self.x, m.wte.weight, m.wpe.weight, self.end, max(t, 1e-6), k, p, seed,
            V=self.config.vocab_size, STRIDE=self.config.padded, CONTEXT=self.context, C=C, BLOCK_C=triton.next_power_of_2(C), SAMPLE=t > 0, TOP_K=k > 0, TOP_P=p < 1, BLOCK=16384, num_warps=32)

    @torch.inference_mode()
    def prefill(self, prompt):
        """Read the prompt once, whatever the number of rows, and draw the first token of each."""
        tokens = torch.tensor([prompt], device=self.x.device); T = len(prompt); m, c = self.model, self.config
        x = m.wte(tokens) + m.wpe.weight[:T]
        for i, block in enumerate(m.h):
            q, k, v = block.attn.c_attn(block.ln_1(x)).view(1, T, 3, c.heads, self.D).permute(2, 0, 3, 1, 4)
            self.keys[i, :, :, :T], self.values[i, :, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(1, T, c.width)
            x = x + block.attn.c_proj(y); x = x + block.mlp(block.ln_2(x))
        self.logits.copy_(F.linear(m.ln_f(x[:, -1]), m.wte.weight).expand(self.rows, -1))
        self.sequence[:, :T] = tokens; self.positions.fill_(T - 1); self.finished.zero_(); self.counter.zero_()
        self.sample()

    @torch.inference_mode()
    def capture(self):
        stream = torch.cuda.Stream(); stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream): self.run_step()  # compiles the kernels
        torch.cuda.current_stream().wait_stream(stream); torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph): self.run_step()

    def generate(self, prompt, max_new_tokens, chunk=16):
        """Yields (rows, n) tokens in chunks; a chunk is read while the next one is computed."""
        if self.graph is None and self.x.is_cuda: self.capture()
        self.prefill(prompt)
        T, left, waiting = len(prompt), max_new_tokens - 1, None
        ready = (self.sequence[:, T : T + 1].to("cpu", non_blocking=True), None)
        host = torch.empty(2, self.rows, chunk, dtype=torch.int64, pin_memory=self.x.is_cuda)
        waiting, start, turn = [(self.sequence[:, T : T + 1].cpu(), None)], T + 1, 0
        while waiting:
            n = min(chunk, left)
            if n:
                for _ in range(n): self.graph.replay() if self.graph else self.run_step()
                host[turn, :, :n].copy_(self.sequence[:, start : start + n], non_blocking=True)
                event = torch.cuda.Event() if self.x.is_cuda else None
                if event: event.record()
                waiting.append((host[turn, :, :n], event)); start += n; left -= n; turn ^= 1
            tokens, event = waiting.pop(0)
            if event: event.synchronize()
            yield tokens.clone()
            if (tokens == self.end).any(1).all(): return

@torch.inference_mode()
def plain_logits(model, sequence):
    """Teacher forcing in one pass: the slow path's logits for every position."""
    return model(sequence)[..., : model.config.vocab_size]

class PlainDecoder:
    """The slow path: eager PyTorch, same dtype, growing cache, as the script does today."""
    def __init__(self, model): self.model = model
    @torch.inference_mode()
    def generate(self, prompt, rows, n):
        m, c = self.model, self.model.config; D = c.width // c.heads; dev = m.wte.weight.device
        tokens = torch.tensor([prompt] * rows, device=dev); start, out = 0, []
        K = torch.zeros(c.layers, rows, c.heads, c.context, D, device=dev, dtype=m.wte.weight.dtype); V = torch.zeros_like(K)
        for _ in range(n):
            T = tokens.shape[1]; x = m.wte(tokens) + m.wpe.weight[start : start + T]
            for i, block in enumerate(m.h):
                q, k, v = block.attn.c_attn(block.ln_1(x)).view(rows, T, 3, c.heads, D).permute(2, 0, 3, 1, 4)
                K[i, :, :, start : start + T], V[i, :, :, start : start + T] = k, v
                y = F.scaled_dot_product_attention(q, K[i, :, :, : start + T], V[i, :, :, : start + T], is_causal=T > 1).transpose(1, 2).reshape(rows, T, c.width)
                x = x + block.attn.c_proj(y); x = x + block.mlp(block.ln_2(x))
            start += T
            tokens = F.linear(m.ln_f(x[:, -1]), m.wte.weight)[:, : c.vocab_size].argmax(-1, keepdim=True); out.append(tokens)
        return torch.cat(out, 1)
