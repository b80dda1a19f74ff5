"""What the front doors refuse, and in which words: the argument, what is allowed, the value."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from sparsek_vllm import attention_forward
from sparsek_vllm.core import (
    Config,
    DenseKV,
    PagedKV,
    get_default_config,
    merge_states,
    path_counts,
    reset_path_counts,
    set_default_config,
    varlen_attention,
    write_kv,
)

FP8 = torch.float8_e4m3fn
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def environment_config():
    """The default configuration is the environment's before each test and after."""
    set_default_config(None)
    yield
    set_default_config(None)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def refuses(message: str, error: type[Exception] = ValueError):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


# varlen_attention: one request of 3 queries over 20 keys, 4 heads over 2, head_dim 64


def attend(**changes):
    """The valid call with arguments of it or of its PagedKV replaced."""
    kv = {
        "k": zeros(4, 16, 2, 64),
        "v": zeros(4, 16, 2, 64),
        "block_table": ints(0, 1, 2, 3).view(1, 4),
        "seq_lens": ints(20),
        "k_scale": None,
        "v_scale": None,
    }
    kv |= {name: changes.pop(name) for name in kv.keys() & changes.keys()}
    call = {"q": zeros(3, 4, 64), "kv": PagedKV(**kv), "cu_seqlens_q": ints(0, 3)} | changes
    return varlen_attention(**call)


def dense(**changes) -> DenseKV:
    kv = {"k": zeros(20, 2, 64), "v": zeros(20, 2, 64), "starts": ints(0), "seq_lens": ints(20)}
    return DenseKV(**(kv | changes))


def both(*shape: int, **kwargs) -> dict[str, torch.Tensor]:
    return {"k": zeros(*shape, **kwargs), "v": zeros(*shape, **kwargs)}


FLOATS = "torch.float16, torch.bfloat16, torch.float32, torch.float64"
FP8S = "torch.float8_e4m3fn, torch.float8_e5m2"
PAGED = "[num_blocks, block_size, kv_heads, head_dim]"
WINDOW = "window must be (left, right), each -1 for no limit or at least 0, got"
SOFTCAP = "softcap must be 0 (off) or a positive finite number, got"
SPANS = (
    "spans must hold their rows' own positions, and what a row sees begin and end no earlier than "
    "what the row before it sees, got"
)
SCALE = "scale must be a positive finite number, got"

