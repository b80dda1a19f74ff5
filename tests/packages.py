"""Packages of this checkout, made as users make them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: str | Path, python: str | Path = sys.executable, **environment: str) -> str:
    return command(python, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


def copy_tracked(folder: Path) -> Path:
    """A clean copy of what git tracks."""
    for name in command("git", "ls-files").splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def wheel_of(folder: Path, target: Path, **environment: str) -> Path:
    pip("wheel", "--no-deps", "--wheel-dir", target, folder, **environment)
    (wheel,) = target.glob("*.whl")
    return wheel
