r"""Verdicts on pairs made from real golds, on rewritten answers and on public reports: what is paid and what is not.

    python benchmarks/verdicts.py [--data ../shared/data] [--pairs 20000] [--seed 0] [--show 3]

A wrong answer that is paid is the worst fault, a right one that is not paid the next; both are counted by kind, and a
few of each are printed. The rows of `reported_cases.jsonl` that are contested are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from verdict_pairs import Pair, box, pairs  # noqa: E402

from reward_server import verify  # noqa: E402


def real_golds(data: Path) -> list[str]:
    """The different answers of MATH, DeepMath, AIME and GSM8K, in an order that the seed of `random` fixes."""
    files = [("math/math500", "answer"), ("math/train_answers_only", "answer"), ("deepmath/train", "ground_truth")]
    files += [("aime/aime24", "expected_answer"), ("gsm8k/test", "answer")]
    golds = set()
    for name, key in files:
        for line in (data / f"{name}.jsonl").read_text().splitlines():
            golds.add(str(json.loads(line)[key]).rpartition("#### ")[2].replace(",", "", name.startswith("gsm8k")))
    ordered = sorted(golds)
    random.Random(0).shuffle(ordered)
    return ordered


def report(name: str, rows: Iterable[Pair], show: int) -> None:
    """Verify and print: accuracy, false positives, then the kinds with mistakes."""
    rows = list(rows)
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda row: verify(row[2], row[1]), rows))
    wrong: Counter[tuple[str, bool]] = Counter()
    for (kind, gold, text, pays), verdict in zip(rows, verdicts, strict=True):
        if (verdict.reward == 1.0) != pays:
            wrong[kind, pays] += 1
            if wrong[kind, pays] <= show:
                print(f"  {'unpaid' if pays else 'PAID'} | {kind} | {gold} | {text[-90:]} | {verdict.status}")
    right = [sum(row[3] for row in rows), sum(count for (_, pays), count in wrong.items() if pays)]
    paid_wrongly = sum(count for (_, pays), count in wrong.items() if not pays)
    share = 1 - right[1] / max(right[0], 1)
    print(f"{name}: {len(rows)} rows; right answers paid {share:.2%} of {right[0]}; wrong ones paid: {paid_wrongly}")
    for (kind, pays), count in wrong.most_common():
        print(f"  {count:4} {kind}, {'right but unpaid' if pays else 'WRONG BUT PAID'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--pairs", type=int, default=20_000, help="near misses and rewritings from real golds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="mistakes of a kind to print")
    args = parser.parse_args()
    lines = (args.data / "verifier" / "reported_cases.jsonl").read_text().splitlines()
    cases = [row for row in map(json.loads, lines) if not row["contested"]]
    report("public reports", ((row["kind"], row["gold"], row["text"], row["expected"]) for row in cases), args.show)
    lines = (args.data / "verifier" / "variants.jsonl").read_text().splitlines()
    made = ((row["transform"], row["gold"], box(row["pred_answer"]), row["expected"]) for row in map(json.loads, lines))
    report("variants", made, args.show)
    report("made from real golds", islice(pairs(real_golds(args.data), args.seed), args.pairs), args.show)
    report("made from drawn numbers", pairs([], args.seed), args.show)


if __name__ == "__main__":
    main()
