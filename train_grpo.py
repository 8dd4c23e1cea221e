"""GRPO on math problems: the experiment. `python train_grpo.py [--config config.yaml] [section.key=value ...]`

Read this file first; `train` is the loop. What differs from the GRPO paper, and why:
- the gradient is on-policy: with one optimizer step per batch the old log-probabilities are the present ones, so
  neither an old-policy pass nor (with beta = 0) a reference model is run. The loss then prints as about 0: look at
  reward, gradient norm, entropy and KL error instead;
- the baseline leaves the sample itself out, and every mean in the loss is over the whole batch (token level), not per
  micro-batch, rank or sequence;
- answers that could not be verified are masked, not scored 0; answers without advantage skip the update.

Axis suffixes of names: _P prompt, _S sample (= prompt x group), _T response token of a micro-batch.
Files it works with: policy.py (the model), rollout.py (vLLM), reward_client.py (HTTP rewards), checkpoint.py,
launch.py (Ray, signals), logger.py.

The same command continues from the newest checkpoint. Exit codes: 0 finished; 1 error (one line says which); 2 bad
usage; 85 stopped by SIGTERM, SIGUSR1 or checkpointing.checkpoint_must_save_by, saved, and to be continued by the same
command; 143 second SIGTERM, which saves nothing.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from checkpoint import Checkpoints, Position
from config import GRPO, Config, ConfigError, LossFn
from hardware import Limits, Shape, memory_table, not_for_kv_cache
from launch import (
    RunError,
    Stopped,
    StopRequests,
    check_before_start,
    config_from_command_line,
    run_main,
    start_ray,
    wait_for_loading,
)
from logger import Logger
from model import HEAD_CHUNK, Sequences
from policy import Policy
from reward_client import UNVERIFIED, RewardClient
from rollout import Group, RolloutEngines
from rows import Rows, end_of_sequence_ids, load_tokenizer

# ---------------------------------------------------------------- the algorithm


def group_advantages(
    rewards_S: torch.Tensor,
    group_S: torch.Tensor,
    valid_S: torch.Tensor | None = None,
    *,
    leave_one_out: bool,
    normalize: bool,
) -> torch.Tensor:
    """Advantage of each sample [S] within its group (equal values of `group_S`), in float64.

    Reward minus the mean of the group's valid samples, or with `leave_one_out` of the other valid samples (RLOO,
    arXiv:2402.14740). With `normalize` divided by their Bessel-corrected standard deviation + 1e-6 (GRPO,
    arXiv:2402.03300); where that is zero or undefined the difference stays as it is. Invalid samples, groups with fewer
    than two valid samples, and groups with equal rewards get 0.
    """
    rewards_S = rewards_S.double()
    valid_S = torch.ones_like(group_S, dtype=torch.bool) if valid_S is None else valid_S.bool()
    advantages_S = torch.zeros_like(rewards_S)
    for group in group_S.unique():
        members = (group_S == group) & valid_S
        r = rewards_S[members]  # [n]
        n = len(r)
        if n < 2 or r.max() == r.min():
            continue
        others = r.expand(n, n)  # row i: the rewards that sample i is compared with
        if leave_one_out:
            others = others[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
        advantage = r - others.mean(1)
        if normalize and others.shape[1] > 1:
            # torch's std is two-pass: E[x^2] - E[x]^2 would turn equal rewards into noise, and noise into a divisor
            spread = others.std(1)
            usable = spread > 1e-12 * others.abs().amax(1)
            advantage = torch.where(usable, advantage / (spread + 1e-6), advantage)
        advantages_S[members] = advantage
    return advantages_S


def grpo_loss(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    rollout_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor | None = None,
    ref_logprobs_T: torch.Tensor | None = None,
    sequence_T: torch.Tensor,
    cfg: LossFn,
    num_valid_tokens: float,
    num_valid_sequences: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and metrics of one micro-batch. All tensors [T]; the two counts are those of the whole (global) batch.

    `logprobs_T` carries the gradient; the others are constants: under the engine (`rollout_`), the weights at the start
    of the update (`old_`; None: the present ones) and the reference model (`ref_`; None: no KL term). Because sums are
    divided by global counts, losses and metrics of micro-batches and ranks simply add up.
    """
    mask_T = mask_T.float()
    on = mask_T > 0

    def keep(x_T: torch.Tensor) -> torch.Tensor:  # masked tokens may hold anything, also NaN
        return torch.where(on, x_T.float(), 0.0)

    def sequence_mean(x_T: torch.Tensor) -> torch.Tensor:
        return sequence_sum(x_T * mask_T, sequence_T) / sequence_sum(mask_T, sequence_T).clamp(min=1)

    cur_T, gen_T, advantages_T = keep(logprobs_T), keep(rollout_logprobs_T), keep(advantages_T)
    old_T = cur_T.detach() if old_logprobs_T is None else keep(old_logprobs_T)
    if cfg.variant == "dr_grpo":  # a constant instead of the answers' lengths, arXiv:2503.20783
        weight_T = mask_T / (max(num_valid_sequences, 1) * cfg.dr_grpo_length)
    elif cfg.token_level_loss:
        weight_T = mask_T / max(num_valid_tokens, 1)
    else:
        weight_T = mask_T / (sequence_sum(mask_T, sequence_T).clamp(min=1) * max(num_valid_sequences, 1))

    log_ratio_T = cur_T - old_T
    if cfg.variant == "gspo":  # one ratio per sequence, arXiv:2507.18071
        log_ratio_T = sequence_mean(log_ratio_T)
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
    if cfg.variant == "cispo":  # the clipped ratio only weighs the gradient, arXiv:2506.13585
        surrogate_T = -advantages_T * clipped_T.detach() * cur_T
    else:
        surrogate_T = torch.maximum(-advantages_T * ratio_T, -advantages_T * clipped_T)
        if cfg.ratio_clip_c is not None:  # dual clip, arXiv:1912.09729
            bounded_T = torch.minimum(surrogate_T, -advantages_T * cfg.ratio_clip_c)
            surrogate_T = torch.where(advantages_T < 0, bounded_T, surrogate_T)

    gap_T = (old_T - gen_T).detach()  # trainer against engine, same weights: numerical mismatch
    if cfg.use_importance_sampling_correction:
        log_weight_T = sequence_sum(gap_T, sequence_T) if cfg.sequence_level_importance_ratios else gap_T
        correction_T = torch.nan_to_num(log_weight_T.exp(), nan=0.0, posinf=0.0, neginf=0.0)
        if cfg.truncated_importance_sampling_ratio is not None:
            correction_T = correction_T.clamp(max=cfg.truncated_importance_sampling_ratio)
        surrogate_T = surrogate_T * correction_T
    loss = (weight_T * surrogate_T).sum()

    kl_T = torch.zeros_like(cur_T)
    if ref_logprobs_T is not None:
        x_T = (keep(ref_logprobs_T) - cur_T).clamp(-20, 20)
        kl_T = (x_T.expm1() - x_T).clamp(-10, 10)  # k3, http://joschu.net/blog/kl-approx.html
        loss = loss + cfg.reference_policy_kl_penalty * (weight_T * kl_T).sum()

    with torch.no_grad():
        metrics = loss_metrics(on, cur_T, ratio_T, clipped_T, kl_T, gap_T, max(num_valid_tokens, 1))
    return loss, metrics | {"loss": loss.detach()}


