"""The kernels compile, and what came out is what it should be. No GPU is needed."""

from __future__ import annotations

import functools
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsek_vllm import build
from sparsek_vllm.bench import floor
from sparsek_vllm.core import Config, get_default_config, kernels, set_default_config

CUOBJDUMP = next(
    (p for s in sys.path for p in Path(s).glob("nvidia/*/bin/cuobjdump")), Path("cuobjdump")
)
# Registers of the widest kernel, by thread block: two fit on a multiprocessor.
REGISTERS = 255


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels for sm_90, from the cache if they were compiled before."""
    return build.cached(Config().build_path(), build.DEFAULT, ["90"])


# Decode has ten warps: three of them share a quarter of a multiprocessor's registers. Prefill has
# one to four warpgroups that compute, and one more, or two with fp8.
DECODE_REGISTERS = 168
PREFILL_REGISTERS = {1: 232, 2: 168, 3: 128, 4: 96}
# Dtype, fp8 or not, head_dim; two tiles of rows or one (at 256 one), wide, general.
HOPPER_DECODE = 2 * 2 * (4 + 4 + 3)
# Dtype, head_dim; without softcap, with it, and over fp8: one warpgroup, two, and the most, which
# is four at 64, but three over fp8, and three at 128.
HOPPER_PREFILL = 2 * ((3 + 2 + 3) + (3 + 3 + 2) + (2 + 2 + 2))


@pytest.fixture(scope="module")
def wheel_library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of the wheel, for all architectures."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(
            archive.extract(f"sparsek_vllm/{build.LIBRARY}", tmp_path_factory.mktemp("all"))
        )


@functools.cache
def dump(library: Path, *options: str) -> str:
    """Disassembling a library takes minutes."""
    return subprocess.run(
        [CUOBJDUMP, *options, library], capture_output=True, text=True, check=True
    ).stdout


def test_no_local_memory_and_registers_in_budget(wheel_library: Path) -> None:
    """For both architectures: nothing spills, and no array is indexed at run time."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        dump(wheel_library, "-res-usage"),
    )
    attention = [u[0] for u in usage if "prefill_kernel" in u[0] or "decode_kernel" in u[0]]
    # Kernel, dtype, fp8 or not, head_dim, general, architecture.
    portable = 2 * 2 * 2 * len(build.HEAD_DIMS) * 2 * 2
    assert sum("portable" in name for name in attention) == portable
    assert sum("sm90" in name for name in attention) == HOPPER_DECODE + HOPPER_PREFILL
    assert len(attention) == portable + HOPPER_DECODE + HOPPER_PREFILL
    for name, registers, stack, _, local in usage:
        assert int(stack) == 0 and int(local) == 0, name
        assert int(registers) <= REGISTERS, name


def test_tensor_cores_and_asynchronous_copies_are_used(library: Path) -> None:
    sass = dump(library, "-sass")
    for function in sass.split("Function : ")[1:]:
        name = function.split()[0]
        if "portable" not in name or ("prefill_kernel" not in name and "decode_kernel" not in name):
            continue
        for instruction in ("HMMA.16816.F32", "LDSM", "LDGSTS"):
            assert instruction in function, (name, instruction)
        assert not re.search(r"\b(LDL|STL)\b", function), name


def functions(library: Path, part: str) -> dict[str, str]:
    """SASS of the functions whose name contains ``part``."""
    found = [f for f in dump(library, "-sass").split("Function : ")[1:] if part in f.split()[0]]
    return {function.split()[0]: function for function in found}


def prefill_groups(name: str) -> int:
    """Warpgroups that compute, of a block of Hopper's own prefill."""
    return int(name.split("EEEv")[0][-1])


def prefill_keys(name: str) -> int:
    """Of a tile."""
    long, fp8 = "Li256E" in name, "E4M3" in name
    return 64 if prefill_groups(name) > 2 or (long and fp8) else 80 if long else 128


