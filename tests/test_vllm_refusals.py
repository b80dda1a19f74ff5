"""What our backend cannot serve is refused at start-up, with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.selector import AttentionSelectorConfig

from sparsek_vllm.backends.vllm import SparseKBackend, SparseKImpl
from sparsek_vllm.backends.vllm_compat import backend_member

SIZES = "a multiple of 8 up to 512"
PREFIX = "SPARSEK_XFORMERS cannot serve this configuration: "


def select(**changes: Any) -> str:
    good = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16}
    config = AttentionSelectorConfig(**{**good, **changes})
    return current_platform.get_attn_backend_cls(backend_member(), config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_size": 128, "dtype": torch.float16, "block_size": None},
        {"dtype": torch.float32, "has_sliding_window": True, "has_sink": True},
        {"kv_cache_dtype": "fp8", "block_size": 256},
        {"kv_cache_dtype": "fp8", "use_per_head_quant_scales": True, "head_size": 256},
        {"attn_type": "encoder_only"},
        {"attn_type": "encoder"},
        {"use_non_causal": True},
        {"attn_type": "encoder_decoder"},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    assert select(**changes) == "sparsek_vllm.backends.vllm.SparseKBackend"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 76}, f"head_size 76 not supported (allowed: {SIZES})"),
        (
            {"dtype": torch.float64},
            "dtype torch.float64 not supported "
            "(allowed: torch.float16, torch.bfloat16, torch.float32)",
        ),
        (
            {"kv_cache_dtype": "int8_per_token_head"},
            "kv_cache_dtype int8_per_token_head not supported "
            "(allowed: auto, float16, bfloat16, fp8, fp8_e4m3, fp8_e5m2)",
        ),
        (
            {"kv_cache_dtype": "float16"},
            "kv_cache_dtype float16 not supported with dtype bfloat16 (allowed: auto, bfloat16)",
        ),
        ({"block_size": 24}, "block_size 24 not supported (allowed: multiples of 16)"),
        (
            {"attn_type": "sideways"},
            "attention type sideways not supported "
            "(allowed: decoder, encoder_only, encoder, encoder_decoder)",
        ),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        (
            {"head_size": 76, "block_size": 8},
            f"head_size 76 not supported (allowed: {SIZES}); "
            "block_size 8 not supported (allowed: multiples of 16)",
        ),
    ],
)
def test_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as error:
        select(**changes)
    assert str(error.value) == PREFIX + reason


def test_other_backends_are_left_to_vllm() -> None:
    config = AttentionSelectorConfig(96, torch.bfloat16, "auto", 16)
    assert current_platform.get_attn_backend_cls(None, config).endswith("CPUAttentionBackend")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attn_type": "sideways"},
            "SPARSEK_XFORMERS does not support attention type sideways",
        ),
        (
            {"sinks": torch.zeros(3)},
            "SPARSEK_XFORMERS: sinks must have shape [num_heads=2], got [3]",
        ),
    ],
)
def test_the_layer_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SparseKImpl(2, 64, 0.125, **arguments)
    assert str(error.value) == message


def test_odd_block_size_has_no_cache_shape() -> None:
    with pytest.raises(ValueError, match="block_size must be a multiple of 16, got 24"):
        SparseKBackend.get_kv_cache_shape(10, 24, 3, 64)


START = """
import sys
from vllm import LLM
if __name__ == "__main__":
    LLM(sys.argv[1], attention_backend="SPARSEK_XFORMERS", enforce_eager=True,
        load_format="dummy", max_model_len=64, dtype="float32")
"""
HEAD_SIZE_76 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 152,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 76,
    "vocab_size": 49152,
    "max_position_embeddings": 64,
}


def test_vllm_does_not_start(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HEAD_SIZE_76))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(model / name)
    script = tmp_path / "start.py"
    script.write_text(START)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
    )
    assert done.returncode != 0
    message = f"ValueError: {PREFIX}head_size 76 not supported (allowed: {SIZES})"
    assert message in done.stdout + done.stderr
