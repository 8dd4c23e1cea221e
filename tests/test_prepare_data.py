"""Tests of prepare_data.py: its main function as users call it; Ray and the network are not needed."""

import datetime
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, FIXTURES, SHARED = ROOT / "prepare_data.py", ROOT / "tests" / "data", ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
import prepare_data  # noqa: E402
from config import ConfigError  # noqa: E402
from prepare_data import DAPO_TEMPLATE, MATH_TEMPLATE  # noqa: E402
from recipes import arithmetic  # noqa: E402
from rows import Rows, load_tokenizer  # noqa: E402

AGENT = {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}


def run(*args):
    """What the command line does, in this process: exit code, output and error output."""
    handler = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as error:
        try:
            code = prepare_data.main([str(arg) for arg in args])
        except SystemExit as end:  # after --help
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    return code, printed.getvalue(), error.getvalue()


def convert(tmp_path, *args):
    """Run successfully; the folder."""
    out = tmp_path / "out"
    code, _, error = run(*args, "--output", out)
    assert (code, error) == (0, "")
    return out


def read(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(tmp_path, *args):
    """Run with bad input: exit code 2, one line, nothing left; the line."""
    out = tmp_path / "refused"
    code, printed, error = run(*args, "--output", out)
    assert (code, printed) == (2, "")
    assert error.startswith("prepare_data.py: error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    assert not out.exists()
    return error


def boxed(question):
    return [{"role": "user", "content": MATH_TEMPLATE.replace("{question}", question)}]


# --- Known column layouts ---------------------------------------------------------------------------------------------

# file -> its answers, the column with the bare question, the other columns that stay
LAYOUTS = {
    "rows_gsm8k.jsonl": (["72", "10", "5", "2125"], "question", set()),
    "rows_math500.jsonl": (
        ["\\left( 3, \\frac{\\pi}{2} \\right)", "p - q", "\\frac{14}{3}"],
        "problem",
        {"solution", "subject", "level", "unique_id"},
    ),
    "rows_aime25.jsonl": (["70", "588"], "problem", {"id", "reference_solution"}),
    "rows_deepmath.jsonl": (
        ["1", "x", "k \\neq 1"],
        "prompt",
        {"id", "source", "difficulty", "case_type", "test_case_function", "test_cases", "tag"},
    ),
}


def worked_solution(answer):
    """The solution of a row of GSM8K."""
    working, _, number = re.sub("<<.*?>>", "", answer).rpartition("\n#### ")
    return f"{working}\n\\boxed{{{number.replace(',', '')}}}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_question_columns_get_the_template(tmp_path, name):
    answers, column, extra = LAYOUTS[name]
    source, rows = read(FIXTURES / name), read(convert(tmp_path, FIXTURES / name) / "train.jsonl")
    assert [row["expected_answer"] for row in rows] == answers
    for old, row in zip(source, rows, strict=True):
        fixed = {
            "responses_create_params": {"input": boxed(old[column])},
            "question": old[column],
            "expected_answer": row["expected_answer"],
            "agent_ref": AGENT,
        }
        solution = {"solution": worked_solution(old["answer"])} if name == "rows_gsm8k.jsonl" else {}
        assert row == fixed | {key: old[key] for key in extra} | solution


def test_dapo_rows_keep_their_prompt_and_give_the_bare_problem(tmp_path):
    source = pyarrow.parquet.read_table(FIXTURES / "rows_dapo.parquet").to_pylist()
    rows = read(convert(tmp_path, FIXTURES / "rows_dapo.parquet") / "train.jsonl")
    assert [row["expected_answer"] for row in rows] == ["540", "204", "540", "721"]
    for old, row in zip(source, rows, strict=True):
        assert row["responses_create_params"] == {"input": old["prompt"]}
        assert row["question"] == old["extra_info"]["raw_problem"]  # what the data set itself calls the problem
        assert {
            key: row[key] for key in row if key not in ("responses_create_params", "question", "expected_answer")
        } == {
            "agent_ref": AGENT,
            "data_source": "math_dapo",
            "ability": "MATH",
            "extra_info": old["extra_info"],
        }


def test_nemo_gym_rows_pass_through_and_lose_old_scores(tmp_path):
    source = read(FIXTURES / "rows_nemo_gym.jsonl")
    assert read(convert(tmp_path, FIXTURES / "rows_nemo_gym.jsonl") / "train.jsonl") == [
        row | {"agent_ref": AGENT} for row in source
    ]
    rollout = read(FIXTURES / "rows_nemo_gym_rollout.jsonl")[0]
    (row,) = read(convert(tmp_path / "rollout", FIXTURES / "rows_nemo_gym_rollout.jsonl") / "train.jsonl")
    content = rollout["responses_create_params"]["input"][0]["content"]
    params = rollout["responses_create_params"] | {"input": [{"role": "user", "content": content}]}
    del params["instructions"]  # which are null
    assert row == {
        "responses_create_params": params,
        "question": content.split("\n\n", 1)[1],
        "expected_answer": "\\(\\frac{333}{1997}\\)",
        "agent_ref": AGENT,
    }


def gym(**params):
    """A row as NeMo Gym writes it."""
    params = {"input": "2+2?"} | params
    return {"responses_create_params": params, "expected_answer": "4", "task_source": "math_with_judge_simple_agent"}


def test_rows_of_nemo_gym_0_7(tmp_path):
    parts = [{"type": "input_text", "text": "2+"}, {"type": "input_text", "text": "2?"}]
    rows = [
        gym(instructions="Be brief.", tools=[], temperature=None),
        gym(input=[{"role": "user", "content": parts, "type": "message"}]),
        {"task_id": {"taskset": "a", "task_id": "1"}, "task_input": gym() | {"expected_answer": 4}},
    ]
    source = write(tmp_path / "gym.jsonl", rows)
    made = read(convert(tmp_path, source) / "train.jsonl")
    user = {"role": "user", "content": "2+2?"}
    chats = [[{"role": "system", "content": "Be brief."}, user], [user], [user]]
    assert [row["responses_create_params"]["input"] for row in made] == chats
    for row in made:
        assert (row["question"], row["expected_answer"]) == ("2+2?", "4")
        assert (row["task_source"], row["agent_ref"]) == ("math_with_judge_simple_agent", AGENT)
    tokenizer = SimpleNamespace(apply_chat_template=lambda chat, **_: [len(m["content"]) for m in chat])
    for path in (source, tmp_path / "out/train.jsonl"):  # the trainer reads them alike
        trained = Rows(str(path), tokenizer, 9)
        assert trained.prompt_ids == [[9, 4], [4], [4]]
        assert [row["expected_answer"] for row in trained.rows] == ["4"] * 3


CALL = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
UNSUPPORTED = {
    "tools": gym(tools=[{"type": "function", "name": "f"}]),
    "temperature": gym(temperature=0),
    "top_p": gym(top_p=0.9),
    "max_output_tokens": gym(max_output_tokens=100),
    "input[1]": gym(input=[{"role": "user", "content": "a"}, CALL]),
    "input[0]": gym(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
    "agent_ref": gym() | {"agent_ref": {"type": "responses_api_agents", "name": "mcqa_simple_agent"}},
    "task_source": gym() | {"task_source": "mcqa_simple_agent"},
    "expected_answer": gym() | {"expected_answer": {"a": 1}},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_the_trainer_cannot_do_is_an_error_in_both_readers(tmp_path, field):
    source = write(tmp_path / "gym.jsonl", [gym(), UNSUPPORTED[field]])
    error = refused(tmp_path, source)
    assert f"{source}:2: " in error
    assert field in error
    tokenizer = SimpleNamespace(apply_chat_template=lambda chat, **_: [1])
    with pytest.raises(ConfigError, match=f"^{source} line 2 is not a row: .*{re.escape(field)}"):
        Rows(str(source), tokenizer, 9)


def test_own_output_is_left_as_it_is(tmp_path):
    first = convert(tmp_path, FIXTURES / "rows_gsm8k.jsonl") / "train.jsonl"
    assert (convert(tmp_path / "again", first) / "train.jsonl").read_bytes() == first.read_bytes()
    agent = {"type": "responses_api_agents", "name": "my_math_with_judge"}
    own = write(tmp_path / "own.jsonl", [{"question": "1+1?", "expected_answer": 2, "agent_ref": agent}])
    assert read(convert(tmp_path / "own", own) / "train.jsonl")[0]["agent_ref"] == agent


def test_columns_nobody_asked_for_cost_no_rows(tmp_path):
    rows = [{"question": "a", "answer": "1", "score": float("inf"), "parts": [float("nan"), 2]}]
    (row,) = read(convert(tmp_path, write(tmp_path / "a.jsonl", rows)) / "train.jsonl")
    assert (row["score"], row["parts"]) == (None, [None, 2])
    columns = {
        "problem": ["a", "b"],
        "answer": [Decimal("4.00"), Decimal("0.50")],
        "loss": [float("inf"), 1.5],
        "day": [datetime.date(2026, 1, 2)] * 2,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    made = read(convert(tmp_path / "parquet", tmp_path / "a.parquet") / "train.jsonl")
    assert [row["expected_answer"] for row in made] == ["4", "0.50"]
    assert [(row["loss"], row["day"]) for row in made] == [(None, "2026-01-02"), (1.5, "2026-01-02")]


def test_answers_of_every_good_kind(tmp_path):
    rows = [
        {"question": "int", "answer": 3},
        {"question": "float", "answer": 4.0},
        {"question": "half", "answer": 0.5},
        {"question": "text", "answer": " x+1 "},
        {"question": "hash", "answer": "so\n#### 1,234"},
        {"problem": "boxed", "solution": "\\boxed{1} or rather \\boxed{\\frac{1}{2}}."},
        {"question": "été 数", "expected_answer": "½", "answer": "not this"},
        {"prompt": "own", "ground_truth": "5", "question": "other", "expected_answer": "6"},
        {"question": "line\u2028break\x85s\u2029", "answer": "1"},
    ]
    made = read(convert(tmp_path, write(tmp_path / "a.jsonl", rows)) / "train.jsonl")
    assert [row["expected_answer"] for row in made] == ["3", "4", "0.5", "x+1", "1234", "\\frac{1}{2}", "½", "5", "1"]
    assert [row["question"] for row in made[6:]] == ["été 数", "own", rows[8]["question"]]


SHARED_ROWS = {
    "gsm8k/train.jsonl": 7473,
    "gsm8k/test.jsonl": 1319,
    "math/math500.jsonl": 500,
    "math/train_answers_only.jsonl": 7498,  # of 7,500: lines 7,037 and 7,437 have an empty answer
    "aime/aime24.jsonl": 30,
    "aime/aime25.jsonl": 30,
    "aime/aime-2024-dapo-format.parquet": 960,
    "deepmath/train.jsonl": 4994,
    "nemo_gym_rows/math_with_judge_example.jsonl": 5,
    "nemo_gym_rows/math_with_judge_example_rollouts.jsonl": 5,
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: the full data sets are not in the repository")
@pytest.mark.parametrize("name", SHARED_ROWS)
def test_every_shared_data_set(tmp_path, name):
    out = convert(tmp_path, SHARED / name, "--skip-bad")
    rows, metrics = read(out / "train.jsonl"), json.loads((out / "train_metrics.json").read_text())
    assert len(rows) == metrics["rows"] == SHARED_ROWS[name]
    assert metrics["bad_skipped"] == (2 if name == "math/train_answers_only.jsonl" else 0)
    for row in rows:
        assert row["agent_ref"] == AGENT
        assert row["question"].strip()
        assert row["expected_answer"].strip()
        assert row["question"] in row["responses_create_params"]["input"][-1]["content"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: the full data sets are not in the repository")
def test_a_file_without_problems_is_refused(tmp_path):
    assert "variants.jsonl:1: its columns (source, type, gold," in refused(tmp_path, SHARED / "verifier/variants.jsonl")


# --- Arithmetic -------------------------------------------------------------------------------------------------------

STYLE_A = ("arithmetic", "--kinds", "add", "--max-operand", "20")
STYLE_B = (
    *("arithmetic", "--kinds", "add,mul,add_mul", "--min-operand", "10", "--max-operand", "99"),
    *("--solved-examples", "3", "--answer-style", "worked"),
)
PROBLEM = re.compile(r"What is (\d+) ([+*-]) (\d+)(?: \* (\d+))?\?")


def solve(question):
    """Kind, numbers and value of a question, worked out without the script's code."""
    a, sign, b, c = PROBLEM.fullmatch(question).groups()
    a, b, c = int(a), int(b), int(c or 0)
    if c:
        return "add_mul", (a, b, c), a + b * c
    return {"+": ("add", (a, b), a + b), "-": ("sub", (a, b), a - b), "*": ("mul", (a, b), a * b)}[sign]


def worked(question):
    kind, (a, b, *c), value = solve(question)
    working = f"{a} + {b} * {c[0]} = {a} + {b * c[0]} = {value}" if c else f"{question[8:-1]} = {value}"
    return f"{working}. The answer is \\boxed{{{value}}}."


def unordered(question):
    kind, numbers, _ = solve(question)
    return kind, tuple(sorted(numbers))


def test_quickstart_rows(tmp_path):
    out = convert(tmp_path, *STYLE_A, "--num-train", 500, "--num-validation", 1000)
    train, validation = read(out / "train.jsonl"), read(out / "validation.jsonl")
    assert len(train) == 500
    assert len(validation) == 50  # an eighth of 20 x 20
    for row in train + validation:
        kind, numbers, value = solve(row["question"])
        assert kind == "add"
        assert all(1 <= n <= 20 for n in numbers)
        assert row == {
            "responses_create_params": {"input": [{"role": "user", "content": row["question"]}]},
            "question": row["question"],
            "expected_answer": str(value),
            "agent_ref": AGENT,
            "kind": "add",
            "solution": f"\\boxed{{{value}}}",
        }
    held_out = {unordered(row["question"]) for row in validation}
    assert len(held_out) == 50
    assert not held_out & {unordered(row["question"]) for row in train}
    assert len({unordered(row["question"]) for row in train}) >= 155  # of the 160 that are left


def test_gpu_recipe_rows(tmp_path):
    out = convert(tmp_path, *STYLE_B, "--num-train", 900, "--num-validation", 96)
    train, validation = read(out / "train.jsonl"), read(out / "validation.jsonl")
    assert Counter(row["kind"] for row in train) == {"add": 300, "mul": 300, "add_mul": 300}
    assert len(validation) == 96
    held_out = {unordered(row["question"]) for row in validation}
    for row in train + validation:
        chat = row["responses_create_params"]["input"]
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * 3 + ["user"]
        questions = [turn["content"] for turn in chat[::2]]
        assert questions[-1] == row["question"]
        assert len({unordered(q) for q in questions}) == 4
        assert {solve(q)[0] for q in questions} == {row["kind"]}
        assert [turn["content"] for turn in chat[1::2]] + [row["solution"]] == [worked(q) for q in questions]
        assert row["expected_answer"] == str(solve(row["question"])[2])
        for q in questions:
            numbers = solve(q)[1]
            assert all(2 <= n <= 9 if solve(q)[0] != "add" and n == numbers[-1] else 10 <= n <= 99 for n in numbers)
        seen = {unordered(q) for q in (questions[:-1] if row in validation else questions)}
        assert not seen & held_out


def test_known_rows_of_seed_42(tmp_path):
    rows = read(convert(tmp_path, *STYLE_A, "--num-train", 3) / "train.jsonl")
    known = [("What is 12 + 8?", "\\boxed{20}"), ("What is 10 + 6?", "\\boxed{16}"), ("What is 5 + 19?", "\\boxed{24}")]
    assert [(row["question"], row["solution"]) for row in rows] == known
    longer = read(convert(tmp_path / "longer", *STYLE_A, "--num-train", 30) / "train.jsonl")
    assert longer[:3] == rows


def test_other_kinds_and_styles(tmp_path):
    rows = read(
        convert(tmp_path, "arithmetic", "--kinds", "sub", "--answer-style", "worked", "--num-train", 50) / "train.jsonl"
    )
    assert {row["solution"] == worked(row["question"]) and solve(row["question"])[2] >= 0 for row in rows} == {True}


def test_arithmetic_is_seeded(tmp_path):
    some = (*STYLE_B, "--num-train", 300)
    one, two = convert(tmp_path / "1", *some), convert(tmp_path / "2", *some)
    other = convert(tmp_path / "3", *some, "--seed", 7)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes() != (other / name).read_bytes()


def test_tiny_problem_spaces(tmp_path):
    out = convert(tmp_path, "arithmetic", "--max-operand", 3, "--num-train", 100)  # 6 unordered sums
    train, validation = ({unordered(r["question"]) for r in read(out / f"{s}.jsonl")} for s in ("train", "validation"))
    assert len(validation) == 1
    assert len(train) == 5
    assert not train & validation
    error = refused(tmp_path, "arithmetic", "--max-operand", 2, "--solved-examples", 3)
    assert "too few problems for 3 --solved-examples; raise --max-operand" in error


def test_arithmetic_from_python():
    cfg = arithmetic.Arithmetic(kinds=("mul",), num_train=4, num_validation=2, max_operand=99)
    made = arithmetic.make_rows(cfg, "{question} Box it.")
    train, validation = list(made["train"]), list(made["validation"])
    assert (len(train), len(validation)) == (4, 2)
    assert train[0]["responses_create_params"]["input"][0]["content"] == train[0]["question"] + " Box it."


@pytest.mark.parametrize(
    ("options", "train", "validation"),
    [
        (("--kinds", "add", "--max-operand", 20), "5e354a776e401413", "d7a75a7b6674532a"),
        ((*STYLE_B[1:7], "--max-factor", 9, *STYLE_B[7:]), "6f930a1217cfc8e7", "a49f1e08d27821e7"),
    ],
    ids=["quickstart", "smollm2"],
)
def test_rows_behind_published_numbers_do_not_change(tmp_path, options, train, validation):
    out = convert(tmp_path, "arithmetic", *options)
    digests = [hashlib.sha256((out / f"{split}.jsonl").read_bytes()).hexdigest()[:16] for split in prepare_data.SPLITS]
    assert digests == [train, validation]


# --- Options ----------------------------------------------------------------------------------------------------------


def questions(n, repeats=1):
    return [{"question": f"What is {i}?", "answer": str(i)} for i in range(n) for _ in range(repeats)]


def test_limit_and_repeats(tmp_path):
    rows = read(
        convert(tmp_path, write(tmp_path / "q.jsonl", questions(9)), "--limit", 2, "--num-repeats", 3) / "train.jsonl"
    )
    assert [row["expected_answer"] for row in rows] == ["0", "0", "0", "1", "1", "1"]


def test_dedup(tmp_path):
    out = convert(tmp_path, write(tmp_path / "q.jsonl", questions(3, 4)[::-1]), "--dedup")
    assert [row["expected_answer"] for row in read(out / "train.jsonl")] == ["2", "1", "0"]
    assert json.loads((out / "train_metrics.json").read_text())["duplicates_dropped"] == 9


def test_validation_split_keeps_repeats_together(tmp_path):
    source = write(tmp_path / "q.jsonl", questions(400, 3))
    parts = {}
    for seed in (1, 1, 2):
        out = convert(tmp_path / f"{seed}{len(parts)}", source, "--validation-split", 0.1, "--seed", seed)
        train, validation = ([r["expected_answer"] for r in read(out / f"{s}.jsonl")] for s in ("train", "validation"))
        assert sorted(train + validation) == sorted(3 * [str(i) for i in range(400)])
        assert not set(train) & set(validation)
        assert 20 <= len(set(validation)) <= 60
        parts.setdefault(seed, validation)
        assert (parts[seed] == validation) and train == sorted(train, key=int)
    assert parts[1] != parts[2]


def test_everything_to_validation(tmp_path):
    out = convert(tmp_path, FIXTURES / "rows_dapo.parquet", "--validation-split", 1, "--dedup")
    assert sorted(path.name for path in out.iterdir()) == ["validation.jsonl", "validation_metrics.json"]
    assert len(read(out / "validation.jsonl")) == 3


def test_two_runs_make_one_folder(tmp_path):
    convert(tmp_path, FIXTURES / "rows_gsm8k.jsonl")
    out = convert(tmp_path, FIXTURES / "rows_dapo.parquet", "--validation-split", 1)
    assert (len(read(out / "train.jsonl")), len(read(out / "validation.jsonl"))) == (4, 4)


@pytest.mark.parametrize("as_file", [False, True])
def test_prompt_template(tmp_path, as_file):
    template = "Think {hard}.\n{question}\nBox \\boxed{}."
    given = tmp_path / "template.txt" if as_file else template
    (tmp_path / "template.txt").write_text(template)
    rows = read(convert(tmp_path, FIXTURES / "rows_dapo.parquet", "--prompt-template", given) / "train.jsonl")
    for row in rows:
        content = f"Think {{hard}}.\n{row['question']}\nBox \\boxed{{}}."
        assert row["responses_create_params"]["input"] == [{"role": "user", "content": content}]


def test_long_prompts_are_left_out_and_counted(tmp_path):
    source = write(tmp_path / "q.jsonl", [{"question": "x" * n, "answer": "1"} for n in (1, 5, 9)])
    options = ("--prompt-template", "{question}", "--max-prompt-length", "5")
    code, printed, _ = run(source, *options, "--output", tmp_path / "out")
    assert code == 0
    assert '"too_long_dropped": 1' in printed
    assert [len(row["question"]) for row in read(tmp_path / "out/train.jsonl")] == [1, 5]


@pytest.mark.slow
def test_tokenizer(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %} {{ m.role }} : {{ m.content }} {% endfor %} assistant : {{ start }}"
    (tmp_path / "tokenizer").mkdir()
    words.save(str(tmp_path / "tokenizer/tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "chat_template": template}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    source = write(tmp_path / "q.jsonl", [{"question": "a b c", "answer": "1"}, {"question": "a", "answer": "1"}])
    options = ("--prompt-template", "{question}", "--max-prompt-length", "6")
    out = convert(tmp_path, source, "--tokenizer", tmp_path / "tokenizer", *options)
    metrics = json.loads((out / "train_metrics.json").read_text())
    assert (metrics["too_long_dropped"], metrics["rows"]) == (
        1,
        1,
    )  # user : a b c assistant : is 7 tokens, user : a ... is 5
    assert metrics["prompt_tokens"]["max"] == metrics["prompt_tokens"]["min"] == 5
    options = (*options, "--chat-template-kwargs", '{"start": "so"}', "--overwrite")
    out = convert(tmp_path, source, "--tokenizer", tmp_path / "tokenizer", *options)
    assert json.loads((out / "train_metrics.json").read_text())["prompt_tokens"]["max"] == 6


def test_tokenizer_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ConfigError, match=f"^cannot load --tokenizer='{tmp_path}/none': [^\n]*$"):
        load_tokenizer(f"{tmp_path}/none", "--tokenizer")


# --- Metrics, files that are there ------------------------------------------------------------------------------------


def test_metrics(tmp_path):
    rows = [{"question": "x" * n, "answer": a} for n, a in ((3, "1"), (10, "2"), (10, "2"), (24, "1"))]
    out = convert(tmp_path, write(tmp_path / "q.jsonl", rows), "--prompt-template", "{question}")
    assert json.loads((out / "train_metrics.json").read_text()) == {
        "rows": 4,
        "duplicates": 1,
        "duplicates_dropped": 0,
        "bad_skipped": 0,
        "too_long_dropped": 0,
        "distinct_answers": 2,
        "prompt_characters": {"min": 3, "max": 24, "mean": 11.75, "median": 10},
        "split": "train",
    }


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60))
def test_length_statistics(lengths):
    found = prepare_data.length_statistics(lengths)
    assert (found["min"], found["max"]) == (min(lengths), max(lengths))
    assert found["median"] == statistics.median(lengths)
    assert found["mean"] == pytest.approx(statistics.fmean(lengths), abs=6e-4)


def test_files_that_are_there_are_replaced_only_when_told_to(tmp_path):
    some = (*STYLE_A, "--num-train", 50)
    out = convert(tmp_path, *some)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    code, printed, error = run(*some, "--seed", 7, "--output", out)
    assert (code, printed) == (2, "")
    assert error == (
        f"prepare_data.py: error: {out}/train.jsonl is already there; replace it with --overwrite, or choose another "
        "--output\n"
    )
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    assert run(*some, "--seed", 7, "--output", out, "--overwrite")[0] == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in before}
    assert all(path.read_bytes() != before[path][1] for path in before)


def test_default_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("arithmetic", "--num-train", 5)[0] == 0
    assert len(read(tmp_path / "data/arithmetic/train.jsonl")) == 5
    assert run(FIXTURES / "rows_gsm8k.jsonl")[0] == 0
    assert len(read(tmp_path / "data/rows_gsm8k/train.jsonl")) == 4


def test_the_report_shows_a_row(tmp_path):
    _, printed, _ = run(FIXTURES / "rows_aime25.jsonl", "--output", tmp_path / "out")
    assert f'{tmp_path / "out/train.jsonl"}: {{"rows": 2, ' in printed
    assert 'first prompt: [{"role": "user", "content": "Solve the following math problem.' in printed
    assert "its answer: 70" in printed


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_no_half_file(tmp_path, sent):
    source, out = write(tmp_path / "q.jsonl", questions(100_000)), tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(source), "--output", str(out)]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=heed)
    until = time.monotonic() + 10
    while not list(tmp_path.glob(".tmp_*/train.jsonl")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(sent)
    process.communicate(timeout=10)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert not out.exists()
    assert sent == signal.SIGKILL or [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


# --- Bad input --------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "not json": (b"{nope", "it is no JSON"),
    "not an object": (b"[1]", "it is no JSON object"),
    "not utf-8": (b'{"question": "\xff", "answer": "1"}', "it is no JSON"),
    "half a surrogate": (b'{"question": "\\ud800", "answer": "1"}', "surrogates not allowed"),
    "nan answer": (b'{"question": "a", "answer": NaN}', "expected_answer is empty or neither text nor number: nan"),
    "infinite answer": (b'{"question": "a", "answer": Infinity}', "expected_answer is empty or neither"),
    "too deep": (b'{"question": ' + b"[" * 100_000, "it is no JSON"),
    "no answer": (b'{"question": "a"}', "its columns (question) are not "),
    "empty answer": (b'{"question": "a", "answer": " "}', "expected_answer is empty"),
    "null answer": (b'{"question": "a", "answer": null}', "expected_answer is empty"),
    "true": (b'{"question": "a", "answer": true}', "expected_answer is empty or neither text nor number: True"),
    "empty question": (b'{"question": " ", "answer": "1"}', "its question is empty"),
    "question of numbers": (b'{"question": 5, "answer": "1"}', "no chat that ends with the user's turn"),
    "gsm8k without mark": (b'{"question": "a", "answer": "b\\nc"}', "no '#### N' line"),
    "no box": (b'{"problem": "a", "solution": "\\\\boxed{1"}', "no \\boxed{...} answer"),
    "no ground truth": (b'{"prompt": [{"role": "user", "content": "a"}], "reward_model": {}}', "'ground_truth'"),
    "no messages": (b'{"prompt": [], "reward_model": {"ground_truth": "1"}}', "no chat that ends"),
    "messages of numbers": (b'{"prompt": [1], "reward_model": {"ground_truth": "1"}}', "input[0] is no message"),
    "assistant last": (
        b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
        b' "reward_model": {"ground_truth": "1"}}',
        "ends with the user's turn",
    ),
    "gym without input": (b'{"responses_create_params": {}, "expected_answer": "1"}', "input is no chat"),
    "gym with null": (
        b'{"responses_create_params": null, "expected_answer": "1"}',
        "responses_create_params is missing or no object",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(tmp_path, name):
    line, message = BAD_LINES[name]
    source = tmp_path / "bad.jsonl"
    source.write_bytes(
        b'{"question": "good", "answer": "1"}\n\n' + line + b"\n" + b'{"question": "good too", "answer": "2"}'
    )
    error = refused(tmp_path, source)
    assert error.startswith(f"prepare_data.py: error: {source}:3: ")
    assert message in error
    assert error.endswith("; correct it, or leave such rows out with --skip-bad\n")


def test_bad_lines_are_counted_with_skip_bad(tmp_path):
    good = b'{"question": "good", "answer": "%d"}\n'
    source, lines = tmp_path / "bad.jsonl", [line for line, _ in BAD_LINES.values()]
    source.write_bytes(b"".join(good % i + line + b"\n" for i, line in enumerate(lines)))
    code, printed, _ = run(source, "--skip-bad", "--output", tmp_path / "out")
    assert code == 0
    assert f"{len(lines)} bad rows were skipped, the first: {source}:2: it is no JSON" in printed
    assert json.loads((tmp_path / "out/train_metrics.json").read_text())["bad_skipped"] == len(lines)
    rows = read(tmp_path / "out/train.jsonl")
    assert [row["expected_answer"] for row in rows] == [str(i) for i in range(len(lines))]


def test_empty_answer_in_published_data(tmp_path):
    assert "rows_math_train.jsonl:3: expected_answer is empty" in refused(tmp_path, FIXTURES / "rows_math_train.jsonl")
    rows = read(convert(tmp_path, FIXTURES / "rows_math_train.jsonl", "--skip-bad") / "train.jsonl")
    assert [row["expected_answer"] for row in rows] == ["16", "180\\text{ miles}", "2"]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "no rows are left for train.jsonl" in refused(tmp_path, tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text("x\n")
    assert "1 bad rows were skipped, the first: " in refused(tmp_path, tmp_path / "bad.jsonl", "--skip-bad")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    assert "broken.parquet: no readable Parquet" in refused(tmp_path, tmp_path / "broken.parquet")
    (tmp_path / "t.csv").touch()
    assert "t.csv must end in .jsonl or .parquet" in refused(tmp_path, tmp_path / "t.csv")
    assert "validation.jsonl" in refused(tmp_path, FIXTURES / "rows_aime25.jsonl", "--validation-split", 1e-6)
    occupied = tmp_path / "occupied"
    occupied.touch()
    code, _, error = run("arithmetic", "--num-train", 5, "--output", occupied)
    assert (code, error.count("\n")) == (2, 1)


BAD_OPTIONS = {
    ("gsm",): "gsm is neither a known data set (dapo17k, gsm8k, math, aime24, ",
    ("missing.jsonl",): "missing.jsonl is neither",
    (): "argument NAME: invalid choice",  # the test gives --output alone
    ("arithmetic", "--kinds", "add,div"): "unknown kind 'div', known are add, sub, mul, add_mul",
    ("arithmetic", "--kinds", ""): "unknown kind ''",
    ("arithmetic", "--max-operand", "x"): "invalid int value: 'x'",
    ("arithmetic", "--num-train", "0"): "--num-train 0 is below 1",
    ("arithmetic", "--max-factor", "1"): "--max-factor 1 is below 2",
    ("arithmetic", "--limit", "0"): "--limit 0 is below 1",
    ("arithmetic", "--min-operand", "30"): "--min-operand 30 is not between 0 and --max-operand 20",
    ("arithmetic", "--dedup"): "unrecognized arguments: --dedup",
    ("gsm8k", "--kinds", "add"): "unrecognized arguments: --kinds add",
    (FIXTURES / "rows_gsm8k.jsonl", "--validation-split", "1.5"): "1.5 is not between 0 and 1",
    ("arithmetic", "--prompt-template", "no field"): "no {question} in 'no field'",
    ("arithmetic", "--max-prompt-length", "0"): "--max-prompt-length 0 is below 1",
    (SCRIPT,): "must end in .jsonl or .parquet",
}


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=lambda options: " ".join(map(str, options))[-40:])
def test_bad_options(tmp_path, options):
    assert BAD_OPTIONS[options] in refused(tmp_path, *options)


def test_help():
    code, printed, _ = run("--help")
    assert code == 0
    assert all(name in printed for name in (*prepare_data.HUB_SETS, "arithmetic", "file"))
    code, printed, _ = run("arithmetic", "--help")
    assert code == 0
    assert all(option in printed for option in ("--skip-bad", "--num-repeats", "--solved-examples"))


# --- The hub, without one ---------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets` takes a folder of the repository's name for the repository: the whole way but for the download."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow
def test_hub_out_of_reach_is_one_line_within_seconds(tmp_path, hub, silent_server):
    """Offline; and with a hub that does not answer, in a process that imports the libraries with such variables."""
    assert "cannot load YouJiacheng/DAPO-Math-17k-dedup from the Hugging Face hub" in refused(tmp_path, "dapo17k")
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": silent_server}
    start = time.monotonic()
    command = [sys.executable, SCRIPT, "dapo17k", "--output", "refused"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - start < 60  # where the libraries themselves go on trying it takes minutes
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "cannot load YouJiacheng/DAPO-Math-17k-dedup from the Hugging Face hub" in done.stderr
    assert "give that file's path instead of the name" in done.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_hub_names_through_the_real_datasets_library(tmp_path, hub):
    for repo in ("YouJiacheng/DAPO-Math-17k-dedup", "BytedTsinghua-SIA/AIME-2024"):
        (tmp_path / repo).mkdir(parents=True)
        shutil.copy(FIXTURES / "rows_dapo.parquet", tmp_path / repo / "train.parquet")
    counts = {}
    for name in ("dapo17k", "aime24"):
        files = convert(tmp_path / f"{name}.out", name).glob("*.jsonl")
        counts[name] = {path.stem: len(read(path)) for path in files}
    assert counts == {"dapo17k": {"train": 4, "validation": 4}, "aime24": {"validation": 3}}


@pytest.mark.slow
def test_the_other_hub_names(tmp_path, hub):
    solutions = ["so \\boxed{2}", "", "\\fbox{3}", "is $\\boxed 4$."]  # as in MATH, where two solutions are empty
    files = {
        "DigitalLearningGmbH/MATH-lighteval/train.jsonl": [{"problem": f"p{s}", "solution": s} for s in solutions],
        "HuggingFaceH4/MATH-500/test.jsonl": read(FIXTURES / "rows_math500.jsonl"),
        "math-ai/aime25/test.jsonl": read(FIXTURES / "rows_aime25.jsonl"),
        "math-ai/amc23/test.jsonl": [{"id": 0, "question": "q", "answer": "27.0", "url": "u"}],
        "openai/gsm8k/main/train.jsonl": read(FIXTURES / "rows_gsm8k.jsonl"),
        "openai/gsm8k/main/test.jsonl": read(FIXTURES / "rows_gsm8k.jsonl")[:1],
    }
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, rows)
    splits = "".join(f"  - {{split: {split}, path: main/{split}.jsonl}}\n" for split in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}---\n"
    (tmp_path / "openai/gsm8k/README.md").write_text(card)
    answers = {}
    for name in ("math", "gsm8k", "aime25", "math500", "amc23"):
        out = convert(tmp_path / name, name)
        answers |= {(name, p.stem): [r["expected_answer"] for r in read(p)] for p in out.glob("*.jsonl")}
    assert answers == {
        ("math", "train"): ["2", "3", "4"],
        ("math", "validation"): LAYOUTS["rows_math500.jsonl"][0],
        ("gsm8k", "train"): ["72", "10", "5", "2125"],
        ("gsm8k", "validation"): ["72"],
        ("aime25", "validation"): ["70", "588"],
        ("math500", "validation"): LAYOUTS["rows_math500.jsonl"][0],
        ("amc23", "validation"): ["27.0"],
    }


# --- Parts ------------------------------------------------------------------------------------------------------------


def test_import_needs_no_heavy_package():
    heavy = {"torch", "ray", "transformers", "datasets", "pyarrow", "vllm"}
    code = f"import sys, prepare_data; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@given(st.text(min_size=1))
def test_bare_problem_undoes_the_templates(problem):
    for template in (DAPO_TEMPLATE, MATH_TEMPLATE):
        assert prepare_data.bare_problem(template.replace("{question}", problem)) == problem


@given(st.text("ab{}\\", max_size=8), st.text("ab\\", max_size=8), st.text("xy", max_size=8))
def test_last_boxed(before, inner, after):
    answer = f"{{{inner}}}{inner}"
    assert prepare_data.last_boxed(f"{before}\\boxed{{0}} \\boxed{{{answer}}}{after}") == answer
