"""The update on real ranks: packed equals plain, two ranks equal one (FSDP2, tensor parallel), only answers train."""

import functools
import math
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing as mp
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import model
import policy
import train_grpo
from config import load_config
from model import MicroBatch, Sequences
from policy import PolicyWorker, clip_gradients, join_ranks
from refit import full
from reward_client import Sample
from train_grpo import grpo_loss, update_policy

pytestmark = pytest.mark.slow


def random_batch(count: int, seed: int = 0) -> Sequences:
    """Random answers, up to three to a prompt."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 200, rng.integers(1, 9)) for _ in range(count)]
    prompts = [prompts[i // 3] for i in range(count)]
    responses = [rng.integers(3, 200, rng.integers(1, 12)) for _ in range(count)]
    return Sequences(
        prompt_ids=prompts,
        response_ids=responses,
        per_token={
            "rollout_logprobs_T": [rng.normal(-3, 1, len(r)) for r in responses],
            "mask_T": [(rng.random(len(r)) < 0.8).astype(float) for r in responses],
        },
        per_sequence={"advantages_T": rng.normal(0, 1, count)},
    )


def counts(batch: Sequences) -> dict[str, float]:
    masks = batch.per_token["mask_T"]
    return {
        "num_valid_tokens": float(sum(m.sum() for m in masks)),
        "num_valid_sequences": float(sum(m.any() for m in masks)),
    }


STORES = []  # kept, so that each serves its address


def free_address() -> str:
    STORES.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    return f"127.0.0.1:{STORES[-1].port}"


def whole(weight):
    return full(weight, torch.device("cpu"), torch.float32)


def full_weights(worker: PolicyWorker):
    return ((name, whole(p)) for name, p in worker.offered.items())


def rank_main(rank, world_size, address, cfg, batch, steps, folder):
    """One rank: `steps` updates; rank 0 reports metrics, weights, and all ranks' log-probabilities of their share."""
    torch.set_num_threads(1)
    worker = PolicyWorker(cfg.policy, rank, world_size, "cpu", timeout_s=120, keep_reference=True)
    worker.setup(address)
    kwargs = {"cfg": cfg.loss_fn, **counts(batch)}
    with_entropy = cfg.loss_fn.entropy_coef > 0
    metrics = [worker.update(batch, grpo_loss, kwargs, with_entropy=with_entropy) for _ in range(steps)]
    weights_of = {name: tensor.detach().clone() for name, tensor in full_weights(worker)}
    weights = {name: tensor.numpy() for name, tensor in weights_of.items()}
    for index, bucket in enumerate(worker.buckets):
        whole = torch.cat([weights_of[name].reshape(-1) for name, _ in bucket])
        assert torch.equal(worker.flat_bucket(index), whole), f"bucket {index} of rank {rank} is not the weights"
    after, reference = worker.logprobs(batch), worker.logprobs(batch, reference=True)
    torch.save((metrics, weights if rank == 0 else None, after, reference), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def spawn(function, arguments, world_size):
    """Ranks as processes, forked from one that has imported torch, which takes seconds."""
    mp.get_context("forkserver").set_forkserver_preload(["policy", "train_grpo"])
    ranks = mp.start_processes(function, arguments, world_size, join=False, start_method="forkserver")
    deadline = time.monotonic() + 400
    while not ranks.join(timeout=1):  # raises what a rank raised
        assert time.monotonic() < deadline, "the ranks did not finish"


def run_ranks(cfg, batch, world_size=1, steps=2):
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, free_address(), cfg, batch, steps, folder)
        if world_size == 1:  # no other process to wait for: torch takes seconds to import
            rank_main(0, *arguments)
        else:
            spawn(rank_main, arguments, world_size)
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]
    merged = [functools.reduce(lambda a, b: a | b, (f[i] for f in found)) for i in (2, 3)]
    return found[0][0], found[0][1], *([m[i] for i in range(len(batch))] for m in merged)


@pytest.fixture(scope="module")
def config(arithmetic_rows, tiny_model):
    def load(*overrides):
        base = ["policy.optimizer.lr=0.01", "policy.optimizer.eps=1e-3", "policy.max_grad_norm=0.05"]
        base += [f"policy.model_name={tiny_model}", f"data.train_jsonl_fpath={arithmetic_rows}/train.jsonl"]
        return load_config(ROOT / "recipes" / "quickstart.yaml", [*base, *overrides])

    return load


