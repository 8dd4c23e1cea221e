"""Typed schema of `config.yaml`, `defaults:` inheritance, command-line overrides, and errors for what is wrong.

Section and key names follow NeMo RL, so that its users feel at home; every key here is read somewhere.
`load_config(path, overrides)` is the only entry point. Anything wrong raises `ConfigError`, whose text is one line
that says what, where, and what to do.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LOSS_VARIANTS = ("grpo", "dr_grpo", "cispo", "gspo")


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line for the user."""


def key(default: Any, meaning: str) -> Any:
    """A dataclass field with its default and the sentence that `--help` prints."""
    if dataclasses.is_dataclass(default):
        return field(default_factory=default, metadata={"help": meaning})
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


@dataclass
class RewardScaling:
    enabled: bool = key(False, "map rewards linearly from the source to the target interval, clamped")
    source_min: float = key(0.0, "lowest reward of the verifier")
    source_max: float = key(1.0, "highest reward of the verifier")
    target_min: float = key(0.0, "what the lowest becomes")
    target_max: float = key(1.0, "what the highest becomes")


@dataclass
class RewardShaping:
    enabled: bool = key(False, "take off a penalty that grows over the last tokens before the limit (DAPO)")
    overlong_buffer_length: int = key(128, "tokens over which it grows")
    overlong_buffer_penalty: float = key(1.0, "penalty at the limit")
    max_response_length: int = key(32768, "the limit, in answer tokens")


@dataclass
class GRPO:
    num_prompts_per_step: int = key(64, "prompts sampled per step")
    num_generations_per_prompt: int = key(16, "answers sampled per prompt (the group)")
    max_num_epochs: int = key(1, "passes over the training rows")
    max_num_steps: int = key(1_000_000, "stop after this many steps")
    normalize_rewards: bool = key(True, "divide advantages by the group's standard deviation")
    use_leave_one_out_baseline: bool = key(True, "baseline and deviation of a sample exclude the sample itself")
    overlong_filtering: bool = key(False, "mask answers cut off at max_new_tokens out of the loss")
    use_dynamic_sampling: bool = key(False, "keep sampling until the batch is full of groups with different rewards")
    dynamic_sampling_max_gen_batches: int = key(10, "but not more than this many batches of prompts")
    async_one_step_off: bool = key(
        False, "sample the next batch during the update, with weights one update old; resuming is then not bit-exact"
    )
    reward_scaling: RewardScaling = key(RewardScaling, "rewards before anything else sees them")
    reward_shaping: RewardShaping = key(RewardShaping, "soft limit of the answers' length")
    max_unverified_fraction: float = key(0.2, "stop when a larger share of the answers cannot be verified")
    max_token_mult_prob_error: float | None = key(
        1.5, "stop when engine and trainer disagree more than this; null never"
    )
    gate_patience: int = key(3, "how many steps in a row one of the two limits above may be exceeded")
    val_period: int = key(10, "validate every N steps; 0 never")
    val_at_start: bool = key(True, "validate before the first step")
    max_val_samples: int | None = key(None, "validate on the first N rows; null: all")
    num_val_generations_per_prompt: int = key(1, "answers sampled per validation row")
    val_batch_size: int | None = key(None, "prompts per validation batch; null: all at once")
    seed: int = key(42, "seed of data order, sampling and the CPU model")


@dataclass
class LossFn:
    variant: str = key("grpo", f"one of {', '.join(LOSS_VARIANTS)}")
    reference_policy_kl_penalty: float = key(0.0, "beta of the k3 KL to the starting model; 0 loads no reference")
    ratio_clip_min: float = key(0.2, "ratio is clipped below 1 - this")
    ratio_clip_max: float = key(0.2, "ratio is clipped above 1 + this")
    ratio_clip_c: float | None = key(None, "dual clip: bound of the loss where the advantage is negative (> 1)")
    use_importance_sampling_correction: bool = key(False, "weigh by trainer over engine probability of the samples")
    truncated_importance_sampling_ratio: float | None = key(None, "upper bound of that weight")
    sequence_level_importance_ratios: bool = key(False, "one such weight per sequence instead of per token")
    dr_grpo_length: float = key(1.0, "constant answer length in the denominator of dr_grpo")
    token_level_loss: bool = key(True, "mean over all tokens; false: mean over sequences of their token means")


