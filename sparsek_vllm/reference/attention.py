"""Attention of packed queries over packed or paged keys and values, in plain torch.

One request at a time: its keys and values are gathered, then attended to by torch's own CPU
flash kernel where that can express the request, else by the definition, written out. Scores,
softmax and sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sparsek_vllm.reference.cache import dequantize

# Query rows handled at once where scores are materialised.
_TILE_ROWS = 256


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    k_starts: torch.Tensor | None,
    q_offsets: torch.Tensor | None,
    spans: torch.Tensor | None,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    workspace: torch.Tensor | None,
    hopper: bool,
    batch_invariant: bool,
    min_seqlen_q: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """See :func:`sparsek_vllm.core.ops.varlen_attention`."""
    if batch_invariant:
        raise ValueError(
            "batch_invariant must be False on CPU: only the CUDA kernels are, got True"
        )
    q_rows = cu_seqlens_q.tolist()
    lengths = seq_lens.tolist()
    starts = k_starts.tolist() if k_starts is not None else None
    offsets = q_offsets.tolist() if q_offsets is not None else None
    for b, length in enumerate(lengths):
        first, last = q_rows[b], q_rows[b + 1]
        rows = last - first
        if rows == 0:
            continue
        offset = offsets[b] if offsets is not None else length - rows
        left, right = window_left, window_right
        bias_b = None if bias is None else bias[b, :, :rows, :length]
        if alibi_slopes is not None:
            distance = torch.arange(length) - torch.arange(offset, offset + rows).unsqueeze(-1)
            alibi = alibi_slopes.view(-1, 1, 1) * -distance.abs()
            bias_b = alibi if bias_b is None else bias_b + alibi
        if spans is not None and bool((spans[first:last, 0] < spans[first:last, 1]).any()):
            # All that such a request's rows do not see becomes a bias.
            seen = _seen_with_spans(spans[first:last], length, offset, left, right)
            hidden = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
            bias_b = hidden.expand(q.shape[1], -1, -1) if bias_b is None else bias_b + hidden
            left = right = -1
        # Keys that at least one row sees, and rows that see at least one key.
        begin = max(0, offset - left) if left >= 0 else 0
        end = min(length, offset + rows + right) if right >= 0 else length
        top = max(0, -(offset + right)) if right >= 0 else 0
        bottom = min(rows, length - offset + left) if left >= 0 else rows
        out_b = out[first:last]
        lse_b = lse[:, first:last] if lse is not None else None
        if begin >= end or top >= bottom:
            top = bottom = 0
        if bottom - top < rows:
            _fill_masked_rows(out_b, lse_b, sinks, top, bottom)
        if top == bottom:
            continue
        start = starts[b] if starts is not None else 0
        if block_table is not None:
            k_b, v_b = _gather(k, v, block_table[b], start + begin, start + end)
        else:
            k_b = k[start + begin : start + end].transpose(0, 1)
            v_b = v[start + begin : start + end].transpose(0, 1)
        k_b = _dequantize_heads(k_b, q.dtype, k_scale)
        v_b = _dequantize_heads(v_b, q.dtype, v_scale)
        bias_b = None if bias_b is None else bias_b[:, top:bottom, begin:end]
        # torch's kernel has no softcap, and would round a wider bias to the dtype of q.
        exact = softcap > 0 or (bias_b is not None and bias_b.dtype != q.dtype)
        attend = _attend_by_definition if exact else _attend_flash
        o, row_lse = attend(
            q[first + top : first + bottom].transpose(0, 1),
            k_b,
            v_b,
            offset + top - begin,
            left,
            right,
            bias_b,
            scale,
            softcap,
        )
        if bias_b is not None:
            # A row that bias and window mask entirely has no defined softmax.
            masked = bias_b == -torch.inf
            visible = _visible(bottom - top, end - begin, offset + top - begin, left, right)
            dead = (masked if visible is None else masked | ~visible).all(-1)
            row_lse = row_lse.masked_fill(dead, -torch.inf)
            o = o.masked_fill(dead.unsqueeze(-1), 0)
        if sinks is not None:
            with_sink = torch.logaddexp(row_lse, sinks.to(row_lse.dtype).unsqueeze(-1))
            share = (row_lse - with_sink).exp().masked_fill(row_lse == -torch.inf, 0)
            o = o.to(row_lse.dtype) * share.unsqueeze(-1)
            row_lse = with_sink
        out_b[top:bottom] = o.transpose(0, 1)
        if lse_b is not None:
            lse_b[:, top:bottom] = row_lse


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    workspace: torch.Tensor | None,
    hopper: bool,
    scale: float,
    out: torch.Tensor,
) -> None:
    """See :func:`sparsek_vllm.core.ops.attention`."""
    for q_b, k_b, v_b, out_b in zip(q, k, v, out, strict=True):
        result, _ = _attend_flash(q_b, k_b, v_b, 0, -1, -1, None, scale, 0.0)
        out_b.copy_(result)


def _fill_masked_rows(
    out: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor | None, top: int, bottom: int
) -> None:
    """Rows outside ``[top, bottom)`` see no key: output 0, LSE -inf or the sink alone."""
    for empty in (slice(0, top), slice(bottom, out.shape[0])):
        out[empty] = 0
        if lse is not None:
            lse[:, empty] = -torch.inf if sinks is None else sinks.to(lse.dtype).unsqueeze(-1)


def _gather(
    k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[begin, end)`` of one request as ``[kv_heads, tokens, head_dim]``."""
    block_size, head_dim = k.shape[1], k.shape[3]
    first = begin // block_size
    pages = blocks[first : -(-end // block_size)].long()
    inside = slice(begin - first * block_size, end - first * block_size)
    both = _side_by_side(k, v)
    if both is not None:
        k_and_v = _take_pages(both, pages)[:, inside]
        return k_and_v[..., :head_dim], k_and_v[..., head_dim:]
    return _take_pages(k, pages)[:, inside], _take_pages(v, pages)[:, inside]


def _side_by_side(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """K and V as one view, where V follows K in the last dimension of one tensor."""
    adjacent = (
        k.stride() == v.stride()
        and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        and v.storage_offset() == k.storage_offset() + k.shape[3]
    )
    if not adjacent:
        return None
    return k.as_strided((*k.shape[:3], 2 * k.shape[3]), k.stride())


def _take_pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Pages of a cache ``[blocks, block, kv_heads, C]`` as ``[kv_heads, tokens, C]``."""
    # Neither way of indexing knows fp8: move bytes.
    raw = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
    if raw[0].is_contiguous():
        # Whole pages are copied, and their tokens lie one after the other.
        tokens = raw.index_select(0, pages).flatten(0, 1).transpose(0, 1)
    else:
        tokens = raw.permute(2, 0, 1, 3)[:, pages].flatten(1, 2)
    return tokens.view(cache.dtype)


def _dequantize_heads(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> torch.Tensor:
    if scale is None and x.dtype == dtype:
        return x
    return dequantize(x.transpose(0, 1), dtype, scale).transpose(0, 1)


@lru_cache(maxsize=8)  # every layer of a model asks for the same few
def _visible(rows: int, keys: int, offset: int, left: int, right: int) -> torch.Tensor | None:
    """``[rows, keys]``, True where row ``i`` sees key ``j``; None where all see all."""
    sees_first = left < 0 or rows - 1 + offset - left <= 0
    sees_last = right < 0 or offset + right >= keys - 1
    if sees_first and sees_last:
        return None
    distance = torch.arange(keys) - torch.arange(offset, offset + rows).unsqueeze(-1)
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def _seen_with_spans(
    spans: torch.Tensor, keys: int, offset: int, left: int, right: int
) -> torch.Tensor:
    """``[rows, keys]``, True where row ``i`` sees key ``j``."""
    key = torch.arange(keys)
    within = (key >= spans[:, :1]) & (key < spans[:, 1:])
    visible = _visible(len(spans), keys, offset, left, right)
    return torch.ones_like(within) if visible is None else within | visible


@lru_cache(maxsize=8)
def _additive(
    rows: int, keys: int, offset: int, left: int, right: int, dtype: torch.dtype
) -> torch.Tensor | None:
    visible = _visible(rows, keys, offset, left, right)
    if visible is None:
        return None
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _attend_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offset: int,
    left: int,
    right: int,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through torch's CPU flash kernel: q ``[heads, rows, D]``, k and v ``[kv_heads, keys, D]``."""
    heads, rows, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    group = heads // kv_heads
    causal = bias is None and left < 0 and right == 0 and offset == 0 and rows > 1
    mask = None if causal else _additive(rows, keys, offset, left, right, q.dtype)
    if bias is not None:
        mask = bias if mask is None else bias + mask
        mask = mask.reshape(kv_heads, group, rows, keys)
    if rows == 1 and mask is None:
        # Queries of a group as the rows of one head.
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.reshape(1, kv_heads, group, head_dim), k.unsqueeze(0), v.unsqueeze(0), scale=scale
        )
        return o.reshape(heads, 1, head_dim), lse.reshape(heads, 1)
    # K/V heads as the batch, their group as heads of stride 0: nothing is copied.
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unflatten(0, (kv_heads, group)),
        k.unsqueeze(1).expand(-1, group, -1, -1),
        v.unsqueeze(1).expand(-1, group, -1, -1),
        is_causal=causal,
        attn_mask=mask,
        scale=scale,
    )
    return o.reshape(heads, rows, head_dim), lse.reshape(heads, rows)


def _attend_by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offset: int,
    left: int,
    right: int,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores materialised, a tile of rows at a time; takes and returns what _attend_flash does."""
    heads, rows, _ = q.shape
    kv_heads, keys, _ = k.shape
    group = heads // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    k_wide = k.to(wide).unsqueeze(1)
    v_wide = v.to(wide).unsqueeze(1)
    out = torch.empty_like(q)
    lse = torch.empty(heads, rows, dtype=wide)
    for top in range(0, rows, _TILE_ROWS):
        tile = slice(top, min(rows, top + _TILE_ROWS))
        q_tile = q[:, tile].to(wide).unflatten(0, (kv_heads, group))
        scores = (q_tile @ k_wide.mT) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores += bias[:, tile].to(wide).unflatten(0, (kv_heads, group))
        visible = _visible(tile.stop - top, keys, offset + top, left, right)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        # softmax, not exp(score - lse): a large LSE is rounded, and the sum would not be 1.
        weights = scores.softmax(-1)
        out[:, tile] = (weights @ v_wide).flatten(0, 1).to(q.dtype)
        lse[:, tile] = scores.logsumexp(-1).flatten(0, 1)
    return out, lse
