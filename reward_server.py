r"""HTTP math verifier for RL, usable from any trainer: right, fast, and impossible to hang.

    python reward_server.py --port 8000               # /verify, /verify_batch, /seed_session, /healthz, /metrics
    python reward_server.py --judge-url http://h:8001 # also ask an LLM judge where the rules said no

    from reward_server import verify
    verify(r"... so \boxed{\frac{6}{4}}", "3/2").reward    # 1.0, in process, with the same hard deadline

What equals what is decided in math_verifier.py, whose docstring states the policy. This file makes it safe and fast:

- Exact comparisons (numbers, text, lists of them) take microseconds and run on the event loop.
- Everything symbolic runs in pre-started worker processes, one task each, forked from a single process that has sympy
  loaded. A worker that misses its deadline is killed with SIGKILL and replaced; nobody else waits for it.
- Model output is hostile: workers have a memory limit, may not write files, open sockets or start programs, do not see
  the server's environment, and talk JSON over a socket.
- `status` separates "wrong" from "could not verify" (timeout, judge_failed, unparsable_gold): mask the second.

To add another verifier see VERIFIERS below.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import hmac
import importlib.util
import json
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import math_verifier
from llm_judge import Judge
from math_verifier import UnparsableGold, compare, extract_answer

MAX_BATCH = 4_096
MAX_BODY_BYTES = 64 << 20
MAX_HEAD_BYTES = 1 << 20
READ_SECONDS = 60  # for a request's head, and for its body
WORKER_MEMORY_MB = 1_024
WORKER_MAX_TASKS = 2_000
WORKER_MAX_GROWTH_MB = 256


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says. Rewards are 1.0 for "correct" and 0.0 otherwise; see `verified` before using a 0."""

    reward: float
    status: str  # correct | wrong | no_answer | unparsable_gold | timeout | judge_failed
    extracted_answer: str | None = None
    tier: str = "exact"  # exact | symbolic | cache | judge: who decided (for /metrics)

    @property
    def verified(self) -> bool:
        """Whether the reward may be trained on."""
        return self.status in ("correct", "wrong", "no_answer")


# ---------------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------------

_CONTROL = struct.Struct("!cq")  # zygote protocol: b"f" + fd -> pid; b"k" + pid kills and reaps


class _Worker:
    def __init__(self, pid: int, connection: Connection):
        self.pid, self.connection, self.tasks = pid, connection, 0


