"""Swapping with NeMo Gym, and episodes of several turns. Real servers of the real wheel, where it is installed."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from config import Config, ConfigError, Env, load_config
from gym import Episodes, prompt_ids, read_episode
from launch import RunError
from reward_client import RewardClient
from rollout import Group, RolloutWorker
from rows import read_row
from train_grpo import train

RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
GYM_PYTHON = os.environ.get("GYM_PYTHON", str(ROOT / ".venv-gym" / "bin" / "python"))
needs_gym = pytest.mark.skipif(
    not Path(GYM_PYTHON).with_name("gym").exists(), reason="no NeMo Gym: bash tools/install_gym.sh"
)


@pytest.fixture(scope="module")
def gym():
    """The urls of Gym's servers by name, and as "policy" the address at which they look for the policy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [GYM_PYTHON, str(ROOT / "tests" / "gym_servers.py"), f"http://{address}/v1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        urls = next(line for line in process.stdout if line.startswith("{"))
        yield json.loads(urls) | {"policy": address}
        process.kill()


@pytest.fixture
def adapter(gym):
    """Our reward server where Gym's servers look for it, started as Gym starts it: by the adapter's script."""
    place = {"host": "127.0.0.1", "port": int(gym["reward_server"].rpartition(":")[2])}
    config = {"reward_server": {"resources_servers": {"reward_server": place}}}
    environment = {"NEMO_GYM_CONFIG_DICT": json.dumps(config), "NEMO_GYM_CONFIG_PATH": "reward_server"}
    command = [sys.executable, str(ROOT / "examples/gym_adapter/resources_servers/reward_server/app.py")]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("reward server listening on")
        yield
        process.terminate()


def example_rows(gym_folder: str) -> list[dict]:
    (site,) = Path(GYM_PYTHON).parent.parent.glob("lib/python*/site-packages")
    return [json.loads(line) for line in (site / "resources_servers" / gym_folder / "data" / "example.jsonl").open()]


