"""The policy, the model that is trained. One Ray actor per rank updates, sends and saves its part of it (model.py).

Nothing here knows about GRPO: `train_grpo.py` passes the loss function in. `PolicyWorker` is one rank; `Policy` is all
ranks, as the driver sees them.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoTokenizer

from config import Config, PolicyCfg
from launch import Actors
from model import MicroBatch, Sequences, add_partial_gradients, build_model, pack, tensors_of
from refit import WeightSender, full, store_at

WARM_UP_TOKENS = 2048  # like a real batch: torch.compile tunes sums over tokens for the first number of tokens it sees
SCALE_STEPS = 2000  # float16: the loss scale doubles after so many steps without an overflow, as in torch's GradScaler
# How metrics are combined, of two micro-batches and over ranks: by the end of their names, or else as sums.
EXTREMA = {"_min": (torch.minimum, dist.ReduceOp.MIN), "_max": (torch.maximum, dist.ReduceOp.MAX)}
SUM = (torch.add, dist.ReduceOp.SUM)
STEP_FACTS = ("loss", "grad_norm", "lr", "micro_batches", "loss_scale")  # metrics that are no means over tokens

# ---------------------------------------------------------------- one rank


def gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    """torch's collectives on the CPU, run by one thread, one after the other.

    torch's own choice is two threads. In 2.13 both write down what they finished last without a lock: where gathers
    follow each other closely they free the same memory, and the process dies (`ProcessGroupGloo::runLoop`).
    """
    group, interfaces = dist.ProcessGroupGloo, os.environ.get("GLOO_SOCKET_IFNAME", "")
    options, asked = group._Options(), [group.create_device(interface=i) for i in interfaces.split(",") if i]
    options._devices = asked or [group.create_default_device()]
    options._threads, options._timeout = 1, timeout
    return group(store, rank, size, options)


dist.Backend.register_backend("gloo_of_one_thread", gloo, devices=["cpu"])


def join_ranks(device: str, address: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make torch's default process group, of all ranks: NCCL on GPUs (`device` "cuda"), gloo on the CPU."""
    backend, store = "nccl" if device == "cuda" else "gloo_of_one_thread", store_at(address, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


class PolicyWorker(WeightSender):
    """One rank of the policy; a Ray actor in training, usable directly in tests."""

    def __init__(
        self, cfg: PolicyCfg, rank: int, world_size: int, device: str, timeout_s: float, keep_reference: bool = False
    ):
        """`keep_reference`: hold a copy of the starting weights in host memory for `logprobs(reference=True)`."""
        self.cfg, self.rank, self.world_size, self.timeout_s = cfg, rank, world_size, timeout_s
        self.keep_reference = keep_reference
        self.device, self.dtype = torch.device(device), getattr(torch, cfg.precision)
        self.stores: list[dist.TCPStore] = []  # at the addresses that were given out
        self.steps_done = 0
        self.kernels = self.device.type == "cuda" and cfg.precision != "float32"
        if self.device.type == "cpu":
            # The first tokens of a group share a hidden state, whose gradients threads would add up in any order.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        # float16 loses gradients below 6e-8, so the loss is scaled up, by as much as does not overflow
        self.loss_scale, self.steps_at_scale = (2.0**16 if cfg.precision == "float16" else 1.0), 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    def gpu(self) -> tuple[str, int]:
        """Name and bytes of this rank's GPU; ("cpu", 0) without one."""
        if self.device.type == "cpu":
            return "cpu", 0
        properties = torch.cuda.get_device_properties(self.device)
        return properties.name, properties.total_memory

    def address(self) -> str:
        """host:port of a new store for a process group; asked of rank 0 only.

        It is served from here on, so that no other process can be given this port before the group is made.
        """
        host, timeout = ray.util.get_node_ip_address(), timedelta(seconds=self.timeout_s)
        self.stores.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout))
        return f"{host}:{self.stores[-1].port}"

    def setup(self, address: str) -> None:
        """Join the process group and load the model."""
        tp, timeout = self.cfg.dtensor_cfg.tensor_parallel_size, timedelta(seconds=self.timeout_s)
        join_ranks(self.device.type, address, self.rank, self.world_size, timeout)
        self.writers = dist.new_group(backend="gloo", timeout=timeout)  # of the threads that write checkpoints
        torch.manual_seed(self.rank)
        self.mesh = init_device_mesh(self.device.type, (self.world_size // tp, tp), mesh_dim_names=("dp", "tp"))
        self.dp_rank, self.dp_size = self.mesh["dp"].get_local_rank(), self.mesh["dp"].size()
        self.model = build_model(self.cfg, self.mesh, self.device)
        self.weights = list(self.model.parameters())  # float32, sharded; a list, since walking through modules is slow
        o = self.cfg.optimizer
        # AdamW works on the local shards, which share memory with the weights: on 300 DTensors a step would take tens
        # of milliseconds of Python, a tenth of a small model's whole step.
        self.shards = [nn.Parameter(w) for w in self.local_weights()]
        self.optimizer = torch.optim.AdamW(
            self.shards, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        for shard in self.shards:  # so that a checkpoint before the first step has moments, too
            moments = {key: torch.zeros_like(shard.detach()) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[shard] = {"step": torch.zeros((), device=shard.device), **moments}
        self.offer_weights(tensors_of(self.model.lm))  # with buffers, in which an engine has random numbers
        self.reference = [w.cpu().clone() for w in self.local_weights()] if self.keep_reference else []

    def warm_up(self, tokens: int) -> None:
        """Run all of an update but its optimizer step on made-up sequences, and a pass without gradient.

        torch.compile and NCCL then do their first-time work while the engines are still loading, not in the first step.
        """
        # All lengths differ, since torch.compile would take two equal sizes for the same size.
        ids = np.zeros(tokens // 6, dtype=np.int64)
        batch = Sequences([ids, ids, ids, ids[1:]], [ids[2:], ids[3:], ids[4:], ids[5:]], {}, {})

        def loss_fn(logprobs_T: torch.Tensor, sequence_T: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return logprobs_T.mean(), {"loss": logprobs_T.mean()}

        totals = self._gradients([batch], loss_fn, {})
        clip_gradients(self.weights, self.cfg.max_grad_norm, self.loss_scale)
        reduce_metrics(totals, self.mesh["dp"].get_group())
        self._drop_gradients()
        self.logprobs(batch)

    # ---- update

    def local_weights(self) -> list[torch.Tensor]:
        """This rank's shards of the float32 master weights."""
        return [w.detach().to_local() for w in self.weights]

    def _micro_batches(self, batch: Sequences) -> list[list[int]]:
        """This rank's share of `batch`, as indices of sequences."""
        packing = self.cfg.sequence_packing
        budget = packing.train_mb_tokens if packing.enabled else 1  # 1: every sequence is alone
        parts, lengths = batch.by_prompt(budget // 3)  # parts small enough to fill micro-batches evenly
        mine = pack(lengths, budget, self.dp_size)[self.dp_rank]
        return [[i for part in micro_batch for i in parts[part]] for micro_batch in mine]

    def update(
        self,
        batch: Sequences,
        loss_fn: Callable,
        loss_kwargs: dict[str, Any],
        trace: str | None = None,
        with_entropy: bool = False,
    ) -> dict[str, float]:
        """One optimizer step on `batch`, the global one, of which each rank takes its share.

        `loss_fn(logprobs_T, sequence_T=, **per-token and per-sequence arrays, **loss_kwargs)` returns a loss that is
        already divided by global counts, and a dict of sums (extrema, if their names end in _min or _max). With
        `with_entropy` it also gets `entropy_T`, with gradient. This method returns the metrics of the whole batch, and
        STEP_FACTS. If the gradient is not finite, `grad_norm` says so and the weights stay as they were. Rank 0 writes
        a profile of the step to `trace`.
        """

        def export(profile: torch.profiler.profile) -> None:
            profile.export_chrome_trace(trace)

        with torch.profiler.profile(on_trace_ready=export) if trace and self.rank == 0 else nullcontext():
            micro_batches = [batch.take(indices) for indices in self._micro_batches(batch)]
            while True:
                totals = self._gradients(micro_batches, loss_fn, loss_kwargs, with_entropy)
                grad_norm = clip_gradients(self.weights, self.cfg.max_grad_norm, self.loss_scale)
                metrics = reduce_metrics(totals, self.mesh["dp"].get_group())
                finite = torch.isfinite(grad_norm).item()  # the same on every rank
                if finite or self.loss_scale == 1 or not math.isfinite(metrics["loss"]):
                    break
                self.loss_scale, self.steps_at_scale = self.loss_scale / 2, 0  # float16 overflowed: repeat with half
                self._drop_gradients()
            lr = self._schedule()
            facts = {"grad_norm": grad_norm.item(), "lr": lr, "micro_batches": len(micro_batches)}
            if self.cfg.precision == "float16":
                facts["loss_scale"] = self.loss_scale
            if finite:
                self._step()
            self._drop_gradients()
        return metrics | facts

    def _drop_gradients(self) -> None:
        for w in self.weights + self.shards:
            w.grad = None

    def _step(self) -> None:
        """Let AdamW change the weights, and count the step."""
        for shard, w in zip(self.shards, self.weights, strict=True):
            shard.grad = None if w.grad is None else w.grad.to_local()
        self.optimizer.step()
        self.steps_done += 1
        self.steps_at_scale += 1
        if self.cfg.precision == "float16" and self.steps_at_scale == SCALE_STEPS:
            self.loss_scale, self.steps_at_scale = self.loss_scale * 2, 0

    def _gradients(
        self, micro_batches: list[Sequences], loss_fn: Callable, loss_kwargs: dict[str, Any], with_entropy: bool = False
    ) -> dict[str, torch.Tensor]:
        """Leave the batch's gradients, times `loss_scale`, in the parameters; return this rank's metrics."""
        totals: dict[str, torch.Tensor] = {}
        scale = self.dp_size * self.loss_scale  # FSDP averages over ranks, but the loss has global denominators already
        every = self.cfg.dtensor_cfg.clear_cache_every_n_steps
        for i, sequences in enumerate(micro_batches):
            mb = MicroBatch.build(sequences, self.device, self.kernels)  # while the GPU works on the one before
            if len(micro_batches) > 1:
                last = i == len(micro_batches) - 1
                self.model.set_requires_gradient_sync(last)  # reduce gradients once per optimizer step
                self.model.set_reshard_after_backward(last or self.cfg.dtensor_cfg.reshard_after_forward)
            logprobs_T, entropy_T = self.model(mb, self.cfg.generation.temperature, with_entropy)
            if with_entropy:
                mb.extras_T["entropy_T"] = entropy_T
            loss, metrics = loss_fn(logprobs_T, sequence_T=mb.sequence_T, **mb.extras_T, **loss_kwargs)
            (loss * scale).backward()
            merge_metrics(totals, metrics)
            if every and (i + 1) % every == 0:
                self.empty_cache()
        add_partial_gradients(self.model.lm, self.mesh["tp"])
        return totals

    @torch.no_grad()
    def logprobs(self, batch: Sequences, reference: bool = False) -> dict[int, np.ndarray]:
        """Log-probabilities of this rank's share of the response tokens, by index in `batch`.

        They are those of the present weights, or with `reference` of the weights that the run started from.
        """
        found = {}
        with self._starting_weights() if reference else nullcontext():
            for indices in self._micro_batches(batch):
                mb = MicroBatch.build(batch.take(indices), self.device, self.kernels)
                logprobs_T = self.model(mb, self.cfg.generation.temperature)[0].cpu().numpy()
                ends = np.cumsum([len(batch.response_ids[i]) for i in indices])
                found |= dict(zip(indices, np.split(logprobs_T, ends)[:-1], strict=True)) if indices else {}
            # No backward pass frees gathered weights here, and after the next update they would be out of date.
            for module in (m for m in self.model.modules() if isinstance(m, FSDPModule)):
                module.reshard()
        return found

    @contextmanager
    def _starting_weights(self) -> Iterator[None]:
        """Within this the model has the weights that the run started from."""
        local = self.local_weights()
        present = [w.clone() for w in local]
        torch._foreach_copy_(local, self.reference)
        yield
        torch._foreach_copy_(local, present)

    def _schedule(self) -> float:
        """Set and return the learning rate of this step: linear warm-up, then constant."""
        o, warmup = self.cfg.optimizer, self.cfg.scheduler.warmup_steps
        lr = o.lr * min(1.0, (self.steps_done + 1) / warmup) if warmup else o.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def empty_cache(self) -> None:
        """Give unused memory back to the GPU, so that an engine can wake there."""
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, float]:
        """Peak GPU memory since the last call, in GiB (empty on the CPU)."""
        if self.device.type == "cpu":
            return {}
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return {"policy_peak_gib": peak}

    # ---- checkpoints

    def _training_state(self) -> dict[str, torch.Tensor]:
        """float32 master weights, optimizer state, schedule and random state as one flat dict of (sharded) tensors."""
        state = {"steps_done": torch.tensor(self.steps_done), f"random.{self.rank}": torch.get_rng_state()}
        if self.cfg.precision == "float16":
            state["loss_scale"] = torch.tensor([self.loss_scale, self.steps_at_scale], dtype=torch.float64)
        if self.device.type == "cuda":
            state[f"random.cuda.{self.rank}"] = torch.cuda.get_rng_state()
        for shard, (name, w) in zip(self.shards, self.model.named_parameters(), strict=True):
            state[f"weight.{name}"] = w.detach()
            for key, value in self.optimizer.state[shard].items():
                if key != "step":  # sharded like its weight
                    like = {"shape": w.shape, "stride": w.stride()}
                    value = DTensor.from_local(value, w.device_mesh, w.placements, run_check=False, **like)
                state[f"{key}.{name}"] = value
        return state

    def save(self, folder: str, publish: Callable[[], None]) -> None:
        """Copy weights and training state to host memory, and start a thread that writes them.

        Rank 0 writes the Hugging Face folder too, and calls `publish` when every rank has written its part.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"rank {self.rank} does not see {folder}: all nodes must share that folder")
        state = BlockingAsyncStager().stage(self._training_state())
        weights = {}
        for name, w in self.offered.items():
            whole = full(w, self.device, self.dtype)
            if self.rank == 0:
                weights[name] = whole.to("cpu", self.dtype, copy=True)
        self._writing = self._writer.submit(self._write, folder, state, weights, publish)

    def _write(self, folder: str, state: dict, weights: dict, publish: Callable[[], None]) -> tuple[str | None, float]:
        """Write a checkpoint, in the thread. Returns the error in one line (None: none) and the seconds it took."""
        began, error = time.monotonic(), None
        try:
            dcp.save(  # ends on rank 0 only after all ranks have written, and fails on all if one fails
                state, storage_writer=dcp.FileSystemWriter(f"{folder}/training_state"), process_group=self.writers
            )
            if self.rank == 0:
                lm = self.model.lm
                lm.config.dtype = self.dtype
                lm.generation_config.do_sample = True  # transformers refuses to save a temperature without it
                lm.save_pretrained(folder, state_dict=weights)
                AutoTokenizer.from_pretrained(self.cfg.model_name).save_pretrained(folder)
                publish()
        except BaseException as e:  # torch.distributed.checkpoint raises one that is no Exception
            reason = next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e
            error = f"{type(reason).__name__}: {' '.join(str(reason).split())[-300:]}"
        return error, time.monotonic() - began

    def wait_saved(self) -> tuple[str | None, float]:
        """Wait for the write in progress, if any; returns what `_write` does."""
        writing, self._writing = self._writing, None
        return writing.result(timeout=self.timeout_s) if writing else (None, 0.0)

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote on any number of ranks.

        A checkpoint from fewer ranks lacks this rank's random state, and one of another precision lacks the loss scale:
        then those stay as they are.
        """
        reader, state = dcp.FileSystemReader(folder), self._training_state()
        saved = reader.read_metadata().state_dict_metadata
        state = {k: v for k, v in state.items() if k in saved or not k.startswith(("random.", "loss_scale"))}
        dcp.load(state, storage_reader=reader, process_group=self.writers)
        self.steps_done = int(state["steps_done"])
        if "loss_scale" in state:
            self.loss_scale, self.steps_at_scale = float(state["loss_scale"][0]), int(state["loss_scale"][1])
        setters = {f"random.{self.rank}": torch.set_rng_state, f"random.cuda.{self.rank}": torch.cuda.set_rng_state}
        for name in state.keys() & setters.keys():
            setters[name](state[name])
        for shard, (name, _) in zip(self.shards, self.model.named_parameters(), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):  # copied, since with cpu_offload the loaded tensor is on the GPU
                self.optimizer.state[shard][key].copy_(state[f"{key}.{name}"].to_local())


def merge_metrics(totals: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> None:
    """Add `new` into `totals`: extrema for names ending in _min or _max, sums for all others. No host sync."""
    for name, value in new.items():
        combine, _ = EXTREMA.get(name[-4:], SUM)
        totals[name] = combine(totals[name], value.detach()) if name in totals else value.detach()


def reduce_metrics(totals: dict[str, torch.Tensor], group: Any) -> dict[str, float]:
    """Combine metrics over ranks: extrema and sums, with one collective and one host sync for each of the three."""
    result = {}
    for name, value in totals.items():
        assert value.ndim == 0, f"metric {name} is not a scalar"
    for kind in (*EXTREMA.values(), SUM):
        names = [name for name in totals if EXTREMA.get(name[-4:], SUM) is kind]
        if names:
            stacked = torch.stack([totals[name].double() for name in names])
            dist.all_reduce(stacked, op=kind[1], group=group)
            result |= dict(zip(names, stacked.tolist(), strict=True))
    return result


def clip_gradients(weights: list[nn.Parameter], max_norm: float | None, loss_scale: float = 1.0) -> torch.Tensor:
    """Divide the gradients by `loss_scale`, then shrink them to a global norm of at most `max_norm` (None: any norm).

    Returns the norm before clipping. torch's own function fails if some weights are tensor parallel and others are not.
    Weights that are split in the same way share one collective; asking each DTensor for its norm would take one each.
    """
    grads = [w.grad for w in weights if w.grad is not None]
    local = [grad.to_local() for grad in grads]
    alike: dict[Any, list[torch.Tensor]] = {}
    for grad, norm in zip(grads, torch._foreach_norm(local), strict=True):
        alike.setdefault((grad.device_mesh, grad.placements), []).append(norm)
    squares = []
    for (mesh, placements), norms in alike.items():
        partial = [p if p.is_replicate() else Partial() for p in placements]
        squares.append(DTensor.from_local(torch.stack(norms).square().sum(), mesh, partial).full_tensor())
    total = torch.stack(squares).sum().sqrt() / loss_scale
    factor = torch.ones_like(total) if max_norm is None else (max_norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local, (factor / loss_scale).to(local[0].device))  # in host memory with cpu_offload
    return total


# ---------------------------------------------------------------- all ranks, seen from the driver


class Policy(Actors):
    """The ranks as one object for the training loop."""

    def __init__(self, cfg: Config, placement: Any):
        keep_reference = cfg.loss_fn.reference_policy_kl_penalty > 0
        common = (cfg.world_size, cfg.device, cfg.cluster.timeout_s, keep_reference)
        arguments = [(cfg.policy, rank, *common) for rank in range(cfg.world_size)]
        share = 0.5 if cfg.policy.generation.colocated.enabled else 1.0
        # This fusion in torch.compile guards on the number of tokens: some micro-batches would compile layers again.
        env = {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"}
        super().__init__(PolicyWorker, arguments, cfg, placement, cfg.policy_bundles, share, env)
        self._loss_fn: Callable | None = None
        self._loss_ref: ray.ObjectRef | None = None

    def start(self) -> list[Any]:
        """Begin loading on all ranks; returns references to wait for (engines load at the same time)."""
        address = ray.get(self.workers[0].address.remote(), timeout=self.timeout_s)
        loaded = [w.setup.remote(address) for w in self.workers]
        if not self.on_gpu:
            return loaded
        return loaded + [w.warm_up.remote(WARM_UP_TOKENS) for w in self.workers]

    def gpu(self) -> tuple[str, int]:
        """Name and bytes of the GPU of rank 0; can be asked before `start`."""
        return ray.get(self.workers[0].gpu.remote(), timeout=self.timeout_s)

    def update(self, batch: Sequences, loss_fn: Callable, loss_kwargs: dict[str, Any], *more: Any) -> dict[str, float]:
        """One optimizer step; `more` and metrics as for `PolicyWorker.update`, the metrics the same on every rank."""
        if loss_fn is not self._loss_fn:  # pickling a function of the main script takes milliseconds: once is enough
            self._loss_fn, self._loss_ref = loss_fn, ray.put(loss_fn)
        return self.all("update", ray.put(batch), self._loss_ref, loss_kwargs, *more)[0]

    def logprobs(self, batch: Sequences, reference: bool = False) -> list[np.ndarray]:
        """Log-probabilities of every response token, in the order of `batch`, under the present or starting weights."""
        merged: dict[int, np.ndarray] = {}
        for part in self.all("logprobs", ray.put(batch), reference):
            merged |= part
        return [merged[i] for i in range(len(batch))]

    def memory(self) -> dict[str, float]:
        found = self.all("memory")
        return {k: max(f[k] for f in found) for k in found[0]}
