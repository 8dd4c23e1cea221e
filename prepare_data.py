"""Data sets to JSONL rows for GRPO, with metrics: `python prepare_data.py NAME [--output DIR] [...]`.

NAME is dapo17k, aime24, gsm8k or math (from the Hugging Face hub), arithmetic (made here: offline, seeded), or a local
.jsonl or .parquet file in one of the column layouts of FORMATS. The output folder gets train.jsonl, validation.jsonl,
and a *_metrics.json for each. A row, compatible with NeMo Gym:

  {"responses_create_params": {"input": [{"role": "user", "content": ...}]}, "question": ..., "expected_answer": ...,
   "agent_ref": {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}, ...and the other columns}

Rows are streamed, keep their order (the trainer shuffles) and are never cut. A bad row is an error that names file and
line; --skip-bad counts such rows instead. Files appear complete or not at all, and replace different ones only with
--overwrite. This needs the standard library alone; pyarrow (for .parquet), datasets (for hub names) and transformers
(for --tokenizer) are imported when asked for. Without the hub, the same from files got in another way:

  python prepare_data.py dapo-math-17k.parquet --dedup --output data/dapo17k
  python prepare_data.py aime-2024.parquet --validation-split 1 --output data/dapo17k
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

Row = dict[str, Any]
SPLITS = ("train", "validation")
AGENT_REF = {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}
MATH_TEMPLATE = (
    "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{}.\n\n{question}"
)
DAPO_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


class DataError(Exception):
    """Input or options that cannot be used; the text says what, where and what to do."""


# --- Arithmetic: problems made here -----------------------------------------------------------------------------------

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

    def draw(self, kind: str, rng: random.Random, *avoid: set) -> Row:
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


def arithmetic_rows(cfg: Arithmetic, template: str = "{question}") -> dict[str, Iterator[Row]]:
    """Rows of both splits, made as they are read; `solution` is a correct assistant turn for the row.

    Validation problems are different from each other and occur in no training row, neither as its problem nor as a
    solved example. Training problems repeat once nearly all have been drawn. The first rows are the same
    whatever the number of rows.
    """
    held_out: dict[tuple, tuple[Row, random.Random]] = {}
    for i in range(cfg.num_validation):
        kind, rng = cfg.kinds[i % len(cfg.kinds)], random.Random(f"{cfg.seed}/validation/{i}")
        if i // len(cfg.kinds) < cfg.most_validation(kind):
            problem = cfg.draw(kind, rng, held_out.keys())
            held_out[problem["key"]] = (problem, rng)

    def row(problem: Row, rng: random.Random) -> Row:
        shown, messages = {problem["key"]}, []
        for _ in range(cfg.solved_examples):  # of the problem's own kind, so that they show how it is worked out
            example = cfg.draw(problem["kind"], rng, shown, held_out.keys())
            if example["key"] in shown:
                raise DataError(f"too few problems for {cfg.solved_examples} --solved-examples; raise --max-operand")
            shown.add(example["key"])
            messages += ask(template, example["question"]) + [{"role": "assistant", "content": example["solution"]}]
        messages += ask(template, problem["question"])
        extra = {"kind": problem["kind"], "solution": problem["solution"]}
        return make_row(messages, problem["question"], problem["answer"], extra)

    def train() -> Iterator[Row]:
        seen: dict[str, set] = {kind: set() for kind in cfg.kinds}
        for i in range(cfg.num_train):
            kind, rng = cfg.kinds[i % len(cfg.kinds)], random.Random(f"{cfg.seed}/train/{i}")
            problem = cfg.draw(kind, rng, held_out.keys(), seen[kind])
            if problem["key"] in seen[kind]:  # nothing new is left: begin again
                seen[kind].clear()
            seen[kind].add(problem["key"])
            yield row(problem, rng)

    return {"train": train(), "validation": (row(problem, rng) for problem, rng in held_out.values())}


# --- Rows from the columns of known data sets -------------------------------------------------------------------------


def make_row(prompt: str | list[Row], question: str, expected_answer: str, extra: Row) -> Row:
    """A row of the format at the top of this file."""
    fixed = {"responses_create_params": {"input": prompt}, "question": question, "expected_answer": expected_answer}
    return {**fixed, "agent_ref": AGENT_REF, **extra, **fixed}


def ask(template: str, question: str) -> list[Row]:
    """The user's turn. (Not by str.format: templates contain `\\boxed{}`.)"""
    return [{"role": "user", "content": template.replace("{question}", question)}]


