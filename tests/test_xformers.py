"""The xFormers backend, against what each bias materialises, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import target
import torch
from wheels import wheel_sources
from xformers.ops import fmha
from xformers.ops.common import OPERATORS_REGISTRY
from xformers.ops.fmha import attn_bias as ab
from xformers_env import packages_without, run_python

from sparsek_vllm.backends import xformers as ours
from sparsek_vllm.backends.xformers import (
    BIASES,
    MemoryEfficientAttentionSparseKOp,
    SparseKAttention,
    SparseKFwOp,
)
from sparsek_vllm.core import path_counts, reset_path_counts

DEVICE = target.DEVICE
HEADS, HEAD_DIM, PAGE = (2, 64, 16) if target.KERNELS else (2, 16, 4)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)[target.KERNELS :]  # the kernels take no float32

on_kernels = pytest.mark.on_kernels

triangle = ab.LowerTriangularMask
bottom_right = ab.LowerTriangularFromBottomRightMask
local = ab.LocalAttentionFromBottomRightMask


def dense(batch: int, rows: int, keys: int) -> torch.Tensor:
    return torch.randn(batch, HEADS, rows, keys).to(DEVICE)


# Over a batch of equal lengths: from (batch, rows, keys, window).
DENSE: dict[type, Callable[[int, int, int, int], Any]] = {
    ab.LowerTriangularMask: lambda b, q, k, w: triangle(),
    ab.LowerTriangularMaskWithTensorBias: lambda b, q, k, w: triangle().add_bias(dense(b, q, k)),
    ab.LowerTriangularFromBottomRightMask: lambda b, q, k, w: bottom_right(),
    ab.LowerTriangularFromBottomRightLocalAttentionMask: lambda b, q, k, w: (
        bottom_right().make_local_attention(w)
    ),
    ab.LocalAttentionFromBottomRightMask: lambda b, q, k, w: local(w, w // 2),
    type(None): lambda b, q, k, w: None,
    torch.Tensor: lambda b, q, k, w: dense(b, q, k),
}
# Packed keys: from the mask without causality, and the window.
PACKED: dict[type, Callable[[Any, int], Any]] = {
    ab.BlockDiagonalMask: lambda mask, w: mask,
    ab.BlockDiagonalCausalMask: lambda mask, w: mask.make_causal(),
    ab.BlockDiagonalCausalLocalAttentionMask: lambda mask, w: mask.make_local_attention(w),
    ab.BlockDiagonalCausalFromBottomRightMask: lambda mask, w: mask.make_causal_from_bottomright(),
    ab.BlockDiagonalCausalLocalAttentionFromBottomRightMask: lambda mask, w: (
        mask.make_local_attention_from_bottomright(w)
    ),
}
# Padded keys: the windows that the class takes.
PADDED: dict[type, Callable[[int], tuple[int, ...]]] = {
    ab.BlockDiagonalPaddedKeysMask: lambda w: (),
    ab.BlockDiagonalCausalWithOffsetPaddedKeysMask: lambda w: (),
    ab.BlockDiagonalLocalAttentionPaddedKeysMask: lambda w: (w, w // 2),
    ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask: lambda w: (w,),
}
GAPPY: tuple[Any, ...] = (
    ab.BlockDiagonalGappyKeysMask,
    ab.BlockDiagonalCausalWithOffsetGappyKeysMask,
)
PAGED_PADDED: tuple[Any, ...] = (
    ab.PagedBlockDiagonalPaddedKeysMask,
    ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
)
PAGED_GAPPY: tuple[Any, ...] = (
    ab.PagedBlockDiagonalGappyKeysMask,
    ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
)

SHAPES = [(2, 7, 7), (1, 1, 13), (3, 5, 9), (2, 9, 4), (2, 1, 1), (1, 20, 37)]  # batch, rows, keys
LENGTHS = [  # of queries, of keys
    ([3, 1, 6], [3, 1, 6]),
    ([1, 1, 1], [5, 1, 12]),
    ([4, 1, 7, 2], [9, 1, 7, 20]),
    ([1], [1]),
    ([2, 0, 3], [4, 5, 3]),
]
for _lengths in random.Random(1), random.Random(2):
    _q = [_lengths.randint(1, 12) for _ in range(4)]
    LENGTHS.append((_q, [rows + _lengths.randint(0, 12) for rows in _q]))
# Where xFormers does not refuse them: more queries than keys, and a block without keys.
STARVED = [([5, 2], [3, 6]), ([2, 1], [0, 3])]


def physical(bias: Any, rows: int, keys: int, batch: int = 1) -> torch.Tensor:
    """The mask ``[batch, HEADS, rows, keys]`` over K as it lies in memory."""
    if bias is None:
        return torch.zeros(batch, HEADS, rows, keys, device=DEVICE)
    if isinstance(bias, torch.Tensor):
        return bias.expand(batch, HEADS, rows, keys)
    logical = keys
    if isinstance(bias, (*PAGED_PADDED, *PAGED_GAPPY)):
        logical = bias.block_tables.numel() * bias.page_size
    mask = bias.materialize((batch, HEADS, rows, logical), device=DEVICE)
    return torch.nn.functional.pad(mask, (0, keys - mask.shape[-1]), value=-torch.inf)


def in_pages(key_ends: list[int]) -> tuple[torch.Tensor, int]:
    """A block table over shuffled pages, and the number of pages in memory."""
    width = max(1, -(-max(key_ends) // PAGE)) + 1
    count = width * len(key_ends)
    pages = random.sample(range(count + 3), count)
    table = torch.tensor(pages, dtype=torch.int32, device=DEVICE)
    return table.view(len(key_ends), width), count + 3


def build(kind: Any, q: list[int], k: list[int], window: int) -> tuple[Any, int, torch.Tensor]:
    """A block-diagonal bias, the rows that K has in memory, and the materialised mask."""
    rows = sum(q)
    if kind in PACKED:
        keys, bias = sum(k), PACKED[kind](ab.BlockDiagonalMask.from_seqlens(q, k), window)
    elif kind in PADDED:
        padding, windows = max(k) + 2, PADDED[kind](window)
        keys = padding * len(k)
        make = kind.from_seqlens_local if windows else kind.from_seqlens
        bias = make(q, padding, k, *windows)
    elif kind in GAPPY:
        gaps = [random.randrange(3) for _ in k]
        starts = list(accumulate((a + b for a, b in zip(k, gaps, strict=True)), initial=2))
        keys, bias = starts[-1], kind.from_seqlens(q, starts, k)
    elif kind in PAGED_PADDED:
        table, count = in_pages(k)
        keys, bias = count * PAGE, kind.from_seqlens(q, k, table, PAGE)
    else:
        # The class's own from_seqlens refuses what it documents: build it as make_paged does.
        unit = random.choice((1, 2, PAGE))
        skipped = [unit * random.randrange(2 * PAGE // unit) for _ in k]
        table, count = in_pages([a + b for a, b in zip(k, skipped, strict=True)])
        padding = 16 * PAGE
        starts = [i * padding + first for i, first in enumerate(skipped)]
        gappy = ab.BlockDiagonalGappyKeysMask.from_seqlens(q, [*starts, padding * len(k)], k)
        keys = count * PAGE
        bias = gappy.to(DEVICE).make_paged(table, PAGE, padding, kind)
    bias = bias.to(DEVICE)
    mask = physical(bias, rows, keys)
    if kind in (*PAGED_PADDED, *PAGED_GAPPY):  # what lies past the last page is garbage
        for row, end in zip(bias.block_tables, bias.k_seqinfo.seqlen_py, strict=True):
            row[-(-end // PAGE) :] = 10**6
    return bias, keys, mask


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition, in float64: out and LSE; rows that see nothing get 0 and -inf."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * scale + mask.double()
    lse = scores.logsumexp(-1)
    return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2), lse


def check(bias: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> None:
    """Operator, LSE and module agree with the definition, unseen keys being NaN."""
    out, lse = attend(q, k, v, mask, scale := HEAD_DIM**-0.5)
    seen = (mask > -torch.inf).any(2).transpose(1, 2).unsqueeze(-1)
    k, v = (x.masked_fill(~seen, torch.nan) for x in (k, v))
    reset_path_counts()
    got = [
        fmha.memory_efficient_attention(q, k, v, bias, op=MemoryEfficientAttentionSparseKOp),
        SparseKAttention()(q, k, v, bias, scale=scale),
    ]
    with_lse, got_lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, bias, op=SparseKFwOp
    )
    calls = {"calls": 3, "tokens": 3 * q.shape[0] * q.shape[1]}
    assert path_counts() == {f"varlen_attention:{target.PATH}": calls}
    tolerance = TOLERANCE[q.dtype]
    for each in (*got, with_lse):
        assert each.dtype == q.dtype
        torch.testing.assert_close(each.double(), out, rtol=tolerance, atol=tolerance)
    assert got_lse.dtype == torch.float32
    # torch's CPU kernel takes a coarser exp for half types.
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-4
    torch.testing.assert_close(got_lse.double(), lse, rtol=tolerance, atol=tolerance)


def qkv(batch: int, rows: int, keys: int, dtype: torch.dtype = DTYPES[0]) -> Any:
    sizes = (rows, keys, keys)
    return [torch.randn(batch, size, HEADS, HEAD_DIM).to(dtype).to(DEVICE) for size in sizes]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)


def test_every_bias_of_xformers_is_covered() -> None:
    found = {
        kind
        for name, kind in vars(ab).items()
        if isinstance(kind, type) and issubclass(kind, ab.AttentionBias) and name[0] != "_"
    } - {ab.AttentionBias}
    tested = {*DENSE, *PACKED, *PADDED, *GAPPY, *PAGED_PADDED, *PAGED_GAPPY}
    assert tested - {type(None), torch.Tensor} == found == set(BIASES)
    assert len(BIASES) == 20
    assert tested == set(SparseKFwOp.SUPPORTED_ATTN_BIAS_TYPES)


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_batch(kind: type, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for window in (1, 3, 30):
        bias = DENSE[kind](*shape, window)
        if isinstance(bias, torch.Tensor):
            bias = bias.to(dtype)
        elif isinstance(bias, ab.LowerTriangularMaskWithTensorBias):
            bias = ab.LowerTriangularMaskWithTensorBias(bias._bias.to(dtype))
        batch, rows, keys = shape
        check(bias, *qkv(*shape, dtype), physical(bias, rows, keys, batch))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [*PACKED, *PADDED, *GAPPY, *PAGED_PADDED, *PAGED_GAPPY],
    ids=lambda kind: kind.__name__,
)
def test_blocks(kind: type, lengths: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    for window in (1, 3, 30):
        bias, keys, mask = build(kind, *lengths, window)
        check(bias, *qkv(1, sum(lengths[0]), keys, dtype), mask)


@on_kernels
@pytest.mark.parametrize("lengths", STARVED, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        ab.BlockDiagonalMask,
        ab.BlockDiagonalCausalMask,
        *PADDED,
        *GAPPY,
        *PAGED_PADDED,
        *PAGED_GAPPY,
    ],
    ids=lambda kind: kind.__name__,
)
def test_rows_that_see_no_key(kind: type, lengths: tuple[list[int], list[int]]) -> None:
    bias, keys, mask = build(kind, *lengths, 2)
    check(bias, *qkv(1, sum(lengths[0]), keys), mask)


def test_paged_gappy_keys_are_views_of_whole_pages() -> None:
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    gappy = ab.BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [3, 32 + 8, 64], [7, 5])
    bias = gappy.make_paged(table, 8, 32, ab.PagedBlockDiagonalGappyKeysMask)
    q, k, v = qkv(1, 2, 48)
    kv, _ = ours._blocks(bias, q, k, v)
    assert kv.block_size == 8 and kv.k.data_ptr() == k.data_ptr() and kv.block_table is table
    assert kv.starts.tolist() == [3, 8] and kv.seq_lens.tolist() == [7, 5]


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bool_and_broadcast_tensors(dtype: torch.dtype) -> None:
    q, k, v = qkv(3, 5, 9, dtype)
    allowed = torch.rand(3, HEADS, 5, 9, device=DEVICE) < 0.6
    allowed[0, 0, 2] = False
    for chosen in (allowed, allowed[:1], allowed[:, :1], allowed[0, 0], allowed[0]):
        mask = torch.zeros(chosen.shape, device=DEVICE).masked_fill(~chosen, -torch.inf)
        out, _ = attend(q, k, v, mask, HEAD_DIM**-0.5)
        for bias in (chosen, mask.to(dtype)):
            got = SparseKAttention()(q, k, v, bias)
            torch.testing.assert_close(
                got.double(), out, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )


@pytest.mark.parametrize("scale", [0.05, 1, 2.5])
def test_scale(scale: float) -> None:
    q, k, v = qkv(2, 5, 9)
    out, _ = attend(q, k, v, torch.zeros(5, 9), scale)
    for got in (
        SparseKAttention()(q, k, v, scale=scale),
        fmha.memory_efficient_attention(q, k, v, scale=scale, op=(SparseKFwOp, None)),
    ):
        torch.testing.assert_close(got.double(), out, rtol=2e-6, atol=2e-6)


GROUPED: dict[str, tuple[Any, int, int]] = {  # bias, rows, keys
    "None": (None, 10, 14),
    "tensor": ("tensor", 10, 14),
    "LowerTriangularMask": (ab.LowerTriangularMask(), 10, 14),
    "LowerTriangularMaskWithTensorBias": ("triangular", 10, 14),
    "BlockDiagonalCausalMask": (
        ab.BlockDiagonalCausalMask.from_seqlens([4, 6], [5, 9], device=DEVICE),
        10,
        14,
    ),
    "Paged": (
        ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            [4, 6],
            [5, 7],
            torch.tensor([[3, 1], [0, 2]], dtype=torch.int32, device=DEVICE),
            PAGE,
            device=DEVICE,
        ),
        10,
        4 * PAGE,
    ),
}


@on_kernels
@pytest.mark.parametrize("expanded", ["heads", "groups", "both", "none"])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_heads(name: str, expanded: str) -> None:
    """[B, M, G, H, K] is the attention of each head with its own K and V."""
    bias, rows, keys = GROUPED[name]
    groups, heads = 3, 2
    k_groups = 1 if expanded in ("groups", "both") else groups
    k_heads = 1 if expanded in ("heads", "both") else heads
    batch = 1 if hasattr(bias, "q_seqinfo") else 2
    dtype = DTYPES[0]
    q = torch.randn(batch, rows, groups, heads, HEAD_DIM).to(DEVICE, dtype)
    k, v = (
        torch.randn(batch, keys, k_groups, k_heads, HEAD_DIM)
        .to(DEVICE, dtype)
        .expand(-1, -1, groups, heads, -1)
        for _ in "kv"
    )
    if isinstance(bias, str):
        values = torch.randn(batch, groups, heads, rows, keys).to(DEVICE, dtype)
        bias = values if bias == "tensor" else triangle().add_bias(values)
    # The definition, a head at a time.
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    if isinstance(bias, torch.Tensor):
        mask = bias.flatten(1, 2)
    elif isinstance(bias, ab.LowerTriangularMaskWithTensorBias):
        mask = bias.materialize((batch, groups, heads, rows, keys), device=DEVICE).flatten(1, 2)
    else:
        mask = physical(bias, rows, keys, batch)[:, :1]
    out, lse = attend(*flat, mask, HEAD_DIM**-0.5)
    reset_path_counts()
    got, got_lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, bias, op=SparseKFwOp
    )
    assert list(path_counts()) == [f"varlen_attention:{target.PATH}"]
    assert got_lse.shape == (batch, groups, heads, rows)
    read = {"heads": groups, "groups": groups * heads, "both": 1, "none": groups * heads}
    assert ours._distinct_heads(k, v)[0].shape[2] == read[expanded]
    torch.testing.assert_close(
        got.flatten(2, 3).double(), out, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    torch.testing.assert_close(got_lse.flatten(1, 2).double(), lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(SparseKAttention()(q, k, v, bias), got)
    if expanded == "heads":
        narrow = SparseKAttention()(q, k[:, :, :, :1], v[:, :, :, :1], bias)
        torch.testing.assert_close(narrow, got)
        if not isinstance(bias, torch.Tensor | ab.LowerTriangularMaskWithTensorBias):
            # The same without groups: fewer K/V heads, as other libraries write GQA.
            narrow = SparseKAttention()(flat[0], k[:, :, :, 0], v[:, :, :, 0], bias)
            torch.testing.assert_close(narrow, got.flatten(2, 3))


def test_inputs_without_heads() -> None:
    q, k, v = (x[:, :, 0] for x in qkv(2, 5, 9))
    mask = torch.randn(2, 5, 9)
    out, _ = attend(*(x.unsqueeze(2) for x in (q, k, v)), mask.unsqueeze(1), HEAD_DIM**-0.5)
    got = fmha.memory_efficient_attention(q, k, v, mask, op=(SparseKFwOp, None))
    torch.testing.assert_close(got.double(), out.squeeze(2), rtol=2e-6, atol=2e-6)


def test_partial_attention_merges() -> None:
    q, k, v = qkv(2, 5, 9)
    parts = [
        fmha.memory_efficient_attention_partial(q, k[:, s], v[:, s], op=SparseKFwOp)
        for s in (slice(0, 4), slice(4, 9))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (part - lse).exp().mT.unsqueeze(-1) for o, part in parts)
    torch.testing.assert_close(merged, SparseKAttention()(q, k, v), rtol=2e-6, atol=2e-6)


LAYOUTS: dict[str, tuple[Callable[[], list[torch.Tensor]], bool]] = {  # of K and V; viewed?
    "contiguous": (lambda: [torch.randn(3, 8, 4, 16) for _ in "kv"], True),
    "heads first": (lambda: [torch.randn(3, 4, 8, 16).transpose(1, 2) for _ in "kv"], True),
    "packed with q": (lambda: list(torch.randn(3, 8, 3, 4, 16).unbind(2)[1:]), True),
    "slice of a cache": (lambda: [torch.randn(5, 20, 4, 16)[1:4, 6:14] for _ in "kv"], True),
    "shared prefix": (lambda: [torch.randn(1, 8, 4, 16).expand(3, -1, -1, -1) for _ in "kv"], True),
    "one entry": (lambda: [torch.randn(8, 1, 4, 16).transpose(0, 1) for _ in "kv"], True),
    "one key": (lambda: [torch.randn(3, 9, 4, 16)[:, 4:5] for _ in "kv"], True),
    "different for v": (
        lambda: [torch.randn(3, 8, 4, 16), torch.randn(3, 9, 4, 16)[:, 1:]],
        False,
    ),
    "keys first": (lambda: [torch.randn(8, 3, 4, 16).transpose(0, 1) for _ in "kv"], False),
    "no keys": (lambda: [torch.randn(3, 0, 4, 16) for _ in "kv"], True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    make, viewed = LAYOUTS[layout]
    k, v = make()
    q = torch.randn(k.shape[0], 6, 4, 16)
    kv = ours._batch_rows(k, v)
    same = [
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in ((kv.k, k), (kv.v, v))
    ]
    assert all(same) or not viewed
    out, _ = attend(q, k, v, torch.zeros(6, k.shape[1]), 0.25)
    for queries in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        got = SparseKAttention()(queries, k, v)
        torch.testing.assert_close(got.double(), out, rtol=2e-6, atol=2e-6)


class Striped(ab.LowerTriangularMask):
    """A user's own bias: what it masks is unknown."""


