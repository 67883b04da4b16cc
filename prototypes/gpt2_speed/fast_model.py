"""Exact GPT-2 with switches for the speed levers. Tokens (B, T) and targets (B, T) -> summed loss."""
import math
from dataclasses import dataclass
import torch, torch.nn as nn, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
try:
    import triton, triton.language as tl
except ImportError:
    triton = None

@dataclass(frozen=True)
class Config:
    vocab_size: int = 50257; context: int = 1024; layers: int = 12; heads: int = 12; width: int = 768
    @property
    def padded(self): return -(-self.vocab_size // 128) * 128

SIZES = {"gpt2": dict(), "gpt2-medium": dict(layers=24, heads=16, width=1024), "gpt2-large": dict(layers=36, heads=20, width=1280),
         "shakespeare": dict(vocab_size=257, context=256, layers=6, heads=6, width=384),
         "tinier": dict(context=32, layers=2, heads=2, width=32),
         "tiny": dict(vocab_size=500, context=64, layers=2, heads=2, width=64)}
FLAGS = {"ce": "plain", "attention": "default", "embedding": "plain"}

if triton is not None:
    @triton.jit
    def cross_entropy_kernel(logits, targets, losses, vocab_size: tl.constexpr, stride: tl.constexpr, BLOCK: tl.constexpr):
        """A row of logits -> its loss; the row itself becomes the loss's gradient."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        target = tl.load(targets + row)
        m = float("-inf")
        s = 0.0
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
            new = tl.maximum(m, tl.max(x, 0))
            s = s * tl.exp(m - new) + tl.sum(tl.exp(x - new), 0)
            m = new
        lse = m + tl.log(s)
        counts = target >= 0
        hit = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
        tl.store(losses + row, tl.where(counts, lse - hit, 0.0))
        tl.debug_barrier()  # the target's logit is read before a thread overwrites it
        for start in range(0, stride, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
            g = tl.exp(x - lse) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + columns, tl.where(counts, g, 0.0), mask=columns < stride)

if triton is not None:
    @triton.jit
    def cross_entropy_once(logits, targets, losses, vocab_size: tl.constexpr, stride: tl.constexpr, BLOCK: tl.constexpr):
        """The whole row in registers: read once, written once."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        target = tl.load(targets + row)
        columns = tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf"))
        m = tl.max(x, 0).to(tl.float32)
        lse = m + tl.log(tl.sum(tl.exp(x.to(tl.float32) - m), 0))
        counts = target >= 0
        hit = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
        tl.store(losses + row, tl.where(counts, lse - hit, 0.0))
        tl.debug_barrier()
        g = tl.exp(x.to(tl.float32) - lse) - tl.where(columns == target, 1.0, 0.0)
        tl.store(logits + columns, tl.where(counts, g, 0.0), mask=columns < stride)

    @triton.jit
    def gelu_backward_kernel(grad, pre, out, sums, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr):
        """out = grad * gelu'(pre), and the sums of its columns over ROWS rows: the bias's gradient in parts."""
        n = tl.program_id(0) * COLS + tl.arange(0, COLS)
        total = tl.zeros((BLOCK, COLS), tl.float32)
        for start in range(0, ROWS, BLOCK):
            m = (tl.program_id(1) * ROWS + start + tl.arange(0, BLOCK)).to(tl.int64)
            place = m[:, None] * N + n[None, :]
            x = tl.load(pre + place).to(tl.float32)
            g = tl.load(grad + place).to(tl.float32)
            inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
            t = 2 / (1 + tl.exp(-2 * inner)) - 1
            d = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
            g = (g * d).to(out.dtype.element_ty)
            tl.store(out + place, g)
            total += g.to(tl.float32)
        tl.store(sums + tl.program_id(1) * N + n, tl.sum(total, 0))

CE = dict(once=False, BLOCK=8192, num_warps=16)
def cross_entropy(logits, targets, losses, vocab_size):
    kernel = cross_entropy_once if CE["once"] else cross_entropy_kernel
    kernel[(len(logits),)](logits, targets, losses, vocab_size, logits.stride(0), BLOCK=CE["BLOCK"], num_warps=CE["num_warps"])

@torch.library.custom_op("gpt2x::head_loss", mutates_args=())
def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = x @ weight.T
    losses = torch.empty(len(x), device=x.device, dtype=torch.float32)
    if x.is_cuda:
        cross_entropy(logits, targets, losses, vocab_size)
        return losses, logits
    logits[:, vocab_size:] = -math.inf
    logp = logits.float().log_softmax(-1)
    losses = F.nll_loss(logp, targets, ignore_index=-1, reduction="none")
    g = logp.exp(); g[torch.arange(len(x)), targets.clamp(min=0)] -= 1; g[targets < 0] = 0
    return losses, g.to(x.dtype)
@head_loss.register_fake
def _(x, weight, targets, vocab_size):
    return x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), len(weight))
