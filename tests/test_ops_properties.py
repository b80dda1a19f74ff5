"""The op set against the float64 oracle, over random shapes, layouts and options.

What no row may see holds NaN: unused cache slots, gaps between requests, padding rows, keys
before every row's window. Block table entries for such pages are ids that do not exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import oracle
import pytest
import target
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsek_vllm.core import (
    DenseKV,
    PagedKV,
    kernels,
    merge_states,
    path_counts,
    reset_path_counts,
    varlen_attention,
    write_kv,
)
from sparsek_vllm.core.ops import attention

pytestmark = pytest.mark.on_kernels

# What the kernels are compiled for, and everything that the reference takes.
FLOATS = (torch.float16, torch.bfloat16) + (() if target.KERNELS else (torch.float32,))
WIDEST = torch.float16 if target.KERNELS else torch.float32
HEAD_DIMS = (64, 128, 64, 128, 80, 256, 32)
FP8 = (torch.float8_e4m3fn,) + (() if target.KERNELS else (torch.float8_e5m2,))
PAGE_SIZES = (16, 32, 48, 64, 128, 256) if target.KERNELS else (1, 2, 16, 17, 32, 64, 128, 256)
LAYOUTS = ("nhd", "hnd", "padded", "odd_ones", "packed_nhd", "packed_hnd", "two_plane")
OUT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# The LSE is float32 whatever the inputs are: these are sums of exact products.
LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
GARBAGE = (2**30, -7)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small shapes gain nothing by threads, and spin for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


cpu_only = pytest.mark.skipif(target.KERNELS, reason="of the CPU reference only")


def examples(count: int) -> settings:
    return settings(
        deadline=None,
        max_examples=count,
        derandomize="CI" in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextmanager
def on_path(op: str, device: torch.device, head_dim: int = 128):
    """Exactly one path served ``op`` meanwhile, and it was the one for ``device``."""
    reset_path_counts()
    yield
    counted = [key for key in path_counts() if key.startswith(f"{op}:")]
    assert counted == [target.counter(op, head_dim)]


# What a case is


@dataclass(frozen=True)
class Case:
    """One call. Everything random is drawn from ``seed``."""

    lengths: tuple[tuple[int, int], ...]  # of queries and keys, for each request
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    block: int
    layout: str
    seed: int
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    offsets: tuple[int, ...] | None = None
    padding: int = 0  # rows of q past the last request
    skipped: int = 0  # slots before each request's first token, in a paged cache

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale_value(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def offset(self, request: int) -> int:
        rows, keys = self.lengths[request]
        return keys - rows if self.offsets is None else self.offsets[request]

    def seen(self, request: int) -> tuple[int, int]:
        """The range of keys that some row may see; the kernels may not touch others."""
        rows, keys = self.lengths[request]
        first = self.offset(request)
        right = 0 if self.causal else self.window[1]
        begin = 0 if self.window[0] == -1 else max(0, first - self.window[0])
        end = keys if right == -1 else min(keys, first + rows + right)
        return (begin, end) if rows and begin < end else (0, 0)


@st.composite
def cases(draw, dtypes=FLOATS, offsets=False) -> Case:
    block = draw(st.sampled_from(PAGE_SIZES))
    edges = [n for b in (block, 64) for n in (b - 1, b, b + 1, 2 * b, 2 * b + 1) if n <= 300]
    keys = st.one_of(st.sampled_from([0, 1, *edges]), st.integers(0, 300))
    rows = st.one_of(st.sampled_from([0, 1, 1, 2, 8]), st.integers(0, 40), keys)
    lengths = tuple(draw(st.lists(st.tuples(rows, keys), min_size=1, max_size=5)))
    side = st.sampled_from([-1, -1, 0, 1, 3, 15, 16, 17, 63, 64, 100])
    starts = st.tuples(*(st.integers(-20, keys + 20) for _, keys in lengths))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    return Case(
        lengths=lengths,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        head_dim=head_dim,
        dtype=draw(st.sampled_from(dtypes)),
        block=block,
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
        causal=draw(st.booleans()),
        window=draw(st.tuples(side, side)),
        scale=draw(st.sampled_from([None, None, 0.4 * head_dim**-0.5, 2 * head_dim**-0.5])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 20.0])),
        sinks=draw(st.booleans()),
        offsets=draw(starts) if offsets else None,
        padding=draw(st.sampled_from([0, 0, 1, 5])),
        skipped=draw(st.sampled_from([0, 0, 0, 1, 16, 37])),
    )


# Its tensors


def nan_filled(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype.itemsize == 1:  # 0x7f is NaN in both fp8 formats
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def make_cache(
    layout: str, blocks: int, block: int, heads: int, dim: int, dtype: torch.dtype, device
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The storage, and K and V in it as ``[blocks, block, heads, dim]``; all NaN."""

    def new(*shape: int) -> torch.Tensor:
        return nan_filled(*shape, dtype=dtype, device=device)

    if layout == "two_plane":
        both = new(2, blocks, block, heads, dim)
        return [both], both[0], both[1]
    if layout.startswith("packed"):
        if layout == "packed_nhd":
            both = new(blocks, block, heads, 2 * dim)
        else:
            both = new(blocks, heads, block, 2 * dim).transpose(1, 2)
        return [both], both[..., :dim], both[..., dim:]
    if layout == "hnd":
        k, v = (new(blocks, heads, block, dim).transpose(1, 2) for _ in "kv")
        return [k, v], k, v
    if layout == "padded":
        bases = [new(blocks, block + 1, heads + 2, dim + 16) for _ in "kv"]
        return bases, *(base[:, 1:, 1:-1, :dim] for base in bases)
    k, v = new(blocks, block, heads, dim), new(blocks, block, heads, dim)
    if layout == "odd_ones":  # a dimension of size one may carry any stride
        strides = [12345 if n == 1 else s for n, s in zip(k.shape, k.stride(), strict=True)]
        return [k, v], k.as_strided(k.shape, strides), v.as_strided(v.shape, strides)
    return [k, v], k, v