NAMES = ", ".join(sorted(kind.__name__ for kind in BIASES))
SUPPORTED = f"the bias must be None, a torch.Tensor or one of {NAMES}, got "
Q, K = torch.zeros(2, 5, HEADS, HEAD_DIM), torch.zeros(2, 9, HEADS, HEAD_DIM)
BLOCKS = ab.BlockDiagonalMask.from_seqlens([2, 3], [4, 5], device=DEVICE)
PAGES = ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
    [2, 3], [4, 4], torch.zeros(2, 1, dtype=torch.int32), PAGE, device=DEVICE
)
ONLY = ": forward takes q, k, v, att_mask and scale"
ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: SparseKAttention()(Q, K, K, Striped()), SUPPORTED + "Striped"),
    (lambda: SparseKAttention()(Q, K, K, "causal"), SUPPORTED + "str"),
    (
        lambda: SparseKAttention()(Q, K, K, p=0.1),
        "SparseKAttention does not support dropout, got p=0.1",
    ),
    (
        lambda: SparseKAttention(dropout=0.5),
        "SparseKAttention does not support dropout, got dropout=0.5",
    ),
    (lambda: SparseKAttention(0.0, True), "SparseKAttention does not support argument 2" + ONLY),
    (lambda: SparseKAttention(causal=True), "SparseKAttention does not support causal" + ONLY),
    (
        lambda: SparseKAttention()(Q, K, K, is_causal=True),
        "SparseKAttention does not support is_causal" + ONLY,
    ),
    (
        lambda: SparseKAttention()(Q, K, K, scale=-1.0),
        "scale must be a positive finite number, got -1.0",
    ),
    (
        lambda: SparseKAttention()(Q, K, K, torch.zeros(5, 8)),
        "a tensor bias must broadcast to [2, 2, 5, 9], got [5, 8]",
    ),
    (
        lambda: SparseKAttention()(Q[0], K[0], K[0]),
        "q must have shape [B, S, H, D] or [B, S, G, H, D], got [5, 2, 16]",
    ),
    (
        lambda: SparseKAttention()(Q, K[:1], K[:1]),
        "k must have the batch size, groups and head dimension of q, [2, 5, 2, 16], "
        "got [1, 9, 2, 16]",
    ),
    (
        lambda: SparseKAttention()(Q.unsqueeze(2), K.unsqueeze(3), K.unsqueeze(3)),
        "k must have the batch size, groups and head dimension of q, [2, 5, 1, 2, 16], "
        "got [2, 9, 2, 1, 16]",
    ),
    (
        lambda: SparseKAttention()(Q, K, K[..., :8]),
        "v must have the shape of k, [2, 9, 2, 16], got [2, 9, 2, 8]",
    ),
    (
        lambda: SparseKAttention()(Q, K, K, BLOCKS),
        "q, k and v must have batch size 1 with BlockDiagonalMask, got 2",
    ),
    (
        lambda: SparseKAttention()(Q[:1, :4], K[:1], K[:1], BLOCKS),
        "q must have the 5 rows of the BlockDiagonalMask, got 4",
    ),
    (
        lambda: SparseKAttention()(Q[:1], K[:1, :8], K[:1, :8], BLOCKS),
        "k must have the 9 rows of the BlockDiagonalMask, got 8",
    ),
    (
        lambda: SparseKAttention()(Q[:1], K[:1], K[:1], PAGES),
        "k must have whole pages of 4 rows, got 9 rows",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(call: Callable[[], Any], message: str) -> None:
    reset_path_counts()
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
    assert path_counts() == {}


REASONS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: fmha.Inputs(Q, K, K, attn_bias=Striped()),
        f"attn_bias type is {Striped}",
    ),
    (lambda: fmha.Inputs(Q, K, K, p=0.1), "dropout > 0.0"),
    (lambda: fmha.Inputs(Q, K, K, output_dtype=torch.half), "Custom output dtype not supported"),
    (lambda: fmha.Inputs(Q, K, K[..., :8]), "query.shape[-1] != value.shape[-1]"),
    (
        lambda: fmha.Inputs(Q.to("meta"), K.to("meta"), K.to("meta")),
        "device=meta (supported: ['cpu', 'cuda'])",
    ),
    (
        lambda: fmha.Inputs(Q, K, K.to(torch.int32)),
        "value.dtype=torch.int32 (supported: ['torch.bfloat16', 'torch.float16', 'torch.float32'])",
    ),
]


