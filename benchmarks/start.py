"""Where the time of a start goes: seconds from the command to each point on the way, in each of the processes.

    python benchmarks/start.py [arguments of train_grpo.py]

Runs train_grpo.py, with one step unless told otherwise, and prints when which process was where. An actor's first point
is the start of its process; Ray starts some before they are asked for. With VLLM_LOGGING_LEVEL=INFO vLLM's own lines
come in between, which have the seconds of compiling and of recording CUDA graphs.
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
BEGAN = psutil.Process().create_time()
POINTS = tempfile.mkstemp(suffix=".txt")[1]  # Ray carries this name and the time above to the actors


def reached(process: str, point: str, at: float | None = None) -> None:
    with open(POINTS, "a") as file:
        file.write(f"{(at or time.time()) - BEGAN:7.1f} s  {process}: {point}\n")


import train_grpo  # noqa: E402 - the scripts lie beside this folder
from benchmarks.environment import environment  # noqa: E402
from launch import Actors, run_main  # noqa: E402
from policy import PolicyWorker  # noqa: E402
from rollout import RolloutWorker  # noqa: E402


class TimedEngine(RolloutWorker):
    def __init__(self, *args: Any):
        name = f"engine {os.getpid()}"
        reached(name, "process started", psutil.Process().create_time())
        reached(name, "torch and this project imported")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        gc.disable()  # as RolloutWorker does for this import
        from vllm import LLM  # noqa: F401

        reached(name, "vLLM imported")
        super().__init__(*args)
        reached(name, "loaded")


class TimedPolicy(PolicyWorker):
    def __init__(self, *args: Any):
        self.name = f"policy {os.getpid()}"
        reached(self.name, "process started", psutil.Process().create_time())
        reached(self.name, "imported")
        super().__init__(*args)

    def setup(self, address: str) -> None:
        reached(self.name, "asked to load")
        super().setup(address)
        reached(self.name, "loaded")

    def warm_up(self, tokens: int) -> None:
        super().warm_up(tokens)
        reached(self.name, "warmed up")


TIMED = {RolloutWorker: TimedEngine, PolicyWorker: TimedPolicy}


def timed(holder: Any, name: str, point: str) -> None:
    """Let the driver reach `point` whenever the function `name` of `holder` returns."""
    function = getattr(holder, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        reached("driver", point)
        return found

    setattr(holder, name, wrapper)


def main() -> None:
    reached("driver", "imported")
    of_actors = Actors.__init__
    Actors.__init__ = lambda self, worker, *args: of_actors(self, TIMED[worker], *args)
    timed(train_grpo, "Rows", "rows read")
    timed(train_grpo, "start_ray", "Ray started")
    timed(train_grpo.Policy, "gpu", "the policy's process answers")
    timed(train_grpo, "check_refit", "first refit done and checked")
    timed(train_grpo, "train_step", "step done")
    sys.argv[1:] = ["grpo.max_num_steps=1", "grpo.val_at_start=false", "grpo.val_period=0", *sys.argv[1:]]
    try:
        train_grpo.main()
    finally:
        print(", ".join(f"{name} {value}" for name, value in environment().items()))
        print("".join(sorted(Path(POINTS).read_text().splitlines(True))), end="")
        os.unlink(POINTS)


if __name__ == "__main__":
    run_main(main)
