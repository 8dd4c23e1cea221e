"""config.yaml, inheritance, overrides, and one-line errors. No torch needed."""

import subprocess
import sys

import pytest
from conftest import ROOT

from config import ConfigError, help_text, load_config, schema_keys

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


def test_recipe_names_every_key_of_the_schema():
    """A reader of config.yaml sees all there is: no option lives in the schema alone."""
    from omegaconf import OmegaConf

    tree = OmegaConf.load(RECIPE)
    missing = [name for name in schema_keys() if OmegaConf.select(tree, name, default="absent") == "absent"]
    assert missing == []


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
        ("grpo.num_prompt_per_step=4", ["grpo.num_prompt_per_step", "grpo.num_prompts_per_step"]),
        ("+policy.learning_rate=1", ["policy.learning_rate"]),
        ("grpo.temperature=1", ["grpo.temperature", "policy.generation.temperature"]),
        ("polcy.model_name=x", ["polcy", "policy"]),
        ("grpo.seed=abc", ["grpo.seed", "abc"]),
        ("grpo.seed=null", ["grpo.seed"]),
        ("policy.optimizer=3", ["policy.optimizer"]),
        ("grpo.seed", ["grpo.seed", "section.key=value"]),
        ("=3", ["=3", "section.key=value"]),
        ("policy.generation.top_p=0.9", ["top_p=0.9", "1.0"]),
        ("policy.generation.top_k=50", ["top_k=50"]),
        ("policy.generation.temperature=0", ["temperature", "above 0"]),
        ("policy.train_global_batch_size=100", ["100", "64 x 16 = 1024"]),
        ("policy.sequence_packing.train_mb_tokens=100", ["train_mb_tokens=100", "32768"]),
        ("policy.generation.vllm_cfg.max_model_len=100", ["max_model_len=100"]),
        ("policy.dtensor_cfg.tensor_parallel_size=3", ["tensor_parallel_size=3", "64 policy ranks"]),
        ("policy.generation.colocated.enabled=false", ["resources.gpus_per_node", "below the 8"]),
        ("policy.generation.colocated.resources.gpus_per_node=1", ["colocated.enabled=false"]),
        ("policy.generation.engines_per_gpu=2", ["kv_cache_memory_bytes"]),
        ("grpo.async_one_step_off=true", ["colocated.enabled=false", "use_importance_sampling_correction=true"]),
        ("policy.precision=fp8", ["fp8", "bfloat16"]),
        ("loss_fn.variant=ppo", ["ppo", "cispo"]),
        ("loss_fn.ratio_clip_c=0.5", ["ratio_clip_c=0.5"]),
        ("loss_fn.truncated_importance_sampling_ratio=2", ["use_importance_sampling_correction"]),
        ("env.should_use_judge=true", ["env.judge_url"]),
        ("cluster.num_nodes=0", ["cluster.num_nodes", "above 0"]),
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
        ("grpo: {sede: 1}", ["grpo.sede", "grpo.seed", "c.yaml"]),
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


def test_help_lists_every_key_with_type_default_and_meaning():
    text = help_text()
    for name, field in schema_keys().items():
        assert f"  {name}  (" in text
        assert field.metadata["help"] in text
    assert "grpo.max_val_samples  (int | null, null)" in text
    assert "policy.model_name  (str, required)" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grpo.sede=1"], "error: unknown key 'grpo.sede' in override 'grpo.sede=1'; did you mean 'grpo.seed'?"),
        (["--config", "nowhere.yaml"], "error: config file 'nowhere.yaml' does not exist; pass --config FILE"),
    ],
)
def test_the_script_prints_one_line_and_fails(arguments, message):
    done = subprocess.run(
        [sys.executable, "train_grpo.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == message
    assert "Traceback" not in done.stderr
