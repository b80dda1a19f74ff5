"""The demo model served on the GPU by our backend and by FLASH_ATTN, both with CUDA graphs.

Greedy tokens of 200 prompts agree up to near ties, bf16 logprobs are as near to float32 as
FLASH_ATTN's, and a pass key comes back from a long prompt.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import client
from target import counter

from sparsek_vllm.backends.vllm_compat import BACKEND_NAME
from sparsek_vllm.demo import SERVED_NAME, Server

pytest.importorskip("vllm")

COMMON = (
    *("--max-model-len", "8192", "--gpu-memory-utilization", "0.1"),
    *("--kv-cache-memory-bytes", str(8 << 30)),
)
TOPICS = (
    "rain", "bread", "the moon", "a lighthouse", "chess", "bees", "Norway", "copper", "tea",
    "violins", "glaciers", "maps", "onions", "trains", "salt", "owls", "paper", "deserts",
    "clocks", "the number seven",
)  # fmt: skip
FORMS = (
    "Tell me about {}.",
    "Write a short poem about {}.",
    "List five facts on {}:\n1.",
    "def describe_{}(): # python\n",
    "Translate into French: I like {} very much.",
    "Q: Why is {} important?\nA:",
    "{} is",
    "Once upon a time there was {} and",
)


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[dict[tuple[str, str], Server]]:
    """Our backend and FLASH_ATTN, in fp16 and in bf16, started at once."""
    wanted = [(b, d) for b in (BACKEND_NAME, "FLASH_ATTN") for d in ("float16", "bfloat16")]
    made = {
        key: Server(
            model,
            timeout=420,
            arguments=("--dtype", key[1], *COMMON),
            backend=key[0],
            eager=False,
        )
        for key in wanted
    }
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        list(pool.map(stack.enter_context, made.values()))
        yield made


def prompts() -> list[str]:
    """200: short ones, and ones of up to some 6,000 tokens, some of which share a beginning."""
    pick = random.Random(0)
    short = [form.format(topic) for topic in TOPICS for form in FORMS]
    long = []
    for i in range(200 - len(short)):
        words = " ".join(
            pick.choice(FORMS).format(pick.choice(TOPICS)) for _ in range(pick.randint(5, 500))
        )
        shared = "You are a patient teacher of natural history. " * 40 if i % 3 == 0 else ""
        long.append(f"{shared}{words}\nIn short, {pick.choice(TOPICS)}")
    return short + long


def complete(server: Server, texts: list[Any], **options: Any) -> list[Any]:
    """The completions of all prompts, 32 at a time."""

    async def everything() -> list[Any]:
        api, gate = client(server, timeout=300), asyncio.Semaphore(32)

        async def one(text: Any) -> Any:
            async with gate:
                answer = await api.completions.create(
                    model=SERVED_NAME, prompt=text, temperature=0, **options
                )
                return answer.choices[0]

        return list(await asyncio.gather(*map(one, texts)))

    return asyncio.run(everything())


def assert_ours_ran(server: Server) -> None:
    counts = server.path_counts()
    assert set(counts) == {counter("varlen_attention"), counter("write_kv")}
    assert all(count["calls"] > 0 for count in counts.values())


def test_greedy_tokens_are_those_of_flash_attn(servers) -> None:
    ours, theirs = (servers[b, "float16"] for b in (BACKEND_NAME, "FLASH_ATTN"))
    texts = prompts()
    options = {"max_tokens": 48, "logprobs": 2, "extra_body": {"ignore_eos": True}}
    for again in (False, True):  # the second time out of the prefix cache
        answers = [complete(server, texts, **options) for server in (ours, theirs)]
        same = 0
        for a, b in zip(*answers, strict=True):
            a_tokens, b_tokens = a.logprobs.tokens, b.logprobs.tokens
            assert len(a_tokens) == len(b_tokens) == 48
            split = next((i for i in range(48) if a_tokens[i] != b_tokens[i]), None)
            if split is None:
                same += 1
                continue
            top = sorted(b.logprobs.top_logprobs[split].values(), reverse=True)
            assert top[0] - top[1] < 0.1, (again, split, a.text, b.text)
        print(f"prefix cache {again}: {same} of {len(texts)} the same, others split at near ties")
        assert same > len(texts) // 2
    assert_ours_ran(ours)


def test_bf16_logprobs_are_as_near_to_fp32(servers, model: Path) -> None:
    """On the same forced tokens: at most 1.1 times FLASH_ATTN's mean distance."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda()
    forced = [tokenizer(text).input_ids[:2000] for text in prompts()[::4]]
    exact = []
    with torch.inference_mode():
        for ids in forced:
            tokens = torch.tensor([ids], device="cuda")
            logprobs = reference(tokens).logits[0, :-1].float().log_softmax(-1)
            exact.append(logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    distance = {}
    for backend in (BACKEND_NAME, "FLASH_ATTN"):
        answers = complete(
            servers[backend, "bfloat16"], forced, max_tokens=1, logprobs=1, echo=True
        )
        gaps = []
        for answer, ids, own in zip(answers, forced, exact, strict=True):
            got = answer.logprobs.token_logprobs[1 : len(ids)]
            gaps += [abs(a - b) for a, b in zip(got, own, strict=True)]
        distance[backend] = sum(gaps) / len(gaps)
    print(f"mean |logprob - fp32| over {len(gaps)} tokens: {distance}")
    assert distance[BACKEND_NAME] <= 1.1 * distance["FLASH_ATTN"]
    assert_ours_ran(servers[BACKEND_NAME, "bfloat16"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("length", [2000, 4000, 7000])
def test_pass_key(servers, model: Path, length: int, dtype: str) -> None:
    """Found by our backend wherever FLASH_ATTN finds it: it is a model of 135M parameters."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    count = length // len(tokenizer(filler).input_ids) - 3
    found = {}
    for backend in (BACKEND_NAME, "FLASH_ATTN"):
        hits = []
        for depth in (0.1, 0.5, 0.9):
            before = int(count * depth)
            text = (
                f"There is a pass key in this text. Remember it.\n{filler * before}"
                f"The pass key is 71432. Remember it. 71432 is the pass key.\n"
                f"{filler * (count - before)}\nWhat is the pass key? The pass key is"
            )
            (answer,) = complete(servers[backend, dtype], [text], max_tokens=8)
            hits.append("71432" in answer.text)
        found[backend] = hits
    print(length, dtype, found)
    assert found[BACKEND_NAME] == found["FLASH_ATTN"]
    assert any(found[BACKEND_NAME])
