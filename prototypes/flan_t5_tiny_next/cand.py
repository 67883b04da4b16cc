"""python cand.py NAME MINUTES OUT: one variant; prints scores, saves tied bf16 weights."""
import importlib.util, json, os, sys, tempfile, time, re
from pathlib import Path
here = Path(__file__).parent
spec = importlib.util.spec_from_file_location("mk", here / "make_flan-t5-tiny.py"); mk = importlib.util.module_from_spec(spec); sys.modules["mk"] = mk
spec.loader.exec_module(mk)
import torch, random
from transformers import AutoTokenizer, T5ForConditionalGeneration
VARIANTS = {
    "a-base": {},
    "b-dropout": {"dropout": 0.1},
    "c-deep": {"geometry": {"num_layers": 6, "num_decoder_layers": 3, "d_ff": 512}},
    "d-lr1": {"lr": 1e-3},
}
def evaluate(model, tok, prefix, rows, show=0, own=()):
    import chats
    out = []
    for i in range(0, len(rows), 256): out += mk.answer(model, tok, [prefix + r["dialogue"] for r in rows[i:i+256]])
    r1 = sum(max(mk.rouge1(o, s) for s in r["summaries"]) for o, r in zip(out, rows)) / len(rows)
    bad = [mk.invented(o, r["dialogue"]) for o, r in zip(out, rows)]
    return r1, 100 * sum(map(bool, bad)) / len(rows), out
def all_scores(model, tok, prefix, split="validation"):
    import chats
    rows = [dict(json.loads(l)) for l in open(here / f"{split}.jsonl")]
    for r in rows: r["summaries"] = [r["summary"]]
    free = [chats.tell(c, random.Random(i)) for i, c in enumerate(mk.free_chats(held_out=True))]
    own = [{"dialogue": d, "summaries": [""]} for d in (here / "own20.txt").read_text().strip().split("\n\n")]
    res = {}
    for name, rs in (("sample", rows), ("free", free), ("own", own)):
        r1, bad, out = evaluate(model, tok, prefix, rs)
        res[name] = (round(r1, 1), round(bad, 1)); last = out
        if name == "free": fr = list(zip(free, out))
    return res, list(zip(own, last)), fr
if __name__ == "__main__":
    name, minutes, out = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    v = VARIANTS[name]
    mk.HELD_OUT_CHATS = 80
    folder = Path(tempfile.mkdtemp())
    args = mk.build_parser().parse_args(["--minutes", str(minutes), "--workers", os.environ.get("W", "4"), "--lr", str(v.get("lr", 2e-3)), "--batch-size", "512", "--output", str(folder)] + (["--steps", "3", "--batch-size", "8"] if minutes == 0 else []))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    mk.prepare_names()
    tok = AutoTokenizer.from_pretrained(here / "tok"); tok.save_pretrained(folder)
    model = mk.make_model(**v.get("geometry", {}))
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = v.get("dropout", 0.0)
        if hasattr(m, "dropout") and isinstance(m.dropout, float): m.dropout = v.get("dropout", 0.0)
    print(name, sum(p.numel() for p in model.parameters()) / 1e6, flush=True)
    mk.pretrain(model, folder, args, device)
    model.eval()
    from safetensors.torch import save_file
    save_file({k: p.detach().bfloat16().cpu().contiguous() for k, p in model.named_parameters()}, str(out / f"{name}.safetensors"))
    json.dump(model.config.to_dict(), open(out / f"{name}.config.json", "w"))
    model = model.float()
    print("SCORE", name, mk.report(model, tok), flush=True)
    res, own, fr = all_scores(model, tok, "in short: ")
    print("SCORE", name, res, flush=True)
    for r, o in own: print("  OWN", name, r["dialogue"].split("\n")[0][:60], "=>", o)
    for r, o in fr[:12]: print("  FREE", name, r["dialogue"].replace("\n", " | ")[:200], "\n      =>", o, "\n      ==", r["summaries"][0])
    os._exit(0)
