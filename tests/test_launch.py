"""launch.py: what a run says before it starts and at its end, and a machine on which Ray was left running."""

import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from config import ConfigError, load_config
from launch import RunError, Stopped, StopRequests, check_before_start, run_main, start_ray

WITH_RAY = """
import os, signal, threading, ray, launch
from config import load_config

launch.start_ray(load_config("recipes/quickstart.yaml", []), launch.StopRequests(None))
print("nodes", len(ray.nodes()), "cluster", ray.get_runtime_context().gcs_address)
never = ray.remote(num_cpus=0)(lambda: signal.pause()).remote()
for wait in (lambda: ray.wait([never], timeout=2), lambda: ray.get(never, timeout=2)):
    stop = launch.StopRequests(None)
    stop.listen()
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with stop.interruptible():
            wait()
    except launch.Stopped as e:
        print("stopped by", e)
ray.shutdown()
"""
REFUSED = """
import os, ray._private.utils, launch
from config import load_config

def start():
    try:
        launch.start_ray(load_config("recipes/quickstart.yaml", []), launch.StopRequests(None))
    except launch.RunError as e:
        print(e)

ray._private.utils.compute_version_info = lambda: (ray.__version__, "3.99.0")  # as if this were another Python
start()
del os.environ["RAY_ADDRESS"]
start()
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


def test_no_ray_is_one_line(quickstart_overrides, monkeypatch, tmp_path):
    """A cluster that is gone, which Ray looks for during ten minutes; a folder whose path is too long for sockets."""
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", quickstart_overrides)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(RunError, match=r"^no Ray at RAY_ADDRESS=127.0.0.1:9: start it there, or unset RAY_ADDRESS \("):
        start_ray(cfg, StopRequests(None))
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(RunError, match=r"^no Ray on this machine \(OSError: .*path length cannot exceed 107 bytes"):
        start_ray(cfg, StopRequests(None))


@pytest.fixture(scope="module")
def beside_old_ray(tmp_path_factory) -> tuple[list[str], str, list[str]]:
    """What WITH_RAY prints on a machine where an earlier `ray start` was left running, and that Ray's address; and what
    REFUSED prints that tries to join it, and then to start one with an object store of a megabyte."""
    mark, token = f"test {os.getpid()}", tmp_path_factory.mktemp("ray") / "token"
    token.write_text("of the old Ray, which refuses those that do not know it")
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ray = Path(sys.executable).with_name("ray")
    subprocess.run(
        [ray, "start", "--head", "--port=0", "--include-dashboard=false", "--num-cpus=1"],
        check=True,
        capture_output=True,
        timeout=600,
        env=os.environ | secret | {"LEFT_BY": mark},
    )
    old = []
    try:
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or it is not ours
                old += [process] if process.environ().get("LEFT_BY") == mark else []
        address = next(found[1] for p in old if (found := re.search(r"gcs-address=(\S+:\d+)", " ".join(p.cmdline()))))
        done = subprocess.run(
            [sys.executable, "-c", WITH_RAY], capture_output=True, text=True, timeout=600, cwd=ROOT, check=True
        )
        small = {"RAY_ADDRESS": address, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "1000000"}
        refused = subprocess.run(
            [sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=600, cwd=ROOT, check=True,
            env=os.environ | secret | small,
        )  # fmt: skip
    finally:
        for process in old:
            with suppress(psutil.Error):
                process.kill()
    return done.stdout.splitlines(), address, refused.stdout.splitlines()


@pytest.mark.slow
def test_a_run_does_not_join_an_old_ray_and_does_not_stop_for_it(beside_old_ray):
    printed, address, _ = beside_old_ray
    assert printed[0].startswith("nodes 1 cluster ")
    assert address not in printed[0]


@pytest.mark.slow
def test_a_signal_while_ray_waits_stops_the_run(beside_old_ray):
    """Ray's compiled code makes a SystemError of a signal handler's exception, once what it waits for is over."""
    assert beside_old_ray[0][1:] == ["stopped by SIGTERM"] * 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_to_stop_that_ray_swallows_is_not_lost(number):
    """Its compiled code may return None instead of what the handler raised; what fails on that is the request."""
    stop, before = StopRequests(None), signal.getsignal(number)
    signal.signal(number, stop._receive)
    try:
        with pytest.raises(TypeError), stop.interruptible():
            iter(None)
        with pytest.raises(Stopped, match=number.name), stop.interruptible():
            with suppress(Stopped):
                os.kill(os.getpid(), number)
            iter(None)
        with pytest.raises(Stopped, match=number.name):
            stop.before_step(0.0)
    finally:
        signal.signal(number, before)


@pytest.mark.slow
def test_a_cluster_of_another_python_and_a_small_object_store(beside_old_ray):
    _, address, (other, small) = beside_old_ray
    assert other.startswith(f"no Ray at RAY_ADDRESS={address}: start it there, or unset RAY_ADDRESS (RuntimeError: ")
    assert "Version mismatch" in other and "Python: 3.99.0" in other
    assert small.startswith("no Ray on this machine (ValueError: ")
    assert "object store" in small or "object_store_memory" in small


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (None, None, ""),
        (ConfigError("a key"), "error: a key", ""),
        (RunError("a reason"), "error: a reason", ""),
        (Stopped("SIGTERM"), 85, "stopped by SIGTERM; the same command continues from what was saved\n"),
        (KeyboardInterrupt(), "error: interrupted", ""),
        (SystemExit(143), 143, ""),
        (ZeroDivisionError("no\nsense"), None, "error: ZeroDivisionError: no sense\n"),
    ],
)
def test_exit_codes_and_the_line_that_goes_with_them(raised, code, line, capsys):
    """sys.exit with a text prints it and exits with 1; so does Python after a traceback."""

    def script():
        if raised:
            raise raised

    expected = nullcontext()
    if raised:
        expected = pytest.raises(ZeroDivisionError if isinstance(raised, ZeroDivisionError) else SystemExit)
    with expected as found:
        run_main(script)
    if code:
        assert found.value.code == code
    assert capsys.readouterr().err == line
