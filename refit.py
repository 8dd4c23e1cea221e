"""Refit: the policy's weights into the engines, in a few large buckets, in the precision that both compute in.

Three ways, by where the engines are (`Route`):
- "ipc": engine and policy rank share a GPU; each engine maps its neighbour's bucket through a CUDA IPC handle;
- "object store": on the CPU rank 0's bytes travel through Ray's object store to every engine;
- "broadcast": engines have GPUs of their own; rank 0 broadcasts to all of them over NCCL (gloo on the CPU).
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

BUCKET_BYTES = 2**30
Route = Literal["ipc", "object store", "broadcast"]
Layout = list[list[tuple[str, tuple[int, ...]]]]  # for each bucket the (Hugging Face name, shape) of its weights


def route(device: str, colocated: bool) -> Route:
    """How weights travel."""
    return "broadcast" if not colocated else "ipc" if device == "cuda" else "object store"


def broadcast_group(address: str, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """A process group of the policy's rank 0 (`rank` 0) and all engines, beside the default group that each side has.

    Blocks until all `size` members have come, at most `timeout_s`.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore("refit", dist.TCPStore(host, int(port), size, is_master=rank == 0, timeout=timeout))
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


class WeightSender:
    """The policy's side, one per rank. `bucket` gathers sharded weights: a collective that all ranks call alike."""

    def __init__(self, weights: dict[str, nn.Parameter], dtype: torch.dtype, device: torch.device, rank: int):
        self.weights, self.dtype, self.device, self.rank = weights, dtype, device, rank
        self.layout = layout({name: p.shape for name, p in weights.items()}, BUCKET_BYTES // dtype.itemsize)
        self.group: Any = None
        self._shared: torch.Tensor | None = None

    @torch.no_grad()
    def flat(self, index: int) -> torch.Tensor:
        """Bucket `index` as one flat tensor in the compute precision."""
        parts = [full(self.weights[name]).to(self.device, self.dtype).reshape(-1) for name, _ in self.layout[index]]
        return torch.cat(parts)

    def bucket(self, index: int, by: Route, readers: int) -> Any:
        """Bucket `index` as something that `WeightReceiver.load` on the other side takes (None: not from this rank).

        By "ipc" a list of one handle for each of the `readers`, the engines beside this rank: torch counts the readers
        of a handle down from one, and would keep the memory of one that two have read for ever.
        """
        flat = self.flat(index)
        if by == "object store":
            return flat.view(torch.uint8).numpy() if self.rank == 0 else None
        if by == "ipc":
            self._shared = flat  # stays while the engine reads it: until the next call, or `release`
            torch.cuda.synchronize()
            return [reduce_tensor(flat)[1] for _ in range(readers)]
        if self.rank == 0:
            self.group.broadcast(flat, 0).wait()
        return None

    def release(self) -> None:
        """Give the last bucket's memory back."""
        self._shared = None


class WeightReceiver:
    """The engine's side. `load_weights` takes (name, tensor) pairs, as vLLM's models do."""

    def __init__(
        self, layout: Layout, place: int, dtype: torch.dtype, device: torch.device, load_weights: Callable[[list], Any]
    ):
        """`place`: which of the engines beside the same policy rank this one is."""
        self.layout, self.place, self.dtype, self.device, self.load_weights = layout, place, dtype, device, load_weights
        self.group: Any = None

    def load(self, index: int, message: Any, by: Route) -> None:
        """Copy bucket `index` into the model."""
        sizes = [torch.Size(shape).numel() for _, shape in self.layout[index]]
        if by == "ipc":
            flat = rebuild_cuda_tensor(*message[self.place])
        elif by == "object store":
            flat = torch.from_numpy(message.copy()).view(self.dtype)
        else:
            flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            self.group.broadcast(flat, 0).wait()
        parts = zip(self.layout[index], flat.split(sizes), strict=True)
        self.load_weights([(name, part.view(shape)) for (name, shape), part in parts])
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sender reuses its buffer once we return


def layout(shapes: dict[str, torch.Size], numel: int) -> Layout:
    """Split weights into buckets of about `numel` elements, in their order."""
    found: Layout = [[]]
    size = 0
    for name, shape in shapes.items():
        if size >= numel:
            found.append([])
            size = 0
        found[-1].append((name, tuple(shape)))
        size += shape.numel()
    return found


def full(p: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a weight that may be sharded (then a collective)."""
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


class Link:
    """The driver's side: which policy rank feeds which engine."""

    def __init__(
        self, policy_workers: list[Any], engine_workers: list[Any], beside: list[int], by: Route, timeout_s: float
    ):
        """`beside`: for each engine the policy rank on its GPU (read only by route "ipc")."""
        self.policy, self.engines, self.by, self.timeout_s = policy_workers, engine_workers, by, timeout_s
        self.source = {"ipc": beside, "object store": [0] * len(engine_workers)}.get(by)
        layout = ray.get(policy_workers[0].weight_layout.remote(), timeout=timeout_s)
        self.num_buckets = len(layout)
        self.readers = [beside.count(rank) for rank in range(len(policy_workers))]
        places = [beside[:i].count(rank) for i, rank in enumerate(beside)]
        expecting = [e.expect_weights.remote(layout, p) for e, p in zip(engine_workers, places, strict=True)]
        ray.get(expecting, timeout=timeout_s)
        if by == "broadcast":
            address, members = (
                ray.get(policy_workers[0].address.remote(), timeout=timeout_s),
                [policy_workers[0], *engine_workers],
            )
            joins = [m.join_broadcast.remote(address, i, len(members)) for i, m in enumerate(members)]
            ray.get(joins, timeout=timeout_s)

    def refit(self) -> None:
        """Bring all weights over; returns when every engine has them."""
        for index in range(self.num_buckets):
            buckets = [
                w.weight_bucket.remote(index, self.by, n) for w, n in zip(self.policy, self.readers, strict=True)
            ]
            messages = [buckets[rank] for rank in self.source] if self.source else [None] * len(self.engines)
            loads = [
                e.load_weight_bucket.remote(index, m, self.by) for e, m in zip(self.engines, messages, strict=True)
            ]
            ray.get([*loads, *buckets], timeout=self.timeout_s)
        ray.get([w.release_weight_bucket.remote() for w in self.policy], timeout=self.timeout_s)

    def make_room(self) -> None:
        """Let the policy give memory that it has no use for at the moment back to its GPU, for the engine beside it."""
        ray.get([w.empty_cache.remote() for w in self.policy], timeout=self.timeout_s)
