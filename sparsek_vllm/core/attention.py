"""The library's front door: attention over tensors of shape [B, H, S, D]."""

from __future__ import annotations

from typing import NoReturn

import torch

from sparsek_vllm.core.ops import attention, check_scale

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
        ``[B, H, S, D]``, float16, in the memory order of Q.

    Raises:
        ValueError: a tensor is not on CUDA, not float16, or of the wrong shape, or ``scale`` is
            not a positive finite number.
        RuntimeError: the GPU is older than Hopper.
        ImportError: there are no kernels, and they cannot be compiled.
    """
    # All at once, since this counts at every call: what is wrong is found out apart.
    if not (
        isinstance(Q, torch.Tensor)
        and isinstance(K, torch.Tensor)
        and isinstance(V, torch.Tensor)
        and Q.is_cuda
        and Q.dtype == K.dtype == V.dtype == torch.float16
        and Q.ndim == 4
        and Q.shape == K.shape == V.shape
        and Q.device == K.device == V.device
    ):
        _refuse({"Q": Q, "K": K, "V": V})
    head_dim = Q.shape[3]
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head dimension D must be {' or '.join(map(str, HEAD_DIMS))}, got {head_dim}"
        )
    return attention(Q, K, V, check_scale(scale, head_dim))


def _refuse(tensors: dict[str, torch.Tensor]) -> NoReturn:
    Q = tensors["Q"]
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
    raise AssertionError("nothing to refuse")