ATTENTION = [
    # q
    ({"q": zeros(3, 256)}, "q must have shape [total_q, heads, head_dim], got [3, 256]"),
    ({"q": zeros(3, 4, 64, dtype=torch.int32)}, f"q must be one of {FLOATS}, got torch.int32"),
    ({"q": zeros(3, 4, 64, dtype=FP8)}, f"q must be one of {FLOATS}, got torch.float8_e4m3fn"),
    (
        {"q": zeros(3, 4, 128)[..., ::2]},
        "q must be contiguous in its last dimension, got strides [512, 128, 2]",
    ),
    # k and v
    (
        both(4, 16, 2, 80),
        f"k must have shape {PAGED} with head_dim 64, got [4, 16, 2, 80]",
    ),
    (both(64, 2, 64), f"k must have shape {PAGED} with head_dim 64, got [64, 2, 64]"),
    (
        {"kv": dense(**both(2, 10, 2, 64))},
        "k must have shape [total_k, kv_heads, head_dim] with head_dim 64, got [2, 10, 2, 64]",
    ),
    (
        {"v": zeros(5, 16, 2, 64)},
        "v must have the shape of k, [4, 16, 2, 64], got [5, 16, 2, 64]",
    ),
    (
        {"v": zeros(4, 16, 2, 64, dtype=torch.float16)},
        "v must have the dtype of k, torch.float32, got torch.float16",
    ),
    (
        {"v": zeros(4, 16, 2, 64, device="meta")},
        "v must have the device of k, cpu, got meta",
    ),
    (both(4, 16, 2, 64, device="meta"), "k must be on cpu like q, got meta"),
    (
        both(4, 16, 2, 64, dtype=torch.float16),
        f"k must be torch.float32, {FP8S}, as q is torch.float32, got torch.float16",
    ),
    (
        both(4, 16, 2, 64, dtype=torch.uint8),
        f"k must be torch.float32, {FP8S}, as q is torch.float32, got torch.uint8",
    ),
    (
        {"kv": dense(**both(20, 2, 64, dtype=FP8))},
        "k must be torch.float32, as q is torch.float32, got torch.float8_e4m3fn",
    ),
    (both(4, 16, 3, 64), "heads of q must be a multiple of kv_heads, got 4 and 3"),
    (both(4, 16, 8, 64), "heads of q must be a multiple of kv_heads, got 4 and 8"),
    (both(4, 16, 0, 64), "heads of q must be a multiple of kv_heads, got 4 and 0"),
    (
        {"k": zeros(4, 16, 2, 128)[..., ::2]},
        "k must be contiguous in its last dimension, got strides [4096, 256, 128, 2]",
    ),
    (
        {"v": zeros(4, 16, 2, 128)[..., ::2]},
        "v must be contiguous in its last dimension, got strides [4096, 256, 128, 2]",
    ),
    # what says where they are
    ({"cu_seqlens_q": ints()}, "cu_seqlens_q must have shape [batch + 1], got [0]"),
    (
        {"cu_seqlens_q": ints(0, 3).view(1, 2)},
        "cu_seqlens_q must have shape [batch + 1], got [1, 2]",
    ),
    (
        {"cu_seqlens_q": ints(0, 3).float()},
        "cu_seqlens_q must be int32 (or int64 on CPU), got torch.float32",
    ),
    ({"cu_seqlens_q": ints(0, 3).to("meta")}, "cu_seqlens_q must be on cpu like q, got meta"),
    (
        {"cu_seqlens_q": ints(0, 2, 3)},
        "block_table must have shape [batch=2, max_blocks], got [1, 4]",
    ),
    (
        {"block_table": ints(0, 1, 2, 3)},
        "block_table must have shape [batch=1, max_blocks], got [4]",
    ),
    (
        {"block_table": zeros(1, 4)},
        "block_table must be int32 (or int64 on CPU), got torch.float32",
    ),
    (
        {"block_table": zeros(1, 4, dtype=torch.int32, device="meta")},
        "block_table must be on cpu like q, got meta",
    ),
    ({"seq_lens": ints(20, 20)}, "seq_lens must have shape [1], got [2]"),
    ({"seq_lens": ints(20).view(1, 1)}, "seq_lens must have shape [1], got [1, 1]"),
    (
        {"seq_lens": ints(20).short()},
        "seq_lens must be int32 (or int64 on CPU), got torch.int16",
    ),
    ({"seq_lens": ints(20).to("meta")}, "seq_lens must be on cpu, got meta"),
    ({"kv": dense(starts=ints(0, 1))}, "starts must have shape [1], got [2]"),
    ({"kv": dense(seq_lens=ints(1, 1))}, "seq_lens must have shape [1], got [2]"),
    (
        {"kv": dense(starts=ints(0).float())},
        "starts must be int32 (or int64 on CPU), got torch.float32",
    ),
    ({"q_offsets": ints(0, 0)}, "q_offsets must have shape [1], got [2]"),
    ({"q_offsets": ints(0).to("meta")}, "q_offsets must be on cpu, got meta"),
    ({"spans": zeros(2, 2).int()}, "spans must have shape [3, 2], got [2, 2]"),
    ({"spans": zeros(3, 2)}, "spans must be torch.int32, got torch.float32"),
    ({"spans": zeros(3, 4).int()[:, ::2]}, "spans must be contiguous, got strides [4, 2]"),
    ({"spans": ints(0, 18, 0, 5, 0, 0).view(3, 2)}, f"{SPANS} [0, 5] for row 1 at position 18"),
    ({"spans": ints(5, 20, 0, 0, 0, 0).view(3, 2)}, f"{SPANS} [0, 0] for row 1 at position 18"),
    ({"spans": ints(0, 0, 0, 0, 17, 20).view(3, 2)}, f"{SPANS} [17, 20] for row 2 at position 19"),
    ({"k_scale": torch.ones(3)}, "k_scale must have 1 or kv_heads=2 elements, got 3"),
    ({"v_scale": torch.ones(0)}, "v_scale must have 1 or kv_heads=2 elements, got 0"),
    # options
    ({"sinks": zeros(2)}, "sinks must have shape [4], got [2]"),
    ({"sinks": zeros(4, 1)}, "sinks must have shape [4], got [4, 1]"),
    ({"sinks": zeros(4, device="meta")}, "sinks must be on cpu, got meta"),
    (
        {"bias": zeros(4, 3, 20)},
        "bias must have shape [batch=1, heads=4, max_q>=3, max_k>=20], got [4, 3, 20]",
    ),
    (
        {"bias": zeros(1, 2, 3, 20)},
        "bias must have shape [batch=1, heads=4, max_q>=3, max_k>=20], got [1, 2, 3, 20]",
    ),
    ({"window": (-2, 0)}, f"{WINDOW} (-2, 0)"),
    ({"window": (0, -2)}, f"{WINDOW} (0, -2)"),
    ({"window": (1, 2, 3)}, f"{WINDOW} (1, 2, 3)"),
    *[({"scale": value}, f"{SCALE} {value}") for value in (0, 0.0, -0.5, NAN, INF, -INF)],
    *[({"softcap": value}, f"{SOFTCAP} {value}") for value in (-1, -0.1, NAN, INF, -INF)],
    (
        {"min_seqlen_q": 4},
        "min_seqlen_q must be at most the shortest query length, 3, got 4",
    ),
    # outputs
    (
        {"out": zeros(3, 4, 128)},
        "out must have the shape of q, [3, 4, 64], got [3, 4, 128]",
    ),
    (
        {"out": zeros(3, 4, 64, dtype=torch.float16)},
        "out must have the dtype of q, torch.float32, got torch.float16",
    ),
    ({"lse": zeros(3, 4)}, "lse must have shape [4, 3], got [3, 4]"),
    ({"lse": zeros(4, 3, device="meta")}, "lse must be on cpu, got meta"),
    (
        {"batch_invariant": True},
        "batch_invariant must be False on CPU: only the CUDA kernels are, got True",
    ),
]


