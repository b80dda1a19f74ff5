"""What vLLM can do around attention, with our backend on the GPU: the tokens stay the same.

Each configuration runs in a process of its own, all of them at once; its greedy tokens are those of
the plain run, up to places where the plain run's two best tokens were near each other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import encoder
import pytest
import torch
from engine import result_of
from target import counter

pytest.importorskip("vllm")

NEAR = 0.1
PROMPTS = [
    "The capital of France is",
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "Once upon a time there was a lighthouse keeper who",
    "The grass is green. The sky is blue. The sun is yellow. " * 60 + "The grass is",
    "def fibonacci(n):",
    "Water is made of",
] * 4
RUN = """
import json, sys
from vllm import LLM, SamplingParams

def tokens(llm, prompts):
    parameters = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
    answers = []
    for result in llm.generate(prompts, parameters, use_tqdm=False):
        gaps, own = [], []
        for token, top in zip(result.outputs[0].token_ids, result.outputs[0].logprobs):
            best = sorted((entry.logprob for entry in top.values()), reverse=True)
            gaps.append(best[0] - best[1])
            own.append(top[token].logprob)
        answers.append([list(result.outputs[0].token_ids), gaps, own])
    return answers

if __name__ == "__main__":
    model, settings, prompts, action = json.load(sys.stdin)
    backend = settings.pop("backend", "SPARSEK_XFORMERS")
    dtype = settings.pop("dtype", "float16")
    llm = LLM(model, dtype=dtype, max_model_len=1024, gpu_memory_utilization=0.1,
              attention_config={"backend": backend}, seed=0,
              worker_extension_cls="sparsek_vllm.backends.vllm_worker.StatsExtension", **settings)
    answers = tokens(llm, prompts)
    if action == "sleep":
        llm.sleep(level=1)
        llm.wake_up()
        again = tokens(llm, prompts)
        assert [a[0][:5] for a in again] == [a[0][:5] for a in answers]
        answers = again
    paths = llm.collective_rpc("sparsek_path_counts")[0]
    print("RESULT" + json.dumps({"answers": answers, "paths": paths}))
"""
LIGHT = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
KV = {"kv_cache_memory_bytes": 2 << 30}


def run(
    model: Path,
    settings: dict[str, Any],
    action: str = "",
    prompts: list[str] = PROMPTS,
    also: tuple[str, ...] = (),
    **environment: str,
) -> Any:
    """Tokens, gaps to the second best and logprobs. Ops of ``also`` run beside the usual two."""
    settings = json.loads(json.dumps(settings).replace('"MODEL"', json.dumps(str(model))))
    asked = json.dumps([str(model), {**KV, **settings}, prompts, action])
    result = result_of([sys.executable, "-c", RUN], asked, **environment)
    if "backend" not in settings:
        ops = ("varlen_attention", "write_kv", *also)
        assert set(result["paths"]) == set(map(counter, ops))
    return result["answers"]


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "full graphs for decode": (LIGHT, "", {}),
    "compiled, full and piecewise graphs": ({}, "", {}),
    "compiled, piecewise graphs": (
        {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, "", {},
    ),
    "compiled, no graphs": ({"compilation_config": {"cudagraph_mode": "NONE"}}, "", {}),
    "full graphs for all batches": (
        {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}}, "", {},
    ),
    "full graphs for all batches, model runner V1": (
        {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}},
        "", {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    ),
    "small chunks": ({**LIGHT, "max_num_batched_tokens": 128, "max_num_seqs": 16}, "", {}),
    "pages of 64": ({**LIGHT, "block_size": 64}, "", {}),
    "memory for one request": (
        {**LIGHT, "kv_cache_memory_bytes": 30 << 20, "enable_prefix_caching": False}, "", {},
    ),
    "n-gram speculation": (
        {
            **LIGHT,
            "speculative_config": {
                "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4,
            },
        },
        "", {},
    ),
    "draft model": (
        {**LIGHT, "speculative_config": {"model": "MODEL", "num_speculative_tokens": 3}}, "", {},
    ),
    "sleep mode": ({"enforce_eager": True, "enable_sleep_mode": True}, "sleep", {}),
    "no async scheduling": ({**LIGHT, "async_scheduling": False}, "", {}),
    "model runner V1": (LIGHT, "", {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "model runner V2": (LIGHT, "", {"VLLM_USE_V2_MODEL_RUNNER": "1"}),
}  # fmt: skip


PLAIN = {"enforce_eager": True, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, model: Path) -> Iterator[dict[str, Future[Any]]]:
    """Those of the configurations that are tested, and ``plain``."""
    chosen = {
        item.callspec.params.get("name")
        for item in request.session.items
        if hasattr(item, "callspec")
    }
    with ThreadPoolExecutor(8) as pool:
        yield {"plain": pool.submit(run, model, PLAIN)} | {
            name: pool.submit(run, model, settings, action, **environment)
            for name, (settings, action, environment) in CONFIGURATIONS.items()
            if name in chosen
        }


@pytest.fixture(scope="module")
def plain(runs: dict[str, Future[Any]]) -> Any:
    return runs["plain"].result()


def assert_same(answers: Any, plain: Any) -> None:
    for (tokens, _, _), (expected, gaps, _) in zip(answers, plain, strict=True):
        split = next((i for i, t in enumerate(tokens) if t != expected[i]), None)
        assert split is None or gaps[split] < NEAR, (split, gaps[split])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_stay_the_same(name: str, plain: Any, runs: dict[str, Future[Any]]) -> None:
    assert_same(runs[name].result(), plain)


def test_shared_prefix(model: Path) -> None:
    """Cascade attention, which only the first model runner has."""
    prefix = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 30
    prompts = [f"{prefix}{n} and {n + 1} and" for n in range(64)]
    v1 = {"prompts": prompts, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    eager = {"enforce_eager": True}
    with ThreadPoolExecutor() as pool:
        off = pool.submit(run, model, eager, **v1)
        on = pool.submit(
            run, model, {**eager, "disable_cascade_attn": False}, also=("merge_states",), **v1
        )
    assert_same(on.result(), off.result())


def test_fp8_cache(plain: Any, model: Path) -> None:
    """No further from the plain run than FLASH_ATTN, which rounds queries and weights too."""

    def distance(**settings: Any) -> float:
        differences = []
        for answer, expected in zip(run(model, {**LIGHT, **settings}), plain, strict=True):
            for token, other, ours, theirs in zip(
                answer[0], expected[0], answer[2], expected[2], strict=True
            ):
                if token != other:
                    break
                differences.append(abs(ours - theirs))
        assert len(differences) > 100
        return sum(differences) / len(differences)

    with ThreadPoolExecutor() as pool:  # engines take a minute to start
        running = [
            # FLASH_ATTN's fp8 is for bfloat16 alone.
            pool.submit(distance, kv_cache_dtype="fp8", dtype="bfloat16", **settings)
            for settings in (
                {},
                {"max_num_batched_tokens": 128, "max_num_seqs": 16},
                {"backend": "FLASH_ATTN"},
            )
        ]
        ours, chunks, theirs = (done.result() for done in running)
    print(f"mean difference of logprobs: {ours:.4f}, in chunks {chunks:.4f}, theirs {theirs:.4f}")
    assert ours < 1.1 * theirs and chunks < 1.1 * theirs


def test_embeddings_of_an_encoder(model: Path, tmp_path: Path) -> None:
    got, expected, counts = encoder.embeddings(
        model, tmp_path, dtype="float16", gpu_memory_utilization=0.1
    )
    assert list(counts) == [counter("varlen_attention")]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
