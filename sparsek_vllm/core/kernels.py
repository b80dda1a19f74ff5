"""Finding, compiling and loading the CUDA kernels, and naming the path that a tensor takes."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsek_vllm import build
from sparsek_vllm.core import config as _config

SUPPORTED_ARCHS = ("sm_90a", "sm_100")

_logger = logging.getLogger("sparsek_vllm")


_DEFAULTS = _config.Config()
# Hopper's own kernels are all of it.
_HOPPER_FIELDS = ("persistent_kernel", "warp_specialized", "use_tma")
_FIELDS_THAT_CHOOSE = (*build.TILE_FIELDS, *_HOPPER_FIELDS)


def variant(config: _config.Config) -> build.Variant:
    """What ``config`` asks to be compiled: tile fields at their defaults stay tuned.

    Raises:
        ValueError: no kernel can have these tiles; the message lists those that can be built.
    """
    tuned = build.Variant(
        fast_math=config.use_fast_math,
        lineinfo=config.enable_profiling,
        debug=config.debug_mode,
    )
    tiles = _tiles(config)
    own = _hopper_tiles(config) if wants_hopper(config) else None
    portable = dataclasses.replace(tuned, **tiles)
    problem = portable.problem()
    if config.kernels == "hopper" and own is None:
        problem = (
            "Hopper's own kernels are persistent, warp-specialised, use TMA, and have few tiles"
        )
    elif own is not None:
        # Whatever tiles the portable kernels cannot have are Hopper's alone.
        return dataclasses.replace(tuned if problem else portable, **own)
    if problem:
        fields = {name: getattr(config, name) for name in ("kernels", *_FIELDS_THAT_CHOOSE)}
        asked = ", ".join(f"{k}={v!r}" for k, v in fields.items() if v != getattr(_DEFAULTS, k))
        raise ValueError(
            f"Config({asked}) cannot be built: {problem}. {build.buildable()}; "
            f"{build.HOPPER_TILES}; fields at their defaults are chosen for you"
        )
    return portable


def _tiles(config: _config.Config) -> dict[str, Any]:
    """The tile fields that are not at their defaults."""
    return {
        name: getattr(config, name)
        for name in build.TILE_FIELDS
        if getattr(config, name) != getattr(_DEFAULTS, name)
    }


def wants_hopper(config: _config.Config) -> bool:
    """Whether Hopper's own kernels serve on Hopper."""
    if config.kernels != "auto":
        return config.kernels == "hopper"
    if all(getattr(config, name) == getattr(_DEFAULTS, name) for name in _FIELDS_THAT_CHOOSE):
        return True
    return _hopper_tiles(config) is not None


def _hopper_tiles(config: _config.Config) -> dict[str, Any] | None:
    whole = all(getattr(config, name) for name in _HOPPER_FIELDS)
    return build.hopper_tiles(_tiles(config)) if whole else None


def available() -> bool:
    """Whether kernels are installed, in the cache, or could be compiled here."""
    return not describe().startswith("none")


def describe() -> str:
    """Where the kernels of the configuration in force come from, in words."""
    config = _config.get_default_config()
    wanted = variant(config)
    if library := _installed(wanted):
        return f"installed ({library})"
    try:
        tools = build.find_tools()
    except build.BuildError as error:
        return f"none: {error}"
    folder = config.build_path() / build.key(tools, wanted, _archs(config))
    if (folder / build.LIBRARY).exists():
        return f"compiled ({folder})"
    return f"compiled at first use by {tools.nvcc}, into {config.build_path()}"


def require() -> None:
    """Load the kernels, compiling them first where that is needed.

    Raises:
        ImportError: there are none and they cannot be compiled; the message says what is missing.
    """
    _load(_config.get_default_config())


class Serving(NamedTuple):
    """What serves the tensors of a call."""

    path: str  # name of the implementation
    ops: Any  # its namespace of ``torch.ops``
    hopper: bool  # whether Hopper's own kernels are wanted


# A configuration's fields, and what serves under it: asked for at every call.
_last: tuple[dict[str, Any], dict[tuple[torch.device, int], Serving]] = ({}, {})


def serving(device: torch.device, head_dim: int = 128) -> Serving:
    """What serves tensors on ``device`` under the configuration in force.

    Raises:
        ImportError: CUDA, and there are no kernels.
        ValueError, RuntimeError: as in :func:`path_for`.
    """
    global _last
    config = _config.get_default_config()
    last = _last  # another thread may set it meanwhile
    if last[0] != vars(config):
        last = _last = dict(vars(config)), {}
    found = last[1].get((device, head_dim))
    if found is None:
        path = path_for(device, head_dim, config)
        ops = torch.ops.sparsek if device.type == "cpu" else _load(config)
        found = last[1][device, head_dim] = Serving(path, ops, wants_hopper(config))
    return found


