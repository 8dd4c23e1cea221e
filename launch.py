"""Around a run: the command line, checks before anything starts, requests to stop, Ray and the placement of actors, and
errors, each with one line and an exit code.

As a script this file checks a configuration and starts nothing: `python launch.py [--config FILE] [key=value ...]`.
"""

import argparse
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import ray
import torch
from ray._private.node import Node
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from config import GRPO, Config, ConfigError, help_text, load_config


class RunError(RuntimeError):
    """Something outside the code stopped the run. The message is one line for the user."""


OUT_OF_MEMORY_ADVICE = (
    "lower policy.sequence_packing.train_mb_tokens (activations) or policy.generation.vllm_cfg.gpu_memory_utilization "
    "(KV cache), or set policy.dtensor_cfg.activation_checkpointing, policy.dtensor_cfg.reshard_after_forward, "
    "policy.generation.colocated.sleep or policy.dtensor_cfg.cpu_offload to true"
)
STOPPED = 85  # exit code of a run that was asked to stop


class Stopped(Exception):
    """The run was asked to stop before its last step. The message says by what."""


class StopRequests:
    """Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) and `checkpointing.checkpoint_must_save_by`: they raise `Stopped`.

    `Stopped` is raised between two steps. While a run starts and within `interruptible`, where a step has changed
    nothing yet, it is raised at once, or as soon as Ray's code returns. The same signal again, unless it is SIGUSR1,
    ends the process at once, with code 130 or 143.
    """

    def __init__(self, must_save_by: str | None):
        """`must_save_by`: DD:HH:MM:SS from now; None: no deadline."""
        self.deadline = float("inf")
        if must_save_by:
            days, hours, minutes, seconds = map(int, must_save_by.split(":"))
            self.deadline = time.monotonic() + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        self.reason, self.may_interrupt = "", True
        self.step_began, self.longest_step = None, 0.0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if name == self.reason != "SIGUSR1":
            sys.exit(128 + number)
        self.reason = name
        if self.may_interrupt:
            self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self.reason:
            self.may_interrupt = False
            raise Stopped(self.reason)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this a request to stop may end the work at any point."""
        self.may_interrupt = True
        try:
            self._raise_if_asked()
            yield
        except Exception:  # Ray's compiled code turns what a signal handler raises into a SystemError, or into None
            if self.reason:
                raise Stopped(self.reason) from None
            raise
        finally:
            self.may_interrupt = False

    def before_step(self, save_s: float) -> None:
        """Raise Stopped if a signal came, or if a step (as long as the longest) and a save would miss the deadline."""
        self.may_interrupt, now = False, time.monotonic()
        if self.step_began is not None:
            self.longest_step = max(self.longest_step, now - self.step_began)
        self.step_began = now
        if now + self.longest_step + save_s > self.deadline:
            self.reason = "checkpointing.checkpoint_must_save_by"
        self._raise_if_asked()


def check_before_start(cfg: Config) -> None:
    """Raise ConfigError for problems that the disk or the environment shows before anything starts."""
    files = {"train_jsonl_fpath": cfg.data.train_jsonl_fpath, "validation_jsonl_fpath": cfg.data.validation_jsonl_fpath}
    files |= {f"validation_sets.{name}.path": each.path for name, each in cfg.data.validation_sets.items()}
    for name, path in files.items():
        if path and not Path(path).is_file():
            raise ConfigError(f"data.{name}='{path}' does not exist; make it with prepare_data.py")
    has_key = {"WANDB_MODE", "WANDB_API_KEY"} & os.environ.keys() or (Path.home() / ".netrc").exists()
    if cfg.logger.wandb_enabled and not has_key:
        raise ConfigError(
            "logger.wandb_enabled=true but WANDB_API_KEY is not set; export it, or WANDB_MODE=offline, or pass "
            "logger.wandb_enabled=false"
        )
    if os.environ.get("RAY_ADDRESS"):
        return  # start_ray checks the machines of that cluster
    if cfg.cluster.num_nodes > 1:
        raise ConfigError(
            f"cluster.num_nodes={cfg.cluster.num_nodes} needs a Ray cluster over the nodes: start it with submit.sh, "
            "or pass cluster.num_nodes=1"
        )
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("cluster.gpus_per_node is above 0 but this machine has no GPU; pass cluster.gpus_per_node=0")


def lock_folder(folder: Path, key: str) -> IO[str]:
    """Make a folder that no other run may use while the returned file is open. `key` is the key that names it.

    Raises ConfigError if another run uses it, or if it cannot be written to.
    """
    where = f"{key}='{folder}'"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{key}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
    except BlockingIOError:
        raise ConfigError(f"another run is writing to {where}; wait for it or choose another") from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
            raise ConfigError(f"cannot write to {where} ({e.strerror}); choose another") from None
    return lock


def start_ray(cfg: Config, stop: StopRequests) -> Any:
    """Join the cluster at RAY_ADDRESS or start Ray here; reserve one bundle per rank. Returns the placement group.

    Bundles follow the nodes, the driver's first: bundle b is on node b // bundles per node, so ranks of a
    tensor-parallel group are neighbours. A policy rank and an engine with the same bundle share a GPU.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default Ray's workers let every other process go first
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")  # otherwise Ray keeps 3 KiB of every call
    here = str(Path(__file__).resolve().parent)
    env = {"env_vars": {"PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"}}
    options = {"runtime_env": env, "log_to_driver": False}
    try:
        if address := os.environ.get("RAY_ADDRESS"):
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself tries for ten minutes
            ray.init(address=address, **options)
        else:
            # ray.init has no options to leave out what takes seconds and is not used here: the dashboard's server, the
            # autoscaler, the log forwarder, and one Python process for each CPU.
            Node.start_api_server = Node.start_monitor = Node.start_log_monitor = lambda *_, **__: None
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            # "local" never joins a Ray that an earlier `ray start` left running.
            options |= {"num_cpus": cfg.num_bundles, "include_dashboard": False, "logging_level": "error"}
            ray.init(address="local", **options)
    except (OSError, RuntimeError, ValueError) as e:
        where = f"at RAY_ADDRESS={address}: start it there, or unset RAY_ADDRESS" if address else "on this machine"
        raise RunError(f"no Ray {where} ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None
    stop.listen()  # again, since ray.init has set handlers that print a native stack trace and end the process
    bundle = {"CPU": 1, "GPU": 1} if cfg.device == "cuda" else {"CPU": 1}
    ranks = cfg.bundles_per_node
    bundles = [bundle | {f"node:{address}": 0.001} for address in nodes_with(bundle, ranks, cfg) for _ in range(ranks)]
    placement = ray.util.placement_group(bundles)
    if not placement.wait(timeout_seconds=min(60.0, cfg.cluster.timeout_s)):
        raise RunError(
            f"{cfg.cluster.num_nodes} x {ranks} x {bundle} are not free on this Ray cluster: is another run on it? "
            f"Free now: { {k: v for k, v in ray.available_resources().items() if k in bundle} }"
        )
    return placement


def nodes_with(bundle: dict[str, int], ranks: int, cfg: Config) -> list[str]:
    """Addresses of `cluster.num_nodes` nodes that have `ranks` times `bundle`, the driver's own first."""
    here = ray.get_runtime_context().get_node_id()
    alive = sorted((n["NodeID"] != here, n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"])
    offers = {address: {k: has.get(k, 0) for k in bundle} for _, address, has in alive}
    fit = [address for address, has in offers.items() if all(has[k] >= v * ranks for k, v in bundle.items())]
    if len(fit) < cfg.cluster.num_nodes:
        raise RunError(
            f"cluster.num_nodes={cfg.cluster.num_nodes} with cluster.gpus_per_node={cfg.cluster.gpus_per_node} needs "
            f"{ranks} x {bundle} on each node, but Ray offers {offers}; correct these keys or add nodes"
        )
    return fit[: cfg.cluster.num_nodes]


class Actors:
    """Ray actors of one kind as one object. Every call has a deadline, `cluster.timeout_s`."""

    def __init__(
        self,
        worker: type,
        arguments: list[tuple],
        cfg: Config,
        placement: Any,
        bundles: list[int],
        gpus: float,
        env: dict[str, str],
    ):
        """Start an actor of class `worker` in each of `bundles`, with its `arguments` and, on GPUs, `gpus` of one.

        `env`: their environment variables. On a CPU each gets a share of the cores.
        """
        self.timeout_s, self.on_gpu = cfg.cluster.timeout_s, cfg.device == "cuda"
        threads = str(max(1, (os.cpu_count() or 1) // cfg.cluster.cpu_ranks_per_node))
        # Threads that spin while they wait make a step eight times as long as soon as anything else runs here.
        passive = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        on_cpu = {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind", **passive}
        actor = ray.remote(worker)

        def start(bundle: int, given: tuple) -> Any:
            return actor.options(
                num_cpus=0,
                num_gpus=gpus if self.on_gpu else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle),
                runtime_env={"env_vars": env if self.on_gpu else env | on_cpu},
            ).remote(*given)

        self.starters = [partial(start, *each) for each in zip(bundles, arguments, strict=True)]
        self.workers = [start_worker() for start_worker in self.starters]

    def all(self, method: str, *args: Any) -> list[Any]:
        """Call `method` of every actor and return their results."""
        return ray.get([getattr(w, method).remote(*args) for w in self.workers], timeout=self.timeout_s)


def check_gates(cfg: GRPO, metrics: dict[str, float], exceeded: dict[str, int]) -> None:
    """Raise RunError if a value is above its gate for `grpo.gate_patience` steps in a row, which `exceeded` counts.

    A step without an update says nothing about engine and trainer, so it leaves that gate's count as it is.
    """
    unverified = metrics["num_unverified"] / metrics["num_samples"]
    mismatch = metrics.get("token_mult_prob_error")
    server = "cannot verify the answers: look at reward_server.log in logger.log_dir, or above for lost episodes"
    engine = "engine and trainer disagree about the same answers: refit or precision is broken, or the run diverged"
    gates = [("max_unverified_fraction", unverified, server), ("max_token_mult_prob_error", mismatch, engine)]
    for name, value, reason in gates:
        gate = getattr(cfg, name)
        if gate is None or value is None:
            continue
        exceeded[name] = exceeded.get(name, 0) + 1 if value > gate else 0
        if exceeded[name] >= cfg.gate_patience:
            raise RunError(f"{value:.4g} is above grpo.{name}={gate} for {exceeded[name]} steps in a row; {reason}")


def explain(error: BaseException) -> str:
    """One line for errors whose own text does not say what to do."""
    if "CUDA out of memory" in str(error):
        return f"a GPU ran out of memory (checkpoints are intact): {OUT_OF_MEMORY_ADVICE}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "a disk or quota is full (checkpoints are intact); make room, and the same command continues"
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        if "creation task" in str(error):  # the last line of the trace says what was wrong
            trace = str(error).split("For further information visit")[0]  # without pydantic's last line
            return f"a policy or rollout actor could not start: {trace.strip().splitlines()[-1].strip()[:300]}"
        reason = " ".join(str(error).split())[:300]
        return f"a policy or rollout actor died, the run cannot go on (checkpoints are intact): {reason}"
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return "a policy or rollout actor did not answer within cluster.timeout_s; raise it, or look at Ray's logs"
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def read_config(description: str) -> Config:
    """The configuration that `[--config FILE] [section.key=value ...]` asks for; `--help` lists all keys."""
    parser = argparse.ArgumentParser(
        description=description, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="config.yaml", help="YAML file (default: config.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it (+ and ++ accepted)")
    args = parser.parse_intermixed_args()
    return load_config(args.config, args.overrides)


def run_main(function: Callable[[], Any]) -> None:
    """Run a script's main function, and turn an exception into one `error:` line and an exit code.

    0: finished. 1: error. 85: stopped as `StopRequests` says, and the same command continues. Raised elsewhere: 130 and
    143, for a second signal, and 2, for arguments that argparse refuses.
    """
    torch.set_num_threads(1)  # on a driver's small tensors threads would wait longer than they compute
    try:
        function()
    except (ConfigError, RunError) as e:
        sys.exit(f"error: {getattr(e, 'cause', e)}")  # `cause`: an actor's error without Ray's traceback
    except Stopped as e:
        print(f"stopped by {e}; the same command continues from what was saved", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except KeyboardInterrupt:  # before anything listens for it
        sys.exit("error: interrupted")
    except Exception as e:
        print(f"error: {explain(e)}", file=sys.stderr, flush=True)
        raise  # with the traceback after that line
    finally:
        ray.shutdown()


def main() -> None:
    """Check a configuration without starting anything; submit.sh does, before the job waits in a queue."""
    check_before_start(read_config(main.__doc__))


if __name__ == "__main__":
    run_main(main)
