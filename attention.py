"""Attention of a packed micro-batch in which the responses to a prompt share it: three Triton kernels for a GPU.

A sequence here is a prompt or a response. Both attend to themselves, causally; a response also attends to its whole
prompt. One pass computes both parts of the softmax (FlashAttention-2, arXiv:2307.08691, with a second range of keys),
so no partial results have to be joined. Sums have a fixed order: the same inputs give the same bits.

Names: N packed tokens, H heads, KV key-value heads, D head dimension; rows are queries, columns keys. `cu_seqlens`
[sequences + 1], `prompt_of` [sequences] and `cu_answers` [prompts + 1] are those of `model.MicroBatch`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

SPLITS = 8  # programs among which the responses to a prompt are split, for the gradients of its keys and values
BLOCK = 64  # queries, and keys, at a time
STAGES = {"forward": 3, "query": 2, "key": 1}  # of loads in flight; measured on H100, benchmarks/NOTES.md
LOG2_E = tl.constexpr(1.4426950408889634)
COUNTS = ["tokens", "sequences", "prompt_tokens"]  # Triton would compile again when one becomes a multiple of 16


@triton.jit
def load_rows(base, rows, end, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]; zeros from row `end` and column HEAD_DIM on."""
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < end)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, values, rows, end, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < end)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def prompt_range(cu_seqlens, prompt_of, sequence):
    """First token and end of the prompt that a sequence attends to besides itself; equal if there is no prompt."""
    prompt = tl.load(prompt_of + sequence)
    start = tl.load(cu_seqlens + tl.maximum(prompt, 0))
    return start, tl.where(prompt < 0, start, tl.load(cu_seqlens + tl.maximum(prompt, 0) + 1))


