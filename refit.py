"""Refit: the policy's weights into the engines, in a few large buckets, in the precision that both compute in.

A bucket is one flat tensor of about a gigabyte that holds many weights, one after the other. It travels in one of three
ways (`Route`), by where the engines are:
- "ipc": engine and policy rank share a GPU; each engine maps its rank's bucket through a CUDA IPC handle;
- "object store": on the CPU rank 0's bytes travel through Ray's object store to every engine;
- "broadcast": engines have GPUs of their own; rank 0 broadcasts to the first engine on each GPU over NCCL (gloo on the
  CPU), and this engine hands the bucket to the others on its GPU in one of the first two ways.

    driver (Link)     weight_bucket(0)          load_weight_bucket(0)      weight_bucket(1) ...
                            |                          ^
    policy ranks      gather shards, flatten --bucket--+-->  engines: split into weights, vLLM's load_weights
"""

from datetime import timedelta
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

BUCKET_BYTES = 2**30
Route = Literal["ipc", "object store", "broadcast"]
Buckets = list[list[tuple[str, torch.Size]]]  # for each bucket the (Hugging Face name, shape) of its weights


def store_at(address: str, timeout: timedelta) -> dist.TCPStore:
    """Connect to the store at host:port, which the process that gave this address out already serves."""
    host, _, port = address.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False, timeout=timeout)


