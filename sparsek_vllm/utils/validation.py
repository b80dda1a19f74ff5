"""Comparing an output with a reference."""

from __future__ import annotations

from typing import Any

import torch


def validate_correctness(
    output: torch.Tensor,
    reference: torch.Tensor,
    rtol: float = 1e-3,
    atol: float = 2e-3,
) -> tuple[bool, dict[str, Any]]:
    """Whether ``|output - reference| <= atol + rtol * |reference|`` everywhere.

    Differences are taken in float64. A NaN matches nothing; equal infinities match.

    Args:
        output: what is checked.
        reference: what it should be, of the same shape.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Returns:
        ``(is_correct, metrics)``; metrics hold ``max_diff``, ``mean_diff``, ``median_diff``,
        ``num_elements``, ``num_mismatches``, ``mismatch_rate`` (percent), and, for the largest
        difference, ``worst_diff_location`` (its index), ``worst_diff_output`` and
        ``worst_diff_reference``.

    Raises:
        ValueError: shapes differ, or the tensors are empty.
    """
    if output.shape != reference.shape:
        raise ValueError(
            f"output must have the shape of reference, {list(reference.shape)}, "
            f"got {list(output.shape)}"
        )
    if output.numel() == 0:
        raise ValueError("output must have at least one element, got an empty tensor")
    out, ref = output.detach().double(), reference.detach().double().to(output.device)
    diff = (out - ref).abs().masked_fill_(out == ref, 0.0)
    # An infinite reference allows no difference, and a NaN fails every comparison.
    mismatch = ~(diff <= atol + rtol * ref.abs().masked_fill(ref.isinf(), 0.0))
    # NaN counts as worse than any number.
    worst = int(diff.nan_to_num(nan=torch.inf, posinf=torch.inf).argmax())
    location = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), diff.shape))
    mismatches = int(mismatch.sum())
    metrics = {
        "max_diff": float(diff[location]),
        "mean_diff": float(diff.mean()),
        "median_diff": float(diff.median()),
        "num_elements": diff.numel(),
        "num_mismatches": mismatches,
        "mismatch_rate": 100.0 * mismatches / diff.numel(),
        "worst_diff_location": location,
        "worst_diff_output": float(out[location]),
        "worst_diff_reference": float(ref[location]),
    }
    return mismatches == 0, metrics
