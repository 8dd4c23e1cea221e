"""Time and memory of `prepare_data.py` on 1.8 million rows: `python benchmarks/prepare_data.py`.

Writes a synthetic Parquet file in DAPO columns, as large and as repetitive as ByteDance's file (every question about
100 times), into a temporary folder (3 GB of disk needed), converts it with the real script in a process of its own, and
prints one JSON line: rows, seconds, peak memory of that process. Target: 1.8 M rows within 60 s and 1 GiB on 2 cores.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prepare_data import DAPO_TEMPLATE  # noqa: E402 - the script, not this file: its folder is now first in the path

SCHEMA = pyarrow.schema(
    {
        "data_source": pyarrow.string(),
        "prompt": pyarrow.list_(pyarrow.struct({"content": pyarrow.string(), "role": pyarrow.string()})),
        "ability": pyarrow.string(),
        "reward_model": pyarrow.struct({"ground_truth": pyarrow.string(), "style": pyarrow.string()}),
        "extra_info": pyarrow.struct({"index": pyarrow.string()}),
    }
)


def write_parquet(path: Path, rows: int, distinct: int, seed: int = 0) -> None:
    """Questions of 60 to 600 characters in DAPO's own order of magnitude, one row group of a million rows at a time."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(2000)] + [
        "\\frac{1}{2}"
    ]
    questions = [" ".join(rng.choices(words, k=rng.randint(10, 100))) + f" ({i})" for i in range(distinct)]
    prompts = [[{"content": DAPO_TEMPLATE.replace("{question}", q), "role": "user"}] for q in questions]
    with pyarrow.parquet.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, rows, 1_000_000):
            picked = [i % distinct for i in range(start, min(start + 1_000_000, rows))]
            columns = {
                "data_source": ["math_dapo"] * len(picked),
                "prompt": [prompts[i] for i in picked],
                "ability": ["MATH"] * len(picked),
                "reward_model": [{"ground_truth": str(i % 1000), "style": "rule-lighteval/MATH_v2"} for i in picked],
                "extra_info": [{"index": f"9a9b6eb4-a1cb-49d1-8c1e-{start + n:012d}"} for n in range(len(picked))],
            }
            writer.write_table(pyarrow.table(columns, schema=SCHEMA), row_group_size=1_000_000)


def main() -> None:
    """Generate, convert, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_800_000)
    parser.add_argument("--distinct", type=int, default=17_917, help="different questions among them")
    parser.add_argument("--results", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp) / "dapo.parquet"
        # in a child: this process's own memory would be the floor of what wait4 reports for the script's
        subprocess.run([sys.executable, "-c", _WRITE, str(source), str(args.rows), str(args.distinct)], check=True)
        start = time.monotonic()
        command = [sys.executable, str(ROOT / "prepare_data.py"), str(source), "--output", f"{tmp}/out"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        result = {
            "rows": args.rows,
            "distinct": args.distinct,
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_memory_mib": round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)),
            "parquet_mb": round(source.stat().st_size / 1e6),
            "jsonl_mb": round((Path(tmp) / "out" / "train.jsonl").stat().st_size / 1e6),
            "cpus": len(os.sched_getaffinity(0)),
            "pyarrow": pyarrow.__version__,
            "exit_code": os.waitstatus_to_exitcode(status),
        }
    from environment import environment  # only now: it loads torch, and see above

    result["environment"] = environment()
    print(json.dumps(result))
    if args.results:
        args.results.write_text(json.dumps(result, indent=1) + "\n")


_WRITE = f"""
import sys, runpy, pathlib
write_parquet = runpy.run_path({str(Path(__file__).resolve())!r})["write_parquet"]
write_parquet(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""

if __name__ == "__main__":
    main()
