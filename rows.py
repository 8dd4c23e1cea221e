"""The problems of a run: rows of a JSONL file as token ids, in an order that depends only on seed and step.

Rows are as NeMo Gym 0.7 and prepare_data.py write them; see the top of prepare_data.py.
"""

import argparse
import hashlib
import json
import math
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from config import ConfigError

AGENT_REF = {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}


def read_row(row: Any, math: bool = True) -> dict[str, Any]:
    """The row with its prompt as chat messages and its answer as text; a materialized row is in its `task_input`.

    With `math=False` the row may be of any environment, with any answer or none. Raises ValueError, which names the
    field, for what training would otherwise silently ignore.
    """
    if isinstance(row, dict):
        row = row.get("task_input", row)
    if not isinstance(row, dict) or not isinstance(row.get("responses_create_params"), dict):
        raise ValueError("responses_create_params is missing or no object")
    params = dict(row["responses_create_params"])
    for field in ("agent_ref", "task_source") if math else ():
        if row.get(field) and "math_with_judge" not in str(row[field]):
            raise ValueError(f"{field} is not math_with_judge, for which alone there is a verifier: {row[field]!r}")
    for field in ("tools", "temperature", "top_p", "max_output_tokens"):
        if params.get(field) not in (None, []):
            raise ValueError(f"responses_create_params.{field} of a single row is not supported")
    if "audio" in str(params.get("metadata")):
        raise ValueError("responses_create_params.metadata has audio, which is not supported")
    prompt = params.get("input")
    items = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    items = items if isinstance(items, list) else []
    messages = [chat_message(item, f"responses_create_params.input[{i}]") for i, item in enumerate(items)]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("responses_create_params.input is no chat that ends with the user's turn")
    if instructions := params.pop("instructions", None):
        messages.insert(0, {"role": "system", "content": str(instructions)})
    answer = {"expected_answer": answer_text(row.get("expected_answer"))} if math else {}
    return {**row, "responses_create_params": {**params, "input": messages}, **answer}


def chat_message(item: Any, field: str) -> dict[str, str]:
    """An item of `input` as a chat message. Raises ValueError for other items, such as function calls or images."""
    try:
        role, content = item["role"], item["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
    except (KeyError, TypeError):
        role = content = None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise ValueError(f"{field} is no message of role and text, the only kind that is supported: {item!r:.80}")
    return {"role": role, "content": content}


def answer_text(value: Any) -> str:
    """An answer as text: 4 for 4.0. Raises ValueError if it is empty, infinite, or neither text nor number."""
    if type(value) in (int, float, Decimal) and abs(value) < math.inf:
        return str(int(value) if value == int(value) else value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ValueError(f"expected_answer is empty or neither text nor number: {value!r}")


class Rows:
    """Rows of a JSONL file with their prompts as token ids."""

    def __init__(self, path: str, tokenizer: Any, max_length: int, task: str = "math"):
        """`task`: "math" for the math verifier, "any" for another one, "episode" if the episode makes the prompt."""
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as e:
            message = f"cannot read rows from '{path}' ({e.strerror}); make them with prepare_data.py"
            raise ConfigError(message) from None
        self.path, self.rows, self.prompt_ids = path, [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row = row if task == "episode" else read_row(row, math=task == "math")
                ids = [] if task == "episode" else encode_prompt(tokenizer, row)
            except (ValueError, RecursionError) as e:
                raise ConfigError(f"{path} line {number} is not a row: {e}; see prepare_data.py") from None
            if len(ids) >= max_length:
                raise ConfigError(
                    f"{path} line {number}: the prompt has {len(ids)} tokens, which leaves no room for an answer in "
                    f"policy.max_total_sequence_length={max_length}; see prepare_data.py --max-prompt-length"
                )
            self.rows.append(row)
            self.prompt_ids.append(ids)
        if not self.rows:
            raise ConfigError(f"{path} has no rows; make some with prepare_data.py")

    def __len__(self) -> int:
        return len(self.rows)

    def number_of_batches(self, prompts_per_step: int, epochs: int) -> int:
        """Full batches in all epochs. Raises ConfigError if there is none."""
        per_epoch = len(self) // prompts_per_step
        if not per_epoch:
            raise ConfigError(
                f"{self.path} has {len(self)} rows, fewer than grpo.num_prompts_per_step={prompts_per_step}"
            )
        return per_epoch * epochs

    def batch(self, step: int, size: int, seed: int, shuffle: bool) -> list[int]:
        """Row indices of the `step`-th batch (from 0); each epoch has its own order and drops the incomplete end."""
        epoch, position = divmod(step, len(self) // size)
        order = np.random.default_rng([seed, epoch]).permutation(len(self)) if shuffle else np.arange(len(self))
        return order[position * size : (position + 1) * size].tolist()


def encode_prompt(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """Token ids of a row's chat, up to where the response begins. Raises ValueError if the chat template refuses it."""
    chat = row["responses_create_params"]["input"]
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    except TemplateError as e:
        raise ValueError(f"the model's chat template refuses it: {e}") from None


def load_tokenizer(
    model_name: str,
    option: str = "policy.model_name",
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Any:
    """The tokenizer of a Hugging Face folder or name. Raises ConfigError if it cannot format a chat.

    `chat_template`: a file to use instead of the tokenizer's own template; `chat_template_kwargs`: its arguments.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(f"cannot load {option}='{model_name}': {reason}") from None
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text()
        except (OSError, ValueError) as e:
            raise ConfigError(f"cannot read the chat template '{chat_template}': {e}") from None
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{option}='{model_name}' has no chat template; use an instruction-tuned model, or give a Jinja file: "
            "data.chat_template=FILE for training, --chat-template FILE elsewhere"
        )
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **(chat_template_kwargs or {}))
    return tokenizer


def add_template_options(parser: argparse.ArgumentParser) -> None:
    """Add options for `load_tokenizer` to the command line of a script that has no configuration."""
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file to use instead of the model's own")
    words = "arguments of the chat template, as JSON: '{\"enable_thinking\": false}'"
    parser.add_argument("--chat-template-kwargs", metavar="JSON", type=json.loads, default={}, help=words)


def end_of_sequence_ids(model_name: str, tokenizer: Any) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those of the model's generation configuration.

    Raises ConfigError if there is none.
    """
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(model_name).eos_token_id
    except OSError:
        configured = None
    ids |= set(configured if isinstance(configured, list) else [configured])
    if ids == {None}:
        raise ConfigError(f"'{model_name}' has no end token: set eos_token_id in its generation_config.json")
    return sorted(ids - {None})


def contents(path: str | None) -> str | None:
    """A fingerprint of a file, or of a model's folder, that does not depend on its path. A name on the hub is its own.

    It is a sha256, for a folder over the size and the first and last MiB of each file of weights.
    """
    if path is None or not Path(path).exists():
        return path
    if Path(path).is_file():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as weights:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + weights.read(2**20))
            weights.seek(max(0, file.stat().st_size - 2**20))
            digest.update(weights.read())
    return digest.hexdigest()
