"""The attention of popular models in vLLM with our backend on CPU, beside CPU_ATTN.

All engines run in processes that are forked off one that has imported vLLM, two at a time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import models
import pytest
import target

OURS = "SPARSEK_XFORMERS"
PEER = "CPU_ATTN"
# Processors of images need torchvision, which vLLM's CPU build goes without; CPU_ATTN has no heads
# of 120; the others are of CUDA.
NOT_ON_CPU = (
    "llava", "gemma 3 with images", "heads of 120", "weights in fp8", "keys in host memory",
)  # fmt: skip
ON_CPU = [name for name in models.MODELS if name not in NOT_ON_CPU]
# vLLM's Mamba on CPU cannot fill a cache of prefixes.
SETTINGS: dict[str, dict[str, Any]] = {"granite 4": {"enable_prefix_caching": False}}


def prepare() -> None:
    """One thread for each of two engines, which run in this process."""
    import torch

    torch.set_num_threads(1)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future]]:
    """What the two backends make of every model that is tested."""
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "transformers"])
    with ProcessPoolExecutor(2, context, prepare, max_tasks_per_child=1) as pool:
        yield {
            (name, backend): pool.submit(
                models.serve, name, model, tmp_path_factory.mktemp("model"),
                {"attention_backend": backend, "dtype": "float32", **SETTINGS.get(name, {})},
            )
            # One after the other: vLLM looks through a model's code once, and keeps what it found.
            for backend in (OURS, PEER)
            for name in (item.callspec.params["name"] for item in items)
        }  # fmt: skip
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ON_CPU)
def test_answers_are_cpu_attns(name: str, answers: dict[tuple[str, str], Future]) -> None:
    ours, theirs = (answers[name, backend].result() for backend in (OURS, PEER))
    assert set(ours["paths"]) == {
        *(target.counter("varlen_attention", size) for size in ours["head_sizes"]),
        target.counter("write_kv"),
    }  # fmt: skip
    assert theirs["paths"] == {}
    difference = models.compare(ours["answers"], theirs["answers"], near=2e-3)
    print(f"mean difference of logprobs: {difference:.1e}")
    assert difference < 1e-4
    if models.MODELS[name].extra == "adapter":
        plain, adapted = models.halves(ours["answers"])
        assert all(a["tokens"] != b["tokens"] for a, b in zip(plain, adapted, strict=True))
