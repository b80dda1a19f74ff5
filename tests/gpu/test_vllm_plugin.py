"""The plugin beside vLLM on a GPU: it serves when asked to, and is out of the way when not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from target import PATH

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
START = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_model_len=128,
              enforce_eager=True, dtype="bfloat16", gpu_memory_utilization=0.1,
              kv_cache_memory_bytes=1 << 30, attention_config={"backend": sys.argv[2]})
    prompt = {"prompt_token_ids": [5, 6, 7]}
    out = llm.generate([prompt], SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
    print("generated", len(out[0].outputs[0].token_ids))
"""


def start(folder: Path, backend: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    script = folder / "start.py"
    script.write_text(START)
    return subprocess.run(
        [sys.executable, str(script), str(folder), backend],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO", **environment},
    )


def test_the_platform_is_left_to_vllm() -> None:
    from vllm.platforms import current_platform

    from sparsek_vllm.plugin import platform

    assert platform() is None
    assert current_platform.is_cuda()
    assert "sparsek" not in type(current_platform).__module__


def test_other_backends_serve_as_before(tmp_path: Path) -> None:
    done = start(tmp_path, "FLASH_ATTN")
    assert "generated 4" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_we_serve(tmp_path: Path) -> None:
    done = start(tmp_path, "SPARSEK_XFORMERS")
    assert "generated 4" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    line = f"SPARSEK_XFORMERS: path {PATH}, variant default, kernels "
    assert line in done.stdout + done.stderr


def test_without_kernels_vllm_does_not_start(tmp_path: Path) -> None:
    """The name reaches the spawned engine, which refuses with our reason."""
    nowhere = str(tmp_path / "nowhere")
    done = start(tmp_path, "SPARSEK_XFORMERS", CUDA_HOME=nowhere, BSK_BUILD_DIR=nowhere)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "SPARSEK_XFORMERS" in output, output[-4000:]
    assert f"CUDA kernels: none: nvcc is missing (CUDA_HOME is {nowhere})" in output, output[-4000:]


def test_command_line() -> None:
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "parser = EngineArgs.add_cli_args(FlexibleArgumentParser())\n"
        "chosen = parser.parse_args(['--attention-backend', 'SPARSEK_XFORMERS'])\n"
        "print(getattr(chosen.attention_backend, 'name', chosen.attention_backend))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("SPARSEK_XFORMERS"), done.stderr
