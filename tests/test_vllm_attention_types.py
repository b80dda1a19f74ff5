"""Attention of other kinds than a decoder's plain one: vLLM's metadata and wrapper, our classes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from steps import BLOCK, DIM, Layer, layer, step
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, AttentionType
from vllm.v1.kv_cache_interface import CrossAttentionSpec

from sparsek_vllm.backends.vllm import SparseKBackend
from sparsek_vllm.core import stats

HEADS = 3


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
    builder, impl = layer(HEADS, HEADS, sliding_window=window)
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


@pytest.fixture(scope="module")
def prefix_lm(model: Path) -> VllmConfig:
    """Of a model whose images attend to themselves, as Gemma 3's do."""
    overrides = {"is_mm_prefix_lm": True}
    return VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="float32", hf_overrides=overrides)
    )


@pytest.mark.parametrize(("window", "clamped"), [(None, False), (20, False), (20, True)])
def test_images_attend_to_themselves(
    window: int | None, clamped: bool, prefix_lm: VllmConfig
) -> None:
    """Within a chunk, from a prefix on, in a chunk of few rows; beside a request without any."""
    random = torch.Generator().manual_seed(0)
    rows, computed = [60, 30, 1, 5], [0, 50, 70, 40]
    images = {0: [(5, 24), (30, 59)], 1: [(40, 70)], 2: [], 3: [(38, 44)]}
    builder, impl = layer(4, 2, prefix_lm, sliding_window=window)
    builder.images_end_at_window = clamped  # as layers say, of which there are none here
    lengths = [a + b for a, b in zip(rows, computed, strict=True)]
    table = torch.randperm(20, generator=random).view(4, 5).int()
    k, v = ([torch.randn(n, 2, DIM, generator=random) for n in lengths] for _ in "kv")
    cache = torch.full((20, 2, BLOCK, 2 * DIM), torch.nan)
    for b, n in enumerate(lengths):
        token = torch.arange(n)
        slots = table[b].long()[token // BLOCK] * BLOCK + token % BLOCK
        impl.do_kv_cache_update(Layer(), k[b], v[b], cache, slots)
    q = torch.randn(sum(rows), 4, DIM, generator=random)
    metadata = step(rows, computed, [0], table)
    metadata.mm_req_doc_ranges = images
    out = torch.full_like(q, torch.nan)
    impl.forward(Layer(), q, q, q, cache, builder.build(BLOCK, metadata), out)
    bounds = metadata.query_start_loc.tolist()
    side = -1 if window is None else window - 1
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        spans = []
        for position in range(computed[b], lengths[b]):
            first, last = next((s for s in images[b] if s[0] <= position <= s[1]), (0, -1))
            if clamped and last >= 0:
                first = max(first, position - side)
            spans.append((first, last + 1))
        expected, _ = oracle.attention(
            q[begin:end], k[b], v[b], scale=DIM**-0.5, causal=True, window=(side, -1),
            spans=torch.tensor(spans),
        )  # fmt: skip
        torch.testing.assert_close(out[begin:end].double(), expected, rtol=2e-5, atol=2e-5)


def test_images_of_other_steps(prefix_lm: VllmConfig) -> None:
    """vLLM names them in every step of a request: they cost something in their own alone."""
    builder, _ = layer(HEADS, HEADS, prefix_lm)
    images = {0: [(2, 5), (20, 30)], 1: [(2, 2)]}
    for rows, computed, has_images in (
        ([8, 8], [0, 0], True),  # the first image of request 0
        ([1, 8], [6, 0], False),  # between
        ([14, 1], [6, 8], False),
        ([15, 1], [6, 8], True),  # a row of the second
        ([4, 1], [30, 8], True),  # its last one
        ([1, 1], [31, 8], False),
    ):
        metadata = step(rows, computed, [0], torch.zeros(2, 4, dtype=torch.int32))
        metadata.mm_req_doc_ranges = images
        spans = builder.build(0, metadata).spans
        assert (spans is not None) == has_images, (rows, computed)
        assert spans is None or spans.any()


def test_graphs_of_models_whose_images_attend_to_themselves(prefix_lm: VllmConfig) -> None:
    """They are captured without images, which is right for one token a request alone."""
    for config, support in (
        (prefix_lm, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        (VllmConfig(), AttentionCGSupport.ALWAYS),
    ):
        builder, _ = layer(HEADS, HEADS, config)
        spec = builder.kv_cache_spec
        assert type(builder).get_cudagraph_support(config, spec) is support
        assert type(builder).get_varlen_cudagraph_max_query_len(config, spec) is None


def test_graphs_of_the_second_model_runner(
    prefix_lm: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It replays none of several tokens for a prompt, since it asks for their number."""
    asks = hasattr(AttentionMetadataBuilder, "get_varlen_cudagraph_max_query_len")
    expected = (
        (AttentionCGSupport.UNIFORM_BATCH, 1)
        if asks
        else (AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, None)
    )
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    builder, _ = layer(HEADS, HEADS, prefix_lm)
    asked, kind = (prefix_lm, builder.kv_cache_spec), type(builder)
    answers = (
        kind.get_cudagraph_support(*asked),
        kind.get_varlen_cudagraph_max_query_len(*asked),
    )
    assert answers == expected


def test_query_lengths_that_only_the_device_knows() -> None:
    """Adaptive verification shares drafts out there: the host's lengths do not choose kernels."""
    builder, _ = layer(HEADS, HEADS)
    metadata = step([6, 6], [20, 20], [0], torch.zeros(2, 2, dtype=torch.int32))
    assert builder.build(0, metadata).min_query_len == 6
    builder.exact_lens = False
    assert builder.build(0, metadata).min_query_len == 0


def test_steps_of_a_draft_model_are_recorded(prefix_lm: VllmConfig) -> None:
    builder, _ = layer(HEADS, HEADS, prefix_lm)
    assert builder.supports_draft_decode_metadata_update
    metadata = step([8], [0], [0], torch.zeros(1, 1, dtype=torch.int32))
    metadata.mm_req_doc_ranges = {0: [(2, 5)]}
    built = builder.build(0, metadata)
    assert built.spans is not None and built.spans.any()
    builder.update_draft_decode_metadata(built)
    assert not built.spans.any()


def test_causality_of_each_request_is_refused() -> None:
    builder, _ = layer(HEADS, HEADS)
    metadata = step([1], [4], [0], torch.zeros(1, 1, dtype=torch.int32))
    metadata.causal = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="causal must be True or False for all requests"):
        builder.build(0, metadata)


@pytest.mark.parametrize(
    ("mode", "longest"),
    [("FULL", 24), ("FULL_DECODE_ONLY", 8), ("FULL_AND_PIECEWISE", 8), ("PIECEWISE", 8)],
)
def test_graphs_of_mixed_batches(mode: str, longest: int) -> None:
    """vLLM captures them with rows spread evenly over requests, and replays them with any."""
    builder, _ = layer(HEADS, HEADS)
    builder.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    metadata = step([8, 8, 8], [0, 0, 0], [0], torch.zeros(3, 1, dtype=torch.int32))
    assert builder.build_for_cudagraph_capture(metadata).max_query_len == longest


@pytest.mark.parametrize("sinks", [False, True])
def test_shared_prefix(sinks: bool) -> None:
    """Cascade attention, with other blocks behind the shared ones."""
    random = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 2.0, 3.0]) if sinks else None
    builder, impl = layer(4, 2, sinks=logits, logits_soft_cap=3.0)
    prefix, rows, computed = 3 * BLOCK, [1, 4, 1, 9], [50, 48, 77, 64]
    metadata = step(rows, computed, [0], torch.zeros(4, 6, dtype=torch.int32))
    table = metadata.block_table_tensor
    table[:, :3] = torch.tensor([7, 2, 5])
    table[:, 3:] = torch.arange(8, 20).view(4, 3)
    cache = torch.randn(20, 2, BLOCK, 2 * DIM, generator=random)
    q = torch.randn(sum(rows), 4, DIM, generator=random)
    plain, shared = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    impl.forward(Layer(), q, q, q, cache, builder.build(0, metadata), plain)
    stats.reset_path_counts()
    impl.forward(Layer(), q, q, q, cache, builder.build(prefix, metadata), shared)
    assert {name: c["calls"] for name, c in stats.path_counts().items()} == {
        "varlen_attention:reference": 2,
        "merge_states:reference": 1,
    }
    torch.testing.assert_close(shared, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (True, {}),
        (False, {"common_prefix_len": 128}),
        (False, {"query_lens": np.full(8, 1)}),  # few passes do not fill the GPU as it is
        (False, {"query_lens": np.full(64, 100)}),  # bound by products
        (True, {"query_lens": np.full(64, 4)}),
        (False, {"use_sliding_window": True}),
        (False, {"dcp_world_size": 2}),
    ],
)
def test_when_a_shared_prefix_is_worth_it(expected: bool, changes: dict[str, Any]) -> None:
    builder, _ = layer(HEADS, HEADS)
    case = {
        "common_prefix_len": 4096, "query_lens": np.full(64, 1), "num_query_heads": 32,
        "num_kv_heads": 8, "use_alibi": False, "use_sliding_window": False,
        "use_local_attention": False, "num_sms": 132, "dcp_world_size": 1,
    }  # fmt: skip
    assert builder.use_cascade_attention(**(case | changes)) is expected
