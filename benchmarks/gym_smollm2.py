"""SmolLM2-135M-Instruct learns NeMo Gym's blackjack, an environment of several turns, on one GPU.

    GYM_PYTHON=.venv-gym/bin/python python benchmarks/gym_smollm2.py MODEL_FOLDER OUTPUT_FOLDER [overrides...]

A model this small does not say Gym's tags unless it was shown some, so four hands stand before Gym's own first message.
What they show is drawn at random: they teach the form of an answer, not when to hit. Hitting at random earns about
-0.5 a game, and a hand that is never added to -0.17.
OUTPUT_FOLDER gets environment.json, console.txt, metrics.jsonl, games of each step (rollouts.jsonl) and Gym's log.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from benchmarks.gym_episodes import example_rows, gym_servers  # noqa: E402

VALUES = {**{str(n): n for n in range(2, 11)}, "J": 10, "Q": 10, "K": 10}  # without the ace, which counts 1 or 11


def shown_hand(rng: random.Random, action: str) -> list[dict[str, str]]:
    """A turn in the environment's words and its answer."""
    first, second, dealer = rng.choices(list(VALUES), k=3)
    seen = (
        f"Your hand: [{first}, {second}] = {VALUES[first] + VALUES[second]}\nDealer shows: {dealer}\n"
        "Respond with <action>hit</action> or <action>stand</action>."
    )
    return [{"role": "user", "content": seen}, {"role": "assistant", "content": f"<action>{action}</action>"}]


def rows(count: int = 64) -> list[dict]:
    """Gym's example row with other hands shown in each."""
    rng, made = random.Random(0), []
    for _ in range(count):
        row = example_rows("blackjack")[0]
        system, deal = row["responses_create_params"]["input"]
        actions = rng.sample(["hit", "hit", "stand", "stand"], k=4)
        shown = [message for action in actions for message in shown_hand(rng, action)]
        row["responses_create_params"]["input"] = [system, *shown, deal]
        made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    args, overrides = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder, gym_servers(args.output / "gym.txt") as (urls, address):
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        command = [
            sys.executable, str(ROOT / "train_grpo.py"), "--config", str(ROOT / "recipes" / "smollm2-arithmetic.yaml"),
            f"policy.model_name={args.model.resolve()}", f"data.train_jsonl_fpath={folder}/rows.jsonl",
            "data.validation_jsonl_fpath=null", "checkpointing.enabled=false", f"logger.log_dir={folder}/logs",
            f"env.gym_url={urls['blackjack_agent']}", f"env.gym_model_address={address}",
            "grpo.num_prompts_per_step=8", "policy.train_global_batch_size=128", "grpo.max_num_steps=50",
            "grpo.max_num_epochs=50", "policy.max_total_sequence_length=1024", "policy.generation.max_new_tokens=12",
            "policy.scheduler.warmup_steps=0", "policy.dtensor_cfg.compile_layers=false",
            "policy.generation.engines_per_gpu=2", "policy.generation.vllm_cfg.enforce_eager=true", *overrides,
        ]  # fmt: skip
        with (args.output / "console.txt").open("w") as console:
            code = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, cwd=folder).returncode
        for kept in Path(folder, "logs").glob("*.jsonl"):
            shutil.copy(kept, args.output)
    print((args.output / "console.txt").read_text()[-3000:])
    sys.exit(code)


if __name__ == "__main__":
    main()
