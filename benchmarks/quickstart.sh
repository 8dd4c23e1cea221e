#!/usr/bin/env bash
# Run the quickstart and keep what the README shows: console.txt, metrics.jsonl, environment.txt and reward.png.
#   bash benchmarks/quickstart.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/quickstart}
mkdir -p "$out"
make quickstart 2>&1 | grep -v "^WARNING" > "$out/console.txt"   # pip speaks of the local index
cp results/quickstart/logs/metrics.jsonl "$out/metrics.jsonl"
make -s .venv/installed-dev 2>&1 | grep -v "^WARNING" || true   # for the plot
.venv/bin/python benchmarks/environment.py > "$out/environment.txt"
.venv/bin/python benchmarks/plot_run.py "$out/reward.png" "quickstart=$out/metrics.jsonl"
