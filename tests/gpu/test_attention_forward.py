"""What attention_forward refuses on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sparsek_vllm import attention_forward

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_ops_errors import HALF, INF, NAN, SCALE, refuses


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16, device="cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"K": HALF}, "K must be on a CUDA device, got cpu"),
        ({"V": None}, "V must be a torch.Tensor, got NoneType"),
        ({"Q": lambda: half(1, 2, 8, 64).float()}, "Q must be torch.float16, got torch.float32"),
        (
            {"V": lambda: half(1, 2, 8, 64).bfloat16()},
            "V must be torch.float16, got torch.bfloat16",
        ),
        ({"Q": lambda: half(2, 8, 64)}, "Q must have shape [B, H, S, D], got [2, 8, 64]"),
        (
            {"K": lambda: half(1, 2, 9, 64)},
            "K must have the shape of Q, [1, 2, 8, 64], got [1, 2, 9, 64]",
        ),
        (
            dict.fromkeys("QKV", lambda: half(1, 2, 8, 80)),
            "head dimension D must be 64 or 128, got 80",
        ),
        *[({"scale": value}, f"{SCALE} {value}") for value in (0.0, -1.0, NAN, INF)],
    ],
)
def test_attention_forward_refuses_on_cuda(changes, message):
    call = dict.fromkeys("QKV", lambda: half(1, 2, 8, 64)) | changes
    with refuses(message):
        attention_forward(**{name: x() if callable(x) else x for name, x in call.items()})
