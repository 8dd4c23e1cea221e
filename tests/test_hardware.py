"""FLOPs against torch's counter, bytes and floors against passes written out, memory by hand of a published model."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from config import load_config
from hardware import (
    Limits,
    Shape,
    decode_bytes,
    forward_flops,
    memory_estimate,
    memory_table,
    not_for_kv_cache,
)
from launch import explain
from logger import Logger

# Qwen3-0.6B, counted by hand: per layer q and o 1024 x 2048, k and v 1024 x 1024, MLP 3 x 1024 x 3072, norms
LAYER = 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
HEAD = 151936 * 1024
ONE_GPU = ["cluster.num_nodes=1", "cluster.gpus_per_node=1", "policy.dtensor_cfg.tensor_parallel_size=1"]


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


def test_flops_are_those_that_torch_counts():
    """Of whole passes forward and backward, and of sampling token by token with a cache.

    Torch counts n^2 pairs in a pass over n tokens, of which no token sees those after it; and no multiplication by the
    weight of a norm.
    """
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    lm = Qwen3ForCausalLM(config)
    layers = list(lm.model.layers.parameters())
    shape = Shape(2, 32, 64, 32, 96, sum(p.numel() for p in layers), 64 * 32, sum(p.numel() for p in lm.parameters()))
    norms = sum(p.numel() for p in layers if p.ndim == 1)
    for prompt, response in ((5, 7), (11, 2), (3, 1)):
        group, prompts, responses = np.array([0]), np.array([prompt]), np.array([response])
        n = prompt + response - 1  # the last token is not fed in
        ids = torch.randint(64, (1, n))
        with FlopCounterMode(display=False) as counted:
            lm(ids, logits_to_keep=response).logits.sum().backward()
        unseen = 4 * 2 * 64 * n * (n - 1) // 2
        exact = counted.get_total_flops() + 3 * (2 * norms * n - unseen)
        assert 3 * forward_flops(shape, group, prompts, responses, logits=response) == exact
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            cache = lm(ids[:, :prompt], logits_to_keep=1, use_cache=True).past_key_values
            for position in range(prompt, n):
                cache = lm(ids[:, position : position + 1], past_key_values=cache, use_cache=True).past_key_values
        unseen = 4 * 2 * 64 * prompt * (prompt - 1) // 2
        exact = counted.get_total_flops() + 2 * norms * n - unseen
        assert forward_flops(shape, group, prompts, responses, logits=response) == exact


def test_flops_of_a_group(shape):
    """Two answers to a prompt cost what they cost alone, less the prompt once."""
    two = forward_flops(shape, np.array([7, 7]), np.array([5, 5]), np.array([2, 4]), logits=6)
    each = [forward_flops(shape, np.array([7]), np.array([5]), np.array([r]), logits=r) for r in (2, 4)]
    prompt = forward_flops(shape, np.array([7]), np.array([5]), np.array([1]), logits=0)
    assert two == sum(each) - prompt
    assert prompt == 5 * 2 * 28 * LAYER + 28 * 4 * 2048 * (1 + 2 + 3 + 4 + 5)


def passes_of(starts, responses) -> list[list[tuple[int, int]]]:
    """(answer, which of its tokens) of each pass, if answers begin to decode at these passes."""
    last = max(s + r for s, r in zip(starts, responses, strict=True))
    return [[(i, t - starts[i]) for i, r in enumerate(responses) if 0 < t - starts[i] < r] for t in range(last)]


def bytes_and_flops(shape, running, group, prompts) -> tuple[float, float]:
    """Of one pass, written out: each weight and each prompt is read once."""
    if not running:
        return 0.0, 0.0
    weights = shape.layer_weights + shape.head_weights
    width = 2 * shape.kv * shape.layers  # keys and values of a token
    moved = 2 * weights + 2 * width * sum(t for _, t in running)
    moved += 2 * width * sum({group[i]: prompts[i] for i, _ in running}.values())
    seen = sum(prompts[i] + t for i, t in running)
    return moved, 2 * weights * len(running) + 4 * shape.layers * shape.attention * seen


def test_bytes_of_decoding_pass_by_pass(shape):
    group, prompts, responses = [0, 0, 1, 2], [100, 100, 7, 50], [4, 30, 1, 300]
    passes = passes_of([0] * 4, responses)
    exact = sum(bytes_and_flops(shape, running, group, prompts)[0] for running in passes)
    assert decode_bytes(shape, *map(np.array, (group, prompts, responses))) == pytest.approx(exact, rel=1e-12)
    assert decode_bytes(shape, np.array([0]), np.array([5]), np.array([1])) == 0.0  # the prefill makes the first token
    assert decode_bytes(shape, *np.zeros((3, 0), int)) == 0.0


SMALL = Shape(layers=2, hidden=8, attention=16, kv=8, intermediate=24, layer_weights=1000, head_weights=80,
              total_weights=1200)  # fmt: skip


@pytest.fixture(scope="module")
def limits() -> Limits:
    return Limits(load_config(ROOT / "config.yaml", ONE_GPU), SMALL, "NVIDIA H200")


@given(data=st.data())
def test_no_schedule_is_faster_than_the_floor(limits, data):
    """Whenever each answer begins, and whether a pass is bound by arithmetic or by memory."""
    prompt_of = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=4, max_size=4))
    responses = [data.draw(st.integers(1, 12)) for _ in prompt_of]
    starts = [data.draw(st.sampled_from([0, 0, 3, 20])) for _ in prompt_of]
    prompts = [lengths[p] for p in prompt_of]
    limits.peaks = data.draw(st.sampled_from([(1e3, 1e9), (1e9, 1e3), (1e6, 1e6), (1e6, 1e5)]))
    floor = limits.generation(prompt_of, prompts, responses)
    seconds = moved = 0.0
    for p in set(prompt_of):
        prefill = lengths[p] * 2 * 1000 + 2 * 80 + sum(2 * 4 * 16 * (i + 1) for i in range(lengths[p]))
        seconds += prefill / limits.peaks[0]
    for running in passes_of(starts, responses):
        pass_bytes, pass_flops = bytes_and_flops(SMALL, running, prompt_of, prompts)
        moved += pass_bytes
        seconds += max(pass_bytes / limits.peaks[1], pass_flops / limits.peaks[0])
    assert floor["gen_floor_s"] <= seconds * (1 + 1e-12)
    assert floor["decode_bytes"] <= moved * (1 + 1e-12)


def test_peaks_by_device_name():
    cfg = load_config(ROOT / "config.yaml", ONE_GPU)
    assert Limits(cfg, SMALL, "NVIDIA H100 80GB HBM3").peaks == (989e12, 3.35e12)
    assert Limits(cfg, SMALL, "NVIDIA H100 PCIe").peaks == (756e12, 2.0e12)
    assert Limits(cfg, SMALL, "NVIDIA H200").peaks == (989e12, 4.8e12)
    assert Limits(cfg, SMALL, "cpu").peaks is None


def test_utilization_of_a_step_on_two_gpus(shape):
    cfg = load_config(ROOT / "config.yaml", ["cluster.num_nodes=1", "cluster.gpus_per_node=2"])
    limits = Limits(cfg, shape, "NVIDIA H200")
    group, prompts, responses = [0, 0, 1, 1], [10, 10, 20, 20], [3, 30, 4, 40]
    found = limits.generation(group, prompts, responses)
    each = [decode_bytes(shape, *map(np.array, x)) for x in (([0, 0], [10, 10], [3, 30]), ([1, 1], [20, 20], [4, 40]))]
    assert found["decode_bytes"] == sum(each)
    assert found["gen_floor_s"] == pytest.approx(sum(each) / 4.8e12 / 2)  # so few answers are bound by memory
    found |= limits.training([0, 1], [10, 20], [30, 40])
    flops = 3 * forward_flops(shape, np.array([0, 1]), np.array([10, 20]), np.array([30, 40]), logits=70)
    assert (found["train_flops"], found["train_floor_s"]) == (flops, flops / (2 * 989e12))
    times = {"time/step_s": 5.0, "time/validate_s": 2.0, "time/checkpoint_s": 1.0, "time/train_s": 0.5}
    used = limits.utilization(found | times | {"time/generate_s": 1.0})
    assert used["efficiency"] == pytest.approx((found["gen_floor_s"] + found["train_floor_s"]) / 2.0)
    assert used["mfu"] == pytest.approx(found["train_flops"] / (0.5 * 2 * 989e12))
    assert used["mbu"] == pytest.approx(found["decode_bytes"] / (1.0 * 2 * 4.8e12))
    beside = limits.utilization(found | times | {"time/background_generate_s": 4.0})  # sampling beside the update
    assert beside["mbu"] == pytest.approx(used["mbu"] / 4)
    assert limits.utilization(found | times).keys() == {"efficiency", "mfu"}  # the last step of such a run


def test_prompts_are_on_the_gpus_of_the_engines_that_get_them(shape):
    """With two engines a GPU, prompts 0 and 1 go to the first GPU and 2 and 3 to the second."""
    two_each = ["policy.generation.engines_per_gpu=2", "policy.generation.vllm_cfg.kv_cache_memory_bytes=1000000000"]
    cfg = load_config(ROOT / "config.yaml", ["cluster.num_nodes=1", "cluster.gpus_per_node=2", *two_each])
    found = Limits(cfg, shape, "NVIDIA H200").generation([0, 1, 2, 3], [10] * 4, [50, 50, 5, 5])
    each = [decode_bytes(shape, np.array([0, 1]), np.array([10, 10]), np.array([r, r])) for r in (50, 5)]
    assert found["decode_bytes"] == sum(each)


def test_published_step_times_have_the_numbers_of_these_formulas(tmp_path):
    from benchmarks.step_time import recompute

    published = ROOT / "benchmarks" / "results" / "step_time.json"
    copy = tmp_path / "step_time.json"
    copy.write_bytes(published.read_bytes())
    recompute(copy)
    assert copy.read_text() == published.read_text()


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
    *_, total = memory_table(load_config(ROOT / "config.yaml", base + large), shape, 80 * 2**30, 4096)
    assert total.startswith("      72.0  policy")
    table = memory_table(cfg, shape, 80 * 2**30, 4096)
    assert "it has 80" in table[0]
    assert "may not fit" not in table[-1]
    need = math.ceil(sum(size for name, size in found.items() if name.startswith("policy")))
    *_, advice = memory_table(cfg, shape, (need - 1) * 2**30, 4096)
    assert "This may not fit: lower policy.sequence_packing.train_mb_tokens" in advice
    assert memory_table(cfg, shape, 0, 4096) == []


def test_out_of_memory_names_the_keys():
    line = explain(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"))
    assert line.startswith("a GPU ran out of memory (checkpoints are intact): lower policy.sequence_packing.train_mb")
    assert "\n" not in line
