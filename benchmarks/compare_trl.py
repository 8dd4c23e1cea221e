"""The same job in this code base and in TRL's GRPOTrainer, on the same GPU, one after the other.

    python benchmarks/compare_trl.py MODEL_FOLDER OUTPUT_FOLDER [--steps 60] [--micro-batch 512] [--ours METRICS]

SmolLM2-135M-Instruct on the rows of recipes/smollm2-arithmetic.yaml: 32 prompts x 16 answers of at most 96 tokens a
step. TRL is set as its documentation advises for speed: colocated vLLM, bfloat16, no activation checkpointing, fused
AdamW, the largest micro-batch that fits (halved from `--micro-batch` on when memory runs out), no importance-sampling
pass, since ours has none either. Both make one optimizer step per batch, with the same learning rate, loss denominator
(all tokens of the batch) and verifier. `--ours`: take our side from the metrics.jsonl of a run with the same settings,
such as one on the machine's other GPU at the same time; it is read when TRL has finished.
OUTPUT_FOLDER gets compare_trl.json: `ratio` of the median seconds per step (without the first five), and for each side
seconds and reward of every step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from reward_server import verify  # noqa: E402

PROMPTS, GROUP, NEW_TOKENS, LR = 32, 16, 96, 3e-5
RATE_WARM_UP = 10  # steps, as in the recipe
WARM_UP = 5  # steps left out of the medians: both sides compile in them
ARITHMETIC = ["--kinds", "add,mul,add_mul", "--min-operand", "10", "--max-operand", "99", "--max-factor", "9",
              "--solved-examples", "3", "--answer-style", "worked"]  # fmt: skip


def ours(model: str, data: Path, work: Path, steps: int) -> list[dict[str, float]]:
    """Seconds since the start and reward of each step of train_grpo.py."""
    command = [
        sys.executable, str(ROOT / "train_grpo.py"), "--config", str(ROOT / "recipes" / "smollm2-arithmetic.yaml"),
        f"policy.model_name={model}", f"data.train_jsonl_fpath={data}/train.jsonl", "data.validation_jsonl_fpath=null",
        f"grpo.max_num_steps={steps}", f"policy.optimizer.lr={LR}", f"policy.train_global_batch_size={PROMPTS * GROUP}",
        "checkpointing.enabled=false", f"logger.log_dir={work}/ours",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=work, timeout=580)
    return our_steps(work / "ours" / "metrics.jsonl", steps)


def our_steps(metrics: Path, count: int) -> list[dict[str, float]]:
    """The first `count` steps of a file that may still be growing."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()[: count + 1]]
    rows = [r for r in rows if "time/step_s" in r][:count]  # not a validation before the first step
    return [{"at_s": r["time/elapsed_s"], "step_s": r["time/step_s"], "reward": r["reward"]} for r in rows]


def trl_rewards(completions: list[Any], expected_answer: list[str], **_: Any) -> list[float]:
    """TRL's reward function: our verifier in this process."""
    texts = [c[0]["content"] for c in completions]
    return [verify(text, answer).reward for text, answer in zip(texts, expected_answer, strict=True)]


def trl(model: str, data: Path, work: Path, steps: int, micro_batch: int) -> list[dict[str, float]]:
    """The same of TRL. Runs in a process of its own."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": r["responses_create_params"]["input"], "expected_answer": r["expected_answer"]} for r in lines]
    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            ended.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=str(work / "trl"), max_steps=steps, learning_rate=LR, lr_scheduler_type="constant_with_warmup",
        warmup_steps=RATE_WARM_UP, weight_decay=0.0, optim="adamw_torch_fused", bf16=True, gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=PROMPTS * GROUP // micro_batch,
        num_generations=GROUP, temperature=1.0, max_completion_length=NEW_TOKENS, beta=0.0, loss_type="dapo",
        scale_rewards="group", use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=512, vllm_importance_sampling_correction=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=42,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=trl_rewards, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    spans = zip(ended[:-1], ended[1:], rewards, strict=True)
    return [{"at_s": end - ended[0], "step_s": end - began, "reward": reward} for began, end, reward in spans]


def trl_in_a_process(
    model: str, data: Path, work: Path, steps: int, micro_batch: int
) -> tuple[list[dict[str, float]], int]:
    """With the largest micro-batch that fits, from `micro_batch` down, and that size."""
    while True:
        output = work / f"trl-{micro_batch}.json"
        command = [sys.executable, __file__, model, str(work), "--steps", str(steps), "--data", str(data)]
        done = subprocess.run([*command, "--trl", str(output), "--micro-batch", str(micro_batch)], timeout=580)
        if output.exists():
            return json.loads(output.read_text()), micro_batch
        if micro_batch <= GROUP:
            raise SystemExit(f"error: TRL failed (exit code {done.returncode}), see its output above")
        micro_batch //= 2


def curve(steps: list[dict[str, float]]) -> str:
    """Reward over wall-clock time, ten points."""
    chosen = steps[:: max(1, len(steps) // 10)]
    return "  ".join(f"{s['at_s']:.0f}s:{s['reward']:.2f}" for s in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ours", type=Path, metavar="METRICS", help="metrics.jsonl of our side, run elsewhere")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # this process is TRL's; where its steps go
    parser.add_argument("--micro-batch", type=int, default=PROMPTS * GROUP, help="the largest to try in TRL")
    args = parser.parse_args()
    if args.trl:
        args.trl.write_text(json.dumps(trl(args.model, args.data, args.output, args.steps, args.micro_batch)))
        os._exit(0)  # vLLM in TRL's process does not always let it end by itself
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work, model = Path(folder), str(Path(args.model).resolve())
        prepare = [sys.executable, str(ROOT / "prepare_data.py"), "arithmetic", "--output", str(work / "data")]
        subprocess.run([*prepare, *ARITHMETIC], check=True)
        sides = {} if args.ours else {"ours": {"steps": ours(model, work / "data", work, args.steps)}}
        steps, micro_batch = trl_in_a_process(model, work / "data", work, args.steps, args.micro_batch)
    if args.ours:
        sides["ours"] = {"steps": our_steps(args.ours, args.steps)}
    sides["trl"] = {"steps": steps, "micro_batch": micro_batch}
    for name, side in sides.items():
        side["step_s"] = statistics.median(s["step_s"] for s in side["steps"][WARM_UP:])
        print(f"{name}: {side['step_s']:.2f} s per step; reward {curve(side['steps'])}")
    ratio = sides["trl"]["step_s"] / sides["ours"]["step_s"]
    print(f"ratio {ratio:.1f}")
    packages = ("torch", "vllm", "ray", "transformers", "trl")
    result = {"ratio": ratio, **environment(packages), "prompts": PROMPTS, "group": GROUP, **sides}
    (args.output / "compare_trl.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
