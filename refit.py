"""Refit: the policy's weights into the engines, in a few large buckets, in the precision that both compute in.

Three ways, by where the engines are (`Route`):
- "ipc": engine and policy rank share a GPU; each engine maps its neighbour's bucket through a CUDA IPC handle;
- "object store": on the CPU rank 0's bytes travel through Ray's object store to every engine;
- "broadcast": engines have GPUs of their own; rank 0 broadcasts to the first engine on each over NCCL (gloo on the
  CPU), and that one hands the bucket to the others there in one of the first two ways.
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
from torch.utils._python_dispatch import TorchDispatchMode

BUCKET_BYTES = 2**30
Route = Literal["ipc", "object store", "broadcast"]
Layout = list[list[tuple[str, tuple[int, ...]]]]  # for each bucket the (Hugging Face name, shape) of its weights


def route(device: str, colocated: bool) -> Route:
    """How weights travel."""
    return "broadcast" if not colocated else "ipc" if device == "cuda" else "object store"


def message(flat: torch.Tensor, readers: int) -> Any:
    """A bucket for other processes on this machine, as `WeightReceiver.load` takes it.

    From a GPU a list of one handle for each of the `readers`: torch counts the readers of a handle down from one, and
    would keep the memory of one that two have read for ever. `flat` must stay until they have read it.
    """
    if flat.device.type == "cpu":
        return flat.view(torch.uint8).numpy()
    torch.cuda.synchronize()
    return [reduce_tensor(flat)[1] for _ in range(readers)]


def broadcast_group(address: str, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """A process group of the policy's rank 0 (`rank` 0) and the first engine of each GPU, beside the default group that
    each side has.

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
        weights = [self.weights[name] for name, _ in self.layout[index]]
        tensors = [w.to_local() if isinstance(w, DTensor) else w.detach() for w in weights]
        for axis in ("dp", "tp"):  # tensor parallelism splits first, FSDP splits its parts again
            tensors = gather(weights, tensors, axis, self.dtype, self.device)
        return flatten(tensors, [t.numel() for t in tensors], self.dtype, self.device)

    def bucket(self, index: int, by: Route, readers: int) -> Any:
        """Bucket `index` as something that `WeightReceiver.load` on the other side takes (None: not from this rank).

        `readers`: by "ipc", how many engines there are beside this rank.
        """
        flat = self.flat(index)
        if by == "ipc" or (by == "object store" and self.rank == 0):
            self._shared = flat  # stays while the engine reads it: until the next call, or `release`
            return message(flat, readers)
        if by == "broadcast" and self.rank == 0:
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
        """`place`: which of the readers of a `message` this engine is."""
        self.layout, self.place, self.dtype, self.device, self.load_weights = layout, place, dtype, device, load_weights
        self.group: Any = None
        self._shared: torch.Tensor | None = None
        self._copies: dict[int, list[Copy]] = {}

    def load(self, index: int, sent: Any, readers: int = 0) -> Any:
        """Copy bucket `index` into the model: from the `message` that was sent, or without one from the broadcast.

        Returns a message for `readers` more engines on this GPU (None: there are none).
        """
        if sent is None:
            numel = sum(torch.Size(shape).numel() for _, shape in self.layout[index])
            self._shared = flat = torch.empty(numel, dtype=self.dtype, device=self.device)
            self.group.broadcast(flat, 0).wait()
        elif self.device.type == "cpu":
            flat = torch.from_numpy(sent.copy()).view(self.dtype)
        else:
            flat = rebuild_cuda_tensor(*sent[self.place])
        self.put(index, flat)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sender reuses its buffer once we return
        return message(flat, readers) if readers else None

    def put(self, index: int, flat: torch.Tensor) -> None:
        """Bucket `index` into the model: by its names the first time, by the copies that were made then later."""
        if index in self._copies:
            replay(flat, self._copies[index])
        else:
            sizes = [torch.Size(shape).numel() for _, shape in self.layout[index]]
            parts = zip(self.layout[index], flat.split(sizes), strict=True)
            with CopyRecorder(flat) as recorder:
                self.load_weights([(name, part.view(shape)) for (name, shape), part in parts])
            if recorder.complete:
                self._copies[index] = recorder.copies

    def release(self) -> None:
        """Give the last bucket's memory back."""
        self._shared = None


Copy = tuple[torch.Tensor, torch.Size, tuple[int, ...], int]  # into what; shape, strides and offset in the bucket


class CopyRecorder(TorchDispatchMode):
    """Notes where `load_weights` copies what of a bucket to, so that it need not go through all names again."""

    def __init__(self, flat: torch.Tensor):
        super().__init__()
        self.flat, self.copies, self.only_copies = flat, [], True

    @property
    def complete(self) -> bool:
        """Every element was copied once, and nothing else was done to weights (but a constant for padding)."""
        return self.only_copies and sum(shape.numel() for _, shape, _, _ in self.copies) == self.flat.numel()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten.copy_.default and same_storage(args[1], self.flat):
            into, source = args[:2]
            offset = source.storage_offset() - self.flat.storage_offset()
            self.copies.append((into, source.shape, source.stride(), offset))
        elif function._schema.is_mutable and function is not torch.ops.aten.fill_.Scalar:
            self.only_copies = False
        return function(*args, **(kwargs or {}))


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@torch.no_grad()
def replay(flat: torch.Tensor, copies: list[Copy]) -> None:
    """The same copies from another bucket of that layout."""
    start = flat.storage_offset()
    parts = [flat.as_strided(shape, stride, start + offset) for _, shape, stride, offset in copies]
    torch._foreach_copy_([into for into, *_ in copies], parts)


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