@dataclass
class DTensorCfg:
    tensor_parallel_size: int = key(2, "GPUs that share each layer (DTensor); the rest of the ranks are FSDP2")
    activation_checkpointing: bool = key(True, "recompute layers and LM head in the backward pass to save memory")
    cpu_offload: bool = key(False, "keep sharded weights and optimizer state in host memory")
    clear_cache_every_n_steps: int | None = key(None, "return cached GPU memory to the driver every N micro-batches")
    reshard_after_forward: bool = key(True, "free gathered weights between forward and backward (less memory, slower)")
    compile_layers: bool = key(False, "torch.compile each decoder layer")
    cuda_graphs: bool = key(
        False,
        "record forward and backward passes, for models so small that launching takes longer (a policy of one GPU)",
    )


@dataclass
class SequencePacking:
    enabled: bool = key(True, "pack several sequences into one micro-batch; false: one sequence each")
    train_mb_tokens: int = key(32768, "most tokens in a micro-batch")


@dataclass
class Optimizer:
    lr: float = key(1e-6, "learning rate of AdamW")
    weight_decay: float = key(0.01, "decoupled weight decay")
    betas: list[float] = key([0.9, 0.999], "decay of the two moments")
    eps: float = key(1e-8, "added to the denominator")


@dataclass
class Scheduler:
    warmup_steps: int = key(0, "linear warm-up over this many optimizer steps, then constant")


@dataclass
class VllmCfg:
    tensor_parallel_size: int = key(1, "GPUs per engine; data-parallel engines (1) are faster up to 8B")
    gpu_memory_utilization: float = key(0.8, "share of GPU memory for an engine (weights and KV cache)")
    kv_cache_memory_bytes: int | None = key(None, "KV cache size instead of the share above; needed on the CPU")
    max_model_len: int = key(32768, "longest prompt plus answer of the engine")
    max_num_seqs: int = key(1024, "most sequences decoded at once")
    enforce_eager: bool = key(False, "no CUDA graphs: starts faster, decodes slower")


@dataclass
class Resources:
    gpus_per_node: int | None = key(None, "GPUs of each node for engines alone, when they are not colocated")


@dataclass
class Colocated:
    enabled: bool = key(True, "engines share the policy's GPUs; false: they have resources of their own")
    resources: Resources = key(Resources, "what is theirs then")
    sleep: bool = key(True, "engines give up weights and KV memory while the policy trains")


@dataclass
class Generation:
    max_new_tokens: int = key(32768, "longest answer in tokens")
    temperature: float = key(1.0, "sampling temperature; the trainer uses the same")
    top_p: float = key(1.0, "must be 1 in training: truncated sampling biases the ratios")
    top_k: int | None = key(None, "must be null in training, as above")
    engines_per_gpu: int = key(1, "several help small models, whose engine is bound by Python, not by the GPU")
    vllm_cfg: VllmCfg = key(VllmCfg, "the vLLM engine")
    vllm_kwargs: dict[str, Any] = key({}, "further arguments of vllm.LLM, as they are")
    colocated: Colocated = key(Colocated, "where the engines live")


@dataclass
class PolicyCfg:
    model_name: str = key(MISSING, "Hugging Face name or folder")
    precision: str = key("bfloat16", "of compute: bfloat16, float16 (nearer to the engine, less range) or float32")
    max_total_sequence_length: int = key(32768, "longest prompt plus answer in tokens")
    train_global_batch_size: int = key(1024, "sequences per optimizer step; a step's samples divide by it")
    max_grad_norm: float = key(1.0, "clip the gradient's norm to this")
    dtensor_cfg: DTensorCfg = key(DTensorCfg, "how the model is spread and what it keeps in memory")
    sequence_packing: SequencePacking = key(SequencePacking, "micro-batches")
    optimizer: Optimizer = key(Optimizer, "AdamW")
    scheduler: Scheduler = key(Scheduler, "learning rate over time")
    generation: Generation = key(Generation, "sampling")


@dataclass
class Data:
    train_jsonl_fpath: str = key(MISSING, "training rows, from prepare_data.py")
    validation_jsonl_fpath: str | None = key(None, "validation rows; null: no validation")
    shuffle: bool = key(True, "shuffle the rows each epoch")


@dataclass
class Env:
    reward_url: str | None = key(None, "a running reward server; null starts one on this node")
    reward_workers: int = key(2, "worker processes of the reward server we start")
    reward_timeout_s: float = key(60.0, "deadline of one request to the reward server")
    should_use_judge: bool = key(False, "let an LLM judge answers that the rules reject")
    judge_url: str | None = key(None, "OpenAI-compatible server of the judge")


