"""What vLLM's ``/metrics`` says of us: the implementation of attention that this server runs."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from sparsek_vllm._version import __version__
from sparsek_vllm.backends import vllm_compat
from sparsek_vllm.core import get_default_config, kernels

METRIC = "sparsek:attention_info"


class AttentionInfo(StatLoggerBase):
    """Entry point ``vllm.stat_logger_plugins``: publishes one gauge, once, if we are chosen.

    vLLM makes it in the process that answers ``/metrics``, which runs no attention itself. It
    reads no statistics.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        attention = vllm_config.attention_config
        chosen = [attention.backend, *attention.backend_per_kind.values()]
        ours = any(getattr(b, "name", None) == vllm_compat.BACKEND_NAME for b in chosen)
        if ours and vllm_compat.is_honoured():
            _publish(vllm_config.model_config.get_head_size())

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing changes while a server runs."""

    def log_engine_initialized(self) -> None:
        """vLLM's own loggers say what there is to say."""


def _publish(head_dim: int) -> None:
    labels = {
        "version": __version__,
        "path": _path(head_dim),
        "variant": str(kernels.variant(get_default_config())),
    }
    _gauge(*labels).labels(**labels).set(1)


@functools.cache
def _gauge(*labels: str) -> Any:
    """Once a process, however many engines it has."""
    from prometheus_client import Gauge

    return Gauge(
        METRIC,
        "Implementation of attention in use: path and variant of its kernels. Always 1.",
        labelnames=labels,
        multiprocess_mode="mostrecent",  # with --api-server-count above 1
    )


def _path(head_dim: int) -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "reference"
    capability = current_platform.get_device_capability()  # makes no CUDA context, unlike torch's
    return kernels.path_for_capability(
        capability.major, capability.minor, get_default_config(), head_dim
    )
