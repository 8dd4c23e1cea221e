r"""Every number that the docs state about the reward server, in one run.

    python benchmarks/reward_server.py            # ~3 minutes; writes benchmarks/results/reward_server.json

The server's event loop is pinned to one core and the load generator takes the others. What is stated per CPU second
counts the server's own processor time, so that other jobs on the machine change it little. math-verify is measured in
the same run on the same texts, its time-outs off, as in a worker. Every figure is the median of `--repeats` runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ["SYMPY_GROUND_TYPES"] = "python"

from environment import environment  # noqa: E402
from hostile_answers import HOSTILE, box, code_answers  # noqa: E402

import math_verifier  # noqa: E402
from math_verifier import NeedsAlgebra, UnparsableGold  # noqa: E402
from reward_server import verify  # noqa: E402

VARIANTS = ROOT.parent / "shared" / "data" / "verifier" / "variants.jsonl"
CORES = sorted(os.sched_getaffinity(0))


def response_text(size: int, answer: str, seed: int = 0) -> str:
    """A chain of thought of about `size` characters that ends in a box."""
    random_ = random.Random(seed)
    steps = [
        r"We have $x_{%d} = \frac{%d}{%d}$, so the sum is %d. ",
        r"Let \( f(x) = %dx^2 + %dx \); then $f(%d) = %d$. ",
        "Step %d: since %d divides the product, we may write it as %d times %d.\n",
    ]
    parts: list[str] = []
    while sum(map(len, parts)) < size - len(answer) - 40:
        parts.append(random_.choice(steps) % tuple(random_.randint(1, 999) for _ in range(4)))
    return "".join(parts) + rf"The answer is \boxed{{{answer}}}."


def rate(work: Callable[[], None], count: int, repeats: int) -> float:
    """Median calls per second."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            work()
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def in_process(repeats: int) -> dict[str, Any]:
    """Verifications per second on one core, ours and math-verify's, integer golds."""
    from math_verify import parse
    from math_verify import verify as peer_verify

    logging.disable(logging.CRITICAL)
    results: dict[str, Any] = {}
    for size in (1_000, 60_000):
        texts = [
            (response_text(size, str(1_000 + i), i), str(1_000 + i - i % 2)) for i in range(64)
        ]  # more than math-verify caches

        def ours(texts: list[tuple[str, str]] = texts) -> None:
            for text, gold in texts:
                verify(text, gold)

        def peer(texts: list[tuple[str, str]] = texts) -> None:
            for text, gold in texts:
                parsed = parse(gold, parsing_timeout=None), parse(text, parsing_timeout=None)
                peer_verify(*parsed, timeout_seconds=None)

        mine = rate(ours, 500_000 // size, repeats) * len(texts)
        other = rate(peer, max(1, 5_000 // size), repeats) * len(texts)
        results[f"{size // 1000} KB"] = {
            "ours_per_s": round(mine),
            "math_verify_per_s": round(other),
            "ratio": round(mine / other, 1),
        }
    return results


def variants() -> dict[str, Any]:
    """Accuracy on rewritten answers, ours and math-verify's."""
    if not VARIANTS.exists():
        return {"skipped": "variants.jsonl is not on this machine"}
    from math_verify import parse
    from math_verify import verify as peer_verify

    rows = [json.loads(line) for line in VARIANTS.read_text().splitlines()]
    wrong: dict[str, Counter[str]] = {"ours": Counter(), "math_verify": Counter()}
    start = time.perf_counter()
    ours = [verify(box(row["pred_answer"]), row["gold"]).reward == 1.0 for row in rows]
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    peer = []
    for row in rows:
        parsed = parse(f"${row['gold']}$", parsing_timeout=None), parse(box(row["pred_answer"]), parsing_timeout=None)
        peer.append(peer_verify(*parsed, timeout_seconds=None))
    peer_seconds = time.perf_counter() - start
    for name, verdicts in (("ours", ours), ("math_verify", peer)):
        for row, pays in zip(rows, verdicts, strict=True):
            if pays != row["expected"]:
                wrong[name]["false_positive" if pays else "false_negative"] += 1
    result: dict[str, Any] = {"rows": len(rows), "rows_decided_without_algebra": sum(_decided(row) for row in rows)}
    for name, took in (("ours", seconds), ("math_verify", peer_seconds)):
        accuracy = round(1 - wrong[name].total() / len(rows), 5)
        result[name] = {"accuracy": accuracy, **wrong[name], "rows_per_s": round(len(rows) / took)}
    return result


def _decided(row: dict[str, Any]) -> bool:
    try:
        math_verifier.compare(row["gold"], row["pred_answer"])
    except NeedsAlgebra:
        return False
    except UnparsableGold:
        pass
    return True


class Server:
    """A server whose event loop is pinned to one core."""

    def __init__(self, *arguments: str):
        command = [sys.executable, str(ROOT / "reward_server.py"), "--port", "0", "--exit-with-parent", *arguments]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])
        self.ready_s = time.perf_counter() - start
        if len(CORES) > 1:  # all threads of the serving process; the load generator takes another core
            for task in os.listdir(f"/proc/{self.process.pid}/task"):
                os.sched_setaffinity(int(task), {CORES[0]})
        run_load(self, lambda: (gym_bytes(box("x+x"), "2x"), "all"), 1, 0)  # until workers can be forked

    def cpu_seconds(self) -> float:
        """Processor time of the serving process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """SIGTERM and wait."""
        self.process.terminate()
        self.process.wait(20)


def http_bytes(path: str, body: Any) -> bytes:
    """A whole HTTP request."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def gym_bytes(text: str, gold: str) -> bytes:
    """A NeMo Gym verify request."""
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
    body = {
        "responses_create_params": {"input": [{"role": "user", "content": "What is it?"}]},
        "response": {"id": "r", "output": [message]},
        "question": "What is it?",
        "expected_answer": gold,
    }
    return http_bytes("/verify", body)


async def load(
    port: int, next_request: Callable[[], tuple[bytes, str]], connections: int, seconds: float
) -> dict[str, list[float]]:
    """Closed-loop load; latencies in seconds by the label that `next_request` gives."""
    latencies: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
        while (start := time.perf_counter()) < end or not latencies:
            request, label = next_request()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            latencies.setdefault(label, []).append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return latencies


def run_load(server: Server, *arguments: Any) -> dict[str, list[float]]:
    """`load` on the faster event loop that vLLM brings."""
    import uvloop

    return uvloop.run(load(server.port, *arguments))


def percentile(values: list[float], share: float) -> float:
    """Milliseconds."""
    return round(sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1e3, 2)


def throughput(server: Server, repeats: int, seconds: float) -> dict[str, Any]:
    """Verifications per second, and per second of the server's processor time, of /verify and of /verify_batch."""
    single = [gym_bytes(response_text(16_000, str(1_000 + i), i), str(1_000 + i - i % 2)) for i in range(64)]
    items = [{"text": response_text(4_000, str(i), i), "expected_answer": str(i - i % 2)} for i in range(256)]
    batch = http_bytes("/verify_batch", {"items": items})
    results: dict[str, Any] = {}
    for name, requests, connections, per_request in (
        ("verify 16 KB", single, 64, 1),
        ("verify_batch 256 x 4 KB", [batch], 4, 256),
    ):
        runs = []
        for _ in range(repeats):
            before = server.cpu_seconds()
            choices = iter(random.Random(0).choices(requests, k=1_000_000))
            latencies = run_load(server, lambda choices=choices: (next(choices), "all"), connections, seconds)["all"]
            count = len(latencies) * per_request
            cpu = server.cpu_seconds() - before
            runs.append((count / seconds, count / cpu, percentile(latencies, 0.5), percentile(latencies, 0.99)))
        per_s, per_cpu_s, p50, p99 = (statistics.median(column) for column in zip(*runs, strict=True))
        results[name] = {
            "connections": connections,
            "verifications_per_s": round(per_s),
            "verifications_per_cpu_s": round(per_cpu_s),
            "p50_ms": p50,
            "p99_ms": p99,
        }
    return results


def hostile_mix(repeats: int, seconds: float) -> dict[str, Any]:
    """p99 of ordinary requests: clean, with 5 % hostile ones among them, and beside a batch of 4,096 slow answers."""
    normal = [gym_bytes(response_text(4_000, str(1_000 + i), i), str(1_000 + i - i % 2)) for i in range(64)]
    hostile = [gym_bytes(text, gold) for text in HOSTILE.values() if len(text) <= 200_000 for gold in ("42", "x^2+1")]
    slow = [{"text": box(HOSTILE["integral"][7:-1] + f"+{i}"), "expected_answer": "3"} for i in range(4_096)]
    server = Server()
    p99: dict[str, list[float]] = {"clean": [], "5 % hostile": [], "beside 4,096 slow answers": []}
    for repeat in range(repeats):
        random_ = random.Random(repeat)

        def pick(share: float, random_: random.Random = random_) -> tuple[bytes, str]:
            if random_.random() < share:
                return random_.choice(hostile), "hostile"
            return random_.choice(normal), "normal"

        for name, share in (("clean", 0.0), ("5 % hostile", 0.05)):
            found = run_load(server, lambda share=share: pick(share), 16, seconds)
            p99[name].append(percentile(found["normal"], 0.99))
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(http_bytes("/verify_batch", {"items": slow}))
            time.sleep(1)  # its exact part
            found = run_load(server, lambda: pick(0.0), 16, seconds)
            p99["beside 4,096 slow answers"].append(percentile(found["normal"], 0.99))
    server.stop()
    return {"connections": 16} | {f"p99_ms {name}": statistics.median(values) for name, values in p99.items()}


def hostile_replies() -> dict[str, Any]:
    """Latency of every hostile answer, one after the other, against three golds; files created; memory."""
    server = Server()
    with tempfile.TemporaryDirectory() as folder:
        bait = Path(folder) / "created"
        answers = {**HOSTILE, **code_answers(str(bait))}
        del answers["lone surrogate"]
        cases = [gym_bytes(text, gold) for gold in ("42", r"\frac{\sqrt{3}}{2}", "x^2+1") for text in answers.values()]
        latencies: list[float] = []
        for case in cases:
            latencies += run_load(server, lambda case=case: (case, "all"), 1, 0)["all"]
        created = bait.exists()
    memory = int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
    server.stop()
    return {
        "requests": len(latencies),
        "deadline_s": 1.0,
        "max_ms": percentile(latencies, 1.0),
        "share_under_50_ms": round(sum(value < 0.05 for value in latencies) / len(latencies), 4),
        "files_created": created,
        "server_peak_rss_mb": memory,
    }


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one load run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "reward_server.json")
    args = parser.parse_args()
    packages = ("math-verify", "sympy", "uvicorn", "httptools", "starlette", "msgspec")
    results: dict[str, Any] = {"environment": environment(packages) | {"load_average": os.getloadavg()[0]}}
    ready = []
    for _ in range(args.repeats):
        server = Server()
        ready.append(server.ready_s)
        server.stop()
    results["ready_s"] = round(statistics.median(ready), 3)
    if len(CORES) > 1:  # the load generator and the in-process runs keep off the server's core
        os.sched_setaffinity(0, set(CORES[1:]))
    server = Server()
    results["one_core_server"] = throughput(server, args.repeats, args.seconds)
    server.stop()
    results["hostile"] = hostile_replies()
    results["hostile_mix"] = hostile_mix(args.repeats, args.seconds)
    results["in_process_one_core"] = in_process(args.repeats)
    results["variants"] = variants()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
