"""Compiling the CUDA kernels: one ninja file, three callers.

``setup.py`` builds every architecture into the wheel, the first use builds what the GPU at hand
needs into a cache, and ``python -m sparsek_vllm.build`` does either by hand. A build needs nvcc,
a C++ compiler, ninja and the headers and libraries of torch, not a GPU. Nothing here imports
torch, so that ``setup.py`` can use it in an isolated environment.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY = "sparsek_kernels.so"
# Names a folder where objects are kept: what has not changed is not compiled again.
OBJECT_CACHE = "SPARSEK_OBJECT_CACHE"

# Portable code as sm_90 and sm_100, with PTX for what comes later.
_GENCODE = {
    "90": ("arch=compute_90,code=sm_90",),
    "100": ("arch=compute_100,code=[sm_100,compute_100]",),
}
ARCHS = tuple(_GENCODE)
# A GPU's own kernels, for it alone.
_NATIVE_GENCODE = {"90": ("arch=compute_90a,code=sm_90a",)}

# That kernels are compiled for, as in csrc/ops.cu; shorter heads take the next longer ones'.
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 256, 512)
HOPPER_HEAD_DIMS = (64, 128, 256)
# Of queries; keys and values have the same, or fp8.
DTYPES = ("__half", "__nv_bfloat16")

# The stable ABI of torch 2.10: one binary serves every newer torch and every Python.
TORCH_TARGET = "0x020a000000000000"
_MINIMUM_CUDA = (12, 8)  # the first that knows sm_100
_SHARED_BYTES = 99 * 1024


TILE_FIELDS = ("block_m", "block_n", "num_stages", "num_warps")


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled with. The default is what the wheel carries.

    Attributes:
        block_m: query rows of a prefill tile.
        block_n: key rows of a prefill tile.
        num_stages: prefill tiles in flight.
        num_warps: warps of a prefill thread block.
        fast_math: ``--use_fast_math``.
        lineinfo: ``-lineinfo``.
        debug: assertions in the kernels.
        hopper_warpgroups: those of Hopper's own prefill that compute, 64 query rows each; 0 for as
            many as fill the GPU best.
        hopper_stages: its tiles in flight, if they fit; 0 for as many as are best.
    """

    block_m: int = 128
    block_n: int = 64
    num_stages: int = 2
    num_warps: int = 4
    fast_math: bool = True
    lineinfo: bool = False
    debug: bool = False
    hopper_warpgroups: int = 0
    hopper_stages: int = 0

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Variant, k)}
        return ",".join(f"{name}={value}" for name, value in changed.items()) or "default"

    def problem(self) -> str | None:
        """Why no kernel can have these tiles; None if one can."""
        slice_ = min(16, self.block_n // self.num_warps)
        rows = self.block_m // self.num_warps
        shared = 2 * 128 * (self.block_m + 2 * self.num_stages * self.block_n) + 1024
        if rows not in (16, 32) or self.block_m % self.num_warps:
            return "a warp has 16 or 32 query rows (block_m / num_warps)"
        if slice_ < 4 or 16 % slice_ or self.block_n % (slice_ * self.num_warps):
            return "each warp copies an equal part of block_n"
        if self.num_stages < 2:
            return "num_stages is at least 2"
        if rows * self.block_n > 32 * 64:
            return "scores of more than 32 x 64 a warp do not fit its registers"
        if shared > _SHARED_BYTES:
            return f"tiles take {shared} bytes of shared memory, {_SHARED_BYTES} are allowed"
        return None

    def flags(self) -> list[str]:
        flags = [
            f"-DSPARSEK_{name.upper()}={getattr(self, name)}"
            for name in (*TILE_FIELDS, "hopper_warpgroups", "hopper_stages")
            if getattr(self, name) != getattr(Variant, name)
        ]
        if self.fast_math:
            flags.append("--use_fast_math")
        if self.lineinfo or self.debug:
            flags.append("-lineinfo")
        if self.debug:
            flags.append("-DSPARSEK_DEBUG")
        return flags


DEFAULT = Variant()


@dataclass(frozen=True)
class Tools:
    """What a build needs, found."""

    nvcc: Path
    cuda_version: tuple[int, int]
    torch: Path
    ninja: Path
    compiler: Path


class BuildError(ImportError):
    """Kernels cannot be built; the message says why and what helps."""


def sources() -> Path:
    """The folder ``csrc``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return next(p for p in (package / "csrc", package.parent / "csrc") if (p / "ops.cu").exists())


def installed() -> Path | None:
    """The library that a wheel carries, there or not: the default variant, every architecture.

    None in a checkout, whose sources change: there kernels come out of the cache alone.
    """
    package = Path(__file__).parent.parent
    return package / LIBRARY if sources().parent == package else None


def find_tools() -> Tools:
    """Everything that a build needs.

    Raises:
        BuildError: something is missing; the message names it and how to get it.
    """
    torch = _find_torch()
    if torch is None:
        raise BuildError("torch 2.10 or newer is missing: pip install 'torch>=2.10'")
    nvcc, version = _find_nvcc(torch)
    if nvcc is None:
        raise BuildError(
            f"nvcc is missing (CUDA_HOME is {os.environ.get('CUDA_HOME') or 'not set'}): set "
            "CUDA_HOME to a CUDA toolkit of version "
            f"{'.'.join(map(str, _MINIMUM_CUDA))} or newer, or pip install nvidia-cuda-nvcc "
            "nvidia-cuda-runtime nvidia-cuda-cccl"
        )
    if version < _MINIMUM_CUDA:
        raise BuildError(
            f"nvcc {nvcc} has version {version[0]}.{version[1]}, "
            f"{'.'.join(map(str, _MINIMUM_CUDA))} or newer is needed: set CUDA_HOME to one, or pip "
            "install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
        )
    ninja = _find_program("ninja")
    if ninja is None:
        raise BuildError("ninja is missing: pip install ninja")
    asked = os.environ.get("CXX")
    compiler = _find_program(asked) if asked else _find_program("c++") or _find_program("g++")
    if compiler is None:
        found = f"CXX is {asked}, which is no program" if asked else "a C++ compiler is missing"
        raise BuildError(f"{found}: install g++, or set CXX to a compiler")
    return Tools(nvcc, version, torch, ninja, compiler)


def _find_nvcc(torch: Path) -> tuple[Path | None, tuple[int, int]]:
    """The first toolkit, of those that are new enough and of the major version of torch's CUDA
    if there are any.

    A library of a newer major version than torch's can ask for a newer driver.
    """
    if home := os.environ.get("CUDA_HOME"):
        candidates = [Path(home) / "bin" / "nvcc"]
    else:
        candidates = [Path(p) / "bin" / "nvcc" for p in ("/usr/local/cuda-13.0", "/usr/local/cuda")]
        if on_path := shutil.which("nvcc"):
            candidates.append(Path(on_path))
        # pip's own: nvidia/cu13 from CUDA 13 on, nvidia/cuda_nvcc before.
        for site in _sites():
            candidates += sorted(site.glob("nvidia/*/bin/nvcc"))
    found = [(c, _nvcc_version(c)) for c in candidates if os.access(c, os.X_OK)]
    text = (torch / "version.py").read_text()
    match = re.search(r"^cuda\b.*'(\d+)\.", text, re.M)
    found.sort(
        key=lambda one: (one[1] < _MINIMUM_CUDA, not match or one[1][0] != int(match[1]))
    )  # stable: first come, first served
    return found[0] if found else (None, (0, 0))


def _nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _find_torch() -> Path | None:
    found = importlib.util.find_spec("torch")
    candidates = [Path(found.origin).parent] if found and found.origin else []
    candidates += [site / "torch" for site in _sites()]
    header = "include/torch/csrc/stable/library.h"
    return next((c for c in candidates if (c / header).exists()), None)


def _sites() -> list[Path]:
    """Where packages lie: on the path, and in the environment that an isolated build serves."""
    names = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(name) for name in dict.fromkeys(names) if name]


def _find_program(name: str) -> Path | None:
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None and name == "ninja":
        found = next((str(p) for s in _sites() if (p := s / "ninja/data/bin/ninja").exists()), None)
    return Path(found) if found else None


def _add_files(digest: Any, root: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in sorted(root.rglob(pattern)):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())


def key(tools: Tools, variant: Variant, archs: Sequence[str]) -> str:
    """Name of a build: changes with the sources, the compiler and the flags."""
    digest = hashlib.sha256()
    _add_files(digest, sources(), "*.[ch]u*", "*.h")
    digest.update(Path(__file__).read_bytes())  # the rest of the flags
    made_by = tools.cuda_version, str(tools.compiler), variant, sorted(archs)
    digest.update(repr(made_by).encode())
    return digest.hexdigest()[:16]


def namespace(variant: Variant) -> str:
    """Operator namespace of a variant's library, so that several can be loaded."""
    if variant == DEFAULT:
        return "sparsek"
    return "sparsek_" + hashlib.sha256(repr(variant).encode()).hexdigest()[:12]


def build(
    destination: Path, tools: Tools, variant: Variant, archs: Sequence[str], verbose: bool = False
) -> Path:
    """Compile the kernels into ``destination / LIBRARY``.

    Raises:
        BuildError: the tiles cannot be built, or the compiler fails.
    """
    if problem := variant.problem():
        raise BuildError(f"{variant} cannot be built: {problem}. {buildable()}")
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="objects-", dir=destination) as scratch:
        kept = os.environ.get(OBJECT_CACHE)
        objects_in = Path(kept).expanduser().resolve() if kept else Path(scratch)
        ninja_file = _ninja_file(tools, variant, archs, objects_in)
        (Path(scratch) / "build.ninja").write_text(ninja_file)
        command = [str(tools.ninja), "-C", scratch, *_jobs()]
        run = subprocess.run(
            command, text=True, stdout=None if verbose else subprocess.PIPE, stderr=None
        )
        if run.returncode:
            raise BuildError(f"the kernels do not compile:\n{run.stdout or ''}")
        library = destination / LIBRARY
        os.replace(Path(scratch) / LIBRARY, library)
    return library


