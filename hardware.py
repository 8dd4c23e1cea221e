"""What the hardware allows: the FLOPs and bytes of a step, the least time they can take, and memory before it is used.

For dense decoder models. Nothing here is timed; `utilization` divides by what the logger timed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from config import Config
from launch import OUT_OF_MEMORY_ADVICE

GIB = 2**30
# Dense bfloat16 FLOP/s and memory bytes/s of the vendor's data sheets, by a part of the device's name.
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.55e12),
    "B200": (2250e12, 8.0e12),
}


def peaks(device_name: str) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of a device; None if it is not in PEAKS (then nothing about efficiency is logged)."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that costs depend on."""

    layers: int
    hidden: int
    attention: int  # heads x head dimension
    kv: int  # key-value heads x head dimension
    intermediate: int
    layer_weights: int  # in all decoder layers: each is used once per token
    head_weights: int  # vocabulary x hidden
    total_weights: int  # a tied head counted once

    @classmethod
    def of(cls, model_name: str) -> "Shape":
        """From the configuration of a Hugging Face folder or name; no weights are loaded."""
        config = AutoConfig.from_pretrained(model_name)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            attention=config.num_attention_heads * head_dim,
            kv=config.num_key_value_heads * head_dim,
            intermediate=config.intermediate_size,
            layer_weights=sum(p.numel() for p in lm.base_model.layers.parameters()),
            head_weights=lm.lm_head.weight.numel(),
            total_weights=sum(p.numel() for p in lm.parameters()),
        )


def train_flops(shape: Shape, prompt_S: np.ndarray, prompts_S: np.ndarray, responses_S: np.ndarray) -> float:
    """FLOPs of forward and backward over sequences of these lengths, the answers to one prompt (equal in `prompt_S`)
    sharing it; recomputation is not counted.

    Forward: 2 per weight and token, the LM head on response tokens only; attention 4 x attention width a layer for each
    pair of tokens of which one sees the other (scores and values, 2 each), half of n^2 pairs in n tokens. Backward:
    twice that.
    """
    _, first = np.unique(prompt_S, return_index=True)
    prompts_P, prompts_S, responses_S = (x.astype(np.float64) for x in (prompts_S[first], prompts_S, responses_S))
    pairs = (prompts_P**2).sum() / 2 + (responses_S * prompts_S + responses_S**2 / 2).sum()
    linear = (
        2 * shape.layer_weights * (prompts_P.sum() + responses_S.sum()) + 2 * shape.head_weights * responses_S.sum()
    )
    return float(3 * (linear + 4 * shape.layers * shape.attention * pairs))


def decode_cost(
    shape: Shape, prompts_S: np.ndarray, responses_S: np.ndarray, flops: float, bandwidth: float
) -> tuple[float, float]:
    """(least seconds, bytes) of decoding these answers on one GPU, all at once, in bfloat16.

    The first token comes from the prefill. Every later position is one pass: it reads all weights once and the keys and
    values of each sequence that is still running, and does 2 FLOPs per weight and sequence, and 4 x attention width per
    layer and context token. It takes the longer of bytes / bandwidth and FLOPs / peak. So the tail, where few
    sequences are left, is in it with its full weight reads.
    """
    positions = np.arange(1, responses_S.max(initial=1))
    ended_at, ended_prompt = np.bincount(responses_S), np.bincount(responses_S, weights=prompts_S)
    running = len(responses_S) - np.cumsum(ended_at)[positions]  # sequences with more tokens than the position
    context = prompts_S.sum() - np.cumsum(ended_prompt)[positions] + running * positions
    moved = 2 * (shape.layer_weights + shape.head_weights) + 4 * shape.layers * shape.kv * context
    work = 2 * (shape.layer_weights + shape.head_weights) * running + 4 * shape.layers * shape.attention * context
    return float(np.maximum(moved / bandwidth, work / flops).sum()), float(moved.sum())


