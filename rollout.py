"""vLLM engines, one Ray actor per engine: token ids in, token ids and log-probabilities out.

The engine runs in the actor's own process, so tokens need not go to a second one and a refit copies weights in place.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from config import Config, PolicyCfg
from launch import OUT_OF_MEMORY_ADVICE, Actors
from refit import Link, Route, WeightReceiver

MOST_RESTARTS = 3  # of engines for one batch of prompts; then something is wrong that a restart does not cure
ADVANCE_S = 0.05  # an engine that plays episodes takes in new requests at least this often


@dataclass
class Group:
    """The responses to one prompt. Lists have one entry per response; ids are int64, log-probabilities float32."""

    index: int  # of the prompt, as the caller numbered it
    response_ids: list[np.ndarray]
    rollout_logprobs: list[np.ndarray]  # after temperature, one per response token
    finish_reasons: list[str]  # "stop" (the last token is an end-of-sequence token) or "length"


class RolloutWorker(WeightReceiver):
    """One vLLM engine; a Ray actor in training, usable directly in tests and in evaluate.py."""

    def __init__(
        self,
        cfg: PolicyCfg,
        seed: int,
        device: str,
        model_name: str | None = None,
        timeout_s: float = 600.0,
        not_for_kv_cache: int | None = None,
    ):
        """`model_name`: load these weights; without it the engine starts with random ones and waits for a refit.
        `not_for_kv_cache`: bytes of its GPU share that weights and policy take; without it vLLM measures what is free.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        gc.disable()  # the import makes many objects that stay; looking for garbage among them takes a second of seven
        from vllm import LLM

        gc.freeze()  # vLLM collects garbage five times while it starts: not among these objects
        gc.enable()
        self.cfg, self.timeout_s = cfg, timeout_s
        self.device, self.dtype = torch.device(device), getattr(torch, cfg.precision)
        if device == "cpu":
            keep_original_weights()
        elif cfg.precision != "float32":
            use_float32_logits()
        generation = cfg.generation
        v = generation.vllm_cfg
        share, kv_bytes = self.gpu_share(not_for_kv_cache)
        self.llm = LLM(
            model=model_name or cfg.model_name,
            load_format="auto" if model_name else "dummy",
            skip_tokenizer_init=True,
            dtype=cfg.precision,
            seed=seed,
            max_model_len=v.max_model_len,
            max_num_seqs=v.max_num_seqs,
            gpu_memory_utilization=share,
            kv_cache_memory_bytes=kv_bytes,
            enforce_eager=v.enforce_eager,
            # If vLLM computes a prompt in chunks, it resets the random state of a prompt with a seed of its own, which
            # the CPU's generator cannot do.
            enable_chunked_prefill=False if device == "cpu" else None,
            enable_sleep_mode=device == "cuda" and generation.colocated.enabled and generation.colocated.sleep,
            logprobs_mode="processed_logprobs",  # after temperature, like the trainer's
            disable_log_stats=True,
            **generation.vllm_kwargs,
        )
        self.engine = self.llm.llm_engine

    def gpu_share(self, not_for_kv_cache: int | None) -> tuple[float, int | None]:
        """The share of GPU memory that vLLM may take, and the bytes of its KV cache (None: what is left of the share).

        Raises MemoryError if nothing is left.
        """
        v = self.cfg.generation.vllm_cfg
        share, kv_bytes = v.gpu_memory_utilization, v.kv_cache_memory_bytes
        if self.device.type == "cpu":
            return share, kv_bytes
        if kv_bytes is None and not_for_kv_cache is not None:
            kv_bytes = int(share * torch.cuda.get_device_properties(0).total_memory) - not_for_kv_cache
            if kv_bytes <= 0:
                raise MemoryError(f"no memory is left for the KV cache: {OUT_OF_MEMORY_ADVICE}")
        # If the bytes are given, vLLM reads the share only to refuse to start when less than that is free.
        return (share if kv_bytes is None else 0.01), kv_bytes

    def ready(self) -> bool:
        return True

    def generate(
        self,
        prompts: list[tuple[int, list[int]]],
        n: int,
        seed: int | list[int],
        stop_token_ids: list[int],
    ) -> Iterator[list[Group]]:
        """Sample `n` responses to each (index, token ids) and yield groups as they finish.

        On the same hardware one `seed` fixes the samples of this call, so that a resumed run repeats them. With a seed
        for each prompt (slower) a prompt's samples do not depend on the other prompts either.
        """
        self.start_batch(seed if isinstance(seed, int) else None)
        seeds: list[int | None] = seed if isinstance(seed, list) else [None] * len(prompts)
        for (index, ids), own_seed in zip(prompts, seeds, strict=True):
            room = min(self.cfg.generation.max_new_tokens, self.cfg.max_total_sequence_length - len(ids))
            self.add_request(index, ids, n, own_seed, stop_token_ids, room)
        while self.engine.has_unfinished_requests():
            if groups := self.step():
                yield groups

    def start_batch(self, seed: int | None) -> None:
        """Empty the prefix cache, which older weights filled, and set the seed (None: none) of all coming requests."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")
        if seed is not None:
            torch.manual_seed(seed)  # vLLM's older runner samples from torch's generator,
            np.random.seed(seed % 2**32)  # the newer one draws a seed for each request from numpy's

    def add_request(
        self,
        index: int,
        ids: list[int],
        n: int,
        seed: int | None,
        stop_token_ids: list[int],
        max_tokens: int,
    ) -> None:
        """Let `step` sample `n` responses to these token ids."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=n,
            seed=seed,
            temperature=self.cfg.generation.temperature,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(str(index), {"prompt_token_ids": ids}, params)

    def step(self) -> list[Group]:
        """Sample one token for each running request; returns the groups that are now finished."""
        return [self._group(output) for output in self.engine.step() if output.finished]

    def advance(self, requests: list[tuple[int, list[int], int]], stop_token_ids: list[int]) -> list[Group]:
        """Add requests (index, token ids, max_tokens), and run all until one is finished, at most for ADVANCE_S.

        gym.py calls this again and again, and hands over new requests with the next call.
        """
        for index, ids, max_tokens in requests:
            self.add_request(index, ids, 1, None, stop_token_ids, max_tokens)
        found: list[Group] = []
        end = time.monotonic() + ADVANCE_S
        while not found and self.engine.has_unfinished_requests() and time.monotonic() < end:
            found = self.step()
        return found

    def abort(self, indices: list[int]) -> None:
        """Drop these requests unless they are finished."""
        self.engine.abort_request([str(index) for index in indices])

    @staticmethod
    def _group(output: Any) -> Group:
        answers = sorted(output.outputs, key=lambda o: o.index)
        return Group(
            index=int(output.request_id.split("-")[0]),
            response_ids=[np.array(o.token_ids, dtype=np.int64) for o in answers],
            rollout_logprobs=[np.array(o.logprobs.logprobs, dtype=np.float32) for o in answers],
            finish_reasons=[o.finish_reason for o in answers],
        )

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Copy (Hugging Face name, tensor) pairs into vLLM's model; called by `WeightReceiver`."""
        self.llm.apply_model(lambda model: model.load_weights(weights))

    def sleep(self) -> None:
        """Give weights and KV cache back to the GPU; a refit brings the weights back."""
        self.llm.sleep(level=2)

    def wake_up(self, tag: str) -> None:
        self.llm.wake_up(tags=[tag])