class Script:
    """An engine that answers turn t of every conversation with the t-th text, cut off at the limit."""

    def __init__(self, tokenizer, texts: list[str]):
        self.tokenizer, self.texts, self.prompts, self.aborted = tokenizer, texts, [], []
        for name in ("start_batch", "advance", "abort"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _start_batch(self, seed: int) -> None:
        self.prompts.clear()

    async def _advance(self, requests, stop_token_ids) -> list[Group]:
        found = []
        for index, ids, limit in requests:
            self.prompts.append(ids)
            turn = self.tokenizer.decode(ids).count("<|im_start|>assistant") - 1
            made = [*self.tokenizer.encode(self.texts[turn]), self.tokenizer.eos_token_id][:limit]
            found.append(Group(index, [np.array(made)], [np.arange(len(made)) / -8], ["stop"]))
        await asyncio.sleep(0)
        return found

    def _abort(self, indices: list[int]) -> None:
        self.aborted += indices


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def episodes(tokenizer, tiny_model):
    """Makes Episodes with the given configuration and engines that say the given texts."""
    made = []

    def make(texts: list[str], *env: str, engines: int = 1) -> Episodes:
        limits = ["policy.max_total_sequence_length=2000", "policy.sequence_packing.train_mb_tokens=2000"]
        limits += ["policy.generation.max_new_tokens=100", f"policy.model_name={tiny_model}"]
        scripts = [Script(tokenizer, texts) for _ in range(engines)]
        made.append(Episodes(load_config(RECIPE, [*limits, *env]), tokenizer, [tokenizer.eos_token_id], scripts))
        return made[-1]

    yield make
    for one in made:
        one.close()
        assert not one.thread.is_alive()


# ---------------------------------------------------------------- tokens


def test_what_the_model_said_is_never_tokenised_again(tokenizer):
    end = tokenizer.eos_token_id
    chat = [{"role": "user", "content": "2+2?"}]
    first = prompt_ids(tokenizer, chat, None)
    assert first == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    digits = tokenizer.encode("1") * 2  # as no tokenizer with a token for "11" would write it
    rest = tokenizer.encode("<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n")
    newline = tokenizer.encode("\n")
    for made, added in ((digits + [end], []), (digits, [end])):  # ended by the model, or cut off
        turn = {"role": "assistant", "content": "11", "prompt_token_ids": first, "generation_token_ids": made}
        then = [*chat, turn, {"role": "developer", "content": [{"type": "text", "text": "sure?"}]}]
        text = tokenizer.encode("<|im_start|>system\nsure?<|im_end|>\n<|im_start|>assistant\n")
        assert prompt_ids(tokenizer, then, None) == first + made + added + newline + text
        then[-1] = {"role": "user", "content": "sure?"}
        assert prompt_ids(tokenizer, then, None) == first + made + added + newline + rest
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write out the assistant's turn once and as it is"):
        prompt_ids(tokenizer, then, None)


def test_only_the_models_own_tokens_are_trained_on():
    calls = [
        {"type": "message", "prompt_token_ids": [1, 2], "generation_token_ids": [3], "generation_log_probs": [-0.5]},
        {"role": "user", "content": "and?"},
        {"type": "function_call", "prompt_token_ids": [1, 2, 3, 4, 5], "generation_token_ids": [6, 7],
         "generation_log_probs": [-1.0, -2.0]},
    ]  # fmt: skip
    found = read_episode(calls, {"reward": 0.5, "status": "correct"}, [7])
    assert (found.prompt_ids.tolist(), found.response_ids.tolist()) == ([1, 2], [3, 4, 5, 6, 7])
    assert found.mask.tolist() == [True, False, False, True, True]
    assert found.rollout_logprobs.tolist() == [-0.5, 0, 0, -1, -2]
    assert (found.truncated, found.turns, found.tool_calls) == (False, 2, 1)
    assert read_episode(calls, {"reward": 0.5, "status": "correct"}, [8]).truncated
    calls[2]["prompt_token_ids"] = [1, 2, 9, 4]
    with pytest.raises(RuntimeError, match="the agent changed the history"):
        read_episode(calls, {"reward": 0.5, "status": "correct"}, [7])


# ---------------------------------------------------------------- an environment of one's own

GUESS = f"env.episode={ROOT}/examples/guess.py:play"


def test_the_example_of_an_own_environment(episodes, tokenizer):
    played = episodes(["is it 3", r"\boxed{9}", "it is 7", "4"], GUESS, engines=2)
    found = played.play([{"number": 7}, {"number": 4}, {"number": 3}, {"number": 1}], 1, 0, lambda: None)
    assert [e.reward for e in found] == [0.5, 0.25, 1.0, 0.0]
    assert [e.turns for e in found] == [3, 4, 1, 4]
    assert [e.status for e in found] == ["correct", "correct", "correct", "wrong"]
    borders = np.flatnonzero(np.diff(found[0].mask)) + 1
    texts = [tokenizer.decode(part) for part in np.split(found[0].response_ids, borders)]
    between = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert texts[::2] == ["is it 3<|im_end|>", "\\boxed{9}<|im_end|>", "it is 7<|im_end|>"]
    assert texts[1::2] == [between.format("higher"), between.format("lower")]
    for prompts in (e.worker.prompts for e in played.engines):
        assert sum(len(ids) == len(found[0].prompt_ids) for ids in prompts) == 2  # first turns
        turns = [tokenizer.decode(ids).count("assistant") for ids in prompts]
        for i, ids in enumerate(prompts):  # and each further one is where the one before it was
            before = [seen for seen, turn in zip(prompts[:i], turns, strict=False) if turn == turns[i] - 1]
            assert turns[i] == 1 or any(ids[: len(seen)] == seen for seen in before)


def test_lost_episodes_are_masked_and_the_others_go_on(episodes, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "async def play(engine, row):\n"
        "    chat = [{'role': 'user', 'content': 'x'}]\n"
        "    if row['do'] == 'fail':\n        raise KeyError('gone')\n"
        "    if row['do'] == 'hang':\n        await asyncio.Event().wait()\n"
        "    chat.append(await engine.reply(chat))\n"
        "    return chat, row['pays']\n"
    )
    played = episodes(["yes"], f"env.episode={tmp_path}/mine.py:play", "env.episode_timeout_s=0.5")
    rows = [{"do": "well", "pays": 1}, {"do": "fail"}, {"do": "hang"}, {"do": "well", "pays": float("nan")}]
    found = played.play(rows, 1, 0, lambda: None)
    assert [e.status for e in found] == ["correct", "lost", "lost", "unusable"]
    assert "2 of 4 episodes lost; one: KeyError: 'gone'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="^env.episode: cannot load 'nowhere.py:play': FileNotFoundError"):
        episodes(["yes"], "env.episode=nowhere.py:play")


def test_evaluation_plays_the_same_episodes(tokenizer, tiny_model, tmp_path, monkeypatch):
    workers = [Script(tokenizer, ["is it 3", "9", "7", "4"])]
    outlived = []  # what was played where an engine may die
    engines = SimpleNamespace(workers=workers, surviving=lambda work: outlived.append(work()) or outlived[-1])
    monkeypatch.setattr(evaluate, "RolloutEngines", lambda *_, **__: engines)
    monkeypatch.setattr(evaluate, "start_ray", lambda *_: None)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"number": {n}}}\n' for n in (7, 3, 1)))
    command = ["--model", str(tiny_model), "--data", f"{tmp_path}/rows.jsonl", "--output", f"{tmp_path}/out"]
    command += ["--k", "2", "--episode", f"{ROOT}/examples/guess.py:play"]
    metrics = evaluate.evaluate(evaluate.parse_args(command))
    assert (metrics["avg@2"], metrics["pass@2"], metrics["answers"]) == (0.5, 2 / 3, 6)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").open()]
    assert [(s["row"], s["reward"]) for s in samples] == [(0, 0.5), (0, 0.5), (1, 1), (1, 1), (2, 0), (2, 0)]
    assert samples[2]["text"] == "is it 3<|im_end|>"
    assert [len(found) for found in outlived] == [6]


