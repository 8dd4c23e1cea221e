"""What the hardware allows: FLOPs and bytes of a step, the least time that they can take, and an estimate of memory.

A floor is a lower bound that somebody could reach: a group's prompt is computed and read once for all its responses,
arithmetic and memory traffic overlap fully, and weights, keys and values are bfloat16. Nothing here is timed;
`Limits.utilization` divides floors by what the logger timed. The formulas are for dense decoder models, the only ones
that are trained here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from config import Config
from launch import OUT_OF_MEMORY_ADVICE

GIB = 2**30
# Dense bfloat16 FLOP/s and memory bytes/s from the vendor's data sheets, by a part of the device's name.
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.55e12),
    "B200": (2250e12, 8.0e12),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, on which its costs depend."""

    layers: int
    hidden: int
    attention: int  # heads x head dimension
    kv: int  # key-value heads x head dimension
    intermediate: int
    layer_weights: int  # in all decoder layers: each is used once per token
    head_weights: int  # vocabulary x hidden
    total_weights: int  # a tied head counted once

    @property
    def outside_layers(self) -> int:
        """Embedding, head and last norm, which tensor parallelism does not split."""
        return self.total_weights - self.layer_weights

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
            kv=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
            intermediate=config.intermediate_size,
            layer_weights=sum(p.numel() for p in lm.base_model.layers.parameters()),
            head_weights=lm.lm_head.weight.numel(),
            total_weights=sum(p.numel() for p in lm.parameters()),
        )


# ---------------------------------------------------------------- floors


def forward_flops(
    shape: Shape, prompt_S: np.ndarray, prompts_S: np.ndarray, responses_S: np.ndarray, logits: int
) -> float:
    """FLOPs of computing sequences of these lengths once, in one pass or token by token, with so many rows of logits.

    Sequences equal in `prompt_S` share their prompt, which goes through the layers once. So does each token of a
    response except the last, after which nothing is predicted. A token costs 2 FLOPs for each layer weight, a row of
    logits 2 for each head weight. Attention costs 4 FLOPs (2 for the score, 2 for the value) for each layer, unit of
    width, and pair of a token and one that it sees: n (n + 1) / 2 pairs among n tokens, and n p pairs of n response
    tokens with p prompt tokens.
    """
    _, first = np.unique(prompt_S, return_index=True)
    prompts_P, fed_S = prompts_S[first], np.maximum(responses_S - 1, 0)
    tokens = float(prompts_P.sum() + fed_S.sum())
    pairs = (prompts_P * (prompts_P + 1)).sum() / 2 + (fed_S * (fed_S + 1)).sum() / 2 + (fed_S * prompts_S).sum()
    linear = shape.layer_weights * tokens + shape.head_weights * float(logits)
    return float(2 * linear + 4 * shape.layers * shape.attention * pairs)


def decode_bytes(shape: Shape, prompt_S: np.ndarray, prompts_S: np.ndarray, responses_S: np.ndarray) -> float:
    """Bytes that decoding on one GPU must move, at 2 bytes a number, if all responses are decoded at once.

    A response of r tokens needs r - 1 passes, since the prefill makes its first token. Weights are read once for each
    pass of the longest response; a prompt's keys and values once for each pass of its group's longest response, as
    cascade attention does; and in its t-th pass a response reads or writes the keys and values of t of its own tokens.
    """
    _, first, group_S = np.unique(prompt_S, return_index=True, return_inverse=True)
    passes_S, passes_P = np.maximum(responses_S - 1, 0), np.zeros(len(first), dtype=np.int64)
    np.maximum.at(passes_P, group_S, passes_S)  # passes of each group's longest answer
    keys = (passes_P * prompts_S[first]).sum() + (passes_S * (passes_S + 1)).sum() / 2
    weights = (shape.layer_weights + shape.head_weights) * float(passes_P.max(initial=0))
    return float(2 * weights + 4 * shape.layers * shape.kv * keys)


