"""Draw runs: `python plot_run.py RUN [RUN ...] --output FILE.png`

RUN is a run's log folder or its metrics.jsonl, or NAME=PATH to name it in the legend. Faint lines are single steps,
full lines means of the last ten. Validation has its 95 % interval (normal approximation, answers independent).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

SMOOTH = 10  # steps
TIME = "time/elapsed_s"
PANELS = [  # metric, what it is drawn over, title with unit, scale of the axis
    ("reward", "step", "mean reward", "linear"),
    ("reward", TIME, "mean reward", "linear"),
    ("val:accuracy", "step", "validation accuracy, with 95 % interval", "linear"),
    ("mean_gen_tokens", "step", "response length, tokens", "linear"),
    ("truncation_rate", "step", "responses cut off, share", "linear"),
    ("gen_kl_error", "step", "mismatch of engine and trainer, KL per token", "log"),
    ("approx_entropy", "step", "entropy, nats per token", "linear"),
    ("grad_norm", "step", "gradient norm before clipping", "linear"),
]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics. The program ends with one line if there is no step."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as e:
        sys.exit(f"error: cannot read '{path}' ({e}); a run writes it to its logger.log_dir")
    if not any("reward" in row for row in rows):
        sys.exit(f"error: '{path}' has no step yet")
    return rows


def smooth(values: list[float]) -> list[float]:
    """Mean of each value and the SMOOTH - 1 before it."""
    return [float(np.mean(values[max(0, i + 1 - SMOOTH) : i + 1])) for i in range(len(values))]


def curve(axis: plt.Axes, rows: list[dict], metric: str, along: str, name: str) -> None:
    """Draw one metric of one run, raw and smoothed, or validation with its interval, over the steps that have it."""
    rows = [row for row in rows if row.get(metric) is not None and along in row]
    at, values = [row[along] for row in rows], np.array([row[metric] for row in rows])
    if metric == "val:accuracy":
        count = np.array([row.get("val:num_answers", np.nan) for row in rows])
        half = 1.96 * np.sqrt(values * (1 - values) / count)
        axis.errorbar(at, values, yerr=half, marker="o", markersize=3, capsize=2, linewidth=1.2, label=name)
    else:
        (line,) = axis.plot(at, smooth(values), label=name, linewidth=1.5)
        axis.plot(at, values, color=line.get_color(), linewidth=0.6, alpha=0.25)


def seconds_by_phase(axis: plt.Axes, runs: dict[str, list[dict]]) -> None:
    """Draw a bar for each run: the median seconds of each phase of a step."""
    bottom = np.zeros(len(runs))
    steps = [[row for row in rows if "time/step_s" in row] for rows in runs.values()]
    names = {name for rows in steps for row in rows for name in row if name.startswith("time/")}
    for name in sorted(names - {"time/step_s", "time/elapsed_s"}):
        median = np.array([np.median([row.get(name, 0.0) for row in rows]) for rows in steps])
        if (median > 0).any():
            axis.bar(list(runs), median, bottom=bottom, width=0.5, label=name.removeprefix("time/").removesuffix("_s"))
            bottom += median
    axis.legend(frameon=False, fontsize="small")
    axis.set_title("median seconds of a step, by phase")


def draw(runs: dict[str, list[dict]], output: Path) -> None:
    """Draw all panels into one PNG."""
    figure, axes = plt.subplots(3, 3, figsize=(15, 11))
    *lines, phases = axes.flat
    for axis, (metric, along, title, scale) in zip(lines, PANELS, strict=True):
        for name, rows in runs.items():
            curve(axis, rows, metric, along, name)
        axis.set(title=title, yscale=scale, xlabel="step" if along == "step" else "seconds of training")
    seconds_by_phase(phases, runs)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    lines[0].legend(frameon=False)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    print(f"wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        name, separator, path = run.partition("=")
        runs[name if separator else run] = read_metrics(Path(path if separator else run))
    draw(runs, args.output)


if __name__ == "__main__":
    main()
