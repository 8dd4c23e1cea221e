"""What a busy machine costs: `python benchmarks/busy.py [--others 2] [--steps 40] [section.key=value ...]`.

Runs the quickstart (after `make quickstart` has made its data and model), starts as many `yes > /dev/null` beside it
after some steps, stops them again after as many, and prints the median seconds of a step with and without them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import environment

ROOT = Path(__file__).resolve().parent.parent


def seconds(folder: Path) -> list[float]:
    """Of each step so far."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["time/step_s"] for row in rows if row["step"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="before, beside and after them")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, ROOT / "train_grpo.py", "--config", ROOT / "recipes" / "quickstart.yaml"]
    command += [f"logger.log_dir={folder}", "checkpointing.enabled=false", "grpo.val_period=0"]
    command += [f"grpo.max_num_steps={3 * args.steps}", *args.overrides]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    others: list[subprocess.Popen] = []
    try:
        while run.poll() is None:
            done = len(seconds(folder))
            if done >= args.steps and not others:
                others = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(args.others)]
            if done >= 2 * args.steps:
                for other in others:
                    other.kill()
            time.sleep(0.05)
    finally:
        for process in (run, *others):
            process.kill()
    if run.returncode:
        sys.exit(f"the run ended with {run.returncode}")
    found, n = seconds(folder), args.steps  # the first steps are slower, and those in which something changed count not
    quiet = statistics.median(found[5:n] + found[2 * n + 5 :])
    beside = statistics.median(found[n + 5 : 2 * n])
    result = {"quiet_s": quiet, f"beside_{args.others}_s": beside, "ratio": beside / quiet, **environment()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
