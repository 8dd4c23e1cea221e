"""Episodes of several turns, played by NeMo Gym (`env.gym_url`) or by a function of your own (`env.episode`, see
examples/guess.py).

Gym's agents talk to the policy through Gym's model server, which asks us at http://`env.gym_model_address`/v1. We send
rows to `env.gym_url`/run; each reply says which tokens the model made, and becomes one sequence to train on:

    prompt ids   first answer   the environment's turn   second answer
                 ╰──────────── response_ids: mask True, False, True ─╯

No text is tokenised twice: Gym hands back the tokens of earlier turns, and the next prompt begins with exactly these.
Everything here runs in one asyncio loop in a thread of the driver; the engines are Ray actors.
"""

import asyncio
import itertools
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import requests
from aiohttp import web

from config import Config, ConfigError
from launch import RunError
from reward_client import Sample, checked_gym
from verifier_pool import load_verifier

CALLS_IN_FLIGHT = 2  # to each engine, so that it samples while the driver reads the last call's result
CHANGES_SAMPLING = ("stop", "response_format", "logit_bias", "min_tokens")  # of a request's fields
MARK = "\0the model's turn\0"


def read_episode(items: list[dict[str, Any]], verdict: dict[str, Any], stop_token_ids: list[int]) -> Sample:
    """Join an episode's items to one sequence. The last item of each call of the model has the call's token ids.

    The caller fills in prompt and text. Raises RuntimeError if no item has token ids, or if a call's prompt does not
    begin with all earlier tokens.
    """
    calls = [item for item in items if item.get("generation_token_ids")]
    if not calls:
        raise RuntimeError("no answer has its tokens: Gym's model server needs its training config")
    start = len(calls[0]["prompt_token_ids"])
    ids: list[int] = calls[0]["prompt_token_ids"]
    logprobs, mask = [], []
    for call in calls:
        prompt, made = call["prompt_token_ids"], call["generation_token_ids"]
        if prompt[: len(ids)] != ids:
            raise RuntimeError("the agent changed the history, so the episode is not one sequence")
        others = len(prompt) - len(ids)
        ids = prompt + made
        logprobs += [0.0] * others + call["generation_log_probs"]
        mask += [False] * others + [True] * len(made)
    return Sample(
        prompt=0,
        prompt_ids=np.array(ids[:start], dtype=np.int64),
        response_ids=np.array(ids[start:], dtype=np.int64),
        rollout_logprobs=np.array(logprobs, dtype=np.float32),  # 0 where the model did not make the token
        mask=np.array(mask, dtype=bool),
        truncated=ids[-1] not in stop_token_ids,  # the model's last turn was cut off
        text="",
        reward=verdict["reward"],
        status=verdict["status"],
        turns=len(calls),
        tool_calls=sum(item.get("type") == "function_call" or len(item.get("tool_calls") or ()) for item in items),
    )


