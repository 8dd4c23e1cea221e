"""Fixtures: tiny random models made by the quickstart's own script, and configurations that run them."""

import copy
import fcntl
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import forked
import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
gc.disable()  # until all tests are imported: looking through what stays anyway takes seconds
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one takes seconds for a single example
hypothesis.settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for the network
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
torch.set_num_threads(1)  # tensors are tiny here: threads wait for each other longer than they compute

if not torch.cuda.is_available():  # Triton's interpreter runs the kernels in this process, which is settled on import
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401

    import attention  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share the run `started` come last: from the first of them on Ray runs in this process.

    Of test_failures.py the very last one leaves an engine behind that is dead.
    """
    sharing = [item for item in items if "started" in getattr(item, "fixturenames", ())]
    others = [item for item in items if item not in sharing]
    gc.freeze()
    gc.enable()
    items[:] = others + sorted(sharing, key=lambda item: item.path.name, reverse=True)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain at the end about what was not collected


@pytest.fixture(scope="session")
def arithmetic_rows(tmp_path_factory) -> Path:
    """Folder with train.jsonl and validation.jsonl of the quickstart's problems."""
    folder = tmp_path_factory.mktemp("rows")
    command = [sys.executable, str(ROOT / "prepare_data.py"), "arithmetic", "--kinds", "add", "--max-operand", "6"]
    subprocess.run([*command, "--num-train", "512", "--output", str(folder)], check=True, capture_output=True)
    return folder


