"""The kernels over a matrix of shapes against float64, on a GPU or emulated.

The property tests of the op set run on the kernels too; here are the shapes that they are too
small for.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from batches import Batch
from target import DEVICE, HOPPER

from sparsek_vllm import build
from sparsek_vllm.core import (
    DenseKV,
    PagedKV,
    kernels,
    varlen_attention,
    write_kv,
)

pytestmark = pytest.mark.on_kernels

ON_GPU = DEVICE.type == "cuda"
# The host takes a thousand times as long: there each value comes once, not in every combination.
KINDS = [(torch.float16, 64), (torch.bfloat16, 128)]
PAGES = [(16, "hnd"), (48, "nhd"), (128, "hnd")]
if ON_GPU:
    PAGES = [(block, layout) for block in (16, 32, 48, 64, 128) for layout in ("nhd", "hnd")]
KINDS += [(torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256)] if ON_GPU else []
LONG_KINDS = KINDS + [(torch.float16, 256)] * (ON_GPU or HOPPER)
HEAD_DIMS = build.HOPPER_HEAD_DIMS if ON_GPU else (64, 128)


FP8 = pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])


@FP8
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16] if ON_GPU else [1, 3, 4, 8, 16])
def test_groups(group: int, head_dim: int, fp8: bool) -> None:
    """Every GQA ratio, in one mixed batch: decodes, a few tokens, prefill, chunked prefill."""
    longest = 5000 if ON_GPU else 1500
    lengths = [(1, 1), (1, 777), (0, 9), (3, 200), (1, 0), (130, 130), (70, 600), (5, longest)]
    Batch(lengths, 2, group, head_dim, seed=group, fp8=fp8).check()


EDGES = [n for edge in (16, 64, 80, 128, *[192] * ON_GPU) for n in (edge - 1, edge, edge + 1)]


@FP8
@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
@pytest.mark.parametrize(("block", "layout"), PAGES)
def test_pages_and_borders(
    block: int, layout: str, dtype: torch.dtype, head_dim: int, fp8: bool
) -> None:
    """Lengths around every border of a tile and a page, for queries and for keys."""
    near = [n for n in (block - 1, block, block + 1) if n > 0]
    lengths = [(rows, max(rows, keys)) for rows in (1, 2, *EDGES) for keys in (*EDGES, *near)]
    Batch(lengths, 1, 2, head_dim, dtype, block, layout, fp8=fp8).check()


OPTIONS = [
    {"causal": False},
    {"window": (0, -1)},
    {"window": (17, -1)},
    {"window": (100, 30), "causal": False},
    {"window": (-1, 5), "causal": False},
    {"softcap": 20.0},
    {"sinks": True},
    {"sinks": True, "softcap": 5.0, "window": (63, -1)},
]


def workspace_parts() -> tuple[torch.Tensor, int]:
    """Where blocks leave their parts of results, and how many blocks there are."""
    space = kernels.workspace(DEVICE)
    blocks = space.numel() // (kernels.WORKSPACE_COUNTERS + kernels.WORKSPACE_FLOATS)
    return space[-blocks * kernels.WORKSPACE_FLOATS :], blocks


@FP8
@pytest.mark.parametrize(("dtype", "head_dim"), LONG_KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": (2900, -1)}, {"causal": False}, {"sinks": True}, {"softcap": 3.0}],
    ids=str,
)
def test_few_queries_on_long_keys(
    options: dict, dtype: torch.dtype, head_dim: int, fp8: bool
) -> None:
    """Fewer tiles of queries than multiprocessors, or a few more: several share a tile's keys."""
    parts, blocks = workspace_parts()
    batches = [  # and KV heads and heads of each
        ([(100, 3300)], 1, 1),
        ([(60, 4200)], blocks + 2, 1),
        ([(42, 4200), (33, 100), (1, 700)], 1, 3),
    ]
    if ON_GPU:
        batches = [
            ([(700, 20_000)], 2, 1),
            ([(2100, 30_000)], 2, 1),
            ([(60, 4200)], blocks + 8, 1),
            ([(300, 9000), (200, 200), (1, 7000)], 2, 3),
        ]
    for lengths, heads, group in batches:
        parts.fill_(torch.nan)
        if "sinks" in options:
            options = {"sinks": torch.randn(heads * group, device=DEVICE)}
        Batch(lengths, heads, group, head_dim, dtype, 48, "hnd", fp8=fp8).check(**options)
        # Were they shared? The portable prefill, which has more than 64 rows, leaves no parts.
        own = HOPPER and not (fp8 and "softcap" in options)
        if len(lengths) == 1 and (own or lengths[0][0] > 64):
            assert parts.isnan().all() != own


