r"""HTTP math verifier for RL, usable from any trainer: right, fast, and impossible to hang.

    python reward_server.py --port 8000                                # the math verifier
    python reward_server.py --verifier my_rewards.py:exact_match       # your own: (text, row) -> Verdict or float
    python reward_server.py --judge-url http://h:8001                  # ask an LLM judge where the rules said no

    from reward_server import verify
    verify(r"... so \boxed{\frac{6}{4}}", "3/2").reward    # 1.0, in process, with the same hard deadline

docs/verifier.md has the policy, the routes and who waits for whom. Exact comparisons take microseconds and run on the
event loop; algebra and custom verifiers run in processes that are killed at a deadline (verifier_pool.py). Bodies may
be hostile, too: msgspec decodes them by type and builds nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import hashlib
import hmac
import os
import re
import resource
import signal
import socket
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from uvicorn import Config, Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import math_verifier
from llm_judge import Judge
from verifier_pool import PATIENCE, Verdict, WorkerPool, load_verifier, math_verdict

MAX_BATCH = 4_096
MAX_BODY_BYTES = 32 << 20
MAX_BYTES_ARRIVING = 8 * MAX_BODY_BYTES  # of all bodies that are being read
MAX_HEAD_BYTES = 64 << 10
MAX_CONNECTIONS = 4_096
READ_SECONDS = 60  # for a request's head, for its body, and for the client to take the reply
CACHE_SIZE = 50_000

# -- verification in process -------------------------------------------------------------------------------------------


def exact_verdict(text: str, expected_answer: str, lenient: bool = False) -> Verdict | tuple[str, bytes]:
    """The verdict if it takes no algebra, else what to ask a worker. It takes microseconds, fit for an event loop."""
    gold, answer, verdict = expected_answer.strip(), None, None
    if not gold:
        return Verdict(0.0, "unparsable_gold", reason="expected_answer is empty")
    try:
        answer = math_verifier.extract_answer(text, lenient=lenient)
        verdict = math_verdict(gold, answer)
    except math_verifier.NeedsAlgebra:
        pass
    except Exception as error:  # a bug, or a caller near the recursion limit: not verified, which is not "wrong"
        verdict = Verdict(0.0, "timeout", answer, f"{type(error).__name__}: {error}"[:300])
    if verdict and (verdict.reward or not lenient):
        return verdict
    row = {"expected_answer": gold.encode(errors="replace").decode(), "lenient": lenient}
    return text if lenient else answer, msgspec.json.encode(row)


def verify(response_text: str, expected_answer: str, *, lenient: bool = False) -> Verdict:
    """Verify one response in this process. Algebra runs in lazily started workers under the same hard deadline."""
    found = exact_verdict(response_text, expected_answer, lenient)
    return found if isinstance(found, Verdict) else default_pool().run(*found)


@functools.cache
def default_pool() -> WorkerPool:
    """The workers of `verify`, which end with this process."""
    return WorkerPool("math", min(4, os.cpu_count() or 1))


os.register_at_fork(after_in_child=default_pool.cache_clear)  # a child must not talk to its parent's workers


# -- what comes over the wire: fields that are not named here are skipped without being built --------------------------

struct = msgspec.defstruct
AnyRow = struct("AnyRow", [])
MathRow = struct("MathRow", [("expected_answer", str), ("question", str, "")])
Item = struct("Item", [("text", str), ("expected_answer", str | None, None), ("row", msgspec.Raw, msgspec.Raw())])
Batch = struct("Batch", [("items", list[Item])])
# NeMo Gym's /verify: a row with a `response` in OpenAI's Responses format. Only messages have answers in them.
Part = struct("Part", [("type", str, ""), ("text", str | None, None)])
Output = struct("Output", [("type", str, ""), ("content", list[Part] | str | None, None)])
GymResponse = struct("GymResponse", [("output", list[Output])])
gym_fields = [("responses_create_params", AnyRow), ("response", GymResponse)]
GymRow = struct("GymRow", gym_fields)
GymMathRow = struct("GymMathRow", [*gym_fields, ("expected_answer", str), ("question", str)])
Session = struct("Session", [("resources_session_id", str, "")], omit_defaults=True)
Rollout = struct("Rollout", [("reward", float), ("mask_sample", bool, False)])
Rollouts = struct("Rollouts", [("verify_responses", list[Rollout])])

T = TypeVar("T")
# Python's json writes lone surrogates, which are no JSON. The pattern reads every escape, since "\\\\ud800" has none.
ESCAPE = re.compile(r"\\(?:(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)


def decode(data: bytes, kind: type[T], *where: str | int) -> T:
    """Decode JSON as a `kind`. Raises HTTPException 422, in FastAPI's format, if that is not possible."""
    try:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            text = ESCAPE.sub(lambda escape: "\ufffd" if escape[1] else escape[0], data.decode("utf-8", "replace"))
            return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        detail = [{"type": "value_error", "loc": ["body", *where], "msg": str(error)[:300]}]
        raise HTTPException(422, detail) from None


