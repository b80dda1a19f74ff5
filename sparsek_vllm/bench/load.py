"""Servers under load: vLLM's own ``vllm bench serve`` against our backend and FLASH_ATTN.

Both servers are alive side by side and take the load in turn; on several GPUs, or where they do not
fit on one, one after the other. They have random weights of a known model's shape and CUDA graphs.
The demo model lends its tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsek_vllm.backends.vllm_compat import BACKEND_NAME
from sparsek_vllm.bench.serving import BESIDE_KV_BYTES, engines_fit, taking_turns, write_shape
from sparsek_vllm.demo import SERVED_NAME, Server
from sparsek_vllm.demo_model import demo_model_path


@dataclass(frozen=True)
class Load:
    """Clients that ask at once, tokens of each prompt and of each answer, requests in all."""

    clients: int
    prompt: int
    answer: int
    requests: int

    @property
    def name(self) -> str:
        return f"{self.clients} clients, {self.prompt} + {self.answer} tokens"


LOADS = (
    Load(32, 1024, 256, 128),
    Load(256, 1024, 256, 512),
    Load(32, 16384, 256, 64),
    Load(256, 16384, 256, 256),
)
_WARM_UP = Load(32, 1024, 32, 64)
METRICS = ("total_token_throughput", "median_ttft_ms", "median_tpot_ms")


def run(
    shape: str,
    loads: Sequence[Load] = LOADS,
    backends: Sequence[str] = (BACKEND_NAME, "FLASH_ATTN"),
    kv_cache_dtype: str = "auto",
    tensor_parallel_size: int = 1,
    compilation_config: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Throughput, time to the first token and time a token of each load and backend.

    Requests that find no room in the cache wait, and that counts as time to their first token.

    Raises:
        RuntimeError: a request failed.
    """
    results = []
    common = {
        "shape": shape,
        "kv_cache_dtype": kv_cache_dtype,
        "tensor_parallel_size": tensor_parallel_size,
        "compilation_config": compilation_config,
    }
    longest = max(load.prompt + load.answer for load in loads)
    fit = tensor_parallel_size > 1 or engines_fit(len(backends))
    groups = taking_turns(backends, tensor_parallel_size, fit)
    settings = (
        *("--load-format", "dummy", "--max-model-len", str(longest + 64)),
        *("--max-num-seqs", str(max(load.clients for load in loads))),
        # Told, not measured: the other server takes memory meanwhile.
        *("--kv-cache-memory-bytes", str(_kv_bytes(max(map(len, groups))))),
        *("--gpu-memory-utilization", "0.1", "--no-enable-prefix-caching"),
        *("--kv-cache-dtype", kv_cache_dtype),
        *("--tensor-parallel-size", str(tensor_parallel_size)),
        *(["--compilation-config", json.dumps(compilation_config)] if compilation_config else []),
    )
    for together in groups:
        with _servers(shape, together, settings) as (tokenizer, servers):
            for server in servers.values():
                _ask(server, tokenizer, _WARM_UP)
            for number, load in enumerate(loads):
                # Each is the first every other time.
                for backend, server in list(servers.items())[:: -1 if number % 2 else 1]:
                    measured = _ask(server, tokenizer, load)
                    if measured["completed"] != load.requests:
                        raise RuntimeError(
                            f"{backend}, {load.name}: {measured['completed']} of {load.requests} "
                            "requests were answered"
                        )
                    kept = {name: measured[name] for name in METRICS}
                    results.append(common | {"load": load.name, "backend": backend, **kept})
                    print(_line(results[-1]), flush=True)
            for backend, server in servers.items():
                print(f"{backend}: paths {server.path_counts()}", flush=True)
    return results


def _kv_bytes(engines: int) -> int:
    """For each of so many engines on one GPU."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    size = int(0.95 * free) // engines - BESIDE_KV_BYTES
    if size < 1 << 30:
        raise RuntimeError(f"{engines} engines do not fit into the {free >> 30} GiB that are free")
    return size


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['shape']} {result['load']}, {result['backend']}: "
        f"{result['total_token_throughput']:.0f} tokens/s, "
        f"first token {result['median_ttft_ms']:.1f} ms, "
        f"a token {result['median_tpot_ms']:.2f} ms"
    )


@contextlib.contextmanager
def _servers(
    shape: str, backends: Sequence[str], settings: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Server]]]:
    tokenizer = demo_model_path(progress=False)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_shape(folder, shape)
        arguments = ("--tokenizer", str(tokenizer), *settings)
        made = {
            backend: Server(folder, timeout=560, arguments=arguments, backend=backend, eager=False)
            for backend in backends
        }
        with ThreadPoolExecutor() as pool:
            started = [pool.submit(stack.enter_context, server) for server in made.values()]
            try:
                for one in started:
                    one.result()
            except BaseException:  # an interruption too: nothing is left to start
                for server in made.values():
                    server.stop()
                raise
        yield tokenizer, made


def _ask(server: Server, tokenizer: Path, load: Load) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--base-url", server.url, "--model", SERVED_NAME, "--tokenizer", str(tokenizer)),
            *("--dataset-name", "random", "--random-input-len", str(load.prompt)),
            *("--random-output-len", str(load.answer), "--ignore-eos", "--seed", "1"),
            *("--num-prompts", str(load.requests), "--max-concurrency", str(load.clients)),
            *("--num-warmups", "2", "--disable-tqdm", "--temperature", "0"),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        result = Path(folder, "result.json")
        if done.returncode or not result.exists():
            log = done.stdout[-2000:] + done.stderr[-4000:]
            raise RuntimeError(f"vllm bench serve failed:\n{log}")
        measured: dict[str, Any] = json.loads(result.read_text())
    return measured
