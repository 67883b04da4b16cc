"""python score_run.py MODEL_FOLDER ADAPTER|none PREFIX: sample test, free chats held out, the 20 own; on the CPU."""
import sys, json, random, cand; from cand import mk
import torch; torch.set_num_threads(1)
from transformers import AutoTokenizer, T5ForConditionalGeneration
mk.HELD_OUT_CHATS = 40; mk.prepare_names()
tok = AutoTokenizer.from_pretrained(sys.argv[1]); model = T5ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
if sys.argv[2] != "none":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
res, own, fr = cand.all_scores(model, tok, sys.argv[3], "test")
print(res)
for r, o in own: print("OWN", r["dialogue"].replace("\n", " | ")[:160], "\n   =>", o)
for r, o in fr[:10]: print("FREE", r["dialogue"].replace("\n", " | ")[:240], "\n   =>", o)
