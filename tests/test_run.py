"""The real script, shortened: what it logs against an independent computation, and what it does when parts die."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from conftest import RECIPE, ROOT, run_script

import evaluate
from config import ConfigError, load_config
from launch import check_before_start
from rows import Rows, end_of_sequence_ids, load_tokenizer
from train_grpo import Run

BATCH = ["grpo.num_prompts_per_step=8", "grpo.num_generations_per_prompt=8"]


def command(overrides: list[str]) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train_grpo.py"),
        "--config",
        str(ROOT / "recipes" / "quickstart.yaml"),
        *overrides,
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


@pytest.fixture(scope="module")
def short_run(forks, warm_model, arithmetic_rows, tmp_path_factory):
    """Three steps of the quickstart with every logger on and a second validation set of two rows."""
    folder = tmp_path_factory.mktemp("run")
    rows = (arithmetic_rows / "validation.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:2]))
    overrides = [
        *BATCH, "grpo.reward_shaping.enabled=false", f"policy.model_name={warm_model}",
        f"data.train_jsonl_fpath={arithmetic_rows}/train.jsonl",
        f"data.validation_jsonl_fpath={arithmetic_rows}/validation.jsonl", f"logger.log_dir={folder}/logs",
        f"checkpointing.checkpoint_dir={folder}/checkpoints", "checkpointing.save_period=1",
        "checkpointing.keep_top_k=1", "checkpointing.metric_name=val:few:accuracy",
        f"data.validation_sets={{few: {{path: {folder}/few.jsonl, num_val_generations_per_prompt: 3}}}}",
        "grpo.max_num_steps=3", "grpo.val_period=2", "logger.num_rollouts_to_save=-1", "logger.wandb_enabled=true",
        "logger.tensorboard_enabled=true", "logger.profile_steps=[2]",
        "policy.max_grad_norm=0.1", "policy.sequence_packing.train_mb_tokens=256",
    ]  # fmt: skip
    wandb = {"WANDB_MODE": "offline", "WANDB_API_KEY": "planted-secret-0123456789abcdef0123456789"}
    return folder, run_script(overrides, folder, **wandb)


@pytest.mark.slow
def test_first_step_against_an_independent_computation(short_run, warm_model):
    """Reward, advantages, loss, gradient norm and engine mismatch of step 1 from its saved answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = short_run
    metrics = [m for m in read(folder / "logs" / "metrics.jsonl") if m["step"] == 1][0]
    samples = [s for s in read(folder / "logs" / "rollouts.jsonl") if s["step"] == 1 and s["split"] == "train"]
    assert [s["prompt"] for s in samples] == [p for p in range(8) for _ in range(8)]
    tokenizer = AutoTokenizer.from_pretrained(warm_model)
    for s in samples:  # each answer has its own reward: whether the prompt's sum is in its box
        a, b = map(int, re.search(r"(\d+) \+ (\d+)", tokenizer.decode(s["prompt_ids"])).groups())
        boxed = re.findall(r"\\boxed\{(\d+)\}", s["text"])
        assert s["reward"] == (bool(boxed) and int(boxed[-1]) == a + b), s["text"]
    rewards = np.array([s["reward"] for s in samples]).reshape(8, 8)
    assert metrics["reward"] == rewards.mean()
    assert 0 < rewards.mean() < 1
    others = (rewards.sum(1, keepdims=True) - rewards) / 7
    advantages = (rewards - others).ravel()  # leave-one-out, not normalised in this recipe
    tokens = sum(len(s["response_ids"]) for s in samples)
    model = AutoModelForCausalLM.from_pretrained(warm_model, dtype=torch.float32)
    loss, gaps = 0.0, []
    for s, advantage in zip(samples, advantages, strict=True):
        assert s["truncated"] or s["response_ids"][-1] == model.config.eos_token_id  # trained on where it stopped
        ids = torch.tensor(s["prompt_ids"] + s["response_ids"])[None]
        logprobs = model(ids).logits[0, len(s["prompt_ids"]) - 1 : -1].log_softmax(-1)
        picked = logprobs.gather(-1, torch.tensor(s["response_ids"])[:, None])[:, 0]
        loss = loss - advantage * (picked - picked.detach()).exp().sum() / tokens
        if advantage:
            gaps.append(picked.detach() - torch.tensor(s["rollout_logprobs"]))
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert metrics["grad_norm"] > 0.1  # so clipping had work to do
    gap = torch.cat(gaps)
    assert gap.abs().mean() < 1e-4
    assert metrics["token_mult_prob_error"] == pytest.approx(gap.abs().exp().mean().item(), abs=1e-5)
    assert metrics["mean_gen_tokens"] == tokens / 64
    assert metrics["frac_zero_signal_groups"] == np.mean(rewards.std(1) == 0)