def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
def _backward(ctx, grad, _):
    # reached with the gradient of a sum: one number for all rows
    x, weight, g = ctx.saved_tensors
    scale = grad[0]
    return (g @ weight) * scale, (g.T @ x) * scale, None, None
head_loss.register_autograd(_backward, setup_context=_setup)

@torch.library.custom_op("gpt2x::lookup", mutates_args=())
def lookup(weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.embedding(tokens, weight)
@lookup.register_fake
def _(weight, tokens): return weight.new_empty(*tokens.shape, weight.shape[1])
@torch.library.custom_op("gpt2x::lookup_backward", mutates_args=())
def lookup_backward(grad: torch.Tensor, tokens: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, -1, False)
@lookup_backward.register_fake
def _(grad, tokens, rows): return grad.new_empty(rows, grad.shape[-1])
lookup.register_autograd(lambda ctx, g: (lookup_backward(g.contiguous(), ctx.tokens, ctx.rows), None),
                         setup_context=lambda ctx, inputs, output: (setattr(ctx, "tokens", inputs[1]), setattr(ctx, "rows", inputs[0].shape[0])) and None)

def head_loss_region(self, x, targets):
    return head_loss(self.ln_f(x).flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size)[0].sum()

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__(); self.heads = c.heads
        self.c_attn = nn.Linear(c.width, 3 * c.width); self.c_proj = nn.Linear(c.width, c.width)
    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (p.view(B, T, self.heads, C // self.heads).transpose(1, 2) for p in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))
class MLP(nn.Module):
    def __init__(self, c):
        super().__init__(); self.c_fc = nn.Linear(c.width, 4 * c.width); self.c_proj = nn.Linear(4 * c.width, c.width)
    def forward(self, x): return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
class Block(nn.Module):
    def __init__(self, c):
        super().__init__(); self.ln_1 = nn.LayerNorm(c.width); self.attn = Attention(c); self.ln_2 = nn.LayerNorm(c.width); self.mlp = MLP(c)
    def forward(self, x):
        x = x + self.attn(self.ln_1(x)); return x + self.mlp(self.ln_2(x))
class GPT(nn.Module):
    def __init__(self, c, zero_proj=False):
        super().__init__(); self.config = c
        self.wte = nn.Embedding(c.padded, c.width); self.wpe = nn.Embedding(c.context, c.width)
        self.h = nn.ModuleList(Block(c) for _ in range(c.layers)); self.ln_f = nn.LayerNorm(c.width)
        self.initialise(zero_proj)
    @torch.no_grad()
    def initialise(self, zero_proj=False):
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.01 if name == "wpe.weight" else 0.02
                if name.endswith("c_proj.weight"): std = 0.0 if zero_proj else std / math.sqrt(2 * self.config.layers)
                p.normal_(0, std) if std else p.zero_()
            elif name.endswith("bias"): p.zero_()
        self.wte.weight[self.config.vocab_size:] = 0
    def forward(self, tokens, targets=None):
        e = lookup(self.wte.weight, tokens) if FLAGS["embedding"] == "sorted" else self.wte(tokens)
        x = e + self.wpe.weight[: tokens.shape[1]]
        for block in self.h: x = block(x)
        if targets is not None and FLAGS["ce"] == "fused":
            return head_loss_region(self, x, targets)
        x = self.ln_f(x)
        rows = torch.arange(self.config.padded, device=tokens.device)
        bias = torch.where(rows < self.config.vocab_size, 0.0, -math.inf).to(x.dtype)
        logits = F.linear(x, self.wte.weight, bias)
        if targets is None: return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum")

def flops_per_token(c): return 6 * (c.layers * 12 * c.width**2 + c.vocab_size * c.width) + 12 * c.layers * c.width * c.context
