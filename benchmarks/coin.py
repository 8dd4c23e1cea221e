"""Toss coins, for benchmarks in which nothing is to be learnt: `--verifier benchmarks/coin.py:coin`."""

import zlib


def coin(text: str, row: dict) -> float:
    """Reward by the parity of a checksum: half of the answers, whatever they say."""
    return float(zlib.crc32(text.encode()) & 1)
