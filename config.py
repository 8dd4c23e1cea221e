"""Typed schema of `config.yaml`, `defaults:` inheritance, command-line overrides, and errors for what is wrong.

Section and key names follow NeMo RL, so that its users feel at home. Every key is read somewhere, or may have one value
only (`top_p`, for instance). A key is declared once, with type, default, meaning and range:

    num_prompts_per_step: int = key(64, "prompts sampled per step", least=1)

`load_config(path, overrides)` returns a checked configuration: OmegaConf checks names and types, `check_ranges` the
ranges, and `contradictions` what does not fit together.
"""

import copy
import dataclasses
import json
import math
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import II, MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

STEP = "${mul:${grpo.num_prompts_per_step},${grpo.num_generations_per_prompt}}"  # the samples of a step

# rollout.py passes these arguments to vllm.LLM, so `vllm_kwargs` must not have them.
LLM_ARGUMENTS = """model load_format skip_tokenizer_init dtype seed max_model_len max_num_seqs gpu_memory_utilization
kv_cache_memory_bytes enforce_eager enable_chunked_prefill enable_sleep_mode logprobs_mode disable_log_stats"""

BOUNDS = {  # for each bound that `key` takes: its words in messages, and the test that a value must pass
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
    "among": ("one of", lambda value, names: value in names.split()),
    "form": ("in the form", lambda value, pattern: re.fullmatch(pattern, value)),
}


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line for the user."""


def key(default: Any, meaning: str, **bounds: float | str) -> Any:
    """A dataclass field: its default, what `--help` says, and BOUNDS of the value (in a list: of each). Null passes."""
    metadata = {"help": meaning, "bounds": bounds}
    if isinstance(default, list | dict):  # each configuration gets its own copy
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RewardShaping:
    enabled: bool = key(False, "take off a penalty that grows over the last tokens before the limit (DAPO)")
    overlong_buffer_length: int = key(128, "the penalty grows over this many tokens before the limit", least=1)
    overlong_buffer_penalty: float = key(1.0, "penalty of a response at the limit", least=0)
    max_response_length: int = key(II("policy.generation.max_new_tokens"), "limit of the response's tokens", least=1)


@dataclass
class GRPO:
    num_prompts_per_step: int = key(64, "prompts sampled per step", least=1)
    num_generations_per_prompt: int = key(16, "responses sampled per prompt: the group", least=2)
    max_num_epochs: int = key(1, "passes over the training rows", least=1)
    max_num_steps: int = key(1_000_000, "stop after this many steps", least=1)
    normalize_rewards: bool = key(True, "divide advantages by the group's standard deviation")
    use_leave_one_out_baseline: bool = key(
        True, "a sample's mean and deviation exclude itself: an only right answer of 16 gets 1.0, two of them 3.6 each"
    )
    overlong_filtering: bool = key(False, "mask responses cut off at max_new_tokens out of the loss")
    use_dynamic_sampling: bool = key(False, "keep sampling until the batch is full of groups with different rewards")
    dynamic_sampling_max_gen_batches: int = key(10, "most batches of prompts to draw for one step", least=1)
    async_one_step_off: bool = key(False, "sample during the update, one update behind; resuming is not bit-exact then")
    reward_shaping: RewardShaping = field(default_factory=RewardShaping)
    max_unverified_fraction: float = key(0.2, "stop when a larger share of the answers is unverified", least=0, most=1)
    max_token_mult_prob_error: float | None = key(1.5, "stop at this trainer-engine mismatch; null: never", above=0)
    gate_patience: int = key(3, "steps in a row beyond either of these two limits that stop the run", least=1)
    val_period: int = key(10, "validate every N steps; 0 never", least=0)
    val_at_start: bool = key(True, "validate before the first step")
    max_val_samples: int | None = key(None, "validate on the first N rows; null: all", least=1)
    num_val_generations_per_prompt: int = key(1, "responses sampled per validation row", least=1)
    val_batch_size: int | None = key(None, "prompts per validation batch; null: all at once", least=1)
    seed: int = key(42, "seed of data order and sampling", least=0, most=2**31 - 1)


@dataclass
class LossFn:
    variant: str = key("grpo", "how ratios and lengths enter the loss", among="grpo dr_grpo cispo gspo dppo")
    reference_policy_kl_penalty: float = key(0.0, "beta of the k3 KL to the starting model; 0: none is loaded", least=0)
    entropy_coef: float = key(0.0, "weight of the tokens' exact entropy as a bonus; 0: it is not computed", least=0)
    ratio_clip_min: float = key(0.2, "ratio is clipped below 1 - this", least=0)
    ratio_clip_max: float = key(0.2, "ratio is clipped above 1 + this", least=0)
    ratio_clip_c: float | None = key(None, "dual clip: bounds the loss where the advantage is negative", above=1)
    use_importance_sampling_correction: bool = key(False, "importance weights: trainer over engine probability")
    truncated_importance_sampling_ratio: float | None = key(None, "upper bound of the importance weight", above=0)
    truncated_importance_sampling_ratio_min: float = key(0.0, "lower bound, for icepop and seq-mask-tis", least=0)
    truncated_importance_sampling_type: str = key(
        "tis", "beyond the bounds: cut off, 0 for the token, or 0 for the sequence", among="tis icepop seq-mask-tis"
    )
    dppo_divergence: float = key(0.15, "dppo: farthest that a token's probability moves from the engine's", above=0)
    sequence_level_importance_ratios: bool = key(False, "one importance weight per sequence instead of per token")
    dr_grpo_length: float = key(1.0, "constant response length in the denominator of dr_grpo", above=0)
    token_level_loss: bool = key(True, "mean over all tokens; false: mean over sequences of their token means")


@dataclass
class DTensorCfg:
    tensor_parallel_size: int = key(2, "GPUs that share each layer (DTensor); the rest of the ranks are FSDP2", least=1)
    activation_checkpointing: bool = key(True, "recompute layers and LM head in the backward pass to save memory")
    cpu_offload: bool = key(False, "keep sharded weights and optimizer state in host memory")
    clear_cache_every_n_steps: int | None = key(None, "empty the GPU's cache every N micro-batches", least=1)
    reshard_after_forward: bool = key(True, "free gathered weights between forward and backward (less memory, slower)")
    compile_layers: bool = key(False, "torch.compile each decoder layer")


@dataclass
class SequencePacking:
    enabled: bool = key(True, "pack several sequences into one micro-batch; false: one sequence each")
    train_mb_tokens: int = key(II("policy.max_total_sequence_length"), "most tokens in a micro-batch", least=1)


@dataclass
class Optimizer:
    lr: float = key(1e-6, "learning rate of AdamW", least=0)
    weight_decay: float = key(0.01, "decoupled weight decay", least=0)
    betas: list[float] = key([0.9, 0.999], "decay of the two moments", least=0, below=1)
    eps: float = key(1e-8, "added to the denominator", above=0)


@dataclass
class Scheduler:
    warmup_steps: int = key(0, "linear warm-up over this many optimizer steps, then constant", least=0)


@dataclass
class VllmCfg:
    tensor_parallel_size: int = key(1, "GPUs per engine: 1, since engines are data-parallel", least=1, most=1)
    gpu_memory_utilization: float = key(0.8, "share of GPU memory for weights and KV cache", above=0, most=1)
    kv_cache_memory_bytes: int | None = key(None, "bytes of KV cache, not that share; needed on the CPU", least=1)
    max_model_len: int = key(II("policy.max_total_sequence_length"), "longest sequence of the engine", least=1)
    max_num_seqs: int = key(1024, "most sequences decoded at once", least=1)
    enforce_eager: bool = key(False, "no CUDA graphs: starts faster, decodes slower")


@dataclass
class Resources:
    gpus_per_node: int | None = key(None, "GPUs of each node for engines alone, when they are not colocated", least=1)


@dataclass
class Colocated:
    enabled: bool = key(True, "engines share the policy's GPUs; false: they have resources of their own")
    resources: Resources = field(default_factory=Resources)
    sleep: bool = key(True, "engines give up weights and KV memory while the policy trains")


@dataclass
class Generation:
    max_new_tokens: int = key(II("policy.max_total_sequence_length"), "longest response in tokens", least=1)
    temperature: float = key(1.0, "sampling temperature; the trainer uses the same", above=0)
    top_p: float = key(1.0, "training needs the full softmax: other samples would bias the ratios", least=1, most=1)
    top_k: int | None = key(None, "as top_p", among="null")
    engines_per_gpu: int = key(1, "vLLM engines on each GPU; several help small models, which Python holds up", least=1)
    vllm_cfg: VllmCfg = field(default_factory=VllmCfg)
    vllm_kwargs: dict[str, Any] = key({}, "further arguments of vllm.LLM, passed on unchanged")
    colocated: Colocated = field(default_factory=Colocated)


@dataclass
class PolicyCfg:
    model_name: str = key(MISSING, "Hugging Face name or folder")
    precision: str = key("bfloat16", "of compute; float16 is finer, with less range", among="bfloat16 float16 float32")
    max_total_sequence_length: int = key(32768, "longest prompt plus response in tokens", least=1)
    train_global_batch_size: int = key(STEP, "samples per optimizer step; must divide a step's samples", least=1)
    max_grad_norm: float | None = key(1.0, "clip the gradient's norm to this; null: no clipping", above=0)
    dtensor_cfg: DTensorCfg = field(default_factory=DTensorCfg)
    sequence_packing: SequencePacking = field(default_factory=SequencePacking)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    generation: Generation = field(default_factory=Generation)


@dataclass
class ValidationSet:
    path: str = MISSING
    num_val_generations_per_prompt: int = 1


@dataclass
class Data:
    train_jsonl_fpath: str = key(MISSING, "training rows, from prepare_data.py")
    validation_jsonl_fpath: str | None = key(None, "validation rows; null: no validation")
    validation_sets: dict[str, ValidationSet] = key(
        {}, "more of them, NAME: {path, num_val_generations_per_prompt}; their metrics are val:NAME:accuracy and so on"
    )
    shuffle: bool = key(True, "shuffle the rows each epoch")
    chat_template: str | None = key(None, "Jinja file to use instead of the model's own chat template")
    chat_template_kwargs: dict[str, Any] = key({}, "what the chat template is given, such as {enable_thinking: false}")


@dataclass
class Env:
    reward_url: str | None = key(None, "a running reward server; null starts one on this node")
    verifier: str = key("math", "math, or a function of (text, row) of your own: module.function or file.py:function")
    extraction: str = key("strict", "lenient: take what is not boxed, too", among="strict lenient")
    reward_workers: int = key(2, "worker processes of the reward server we start", least=1)
    reward_timeout_s: float = key(60.0, "deadline of one request to the reward server", above=0)
    should_use_judge: bool = key(False, "let an LLM judge the answers that the rules reject")
    judge_url: str | None = key(None, "OpenAI-compatible server of the judge")
    gym_url: str | None = key(None, "environment server or agent of NeMo Gym that plays whole episodes (docs/gym.md)")
    gym_model_address: str = key("127.0.0.1:8200", "where we listen for Gym's model server; its URL is http://THIS/v1")
    episode: str | None = key(None, "an episode of your own: module.function or file.py:function (examples/guess.py)")
    episode_timeout_s: float = key(600.0, "deadline of one episode", above=0)
    tool_parser: str = key("hermes", "vLLM's tool parser for the model's tool calls in episodes")

    @property
    def plays_episodes(self) -> bool:
        return bool(self.gym_url or self.episode)


@dataclass
class Checkpointing:
    enabled: bool = key(True, "write checkpoints")
    checkpoint_dir: str = key("results/grpo", "folder of step_N")
    metric_name: str = key("val:accuracy", "ranks the checkpoints; named as in metrics.jsonl, without /", form="[^/]*")
    higher_is_better: bool = key(True, "whether a higher metric is a better checkpoint")
    keep_top_k: int | None = key(3, "keep the best N and the latest; null keeps all", least=0)
    save_period: int = key(10, "save every N steps; the last step is always saved", least=1)
    checkpoint_must_save_by: str | None = key(
        None, "DD:HH:MM:SS, such as 00:03:45:00, after the start: save and exit with code 85", form=r"\d+:\d+:\d+:\d+"
    )


@dataclass
class Wandb:
    project: str = key("grpo", "W&B project")
    name: str | None = key(None, "W&B run name; null: W&B chooses one")


@dataclass
class Logger:
    log_dir: str = key("logs", "metrics.jsonl, rollouts.jsonl, TensorBoard and W&B files")
    wandb_enabled: bool = key(True, "log to Weights & Biases")
    wandb: Wandb = field(default_factory=Wandb)
    tensorboard_enabled: bool = key(False, "write TensorBoard events")
    num_val_samples_to_print: int = key(0, "validation answers printed each time", least=0)
    profile_steps: list[int] = key([], "steps whose update is profiled on rank 0: log_dir/profile/step_N.json", least=1)
    num_rollouts_to_save: int = key(8, "samples in rollouts.jsonl of each step and validation; -1: all", least=-1)


@dataclass
class Cluster:
    num_nodes: int = key(8, "nodes", least=1)
    gpus_per_node: int = key(8, "GPUs per node; 0 runs on the CPU", least=0)
    cpu_ranks_per_node: int = key(1, "policy ranks (and engines) per node when gpus_per_node is 0", least=1)
    timeout_s: float = key(1800.0, "deadline for an actor to start or to finish one phase of a step", above=0)


@dataclass
class Config:
    grpo: GRPO = field(default_factory=GRPO)
    loss_fn: LossFn = field(default_factory=LossFn)
    policy: PolicyCfg = field(default_factory=PolicyCfg)
    data: Data = field(default_factory=Data)
    env: Env = field(default_factory=Env)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    logger: Logger = field(default_factory=Logger)
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def samples_per_step(self) -> int:
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def validation_sets(self) -> dict[str, ValidationSet]:
        """All validation sets by name; the name of `data.validation_jsonl_fpath` is empty."""
        path, n = self.data.validation_jsonl_fpath, self.grpo.num_val_generations_per_prompt
        return ({"": ValidationSet(path, n)} if path else {}) | self.data.validation_sets

    @property
    def device(self) -> str:
        return "cuda" if self.cluster.gpus_per_node else "cpu"

    @property
    def bundles_per_node(self) -> int:
        """GPUs of a node (on the CPU: ranks). Each is one bundle of the placement group, numbered over all nodes."""
        return self.cluster.gpus_per_node or self.cluster.cpu_ranks_per_node

    @property
    def num_bundles(self) -> int:
        return self.cluster.num_nodes * self.bundles_per_node

    @property
    def policy_bundles(self) -> list[int]:
        """The bundle of each policy rank: all, or the first ones of each node if engines have their own GPUs."""
        engine_gpus = self.policy.generation.colocated.resources.gpus_per_node or 0
        return [b for b in range(self.num_bundles) if b % self.bundles_per_node < self.bundles_per_node - engine_gpus]

    @property
    def engine_bundles(self) -> list[int]:
        """The bundle of each engine: all, or those without a policy rank."""
        colocated, policy = self.policy.generation.colocated.enabled, self.policy_bundles
        with_engines = [b for b in range(self.num_bundles) if colocated or b not in policy]
        return [b for b in with_engines for _ in range(self.policy.generation.engines_per_gpu)]

    @property
    def world_size(self) -> int:
        return len(self.policy_bundles)


OmegaConf.register_resolver("mul", lambda a, b: a * b, replace=True)


def schema_keys(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf key of the schema as `section.key` with its dataclass field."""
    found = {}
    for f in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(f.type)
        found |= schema_keys(f.type, f"{prefix}{f.name}.") if nested else {prefix + f.name: f}
    return found


