"""Another data set and task: a procedural task of reasoning-gym, which brings a verifier along.

    pip install reasoning-gym==0.1.25
    python examples/reasoning_gym_task.py chain_sum --size 5000 > data/chain_sum.jsonl
    python train_grpo.py env.verifier=examples/reasoning_gym_task.py:score \
        data.train_jsonl_fpath=data/chain_sum.jsonl data.validation_jsonl_fpath=null

A row holds the task's whole entry, since its verifier asks for it. A task's own parameters: --set min_terms=3.
"""

import argparse
import json

import reasoning_gym

ASK = "\nPut your final answer within \\boxed{}."


def score(text: str, row: dict) -> float:
    """From 0 to 1, as the task's own verifier says of what is in the last box."""
    _, box, rest = text.rpartition("\\boxed{")
    answer = rest.rpartition("}")[0] if box else ""
    return reasoning_gym.get_score_answer_fn(row["entry"]["metadata"]["source_dataset"])(answer, row["entry"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--size", type=int, default=5000)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER")
    args = parser.parse_args()
    parameters = {name: int(value) for name, value in (given.split("=") for given in args.set)}
    for entry in reasoning_gym.create_dataset(args.task, size=args.size, **parameters):
        row = {"responses_create_params": {"input": entry["question"] + ASK}, "expected_answer": str(entry["answer"])}
        print(json.dumps(row | {"entry": entry}))


if __name__ == "__main__":
    main()
