"""Examples of the published API reference that need a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import api_reference as reference

BLOCKS = {block.name: block for block in reference.blocks()}


@pytest.mark.parametrize("name", sorted(reference.ON_GPU))
def test_example_runs(name: str) -> None:
    code = reference.prelude("cuda") + BLOCKS[name].text
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