def prefill_flops(shape: Shape, prompts_P: np.ndarray) -> float:
    """FLOPs of one forward pass over each prompt (a group's answers share it)."""
    tokens_P = prompts_P.astype(np.float64)
    return float(2 * shape.layer_weights * tokens_P.sum() + 2 * shape.layers * shape.attention * (tokens_P**2).sum())


class Limits:
    """The floors of a run's steps and how near they come, for one kind of device."""

    def __init__(self, cfg: Config, shape: Shape, device_name: str):
        """Where peaks are not known (the CPU) every method gives nothing."""
        self.shape, self.peaks = shape, peaks(device_name)
        self.policy_gpus, self.engine_gpus = cfg.world_size, len(set(cfg.engine_bundles))
        self.gpus = self.policy_gpus + (0 if cfg.policy.generation.colocated.enabled else self.engine_gpus)

    def generation(self, prompt_S: list[int], prompts_S: list[int], responses_S: list[int]) -> dict[str, float]:
        """Least seconds and bytes of sampling these answers. `prompt_S` says which prompt each belongs to (they are
        dealt to the GPUs in turn), the other two are lengths in tokens."""
        if not self.peaks:
            return {}
        flops, bandwidth = self.peaks
        group_S, lengths_S, answers_S = np.array(prompt_S), np.array(prompts_S), np.array(responses_S)
        seconds, moved = [0.0], 0.0
        for gpu in range(self.engine_gpus):
            mine = group_S % self.engine_gpus == gpu
            decode_s, decode_bytes = decode_cost(self.shape, lengths_S[mine], answers_S[mine], flops, bandwidth)
            _, first = np.unique(group_S[mine], return_index=True)
            seconds.append(decode_s + prefill_flops(self.shape, lengths_S[mine][first]) / flops)
            moved += decode_bytes
        return {"gen_floor_s": max(seconds), "decode_bytes": moved}

    def training(self, prompt_S: list[int], prompts_S: list[int], responses_S: list[int]) -> dict[str, float]:
        """Least seconds and FLOPs of an update on these sequences; arguments as of `generation`."""
        if not self.peaks:
            return {}
        work = train_flops(self.shape, *(np.array(x, dtype=np.int64) for x in (prompt_S, prompts_S, responses_S)))
        return {"train_floor_s": work / (self.peaks[0] * self.policy_gpus), "train_flops": work}

    def utilization(self, metrics: dict[str, float]) -> dict[str, float]:
        """`efficiency` = floors / the step without validation and checkpoints, each weighed by its share of the GPUs
        where policy and engines have their own; `mfu` = FLOPs of the update / its time at peak; `mbu` = bytes of
        decoding / the time of generation at full bandwidth (of a step that sampled: the last one with
        `grpo.async_one_step_off` does not)."""
        if not self.peaks or "gen_floor_s" not in metrics:
            return {}
        aside = sum(metrics.get(f"time/{name}_s", 0.0) for name in ("validate", "checkpoint"))
        floor = (metrics["gen_floor_s"] * self.engine_gpus + metrics["train_floor_s"] * self.policy_gpus) / self.gpus
        flops, bandwidth = self.peaks
        used = {
            "efficiency": floor / (metrics["time/step_s"] - aside),
            "mfu": metrics["train_flops"] / (metrics["time/train_s"] * flops * self.policy_gpus),
        }
        generate_s = metrics.get("time/background_generate_s", metrics.get("time/generate_s"))
        if generate_s:
            used["mbu"] = metrics["decode_bytes"] / (generate_s * bandwidth * self.engine_gpus)
        return used


# ---------------------------------------------------------------- memory


