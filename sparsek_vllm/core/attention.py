"""The library's front door: attention over tensors of shape [B, H, S, D]."""

from __future__ import annotations

import functools

import torch

from sparsek_vllm.core.ops import check_scale, varlen_attention
from sparsek_vllm.core.paged_kv import DenseKV

HEAD_DIMS = (64, 128)


def attention_forward(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """``softmax(Q @ K.T * scale) @ V`` for every batch entry and head.

    Args:
        Q: ``[B, H, S, D]``, float16, on a CUDA device; D is 64 or 128, the rest arbitrary.
        K: like Q.
        V: like Q.
        scale: factor of the scores, by default ``1 / sqrt(D)``.

    Returns:
        ``[B, H, S, D]``, float16.

    Raises:
        ValueError: a tensor is not on CUDA, not float16, or of the wrong shape, or ``scale`` is
            not a positive finite number.
        RuntimeError: the GPU is older than Hopper.
        ImportError: there are no kernels, and they cannot be compiled.
    """
    tensors = {"Q": Q, "K": K, "V": V}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device.type != "cuda":
            raise ValueError(f"{name} must be on a CUDA device, got {tensor.device}")
        if tensor.device != Q.device:
            raise ValueError(f"{name} must be on {Q.device} like Q, got {tensor.device}")
        if tensor.dtype != torch.float16:
            raise ValueError(f"{name} must be torch.float16, got {tensor.dtype}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape [B, H, S, D], got {list(tensor.shape)}")
        if tensor.shape != Q.shape:
            raise ValueError(
                f"{name} must have the shape of Q, {list(Q.shape)}, got {list(tensor.shape)}"
            )
    batch, heads, rows, head_dim = Q.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head dimension D must be {' or '.join(map(str, HEAD_DIMS))}, got {head_dim}"
        )
    scale = check_scale(scale, head_dim)
    # Each head of each batch entry is a request of its own: no copy, whatever B and H are.
    packed = (batch * heads * rows, 1, head_dim)
    q, k, v = (t.contiguous().view(packed) for t in tensors.values())
    bounds, lengths = _uniform_lengths(batch * heads, rows, Q.device)
    out = varlen_attention(
        q,
        DenseKV(k, v, bounds[:-1], lengths),
        bounds,
        causal=False,
        scale=scale,
        min_seqlen_q=rows,
        max_seqlen_q=rows,
        max_seqlen_k=rows,
    )
    assert isinstance(out, torch.Tensor)
    return out.view(Q.shape)


def _uniform_lengths(
    requests: int, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix sums and lengths of so many requests of so many rows."""
    # What a graph captures is only written at its replay, so it is not kept.
    if torch.cuda.is_current_stream_capturing():
        return _uniform_lengths_kept.__wrapped__(requests, rows, device, 0)
    # Other streams do not wait until this one has written it.
    stream = torch.cuda.current_stream(device).cuda_stream
    return _uniform_lengths_kept(requests, rows, device, stream)


@functools.lru_cache(maxsize=64)
def _uniform_lengths_kept(
    requests: int, rows: int, device: torch.device, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = torch.arange(requests + 1, dtype=torch.int32, device=device) * rows
    return bounds, torch.full((requests,), rows, dtype=torch.int32, device=device)
