# One 10-minute call (timeout_s 600): run as `bash final.sh`,  Prints a table, keeps $OUT/final.jsonl.
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=/tmp/ind
timeout 100 python3 final.py data 2>&1 | tail -3
go() { timeout 240 python3 final.py run "$@" 2>>$OUT/errors.txt; }
# 1. small model, three side by side (equal steps are what is compared: read val at the same step): honest AdamW rates, then Muon's
for set in "a6e-4 recipe=adamw lr=6e-4|a1.8e-3 recipe=adamw lr=1.8e-3|a3.6e-3 recipe=adamw lr=3.6e-3" "m.005 recipe=muon muon_lr=0.005|m.01 recipe=muon muon_lr=0.01|m.02 recipe=muon muon_lr=0.02"; do
  echo "$set" | tr '|' '\n' | while read n rest; do go $n 30 size=gpt2 rows=16 accumulate=4 context=512 evals=3 $rest & done; wait; sleep 1
  while pgrep -f "final.py run" > /dev/null; do sleep 1; done
done
# 2. 124M alone on the card, the same seconds for each
go nanogpt 60 recipe=nanogpt; go adamw 60 recipe=adamw ${ADAMW}; go muon 60 recipe=muon ${MUON}
tail -3 $OUT/errors.txt
