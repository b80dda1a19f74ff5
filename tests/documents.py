"""The code blocks of README and docs, and how each is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from sparsek_vllm.demo import Server

ROOT = Path(__file__).resolve().parent.parent
# api_reference.md is published elsewhere and kept verbatim; test_api_reference.py runs it.
DOCUMENTS = [
    ROOT / "README.md",
    *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "api_reference.md"),
]
# What a block can need that CI has not. Those that need a GPU alone run in `make test-gpu`.
NEEDS = {"a GPU", "two GPUs", "Docker", "Kubernetes", "Ray"}


@dataclass(frozen=True)
class Block:
    """A fenced block of commands or Python."""

    document: Path
    line: int
    language: str
    text: str
    needs: frozenset[str]

    @property
    def name(self) -> str:
        return f"{self.document.name}:{self.line}"

    @property
    def starts_server(self) -> bool:
        return self.language == "bash" and bool(re.search(r"vllm serve|api_server", self.text))

    @property
    def asks_server(self) -> bool:
        return "OpenAI(" in self.text


def blocks() -> list[Block]:
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        pattern = r"(?:<!-- needs: (.*?) -->\n)?^( *)```(bash|python)\n(.*?)^ *```$"
        for match in re.finditer(pattern, text, re.S | re.M):
            needs = frozenset(filter(None, (match[1] or "").split(", ")))
            line = text[: match.start(3)].count("\n") + 1
            body = re.sub(rf"^{match[2]}", "", match[4], flags=re.M)
            found.append(Block(document, line, match[3], body, needs))
    return found


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return {**kept, "PATH": path}


def command(block: Block, model: Path) -> str:
    """The block with a model in place, without what would run this test from within itself."""
    text = re.sub(r"\bMODEL\b(?!=)", str(model), block.text)
    text = re.sub(r"^make (?!demo)", "make -n ", text, flags=re.M)
    return re.sub(r"^(.* -m pytest .*)$", r"\1 --collect-only -q", text, flags=re.M)


def run(block: Block, model: Path, folder: Path) -> str:
    """Runs a block to its end; asserts that it succeeds."""
    if block.language == "python":
        script = folder / "example.py"
        script.write_text(block.text.replace('"MODEL"', repr(str(model))))
        arguments, where = [sys.executable, str(script)], folder
    else:
        arguments = ["bash", "-euo", "pipefail", "-c", command(block, model)]
        # It writes files.
        where = folder if "sparsek bench" in block.text else ROOT
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=where, env=environment(), timeout=900
    )
    assert done.returncode == 0, f"{block.name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Written(Server):
    """The server that a block starts, on port 8000 as it is written."""

    def __init__(self, block: Block, model: Path) -> None:
        super().__init__(model, port=8000, timeout=600)
        path = environment()["PATH"]
        self.command = ["env", f"PATH={path}", "bash", "-euo", "pipefail", "-c"]
        self.command.append(command(block, model))

    def __enter__(self) -> Written:
        super().__enter__()
        with urllib.request.urlopen(f"{self.url}/metrics") as metrics:
            assert b"sparsek:attention_info{" in metrics.read()
        return self
