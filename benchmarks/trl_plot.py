"""Reward and test accuracy over seconds of training, here and in TRL: `python benchmarks/trl_plot.py FOLDER`

FOLDER has what compare.py wrote (compare.json), the metrics of our run (trl-ours.jsonl, whose validations are
the accuracy) and for models of TRL that evaluate.py scored its metrics.json as evaluation-trl-STEP.json, the step
where both begin as evaluation-trl-0.json. Writes trl.png.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from plot_run import smooth  # noqa: E402 - the scripts lie beside this folder


def main() -> None:
    folder = Path(sys.argv[1])
    sides = json.loads((folder / "compare.json").read_text())
    validations = [row for row in map(json.loads, (folder / "trl-ours.jsonl").open()) if "val:accuracy" in row]
    accuracy = {"ours": [(row.get("time/elapsed_s", 0.0), row["val:accuracy"]) for row in validations], "trl": []}
    for path in folder.glob("evaluation-trl-*.json"):
        step, scores = int(re.findall(r"\d+", path.stem)[-1]), json.loads(path.read_text())
        at_s = sides["trl"]["steps"][step - 1]["at_s"] if step else 0.0
        accuracy["trl"].append((at_s, next(value for name, value in scores.items() if name.startswith("avg@"))))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, title in (("ours", "this code"), ("trl", "TRL")):
        steps = sides[name]["steps"]
        at = [step["at_s"] for step in steps]
        (line,) = left.plot(at, smooth([step["reward"] for step in steps]), label=title)
        left.plot(at, [step["reward"] for step in steps], color=line.get_color(), linewidth=0.6, alpha=0.3)
        right.plot(*zip(*sorted(accuracy[name]), strict=True), marker="o", label=title)
    left.set(title="mean reward, steps and the mean of the last ten", xlabel="seconds of training", ylim=0)
    right.set(title="accuracy of sampled answers to the test questions", xlabel="seconds of training", ylim=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "trl.png", dpi=100)


if __name__ == "__main__":
    main()
