"""Micro-batches of round sizes, and the gradients of recorded passes."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_policy import counts, free_address, random_batch

from config import ConfigError, load_config
from model import MicroBatch, missing, power_of_four, quantum
from policy import PolicyWorker
from train_grpo import grpo_loss

pytestmark = pytest.mark.slow

GRAPHS = [
    "cluster.gpus_per_node=1", "policy.dtensor_cfg.cuda_graphs=true", "policy.dtensor_cfg.reshard_after_forward=false",
    "policy.dtensor_cfg.activation_checkpointing=false", "policy.generation.colocated.sleep=false",
]  # fmt: skip


def test_round_numbers():
    """Two an octave, multiples of 128, always a larger one."""
    rounded = sorted({n + missing(n) for n in range(1, 5000)})
    assert rounded == [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert [power_of_four(n) for n in (1, 2, 4, 5, 16, 17, 64, 65)] == [1, 4, 4, 16, 16, 64, 64, 256]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 300)), min_size=1, max_size=40))
def test_few_shapes_and_room_for_every_sequence(drawn):
    """What is real stays as it is; all bounds hold, those of what fills up included."""
    prompts = [np.arange(1, 60 * i + 2) for i in range(5)]
    drawn = sorted(drawn)
    batch = random_batch(len(drawn))
    batch.prompt_ids, batch.response_ids = [prompts[i] for i, _ in drawn], [np.arange(n) for _, n in drawn]
    batch.per_token = {"mask_T": [np.ones(n) for _, n in drawn]}
    plain, rounded = (MicroBatch.build(batch, torch.device("cpu"), round_up=up) for up in (False, True))
    a, b = plain.attention, rounded.attention
    real, prompt_tokens = len(plain.target_T), a["prompt_tokens"]
    assert b["prompt_tokens"] % quantum(prompt_tokens) == 0
    assert len(rounded.target_T) % quantum(real) == 0
    for name in ("cu_seqlens", "cu_answers"):
        assert len(b[name]) == power_of_four(len(b[name]))
        assert b[name].diff().min() >= 0
    assert len(b["prompt_of"]) == len(b["cu_seqlens"]) - 1
    assert b["cu_seqlens"][-1] == len(rounded.input_ids_N)
    assert b["cu_seqlens"][(b["prompt_of"] < 0).sum()] == b["prompt_tokens"]
    assert b["cu_answers"][-1] == len(rounded.target_T)
    assert b["max_seqlen"] >= b["cu_seqlens"].diff().max()
    assert torch.equal(rounded.target_T[:real], plain.target_T)
    assert torch.equal(rounded.input_ids_N[rounded.predict_T[:real]], plain.input_ids_N[plain.predict_T])
    assert torch.equal(rounded.sequence_T, plain.sequence_T)
    assert all(torch.equal(rounded.extras_T[name], values) for name, values in plain.extras_T.items())


def test_the_sequence_that_fills_up_changes_nothing(quickstart_overrides):
    """Log-probabilities and gradients with and without it."""
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", quickstart_overrides)
    worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        batch, found = random_batch(7), []
        for round_up in (False, True):
            mb = MicroBatch.build(batch, torch.device("cpu"), round_up=round_up)
            logprobs_T = worker.model(mb, 0.9)[: len(mb.sequence_T)]
            (logprobs_T * mb.extras_T["rollout_logprobs_T"]).sum().backward()
            found.append([logprobs_T.detach(), *(g.clone() for g in worker._local_gradients())])
            worker._drop_gradients()
        for got, want in zip(*found, strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrong", ["policy.precision=float32", "policy.dtensor_cfg.activation_checkpointing=true"])
def test_what_graphs_cannot_be_with_is_refused(quickstart_overrides, wrong):
    with pytest.raises(ConfigError, match="cuda_graphs=true needs"):
        load_config(ROOT / "recipes" / "quickstart.yaml", [*quickstart_overrides, *GRAPHS, wrong])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_recorded_passes_give_the_gradients_of_the_model(quickstart_overrides, precision):
    """For one micro-batch and several, in the shape that was recorded but with other tokens, and after updates."""
    overrides = [*quickstart_overrides, *GRAPHS, f"policy.precision={precision}"]
    overrides += ["policy.max_total_sequence_length=256", "policy.sequence_packing.train_mb_tokens=256"]
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", overrides)
    worker = PolicyWorker(cfg.policy, 0, 1, "cuda", timeout_s=60)
    worker.setup(free_address())
    try:
        worker.compile(tokens=256, logprobs=False)
        graphed, shapes = worker.graphed, []
        other_tokens = random_batch(6)
        other_tokens.response_ids = [ids[::-1] for ids in other_tokens.response_ids]
        for batch in (random_batch(6), other_tokens, random_batch(90), random_batch(5)):
            found = []
            kwargs = {"cfg": cfg.loss_fn, **counts(batch)}
            parts = [batch.take(indices) for indices in worker._micro_batches(batch)]
            for worker.graphed in (None, graphed):
                totals = worker._gradients(parts, grpo_loss, kwargs)
                found.append([totals["loss"].clone()[None], *(g.clone() for g in worker._local_gradients())])
                worker._drop_gradients()
            for got, want in zip(*found, strict=True):
                assert (got - want).norm() <= 0.01 * want.norm()
            shapes.append((len(parts), len(graphed.passes)))
            worker.update(batch, grpo_loss, kwargs)
        assert shapes[0] == shapes[1] == (1, 1)  # the second was not recorded again
        assert shapes[2][0] > 1  # micro-batches
        assert worker.steps_done == 4
    finally:
        torch.distributed.destroy_process_group()