def full(weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The whole of a weight. If it is sharded, all ranks must call this, and its shards travel as `dtype`."""
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        return weight
    if weight.device_mesh.size() == 1:
        return weight.to_local()
    return weight.to(device, dtype).full_tensor()


class Refitting:
    """What sender and receiver have: a process group for broadcasts, and the bucket that others may be reading."""

    device: torch.device
    dtype: torch.dtype  # of the weights on their way
    timeout_s: float
    group: Any = None
    shared: torch.Tensor | None = None

    def join_broadcast(self, address: str, rank: int, size: int) -> None:
        """Join the group of the policy's rank 0 (`rank` 0 here) and the first engine of each GPU, `size` members.

        gloo waits here for the others and NCCL in the first broadcast, for at most `timeout_s`.
        """
        timeout = timedelta(seconds=self.timeout_s)
        store = dist.PrefixStore("refit", store_at(address, timeout))
        if self.device.type == "cpu":
            self.group = dist.ProcessGroupGloo(store, rank, size, timeout)
            return
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        self.group = dist.ProcessGroupNCCL(store, rank, size, options)

    def share(self, flat: torch.Tensor, readers: int) -> Any:
        """`flat` as a message to other processes on this machine, for `WeightReceiver.load_weight_bucket`.

        On a GPU the message has one handle for each of the `readers`: torch counts a handle's readers down from one, so
        if two had read the same handle, its memory would never be freed.
        """
        if flat.device.type == "cpu":
            return flat.view(torch.uint8).numpy()
        self.shared = flat  # kept until all have read it: until the next bucket, or `release_weight_bucket`
        torch.cuda.synchronize()
        return [reduce_tensor(flat)[1] for _ in range(readers)]

    def release_weight_bucket(self) -> None:
        """Give the last bucket's memory back."""
        self.shared = None


class WeightSender(Refitting):
    """The policy's half, which `policy.PolicyWorker` inherits."""

    rank: int

    def offer_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the weights that can be sent, by Hugging Face name, sharded or not, in buckets of about BUCKET_BYTES."""
        self.offered, self.buckets, size = weights, [[]], 0
        for name, weight in weights.items():
            if size >= BUCKET_BYTES:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append((name, weight.shape))
            size += weight.numel() * self.dtype.itemsize

    def weight_buckets(self) -> Buckets:
        return self.buckets

    @torch.no_grad()
    def flat_bucket(self, index: int) -> torch.Tensor:
        """Bucket `index` as one flat tensor. All ranks must call this, since it gathers sharded weights."""
        names, shapes = zip(*self.buckets[index], strict=True)
        sizes = [shape.numel() for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        places = [place.view(shape) for place, shape in zip(flat.split(sizes), shapes, strict=True)]
        torch._foreach_copy_(places, [full(self.offered[name], self.device, self.dtype) for name in names])
        return flat

    def weight_bucket(self, index: int, by: Route, readers: int) -> Any:
        """Return bucket `index` as a message to this rank's `readers`, or broadcast it and return None.

        Ranks other than 0 only help to gather the bucket, unless it goes "ipc".
        """
        flat = self.flat_bucket(index)
        if by == "ipc" or (by == "object store" and self.rank == 0):
            return self.share(flat, readers)
        if by == "broadcast" and self.rank == 0:
            self.group.broadcast(flat, 0).wait()
        return None


class WeightReceiver(Refitting):
    """The engine's half; `rollout.RolloutWorker` inherits it and has `load_weights`, as vLLM's models do."""

    def expect_weights(self, buckets: Buckets, place: int) -> None:
        """Called before the first refit. `place`: this engine's number among the readers of a message."""
        self.buckets, self.place = buckets, place

    def load_weight_bucket(self, index: int, sent: Any, readers: int = 0) -> Any:
        """Copy bucket `index` into the model, from the message `sent` or, if that is None, from the broadcast.

        Returns a message for the `readers`, the other engines on this GPU; None if there are none.
        """
        sizes = [shape.numel() for _, shape in self.buckets[index]]
        if sent is None:
            flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            self.group.broadcast(flat, 0).wait()
        elif self.device.type == "cpu":
            flat = torch.from_numpy(sent.copy()).view(self.dtype)
        else:
            flat = rebuild_cuda_tensor(*sent[self.place])
        parts = zip(flat.split(sizes), self.buckets[index], strict=True)
        self.load_weights([(name, part.view(shape)) for part, (name, shape) in parts])
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sender reuses its memory once this returns
        return self.share(flat, readers) if readers else None


class Link:
    """The driver's side: which engine gets its weights from where."""

    def __init__(
        self, policy_workers: list[Any], engine_workers: list[Any], gpus: list[int], by: Route, timeout_s: float
    ):
        """`gpus`: the number of each engine's GPU, which for "ipc" is the number of the policy rank on it."""
        self.policy, self.engines, self.gpus, self.by = policy_workers, engine_workers, gpus, by
        self.timeout_s = timeout_s
        buckets = self._wait([policy_workers[0].weight_buckets.remote()])[0]
        self.num_buckets = len(buckets)
        places = [gpus[:i].count(gpu) for i, gpu in enumerate(gpus)]
        first_of_gpu = [e for e, place in zip(engine_workers, places, strict=True) if place == 0]
        if by == "broadcast":  # the first engine of a GPU reads no message, so the others count from 0
            places = [max(0, place - 1) for place in places]
        self._wait([e.expect_weights.remote(buckets, p) for e, p in zip(engine_workers, places, strict=True)])
        if by == "broadcast":  # NCCL takes no two processes on one GPU: one engine on each joins and feeds the others
            members = [policy_workers[0], *first_of_gpu]
            address = self._wait([policy_workers[0].address.remote()])[0]
            self._wait([m.join_broadcast.remote(address, i, len(members)) for i, m in enumerate(members)])

    def _wait(self, references: list[Any]) -> list[Any]:
        return ray.get(references, timeout=self.timeout_s)

    def refit(self) -> None:
        """Copy all weights to every engine."""
        readers = [self.gpus.count(rank) for rank in range(len(self.policy))]
        for index in range(self.num_buckets):
            sent = [w.weight_bucket.remote(index, self.by, n) for w, n in zip(self.policy, readers, strict=True)]
            self._wait([*self._load(index, sent), *sent])
        for holder in self.policy + self.engines:
            holder.release_weight_bucket.remote()  # nobody waits for this: actors do one thing after the other

    def _load(self, index: int, sent: list[Any]) -> list[Any]:
        """Let every engine load bucket `index`; returns references to wait for."""
        loads: list[Any] = []
        for i, (engine, gpu) in enumerate(zip(self.engines, self.gpus, strict=True)):
            message, readers = sent[gpu if self.by == "ipc" else 0], 0
            if self.by == "broadcast":
                first = self.gpus.index(gpu)
                message = None if first == i else loads[first]
                readers = self.gpus.count(gpu) - 1 if first == i else 0
            loads.append(engine.load_weight_bucket.remote(index, message, readers))
        return loads
