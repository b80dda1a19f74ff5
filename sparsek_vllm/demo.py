"""``sparsek demo``: start a vLLM server with our backend, ask it, show what served the answer."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsek_vllm._version import OPENAI, VLLM
from sparsek_vllm.backends.vllm_compat import BACKEND_NAME, ON_CPU, is_cpu_build
from sparsek_vllm.demo_model import cache_root, demo_model_path

SERVED_NAME = "demo"
_STATS = "sparsek_vllm.backends.vllm_worker.StatsExtension"


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why."""


def run(ask: str, keep: bool, model: str | None, port: int, timeout: int) -> None:
    """Serve ``model`` (the demo model by default), ask it ``ask``, and stream the answer."""
    _require_packages()
    if model is not None and not (Path(model) / "config.json").exists():
        raise DemoError(f"model must be a folder with a config.json, got {model}")
    free_port(port)  # an error now, not after a model was made
    folder = Path(model) if model else demo_model_path()
    print(f"Starting vLLM with --attention-backend {BACKEND_NAME} ...", flush=True)
    started = time.perf_counter()
    # fp32 where attention has it: rounding to bf16 can turn a near tie between two first words.
    dtype = "auto" if model else "float32" if is_cpu_build() else "float16"
    with Server(folder, port, timeout, ("--dtype", dtype)) as server:
        print(f"Ready after {time.perf_counter() - started:.0f} s on {server.url}\n", flush=True)
        print(f"> {ask}")
        _ask(server.url, ask)
        _show_proof(server)
        if keep:
            print(f"\nServing on {server.url}/v1 as model '{SERVED_NAME}'. Ctrl-C stops it.")
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
    print("Server stopped.")


def _require_packages() -> None:
    for package, install in (("vllm", VLLM), ("openai", OPENAI)):
        if find_spec(package) is None:
            on_cpu = f" ({ON_CPU})" if package == "vllm" else ""
            raise DemoError(f"{package} is missing: pip install '{install}'{on_cpu}")


def _ask(url: str, question: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    started = time.perf_counter()
    first = None
    tokens = 0
    stream = client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            print(chunk.choices[0].delta.content, end="", flush=True)
    ended = time.perf_counter()
    if first is None:
        raise DemoError("the server sent no answer")
    rate = (tokens - 1) / (ended - first) if tokens > 1 else 0.0
    print(
        f"\n\n{tokens} tokens, first after {first - started:.2f} s, then {rate:.1f} tokens/s",
        flush=True,
    )


def _show_proof(server: Server) -> None:
    counts = server.path_counts()
    for name, count in sorted(counts.items()):
        if name.startswith("varlen_attention:"):
            path = name.removeprefix("varlen_attention:")
            print(
                f"Served by {BACKEND_NAME}, path '{path}': "
                f"{count['calls']} attention calls on {count['tokens']} query rows"
            )
            return
    raise DemoError(f"{BACKEND_NAME} computed nothing; counters: {counts}")


class Server:
    """``python -m vllm.entrypoints.openai.api_server`` on this machine, as a context.

    Args:
        model: folder with the model.
        port: port on 127.0.0.1; 0 picks a free one.
        timeout: seconds to wait until it answers.
        arguments: more arguments for the server.
        backend: its ``--attention-backend``.
        eager: without torch.compile and CUDA graphs, which starts sooner.

    Raises:
        DemoError: the port is in use, or the server stops or does not answer in time; the
            message holds the end of its log.
    """

    def __init__(
        self,
        model: Path,
        port: int = 0,
        timeout: int = 240,
        arguments: tuple[str, ...] = (),
        backend: str = BACKEND_NAME,
        eager: bool = True,
    ) -> None:
        self.port = free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.timeout = timeout
        opened, log = tempfile.mkstemp(prefix="sparsek-server-", suffix=".log")
        os.close(opened)
        self.log = Path(log)
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", SERVED_NAME),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--attention-backend", backend, "--worker-extension-cls", _STATS),
            *(["--enforce-eager"] if eager else []),
            *arguments,
        ]

    def __enter__(self) -> Server:
        # The development endpoints hold /collective_rpc; the server listens on loopback alone.
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        environment["VLLM_SERVER_DEV_MODE"] = "1"
        environment.pop("VLLM_API_KEY", None)  # nobody here has it
        self.process = subprocess.Popen(
            self.command,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cache_root() if cache_root().exists() else None,
            start_new_session=True,
        )
        try:
            self._wait(self.process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None:
            self.log.unlink(missing_ok=True)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline and not self.stopped:
            if process.poll() is not None:
                raise DemoError(f"the server stopped while starting:\n{self._log_end()}")
            with contextlib.suppress(OSError), _open(f"{self.url}/health", timeout=2):
                return
            time.sleep(0.25)
        raise DemoError(f"no answer from the server in {self.timeout} s:\n{self._log_end()}")

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line and "Traceback" not in line]
        return "\n".join([*errors[:3], "...", *lines[-5:], f"(whole log: {self.log})"])

    def path_counts(self) -> dict[str, dict[str, int]]:
        """What ran in the engine's first worker, see :func:`sparsek_vllm.core.path_counts`."""
        body = json.dumps({"method": "sparsek_path_counts"}).encode()
        request = urllib.request.Request(
            f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"}
        )
        with _open(request, timeout=30) as answer:
            counts: dict[str, dict[str, int]] = json.load(answer)["results"][0]
        return counts

    def wait(self) -> None:
        """Until the server ends by itself."""
        assert self.process is not None, "it was not started"
        self.process.wait()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server and the processes that it started; it cannot be started after that."""
        self.stopped = True
        if self.process is None:
            return
        for sig, patience in ((how, 20), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _open(request: Any, timeout: float) -> Iterator[Any]:
    # Straight to loopback, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        yield answer


def free_port(port: int = 0) -> int:
    """``port`` on loopback, or any free one for 0; DemoError where it cannot be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            problem = f"port {port} cannot be had ({error}): pass another --port"
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                problem = f"port {port} is in use: stop what listens there or pass another --port"
            raise DemoError(problem) from error
        return int(probe.getsockname()[1])
