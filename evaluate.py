"""Score a checkpoint: `python evaluate.py --model DIR_OR_NAME --data rows.jsonl [--k 16]`

It samples `k` answers to every row with the engines and the reward server of training, on all GPUs of this machine or
on the CPU, and prints avg@k, pass@k and maj@k with 95 % bootstrap intervals over the rows. The output folder gets
samples.jsonl (every answer), settings.json and metrics.json.

Answers are written as rows finish, and the same command continues with the missing rows. Each row has its own seed, so
that its answers do not depend on other rows (exactly on the CPU; on a GPU rounding depends on the batch).
"""

import argparse
import json
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig

from config import Cluster, Colocated, Config, ConfigError, Env, Generation, PolicyCfg, VllmCfg
from gym import Episodes
from launch import RunError, StopRequests, run_main, start_ray
from reward_client import VERIFIED, RewardClient
from rollout import RolloutEngines
from rows import Rows, add_template_options, contents, end_of_sequence_ids, load_tokenizer

AGAIN = ("unreachable", "lost")  # the same command samples rows again that have answers with these verdicts
ROWS_AT_A_TIME = 64  # rows whose episodes are played together; if the process dies meanwhile, they are played again
HOW = ("engines", "gym_model_address", "kv_cache_gib", "limit", "output", "reward_url")  # options that change no answer

# ---------------------------------------------------------------- the numbers


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of `k` answers drawn from `n`, of which `c` are right, is right.

    1 - C(n - c, k) / C(n, k), arXiv:2107.03374. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_is_right(answers: list[str | None], rewards: list[float]) -> float:
    """maj@k: reward of the most frequent extracted answer (of equals the first); None does not vote."""
    votes = Counter(a for a in answers if a is not None)
    return rewards[answers.index(votes.most_common(1)[0][0])] if votes else 0.0


def interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval, resampling rows."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (2000, len(values))).mean(1)
    return float(np.mean(values)), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def summarize(rows: list[list[dict]], k: int) -> dict[str, float]:
    """avg@k, pass@j and maj@k of scored answers [row][answer], with `_low` and `_high` ends of their intervals.

    Unverified answers are left out and counted; a row with fewer than j verified answers counts with pass@ of as many
    as it has. Raises RunError if no answer was verified.
    """
    answers = [a for row in rows for a in row]
    verified = [[a for a in row if a["status"] in VERIFIED] for row in rows]
    verified = [row for row in verified if row]
    if not verified:
        raise RunError("none of the answers could be verified; see reward_server.log in the output folder")
    metrics: dict[str, float] = {
        "rows": len(rows),
        "answers": len(answers),
        "num_unverified": sum(a["status"] not in VERIFIED for a in answers),
        "truncation_rate": float(np.mean([a["truncated"] for a in answers])),
    }
    rewards = [[a["reward"] for a in row] for row in verified]
    series = {f"avg@{k}": [float(np.mean(row)) for row in rewards]}
    for j in sorted({2**i for i in range(k.bit_length())} | {k}):
        series[f"pass@{j}"] = [pass_at_k(len(row), sum(r > 0 for r in row), min(j, len(row))) for row in rewards]
    series[f"maj@{k}"] = [
        majority_is_right([a["extracted_answer"] for a in row], row_rewards)
        for row, row_rewards in zip(verified, rewards, strict=True)
    ]
    for name, values in series.items():
        metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"] = interval(values)
    return metrics


def report(metrics: dict[str, float]) -> None:
    for name in metrics:
        if f"{name}_low" in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            print(f"{name:8} {metrics[name]:.3f}   95 % interval {low:.3f} to {high:.3f}")
    cut_off, unverified = metrics["truncation_rate"], metrics["num_unverified"]
    print(f"{metrics['answers']} answers to {metrics['rows']} rows, {cut_off:.1%} cut off, {unverified} unverified")


# ---------------------------------------------------------------- what is there already


