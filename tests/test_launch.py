"""launch.py: what a run says before it starts, and a machine on which an earlier one left something."""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from conftest import ROOT
from test_run import wait_for

from config import ConfigError, load_config
from launch import check_before_start, leftovers, wait_for_loading

LOCAL_RUN = """
import ray, launch
from config import load_config

launch.start_ray(load_config("recipes/quickstart.yaml", []), launch.StopRequests(None))
print("nodes", len(ray.nodes()), "cluster", ray.get_runtime_context().gcs_address)
ray.shutdown()
"""

SIGNAL_IN_RAY = """
import os, signal, threading, ray, launch
from config import load_config

stop = launch.StopRequests(None)
launch.start_ray(load_config("recipes/quickstart.yaml", []), stop)
never = ray.remote(num_cpus=0)(lambda: signal.pause()).remote()
threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    with stop.interruptible():
        ray.WAIT
except launch.Stopped as e:
    print("stopped by", e)
ray.shutdown()
"""


def test_many_nodes_need_a_cluster(quickstart_overrides, monkeypatch):
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", [*quickstart_overrides, "cluster.num_nodes=2"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        ConfigError, match="cluster.num_nodes=2 needs a Ray cluster over the nodes: start it with submit"
    ):
        check_before_start(cfg)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_before_start(cfg)


@pytest.mark.slow
def test_a_run_beside_what_an_earlier_ray_left():
    """It neither joins the old Ray nor stops for it, and names its processes with the command that ends them."""
    before, mark = set(leftovers()), f"test {os.getpid()}"
    ray = Path(sys.executable).with_name("ray")
    subprocess.run(
        [ray, "start", "--head", "--port=0", "--include-dashboard=false", "--num-cpus=1"],
        check=True, capture_output=True, timeout=60, env=os.environ | {"LEFT_BY": mark},
    )  # fmt: skip
    try:
        old = {pid: name for pid, name in leftovers().items() if pid not in before}
        assert set(old.values()) >= {"raylet", "gcs_server"}
        port = next(
            re.search(r"gcs_server_port=(\d+)", c)[1] for p in old if "gcs_server_port" in (c := command_line(p))
        )
        done = subprocess.run(
            [sys.executable, "-c", LOCAL_RUN], capture_output=True, text=True, timeout=90, cwd=ROOT, check=True
        )
    finally:
        for process in psutil.process_iter():  # also the helpers that leftovers() does not name: they hold little
            with suppress(psutil.Error):  # it went with its parent
                if process.pid in set(leftovers()) - before or process.environ().get("LEFT_BY") == mark:
                    process.kill()
    assert "nodes 1 cluster" in done.stdout
    assert f":{port}" not in done.stdout
    warning = next(line for line in done.stderr.splitlines() if "warning" in line)
    assert warning.startswith("warning: left over from an earlier run")
    assert {int(pid) for pid in warning.rpartition("kill -9 ")[2].split()} >= set(old)
    wait_for(lambda: not set(old) & set(leftovers()), 20, "the end of the old processes")


def command_line(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline())


@pytest.mark.slow
def test_loading_fails_at_once_or_names_what_is_late(capsys):
    @ray.remote(num_cpus=0)
    def load(seconds: float | None) -> None:
        if seconds is None:
            raise ValueError("no such model")
        time.sleep(seconds)

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error")
    try:
        began = time.monotonic()
        with pytest.raises(ValueError, match="no such model"):
            wait_for_loading({"policy": [load.remote(None)], "engines": [load.remote(600)]}, 60)
        assert time.monotonic() - began < 30
        with pytest.raises(TimeoutError, match=r"not loaded within 10 s \(cluster.timeout_s\): engines$"):
            wait_for_loading({"policy": [load.remote(0)], "engines": [load.remote(0), load.remote(600)]}, 10)
        wait_for_loading({"policy": [load.remote(0)], "engines": [load.remote(0)]}, 60)
    finally:
        ray.shutdown()
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r" • loaded: (policy|engines) after \d+ s, (policy|engines) after \d+ s", line)


@pytest.mark.slow
@pytest.mark.parametrize("waiting", ["wait([never], timeout=2)", "get(never, timeout=2)"])
def test_a_signal_while_ray_waits_stops_the_run(waiting):
    """Ray's compiled code makes a SystemError of a signal handler's exception, once what it waits for is over."""
    command = [sys.executable, "-c", SIGNAL_IN_RAY.replace("WAIT", waiting)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["stopped by SIGTERM"], done.stderr
