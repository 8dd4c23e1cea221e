"""SmolLM2-135M-Instruct learns an environment of two turns of NeMo Gym, on one GPU.

    GYM_PYTHON=.venv-gym/bin/python python benchmarks/gym_smollm2.py MODEL_FOLDER OUTPUT_FOLDER [KEY=VALUE]

The environment is example_multi_turn_gymnasium, with sums of ours: a sum, then a number to add to it. So small a model
needs to be shown the form of an answer, so three such pairs of turns stand before the first question.
OUTPUT_FOLDER gets environment.json, console.txt, metrics.jsonl, episodes of each step (rollouts.jsonl) and Gym's log.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from benchmarks.gym_episodes import gym_servers  # noqa: E402

ROWS = 800  # 50 steps of 16


def answered(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def shown_sum(rng: random.Random) -> list[dict[str, str]]:
    """A sum in two turns, the second of which needs the answer of the first."""
    a, b, c = rng.randint(4, 19), rng.randint(4, 19), rng.randint(3, 9)
    first = answered(f"What is {a} plus {b}?", f"{a} + {b} = {a + b}")
    return first + answered(f"Now add {c} to that.", f"{a + b} + {c} = {a + b + c}")


def turns_row(rng: random.Random) -> dict:
    shown = [message for _ in range(3) for message in shown_sum(rng)]
    question, _, follow_up, answer = shown_sum(rng)
    expected = answer["content"].split(" = ")[1]
    made = {"responses_create_params": {"input": [*shown, question]}}
    return made | {"follow_ups": [follow_up["content"]], "expected_answer": expected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    args, overrides = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder, gym_servers(args.output / "gym.txt") as (urls, address):
        rng = random.Random(0)
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(turns_row(rng)) + "\n" for _ in range(ROWS)))
        command = [
            sys.executable, str(ROOT / "train_grpo.py"), "--config", str(ROOT / "recipes" / "smollm2-arithmetic.yaml"),
            f"policy.model_name={args.model.resolve()}", f"logger.log_dir={args.output.resolve()}",
            f"data.train_jsonl_fpath={folder}/rows.jsonl", "data.validation_jsonl_fpath=null",
            f"env.gym_url={urls['turns_agent']}", f"env.gym_model_address={address}",
            "checkpointing.enabled=false", "grpo.num_prompts_per_step=8", "policy.train_global_batch_size=128",
            "grpo.max_num_steps=50", "grpo.max_num_epochs=1", "policy.optimizer.lr=2e-5",
            "policy.scheduler.warmup_steps=5", "policy.dtensor_cfg.compile_layers=false",
            "policy.max_total_sequence_length=1024", "policy.generation.max_new_tokens=16",
            "policy.generation.engines_per_gpu=2", "policy.generation.vllm_cfg.enforce_eager=true", *overrides,
        ]  # fmt: skip
        with (args.output / "console.txt").open("w") as console:
            code = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, cwd=folder).returncode
    print((args.output / "console.txt").read_text()[-3000:])
    sys.exit(code)


if __name__ == "__main__":
    main()
