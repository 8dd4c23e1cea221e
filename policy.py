"""The policy: one Ray actor per rank with its part of the model (model.py), update, optimizer, weights out, state.

It knows nothing about GRPO: `train_grpo.py` passes the loss function in.
"""

import atexit
import gc
import itertools
import math
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoTokenizer

from config import Config, PolicyCfg
from cuda_graph import GraphedModel
from model import MicroBatch, Sequences, add_partial_gradients, build_model, pack
from refit import Layout, Route, WeightSender, broadcast_group, full

COMPILE_TOKENS = 2048  # near those of real micro-batches, and small beside an engine that is still loading

# ---------------------------------------------------------------- one rank


class PolicyWorker:
    """One rank of the policy; a Ray actor in training, usable directly in tests."""

    def __init__(
        self, cfg: PolicyCfg, rank: int, world_size: int, device: str, timeout_s: float, keep_reference: bool = False
    ):
        """`keep_reference`: hold a copy of the starting weights in host memory for `logprobs(reference=True)`."""
        self.cfg, self.rank, self.world_size, self.timeout_s = cfg, rank, world_size, timeout_s
        self.keep_reference = keep_reference
        self.device = torch.device(device)
        self.steps_done = 0
        self.kernels = self.device.type == "cuda" and cfg.precision != "float32"
        self.graphed: GraphedModel | None = None
        # float16 gradients below 6e-8 are lost: the loss is scaled up by what does not overflow (it only ever falls).
        self.loss_scale = 2.0**16 if cfg.precision == "float16" else 1.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    def gpu(self) -> tuple[str, int]:
        """Name and bytes of this rank's GPU; ("cpu", 0) without one."""
        if self.device.type == "cpu":
            return "cpu", 0
        properties = torch.cuda.get_device_properties(self.device)
        return properties.name, properties.total_memory

    def address(self) -> str:
        """host:port for the process group; asked of rank 0 only."""
        with socket.socket() as s:
            s.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def setup(self, address: str) -> int:
        """Join the process group and load the model. Returns the number of parameters."""
        tp, timeout = self.cfg.dtensor_cfg.tensor_parallel_size, timedelta(seconds=self.timeout_s)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"tcp://{address}", rank=self.rank, world_size=self.world_size,
            timeout=timeout,
        )  # fmt: skip
        self.writers = dist.new_group(backend="gloo", timeout=timeout)  # of the threads that write checkpoints
        torch.manual_seed(self.rank)  # for models with dropout; nothing else here draws
        self.mesh = init_device_mesh(self.device.type, (self.world_size // tp, tp), mesh_dim_names=("dp", "tp"))
        self.dp_rank, self.dp_size = self.mesh["dp"].get_local_rank(), self.mesh["dp"].size()
        self.model = build_model(self.cfg, self.mesh, self.device)
        self.weights = list(self.model.parameters())  # as sharded; to walk through all modules takes a millisecond
        o = self.cfg.optimizer
        self.shards = [nn.Parameter(w) for w in self._local_weights()]  # DTensor would cost more time than the kernel
        self.optimizer = torch.optim.AdamW(
            self.shards,
            lr=o.lr,
            betas=tuple(o.betas),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=True,
        )
        weights = dict(self.model.lm.named_parameters())  # a tied head appears once, under the embedding's name
        self.sender = WeightSender(weights, getattr(torch, self.cfg.precision), self.device, self.rank)
        self.reference = [w.cpu().clone() for w in self._local_weights()] if self.keep_reference else None
        return sum(p.numel() for p in self.model.parameters())

    def compile(self, tokens: int, logprobs: bool) -> None:
        """All of an update but its optimizer step, for torch.compile and NCCL to do their work while the engines are
        still loading, instead of in the first step.

        torch.compile splits sums over tokens (the gradients of the norms) into as many parts as suit the number it
        sees first, so that is `tokens`. `logprobs`: also for the pass without gradient. From then on updates are CUDA
        graphs, where the configuration says so and this is the only rank.
        """
        ids = np.zeros(tokens // 6, dtype=np.int64)
        # No two sizes of this are the same or one, so that none is taken for another or for a constant.
        batch = Sequences([ids, ids, ids, ids[1:]], [ids[2:], ids[3:], ids[4:], ids[5:]], {}, {})

        def loss_fn(logprobs_T: torch.Tensor, sequence_T: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return logprobs_T.mean(), {"loss": logprobs_T.mean()}

        totals = self._gradients([batch], loss_fn, {})
        clip_gradients(self.weights, self._local_gradients(), self.cfg.max_grad_norm, self.loss_scale)
        reduce_metrics(totals, self.mesh["dp"].get_group())
        self._drop_gradients()
        if logprobs:
            self.logprobs(batch)
        if self.cfg.dtensor_cfg.cuda_graphs and self.world_size == 1:
            self.graphed = GraphedModel(self.model, self.weights)
        gc.collect()
        gc.freeze()  # going through all that torch.compile made took half a second every 70 to 170 updates
        atexit.register(gc.unfreeze)  # for an orderly end

    def _local_weights(self) -> list[torch.Tensor]:
        """This rank's shards of the float32 master weights."""
        return [p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in self.weights]

    def _drop_gradients(self) -> None:
        for p in itertools.chain(self.weights, self.shards):
            p.grad = None

    def _local_gradients(self) -> list[torch.Tensor]:
        """This rank's shards of the gradients, also where the optimizer looks for them."""
        for shard, p in zip(self.shards, self.weights, strict=True):
            shard.grad = None if p.grad is None else p.grad.to_local()
        return [shard.grad for shard in self.shards if shard.grad is not None]

    def _micro_batches(self, batch: Sequences) -> list[list[int]]:
        """This rank's share of `batch`, as indices of sequences."""
        packing = self.cfg.sequence_packing
        budget = packing.train_mb_tokens if packing.enabled else 1  # 1: every sequence is alone
        parts, lengths = batch.by_prompt(budget // 3)  # small enough to fill micro-batches evenly
        return [[i for part in mb for i in parts[part]] for mb in pack(lengths, budget, self.dp_size)[self.dp_rank]]

    def update(
        self, batch: Sequences, loss_fn: Callable, loss_kwargs: dict[str, Any], trace: str | None = None
    ) -> dict[str, float]:
        """One optimizer step on `batch` (the global one; each rank takes its share).

        `loss_fn(logprobs_T, sequence_T=, **per-token and per-sequence arrays, **loss_kwargs)` returns a loss that is
        already divided by global counts, and a dict of sums (names ending in _min or _max: extrema). With `trace`
        rank 0 writes a profile of the step there.
        """
        if trace and self.rank == 0:
            with torch.profiler.profile() as profile:
                result = self._update(batch, loss_fn, loss_kwargs)
            profile.export_chrome_trace(trace)
            return result
        return self._update(batch, loss_fn, loss_kwargs)

    def _update(self, batch: Sequences, loss_fn: Callable, loss_kwargs: dict[str, Any]) -> dict[str, float]:
        micro_batches = [batch.take(indices) for indices in self._micro_batches(batch)]
        while True:
            totals = self._gradients(micro_batches, loss_fn, loss_kwargs)
            local = self._local_gradients()
            grad_norm = clip_gradients(self.weights, local, self.cfg.max_grad_norm, self.loss_scale)
            metrics = reduce_metrics(totals, self.mesh["dp"].get_group())
            finite = torch.isfinite(grad_norm).item()  # the same on every rank
            if finite or self.loss_scale == 1 or not math.isfinite(metrics["loss"]):
                break
            self.loss_scale /= 2
            self._drop_gradients()
        lr = self._schedule()
        if finite:  # otherwise the weights stay as they were
            self.optimizer.step()
            self.steps_done += 1
        self._drop_gradients()
        return metrics | {"grad_norm": grad_norm.item(), "lr": lr, "micro_batches": len(micro_batches)}

    def _gradients(
        self, micro_batches: list[Sequences], loss_fn: Callable, loss_kwargs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Leave the batch's gradients, times `loss_scale`, in the parameters; returns this rank's metrics."""
        totals: dict[str, torch.Tensor] = {}
        scale = self.dp_size * self.loss_scale  # FSDP averages over ranks; the loss is divided by global counts already
        if self.graphed:
            self.graphed.start()
        for i, sequences in enumerate(micro_batches):  # packed one by one: the GPU is busy with those before
            mb = MicroBatch.build(sequences, self.device, self.kernels, round_up=self.graphed is not None)
            if len(micro_batches) > 1 and not self.graphed:  # (each of these walks through all modules)
                last = i == len(micro_batches) - 1
                self.model.set_requires_gradient_sync(last)  # reduce gradients once per optimizer step
                self.model.set_reshard_after_backward(last or self.cfg.dtensor_cfg.reshard_after_forward)
            logprobs_T = (self.graphed or self.model)(mb, self.cfg.generation.temperature)[: len(mb.sequence_T)]
            loss, metrics = loss_fn(logprobs_T, sequence_T=mb.sequence_T, **mb.extras_T, **loss_kwargs)
            (loss * scale).backward()
            merge_metrics(totals, metrics)
            self._clear_cache(i)
        if self.graphed:
            self.graphed.finish()
        add_partial_gradients(self.model.lm, self.mesh["tp"])
        return totals

    @torch.no_grad()
    def logprobs(self, batch: Sequences, reference: bool = False) -> dict[int, np.ndarray]:
        """Log-probabilities of this rank's share of the response tokens, by index in `batch`.

        Under the present weights, or with `reference` under the starting ones, which visit the device for the while.
        """
        present = [w.clone() for w in self._local_weights()] if reference else []
        for weight, start in zip(self._local_weights(), self.reference if reference else [], strict=reference):
            weight.copy_(start)
        found = {}
        for indices in self._micro_batches(batch):
            mb = MicroBatch.build(batch.take(indices), self.device, self.kernels)
            values = self.model(mb, self.cfg.generation.temperature).cpu().numpy()
            lengths = [len(batch.response_ids[i]) for i in indices]
            found |= dict(zip(indices, np.split(values, np.cumsum(lengths)[:-1]), strict=True)) if indices else {}
        self._reshard()
        for weight, now in zip(self._local_weights(), present, strict=reference):
            weight.copy_(now)
        return found

    def _reshard(self) -> None:
        """Drop gathered copies of the weights: after a pass without backward they would outlive the next update."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _schedule(self) -> float:
        o, warmup = self.cfg.optimizer, self.cfg.scheduler.warmup_steps
        lr = o.lr * min(1.0, (self.steps_done + 1) / warmup) if warmup else o.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _clear_cache(self, i: int) -> None:
        every = self.cfg.dtensor_cfg.clear_cache_every_n_steps
        if every and self.device.type == "cuda" and (i + 1) % every == 0:
            torch.cuda.empty_cache()

    # ---- weights out

    def weight_layout(self) -> Layout:
        return self.sender.layout

    def join_broadcast(self, address: str, rank: int, size: int) -> None:
        """Meet the engines that have GPUs of their own; called on rank 0 only."""
        self.sender.group = broadcast_group(address, rank, size, self.device, self.timeout_s)

    def weight_bucket(self, index: int, by: Route, readers: int) -> Any:
        """Bucket `index` of the weights on its way to the engines, see refit.py. All ranks must call it alike."""
        return self.sender.bucket(index, by, readers)

    def release_weight_bucket(self) -> None:
        self.sender.release()

    def empty_cache(self) -> None:
        """Give unused memory back to the GPU, for an engine that wakes there."""
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    # ---- checkpoints

    def _training_state(self) -> dict[str, torch.Tensor]:
        """float32 master weights, optimizer state, schedule and random state as one flat dict of (sharded) tensors."""
        state = {"steps_done": torch.tensor(self.steps_done), f"random.{self.rank}": torch.get_rng_state()}
        if self.cfg.precision == "float16":
            state["loss_scale"] = torch.tensor(self.loss_scale)
        if self.device.type == "cuda":
            state[f"random.cuda.{self.rank}"] = torch.cuda.get_rng_state()
        for shard, (name, p) in zip(self.shards, self.model.named_parameters(), strict=True):
            if shard not in self.optimizer.state:  # no step yet: AdamW starts from these zeros
                moments = {key: torch.zeros_like(shard.detach()) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[shard] = {"step": torch.zeros((), device=shard.device), **moments}
            state[f"weight.{name}"] = p.detach()
            for key, value in self.optimizer.state[shard].items():
                state[f"{key}.{name}"] = value if key == "step" else sharded_like(p, value)
        return state

    def save(self, folder: str, publish: Callable[[], None]) -> None:
        """Copy weights and training state to host memory, and start a thread that writes them.

        Rank 0 writes the Hugging Face folder too, and calls `publish` when every rank has written its part.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"rank {self.rank} does not see {folder}: all nodes must share that folder")
        state = BlockingAsyncStager().stage(self._training_state())
        weights = {}
        for name, p in self.sender.weights.items():
            tensor = full(p)
            if self.rank == 0:
                weights[name] = tensor.to("cpu", self.sender.dtype, copy=True)
        self._writing = self._writer.submit(self._write, folder, state, weights, publish)

    def _write(self, folder: str, state: dict, weights: dict, publish: Callable[[], None]) -> tuple[str | None, float]:
        """Runs in the thread. Returns what went wrong in one line (None: nothing) and the seconds it took."""
        began, error = time.monotonic(), None
        try:
            dcp.save(  # ends on rank 0 only after all ranks have written, and fails on all if one fails
                state, storage_writer=dcp.FileSystemWriter(f"{folder}/training_state"), process_group=self.writers
            )
            if self.rank == 0:
                lm = self.model.lm
                lm.config.dtype = getattr(torch, self.cfg.precision)
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
        """Continue from what `save` wrote, by whatever number of ranks."""
        reader = dcp.FileSystemReader(folder)
        saved, state = reader.read_metadata().state_dict_metadata, self._training_state()
        # A new rank has no random state there, and what was trained in another precision no scale.
        own = {name for name in state if not name.startswith(("random.", "loss_scale")) or name in saved}
        state = {name: state[name] for name in own}
        dcp.load(state, storage_reader=reader, process_group=self.writers)
        self.steps_done = int(state["steps_done"])
        self.loss_scale = float(state.get("loss_scale", self.loss_scale))
        setters = {f"random.{self.rank}": torch.set_rng_state, f"random.cuda.{self.rank}": torch.cuda.set_rng_state}
        for name in own & setters.keys():
            setters[name](state[name])
        for shard, (name, _) in zip(self.shards, self.model.named_parameters(), strict=True):
            for key, moment in self.optimizer.state[shard].items():
                if key != "step":  # with cpu_offload what was loaded is a copy on the GPU
                    moment.copy_(state[f"{key}.{name}"].to_local())

    def memory(self) -> dict[str, float]:
        """Peak GPU memory since the last call, in GiB (empty on the CPU)."""
        if self.device.type == "cpu":
            return {}
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return {"policy_peak_gib": peak}


def merge_metrics(totals: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> None:
    """Add `new` into `totals`: extrema for names ending in _min or _max, sums for all others. No host sync."""
    for name, value in new.items():
        if name not in totals:
            totals[name] = value.detach()
        elif name.endswith("_min"):
            totals[name] = torch.minimum(totals[name], value.detach())
        elif name.endswith("_max"):
            totals[name] = torch.maximum(totals[name], value.detach())
        else:
            totals[name] = totals[name] + value.detach()


def reduce_metrics(totals: dict[str, torch.Tensor], group: Any) -> dict[str, float]:
    """The same over ranks, in three collectives and one transfer to the host."""
    result = {}
    ops = {"_min": dist.ReduceOp.MIN, "_max": dist.ReduceOp.MAX, "": dist.ReduceOp.SUM}
    for name, value in totals.items():
        assert value.ndim == 0, f"metric {name} is not a scalar"
    for suffix, op in ops.items():
        names = [n for n in totals if (n[-4:] if n[-4:] in ("_min", "_max") else "") == suffix]
        if names:
            stacked = torch.stack([totals[n].double() for n in names])
            dist.all_reduce(stacked, op=op, group=group)
            result |= dict(zip(names, stacked.tolist(), strict=True))
    return result


def sharded_like(weight: DTensor, shard: torch.Tensor) -> DTensor:
    """`shard` as this rank's part of a tensor that is split over the ranks as `weight` is."""
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def clip_gradients(
    weights: list[nn.Parameter], local: list[torch.Tensor], max_norm: float, loss_scale: float = 1.0
) -> torch.Tensor:
    """Divide the gradients of `weights`, of which `local` are this rank's shards, by `loss_scale`, and by what brings
    their global norm below `max_norm`; returns the norm before the latter.

    Local norms are put together once for all weights that are split alike: on DTensors each would be a dispatch.
    """
    grads = [w.grad for w in weights if w.grad is not None]
    alike: dict[Any, list[torch.Tensor]] = {}
    for grad, norm in zip(grads, torch._foreach_norm(local), strict=True):
        alike.setdefault((grad.device_mesh, grad.placements), []).append(norm)
    squares = [
        DTensor.from_local(
            torch.stack(norms).square().sum(), mesh, [p if p.is_replicate() else Partial() for p in placements]
        ).full_tensor()
        for (mesh, placements), norms in alike.items()
    ]
    total = torch.stack(squares).sum().sqrt() / loss_scale
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0) / loss_scale
    torch._foreach_mul_(local, factor.to(local[0].device))  # gradients are in host memory with cpu_offload
    return total


# ---------------------------------------------------------------- all ranks, seen from the driver


class Policy:
    """The ranks as one object for the training loop. Every call has a deadline and names what did not answer."""

    def __init__(self, cfg: Config, placement: Any):
        self.cfg, self.timeout_s = cfg.policy, cfg.cluster.timeout_s
        self.on_gpu = gpu = cfg.device == "cuda"
        keep_reference = cfg.loss_fn.reference_policy_kl_penalty > 0
        self.logprobs_too = keep_reference or cfg.policy.train_global_batch_size < cfg.samples_per_step
        self._loss_fn: Callable | None = None
        self._loss_ref: ray.ObjectRef | None = None
        threads = str(max(1, (os.cpu_count() or 1) // cfg.cluster.cpu_ranks_per_node))
        # This fusion in torch.compile guards on the number of tokens: some micro-batches would compile layers again.
        env = {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": "0"} if gpu else {"OMP_NUM_THREADS": threads}
        actor = ray.remote(PolicyWorker)
        self.workers = [
            actor.options(
                num_cpus=0,
                num_gpus=(0.5 if cfg.policy.generation.colocated.enabled else 1.0) if gpu else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle),
                runtime_env={"env_vars": env},
            ).remote(cfg.policy, rank, cfg.world_size, cfg.device, self.timeout_s, keep_reference)
            for rank, bundle in enumerate(cfg.policy_bundles)
        ]

    def start(self) -> list[Any]:
        """Begin loading on all ranks; returns references to wait for (engines load at the same time)."""
        address = ray.get(self.workers[0].address.remote(), timeout=self.timeout_s)
        loaded = [w.setup.remote(address) for w in self.workers]
        if not self.on_gpu:
            return loaded
        return loaded + [w.compile.remote(COMPILE_TOKENS, self.logprobs_too) for w in self.workers]

    def gpu(self) -> tuple[str, int]:
        """Name and bytes of the GPU of rank 0; can be asked before `start`."""
        return ray.get(self.workers[0].gpu.remote(), timeout=self.timeout_s)

    def _all(self, method: str, *args: Any) -> list[Any]:
        return ray.get([getattr(w, method).remote(*args) for w in self.workers], timeout=self.timeout_s)

    def update(
        self, batch: Sequences, loss_fn: Callable, loss_kwargs: dict[str, Any], trace: str | None = None
    ) -> dict[str, float]:
        """One optimizer step; metrics as `PolicyWorker.update` gives them, the same on every rank."""
        if loss_fn is not self._loss_fn:  # pickling a function of the main script takes milliseconds: once is enough
            self._loss_fn, self._loss_ref = loss_fn, ray.put(loss_fn)
        return self._all("update", ray.put(batch), self._loss_ref, loss_kwargs, trace)[0]

    def logprobs(self, batch: Sequences, reference: bool = False) -> list[np.ndarray]:
        """Log-probabilities of every response token, in the order of `batch`, under the present or starting weights."""
        merged: dict[int, np.ndarray] = {}
        for part in self._all("logprobs", ray.put(batch), reference):
            merged |= part
        return [merged[i] for i in range(len(batch))]

    def save(self, folder: str | Path, publish: Callable[[], None]) -> None:
        """Copy the state and start writing it to `folder`; `publish` runs (on rank 0) when all is written."""
        self._all("save", str(folder), publish)

    def wait_saved(self) -> list[tuple[str | None, float]]:
        """Wait for that; each rank's error (None: none) and seconds."""
        return self._all("wait_saved")

    def load(self, folder: str | Path) -> None:
        self._all("load", str(folder))

    def memory(self) -> dict[str, float]:
        found = self._all("memory")
        return {k: max(f[k] for f in found) for k in found[0]}