def _jobs() -> list[str]:
    jobs = os.environ.get("MAX_JOBS")
    return ["-j", jobs] if jobs else []


class Object(NamedTuple):
    """What the compiler makes of one source, as a part of the library."""

    name: str
    source: str
    defines: list[str]
    gencode: tuple[str, ...]


def objects(archs: Sequence[str], head_dims: Sequence[int] = HEAD_DIMS) -> Iterator[Object]:
    """What a library is linked from."""
    gencode = tuple(code for arch in archs for code in _GENCODE[arch])
    kernels = [("portable/prefill", gencode), ("portable/decode", gencode)]
    hopper = "90" in archs
    if hopper:
        kernels += [(f"sm90/{kernel}", _NATIVE_GENCODE["90"]) for kernel in ("prefill", "decode")]
    for kernel, code in kernels:
        sizes = HOPPER_HEAD_DIMS if kernel.startswith("sm90") else head_dims
        softcaps = (False, True) if kernel == "sm90/prefill" else (False,)
        for dtype, kv, head_dim, softcap in product(DTYPES, (None, "E4M3"), sizes, softcaps):
            if kernel == "sm90/prefill" and kv and softcap:
                continue  # see has_prefill() in csrc/sm90/sm90.h
            defines = [
                f"-DSPARSEK_DTYPE={dtype}",
                f"-DSPARSEK_KV={kv or dtype}",
                f"-DSPARSEK_HEAD_DIM={head_dim}",
                f"-DSPARSEK_SOFTCAP={str(softcap).lower()}",
            ]
            parts = [kernel.replace("/", "_"), dtype.strip("_"), kv, head_dim]
            parts += ["softcap"] if softcap else []
            name = "_".join(str(part) for part in parts if part)
            yield Object(name, f"{kernel}.cu", defines, code)
    yield Object("cache", "portable/cache.cu", [], gencode)
    yield Object("merge", "portable/merge.cu", [], gencode)
    yield Object("ops", "ops.cu", ["-DSPARSEK_SM90"] if hopper else [], gencode)