@pytest.mark.slow
def test_tokens_and_logprobs_of_a_real_engine(warm_model):
    """Several turns, a prefix cache and two requests at a time: the log-probabilities are those of the sequence."""
    from vllm.distributed import cleanup_dist_env_and_memory

    tokenizer, model = AutoTokenizer.from_pretrained(warm_model), AutoModelForCausalLM.from_pretrained(warm_model)
    limits = ["policy.max_total_sequence_length=250", "policy.sequence_packing.train_mb_tokens=250", GUESS]
    cfg: Config = load_config(RECIPE, [*limits, f"policy.model_name={warm_model}"])
    worker, thread = RolloutWorker(cfg.policy, 0, "cpu", str(warm_model)), ThreadPoolExecutor(1)
    local = SimpleNamespace()  # as an actor: calls come back later, one after the other
    for name in ("start_batch", "advance", "abort"):
        method = getattr(worker, name)
        remote = partial(lambda method, *args: asyncio.wrap_future(thread.submit(method, *args)), method)
        setattr(local, name, SimpleNamespace(remote=remote))
    played = Episodes(cfg, tokenizer, [tokenizer.eos_token_id], [local])
    play = played.function

    async def leave(engine: Episodes, row: dict) -> None:
        await asyncio.wait([asyncio.ensure_future(engine.reply([{"role": "user", "content": "x"}]))], timeout=0.01)
        raise KeyError("gone, while the engine is still at it")

    played.function = leave
    assert [e.status for e in played.play([{}], 2, 0, lambda: None)] == ["lost", "lost"]
    played.function = play
    found = played.play([{"number": 99}, {"number": 98}], 2, 0, lambda: None)
    played.close()
    cleanup_dist_env_and_memory()  # later tests make process groups of their own
    assert [e.turns for e in found] == [4] * 4
    for e in found:
        ids = torch.from_numpy(np.concatenate([e.prompt_ids, e.response_ids]))[None]
        logprobs = model.float()(ids).logits[0, len(e.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(-1, ids[0, len(e.prompt_ids) :, None])[:, 0].detach().numpy()
        np.testing.assert_allclose(e.rollout_logprobs[e.mask], expected[e.mask], atol=1e-4)
        assert not e.rollout_logprobs[~e.mask].any()


# ---------------------------------------------------------------- NeMo Gym

BOXED = [r"so \boxed{4}", r"so \boxed{5}", r"<think>\boxed{5}</think>so \boxed{4}", r"<think>\boxed{4}</think>so", "no"]


@needs_gym
@pytest.mark.slow
def test_a_resources_server_gives_the_rewards_of_ours(gym, tmp_path):
    row = example_rows("math_with_judge")[0] | {"expected_answer": "4"}
    ours, theirs = RewardClient(Env(reward_workers=1), tmp_path), RewardClient(Env(reward_url=gym["math"]), tmp_path)
    try:
        found = [[v["reward"] for v in client.submit(BOXED, row).result(60)] for client in (ours, theirs)]
        assert found[0] == found[1] == [1, 0, 1, 0, 0]
        del row["question"]
        with pytest.raises(RunError, match=r'/verify answered 422: .*"question"'):
            theirs.submit(["x"], row).result(60)
        with pytest.raises(ConfigError, match="/verify answered 404"):  # the agent, which is no resources server
            RewardClient(Env(reward_url=gym["math_agent"]), tmp_path)
    finally:
        ours.close()
        theirs.close()


@needs_gym
def test_every_example_row_of_gym_is_read_or_refused():
    """Messages that `read_row` made of all that it takes were once compared with Gym's own: no difference."""
    (site,) = Path(GYM_PYTHON).parent.parent.glob("lib/python*/site-packages")
    taken, refused = 0, set()
    for path in site.glob("*/*/data/example.jsonl"):
        for line in path.open():
            try:
                taken += bool(read_row(json.loads(line), math=False))
            except ValueError as e:
                refused.add(str(e).split()[0].partition("[")[0])
    fields = ("input", "tools", "temperature", "top_p", "max_output_tokens", "metadata")
    assert taken > 400
    assert refused <= {"responses_create_params", *(f"responses_create_params.{name}" for name in fields)}


@needs_gym
@pytest.mark.slow
def test_turns_and_tools_of_gym(gym, episodes, tokenizer, capsys):
    said = ["Paris <x>", "some", "the Eiffel Tower"]
    urls = f"env.gym_model_address={gym['policy']}"
    played = episodes(said, urls, f"env.gym_url={gym['turns_agent']}")
    rows = example_rows("example_multi_turn_gymnasium")[:2]
    first, second = played.play(rows, 1, 0, lambda: None)
    assert (first.reward, first.turns, second.reward, second.turns) == (1.0, 3, 0.0, 2)
    own = tokenizer.decode(first.response_ids[first.mask])
    assert own == "".join(f"{text}<|im_end|>" for text in said)
    others = tokenizer.decode(first.response_ids[~first.mask])
    assert re.findall("user\n(.*?)<", others) == rows[0]["follow_ups"]
    assert first.rollout_logprobs[first.mask].tolist()[:3] == [0, -0.125, -0.25]
    played.close()

    said = ['look: <tool_call>{"name": "get_weather", "arguments": {"city": "sf"}}</tool_call>', "cold"]
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    played = episodes(said, urls, f"env.gym_url={gym['weather_agent']}")
    (found,) = played.play(example_rows("example_single_tool_call")[:1], 1, 0, lambda: None)
    assert (found.reward, found.turns, found.tool_calls) == (1.0, 2, 1)
    assert "get_weather" in tokenizer.decode(found.prompt_ids)
    assert "The weather in sf is cold." in tokenizer.decode(found.response_ids[~found.mask])
    with pytest.raises(RunError, match="/run answered 422: .*responses_create_params"):
        played.play([{"number": 7}], 1, 0, lambda: None)
    with pytest.raises(ConfigError, match="/run answered 404; it must be an environment server or an agent"):
        episodes(said, urls, f"env.gym_url={gym['weather']}")


@needs_gym
@pytest.mark.slow
def test_our_verifier_in_an_environment_server_of_gym(gym, adapter, episodes, tokenizer, capsys):
    """Gym's single_agent_turn opens, verifies and closes sessions of our server."""
    urls = [f"env.gym_url={gym['reward_server_environment']}", f"env.gym_model_address={gym['policy']}"]
    played = episodes(["Answer: 20"], *urls)  # nothing is boxed: Gym's own verifier would not pay
    row = {"responses_create_params": {"input": "What is 12 + 8?"}, "question": "What is 12 + 8?"}
    inputs = [row | {"expected_answer": gold} for gold in ("20", "16", "")]
    inputs.append(row)  # which has no expected_answer
    rows = [{"task_id": {"taskset": "sums", "task_id": str(i)}, "task_input": task} for i, task in enumerate(inputs)]
    found = played.play(rows, 1, 0, lambda: None)
    assert [e.reward for e in found] == [1.0, 0.0, 0.0, 0.0]
    assert [e.status for e in found] == ["correct", "wrong", "masked", "lost"]
    assert tokenizer.decode(found[1].response_ids[found[1].mask]) == "Answer: 20<|im_end|>"
    assert re.search(r"1 of 4 episodes lost; one: RuntimeError: 422, .*/verify'", capsys.readouterr().err)
    with pytest.raises(RunError, match="/run answered 422: .*episode_id"):  # a row that is not materialized
        played.play([row | {"expected_answer": "20"}], 1, 0, lambda: None)
    played.close()
    legacy = episodes(["Answer: 20"], f"env.gym_url={gym['legacy_environment']}", urls[1])
    (flat,) = legacy.play([row | {"expected_answer": "20"}], 1, 0, lambda: None)
    assert (flat.reward, flat.status) == (1.0, "correct")


@needs_gym
@pytest.mark.slow
def test_training_on_math_through_a_gym_agent(gym, quickstart_overrides, warm_model, tmp_path, stopped_afterwards):
    overrides = [
        *quickstart_overrides,
        f"policy.model_name={warm_model}", f"env.gym_url={gym['math_agent']}",
        f"env.gym_model_address={gym['policy']}", "cluster.cpu_ranks_per_node=2", "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=4", "grpo.max_num_steps=3", "grpo.max_val_samples=4", "grpo.val_period=3",
        "checkpointing.enabled=false", "logger.num_rollouts_to_save=-1",
    ]  # fmt: skip
    train(load_config(RECIPE, overrides))
    steps = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").open()]
    assert [m["step"] for m in steps] == [0, 1, 2, 3]
    assert [0 <= m["val:accuracy"] <= 1 for m in (steps[0], steps[3])] == [True, True]
    samples = [json.loads(line) for line in (tmp_path / "logs" / "rollouts.jsonl").open()]
    assert sum(s["split"] == "train" for s in samples) == 3 * 16
    for m in steps[1:]:
        assert m.get("gen_kl_error", 0) < 1e-10  # not there if all 16 rewards are the same, as now and then
        assert (m["num_unverified"], m["mean_turns"], m["num_masked_tokens"]) == (0, 1, 0)
        mine = [s for s in samples if s["step"] == m["step"] and s["split"] == "train"]
        assert m["reward"] == np.mean([s["reward"] for s in mine])
    assert "gen_kl_error" in steps[1]
    assert {s["reward"] for s in samples} == {0.0, 1.0}
    with socket.create_server((gym["policy"].split(":")[0], int(gym["policy"].split(":")[1]))):
        pass  # nobody listens there any more