@pytest.mark.slow
def test_console_and_loggers(short_run, arithmetic_rows):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, done = short_run
    for words in (
        "from the command to the first step",
        "Step 1/3",
        "Step 3/3",
        "reward 0.",
        "gen_kl_error",
        "validation: accuracy",
        "tokens/s",
        "generate",
    ):
        assert words in done.stdout
    steps = read(folder / "logs" / "metrics.jsonl")
    assert [m["step"] for m in steps] == [0, 1, 2, 3]
    assert ["val:accuracy" in m for m in steps] == [True, False, True, True]
    times = list(steps[1:])
    assert all(m["time/step_s"] > m["time/generate_s"] + m["time/train_s"] for m in times)
    (offline,) = (folder / "logs" / "wandb").glob("offline-run-*/*.wandb")
    logged = offline.read_bytes()
    for name in (b"train/reward", b"validation/accuracy", b"timing/generate_s", b"performance/tokens_per_s"):
        assert name in logged
    tables = {path.parent.name: path for path in offline.parent.rglob("samples_0_*.table.json")}
    assert len(json.loads(tables["few"].read_text())["data"]) == 6
    found = json.loads(tables["validation"].read_text())
    assert found["columns"] == ["prompt", "response", "reward", "status", "tokens"]
    assert len(found["data"]) == len(read(arithmetic_rows / "validation.jsonl"))
    assert "What is" in found["data"][0][0]
    assert [p.name for p in (folder / "logs" / "profile").iterdir()] == ["step_2.json"]
    names = {
        event.get("name")
        for event in json.loads((folder / "logs" / "profile" / "step_2.json").read_text())["traceEvents"]
    }
    assert {"TokenLogprobs", "TokenLogprobsBackward", "aten::mm"} <= names
    events = EventAccumulator(str(folder / "logs" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("validation/accuracy")] == [0, 2, 3]
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2, 3]
    best = max(m["val:accuracy"] for m in steps if "val:accuracy" in m)
    assert f"best validation accuracy {best:.3f}, after step" in done.stdout
    assert "best validation few accuracy" in done.stdout
    assert [e.step for e in events.Scalars("validation/few/accuracy")] == [0, 2, 3]
    rollouts = read(folder / "logs" / "rollouts.jsonl")
    for m in [m for m in steps if "val:accuracy" in m]:
        few = [row for row in rollouts if (row["step"], row["split"]) == (m["step"], "validation few")]
        assert [row["prompt"] for row in few] == [0, 0, 0, 1, 1, 1]
        assert m["val:few:accuracy"] == pytest.approx(sum(row["reward"] for row in few) / 6)
    serve = f" • python -m vllm.entrypoints.openai.api_server --model {folder}/checkpoints/step_3"
    assert done.stdout.splitlines()[-1] == serve


@pytest.mark.slow
def test_no_secret_is_written(short_run):
    folder, done = short_run
    assert "planted-secret" not in done.stdout + done.stderr
    for path in folder.rglob("*"):
        assert not path.is_file() or b"planted-secret" not in path.read_bytes(), path


@pytest.mark.slow
def test_checkpoints_kept_and_complete(short_run):
    """The best by the second set's accuracy and the latest; no half-written folder; plain Hugging Face inside."""
    folder, _ = short_run
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("."))
    accuracy = {m["step"]: m.get("val:few:accuracy", -1) for m in read(folder / "logs" / "metrics.jsonl") if m["step"]}
    best = max(accuracy, key=lambda step: (accuracy[step], step))
    assert kept == sorted({f"step_{best}", "step_3"})
    names = {p.name for p in (folder / "checkpoints" / "step_3").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "metrics.json"}


ROWS, K = 64, 8  # of an evaluation


