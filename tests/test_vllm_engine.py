"""vLLM with our backend, run for real: ``LLM(...)`` against vLLM's own CPU_ATTN."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encoder
import pytest
import torch
from engine import running_engine

OURS = "SPARSEK_XFORMERS"
PEER = "CPU_ATTN"
FP32: dict[str, Any] = {"dtype": "float32", "max_model_len": 4352}
BF16: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 4352, "enable_prefix_caching": False}
# Long ones, middling ones, one token, block boundaries (blocks have 128 tokens here).
LENGTHS = (4000, 2100, 1500, 900, 640, 512, 257, 256, 255, 200, 129, 128, 127, 64, 40, 20, 9, 3, 1)


def prompts() -> list[list[int]]:
    """24 prompts as token ids; the last five share a prefix with the third."""
    draw = random.Random(7)
    alone = [[draw.randrange(100, 40000) for _ in range(length)] for length in LENGTHS]
    shared = [alone[2][:700] + [draw.randrange(100, 40000)] * (3 + i) for i in range(5)]
    return alone + shared


def generate(llm: Any, tokens: list[list[int]], **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    settings = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, **sampling}
    return llm.generate(
        [{"prompt_token_ids": ids} for ids in tokens], SamplingParams(**settings), use_tqdm=False
    )


def tokens_of(outputs: list[Any]) -> list[list[tuple[int, ...]]]:
    return [[tuple(sample.token_ids) for sample in output.outputs] for output in outputs]


def metric(llm: Any, name: str) -> int:
    return sum(int(m.value) for m in llm.get_metrics() if m.name == name)


@pytest.fixture(scope="module")
def ours(model: Path) -> Iterator[Any]:
    # 512 tokens a step: long prompts come in chunks, mixed with decoding.
    with running_engine(model, attention_backend=OURS, max_num_batched_tokens=512, **FP32) as llm:
        yield llm


@pytest.fixture(scope="module")
def peer(model: Path) -> Iterator[Any]:
    with running_engine(model, attention_backend=PEER, **FP32) as llm:
        yield llm


@pytest.fixture(scope="module")
def ours_bf16(model: Path) -> Iterator[Any]:
    # The other way to choose a backend.
    with running_engine(model, attention_config={"backend": OURS}, **BF16) as llm:
        yield llm


@pytest.fixture(scope="module")
def peer_bf16(model: Path) -> Iterator[Any]:
    with running_engine(model, attention_backend=PEER, **BF16) as llm:
        yield llm


def test_greedy_tokens_equal_cpu_attn(ours: Any, peer: Any) -> None:
    batch = prompts()
    assert len(batch) == 24
    expected = tokens_of(generate(peer, batch))
    ours.collective_rpc("sparsek_path_counts", kwargs={"reset": True})
    first = generate(ours, batch)
    assert tokens_of(first) == expected
    # Sent again, what is still in the cache is not computed anew.
    again = generate(ours, batch[-5:])
    assert all(output.num_cached_tokens >= 640 for output in again)
    assert tokens_of(again) == expected[-5:]


def test_our_code_computed_the_tokens(ours: Any, peer: Any) -> None:
    generate(ours, [[1, 2, 3]])
    (counts,) = ours.collective_rpc("sparsek_path_counts", kwargs={"reset": True})
    assert set(counts) == {"varlen_attention:reference", "write_kv:reference"}
    layers = 30
    generate(ours, [[5, 6, 7, 8, 9]], max_tokens=4)
    (counts,) = ours.collective_rpc("sparsek_path_counts")
    # The prompt, then one token for each but the last that is generated.
    assert counts["varlen_attention:reference"] == {"calls": 4 * layers, "tokens": 8 * layers}
    assert counts["write_kv:reference"]["tokens"] == 8 * layers
    assert peer.collective_rpc("sparsek_path_counts") == [{}]


def test_parallel_sampling(ours: Any, peer: Any) -> None:
    """Samples of one prompt differ, and CPU_ATTN finds each token as likely as we do."""
    prompt = prompts()[10]
    (output,) = generate(ours, [prompt], n=4, temperature=1.0, max_tokens=8, logprobs=0)
    samples = output.outputs
    assert len({tuple(sample.token_ids) for sample in samples}) == 4
    sequences = [prompt + list(sample.token_ids) for sample in samples]
    forced = generate(peer, sequences, max_tokens=1, prompt_logprobs=0)
    for sample, check in zip(samples, forced, strict=True):
        steps = zip(sample.token_ids, sample.logprobs, check.prompt_logprobs[-8:], strict=True)
        for token, here, there in steps:
            assert here[token].logprob == pytest.approx(there[token].logprob, abs=1e-3)


def test_pass_key_in_a_long_prompt(ours: Any) -> None:
    from vllm import SamplingParams

    filler = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    )
    prompt = (
        "There is a pass key hidden in the text below. Find it and remember it.\n\n"
        + filler * 30
        + "The pass key is 48213. Remember it. 48213 is the pass key. "
        + filler * 52
        + "\n\nWhat is the pass key? The pass key is"
    )
    (output,) = ours.generate(prompt, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert len(output.prompt_token_ids) > 2000
    assert output.outputs[0].text.startswith(" 48213")


def test_preemption(ours: Any, model: Path) -> None:
    """A cache too small for all requests at once: some are thrown out and computed again."""
    batch = [ids[:100] for ids in prompts()[:8]]
    expected = tokens_of(generate(ours, batch, max_tokens=48))
    with running_engine(
        model, attention_backend=OURS, dtype="float32", max_model_len=256, block_size=16,
        num_gpu_blocks_override=64, enable_prefix_caching=False,
    ) as tight:  # fmt: skip
        before = metric(tight, "vllm:num_preemptions")
        assert tokens_of(generate(tight, batch, max_tokens=48)) == expected
        assert metric(tight, "vllm:num_preemptions") > before


def test_fp8_cache(model: Path) -> None:
    from vllm import SamplingParams

    with running_engine(
        model, attention_backend=OURS, dtype="float32", max_model_len=512, kv_cache_dtype="fp8"
    ) as llm:
        (output,) = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0, max_tokens=16),
            use_tqdm=False,
        )
    assert output.outputs[0].text == "The capital of France is Paris."


def test_softcap_and_sliding_window(model: Path, tmp_path: Path) -> None:
    """A small Gemma 2 of random weights: both in every other layer, and an odd scale."""
    import torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=48,
        attn_logit_softcapping=2.0, query_pre_attn_scalar=24, max_position_embeddings=1024,
        initializer_range=0.2,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    batch = [ids[:300] for ids in prompts()[4:18]]
    logprobs = {}
    for backend in (OURS, PEER):
        with running_engine(
            tmp_path, attention_backend=backend, dtype="float32", max_model_len=512
        ) as llm:
            outputs = generate(llm, batch, prompt_logprobs=0, max_tokens=8)
        logprobs[backend] = [
            step[token].logprob
            for output in outputs
            for token, step in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            if step is not None
        ]
    assert logprobs[OURS] == pytest.approx(logprobs[PEER], abs=2e-3)


def test_bf16_logprobs_are_as_near_to_fp32_as_the_peers(
    ours: Any, ours_bf16: Any, peer_bf16: Any
) -> None:
    batch = [ids for ids in prompts() if 100 < len(ids) < 1000]

    def forced(llm: Any) -> list[float]:
        outputs = generate(llm, batch, max_tokens=1, prompt_logprobs=0)
        return [
            step[token].logprob
            for output in outputs
            for token, step in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            if step is not None
        ]

    exact = forced(ours)

    def mean_difference(llm: Any) -> float:
        values = forced(llm)
        assert len(values) == len(exact)
        return sum(abs(a - b) for a, b in zip(values, exact, strict=True)) / len(exact)

    mine, theirs = mean_difference(ours_bf16), mean_difference(peer_bf16)
    print(f"mean difference of bf16 logprobs to fp32: {OURS} {mine:.4f}, {PEER} {theirs:.4f}")
    assert mine <= 1.1 * theirs


def test_speed_is_at_least_half_the_peers(ours_bf16: Any, peer_bf16: Any) -> None:
    """Tokens per second, the two engines in turn, the best of three each."""

    def seconds(llm: Any, batch: int, length: int, generated: int) -> float:
        draw = random.Random(length)
        tokens = [[draw.randrange(100, 40000) for _ in range(length)] for _ in range(batch)]
        start = time.perf_counter()
        generate(llm, tokens, max_tokens=generated, detokenize=False)
        return time.perf_counter() - start

    cases = {
        "prefill of 2,000": lambda llm: 2000 / seconds(llm, 1, 2000, 1),
        "decode at batch 1": lambda llm: 32 / seconds(llm, 1, 32, 33),
        "decode at batch 8": lambda llm: 8 * 32 / seconds(llm, 8, 32, 33),
    }
    for name, tokens_per_second in cases.items():
        best = {OURS: 0.0, PEER: 0.0}
        for _ in range(3):
            for backend, llm in ((OURS, ours_bf16), (PEER, peer_bf16)):
                best[backend] = max(best[backend], tokens_per_second(llm))
        print(f"{name}: " + ", ".join(f"{who} {rate:.1f} tokens/s" for who, rate in best.items()))
        assert best[OURS] >= 0.5 * best[PEER], name


def test_embeddings_of_an_encoder(model: Path, tmp_path: Path) -> None:
    got, expected, counts = encoder.embeddings(model, tmp_path, dtype="float32")
    assert list(counts) == ["varlen_attention:reference"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
