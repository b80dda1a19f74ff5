"""Decode context parallelism on two ranks: vLLM's own groups, our builder and implementation."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path

import oracle
import pytest
import torch
from steps import BLOCK, DIM, Layer, layer, step
from vllm.config import ParallelConfig, VllmConfig

WORLD, HEADS = 2, 4
# New and computed tokens of each request. With runs of 16 keys, rank 1 has none of the first 16.
BATCHES = {
    "decoding": ([1, 1, 1, 1], [100, 1, 16, 255]),
    "mixed": ([1, 40, 3, 5], [70, 0, 33, 1]),
    "nothing computed": ([7, 20], [0, 0]),
    "padded": ([2, 1, 0, 0], [31, 64, 0, 0]),
}


def local_place(token: torch.Tensor, interleave: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank that keeps a token, and its position among that rank's tokens."""
    run, within = token // interleave, token % interleave
    return run % WORLD, run // WORLD * interleave + within


def configuration(interleave: int = 1) -> VllmConfig:
    parallel = ParallelConfig(
        tensor_parallel_size=WORLD,
        decode_context_parallel_size=WORLD,
        cp_kv_cache_interleave_size=interleave,
    )
    return VllmConfig(parallel_config=parallel)


def check(interleave: int, softcap: float, sinks: bool, batch: str, rank: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(HEADS, generator=random) if sinks else None
    own = HEADS // WORLD
    heads = slice(rank * own, (rank + 1) * own)
    builder, impl = layer(
        own, 1, configuration(interleave),
        logits_soft_cap=softcap, sinks=None if logits is None else logits[heads],
    )  # fmt: skip
    assert impl.need_to_return_lse_for_decode
    rows, computed = BATCHES[batch]
    blocks_each = 20
    table = torch.randperm(blocks_each * len(rows), generator=random).int().view(len(rows), -1)
    cache = torch.full((table.numel(), 1, BLOCK, 2 * DIM), torch.nan)
    metadata = step(rows, computed, [0], table)
    bounds = metadata.query_start_loc.tolist()
    q = torch.randn(sum(rows), HEADS, DIM, generator=random)
    k, v = (torch.full((sum(rows), 1, DIM), torch.nan) for _ in "kv")
    all_k, all_v = [], []
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        length = rows[b] + computed[b]
        keys, values = (torch.randn(length, 1, DIM, generator=random) for _ in "kv")
        k[begin:end], v[begin:end] = keys[computed[b] :], values[computed[b] :]
        keeper, place = local_place(torch.arange(length), interleave)
        place = place[keeper == rank]
        where = table[b, place // BLOCK].long(), torch.zeros_like(place), place % BLOCK
        cache[where] = torch.cat([keys, values], -1)[keeper == rank][:, 0]
        all_k.append(keys)
        all_v.append(values)
    out = torch.full((sum(rows), own, DIM), torch.nan)
    impl.forward(Layer(), q[:, heads], k, v, cache, builder.build(0, metadata), out)
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        expected, _ = oracle.attention(
            q[begin:end], all_k[b], all_v[b],
            scale=DIM**-0.5, causal=True, softcap=softcap, sinks=logits,
        )  # fmt: skip
        torch.testing.assert_close(
            out[begin:end].double(), expected[:, heads], rtol=2e-5, atol=2e-5
        )


def check_refusals() -> None:
    for settings, reason in (
        ({"sliding_window": 8}, "a sliding window"),
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"head_dim": 80}, "head_size 80 (no power of two)"),
        ({"kv_sharing_target_layer_name": "first"}, "layers that share keys"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder"),
    ):
        with pytest.raises(ValueError) as error:
            layer(HEADS // WORLD, 1, configuration(), **settings)
        assert str(error.value) == (
            f"SPARSEK_XFORMERS does not support decode context parallelism with {reason}"
        )


def run_rank(rank: int, port: int, folder: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    from sparsek_vllm.core import stats

    torch.set_num_threads(1)
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            WORLD, rank, f"tcp://localhost:{port}", rank, "gloo"
        )
        parallel_state.initialize_model_parallel(
            WORLD, decode_context_model_parallel_size=WORLD, backend="gloo"
        )
    try:
        for batch, interleave in itertools.product(BATCHES, (1, BLOCK)):
            check(interleave, 0.0, False, batch, rank)
        check(1, 5.0, True, "mixed", rank)
        check_refusals()
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    Path(folder, str(rank)).write_text(" ".join(sorted(stats.path_counts())))


def test_two_ranks_give_what_one_would(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, str(tmp_path)), nprocs=WORLD)
    for rank in range(WORLD):
        assert (
            tmp_path / str(rank)
        ).read_text() == "merge_states:reference varlen_attention:reference"