def close(a, b, tolerance=2e-5):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=tolerance, rtol=1e-4, err_msg=name)


PACKED = ["policy.sequence_packing.train_mb_tokens=64"]
BONUS = "loss_fn.entropy_coef=0.01"
SETTINGS = {
    "one sequence each": (1, ["policy.sequence_packing.enabled=false"]),
    "all in one": (1, ["policy.sequence_packing.train_mb_tokens=1024"]),
    "checkpointing": (1, [*PACKED, "policy.dtensor_cfg.activation_checkpointing=true"]),
    "2 ranks": (2, PACKED),
    "3 ranks, resharding": (3, [*PACKED, "policy.dtensor_cfg.reshard_after_forward=true"]),  # uneven shards
    "tensor parallel": (2, [*PACKED, "cluster.cpu_ranks_per_node=2", "policy.dtensor_cfg.tensor_parallel_size=2"]),
    "2 x tensor parallel": (4, [*PACKED, "cluster.cpu_ranks_per_node=4", "policy.dtensor_cfg.tensor_parallel_size=2"]),
}


@functools.cache
def one_rank_result(load, count: int):
    return run_ranks(load(*PACKED, BONUS), random_batch(count))


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_way_to_split_a_batch_gives_the_same_update(config, setting):
    """Against one rank with packs of 64 tokens: metrics of two steps, clipped gradients and weights, to rounding."""
    batch = random_batch(12)
    metrics, weights, after, reference = one_rank_result(config, 12)
    ranks, overrides = SETTINGS[setting]
    other_metrics, other_weights, other_after, other_reference = run_ranks(config(*overrides, BONUS), batch, ranks)
    close(weights, other_weights)
    for mine, other in zip(metrics, other_metrics, strict=True):
        assert mine["grad_norm"] > 0.05  # clipping was active
        for name in mine.keys() - {"micro_batches"}:
            assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5), name
    for a, b, start in zip(after, other_after, reference, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
        assert np.abs(a - start).max() > 1e-2  # the weights moved, and the reference did not move with them
    for a, b in zip(reference, other_reference, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_fewer_sequences_than_ranks(config):
    """A rank without a sequence takes part in the collectives and adds nothing."""
    batch = random_batch(1)
    metrics, weights, *_ = run_ranks(config(), batch)
    other_metrics, other_weights, *_ = run_ranks(config(), batch, world_size=2)
    close(weights, other_weights)
    assert other_metrics[0]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_one_step_against_plain_autograd(config, tiny_model, entropy_coef):
    """Loss, gradient norm and AdamW step recomputed with Hugging Face's plain forward pass, sequence by sequence."""
    from transformers import AutoModelForCausalLM

    cfg = config("policy.max_grad_norm=1e9", f"loss_fn.entropy_coef={entropy_coef}")
    batch = random_batch(5)
    n = counts(batch)["num_valid_tokens"]
    metrics, weights, *_ = run_ranks(cfg, batch, steps=1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    o = cfg.policy.optimizer
    optimizer = torch.optim.AdamW(plain.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    total = 0.0
    for i in range(len(batch)):
        prompt, response = batch.prompt_ids[i], batch.response_ids[i]
        ids = torch.tensor(np.concatenate([prompt, response]))[None]
        logprobs = plain(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        picked = logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]
        mask = torch.tensor(batch.per_token["mask_T"][i])
        gain = batch.per_sequence["advantages_T"][i] * (picked - picked.detach()).exp()
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        total = total - (mask * (gain + entropy_coef * entropy)).sum() / n
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    optimizer.step()
    assert metrics[0]["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert metrics[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    close(weights, {name: p.detach().numpy() for name, p in plain.named_parameters()})


class Run:
    """What `train_grpo.update_policy` needs of a run: the configuration, a real rank, no profile, no known peaks."""

    def __init__(self, cfg):
        self.cfg, self.policy = cfg, PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
        self.policy.setup(free_address())
        self.log = SimpleNamespace(trace_file=lambda part: None, stop_if_not_finite=lambda metrics, samples: None)
        self.limits = SimpleNamespace(training=lambda prompt, prompts, responses: {})


@pytest.fixture
def start_run(config):
    def start(*overrides):
        return Run(config(*overrides))

    yield start
    torch.distributed.destroy_process_group()


def sample(prompt: int, prompt_ids: list[int], response_ids: list[int], truncated: bool, reward: float) -> Sample:
    zeros = np.zeros(len(response_ids), dtype=np.float32)
    return Sample(prompt, np.array(prompt_ids), np.array(response_ids), zeros, truncated, "", reward, "correct")


def test_the_end_token_is_trained_on_where_the_model_stopped(start_run, tiny_model, tmp_path):
    """In a model that pads with its end token, whose prompts hold that token too: exactly the answers are trained on,
    with the end where the model put one, and with nothing in its place where the answer was cut off."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    end = tokenizer.eos_token_id
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain.config.pad_token_id = plain.generation_config.pad_token_id = end
    plain.save_pretrained(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    run = start_run(f"policy.model_name={tmp_path}", "policy.max_grad_norm=1e9", "policy.optimizer.lr=0")
    samples = [sample(0, [7, end, 8, end], [40, end, 41, end], False, 1.0), sample(0, [9], [40, 41, 42], True, 0.0)]
    metrics = update_policy(run, samples, torch.tensor([1.0, -0.5]))
    total = entropy = 0.0
    for s, advantage in zip(samples, [1.0, -0.5], strict=True):
        prompt, response = s.prompt_ids.tolist(), s.response_ids.tolist()
        logprobs = plain(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        picked = torch.stack([logprobs[len(prompt) + i - 1, token] for i, token in enumerate(response)])
        total = total - advantage * (picked - picked.detach()).exp().sum() / 7
        entropy -= picked.sum().item() / 7
    total.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in plain.parameters()]))
    assert metrics["approx_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["loss"] == pytest.approx(-(4 * 1.0 - 3 * 0.5) / 7, rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_nonfinite_engine_logprobs_are_masked_and_counted(start_run):
    """Two of seven tokens have none: the others are a batch of five."""
    run = start_run("policy.optimizer.lr=0")
    samples = [sample(0, [7], [40, 41, 42, 43], False, 1.0), sample(0, [9], [40, 41, 42], False, 0.0)]
    samples[0].rollout_logprobs[1] = np.nan
    samples[1].rollout_logprobs[2] = -np.inf
    metrics = update_policy(run, samples, torch.tensor([1.0, -0.5]))
    assert metrics["num_nonfinite_logprobs"] == 2
    assert metrics["loss"] == pytest.approx(-(3 * 1.0 - 2 * 0.5) / 5, rel=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())


def test_what_the_environment_said_is_not_trained_on(start_run):
    """Two of seven tokens are not the model's own: the others are a batch of five."""
    run = start_run("policy.optimizer.lr=0")
    samples = [sample(0, [7], [40, 41, 42, 43], False, 1.0), sample(0, [9], [40, 41, 42], False, 0.0)]
    samples[0].mask = np.array([True, False, False, True])
    metrics = update_policy(run, samples, torch.tensor([1.0, -0.5]))
    assert metrics["num_nonfinite_logprobs"] == 0
    assert metrics["loss"] == pytest.approx(-(2 * 1.0 - 3 * 0.5) / 5, rel=1e-6)


def test_an_answer_that_was_not_verified_is_not_counted(start_run):
    """Of three answers weighed alike two count: the mean is over those."""
    run = start_run("policy.optimizer.lr=0", "loss_fn.token_level_loss=false")
    samples = [sample(0, [7], ids, False, 1.0) for ids in ([40, 41, 42, 43], [40, 41, 42], [44, 45])]
    samples[2].status = "timeout"
    assert not samples[2].verified
    metrics = update_policy(run, samples, torch.tensor([1.0, -0.5, 0.0]))
    assert metrics["loss"] == pytest.approx(-(1.0 - 0.5) / 2, rel=1e-6)


def test_answers_without_advantage_cost_nothing_and_change_nothing(start_run, monkeypatch):
    """Half of a batch has advantage 0: the same loss and gradient as with everything run through the model, half of
    the tokens trained, and means over those."""
    skipping = start_run()
    rng = np.random.default_rng(0)
    samples = [sample(i // 2, rng.integers(3, 200, 5), rng.integers(3, 200, 4), False, 0.0) for i in range(8)]
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, -0.5, 0.0, 0.0])
    skipped = update_policy(skipping, samples, advantages)
    torch.distributed.destroy_process_group()
    monkeypatch.setattr(train_grpo, "LOSS_NEEDS_ALL_SAMPLES", True)
    whole = update_policy(start_run(), samples, advantages)
    assert skipped["trained_token_fraction"] == pytest.approx(0.5)
    assert whole["trained_token_fraction"] == pytest.approx(1.0)
    for name in ("loss", "grad_norm"):
        assert skipped[name] == pytest.approx(whole[name], rel=1e-5), name
    assert skipped["probs_ratio"] == pytest.approx(1.0)


def test_an_entropy_bonus_makes_samples_more_different(start_run):
    """Also those without advantage: here no sample has one, and without the bonus nothing would be trained."""
    run = start_run("loss_fn.entropy_coef=0.5", "policy.optimizer.lr=0.01")
    rng = np.random.default_rng(0)
    samples = [sample(i // 2, rng.integers(3, 200, 5), rng.integers(3, 200, 4), False, 0.0) for i in range(4)]
    found = [update_policy(run, samples, torch.zeros(4)) for _ in range(4)]
    assert found[0]["loss"] == pytest.approx(-0.5 * found[0]["entropy"], rel=1e-6)
    assert [m["entropy"] for m in found] == sorted(m["entropy"] for m in found)
    assert found[-1]["entropy"] > found[0]["entropy"] + 0.01


def test_ratios_of_a_second_optimizer_step_are_against_the_weights_before_the_first(start_run):
    """As if every answer's old log-probabilities had been computed up front."""
    rng = np.random.default_rng(0)
    samples = [sample(i // 2, rng.integers(3, 200, 5), rng.integers(3, 200, 4), False, 0.0) for i in range(4)]
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    run = start_run("policy.train_global_batch_size=2")
    run.policy.logprobs = functools.partial(ordered_logprobs, run.policy)
    metrics = update_policy(run, samples, advantages)
    weights = {name: w.clone() for name, w in full_weights(run.policy)}
    torch.distributed.destroy_process_group()
    again = start_run()
    batch = Sequences(
        [s.prompt_ids for s in samples],
        [s.response_ids for s in samples],
        {"rollout_logprobs_T": [s.rollout_logprobs for s in samples], "mask_T": [np.ones(4)] * 4},
        {"advantages_T": advantages.numpy()},
    )
    batch.per_token["old_logprobs_T"] = ordered_logprobs(again.policy, batch)
    kwargs = {"cfg": again.cfg.loss_fn, "num_valid_tokens": 8.0, "num_valid_sequences": 2.0}
    steps = [again.policy.update(batch.take(part), grpo_loss, kwargs) for part in ([0, 1], [2, 3])]
    assert metrics["num_optimizer_steps"] == 2
    assert metrics["probs_ratio_max"] == pytest.approx(steps[1]["probs_ratio_max"], rel=1e-5)
    assert steps[1]["probs_ratio_max"] > 1.01  # the first step did move it
    close(weights, dict(full_weights(again.policy)), 1e-6)


def ordered_logprobs(worker: PolicyWorker, batch: Sequences, reference: bool = False) -> list[np.ndarray]:
    found = PolicyWorker.logprobs(worker, batch, reference)
    return [found[i] for i in range(len(batch))]


def test_learning_rate_warms_up(config):
    cfg = config("policy.scheduler.warmup_steps=4")
    metrics, *_ = run_ranks(cfg, random_batch(2), steps=6)
    assert [m["lr"] for m in metrics] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_a_gradient_that_is_not_finite_changes_nothing(start_run):
    run = start_run()
    worker, batch = run.policy, random_batch(3)
    batch.per_sequence["advantages_T"][1] = np.inf
    batch.per_token["mask_T"][1][:] = 1
    before = [w.clone() for w in worker.local_weights()]
    metrics = worker.update(batch, grpo_loss, {"cfg": run.cfg.loss_fn, **counts(batch)})
    assert not np.isfinite(metrics["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, worker.local_weights(), strict=True))
    assert worker.steps_done == 0


def test_gradients_are_clipped_together_and_warming_up_leaves_nothing_behind(config):
    """All gradients are scaled by one factor where their common norm is above the limit, and by nothing below it or
    without a limit."""
    cfg = config()
    worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        params, weights = list(worker.model.parameters()), [whole(p).clone() for p in worker.model.parameters()]
        worker.warm_up(tokens=24)
        assert all(p.grad is None and torch.equal(whole(p), w) for p, w in zip(params, weights, strict=True))
        torch.manual_seed(0)
        for p in params:
            p.grad = torch.randn_like(p)
        before = [whole(p.grad).clone() for p in params]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in before))
        for limit in (2 * norm, None):
            assert clip_gradients(params, limit).item() == pytest.approx(norm, rel=1e-6)
            assert all(torch.equal(whole(p.grad), g) for p, g in zip(params, before, strict=True))
        clip_gradients(params, norm / 4)
        for p, g in zip(params, before, strict=True):
            torch.testing.assert_close(whole(p.grad), g / 4, rtol=1e-5, atol=0)
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_are_the_same_to_the_bit_whichever_thread_is_first(config):
    """The state that predicts the first token of 300 responses gets 300 gradients."""
    cfg, count = config("policy.sequence_packing.train_mb_tokens=4096"), 300
    worker, threads = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60), torch.get_num_threads()
    worker.setup(free_address())
    ids, zeros = [np.array([3 + i % 190, 4]) for i in range(count)], [np.zeros(2)] * count
    tokens = {"rollout_logprobs_T": zeros, "mask_T": [np.ones(2)] * count}
    batch = Sequences([np.array([5, 6])] * count, ids, tokens, {"advantages_T": np.resize([1.0, -0.5], count)})
    found = []
    try:
        torch.set_num_threads(4)
        for _ in range(5):
            worker._gradients([batch], grpo_loss, {"cfg": cfg.loss_fn, **counts(batch)})
            found.append([w.grad.to_local().clone() for w in worker.weights])
            worker._drop_gradients()
    finally:
        torch.set_num_threads(threads)
        torch.distributed.destroy_process_group()
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_float16_gradients_neither_vanish_nor_overflow(config):
    """The loss is scaled up for float16, by less where that overflows; norm and step are those of float32."""

    def step(precision: str, scale: float | None = None) -> tuple[float, float, torch.Tensor]:
        """Gradient norm, loss scale afterwards, and by how much the weights changed."""
        cfg = config(f"policy.precision={precision}")
        worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
        worker.setup(free_address())
        try:
            worker.loss_scale = scale or worker.loss_scale
            before = torch.cat([w.flatten() for w in worker.local_weights()])
            batch = random_batch(6)
            many = {name: 1e6 * count for name, count in counts(batch).items()}  # as of a part of a huge batch
            norm = worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **many})["grad_norm"]
            assert worker.steps_done == 1
            after = torch.cat([w.flatten() for w in worker.local_weights()])
            return norm, worker.loss_scale, after.double() - before.double()
        finally:
            torch.distributed.destroy_process_group()

    norm, scale, change = step("float32")
    assert scale == 1
    assert step("float16", 1.0)[0] < 0.9 * norm  # without a scale much of it is lost
    for start, most in ((None, 2.0**16), (2.0**60, 2.0**50)):
        found, scale, half_change = step("float16", start)
        assert found == pytest.approx(norm, rel=2e-3)
        assert 1 < scale <= most
        assert (half_change - change).norm() < 0.02 * change.norm()


def test_the_loss_scale_rises_again(config, monkeypatch):
    """After two steps without an overflow, here, and each step says what it was."""
    monkeypatch.setattr(policy, "SCALE_STEPS", 2)
    cfg = config("policy.precision=float16")
    worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        worker.loss_scale = 16.0  # where one outlier had left it
        batch = random_batch(3)
        steps = [worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts(batch)}) for _ in range(5)]
        assert [s["loss_scale"] for s in steps] == [16, 16, 32, 32, 64]
    finally:
        torch.distributed.destroy_process_group()


def test_float16_weights_that_are_no_numbers_end_the_step(config):
    """A loss that is not finite is no matter of scale: no retries, and the weights stay."""
    cfg = config("policy.precision=float16")
    worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        with torch.no_grad():
            next(worker.model.parameters()).fill_(math.nan)
        batch = random_batch(2)
        metrics = worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts(batch)})
        assert math.isnan(metrics["loss"]) and worker.loss_scale == 2.0**16 and worker.steps_done == 0
    finally:
        torch.distributed.destroy_process_group()


def test_saved_folder_is_plain_hugging_face(config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = config()
    worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        batch = random_batch(3)
        worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts(batch)})
        (tmp_path / "saved").mkdir()
        worker.save(str(tmp_path / "saved"), lambda: None)
        assert worker.wait_saved()[0] is None
        weights = {name: t.detach().clone() for name, t in full_weights(worker)}
    finally:
        torch.distributed.destroy_process_group()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.tie_word_embeddings
    for name, p in loaded.named_parameters():
        assert torch.equal(p, weights[name]), name
    assert loaded.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id


def test_dropout_is_off_and_sampling_settings_are_saved(config, tiny_model, tmp_path):
    """Seed-OSS has dropout as numbers of its layers; its generation settings here have a temperature alone."""
    from transformers import AutoTokenizer, GenerationConfig, SeedOssConfig, SeedOssForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256}
    SeedOssForCausalLM(SeedOssConfig(**shape, attention_dropout=0.3, residual_dropout=0.3)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 2}')
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    worker = PolicyWorker(config(f"policy.model_name={tmp_path}").policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        once, again = (worker.logprobs(random_batch(3)) for _ in range(2))
        assert all(np.array_equal(once[i], again[i]) for i in once)
        (tmp_path / "saved").mkdir()
        worker.save(str(tmp_path / "saved"), lambda: None)
        assert worker.wait_saved()[0] is None
    finally:
        torch.distributed.destroy_process_group()
    assert GenerationConfig.from_pretrained(tmp_path / "saved").temperature == 0.6


def test_loaded_moments_arrive_where_the_optimizer_has_them(config, tmp_path):
    """Also those of a policy that has not been updated yet, whose count of steps must be 0."""
    cfg = config()
    worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        for steps in range(2):
            (tmp_path / str(steps)).mkdir()
            worker.save(str(tmp_path / str(steps)), lambda: None)
            assert worker.wait_saved()[0] is None
            batch = random_batch(3)
            worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts(batch)})
        state = [worker.optimizer.state[shard] for shard in worker.shards]
        for steps, some in ((1, True), (0, False)):
            worker.load(f"{tmp_path}/{steps}/training_state")
            assert worker.steps_done == steps and all(s["step"] == steps for s in state)
            assert any(s["exp_avg"].any() for s in state) == some
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_head_against_float64_autograd(monkeypatch, temperature, fused, keep):
    """Values and both gradients over several chunks, the last one short; also with the functions that a GPU fuses."""
    monkeypatch.setattr(model, "HEAD_CHUNK", 5)
    if fused:
        monkeypatch.setattr(model, "chunk_logprobs", model.fused(model.chunk_logprobs))
        monkeypatch.setattr(model, "chunk_gradient", model.fused(model.chunk_gradient))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(13, 8, generator=generator), torch.randn(50, 8, generator=generator)]
    target, weights = torch.randint(0, 50, (13,), generator=generator), torch.randn(13, generator=generator)
    mine = [x.clone().requires_grad_() for x in inputs]
    plain = [x.double().requires_grad_() for x in inputs]
    heads = []
    product = model.TokenLogprobs.logits
    monkeypatch.setattr(model.TokenLogprobs, "logits", lambda *x: (heads.append(1), product(*x))[1])
    found = model.TokenLogprobs.apply(*mine, target, temperature, keep)
    wanted = (plain[0] @ plain[1].t() / temperature).log_softmax(-1)[torch.arange(13), target]
    (found * weights).sum().backward()
    assert len(heads) == (3 if keep else 6)  # once a chunk, or again in the backward pass
    (wanted * weights.double()).sum().backward()
    np.testing.assert_allclose(found.detach(), wanted.detach(), atol=5e-6)
    for a, b in zip(mine, plain, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, atol=5e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_against_float64_autograd(monkeypatch, temperature):
    """Values and both gradients over several chunks, the last one short."""
    monkeypatch.setattr(model, "HEAD_CHUNK", 5)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(13, 8, generator=generator), torch.randn(50, 8, generator=generator)]
    weights = torch.randn(13, generator=generator)
    mine = [x.clone().requires_grad_() for x in inputs]
    plain = [x.double().requires_grad_() for x in inputs]
    found = model.token_entropy(*mine, temperature)
    wanted = torch.distributions.Categorical(logits=plain[0] @ plain[1].t() / temperature).entropy()
    (found * weights).sum().backward()
    (wanted * weights.double()).sum().backward()
    np.testing.assert_allclose(found.detach(), wanted.detach(), atol=5e-6)
    for a, b in zip(mine, plain, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, atol=5e-6)


