"""The op set in plain torch: runs on any CPU, and is the truth that kernels are tested against."""

from sparsek_vllm.reference.attention import attention, varlen_attention
from sparsek_vllm.reference.cache import write_kv
from sparsek_vllm.reference.merge import merge_states

__all__ = ["attention", "merge_states", "varlen_attention", "write_kv"]
