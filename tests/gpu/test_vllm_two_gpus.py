"""Tensor and decode context parallelism over two GPUs, by vLLM's own executor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from target import counter

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

NEAR = 0.05
MODES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "one GPU": ("llama 3.2 1b", {}, {}),
    "TP": ("llama 3.2 1b", {"tensor_parallel_size": 2}, {}),
    "TP, graphs": (
        "llama 3.2 1b",
        {"tensor_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 0}},
        {},
    ),
    "PP": ("llama 3.2 1b", {"pipeline_parallel_size": 2}, {}),
    "invariant": (
        "llama 3.2 1b", {"tensor_parallel_size": 2}, {"VLLM_BATCH_INVARIANT": "1"},
    ),
    "invariant, chunks": (
        "llama 3.2 1b",
        {"tensor_parallel_size": 2, "max_num_batched_tokens": 64, "max_num_seqs": 4},
        {"VLLM_BATCH_INVARIANT": "1"},
    ),
    "one key head, one GPU": ("one key head", {}, {}),
    "DCP": ("one key head", {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, {}),
    "DCP, chunks of 64, runs of 16": (
        "one key head",
        {
            "tensor_parallel_size": 2, "decode_context_parallel_size": 2,
            "max_num_batched_tokens": 64, "max_num_seqs": 8, "cp_kv_cache_interleave_size": 16,
        },
        {},
    ),
    "DCP, graphs": (
        "one key head",
        {
            "tensor_parallel_size": 2, "decode_context_parallel_size": 2,
            "enforce_eager": False, "compilation_config": {"mode": 0},
        },
        {},
    ),
    "DCP, graphs of all batches": (
        "one key head",
        {
            "tensor_parallel_size": 2, "decode_context_parallel_size": 2, "enforce_eager": False,
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL"},
        },
        {},
    ),
    "DCP, all to all, graphs": (
        "one key head",
        {
            "tensor_parallel_size": 2, "decode_context_parallel_size": 2,
            "dcp_comm_backend": "a2a",
            "enforce_eager": False, "compilation_config": {"mode": 0},
        },
        {},
    ),
    "DCP of FLASH_ATTN": (
        "one key head",
        {
            "tensor_parallel_size": 2, "decode_context_parallel_size": 2,
            "attention_config": {"backend": "FLASH_ATTN"},
        },
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``served(mode)``: what its engine answers. Six engines start at a time."""

    folders = {mode: tmp_path_factory.mktemp("model") for mode in MODES}

    def serve(mode: str) -> dict[str, Any]:
        name, settings, environment = MODES[mode]
        defaults = {
            "dtype": "float16", "kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.1,
            "attention_config": {"backend": "SPARSEK_XFORMERS"},
        }  # fmt: skip
        return models.serve_apart(name, model, folders[mode], defaults | settings, **environment)

    with ThreadPoolExecutor(6) as pool:
        futures = {mode: pool.submit(serve, mode) for mode in MODES}
        yield lambda mode: futures[mode].result()


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return models.compare(ours["answers"], theirs["answers"], NEAR)


@pytest.mark.parametrize("mode", ["TP", "TP, graphs", "PP"])
def test_tensor_parallelism(mode: str, served: Any) -> None:
    answers = served(mode)
    assert set(answers["paths"]) == {counter("varlen_attention"), counter("write_kv")}
    assert difference(answers, served("one GPU")) < 0.01


def test_batch_invariance(served: Any) -> None:
    assert served("invariant")["answers"] == served("invariant, chunks")["answers"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("DCP")])
def test_decode_context_parallelism(mode: str, served: Any) -> None:
    answers = served(mode)
    if "FLASH_ATTN" not in mode:
        ops = ("varlen_attention", "write_kv", "merge_states")
        assert set(answers["paths"]) == set(map(counter, ops))
    assert difference(answers, served("one key head, one GPU")) < 0.01
