"""Where the time of sampling goes: seconds, engine steps and Python functions of one engine, without Ray.

    python benchmarks/profile_generate.py MODEL_FOLDER [--answers 32,64,128] [--new-tokens 32] [--cpu]
        [section.key=value ...]

With the keys of recipes/smollm2-arithmetic.yaml. For each number of answers it samples that many, 16 a prompt, to
prompts of random tokens that share their first 150, and prints the median of five runs: seconds, engine steps (a step
draws one token of each unfinished answer), milliseconds a step. Every answer gets its full length, so all are in every
step. Then, of one more run each of the last number, the longest functions and on a GPU the longest kernels.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from config import load_config  # noqa: E402
from rollout import RolloutWorker  # noqa: E402

GROUP, SHARED, PROMPT, ROWS = 16, 150, 185, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--answers", default="32,64,128")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--cpu", action="store_true")
    args, overrides = parser.parse_known_args()
    cfg = load_config(
        str(ROOT / "recipes" / "smollm2-arithmetic.yaml"),
        [
            f"policy.model_name={args.model}", f"cluster.gpus_per_node={0 if args.cpu else 1}",
            f"policy.generation.max_new_tokens={args.new_tokens}", *overrides,
        ],
    )  # fmt: skip
    worker = RolloutWorker(cfg.policy, 0, "cpu" if args.cpu else "cuda", args.model)
    rng = np.random.default_rng(0)
    shared = rng.integers(100, 10000, SHARED).tolist()
    steps = 0
    step = worker.engine.step

    def counted() -> list:
        nonlocal steps
        steps += 1
        return step()

    worker.engine.step = counted

    def sample(answers: int) -> float:
        prompts = [(i, shared + rng.integers(100, 10000, PROMPT - SHARED).tolist()) for i in range(answers // GROUP)]
        began = time.perf_counter()
        found = sum(len(g.response_ids) for groups in worker.generate(prompts, GROUP, 1, []) for g in groups)
        assert found == answers // GROUP * GROUP
        return time.perf_counter() - began

    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    counts = [int(n) for n in args.answers.split(",")]
    for answers in counts:
        sample(answers)
        steps = 0
        seconds = statistics.median(sample(answers) for _ in range(5))
        print(f"{answers} answers: {seconds:.3f} s, {steps / 5:.0f} steps, {seconds / steps * 5e3:.2f} ms a step")
    functions = cProfile.Profile()
    functions.runcall(sample, counts[-1])
    for order in ("tottime", "cumtime"):
        pstats.Stats(functions).sort_stats(order).print_stats(ROWS)
    if not args.cpu:
        steps = 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kernels:
            sample(counts[-1])
        times = kernels.key_averages()
        busy = sum(event.self_device_time_total for event in times)
        print(f"{counts[-1]} answers: kernels run for {busy / steps / 1e3:.2f} ms a step")
        print(times.table(sort_by="self_device_time_total", row_limit=ROWS, max_name_column_width=90))


if __name__ == "__main__":
    main()