def keep_original_weights() -> None:
    """Stop vLLM's CPU build from repacking linear weights and dropping the originals, which a refit writes to.

    It repacks them for oneDNN, and in bfloat16 also for kernels of its own.
    """
    import vllm._custom_ops
    from vllm.model_executor.layers import utils

    vllm._custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


def use_float32_logits() -> None:
    """Let vLLM's LM head return float32 from 16-bit inputs, as the trainer's does.

    Rounded logits were most of the mismatch between engine and trainer in bfloat16. vLLM 0.32 has an option for it
    (head_dtype), 0.25 has not; this works for both.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    def apply(_: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        logits = torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits + bias

    UnquantizedEmbeddingMethod.apply = apply


class RolloutEngines(Actors):
    """All engines as one object for the training loop."""

    def __init__(self, cfg: Config, placement: Any, model_name: str | None = None, not_for_kv_cache: int | None = None):
        """`model_name`, `not_for_kv_cache`: as in `RolloutWorker`; engines with their own GPUs ignore the latter."""
        colocated, bundles = cfg.policy.generation.colocated, cfg.engine_bundles
        not_for_kv_cache = not_for_kv_cache if colocated.enabled else None
        arguments = [
            (cfg.policy, cfg.grpo.seed + i, cfg.device, model_name, cfg.cluster.timeout_s, not_for_kv_cache)
            for i in range(len(bundles))
        ]
        share = (0.5 if colocated.enabled else 1.0) / cfg.policy.generation.engines_per_gpu
        # On a CPU vLLM would compile a line of its sampler, which takes ten seconds on a new machine and saves nothing.
        eager = cfg.device == "cpu" and cfg.policy.generation.vllm_cfg.enforce_eager
        env = {"TORCHDYNAMO_DISABLE": str(int(eager))}
        super().__init__(RolloutWorker, arguments, cfg, placement, bundles, share, env)
        self.cfg, self.sleeps = cfg, self.on_gpu and colocated.enabled and colocated.sleep
        self.route: Route = "broadcast" if not colocated.enabled else "ipc" if self.on_gpu else "object store"
        # Actors that weights come from. Without any, as in evaluate.py, engines read their weights themselves.
        self.policy: list[Any] = []
        self.link: Link | None = None
        self.restarts = 0

    def start(self) -> list[Any]:
        """References that resolve when the engines are loaded."""
        return [w.ready.remote() for w in self.workers]

    def generate(
        self, prompts: list[list[int]], n: int, seed: int | list[int], stop_token_ids: list[int]
    ) -> Iterator[Group]:
        """Sample `n` responses to every prompt (token ids); yields one `Group` a prompt, in the order they finish.

        Prompts are dealt to the engines in turn. Each engine has its own seed, or with a list of seeds each prompt. An
        engine that dies is replaced. The new one gets all of its prompts with the same seed, also those of finished
        groups, since samples depend on what else is sampled. Raises TimeoutError when no engine has finished a group
        for `cluster.timeout_s`.
        """
        count = len(self.workers)

        def ask(i: int) -> Any:
            asked = list(enumerate(prompts))[i::count]
            own_seed = seed[i::count] if isinstance(seed, list) else seed * count + i
            method = self.workers[i].generate.options(num_returns="streaming")
            return method.remote(asked, n, own_seed, stop_token_ids)

        streams = {ask(i): i for i in range(count)}
        answered, most_restarts = set(), self.restarts + MOST_RESTARTS
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=self.timeout_s, fetch_local=False)
            if not ready:
                raise TimeoutError(f"no answer from the rollout engines for {self.timeout_s:.0f} s (cluster.timeout_s)")
            for stream in ready:
                try:
                    groups = ray.get(next(stream), timeout=self.timeout_s)
                except StopIteration:
                    del streams[stream]
                    continue
                except RayActorError as e:
                    if self.restarts == most_restarts or e.actor_init_failed:
                        raise
                    i = streams.pop(stream)
                    self.replace(i, e)
                    streams[ask(i)] = i
                    continue
                yield from (group for group in groups if group.index not in answered)
                answered.update(group.index for group in groups)

    def replace(self, i: int, reason: Exception) -> None:
        """Replace engine `i`, which died, by one in the same place with the policy's weights."""
        why = " ".join(str(reason).split())[-200:]
        print(f"rollout engine {i} died, starting it again ({why})", file=sys.stderr, flush=True)
        self.restarts += 1
        ray.kill(self.workers[i])  # Ray may only have lost sight of it
        self.make_room()
        self.workers[i] = self.starters[i]()
        if self.policy:
            Link(self.policy, [self.workers[i]], [self.cfg.engine_bundles[i]], self.route, self.timeout_s).refit()
            self.link = None  # it holds the dead engine: the next refit makes a new one

    def make_room(self) -> None:
        """Let the policy give unused memory back. Raises RayActorError, which ends the run, if it lost a rank."""
        ray.get([w.empty_cache.remote() for w in self.policy], timeout=self.timeout_s)

    def replace_dead(self) -> None:
        """Replace engines that died while nothing was asked of them."""
        for i, ready in enumerate([w.ready.remote() for w in self.workers]):
            try:
                ray.get(ready, timeout=self.timeout_s)
            except RayActorError as e:
                self.replace(i, e)

    def surviving(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns; if engines die in it, replace them and call it again."""
        for _ in range(MOST_RESTARTS):
            try:
                return work()
            except RayActorError:
                self.make_room()  # first, since an engine does not answer while it waits for a lost rank's weights
                self.replace_dead()
        return work()

    def sleep(self) -> None:
        if self.sleeps:
            self.all("sleep")

    def refit(self) -> None:
        """Bring the policy's weights into every engine and wake the KV memory. (`generate` forgets cached prefixes.)"""
        self.replace_dead()  # a broadcast would wait for them
        self.surviving(self._refit)  # to wake an engine twice does no harm

    def _refit(self) -> None:
        if not self.link:
            self.link = Link(self.policy, self.workers, self.cfg.engine_bundles, self.route, self.timeout_s)
        if self.sleeps:
            self.make_room()
            self.all("wake_up", "weights")
        self.link.refit()
        if self.sleeps:
            self.make_room()
            self.all("wake_up", "kv_cache")
