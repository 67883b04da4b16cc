"""CPU check of the kernels in Triton's interpreter, tiny model."""
import torch, fast_model as fm, decode, sys
torch.manual_seed(0); torch.set_num_threads(2)
c = fm.Config(vocab_size=200, context=48, layers=2, heads=2, width=32)
m = fm.GPT(c)
for p in m.parameters():
    with torch.no_grad(): p.add_(torch.randn_like(p) * 0.15)
prompt = [5, 7, 9, 11]; n = 24
ref = decode.PlainDecoder(m).generate(prompt, 2, n)
for splits in (1, 2):
    d = decode.Decoder(m, 2, splits=splits, block=8)
    out = torch.cat(list(d.generate(prompt, n, chunk=5)), 1)
    print("splits", splits, torch.equal(out, ref), out[0].tolist()[:12], ref[0].tolist()[:12])
# sampler against a sort
for k, p, T in ((5, 1.0, 0.7), (0, 0.6, 1.3), (20, 0.5, 1.0)):
    d = decode.Decoder(m, 400, temperature=T, top_k=k, top_p=p, seed=3)
    logits = torch.randn(256).to(torch.bfloat16).float() * 3; logits = logits.to(torch.bfloat16).float()
    d.logits.copy_(logits.expand(400, -1)); d.sample()
    drawn = d.sequence[:, 1]
    o, idx = (logits[:200] / T).sort(descending=True); q = o.softmax(-1)
    if k: q[k:] = 0
    before = q.cumsum(0) - q; q[before >= p * q.sum()] = 0; q /= q.sum()
    full = torch.zeros(200).scatter(0, idx, q); freq = torch.bincount(drawn, minlength=200) / 400
    print(k, p, T, "outside support", int((full[drawn] == 0).sum()), "support", int((full > 0).sum()), "seen", int((freq > 0).sum()), "total variation", float((freq - full).abs().sum() / 2))
