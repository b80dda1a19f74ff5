"""Kernel configuration: fields, environment variables, and what each may hold."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparsek_vllm import build

_ARCHS = ("90a", "100")
CHOICES: dict[str, tuple[Any, ...]] = {
    "cuda_arch": _ARCHS,
    "kernels": ("auto", "portable", "hopper"),
    "block_m": (64, 128, 192, 256),
    "block_n": (32, 64, 96, 128, 160, 176, 256),
    "num_stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "num_warps": (4, 8, 12, 16),
}


# Variables that set a field of the default configuration.
ENVIRONMENT = {
    "BSK_CUDA_ARCH": "cuda_arch",
    "BSK_AUTO_DETECT": "auto_detect_arch",
    "BSK_KERNELS": "kernels",
    "BSK_FAST_MATH": "use_fast_math",
    "BSK_PROFILE": "enable_profiling",
    "BSK_DEBUG": "debug_mode",
    "BSK_BUILD_DIR": "build_dir",
    "CUTLASS_PATH": "cutlass_path",
}


@dataclass
class Config:
    """Settings of the CUDA kernels. The CPU reference has none.

    Attributes:
        cuda_arch: architecture to compile for: ``"90a"`` (Hopper) or ``"100"`` (Blackwell).
        auto_detect_arch: take the architecture of the GPU instead, where there is one.
        block_m: query rows of a tile.
        block_n: key rows of a tile.
        num_stages: K/V tiles in flight.
        num_warps: warps of a thread block.
        use_fast_math: compile with ``--use_fast_math``.
        enable_profiling: compile with ``-lineinfo``, for ncu.
        debug_mode: check block tables and slot mappings before each op (this waits for the
            GPU), and compile kernels with assertions.
        persistent_kernel: one thread block for each SM, looping over tiles.
        warp_specialized: separate warps load and compute.
        use_tma: copy tiles with the tensor memory accelerator.
        cutlass_path: accepted, and without effect: no kernel uses CUTLASS.
        build_dir: where compiled kernels are cached, by default
            ``~/.cache/blackwell_sparsek/build``.
        kernels: ``"hopper"`` (Hopper's own where there is one, portable ones for the rest),
            ``"portable"``, or ``"auto"``: Hopper's own on Hopper, portable ones elsewhere.

    A tile field at its default is chosen for you (so 64 rows cannot be asked for). Hopper's own
    kernels are persistent, warp-specialised and use TMA, and their prefill can have tiles of 128,
    192 or 256 by 128, ``num_warps`` a sixteenth of ``block_m``, 3 to 6 stages: with other fields
    ``"auto"`` is portable, and ``"hopper"`` is refused when kernels are loaded. Where there are no
    registers for them tiles are smaller: 256 rows at a head_dim of 64 alone, and 192 at 128 alone,
    both of 64 keys, neither with fp8, nor at 64 with softcap; 80 keys at 256. ``num_stages`` is
    what fits, two at 256, and at 128 with 128 rows. The portable kernels' tiles are what they are
    above a head_dim of 128, and ``block_m`` with fp8, softcap, bias or spans.

    Raises:
        ValueError: a field has a value that no kernel can have.
    """

    cuda_arch: str = "90a"
    auto_detect_arch: bool = True
    block_m: int = 64
    block_n: int = 64
    num_stages: int = 2
    num_warps: int = 4
    use_fast_math: bool = True
    enable_profiling: bool = False
    debug_mode: bool = False
    persistent_kernel: bool = True
    warp_specialized: bool = True
    use_tma: bool = True
    cutlass_path: str | None = None
    build_dir: str | None = field(default=None)
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in CHOICES:
                allowed = CHOICES[item.name]
                if value not in allowed or type(value) is not type(allowed[0]):
                    raise ValueError(
                        f"Config.{item.name} must be one of {', '.join(map(repr, allowed))}, "
                        f"got {value!r}"
                    )
            elif item.type == "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"Config.{item.name} must be True or False, got {value!r}")
            elif value is not None and not isinstance(value, (str, os.PathLike)):
                raise ValueError(f"Config.{item.name} must be a path or None, got {value!r}")

    @staticmethod
    def from_env() -> Config:
        """The defaults, with the ``BSK_*`` and ``CUTLASS_PATH`` variables applied.

        Raises:
            ValueError: a variable cannot be parsed.
        """
        types = {item.name: item.type for item in fields(Config)}
        given: dict[str, Any] = {}
        for variable, name in ENVIRONMENT.items():
            text = os.environ.get(variable, "").strip()
            if not text:
                continue
            given[name] = _flag(variable, text) if types[name] == "bool" else text
            if name in CHOICES and text not in CHOICES[name]:
                allowed = ", ".join(CHOICES[name])
                raise ValueError(f"{variable} must be one of {allowed}, got {text!r}")
        return Config(**given)

    def target_arch(self, device: int | None = None) -> str:
        """The architecture in force: the GPU's own if detection is on and it is supported.

        Args:
            device: index of the GPU; None for the current one.
        """
        if self.auto_detect_arch:
            from sparsek_vllm.core.build_info import compute_arch

            arch = compute_arch(device)
            if arch == "sm_90":
                return "90a"
            if arch != "cpu" and int(arch.removeprefix("sm_")) >= 100:
                return "100"  # with PTX for what comes after
        return self.cuda_arch

    def build_path(self) -> Path:
        """Where compiled kernels are cached."""
        return build.cache_folder(self.build_dir)


def _flag(name: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{name} must be 1 or 0 (true/false, yes/no, on/off), got {text!r}")


_default: Config | None = None


def get_default_config() -> Config:
    """The configuration that ops use: the one that was set, else :meth:`Config.from_env`."""
    global _default
    if _default is None:
        _default = Config.from_env()
    return _default


def set_default_config(config: Config | None) -> None:
    """Make ``config`` the default; None goes back to the environment.

    Raises:
        ValueError: ``config`` is no :class:`Config`.
    """
    if config is not None and not isinstance(config, Config):
        raise ValueError(f"config must be a Config or None, got {type(config).__name__}")
    global _default
    _default = config


def debug_enabled() -> bool:
    """Whether ops check what costs a synchronisation to check."""
    return get_default_config().debug_mode
