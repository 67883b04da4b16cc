"""The whole generation in one kernel: a prototype of GraphDecoder's successor."""
import sys, pathlib, os
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import numpy as np
import torch, triton
import triton.language as tl
import gpt2_from_scratch as gpt2
from triton import jit

GREEDY = gpt2.GREEDY


@jit
def meet(arrived):
    """All programs wait here for one another. What each has written before, all read after."""
    tl.debug_barrier()
    programs = tl.num_programs(0)
    seen = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    goal = (seen + programs - 1) // programs * programs
    while seen < goal:
        seen = tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@jit
def linear(x, table, place: tl.constexpr, out, arrived, rows, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
           GELU: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_K: tl.constexpr):
    """out (rows, N) = [out +] [GELU] ([layer norm] of x (rows, K) @ weight (N, K)^T [+ bias]).

    It rounds where PyTorch does. For a single row the first weights are on their way before all have met.
    """
    dtype = out.dtype.element_ty
    pointer = tl.pointer_type(dtype)
    weight = tl.load(table + place).to(pointer)
    program, programs = tl.program_id(0), tl.num_programs(0)
    k0 = tl.arange(0, BLOCK_K)
    n0 = tl.arange(0, BLOCK_N)
    if BLOCK_M == 1:
        n = program * BLOCK_N + n0
        w = tl.load(weight + n[:, None] * K + k0[None, :], mask=(n[:, None] < N) & (k0[None, :] < K), other=0.0)
    meet(arrived)
    for top in range(0, rows, BLOCK_M):
        m = top + tl.arange(0, BLOCK_M)
        if NORM:
            gain, shift = tl.load(table + place - 2).to(pointer), tl.load(table + place - 1).to(pointer)
            total = tl.zeros((BLOCK_M,), tl.float32)
            squares = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, K, BLOCK_K):
                k = start + k0
                mask = (m[:, None] < rows) & (k[None, :] < K)
                part = tl.load(x + m[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
                total += tl.sum(part, 1)
                squares += tl.sum(part * part, 1)
            mean = total / K
            scale = 1 / tl.sqrt(squares / K - mean * mean + 1e-5)
        for tile in range(program, tl.cdiv(N, BLOCK_N), programs):
            n = tile * BLOCK_N + n0
            result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, K, BLOCK_K):
                k = start + k0
                if BLOCK_M > 1:
                    w = tl.load(weight + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K),
                                other=0.0)
                part = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < K), other=0.0)
                if NORM:
                    g = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
                    b = tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
                    part = ((part.to(tl.float32) - mean[:, None]) * scale[:, None] * g[None, :] + b[None, :]).to(dtype)
                if BLOCK_M == 1:
                    result += tl.sum(w.to(tl.float32) * part.to(tl.float32), 1)[None, :]
                    last = start + BLOCK_K >= K
                    n1 = n + tl.where(last, programs * BLOCK_N, 0)
                    k1 = k0 + tl.where(last, 0, start + BLOCK_K)
                    w = tl.load(weight + n1[:, None] * K + k1[None, :], mask=(n1[:, None] < N) & (k1[None, :] < K),
                                other=0.0)
                else:
                    result = tl.dot(part, tl.trans(w), result, input_precision="ieee")
            if BIAS:
                bias = tl.load(table + place + 1).to(pointer)
                result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            result = result.to(dtype).to(tl.float32)
            if GELU:  # x (1 + tanh(u)) / 2 = x sigmoid(2 u)
                result = result / (1 + tl.exp(-1.5957691216057308 * (result + 0.044715 * result * result * result)))
            spot = m[:, None] * N + n[None, :]
            mask = (m[:, None] < rows) & (n[None, :] < N)
            if ADD:
                result += tl.load(out + spot, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + spot, result.to(dtype), mask=mask)


@jit
def attend(qkv, keys, values, positions, out, arrived, rows, H: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
           BLOCK: tl.constexpr):
    """One query per row and head over the tokens that are cached (B, H, SIZE, D) and its own, which it appends."""
    meet(arrived)
    for item in range(tl.program_id(0), rows * H, tl.num_programs(0)):
        b, h = item // H, item % H
        position = tl.load(positions + b)
        d = tl.arange(0, D)
        new = qkv + b * 3 * H * D + h * D + d
        q, k, v = tl.load(new).to(tl.float32), tl.load(new + H * D), tl.load(new + 2 * H * D)
        cache = item * SIZE * D
        tl.store(keys + cache + position * D + d, k)
        tl.store(values + cache + position * D + d, v)
        q *= 1.4426950408889634 / tl.sqrt(D * 1.0)  # powers of two are cheaper than powers of e
        best = tl.sum(q * k.to(tl.float32), 0)
        total = best * 0 + 1.0
        result = v.to(tl.float32)
        for start in range(0, position, BLOCK):
            t = start + tl.arange(0, BLOCK)
            spot, mask = cache + t[:, None] * D + d[None, :], (t < position)[:, None]
            some_keys = tl.load(keys + spot, mask=mask, other=0.0)
            some_values = tl.load(values + spot, mask=mask, other=0.0)
            score = tl.sum(some_keys.to(tl.float32) * q[None, :], 1)
            score = tl.where(t < position, score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, 0))
            p = tl.exp2(score - new_best)
            old = tl.exp2(best - new_best)
            total = total * old + tl.sum(p, 0)
            result = result * old + tl.sum(p[:, None] * some_values.to(tl.float32), 0)
            best = new_best
        tl.store(out + b * H * D + h * D + d, (result / total).to(out.dtype.element_ty))


