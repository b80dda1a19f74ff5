"""Random load on a server whose KV cache is too small for it, then its books are checked.

Usage: soak.py MODEL_SHAPE SECONDS SEED KV_GIB [MAX_LENGTH]

Clients of its OpenAI API send prompts of 1 to MAX_LENGTH tokens: some share a prefix, some ask for
several samples, some leave before the first token and some in mid-stream. A fixed probe prompt is
asked again and again; its greedy tokens may differ from the first answer only where that answer's
own two best tokens were near each other. At the end no block may be in use. Prints one JSON line;
the exit status says whether all is well.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from sparsek_vllm.bench.serving import write_shape
from sparsek_vllm.demo import SERVED_NAME, Server
from sparsek_vllm.demo_model import demo_model_path

NEAR = 0.1
PROBE_TOKENS = 32
IN_FLIGHT = 24
VOCABULARY = 49_000  # of the demo model's tokenizer, which is lent


class Soak:
    def __init__(self, server: Server, seed: int, longest: int) -> None:
        self.server, self.random, self.longest = server, random.Random(seed), longest
        self.api = AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
        )
        named = ("done", "cancelled", "left_in_mid_stream", "tokens", "probes", "near_ties")
        self.counts = dict.fromkeys(named, 0)
        self.prefixes = [self.tokens(n) for n in (64, 1000, longest // 8)]
        self.probe = self.tokens(min(700, longest // 2))
        self.first_probe: list[tuple[str, float]] | None = None

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(10, VOCABULARY) for _ in range(count)]

    def metric(self, name: str) -> float:
        """Sum of a metric of vLLM's over its labels."""
        with urllib.request.urlopen(f"{self.server.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        values = [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")]
        if not values:
            raise RuntimeError(f"vLLM shows no metric {name}")
        return sum(values)

    async def ask(self, prompt: list[int], **options: Any) -> Any:
        return await self.api.completions.create(
            model=SERVED_NAME,
            prompt=prompt,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
            **options,
        )

    async def stream(self, prompt: list[int], chunks: int | None, **options: Any) -> int | None:
        """Tokens of the answer; None for a client that leaves after so many ``chunks``."""
        answer = await self.ask(
            prompt, stream=True, stream_options={"include_usage": True}, **options
        )
        seen, tokens = 0, 0
        async with answer:
            async for chunk in answer:
                seen += 1
                if seen == chunks:
                    return None
                tokens = chunk.usage.completion_tokens if chunk.usage else 0
        return tokens

    async def load(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            length = int(self.longest ** self.random.random())
            prefix = self.random.choice([[], [], *self.prefixes])
            prompt = (prefix + self.tokens(max(1, length - len(prefix))))[: self.longest]
            samples = self.random.choice([1, 1, 1, 2, 4])
            want = self.random.randint(1, 300)
            mood = self.random.random()
            patience = self.random.uniform(0.01, 5) if mood < 0.1 else None
            chunks = self.random.randint(1, want) if mood > 0.9 else None
            try:
                tokens = await asyncio.wait_for(
                    self.stream(prompt, chunks, max_tokens=want, n=samples, temperature=1.0),
                    patience,
                )
            except TimeoutError:
                self.counts["cancelled"] += 1
                continue
            if tokens is None:
                self.counts["left_in_mid_stream"] += 1
                continue
            assert tokens == want * samples, f"{tokens} tokens, {want} x {samples} were asked for"
            self.counts["done"] += 1
            self.counts["tokens"] += tokens

    async def probes(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            answer = await self.ask(
                self.probe, max_tokens=PROBE_TOKENS, temperature=0.0, logprobs=2
            )
            logprobs = answer.choices[0].logprobs
            steps = []
            for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
                best = sorted(top.values(), reverse=True)
                steps.append((token, best[0] - best[1]))
            assert len(steps) == PROBE_TOKENS
            self.first_probe = self.first_probe or steps
            for (token, _), (expected, gap) in zip(steps, self.first_probe, strict=True):
                if token != expected:
                    assert gap < NEAR, f"the probe's answer changed where the gap was {gap}"
                    self.counts["near_ties"] += 1
                    break
            self.counts["probes"] += 1
            await asyncio.sleep(0.5)

    async def run(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        async with self.api:
            load = [self.load(deadline) for _ in range(IN_FLIGHT)]
            await asyncio.gather(*load, self.probes(deadline))
            # One more step publishes the state after the last request.
            for _ in range(3):
                await self.ask(self.tokens(20), max_tokens=2, temperature=0.0)
                await asyncio.sleep(1)
        usage = self.metric("vllm:kv_cache_usage_perc")
        report = {
            **self.counts,
            "preemptions": self.metric("vllm:num_preemptions_total"),
            "kv_cache_usage": usage,
            "paths": self.server.path_counts(),
        }
        print(json.dumps(report), flush=True)
        expected = ("done", "cancelled", "left_in_mid_stream", "probes")
        served = report["preemptions"] > 0 and "varlen_attention:hopper" in report["paths"]
        return usage == 0 and served and all(self.counts[name] > 0 for name in expected)


def soak(shape: str, seconds: float, seed: int, kv_gib: float, longest: int = 60_000) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder), shape)
        arguments = (
            *("--tokenizer", str(demo_model_path(progress=False)), "--load-format", "dummy"),
            *("--max-model-len", str(longest + 512), "--max-num-seqs", "64"),
            *("--kv-cache-memory-bytes", str(int(kv_gib * 2**30))),
            *("--gpu-memory-utilization", "0.1", "--seed", "0"),
        )
        with Server(Path(folder), timeout=560, arguments=arguments, eager=False) as server:
            return asyncio.run(Soak(server, seed, longest).run(seconds))


if __name__ == "__main__":
    shape, seconds, seed, kv_gib, *longest = sys.argv[1:]
    well = soak(shape, float(seconds), int(seed), float(kv_gib), *map(int, longest))
    sys.exit(0 if well else 1)
