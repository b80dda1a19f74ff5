"""What a decode step costs at least on this GPU: ``csrc/bench/floor.cu``, compiled and run."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from sparsek_vllm import build

SOURCE = Path("bench/floor.cu")


def compiled(folder: Path) -> Path:
    """The program, from the cache in ``folder`` or compiled into it.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    tools = build.find_tools()
    key = hashlib.sha256(build.key(tools, build.DEFAULT, ["90"]).encode()).hexdigest()[:16]
    program = folder / f"floor-{key}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = program.with_suffix(".new")
        command: list[str | Path] = [
            *(tools.nvcc, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a"),
            *("-ccbin", tools.compiler, build.sources() / SOURCE, "-o", scratch),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise build.BuildError(f"{SOURCE} does not compile:\n{done.stderr}")
        scratch.replace(program)
    return program


def run(folder: Path) -> list[dict[str, Any]]:
    """Microseconds of each step in a CUDA graph, by itself and overlapping with the one before.

    Raises:
        BuildError: the program cannot be compiled.
        RuntimeError: it fails, on a GPU that is not Hopper for one.
    """
    done = subprocess.run([compiled(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SOURCE} fails:\n{done.stderr}")
    rows = []
    for line in done.stdout.splitlines():
        name, size, alone, overlapping = line.split("\t")
        rows.append(
            {
                "name": name,
                "bytes": int(size),
                "us": float(alone),
                "overlapping_us": float(overlapping),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| floor | MB | us | TB/s | overlapping, us |", "|---|---|---|---|---|"]
    for row in rows:
        size = f"{row['bytes'] / 2**20:.0f}" if row["bytes"] else ""
        rate = f"{row['bytes'] / row['us'] / 1e6:.2f}" if row["bytes"] else ""
        times = f"{row['us']:.2f} | {rate} | {row['overlapping_us']:.2f}"
        lines.append(f"| {row['name']} | {size} | {times} |")
    return "\n".join(lines)
