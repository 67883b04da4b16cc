"""How fast a CPU multiplies one vector with matrices that no cache holds, in GB of weights a second, by several ways."""
import torch,time,sys,numpy as np
torch.set_grad_enabled(False)
F=torch.nn.functional
def bench(f,ws,n=8):
    best=9e9
    for _ in range(n):
        t=time.perf_counter()
        for w in ws: f(w)
        best=min(best,time.perf_counter()-t)
    return best
for N,K in ((2304,768),(768,768),(3072,768),(768,3072),(50304,768)):
    cnt=max(1,int(300e6/(N*K*4)))
    rows=[torch.randn(N,K) for _ in range(cnt)]
    tr=[w.t().contiguous() for w in rows]   # (K,N)
    x=torch.randn(1,K); b=torch.randn(N); v=x[0].contiguous()
    G=cnt*N*K*4/1e9
    r={}
    r["linear rows"]=G/bench(lambda w:F.linear(x,w,b),rows)
    r["linear cols"]=G/bench(lambda w:F.linear(x,w.t(),b),tr)
    idx=torch.arange(K); off=torch.tensor([0,K//2])
    eb=lambda w:F.embedding_bag(idx,w,off,mode="sum",per_sample_weights=v)
    ref=rows[0]@v; got=eb(tr[0]).sum(0); r["eb err"]=float((ref-got).abs().max())
    r["embag"]=G/bench(eb,tr)
    off4=torch.tensor([0,K//4,K//2,3*K//4])
    r["embag4"]=G/bench(lambda w:F.embedding_bag(idx,w,off4,mode="sum",per_sample_weights=v),tr)
    nr=[w.numpy() for w in rows]; nt=[w.numpy() for w in tr]; nv=v.numpy()
    r["np rows"]=G/bench(lambda w:w@nv,nr)
    r["np cols"]=G/bench(lambda w:nv@w,nt)
    try:
        mk=[w.to_mkldnn() for w in rows]; xm=x.to_mkldnn(); bm=b.to_mkldnn()
        r["mkldnn_linear"]=G/bench(lambda w:torch._C._nn.mkldnn_linear(x.to_mkldnn(),w,bm).to_dense(),mk)
    except Exception as e: r["mkldnn_linear"]=str(e)[:100]
    try:
        cw=[w.view(N,K,1,1) for w in rows]; 
        r["conv"]=G/bench(lambda w:F.conv2d(x.view(1,K,1,1),w,b),cw)
    except Exception as e: r["conv"]=str(e)[:100]
    print((N,K),{k:(round(v,7) if k=="eb err" else round(v,1) if not isinstance(v,str) else v) for k,v in r.items()},flush=True)
