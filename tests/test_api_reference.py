"""The published API reference: its examples run, its signatures are the code's."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import api_reference as reference
import blackwell_sparsek
import pytest
import torch
from blackwell_sparsek.core import Config

import sparsek_vllm

BLOCKS = {block.name: block for block in reference.blocks()}


def test_every_block_is_accounted_for() -> None:
    kinds = (
        reference.SIGNATURES,
        reference.CLASSES,
        reference.RETURNS,
        reference.SHELL,
        reference.ON_CPU,
        reference.ON_GPU,
    )
    assert sorted(name for kind in kinds for name in kind) == sorted(BLOCKS)


@pytest.mark.parametrize("name", sorted(reference.ON_CPU))
def test_example_runs(name: str) -> None:
    code = reference.prelude("cpu") + BLOCKS[name].text
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {
        "Common Exceptions#0": "Input error: Q must be on a CUDA device, got cpu",
        "__version__#0": "0.1.0",
        "core.get_default_config()#1": "CUDA Architecture: sm_90a",
    }
    assert expected.get(name, "") in done.stdout


@pytest.mark.parametrize("name", sorted(reference.SIGNATURES))
def test_signature(name: str) -> None:
    (published,) = ast.parse(BLOCKS[name].text.strip() + ": ...").body
    assert isinstance(published, ast.FunctionDef)
    path = name.split("(")[0]
    function = blackwell_sparsek
    for part in path.split("."):
        function = getattr(function, part)
    actual = inspect.signature(function).parameters
    arguments = published.args
    names = [a.arg for a in (*arguments.args, arguments.vararg, *arguments.kwonlyargs) if a]
    names += [arguments.kwarg.arg] if arguments.kwarg else []
    assert list(actual) == names
    positional = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    pairs = [
        *zip(positional, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        assert actual[argument.arg].default == ast.literal_eval(default), argument.arg


def test_config_fields() -> None:
    (published,) = ast.parse(BLOCKS["core.Config#0"].text).body
    assert isinstance(published, ast.ClassDef)
    expected = {
        node.target.id: ast.literal_eval(node.value)
        for node in published.body
        if isinstance(node, ast.AnnAssign)
    }
    ours = [(item.name, item.default) for item in fields(Config)]
    # In the published order, what came later behind it.
    assert ours[: len(expected)] == list(expected.items())
    assert [name for name, _ in ours[len(expected) :]] == ["kernels"]


@pytest.mark.parametrize(
    ("name", "result"),
    [
        (
            "utils.benchmark_latency()#1",
            lambda: blackwell_sparsek.utils.benchmark_latency(lambda: None, num_iters=3),
        ),
        (
            "utils.validate_correctness()#1",
            lambda: blackwell_sparsek.utils.validate_correctness(torch.ones(2), torch.ones(2))[1],
        ),
        (
            "utils.compare_to_sdpa()#1",
            lambda: blackwell_sparsek.utils.compare_to_sdpa(
                *[torch.randn(1, 2, 8, 64)] * 3,
                torch.nn.functional.scaled_dot_product_attention,
            ),
        ),
        ("core.get_build_info()#1", lambda: blackwell_sparsek.core.get_build_info()),
    ],
)
def test_returned_keys(name: str, result: object) -> None:
    import blackwell_sparsek.core
    import blackwell_sparsek.utils  # noqa: F401

    published = ast.parse(BLOCKS[name].text.strip()).body[0].value
    assert list(result()) == [ast.literal_eval(key) for key in published.keys]


def test_backend_class_has_the_published_members() -> None:
    from blackwell_sparsek.backends import SparseKBackend

    assert SparseKBackend.get_name() == "SPARSEK_XFORMERS"
    assert SparseKBackend.get_supported_head_sizes() == [64, 128]
    assert SparseKBackend.get_kv_cache_shape(10, 16, 3, 64) == (10, 3, 16, 128)
    assert callable(SparseKBackend.forward)


def test_environment_example(tmp_path: Path) -> None:
    (tmp_path / "my_script.py").write_text(
        "from blackwell_sparsek.core import get_default_config as get\n"
        "print(get().debug_mode, get().enable_profiling)\n"
    )
    folder = str(Path(sys.executable).parent)
    path = {"PATH": folder + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-ec", BLOCKS["Environment Variables#0"].text],
        cwd=tmp_path,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True True\n", done.stderr


def test_alias_is_the_same_package() -> None:
    import blackwell_sparsek.backends.vllm_compat as old

    import sparsek_vllm.backends.vllm_compat as new

    assert blackwell_sparsek is sparsek_vllm
    assert old is new
    assert new.__spec__.name == "sparsek_vllm.backends.vllm_compat"
