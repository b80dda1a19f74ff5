"""The op set, its inputs, and the configuration of the kernels behind it."""

from sparsek_vllm.core.attention import attention_forward
from sparsek_vllm.core.build_info import get_build_info
from sparsek_vllm.core.config import Config, get_default_config, set_default_config
from sparsek_vllm.core.ops import merge_states, varlen_attention, write_kv
from sparsek_vllm.core.paged_kv import DenseKV, PagedKV
from sparsek_vllm.core.stats import path_counts, reset_path_counts

__all__ = [
    "Config",
    "DenseKV",
    "PagedKV",
    "attention_forward",
    "get_build_info",
    "get_default_config",
    "merge_states",
    "path_counts",
    "reset_path_counts",
    "set_default_config",
    "varlen_attention",
    "write_kv",
]
