"""Data sets to JSONL rows for GRPO, with metrics: `python prepare_data.py NAME [--output DIR] [...]`.

NAME is a data set on the Hugging Face hub (see HUB_SETS), arithmetic (made here: offline, seeded), or a local .jsonl or
.parquet file in one of the column layouts of LAYOUTS. `NAME --help` lists the options of each. The output folder gets
train.jsonl, validation.jsonl or both, and a *_metrics.json for each. A row, compatible with NeMo Gym:

  {"responses_create_params": {"input": [{"role": "user", "content": ...}]}, "question": ..., "expected_answer": ...,
   "agent_ref": {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}, ...and the other columns}

Rows are streamed, keep their order (the trainer shuffles) and are never cut. A bad row is an error that names file and
line; with --skip-bad it is left out and counted. Files appear complete or not at all, and replace old ones only with
--overwrite. Without the hub, the same data sets can come from local files:

  python prepare_data.py dapo-math-17k.parquet --dedup --output data/dapo17k
  python prepare_data.py aime-2024.parquet --validation-split 1 --output data/dapo17k
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from config import ConfigError
from recipes import arithmetic
from rows import AGENT_REF, add_template_options, encode_prompt, load_tokenizer, read_row

Row = dict[str, Any]
Located = Iterable[tuple[str, Any]]  # pairs of a place ("file:line") and the row there, or the ValueError it gave
SPLITS = ("train", "validation")
MATH_TEMPLATE = (
    "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{}.\n\n{question}"
)
DAPO_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


# --- Rows from the columns of known data sets -------------------------------------------------------------------------


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
    raise ValueError("its solution has no \\boxed{...} answer")


def gsm8k_columns(answer: Any) -> Row:
    """Answer and worked solution of GSM8K's `answer`: the working with marks like <<3*4=12>>, and `#### 12`.

    A one-line answer without `####`, as other data sets have under this name, is taken as it is.
    """
    working, mark, final = str(answer).rpartition("####")
    if not mark and "\n" in final:
        raise ValueError("its answer has several lines and no '#### N' line")
    if not mark:
        return {"expected_answer": answer}
    final = final.replace(",", "").strip()
    return {"expected_answer": final, "solution": f"{re.sub('<<.*?>>', '', working).strip()}\n\\boxed{{{final}}}"}


@dataclass(frozen=True)
class Layout:
    """Which two columns hold question and answer; a row that has both has this layout. Its other columns stay."""

    question: str
    answer: str
    is_prompt: bool = False  # the question column holds a whole prompt: text, or a list of messages
    read_answer: Callable[[Any], Row] = lambda value: {"expected_answer": value}  # what the answer column becomes
    drop: tuple[str, ...] = ()


SCORES = ("response", "reward", "library_reward", "extracted_answer", "judge_evaluations")
# The first layout whose columns are all there reads the row.
LAYOUTS = (
    Layout("responses_create_params", "expected_answer", True, drop=SCORES),  # NeMo Gym and ours
    Layout("prompt", "reward_model", True, lambda v: {"expected_answer": v["ground_truth"]}, ("__index_level_0__",)),
    Layout("prompt", "ground_truth", drop=("messages",)),  # DeepMath; the line above reads DAPO and verl
    Layout("question", "expected_answer"),
    Layout("question", "answer", read_answer=gsm8k_columns),  # GSM8K, AMC
    Layout("problem", "answer"),  # MATH-500, AIME 2025
    Layout("problem", "expected_answer"),  # AIME
    Layout("problem", "solution", read_answer=lambda v: {"expected_answer": last_boxed(v), "solution": v}),  # MATH
)


def convert(row: Any, template: str | None) -> Row:
    """A row of any known layout as one of ours; ValueError says what is wrong with it."""
    if isinstance(row, dict):
        row = row.get("task_input", row)  # a materialized row of NeMo Gym
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    layout = next((known for known in LAYOUTS if known.question in row and known.answer in row), None)
    if layout is None:
        known = ", ".join(f"{known.question} + {known.answer}" for known in LAYOUTS)
        raise ValueError(f"its columns ({', '.join(row)}) are not {known}; rename them, or add a line to LAYOUTS")
    prompt = row[layout.question]
    try:
        answer = layout.read_answer(row[layout.answer])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its column {layout.answer} is not built as expected ({error!r})") from error
    used = {layout.question, layout.answer, *layout.drop, "question", "expected_answer", "agent_ref"}
    made = {
        "responses_create_params": prompt if layout.question == "responses_create_params" else {"input": prompt},
        "question": row.get("question") if layout.is_prompt else prompt,
        "expected_answer": None,
        "agent_ref": row.get("agent_ref") or AGENT_REF,
    }
    made = read_row(made | {key: value for key, value in row.items() if key not in used} | answer)
    params = made["responses_create_params"]
    question = made["question"] = made["question"] or bare_problem(params["input"][-1]["content"])
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"its question is empty or no text: {question!r}")
    if template or not layout.is_prompt:
        content = (template or MATH_TEMPLATE).replace("{question}", question)  # str.format would fail at \boxed{}
        params["input"] = [{"role": "user", "content": content}]
    return made


# --- Reading ----------------------------------------------------------------------------------------------------------


class Hub(NamedTuple):
    """A data set on the Hugging Face hub."""

    repo: str
    split: str = "train"
    config: str | None = None


GSM8K, AIME24, MATH500 = "openai/gsm8k", Hub("BytedTsinghua-SIA/AIME-2024"), Hub("HuggingFaceH4/MATH-500", "test")
HUB_SETS: dict[str, dict[str, Hub]] = {
    "dapo17k": {"train": Hub("YouJiacheng/DAPO-Math-17k-dedup"), "validation": AIME24},
    "gsm8k": {"train": Hub(GSM8K, "train", "main"), "validation": Hub(GSM8K, "test", "main")},
    "math": {"train": Hub("DigitalLearningGmbH/MATH-lighteval"), "validation": MATH500},
    "aime24": {"validation": AIME24},
    "aime25": {"validation": Hub("math-ai/aime25", "test")},
    "math500": {"validation": MATH500},
    "amc23": {"validation": Hub("math-ai/amc23", "test")},
}
FIXED = {"math": {"skip_bad": True}, "aime24": {"dedup": True}}  # two solutions are empty; each question is 32 times


def read_jsonl(path: Path) -> Located:
    """Lines of a JSONL file; blank ones are left out. (`datasets` would not say which line is bad.)"""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", ValueError(f"it is no JSON ({error})")


def read_parquet(path: Path) -> Located:
    """Rows of a Parquet file, a batch at a time. (`datasets` would copy the file into its cache first.)"""
    import pyarrow.parquet

    try:
        yield from arrow_rows(str(path), pyarrow.parquet.ParquetFile(path).iter_batches(4096))
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: no readable Parquet ({error}); write or download it again") from error


def read_hub(hub: Hub) -> Located:
    """Rows of a data set on the hub, or in its local cache when the hub cannot be reached."""
    import datasets

    datasets.logging.set_verbosity_error()
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    try:
        table = datasets.load_dataset(hub.repo, hub.config, split=hub.split).with_format("arrow")
    except Exception as error:  # many kinds: network, permission, cache, parsing
        raise ConfigError(
            f"cannot load {hub.repo} from the Hugging Face hub ({type(error).__name__}: {error}); check network, "
            "HF_TOKEN, HF_HOME and HF_HUB_OFFLINE, or get its .parquet or .jsonl file in another way and give that "
            "file's path instead of the name (see --help)"
        ) from error
    yield from arrow_rows(f"{hub.repo} ({hub.split})", table.iter(4096))


def arrow_rows(where: str, batches: Iterable[Any]) -> Located:
    """Rows of Arrow batches or tables, counted from 1."""
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"{where}: row {number}", row) for number, row in enumerate(rows, 1))


def go_offline_if_unreachable(seconds: float = 5.0) -> None:
    """Look only into the cache if the hub gives no answer in time: the libraries would go on trying for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "0") != "0":
        return
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # the hub did answer
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def read_all(args: argparse.Namespace) -> Iterator[tuple[str | None, str, Any]]:
    """Split, place and row of everything that NAME and the options ask for. Split None: the question decides."""
    if args.name == "file":
        rows = read_jsonl(args.path) if args.path.suffix == ".jsonl" else read_parquet(args.path)
        sources = {None: rows}
    elif args.name == "arithmetic":
        made = arithmetic.make_rows(arithmetic.from_options(args), args.prompt_template or "{question}")
        sources = {split: ((f"arithmetic {split}", row) for row in rows) for split, rows in made.items()}
    else:
        sources = {split: read_hub(hub) for split, hub in HUB_SETS[args.name].items()}
    for split, rows in sources.items():
        yield from ((split, place, row) for place, row in islice(rows, args.limit))


