"""Batches of requests over a paged cache, to be checked against float64.

Unused slots, unused block table entries and outputs are poisoned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import dense_oracle
import target
import torch
from target import DEVICE

from sparsek_vllm.core import (
    DenseKV,
    PagedKV,
    path_counts,
    reset_path_counts,
    varlen_attention,
    write_kv,
)

GARBAGE = 2**30
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Batch:
    """Requests with their keys and values scattered over the pages of a poisoned cache."""

    lengths: Sequence[tuple[int, int]]  # of queries and keys
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block: int = 16
    layout: str = "nhd"
    seed: int = 0
    extra_blocks: int = 3
    fp8: bool = False  # the cache, with a scale for each head of K and one of V

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        heads, dim, block = self.kv_heads, self.head_dim, self.block
        rows = [rows for rows, _ in self.lengths]
        self.bounds = [0, *itertools.accumulate(rows)]
        self.q = torch.randn(self.bounds[-1], heads * self.group, dim, device=DEVICE).to(self.dtype)
        self.k = [torch.randn(n, heads, dim, device=DEVICE).to(self.dtype) for _, n in self.lengths]
        self.v = [torch.randn(n, heads, dim, device=DEVICE).to(self.dtype) for _, n in self.lengths]
        pages = [-(-n // block) for _, n in self.lengths]
        blocks = sum(pages) + self.extra_blocks
        shape = (blocks, heads, block) if self.layout == "hnd" else (blocks, block, heads)
        cache_dtype = torch.float8_e4m3fn if self.fp8 else self.dtype
        cache = torch.full((*shape, 2 * dim), torch.nan, device=DEVICE).to(cache_dtype)
        cache = cache.transpose(1, 2) if self.layout == "hnd" else cache
        ids = torch.randperm(blocks)
        table = torch.full((len(pages), max(pages) + 2), GARBAGE, dtype=torch.int32)
        slots = []
        for b, count in enumerate(pages):
            own, ids = ids[:count], ids[count:]
            table[b, :count] = own
            tokens = torch.arange(self.lengths[b][1])
            slots.append(own[tokens // block] * block + tokens % block)
        self.slots = torch.cat(slots).to(DEVICE)
        self.kv = PagedKV(
            cache[..., :dim],
            cache[..., dim:],
            table.to(DEVICE),
            torch.tensor([n for _, n in self.lengths], dtype=torch.int32, device=DEVICE),
            k_scale=torch.arange(1, heads + 1, device=DEVICE) / 64 if self.fp8 else None,
            v_scale=torch.tensor([0.02], device=DEVICE) if self.fp8 else None,
        )
        self.write()
        self.cu_seqlens_q = torch.tensor(self.bounds, dtype=torch.int32, device=DEVICE)

    def write(self) -> None:
        """The keys and values to their slots. Those of fp8 become what the cache then holds."""
        kv = self.kv
        write_kv(
            torch.cat(self.k), torch.cat(self.v), kv.k, kv.v, self.slots, kv.k_scale, kv.v_scale
        )
        if kv.k_scale is None or kv.v_scale is None:
            return

        def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            quotient = x.float() / scale[:, None]
            return quotient.to(kv.k.dtype).double() * scale.double()[:, None]

        self.k = [rounded(k, kv.k_scale) for k in self.k]
        self.v = [rounded(v, kv.v_scale) for v in self.v]

    def dense(self) -> DenseKV:
        gap = torch.full((3, self.kv_heads, self.head_dim), torch.nan, dtype=self.dtype).to(DEVICE)
        starts = [0, *itertools.accumulate(n + 3 for _, n in self.lengths)][:-1]
        k, v = (torch.cat([x for t in own for x in (t, gap)]) for own in (self.k, self.v))
        starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        return DenseKV(k, v, starts, self.kv.seq_lens)

    def run(self, kv: PagedKV | DenseKV | None = None, **options) -> tuple[torch.Tensor, ...]:
        out = torch.full_like(self.q, torch.nan)
        lse = torch.full((self.q.shape[1], self.q.shape[0]), torch.nan, device=DEVICE)
        longest = [max(n) for n in zip(*self.lengths, strict=True)]
        varlen_attention(
            self.q,
            kv or self.kv,
            self.cu_seqlens_q,
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            out=out,
            lse=lse,
            **options,
        )
        return out, lse

    def expected(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        spans = options.pop("spans", None)
        parts = [
            dense_oracle.attention(
                self.q[a:b], k, v, **options, spans=None if spans is None else spans[a:b]
            )
            for a, b, k, v in zip(self.bounds, self.bounds[1:], self.k, self.v, strict=False)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def check(self, path: str | None = None, tolerance: float | None = None, **options) -> None:
        path = path or target.path(self.head_dim)
        tolerance = tolerance or TOLERANCE[self.dtype]
        expected, expected_lse = self.expected(**options)
        # Of prefill or, maybe, decode.
        several = torch.tensor([n > 1 for n, _ in self.lengths for _ in range(n)], device=DEVICE)
        rounded = several & (self.fp8 and target.HOPPER)
        for kv in (self.kv, *([] if self.fp8 else [self.dense()])):
            reset_path_counts()
            out, lse = self.run(kv, **options)
            assert list(path_counts()) == [f"varlen_attention:{path}"]
            again = self.run(kv, **options)
            assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
            for rows, rtol, atol in (
                (~rounded, 1e-4, 1e-3),
                (rounded, target.FP8_LSE_RTOL, target.FP8_LSE_ATOL[self.dtype]),
            ):
                own, other = lse[:, rows].double(), expected_lse[:, rows]
                torch.testing.assert_close(own, other, rtol=rtol, atol=atol)
