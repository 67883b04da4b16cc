# The next pretraining of the tiny model on two GPUs, from the repository's root. Calls must follow each other within 30 s.
#   bash prototypes/tiny.sh start      what needs a quiet machine first (GPT-2's and XL's start), then two trainings begin
#   bash prototypes/tiny.sh wait 560   their reports
#   bash prototypes/tiny.sh end        waits for their end, copies weights and logs to $OUT
export PYTHONPATH=/tmp/site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
MINUTES=${MINUTES:-20}
case $1 in
start)
  python3 -m pip install -q --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl 2> /tmp/pip.err
  cp -r . /tmp/tree
  ( cd /tmp/tree; export CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=8
    timeout --kill-after=5 100 python3 tests/benchmark_gpt2.py --only cold > $OUT/cold.txt 2>&1
    timeout --kill-after=5 40 python3 -X importtime tests/benchmark_gpt2.py --part first-step 2> $OUT/imports.txt
    timeout --kill-after=5 230 python3 tests/benchmark_flan_t5.py --only xl-start --timeout 225 > $OUT/start.txt 2>&1 ) &
  QUIET=$!
  wait $QUIET; cat $OUT/cold.txt $OUT/start.txt | cut -c1-400
  sort -t'|' -k2 -n $OUT/imports.txt | tail -30 > $OUT/imports_sorted.txt
  rm -rf /tmp/tiny; cp -rL resource /tmp/tiny; cd /tmp/tiny
  for gpu in 0 1; do
    CUDA_VISIBLE_DEVICES=$gpu OMP_NUM_THREADS=2 setsid nohup python3 make_flan-t5-tiny.py --first flan-t5-tiny --lr 1e-3 \
      --minutes $MINUTES --workers 14 --report-seconds 30 --seed $((3000 + gpu * 1000)) \
      --dropout $([ $gpu = 0 ] && echo 0.1 || echo 0.2) --output /tmp/next$gpu > /tmp/next$gpu.log 2>&1 < /dev/null &
  done
  sleep 100; tail -n 3 /tmp/next?.log | cut -c1-200 ;;
wait) sleep $2; tail -n 4 /tmp/next?.log | cut -c1-200 ;;
end)
  for i in $(seq 110); do pgrep -f make_flan-t5-tiny.py > /dev/null || break; sleep 5; done
  for gpu in 0 1; do cp /tmp/next$gpu/model.safetensors $OUT/model$gpu.safetensors; cp /tmp/next$gpu/README.md $OUT/card$gpu.md
    cp /tmp/next$gpu.log $OUT/log$gpu.txt; tail -n 16 $OUT/log$gpu.txt | cut -c1-200; done ;;
esac