def prompt_length(row: Row, tokenizer: Any) -> int:
    """Length of a row's prompt in tokens, or without a tokenizer in characters."""
    if tokenizer:
        return len(encode_prompt(tokenizer, row))
    return sum(len(message["content"]) for message in row["responses_create_params"]["input"])


# --- Writing ----------------------------------------------------------------------------------------------------------


def json_line(row: Row) -> bytes:
    """A row as a line of JSON, in which infinity and NaN become null, dates and decimals text."""
    encode = partial(json.dumps, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    try:
        text = encode(row)
    except ValueError:
        text = encode(json.loads(json.dumps(row, default=str), parse_constant=lambda _: None))
    return text.encode() + b"\n"


class SplitWriter:
    """Writes one JSONL file and gathers its metrics; of a row only its length and two hashes stay in memory."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.args, self.file = args, open(path, "wb")  # noqa: SIM115 - closed by finish()
        self.count = dict.fromkeys(("rows", "duplicates", "duplicates_dropped", "bad_skipped", "too_long_dropped"), 0)
        self.lengths: list[int] = []
        self.seen: set[int] = set()
        self.answers: set[int] = set()
        self.sample: Row = {}

    def add(self, row: Row, line: bytes, length: int) -> None:
        """Write the row, --num-repeats times, unless it is too long, or repeats another with --dedup."""
        args, count, key = self.args, self.count, hash((row["question"], row["expected_answer"]))
        if args.dedup and key in self.seen:
            count["duplicates_dropped"] += 1
        elif args.max_prompt_length and length > args.max_prompt_length:
            count["too_long_dropped"] += 1
        else:
            count["rows"] += args.num_repeats
            count["duplicates"] += key in self.seen
            self.lengths += [length] * args.num_repeats
            self.seen.add(key)
            self.answers.add(hash(row["expected_answer"]))
            self.sample = self.sample or row
            self.file.write(line * args.num_repeats)

    def finish(self) -> Row:
        """Close the file and return the contents of *_metrics.json, which are the same for the same rows."""
        self.file.close()
        unit = "prompt_tokens" if self.args.tokenizer else "prompt_characters"
        return {**self.count, "distinct_answers": len(self.answers), unit: length_statistics(self.lengths)}


def length_statistics(lengths: list[int]) -> Row:
    mean, median = round(float(np.mean(lengths)), 3), float(np.median(lengths))
    return {"min": min(lengths), "max": max(lengths), "mean": mean, "median": median}


def split_of(question: str, args: argparse.Namespace) -> str:
    """The split of a question, by its hash, so that all its repeats are in the same split."""
    digest = hashlib.blake2b(f"{args.seed}/{question}".encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < args.validation_split * 2**64]


def write_splits(args: argparse.Namespace, tokenizer: Any, writers: dict[str, SplitWriter]) -> None:
    """Convert all rows. Raises ConfigError for a bad row without --skip-bad, or if a split is left without rows."""
    template, bad = None if args.name == "arithmetic" else args.prompt_template, []
    for split, place, raw in tqdm(read_all(args), unit=" rows", disable=None):
        try:
            if isinstance(raw, ValueError):
                raise raw
            row = convert(raw, template)
            line, length = json_line(row), prompt_length(row, tokenizer)
        except (ValueError, RecursionError) as error:
            bad.append(f"{place}: {error}")
            if not args.skip_bad:
                raise ConfigError(f"{bad[0]}; correct it, or leave such rows out with --skip-bad") from error
            (writers.get(split) or [*writers.values()][0]).count["bad_skipped"] += 1
        else:
            writers[split or split_of(row["question"], args)].add(row, line, length)
    skipped = f"{len(bad)} bad rows were skipped, the first: {bad[0]}" if bad else "no row was bad"
    for split, writer in writers.items():
        if not writer.count["rows"]:
            raise ConfigError(f"no rows are left for {split}.jsonl ({skipped}); nothing was written")
    print(skipped)


def prepare(args: argparse.Namespace) -> None:
    """Make the files in a temporary folder, then move them to their place."""
    output, splits = args.output, list(HUB_SETS.get(args.name, SPLITS))
    if args.name == "file" and args.validation_split in (0, 1):
        splits = [SPLITS[int(args.validation_split)]]
    for path in (output / f"{split}.jsonl" for split in splits):
        if path.exists() and not args.overwrite:
            raise ConfigError(f"{path} is already there; replace it with --overwrite, or choose another --output")
    if args.name in HUB_SETS or args.tokenizer:
        go_offline_if_unreachable()
    template = (args.chat_template, args.chat_template_kwargs)
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", *template) if args.tokenizer else None
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp_", dir=output.parent) as folder:
        writers = {split: SplitWriter(Path(folder) / f"{split}.jsonl", args) for split in splits}
        write_splits(args, tokenizer, writers)
        metrics = {split: writer.finish() for split, writer in writers.items()}
        for split in splits:
            text = json.dumps({"split": split, **metrics[split]}, indent=1)
            (Path(folder) / f"{split}_metrics.json").write_text(text)
        output.mkdir(exist_ok=True)
        for path in sorted(Path(folder).iterdir(), reverse=True):  # train.jsonl last: with it, `make` finds all there
            os.replace(path, output / path.name)
    for split, writer in writers.items():
        print(f"{output / split}.jsonl: {json.dumps(metrics[split])}")
        print(f"  first prompt: {json.dumps(writer.sample['responses_create_params']['input'], ensure_ascii=False)}")
        print(f"  its answer: {writer.sample['expected_answer']}")


# --- The command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all options)")


def template_text(text: str) -> str:
    """The template that the option gives, as text or as a file's name."""
    template = Path(text).read_text(encoding="utf-8") if os.path.isfile(text) else text
    if "{question}" not in template:
        raise argparse.ArgumentTypeError(f"no {{question}} in {text!r} (and no file of that name has it)")
    return template


def common_options() -> Parser:
    """The options of every NAME."""
    add = (common := Parser(add_help=False)).add_argument
    add("--output", type=Path, help="folder for the files (default data/NAME)")
    add("--overwrite", action="store_true", help="replace files that are already there")
    add("--limit", type=int, help="read only this many rows of each source")
    add("--num-repeats", type=int, default=1, help="write every row so often (AIME as often published: 32)")
    add("--seed", type=int, default=42, help="for arithmetic and --validation-split")
    add("--skip-bad", action="store_true", help="leave out and count bad rows instead of stopping at the first")
    own = "default: the row's own prompt where it has one, else " + json.dumps(MATH_TEMPLATE)
    add("--prompt-template", type=template_text, help="text with {question} in it, or a file with such a text; " + own)
    add("--tokenizer", help="model folder or hub name: measure prompts in tokens, with the chat template")
    add_template_options(common)
    add("--max-prompt-length", type=int, help="leave out longer prompts (tokens if --tokenizer, else characters)")
    common.set_defaults(dedup=False)
    return common


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser("prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    common = common_options()
    for name, hubs in HUB_SETS.items():
        names.add_parser(name, parents=[common], help=", ".join(hub.repo for hub in hubs.values()))
    local = names.add_parser("file", parents=[common], help="a local .jsonl or .parquet file; its path alone does, too")
    local.add_argument("path", type=Path)
    local.add_argument("--validation-split", type=float, default=0, help="share of questions for validation.jsonl")
    local.add_argument("--dedup", action="store_true", help="drop rows that repeat a question and answer")
    arithmetic.add_options(names.add_parser("arithmetic", parents=[common], help="sums, made here"))
    if argv and argv[0] not in names.choices and not argv[0].startswith("-"):
        argv = ["file", *argv]
    args = parser.parse_args(argv)
    for option in ("limit", "num_repeats", "max_prompt_length"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(args, option)} is below 1")
    if args.name == "file":
        if not args.path.is_file():
            parser.error(f"{args.path} is neither a known data set ({', '.join(names.choices)}) nor a file here")
        if args.path.suffix not in (".jsonl", ".parquet"):
            parser.error(f"{args.path} must end in .jsonl or .parquet; convert or rename it")
        if not 0 <= args.validation_split <= 1:
            parser.error(f"--validation-split {args.validation_split} is not between 0 and 1")
    vars(args).update(FIXED.get(args.name, {}))
    args.output = args.output or Path("data") / (args.path.stem if args.name == "file" else args.name)
    return args


def main(argv: list[str]) -> int:
    """The exit code: 0, or 2 after one line that says what is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # SystemExit removes temporary files
    try:
        prepare(parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except (ConfigError, OSError) as error:
        print(f"prepare_data.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
