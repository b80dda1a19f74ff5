"""A model over two processes on CPU, by vLLM's own executor: its answers are those of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import models

OURS = "SPARSEK_XFORMERS"


def serve(tokenizer: Path, folder: Path, **settings: Any) -> Any:
    # vLLM would look for a NUMA node for each process.
    cores = sorted(os.sched_getaffinity(0))
    settings = {"attention_backend": OURS, "dtype": "float32", **settings}
    return models.serve_apart(
        "llama 3.2 1b", tokenizer, folder, settings,
        VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}",
    )  # fmt: skip


def test_tensor_parallelism(model: Path, tmp_path: Path) -> None:
    """Pipeline parallelism fails in vLLM 0.32 on CPU, with CPU_ATTN too."""
    one, two = (serve(model, tmp_path / str(n), tensor_parallel_size=n) for n in (1, 2))
    assert set(two["paths"]) == {"varlen_attention:reference", "write_kv:reference"}
    assert models.compare(two["answers"], one["answers"], near=2e-3) < 1e-4
