"""Finding the compiled CUDA kernels and naming the path that a tensor takes."""

from __future__ import annotations

import torch

SUPPORTED_ARCHS = ("sm_90a", "sm_100")

MISSING = (
    "sparsek-vllm has no CUDA kernels in this installation: version 0.1.0 carries the CPU "
    "reference only. CPU tensors and vLLM's CPU platform work; for CUDA install a release "
    "whose `sparsek doctor` lists kernels"
)


def available() -> bool:
    """Whether compiled kernels can be loaded."""
    return False


def require() -> None:
    """Load the kernels; ImportError, with the way out, where there are none."""
    if not available():
        raise ImportError(MISSING)


def path_for(device: torch.device) -> str:
    """Name of the implementation that serves tensors on ``device``."""
    if device.type == "cpu":
        return "reference"
    if device.type == "cuda":
        require()
    raise ValueError(f"tensors must be on cpu or cuda, got {device}")
