"""plot_run.py draws what a run has logged, and says in one line what it cannot read."""

import sys

import pytest
from conftest import ROOT

import plot_run

RUN = ROOT / "benchmarks" / "results" / "quickstart"


@pytest.fixture
def plot(monkeypatch):
    """Run the script's main function with these arguments."""

    def plot(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *args])
        plot_run.main()

    return plot


def test_runs_become_one_picture(plot, tmp_path):
    """A kept run, and one of two steps of which the second had nothing to learn from."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "val:accuracy": 0.25, "val:num_answers": 48}\n'
        '{"step": 1, "reward": 0.5, "grad_norm": 0.2, "gen_kl_error": 1e-9, "time/elapsed_s": 2, "time/train_s": 1}\n'
        '{"step": 2, "reward": 1.0, "time/elapsed_s": 4}\n'
    )
    plot(f"kept={RUN}", str(tmp_path), "--output", f"{tmp_path}/new/runs.png")
    assert (tmp_path / "new" / "runs.png").read_bytes()[1:4] == b"PNG"


def test_smoothing_is_the_mean_of_the_last_ten():
    assert plot_run.smooth([float(i) for i in range(12)])[-2:] == [5.5, 6.5]
    assert plot_run.smooth([1.0, 3.0]) == [1.0, 2.0]


@pytest.mark.parametrize(("text", "words"), [("", "has no step yet"), ("{", "cannot read"), (None, "cannot read")])
def test_what_cannot_be_read_is_one_line(plot, tmp_path, text, words):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{words}[^\n]*$"):
        plot(f"{tmp_path}/metrics.jsonl", "--output", f"{tmp_path}/x.png")
