"""argv: MODEL variants(comma or -) [flags]; one line of ms."""
import os, sys, types
model, variants, *flags = sys.argv[1:]; variants = variants.split(",")
if "mk" in variants: os.environ["TORCHINDUCTOR_MULTI_KERNEL"] = "2"
if "mk1" in variants: os.environ["TORCHINDUCTOR_MULTI_KERNEL"] = "1"
import torch, time
sys.path.insert(0, "tests"); import benchmark_gpt2 as b
import gpt2_from_scratch as gpt2
F = torch.nn.functional
if "cf" in variants:
    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse, cq, ck, mq, mk, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
            ctx.save_for_backward(q, k, v, out, lse, seed, offset); ctx.m = (mq, mk)
            return out
        @staticmethod
        def backward(ctx, g):
            q, k, v, out, lse, seed, offset = ctx.saved_tensors
            lse = lse.squeeze(-1) if lse.dim() == 4 else lse
            T = q.shape[2]
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(g, q, k, v, out, lse, None, None, T, T, 0.0, True, seed, offset)
            return dq, dk, dv
    class FF:
        def __getattr__(self, n): return getattr(F, n)
        def scaled_dot_product_attention(self, q, k, v, mask=None, p=0.0, is_causal=False): return Mixed.apply(q, k, v)
    gpt2.F = FF()
if "fe" in variants:
    def take(self, parameter, copied): pass
    gpt2.Trainer.take_gradient = take
    clip = torch.nn.utils.clip_grad_norm_
    class U:
        @staticmethod
        def clip_grad_norm_(parameters, c):
            copies = list(T.compute_copy.parameters())
            if copies[0].grad is not None:
                grads = [torch.empty_like(p) for p in parameters]
                torch._foreach_copy_(grads, [c_.grad for c_ in copies])
                for p, g, c_ in zip(parameters, grads, copies): p.grad = g; c_.grad = None
            return clip(parameters, c)
    class NN:
        utils = U
        def __getattr__(self, n): return getattr(torch.nn, n)
    gpt2.nn = NN()
if "wm" in variants:
    def whole(trainer, compiled):
        n = trainer.compute_copy; n.is_loss_fused = True
        n.compile(dynamic=False); gpt2.forward_backward(trainer, trainer.machine.micro_batch_size); return "compiled"
    gpt2.compile_compute_copy = whole
arguments = types.SimpleNamespace(tiny=False)
started = time.perf_counter()
T = b.make_trainer(arguments, model, b.SEQUENCES[model], *flags)
built = time.perf_counter() - started
step = b.our_step(T)
losses = [step(n)[:2].tolist() for n in range(6)]
v = b.measure(f"{model} {','.join(variants)} {flags}", T, step, arguments)
print(f"STEP {model:12} {','.join(variants):12} {' '.join(flags):20} {v['milliseconds']:8.2f} ms {v['tokens_per_second']:10,.0f}/s {v['share_of_measured']:.4f} graph {bool(T.step_graph)} built {built:.1f} s {v['peak_gib']:.1f} GiB losses {losses[0]} {losses[5]}", flush=True)
