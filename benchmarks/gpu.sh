#!/usr/bin/env bash
# Regenerate the GPU results, a part at a time (each has its own time limit: one failure does not cost the rest):
#   bash benchmarks/gpu.sh PART MODEL_FOLDER OUTPUT_FOLDER
# PART: tests | arithmetic | start | engines | variants | baseline | mismatch | trl | peers | lengths | profile | speed |
#       speed-4b | two | long | recipe | node.
# MODEL_FOLDER: SmolLM2-135M-Instruct.
# speed-4b and lengths need one GPU with 141 GB, two, long and recipe need two, node takes all there are, the others one with 80 GB.
set -uo pipefail
part=$1 model=$2 out=$3
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$out"
models=$(mktemp -d) # random models, each made once
trap 'rm -rf "$models"' EXIT

speed() { # GEOMETRY NAME [arguments and overrides...]
    local geometry=$1 name=$2
    shift 2
    timeout 580 "$python" benchmarks/step_time.py "$geometry" --name "$name" --results "$out/step_time.json" \
        --model-folder "$models/$geometry" "$@" > "$out/$name.txt" 2>&1 || echo "$name failed, see $out/$name.txt"
    tail -n 1 "$out/$name.txt"
}
agreement() { # GEOMETRY NAME [arguments and overrides...]: one GPU, FSDP 2 and tensor parallel 2 on the same batch
    timeout 580 "$python" benchmarks/agreement.py "$1" --results "$out/agreement-$2.json" \
        --model-folder "$models/$1" "${@:3}" 2>&1 | tail -n 8
}
apart=(policy.generation.colocated.enabled=false policy.generation.colocated.resources.gpus_per_node=1)
case $part in
tests) timeout 580 "$python" -m pytest -m gpu 2>&1 | tee "$out/tests.txt" ;;
arithmetic) timeout 580 bash benchmarks/smollm2_arithmetic.sh "$model" "$out" ;;
start) # twice: without compile caches, if there are none, and with them
    data=$(mktemp -d)
    "$python" prepare_data.py arithmetic --output "$data" --kinds add,mul,add_mul --min-operand 10 --max-operand 99 \
        --max-factor 9 --solved-examples 3 --answer-style worked > /dev/null
    for n in 1 2; do
        timeout 280 "$python" benchmarks/start.py --config recipes/smollm2-arithmetic.yaml policy.model_name="$model" \
            data.train_jsonl_fpath="$data/train.jsonl" data.validation_jsonl_fpath=null checkpointing.enabled=false \
            logger.log_dir="$out/start-$n" grpo.max_num_steps=2 > "$out/start-$n.txt" 2>&1
    done ;;
engines) # how many engines on the GPU pay for a model this small?
    for n in 1 3 5; do
        timeout 180 bash benchmarks/smollm2_arithmetic.sh "$model" "$out/engines-$n" grpo.max_num_steps=30 \
            grpo.val_at_start=false grpo.val_period=0 policy.generation.engines_per_gpu=$n > "$out/engines-$n.txt" 2>&1
    done
    tail -n 8 "$out"/engines-*.txt ;;
variants)
    data=$(mktemp -d)
    "$python" prepare_data.py arithmetic --output "$data" --kinds add,mul,add_mul --min-operand 10 --max-operand 99 \
        --max-factor 9 --solved-examples 3 --answer-style worked > /dev/null
    timeout 590 "$python" benchmarks/variants.py "$out" --config recipes/smollm2-arithmetic.yaml --parallel 8 \
        --gpus "$("$python" -c 'import torch; print(torch.cuda.device_count())')" --seconds 480 \
        policy.model_name="$model" data.train_jsonl_fpath="$data/train.jsonl" data.validation_jsonl_fpath=null \
        policy.generation.engines_per_gpu=1 policy.generation.vllm_cfg.kv_cache_memory_bytes=1610612736 \
        policy.sequence_packing.train_mb_tokens=4096 grpo.max_num_steps=150 ;;
mismatch) timeout 300 "$python" benchmarks/mismatch.py "$model" --results "$out/mismatch.json" ;;
profile) # of updates: SmolLM2 as on arithmetic, where about 150 of 512 answers have an advantage, and Qwen3-0.6B
    timeout 150 "$python" benchmarks/profile_update.py "$model" --sequences 150 --prompt-tokens 185 \
        --answer-tokens 30 > "$out/profile-smollm2.txt" 2>&1
    timeout 200 "$python" benchmarks/profile_update.py qwen3-0.6b > "$out/profile-qwen3-0.6b.txt" 2>&1 ;;