@jit
def ordered(value):
    """A logit, rounded to bf16, as an integer of 16 bits: the same order."""
    bits = value.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFF, bits)


@jit
def draw(logits, best, counts, sequence, positions, finished, x, wte, wpe, arrived, rows, end, temperature, top_k, seed,
         V: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
         SAMPLE: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Draw each row's next token from its logits, append it to `sequence` (B, SIZE), and embed it into x (B, C).

    The largest logit / temperature - log(exponential noise) is a draw from their softmax. The smallest logit of the
    top k is found by four bits at a time: how many logits reach each of 16 values? Programs share the logits of a row.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    meet(arrived)
    side = tl.minimum(rows, programs)  # rows that are looked at at once
    first, step = program // side * BLOCK, programs // side * BLOCK
    last = tl.where(program < programs // side * side, V, 0)  # the programs that are left over have nothing to do
    digits = tl.arange(0, 16)
    if SAMPLE and TOP_K:
        for digit in tl.static_range(4):
            for row in range(program % side, rows, side):
                threshold = -32768
                for done in tl.static_range(digit):
                    seen = tl.load(counts + (row * 4 + done) * 16 + digits)
                    reach = tl.sum(tl.where(digits[None, :] >= digits[:, None], seen[None, :], 0), 1)
                    threshold += tl.sum(((reach >= top_k) & (digits > 0)).to(tl.int32), 0) << (12 - 4 * done)
                for start in range(first, last, step):
                    n = start + tl.arange(0, BLOCK)
                    value = ordered(tl.load(logits + row * STRIDE + n, mask=n < V, other=float("-inf")))
                    value = tl.where(n < V, (value - threshold) >> (12 - 4 * digit), 0)
                    some = tl.histogram(tl.minimum(tl.maximum(value, 0), 15), 16)
                    tl.atomic_add(counts + (row * 4 + digit) * 16 + digits, some, sem="relaxed")
            meet(arrived)
    for row in range(program % side, rows, side):
        threshold = -32768
        if SAMPLE and TOP_K:
            for done in tl.static_range(4):
                seen = tl.load(counts + (row * 4 + done) * 16 + digits)
                reach = tl.sum(tl.where(digits[None, :] >= digits[:, None], seen[None, :], 0), 1)
                threshold += tl.sum(((reach >= top_k) & (digits > 0)).to(tl.int32), 0) << (12 - 4 * done)
        position = tl.load(positions + row) + 1
        for start in range(first, last, step):
            n = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * STRIDE + n, mask=n < V, other=float("-inf"))
            score = value.to(tl.float32)
            if SAMPLE:
                noise = -tl.log(tl.maximum(tl.rand(seed + position * rows + row, n), 1e-10))
                score = score / temperature - tl.log(tl.maximum(noise, 1e-20))
                score = tl.where((ordered(value) >= threshold) & (n < V), score, float("-inf"))
            largest, index = tl.max(score, 0, return_indices=True)
            # One number for both, in the order of the score; of equal ones the first token is the largest.
            bits = largest.to(tl.int32, bitcast=True)
            bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
            tl.atomic_max(best + row, (bits << 32) + (V - start - index).to(tl.int64), sem="relaxed")
    meet(arrived)
    for row in range(program, rows, programs):
        token = V - (tl.load(best + row) & 0xFFFFFFFF)
        is_finished = tl.load(finished + row)
        token = tl.where(is_finished != 0, end, token)
        tl.debug_barrier()
        tl.store(finished + row, tl.where(token == end, 1, is_finished))
        position = tl.minimum(tl.load(positions + row) + 1, SIZE - 1)
        tl.debug_barrier()
        tl.store(sequence + row * SIZE + position, token)
        tl.store(positions + row, position)
        tl.store(best + row, -0x7FFFFFFFFFFFFFFF)
        tl.store(counts + row * 64 + tl.arange(0, 64), tl.zeros((64,), tl.int32))
        c = tl.arange(0, BLOCK_C)
        read = tl.where(token < 0, 0, token)  # -1: an end that no token is
        embedding = tl.load(wte + read * C + c, mask=c < C).to(tl.float32)
        embedding += tl.load(wpe + position * C + c, mask=c < C).to(tl.float32)
        tl.store(x + row * C + c, embedding.to(x.dtype.element_ty), mask=c < C)


@jit
def decode_kernel(table, x, y, z, qkv, logits, keys, values, best, counts, sequence, positions, finished, wte, wpe,
                  arrived, rows, steps, skip, end, temperature, top_k, seed, LAYERS: tl.constexpr, H: tl.constexpr,
                  D: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
                  SAMPLE: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  HEAD_N: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr, BLOCK_V: tl.constexpr):
    """`steps` tokens of every row. `skip`: the first is drawn from logits that are there already."""
    C: tl.constexpr = H * D
    for step in range(steps):
        if step >= skip:
            layer_keys, layer_values = keys, values
            for layer in range(LAYERS):
                t = table + layer * 12
                linear(x, t, 2, qkv, arrived, rows, 3 * C, C, True, False, False, True, BLOCK_M, BLOCK_N, BLOCK_K)
                attend(qkv, layer_keys, layer_values, positions, y, arrived, rows, H, D, SIZE, KEYS)
                linear(y, t, 4, x, arrived, rows, C, C, False, False, True, True, BLOCK_M, BLOCK_N, BLOCK_K)
                linear(x, t, 8, z, arrived, rows, 4 * C, C, True, True, False, True, BLOCK_M, BLOCK_N, BLOCK_K)
                linear(z, t, 10, x, arrived, rows, C, 4 * C, False, False, True, True, BLOCK_M, BLOCK_N, BLOCK_K)
                layer_keys += rows * H * SIZE * D
                layer_values += rows * H * SIZE * D
            linear(x, table + LAYERS * 12, 2, logits, arrived, rows, STRIDE, C, True, False, False, False, BLOCK_M,
                   HEAD_N, BLOCK_K)
        draw(logits, best, counts, sequence, positions, finished, x, wte, wpe, arrived, rows, end, temperature, top_k,
             seed, V, STRIDE, SIZE, C, BLOCK_C, SAMPLE, TOP_K, BLOCK_V)


class MegaDecoder(gpt2.GraphDecoder):
    CHUNK = 16
    SIZES = None  # overrides
    PROGRAMS = 1  # per multiprocessor

    @torch.no_grad()
    def __init__(self, model, count, size, end, temperature, top_k, seed):
        super().__init__(model, count, size, end, temperature, top_k, seed)
        new = lambda *shape, dtype: torch.zeros(shape, device=self.x.device, dtype=dtype)
        blocks = [p for block in model.h for p in block.parameters()]
        assert len(blocks) == 12 * len(model.h)
        self.table = torch.tensor([p.data_ptr() for p in (*blocks, model.ln_f.weight, model.ln_f.bias, model.wte.weight)],
                                  device=self.x.device)
        self.best, self.counts = new(count, dtype=torch.int64), new(count, 64, dtype=torch.int32)
        self.arrived = new(1, dtype=torch.int32)
        power, width = triton.next_power_of_2, model.config.width
        if count == 1:
            sizes = {"BLOCK_M": 1, "BLOCK_N": 16, "HEAD_N": 16, "BLOCK_K": min(1024, power(width)), "num_warps": 8}
        else:
            sizes = {"BLOCK_M": min(64, max(16, power(count))), "BLOCK_N": 16, "HEAD_N": 64,
                     "BLOCK_K": min(128, power(width)), "num_warps": 8}
        self.sizes = sizes | {"KEYS": 128, "BLOCK_V": 512} | (self.SIZES or {})
        self.programs = 1
        if self.x.is_cuda:
            self.programs = self.PROGRAMS * torch.cuda.get_device_properties(self.x.device).multi_processor_count
            self.sizes["launch_cooperative_grid"] = True
        else:
            self.sizes.pop("num_warps")

    def launch(self, steps, skip=0):
        self.arrived.zero_()
        (count, size), (_, stride) = self.sequence.shape, self.logits.shape
        config = self.model.config
        return decode_kernel[(self.programs,)](
            self.table, self.x, self.y, self.z, self.qkv, self.logits, self.keys, self.values, self.best, self.counts,
            self.sequence, self.positions, self.finished, self.model.wte.weight, self.model.wpe.weight, self.arrived,
            count, steps, skip, self.end, *self.how, LAYERS=config.layers, H=config.heads,
            D=config.width // config.heads, V=config.vocab_size, STRIDE=stride, SIZE=size,
            BLOCK_C=triton.next_power_of_2(config.width), **self.switches, **self.sizes)

    def draw(self):
        self.best.fill_(-0x7FFFFFFFFFFFFFFF)
        self.counts.zero_()
        self.launch(1, 1)

    def run(self, prompt):
        self.read(prompt)
        ready, done = len(prompt) + 1, len(prompt)
        while done < self.last:
            for step in self.sequence[:, done:ready].t().tolist():
                yield step
                if all(token == self.end for token in step):
                    return
            done, ready = ready, min(self.last, ready + self.CHUNK)
            if ready > done:
                self.launch(ready - done)