class Limits:
    """The floors of a run's steps, and how near the steps come to them, for one kind of device."""

    def __init__(self, cfg: Config, shape: Shape, device_name: str):
        """If the device's peaks are not known (the CPU), every method returns nothing."""
        known = [peaks for name, peaks in PEAKS.items() if name in device_name]
        self.shape, self.peaks = shape, known[0] if known else None
        self.engines_per_gpu = cfg.policy.generation.engines_per_gpu
        self.policy_gpus, self.engine_gpus = cfg.world_size, len(set(cfg.engine_bundles))
        self.gpus = self.policy_gpus + (0 if cfg.policy.generation.colocated.enabled else self.engine_gpus)

    def generation(self, prompt_S: list[int], prompts_S: list[int], responses_S: list[int]) -> dict[str, float]:
        """Least seconds (mean over the GPUs of engines) and bytes of sampling these responses.

        `prompt_S` says which prompt each response belongs to (prompts are dealt to the engines in turn); the other two
        are lengths in tokens. A GPU takes FLOPs / peak or bytes / bandwidth, whichever is longer: at best they overlap.
        """
        if not self.peaks:
            return {}
        answers = np.array([prompt_S, prompts_S, responses_S], dtype=np.int64)
        gpu_S = answers[0] % (self.engine_gpus * self.engines_per_gpu) // self.engines_per_gpu
        seconds, moved = 0.0, 0.0
        for gpu in range(self.engine_gpus):
            mine = answers[:, gpu_S == gpu]
            # one row of logits for each prompt, from which all its responses begin, and one for each later token
            logits = len(np.unique(mine[0])) + np.maximum(mine[2] - 1, 0).sum()
            flops, gpu_bytes = forward_flops(self.shape, *mine, logits), decode_bytes(self.shape, *mine)
            seconds += max(flops / self.peaks[0], gpu_bytes / self.peaks[1])
            moved += gpu_bytes
        return {"gen_floor_s": seconds / self.engine_gpus, "decode_bytes": moved}

    def training(self, prompt_S: list[int], prompts_S: list[int], responses_S: list[int]) -> dict[str, float]:
        """Least seconds and FLOPs of an update on these sequences; arguments as of `generation`.

        The backward pass computes two products for each product of the forward pass, so an update costs three forward
        passes. Recomputation is a choice and does not count.
        """
        if not self.peaks:
            return {}
        lengths = np.array([prompt_S, prompts_S, responses_S], dtype=np.int64)
        work = 3 * forward_flops(self.shape, *lengths, logits=sum(responses_S))
        return {"train_floor_s": work / (self.peaks[0] * self.policy_gpus), "train_flops": work}

    def utilization(self, metrics: dict[str, float]) -> dict[str, float]:
        """`efficiency`, `mfu` and `mbu` of a step, from its floors and times.

        `efficiency`: the GPU-seconds of the floors over all GPU-seconds of the step without validation and checkpoints.
        `mfu`: the FLOPs of the update over what its time allows at peak. `mbu`: the bytes of decoding over what the
        time of generation allows (not for a step that did not sample, as the last one of `grpo.async_one_step_off`).
        """
        if not self.peaks or "gen_floor_s" not in metrics:
            return {}
        aside = sum(metrics.get(f"time/{name}_s", 0.0) for name in ("validate", "checkpoint"))
        floor = metrics["gen_floor_s"] * self.engine_gpus + metrics["train_floor_s"] * self.policy_gpus
        flops, bandwidth = self.peaks
        used = {
            "efficiency": floor / (self.gpus * (metrics["time/step_s"] - aside)),
            "mfu": metrics["train_flops"] / (metrics["time/train_s"] * flops * self.policy_gpus),
        }
        generate_s = metrics.get("time/background_generate_s", metrics.get("time/generate_s"))
        if generate_s:
            used["mbu"] = metrics["decode_bytes"] / (generate_s * bandwidth * self.engine_gpus)
        return used


# ---------------------------------------------------------------- memory