def ids(table) -> list[str]:
    return [f"{i}-{'-'.join(changes)}" for i, (changes, *_) in enumerate(table)]


@pytest.mark.parametrize(("changes", "message"), ATTENTION, ids=ids(ATTENTION))
def test_varlen_attention_refuses(changes, message):
    reset_path_counts()
    with refuses(message):
        attend(**changes)
    assert path_counts() == {}


def test_the_calls_that_the_tables_change_are_valid():
    assert attend().shape == attend(kv=dense()).shape == (3, 4, 64)
    write()
    assert merge()[0].shape == (3, 4, 64)


# write_kv: 3 tokens, 2 heads, head_dim 64


def write(**changes) -> None:
    call = {
        "key": zeros(3, 2, 64),
        "value": zeros(3, 2, 64),
        "k_cache": zeros(4, 16, 2, 64),
        "v_cache": zeros(4, 16, 2, 64),
        "slot_mapping": torch.tensor([5, -1, 63]),
    }
    write_kv(**(call | changes))


CACHE = "k_cache must have shape [num_blocks, block_size, kv_heads=2, head_dim=64], got"
SLOTS = "slot_mapping must be one-dimensional, int64 or int32, got"

WRITE = [
    (
        {"key": zeros(3, 128), "value": zeros(3, 128)},
        "key must have shape [tokens, kv_heads, head_dim], got [3, 128]",
    ),
    ({"value": zeros(3, 2, 80)}, "value must have the shape of key, [3, 2, 64], got [3, 2, 80]"),
    (
        {"value": zeros(3, 2, 64, dtype=torch.float16)},
        "value must have the dtype of key, torch.float32, got torch.float16",
    ),
    (
        {"value": zeros(3, 2, 64, device="meta")},
        "value must have the device of key, cpu, got meta",
    ),
    (
        {"v_cache": zeros(4, 16, 2, 80)},
        "v_cache must have the shape of k_cache, [4, 16, 2, 64], got [4, 16, 2, 80]",
    ),
    (
        {"v_cache": zeros(4, 16, 2, 64, dtype=FP8)},
        "v_cache must have the dtype of k_cache, torch.float32, got torch.float8_e4m3fn",
    ),
    (
        {"v_cache": zeros(4, 16, 2, 64, device="meta")},
        "v_cache must have the device of k_cache, cpu, got meta",
    ),
    (
        {"k_cache": zeros(64, 2, 64), "v_cache": zeros(64, 2, 64)},
        f"{CACHE} [64, 2, 64]",
    ),
    (
        {"k_cache": zeros(4, 2, 16, 64), "v_cache": zeros(4, 2, 16, 64)},
        f"{CACHE} [4, 2, 16, 64]",
    ),
    (
        {"key": zeros(3, 2, 128)[..., ::2]},
        "key must be contiguous in its last dimension, got strides [256, 128, 2]",
    ),
    (
        {"value": zeros(3, 2, 128)[..., ::2]},
        "value must be contiguous in its last dimension, got strides [256, 128, 2]",
    ),
    (
        {"k_cache": zeros(4, 16, 2, 128)[..., ::2]},
        "k_cache must be contiguous in its last dimension, got strides [4096, 256, 128, 2]",
    ),
    (
        {"v_cache": zeros(4, 16, 2, 128)[..., ::2]},
        "v_cache must be contiguous in its last dimension, got strides [4096, 256, 128, 2]",
    ),
    ({"slot_mapping": zeros(3)}, f"{SLOTS} [3] torch.float32"),
    ({"slot_mapping": ints(1, 2, 3).view(3, 1)}, f"{SLOTS} [3, 1] torch.int32"),
    (
        {"slot_mapping": ints(1, 2, 3, 4)},
        "slot_mapping must have at most one slot for each of the 3 rows of key, got 4",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRITE, ids=ids(WRITE))
def test_write_kv_refuses(changes, message):
    with refuses(message):
        write(**changes)


# merge_states: 3 tokens, 4 heads, head_dim 64


def merge(**changes):
    call = {
        "out_a": zeros(3, 4, 64),
        "lse_a": zeros(4, 3),
        "out_b": zeros(3, 4, 64),
        "lse_b": zeros(4, 3),
    }
    return merge_states(**(call | changes))


def on_meta(*names: str) -> dict[str, torch.Tensor]:
    shapes = {"out": (3, 4, 64), "lse": (4, 3)}
    return {name: zeros(*shapes[name[:3]], device="meta") for name in names}


MERGE = [
    ({"out_b": zeros(2, 4, 64)}, "out_b must have the shape of out_a, [3, 4, 64], got [2, 4, 64]"),
    (
        {"out_b": zeros(3, 4, 64, dtype=torch.float16)},
        "out_b must have the dtype of out_a, torch.float32, got torch.float16",
    ),
    (on_meta("out_b"), "out_b must have the device of out_a, cpu, got meta"),
    ({"out": zeros(3, 4, 32)}, "out must have the shape of out_a, [3, 4, 64], got [3, 4, 32]"),
    ({"lse_b": zeros(3, 4)}, "lse_b must have the shape of lse_a, [4, 3], got [3, 4]"),
    (
        {"lse_b": zeros(4, 3, dtype=torch.float16)},
        "lse_b must have the dtype of lse_a, torch.float32, got torch.float16",
    ),
    (on_meta("lse_b"), "lse_b must have the device of lse_a, cpu, got meta"),
    (
        {"out_a": zeros(3, 256), "out_b": zeros(3, 256)},
        "out_a must have shape [tokens, heads, head_dim], got [3, 256]",
    ),
    (
        {"lse_a": zeros(3, 4), "lse_b": zeros(3, 4)},
        "lse_a must have shape [4, 3], got [3, 4]",
    ),
    (on_meta("lse_a", "lse_b"), "lse_a must be on cpu, got meta"),
    (
        on_meta("out_a", "out_b", "lse_a", "lse_b"),
        "tensors must be on cpu or cuda, got meta",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MERGE, ids=ids(MERGE))
def test_merge_states_refuses(changes, message):
    with refuses(message):
        merge(**changes)


# attention_forward, _C

HALF = torch.zeros(1, 2, 8, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HALF, HALF, HALF), "Q must be on a CUDA device, got cpu"),
        ((HALF.to("meta"), HALF, HALF), "Q must be on a CUDA device, got meta"),
        (([[1.0]], HALF, HALF), "Q must be a torch.Tensor, got list"),
        ((None, HALF, HALF), "Q must be a torch.Tensor, got NoneType"),
        ((HALF.numpy(), HALF, HALF), "Q must be a torch.Tensor, got ndarray"),
    ],
)
def test_attention_forward_refuses_on_cpu(arguments, message):
    with refuses(message):
        attention_forward(*arguments)