def loss_metrics(
    on: torch.Tensor,
    cur_T: torch.Tensor,
    ratio_T: torch.Tensor,
    clipped_T: torch.Tensor,
    kl_T: torch.Tensor,
    gap_T: torch.Tensor,
    num_valid_tokens: float,
) -> dict[str, torch.Tensor]:
    """This micro-batch's share of each mean over the batch's tokens, and extrema (_min, _max).

    `gap_T` is trainer minus engine log-probability under the same weights: the numerical mismatch of the two.
    """

    def mean(x_T: torch.Tensor) -> torch.Tensor:
        return torch.where(on, x_T, 0.0).sum() / num_valid_tokens

    return {
        "trained_token_fraction": mean(torch.ones_like(cur_T)),
        "approx_entropy": mean(-cur_T),
        "probs_ratio": mean(ratio_T),
        "probs_ratio_clamped": mean(clipped_T),
        "clipfrac": mean((ratio_T != clipped_T).float()),
        "kl_penalty": mean(kl_T),
        "token_mult_prob_error": mean(gap_T.abs().exp()),
        "gen_kl_error": mean(gap_T.expm1() - gap_T),
        "sampling_importance_ratio": mean(gap_T.exp()),
        "gen_logprob_gap_max": torch.where(on, gap_T.abs(), 0.0).amax(),
        "probs_ratio_max": torch.where(on, ratio_T, 1.0).amax(),
        "probs_ratio_min": torch.where(on, ratio_T, 1.0).amin(),
    }


