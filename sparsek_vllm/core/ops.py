"""The op set: schemas, checks and dispatch.

Each op is registered with ``torch.library`` under the namespace ``sparsek``; the CPU key runs
:mod:`sparsek_vllm.reference`, the CUDA key the compiled kernels. The functions here check their
arguments, allocate outputs that were not given, and count which path ran. They never fall back
from one implementation to another; path ``hopper`` has portable kernels for what docs/KERNELS.md
says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparsek_vllm import build, reference
from sparsek_vllm.core import kernels, stats
from sparsek_vllm.core.config import debug_enabled
from sparsek_vllm.core.paged_kv import DenseKV, PagedKV

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
INDEX_DTYPES = (torch.int32, torch.int64)
# What the CUDA kernels are compiled for.
CUDA_DTYPES = (torch.float16, torch.bfloat16)
CUDA_FP8 = torch.float8_e4m3fn

SCHEMAS = (
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor seq_lens, "
    "Tensor? block_table, Tensor? k_starts, Tensor? q_offsets, Tensor? spans, Tensor? bias, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, "
    "Tensor(c!)? workspace, bool hopper, bool batch_invariant, int min_seqlen_q, "
    "int max_seqlen_q, int max_seqlen_k, float scale, int window_left, int window_right, "
    "float softcap, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    "attention(Tensor q, Tensor k, Tensor v, Tensor(b!)? workspace, bool hopper, float scale, "
    "Tensor(a!) out) -> ()",
    "write_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale) -> ()",
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
    "Tensor(a!) out, Tensor(b!) lse) -> ()",
)

_REFERENCES = (
    reference.varlen_attention,
    reference.attention,
    reference.write_kv,
    reference.merge_states,
)


def define(namespace: str) -> torch.library.Library:
    """The op set in a namespace, without implementations; it lasts as long as what is returned."""
    library = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    for op in _REFERENCES:
        # All outputs are written in place, so that tracing has nothing to infer.
        name = f"{namespace}::{op.__name__}"
        torch.library.register_fake(name, lambda *args: None, lib=library)
    return library


_library = define("sparsek")
for _op in _REFERENCES:
    _library.impl(_op.__name__, _op, "CPU")


def has_cuda_kernel(head_dim: int, fp8: bool = False) -> bool:
    """Whether heads of that size have one, over 16-bit or fp8 keys: rows are copied 16 bytes at a
    time.
    """
    return 0 < head_dim <= max(build.HEAD_DIMS) and head_dim % (16 if fp8 else 8) == 0


def cuda_head_dims(fp8: bool = False) -> str:
    """Which those are, in words."""
    return f"a multiple of {16 if fp8 else 8} up to {max(build.HEAD_DIMS)}"


def varlen_attention(
    q: torch.Tensor,
    kv: PagedKV | DenseKV,
    cu_seqlens_q: torch.Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    q_offsets: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    batch_invariant: bool = False,
    min_seqlen_q: int = 0,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    check: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of packed queries over each request's own keys and values.

    Query row ``i`` of a request stands at key position ``q_offset + i``, by default
    ``q_offset = seq_len - query_len``: causal masks are aligned bottom-right, as in chunked
    prefill and decoding. It sees key ``j`` if ``-window[0] <= j - position <= window[1]``, where
    -1 stands for no limit and ``causal`` for ``window[1] = 0``.

    Args:
        q: ``[total_q, heads, head_dim]``, last dimension contiguous. On CUDA fp16 or bf16,
            head_dim a multiple of 8 up to 512 (of 16 beside fp8), and rows that begin at
            multiples of 16 bytes, as in k, v and out; on CPU fp32 and fp64 too, and any head_dim.
        kv: keys and values, like q or, in pages, fp8 (on CUDA e4m3); ``heads`` must be a multiple
            of their ``kv_heads``.
        cu_seqlens_q: ``[batch + 1]`` int32, prefix sums of the query lengths. Rows of ``q``
            past ``cu_seqlens_q[-1]`` (padding) count for nothing and are not written.
        causal: no row sees a key after its own position.
        window: keys that a row sees before and after its own position.
        scale: factor of the scores, by default ``1 / sqrt(head_dim)``.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``; on CUDA beyond
            10,000 that loses precision.
        sinks: ``[heads]``, a logit for each head that takes part in the softmax and adds
            nothing to the output (attention sinks, https://arxiv.org/abs/2309.17453, in the
            learned form of gpt-oss). It counts in the LSE.
        bias: ``[batch, heads, max_q, max_k]``, added to the scores after scale and softcap;
            any strides, so that broadcast dimensions can be expanded views.
        alibi_slopes: ``[heads]`` float32: by its head's slope times their distance from the row's
            position scores become less, after scale and softcap
            (https://arxiv.org/abs/2108.12409).
        q_offsets: ``[batch]`` int32, position of each request's first query row.
        spans: ``[total_q, 2]`` int32, contiguous: keys from the first position up to the second,
            exclusive, that a row sees whatever ``causal`` and ``window`` say, as the tokens of an
            image see each other. A span holds its row's own position, and with it a row sees keys
            that begin and end no earlier than those of the request's row before; where both are
            equal there is none. (Checked on CPU and in debug mode.)
        batch_invariant: a row's result is the same bits whatever other requests are in the
            batch, and whether its request's rows come at once or in several calls, if all calls
            have ``spans`` or none has. On CUDA only.
            Long keys are then not split among multiprocessors, so decoding takes longer.
        min_seqlen_q: no query length is shorter. Where the caller knows that all are long, the
            launch for short ones is saved. On CUDA it is believed: shorter ones may then be left
            unwritten (debug mode checks it).
        max_seqlen_q: longest query length. Not given, it is read from ``cu_seqlens_q``, which
            waits for the GPU.
        max_seqlen_k: largest of ``seq_lens``, likewise.
        out: like ``q``, to write the result into.
        lse: ``[heads, total_q]`` float32, to write the log-sum-exp into.
        return_lse: also return the natural log-sum-exp of the masked scores.
        check: False, where the caller knows that all of this holds, saves the host the time to see:
            wrong shapes may then read or write what they should not. Debug mode checks anyway.

    Returns:
        ``out``, or ``(out, lse)``. A row that sees no key gets output 0 and LSE -inf (the sink,
        if there is one).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, strides or value.
        ImportError: CUDA tensors, and no kernels are built.
    """
    check = check or debug_enabled()
    if check:
        _check_attention(q, kv, cu_seqlens_q, window, softcap)
    _, heads, head_dim = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    scale = check_scale(scale, head_dim)
    left, right = window
    if causal:
        right = 0
    if max_seqlen_q is None:
        max_seqlen_q = int(cu_seqlens_q.diff().max()) if batch else 0
    if max_seqlen_k is None:
        max_seqlen_k = int(kv.seq_lens.max()) if batch else 0
    if out is None:
        out = torch.empty_like(q)
    if lse is None and return_lse:
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(heads, q.shape[0], dtype=wide, device=q.device)
    paged = kv if isinstance(kv, PagedKV) else None
    if check:
        _check_same("out", out, "q", q)
        _check_last_stride("out", out)
        _check_options(q, batch, lse, sinks, alibi_slopes, q_offsets, spans)
        if bias is not None:
            _check_bias(q, batch, bias, max_seqlen_q, max_seqlen_k)
        if not q.is_cuda or _checks(q):
            if spans is not None:
                _check_spans(spans, cu_seqlens_q, kv.seq_lens, q_offsets)
            if min_seqlen_q > 0 and batch:
                _check_shortest(cu_seqlens_q, min_seqlen_q)
        if paged is not None and _checks(q):
            _check_block_table(paged, cu_seqlens_q, q_offsets, left if spans is None else -1)
    served = kernels.serving(q.device, head_dim)
    arguments = (
        q,
        kv.k,
        kv.v,
        cu_seqlens_q,
        kv.seq_lens,
        paged.block_table if paged else None,
        kv.starts,
        q_offsets,
        spans,
        bias,
        alibi_slopes,
        sinks,
        paged.k_scale if paged else None,
        paged.v_scale if paged else None,
        kernels.workspace(q.device),
        served.hopper,
        batch_invariant,
        min_seqlen_q,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        left,
        right,
        softcap,
        out,
        lse,
    )
    try:
        served.ops.varlen_attention.default(*arguments)
    except RuntimeError:
        # The kernels have refused before any launch; this says it in the words of our arguments,
        # and would cost each call as much as the launch.
        if q.is_cuda:
            _check_cuda_attention(q, kv, cu_seqlens_q, q_offsets, spans, out)
        raise
    stats.record("varlen_attention", served.path, q.shape[0])
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention without a mask, for every batch entry and head by itself.

    Little is checked: :func:`sparsek_vllm.attention_forward` has done that.

    Args:
        q: ``[B, H, S, D]``, a dtype and a head size as in :func:`varlen_attention`.
        k: like q.
        v: like q.
        scale: factor of the scores.

    Returns:
        Like q. Tensors that are neither contiguous nor a transposition of ``[B, S, H, D]`` are
        copied first.
    """
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()) and not all(
        t.transpose(1, 2).is_contiguous() for t in (q, k, v)
    ):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    served = kernels.serving(q.device, q.shape[3])
    out = torch.empty_like(q)
    space = kernels.workspace(q.device)
    try:
        served.ops.attention.default(q, k, v, space, served.hopper, scale, out)
    except RuntimeError:
        if q.is_cuda:
            for name, tensor in (("q", q), ("k", k), ("v", v)):
                _check_aligned(name, tensor)
        raise
    stats.record("attention", served.path, q.shape[0] * q.shape[2])
    return out


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    check: bool = True,
) -> None:
    """Write new keys and values into a paged cache.

    Token ``t`` goes to slot ``slot_mapping[t] = block * block_size + position in block``; slots
    of -1 are skipped. Rows of ``key`` past the length of ``slot_mapping`` are padding. An fp8
    cache takes ``key / k_scale``, saturated.

    Args:
        key: ``[tokens, kv_heads, head_dim]``.
        value: like ``key``.
        k_cache: ``[num_blocks, block_size, kv_heads, head_dim]``, any strides with the last
            dimension contiguous.
        v_cache: like ``k_cache``.
        slot_mapping: ``[<= tokens]``, int64 or int32.
        k_scale: optional float32 tensor with 1 or ``kv_heads`` elements.
        v_scale: likewise.
        check: as in :func:`varlen_attention`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or strides.
        ImportError: CUDA tensors, and no kernels are built.
    """
    if check or debug_enabled():
        _check_write_kv(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    served = kernels.serving(key.device)
    served.ops.write_kv.default(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    stats.record("write_kv", _elsewhere(served.path), slot_mapping.shape[0])


def _check_write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    _check("key", key, None, FLOAT_DTYPES, key.device)
    _check_same("value", value, "key", key)
    _check("k_cache", k_cache, None, (*FLOAT_DTYPES, *FP8_DTYPES), key.device)
    _check_same("v_cache", v_cache, "k_cache", k_cache)
    if key.ndim != 3:
        raise ValueError(f"key must have shape [tokens, kv_heads, head_dim], got {list(key.shape)}")
    if k_cache.ndim != 4 or k_cache.shape[2:] != key.shape[1:] or k_cache.shape[1] == 0:
        raise ValueError(
            f"k_cache must have shape [num_blocks, block_size, kv_heads={key.shape[1]}, "
            f"head_dim={key.shape[2]}], got {list(k_cache.shape)}"
        )
    for name, tensor in (
        ("key", key),
        ("value", value),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
    ):
        _check_last_stride(name, tensor)
    _check_scales(k_scale, v_scale, key.shape[1], key.device)
    if slot_mapping.ndim != 1 or slot_mapping.dtype not in INDEX_DTYPES:
        raise ValueError(
            "slot_mapping must be one-dimensional, int64 or int32, "
            f"got {list(slot_mapping.shape)} {slot_mapping.dtype}"
        )
    _check("slot_mapping", slot_mapping, None, None, key.device)
    if slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(
            f"slot_mapping must have at most one slot for each of the {key.shape[0]} rows of key, "
            f"got {slot_mapping.shape[0]}"
        )
    if slot_mapping.numel() and _checks(key):
        slots = k_cache.shape[0] * k_cache.shape[1]
        if int(slot_mapping.max()) >= slots:
            raise ValueError(
                f"slot_mapping must be below the {slots} slots of the cache, "
                f"got {int(slot_mapping.max())}"
            )
    if key.is_cuda:
        _check("key", key, None, CUDA_DTYPES, key.device)
        _check("k_cache", k_cache, None, (key.dtype, CUDA_FP8), key.device)
        if k_cache.dtype == key.dtype:
            _check_no_scales(k_scale, v_scale, "k_cache")


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Source: the rescaling of online softmax, https://arxiv.org/abs/1805.02867.

    Args:
        out_a: ``[tokens, heads, head_dim]``.
        lse_a: ``[heads, tokens]`` float32; -inf where a row saw no key.
        out_b: like ``out_a``.
        lse_b: like ``lse_a``.
        out: like ``out_a``, to write the result into; it may be ``out_a`` or ``out_b``.

    Returns:
        ``(out, lse)``, with 0 and -inf where neither part saw a key.

    Raises:
        ValueError: shapes, dtypes or devices differ.
        ImportError: CUDA tensors, and no kernels are built.
    """
    _check_same("out_b", out_b, "out_a", out_a)
    _check_same("lse_b", lse_b, "lse_a", lse_a)
    if out_a.ndim != 3:
        raise ValueError(
            f"out_a must have shape [tokens, heads, head_dim], got {list(out_a.shape)}"
        )
    _check("out_a", out_a, None, FLOAT_DTYPES, out_a.device)
    wide = torch.promote_types(out_a.dtype, torch.float32)
    _check("lse_a", lse_a, (out_a.shape[1], out_a.shape[0]), (wide,), out_a.device)
    served = kernels.serving(out_a.device)
    if out is None:
        out = torch.empty_like(out_a)
    _check_same("out", out, "out_a", out_a)
    lse = torch.empty_like(lse_a)
    served.ops.merge_states.default(out_a, lse_a, out_b, lse_b, out, lse)
    stats.record("merge_states", _elsewhere(served.path), out_a.shape[0])
    return out, lse


