# final.sh OUT: the pretraining in one run of SECONDS_IN_ALL seconds (545) on one H100, import and compilation included (they took
# 94 s). The weights come every 30 to 60 s into OUT as model-a and model-b; INIT=FOLDER goes on from such a pair.
cd "$(dirname "$0")"; OUT=${1:-$OUT}; export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false W=${W:-15} FIRST=${FIRST:-13} B=${B:-512} LR=${LR:-2e-3}
timeout $((${SECONDS_IN_ALL:-545} + 48)) python3 -u final.py $OUT ${SECONDS_IN_ALL:-545} > $OUT/final.log 2>&1
grep -E "examples/s" $OUT/final.log | awk 'NR%4==1'; grep -vE "examples/s|Warn" $OUT/final.log | cut -c1-420 | tail -75; ls -l $OUT
