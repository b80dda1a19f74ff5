"""sparsek-vllm: an attention backend for vLLM on NVIDIA Hopper and Blackwell GPUs.

Importing this package needs neither vLLM, xFormers nor compiled kernels.
"""

from sparsek_vllm import core, utils
from sparsek_vllm._version import __version__
from sparsek_vllm.core.attention import attention_forward

__all__ = ["__version__", "attention_forward", "core", "utils"]
