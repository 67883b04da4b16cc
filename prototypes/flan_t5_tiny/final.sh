# One call of 600 s on one H100: 94 s to import and compile, about 460 s of training, the scores. Weights are saved every
# 30 to 60 s into $OUT (tied: `to_folder.py` makes the folder).
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false W=15 FIRST=${FIRST:-13} B=${B:-512} LR=${LR:-2e-3}
timeout 596 python3 final.py $OUT ${SECONDS_IN_ALL:-560} > $OUT/final.log 2>&1
grep -E "examples/s" $OUT/final.log | awk 'NR%4==1'; grep -vE "examples/s|Warn" $OUT/final.log | cut -c1-420 | tail -75
