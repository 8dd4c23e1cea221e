"""evaluate.py: its numbers against enumeration and by hand. test_run.py runs it on what training has saved."""

import itertools
import json
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import ConfigError
from evaluate import (
    check_settings,
    configure,
    evaluate,
    finished_rows,
    interval,
    majority_is_right,
    parse_args,
    pass_at_k,
    row_lines,
    summarize,
    write_rows,
)
from launch import RunError


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_by_hand():
    assert pass_at_k(16, 4, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(16, 0, 16) == 0.0
    assert pass_at_k(16, 1, 16) == pass_at_k(5, 3, 3) == 1.0
    exact = 1 - Fraction(comb(9_990, 100), comb(10_000, 100))  # floats of these numbers would overflow
    assert pass_at_k(10_000, 10, 100) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_of_nothing(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        (["1", "2", "2"], [1.0, 0.0, 0.0], 0.0),
        (["1", "2", "2"], [0.0, 1.0, 1.0], 1.0),
        (["1", "2", "2", "1"], [1.0, 0.0, 0.0, 1.0], 1.0),  # a tie: the one seen first
        (["2", "1", "2", "1"], [0.0, 1.0, 0.0, 1.0], 0.0),
        ([None, None, None, "7"], [0.0, 0.0, 0.0, 1.0], 1.0),  # no answer is no vote
        ([None, None], [0.0, 0.0], 0.0),
    ],
)
def test_majority(answers, rewards, expected):
    assert majority_is_right(answers, rewards) == expected


def test_interval():
    """Means of resampled values are binomial here, so their quantiles are known."""
    assert interval([0.3] * 5) == pytest.approx((0.3, 0.3, 0.3))
    assert interval([0.0, 1.0]) == (0.5, 0.0, 1.0)  # each end has probability 1/4
    assert interval([0.0] * 6 + [1.0]) == pytest.approx((1 / 7, 0.0, 3 / 7))  # P(0) = 0.34, P(> 3/7) = 0.006
    mean, low, high = interval([0.0, 1.0] * 200)
    assert mean == 0.5
    assert low == pytest.approx(0.45, abs=0.006)  # 1.96 x 0.5 / 20 = 0.049
    assert high == pytest.approx(0.55, abs=0.006)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_interval_holds_the_mean_and_stays_within_the_values(values):
    mean, low, high = interval(values)
    assert min(values) - 1e-12 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= max(values) + 1e-12


def answer(status: str, extracted: str | None = "1", truncated: bool = False, row: int = 0) -> dict:
    reward = float(status == "correct")
    return {"row": row, "text": "", "truncated": truncated, "reward": reward, "status": status,
            "extracted_answer": extracted}  # fmt: skip


def test_summary_by_hand():
    """Unverified answers are neither right nor wrong; a row without any other does not count."""
    right, wrong, late = answer("correct"), answer("wrong", "2", truncated=True), answer("timeout", None)
    metrics = summarize([[right, wrong, wrong, right], [late, wrong, wrong, right], [late] * 4], 4)
    assert (metrics["rows"], metrics["answers"], metrics["num_unverified"]) == (3, 12, 5)
    assert metrics["truncation_rate"] == pytest.approx(4 / 12)
    assert [metrics["avg@4"], metrics["pass@1"]] == pytest.approx([(1 / 2 + 1 / 3) / 2] * 2)
    assert metrics["pass@2"] == pytest.approx((5 / 6 + 2 / 3) / 2)
    assert metrics["pass@4"] == 1.0
    assert metrics["maj@4"] == 0.5
    assert {name for name in metrics if name.startswith("maj")} == {"maj@4", "maj@4_low", "maj@4_high"}
    with pytest.raises(RunError, match="none of the answers could be verified; see reward_server.log"):
        summarize([[late]], 1)


def test_rows_that_count_as_finished(tmp_path):
    """Those with all answers, in order; nothing of a torn line."""
    path = tmp_path / "samples.jsonl"
    assert finished_rows(path, 2) == {}
    lines = [answer("wrong", row=5)] * 2 + [answer("wrong", row=1)] + [answer("correct", row=3)] * 2
    path.write_text(row_lines(lines) + row_lines([answer("correct", row=1)])[:-9])
    good = {3: [answer("correct", row=3)] * 2, 5: [answer("wrong", row=5)] * 2}
    found = finished_rows(path, 2)
    assert list(found.items()) == list(good.items())
    write_rows(path, found)
    assert path.read_text() == row_lines(good[3] + good[5])


def test_other_settings_are_refused(tmp_path):
    def check(*more: str) -> None:
        check_settings(parse_args(["--model", "m", "--data", "d", "--output", str(tmp_path / "out"), *more]))

    check("--k", "4")
    check("--k", "8")  # nothing was made yet
    (tmp_path / "out" / "samples.jsonl").write_text("{}\n")
    check("--k", "8", "--limit", "3", "--engines", "2")
    with pytest.raises(ConfigError, match=r"other settings, see .*/settings.json; choose another --output, or"):
        check("--k", "16")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["k"] == 8
    (tmp_path / "out" / "samples.jsonl").unlink()
    check("--k", "16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k", "0"], "--k must be above 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens must be above 0"),
        (["--temperature", "0"], "or 0 with --k 1"),
    ],
)
def test_bad_options(options, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--model", "m", "--data", "d", *options])
    assert words in capsys.readouterr().err


def test_defaults_and_what_the_model_says(tiny_model):
    args = parse_args(["--model", str(tiny_model), "--data", "data/aime24/validation.jsonl"])
    assert args.k == 16
    assert args.output == Path("results/evaluation", f"{tiny_model.parent.name}_{tiny_model.name}", "aime24_validation")
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    with pytest.raises(ConfigError, match=f"its tokenizer knows {vocabulary + 1} tokens, it {vocabulary}$"):
        configure(args, vocabulary + 1)
    policy = configure(args, vocabulary).policy
    assert policy.precision == "float32"
    longest = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    assert policy.max_total_sequence_length == min(10240, longest)


def test_missing_files_are_one_line(tiny_model, arithmetic_rows, tmp_path):
    rows = str(arithmetic_rows / "train.jsonl")
    with pytest.raises(ConfigError, match=r"^cannot load --model='.*/nowhere': [^\n]*$"):
        evaluate(parse_args(["--model", str(tmp_path / "nowhere"), "--data", rows]))
    with pytest.raises(ConfigError, match=r"^cannot read rows from 'nowhere' [^\n]*make them with prepare_data.py$"):
        evaluate(parse_args(["--model", str(tiny_model), "--data", "nowhere", "--output", str(tmp_path)]))
