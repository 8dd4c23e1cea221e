"""How far the trainer's log-probabilities are from the engine's, by precision, before any update.

    python benchmarks/mismatch.py MODEL_FOLDER [--gpus 1] [--prompts 16] [--results FILE] [section.key=value ...]

Answers of the engine to arithmetic problems, scored by the policy under the same weights. Prints a Markdown table: mean
k3 (what `gen_kl_error` is, here over all tokens), mean and largest absolute difference. --gpus 0: the CPU.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from config import load_config  # noqa: E402
from launch import StopRequests, start_ray  # noqa: E402
from model import Sequences  # noqa: E402
from policy import Policy  # noqa: E402
from recipes.arithmetic import Arithmetic, make_rows  # noqa: E402
from rollout import RolloutEngines  # noqa: E402
from rows import end_of_sequence_ids, load_tokenizer  # noqa: E402

GROUP = 8


def prompts(model: str, count: int) -> list[list[int]]:
    """Token ids of problems as recipes/smollm2-arithmetic.yaml has them."""
    problems = Arithmetic(
        ("add", "mul", "add_mul"), 10, 99, num_train=count, num_validation=3, solved_examples=3, answer_style="worked"
    )
    tokenizer = load_tokenizer(model)
    chats = [row["responses_create_params"]["input"] for row in make_rows(problems)["train"]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [tokenizer.apply_chat_template(chat, **options) for chat in chats]


def measure(model: str, count: int, overrides: list[str]) -> dict[str, float]:
    """Sample with the engine, score with the policy, compare."""
    cfg = load_config(str(ROOT / "recipes" / "smollm2-arithmetic.yaml"), [f"policy.model_name={model}", *overrides])
    placement = start_ray(cfg, StopRequests(None))
    try:
        policy, engines = Policy(cfg, placement), RolloutEngines(cfg, placement, model_name=model)
        ray.get(policy.start() + engines.start(), timeout=cfg.cluster.timeout_s)
        asked = prompts(model, count)
        groups = list(engines.generate(asked, GROUP, 0, end_of_sequence_ids(model, load_tokenizer(model))))
        answers = [ids for g in groups for ids in g.response_ids]
        asked = [np.array(asked[g.index]) for g in groups for _ in g.response_ids]
        gap = np.concatenate(policy.logprobs(Sequences(asked, answers, {}, {})))
        gap = gap.astype(np.float64) - np.concatenate([lp for g in groups for lp in g.rollout_logprobs])
        size = np.abs(gap)
        return {"tokens": len(gap), "k3": float(np.mean(np.expm1(gap) - gap)), "mean": size.mean(), "max": size.max()}
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gpus", type=int, default=1, choices=[0, 1])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--results", type=Path)
    args, overrides = parser.parse_known_args()
    model = str(Path(args.model).resolve())
    overrides += [f"cluster.gpus_per_node={args.gpus}", "logger.wandb_enabled=false"]
    if not args.gpus:
        overrides += ["policy.dtensor_cfg.compile_layers=false", "policy.generation.vllm_cfg.enforce_eager=true"]
        overrides += ["policy.generation.engines_per_gpu=1"]
    found = {
        p: measure(model, args.prompts, [*overrides, f"policy.precision={p}"])
        for p in ("bfloat16", "float16", *(() if args.gpus else ("float32",)))
    }
    lines = ["| precision | tokens | mean k3 | mean, largest difference |", "|---|---|---|---|"]
    lines += [f"| {p} | {r['tokens']} | {r['k3']:.1e} | {r['mean']:.1e}, {r['max']:.2g} |" for p, r in found.items()]
    print("\n".join(lines))
    if args.results:
        report = {"model": Path(model).name, **environment(), "overrides": overrides, "runs": found, "table": lines}
        args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