# -- server ------------------------------------------------------------------------------------------------------------

METRICS = CollectorRegistry()
VERDICTS = Counter("reward_server_verdicts", "Verdicts by status.", ["status"], registry=METRICS)
CACHE_HITS = Counter("reward_server_cache_hits", "Comparisons that were known already.", registry=METRICS)
REFUSED = Counter("reward_server_refused", "Requests refused, by HTTP status.", ["code"], registry=METRICS)
KILLS = Gauge("reward_server_worker_kills_total", "Tasks that cost a worker its life.", registry=METRICS)
IN_FLIGHT = Gauge("reward_server_in_flight", "Tasks that workers have or will get.", registry=METRICS)
QUEUED = Gauge("reward_server_queue_depth", "Batches that wait for workers.", registry=METRICS)
SECONDS = Histogram("reward_server_request_seconds", "Time to a reply.", registry=METRICS)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves before it is done."""
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # after the body it returns only when the client leaves
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise HTTPException(400, "the client has left")
        return job.result()
    finally:
        job.cancel()
        gone.cancel()


@dataclasses.dataclass
class RewardServer:
    """The ASGI application."""

    pool: WorkerPool
    verifier: str = "math"
    lenient: bool = False
    max_queue: int = 1_024  # batches that wait for workers
    token: str | None = None
    judge: Judge | None = None

    def __post_init__(self) -> None:
        self.threads = ThreadPoolExecutor(self.pool.size)  # one for each worker; tasks queue for a thread
        self.cache: dict[bytes, tuple[Verdict, float]] = {}  # verdict, and until when it holds
        self.locks: weakref.WeakValueDictionary[bytes, asyncio.Lock] = weakref.WeakValueDictionary()
        self.places, self.bytes_arriving = asyncio.Semaphore(self.max_queue), 0
        posts = [self.verify, self.verify_batch, self.aggregate_metrics]
        routes = [Route(f"/{work.__name__}", work, methods=["POST"]) for work in posts]
        routes += [Route(path, self.session, methods=["POST"]) for path in ("/seed_session", "/close_session")]
        alive = JSONResponse({"status": "ok"})
        routes += [Route(path, alive) for path in ("/", "/health", "/healthz", "/livez", "/readyz")]
        routes += [Route("/metrics", self.metrics), Route("/reverify_mode", JSONResponse("stateless"))]
        routes.append(Mount("/ng-rollout/{rollout_id}", routes=routes.copy()))  # Gym may put this before any path
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self.refuse})

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        with SECONDS.time():
            await self.app(scope, receive, send)

    async def refuse(self, request: Request, error: HTTPException) -> Response:
        """The reply to a request that ends with an HTTPException."""
        REFUSED.labels(error.status_code).inc()
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    def authorise(self, request: Request) -> None:
        """Raise HTTPException 401 if the server has a token and the request does not."""
        given = request.headers.get("authorization", "").encode()
        if self.token and not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
            raise HTTPException(401, "missing or wrong bearer token", {"WWW-Authenticate": "Bearer"})

    async def read(self, request: Request) -> bytes:
        """The body, within the limits on size and time. Raises HTTPException 401, 408, 413 or 503."""
        self.authorise(request)
        body, too_large = bytearray(), HTTPException(413, f"the body may have {MAX_BODY_BYTES} bytes")
        if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    self.bytes_arriving += len(chunk)
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large
                    if self.bytes_arriving > MAX_BYTES_ARRIVING:
                        raise HTTPException(503, "too much is arriving at once, try again", {"Retry-After": "1"})
        except ClientDisconnect:
            raise HTTPException(400, "the client has left") from None
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {READ_SECONDS} seconds") from None
        finally:
            self.bytes_arriving -= len(body)
        return bytes(body)

    # Verdicts: `at_once` decides what needs neither worker nor judge, `finish` does the rest.

    def at_once(self, text: str, row: Any, raw: bytes) -> Verdict | tuple[str, bytes]:
        """The math verifier's exact verdict, else what to ask a worker."""
        return exact_verdict(text, row.expected_answer, self.lenient) if self.verifier == "math" else (text, raw)

    def is_open(self, found: Verdict | tuple[str, bytes]) -> bool:
        """Whether a worker or the judge has to be asked. The judge gets only answers that the rules did not accept."""
        if not isinstance(found, Verdict):
            return True
        return bool(self.judge and found.extracted_answer and found.status in ("wrong", "unparsable_gold"))

    async def finish(self, found: Verdict | tuple[str, bytes], row: Any) -> Verdict:
        """The verdict, from a worker and, where the rules said no, from the judge."""
        verdict = found if isinstance(found, Verdict) else await self.ask_worker(*found)
        if not self.is_open(verdict):
            return verdict
        status, said = await self.judge.ask(row.question, row.expected_answer, verdict.extracted_answer)
        reason = "the judge gave no verdict" if status == "judge_failed" else None
        return Verdict(float(status == "correct"), status, verdict.extracted_answer, reason, said)

    async def ask_worker(self, text: str, row: bytes) -> Verdict:
        """A worker's verdict. The math verifier makes each comparison once, and others wait for its verdict."""
        if self.verifier != "math":
            return await self.in_worker(text, row)
        key = hashlib.sha256(text.encode() + row).digest()
        async with self.locks.setdefault(key, asyncio.Lock()):
            verdict, until = self.cache.get(key, (None, 0.0))
            if time.monotonic() < until:
                CACHE_HITS.inc()
                return verdict
            verdict = await self.in_worker(text, row)
            # A time-out may be due to a busy machine, so it is kept just long enough for the rest of the group.
            self.cache[key] = verdict, time.monotonic() + (30 if verdict.status == "timeout" else 1e9)
            if len(self.cache) > CACHE_SIZE:
                del self.cache[next(iter(self.cache))]
            return verdict

    async def in_worker(self, text: str, row: bytes) -> Verdict:
        """A worker's verdict. Cancelling this drops a task that waits; a task that runs goes on to its end."""
        with IN_FLIGHT.track_inprogress():
            return await asyncio.get_running_loop().run_in_executor(self.threads, self.pool.run, text, row)

    async def verify_batch(self, request: Request) -> Response:
        """Verify many items: one result for each, in order. Raises HTTPException 429 if too many batches wait."""
        items = decode(await self.read(request), Batch).items
        if len(items) > MAX_BATCH:
            raise HTTPException(413, f"a batch may hold {MAX_BATCH} items, this one holds {len(items)}: send several")
        results: list[Any] = []
        waiting: dict[int, Any] = {}
        slice_end = time.perf_counter() + 0.002
        for index, item in enumerate(items):
            raw = bytes(item.row) or msgspec.json.encode({"expected_answer": item.expected_answer})
            row = decode(raw, MathRow if self.verifier == "math" else AnyRow, "items", index)
            results.append(self.at_once(item.text, row, raw))
            if self.is_open(results[-1]):
                waiting[index] = row
            if time.perf_counter() > slice_end:  # let other requests through
                await asyncio.sleep(0)
                slice_end = time.perf_counter() + 0.002
        if waiting:
            if self.places.locked():
                raise HTTPException(429, "the verification queue is full, try again", {"Retry-After": "1"})
            left = iter(waiting.items())

            async def lane() -> None:  # a few at a time, so that others get a turn
                for index, row in left:
                    results[index] = await self.finish(results[index], row)

            async def all_lanes() -> None:  # a bare `gather` would complain on stderr when the client leaves
                lanes = 32 if self.judge else max(1, self.pool.size - 1)
                await asyncio.gather(*(lane() for _ in range(lanes)))

            async with self.places:
                with QUEUED.track_inprogress():
                    await while_connected(request, all_lanes())
        for verdict in results:
            VERDICTS.labels(verdict.status).inc()
        fields = [{"reward": v.reward, "status": v.status, "extracted_answer": v.extracted_answer} for v in results]
        return Response(msgspec.json.encode({"results": fields}), media_type="application/json")

    async def verify(self, request: Request) -> Response:
        """NeMo Gym's /verify: the request without `question`, plus the verdict. Gym asks only once, so this waits."""
        body = await self.read(request)
        row = decode(body, GymMathRow if self.verifier == "math" else GymRow)
        messages = [item.content for item in row.response.output if item.type == "message"]
        parts = [part for content in messages if isinstance(content, list) for part in content]
        text = "".join(part.text or "" for part in parts if part.type == "output_text")
        verdict = self.at_once(text, row, body)
        if self.is_open(verdict):
            verdict = await while_connected(request, self.finish(verdict, row))
        VERDICTS.labels(verdict.status).inc()
        failure = "judge_failed" if verdict.status == "judge_failed" else "verifier_error"
        reply = decode(body, dict[str, msgspec.Raw])
        reply.pop("question", None)
        reply |= {
            "reward": verdict.reward,
            "extracted_answer": verdict.extracted_answer,
            "library_reward": 0.0 if verdict.evaluations else verdict.reward,
            "judge_evaluations": verdict.evaluations,
            "status": verdict.status,
            "mask_sample": not verdict.verified,
            "failure_kind": None if verdict.verified else failure,
            "failure_reason": verdict.reason,
        }
        return Response(msgspec.json.encode(reply), media_type="application/json")

    async def session(self, request: Request) -> Response:
        """NeMo Gym's /seed_session and /close_session. Verification has no state, so this only repeats the id."""
        session = decode(await self.read(request), Session)
        response = Response(msgspec.json.encode(session), media_type="application/json")
        response.set_cookie("session", "stateless", httponly=True)
        return response

    async def aggregate_metrics(self, request: Request) -> Response:
        """NeMo Gym's summary of an evaluation: the mean reward, without masked samples."""
        rollouts = decode(await self.read(request), Rollouts).verify_responses
        rewards = [rollout.reward for rollout in rollouts if not rollout.mask_sample]
        means = {"mean/reward": statistics.fmean(rewards)} if rewards else {}
        return JSONResponse({"group_level_metrics": [], "agent_metrics": means, "key_metrics": means})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        self.authorise(request)
        KILLS.set(self.pool.kills)
        return Response(generate_latest(METRICS), media_type=CONTENT_TYPE_LATEST)


