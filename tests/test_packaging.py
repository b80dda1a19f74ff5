"""Installing the package as users do: with kernels, without nvcc, from an sdist, editable."""

from __future__ import annotations

import site
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packages import ROOT, command, pip, wheel_of

from sparsek_vllm import _version, build

SOURCES = ("ops.cu", "params.h", "common/request.cuh", "portable/prefill.cu", "portable/portable.h")
USE = """
import torch
import blackwell_sparsek, sparsek_vllm
from blackwell_sparsek.core import Config
from sparsek_vllm.core import DenseKV, kernels, varlen_attention
q = torch.randn(4, 2, 64)
n = torch.tensor([0, 4], dtype=torch.int32)
print(varlen_attention(q, DenseKV.from_cu_seqlens(q, q, n), n).shape, kernels.describe())
try:
    from blackwell_sparsek import _C
    print("kernels", _C.version(), _C.supported_archs())
except ImportError as error:
    print("ImportError:", error)
print("from", sparsek_vllm.__file__)
"""


def test_messages_tell_to_install_what_the_package_asks_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in (_version.VLLM, _version.XFORMERS, _version.OPENAI):
        assert f'"{requirement}"' in text


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A fresh environment that sees this one's torch, but not its sparsek_vllm."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # A path added by a .pth file has its own .pth files ignored: no editable install comes along.
    (packages / "torch.pth").write_text(f"{site.getsitepackages()[0]}\n")
    return folder / "bin" / "python"


def use(python: Path, tmp_path: Path, **environment: str) -> str:
    out = command(python, "-c", USE, cwd=tmp_path, **environment)
    assert "torch.Size([4, 2, 64])" in out
    return out


def test_wheel_with_kernels(wheel: Path, python: Path, tmp_path: Path) -> None:
    """nvcc and torch are there: the wheel carries kernels for every architecture."""
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"sparsek_vllm/{build.LIBRARY}" in names and "blackwell_sparsek/__init__.py" in names
    assert {f"sparsek_vllm/csrc/{name}" for name in SOURCES} <= set(names)
    pip("install", "--no-deps", wheel, python=python)
    # No compiler is needed any more.
    nowhere = str(tmp_path / "nowhere")
    out = use(python, tmp_path, CUDA_HOME=nowhere, BSK_BUILD_DIR=nowhere)
    assert "installed (" in out and "kernels 0.1.0 ['sm_90a', 'sm_100']" in out
    assert f"from {tmp_path}" in out


def test_without_nvcc(tree: Path, python: Path, tmp_path: Path) -> None:
    """A pure wheel: the CPU path works, and the import of _C says what is missing."""
    nowhere = str(tmp_path / "nowhere")
    wheel = wheel_of(tree, tmp_path / "wheels", CUDA_HOME=nowhere)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"sparsek_vllm/{build.LIBRARY}" not in names
    assert {f"sparsek_vllm/csrc/{name}" for name in SOURCES} <= set(names)
    pip("install", "--no-deps", wheel, python=python)
    out = use(python, tmp_path, CUDA_HOME=nowhere, BSK_BUILD_DIR=nowhere)
    assert "no CUDA kernels in this installation, and cannot compile them" in out
    assert f"nvcc is missing (CUDA_HOME is {nowhere})" in out


def test_compiled_into_the_installed_package(tree: Path, python: Path, tmp_path: Path) -> None:
    """As deploy/Dockerfile does it: no compiler is needed afterwards."""
    pip("install", "--no-deps", tree, python=python, SPARSEK_BUILD="0")
    command(python, "-m", "sparsek_vllm.build", "--in-place", cwd=tmp_path)
    nowhere = str(tmp_path / "nowhere")
    out = use(python, tmp_path, CUDA_HOME=nowhere, BSK_BUILD_DIR=nowhere)
    assert "installed (" in out and "kernels 0.1.0 ['sm_90a', 'sm_100']" in out
    # Not into sources that change.
    with pytest.raises(AssertionError, match="for an installed package, not for a checkout"):
        command(sys.executable, "-m", "sparsek_vllm.build", "--in-place")


def test_a_missing_tool_is_an_error_if_asked_for(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="SPARSEK_BUILD=1, but nvcc is missing"):
        wheel_of(tree, tmp_path, CUDA_HOME=str(tmp_path), SPARSEK_BUILD="1")


def test_editable(tree: Path, python: Path, tmp_path: Path) -> None:
    """Sources are used where they lie, and kernels compile at first use."""
    pip("install", "--no-deps", "--editable", tree, python=python)
    out = use(python, tmp_path)
    assert f"from {tree}/sparsek_vllm/__init__.py" in out
    assert "kernels 0.1.0" in out and ("compiled" in out)


def test_sdist(tree: Path, python: Path, tmp_path: Path) -> None:
    """An sdist holds all that it takes to install from it, and to compile afterwards."""
    code = (
        "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))"
    )
    command(sys.executable, "-c", code, tmp_path, cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip("install", "--no-deps", sdist, python=python, SPARSEK_BUILD="0")
    cache = str(tmp_path / "cache")
    out = command(
        python, "-m", "sparsek_vllm.build", "--arch", "90", cwd=tmp_path, BSK_BUILD_DIR=cache
    )
    assert out.rstrip().endswith(f"/{build.LIBRARY}") and cache in out
    out = use(python, tmp_path, BSK_BUILD_DIR=cache, BSK_CUDA_ARCH="90a", BSK_AUTO_DETECT="0")
    assert "kernels 0.1.0" in out and f"compiled ({cache}" in out
