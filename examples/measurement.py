"""A reward that reads other fields of the row: a measured value, right within the row's tolerance and in its unit.

    python train_grpo.py env.verifier=examples/measurement.py:measurement data.train_jsonl_fpath=data/measured.jsonl

A row needs, beside its prompt, `expected_answer` (a number as text), `unit`, and if it likes `tolerance`:

    {"responses_create_params": {"input": "How long is a day?"}, "expected_answer": "86400", "unit": "s"}
"""

import re

from reward_server import Verdict

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def measurement(text: str, row: dict) -> Verdict:
    """1 for the last number of the answer if it and the unit behind it are right, 0.5 if only the number is."""
    found = list(NUMBER.finditer(text))
    if not found:
        return Verdict(0.0, "no_answer", None)
    said, gold = float(found[-1].group()), float(row["expected_answer"])
    if abs(said - gold) > row.get("tolerance", 0.01) * abs(gold):
        return Verdict(0.0, "wrong", found[-1].group())
    unit = text[found[-1].end() :].split()
    right = bool(unit) and unit[0].rstrip(".,") == row["unit"]
    return Verdict(1.0 if right else 0.5, "correct", found[-1].group())
