"""Advantages, loss and packing against values worked out by hand or by another formulation. No Ray, no vLLM."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import GRPO, LossFn, RewardShaping
from model import pack
from reward_client import Sample
from train_grpo import combine_steps, group_advantages, groups_with_signal, grpo_loss, shaped_rewards


def advantages(rewards, groups=None, valid=None, leave_one_out=True, normalize=True):
    groups = [0] * len(rewards) if groups is None else groups
    return group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups),
        None if valid is None else torch.tensor(valid),
        leave_one_out=leave_one_out,
        normalize=normalize,
    ).tolist()


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    assert advantages([1, 0, 0, 0], normalize=False) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3], abs=1e-15)
    assert advantages([1, 0, 0, 0], leave_one_out=False, normalize=False) == [0.75, -0.25, -0.25, -0.25]
    # std of (1, 0, 0, 0) with Bessel is 0.5; of (1, 0, 0) it is 1/sqrt(3); of (0, 0, 0) it is 0: stays unscaled
    assert advantages([1, 0, 0, 0], leave_one_out=False) == pytest.approx(
        [0.75 / (0.5 + 1e-6)] + 3 * [-0.25 / (0.5 + 1e-6)]
    )
    other = (-1 / 3) / (1 / math.sqrt(3) + 1e-6)
    assert advantages([1, 0, 0, 0]) == pytest.approx([1, other, other, other])


def test_nearly_equal_rewards_do_not_explode():
    """E[x^2] - E[x]^2 in float32 makes -2075 of this one: the seven 0.95 have deviation 0."""
    got = advantages([0.0] + [0.95] * 7)
    rest = [0.0] + [0.95] * 6
    want = (0.95 - statistics.mean(rest)) / (statistics.stdev(rest) + 1e-6)
    assert got == pytest.approx([-0.95] + [want] * 7)


@pytest.mark.parametrize("rewards", [[1.0], [1.0, 1.0, 1.0], [0.1] * 7, [1e8] * 3, []])
def test_no_signal_is_exactly_zero(rewards):
    assert advantages(rewards) == [0.0] * len(rewards)


def test_groups_are_by_index_and_invalid_samples_do_not_count():
    rewards, groups = [1.0, 0.0, 5.0, 9.0, 3.0, 7.0], [4, 4, 2, 2, 4, 2]
    valid = [True, True, True, False, True, True]
    got = advantages(rewards, groups, valid, normalize=False)
    assert got == pytest.approx([1 - 1.5, 0 - 2, 5 - 7, 0, 3 - 0.5, 7 - 5])
    assert advantages([1.0, 0.0, 1.0], [0, 0, 1], [True, False, True]) == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_magnitude_of_rewards(scale):
    rest = [0.0, 3.0 * scale]
    want = (scale - 1.5 * scale) / (statistics.stdev(rest) + 1e-6)
    assert advantages([scale, *rest])[0] == pytest.approx(want, rel=1e-12)


groups_of_rewards = st.lists(st.floats(-10, 10), min_size=2, max_size=9)


@given(groups_of_rewards, st.booleans())
def test_advantages_sum_to_zero_without_leave_one_out(rewards, normalize):
    total = sum(advantages(rewards, leave_one_out=False, normalize=normalize))
    assert abs(total) < 1e-6 * max(1, len(rewards))


@given(groups_of_rewards, st.booleans(), st.randoms())
def test_advantages_follow_a_permutation(rewards, leave_one_out, random):
    order = list(range(len(rewards)))
    random.shuffle(order)
    straight = advantages(rewards, leave_one_out=leave_one_out)
    shuffled = advantages([rewards[i] for i in order], leave_one_out=leave_one_out)
    assert shuffled == pytest.approx([straight[i] for i in order], rel=1e-9, abs=1e-9)


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=9), st.integers(-64, 64), st.booleans())
def test_advantages_ignore_a_shift(rewards, shift, leave_one_out):
    """Integers, so that shifting them is exact."""
    moved = advantages([float(r + shift) for r in rewards], leave_one_out=leave_one_out)
    assert moved == pytest.approx(advantages([float(r) for r in rewards], leave_one_out=leave_one_out), abs=1e-9)


# ---------------------------------------------------------------- loss

CUR = [-1.0, -0.5, -2.0, -0.1, -3.0, -0.7]
OLD = [-1.2, -0.5, -1.5, -0.6, -3.0, -0.4]
GEN = [-1.1, -0.6, -1.5, -0.7, -3.0, -0.6]
REF = [-0.9, -0.8, -2.5, -0.1, -2.0, -1.0]
ADV = [1.5, 1.5, 1.5, -0.8, -0.8, -0.8]
MASK = [1, 1, 0, 1, 1, 1]
SEQ = [0, 0, 0, 1, 1, 1]


def run_loss(cfg, mask=MASK, old=OLD, ref=None, gen=GEN, cur=CUR, tokens=None, sequences=2, entropy=None):
    t = lambda x: None if x is None else torch.tensor(x, dtype=torch.float32)  # noqa: E731
    logprobs = t(cur).requires_grad_()
    tokens = sum(mask) if tokens is None else tokens
    loss, metrics = grpo_loss(
        logprobs, t(ADV), t(mask), rollout_logprobs_T=t(gen), old_logprobs_T=t(old), ref_logprobs_T=t(ref),
        entropy_T=entropy, sequence_T=torch.tensor(SEQ), cfg=cfg, num_valid_tokens=tokens,
        num_valid_sequences=sequences,
    )  # fmt: skip
    loss.backward()
    return loss.item(), logprobs.grad.tolist(), {k: v.item() for k, v in metrics.items()}


def by_hand(cfg, old=OLD, ref=None, mask=MASK):
    """The definition again, one token at a time in float64, with the gradient by the chain rule written out."""
    tokens, total = [i for i, m in enumerate(mask) if m], 0.0
    grad = [0.0] * len(CUR)
    old = CUR if old is None else old
    members = {s: [i for i in tokens if SEQ[i] == s] for s in set(SEQ)}
    for i in tokens:
        own = members[SEQ[i]]
        if cfg.variant == "dr_grpo":
            weight = 1 / (2 * cfg.dr_grpo_length)
        else:
            weight = 1 / len(tokens) if cfg.token_level_loss else 1 / (len(own) * 2)
        spread = own if cfg.variant == "gspo" else [i]
        ratio = math.exp(sum(CUR[j] - old[j] for j in spread) / len(spread))
        low, high = 1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max
        clipped = min(max(ratio, low), high)
        a, correction = ADV[i], 1.0
        if cfg.use_importance_sampling_correction:
            over = own if cfg.sequence_level_importance_ratios else [i]
            correction = math.exp(sum(old[j] - GEN[j] for j in over))
            least, most = (
                cfg.truncated_importance_sampling_ratio_min,
                cfg.truncated_importance_sampling_ratio or math.inf,
            )
            judged = correction
            if cfg.truncated_importance_sampling_type == "seq-mask-tis":
                judged = math.prod(math.exp(old[j] - GEN[j]) for j in own) ** (1 / len(own))
            if cfg.truncated_importance_sampling_type == "tis":
                correction = min(correction, most)
            elif not least <= judged <= most:
                correction = 0.0
        if cfg.variant == "cispo":
            value, slope = -a * clipped * CUR[i], {i: -a * clipped}
        elif cfg.variant == "dppo":
            moved = math.exp(CUR[i]) - math.exp(GEN[i])
            value = -a * ratio if (moved if a > 0 else -moved) <= cfg.dppo_divergence else 0.0
            slope = {i: value}
        else:
            value, active = max((-a * ratio, True), (-a * clipped, clipped == ratio), key=lambda p: p[0])
            if cfg.ratio_clip_c and a < 0 and value > -a * cfg.ratio_clip_c:
                value, active = -a * cfg.ratio_clip_c, False
            slope = {j: -a * ratio / len(spread) if active else 0.0 for j in spread}
        total += weight * correction * value
        for j, s in slope.items():
            grad[j] += weight * correction * s
        if ref is not None:
            x = ref[i] - CUR[i]
            total += cfg.reference_policy_kl_penalty * weight * (math.exp(x) - 1 - x)
            grad[i] += cfg.reference_policy_kl_penalty * weight * (1 - math.exp(x))
    return total, grad


BOUNDED = {
    "use_importance_sampling_correction": True,
    "truncated_importance_sampling_ratio_min": 0.95,
    "truncated_importance_sampling_ratio": 1.05,
}
SETTINGS = [
    {},
    {"token_level_loss": False},
    {"ratio_clip_min": 0.1, "ratio_clip_max": 0.5},
    {"ratio_clip_c": 1.3},
    {"use_importance_sampling_correction": True},
    {"use_importance_sampling_correction": True, "truncated_importance_sampling_ratio": 1.05},
    {"use_importance_sampling_correction": True, "sequence_level_importance_ratios": True},
    {**BOUNDED, "truncated_importance_sampling_type": "icepop"},
    {**BOUNDED, "truncated_importance_sampling_type": "seq-mask-tis"},
]


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "cispo", "gspo", "dppo"])
@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: ",".join(o) or "plain")
@pytest.mark.parametrize("extras", ["old", "on-policy", "kl"])
def test_loss_and_gradient_by_hand(variant, options, extras):
    cfg = LossFn(variant=variant, dr_grpo_length=7.0, dppo_divergence=0.01, reference_policy_kl_penalty=0.3, **options)
    kwargs = {"old": None if extras == "on-policy" else OLD, "ref": REF if extras == "kl" else None}
    loss, grad, _ = run_loss(cfg, **kwargs)
    want_loss, want_grad = by_hand(cfg, **kwargs)
    assert loss == pytest.approx(want_loss, rel=1e-5, abs=1e-6)
    assert grad == pytest.approx(want_grad, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("token_level", [True, False])
def test_the_entropy_bonus_by_hand(token_level):
    """Each unmasked token's entropy counts as much as its surrogate, and has that as its gradient."""
    entropy = [0.5, 2.0, math.nan, 1.0, 0.25, 3.0]
    plain, _, _ = run_loss(LossFn(token_level_loss=token_level))
    cfg = LossFn(token_level_loss=token_level, entropy_coef=0.1)
    entropy_T = torch.tensor(entropy, requires_grad=True)
    loss, _, metrics = run_loss(cfg, entropy=entropy_T)
    weight = [1 / 5] * 6 if token_level else [1 / 4] * 3 + [1 / 6] * 3
    bonus = [0.1 * w if keep else 0.0 for w, keep in zip(weight, MASK, strict=True)]
    assert loss == pytest.approx(plain - sum(b * e for b, e in zip(bonus, entropy, strict=True) if b), rel=1e-6)
    assert entropy_T.grad.tolist() == pytest.approx([-b for b in bonus], rel=1e-6)
    assert metrics["entropy"] == pytest.approx((0.5 + 2.0 + 1.0 + 0.25 + 3.0) / 5, rel=1e-6)


