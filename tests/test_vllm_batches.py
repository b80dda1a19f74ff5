"""Steps as vLLM makes them, through our builder and implementation, against float64.

Decoding, prefill, mixed and speculative batches of several sizes, with the heads that a model of
32 has for each of 1 to 8 GPUs. The unwritten part of the cache and of the block table is poisoned.
"""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from batches import GARBAGE
from steps import BLOCK, Layer, layer, step
from target import DEVICE

from sparsek_vllm.core import path_counts, reset_path_counts
from sparsek_vllm.core.kernels import path_for

# New tokens of each request, and tokens in all.
BATCHES = {
    "two decodes": ([1] * 2, [32, 40]),
    "two prompts": ([8] * 2, [32, 40]),
    "few, mixed": ([1, 1, 5, 5], [32, 40, 48, 56]),
    "eight decodes": ([1] * 8, [128, 256, 512, 1024] * 2),
    "four prompts": ([16] * 4, [256, 512, 1024, 2048]),
    "some, mixed": ([1, 1, 1, 7, 7, 7], [512, 1024, 2048] * 2),
    "many decodes": ([1] * 32, [2048] * 32),
    "long prompts": ([32] * 8, [4096] * 8),
    "long, mixed": ([1, 1, 1, 32, 32, 32], [1024, 2048, 4096] * 2),
    "one decode": ([1], [1024]),
    "one prompt": ([64], [1024]),
    "whole prompts": ([130, 1, 17], [130, 1, 17]),
    "two drafts": ([2] * 4, [33, 47, 128, 300]),
    "four drafts": ([4] * 8, [500 + 129 * i for i in range(8)]),
    "eight drafts, one rejected": ([8, 8, 7, 1], [2000, 900, 64, 65]),
}
HEADS = [(32, 8), (16, 4), (8, 2), (4, 1)]
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 3e-2 if DEVICE.type == "cuda" else 2e-5


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_batch(name: str, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, lengths = BATCHES[name]
    query_heads, kv_heads = heads
    dim = 128
    builder, impl = layer(query_heads, kv_heads, head_dim=dim, dtype=DTYPE, device=DEVICE)
    pages = [-(-n // BLOCK) for n in lengths]
    ids = torch.randperm(sum(pages) + 2).split([*pages, 2])
    table = torch.full((len(rows), max(pages) + 1), GARBAGE, dtype=torch.int32)
    for b, own in enumerate(ids[:-1]):
        table[b, : len(own)] = own
    shape = (sum(pages) + 2, kv_heads, BLOCK, 2 * dim)
    cache = torch.full(shape, torch.nan, dtype=DTYPE, device=DEVICE)
    q = torch.randn(sum(rows), query_heads, dim).to(DEVICE, DTYPE)
    keys, values = ([torch.randn(n, kv_heads, dim).to(DTYPE) for n in lengths] for _ in "kv")

    def slots(b: int, begin: int, end: int) -> torch.Tensor:
        token = torch.arange(begin, end)
        return table[b, token // BLOCK].long() * BLOCK + token % BLOCK

    def of_all(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(DEVICE)

    earlier = [n - new for n, new in zip(lengths, rows, strict=True)]
    spans = [(0, n) for n in earlier], list(zip(earlier, lengths, strict=True))
    for span in spans:
        parts = [(b, *ends) for b, ends in enumerate(span)]
        k, v = (of_all([x[b][begin:end] for b, begin, end in parts]) for x in (keys, values))
        slot_mapping = of_all([slots(*part) for part in parts])
        impl.do_kv_cache_update(Layer(), k, v, cache, slot_mapping)
    metadata = step(rows, earlier, [0], table.to(DEVICE), slot_mapping)
    out = torch.full_like(q, torch.nan)
    reset_path_counts()
    # As where a model's own kernel has written the cache: supports_kv_cache_update_bypass.
    impl.forward(Layer(), q, None, None, cache, builder.build(0, metadata), out)
    assert list(path_counts()) == [f"varlen_attention:{path_for(DEVICE, dim)}"]
    bounds = [0, *itertools.accumulate(rows)]
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        expected, _ = oracle.attention(
            q[begin:end], keys[b], values[b], scale=dim**-0.5, causal=True
        )
        torch.testing.assert_close(
            out[begin:end].double().cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE
        )
