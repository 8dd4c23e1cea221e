"""submit.sh and ray.sub on a real Slurm of two nodes (slurm_cluster.py): what runs, and how it fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, overrides
from slurm_cluster import SlurmCluster, missing
from test_run import read

needs_slurm = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
SECRET = "planted-secret-0123456789abcdef"
STEPS = 5
QUICK_TO_NOTICE = {f"RAY_health_check_{k}": v for k, v in
                   {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "3"}.items()}  # fmt: skip
# What a driver sees: its own nodes, not the other job's; ranks of a node are neighbours, the driver's node comes first
LOOK = """
import sys, ray, launch
from config import load_config

stop = launch.StopRequests(None)
overrides = ["cluster.num_nodes=2", "cluster.cpu_ranks_per_node=2"]
cfg = load_config("recipes/quickstart.yaml", overrides)
placement = launch.start_ray(cfg, stop)
nodes = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
where = ray.util.placement_group_table(placement)["bundles_to_node_id"]
print("nodes", *sorted(nodes.values()), "ranks", *(nodes[where[rank]] for rank in range(4)))
try:
    launch.nodes_with({"CPU": 1}, 2, load_config("recipes/quickstart.yaml", ["cluster.num_nodes=3"]))
except launch.RunError as e:
    print("error:", e)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


def variables(**given: str) -> dict[str, str]:
    """An environment for submit.sh: CPU, two nodes, two jobs fit on a node."""
    drop = ("SLURM", "SBATCH", "RAY_", "GLOO_", "COMMAND", "CONTAINER", "MOUNTS", "WANDB")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    needed = {
        "EXP_NAME": "test", "NUM_ACTOR_NODES": "2", "REPO_LOCATION": str(ROOT), "VENV": sys.prefix, "TIME": "00:20:00",
        "GPUS_PER_NODE": "0", "CPUS_PER_NODE": "2", "WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET,
    }  # fmt: skip
    return clean | needed | given


def submit(env: dict[str, str], *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "submit.sh"), *args], env=env, capture_output=True, text=True, timeout=240, cwd="/"
    )


class Job:
    """A submitted job."""

    def __init__(self, slurm: SlurmCluster, name: str, args: tuple[str, ...] = (), **given: str):
        self.slurm, self.folder = slurm, slurm.folder / name
        given |= {"EXP_NAME": name, "BASE_LOG_DIR": str(self.folder), "SLURM_CONF": slurm.env["SLURM_CONF"]}
        done = submit(variables(**given), *args)
        assert done.returncode == 0, done.stderr
        (self.folder / "submit.log").write_text(done.stdout + done.stderr)
        self.id = re.search(r"^job: +(\d+)", done.stdout, re.M)[1]
        self.logs = self.folder / f"{self.id}-logs"

    def log(self, name: str) -> str:
        path = self.folder / f"slurm-{self.id}.log" if name == "job" else self.logs / name
        return path.read_text() if path.exists() else ""

    def show(self, field: str) -> str:
        return re.search(rf"\b{field}=(\S*)", self.slurm.slurm("scontrol", "show", "job", self.id))[1]

    def wait(self, condition, seconds: float, what: str):
        try:
            return self.slurm.wait(condition, seconds, f"job {self.id}: {what}")
        except AssertionError as e:
            logs = [p for p in [self.folder / f"slurm-{self.id}.log", *self.logs.glob("*.log")] if p.exists()]
            raise AssertionError("\n".join([str(e), *(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in logs)])) from e

    def exit_code(self, seconds: float) -> str:
        """Exit code (and signal) once it has ended."""
        self.wait(lambda: self.show("JobState") not in ("PENDING", "RUNNING"), seconds, "did not end")
        return self.show("ExitCode")


