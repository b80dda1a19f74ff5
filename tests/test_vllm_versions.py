"""The backend's classes against vLLM 0.26.0 and 0.33.0, read from their wheels, and 0.32.0.

Every method that our classes override must take what that version's callers pass, by name.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from wheels import wheel_sources

from sparsek_vllm.backends import vllm as ours
from sparsek_vllm.backends import vllm_compat
from sparsek_vllm.backends.vllm_metrics import AttentionInfo

VERSIONS = ("0.26.0", "0.33.0")
PAIRS = {
    "AttentionBackend": ours.SparseKBackend,
    "AttentionMetadataBuilder": ours.SparseKMetadataBuilder,
    "AttentionImpl": ours.SparseKImpl,
}


@cache
def sources(version: str) -> Path:
    return wheel_sources("vllm", version, "vllm/")


@cache
def classes(version: str, module: str = "vllm/v1/attention/backend.py") -> dict[str, ast.ClassDef]:
    tree = ast.parse((sources(version) / module).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def methods(version: str, name: str) -> dict[str, ast.FunctionDef]:
    node = classes(version)[name]
    found: dict[str, ast.FunctionDef] = {}
    for base in node.bases:
        text = ast.unparse(base).split("[")[0]
        if text in classes(version):
            found |= methods(version, text)
    return found | {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("base", PAIRS)
def test_abstract_methods_are_there(version: str, base: str) -> None:
    for name, node in methods(version, base).items():
        if any(ast.unparse(decorator) == "abstractmethod" for decorator in node.decorator_list):
            assert hasattr(PAIRS[base], name), name
            assert not getattr(getattr(PAIRS[base], name), "__isabstractmethod__", False), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("base", PAIRS)
def test_overrides_take_what_callers_pass(version: str, base: str) -> None:
    checked = 0
    for name, node in methods(version, base).items():
        if name not in vars(PAIRS[base]):
            continue
        actual = inspect.signature(getattr(PAIRS[base], name)).parameters
        flexible = {p.kind for p in actual.values()} & {inspect.Parameter.VAR_KEYWORD}
        arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        bound = [a for a in arguments if a not in ("self", "cls")]
        if not flexible:
            assert [a for a in bound if a not in actual] == [], f"{base}.{name}"
            order = [p for p in actual if p in bound]
            assert order == bound, f"{base}.{name}"
            required = [
                p.name
                for p in actual.values()
                if p.default is p.empty and p.name not in (*bound, "self")
            ]
            assert required == [], f"{base}.{name} asks for more: {required}"
        is_static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
        assert isinstance(inspect.getattr_static(PAIRS[base], name), staticmethod) == is_static
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata_fields_that_the_builder_reads(version: str) -> None:
    node = classes(version)["CommonAttentionMetadata"]
    has = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    assert {
        *("num_actual_tokens", "max_query_len", "max_seq_len", "query_start_loc"),
        *("seq_lens", "block_table_tensor", "slot_mapping", "causal", "num_reqs"),
        *("query_start_loc_cpu", "seq_lens_cpu_upper_bound"),
    } <= has


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_layer_calls(version: str) -> None:
    """Names used beyond the base classes: the cache update, the scales, the platform hooks."""
    layer = (sources(version) / "vllm/model_executor/layers/attention/attention.py").read_text()
    for text in ("impl.do_kv_cache_update(", "forward_includes_kv_cache_update", "_k_scale"):
        assert text in layer, text
    platforms = (sources(version) / "vllm/platforms/__init__.py").read_text()
    assert "def cpu_platform_plugin()" in platforms
    compat = vllm_compat.cpu_platform_path.__code__.co_names
    assert "cpu_platform_plugin" in compat
    interface = classes(version, "vllm/platforms/cpu.py")["CpuPlatform"]
    names = {item.name: item for item in interface.body if isinstance(item, ast.FunctionDef)}
    arguments = [a.arg for a in names["get_attn_backend_cls"].args.args]
    assert arguments == ["cls", "selected_backend", "attn_selector_config", "num_heads"]


@pytest.mark.parametrize("version", VERSIONS)
def test_metrics_plugin(version: str) -> None:
    """The entry point group and the class that vLLM asks for."""
    plugins = (sources(version) / "vllm/plugins/__init__.py").read_text()
    assert 'STAT_LOGGER_PLUGINS_GROUP = "vllm.stat_logger_plugins"' in plugins
    node = classes(version, "vllm/v1/metrics/loggers.py")["StatLoggerBase"]
    abstract = {i.name for i in node.body if isinstance(i, ast.FunctionDef) and i.decorator_list}
    assert abstract == {"__init__", "record", "log_engine_initialized"} <= set(vars(AttentionInfo))
    configs = {
        item.target.id
        for item in classes(version, "vllm/config/vllm.py")["VllmConfig"].body
        if isinstance(item, ast.AnnAssign)
    }
    assert "attention_config" in configs


def run_with(version: str, code: str) -> str:
    """``code`` in a new process that imports that version's Python files."""
    path = os.pathsep.join([str(sources(version)), str(Path(__file__).resolve().parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "VLLM_PLUGINS": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REGISTRATION = """
import pickle, subprocess, sys
from sparsek_vllm.backends.vllm_compat import register_vllm_backend
register_vllm_backend(); register_vllm_backend()
from vllm.v1.attention.backends import registry
assert {source!r} in registry.__file__, registry.__file__
enum = registry.AttentionBackendEnum
member = enum["SPARSEK_XFORMERS"]
assert member.get_path() == "sparsek_vllm.backends.vllm.SparseKBackend"
assert pickle.loads(pickle.dumps(member)) is member
assert enum(member.value) is member and list(enum).count(member) == 1
data = pickle.dumps({{"backend": member}})
# A process that has registered nothing.
code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())['backend'].name)"
print(subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    .stdout.decode())
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_registration_survives_a_spawned_process(version: str) -> None:
    code = REGISTRATION.format(source=str(sources(version)))
    assert run_with(version, code).strip() == "SPARSEK_XFORMERS"


COMMAND_LINE = """
from sparsek_vllm.plugin import register
register()
from vllm.config.attention import AttentionConfig
assert {source!r} in __import__("vllm.config.attention").__file__
for name in ("SPARSEK_XFORMERS", "sparsek_xformers"):
    assert AttentionConfig(backend=name).backend.name == "SPARSEK_XFORMERS"
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
parsed = parser.parse_args(["--attention-backend", "SPARSEK_XFORMERS"])
value = parsed.attention_backend
print(AttentionConfig(backend=value).backend.name)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_name_is_accepted_on_the_command_line(version: str) -> None:
    code = COMMAND_LINE.format(source=str(sources(version)))
    assert run_with(version, code).strip().splitlines()[-1] == "SPARSEK_XFORMERS"


CONFIGURATIONS = """
import torch
from vllm.v1.attention.selector import AttentionSelectorConfig
from sparsek_vllm.backends.vllm import SparseKBackend
assert {source!r} in __import__("vllm.v1.attention.selector").__file__
def reasons(**changes):
    asked = dict(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="fp8", block_size=16)
    selected = AttentionSelectorConfig(**(asked | changes))._asdict()
    return SparseKBackend.validate_configuration(device_capability=None, **selected)
print(reasons(has_sink=True, has_sliding_window=True, use_kv_connector=True, use_mm_prefix=True))
print(reasons(head_size=76))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_configurations(version: str) -> None:
    code = CONFIGURATIONS.format(source=str(sources(version)))
    assert run_with(version, code).splitlines()[-2:] == [
        "[]", "['head_size 76 not supported (allowed: a multiple of 8 up to 512)']",
    ]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_steps_of_a_layer(version: str) -> None:
    """Our classes over that version's metadata, groups of ranks and cache layouts."""
    tests = ["test_vllm_attention_types.py", "test_vllm_context_parallel.py"]
    if version != "0.26.0":  # which has one layout
        tests.append("test_kv_cache.py")
    paths = [str(Path(__file__).parent / name) for name in tests]
    code = f"import pytest; print(int(pytest.main(['-q', '-p', 'no:cacheprovider', *{paths}])))"
    assert run_with(version, code).splitlines()[-1] == "0"


def test_arguments_by_name() -> None:
    def function(first: int, second: int = 2, *, third: int = 3) -> None: ...

    expected: dict[str, Any] = {"first": 1, "second": 2, "third": 4}
    assert vllm_compat.arguments_of(function, 1, third=4) == expected