def test_masked_tokens_may_hold_anything():
    clean = run_loss(LossFn(), ref=REF)
    dirty_cur, dirty_gen = list(CUR), list(GEN)
    dirty_cur[2], dirty_gen[2] = float("-inf"), float("nan")
    dirty = run_loss(LossFn(), ref=REF, cur=dirty_cur, gen=dirty_gen)
    assert dirty[0] == clean[0]
    assert dirty[1] == clean[1]
    assert dirty[2] == clean[2]


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "cispo", "gspo"])
@pytest.mark.parametrize("token_level", [True, False])
def test_all_masked_is_zero_without_nan(variant, token_level):
    cfg = LossFn(variant=variant, token_level_loss=token_level, use_importance_sampling_correction=True)
    loss, grad, metrics = run_loss(cfg, mask=[0] * 6, ref=REF, tokens=0, sequences=0)
    assert loss == 0
    assert grad == [0] * 6
    assert all(math.isfinite(v) for v in metrics.values())


def test_kl_log_ratio_and_value_are_clamped():
    cfg = LossFn(reference_policy_kl_penalty=1.0)
    one = [1, 0, 0, 0, 0, 0]
    for ref, want in ((50.0, 10.0), (-50.0, 10.0)):  # exp(20) - 21 and 20 - 1 + exp(-20) are both above 10
        _, _, metrics = run_loss(cfg, mask=one, ref=[ref] + REF[1:])
        assert metrics["kl_penalty"] == want