def prefill_products(name: str) -> list[str]:
    """Scores, then values: at head size 256 over fp8 half of the columns at a time."""
    head_dim, fp8 = int(re.search(r"Li(64|128|256)E", name)[1]), "E4M3" in name
    scores = f"QGMMA.64x{prefill_keys(name)}x32" if fp8 else f"HGMMA.64x{prefill_keys(name)}x16"
    return [scores, f"HGMMA.64x{min(head_dim, 128) if fp8 else head_dim}x16"]


@pytest.mark.parametrize(
    ("kernel", "count", "wanted"),
    [
        ("decode", HOPPER_DECODE, "UTMALDG.5D SYNCS HMMA.16816.F32 LDSM MOVM ACQBULK"),
        (
            "prefill",
            HOPPER_PREFILL,
            "UTMALDG.5D SYNCS WARPGROUP.DEPBAR USETMAXREG ACQBULK",
        ),
    ],
)
def test_hopper_kernels_use_what_hopper_has(
    library: Path, kernel: str, count: int, wanted: str
) -> None:
    """Tensor copies both ways, barriers in shared memory, wgmma; nothing spills."""
    found = functions(library, "sm90")
    found = {name: code for name, code in found.items() if f"{kernel}_kernel" in name}
    assert len(found) == count
    for name, function in found.items():
        for instruction in wanted.split():
            assert instruction in function, (name, instruction)
        assert not re.search(r"\b(LDL|STL)\b", function), name
        if kernel == "prefill":
            assert all(product in function for product in prefill_products(name)), name
            # Rows leave by way of their queries' place: see kLeavesByPlace.
            by_place = "Li128E" in name if "E4M3" in name else prefill_groups(name) > 2
            assert ("UTMASTG.5D" in function and "STSM" in function) == by_place, name
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", dump(library, "-res-usage"))
    for name, registers, stack in usage:
        if name in found:
            groups = prefill_groups(name) if kernel == "prefill" else 0
            groups += "E4M3" in name and groups > 0
            budget = PREFILL_REGISTERS[groups] if groups else DECODE_REGISTERS
            assert int(registers) <= budget and int(stack) == 0, name


def test_exponentials_run_under_the_product(library: Path) -> None:
    """In the loop's order: scores are waited for, exponentials, then the product with values."""
    found = functions(library, "prefill_kernel")
    checked = 0
    for name, code in found.items():
        if "sm90" in name:
            between = code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1")[1].split("WARPGROUP.DEPBAR")[0]
            assert between.count("MUFU.EX2") >= prefill_keys(name) // 2, name
            checked += 1
    assert checked == HOPPER_PREFILL


def compile_command(name: str, variant: build.Variant, output: Path) -> list[str]:
    """How a part of the library is compiled."""
    tools = build.find_tools()
    part = next(part for part in build.objects(["90"]) if part.name == name)
    command = [
        tools.nvcc, "-std=c++17", "-O3", *variant.flags(), "-ccbin", tools.compiler,
        *(f"-gencode={code}" for code in part.gencode), *part.defines,
        "-c", build.sources() / part.source, "-o", output,
    ]  # fmt: skip
    return [str(word) for word in command]


@pytest.mark.parametrize(
    ("part", "variant"),
    [
        ("64", build.DEFAULT),
        ("64", build.Variant(hopper_stages=3)),
        ("64_softcap", build.DEFAULT),
        ("E4M3_64", build.DEFAULT),
        ("128", build.DEFAULT),
        ("128_softcap", build.DEFAULT),
        ("E4M3_128", build.DEFAULT),
        ("256", build.DEFAULT),
        ("256_softcap", build.DEFAULT),
        ("E4M3_256", build.DEFAULT),
    ],
    ids=str,
)
def test_products_are_asynchronous(part: str, variant: build.Variant, tmp_path: Path) -> None:
    """ptxas says so when it has to make wgmma wait, and goes on."""
    command = compile_command(f"sm90_prefill_nv_bfloat16_{part}", variant, tmp_path / "o")
    command += ["-Xptxas", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "registers" in done.stderr and "erialized" not in done.stderr, done.stderr
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}


