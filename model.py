"""The trained model as one rank sees it: packed sequences in, log-probabilities of the response tokens out.

Packing, where the answers to a prompt share it; attention that does not cross sequences; an LM head that runs in
chunks; sharding (FSDP2, tensor parallel). Axis suffixes of names: _S sequence, _U prompt of a micro-batch, _N packed
token of a micro-batch (prompts and responses), _T response token.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AttentionInterface, AutoModelForCausalLM

from attention import SharedAttention
from config import PolicyCfg

GROUP_WEIGHTS = 1 << 27  # of decoder layers that FSDP gathers and reduces together, at most
HEAD_CHUNK = 4096  # response tokens per slice of the LM head: bounds the float32 logits [HEAD_CHUNK, vocabulary]


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
        """Indices of sequences with the same prompt, together in parts of at most `limit` tokens (or one sequence), and
        the tokens of each part. A part needs its prompt only once."""
        parts: list[list[int]] = []
        tokens: list[int] = []
        newest: dict[bytes, int] = {}  # part of each prompt
        for i, (prompt, response) in enumerate(zip(self.prompt_ids, self.response_ids, strict=True)):
            part = newest.get(prompt.tobytes())
            if part is None or tokens[part] + len(response) > limit:
                part = newest[prompt.tobytes()] = len(parts)
                parts.append([])
                tokens.append(len(prompt))
            parts[part].append(i)
            tokens[part] += len(response)
        return parts, tokens


def pack(lengths: list[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """Indices of parts as [rank][micro-batch][...]: at most `budget` tokens each, as many on each rank, balanced.

    Longest first into the emptiest micro-batch; when one overflows, every rank gets one more. A part longer than the
    budget has a micro-batch to itself. With fewer parts than micro-batches some are empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    per_rank = max(1, math.ceil(sum(min(n, budget) for n in lengths) / (budget * ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * ranks)]
        load = np.zeros(len(bins), dtype=np.int64)
        for i in order:
            emptiest = int(load.argmin())
            bins[emptiest].append(i)
            load[emptiest] += lengths[i]
        if all(n <= budget or len(b) == 1 for n, b in zip(load, bins, strict=True)):
            break
        per_rank += 1
    by_load = sorted(range(len(bins)), key=lambda b: -load[b])  # neighbours in load run at the same time
    return [[bins[b] for b in by_load[rank::ranks]] for rank in range(ranks)]


@dataclass
class MicroBatch:
    """One packed micro-batch on the device: first the prompts, each once, then the responses, prompt by prompt.

    `predict_T` points at the position whose output predicts each token. `attention` is what `packed_attention` needs
    to know of where things lie:
    - cu_seqlens: int32 [prompts + sequences + 1], where each prompt, then each response starts
    - prompt_of: int32 [prompts + sequences], the number of each response's prompt; -1 for a prompt
    - cu_answers: int32 [prompts + 1], where the responses to each prompt start, counted from the first of all
    - prompt_tokens: of all prompts; max_seqlen: of the longest prompt or response
    - without the kernels also whole_SL [sequences, longest]: where the tokens of each whole sequence lie; row_N,
      column_N: the reverse, for a prompt in the first of its sequences

    With `round_up` a further prompt and responses to it, which nothing looks at, fill both up to round numbers of
    tokens, so that few shapes occur (for cuda_graph.py); `sequence_T` and `extras_T` are without them.
    """

    input_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    attention: dict[str, Any]
    predict_T: torch.Tensor
    target_T: torch.Tensor
    sequence_T: torch.Tensor
    extras_T: dict[str, torch.Tensor]

    def inputs(self) -> list[torch.Tensor]:
        """What the model reads, for the kernels."""
        places = [value for value in self.attention.values() if isinstance(value, torch.Tensor)]
        return [self.input_ids_N, self.position_ids_N, self.predict_T, self.target_T, *places]

    def shape(self) -> tuple[int, ...]:
        """All that those of another must share to take the place of these."""
        numbers = [value for value in self.attention.values() if isinstance(value, int)]
        return *(len(tensor) for tensor in self.inputs()), *numbers

    @classmethod
    def build(
        cls, batch: Sequences, device: torch.device, kernels: bool = False, round_up: bool = False
    ) -> "MicroBatch":
        """Pack `batch`, for the kernels of attention.py or without; neighbours with the same prompt share it. An empty
        one becomes two masked tokens (of one torch.compile would make a special case), so that every rank runs the
        same collectives."""
        if not len(batch):
            zeros = np.zeros(2, dtype=np.int64)
            batch = Sequences(
                [zeros],
                [zeros],
                {k: [np.zeros(2)] for k in batch.per_token},
                {k: np.zeros(1) for k in batch.per_sequence},
            )
        responses = list(batch.response_ids)
        new_S = [i == 0 or not np.array_equal(p, batch.prompt_ids[i - 1]) for i, p in enumerate(batch.prompt_ids)]
        prompts = [p for p, new in zip(batch.prompt_ids, new_S, strict=True) if new]
        real = sum(map(len, responses))
        max_seqlen = max(map(len, [*prompts, *responses]))
        if round_up:
            max_seqlen = fill_up(prompts, responses)
            new_S += [i == 0 for i in range(len(responses) - len(new_S))]
        unit_S = np.cumsum(new_S) - 1
        prompt_U, response_S = np.array([len(p) for p in prompts]), np.array([len(r) for r in responses])
        starts = np.concatenate([[0], np.cumsum(np.concatenate([prompt_U, response_S]))])
        prompt_at_U, response_at_S, prompt_tokens = starts[: len(prompts)], starts[len(prompts) : -1], prompt_U.sum()
        answers_U = np.bincount(unit_S, weights=response_S).astype(np.int64)

        ids = np.concatenate([*prompts, *responses])
        sequence_T = np.repeat(np.arange(len(responses)), response_S)
        within_T = prompt_tokens + np.arange(len(sequence_T)) - response_at_S[sequence_T]
        prompt_S = prompt_U[unit_S]
        within_N = np.arange(prompt_tokens) - np.repeat(prompt_at_U, prompt_U)
        positions = np.concatenate([within_N, prompt_S[sequence_T] + within_T])
        before_T = np.arange(prompt_tokens, len(ids)) - 1
        last_of_prompt_T = (prompt_at_U + prompt_U)[unit_S][sequence_T] - 1
        extras = {name: np.concatenate(values) for name, values in batch.per_token.items()}
        extras |= {name: values[sequence_T[:real]] for name, values in batch.per_sequence.items()}

        def to(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            tensor = torch.as_tensor(x, dtype=dtype)
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        position_ids_N = to(positions, torch.int64)
        prompt_of, cu_answers = np.concatenate([[-1] * len(prompts), unit_S]), np.concatenate([[0], answers_U.cumsum()])
        if round_up:  # sequences of no tokens follow
            more = power_of_four(len(starts)) - len(starts)
            starts, prompt_of = (np.pad(x, (0, more), "edge") for x in (starts, prompt_of))
            cu_answers = np.pad(cu_answers, (0, power_of_four(len(cu_answers)) - len(cu_answers)), "edge")
        attention = {
            "cu_seqlens": to(starts, torch.int32),
            "prompt_of": to(prompt_of, torch.int32),
            "cu_answers": to(cu_answers, torch.int32),
            "prompt_tokens": int(prompt_tokens),
            "max_seqlen": int(max_seqlen),
        }
        if not kernels:
            whole_SL = whole_sequences(prompt_at_U[unit_S], response_at_S, prompt_S, response_S)
            row_N = np.concatenate([np.repeat(np.flatnonzero(new_S), prompt_U), sequence_T])
            attention |= {"whole_SL": to(whole_SL, torch.int64), "row_N": to(row_N, torch.int64)}
            attention["column_N"] = position_ids_N
        return cls(
            input_ids_N=to(ids, torch.int64),
            position_ids_N=position_ids_N,
            attention=attention,
            predict_T=to(np.where(within_T == 0, last_of_prompt_T, before_T), torch.int64),
            target_T=to(ids[prompt_tokens:], torch.int64),
            sequence_T=to(sequence_T[:real], torch.int64),
            extras_T={name: to(values, torch.float32) for name, values in extras.items()},
        )


def whole_sequences(
    prompt_at_S: np.ndarray, response_at_S: np.ndarray, prompt_S: np.ndarray, response_S: np.ndarray
) -> np.ndarray:
    """Places [S, longest] of the tokens of each prompt and response, of which starts and lengths are given; 0 after the
    end."""
    column_L = np.arange((prompt_S + response_S).max())[None]
    prompt_SL = prompt_at_S[:, None] + column_L
    response_SL = (response_at_S - prompt_S)[:, None] + column_L
    whole_SL = np.where(column_L < prompt_S[:, None], prompt_SL, response_SL)
    whole_SL[column_L >= (prompt_S + response_S)[:, None]] = 0
    return whole_SL


def fill_up(prompts: list[np.ndarray], responses: list[np.ndarray]) -> int:
    """Add a prompt, and responses to it, that make the tokens of both round numbers, of tokens as they are there
    already. Returns the most tokens that one may have in such a shape."""
    longest, fill = max(map(len, [*prompts, *responses])), missing(sum(map(len, responses)))
    prompts.append(np.resize(prompts[0], missing(sum(map(len, prompts)))))
    longest = power_of_two(max(longest, quantum(sum(map(len, prompts)))))
    responses += [np.resize(responses[0], min(longest, fill - start)) for start in range(0, fill, longest)]
    return longest


def quantum(tokens: int) -> int:
    """Of which round numbers near `tokens` are multiples: two of them an octave, none below 128."""
    return 1 << max(7, int(tokens).bit_length() - 2)


def missing(tokens: int) -> int:
    """To the next round number, at least 1."""
    return quantum(tokens) - tokens % quantum(tokens)


def power_of_two(n: int) -> int:
    """The next one, or `n`."""
    return 1 << (int(n) - 1).bit_length()


def power_of_four(n: int) -> int:
    """The next one, or `n`."""
    return 4 ** -(-(int(n) - 1).bit_length() // 2)


# ---------------------------------------------------------------- model


@functools.cache
def fused(function: Callable) -> Callable:
    """For a GPU, where element by element memory traffic would take longer than arithmetic."""
    return torch.compile(function, dynamic=True)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seqlens: torch.Tensor,
    prompt_of: torch.Tensor,
    cu_answers: torch.Tensor,
    prompt_tokens: int,
    max_seqlen: int,
    whole_SL: torch.Tensor | None = None,
    row_N: torch.Tensor | None = None,
    column_N: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention that does not cross sequences. query [1, heads, N, head_dim] to output [1, N, heads, head_dim].

    Without `whole_SL` the kernels of attention.py run. Otherwise whole sequences are padded on the right into a
    [S, heads, longest, head_dim] batch, where a causal mask never lets a real token see padding.
    """
    if sliding_window is not None:
        raise NotImplementedError(
            f"{type(module).__name__} has sliding-window attention, which packing does not do yet"
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, head_dim]
    if whole_SL is None:
        query, key, value = (x.contiguous() for x in (query, key, value))
        places = (cu_seqlens, prompt_of, cu_answers, prompt_tokens, max_seqlen)
        return SharedAttention.apply(query, key, value, *places, scaling)[None], None
    out = F.scaled_dot_product_attention(
        *(x[whole_SL].transpose(1, 2) for x in (query, key, value)),
        is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)[row_N, column_N][None], None


AttentionInterface.register("packed", packed_attention)


def chunk_logprobs(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [T] of the targets [T] under float32 logits [T, vocabulary], and the log of the sums [T].

    Written so that torch.compile knows a softmax when it sees one, and reads the logits once.
    """
    logits = logits / temperature
    top = logits.amax(-1, keepdim=True)
    sums = top + (logits - top).exp().sum(-1, keepdim=True).log()
    return (logits.gather(-1, target[:, None]) - sums)[:, 0], sums[:, 0]


def chunk_gradient(
    logits: torch.Tensor, target: torch.Tensor, sums: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """Probability less one at the target, [T, vocabulary]: minus temperature x d log-probability / d logit.

    The one goes off in float32: near a probability of 1 the difference would not survive rounding to bfloat16.
    """
    probability = (logits / temperature - sums[:, None]).exp()
    at_target = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return torch.where(at_target, probability - 1, probability).to(dtype)


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, without keeping any float32 logits.

    LM head and softmax run on HEAD_CHUNK tokens at a time. For the backward pass they either run again, or what it
    needs of them is kept, in the type of the hidden states. Logits are float32 sums in float32 whatever the inputs'
    type: rounding them to bfloat16 (steps of 1/16 at a logit of 10) costs more than all other rounding together. The
    head's gradient is summed over the chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, temperature: float, keep: bool
    ) -> torch.Tensor:
        """hidden [T, D], weight [V, D], target [T] to [T]. `keep`: [T, V] for the backward pass."""
        function = fused(chunk_logprobs) if hidden.is_cuda else chunk_logprobs
        found, kept = [], []
        for part in TokenLogprobs.chunks(len(hidden)):
            logits = TokenLogprobs.logits(hidden[part], weight)
            found.append(function(logits, target[part].clone(), temperature))
            if keep:
                kept.append(TokenLogprobs.gradient(logits, target[part], found[-1][1], temperature, hidden.dtype))
        logprobs, sums = (torch.cat(x) for x in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, target, sums, *kept)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden, weight, target, sums, *kept = ctx.saved_tensors
        grad = (-grad / ctx.temperature)[:, None]  # [T, 1]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for i, part in enumerate(TokenLogprobs.chunks(len(hidden))):
            if kept:
                difference = kept[i]
            else:
                logits = TokenLogprobs.logits(hidden[part], weight)
                difference = TokenLogprobs.gradient(logits, target[part], sums[part], ctx.temperature, hidden.dtype)
            grad_hidden[part] = (difference @ weight) * grad[part]
            add_float32_product(grad_weight, difference.t(), (hidden[part] * grad[part]).to(hidden.dtype))
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None

    @staticmethod
    def gradient(
        logits: torch.Tensor, target: torch.Tensor, sums: torch.Tensor, temperature: float, dtype: torch.dtype
    ) -> torch.Tensor:
        function = fused(chunk_gradient) if logits.is_cuda else chunk_gradient
        return function(logits, target.clone(), sums.clone(), temperature, dtype)

    @staticmethod
    def chunks(tokens: int) -> list[slice]:
        """At most HEAD_CHUNK tokens each and as even as can be. What torch.compile gets of them is copied: of a view it
        looks at the whole too, and would compile again where there is a second chunk, or one of a single token."""
        count = max(1, math.ceil(tokens / HEAD_CHUNK))
        bounds = [tokens * i // count for i in range(count + 1)]
        return [slice(start, end) for start, end in itertools.pairwise(bounds)]

    @staticmethod
    def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """float32 [T, V]; functions are compiled for this V: they sum in one pass, and divide places by a constant."""
        logits = float32_product(hidden, weight.t())
        torch._dynamo.mark_static(logits, 1)
        return logits


def float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with float32 sums and float32 result."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_float32_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()


class LogprobModel(nn.Module):
    """A Hugging Face causal LM whose forward returns log-probabilities of chosen tokens, never the whole logits.

    One module, so that FSDP gathers embedding, final norm and LM head (tied or not) around the whole forward pass.
    """

    def __init__(self, lm: nn.Module, keep_logits: bool):
        """`keep_logits`: for the backward pass, see `TokenLogprobs`."""
        super().__init__()
        self.lm, self.keep_logits = lm, keep_logits

    def forward(self, mb: MicroBatch, temperature: float) -> torch.Tensor:
        """Log-probabilities [T] of `mb.target_T` in float32, after temperature."""
        hidden = self.lm.base_model(
            input_ids=mb.input_ids_N[None],
            position_ids=mb.position_ids_N[None],
            use_cache=False,
            **mb.attention,
        ).last_hidden_state[0]  # [N, hidden]
        hidden = hidden[mb.predict_T]  # [T, hidden]: the LM head runs on response tokens only
        keep = self.keep_logits and torch.is_grad_enabled()
        return TokenLogprobs.apply(hidden, self.lm.lm_head.weight, mb.target_T, temperature, keep)


def build_model(cfg: PolicyCfg, mesh: Any, device: torch.device) -> LogprobModel:
    """Load `cfg.model_name` in float32 and shard it: tensor parallel over mesh["tp"], FSDP2 over mesh["dp"]."""
    lm = AutoModelForCausalLM.from_pretrained(cfg.model_name, dtype=torch.float32, attn_implementation="packed")
    scaled = [k for k in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(lm.config, k, None)]
    if scaled or lm.lm_head.bias is not None:
        raise NotImplementedError(
            f"{cfg.model_name}: logits with {scaled or 'a bias'} are not what LogprobModel computes"
        )
    # Nothing is padded here, and where the padding token is the end token, that would not learn as an input.
    lm.get_input_embeddings().padding_idx = None
    d = cfg.dtensor_cfg
    lm.to(device if not d.cpu_offload else "cpu").train()
    if mesh["tp"].size() > 1:
        parallelize(lm, mesh["tp"])
    if d.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    compute = getattr(torch, cfg.precision)
    shard = {
        "mesh": mesh["dp"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if d.cpu_offload else OffloadPolicy(),
        "reshard_after_forward": d.reshard_after_forward,
    }
    model = LogprobModel(lm, keep_logits=not d.activation_checkpointing)
    layers = list(lm.base_model.layers)
    if d.compile_layers:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    # Where nothing is freed between forward and backward, small layers share a group: fewer hooks and collectives. All
    # of a small model are in that of the whole: a list as group runs its hook after the backward pass for each member.
    size = sum(p.numel() for p in layers[0].parameters())
    many = 1 if d.reshard_after_forward or d.activation_checkpointing else max(1, GROUP_WEIGHTS // size)
    for start in range(0, len(layers), many) if many < len(layers) else ():
        fully_shard(layers[start : start + many], **shard)
    fully_shard(model, **shard)
    return model


def parallelize(lm: nn.Module, mesh: Any) -> None:
    """Tensor parallel by the plan in the Hugging Face configuration. Raises ValueError if heads do not divide."""
    heads = lm.config.num_key_value_heads
    if heads % mesh.size():
        raise ValueError(
            f"policy.dtensor_cfg.tensor_parallel_size={mesh.size()} does not divide {heads} key-value heads"
        )
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = lm.config.base_model_tp_plan
    parallelize_module(lm.base_model, mesh, {name: styles[s]() for name, s in plan.items() if s in styles})


def add_partial_gradients(lm: nn.Module, mesh: Any) -> None:
    """Add up over tensor-parallel ranks the gradients of norms inside the attention, which saw their own heads only."""
    plan = lm.config.base_model_tp_plan if mesh.size() > 1 else {}
    for pattern, style in plan.items():
        if style == "replicated_with_grad_allreduce":
            for layer in lm.base_model.layers:
                grad = layer.get_submodule(pattern.split("*.")[1]).weight.grad
                dist.all_reduce(grad.to_local(), group=mesh.get_group())
