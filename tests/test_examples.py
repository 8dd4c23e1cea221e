"""The worked forks under examples/ that no other test runs: guess.py is in test_gym.py, measurement.py in
test_reward_client.py, rejection_sampling.py in test_learning.py."""

import subprocess
import sys

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from rows import Rows


def test_a_task_of_reasoning_gym(tiny_model, tmp_path):
    """Its rows are read, and its verifier pays for their answers and for nothing else."""
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym==0.1.25")
    script = ROOT / "examples" / "reasoning_gym_task.py"
    options = ["chain_sum", "--size", "8", "--set", "max_terms=3", "max_digits=1"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True, timeout=600)
    (tmp_path / "rows.jsonl").write_text(done.stdout)
    rows = Rows(str(tmp_path / "rows.jsonl"), AutoTokenizer.from_pretrained(tiny_model), 256).rows
    assert len(rows) == 8
    sys.path.insert(0, str(script.parent))
    from reasoning_gym_task import score

    for row in rows:
        assert eval_sum(row["entry"]["metadata"]["expression"]) == int(row["expected_answer"])
        assert score(f"so \\boxed{{{row['expected_answer']}}}", row) == 1
        assert score(f"so {row['expected_answer']}", row) == score("\\boxed{x}", row) == 0


def eval_sum(text: str) -> int:
    """The value of a sum of integers such as "4 - 1"."""
    return sum(int(term) for term in text.replace(" ", "").replace("-", " -").replace("+", " ").split())
