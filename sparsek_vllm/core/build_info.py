"""What this process runs on."""

from __future__ import annotations

from typing import Any

import torch


def compute_arch(device: int | torch.device | None = None) -> str:
    """Architecture of a GPU, such as ``"sm_90"``; ``"cpu"`` without one."""
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def get_build_info() -> dict[str, Any]:
    """Versions of torch and CUDA, and the GPU.

    Returns:
        ``torch_version``, ``cuda_available``, ``cuda_version``, ``cudnn_version``,
        ``device_name``, ``device_capability`` as ``(major, minor)`` and ``compute_arch``. What
        does not exist is None; ``compute_arch`` is ``"cpu"`` without a GPU.
    """
    gpu = torch.cuda.is_available()
    return {
        "torch_version": torch.__version__,
        "cuda_available": gpu,
        "cuda_version": torch.version.cuda,
        "cudnn_version": torch.backends.cudnn.version(),
        "device_name": torch.cuda.get_device_name() if gpu else None,
        "device_capability": torch.cuda.get_device_capability() if gpu else None,
        "compute_arch": compute_arch(),
    }
