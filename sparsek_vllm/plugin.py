"""What vLLM calls through its plugin entry points, and nothing else."""

from __future__ import annotations


def register() -> None:
    """Entry point ``vllm.general_plugins``: make the backend's name known. Idempotent."""
    from sparsek_vllm.backends.vllm_compat import register_vllm_backend

    register_vllm_backend()


def platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: the platform class, on CPU only.

    It runs before configurations are unpickled in a spawned process or validated, so it makes
    the backend's name known too; elsewhere than on CPU it leaves the platform to vLLM.
    """
    from sparsek_vllm.backends.vllm_compat import is_cpu_build

    register()
    return "sparsek_vllm.backends.vllm_platform.SparseKCpuPlatform" if is_cpu_build() else None