@FP8
@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_request_alone(head_dim: int, fp8: bool) -> None:
    """Its keys are split among as many blocks as have any, which meet in a cluster if they are few,
    and among fewer where many rows are to be added up."""
    for group in (1, 3, 8):
        for keys in (1, 64, 65, 200, 511, 600, *(ON_GPU * (2047, 2049, 4100, 9000))):
            Batch([(1, keys)], 2, group, head_dim, fp8=fp8).check()
    for rows, group in ((3, 2), (2, 16), (4, 16)):
        Batch([(rows, 1500)], 1, group, head_dim, fp8=fp8).check()
    Batch([(2, 700)], 1, 8, head_dim, fp8=fp8).check(softcap=3.0, window=(300, -1))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_last_tiles_split_by_rows(head_dim: int, group: int) -> None:
    """A few more tiles than multiprocessors, and keys too short for pieces."""
    heads, requests = (8, 4) if ON_GPU else (2, 1)
    rows = (1216 if ON_GPU else 700) // group
    Batch([(rows, rows + 30)] * requests, heads, group, head_dim).check()


@pytest.mark.parametrize("requests", [30, 31, 700])
def test_many_requests(requests: int) -> None:
    """With two more as many as a warp counts by itself, one more, more than a block has threads."""
    lengths = [(n % 3, n * 7 % 41 + n % 3) for n in range(requests)]
    Batch([*lengths, (70, 90), (1, 700)], 1, 2, 64).check()


@FP8
@pytest.mark.parametrize("head_dim", [64, 128, *[256] * (ON_GPU or HOPPER)])
def test_decodes_beside_prompts(head_dim: int, fp8: bool) -> None:
    """Few rows of every number that decode tells apart; prompts of several weights beside them."""
    few = [(1, 1500), (2, 1024), (3, 900), (5, 1100), (8, 700)]
    weights = [[], [(33, 33)], [(20, 40), (300, 1300)], [(1000, 3000)] * 3]
    for prompts in weights if ON_GPU else weights[:3]:
        repeats = 12 if ON_GPU else 1
        Batch([*few * repeats, *prompts, (1, 1200)], 2, 4, head_dim, fp8=fp8).check()
    Batch([(17, 1100), (16, 300), (9, 1024), (20, 90)], 2, 1, head_dim, fp8=fp8).check()


@pytest.mark.skipif(not HOPPER, reason="Hopper's kernels alone")
def test_parts_tell_who_had_a_share() -> None:
    """Decode and prefill, which run at once, leave their parts apart; beside a heavy prompt a third
    of decode's blocks has a share.
    """
    parts, blocks = workspace_parts()
    keys = 20_000 if ON_GPU else 1200

    def used(lengths: list[tuple[int, int]], group: int, rows: int) -> tuple[bool, int]:
        """Whether prefill left parts, and how many blocks of a decode of so many rows did."""
        parts.fill_(torch.nan)
        Batch(lengths, 1, group, 128).run()
        of_decode = parts[-blocks * kernels.DECODE_FLOATS :]
        of_prefill = parts[: -blocks * kernels.DECODE_FLOATS]
        own = of_decode[: blocks * 2 * rows * (128 + 2)].view(blocks, -1)
        return not of_prefill.isnan().all(), int((~own.isnan().all(1)).sum())

    prefill_did, decode_blocks = used([(1, keys), (1, keys)], 4, 8)
    assert not prefill_did and decode_blocks > blocks // 3 + 1
    assert used([(700, 20_000) if ON_GPU else (100, 3300)], 1, 8) == (True, 0)
    prompt = (4000, 8000) if ON_GPU else (300, 1300)
    assert used([(1, keys), prompt], 4, 32)[1] == blocks // 3 + 1