def _object_names(tools: Tools, flags: Sequence[str]) -> Callable[[Object], str]:
    """File names of objects, which change with all that they are made of."""
    root = sources()
    made_by = tools.nvcc, tools.cuda_version, tools.compiler, flags
    common = hashlib.sha256(repr(made_by).encode())
    _add_files(common, root, "*.cuh", "*.h")
    common.update((tools.torch / "version.py").read_bytes())

    def name(part: Object) -> str:
        digest = common.copy()
        digest.update(repr(part).encode() + (root / part.source).read_bytes())
        return f"{part.name}-{digest.hexdigest()[:16]}.o"

    return name


def _for_ninja(path: Path) -> str:
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def _ninja_file(tools: Tools, variant: Variant, archs: Sequence[str], objects_in: Path) -> str:
    """What compiles those objects that are not in ``objects_in`` yet, and links all."""
    root = sources()
    home = tools.nvcc.resolve().parent.parent
    flags = ["-std=c++17", "-O3", *variant.flags()]
    flags += [f"-ccbin {tools.compiler}", "-Xcompiler -fPIC,-fvisibility=hidden", "--threads 2"]
    if "site-packages" in home.parts or "nvidia" in home.parts:
        # pip's parts of the toolkit may differ in version from each other.
        flags += ["-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK", f"-I{home}/include"]
    torch_flags = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        "-DUSE_CUDA",
        f"-DSPARSEK_NAMESPACE={namespace(variant)}",
        f"-I{tools.torch}/include",
    ]
    cuda_libraries = [p for p in (home / "lib64", home / "lib") if p.exists()]
    link = [f"-L{p}" for p in cuda_libraries] + [
        # Static, and nothing else of CUDA: the library loads on a machine without a driver.
        "-lcudart_static -lrt -lpthread -ldl",
        f"-L{tools.torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu",
        "-Wl,--exclude-libs,ALL",
    ]
    lines = [
        "ninja_required_version = 1.5",
        f"nvcc = {tools.nvcc}",
        f"flags = {' '.join(flags)}",
        "rule compile",
        # Whole or not there, for others that use the same folder.
        "  command = $nvcc $flags $extra -c $in -o $out.$$$$ && mv $out.$$$$ $out",
        "rule link",
        f"  command = {tools.compiler} -shared -o $out $in {' '.join(link)}",
    ]
    name_of = _object_names(tools, [*flags, *torch_flags])
    paths = []
    for part in objects(archs):
        path = objects_in / name_of(part)
        paths.append(_for_ninja(path))
        if path.exists():
            continue
        extra = [*part.defines, *(f"-gencode {code}" for code in part.gencode)]
        extra += torch_flags if part.name == "ops" else []
        lines.append(f"build {paths[-1]}: compile {_for_ninja(root / part.source)}")
        lines.append(f"  extra = {' '.join(extra)}")
    lines.append(f"build {LIBRARY}: link {' '.join(paths)}")
    lines.append(f"default {LIBRARY}")
    return "\n".join(lines) + "\n"


