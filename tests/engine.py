"""Engines and servers of vLLM, and those who ask them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsek_vllm.demo import Server

STATS = "sparsek_vllm.backends.vllm_worker.StatsExtension"


_numbers = itertools.count()


def engine_environment() -> dict[str, str]:
    """For an engine in a process of its own, one of many at once: vLLM looks for a free port some
    time before it takes it.
    """
    ports = 20000 + 4000 * (os.getpid() % 7) + 40 * next(_numbers)
    return {"HF_HUB_OFFLINE": "1", "VLLM_PORT": str(ports)}


def result_of(command: Sequence[str], text: str | None = None, **environment: str) -> Any:
    """What an engine's own process prints as JSON behind RESULT; ``text`` is its stdin."""
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, **engine_environment(), **environment},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(lines[0].removeprefix("RESULT"))


def client(server: Server, timeout: float) -> Any:
    """Asks the server, without a second try."""
    from openai import AsyncOpenAI

    base = f"{server.url}/v1"
    return AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=timeout)


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
