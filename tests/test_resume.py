"""Checkpoints and resume of the real script: bit for bit after any death, who may continue what, what is kept."""

import dataclasses
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import forked
import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, overrides, run_script
from test_policy import counts, free_address, random_batch, spawn
from test_run import BATCH, children, command, read, wait_for

from checkpoint import Checkpoints, Position, kept_steps, publish, remove, settings, steps_in
from config import Checkpointing, ConfigError, load_config
from launch import RunError, Stopped, StopRequests
from logger import best_and_worst, open_rows
from policy import PolicyWorker
from train_grpo import grpo_loss

STEPS = 6  # of `whole`


@pytest.fixture(scope="module")
def base(two_ranks) -> list[str]:
    return two_ranks


def timeless(path: Path) -> list[dict]:
    """Rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if "time/" not in k and "tokens_per_s" not in k} for row in read(path)]


def training_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer and random state of a checkpoint, put together from all ranks' shards."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "training_state", folder.parent / "state.pt")
    return torch.load(folder.parent / "state.pt")


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics, every answer, safetensors, float32 weights, optimizer and random state: bit for bit."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert timeless(a / "logs" / name) == timeless(b / "logs" / name), name
    last = [folder / "checkpoints" / f"step_{STEPS}" for folder in (a, b)]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    one, two = (training_state(folder) for folder in last)
    assert one.keys() == two.keys()
    assert {name for name in one if name.startswith("random.")} == {"random.0", "random.1"}
    assert len([name for name in one if name.startswith("exp_avg_sq.")]) > 20
    for name in one:
        assert torch.equal(one[name], two[name]), name
    positions = [json.loads((folder / "run.json").read_text())["position"] for folder in last]
    assert positions[0]["batches_drawn"] == positions[1]["batches_drawn"] > STEPS  # dynamic sampling had work to do


class Started:
    """The script as a process that can be killed; on leaving, with all it started.

    `forks`: the process of which it and its Ray workers are forks; None: it starts as a user starts it.
    """

    def __init__(self, given: list[str], folder: Path, forks: int | None = None):
        self.stdout, self.folder = folder / "stdout", folder
        with self.stdout.open("w") as out, (folder / "stderr").open("w") as err:
            if forks:
                self.process = forked.start(command(given)[1:], folder, dict(os.environ), out, err)
            else:
                self.process = subprocess.Popen(command(given), stdout=out, stderr=err, cwd=folder, process_group=0)
        self.above = psutil.Process(forks or self.process.pid)  # all that was started descends from it

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def wait_for(self, condition, what: str):
        def or_ended():
            assert self.process.poll() is None, f"ended before {what}: {(self.folder / 'stderr').read_text()[-3000:]}"
            return condition()

        return wait_for(or_ended, 600, what, pause=0.0005)

    def kill(self) -> None:
        """SIGKILL, also to what is suspended. All else ends by itself, Ray's agents up to a minute later."""
        if self.process.poll() is None:
            family, agents = self.above.children(recursive=True), children(self.above, "Agent")
            suspended = [p for p in children(self.above, "ray::") if p.status() == psutil.STATUS_STOPPED]
            for process in [self.process, *suspended]:
                process.kill()
            self.process.wait()
            assert psutil.wait_procs([p for p in family if p not in agents], timeout=120)[1] == []
            for agent in agents:
                with suppress(psutil.NoSuchProcess):
                    agent.kill()


def stop_by_ctrl_c(given: list[str], folder: Path) -> int:
    """As a terminal does, to all processes of the group: exit code 85, and every process gone.

    Returns the last finished step, saved although its turn had not come.
    """
    metrics = folder / "logs" / "metrics.jsonl"
    with Started([*given, "checkpointing.save_period=50"], folder) as run:
        run.wait_for(lambda: read(metrics) and read(metrics)[-1]["step"], "the first step")
        family = psutil.Process(run.process.pid).children(recursive=True)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.process.wait(timeout=240) == 85
    assert psutil.wait_procs(family, timeout=20)[1] == []
    lines = (folder / "stderr").read_text()
    assert "stopped by SIGINT; the same command continues from what was saved" in lines
    assert "received" not in lines
    assert "Traceback" not in lines
    last = read(metrics)[-1]["step"]
    assert f" • saved: '{folder}/checkpoints/step_{last}'\n" in (folder / "stdout").read_text()
    assert [p.name for p in (folder / "checkpoints").glob("*step*")] == [f"step_{last}"]
    return last


