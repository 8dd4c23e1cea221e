"""What a run reports: a block per step on the console, `metrics.jsonl`, `rollouts.jsonl`, W&B and TensorBoard."""

import dataclasses
import itertools
import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from tqdm import tqdm

from config import Config, ConfigError
from launch import RunError, lock_folder

GROUPS = {"val:": "validation", "time/": "timing", "": "train"}  # a metric's group, by how its name begins
PERFORMANCE = (  # metrics of the group "performance"
    *("efficiency", "mfu", "mbu", "gen_floor_s", "train_floor_s", "train_flops", "decode_bytes"),
    *("tokens_per_s", "tokens_per_s_per_gpu", "total_tokens", "policy_peak_gib"),
)
CONSOLE = (  # a step's lines; a line is left out if the step lacks one of its metrics
    "reward {reward:.3f}   zero-signal groups {frac_zero_signal_groups:.0%}   unverified {num_unverified:.0f}",
    "answers {mean_gen_tokens:.1f} tokens, {truncation_rate:.1%} cut off",
    "gen_kl_error {gen_kl_error:.1e}   token_mult_prob_error {token_mult_prob_error:.4f}   "
    "entropy {approx_entropy:.3f}   grad_norm {grad_norm:.3f}   lr {lr:.1e}",
    "efficiency {efficiency:.0%} of the hardware's limit, MFU {mfu:.0%} of the update",
    "MBU {mbu:.0%} of generation",
    "{tokens_per_s:,.0f} tokens/s, {tokens_per_s_per_gpu:,.0f} a rank",
)


def in_group(name: str) -> str:
    """A metric's name in W&B and TensorBoard, which show metrics together that have the same word before the slash."""
    prefix = next(prefix for prefix in GROUPS if name.startswith(prefix))
    return f"{'performance' if name in PERFORMANCE else GROUPS[prefix]}/{name.removeprefix(prefix).replace(':', '/')}"


