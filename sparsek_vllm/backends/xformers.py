"""xFormers: an attention module, and an operator for ``memory_efficient_attention``.

    from sparsek_vllm.backends.xformers import MemoryEfficientAttentionSparseKOp
    memory_efficient_attention(q, k, v, attn_bias=bias, op=MemoryEfficientAttentionSparseKOp)

Both hand xFormers' biases to ``varlen_attention`` as lengths, page tables, windows and offsets:
no mask is materialised, and K and V are passed as views wherever their strides allow it. The only
module that imports xFormers.
"""

from __future__ import annotations

import math
import sys
from importlib import import_module
from typing import Any

import torch

from sparsek_vllm._version import XFORMERS
from sparsek_vllm.core import DenseKV, PagedKV, varlen_attention
from sparsek_vllm.core.ops import CUDA_DTYPES, cuda_head_dims, has_cuda_kernel

try:
    from xformers.components.attention import Attention as _Attention
except ImportError:  # removed after 0.0.33
    _Attention = torch.nn.Module

__all__ = ["BIASES", "MemoryEfficientAttentionSparseKOp", "SparseKAttention", "SparseKFwOp"]


def _find_fmha() -> Any:
    """The package with operators and biases: xFormers' own, or ``mslk``, where it moved to."""
    cause: ImportError | None = None
    for name in ("xformers.ops.fmha", "mslk.attention.fmha"):
        try:
            found = import_module(name)
        except ImportError as error:
            cause = cause or error
            continue
        # An xFormers that re-exports mslk's leaves an empty package where mslk is missing.
        if hasattr(found, "AttentionFwOpBase"):
            return found
    raise ImportError(
        f"sparsek_vllm.backends.xformers needs xFormers: pip install '{XFORMERS}'"
    ) from cause


_fmha = _find_fmha()
_bias = _fmha.attn_bias
_FwOpBase: Any = _fmha.AttentionFwOpBase
_Context = sys.modules[_FwOpBase.__module__].Context
# The registry that `python -m xformers.info` lists lives beside the root of the operators.
_register = sys.modules[_fmha.AttentionOpBase.__base__.__module__].register_operator

# What the classes' own `materialize` does decides where each one belongs.
_CAUSAL_TOP_LEFT = (
    _bias.LowerTriangularMask,
    _bias.LowerTriangularMaskWithTensorBias,
    _bias.BlockDiagonalCausalMask,
    _bias.BlockDiagonalCausalLocalAttentionMask,
)
_CAUSAL_BOTTOM_RIGHT = (
    _bias.LowerTriangularFromBottomRightMask,
    _bias.LowerTriangularFromBottomRightLocalAttentionMask,
    _bias.BlockDiagonalCausalFromBottomRightMask,
    _bias.BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    _bias.BlockDiagonalCausalWithOffsetPaddedKeysMask,
    _bias.BlockDiagonalCausalLocalAttentionPaddedKeysMask,
    _bias.BlockDiagonalCausalWithOffsetGappyKeysMask,
    _bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    _bias.PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
)
_LOCAL = (
    _bias.LocalAttentionFromBottomRightMask,
    _bias.BlockDiagonalLocalAttentionPaddedKeysMask,
)
_UNMASKED = (
    _bias.BlockDiagonalMask,
    _bias.BlockDiagonalPaddedKeysMask,
    _bias.BlockDiagonalGappyKeysMask,
    _bias.PagedBlockDiagonalPaddedKeysMask,
    _bias.PagedBlockDiagonalGappyKeysMask,
)
_PAGED = (_bias.PagedBlockDiagonalPaddedKeysMask, _bias.PagedBlockDiagonalGappyKeysMask)

BIASES: tuple[type, ...] = _CAUSAL_TOP_LEFT + _CAUSAL_BOTTOM_RIGHT + _LOCAL + _UNMASKED
"""The bias classes that run natively. Subclasses of them do not: they may mask otherwise."""


