"""Which models can be trained: decided from a model's configuration, before anything starts and without its weights.

The model is built on the meta device, where tensors have shapes but no numbers, and runs once to show what it asks of
its attention. Then `fault_of_packing` runs its first layers with random numbers. docs/models.md lists the types of
transformers that pass both. `check_refit` compares policy and engines once these run.
"""

from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from config import ConfigError, PolicyCfg
from hardware import Shape
from model import MicroBatch, Sequences, packed_hidden, switch_off_dropout

SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # in configurations; not computed here
ATTENTION_EXTRAS = ("softcap", "s_aux", "position_bias")  # arguments of attention functions; not computed here
TP_STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")  # of a tensor-parallel plan: known to model.py
ROUNDING = 1e-3  # float32 log-probabilities of a token that are computed in two ways differ by less than this
VOCABULARY = 64  # tokens of the model that `fault_of_packing` runs
# Mean difference of the log-probabilities of engine and policy that rounding may account for, by precision.
AGREEMENT = {"float32": 0.01, "bfloat16": 0.2, "float16": 0.1}


def check_model(cfg: PolicyCfg, vocabulary: int = 0) -> None:
    """Raise ConfigError for a model that cannot be trained here. `vocabulary`: how many tokens its tokenizer knows."""
    name, tp = cfg.model_name, cfg.dtensor_cfg.tensor_parallel_size
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot load policy.model_name='{name}': {' '.join(str(e).split())[:200]}") from None
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, attn_implementation="probe")
        why = (
            fault_of_parts(lm, vocabulary)
            or fault_of_attention(lm, cfg.max_total_sequence_length)
            or (tp > 1 and fault_of_split(lm, tp))
            or fault_of_packing(first_layers(lm))
        )
        if not why:
            Shape.of(name)  # the run needs this later
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        why = f"it cannot be built, measured, or run on packed sequences ({reason})"
    if why:
        raise ConfigError(f"policy.model_name='{name}', a model of type {config.model_type}, is not supported: {why}")