def lost(prompt: int) -> Sample:
    """Takes the place of an episode that cannot be trained on; the trainer masks and counts it."""
    none = np.zeros(0, dtype=np.int64)
    return Sample(prompt, none, none, none.astype(np.float32), False, "", 0.0, "lost", none.astype(bool), turns=0)


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates expect it: text instead of a list of parts, "system" instead of "developer"."""
    message = dict(message)
    if isinstance(message.get("content"), list):
        message["content"] = "".join(part["text"] for part in message["content"])
    if message["role"] == "developer":
        message["role"] = "system"
    return message


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
    """The chat as token ids: up to the end of the model's last turn those that the engine saw and made.

    Only what the template writes after that turn is tokenised. Example: "<start>user sure?<end><start>assistant", after
    the known ids of "<start>user 2+2?<end><start>assistant 4<end>".
    """
    chat = [plain(message) for message in messages]
    known = [i for i, message in enumerate(chat) if message.get("generation_token_ids")]
    if not known:
        return tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=False)
    seen = chat[known[-1]]["prompt_token_ids"] + chat[known[-1]]["generation_token_ids"]
    chat[known[-1]] = {"role": "assistant", "content": MARK}
    text = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, tokenize=False)
    if text.count(MARK) != 1:
        raise ValueError("the chat template does not write out the assistant's turn once and as it is")
    added = tokenizer.encode(text.partition(MARK)[2], add_special_tokens=False)
    return seen + added[added[:1] == seen[-1:] :]  # `seen` has the end token already, unless the turn was cut off


@dataclass
class Engine:
    """The driver's side of one engine, for one batch of episodes."""

    worker: Any
    new: list[tuple[int, list[int], int]] = field(default_factory=list)  # requests that it has not got yet
    waiting: dict[int, asyncio.Future] = field(default_factory=dict)  # by request number: who waits for its response
    work: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Drop the requests of lost episodes."""
        self.worker.abort.remote(list(self.waiting))
        for future in self.waiting.values():
            if not future.done():  # it is done if the episode that waits was cancelled
                future.set_exception(ValueError("the episode is over"))


def check_gym(url: str) -> None:
    """Raise ConfigError if no server at `url` takes rows."""
    try:
        status = requests.post(url, json={}, timeout=10).status_code
    except requests.RequestException as e:
        status = type(e).__name__
    if not isinstance(status, int) or status in (404, 405):
        raise ConfigError(
            f"env.gym_url: {url} answered {status}; it must be an environment server or an agent of NeMo Gym, "
            "see docs/gym.md"
        )


class Episodes:
    """Plays episodes with the engines; one per run. It is the `engine` that a function of your own gets."""

    def __init__(self, cfg: Config, tokenizer: Any, stop_token_ids: list[int], workers: list[Any]):
        """Load the function, or look for Gym and listen for its model server. Raises ConfigError if that fails."""
        self.cfg, self.policy, self.tokenizer, self.stop_token_ids = cfg.env, cfg.policy, tokenizer, stop_token_ids
        self.timeout_s, self.workers = cfg.cluster.timeout_s, workers
        self.engines: list[Engine] = []  # empty between batches
        self.homes: dict[tuple[int, ...], list[Engine]] = {}  # by a chat's tokens: engines whose prefix cache has them
        self.numbers = itertools.count()
        app = web.Application(client_max_size=0)  # 0: no limit
        app.add_routes([web.post("/v1/chat/completions", self._chat_completions)])
        self.server = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        if self.cfg.gym_url:
            self.run_url = f"{self.cfg.gym_url.rstrip('/')}/run"
            check_gym(self.run_url)
            self._in_loop(self._listen(self.cfg.gym_model_address))
        else:
            try:
                self.function = load_verifier(self.cfg.episode)
            except ValueError as e:
                raise ConfigError(f"env.episode: {e}") from None

    def _in_loop(self, work: Coroutine) -> Any:
        """Run `work` in the loop's thread and return its result. A signal that ends the waiting cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def _listen(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        await self.server.setup()
        try:
            await web.TCPSite(self.server, host, int(port), backlog=2048).start()
        except (OSError, ValueError) as e:
            raise ConfigError(f"cannot listen at env.gym_model_address={address}: {e}") from None

    def close(self) -> None:
        """Stop listening."""
        if self.thread.is_alive():
            self._in_loop(self.server.cleanup())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)

    # ---- a batch of episodes

    def play(self, rows: list[dict[str, Any]], n: int, seed: int, progress: Callable[[], Any]) -> list[Sample]:
        """`n` episodes of each row, ordered by row, the lost ones too (see `lost`). `progress` is called after each.

        Raises RunError if Gym refuses a row, and whatever an engine raises.
        """
        return self._in_loop(self._play(rows, n, seed, progress))

    async def _play(self, rows: list[dict[str, Any]], n: int, seed: int, progress: Callable[[], Any]) -> list[Sample]:
        first_seed = seed * len(self.workers)
        await asyncio.gather(*(w.start_batch.remote(first_seed + i) for i, w in enumerate(self.workers)))
        self.engines, self.homes, self.reasons = [Engine(w) for w in self.workers], defaultdict(list), []
        tasks = [asyncio.create_task(self._episode(i, row)) for i, row in enumerate(rows) for _ in range(n)]
        for task in tasks:
            task.add_done_callback(lambda _: progress())
        driving = [asyncio.create_task(self._drive(e)) for e in self.engines for _ in range(CALLS_IN_FLIGHT)]
        try:
            played = asyncio.gather(*tasks)
            done, _ = await asyncio.wait([played, *driving], return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()  # driving ends only if an engine raises
        finally:
            for task in (*tasks, *driving):
                task.cancel()
            for engine in self.engines:
                engine.stop()
            self.engines = []
            if self.reasons:
                print(f" • {len(self.reasons)} of {len(tasks)} episodes lost; one: {self.reasons[0]}", file=sys.stderr)

    async def _episode(self, prompt: int, row: dict[str, Any]) -> Sample:
        try:
            play = self._in_gym(row) if self.cfg.gym_url else self.function(self, row)
            items, reply = await asyncio.wait_for(play, self.cfg.episode_timeout_s)
            reply = reply if self.cfg.gym_url else {"reward": reply}
            found = read_episode(items, checked_gym(reply), self.stop_token_ids)
            found.prompt, found.text = prompt, self.tokenizer.decode(found.response_ids)
            found.truncated |= bool(reply.get("response", {}).get("incomplete_details"))  # no room for another turn
            return found
        except RunError:
            raise
        except Exception as e:  # whatever becomes of an episode, the others go on
            late = f"not over within env.episode_timeout_s={self.cfg.episode_timeout_s:.0f}"
            self.reasons.append(late if isinstance(e, TimeoutError) else f"{type(e).__name__}: {str(e)[:300]}")
            return lost(prompt)

    async def _in_gym(self, row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The items and the verdict of an episode in Gym."""
        number = next(self.numbers)
        if "task_input" in row:  # a materialized row, for Gym's newer environment servers
            row = {"episode_id": {"rollout_id": str(number), "attempt": 0}, "task": row}
        else:  # some environments want the numbers that Gym's own collector gives to flat rows
            row = row | {"_ng_task_index": number, "_ng_rollout_index": 0}
        no_limit = aiohttp.ClientTimeout(total=None)
        async with aiohttp.request("POST", self.run_url, json=row, timeout=no_limit) as response:
            if response.status != 200:
                refused = 400 <= response.status < 500 and response.status != 429
                said = f"{self.run_url} answered {response.status}: {(await response.text())[:300]}"
                raise RunError(said) if refused else RuntimeError(said)
            reply = await response.json(content_type=None)
        if reply.get("failure"):  # then "result" is null
            raise RuntimeError(reply["failure"]["failure_reason"])
        reply = reply.get("result", reply)
        return reply["response"]["output"], reply

    # ---- the model's turns

    async def _chat_completions(self, request: web.Request) -> web.Response:
        """OpenAI's route; the message in the reply also has token ids and log-probabilities."""
        body = await request.json()
        try:
            if refused := [name for name in CHANGES_SAMPLING if body.get(name)]:
                raise ValueError(f"{', '.join(refused)}: not supported, since it would change what is sampled from")
            limit = body.get("max_completion_tokens") or body.get("max_tokens")
            message = await self.reply(body["messages"], body.get("tools"), limit)
        except ValueError as e:
            error = {"message": str(e), "type": "BadRequestError", "code": 400}
            return web.json_response({"error": error}, status=400)
        prompt, made = len(message["prompt_token_ids"]), message["generation_token_ids"]
        ended = "tool_calls" if "tool_calls" in message else "stop"
        reason = ended if made[-1] in self.stop_token_ids else "length"
        return web.json_response(
            {
                "id": f"chat-{next(self.numbers)}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": reason, "message": message}],
                "usage": {"prompt_tokens": prompt, "completion_tokens": len(made), "total_tokens": prompt + len(made)},
            }
        )

    async def reply(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, max_tokens: int | None = None
    ) -> dict[str, Any]:
        """The model's next message: content, perhaps tool calls, and its tokens. Append it to the chat unchanged.

        Raises ValueError if there is no room for a message, or if no batch is being played.
        """
        if not self.engines:
            raise ValueError("the episode is over")
        ids = prompt_ids(self.tokenizer, messages, tools)
        room = self.policy.max_total_sequence_length - len(ids)
        if room < 1:
            raise ValueError(f"{len(ids)} tokens leave no room for an answer in the context length")
        said = [(*m["prompt_token_ids"], *m["generation_token_ids"]) for m in messages if m.get("generation_token_ids")]
        homes = self.homes[said[-1]] if said else []
        engine = homes.pop() if homes else min(self.engines, key=lambda e: len(e.waiting))
        number, limit = next(self.numbers), min(room, self.policy.generation.max_new_tokens, max_tokens or room)
        engine.new.append((number, ids, limit))
        engine.waiting[number] = asyncio.get_running_loop().create_future()
        engine.work.set()
        group = await engine.waiting[number]
        made, logprobs = group.response_ids[0].tolist(), group.rollout_logprobs[0].tolist()
        self.homes[(*ids, *made)].append(engine)
        tokens = {"prompt_token_ids": ids, "generation_token_ids": made, "generation_log_probs": logprobs}
        return {"role": "assistant", **self._read(made, tools), **tokens}

    async def _drive(self, engine: Engine) -> None:
        """Hand requests to an engine, and its responses to whoever waits for them, until cancelled."""
        while True:
            await engine.work.wait()
            new, engine.new = engine.new, []
            call = engine.worker.advance.remote(new, self.stop_token_ids)
            try:
                groups = await asyncio.wait_for(call, self.timeout_s)
            except TimeoutError:
                late = f"a rollout engine did not answer within cluster.timeout_s={self.timeout_s:.0f}"
                raise RunError(late) from None
            for group in groups:
                future = engine.waiting.pop(group.index)
                if not future.done():
                    future.set_result(group)
            if not engine.waiting:
                engine.work.clear()

    def _read(self, ids: list[int], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Content and tool calls of a response."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not tools:
            return {"content": text}
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        said = ids[:-1] if ids[-1] in self.stop_token_ids else ids
        raw = self.tokenizer.decode(said, skip_special_tokens=False)  # special tokens mark the calls of some models
        parser = ToolParserManager.get_tool_parser(self.cfg.tool_parser)(self.tokenizer)
        found = parser.extract_tool_calls(raw, ChatCompletionRequest(messages=[], model="policy", tools=tools))
        if not found.tools_called:
            return {"content": text}
        return {"content": found.content, "tool_calls": [call.model_dump() for call in found.tool_calls]}
