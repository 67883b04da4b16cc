# Not run yet. Under 110 s is the aim: compilation of all parts goes on side by side, timed parts one after another.
rm -f /tmp/turn.* /tmp/tiles.json
for i in 0 1 2 3 4 5 6 7 8; do python3 tune.py compile $i > $OUT/tune$i.log 2>&1 & tuners="$tuners $!"; done   # torch and triton only
python3 -m pip install -q --no-index --no-deps --target /tmp/site ../wheels/*.whl; export PYTHONPATH=/tmp/site
TURN=A timeout 105 python3 -u bench.py train xl 64 --steps 10 --selfcheck --wait / train xl 8 --eager 5 > $OUT/a.log 2>&1 & A=$!
TURN=B timeout 108 python3 -u bench.py train xl 8 --quantize int4 --steps 20 --wait > $OUT/b.log 2>&1 & B=$!
timeout 60 python3 -u bench.py check base --no-compile / tiny --steps 200 > $OUT/c.log 2>&1 & C=$!
wait $tuners; timeout 40 python3 tune.py > $OUT/tune.log 2>&1; touch /tmp/turn.A; wait $A; touch /tmp/turn.B; wait $B $C
cat $OUT/tune.log; grep -hE "JOB|DONE|FAILED|RESULT|CHECK|built|usual" $OUT/[abc].log | cut -c1-420