class Inputs:
    """Random tensors of a case, and its requests one by one for the oracle."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.random = torch.Generator().manual_seed(case.seed)
        ends = torch.tensor([0, *(rows for rows, _ in case.lengths)]).cumsum(0)
        self.bounds = ends.tolist()
        self.cu_seqlens_q = ends.int().to(device)
        self.seq_lens = torch.tensor([k for _, k in case.lengths], dtype=torch.int32).to(device)
        # q as a part of a fused projection: rows and heads do not follow each other
        fused = self.randn(self.bounds[-1] + case.padding, case.heads + 2, case.head_dim)
        fused[self.bounds[-1] :] = torch.nan
        self.q = fused[:, 1:-1].to(device)
        self.k = [self.randn(n, case.kv_heads, case.head_dim) for _, n in case.lengths]
        self.v = [self.randn(n, case.kv_heads, case.head_dim) for _, n in case.lengths]
        sinks = torch.randn(case.heads, generator=self.random) * 2
        self.sinks = sinks.to(device) if case.sinks else None
        self.bias: torch.Tensor | None = None

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.case.dtype)

    def dense(self) -> DenseKV:
        """Packed with gaps, in the middle of a larger tensor."""
        case = self.case
        starts, row = [], 0
        for b, (_, keys) in enumerate(case.lengths):
            row += b % 3
            starts.append(row)
            row += keys
        shape = (row + 2, case.kv_heads + 1, 2 * case.head_dim)
        both = nan_filled(*shape, dtype=case.dtype, device=self.device)
        k, v = both[:, 1:, : case.head_dim], both[:, 1:, case.head_dim :]
        for b, start in enumerate(starts):
            begin, end = case.seen(b)
            k[start + begin : start + end] = self.k[b][begin:end].to(self.device)
            v[start + begin : start + end] = self.v[b][begin:end].to(self.device)
        return DenseKV(k, v, torch.tensor(starts, dtype=torch.int32).to(self.device), self.seq_lens)

    def paged(self) -> PagedKV:
        case = self.case
        pages = [-(-(case.skipped + keys) // case.block) for _, keys in case.lengths]
        blocks = sum(pages) + 2
        ids = torch.randperm(blocks, generator=self.random).int()
        _, k, v = make_cache(
            case.layout, blocks, case.block, case.kv_heads, case.head_dim,
            self.k[0].dtype, self.device,
        )  # fmt: skip
        table = torch.tensor(GARBAGE, dtype=torch.int32).repeat(len(pages), max(pages) // 2 + 1)
        for b, count in enumerate(pages):
            begin, end = case.seen(b)
            own, ids = ids[:count], ids[count:]
            tokens = torch.arange(case.skipped + begin, case.skipped + end)
            if begin < end:
                used = slice(tokens[0] // case.block, tokens[-1] // case.block + 1)
                table[b, used] = own[used]
            where = own[tokens // case.block].long(), tokens % case.block
            for cache, new in ((k, self.k[b]), (v, self.v[b])):
                as_bits(cache)[where] = as_bits(new)[begin:end].to(self.device)
        starts = torch.full_like(self.seq_lens, case.skipped) if case.skipped else None
        return PagedKV(k, v, table.to(self.device), self.seq_lens, starts=starts)

    def call(self, kv: PagedKV | DenseKV, **overrides):
        case = self.case
        offsets = None
        if case.offsets is not None:
            offsets = torch.tensor(case.offsets, dtype=torch.int32).to(self.device)
        options = {
            "causal": case.causal,
            "window": case.window,
            "scale": case.scale,
            "softcap": case.softcap,
            "sinks": self.sinks,
            "bias": self.bias,
            "q_offsets": offsets,
            "return_lse": True,
        }
        return varlen_attention(self.q, kv, self.cu_seqlens_q, **(options | overrides))

    def expected(self, k: list[torch.Tensor], v: list[torch.Tensor]):
        """Output and LSE of all requests by the oracle."""
        case = self.case
        parts = []
        for b, (rows, keys) in enumerate(case.lengths):
            parts.append(
                oracle.attention(
                    self.q[self.bounds[b] : self.bounds[b + 1]],
                    k[b],
                    v[b],
                    scale=case.scale_value,
                    causal=case.causal,
                    window=case.window,
                    softcap=case.softcap,
                    sinks=self.sinks,
                    bias=None if self.bias is None else self.bias[b, :, :rows, :keys],
                    offset=case.offset(b),
                )
            )
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """Indexing and comparison know no fp8, and NaN is not equal to itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(as_bits(actual), as_bits(expected))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def check(inputs: Inputs, kv: PagedKV | DenseKV, k=None, v=None) -> None:
    """One call into poisoned buffers against the oracle, which sees ``k`` and ``v``."""
    case, total = inputs.case, inputs.bounds[-1]
    shape = (inputs.q.shape[0], case.heads + 1, case.head_dim + 16)
    buffer = nan_filled(*shape, dtype=case.dtype, device=inputs.device)
    out = buffer[:, :-1, :-16]
    lse = nan_filled(case.heads, shape[0], dtype=torch.float32, device=inputs.device)
    with on_path("varlen_attention", inputs.device, case.head_dim):
        results = inputs.call(kv, out=out, lse=lse)
    assert results[0] is out and results[1] is lse
    expected, expected_lse = inputs.expected(k or inputs.k, v or inputs.v)
    of_out, of_lse = OUT_TOLERANCE[case.dtype], LSE_TOLERANCE[case.dtype]
    if target.HOPPER and kv.k.dtype.itemsize == 1:
        of_lse = target.FP8_LSE_ATOL[case.dtype]
        of_out = max(of_out, 2 * of_lse)
    assert_near(out[:total], expected, of_out)
    assert_near(lse[:, :total], expected_lse, of_lse)
    assert lse[:, total:].isnan().all() and out[total:].isnan().all()
    assert buffer[:, -1].isnan().all() and buffer[..., -16:].isnan().all()


