"""Kill a run again and again and compare it with one that was left alone: `python benchmarks/kill_resume.py`.

Trains a tiny model on the CPU twice. One run is never interrupted. The other is killed with SIGKILL at seeded random
moments (anywhere from its start on, within steps, within saves; the driver alone, or all its processes at once) and
started again by the same command until it is done. Then metrics.jsonl, rollouts.jsonl, and every checkpoint's weights,
optimizer state and random state are compared bit for bit (metrics without the timings). It takes about ten minutes on
two cores; `--kills-now 6` stops after six kills, and the next call goes on.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from environment import environment
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 300.0


def prepare(folder: Path) -> None:
    """Rows and a model that is right one time in three."""
    data = [sys.executable, str(ROOT / "prepare_data.py"), "arithmetic", "--kinds", "add", "--max-operand", "6"]
    subprocess.run([*data, "--num-train", "512", "--output", str(folder / "rows"), "--overwrite"], check=True)
    if not (folder / "model").exists():
        model = [sys.executable, str(ROOT / "recipes" / "quickstart_model.py"), "--output", str(folder / "model")]
        subprocess.run([*model, "--data", str(folder / "rows" / "train.jsonl")], check=True)


def command(folder: Path, name: str, steps: int) -> list[str]:
    """The run `name`. Dynamic sampling: the position in the data is not the step."""
    return [
        sys.executable, str(ROOT / "train_grpo.py"), "--config", str(ROOT / "recipes" / "quickstart.yaml"),
        f"policy.model_name={folder}/model", f"data.train_jsonl_fpath={folder}/rows/train.jsonl",
        f"data.validation_jsonl_fpath={folder}/rows/validation.jsonl", f"logger.log_dir={folder}/{name}/logs",
        f"checkpointing.checkpoint_dir={folder}/{name}/checkpoints", "checkpointing.save_period=1",
        "checkpointing.keep_top_k=null", f"grpo.max_num_steps={steps}", "grpo.max_num_epochs=1000",
        "grpo.num_prompts_per_step=8", "grpo.num_generations_per_prompt=8", "grpo.use_dynamic_sampling=true",
        "grpo.dynamic_sampling_max_gen_batches=2", "grpo.val_period=5", "logger.num_rollouts_to_save=-1",
        "policy.scheduler.warmup_steps=10",
    ]  # fmt: skip


def newest(folder: Path) -> int:
    return max((int(p.name[5:]) for p in folder.glob("step_*")), default=0)


def is_agent(process: psutil.Process) -> bool:
    """Ray's own helpers, which notice the end of a run only within a minute."""
    try:
        return "Agent" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


