"""Make the quickstart's model from scratch: a tiny Qwen3 with its own tokenizer, warmed up on noisy arithmetic.

    python recipes/quickstart_model.py --data data/quickstart/train.jsonl --output results/quickstart/model

A pretrained model answers some problems before reinforcement learning starts; this stands in for one where nothing can
be downloaded. It is fine-tuned by one rank of policy.py with the loss of sft.py, here without Ray. Half of the answers
that it sees are wrong on purpose: what it samples is right about one time in three, which leaves GRPO something to do.
Takes one to two minutes on two cores; does nothing when the folder is already there.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # read on import; see launch.start_ray
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from config import load_config  # noqa: E402 - the scripts lie beside this folder
from model import Sequences  # noqa: E402
from policy import PolicyWorker  # noqa: E402
from rows import Rows  # noqa: E402
from sft import negative_log_likelihood, solution_ids  # noqa: E402

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRONG_ANSWERS = 0.5
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


def warm_up(worker: PolicyWorker, prompts: list[np.ndarray], right: list[np.ndarray], seed: int, steps: int) -> float:
    """Fine-tune until `ENOUGH` of the sampled answers would be right; returns that share: exact, without sampling."""
    rng, began, share = np.random.default_rng(seed), time.time(), 0.0
    shown = Sequences(prompts[:256], right[:256], {}, {})
    for step in range(steps):
        chosen = rng.integers(len(prompts), size=128)
        # A wrong answer is the right one of another row.
        answered = np.where(rng.random(128) < WRONG_ANSWERS, rng.integers(len(prompts), size=128), chosen)
        batch = Sequences([prompts[i] for i in chosen], [right[i] for i in answered], {}, {})
        worker.update(batch, negative_log_likelihood, {"num_tokens": sum(map(len, batch.response_ids))})
        if step % 25 == 24:
            share = float(np.mean([np.exp(logprobs.sum()) for logprobs in worker.logprobs(shown).values()]))
            print(f"supervised step {step + 1}: {share:.0%} of sampled answers right, {time.time() - began:.0f} s")
            if share >= ENOUGH:
                break
    return share


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
    tokenizer = train_tokenizer([f"{row['question']} {row['solution']}" for row in map(json.loads, args.data.open())])
    torch.manual_seed(args.seed)
    model = make_model(tokenizer)
    unfinished = args.output.with_name("tmp_" + args.output.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    settings = [
        f"policy.model_name={unfinished}", "cluster.gpus_per_node=0", "policy.precision=float32",
        "policy.sequence_packing.train_mb_tokens=256", "policy.optimizer.lr=3e-3",
        "policy.optimizer.weight_decay=0.01", "policy.scheduler.warmup_steps=100",
    ]  # fmt: skip
    cfg = load_config(ROOT / "recipes" / "quickstart.yaml", settings).policy
    rows = Rows(str(args.data), tokenizer, cfg.max_total_sequence_length, task="any")
    prompts = [np.array(ids) for ids in rows.prompt_ids]
    worker = PolicyWorker(cfg, 0, 1, "cpu", timeout_s=60)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    worker.setup(address)
    right = solution_ids(rows, tokenizer, cfg.max_total_sequence_length)
    share = warm_up(worker, prompts, right, args.seed, args.max_steps)
    worker.save(str(unfinished), lambda: None)
    error, _ = worker.wait_saved()
    if error:
        sys.exit(f"error: {unfinished} could not be written: {error}")
    shutil.rmtree(unfinished / "training_state")
    unfinished.rename(args.output)
    torch.distributed.destroy_process_group()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.output}: {parameters / 1e6:.2f} million parameters, vocabulary {len(tokenizer)}, {share:.0%} right")


if __name__ == "__main__":
    main()
