"""Peak memory of each rank while a model is read into shards, beside the estimate that training prints.

    python benchmarks/loading.py GEOMETRY --gpus N --model-folder FOLDER [--results FILE] [section.key=value ...]

The model (step_time.py's, with random weights) is made in FOLDER unless it is there. Adds one run to FILE, a list.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from benchmarks.step_time import GEOMETRIES, make_model  # noqa: E402
from config import Config, load_config  # noqa: E402
from hardware import GIB, Shape, resident_bytes  # noqa: E402
from model import build_model  # noqa: E402


def load(rank: int, cfg: Config, meeting: str, output: str) -> None:
    """One rank: load, and let rank 0 write what all of them held."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=rank, world_size=cfg.world_size)
    tp = cfg.policy.dtensor_cfg.tensor_parallel_size
    mesh = init_device_mesh("cuda", (cfg.world_size // tp, tp), mesh_dim_names=("dp", "tp"))
    began = time.perf_counter()
    model = build_model(cfg.policy, mesh, device)
    torch.cuda.synchronize()
    shard = sum(w.to_local().numel() * w.element_size() for w in model.parameters())
    largest = max(w.numel() * w.element_size() for w in model.parameters())
    mine = torch.tensor([torch.cuda.max_memory_allocated(), shard, largest], dtype=torch.float64, device=device)
    found = [torch.empty_like(mine) for _ in range(cfg.world_size)]
    dist.all_gather(found, mine)
    if rank == 0:
        peaks, shards, sizes = (torch.stack(found).T / GIB).tolist()
        result = {"seconds": time.perf_counter() - began, "peak_gib": peaks, "shard_gib": shards}
        Path(output).write_text(json.dumps(result | {"largest_weight_gib": max(sizes)}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--model-folder", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    args, overrides = parser.parse_known_args()
    folder = args.model_folder
    if not (folder / "tokenizer.json").exists():
        make_model(args.geometry, folder)
    machine = ["cluster.num_nodes=1", f"cluster.gpus_per_node={args.gpus}", "policy.dtensor_cfg.tensor_parallel_size=1"]
    cfg = load_config(str(ROOT / "config.yaml"), [*machine, f"policy.model_name={folder}", *overrides])
    meeting, output = folder / "meeting", folder / "loaded.json"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(load, (cfg, str(meeting), str(output)), nprocs=args.gpus)
    estimate = resident_bytes(cfg, Shape.of(str(folder)))["policy: float32 master weights"] / GIB
    result = {"model": args.geometry, "gpus": args.gpus, "overrides": overrides, "estimate_gib": estimate}
    result |= environment() | json.loads(output.read_text())
    print(json.dumps(result))
    if args.results:
        earlier = json.loads(args.results.read_text()) if args.results.exists() else []
        args.results.write_text(json.dumps([*earlier, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
