"""NeMo Gym starts this script as a resources server; it turns into reward_server.py on the host and port Gym chose."""

import os
import sys
from pathlib import Path

from omegaconf import OmegaConf

config = OmegaConf.create(os.environ["NEMO_GYM_CONFIG_DICT"])[os.environ["NEMO_GYM_CONFIG_PATH"]]
server = config.resources_servers.reward_server
script = Path(__file__).resolve().parents[4] / "reward_server.py"
command = [sys.executable, script, "--host", server.host, "--port", server.port, *server.get("arguments", [])]
os.execv(sys.executable, [str(part) for part in command])
