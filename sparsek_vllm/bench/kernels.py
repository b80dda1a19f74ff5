"""Kernel benchmarks: decode, prefill, paged prefill and small latencies, against every peer.

Inputs are normally distributed. Decode and paged prefill read a cache as vLLM lays it out, K and V
side by side in the last dimension.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from sparsek_vllm.bench.timing import Call, copies_beyond_l2, time_in_graphs, time_launches
from sparsek_vllm.core import (
    DenseKV,
    PagedKV,
    attention_forward,
    get_default_config,
    kernels,
    set_default_config,
    varlen_attention,
)

OURS = "sparsek"
PORTABLE = "portable"  # ours too, beside Hopper's own kernels where those are chosen
SIXTEEN_BIT = "sparsek bf16"  # ours too, beside fp8 keys and values
_DEVICE = "cuda"


@dataclass
class Row:
    """One line of a table: times in microseconds, and the work done."""

    name: str
    times: dict[str, float]
    work: float
    unit: str  # what work over time is: "TB/s" or "TFLOP/s"
    apart: dict[str, float] = field(default_factory=dict)
    apart_title: str = ""

    def rate(self, contender: str) -> float:
        return self.work / self.times[contender] / 1e6

    def best_peer(self) -> str | None:
        peers = [name for name in self.times if name not in (OURS, PORTABLE, SIXTEEN_BIT)]
        return min(peers, key=self.times.__getitem__) if peers else None


def _with_portable(call: Call) -> Call:
    chosen = get_default_config()
    portable = dataclasses.replace(chosen, kernels=PORTABLE)

    def portable_call(i: int) -> object:
        set_default_config(portable)
        try:
            return call(i)
        finally:
            set_default_config(chosen)

    return portable_call


@dataclass
class Paged:
    """Requests over a paged cache, in several copies; one of fp8 has scales of 1."""

    rows: Sequence[int]  # query tokens of each request
    keys: Sequence[int]
    head_dim: int
    page: int
    heads: int = 32
    kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16
    warm: bool = False
    fp8: bool = False
    softcap: float = 0.0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.kv_dtype = torch.float8_e4m3fn if self.fp8 else self.dtype
        self.one = torch.ones(1, device=_DEVICE) if self.fp8 else None
        pages = [-(-n // self.page) for n in self.keys]
        elements = 2 * sum(self.keys) * self.kv_heads * self.head_dim
        self.kv_bytes = elements * self.kv_dtype.itemsize
        self.copies = 1 if self.warm else copies_beyond_l2(self.kv_bytes)
        self.cu_seqlens_q = _prefix_sums(self.rows)
        self.seq_lens = torch.tensor(self.keys, dtype=torch.int32, device=_DEVICE)
        self.pages = torch.tensor(pages, dtype=torch.int32)
        shape = (sum(pages), self.page, self.kv_heads, 2 * self.head_dim)
        self.q, self.k, self.v, self.tables, self.page_lists = [], [], [], [], []
        for _ in range(self.copies):
            q = torch.empty(
                sum(self.rows), self.heads, self.head_dim, dtype=self.dtype, device=_DEVICE
            )
            self.q.append(q.normal_())
            cache = torch.empty(shape, dtype=self.dtype, device=_DEVICE).normal_().to(self.kv_dtype)
            self.k.append(cache[..., : self.head_dim])
            self.v.append(cache[..., self.head_dim :])
            ids = torch.randperm(sum(pages)).int()
            table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
            for b, own in enumerate(ids.split(pages)):
                table[b, : len(own)] = own
            self.tables.append(table.to(_DEVICE))
            self.page_lists.append(ids.to(_DEVICE))
        self.out = torch.empty_like(self.q[0])
        self.scale = self.head_dim**-0.5
        self.plans: dict[str, Call] = {}

    def contenders(self) -> dict[str, Call]:
        calls: dict[str, Call] = {OURS: self.ours()}
        if get_default_config().kernels == "hopper":  # asked for: what do they gain?
            calls[PORTABLE] = _with_portable(calls[OURS])
        for name, make in (
            ("FA3", self.flash_attention),
            ("FlashInfer", self.flashinfer),
            ("Triton", self.triton),
        ):
            call = make()
            if call is not None:
                calls[name] = call
        return calls

    def result(self, call: Call) -> torch.Tensor:
        """What it leaves in ``out``."""
        self.out.zero_()
        call(0)
        return self.out.float()

    def ours(self) -> Call:
        caches = [
            PagedKV(k, v, table, self.seq_lens, self.one, self.one)
            for k, v, table in zip(self.k, self.v, self.tables, strict=True)
        ]
        longest = max(self.rows), max(self.keys)
        shortest = min(self.rows)

        def call(i: int) -> object:
            i %= self.copies
            return varlen_attention(
                self.q[i],
                caches[i],
                self.cu_seqlens_q,
                min_seqlen_q=shortest,
                max_seqlen_q=longest[0],
                max_seqlen_k=longest[1],
                softcap=self.softcap,
                out=self.out,
            )

        return call

    def flash_attention(self) -> Call | None:
        """FA3 as vLLM calls it under CUDA graphs, with its scheduler's plan made beforehand."""
        flash = _module("vllm.vllm_flash_attn")
        if flash is None:
            return None
        longest = max(self.rows), max(self.keys)
        decode = longest[0] <= 16
        splits = 32 if decode else 0
        # With fp8 it takes queries of fp8 too, which vLLM makes in a launch of their own.
        queries = [q.to(self.kv_dtype) for q in self.q]
        ones = self._descale(len(self.rows), self.kv_heads)

        def make_plan(i: int = 0) -> Any:
            return flash.get_scheduler_metadata(
                batch_size=len(self.rows),
                max_seqlen_q=longest[0],
                max_seqlen_k=longest[1],
                num_heads_q=self.heads,
                num_heads_kv=self.kv_heads,
                headdim=self.head_dim,
                cache_seqlens=self.seq_lens,
                qkv_dtype=self.kv_dtype,
                cu_seqlens_q=self.cu_seqlens_q,
                page_size=self.page,
                causal=True,
                num_splits=splits,
                has_softcap=self.softcap > 0,
            )

        self.plans["FA3"] = make_plan
        plan = make_plan()

        def call(i: int) -> object:
            i %= self.copies
            return flash.flash_attn_varlen_func(
                queries[i],
                self.k[i],
                self.v[i],
                out=self.out,
                max_seqlen_q=longest[0],
                cu_seqlens_q=self.cu_seqlens_q,
                max_seqlen_k=longest[1],
                seqused_k=self.seq_lens,
                softmax_scale=self.scale,
                causal=True,
                softcap=self.softcap,
                block_table=self.tables[i],
                scheduler_metadata=plan,
                num_splits=splits,
                q_descale=ones,
                k_descale=ones,
                v_descale=ones,
                fa_version=3,
            )

        return call

    def _descale(self, *shape: int) -> torch.Tensor | None:
        return None if self.one is None else self.one.expand(shape)

    def flashinfer(self) -> Call | None:
        flashinfer = _module("flashinfer")
        if flashinfer is None or max(self.rows) != 1 or self.head_dim not in FLASHINFER_SIZES:
            return None
        indptr = torch.zeros(len(self.rows) + 1, dtype=torch.int32)
        indptr[1:] = self.pages.cumsum(0)
        last = torch.tensor([(n - 1) % self.page + 1 for n in self.keys], dtype=torch.int32)
        wrappers = []
        for ids in self.page_lists:
            space = torch.empty(256 << 20, dtype=torch.uint8, device=_DEVICE)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                space,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=indptr.to(_DEVICE),
                paged_kv_indices_buffer=ids.clone(),
                paged_kv_last_page_len_buffer=last.to(_DEVICE),
            )

            def make_plan(i: int = 0, wrapper: Any = wrapper, ids: torch.Tensor = ids) -> object:
                return wrapper.plan(
                    indptr,
                    ids,
                    last,
                    self.heads,
                    self.kv_heads,
                    self.head_dim,
                    self.page,
                    q_data_type=self.dtype,
                    kv_data_type=self.kv_dtype,
                )

            make_plan()
            self.plans["FlashInfer"] = make_plan
            wrappers.append(wrapper)
            if self.copies > 4 and len(wrappers) == 4:
                break  # 256 MB of workspace each; the caches still rotate

        def call(i: int) -> object:
            i %= self.copies
            cache = (self.k[i], self.v[i])
            return wrappers[i % len(wrappers)].run(self.q[i], cache, out=self.out)

        return call

    def triton(self) -> Call | None:
        module = _module("vllm.v1.attention.ops.triton_unified_attention")
        if module is None:
            return None
        longest = max(self.rows), max(self.keys)
        segments = 16
        ones = self._descale(len(self.rows), self.kv_heads)
        padded = 1 << (self.head_dim - 1).bit_length()
        shape = (sum(self.rows), self.heads, segments)
        parts = torch.empty(*shape, padded, dtype=torch.float32, device=_DEVICE)
        peaks, sums = (torch.empty(shape, dtype=torch.float32, device=_DEVICE) for _ in range(2))

        def call(i: int) -> object:
            i %= self.copies
            return module.unified_attention(
                q=self.q[i],
                k=self.k[i],
                v=self.v[i],
                out=self.out,
                cu_seqlens_q=self.cu_seqlens_q,
                max_seqlen_q=longest[0],
                seqused_k=self.seq_lens,
                max_seqlen_k=longest[1],
                softmax_scale=self.scale,
                causal=True,
                window_size=(-1, -1),
                block_table=self.tables[i],
                softcap=self.softcap,
                q_descale=None,
                k_descale=ones,
                v_descale=ones,
                seq_threshold_3D=128 // self.kv_heads,
                num_par_softmax_segments=segments,
                softmax_segm_output=parts,
                softmax_segm_max=peaks,
                softmax_segm_expsum=sums,
            )

        return call


