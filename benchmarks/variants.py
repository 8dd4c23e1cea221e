"""Train one recipe with every loss variant and correction; one table and one plot of reward over steps.

    python benchmarks/variants.py OUTPUT_FOLDER --config recipes/NAME.yaml [--only RUN ...] [overrides...]

Each run's metrics go to OUTPUT_FOLDER/NAME.jsonl; runs that are there already are not repeated, so the work can be
split over several calls. The default variant runs with three seeds. `--parallel N` runs N at a time, on the same GPU if
there is one: learning is the same, seconds are not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def train(name: str, config: str, overrides: list[str], output: Path) -> None:
    """One run; its metrics are copied when it finished, so a file that exists is complete."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, str(ROOT / "train_grpo.py"), "--config", config, f"logger.log_dir={work}"]
        command += ["checkpointing.enabled=false", *RUNS[name], *overrides]
        with (output / f"{name}.txt").open("w") as console:
            subprocess.run(command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT, check=True)
        (output / f"{name}.jsonl").write_text((Path(work) / "metrics.jsonl").read_text())


def read(path: Path) -> list[dict]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if "reward" in row]


def table(output: Path) -> str:
    """Markdown: what differs between the runs that are there."""
    lines = ["| run | first 10 steps | last 10 | seconds | s/step, median | gen_kl_error, median | cut off, last 10 |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in RUNS:
        if (output / f"{name}.jsonl").exists():
            rows = read(output / f"{name}.jsonl")

            def mean(key: str, part: list[dict]) -> float:
                return statistics.mean(row[key] for row in part)

            kl = statistics.median(row["gen_kl_error"] for row in rows if "gen_kl_error" in row)
            lines.append(
                f"| {name} | {mean('reward', rows[:10]):.3f} | {mean('reward', rows[-10:]):.3f} | "
                f"{rows[-1]['time/elapsed_s']:.0f} | {statistics.median(r['time/step_s'] for r in rows):.2f} | "
                f"{kl:.1e} | {mean('truncation_rate', rows[-10:]):.1%} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--parallel", type=int, default=1)
    args, overrides = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in args.only if not (args.output / f"{name}.jsonl").exists()]
    with ThreadPoolExecutor(args.parallel) as pool:
        runs = [pool.submit(train, name, args.config, overrides, args.output) for name in missing]
    failed = [name for name, run in zip(missing, runs, strict=True) if run.exception()]
    (args.output / "table.md").write_text(table(args.output))
    print(table(args.output))
    curves = [f"{name}={args.output / name}.jsonl" for name in RUNS if (args.output / f"{name}.jsonl").exists()]
    plot = [sys.executable, str(ROOT / "benchmarks" / "plot_run.py"), str(args.output / "reward.png"), *curves]
    subprocess.run(plot, check=True)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, see the .txt files in {args.output}")


if __name__ == "__main__":
    main()
