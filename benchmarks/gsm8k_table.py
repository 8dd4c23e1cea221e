"""The scores of smollm2_gsm8k.sh as a Markdown table: `python benchmarks/gsm8k_table.py FOLDER`"""

import json
import sys
from pathlib import Path

NAMES = {"base": "SmolLM2-135M-Instruct", "sft": "fine-tuned"} | {f"seed-{s}": f"GRPO, seed {s}" for s in (42, 43, 44)}


def score(path: Path, name: str) -> str:
    """In percent, with its 95 % interval; a dash where it was not taken."""
    if not path.exists():
        return "-"
    m = json.loads(path.read_text())
    return f"{m[name]:.1%} ({m[name + '_low'] * 100:.1f} to {m[name + '_high'] * 100:.1f})"


def main() -> None:
    folder = Path(sys.argv[1])
    print("| | greedy | avg@16 | maj@16 | pass@16 |\n|---|---|---|---|---|")
    for name, title in NAMES.items():
        sampled = folder / f"evaluation-{name}-16.json"
        greedy = score(folder / f"evaluation-{name}-greedy.json", "avg@1")
        print("|", " | ".join([title, greedy, *(score(sampled, m) for m in ("avg@16", "maj@16", "pass@16"))]), "|")


if __name__ == "__main__":
    main()
