"""Draw runs: `python plot_run.py RUN [RUN ...] --output FILE.png`

RUN is a run's log folder or its metrics.jsonl, or NAME=PATH to name it in the legend. Faint lines are the steps, full
ones the mean of the last ten. Validation comes with its 95 % interval (normal approximation, answers independent).
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
PANELS = {  # metric: title with unit, and the scale of its axis
    "mean_gen_tokens": ("response length, tokens", "linear"),
    "truncation_rate": ("responses cut off, share", "linear"),
    "gen_kl_error": ("mismatch of engine and trainer, KL per token", "log"),
    "approx_entropy": ("entropy, nats per token", "linear"),
    "grad_norm": ("gradient norm before clipping", "linear"),
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics. Ends with one line if there is no step."""
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


def curve(axis: plt.Axes, rows: list[dict], metric: str, name: str, along: str = "step") -> None:
    """One metric of one run, raw and smoothed; steps that lack it are left out."""
    rows = [row for row in rows if metric in row and along in row]
    at, values = [row[along] for row in rows], [row[metric] for row in rows]
    (line,) = axis.plot(at, smooth(values), label=name, linewidth=1.5)
    axis.plot(at, values, color=line.get_color(), linewidth=0.6, alpha=0.25)


def validation(axis: plt.Axes, rows: list[dict], name: str) -> None:
    rows = [row for row in rows if row.get("val:accuracy") is not None]
    at, share = [row["step"] for row in rows], np.array([row["val:accuracy"] for row in rows])
    count = np.array([row.get("val:num_answers", np.nan) for row in rows])
    half = 1.96 * np.sqrt(share * (1 - share) / count)
    axis.errorbar(at, share, yerr=half, marker="o", markersize=3, capsize=2, linewidth=1.2, label=name)


def seconds_by_phase(axis: plt.Axes, runs: dict[str, list[dict]]) -> None:
    """Median seconds of each phase of a step, one bar a run."""
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
    """All panels into one PNG."""
    figure, axes = plt.subplots(3, 3, figsize=(15, 11))
    by_step, by_time, validated, *others, phases = axes.flat
    for name, rows in runs.items():
        curve(by_step, rows, "reward", name)
        curve(by_time, rows, "reward", name, along="time/elapsed_s")
        validation(validated, rows, name)
        for axis, metric in zip(others, PANELS, strict=True):
            curve(axis, rows, metric, name)
    by_step.set(title="mean reward")
    by_time.set(title="mean reward", xlabel="seconds of training")
    validated.set(title="validation accuracy, with 95 % interval")
    for axis, (title, scale) in zip(others, PANELS.values(), strict=True):
        axis.set(title=title, yscale=scale)
    seconds_by_phase(phases, runs)
    for axis in (by_step, validated, *others):
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    by_step.legend(frameon=False)
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
