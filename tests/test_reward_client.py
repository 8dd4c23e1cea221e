"""The trainer's side of the reward server: a real server, real deaths."""

import signal
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

import reward_client
from config import ConfigError, Env
from launch import RunError
from reward_client import VERIFIED, RewardClient

pytestmark = pytest.mark.slow  # each test starts a server with its workers

TEXTS = [r"so \boxed{4}", r"so \boxed{5}", "no idea"]
VERDICTS = [("correct", 1.0), ("wrong", 0.0), ("no_answer", 0.0)]


def verdicts(client: RewardClient) -> list[tuple[str, float]]:
    return [(v["status"], v["reward"]) for v in client.submit(TEXTS, {"expected_answer": "4"}).result(timeout=60)]


def test_starts_scores_restarts_and_stops(tmp_path, capsys, monkeypatch):
    """Also where the cluster has a proxy, which knows nothing of a server on 127.0.0.1."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
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
        monkeypatch.setattr(reward_client, "HEALTH_DEADLINE_S", 1)
        client.cfg.reward_timeout_s = 5
        client.process.send_signal(signal.SIGSTOP)
        assert verdicts(client) == VERDICTS
        assert client.restarts == 2
        assert "it does not answer any more, starting it again" in capsys.readouterr().err
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


def test_lenient_extraction_and_an_unreachable_server_that_gives_no_false_zero(tmp_path):
    owner = RewardClient(Env(reward_workers=1, extraction="lenient"), tmp_path)
    (verdict,) = owner.submit(["So there are 4."], {"expected_answer": "4"}).result(timeout=60)
    assert verdict["status"] == "correct"
    guest = RewardClient(Env(reward_url=owner.url, reward_timeout_s=2), tmp_path)
    owner.close()
    assert {status for status, _ in verdicts(guest)} == {"unreachable"}
    guest.close()


def test_wrong_url_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no reward server at env.reward_url=http://127.0.0.1:9 "):
        RewardClient(Env(reward_url="http://127.0.0.1:9"), tmp_path)


def test_a_server_of_another_kind_is_one_line(somebody_elses_server, tmp_path):
    server, _ = somebody_elses_server
    server.answer = 404, "not here"
    with pytest.raises(ConfigError, match="is neither .* /verify_batch answered 404 'not here', /verify answered 404"):
        RewardClient(Env(reward_url=f"http://127.0.0.1:{server.server_port}"), tmp_path)


def test_a_verifier_of_ones_own_sees_the_whole_row(tmp_path):
    """Chosen by configuration; the one under examples/ looks at the row's unit and tolerance."""
    verifier = f"{ROOT}/examples/measurement.py:measurement"
    client = RewardClient(Env(reward_workers=1, verifier=verifier), tmp_path)
    row = {"expected_answer": "86400", "unit": "s", "tolerance": 0.1}
    texts = ["24 h are 86400 s.", "8.0e4 s", "about 86400 seconds", "86400", "7.0e4 s", "long"]
    try:
        found = client.submit(texts, row).result(timeout=60)
        assert [v["reward"] for v in found] == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
        assert [v["status"] for v in found] == ["correct"] * 4 + ["wrong", "no_answer"]
    finally:
        client.close()
    with pytest.raises(ConfigError, match="the reward server did not start"):
        RewardClient(Env(reward_workers=1, verifier=f"{ROOT}/examples/measurement.py:nothing"), tmp_path)


@pytest.fixture
def somebody_elses_server():
    """A server that answers /verify_batch with the given status and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802 - the name that http.server looks for
            self.rfile.read(int(self.headers["Content-Length"]))
            self.server.may_answer.wait(60)
            self.reply(*self.server.answer)

        def reply(self, code, body):
            with suppress(ConnectionError):  # who asked may have given up
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer, server.may_answer = (200, '{"results": []}'), threading.Event()
    server.may_answer.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, RewardClient(Env(reward_url=f"http://127.0.0.1:{server.server_port}"), ".")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        ('{"reward": 0.5, "status": "correct"}', "correct"),
        ('{"reward": NaN, "status": "correct"}', "unusable"),
        ('{"reward": 1e30, "status": "correct"}', "unusable"),
        ('{"reward": null, "status": "correct"}', "unusable"),
        ('{"reward": "1", "status": "correct"}', "unusable"),
        ('{"reward": 1, "status": 7}', "unusable"),
        ('{"reward": 1}', "unreachable"),
        ("null", "unreachable"),
    ],
)
def test_what_a_server_may_answer(somebody_elses_server, verdict, status):
    """A reward that cannot be trained on is masked; it never becomes a 0 that counts."""
    server, client = somebody_elses_server
    server.answer = 200, f'{{"results": [{verdict}]}}'
    (found,) = client.submit(["x"], {"expected_answer": "4"}).result(timeout=60)
    assert found["status"] == status
    assert (status in VERIFIED) == (status == "correct")


def test_a_server_in_trouble_gives_no_false_zero(somebody_elses_server):
    """It answers 500, and later than the deadline allows."""
    server, client = somebody_elses_server
    server.answer = 500, "no"
    (found,) = client.submit(["x"], {"expected_answer": "4"}).result(timeout=60)
    assert found["status"] == "unreachable"
    server.answer = 200, '{"results": [{"reward": 1.0, "status": "correct"}]}'
    server.may_answer.clear()
    client.cfg.reward_timeout_s = 0.1
    (found,) = client.submit(["x"], {"expected_answer": "4"}).result(timeout=60)
    server.may_answer.set()
    assert found["status"] == "unreachable"


@pytest.mark.parametrize("code", [401, 404, 422])
def test_a_server_that_refuses_ends_the_run_with_what_it_said(somebody_elses_server, code):
    server, client = somebody_elses_server
    server.answer = code, '{"detail": "no such thing"}'
    with pytest.raises(RunError, match=rf'/verify_batch answered {code}: {{"detail": "no such thing"}}'):
        client.submit(["x"], {"expected_answer": "4"}).result(timeout=60)
