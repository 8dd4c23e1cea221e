"""The same job in this code base and in TRL's GRPOTrainer, on the same GPU, one after the other.

    python benchmarks/compare_trl.py MODEL_FOLDER OUTPUT_FOLDER [--recipe FILE] [--data FOLDER] [--steps 60]
        [--seconds 400] [--micro-batch 512] [--ours METRICS] [--save-every STEPS]

Prompts, group, lengths and learning rate are those of the recipe, recipes/smollm2-arithmetic.yaml unless another is
named; its rows are made here, those of another lie in `--data`.
TRL is set as its documentation advises for speed: colocated vLLM, bfloat16, no activation checkpointing, fused
AdamW, the largest micro-batch that fits (halved from `--micro-batch` on when memory runs out), no importance-sampling
pass, since ours has none either. Both make one optimizer step per batch, with the same loss denominator (all tokens of
the batch) and verifier. TRL's training ends after `--seconds`; with `--save-every` its models stay in
OUTPUT_FOLDER/trl. `--ours`: take our side from the metrics.jsonl of a run with the same settings, such as one on the
machine's other GPU at the same time; it is read when TRL has finished.
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
from config import load_config  # noqa: E402
from reward_server import verify  # noqa: E402

WARM_UP = 5  # steps left out of the medians: both sides compile in them
ARITHMETIC = ["--kinds", "add,mul,add_mul", "--min-operand", "10", "--max-operand", "99", "--max-factor", "9",
              "--solved-examples", "3", "--answer-style", "worked"]  # fmt: skip


def ours(args: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """Seconds since the start and reward of each step of train_grpo.py."""
    command = [
        sys.executable, str(ROOT / "train_grpo.py"), "--config", str(args.recipe), f"policy.model_name={args.model}",
        f"data.train_jsonl_fpath={args.data}/train.jsonl", "data.validation_jsonl_fpath=null",
        f"grpo.max_num_steps={args.steps}", "checkpointing.enabled=false", f"logger.log_dir={work}/ours",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=work, timeout=580)
    return our_steps(work / "ours" / "metrics.jsonl", args.steps)


def our_steps(metrics: Path, count: int) -> list[dict[str, float]]:
    """The first `count` steps of a file that may still be growing."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()[: count + 1]]
    rows = [r for r in rows if "time/step_s" in r][:count]  # not a validation before the first step
    return [{"at_s": r["time/elapsed_s"], "step_s": r["time/step_s"], "reward": r["reward"]} for r in rows]


def trl_rewards(completions: list[Any], expected_answer: list[str], **_: Any) -> list[float]:
    """TRL's reward function: our verifier in this process."""
    texts = [c[0]["content"] for c in completions]
    return [verify(text, answer).reward for text, answer in zip(texts, expected_answer, strict=True)]


def trl(args: argparse.Namespace) -> list[dict[str, float]]:
    """The same of TRL. Runs in a process of its own."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    cfg = load_config(str(args.recipe), [])
    group, samples = cfg.grpo.num_generations_per_prompt, cfg.samples_per_step
    lines = [json.loads(line) for line in (args.data / "train.jsonl").open()]
    rows = [{"prompt": r["responses_create_params"]["input"], "expected_answer": r["expected_answer"]} for r in lines]
    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            torch.cuda.synchronize()
            ended.append(time.perf_counter())
            control.should_training_stop |= ended[-1] - ended[0] > args.seconds

    config = GRPOConfig(
        output_dir=str(args.output / "trl"), max_steps=args.steps, learning_rate=cfg.policy.optimizer.lr,
        lr_scheduler_type="constant_with_warmup", warmup_steps=cfg.policy.scheduler.warmup_steps, weight_decay=0.0,
        optim="adamw_torch_fused", bf16=True, gradient_checkpointing=False,
        per_device_train_batch_size=args.micro_batch, gradient_accumulation_steps=samples // args.micro_batch,
        num_generations=group, temperature=1.0, max_completion_length=cfg.policy.generation.max_new_tokens, beta=0.0,
        loss_type="dapo", scale_rewards="group", use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=cfg.policy.max_total_sequence_length, vllm_importance_sampling_correction=False,
        logging_steps=1, report_to="none", disable_tqdm=True, seed=42, save_only_model=True,
        save_strategy="steps" if args.save_every else "no", save_steps=args.save_every or 1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=trl_rewards,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    spans = zip(ended[:-1], ended[1:], rewards, strict=True)
    return [{"at_s": end - ended[0], "step_s": end - began, "reward": reward} for began, end, reward in spans]


def trl_in_a_process(args: argparse.Namespace, work: Path) -> tuple[list[dict[str, float]], int]:
    """With the largest micro-batch that fits, from `--micro-batch` down, and that size."""
    micro_batch = args.micro_batch
    while True:
        output = work / f"trl-{micro_batch}.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--data", str(args.data), "--trl", str(output)]
        done = subprocess.run([*command, "--micro-batch", str(micro_batch)], timeout=args.seconds + 200)
        if output.exists():
            return json.loads(output.read_text()), micro_batch
        if micro_batch <= 16:
            raise SystemExit(f"error: TRL failed (exit code {done.returncode}), see its output above")
        micro_batch //= 2


def curve(steps: list[dict[str, float]]) -> str:
    """Reward over wall-clock time, ten points."""
    chosen = steps[:: max(1, len(steps) // 10)]
    return "  ".join(f"{s['at_s']:.0f}s:{s['reward']:.2f}" for s in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=os.path.abspath)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-arithmetic.yaml")
    parser.add_argument("--data", type=Path, help="folder with the recipe's train.jsonl; default: made here")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=400, help="of TRL's training")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="keep TRL's model every so many steps")
    parser.add_argument("--ours", type=Path, metavar="METRICS", help="metrics.jsonl of our side, run elsewhere")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # this process is TRL's; where its steps go
    parser.add_argument("--micro-batch", type=int, default=512, help="the largest to try in TRL")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.trl:
        args.trl.write_text(json.dumps(trl(args)))
        os._exit(0)  # vLLM in TRL's process does not always let it end by itself
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.data is None:
            args.data = work / "data"
            prepare = [sys.executable, str(ROOT / "prepare_data.py"), "arithmetic", "--output", str(args.data)]
            subprocess.run([*prepare, *ARITHMETIC], check=True)
        sides = {} if args.ours else {"ours": {"steps": ours(args, work)}}
        steps, micro_batch = trl_in_a_process(args, work)
    if args.ours:
        sides["ours"] = {"steps": our_steps(args.ours, args.steps)}
    sides["trl"] = {"steps": steps, "micro_batch": micro_batch}
    for name, side in sides.items():
        side["step_s"] = statistics.median(s["step_s"] for s in side["steps"][WARM_UP:])
        print(f"{name}: {side['step_s']:.2f} s per step; reward {curve(side['steps'])}")
    ratio = sides["trl"]["step_s"] / sides["ours"]["step_s"]
    print(f"ratio {ratio:.1f}")
    packages = ("torch", "vllm", "ray", "transformers", "trl")
    result = {"ratio": ratio, **environment(packages), "recipe": args.recipe.name, **sides}
    (args.output / "compare_trl.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
