"""The trainer's side of the reward server: a real server, real deaths."""

import signal

import pytest

from config import ConfigError, Env
from reward_client import RewardClient

TEXTS = [r"so \boxed{4}", r"so \boxed{5}", "no idea"]
VERDICTS = [("correct", 1.0), ("wrong", 0.0), ("no_answer", 0.0)]


def verdicts(client: RewardClient) -> list[tuple[str, float]]:
    return [(v["status"], v["reward"]) for v in client.submit(TEXTS, "4").result(timeout=60)]


def test_starts_scores_restarts_and_stops(tmp_path, capsys):
    client = RewardClient(Env(reward_workers=1), tmp_path)
    try:
        assert verdicts(client) == VERDICTS
        first = client.process
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        assert verdicts(client) == VERDICTS
        assert client.restarts == 1
        assert client.process.pid != first.pid
        assert "it died with exit code -9, starting it again" in capsys.readouterr().err
    finally:
        client.close()
    assert client.process.poll() == 0


def test_uses_a_running_server_and_leaves_it_running(tmp_path):
    owner = RewardClient(Env(reward_workers=1), tmp_path)
    try:
        guest = RewardClient(Env(reward_url=owner.url + "/"), tmp_path)
        assert verdicts(guest) == VERDICTS
        guest.close()
        assert owner.process.poll() is None
    finally:
        owner.close()


def test_an_unreachable_server_gives_no_false_zero(tmp_path):
    owner = RewardClient(Env(reward_workers=1), tmp_path)
    guest = RewardClient(Env(reward_url=owner.url, reward_timeout_s=2), tmp_path)
    owner.close()
    assert {status for status, _ in verdicts(guest)} == {"unreachable"}
    guest.close()


def test_wrong_url_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no reward server at env.reward_url=http://127.0.0.1:9 "):
        RewardClient(Env(reward_url="http://127.0.0.1:9"), tmp_path)