def check_refit(cfg: PolicyCfg, policy: Any, engines: Any, vocabulary: int) -> None:
    """Raise ConfigError if the engines, right after a refit, do not compute what the policy computes.

    Each engine samples responses of one token to some random prompts, and the policy computes log-probabilities of the
    same tokens. If the engines have all weights, the two differ by rounding; otherwise they differ by far more.
    """
    rng, size = np.random.default_rng(0), min(24, cfg.max_total_sequence_length // 2)
    prompts = [rng.integers(vocabulary, size=size).tolist() for _ in range(8 * len(engines.workers))]
    groups = list(engines.generate(prompts, n=1, seed=0, stop_token_ids=list(range(vocabulary))))
    prompt_ids, response_ids = [np.array(prompts[g.index]) for g in groups], [g.response_ids[0] for g in groups]
    ours = np.concatenate(policy.logprobs(Sequences(prompt_ids, response_ids, {}, {})))
    theirs = np.concatenate([g.rollout_logprobs[0] for g in groups])
    gap = np.abs(ours - theirs).mean() * min(1, cfg.generation.temperature)  # a low temperature enlarges differences
    most = AGREEMENT[cfg.precision]
    if not gap < most:
        raise ConfigError(
            f"policy.model_name='{cfg.model_name}' cannot be trained: after a refit log-probabilities in vLLM and in "
            f"the trainer differ by {gap:.2g} in the mean, more than by rounding ({most}); vLLM computes this type of "
            "model differently, or does not take all of its weights"
        )


def fault_of_parts(lm: nn.Module, vocabulary: int) -> str:
    """Which part of the model model.py cannot handle, or an empty string."""
    head = getattr(lm, "lm_head", None)
    if not hasattr(lm.base_model, "layers") or not isinstance(head, nn.Linear):
        return "it is not made of decoder layers and a linear head, as text models are"
    if getattr(lm.config, "quantization_config", None):
        return "its weights are quantized; train the original ones"
    if any("expert" in name for name, _ in lm.named_parameters()):
        return "it is a mixture of experts, whose weights a refit does not bring into vLLM"
    scaled = [key for key in SCALED_LOGITS if getattr(lm.config, key, None) not in (None, 1)]
    if scaled or head.bias is not None:
        return f"its logits have {' and '.join(scaled) or 'a bias'}"
    if vocabulary > len(head.weight):
        return f"its tokenizer knows {vocabulary} tokens, its head {len(head.weight)}"
    return ""


def fault_of_attention(lm: nn.Module, longest: int) -> str:
    """What the model's layers need that `model.packed_attention` does not do, or an empty string."""
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    mask_NN = torch.ones(4, 4, dtype=torch.bool, device="meta")
    with torch.no_grad():
        lm.base_model(input_ids=tokens, position_ids=tokens, use_cache=False, mask_NN=mask_NN)
    asked = [module.asked for module in lm.modules() if hasattr(module, "asked")]
    if len(asked) < len(lm.base_model.layers) or any(isinstance(module, nn.Conv1d) for module in lm.modules()):
        return "not all of its layers are attention that keeps packed sequences apart; some may carry state along"
    for given in asked:
        extras = [name for name in ATTENTION_EXTRAS if given.get(name) is not None]
        window = given.get("sliding_window")
        if "mask_NN" not in given:
            return "its layers do not tell their attention which packed tokens belong together"
        if extras:
            return f"its attention has {' and '.join(extras)}"
        if given["query"][-1] != given["value"][-1]:
            return "its attention has values of another size than its queries"
        if window and window < longest:
            return (
                f"its attention sees {window} tokens only, fewer than policy.max_total_sequence_length={longest}; "
                "lower that, or use another model"
            )
    return ""


def fault_of_split(lm: nn.Module, tp: int) -> str:
    """What `model.parallelize` would not split correctly over `tp` ranks, or an empty string.

    A norm's weight, one per hidden unit, sees whole hidden states on every rank. Any other weight that the plan does
    not name would be computed on every rank, or see one rank's heads or units only and get the gradient of those.
    """
    start, plan = f"with policy.dtensor_cfg.tensor_parallel_size={tp} ", lm.config.base_model_tp_plan or {}
    heads = {module.asked["key"][1] for module in lm.modules() if hasattr(module, "asked")}
    if any(n % tp for n in heads):
        return start + f"its {max(heads)} key-value heads cannot be divided"
    planned = [pattern for pattern, style in plan.items() if style in TP_STYLES]
    for name, weight in lm.base_model.layers.named_parameters(prefix="layers"):
        module = name.rpartition(".")[0]
        if weight.shape != (lm.config.hidden_size,) and not any(fnmatch(module, pattern) for pattern in planned):
            style = next((style for pattern, style in plan.items() if fnmatch(module, pattern)), "none")
            return start + f"its plan in transformers has no style for {module} that is known here ({style})"
    return ""


def first_layers(lm: nn.Module) -> nn.Module:
    """The first two layers of a model without numbers, with random numbers and a small vocabulary, in float32.

    How layers treat packed sequences depends on their code, not on their numbers, so two layers show it in little
    memory before anything starts.
    """
    lm.base_model.layers = lm.base_model.layers[:2]
    lm.set_input_embeddings(nn.Embedding(VOCABULARY, lm.get_input_embeddings().embedding_dim))
    lm.lm_head = nn.Linear(lm.lm_head.in_features, VOCABULARY, bias=False)
    lm = lm.float().to_empty(device="cpu")
    for tensor in (*lm.parameters(), *lm.buffers()):
        tensor.data.fill_(1)  # transformers leaves some as they are, and memory may hold anything
    for weight in lm.parameters():
        weight._is_hf_initialized = weight.ndim > 1
    lm.initialize_weights()  # buffers, norms and biases
    random = torch.Generator().manual_seed(0)
    for weight in lm.parameters():  # numbers so large that every part of a layer matters
        start = 0 if weight.ndim > 1 else weight.data.clone()
        weight.data.normal_(std=weight.shape[-1] ** -0.5, generator=random).add_(start)
    switch_off_dropout(lm)
    lm.set_attn_implementation("packed")
    return lm


@torch.no_grad()
def fault_of_packing(lm: nn.Module) -> str:
    """How far log-probabilities of packed sequences are from those of each sequence alone, or an empty string.

    For instance, a layer that carries state from token to token would mix packed sequences. A sequence alone goes
    through Hugging Face's own forward pass, attention and head, so that other differences are found, too.
    """
    rng, head = np.random.default_rng(0), lm.lm_head.weight
    drawn = [rng.integers(len(head), size=n) for n in (7, 6, 3, 4, 5)]
    batch = Sequences([drawn[0], drawn[0], drawn[3]], [drawn[1], drawn[2], drawn[4]], {}, {})
    mb = MicroBatch.build(batch, head.device)
    packed_TV = packed_hidden(lm, mb) @ head.t()
    lm.set_attn_implementation("eager")
    alone_TV = []
    for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True):
        ids = torch.as_tensor(np.concatenate([prompt, response]), device=head.device)
        alone_TV.append(lm(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1])
    lm.set_attn_implementation("packed")

    def logprobs(logits_TV: torch.Tensor) -> torch.Tensor:
        return logits_TV.log_softmax(-1).gather(-1, mb.target_T[:, None])

    gap = (logprobs(packed_TV) - logprobs(torch.cat(alone_TV))).abs().max().item()
    if gap < ROUNDING:
        return ""
    return f"log-probabilities of sequences packed and alone differ by {gap:.2g}, more than by rounding ({ROUNDING})"


def probe(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **given: Any
) -> tuple[torch.Tensor, None]:
    """A stand-in for `model.packed_attention` that leaves in the module what it was called with."""
    module.asked = {"query": query.shape, "key": key.shape, "value": value.shape, **given}
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register("probe", probe)