def _elsewhere(path: str) -> str:
    """Of what attention alone has, Hopper's own kernels, the path of the other ops."""
    return "portable" if path == "hopper" else path


def _checks(tensor: torch.Tensor) -> bool:
    """Whether to check what waits for the GPU: in debug mode, but not in a graph's capture."""
    return debug_enabled() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_scale(scale: float | None, head_dim: int) -> float:
    """``scale``, or its default; ValueError where it is not a positive finite number."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive finite number, got {scale}")
    return float(scale)


def _check_attention(
    q: torch.Tensor,
    kv: PagedKV | DenseKV,
    cu_seqlens_q: torch.Tensor,
    window: tuple[int, int],
    softcap: float,
) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must have shape [total_q, heads, head_dim], got {list(q.shape)}")
    _, heads, head_dim = q.shape
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be one of {_names(FLOAT_DTYPES)}, got {q.dtype}")
    paged = isinstance(kv, PagedKV)
    k = kv.k
    layout = (
        "[num_blocks, block_size, kv_heads, head_dim]" if paged else "[total_k, kv_heads, head_dim]"
    )
    if heads == 0 or head_dim == 0:
        raise ValueError(
            f"q must have at least one head and a head_dim of at least 1, got {list(q.shape)}"
        )
    if k.ndim != (4 if paged else 3) or k.shape[-1] != head_dim or (paged and k.shape[1] == 0):
        raise ValueError(
            f"k must have shape {layout} with head_dim {head_dim}, got {list(k.shape)}"
        )
    _check_same("v", kv.v, "k", k)
    if k.dtype != q.dtype and not (paged and k.dtype in FP8_DTYPES):
        allowed = _names((q.dtype, *FP8_DTYPES)) if paged else str(q.dtype)
        raise ValueError(f"k must be {allowed}, as q is {q.dtype}, got {k.dtype}")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(
            f"heads of q must be a multiple of kv_heads, got {heads} and {k.shape[-2]}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", kv.v)):
        _check_last_stride(name, tensor)
    if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens_q must have shape [batch + 1], got {list(cu_seqlens_q.shape)}"
        )
    batch = cu_seqlens_q.shape[0] - 1
    if isinstance(kv, PagedKV):
        table = kv.block_table
        if table.ndim != 2 or table.shape[0] != batch:
            raise ValueError(
                f"block_table must have shape [batch={batch}, max_blocks], got {list(table.shape)}"
            )
        where = ("block_table", table)
        _check("starts", kv.starts, (batch,), INDEX_DTYPES, q.device)
        _check_scales(kv.k_scale, kv.v_scale, k.shape[-2], q.device)
    else:
        _check("starts", kv.starts, (batch,), None, q.device)
        where = ("starts", kv.starts)
    _check("seq_lens", kv.seq_lens, (batch,), None, q.device)
    indices = (("cu_seqlens_q", cu_seqlens_q), ("seq_lens", kv.seq_lens), where)
    for name, tensor in (*indices, ("k", k)):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
    for name, tensor in indices:
        if tensor.dtype not in INDEX_DTYPES:
            raise ValueError(f"{name} must be int32 (or int64 on CPU), got {tensor.dtype}")
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or any(type(side) is not int or side < -1 for side in window)
    ):
        raise ValueError(
            f"window must be (left, right), each -1 for no limit or at least 0, got {window}"
        )
    if not (isinstance(softcap, (int, float)) and math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be 0 (off) or a positive finite number, got {softcap}")


def _check_options(
    q: torch.Tensor,
    batch: int,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    q_offsets: torch.Tensor | None,
    spans: torch.Tensor | None,
) -> None:
    tokens, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    _check("lse", lse, (heads, tokens), (wide,), q.device)
    _check("sinks", sinks, (heads,), FLOAT_DTYPES, q.device)
    _check("alibi_slopes", alibi_slopes, (heads,), (torch.float32,), q.device)
    if alibi_slopes is not None:
        _check_last_stride("alibi_slopes", alibi_slopes)
    _check("q_offsets", q_offsets, (batch,), INDEX_DTYPES, q.device)
    _check("spans", spans, (tokens, 2), (torch.int32,), q.device)
    if spans is not None and not spans.is_contiguous():
        raise ValueError(f"spans must be contiguous, got strides {list(spans.stride())}")


def _check_bias(q: torch.Tensor, batch: int, bias: torch.Tensor, rows: int, keys: int) -> None:
    heads = q.shape[1]
    _check("bias", bias, None, FLOAT_DTYPES, q.device)
    if (
        bias.ndim != 4
        or bias.shape[:2] != (batch, heads)
        or bias.shape[2] < rows
        or bias.shape[3] < keys
    ):
        raise ValueError(
            f"bias must have shape [batch={batch}, heads={heads}, max_q>={rows}, "
            f"max_k>={keys}], got {list(bias.shape)}"
        )


def _check_shortest(cu_seqlens_q: torch.Tensor, min_seqlen_q: int) -> None:
    shortest = int(cu_seqlens_q.diff().min())
    if shortest < min_seqlen_q:
        raise ValueError(
            f"min_seqlen_q must be at most the shortest query length, {shortest}, "
            f"got {min_seqlen_q}"
        )


def _check_cuda_attention(
    q: torch.Tensor,
    kv: PagedKV | DenseKV,
    cu_seqlens_q: torch.Tensor,
    q_offsets: torch.Tensor | None,
    spans: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """What the kernels ask for beyond the definition of the op."""
    _check("q", q, None, CUDA_DTYPES, q.device)
    fp8 = kv.k.dtype == CUDA_FP8
    if not has_cuda_kernel(q.shape[2], fp8):
        raise ValueError(f"head_dim must be {cuda_head_dims(fp8)} on CUDA, got {q.shape[2]}")
    # Packed keys and values have q's dtype by now.
    _check("k", kv.k, None, (q.dtype, CUDA_FP8), q.device)
    if isinstance(kv, PagedKV) and kv.k.dtype == q.dtype:
        _check_no_scales(kv.k_scale, kv.v_scale, "k")
    if isinstance(kv, PagedKV) and kv.block_size % 16:
        raise ValueError(f"block_size of k must be a multiple of 16 on CUDA, got {kv.block_size}")
    for name, index in (
        ("cu_seqlens_q", cu_seqlens_q),
        ("seq_lens", kv.seq_lens),
        ("q_offsets", q_offsets),
        ("starts", kv.starts),
        ("block_table", kv.block_table if isinstance(kv, PagedKV) else None),
    ):
        _check(name, index, None, (torch.int32,), q.device)
        if index is not None:
            _check_last_stride(name, index)
    for name, tensor in (("q", q), ("k", kv.k), ("v", kv.v), ("out", out)):
        _check_aligned(name, tensor)
    if spans is not None and spans.data_ptr() % 8:
        raise ValueError(
            f"spans must begin at a multiple of 8 bytes on CUDA, got address {spans.data_ptr():#x}"
        )


def _check_aligned(name: str, tensor: torch.Tensor) -> None:
    strides = [n for size, n in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    elements = 16 // tensor.itemsize
    if tensor.data_ptr() % 16 or any(n % elements for n in strides[:-1]):
        raise ValueError(
            f"{name} must begin at a multiple of 16 bytes on CUDA, with strides that are "
            f"multiples of {elements} elements, got address {tensor.data_ptr():#x} and strides "
            f"{list(tensor.stride())}"
        )


def _check_same(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        have, want = getattr(tensor, what), getattr(like, what)
        if have != want:
            raise ValueError(
                f"{name} must have the {what} of {like_name}, {_plain(want)}, got {_plain(have)}"
            )


def _check(
    name: str,
    tensor: torch.Tensor | None,
    shape: Sequence[int] | None,
    dtypes: Sequence[torch.dtype] | None,
    device: torch.device,
) -> None:
    """An optional tensor's shape, dtype and device; None in their place allows any."""
    if tensor is None:
        return
    if shape is not None and tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {_names(dtypes)}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _check_scales(
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, heads: int, device: torch.device
) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if scale.numel() not in (1, heads):
            raise ValueError(
                f"{name} must have 1 or kv_heads={heads} elements, got {scale.numel()}"
            )
        if sum(n > 1 for n in scale.shape) > 1:
            raise ValueError(f"{name} must have one dimension, got {list(scale.shape)}")
        _check(name, scale, None, (torch.float32,), device)
        if _checks(scale) and not bool((scale > 0).all()):
            raise ValueError(f"{name} must be positive, got {scale.min().item()}")


