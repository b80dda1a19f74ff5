"""Layout adapters: every cache tensor that vLLM hands over becomes the same views, uncopied."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

from sparsek_vllm.core import PagedKV, varlen_attention, write_kv
from sparsek_vllm.kv_cache import kv_views

BLOCKS, BLOCK, HEADS, DIM = 5, 16, 3, 64


def check(cache: torch.Tensor, fp8_dtype: torch.dtype | None = None) -> None:
    """Writes through the views and reads back through the tensor, element by element."""
    k, v = kv_views(cache, HEADS, DIM, fp8_dtype)
    assert k.shape == v.shape == (BLOCKS, BLOCK, HEADS, DIM)
    storage = cache.untyped_storage().data_ptr()
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() == storage
    dtype = fp8_dtype or cache.dtype
    key, value = (torch.randn(2, HEADS, DIM).to(dtype) for _ in range(2))
    block, offset = 3, 7
    write_kv(key.float(), value.float(), k, v, torch.tensor([block * BLOCK + offset, -1]))
    raw = cache if fp8_dtype is None else cache.view(fp8_dtype)
    if cache.ndim == 4:
        stored = raw[block, :, offset].float()
        expected = torch.cat([key[0], value[0]], -1).float()
    else:
        stored = raw[:, block, offset].float()
        expected = torch.stack([key[0], value[0]]).float()
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["HND", "NHD"])
@pytest.mark.parametrize("padding", [0, 96])
def test_packed(order: tuple[int, ...], padding: int) -> None:
    """vLLM 0.26 and 0.27: packed K|V, tokens or heads first in memory, pages maybe padded."""
    logical = (BLOCKS, HEADS, BLOCK, 2 * DIM)
    memory = [logical[axis] for axis in order]
    page = HEADS * BLOCK * 2 * DIM + padding
    flat = torch.zeros(BLOCKS * page)
    strides = [page, memory[2] * 2 * DIM, 2 * DIM, 1]
    inverse = [order.index(axis) for axis in range(4)]
    check(flat.as_strided(memory, strides).permute(inverse))


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
def test_kv_cache_layout(layout: KVCacheLayout, dtype: torch.dtype) -> None:
    """vLLM 0.29 and newer: the views that vLLM itself makes for each layer of its six layouts."""
    layers = 2
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=dtype)
    # From the logical [layer, block, head, token, byte] to memory, by the layout's order.
    sizes = (layers, BLOCKS, HEADS, BLOCK, 2 * DIM * dtype.itemsize)
    strides, step = [0] * 5, 1
    for axis in reversed(layout.value):
        strides[axis], step = step, step * sizes[axis]
    raw = torch.zeros(step, dtype=torch.int8)
    tensor = SimpleNamespace(
        layers=["first", "second"], layer_stride=strides[0], block_stride=strides[1], offset=0
    )
    for cache in create_kv_cache_views(raw, spec, BLOCKS, layout, tensor):
        check(cache, torch.float8_e4m3fn if dtype == torch.uint8 else None)


def test_two_plane() -> None:
    check(torch.zeros(2, BLOCKS, BLOCK, HEADS, DIM, dtype=torch.float16))


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_bytes(fp8: torch.dtype) -> None:
    check(torch.zeros(2, BLOCKS, BLOCK, HEADS, DIM, dtype=torch.uint8), fp8)


def test_dimensions_of_one_may_carry_any_stride() -> None:
    flat = torch.randn(2 * DIM * BLOCK)
    cache = flat.as_strided((1, 1, BLOCK, 2 * DIM), (12345, 7, 2 * DIM, 1))
    k, v = kv_views(cache, 1, DIM)
    kv = PagedKV(k, v, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([BLOCK]).int())
    q = torch.randn(2, 1, DIM)
    out = varlen_attention(q, kv, torch.tensor([0, 2]).int())
    key, value = flat.view(BLOCK, 2, DIM).unbind(1)
    mask = torch.ones(2, BLOCK, dtype=torch.bool).tril(BLOCK - 2)
    scores = (q[:, 0].double() @ key.double().T / DIM**0.5).masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ value.double()
    torch.testing.assert_close(out[:, 0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("cache", "fp8", "message"),
    [
        (
            torch.zeros(4, 16, 3, 128),
            None,
            "cache must have shape (blocks, kv_heads=3, block, 2 * head_dim=128) or "
            "(2, blocks, block, 3, 64), got (4, 16, 3, 128)",
        ),
        (
            torch.zeros(4, 2, 16, 3, 64),
            None,
            "cache must have shape (blocks, kv_heads=3, block, 2 * head_dim=128) or "
            "(2, blocks, block, 3, 64), got (4, 2, 16, 3, 64)",
        ),
        (
            torch.zeros(4, 3, 128, 16).mT,
            None,
            "cache must be contiguous in its last dimension, got strides (6144, 2048, 1, 16)",
        ),
        (
            torch.zeros(4, 3, 16, 128),
            torch.float8_e4m3fn,
            "cache must hold bytes for torch.float8_e4m3fn, got torch.float32",
        ),
    ],
)
def test_refused(cache: torch.Tensor, fp8: torch.dtype | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        kv_views(cache, 3, 64, fp8)
    assert str(error.value) == message
