"""Faults for hours: `python benchmarks/soak.py [--steps 1000] [--every 25]`.

Runs the quickstart (after `make quickstart` has made its data and model) twice with the same seed: left alone, and
with a random fault every 25 steps that a run must recover from. Both must finish with the same rewards, answer by
answer as far as rollouts.jsonl has them, and the memory of each kind of process may not grow by more than 5 % between
steps 100 to 150 and the last 50. Writes results/soak/soak.json and memory.png; exits with 1 if something differs.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import psutil  # noqa: E402
from environment import environment  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # by a word of its command line
    "driver": "train_grpo.py", "policy": "ray::PolicyWorker", "engine": "ray::RolloutWorker", "raylet": "raylet/raylet",
    "gcs": "gcs_server", "reward server": "reward_server.py", "verifiers": "verifier_pool.py",
}  # fmt: skip
FAULTS = ("engine killed", "engine stopped for 2 s", "reward server killed", "reward server stopped")
Memory = dict[str, dict[int, float]]  # of each kind its MiB at a step, summed over its processes


def rows(path: Path) -> list[dict]:
    """A file of rows; without its last line where that is still being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def family(process: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The run's processes by kind, as far as they are alive."""
    found = defaultdict(list)
    children = process.children(recursive=True) if process.is_running() else []
    for member in [process, *children]:
        with suppress(psutil.Error):
            words = " ".join(member.cmdline())
            kind = next((kind for kind, word in KINDS.items() if word in words), None)
            found[kind].append(member)
    return found


def break_something(fault: str, members: dict[str, list[psutil.Process]]) -> None:
    victim = members["engine" if fault.startswith("engine") else "reward server"][0]
    if fault.endswith("killed"):
        victim.kill()
        return
    victim.suspend()
    if fault == "engine stopped for 2 s":
        time.sleep(2)
        victim.resume()


def run(folder: Path, steps: int, every: int | None, seed: int) -> tuple[Memory, Counter]:
    """Run the quickstart; with `every`, break something every so many steps. Memory by step, and the faults."""
    rng, memory, faults = random.Random(seed), defaultdict(dict), Counter()
    command = [sys.executable, ROOT / "train_grpo.py", "--config", ROOT / "recipes" / "quickstart.yaml"]
    command += [f"logger.log_dir={folder}/logs", f"checkpointing.checkpoint_dir={folder}/checkpoints"]
    command += [f"grpo.max_num_steps={steps}", "grpo.max_num_epochs=1000", "env.reward_timeout_s=15"]
    with (folder / "console.txt").open("w") as out:
        started = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    process, seen, due = psutil.Process(started.pid), 0, every or steps + 1
    while started.poll() is None:
        step = len([row for row in rows(folder / "logs" / "metrics.jsonl") if row["step"]])
        if step > seen:
            seen, members = step, family(process)
            for kind in KINDS:
                with suppress(psutil.Error):
                    memory[kind][step] = sum(m.memory_info().rss for m in members[kind]) / 2**20
        if seen >= due:
            due += every
            time.sleep(rng.random())  # anywhere in a step
            fault, members = rng.choice(FAULTS), family(process)
            if members["engine"] and members["reward server"]:
                break_something(fault, members)
                faults[fault] += 1
                print(f"step {seen}: {fault}", flush=True)
        time.sleep(0.05)
    if started.returncode:
        sys.exit(f"the run ended with {started.returncode}: see {folder}/console.txt")
    return memory, faults


def growth(memory: dict[int, float]) -> float | None:
    """Of the last 50 steps over steps 100 to 150; None in a shorter run."""
    first, last = [m for step, m in memory.items() if 100 <= step < 150], list(memory.values())[-50:]
    return statistics.median(last) / statistics.median(first) - 1 if len(memory) >= 200 else None


def draw(memory: Memory, output: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 5))
    for kind, by_step in memory.items():
        axis.plot(list(by_step), list(by_step.values()), label=kind)
    axis.set(xlabel="step", ylabel="resident memory, MiB", yscale="log", title="memory of each kind of process")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(output, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "soak")
    args = parser.parse_args()
    folders = [(args.folder / name).resolve() for name in ("whole", f"faulty-{int(time.time())}")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if len(rows(folders[0] / "logs" / "metrics.jsonl")) < args.steps:
        run(folders[0], args.steps, None, args.seed)
    memory, faults = run(folders[1], args.steps, args.every, args.seed)
    metrics = [[row for row in rows(folder / "logs" / "metrics.jsonl") if row["step"]] for folder in folders]
    rewards = [[row["reward"] for row in found][: args.steps] for found in metrics]
    answers = [[r for r in rows(f / "logs" / "rollouts.jsonl") if r["step"] <= args.steps] for f in folders]
    grown = {kind: growth(by_step) for kind, by_step in memory.items()}
    draw(memory, args.folder / "memory.png")
    result = {
        "steps": args.steps, "faults": faults, "same_rewards": rewards[0] == rewards[1],
        "same_answers": answers[0] == answers[1], "last_50_rewards": statistics.mean(rewards[1][-50:]),
        "engine_restarts": metrics[1][-1]["engine_restarts"],
        "reward_server_restarts": metrics[1][-1]["reward_server_restarts"],
        "num_unverified": sum(row["num_unverified"] for row in metrics[1]),
        "seconds": [found[-1]["time/elapsed_s"] for found in metrics], "memory_growth": grown, **environment(),
    }  # fmt: skip
    (args.folder / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(not (result["same_answers"] and all(g is None or g <= 0.05 for g in grown.values())))


if __name__ == "__main__":
    main()
