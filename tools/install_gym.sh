#!/usr/bin/env bash
# Install NeMo Gym into .venv-gym, a virtual environment of its own, for the tests that run its real servers. It needs
# Python 3.13; where there is none, this says so and those tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
for python in python3.13 "$HOME"/.pyenv/versions/3.13*/bin/python; do
    if "$python" -c "" 2>/dev/null; then
        [[ -x .venv-gym/bin/gym ]] && exit 0
        "$python" -m venv .venv-gym
        # 0.7.0 asks for 3.13.14 or newer, but runs on any 3.13. math-verify: its math server's own requirement.
        exec .venv-gym/bin/pip install -q --ignore-requires-python nemo-gym==0.7.0 math-verify==0.9.0
    fi
done
echo "no Python 3.13 here: the tests against NeMo Gym will be skipped"
