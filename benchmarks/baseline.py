"""What the default advantages do to learning: with and without `use_leave_one_out_baseline`, three seeds each.

    python benchmarks/baseline.py MODEL_FOLDER OUTPUT_FOLDER [--steps 150]

Trains recipes/smollm2-arithmetic.yaml and scores each last checkpoint with smollm2_arithmetic.sh; what is there already
is not run again. OUTPUT_FOLDER gets metrics (NAME-SEED.jsonl), scores (NAME-SEED.txt) and table.md.
"""

import argparse
import json
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NAMES = {"leave-one-out": "true", "group-mean": "false"}
SEEDS = (42, 43, 44)
LAST = 25  # steps whose mean reward the table has


def train(model: Path, output: Path, name: str, seed: int, steps: int) -> None:
    """One run and its score in a fresh vLLM."""
    overrides = [f"grpo.use_leave_one_out_baseline={NAMES[name]}", f"grpo.seed={seed}", f"grpo.max_num_steps={steps}"]
    overrides += [f"grpo.val_period={steps // 2}", f"checkpointing.save_period={steps}"]
    with tempfile.TemporaryDirectory() as work:
        script = ["bash", str(ROOT / "benchmarks" / "smollm2_arithmetic.sh"), str(model), work, *overrides]
        subprocess.run(script, check=True, timeout=1200)
        rows = [row for row in map(json.loads, (Path(work) / "metrics.jsonl").open()) if "reward" in row]
        kept = [{key: row[key] for key in ("step", "reward", "time/step_s")} for row in rows]
        (output / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        (output / f"{name}-{seed}.txt").write_text((Path(work) / "evaluation.txt").read_text())


def table(output: Path) -> str:
    lines = [f"| advantages | seed | reward, last {LAST} steps | all steps | avg@16 |", "|---|---|---|---|---|"]
    for name in NAMES:
        for seed in SEEDS:
            rewards = [json.loads(line)["reward"] for line in (output / f"{name}-{seed}.jsonl").open()]
            avg, low, high = re.search(
                r"avg@16 +([\d.]+) +95 % interval ([\d.]+) to ([\d.]+)", (output / f"{name}-{seed}.txt").read_text()
            ).groups()
            means = f"{statistics.mean(rewards[-LAST:]):.3f} | {statistics.mean(rewards):.3f}"
            lines.append(f"| {name} | {seed} | {means} | {avg} ({low} to {high}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for name in NAMES:
            if not (args.output / f"{name}-{seed}.txt").exists():
                train(args.model, args.output, name, seed, args.steps)
    (args.output / "table.md").write_text(table(args.output))
    print(table(args.output))


if __name__ == "__main__":
    main()
