"""Print requirements of pyproject.toml, one a line: `python tools/requirements.py main cpu`."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
parts = {"main": project["dependencies"], **project["optional-dependencies"]}
print("\n".join(line.replace(" ", "") for name in sys.argv[1:] for line in parts[name]))