class WorkerPool:
    """A fixed number of killable processes for symbolic comparisons.

    One child (the zygote) imports sympy once and forks every worker, so that a replacement takes milliseconds.
    `run` is blocking and thread-safe. All processes end when this process does, however it ends.
    """

    def __init__(self, size: int, deadline: float = 1.0, memory_mb: int = WORKER_MEMORY_MB):
        self.size, self.deadline, self.memory_mb = size, deadline, memory_mb
        self.kills = 0
        self._closed = False
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._start_zygote()
        for _ in range(size):  # None: a slot whose worker is forked on first use, after the zygote has imported sympy
            self._idle.put(None)

    def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair()
        keep = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "VIRTUAL_ENV", "HOME")
        env = {key: os.environ[key] for key in keep if key in os.environ}
        # gmpy2 does its arithmetic in C calls that hold out against everything but SIGKILL, and allocates past limits.
        env |= {"SYMPY_GROUND_TYPES": "python", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
        command = [
            sys.executable,
            os.path.abspath(__file__),
            "--zygote",
            str(theirs.fileno()),
            str(self.memory_mb),
            str(self.deadline),
        ]
        self._zygote = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._control = ours

    def _fork(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            for attempt in range(2):
                ours, theirs = socket.socketpair()
                try:
                    socket.send_fds(self._control, [_CONTROL.pack(b"f", 0)], [theirs.fileno()])
                    reply = self._control.recv(_CONTROL.size, socket.MSG_WAITALL)
                    if len(reply) == _CONTROL.size:
                        return _Worker(_CONTROL.unpack(reply)[1], Connection(ours.detach()))
                except OSError:
                    pass
                finally:
                    theirs.close()
                self._zygote.kill()  # it died (or was killed): start another one
                self._zygote.wait()
                if attempt == 0:
                    self._start_zygote()
            raise RuntimeError("cannot start verification workers: `import math_verify` fails or memory is short")

    def _discard(self, worker: _Worker) -> None:
        worker.connection.close()
        with self._lock:
            with contextlib.suppress(OSError):  # the zygote may be gone, and its workers with it
                self._control.sendall(_CONTROL.pack(b"k", worker.pid))

    def run(self, gold: str, answer: str) -> str:
        """Compare in a worker: "correct", "wrong", "unparsable_gold" or "timeout". Waits for an idle worker."""
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._fork()
            try:
                worker.connection.send_bytes(json.dumps([gold, answer]).encode())
                if worker.connection.poll(self.deadline):
                    reply = json.loads(worker.connection.recv_bytes(4_096))
                    worker.tasks += 1
                    if worker.tasks >= WORKER_MAX_TASKS or reply["grown_mb"] > WORKER_MAX_GROWTH_MB:
                        self._discard(worker)
                        worker = None
                    return reply["status"]
            except (OSError, EOFError, ValueError):
                pass  # it died: memory limit, CPU limit, or killed from outside
            self.kills += 1
            self._discard(worker)
            worker = None
            return "timeout"
        finally:
            self._idle.put(worker)

    def warm(self) -> None:
        """Fork every worker now. Returns when all can take work."""
        workers = [self._idle.get() for _ in range(self.size)]
        for worker in workers:
            self._idle.put(worker or self._fork())

    def close(self) -> None:
        """End all worker processes."""
        with self._lock:
            self._closed = True
            self._control.close()  # the zygote sees the end of its input, kills its children and exits
        try:
            self._zygote.wait(2)
        except subprocess.TimeoutExpired:
            self._zygote.kill()
            self._zygote.wait()


def _zygote_main(fd: int, memory_mb: int, deadline: float) -> None:
    """The process that forks workers: import sympy, warm its caches, then serve fork and kill requests."""
    import logging

    logging.disable(logging.CRITICAL)
    os.chdir("/")
    control = socket.socket(fileno=fd)
    for gold, answer in [*_WARM_UP, *math_verifier.WARM_UP]:
        math_verifier.compare(gold, answer, algebra=True)
    children: set[int] = set()
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(control, _CONTROL.size, 1)
        except OSError:
            message, fds = b"", []
        if len(message) < _CONTROL.size:  # the server is gone
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        kind, pid = _CONTROL.unpack(message)
        if kind == b"f":
            pid = os.fork()
            if pid == 0:
                try:
                    control.close()
                    _worker_main(Connection(fds[0]), memory_mb, deadline)
                finally:
                    os._exit(0)
            os.close(fds[0])
            children.add(pid)
            control.sendall(_CONTROL.pack(b"f", pid))
        elif pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            children.discard(pid)


_WARM_UP = [
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{\frac{3}{4}}"), ("x^2+2x+1", "(x+1)^2"), (r"\cos 60^\circ", r"\frac{1}{2}"),
    (r"\frac{\pi}{4}+1", "1+\\pi/4"), ("y=2x+3", "2x-y+3=0"), (r"\log_2 8x", r"\log_2 x + 3"), ("2", "|x|"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}+x"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    (r"x \ne 3", r"x < 3"), (r"e^{i\pi}+x!", r"\sin x + \tan y"), (r"\sum_{k=1}^{3} k^2", "14"),
]  # fmt: skip


def _worker_main(connection: Connection, memory_mb: int, deadline: float) -> None:
    """One worker: read [gold, answer], compare, reply; confined, and killed by the kernel should nobody else do it."""
    import resource

    # Interpreter-level confinement (math-verify evaluates nothing, but this is what would stop it if it did).
    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError("verification workers do not write files")
        if event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.dl")) and event not in _ALLOWED_EVENTS:
            raise PermissionError(f"verification workers do not use {event}")

    limit = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # the event loop goes first
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.setrecursionlimit(3_000)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.addaudithook(audit)
    while True:
        try:
            gold, answer = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # Default action of SIGALRM ends the process even inside a C call, should the server be gone.
        signal.setitimer(signal.ITIMER_REAL, deadline * 2 + 1)
        try:
            status = "correct" if math_verifier.compare(gold, answer, algebra=True) else "wrong"
        except UnparsableGold:
            status = "unparsable_gold"
        except Exception:  # out of memory or stack, or a bug of ours: not verified, which is not "wrong"
            status = "timeout"
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10
        connection.send_bytes(json.dumps({"status": status, "grown_mb": grown}).encode())


_ALLOWED_EVENTS = frozenset({"os.listdir", "os.scandir", "os.walk"})

# ---------------------------------------------------------------------------------------------------------------------
# Verification in process
# ---------------------------------------------------------------------------------------------------------------------

_pool: WorkerPool | None = None
_pool_lock = threading.Lock()


def _default_pool() -> WorkerPool:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = WorkerPool(min(4, os.cpu_count() or 1))
            atexit.register(_pool.close)
        return _pool


def _forget_pool() -> None:
    """A forked child must not share its parent's workers."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def exact_verdict(text: str, expected_answer: str, lenient: bool = False) -> Verdict | tuple[str, str]:
    """The verdict if it takes no algebra, else (gold, answer) for a worker. Microseconds, safe on an event loop."""
    gold = expected_answer.strip()
    if not gold:
        return Verdict(0.0, "unparsable_gold")
    answer = extract_answer(text, lenient=lenient)
    if not answer:
        return Verdict(0.0, "no_answer")
    gold = _gold_box(gold)
    try:
        equal = compare(gold, answer)
    except UnparsableGold:
        return Verdict(0.0, "unparsable_gold", answer)
    except RecursionError:  # a caller that is deep in its own stack
        return Verdict(0.0, "timeout", answer)
    if equal is None:
        return gold, answer
    return Verdict(float(equal), "correct" if equal else "wrong", answer)


def _gold_box(gold: str) -> str:
    """Golds are used as they are; only a whole solution with a box in it is reduced to the box."""
    return (extract_answer(gold) or gold) if "\\boxed" in gold else gold


def verify(response_text: str, expected_answer: str, *, lenient: bool = False) -> Verdict:
    """Verify one response in this process. Algebra runs in lazily started workers under the same hard deadline."""
    verdict = exact_verdict(response_text, expected_answer, lenient)
    if isinstance(verdict, Verdict):
        return verdict
    gold, answer = verdict
    status = _default_pool().run(gold, answer)
    return Verdict(float(status == "correct"), status, answer, "symbolic")


# The one place to add a verifier: a function (response text, expected answer) -> Verdict. It runs in a thread under the
# server's deadline. Choose it with `--verifier NAME` or per request with "verifier": "NAME"; "math" is the default.
VERIFIERS: dict[str, Callable[[str, str], Verdict]] = {"math": verify}

# ---------------------------------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------------------------------


class HttpError(Exception):
    """A reply other than 200."""

    def __init__(self, status: int, detail: Any, headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class Metrics:
    """Counters and one histogram, in Prometheus' text format."""

    BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

    def __init__(self) -> None:
        self.verdicts: Counter[tuple[str, str]] = Counter()
        self.responses: Counter[tuple[str, int]] = Counter()
        self.buckets = [0] * (len(self.BUCKETS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one request's latency."""
        index = next((i for i, bound in enumerate(self.BUCKETS) if seconds <= bound), len(self.BUCKETS))
        self.buckets[index] += 1
        self.seconds += seconds

    def render(self, gauges: dict[str, float], counters: dict[str, float]) -> str:
        """The text of GET /metrics."""
        lines = ["# TYPE reward_server_verdicts_total counter"]
        for (status, tier), count in sorted(self.verdicts.items()):
            lines.append(f'reward_server_verdicts_total{{status="{status}",tier="{tier}"}} {count}')
        lines.append("# TYPE reward_server_http_responses_total counter")
        for (path, code), count in sorted(self.responses.items()):
            lines.append(f'reward_server_http_responses_total{{path="{path}",code="{code}"}} {count}')
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                lines += [f"# TYPE reward_server_{name} {kind}", f"reward_server_{name} {value}"]
        lines.append("# TYPE reward_server_request_seconds histogram")
        total = 0
        for bound, count in zip([*map(str, self.BUCKETS), "+Inf"], self.buckets, strict=True):
            total += count
            lines.append(f'reward_server_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [
            f"reward_server_request_seconds_sum {self.seconds:.6f}",
            f"reward_server_request_seconds_count {total}",
        ]
        return "\n".join(lines) + "\n"


@dataclass
class Settings:
    """What the command line sets."""

    workers: int
    deadline: float = 1.0
    max_queue: int = 1_024
    verifier: str = "math"
    lenient: bool = False
    token: str | None = None
    judge: Judge | None = None
    cache_size: int = 50_000


class RewardServer:
    """The ASGI application."""

    def __init__(self, settings: Settings, pool: WorkerPool):
        self.settings, self.pool, self.metrics = settings, pool, Metrics()
        self.cache: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        self.in_flight: dict[tuple[str, str], asyncio.Future[str]] = {}
        self.judging = 0
        self.body_bytes = 0
        self.threads = ThreadPoolExecutor(pool.size, "symbolic")
        self.slow_threads = ThreadPoolExecutor(32, "judge")
        self.slow_slots = asyncio.Semaphore(32)  # so that a deadline starts when its thread does
        self.routes = {
            ("POST", "/verify"): self.post_verify,
            ("POST", "/verify_batch"): self.post_verify_batch,
            ("POST", "/seed_session"): self.post_seed_session,
            ("GET", "/healthz"): self.get_healthz,
            ("GET", "/metrics"): self.get_metrics,
        }

    # -- verdicts ------------------------------------------------------------------------------------------------------

    async def symbolic(self, gold: str, answer: str, lane: asyncio.Semaphore | None = None) -> tuple[str, str]:
        """(status, tier) from the cache, from an identical comparison already under way, or from a worker.

        `lane` bounds how many workers one request may hold, so that a batch of slow answers leaves some to the others.
        """
        key = (gold, math_verifier.normalise(answer))
        hit = self.cache.get(key)
        if hit and hit[1] > time.monotonic():
            self.cache.move_to_end(key)
            return hit[0], "cache"
        future = self.in_flight.get(key)
        if future is not None:
            return await asyncio.shield(future), "cache"

        async def compare_in_worker() -> str:
            async with lane or contextlib.nullcontext():
                return await asyncio.get_running_loop().run_in_executor(self.threads, self.pool.run, gold, answer)

        future = self.in_flight[key] = asyncio.ensure_future(compare_in_worker())
        try:
            status = await asyncio.shield(future)
        finally:
            self.in_flight.pop(key, None)
        # A time-out may be a busy machine's fault: remember it only long enough to spare the workers a whole group.
        self.cache[key] = (status, time.monotonic() + (30 if status == "timeout" else 1e9))
        if len(self.cache) > self.settings.cache_size:
            self.cache.popitem(last=False)
        return status, "symbolic"

    async def finish(
        self, exact: Verdict | tuple[str, str], question: str, gold: str, lane: asyncio.Semaphore | None = None
    ) -> tuple[Verdict, list[Any] | None]:
        """Complete a verdict with algebra and, where the rules said no, the judge."""
        if isinstance(exact, Verdict):
            verdict = exact
        else:
            status, tier = await self.symbolic(*exact, lane)
            verdict = Verdict(float(status == "correct"), status, exact[1], tier)
        judge = self.settings.judge
        if judge is None or verdict.status not in ("wrong", "unparsable_gold") or not verdict.extracted_answer:
            return verdict, None
        loop = asyncio.get_running_loop()
        self.judging += 1
        try:
            async with self.slow_slots:
                job = loop.run_in_executor(self.slow_threads, judge.ask, question, gold, verdict.extracted_answer)
                status, evaluations = await asyncio.wait_for(job, judge.deadline + 0.5)
        except TimeoutError:
            status, evaluations = "judge_failed", [{"error": "deadline"}]
        finally:
            self.judging -= 1
        return Verdict(float(status == "correct"), status, verdict.extracted_answer, "judge"), evaluations

    async def custom(self, name: str, text: str, gold: str) -> Verdict:
        """Run a verifier from VERIFIERS in a thread, under the deadline."""
        try:
            async with self.slow_slots:
                job = asyncio.get_running_loop().run_in_executor(self.slow_threads, VERIFIERS[name], text, gold)
                return await asyncio.wait_for(job, self.settings.deadline)
        except TimeoutError:
            return Verdict(0.0, "timeout", None, name)

    async def verdict(
        self, item: dict[str, Any], lane: asyncio.Semaphore | None = None
    ) -> tuple[Verdict, list[Any] | None]:
        """The verdict on {"text", "expected_answer"[, "question", "verifier"]}; never raises."""
        try:
            text, gold = item["text"], item["expected_answer"]
            name = item.get("verifier") or self.settings.verifier
            if name != "math":
                result = await self.custom(name, text, gold), None
            else:
                exact = exact_verdict(text, gold, self.settings.lenient)
                result = await self.finish(exact, item.get("question", ""), gold, lane)
        except Exception as error:  # a bug of ours must not become a reward of 0: report "could not verify"
            print(f"verification failed: {type(error).__name__}: {error}", file=sys.stderr)
            result = Verdict(0.0, "timeout", None, "error"), None
        self.metrics.verdicts[result[0].status, result[0].tier] += 1
        return result

    # -- routes --------------------------------------------------------------------------------------------------------

    async def post_verify(self, body: Any) -> Any:
        """NeMo Gym's `/verify`: the request less `question`, plus the verdict."""
        fields = {"responses_create_params": dict, "response": dict, "question": str, "expected_answer": str}
        _require(body, fields, ["body"])
        _require(body["response"], {"output": list}, ["body", "response"])
        text = "".join(
            content["text"]
            for item in body["response"]["output"]
            if isinstance(item, dict) and item.get("type") == "message" and isinstance(item.get("content"), list)
            for content in item["content"]
            if isinstance(content, dict)
            and content.get("type") == "output_text"
            and isinstance(content.get("text"), str)
        )
        self._admit()
        item = {
            "text": text,
            "expected_answer": body["expected_answer"],
            "question": body["question"],
            "verifier": _verifier(body),
        }
        verdict, evaluations = await self.verdict(item)
        reply = {key: value for key, value in body.items() if key != "question"}
        library = verdict.reward if verdict.tier != "judge" else 0.0
        reply.update(
            reward=verdict.reward, extracted_answer=verdict.extracted_answer, library_reward=library,
            judge_evaluations=evaluations, status=verdict.status,
        )  # fmt: skip
        return reply

    async def post_verify_batch(self, body: Any) -> Any:
        """Many at once: one result per item, in order."""
        _require(body, {"items": list}, ["body"])
        items = body["items"]
        if len(items) > MAX_BATCH:
            raise HttpError(413, f"a batch may hold {MAX_BATCH} items, this one holds {len(items)}: send several")
        for index, item in enumerate(items):
            _require(item, {"text": str, "expected_answer": str}, ["body", "items", index])
            _verifier(item)
        self._admit()
        results: list[Any] = [None] * len(items)
        waiting: list[asyncio.Task[None]] = []

        lane = asyncio.Semaphore(max(1, self.pool.size - 1))

        async def run(index: int, item: dict[str, Any]) -> None:
            results[index] = (await self.verdict(item, lane))[0]

        simple = self.settings.judge is None
        slice_end = time.perf_counter() + 0.002
        for index, item in enumerate(items):
            exact = None
            if simple and (item.get("verifier") or self.settings.verifier) == "math":
                try:
                    exact = exact_verdict(item["text"], item["expected_answer"], self.settings.lenient)
                except Exception:
                    exact = None  # self.verdict reports it
            if isinstance(exact, Verdict):
                results[index] = exact
                self.metrics.verdicts[exact.status, exact.tier] += 1
            else:
                waiting.append(asyncio.ensure_future(run(index, item)))
            if time.perf_counter() > slice_end:  # let other requests through
                await asyncio.sleep(0)
                slice_end = time.perf_counter() + 0.002
        if waiting:
            await asyncio.gather(*waiting)
        return {
            "results": [
                {"reward": v.reward, "status": v.status, "extracted_answer": v.extracted_answer} for v in results
            ]
        }

    async def post_seed_session(self, body: Any) -> Any:
        """NeMo Gym opens sessions; verification has no state."""
        return {}

    async def get_healthz(self, body: Any) -> Any:
        """Liveness."""
        return {"status": "ok"}

    async def get_metrics(self, body: Any) -> Any:
        """Prometheus text."""
        gauges = {
            "queue_depth": max(0, len(self.in_flight) - self.pool.size),
            "symbolic_in_flight": len(self.in_flight),
            "judge_in_flight": self.judging,
            "cache_entries": len(self.cache),
            "workers": self.pool.size,
        }
        return self.metrics.render(gauges, {"worker_kills_total": self.pool.kills})

    def _admit(self) -> None:
        if len(self.in_flight) >= self.settings.max_queue or self.judging >= self.settings.max_queue:
            raise HttpError(429, "the verification queue is full, try again", {"Retry-After": "1"})

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            await self._lifespan(scope, receive, send)
            return
        start = time.perf_counter()
        method, path = scope["method"], scope["path"]
        handler = self.routes.get((method, path))
        headers: dict[str, str] = {}
        try:
            if handler is None:
                known = any(path == route for _, route in self.routes)
                raise HttpError(405 if known else 404, f"{method} {path}: no such route")
            if path != "/healthz":
                self._authorise(scope)
            body = await self._read_body(scope, receive) if method == "POST" else None
            reply, status = await handler(body), 200
        except HttpError as error:
            reply, status, headers = {"detail": error.detail}, error.status, error.headers
        except Exception as error:  # keep serving; the client sees what happened
            print(f"{method} {path}: {type(error).__name__}: {error}", file=sys.stderr)
            reply, status = {"detail": f"internal error: {type(error).__name__}"}, 500
        data = reply.encode() if isinstance(reply, str) else _encode(reply)
        kind = b"text/plain; version=0.0.4; charset=utf-8" if isinstance(reply, str) else b"application/json"
        raw = [(b"content-type", kind), (b"content-length", str(len(data)).encode())]
        raw += [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": data})
        self.metrics.observe(time.perf_counter() - start)
        self.metrics.responses[path if handler else "other", status] += 1

    async def _lifespan(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        while scope["type"] == "lifespan":
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return

    def _authorise(self, scope: dict[str, Any]) -> None:
        if self.settings.token is None:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.settings.token.encode()):
            raise HttpError(401, "missing or wrong bearer token", {"WWW-Authenticate": "Bearer"})

    async def _read_body(self, scope: dict[str, Any], receive: Callable[..., Any]) -> Any:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > MAX_BODY_BYTES:
            raise HttpError(413, f"the body may have {MAX_BODY_BYTES} bytes")
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(READ_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HttpError(400, "the client went away")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    self.body_bytes += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise HttpError(413, f"the body may have {MAX_BODY_BYTES} bytes")
                    if self.body_bytes > 4 * MAX_BODY_BYTES:
                        raise HttpError(429, "too much data in flight, try again", {"Retry-After": "1"})
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        return _decode(b"".join(chunks))
        except TimeoutError:
            raise HttpError(408, f"the body did not arrive within {READ_SECONDS} seconds") from None
        finally:
            self.body_bytes -= size


def _verifier(item: dict[str, Any]) -> str | None:
    name = item.get("verifier")
    if name is not None and name not in VERIFIERS:
        raise HttpError(422, f"unknown verifier {name!r:.60}; known: {', '.join(VERIFIERS)}")
    return name


def _require(body: Any, fields: dict[str, type], where: list[Any]) -> None:
    """422 in FastAPI's format if a field is missing or of the wrong type."""
    if not isinstance(body, dict):
        raise HttpError(422, [{"type": "dict_type", "loc": where, "msg": "Input should be a JSON object"}])
    errors = []
    for name, kind in fields.items():
        if name not in body:
            errors.append({"type": "missing", "loc": [*where, name], "msg": "Field required"})
        elif not isinstance(body[name], kind):
            errors.append(
                {"type": f"{kind.__name__}_type", "loc": [*where, name], "msg": f"Input should be a {kind.__name__}"}
            )
    if errors:
        raise HttpError(422, errors)


def _decode(data: bytes) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:  # what msgspec refuses and Python's json takes: lone surrogates, NaN; keep them out of the reply
        return json.loads(data.decode("utf-8", "replace"), parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise HttpError(422, [{"type": "json_invalid", "loc": ["body"], "msg": str(error)[:200]}]) from None


def _encode(reply: Any) -> bytes:
    import msgspec

    try:
        return msgspec.json.encode(reply)
    except (UnicodeEncodeError, ValueError, TypeError, msgspec.MsgspecError):
        return json.dumps(reply).encode()  # escapes lone surrogates


def _limited_protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, with the limits on size and time of a request's head that it lacks."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Protocol(HttpToolsProtocol):
        head_bytes, in_head = 0, True

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.first_head = self.loop.call_later(READ_SECONDS, transport.abort)

        def connection_lost(self, error: Exception | None) -> None:
            self.first_head.cancel()
            super().connection_lost(error)

        def on_message_begin(self) -> None:
            self.head_bytes, self.in_head = 0, True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.in_head = False
            self.first_head.cancel()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.head_bytes += len(data) if self.in_head else 0
            if self.head_bytes > MAX_HEAD_BYTES:
                self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
                self.transport.close()

    return Protocol


def _watch_parent(parent: int) -> None:
    """End the server when its parent has: nothing may stay behind, even after SIGKILL."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.0)
    os._exit(0)  # the workers see the closed socket


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a mistake ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="reward_server.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free port")
    parser.add_argument("--workers", type=int, default=min(16, max(4, cpus)), help="symbolic worker processes")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds a symbolic comparison may take")
    parser.add_argument("--max-queue", type=int, default=1_024, help="waiting comparisons before 429")
    parser.add_argument("--verifier", default="math", help=f"default verifier: {', '.join(VERIFIERS)}")
    parser.add_argument(
        "--lenient", action="store_true", help="accept a bare last number as the answer (not for training)"
    )
    parser.add_argument("--judge-url", help="OpenAI-compatible server to ask where the rules said no")
    parser.add_argument("--judge-model", help="its model name (default: the first it lists)")
    parser.add_argument("--judge-deadline", type=float, default=30.0, help="seconds for both questions to the judge")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when the parent process is gone")
    parser.print_usage = lambda file=None: None  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65_535:
        parser.error(f"--port must be between 0 and 65535, not {args.port}")
    if not 1 <= args.workers <= 256:
        parser.error(f"--workers must be between 1 and 256, not {args.workers}")
    if not 0.05 <= args.deadline <= 600 or not 0.05 <= args.judge_deadline <= 3_600:
        parser.error("--deadline must be between 0.05 and 600 seconds, --judge-deadline between 0.05 and 3600")
    if args.max_queue < 1:
        parser.error(f"--max-queue must be positive, not {args.max_queue}")
    if args.verifier not in VERIFIERS:
        parser.error(f"--verifier {args.verifier!r} is unknown; known: {', '.join(VERIFIERS)}")
    if args.judge_url and not re.match(r"https?://[^/\s]+", args.judge_url):
        parser.error("--judge-url must start with http:// or https://")
    for module in ("math_verify", "uvicorn", "msgspec"):
        if importlib.util.find_spec(module) is None:
            parser.error(f"the module {module} is not installed: pip install math-verify uvicorn[standard] msgspec")
    return args


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sys.exit(
            f"reward_server.py: error: cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        )
    sock.listen(2_048)
    return sock


def main(argv: list[str] | None = None) -> None:
    """Run the server until SIGTERM or SIGINT."""
    parent = os.getppid()
    args = parse_arguments(argv)
    sock = _listen(args.host, args.port)
    pool = WorkerPool(args.workers, args.deadline)  # imports sympy while we import uvicorn
    import uvicorn

    token = os.environ.get("REWARD_SERVER_TOKEN") or None
    judge = (
        Judge(args.judge_url, args.judge_model, args.judge_deadline, os.environ.get("JUDGE_API_KEY"))
        if args.judge_url
        else None
    )
    settings = Settings(args.workers, args.deadline, args.max_queue, args.verifier, args.lenient, token, judge)
    app = RewardServer(settings, pool)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"reward server listening on http://{host}:{sock.getsockname()[1]}", flush=True)
            asyncio.get_running_loop().run_in_executor(None, pool.warm)

    config = uvicorn.Config(
        app, http=_limited_protocol(), log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=75,
        timeout_graceful_shutdown=int(args.deadline + (args.judge_deadline if judge else 0)) + 5,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again when done: that is then no death
        signal.signal(number, lambda *_: None)
    if args.exit_with_parent:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    code = 1
    try:
        Server(config).run(sockets=[sock])
        code = 0
    except Exception:
        traceback.print_exc()
    pool.close()
    os._exit(code)  # threads blocked on a judge must not hold the exit


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        _zygote_main(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    else:
        main()
