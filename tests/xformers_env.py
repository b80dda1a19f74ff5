"""Environments that tests of the xFormers backend need: other versions, or none at all."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Wheels of the stable ABI serve every Python, which pip only believes when it is told so.
_TAGS = [
    "--only-binary=:all:",
    "--implementation=cp",
    "--abi=abi3",
    "--python-version=3.9",
    "--platform=manylinux_2_28_x86_64",
]


def wheel_sources(name: str, version: str) -> Path:
    """A folder with the Python files alone of a wheel, downloaded once."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = base / "sparsek_vllm" / "wheels"
    cache.mkdir(parents=True, exist_ok=True)
    wheels = list(cache.glob(f"{name}-{version}-*.whl"))
    if not wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *_TAGS]
        subprocess.run([*pip, "--dest", cache, f"{name}=={version}"], check=True)
        wheels = list(cache.glob(f"{name}-{version}-*.whl"))
    sources = cache / f"{name}-{version}-sources"
    with zipfile.ZipFile(wheels[0]) as archive:
        names = [entry for entry in archive.namelist() if entry.endswith(".py")]
        if not all((sources / entry).exists() for entry in names):
            archive.extractall(sources, names)
    return sources


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