def kill_in_a_save(given: list[str], folder: Path, after: int, forks: int | None) -> Path:
    """SIGKILL the script and its ranks while they write a checkpoint and the engines sample the next step.

    `after`: the first steps, whose checkpoints are left alone. Returns what is left half-written.
    """
    checkpoints = folder / "checkpoints"
    with Started(given, folder, forks) as run:
        run.wait_for(lambda: (checkpoints / f"step_{after}").exists(), "the first checkpoint")
        ranks = children(run.above, "ray::PolicyWorker")
        assert len(ranks) == 2
        while True:
            unfinished = run.wait_for(lambda: list(checkpoints.glob("tmp_step_*/run.json")), "a save")[0].parent
            for rank in ranks:
                rank.suspend()
            if unfinished.exists():  # otherwise they were faster: wait for the next
                break
            for rank in ranks:
                rank.resume()
    return unfinished


@pytest.mark.slow
def test_validation(whole):
    """Two answers to each of three rows, all written, five printed; those that cannot be verified count for nothing."""
    answers = [row for row in read(whole / "logs" / "rollouts.jsonl") if row["split"] == "validation"]
    assert [(a["step"], a["prompt"]) for a in answers] == [(s, p) for s in (0, 2, 4, 6) for p in (0, 0, 1, 1, 2, 2)]
    assert [a["status"] == "unparsable_gold" for a in answers] == [False, False, True, True, False, False] * 4
    for metrics in read(whole / "logs" / "metrics.jsonl"):
        found = [a for a in answers if a["step"] == metrics["step"]]
        assert ("val:accuracy" in metrics) == bool(found)
        if found:
            assert metrics["val:accuracy"] == sum(a["reward"] for a in found) / 4
            assert metrics["val:num_unverified"] == 2
            assert metrics["val:avg_length"] == pytest.approx(sum(len(a["response_ids"]) for a in found) / 6)
            assert metrics["val:truncation_rate"] == pytest.approx(sum(a["truncated"] for a in found) / 6)
    printed = [line for line in (whole / "stdout").read_text().splitlines() if line.startswith("   [")]
    assert printed == [f"   [{a['reward']:.0f}] {a['text']!r}" for i, a in enumerate(answers) if i % 6 < 5]


@pytest.mark.slow
def test_a_stop_and_a_kill_change_nothing(forks, base, warm_model, whole, tmp_path):
    """One step or two, started as a user does; more by a process that is killed; the rest. What the kill left
    half-written is removed.
    """
    given = overrides(base, warm_model, tmp_path)
    stopped = stop_by_ctrl_c(given, tmp_path)
    assert stopped in (1, 2)
    unfinished = kill_in_a_save(given, tmp_path, after=stopped + 1, forks=forks)
    assert f"continuing after step {stopped}" in (tmp_path / "stdout").read_text()
    newest = int(unfinished.name.removeprefix("tmp_step_")) - 1
    assert unfinished.exists()
    assert max(steps_in(tmp_path / "checkpoints")) == newest
    printed = run_script(given, tmp_path).stdout
    assert f"continuing after step {newest}" in printed
    assert f"Step {newest}/{STEPS}" not in printed
    assert not list((tmp_path / "checkpoints").glob("tmp_*"))
    assert_same_run(whole, tmp_path)


# ---------------------------------------------------------------- who may continue what