def path_for(
    device: torch.device, head_dim: int = 128, config: _config.Config | None = None
) -> str:
    """Name of the implementation that serves tensors on ``device``.

    Args:
        device: where the tensors are.
        head_dim: theirs; Hopper's own kernels have not every one.
        config: by default the one in force.

    Raises:
        ValueError: neither CPU nor CUDA.
        RuntimeError: the GPU is older than Hopper.
    """
    if device.type == "cpu":
        return "reference"
    if device.type == "cuda":
        index = device.index if device.index is not None else -1
        config = config or _config.get_default_config()
        return path_for_capability(*_capability(index), config, head_dim)
    raise ValueError(f"tensors must be on cpu or cuda, got {device}")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    device = None if index < 0 else index
    capability = torch.cuda.get_device_capability(device)
    if capability[0] > 9:
        _logger.warning(
            "%s (sm_%d%d) has never been run on: the portable kernels are used, from machine code "
            "for sm_100 or through its PTX",
            torch.cuda.get_device_name(device),
            *capability,
        )
    return capability


def path_for_capability(major: int, minor: int, config: _config.Config, head_dim: int = 128) -> str:
    """Name of the implementation on a GPU of that compute capability.

    Raises:
        RuntimeError: it is older than Hopper, or not Hopper where its kernels or their tiles are
            asked for.
    """
    if major < 9:
        raise RuntimeError(
            "GPU architecture must be sm_90a or sm_100 (Hopper or Blackwell), "
            f"got sm_{major}{minor}"
        )
    if config.kernels == "hopper" and major > 9:
        raise RuntimeError(f'Config.kernels is "hopper", and the GPU is sm_{major}{minor}')
    tiles = _tiles(config) if major > 9 else {}
    if tiles and dataclasses.replace(build.DEFAULT, **tiles).problem():
        raise RuntimeError(
            f"only Hopper's own kernels have the tiles of the Config, {tiles}, and the GPU is "
            f"sm_{major}{minor}"
        )
    own = major == 9 and wants_hopper(config) and head_dim <= max(build.HOPPER_HEAD_DIMS)
    return "hopper" if own else "portable"


_workspaces: dict[tuple[int, int], torch.Tensor] = {}


# As in csrc/params.h, for each multiprocessor; of the floats, the last are Hopper's decode's.
DECODE_FLOATS = 2 * 32 * (128 + 2)
WORKSPACE_COUNTERS, WORKSPACE_FLOATS = 16 + 4, 2 * 12 * 32 * (64 + 4) + DECODE_FLOATS


def workspace_floats(multiprocessors: int) -> int:
    """Counters, then parts of results."""
    return 4 + multiprocessors * (WORKSPACE_COUNTERS + WORKSPACE_FLOATS)


def workspace(device: torch.device) -> torch.Tensor | None:
    """What the kernels need beside their arguments: one for each stream, made once and kept.

    Captured CUDA graphs hold on to the address. While one is captured nothing can be made (its
    zeros would only be written at the first replay), so a stream that has none shares the
    device's first: such a graph is not to be replayed beside attention on another stream. A call
    on the capturing stream before the capture gives it a workspace of its own.

    Raises:
        RuntimeError: a graph is being captured, and this device has no workspace yet.
    """
    if device.type == "cpu":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, torch._C._cuda_getCurrentRawStream(index))  # a tenth of current_stream()'s time
    found = _workspaces.get(key)
    if found is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        shared = next((w for (index, _), w in _workspaces.items() if index == key[0]), None)
        if shared is None:
            raise RuntimeError(
                "the first attention call on a device cannot be captured in a CUDA graph: "
                "run the function once before capturing it"
            )
        return shared
    size = workspace_floats(torch.cuda.get_device_properties(device).multi_processor_count)
    _workspaces[key] = torch.zeros(size, dtype=torch.float32, device=device)
    return _workspaces[key]


def _installed(wanted: build.Variant) -> Path | None:
    library = build.installed()
    return library if wanted == build.DEFAULT and library and library.exists() else None


def _archs(config: _config.Config) -> tuple[str, ...]:
    """Of every GPU that the process sees: one library serves them all."""
    gpus = range(torch.cuda.device_count()) if config.auto_detect_arch else ()
    archs = {config.target_arch(gpu).removesuffix("a") for gpu in gpus or (None,)}
    return tuple(sorted(archs))


_libraries: dict[build.Variant, Path] = {}


def loaded() -> tuple[build.Variant, ...]:
    """The variants whose kernels this process has loaded."""
    return tuple(_libraries)


def _load(config: _config.Config) -> Any:
    wanted = variant(config)
    namespace = build.namespace(wanted)
    if wanted in _libraries:
        return getattr(torch.ops, namespace)
    library = _installed(wanted)
    if library is None:
        try:
            library = build.cached(config.build_path(), wanted, _archs(config))
        except build.BuildError as error:
            raise ImportError(
                f"sparsek-vllm has no CUDA kernels in this installation, and cannot compile "
                f"them: {error}"
            ) from error
    if namespace != "sparsek":  # beside the default variant
        from sparsek_vllm.core.ops import define

        _schema_libraries.append(define(namespace))
    torch.ops.load_library(str(library))
    _libraries[wanted] = library
    _logger.info("CUDA kernels: %s", library)
    return getattr(torch.ops, namespace)


_schema_libraries: list[torch.library.Library] = []
