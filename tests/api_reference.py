"""The code blocks of docs/api_reference.md, and what each needs to run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "api_reference.md"

_TENSORS = """
import time, torch
from blackwell_sparsek import attention_forward
B, H, S = 2, 8, 512
Q, K, V = (torch.randn(B, H, S, 64, dtype=torch.float16, device={device!r}) for _ in range(3))
Q_cpu = Q.cpu()
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: the language, the heading above it, its place under that, its text."""

    language: str
    heading: str
    index: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.heading}#{self.index}"


def blocks() -> list[Block]:
    """All of them, in order."""
    document = DOCUMENT.read_text()
    found: list[Block] = []
    for match in re.finditer(r"```(\w+)\n(.*?)```", document, re.S):
        heading = re.findall(r"^#+ `?(.*?)`?$", document[: match.start()], re.M)[-1]
        heading = heading.removeprefix("blackwell_sparsek.")
        index = sum(block.heading == heading for block in found)
        found.append(Block(match[1], heading, index, match[2]))
    return found


def prelude(device: str) -> str:
    """Defines the names that the examples leave free."""
    return _TENSORS.format(device=device)


# Blocks that only describe: a signature (checked against the code) or what a function returns.
SIGNATURES = {
    "attention_forward()#0",
    "utils.benchmark_latency()#0",
    "utils.validate_correctness()#0",
    "utils.compare_to_sdpa()#0",
    "core.get_default_config()#0",
    "core.get_build_info()#0",
}
CLASSES = {"core.Config#0", "backends.SparseKAttention#0", "backends.SparseKBackend#0"}
RETURNS = {
    "utils.benchmark_latency()#1",
    "utils.validate_correctness()#1",
    "utils.compare_to_sdpa()#1",
    "core.get_build_info()#1",
}
SHELL = {"backends.SparseKBackend#1", "Environment Variables#0"}
ON_CPU = {
    "core.Config#1",
    "core.get_default_config()#1",
    "core.get_build_info()#2",
    "backends.SparseKBackend#2",
    "Common Exceptions#0",
    "Common Exceptions#2",
    "__version__#0",
}
ON_GPU = {
    "attention_forward()#1",
    "utils.benchmark_latency()#2",
    "utils.validate_correctness()#2",
    "utils.compare_to_sdpa()#2",
    "backends.SparseKAttention#1",
    "Common Exceptions#1",
    "_C.version()#0",
    "_C.cuda_arch()#0",
    "_C.supported_archs()#0",
    "Performance Tips#0",
}
