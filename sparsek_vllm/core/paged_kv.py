"""Keys and values as the ops take them: paged (:class:`PagedKV`) or packed (:class:`DenseKV`).

Both are plain bundles of views: making one copies nothing and reads no tensor data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagedKV:
    """A paged KV cache and the part of it that each request may read.

    Token ``t`` of request ``b`` stands at position ``p = starts[b] + t`` of its pages, which is
    ``k[block_table[b, p // block_size], p % block_size]``. Entries of ``block_table`` outside a
    request's pages, and slots outside its tokens, are never read: they may hold anything.

    Attributes:
        k: ``[num_blocks, block_size, kv_heads, head_dim]``, any strides with the last
            dimension contiguous; a floating dtype or fp8.
        v: like ``k``.
        block_table: ``[batch, max_blocks]``, int32.
        seq_lens: ``[batch]``, int32, tokens in the cache for each request (0 is allowed).
        k_scale: optional float32 tensor with 1 or ``kv_heads`` elements, positive; K is multiplied
            by it.
        v_scale: likewise for V.
        starts: optional ``[batch]``, int32; by default 0 for each request.
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True)
class DenseKV:
    """Keys and values of all requests packed one after the other.

    Attributes:
        k: ``[total_k, kv_heads, head_dim]``, any strides with the last dimension contiguous.
        v: like ``k``.
        starts: ``[batch]``, int32, row of ``k`` where each request begins.
        seq_lens: ``[batch]``, int32, rows that belong to it. Rows between two requests
            (padding) are never read.
    """

    k: torch.Tensor
    v: torch.Tensor
    starts: torch.Tensor
    seq_lens: torch.Tensor

    @staticmethod
    def from_cu_seqlens(k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> DenseKV:
        """From prefix sums ``cu_seqlens [batch + 1]``, without padding between requests."""
        return DenseKV(k, v, cu_seqlens[:-1], cu_seqlens.diff())
