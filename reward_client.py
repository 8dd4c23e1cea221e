"""Rewards over HTTP: starts `reward_server.py` when no URL is given, sends groups, survives the server's death.

A group that cannot be verified comes back with status "unreachable" and is masked by the trainer, never scored 0. A
server that refuses a request (HTTP 4xx) ends the run with what it said.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from config import ConfigError, Env
from launch import RunError

VERIFIED = frozenset({"correct", "wrong", "no_answer"})  # any other status says nothing about the answer
LARGEST_REWARD = 1e6  # beyond this a reward is taken for a fault of the verifier
START_DEADLINE_S = 30.0
ATTEMPTS = 3
BANNER = "reward server listening on "


UNREACHABLE = {"reward": 0.0, "status": "unreachable", "extracted_answer": None}


def checked(verdict: Any) -> dict[str, Any]:
    """A verdict as the server gave it, or an unverified one if its reward or status cannot be used."""
    reward, status = verdict["reward"], verdict["status"]
    number = isinstance(reward, int | float) and abs(reward) <= LARGEST_REWARD  # not for NaN
    return verdict if number and isinstance(status, str) else UNREACHABLE | {"status": "unusable"}


class RewardClient:
    """Scores groups of answers in the background; one per run."""

    def __init__(self, cfg: Env, log_dir: str | Path):
        """Start a server on this node, or check that the one at `env.reward_url` answers. Raises ConfigError if not."""
        self.cfg, self.log_path = cfg, Path(log_dir) / "reward_server.log"
        self.process: subprocess.Popen | None = None
        self.restarts = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="reward")
        if cfg.reward_url:
            self.url = cfg.reward_url.rstrip("/")
            self._check_health()
        else:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self._start()

    def _check_health(self) -> None:
        try:
            requests.get(f"{self.url}/healthz", timeout=10).raise_for_status()
        except requests.RequestException as e:
            raise ConfigError(
                f"no reward server at env.reward_url={self.url} ({type(e).__name__}); start reward_server.py there, or "
                "set env.reward_url=null to start one on this node"
            ) from None

    def _start(self) -> None:
        script = Path(__file__).with_name("reward_server.py")
        command = [sys.executable, str(script), "--port", "0", "--workers", str(self.cfg.reward_workers)]
        command += ["--verifier", self.cfg.verifier, "--exit-with-parent"]
        command += ["--judge-url", self.cfg.judge_url] if self.cfg.should_use_judge else []
        already = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            # In a process group of its own, so that a Ctrl-C does not end it while the run is still saving.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            output = self.log_path.read_bytes()[already:].decode(errors="replace")
            banner = [
                line for line in output.splitlines(keepends=True) if line.startswith(BANNER) and line.endswith("\n")
            ]
            if banner:
                self.url = banner[0].removeprefix(BANNER).strip()
                return
            time.sleep(0.02)  # the server says when it is ready; this only paces the reading
        self.process.kill()
        raise ConfigError(f"the reward server did not start within {START_DEADLINE_S:.0f} s; see {self.log_path}")

    def submit(self, texts: list[str], row: dict[str, Any]) -> Future:
        """Score the responses to one row, of which the verifier sees all fields.

        The result is a list of {"reward", "status", "extracted_answer"}. It raises RunError if the server refuses.
        """
        items = [{"text": text, "expected_answer": row["expected_answer"], "row": row} for text in texts]
        return self._pool.submit(self._verify, items)

    def _verify(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for attempt in range(ATTEMPTS):
            url = self.url
            try:
                reply = self._session().post(
                    f"{url}/verify_batch", json={"items": items}, timeout=self.cfg.reward_timeout_s
                )
                if reply.status_code in (429, 503):
                    time.sleep(min(float(reply.headers.get("Retry-After", 1)), 5.0))
                    continue
                if 400 <= reply.status_code < 500:  # asking again would not help
                    raise RunError(f"{url}/verify_batch answered {reply.status_code}: {reply.text[:300]}")
                reply.raise_for_status()
                results = reply.json()["results"]
                if len(results) == len(items):
                    return [checked(verdict) for verdict in results]
            except (requests.RequestException, ValueError, KeyError, TypeError) as e:
                print(f"reward server: attempt {attempt + 1} of {ATTEMPTS} failed ({str(e)[:200]})", file=sys.stderr)
                self._restart_if_dead(url)
        return [UNREACHABLE for _ in items]

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):  # sessions keep connections open, but are not thread-safe
            self._local.session = requests.Session()
            token = os.environ.get("REWARD_SERVER_TOKEN")
            self._local.session.headers.update({"Authorization": f"Bearer {token}"} if token else {})
        return self._local.session

    def _restart_if_dead(self, url: str) -> None:
        with self._lock:
            if self.process is None or url != self.url or self.process.poll() is None:
                return  # not ours, already restarted by another thread, or alive
            print(
                f"reward server: it died with exit code {self.process.returncode}, starting it again", file=sys.stderr
            )
            self.restarts += 1
            self._start()

    def close(self) -> None:
        """Stop the server we started; whoever's server it is otherwise stays."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
