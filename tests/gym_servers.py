"""Real servers of NeMo Gym for tests and benchmarks, all in one process: `GYM_PYTHON gym_servers.py MODEL_URL ...`

Prints {name: url} when they listen, and ends with its standard input. `gym env start` starts the same servers, each in
a process and a virtual environment of its own, which takes minutes; their code and configuration are the same.
"""

import asyncio
import importlib
import json
import os
import socket
import sys
import threading
from pathlib import Path

import uvicorn
from omegaconf import OmegaConf

ADAPTER = Path(__file__).resolve().parents[1] / "examples" / "gym_adapter"
POLICY = {"type": "responses_api_models", "name": "policy_model"}


def agent(environment: str, **more: object) -> dict:
    return {"resources_server": {"type": "resources_servers", "name": environment}, "model_server": POLICY, **more}


def adapted() -> dict[str, tuple[str, str, dict]]:
    """Our reward server and what Gym puts before it, as the two configurations of the adapter say."""
    files = [OmegaConf.load(ADAPTER / name) for name in ("reward_server.yaml", "single_agent_turn.yaml")]
    found = {}
    for name, instance in OmegaConf.to_container(OmegaConf.merge(*files)).items():
        ((kind, folders),) = instance.items()
        folders.pop(folders.pop("_delete_key", None), None)
        ((folder, settings),) = folders.items()
        found[name] = kind, folder, settings
    kind, _, settings = found["reward_server_environment"]
    return found | {"legacy_environment": (kind, "single_agent_turn_legacy", settings)}


def servers(model_urls: list[str]) -> dict[str, tuple[str, str, dict]]:
    """name: (kind, folder of the wheel, configuration)."""
    model = {"base_url": model_urls, "api_key": "none", "model": "policy"}
    tokens = {"return_token_id_information": True, "uses_reasoning_parser": True}
    judge = {"judge_model_server": POLICY, "judge_responses_create_params": {"input": []}, "should_use_judge": False}
    return {
        "policy_model": ("responses_api_models", "vllm_model", model | tokens),
        "math": ("resources_servers", "math_with_judge", judge),
        "math_agent": ("responses_api_agents", "simple_agent", agent("math")),
        "turns": ("resources_servers", "example_multi_turn_gymnasium", {}),
        "turns_agent": ("responses_api_agents", "gymnasium_agent", agent("turns", max_steps=5)),
        "weather": ("resources_servers", "example_single_tool_call", {}),
        "weather_agent": ("responses_api_agents", "simple_agent", agent("weather", max_steps=4)),
        **adapted(),
    }


def end_with_input() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock the processes that Gym forks would wait for without end
        pass
    os._exit(0)


def main() -> None:
    threading.Thread(target=end_with_input, daemon=True).start()  # so that no server outlives who started it
    wanted, sockets = servers(sys.argv[1:]), {}
    config = {"dry_run": False, "head_server": {"host": "127.0.0.1", "port": 1}}
    for name, (kind, folder, settings) in wanted.items():
        sockets[name] = socket.create_server(("127.0.0.1", 0))
        place = {"entrypoint": "app.py", "host": "127.0.0.1", "port": sockets[name].getsockname()[1]}
        domain = {"domain": "other"} if kind == "resources_servers" else {}
        config[name] = {kind: {folder: place | domain | settings}}
    urls = {name: f"http://127.0.0.1:{sock.getsockname()[1]}" for name, sock in sockets.items()}
    os.environ["NEMO_GYM_CONFIG_DICT"] = json.dumps(config)
    found = []
    uvicorn.run = lambda **settings: found.append(uvicorn.Server(uvicorn.Config(**settings)))  # instead of serving
    for name, (kind, folder, _) in wanted.items():
        os.environ["NEMO_GYM_CONFIG_PATH"] = name
        if (ADAPTER / kind / folder).exists():  # ours: the test starts it at this port
            sockets.pop(name).close()
            continue
        module = importlib.import_module(f"{kind}.{folder}.app")
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        server = [value for value in own if hasattr(value, "run_webserver")][-1]
        server.ray_enabled = False  # none of these asks Ray for anything
        server.run_webserver()

    async def serve() -> None:
        os.write(1, json.dumps(urls).encode() + b"\n")  # Gym puts names before what is printed
        os.dup2(2, 1)  # nobody reads further lines, and a pipe that is full would hold up the servers
        await asyncio.gather(*(s.serve([sock]) for s, sock in zip(found, sockets.values(), strict=True)))

    asyncio.run(serve())


if __name__ == "__main__":
    main()
