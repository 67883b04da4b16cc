"""python final.py OUT SECONDS: the pretraining; ends SECONDS after its start, whatever it took to begin."""
import sys, tempfile, time
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
    folder = Path(tempfile.mkdtemp())
    tok = AutoTokenizer.from_pretrained(cand.here / "tok"); tok.save_pretrained(folder)
    mk.prepare_names()
    model = mk.make_model()
    if os.environ.get("INIT"):  # a folder with model-a and model-b of an earlier call: go on from them
        from safetensors.torch import load_file
        old = {k: v.float() for part in "ab" for k, v in load_file(f"{os.environ['INIT']}/model-{part}.safetensors").items()}
        lost = model.load_state_dict(old, strict=False)
        assert not lost.unexpected_keys and set(lost.missing_keys) <= {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}, lost
        print("goes on from", os.environ["INIT"], flush=True)
    model.to(device).train()
    fast = mk.compiled(model, B) if device == "cuda" else model
    print(f"compiled {time.time() - T0:.0f} s", flush=True)
    batches = mk.Batches(folder, int(os.environ.get("W", 15)), B, device, int(os.environ.get("FIRST", 7)))
    decay = [p for p in model.parameters() if p.dim() > 1]; rest = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=LR, betas=(.9, .98), fused=device == "cuda")
    batch = batches.draw(); start = time.time(); last = start; batches.waited = 0; step = 0; total = torch.zeros((), device=device)
    def save():
        """Two files of about 8 MB each, so that no file comes near a limit of 16 MiB; to_folder.py reads both."""
        every = {k: p.detach().bfloat16().cpu().contiguous() for k, p in model.named_parameters()}
        for part, side in (("a", "decoder"), ("b", "")):
            some = {k: v for k, v in every.items() if k.startswith("decoder") == (side == "decoder")}
            save_file(some, str(out / "part.tmp")); os.replace(out / "part.tmp", out / f"model-{part}.safetensors")
    while True:
        now = time.time(); progress = (now - start) / (T0 + seconds - start)
        if progress >= 1: break
        for g in opt.param_groups: g["lr"] = mk.learning_rate(progress, step, LR)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"): loss = fast(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step(); opt.zero_grad(set_to_none=True)
        step += 1; total += loss.detach()
        if step % int(os.environ.get('EVERY', 250)) == 0:
            print(f"step {step} {now - start:.0f} s loss {total.item() / int(os.environ.get('EVERY', 250)):.3f} {step * B / (now - start):,.0f} examples/s waited {batches.waited:.0f} s", flush=True); total.zero_()
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