@dataclass
class Checkpointing:
    enabled: bool = key(True, "write checkpoints")
    checkpoint_dir: str = key("results/grpo", "folder of step_N")
    metric_name: str = key("val:accuracy", "what the best checkpoints are ranked by")
    higher_is_better: bool = key(True, "direction of that metric")
    keep_top_k: int | None = key(3, "keep the best N and the latest; null keeps all")
    save_period: int = key(10, "save every N steps; the last step is always saved")
    checkpoint_must_save_by: str | None = key(
        None, "DD:HH:MM:SS after the start save and exit with code 85, so that a time limit loses nothing"
    )


@dataclass
class Wandb:
    project: str = key("grpo", "W&B project")
    name: str | None = key(None, "W&B run name; null lets W&B choose")


@dataclass
class Logger:
    log_dir: str = key("logs", "metrics.jsonl, rollouts.jsonl, TensorBoard and W&B files")
    wandb_enabled: bool = key(True, "log to Weights & Biases")
    wandb: Wandb = key(Wandb, "where to log there")
    tensorboard_enabled: bool = key(False, "write TensorBoard events")
    num_val_samples_to_print: int = key(0, "validation answers printed each time")
    profile_steps: list[int] = key([], "steps whose update is profiled on rank 0: log_dir/profile/step_N.json")
    num_rollouts_to_save: int = key(8, "training samples written to rollouts.jsonl each step; -1: all")


@dataclass
class Cluster:
    num_nodes: int = key(8, "nodes")
    gpus_per_node: int = key(8, "GPUs per node; 0 runs on the CPU")
    cpu_ranks_per_node: int = key(1, "policy ranks (and engines) per node when gpus_per_node is 0")
    timeout_s: float = key(1800.0, "deadline for an actor to start or to finish one phase of a step")


@dataclass
class Config:
    grpo: GRPO = key(GRPO, "the algorithm")
    loss_fn: LossFn = key(LossFn, "the loss")
    policy: PolicyCfg = key(PolicyCfg, "the trained model")
    data: Data = key(Data, "rows")
    env: Env = key(Env, "rewards")
    checkpointing: Checkpointing = key(Checkpointing, "checkpoints")
    logger: Logger = key(Logger, "logs")
    cluster: Cluster = key(Cluster, "machines")

    @property
    def samples_per_step(self) -> int:
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def device(self) -> str:
        return "cuda" if self.cluster.gpus_per_node else "cpu"

    @property
    def bundles_per_node(self) -> int:
        """GPUs of a node (on the CPU: ranks); each is one bundle of the placement group, counted over the nodes."""
        return self.cluster.gpus_per_node or self.cluster.cpu_ranks_per_node

    @property
    def num_bundles(self) -> int:
        return self.cluster.num_nodes * self.bundles_per_node

    @property
    def policy_bundles(self) -> list[int]:
        """The bundle of each policy rank: all of them, or the first ones of each node where engines are apart."""
        colocated = self.policy.generation.colocated
        theirs = 0 if colocated.enabled else colocated.resources.gpus_per_node or 0
        return [b for b in range(self.num_bundles) if b % self.bundles_per_node < self.bundles_per_node - theirs]

    @property
    def engine_bundles(self) -> list[int]:
        """The bundle of each engine."""
        gen, policy = self.policy.generation, self.policy_bundles
        own = policy if gen.colocated.enabled else [b for b in range(self.num_bundles) if b not in policy]
        return [b for b in own for _ in range(gen.engines_per_gpu)]

    @property
    def world_size(self) -> int:
        """Policy ranks."""
        return len(self.policy_bundles)


OmegaConf.register_resolver("mul", lambda a, b: a * b, replace=True)


