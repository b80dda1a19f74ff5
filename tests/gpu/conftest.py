"""GPU tests share the helpers of the CPU tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import target

if target.NAME != "cuda":
    pytest.exit(f"tests/gpu need SPARSEK_TEST_DEVICE=cuda, got {target.NAME}", returncode=2)

# A forked engine cannot use CUDA once this process has.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
