"""FLOPs, bytes and floors against sums written out token by token, and the numbers of a published model."""

import math

import numpy as np
import pytest
from conftest import ROOT
from transformers import Qwen3Config

from config import load_config
from hardware import (
    Limits,
    Shape,
    decode_cost,
    memory_estimate,
    memory_table,
    not_for_kv_cache,
    peaks,
    prefill_flops,
    train_flops,
)
from launch import explain
from logger import Logger

# Qwen3-0.6B, counted by hand: per layer q and o 1024 x 2048, k and v 1024 x 1024, MLP 3 x 1024 x 3072, norms
LAYER = 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
HEAD = 151936 * 1024


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Shape:
    folder = tmp_path_factory.mktemp("qwen3-0.6b")
    Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return Shape.of(str(folder))


def test_shape_of_a_published_model(shape):
    assert shape.layer_weights == 28 * LAYER == 440_466_432
    assert shape.total_weights == 28 * LAYER + HEAD + 1024 == 596_049_920  # the published 0.6B
    assert (shape.layers, shape.attention, shape.kv, shape.head_weights) == (28, 2048, 1024, HEAD)


def test_train_flops_token_by_token(shape):
    """The first two answers share their prompt."""
    which, prompts, responses = [7, 7, 3], [5, 5, 3], [2, 4, 7]
    forward, seen = 0, set()
    for group, p, r in zip(which, prompts, responses, strict=True):
        own = range(p if group in seen else 0, p + r)
        seen.add(group)
        forward += len(own) * 2 * 28 * LAYER + r * 2 * HEAD
        # token i attends to i + 1 positions, 2 FLOPs for each of scores and values; the formula's n^2 / 2 leaves out
        # the diagonal's half
        forward += sum(28 * 4 * 2048 * (i + 0.5) for i in own)
    arrays = (np.array(x) for x in (which, prompts, responses))
    assert train_flops(shape, *arrays) == pytest.approx(3 * forward, rel=1e-12)


@pytest.mark.parametrize("flops", [1e12, 1e16])  # bound by arithmetic, bound by memory
def test_decode_floor_token_by_token(shape, flops):
    prompts, responses, bandwidth = np.array([100, 7, 50]), np.array([4, 1, 300]), 3e12
    seconds = moved = 0.0
    for position in range(1, 300):
        running = [p + position for p, r in zip(prompts, responses, strict=True) if r > position]
        weights = 28 * LAYER + HEAD
        step_bytes = 2 * weights + sum(running) * 28 * 2 * 1024 * 2  # keys and values, 2 bytes each
        step_flops = 2 * weights * len(running) + sum(running) * 28 * 4 * 2048
        moved += step_bytes
        seconds += max(step_bytes / bandwidth, step_flops / flops)
    assert decode_cost(shape, prompts, responses, flops, bandwidth) == pytest.approx((seconds, moved), rel=1e-12)


def test_answers_of_one_token_need_no_decoding(shape):
    assert decode_cost(shape, np.array([5]), np.array([1]), 1e12, 1e12) == (0.0, 0.0)
    assert decode_cost(shape, np.zeros(0, int), np.zeros(0, int), 1e12, 1e12) == (0.0, 0.0)


