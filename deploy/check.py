"""Asks a server one question with the OpenAI client, and looks at what served it.

Usage: check.py [URL]    (default http://127.0.0.1:8000)

Waits until the server is healthy, CHECK_TIMEOUT seconds at most (default 900: a large model loads
for minutes). Prints the answer; the exit status is 1 if there is none, or if another attention
backend runs.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI

METRIC = "sparsek:attention_info{"


def wait_until_healthy(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError) as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"{url} is not healthy after {seconds:.0f} s: {error}") from None
        time.sleep(1)


def main(url: str) -> None:
    wait_until_healthy(url, float(os.environ.get("CHECK_TIMEOUT", "900")))
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("VLLM_API_KEY") or "none")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=32,
    )
    text = answer.choices[0].message.content
    if not text:
        raise SystemExit(f"{model} at {url} sent no answer: {answer}")
    print(f"{model}: {text}")
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as metrics:
        lines = metrics.read().decode().splitlines()
    ours = [line for line in lines if line.startswith(METRIC)]
    if not ours:
        raise SystemExit(f"{url} does not run SPARSEK_XFORMERS: /metrics has no {METRIC[:-1]}")
    print(ours[0])


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
