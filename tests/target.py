"""What the tests of the ops run on: SPARSEK_TEST_DEVICE is cpu, cuda or emulated.

``cpu`` is the reference; ``cuda`` the kernels on a GPU; ``emulated`` the kernels' sources compiled
for the host (see ``emulated.py``). Of the last two, BSK_KERNELS says which kernels.
"""

from __future__ import annotations

import os

import torch

from sparsek_vllm import build
from sparsek_vllm.core import get_default_config, kernels

NAME = os.environ.get("SPARSEK_TEST_DEVICE", "cpu")
_ON_CUDA = "portable" if os.environ.get("BSK_KERNELS") == "portable" else "hopper"
PATH = {"cpu": "reference", "cuda": _ON_CUDA, "emulated": "emulated"}[NAME]


def path(head_dim: int) -> str:
    """Of attention over heads of that size."""
    return "portable" if NAME == "cuda" and head_dim > max(build.HOPPER_HEAD_DIMS) else PATH


def counter(op: str, head_dim: int = 128) -> str:
    """The name under which a call of an op is counted: only attention has Hopper's own kernels."""
    of_attention = "attention" in op
    own = path(head_dim)
    return f"{op}:{own if of_attention or own != 'hopper' else 'portable'}"


DEVICE = torch.device("cuda" if NAME == "cuda" else "cpu")
# Whether the kernels are tested, which take less than the reference.
KERNELS = NAME != "cpu"
HOPPER = KERNELS and kernels.wants_hopper(get_default_config())
# What Hopper's prefill may be off by over fp8 keys: queries have 9 bits there, and tensor cores
# lose up to 2^-9 of a sum of products of fp8 that have one sign.
FP8_LSE_RTOL = 2**-9
FP8_LSE_ATOL = {torch.float16: 4e-3, torch.bfloat16: 1e-3}