def bare_problem(text: str) -> str:
    """The problem inside one of the two known prompt templates, or the text itself."""
    for template in (DAPO_TEMPLATE, MATH_TEMPLATE):
        prefix, suffix = template.split("{question}")
        if text.startswith(prefix) and text.endswith(suffix):
            return text[len(prefix) : len(text) - len(suffix)]
    return text


def last_boxed(solution: str) -> str:
    """The content of the last `\\boxed{...}`; MATH also writes `\\fbox{...}` and, before a `$`, `\\boxed 2`."""
    _, box, rest = solution.replace("\\fbox", "\\boxed").rpartition("\\boxed")
    if box and not rest.startswith("{"):
        return rest.partition("$")[0]
    depth = 0
    for end, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:end]
    raise DataError("its solution has no \\boxed{...} answer")


def gsm8k_answer(answer: Any) -> Any:
    """The number after `####` without thousands separators; a one-line answer without `####` is taken as it is."""
    _, mark, final = str(answer).rpartition("####")
    if not mark and "\n" in final:
        raise DataError("its answer has several lines and no '#### N' line")
    return final.replace(",", "") if mark else answer


def user_text(prompt: Any) -> str:
    """The last user message of a prompt (a string or a message list), which is checked on the way."""
    if isinstance(prompt, str):
        return prompt
    good = isinstance(prompt, list) and all(
        isinstance(m["role"], str) and isinstance(m["content"], str) for m in prompt
    )
    users = [m["content"] for m in prompt if m["role"] == "user"] if good else []
    if not users or prompt[-1]["role"] == "assistant":
        raise DataError("its prompt is no list of {role, content: text} messages that ends with the user's turn")
    return users[-1]


@dataclass(frozen=True)
class Format:
    """A column layout: a row with both columns is read so. All columns but these two and `drop` stay in the row."""

    question: str
    answer: str
    read_answer: Callable[[Any], Any] = lambda value: value
    prompt: Callable[[Any], Any] | None = None  # the question column is a whole prompt, found there by this function
    drop: tuple[str, ...] = ()


SCORES = ("response", "reward", "library_reward", "extracted_answer", "judge_evaluations")
# The first layout whose columns are all there reads the row.
FORMATS = (
    Format("responses_create_params", "expected_answer", prompt=lambda v: v["input"], drop=SCORES),  # NeMo Gym and ours
    Format(
        "prompt", "reward_model", lambda v: v["ground_truth"], lambda v: v, drop=("__index_level_0__",)
    ),  # DAPO, verl
    Format("prompt", "ground_truth", drop=("messages",)),  # DeepMath
    Format("question", "expected_answer"),
    Format("question", "answer", gsm8k_answer),  # GSM8K
    Format("problem", "answer"),  # MATH-500
    Format("problem", "expected_answer"),  # AIME
    Format("problem", "solution", last_boxed),  # MATH as first published
)


def convert(row: Any, template: str | None) -> Row:
    """A row of any known layout as one of ours; DataError says what is wrong with it."""
    if not isinstance(row, dict):
        raise DataError("it is no JSON object")
    layout = next((f for f in FORMATS if f.question in row and f.answer in row), None)
    if layout is None:
        known = ", ".join(f"{f.question} + {f.answer}" for f in FORMATS)
        raise DataError(f"its columns ({', '.join(row)}) are not {known}; rename them, or add a line to FORMATS")
    try:
        prompt = layout.prompt(row[layout.question]) if layout.prompt else None
        question = row.get("question") or bare_problem(user_text(prompt)) if prompt else row[layout.question]
        answer = layout.read_answer(row[layout.answer])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{layout.question} or {layout.answer} is not built as expected ({error!r})") from error
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"its question is empty or no text: {question!r}")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or str(answer).strip() in ("", "nan"):
        raise DataError(f"its answer is empty or neither text nor number: {answer!r}")
    answer = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
    if template or not prompt:
        prompt = ask(template or MATH_TEMPLATE, question)
    used = {layout.question, layout.answer, *layout.drop, *(("question",) if layout.prompt else ())}
    made = make_row(prompt, question, answer, {k: v for k, v in row.items() if k not in used})
    # tools, temperature, ... of a NeMo Gym row
    made["responses_create_params"] = {**(row.get("responses_create_params") or {}), "input": prompt}
    return made


