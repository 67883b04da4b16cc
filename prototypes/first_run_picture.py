"""first_run.png from a log of the default run."""
import re,sys
from PIL import Image, ImageDraw, ImageFont
log=re.sub(r"\x1b\[[0-9;]*[A-Za-z]","",open(sys.argv[1],encoding='utf-8').read().replace("\r","\n")).split("\n")
old=Image.open('resource/flan-t5-tiny-sample/first_run.png').convert("RGB")
bg=old.getpixel((3,3))
cols=dict(white=(255,255,255),grey=(128,128,128),blue=(0x8f,0xae,0xff),yellow=(0xff,0xd7,0x75))
print(bg)
pick=lambda pat: [l for l in log if re.match(pat,l)]
lines=[("$ python flan-t5_samsum.py","bold")]
lines.append((pick(r"model: ")[0].split(" (LoRA")[0],"white"))
table=pick(r"\|")
head=table[:4]
lines+= [(l,"white") for l in head]
step=pick(r"step +10/")
lines.append((step[0] if step else "","grey")); lines.append(("...","grey"))
lines+=[(l,"white") for l in pick(r"\| +1 \|")[:2]]
i=next(i for i,l in enumerate(log) if l.startswith("Held-out dialogue 1"))
j=next(k for k in range(i,len(log)) if log[k].startswith("adapter/"))
c="white"; lines.append(("","white"))
for l in log[i:j]:
    s=l.strip()
    if s.startswith(("reference:","before:")): c="blue"
    elif s.startswith("after:"): c="yellow"
    elif not l.startswith("             "): c="white"
    lines.append((l.rstrip(),c))
while not lines[-1][0]: lines.pop()
F="/usr/share/fonts/truetype/dejavu/DejaVuSansMono%s.ttf"
import os
if not os.path.exists(F%""):
    import matplotlib; F=os.path.join(os.path.dirname(matplotlib.__file__),"mpl-data/fonts/ttf/DejaVuSansMono%s.ttf")
f=ImageFont.truetype(F%"",20); b=ImageFont.truetype(F%"-Bold",20)
w=max(f.getlength(l) for l,_ in lines); W=int(w)+40; H=27*len(lines)+34
im=Image.new("RGB",(max(W,old.width),H),bg); d=ImageDraw.Draw(im)
for n,(l,c) in enumerate(lines): d.text((20,19+27*n),l,font=b if c=="bold" else f,fill=cols.get(c,(255,255,255)) if c!="bold" else (235,235,235))
im.quantize(96).save(sys.argv[2],optimize=True)
