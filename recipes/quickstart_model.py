"""Make the quickstart's model from scratch: a tiny Qwen3 with its own tokenizer, warmed up on noisy arithmetic.

    python recipes/quickstart_model.py --data data/quickstart/train.jsonl --output results/quickstart/model

A pretrained model answers some problems before reinforcement learning starts; this stands in for one where nothing can
be downloaded. Half of the labels are wrong on purpose: sampled answers are right about one time in three, which leaves
GRPO something to do. Takes about a minute on two cores; does nothing when the folder is already there.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # read on import; see launch.start_ray
import torch  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRONG_LABELS = 0.5
ENOUGH = 0.30  # stop when this share of sampled answers would be right


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token per digit, and chat tokens like Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=[END, START, STOP],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=STOP, pad_token=END, chat_template=CHAT_TEMPLATE, model_max_length=256
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """0.4 million parameters, embeddings tied to the head as in the small Qwen3 models."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict], solutions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, longest] padded on the right, and labels: -100 on prompt and padding."""
    ids, labels = [], []
    for row, solution in zip(rows, solutions, strict=True):
        messages = row["responses_create_params"]["input"]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(solution) + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)


@torch.no_grad()
def chance_of_right_answer(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean probability of sampling exactly the right answer: exact, without sampling."""
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    picked = logprobs.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return (picked * (target >= 0)).sum(1).exp().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of prepare_data.py arithmetic")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--max-steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        print(f"{args.output} is already there")
        return
    rows = [json.loads(line) for line in args.data.open()]
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer([row["question"] + " " + row["solution"] for row in rows])
    model = make_model(tokenizer)
    ids, labels = encode(tokenizer, rows, [row["solution"] for row in rows])
    answers = torch.randperm(len(rows))  # a wrong label is the right one of another row
    _, wrong = encode(tokenizer, rows, [rows[i]["solution"] for i in answers])
    width = max(labels.shape[1], wrong.shape[1])
    ids, labels, wrong = (torch.nn.functional.pad(x, (0, width - x.shape[1]), value=v)
                          for x, v in ((ids, tokenizer.pad_token_id), (labels, -100), (wrong, -100)))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    began, right = time.time(), 0.0
    for step in range(args.max_steps):
        batch = torch.randint(len(rows), (128,))
        noisy = torch.where(torch.rand(128, 1) < WRONG_LABELS, wrong[batch], labels[batch])
        inputs = torch.where(noisy >= 0, noisy, torch.where(labels[batch] >= 0, tokenizer.pad_token_id, ids[batch]))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100)
        model(inputs, labels=noisy).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            right = chance_of_right_answer(model, ids[:256], labels[:256])
            print(f"supervised step {step + 1}: {right:.0%} of sampled answers right, {time.time() - began:.0f} s")
            if right >= ENOUGH:
                break
    unfinished = args.output.with_name("tmp_" + args.output.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(args.output)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.output}: {parameters / 1e6:.2f} million parameters, vocabulary {len(tokenizer)}, {right:.0%} right")


if __name__ == "__main__":
    main()
