"""vLLM's CPU platform, honouring ``--attention-backend SPARSEK_XFORMERS``.

vLLM's own CPU platform replaces every chosen backend by CPU_ATTN. A platform plugin is the way
to a different choice; whatever else is chosen is left to vLLM.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname

from sparsek_vllm.backends.vllm_compat import BACKEND_NAME, cpu_platform_path

logger = init_logger(f"vllm.{__name__}")

_Base: Any = resolve_obj_by_qualname(cpu_platform_path())


class SparseKCpuPlatform(_Base):
    """The CPU platform with our backend as one more choice."""

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: Any,
        attn_selector_config: Any,
        num_heads: int | None = None,
    ) -> str:
        """Path of the backend class; ValueError where ours was chosen and cannot serve."""
        if getattr(selected_backend, "name", None) != BACKEND_NAME:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        from sparsek_vllm.backends.vllm import SparseKBackend

        reasons = SparseKBackend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"{BACKEND_NAME} cannot serve this configuration: {'; '.join(reasons)}"
            )
        logger.info_once("Using %s backend (CPU reference path).", BACKEND_NAME)
        return selected_backend.get_path()