def test_missing_kernels_say_how_to_get_them(tmp_path):
    code = (
        "import sys\n"
        "try:\n"
        "    __import__(sys.argv[1])\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    nowhere = {"CUDA_HOME": str(tmp_path), "BSK_BUILD_DIR": str(tmp_path)}
    for module in ("sparsek_vllm._C", "blackwell_sparsek._C"):
        done = subprocess.run(
            [sys.executable, "-c", code, module],
            env={**os.environ, **nowhere},
            capture_output=True,
            text=True,
        )
        assert "no CUDA kernels in this installation" in done.stdout, done
        assert f"nvcc is missing (CUDA_HOME is {tmp_path})" in done.stdout
        assert "pip install nvidia-cuda-nvcc" in done.stdout


# Config

NUMBERS = {
    "block_m": "64, 128, 192, 256",
    "block_n": "32, 64, 96, 128, 160, 176, 256",
    "num_stages": "1, 2, 3, 4, 5, 6, 7, 8",
    "num_warps": "4, 8, 12, 16",
}
FLAGS = (
    "auto_detect_arch",
    "use_fast_math",
    "enable_profiling",
    "debug_mode",
    "persistent_kernel",
    "warp_specialized",
    "use_tma",
)
PATHS = ("cutlass_path", "build_dir")
CONFIG = [
    *[("cuda_arch", value, "one of '90a', '100'") for value in ("80", "sm_90a", "", 90, None)],
    *[
        ("kernels", value, "one of 'auto', 'portable', 'hopper'")
        for value in ("sm_90", "", "Hopper", 90, None)
    ],
    *[
        (name, value, f"one of {allowed}")
        for name, allowed in NUMBERS.items()
        for value in (0, -64, 9, "64", None, True)
    ],
    *[(name, value, "True or False") for name in FLAGS for value in (1, 0, "1", None)],
    *[(name, value, "a path or None") for name in PATHS for value in (3, True, b"/tmp")],
]


@pytest.mark.parametrize(("name", "value", "allowed"), CONFIG)
def test_config_refuses(name, value, allowed):
    with refuses(f"Config.{name} must be {allowed}, got {value!r}"):
        Config(**{name: value})


def test_every_config_field_is_checked():
    assert {item.name for item in fields(Config)} == {name for name, _, _ in CONFIG}
    with pytest.raises(TypeError, match="block_k"):
        Config(block_k=64)


SWITCHES = {
    "BSK_AUTO_DETECT": "auto_detect_arch",
    "BSK_FAST_MATH": "use_fast_math",
    "BSK_PROFILE": "enable_profiling",
    "BSK_DEBUG": "debug_mode",
}
VARIABLES = (*SWITCHES, "BSK_CUDA_ARCH", "BSK_KERNELS", "BSK_BUILD_DIR", "CUTLASS_PATH")


@pytest.fixture
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name, monkeypatch, no_variables):
    field = SWITCHES[name]
    for text in ("1", "true", "Yes", " ON "):
        monkeypatch.setenv(name, text)
        assert Config.from_env() == replace(Config(), **{field: True})
    for text in ("0", "False", "no", "off"):
        monkeypatch.setenv(name, text)
        assert Config.from_env() == replace(Config(), **{field: False})
    for text in ("", "  "):
        monkeypatch.setenv(name, text)
        assert Config.from_env() == Config()
    for text in ("2", "maybe", "-1", "1.0"):
        monkeypatch.setenv(name, text)
        with refuses(f"{name} must be 1 or 0 (true/false, yes/no, on/off), got {text!r}"):
            Config.from_env()


