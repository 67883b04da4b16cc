# What needs a GPU next, in order of worth; $OUT is where results go. Run from the repository's root.
#   bash prototypes/gpu.sh tiny MINUTES     pretrain the tiny model on (batches of three shapes; test the first 30 s for NaN)
#   bash prototypes/gpu.sh flan             benchmark and tests of flan-t5_samsum.py with LoRA's kernels
#   bash prototypes/gpu.sh gpt2             tests of gpt2_from_scratch.py that have not passed
#   bash prototypes/gpu.sh two              what needs two GPUs
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
T0=$(date +%s); lap() { echo "== $1 at $(( $(date +%s) - T0 )) s"; }
case $1 in
tiny)  # in a folder of its own: the working tree may be replaced while it runs
  rm -rf /tmp/tiny; cp -rL resource /tmp/tiny; cp prototypes/make_fast.py /tmp/tiny/make_fast.py; cd /tmp/tiny
  setsid nohup python3 make_fast.py --first flan-t5-tiny --lr 1e-3 --minutes $2 --workers 14 --report-seconds 15 \
    --output /tmp/next > /tmp/next.log 2>&1 < /dev/null &
  sleep 130; cat /tmp/next.log ;;
flan)
  timeout 200 python3 tests/benchmark_flan_t5.py --only xl64,xl8,base8 > $OUT/flan.txt 2>/tmp/f.err; tail -12 $OUT/flan.txt; lap bench
  timeout 380 python3 -m pytest -o addopts= -q tests/test_gpu_flan_t5.py > $OUT/flan_tests.txt 2>&1; tail -5 $OUT/flan_tests.txt | cut -c1-300; lap tests ;;
gpt2)
  timeout 560 python3 -m pytest -o addopts= -q --durations=9 tests/test_gpu_gpt2.py -k "words4 or words5 or precisions" > $OUT/gpt2.txt 2>&1
  tail -14 $OUT/gpt2.txt | cut -c1-300; lap tests ;;
two)
  timeout 250 python3 -m pytest -o addopts= -q tests/test_gpu_flan_t5.py -k two_gpus > $OUT/two1.txt 2>&1; tail -4 $OUT/two1.txt | cut -c1-400; lap fsdp
  timeout 250 python3 -m pytest -o addopts= -q tests/test_gpu_gpt2.py -k two_gpus > $OUT/two2.txt 2>&1; tail -4 $OUT/two2.txt | cut -c1-400; lap gpt2 ;;
esac
