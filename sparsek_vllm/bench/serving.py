"""End-to-end decoding in vLLM: our backend and FLASH_ATTN, alive side by side, asked in turn; on
several GPUs one after the other.

Each backend is an ``LLM`` in a process of its own with random weights of a known model's shape.
Prompts come out of the prefix cache, so that the time of a run is that of its decode steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsek_vllm.backends.vllm_compat import BACKEND_NAME

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
WORKLOADS = {
    "llama-3.1-8b": ((1, 1024), (32, 1024), (128, 1024), (16, 16384), (1, 65536), (4, 65536)),
    "llama-3.2-1b": ((1, 65536), (64, 8192), (8, 65536)),
}
_KV_BYTES = 38 << 30  # of an engine, on all its GPUs
BESIDE_KV_BYTES = 24 << 30  # of one on one GPU: weights of 8B parameters, activations, graphs
_STEPS = 64
_REPEATS = 3


def write_shape(folder: Path, shape: str) -> Path:
    """A model folder that holds nothing but the configuration of ``shape``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    return folder


def taking_turns(backends: Sequence[str], tensor_parallel_size: int, fit: bool) -> list[list[str]]:
    """The backends in groups that are alive together.

    One each where their engines do not fit. On several GPUs too: an engine's kernels
    wait for each other, and those of two engines get into each other's way.
    """
    together = fit and tensor_parallel_size == 1
    return [list(backends)] if together else [[b] for b in backends]


def engines_fit(engines: int) -> bool:
    """Whether so many fit on one GPU together."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    fit = engines * (_KV_BYTES + BESIDE_KV_BYTES) <= free
    if not fit:
        print(f"{engines} engines do not fit into {free >> 30} GiB: they take turns", flush=True)
    return fit


def run(
    shape: str,
    workloads: Sequence[tuple[int, int]] | None = None,
    backends: Sequence[str] = (BACKEND_NAME, "FLASH_ATTN"),
    kv_cache_dtype: str = "auto",
    tensor_parallel_size: int = 1,
    compilation_config: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Milliseconds per output token and seconds of prefill, for each backend and workload."""
    workloads = workloads or WORKLOADS[shape]
    settings = {
        "max_num_seqs": max(batch for batch, _ in workloads),
        "kv_cache_dtype": kv_cache_dtype,
        "tensor_parallel_size": tensor_parallel_size,
    }
    sizes = sorted({batch for batch, _ in workloads})
    asked = compilation_config or {}
    settings["compilation_config"] = {"cudagraph_capture_sizes": sizes} | asked
    results: list[dict[str, Any]] = [
        {
            "shape": shape,
            "kv_cache_dtype": kv_cache_dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "compilation_config": compilation_config,
            "batch": batch,
            "context": context,
            "ms_per_token": {},
            "spread_ms": {},
            "prefill_s": {},
        }
        for batch, context in workloads
    ]
    fit = tensor_parallel_size > 1 or engines_fit(len(backends))
    for together in taking_turns(backends, tensor_parallel_size, fit):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_shape(folder, shape)
            engines = {b: stack.enter_context(_engine(folder, b, settings)) for b in together}
            for backend, engine in engines.items():
                print(f"{backend}: ready after {engine.read()['seconds']:.0f} s", flush=True)
            for result in results:
                _measure(engines, result)
                print(_line(result), flush=True)
            for backend, engine in engines.items():
                print(f"{backend}: paths {engine.paths()}", flush=True)
    return results


def _measure(engines: dict[str, _Engine], result: dict[str, Any]) -> None:
    work = {"batch": result["batch"], "context": result["context"]}
    steps: dict[str, list[float]] = {b: [] for b in engines}
    result["prefill_s"] |= {b: e.ask(**work, tokens=1) for b, e in engines.items()}
    for _ in range(_REPEATS):
        for backend, engine in engines.items():
            short = engine.ask(**work, tokens=2)
            long = engine.ask(**work, tokens=2 + _STEPS)
            steps[backend].append(1e3 * (long - short) / _STEPS)
    result["ms_per_token"] |= {b: statistics.median(own) for b, own in steps.items()}
    result["spread_ms"] |= {b: max(own) - min(own) for b, own in steps.items()}


def _line(result: dict[str, Any]) -> str:
    times = result["ms_per_token"]
    ours, peer = times.get(BACKEND_NAME), times.get("FLASH_ATTN")
    shown = ", ".join(f"{b} {t:.3f}" for b, t in times.items())
    ratio = f", ours / FLASH_ATTN {ours / peer:.3f}" if ours and peer else ""
    prefill = ", ".join(f"{b} {t:.2f}" for b, t in result["prefill_s"].items())
    cache = "" if result["kv_cache_dtype"] == "auto" else f" {result['kv_cache_dtype']}"
    ranks = result["tensor_parallel_size"]
    gpus = f" on {ranks} GPUs" if ranks > 1 else ""
    name = f"{result['shape']}{cache}{gpus} {result['batch']} x {result['context']}"
    return f"{name}: ms a token {shown}{ratio}; prefill s {prefill}"


class _Engine:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("an engine of the serving benchmark stopped; its log is above")
        return json.loads(line)

    def ask(self, **request: int) -> float:
        seconds: float = self._send(request)["seconds"]
        return seconds

    def paths(self) -> Any:
        return self._send({"paths": True})

    def _send(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading tells of it
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.read()


@contextlib.contextmanager
def _engine(folder: Path, backend: str, settings: dict[str, Any]) -> Iterator[_Engine]:
    command = [sys.executable, "-m", "sparsek_vllm.bench.serving", str(folder), backend]
    process = subprocess.Popen(
        [*command, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ},
        start_new_session=True,
    )
    try:
        yield _Engine(process)
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, and had not read all
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()


def _serve(folder: str, backend: str, settings: str) -> None:
    """The engine's process: requests as JSON lines on stdin, answers on what stdout was."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    import torch
    from vllm import LLM, SamplingParams

    own: dict[str, Any] = json.loads(settings)
    started = time.perf_counter()
    llm = LLM(
        folder,
        attention_config={"backend": backend},
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=66560,
        # Told, not measured: the other engine takes memory meanwhile.
        kv_cache_memory_bytes=_KV_BYTES // own["tensor_parallel_size"],
        gpu_memory_utilization=0.1,  # that must be free at the start
        worker_extension_cls="sparsek_vllm.backends.vllm_worker.StatsExtension",
        seed=0,
        **own,
    )

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    answer(seconds=time.perf_counter() - started)
    for line in sys.stdin:
        request = json.loads(line)
        if "paths" in request:
            answer(**llm.collective_rpc("sparsek_path_counts")[0])
            continue
        batch, context = request["batch"], request["context"]
        ids = torch.Generator().manual_seed(batch * 1_000_003 + context)
        prompts = torch.randint(10, 100_000, (batch, context), generator=ids).tolist()
        parameters = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, max_tokens=request["tokens"]
        )
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        llm.generate(inputs, parameters, use_tqdm=False)
        answer(seconds=time.perf_counter() - started)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
