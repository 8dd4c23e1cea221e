"""An environment of your own over several turns, without NeMo Gym: guess a number, hear "higher" or "lower".

    for n in {0..20}; do echo "{\"number\": $n}"; done > data/guess.jsonl
    python train_grpo.py --config recipes/quickstart.yaml env.episode=examples/guess.py:play \
        data.train_jsonl_fpath=data/guess.jsonl data.validation_jsonl_fpath=null \
        grpo.num_prompts_per_step=21 policy.max_total_sequence_length=256

A row is whatever `play` reads. All episodes of a batch run in one asyncio loop: await what takes long.
"""

import re
from typing import Any

TURNS = 4


async def play(engine: Any, row: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """The chat, in which the model's messages are as `engine.reply` returned them, and its reward."""
    chat = [{"role": "user", "content": "Guess a number from 0 to 20."}]
    for turn in range(TURNS):
        answer = await engine.reply(chat)
        chat.append(answer)
        guess = re.search(r"\d{1,9}", answer["content"])
        if guess and int(guess[0]) == row["number"]:
            return chat, 1 - turn / TURNS
        hint = "not a number" if not guess else "higher" if int(guess[0]) < row["number"] else "lower"
        chat.append({"role": "user", "content": hint})
    return chat, 0.0