def _check_no_scales(k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, what: str) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            raise ValueError(f"{name} must be None on CUDA where {what} is no fp8, got {scale}")


def _check_last_stride(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {list(tensor.stride())}"
        )


def _check_spans(
    spans: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    q_offsets: torch.Tensor | None,
) -> None:
    """That each holds its row, and what rows see begins and ends no earlier from one to the next,
    whatever the mask: the kernels rely on that.
    """
    lengths = cu_seqlens_q.diff()
    offsets = seq_lens - lengths if q_offsets is None else q_offsets
    rows = torch.arange(int(cu_seqlens_q[-1]), device=spans.device)
    request = torch.repeat_interleave(lengths.long())
    position = rows - cu_seqlens_q[request] + offsets[request]
    begin, end = spans[: len(rows)].unbind(1)
    wrong = (begin != end) & ((begin > position) | (end <= position) | (begin < 0))
    # A mask lets a row see its own position at least.
    none = begin == end
    begin = torch.where(none, position, torch.minimum(begin, position))
    end = torch.where(none, position + 1, torch.maximum(end, position + 1))
    earlier = (begin[1:] < begin[:-1]) | (end[1:] < end[:-1])
    wrong[1:] |= (request[1:] == request[:-1]) & earlier
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            "spans must hold their rows' own positions, and what a row sees begin and end no "
            f"earlier than what the row before it sees, got {spans[row].tolist()} for row {row} "
            f"at position {int(position[row])}"
        )


def _check_block_table(
    kv: PagedKV, cu_seqlens_q: torch.Tensor, q_offsets: torch.Tensor | None, left: int
) -> None:
    """Debug mode: every page that a request may read exists."""
    lengths = kv.seq_lens.long()
    if not lengths.numel():
        return
    starts = torch.zeros_like(lengths) if kv.starts is None else kv.starts.long()
    width = kv.block_table.shape[1]
    pages = -(-(starts + lengths) // kv.block_size)
    if int(pages.max()) > width:
        raise ValueError(
            f"seq_lens must fit the {width} blocks of block_table, got {int(lengths.max())}"
        )
    first = starts
    if left >= 0:
        offsets = lengths - cu_seqlens_q.diff() if q_offsets is None else q_offsets
        first = starts + (offsets - left).clamp(min=0)
    first = first // kv.block_size
    page = torch.arange(width, device=lengths.device)
    ids = kv.block_table[(page >= first.unsqueeze(-1)) & (page < pages.unsqueeze(-1))]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= kv.k.shape[0]):
        raise ValueError(
            f"block_table must hold block ids from 0 to {kv.k.shape[0] - 1}, "
            f"got {int(ids.min())} to {int(ids.max())}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, torch.Size) else value
