"""The CUDA kernels: errors beside FA3's, graphs, streams, variants, sanitizers.

``tests/test_kernels.py`` has the matrix of shapes; ``make test-gpu`` runs both.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dense_oracle
import pytest
import torch
from batches import GARBAGE, Batch
from target import PATH

from sparsek_vllm.core import (
    Config,
    DenseKV,
    PagedKV,
    kernels,
    merge_states,
    set_default_config,
    varlen_attention,
    write_kv,
)

CUDA = torch.device("cuda")


def test_cache_beyond_32_bit_offsets() -> None:
    """Pages whose elements lie past 2^31: 64-bit offsets in reads and writes."""
    batch = Batch([(1, 40), (100, 100)], 8, 4, 128, extra_blocks=2**31 // (16 * 8 * 256) + 100)
    assert batch.kv.k.shape[0] * batch.kv.k.stride(0) > 2**31
    first, last = batch.kv.k.shape[0] - 12, batch.kv.k.shape[0] - 1
    # All pages to the far end, written anew.
    own = [3, 7]
    table = torch.full_like(batch.kv.block_table, GARBAGE)
    slots = []
    for b, (count, begin) in enumerate(zip(own, (first, first + 3), strict=True)):
        pages = torch.arange(begin, begin + count)
        table[b, :count] = pages.int().to(CUDA)
        tokens = torch.arange(batch.lengths[b][1])
        slots.append(pages[tokens // 16] * 16 + tokens % 16)
    assert first + 3 + 7 <= last
    kv = PagedKV(batch.kv.k, batch.kv.v, table, batch.kv.seq_lens)
    write_kv(torch.cat(batch.k), torch.cat(batch.v), kv.k, kv.v, torch.cat(slots).to(CUDA))
    torch.testing.assert_close(batch.run(kv)[0].double(), batch.expected()[0], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 16384)] * 4,
        [(1, 900)] * 64,
        [(4, 4096)] * 4,
        [(8, 4096)] * 4,
        [(2048, 2048)] * 2,
        [(512, 8192)],
    ],
    ids=["decode-long", "decode-batch", "speculative", "speculative-8", "prefill", "chunk"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_is_that_of_flash_attention_3(dtype, lengths, head_dim) -> None:
    """RMS error at most 1.1 times and largest error at most 1.5 times FA3's."""
    rms, largest = errors_beside_flash_attention_3(Batch(lengths, 2, 4, head_dim, dtype))
    assert rms[0] <= 1.1 * rms[1]
    assert largest[0] <= 1.5 * largest[1]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", [[(1, 16384)] * 4, [(700, 2048)] * 2, [(512, 8192)]], ids=str)
@pytest.mark.parametrize("size", [1, 6], ids=["plain", "large scores"])
def test_error_over_fp8_keys_is_below_flash_attention_3s(size, lengths, head_dim) -> None:
    """Which has queries of fp8 too."""
    batch = Batch(lengths, 2, 4, head_dim, fp8=True)
    batch.q *= size
    rms, _ = errors_beside_flash_attention_3(batch)
    assert rms[0] <= 0.1 * rms[1]