@dataclass
class Dense:
    """Equal requests over packed keys and values: 16,384 tokens in all."""

    length: int
    head_dim: int
    causal: bool
    heads: int
    batch: int
    dtype: torch.dtype = torch.float16
    warm: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        shape = (self.batch, self.length, self.heads, self.head_dim)
        size = 8 * self.batch * self.length * self.heads * self.head_dim
        self.copies = 1 if self.warm else copies_beyond_l2(size)
        self.inputs = [
            [torch.randn(shape, device=_DEVICE).to(self.dtype) for _ in "qkv"]
            for _ in range(self.copies)
        ]
        self.flops = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        self.flops //= 2 if self.causal else 1

    def contenders(self) -> dict[str, Call]:
        calls: dict[str, Call] = {OURS: self.ours()}
        fa3 = self.flash_attention()
        if fa3 is not None:
            calls["FA3"] = fa3
        calls["cuDNN"] = self.sdpa("CUDNN_ATTENTION")
        calls["FA2"] = self.sdpa("FLASH_ATTENTION")
        return calls

    def result(self, call: Call) -> torch.Tensor:
        """``[tokens, heads, head_dim]``; some calls answer head by head."""
        out = call(0)
        assert isinstance(out, torch.Tensor)
        rows = out.transpose(1, 2) if out.ndim == 4 else out
        return rows.reshape(-1, self.heads, self.head_dim).float()

    def _packed(self) -> list[list[torch.Tensor]]:
        return [[t.view(-1, self.heads, self.head_dim) for t in own] for own in self.inputs]

    def ours(self) -> Call:
        bounds = _prefix_sums([self.length] * self.batch)
        packed = self._packed()
        kv = [DenseKV.from_cu_seqlens(k, v, bounds) for _, k, v in packed]
        out = torch.empty_like(packed[0][0])

        def call(i: int) -> object:
            i %= self.copies
            return varlen_attention(
                packed[i][0],
                kv[i],
                bounds,
                causal=self.causal,
                min_seqlen_q=self.length,
                max_seqlen_q=self.length,
                max_seqlen_k=self.length,
                out=out,
            )

        return call

    def flash_attention(self) -> Call | None:
        flash = _module("vllm.vllm_flash_attn")
        if flash is None:
            return None
        bounds = _prefix_sums([self.length] * self.batch)
        packed = self._packed()
        out = torch.empty_like(packed[0][0])

        def call(i: int) -> object:
            q, k, v = packed[i % self.copies]
            return flash.flash_attn_varlen_func(
                q,
                k,
                v,
                out=out,
                max_seqlen_q=self.length,
                cu_seqlens_q=bounds,
                max_seqlen_k=self.length,
                cu_seqlens_k=bounds,
                causal=self.causal,
                fa_version=3,
            )

        return call

    def sdpa(self, backend: str) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        views = [[t.transpose(1, 2) for t in own] for own in self.inputs]
        attend: Any = torch.nn.functional.scaled_dot_product_attention

        def call(i: int) -> object:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return attend(*views[i % self.copies], is_causal=self.causal)

        return call


