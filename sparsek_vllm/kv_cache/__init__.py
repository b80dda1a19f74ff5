"""From a cache tensor as some vLLM hands it over to the strided views of ``PagedKV``."""

from sparsek_vllm.kv_cache.layouts import kv_views

__all__ = ["kv_views"]
