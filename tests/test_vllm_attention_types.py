"""Attention that is not causal: vLLM's own metadata and wrapper, our builder and implementation."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import CrossAttentionSpec, FullAttentionSpec

from sparsek_vllm.backends.vllm import SparseKBackend

HEADS, DIM, BLOCK = 3, 64, 16


class Layer(torch.nn.Module):
    kv_sharing_target_layer_name = None


def step(
    rows: list[int], computed: list[int], encoder: list[int], table: torch.Tensor
) -> CommonAttentionMetadata:
    """A batch of requests with so many new and computed tokens, and encoder outputs."""
    bounds = torch.tensor([0, *rows]).cumsum(0).int()
    lengths = torch.tensor([a + b for a, b in zip(rows, computed, strict=True)], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=bounds,
        query_start_loc_cpu=bounds,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(rows),
        num_actual_tokens=sum(rows),
        max_query_len=max(rows),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(rows), dtype=torch.int64),
        encoder_seq_lens=torch.tensor(encoder, dtype=torch.int32),
        encoder_seq_lens_cpu=np.array(encoder, dtype=np.int32),
    )


def test_cross_attention() -> None:
    """The encoder's keys are written at a request's first step, and seen by all of its rows."""
    random = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    backend = create_cross_attention_backend(SparseKBackend)
    config = VllmConfig()
    spec = CrossAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32
    )
    with set_current_vllm_config(config):
        builder = backend.get_builder_cls()(spec, ["cross"], config, torch.device("cpu"))
        impl = backend.get_impl_cls()(
            HEADS, DIM, DIM**-0.5, HEADS, None, None, "auto", None, AttentionType.ENCODER_DECODER
        )
    cache = torch.full((12, HEADS, BLOCK, 2 * DIM), torch.nan)
    table = torch.tensor([[3, 7, 1, 0], [9, 4, 0, 0]], dtype=torch.int32)
    encoder, rows = [37, 20], [4, 2]
    k = [randn(n, HEADS, DIM) for n in encoder]
    v = [randn(n, HEADS, DIM) for n in encoder]
    first = step(rows, [0, 0], encoder, table)
    later = step([1, 1], rows, encoder, table)
    for metadata, keys, values in ((first, torch.cat(k), torch.cat(v)), (later, None, None)):
        q = randn(metadata.num_actual_tokens, HEADS, DIM)
        out = torch.full_like(q, torch.nan)
        impl.forward(Layer(), q, keys, values, cache, builder.build(0, metadata), out)
        bounds = metadata.query_start_loc.tolist()
        for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
            expected, _ = oracle.attention(q[begin:end], k[b], v[b], scale=DIM**-0.5)
            torch.testing.assert_close(out[begin:end].double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 7])
def test_without_a_causal_mask(window: int | None, causal: bool) -> None:
    """Rows then see both sides, of a sliding window too."""
    random = torch.Generator().manual_seed(0)
    config = VllmConfig()
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32
    )
    with set_current_vllm_config(config):
        builder = SparseKBackend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
        impl = SparseKBackend.get_impl_cls()(HEADS, DIM, DIM**-0.5, HEADS, None, window)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    q, k, v = (torch.randn(33, HEADS, DIM, generator=random) for _ in "qkv")
    cache = torch.full((4, HEADS, BLOCK, 2 * DIM), torch.nan)
    tokens = torch.arange(33)
    slots = table[0].long()[tokens // BLOCK] * BLOCK + tokens % BLOCK
    impl.do_kv_cache_update(Layer(), k, v, cache, slots)
    metadata = step([33], [0], [0], table)
    metadata.causal = causal
    out = torch.full_like(q, torch.nan)
    impl.forward(Layer(), q, k, v, cache, builder.build(0, metadata), out)
    side = -1 if window is None else window - 1
    expected, _ = oracle.attention(
        q, k, v, scale=DIM**-0.5, causal=causal, window=(side, -1 if causal else side)
    )
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


def test_causality_of_each_request_is_refused() -> None:
    config = VllmConfig()
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32
    )
    builder = SparseKBackend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
    metadata = step([1], [4], [0], torch.zeros(1, 1, dtype=torch.int32))
    metadata.causal = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="causal must be True or False for all requests"):
        builder.build(0, metadata)