def test_peaks_by_device_name():
    assert peaks("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12)
    assert peaks("NVIDIA H100 PCIe") == (756e12, 2.0e12)
    assert peaks("NVIDIA H200") == (989e12, 4.8e12)
    assert peaks("cpu") is None


def test_utilization_of_a_step_on_two_gpus(shape):
    cfg = load_config(ROOT / "config.yaml", ["cluster.num_nodes=1", "cluster.gpus_per_node=2"])
    limits = Limits(cfg, shape, "NVIDIA H200")
    group, prompts, responses = [0, 0, 1, 1], [10, 10, 20, 20], [3, 30, 4, 40]
    found = limits.generation(group, prompts, responses)
    each = [
        decode_cost(shape, np.array([p, p]), np.array(r), 989e12, 4.8e12) for p, r in ((10, [3, 30]), (20, [4, 40]))
    ]
    prefill = [prefill_flops(shape, np.array([p])) / 989e12 for p in (10, 20)]  # once per prompt, not per answer
    assert found["gen_floor_s"] == max(each[0][0] + prefill[0], each[1][0] + prefill[1])
    assert found["decode_bytes"] == each[0][1] + each[1][1]
    found |= limits.training([0, 1], [10, 20], [30, 40])
    assert found["train_floor_s"] == found["train_flops"] / (2 * 989e12)
    times = {"time/step_s": 5.0, "time/validate_s": 2.0, "time/checkpoint_s": 1.0, "time/train_s": 0.5}
    used = limits.utilization(found | times | {"time/generate_s": 1.0})
    assert used["efficiency"] == pytest.approx((found["gen_floor_s"] + found["train_floor_s"]) / 2.0)
    assert used["mfu"] == pytest.approx(found["train_flops"] / (0.5 * 2 * 989e12))
    assert used["mbu"] == pytest.approx(found["decode_bytes"] / (1.0 * 2 * 4.8e12))
    beside = limits.utilization(found | times | {"time/background_generate_s": 4.0})  # sampling beside the update
    assert beside["mbu"] == pytest.approx(used["mbu"] / 4)
    assert limits.utilization(found | times).keys() == {"efficiency", "mfu"}  # the last step of such a run


def test_efficiency_counts_gpus_that_wait(shape):
    """Three GPUs, one of them for engines: while either side works, the other's GPUs could have."""
    apart = ["policy.generation.colocated.enabled=false", "policy.generation.colocated.resources.gpus_per_node=1"]
    cfg = load_config(ROOT / "config.yaml", ["cluster.num_nodes=1", "cluster.gpus_per_node=3", *apart])
    floors = {"gen_floor_s": 3.0, "decode_bytes": 4.8e12, "train_floor_s": 1.5, "train_flops": 2 * 989e12}
    times = {"time/step_s": 10.0, "time/train_s": 4.0, "time/generate_s": 5.0}
    used = Limits(cfg, shape, "NVIDIA H200").utilization(floors | times)
    assert used == pytest.approx({"efficiency": (3.0 * 1 + 1.5 * 2) / (10.0 * 3), "mfu": 0.25, "mbu": 0.2})


def test_the_block_of_a_step_that_did_not_sample(tmp_path, capsys):
    """One step off, the last step trains on what was sampled beside the one before: no time of generation, no MBU."""
    log = Logger(load_config(ROOT / "recipes" / "quickstart.yaml", [f"logger.log_dir={tmp_path}"]), 0, None)
    log.start_step(1, 1)
    counts = {"num_unverified": 0, "mean_gen_tokens": 1.0, "truncation_rate": 0.0, "total_tokens": 1}
    metrics = {"reward": 0.5, "frac_zero_signal_groups": 0.0, **counts}
    log.end_step(metrics, [], lambda _: {"efficiency": 0.5, "mfu": 0.25})
    log.close()
    assert " • efficiency 50% of the hardware's limit, MFU 25% of the update\n" in capsys.readouterr().out


def test_nothing_is_claimed_about_a_device_without_peaks(shape):
    limits = Limits(load_config(ROOT / "recipes" / "quickstart.yaml"), shape, "cpu")
    assert limits.generation([0], [1], [2]) == limits.training([0], [1], [2]) == limits.utilization({}) == {}


def test_memory_estimate_by_hand(shape):
    base = ["cluster.num_nodes=1", "cluster.gpus_per_node=4", "policy.dtensor_cfg.tensor_parallel_size=2"]
    cfg = load_config(ROOT / "config.yaml", [*base, "policy.generation.vllm_cfg.gpu_memory_utilization=0.5"])
    found = memory_estimate(cfg, shape, 80 * 2**30, head_chunk=4096)
    outside = HEAD + 1024
    mine = (28 * LAYER / 2 + outside) / 2  # layers over 2 x 2 ranks, the rest over the 2 of data parallelism
    assert found["policy: float32 master weights"] * 2**30 == 4 * mine
    assert found["policy: AdamW moments"] * 2**30 == 8 * mine
    assert found["policy: logits of one chunk"] * 2**30 == 10 * 4096 * 151936
    assert "policy: kept for the head's gradient" not in found
    plain = load_config(ROOT / "config.yaml", [*base, "policy.dtensor_cfg.activation_checkpointing=false"])
    kept = memory_estimate(plain, shape, 80 * 2**30, head_chunk=4096)["policy: kept for the head's gradient"]
    assert kept * 2**30 == 2 * plain.policy.sequence_packing.train_mb_tokens * 151936
    assert found["engine: weights"] * 2**30 == 2 * 596_049_920
    assert not_for_kv_cache(cfg, shape) == int(12 * mine) + 2 * 596_049_920
    stays = 12 * mine / 2**30  # beside the policy's weights and moments
    assert found["engine: weights"] + found["engine: KV cache"] + stays == pytest.approx(40)
    # An engine beside a policy takes its whole share together with what stays there, however little the update needs.
    large = ["policy.generation.vllm_cfg.gpu_memory_utilization=0.9"]
    assert "\n      72.0  policy" in memory_table(
        load_config(ROOT / "config.yaml", base + large), shape, 80 * 2**30, 4096
    )
    table = memory_table(cfg, shape, 80 * 2**30, 4096)
    assert "it has 80" in table
    assert "may not fit" not in table
    need = math.ceil(sum(size for name, size in found.items() if name.startswith("policy")))
    assert "This may not fit: lower policy.sequence_packing.train_mb_tokens" in memory_table(
        cfg, shape, (need - 1) * 2**30, 4096
    )


def test_out_of_memory_names_the_keys():
    line = explain(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"))
    assert line.startswith("a GPU ran out of memory (checkpoints are intact): lower policy.sequence_packing.train_mb")
    assert "\n" not in line
