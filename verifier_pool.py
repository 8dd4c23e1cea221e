r"""Processes that compute one verdict at a time and are killed at a deadline, whatever a model writes.

    pool = WorkerPool("math", size=4, deadline=1.0)
    pool.run("x+x", b'{"expected_answer": "2x"}').status      # "correct"

    this process --socket--> nursery: imports sympy and the verifier once, then forks a worker for each request
         \--socket per worker--> worker: reads [text, row], calls verifier(text, row), replies; all in lines of JSON

- A worker that computes for longer than the deadline is killed; to fork another costs milliseconds. The deadline is in
  seconds of CPU, so that a busy machine loses no verdict; one that sleeps or stops has `PATIENCE` times that by the
  clock.
- A worker has a memory limit, writes no file, opens no socket, starts no program, and does not see the environment.
- The nursery and all workers end with this process, however it ends (or as soon as the nursery's imports are done). If
  the nursery dies or stops, another is started. `multiprocessing`'s forkserver does none of this, imports the caller's
  script, and serves all its users with one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pkgutil
import queue
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, BinaryIO, NamedTuple

import math_verifier

START_SECONDS = 60.0  # for the nursery's imports
FORK_SECONDS = 5.0
PATIENCE = 5  # times the deadline, by the clock
MEMORY_MB = 1_024
MAX_GROWTH_MB = 256  # after which a worker is replaced
STATUSES = ("correct", "wrong", "no_answer", "unparsable_gold", "timeout", "judge_failed")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says. A reward may be trained on only if it is `verified`: a time-out is not a wrong answer."""

    reward: float
    status: str  # one of STATUSES
    extracted_answer: str | None = None
    reason: str | None = None  # why it is not verified, for people
    evaluations: list[dict[str, Any]] | None = None  # what the LLM judge was asked and said; None: it was not asked

    @property
    def verified(self) -> bool:
        """Whether the reward may be trained on."""
        return self.status in ("correct", "wrong", "no_answer")


def math_verdict(gold: str, answer: str | None, algebra: bool = False) -> Verdict:
    """The verdict on an extracted answer. Without `algebra`, raises NeedsAlgebra if that is needed."""
    status, reason = "no_answer", None
    try:
        if answer:
            status = "correct" if math_verifier.compare(gold, answer, algebra) else "wrong"
    except math_verifier.UnparsableGold:
        status, reason = "unparsable_gold", "expected_answer cannot be read"
    return Verdict(float(status == "correct"), status, answer, reason)


def algebra(text: str, row: dict[str, Any]) -> Verdict:
    """The verifier "math" in a worker. `text` is an answer that needs algebra, or with a lenient row a response."""
    gold, lenient = row["expected_answer"], row.get("lenient", False)
    verdict = math_verdict(gold, math_verifier.extract_answer(text, lenient=True) if lenient else text, algebra=True)
    second = math_verifier.second_opinion(gold, text) if lenient and not verdict.reward else None
    return Verdict(1.0, "correct", second) if second else verdict


def load_verifier(name: str) -> Callable[[str, dict[str, Any]], Verdict | float]:
    """The function that "math", "module.function" or "path/to/file.py:function" names. Raises ValueError if none."""
    path, _, function = name.rpartition(":")
    sys.path.append(os.getcwd())
    try:
        if path.endswith(".py"):
            return runpy.run_path(path)[function]
        return algebra if name == "math" else pkgutil.resolve_name(name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"cannot load {name!r}: {type(error).__name__}: {error}") from error


class Worker(NamedTuple):
    """A worker process, seen from this side."""

    connection: socket.socket
    lines: BinaryIO
    pid: int