def evaluation(short_run: tuple, rows: Path, output: Path) -> list[str]:
    """Arguments that evaluate the last checkpoint."""
    folder, _ = short_run
    given = ["--model", str(folder / "checkpoints" / "step_3"), "--data", str(rows / "train.jsonl"), "--k", str(K)]
    return [*given, "--limit", str(ROWS), "--output", str(output), "--max-new-tokens", "12",
            "--max-total-sequence-length", "64"]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(short_run, arithmetic_rows) -> tuple[Path, str]:
    """Folder and output of evaluate.py with two engines."""
    folder, _ = short_run
    given = evaluation(short_run, arithmetic_rows, folder / "evaluation")
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *given, "--engines", "2"],
        capture_output=True, text=True, timeout=600, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "evaluation", done.stdout


@pytest.mark.slow
def test_last_checkpoint_loads_in_a_fresh_engine(evaluated, arithmetic_rows):
    """evaluate.py through vLLM and the reward server; its answers get the verdict that they get in process."""
    from reward_server import verify

    folder, printed = evaluated
    rows = read(arithmetic_rows / "train.jsonl")
    answers = read(folder / "samples.jsonl")
    assert [a["row"] for a in answers] == [row for row in range(ROWS) for _ in range(K)]
    assert len({tuple(a["text"] for a in answers[i : i + K]) for i in range(0, len(answers), K)}) > ROWS // 2
    assert 0 < sum(a["reward"] for a in answers) < len(answers)
    for a in answers:
        assert a["reward"] == verify(a["text"], rows[a["row"]]["expected_answer"]).reward
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics[f"avg@{K}"] == pytest.approx(np.mean([a["reward"] for a in answers]))
    assert f"avg@{K}    {metrics[f'avg@{K}']:.3f}" in printed


@pytest.fixture
def evaluated_here(capsys, stopped_afterwards):
    """Run a command line of evaluate.py in this process; returns the lines that it prints."""

    def run_here(given: list[str]) -> list[str]:
        capsys.readouterr()
        evaluate.evaluate(evaluate.parse_args(given))
        ray.shutdown()
        return capsys.readouterr().out.splitlines()

    return run_here


@pytest.mark.slow
def test_a_death_and_another_number_of_engines_change_no_answer(
    evaluated, evaluated_here, short_run, arithmetic_rows, tmp_path
):
    (whole, _), died = evaluated, tmp_path / "died"
    lines, samples = (whole / "samples.jsonl").read_text().splitlines(keepends=True), died / "samples.jsonl"
    died.mkdir()
    shutil.copy(whole / "settings.json", died)
    # What a death leaves: nine rows, of which one could not be verified, three answers to a tenth, and a torn line.
    unverified = json.dumps(json.loads(lines[0]) | {"status": "unreachable"}) + "\n"
    samples.write_text(unverified + "".join(lines[1 : 9 * K + 3]) + lines[9 * K + 3][:-9])
    given = evaluation(short_run, arithmetic_rows, died)
    printed = evaluated_here(given)
    assert f"{samples} has 8 of {ROWS} rows" in printed
    for name in ("samples.jsonl", "metrics.json", "settings.json"):
        assert (died / name).read_bytes() == (whole / name).read_bytes(), name
    again = evaluated_here(given)  # nothing is left to do
    assert again == [f"{samples} has {ROWS} of {ROWS} rows", *printed[-len(again) + 1 :]]
    with pytest.raises(ConfigError, match="samples.jsonl was made with other settings, see"):
        evaluate.evaluate(evaluate.parse_args([*given, "--temperature", "0.5"]))


def wait_for(condition, seconds: float, what: str, pause: float = 0.05):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(pause)
    return found


def children(process: psutil.Process, words: str) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if words in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it ended while we looked
            continue
    return found


# ---------------------------------------------------------------- before anything starts


