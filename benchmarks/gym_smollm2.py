"""SmolLM2-135M-Instruct learns an environment of several turns of NeMo Gym, on one GPU.

    GYM_PYTHON=.venv-gym/bin/python python benchmarks/gym_smollm2.py ENVIRONMENT MODEL_FOLDER OUTPUT_FOLDER [KEY=VALUE]

ENVIRONMENT: turns (example_multi_turn_gymnasium with sums of ours: a sum, then a number to add to it) or blackjack.
A model this small needs to be shown the form of an answer, so some shown turns stand before the first one. In blackjack
their actions are drawn at random: hitting at random earns about -0.35 a game, never hitting -0.18, below 17 -0.08.
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
from benchmarks.gym_episodes import example_rows, gym_servers  # noqa: E402

ROWS = 800  # 50 steps of 16
VALUES = {**{str(n): n for n in range(2, 11)}, "J": 10, "Q": 10, "K": 10}  # without the ace, which counts 1 or 11


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


def shown_hand(rng: random.Random, action: str) -> list[dict[str, str]]:
    """A turn in the environment's words and its answer."""
    first, second, dealer = rng.choices(list(VALUES), k=3)
    seen = (
        f"Your hand: [{first}, {second}] = {VALUES[first] + VALUES[second]}\nDealer shows: {dealer}\n"
        "Respond with <action>hit</action> or <action>stand</action>."
    )
    return answered(seen, f"<action>{action}</action>")


def blackjack_row(rng: random.Random) -> dict:
    """Gym's example row after four shown hands."""
    row = example_rows("blackjack")[0]
    system, deal = row["responses_create_params"]["input"]
    actions = rng.sample(["hit", "hit", "stand", "stand"], k=4)
    shown = [message for action in actions for message in shown_hand(rng, action)]
    row["responses_create_params"]["input"] = [system, *shown, deal]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("environment", choices=("turns", "blackjack"))
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    args, overrides = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder, gym_servers(args.output / "gym.txt") as (urls, address):
        rng, row = random.Random(0), {"turns": turns_row, "blackjack": blackjack_row}[args.environment]
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row(rng)) + "\n" for _ in range(ROWS)))
        command = [
            sys.executable, str(ROOT / "train_grpo.py"), "--config", str(ROOT / "recipes" / "smollm2-arithmetic.yaml"),
            f"policy.model_name={args.model.resolve()}", f"logger.log_dir={args.output.resolve()}",
            f"data.train_jsonl_fpath={folder}/rows.jsonl", "data.validation_jsonl_fpath=null",
            f"env.gym_url={urls[args.environment + '_agent']}", f"env.gym_model_address={address}",
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
