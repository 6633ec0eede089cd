#!/usr/bin/env bash
# Trains on CIFAR-10 (RSENGINE_DATA; scikit-learn's digits without it) for about two minutes, stops in the middle, resumes,
# and compares the result with what such a run must reach. Usage: scripts/end_to_end.sh FOLDER
set -euo pipefail
out=$1/run
python=${PYTHON:-.venv/bin/python}
recipe=(--recipe quickstart --epochs 2 --set train.log_interval=20)
least=0.45
if [ -z "${RSENGINE_DATA:-}" ]; then
    echo "end to end: RSENGINE_DATA is not set, so this runs on the digits"
    recipe=(--recipe digits --data digits --epochs 12 --set train.log_interval=4)
    least=0.85
fi

"$python" -m rsengine.train "${recipe[@]}" --out "$out" &
pid=$!
until grep -qs '"interval"' "$out/metrics.jsonl"; do
    kill -0 "$pid" || { echo "end to end: the run ended before its first record" >&2; exit 1; }
    sleep 0.2
done
kill -TERM "$pid"
status=0
wait "$pid" || status=$?
[ "$status" = 143 ] || { echo "end to end: expected exit 143 after SIGTERM, got $status" >&2; exit 1; }

"$python" -m rsengine.train "${recipe[@]}" --out "$out" --resume
"$python" - "$out" "$least" <<'CHECK'
import json, sys
from pathlib import Path

folder, least = Path(sys.argv[1]), float(sys.argv[2])
records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
starts = [r for r in records if r["kind"] == "start"]
last = [r for r in records if r["kind"] == "epoch"][-1]
assert [r["resumed"] for r in starts] == [False, True], starts
for name in ("curves.png", "confusion.png", "augmented.png", "report.md", "weights.safetensors", "best.pt"):
    assert (folder / name).stat().st_size > 1000, name
assert last["test_accuracy_ema"] >= least, last
first = ", ".join(f"{r['time_to_first_step']:.1f} s" for r in starts)
print(f"end to end: EMA test accuracy {last['test_accuracy_ema']:.2%}, {last['images_per_second']:.0f} images/s, "
      f"{last['seconds']:.0f} s of training, first step after {first}")
CHECK