def gather(
    weights: list[nn.Parameter], parts: list[torch.Tensor], axis: str, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """This rank's `parts` of `weights` with what the other ranks along `axis` of the mesh have of them.

    One collective for all of them, where `full` needs one for each.
    """
    split = [i for i, w in enumerate(weights) if shard_dim(w, axis) is not None]
    if not split:
        return parts
    mesh, found = weights[split[0]].device_mesh[axis], list(parts)
    dims = [shard_dim(weights[i], axis) for i in split]
    shapes = []  # of the whole, with the dimension that is split in front
    for i, dim in zip(split, dims, strict=True):
        rows = weights[i].shape[dim]
        if axis == "dp" and shard_dim(weights[i], "tp") == dim:
            rows //= weights[i].device_mesh["tp"].size()
        shapes.append(torch.Size([rows, *parts[i].movedim(dim, 0).shape[1:]]))
    sizes = [-(-shape[0] // mesh.size()) * shape[1:].numel() for shape in shapes]  # the last rank may have fewer rows
    mine = flatten([parts[i].movedim(dim, 0) for i, dim in zip(split, dims, strict=True)], sizes, dtype, device)
    every = mine.new_empty(mesh.size(), len(mine))
    dist.all_gather(list(every), mine, group=mesh.get_group())
    for i, dim, shape, values in zip(split, dims, shapes, every.split(sizes, 1), strict=True):
        found[i] = values.reshape(-1)[: shape.numel()].view(shape).movedim(0, dim)
    return found


def flatten(tensors: list[torch.Tensor], sizes: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One after the other, each at the beginning of a place of that many elements."""
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    places = [place[: t.numel()] for place, t in zip(flat.split(sizes), tensors, strict=True)]
    torch._foreach_copy_(places, [t.reshape(-1) for t in tensors])
    return flat


def shard_dim(weight: torch.Tensor, axis: str) -> int | None:
    """The dimension that is split over the ranks along `axis` of the mesh; None: every one of them has all of it."""
    names = weight.device_mesh.mesh_dim_names if isinstance(weight, DTensor) else ()
    if axis not in names or weight.device_mesh[axis].size() == 1:
        return None
    return getattr(weight.placements[names.index(axis)], "dim", None)


def full(p: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a weight that may be sharded (then a collective)."""
    if not isinstance(p, DTensor):
        return p.detach()
    return p.full_tensor() if p.device_mesh.size() > 1 else p.detach().to_local()


class Link:
    """The driver's side: which engine gets its weights from where."""

    def __init__(
        self, policy_workers: list[Any], engine_workers: list[Any], gpus: list[int], by: Route, timeout_s: float
    ):
        """`gpus`: the number of each engine's GPU; engines beside the policy have that of its rank there."""
        self.policy, self.engines, self.gpus, self.by = policy_workers, engine_workers, gpus, by
        self.timeout_s = timeout_s
        layout = ray.get(policy_workers[0].weight_layout.remote(), timeout=timeout_s)
        self.num_buckets = len(layout)
        places = [gpus[:i].count(gpu) for i, gpu in enumerate(gpus)]
        if by == "broadcast":
            # NCCL takes no two processes on one GPU: the first engine on each joins, and feeds the others there.
            members = [policy_workers[0], *(e for e, p in zip(engine_workers, places, strict=True) if p == 0)]
            places = [max(0, p - 1) for p in places]
        expecting = [e.expect_weights.remote(layout, p) for e, p in zip(engine_workers, places, strict=True)]
        ray.get(expecting, timeout=timeout_s)
        if by == "broadcast":
            address = ray.get(policy_workers[0].address.remote(), timeout=timeout_s)
            joins = [m.join_broadcast.remote(address, i, len(members)) for i, m in enumerate(members)]
            ray.get(joins, timeout=timeout_s)

    def refit(self) -> None:
        """Bring all weights over; returns when every engine has them."""
        readers = [self.gpus.count(rank) for rank in range(len(self.policy))]
        for index in range(self.num_buckets):
            buckets = [w.weight_bucket.remote(index, self.by, n) for w, n in zip(self.policy, readers, strict=True)]
            ray.get([*self._load(index, buckets), *buckets], timeout=self.timeout_s)
        for holder in self.policy + (self.engines if self.by == "broadcast" else []):
            holder.release_weight_bucket.remote()  # not waited for: an actor does one thing after the other

    def _load(self, index: int, buckets: list[Any]) -> list[Any]:
        """Let every engine load bucket `index`; returns references to wait for."""
        loads: list[Any] = []
        for i, (engine, gpu) in enumerate(zip(self.engines, self.gpus, strict=True)):
            first = self.gpus.index(gpu)
            if self.by == "broadcast":
                leads = first == i
                sent, readers = None if leads else loads[first], self.gpus.count(gpu) - 1 if leads else 0
            else:
                sent, readers = buckets[gpu if self.by == "ipc" else 0], 0
            loads.append(engine.load_weight_bucket.remote(index, sent, readers))
        return loads

    def make_room(self) -> None:
        """Let the policy give memory that it has no use for at the moment back to its GPU, for the engine beside it."""
        ray.get([w.empty_cache.remote() for w in self.policy], timeout=self.timeout_s)