def schema_keys(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf key of the schema as `section.key` with its dataclass field."""
    found = {}
    for f in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(f.type)
        found |= schema_keys(f.type, f"{prefix}{f.name}.") if nested else {prefix + f.name: f}
    return found


def _known_paths() -> set[str]:
    leaves = schema_keys()
    return {".".join(k.split(".")[:n]) for k in leaves for n in range(1, k.count(".") + 2)}


def _check_known(tree: Any, where: str, prefix: str = "") -> None:
    """Raise ConfigError for the first key of a nested dict that the schema lacks."""
    known, free = _known_paths(), [name for name, f in schema_keys().items() if typing.get_origin(f.type) is dict]
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if path not in known:
            same_leaf = [k for k in known if k.split(".")[-1] == str(name)]
            near = same_leaf or difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else "; `--help` lists every key"
            raise ConfigError(f"unknown key '{path}' in {where}{hint}")
        if isinstance(value, dict) and path not in free:
            _check_known(value, where, f"{path}.")
        elif any(k.startswith(f"{path}.") for k in known):
            raise ConfigError(f"'{path}' in {where} is a section; set one of its keys, such as {path}.key=value")


def _read_yaml(path: Path) -> Any:
    """One YAML file merged over the file its `defaults:` names (a path relative to itself)."""
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"config file '{path}' does not exist; pass --config FILE") from None
    except Exception as e:  # the YAML library has its own family of errors
        raise ConfigError(f"config file '{path}' is not valid YAML: {' '.join(str(e).split())}") from None
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"config file '{path}' must be a mapping of sections")
    parent = tree.pop("defaults", None)
    _check_known(OmegaConf.to_container(tree), f"'{path}'")
    return OmegaConf.merge(_read_yaml(path.parent / parent), tree) if parent else tree


def _parse_override(text: str) -> Any:
    name, equals, value = text.partition("=")
    if not equals or not name.lstrip("+"):
        raise ConfigError(f"cannot read override '{text}'; write section.key=value")
    tree = OmegaConf.from_dotlist([f"{name.lstrip('+')}={value}"])
    _check_known(OmegaConf.to_container(tree), f"override '{text}'")
    return tree


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read `path` with its `defaults:`, apply `a.b=c` overrides (`+` and `++` prefixes allowed), check everything.

    Raises ConfigError with a one-line message for an unknown key, a wrong type, a missing file or value, and for
    values that contradict each other.
    """
    tree = _read_yaml(Path(path))
    try:
        for text in overrides:
            tree = OmegaConf.merge(tree, _parse_override(text))
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree))
    except OmegaConfBaseException as e:
        where = f" (key '{e.full_key}')" if getattr(e, "full_key", None) else ""
        raise ConfigError(f"{str(e).splitlines()[0]}{where}; `--help` lists types and defaults") from None
    check(cfg)
    return cfg


