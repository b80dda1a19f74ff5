"""Compiles the CUDA kernels into the wheel where nvcc and torch are found, else makes a pure wheel.

``SPARSEK_BUILD=1`` turns a missing tool into an error, ``SPARSEK_BUILD=0`` asks for the pure wheel.
An editable installation compiles at first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def load_build() -> ModuleType:
    """``sparsek_vllm.build`` alone: importing the whole package would need torch."""
    path = Path(__file__).parent / "sparsek_vllm" / "build" / "__init__.py"
    spec = importlib.util.spec_from_file_location("sparsek_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sparsek_build"] = module
    spec.loader.exec_module(module)
    return module


build = load_build()


def find_tools():
    """The tools for the kernels, or None for a pure wheel."""
    wish = os.environ.get("SPARSEK_BUILD", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SPARSEK_BUILD must be 0, 1 or not set, got {wish!r}")
    if wish == "0":
        return None
    try:
        return build.find_tools()
    except build.BuildError as error:
        if wish == "1":
            raise SystemExit(f"SPARSEK_BUILD=1, but {error}") from None
        print(f"sparsek-vllm: a wheel without kernels, they compile at first use: {error}")
        return None


tools = find_tools()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if tools is not None and not self.editable_mode:
            target = Path(self.build_lib) / "sparsek_vllm"
            build.build(target, tools, build.DEFAULT, build.ARCHS)


class BdistWheel(bdist_wheel):
    """The library is bound to a platform, but to no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if tools is not None else (python, abi, platform)


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        return tools is not None


setup(distclass=Platform, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