def sequence_sum(x_T: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """For each token the sum of `x_T` over its sequence (equal values of `sequence_T`). [T] to [T]."""
    _, ids_T = torch.unique(sequence_T, return_inverse=True)
    return torch.zeros_like(x_T).index_add(0, ids_T, x_T)[ids_T]


# ---------------------------------------------------------------- samples


@dataclass
class Sample:
    """One answer on its way from the engine to the update."""

    prompt: int  # which of the step's prompts: the group
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    truncated: bool
    text: str
    reward: float = 0.0
    status: str = ""

    @property
    def verified(self) -> bool:
        return self.status not in UNVERIFIED


def sample_and_score(run: "Run", rows: Rows, indices: list[int], n: int, seed: int) -> list[Sample]:
    """Steps 2 to 4: `n` answers to each row, scored while others are still being generated. Ordered by prompt."""

    def to_samples(group: Group) -> list[Sample]:
        texts = run.tokenizer.batch_decode(group.response_ids, skip_special_tokens=True)
        prompt_ids = np.array(rows.prompt_ids[indices[group.index]])
        parts = zip(group.response_ids, group.rollout_logprobs, group.finish_reasons, texts, strict=True)
        return [Sample(group.index, prompt_ids, ids, lp, why == "length", text) for ids, lp, why, text in parts]

    pending: list[tuple[list[Sample], Future]] = []
    with run.log.phase("generate", total=len(indices)) as progress:
        for group in run.engines.generate([rows.prompt_ids[i] for i in indices], n, seed, run.stop_token_ids):
            samples = to_samples(group)
            answer = rows.rows[indices[group.index]]["expected_answer"]
            pending.append((samples, run.rewards.submit([s.text for s in samples], answer)))
            progress.update()
    with run.log.phase("score"):
        for samples, verdicts in pending:
            for sample, verdict in zip(samples, verdicts.result(), strict=True):
                sample.reward, sample.status = verdict["reward"], verdict["status"]
    return sorted((s for samples, _ in pending for s in samples), key=lambda s: s.prompt)


def groups_with_signal(samples: list[Sample]) -> set[int]:
    """Prompts whose verified answers did not all get the same reward."""
    rewards: dict[int, set[float]] = {}
    for s in samples:
        if s.verified:
            rewards.setdefault(s.prompt, set()).add(s.reward)
    return {prompt for prompt, seen in rewards.items() if len(seen) > 1}


@dataclass
class Batch:
    """What `collect` found."""

    samples: list[Sample]  # to train on
    drawn: list[Sample]  # all that were drawn: the same without dynamic sampling
    next: int  # the batch of prompts to go on with


def collect(run: "Run", rows: Rows, first: int) -> Batch:
    """Steps 1 to 4, from the `first`-th batch of prompts.

    Dynamic sampling (DAPO, arXiv:2503.14476) draws more prompts until the batch is full of groups with different
    rewards. It drops whole groups, so that every mean in a group stays what it was.
    """
    g, kept, drawn = run.cfg.grpo, [], []
    batches = g.dynamic_sampling_max_gen_batches if g.use_dynamic_sampling else 1
    for batch in range(batches):
        rows_P = rows.batch(first + batch, g.num_prompts_per_step, g.seed, run.cfg.data.shuffle)
        seed = g.seed + first + batch + 1
        samples = sample_and_score(run, rows, rows_P, g.num_generations_per_prompt, seed)
        for s in samples:
            s.prompt += batch * g.num_prompts_per_step
        useful = groups_with_signal(samples) if g.use_dynamic_sampling else {s.prompt for s in samples}
        kept += [s for s in samples if s.prompt in useful]
        drawn += samples
        if len(kept) >= run.cfg.samples_per_step:
            break
    else:
        print(
            f" • dynamic sampling: {len(kept)} of {run.cfg.samples_per_step} answers after {batches} batches of prompts"
        )
    return Batch(kept[: run.cfg.samples_per_step], drawn, first + batch + 1)


def next_batch(run: "Run", rows: Rows, last: bool) -> Batch:
    """This step's samples; with `grpo.async_one_step_off` those that were drawn while the last update ran.

    Then the next ones are begun here, with weights that will be one update old when they are trained on.
    """
    batch = run.ahead.result() if run.ahead else collect(run, rows, run.batches_drawn)
    run.ahead = None
    if run.cfg.grpo.async_one_step_off and not last:
        run.ahead = run.background.submit(collect, run, rows, batch.next)
    return batch


def shaped_rewards(samples: list[Sample], g: GRPO) -> list[float]:
    """Rewards as the advantages see them: scaled, then less DAPO's penalty for answers near the length limit."""
    scale, shape, shaped = g.reward_scaling, g.reward_shaping, []
    for s in samples:
        reward = s.reward
        if scale.enabled:
            share = (reward - scale.source_min) / (scale.source_max - scale.source_min)
            reward = scale.target_min + min(max(share, 0.0), 1.0) * (scale.target_max - scale.target_min)
        if shape.enabled:
            excess = len(s.response_ids) - (shape.max_response_length - shape.overlong_buffer_length)
            reward -= max(0.0, excess / shape.overlong_buffer_length) * shape.overlong_buffer_penalty
        shaped.append(reward)
    return shaped


# ---------------------------------------------------------------- one step's update


def update(run: "Run", samples: list[Sample], advantages_S: torch.Tensor) -> dict[str, float]:
    """Step 6: one optimizer step per `policy.train_global_batch_size` samples; none where no answer has an advantage.

    Returns the metrics over those steps: token-weighted means, extrema. Empty when there was nothing to learn from.
    """
    cfg, size = run.cfg, run.cfg.policy.train_global_batch_size
    needs_reference = cfg.loss_fn.reference_policy_kl_penalty > 0
    train_S = np.array([s.verified and not (cfg.grpo.overlong_filtering and s.truncated) for s in samples])
    finite = [np.isfinite(s.rollout_logprobs) for s in samples]
    masks = [f & on for f, on in zip(finite, train_S, strict=True)]
    valid_S = [np.count_nonzero(mask) for mask in masks]  # tokens
    # Without a KL term an answer without advantage has no gradient: skip it, but keep it in the denominators.
    active = [i for i in range(len(samples)) if train_S[i] and (advantages_S[i] != 0 or needs_reference)]
    batch = Sequences(
        prompt_ids=[s.prompt_ids for s in samples],
        response_ids=[s.response_ids for s in samples],
        per_token={"rollout_logprobs_T": [s.rollout_logprobs for s in samples], "mask_T": masks},
        per_sequence={"advantages_T": advantages_S.float().numpy()},
    )
    chosen = batch.take(active)
    # Under the weights before the update; in the first optimizer step those are the present ones.
    later = [k for k, i in enumerate(active) if i >= size]
    old_logprobs_T = dict(zip(later, run.policy.logprobs(chosen.take(later)), strict=True)) if later else {}
    if needs_reference:
        chosen.per_token["ref_logprobs_T"] = run.policy.logprobs(chosen, reference=True)
    results = []
    for start in range(0, len(samples), size):
        step = range(start, min(start + size, len(samples)))
        mine = [k for k, i in enumerate(active) if i in step]
        if mine:
            counts = {
                "num_valid_tokens": float(sum(valid_S[i] for i in step)),
                "num_valid_sequences": float(sum(valid_S[i] > 0 for i in step)),
            }
            trace = run.log.trace_file(len(results))
            part = chosen.take(mine)
            if start:
                part.per_token["old_logprobs_T"] = [old_logprobs_T[k] for k in mine]
            result = run.policy.update(part, grpo_loss, {"cfg": cfg.loss_fn, **counts}, trace)
            stop_if_not_finite(run, result, samples)
            results.append(result | {"trained_tokens": result["trained_token_fraction"] * counts["num_valid_tokens"]})
    nonfinite = int(sum(len(f) - np.count_nonzero(f) for f in finite))
    cost = run.limits.training([samples[i].prompt for i in active], *lengths([samples[i] for i in active]))
    return combine_steps(results) | cost | {"num_nonfinite_logprobs": nonfinite, "num_optimizer_steps": len(results)}


def lengths(samples: list[Sample]) -> tuple[list[int], list[int]]:
    """Tokens of the prompts and of the answers."""
    return [len(s.prompt_ids) for s in samples], [len(s.response_ids) for s in samples]


def combine_steps(results: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one: extrema; token means weighted by tokens; plain means of the rest.

    Token means are sums over the trained tokens divided by all valid ones: dividing by the trained share gives means
    over the answers that were trained on (those without advantage were skipped).
    """
    tokens = sum(r["trained_tokens"] for r in results)
    combined = {}
    for name in results[0] if results else ():
        values = [r[name] for r in results]
        if name.endswith("_min"):
            combined[name] = min(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        elif name in TOKEN_MEANS and tokens:
            shares = [r["trained_tokens"] / (r["trained_token_fraction"] or 1.0) for r in results]
            combined[name] = sum(v * share for v, share in zip(values, shares, strict=True)) / tokens
        else:
            combined[name] = sum(values) / len(values)
    return combined


TOKEN_MEANS = {
    "approx_entropy", "probs_ratio", "probs_ratio_clamped", "clipfrac", "kl_penalty", "token_mult_prob_error",
    "gen_kl_error", "sampling_importance_ratio",
}  # fmt: skip


def rollout_metrics(samples: list[Sample]) -> dict[str, float]:
    """What the step's answers were like; rewards over verified answers only."""
    rewards = [s.reward for s in samples if s.verified]
    prompt_tokens = sum({s.prompt: len(s.prompt_ids) for s in samples}.values())  # a group's prompt counts once
    return {
        "reward": float(np.mean(rewards)) if rewards else 0.0,
        "frac_zero_signal_groups": 1 - len(groups_with_signal(samples)) / len({s.prompt for s in samples}),
        "truncation_rate": float(np.mean([s.truncated for s in samples])),
        "mean_gen_tokens": float(np.mean([len(s.response_ids) for s in samples])),
        "num_samples": len(samples),
        "num_unverified": sum(not s.verified for s in samples),
        "total_tokens": prompt_tokens + sum(len(s.response_ids) for s in samples),
    }


# ---------------------------------------------------------------- the run


@dataclass
class Run:
    """What the loop works with."""

    cfg: Config
    log: Logger
    tokenizer: Any
    stop_token_ids: list[int]
    rewards: RewardClient
    policy: Policy
    engines: RolloutEngines
    checkpoints: Checkpoints
    stop: StopRequests
    limits: Limits
    finished: Position  # the last step that was finished; the next two belong to the one that is being made
    batches_drawn: int  # of prompts: one a step, more with dynamic sampling
    exceeded: dict[str, int]  # steps in a row that a limit was exceeded
    background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    ahead: Future | None = None  # the next step's batch, where it is drawn in the background


def train(cfg: Config) -> None:
    """The loop. Returns when the last step is done; raises RunError or ConfigError with a one-line reason, or Stopped
    when asked to stop, after saving."""
    stop = StopRequests(cfg.checkpointing.checkpoint_must_save_by)
    stop.listen()
    check_before_start(cfg)
    checkpoints = Checkpoints(cfg)
    last = checkpoints.position
    log = Logger(cfg, last.step, checkpoints.wandb_id)
    tokenizer = load_tokenizer(cfg.policy.model_name)
    with log.phase("start"), stop.interruptible():
        placement = start_ray(cfg, stop)
        rewards = RewardClient(cfg.env, cfg.logger.log_dir)
        try:
            policy, shape = Policy(cfg, placement), Shape.of(cfg.policy.model_name)
            engines = RolloutEngines(cfg, placement, not_for_kv_cache=not_for_kv_cache(cfg, shape))
            gpu_name, gpu_bytes = policy.gpu()
            if gpu_bytes:
                print(memory_table(cfg, shape, gpu_bytes, HEAD_CHUNK), flush=True)
            loading = {"policy": policy.start(), "engines": engines.start()}
            rows = Rows(cfg.data.train_jsonl_fpath, tokenizer, cfg.policy.max_total_sequence_length)
            val_path = cfg.data.validation_jsonl_fpath
            val_rows = Rows(val_path, tokenizer, cfg.policy.max_total_sequence_length) if val_path else None
            last_step = number_of_steps(cfg, len(rows))
            wait_for_loading(loading, cfg.cluster.timeout_s)
            stop_ids = end_of_sequence_ids(cfg.policy.model_name, tokenizer)
            limits = Limits(cfg, shape, gpu_name)
            run = Run(
                cfg, log, tokenizer, stop_ids, rewards, policy, engines, checkpoints, stop, limits, last,
                last.batches_drawn, dict(last.exceeded),
            )  # fmt: skip
            checkpoints.restore(policy)
            engines.connect(policy.workers)
            engines.refit()
        except BaseException:
            rewards.close()
            raise
    try:
        if val_rows and cfg.grpo.val_at_start and not last.step:
            with stop.interruptible():
                validate(run, val_rows, step=0)
        for step in range(last.step + 1, last_step + 1):
            stop.before_step(checkpoints.seconds)
            train_step(run, rows, val_rows, step, last_step)
        checkpoints.wait(policy)
    except Stopped:
        checkpoints.save_unsaved(policy, run.finished, log.wandb_id)
        raise
    except Exception:
        with suppress(Exception):  # what is being written may still be fine
            checkpoints.wait(policy)
        raise
    finally:
        rewards.close()
        log.close()


def train_step(run: Run, rows: Rows, val_rows: Rows | None, step: int, last_step: int) -> None:
    """One step, as the module's docstring and the README describe it."""
    cfg, g = run.cfg, run.cfg.grpo
    run.log.start_step(step, last_step)
    # 1. to 4. The next rows of the shuffled file; their token ids to the engines; groups back as they finish, each
    # scored while others are still being generated
    with run.stop.interruptible():
        batch = next_batch(run, rows, last=step == last_step)
        samples, drawn, run.batches_drawn = batch.samples, batch.drawn, batch.next
    # 5. Advantages within each prompt's group
    advantages_S = group_advantages(
        torch.tensor(shaped_rewards(samples, g), dtype=torch.float64),
        torch.tensor([s.prompt for s in samples]),
        torch.tensor([s.verified for s in samples]),
        leave_one_out=g.use_leave_one_out_baseline,
        normalize=g.normalize_rewards and cfg.loss_fn.variant != "dr_grpo",
    )
    # 6. Update the policy
    with run.log.phase("sleep"):
        run.engines.sleep()
    with run.log.phase("train"):
        metrics = update(run, samples, advantages_S)
    # 7. Refit: the new weights into the engines, which may still be sampling the next batch
    if run.ahead:
        with run.log.phase("wait"):
            wait([run.ahead])
    with run.log.phase("refit"):
        run.engines.refit()
    # 8. Log, validate, checkpoint
    metrics |= rollout_metrics(drawn) | run.policy.memory()
    if val_rows and g.val_period and (step % g.val_period == 0 or step == last_step):
        metrics |= validate(run, val_rows, step)
    metrics |= run.limits.generation([s.prompt for s in drawn], *lengths(drawn))
    run.log.end_step(metrics, drawn, run.limits.utilization)
    check_limits(run, metrics)
    run.finished = Position(step, run.batches_drawn, dict(run.exceeded), metrics)
    if cfg.checkpointing.enabled and (step % cfg.checkpointing.save_period == 0 or step == last_step):
        with run.log.phase("checkpoint"):
            run.checkpoints.save(run.policy, run.finished, run.log.wandb_id)


VALIDATION_SEED = 1_000_000_000  # far from the training steps' seeds, and the same at every validation


def validate(run: Run, rows: Rows, step: int) -> dict[str, float]:
    """Mean accuracy of the validation rows, `grpo.num_val_generations_per_prompt` sampled answers each.

    Answers that could not be verified do not count as wrong; without any other the accuracy is NaN.
    """
    g, found = run.cfg.grpo, []
    indices = list(range(len(rows)))[: g.max_val_samples]
    size = g.val_batch_size or len(indices)
    with run.log.phase("validate"):
        for start in range(0, len(indices), size):
            n, part = g.num_val_generations_per_prompt, indices[start : start + size]
            found += sample_and_score(run, rows, part, n, seed=VALIDATION_SEED + start)
    verified = [s.reward for s in found if s.verified]
    metrics = {
        "val:accuracy": float(np.mean(verified)) if verified else math.nan,
        "val:num_unverified": len(found) - len(verified),
        "val:avg_length": float(np.mean([len(s.response_ids) for s in found])),
        "val:truncation_rate": float(np.mean([s.truncated for s in found])),
    }
    run.log.validation(step, metrics, found)
    return metrics


# ---------------------------------------------------------------- start and stop


def number_of_steps(cfg: Config, num_rows: int) -> int:
    per_epoch = num_rows // cfg.grpo.num_prompts_per_step
    if not per_epoch:
        raise ConfigError(
            f"{cfg.data.train_jsonl_fpath} has {num_rows} rows, fewer than "
            f"grpo.num_prompts_per_step={cfg.grpo.num_prompts_per_step}"
        )
    return min(cfg.grpo.max_num_steps, per_epoch * cfg.grpo.max_num_epochs)


def check_limits(run: Run, metrics: dict[str, float]) -> None:
    """Raise RunError when a limit was exceeded `grpo.gate_patience` steps in a row."""
    g = run.cfg.grpo
    limits = {
        "max_unverified_fraction": (
            metrics["num_unverified"] / metrics["num_samples"],
            "the reward server cannot verify the answers: look at reward_server.log in logger.log_dir",
        ),
        "max_token_mult_prob_error": (
            metrics.get("token_mult_prob_error", 0.0),
            "engine and trainer disagree about the same answers: refit or precision is broken, or the run diverged",
        ),
    }
    for name, (value, reason) in limits.items():
        limit = getattr(g, name)
        run.exceeded[name] = run.exceeded.get(name, 0) + 1 if limit is not None and value > limit else 0
        if run.exceeded[name] >= g.gate_patience:
            raise RunError(
                f"{value:.4g} is above grpo.{name}={limit} for {run.exceeded[name]} steps in a row; {reason}"
            )


def stop_if_not_finite(run: Run, result: dict[str, float], samples: list[Sample]) -> None:
    if not (math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])):
        path = run.log.save_failed_step(samples)
        raise RunError(
            f"loss {result['loss']}, gradient norm {result['grad_norm']} at step {run.log.step}: not finite; the "
            f"weights were not changed by it, its answers are in {path}, checkpoints are intact"
        )


def main() -> None:
    train(config_from_command_line("Train a model with GRPO."))


if __name__ == "__main__":
    run_main(main)
