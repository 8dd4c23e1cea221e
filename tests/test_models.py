"""Every type of causal language model that transformers knows, tiny: trained rightly, or refused in one line.

docs/models.md is what these tests found: `python tests/test_models.py` writes it anew.
"""

import dataclasses
import re
import sys
import warnings
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from config import ConfigError, load_config
from model import LogprobModel, MicroBatch, Sequences, add_partial_gradients, parallelize, self_test, switch_off_dropout
from supported import check_model

pytestmark = pytest.mark.slow
DOCUMENT = ROOT / "docs" / "models.md"
LONGEST = 64  # policy.max_total_sequence_length here
TINY = {  # set where a configuration has them
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 48, "d_ff": 48,
    "word_embed_proj_dim": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "n_groups": 1, "num_heads": 4, "state_size": 8, "chunk_size": 8, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "query_pre_attn_scalar": 8,
    "lru_width": 32, "attention_head_dim": 8,
}  # fmt: skip
AS_PUBLISHED = {  # where the defaults of transformers are not what such models are like, or no model at all
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "granite": {"logits_scaling": 1.0},
}


def tiny_config(kind: str):
    """A small configuration of that type; raises what transformers raises where these numbers make none."""
    kind_of_config = CONFIG_MAPPING[kind]
    default = kind_of_config()
    values = {name: value for name, value in TINY.items() if name in vars(default) or name in default.attribute_map}
    return kind_of_config(**{**values, **AS_PUBLISHED.get(kind, {})})


def tiny_model(config, **options):
    """With weights that are large enough for everything to matter, biases and norms included."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + (weight if weight.ndim == 1 else 0))
    switch_off_dropout(lm)
    return lm


@pytest.fixture(scope="module")
def policy_cfg(tmp_path_factory):
    """The `policy` section for a model of this configuration."""
    folder = tmp_path_factory.mktemp("model")
    base = load_config(ROOT / "recipes" / "quickstart.yaml", []).policy

    def make(config, tensor_parallel_size: int = 1):
        config.save_pretrained(folder)
        dtensor_cfg = dataclasses.replace(base.dtensor_cfg, tensor_parallel_size=tensor_parallel_size)
        return dataclasses.replace(
            base, model_name=str(folder), max_total_sequence_length=LONGEST, dtensor_cfg=dtensor_cfg
        )

    return make


def refusal(check, *args) -> str:
    """What is wrong, as the user reads it, without the name; empty if nothing is."""
    try:
        check(*args)
    except ConfigError as e:
        assert "\n" not in str(e)
        return str(e).split("is not supported: ")[-1]
    return ""


def random_sequences() -> Sequences:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 64, n) for n in (5, 9)]
    responses = [rng.integers(3, 64, n) for n in (8, 3, 6)]
    return Sequences([prompts[0], prompts[0], prompts[1]], responses, {}, {})


def gradients(lm, loss: torch.Tensor) -> torch.Tensor:
    lm.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in lm.parameters()])


def gradient_error(config) -> float:
    """Gradient of weighted log-probabilities, packed against Hugging Face's plain forward pass of each sequence alone:
    norm of the difference by norm."""
    lm, batch, total = tiny_model(config, attn_implementation="packed"), random_sequences(), 0.0
    lm.get_input_embeddings().padding_idx = None
    mb = MicroBatch.build(batch, torch.device("cpu"))
    packed = gradients(lm, (LogprobModel(lm, True)(mb, 1.0) * torch.arange(17.0)).sum())
    lm.set_attn_implementation("eager")
    weights = torch.arange(17.0).split([8, 3, 6])
    for prompt, response, weight in zip(batch.prompt_ids, batch.response_ids, weights, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response]))
        logprobs = lm(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total + (logprobs.gather(-1, ids[len(prompt) :, None])[:, 0] * weight).sum()
    plain = gradients(lm, total)
    return ((packed - plain).norm() / plain.norm()).item()
