"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import target
from packages import copy_tracked, wheel_of

from sparsek_vllm import build

# For the processes that tests start too.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def objects_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The library is built in many ways, out of much the same objects."""
    os.environ[build.OBJECT_CACHE] = str(tmp_path_factory.mktemp("kept objects"))


@pytest.fixture(scope="session")
def model() -> Path:
    """The demo model's folder."""
    from sparsek_vllm.demo_model import demo_model_path

    return demo_model_path(progress=False)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what git tracks."""
    return copy_tracked(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with its kernels."""
    return wheel_of(tree, tmp_path_factory.mktemp("wheel"), SPARSEK_BUILD="1")


@pytest.fixture(scope="session")
def device() -> Any:
    """Where the ops under test run."""
    return target.DEVICE


@pytest.fixture(scope="session", autouse=True)
def kernels_on_the_host() -> Iterator[None]:
    """With SPARSEK_TEST_DEVICE=emulated, ops on CPU tensors run the kernels' sources."""
    if target.NAME == "emulated":
        from emulated import emulated_kernels

        with emulated_kernels():
            yield
    else:
        yield