def test_other_variables(monkeypatch, no_variables):
    assert Config.from_env() == Config()
    monkeypatch.setenv("BSK_BUILD_DIR", "/somewhere/build")
    monkeypatch.setenv("CUTLASS_PATH", "/somewhere/cutlass")
    monkeypatch.setenv("BSK_CUDA_ARCH", "100")
    monkeypatch.setenv("BSK_KERNELS", "hopper")
    expected = Config(
        cuda_arch="100",
        build_dir="/somewhere/build",
        cutlass_path="/somewhere/cutlass",
        kernels="hopper",
    )
    assert Config.from_env() == expected
    monkeypatch.setenv("BSK_KERNELS", "sm90")
    with refuses("BSK_KERNELS must be one of auto, portable, hopper, got 'sm90'"):
        Config.from_env()
    monkeypatch.delenv("BSK_KERNELS")
    for text in ("80", "sm_90a", "90"):
        monkeypatch.setenv("BSK_CUDA_ARCH", text)
        with refuses(f"BSK_CUDA_ARCH must be one of 90a, 100, got {text!r}"):
            Config.from_env()


def test_set_default_config():
    for wrong, name in ((Config, "type"), ({"block_m": 64}, "dict"), ("Config()", "str")):
        with refuses(f"config must be a Config or None, got {name}"):
            set_default_config(wrong)
    mine = Config(block_m=128)
    set_default_config(mine)
    assert get_default_config() is mine
    set_default_config(None)
    assert get_default_config() == Config.from_env()


