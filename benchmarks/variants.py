"""Train one recipe with every loss variant and correction; one table and one plot of reward over steps.

    python benchmarks/variants.py OUTPUT_FOLDER --config recipes/NAME.yaml [--only RUN ...] [overrides...]

Each batch is used for four optimizer steps: with a single one all ratios are 1, and the variants would be the same.
Each run's metrics go to OUTPUT_FOLDER/NAME.jsonl; runs that are there already are not repeated, so the work can be
split over several calls. The default variant runs with three seeds. `--parallel N` runs N at a time, dealt to
`--gpus M` GPUs: learning is the same, seconds are not. With `--seconds S` a run ends after S seconds; the table then
compares the steps that all runs have.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from launch import STOPPED  # noqa: E402 - the scripts lie beside this folder

FOUR_STEPS = ["policy.train_global_batch_size=128", "policy.optimizer.lr=1e-5"]
CORRECTION = ["loss_fn.use_importance_sampling_correction=true", "loss_fn.truncated_importance_sampling_ratio=2"]
RUNS = {
    "grpo-seed42": [],
    "grpo-seed43": ["grpo.seed=43"],
    "grpo-seed44": ["grpo.seed=44"],
    "dr_grpo": ["loss_fn.variant=dr_grpo"],
    "cispo": ["loss_fn.variant=cispo"],
    "gspo": ["loss_fn.variant=gspo"],
    "grpo-corrected": CORRECTION,
    "cispo-corrected": ["loss_fn.variant=cispo", *CORRECTION],
}


KEPT = ("step", "reward", "approx_entropy", "grad_norm", "clipfrac", "probs_ratio_min", "probs_ratio_max", "loss",
        "gen_kl_error", "token_mult_prob_error", "sampling_importance_ratio", "frac_zero_signal_groups",
        "truncation_rate", "mean_gen_tokens", "trained_token_fraction", "time/step_s", "time/elapsed_s")  # fmt: skip


def train(name: str, config: str, overrides: list[str], output: Path, seconds: float | None, gpu: int | None) -> None:
    """One run; its metrics are copied when it has ended well, so a file that exists is complete."""
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, str(ROOT / "train_grpo.py"), "--config", config, f"logger.log_dir={work}"]
        command += ["checkpointing.enabled=false", *FOUR_STEPS, *RUNS[name], *overrides]
        with (output / f"{name}.txt").open("w") as console:
            run = subprocess.Popen(command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT, env=environment)
            try:
                code = run.wait(seconds)
            except subprocess.TimeoutExpired:
                run.terminate()
                try:
                    code = run.wait(60)
                except subprocess.TimeoutExpired:
                    run.kill()
                    raise
        if code not in (0, STOPPED):
            raise RuntimeError(f"exit code {code}")
        keep(Path(work) / "metrics.jsonl", output / f"{name}.jsonl")


def keep(metrics: Path, path: Path) -> None:
    """The rows of the training steps, with what the table and the plot may need."""
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "reward" in row]
    if not rows:
        raise RuntimeError("stopped before its first step")
    path.write_text("".join(json.dumps({k: row[k] for k in KEPT if k in row}) + "\n" for row in rows))


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown: what differs between the runs, over the steps that all of them have."""
    steps = min(map(len, runs.values()))
    lines = [f"Over the {steps} steps that all runs have; the last four columns are of the last 10.", ""]
    lines += ["| run | reward, first 10 steps | last 10 | entropy | clipped tokens | ratios | gen_kl_error |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, rows in runs.items():
        first, last = rows[: min(10, steps)], rows[max(0, steps - 10) : steps]

        def of(key: str, rows: list[dict]) -> list[float]:  # a step without an update has few metrics
            return [row[key] for row in rows if key in row] or [math.nan]

        def mean(key: str, rows: list[dict]) -> float:
            return statistics.mean(of(key, rows))

        low, high = min(of("probs_ratio_min", last)), max(of("probs_ratio_max", last))
        lines.append(
            f"| {name} | {mean('reward', first):.3f} | {mean('reward', last):.3f} | "
            f"{mean('approx_entropy', last):.3f} | {mean('clipfrac', last):.2%} | {low:.2f} to {high:.2f} | "
            f"{mean('gen_kl_error', last):.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="deal the runs to this many GPUs")
    parser.add_argument("--seconds", type=float, help="end a run after this time")
    args, overrides = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in args.only if not (args.output / f"{name}.jsonl").exists()]
    with ThreadPoolExecutor(args.parallel) as pool:
        gpus = [i % args.gpus if args.gpus else None for i in range(len(missing))]
        runs = [
            pool.submit(train, name, args.config, overrides, args.output, args.seconds, gpu)
            for name, gpu in zip(missing, gpus, strict=True)
        ]
    failed = [name for name, run in zip(missing, runs, strict=True) if run.exception()]
    files = {name: args.output / f"{name}.jsonl" for name in RUNS if (args.output / f"{name}.jsonl").exists()}
    found = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    if found:
        (args.output / "table.md").write_text(table(found))
        print(table(found))
        curves = [f"{name}={file}" for name, file in files.items()]
        plot = [sys.executable, str(ROOT / "plot_run.py"), *curves, "--output", str(args.output / "reward.png")]
        subprocess.run(plot, check=True)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, see the .txt files in {args.output}")


if __name__ == "__main__":
    main()