def test_hopper_kernels_are_for_hopper_alone(library: Path) -> None:
    elf = set(re.findall(r"sm_(\d+\w?)\.cubin", dump(library, "-lelf")))
    assert elf == {"90", "90a"}
    assert not [o for o in build.objects(["100"]) if "sm90" in o.source]


def test_architectures_of_the_wheel(wheel_library: Path) -> None:
    """Machine code for Hopper and Blackwell, and PTX for what comes later."""
    elf = re.findall(r"sm_(\d+\w?)\.cubin", dump(wheel_library, "-lelf"))
    ptx = re.findall(r"sm_(\d+\w?)\.ptx", dump(wheel_library, "-lptx"))
    assert set(elf) == {"90", "90a", "100"} and set(ptx) == {"100"}


def test_what_has_not_changed_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(build.sources(), tmp_path / "csrc")
    monkeypatch.setattr(build, "sources", lambda: copy)
    tools, kept = build.find_tools(), tmp_path / "objects"
    kept.mkdir()

    def compiled(variant: build.Variant = build.DEFAULT) -> list[str]:
        """What is compiled now, and kept from now on."""
        text = build._ninja_file(tools, variant, ["90"], kept)
        made = re.findall(r"^build (\S+): compile (\S+)", text, re.M)
        for path, _ in made:
            Path(path).touch()
        return sorted({str(Path(source).relative_to(copy)) for _, source in made})

    everything = compiled()
    assert {"ops.cu", "sm90/decode.cu", "portable/merge.cu"} < set(everything)
    assert compiled() == []
    assert compiled(build.Variant(lineinfo=True)) == everything
    with (copy / "sm90" / "decode.cu").open("a") as file:
        file.write("// changed\n")
    assert compiled() == ["sm90/decode.cu"]
    with (copy / "common" / "split.cuh").open("a") as file:
        file.write("// changed\n")
    assert compiled() == everything


def test_the_library_loads_without_cuda(library: Path) -> None:
    """It needs libraries of torch and of the system, none of CUDA."""
    out = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", out))
    assert needed >= {"libtorch.so", "libtorch_cpu.so"}
    assert not any("cuda" in name or "cublas" in name or "c10" in name for name in needed)


def test_variants_compile_within_their_budget(tmp_path: Path) -> None:
    """10 s and 1 GB for each."""
    for name in (
        "portable_prefill_half_128",
        "portable_decode_half_256",
        "sm90_prefill_half_128",
        "sm90_prefill_half_128_softcap",
        "sm90_prefill_half_E4M3_128",
        "sm90_prefill_half_256",
        "sm90_prefill_half_256_softcap",
        "sm90_prefill_half_E4M3_256",
        "sm90_decode_half_128",
        "sm90_decode_half_E4M3_128",
    ):
        command = compile_command(name, build.DEFAULT, tmp_path / "o")
        code = (
            "import resource, subprocess, sys\n"
            "subprocess.run(sys.argv[1:], check=True)\n"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
            "print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True
        )
        seconds, kilobytes = map(float, done.stdout.split())
        print(f"{name}: {seconds:.1f} CPU seconds, {kilobytes / 1e6:.2f} GB")
        assert seconds < 10 and kilobytes < 1e6


def test_the_floor_benchmark_compiles(tmp_path: Path) -> None:
    program = floor.compiled(tmp_path)
    assert "UBLKCP" in dump(program, "-sass")
    assert floor.compiled(tmp_path) == program and [*tmp_path.iterdir()] == [program]