def check_settings(args: argparse.Namespace) -> None:
    """Make the output folder, or raise ConfigError if it has answers from another model, other data or options."""
    files = {name: contents(vars(args)[name]) for name in ("model", "data", "chat_template")}
    settings = {name: value for name, value in vars(args).items() if name not in HOW} | files
    path, samples, text = args.output / "settings.json", args.output / "samples.jsonl", json.dumps(settings, indent=1)
    if samples.exists() and path.read_text() != text:
        raise ConfigError(f"{samples} was made with other settings, see {path}; choose another --output, or remove it")
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def finished_rows(path: Path, k: int) -> dict[int, list[dict]]:
    """The answers to each row that has all `k`, in order. Rows that a killed process left incomplete are left out."""
    rows: dict[int, list[dict]] = defaultdict(list)
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            answer = json.loads(line)
            rows[answer["row"]].append(answer)
    return {row: answers for row, answers in sorted(rows.items()) if len(answers) == k}


def write_rows(path: Path, rows: dict[int, list[dict]]) -> None:
    """Replace the file at once, so that a killed process loses nothing."""
    rewritten = path.with_name(f"{path.name}.tmp")
    rewritten.write_text("".join(map(row_lines, rows.values())))
    rewritten.rename(path)


def row_lines(answers: list[dict]) -> str:
    """The answers to a row as they stand in samples.jsonl."""
    return "".join(json.dumps(answer) + "\n" for answer in answers)


# ---------------------------------------------------------------- the run


