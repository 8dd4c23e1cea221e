"""verl's side of compare.py (verl 0.9): `python benchmarks/peer_verl.py JOB.json` runs its trainer.

verl's processes load this file too: as an external module, which mends two things before anything else is imported,
for the reward, and for a buffer that asks for finished answers every 0.05 s. verl's own asks every 2 s, by which each
step would wait up to 2 s; no key changes it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if "PEER_JOB" in os.environ:
    JOB = json.loads(Path(os.environ["PEER_JOB"]).read_text())
    import verl.utils.import_utils
    import verl.utils.tokenizer.continuous_token_wiring as wiring

    verl.utils.import_utils.is_trl_available = lambda: False  # its value head, not used here, has left TRL
    # The generic builder of prompts: Qwen's wants a newline token, which the tokenizer of step_time.py has not.
    wiring._MODEL_TYPE_TO_FAMILY["qwen3"] = wiring.ContinuousTokenModelFamily.DEFAULT

if "verl.trainer.ppo.v1.replay_buffer" in sys.modules:
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    class EagerBuffer(ReplayBuffer):
        def __init__(self, **kwargs: Any):
            count = JOB["prompts"]
            super().__init__(poll_interval=0.05, train_batch_size=count, gen_batch_size=count, **kwargs)


def reward(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """verl's reward function: our verifier, or a coin."""
    sys.path[:0] = [str(HERE.parent)]
    if JOB["coin"]:
        from benchmarks.coin import coin

        return coin(solution_str, {})
    from reward_server import verify

    return verify(solution_str, ground_truth).reward


def settings(job: dict, data: Path) -> list[str]:
    """verl's keys: packed sequences, dynamic batches, FSDP2, Liger, the engine's log-probabilities as the old ones."""
    rollout, actor, model = "actor_rollout_ref.rollout", "actor_rollout_ref.actor", "actor_rollout_ref.model"
    batch, samples = job["prompts"], job["prompts"] * job["group"]
    longest = job["prompt_tokens"] + job["answer_tokens"] + 12
    sizes = [1, 2, 4, 8, 16, 32, *range(64, samples + 1, 64)]
    keys = {
        "algorithm.adv_estimator": "grpo", "algorithm.use_kl_in_reward": False,
        "algorithm.rollout_correction.bypass_mode": True,
        "data.train_files": f"{data}/train.parquet", "data.val_files": f"{data}/train.parquet",
        "data.train_batch_size": batch, "data.max_prompt_length": job["prompt_tokens"],
        "data.max_response_length": job["answer_tokens"], "data.truncation": "error", "data.dataloader_num_workers": 2,
        f"{model}.path": job["model"], f"{model}.use_remove_padding": True, f"{model}.use_liger": True,
        f"{model}.enable_gradient_checkpointing": False,
        f"{actor}.strategy": "fsdp2", f"{actor}.optim.lr": job["lr"], f"{actor}.ppo_mini_batch_size": batch,
        f"{actor}.optim.lr_warmup_steps": job["warmup_steps"], f"{actor}.optim.weight_decay": 0.0,
        f"{actor}.use_dynamic_bsz": True, f"{actor}.ppo_max_token_len_per_gpu": job["micro_batch"],
        f"{actor}.use_kl_loss": False, f"{actor}.entropy_coeff": 0,
        f"{actor}.fsdp_config.reshard_after_forward": False, "actor_rollout_ref.ref.strategy": "fsdp2",
        f"{rollout}.name": "vllm", f"{rollout}.n": job["group"], f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.gpu_memory_utilization": 0.55, f"{rollout}.max_num_seqs": samples,
        f"{rollout}.max_num_batched_tokens": 16384, f"{rollout}.max_model_len": longest,
        f"{rollout}.ignore_eos": job["coin"], f"{rollout}.enforce_eager": False, f"{rollout}.free_cache_engine": True,
        f"{rollout}.cudagraph_capture_sizes": str(sizes).replace(" ", ""),
        "trainer.n_gpus_per_node": 1, "trainer.nnodes": 1, "trainer.total_training_steps": job["steps"],
        "trainer.total_epochs": 100, "trainer.val_before_train": False, "trainer.test_freq": -1,
        "trainer.save_freq": -1, "trainer.resume_mode": "disable", "trainer.logger": '["console","file"]',
        "trainer.project_name": "peer", "trainer.experiment_name": "peer",
        "trainer.default_local_dir": f"{data}/checkpoints", "hydra.run.dir": f"{data}/hydra",
        "++trainer.v1.sampler.custom_sampler.path": __file__,
        "++trainer.v1.sampler.custom_sampler.name": "EagerBuffer",
        "reward.custom_reward_function.path": __file__, "reward.custom_reward_function.name": "reward",
        "ray_kwargs.ray_init.num_cpus": 20,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items()]


def write_rows(job: dict, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(job["rows"]) as file:
        lines = [json.loads(line) for line in file]
    prompts = [line["responses_create_params"]["input"] for line in lines]
    messages = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    rows = [
        {"data_source": "job", "prompt": p, "reward_model": {"style": "rule", "ground_truth": line["expected_answer"]},
         "extra_info": {"index": i}}
        for i, (p, line) in enumerate(zip(messages, lines, strict=True))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)


def steps_of(metrics: Path) -> list[dict[str, float]]:
    """What verl's file logger has so far."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    found = [json.loads(line)["data"] for line in lines]
    return [
        {"verl_step_s": m["timing_s/step"], "generate_s": m["timing_s/gen"], "train_s": m["timing_s/update_actor"],
         "refit_s": m["timing_s/update_weights"], "reward": m["critic/score/mean"],
         "answer_tokens": m["response_length/mean"], "peak_gib": m.get("actor/perf/max_memory_allocated_gb")}
        for m in found
    ]  # fmt: skip


def main() -> None:
    from environment import environment  # beside this file

    job = json.loads(Path(sys.argv[1]).read_text())
    data = Path(tempfile.mkdtemp(dir=Path(sys.argv[1]).parent))
    write_rows(job, data / "train.parquet")
    metrics = data / "metrics.jsonl"
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"PEER_JOB": sys.argv[1], "VERL_USE_EXTERNAL_MODULES": "peer_verl", "PYTHONPATH": path,
                        "VERL_FILE_LOGGER_PATH": str(metrics)}  # fmt: skip
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        env.setdefault(name, "lo")  # one host, perhaps without a network
    process = subprocess.Popen([sys.executable, "-m", "verl.trainer.main_ppo", *settings(job, data)], env=env, cwd=data)
    ended: list[float] = []  # when each step was logged: what its user waits, from one end to the next
    with open(job["steps_file"], "a") as file:
        versions = environment(("torch", "vllm", "ray", "transformers", "verl", "liger-kernel", "tensordict"))
        file.write(json.dumps(versions) + "\n")
        while process.poll() is None and len(ended) < job["steps"]:
            for step in steps_of(metrics)[len(ended) :]:
                ended.append(time.monotonic())
                whole = ended[-1] - ended[-2] if len(ended) > 1 else step["verl_step_s"]
                file.write(json.dumps({"at_s": ended[-1] - ended[0], "step_s": whole, **step}) + "\n")
                file.flush()
            time.sleep(0.02)
    process.terminate()
    sys.exit(process.wait(60) if len(ended) < job["steps"] else 0)


if __name__ == "__main__":
    main()
