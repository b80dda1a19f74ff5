"""Merging attention over two disjoint sets of keys."""

from __future__ import annotations

import torch


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """See :func:`sparsek_vllm.core.ops.merge_states`."""
    total = torch.logaddexp(lse_a, lse_b)
    merged = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        # Empty parts are left out by selection: exp(-inf - -inf) and 0 * NaN are NaN.
        weight = (part_lse - total).exp().mT.unsqueeze(-1)
        empty = (part_lse == -torch.inf).mT.unsqueeze(-1)
        merged += torch.where(empty, 0.0, part * weight)
    out.copy_(merged)
    lse.copy_(total)
