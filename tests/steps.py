"""One step of one layer, without an engine: vLLM's metadata, our builder and implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from sparsek_vllm.backends.vllm import SparseKBackend, SparseKImpl, SparseKMetadataBuilder

DIM, BLOCK = 64, 16


class Layer(torch.nn.Module):
    kv_sharing_target_layer_name = None


def step(
    rows: list[int],
    computed: list[int],
    encoder: list[int],
    table: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> CommonAttentionMetadata:
    """A batch of requests with so many new and computed tokens, and encoder outputs."""
    bounds = torch.tensor([0, *rows]).cumsum(0).int()
    lengths = torch.tensor([a + b for a, b in zip(rows, computed, strict=True)], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=bounds.to(table.device),
        query_start_loc_cpu=bounds,
        seq_lens=lengths.to(table.device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(rows),
        num_actual_tokens=sum(rows),
        max_query_len=max(rows),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(rows), dtype=torch.int64) if slots is None else slots,
        encoder_seq_lens=torch.tensor(encoder, dtype=torch.int32),
        encoder_seq_lens_cpu=np.array(encoder, dtype=np.int32),
    )


def layer(
    heads: int,
    kv_heads: int,
    config: VllmConfig | None = None,
    head_dim: int = DIM,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> tuple[SparseKMetadataBuilder, SparseKImpl]:
    """A decoder's builder and implementation."""
    config = config or VllmConfig()
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=kv_heads, head_size=head_dim, dtype=dtype
    )
    with set_current_vllm_config(config):
        builder = SparseKBackend.get_builder_cls()(spec, ["layer"], config, torch.device(device))
        impl = SparseKBackend.get_impl_cls()(heads, head_dim, head_dim**-0.5, kv_heads, **settings)
    return builder, impl
