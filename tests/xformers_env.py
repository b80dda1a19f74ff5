"""Environments that tests of the xFormers backend need: other versions, or none at all."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def packages_without(folder: Path, *names: str) -> Path:
    """Fill ``folder`` with links to all installed packages but ``names``."""
    for packages in map(Path, site.getsitepackages()):
        for entry in packages.iterdir() if packages.is_dir() else ():
            link = folder / entry.name
            if not entry.name.startswith(names) and not link.exists():
                link.symlink_to(entry)
    return folder


def run_python(code: str, *paths: Path, isolated: bool = False) -> str:
    """Output of ``code`` in a new interpreter that looks in ``paths``, then here.

    ``isolated``: nowhere else but in the standard library.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    flags = ["-S"] if isolated else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
