"""Tokenises SAMSum into tokens.npz: token ids (uint16) of every row, and their lengths."""
import json, numpy as np
from transformers import AutoTokenizer
tok = AutoTokenizer.from_pretrained("../shared/data/tokenizers/flan-t5")
out = {}
for split in ("train", "test"):
    rows = [json.loads(l) for l in open(f"../shared/data/samsum/{split}.jsonl")]
    rows = [r for r in rows if r["dialogue"]]
    s = tok(["summarize: " + r["dialogue"].replace("\r\n", "\n") for r in rows], truncation=True, max_length=512).input_ids
    t = tok([r["summary"] for r in rows], truncation=True, max_length=128).input_ids
    for name, x in (("source", s), ("target", t)):
        out[f"{split}_{name}"] = np.concatenate([np.array(r, np.uint16) for r in x])
        out[f"{split}_{name}_len"] = np.array([len(r) for r in x], np.int32)
np.savez_compressed("tokens.npz", **out)