def test_metrics_by_hand():
    _, _, m = run_loss(LossFn(), ref=REF)
    on = [i for i, keep in enumerate(MASK) if keep]
    mean = lambda f: sum(f(i) for i in on) / len(on)  # noqa: E731
    ratio = lambda i: math.exp(CUR[i] - OLD[i])  # noqa: E731
    gap = lambda i: OLD[i] - GEN[i]  # noqa: E731
    want = {
        "approx_entropy": mean(lambda i: -CUR[i]),
        "probs_ratio": mean(ratio),
        "probs_ratio_clamped": mean(lambda i: min(max(ratio(i), 0.8), 1.2)),
        "clipfrac": mean(lambda i: float(not 0.8 <= ratio(i) <= 1.2)),
        "kl_penalty": mean(lambda i: math.exp(REF[i] - CUR[i]) - 1 - (REF[i] - CUR[i])),
        "token_mult_prob_error": mean(lambda i: math.exp(abs(gap(i)))),
        "gen_kl_error": mean(lambda i: math.exp(gap(i)) - 1 - gap(i)),
        "sampling_importance_ratio": mean(lambda i: math.exp(gap(i))),
        "trained_token_fraction": 1.0,
        "probs_ratio_max": max(ratio(i) for i in on),
        "probs_ratio_min": min(1.0, *(ratio(i) for i in on)),
    }
    assert {k: m[k] for k in want} == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "cispo", "gspo"])
