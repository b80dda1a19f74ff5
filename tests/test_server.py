"""The OpenAI-compatible server with our backend, asked by many clients at once."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_reference
import pytest
from engine import client

from sparsek_vllm._version import __version__
from sparsek_vllm.demo import SERVED_NAME, DemoError, Server

FP32 = ("--dtype", "float32", "--max-model-len", "2048")
TOPICS = (
    "rain", "bread", "the moon", "a lighthouse", "chess", "bees", "Norway", "copper",
    "tea", "violins", "glaciers", "maps", "onions", "trains", "salt", "owls",
)  # fmt: skip


class Serve(Server):
    """The same through the command ``vllm serve``."""

    def __init__(self, model: Path, **settings: Any) -> None:
        super().__init__(model, **settings)
        vllm = Path(sys.executable).with_name("vllm")
        self.command[:5] = [str(vllm), "serve", str(model)]


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    with Serve(model, arguments=FP32) as running:
        yield running
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"


class Published(Server):
    """By the command of the published API reference, with our model in place of the gated one."""

    def __init__(self, model: Path, **settings: Any) -> None:
        super().__init__(model, **settings)
        (block,) = [b for b in api_reference.blocks() if b.name == "backends.SparseKBackend#1"]
        assert "--attention-backend SPARSEK_XFORMERS" in block.text
        command = block.text.rstrip().replace("meta-llama/Llama-3.1-70B", str(model))
        folder = Path(sys.executable).parent
        local = shlex.join(a for a in self.command[5:] if a != str(model))
        self.command = ["bash", "-c", f'PATH="{folder}:$PATH"\n{command} {local}']


async def chat(api: Any, topic: str) -> str:
    stream = await api.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": f"Tell me about {topic}."}],
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def complete(api: Any, topic: str) -> str:
    stream = await api.completions.create(
        model=SERVED_NAME,
        prompt=f"Here is what everyone should know about {topic}: ",
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    return "".join([chunk.choices[0].text async for chunk in stream])


async def give_up(api: Any, topic: str) -> None:
    """Reads two chunks of a long answer and closes the connection."""
    stream = await api.completions.create(
        model=SERVED_NAME, prompt=f"All about {topic}:", max_tokens=500, stream=True
    )
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 2:
            break
    await stream.close()


def test_the_log_says_which_backend_runs(server: Server) -> None:
    assert "vllm" in server.command[0]
    assert "Using SPARSEK_XFORMERS backend (CPU reference path)." in server.log.read_text()


def test_the_metrics_say_which_path_runs(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    info = 'sparsek:attention_info{path="reference",variant="default",version="%s"} 1.0'
    assert info % __version__ in lines
    # vLLM's own are still there.
    assert any(line.startswith("vllm:num_requests_running{") for line in lines)


METRIC = """
from types import SimpleNamespace
from prometheus_client import generate_latest
from sparsek_vllm.backends.vllm_compat import backend_member
from sparsek_vllm.backends.vllm_metrics import AttentionInfo
ours = backend_member()
# Two engines of one process, which chose us in two ways; and one that did not.
for head_size, backend, kinds in ((64, ours, {}), (80, None, {"full": ours}), (96, None, {})):
    AttentionInfo(SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend, backend_per_kind=kinds),
        model_config=SimpleNamespace(get_head_size=lambda: head_size),
    ))
print(generate_latest().decode().count("sparsek:attention_info{"))
"""


@pytest.mark.parametrize(("device", "count"), [("", "1"), ("cpu", "0")])
def test_the_metric_is_there_only_where_the_choice_is_honoured(device: str, count: str) -> None:
    """VLLM_TARGET_DEVICE=cpu takes CPU_ATTN whatever is chosen."""
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_TARGET_DEVICE"}
    environment |= {"VLLM_TARGET_DEVICE": device} if device else {}
    done = subprocess.run(
        [sys.executable, "-c", METRIC], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip().splitlines()[-1:] == [count], done.stderr[-2000:]


def test_thirty_two_parallel_clients(server: Server) -> None:
    """Nothing is lost, and each answer is the one given to a client that is alone."""

    async def one_by_one() -> list[str]:
        async with client(server, timeout=120) as api:
            return [await ask(api, topic) for topic in TOPICS for ask in (chat, complete)]

    async def together() -> list[Any]:
        async with client(server, timeout=120) as api:
            asked = [ask(api, topic) for topic in TOPICS for ask in (chat, complete)]
            left = [give_up(api, topic) for topic in TOPICS[:6]]
            return await asyncio.gather(*asked, *left, return_exceptions=True)

    alone = asyncio.run(one_by_one())
    assert len(alone) == 32 and all(alone)
    answers = asyncio.run(together())
    assert answers[:32] == alone
    assert answers[32:] == [None] * 6
    counts = server.path_counts()
    assert counts["varlen_attention:reference"]["tokens"] > 0


def test_killed_and_started_again(server: Server, model: Path) -> None:
    async def capital(running: Server) -> str:
        async with client(running, timeout=120) as api:
            answer = await api.chat.completions.create(
                model=SERVED_NAME,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                temperature=0,
                max_tokens=16,
            )
            return str(answer.choices[0].message.content)

    before = asyncio.run(capital(server))
    assert before == "The capital of France is Paris."
    server.stop(signal.SIGKILL)
    assert server.process.poll() is not None
    # On the same port, by the other command.
    with Published(model, port=server.port, arguments=FP32) as again:
        assert "python -m vllm.entrypoints.openai.api_server" in again.command[2]
        assert asyncio.run(capital(again)) == before


def test_port_in_use(model: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DemoError) as error:
            Server(model, port=port)
    assert str(error.value) == (
        f"port {port} is in use: stop what listens there or pass another --port"
    )
