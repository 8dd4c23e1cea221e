"""Rewards over HTTP: starts `reward_server.py` when no URL is given, sends groups, survives the server's death.

`env.reward_url` may also be a resources server of NeMo Gym, which gets one response at a time.

A group that cannot be verified comes back with status "unreachable" and is masked by the trainer, never scored 0. If a
server refuses a request (HTTP 4xx), the run ends with what the server said.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests

from config import ConfigError, Env
from launch import RunError

VERIFIED = frozenset({"correct", "wrong", "no_answer"})  # any other status says nothing about the response
LARGEST_REWARD = 1e6  # a larger reward is taken for a fault of the verifier
START_DEADLINE_S = 30.0
HEALTH_DEADLINE_S = 10.0
ATTEMPTS = 3
BANNER = "reward server listening on "
UNREACHABLE = {"reward": 0.0, "status": "unreachable", "extracted_answer": None}


@dataclass
class Sample:
    """One response with its reward, on its way to the update. Arrays have one entry per token: ids are int64,
    log-probabilities float32, and the mask is bool."""

    prompt: int  # number of its prompt in this step; samples of the same prompt are a group
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    truncated: bool
    text: str
    reward: float = 0.0
    status: str = ""
    mask: np.ndarray | None = None  # in an episode of several turns: which response tokens the model made; None: all
    turns: int = 1
    tool_calls: int = 0

    @property
    def verified(self) -> bool:
        return self.status in VERIFIED

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def response_tokens(self) -> int:
        return len(self.response_ids)

    @property
    def masked_tokens(self) -> int:
        return 0 if self.mask is None else int((~self.mask).sum())


def checked(verdict: Any) -> dict[str, Any]:
    """The server's verdict, or an unverified one if its reward or status cannot be used."""
    reward, status = verdict["reward"], verdict["status"]
    number = isinstance(reward, int | float) and abs(reward) <= LARGEST_REWARD  # false for NaN
    return verdict if number and isinstance(status, str) else UNREACHABLE | {"status": "unusable"}


