"""python final.py OUT SECONDS: the pretraining; ends SECONDS after its start, whatever it took to begin."""
import sys, time
T0 = time.time()
import cand, os, json, math, random
from cand import mk
import torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoTokenizer
out, seconds = Path(sys.argv[1]), float(sys.argv[2])
B, LR = int(os.environ.get("B", 512)), float(os.environ.get("LR", 2e-3))
if __name__ == "__main__":
    mk.HELD_OUT_CHATS = 40
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    folder = Path("/tmp/final"); folder.mkdir(exist_ok=True)
    tok = AutoTokenizer.from_pretrained(cand.here / "tok"); tok.save_pretrained(folder)
    mk.prepare_names()
    model = mk.make_model()
    model.to(device).train()
    fast = mk.compiled(model, B) if device == "cuda" else model
    print(f"compiled {time.time() - T0:.0f} s", flush=True)
    batches = mk.Batches(folder, int(os.environ.get("W", 15)), B, device, int(os.environ.get("FIRST", 7)))
    decay = [p for p in model.parameters() if p.dim() > 1]; rest = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=LR, betas=(.9, .98), fused=device == "cuda")
    batch = batches.draw(); start = time.time(); last = start; batches.waited = 0; step = 0; total = torch.zeros((), device=device)
    def save():
        save_file({k: p.detach().bfloat16().cpu().contiguous() for k, p in model.named_parameters()}, str(out / "model.tmp")); os.replace(out / "model.tmp", out / "model.safetensors")
    while True:
        now = time.time(); progress = (now - start) / (T0 + seconds - start)
        if progress >= 1: break
        for g in opt.param_groups: g["lr"] = mk.learning_rate(progress, step, LR)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"): loss = fast(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step(); opt.zero_grad(set_to_none=True)
        step += 1; total += loss.detach()
        if step % 250 == 0:
            print(f"step {step} {now - start:.0f} s loss {total.item() / 250:.3f} {step * B / (now - start):,.0f} examples/s waited {batches.waited:.0f} s", flush=True); total.zero_()
        if now - last > (30 if step < 2000 else 60): last = now; save()
        batch = batches.draw()
    batches.stop(); save()
    print(f"SCORE steps {step} of {B}, {time.time() - start:.0f} s after {start - T0:.0f} s", flush=True)
    model.eval()
    res, own, fr = cand.all_scores(model, tok, "in short: ")
    print("SCORE", res, flush=True)
    for r, o in own: print("  OWN", r["dialogue"].split("\n")[0][:60], "=>", o)
    print("SCORE", mk.report(model, tok), flush=True)
    for r, o in fr[:15]: print("  FREE", r["dialogue"].replace("\n", " | ")[:300], "\n      =>", o, "\n      ==", r["summaries"][0])
    sys.stdout.flush(); os._exit(0)