@pytest.mark.parametrize(("make", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_operator_says_what_it_does_not_support(make: Callable[[], Any], reason: str) -> None:
    assert SparseKFwOp.not_supported_reasons(make()) == [reason]


def test_operator_is_registered_and_raises_through_xformers() -> None:
    assert SparseKFwOp in OPERATORS_REGISTRY
    assert SparseKFwOp.is_available()
    with pytest.raises(ValueError, match=r"`sparsekF` is not supported because:\n +dropout > 0.0"):
        fmha.memory_efficient_attention(Q, K, K, p=0.1, op=(SparseKFwOp, None))


def test_backward_is_refused() -> None:
    q, k, v = qkv(1, 3, 3)
    q.requires_grad_()
    out = SparseKAttention()(q, k, v)
    with pytest.raises(NotImplementedError, match=r"^SparseKAttention has no backward pass: "):
        out.sum().backward()
    with pytest.raises(NotImplementedError, match="memory_efficient_attention_backward"):
        fmha.memory_efficient_attention(q, k, v, op=MemoryEfficientAttentionSparseKOp)


def test_module_is_a_torch_module_without_parameters() -> None:
    module = SparseKAttention(dropout=0.0, name="sparsek")
    assert isinstance(module, torch.nn.Module)
    assert not module.state_dict()


def test_old_base_class() -> None:
    """On the Python files of xFormers 0.0.33.post2, which still has components."""
    code = """
import torch, xformers
from xformers.components.attention import Attention, AttentionConfig
from xformers.ops import fmha
from sparsek_vllm.backends.xformers import MemoryEfficientAttentionSparseKOp, SparseKAttention
from sparsek_vllm.core import path_counts

assert "0.0.33" in xformers.__file__, xformers.__file__
assert issubclass(SparseKAttention, Attention)
module = SparseKAttention.from_config(AttentionConfig(name="sparsek", dropout=0.0))
q, k, v = (torch.randn(2, 7, 4, 16) for _ in "qkv")
bias = fmha.attn_bias.LowerTriangularMask()
want = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
).transpose(1, 2)
torch.testing.assert_close(module(q, k, v, bias), want)
op = MemoryEfficientAttentionSparseKOp
torch.testing.assert_close(fmha.memory_efficient_attention(q, k, v, bias, op=op), want)
print(path_counts())
"""
    out = run_python(code, wheel_sources("xformers", "0.0.33.post2"))
    assert out.strip() == "{'varlen_attention:reference': {'calls': 2, 'tokens': 28}}"


def test_import_without_xformers(tmp_path: Any) -> None:
    code = """
try:
    import sparsek_vllm.backends.xformers
except ImportError as error:
    print(error)
"""
    out = run_python(code, packages_without(tmp_path, "xformers", "mslk"), isolated=True)
    install = "pip install 'xformers>=0.0.33.post2,<=0.0.35'"
    assert out == f"sparsek_vllm.backends.xformers needs xFormers: {install}\n"