def errors_beside_flash_attention_3(batch: Batch) -> tuple[list[float], list[float]]:
    """RMS and largest errors, of ours and theirs."""
    flash = pytest.importorskip("vllm.vllm_flash_attn")
    expected, _ = batch.expected()
    kv, longest = batch.kv, [max(n) for n in zip(*batch.lengths, strict=True)]
    # FA3 multiplies what is past the end by zero: for it the unused slots are cleared.
    k, v = (t.float().nan_to_num(0.0).to(t.dtype).contiguous() for t in (kv.k, kv.v))
    scales = {}
    if batch.fp8:
        shape = (len(batch.lengths), batch.kv_heads)
        scales = {"k_descale": kv.k_scale.expand(shape), "v_descale": kv.v_scale.expand(shape)}
        scales["q_descale"] = torch.ones(1, device=CUDA).expand(shape)
    theirs = flash.flash_attn_varlen_func(
        batch.q.to(k.dtype), k, v,
        max_seqlen_q=longest[0],
        cu_seqlens_q=batch.cu_seqlens_q,
        max_seqlen_k=longest[1],
        seqused_k=kv.seq_lens,
        block_table=kv.block_table.clamp(max=kv.k.shape[0] - 1),
        causal=True,
        fa_version=3,
        **scales,
    )  # fmt: skip
    found = [(out.double() - expected).abs() for out in (batch.run()[0], theirs)]
    rms = [error.square().mean().sqrt().item() for error in found]
    largest = [error.max().item() for error in found]
    print(f"RMS {rms[0]:.3e} / {rms[1]:.3e}, max {largest[0]:.3e} / {largest[1]:.3e}")
    return rms, largest


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("window", [(-1, -1), (40, -1), (100, 30)], ids=str)
@pytest.mark.parametrize("head_dim", [48, 64, 96, 128, 256])
def test_many_tiles(head_dim: int, window: tuple[int, int], fp8: bool) -> None:
    """More tiles than multiprocessors: blocks of as many warpgroups as there can be, one after the
    other."""
    lengths = [(900, 1500), (1, 3000), (3000, 3000), (130, 129)]
    for group in (4, 3):  # queries that are boxes, and others
        batch = Batch(lengths, 8, group, head_dim, fp8=fp8)
        batch.check(causal=window != (100, 30), window=window)


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
def test_one_long_request_among_many(fp8: bool) -> None:
    """Of as many rows as the others: it alone is split, and they are prefill's."""
    lengths = [(16, 40000), *[(16, 900 + i) for i in range(20)], (1, 33000), (9, 33000), (8, 100)]
    for head_dim in (64, 256):
        Batch(lengths, 8, 4, head_dim, fp8=fp8).check()


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize(
    "lengths", [[(12, 20_000)], [(12, 40_000)], [(12, 40_000), *[(1, 500)] * 15]], ids=str
)
def test_few_tokens_on_very_long_keys(lengths: list[tuple[int, int]], fp8: bool) -> None:
    """More rows than decode reads keys for at once: prefill's, unless it has too many tiles."""
    Batch(lengths, 8, 4, 128, fp8=fp8).check()


def test_the_kernels_that_run() -> None:
    """The path is named before the dispatch: what did it launch?"""

    def launched(batch: Batch, **options) -> set[str]:
        batch.run(**options)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            batch.run(**options)
            torch.cuda.synchronize()
        names = [event.key for event in profile.key_averages() if "sparsek" in event.key]
        kernels = ("sm90", "portable"), ("prefill", "decode")
        return {
            f"{a} {b}" for a in kernels[0] for b in kernels[1] for n in names if a in n and b in n
        }

    own = "sm90" if PATH == "hopper" else "portable"
    lengths = [(1, 2000), (300, 600)]
    spans = torch.zeros(301, 2, dtype=torch.int32, device=CUDA)
    for head_dim in (64, 96, 192, 256):
        batch = Batch(lengths, 2, 4, head_dim)
        own_decode = own if head_dim in (64, 256) else "portable"
        assert launched(batch) == {f"{own} prefill", f"{own_decode} decode"}
        assert launched(batch, softcap=20.0) == {f"{own} prefill", f"{own_decode} decode"}
        assert launched(batch, spans=spans) == {"portable prefill", "portable decode"}
        slopes = torch.ones(8, device=CUDA)
        assert launched(batch, alibi_slopes=slopes) == {"portable prefill", f"{own_decode} decode"}
    for head_dim in (64, 192, 256):
        batch = Batch(lengths, 2, 4, head_dim, fp8=True)
        own_decode = own if head_dim in (64, 256) else "portable"
        assert launched(batch) == {f"{own} prefill", f"{own_decode} decode"}
        assert launched(batch, softcap=20.0) == {"portable prefill", f"{own_decode} decode"}


# CUDA graphs and synchronisation


