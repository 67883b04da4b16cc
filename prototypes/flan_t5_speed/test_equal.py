"""Loss and gradients of PackedT5 against transformers + PEFT (fp32, no dropout)."""
import sys, torch, copy
import fast_t5 as f
from transformers import T5Config, T5ForConditionalGeneration
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)
def build(dropout=0.0, dtype=torch.float32):
    c=T5Config(vocab_size=500,d_model=64,d_kv=16,d_ff=128,num_layers=2,num_decoder_layers=3,num_heads=4,feed_forward_proj="gated-gelu",tie_word_embeddings=False,decoder_start_token_id=0,dropout_rate=dropout)
    torch.manual_seed(0)
    m=T5ForConditionalGeneration(c).to(dtype)
    m=get_peft_model(m,LoraConfig(r=8,lora_alpha=16,target_modules=["q","k","v","o"],lora_dropout=dropout,task_type="SEQ_2_SEQ_LM")).train()
    for n,p in m.named_parameters():
        if "lora_B" in n: p.data.normal_(0,0.05)
    return m
SEEDS={'seeds':torch.arange(6*f.SITES,dtype=torch.int32).view(6,-1)*7919}
rows=[([5,6,7,8,1]*k, [9,10,1]*j) for k,j in ((3,2),(40,5),(1,1),(20,9))]
m=build()
S=max(len(s) for s,_ in rows); T=max(len(t) for _,t in rows)
x=torch.tensor([s+[0]*(S-len(s)) for s,_ in rows]); y=torch.tensor([t+[-100]*(T-len(t)) for _,t in rows])
out=m(input_ids=x,attention_mask=(x!=0).long(),labels=y)
n=(y!=-100).sum(); (out.loss*n).backward()
ref={k:p.grad.clone() for k,p in m.named_parameters() if p.requires_grad}
for compiled in (False,) + ((True,) if len(sys.argv)>1 else ()):
    m2=build()
    p=f.PackedT5(m2,longest=(512,128),compiled=False)
    if compiled:
        p.embed,p.encoder_block,p.output,p.decoder_block,p.output_loss=(torch.compile(g,backend=sys.argv[1]) for g in (f.embed,f.encoder_block,f.output,f.decoder_block,f.output_loss))
    for again in range(2):
        p.gradients.zero_()
        loss=p.backward(f.pack(*zip(*rows),rows=6 if again else 4)|SEEDS,torch.ones(()))
        err=max(float((g-dict(m2.named_parameters())[k].grad).norm()/g.norm()) for k,g in ref.items())
        print("loss",float(out.loss*n),float(loss),"largest relative error of a gradient",err, float(p.gradients.norm()), sum(g.norm()**2 for g in ref.values())**.5)
    with torch.no_grad(): print("eager path on shared weights", float((m2(input_ids=x,attention_mask=(x!=0).long(),labels=y).loss*n)))
for q in ("int8","int4"):
    m3=build(); p=f.PackedT5(m3,compiled=False,quantize=q); print(q, float(p.backward(f.pack(*zip(*rows),rows=4)|SEEDS,torch.ones(()))))
m4=build(0.1); p=f.PackedT5(m4,compiled=False); o=torch.optim.AdamW(p.parameters,1e-3,fused=True)
st=f.GraphedStep(p,o,1.0,42)
for step in range(5):
    l=st.gradients(f.pack(*zip(*rows),rows=4),step,1/float(n)); st.update(1e-3); print(float(l), float(st.norm))
# dropout: the gradient of a step with masks, by finite differences, and compiled against eager
m5=build(0.2); p=f.PackedT5(m5,compiled=False); b=f.pack(*zip(*rows),rows=4)|SEEDS
p.gradients.zero_(); l0=p.backward(b,torch.ones(())); g=p.gradients.clone(); d=torch.randn_like(g); d/=d.norm(); e=3e-2; old=p.masters.clone()
v=[]
for s_ in (e,-e): p.masters.copy_(old+s_*d); p.refresh(); v.append(float(p.loss(b)))
print("dropout fd", (v[0]-v[1])/(2*e), float((g*d).sum()), "mean kept", float(f.keeps((1000,1000),torch.tensor(77,dtype=torch.int32),0.2).float().mean()))