def make_tiny_model(rows: Path, folder: Path, tied: bool = True, seed: int = 0) -> Path:
    """A random Qwen3 model of the quickstart's size, saved as a Hugging Face folder."""
    from quickstart_model import make_model, train_tokenizer

    torch.manual_seed(seed)
    texts = [json.loads(line)["question"] + r" \boxed{0123}" for line in (rows / "train.jsonl").open()]
    tokenizer = train_tokenizer(texts)
    model = make_model(tokenizer)
    if not tied:
        model.config.tie_word_embeddings = False
        model = type(model)(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(arithmetic_rows, tmp_path_factory) -> Path:
    return make_tiny_model(arithmetic_rows, tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied_model(arithmetic_rows, tmp_path_factory) -> Path:
    return make_tiny_model(arithmetic_rows, tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def warm_model(arithmetic_rows, pytestconfig) -> Path:
    """The quickstart's own warm-up on sums up to 6 + 6, where it takes seconds: right about one time in three.

    Kept in pytest's cache, by what it is made from. Of two processes of tests one makes it and the other waits.
    """
    script, data = ROOT / "recipes" / "quickstart_model.py", arithmetic_rows / "train.jsonl"
    made_from = hashlib.sha256(script.read_bytes() + data.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = pytestconfig.cache.mkdir("warm_model") / made_from
    command = [sys.executable, str(script), "--data", str(data), "--output", str(folder)]  # does nothing a second time
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder


@pytest.fixture
def quickstart_overrides(arithmetic_rows, tiny_model, tmp_path):
    """Overrides that run the quickstart recipe on the tiny model, with all output in tmp_path."""
    return [
        f"policy.model_name={tiny_model}",
        f"data.train_jsonl_fpath={arithmetic_rows}/train.jsonl",
        f"data.validation_jsonl_fpath={arithmetic_rows}/validation.jsonl",
        f"logger.log_dir={tmp_path}/logs",
        f"checkpointing.checkpoint_dir={tmp_path}/checkpoints",
        "grpo.reward_shaping.enabled=false",
    ]


# ---------------------------------------------------------------- a run in the tests' own process

BASE = [
    "grpo.num_prompts_per_step=16", "grpo.val_period=0", "grpo.val_at_start=false", "grpo.max_num_epochs=99",
    "grpo.max_num_steps=20", "checkpointing.enabled=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def forks() -> Iterator[int | None]:
    """Runs start by forks of the process with this id, see forked.py; where there is a GPU they do not."""
    with nullcontext() if torch.cuda.is_available() else forked.forks() as process:
        yield process


@pytest.fixture(scope="session")
def base(arithmetic_rows, warm_model) -> list[str]:
    data = [f"data.{split}_jsonl_fpath={arithmetic_rows}/{split}.jsonl" for split in ("train", "validation")]
    return [*BASE, *data, f"policy.model_name={warm_model}", "grpo.reward_shaping.enabled=false"]


@pytest.fixture(scope="session")
def started(forks, base, tmp_path_factory) -> Iterator[tuple[Any, Path]]:
    """A run that has made no step yet, and a folder with its state; its processes serve several tests."""
    import ray

    from config import load_config
    from train_grpo import Run

    folder = tmp_path_factory.mktemp("started")
    folders = [f"logger.log_dir={folder}", f"checkpointing.checkpoint_dir={folder}/checkpoints"]
    room = ["policy.max_total_sequence_length=256", "policy.sequence_packing.train_mb_tokens=8192"]
    run = Run(load_config(RECIPE, [*base, *folders, *room, "loss_fn.reference_policy_kl_penalty=0.001"]))
    (folder / "state").mkdir()
    run.policy.all("save", str(folder / "state"), lambda: None)
    assert {error for error, _ in run.policy.all("wait_saved")} == {None}
    yield run, folder / "state" / "training_state"
    run.rewards.close()
    ray.shutdown()


@pytest.fixture
def begin(started, base, tmp_path):
    """The run from its beginning, with other settings of what happens in the driver, or another learning rate."""
    import ray

    from checkpoint import Checkpoints
    from config import load_config
    from logger import Logger

    run, state = started

    def with_settings(*overrides: str) -> Any:
        cfg = load_config(RECIPE, [*base, f"logger.log_dir={tmp_path}/logs", *overrides])
        lr, rank = cfg.policy.optimizer.lr, run.policy.workers[0]
        ray.get(rank.__ray_call__.remote(lambda actor: setattr(actor.cfg.optimizer, "lr", lr)), timeout=60)
        run.policy.all("load", str(state))
        run.engines.refit()
        batches = run.rows.number_of_batches(cfg.grpo.num_prompts_per_step, cfg.grpo.max_num_epochs)
        steps = min(cfg.grpo.max_num_steps, batches)
        begun = copy.copy(run)
        begun.cfg, begun.log, begun.checkpoints = cfg, Logger(cfg), Checkpoints(cfg)
        begun.num_batches, begun.last_step, begun.learned = batches, steps, False
        return begun

    return with_settings


@pytest.fixture
def stopped_afterwards(forks) -> Iterator[None]:
    """For a test that starts a run in this process: its Ray ends, and signals go again where they went before."""
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    ray.shutdown()
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------- a run of the script


def overrides(base: list[str], model: Path, folder: Path, *more: str) -> list[str]:
    paths = [f"logger.log_dir={folder}/logs", f"checkpointing.checkpoint_dir={folder}/checkpoints"]
    return [*base, f"policy.model_name={model}", *paths, *more]


def run_script(given: list[str], folder: Path, script: str = "train_grpo.py", **env: str) -> CompletedProcess:
    """Run the script to its end; with the fixture `forks` by a fork."""
    done = forked.run([str(ROOT / script), "--config", str(RECIPE), *given], folder, os.environ | env, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    return done


@pytest.fixture(scope="session")
def two_ranks(arithmetic_rows, tmp_path_factory) -> list[str]:
    """Two ranks and engines. Few rows and dynamic sampling: the position in the data is not the step, and runs cross
    epochs. The second validation row has an answer that nobody can read.
    """
    folder = tmp_path_factory.mktemp("few")
    rows = folder / "train.jsonl"
    rows.write_text("".join((arithmetic_rows / "train.jsonl").read_text().splitlines(keepends=True)[:32]))
    validation = [json.loads(line) for line in (arithmetic_rows / "validation.jsonl").open()]
    validation[1]["expected_answer"] = "}{"
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
    return [
        "grpo.num_prompts_per_step=8", "grpo.num_generations_per_prompt=8",
        f"data.train_jsonl_fpath={rows}", f"data.validation_jsonl_fpath={folder}/validation.jsonl",
        "cluster.cpu_ranks_per_node=2",
        "grpo.val_period=2", "grpo.max_num_epochs=100", "grpo.num_val_generations_per_prompt=2",
        "grpo.max_val_samples=3", "logger.num_val_samples_to_print=5",
        "grpo.use_dynamic_sampling=true", "grpo.dynamic_sampling_max_gen_batches=2", "grpo.max_num_steps=6",
        "policy.scheduler.warmup_steps=3", "checkpointing.save_period=1", "checkpointing.keep_top_k=null",
        "logger.num_rollouts_to_save=-1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def whole(forks, two_ranks, warm_model, tmp_path_factory) -> Path:
    """All its steps without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "stdout").write_text(run_script(overrides(two_ranks, warm_model, folder), folder).stdout)
    return folder


# ---------------------------------------------------------------- what runs leave


def weights(run: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The policy's weights as a checkpoint has them."""
    from safetensors.torch import load_file

    folder.mkdir()
    run.policy.all("save", str(folder), lambda: None)
    run.policy.all("wait_saved")
    return load_file(folder / "model.safetensors")


def logged(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / f"{name}.jsonl").read_text().splitlines()]