KEYS = schema_keys()
TEXT_KEYS = [name for name, f in KEYS.items() if f.type in (str, str | None)]


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read `path` with its `defaults:`, apply `a.b=c` overrides (`+` and `++` prefixes allowed), check everything.

    Raises ConfigError with a one-line message for an unknown key, a wrong type, a missing file or value, a value out
    of its range, and values that contradict each other.
    """
    cfg = copy.deepcopy(_schema())
    for where, tree in [*_read_files(Path(path)), *map(_parse_override, overrides)]:
        with _one_line_errors(where):
            cfg.merge_with(tree)
        for name in TEXT_KEYS:
            value = OmegaConf.select(tree, name, throw_on_resolution_failure=False)
            if not isinstance(value, str | None):  # such as 001, which YAML reads as the number 1
                raise ConfigError(f"{where}: {name} is text, but YAML reads {value!r} there; put the text in quotes")
    with _one_line_errors(f"config file '{path}'"):
        loaded = OmegaConf.to_object(cfg)
    check_ranges(loaded)
    for message in contradictions(loaded):
        raise ConfigError(message)
    return loaded


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(Config)


def _read_files(path: Path) -> list[tuple[str, DictConfig]]:
    """The trees of a YAML file and, before it, of the file that its `defaults:` names (relative to the file itself)."""
    where = f"config file '{path}'"
    with _one_line_errors(where):
        tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{where} must be a mapping of sections")
    parent = tree.pop("defaults", None)
    return [*(_read_files(path.parent / str(parent)) if parent else []), (where, tree)]


def _parse_override(text: str) -> tuple[str, DictConfig]:
    """The tree of `section.key=value`. YAML reads the value, unless the key holds text: 001 stays 001."""
    name, equals, value = text.lstrip("+").partition("=")
    if not equals or not name:
        raise ConfigError(f"cannot read override '{text}'; write section.key=value")
    if name in TEXT_KEYS and value != "null":
        value = json.dumps(value, ensure_ascii=False)  # in quotes
    with _one_line_errors(f"override '{text}'"):
        return f"override '{text}'", OmegaConf.from_dotlist([f"{name}={value}"])


@contextmanager
def _one_line_errors(where: str) -> Iterator[None]:
    """Turn errors of OmegaConf, which names the nearest known key, and of YAML into ConfigErrors of one line."""
    try:
        yield
    except OmegaConfBaseException as e:
        said = str(e).splitlines()[0]
        raise ConfigError(f"{where}: {said} ({e.full_key or 'a section'}); `--help` lists every key") from None
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist; pass --config FILE") from None
    except (OSError, UnicodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(e).split())}") from None


def check_ranges(cfg: Config) -> None:
    """Raise ConfigError for the first value that is outside the bounds of its key, or infinite."""
    for name, f in KEYS.items():
        value, bounds = operator.attrgetter(name)(cfg), f.metadata["bounds"]
        for item in value if isinstance(value, list) else [value]:
            inside = item is None or all(BOUNDS[b][1](item, bound) for b, bound in bounds.items())
            if not inside or item in (math.inf, -math.inf):
                raise ConfigError(f"{name}={value} must be {range_of(f)}: {f.metadata['help']}")


def range_of(f: dataclasses.Field) -> str:
    """The bounds of a key in words, such as "above 0 and at most 1"."""
    return " and ".join(f"{BOUNDS[b][0]} {bound}" for b, bound in f.metadata["bounds"].items())


def contradictions(cfg: Config) -> Iterator[str]:
    """A message for each value that contradicts another value, or that no code here could use."""
    loss, p, gen, env = cfg.loss_fn, cfg.policy, cfg.policy.generation, cfg.env
    shaping, own, engine_gpus = cfg.grpo.reward_shaping, gen.colocated, gen.colocated.resources.gpus_per_node
    corrects, longest = loss.use_importance_sampling_correction, p.max_total_sequence_length
    if own.enabled != (engine_gpus is None) or not (engine_gpus or 0) < cfg.bundles_per_node:
        yield (
            f"colocated.resources.gpus_per_node={engine_gpus} needs to be from 1 to {cfg.bundles_per_node - 1} with "
            "policy.generation.colocated.enabled=false, and null otherwise"
        )
    if cfg.samples_per_step % p.train_global_batch_size:
        step = f"{cfg.grpo.num_prompts_per_step} x {cfg.grpo.num_generations_per_prompt} = {cfg.samples_per_step}"
        yield f"policy.train_global_batch_size={p.train_global_batch_size} does not divide the {step} samples of a step"
    if p.sequence_packing.train_mb_tokens < longest:
        yield f"policy.sequence_packing.train_mb_tokens is below policy.max_total_sequence_length={longest}"
    if gen.vllm_cfg.max_model_len < longest:
        yield f"policy.generation.vllm_cfg.max_model_len is below policy.max_total_sequence_length={longest}"
    if cfg.world_size % (tp := p.dtensor_cfg.tensor_parallel_size):
        yield f"policy.dtensor_cfg.tensor_parallel_size={tp} does not divide the {cfg.world_size} policy ranks"
    if gen.engines_per_gpu > 1 and gen.vllm_cfg.kv_cache_memory_bytes is None:
        yield "policy.generation.engines_per_gpu above 1 needs vllm_cfg.kv_cache_memory_bytes for each engine"
    for name in gen.vllm_kwargs.keys() & {*LLM_ARGUMENTS.split(), "tensor_parallel_size"}:
        yield f"policy.generation.vllm_kwargs.{name} is set by the program; look for its own key in `--help`"
    if loss.truncated_importance_sampling_ratio is not None and not corrects:
        yield "loss_fn.truncated_importance_sampling_ratio needs loss_fn.use_importance_sampling_correction=true"
    # NeMo RL turns on GSPO with this key; here it belongs to the correction for the engine's probabilities.
    if loss.sequence_level_importance_ratios and not (corrects and loss.token_level_loss or loss.variant == "gspo"):
        yield (
            "loss_fn.sequence_level_importance_ratios needs use_importance_sampling_correction=true and "
            "token_level_loss=true; for GSPO, which NeMo RL spells so, set loss_fn.variant=gspo"
        )
    if cfg.grpo.async_one_step_off and (own.enabled or not corrects):
        yield "grpo.async_one_step_off needs colocated.enabled=false and use_importance_sampling_correction=true"
    ordered = shaping.overlong_buffer_length <= shaping.max_response_length <= gen.max_new_tokens
    if shaping.enabled and not ordered:
        yield "grpo.reward_shaping needs overlong_buffer_length <= max_response_length <= generation.max_new_tokens"
    for name, each in cfg.data.validation_sets.items():
        if each.num_val_generations_per_prompt < 1 or not re.fullmatch(r"[\w-]+", name):
            yield f"data.validation_sets.{name} needs a name of letters and digits, and at least 1 sample of each row"
    ranked_by, sets = cfg.checkpointing.metric_name.split(":"), cfg.validation_sets
    if ranked_by[0] == "val" and sets and ":".join(ranked_by[1:-1]) not in sets:
        yield f"checkpointing.metric_name={cfg.checkpointing.metric_name} is of none of the validation sets"
    if env.should_use_judge and not env.judge_url:
        yield "env.should_use_judge=true needs env.judge_url"
    sources = [name for name in ("reward_url", "gym_url", "episode") if getattr(env, name)]
    if len(sources) > 1:
        yield "of env.reward_url, env.gym_url and env.episode only one can give the rewards"
    for name in ("verifier", "extraction", "should_use_judge", "judge_url") if sources else ():
        if getattr(env, name) != getattr(Env(), name):
            yield f"env.{name} is for the reward server that the run starts; with env.{sources[0]} it would do nothing"


def help_text() -> str:
    """Every key with type, default, range and meaning; the defaults are the schema's, not those of a recipe."""
    lines = ["Keys (set them in a YAML file, or as section.key=value on the command line):", ""]
    for name, f in KEYS.items():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        kind = f.type.__name__ if isinstance(f.type, type) else str(f.type).replace("None", "null")
        shown = "required" if default == MISSING else default if isinstance(default, str) else json.dumps(default)
        lines.append(f"  {name}  ({', '.join(filter(None, [kind, shown, range_of(f)]))})\n      {f.metadata['help']}")
    return "\n".join(lines)
