"""Where the time of an update goes: seconds, GPU kernels and Python functions of one optimizer step, without Ray.

    python benchmarks/profile_update.py MODEL [--sequences 512] [--group 16] [--cpu] [section.key=value ...]

MODEL: a geometry of step_time.py, or a Hugging Face folder (then with the keys of recipes/smollm2-arithmetic.yaml).
Prints the seconds of three updates on random tokens (the first compiles), what share of the last one the GPU was busy,
and the longest kernels and functions of one more.
"""

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # as policy.Policy sets it for its actors
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from benchmarks.step_time import COMPILED, GEOMETRIES, SETTINGS, make_model  # noqa: E402
from config import load_config  # noqa: E402
from hardware import Shape  # noqa: E402
from model import Sequences  # noqa: E402
from policy import WARM_UP_TOKENS, PolicyWorker  # noqa: E402
from train_grpo import grpo_loss  # noqa: E402

ROWS = 25  # of each table


def random_batch(sequences: int, prompt_tokens: int, answer_tokens: int, vocabulary: int, group: int) -> Sequences:
    """Random tokens and advantages, `group` answers a prompt; the engine samples uniformly by its log-probabilities."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, vocabulary, prompt_tokens) for _ in range(-(-sequences // group))]
    uniform = np.full(answer_tokens, -np.log(vocabulary), dtype=np.float32)
    return Sequences(
        [prompts[i // group] for i in range(sequences)],
        [rng.integers(1, vocabulary, answer_tokens) for _ in range(sequences)],
        {"rollout_logprobs_T": [uniform] * sequences, "mask_T": [np.ones(answer_tokens)] * sequences},
        {"advantages_T": rng.standard_normal(sequences).astype(np.float32)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--group", type=int, default=16, help="answers to a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--answer-tokens", type=int, default=350)
    parser.add_argument("--cpu", action="store_true")
    args, overrides = parser.parse_known_args()
    geometry = args.model if args.model in GEOMETRIES else None
    recipe = "config.yaml" if geometry else "recipes/smollm2-arithmetic.yaml"
    with tempfile.TemporaryDirectory() as folder:
        if geometry:
            make_model(geometry, Path(folder))
        model = folder if geometry else args.model
        settings = [*(SETTINGS[geometry] if geometry else []), *([] if args.cpu else COMPILED)]
        cfg = load_config(
            str(ROOT / recipe),
            [
                f"policy.model_name={model}", "cluster.num_nodes=1", f"cluster.gpus_per_node={0 if args.cpu else 1}",
                "policy.dtensor_cfg.tensor_parallel_size=1", "logger.wandb_enabled=false",
                f"policy.max_total_sequence_length={args.prompt_tokens + args.answer_tokens}", *settings, *overrides,
            ],
        )  # fmt: skip
        worker = PolicyWorker(cfg.policy, 0, 1, "cpu" if args.cpu else "cuda:0", 300.0)
        worker.setup(worker.address())
        shape = Shape.of(model)
    if not args.cpu:
        worker.warm_up(WARM_UP_TOKENS)
    vocabulary = shape.head_weights // shape.hidden
    batch = random_batch(args.sequences, args.prompt_tokens, args.answer_tokens, vocabulary, args.group)
    counts = {"num_valid_tokens": float(args.sequences * args.answer_tokens), "num_valid_sequences": args.sequences}

    def update() -> float:  # seconds; it ends with a transfer to the host, so the GPU has then finished
        began = time.perf_counter()
        worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts})
        return time.perf_counter() - began

    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print("seconds:", ", ".join(f"{update():.3f}" for _ in range(3)), flush=True)
    if not args.cpu:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seconds = update()
        kernels = profile.key_averages()
        busy = sum(k.self_device_time_total for k in kernels) / 1e6
        print(f"GPU busy {busy:.3f} s of {seconds:.3f} s")
        for k in sorted(kernels, key=lambda k: -k.self_device_time_total)[:ROWS]:
            print(f"{k.self_device_time_total / 1e3:9.1f} ms {k.count:6d} x  {k.key[:90]}")
    functions = cProfile.Profile()
    functions.runcall(update)
    pstats.Stats(functions).sort_stats("tottime").print_stats(ROWS)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