def checked_group(reply: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """The verdicts on a group, from a reply to /verify_batch."""
    if len(reply["results"]) != size:
        raise ValueError(f"{len(reply['results'])} verdicts for {size} answers")
    return [checked(verdict) for verdict in reply["results"]]


def checked_gym(reply: dict[str, Any]) -> dict[str, Any]:
    """The verdict in NeMo Gym's reply to /verify or /run. With `mask_sample` the reward says nothing."""
    reward = reply["reward"]
    masked = reply.get("mask_sample") or (reply.get("instance_config") or {}).get("mask_sample")
    right = isinstance(reward, int | float) and reward > 0
    status = "masked" if masked else "correct" if right else "wrong"
    return checked({"reward": reward, "status": status, "extracted_answer": reply.get("extracted_answer")})


def gym_response(text: str) -> dict[str, Any]:
    """A response in NeMo Gym's format, with the thoughts before the last `</think>` in an item of their own."""
    thoughts, end, said = text.rpartition("</think>")
    content = [{"type": "output_text", "text": said, "annotations": []}]
    output = [{"type": "message", "id": "answer", "role": "assistant", "status": "completed", "content": content}]
    if end:
        summary = [{"type": "summary_text", "text": thoughts.removeprefix("<think>")}]
        output.insert(0, {"type": "reasoning", "id": "thoughts", "summary": summary})
    always = {"id": "response", "object": "response", "created_at": 0, "model": "policy"}
    return always | {"output": output, "parallel_tool_calls": False, "tool_choice": "auto", "tools": []}


class RewardClient:
    """Scores groups of responses in the background; one per run."""

    def __init__(self, cfg: Env, log_dir: str | Path):
        """Start a server on this node, or check that the one at `env.reward_url` answers. Raises ConfigError if not."""
        self.cfg, self.log_path = cfg, Path(log_dir) / "reward_server.log"
        self.process: subprocess.Popen | None = None
        self.restarts = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="reward")
        self._single = ThreadPoolExecutor(32, thread_name_prefix="reward_single")  # one response each, for NeMo Gym
        self.is_gym = False
        if cfg.reward_url:
            self.url = cfg.reward_url.rstrip("/")
            self.is_gym = self._probe()
        else:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self._start()

    def _probe(self) -> bool:
        """Whether the server at `env.reward_url` is one of NeMo Gym's. Raises ConfigError if it is neither kind."""
        said = []
        for path, body, expected in (("/verify_batch", {"items": []}, 200), ("/verify", {}, 422)):
            try:
                reply = self._session().post(self.url + path, json=body, timeout=10)
            except requests.RequestException as e:
                raise ConfigError(
                    f"no reward server at env.reward_url={self.url} ({type(e).__name__}); start reward_server.py "
                    "there, or set env.reward_url=null to start one on this node"
                ) from None
            if reply.status_code == expected:
                return path == "/verify"
            said.append(f"{path} answered {reply.status_code} {reply.text[:200]!r}")
        raise ConfigError(
            f"env.reward_url={self.url} is neither reward_server.py nor a resources server of NeMo Gym: "
            f"{', '.join(said)}"
        )

    def _start(self) -> None:
        script = Path(__file__).with_name("reward_server.py")
        command = [sys.executable, str(script), "--port", "0", "--workers", str(self.cfg.reward_workers)]
        command += ["--verifier", self.cfg.verifier, "--extraction", self.cfg.extraction, "--exit-with-parent"]
        command += ["--judge-url", self.cfg.judge_url] if self.cfg.should_use_judge else []
        already = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            # In a process group of its own, so that a Ctrl-C does not end it while the run is still saving.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            output = self.log_path.read_bytes()[already:].decode(errors="replace")
            if banner := re.search(f"^{BANNER}(.*)\n", output, re.MULTILINE):
                self.url = banner[1]
                return
            time.sleep(0.02)
        self.process.kill()
        raise ConfigError(f"the reward server did not start within {START_DEADLINE_S:.0f} s; see {self.log_path}")

    def submit(self, texts: list[str], row: dict[str, Any]) -> Future:
        """Score the responses to one row, of which the verifier sees all fields.

        The result is a list of {"reward", "status", "extracted_answer"}. It raises RunError if the server refuses.
        """
        items = [{"text": text, "expected_answer": row.get("expected_answer"), "row": row} for text in texts]
        return self._pool.submit(self._verify, items)

    def _verify(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.is_gym:
            return list(self._single.map(self._verify_in_gym, items))
        results = self._ask(self._session(), "/verify_batch", {"items": items}, lambda r: checked_group(r, len(items)))
        return results or [UNREACHABLE for _ in items]

    def _verify_in_gym(self, item: dict[str, Any]) -> dict[str, Any]:
        row = item["row"]
        with requests.Session() as session:  # with its own cookies, by which Gym tells responses apart
            seeded = self._ask(session, "/seed_session", row, lambda _: True)
            request = row | {"response": gym_response(item["text"])}
            return (seeded and self._ask(session, "/verify", request, checked_gym)) or UNREACHABLE

    def _ask(self, session: requests.Session, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """Return `read(reply)`, or None if no reply could be read. Raises RunError if the server refuses."""
        for attempt in range(ATTEMPTS):
            url = self.url
            try:
                reply = session.post(url + path, json=body, timeout=self.cfg.reward_timeout_s)
                if reply.status_code in (429, 503):
                    time.sleep(min(float(reply.headers.get("Retry-After", 1)), 5.0))
                    continue
                if 400 <= reply.status_code < 500:  # asking again would not help
                    raise RunError(f"{url}{path} answered {reply.status_code}: {reply.text[:300]}")
                reply.raise_for_status()
                return read(reply.json())
            except (requests.RequestException, ValueError, KeyError, TypeError) as e:
                print(f"reward server: attempt {attempt + 1} of {ATTEMPTS} failed ({str(e)[:200]})", file=sys.stderr)
                self._restart_if_dead(url)
        return None

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):  # sessions keep connections open, but are not thread-safe
            self._local.session = requests.Session()
            self._local.session.trust_env = self.process is None  # no HTTP_PROXY reaches our own server on 127.0.0.1
            token = os.environ.get("REWARD_SERVER_TOKEN")
            self._local.session.headers.update({"Authorization": f"Bearer {token}"} if token else {})
        return self._local.session

    def _restart_if_dead(self, url: str) -> None:
        with self._lock:
            if self.process is None or url != self.url or self._is_alive():
                return  # not ours, already restarted by another thread, or alive
            code = self.process.poll()
            state = "does not answer any more" if code is None else f"died with exit code {code}"
            print(f"reward server: it {state}, starting it again", file=sys.stderr)
            self.process.kill()
            self.restarts += 1
            self._start()

    def _is_alive(self) -> bool:
        """Whether our server runs and answers, which it also does while its workers are busy."""
        if self.process.poll() is not None:
            return False
        try:
            return self._session().get(f"{self.url}/healthz", timeout=HEALTH_DEADLINE_S).ok
        except requests.RequestException:
            return False

    def close(self) -> None:
        """Stop the server if we started it."""
        for pool in (self._pool, self._single):
            pool.shutdown(wait=False, cancel_futures=True)
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
