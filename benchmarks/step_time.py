"""Step time of a model's real geometry with random weights, split into generate, train and refit.

    python benchmarks/step_time.py GEOMETRY [--gpus N] [--lengths FILE] [--name NAME] [--results FILE]
        [section.key=value ...]

Runs the real train_grpo.py on prompts of exact length, with answers cut at an exact length (a random model ends one in
some hundred thousand tokens) and rewards by the parity of a checksum, so that nearly every group has a signal. Prints
one JSON line, the medians over the steps after the first two (`--warm-up`), and puts it into FILE, a list of runs, in
place of an earlier run of the same name. Efficiency, MFU and MBU are those of hardware.py. `--lengths`: a JSON list
with the length of each response of a step instead of one for all, such as benchmarks/lengths.json: 1,024, log-normal
with a median of 700, cut at 4,096, which 5 % reach. Then `tail_share` is the part of sampling in which an engine had at
most a tenth of its responses left. After the formulas changed

    python benchmarks/step_time.py recompute FILE

computes them and the tokens a second anew from the times and lengths in FILE, and marks the runs whose numbers changed.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.environment import environment  # noqa: E402
from config import load_config  # noqa: E402
from hardware import Limits, Shape  # noqa: E402

# hidden, intermediate, layers, heads, key-value heads, head dimension, vocabulary, tied, as published
GEOMETRIES = {
    "tiny": (64, 128, 2, 4, 2, 32, 1024, True),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
}
NO_CHECKPOINTING = [
    "policy.dtensor_cfg.activation_checkpointing=false",
    "policy.dtensor_cfg.reshard_after_forward=false",
]
TWO_ENGINES = [  # a GPU: they share out vLLM's Python; each with KV cache for half of 512 answers
    "policy.generation.engines_per_gpu=2", "policy.generation.vllm_cfg.kv_cache_memory_bytes=11274289152",
]  # fmt: skip
AWAKE = ["policy.generation.colocated.sleep=false"]  # memory given back to an engine has to be asked for again
SETTINGS = {  # what fits one H100 (qwen3-4b: one H200, qwen3-8b: two); further overrides come after these
    "tiny": ["policy.sequence_packing.train_mb_tokens=1024"],
    "qwen3-0.6b": [*NO_CHECKPOINTING, *TWO_ENGINES, *AWAKE, "policy.sequence_packing.train_mb_tokens=17408"],
    "qwen3-1.7b": [*NO_CHECKPOINTING, *TWO_ENGINES, "policy.sequence_packing.train_mb_tokens=12288"],
    "qwen3-4b": ["policy.dtensor_cfg.reshard_after_forward=false", "policy.sequence_packing.train_mb_tokens=16384"],
    "qwen3-8b": ["policy.sequence_packing.train_mb_tokens=16384"],
}
COMPILED = ["policy.dtensor_cfg.compile_layers=true"]
KEYS = {  # name of a result: metric of train_grpo.py
    "step_s": "time/step_s", "generate_s": "time/generate_s", "score_s": "time/score_s", "train_s": "time/train_s",
    "refit_s": "time/refit_s", "efficiency": "efficiency", "mfu": "mfu", "mbu": "mbu",
    "peak_gib": "policy_peak_gib", "tokens_per_s_per_gpu": "tokens_per_s_per_gpu", "micro_batches": "micro_batches",
    "mean_gen_tokens": "mean_gen_tokens", "gen_kl_error": "gen_kl_error", "loss": "loss", "grad_norm": "grad_norm",
    "token_mult_prob_error": "token_mult_prob_error", "frac_zero_signal_groups": "frac_zero_signal_groups",
}  # fmt: skip


def model_config(geometry: str) -> Qwen3Config:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied = GEOMETRIES[geometry]
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied,
        max_position_embeddings=40960, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def make_model(geometry: str, folder: Path) -> None:
    """Random bfloat16 weights and a tokenizer with one token per word t0, t1, ..., as a Hugging Face folder."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(model_config(geometry)).to(torch.bfloat16)
    vocabulary = model.config.vocab_size
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t0", pad_token="t0", chat_template=template
    ).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def write_rows(path: Path, count: int, prompt_tokens: int, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            text = " ".join(f"t{i}" for i in rng.integers(1, vocabulary, prompt_tokens))
            file.write(json.dumps({"responses_create_params": {"input": text}, "expected_answer": "0"}) + "\n")


@contextlib.contextmanager
def coin_server(workers: int) -> Iterator[str]:
    """The URL of a reward server that tosses coins."""
    coin = Path(__file__).with_name("coin.py")
    command = [sys.executable, str(ROOT / "reward_server.py"), "--port", "0", "--verifier", f"{coin}:coin"]
    command += ["--workers", str(workers)]
    server = subprocess.Popen([*command, "--exit-with-parent"], stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait(20)


def run(args: argparse.Namespace, overrides: list[str], work: Path) -> list[dict]:
    """The metrics of each step."""
    length = args.prompt_tokens + args.answer_tokens
    model = args.model_folder or work / "model"
    if not (model / "tokenizer.json").exists():
        make_model(args.geometry, model)
    write_rows(work / "rows.jsonl", args.prompts * args.steps, args.prompt_tokens, GEOMETRIES[args.geometry][6])
    script = [str(ROOT / "train_grpo.py")]
    if args.lengths:
        script = [str(ROOT / "benchmarks" / "forced_lengths.py"), str(args.lengths.resolve()), f"{work}/tail.jsonl"]
    with coin_server(workers=4) as url:
        command = [
            sys.executable, *script, "--config", str(ROOT / "config.yaml"),
            f"policy.model_name={model}", f"data.train_jsonl_fpath={work}/rows.jsonl",
            "data.validation_jsonl_fpath=null", f"env.reward_url={url}", "env.reward_timeout_s=120",
            f"grpo.num_prompts_per_step={args.prompts}", f"grpo.num_generations_per_prompt={args.group}",
            f"grpo.max_num_steps={args.steps}", f"policy.max_total_sequence_length={length}",
            f"policy.generation.max_new_tokens={args.answer_tokens}", "checkpointing.enabled=false",
            "logger.wandb_enabled=false", f"logger.log_dir={work}/logs", "logger.num_rollouts_to_save=0",
            "cluster.num_nodes=1", f"cluster.gpus_per_node={args.gpus}", f"cluster.timeout_s={args.timeout_s}",
            "policy.dtensor_cfg.tensor_parallel_size=1", *SETTINGS[args.geometry], *(COMPILED if args.gpus else []),
            *overrides,
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=work, timeout=args.timeout_s * 2)
    metrics = (work / "logs" / "metrics.jsonl").read_text()
    if args.metrics:
        args.metrics.write_text(metrics)
    return [json.loads(line) for line in metrics.splitlines()]


@cache
def shape_of(model: str) -> Shape:
    with tempfile.TemporaryDirectory() as folder:
        model_config(model).save_pretrained(folder)
        return Shape.of(folder)


def recompute(path: Path) -> None:
    """Efficiency, MFU, MBU and tokens a second of the runs in `path`, with the present formulas; prints what changed.

    Without a list of lengths every answer counts as long as the mean, and every sample as trained on: nearly all
    answers were cut off at their length, and every group had a signal. That is right to a percent; what differs by less
    than two is left as it was.
    """
    runs = json.loads(path.read_text())
    for r in runs:
        shape = shape_of(r["model"])
        apart = [o for o in r["overrides"] if o.startswith("policy.generation.colocated.")]
        machine = ["cluster.num_nodes=1", f"cluster.gpus_per_node={r['gpus']}"]
        cfg = load_config(str(ROOT / "config.yaml"), [*machine, "policy.dtensor_cfg.tensor_parallel_size=1", *apart])
        limits = Limits(cfg, shape, r["device"])
        group, prompts = r.get("group", 16), [r["prompt_tokens"]] * r["samples"]
        answers = [round(r["mean_gen_tokens"])] * r["samples"]
        if "lengths" in r:
            answers = json.loads(Path(__file__).with_name(r["lengths"]).read_text())
        lengths = [i // group for i in range(r["samples"])], prompts, answers
        metrics = {f"time/{name}_s": r[f"{name}_s"] for name in ("step", "generate", "train")}
        metrics |= limits.generation(*lengths) | limits.training(*lengths)
        tokens = r["samples"] * (r["prompt_tokens"] / group + r["mean_gen_tokens"])
        found = limits.utilization(metrics) | {"tokens_per_s_per_gpu": tokens / r["step_s"] / r["gpus"]}
        changed = {name: value for name, value in found.items() if abs(value / r[name] - 1) > 0.02}
        if changed:
            print(r["name"], *(f"{name} {r[name]:.4g} -> {value:.4g}" for name, value in changed.items()), sep=", ")
            r |= changed | {"recomputed": f"{', '.join(changed)}: from the run's times, with later formulas"}
    path.write_text(json.dumps(runs, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("--gpus", type=int, default=1, help="0: CPU")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="steps left out of the medians")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--answer-tokens", type=int, default=350)
    parser.add_argument("--lengths", type=Path, help="JSON list instead of --answer-tokens and --prompts")
    parser.add_argument("--timeout-s", type=float, default=240)
    parser.add_argument("--model-folder", type=Path, help="where the model is made, or lies from an earlier call")
    parser.add_argument("--name", help="of the run in FILE; default: geometry and GPUs")
    parser.add_argument("--metrics", type=Path, help="where to keep the run's metrics.jsonl")
    parser.add_argument("--results", type=Path)
    return parser


def main() -> None:
    args, overrides = parser().parse_known_args()
    if args.steps <= args.warm_up:
        raise SystemExit(f"error: --steps {args.steps} leaves none to time after --warm-up {args.warm_up}")
    if args.lengths:
        lengths = json.loads(args.lengths.read_text())
        args.answer_tokens, args.prompts = max(lengths), len(lengths) // args.group
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        steps = run(args, overrides, Path(work))
        tail = Path(work) / "tail.jsonl"
        batches = [json.loads(line) for line in tail.read_text().splitlines()] if args.lengths else []
    timed = steps[args.warm_up :]
    result = {"name": args.name or f"{args.geometry}-{args.gpus}", "model": args.geometry, "gpus": args.gpus}
    result |= environment() | {"samples": args.prompts * args.group, "group": args.group, "steps_timed": len(timed)}
    result |= {"prompt_tokens": args.prompt_tokens, "answer_tokens": args.answer_tokens, "overrides": overrides}
    for name, metric in KEYS.items():
        aside = metric.replace("time/", "time/background_")  # where sampling runs beside the update
        values = [m[aside] if aside in m else m[metric] for m in timed if aside in m or metric in m]
        result[name] = statistics.median(values) if values else None
    if args.lengths:
        late = batches[len(batches) * args.warm_up // args.steps :]
        result |= {"lengths": args.lengths.name}
        result["tail_share"] = statistics.median(b["tail_s"] / b["batch_s"] for b in late)
    result["samples_per_s"] = result["samples"] / result["step_s"]
    result["first_steps_s"] = [m["time/step_s"] for m in steps[: args.warm_up]]
    result["losses"] = [m.get("loss") for m in steps]
    print(json.dumps(result))
    if args.results:
        earlier = json.loads(args.results.read_text()) if args.results.exists() else []
        kept = [r for r in earlier if r["name"] != result["name"]]
        args.results.write_text(json.dumps([*kept, result], indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["recompute"]:
        recompute(Path(sys.argv[2]))
    else:
        main()