def decode(warm: bool) -> Iterator[Row]:
    """One query token a request, 32/8 heads, bf16."""
    for head_dim in (128, 64):
        for page in (16, 64):
            for batch, context in DECODE_SHAPES:
                case = Paged([1] * batch, [context] * batch, head_dim, page, warm=warm)
                yield _bandwidth_row(f"{batch} x {context} D={head_dim} page {page}", case)


def uneven(warm: bool) -> Iterator[Row]:
    """Decode batches that are not uniform, or of other heads or query lengths, page 16."""
    lengths = random.Random(0)
    lognormal = [max(1, min(32768, int(lengths.lognormvariate(7.8, 0.8)))) for _ in range(128)]
    for head_dim in (128, 64):
        cases = {
            "128 lognormal": Paged([1] * 128, lognormal, head_dim, 16, warm=warm),
            "1 x 131072 with 63 x 1024": Paged(
                [1] * 64, [131072] + [1024] * 63, head_dim, 16, warm=warm
            ),
            "4 query tokens, 16 x 16384": Paged([4] * 16, [16384] * 16, head_dim, 16, warm=warm),
        }
        for name, case in cases.items():
            yield _bandwidth_row(f"{name} D={head_dim}", case)
    for name, heads, kv_heads, batch, context, head_dim in (
        ("heads 32/32", 32, 32, 16, 4096, 128),
        ("heads 64/4", 64, 4, 16, 16384, 128),
        ("heads 4/1", 4, 1, 64, 8192, 128),
        ("heads 9/3", 9, 3, 8, 4096, 64),
    ):
        case = Paged(
            [1] * batch, [context] * batch, head_dim, 16, heads=heads, kv_heads=kv_heads, warm=warm
        )
        yield _bandwidth_row(f"{name}, {batch} x {context} D={head_dim}", case)


