"""What the compiled CUDA kernels say of themselves. ImportError where none are built."""

from sparsek_vllm._version import __version__
from sparsek_vllm.core import build_info, kernels

kernels.require()


def version() -> str:
    """Version of the kernels."""
    return __version__


def cuda_arch() -> str:
    """Architecture of the current GPU, such as ``"sm_90"``."""
    return build_info.compute_arch()


def supported_archs() -> list[str]:
    """Architectures that the kernels are built for."""
    return list(kernels.SUPPORTED_ARCHS)
