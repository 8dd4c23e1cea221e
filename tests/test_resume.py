"""Checkpoints and resume of the real script: bit for bit after any death, who may continue what, what is kept."""

import subprocess
from pathlib import Path

import pytest
import torch
from test_run import BATCH, command, read

STEPS = 4


def overrides(base: list[str], model: Path, folder: Path, *more: str) -> list[str]:
    return [
        *base, *BATCH, f"policy.model_name={model}", f"logger.log_dir={folder}/logs", "grpo.val_period=2",
        f"checkpointing.checkpoint_dir={folder}/checkpoints", "checkpointing.save_period=1",
        "checkpointing.keep_top_k=null", f"grpo.max_num_steps={STEPS}", "policy.scheduler.warmup_steps=3",
        "logger.num_rollouts_to_save=-1", *more,
    ]  # fmt: skip


def timeless(path: Path) -> list[dict]:
    """Rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if "time/" not in k and "tokens_per_s" not in k} for row in read(path)]


def training_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint, put together from all ranks' shards."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "training_state", folder.parent / "state.pt")
    return torch.load(folder.parent / "state.pt")


def assert_same_run(a: Path, b: Path, step: int = STEPS) -> None:
    """Metrics, every answer, safetensors, float32 weights and optimizer state: bit for bit."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert timeless(a / "logs" / name) == timeless(b / "logs" / name), name
    last = [folder / "checkpoints" / f"step_{step}" for folder in (a, b)]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    one, two = (training_state(folder) for folder in last)
    assert one.keys() == two.keys()
    assert len([name for name in one if name.startswith("exp_avg_sq.")]) > 20
    for name in one:
        assert torch.equal(one[name], two[name]), name


def run_script(given: list[str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(given), capture_output=True, text=True, timeout=150, cwd=cwd)
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    return done


@pytest.fixture(scope="module")
def base(arithmetic_rows) -> list[str]:
    return [
        f"data.train_jsonl_fpath={arithmetic_rows}/train.jsonl",
        f"data.validation_jsonl_fpath={arithmetic_rows}/validation.jsonl",
    ]


@pytest.fixture(scope="module")
def whole(base, warm_model, tmp_path_factory) -> Path:
    """Four steps without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run_script(overrides(base, warm_model, folder), folder)
    return folder


@pytest.mark.slow
def test_two_and_two_steps_are_four(base, warm_model, whole, tmp_path):
    given = overrides(base, warm_model, tmp_path)
    run_script([*given, "grpo.max_num_steps=2"], tmp_path)
    done = run_script(given, tmp_path)
    assert "continuing after step 2" in done.stdout
    assert "Step 2/4" not in done.stdout
    assert_same_run(whole, tmp_path)