def resident_bytes(cfg: Config, shape: Shape) -> dict[str, float]:
    """What a rank of the policy keeps on its GPU from step to step, whether engines sleep or sample."""
    d = cfg.policy.dtensor_cfg
    weights = shape.layer_weights + d.tensor_parallel_size * shape.outside_layers  # that all ranks hold together
    shard = 0 if d.cpu_offload else weights / cfg.world_size
    return {"policy: float32 master weights": 4 * shard, "policy: AdamW moments": 8 * shard}


def not_for_kv_cache(cfg: Config, shape: Shape) -> int:
    """Bytes of an engine's share of a GPU (`gpu_memory_utilization`) that its KV cache cannot have: its weights take
    them, and a policy on the same GPU."""
    beside = sum(resident_bytes(cfg, shape).values()) if cfg.policy.generation.colocated.enabled else 0
    return int(beside) + shape.total_weights * (4 if cfg.policy.precision == "float32" else 2)


def memory_estimate(cfg: Config, shape: Shape, device_bytes: int, head_chunk: int) -> dict[str, float]:
    """GiB of each kind of memory on the fullest GPU, from the configuration alone; activations by a rule of thumb."""
    p, d, gen = cfg.policy, cfg.policy.dtensor_cfg, cfg.policy.generation
    tp, wide = d.tensor_parallel_size, 4 if p.precision == "float32" else 2
    outside, resident = shape.outside_layers, resident_bytes(cfg, shape)
    whole = shape.layer_weights / tp + outside
    two_layers = 2 * shape.layer_weights / tp / shape.layers + outside  # one layer in use, one on its way
    tokens = p.sequence_packing.train_mb_tokens if p.sequence_packing.enabled else p.max_total_sequence_length
    layer_width = 8 * shape.hidden + (3 * (shape.attention + 2 * shape.kv) + 4 * shape.intermediate) / tp
    kept = shape.layers * shape.hidden + layer_width if d.activation_checkpointing else shape.layers * layer_width
    estimate = resident | {
        "policy: gradients, sharded and being accumulated": resident["policy: float32 master weights"] + 4 * whole,
        "policy: gathered weights": wide * (two_layers if d.reshard_after_forward else whole),
        f"policy: activations of {tokens:,} tokens": wide * tokens * kept,
        "policy: logits of one chunk": 10 * min(tokens, head_chunk) * shape.head_weights / shape.hidden,
    }
    if not d.activation_checkpointing:
        estimate["policy: kept for the head's gradient"] = wide * tokens * shape.head_weights / shape.hidden
    share = gen.vllm_cfg.gpu_memory_utilization * device_bytes
    budget = gen.vllm_cfg.kv_cache_memory_bytes or share - not_for_kv_cache(cfg, shape)
    estimate["engine: weights"] = gen.engines_per_gpu * wide * shape.total_weights
    estimate["engine: KV cache"] = gen.engines_per_gpu * max(budget, 0)
    return {name: size / GIB for name, size in estimate.items()}


def memory_table(cfg: Config, shape: Shape, device_bytes: int, head_chunk: int) -> list[str]:
    """A table of `memory_estimate`, and a warning if it may not fit, in lines; none without a GPU."""
    if not device_bytes:
        return []
    estimate, colocated = memory_estimate(cfg, shape, device_bytes, head_chunk), cfg.policy.generation.colocated
    policy = sum(size for name, size in estimate.items() if name.startswith("policy"))
    engine = sum(estimate.values()) - policy
    need = policy + engine
    if not colocated.enabled:  # each has GPUs of its own
        need = max(policy, engine)
    elif colocated.sleep:  # they take turns, but master weights and moments stay
        need = max(policy, engine + sum(resident_bytes(cfg, shape).values()) / GIB)
    lines = [f" • memory of a GPU in GiB, estimated; it has {device_bytes / GIB:.0f}"]
    lines += [f"   {size:7.1f}  {name}" for name, size in estimate.items()]
    lines.append(f"   {need:7.1f}  policy {policy:.1f} and engine {engine:.1f}, as far as they are there at once")
    if need > device_bytes / GIB:
        lines.append(f"   This may not fit: {OUT_OF_MEMORY_ADVICE}")
    return lines
