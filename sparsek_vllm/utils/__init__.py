"""Timing and checking attention functions."""

from sparsek_vllm.utils.benchmark import (
    benchmark_latency,
    compare_to_sdpa,
    print_comparison_summary,
)
from sparsek_vllm.utils.validation import validate_correctness

__all__ = [
    "benchmark_latency",
    "compare_to_sdpa",
    "print_comparison_summary",
    "validate_correctness",
]
