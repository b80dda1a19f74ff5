"""The CUDA sources compiled for the host, so that their logic is tested where there is no GPU.

``emulator/`` holds what CUDA and the PTX wrappers are on the host. The ops land in a namespace of
their own for CPU tensors, which ``sparsek_vllm.core`` uses within :func:`emulated_kernels`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sparsek_vllm import build
from sparsek_vllm.core import get_default_config, kernels, ops
from sparsek_vllm.demo_model import cache_root

HERE = Path(__file__).resolve().parent / "emulator"
NAMESPACE = "sparsek_emulated"
MULTIPROCESSORS, CLUSTER = 5, 2
HEAD_DIMS = (32, 64, 80, 128, 256, 512)  # as many as there are ways to lay out a row


def _translate(text: str) -> str:
    """What the host compiler does not know: launches, dynamic shared memory, the CUDA key."""
    text = re.sub(r"(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\((\w+)\)", r"emulator::launch(\1, \2, \3)", text)
    text = re.sub(
        r"extern __shared__ __align__\(\d+\) char (\w+)\[\];",
        r"char* const \1 = emulator::dynamic_shared();",
        text,
    )
    return text.replace("STABLE_TORCH_LIBRARY_IMPL(SPARSEK_NAMESPACE, CUDA", (
        "STABLE_TORCH_LIBRARY_IMPL(SPARSEK_NAMESPACE, CPU"
    ))  # fmt: skip


def _compile(folder: Path) -> Path:
    tools = build.find_tools()
    sources = folder / "csrc"
    shutil.copytree(build.sources(), sources)
    for path in sources.rglob("*.cu*"):
        path.write_text(_translate(path.read_text()))
    for path in HERE.iterdir():
        shutil.copy(path, sources / "common" / path.name)
    include = next(tools.nvcc.resolve().parent.parent.glob("**/include/cuda_fp16.h")).parent
    flags = ["-std=c++20", "-O2", "-march=native", "-fPIC", "-w"]
    flags += ["-x", "c++", "-include", "common/ptx.cuh"]
    flags += [f"-I{sources}", f"-I{include}", f"-I{tools.torch}/include", "-DUSE_CUDA"]
    flags += [f"-DTORCH_TARGET_VERSION={build.TORCH_TARGET}", f"-DSPARSEK_NAMESPACE={NAMESPACE}"]
    flags += [f"-DEMULATED_MULTIPROCESSORS={MULTIPROCESSORS}", f"-DSPARSEK_CLUSTER={CLUSTER}"]
    flags += [f"-DSPARSEK_HEAD_DIMS={','.join(map(str, HEAD_DIMS))}"]

    def run(part: build.Object) -> str:
        output = folder / f"{part.name}.o"
        command = [tools.compiler, *flags, *part.defines, "-c", sources / part.source, "-o", output]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(output)

    with ThreadPoolExecutor(2) as pool:
        runtime = build.Object("runtime", "common/runtime.cpp", [], ())
        parts = build.objects(["90"], HEAD_DIMS)
        objects = list(pool.map(run, [*parts, runtime]))
    library = folder / "emulated.so"
    link = [f"-L{tools.torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    subprocess.run([tools.compiler, "-shared", "-o", library, *objects, *link], check=True)
    return library


def _library() -> Path:
    """The last one that was compiled, if nothing has changed that it is made of."""
    digest = hashlib.sha256(
        repr((torch.__version__, kernels.variant(get_default_config()))).encode()
    )
    for root in (build.sources(), HERE):
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    for path in (Path(__file__), Path(build.__file__)):
        digest.update(path.read_bytes())
    processor = re.search(r"^(flags|Features)\b.*", Path("/proc/cpuinfo").read_text(), re.M)
    digest.update(processor[0].encode() if processor else b"")  # -march=native
    library = cache_root() / "emulated" / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            compiled = _compile(Path(folder))
            for old in library.parent.glob("*.so"):
                old.unlink(missing_ok=True)
            compiled.replace(library)
    return library


@functools.cache
def _load() -> None:
    _kept.append(ops.define(NAMESPACE))
    torch.ops.load_library(str(_library()))


_kept: list[torch.library.Library] = []


def _serving(device: torch.device, head_dim: int = 128) -> kernels.Serving:
    hopper = kernels.wants_hopper(get_default_config())
    return kernels.Serving("emulated", getattr(torch.ops, NAMESPACE), hopper)


@contextlib.contextmanager
def emulated_kernels() -> Iterator[None]:
    """Ops on CPU tensors run the kernels' sources, and count as path "emulated"."""
    _load()
    space = torch.full((kernels.workspace_floats(MULTIPROCESSORS),), torch.nan)
    counters = space[: -MULTIPROCESSORS * kernels.WORKSPACE_FLOATS].zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "serving", _serving)
        patch.setattr(kernels, "workspace", lambda device: space)
        yield
    assert not counters.view(torch.int32).any(), "arrivals are left behind"
