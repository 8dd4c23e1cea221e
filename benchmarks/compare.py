"""The same job in this code base, in TRL and in verl, on the same GPU one after the other:

    python benchmarks/compare.py ours|trl|verl MODEL_FOLDER OUTPUT_FOLDER [--geometry NAME | --recipe FILE]
        [--data FOLDER] [--steps 60] [--seconds 400] [--micro-batch N] [--save-every STEPS] [--peer-path PYTHONPATH]

The job: prompts, group, lengths and learning rate of a recipe, recipes/smollm2-arithmetic.yaml unless another is
named (its rows are made here, those of another lie in `--data`); or with `--geometry` that of step_time.py: random
weights, 32 prompts of 150 tokens, 16 responses of 350 tokens to each, coins for rewards. MODEL_FOLDER is made then
unless it is there.

The peers (peer_trl.py, peer_verl.py) are set as their documentation advises for speed: bfloat16, no activation
checkpointing, no pass that ours has not either. `--micro-batch` is in responses for TRL, in tokens for verl: give the
largest that fits. Each side makes one optimizer step a batch, with the same loss denominator (all tokens of the batch)
and verifier. `--seconds` ends a side, its start included; what it did by then counts. With `--save-every` TRL's models
stay in OUTPUT_FOLDER/trl. `--peer-path`: where the peer and its versions of other packages are, if not installed here.

OUTPUT_FOLDER/compare.json gets each side's steps and the medians of them all but the first two, in place of an earlier
run of that side. Printed: the medians of all sides that are there, and how many times as fast ours is.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks import step_time  # noqa: E402 - the scripts lie beside this folder
from benchmarks.environment import environment  # noqa: E402
from config import load_config  # noqa: E402

WARM_UP = 2  # steps left out of the medians: all sides compile in them
PHASES = ("step_s", "generate_s", "train_s", "refit_s")
ARITHMETIC = ["--kinds", "add,mul,add_mul", "--min-operand", "10", "--max-operand", "99", "--max-factor", "9",
              "--solved-examples", "3", "--answer-style", "worked"]  # fmt: skip


def make_job(args: argparse.Namespace, work: Path) -> dict:
    """What a peer's script needs to know, for its job.json."""
    job = {"model": str(args.model), "output": str(args.output.resolve()), "steps": args.steps, "seed": 42,
           "micro_batch": args.micro_batch, "save_every": args.save_every, "coin": bool(args.geometry)}  # fmt: skip
    if args.geometry:
        if not (args.model / "tokenizer.json").exists():
            step_time.make_model(args.geometry, args.model)
        shape = step_time.parser().parse_args([args.geometry])
        rows = work / "rows.jsonl"
        vocabulary = step_time.GEOMETRIES[args.geometry][6]
        step_time.write_rows(rows, shape.prompts * args.steps, shape.prompt_tokens, vocabulary)
        return job | {
            "rows": str(rows), "prompts": shape.prompts, "group": shape.group, "prompt_tokens": shape.prompt_tokens,
            "answer_tokens": shape.answer_tokens, "lr": 1e-6, "warmup_steps": 0,
        }  # fmt: skip
    if args.data is None:
        args.data = work / "data"
        prepare = [sys.executable, str(ROOT / "prepare_data.py"), "arithmetic", "--output", str(args.data)]
        subprocess.run([*prepare, *ARITHMETIC], check=True)
    cfg = load_config(str(args.recipe), [])
    answer_tokens = cfg.policy.generation.max_new_tokens
    return job | {
        "rows": f"{args.data.resolve()}/train.jsonl", "prompts": cfg.grpo.num_prompts_per_step,
        "group": cfg.grpo.num_generations_per_prompt, "answer_tokens": answer_tokens,
        "prompt_tokens": cfg.policy.max_total_sequence_length - answer_tokens, "lr": cfg.policy.optimizer.lr,
        "warmup_steps": cfg.policy.scheduler.warmup_steps,
    }  # fmt: skip


