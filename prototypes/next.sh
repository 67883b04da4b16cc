# One GPU, calls within 30 s of each other: `next.sh start 300`, `next.sh wait 550` as often as it takes, `next.sh minutes 23.5` when the
# time that is left is known, `next.sh trained`. The machine and its start (100 s, the compilation included) count, too.
export PYTHONPATH=/tmp/site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
show() { date +%T; tail -n ${1:-4} /tmp/next.log | cut -c1-170; nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader; }
case $1 in
start)
  python3 -m pip install -q --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl 2> /tmp/pip.err
  cp -rL resource /tmp/tiny; cd /tmp/tiny; echo 23 > /tmp/minutes
  sed -i 's|^            last_report = time.time() - start$|&\n            args.minutes = float(Path("/tmp/minutes").read_text())|' make_flan-t5-tiny.py
  OMP_NUM_THREADS=2 setsid nohup python3 make_flan-t5-tiny.py --first flan-t5-tiny --lr 1e-3 --minutes 23 --workers 15 \
    --report-seconds 20 --dropout ${D:-0.2} --seed 7000 --output /tmp/out/flan-t5-tiny > /tmp/next.log 2>&1 < /dev/null &
  for i in $(seq 120); do grep -q "^first step" /tmp/next.log 2> /dev/null && break; sleep 2; done
  show 3; sleep ${2:-150}; show 8 ;;
minutes) echo $2 > /tmp/m.new; mv /tmp/m.new /tmp/minutes; sleep ${3:-5}; show 3 ;;
wait) for i in $(seq $(( $2 / 5 ))); do pgrep -f make_flan-t5-tiny.py > /dev/null || break; sleep 5; done; show 6 ;;
trained)
  for i in $(seq 113); do pgrep -f make_flan-t5-tiny.py > /dev/null || break; sleep 5; done
  cp /tmp/out/flan-t5-tiny/model.safetensors /tmp/out/flan-t5-tiny/README.md /tmp/next.log $OUT/; show 16 ;;
esac
