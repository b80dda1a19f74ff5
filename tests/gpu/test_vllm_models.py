"""The attention of popular models in vLLM with our backend on the GPU, beside FLASH_ATTN.

Every engine runs in a process of its own, many at a time: they take a minute to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import pytest
import target

pytest.importorskip("vllm")

OURS = "SPARSEK_XFORMERS"
PEER = "FLASH_ATTN"
# FlashAttention-4 alone has heads of 512 and images whose tokens see each other; not every build of
# vLLM has it.
PEERS = {"gemma 4": "TRITON_ATTN", "gemma 3 with images": "TRITON_ATTN"}


def serve(
    name: str,
    backend: str,
    tokenizer: Path,
    folder: Path,
    environment: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    settings = {
        "attention_config": {"backend": backend}, "dtype": models.MODELS[name].dtype,
        "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, **more,
    }  # fmt: skip
    return models.serve_apart(name, tokenizer, folder, settings, **(environment or {}))


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future]]:
    """What the two backends make of every model that is tested."""
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(12) as pool:
        named = [i.callspec.params["name"] for i in items if hasattr(i, "callspec")]
        yield {
            (name, backend): pool.submit(
                serve, name, backend, model, tmp_path_factory.mktemp("model")
            )
            for name in named
            for backend in (OURS, PEERS.get(name, PEER))
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", models.MODELS)
def test_answers_are_flash_attns(name: str, answers: dict[tuple[str, str], Future]) -> None:
    """Up to rounding; tokens may part only where two were about as likely."""
    backends = OURS, PEERS.get(name, PEER)
    ours, theirs = (answers[name, backend].result() for backend in backends)
    assert set(ours["paths"]) == {
        *(target.counter("varlen_attention", size) for size in ours["head_sizes"]),
        target.counter("write_kv"),
    }  # fmt: skip
    assert theirs["paths"] == {}
    case = models.MODELS[name]
    difference = models.compare(ours["answers"], theirs["answers"], near=5 * case.bound)
    print(f"mean difference of logprobs: {difference:.4f}")
    assert difference < case.bound
    if case.extra == "adapter":
        plain, adapted = models.halves(ours["answers"])
        assert all(a["tokens"] != b["tokens"] for a, b in zip(plain, adapted, strict=True))
    if case.extra == "twice":
        first, again = models.halves(ours["answers"])
        assert models.compare(again, first, near=5 * case.bound) < case.bound
        # The GPU has forgotten its own: what was cached came from the host.
        assert sum(answer["cached"] for answer in again) > 1000


WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "one at a time": {"max_num_seqs": 1},
    "in chunks": {"max_num_batched_tokens": 48, "max_num_seqs": 5},
    "by graphs": {
        "enforce_eager": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    },
}


def test_batch_invariance(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same bits whatever the batch is. What FLASH_ATTN's do is shown beside ours."""

    def bits(case: tuple[str, str]) -> Any:
        backend, way = case
        invariant = {"VLLM_BATCH_INVARIANT": "1"}
        folder = folders[case]
        return serve("llama 3.2 1b", backend, model, folder, invariant, **WAYS[way])["answers"]

    cases = [(backend, way) for backend in (OURS, PEER) for way in WAYS]
    folders = {case: tmp_path_factory.mktemp("model") for case in cases}
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = dict(zip(cases, pool.map(bits, cases), strict=True))
    same = {(who, way): answers[who, way] == answers[who, "together"] for who, way in cases}
    print(same)
    assert all(same[OURS, way] for way in WAYS)