class SparseKAttention(_Attention):
    """Exact attention in xFormers' layout.

    Has no parameters. A subclass of ``xformers.components.attention.Attention`` where xFormers
    still has it, of ``torch.nn.Module`` otherwise.

    Args:
        dropout: None or 0.
        args: none is supported.
        kwargs: ``name``, which ``from_config`` passes, is ignored; no other is supported.

    Raises:
        ValueError: dropout, or an argument that is not supported.
    """

    def __init__(self, dropout: float | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        kwargs.pop("name", None)
        unknown = {f"argument {i}": value for i, value in enumerate(args, start=2)}
        _refuse({"dropout": dropout, **unknown, **kwargs})

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        att_mask: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``softmax(q @ k.T * scale + att_mask) @ v`` for every batch entry and head.

        Args:
            q: ``[B, S, H, D]``, or ``[B, S, G, H, D]`` in G groups of heads; fp16 or bf16, on
                CPU fp32 and fp64 too.
            k: ``[B, S_k, H_k, D]`` where H is a multiple of H_k, or ``[B, S_k, G, H or 1, D]``;
                dtype and device of q.
            v: like k.
            att_mask: None; one of :data:`BIASES`; or a tensor that broadcasts to
                ``[B, H, S, S_k]``, added to the scores, or bool, True where a query may attend.
            kwargs: ``scale``, by default ``1 / sqrt(D)``; ``p``, the dropout, 0 only.

        Returns:
            Like q. Rows that see no key are 0.

        Raises:
            ValueError: a bias type or argument that is not supported, or tensors whose shapes,
                dtypes or devices do not fit.
            ImportError: CUDA tensors, and no kernels are built.
            NotImplementedError: in ``backward()``.
        """
        scale = kwargs.pop("scale", None)
        _refuse(kwargs)
        out: torch.Tensor = _ForwardOnly.apply(q, k, v, att_mask, scale)  # type: ignore[no-untyped-call]
        return out


@_register
class SparseKFwOp(_FwOpBase):
    """Operator for ``memory_efficient_attention`` and its relatives; forward only.

    Takes None, tensors and :data:`BIASES`, custom scales, partial attention, and inputs
    ``[B, M, K]``, ``[B, M, H, K]`` and ``[B, M, G, H, K]``; K/V heads that are expanded views are
    read once. The LSE is float32, ``[B, H, M]`` or ``[B, G, H, M]``, packed (B = 1, M of all
    blocks) with block-diagonal biases. For training pair it with a backward operator that takes
    packed LSEs: ``op=(SparseKFwOp, fmha.flash.BwOp)``.
    """

    OPERATOR = staticmethod(varlen_attention)
    SUPPORTED_DEVICES = frozenset({"cuda", "cpu"})
    SUPPORTED_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
    SUPPORTED_MAX_K = math.inf
    SUPPORTED_ATTN_BIAS_TYPES = (type(None), torch.Tensor, *BIASES)
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_PARTIAL = True
    SUPPORTS_BMGHK = True
    VARLEN_LSE_PACKED = True
    NAME = "sparsekF"

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why the inputs ``d`` cannot run here, empty if they can."""
        # Not the base class's: that refuses bf16 on CPU, and CUDA without xFormers' own kernels.
        q, k, v = d.query, d.key, d.value
        reasons: list[str] = cls.shape_not_supported_reasons(
            Mq=q.shape[1], Mkv=k.shape[1], K=q.shape[-1], Kv=v.shape[-1]
        )
        if q.device.type not in cls.SUPPORTED_DEVICES:
            reasons.append(f"device={q.device.type} (supported: {sorted(cls.SUPPORTED_DEVICES)})")
        on_cuda = q.device.type == "cuda"
        dtypes = CUDA_DTYPES if on_cuda else cls.SUPPORTED_DTYPES
        if on_cuda and not has_cuda_kernel(q.shape[-1]):
            reasons.append(f"query.shape[-1]={q.shape[-1]} (supported: {cuda_head_dims()})")
        for name, x in (("query", q), ("key", k), ("value", v)):
            if x.dtype not in dtypes:
                names = sorted(map(str, dtypes))
                reasons.append(f"{name}.dtype={x.dtype} (supported: {names})")
        if not _is_supported(d.attn_bias):
            reasons.append(f"attn_bias type is {type(d.attn_bias)}")
        if d.p != 0:
            reasons.append("dropout > 0.0")
        if d.output_dtype not in (None, q.dtype):
            reasons.append("Custom output dtype not supported")
        return reasons

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """``(out, context)``; the context, with the LSE, is None unless ``needs_gradient``."""
        out, lse = _attention(
            inp.query, inp.key, inp.value, inp.attn_bias, inp.scale, return_lse=needs_gradient
        )
        return out, None if lse is None else _Context(lse=lse, out=out)


MemoryEfficientAttentionSparseKOp = (SparseKFwOp, None)
"""For ``memory_efficient_attention(..., op=...)``; the backward operator is xFormers' choice."""


class _ForwardOnly(torch.autograd.Function):
    """The op has no gradient: say so in backward(), rather than leave it out of the sum."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        return _attention(*args)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "SparseKAttention has no backward pass: use torch.no_grad(), or "
            "memory_efficient_attention with op=(SparseKFwOp, a backward operator)"
        )


def _refuse(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name in ("p", "dropout"):
            if value:
                raise ValueError(f"SparseKAttention does not support dropout, got {name}={value}")
        elif value is not None:
            raise ValueError(
                f"SparseKAttention does not support {name}: forward takes q, k, v, att_mask "
                "and scale"
            )


def _is_supported(bias: Any) -> bool:
    return bias is None or isinstance(bias, torch.Tensor) or type(bias) in BIASES


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: Any,
    scale: float | None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Out like q, and the LSE ``[B, *heads, M]`` if asked for."""
    _check_shapes(q, k, v)
    if not _is_supported(bias):
        names = ", ".join(sorted(kind.__name__ for kind in BIASES))
        raise ValueError(
            f"the bias must be None, a torch.Tensor or one of {names}, got {type(bias).__name__}"
        )
    batch, rows, *heads, _ = q.shape
    keys = k.shape[1]
    dense = bias._bias if isinstance(bias, _bias.LowerTriangularMaskWithTensorBias) else bias
    arguments: dict[str, Any] = {}
    if isinstance(dense, torch.Tensor):
        arguments["bias"] = _scores_bias(dense, (batch, *heads, rows, keys), q.dtype)
    k, v = _distinct_heads(k, v)
    if hasattr(bias, "q_seqinfo"):
        kv, cu_seqlens_q = _blocks(bias, q, k, v)
        arguments["max_seqlen_q"] = bias.q_seqinfo.max_seqlen
        arguments["max_seqlen_k"] = bias.k_seqinfo.max_seqlen
    else:
        kv = _batch_rows(k, v)
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * rows
        arguments["min_seqlen_q"] = arguments["max_seqlen_q"] = rows
        arguments["max_seqlen_k"] = keys
    if type(bias) in _CAUSAL_TOP_LEFT:
        arguments["q_offsets"] = torch.zeros_like(kv.seq_lens)
    result = varlen_attention(
        q.flatten(2, -2).flatten(0, 1),
        kv,
        cu_seqlens_q,
        causal=type(bias) in _CAUSAL_TOP_LEFT + _CAUSAL_BOTTOM_RIGHT,
        window=_window(bias),
        scale=scale,
        return_lse=return_lse,
        **arguments,
    )
    if isinstance(result, torch.Tensor):
        return result.reshape(q.shape), None
    out, lse = result
    return out.reshape(q.shape), lse.view(*heads, batch, rows).movedim(-2, 0).contiguous()


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim not in (4, 5):
        raise ValueError(f"q must have shape [B, S, H, D] or [B, S, G, H, D], got {list(q.shape)}")
    fits = k.ndim == q.ndim and k.shape[0] == q.shape[0] and k.shape[-1] == q.shape[-1]
    if fits and q.ndim == 5:
        fits = k.shape[2] == q.shape[2] and k.shape[3] in (1, q.shape[3])
    if not fits:
        raise ValueError(
            "k must have the batch size, groups and head dimension of q, "
            f"{list(q.shape)}, got {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")


def _window(bias: Any) -> tuple[int, int]:
    """Keys before and after a query's own position."""
    if type(bias) in _LOCAL:
        return bias.window_left, bias.window_right
    if hasattr(bias, "_window_size"):  # it counts the query's own position
        return bias._window_size - 1, 0
    return -1, -1


def _scores_bias(bias: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Additive, as ``[B, H, S, S_k]``."""
    if bias.dtype == torch.bool:
        zeros = torch.zeros(bias.shape, dtype=dtype, device=bias.device)
        bias = zeros.masked_fill_(~bias, -torch.inf)
    try:
        bias = bias.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"a tensor bias must broadcast to {list(shape)}, got {list(bias.shape)}"
        ) from None
    return bias.flatten(1, -3)


def _distinct_heads(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S_k, H_k, D]``, without heads that are expanded views of others."""
    if k.ndim == 5:
        if k.shape[3] == 1 or k.stride(3) == v.stride(3) == 0:
            k, v = k[:, :, :, 0], v[:, :, :, 0]
        else:
            k, v = k.flatten(2, 3), v.flatten(2, 3)
    if k.stride(2) == v.stride(2) == 0:
        k, v = k[:, :, :1], v[:, :, :1]
    return k, v


def _batch_rows(k: torch.Tensor, v: torch.Tensor) -> DenseKV:
    """Batch entries of equal length as requests; a view if they lie whole rows apart."""
    batch, length = k.shape[:2]
    row = k.stride(1)
    step = k.stride(0) // row if row else 0
    if k.numel() and all(x.stride(0) == step * x.stride(1) for x in (k, v)):
        shape = ((batch - 1) * step + length, *k.shape[2:])
        k, v = (x.as_strided(shape, x.stride()[1:]) for x in (k, v))
    else:
        step = length
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    return DenseKV(
        k,
        v,
        torch.arange(batch, dtype=torch.int32, device=k.device) * step,
        torch.full((batch,), length, dtype=torch.int32, device=k.device),
    )


def _blocks(
    bias: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[PagedKV | DenseKV, torch.Tensor]:
    """Keys and values of a block-diagonal bias, a request a block, and ``cu_seqlens_q``."""
    name = type(bias).__name__
    if q.shape[0] != 1:
        raise ValueError(f"q, k and v must have batch size 1 with {name}, got {q.shape[0]}")
    rows, keys = bias.q_seqinfo.seqstart_py[-1], bias.k_seqinfo.seqstart_py[-1]
    if q.shape[1] != rows:
        raise ValueError(f"q must have the {rows} rows of the {name}, got {q.shape[1]}")
    cu_seqlens_q = bias.q_seqinfo.seqstart
    k, v = k[0], v[0]
    if isinstance(bias, _PAGED):
        return _pages(bias, k, v), cu_seqlens_q
    if k.shape[0] != keys:
        raise ValueError(f"k must have the {keys} rows of the {name}, got {k.shape[0]}")
    if isinstance(bias, _bias.BlockDiagonalMask):
        return DenseKV.from_cu_seqlens(k, v, bias.k_seqinfo.seqstart), cu_seqlens_q
    # Padded and gappy keys.
    return DenseKV(k, v, bias.k_seqinfo.seqstart[:-1], bias.k_seqinfo.seqlen), cu_seqlens_q


def _pages(bias: Any, k: torch.Tensor, v: torch.Tensor) -> PagedKV:
    size, table, lengths = bias.page_size, bias.block_tables, bias.k_seqinfo.seqlen
    if k.shape[0] % size:
        raise ValueError(f"k must have whole pages of {size} rows, got {k.shape[0]} rows")
    starts = None
    if isinstance(bias, _bias.PagedBlockDiagonalGappyKeysMask):
        starts = bias.k_seqinfo.seqstart[:-1]
        lengths = lengths - starts  # here seqlen is where the keys end
    shape = (k.shape[0] // size, size, *k.shape[1:])
    return PagedKV(k.view(shape), v.view(shape), table, lengths, starts=starts)
