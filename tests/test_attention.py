"""The kernels of shared-prompt attention against torch's attention with a mask over all tokens: values and gradients.

On a machine without a GPU Triton's interpreter runs them (conftest.py).
"""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy import counts, free_address, random_batch

from attention import BLOCK, SharedAttention
from config import load_config
from model import MicroBatch, Sequences, packed_attention
from policy import PolicyWorker
from train_grpo import grpo_loss

pytestmark = pytest.mark.slow

PLACES = ("cu_seqlens", "prompt_of", "cu_answers", "prompt_tokens", "max_seqlen")


def micro_batches(answer_tokens: list[tuple[int, list[int]]]) -> list[MicroBatch]:
    """The lengths of each prompt and of the answers to it, packed for the kernels and for a mask over all tokens."""
    rng = np.random.default_rng(0)
    prompts = [(rng.integers(0, 9, n), answers) for n, answers in answer_tokens]
    rows = [(prompt, rng.integers(0, 9, n)) for prompt, answers in prompts for n in answers]
    batch = Sequences(*map(list, zip(*rows, strict=True)), {}, {}) if rows else Sequences([], [], {}, {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [MicroBatch.build(batch, device, kernels=kernels) for kernels in (True, False)]


def shared(q, k, v, places):
    """From and to the layout of `packed_attention`."""
    packed = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    return SharedAttention.apply(*packed, *(places[name] for name in PLACES), 0.3)[None]


def masked(q, k, v, places):
    return packed_attention(torch.nn.Module(), q, k, v, None, 0.3, **places)[0]


def values_and_gradients(function, mb, dtype=torch.float32, head_dim=8, heads=(6, 2)):
    """Output and gradients of query, key and value, of random numbers that `dtype` can hold."""
    torch.manual_seed(0)
    device, (query_heads, kv_heads), n = mb.input_ids_N.device, heads, len(mb.input_ids_N)
    q, k, v = (torch.randn(1, h, n, head_dim).bfloat16().to(device, dtype) for h in (query_heads, kv_heads, kv_heads))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = function(q, k, v, mb.attention)
    (out.float() * torch.randn(out.shape).to(device)).sum().backward()
    return [x.detach().float().cpu() for x in (out, q.grad, k.grad, v.grad)]


# No key, one, a block, and more than that; answers of several blocks, and more of them than programs that share them.
SHAPES = [
    [(7, [3, 9, 1]), (1, [4]), (12, [2, 6])],
    [(BLOCK, [BLOCK, 1]), (BLOCK + 1, [2 * BLOCK + 3]), (2 * BLOCK, [5])],
    [(70, [40] * 12)],
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU multiplies float32 in TF32")
@pytest.mark.parametrize("lengths", SHAPES)
def test_equals_masked_attention(lengths):
    mine, whole = micro_batches(lengths)
    results = values_and_gradients(shared, mine), values_and_gradients(masked, whole)
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU multiplies float32 in TF32")
@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.lists(st.integers(1, 100), min_size=1, max_size=4)), max_size=2),
    st.sampled_from([(1, 1), (4, 4), (3, 1)]),
    st.sampled_from([16, 24]),
)
def test_equals_masked_attention_whatever_the_lengths(lengths, heads, head_dim):
    mine, whole = micro_batches(lengths)
    shape = {"heads": heads, "head_dim": head_dim}
    results = values_and_gradients(shared, mine, **shape), values_and_gradients(masked, whole, **shape)
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_compiles_once():
    """Whatever is in a micro-batch, an empty one included; and computes the same."""
    # Where a run's layers are compiled, on a GPU, inductor makes the kernels; on a CPU it would take a minute.
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    compilations = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(shared, backend=compilations, dynamic=True)
    for lengths in ([(7, [3, 9, 2, 5]), (5, [4])], [(30, [40] * 5)], []):  # no two sizes of the first are the same
        mb, _ = micro_batches(lengths)
        kind = {"dtype": torch.bfloat16 if torch.cuda.is_available() else torch.float32, "head_dim": 16}
        got, want = values_and_gradients(compiled, mb, **kind), values_and_gradients(shared, mb, **kind)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
    assert compilations.frame_count == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for a CPU")
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_an_update_with_the_kernels_is_the_update(quickstart_overrides, checkpointing):
    """Of the whole model, on shared prompts, its activations kept or computed again."""
    overrides = [*quickstart_overrides, f"policy.dtensor_cfg.activation_checkpointing={checkpointing}"]
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", overrides)
    batch, found = random_batch(7), []
    for kernels in (False, True):
        worker = PolicyWorker(cfg.policy, 0, 1, "cpu", timeout_s=60)
        worker.setup(free_address())
        try:
            worker.kernels = kernels
            metrics = worker.update(batch, grpo_loss, {"cfg": cfg.loss_fn, **counts(batch)})
            states = [worker.optimizer.state[shard] for shard in worker.shards]
            moments = [state["exp_avg"].clone() for state in states]  # the gradients, times 0.1
            found.append((metrics["loss"], metrics["grad_norm"], torch.cat([m.flatten() for m in moments])))
        finally:
            torch.distributed.destroy_process_group()
    (loss, norm, gradients), (want_loss, want_norm, want_gradients) = found
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert norm == pytest.approx(want_norm, rel=1e-5)
    assert (gradients - want_gradients).norm() < 1e-5 * want_gradients.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_masked_attention_on_a_gpu(head_dim, dtype):
    """Compiled for the GPU, against masked attention in float32; and twice the same bits."""
    mine, whole = micro_batches([(5, [3, 1]), (130, [70, 200, 33]), (64, [64]), (300, [40] * 40)])
    got, again = (values_and_gradients(shared, mine, dtype, head_dim) for _ in range(2))
    want = values_and_gradients(masked, whole, torch.float32, head_dim)
    for x, y, z in zip(got, again, want, strict=True):
        assert torch.equal(x, y)
        assert (x - z).norm() < (5e-3 if dtype == torch.bfloat16 else 1e-3) * z.norm()


@pytest.mark.gpu
def test_a_prompt_whose_partial_gradients_need_64_bit_offsets():
    """They are more than 2^31 numbers; the last head's gradients are bit for bit those of that head alone."""
    device = torch.device("cuda")
    batch = Sequences([np.zeros(58_400, dtype=np.int64)], [np.zeros(64, dtype=np.int64)], {}, {})
    mb = MicroBatch.build(batch, device, kernels=True)
    torch.manual_seed(0)
    shape = (1, 32, len(mb.input_ids_N), 128)
    q, k, v, grad = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(4))

    def gradients(first_head: int) -> list[torch.Tensor]:
        inputs = [x[:, first_head:].detach().requires_grad_() for x in (q, k, v)]
        shared(*inputs, mb.attention).backward(grad[:, first_head:].transpose(1, 2))
        return [x.grad[:, -1] for x in inputs]

    for together, alone in zip(gradients(0), gradients(31), strict=True):
        assert torch.equal(together, alone)
