"""Score a checkpoint: `python evaluate.py --model DIR_OR_NAME --data rows.jsonl [--k 16]`

Samples `k` answers to every row with vLLM and the reward server, exactly as training does, and prints avg@k, pass@k and
maj@k with 95 % bootstrap intervals over the rows. Every answer is written to `--output` as JSONL.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import ConfigError, Env, Generation, PolicyCfg, VllmCfg
from reward_client import UNVERIFIED, RewardClient
from rollout import RolloutWorker
from rows import Rows, end_of_sequence_ids, load_tokenizer


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of `k` answers drawn from `n`, of which `c` are right, is right.

    1 - C(n - c, k) / C(n, k), arXiv:2107.03374. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_is_right(answers: list[str | None], rewards: list[float]) -> float:
    """maj@k: reward of the most frequent extracted answer (ties: the one seen first); no answer does not vote."""
    votes = Counter(a for a in answers if a is not None)
    return rewards[answers.index(votes.most_common(1)[0][0])] if votes else 0.0


def interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval, resampling rows."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (2000, len(values))).mean(1)
    return float(np.mean(values)), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or name")
    parser.add_argument("--data", required=True, help="rows of prepare_data.py")
    parser.add_argument("--k", type=int, default=16, help="answers per row")
    parser.add_argument("--limit", type=int, help="first N rows only")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=8192)
    parser.add_argument("--max-total-sequence-length", type=int, default=10240)
    parser.add_argument("--kv-cache-gib", type=float, help="KV cache of the engine (default: share of the GPU; CPU: 1)")
    parser.add_argument("--reward-url", help="a running reward server; default: start one")
    parser.add_argument("--output", type=Path, default=Path("results/evaluation"), help="folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        evaluate(args)
    except ConfigError as e:
        sys.exit(f"error: {e}")


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Sample, score, print and write. Returns the metrics."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    tokenizer = load_tokenizer(args.model)
    data = Rows(args.data, tokenizer, args.max_total_sequence_length)
    args.output.mkdir(parents=True, exist_ok=True)
    gib = args.kv_cache_gib or (1 if device == "cpu" else None)
    engine = RolloutWorker(
        PolicyCfg(
            model_name=args.model,
            precision="float32" if device == "cpu" else "bfloat16",
            max_total_sequence_length=args.max_total_sequence_length,
            generation=Generation(
                max_new_tokens=args.max_new_tokens,
                vllm_cfg=VllmCfg(
                    max_model_len=args.max_total_sequence_length,
                    kv_cache_memory_bytes=int(gib * 2**30) if gib else None,
                    enforce_eager=device == "cpu",
                ),
            ),
        ),
        args.seed,
        device,
        model_name=args.model,
    )
    rewards = RewardClient(Env(reward_url=args.reward_url, reward_workers=os.cpu_count() or 2), args.output)
    prompts = list(enumerate(data.prompt_ids[: args.limit]))
    pending, lines = [], []
    try:
        with tqdm(total=len(prompts), desc="generate", disable=None) as progress:
            stop_ids = end_of_sequence_ids(args.model, tokenizer)
            for groups in engine.generate(prompts, args.k, args.seed, stop_ids, args.temperature):
                for g in groups:
                    texts = tokenizer.batch_decode(g.response_ids, skip_special_tokens=True)
                    verdicts = rewards.submit(texts, data.rows[g.index]["expected_answer"])
                    pending.append((g, texts, verdicts))
                progress.update(len(groups))
        for g, texts, future in sorted(pending, key=lambda p: p[0].index):
            parts = zip(texts, g.finish_reasons, future.result(), strict=True)
            lines += [{"row": g.index, "text": t, "truncated": why == "length", **v} for t, why, v in parts]
    finally:
        rewards.close()
    metrics = summarize(lines, args.k)
    (args.output / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"wrote {args.output}/samples.jsonl and metrics.json")
    return metrics


def summarize(lines: list[dict], k: int) -> dict[str, float]:
    """avg@k, pass@j and maj@k of scored answers, printed and returned. Unverified answers are left out and counted."""
    rows: dict[int, list[dict]] = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    verified = [[a for a in answers if a["status"] not in UNVERIFIED] for answers in rows.values()]
    verified = [answers for answers in verified if answers]
    metrics: dict[str, float] = {
        "rows": len(rows),
        "answers": len(lines),
        "num_unverified": sum(line["status"] in UNVERIFIED for line in lines),
        "truncation_rate": float(np.mean([line["truncated"] for line in lines])),
    }
    counts = [(len(answers), sum(a["reward"] > 0 for a in answers)) for answers in verified]
    series = {f"avg@{k}": [float(np.mean([a["reward"] for a in answers])) for answers in verified]}
    for j in sorted({1, k // 2, k} - {0}):
        series[f"pass@{j}"] = [pass_at_k(n, c, min(j, n)) for n, c in counts]
    series[f"maj@{k}"] = [
        majority_is_right([a["extracted_answer"] for a in answers], [a["reward"] for a in answers])
        for answers in verified
    ]
    for name, values in series.items():
        mean, low, high = interval(values)
        metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        print(f"{name:8} {mean:.3f}   95 % interval {low:.3f} to {high:.3f}")
    print(f"{metrics['answers']} answers to {metrics['rows']} rows, {metrics['truncation_rate']:.1%} cut off, "
          f"{metrics['num_unverified']} unverified")  # fmt: skip
    return metrics


if __name__ == "__main__":
    main()