class Leg:
    """One process of the killed run."""

    def __init__(self, folder: Path, steps: int):
        self.checkpoints, self.output = folder / "killed" / "checkpoints", folder / "killed" / "console.txt"
        self.began = time.monotonic()
        with self.output.open("w") as out:
            self.process = subprocess.Popen(command(folder, "killed", steps), stdout=out, stderr=out)

    def wait_for(self, condition: Callable[[], Any]) -> bool:
        """Whether it came true before the run ended."""
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.began > DEADLINE_S:
                raise TimeoutError(f"nothing happened for {DEADLINE_S:.0f} s, see {self.output}")
            time.sleep(0.0005)
        return True

    def said(self, words: str) -> bool:
        return words in self.output.read_text()

    def wait_for_moment(self, kind: str, rng: random.Random) -> bool:
        """Wait for a random moment of the kind. False if the run ended before."""
        delay, number = rng.random(), rng.randint(1, 3)
        if kind == "any":
            until = self.began + 25 * delay
            return self.wait_for(lambda: time.monotonic() > until)
        if not self.wait_for(lambda: self.said("Step ")):
            return False
        if kind == "save":
            for _ in range(number):
                saving = self.wait_for(lambda: list(self.checkpoints.glob("tmp_step_*/run.json")))
                if not saving or (number > 1 and not self.wait_for_end_of_save()):
                    return False
            return self.wait_for(lambda: list(self.checkpoints.glob("tmp_step_*/run.json"))) and self.pause(delay / 20)
        return self.pause(2 * delay)

    def wait_for_end_of_save(self) -> bool:
        return self.wait_for(lambda: not list(self.checkpoints.glob("tmp_step_*")))

    def pause(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        return self.wait_for(lambda: time.monotonic() > until)

    def kill(self, everything: bool) -> float:
        """SIGKILL to the driver, or to all processes; returns seconds since its start when all were gone."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        agents = [p for p in family if is_agent(p)]
        for member in family if everything else ():
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs([p for p in family if p not in agents], timeout=60)
        for agent in agents:
            if agent.is_running():
                agent.kill()
        if alive:
            raise RuntimeError(f"processes outlive the killed run: {[p.pid for p in alive]}")
        return time.monotonic() - self.began


def kill_one(folder: Path, steps: int, number: int, seed: int) -> dict[str, Any] | None:
    """Start or continue the run and kill it; what happened, or None if it came to its end before."""
    rng = random.Random(f"{seed}/{number}")
    kind, everything = rng.choices(("any", "step", "save"), (2, 4, 4))[0], rng.random() < 0.5
    before = newest(folder / "killed" / "checkpoints")
    leg = Leg(folder, steps)
    if not leg.wait_for_moment(kind, rng):
        if leg.process.returncode:
            raise RuntimeError(f"the run failed by itself, see {leg.output}")
        return None
    seconds = leg.kill(everything)
    text = leg.output.read_text()
    continued = re.findall(r"continuing after step (\d+)", text)
    assert int(continued[0]) == before if continued else not before or "Step " not in text, (before, text)
    banners = re.findall(r"Step (\d+)/", text)
    return {
        "aimed_at": kind, "killed": "all processes" if everything else "the driver", "seconds": round(seconds, 2),
        "in_step": int(banners[-1]) if banners else None,
        "half_written": sorted(p.name for p in (folder / "killed" / "checkpoints").glob("tmp_step_*")),
        "newest_complete": newest(folder / "killed" / "checkpoints"),
    }  # fmt: skip


def timeless(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.open()]
    return [{k: v for k, v in row.items() if "time/" not in k and "tokens_per_s" not in k} for row in rows]


def same_state(a: Path, b: Path, scratch: Path) -> bool:
    """Weights, optimizer state, schedule and random state of two checkpoints."""
    states = []
    for folder in (a, b):
        dcp_to_torch_save(folder / "training_state", scratch)
        states.append(torch.load(scratch))
    one, two = states
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def compare(folder: Path, steps: int) -> dict[str, bool]:
    """What is the same, bit for bit, in the two runs."""
    a, b = folder / "whole", folder / "killed"
    pairs = [(a / "checkpoints" / f"step_{n}", b / "checkpoints" / f"step_{n}") for n in range(1, steps + 1)]
    weights = [one / "model.safetensors" for one, _ in pairs], [two / "model.safetensors" for _, two in pairs]
    return {
        "metrics": timeless(a / "logs/metrics.jsonl") == timeless(b / "logs/metrics.jsonl"),
        "rollouts": (a / "logs/rollouts.jsonl").read_bytes() == (b / "logs/rollouts.jsonl").read_bytes(),
        "safetensors_of_all_steps": all(x.read_bytes() == y.read_bytes() for x, y in zip(*weights, strict=True)),
        "training_state_of_all_steps": all(same_state(x, y, folder / "state.pt") for x, y in pairs),
    }


def main() -> None:
    """Prepare, run undisturbed, kill, finish, compare; each part is skipped when an earlier call did it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-now", type=int, default=1000, help="stop after so many; the next call goes on")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("results/kill_resume"), help="of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "kill_resume.json")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "killed").mkdir(exist_ok=True)
    prepare(folder)
    for name in ("whole",) if newest(folder / "whole" / "checkpoints") < args.steps else ():
        shutil.rmtree(folder / name, ignore_errors=True)
        subprocess.run(command(folder, name, args.steps), check=True, stdout=subprocess.DEVNULL, timeout=DEADLINE_S)
    state = folder / "kills.json"
    kills = json.loads(state.read_text()) if state.exists() else []
    for number in range(len(kills), min(args.kills, len(kills) + args.kills_now)):
        found = kill_one(folder, args.steps, number, args.seed)
        if found is None:
            sys.exit(f"error: the run was done after {number} kills; pass more --steps and another --folder")
        print(f"kill {number + 1}:", json.dumps(found), flush=True)
        kills.append(found)
        state.write_text(json.dumps(kills))
    if len(kills) < args.kills:
        return
    subprocess.run(
        command(folder, "killed", args.steps), check=True, stdout=subprocess.DEVNULL, timeout=DEADLINE_S
    )  # fmt: skip
    result = {
        "same_bit_for_bit": compare(folder, args.steps), "steps": args.steps, "seed": args.seed,
        "in_saves": sum(bool(k["half_written"]) for k in kills),
        "before_the_first_step": sum(k["in_step"] is None for k in kills),
        "kills": kills, "environment": environment(),
    }  # fmt: skip
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "kills"}, indent=1))
    sys.exit(not all(result["same_bit_for_bit"].values()))


if __name__ == "__main__":
    main()