@FP8
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_behind_the_last_count_for_nothing(head_dim: int, fp8: bool) -> None:
    """Queries are copied with their neighbours and with padding: the bits do not tell."""
    batch = Batch([(5, 600), (70, 700)], 1, 4, head_dim, fp8=fp8)
    rows = len(batch.q)

    def run(padding: float) -> torch.Tensor:
        q = torch.cat([batch.q, torch.full_like(batch.q, padding)])
        q[:5] *= 1 + abs(padding)  # another request's
        return varlen_attention(q, batch.kv, batch.cu_seqlens_q, max_seqlen_q=70, max_seqlen_k=700)[
            5:rows
        ]

    expected = run(0.0)
    assert torch.equal(run(1e4), expected) and torch.equal(run(torch.nan), expected)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_many_heads_of_a_key_head(head_dim: int, group: int) -> None:
    """A box of queries has up to 64 heads."""
    Batch([(7, 300), (3, 100)], 1, group, head_dim).check()


@pytest.mark.parametrize("dimension", [0, 1])
def test_queries_that_are_one(dimension: int) -> None:
    """With a stride of 0 queries are no box."""
    batch = Batch([(70, 300)], 1, 4, 64)
    index = [slice(None)] * 3
    index[dimension] = slice(0, 1)
    batch.q = batch.q[tuple(index)].expand_as(batch.q)
    batch.check()


# Beside those that the rest is about; most are shorter than those that kernels are compiled for.
if ON_GPU:
    OTHER_HEAD_DIMS = [8, 32, 40, 72, 80, 96, 112, 120, 160, 192, 200, 224, 256, 400, 512]
else:
    OTHER_HEAD_DIMS = [40, 48, 72, 80, 200, 224, 256] if HOPPER else [24, 32, 72, 80, 200, 256, 400]
    OTHER_HEAD_DIMS += [] if HOPPER else [512]


@pytest.mark.parametrize(
    ("head_dim", "fp8"),
    [(size, fp8) for size in OTHER_HEAD_DIMS for fp8 in (False, True) if not (fp8 and size % 16)],
)
@pytest.mark.parametrize("options", [{}, {"window": (100, 30), "causal": False}, {"softcap": 20.0}])
def test_other_head_dims(options: dict, head_dim: int, fp8: bool) -> None:
    lengths = [(1, 777), (0, 9), (4, 200), (1, 0), (130, 130), (70, 600), (5, 1500)]
    for dtype in (torch.float16, torch.bfloat16):
        Batch(lengths, 2, 4, head_dim, dtype, 48, "hnd", fp8=fp8).check(**options)


@FP8
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict, head_dim: int, fp8: bool) -> None:
    lengths = [(1, 300), (4, 4), (200, 300), (1, 3000), (64, 2000), (2, 1)]
    batch = Batch(lengths, 2, 4, head_dim, fp8=fp8)
    if options.get("sinks"):
        options = options | {"sinks": torch.randn(8, device=DEVICE).bfloat16()}
    batch.check(**options)


