"""Arithmetic problems, made here: offline and seeded. `python prepare_data.py arithmetic --help` lists the options.

The quickstart's tiny model and SmolLM2-135M learn from them, where nothing can be downloaded.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from config import ConfigError
from rows import AGENT_REF

# kind -> (the operands it uses, question, working, value)
KINDS: dict[str, tuple[str, str, str, Callable[[int, int, int], int]]] = {
    "add": ("ab", "{a} + {b}", "{a} + {b} = {value}", lambda a, b, c: a + b),
    "sub": ("ab", "{a} - {b}", "{a} - {b} = {value}", lambda a, b, c: a - b),
    "mul": ("ac", "{a} * {c}", "{a} * {c} = {value}", lambda a, b, c: a * c),
    # The working begins with the question, as those above do.
    "add_mul": ("abc", "{a} + {b} * {c}", "{a} + {b} * {c} = {a} + {product} = {value}", lambda a, b, c: a + b * c),
}
ANSWER_STYLES = {"boxed": "\\boxed{{{value}}}", "worked": "{working}. The answer is \\boxed{{{value}}}."}


@dataclass(frozen=True)
class Arithmetic:
    """What problems to make; `c`, the second factor of mul and add_mul, is 2 to max_factor."""

    kinds: tuple[str, ...] = ("add",)
    min_operand: int = 1
    max_operand: int = 20
    max_factor: int = 9
    num_train: int = 8192
    num_validation: int = 128
    solved_examples: int = 0
    answer_style: str = "boxed"
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ConfigError for values that make no problems."""
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ConfigError(f"unknown kind {min(unknown)!r}, known are {', '.join(KINDS)}")
        if not 0 <= self.min_operand <= self.max_operand:
            raise ConfigError(f"--min-operand {self.min_operand} is not between 0 and --max-operand {self.max_operand}")
        lowest = {"max_factor": 2, "num_train": 1, "num_validation": 1, "solved_examples": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is below {low}")

    def draw(self, kind: str, rng: random.Random, *avoid: set) -> dict[str, Any]:
        """A random problem in none of the sets; where there seems to be none, the last sets are given up first.

        Its `key` does not tell 3 + 4 from 4 + 3.
        """
        uses, question, working, value = KINDS[kind]
        for attempt in range(50 * (len(avoid) + 1)):
            a, b = (rng.randint(self.min_operand, self.max_operand) for _ in "ab")
            if kind == "sub":  # no negative results: one thing less to learn for a tiny model
                a, b = max(a, b), min(a, b)
            numbers = {"a": a, "b": b, "c": rng.randint(2, self.max_factor)}
            key = (kind, *sorted(numbers[name] for name in uses))
            if not any(key in keys for keys in avoid[: len(avoid) - attempt // 50]):
                break
        names = {**numbers, "product": b * numbers["c"], "value": value(**numbers)}
        solution = ANSWER_STYLES[self.answer_style].format(working=working.format(**names), **names)
        question = f"What is {question.format(**names)}?"
        return {"key": key, "kind": kind, "question": question, "answer": str(names["value"]), "solution": solution}

    def most_validation(self, kind: str) -> int:
        """An eighth of the ordered problems (about a quarter of the unordered): the rest is for training."""
        operands, uses = self.max_operand - self.min_operand + 1, KINDS[kind][0]
        return operands ** len(uses.replace("c", "")) * (self.max_factor - 1) ** uses.count("c") // 8


def make_rows(cfg: Arithmetic, template: str = "{question}") -> dict[str, Iterator[dict[str, Any]]]:
    """Rows of both splits, made as they are read; `solution` is a correct assistant turn for the row.

    Validation problems are different from each other and occur in no training row, neither as its problem nor as a
    solved example. Training problems repeat once nearly all have been drawn. The first rows are the same
    whatever the number of rows. Raises ConfigError where the problems are too few for the solved examples.
    """
    held_out: dict[tuple, tuple[dict[str, Any], random.Random]] = {}
    for i in range(cfg.num_validation):
        kind, rng = cfg.kinds[i % len(cfg.kinds)], random.Random(f"{cfg.seed}/validation/{i}")
        if i // len(cfg.kinds) < cfg.most_validation(kind):
            problem = cfg.draw(kind, rng, held_out.keys())
            held_out[problem["key"]] = (problem, rng)

    def ask(question: str) -> dict[str, str]:
        return {"role": "user", "content": template.replace("{question}", question)}

    def row(problem: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        shown, messages = {problem["key"]}, []
        for _ in range(cfg.solved_examples):  # of the problem's own kind, so that they show how it is worked out
            example = cfg.draw(problem["kind"], rng, shown, held_out.keys())
            if example["key"] in shown:
                raise ConfigError(f"too few problems for {cfg.solved_examples} --solved-examples; raise --max-operand")
            shown.add(example["key"])
            messages += [ask(example["question"]), {"role": "assistant", "content": example["solution"]}]
        return {
            "responses_create_params": {"input": [*messages, ask(problem["question"])]},
            "question": problem["question"],
            "expected_answer": problem["answer"],
            "agent_ref": AGENT_REF,
            "kind": problem["kind"],
            "solution": problem["solution"],
        }

    def train() -> Iterator[dict[str, Any]]:
        seen: dict[str, set] = {kind: set() for kind in cfg.kinds}
        for i in range(cfg.num_train):
            kind, rng = cfg.kinds[i % len(cfg.kinds)], random.Random(f"{cfg.seed}/train/{i}")
            problem = cfg.draw(kind, rng, held_out.keys(), seen[kind])
            if problem["key"] in seen[kind]:  # nothing new is left: begin again
                seen[kind].clear()
            seen[kind].add(problem["key"])
            yield row(problem, rng)

    return {"train": train(), "validation": (row(problem, rng) for problem, rng in held_out.values())}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare_data.py arithmetic`, --seed excepted."""
    add, default = parser.add_argument, Arithmetic()
    add("--kinds", default="add", help=f"comma list of {', '.join(KINDS)} (a + b * c); default add")
    add("--min-operand", type=int, default=default.min_operand, help="default %(default)s")
    add("--max-operand", type=int, default=default.max_operand, help="default %(default)s")
    add("--max-factor", type=int, default=default.max_factor, help="second factors are 2 to this; default %(default)s")
    add("--num-train", type=int, default=default.num_train, help="default %(default)s")
    add("--num-validation", type=int, default=default.num_validation, help="at most a quarter of the problems")
    add("--solved-examples", type=int, default=0, help="number of them, as earlier turns of the chat")
    style = "solutions: the box alone (default), or the working and the box"
    add("--answer-style", choices=ANSWER_STYLES, default=default.answer_style, help=style)


def from_options(args: argparse.Namespace) -> Arithmetic:
    """The problems that the options ask for. Raises ConfigError for values that make none."""
    options = {field.name: getattr(args, field.name) for field in fields(Arithmetic)}
    return Arithmetic(**{**options, "kinds": tuple(args.kinds.split(","))})