@pytest.mark.parametrize("keep", [False, True])
def test_the_fused_head_compiles_once(monkeypatch, keep):
    """Whatever the number of tokens and chunks, an only token apart: a step that compiled took two seconds longer."""
    monkeypatch.setattr(model, "HEAD_CHUNK", 8)
    monkeypatch.setattr(model, "chunk_logprobs", model.fused(model.chunk_logprobs))
    monkeypatch.setattr(model, "chunk_gradient", model.fused(model.chunk_gradient))
    torch.compiler.reset()
    for tokens in (5, 7, 8, 9, 13, 16, 17, 40):
        hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            model.TokenLogprobs.apply(hidden, weight, torch.randint(0, 30, (tokens,)), 1.0, keep).sum().backward()


def test_gradient_of_a_near_certain_token_survives_bfloat16():
    """1 - p for p = 0.9999 is a tenth of a bfloat16 step below 1: the subtraction must come before the rounding."""
    logits = torch.tensor([[math.log(0.9999), math.log(0.0001)]])
    found = model.chunk_gradient(logits, torch.tensor([0]), torch.zeros(1), 1.0, torch.bfloat16)
    np.testing.assert_allclose(found.float(), [[-1e-4, 1e-4]], rtol=1 / 128)


def test_micro_batch_by_hand():
    """Two answers to [5, 6] share it. Prompt tokens before the last and last answer tokens predict nothing; every
    answer token, EOS too, is predicted once, the first ones from the end of their prompt."""
    batch = Sequences(
        prompt_ids=[np.array([5, 6]), np.array([5, 6]), np.array([7])],
        response_ids=[np.array([8, 2]), np.array([4]), np.array([9, 9, 2])],
        per_token={"mask_T": [np.array([1, 0]), np.array([1]), np.array([1, 1, 1])]},
        per_sequence={"advantages_T": np.array([0.5, 1.5, -2.0])},
    )
    mb = MicroBatch.build(batch, torch.device("cpu"))
    assert mb.input_ids_N.tolist() == [5, 6, 7, 8, 2, 4, 9, 9, 2]
    assert mb.position_ids_N.tolist() == [0, 1, 0, 2, 3, 2, 1, 2, 3]
    assert mb.predict_T.tolist() == [1, 3, 1, 2, 6, 7]
    assert mb.target_T.tolist() == [8, 2, 4, 9, 9, 2]
    assert mb.sequence_T.tolist() == [0, 0, 1, 2, 2, 2]
    assert mb.extras_T["mask_T"].tolist() == [1, 0, 1, 1, 1, 1]
    assert mb.extras_T["advantages_T"].tolist() == [0.5, 0.5, 1.5, -2.0, -2.0, -2.0]
    o, x = False, True
    assert mb.attention["mask_NN"].tolist() == [
        [x, o, o, o, o, o, o, o, o],
        [x, x, o, o, o, o, o, o, o],
        [o, o, x, o, o, o, o, o, o],
        [x, x, o, x, o, o, o, o, o],
        [x, x, o, x, x, o, o, o, o],
        [x, x, o, o, o, x, o, o, o],
        [o, o, x, o, o, o, x, o, o],
        [o, o, x, o, o, o, x, x, o],
        [o, o, x, o, o, o, x, x, x],
    ]
    kernels = MicroBatch.build(batch, torch.device("cpu"), kernels=True).attention
    assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in kernels.items()} == {
        "cu_seqlens": [0, 2, 3, 5, 6, 9],
        "prompt_of": [-1, -1, 0, 0, 1],
        "cu_answers": [0, 3, 6],
        "prompt_tokens": 3,
        "max_seqlen": 3,
    }