@triton.jit
def attend(
    total, weight, top, query, rows, key, value, start, end, stride, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys `start` to `end`: weighted sum of values, sum of weights and largest score so far."""
    for first in range(start, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        scores = tl.dot(query, tl.trans(load_rows(key, columns, end, stride, HEAD_DIM, BLOCK_D))) * (scale * LOG2_E)
        seen = (columns < end)[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        probability, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(probability, 1)
        values = load_rows(value, columns, end, stride, HEAD_DIM, BLOCK_D)
        total = tl.dot(probability.to(values.dtype), values, total * shrink[:, None])
        top = new_top
    return total, weight, top


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    query, key, value, out, sums, cu_seqlens, prompt_of, scale, tokens, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out` and the log2 of the sum of exp2(score) in `sums` [H, N], for BLOCK queries of a sequence and head."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    rows = start + tile * BLOCK + tl.arange(0, BLOCK)
    if start + tile * BLOCK < end:
        kv = head // (HEADS // KV_HEADS) * HEAD_DIM
        total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        weight, top = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
        q = load_rows(query + head * HEAD_DIM, rows, end, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
        prompt_start, prompt_end = prompt_range(cu_seqlens, prompt_of, sequence)
        total, weight, top = attend(
            total, weight, top, q, rows, key + kv, value + kv, prompt_start, prompt_end, KV_HEADS * HEAD_DIM, scale,
            False, HEAD_DIM, BLOCK_D, BLOCK,
        )  # fmt: skip
        until = tl.minimum(end, start + (tile + 1) * BLOCK)
        total, weight, top = attend(
            total, weight, top, q, rows, key + kv, value + kv, start, until, KV_HEADS * HEAD_DIM, scale,
            True, HEAD_DIM, BLOCK_D, BLOCK,
        )  # fmt: skip
        total = total / weight[:, None]
        store_rows(out + head * HEAD_DIM, total, rows, end, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
        tl.store(sums + head * tokens + rows, top + tl.log2(weight), mask=rows < end)


@triton.jit
def add_to_query(
    grad_query, query, grad, sums, delta, rows, key, value, start, end, stride, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of queries from keys `start` to `end`, not yet times the scale of the scores."""
    for first in range(start, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        keys = load_rows(key, columns, end, stride, HEAD_DIM, BLOCK_D)
        values = load_rows(value, columns, end, stride, HEAD_DIM, BLOCK_D)
        seen = (columns < end)[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        scores = tl.where(seen, tl.dot(query, tl.trans(keys)) * (scale * LOG2_E), float("-inf"))
        probability = tl.exp2(scores - sums[:, None])
        grad_score = probability * (tl.dot(grad, tl.trans(values)) - delta[:, None])
        grad_query = tl.dot(grad_score.to(keys.dtype), keys, grad_query)
    return grad_query


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    query, key, value, out, grad, sums, delta, grad_query, cu_seqlens, prompt_of, scale, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`grad_query`, and `delta` [H, N] = grad . out, for BLOCK queries of a sequence and head."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    rows = start + tile * BLOCK + tl.arange(0, BLOCK)
    if start + tile * BLOCK < end:
        kv, stride = head // (HEADS // KV_HEADS) * HEAD_DIM, HEADS * HEAD_DIM
        q = load_rows(query + head * HEAD_DIM, rows, end, stride, HEAD_DIM, BLOCK_D)
        o = load_rows(out + head * HEAD_DIM, rows, end, stride, HEAD_DIM, BLOCK_D)
        g = load_rows(grad + head * HEAD_DIM, rows, end, stride, HEAD_DIM, BLOCK_D)
        d = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        tl.store(delta + head * tokens + rows, d, mask=rows < end)
        s = tl.load(sums + head * tokens + rows, mask=rows < end, other=0.0)
        found = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        prompt_start, prompt_end = prompt_range(cu_seqlens, prompt_of, sequence)
        found = add_to_query(
            found, q, g, s, d, rows, key + kv, value + kv, prompt_start, prompt_end, KV_HEADS * HEAD_DIM, scale,
            False, HEAD_DIM, BLOCK_D, BLOCK,
        )  # fmt: skip
        until = tl.minimum(end, start + (tile + 1) * BLOCK)
        found = add_to_query(
            found, q, g, s, d, rows, key + kv, value + kv, start, until, KV_HEADS * HEAD_DIM, scale,
            True, HEAD_DIM, BLOCK_D, BLOCK,
        )  # fmt: skip
        store_rows(grad_query + head * HEAD_DIM, found * scale, rows, end, stride, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def key_kernel(
    query, key, value, grad, sums, delta, grad_key, grad_value, parts, cu_seqlens, cu_answers, scale,
    sequences, tokens, prompt_tokens, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK keys and values of a sequence and key-value head, from the queries of the sequence itself or
    (program ids from `sequences` on), if it is a prompt, from the queries of a share of the responses to it.

    A response's gradients are then complete. A prompt's are parts of sums, in `parts` [2, SPLITS + 1, prompt_tokens,
    KV, D].
    """
    tile, kv_head, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared = job >= sequences
    sequence = tl.where(shared, (job - sequences) // SPLITS, job)
    split = tl.where(shared, (job - sequences) % SPLITS + 1, 0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    columns = start + tile * BLOCK + tl.arange(0, BLOCK)
    response = start >= prompt_tokens
    end = tl.where(shared & response, start, end)  # `cu_answers` has room for more prompts than there are
    if start + tile * BLOCK < end:
        stride = KV_HEADS * HEAD_DIM
        k = load_rows(key + kv_head * HEAD_DIM, columns, end, stride, HEAD_DIM, BLOCK_D)
        v = load_rows(value + kv_head * HEAD_DIM, columns, end, stride, HEAD_DIM, BLOCK_D)
        found_key = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        found_value = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        row_start, row_end = start + tile * BLOCK, end
        if shared:
            answers = prompt_tokens + tl.load(cu_answers + sequence)
            answers_end = prompt_tokens + tl.load(cu_answers + sequence + 1)
            share = tl.cdiv(tl.cdiv(answers_end - answers, SPLITS), BLOCK) * BLOCK
            row_start = answers + (split - 1) * share
            row_end = tl.minimum(row_start + share, answers_end)
        for head in range(kv_head * (HEADS // KV_HEADS), (kv_head + 1) * (HEADS // KV_HEADS)):
            for first in range(row_start, row_end, BLOCK):
                rows = first + tl.arange(0, BLOCK)
                q = load_rows(query + head * HEAD_DIM, rows, row_end, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
                g = load_rows(grad + head * HEAD_DIM, rows, row_end, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
                s = tl.load(sums + head * tokens + rows, mask=rows < row_end, other=0.0)
                d = tl.load(delta + head * tokens + rows, mask=rows < row_end, other=0.0)
                scores = tl.dot(k, tl.trans(q)) * (scale * LOG2_E)  # [keys, rows]
                # Responses come after their whole prompt, so the causal mask hides nothing of it from them.
                scores = tl.where(columns[:, None] <= rows[None, :], scores, float("-inf"))
                probability = tl.exp2(scores - s[None, :])
                found_value = tl.dot(probability.to(g.dtype), g, found_value)
                grad_score = probability * (tl.dot(v, tl.trans(g)) - d[None, :])
                found_key = tl.dot(grad_score.to(q.dtype), q, found_key)
        found_key *= scale
        if response:
            store_rows(grad_key + kv_head * HEAD_DIM, found_key, columns, end, stride, HEAD_DIM, BLOCK_D)
            store_rows(grad_value + kv_head * HEAD_DIM, found_value, columns, end, stride, HEAD_DIM, BLOCK_D)
        else:
            size = prompt_tokens.to(tl.int64) * stride  # all parts together may have more than 2^31 numbers
            part = parts + split * size + kv_head * HEAD_DIM
            store_rows(part, found_key, columns, end, stride, HEAD_DIM, BLOCK_D)
            part += (SPLITS + 1) * size
            store_rows(part, found_value, columns, end, stride, HEAD_DIM, BLOCK_D)


@functools.cache
def options(kernel: str, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that follow from shapes and device."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    roomy = gpu is not None and gpu.shared_memory_per_block_optin > 160 << 10  # for example A100 and H100
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK": BLOCK,
        "num_warps": 4 if head_dim <= 128 else 8,
        "num_stages": STAGES[kernel] if roomy else 1,
    }


@torch.library.custom_op("grpo::attention", mutates_args=())  # torch.compile does not look inside
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, prompt_of: torch.Tensor,
    max_seqlen: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output [N, H, D] and log2-sums [H, N] for query [N, H, D], key and value [N, KV, D], contiguous."""
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    grid = (triton.cdiv(max_seqlen, BLOCK), query.shape[1], len(prompt_of))
    shapes = options("forward", query.shape[1], key.shape[1], query.shape[2], query.device)
    forward_kernel[grid](query, key, value, out, sums, cu_seqlens, prompt_of, scale, len(query), **shapes)
    return out, sums


@attention.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("grpo::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    sums: torch.Tensor, cu_seqlens: torch.Tensor, prompt_of: torch.Tensor, cu_answers: torch.Tensor,
    prompt_tokens: int, max_seqlen: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query [N, H, D], and of key and value [2, N, KV, D], from that of the output."""
    grad_query, delta = torch.empty_like(query), torch.empty_like(sums)
    grad_both = key.new_empty(2, *key.shape)
    parts = key.new_empty(2, SPLITS + 1, prompt_tokens, *key.shape[1:], dtype=torch.float32)
    shape = query.shape[1], key.shape[1], query.shape[2], query.device
    tiles, sequences, prompts = triton.cdiv(max_seqlen, BLOCK), len(prompt_of), len(cu_answers) - 1
    query_kernel[tiles, query.shape[1], sequences](
        query, key, value, out, grad, sums, delta, grad_query, cu_seqlens, prompt_of, scale, len(query),
        **options("query", *shape),
    )  # fmt: skip
    key_kernel[tiles, key.shape[1], sequences + prompts * SPLITS](
        query, key, value, grad, sums, delta, *grad_both, parts, cu_seqlens, cu_answers, scale,
        sequences, len(query), prompt_tokens, **options("key", *shape), SPLITS=SPLITS,
    )  # fmt: skip
    grad_both[:, :prompt_tokens] = parts.sum(1)
    return grad_query, grad_both


@attention_backward.register_fake
def _(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), key.new_empty(2, *key.shape)


class SharedAttention(torch.autograd.Function):
    """`attention` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor,
        prompt_of: torch.Tensor, cu_answers: torch.Tensor, prompt_tokens: int, max_seqlen: int, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        out, sums = attention(query, key, value, cu_seqlens, prompt_of, max_seqlen, scale)
        ctx.save_for_backward(query, key, value, out, sums, cu_seqlens, prompt_of, cu_answers)
        ctx.numbers = prompt_tokens, max_seqlen, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        grad_query, grad_both = attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        return grad_query, grad_both[0], grad_both[1], *[None] * 6
