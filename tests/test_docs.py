"""The commands of README.md and docs/ as they are printed: each is run, or read by its script's own parser, or has a
reason why it is not here."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import RECIPE, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import evaluate
import launch
import prepare_data
import reward_server

ELSEWHERE = {  # how a command begins, and where it is run instead: a test, or what it would take
    "make quickstart": "minutes; test_targets_of_make_exist, and test_console_and_loggers runs the recipe",
    "make test": "it is what runs this test",
    "gym env start --resources-server": "NeMo Gym's own; test_turns_and_tools_of_gym starts it",
    "gym env start --search-dir": "NeMo Gym's own; test_our_verifier_in_an_environment_server_of_gym asks that server",
    "gym eval run --no-serve": "it needs the command before; test_our_verifier_in_an_environment_server_of_gym",
    "make .venv/installed-gpu": "it installs gigabytes for a GPU; test_targets_of_make_exist",
    ".venv/bin/python prepare_data.py dapo17k": "the data set is on the network; its name is read below",
    "export EXP_NAME=first": "variables of the commands after it",
    "NUM_ACTOR_NODES=": "Slurm; test_dry_run_shows_what_would_run, and test_training_over_two_nodes submits a job",
}


def commands() -> list[str]:
    """Each command in a block of bash, without its comment, on one line."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            parts = [part.strip() for line in lines for part in re.sub(r"\s+# .*", "", line).split(" && ")]
            found += [" ".join(part.split()) for part in parts if part]
    return sorted(set(found))


def elsewhere(command: str) -> bool:
    return any(command.startswith(words) for words in ELSEWHERE)


def read_by_its_script(command: str, monkeypatch) -> None:
    """Let the script's own parser take the arguments; raises where it would refuse them."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    match script:
        case "train_grpo.py" | "sft.py" | "examples/rejection_sampling.py":
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            with pytest.raises(SystemExit) if "--help" in arguments else nullcontext():
                launch.read_config("")
        case "evaluate.py":
            evaluate.parse_args(arguments)
        case "prepare_data.py":
            with pytest.raises(SystemExit) if "--help" in arguments else nullcontext():
                prepare_data.parse_args(arguments)
        case "reward_server.py":
            reward_server.parse_arguments(arguments)
        case _:
            assert command in RUN_HERE, f"nothing here runs this command of the documentation: {command}"


def test_reasons_name_tests_that_exist():
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    named = {name for reason in ELSEWHERE.values() for name in re.findall(r"test_\w+(?!\w*\.py)", reason)}
    assert {name for name in named if f"{name}.py" not in {p.name for p in (ROOT / "tests").iterdir()}} <= defined
    assert [words for words in ELSEWHERE if not any(c.startswith(words) for c in commands())] == []


def test_targets_of_make_exist():
    """What they would run, without running it."""
    for target in ("quickstart", "test", "test-fast", "test-gpu", ".venv/installed-gpu"):
        done = subprocess.run(
            ["make", "-n", target, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


RUN_HERE = (
    "python prepare_data.py mine.parquet --validation-split 0.02 --output data/mine",
    "python train_grpo.py --help",
    "python train_grpo.py env.verifier=my_rewards.py:exact_match",
    "python plot_run.py logs --output run.png",
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the scripts, the README's reward, and data of one's own."""
    for path in [*ROOT.glob("*.py"), ROOT / "config.yaml", ROOT / "recipes", ROOT / "examples"]:
        (tmp_path / path.name).symlink_to(path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "my_rewards.py").write_text(next(block for block in blocks if "my_rewards.py" in block))
    rows = {"problem": [f"What is {n} + 1?" for n in range(60)], "answer": [str(n + 1) for n in range(60)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "mine.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_each_command_is_run_or_read_or_has_a_reason(command, folder, monkeypatch):
    if not elsewhere(command):
        read_by_its_script(command, monkeypatch)


@pytest.mark.slow
def test_commands_that_are_run_as_printed(folder, warm_model, arithmetic_rows):
    """With two steps of the quickstart as config.yaml. The README's reward pays an answer that is nothing but a number,
    which this model never gives: the run says that it learned nothing."""
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").write_text(
        f"defaults: {RECIPE}\n"
        f"policy: {{model_name: {warm_model}}}\n"
        f"data: {{train_jsonl_fpath: {arithmetic_rows}/train.jsonl, validation_jsonl_fpath: null}}\n"
        "grpo: {max_num_steps: 2, num_prompts_per_step: 8}\n"
        "logger: {log_dir: logs}\n"
    )
    assert set(RUN_HERE) <= set(commands())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )

    data, listed, trained, plotted = map(run, RUN_HERE)
    assert data.returncode == 0, data.stderr
    assert {p.name for p in (folder / "data" / "mine").iterdir()} >= {"train.jsonl", "validation.jsonl"}
    assert "grpo.num_prompts_per_step" in listed.stdout
    assert "nothing was learned: in none of the 2 steps" in trained.stderr, trained.stderr[-3000:]
    assert plotted.returncode == 0, plotted.stderr
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- requirements/


@pytest.mark.parametrize(("extra", "parts"), [("cpu", ["main", "cpu"]), ("dev", ["dev"]), ("gpu", ["gpu"])])
def test_locked_versions_are_those_that_pyproject_allows(extra, parts):
    """Every direct requirement is locked, to a version that it allows; there is nothing but names and versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {"main": project["dependencies"], **project["optional-dependencies"]}
    lines = (ROOT / "requirements" / f"{extra}.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in pinned)}
    for requirement in (Requirement(text) for part in parts for text in allowed[part]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
