"""Learning is real: it happens with every variant and option, and does not happen without a signal."""

import runpy

import numpy as np
import pytest
import torch
from conftest import RECIPE, ROOT, logged, weights

import train_grpo
from config import load_config
from launch import RunError, check_gates
from logger import Logger
from reward_client import RewardClient
from train_grpo import loop, train

pytestmark = pytest.mark.slow

OPTIONS = {  # the last is of the variant grpo
    "dr_grpo": ["loss_fn.variant=dr_grpo"],
    "gspo": ["loss_fn.variant=gspo", "policy.train_global_batch_size=64"],
    "everything": [
        "policy.train_global_batch_size=64", "loss_fn.reference_policy_kl_penalty=0.001", "loss_fn.ratio_clip_c=3",
        "loss_fn.use_importance_sampling_correction=true", "loss_fn.truncated_importance_sampling_ratio=2",
        "grpo.use_dynamic_sampling=true", "grpo.dynamic_sampling_max_gen_batches=2", "grpo.normalize_rewards=true",
        "grpo.overlong_filtering=true", "grpo.reward_shaping.enabled=true",
        "grpo.reward_shaping.max_response_length=12",
        "grpo.reward_shaping.overlong_buffer_length=2", "loss_fn.token_level_loss=false",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_variant_learns(begin, name, tmp_path):
    loop(begin(*OPTIONS[name]))
    metrics = logged(tmp_path)
    learned(metrics)
    assert all(m["gen_kl_error"] < 1e-5 for m in metrics)
    if name == "everything":
        assert metrics[0]["num_optimizer_steps"] == 2
        assert {m["num_samples"] for m in metrics} <= {128, 256}  # one batch of prompts, or two where signal was short
        assert max(m["num_samples"] for m in metrics) == 256
        assert metrics[0]["kl_penalty"] < metrics[-1]["kl_penalty"]
        assert metrics[-1]["probs_ratio_max"] > 1.0  # the second optimizer step of a batch is off-policy


def learned(metrics: list[dict]) -> None:
    rewards = [m["reward"] for m in metrics]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.2, rewards


def test_a_loss_of_ones_own_learns(begin, tmp_path, monkeypatch):
    """The fork under examples/ that replaces one function."""
    own = runpy.run_path(str(ROOT / "examples" / "rejection_sampling.py"))["better_than_the_group"]
    monkeypatch.setattr(train_grpo, "grpo_loss", own)
    loop(begin("loss_fn.reference_policy_kl_penalty=0"))
    metrics = logged(tmp_path)
    learned(metrics)
    assert all(m["loss"] > 0.01 for m in metrics)  # a log-likelihood, which GRPO's loss is not


def test_a_constant_reward_teaches_nothing(begin, tmp_path, capsys):
    """Weights bit for bit as before, even with weight decay, and the run says so: no step had anything to learn from.

    Dynamic sampling draws three batches for the first step, and the last of the four in two epochs for the second.
    """
    (tmp_path / "constant.py").write_text("def constant(text, row):\n    return 1.0\n")
    run = begin(
        f"env.verifier={tmp_path}/constant.py:constant", "grpo.num_prompts_per_step=200",
        "grpo.num_generations_per_prompt=2", "grpo.max_num_epochs=2", "grpo.use_dynamic_sampling=true",
        "grpo.dynamic_sampling_max_gen_batches=3",
    )  # fmt: skip
    before = weights(run, tmp_path / "before")
    run.rewards = RewardClient(run.cfg.env, tmp_path)
    with pytest.raises(RunError, match="nothing was learned: in none of the 2 steps did a group's responses get diff"):
        loop(run)
    run.rewards.close()
    metrics = logged(tmp_path)
    assert [m["num_samples"] for m in metrics] == [1200, 400]
    assert "dynamic sampling: 0 of 400 samples after 3 batches of prompts" in capsys.readouterr().out
    assert [m["reward"] for m in metrics] == [1.0, 1.0]
    assert [m["frac_zero_signal_groups"] for m in metrics] == [1.0, 1.0]
    after = weights(run, tmp_path / "after")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_step_off_on_two_ranks_learns(base, tmp_path, stopped_afterwards):
    """On a device for the policy and one for the engine."""
    overrides = [
        f"logger.log_dir={tmp_path}/logs", f"checkpointing.checkpoint_dir={tmp_path}/checkpoints",
        "loss_fn.variant=cispo", "grpo.async_one_step_off=true", "loss_fn.use_importance_sampling_correction=true",
        "loss_fn.truncated_importance_sampling_ratio=2", "cluster.cpu_ranks_per_node=2",
        "policy.generation.colocated.enabled=false", "policy.generation.colocated.resources.gpus_per_node=1",
    ]  # fmt: skip
    train(load_config(RECIPE, [*base, *overrides]))
    metrics = logged(tmp_path)
    learned(metrics)
    # the second batch is drawn during the first update
    assert [m["gen_kl_error"] > 1e-5 for m in metrics] == [False] + [True] * 19


def test_learning_rate_zero_does_not_drift_and_a_limit_stops_the_run(begin, tmp_path):
    """Five steps leave engine and trainer as close as at the start; a limit below that ends the run, all logged."""
    said = "^1 is above grpo.max_token_mult_prob_error=0.5 for 5 steps in a row; engine and trainer"
    with pytest.raises(RunError, match=said):
        loop(begin("policy.optimizer.lr=0", "grpo.max_token_mult_prob_error=0.5", "grpo.gate_patience=5"))
    metrics = logged(tmp_path)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert all(m["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-5) for m in metrics)
    assert metrics[4]["gen_kl_error"] < 10 * metrics[0]["gen_kl_error"] + 1e-10


def test_gates_count_steps_in_a_row(quickstart_overrides):
    """A step without an update knows nothing of engine and trainer, and leaves that count as it is."""
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", quickstart_overrides).grpo
    bad, good = {"num_unverified": 30, "num_samples": 100}, {"num_unverified": 20, "num_samples": 100}
    exceeded = {}
    for metrics in (bad, bad, good, bad, bad):
        check_gates(cfg, metrics, exceeded)
    with pytest.raises(RunError, match=r"0.3 is above grpo.max_unverified_fraction=0.2 for 3 steps in a row"):
        check_gates(cfg, bad, exceeded)
    apart = good | {"token_mult_prob_error": 1.6}
    for metrics in (apart, good, apart, good):
        check_gates(cfg, metrics, exceeded)
    with pytest.raises(RunError, match=r"1.6 is above grpo.max_token_mult_prob_error=1.5 for 3 steps in a row"):
        check_gates(cfg, apart, exceeded)


def test_a_loss_that_is_not_finite_saves_the_answers(quickstart_overrides, tmp_path):
    from test_algorithm import answer

    log = Logger(load_config(ROOT / "recipes" / "quickstart.yaml", quickstart_overrides))
    log.start_step(7, 9)
    log.stop_if_not_finite({"loss": 0.1, "grad_norm": 2.0}, [answer()])
    with pytest.raises(RunError, match=r"gradient norm nan at step 7: not finite; .*failed_step_7.jsonl"):
        log.stop_if_not_finite({"loss": 0.1, "grad_norm": float("nan")}, [answer(), answer()])
    assert len((tmp_path / "logs" / "failed_step_7.jsonl").read_text().splitlines()) == 2
