"""Asking vLLM's workers what ran in them."""

from __future__ import annotations

from sparsek_vllm.core import path_counts, reset_path_counts


class StatsExtension:
    """Methods for ``--worker-extension-cls sparsek_vllm.backends.vllm_worker.StatsExtension``.

    vLLM mixes them into its worker, so that ``LLM.collective_rpc("sparsek_path_counts")`` and
    the development endpoint ``/collective_rpc`` reach them.
    """

    def sparsek_path_counts(self, reset: bool = False) -> dict[str, dict[str, int]]:
        """See :func:`sparsek_vllm.core.path_counts`."""
        counts = path_counts()
        if reset:
            reset_path_counts()
        return counts