@pytest.fixture
def opened(base, warm_model, whole):
    """Open the finished run's checkpoints with other settings, as a run that continues them does."""

    def open_with(*more: str) -> Checkpoints:
        gc.collect()  # errors raised before hold the Checkpoints that raised them, and these the lock
        recipe = ROOT / "recipes" / "quickstart.yaml"
        return Checkpoints(load_config(recipe, overrides(base, warm_model, whole, *more)))

    return open_with


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_other_data_and_another_model_are_refused(opened, base, warm_model, whole, tmp_path):
    rows = Path(base[len(BATCH)].partition("=")[2])
    (tmp_path / "copy.jsonl").write_text(rows.read_text())
    assert opened(f"data.train_jsonl_fpath={tmp_path}/copy.jsonl").position.step == STEPS  # contents count, not names
    (tmp_path / "other.jsonl").write_text(rows.read_text().replace("What", "what", 1))
    shutil.copytree(warm_model, tmp_path / "model")
    assert opened(f"policy.model_name={tmp_path}/model/").position.step == STEPS
    weights = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    for changed in (
        f"data.train_jsonl_fpath={tmp_path}/other.jsonl",
        f"data.validation_jsonl_fpath={tmp_path}/other.jsonl",
        f"policy.model_name={tmp_path}/model",
    ):
        with pytest.raises(ConfigError) as error:
            opened(changed)
        assert one_line(error).startswith(f"the contents (sha256) of {changed.partition('=')[0]} was ")
        assert f": to continue '{whole}" in one_line(error)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.optimizer.lr=0.001", "policy.optimizer.lr was 0.0004 and is 0.001: to continue '"),
        ("grpo.seed=43", "grpo.seed was 42 and is 43"),
        ("loss_fn.variant=gspo", "loss_fn.variant was grpo and is gspo"),
        ("policy.generation.temperature=0.5", "policy.generation.temperature was 1.0 and is 0.5"),
        ("policy.model_name=elsewhere", "is elsewhere"),
        ("data.chat_template_kwargs.enable_thinking=false", "was {} and is {'enable_thinking': False}"),
    ],
)
def test_another_experiment_is_refused(quickstart_overrides, tmp_path, override, words):
    a_checkpoint(config_of(tmp_path, quickstart_overrides), 1)
    with pytest.raises(ConfigError) as error:
        Checkpoints(config_of(tmp_path, quickstart_overrides, override))
    assert words in one_line(error)
    assert "to start anew choose another checkpointing.checkpoint_dir" in one_line(error)


@pytest.mark.slow
def test_more_steps_other_limits_and_other_machines_are_accepted(opened, capsys):
    engine = "policy.generation.vllm_kwargs.block_size=32"
    checkpoints = opened(
        "grpo.max_num_steps=99", "logger.num_rollouts_to_save=0", "cluster.cpu_ranks_per_node=1", engine
    )
    assert checkpoints.position.step == STEPS
    assert "2 ranks became 1: weights and optimizer state are redistributed" in capsys.readouterr().out


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(opened):
    first = opened()
    with pytest.raises(ConfigError, match="another run is writing to checkpointing.checkpoint_dir="):
        opened()
    del first
    assert opened().position.step == STEPS


def config_of(folder: Path, quickstart_overrides: list[str], *more: str):
    given = [*quickstart_overrides, f"checkpointing.checkpoint_dir={folder}", *more]
    return load_config(ROOT / "recipes" / "quickstart.yaml", given)


def test_folders_that_are_no_checkpoints(quickstart_overrides, tmp_path):
    for name in ("tmp_step_9/training_state", "tmp_step_rest", "step_x", "step_7/training_state"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"step_7' cannot be continued: run.json is missing, damaged or of another"):
        Checkpoints(config_of(tmp_path / "runs", quickstart_overrides))
    shutil.rmtree(tmp_path / "runs" / "step_7")
    assert Checkpoints(config_of(tmp_path / "runs", quickstart_overrides)).position == Position()
    assert [p.name for p in (tmp_path / "runs").glob("*step*")] == ["step_x"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to checkpointing.checkpoint_dir='.*file/runs' \(Not a dir"):
        Checkpoints(config_of(tmp_path / "file" / "runs", quickstart_overrides))


def a_checkpoint(cfg, step: int) -> Path:
    """What a run of this configuration leaves, with little in it."""
    folder = Path(cfg.checkpointing.checkpoint_dir) / f"step_{step}"
    folder.mkdir(parents=True)
    writer = dcp.FileSystemWriter(folder / "training_state")
    dcp.save({"weight": torch.ones(100)}, storage_writer=writer, no_dist=True)
    run = {"position": dataclasses.asdict(Position(step, step)), "wandb_id": None, "world_size": 1}
    (folder / "run.json").write_text(json.dumps(run | {"settings": settings(cfg)}))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_version(path: Path) -> None:
    path.write_text(path.read_text().replace("batches_drawn", "rows_drawn"))


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut, "run.json"),
        (of_another_version, "run.json"),
        (Path.unlink, "training_state/.metadata"),
        (cut, "training_state/.metadata"),
        (Path.unlink, "training_state/__0_0.distcp"),
        (cut, "training_state/__0_0.distcp"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_can_be_continued(
    quickstart_overrides, tmp_path, damage, name
):
    cfg = config_of(tmp_path / "runs", quickstart_overrides)
    a_checkpoint(cfg, 1)
    newest = a_checkpoint(cfg, 2)
    damage(newest / name)
    with pytest.raises(ConfigError) as error:
        Checkpoints(cfg)
    assert one_line(error).startswith(f"'{newest}' cannot be continued: {name} is missing, damaged or of another vers")
    assert f"move '{newest}' away to continue from the step_N before it" in one_line(error)
    del error  # it holds the Checkpoints that raised it, and these the lock
    gc.collect()
    newest.rename(tmp_path / "aside")
    assert Checkpoints(cfg).position == Position(1, 1)


# ---------------------------------------------------------------- the logs' rows


def test_logs_are_cut_back_to_the_step_that_is_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3)]
    path.write_text("".join(lines) + '{"step": 2')  # a death in the middle of a line
    open_rows(path, 2).close()
    assert path.read_text() == "".join(lines[:3])
    open_rows(path, 0).close()  # a new run
    assert (path.read_text(), path.with_name("metrics.jsonl.1").read_text()) == ("", "".join(lines[:3]))


