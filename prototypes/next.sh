# One machine of two GPUs, from the repository's root; calls must follow each other within 30 s, and each takes 600 s at most.
#   bash prototypes/next.sh start      the tiny model goes on on GPU 0 for T seconds, measurements one after another on GPU 1
#   bash prototypes/next.sh wait 560   how far they are
#   bash prototypes/next.sh end        waits for the training, copies weights, card and logs to $OUT (8 files)
export PYTHONPATH=/tmp/site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
T=${T:-1320}
show() { date +%T; tail -n 3 /tmp/next.log | cut -c1-170; tail -n ${1:-12} /tmp/lane.txt | cut -c1-300; }
case $1 in
start)
  python3 -m pip install -q --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl 2> /tmp/pip.err
  cp -r . /tmp/tree; cp -rL resource /tmp/tiny; cd /tmp/tiny
  CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=2 setsid nohup python3 make_flan-t5-tiny.py --first flan-t5-tiny --lr 1e-3 \
    --minutes $(python3 -c "print($T/60)") --workers 22 --report-seconds 30 --seed 5000 --output /tmp/next > /tmp/next.log 2>&1 < /dev/null &
  cd /tmp/tree
  cat > /tmp/lane.sh <<'L'
say() { echo "== $*"; date +%T; }
export CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=4
say xxl; timeout --kill-after=5 330 python3 tests/benchmark_flan_t5.py --only ceiling,xxl8-int4,xxl8-int8,generate --timeout 150
say gpt2; timeout --kill-after=5 200 python3 tests/benchmark_gpt2.py --only small-card gpt2-large --nanogpt .gpu/nanogpt
say two_compiled; timeout --kill-after=5 200 python3 -m pytest -o addopts= -q tests/test_gpu_gpt2.py -k two_compiled 2>&1 | tail -15
say two_fast; timeout --kill-after=5 330 python3 -m pytest -o addopts= -q tests/test_gpu_flan_t5.py -k two_fast 2>&1 | tail -15
say recipes; timeout --kill-after=5 400 python3 tests/benchmark_recipes.py --only adamw-tuned:300 --seeds 43 --cache /tmp/cache --output /tmp/recipes.json
say done
L
  setsid nohup bash /tmp/lane.sh > /tmp/lane.txt 2>&1 < /dev/null &
  sleep 150; show ;;
wait) sleep $2; show 30 ;;
end)
  for i in $(seq 110); do pgrep -f make_flan-t5-tiny.py > /dev/null || break; sleep 5; done
  cp /tmp/next/model.safetensors /tmp/next/README.md /tmp/next.log /tmp/lane.txt /tmp/recipes.json $OUT/; tail -n 16 /tmp/next.log | cut -c1-200; show 40 ;;
esac
