"""Every type of causal language model that transformers knows, tiny: trained rightly, or refused in one line.

docs/models.md is what these tests found: `python tests/test_models.py` writes it anew.
"""

import functools
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_policy import free_address, spawn, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from config import ConfigError, load_config
from launch import explain
from model import LogprobModel, MicroBatch, Sequences, add_partial_gradients, build_model, switch_off_dropout
from policy import PolicyWorker, join_ranks
from supported import check_model, fault_of_packing, first_layers

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
    "lru_width": 32, "attention_head_dim": 8, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
}  # fmt: skip
LARGE = ("emu3",)  # where these numbers do not make a small model
AS_PUBLISHED = {  # where these numbers or the defaults of transformers do not make such a model
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str):
    """A small configuration of that type. Raises what transformers does where these numbers make none."""
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
    lm.get_input_embeddings().padding_idx = None
    return lm


def policy_of(folder: Path, longest: int = LONGEST, tensor_parallel_size: int = 1):
    """The `policy` section for the model in `folder`."""
    cfg = quickstart_policy()
    split = replace(cfg.dtensor_cfg, tensor_parallel_size=tensor_parallel_size)
    return replace(cfg, model_name=str(folder), max_total_sequence_length=longest, dtensor_cfg=split)


@functools.cache
def quickstart_policy():
    return load_config(ROOT / "recipes" / "quickstart.yaml", []).policy


def refusal(check: Callable, *args) -> str:
    """What is wrong, as the user reads it, without the model's name; empty if nothing is."""
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


WEIGHTS_T = torch.arange(17.0)  # how much each response token of `random_sequences` counts in a sum


def packed_sum(model) -> torch.Tensor:
    logprobs_T, _ = model(MicroBatch.build(random_sequences(), torch.device("cpu")), 1.0)
    return (logprobs_T * WEIGHTS_T).sum()


def plain_sum(lm) -> torch.Tensor:
    """The same by Hugging Face's plain forward pass with its own attention, of each sequence alone."""
    lm.set_attn_implementation("eager")
    batch, picked = random_sequences(), []
    for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response]))
        logprobs = lm(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        picked.append(logprobs.gather(-1, ids[len(prompt) :, None])[:, 0])
    return (torch.cat(picked) * WEIGHTS_T).sum()


def gradients(lm, total: torch.Tensor) -> list[torch.Tensor]:
    """Of every weight, whole."""
    lm.zero_grad()
    total.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in lm.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]


