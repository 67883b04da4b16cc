"""The kernels in Triton's interpreter against the reference."""
import os
os.environ["TRITON_INTERPRET"]="1"
import torch, fast_t5 as f
f.INTERPRET=True
torch.manual_seed(0)
H,D=3,16
def starts(l): return torch.tensor([0]+l).cumsum(0).to(torch.int32)
def check(name, ql, kl, bias, causal, self_):
    qs,ks=starts(ql),starts(kl)
    q=torch.randn(int(qs[-1]),(3 if self_ else 1)*H*D)
    kv=q if self_ else torch.randn(int(ks[-1]),2*H*D)
    b=torch.randn(H,2*f.LIMIT+1) if bias else None
    q.requires_grad_(); 
    if not self_: kv.requires_grad_()
    seed=torch.tensor([5],dtype=torch.int32)
    leaves=[q] if self_ else [q,kv]
    res=[]
    for mode in (True,False):
        f.INTERPRET=mode
        out=f.Attention.apply(q, None if self_ else kv, b, qs, ks, seed, 0, 0.0, H, max(ql), max(kl), causal)
        torch.manual_seed(1); g=torch.randn_like(out)
        res.append([out,*torch.autograd.grad(out,leaves,g)])
    print(name,[float((a-b).norm()/b.norm()) for a,b in zip(*res)])
check("enc",[70,3,140,1],[70,3,140,1],True,False,True)
check("dec",[70,3,33,1],[70,3,33,1],True,True,True)
check("cross",[5,3,70,4],[70,3,140,0],False,False,False)
# dropout: gradient by finite differences of the kernel itself
f.INTERPRET=True
qs=starts([5,3]); q=torch.randn(8,3*H*D,dtype=torch.float32,requires_grad=True); b=torch.randn(H,257)
fn=lambda q: f.Attention.apply(q,None,b,qs,qs,torch.tensor([5],dtype=torch.int32),0,0.3,H,5,5,False)
out=fn(q); g=torch.randn_like(out); (an,)=torch.autograd.grad(out,q,g)
for _ in range(4):
    d=torch.randn_like(q); e=1e-3
    num=((fn(q+e*d)-fn(q-e*d))*g).sum()/(2*e); print("fd",float(num),float((an*d).sum()))