def our_command(args: argparse.Namespace, job: dict, work: Path) -> list[str]:
    if args.geometry:
        command = [sys.executable, str(ROOT / "benchmarks" / "step_time.py"), args.geometry, "--steps", str(args.steps)]
        return [*command, "--model-folder", str(args.model), "--metrics", str(work / "metrics.jsonl")]
    return [
        sys.executable, str(ROOT / "train_grpo.py"), "--config", str(args.recipe), f"policy.model_name={args.model}",
        f"data.train_jsonl_fpath={job['rows']}", "data.validation_jsonl_fpath=null",
        f"grpo.max_num_steps={args.steps}", "checkpointing.enabled=false", f"logger.log_dir={work}",
    ]  # fmt: skip


def our_steps(metrics: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [
        {"at_s": r["time/elapsed_s"], "reward": r["reward"], "answer_tokens": r["mean_gen_tokens"],
         **{phase: r[f"time/{phase}"] for phase in PHASES}}
        for r in rows if "time/step_s" in r  # not a validation before the first step
    ]  # fmt: skip


def run_for(command: list[str], seconds: float, log: Path, path: str) -> str:
    """Run a command with all that it starts for at most so long, with this PYTHONPATH. Returns how it ended."""
    env = os.environ | {"PYTHONPATH": path}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        return f"exit code {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    finally:
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(patience)


def table(sides: dict) -> str:
    lines = [
        f"{name}: " + ", ".join(f"{p} {side[p]:.2f}" for p in PHASES if side.get(p)) for name, side in sides.items()
    ]
    if ours := sides.get("ours"):
        lines += [f"ours is {side['step_s'] / ours['step_s']:.1f} times as fast as {n}" for n, side in sides.items()]
    return "\n".join(line for line in lines if not line.endswith("as ours"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "trl", "verl"))
    parser.add_argument("model", type=lambda p: Path(p).resolve())
    parser.add_argument("output", type=Path)
    parser.add_argument("--geometry", choices=step_time.GEOMETRIES)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-arithmetic.yaml")
    parser.add_argument("--data", type=Path, help="folder with the recipe's train.jsonl; default: made here")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=400, help="of a side, start included")
    parser.add_argument("--micro-batch", type=int, default=16, help="TRL: responses; verl: tokens")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="keep TRL's model every so many steps")
    parser.add_argument("--peer-path", default=os.environ.get("PYTHONPATH", ""))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        job = make_job(args, work) | {"steps_file": f"{work}/steps.jsonl"}
        (work / "job.json").write_text(json.dumps(job))
        peer = [sys.executable, str(ROOT / "benchmarks" / f"peer_{args.side}.py"), str(work / "job.json")]
        command = our_command(args, job, work) if args.side == "ours" else peer
        path = os.environ.get("PYTHONPATH", "") if args.side == "ours" else args.peer_path
        ended = run_for(command, args.seconds, args.output / f"{args.side}.log", path)
        print(f"{args.side}: {ended} after {time.time() - began:.0f} s", flush=True)
        if args.side == "ours":
            versions, steps = environment(), our_steps(work / "metrics.jsonl")
        else:
            written = (work / "steps.jsonl").read_text() if (work / "steps.jsonl").exists() else "{}"
            versions, *steps = [json.loads(line) for line in written.splitlines()]
    if len(steps) <= WARM_UP:
        raise SystemExit(f"error: {len(steps)} steps are too few to time, see {args.output}/{args.side}.log")
    medians = {p: statistics.median(s[p] for s in steps[WARM_UP:]) for p in PHASES if p in steps[0]}
    side = {"ended": ended, **medians, **versions}
    side |= {"job": args.geometry or args.recipe.name, "steps": steps}
    side |= {} if args.side == "ours" else {"micro_batch": args.micro_batch}
    path = args.output / "compare.json"
    sides = json.loads(path.read_text()) if path.exists() else {}
    sides[args.side] = side
    path.write_text(json.dumps(sides, indent=1) + "\n")
    print(table(sides))


if __name__ == "__main__":
    main()
