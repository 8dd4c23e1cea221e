"""GRPO on math problems: the experiment. `python train_grpo.py [--config config.yaml] [section.key=value ...]`

One step, in the words of `train_step` below:

    1 rows ──▶ 2 prompt token ids ──▶ 3 groups of responses ──▶ 4 rewards     others are still being generated
                                          ▲                         │
                                     7 refit: new weights      5 advantages within each group
                                          │                         ▼
    8 log, validate, checkpoint ◀─────────┴─────────────────── 6 update

Read in this order: train_grpo.py (the algorithm and the loop), rows.py (1, 2), rollout.py (3: vLLM), reward_client.py
(4: HTTP), policy.py and model.py (6: FSDP2), refit.py (7). The other files need not be read.

What differs from the GRPO paper, and why:
- the gradient is on-policy: with one optimizer step per batch the old log-probabilities are the present ones, so
  neither an old-policy pass nor (with beta = 0) a reference model is run. The loss then does not show what is learned:
  look at reward, gradient norm, entropy and KL error instead;
- the baseline leaves the sample itself out, and every mean in the loss is over the whole batch (token level), not per
  micro-batch, rank or sequence;
- samples that could not be verified are masked, not scored 0; samples without gradient are left out of the update.

Axis suffixes of names: _P prompt, _S sample (= prompt x group), _T response token of a micro-batch.

The same command continues from the newest checkpoint. Exit codes: see launch.run_main.
"""

import math
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from checkpoint import Checkpoints, Position
from config import GRPO, Config, LossFn
from hardware import Limits, Shape, memory_table, not_for_kv_cache
from launch import RunError, StopRequests, check_before_start, check_gates, read_config, run_main, start_ray
from logger import Logger
from model import HEAD_CHUNK, Sequences
from policy import STEP_FACTS, Policy
from reward_client import RewardClient, Sample
from rollout import Group, RolloutEngines
from rows import Rows, end_of_sequence_ids, load_tokenizer
from supported import check_model, check_refit

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
    arXiv:2402.03300), unless the deviation is zero or undefined. Invalid samples, groups with fewer than two valid
    samples, and groups with equal rewards get 0.
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
        others = others[~torch.eye(n, dtype=torch.bool)].view(n, n - 1) if leave_one_out else others
        advantage = r - others.mean(1)
        if normalize and others.shape[1] > 1:
            # torch's std is two-pass: E[x^2] - E[x]^2 would turn equal rewards into noise, and noise into a divisor
            spread = others.std(1)
            usable = spread > 1e-12 * others.abs().amax(1)
            advantage = torch.where(usable, advantage / (spread + 1e-6), advantage)
        advantages_S[members] = advantage
    return advantages_S


# Without a KL or entropy term a sample without advantage has no gradient, and is left out of the update. Set this to
# True if you add a term that every sample has, such as a length penalty or a supervised loss.
LOSS_NEEDS_ALL_SAMPLES = False


