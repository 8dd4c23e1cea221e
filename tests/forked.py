"""Runs of the tests as forks of one process that has imported torch, transformers and vLLM: most of a run's time.

What differs from a real start: imports came before, without Ray, whose library reads in its first moment who started
it; and a Ray worker is no child of its raylet, where a small process waits for it and ends as it does. Environment,
folder, output, signal mask and process group are those of a real start. Where nobody answers, a start is a real one.

With standard input this file is the process that is forked; in place of Ray's setup_worker.py it asks for a fork.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

SOCKET = "FORKED_SOCKET"  # environment variable: whom to ask, a name in Linux' abstract namespace of sockets
ENVIRONMENT = "--serialized-runtime-env-context="  # an argument of setup_worker.py


class Forked:
    """A fork that runs `python arguments`, with as much of subprocess.Popen as is used here. OSError if there is none.

    `files`: its stdin, stdout and stderr.
    """

    def __init__(self, arguments: list[str], folder: str, env: dict[str, str], files: list[Any]):
        if SOCKET not in os.environ:
            raise OSError("nobody to ask")
        mask = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]  # Ray blocks SIGINT in workers
        asked = {"arguments": arguments, "folder": folder, "env": env, "mask": mask, "group": os.getpgrp()}
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect("\0" + os.environ[SOCKET])
        socket.send_fds(self.connection, [json.dumps(asked).encode()], files)
        self.pid, self.returncode = self.answer(), None

    def answer(self) -> int:
        if not (said := self.connection.recv(100)):
            raise OSError("the process that is forked has ended")
        return int(said)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            self.returncode = self.answer()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(BlockingIOError):
            self.wait(0)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def run(arguments: list[str], folder: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """As subprocess.run([sys.executable, *arguments], capture_output=True, text=True) does."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(arguments, folder, env, out, err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


def start(arguments: list[str], folder: Path, env: dict[str, str], out: IO, err: IO) -> Forked | subprocess.Popen:
    """As subprocess.Popen([sys.executable, *arguments])."""
    with open(os.devnull) as stdin, suppress(OSError):
        return Forked(arguments, str(folder), env, [file.fileno() for file in (stdin, out, err)])
    return subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, env=env, cwd=folder)


def fork_workers() -> None:
    """Let a Ray that this process starts ask for forks. It joins the name to its own folder, so a whole path stays."""
    from ray._private import ray_constants

    ray_constants.SETUP_WORKER_FILENAME = __file__


@contextmanager
def forks() -> Iterator[int]:
    """Within it runs are forks: those by `run`, and the Ray workers of these and of this process. Gives the id of
    the process that is forked."""
    from ray._private import ray_constants

    ordinary, name = ray_constants.SETUP_WORKER_FILENAME, f"forked {os.getpid()}"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OPENBLAS_NUM_THREADS": "1"}
    env |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # which launch.py sets; read when torch is loaded
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind("\0" + name)
        server.listen()  # from here on one can ask; answers come after the imports
        command = [sys.executable, __file__, str(server.fileno())]
        fd = [server.fileno()]
        process = subprocess.Popen(command, env=env, pass_fds=fd, stdin=subprocess.PIPE, process_group=0)
    os.environ[SOCKET] = name
    fork_workers()
    yield process.pid
    ray_constants.SETUP_WORKER_FILENAME = ordinary
    del os.environ[SOCKET]
    process.stdin.close()
    process.wait(timeout=60)


def worker(arguments: list[str]) -> None:
    """In place of Ray's setup_worker.py."""
    try:
        fork = Forked([__file__, *arguments], os.getcwd(), dict(os.environ), [0, 1, 2])
    except OSError:
        import ray._private.workers.setup_worker as ordinary

        os.execv(sys.executable, [sys.executable, ordinary.__file__, *arguments])
    code = fork.wait()
    sys.exit(code if code >= 0 else 128 - code)


# ---------------------------------------------------------------- the process that is forked


code = 1  # with which a fork ends: that of an exception


def end() -> None:
    """What a fork does last of all: to take down what was imported would take seconds of processor time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare() -> None:
    """Import what drivers and workers do."""
    import atexit
    import gc

    atexit.register(end)  # as the first, since the last comes first
    gc.disable()
    sys.modules["ray"] = None
    import model  # noqa: F401

    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM  # noqa: F401

    del sys.modules["ray"]
    gc.freeze()
    gc.enable()


def serve(server: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for all who ask until standard input is closed. Returns, in each fork, what was asked for and the files."""
    import select

    running = {}  # by a descriptor that is readable when the fork has ended
    while True:
        for ready in select.select([0, server, *running], [], [])[0]:
            if ready is server:
                connection, _ = server.accept()
                asked, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                if not (pid := os.fork()):
                    for other in (server, connection, *(each for _, each in running.values())):
                        other.close()
                    for descriptor in running:
                        os.close(descriptor)
                    return json.loads(asked), files
                for file in files:
                    os.close(file)
                running[os.pidfd_open(pid)] = pid, connection
                connection.send(str(pid).encode())
            elif ready in running:
                pid, connection = running.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(OSError):
                    connection.send(str(code).encode())
                connection.close()
                os.close(ready)
            else:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)  # what a fork leaves for its own end would be seen here


def become(asked: dict[str, Any], files: list[int]) -> None:
    """Take over what differs between processes, and run the script."""
    import runpy

    import torch

    global code
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setpgid(0, asked["group"])
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["mask"])
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ |= asked["env"]
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    fork_workers()
    script, *arguments = asked["arguments"]
    if script == __file__:  # what Ray's setup_worker.py does
        environment = next(each for each in arguments if each.startswith(ENVIRONMENT)).removeprefix(ENVIRONMENT)
        update_envs(RuntimeEnvContext.deserialize(environment).env_vars)
        script, *arguments = [each for each in arguments if not each.startswith((ENVIRONMENT, "--language="))]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    sys.argv = [script, *arguments]
    own = [str(Path(script).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    sys.path[:] = dict.fromkeys(own + sys.path[1:])
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        raise  # prints a message


if __name__ == "__main__":
    if len(sys.argv) > 2:
        worker(sys.argv[1:])
    prepare()
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))