def test_prompts_of_one_length_are_not_taken_for_one():
    """Prompts of a template often have the same length, and differ in their last tokens."""
    prompts, answers = [np.array([5, 6]), np.array([5, 7])], [np.array([8]), np.array([9])]
    mb = MicroBatch.build(Sequences(prompts, answers, {}, {}), torch.device("cpu"))
    assert mb.input_ids_N.tolist() == [5, 6, 5, 7, 8, 9]
    assert mb.predict_T.tolist() == [1, 3]
    assert Sequences(prompts, answers, {}, {}).by_prompt(100) == ([[0], [1]], [3, 3])


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=30), st.integers(0, 40))
def test_sequences_by_prompt(drawn, limit):
    """Every sequence once, one prompt a part, none longer than the limit but single sequences; tokens as packed."""
    prompts = [np.full(i + 1, i) for i in range(4)]
    batch = Sequences([prompts[i] for i, _ in drawn], [np.zeros(n, dtype=int) for _, n in drawn], {}, {})
    assert len(batch.by_prompt(1000)[0]) == len({i for i, _ in drawn})  # where all fit, one part a prompt
    parts, tokens = batch.by_prompt(limit)
    assert sorted(i for part in parts for i in part) == list(range(len(drawn)))
    for part, count in zip(parts, tokens, strict=True):
        assert len({drawn[i][0] for i in part}) == 1
        assert count <= limit or len(part) == 1
        assert count == len(MicroBatch.build(batch.take(part), torch.device("cpu")).input_ids_N)