@pytest.mark.parametrize("broken", ['{"step": 2, "rew\n', "[]\n", "{}\n", "\n"])
def test_a_broken_line_in_the_logs_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + broken + '{"step": 3}\n')
    before = path.read_text()
    with pytest.raises(ConfigError) as error:
        open_rows(path, 3)
    assert one_line(error) == f"{path} line 2 is broken; remove that line, or the whole file"
    assert path.read_text() == before


def test_rollouts_that_are_kept_are_spread_over_prompts():
    rewards = {0: [0.0, 1.0, 0.5, 1.0], 1: [0.2, 0.2, 0.2, 0.2], 2: [1.0, 0.0, 0.0, 0.0]}
    samples = [SimpleNamespace(prompt=p, reward=r) for p, group in rewards.items() for r in group]

    def kept(count: int) -> list[tuple[int, float]]:
        return [(s.prompt, s.reward) for s in best_and_worst(samples, count)]

    assert kept(4) == [(0, 0.0), (0, 1.0), (1, 0.2), (1, 0.2)]
    assert kept(6) == [*kept(4), (2, 0.0), (2, 1.0)]
    assert kept(8) == [*kept(6), (0, 0.5), (0, 1.0)]
    assert len(kept(100)) == 12
    assert kept(0) == []
    assert best_and_worst(samples, -1) == samples


# ---------------------------------------------------------------- writing


class InProcess:
    """One rank as the Policy that Checkpoints talks to, without Ray between."""

    def __init__(self, worker: PolicyWorker):
        self.all = lambda method, *args: [getattr(worker, method)(*args)]


def start_worker(cfg, rank: int, world_size: int, address: str) -> PolicyWorker:
    torch.set_num_threads(1)
    worker = PolicyWorker(cfg.policy, rank, world_size, "cpu", timeout_s=60)
    worker.setup(address)
    return worker


def step(worker: PolicyWorker, cfg, seed: int) -> None:
    batch = random_batch(8, seed)
    worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts(batch)})


