"""Python sources of packages that are only read, out of their wheels."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sparsek_vllm.demo_model import cache_root

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_35_x86_64", "manylinux2014_x86_64")


def wheel_sources(name: str, version: str, *prefixes: str) -> Path:
    """Folder with the ``*.py`` files of a wheel, downloaded once; only those under ``prefixes``."""
    target = cache_root() / "wheels" / f"{name}-{version}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", "3.12", "--abi", "abi3"]
        command += [word for p in _PLATFORMS for word in ("--platform", p)]
        subprocess.run([*command, "--dest", scratch, f"{name}=={version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        sources = Path(scratch) / "sources"
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".py") and member.startswith(prefixes or ("",)):
                    archive.extract(member, sources)
        sources.rename(target)
    return target
