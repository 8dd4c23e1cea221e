"""Print requirements of pyproject.toml, one a line: `python tools/requirements.py main cpu`.

With the Python that the tests are run with, a line more holds pip to the versions in requirements/.
"""

import sys
import tomllib
from pathlib import Path

TESTED = {"cpu": (3, 11), "dev": (3, 11), "gpu": (3, 12)}  # the Python of each file there

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
parts = {"main": project["dependencies"], **project["optional-dependencies"]}
print("\n".join(line.replace(" ", "") for name in sys.argv[1:] for line in parts[name]))
for name in sys.argv[1:]:
    if TESTED.get(name) == sys.version_info[:2]:
        print(f"--constraint=requirements/{name}.txt")
