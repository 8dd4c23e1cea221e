"""Reward over steps and over training time, from the metrics.jsonl of one or more runs.

Each step's mean reward is drawn faintly, and over it the mean of the last ten steps.

python benchmarks/plot_run.py OUTPUT.png NAME=path/to/metrics.jsonl [NAME=...]
"""

import json
import statistics
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
        smooth = [statistics.mean(rewards[max(0, i - 9) : i + 1]) for i in range(len(rewards))]
        for axis, key in ((by_step, "step"), (by_time, "time/elapsed_s")):
            at = [r[key] for r in rows]
            (line,) = axis.plot(at, smooth, label=name, linewidth=1.2)
            axis.plot(at, rewards, color=line.get_color(), linewidth=0.6, alpha=0.25)
    by_step.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    by_time.set(xlabel="training time in seconds")
    for axis in (by_step, by_time):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    by_time.legend(frameon=False, loc="upper left", fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
