#!/bin/bash
# Trains the adapters of the study, one after the other on one thread, 5 to 10 minutes each on a core; what is
# finished is left, what was killed goes on. mpg and its python are those on PATH. ONLY="E S" leaves out all others.
#   bench/study/train.sh DATA OUT [SETTINGS OF mpg train ...]
set -e
DATA=$1 OUT=$2; shift 2
MORE=("$@")
[ -f "$OUT/pairs/reference.jsonl" ] || python "$(dirname "$0")/pairs.py" "$DATA" "$OUT/pairs"

adapter() {  # NAME PAIRS [SETTINGS ...]
  local name=$1 pairs=$2; shift 2
  [ -z "$ONLY" ] || [[ " $ONLY " == *" $name "* ]] || return 0
  [ ! -f "$OUT/adapters/$name/training.json" ] || return 0
  mpg train --base "${MPG_STUDY_BASE:-smollm2}" --data "$OUT/pairs/$pairs.jsonl" --out "$OUT/adapters/$name" \
    --preset small --rank 4 --alpha 8 --learning-rate 1.2e-3 --epochs 1 --batch-size 4 --held-out 16 --max-answer 56 \
    --dtype bfloat16 --threads 1 "$@" "${MORE[@]}"
}

for pole in E:EI S:SN T:TF P:JP I:EI N:SN F:TF J:JP; do adapter ${pole%:*} ${pole#*:} --pole ${pole%:*}; done
for kind in profile personality; do adapter $kind $kind; done
adapter reference reference --likelihood 1
for seed in 1 2; do
  for pole in E:EI T:TF; do adapter ${pole%:*}-seed$seed ${pole#*:} --pole ${pole%:*} --seed $seed; done
done