def test_parts_of_a_batch_add_up(variant, token_level):
    """Two micro-batches with global counts give the whole batch's loss, gradient and metrics."""
    cfg = LossFn(variant=variant, token_level_loss=token_level)
    whole = run_loss(cfg, ref=REF)
    parts = [
        run_loss(cfg, ref=REF, mask=[m * (s == k) for m, s in zip(MASK, SEQ, strict=True)], tokens=5) for k in (0, 1)
    ]
    # the parts are of size 1 with opposite signs: what is left has the rounding of those, a few float32 steps of 6e-8
    assert sum(p[0] for p in parts) == pytest.approx(whole[0], rel=1e-6, abs=3e-7)
    assert [a + b for a, b in zip(parts[0][1], parts[1][1], strict=True)] == pytest.approx(whole[1], rel=1e-6)
    for name, value in whole[2].items():
        if not name.endswith(("_min", "_max")):
            assert sum(p[2][name] for p in parts) == pytest.approx(value, rel=1e-5, abs=1e-8), name


# ---------------------------------------------------------------- rewards and groups


def answer(prompt=0, reward=0.0, status="correct", length=4):
    tokens = np.zeros(length, dtype=np.int64)
    return Sample(prompt, tokens, tokens, tokens.astype(np.float32), False, "", reward, status)


def test_overlong_penalty_grows_over_the_buffer():
    """DAPO: nothing up to 16 tokens, then linear to the full penalty at 20, and no more than that."""
    g = GRPO(
        reward_shaping=RewardShaping(
            True, overlong_buffer_length=4, overlong_buffer_penalty=2.0, max_response_length=20
        )
    )
    lengths = (1, 16, 17, 19, 20, 500)
    assert shaped_rewards([answer(reward=1.0, length=n) for n in lengths], g).tolist() == [
        1.0,
        1.0,
        0.5,
        -0.5,
        -1.0,
        -1.0,
    ]
    assert shaped_rewards([answer(reward=1.0, length=n) for n in lengths], GRPO()).tolist() == [1.0] * 6


def test_groups_with_signal_are_whole_groups_of_verified_answers():
    samples = [answer(0, 1.0), answer(0, 0.0, "wrong"), answer(1, 1.0), answer(1, 1.0)]
    samples += [answer(2, 1.0), answer(2, 0.0, "timeout"), answer(3, 0.0, "unreachable")]
    assert groups_with_signal(samples) == {0}


def test_metrics_of_several_optimizer_steps():
    """Token means weigh by trained tokens, also those of a metric that somebody adds; extrema are extrema; what an
    optimizer step has once is a plain mean."""
    steps = [
        {"loss": 1.0, "mine": 0.3, "x_max": 1.0, "x_min": 1.0, "trained_token_fraction": 0.5},
        {"loss": 3.0, "mine": 0.6, "x_max": 2.0, "x_min": -1.0, "trained_token_fraction": 1.0},
    ]
    got = combine_steps(steps, [20.0, 30.0])
    # sums over tokens: 0.3 of 20 valid ones is 6, 0.6 of 30 is 18; trained were 10 and 30
    assert got["mine"] == pytest.approx((0.3 * 20 + 0.6 * 30) / 40)
    assert got["trained_token_fraction"] == pytest.approx(40 / 50)
    assert (got["loss"], got["x_max"], got["x_min"]) == (2.0, 2.0, -1.0)
    assert combine_steps([], []) == {}


# ---------------------------------------------------------------- packing


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120), st.integers(1, 4))
def test_packing(lengths, budget, ranks):
    """Every sequence once, no micro-batch over budget, as many on each rank."""
    packed = pack(lengths, budget, ranks)
    assert len(packed) == ranks
    assert len({len(p) for p in packed}) == 1
    flat = [i for rank in packed for micro_batch in rank for i in micro_batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in mb) <= budget for rank in packed for mb in rank)


def test_packing_balances_and_gives_an_oversized_sequence_its_own_micro_batch():
    packed = pack([8, 8, 8, 8, 4, 4, 4, 4], 100, 2)
    assert [sum([8, 8, 8, 8, 4, 4, 4, 4][i] for i in rank[0]) for rank in packed] == [24, 24]
    assert sorted(map(len, pack([1000, 3, 3], 10, 1)[0])) == [1, 2]