baseline) timeout 3000 "$python" benchmarks/baseline.py "$model" "$out/baseline" ;; # six runs of four minutes
trl) # the arithmetic job here and in TRL
    "$python" benchmarks/compare.py ours "$model" "$out"
    "$python" benchmarks/compare.py trl "$model" "$out" --micro-batch 256 ;;
peers) # Qwen3-0.6B's geometry here, in TRL and in verl (whose packages have to be on PYTHONPATH)
    geometry=(--geometry qwen3-0.6b --steps 6 --seconds 560)
    "$python" benchmarks/compare.py ours "$models/qwen3-0.6b" "$out" "${geometry[@]}"
    "$python" benchmarks/compare.py trl "$models/qwen3-0.6b" "$out" "${geometry[@]}" --micro-batch 64
    "$python" benchmarks/compare.py verl "$models/qwen3-0.6b" "$out" "${geometry[@]}" --micro-batch 49152 ;;
lengths) # a long tail, 64 prompts x 16; KV cache for nearly all that run at once
    speed qwen3-1.7b qwen3-1.7b-lengths --lengths benchmarks/lengths.json --steps 3 --warm-up 1 --timeout-s 500 \
        policy.generation.vllm_cfg.kv_cache_memory_bytes=34359738368 ;;
speed)
    speed qwen3-0.6b qwen3-0.6b-1
    speed qwen3-1.7b qwen3-1.7b-1 ;;
speed-4b) speed qwen3-4b qwen3-4b-1 ;;
two) # one GPU as the yardstick, then two with twice the batch, FSDP and tensor parallel, and engines apart
    speed qwen3-1.7b qwen3-1.7b-1
    speed qwen3-1.7b qwen3-1.7b-2 --gpus 2 --prompts 64
    agreement qwen3-4b qwen3-4b
    speed qwen3-4b qwen3-4b-fsdp-2 --gpus 2
    speed qwen3-4b qwen3-4b-tp-2 --gpus 2 policy.dtensor_cfg.tensor_parallel_size=2
    speed qwen3-1.7b qwen3-1.7b-apart --gpus 2 "${apart[@]}"
    speed qwen3-1.7b qwen3-1.7b-one-step-off --gpus 2 "${apart[@]}" grpo.async_one_step_off=true \
        loss_fn.use_importance_sampling_correction=true loss_fn.truncated_importance_sampling_ratio=2 ;;
long) # when does tensor parallelism pay?
    split=(--only "FSDP 2" --only "tensor parallel 2" policy.dtensor_cfg.compile_layers=true
        policy.dtensor_cfg.reshard_after_forward=false)
    agreement qwen3-4b qwen3-4b-4096 --answer-tokens 3946 "${split[@]}" policy.sequence_packing.train_mb_tokens=16384
    agreement qwen3-4b qwen3-4b-32768 --answer-tokens 32618 --prompts 2 --group 4 "${split[@]}" \
        policy.sequence_packing.train_mb_tokens=32768 ;;
recipe) # the tutorial's shape: 4 prompts, 3 steps, tensor parallel 2, activation checkpointing, 32,768 tokens
    speed qwen3-4b qwen3-4b-recipe --gpus 2 --prompts 4 --steps 3 --answer-tokens 1024 \
        policy.max_total_sequence_length=32768 policy.sequence_packing.train_mb_tokens=32768 \
        policy.dtensor_cfg.tensor_parallel_size=2 policy.dtensor_cfg.reshard_after_forward=true ;;
node) # all GPUs of the machine at constant work per GPU; the recipe's shape; SmolLM2 with a recipe's batch for each GPU
    all=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    for ((n = 1; n <= all; n *= 2)); do
        speed qwen3-1.7b "qwen3-1.7b-$n" --gpus "$n" --prompts $((32 * n))
    done
    shape=(--gpus "$all" --prompts 64 --timeout-s 500 policy.dtensor_cfg.tensor_parallel_size=2
        policy.generation.vllm_cfg.gpu_memory_utilization=0.85)
    speed qwen3-4b "qwen3-4b-$all-1024" --answer-tokens 1024 --steps 3 --warm-up 1 "${shape[@]}"
    speed qwen3-4b "qwen3-4b-$all-4096" --answer-tokens 4096 --steps 1 --warm-up 0 "${shape[@]}"
    timeout 280 bash benchmarks/smollm2_arithmetic.sh "$model" "$out/smollm2-node-$all" \
        cluster.gpus_per_node="$all" grpo.num_prompts_per_step=$((32 * all)) grpo.max_num_steps=60 \
        policy.train_global_batch_size=$((512 * all)) data.validation_jsonl_fpath=null ;;
*) echo "error: unknown part '$part'" >&2 && exit 2 ;;
esac
