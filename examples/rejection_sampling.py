"""Another loss: fine-tuning on the answers that were better than their group (RAFT, arXiv:2504.11343).

    python examples/rejection_sampling.py --config recipes/quickstart.yaml

All else, options included, is train_grpo.py's. A loss is a sum over tokens, divided by counts of the whole batch.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_grpo  # noqa: E402
from launch import run_main  # noqa: E402


def better_than_the_group(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    rollout_logprobs_T: torch.Tensor,
    num_valid_tokens: float,
    **_,  # what this loss does without: older log-probabilities, sequences, the section `loss_fn`
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Minus the mean log-probability of the tokens with a positive advantage, which is not used otherwise."""
    chosen_T = (mask_T > 0) & (advantages_T > 0)
    loss = -torch.where(chosen_T, logprobs_T, 0.0).sum() / num_valid_tokens
    cur_T = torch.where(mask_T > 0, logprobs_T.detach(), 0.0)
    gap_T = torch.where(mask_T > 0, cur_T - rollout_logprobs_T, 0.0)
    one_T, zero_T = torch.ones_like(cur_T), torch.zeros_like(cur_T)
    tokens = {"cur_T": cur_T, "ratio_T": one_T, "clipped_T": one_T, "kl_T": zero_T, "gap_T": gap_T}
    return loss, train_grpo.loss_metrics(mask_T.float(), num_valid_tokens, **tokens) | {"loss": loss.detach()}


if __name__ == "__main__":
    train_grpo.grpo_loss = better_than_the_group
    run_main(train_grpo.main)
