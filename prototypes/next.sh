# One GPU, calls within 30 s of each other: T=1000 bash prototypes/next.sh start 400; ... trained; ... wait 500. The machine and its start count, too.
export PYTHONPATH=/tmp/site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
T=${T:-900}
show() { date +%T; tail -n 3 /tmp/next.log | cut -c1-170; tail -n ${1:-12} /tmp/lane.txt 2>/dev/null | cut -c1-300; }
case $1 in
start)
  python3 -m pip install -q --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl 2> /tmp/pip.err
  cp -r . /tmp/tree; cp -rL resource /tmp/tiny; cd /tmp/tiny
  OMP_NUM_THREADS=2 setsid nohup python3 make_flan-t5-tiny.py --first flan-t5-tiny --lr 1e-3 \
    --minutes $(python3 -c "print($T/60)") --workers 15 --report-seconds 30 --seed 6000 --output /tmp/next > /tmp/next.log 2>&1 < /dev/null &
  cd /tmp/tree
  OMP_NUM_THREADS=2 setsid nohup timeout 150 python3 tests/benchmark_recipes.py --small --seconds 1 --evaluations 1 --only muon --cache /tmp/cache --output /tmp/warm.json > /tmp/warm.txt 2>&1 < /dev/null &
  for i in $(seq 60); do grep -q "^first step" /tmp/next.log 2> /dev/null && break; sleep 2; done
  tail -3 /tmp/warm.txt; sleep ${2:-280}; show ;;
trained)
  for i in $(seq 113); do pgrep -f make_flan-t5-tiny.py > /dev/null || break; sleep 5; done
  cp /tmp/next/model.safetensors /tmp/next/README.md /tmp/next.log $OUT/; tail -n 16 /tmp/next.log | cut -c1-200
  cd /tmp/tree
  cat > /tmp/lane.sh <<'L'
say() { echo "== $*"; date +%T; }
export OMP_NUM_THREADS=8
say flan; timeout --kill-after=5 300 python3 tests/benchmark_flan_t5.py --only ceiling,xl8,xxl8-int4,xxl8-int8 --timeout 130 --json /tmp/flan.json
say recipes; timeout --kill-after=5 330 python3 tests/benchmark_recipes.py --small --evaluations 10 --only nanogpt:80 adamw-tuned:40 muon:40 --cache /tmp/cache --output /tmp/recipes.json --plot /tmp/recipes.png
say small; timeout --kill-after=5 90 python3 tests/benchmark_gpt2.py --only small-card --output /tmp/gpt2.json
say generate; timeout --kill-after=5 130 python3 tests/benchmark_flan_t5.py --only ceiling,generate --timeout 110 --json /tmp/generate.json
say done
L
  setsid nohup bash /tmp/lane.sh > /tmp/lane.txt 2>&1 < /dev/null & 
  sleep 5; show ;;
wait) for i in $(seq $(( $2 / 5 ))); do grep -q "^== done" /tmp/lane.txt && break; sleep 5; done
  cp /tmp/lane.txt /tmp/*.json /tmp/recipes.png $OUT/ 2>/dev/null; show 60 ;;
esac
