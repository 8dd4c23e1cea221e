"""Checkpoints: what they contain, which are kept, and how a run continues from the newest one.

`checkpoint_dir/step_N/` is a Hugging Face folder (load it anywhere) with three additions: `training_state/` (float32
master weights and optimizer state, sharded, readable by any number of ranks), `run.json` (where the run was, and its
configuration) and `metrics.json` (of that step). It is written as `tmp_step_N` while the next step runs, and renamed
when every rank has finished: a folder called step_N is complete, anything called tmp_ is not and is removed.

Data and engines have no random state to save: a step's rows and each engine's seed follow from `grpo.seed` and the
number of batches drawn, which is in `run.json`. The ranks' own random state is in `training_state/`.
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from config import KEYS, Checkpointing, Config, ConfigError
from launch import RunError, Stopped, lock_folder
from policy import Policy
from rows import contents

# The contents of these files must stay the same when a run continues; their paths may change.
FILES = ("data.chat_template", "data.train_jsonl_fpath", "data.validation_jsonl_fpath", "policy.model_name")

# Keys, or beginnings of keys, that may differ when a run continues: paths, limits, logging, and how the work is spread,
# which may change rounding but not the algorithm. With any other change the run would be halves of two experiments.
MAY_CHANGE = (
    "checkpointing.",
    "cluster.",
    "data.validation_sets",
    "env.judge_url",
    "env.reward_",
    "grpo.gate_patience",
    "grpo.max_",
    "grpo.num_val_",
    "grpo.val_",
    "logger.",
    "policy.dtensor_cfg.",
    "policy.generation.colocated.",
    "policy.generation.vllm_",
    "policy.sequence_packing.",
)


@dataclasses.dataclass
class Position:
    """Where a run is after a step. Rows and sampling seeds of all later steps follow from this and `grpo.seed`."""

    step: int = 0
    batches_drawn: int = 0  # of prompts: one a step, more with dynamic sampling
    exceeded: dict[str, int] = dataclasses.field(default_factory=dict)  # for each gate the steps in a row above it
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the step


class Checkpoints:
    """The folder of one run."""

    def __init__(self, cfg: Config):
        """Remove half-written checkpoints and find the newest complete one. Raises ConfigError if another run uses the
        folder, if the newest checkpoint is damaged, or if data or configuration differ from those of the checkpoint.
        """
        self.cfg, self.dir = cfg, Path(cfg.checkpointing.checkpoint_dir)
        self.position = Position()  # after the last finished step; the loop sets it
        self.wandb_id: str | None = None  # of the run that this one continues, then of this run
        self.saved_step = 0
        self.seconds = 0.0  # the longest that a save took, from its start until it was complete
        if not cfg.checkpointing.enabled:
            return
        self._lock_file = lock_folder(self.dir, "checkpointing.checkpoint_dir")
        for unfinished in self.dir.glob("tmp_step_*"):
            remove(unfinished)
        self.settings = settings(cfg)
        if complete := steps_in(self.dir):
            newest = complete[max(complete)]
            self.position, saved = read_checkpoint(newest)
            check_compatible(self.settings, saved, newest, cfg.world_size)
            self.wandb_id, self.saved_step = saved["wandb_id"], self.position.step

    def restore(self, policy: Policy) -> None:
        """Load weights, optimizer and random state of the newest checkpoint, if there is one."""
        if newest := self.last_saved():
            policy.all("load", str((newest / "training_state").resolve()))
            print(f"continuing after step {self.position.step} from '{newest}'", flush=True)

    def save(self, policy: Policy) -> None:
        """Copy the state to host memory and start writing step_N; returns while it is being written."""
        self.wait(policy)
        position = self.position
        unfinished = (self.dir / f"tmp_step_{position.step}").resolve()
        run = {
            "position": dataclasses.asdict(position),
            "wandb_id": self.wandb_id,
            "world_size": self.cfg.world_size,
            "settings": self.settings,
        }
        try:
            unfinished.mkdir(parents=True)
            (unfinished / "metrics.json").write_text(json.dumps(position.metrics))
            (unfinished / "run.json").write_text(json.dumps(run, indent=1, default=vars))
        except OSError as e:
            raise self._failed(position.step, e) from None
        template = Path(self.cfg.data.chat_template).read_text() if self.cfg.data.chat_template else None
        policy.all("save", str(unfinished), partial(publish, unfinished, self.cfg.checkpointing, template))
        self.saved_step = position.step

    @contextmanager
    def complete_at_the_end(self, policy: Policy) -> Iterator[None]:
        """At the end of this the save in progress is complete. If a stop ends it, the last finished step is saved."""
        try:
            yield
            self.wait(policy)
        except Stopped:
            if self.cfg.checkpointing.enabled and self.position.step > self.saved_step:
                self.save(policy)
            self.wait(policy)
            if self.saved_step:
                print(f" • saved: '{self.last_saved()}'", flush=True)
            raise
        except Exception:
            with suppress(Exception):
                self.wait(policy)
            raise

    def last_saved(self) -> Path | None:
        """The newest checkpoint, or None."""
        return self.dir / f"step_{self.saved_step}" if self.saved_step else None

    def wait(self, policy: Policy) -> None:
        """Wait until the save in progress, if any, is complete. Raises RunError if it failed."""
        for error, seconds in policy.all("wait_saved"):
            self.seconds = max(self.seconds, seconds)
            if error:
                raise self._failed(self.saved_step, error)

    def _failed(self, step: int, reason: Any) -> RunError:
        # The free space is in the message because torch calls a full disk "unexpected pos".
        left = f"{shutil.disk_usage(self.dir).free / 2**30:.1f} GiB are free there" if self.dir.is_dir() else "gone"
        return RunError(f"step_{step} could not be written to '{self.dir}' ({left}): {reason}; earlier ones are intact")


# ---------------------------------------------------------------- the folders


def publish(unfinished: Path, cfg: Checkpointing, chat_template: str | None) -> None:
    """Rename a folder that all ranks have written to step_N, then remove checkpoints that are no longer kept.

    `chat_template`: the text of a template that replaces the model's own.
    """
    if not (unfinished / "run.json").exists():
        raise FileNotFoundError(f"{unfinished} was removed while it was being written")  # by a run that started since
    if chat_template:
        (unfinished / "chat_template.jinja").write_text(chat_template)
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)  # everything is on the disk before the folder has its name, even if the power fails
    folder = unfinished.with_name(unfinished.name.removeprefix("tmp_"))
    unfinished.rename(folder)
    flush(folder.parent)
    complete = steps_in(folder.parent)
    scores = {n: json.loads((path / "metrics.json").read_text()).get(cfg.metric_name) for n, path in complete.items()}
    for step in complete.keys() - kept_steps(scores, cfg.keep_top_k, cfg.higher_is_better):
        remove(complete[step])


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def remove(folder: Path) -> None:
    """Rename a folder, then remove it: a death in between leaves nothing that looks like a checkpoint.

    The folder may be gone already: the ranks of a killed run live on for a moment and may publish what they wrote.
    """
    rest = tempfile.mkdtemp(prefix="tmp_step_", dir=folder.parent)
    with suppress(FileNotFoundError):
        folder.rename(rest)
    shutil.rmtree(rest, ignore_errors=True)


def kept_steps(scores: dict[int, float | None], keep_top_k: int | None, higher_is_better: bool) -> set[int]:
    """The best `keep_top_k` steps (None: all) and the latest. Of equal scores the newer wins; None, NaN are worst."""

    def rank(step: int) -> tuple[float, int]:
        score = scores[step]
        if score is None or math.isnan(score):
            return -math.inf, step
        return score if higher_is_better else -score, step

    return {*sorted(scores, key=rank, reverse=True)[:keep_top_k], *sorted(scores)[-1:]}


def steps_in(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder, by step."""
    return {int(path.name[5:]): path for path in folder.glob("step_*") if path.name[5:].isdecimal() and path.is_dir()}