# --- Reading: each source gives pairs of a place ("file:line") and the row there, or the DataError it raised ----------


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub; `dedup` drops the repeats in it, `skip_bad` its rows known to be bad."""

    repo: str
    split: str = "train"
    config: str | None = None
    dedup: bool = False
    skip_bad: bool = False


GSM8K, AIME24 = "openai/gsm8k", "BytedTsinghua-SIA/AIME-2024"
MATH = Hub("DigitalLearningGmbH/MATH-lighteval", skip_bad=True)  # two solutions are empty
HUB_SETS: dict[str, dict[str, Hub]] = {
    "dapo17k": {"train": Hub("YouJiacheng/DAPO-Math-17k-dedup"), "validation": Hub(AIME24)},
    "aime24": {"validation": Hub(AIME24, dedup=True)},
    "gsm8k": {"train": Hub(GSM8K, "train", "main"), "validation": Hub(GSM8K, "test", "main")},
    "math": {"train": MATH, "validation": Hub("HuggingFaceH4/MATH-500", "test")},
}
FULL_SETS = {  # --full: as published, every question many times
    "dapo17k": {"train": Hub("BytedTsinghua-SIA/DAPO-Math-17k"), "validation": Hub(AIME24)},
    "aime24": {"validation": Hub(AIME24)},
}


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of a JSONL file; blank ones are left out."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    yield f"{path}:{number}", DataError(f"it is no JSON ({error})")


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file, a batch at a time."""
    arrow, parquet = import_package("pyarrow"), import_package("pyarrow.parquet")
    try:
        yield from arrow_rows(f"{path}: row", parquet.ParquetFile(path).iter_batches(4096))
    except arrow.ArrowException as error:
        raise DataError(f"{path}: no readable Parquet ({first_line(error)}); write or download it again") from error


def arrow_rows(where: str, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Rows of Arrow batches or tables, counted from 1."""
    rows = (row for batch in batches for row in batch.to_pylist())
    for count, row in enumerate(rows, 1):
        yield f"{where} {count}", row


def read_hub(hub: Hub) -> Iterator[tuple[str, Any]]:
    """Rows of a data set on the hub, or in its local cache when the hub cannot be reached."""
    go_offline_if_unreachable(hub.repo)
    datasets = import_package("datasets")
    datasets.logging.set_verbosity_error()
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    try:
        table = datasets.load_dataset(hub.repo, hub.config, split=hub.split).with_format("arrow")
    except Exception as error:  # many kinds: network, permission, cache, parsing
        raise DataError(
            f"cannot load {hub.repo} from the Hugging Face hub ({type(error).__name__}: {first_line(error)}); check "
            "network, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE, or get its .parquet or .jsonl file in another way and give "
            "that file's path instead of the name (see --help)"
        ) from error
    yield from arrow_rows(f"{hub.repo} ({hub.split}): row", table.iter(4096))


def go_offline_if_unreachable(repo: str, deadline: float = 5.0) -> None:
    """Look only into the cache if the hub gives no answer in time: the libraries would go on trying for minutes."""
    answers: list[bool] = []

    def call() -> None:
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=deadline).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except (OSError, ValueError):
            pass

    if not os.path.isdir(repo) and os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("1", "ON", "YES", "TRUE"):
        thread = threading.Thread(target=call, daemon=True)  # a name look-up knows no timeout
        thread.start()
        thread.join(deadline)
        if not answers:
            os.environ["HF_HUB_OFFLINE"] = "1"


def first_line(error: Exception) -> str:
    """What an exception of a library says, for our one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_package(name: str) -> Any:
    """A package that only some uses need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise DataError(f"this needs the Python package {package} ({error}): pip install {package}") from error


def load_tokenizer(name: str) -> Any:
    """A tokenizer with a chat template, from a folder or the hub."""
    go_offline_if_unreachable(name)
    try:
        tokenizer = import_package("transformers").AutoTokenizer.from_pretrained(name)
        chat_tokens(tokenizer, "2 + 2?")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"--tokenizer {name}: {first_line(error)}; give one that has a chat template") from error
    return tokenizer


def chat_tokens(tokenizer: Any, prompt: str | list[Row]) -> list[int]:
    """Token ids of a prompt with the chat template around it and the assistant's turn opened."""
    messages = ask("{question}", prompt) if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# --- Writing ----------------------------------------------------------------------------------------------------------

ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str).encode


