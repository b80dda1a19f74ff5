"""The blocks of README and docs that need a GPU, and what the table of features was told there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from documents import Block

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCKS = [b for b in documents.blocks() if b.needs == {"a GPU"}]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block_runs(block: Block, model: Path, tmp_path: Path) -> None:
    if block.starts_server:
        with documents.Written(block, model):
            for client in (b for b in documents.blocks() if b.asks_server):
                assert documents.run(client, model, tmp_path).strip()
    else:
        documents.run(block, model, tmp_path)


def test_other_backends_say_what_is_written(tmp_path: Path) -> None:
    written, told = DOCS / "peers.json", tmp_path / "peers.json"
    subprocess.run([sys.executable, DOCS / "generate.py", "--ask-peers", told], check=True)
    versions = [json.loads(path.read_text())["vllm"] for path in (written, told)]
    if versions[0] != versions[1]:
        pytest.skip(f"written with vLLM {versions[0]}, installed is {versions[1]}")
    assert told.read_text() == written.read_text()
