"""The README's Python blocks run as written, with a real model's path for MODEL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def readme_block(heading: str, language: str = "python") -> str:
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)[0]


def run(path: Path, code: str, **environment: str) -> str:
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_xformers_example(tmp_path: Path) -> None:
    check = "\nimport torch; torch.testing.assert_close(out, same)\n"
    run(tmp_path / "example.py", readme_block("xFormers") + check)


def test_offline_example(tmp_path: Path, model: Path) -> None:
    code = readme_block("Offline batches").replace('"MODEL"', repr(str(model)))
    out = run(tmp_path / "example.py", code)
    assert "The sky is" in out and "Two and two" in out


@pytest.mark.parametrize(
    "document",
    [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_to_files(document: Path) -> None:
    if document.name == "api_reference.md":
        return  # published elsewhere, kept verbatim
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
