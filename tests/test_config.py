"""config.yaml, inheritance, overrides, and one-line errors. No torch needed."""

import ast
import math
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from config import LLM_ARGUMENTS, ConfigError, check_ranges, contradictions, help_text, load_config, schema_keys

RECIPE = ROOT / "config.yaml"


def test_recipe_has_the_published_values():
    cfg = load_config(RECIPE)
    assert (cfg.grpo.num_prompts_per_step, cfg.grpo.num_generations_per_prompt) == (64, 16)
    assert cfg.policy.train_global_batch_size == 1024 == cfg.samples_per_step
    assert (cfg.policy.model_name, cfg.policy.optimizer.lr) == ("Qwen/Qwen3-4B-Instruct-2507", 1e-6)
    assert cfg.policy.optimizer.betas == [0.9, 0.999]
    assert cfg.policy.sequence_packing.train_mb_tokens == cfg.policy.generation.max_new_tokens == 32768
    assert (cfg.checkpointing.save_period, cfg.checkpointing.keep_top_k) == (1, 3)
    assert cfg.world_size == 64
    assert cfg.device == "cuda"


def test_lengths_follow_each_other():
    """What is not set follows: micro-batch, engine and response the longest sequence, the soft limit the response."""
    cfg = load_config(RECIPE, ["policy.max_total_sequence_length=4096", "policy.generation.max_new_tokens=1024"])
    assert cfg.policy.sequence_packing.train_mb_tokens == cfg.policy.generation.vllm_cfg.max_model_len == 4096
    assert cfg.grpo.reward_shaping.max_response_length == cfg.loss_fn.dr_grpo_length == 1024


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(recipe):
    load_config(recipe)


def test_the_tutorials_command_line_is_accepted():
    overrides = [
        "logger.wandb.project=me-math",
        "logger.wandb.name=x",
        "logger.log_dir=results/x",
        "grpo.val_at_start=false",
        "++grpo.num_prompts_per_step=4",
        "++grpo.max_num_steps=3",
        "++policy.dtensor_cfg.clear_cache_every_n_steps=1",
        "++cluster.num_nodes=1",
        "checkpointing.checkpoint_dir=results/x",
    ]
    cfg = load_config(RECIPE, overrides)
    assert (cfg.grpo.num_prompts_per_step, cfg.grpo.max_num_steps, cfg.cluster.num_nodes) == (4, 3, 1)
    assert cfg.policy.train_global_batch_size == 4 * 16  # follows by interpolation
    assert cfg.policy.dtensor_cfg.clear_cache_every_n_steps == 1
    assert cfg.grpo.val_at_start is False
    assert cfg.logger.wandb.project == "me-math"


def test_arguments_for_vllm_are_passed_on_as_they_are():
    name = "policy.generation.vllm_kwargs"
    cfg = load_config(RECIPE, [f"{name}.attention_config.backend=TRITON_ATTN", f"{name}.block_size=32"])
    assert cfg.policy.generation.vllm_kwargs == {"attention_config": {"backend": "TRITON_ATTN"}, "block_size": 32}
    with pytest.raises(ConfigError, match="vllm_kwargs"):
        load_config(RECIPE, [f"{name}=3"])


def test_where_ranks_and_engines_are():
    """GPUs are counted over nodes; apart, the engines have the last ones of each node."""
    cfg = load_config(RECIPE, ["cluster.num_nodes=2", "cluster.gpus_per_node=2"])
    assert cfg.policy_bundles == cfg.engine_bundles == [0, 1, 2, 3]
    apart = ["policy.generation.colocated={enabled: false, resources: {gpus_per_node: 1}}"]
    apart += ["policy.generation.engines_per_gpu=2", "policy.generation.vllm_cfg.kv_cache_memory_bytes=1000"]
    cfg = load_config(RECIPE, ["cluster.num_nodes=2", "cluster.gpus_per_node=4", *apart])
    assert cfg.policy_bundles == [0, 1, 2, 4, 5, 6]
    assert cfg.engine_bundles == [3, 3, 7, 7]
    assert cfg.world_size == 6


