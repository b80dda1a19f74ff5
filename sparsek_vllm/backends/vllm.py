"""The vLLM V1 attention backend: class, metadata builder and implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from sparsek_vllm import build
from sparsek_vllm.backends import vllm_compat
from sparsek_vllm.core import (
    DenseKV,
    PagedKV,
    get_default_config,
    kernels,
    varlen_attention,
    write_kv,
)
from sparsek_vllm.kv_cache import kv_views

# vLLM shows what loggers under its own name say.
_logger = init_logger("vllm.sparsek")

_FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


# Layers that keep nothing: they attend to the keys of the step.
_ENCODERS = (AttentionType.ENCODER_ONLY.value, AttentionType.ENCODER.value)
# vLLM wraps our classes for cross-attention: lengths and slots of the encoder, no mask.
_ATTENTION_TYPES = (
    AttentionType.DECODER.value,
    *_ENCODERS,
    AttentionType.ENCODER_DECODER.value,
)


class SparseKBackend(AttentionBackend):
    """Exact attention over vLLM's paged KV cache, chosen as SPARSEK_XFORMERS."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *_FP8_DTYPES]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return vllm_compat.BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SparseKImpl]:
        return SparseKImpl

    @staticmethod
    def get_builder_cls() -> type[SparseKMetadataBuilder]:
        return SparseKMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """The published ones; :meth:`supports_head_size` knows all."""
        return list(build.HOPPER_HEAD_DIMS)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in build.HEAD_DIMS

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Logical shape of a layer's cache: K and V side by side in the last dimension."""
        if block_size % 16:
            raise ValueError(f"block_size must be a multiple of 16, got {block_size}")
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Memory order of that shape, for versions in which the backend decides it."""
        heads_first = vllm_compat.memory_order_is_heads_first()
        if include_num_layers_dimension:
            return (1, 2, 0, 3, 4) if heads_first else (1, 0, 3, 2, 4)
        return (0, 1, 2, 3) if heads_first else (0, 2, 1, 3)

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in cls.dtypes(current_platform.is_cpu())

    @classmethod
    def dtypes(cls, on_cpu: bool) -> list[torch.dtype]:
        """Model dtypes. Tensor cores have no float32; the CPU reference does."""
        return [*cls.supported_dtypes, *([torch.float32] if on_cpu else [])]

    @classmethod
    def kv_cache_dtypes(cls, on_cpu: bool) -> list[str]:
        """KV cache dtypes: the kernels read fp8 as e4m3."""
        return [d for d in cls.supported_kv_cache_dtypes if on_cpu or d != "fp8_e5m2"]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in _ATTENTION_TYPES

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Why this configuration cannot be served; vLLM shows the reasons and does not start."""
        given = vllm_compat.arguments_of(super().validate_configuration, *args, **kwargs)
        on_cpu = current_platform.is_cpu()
        allowed: dict[str, list[Any]] = {
            "head_size": list(build.HEAD_DIMS),
            "dtype": cls.dtypes(on_cpu),
            "kv_cache_dtype": cls.kv_cache_dtypes(on_cpu),
            "block_size": ["multiples of 16"],
        }
        reasons = []
        for reason in super().validate_configuration(*args, **kwargs):
            argument = reason.removesuffix(" not supported")
            if argument in allowed:
                choices = ", ".join(str(choice) for choice in allowed[argument])
                reason = f"{argument} {given[argument]} not supported (allowed: {choices})"
            elif argument.startswith("attention type"):
                reason = f"{reason} (allowed: {', '.join(_ATTENTION_TYPES)})"
            reasons.append(reason)
        cache, model = given.get("kv_cache_dtype"), str(given["dtype"]).removeprefix("torch.")
        if cache in ("float16", "bfloat16") and cache != model:
            reasons.append(
                f"kv_cache_dtype {cache} not supported with dtype {model} (allowed: auto, {model})"
            )
        if not on_cpu and not kernels.available():
            reasons.append(f"CUDA kernels: {kernels.describe()}")
        return reasons

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in cls.kv_cache_dtypes(
            current_platform.is_cpu()
        )

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or current_platform.is_cpu() or capability.major >= 9

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See :meth:`SparseKImpl.forward`, which vLLM calls."""
        return SparseKImpl.forward(*args, **kwargs)


@dataclass
class SparseKMetadata(AttentionMetadata):
    """What the layers of one step share; tensors as in vLLM's CommonAttentionMetadata."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool


class SparseKMetadataBuilder(AttentionMetadataBuilder[SparseKMetadata]):
    """Passes on what vLLM has prepared: no copy, no synchronisation.

    The kernels plan on the device from ``seq_lens`` and ``query_start_loc``, so a graph captured
    for uniform batches (decoding, also of several speculative tokens) replays with any lengths.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = True

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type == "cuda":
            # Now, not in a captured graph or under the first request.
            kernels.require()
            kernels.workspace(device)
        _logger.info_once(
            "%s: path %s, variant %s, kernels %s",
            vllm_compat.BACKEND_NAME,
            kernels.path_for(device, kv_cache_spec.head_size),
            kernels.variant(get_default_config()),
            "none needed" if device.type == "cpu" else kernels.describe(),
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparseKMetadata:
        common = common_attn_metadata
        if not isinstance(common.causal, bool):
            raise ValueError(
                f"{vllm_compat.BACKEND_NAME}: causal must be True or False for all requests, "
                f"got {type(common.causal).__name__}"
            )
        return SparseKMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )

    def update_block_table(
        self,
        metadata: SparseKMetadata,
        blk_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> SparseKMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class SparseKImpl(AttentionImpl[SparseKMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        name = vllm_compat.BACKEND_NAME
        if alibi_slopes is not None:
            raise ValueError(f"{name} does not support ALiBi (alibi_slopes)")
        if attn_type not in _ATTENTION_TYPES:
            raise ValueError(f"{name} does not support attention type {attn_type}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.is_encoder = attn_type in _ENCODERS
        # vLLM counts the token itself; the ops count the keys before and after it.
        self.side = -1 if sliding_window is None else sliding_window - 1
        self.kv_cache_dtype = kv_cache_dtype
        self.fp8_dtype = _FP8_DTYPES.get(kv_cache_dtype)
        self.softcap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        if sinks is not None and sinks.shape != (num_heads,):
            raise ValueError(
                f"{name}: sinks must have shape [num_heads={num_heads}], got {list(sinks.shape)}"
            )
        self.sinks = sinks

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparseKMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the cache, which already holds this step's keys and values.

        Layers of an encoder have no cache: they attend to ``key`` and ``value``.

        Args:
            layer: the vLLM layer, for its fp8 scales.
            query: ``[num_tokens, num_heads, head_size]``, padded past num_actual_tokens.
            key: ``[num_tokens, num_kv_heads, head_size]``; used by layers of an encoder alone.
            value: like key.
            kv_cache: this layer's cache as vLLM lays it out.
            attn_metadata: None while vLLM profiles memory: output is then zeroed.
            output: like query, or ``[num_tokens, num_heads * head_size]``; written in place.
            output_scale: must be None: quantised outputs are not announced to vLLM.
            output_block_scale: likewise.

        Returns:
            ``output``.
        """
        assert output_scale is None and output_block_scale is None
        if attn_metadata is None:
            # Made now, it lies outside the pool whose contents sleep mode drops.
            kernels.workspace(query.device)
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        kv: PagedKV | DenseKV
        if self.is_encoder:
            kv = DenseKV(
                key[:tokens],
                value[:tokens],
                attn_metadata.query_start_loc[:-1],
                attn_metadata.seq_lens,
            )
        else:
            k, v = self._views(kv_cache)
            quantised = self.fp8_dtype is not None
            kv = PagedKV(
                k,
                v,
                attn_metadata.block_table,
                attn_metadata.seq_lens,
                layer._k_scale if quantised else None,
                layer._v_scale if quantised else None,
            )
        varlen_attention(
            query[:tokens],
            kv,
            attn_metadata.query_start_loc,
            causal=attn_metadata.causal,
            window=(self.side, -1 if attn_metadata.causal else self.side),
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            max_seqlen_q=attn_metadata.max_query_len,
            max_seqlen_k=attn_metadata.max_seq_len,
            out=output.view(-1, self.num_heads, self.head_size)[:tokens],
        )
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's keys and values; vLLM calls it before :meth:`forward`."""
        if self.is_encoder:
            return
        k, v = self._views(kv_cache)
        quantised = self.fp8_dtype is not None
        write_kv(
            key,
            value,
            k,
            v,
            slot_mapping,
            layer._k_scale if quantised else None,
            layer._v_scale if quantised else None,
        )

    def _views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_views(kv_cache, self.num_kv_heads, self.head_size, self.fp8_dtype)