def cache_folder(folder: str | None) -> Path:
    """Where compiled kernels are kept, if ``folder`` says nothing else."""
    return Path(folder or "~/.cache/blackwell_sparsek/build").expanduser()


def cached(directory: Path, variant: Variant, archs: Sequence[str], verbose: bool = False) -> Path:
    """The library from the cache in ``directory``, compiled first where it is not there yet.

    Processes that want the same build at once compile it once.

    Raises:
        BuildError: it is not there and cannot be compiled.
    """
    tools = find_tools()
    folder = directory / key(tools, variant, archs)
    library = folder / LIBRARY
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory / f"{folder.name}.lock"):
        if not library.exists():
            with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=directory) as scratch:
                print(f"sparsek-vllm: compiling CUDA kernels into {folder} ...", file=sys.stderr)
                built = build(Path(scratch), tools, variant, archs, verbose)
                folder.mkdir(exist_ok=True)
                os.replace(built, library)
    return library


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


HOPPER_TILES = (
    "those of Hopper's own prefill are: block_m 128, 192 or 256, num_warps a sixteenth of it, "
    "block_n 128, num_stages 3 to 6; where registers are short there are fewer rows or keys"
)


def hopper_tiles(tiles: Mapping[str, int]) -> dict[str, int] | None:
    """The fields of :class:`Variant` by which Hopper's own prefill has these tiles, if it can.

    Args:
        tiles: some of ``TILE_FIELDS``; the others are chosen.
    """
    rows = {
        tiles[name] * each for name, each in (("block_m", 1), ("num_warps", 16)) if name in tiles
    }
    stages = tiles.get("num_stages", 0)
    if len(rows) > 1 or rows - {128, 192, 256} or stages not in (0, *range(3, 7)):
        return None
    if tiles.get("block_n", 128) != 128:
        return None
    return {"hopper_warpgroups": sum(rows) // 64, "hopper_stages": stages}


def buildable() -> str:
    """The tiles that can be built, as a sentence."""
    tiles = [
        f"({m}, {n}, {stages}, {warps})"
        for m in (128, 192, 256)  # 64 is the default of Config, which stands for ours
        for n in (32, 64, 96, 128, 160, 176, 256)
        for stages in range(1, 9)
        for warps in (4, 8, 12, 16)
        if Variant(m, n, stages, warps).problem() is None
    ]
    return f"(block_m, block_n, num_stages, num_warps) can be {', '.join(tiles)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sparsek_vllm.build``: compile the default variant now, into the cache."""
    parser = argparse.ArgumentParser(prog="python -m sparsek_vllm.build", description=main.__doc__)
    parser.add_argument(
        "--arch",
        choices=ARCHS,
        action="append",
        help="architecture to compile for; can be repeated (default: all)",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--into", type=Path, help="folder for one library of all architectures")
    place.add_argument(
        "--in-place",
        action="store_true",
        help="one library inside the installed package, as a wheel with kernels carries it",
    )
    parser.add_argument("--verbose", action="store_true", help="show the compiler at work")
    options = parser.parse_args(arguments)
    archs = options.arch or ARCHS
    library = installed()
    if options.in_place and library is None:
        parser.error("--in-place is for an installed package, not for a checkout")
    folder = library.parent if options.in_place and library else options.into
    try:
        if folder:
            print(build(folder, find_tools(), DEFAULT, archs, options.verbose))
        else:
            cache = cache_folder(os.environ.get("BSK_BUILD_DIR"))
            # One library each: the first use looks for that of its GPU alone.
            for arch in archs:
                print(cached(cache, DEFAULT, [arch], options.verbose))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
