"""An engine of vLLM in the test's own process."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATS = "sparsek_vllm.backends.vllm_worker.StatsExtension"


_numbers = itertools.count()


def engine_environment() -> dict[str, str]:
    """For an engine in a process of its own, one of many at once: vLLM looks for a free port some
    time before it takes it.
    """
    ports = 20000 + 4000 * (os.getpid() % 7) + 40 * next(_numbers)
    return {"HF_HUB_OFFLINE": "1", "VLLM_PORT": str(ports)}


@contextlib.contextmanager
def running_engine(model: Path | str, **arguments: Any) -> Iterator[Any]:
    """An ``LLM`` whose processes end with the context."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "enforce_eager": True,
        "worker_extension_cls": STATS,
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(str(model), **{**settings, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
