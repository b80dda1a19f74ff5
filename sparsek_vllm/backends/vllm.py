"""The vLLM V1 attention backend: class, metadata builder and implementation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import CUDAGraphMode, get_current_vllm_config
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

from sparsek_vllm.backends import vllm_compat
from sparsek_vllm.core import (
    DenseKV,
    PagedKV,
    get_default_config,
    kernels,
    merge_states,
    varlen_attention,
    write_kv,
)
from sparsek_vllm.core.attention import HEAD_DIMS
from sparsek_vllm.core.ops import cuda_head_dims, has_cuda_kernel
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
    supports_kv_cache_update_bypass = True  # a model's own kernel may have written them

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
        return list(HEAD_DIMS)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return has_cuda_kernel(head_size)

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
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return cls.is_batch_invariant(current_platform.is_cpu())

    @classmethod
    def is_batch_invariant(cls, on_cpu: bool) -> bool:
        """Only the kernels are; neither are vLLM's own layers on CPU."""
        return not on_cpu

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Why this configuration cannot be served; vLLM shows the reasons and does not start."""
        given = vllm_compat.arguments_of(super().validate_configuration, *args, **kwargs)
        on_cpu = current_platform.is_cpu()
        allowed: dict[str, list[Any]] = {
            "head_size": [cuda_head_dims()],
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
        head_size, fp8 = given["head_size"], cache in _FP8_DTYPES
        if fp8 and has_cuda_kernel(head_size) and not (on_cpu or has_cuda_kernel(head_size, fp8)):
            reasons.append(
                f"head_size {head_size} not supported with kv_cache_dtype {cache} "
                f"(allowed: {cuda_head_dims(fp8)})"
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
    min_query_len: int  # or less
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool
    spans: torch.Tensor | None = None  # keys that rows see beyond the mask, where any do
    shared_prefix: SharedPrefix | None = None
    context: LocalContext | None = None

    def but(self, **changes: Any) -> SparseKMetadata:
        """A copy that differs so. (By ``replace`` a subclass that vLLM made of this could not.)"""
        copied = copy.copy(self)
        for name, value in changes.items():
            setattr(copied, name, value)
        return copied

    @property
    def mm_prefix_range_tensor(self) -> torch.Tensor | None:
        """The name by which Gemma 4 takes ``spans`` from layers that have no window."""
        return self.spans

    @mm_prefix_range_tensor.setter
    def mm_prefix_range_tensor(self, spans: torch.Tensor | None) -> None:
        self.spans = spans


@dataclass
class SharedPrefix:
    """The first keys of all requests, the same blocks: attended to by all rows together."""

    length: int  # a multiple of the block size
    query_start_loc: torch.Tensor  # of one request with all rows
    seq_lens: torch.Tensor  # [1]: length
    remaining: torch.Tensor  # of seq_lens


@dataclass
class LocalContext:
    """Decode context parallelism: the keys of earlier steps are spread over the ranks."""

    seq_lens: torch.Tensor  # of this rank's earlier keys
    query_lens: torch.Tensor
    max_seq_len: int
    empty: bool  # on every rank


class SparseKMetadataBuilder(AttentionMetadataBuilder[SparseKMetadata]):
    """Passes on what vLLM has prepared, without synchronisation; without copies too, but for
    images, shared prefixes and decode context parallelism.

    The kernels plan on the device from ``seq_lens`` and ``query_start_loc``, so a captured graph
    replays with any lengths.
    """

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Of any batch, but what graphs replay has no images that attend to themselves: of such a
        model, batches without prompts, or of one token a request, to which that makes no
        difference.
        """
        if not vllm_compat.images_attend_to_themselves(vllm_config):
            return cls._cudagraph_support
        if vllm_compat.decode_graphs_have_no_prompts(vllm_config):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: Any, kv_cache_spec: Any) -> int | None:
        """Tokens a request of such batches, in any number up to all drafts."""
        if cls.get_cudagraph_support(vllm_config, kv_cache_spec) != (
            AttentionCGSupport.UNIFORM_BATCH
        ):
            return None
        drafts = vllm_config.speculative_config
        return 1 + (drafts.num_speculative_tokens if drafts else 0)

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
        self.spans: torch.Tensor | None = None  # kept, for graphs that are replayed
        self.exact_lens = vllm_compat.host_knows_query_lens(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        # Images whose tokens see no further back than the window, as in Gemma 4.
        self.images_end_at_window = any(
            getattr(layers.get(name), "mm_prefix_clamp_sliding_window", False)
            for name in layer_names
        )
        # Layers that vLLM keeps whole on each rank say so in their spec.
        sharded = getattr(kv_cache_spec, "dcp_sharded", True)
        self.ranks: Any = vllm_compat.context_parallel_group() if sharded else None
        if self.ranks is not None:
            parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
            self.interleave = parallel.cp_kv_cache_interleave_size
            # Kept, for graphs that are replayed.
            shape = (2, scheduler.max_num_seqs)
            self.context_lens = torch.zeros(shape, dtype=torch.int32, device=device)
        self.supports_draft_decode_metadata_update = self.ranks is None

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
        prefix = context = None
        spans = self._image_spans(common)
        if self.ranks is not None:
            context = self._local_context(common)
        elif common_prefix_len > 0 and spans is None:
            prefix = SharedPrefix(
                common_prefix_len,
                common.query_start_loc[:: common.num_reqs].contiguous(),
                torch.full_like(common.seq_lens[:1], common_prefix_len),
                common.seq_lens - common_prefix_len,
            )
        shortest = 0
        if self.exact_lens and common.max_query_len > 1 and common.num_reqs > 0:
            begins = common.query_start_loc_cpu[: common.num_reqs + 1]
            shortest = int(begins.diff().min())
        return SparseKMetadata(
            num_actual_tokens=common.num_actual_tokens,
            min_query_len=shortest,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            spans=spans,
            shared_prefix=prefix,
            context=context,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SparseKMetadata:
        metadata = self.build(0, common_attn_metadata)
        if metadata.context is not None:
            metadata.context.empty = False
        mode = self.vllm_config.compilation_config.cudagraph_mode
        # Replayed with other requests.
        metadata.min_query_len = 0
        if mode.mixed_mode() == CUDAGraphMode.FULL:
            # Of as many tokens.
            metadata.max_query_len = metadata.num_actual_tokens
        return metadata

    def _image_spans(self, common: CommonAttentionMetadata) -> torch.Tensor | None:
        """Of each token of an image, the keys of all of it; None if there are no such tokens."""
        ranges = vllm_compat.image_ranges(self.vllm_config, common)
        if ranges is None:
            return None
        own = [ranges.get(b, []) for b in range(common.num_reqs)]
        most = max((len(images) for images in own), default=0)
        # Other kernels serve steps with spans, whose last bits may differ.
        if most == 0 and not vllm_compat.is_batch_invariant():
            return None
        device = common.query_start_loc.device
        if self.spans is None:
            rows = self.vllm_config.scheduler_config.max_num_batched_tokens
            self.spans = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        spans = self.spans[: common.num_actual_tokens]
        if most == 0:
            return spans.zero_()
        padded = [images + [(0, 0)] * (most - len(images)) for images in own]
        images = torch.tensor(padded, dtype=torch.int32, pin_memory=device.type == "cuda")
        images = images.to(device, non_blocking=True)
        # Where a token stands is known on the device alone.
        ends = common.query_start_loc[1 : common.num_reqs + 1]
        token = torch.arange(len(spans), dtype=torch.int32, device=device)
        request = torch.searchsorted(ends, token, right=True).clamp_(max=common.num_reqs - 1)
        position = (token + common.seq_lens[request] - ends[request]).unsqueeze(1)
        first, last = images[request].unbind(-1)
        within = (first <= position) & (position <= last) & (first < last)
        begin = position if self.images_end_at_window else first
        begin = torch.where(within, begin, 0).amax(1)
        end = torch.where(within, last + 1, 0).amax(1)
        return torch.stack((begin, end), 1, out=spans)

    def _local_context(self, common: CommonAttentionMetadata) -> LocalContext:
        world, rank, interleave = self.ranks.world_size, self.ranks.rank_in_group, self.interleave
        self.context_lens.zero_()
        local_lens, query_lens = self.context_lens[:, : common.num_reqs]
        torch.sub(common.query_start_loc[1:], common.query_start_loc[:-1], out=query_lens)
        context = (common.seq_lens - query_lens).clamp_(min=0)
        # Runs of so many keys go to the ranks in turn.
        rounds, rest = context // (world * interleave), context % (world * interleave)
        rest = (rest - rank * interleave).clamp_(0, interleave)
        torch.add(rounds * interleave, rest, out=local_lens)
        # The same on every rank: they meet if it is not so.
        empty = False
        if common.seq_lens_cpu_upper_bound is not None:
            begins = common.query_start_loc_cpu[: common.num_reqs + 1]
            lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs]
            empty = not bool((lengths > begins.diff()).any())
        longest = -(-common.max_seq_len // (world * interleave)) * interleave
        return LocalContext(local_lens, query_lens, longest, empty)

    def use_cascade_attention(
        self,
        common_prefix_len: int,
        query_lens: np.ndarray,
        num_query_heads: int,
        num_kv_heads: int,
        use_alibi: bool,
        use_sliding_window: bool,
        use_local_attention: bool,
        num_sms: int,
        dcp_world_size: int,
    ) -> bool:
        """Whether one pass of all rows over a shared prefix is quicker than one a request.

        It is where loading keys takes the time and the pass has enough tiles of 128 rows to keep
        the multiprocessors busy as long as the separate passes would.
        """
        if use_alibi or use_sliding_window or use_local_attention or dcp_world_size > 1:
            return False
        group, requests = num_query_heads // num_kv_heads, len(query_lens)
        rows = int(query_lens.sum()) * group
        if common_prefix_len < 256 or rows > 64 * requests:
            return False
        waves = -(-num_kv_heads * -(-rows // 128) // num_sms)
        return requests * num_kv_heads > num_sms * waves

    def update_block_table(
        self,
        metadata: SparseKMetadata,
        blk_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> SparseKMetadata:
        return metadata.but(block_table=blk_table, slot_mapping=slot_mapping)

    def update_draft_decode_metadata(self, metadata: SparseKMetadata) -> None:
        """Recorded in the graph of a draft model's steps: kernels read the lengths themselves."""
        if metadata.spans is not None:
            metadata.spans.zero_()


class SparseKImpl(AttentionImpl[SparseKMetadata]):
    """Attention of one layer."""

    supports_dcp = True
    can_return_lse_for_decode = True

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
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.batch_invariant = vllm_compat.is_batch_invariant()
        self.ranks: Any = vllm_compat.context_parallel_group() if self.dcp_world_size > 1 else None
        if self.ranks is not None:
            self._check_context_parallelism(sliding_window)
            config = get_current_vllm_config()
            self.combine = vllm_compat.context_parallel_combine(config)

    def _check_context_parallelism(self, sliding_window: int | None) -> None:
        sizes = {"head_size": self.head_size, "ranks": self.ranks.world_size}
        what = {
            "a sliding window": sliding_window is not None,
            "ALiBi": self.alibi_slopes is not None,
            "layers that share keys": self.kv_sharing_target_layer_name is not None,
            f"attention type {self.attn_type}": self.attn_type != AttentionType.DECODER.value,
            "images that attend to themselves": vllm_compat.images_attend_to_themselves(
                get_current_vllm_config()
            ),
            # What is computed at once and what was before depends on the other requests.
            "VLLM_BATCH_INVARIANT": self.batch_invariant,
            **{f"{name} {n} (no power of two)": n & (n - 1) != 0 for name, n in sizes.items()},
        }
        reasons = [name for name, is_so in what.items() if is_so]
        if reasons:
            raise ValueError(
                f"{vllm_compat.BACKEND_NAME} does not support decode context parallelism with "
                f"{', '.join(reasons)}"
            )

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
            key: ``[num_tokens, num_kv_heads, head_size]``; used by layers of an encoder, and where
                ranks share out the keys. Others may leave it out.
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
            if self.ranks is not None:
                self._prepare_context_parallelism(query)
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        q, out = query[:tokens], output.view(-1, self.num_heads, self.head_size)[:tokens]
        kv: PagedKV | DenseKV
        if self.is_encoder:
            kv = self._own(key, value, attn_metadata, attn_metadata.seq_lens)
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
            if attn_metadata.context is not None:
                self._attend_across_ranks(q, key, value, kv, attn_metadata, out)
                return output
            if attn_metadata.shared_prefix is not None:
                self._attend_to_shared_prefix(q, kv, attn_metadata, out)
                return output
        self._attend(q, kv, attn_metadata, out=out)
        return output

    def _attend(
        self,
        q: torch.Tensor,
        kv: PagedKV | DenseKV,
        metadata: SparseKMetadata,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
        with_sinks: bool = True,
    ) -> Any:
        """What the layer and ``metadata`` say; of several parts of the keys one has the sinks."""
        causal = metadata.causal
        return varlen_attention(
            q,
            kv,
            metadata.query_start_loc,
            causal=causal,
            window=(self.side, -1 if causal else self.side),
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks if with_sinks else None,
            alibi_slopes=self.alibi_slopes,
            spans=metadata.spans if causal else None,
            batch_invariant=self.batch_invariant,
            min_seqlen_q=metadata.min_query_len,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_seq_len,
            out=out,
            return_lse=return_lse,
            check=False,
        )

    def _own(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: SparseKMetadata,
        lengths: torch.Tensor,
    ) -> DenseKV:
        """Keys and values of this step alone."""
        tokens = metadata.num_actual_tokens
        return DenseKV(key[:tokens], value[:tokens], metadata.query_start_loc[:-1], lengths)

    def _attend_to_shared_prefix(
        self, q: torch.Tensor, kv: PagedKV, metadata: SparseKMetadata, out: torch.Tensor
    ) -> None:
        """Cascade attention: all rows over the shared keys, then each over its own."""
        prefix = metadata.shared_prefix
        assert prefix is not None
        blocks = prefix.length // kv.k.shape[1]
        shared = self._attend(
            q,
            replace(kv, block_table=kv.block_table[:1], seq_lens=prefix.seq_lens),
            metadata.but(
                query_start_loc=prefix.query_start_loc,
                causal=False,
                max_query_len=metadata.num_actual_tokens,
                max_seq_len=prefix.length,
            ),
            return_lse=True,
            with_sinks=False,
        )
        own = self._attend(
            q,
            replace(kv, block_table=kv.block_table[:, blocks:], seq_lens=prefix.remaining),
            metadata.but(max_seq_len=metadata.max_seq_len - prefix.length),
            return_lse=True,
        )
        merge_states(*shared, *own, out=out)

    def _prepare_context_parallelism(self, query: torch.Tensor) -> None:
        """While vLLM profiles: the memory that it has to count, and what must not come first in a
        captured graph, compilers and new connections.
        """
        query.new_empty(3 * self.ranks.world_size, *query.shape)
        heads = self.num_heads * self.ranks.world_size
        for tokens in (1, 2) if query.is_cuda else ():
            out = query.new_zeros(tokens, heads, self.head_size)
            lse = query.new_zeros(heads, tokens, dtype=torch.float32).transpose(0, 1)
            self.combine(out, lse, self.ranks, return_lse=True)

    def _attend_across_ranks(
        self,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv: PagedKV,
        metadata: SparseKMetadata,
        out: torch.Tensor,
    ) -> None:
        """Decode context parallelism: each rank attends to its share of the earlier keys for the
        heads of all, and to this step's keys, which all ranks have, for its own.
        """
        context = metadata.context
        assert context is not None
        own = self._own(key, value, metadata, context.query_lens)
        own_metadata = metadata.but(max_seq_len=metadata.max_query_len)
        # A captured graph is replayed with other lengths.
        if context.empty and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._attend(q, own, own_metadata, out=out)
            return
        earlier, earlier_lse = self._attend(
            self.ranks.all_gather(q.contiguous(), dim=1),
            replace(kv, seq_lens=context.seq_lens),
            metadata.but(causal=False, max_seq_len=context.max_seq_len),
            return_lse=True,
            with_sinks=False,
        )
        combine = self.combine if q.is_cuda else _combine_by_all_gather
        earlier, earlier_lse = combine(
            earlier, earlier_lse.transpose(0, 1), self.ranks, return_lse=True
        )
        own_out, own_lse = self._attend(q, own, own_metadata, return_lse=True)
        merge_states(earlier, earlier_lse.transpose(0, 1), own_out, own_lse, out=out)

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
            check=False,
        )

    def _views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_views(kv_cache, self.num_kv_heads, self.head_size, self.fp8_dtype)


def _combine_by_all_gather(
    out: torch.Tensor, lse: torch.Tensor, ranks: Any, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's exchanges do, which are for CUDA.

    Args:
        out: ``[tokens, heads of all ranks, head_size]``, over this rank's keys.
        lse: ``[tokens, heads of all ranks]``.

    Returns:
        The same over the keys of all ranks, for this rank's heads.
    """
    assert return_lse
    outs = ranks.all_gather(out.unsqueeze(0), dim=0)
    lses = ranks.all_gather(lse.contiguous().unsqueeze(0), dim=0)
    own = lse.shape[1] // ranks.world_size
    heads = slice(ranks.rank_in_group * own, (ranks.rank_in_group + 1) * own)
    outs, lses = outs[:, :, heads], lses[:, :, heads]
    total = torch.logsumexp(lses, 0)
    shares = (lses - total).exp().nan_to_num_(0).unsqueeze(-1)
    return (outs.to(shares.dtype) * shares).sum(0).to(out.dtype), total
