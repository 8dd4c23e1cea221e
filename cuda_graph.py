"""Forward and backward pass of micro-batches as CUDA graphs, for a model so small that the CPU needs longer to launch
its kernels than the GPU to run them. A replay is one launch for all of them.

A graph is for one shape: `MicroBatch.build(round_up=True)` lets few occur, and each is recorded when it first comes.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from model import MicroBatch


class GraphedModel:
    """Called like the `LogprobModel` it records. Gradients add up in `gradients` until `start` sets them to zero; they
    are one rank's, so this is for a policy of one rank."""

    def __init__(self, model: nn.Module, weights: list[DTensor]):
        self.model, self.weights = model, weights
        self.gradients = [torch.zeros_like(w) for w in weights]
        self.local = [g.to_local() for g in self.gradients]
        self.memory = torch.cuda.graph_pool_handle()  # one for all graphs: no two are in use at the same time
        self.passes: dict[tuple, Pass] = {}
        self.anchor = torch.zeros((), device=self.local[0].device, requires_grad=True)

    def start(self) -> None:
        torch._foreach_zero_(self.local)

    def finish(self) -> None:
        """Hand the gradients to the weights."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient

    def drop(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def __call__(self, mb: MicroBatch, temperature: float) -> torch.Tensor:
        """Log-probabilities [T], those of what fills up included. The backward pass must follow before the next
        call."""
        key = (*mb.shape(), temperature)
        if key not in self.passes:
            self.passes[key] = Pass(self, mb, temperature)
        return Replay.apply(self.anchor, self.passes[key], mb)


class Pass:
    """Two recorded graphs and the tensors through which they are fed and read."""

    def __init__(self, graphed: GraphedModel, mb: MicroBatch, temperature: float):
        self.inputs = mb.inputs()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        graphed.model(mb, temperature).sum().backward()  # what loads or compiles for the first time cannot be recorded
        graphed.drop()
        # Other threads' calls (NCCL's watchdog polls events) are not the recording's business.
        how = {"pool": graphed.memory, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **how):
            logprobs_T = graphed.model(mb, temperature)
            # FSDP lets these wait for the present one; a recording ends when all are back in it.
            context = graphed.model._get_fsdp_state()._comm_ctx
            for stream in (context.all_gather_copy_in_stream, context.all_gather_stream):
                torch.cuda.current_stream().wait_stream(stream)
        self.logprobs_T, self.grad_T = logprobs_T.detach(), torch.zeros_like(logprobs_T)
        with torch.cuda.graph(self.backward, **how):
            logprobs_T.backward(self.grad_T)
            torch._foreach_add_(graphed.local, [w.grad.to_local() for w in graphed.weights])
            graphed.drop()


class Replay(torch.autograd.Function):
    """Joins the graphs to the loss, which is not recorded. `anchor`: something that asks for a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, recorded: Pass, mb: MicroBatch) -> torch.Tensor:
        torch._foreach_copy_(recorded.inputs, mb.inputs())
        recorded.forward.replay()
        ctx.recorded = recorded
        return recorded.logprobs_T.clone()

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[None, None, None]:
        ctx.recorded.grad_T.copy_(grad_T)
        ctx.recorded.backward.replay()
        return None, None, None
