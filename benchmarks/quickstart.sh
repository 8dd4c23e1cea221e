#!/usr/bin/env bash
# Run the quickstart and keep what the README shows: console.txt, metrics.jsonl, environment.txt and reward.png.
#   bash benchmarks/quickstart.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/quickstart}
mkdir -p "$out"
console=$(mktemp)
make quickstart 2>&1 | grep -v "^WARNING" > "$console"   # pip speaks of the local index
.venv/bin/python benchmarks/environment.py > results/quickstart/environment.txt # before files of the commit change
mv "$console" "$out/console.txt"
mv results/quickstart/environment.txt "$out/environment.txt"
cp results/quickstart/logs/metrics.jsonl "$out/metrics.jsonl"
.venv/bin/python plot_run.py "quickstart=$out/metrics.jsonl" --output "$out/reward.png"