def test_an_old_compiler_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(folder: Path, version: str) -> Path:
        folder.mkdir(parents=True)
        path = folder / "nvcc"
        path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V0\n")
        path.chmod(0o755)
        return path

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '12.9'\n")
    old = compiler(tmp_path / "old", "12.4")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{old.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(build, "_sites", lambda: [tmp_path / "site"])
    new = compiler(tmp_path / "site" / "nvidia" / "cuda_nvcc" / "bin", "12.9")
    assert build._find_nvcc(tmp_path / "torch") == (new, (12, 9))


def test_a_compiler_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX is no-such-compiler, which is no program"):
        build.find_tools()


def test_nvcc_from_pip(tmp_path: Path) -> None:
    """The compiler that vLLM's own environment holds: no CUDA toolkit is needed."""
    packages = ["nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path), *packages]
    subprocess.run(install, check=True)
    (home,) = {path.parent.parent for path in tmp_path.glob("nvidia/*/bin/nvcc")}
    done = subprocess.run(
        [sys.executable, "-m", "sparsek_vllm.build", "--arch", "90", "--into", tmp_path / "out"],
        env={**os.environ, "CUDA_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / build.LIBRARY).exists()


BY_HAND = [sys.executable, "-m", "sparsek_vllm.build"]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A cache that two processes filled at the same time, and what they printed."""
    folder = tmp_path_factory.mktemp("a cache")
    environment = {**os.environ, "BSK_BUILD_DIR": str(folder)}
    processes = [
        subprocess.Popen(BY_HAND, env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    return folder, [process.communicate() for process in processes]


def cpu_seconds() -> float:
    """Of processes that have ended: others on the machine have no say."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_two_processes_compile_once(by_hand: tuple[Path, list[tuple[str, str]]]) -> None:
    folder, results = by_hand
    assert results[0][0] == results[1][0]
    compiled = sum(errors.count("compiling CUDA kernels") for _, errors in results)
    assert compiled == len(build.ARCHS)
    before = cpu_seconds()
    environment = {**os.environ, "BSK_BUILD_DIR": str(folder)}
    again = subprocess.run(BY_HAND, env=environment, capture_output=True, text=True)
    assert again.stdout == results[0][0] and again.stderr == ""
    assert cpu_seconds() - before < 4
    left = {path.name for path in folder.iterdir()}
    keys = {Path(line).parent.name for line in again.stdout.splitlines()}
    assert len(keys) == len(build.ARCHS) and left == keys | {f"{key}.lock" for key in keys}


def test_the_first_use_finds_what_was_compiled_by_hand(
    by_hand: tuple[Path, list[tuple[str, str]]],
) -> None:
    folder, _ = by_hand
    environment = {**os.environ, "BSK_BUILD_DIR": str(folder), "BSK_AUTO_DETECT": "0"}
    code = "from sparsek_vllm.core import kernels; print(kernels.describe())"
    for arch in ("90a", "100"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "BSK_CUDA_ARCH": arch},
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(f"compiled ({folder}"), done.stdout + done.stderr


def test_key_changes_with_what_is_compiled(monkeypatch: Any) -> None:
    tools = build.find_tools()
    keys = {
        build.key(tools, build.DEFAULT, ["90"]),
        build.key(tools, build.DEFAULT, ["90", "100"]),
        build.key(tools, build.Variant(fast_math=False), ["90"]),
        build.key(build.Tools(**{**vars(tools), "cuda_version": (13, 9)}), build.DEFAULT, ["90"]),
    }
    assert len(keys) == 4


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    class Wrong(build.Variant):
        def flags(self) -> list[str]:
            return ["-DSPARSEK_NUM_STAGES=1"]

    with pytest.raises(build.BuildError, match="static assertion failed"):
        build.build(tmp_path, build.find_tools(), Wrong(), ["90"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"block_m": 192}, "a warp has 16 or 32 query rows"),
        ({"num_warps": 16}, "a warp has 16 or 32 query rows"),
        ({"num_warps": 8, "block_m": 256, "block_n": 96}, "each warp copies an equal part"),
        ({"num_stages": 1}, "num_stages is at least 2"),
        ({"block_n": 128}, "do not fit its registers"),
        ({"kernels": "auto", "block_n": 256}, "do not fit its registers"),
        ({"kernels": "hopper", "block_n": 32}, "Hopper's own kernels are persistent"),
        ({"kernels": "hopper", "use_tma": False}, "warp-specialised, use TMA"),
        ({"kernels": "hopper", "block_m": 128, "num_warps": 12}, "have few tiles"),
        ({"num_stages": 4}, r"tiles take \d+ bytes of shared memory, 101376 are allowed"),
    ],
)
def test_tiles_that_cannot_be_built_are_refused(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        kernels.variant(Config(**{"kernels": "portable", **fields}))
    assert "(block_m, block_n, num_stages, num_warps) can be (128, 32, 2, 4), " in str(error.value)
    assert "Hopper's own prefill are: block_m 128, 192 or 256" in str(error.value)


def test_configuration_selects_the_variant() -> None:
    assert kernels.variant(Config()) == build.DEFAULT
    chosen = kernels.variant(Config(block_n=32, num_stages=4, use_fast_math=False))
    assert chosen == build.Variant(block_n=32, num_stages=4, fast_math=False)
    # Hopper's alone; both kernels'; only the portable ones'.
    for fields, variant, path in (
        ({"block_m": 128, "block_n": 128}, {"hopper_warpgroups": 2}, "hopper"),
        ({"num_stages": 3}, {"hopper_stages": 3}, "hopper"),
        ({"num_warps": 8}, {"num_warps": 8, "hopper_warpgroups": 2}, "hopper"),
        ({"block_m": 256}, {"hopper_warpgroups": 4}, "hopper"),
        ({"num_warps": 8, "use_tma": False}, {"num_warps": 8}, "portable"),
        ({"block_m": 256, "block_n": 32, "num_warps": 8}, None, "portable"),
    ):
        assert kernels.variant(Config(**fields)) == build.Variant(**(variant or fields))
        assert kernels.path_for_capability(9, 0, Config(**fields)) == path
    assert build.namespace(chosen) != build.namespace(build.DEFAULT) == "sparsek"


def test_cutlass_path_changes_nothing() -> None:
    assert kernels.variant(Config(cutlass_path="/opt/cutlass")) == build.DEFAULT


def test_tiles_of_hopper_are_refused_elsewhere() -> None:
    with pytest.raises(RuntimeError, match="'block_n': 128}, and the GPU is sm_100"):
        kernels.path_for_capability(10, 0, Config(block_m=128, block_n=128))
    assert kernels.path_for_capability(10, 0, Config(num_warps=8)) == "portable"


def test_what_serves_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(config: Config) -> str:
        loaded.append(config.kernels)
        if config.kernels == "hopper":
            raise ImportError("no compiler")
        return config.kernels

    monkeypatch.setattr(kernels, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(kernels, "_load", load)
    device, config = torch.device("cuda", 0), Config()
    previous = get_default_config()
    set_default_config(config)
    try:
        for _ in range(2):
            assert kernels.serving(device, 64) == ("hopper", "auto", True)
            assert kernels.serving(device, 320) == ("portable", "auto", True)
        assert loaded == ["auto", "auto"]
        config.kernels = "portable"  # in place
        assert kernels.serving(device, 64) == ("portable", "portable", False)
        set_default_config(Config(kernels="hopper"))
        for _ in range(2):
            with pytest.raises(ImportError, match="no compiler"):
                kernels.serving(device, 64)
        assert loaded == ["auto", "auto", "portable", "hopper", "hopper"]
    finally:
        set_default_config(previous)
    assert kernels.serving(torch.device("cpu")).path == "reference"


def test_kernels_are_chosen_by_name() -> None:
    path = kernels.path_for_capability
    hopper, portable = Config(kernels="hopper"), Config(kernels="portable")
    # One library has both, so that a wheel without a compiler has too.
    assert {kernels.variant(config) for config in (Config(), hopper, portable)} == {build.DEFAULT}
    assert path(9, 0, Config()) == path(9, 0, hopper) == "hopper"
    assert path(9, 0, portable) == path(10, 3, Config()) == path(12, 0, Config()) == "portable"
    for fields in ({"block_n": 32}, {"use_tma": False}):
        assert path(9, 0, Config(**fields)) == "portable"
        assert path(9, 0, Config(**fields, kernels="hopper")) == "hopper"
    with pytest.raises(RuntimeError, match='kernels is "hopper", and the GPU is sm_100'):
        path(10, 0, hopper)
    with pytest.raises(RuntimeError, match="Hopper or Blackwell"):
        path(8, 9, hopper)


DIVISIONS = """
#include "params.h"
#include <cstdio>
#include <initializer_list>
int main() {
  uint32_t random = 1;
  for (uint32_t i = 1; i < 5000 + 19; ++i) {
    const uint32_t divisor = i < 5000 ? i : 1u << (i - 5000 + 13);
    const sparsek::FastDivisor divide(divisor);
    for (int i = 0; i < 2000; ++i) {
      random = random * 1664525u + 1013904223u;
      const uint32_t near = (random >> 1) / divisor * divisor + i % 3 - 1;
      for (uint32_t n : {random >> (1 + i % 31), near, 0u, 0x7fffffffu}) {
        if (n < 0x80000000u && divide(static_cast<int>(n)) != static_cast<int>(n / divisor)) {
          std::printf("%u / %u", n, divisor);
          return 1;
        }
      }
    }
  }
}
"""


def test_fast_division(tmp_path: Path) -> None:
    """By every divisor below 5,000 and every power of two up to 2^31."""
    (tmp_path / "test.cpp").write_text(DIVISIONS)
    command = [build.find_tools().compiler, "-std=c++17", "-O2", f"-I{build.sources()}"]
    subprocess.run([*command, tmp_path / "test.cpp", "-o", tmp_path / "test"], check=True)
    assert subprocess.run([tmp_path / "test"], capture_output=True, text=True).stdout == ""


def refusal(**changes: Any) -> str:
    """What the CUDA side says to wrong arguments. It looks at no GPU before it has checked them."""
    kernels.require()
    half, lengths = torch.float16, torch.tensor([0, 4], dtype=torch.int32)
    k = torch.zeros(2, 16, 2, 64, dtype=half)
    arguments = {
        "q": torch.zeros(4, 2, 64, dtype=half), "k": k, "v": k, "cu_seqlens_q": lengths,
        "seq_lens": lengths[1:], "block_table": torch.zeros(1, 2, dtype=torch.int32),
        "k_starts": None, "q_offsets": None, "spans": None, "bias": None, "alibi_slopes": None,
        "sinks": None, "k_scale": None, "v_scale": None, "workspace": None, "hopper": True,
        "batch_invariant": False, "min_seqlen_q": 0, "max_seqlen_q": 4, "max_seqlen_k": 4,
        "scale": 1.0, "window_left": -1, "window_right": 0, "softcap": 0.0, "out": k, "lse": None,
    } | changes  # fmt: skip
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError) as error:
        torch.ops.sparsek.varlen_attention.default.redispatch(cuda, *arguments.values())
    return str(error.value)


def test_the_cuda_side_checks_before_it_launches() -> None:
    k = torch.zeros(2, 16, 2, 64, dtype=torch.float16)
    assert "k must have the dtype of q on CUDA" in refusal(k=k.float())
    odd = torch.zeros(4 * 2 * 64 + 1, dtype=torch.float16)[1:].view(4, 2, 64)
    assert "q must begin at a multiple of 16 bytes on CUDA" in refusal(q=odd)
    small = k[:, :8]
    assert "block_size must be a multiple of 16 on CUDA, got 8" in refusal(k=small, v=small)
    assert "seq_lens must be int32 on CUDA" in refusal(seq_lens=torch.tensor([4]))
    odd = torch.zeros(9, dtype=torch.int32)[1:].view(4, 2)
    assert "spans must be contiguous and begin at a multiple of 8 bytes" in refusal(spans=odd)
