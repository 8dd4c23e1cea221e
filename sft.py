"""Supervised fine-tuning on worked solutions: `python sft.py [--config config.yaml] [section.key=value ...]`

Rows, policy, checkpoints and configuration are those of train_grpo.py; only the loss function that the policy gets is
another one. A step trains on the `solution` of `grpo.num_prompts_per_step` rows, which prepare_data.py keeps for GSM8K,
MATH and arithmetic. Each checkpoint is a Hugging Face folder, a starting point for train_grpo.py. Keys of sampling and
rewards do nothing. The same command continues from the newest checkpoint.
"""

from contextlib import closing

import numpy as np
import ray
import torch

from checkpoint import Checkpoints, Position
from config import Config, ConfigError
from launch import StopRequests, check_before_start, read_config, run_main, start_ray
from logger import Logger
from model import Sequences
from policy import Policy
from rows import Rows, load_tokenizer
from supported import check_model


def negative_log_likelihood(
    logprobs_T: torch.Tensor, *, sequence_T: torch.Tensor, num_tokens: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and metrics of one micro-batch: minus the mean log-probability of the whole batch's solution tokens."""
    loss = -logprobs_T.sum() / num_tokens
    return loss, {"loss": loss.detach()}


def solution_ids(rows: Rows, tokenizer: object, longest: int) -> list[np.ndarray]:
    """Token ids of each row's solution and the end token. Raises ConfigError if a solution is missing or too long."""
    found = []
    for number, (row, prompt) in enumerate(zip(rows.rows, rows.prompt_ids, strict=True), 1):
        text = row.get("solution")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{rows.path}: row {number} has no `solution`, which is what is trained on")
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(prompt) + len(ids) > longest:
            raise ConfigError(
                f"{rows.path}: row {number} has {len(prompt) + len(ids)} tokens with its solution, more than "
                f"policy.max_total_sequence_length={longest}; raise that, or leave the row out"
            )
        found.append(np.array(ids))
    return found


def train(cfg: Config) -> None:
    """A whole run. Raises RunError or ConfigError with a one-line reason, and Stopped, after saving, when asked to."""
    stop = StopRequests(cfg.checkpointing.checkpoint_must_save_by)
    stop.listen()
    check_before_start(cfg)
    checkpoints = Checkpoints(cfg)
    data, size = cfg.data, cfg.grpo.num_prompts_per_step
    tokenizer = load_tokenizer(
        cfg.policy.model_name, "policy.model_name", data.chat_template, data.chat_template_kwargs
    )
    check_model(cfg.policy, len(tokenizer))
    rows = Rows(data.train_jsonl_fpath, tokenizer, cfg.policy.max_total_sequence_length, task="any")
    prompts = [np.array(ids) for ids in rows.prompt_ids]
    responses = solution_ids(rows, tokenizer, cfg.policy.max_total_sequence_length)
    last_step = min(cfg.grpo.max_num_steps, rows.number_of_batches(size, cfg.grpo.max_num_epochs))
    log = Logger(cfg, checkpoints.position.step, checkpoints.wandb_id)
    checkpoints.wandb_id = log.wandb_id
    with log.phase("start"), stop.interruptible():
        policy = Policy(cfg, start_ray(cfg, stop))
        ray.get(policy.start(), timeout=cfg.cluster.timeout_s)
        checkpoints.restore(policy)
    with closing(log), checkpoints.complete_at_the_end(policy):
        for step in range(checkpoints.position.step + 1, last_step + 1):
            stop.before_step(checkpoints.seconds)
            log.start_step(step, last_step)
            indices = rows.batch(step - 1, size, cfg.grpo.seed, data.shuffle)
            batch = Sequences([prompts[i] for i in indices], [responses[i] for i in indices], {}, {})
            trained = sum(map(len, batch.response_ids))
            with log.phase("train"):
                metrics = policy.update(batch, negative_log_likelihood, {"num_tokens": trained}, log.trace_file(0))
            log.stop_if_not_finite(metrics, [])
            metrics |= policy.memory() | {"total_tokens": trained + sum(map(len, batch.prompt_ids))}
            print(f" • loss {metrics['loss']:.4f}   grad_norm {metrics['grad_norm']:.3f}   lr {metrics['lr']:.1e}")
            log.end_step(metrics, [], lambda _: {})
            checkpoints.position = Position(step, step, {}, metrics)
            if cfg.checkpointing.enabled and (step % cfg.checkpointing.save_period == 0 or step == last_step):
                checkpoints.save(policy)
    log.summary(checkpoints.last_saved(), data.validation_jsonl_fpath or data.train_jsonl_fpath)


def main() -> None:
    train(read_config("Fine-tune a model on worked solutions."))


if __name__ == "__main__":
    run_main(main)