def test_an_unparsable_variable_stops_the_first_op_not_the_import():
    code = (
        "import torch\n"
        "from sparsek_vllm.core import get_default_config\n"
        "print('imported')\n"
        "get_default_config()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"BSK_DEBUG": "maybe"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "imported\n"
    message = "BSK_DEBUG must be 1 or 0 (true/false, yes/no, on/off), got 'maybe'"
    assert done.stderr.strip().splitlines()[-1] == f"ValueError: {message}"


# Debug mode


@pytest.fixture(params=["Config", "BSK_DEBUG"])
def debug(request, monkeypatch):
    if request.param == "Config":
        set_default_config(Config(debug_mode=True))
    else:
        monkeypatch.setenv("BSK_DEBUG", "1")


DEBUG = [
    (attend, {"seq_lens": ints(65)}, "seq_lens must fit the 4 blocks of block_table, got 65"),
    (
        attend,
        {"block_table": ints(0, 4, 9, 9).view(1, 4)},
        "block_table must hold block ids from 0 to 3, got 0 to 4",
    ),
    (
        attend,
        {"block_table": ints(-7, 1, 2, 3).view(1, 4)},
        "block_table must hold block ids from 0 to 3, got -7 to 1",
    ),
    (
        write,
        {"slot_mapping": torch.tensor([0, 64, -1])},
        "slot_mapping must be below the 64 slots of the cache, got 64",
    ),
]


@pytest.mark.parametrize(("call", "changes", "message"), DEBUG)
def test_debug_mode_checks_indices(call, changes, message, debug):
    with refuses(message):
        call(**changes)


@pytest.mark.parametrize(("call", "changes", "message"), DEBUG)
def test_debug_mode_checks_whatever_the_caller_says(call, changes, message, debug):
    with refuses(message):
        call(**changes, check=False)


@pytest.mark.parametrize("call", [attend, write])
def test_nothing_else_depends_on_the_checks(call):
    call(check=False)


def test_debug_mode_lets_valid_calls_pass(debug):
    attend(block_table=ints(0, 1, 2**30, -7).view(1, 4))  # 20 keys are two pages
    attend(seq_lens=ints(0), block_table=ints(-7, -7).view(1, 2))
    attend(kv=dense())
    attend(spans=ints(17, 18, 18, 20, 18, 20).view(3, 2))
    attend(spans=ints(7, 7, 0, 0, 20, 20).view(3, 2))  # none
    write()
    write(slot_mapping=torch.tensor([], dtype=torch.int64))


# More wrong calls, by the argument that the message names first

MORE = [
    (attend, {"q": zeros(3, 0, 64)}, "q"),  # torch's kernel would divide by zero
    (attend, {"window": 4}, "window"),
    (attend, {"scale": "x"}, "scale"),
    (attend, {"softcap": "x"}, "softcap"),
    (attend, {"bias": zeros(1, 4, 1, 20)}, "bias"),  # broadcast, or RuntimeError without a mask
    (attend, {"bias": zeros(1, 4, 3, 1)}, "bias"),
    (attend, {"bias": zeros(1, 4, 3, 10)}, "bias"),
    (attend, {"bias": zeros(1, 4, 3, 20, device="meta")}, "bias"),
    (attend, {"bias": zeros(1, 4, 3, 20, dtype=torch.bool)}, "bias"),
    (attend, {"sinks": zeros(4, dtype=torch.int32)}, "sinks"),
    (attend, {"q_offsets": zeros(1)}, "q_offsets"),
    (attend, {"lse": zeros(4, 3, dtype=torch.float16)}, "lse"),
    (attend, {"out": zeros(3, 4, 64, device="meta")}, "out"),
    (attend, {"out": zeros(3, 4, 128)[..., ::2]}, "out"),
    (attend, {"k_scale": torch.ones(1, device="meta")}, "k_scale"),
    (attend, {"q": zeros(3, 4, 0), **both(4, 16, 2, 0)}, "q"),
    (attend, both(4, 0, 2, 64), "k"),
    (attend, {"window": (1.5, 0)}, "window"),
    (write, {"k_scale": torch.ones(3)}, "k_scale"),
    (write, {"k_scale": torch.ones(1, device="meta")}, "k_scale"),
    (write, {f"{n}_cache": zeros(4, 16, 2, 64, device="meta") for n in "kv"}, "k_cache"),
    (
        write,
        {"k_cache": zeros(4, 16, 2, 64).byte(), "v_cache": zeros(4, 16, 2, 64).byte()},
        "k_cache",
    ),
    (write, {"slot_mapping": torch.tensor([1], device="meta")}, "slot_mapping"),
    (merge, {"lse_a": zeros(4, 3).half(), "lse_b": zeros(4, 3).half()}, "lse_a"),
    (merge, {"out_a": zeros(3, 4, 64).int(), "out_b": zeros(3, 4, 64).int()}, "out_a"),
    (Config, {"block_m": 64.0}, "Config.block_m"),
]


@pytest.mark.parametrize(("call", "changes", "name"), MORE)
def test_refuses_too(call, changes, name):
    with pytest.raises(ValueError, match=f"^{re.escape(name)} must"):
        call(**changes)


def test_debug_mode_with_an_empty_batch(debug):
    attend(
        q=zeros(0, 4, 64),
        cu_seqlens_q=ints(0),
        seq_lens=ints(),
        block_table=zeros(0, 4, dtype=torch.int32),
    )


def test_debug_mode_ignores_pages_before_the_window(debug):
    attend(block_table=ints(-7, 1, 2, 3).view(1, 4), window=(1, 0))