def resident_bytes(cfg: Config, shape: Shape) -> dict[str, float]:
    """What a rank of the policy keeps on its GPU from step to step, whether engines sleep or sample."""
    tp = cfg.policy.dtensor_cfg.tensor_parallel_size
    shard = (shape.layer_weights / tp + outside_layers(shape)) / (cfg.world_size // tp)
    on_gpu = 0 if cfg.policy.dtensor_cfg.cpu_offload else 1
    return {"policy: float32 master weights": 4 * shard * on_gpu, "policy: AdamW moments": 8 * shard * on_gpu}


def outside_layers(shape: Shape) -> int:
    """Embedding and head, which tensor parallelism does not split."""
    return shape.total_weights - shape.layer_weights


def not_for_kv_cache(cfg: Config, shape: Shape) -> int:
    """Bytes of an engine's share of a GPU (`gpu_memory_utilization`) that are taken when its KV cache is measured out:
    its weights, and beside a policy what that keeps there."""
    beside = sum(resident_bytes(cfg, shape).values()) if cfg.policy.generation.colocated.enabled else 0
    return int(beside) + shape.total_weights * (4 if cfg.policy.precision == "float32" else 2)


def memory_estimate(cfg: Config, shape: Shape, device_bytes: int, head_chunk: int) -> dict[str, float]:
    """GiB on the fullest GPU by what is there, before anything is allocated. Activations are a rule of thumb."""
    p, d, gen = cfg.policy, cfg.policy.dtensor_cfg, cfg.policy.generation
    tp, wide = d.tensor_parallel_size, 4 if p.precision == "float32" else 2
    outside = outside_layers(shape)
    gathered = shape.layer_weights / tp + outside
    shard = gathered / (cfg.world_size // tp)
    if d.reshard_after_forward:
        gathered = outside + 2 * shape.layer_weights / tp / shape.layers  # one layer in use, one on its way
    tokens = p.sequence_packing.train_mb_tokens if p.sequence_packing.enabled else p.max_total_sequence_length
    layer_width = 8 * shape.hidden + (3 * (shape.attention + 2 * shape.kv) + 4 * shape.intermediate) / tp
    kept = shape.layers * shape.hidden + layer_width if d.activation_checkpointing else shape.layers * layer_width
    off = 0 if d.cpu_offload else 1
    estimate = resident_bytes(cfg, shape) | {
        "policy: gradients, sharded and being accumulated": 4 * shard * off + 4 * (shape.layer_weights / tp + outside),
        "policy: gathered weights": wide * gathered,
        f"policy: activations of {tokens:,} tokens": wide * tokens * kept,
        "policy: logits of one chunk": 10 * min(tokens, head_chunk) * shape.head_weights / shape.hidden,
    }
    if not d.activation_checkpointing:
        estimate["policy: kept for the head's gradient"] = wide * tokens * shape.head_weights / shape.hidden
    share = gen.vllm_cfg.gpu_memory_utilization * device_bytes
    budget = gen.vllm_cfg.kv_cache_memory_bytes or share - not_for_kv_cache(cfg, shape)
    estimate |= {
        "engine: weights": gen.engines_per_gpu * wide * shape.total_weights,
        "engine: KV cache": gen.engines_per_gpu * max(budget, 0),
    }
    return {name: size / GIB for name, size in estimate.items()}


def memory_table(cfg: Config, shape: Shape, device_bytes: int, head_chunk: int) -> str:
    """What `memory_estimate` says, and whether it fits."""
    estimate, gen = memory_estimate(cfg, shape, device_bytes, head_chunk), cfg.policy.generation
    total = device_bytes / GIB
    policy = sum(size for name, size in estimate.items() if name.startswith("policy"))
    engine = sum(estimate.values()) - policy
    together = gen.colocated.enabled and not gen.colocated.sleep
    stays = sum(resident_bytes(cfg, shape).values()) / GIB if gen.colocated.enabled else 0.0
    need = policy + engine if together else max(policy, stays + engine)
    lines = [f" • memory of a GPU in GiB, estimated; it has {total:.0f}"]
    lines += [f"   {size:7.1f}  {name}" for name, size in estimate.items()]
    how = "together"
    if not gen.colocated.enabled:
        how = "the larger of the two, which have GPUs of their own"
    elif gen.colocated.sleep:
        how = "the larger of the two, which take turns; master weights and moments stay"
    lines.append(f"   {need:7.1f}  policy {policy:.1f}, engine {engine:.1f}: {how}")
    if need > total:
        lines.append(f"   This may not fit: {OUT_OF_MEMORY_ADVICE}")
    return "\n".join(lines)