def json_line(row: Row) -> bytes:
    """One line, also for readers that use str.splitlines(): JSON itself leaves these three line breaks unescaped."""
    text = ENCODE(row).replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode() + b"\n"


class SplitWriter:
    """Writes one JSONL file and gathers its metrics; memory grows only by two hashes per distinct row."""

    def __init__(self, path: Path, args: argparse.Namespace, tokenizer: Any) -> None:
        self.path, self.args, self.tokenizer = path, args, tokenizer
        self.file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self.sha256 = hashlib.sha256()
        self.count = dict.fromkeys(("rows", "duplicates", "duplicates_dropped", "bad_skipped", "too_long", "bytes"), 0)
        self.lengths: dict[str, Counter] = {"characters": Counter()} | ({"tokens": Counter()} if tokenizer else {})
        self.seen: set[int] = set()
        self.answers: set[int] = set()
        self.sample: Row = {}
        self.first_bad = ""

    def add(self, row: Row, line: bytes, dedup: bool) -> None:
        """Write the row, --num-repeats times, unless it repeats another or is too long and such rows are dropped."""
        args, count, key = self.args, self.count, hash((row["question"], row["expected_answer"]))
        if dedup and key in self.seen:
            count["duplicates_dropped"] += 1
            return
        prompt = row["responses_create_params"]["input"]
        lengths = {"characters": len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)}
        if self.tokenizer:
            lengths["tokens"] = len(chat_tokens(self.tokenizer, prompt))
        too_long = args.max_prompt_length is not None and [*lengths.values()][-1] > args.max_prompt_length
        count["too_long"] += too_long
        if too_long and args.drop_long:
            return
        for unit, length in lengths.items():
            self.lengths[unit][length] += args.num_repeats
        count["duplicates"] += key in self.seen
        self.seen.add(key)
        self.answers.add(hash(row["expected_answer"]))
        self.sample = self.sample or row
        line *= args.num_repeats
        count["rows"] += args.num_repeats
        count["bytes"] += len(line)
        self.sha256.update(line)
        self.file.write(line)

    def metrics(self) -> Row:
        """What *_metrics.json says; the same for the same rows."""
        lengths = {f"prompt_{unit}": length_statistics(counts) for unit, counts in self.lengths.items()}
        limit = {"max_prompt_length": self.args.max_prompt_length, "too_long_dropped": self.args.drop_long}
        counts = {**self.count, "distinct_answers": len(self.answers)}
        return {**counts, **lengths, **limit, "sha256": self.sha256.hexdigest()}


def length_statistics(counts: Counter, bins: int = 10) -> Row:
    """Minimum, maximum, mean, median and a histogram (bin i counts edges[i] <= length < edges[i + 1])."""
    low, high, total = min(counts), max(counts), counts.total()
    width = (high - low) // bins + 1
    edges = list(range(low, high + width + 1, width))
    in_bins = [sum(n for length, n in counts.items() if a <= length < a + width) for a in edges[:-1]]
    mean = round(sum(length * n for length, n in counts.items()) / total, 3)
    middle = statistics.median(counts.elements())
    return {"min": low, "max": high, "mean": mean, "median": middle, "histogram": {"edges": edges, "counts": in_bins}}