def seconds(text: str) -> float:
    """Seconds in "DD:HH:MM:SS". Raises ConfigError for anything else."""
    parts = text.split(":")
    if len(parts) != 4 or not all(p.isdecimal() for p in parts):
        raise ConfigError(f"checkpointing.checkpoint_must_save_by='{text}' is not DD:HH:MM:SS, such as 00:03:45:00")
    days, hours, minutes, rest = map(int, parts)
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def check(cfg: Config) -> None:
    """Raise ConfigError for the first contradiction between values."""
    p, g, gen, loss = cfg.policy, cfg.grpo, cfg.policy.generation, cfg.loss_fn
    d, tp = p.dtensor_cfg, p.dtensor_cfg.tensor_parallel_size
    freed = d.activation_checkpointing or d.reshard_after_forward or d.cpu_offload
    positive = {
        "grpo.num_prompts_per_step": g.num_prompts_per_step,
        "grpo.num_generations_per_prompt": g.num_generations_per_prompt,
        "grpo.max_num_steps": g.max_num_steps,
        "grpo.dynamic_sampling_max_gen_batches": g.dynamic_sampling_max_gen_batches,
        "grpo.reward_scaling.source_max - source_min": g.reward_scaling.source_max - g.reward_scaling.source_min,
        "grpo.reward_shaping.overlong_buffer_length": g.reward_shaping.overlong_buffer_length,
        "grpo.gate_patience": g.gate_patience,
        "policy.train_global_batch_size": p.train_global_batch_size,
        "policy.max_total_sequence_length": p.max_total_sequence_length,
        "policy.dtensor_cfg.tensor_parallel_size": tp,
        "policy.generation.max_new_tokens": gen.max_new_tokens,
        "policy.generation.engines_per_gpu": gen.engines_per_gpu,
        "policy.generation.temperature": gen.temperature,
        "loss_fn.dr_grpo_length": loss.dr_grpo_length,
        "checkpointing.save_period": cfg.checkpointing.save_period,
        "cluster.num_nodes": cfg.cluster.num_nodes,
        "cluster.cpu_ranks_per_node": cfg.cluster.cpu_ranks_per_node,
        "cluster.timeout_s": cfg.cluster.timeout_s,
    }
    rules = [(value > 0, f"{name} is {value}; it must be above 0") for name, value in positive.items()]
    rules += [
        (loss.variant in LOSS_VARIANTS, f"loss_fn.variant '{loss.variant}' is not one of {', '.join(LOSS_VARIANTS)}"),
        (
            p.precision in ("bfloat16", "float16", "float32"),
            f"policy.precision '{p.precision}' is not known; use bfloat16, float16 or float32",
        ),
        (
            gen.top_p == 1.0 and gen.top_k is None,
            f"policy.generation.top_p={gen.top_p} top_k={gen.top_k}: training needs 1.0 and null, since the trainer's "
            "probabilities are those of the full softmax",
        ),
        (
            cfg.samples_per_step % p.train_global_batch_size == 0,
            f"policy.train_global_batch_size={p.train_global_batch_size} does not divide the step's "
            f"{g.num_prompts_per_step} x {g.num_generations_per_prompt} = {cfg.samples_per_step} samples",
        ),
        (
            p.sequence_packing.train_mb_tokens >= p.max_total_sequence_length,
            f"policy.sequence_packing.train_mb_tokens={p.sequence_packing.train_mb_tokens} is below "
            f"policy.max_total_sequence_length={p.max_total_sequence_length}: the longest sequence would not fit",
        ),
        (
            gen.vllm_cfg.max_model_len >= p.max_total_sequence_length,
            f"policy.generation.vllm_cfg.max_model_len={gen.vllm_cfg.max_model_len} is below "
            f"policy.max_total_sequence_length={p.max_total_sequence_length}",
        ),
        (
            cfg.world_size % tp == 0,
            f"policy.dtensor_cfg.tensor_parallel_size={tp} does not divide the {cfg.world_size} policy ranks of "
            "cluster.num_nodes x gpus_per_node",
        ),
        (
            not d.cuda_graphs
            or cfg.device == "cpu"
            or not (freed or p.precision == "float32" or (gen.colocated.enabled and gen.colocated.sleep)),
            "policy.dtensor_cfg.cuda_graphs=true needs a policy.precision of 16 bits, and activation_checkpointing, "
            "reshard_after_forward, cpu_offload (dtensor_cfg) and policy.generation.colocated.sleep false: what a "
            "graph reads stays where it is",
        ),
        (
            gen.vllm_cfg.tensor_parallel_size == 1,
            "policy.generation.vllm_cfg.tensor_parallel_size must be 1: engines are data-parallel, one per GPU",
        ),
        (
            gen.colocated.enabled or 0 < (gen.colocated.resources.gpus_per_node or 0) < cfg.bundles_per_node,
            f"policy.generation.colocated.enabled=false needs colocated.resources.gpus_per_node above 0 and below the "
            f"{cfg.bundles_per_node} of each node: that many are for engines, the rest for the policy",
        ),
        (
            gen.colocated.enabled is False or gen.colocated.resources.gpus_per_node is None,
            "policy.generation.colocated.resources.gpus_per_node needs colocated.enabled=false",
        ),
        (
            not g.async_one_step_off or (not gen.colocated.enabled and loss.use_importance_sampling_correction),
            "grpo.async_one_step_off=true needs policy.generation.colocated.enabled=false (engines that work while the "
            "policy does) and loss_fn.use_importance_sampling_correction=true (their samples are one update old)",
        ),
        (
            gen.engines_per_gpu == 1 or gen.vllm_cfg.kv_cache_memory_bytes is not None,
            f"policy.generation.engines_per_gpu={gen.engines_per_gpu} needs vllm_cfg.kv_cache_memory_bytes: engines "
            "that share a GPU cannot measure what is free",
        ),
        (
            loss.ratio_clip_c is None or loss.ratio_clip_c > 1,
            f"loss_fn.ratio_clip_c={loss.ratio_clip_c} must be above 1 or null",
        ),
        (
            loss.truncated_importance_sampling_ratio is None or loss.use_importance_sampling_correction,
            "loss_fn.truncated_importance_sampling_ratio needs loss_fn.use_importance_sampling_correction=true",
        ),
        (
            not cfg.env.should_use_judge or cfg.env.judge_url or cfg.env.reward_url,
            "env.should_use_judge=true needs env.judge_url",
        ),
    ]
    for ok, message in rules:
        if not ok:
            raise ConfigError(message)
    if cfg.checkpointing.checkpoint_must_save_by:
        seconds(cfg.checkpointing.checkpoint_must_save_by)


def _type_name(annotation: Any) -> str:
    args = typing.get_args(annotation)
    if type(None) in args:
        return " | ".join(_type_name(a) if a is not type(None) else "null" for a in args)
    return getattr(annotation, "__name__", str(annotation)) if not args else str(annotation)


def help_text(path: str | Path = "config.yaml") -> str:
    """Every key with type, default and meaning; the defaults are the schema's, not those of a recipe."""
    lines = ["Keys (set them in a YAML file, or as section.key=value on the command line):", ""]
    for name, f in schema_keys().items():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = (
            "required"
            if default == MISSING
            else {None: "null", True: "true", False: "false"}.get(default)
            if (default is None or isinstance(default, bool))
            else default
        )
        lines.append(f"  {name}  ({_type_name(f.type)}, {shown})\n      {f.metadata['help']}")
    return "\n".join(lines)
