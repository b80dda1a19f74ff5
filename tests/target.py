"""What the tests of the ops run on: SPARSEK_TEST_DEVICE is cpu, cuda or emulated.

``cpu`` is the reference; ``cuda`` the kernels on a GPU; ``emulated`` the kernels' sources compiled
for the host (see ``emulated.py``).
"""

from __future__ import annotations

import os

import torch

NAME = os.environ.get("SPARSEK_TEST_DEVICE", "cpu")
PATH = {"cpu": "reference", "cuda": "portable", "emulated": "emulated"}[NAME]
DEVICE = torch.device("cuda" if NAME == "cuda" else "cpu")
# Whether the kernels are tested, which take less than the reference.
KERNELS = NAME != "cpu"
