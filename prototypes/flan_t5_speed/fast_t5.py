"""Flan-T5 + LoRA, training and greedy generation at the speed of the hardware.

The same function as transformers' T5 with PEFT's LoRA, over the same parameters, in a form that keeps a GPU busy:

1. Rows are not padded. The tokens of a batch stand one after another, [tokens, d_model], and only attention knows
   where a row begins (`starts`). Whatever fills up a batch to one of few sizes forms one more row that nobody reads.
2. Products that share an input are one product (q, k and v; k and v of cross-attention; wi_0 and wi_1), and the second
   LoRA matrices B are more columns of the same product: [x | dropout(x) A^T] [W | B]^T = x W^T + dropout(x) A^T B^T.
3. The Python code of a step runs once per batch size: a CUDA graph records the kernels it launches and replays them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU: attention is computed by `reference_attention`
    triton = None

# ---------- Attention over packed rows ---------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def dropout_keeps(index, seed, threshold):
        """True with probability 1 - threshold / 2**32: a hash (murmur3's finaliser) of position and seed."""
        x = index.to(tl.uint32, bitcast=True) ^ seed.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        x = x ^ (x >> 16)
        return x >= threshold

    @triton.jit
    def tile_scores(q, k, i, j, nq, nk, bias, head, LIMIT: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr):
        """Scores of the queries i and keys j of one row and head; -inf where there is no such key."""
        s = tl.dot(q, tl.trans(k))
        distance = j[None, :] - i[:, None] - (nk - nq) if BIAS or CAUSAL else 0
        if BIAS:
            near = tl.minimum(tl.maximum(distance, -LIMIT), LIMIT) + LIMIT
            s += tl.load(bias + head * (2 * LIMIT + 1) + near).to(tl.float32)
        allowed = (j < nk)[None, :] & (i < nq)[:, None]
        if CAUSAL:
            allowed = allowed & (distance <= 0)
        return tl.where(allowed, s, -float("inf"))

    @triton.jit
    def forward_kernel(q_, k_, v_, out_, lse_, bias, q_begin, q_end, k_begin, k_end, seed_, site, threshold, keep_scale,
                       q_stride, k_stride, tokens, H: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr,
                       BIAS: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, LSE: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
        row, head = tl.program_id(1) // H, tl.program_id(1) % H
        q0, k0 = tl.load(q_begin + row), tl.load(k_begin + row)
        nq, nk = tl.load(q_end + row) - q0, tl.load(k_end + row) - k0
        first = tl.program_id(0) * BM
        if first >= nq:
            return
        i, c = first + tl.arange(0, BM), tl.arange(0, K)
        at_q = (q0 + i).to(tl.int64)
        q_mask = (i < nq)[:, None] & (c < D)[None, :]
        q = tl.load(q_ + at_q[:, None] * q_stride + head * D + c[None, :], mask=q_mask, other=0.0)
        top = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, K], tl.float32)
        seed = tl.load(seed_ + site)
        last = nk
        if CAUSAL:
            last = tl.minimum(nk, first + BM + nk - nq)
        for start in range(0, last, BN):
            j = start + tl.arange(0, BN)
            at_k = (k0 + j).to(tl.int64)[:, None] * k_stride + head * D + c[None, :]
            k_mask = (j < nk)[:, None] & (c < D)[None, :]
            k = tl.load(k_ + at_k, mask=k_mask, other=0.0)
            v = tl.load(v_ + at_k, mask=k_mask, other=0.0)
            s = tile_scores(q, k, i, j, nq, nk, bias, head, LIMIT, BIAS, CAUSAL)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new[:, None])
            shrink = tl.exp(top - new)
            total = total * shrink + tl.sum(p, 1)
            if DROP:
                index = ((q0 + i)[:, None] * H + head) * 1024 + j[None, :]
                p = tl.where(dropout_keeps(index, seed, threshold), p * keep_scale, 0.0)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
            top = new
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(out_ + at_q[:, None] * (H * D) + head * D + c[None, :], (acc / total[:, None]).to(out_.dtype.element_ty),
                 mask=q_mask)
        if LSE:
            tl.store(lse_ + head * tokens + q0 + i, top + tl.log(total), mask=i < nq)

    @triton.jit
    def backward_q_kernel(q_, k_, v_, out_, dout_, lse_, delta_, dq_, bias, q_begin, q_end, k_begin, k_end, seed_, site,
                          threshold, keep_scale, q_stride, k_stride, dq_stride, tokens, H: tl.constexpr,
                          D: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
                          DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
        row, head = tl.program_id(1) // H, tl.program_id(1) % H
        q0, k0 = tl.load(q_begin + row), tl.load(k_begin + row)
        nq, nk = tl.load(q_end + row) - q0, tl.load(k_end + row) - k0
        first = tl.program_id(0) * BM
        if first >= nq:
            return
        i, c = first + tl.arange(0, BM), tl.arange(0, K)
        at_q = (q0 + i).to(tl.int64)
        q_mask = (i < nq)[:, None] & (c < D)[None, :]
        q = tl.load(q_ + at_q[:, None] * q_stride + head * D + c[None, :], mask=q_mask, other=0.0)
        at_out = at_q[:, None] * (H * D) + head * D + c[None, :]
        out = tl.load(out_ + at_out, mask=q_mask, other=0.0)
        dout = tl.load(dout_ + at_out, mask=q_mask, other=0.0)
        lse = tl.load(lse_ + head * tokens + q0 + i, mask=i < nq, other=0.0)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        tl.store(delta_ + head * tokens + q0 + i, delta, mask=i < nq)
        dq = tl.zeros([BM, K], tl.float32)
        seed = tl.load(seed_ + site)
        last = nk
        if CAUSAL:
            last = tl.minimum(nk, first + BM + nk - nq)
        for start in range(0, last, BN):
            j = start + tl.arange(0, BN)
            at_k = (k0 + j).to(tl.int64)[:, None] * k_stride + head * D + c[None, :]
            k_mask = (j < nk)[:, None] & (c < D)[None, :]
            k = tl.load(k_ + at_k, mask=k_mask, other=0.0)
            v = tl.load(v_ + at_k, mask=k_mask, other=0.0)
            s = tile_scores(q, k, i, j, nq, nk, bias, head, LIMIT, BIAS, CAUSAL)
            p = tl.exp(s - lse[:, None])
            dp = tl.dot(dout, tl.trans(v))
            if DROP:
                index = ((q0 + i)[:, None] * H + head) * 1024 + j[None, :]
                dp = tl.where(dropout_keeps(index, seed, threshold), dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k)
        tl.store(dq_ + at_q[:, None] * dq_stride + head * D + c[None, :], dq.to(dq_.dtype.element_ty), mask=q_mask)

    @triton.jit
    def backward_kv_kernel(q_, k_, v_, dout_, lse_, delta_, dk_, dv_, bias, q_begin, q_end, k_begin, k_end, seed_, site,
                           threshold, keep_scale, q_stride, k_stride, dk_stride, tokens, H: tl.constexpr,
                           D: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
                           DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
        row, head = tl.program_id(1) // H, tl.program_id(1) % H
        q0, k0 = tl.load(q_begin + row), tl.load(k_begin + row)
        nq, nk = tl.load(q_end + row) - q0, tl.load(k_end + row) - k0
        start = tl.program_id(0) * BN
        if start >= nk:
            return
        j, c = start + tl.arange(0, BN), tl.arange(0, K)
        at_k = (k0 + j).to(tl.int64)
        k_mask = (j < nk)[:, None] & (c < D)[None, :]
        k = tl.load(k_ + at_k[:, None] * k_stride + head * D + c[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_ + at_k[:, None] * k_stride + head * D + c[None, :], mask=k_mask, other=0.0)
        dk = tl.zeros([BN, K], tl.float32)
        dv = tl.zeros([BN, K], tl.float32)
        seed = tl.load(seed_ + site)
        low = 0
        if CAUSAL:
            low = start // BM * BM
        for first in range(low, nq, BM):
            i = first + tl.arange(0, BM)
            at_q = (q0 + i).to(tl.int64)[:, None]
            q_mask = (i < nq)[:, None] & (c < D)[None, :]
            q = tl.load(q_ + at_q * q_stride + head * D + c[None, :], mask=q_mask, other=0.0)
            dout = tl.load(dout_ + at_q * (H * D) + head * D + c[None, :], mask=q_mask, other=0.0)
            lse = tl.load(lse_ + head * tokens + q0 + i, mask=i < nq, other=0.0)
            delta = tl.load(delta_ + head * tokens + q0 + i, mask=i < nq, other=0.0)
            s = tile_scores(q, k, i, j, nq, nk, bias, head, LIMIT, BIAS, CAUSAL)
            p = tl.exp(s - lse[:, None])
            dp = tl.dot(dout, tl.trans(v))
            kept = p
            if DROP:
                index = ((q0 + i)[:, None] * H + head) * 1024 + j[None, :]
                keep = dropout_keeps(index, seed, threshold)
                kept = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv += tl.dot(tl.trans(kept).to(dout.dtype), dout)
            dk += tl.dot(tl.trans(p * (dp - delta[:, None])).to(q.dtype), q)
        at = at_k[:, None] * dk_stride + head * D + c[None, :]
        tl.store(dk_ + at, dk.to(dk_.dtype.element_ty), mask=k_mask)
        tl.store(dv_ + at, dv.to(dv_.dtype.element_ty), mask=k_mask)


LIMIT = 128  # T5's relative_attention_max_distance: keys further away than this share one bias


def reference_attention(q, k, v, bias, q_starts, k_starts, heads: int, causal: bool, dout=None):
    """The same attention row by row, without dropout: what the kernels are tested against, and used without a GPU.

    With `dout`, the gradient of the result, returns the gradients of q, k and v instead.
    """
    results = [torch.zeros_like(x) for x in ((q,) if dout is None else (q, k, v))]
    split = lambda x: x.unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, tokens, width]
    for row in range(len(q_starts) - 1):
        of_q, of_k = (slice(int(s[row]), int(s[row + 1])) for s in (q_starts, k_starts))
        qh, kh, vh = split(q[of_q]), split(k[of_k]), split(v[of_k])
        distance = torch.arange(kh.shape[1])[None, :] - torch.arange(qh.shape[1])[:, None] - kh.shape[1] + qh.shape[1]
        scores = (qh @ kh.transpose(1, 2)).float()
        if bias is not None:
            scores = scores + bias[:, distance.clamp(-LIMIT, LIMIT) + LIMIT].float()
        if causal:
            scores = scores.masked_fill(distance > 0, -torch.inf)
        p = scores.softmax(-1).to(v.dtype)
        if dout is None:
            new = [p @ vh]
        else:
            dp = split(dout[of_q]) @ vh.transpose(1, 2)
            ds = p * (dp - (dp * p).sum(-1, keepdim=True))
            new = [ds @ kh, ds.transpose(1, 2) @ qh, p.transpose(1, 2) @ split(dout[of_q])]
        for whole, part, rows in zip(results, new, (of_q, of_k, of_k), strict=False):
            whole[rows] = part.transpose(0, 1).flatten(1)
    return results


# Queries and keys of a tile, and warps, for: self-attention of the encoder, of the decoder, cross-attention.
TILES = {kind: {kernel: (64, 64, 4) for kernel in ("forward", "q", "kv")} for kind in ("encoder", "decoder", "cross")}


def tiles(kind, kernel):
    queries, keys, warps = TILES[kind][kernel]
    return {"BM": queries, "BN": keys, "num_warps": warps}


def launch(kernel, grid, heads, width, bias, causal, rate, *tensors, block, **more):
    kernel[grid](*tensors, H=heads, D=width, LIMIT=LIMIT, BIAS=bias is not None, CAUSAL=causal, DROP=rate > 0,
                 K=max(16, triton.next_power_of_2(width)), **block, **more)


def parts(q, kv):
    """Queries, keys and values, as views."""
    inner = q.shape[1] // 3 if kv is None else q.shape[1]
    beside = q if kv is None else kv
    return q[:, :inner], beside[:, -2 * inner : -inner], beside[:, -inner:]


def dropout_arguments(rate: float) -> tuple[int, float]:
    return int(rate * 2**32), 1 / (1 - rate)


@torch.library.custom_op("flan::attention", mutates_args=())
def attention(q: torch.Tensor, kv: torch.Tensor | None, bias: torch.Tensor | None, q_starts: torch.Tensor,
              k_starts: torch.Tensor, seed: torch.Tensor, site: int, rate: float, heads: int, longest: int,
              causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T + bias) v for packed rows, of which row r has the tokens starts[r] to starts[r + 1].

    Self-attention: `q` is [tokens, 3 x inner] with q, k and v side by side, and `kv` is None.
    Cross-attention: `q` is [target tokens, inner], `kv` [source tokens, 2 x inner].
    Also returns the logarithm of each softmax's denominator [heads, tokens], from which backward computes it again.
    """
    queries, k, v = parts(q, kv)
    inner = queries.shape[1]
    lse = q.new_empty(heads, len(q), dtype=torch.float32)
    if q.device.type == "cpu" and not INTERPRET:
        return reference_attention(queries, k, v, bias, q_starts, k_starts, heads, causal)[0], lse
    out = q.new_empty(len(q), inner)
    block = tiles("cross" if kv is not None else "decoder" if causal else "encoder", "forward")
    launch(forward_kernel, (triton.cdiv(longest, block["BM"]), (len(q_starts) - 1) * heads), heads, inner // heads, bias, causal,
           rate, queries, k, v, out, lse, bias, q_starts, q_starts[1:], k_starts, k_starts[1:], seed, site,
           *dropout_arguments(rate), q.stride(0), k.stride(0), len(q), block=block, LSE=True)
    return out, lse


@attention.register_fake
def _(q, kv, bias, q_starts, k_starts, seed, site, rate, heads, longest, causal):
    inner = q.shape[1] // 3 if kv is None else q.shape[1]
    return q.new_empty(q.shape[0], inner), q.new_empty(heads, q.shape[0], dtype=torch.float32)


@torch.library.custom_op("flan::attention_backward", mutates_args=())
def attention_backward(dout: torch.Tensor, q: torch.Tensor, kv: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
                       bias: torch.Tensor | None, q_starts: torch.Tensor, k_starts: torch.Tensor, seed: torch.Tensor,
                       site: int, rate: float, heads: int, longest_q: int, longest_k: int,
                       causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `q` and `kv` as they came (of self-attention: of `q`, and an empty tensor)."""
    inner = out.shape[1]
    dq = torch.empty_like(q)
    dkv = q.new_empty(0) if kv is None else torch.empty_like(kv)
    queries, k, v = parts(q, kv)
    dqueries, dk, dv = parts(dq, None if kv is None else dkv)
    if q.device.type == "cpu" and not INTERPRET:
        grads = reference_attention(queries, k, v, bias, q_starts, k_starts, heads, causal, dout)
        for to, grad in zip((dqueries, dk, dv), grads, strict=True):
            to.copy_(grad)
        return dq, dkv
    delta, rows = torch.empty_like(lse), len(q_starts) - 1
    where = (bias, q_starts, q_starts[1:], k_starts, k_starts[1:], seed, site, *dropout_arguments(rate))
    shared = (heads, inner // heads, bias, causal, rate)
    dout, kind = dout.contiguous(), "cross" if kv is not None else "decoder" if causal else "encoder"
    block = tiles(kind, "q")
    launch(backward_q_kernel, (triton.cdiv(longest_q, block["BM"]), rows * heads), *shared, queries, k, v, out, dout, lse, delta,
           dq, *where, q.stride(0), k.stride(0), dq.stride(0), len(q), block=block)
    block = tiles(kind, "kv")
    launch(backward_kv_kernel, (triton.cdiv(longest_k, block["BN"]), rows * heads), *shared, queries, k, v, dout, lse, delta,
           dk, dv, *where, q.stride(0), k.stride(0), dk.stride(0), len(q), block=block)
    return dq, dkv


@attention_backward.register_fake
def _(dout, q, kv, out, lse, bias, q_starts, k_starts, seed, site, rate, heads, longest_q, longest_k, causal):
    return torch.empty_like(q), q.new_empty(0) if kv is None else torch.empty_like(kv)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, bias, q_starts, k_starts, seed, site, rate, heads, longest_q, longest_k, causal):
        out, lse = attention(q, kv, bias, q_starts, k_starts, seed, site, rate, heads, longest_q, causal)
        ctx.save_for_backward(q, kv, out, lse, bias, q_starts, k_starts, seed)
        ctx.rest = site, rate, heads, longest_q, longest_k, causal
        return out

    @staticmethod
    def backward(ctx, dout):
        q, kv, out, lse, bias, q_starts, k_starts, seed = ctx.saved_tensors
        dq, dkv = attention_backward(dout, q, kv, out, lse, bias, q_starts, k_starts, seed, *ctx.rest)
        return dq, None if kv is None else dkv, *[None] * 10


INTERPRET = False  # tests run the kernels in Triton's interpreter on the CPU

# ---------- The model ---------------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """Frozen matrices that share an input, one below the other, in the columns after theirs the LoRA matrices B.

    matrix  [out, in + 64] in bf16; quantised: [out, in] in int8 or NF4's packed [out * in / 2] uint8
    scale   None; of int8 [out]; of NF4 [out * in / 64]
    tail    None; quantised: the columns of B, [out, 64]
    a, b    LoRA: [modules, rank, in] and [modules, out / modules, rank]
    """

    matrix: torch.Tensor
    scale: torch.Tensor | None
    tail: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def dequantized(matrix, scale, tail, dtype, again=False):
    """The matrix in `dtype`, for a moment: backward computes it `again`.

    By other operations with the same result, as the compiler would see that they are the same and keep the first one.
    """
    if scale is None:
        return matrix
    if matrix.dtype == torch.int8:
        factor = scale[:, None].to(dtype)
        whole = factor * matrix.to(dtype) if again else matrix.to(dtype) * factor
    else:
        code = torch.tensor(NF4, device=matrix.device)
        halves = (matrix // 16, matrix % 16) if again else (matrix >> 4, matrix & 15)
        pairs = torch.stack(halves, -1).to(torch.int32)
        whole = (code[pairs].view(len(scale), 64) * scale[:, None]).to(dtype).view(len(tail), -1)
    return torch.cat((whole, tail), 1)


def keeps(shape, seed, rate: float):
    """A mask that is True with probability 1 - rate, the same hash of position and seed as in the attention kernels.

    So that masks need not be kept for backward, and a resumed run draws those it would have drawn.
    """
    count = 1
    for size in shape:
        count = count * size
    x = torch.arange(count, dtype=torch.int32, device=seed.device).view(shape) ^ seed
    x = (x ^ (x >> 16 & 0xFFFF)) * (0x85EBCA6B - 2**32)
    x = (x ^ (x >> 13 & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return (x ^ (x >> 16 & 0xFFFF)) >= int(rate * 2**32) - 2**31


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, rate):
        ctx.save_for_backward(seed)
        ctx.rate = rate
        return torch.where(keeps(x.shape, seed, rate), x * (1 / (1 - rate)), 0)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return torch.where(keeps(dy.shape, seed, ctx.rate), dy * (1 / (1 - ctx.rate)), 0), None, None


def dropout(x, seed, rate: float):
    return Dropout.apply(x, seed, rate) if rate else x


class Linear(torch.autograd.Function):
    """x [tokens, in] -> x W^T + s dropout(x) A^T B^T [tokens, out], with a mask of its own for each module's A."""

    @staticmethod
    def forward(ctx, x, matrix, scale, tail, a, b, seed, rate, s):
        w = dequantized(matrix, scale, tail, x.dtype)
        n, r, d = a.shape
        kept = x.expand(n, *x.shape)
        if rate:
            kept = torch.where(keeps((n, *x.shape), seed, rate), kept * (1 / (1 - rate)), 0)
        u = torch.bmm(kept, a.transpose(1, 2)) * s
        wide = torch.cat((x, u.transpose(0, 1).flatten(1), x.new_zeros(len(x), w.shape[1] - d - n * r)), 1)
        ctx.save_for_backward(x, u, matrix, scale, tail, a, seed)
        ctx.rest = rate, s
        return wide @ w.t()

    @staticmethod
    def backward(ctx, dy):
        x, u, matrix, scale, tail, a, seed = ctx.saved_tensors
        rate, s = ctx.rest
        n, r, d = a.shape
        wide = dy @ dequantized(matrix, scale, tail, x.dtype, again=True)
        du = wide[:, d : d + n * r].unflatten(1, (n, r)).transpose(0, 1) * s  # [n, tokens, r]
        kept, dx = x.expand(n, *x.shape), torch.bmm(du, a)
        if rate:
            keep = keeps((n, *x.shape), seed, rate)
            kept, dx = (torch.where(keep, t * (1 / (1 - rate)), 0) for t in (kept, dx))
        da = torch.bmm(du.transpose(1, 2), kept)
        db = torch.bmm(dy.unflatten(1, (n, -1)).permute(1, 2, 0), u)
        return wide[:, :d] + dx.sum(0), None, None, None, da, db, None, None, None


class FrozenLinear(torch.autograd.Function):
    """x W^T; a quantised W is not kept for backward but computed again."""

    @staticmethod
    def forward(ctx, x, matrix, scale, tail):
        ctx.save_for_backward(matrix, scale, tail)
        return x @ dequantized(matrix, scale, tail, x.dtype).t()

    @staticmethod
    def backward(ctx, dy):
        return dy @ dequantized(*ctx.saved_tensors, dy.dtype, again=True), None, None, None


class Settings(NamedTuple):
    heads: int
    rate: float  # T5's dropout
    lora_rate: float
    lora_scale: float
    eps: float
    longest: tuple[int, int]  # tokens of the longest source and target row


class EncoderLayer(NamedTuple):
    norm1: torch.Tensor
    qkv: Weight
    o: Weight
    norm2: torch.Tensor
    wi: Weight
    wo: Weight


class DecoderLayer(NamedTuple):
    norm1: torch.Tensor
    qkv: Weight
    o: Weight
    norm2: torch.Tensor
    q: Weight
    kv: Weight
    cross_o: Weight
    norm3: torch.Tensor
    wi: Weight
    wo: Weight


def linear(x, w: Weight, seed, c: Settings):
    if w.a is None:
        return F.linear(x, w.matrix) if w.scale is None else FrozenLinear.apply(x, w.matrix, w.scale, w.tail)
    return Linear.apply(x, *w, seed, c.lora_rate, c.lora_scale)


def rms_norm(x, weight, eps: float):
    """Root mean square layer norm, rounded where transformers' T5LayerNorm rounds."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def feed_forward(x, norm, wi: Weight, wo: Weight, seeds, c: Settings):
    gate, value = linear(rms_norm(x, norm, c.eps), wi, seeds[0], c).chunk(2, -1)
    hidden = dropout(F.gelu(gate, approximate="tanh") * value, seeds[1], c.rate)
    return x + dropout(linear(hidden, wo, seeds[2], c), seeds[3], c.rate)


def self_attention(x, starts, bias, norm, qkv: Weight, o: Weight, seeds, longest: int, causal: bool, c: Settings):
    qkv = linear(rms_norm(x, norm, c.eps), qkv, seeds[0], c)
    mixed = Attention.apply(qkv, None, bias, starts, starts, seeds, 1, c.rate, c.heads, longest, longest, causal)
    return x + dropout(linear(mixed, o, seeds[2], c), seeds[3], c.rate)


def encoder_block(x, starts, bias, seeds, w: EncoderLayer, c: Settings):
    x = self_attention(x, starts, bias, w.norm1, w.qkv, w.o, seeds[:4], c.longest[0], False, c)
    return feed_forward(x, w.norm2, w.wi, w.wo, seeds[4:], c)


def decoder_block(x, source, starts, source_starts, bias, seeds, w: DecoderLayer, c: Settings):
    x = self_attention(x, starts, bias, w.norm1, w.qkv, w.o, seeds[:4], c.longest[1], True, c)
    q, kv = linear(rms_norm(x, w.norm2, c.eps), w.q, seeds[8], c), linear(source, w.kv, seeds[9], c)
    mixed = Attention.apply(q, kv, None, starts, source_starts, seeds, 10, c.rate, c.heads, *c.longest[::-1], False)
    x = x + dropout(linear(mixed, w.cross_o, seeds[11], c), seeds[12], c.rate)
    return feed_forward(x, w.norm3, w.wi, w.wo, seeds[4:8], c)


SITES = 13  # seeds of a layer: one for each mask


def embed(ids, table, seed, c: Settings):
    return dropout(F.embedding(ids, table), seed, c.rate)


def output(x, norm, seed, c: Settings):
    """What a stack returns."""
    return dropout(rms_norm(x, norm, c.eps), seed, c.rate)


def output_loss(x, norm, head, labels, seed, c: Settings):
    """Sum of the cross-entropy in nats over the labels that are not -100."""
    logits = F.linear(output(x, norm, seed, c), head)
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def base_of(module):
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


class PackedT5:
    """T5 over packed rows, sharing the storage of all weights with the PeftModel `model` that it is made from.

    PEFT's fp32 LoRA matrices become views of `masters`, their gradients views of `gradients`; `working` is their copy
    in the base's dtype, which the products use. `quantize`: None, "int8" or "int4" (a copy, for the benchmark).
    """

    def __init__(self, model, longest=(512, 128), compiled=True, quantize=None):
        peft_config = model.peft_config["default"]
        self.base, self.config = model.base_model.model, model.config
        c = self.config
        self.dtype, self.device = self.base.shared.weight.dtype, self.base.shared.weight.device
        self.settings = Settings(c.num_heads, c.dropout_rate, peft_config.lora_dropout,
                                 peft_config.lora_alpha / peft_config.r, c.layer_norm_epsilon, longest)
        self.quantize, self.rank = quantize, peft_config.r
        encoder = [(b.layer[0].SelfAttention, b.layer[-1].DenseReluDense) for b in self.base.encoder.block]
        decoder = [(b.layer[0].SelfAttention, b.layer[1].EncDecAttention, b.layer[-1].DenseReluDense)
                   for b in self.base.decoder.block]
        self.lora, self.kinds = [], []
        groups = {
            "encoder.qkv": [(a.q, a.k, a.v) for a, _ in encoder], "encoder.o": [(a.o,) for a, _ in encoder],
            "decoder.qkv": [(a.q, a.k, a.v) for a, _, _ in decoder], "decoder.o": [(a.o,) for a, _, _ in decoder],
            "decoder.q": [(x.q,) for _, x, _ in decoder], "decoder.kv": [(x.k, x.v) for _, x, _ in decoder],
            "decoder.cross_o": [(x.o,) for _, x, _ in decoder],
            "encoder.wi": [(m.wi_0, m.wi_1) for _, m in encoder], "encoder.wo": [(m.wo,) for _, m in encoder],
            "decoder.wi": [(m.wi_0, m.wi_1) for _, _, m in decoder], "decoder.wo": [(m.wo,) for _, _, m in decoder],
        }
        self.parameters = [getattr(m, name)["default"].weight for layers in groups.values() for name in ("lora_A", "lora_B")
                           for modules in layers for m in modules if hasattr(m, "lora_A")]
        size = sum(p.numel() for p in self.parameters)
        self.masters = torch.empty(size, device=self.device)
        self.gradients = torch.zeros_like(self.masters)
        self.working = torch.empty(size, device=self.device, dtype=self.dtype)
        self.place, self.leaves, self.tails = 0, [], []
        merged = {name: self.merge(layers) for name, layers in groups.items()}
        self.share_parameters()
        norm = lambda block, i: block.layer[i].layer_norm.weight.detach()
        pick = lambda side, i: {k.split(".")[1]: v[i] for k, v in merged.items() if k.startswith(side)}
        self.encoder = [EncoderLayer(norm1=norm(b, 0), norm2=norm(b, 1), **pick("encoder", i))
                        for i, b in enumerate(self.base.encoder.block)]
        self.decoder = [DecoderLayer(norm1=norm(b, 0), norm2=norm(b, 1), norm3=norm(b, 2), **pick("decoder", i))
                        for i, b in enumerate(self.base.decoder.block)]
        self.encoder_bias, self.decoder_bias = (self.bias_table(s.block[0].layer[0].SelfAttention)
                                                for s in (self.base.encoder, self.base.decoder))
        wrap = torch.compile if compiled else lambda f, **_: f
        options = {"dynamic": None} if compiled else {}
        self.embed, self.encoder_block, self.output, self.decoder_block, self.output_loss = (
            wrap(f, **options) for f in (embed, encoder_block, output, decoder_block, output_loss))
        self.refresh()

    def bias_table(self, attention):
        """The bias of every distance from -LIMIT to LIMIT, [heads, 2 LIMIT + 1]."""
        distance = torch.arange(-LIMIT, LIMIT + 1, device=self.device)
        bucket = attention._relative_position_bucket(distance, bidirectional=not attention.is_decoder,
                                                     num_buckets=attention.relative_attention_num_buckets,
                                                     max_distance=attention.relative_attention_max_distance)
        return attention.relative_attention_bias.weight.detach()[bucket].t().contiguous()

    @torch.no_grad()
    def merge(self, layers):
        """One Weight per layer; PEFT's modules keep working, their matrices being views of the merged ones."""
        adapted, n = hasattr(layers[0][0], "lora_A"), len(layers[0])
        first = base_of(layers[0][0]).weight
        rows, columns = first.shape
        extra = 64 if adapted else 0
        a, b = [], []
        for store, shape in ((a, (n, self.rank, columns)), (b, (n, rows, self.rank))) if adapted else ():
            count = n * shape[1] * shape[2]
            for _ in layers:
                view = self.working[self.place : self.place + count].view(shape).detach().requires_grad_()
                store.append(view)
                self.place += count
            self.leaves += store
        if self.quantize:
            tails = torch.zeros(len(layers), n * rows, extra, dtype=self.dtype, device=self.device)
            quantized = [self.quantized(torch.cat([base_of(m).weight for m in modules])) for modules in layers]
            for modules in layers:
                for m in modules:
                    base_of(m).weight.data = base_of(m).weight.data.new_empty(0)  # the benchmark needs no eager path
            result = [Weight(q, scale, tails[i], a[i] if a else None, b[i] if b else None)
                      for i, (q, scale) in enumerate(quantized)]
            start = 0
        else:
            tails = torch.zeros(len(layers), n * rows, columns + extra, dtype=self.dtype, device=self.device)
            for whole, modules in zip(tails, layers, strict=True):
                for i, m in enumerate(modules):
                    part = whole[i * rows : (i + 1) * rows, :columns]
                    part.copy_(base_of(m).weight)
                    base_of(m).weight.data = part
            result = [Weight(tails[i], None, None, a[i] if a else None, b[i] if b else None) for i in range(len(layers))]
            start = columns
        if adapted:
            first_b = self.place - len(layers) * n * rows * self.rank
            stacked = self.working[first_b : self.place].view(len(layers), n, rows, self.rank)
            self.tails += [(tails[:, i * rows : (i + 1) * rows, start + i * self.rank : start + (i + 1) * self.rank],
                            stacked[:, i]) for i in range(n)]
        return result

    def quantized(self, matrix):
        if self.quantize == "int8":
            scale = matrix.float().abs().amax(1) / 127
            return (matrix.float() / scale[:, None]).round().to(torch.int8), scale
        blocks = matrix.float().view(-1, 64)
        scale = blocks.abs().amax(1)
        code = torch.tensor(NF4, device=matrix.device)
        index = torch.bucketize(blocks / scale[:, None], (code[1:] + code[:-1]) / 2).to(torch.uint8).view(-1, 2)
        return (index[:, 0] << 4 | index[:, 1]), scale

    @torch.no_grad()
    def share_parameters(self):
        place = 0
        for p in self.parameters:
            view = slice(place, place + p.numel())
            self.masters[view].view_as(p).copy_(p)
            p.data = self.masters[view].view_as(p)
            p.grad = self.gradients[view].view_as(p)
            place += p.numel()

    @torch.no_grad()
    def refresh(self):
        """Copies the fp32 LoRA matrices to where the products read them."""
        self.working.copy_(self.masters)
        for to, matrices in self.tails:
            to.copy_(matrices)

    def loss(self, batch):
        """Summed cross-entropy of a packed batch (see `pack`)."""
        c, w, seeds = self.settings, self.base, batch["seeds"]
        dynamic = lambda x: torch._dynamo.maybe_mark_dynamic(x, 0) or x  # compile for any number of tokens
        starts, source_starts = dynamic(batch["target_starts"]), dynamic(batch["source_starts"])
        x = self.embed(dynamic(batch["source"]), w.shared.weight, seeds[-1, 0], c).requires_grad_()
        for i, layer in enumerate(self.encoder):
            x = self.encoder_block(dynamic(x), source_starts, self.encoder_bias, seeds[i], layer, c)
        source = dynamic(self.output(dynamic(x), w.encoder.final_layer_norm.weight, seeds[-1, 1], c))
        x = self.embed(dynamic(batch["target"]), w.shared.weight, seeds[-1, 2], c).requires_grad_()
        for i, layer in enumerate(self.decoder, len(self.encoder)):
            x = self.decoder_block(dynamic(x), source, starts, source_starts, self.decoder_bias, seeds[i], layer, c)
        return self.output_loss(dynamic(x), w.decoder.final_layer_norm.weight, w.lm_head.weight,
                                dynamic(batch["labels"]), seeds[-1, 3], c)

    def backward(self, batch, scale):
        """Adds the gradients of scale x loss to `gradients`; returns scale x loss."""
        loss = self.loss(batch) * scale
        gradients = torch.autograd.grad(loss, self.leaves)
        self.gradients.add_(torch.cat([g.flatten() for g in gradients]))
        return loss.detach()


# ---------- Batches -----------------------------------------------------------------------------------------------------


def size_class(tokens: int, least: int = 64) -> int:
    """`tokens` rounded up to one of few sizes, at most an eighth more."""
    step = max(least, 2 ** (max(tokens - 1, 1).bit_length() - 1) // 8)
    return -(-tokens // step) * step


def pack(sources, targets, rows, start_token=0):
    """Tensors (on the host) of one batch: token ids one after another, and where each row starts.

    `rows` is the number of rows to pretend: missing ones are empty. The last row of all is the filling.
    """
    def packed(lists, shift):
        lengths = [len(x) for x in lists] + [0] * (rows - len(lists))
        total = sum(lengths)
        size = size_class(total)
        ids = torch.zeros(size, dtype=torch.int64)
        starts = torch.zeros(rows + 2, dtype=torch.int32)
        starts[1:-1] = torch.tensor(lengths).cumsum(0)
        starts[-1] = size
        ids[:total] = torch.as_tensor([t for x in lists for t in shift(x)])
        return ids, starts

    source, source_starts = packed(sources, list)
    labels, target_starts = packed(targets, list)
    labels[target_starts[-2] :] = -100
    target, _ = packed(targets, lambda x: [start_token, *x[:-1]])
    return {"source": source, "source_starts": source_starts, "target": target, "labels": labels,
            "target_starts": target_starts}


# ---------- Greedy generation ---------------------------------------------------------------------------------------------


@torch.library.custom_op("flan::attend_once", mutates_args=())
def attend_once(q: torch.Tensor, kv: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor, begin: torch.Tensor,
                end: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of one query a row, [rows, inner], to the keys and values kv[begin : end] of its row, [.., 2 x inner]."""
    inner = kv.shape[1] // 2
    k, v, q = kv[:, :inner], kv[:, inner:], q[:, :inner]
    if q.device.type == "cpu" and not INTERPRET:
        return torch.cat([reference_attention(q[i : i + 1], k[a:b], v[a:b], bias, [0, 1], [0, b - a], heads, False)[0]
                          for i, (a, b) in enumerate(zip(begin.tolist(), end.tolist(), strict=True))])
    out = q.new_empty(len(q), inner)
    launch(forward_kernel, (1, len(q) * heads), heads, inner // heads, bias, False, 0.0, q, k, v, out, out, bias, rows,
           rows[1:], begin, end, rows, 0, 0, 1.0, q.stride(0), kv.stride(0), len(q), block={"BM": 16, "BN": 64, "num_warps": 4}, LSE=False)
    return out


def normed_sum(x, added, norm, eps: float):
    x = x + added
    return x, rms_norm(x, norm, eps)


def gated(both):
    gate, value = both.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * value


class Generator:
    """Greedy generation with merged weights, for a PackedT5 whose adapter has been merged into its base.

    All rows of a batch decode together, one CUDA graph a token. The keys and values of the dialogues lie packed; those
    of the summary have `new_tokens` places a row. When half of the rows have ended, the others go on in a graph of half
    the size: nothing but the numbers that say where a row's keys begin has to move.
    """

    def __init__(self, packed: PackedT5, new_tokens: int, rows: int, source_tokens: int, end=1, start=0):
        self.p, self.rows, self.new_tokens, self.end, self.start = packed, rows, new_tokens, end, start
        device, d, layers = packed.device, packed.config.num_heads * packed.config.d_kv, len(packed.decoder)
        empty = lambda *shape: torch.empty(*shape, dtype=packed.dtype, device=device)
        number = lambda *shape, dtype=torch.int32: torch.zeros(*shape, dtype=dtype, device=device)
        self.cross = [empty(source_tokens, 2 * d) for _ in range(layers)]
        self.cache = [empty(rows * new_tokens, 2 * d) for _ in range(layers)]
        self.row, self.token = number(rows, dtype=torch.int64), number(rows, dtype=torch.int64)
        self.source_begin, self.source_end, self.begin = number(rows), number(rows), number(rows)
        self.done = number(rows, dtype=torch.bool)
        self.position = number((), dtype=torch.int64)
        self.output = number(rows, new_tokens + 1, dtype=torch.int64)
        self.count = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.graphs = {}
        self.use_graphs = device.type == "cuda"
        wrap = torch.compile if self.use_graphs else lambda f, **_: f
        self.norm, self.normed_sum, self.gated = (wrap(f, dynamic=True) for f in (rms_norm, normed_sum, gated))

    def linear(self, x, w: Weight):
        matrix = dequantized(w.matrix, w.scale, w.tail, x.dtype)
        return F.linear(x, matrix[:, : x.shape[1]])

    def encode(self, batch):
        """Fills `cross` from packed dialogues."""
        p, c = self.p, self.p.settings
        x = F.embedding(batch["source"], p.base.shared.weight)
        starts, eps, heads = batch["source_starts"], c.eps, c.heads
        normed = self.norm(x, p.encoder[0].norm1, eps)
        after = [w.norm1 for w in p.encoder[1:]] + [p.base.encoder.final_layer_norm.weight.detach()]
        for w, next_norm in zip(p.encoder, after, strict=True):
            mixed, _ = attention(self.linear(normed, w.qkv), None, p.encoder_bias, starts, starts, starts, 0, 0.0, heads,
                                 c.longest[0], False)
            x, normed = self.normed_sum(x, self.linear(mixed, w.o), w.norm2, eps)
            x, normed = self.normed_sum(x, self.linear(self.gated(self.linear(normed, w.wi)), w.wo), next_norm, eps)
        for w, cross in zip(p.decoder, self.cross, strict=True):
            cross[: len(x)] = self.linear(normed, w.kv)

    def one_token(self, n: int):
        """The next token of the first n rows."""
        p, c = self.p, self.p.settings
        eps, heads, count = c.eps, c.heads, self.count[: n + 1]
        place = (self.begin[:n] + self.position).long()
        end = (place + 1).to(torch.int32)
        x = F.embedding(self.token[:n], p.base.shared.weight)
        normed = self.norm(x, p.decoder[0].norm1, eps)
        after = [w.norm1 for w in p.decoder[1:]] + [p.base.decoder.final_layer_norm.weight.detach()]
        for w, cache, cross, next_norm in zip(p.decoder, self.cache, self.cross, after, strict=True):
            qkv = self.linear(normed, w.qkv)
            inner = qkv.shape[1] // 3
            cache.index_copy_(0, place, qkv[:, inner:])
            mixed = attend_once(qkv, cache, p.decoder_bias, count, self.begin[:n], end, heads)
            x, normed = self.normed_sum(x, self.linear(mixed, w.o), w.norm2, eps)
            mixed = attend_once(self.linear(normed, w.q), cross, None, count, self.source_begin[:n], self.source_end[:n],
                                heads)
            x, normed = self.normed_sum(x, self.linear(mixed, w.cross_o), w.norm3, eps)
            x, normed = self.normed_sum(x, self.linear(self.gated(self.linear(normed, w.wi)), w.wo), next_norm, eps)
        chosen = F.linear(normed, p.base.lm_head.weight).argmax(-1)
        chosen = torch.where(self.done[:n], self.start, chosen)  # T5 starts with the token that pads
        self.token[:n] = chosen
        self.done[:n] |= chosen == self.end
        self.position += 1
        self.output.index_put_((self.row[:n], self.position.expand(n)), chosen)

    def keep(self, n: int):
        """Moves the rows that go on to the front, where n rows are computed from now on."""
        order = torch.argsort(self.done[: self.active].to(torch.int8), stable=True)[:n]
        for x in (self.row, self.token, self.source_begin, self.source_end, self.begin, self.done):
            x[:n] = x[order]
        self.active = n

    @torch.inference_mode()
    def __call__(self, sources, lengths=None, check_every=8):
        """Token ids of each row after the start token, up to and without the end token.

        `lengths` is for the benchmark: rows end after so many tokens, as random weights never end.
        """
        results = []
        for first in range(0, len(sources), self.rows):
            batch = sources[first : first + self.rows]
            packed = {k: v.to(self.p.device) for k, v in pack(batch, [[0]] * len(batch), len(batch)).items()}
            n = len(batch)
            self.source_begin.zero_(), self.source_end.zero_()
            self.source_begin[:n], self.source_end[:n] = packed["source_starts"][:n], packed["source_starts"][1 : n + 1]
            torch.arange(self.rows, out=self.row)
            self.begin.copy_(self.row * self.new_tokens)
            self.token.fill_(self.start), self.output.fill_(self.start), self.position.zero_()
            self.done.copy_(self.row >= n)
            self.encode(packed)
            self.active = self.rows
            for step in range(self.new_tokens):
                if step and step % check_every == 0:
                    if lengths is not None:
                        ended = torch.tensor([x <= step for x in lengths[first : first + n]] + [True] * (self.rows - n))
                        self.done |= ended.to(self.p.device)[self.row]
                    left = self.active - int(self.done[: self.active].sum())
                    if not left:
                        break
                    half = self.active
                    while half >= 32 and left <= half // 2:
                        half //= 2
                    if half < self.active:
                        self.keep(half)
                if not self.use_graphs:
                    self.one_token(self.active)
                elif self.active not in self.graphs:
                    self.one_token(self.active)  # also compiles; the next one is recorded
                    self.graphs[self.active] = None
                else:
                    if self.graphs[self.active] is None:
                        torch.cuda.synchronize()
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                            self.one_token(self.active)
                        self.graphs[self.active] = graph
                    self.graphs[self.active].replay()
            for row in self.output[:n, 1:].tolist():
                results.append(row[: row.index(self.end)] if self.end in row else row)
        return results


# ---------- One step, recorded and replayed -------------------------------------------------------------------------------


class GraphedStep:
    """Records what a step launches on the GPU, once per size of batch, and replays it."""

    def __init__(self, packed: PackedT5, optimizer, max_norm: float, seed: int, rank: int = 0):
        self.packed, self.optimizer, self.max_norm = packed, optimizer, max_norm
        self.seed, self.rank = seed, rank
        self.graphs, self.pool, self.update_graph = {}, None, None
        self.scale = torch.ones((), device=packed.device)
        self.lr = torch.zeros((), device=packed.device)
        self.norm = torch.zeros((), device=packed.device)
        self.capture_seconds = []
        self.use_graphs = packed.device.type == "cuda"
        self.side = torch.cuda.Stream() if self.use_graphs else None
        self.seen = set()

    def seeds(self, step: int, micro: int = 0):
        """Of all masks: a function of seed, process, step and micro-batch, so a resumed run draws the same ones."""
        layers = len(self.packed.encoder) + len(self.packed.decoder) + 1
        words = np.random.SeedSequence([self.seed, self.rank, step, micro]).generate_state(layers * SITES)
        return torch.from_numpy(words.view(np.int32).reshape(layers, SITES))

    def record(self, work):
        import time
        start = time.perf_counter()
        torch.cuda.synchronize()
        side = self.side  # always the same one: memory is handed on only within a stream
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        self.pool = self.pool or graph.pool()
        torch.cuda.empty_cache()  # of steps that ran eagerly; a recorded one has its own memory
        self.capture_seconds.append(time.perf_counter() - start)
        return graph, result

    def gradients(self, batch, step: int, scale: float, micro: int = 0):
        """Adds a micro-batch's gradients; returns its loss, a tensor that the next call overwrites."""
        device = self.packed.device
        key = tuple(len(batch[name]) for name in ("source", "target", "source_starts"))
        self.scale.fill_(scale)
        batch = batch | {"seeds": self.seeds(step, micro)}
        if not self.use_graphs:
            return self.packed.backward(batch, self.scale)
        if key not in self.seen:  # this compiles kernels and picks them, which cannot be recorded; rare sizes stay here
            self.seen.add(key)
            return self.packed.backward({name: x.to(device) for name, x in batch.items()}, self.scale)
        if key not in self.graphs:
            static = {name: x.to(device) for name, x in batch.items()}
            self.graphs[key] = static, *self.record(lambda: self.packed.backward(static, self.scale))
        static, graph, loss = self.graphs[key]
        for name, x in batch.items():
            static[name].copy_(x, non_blocking=True)
        graph.replay()
        return loss

    def update(self, lr: float):
        """Clips, takes an AdamW step unless the gradient is not finite, and clears the gradients."""
        self.lr.fill_(lr)
        if not self.use_graphs:
            return self.update_once()
        if self.update_graph is None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            for p in self.optimizer.param_groups[0]["params"]:  # AdamW makes its state in its first step, which must not be recorded
                state = self.optimizer.state[p]
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            self.update_graph, _ = self.record(self.update_once)
        self.update_graph.replay()

    @torch.no_grad()
    def update_once(self):
        g = self.packed.gradients
        self.norm.copy_(torch.linalg.vector_norm(g))
        if self.use_graphs:  # the fused kernel divides by grad_scale and does nothing where found_inf is 1
            self.optimizer.grad_scale = (self.norm / self.max_norm).clamp(min=1)
            self.optimizer.found_inf = self.norm.isfinite().logical_not().float()
        else:
            g.div_((self.norm / self.max_norm).clamp(min=1))
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.lr)
        self.optimizer.step()
        g.zero_()
        self.packed.refresh()
