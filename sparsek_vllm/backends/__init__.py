"""vLLM and xFormers backends. Importing this registers the vLLM backend if vLLM is installed."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsek_vllm.backends.vllm import SparseKBackend
    from sparsek_vllm.backends.xformers import SparseKAttention

from sparsek_vllm.backends.vllm_compat import register_vllm_backend

__all__ = ["SparseKAttention", "SparseKBackend", "register_vllm_backend"]

# Imported on first use: each needs a package that the other does not.
_HOMES = {
    "SparseKBackend": "sparsek_vllm.backends.vllm",
    "SparseKAttention": "sparsek_vllm.backends.xformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


if find_spec("vllm") is not None:
    try:
        register_vllm_backend()
    except ImportError as error:  # a vLLM that is too old must not take xFormers' users down
        warnings.warn(str(error), stacklevel=2)
