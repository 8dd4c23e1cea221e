"""Supervised fine-tuning: the whole script, against Hugging Face's own loss."""

import json

import numpy as np
import pytest
import torch
from conftest import run_script
from test_run import read
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import ConfigError
from rows import Rows
from sft import solution_ids

SIZE = 16


@pytest.mark.slow
def test_losses_are_those_of_hugging_face(forks, arithmetic_rows, tiny_model, tmp_path):
    """Over two ranks and packed; the second step's loss shows that the first one's update was right, too."""
    overrides = [
        f"policy.model_name={tiny_model}", f"data.train_jsonl_fpath={arithmetic_rows}/train.jsonl",
        "data.validation_jsonl_fpath=null", f"logger.log_dir={tmp_path}/logs", "cluster.cpu_ranks_per_node=2",
        f"checkpointing.checkpoint_dir={tmp_path}/checkpoints", f"grpo.num_prompts_per_step={SIZE}",
        "grpo.max_num_steps=2", "data.shuffle=false", "policy.optimizer={lr: 0.01, eps: 1e-3}",
    ]  # fmt: skip
    run_script(overrides, tmp_path, "sft.py")

    tokenizer, lm = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.01, eps=1e-3, weight_decay=0.0)
    rows = read(arithmetic_rows / "train.jsonl")
    for step, metrics in enumerate(read(tmp_path / "logs" / "metrics.jsonl")):
        losses, tokens = [], 0
        for row in rows[step * SIZE : (step + 1) * SIZE]:
            chat = row["responses_create_params"]["input"]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            answer = tokenizer.encode(row["solution"]) + [tokenizer.eos_token_id]
            ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
            losses.append(lm(ids, labels=labels).loss * len(answer))
            tokens += len(answer)
        loss = sum(losses) / tokens
        optimizer.zero_grad()
        loss.backward()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0).item()
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        optimizer.step()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step_2").state_dict()
    for name, weight in lm.state_dict().items():
        np.testing.assert_allclose(trained[name], weight, atol=1e-5, err_msg=name)


def test_rows_without_a_solution_or_without_room_are_named(tiny_model, tmp_path):
    row = {"responses_create_params": {"input": "What is 1 + 1?"}, "expected_answer": "2", "solution": "2"}
    tokenizer, path = AutoTokenizer.from_pretrained(tiny_model), tmp_path / "rows.jsonl"

    def ids(*rows: dict, longest: int = 60) -> list[list[int]]:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return [found.tolist() for found in solution_ids(Rows(str(path), tokenizer, 60), tokenizer, longest)]

    assert ids(row) == [[*tokenizer.encode("2"), tokenizer.eos_token_id]]
    with pytest.raises(ConfigError, match=r"rows\.jsonl: row 2 has no `solution`"):
        ids(row, row | {"solution": " "})
    with pytest.raises(ConfigError, match=r"row 1 has \d+ tokens with its solution, more than .*sequence_length=9"):
        ids(row, longest=9)
