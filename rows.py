"""The problems of a run: rows of a JSONL file as token ids, in an order that depends only on seed and step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, GenerationConfig

from config import ConfigError


class Rows:
    """Rows of a JSONL file with their prompts as token ids. The order depends only on seed and step."""

    def __init__(self, path: str, tokenizer: Any, max_length: int):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as e:
            raise ConfigError(
                f"cannot read rows from '{path}' ({e.strerror}); make them with prepare_data.py"
            ) from None
        self.path, self.rows, self.prompt_ids = path, [], []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                messages, _ = row["responses_create_params"]["input"], row["expected_answer"]
            except (ValueError, KeyError, TypeError) as e:
                raise ConfigError(
                    f"{path} line {number} is not a row ({type(e).__name__}: {e}); see prepare_data.py"
                ) from None
            if isinstance(messages, str):
                messages = [{"role": "user", "content": messages}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            if len(ids) >= max_length:
                raise ConfigError(
                    f"{path} line {number}: the prompt has {len(ids)} tokens, which leaves no room for an answer in "
                    f"policy.max_total_sequence_length={max_length}; drop such rows in prepare_data.py"
                )
            self.rows.append(row)
            self.prompt_ids.append(ids)

    def __len__(self) -> int:
        return len(self.rows)

    def number_of_steps(self, prompts_per_step: int, epochs: int, most: int) -> int:
        """Steps of a run; each epoch drops its incomplete last batch. Raises ConfigError if not one batch is full."""
        per_epoch = len(self) // prompts_per_step
        if not per_epoch:
            raise ConfigError(
                f"{self.path} has {len(self)} rows, fewer than grpo.num_prompts_per_step={prompts_per_step}"
            )
        return min(most, per_epoch * epochs)

    def batch(self, step: int, size: int, seed: int, shuffle: bool) -> list[int]:
        """Row indices of the `step`-th batch (from 0); each epoch has its own order and drops the incomplete end."""
        epoch, position = divmod(step, len(self) // size)
        order = np.random.default_rng([seed, epoch]).permutation(len(self)) if shuffle else np.arange(len(self))
        return order[position * size : (position + 1) * size].tolist()


def load_tokenizer(model_name: str) -> Any:
    """The tokenizer of a Hugging Face folder or name. Raises ConfigError if it cannot format a chat."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(f"cannot load policy.model_name='{model_name}': {reason}") from None
    if not tokenizer.chat_template:
        raise ConfigError(f"policy.model_name='{model_name}' has no chat template; use an instruction-tuned model")
    return tokenizer


def end_of_sequence_ids(model_name: str, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation configuration."""
    ids = {tokenizer.eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(model_name).eos_token_id
    except OSError:
        configured = None
    ids |= set(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)