def no_secret_in_logs(slurm: SlurmCluster, *more: Path) -> None:
    """What submit.sh printed, the jobs' and drivers' logs, Ray's own logs that were kept; not Slurm's private state."""
    found = [p for folder in (slurm.folder, *more) for p in folder.rglob("*") if p.is_file()]
    assert {p.name for p in found} >= {"submit.log", "driver.log", "ray-n1.log", "raylet.out"}
    logs = [p for p in found if not p.is_relative_to(slurm.folder / "state")]
    assert [p for p in logs if SECRET.encode() in p.read_bytes()] == []


def no_secret_in_command_lines() -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert SECRET.encode() not in path.read_bytes()
        except OSError:  # it ended while we looked
            continue


@needs_slurm
@pytest.mark.slow
def test_two_jobs_share_the_nodes_one_idle_and_attached_one_failing(slurm):
    """Each sees its own two-node Ray, spreads ranks node by node, says what does not fit; exit codes come through."""
    (slurm.folder / "look.py").write_text(LOOK)
    seen = slurm.folder / "seen"
    failing = Job(
        slurm,
        "failing",
        COMMAND=f"until [[ -e {seen} ]]; do sleep 0.1; done; PYTHONPATH=. python {slurm.folder}/look.py && exit 7",
    )
    idle = Job(slurm, "idle", COMMAND="")
    idle.wait(lambda: "idle cluster" in idle.log("job"), 60, "no idle cluster")
    failing.wait(lambda: "all 2 nodes have joined" in failing.log("job"), 60, "no cluster")
    no_secret_in_command_lines()
    environments = list((slurm.folder / "state").rglob("environment"))
    assert len(environments) == 2
    assert all(SECRET.encode() in p.read_bytes() and p.stat().st_mode & 0o077 == 0 for p in environments)
    assert (idle.logs / "ray-token").stat().st_mode & 0o777 == 0o600

    attached = subprocess.run(
        ["bash", str(idle.logs / "attach.sh"), "env", "PYTHONPATH=.", "python", str(slurm.folder / "look.py")],
        env=slurm.env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    seen.touch()
    assert failing.exit_code(40) == "7:0", failing.log("job") + failing.log("driver.log")
    for output in (attached.stdout, failing.log("driver.log")):
        assert "nodes n1 n2 ranks n1 n1 n2 n2" in output
        assert (
            "error: cluster.num_nodes=3 with cluster.gpus_per_node=0 needs 2 x {'CPU': 1} on each node, but" in output
        )
    assert idle.show("JobState") == "RUNNING"
    slurm.slurm("scancel", idle.id)
    idle.exit_code(30)
    slurm.wait(lambda: slurm.states() == {"idle"}, 20, "the nodes are still busy")
    assert not (idle.logs / "ray-token").exists()
    no_secret_in_logs(slurm)


@needs_slurm
@pytest.mark.slow
def test_worker_that_never_joins_is_named(slurm):
    """On n2 alone `ray` hangs: the job ends at the deadline, with the node's name and what it said last."""
    stuck = slurm.folder / "stuck"
    stuck.write_text("#!/bin/sh\necho waiting for a disk; exec sleep 1000\n")
    stuck.chmod(0o755)
    with slurm.replaced("n2", Path(shutil.which("ray", path=f"{sys.prefix}/bin")), stuck):
        job = Job(slurm, "stuck-node", COMMAND="true", JOIN_TIMEOUT="12")
        assert job.exit_code(60) == "1:0"
    log = job.log("job")
    assert re.search(r"error: after 12 s \(JOIN_TIMEOUT\) not joined with 0 GPUs: n2; to leave", log), log
    assert "ray-n2.log\nwaiting for a disk" in log
    assert job.log("driver.log") == ""


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_training_over_two_nodes(slurm, two_ranks, whole, warm_model, tmp_path):
    """It learns as on one machine, through a save and requeue on SIGUSR1; then a node dies and the job ends."""
    differently = [
        "cluster.cpu_ranks_per_node=1", "cluster.timeout_s=100", "grpo.max_num_steps=100000",
        "grpo.max_num_epochs=100000", "grpo.val_at_start=false", "grpo.val_period=0", "checkpointing.save_period=1000",
    ]  # fmt: skip
    given = overrides(two_ranks, warm_model, tmp_path, *differently)
    job = Job(slurm, "train", ("--config=recipes/quickstart.yaml", *given), REQUEUE="1", **QUICK_TO_NOTICE)
    metrics = tmp_path / "logs" / "metrics.jsonl"
    job.wait(lambda: len(read(metrics)) >= 2, 100, "no second step")
    no_secret_in_command_lines()
    slurm.slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.wait(lambda: "requeue" in job.log("job") or job.show("Restarts") == "1", 40, "not requeued")
    saved = [int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step_*")]
    assert len(saved) == 1
    job.wait(lambda: len(read(metrics)) >= max(STEPS, saved[0] + 2), 150, "did not go on")
    assert f"continuing after step {saved[0]}" in job.log("driver.log")

    slurm.kill_node("n2")
    assert job.exit_code(60) == "1:0"
    assert "error: a policy or rollout actor died, the run cannot go on" in job.log("driver.log")
    slurm.start_node("n2")
    no_secret_in_logs(slurm, tmp_path)
    steps, alone = read(metrics), [m for m in read(whole / "logs" / "metrics.jsonl") if m["step"]]
    assert [m["step"] for m in steps] == list(range(1, len(steps) + 1))
    for ours, theirs in zip(steps[:STEPS], alone[:STEPS], strict=True):
        assert ours["reward"] == theirs["reward"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


# ---------------------------------------------------------------- submit.sh alone


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"EXP_NAME": "", "NUM_ACTOR_NODES": ""}, "error: set EXP_NAME NUM_ACTOR_NODES; see the head of submit.sh"),
        ({"EXP_NAME": "a/b"}, "error: EXP_NAME='a/b' names a folder and a job"),
        ({"NUM_ACTOR_NODES": "two"}, "error: NUM_ACTOR_NODES='two' is not a number of nodes"),
        ({"REPO_LOCATION": "/nowhere"}, "error: REPO_LOCATION='/nowhere' does not hold ray.sub and train_grpo.py"),
        ({"CONTAINER": "image.sqsh"}, "error: CONTAINER is set but MOUNTS is not"),
        ({"VENV": "/nowhere"}, "error: no Ray in VENV=/nowhere"),
    ],
)
def test_submit_says_what_is_missing(given, words):
    done = submit(variables(**given), "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith(words)


@pytest.mark.slow
def test_dry_run_shows_what_would_run(quickstart_overrides):
    """The user's arguments win over what the variables imply; a wrong key is said before anything is submitted."""
    args = ["--dry-run", "--config=recipes/quickstart.yaml", *quickstart_overrides[:3], "++cluster.num_nodes=1"]
    done = submit(variables(ACCOUNT="math", PARTITION="gpu", REQUEUE="1"), *args)
    assert done.returncode == 0, done.stderr
    driver, slurm = done.stdout.splitlines()
    assert driver.endswith(
        "++cluster.num_nodes=1 cluster.gpus_per_node=0 logger.log_dir=results/test logger.wandb.name=test "
        "checkpointing.checkpoint_dir=results/test "
    )
    for option in ("--account=math", "--partition=gpu", "--requeue", "--nodes=2", "--cpus-per-task=2"):
        assert option in slurm.split()
    assert SECRET not in done.stdout
    wrong = submit(variables(), *args, "grpo.max_num_step=3")
    assert wrong.returncode == 1
    assert "Did you mean" in wrong.stderr and "'max_num_steps'" in wrong.stderr
    assert wrong.stdout == ""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here: apt-get install shellcheck")
def test_shellcheck():
    done = subprocess.run(
        ["shellcheck", ROOT / "submit.sh", ROOT / "ray.sub", ROOT / ".ci" / "run"], capture_output=True, text=True
    )
    assert done.stdout == ""
