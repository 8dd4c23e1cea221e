"""The trained model as one rank sees it: packed sequences in, log-probabilities of the response tokens out.

In this order: how sequences are packed into micro-batches, the attention that keeps them apart, the LM head that never
holds all logits, and how the model is loaded and spread over the ranks (FSDP2, tensor parallel).

Axis suffixes of names: _P prompt, _S sequence, _T response token, _N packed token (prompts and responses), all of one
micro-batch.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from attention import SharedAttention
from config import ConfigError, PolicyCfg

GROUP_WEIGHTS = 1 << 27  # most weights of decoder layers that FSDP gathers and reduces together
HEAD_CHUNK = 4096  # the LM head computes this many response tokens at a time: float32 logits [HEAD_CHUNK, vocabulary]


# ---------------------------------------------------------------- packing


@dataclass
class Sequences:
    """A batch as it travels from the driver: one entry per sequence, no padding.

    `per_token` holds arrays with one value per response token (for instance the engine's log-probabilities),
    `per_sequence` one value per sequence; both reach the loss function by name, the latter repeated per token.
    """

    prompt_ids: list[np.ndarray]
    response_ids: list[np.ndarray]
    per_token: dict[str, list[np.ndarray]]
    per_sequence: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def take(self, indices: list[int]) -> "Sequences":
        return Sequences(
            [self.prompt_ids[i] for i in indices],
            [self.response_ids[i] for i in indices],
            {name: [values[i] for i in indices] for name, values in self.per_token.items()},
            {name: values[indices] for name, values in self.per_sequence.items()},
        )

    def by_prompt(self, limit: int) -> tuple[list[list[int]], list[int]]:
        """Split sequences with the same prompt into parts of at most `limit` tokens (or of one longer sequence).

        Returns the indices of each part's sequences, and each part's number of tokens. A part holds its prompt once:
        three responses of 10 tokens to a prompt of 100 are a part of 130 tokens.
        """
        parts: list[list[int]] = []
        tokens: list[int] = []
        open_part: dict[bytes, int] = {}  # for each prompt the part that its next response may join
        for i, (prompt, response) in enumerate(zip(self.prompt_ids, self.response_ids, strict=True)):
            part = open_part.get(prompt.tobytes())
            if part is None or tokens[part] + len(response) > limit:
                part = open_part[prompt.tobytes()] = len(parts)
                parts.append([])
                tokens.append(len(prompt))
            parts[part].append(i)
            tokens[part] += len(response)
        return parts, tokens


def pack(lengths: list[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """Spread parts over micro-batches: indices of parts as [rank][micro-batch][...].

    A micro-batch has at most `budget` tokens, or one longer part. All ranks must run the same collectives, so each gets
    the same number of micro-batches, of which some may be empty. Parts go into the emptiest micro-batch, the longest
    part first; if a micro-batch overflows, every rank gets one more and the distribution starts again.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    per_rank = max(1, math.ceil(sum(min(n, budget) for n in lengths) / (budget * ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * ranks)]
        load = np.zeros(len(bins), dtype=np.int64)
        for i in longest_first:
            emptiest = int(load.argmin())
            bins[emptiest].append(i)
            load[emptiest] += lengths[i]
        if all(n <= budget or len(b) == 1 for n, b in zip(load, bins, strict=True)):
            break
        per_rank += 1
    by_load = sorted(range(len(bins)), key=lambda b: -load[b])  # micro-batches that run together have similar loads
    return [[bins[b] for b in by_load[rank::ranks]] for rank in range(ranks)]


@dataclass
class MicroBatch:
    """One packed micro-batch on the device: first every prompt once, then the responses, prompt by prompt.

    Two responses, [8 2] and [4], to the prompt [5 6], and one, [9 9 2], to the prompt [7]:

        packed place N      0  1 | 2 | 3  4 | 5 | 6  7  8
        input_ids_N         5  6 | 7 | 8  2 | 4 | 9  9  2
        position_ids_N      0  1 | 0 | 2  3 | 2 | 1  2  3     as if each response stood behind its own prompt
        sequence_T                     0  0   1   2  2  2     which response a token belongs to
        target_T                       8  2   4   9  9  2     what is to be predicted, ...
        predict_T                      1  3   1   2  6  7     ... from the output at this packed place

    The first token of a response is predicted from the last token of its prompt, every other one from the token before.
    `attention` holds what `packed_attention` needs to keep sequences apart, see `attention_layout`.
    """

    input_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    attention: dict[str, Any]
    predict_T: torch.Tensor
    target_T: torch.Tensor
    sequence_T: torch.Tensor
    extras_T: dict[str, torch.Tensor]  # what the loss function gets by name

    @classmethod
    def build(cls, batch: Sequences, device: torch.device, kernels: bool = False) -> "MicroBatch":
        """Pack `batch`, in which sequences with the same prompt are neighbours; for the Triton kernels or without."""
        if not len(batch):
            batch = stand_in(batch)
        prompts, prompt_S = distinct_prompts(batch.prompt_ids)
        length_P = np.array([len(ids) for ids in prompts])
        length_S = np.array([len(ids) for ids in batch.response_ids])
        starts = np.concatenate([[0], np.cumsum(np.concatenate([length_P, length_S]))])  # of prompts, then responses
        end_P, start_S = starts[1 : len(prompts) + 1], starts[len(prompts) : -1]

        sequence_T = np.repeat(np.arange(len(batch)), length_S)
        place_T = np.arange(start_S[0], starts[-1])
        within_T = place_T - start_S[sequence_T]  # how far a token is into its response
        prompt_T = prompt_S[sequence_T]
        positions_N = np.concatenate([*map(np.arange, length_P), length_P[prompt_T] + within_T])
        extras_T = {name: np.concatenate(values) for name, values in batch.per_token.items()}
        extras_T |= {name: values[sequence_T] for name, values in batch.per_sequence.items()}

        def to(x: Any, dtype: torch.dtype | None = None) -> Any:
            tensor = torch.as_tensor(x, dtype=dtype)  # pinned, so that the copy does not wait for what the GPU is doing
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        layout = attention_layout(starts, prompt_S, len(prompts), kernels)
        return cls(
            input_ids_N=to(np.concatenate([*prompts, *batch.response_ids]), torch.int64),
            position_ids_N=to(positions_N, torch.int64),
            attention={name: to(x) if isinstance(x, np.ndarray) else x for name, x in layout.items()},
            predict_T=to(np.where(within_T == 0, end_P[prompt_T] - 1, place_T - 1), torch.int64),
            target_T=to(np.concatenate(batch.response_ids), torch.int64),
            sequence_T=to(sequence_T, torch.int64),
            extras_T={name: to(values, torch.float32) for name, values in extras_T.items()},
        )


def stand_in(batch: Sequences) -> Sequences:
    """One masked sequence for a rank that has none left, so that it runs the same collectives as the others.

    Its prompt and response have two tokens each, since torch.compile would treat a length of one as a case of its own.
    """
    zeros = np.zeros(2, dtype=np.int64)
    per_token = {name: [np.zeros(2)] for name in batch.per_token}
    return Sequences([zeros], [zeros], per_token, {name: np.zeros(1) for name in batch.per_sequence})


def distinct_prompts(prompt_ids: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each prompt once where neighbours have the same one, and for each sequence [S] the number of its prompt."""
    prompts: list[np.ndarray] = []
    prompt_S = []
    for ids in prompt_ids:
        if not prompts or not np.array_equal(ids, prompts[-1]):
            prompts.append(ids)
        prompt_S.append(len(prompts) - 1)
    return prompts, np.array(prompt_S)


def attention_layout(starts: np.ndarray, prompt_S: np.ndarray, num_prompts: int, kernels: bool) -> dict[str, Any]:
    """Which tokens may see which. A part is a prompt or a response; part i begins at packed place `starts[i]`.

    A token sees the tokens of its own part up to itself, and a response's token also all of its prompt. Without the
    kernels that is a mask [N, N]. The kernels take the parts instead: where each begins (`cu_seqlens`), the prompt of
    each (`prompt_of`, -1 for a prompt itself), where the responses to each prompt begin, counted from the first
    response on (`cu_answers`), the number of prompt tokens, and the tokens of the longest part.
    """
    prompt_of = np.concatenate([np.full(num_prompts, -1), prompt_S])
    if not kernels:
        part_N = np.repeat(np.arange(len(prompt_of)), np.diff(starts))
        own_NN = (part_N[:, None] == part_N) & np.tri(len(part_N), dtype=bool)
        return {"mask_NN": own_NN | (prompt_of[part_N][:, None] == part_N)}
    prompt_tokens = starts[num_prompts]
    first_S = np.searchsorted(prompt_S, np.arange(num_prompts))  # each prompt's first response
    return {
        "cu_seqlens": starts.astype(np.int32),
        "prompt_of": prompt_of.astype(np.int32),
        "cu_answers": np.append(starts[num_prompts + first_S], starts[-1]).astype(np.int32) - np.int32(prompt_tokens),
        "prompt_tokens": int(prompt_tokens),
        "max_seqlen": int(np.diff(starts).max()),
    }


# ---------------------------------------------------------------- attention and LM head


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    mask_NN: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    prompt_of: torch.Tensor | None = None,
    cu_answers: torch.Tensor | None = None,
    prompt_tokens: int = 0,
    max_seqlen: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within sequences, as Hugging Face calls it. query [1, heads, N, head_dim] to [1, N, heads, head_dim].

    With `mask_NN` torch computes all N x N scores: right for the CPU's short batches and for float32. Otherwise the
    kernels of attention.py skip what is masked, see `attention_layout` for their arguments. `supported.py` has refused
    models that ask for anything else, such as a sliding window.
    """
    if mask_NN is not None:
        gqa = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, mask_NN, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2), None
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [N, heads, head_dim]
    places = (cu_seqlens, prompt_of, cu_answers, prompt_tokens, max_seqlen)
    return SharedAttention.apply(query, key, value, *places, scaling)[None], None


AttentionInterface.register("packed", packed_attention)


@functools.cache
def fused(function: Callable) -> Callable:
    """`function` compiled into one GPU kernel, so that its operations need not each read and write memory."""
    return torch.compile(function, dynamic=True)


def chunk_logprobs(
    logits_TV: torch.Tensor, target_T: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the logarithm of the softmax's denominator, both [T], in float32.

    The softmax is written out, so that torch.compile recognises it and reads the logits once.
    """
    logits_TV = logits_TV / temperature
    top = logits_TV.amax(-1, keepdim=True)
    log_sum = top + (logits_TV - top).exp().sum(-1, keepdim=True).log()
    return (logits_TV.gather(-1, target_T[:, None]) - log_sum)[:, 0], log_sum[:, 0]


def chunk_gradient(
    logits_TV: torch.Tensor, target_T: torch.Tensor, log_sum_T: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """Probability of each token, less 1 at the target: [T, V], in `dtype`.

    This is minus temperature times the derivative of the log-probability by the logits. The 1 is subtracted in float32,
    because a probability near 1 rounded to bfloat16 first would lose the difference.
    """
    probability_TV = (logits_TV / temperature - log_sum_T[:, None]).exp()
    at_target_TV = torch.arange(logits_TV.shape[1], device=logits_TV.device) == target_T[:, None]
    return torch.where(at_target_TV, probability_TV - 1, probability_TV).to(dtype)


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, without ever holding the float32 logits of all tokens.

    LM head and softmax run on HEAD_CHUNK tokens at a time. The backward pass needs `chunk_gradient`'s result: it is
    kept in the type of the hidden states, or computed again to save memory. Logits are summed and kept in float32
    whatever the type of the inputs: rounding them to bfloat16 (in steps of 1/16 around a logit of 10) costs more
    precision than all other rounding together. The gradient of the head is summed over the chunks in float32 too.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_T: torch.Tensor, temperature: float, keep: bool
    ) -> torch.Tensor:
        """hidden [T, D], weight [V, D] to log-probabilities [T]. `keep`: keep [T, V] for the backward pass."""
        function = fused(chunk_logprobs) if hidden.is_cuda else chunk_logprobs
        found, kept = [], []
        for part in TokenLogprobs.chunks(len(hidden)):
            logits_TV = TokenLogprobs.logits(hidden[part], weight)
            found.append(function(logits_TV, target_T[part].clone(), temperature))
            if keep:
                log_sum_T = found[-1][1]
                kept.append(TokenLogprobs.gradient(logits_TV, target_T[part], log_sum_T, temperature, hidden.dtype))
        logprobs_T, log_sum_T = (torch.cat(x) for x in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, target_T, log_sum_T, *kept)
        ctx.temperature = temperature
        return logprobs_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden, weight, target_T, log_sum_T, *kept = ctx.saved_tensors
        scale = (-grad_T / ctx.temperature)[:, None]  # [T, 1]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for i, part in enumerate(TokenLogprobs.chunks(len(hidden))):
            if kept:
                grad_TV = kept[i]
            else:
                logits_TV = TokenLogprobs.logits(hidden[part], weight)
                grad_TV = TokenLogprobs.gradient(
                    logits_TV, target_T[part], log_sum_T[part], ctx.temperature, hidden.dtype
                )
            grad_hidden[part] = (grad_TV @ weight) * scale[part]
            add_float32_product(grad_weight, grad_TV.t(), (hidden[part] * scale[part]).to(hidden.dtype))
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None

    @staticmethod
    def gradient(
        logits_TV: torch.Tensor, target_T: torch.Tensor, log_sum_T: torch.Tensor, temperature: float, dtype: torch.dtype
    ) -> torch.Tensor:
        function = fused(chunk_gradient) if logits_TV.is_cuda else chunk_gradient
        return function(logits_TV, target_T.clone(), log_sum_T.clone(), temperature, dtype)

    @staticmethod
    def chunks(tokens: int) -> list[slice]:
        """Slices of at most HEAD_CHUNK tokens, as even as possible.

        Callers clone what they cut with these for a compiled function: torch.compile also looks at the tensor behind a
        view, and would compile again for a second chunk or for a chunk of one token.
        """
        count = max(1, math.ceil(tokens / HEAD_CHUNK))
        bounds = [tokens * i // count for i in range(count + 1)]
        return [slice(start, end) for start, end in itertools.pairwise(bounds)]

    @staticmethod
    def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """float32 [T, V]. The vocabulary's size is marked as fixed, which makes the compiled functions faster."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits_TV = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            logits_TV = hidden.float() @ weight.t().float()
        torch._dynamo.mark_static(logits_TV, 1)
        return logits_TV


def token_entropy(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy [T], in nats, of the distributions that hidden [T, D] and the head's weight [V, D] give, with gradient.

    It takes HEAD_CHUNK tokens at a time and computes their logits again in the backward pass, in the type of `hidden`.
    """

    def of_chunk(part: torch.Tensor) -> torch.Tensor:
        logprobs_TV = ((part @ weight.t()).float() / temperature).log_softmax(-1)
        return -(logprobs_TV.exp() * logprobs_TV).sum(-1)

    parts = [hidden[part] for part in TokenLogprobs.chunks(len(hidden))]
    return torch.cat([checkpoint(of_chunk, part, use_reentrant=False) for part in parts])


def add_float32_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()


# ---------------------------------------------------------------- the model on its ranks


class LogprobModel(nn.Module):
    """A Hugging Face causal LM whose forward pass returns facts about the response tokens, never all logits.

    It is one module, so that FSDP gathers embedding, final norm and LM head (tied or not) for the whole forward pass.
    """

    def __init__(self, lm: nn.Module, keep_logits: bool):
        """`keep_logits`: spend memory to save time in the backward pass, see `TokenLogprobs`."""
        super().__init__()
        self.lm, self.keep_logits = lm, keep_logits

    def forward(
        self, mb: MicroBatch, temperature: float, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In float32, after temperature: log-probabilities [T] of `mb.target_T`, and entropies [T] if asked for."""
        keep = self.keep_logits and torch.is_grad_enabled()
        hidden, weight = packed_hidden(self.lm, mb), self.lm.lm_head.weight
        logprobs_T = TokenLogprobs.apply(hidden, weight, mb.target_T, temperature, keep)
        return logprobs_T, token_entropy(hidden, weight, temperature) if with_entropy else None


def packed_hidden(lm: nn.Module, mb: MicroBatch) -> torch.Tensor:
    """The last hidden states [T, hidden] that predict response tokens: the LM head runs on these only."""
    places = {"input_ids": mb.input_ids_N[None], "position_ids": mb.position_ids_N[None]}
    hidden = lm.base_model(**places, use_cache=False, **mb.attention).last_hidden_state[0]  # [N, hidden]
    return hidden[mb.predict_T]


def build_model(cfg: PolicyCfg, mesh: Any, device: torch.device) -> LogprobModel:
    """`cfg.model_name` in float32, sharded: tensor parallel over mesh["tp"], FSDP2 over mesh["dp"].

    No rank ever holds more than its shards and one weight: the model is built without numbers, split, and then filled.
    """
    config, d = AutoConfig.from_pretrained(cfg.model_name), cfg.dtensor_cfg
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="packed")
    with suppress(OSError):  # not every model has a generation configuration
        lm.generation_config = GenerationConfig.from_pretrained(cfg.model_name)
    # An embedding gives its padding token no gradient. Nothing is padded here, and in many models the padding token is
    # also the end token, whose embedding is to be trained.
    lm.get_input_embeddings().padding_idx = None
    switch_off_dropout(lm)
    if mesh["tp"].size() > 1:
        parallelize(lm, mesh["tp"])
    if d.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    shard = {
        "mesh": mesh["dp"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.precision), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if d.cpu_offload else OffloadPolicy(),
        "reshard_after_forward": d.reshard_after_forward,
    }
    model = LogprobModel(lm, keep_logits=not d.activation_checkpointing)
    layers = list(lm.base_model.layers)
    if d.compile_layers:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    # Each group of layers costs FSDP's hooks and collectives. If gathered weights stay anyway, small layers share a
    # group, and a small model is one group as a whole: FSDP runs the hooks of a list once for each layer in it.
    size = sum(p.numel() for p in layers[0].parameters())
    many = 1 if d.reshard_after_forward or d.activation_checkpointing else max(1, GROUP_WEIGHTS // size)
    for start in range(0, len(layers), many) if many < len(layers) else ():
        fully_shard(layers[start : start + many], **shard)
    fully_shard(model, **shard)
    model.to_empty(device="cpu" if d.cpu_offload else device)
    lm.tie_weights()
    load_weights(lm, cfg.model_name, device)
    return model


def load_weights(lm: nn.Module, model_name: str, device: torch.device) -> None:
    """Read this rank's part of each weight and buffer from the model's safetensors files, whatever their precision.

    Raises ConfigError if a weight is not in them.
    """
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    for weight in lm.parameters():
        weight._is_hf_initialized = True
    lm.initialize_weights()  # only buffers, since the files lack some of them, such as rotary frequencies
    folder = model_name
    if not Path(folder).is_dir():
        folder = snapshot_download(model_name, allow_patterns=["*.safetensors"])
    reader = dcp.HuggingFaceStorageReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    wanted = revert_weight_conversion(lm, tensors_of(lm))  # the files of a few types have other names
    missing = [
        name
        for name, tensor in wanted.items()
        if isinstance(tensor, nn.Parameter) and (name not in stored or stored[name].size != tensor.shape)
    ]
    if missing:
        raise ConfigError(
            f"policy.model_name='{model_name}': {len(missing)} of the model's weights are not in its safetensors files "
            f"or have another size there, such as {missing[0]}"
        )
    found = {name: tensor for name, tensor in wanted.items() if name in stored}
    with warnings.catch_warnings(action="ignore"):  # it warns that there is no process group
        dcp.load(found, storage_reader=reader, no_dist=True)


def tensors_of(lm: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint has, by Hugging Face name: weights (a tied head once, as the embedding) and buffers."""
    names = lm.state_dict().keys()  # buffers that are not here are computed when a model is built
    return dict(lm.named_parameters()) | {name: buffer for name, buffer in lm.named_buffers() if name in names}


def switch_off_dropout(lm: nn.Module) -> None:
    """Set every dropout to 0: it would change log-probabilities from pass to pass, and ratios would mean nothing.

    Hugging Face's layers have dropout as a module, or as a number that they pass to a function.
    """
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def parallelize(lm: nn.Module, mesh: Any) -> None:
    """Tensor parallel by the plan in the Hugging Face configuration, which supported.py has looked at."""
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = lm.config.base_model_tp_plan
    parallelize_module(lm.base_model, mesh, {name: styles[s]() for name, s in plan.items() if s in styles})


def add_partial_gradients(lm: nn.Module, mesh: Any) -> None:
    """Sum the gradients of norms inside the attention over the tensor-parallel ranks: each saw its own heads only.

    The plan in the Hugging Face configuration says which norms these are.
    """
    plan = lm.config.base_model_tp_plan if mesh.size() > 1 else {}
    for pattern, style in plan.items():
        if style == "replicated_with_grad_allreduce":
            for layer in lm.base_model.layers:
                grad = layer.get_submodule(pattern.split("*.")[1]).weight.grad
                dist.all_reduce(grad.to_local(), group=mesh.get_group())
