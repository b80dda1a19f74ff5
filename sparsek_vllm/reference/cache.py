"""Writing new keys and values into a paged cache."""

from __future__ import annotations

import torch


def quantize(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """``x [..., kv_heads, head_dim]`` divided by ``scale`` and cast, saturating, to ``dtype``."""
    if scale is not None:
        x = x.float() / _per_head(scale)
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.float().clamp(-limit, limit)
    return x.to(dtype)


def dequantize(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """The inverse of :func:`quantize`, up to rounding."""
    if scale is None:
        return x.to(dtype)
    return (x.float() * _per_head(scale)).to(dtype)


def _per_head(scale: torch.Tensor) -> torch.Tensor:
    return scale.float().reshape(-1, 1)  # [1 or kv_heads, 1] against [..., kv_heads, head_dim]


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """See :func:`sparsek_vllm.core.ops.write_kv`."""
    slots = slot_mapping.long()
    tokens = slots.shape[0]
    key, value = key[:tokens], value[:tokens]
    kept = slots >= 0
    if not kept.all():
        slots, key, value = slots[kept], key[kept], value[kept]
    block_size = k_cache.shape[1]
    block, offset = slots // block_size, slots % block_size
    for cache, new, scale in ((k_cache, key, k_scale), (v_cache, value, v_scale)):
        # index_put knows no fp8: move bytes
        new = quantize(new, cache.dtype, scale)
        if cache.dtype.itemsize == 1:
            cache, new = cache.view(torch.uint8), new.view(torch.uint8)
        cache[block, offset] = new
