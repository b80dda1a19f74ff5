"""Timing a kernel, alone and against torch's scaled_dot_product_attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sparsek_vllm.utils.validation import validate_correctness


def benchmark_latency(
    kernel_fn: Callable[..., Any],
    *args: Any,
    num_warmup: int = 10,
    num_iters: int = 100,
    **kwargs: Any,
) -> dict[str, float]:
    """Time ``kernel_fn(*args, **kwargs)``.

    Each call is timed by a pair of CUDA events if an argument is a CUDA tensor, else by the
    clock of the CPU.

    Args:
        kernel_fn: function to time.
        num_warmup: calls before the first that is timed.
        num_iters: calls that are timed.

    Returns:
        ``mean_us``, ``median_us``, ``min_us``, ``max_us`` and ``std_us`` in microseconds, and
        ``num_iters``.

    Raises:
        ValueError: ``num_iters`` is below 1 or ``num_warmup`` below 0.
    """
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}")
    if num_warmup < 0:
        raise ValueError(f"num_warmup must be at least 0, got {num_warmup}")
    for _ in range(num_warmup):
        kernel_fn(*args, **kwargs)
    on_gpu = any(isinstance(a, torch.Tensor) and a.is_cuda for a in (*args, *kwargs.values()))
    measure = _time_on_gpu if on_gpu else _time_on_cpu
    times = measure(lambda: kernel_fn(*args, **kwargs), num_iters)
    return {
        "mean_us": statistics.fmean(times),
        "median_us": statistics.median(times),
        "min_us": min(times),
        "max_us": max(times),
        "std_us": statistics.pstdev(times),
        "num_iters": num_iters,
    }


def _time_on_gpu(call: Callable[[], Any], iters: int) -> list[float]:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(iters)
    ]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def _time_on_cpu(call: Callable[[], Any], iters: int) -> list[float]:
    times = []
    for _ in range(iters):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def compare_to_sdpa(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    kernel_fn: Callable[..., torch.Tensor],
    scale: float | None = None,
    rtol: float = 1e-3,
    atol: float = 2e-3,
) -> dict[str, Any]:
    """Check ``kernel_fn(Q, K, V, scale=scale)`` against torch's SDPA, and time both.

    Args:
        Q: ``[B, H, S, D]``.
        K: like Q.
        V: like Q.
        kernel_fn: function to compare, such as :func:`sparsek_vllm.attention_forward`.
        scale: factor of the scores, by default ``1 / sqrt(D)``.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Returns:
        ``is_correct``, ``correctness_metrics`` (see :func:`validate_correctness`),
        ``sdpa_time_us`` and ``kernel_time_us`` (medians), ``speedup`` (their ratio) and
        ``input_shape`` as ``{"B", "H", "S", "D"}``.

    Raises:
        ValueError: Q has not four dimensions, or ``kernel_fn`` raises it.
    """
    if Q.ndim != 4:
        raise ValueError(f"Q must have shape [B, H, S, D], got {list(Q.shape)}")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    output = kernel_fn(Q, K, V, scale=scale)
    is_correct, metrics = validate_correctness(output, sdpa(Q, K, V, scale=scale), rtol, atol)
    sdpa_us = benchmark_latency(sdpa, Q, K, V, scale=scale)["median_us"]
    kernel_us = benchmark_latency(kernel_fn, Q, K, V, scale=scale)["median_us"]
    return {
        "is_correct": is_correct,
        "correctness_metrics": metrics,
        "sdpa_time_us": sdpa_us,
        "kernel_time_us": kernel_us,
        "speedup": sdpa_us / kernel_us,
        "input_shape": dict(zip("BHSD", Q.shape, strict=True)),
    }


def print_comparison_summary(comparison: dict[str, Any]) -> None:
    """Print what :func:`compare_to_sdpa` returned."""
    metrics = comparison["correctness_metrics"]
    shape = ", ".join(f"{name}={size}" for name, size in comparison["input_shape"].items())
    verdict = "correct" if comparison["is_correct"] else "WRONG"
    print(f"shape      {shape}")
    print(f"result     {verdict}, max difference {metrics['max_diff']:.3e}")
    if not comparison["is_correct"]:
        print(f"           {metrics['num_mismatches']} of {metrics['num_elements']} elements off")
    print(f"SDPA       {comparison['sdpa_time_us']:.2f} us")
    print(f"kernel     {comparison['kernel_time_us']:.2f} us")
    print(f"speedup    {comparison['speedup']:.2f}x")
