"""The blocks of README and docs that need a GPU."""

from __future__ import annotations

from pathlib import Path

import documents
import pytest
from documents import Block

BLOCKS = [b for b in documents.blocks() if b.needs == {"a GPU"}]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block_runs(block: Block, model: Path, tmp_path: Path) -> None:
    if block.starts_server:
        with documents.Written(block, model):
            for client in (b for b in documents.blocks() if b.asks_server):
                assert documents.run(client, model, tmp_path).strip()
    else:
        documents.run(block, model, tmp_path)