def grpo_loss(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    rollout_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor | None = None,
    ref_logprobs_T: torch.Tensor | None = None,
    entropy_T: torch.Tensor | None = None,
    sequence_T: torch.Tensor,
    cfg: LossFn,
    num_valid_tokens: float,
    num_valid_sequences: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and metrics of one micro-batch. All tensors are [T]; the two counts are those of the whole (global) batch.

    `logprobs_T` and `entropy_T` (None: no bonus) carry the gradient. The other log-probabilities are constants: those
    of the engine (`rollout_`), of the weights at the start of the update (`old_`; None: the present ones) and of the
    reference model (`ref_`; None: no KL term). Sums are divided by global counts, so that losses and metrics of
    micro-batches and ranks add up. A metric of your own is averaged like the others: return its sum over the unmasked
    tokens, divided by `num_valid_tokens`.
    """
    mask_T = mask_T.float()

    def keep(x_T: torch.Tensor) -> torch.Tensor:  # a masked token may hold anything, even NaN
        return torch.where(mask_T > 0, x_T.float(), 0.0)

    cur_T, gen_T, advantages_T = keep(logprobs_T), keep(rollout_logprobs_T), keep(advantages_T)
    old_T = cur_T.detach() if old_logprobs_T is None else keep(old_logprobs_T)
    log_ratio_T = cur_T - old_T
    if cfg.variant == "gspo":  # one ratio per sequence, the mean over its tokens, arXiv:2507.18071
        log_ratio_T = sequence_mean(log_ratio_T, mask_T, sequence_T)
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
    surrogate_T = torch.maximum(-advantages_T * ratio_T, -advantages_T * clipped_T)
    if cfg.ratio_clip_c is not None:  # dual clip, arXiv:1912.09729
        bounded_T = torch.minimum(surrogate_T, -advantages_T * cfg.ratio_clip_c)
        surrogate_T = torch.where(advantages_T < 0, bounded_T, surrogate_T)
    if cfg.variant == "cispo":  # the clipped ratio only weighs the gradient, arXiv:2506.13585
        surrogate_T = -advantages_T * clipped_T.detach() * cur_T
    if cfg.variant == "dppo":  # a token that has moved this far from the engine's probability stops, arXiv:2602.04879
        moved_T = (cur_T.exp() - gen_T.exp()).detach() * advantages_T.sign()
        surrogate_T = -advantages_T * ratio_T * (moved_T <= cfg.dppo_divergence)

    gap_T = (old_T - gen_T).detach()  # trainer minus engine under the same weights: their numerical mismatch
    if cfg.use_importance_sampling_correction:
        surrogate_T = surrogate_T * rollout_correction(gap_T, mask_T, sequence_T, cfg)
    weight_T = token_weights(mask_T, sequence_T, cfg, max(num_valid_tokens, 1), max(num_valid_sequences, 1))
    loss = (weight_T * surrogate_T).sum()

    kl_T = torch.zeros_like(cur_T)
    if ref_logprobs_T is not None:
        x_T = (keep(ref_logprobs_T) - cur_T).clamp(-20, 20)
        kl_T = (x_T.expm1() - x_T).clamp(-10, 10)  # k3, http://joschu.net/blog/kl-approx.html
        loss = loss + cfg.reference_policy_kl_penalty * (weight_T * kl_T).sum()
    tokens = {"cur_T": cur_T, "ratio_T": ratio_T, "clipped_T": clipped_T, "kl_T": kl_T, "gap_T": gap_T}
    if entropy_T is not None:
        tokens["entropy_T"] = keep(entropy_T)
        loss = loss - cfg.entropy_coef * (weight_T * tokens["entropy_T"]).sum()
    return loss, loss_metrics(mask_T, max(num_valid_tokens, 1), **tokens) | {"loss": loss.detach()}


@torch.no_grad()
def loss_metrics(
    mask_T: torch.Tensor,
    num_valid_tokens: float,
    cur_T: torch.Tensor,
    ratio_T: torch.Tensor,
    clipped_T: torch.Tensor,
    kl_T: torch.Tensor,
    gap_T: torch.Tensor,
    **more_T: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """This micro-batch's share of each mean over the batch's tokens, and extrema (_min, _max).

    Masked tokens have a ratio of 1 and a gap of 0, so they do not count in the extrema either.
    """
    means = {
        "trained_token_fraction": mask_T,
        "approx_entropy": -cur_T,
        "probs_ratio": ratio_T,
        "probs_ratio_clamped": clipped_T,
        "clipfrac": (ratio_T != clipped_T).float(),
        "kl_penalty": kl_T,
        "token_mult_prob_error": gap_T.abs().exp(),
        "gen_kl_error": gap_T.expm1() - gap_T,
        "sampling_importance_ratio": gap_T.exp(),
        **{name.removesuffix("_T"): x_T for name, x_T in more_T.items()},
    }
    shares = {name: (x_T * mask_T).sum() / num_valid_tokens for name, x_T in means.items()}
    ratios = {"probs_ratio_max": ratio_T.max(), "probs_ratio_min": ratio_T.min()}
    return shares | ratios | {"gen_logprob_gap_max": gap_T.abs().max()}


def token_weights(
    mask_T: torch.Tensor, sequence_T: torch.Tensor, cfg: LossFn, num_valid_tokens: float, num_valid_sequences: float
) -> torch.Tensor:
    """Weight of each token in the loss [T]. Over the whole batch the weights add up to 1 (dr_grpo: to less)."""
    if cfg.variant == "dr_grpo":  # a constant takes the place of the responses' lengths, arXiv:2503.20783
        return mask_T / (num_valid_sequences * cfg.dr_grpo_length)
    if cfg.token_level_loss:
        return mask_T / num_valid_tokens
    return mask_T / (sequence_sum(mask_T, sequence_T).clamp(min=1) * num_valid_sequences)


def rollout_correction(
    gap_T: torch.Tensor, mask_T: torch.Tensor, sequence_T: torch.Tensor, cfg: LossFn
) -> torch.Tensor:
    """Importance weight of each token [T], trainer over engine probability; names and bounds as in NeMo RL.

    "tis" caps each weight (https://fengyao.notion.site/off-policy-rl); "icepop" sets weights outside the bounds to 0
    (arXiv:2510.18855); "seq-mask-tis" drops each sequence whose weights have a geometric mean outside the bounds.
    """
    log_weight_T = sequence_sum(gap_T, sequence_T) if cfg.sequence_level_importance_ratios else gap_T
    weight_T = torch.nan_to_num(log_weight_T.exp(), nan=0.0, posinf=0.0, neginf=0.0)
    least, most = cfg.truncated_importance_sampling_ratio_min, cfg.truncated_importance_sampling_ratio or math.inf
    kind = cfg.truncated_importance_sampling_type
    if kind == "tis":
        return weight_T.clamp(max=most)
    judged_T = sequence_mean(gap_T, mask_T, sequence_T).exp() if kind == "seq-mask-tis" else weight_T
    return weight_T * ((judged_T >= least) & (judged_T <= most))


def sequence_sum(x_T: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """For each token the sum of `x_T` over its sequence [T]; tokens of a sequence have the same `sequence_T`."""
    _, ids_T = torch.unique(sequence_T, return_inverse=True)
    return torch.zeros_like(x_T).index_add(0, ids_T, x_T)[ids_T]


def sequence_mean(x_T: torch.Tensor, mask_T: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """For each token the mean of `x_T`, which is 0 where masked, over the unmasked tokens of its sequence."""
    return sequence_sum(x_T, sequence_T) / sequence_sum(mask_T, sequence_T).clamp(min=1)


# ---------------------------------------------------------------- samples


def column(samples: list[Sample], name: str) -> np.ndarray:
    """One attribute of all samples, as an array [S]."""
    return np.array([getattr(s, name) for s in samples])


def sample_and_score(run: "Run", rows: Rows, indices: list[int], n: int, seed: int) -> list[Sample]:
    """Steps 2 to 4: `n` responses to each row, scored while others are still being generated. Ordered by prompt."""
    if run.episodes:
        with run.log.phase("generate", total=len(indices) * n) as progress:
            play = partial(run.episodes.play, [rows.rows[i] for i in indices], n, seed, progress.update)
            return run.engines.surviving(play)
    pending: list[tuple[Group, list[str], Future]] = []
    with run.log.phase("generate", total=len(indices)) as progress:
        for group in run.engines.generate([rows.prompt_ids[i] for i in indices], n, seed, run.stop_token_ids):
            texts = run.tokenizer.batch_decode(group.response_ids, skip_special_tokens=True)
            pending.append((group, texts, run.rewards.submit(texts, rows.rows[indices[group.index]])))
            progress.update()
    samples: list[Sample] = []
    with run.log.phase("score"):
        for group, texts, verdicts in pending:
            prompt_ids = np.array(rows.prompt_ids[indices[group.index]])
            parts = (group.response_ids, group.rollout_logprobs, group.finish_reasons, texts, verdicts.result())
            for ids, logprobs, reason, text, verdict in zip(*parts, strict=True):
                cut_off, reward, status = reason == "length", verdict["reward"], verdict["status"]
                samples.append(Sample(group.index, prompt_ids, ids, logprobs, cut_off, text, reward, status))
    return sorted(samples, key=lambda s: s.prompt)


def groups_with_signal(samples: list[Sample]) -> set[int]:
    """Prompts whose verified responses did not all get the same reward."""
    different = {(s.prompt, s.reward) for s in samples if s.verified}
    return {prompt for prompt, count in Counter(prompt for prompt, _ in different).items() if count > 1}


@dataclass
class Batch:
    """The samples of one step."""

    samples: list[Sample]  # to train on
    drawn: list[Sample]  # all samples, also those of groups that dynamic sampling dropped
    next: int  # number of the batch of prompts that the next step begins with


def collect(run: "Run", first: int) -> Batch:
    """Steps 1 to 4, from the `first`-th batch of prompts.

    Dynamic sampling (DAPO, arXiv:2503.14476) draws more prompts until the batch is full of groups with different
    rewards. It drops whole groups, never single samples, so that no group's mean reward changes.
    """
    g, kept, drawn = run.cfg.grpo, [], []
    batches = min(g.dynamic_sampling_max_gen_batches if g.use_dynamic_sampling else 1, run.num_batches - first)
    for batch in range(batches):
        rows_P = run.rows.batch(first + batch, g.num_prompts_per_step, g.seed, run.cfg.data.shuffle)
        seed = g.seed + first + batch + 1
        samples = sample_and_score(run, run.rows, rows_P, g.num_generations_per_prompt, seed)
        for s in samples:
            s.prompt += batch * g.num_prompts_per_step
        drawn += samples
        useful = groups_with_signal(samples)
        kept += [s for s in samples if s.prompt in useful or not g.use_dynamic_sampling]
        if len(kept) >= run.cfg.samples_per_step:
            break
    else:
        wanted = run.cfg.samples_per_step
        print(f" • dynamic sampling: {len(kept)} of {wanted} samples after {batches} batches of prompts")
    return Batch(kept[: run.cfg.samples_per_step], drawn, first + batch + 1)


def next_batch(run: "Run", step: int) -> Batch:
    """This step's samples. When the prompts of `grpo.max_num_epochs` are used up, this step becomes the last one.

    With `grpo.async_one_step_off` the samples were drawn while the last update ran. The engines then begin to draw the
    next step's here, with weights that will be one update old when those samples are trained on.
    """
    batch = run.ahead.result() if run.ahead else collect(run, run.checkpoints.position.batches_drawn)
    run.ahead = None
    if batch.next == run.num_batches:
        run.last_step = step
    if run.cfg.grpo.async_one_step_off and step < run.last_step:
        run.ahead = run.background.submit(collect, run, batch.next)
    return batch


def shaped_rewards(samples: list[Sample], g: GRPO) -> np.ndarray:
    """Rewards [S] minus DAPO's penalty for responses near the length limit.

    With a limit of 20 tokens, a buffer of 4 and a penalty of 1, 16 tokens cost nothing, 18 cost 0.5, 20 and more 1.
    """
    rewards_S, shape = column(samples, "reward").astype(float), g.reward_shaping
    if shape.enabled:
        free = shape.max_response_length - shape.overlong_buffer_length
        share_S = (column(samples, "response_tokens") - free) / shape.overlong_buffer_length
        rewards_S -= share_S.clip(0, 1) * shape.overlong_buffer_penalty
    return rewards_S


# ---------------------------------------------------------------- one step's update


def update_policy(run: "Run", samples: list[Sample], advantages_S: torch.Tensor) -> dict[str, float]:
    """Step 6: one optimizer step per `policy.train_global_batch_size` samples; none if no sample has a gradient.

    Returns the metrics of these optimizer steps combined, and what the update counted.
    """
    cfg, size = run.cfg, run.cfg.policy.train_global_batch_size
    needs_reference, with_entropy = cfg.loss_fn.reference_policy_kl_penalty > 0, cfg.loss_fn.entropy_coef > 0
    masks, num_nonfinite = [], 0
    for s in samples:
        finite = np.isfinite(s.rollout_logprobs)
        num_nonfinite += int((~finite).sum())
        own = finite if s.mask is None else finite & s.mask
        masks.append(own & (s.verified and not (cfg.grpo.overlong_filtering and s.truncated)))
    valid_S = np.array([mask.sum() for mask in masks])  # unmasked tokens
    batch = Sequences(
        prompt_ids=[s.prompt_ids for s in samples],
        response_ids=[s.response_ids for s in samples],
        per_token={"rollout_logprobs_T": [s.rollout_logprobs for s in samples], "mask_T": masks},
        per_sequence={"advantages_T": advantages_S.float().numpy()},
    )
    # A sample that is left out still counts in the denominators.
    needs_all = needs_reference or with_entropy or LOSS_NEEDS_ALL_SAMPLES
    active_S = (valid_S > 0) & ((advantages_S.numpy() != 0) | needs_all)
    active = np.flatnonzero(active_S)
    # Old log-probabilities are those before the update. In the first optimizer step they are the present ones.
    later = active[active >= size]
    old = dict(zip(later, run.policy.logprobs(batch.take(later)), strict=True)) if len(later) else {}
    reference = dict(zip(active, run.policy.logprobs(batch.take(active), True), strict=True)) if needs_reference else {}
    results, valid_tokens = [], []
    for number in np.unique(active // size):
        mine = active[active // size == number]
        part, valid = batch.take(mine), valid_S[number * size : (number + 1) * size]
        for name, known in (("old_logprobs_T", old), ("ref_logprobs_T", reference)):
            if mine[0] in known:
                part.per_token[name] = [known[i] for i in mine]
        counts = {"num_valid_tokens": float(valid.sum()), "num_valid_sequences": float((valid > 0).sum())}
        trace = run.log.trace_file(len(results))
        result = run.policy.update(part, grpo_loss, {"cfg": cfg.loss_fn, **counts}, trace, with_entropy)
        run.log.stop_if_not_finite(result, samples)
        results.append(result)
        valid_tokens.append(counts["num_valid_tokens"])
    trained = [samples[i] for i in active]
    cost = run.limits.training(*sizes(trained))
    facts = {"num_nonfinite_logprobs": num_nonfinite, "num_optimizer_steps": len(results)}
    return combine_steps(results, valid_tokens) | cost | facts


def sizes(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, prompt tokens and response tokens of each sample [S], from which hardware.py computes the work."""
    return column(samples, "prompt"), column(samples, "prompt_tokens"), column(samples, "response_tokens")


def combine_steps(results: list[dict[str, float]], valid_tokens: list[float]) -> dict[str, float]:
    """Combine the metrics of several optimizer steps: extrema; plain means of STEP_FACTS; token means of all others.

    A loss function's metric is a sum over the trained tokens, divided by all valid tokens of its optimizer step. Here
    it becomes a mean over the trained tokens, which lack those of samples without advantage.
    """
    weight = np.array(valid_tokens)  # a metric times this is its sum over the trained tokens
    trained = sum(weight * [r["trained_token_fraction"] for r in results])
    parts = {name: (1.0, len(results)) for name in STEP_FACTS} | {"trained_token_fraction": (weight, weight.sum())}
    combined = {}
    for name in results[0] if results else ():
        values = np.array([r[name] for r in results])
        factor, total = parts.get(name, (weight, trained))
        extremum = getattr(values, name[-3:]) if name.endswith(("_min", "_max")) else None
        combined[name] = float(extremum() if extremum else (values * factor).sum() / total)
    return combined


def rollout_metrics(samples: list[Sample]) -> dict[str, float]:
    """Metrics of the responses; the mean reward is over the verified ones only."""
    verified_S = column(samples, "verified")
    rewards = column(samples, "reward")[verified_S]
    responses_S = column(samples, "response_tokens")
    made_S = responses_S - column(samples, "masked_tokens")
    _, first = np.unique(column(samples, "prompt"), return_index=True)  # a group's prompt counts once
    return {
        "reward": float(rewards.mean()) if len(rewards) else 0.0,
        "frac_zero_signal_groups": 1 - len(groups_with_signal(samples)) / len(first),
        "truncation_rate": float(column(samples, "truncated").mean()),
        "mean_gen_tokens": float(made_S.mean()),
        "num_samples": len(samples),
        "num_unverified": int((~verified_S).sum()),
        "total_tokens": int(column(samples, "prompt_tokens")[first].sum() + responses_S.sum()),
        "mean_turns": float(column(samples, "turns").mean()),
        "num_tool_calls": int(column(samples, "tool_calls").sum()),
        "num_masked_tokens": int((responses_S - made_S).sum()),
    }


# ---------------------------------------------------------------- the run


class Run:
    """What the loop works with."""

    def __init__(self, cfg: Config):
        """Start or continue a run: everything loaded, and the engines with the policy's weights."""
        self.cfg, self.stop = cfg, StopRequests(cfg.checkpointing.checkpoint_must_save_by)
        self.stop.listen()
        check_before_start(cfg)
        self.checkpoints = Checkpoints(cfg)
        step = self.checkpoints.position.step
        self.log = Logger(cfg, step, self.checkpoints.wandb_id)
        self.checkpoints.wandb_id = self.log.wandb_id
        data, model_name = cfg.data, cfg.policy.model_name
        self.tokenizer = load_tokenizer(model_name, "policy.model_name", data.chat_template, data.chat_template_kwargs)
        self.stop_token_ids = end_of_sequence_ids(model_name, self.tokenizer)
        check_model(cfg.policy, len(self.tokenizer))
        self.learned = step > 0  # whether any step had a gradient; of steps before this command that is assumed
        self.background = ThreadPoolExecutor(1)
        self.ahead: Future | None = None  # the next step's batch, if it is drawn in the background
        with self.log.phase("start"), self.stop.interruptible(), ExitStack() as on_error:
            # Episodes bring their rewards along.
            self.rewards = None if cfg.env.plays_episodes else RewardClient(cfg.env, cfg.logger.log_dir)
            on_error.callback(lambda: self.rewards and self.rewards.close())
            task = "episode" if not self.rewards else "any" if self.rewards.is_gym else "math"
            # Rows are read before Ray starts, so that a bad one costs seconds.
            read = partial(Rows, tokenizer=self.tokenizer, max_length=cfg.policy.max_total_sequence_length, task=task)
            self.rows = read(data.train_jsonl_fpath)
            self.val_rows = {name: read(each.path) for name, each in cfg.validation_sets.items()}
            self.num_batches = self.rows.number_of_batches(cfg.grpo.num_prompts_per_step, cfg.grpo.max_num_epochs)
            self.last_step = min(cfg.grpo.max_num_steps, self.num_batches)
            placement, shape = start_ray(cfg, self.stop), Shape.of(model_name)
            self.policy = Policy(cfg, placement)
            self.engines = RolloutEngines(cfg, placement, not_for_kv_cache=not_for_kv_cache(cfg, shape))
            gpu_name, gpu_bytes = self.policy.gpu()
            self.limits = Limits(cfg, shape, gpu_name)
            for line in memory_table(cfg, shape, gpu_bytes, HEAD_CHUNK):
                print(line, flush=True)
            loading = self.policy.start() + self.engines.start()  # in the background
            self.episodes: Any = None
            if cfg.env.plays_episodes:
                from gym import Episodes  # only here, since the import takes half a second

                self.episodes = Episodes(cfg, self.tokenizer, self.stop_token_ids, self.engines.workers)
            ray.get(loading, timeout=cfg.cluster.timeout_s)
            self.checkpoints.restore(self.policy)
            self.engines.policy = self.policy.workers
            self.engines.refit()
            check_refit(cfg.policy, self.policy, self.engines, len(self.tokenizer))
            on_error.pop_all()


def train(cfg: Config) -> None:
    """A whole run. Raises RunError or ConfigError with a one-line reason, and Stopped, after saving, when asked to."""
    run = Run(cfg)
    try:
        with run.checkpoints.complete_at_the_end(run.policy):
            loop(run)
        run.log.summary(run.checkpoints.last_saved(), cfg.data.validation_jsonl_fpath or cfg.data.train_jsonl_fpath)
    finally:
        (run.rewards or run.episodes).close()
        run.log.close()


def loop(run: Run) -> None:
    """Run steps until the last one, or until the epochs' prompts are used up."""
    checkpoints = run.checkpoints
    if checkpoints.position.step == 0 and run.cfg.grpo.val_at_start and run.val_rows:
        with run.stop.interruptible():
            metrics = validate(run, step=0)
        run.log.write(0, metrics)
    while checkpoints.position.step < run.last_step and checkpoints.position.batches_drawn < run.num_batches:
        run.stop.before_step(checkpoints.seconds)
        train_step(run, checkpoints.position.step + 1)
    if not run.learned:
        raise RunError(
            f"nothing was learned: in none of the {checkpoints.position.step} steps did a group's responses get "
            f"different rewards; look at them in {run.cfg.logger.log_dir}/rollouts.jsonl"
        )


def train_step(run: Run, step: int) -> None:
    """One step, as the module's docstring and the README describe it."""
    cfg, g = run.cfg, run.cfg.grpo
    run.log.start_step(step, run.last_step)
    # 1. to 4. Take the next rows of the shuffled file, send their token ids to the engines, and score each group of
    # responses while others are still being generated
    with run.stop.interruptible():
        batch = next_batch(run, step)
        samples, drawn = batch.samples, batch.drawn
    # 5. Advantages within each prompt's group
    advantages_S = group_advantages(
        torch.from_numpy(shaped_rewards(samples, g)),
        torch.from_numpy(column(samples, "prompt")),
        torch.from_numpy(column(samples, "verified")),
        leave_one_out=g.use_leave_one_out_baseline,
        normalize=g.normalize_rewards and cfg.loss_fn.variant != "dr_grpo",
    )
    # 6. Update the policy, while engines on the same GPU give it their memory
    with run.log.phase("sleep"):
        run.engines.sleep()
    with run.log.phase("train"):
        metrics = update_policy(run, samples, advantages_S)
    run.learned |= metrics["num_optimizer_steps"] > 0
    # 7. Refit: the new weights into the engines, which may still be sampling the next batch
    if run.ahead:
        with run.log.phase("wait"):
            wait([run.ahead])
    with run.log.phase("refit"):
        run.engines.refit()
    # 8. Log, validate, checkpoint
    metrics |= rollout_metrics(drawn) | run.policy.memory() | validate(run, step)
    metrics |= run.limits.generation(*sizes(drawn)) | {"engine_restarts": run.engines.restarts}
    metrics |= {"reward_server_restarts": run.rewards.restarts} if run.rewards else {}
    run.log.end_step(metrics, drawn, run.limits.utilization)
    exceeded = dict(run.checkpoints.position.exceeded)
    check_gates(g, metrics, exceeded)
    run.checkpoints.position = Position(step, batch.next, exceeded, metrics)
    if cfg.checkpointing.enabled and (step % cfg.checkpointing.save_period == 0 or step == run.last_step):
        with run.log.phase("checkpoint"):
            run.checkpoints.save(run.policy)


VALIDATION_SEED = 1_000_000_000  # far from the training steps' seeds, and the same at every validation


def validate(run: Run, step: int) -> dict[str, float]:
    """Metrics of each validation set if a validation is due; a named set has val:NAME:accuracy and so on."""
    g, metrics = run.cfg.grpo, {}
    at_this_step = step == 0 or g.val_period and (step % g.val_period == 0 or step == run.last_step)
    for name, rows in run.val_rows.items() if at_this_step else ():
        n, found = run.cfg.validation_sets[name].num_val_generations_per_prompt, []
        indices = list(range(len(rows)))[: g.max_val_samples]
        size = g.val_batch_size or len(indices)
        with run.log.phase("validate"):
            for first in range(0, len(indices), size):
                found += sample_and_score(run, rows, indices[first : first + size], n, seed=VALIDATION_SEED + first)
        of_all, prefix = rollout_metrics(found), f"val:{name}:" if name else "val:"
        # Samples that could not be verified do not count as wrong; if none was verified there is no accuracy.
        of_set = {
            f"{prefix}accuracy": of_all["reward"] if of_all["num_unverified"] < len(found) else math.nan,
            f"{prefix}num_answers": len(found) - of_all["num_unverified"],
            f"{prefix}num_unverified": of_all["num_unverified"],
            f"{prefix}avg_length": of_all["mean_gen_tokens"],
            f"{prefix}truncation_rate": of_all["truncation_rate"],
        }
        run.log.validation(step, prefix, of_set, found, run.tokenizer.decode)
        metrics |= of_set
    return metrics


def main() -> None:
    train(read_config("Train a model with GRPO."))


if __name__ == "__main__":
    run_main(main)
