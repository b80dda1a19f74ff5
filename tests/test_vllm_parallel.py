"""A model over two processes on CPU, by vLLM's own executor: its answers are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
from engine import engine_environment

OURS = "SPARSEK_XFORMERS"


def serve(tokenizer: Path, folder: Path, **settings: Any) -> Any:
    # vLLM would look for a NUMA node for each process.
    cores = sorted(os.sched_getaffinity(0))
    settings = {"attention_backend": OURS, "dtype": "float32", **settings}
    arguments = ["llama 3.2 1b", str(tokenizer), str(folder), json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, models.__file__, *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ, **engine_environment(),
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        },
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(lines[0].removeprefix("RESULT"))


def test_tensor_parallelism(model: Path, tmp_path: Path) -> None:
    """Pipeline parallelism fails in vLLM 0.32 on CPU, with CPU_ATTN too."""
    one, two = (serve(model, tmp_path / str(n), tensor_parallel_size=n) for n in (1, 2))
    assert set(two["paths"]) == {"varlen_attention:reference", "write_kv:reference"}
    assert models.compare(two["answers"], one["answers"], near=2e-3) < 1e-4
