"""Attention of one request from its definition in float64, on the GPU: for long requests."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, heads, dim]`` output and ``[heads, rows]`` LSE; the last row at the last key.

    ``spans`` is ``[rows, 2]``: keys that each row sees in any case.
    """
    rows, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    distance = torch.arange(keys, device=q.device) - torch.arange(
        keys - rows, keys, device=q.device
    ).unsqueeze(-1)
    hidden = torch.zeros(rows, keys, dtype=torch.bool, device=q.device)
    if causal:
        hidden |= distance > 0
    if window[0] >= 0:
        hidden |= distance < -window[0]
    if window[1] >= 0:
        hidden |= distance > window[1]
    if spans is not None:
        key = torch.arange(keys, device=q.device)
        hidden &= (key < spans[:, :1]) | (key >= spans[:, 1:])
    out = torch.empty(rows, heads, dim, dtype=torch.float64, device=q.device)
    lse = torch.empty(heads, rows, dtype=torch.float64, device=q.device)
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = q[:, head].double() @ k[:, kv_head].double().T * dim**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks[head].double().expand(rows, 1)
            scores = torch.cat([scores, sink], 1)
        lse[head] = scores.logsumexp(1)
        shift = lse[head].masked_fill(lse[head] == -torch.inf, 0).unsqueeze(-1)
        weights = (scores - shift).exp()[:, :keys]
        out[:, head] = weights @ v[:, kv_head].double()
    return out, lse