def test_arguments_that_the_program_gives_to_vllm_are_refused():
    tree = ast.parse((ROOT / "rollout.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "LLM"]
    given_there = {k.arg for call in calls for k in call.keywords if k.arg}
    assert given_there == set(LLM_ARGUMENTS.split())
    with pytest.raises(
        ConfigError, match=r"vllm_kwargs\.dtype is set by the program; look for its own key in `--help`"
    ):
        load_config(RECIPE, ["policy.generation.vllm_kwargs.dtype=1"])
    cfg, names = load_config(RECIPE), [*given_there, "tensor_parallel_size"]
    cfg.policy.generation.vllm_kwargs = dict.fromkeys(names, 1)
    assert sorted(message.split()[0].rpartition(".")[2] for message in contradictions(cfg)) == sorted(names)


TEXTS = [
    "001",
    "1e3",
    "true",
    "2024-01-01",
    "a b#c",
    "x #1",
    "[x]",
    "{x: y}",
    "a: b",
    "@x",
    "größer",
    "'x'",
    "-",
    "a=b",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text(text, tmp_path):
    keys = ["logger.wandb.name", "++logger.log_dir", "policy.model_name"]
    cfg = load_config(RECIPE, [f"{key}={text}" for key in keys])
    assert cfg.logger.wandb.name == cfg.logger.log_dir == cfg.policy.model_name == text
    folder = tmp_path / "a b#[ü]"
    folder.mkdir()
    OmegaConf.save({"defaults": str(RECIPE), "logger": {"wandb": {"name": text}}}, folder / "c.yaml")
    assert load_config(folder / "c.yaml").logger.wandb.name == text


def test_text_may_be_null():
    assert load_config(RECIPE, ["logger.wandb.name=null"]).logger.wandb.name is None


NUMBERS = {name: f for name, f in schema_keys().items() if any(t in str(f.type) for t in ("int", "float"))}


def test_every_number_has_a_range():
    assert [name for name, f in NUMBERS.items() if not f.metadata["bounds"]] == []


def outside(name):
    """Numbers of the key's type that are outside its range, and for a float those that are not finite."""
    field = NUMBERS[name]
    whole, bounds = "float" not in str(field.type), field.metadata["bounds"]
    numbers = {"allow_nan": False, "allow_infinity": False} if not whole else {}
    draw = st.integers if whole else st.floats
    ends = {
        "least": lambda b: draw(max_value=b - 1 if whole else math.nextafter(b, -math.inf), **numbers),
        "above": lambda b: draw(max_value=b, **numbers),
        "most": lambda b: draw(min_value=b + 1 if whole else math.nextafter(b, math.inf), **numbers),
        "below": lambda b: draw(min_value=b, **numbers),
        "among": lambda _: draw(**numbers),
    }
    choices = [ends[word](bound) for word, bound in bounds.items()]
    return st.one_of(*choices, *([] if whole else [st.sampled_from([math.nan, math.inf, -math.inf])]))


RECIPE_LOADED = load_config(RECIPE)


@pytest.mark.parametrize("name", NUMBERS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_numbers_outside_their_range_are_refused(name, data):
    number = data.draw(outside(name))
    *sections, leaf = name.split(".")
    section = RECIPE_LOADED
    for part in sections:
        section = getattr(section, part)
    before = getattr(section, leaf)
    setattr(section, leaf, [number] if isinstance(before, list) else number)
    try:
        with pytest.raises(ConfigError) as caught:
            check_ranges(RECIPE_LOADED)
    finally:
        setattr(section, leaf, before)
    assert str(caught.value).startswith(f"{name}=")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "policy.max_grad_norm=0", "policy.max_grad_norm=-1", "policy.scheduler.warmup_steps=-1",
        "grpo.max_val_samples=0", "grpo.max_val_samples=-1", "grpo.max_num_epochs=0", "grpo.max_num_epochs=-1",
        "grpo.val_batch_size=-1", "grpo.num_val_generations_per_prompt=0", "grpo.val_period=-1", "grpo.seed=-1",
        "grpo.num_generations_per_prompt=1", "loss_fn.truncated_importance_sampling_ratio=-1",
        "policy.optimizer.betas=[0.9,1.0]", "logger.num_rollouts_to_save=-2", "env.reward_timeout_s=0",
    ],
)  # fmt: skip
def test_values_out_of_range_on_the_command_line(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(RECIPE, [override])


def test_null_means_no_clipping():
    assert load_config(RECIPE, ["policy.max_grad_norm=null"]).policy.max_grad_norm is None


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_override_grammar(plus):
    assert load_config(RECIPE, [f"{plus}grpo.seed=7"]).grpo.seed == 7
    assert load_config(RECIPE, [f"{plus}loss_fn.ratio_clip_c=3"]).loss_fn.ratio_clip_c == 3.0
    assert load_config(RECIPE, [f"{plus}loss_fn.ratio_clip_c=null"]).loss_fn.ratio_clip_c is None
    assert load_config(RECIPE, [f"{plus}policy.optimizer.lr=1e-5"]).policy.optimizer.lr == 1e-5


def test_defaults_chain_and_precedence(tmp_path):
    (tmp_path / "a.yaml").write_text(f"defaults: {RECIPE}\ngrpo: {{seed: 1, max_num_steps: 5}}\n")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\ngrpo: {seed: 2}\n")
    cfg = load_config(tmp_path / "b.yaml", ["grpo.max_num_steps=6"])
    assert (cfg.grpo.seed, cfg.grpo.max_num_steps, cfg.grpo.num_generations_per_prompt) == (2, 6, 16)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.num_prompt_per_step=4", ["grpo.num_prompt_per_step", "num_prompts_per_step"]),
        ("+policy.learning_rate=1", ["policy.learning_rate"]),
        ("grpo.temperature=1", ["grpo.temperature", "`--help` lists every key"]),
        ("polcy.model_name=x", ["polcy", "policy"]),
        ("grpo.seed=abc", ["grpo.seed", "abc"]),
        ("grpo.seed=null", ["grpo.seed"]),
        ("policy.optimizer=3", ["policy.optimizer", "section"]),
        ("grpo.seed.deeper=3", ["grpo.seed"]),
        ("grpo.seed=@", ["grpo.seed=@", "not valid YAML"]),
        ("logger.log_dir=${", ["logger.log_dir"]),
        ("logger.wandb={name: 001}", ["logger.wandb.name", "quotes"]),
        ("grpo.seed", ["grpo.seed", "section.key=value"]),
        ("=3", ["=3", "section.key=value"]),
        ("policy.generation.top_p=0.9", ["top_p=0.9", "at least 1 and at most 1", "full softmax"]),
        ("policy.generation.top_k=50", ["top_k=50", "one of null"]),
        ("policy.generation.temperature=0", ["temperature", "above 0"]),
        ("policy.train_global_batch_size=100", ["100", "64 x 16 = 1024"]),
        ("policy.sequence_packing.train_mb_tokens=100", ["train_mb_tokens is below", "32768"]),
        ("policy.generation.vllm_cfg.max_model_len=100", ["max_model_len is below", "32768"]),
        ("policy.dtensor_cfg.tensor_parallel_size=3", ["tensor_parallel_size=3", "64 policy ranks"]),
        ("policy.generation.colocated.enabled=false", ["resources.gpus_per_node=None", "from 1 to 7"]),
        ("policy.generation.colocated.resources.gpus_per_node=1", ["gpus_per_node=1", "colocated.enabled=false"]),
        ("policy.generation.colocated={enabled: false, resources: {gpus_per_node: 8}}", ["from 1 to 7"]),
        ("policy.generation.engines_per_gpu=2", ["kv_cache_memory_bytes"]),
        ("grpo.async_one_step_off=true", ["colocated.enabled=false", "use_importance_sampling_correction=true"]),
        ("policy.precision=fp8", ["fp8", "bfloat16"]),
        ("loss_fn.variant=ppo", ["ppo", "cispo"]),
        ("loss_fn.ratio_clip_c=0.5", ["ratio_clip_c=0.5"]),
        ("loss_fn={sequence_level_importance_ratios: true, token_level_loss: false}", ["loss_fn.variant=gspo"]),
        ("loss_fn.sequence_level_importance_ratios=true", ["loss_fn.variant=gspo"]),
        ("grpo.reward_shaping={enabled: true, max_response_length: 40000}", ["max_response_length", "max_new_tokens"]),
        ("grpo.reward_shaping={enabled: true, max_response_length: 100}", ["overlong_buffer_length"]),
        ("checkpointing.metric_name=validation/accuracy", ["metric_name=validation/accuracy", "as in metrics.jsonl"]),
        ("checkpointing.checkpoint_must_save_by=3:45", ["checkpoint_must_save_by", "DD:HH:MM:SS"]),
        ("checkpointing.checkpoint_must_save_by=", ["checkpoint_must_save_by="]),
        ("checkpointing.checkpoint_must_save_by=03:45:00", ["checkpoint_must_save_by=03:45:00", "DD:HH:MM:SS"]),
        ("checkpointing.checkpoint_must_save_by=00:03:45:00:00", ["checkpoint_must_save_by=00:03:45:00:00"]),
        ("checkpointing.checkpoint_must_save_by=00:3h:00:00", ["checkpoint_must_save_by=00:3h:00:00"]),
        ("checkpointing.checkpoint_must_save_by=00:-1:00:00", ["checkpoint_must_save_by=00:-1:00:00"]),
        ("checkpointing.checkpoint_must_save_by=0:0:0:1.5", ["checkpoint_must_save_by=0:0:0:1.5"]),
        ("policy.generation.vllm_cfg.tensor_parallel_size=2", ["vllm_cfg.tensor_parallel_size=2", "at most 1"]),
        ("loss_fn.truncated_importance_sampling_ratio=2", ["use_importance_sampling_correction"]),
        ("env.should_use_judge=true", ["env.judge_url"]),
        ("env={reward_url: http://a, gym_url: http://b}", ["only one can give the rewards"]),
        ("env={reward_url: http://a, extraction: lenient}", ["env.extraction", "env.reward_url it would do nothing"]),
        ("env={gym_url: http://a, verifier: a.b}", ["env.verifier", "env.gym_url it would do nothing"]),
        ("data.validation_sets={a: {path: x, num_val_generations_per_prompt: 0}}", ["validation_sets.a", "at least 1"]),
        ("data.validation_sets={a/b: {path: x}}", ["validation_sets.a/b", "letters and digits"]),
        ("data.validation_sets={a: {}}", ["data.validation_sets.a.path"]),
        ("checkpointing.metric_name=val:b:accuracy", ["metric_name=val:b:accuracy", "none of the validation sets"]),
        ("cluster.num_nodes=0", ["cluster.num_nodes=0", "at least 1"]),
        ("policy.model_name=${policy.nope}", ["policy.nope"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(RECIPE, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grpo: {sede: 1}", ["grpo.sede", "'seed'", "c.yaml"]),
        ("grpo: 3", ["GRPO", "section", "c.yaml"]),
        ("logger: {wandb: {name: 001}}", ["logger.wandb.name", "c.yaml", "quotes"]),
        ("grpo: [1, 2", ["c.yaml", "not valid YAML"]),
        ("- 1\n- 2\n", ["c.yaml", "mapping"]),
        ("defaults: nowhere.yaml", ["nowhere.yaml", "does not exist"]),
        ("grpo: {seed: 1}", ["model_name"]),
    ],
)
def test_mistakes_in_files(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"^config file 'nowhere.yaml' does not exist; pass --config FILE$"):
        load_config("nowhere.yaml")


def test_help_lists_every_key_with_type_default_and_meaning():
    text = help_text()
    for name, field in schema_keys().items():
        assert f"  {name}  (" in text
        assert field.metadata["help"] in text
    assert "grpo.max_val_samples  (int | null, null, at least 1)" in text
    assert "gpu_memory_utilization  (float, 0.8, above 0 and at most 1)" in text
    assert "loss_fn.variant  (str, grpo, one of grpo dr_grpo cispo gspo dppo)" in text
    assert "policy.model_name  (str, required)" in text


@pytest.mark.slow
def test_the_script_prints_one_line_and_fails():
    """launch.py reads its command line as train_grpo.py does."""
    command = [sys.executable, "launch.py", "--config", "recipes/quickstart.yaml", "grpo.sede=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr == (
        "error: override 'grpo.sede=1': Key 'sede' not in 'GRPO'. Did you mean: 'seed'? (grpo.sede); "
        "`--help` lists every key\n"
    )
