"""Attention of one request from its definition, in float64. Shares nothing with the package."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    offset: int | None = None,
    spans: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[rows, heads, head_dim]`` and LSE ``[heads, rows]`` of one request, float64.

    ``q`` is ``[rows, heads, head_dim]``, ``k`` and ``v`` are ``[keys, kv_heads, head_dim]``,
    ``bias`` is ``[heads, rows, keys]``. Row ``i`` stands at key position ``offset + i``; by
    default the last row stands at the last key. ``spans`` is ``[rows, 2]``: keys that each row
    sees in any case.
    """
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    rows, heads, _ = q.shape
    keys, kv_heads, _ = k.shape
    if offset is None:
        offset = keys - rows
    position = torch.arange(rows)[:, None] + offset
    key = torch.arange(keys)[None, :]
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        visible &= key <= position
    if window[0] != -1:
        visible &= key >= position - window[0]
    if window[1] != -1:
        visible &= key <= position + window[1]
    if spans is not None:
        visible |= (key >= spans[:, :1].cpu()) & (key < spans[:, 1:].cpu())

    out = torch.zeros_like(q)
    lse = torch.zeros(heads, rows, dtype=torch.float64)
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = scale * (q[:, head] @ k[:, kv_head].T)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[head].double().cpu()
        scores[~visible] = -torch.inf
        # One more column that every row sees: the sink, or nothing. Its value is zero.
        sink = -torch.inf if sinks is None else float(sinks[head])
        scores = torch.cat([scores, torch.full((rows, 1), sink, dtype=torch.float64)], 1)
        peak = scores.amax(1, keepdim=True)
        peak[peak == -torch.inf] = 0.0
        weights = torch.exp(scores - peak)
        total = weights.sum(1, keepdim=True)
        out[:, head] = torch.where(total > 0, weights[:, :-1] @ v[:, kv_head] / total, 0.0)
        lse[head] = (peak + torch.log(total))[:, 0]
    return out, lse