def multi_query(warm: bool) -> Iterator[Row]:
    """Several query tokens a request, as in speculative decoding, beside the four of ``uneven``."""
    for head_dim in (128, 64):
        for rows in (2, 8, 16):
            case = Paged([rows] * 16, [16384] * 16, head_dim, 16, warm=warm)
            yield _bandwidth_row(f"{rows} query tokens, 16 x 16384 D={head_dim}", case)


def fp8(warm: bool) -> Iterator[Row]:
    """Decode over fp8 (e4m3) keys and values, 32/8 heads, page 16, beside ours over bf16."""
    for head_dim in (128, 64):
        for batch, context in DECODE_SHAPES:
            shape = [1] * batch, [context] * batch, head_dim, 16
            case = Paged(*shape, warm=warm, fp8=True)
            wide = Paged(*shape, warm=warm)
            beside = {SIXTEEN_BIT: wide.ours()}
            yield _bandwidth_row(f"{batch} x {context} D={head_dim} fp8", case, beside)


def fp8_prefill(warm: bool) -> Iterator[Row]:
    """Causal, bf16 queries on fp8 keys and values, 32/8 heads, page 16, beside ours over bf16."""
    for head_dim in (128, 64):
        for batch, rows, keys in PAGED_PREFILL_SHAPES:
            shape = [rows] * batch, [keys] * batch, head_dim, 16
            case = Paged(*shape, warm=warm, fp8=True)
            beside = {SIXTEEN_BIT: Paged(*shape, warm=warm).ours()}
            yield _causal_row(f"{batch} x {rows} on {keys} D={head_dim} fp8", case, beside)


