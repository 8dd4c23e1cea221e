"""Reward over steps and over training time, from the metrics.jsonl of one or more runs.

python benchmarks/plot_run.py OUTPUT.png NAME=path/to/metrics.jsonl [NAME=...]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(output: str, *runs: str) -> None:
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for run in runs:
        name, _, path = run.partition("=")
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        rows = [r for r in rows if "reward" in r]
        rewards = [r["reward"] for r in rows]
        by_step.plot([r["step"] for r in rows], rewards, label=name, linewidth=1.2)
        by_time.plot([r["time/elapsed_s"] for r in rows], rewards, label=name, linewidth=1.2)
    by_step.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    by_time.set(xlabel="training time in seconds")
    for axis in (by_step, by_time):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    by_step.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