def rank_that_loads(rank, address, cfg, most):
    """Fails if this process grows by more than `most` bytes while it loads its part of the model."""
    torch.set_num_threads(1)
    join_ranks("cpu", address, rank, 2, timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    Path("/proc/self/clear_refs").write_text("5")  # from here on Linux notes the peak anew

    def status(name: str) -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    lm = model.build_model(cfg.policy, mesh, torch.device("cpu"))
    grown = status("VmHWM") - before
    assert grown < most, f"rank {rank} grew by {grown / 2**20:.0f} MiB, {most / 2**20:.0f} MiB are allowed"
    assert sum(p.to_local().numel() for p in lm.parameters()) * 4 < most
    torch.distributed.destroy_process_group()


def test_a_rank_loads_no_more_than_its_part_of_the_model(tmp_path, tiny_model, config):
    """Its shard in float32, its part of the file in bfloat16, one weight; the whole model would not fit."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6}
    large = AutoConfig.from_pretrained(tiny_model, **sizes, layer_types=["full_attention"] * 6)
    lm = AutoModelForCausalLM.from_config(large, dtype=torch.bfloat16)
    lm.save_pretrained(tmp_path)
    parameters, largest = sum(p.numel() for p in lm.parameters()), max(p.numel() for p in lm.parameters())
    most = parameters // 2 * (4 + 2) + 4 * largest + 2**25
    assert most < parameters * 4
    spawn(rank_that_loads, (free_address(), config(f"policy.model_name={tmp_path}"), most), 2)


def test_gathers_on_the_cpu_are_run_by_one_thread(config):
    """Of two a rank dies within seconds, if it asks for the next gathers while others are on their way."""
    worker = PolicyWorker(config().policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    groups = [torch.distributed.group.WORLD, worker.mesh["dp"].get_group(), worker.mesh["tp"].get_group()]
    used = [group._get_backend(torch.device("cpu")) for group in groups]
    torch.distributed.destroy_process_group()
    assert [backend.options._threads for backend in used] == [1, 1, 1]
