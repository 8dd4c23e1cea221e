"""What a run does when its parts fail. docs/failures.md has a row for each case, with the name of its test."""

import dataclasses
import itertools
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import ray
import torch
from conftest import ROOT, logged, weights
from test_resume import steps_in
from test_run import BATCH, children, command, read, wait_for

import rollout
import train_grpo
from config import ConfigError
from gym import Episodes
from launch import RunError, Stopped, StopRequests, explain
from logger import Logger
from reward_client import RewardClient
from train_grpo import loop, sample_and_score, train

CLOCK = ("time/", "tokens_per_s", "_restarts")  # what differs between two runs of the same seed


def loop_of(run, folder: Path) -> tuple[list[dict], list[dict]]:
    """Metrics, less the clock's, and samples of a run that is finished here."""
    loop(run)
    run.log.close()
    metrics = [{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in logged(folder)]
    return metrics, logged(folder, "rollouts")


def change(worker, how) -> None:
    """Let an actor change itself."""
    ray.get(worker.__ray_call__.remote(how), timeout=60)


def die_in(worker, method: str, after: int) -> None:
    """Let an actor kill itself when a method of its own is called for the `after`-th time."""

    def arm(actor) -> None:
        original, calls = getattr(actor, method), itertools.count(1)

        def call(*args, **kwargs):
            if next(calls) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(actor, method, call)

    change(worker, arm)


# ---------------------------------------------------------------- within one started run


@pytest.mark.slow
def test_what_can_recover_recovers_within_the_step(begin, tmp_path, capfd):
    """The engine dies while it generates and the reward server before it is asked: all is as if they had not."""
    three = ["grpo.max_num_steps=3", "logger.num_rollouts_to_save=-1"]
    undisturbed = loop_of(begin(*three), tmp_path)
    run = begin(*three)
    die_in(run.engines.workers[0], "step", after=14)  # answers have 7 to 12 tokens: in the second batch
    run.rewards.process.kill()
    assert loop_of(run, tmp_path) == undisturbed
    metrics = logged(tmp_path)
    assert [m["engine_restarts"] for m in metrics] == [0, 1, 1]
    assert [m["reward_server_restarts"] for m in metrics] == [1, 1, 1]
    assert [m["num_unverified"] for m in metrics] == [0, 0, 0]
    said = capfd.readouterr().err
    assert "rollout engine 0 died, starting it again (" in said
    assert "reward server: it died with exit code -9, starting it again" in said


@pytest.mark.slow
def test_episodes_are_played_again_when_an_engine_dies(begin, tmp_path):
    (tmp_path / "once.py").write_text(
        "async def play(engine, row):\n"
        "    chat = row['responses_create_params']['input']\n"
        "    return [*chat, await engine.reply(chat)], 1.0\n"
    )
    run = begin(f"env.episode={tmp_path}/once.py:play")
    before = run.engines.restarts
    episodes = Episodes(run.cfg, run.tokenizer, run.stop_token_ids, run.engines.workers)
    die_in(run.engines.workers[0], "step", after=3)
    run.episodes = episodes
    samples = sample_and_score(run, run.rows, [4, 5, 6], 2, seed=1)
    episodes.close()
    assert [(s.prompt, s.status) for s in samples] == [(p, "correct") for p in (0, 0, 1, 1, 2, 2)]
    assert run.engines.restarts == before + 1


@pytest.mark.slow
def test_a_nan_in_a_gradient_changes_nothing(begin, tmp_path, monkeypatch):
    def loss(logprobs_T, *args, **kwargs):
        value, metrics = train_grpo.grpo_loss(logprobs_T, *args, **kwargs)
        return value + (logprobs_T - logprobs_T.detach()).abs().sqrt().sum(), metrics  # 0, with a gradient of 0 / 0

    run = begin()
    before = weights(run, tmp_path / "before")
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "grpo_loss", loss)
        with pytest.raises(RunError, match="gradient norm nan at step 1: not finite; the weights were not changed"):
            loop(run)
    after = weights(run, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(read(tmp_path / "logs" / "failed_step_1.jsonl")) == 128


@pytest.mark.slow
def test_empty_and_non_finite_answers_are_left_out(begin, tmp_path):
    """The first answer to each prompt is empty, the second has log-probabilities that are no numbers."""

    def spoil(actor) -> None:
        original = actor._group

        def group(output):
            found = original(output)
            found.response_ids[0], found.rollout_logprobs[0] = found.response_ids[0][:0], found.rollout_logprobs[0][:0]
            found.rollout_logprobs[1][:] = float("nan")
            return found

        actor._group = group

    run = begin("grpo.max_num_steps=2", "logger.num_rollouts_to_save=-1")
    change(run.engines.workers[0], spoil)
    loop(run)
    change(run.engines.workers[0], lambda actor: delattr(actor, "_group"))
    spoilt = [s for s in logged(tmp_path, "rollouts") if s["step"] == 1]
    tokens = [len(s["response_ids"]) for s in spoilt]
    assert (tokens[::8], 0 in tokens[1::8]) == ([0] * 16, False)
    metrics = logged(tmp_path)
    assert metrics[0]["num_nonfinite_logprobs"] == sum(tokens[1::8])
    assert all(0 < m["grad_norm"] < 10 for m in metrics)


@pytest.mark.slow
def test_a_full_disk_while_logging_is_one_line(begin):
    run = begin()
    run.log.metrics_file = open("/dev/full", "a")  # noqa: SIM115 - the run closes it
    with pytest.raises(OSError, match="No space left") as full:
        loop(run)
    assert explain(full.value) == (
        "a disk or quota is full (checkpoints are intact); make room, and the same command continues"
    )


@pytest.mark.slow
def test_two_runs_in_one_log_folder_are_refused(begin, tmp_path):
    run = begin()
    with pytest.raises(ConfigError, match="another run is writing to logger.log_dir='.*'; wait for it or choose anot"):
        Logger(run.cfg)
    run.log.close()
    Logger(run.cfg).close()
    (tmp_path / "file").touch()
    cfg = dataclasses.replace(run.cfg.logger, log_dir=f"{tmp_path}/file/logs")
    with pytest.raises(ConfigError, match=r"cannot write to logger.log_dir='.*' \(Not a directory\); choose another"):
        Logger(dataclasses.replace(run.cfg, logger=cfg))


@pytest.mark.slow
def test_a_time_limit_during_generation_saves_what_is_finished(begin, tmp_path, monkeypatch):
    """Slurm's signal comes in the second batch: its step is abandoned and the first one saved."""
    run = begin("checkpointing.enabled=true", f"checkpointing.checkpoint_dir={tmp_path}/checkpoints")
    run.rewards, run.stop, driver = RewardClient(run.cfg.env, tmp_path), StopRequests(None), os.getpid()
    run.stop.listen()

    def arm(actor) -> None:
        original, calls = actor.step, itertools.count(1)

        def step():
            if next(calls) == 14:
                os.kill(driver, signal.SIGUSR1)
            return original()

        actor.step = step

    change(run.engines.workers[0], arm)
    monkeypatch.setattr(train_grpo, "Run", lambda cfg: run)
    with pytest.raises(Stopped, match="SIGUSR1"):
        train(run.cfg)
    change(run.engines.workers[0], lambda actor: delattr(actor, "step"))
    assert list(steps_in(tmp_path / "checkpoints")) == [1]
    assert [m["step"] for m in logged(tmp_path)] == [1]


@pytest.mark.slow
def test_engines_that_go_on_dying_end_the_run(begin, monkeypatch):
    monkeypatch.setattr(rollout, "MOST_RESTARTS", 0)
    run = begin()
    die_in(run.engines.workers[0], "step", after=5)
    with pytest.raises(ray.exceptions.ActorDiedError) as dead:
        loop(run)
    said = "a policy or rollout actor died, the run cannot go on (checkpoints are intact): The actor died unexpectedly"
    assert explain(dead.value).startswith(said)
    assert "RolloutWorker" in explain(dead.value)


# ---------------------------------------------------------------- the script


@pytest.mark.slow
def test_death_of_the_reward_server_and_of_a_policy_rank(quickstart_overrides, arithmetic_rows, warm_model, tmp_path):
    """The first is restarted and the run goes on, also when its data file is cut off, since it has read it; the second
    ends it with a clear line and no process left behind."""
    data = tmp_path / "train.jsonl"
    data.write_bytes((arithmetic_rows / "train.jsonl").read_bytes())
    overrides = [*quickstart_overrides, *BATCH, f"policy.model_name={warm_model}", f"data.train_jsonl_fpath={data}"]
    overrides += ["grpo.max_num_steps=100000", "grpo.max_num_epochs=100000", "grpo.val_period=0"]
    overrides += ["grpo.val_at_start=false", "checkpointing.save_period=2"]
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        run = subprocess.Popen(command(overrides), stdout=subprocess.DEVNULL, stderr=stderr, cwd=tmp_path)
    process = psutil.Process(run.pid)
    metrics = tmp_path / "logs" / "metrics.jsonl"
    try:
        wait_for(lambda: len(read(metrics)) >= 2 or run.poll() is not None, 600, "the second step")
        os.truncate(data, 1000)
        children(process, "reward_server.py")[0].send_signal(signal.SIGKILL)
        wait_for(lambda: "starting it again" in errors.read_text(), 150, "the restart")
        before = len(read(metrics))
        wait_for(lambda: len(read(metrics)) >= before + 3, 300, "three more steps")
        assert read(metrics)[-1]["num_unverified"] == 0
        assert read(metrics)[-1]["reward_server_restarts"] == 1
        family = [p for p in process.children(recursive=True) if p.is_running()]
        children(process, "ray::PolicyWorker")[0].send_signal(signal.SIGKILL)
        assert run.wait(timeout=600) == 1
    finally:
        run.kill()
    lines = errors.read_text()
    assert "error: a policy or rollout actor died, the run cannot go on (checkpoints are intact)" in lines
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    assert steps_in(tmp_path / "checkpoints")


# ---------------------------------------------------------------- docs/failures.md


def test_every_row_of_the_page_names_a_test():
    page = (ROOT / "docs" / "failures.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named - defined == set()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    assert [row for row in rows if not re.search(r"`test_\w+`( \(.*\))? \|$", row)] == []
