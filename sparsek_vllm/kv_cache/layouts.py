"""Layout adapters. None copies: each returns views of the tensor it is given.

=====================  ==========================================  ===========================
vLLM                   logical shape                               memory order
=====================  ==========================================  ===========================
0.26 and newer         ``(blocks, kv_heads, block, 2 * head_dim)``  NHD, HND or a KVCacheLayout:
                                                                   all are strides
up to mid-0.2x         ``(2, blocks, block, kv_heads, head_dim)``   as the shape says
=====================  ==========================================  ===========================

An element may be a float or, for fp8, a byte. Pages may be padded, or those of one layer spread
between other layers' pages; a dimension of size one may carry any stride.
"""

from __future__ import annotations

import torch


def kv_views(
    cache: torch.Tensor,
    kv_heads: int,
    head_dim: int,
    fp8_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one layer as ``[num_blocks, block_size, kv_heads, head_dim]`` views.

    Args:
        cache: the layer's cache in one of the shapes above.
        kv_heads: heads of K and of V.
        head_dim: elements of a head.
        fp8_dtype: what the bytes of a uint8 cache are; None for a cache of floats.

    Raises:
        ValueError: the shape is none of the above, or the dtype does not fit ``fp8_dtype``.
    """
    shape = cache.shape  # asked for once: this counts in every layer
    packed = len(shape) == 4 and shape[1] == kv_heads and shape[3] == 2 * head_dim
    two_plane = len(shape) == 5 and shape[0] == 2 and shape[3:] == (kv_heads, head_dim)
    if not (packed or two_plane):
        raise ValueError(
            f"cache must have shape (blocks, kv_heads={kv_heads}, block, 2 * head_dim="
            f"{2 * head_dim}) or (2, blocks, block, {kv_heads}, {head_dim}), "
            f"got {tuple(shape)}"
        )
    if shape[-1] > 1 and cache.stride(-1) != 1:
        raise ValueError(
            f"cache must be contiguous in its last dimension, got strides {cache.stride()}"
        )
    if fp8_dtype is not None and cache.dtype != fp8_dtype:
        if cache.dtype.itemsize != 1:
            raise ValueError(f"cache must hold bytes for {fp8_dtype}, got {cache.dtype}")
        cache = cache.view(fp8_dtype)
    k, v = cache.transpose(1, 2).chunk(2, 3) if packed else cache.unbind(0)
    return k, v
