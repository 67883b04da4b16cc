"""python to_folder.py FOLDER_OF_PARTS TOKENIZER OUT: model-a and model-b, tied bf16 weights -> the folder that ships (own head, bf16)."""
import sys, cand; from cand import mk
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoTokenizer
w = {k: v for part in "ab" for k, v in load_file(f"{sys.argv[1]}/model-{part}.safetensors").items()}
d = w["shared.weight"].shape[1]
enc = len({k.split(".")[2] for k in w if k.startswith("encoder.block")}); dec = len({k.split(".")[2] for k in w if k.startswith("decoder.block")})
heads = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
kv = w["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads
ff = w["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
model = mk.make_model(d_model=d, d_kv=kv, num_heads=heads, d_ff=ff, num_layers=enc, num_decoder_layers=dec)
missing = model.load_state_dict({k: v.float() for k, v in w.items()}, strict=False)
print(missing)
mk.save(model, AutoTokenizer.from_pretrained(sys.argv[2]), Path(sys.argv[3]))
