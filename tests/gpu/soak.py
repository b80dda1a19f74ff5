"""Random load on an engine whose KV cache is too small for it, then its books are checked.

Usage: soak.py MODEL_SHAPE SECONDS SEED KV_GIB [MAX_LENGTH]

Requests of 1 to MAX_LENGTH tokens come and go: some share a prefix, some ask for several samples,
some are cancelled on the way. A fixed probe prompt is asked again and again; its greedy tokens may
differ from the first answer only where that answer's own two best tokens were near each other.
At the end no block may be in use. Prints one JSON line; the exit status says whether all is well.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsek_vllm.backends.vllm_compat import BACKEND_NAME
from sparsek_vllm.bench.serving import write_shape

NEAR = 0.1
PROBE_TOKENS = 32
IN_FLIGHT = 24


def metric(name: str) -> float:
    """Sum of a metric of vLLM's over its labels."""
    from prometheus_client import REGISTRY

    samples = [s for family in REGISTRY.collect() for s in family.samples if s.name == name]
    if not samples:
        raise RuntimeError(f"vLLM shows no metric {name}")
    return sum(sample.value for sample in samples)


class Soak:
    def __init__(self, engine: Any, seed: int, longest: int) -> None:
        self.engine, self.random, self.longest = engine, random.Random(seed), longest
        self.counts = dict.fromkeys(("done", "cancelled", "tokens", "probes", "near_ties"), 0)
        self.prefixes = [self.tokens(n) for n in (64, 1000, longest // 8)]
        self.probe = self.tokens(700)
        self.first_probe: list[tuple[int, float]] | None = None
        self.number = 0

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(10, 100_000) for _ in range(count)]

    async def ask(self, prompt: list[int], **options: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.number += 1
        parameters = SamplingParams(
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else only the samples of the last step
            **options,
        )
        last = None
        async for last in self.engine.generate(  # noqa: B007
            {"prompt_token_ids": prompt}, parameters, f"soak-{self.number}"
        ):
            pass
        return last

    async def load(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            length = int(self.longest ** self.random.random())
            prefix = self.random.choice([[], [], *self.prefixes])
            prompt = (prefix + self.tokens(max(1, length - len(prefix))))[: self.longest]
            samples = self.random.choice([1, 1, 1, 2, 4])
            want = self.random.randint(1, 300)
            request = asyncio.create_task(
                self.ask(prompt, max_tokens=want, n=samples, temperature=1.0)
            )
            patience = self.random.uniform(0.01, 5) if self.random.random() < 0.2 else None
            try:
                result = await asyncio.wait_for(request, patience)
            except asyncio.TimeoutError:
                self.counts["cancelled"] += 1
                continue
            assert [len(o.token_ids) for o in result.outputs] == [want] * samples
            self.counts["done"] += 1
            self.counts["tokens"] += want * samples

    async def probes(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            result = await self.ask(
                self.probe, max_tokens=PROBE_TOKENS, temperature=0.0, logprobs=2
            )
            answer = []
            for token, top in zip(
                result.outputs[0].token_ids, result.outputs[0].logprobs, strict=True
            ):
                best = sorted((entry.logprob for entry in top.values()), reverse=True)
                answer.append((token, best[0] - best[1]))
            self.first_probe = self.first_probe or answer
            for (token, _), (expected, gap) in zip(answer, self.first_probe, strict=True):
                if token != expected:
                    assert gap < NEAR, f"the probe's answer changed where the gap was {gap}"
                    self.counts["near_ties"] += 1
                    break
            self.counts["probes"] += 1
            await asyncio.sleep(0.5)


async def run(shape: str, seconds: float, seed: int, kv_gib: float, longest: int) -> bool:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    with tempfile.TemporaryDirectory() as folder:
        arguments = AsyncEngineArgs(
            model=str(write_shape(Path(folder), shape)),
            attention_config={"backend": BACKEND_NAME},
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=longest + 512,
            max_num_seqs=64,
            kv_cache_memory_bytes=int(kv_gib * 2**30),
            gpu_memory_utilization=0.1,
            worker_extension_cls="sparsek_vllm.backends.vllm_worker.StatsExtension",
            seed=0,
        )
        engine = AsyncLLM.from_engine_args(arguments)
        soak = Soak(engine, seed, longest)
        deadline = time.monotonic() + seconds
        tasks = [soak.load(deadline) for _ in range(IN_FLIGHT)] + [soak.probes(deadline)]
        await asyncio.gather(*tasks)
        # One more step publishes the state after the last request.
        for _ in range(3):
            await soak.ask(soak.tokens(20), max_tokens=2, temperature=0.0)
            await asyncio.sleep(1)
        usage = metric("vllm:kv_cache_usage_perc")
        report = {
            **soak.counts,
            "preemptions": metric("vllm:num_preemptions_total"),
            "kv_cache_usage": usage,
            "paths": (await engine.collective_rpc("sparsek_path_counts"))[0],
        }
        print(json.dumps(report), flush=True)
        engine.shutdown()
    return usage == 0 and report["probes"] > 0 and report["done"] > 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    longest = int(arguments[4]) if len(arguments) > 4 else 60_000
    well = asyncio.run(
        run(arguments[0], float(arguments[1]), int(arguments[2]), float(arguments[3]), longest)
    )
    sys.exit(0 if well else 1)