def test_wandb_without_a_key_is_said_at_once(quickstart_overrides, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", [*quickstart_overrides, "logger.wandb_enabled=true"])
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set; export it, or WANDB_MODE=offline"):
        check_before_start(cfg)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not a row"),
        ('{"expected_answer": "1"}', "responses_create_params"),
        ("[]", "line 2 is not a row"),
    ],
)
def test_bad_rows_name_file_and_line(arithmetic_rows, tiny_model, tmp_path, line, words):
    from transformers import AutoTokenizer

    path = tmp_path / "rows.jsonl"
    path.write_text((arithmetic_rows / "train.jsonl").open().readline() + line + "\n")
    with pytest.raises(ConfigError, match=words):
        Rows(str(path), AutoTokenizer.from_pretrained(tiny_model), 64)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_bad_row_ends_a_run_before_ray_starts(base, tmp_path, monkeypatch, stopped_afterwards, split):
    """There is no Ray at the address, which would be an error too, but nobody asks."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (tmp_path / "rows.jsonl").write_text("{\n")
    folders = [f"logger.log_dir={tmp_path}/logs", f"checkpointing.checkpoint_dir={tmp_path}/checkpoints"]
    cfg = load_config(RECIPE, [*base, *folders, f"data.{split}_jsonl_fpath={tmp_path}/rows.jsonl"])
    with pytest.raises(ConfigError, match="rows.jsonl line 1 is not a row"):
        Run(cfg)


def test_chat_templates(arithmetic_rows, tiny_model, tmp_path):
    """One's own, and its arguments, reach every prompt; a row that it refuses is named."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ 'thinking' if enable_thinking else 'at once' }}: {{ messages[0].content }}"
    )
    tokenizer = load_tokenizer(str(tiny_model), "policy.model_name", str(template), {"enable_thinking": False})
    path = tmp_path / "rows.jsonl"
    user, system = ({"role": role, "content": "2"} for role in ("user", "system"))
    lines = [
        json.dumps({"responses_create_params": {"input": chat}, "expected_answer": "4"})
        for chat in ([user], [system, user])
    ]
    path.write_text(lines[0])
    assert Rows(str(path), tokenizer, 64).prompt_ids == [tokenizer.encode("at once: 2")]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"^{path} line 2 is not a row: .* template refuses it: System role not supp"):
        Rows(str(path), tokenizer, 64)
    with pytest.raises(ConfigError, match="^cannot read the chat template 'nowhere.jinja'"):
        load_tokenizer(str(tiny_model), "policy.model_name", "nowhere.jinja")
    tokenizer.chat_template = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="base' has no end token: set eos_token_id in its generation_config.json"):
        end_of_sequence_ids(str(tmp_path / "base"), tokenizer)
    with pytest.raises(
        ConfigError, match=r"has no chat template; .* data.chat_template=FILE for training, --chat-temp"
    ):
        load_tokenizer(str(tmp_path / "base"))


def test_prompts_without_room_and_missing_or_empty_files(arithmetic_rows, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ConfigError, match=r"train.jsonl line 1: the prompt has \d+ tokens, which leaves no room"):
        Rows(f"{arithmetic_rows}/train.jsonl", tokenizer, 8)
    with pytest.raises(ConfigError, match="make them with prepare_data.py"):
        Rows("nowhere.jsonl", tokenizer, 8)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"empty\.jsonl has no rows; make some with prepare_data\.py"):
        Rows(f"{tmp_path}/empty.jsonl", tokenizer, 8)


def test_batches_cover_each_epoch_once_in_its_own_order(arithmetic_rows, tiny_model):
    from transformers import AutoTokenizer

    rows = Rows(f"{arithmetic_rows}/train.jsonl", AutoTokenizer.from_pretrained(tiny_model), 64)
    per_epoch = len(rows) // 100
    epochs = [[i for step in range(per_epoch) for i in rows.batch(e * per_epoch + step, 100, 1, True)] for e in (0, 1)]
    assert all(len(set(epoch)) == per_epoch * 100 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert rows.batch(3, 100, 1, True) == rows.batch(3, 100, 1, True) != rows.batch(3, 100, 2, True)
    assert rows.batch(1, 100, 1, False) == list(range(100, 200))


def test_number_of_batches(arithmetic_rows, tiny_model):
    from transformers import AutoTokenizer

    rows = Rows(f"{arithmetic_rows}/train.jsonl", AutoTokenizer.from_pretrained(tiny_model), 64)
    half = len(rows) // 2
    assert rows.number_of_batches(half, epochs=1) == 2
    assert rows.number_of_batches(half - 1, epochs=9) == 18
    with pytest.raises(
        ConfigError, match=f"has {len(rows)} rows, fewer than grpo.num_prompts_per_step={len(rows) + 1}"
    ):
        rows.number_of_batches(len(rows) + 1, epochs=1)
