"""TRL's side of compare.py, a process of its own: `python benchmarks/peer_trl.py JOB.json`"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.coin import coin  # noqa: E402 - the scripts lie beside this folder
from benchmarks.environment import environment  # noqa: E402
from reward_server import verify  # noqa: E402

JOB = json.loads(Path(sys.argv[1]).read_text())
ON_GPU = torch.cuda.is_available()
seconds = {"generate_s": 0.0, "refit_s": 0.0}  # of the present step


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(phase: str, function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = now()
        result = function(*args, **kwargs)
        seconds[phase] += now() - began
        return result

    return call


def rewards(completions: list[Any], expected_answer: list[str], **_: Any) -> list[float]:
    """TRL's reward function: our verifier in this process, or coins."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    if JOB["coin"]:
        return [coin(text, {}) for text in texts]
    return [verify(text, answer).reward for text, answer in zip(texts, expected_answer, strict=True)]


class Clock(TrainerCallback):
    """Writes a line for each step, with what TRL logs right after it."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.step_began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        ended = now()
        whole = ended - self.step_began
        self.step = {"at_s": ended - self.began, "step_s": whole, "train_s": whole - sum(seconds.values()), **seconds}
        self.step_began = ended
        seconds.update(generate_s=0.0, refit_s=0.0)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "reward" in logs:
            self.step |= {"reward": logs["reward"], "answer_tokens": logs["completions/mean_length"]}
            with open(JOB["steps_file"], "a") as file:
                file.write(json.dumps(self.step) + "\n")


def main() -> None:
    with open(JOB["steps_file"], "a") as file:
        versions = environment(("torch", "vllm", "transformers", "trl", "accelerate", "liger-kernel"))
        file.write(json.dumps(versions) + "\n")
    with open(JOB["rows"]) as file:
        lines = [json.loads(line) for line in file]
    prompts = [line["responses_create_params"]["input"] for line in lines]
    rows = [{"prompt": p, "expected_answer": r["expected_answer"]} for p, r in zip(prompts, lines, strict=True)]
    samples = JOB["prompts"] * JOB["group"]
    config = GRPOConfig(
        output_dir=f"{JOB['output']}/trl", max_steps=JOB["steps"], learning_rate=JOB["lr"], seed=JOB["seed"],
        lr_scheduler_type="constant_with_warmup", warmup_steps=JOB["warmup_steps"], weight_decay=0.0,
        optim="adamw_torch_fused" if ON_GPU else "adamw_torch", bf16=ON_GPU, use_cpu=not ON_GPU,
        gradient_checkpointing=False, per_device_train_batch_size=JOB["micro_batch"],
        gradient_accumulation_steps=samples // JOB["micro_batch"], num_generations=JOB["group"], temperature=1.0,
        max_completion_length=JOB["answer_tokens"], beta=0.0, loss_type="dapo", scale_rewards="group",
        use_liger_kernel=ON_GPU and importlib.util.find_spec("liger_kernel") is not None, use_vllm=True,
        vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_importance_sampling_correction=False,
        vllm_max_model_length=JOB["prompt_tokens"] + JOB["answer_tokens"], logging_steps=1, report_to="none",
        disable_tqdm=True, save_only_model=True, save_strategy="steps" if JOB["save_every"] else "no",
        save_steps=JOB["save_every"] or 1, generation_kwargs={"ignore_eos": True} if JOB["coin"] else None,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=JOB["model"],
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    engine = trainer.vllm_generation
    engine.generate, engine.sync_weights = timed("generate_s", engine.generate), timed("refit_s", engine.sync_weights)
    trainer.train()
    os._exit(0)  # vLLM in this process does not always let it end by itself


if __name__ == "__main__":
    main()
