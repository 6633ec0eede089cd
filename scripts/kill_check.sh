#!/usr/bin/env bash
# Kills a short run at N random moments (default 100), resumes it each time, and compares its end with that of a run that
# was left alone. Usage: scripts/kill_check.sh [N [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."
# One thread: processes are forked, and threads that a parent started are missing in its children.
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-.venv/bin/python}" scripts/kill_check.py "$@"