# ---------------------------------------------------------------- what a run may continue from


def settings(cfg: Config) -> dict[str, Any]:
    """The configuration as {"section.key": value}, and the fingerprints of FILES."""
    found = {name: attrgetter(name)(cfg) for name in KEYS}
    return found | {f"the contents (sha256) of {name}": contents(found[name]) for name in FILES}


def read_checkpoint(folder: Path) -> tuple[Position, dict[str, Any]]:
    """The position and run.json of a checkpoint. Raises ConfigError that names the file that is missing or damaged."""
    path = folder / "run.json"
    try:
        saved = json.loads(path.read_text())
        position = Position(**saved["position"])
        if missing := {"wandb_id", "world_size", "settings"} - saved.keys():
            raise KeyError(*missing)
        path = folder / "training_state" / ".metadata"
        for part in FileSystemReader(path.parent).read_metadata().storage_data.values():
            path = folder / "training_state" / part.relative_path
            if path.stat().st_size < part.offset + part.length:
                raise EOFError("it is cut off")
    except Exception as e:  # a file may hold anything
        raise ConfigError(
            f"'{folder}' cannot be continued: {path.relative_to(folder)} is missing, damaged or of another version "
            f"({type(e).__name__}: {' '.join(str(e).split())[:100]}); move '{folder}' away to continue from the step_N "
            "before it, or choose another checkpointing.checkpoint_dir"
        ) from None
    return position, saved


def check_compatible(now: dict[str, Any], saved: dict[str, Any], folder: Path, world_size: int) -> None:
    """Raise ConfigError for the first setting that makes this another experiment than the one in `folder`."""
    before = saved["settings"]
    for name in sorted(now.keys() & before.keys()):
        may_change = name in FILES or name.startswith(MAY_CHANGE)
        if now[name] != before[name] and not may_change:
            raise ConfigError(
                f"{name} was {before[name]} and is {now[name]}: to continue '{folder}' set it back; to start anew "
                "choose another checkpointing.checkpoint_dir"
            )
    if saved["world_size"] != world_size:
        print(
            f" • {saved['world_size']} ranks became {world_size}: weights and optimizer state are redistributed, "
            "answers will differ from those of an uninterrupted run"
        )