def snapshot(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights, optimizer and random state."""
    state = worker._training_state()
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in state.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], but: str = "nothing") -> None:
    for name in a.keys() | b.keys():
        assert name.startswith(but) or torch.equal(a[name], b[name]), name


def rank_that_saves(rank: int, world_size: int, address: str, cfg) -> None:
    worker = start_worker(cfg, rank, world_size, address)
    policy, checkpoints = InProcess(worker), Checkpoints(cfg)
    step(worker, cfg, 1)
    first, gate = snapshot(worker), threading.Event()
    worker._writer.submit(gate.wait, 60)  # the thread that writes has other work for as long as we like,
    checkpoints.position = Position(1)
    checkpoints.save(policy)
    step(worker, cfg, 2)  # and the next step does not wait for it
    assert {p.name for p in checkpoints.dir.glob("*step*")} == {"tmp_step_1"}
    second = snapshot(worker)
    assert not torch.equal(first["weight.lm.model.norm.weight"], second["weight.lm.model.norm.weight"])
    gate.set()
    checkpoints.wait(policy)
    worker.load(str(checkpoints.dir / "step_1" / "training_state"))
    assert_equal(first, snapshot(worker))  # what was saved is the state before that step

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # a disk that takes no more
    checkpoints.position = Position(2)
    checkpoints.save(policy)
    with pytest.raises(RunError) as error:
        checkpoints.wait(policy)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said = rf"step_2 could not be written to '{checkpoints.dir}' \([\d.]+ GiB are free there\): .+"
    assert re.fullmatch(f"{said}; earlier ones are intact", one_line(error))
    assert list(steps_in(checkpoints.dir)) == [1]
    worker.load(str(checkpoints.dir / "step_1" / "training_state"))
    assert_equal(first, snapshot(worker))

    worker.cfg.precision, worker.loss_scale = "float16", 8.0
    worker.load(str(checkpoints.dir / "step_1" / "training_state"))
    assert worker.loss_scale == 8  # what was saved in float32 has none
    checkpoints.position = Position(3)
    checkpoints.save(policy)
    checkpoints.wait(policy)
    worker.loss_scale = 2.0
    worker.load(str(checkpoints.dir / "step_3" / "training_state"))
    assert worker.loss_scale == 8


@pytest.mark.slow
def test_saving_holds_nothing_up_and_a_full_disk_loses_nothing(quickstart_overrides, tmp_path):
    spawn(rank_that_saves, (1, free_address(), config_of(tmp_path / "checkpoints", quickstart_overrides)), 1)


def ranks_that_save(rank: int, world_size: int, address: str, cfg, folder: str) -> None:
    """Save after two updates, and leave there what follows; a third update and other random numbers are undone."""
    worker = start_worker(cfg, rank, world_size, address)
    for seed in (1, 2):
        step(worker, cfg, seed)
    torch.rand(1 + rank)
    state = snapshot(worker)
    assert not torch.equal(torch.rand(1), torch.zeros(1))
    torch.set_rng_state(state[f"random.{rank}"])
    worker.save(folder, lambda: None)
    drawn = torch.rand(3)
    step(worker, cfg, 3)
    assert worker.wait_saved()[0] is None
    after = snapshot(worker)
    worker.load(f"{folder}/training_state")
    assert_equal(state, snapshot(worker))
    assert torch.equal(torch.rand(3), drawn)
    if rank == 0:
        torch.save((state, after), f"{folder}/expected.pt")


def rank_that_continues(rank: int, world_size: int, address: str, cfg, folder: str) -> None:
    worker = start_worker(cfg, rank, world_size, address)
    worker.load(f"{folder}/training_state")
    state, after = torch.load(f"{folder}/expected.pt")
    assert_equal(state, snapshot(worker))
    step(worker, cfg, 3)
    for name, value in snapshot(worker).items():
        if not name.startswith("random."):
            torch.testing.assert_close(value, after[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_what_two_ranks_saved_one_continues(quickstart_overrides, tmp_path, tensor_parallel):
    """The same weights and optimizer state exactly, and the same next step but for rounding."""
    same, two = "policy.optimizer.eps=1e-3", "cluster.cpu_ranks_per_node=2"
    tp = f"policy.dtensor_cfg.tensor_parallel_size={tensor_parallel}"
    spawn(
        ranks_that_save, (2, free_address(), config_of(tmp_path, quickstart_overrides, same, two, tp), str(tmp_path)), 2
    )
    spawn(rank_that_continues, (1, free_address(), config_of(tmp_path, quickstart_overrides, same), str(tmp_path)), 1)


# ---------------------------------------------------------------- what is kept, and when to stop

NAN = math.nan
KEPT = {
    "best and latest": ({1: 0.5, 2: 0.9, 3: 0.7, 4: 0.1}, 1, True, {2, 4}),
    "latest among the best": ({1: 0.5, 2: 0.9, 3: 0.7}, 2, True, {2, 3}),
    "ties: newer": ({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.1}, 2, True, {2, 3, 4}),
    "lower is better": ({1: 0.5, 2: 0.9, 3: 0.1, 4: 0.7}, 1, False, {3, 4}),
    "ties, lower is better": ({1: 0.5, 2: 0.5, 3: 0.9}, 1, False, {2, 3}),
    "missing last": ({1: 0.1, 2: None, 3: None, 4: 0.0, 5: None}, 2, True, {1, 4, 5}),
    "missing last, lower is better": ({1: 0.1, 2: None, 3: 7.0, 4: None}, 2, False, {1, 3, 4}),
    "missing by age": ({1: None, 2: None, 3: None, 4: None}, 2, True, {3, 4}),
    "not a number last": ({1: 0.0, 2: NAN, 3: NAN}, 1, True, {1, 3}),
    "not a number is missing": ({1: None, 2: NAN, 3: None}, 2, True, {2, 3}),
    "infinite": ({1: math.inf, 2: -math.inf, 3: 0.0, 4: 0.0}, 1, True, {1, 4}),
    "all": ({1: 0.5, 2: None, 3: NAN}, None, True, {1, 2, 3}),
    "only the latest": ({1: 0.9, 2: 0.1}, 0, True, {2}),
    "fewer than wanted": ({7: 0.1}, 3, True, {7}),
    "numbers, not names": ({9: 0.1, 10: 0.2, 11: 0.0}, 1, True, {10, 11}),
    "none": ({}, 3, True, set()),
}


def test_a_death_while_a_checkpoint_is_removed_leaves_none_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "model.safetensors").touch()

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "step_1")
    assert steps_in(tmp_path) == {}


@pytest.mark.parametrize("case", KEPT)
def test_kept_steps(case):
    scores, keep, higher, expected = KEPT[case]
    assert kept_steps(scores, keep, higher) == expected
    assert kept_steps(dict(reversed(scores.items())), keep, higher) == expected


def test_retention_on_disk(tmp_path):
    """One checkpoint after the other; other folders stay."""
    cfg = Checkpointing(metric_name="val:accuracy", keep_top_k=2)
    (tmp_path / "mine").mkdir()
    kept = []
    for number, score in enumerate((0.5, 0.9, None, 0.9, NAN, 0.1), 1):
        folder = tmp_path / f"tmp_step_{number}"
        folder.mkdir()
        (folder / "run.json").write_text("{}")
        (folder / "metrics.json").write_text(json.dumps({} if score is None else {"val:accuracy": score}))
        publish(folder, cfg, "{{ messages }}")
        kept.append({int(p.name[5:]) for p in tmp_path.glob("*step*")})
    assert kept == [{1}, {1, 2}, {1, 2, 3}, {2, 4}, {2, 4, 5}, {2, 4, 6}]
    assert (tmp_path / "mine").exists()
    assert (tmp_path / "step_6" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_what_another_run_removed_is_not_published(tmp_path):
    """Ranks of a killed run may write on for a moment, into a folder that the next run has already removed."""
    (tmp_path / "tmp_step_3").mkdir()
    with pytest.raises(FileNotFoundError, match="was removed while it was being written"):
        publish(tmp_path / "tmp_step_3", Checkpointing(), None)
    assert steps_in(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("00:00:00:05", 5), ("00:03:45:00", 13500), ("01:00:00:00", 86400), ("10:01:01:01", 867661)],
)
def test_must_save_by(text, expected):
    before = time.monotonic()
    assert before + expected <= StopRequests(text).deadline <= time.monotonic() + expected


def test_a_step_that_would_miss_the_deadline_is_not_begun():
    """What counts is the longest step so far and the longest save."""
    StopRequests(None).before_step(save_s=1e9)
    stop = StopRequests("00:01:00:00")
    stop.before_step(save_s=3000.0)
    with pytest.raises(Stopped, match=r"^checkpointing.checkpoint_must_save_by$"):
        stop.before_step(save_s=3600.0)
    stop = StopRequests("00:01:00:00")
    stop.before_step(save_s=0.0)
    stop.step_began -= 2000.0  # as if that step had taken so long
    with pytest.raises(Stopped):
        stop.before_step(save_s=1600.0)
    stop = StopRequests("00:01:00:00")
    stop.before_step(save_s=0.0)
    stop.step_began -= 2000.0
    stop.before_step(save_s=1500.0)


def test_positions_survive_the_way_through_json():
    position = Position(3, 7, {"max_unverified_fraction": 2}, {"val:accuracy": 0.5})
    assert Position(**json.loads(json.dumps(dataclasses.asdict(position)))) == position