def prefill(warm: bool) -> Iterator[Row]:
    """Packed keys, fp16, 16,384 tokens; causal counts half the operations."""
    for head_dim, heads in ((64, 32), (128, 16)):
        for causal in (True, False):
            for length in (512, 2048, 8192, 16384):
                case = Dense(length, head_dim, causal, heads, 16384 // length, warm=warm)
                mask = "causal" if causal else "full"
                yield _dense_row(f"S={length} D={head_dim} {mask}", case)


def paged_prefill(warm: bool) -> Iterator[Row]:
    """Causal, bf16, 32/8 heads: batch x new tokens on total context."""
    for head_dim in (128, 64):
        for page in (16, 64):
            for batch, rows, keys in PAGED_PREFILL_SHAPES:
                case = Paged([rows] * batch, [keys] * batch, head_dim, page, warm=warm)
                yield _causal_row(f"{batch} x {rows} on {keys} D={head_dim} page {page}", case)


def decode_256(warm: bool) -> Iterator[Row]:
    """Decode at head size 256, page 16, bf16: 16/8 heads as in Gemma 3, 16/2 as in Qwen3-Next."""
    for kv_heads, fp8 in ((8, False), (2, False), (8, True), (2, True)):
        for batch, context in DECODE_SHAPES_256:
            case = Paged([1] * batch, [context] * batch, 256, 16, 16, kv_heads, warm=warm, fp8=fp8)
            name = f"{batch} x {context}, heads 16/{kv_heads}"
            yield _bandwidth_row(name + " fp8" * fp8, case)


def prefill_256(warm: bool) -> Iterator[Row]:
    """Head size 256, causal: 16/8 heads over pages of 16, bf16, then over fp8, then with a softcap
    as in Gemma 2; packed, fp16.
    """
    for fp8 in (False, True):
        for batch, rows, keys in (*PAGED_PREFILL_SHAPES, (1, 256, 16384)):
            case = Paged([rows] * batch, [keys] * batch, 256, 16, 16, 8, warm=warm, fp8=fp8)
            yield _causal_row(f"{batch} x {rows} on {keys}" + " fp8" * fp8, case)
    for batch, rows, keys in PAGED_PREFILL_SHAPES:
        case = Paged([rows] * batch, [keys] * batch, 256, 16, 16, 8, warm=warm, softcap=50.0)
        yield _causal_row(f"{batch} x {rows} on {keys} softcap", case)
    for length in (512, 2048, 8192):
        dense = Dense(length, 256, True, 8, 16384 // length, warm=warm)
        yield _dense_row(f"S={length}, packed", dense)


def decode_sizes(warm: bool) -> Iterator[Row]:
    """Decode at head sizes that take the kernels for the next larger one, page 16, bf16."""
    for head_dim, heads, kv_heads in OTHER_SIZES:
        for batch, context in ((1, 16384), (16, 4096), (64, 2048)):
            case = Paged([1] * batch, [context] * batch, head_dim, 16, heads, kv_heads, warm=warm)
            beside = {PORTABLE: _with_portable(case.ours())}
            name = f"{batch} x {context}, heads {heads}/{kv_heads} D={head_dim}"
            yield _bandwidth_row(name, case, beside)


def prefill_sizes(warm: bool) -> Iterator[Row]:
    """Causal prefill at these sizes, page 16, bf16."""
    for head_dim, heads, kv_heads in OTHER_SIZES:
        for batch, rows, keys in PAGED_PREFILL_SHAPES:
            shape = [rows] * batch, [keys] * batch, head_dim, 16, heads, kv_heads
            case = Paged(*shape, warm=warm)
            beside = {PORTABLE: _with_portable(case.ours())}
            name = f"{batch} x {rows} on {keys}, heads {heads}/{kv_heads} D={head_dim}"
            yield _causal_row(name, case, beside)


def chunks(warm: bool) -> Iterator[Row]:
    """Causal, bf16, 32/8 heads, page 16: few new tokens, as when a long chat goes on."""
    for head_dim in (128, 64):
        for batch, rows, keys in CHUNK_SHAPES:
            case = Paged([rows] * batch, [keys] * batch, head_dim, 16, warm=warm)
            yield _causal_row(f"{batch} x {rows} on {keys} D={head_dim}", case)


def mixed(warm: bool) -> Iterator[Row]:
    """Causal, over pages of 16: prompts of very different lengths, and prompts beside decodes."""
    random_lengths = random.Random(0)
    drawn = [random_lengths.lognormvariate(0, 1.0) for _ in range(256)]
    prompts = [max(1, int(16384 * x / sum(drawn))) for x in drawn]
    for head_dim in (128, 64):
        case = Paged(prompts, prompts, head_dim, 16, warm=warm)
        yield _causal_row(f"256 lognormal prompts D={head_dim}", case)
        for batch, rows, decodes, keys in MIXED_SHAPES:
            lengths = [rows] * batch + [1] * decodes, [keys] * (batch + decodes)
            case = Paged(*lengths, head_dim, 16, warm=warm)
            name = f"{batch} x {rows} and {decodes} x 1 on {keys} D={head_dim}"
            yield _causal_row(name, case)


def small(warm: bool) -> Iterator[Row]:
    """``attention_forward`` on [B, H, S, D] against SDPA; apart, from call to call in Python."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend: Any = torch.nn.functional.scaled_dot_product_attention
    for batch, heads in ((1, 8), (1, 96), (16, 96)):
        shape = (batch, heads, 512, 64)
        copies = 1 if warm else copies_beyond_l2(8 * batch * heads * 512 * 64)
        inputs = [[torch.randn(shape, device=_DEVICE).half() for _ in "qkv"] for _ in range(copies)]

        def on(
            function: Callable[..., Any],
            inputs: list[list[torch.Tensor]] = inputs,
            copies: int = copies,
        ) -> Call:
            return lambda i: function(*inputs[i % copies])

        def cudnn(*qkv: torch.Tensor) -> object:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return attend(*qkv)

        calls: dict[str, Any] = {
            OURS: on(attention_forward),
            "SDPA": on(attend),
            "cuDNN": on(cudnn),
        }
        name = f"B={batch} H={heads} S=512 D=64"
        _check_agreement(name, {c: call(0).float() for c, call in calls.items()}, fp8=False)
        times = time_in_graphs(calls, copies)
        flops = 4 * batch * heads * 512 * 512 * 64
        yield Row(name, times, flops, "TFLOP/s", time_launches(calls), "Launched from Python, us")


DECODE_SHAPES = (
    (1, 1024),
    (1, 16384),
    (1, 131072),
    (16, 1024),
    (16, 16384),
    (64, 4096),
    (256, 1024),
    (8, 131072),
)
PAGED_PREFILL_SHAPES = ((1, 8192, 8192), (4, 2048, 2048), (1, 2048, 32768), (16, 512, 4096))
# As in Phi-2 and StableLM, Phi-3 mini, H2O-Danube3 4B; 40 and 192 with heads in between.
OTHER_SIZES = ((40, 16, 4), (80, 32, 32), (96, 32, 32), (120, 32, 8), (192, 16, 8))
FLASHINFER_SIZES = (64, 128, 256)  # that its kernels here are made for
DECODE_SHAPES_256 = ((1, 1024), (1, 16384), (16, 1024), (16, 16384), (64, 4096))
CHUNK_SHAPES = (
    (1, 32, 65536),
    (1, 64, 65536),
    (1, 128, 65536),
    (1, 200, 65536),
    (1, 384, 65536),
    (1, 128, 16384),
    (1, 256, 16384),
    (2, 128, 16384),
    (1, 256, 4096),
)
MIXED_SHAPES = ((4, 1024, 124, 4096), (1, 2000, 31, 30000), (1, 512, 127, 2048))
SETS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "decode": decode,
    "uneven": uneven,
    "multi-query": multi_query,
    "fp8": fp8,
    "prefill": prefill,
    "paged-prefill": paged_prefill,
    "fp8-prefill": fp8_prefill,
    "chunks": chunks,
    "mixed": mixed,
    "decode-256": decode_256,
    "prefill-256": prefill_256,
    "decode-sizes": decode_sizes,
    "prefill-sizes": prefill_sizes,
    "small": small,
}


def _bandwidth_row(name: str, case: Paged, beside: dict[str, Call] | None = None) -> Row:
    calls = case.contenders()
    _check_agreement(name, {c: case.result(call) for c, call in calls.items()}, case.fp8)
    calls |= beside or {}
    times = time_in_graphs(calls, case.copies)
    plans = time_launches(case.plans)
    return Row(name, times, case.kv_bytes, "TB/s", plans, "Plan made before, us")


def _causal_row(name: str, case: Paged, beside: dict[str, Call] | None = None) -> Row:
    calls = case.contenders()
    calls.pop("FlashInfer", None)  # its decode wrapper
    _check_agreement(name, {c: case.result(call) for c, call in calls.items()}, case.fp8)
    calls |= beside or {}
    times = time_in_graphs(calls, case.copies)
    pairs = zip(case.rows, case.keys, strict=True)
    seen = sum(rows * keys - rows * (rows - 1) // 2 for rows, keys in pairs)
    return Row(name, times, 4 * case.heads * case.head_dim * seen, "TFLOP/s")


def _dense_row(name: str, case: Dense) -> Row:
    calls = case.contenders()
    _check_agreement(name, {c: case.result(call) for c, call in calls.items()}, fp8=False)
    return Row(name, time_in_graphs(calls, case.copies), case.flops, "TFLOP/s")


def _check_agreement(name: str, results: dict[str, torch.Tensor], fp8: bool) -> None:
    """A contender that computes something else is not one.

    Errors are RMS, over the RMS of ours, since the more keys a row sees the smaller its numbers
    are. FA3 rounds queries and weights to fp8.
    """
    tolerance = 0.2 if fp8 else 0.02
    own = results[OURS]
    for contender, result in results.items():
        difference = ((result - own).square().mean() / own.square().mean()).sqrt().item()
        if not difference < tolerance:
            raise RuntimeError(f"{name}: {contender} and {OURS} differ by {difference:.1%}")


def _prefix_sums(lengths: Sequence[int]) -> torch.Tensor:
    sums = torch.tensor([0, *lengths]).cumsum(0)
    return sums.to(torch.int32).to(_DEVICE)


def _module(name: str) -> Any:
    if find_spec(name.split(".")[0]) is None:
        return None
    import importlib

    return importlib.import_module(name)


def free_memory() -> None:
    """What torch keeps of past inputs, for other processes."""
    torch.cuda.empty_cache()


def environment() -> dict[str, str]:
    """What the figures were measured with."""
    from importlib import metadata

    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    found["cuda"] = str(torch.version.cuda)
    found["kernels"] = kernels.describe().split(" (")[0]
    for package in ("sparsek-vllm", "vllm", "flashinfer-python", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
