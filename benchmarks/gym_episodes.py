"""Train three steps on two environments of NeMo Gym, with two engines on the CPU: does every token survive the wire?

    GYM_PYTHON=.venv-gym/bin/python python benchmarks/gym_episodes.py [--steps 3] [--results FILE]

turns: example_multi_turn_gymnasium, 2 to 3 turns. weather: example_single_tool_call, a tool in two turns. (Math is in
tests/test_gym.py.) The models are tiny, and were shown what they may say for a minute.
Prints a Markdown table of each step. `gen_kl_error` is near 0 only if engine and trainer saw the same tokens.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
from quickstart_model import CHAT_TEMPLATE, make_model, train_tokenizer  # noqa: E402

from benchmarks.environment import environment  # noqa: E402 - the scripts lie beside this folder
from gym import plain  # noqa: E402

GYM_PYTHON = os.environ.get("GYM_PYTHON", str(ROOT / ".venv-gym" / "bin" / "python"))
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "sf"}}</tool_call>'
FOLDERS = {"weather": "example_single_tool_call", "turns": "example_multi_turn_gymnasium"}
METRICS = ("reward", "gen_kl_error", "grad_norm", "mean_turns", "num_tool_calls", "num_masked_tokens", "num_unverified")


@contextmanager
def gym_servers(log: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Gym's servers while the block runs: their urls by name, and the address where they look for the policy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    servers = [GYM_PYTHON, str(ROOT / "tests" / "gym_servers.py"), f"http://{address}/v1"]
    pipe = subprocess.PIPE
    with log.open("w") as said, subprocess.Popen(servers, text=True, stdin=pipe, stdout=pipe, stderr=said) as process:
        try:
            urls = next((line for line in process.stdout if line.startswith("{")), None)
            if urls is None:
                sys.exit(f"error: Gym's servers did not start: {log.read_text()[-2000:]}")
            yield json.loads(urls), address
        finally:
            process.kill()


def example_rows(environment: str) -> list[dict]:
    (site,) = Path(GYM_PYTHON).parent.parent.glob("lib/python*/site-packages")
    path = site / "resources_servers" / FOLDERS[environment] / "data" / "example.jsonl"
    return [json.loads(line) for line in path.open()]


def lessons(rows: list[dict]) -> list[tuple[list[dict], list | None, str]]:
    """What the model may say: (chat, tools, answer), right ones and wrong ones alike."""
    found = []
    for row in rows:
        params = row["responses_create_params"]
        chat, tools = [plain(message) for message in params["input"]], params.get("tools")
        if tools:
            function = {key: tools[0][key] for key in ("name", "description", "parameters")}  # as Gym passes it on
            tools = [{"function": function, "type": "function"}]
        right = CALL if tools else f"\\boxed{{{row['expected_answer']}}}"
        found += [(chat, tools, right), (chat, tools, "no idea")]
    return found


def make_taught_model(rows: list[dict], folder: Path, steps: int = 60) -> None:
    """A model of the quickstart's size, with tools in its template and room for them, that has seen the lessons."""
    texts = [json.dumps(row, ensure_ascii=False) for row in rows] + [CALL, r"no idea \boxed{0123}"]
    tokenizer = train_tokenizer(texts)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
    tokenizer.model_max_length = 2048
    torch.manual_seed(0)
    model = make_model(tokenizer)
    model.config.max_position_embeddings = 2048
    model = type(model)(model.config)
    ids, labels = [], []
    for chat, tools, answer in lessons(rows):
        prompt = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=False)
        said = tokenizer.encode(answer) + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + said))
        labels.append(torch.tensor([-100] * len(prompt) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(environment: str, urls: dict[str, str], address: str, folder: Path, steps: int) -> list[dict]:
    """The metrics of each step."""
    rows = example_rows(environment)
    make_taught_model(rows, folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, str(ROOT / "train_grpo.py"), "--config", str(ROOT / "recipes" / "quickstart.yaml"),
        f"policy.model_name={folder}/model", f"data.train_jsonl_fpath={folder}/rows.jsonl",
        "data.validation_jsonl_fpath=null", f"logger.log_dir={folder}/logs", "checkpointing.enabled=false",
        f"env.gym_url={urls[environment + '_agent']}", f"env.gym_model_address={address}",
        "cluster.cpu_ranks_per_node=2", f"grpo.num_prompts_per_step={len(rows)}", "grpo.num_generations_per_prompt=8",
        f"grpo.max_num_steps={steps}", f"grpo.max_num_epochs={steps}", "grpo.reward_shaping.enabled=false",
        "policy.max_total_sequence_length=1600", "policy.generation.max_new_tokens=120",
        "policy.sequence_packing.train_mb_tokens=4096",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=folder)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").open()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = {"environment": environment()}
    print(f"| environment | step | {' | '.join(METRICS)} | generate s |\n|---|---|{'---|' * (len(METRICS) + 1)}")
    with tempfile.TemporaryDirectory() as logs, gym_servers(Path(logs, "gym.txt")) as (urls, address):
        for name in ("weather", "turns"):
            with tempfile.TemporaryDirectory() as folder:
                results[name] = train(name, urls, address, Path(folder), args.steps)
            for m in results[name]:
                values = " | ".join(f"{m[key]:.3g}" if key in m else "-" for key in METRICS)
                print(f"| {name} | {m['step']} | {values} | {m['time/generate_s']:.2f} |", flush=True)
    if args.results:
        args.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
