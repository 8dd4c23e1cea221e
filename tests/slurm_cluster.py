"""A real Slurm of two nodes on one machine, for test_slurm.py. Needs root and Debian's slurm-wlm, munge, iproute2.

Each node daemon has its own network namespace (address, loopback, ports) and host name; a bridge joins them with the
controller. So two Ray nodes meet over a network, as on two machines, while all files are shared.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "unshare", "nsenter")
NODES = ("n1", "n2")
SLURM_CONF = """
ClusterName=test
SlurmctldHost=controller({network}.1)
SlurmUser=root
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdTimeout=60
KillWait=5
ReturnToService=2
NodeName=n1 NodeAddr={network}.11 CPUs=4 RealMemory=4000
NodeName=n2 NodeAddr={network}.12 CPUs=4 RealMemory=4000
PartitionName=test Nodes=n1,n2 Default=YES
"""


def missing() -> str:
    """Why this machine cannot run the cluster; empty if it can."""
    if os.geteuid() != 0:
        return "a Slurm in network namespaces needs root"
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge iproute2"
    links = "ip link add type veth && ip link add type bridge && mount --bind /etc/hosts /etc/hosts"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "sh", "-c", links], capture_output=True, text=True)
    return f"no network namespaces here: {' '.join(probe.stderr.split())}" if probe.returncode else ""


def run(*command: str, check: bool = True, **kwargs: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **kwargs)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout} {done.stderr}"
    return done.stdout


class SlurmCluster:
    """Started by the constructor; `stop` ends every process in it and removes its namespaces."""

    def __init__(self, folder: Path):
        self.folder, self.prefix = folder, f"g{os.getpid()}"
        # ray.sub names folders in /tmp by the job: let them not be those of another test's cluster on this machine
        self.first_job = 1 + os.getpid() % 100_000 * 100
        self.network = f"10.213.{os.getpid() % 250}"
        self.daemons: dict[str, subprocess.Popen] = {}
        self.env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
        for name in ("state", *(f"spool-{n}" for n in NODES)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(folder=folder, network=self.network, first_job=self.first_job)
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is used, but slurmd wants one
        hosts = [f"{self.network}.{i} {name}" for i, name in ((1, "controller"), (11, "n1"), (12, "n2"))]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        run("ip", "link", "add", f"{self.prefix}br", "type", "bridge")
        run("ip", "addr", "add", f"{self.network}.1/24", "dev", f"{self.prefix}br")
        run("ip", "link", "set", f"{self.prefix}br", "up")
        run("mungekey", "--create", f"--keyfile={self.folder}/munge.key")
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon(
            "munged", "munged", "--foreground", "--force", *(f"--{k}={self.folder}/munge.{v}" for k, v in munge.items())
        )
        self.wait(lambda: (self.folder / "munge.socket").exists(), 20, "munged did not start")
        conf = f"{self.folder}/slurm.conf"
        self._daemon("slurmctld", *self._host("controller"), "slurmctld", "-D", "-f", conf)
        for i, node in enumerate(NODES):
            namespace, here, there = f"{self.prefix}{node}", f"{self.prefix}v{i}", f"{self.prefix}w{i}"
            run("ip", "netns", "add", namespace)
            run("ip", "link", "add", here, "type", "veth", "peer", "name", there)
            run("ip", "link", "set", here, "master", f"{self.prefix}br")
            run("ip", "link", "set", there, "netns", namespace)
            run("ip", "-n", namespace, "addr", "add", f"{self.network}.{11 + i}/24", "dev", there)
            run("ip", "-n", namespace, "link", "set", there, "up")
            run("ip", "-n", namespace, "link", "set", "lo", "up")
            self.start_node(node)
        self.wait(lambda: self.states() == {"idle"}, 30, "the nodes did not come up")

    def _host(self, name: str) -> list[str]:
        """What to put before a command to run it on a machine called `name`."""
        script = f'hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec "$0" "$@"'
        return ["unshare", "--uts", "--mount", "sh", "-c", script]

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log, env=self.env)

    def start_node(self, node: str) -> None:
        run("ip", "link", "set", f"{self.prefix}v{NODES.index(node)}", "up")
        network = f"--net=/run/netns/{self.prefix}{node}"
        conf = f"{self.folder}/slurm.conf"
        self._daemon(node, "nsenter", network, *self._host(node), "slurmd", "-D", "-N", node, "-f", conf)

    def pids(self, node: str) -> list[int]:
        return [int(p) for p in run("ip", "netns", "pids", f"{self.prefix}{node}", check=False).split()]

    def kill_node(self, node: str) -> None:
        """The machine loses power: nothing on it says goodbye, and the network falls silent first."""
        run("ip", "link", "set", f"{self.prefix}v{NODES.index(node)}", "down")
        for pid in self.pids(node):
            os.kill(pid, signal.SIGKILL)

    @contextmanager
    def replaced(self, node: str, path: Path, by: Path) -> Iterator[None]:
        """Within, the file at `path` is the one at `by`, on that node only."""
        inside = ["nsenter", "--mount", f"--target={self.daemons[node].pid}"]
        run(*inside, "mount", "--bind", str(by), str(path.resolve()))
        yield
        run(*inside, "umount", str(path.resolve()))

    def states(self) -> set[str]:
        return set(self.slurm("sinfo", "-h", "-o", "%T").split())

    def slurm(self, *command: str) -> str:
        return run(*command, env=self.env)

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        deadline = time.monotonic() + 4 * seconds  # four times what a quiet machine needs
        while not (found := condition()):
            if time.monotonic() > deadline:
                logs = [f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log"))]
                raise AssertionError("\n".join([f"{what} ({seconds} s)", *logs]))
            time.sleep(0.1)
        return found

    def stop(self) -> None:
        for node in NODES:
            for pid in self.pids(node):
                os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for node in NODES:
            run("ip", "netns", "del", f"{self.prefix}{node}", check=False)
        for link in ("v0", "v1", "br"):
            run("ip", "link", "del", f"{self.prefix}{link}", check=False)
        for job in range(self.first_job, self.first_job + 100):  # a killed node leaves its own
            for node in range(len(NODES)):
                shutil.rmtree(f"/tmp/ray-{job}-{node}", ignore_errors=True)