def distance(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Norm of the difference by norm, of the weight where that is largest and matters."""
    total = torch.stack([r.norm() for r in right]).norm()
    return max(((f - r).norm() / (r.norm() + 1e-3 * total)).item() for f, r in zip(found, right, strict=True))


@dataclass
class Finding:
    """What becomes of a type of model."""

    refused: str = ""  # why, or empty: it is trained
    window: bool = False  # only sequences up to its attention window
    split: str = ""  # why tensor parallelism is refused, or empty
    architecture: str = ""


SPLIT = "with policy.dtensor_cfg.tensor_parallel_size=2 "  # how a refusal of tensor parallelism begins


def look_at_all(folder: Path) -> dict[str, Finding]:
    """Every type that can be built tiny. Those that work are saved in folders of their names."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # several would only wait for each other at such sizes
    torch.use_deterministic_algorithms(True)  # what nobody sets is then not a number, instead of any number
    torch.utils.deterministic.fill_uninitialized_memory = True
    for kind, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if kind in LARGE:
            continue
        try:
            config = tiny_config(kind)
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(config)
            config.save_pretrained(folder / kind)
        except Exception as e:  # whatever transformers raises
            print(f"{kind} is not looked at: {' '.join(str(e).split())[:100]}")
            continue
        found[kind] = Finding(refusal(check_model, policy_of(folder / kind)))
        if found[kind].refused:
            continue
        lm = tiny_model(config, attn_implementation="packed")
        error = distance(gradients(lm, packed_sum(LogprobModel(lm, True))), gradients(lm, plain_sum(lm)))
        assert error < 1e-4, f"{kind} is trained wrongly: its gradients are {error:.1%} off"
        lm.save_pretrained(folder / kind)
        found[kind].window = "tokens only" in refusal(check_model, policy_of(folder / kind, longest=10**9))
        found[kind].split = refusal(check_model, policy_of(folder / kind, tensor_parallel_size=2)).removeprefix(SPLIT)
        found[kind].architecture = architecture
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    return found


def document(found: dict[str, Finding]) -> str:
    """docs/models.md."""
    known = (Path(find_spec("vllm").origin).parent / "model_executor/models/registry.py").read_text()
    rows, reasons = [], defaultdict(list)
    for kind, finding in sorted(found.items()):
        if finding.refused:
            reasons[finding.refused].append(kind)
            continue
        notes = ["sequences no longer than its attention window"] if finding.window else []
        notes += [] if f'"{finding.architecture}"' in known else ["not in vLLM's own list"]
        rows.append(f"| `{kind}` | {'no: ' + finding.split if finding.split else 'yes'} | {'; '.join(notes)} |")
    lines = [f"- {reason}: {', '.join(f'`{k}`' for k in kinds)}" for reason, kinds in sorted(reasons.items())]
    return INTRODUCTION.format(works=len(rows), rows="\n".join(rows), reasons="\n".join(lines)) + "\n"


INTRODUCTION = f"""\
# Models

`python tests/test_models.py` writes this page, with transformers {transformers.__version__}: it builds each type of
causal language model that transformers knows (the `model_type` in `config.json`) with a few thousand random weights,
and compares the gradients of packed sequences with those of Hugging Face's own forward pass, sequence by sequence.
A test holds the page and the code together.

A run checks its model three times, and ends with one line if it does not fit:
1. before anything starts, from the configuration alone (`supported.py`);
2. then its first two layers, with random weights in float32: log-probabilities of a few sequences packed and each
   alone (`supported.fault_of_packing`);
3. after the first refit, before anything is sampled: log-probabilities of a few tokens in vLLM and in the trainer
   (`supported.check_refit`).

## Types that work: {{works}}

| type | tensor parallel | notes |
|---|---|---|
{{rows}}

## Types that are refused

With the defaults of transformers. A model whose configuration turns the reason off is taken.

{{reasons}}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Finding]:
    return look_at_all(folder)


def test_every_type_is_trained_rightly_or_refused(found):
    """And docs/models.md says which, where it was made with this version of transformers."""
    assert {"llama", "qwen2", "qwen3", "gemma3_text", "smollm3"} <= {kind for kind, f in found.items() if not f.refused}
    text = DOCUMENT.read_text()
    if f"transformers {transformers.__version__}:" in text:
        assert document(found) == text, "run python tests/test_models.py and look at what changed in docs/models.md"


def tensor_parallel_rank(rank: int, address: str, folder: Path, kinds: list[str]) -> None:
    """Gradients of each model over two ranks against those of one, as a policy worker builds them."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as in `look_at_all`
    join_ranks("cpu", address, rank, 2, timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for kind in kinds:
        model = build_model(policy_of(folder / kind, tensor_parallel_size=2), mesh, torch.device("cpu"))
        model.lm.zero_grad()
        packed_sum(model).backward()
        add_partial_gradients(model.lm, mesh["tp"])
        split = [whole(p.grad) for p in model.lm.parameters()]
        lm = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
        switch_off_dropout(lm)
        error = distance(split, gradients(lm, plain_sum(lm)))
        assert error < 1e-4, f"{kind}: gradients over two ranks are {error:.1%} off on rank {rank}"
    dist.destroy_process_group()


def test_types_that_are_split_give_the_same_gradients(found, folder):
    kinds = [kind for kind, finding in found.items() if not finding.refused and not finding.split]
    assert {"llama", "qwen3"} <= set(kinds)
    spawn(tensor_parallel_rank, (free_address(), folder, kinds), 2)


def test_state_that_leaks_is_found_whatever_the_configuration_says():
    """The largest of these differences is a nat."""
    for kind in ("bamba", "falcon_h1", "lfm2", "doge"):
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(tiny_config(kind))
        said = fault_of_packing(first_layers(lm))
        assert re.search(r"packed and alone differ by \d\.?\d*, more than", said), (kind, said)


REFUSED = {
    "a window": ("mistral", {"sliding_window": 63}, r"sees 63 tokens only, fewer than .*length=64"),
    "a window that is long enough": ("mistral", {"sliding_window": 64}, ""),
    "logits scaled by one": ("granite", {"logits_scaling": 1.0}, ""),
    "scaled logits": ("granite", {"logits_scaling": 2.0}, "its logits have logits_scaling"),
    "quantized": ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized"),
    "too many tokens": ("qwen3", {"vocab_size": 49}, "its tokenizer knows 50 tokens, its head 49"),
    "linear attention": ("qwen3_5_text", {}, "not all of its layers are attention"),
    "no plan": ("persimmon", {}, r"no style for layers\.0\.self_attn\.query_key_value that is known here \(none\)"),
    "heads": ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1}, "its 1 key-value heads cannot be divided"),
    "unknown styles": (
        "phi3",
        {},
        r"no style for layers\.0\.self_attn\.o_proj that is known here \(rowwise_split_input\)",
    ),
    "partial gradients": ("apertus", {}, r"no style for layers\.0\.mlp\.act_fn that is known here \(none\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_is_wrong_with_a_configuration(case, tmp_path):
    kind, changes, line = REFUSED[case]
    config = tiny_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    said = refusal(check_model, policy_of(tmp_path, tensor_parallel_size=2), 50)
    assert re.search(line, said) if line else not said, said


def test_what_is_no_model_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere"}')
    with pytest.raises(ConfigError, match=r"cannot load policy.model_name='.*': .*config.json"):
        check_model(policy_of(tmp_path))


def test_buffers_of_a_checkpoint_are_sent_and_saved(tmp_path):
    """Engines start with random numbers in them."""
    tiny_model(tiny_config("apertus")).save_pretrained(tmp_path)
    worker = PolicyWorker(policy_of(tmp_path), 0, 1, "cpu", timeout_s=60)
    worker.setup(free_address())
    try:
        sent = [name for bucket in worker.weight_buckets() for name, _ in bucket]
        assert sorted(sent) == sorted(safe_open(tmp_path / "model.safetensors", "pt").keys())
        assert "model.layers.0.mlp.act_fn.beta" in sent
    finally:
        dist.destroy_process_group()


def test_weights_that_are_missing_are_named(tmp_path):
    """Random numbers would otherwise stay in their place."""
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    worker = PolicyWorker(policy_of(tmp_path), 0, 1, "cpu", timeout_s=60)
    try:
        with pytest.raises(ConfigError, match=r"1 of the model's weights are not in .*, such as model\.norm\.weight$"):
            worker.setup(free_address())
    finally:
        dist.destroy_process_group()


def test_what_vllm_does_not_know_is_said():
    """Not the link to pydantic's manual, with which such an error ends."""
    trace = (
        "ray::RolloutWorker.__init__()\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Model architectures ['X'] are not supported. [type=value_error]\n"
        "    For further information visit https://errors.pydantic.dev/2.12/v/value_error"
    )
    died = ray.exceptions.ActorDiedError(ray.exceptions.RayTaskError("__init__", trace, ValueError(), actor_id="1"))
    said = "could not start: Value error, Model architectures ['X'] are not supported. [type=value_error]"
    assert explain(died).endswith(said)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        DOCUMENT.write_text(document(look_at_all(Path(scratch))))
