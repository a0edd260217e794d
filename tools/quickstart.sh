#!/usr/bin/env bash
# From nothing to a trained model and a report: environment, data, training, evaluation, yardstick, report.
# Real text and real labels, SYNTHETIC speech. What an earlier run made is used again. Arguments go to train:
#   bash tools/quickstart.sh --seeds=1,2,3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir=runs/quickstart
python=.venv/bin/python
note="Quickstart data: sentences of Amazon reviews with human ratings; the speech is SYNTHETIC (eSpeak NG)."

runs=("$workdir")
previous=""
for argument in "$@"; do
  [[ "$previous" != --seeds ]] || argument="--seeds=$argument"
  if [[ "$argument" == --seeds=* ]]; then
    IFS=, read -ra runs <<< "${argument#--seeds=}"
    runs=("${runs[@]/#/$workdir/seed_}")
  fi
  previous="$argument"
done

times=()
phase() {
  local name="$1" start=$SECONDS
  shift
  echo
  echo "== $name"
  "$@"
  times+=("$(printf '%-12s %4d s' "$name" $((SECONDS - start)))")
}

evaluate() {
  local run
  for run in "${runs[@]}"; do
    "$python" -m mmjax.evaluate --workdir="$run" --checkpoint=best_loss --split=test
  done
}

yardstick() {
  if [[ "$workdir/ridge.json" -nt data/reviews/label.csv && "$workdir/ridge.json" -nt tools/ridge.py ]]; then
    cat "$workdir/ridge.json"
  else
    "$python" tools/ridge.py --out="$workdir/ridge.json"
  fi
}

# In so short a run compiling counts: this takes 8.6 s instead of 13.6 s a program, at the same speed of steps.
export XLA_FLAGS="--xla_backend_optimization_level=1 ${XLA_FLAGS:-}"

echo "mmjax quickstart: MMML with context on spoken reviews."
echo "Text and labels are real; the speech is SYNTHETIC, read aloud by eSpeak NG. Expect up to 10 minutes on 2 cores."
phase environment bash tools/setup.sh
phase data "$python" tools/quickstart_data.py
phase training "$python" -m mmjax.train --gin_file=gin/quickstart.gin --data_dir=data --workdir="$workdir" "$@"
phase evaluation evaluate
phase yardstick yardstick
phase report "$python" -m mmjax.report --workdir="$workdir" --baseline="$workdir/ridge.json" --note="$note"

echo
echo "$note"
printf '%s\n' "${times[@]}"
printf '%-12s %4d s\n' total "$SECONDS"
