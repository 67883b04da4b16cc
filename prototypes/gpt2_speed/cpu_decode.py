"""Greedy decoding on a CPU against transformers' generate, interleaved: nano and 124M."""
import time, sys, torch, torch.nn.functional as F, fast_model as fm
from transformers import GPT2Config, GPT2LMHeadModel
torch.set_num_threads(2)
class CPUDecoder:
    """Cache grown in steps; tensors laid out once; the fewest aten calls a token. int8: dynamic weights for comparison."""
    def __init__(self, m, rows=1, dtype=torch.float32):
        c = m.config; self.c, self.rows, self.D = c, rows, c.width // c.heads
        g = lambda t: t.detach().to(dtype)
        self.wte, self.wpe, self.head = g(m.wte.weight), g(m.wpe.weight), g(m.wte.weight)[: c.vocab_size]
        self.lnf = (g(m.ln_f.weight), g(m.ln_f.bias))
        # the gain of a norm and its shift go into the matrix behind it: norm(x) * g + b, times W = norm(x) * (W g) + W b
        self.layers = [(g(b.ln_1.weight), g(b.ln_1.bias), g(b.attn.c_attn.weight), g(b.attn.c_attn.bias), g(b.attn.c_proj.weight), g(b.attn.c_proj.bias),
                        g(b.ln_2.weight), g(b.ln_2.bias), g(b.mlp.c_fc.weight), g(b.mlp.c_fc.bias), g(b.mlp.c_proj.weight), g(b.mlp.c_proj.bias)) for b in m.h]
        self.room = 0; self.dtype = dtype
    def grow(self, n):
        n = min(self.c.context, -(-n // 128) * 128)
        if n > self.room:
            new = torch.zeros(self.c.layers, 2, self.rows, self.c.heads, n, self.D, dtype=self.dtype)
            if self.room: new[..., : self.room, :] = self.cache
            self.cache, self.room = new, n
            self.kv = [(new[i, 0], new[i, 1]) for i in range(self.c.layers)]
    def forward(self, tokens, start):
        R, T = tokens.shape; C, H, D = self.c.width, self.c.heads, self.D; shape = (C,); end = start + T
        self.grow(end)
        x = F.embedding(tokens, self.wte) + self.wpe[start:end]
        for (g1, b1, wa, ba, wp, bp, g2, b2, wf, bf, wm, bm), (K, V) in zip(self.layers, self.kv):
            q, k, v = F.linear(F.layer_norm(x, shape, g1, b1), wa, ba).view(R, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
            K[:, :, start:end] = k; V[:, :, start:end] = v
            y = F.scaled_dot_product_attention(q, K[:, :, :end], V[:, :, :end], is_causal=T > 1)
            x = x.add_(F.linear(y.transpose(1, 2).reshape(R, T, C), wp, bp))
            x = x.add_(F.linear(F.gelu(F.linear(F.layer_norm(x, shape, g2, b2), wf, bf), approximate="tanh"), wm, bm))
        return F.linear(F.layer_norm(x[:, -1:], shape, *self.lnf), self.head)
    @torch.inference_mode()
    def generate(self, prompt, n):
        tokens = torch.tensor([prompt] * self.rows); start, out = 0, []
        for _ in range(n):
            logits = self.forward(tokens, start); start += tokens.shape[1]
            tokens = logits[:, -1].argmax(-1, keepdim=True); out.append(tokens)
        return torch.cat(out, 1)
def hf_of(m):
    c = m.config
    h = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.width, n_layer=c.layers, n_head=c.heads, bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()
    sd = {}
    for k, v in m.state_dict().items():
        if k == "wte.weight": v = v[: c.vocab_size]
        sd["transformer." + k] = v.T.contiguous() if v.dim() == 2 and ".h." in "." + k else v
    h.load_state_dict(sd, strict=False); h.tie_weights(); return h
for name, c, n, P in (("nano", fm.Config(vocab_size=1024, context=64, layers=4, heads=4, width=128), 48, 8), ("124M", fm.Config(), 24, 32)):
    torch.manual_seed(0); m = fm.GPT(c)
    with torch.no_grad():
        for p in m.parameters():
            if p.dim() == 2: p.mul_(2)
    hf = hf_of(m); prompt = list(range(5, 5 + P)); best = {}
    d = CPUDecoder(m); b = CPUDecoder(m, dtype=torch.bfloat16) if name == "124M" else None
    for _ in range(6 if name == "nano" else 3):
        for what, f in (("transformers", lambda: hf.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[:, P:]), ("ours fp32", lambda: d.generate(prompt, n)), ("ours bf16", b and (lambda: b.generate(prompt, n)))):
            if not f: continue
            s = time.perf_counter(); o = f(); s = (time.perf_counter() - s) / n
            best.setdefault(what, [9e9, o]); best[what][0] = min(best[what][0], s)
    print(name, {k: f"{1/v[0]:.0f} tok/s ({best['transformers'][0]/v[0]:.2f} x)" for k, v in best.items()}, "same tokens as transformers:", {k: (v[1] == best["transformers"][1]).float().mean().item() for k, v in best.items()}, flush=True)
