# One GPU, calls within 30 s of each other: `M=25 next.sh start`, `next.sh wait 540` as often as it takes, `next.sh minutes N` when the time that
# is left is known (well before 93% of it, when dropout ends), `next.sh trained`. Start 90 to 160 s, its compilation included; measuring 20 s.
# First: SHARD_ROWS = 1024 in resource/make_flan-t5-tiny.py (one process feeds the GPU and is the limit: 16,500 examples/s, GPU at 58%, where
# 15 workers make 25,000), more chats.txt.xz (more-chats.txt.xz of this commit, before the last 500, which stay unread).
export PYTHONPATH=/tmp/site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
show() { date +%T; tail -n ${1:-4} /tmp/next.log | cut -c1-170; nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader; }
alive() { pgrep -f "^python3 make_flan-t5-tiny.py" > /dev/null; }
case $1 in
start)
  python3 -m pip install -q --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl 2> /tmp/pip.err
  cp -rL resource /tmp/tiny; cd /tmp/tiny; echo ${M:-25} > /tmp/minutes
  sed -i 's|^            last_report = time.time() - start$|&\n            args.minutes = float(Path("/tmp/minutes").read_text())|' make_flan-t5-tiny.py
  OMP_NUM_THREADS=2 setsid nohup python3 make_flan-t5-tiny.py --first flan-t5-tiny --lr ${LR:-1e-3} --batch-size ${B:-1024} --weight-decay ${WD:-0.2} --minutes ${M:-25} --workers 15 \
    --report-seconds 15 --dropout ${D:-0.2} --seed 10000 --output /tmp/out/flan-t5-tiny > /tmp/next.log 2>&1 < /dev/null & sleep 3
  for i in $(seq 200); do grep -q "^first step" /tmp/next.log && break; alive || break; sleep 1; done
  show 3; sleep ${2:-50}; show 8 ;;
minutes) echo $2 > /tmp/m.new; mv /tmp/m.new /tmp/minutes; sleep ${3:-5}; show 3 ;;
wait) for i in $(seq $(( $2 / 5 ))); do alive || break; sleep 5; done; show 6 ;;
trained)
  for i in $(seq 113); do alive || break; sleep 5; done
  split -b 10000000 -d /tmp/out/flan-t5-tiny/model.safetensors $OUT/model.part
  cp /tmp/out/flan-t5-tiny/README.md /tmp/next.log /tmp/out/flan-t5-tiny/config.json $OUT/; show 18 ;;
esac