class HttpConnection(HttpToolsProtocol):
    """uvicorn's connection, with limits on the size of a request's head and on the time in which it arrives."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.begin_head()

    def begin_head(self) -> None:
        self.head_bytes = 0
        self.head_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.head_timer.cancelled():  # not the connection's first request
            self.begin_head()

    def on_headers_complete(self) -> None:
        self.head_timer.cancel()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.head_bytes += len(data)
        if self.head_bytes > MAX_HEAD_BYTES and not self.head_timer.cancelled():
            self.transport.abort()


def watch_parent(parent: int) -> None:
    """End the server when its parent has ended: nothing may stay behind, even after SIGKILL."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.0)
    os._exit(0)  # the workers see the closed socket


def between(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """A type for argparse: a number within these bounds."""

    def number(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, not {text}")
        return kind(text)

    return number


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a mistake ends with one line and exit code 2."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("reward_server.py", argparse.SUPPRESS, summary, allow_abbrev=False)
    workers = min(16, max(4, len(os.sched_getaffinity(0))))
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=between(0, 65_535, int), default=8000, help="0 picks a free port")
    add("--workers", type=between(1, 256, int), default=workers, help="worker processes")
    add("--deadline", type=between(0.05, 600), default=1.0, help="seconds of CPU that a worker may take for one answer")
    add("--max-queue", type=between(1, 1e6, int), default=1_024, help="batches that may wait for workers before 429")
    add("--verifier", default="math", help="math, or your own: module.function or path/to/file.py:function")
    add("--extraction", choices=["strict", "lenient"], default="strict", help="lenient: also what is not boxed")
    add("--judge-url", help="OpenAI-compatible server to ask where the math verifier said no")
    add("--judge-model", help="its model name (default: the first it lists)")
    add("--judge-deadline", type=between(0.05, 3_600), default=30.0, help="seconds for both questions to the judge")
    add("--exit-with-parent", action="store_true", help="end when the parent process is gone")
    args = parser.parse_args(argv)
    needs_math = args.judge_url or args.extraction == "lenient"
    if (needs_math and args.verifier != "math") or not re.match(r"https?://[^/\s]", args.judge_url or "http://none"):
        parser.error("--judge-url must start with http:// or https://; it and --extraction lenient verify math only")
    try:
        load_verifier(args.verifier)
    except ValueError as error:
        parser.error(f"--verifier: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the server until SIGTERM or SIGINT."""
    parent = os.getppid()
    args = parse_arguments(argv)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family, backlog=2_048)
    except OSError as error:
        sys.exit(f"reward_server.py: error: on {args.host}:{args.port}: {error}")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_SECONDS * 1_000)  # for replies nobody reads
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    judge_key = os.environ.get("JUDGE_API_KEY")
    judge = Judge(args.judge_url, args.judge_model, args.judge_deadline, judge_key) if args.judge_url else None
    token = os.environ.get("REWARD_SERVER_TOKEN") or None
    pool = WorkerPool(args.verifier, args.workers, args.deadline)
    app = RewardServer(pool, args.verifier, args.extraction == "lenient", args.max_queue, token, judge)
    config = Config(
        app,
        http=HttpConnection,
        lifespan="off",
        log_level="error",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(PATIENCE * args.deadline + (args.judge_deadline if judge else 0)) + 5,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # before uvicorn takes over, and again when it is done
        signal.signal(number, lambda *_: sys.exit(0))
    if args.exit_with_parent:
        threading.Thread(target=watch_parent, args=(parent,), daemon=True).start()
    host = f"[{args.host}]" if family is socket.AF_INET6 else args.host
    print(f"reward server listening on http://{host}:{listener.getsockname()[1]}", flush=True)
    Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