class WorkerPool:
    """`size` workers for one verifier, each forked when it is first needed: the nursery's imports take seconds."""

    def __init__(self, verifier: str, size: int, deadline: float = 1.0):
        self.size, self.deadline, self.kills = size, deadline, 0
        self._command = [sys.executable, os.path.abspath(__file__), verifier, str(deadline)]
        self._nursery: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._start_nursery()
        for _ in range(size):
            self._idle.put(None)

    def run(self, text: str, row: bytes) -> Verdict:
        """The verdict on `text` and the JSON object `row`, or "timeout". Thread-safe; waits for an idle worker."""
        worker = self._idle.get()
        try:
            if worker is None or wait([worker.connection], 0):  # an idle worker whose socket has something is dead
                worker = self._fork()
            worker.connection.settimeout(PATIENCE * self.deadline)
            worker.connection.sendall(b"[%s, %s]\n" % (json.dumps(text).encode(), row.replace(b"\n", b" ")))
            return Verdict(**json.loads(worker.lines.readline()))
        except TimeoutError:
            self.kills += 1
            os.kill(worker.pid, signal.SIGKILL)
            worker.connection.shutdown(socket.SHUT_RDWR)
            return Verdict(0.0, "timeout", reason=f"it took longer than {PATIENCE * self.deadline:g} s by the clock")
        except (OSError, ValueError):
            self.kills += 1
            reason = f"the worker used up {self.deadline:g} s of CPU or its memory, or was killed"
            return Verdict(0.0, "timeout", reason=reason)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return Verdict(0.0, "timeout", reason=str(error))
        finally:
            self._idle.put(worker)

    def _fork(self) -> Worker:
        with self._lock:
            for _attempt in range(2):
                ours, theirs = socket.socketpair()
                ours.settimeout(FORK_SECONDS)
                with contextlib.suppress(OSError, ValueError):
                    self._ready = self._ready or self._control.recv(1) == b"r"
                    with theirs:
                        socket.send_fds(self._control, [b"f"], [theirs.fileno()])
                    lines = ours.makefile("rb")
                    return Worker(ours, lines, int(lines.readline()))
                self._start_nursery()  # the old one is dead or hangs
        raise RuntimeError("no worker can be started: `import math_verify` fails, or memory is short")

    def _start_nursery(self) -> None:
        if self._nursery:
            os.killpg(self._nursery.pid, signal.SIGKILL)  # the group of the nursery and its workers
            self._nursery.wait(FORK_SECONDS)
        # The environment has no secret of the server. gmpy2 would compute in C calls that allocate past limits.
        keep = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "VIRTUAL_ENV", "HOME")
        environment = {key: os.environ[key] for key in keep if key in os.environ}
        environment |= {"SYMPY_GROUND_TYPES": "python", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
        self._ready = False
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        null = subprocess.DEVNULL
        with theirs:
            self._nursery = subprocess.Popen(
                self._command, stdin=theirs, stdout=null, stderr=null, env=environment, start_new_session=True
            )


# -- the other side of the sockets: the nursery and its workers --------------------------------------------------------


def nursery(name: str, deadline: str) -> None:
    """Fork a worker for each file descriptor that arrives; end with the process that sends them."""
    logging.disable(logging.CRITICAL)
    verifier = load_verifier(name)
    for gold, answer in math_verifier.WARM_UP if verifier is algebra else []:
        math_verifier.compare(gold, answer, algebra=True)
    os.chdir("/")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries dead workers
    control = socket.socket(fileno=sys.stdin.fileno())
    control.send(b"r")
    while fds := socket.recv_fds(control, 1, 1)[1]:
        if os.fork() == 0:
            control.close()
            try:
                work(socket.socket(fileno=fds[0]), verifier, float(deadline))
            finally:
                os._exit(0)
        os.close(fds[0])
    os.killpg(0, signal.SIGKILL)  # this process and all workers, busy or not


def work(connection: socket.socket, verifier: Callable[..., Any], deadline: float) -> None:
    """What a worker does: send its process id, then answer each line with a verdict."""
    stream = connection.makefile("rwb")
    confine()
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (MAX_GROWTH_MB << 10)
    reply = str(os.getpid()).encode()
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stream.write(reply + b"\n")
        stream.flush()
        line = stream.readline()
        # The kernel kills this process, even inside a C call: when it has computed for too long, or long after the pool
        # should have killed it.
        signal.setitimer(signal.ITIMER_PROF, deadline)
        signal.setitimer(signal.ITIMER_REAL, 2 * PATIENCE * deadline + 1)
        reply = answer_line(verifier, line)


def answer_line(verifier: Callable[..., Any], line: bytes) -> bytes:
    """The fields of a Verdict as JSON: what the verifier returned, or status "timeout" if it failed: not "wrong"."""
    try:
        result = verifier(*json.loads(line))
        reward = float(getattr(result, "reward", result))
        status = getattr(result, "status", "correct" if reward > 0 else "wrong")
        if not math.isfinite(reward) or status not in STATUSES:
            raise ValueError(f"the verifier returned reward {reward} and status {status!r}")
        answer = getattr(result, "extracted_answer", None)
        fields = {"reward": reward, "status": status, "extracted_answer": answer and str(answer)[:2_000]}
    except Exception as error:  # out of memory or stack, confined, or a bug
        fields = {"reward": 0.0, "status": "timeout", "reason": f"{type(error).__name__}: {error}"[:300]}
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")


def confine() -> None:
    """Take from this process, for good, what a verifier does not need."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError("workers do not write files")
        reads = event in ("os.listdir", "os.scandir", "os.walk")
        if event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.dl")) and not reads:
            raise PermissionError(f"workers do not use {event}")

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # the server's event loop goes first
    sys.setrecursionlimit(3_000)
    sys.addaudithook(audit)


if __name__ == "__main__":
    nursery(*sys.argv[1:])