# varlen_attention


@examples(300)
@given(case=cases())
def test_paged(case, device):
    inputs = Inputs(case, device)
    check(inputs, inputs.paged())


@examples(150)
@given(case=cases())
def test_dense(case, device):
    inputs = Inputs(case, device)
    check(inputs, inputs.dense())


@examples(200)
@given(case=cases(offsets=True), paged=st.booleans())
def test_q_offsets(case, paged, device):
    inputs = Inputs(case, device)
    check(inputs, inputs.paged() if paged else inputs.dense())


@examples(300)
@given(
    case=cases(),
    paged=st.booleans(),
    expanded=st.sets(st.sampled_from([0, 1, 2]), max_size=3),
    masked=st.sampled_from([0.0, 0.2, 1.0]),
    slack=st.sampled_from([0, 3]),
)
def test_bias(case, paged, expanded, masked, slack, device):
    inputs = Inputs(case, device)
    rows, keys = (max(n) + slack for n in zip(*case.lengths, strict=True))
    shape = [len(case.lengths), case.heads, rows, keys]
    base = inputs.randn(*(1 if i in expanded else n for i, n in enumerate(shape)))
    base[torch.rand(base.shape, generator=inputs.random) < masked] = -torch.inf
    base[..., ::7, :] = -torch.inf  # rows that see nothing
    if not expanded:
        for b, (own_rows, own_keys) in enumerate(case.lengths):
            base[b, :, own_rows:] = torch.nan
            base[b, :, :, own_keys:] = torch.nan
    inputs.bias = base.to(device).expand(shape)
    check(inputs, inputs.paged() if paged else inputs.dense())