def report(file: Path, m: Row, sample: Row, first_bad: str) -> None:
    """Print what was written, and one row to look at."""
    print(f"{file}: {m['rows']:,} rows, {m['distinct_answers']:,} distinct answers, {m['bytes'] / 1e6:,.1f} MB")
    for unit in ("characters", "tokens"):
        if n := m.get(f"prompt_{unit}"):
            print(f"  prompts: {n['min']:,} to {n['max']:,} {unit}, mean {n['mean']:,.1f}, median {n['median']:,}")
    long = "and were dropped" if m["too_long_dropped"] else "(--drop-long drops them)"
    notes = {
        "duplicates": "repeat the question and answer of an earlier row",
        "duplicates_dropped": "repeats of an earlier row were dropped",
        "bad_skipped": f"bad rows were skipped, the first: {first_bad}",
        "too_long": f"prompts are longer than {m['max_prompt_length']} {long}",
    }
    for key, note in notes.items():
        if m[key]:
            print(f"  {m[key]:,} {note}")
    print(f"  first prompt: {json.dumps(sample['responses_create_params']['input'], ensure_ascii=False)}")
    print(f"  its answer: {sample['expected_answer']}")


def progress(rows: Iterable[Any], label: str) -> Iterator[Any]:
    """Pass rows on; on a terminal, show how many and how fast."""
    start = shown = time.monotonic()
    number = 0
    for number, row in enumerate(rows, 1):
        yield row
        if sys.stderr.isatty() and time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            speed = number / (shown - start)
            print(f"\r{label}: {number:,} rows, {speed:,.0f}/s ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(f"\r{label}: {number:,} rows in {time.monotonic() - start:.1f} s ", file=sys.stderr)


# --- The run ----------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """A source on its way to `split`; None sends each row to train or validation by a hash of its question."""

    split: str | None
    rows: Iterator[tuple[str, Any]]
    template: str | None
    dedup: bool = False
    skip_bad: bool = False


def open_streams(args: argparse.Namespace) -> list[Stream]:
    """The sources that NAME and the options ask for."""
    if args.name == "arithmetic":
        made = arithmetic_rows(args.arithmetic, args.prompt_template or "{question}")
        return [Stream(split, ((f"arithmetic {split}", row) for row in rows), None) for split, rows in made.items()]
    if args.name in HUB_SETS:
        hubs = (FULL_SETS if args.full else HUB_SETS)[args.name]
        return [
            Stream(s, read_hub(h), args.prompt_template, h.dedup, args.skip_bad or h.skip_bad) for s, h in hubs.items()
        ]
    path, split = Path(args.name), None if args.validation_split else "train"
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_parquet(path)
    return [Stream(split, rows, args.prompt_template, args.dedup, args.skip_bad)]


def good_rows(stream: Stream, bad: list[str]) -> Iterator[tuple[Row, bytes]]:
    """Converted rows and their lines; a bad row ends the run, or goes to `bad`."""
    for place, raw in stream.rows:
        try:
            if isinstance(raw, DataError):
                raise raw
            row = convert(raw, stream.template)
            yield row, json_line(row)
        except (DataError, ValueError, RecursionError) as error:  # not JSON: NaN, half a surrogate pair, too deep
            bad.append(f"{place}: {error}")
            if not stream.skip_bad:
                raise DataError(f"{bad[0]}; correct it, or leave such rows out with --skip-bad") from error


def goes_to_validation(question: str, args: argparse.Namespace) -> bool:
    """By a hash of the question, so that its repeats are all on one side."""
    digest = hashlib.blake2b(f"{args.seed}/{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < args.validation_split * 2**64


def write_splits(args: argparse.Namespace, folder: Path) -> dict[str, SplitWriter]:
    """Convert everything into `folder`; the closed writer of each split knows its metrics."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    writers: dict[str, SplitWriter] = {}
    for stream in open_streams(args):
        bad: list[str] = []
        for row, line in progress(islice(good_rows(stream, bad), args.limit), stream.split or args.name):
            split = stream.split or SPLITS[goes_to_validation(row["question"], args)]
            if split not in writers:
                writers[split] = SplitWriter(folder / f"{split}.jsonl", args, tokenizer)
            writers[split].add(row, line, stream.dedup)
        wanted = [stream.split] if stream.split else SPLITS if args.validation_split < 1 else SPLITS[1:]
        for split in wanted:
            if split not in writers or not writers[split].count["rows"]:
                dropped = f", {len(bad)} were bad, the first: {bad[0]}" if bad else ""
                raise DataError(f"{args.name}: no rows are left for {split}.jsonl{dropped}; nothing was written")
        writers[wanted[0]].count["bad_skipped"], writers[wanted[0]].first_bad = len(bad), "".join(bad[:1])
    for writer in writers.values():
        writer.file.close()
    return writers


def prepare(args: argparse.Namespace) -> None:
    """Make the files in a temporary folder beside their place, compare with earlier ones, then move them there."""
    output: Path = args.output
    made_with = identity(args)
    if already_there(output, made_with):
        print(f"{output}: already there, made with the same options and the same code; nothing to do")
        return
    created = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp_", dir=output) as tmp:
            writers = write_splits(args, Path(tmp))
            metrics = {split: writer.metrics() for split, writer in writers.items()}
            for split, new in metrics.items():
                refuse_conflict(output, split, new, args.overwrite)
                content = {**new, "split": split, "splits": list(metrics), "made_with": made_with}
                write_json(Path(tmp) / f"{split}_metrics.json", content)
            for ending in (".jsonl", "_metrics.json"):  # the metrics last: they vouch for the rows
                for split in metrics:
                    os.replace(Path(tmp) / f"{split}{ending}", output / f"{split}{ending}")
    finally:
        if created and not any(output.iterdir()):
            output.rmdir()
    for split, writer in writers.items():
        report(output / f"{split}.jsonl", metrics[split], writer.sample, writer.first_bad)


def write_json(path: Path, content: Row) -> None:
    """A small file for people and programs."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def identity(args: argparse.Namespace) -> Row:
    """Everything that decides the content of the files: options, the local input file, and this code."""
    ignored = ("output", "overwrite", "arithmetic")
    options = {key: value for key, value in vars(args).items() if value not in (None, False) and key not in ignored}
    file = os.stat(args.name) if os.path.isfile(args.name) else None
    code = zlib.crc32(Path(__file__).read_bytes())
    # A list for the tuple of kinds: comparable with what is read from a file.
    options |= {"kinds": list(args.arithmetic.kinds)} if args.kinds else {}
    return {"options": options, "file": file and [file.st_size, file.st_mtime_ns], "code": code}


def already_there(output: Path, made_with: Row) -> bool:
    """Whether an earlier run with this identity left complete files."""
    try:
        paths = [output / f"{split}_metrics.json" for split in SPLITS]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        mine = {m["split"]: m for m in found if m["made_with"] == made_with}
        splits = {split for m in mine.values() for split in m["splits"]}
        return bool(splits) and all((output / f"{s}.jsonl").stat().st_size == mine[s]["bytes"] for s in splits)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def refuse_conflict(output: Path, split: str, new: Row, overwrite: bool) -> None:
    """Rows that differ from the new ones are not replaced without being told to."""
    rows, metrics = output / f"{split}.jsonl", output / f"{split}_metrics.json"
    conflict = output / f"{split}_metrics_conflict.json"
    conflict.unlink(missing_ok=True)
    if overwrite or not (rows.exists() or metrics.exists()):
        return
    if not metrics.exists():
        raise DataError(f"{rows} has no {metrics.name}, so it may be your own; choose another --output, or --overwrite")
    try:
        old = json.loads(metrics.read_text(encoding="utf-8"))
        differ = [f"{key}: {old.get(key)} there, {new[key]} now" for key in new if old.get(key) != new[key]]
    except (ValueError, AttributeError):
        differ = ["the old file is no JSON object"]
    if differ:
        write_json(conflict, new)
        raise DataError(
            f"{metrics} conflicts with {conflict}, just made ({differ[0]}); change --output, or --overwrite"
        )


# --- The command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type with limits."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def comma_list_of_kinds(text: str) -> tuple[str, ...]:
    """An argparse type."""
    kinds = tuple(text.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"unknown kind {kind!r}, known are {', '.join(KINDS)}")
    return kinds


def template_text(text: str) -> str:
    """An argparse type: the template itself, or a file with it."""
    template = Path(text).read_text(encoding="utf-8") if os.path.isfile(text) else text
    if "{question}" not in template:
        raise argparse.ArgumentTypeError(f"no {{question}} in {text!r} (and no file of that name has it)")
    return template


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser("prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("name", metavar="NAME", help=f"{', '.join(HUB_SETS)}, arithmetic, or a .jsonl or .parquet file")
    add("--output", type=Path, help="folder for the files (default data/NAME)")
    add("--overwrite", action="store_true", help="replace the different files of an earlier run")
    add("--limit", type=count, help="read only this many rows of each source")
    add("--num-repeats", type=count, default=1, help="write every row so often (AIME as often published: 32)")
    add("--seed", type=int, default=42, help="for arithmetic and --validation-split")
    add("--skip-bad", action="store_true", help="leave out and count bad rows instead of stopping at the first")
    add("--full", action="store_true", help="dapo17k, aime24: as published, with every question many times")
    own = "default: the row's own prompt where it has one, else " + json.dumps(MATH_TEMPLATE)
    add("--prompt-template", type=template_text, help="text with {question} in it, or a file with such a text; " + own)
    add("--tokenizer", help="model folder or hub name: measure prompts in tokens too, with the chat template")
    add("--max-prompt-length", type=count, help="report longer prompts (tokens if --tokenizer, else characters)")
    add("--drop-long", action="store_true", help="and leave them out")
    add = (local := parser.add_argument_group("local")).add_argument
    add("--validation-split", type=number(float, 0, 1), help="share of questions for validation.jsonl; 1: all of them")
    add("--dedup", action="store_true", help="drop rows of NAME that repeat a question and answer")
    add = (arithmetic := parser.add_argument_group("arithmetic")).add_argument
    default = Arithmetic()
    add("--kinds", type=comma_list_of_kinds, help=f"comma list of {', '.join(KINDS)} (a + b * c); default add")
    add("--min-operand", type=number(int, 0), help=f"default {default.min_operand}")
    add("--max-operand", type=count, help=f"default {default.max_operand}")
    add("--max-factor", type=number(int, 2), help=f"second factors are 2 to this; default {default.max_factor}")
    add("--num-train", type=count, help=f"default {default.num_train}")
    add("--num-validation", type=count, help=f"at most a quarter of the problems; default {default.num_validation}")
    add("--solved-examples", type=number(int, 0), help="number of them, as earlier turns of the chat; default 0")
    add("--answer-style", choices=ANSWER_STYLES, help="solutions: the box alone (default), or the working and the box")
    args = parser.parse_args(argv)
    groups = {group.title or "": [action.dest for action in group._group_actions] for group in (local, arithmetic)}
    given = {key: getattr(args, key) for key in groups["arithmetic"] if getattr(args, key) is not None}
    args.arithmetic = Arithmetic(seed=args.seed, **given)
    check_args(parser, args, groups)
    args.output = args.output or Path("data") / Path(args.name).stem
    return args


def check_args(parser: Parser, args: argparse.Namespace, groups: dict[str, list[str]]) -> None:
    """Refuse a NAME that is nothing, and options that would be ignored."""
    kind = "arithmetic" if args.name == "arithmetic" else "hub" if args.name in HUB_SETS else "local"
    known, path = [*HUB_SETS, "arithmetic"], Path(args.name)
    near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(args.name, known, 1))
    problems: dict[str, Any] = (
        {
            f"{path} is neither a known data set ({', '.join(known)}) nor a file here{near}": kind == "local"
            and not path.is_file(),
            f"{path} must end in .jsonl or .parquet; convert or rename it": kind == "local"
            and path.suffix not in (".jsonl", ".parquet"),
        }
        | {
            f"--{option.replace('_', '-')} is for {group} data, which {args.name} is not": getattr(args, option)
            for group, options in groups.items()
            for option in options
            if group != kind
        }
        | {
            f"--full is for {' and '.join(FULL_SETS)}": args.full and args.name not in FULL_SETS,
            "--drop-long needs --max-prompt-length": args.drop_long and args.max_prompt_length is None,
            "--min-operand is above --max-operand": args.arithmetic.min_operand > args.arithmetic.max_operand,
        }
    )
    for problem, present in problems.items():
        if present not in (None, False):
            parser.error(problem)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line that says what is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files go away
    try:
        prepare(parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except (DataError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
