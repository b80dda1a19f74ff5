"""Which implementation served how many calls and tokens in this process."""

from __future__ import annotations

from collections import defaultdict

_counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"calls": 0, "tokens": 0})


def record(op: str, path: str, tokens: int) -> None:
    entry = _counts[f"{op}:{path}"]
    entry["calls"] += 1
    entry["tokens"] += tokens


def path_counts() -> dict[str, dict[str, int]]:
    """Calls and tokens for each ``"op:path"`` since start or the last reset.

    The path is ``reference`` (plain torch on CPU) or the name of a CUDA kernel family.
    """
    return {key: dict(value) for key, value in _counts.items()}


def reset_path_counts() -> None:
    """Forget what was counted."""
    _counts.clear()
