"""The same updates on one GPU, with FSDP over two and with tensor parallel over two: losses, norms, log-probabilities.

    python benchmarks/agreement.py GEOMETRY [--results FILE] [--model-folder FOLDER] [--cpu] [--answer-tokens 350]
        [--prompts 4] [--group 8] [--only "FSDP 2" --only ...] [section.key=value ...]

Random weights of a geometry of step_time.py and one fixed batch of random answers; two optimizer steps, with the
seconds of the second. The yardstick is how far bfloat16 is from float32 on one GPU, and one GPU from itself with other
micro-batches: rounding alone. `--only`: these settings.
Prints a Markdown table after each run and writes it with all numbers to FILE.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from benchmarks.step_time import GEOMETRIES, make_model  # noqa: E402
from config import load_config  # noqa: E402
from launch import StopRequests, explain, start_ray  # noqa: E402
from model import Sequences  # noqa: E402
from policy import Policy  # noqa: E402
from train_grpo import grpo_loss  # noqa: E402

PROMPT_TOKENS = 150
SETTINGS = {  # ranks, overrides
    "one GPU": (1, []),
    "FSDP 2": (2, []),
    "tensor parallel 2": (2, ["policy.dtensor_cfg.tensor_parallel_size=2"]),
    "one GPU, float32": (1, ["policy.precision=float32"]),
    "one GPU, smaller micro-batches": (1, ["policy.sequence_packing.train_mb_tokens=2000"]),
    "tensor parallel 2, float32": (2, ["policy.precision=float32", "policy.dtensor_cfg.tensor_parallel_size=2"]),
}


def random_batch(vocabulary: int, num_prompts: int, group: int, answer_tokens: int) -> Sequences:
    """Groups of random tokens with random advantages; the engine's log-probabilities are those of uniform sampling."""
    rng = np.random.default_rng(0)
    count = num_prompts * group
    prompts = [rng.integers(1, vocabulary, PROMPT_TOKENS) for _ in range(num_prompts)]
    answers = [rng.integers(1, vocabulary, answer_tokens) for _ in range(count)]
    uniform = np.full(answer_tokens, -np.log(vocabulary), dtype=np.float32)
    return Sequences(
        prompt_ids=[prompt for prompt in prompts for _ in range(group)],
        response_ids=answers,
        per_token={"rollout_logprobs_T": [uniform] * count, "mask_T": [np.ones(answer_tokens)] * count},
        per_sequence={"advantages_T": rng.standard_normal(count).astype(np.float32)},
    )


def measure(model: Path, batch: Sequences, ranks: int, cpu: bool, overrides: list[str]) -> dict:
    """Two updates by `ranks` ranks of a fresh model; loss and gradient norm of each, log-probabilities after them."""
    answer_tokens = len(batch.response_ids[0])
    cluster = [f"cluster.cpu_ranks_per_node={ranks}"] if cpu else []
    cfg = load_config(
        str(ROOT / "config.yaml"),
        [
            f"policy.model_name={model}", "cluster.num_nodes=1", f"cluster.gpus_per_node={0 if cpu else ranks}",
            "cluster.timeout_s=300", "policy.dtensor_cfg.tensor_parallel_size=1", "logger.wandb_enabled=false",
            f"policy.max_total_sequence_length={PROMPT_TOKENS + answer_tokens}", "policy.optimizer.lr=1e-6",
            "policy.sequence_packing.train_mb_tokens=8000", f"policy.train_global_batch_size={len(batch)}",
            "grpo.num_prompts_per_step=1", f"grpo.num_generations_per_prompt={len(batch)}",
            "loss_fn.use_importance_sampling_correction=true", *cluster, *overrides,
        ],
    )  # fmt: skip
    placement = start_ray(cfg, StopRequests(None))
    try:
        policy = Policy(cfg, placement)
        ray.get(policy.start(), timeout=cfg.cluster.timeout_s)
        counts = {"num_valid_tokens": float(len(batch) * answer_tokens), "num_valid_sequences": float(len(batch))}
        steps, ended = [], [time.perf_counter()]
        for _ in range(2):
            steps.append(policy.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts}))
            ended.append(time.perf_counter())
        logprobs = np.concatenate(policy.logprobs(batch))
        return {
            "loss": [s["loss"] for s in steps],
            "grad_norm": [s["grad_norm"] for s in steps],
            "second_update_s": ended[2] - ended[1],
            "logprobs": logprobs,
            **policy.memory(),
        }
    finally:
        ray.shutdown()


def table(found: dict[str, dict]) -> list[str]:
    """Markdown lines; differences are from the first of the runs, which get them as keys too."""
    reference = next(iter(found.values()))["logprobs"]
    lines = ["| | loss, two steps | gradient norm | log-probabilities after them: mean, largest difference | update |"]
    lines += ["|---|---|---|---|---|"]
    for name, result in found.items():
        gap = np.abs(result["logprobs"] - reference)
        result |= {"logprob_gap_mean": float(gap.mean()), "logprob_gap_max": float(gap.max())}
        seconds = result["second_update_s"]
        numbers = [" ".join(f"{x:.6f}" for x in result[key]) for key in ("loss", "grad_norm")]
        lines.append(f"| {name} | {numbers[0]} | {numbers[1]} | {gap.mean():.2e}, {gap.max():.2e} | {seconds:.2f} s |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--model-folder", type=Path, help="where the model is made, or lies from an earlier call")
    parser.add_argument("--cpu", action="store_true", help="gloo ranks instead of GPUs")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=350)
    parser.add_argument("--only", action="append", choices=SETTINGS)
    args, overrides = parser.parse_known_args()
    batch = random_batch(GEOMETRIES[args.geometry][6], args.prompts, args.group, args.answer_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model_folder or Path(folder)
        if not (model / "tokenizer.json").exists():
            make_model(args.geometry, model)
        found = {}
        for name in args.only or SETTINGS:
            ranks, own = SETTINGS[name]
            try:
                found[name] = measure(model, batch, ranks, args.cpu, [*own, *overrides])
            except Exception as e:  # float32 may not fit: the others are still worth having
                print(f"{name}: not run, {explain(e)}", file=sys.stderr)
            else:
                lines = table(found)
                print("\n".join(lines), flush=True)
                if args.results:  # after each: what comes later may be stopped by a time limit
                    runs = {n: {k: v for k, v in r.items() if k != "logprobs"} for n, r in found.items()}
                    shape = {"prompts": args.prompts, "group": args.group, "answer_tokens": args.answer_tokens}
                    report = {"model": args.geometry, **environment(), "overrides": overrides, **shape, "runs": runs}
                    args.results.write_text(json.dumps(report | {"table": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