BIAS_CASE = Case(((9, 40), (1, 17)), 2, 2, 64, torch.float16, 16, "nhd", seed=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low", [-20.0, -200.0])  # scores are float32: -1e9 would drown them
def test_bias_of_wider_dtype_than_q(dtype, low, device):
    """A float32 bias keeps its precision."""
    inputs = Inputs(replace(BIAS_CASE, dtype=dtype), device)
    bias = torch.randn(2, 4, 9, 40, generator=inputs.random) * 4
    bias[:, :, 3] = low
    inputs.bias = bias.to(device)
    check(inputs, inputs.paged())


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("low", [-1e9, -1e5])
def test_row_of_huge_biases_is_an_average(low, softcap, device):
    """Whatever float32 leaves of the scores, the weights of a row add up to one."""
    inputs = Inputs(replace(BIAS_CASE, softcap=softcap, causal=False), device)
    inputs.v = [torch.ones_like(v) for v in inputs.v]
    inputs.bias = torch.full((2, 4, 9, 40), low, device=device)
    out, lse = inputs.call(inputs.paged())
    assert_near(out, torch.ones(out.shape, dtype=torch.float64), 1e-3)
    assert_near(lse, torch.full(lse.shape, low, dtype=torch.float64), 1e-3)


def test_row_that_sees_no_key_and_a_sink_of_minus_infinity(device):
    inputs = Inputs(replace(BIAS_CASE, dtype=WIDEST, sinks=True), device)
    inputs.sinks = torch.full((4,), -torch.inf, device=device)
    inputs.bias = torch.zeros(2, 4, 9, 40, device=device)
    inputs.bias[:, :, 3] = -torch.inf
    check(inputs, inputs.paged())


@examples(150)
@given(
    case=cases(),
    fp8=st.sampled_from(FP8),
    per_head=st.tuples(st.booleans(), st.booleans()),
    given_scales=st.tuples(st.booleans(), st.booleans()),
)
def test_fp8_cache(case, fp8, per_head, given_scales, device):
    inputs = Inputs(case, device)
    scales, wide = [], []
    for name, by_head, is_given in zip("kv", per_head, given_scales, strict=True):
        shape = (case.kv_heads if by_head else 1,)
        # Powers of two, so that a dequantised element is exact in the dtype of q; any in float32.
        scale = torch.exp2(torch.randint(-4, 2, shape, generator=inputs.random).float())
        scale *= 1.1 if case.dtype == torch.float32 else 1.0
        scale = scale if is_given else torch.ones(shape)
        tokens = [(t.float() / scale[:, None]).to(fp8) for t in getattr(inputs, name)]
        setattr(inputs, name, tokens)
        wide.append([t.double() * scale.double()[:, None] for t in tokens])
        scales.append(scale.to(device) if is_given else None)
    kv = replace(inputs.paged(), k_scale=scales[0], v_scale=scales[1])
    check(inputs, kv, *wide)


@examples(100)
@given(case=cases())
def test_two_calls_agree_bit_for_bit(case, device):
    inputs = Inputs(case, device)
    kv = inputs.paged()
    total = inputs.bounds[-1]
    with on_path("varlen_attention", device, case.head_dim):
        first, second = inputs.call(kv), inputs.call(kv)
    assert_same_bits(first[0][:total], second[0][:total])
    assert_same_bits(first[1][:, :total], second[1][:, :total])


@cpu_only
@examples(100)
@given(case=cases(dtypes=[torch.float32]), paged=st.booleans(), data=st.data())
def test_request_is_the_same_alone_and_in_a_batch(case, paged, data, device):
    b = data.draw(st.integers(0, len(case.lengths) - 1))
    inputs = Inputs(case, device)
    kv = inputs.paged() if paged else inputs.dense()
    rows = slice(inputs.bounds[b], inputs.bounds[b + 1])
    names = ["seq_lens", *(["block_table"] if paged else [])]
    names += ["starts"] if kv.starts is not None else []
    own = {name: getattr(kv, name)[b : b + 1] for name in names}
    alone = replace(kv, **own)
    with on_path("varlen_attention", device, case.head_dim):
        out, lse = inputs.call(kv)
        inputs.q = inputs.q[rows]
        inputs.cu_seqlens_q = torch.tensor([0, rows.stop - rows.start]).int().to(device)
        out_alone, lse_alone = inputs.call(alone)
    assert_same_bits(out_alone, out[rows])
    assert_same_bits(lse_alone, lse[:, rows].contiguous())


@examples(60)
@given(case=cases())
def test_returns_and_given_maxima(case, device):
    """The same result without LSE, with an LSE buffer only, and with the lengths told."""
    inputs = Inputs(replace(case, padding=0), device)
    kv = inputs.paged()
    rows, keys = (max(n) for n in zip(*case.lengths, strict=True))
    out, lse = inputs.call(kv)
    assert out.dtype == case.dtype and out.shape == inputs.q.shape
    assert lse.dtype == torch.float32 and lse.shape == (case.heads, inputs.bounds[-1])
    given_lse = torch.full_like(lse, torch.nan)
    with on_path("varlen_attention", device, case.head_dim):
        only_out = inputs.call(
            kv, return_lse=False, lse=given_lse, max_seqlen_q=rows, max_seqlen_k=keys
        )
    assert_same_bits(only_out, out)
    assert_same_bits(given_lse, lse)


@pytest.mark.parametrize("paged", [True, False])
def test_empty_batch(paged, device):
    """No request: nothing is read, and nothing written."""
    none = torch.zeros(0, dtype=torch.int32, device=device)
    k = nan_filled(*((2, 16, 1, 64) if paged else (3, 1, 64)), dtype=WIDEST, device=device)
    kv = PagedKV(k, k, none.view(0, 4), none) if paged else DenseKV(k, k, none, none)
    q = nan_filled(2, 2, 64, dtype=WIDEST, device=device)
    out = torch.full_like(q, 7.0)
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    with on_path("varlen_attention", device):
        _, lse = varlen_attention(q, kv, bounds, out=out, return_lse=True)
    assert (out == 7.0).all() and lse.shape == (2, 2)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": (40, 20), "causal": False}])
def test_alibi(options, device):
    """A bias that follows from where rows and keys stand."""
    case = Case(((1, 200), (3, 40), (70, 90), (2, 0)), 2, 3, 64, WIDEST, 16, "nhd", seed=0)
    inputs = Inputs(case, device)
    slopes = torch.arange(1, 7, device=device) / 16
    bias = torch.zeros(4, 6, 70, 200, device=device)
    for b, (rows, keys) in enumerate(case.lengths):
        row = torch.arange(rows, device=device).unsqueeze(-1) + keys - rows
        distance = (torch.arange(200, device=device) - row).abs()
        bias[b, :, :rows] = -slopes.view(-1, 1, 1) * distance
    for kv in (inputs.paged(), inputs.dense()):
        with on_path("varlen_attention", device, 64):
            both = [
                varlen_attention(
                    inputs.q, kv, inputs.cu_seqlens_q, **options, **changes, return_lse=True
                )
                for changes in ({"alibi_slopes": slopes}, {"bias": bias})
            ]
        for own, expected in zip(*both, strict=True):
            bound = 1e-5 if own.dtype == torch.float32 else 1e-3
            torch.testing.assert_close(own, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rows", [3, 70])
def test_a_key_that_is_no_number(rows, sinks, device):
    """Rows that see it have an LSE that is none either, so that merging does not hide it."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 2, 64, generator=random).to(device, WIDEST) for n in (2 * rows, 180))
    k[80] = torch.nan
    bounds = torch.tensor([0, rows, 2 * rows], dtype=torch.int32, device=device)
    kv = DenseKV.from_cu_seqlens(k, torch.ones_like(k), bounds.new_tensor([0, 90, 180]))
    sink = torch.zeros(2, device=device) if sinks else None
    with on_path("varlen_attention", device, 64):
        out, lse = varlen_attention(q, kv, bounds, causal=False, sinks=sink, return_lse=True)
    seen = (torch.arange(2 * rows, device=device) < rows).expand_as(lse)
    assert torch.equal(lse.isnan(), seen) and torch.equal(out.isnan().all(-1).mT, seen)
    other = torch.zeros_like(out), torch.zeros_like(lse)
    with on_path("merge_states", device):
        merged, merged_lse = merge_states(*other, out, lse)
    assert torch.equal(merged_lse.isnan(), seen)
    assert torch.equal(merged.isnan().all(-1).mT, seen)


def test_from_cu_seqlens(device):
    bounds = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device)
    k = torch.randn(7, 1, 64, device=device)
    kv = DenseKV.from_cu_seqlens(k, k, bounds)
    assert kv.starts.tolist() == [0, 3, 3] and kv.seq_lens.tolist() == [3, 0, 4]
    assert kv.starts.dtype == kv.seq_lens.dtype == torch.int32 and kv.k is k


# write_kv


@examples(300)
@given(
    data=st.data(),
    source=st.sampled_from(FLOATS),
    target=st.sampled_from([None, None, *FP8]),
    layout=st.sampled_from(LAYOUTS),
    block=st.sampled_from(PAGE_SIZES[:-2]),
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([64, 128, 80]),
    index=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**16),
)
def test_write_kv(data, source, target, layout, block, heads, head_dim, index, seed, device):
    random = torch.Generator().manual_seed(seed)
    dtype = target or source
    blocks = data.draw(st.integers(1, 6))
    tokens = data.draw(st.integers(0, min(40, blocks * block)))
    padding = data.draw(st.sampled_from([0, 3]))
    slots = torch.randperm(blocks * block, generator=random)[:tokens]
    slots[torch.rand(tokens, generator=random) < 0.2] = -1

    both = torch.randn(tokens + padding, heads, 2 * head_dim, generator=random) * 4
    both[:, :, ::9] *= 2e4 if target is not None and source != torch.float16 else 1.0
    both[tokens:] = torch.nan
    key, value = both.to(source)[..., :head_dim], both.to(source)[..., head_dim:]
    scales = [None, None]
    if target is not None:
        sizes = data.draw(st.tuples(*[st.sampled_from([None, 1, heads])] * 2))
        scales = [n and torch.rand(n, generator=random) / 4 + 0.01 for n in sizes]

    bases, k_cache, v_cache = make_cache(layout, blocks, block, heads, head_dim, dtype, device)
    for base in bases:  # any bits, NaN included
        as_bits(base).random_(generator=torch.Generator(device).manual_seed(seed))
    caches = (k_cache, v_cache)
    before = [cache.clone() for cache in caches]
    outside = [base.clone() for base in bases]
    with on_path("write_kv", device):
        write_kv(
            key.to(device),
            value.to(device),
            *caches,
            slots.to(index).to(device),
            *(None if s is None else s.to(device) for s in scales),
        )

    kept = slots[slots >= 0]
    where = kept // block, kept % block
    for cache, old, new, scale in zip(caches, before, (key, value), scales, strict=True):
        new = new[:tokens][slots >= 0]
        written = as_bits(cache)[where].view(dtype).cpu()
        if target is None:
            assert_same_bits(written, new.contiguous())
        else:
            divisor = torch.ones(1) if scale is None else scale
            assert_rounded(written, new.double() / divisor.double()[:, None])
        rest = as_bits(old).clone()
        rest[where] = as_bits(cache)[where]
        assert torch.equal(as_bits(cache), rest)
        as_bits(cache)[where] = as_bits(old)[where]  # put back, for the storage around the views
    for base, old in zip(bases, outside, strict=True):
        assert_same_bits(base, old)


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """``actual`` is an fp8 number nearest to ``exact``, the largest one where that is beyond."""
    info = torch.finfo(actual.dtype)
    exact = exact.clamp(-info.max, info.max)
    power = torch.log2(exact.abs().clamp(min=info.smallest_normal)).floor()
    half_step = torch.exp2(power) * info.eps / 2
    assert ((actual.double() - exact).abs() <= half_step * (1 + 1e-4)).all()


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("source", FLOATS)
def test_write_kv_saturates(fp8, source, device):
    """Beyond the largest number comes the largest number, neither infinity nor NaN."""
    limit = torch.finfo(fp8).max
    key = torch.tensor([1e4, -1e4, torch.inf, -torch.inf, 3.0, 0.0]).to(source).view(1, 1, 6)
    caches = [nan_filled(2, 4, 1, 6, dtype=fp8, device=device) for _ in "kv"]
    scale = torch.tensor([0.01], device=device)
    with on_path("write_kv", device):
        write_kv(
            key.to(device),
            -key.to(device),
            *caches,
            torch.tensor([5], device=device),
            scale,
            scale,
        )
    row = caches[0].double()[1, 1, 0].tolist()
    assert row[:4] == [limit, -limit, limit, -limit] and row[5] == 0.0
    assert caches[1].double()[1, 1, 0].tolist()[:4] == [-limit, limit, -limit, limit]


@pytest.mark.parametrize("fp8", [None, *FP8])
def test_write_then_attend(fp8, device):
    """What is written through ``write_kv`` is what ``varlen_attention`` reads."""
    case = Case(((5, 37), (1, 64)), 2, 2, 64, WIDEST, 16, "packed_hnd", seed=1)
    inputs = Inputs(case, device)
    _, k, v = make_cache(case.layout, 9, 16, 2, 64, fp8 or case.dtype, device)
    table = torch.tensor([[7, 2, 5, -7], [0, 8, 3, 1]], dtype=torch.int32)
    scales = [torch.tensor([0.5, 2.0], device=device), torch.tensor([0.25], device=device)]
    scales = scales if fp8 else [None, None]
    for b, (_, keys) in enumerate(case.lengths):
        t = torch.arange(keys)
        slots = table[b].long()[t // 16] * 16 + t % 16
        write_kv(inputs.k[b].to(device), inputs.v[b].to(device), k, v, slots.to(device), *scales)
    with on_path("varlen_attention", device, case.head_dim):
        out, _ = inputs.call(PagedKV(k, v, table.to(device), inputs.seq_lens, *scales))
    # Values around 1 rounded to 3 or 2 bits; scales mixed up would be off by 2 or more.
    assert_near(out, inputs.expected(inputs.k, inputs.v)[0], 0.3 if fp8 else OUT_TOLERANCE[WIDEST])


# merge_states


@examples(200)
@given(case=cases(), data=st.data())
def test_merge_of_split_keys_is_the_whole(case, data, device):
    case = replace(case, padding=0)
    splits = [data.draw(st.integers(0, keys)) for _, keys in case.lengths]
    inputs = Inputs(case, device)
    parts = []
    for first in (True, False):
        # Each part has its own keys, and its queries stand where they stood before.
        part = Inputs(case, device)
        keep = [slice(0, s) if first else slice(s, None) for s in splits]
        part.k = [k[keep[b]] for b, k in enumerate(inputs.k)]
        part.v = [v[keep[b]] for b, v in enumerate(inputs.v)]
        lengths = [(rows, len(k)) for (rows, _), k in zip(case.lengths, part.k, strict=True)]
        offsets = [case.offset(b) - (0 if first else s) for b, s in enumerate(splits)]
        part.case = replace(case, lengths=tuple(lengths), offsets=tuple(offsets))
        part.seq_lens = torch.tensor([n for _, n in lengths], dtype=torch.int32).to(device)
        part.sinks = inputs.sinks if first else None  # a sink counts once
        out, lse = part.call(part.paged())
        out.masked_fill_((lse == -torch.inf).mT.unsqueeze(-1), torch.nan)
        parts += [out, lse]
    with on_path("merge_states", device):
        out, lse = merge_states(*parts)
        swapped = merge_states(*parts[2:], *parts[:2])
    expected, expected_lse = inputs.expected(inputs.k, inputs.v)
    # Both parts were rounded to the dtype before.
    assert_near(out, expected, 2 * OUT_TOLERANCE[case.dtype])
    assert_near(lse, expected_lse, LSE_TOLERANCE[case.dtype])
    assert_same_bits(swapped[1], lse)
    assert_near(swapped[0], out.double().cpu(), OUT_TOLERANCE[case.dtype])


@examples(200)
@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([64, 128, 80]),
    dtype=st.sampled_from(FLOATS),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
    spread=st.sampled_from([0.1, 3.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_merge_formula(tokens, heads, head_dim, dtype, empty, spread, seed, device):
    random = torch.Generator().manual_seed(seed)
    outs = torch.randn(2, tokens, heads, head_dim, generator=random).to(dtype)
    lses = torch.randn(2, heads, tokens, generator=random) * spread
    none = torch.rand(2, heads, tokens, generator=random) < empty
    lses[none] = -torch.inf
    outs.masked_fill_(none.mT.unsqueeze(-1), torch.nan)
    with on_path("merge_states", device):
        out, lse = merge_states(
            outs[0].to(device), lses[0].to(device), outs[1].to(device), lses[1].to(device)
        )
    assert out.dtype == dtype and lse.dtype == torch.float32

    weights = torch.softmax(lses.double(), 0).nan_to_num(nan=0.0)  # NaN: both are empty
    terms = outs.double().nan_to_num(nan=0.0) * weights.mT.unsqueeze(-1)
    assert_near(out, terms.sum(0), OUT_TOLERANCE[dtype])
    assert_near(lse, torch.logsumexp(lses.double(), 0), 1e-6)


# Registration


def test_opcheck(device):
    """Schemas say what is written to, and tracing with fake tensors works."""
    case = Case(((2, 20), (1, 5)), 2, 2, 64, WIDEST, 16, "nhd", seed=0)
    inputs = Inputs(case, device)
    kv, dense = inputs.paged(), inputs.dense()
    out, lse = torch.empty_like(inputs.q), torch.empty(4, 3, device=device)
    ops = kernels.serving(device).ops
    workspace = kernels.workspace(device)
    tail = (
        *[None] * 5, workspace, True, False, 0, 2, 20, 0.125, -1, 0, 0.0, out, lse,
    )  # fmt: skip
    paged_args = (kv.k, kv.v, inputs.cu_seqlens_q, kv.seq_lens, kv.block_table, None, None, None)
    dense_args = (dense.k, dense.v, inputs.cu_seqlens_q, dense.seq_lens, None, dense.starts)
    slots = torch.tensor([3, -1, 7], device=device)
    new = torch.randn(3, 2, 64, device=device).to(WIDEST)
    four = torch.empty(1, 2, 3, 64, dtype=WIDEST, device=device)
    calls = [
        (ops.varlen_attention, (inputs.q, *paged_args, *tail)),
        (ops.varlen_attention, (inputs.q, *dense_args, None, None, *tail)),
        (ops.write_kv, (new, new, kv.k, kv.v, slots, None, None)),
        (ops.merge_states, (out, lse, out.clone(), lse.clone(), out.clone(), lse.clone())),
        (
            ops.attention,
            (*[new.view(1, 3, 2, 64).transpose(1, 2)] * 3, workspace, True, 0.125, four),
        ),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "mixed", "neither"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 70, 64),
        (1, 2, 1, 128),
        (3, 1, 20, 64),
        (2, 2, 1, 64),
        (4, 1, 1, 64),
        (1, 1, 130, 128),
    ],
    ids=str,
)
def test_attention_of_equal_lengths(shape, layout, device):
    """Each batch entry and head by itself, whatever the memory order."""
    batch, heads, rows, head_dim = shape
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=random).to(WIDEST) for _ in "qkv"]
    expected = torch.stack(
        [
            oracle.attention(
                *(t[b].transpose(0, 1) for t in inputs), scale=0.1, offset=0, window=(-1, -1)
            )[0].transpose(0, 1)
            for b in range(batch)
        ]
    )
    given = [t.to(device) for t in inputs]

    def tokens_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    if layout == "tokens first":
        given = [tokens_first(t) for t in given]
    elif layout == "mixed":
        given[1] = tokens_first(given[1])
    elif layout == "neither":
        space = nan_filled(batch, heads, rows + 1, head_dim, dtype=WIDEST, device=device)
        given[1] = space[:, :, :rows].copy_(given[1])
    with on_path("attention", device, head_dim):
        out = attention(*given, 0.1)
    assert out.shape == shape
    assert_near(out, expected, OUT_TOLERANCE[WIDEST])


def test_attention_of_one_row_and_head_with_stray_strides(device):
    """Contiguous to torch, though the strides of dimensions of one element say otherwise."""
    q = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(0)).to(WIDEST).to(device)
    q = q.permute(1, 2, 0, 3)
    assert q.is_contiguous() and q.stride(2) != 64
    # One key has all the weight.
    assert_same_bits(attention(q, q.contiguous(), q, 1.0), q)
