#!/usr/bin/env bash
# SmolLM2-135M-Instruct on GSM8K, one GPU: fine-tune, train with three seeds, score each model on all test questions.
#   bash benchmarks/smollm2_gsm8k.sh MODEL_FOLDER OUTPUT_FOLDER [train_grpo.py overrides...]
# Reads data/gsm8k, made by `python prepare_data.py gsm8k`. OUTPUT_FOLDER gets metrics, scores, environment.txt, table.md.
set -euo pipefail
model=$1 out=$2
shift 2
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
$python benchmarks/environment.py > "$out/environment.txt"

score() { # NAME MODEL: greedy, and 16 sampled answers
    local options=(--data data/gsm8k/validation.jsonl --max-new-tokens 320 --max-total-sequence-length 640)
    $python evaluate.py --model "$2" "${options[@]}" --output "$work/$1-16" --k 16
    $python evaluate.py --model "$2" "${options[@]}" --output "$work/$1-greedy" --k 1 --temperature 0
    for way in 16 greedy; do cp "$work/$1-$way/metrics.json" "$out/evaluation-$1-$way.json"; done
}

score base "$model"
$python sft.py --config recipes/smollm2-gsm8k-sft.yaml policy.model_name="$model" logger.log_dir="$work/sft-logs" \
    checkpointing.checkpoint_dir="$work/sft"
cp "$work/sft-logs/metrics.jsonl" "$out/sft.jsonl"
score sft "$work/sft/step_348"
for seed in 42 43 44; do
    $python train_grpo.py --config recipes/smollm2-gsm8k.yaml policy.model_name="$work/sft/step_348" \
        grpo.seed=$seed logger.log_dir="$work/seed-$seed" checkpointing.checkpoint_dir="$work/grpo-$seed" "$@"
    cp "$work/seed-$seed/metrics.jsonl" "$out/seed-$seed.jsonl"
    score "seed-$seed" "$(find "$work/grpo-$seed" -maxdepth 1 -name 'step_*' | sort -V | tail -n 1)"
done
$python plot_run.py "$work"/seed-{42,43,44} --output "$out/curves.png"
$python benchmarks/gsm8k_table.py "$out" | tee "$out/table.md"