class Logger:
    """Collects a step's metrics and phase timings and writes them everywhere at once."""

    def __init__(self, cfg: Config, resumed_step: int = 0, wandb_id: str | None = None):
        """`resumed_step`: the step that the run continues after; rows of later steps are dropped."""
        self.cfg, self.dir, self.num_gpus = cfg.logger, Path(cfg.logger.log_dir), cfg.num_bundles
        self.lock_file = lock_folder(self.dir, "logger.log_dir")
        self.metrics_file = open_rows(self.dir / "metrics.jsonl", resumed_step)
        self.rollouts_file = open_rows(self.dir / "rollouts.jsonl", resumed_step)
        self.local = threading.local()
        self.step, self.last_step = 0, 0
        self.first_step: int | None = None
        self.total_seconds: Counter[str] = Counter()  # of each phase, over all steps
        self.accuracies: dict[str, dict[int, float]] = {}  # of each validation set, by step
        self._start_clock()
        self.wandb = self.tensorboard = None
        if cfg.logger.wandb_enabled:
            import wandb

            given = dataclasses.asdict(cfg.logger.wandb) | {"id": wandb_id, "resume": "allow"}
            self.wandb = wandb.init(dir=str(self.dir), config=dataclasses.asdict(cfg), **given)
        if cfg.logger.tensorboard_enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.dir / "tensorboard"), purge_step=resumed_step + 1)

    @property
    def wandb_id(self) -> str | None:
        return self.wandb.id if self.wandb else None

    # ------------------------------------------------------------ one step

    def start_step(self, step: int, last_step: int) -> None:
        """Print a step's banner; the first step starts the run's clock."""
        if self.first_step is None:
            self._start_clock()
            self.first_step, self.run_began = step, self.step_began
            since_command = time.time() - psutil.Process().create_time()
            print(f" • {since_command:.0f} s from the command to the first step", flush=True)
        self.step, self.last_step = step, last_step
        print(f"\n━━━ Step {step}/{last_step} " + "━" * 40, flush=True)

    def trace_file(self, part: int) -> str | None:
        """Where to write a profile of this step's `part`-th optimizer step; None if it is not to be profiled."""
        if self.step not in self.cfg.profile_steps:
            return None
        (self.dir / "profile").mkdir(exist_ok=True)
        return str((self.dir / "profile" / f"step_{self.step}{f'_{part}' if part else ''}.json").resolve())

    def _start_clock(self) -> None:
        self.step_began, self.seconds = time.perf_counter(), Counter()  # of this step's phases

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[tqdm]:
        """Time a phase of the step, with a progress bar if `total` is given. A phase may repeat: its times add up.

        A phase inside another (generation within validation) counts for the outer one alone. A phase in another thread
        runs beside the step, and is called background_NAME.
        """
        began, outer, self.local.in_phase = time.perf_counter(), getattr(self.local, "in_phase", False), True
        if threading.current_thread() is not threading.main_thread():
            name = f"background_{name}"
        with tqdm(total=total, desc=f" ▶ {name}", leave=False, disable=not (total and sys.stderr.isatty())) as progress:
            yield progress
        self.local.in_phase = outer
        if not outer:
            self.seconds[name] += time.perf_counter() - began

    def end_step(self, metrics: dict[str, float], samples: list[Any], derive: Callable[[dict], dict]) -> None:
        """Print the step's block, write its metrics and some of its samples, and start the next step's clock.

        `derive` computes more metrics from these, the phases' times included. A checkpoint is saved after this, so that
        the files have the rows of every saved step; the time that saving takes counts for the next step.
        """
        now = time.perf_counter()
        total, elapsed = now - self.step_began, now - self.run_began
        metrics = metrics | {f"time/{name}_s": s for name, s in self.seconds.items()}
        metrics |= {"time/step_s": total, "time/elapsed_s": elapsed, "tokens_per_s": metrics["total_tokens"] / total}
        metrics["tokens_per_s_per_gpu"] = metrics["tokens_per_s"] / self.num_gpus
        metrics |= derive(metrics)
        self.total_seconds.update(self.seconds)
        self._print_step(metrics, left=elapsed / (self.step - self.first_step + 1) * (self.last_step - self.step))
        self.write(self.step, metrics)
        self._write_samples(samples, "train")
        self._start_clock()

    def _print_step(self, metrics: dict[str, float], left: float) -> None:
        for line in CONSOLE:
            with suppress(KeyError):
                print(f" • {line.format_map(metrics)}")
        if "grad_norm" not in metrics:
            print(" • no group had different rewards: nothing to learn, the weights stay as they were")
        total = metrics["time/step_s"]
        times = " · ".join(f"{name} {s:.2f} s ({s / total:.0%})" for name, s in self.seconds.most_common())
        print(f" • {total:.2f} s: {times}; {left / 60:.1f} min left", flush=True)

    def validation(
        self, step: int, prefix: str, metrics: dict[str, float], samples: list[Any], decode: Callable[[Any], str]
    ) -> None:
        """Report a validation on one set, whose metrics begin with `prefix`. `decode` turns token ids into text."""
        accuracy, length = metrics[f"{prefix}accuracy"], metrics[f"{prefix}avg_length"]
        name = prefix.replace("val:", "validation ").strip(": ")
        print(f" • {name}: accuracy {accuracy:.3f} on {len(samples)} answers, {length:.1f} tokens", flush=True)
        for sample in samples[: self.cfg.num_val_samples_to_print]:
            print(f"   [{sample.reward:.0f}] {sample.text!r}")
        self.accuracies.setdefault(name, {})[step] = accuracy
        if self.wandb:
            import wandb

            table = wandb.Table(["prompt", "response", "reward", "status", "tokens"])
            for s in best_and_worst(samples, self.cfg.num_rollouts_to_save):
                table.add_data(decode(s.prompt_ids), s.text, s.reward, s.status, s.response_tokens)
            self.wandb.log({in_group(f"{prefix}samples"): table}, step=step)
        self._write_samples(samples, name)

    # ------------------------------------------------------------ files

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's metrics to all files and services."""
        self.metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.metrics_file.flush()
        metrics = {in_group(name): value for name, value in metrics.items()}
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)

    def _write_samples(self, samples: list[Any], split: str) -> None:
        for s in best_and_worst(samples, self.cfg.num_rollouts_to_save):
            self.rollouts_file.write(self._row(s, split))
        self.rollouts_file.flush()

    def stop_if_not_finite(self, metrics: dict[str, float], samples: list[Any]) -> None:
        """Raise RunError if the loss or the gradient's norm is not finite, after writing all samples of the step."""
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            return
        where = ""
        if samples:
            path = self.dir / f"failed_step_{self.step}.jsonl"
            path.write_text("".join(self._row(s, "train") for s in samples))
            where = f"its answers are in {path}, "
        raise RunError(
            f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {self.step}: not finite; the "
            f"weights were not changed by it, {where}checkpoints are intact"
        )

    def _row(self, sample: Any, split: str) -> str:
        values = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in vars(sample).items()}
        return json.dumps({"step": self.step, "split": split, **values}) + "\n"

    def summary(self, checkpoint: Path | None, data: str) -> None:
        """Print how a finished run went, and the commands that may follow."""
        if self.first_step is None:
            return
        total = time.perf_counter() - self.run_began
        shares = [f"{name} {seconds / total:.0%}" for name, seconds in self.total_seconds.most_common(4)]
        print(f"\n━━━ Finished: step {self.step} in {total / 60:.1f} minutes, of which {', '.join(shares)}")
        for name, found in self.accuracies.items():
            best = max(found, key=found.get)
            print(f" • best {name} accuracy {found[best]:.3f}, after step {best}")
        print(f" • python plot_run.py {self.dir} --output {self.dir / 'run.png'}")
        if checkpoint:
            print(f" • python evaluate.py --model {checkpoint} --data {data}")
            # Not `vllm serve`, which fails in the CPU build since that package has another name.
            print(f" • python -m vllm.entrypoints.openai.api_server --model {checkpoint}", flush=True)

    def close(self) -> None:
        for file in (self.metrics_file, self.rollouts_file, self.lock_file):
            file.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def best_and_worst(samples: list[Any], count: int) -> list[Any]:
    """`count` samples (below 0: all): the best and worst of as many prompts as possible, then those in between."""
    if count < 0:
        return samples
    by_reward = sorted(samples, key=lambda s: (s.prompt, s.reward))
    ranked = []
    for _, group in itertools.groupby(by_reward, key=lambda s: s.prompt):
        members = list(group)
        ranked += [(min(i, len(members) - 1 - i), sample) for i, sample in enumerate(members)]  # 0: best and worst
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])[:count]]


def open_rows(path: Path, last_step: int) -> IO[str]:
    """Open a file of rows for appending, without rows of steps after `last_step` and without a torn last line.

    If `last_step` is 0, a new run begins and an old file is moved to NAME.1, NAME.2, ... Raises ConfigError for a
    complete line that is no row.
    """
    if path.exists() and not last_step:
        free = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
        path.rename(path.with_name(f"{path.name}.{free}"))
    if path.exists():
        kept = path.with_name(f"{path.name}.tmp")
        with path.open() as old, kept.open("w") as new:
            for number, line in enumerate(old, 1):
                try:
                    if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                        new.write(line)
                except (ValueError, KeyError, TypeError):
                    raise ConfigError(f"{path} line {number} is broken; remove that line, or the whole file") from None
        kept.rename(path)
    return path.open("a")
