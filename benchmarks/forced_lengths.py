"""train_grpo.py with responses of given lengths, for step_time.py:

    python benchmarks/forced_lengths.py LENGTHS TAIL [arguments of train_grpo.py]

LENGTHS: a JSON list; response j of a step's prompt i gets the number of tokens at i * group + j (if it does not end
before, which a random model does once in some hundred thousand tokens). When an engine has finished its batch, it adds
a JSON line to TAIL: seconds of the batch, and of them those in which at most a tenth of its responses were unfinished.
"""

import json
import sys
import time
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import rollout  # noqa: E402 - the scripts lie beside this folder
import train_grpo  # noqa: E402
from launch import run_main  # noqa: E402

LENGTHS, TAIL = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]  # Ray carries them to the actors


class ForcedLengths(rollout.RolloutWorker):
    def __init__(self, *args: Any):
        from vllm.v1.engine.parallel_sampling import ParentRequest

        def child_params(parent: ParentRequest, index: int) -> Any:
            params = copy(parent.sampling_params)
            params.n, prompt = 1, int(parent.request_id.split("-")[0])
            params.max_tokens = LENGTHS[(prompt * parent.n + index) % len(LENGTHS)]
            return params

        ParentRequest._get_child_sampling_params = child_params
        super().__init__(*args)

    def generate(self, prompts: list[tuple[int, list[int]]], n: int, *args: Any) -> Iterator[list[rollout.Group]]:
        self.few, self.few_since, began = len(prompts) * n / 10, None, time.monotonic()
        yield from super().generate(prompts, n, *args)
        ended = time.monotonic()
        with open(TAIL, "a") as file:
            file.write(json.dumps({"batch_s": ended - began, "tail_s": ended - (self.few_since or ended)}) + "\n")

    def step(self) -> list[rollout.Group]:
        if self.few_since is None and self.engine.get_num_unfinished_requests() <= self.few:
            self.few_since = time.monotonic()
        return super().step()


if __name__ == "__main__":
    del sys.argv[1:3]
    rollout.RolloutWorker = ForcedLengths
    run_main(train_grpo.main)
