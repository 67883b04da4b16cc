"""Products of matrices by torch (MKL), NumPy (OpenBLAS) and oneDNN, in GFLOP/s."""
import torch,time,numpy as np
torch.set_grad_enabled(False)
F=torch.nn.functional
def best(f,n=6):
    b=9e9
    for _ in range(n):
        t=time.perf_counter(); f(); b=min(b,time.perf_counter()-t)
    return b
for M,N,K in ((2048,2048,2048),(4096,512,128),(4096,128,512),(8192,1024,256),(1088,1024,256),(8,3072,768),(8,768,3072),(8,50304,768),(32,3072,768),(500,3072,768)):
    cnt=max(1,int(100e6/(N*K*4))) if M<=32 else 4
    x=torch.randn(M,K); ws=[torch.randn(N,K) for _ in range(cnt)]; tr=[w.t().contiguous() for w in ws]
    xn=x.numpy(); nw=[w.numpy() for w in ws]; nt=[w.numpy() for w in tr]
    fl=2*M*N*K*cnt/1e9
    def T(): 
        for w in ws: F.linear(x,w)
    def TC(): 
        for w in tr: x@w
    def A(): 
        for w in nw: xn@w.T
    def B():
        for w in nt: xn@w
    mk=[w.to_mkldnn() for w in ws]
    def C():
        for w in mk: torch._C._nn.mkldnn_linear(x.to_mkldnn(),w,None).to_dense()
    print((M,N,K),"GFLOP/s torch rows %.0f cols %.0f numpy rows %.0f cols %.0f mkldnn %.0f"%tuple(fl/best(f) for f in (T,TC,A,B,C)),flush=True)