def configure(args: argparse.Namespace, tokens: int) -> Config:
    """The engines' configuration: one per GPU, in the precision and within the length that the model was saved with.

    `tokens`: how many tokens the tokenizer knows. Raises ConfigError if the model knows fewer.
    """
    gpus, model = torch.cuda.device_count(), AutoConfig.from_pretrained(args.model)
    if tokens > getattr(model, "vocab_size", tokens):
        raise ConfigError(f"--model='{args.model}': its tokenizer knows {tokens} tokens, it {model.vocab_size}")
    precision = str(model.dtype).removeprefix("torch.")
    if precision not in ("bfloat16", "float16", "float32"):
        precision = "bfloat16" if gpus else "float32"
    longest = getattr(model, "max_position_embeddings", None) or args.max_total_sequence_length
    length, engines = min(args.max_total_sequence_length, longest), args.engines or max(1, gpus)
    cache_bytes = int((args.kv_cache_gib or (0 if gpus else 1)) * 2**30) or None
    gen = Generation(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        vllm_cfg=VllmCfg(max_model_len=length, kv_cache_memory_bytes=cache_bytes, enforce_eager=not gpus),
        colocated=Colocated(sleep=False),
    )
    env = Env(reward_url=args.reward_url, extraction=args.extraction, reward_workers=os.cpu_count() or 2)
    env.gym_url, env.gym_model_address, env.episode = args.gym_url, args.gym_model_address, args.episode
    return Config(
        policy=PolicyCfg(model_name=args.model, precision=precision, max_total_sequence_length=length, generation=gen),
        cluster=Cluster(1, gpus_per_node=engines if gpus else 0, cpu_ranks_per_node=engines, timeout_s=7200),
        env=env,
    )


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Sample and score the rows that are missing, then summarize all. Returns the metrics."""
    tokenizer = load_tokenizer(args.model, "--model", args.chat_template, args.chat_template_kwargs)
    cfg = configure(args, len(tokenizer))
    end_of_sequence_ids(args.model, tokenizer)  # raises ConfigError if there are none, before anything starts
    task = "episode" if cfg.env.plays_episodes else "math"
    data = Rows(args.data, tokenizer, cfg.policy.max_total_sequence_length, task)
    check_settings(args)
    samples = args.output / "samples.jsonl"
    done, wanted = finished_rows(samples, args.k), range(len(data))[: args.limit]
    done = {row: answers for row, answers in done.items() if not any(a["status"] in AGAIN for a in answers)}
    write_rows(samples, done)
    missing = [row for row in wanted if row not in done]
    if len(missing) < len(wanted):
        print(f"{samples} has {len(wanted) - len(missing)} of {len(wanted)} rows")
    if missing:
        answer, stop = play if cfg.env.plays_episodes else sample, StopRequests(None)
        progress = tqdm(total=len(missing) * args.k, disable=None)
        with stop.interruptible(), progress, samples.open("a") as file:
            engines = RolloutEngines(cfg, start_ray(cfg, stop), model_name=args.model)
            for answers in answer(args, cfg, engines, tokenizer, data, missing):
                file.write(row_lines(answers))
                file.flush()
                progress.update(len(answers))
        done = finished_rows(samples, args.k)
        write_rows(samples, done)
    metrics = summarize([done[row] for row in wanted], args.k)
    report(metrics)
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"wrote {samples} and metrics.json")
    return metrics


def sample(
    args: argparse.Namespace, cfg: Config, engines: RolloutEngines, tokenizer: Any, data: Rows, rows: list[int]
) -> Iterator[list[dict]]:
    """`k` scored answers to each of `rows`, row by row."""
    seeds = [args.seed * 2**31 + row * args.k for row in rows]  # each row's own; vLLM adds the answer's number
    stop_ids, pending = end_of_sequence_ids(args.model, tokenizer), deque()
    rewards = RewardClient(cfg.env, args.output)
    try:
        for group in engines.generate([data.prompt_ids[row] for row in rows], args.k, seeds, stop_ids):
            row, texts = rows[group.index], tokenizer.batch_decode(group.response_ids, skip_special_tokens=True)
            cut_off = [reason == "length" for reason in group.finish_reasons]
            answers = [{"row": row, "text": t, "truncated": c} for t, c in zip(texts, cut_off, strict=True)]
            pending.append((answers, rewards.submit(texts, data.rows[row])))
            while pending and pending[0][1].done():
                yield with_verdicts(*pending.popleft())
        yield from starmap(with_verdicts, pending)
    finally:
        rewards.close()


def with_verdicts(answers: list[dict], verdicts: Future) -> list[dict]:
    return [answer | verdict for answer, verdict in zip(answers, verdicts.result(), strict=True)]


def play(
    args: argparse.Namespace, cfg: Config, engines: RolloutEngines, tokenizer: Any, data: Rows, rows: list[int]
) -> Iterator[list[dict]]:
    """The same with episodes of several turns, one answer at a time, after ROWS_AT_A_TIME rows have been played."""
    episodes = Episodes(cfg, tokenizer, end_of_sequence_ids(args.model, tokenizer), engines.workers)
    try:
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = rows[start : start + ROWS_AT_A_TIME]
            played = [data.rows[row] for row in part]
            found = engines.surviving(partial(episodes.play, played, args.k, args.seed + start, lambda: None))
            for e in found:
                answer = {"row": part[e.prompt], "text": e.text, "truncated": e.truncated}
                yield [answer | {"reward": e.reward, "status": e.status, "extracted_answer": None}]
    finally:
        episodes.close()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or name")
    parser.add_argument("--data", required=True, help="rows of prepare_data.py")
    parser.add_argument("--k", type=int, default=16, help="answers per row (default 16)")
    parser.add_argument("--limit", type=int, help="first N rows only")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=8192)
    parser.add_argument("--max-total-sequence-length", type=int, default=10240, help="at most what the model allows")
    parser.add_argument("--engines", type=int, help="vLLM engines (default: one per GPU, one on the CPU)")
    parser.add_argument("--kv-cache-gib", type=float, help="KV cache of an engine (default: share of the GPU; CPU: 1)")
    parser.add_argument("--reward-url", help="a running reward server; default: start one")
    parser.add_argument("--extraction", choices=["strict", "lenient"], default="strict", help="lenient: as peers grade")
    parser.add_argument("--gym-url", help="play whole episodes of NeMo Gym, as env.gym_url in training (docs/gym.md)")
    parser.add_argument("--gym-model-address", default=Env.gym_model_address, help="as env.gym_model_address")
    parser.add_argument("--episode", help="play episodes of your own, as env.episode in training")
    parser.add_argument("--output", type=Path, help="folder (default: results/evaluation/MODEL/DATA)")
    parser.add_argument("--seed", type=int, default=0)
    add_template_options(parser)
    args = parser.parse_args(argv)
    for name in ("k", "limit", "engines", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.temperature < 0 or (args.temperature == 0 and args.k > 1):
        parser.error("--temperature must be above 0, or 0 with --k 1: greedy answers are all the same")
    model, data = ("_".join(Path(path).parts[-2:]).strip("/") for path in (args.model, args.data))
    args.output = args.output or Path("results/evaluation") / model / Path(data).stem
    return args


if __name__ == "__main__":
    run_main(lambda: evaluate(parse_args()))
