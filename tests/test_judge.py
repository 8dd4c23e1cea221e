"""The LLM judge over the wire to vLLM's own server, with a tiny random model that can only answer nonsense."""

import os
import socket
import subprocess
import sys
import time

import pytest
import requests
from conftest import ROOT

pytestmark = pytest.mark.slow


def test_judge_asks_vllm(tiny_model, tmp_path):
    """A reply without a verdict line is no silent 0, and neither is a judge that is gone; both are told apart."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    env |= {"TORCHDYNAMO_DISABLE": "1"}  # as in a run: vLLM would compile a line of its sampler
    serve = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(tiny_model),
        "--port",
        str(port),
    ]
    serve += ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "4096", "--dtype", "float32"]
    serve += ["--hf-overrides", '{"max_position_embeddings": 4096}']
    with (tmp_path / "vllm.log").open("w") as log:
        vllm = subprocess.Popen(serve, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "reward_server.py"), "--port", "0", "--judge-url", url, "--judge-deadline", "20"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        reward_url = server.stdout.readline().split()[-1]
        deadline = time.monotonic() + 600
        while True:
            assert vllm.poll() is None, (tmp_path / "vllm.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM's server did not start"
            try:
                if requests.get(f"{url}/health", timeout=2).ok:
                    break
            except requests.RequestException:
                time.sleep(0.2)
        body = {
            "responses_create_params": {"input": "2+2?"},
            "question": "2+2?",
            "expected_answer": "4",
            "response": {
                "output": [{"type": "message", "content": [{"type": "output_text", "text": r"\boxed{5}"}]}],
            },
        }
        reply = requests.post(f"{reward_url}/verify", json=body, timeout=60).json()
        assert (reply["reward"], reply["library_reward"], reply["status"]) == (0.0, 0.0, "judge_failed")
        (evaluation,) = reply["judge_evaluations"]
        assert evaluation["response"]["output"][0]["content"][0]["text"]  # what vLLM's model said
        assert evaluation["verdict_label"] is None
        os.killpg(vllm.pid, 9)
        vllm.wait(20)
        body["expected_answer"] = "6"  # not in the verdict cache
        reply = requests.post(f"{reward_url}/verify", json=body, timeout=60).json()
        assert reply["status"] == "judge_failed"
        assert "error" in reply["judge_evaluations"][0]
    finally:
        server.terminate()
        server.wait(40)
        if vllm.poll() is None:
            os.killpg(vllm.pid, 9)