def test_random_batches() -> None:
    """Shapes, batch sizes and options at random, up to 512 requests."""
    for seed in range(60 if ON_GPU else 12):
        pick = random.Random(seed)
        kind = pick.choice(["decode", "speculative", "prefill", "mixed"])
        lengths = []
        for _ in range(pick.choice([1, 2, 3, 17, 70, 512] if ON_GPU else [1, 2, 3, 9])):
            rows = {
                "decode": 1,
                "speculative": pick.randint(1, 8),
                "prefill": pick.randint(1, 200),
                "mixed": pick.choice([0, 1, 1, 1, pick.randint(2, 40), pick.randint(41, 300)]),
            }[kind]
            keys = rows + pick.choice([0, 0, pick.randint(0, 100), pick.randint(0, 1500)])
            lengths.append((rows, pick.choice([keys] * 9 + [0, keys // 2])))
        batch = Batch(
            lengths,
            pick.choice([1, 2, 3, 8]) if len(lengths) < 100 else 1,
            pick.choice([1, 2, 3, 4, 5, 6, 7, 8, 16]),
            pick.choice([64, 128, 64, 128, *(n for n in OTHER_HEAD_DIMS if n % 16 == 0)]),
            pick.choice([torch.float16, torch.bfloat16]),
            pick.choice([16, 32, 48, 64, 128]),
            pick.choice(["nhd", "hnd"]),
            seed,
            fp8=pick.random() < 0.4,
        )
        batch.check(
            causal=pick.random() < 0.8,
            window=pick.choice([(-1, -1), (-1, -1), (pick.randint(0, 200), -1), (9, 40)]),
            softcap=pick.choice([0.0, 0.0, 30.0]),
        )


def test_padding_behind_one_request() -> None:
    """As many rows as the longest request may have, most of them padding."""
    batch = Batch([(10, 40)], 1, 1, 64, torch.float16)
    q = torch.cat([batch.q, torch.full_like(batch.q, torch.nan).repeat(6, 1, 1)])[:64]
    for kv in (batch.kv, batch.dense()):
        out = torch.full_like(q, torch.nan)
        varlen_attention(q, kv, batch.cu_seqlens_q, max_seqlen_q=64, max_seqlen_k=40, out=out)
        torch.testing.assert_close(out[:10].double(), batch.expected()[0], rtol=4e-3, atol=4e-3)
        assert out[10:].isnan().all()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("size", [1e5, 1e6, "lowest"])
def test_huge_biases(size: float | str, rows: int) -> None:
    """Parts of a row that are added up agree on its maximum, however large it is."""
    torch.manual_seed(0)
    keys = 700
    q, k, v = (torch.randn(n, 1, 64, device=DEVICE).half() for n in (rows, keys, keys))
    bias = torch.rand(1, 1, rows, keys, device=DEVICE)
    if size == "lowest":
        bias.fill_(torch.finfo(torch.float32).min)
    else:
        bias += size
    lengths = torch.tensor([rows, keys], dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, rows], dtype=torch.int32, device=DEVICE)
    out, lse = varlen_attention(
        q, DenseKV(k, v, bounds[:1], lengths[1:]), bounds, causal=False, bias=bias,
        max_seqlen_q=rows, max_seqlen_k=keys, return_lse=True,
    )  # fmt: skip
    # In float32 where the kernels round too: the sum of a score and its bias.
    scores = (q[:, 0].double() @ k[:, 0].double().T / 8).float() + bias[0, 0]
    weights = scores.double().softmax(-1)
    torch.testing.assert_close(out[:, 0].double(), weights @ v[:, 0].double(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse[0].double(), scores.double().logsumexp(-1), rtol=1e-6, atol=1e-3)


def test_slots_of_no_stride_are_refused() -> None:
    batch = Batch([(1, 20)], 1, 1, 64)
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE).expand(20)
    with pytest.raises(RuntimeError, match="slot_mapping must be contiguous"):
        write_kv(batch.k[0], batch.v[0], batch.kv.k, batch.kv.v, slots)


@FP8
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("first", "last"), [(0.01, 4), (4, 0.01), (60, 0.1), (-60, -50)], ids=str)
def test_maxima_that_grow(first: float, last: float, head_dim: int, fp8: bool) -> None:
    """From tile to tile, by far more than what the kernels let pass without looking for maxima: up
    to weights that would be infinite. And all scores far below 0."""
    lengths = [(1, 500), (40, 500), (300, 500), (64, 127), (128, 255), (200, 200)]
    # Over fp8 keys Hopper's prefill rounds queries of fp16.
    batch = Batch(lengths, 2, 2, head_dim, torch.bfloat16 if fp8 else torch.float16, fp8=fp8)
    batch.q = batch.q.abs()
    if fp8:  # which ends at 448
        batch.kv = dataclasses.replace(batch.kv, k_scale=torch.ones(2, device=DEVICE))
    for b, k in enumerate(batch.k):
        size = torch.linspace(first, last, len(k), device=DEVICE)[:, None, None]
        batch.k[b] = (k.abs() * size).to(batch.dtype)
    batch.v = [v.to(batch.dtype) for v in batch.v]
    batch.write()
    # Scores are in the hundreds: what tensor cores lose of them over fp8 is much in a power of e.
    batch.check(tolerance=0.5 if fp8 and ON_GPU and HOPPER and max(abs(first), last) > 4 else None)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_key_that_outweighs_all(dtype: torch.dtype, head_dim: int) -> None:
    """The first token's, as in many models; it is the last that tiles come to."""
    batch = Batch([(300, 700), (70, 2000), (1, 600)], 2, 2, head_dim, dtype)
    batch.q[:, ::2] = batch.q[:, ::2].abs()
    for k in batch.k:
        k[0] = 8 * k[0].abs()
    batch.write()
    batch.check()


@pytest.mark.parametrize("keys", [62, 63, 64, 65, 127, 128, 129])
def test_last_tile_without_a_causal_mask(keys: int) -> None:
    Batch([(20, keys), (1, keys)], 1, 2, 64).check(causal=False)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
def test_bf16_queries_beside_fp8_keys(size: float, rows: int) -> None:
    """Products take fp16: queries beyond its range, and far below it, count all the same."""
    batch = Batch([(rows, 300)], 2, 2, 64, fp8=True)
    batch.q = (batch.q.double() * size).bfloat16()
    batch.kv = dataclasses.replace(batch.kv, k_scale=torch.full((2,), 1 / size, device=DEVICE))
    stored = batch.kv.k.double()[batch.kv.block_table[0, :19].long()].flatten(0, 1)[:300]
    batch.k = [stored / torch.tensor(size).double()]
    batch.check()


@pytest.mark.parametrize("rows", [1, 40])
def test_zero_queries_and_small_scales(rows: int) -> None:
    """The scale of scores may vanish: all keys then weigh the same, those beyond a mask nothing."""
    batch = Batch([(rows, 300)], 2, 2, 64, fp8=True)
    batch.q.zero_()
    batch.kv = dataclasses.replace(batch.kv, k_scale=torch.full((2,), 1e-6, device=DEVICE))
    batch.check()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_of_one_head_stays_there(value: float, rows: int) -> None:
    batch = Batch([(rows, 300)], 2, 4, 64, fp8=True)
    expected, _ = batch.expected()
    batch.q[:, 1, 5] = value
    out, _ = batch.run()
    others = [0, *range(2, 8)]
    torch.testing.assert_close(out[:, others].double(), expected[:, others], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("head_dim", "fp8", "options"),
    [
        (64, False, {}),
        (128, False, {"window": (200, -1)}),
        (128, True, {}),
        (64, False, {"softcap": 5.0, "window": (77, -1)}),
        (80, False, {"window": (100, -1)}),
        (256, True, {}),
        (256, False, {}),
    ],
    ids=str,
)
def test_batch_invariance(head_dim: int, fp8: bool, options: dict) -> None:
    """A request alone, in chunks and token by token: the bits that it has beside others."""
    lengths = [(150, 700), (1, 500), (333, 333), (7, 260), (30, 2500)]
    batch = Batch(lengths, 2, 4, head_dim, fp8=fp8)
    # Maxima that grow along the keys, at their own pace for each row.
    batch.k = [(k * torch.linspace(0.2, 3, len(k), device=DEVICE)[:, None, None]).to(k.dtype)
               for k in batch.k]  # fmt: skip
    if not fp8:
        batch.write()

    def check(kv: PagedKV | DenseKV, *pieces: tuple[int, int, int]) -> None:
        """Rows begin to end of some requests, in one call."""
        rows = [slice(batch.bounds[b] + begin, batch.bounds[b] + end) for b, begin, end in pieces]
        which = torch.tensor([b for b, _, _ in pieces], device=DEVICE)
        where = "starts" if isinstance(kv, DenseKV) else "block_table"
        seen = [lengths[b][1] - lengths[b][0] + end for b, _, end in pieces]
        bounds = torch.tensor([0, *(end - begin for _, begin, end in pieces)]).cumsum(0)
        out, lse = varlen_attention(
            torch.cat([batch.q[r] for r in rows]),
            dataclasses.replace(
                kv,
                seq_lens=torch.tensor(seen, dtype=torch.int32, device=DEVICE),
                **{where: getattr(kv, where)[which]},
            ),
            bounds.int().to(DEVICE),
            batch_invariant=True,
            return_lse=True,
            **options,
        )
        assert torch.equal(out, torch.cat([expected[r] for r in rows]))
        assert torch.equal(lse, torch.cat([expected_lse[:, r] for r in rows], 1))

    for kv in (batch.kv, *([] if fp8 else [batch.dense()])):
        expected, expected_lse = batch.run(kv, batch_invariant=True, **options)
        assert not expected.isnan().any()
        for b, (rows, _) in enumerate(lengths):
            check(kv, (b, 0, rows))
        check(kv, (3, 0, 7), (0, 0, 61))
        check(kv, (2, 100, 233), (0, 61, 150), (1, 0, 1))
        for row in (0, 90, 149):
            check(kv, (0, row, row + 1))
            check(kv, (1, 0, 1), (2, 2 * row, 2 * row + 3), (0, row, row + 1))


def image_spans(lengths: list[tuple[int, int]], images: list[list[tuple[int, int]]]) -> list:
    """Of each row: the image that its position lies in, or none."""
    spans = []
    for (rows, keys), own in zip(lengths, images, strict=True):
        for position in range(keys - rows, keys):
            spans.append(next(((a, b) for a, b in own if a <= position < b), (0, 0)))
    return spans


@FP8
@pytest.mark.parametrize("head_dim", [64, 128, *[256] * (ON_GPU or HOPPER)])
@pytest.mark.parametrize(
    "options", [{}, {"window": (60, -1)}, {"window": (60, 0), "softcap": 20.0}], ids=str
)
def test_images_see_each_other(options: dict, head_dim: int, fp8: bool) -> None:
    """In a prompt, in a chunk whose prefix cuts through one, in few rows, at the very end; beside
    requests that have none.
    """
    lengths = [(300, 300), (150, 420), (3, 700), (1, 90), (0, 9), (97, 97), (1, 0)]
    images = [[(10, 90), (100, 250)], [(200, 330), (330, 420)], [(640, 700)], [], [], [(0, 97)], []]
    if ON_GPU:
        lengths.append((900, 6000))
        images.append([(100, 200), (5000, 5600)])
    spans = torch.tensor(image_spans(lengths, images), dtype=torch.int32, device=DEVICE)
    batch = Batch(lengths, 2, 4, head_dim, fp8=fp8)
    batch.check(**options, spans=spans)
    if options == {"window": (60, -1)}:  # no further back than it, as in Gemma 4
        positions = [range(keys - rows, keys) for rows, keys in lengths]
        own = torch.tensor([i for those in positions for i in those], device=DEVICE)
        spans[:, 0] = torch.where(spans[:, 1] > 0, own, 0)
        batch.check(**options, spans=spans)


@FP8
@pytest.mark.parametrize("options", [{}, {"window": (700, -1)}, {"causal": False}], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_few_rows_on_long_keys(head_dim: int, options: dict, fp8: bool) -> None:
    """Where prefill's tiles would not fill the GPU, decode's parts do."""
    rows, heads = (100, 4) if ON_GPU else (12, 1)
    Batch([(rows, 3000)], heads, 4, head_dim, fp8=fp8).check(**options)
