#!/usr/bin/env bash
# SmolLM2-135M-Instruct on arithmetic, one GPU: train, then score the last checkpoint in a fresh vLLM.
#   bash benchmarks/smollm2_arithmetic.sh MODEL_FOLDER OUTPUT_FOLDER [train_grpo.py overrides...]
# OUTPUT_FOLDER gets console.txt, metrics.jsonl, evaluation.txt and environment.txt.
set -euo pipefail
model=$1 out=$2
shift 2
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
$python benchmarks/environment.py > "$out/environment.txt"
$python prepare_data.py arithmetic --output "$work/data" --kinds add,mul,add_mul --min-operand 10 --max-operand 99 \
    --max-factor 9 --solved-examples 3 --answer-style worked > "$out/data.txt"
$python train_grpo.py --config recipes/smollm2-arithmetic.yaml policy.model_name="$model" logger.log_dir="$work/logs" \
    data.train_jsonl_fpath="$work/data/train.jsonl" data.validation_jsonl_fpath="$work/data/validation.jsonl" \
    checkpointing.checkpoint_dir="$work/checkpoints" "$@" 2>&1 | tee "$out/console.txt" ||
    [ "${PIPESTATUS[0]}" = 85 ] # stopped by a signal or checkpoint_must_save_by, and saved
cp "$work/logs/metrics.jsonl" "$out/metrics.jsonl"
last=$(ls -d "$work"/checkpoints/step_* | sort -V | tail -n 1)
$python evaluate.py --model "$last" --data "$work/data/validation.jsonl" --k 16 --max-new-tokens 96 \
    --max-total-sequence-length 512 --kv-cache-gib 8 --output "$work/evaluation" | tee "$out/evaluation.txt"