def captured(batch: Batch, **longest: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of one call on the batch, and where its output lands."""
    out = torch.empty_like(batch.q)

    def step() -> None:
        varlen_attention(batch.q, batch.kv, batch.cu_seqlens_q, out=out, **longest)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, out


def test_graph_replays_with_new_lengths() -> None:
    """A graph captured on one batch serves others of its shape, empty requests among them."""
    batch = Batch([(1, 2000)] * 8, 2, 4, 128)
    graph, out = captured(batch, max_seqlen_q=1, max_seqlen_k=2048)
    for lengths in ([2000] * 8, [1, 2000, 0, 17, 64, 1999, 0, 900], [0] * 8, [1] * 8, [2000] * 8):
        batch.kv.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        for b, n in enumerate(lengths):
            expected, _ = dense_oracle.attention(batch.q[b : b + 1], batch.k[b][:n], batch.v[b][:n])
            torch.testing.assert_close(
                out[b : b + 1].double(), expected, rtol=3e-2, atol=3e-2, msg=f"{lengths} {b}"
            )


@pytest.mark.parametrize("group", [3, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_graph_replays_with_other_keys_of_one_request(head_dim: int, group: int) -> None:
    """Blocks meet in clusters or through L2, or need not meet."""
    batch = Batch([(1, 20_000)], 4, group, head_dim)
    graph, out = captured(batch, max_seqlen_q=1, max_seqlen_k=20_000)
    for keys in (20_000, 1000, 64, 65, 0, 129, 5000, 1, 700, 20_000):
        batch.kv.seq_lens.fill_(keys)
        out.fill_(torch.nan)
        graph.replay()
        expected, _ = dense_oracle.attention(batch.q, batch.k[0][:keys], batch.v[0][:keys])
        torch.testing.assert_close(out.double(), expected, rtol=3e-2, atol=3e-2, msg=str(keys))


def test_graph_replays_with_other_query_lengths() -> None:
    """Two requests of 40 rows each become others, neither of them prefill's at last: both kernels
    are captured.
    """
    batch = Batch([(40, 300), (40, 500)], 2, 4, 128)
    graph, out = captured(batch, max_seqlen_q=80, max_seqlen_k=512)
    for first, end in ((40, 80), (1, 80), (79, 80), (1, 2)):
        batch.cu_seqlens_q.copy_(torch.tensor([0, first, end], dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        for rows, k, v in zip((slice(0, first), slice(first, end)), batch.k, batch.v, strict=True):
            expected, _ = dense_oracle.attention(batch.q[rows], k, v)
            torch.testing.assert_close(out[rows].double(), expected, rtol=3e-2, atol=3e-2)


def test_decodes_beside_prompts_in_a_graph() -> None:
    """Prefill begins before decode has ended: nothing else may, in front of them or behind."""
    batch = Batch([(600, 3000), *[(1, 4000)] * 60, (900, 900)], 8, 4, 128)
    longest = {"max_seqlen_q": 900, "max_seqlen_k": 4000}
    q, new = torch.empty_like(batch.q), torch.empty_like(batch.q[:, :8])
    last = torch.tensor([n for _, n in batch.lengths]).cumsum(0) - 1
    slots = batch.slots[last.to(batch.slots.device)]  # the last key of each request
    inputs = [torch.randn_like(batch.q) for _ in range(4)]
    results = [[torch.empty_like(batch.q) for _ in "ab"] for _ in inputs]

    def steps(between: Callable[[], None]) -> None:
        """New keys, attention, and attention by what that gave, each right behind the other."""
        for x, (first, second) in zip(inputs, results, strict=True):
            q.copy_(x)
            new.copy_(x[:, ::4])
            between()
            write_kv(new[: len(slots)], new[-len(slots) :], batch.kv.k, batch.kv.v, slots)
            between()
            varlen_attention(q, batch.kv, batch.cu_seqlens_q, out=first, **longest)
            between()
            varlen_attention(first, batch.kv, batch.cu_seqlens_q, out=second, **longest)
            between()

    steps(torch.cuda.synchronize)
    expected = [[result.clone() for result in both] for both in results]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps(lambda: None)
    for _ in range(20):
        for result in (result for both in results for result in both):
            result.fill_(torch.nan)
        graph.replay()
        for both, right in zip(results, expected, strict=True):
            assert torch.equal(both[0], right[0]) and torch.equal(both[1], right[1])


def test_graph_replays_with_other_pieces() -> None:
    """Prefill splits the keys of a tile by how many there are."""
    batch = Batch([(300, 20_000)], 2, 4, 128)
    graph, out = captured(batch, max_seqlen_q=300, max_seqlen_k=20_000)
    for keys in (20_000, 3000, 300, 12_345, 0, 20_000):
        batch.kv.seq_lens.fill_(keys)
        out.fill_(torch.nan)
        graph.replay()
        expected, _ = dense_oracle.attention(batch.q, batch.k[0][:keys], batch.v[0][:keys])
        torch.testing.assert_close(out.double(), expected, rtol=3e-2, atol=3e-2, msg=str(keys))


def test_first_call_in_a_graph_is_refused() -> None:
    code = """
import torch
from sparsek_vllm.core import DenseKV, varlen_attention
x = torch.zeros(4, 1, 64, dtype=torch.half, device="cuda")
n = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    varlen_attention(x, DenseKV(x, x, n[:1], n[1:]), n, max_seqlen_q=4, max_seqlen_k=4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "run the function once before capturing it" in done.stderr


def test_nothing_waits_for_the_gpu() -> None:
    batch = Batch([(1, 100), (200, 300)])
    batch.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.run()
        write_kv(batch.k[0], batch.v[0], batch.kv.k, batch.kv.v, batch.slots[:100])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_side_by_side() -> None:
    """Each stream has its own workspace: split requests on two streams do not mix."""
    batches = [Batch([(1, 8000)] * 3 + [(300, 9000)], seed=seed) for seed in range(2)]
    expected = [batch.run() for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for batch, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(batch.run())
    torch.cuda.synchronize()
    for i, (out, lse) in enumerate(results):
        assert torch.equal(out, expected[i % 2][0]) and torch.equal(lse, expected[i % 2][1])


def test_threads_on_one_stream() -> None:
    """The two launches of a call have nobody else's between them."""
    batches = [Batch([(300, 3000), *[(1, 4000)] * 20], seed=seed) for seed in range(4)]
    expected = [batch.run() for batch in batches]
    torch.cuda.synchronize()
    with ThreadPoolExecutor() as pool:
        runs = [(i, pool.submit(batches[i].run)) for _ in range(50) for i in range(4)]
    for i, run in runs:
        (out, lse), (right, right_lse) = run.result(), expected[i]
        assert torch.equal(out, right) and torch.equal(lse, right_lse)


def test_merge_of_two_halves() -> None:
    batch = Batch([(64, 1000)], dtype=torch.float16)
    parts = []
    for begin, end in ((0, 500), (500, 1000)):
        kv = DenseKV(
            batch.k[0][begin:end],
            batch.v[0][begin:end],
            torch.zeros(1, dtype=torch.int32, device=CUDA),
            torch.tensor([end - begin], dtype=torch.int32, device=CUDA),
        )
        offsets = torch.tensor([936 - begin], dtype=torch.int32, device=CUDA)
        parts += varlen_attention(
            batch.q, kv, batch.cu_seqlens_q, q_offsets=offsets, max_seqlen_q=64,
            max_seqlen_k=500, return_lse=True,
        )  # fmt: skip
    out, lse = merge_states(*parts)
    expected, expected_lse = batch.expected()
    torch.testing.assert_close(out.double(), expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


# Variants


@pytest.mark.parametrize(
    "fields",
    [
        {"block_m": 128, "block_n": 32, "num_stages": 4},
        {"block_m": 192, "block_n": 128, "num_stages": 3},
        {"block_m": 256, "num_warps": 8, "block_n": 32},
        {"use_fast_math": False},
        {"debug_mode": True, "enable_profiling": True},
        {"use_tma": False, "warp_specialized": False, "persistent_kernel": False},
    ],
    ids=str,
)
def test_variants_of_the_configuration(fields: dict) -> None:
    """Each compiles (once), runs and is right, beside the default one in the same process."""
    batch = Batch([(1, 300), (200, 300), (300, 1000)], 2, 4, 128)
    batch.check()
    config = dataclasses.replace(Config.from_env(), **fields)
    try:
        set_default_config(config)
        batch.check(path="hopper" if kernels.wants_hopper(config) else "portable")
        assert kernels.variant(config) in kernels.loaded()
    finally:
        set_default_config(None)
    batch.check()


def test_kernels_refuse_what_they_cannot_read() -> None:
    batch = Batch([(1, 20)], 2, 4, 64, torch.float16)
    q, kv = batch.q, batch.kv

    def refused(message: str, **changes) -> None:
        arguments = {"q": q, "kv": batch.kv, "cu_seqlens_q": batch.cu_seqlens_q} | changes
        with pytest.raises(ValueError, match=message):
            varlen_attention(arguments["q"], arguments["kv"], arguments["cu_seqlens_q"])

    wide = torch.zeros(4, 16, 2, 64, device=CUDA)
    refused("q must be torch.float16, torch.bfloat16, got torch.float32",
            q=q.float(), kv=PagedKV(wide, wide, kv.block_table, kv.seq_lens))  # fmt: skip
    odd = torch.zeros(1, 8, 65, dtype=torch.float16, device=CUDA)[..., 1:]
    refused("q must begin at a multiple of 16 bytes on CUDA, with strides", q=odd)
    refused("cu_seqlens_q must be torch.int32, got torch.int64",
            cu_seqlens_q=batch.cu_seqlens_q.long())  # fmt: skip
    small = torch.zeros(4, 8, 2, 64, dtype=torch.float16, device=CUDA)
    refused("block_size of k must be a multiple of 16 on CUDA, got 8",
            kv=PagedKV(small, small, kv.block_table, kv.seq_lens))  # fmt: skip
    for size, fp8, allowed in ((76, False, 8), (520, False, 8), (72, True, 16)):
        rows = torch.zeros(4, 16, 2, size, dtype=torch.float16, device=CUDA)
        rows = rows.to(torch.float8_e4m3fn) if fp8 else rows
        refused(f"head_dim must be a multiple of {allowed} up to 512 on CUDA, got {size}",
                q=torch.zeros(1, 8, size, dtype=torch.float16, device=CUDA),
                kv=PagedKV(rows, rows, kv.block_table, kv.seq_lens))  # fmt: skip
    e5m2 = torch.zeros(4, 16, 2, 64, device=CUDA).to(torch.float8_e5m2)
    refused("k must be torch.float16, torch.float8_e4m3fn, got torch.float8_e5m2",
            kv=PagedKV(e5m2, e5m2, kv.block_table, kv.seq_lens))  # fmt: skip
    scale = torch.ones(1, device=CUDA)
    refused("v_scale must be None on CUDA where k is no fp8",
            kv=dataclasses.replace(kv, v_scale=scale))  # fmt: skip


# compute-sanitizer

SANITIZED = """
import sys
sys.path[:0] = ["tests"]
import torch
from batches import Batch
for head_dim in (64, 128, 256):
    many = Batch([(1200, 1300), (1, 300)], 8, 4, head_dim)  # tiles for all warpgroups, twice over
    many.run()
    many.run(window=(100, 30), causal=False)
    many.k[0][:40] *= 30
    many.write()
    many.run()  # maxima that have grown: scores are computed once more
    Batch([(400, 3000)], 4, 4, head_dim).run()  # tiles in pieces
    for lengths in ([(1200, 1300), (1, 300)], [(400, 3000)]):
        Batch(lengths, 4, 3, head_dim).run()  # queries are no boxes
    lengths = [(1, 500), (0, 3), (3, 70), (1, 0), (90, 150), (1, 1100)]
    batch = Batch(lengths, 2, 4, head_dim)
    for kv in (batch.kv, batch.dense()):
        batch.run(kv)
        batch.run(kv, window=(40, -1))
        batch.run(kv, softcap=10.0, sinks=torch.zeros(8, device="cuda"))
    fp8 = Batch([*lengths, (700, 900)], 4, 4, head_dim, fp8=True)
    fp8.run()
    Batch([(400, 3000)], 4, 4, head_dim, fp8=True).run()
    fp8.run(softcap=10.0, window=(40, -1))
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    Batch([(60, 2200)], blocks + 8, 1, head_dim).run()  # whole tiles, then some in pieces
    spans = torch.zeros(len(batch.q), 2, dtype=torch.int32, device="cuda")
    spans[5:95] = torch.tensor([60, 150])
    batch.run(spans=spans, window=(40, -1))
for head_dim in (80, 208, 400):
    for fp8 in (False, True):
        batch = Batch([*lengths, (700, 900)], 2, 4, head_dim, fp8=fp8)
        batch.run()
        batch.run(softcap=10.0, window=(40, -1))
Batch([(400, 3000)], 4, 4, 72).run()
for head_dim in (64, 128):
    for fp8 in (False, True):
        for group in (1, 3, 8):
            for keys in (200, 900):  # blocks meet in clusters
                Batch([(1, keys)], 2, group, head_dim, fp8=fp8).run()
        Batch([(3, 300)], 2, 4, head_dim, fp8=fp8).run(softcap=10.0)
torch.cuda.synchronize()
print("all launched")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    # initcheck has to see who wrote the inputs; the others look at our kernels alone.
    ours = [] if tool == "initcheck" else ["--kernel-name", "kns=sparsek"]
    # See warp_arrive() in csrc/sm90/barrier.cuh.
    assertions = {"BSK_DEBUG": "1"} if tool == "racecheck" else {}
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **assertions}
    # Compiled before: processes that begin under the tool can hang.
    require = "from sparsek_vllm.core import kernels; kernels.require()"
    subprocess.run([sys.executable, "-c", require], cwd=root, env=env, check=True)
    done = subprocess.run(
        ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *ours,
         sys.executable, "-c", SANITIZED],
        capture_output=True, text=True, cwd=root, env=env,
    )  # fmt: skip
    assert "all launched" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, done.stdout[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0" in done.stdout
