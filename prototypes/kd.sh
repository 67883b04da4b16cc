# One GPU, one training that learns from two teachers, calls within 30 s of each other. The working tree holds the new chats.txt.xz and the
# weights to go on from (M157) in resource/flan-t5-tiny. What a call carries is limited: a first call brings the other teacher and keeps it,
#   mkdir -p /tmp/other && cp .gpu/other/* /tmp/other                     (carry .gpu/other: model.safetensors of the sibling of M137)
# then `M=23 kd.sh start` (carry .gpu/wheels and .gpu/kd.sh), `kd.sh wait 540`, `kd.sh minutes N`, `kd.sh trained`.
# M157 and that sibling predict 0.948 together on the unread chats, alone 0.981 and 0.996 (M157 and M137 0.957).
export PYTHONPATH=/tmp/site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
show() { date +%T; tail -n ${1:-4} /tmp/kd.log | cut -c1-170; nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader; }
alive() { pgrep -f "^python3 make_flan-t5-tiny.py" > /dev/null; }
case $1 in
start)
  python3 -m pip install -q --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl 2> /tmp/pip.err
  cp -rL resource /tmp/tiny; cd /tmp/tiny; echo ${M:-23} > /tmp/minutes
  sed -i 's|^            last_report = time.time() - start$|&\n            args.minutes = float(Path("/tmp/minutes").read_text())|' make_flan-t5-tiny.py
  OMP_NUM_THREADS=2 setsid nohup python3 make_flan-t5-tiny.py --first flan-t5-tiny --teachers flan-t5-tiny /tmp/other --lr ${LR:-1e-3} --batch-size ${B:-512} \
    --weight-decay ${WD:-0.2} --dropout ${D:-0.15} --minutes ${M:-23} --workers 15 --report-seconds 15 --seed 30000 --output /tmp/out/flan-t5-tiny > /tmp/kd.log 2>&1 < /dev/null & sleep 3
  for i in $(seq 400); do grep -q "^first step" /tmp/kd.log && break; alive || break; sleep 1; done
  show 3; sleep ${2:-40}; show 8 ;;
minutes) echo $2 > /tmp/m.new; mv /tmp/m.new /tmp/minutes; sleep ${3:-5}; show 3 ;;
wait) for i in $(seq $(( $2 / 5 ))); do alive || break; sleep 5; done; show 6 ;;
trained)
  for i in $(seq 113); do alive || break; sleep 5; done
  split -b 10000000 -d /tmp/out/flan-t5-tiny/model.safetensors $OUT/model.part
  cp /tmp/out/flan-t5-tiny/README.md /tmp/kd.log /tmp/out/flan-t5-tiny/config.json $OUT/; show 18 ;;
esac
