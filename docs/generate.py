"""Writes FEATURES.md and CONFIGURATION.md, from the classes that they speak of.

Usage: generate.py [FOLDER]    (default: this file's)
       generate.py --ask-peers FILE    (on Hopper: writes peers.json)
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

NOTE = "<!-- Written by docs/generate.py: edit that. -->\n"


def configuration() -> str:
    from sparsek_vllm.core import config

    text = inspect.cleandoc(config.Config.__doc__ or "").split("Attributes:\n")[1]
    described = {
        name: " ".join(words.split())
        for name, words in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", text, re.M | re.S)
    }
    variables = {name: variable for variable, name in config.ENVIRONMENT.items()}
    rows = []
    for field in fields(config.Config):
        choices = config.CHOICES.get(field.name)
        allowed = ", ".join(map(str, choices)) if choices else field.type.removesuffix(" | None")
        variable = f"`{variables[field.name]}`" if field.name in variables else ""
        words = described[field.name].replace("``", "`")
        rows.append(f"| `{field.name}` | `{field.default}` | {allowed} | {variable} | {words} |")
    return f"""{NOTE}
# Configuration

Nothing has to be configured. `Config` holds what can be; a program sets it, and variables of the
environment set the default.

```python
from sparsek_vllm.core import Config, set_default_config

set_default_config(Config(use_fast_math=False))
```

| field | default | allowed | variable | |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

A variable that cannot be parsed is a `ValueError` that names it. The tile fields are those of
prefill; one at its default is chosen by the dispatcher, any other pins a variant, which compiles
once. Tiles that cannot be built are refused with the list of those that can. Hopper's own kernels
are persistent, warp-specialised and use TMA; with one of these three fields `False`, or with tiles
that only the portable kernels can have, `"auto"` takes the portable kernels, which are not
persistent or warp-specialised and use no TMA. Tiles that only Hopper's own can have
(`Config(block_m=128, block_n=128)`) leave the portable ones, which do the rest there, as they are;
on other GPUs they are an error. Fields that change later count from the next call on.

## More variables

| variable | |
| --- | --- |
| `CUDA_HOME` | the CUDA toolkit to compile with; if set, no other is looked for |
| `CXX` | the C++ compiler beside it |
| `SPARSEK_BUILD` | at installation: 1 makes a missing tool an error, 0 leaves kernels out |
| `MAX_JOBS` | compilers that run at once |
| `SPARSEK_OBJECT_CACHE` | a folder that keeps objects: builds compile what has changed. It grows |
| `VLLM_PLUGINS` | vLLM's: if set, it must contain `sparsek`; `sparsek_metrics` is the metric |
| `VLLM_BATCH_INVARIANT` | vLLM's: 1 for the same bits whatever else is served |
| `VLLM_TARGET_DEVICE` | vLLM's: must not be `cpu`, see [serving](SERVING.md) |
| `XDG_CACHE_HOME` | where the demo model is kept |
"""


PEERS = Path(__file__).parent / "peers.json"
HEAD_SIZES = (32, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512)


def ask(backend: Any) -> dict[str, str]:
    """What a backend class tells vLLM on this machine."""
    from typing import get_args

    import torch
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheDType
    from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType, MultipleOf
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    def listed(values: Iterable[object]) -> str:
        return ", ".join(str(value).removeprefix("torch.") for value in values)

    def yes(value: object) -> str:
        return "yes" if value else "no"

    types = {
        "decoder (causal self-attention)": AttentionType.DECODER,
        "encoder-only (embedding models)": AttentionType.ENCODER_ONLY,
        "encoder of an encoder-decoder model": AttentionType.ENCODER,
        "cross-attention": AttentionType.ENCODER_DECODER,
    }
    graphs = {
        "ALWAYS": "full, any batch",
        "UNIFORM_BATCH": "full for decoding, also of several speculative tokens",
        "UNIFORM_SINGLE_TOKEN_DECODE": "full for decoding of one token",
        "NEVER": "piecewise",
    }
    config = VllmConfig()
    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    builder, impl = backend.get_builder_cls(), backend.get_impl_cls()
    # vLLM 0.26's base class has one that says no.
    own = [kind for kind in builder.__mro__ if kind is not AttentionMetadataBuilder]
    cascade = any("use_cascade_attention" in vars(kind) for kind in own)
    return {
        "head size": listed(n for n in HEAD_SIZES if backend.supports_head_size(n)),
        "dtype": listed(backend.supported_dtypes),
        "KV cache dtype": listed(
            name for name in get_args(CacheDType) if backend.supports_kv_cache_dtype(name)
        ),
        "block size": listed(
            f"multiples of {size.base}" if isinstance(size, MultipleOf) else size
            for size in backend.get_supported_kernel_block_sizes()
        ),
        **{name: yes(backend.supports_attn_type(kind)) for name, kind in types.items()},
        "sliding window": yes(backend.supports_sliding_window()),
        "attention without a causal mask": yes(backend.supports_non_causal()),
        "attention sinks": yes(backend.supports_sink()),
        "per-head scales of fp8": yes(backend.supports_per_head_quant_scales()),
        "bidirectional prefixes (multimodal)": yes(backend.supports_mm_prefix()),
        "batch invariance": yes(backend.supports_batch_invariance()),
        "cascade attention (vLLM 0.26 alone)": yes(cascade),
        "KV connectors": yes(backend.supports_kv_connector()),
        "decode context parallelism": yes(impl.can_return_lse_for_decode),
        "CUDA graphs": graphs[builder.get_cudagraph_support(config, spec).name],
    }


def ask_peers() -> dict[str, Any]:
    """What vLLM's own backends say on this machine, and what it is."""
    import torch
    import vllm
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    names = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
    with set_current_vllm_config(VllmConfig()):
        answers = {name: ask(AttentionBackendEnum[name].get_class()) for name in names}
    return {
        "vllm": vllm.__version__.partition("+")[0],
        "compute capability": list(torch.cuda.get_device_capability()),
        "answers": answers,
    }


def features() -> str:
    from sparsek_vllm import build
    from sparsek_vllm.backends.vllm import SparseKBackend as backend

    # On CUDA, wherever this runs.
    on_cuda = {
        "dtype": ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes(on_cpu=False)),
        "KV cache dtype": ", ".join(backend.kv_cache_dtypes(on_cpu=False)),
        "batch invariance": "yes" if backend.is_batch_invariant(on_cpu=False) else "no",
    }
    peers = json.loads(PEERS.read_text())
    columns = {"SPARSEK_XFORMERS": ask(backend) | on_cuda, **peers["answers"]}
    head = " | ".join(columns)
    table = "\n".join(
        f"| {row} | {' | '.join(column[row] for column in columns.values())} |"
        for row in columns["SPARSEK_XFORMERS"]
    )
    own, most = ", ".join(map(str, build.HOPPER_HEAD_DIMS)), max(build.HOPPER_HEAD_DIMS)
    on_cpu = ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes(on_cpu=True))
    return f"""{NOTE}
# Features

What backends tell vLLM {peers["vllm"]} on Hopper, as reported by their classes. What is not there
is refused at start-up. They were asked for the head sizes in TRITON_ATTN's column alone;
SPARSEK_XFORMERS has all multiples of 8 up to 512, with an fp8 KV cache multiples of 16.

| | {head} |
| ---{" | ---" * len(columns)} |
{table}

Head sizes up to {most} run on Hopper's own kernels, made for {own}, but for what [takes portable
ones](KERNELS.md#on-hopper) there too, larger ones on the portable ones. The CPU reference
takes {on_cpu}, and keeps keys and values in {", ".join(backend.kv_cache_dtypes(on_cpu=True))};
it is not batch-invariant.

What vLLM does around attention, and the test that shows it with this backend:

| | on CPU, in CI | on Hopper |
| --- | --- | --- |
| chunked prefill, prefix caching, mixed batches, preemption | `tests/test_vllm_engine.py` \
| `tests/gpu/test_vllm_features.py` |
| parallel sampling, streaming, clients that hang up | `tests/test_server.py` \
| `tests/gpu/soak.py`, by hand |
| logits softcap, sliding window | `tests/test_vllm_engine.py` | `tests/test_kernels.py` |
| fp8 KV cache | `tests/test_vllm_engine.py` | `tests/gpu/test_vllm_features.py` |
| torch.compile, every mode of CUDA graphs | | `tests/gpu/test_vllm_features.py` |
| attention without a causal mask | `tests/test_vllm_attention_types.py` | |
| images whose tokens attend to each other (Gemma 3 and 4) \
| `tests/test_vllm_attention_types.py`, without a vision tower | `tests/gpu/test_vllm_models.py` |
| shared prefixes (cascade attention) | `tests/test_vllm_attention_types.py` \
| `tests/gpu/test_vllm_features.py` |
| batch invariance | `tests/test_kernels.py`, emulated | `tests/gpu/test_vllm_models.py` |
| popular models' shapes: Gemma 2, 3 and 4, Mistral, gpt-oss, Phi, Llama, Qwen, BLOOM (ALiBi), \
Granite 4 (Mamba), Whisper, a LoRA adapter, an EAGLE head | `tests/test_vllm_models.py` \
| `tests/gpu/test_vllm_models.py` |
| LLaVA, weights in fp8, keys offloaded to the host | | `tests/gpu/test_vllm_models.py` |
| tensor parallelism, by vLLM's own processes (Ray's have not been run) \
| `tests/test_vllm_parallel.py` | `tests/gpu/test_vllm_two_gpus.py` |
| pipeline parallelism | | `tests/gpu/test_vllm_two_gpus.py` |
| decode context parallelism | `tests/test_vllm_context_parallel.py` \
| `tests/gpu/test_vllm_two_gpus.py` |
| speculative decoding: n-gram, draft model | | `tests/gpu/test_vllm_features.py` |
| sleep mode, async scheduling, both model runners | | `tests/gpu/test_vllm_features.py` |

Not there:

- latent attention (MLA, as in DeepSeek's models), for which vLLM has backends of their own;
- a causal mask for some requests of a step and none for others (DiffusionGemma): refused;
- models that vLLM builds for other backends by name: Voxtral's streaming encoder and
  Unlimited-OCR refuse this one, and Inkling, MiMo-V2 with values of another size and the sink
  layers of openPangu take their own whatever is chosen;
- KV caches of less than 8 bits, of e5m2 on a GPU, or with scales of each token;
- queries or outputs in fp8: they keep the model's precision.

| GPU | |
| --- | --- |
| Hopper (sm_90) | runs, tested on H100s and H200s, one at a time, and on a pair of H200s |
| Blackwell (sm_100, sm_103) | compiles, never run |
| later, and sm_120 | through PTX, never run |
| older | refused |
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask-peers"]:
        Path(sys.argv[2]).write_text(json.dumps(ask_peers(), indent=1) + "\n")
        sys.exit()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    (folder / "FEATURES.md").write_text(features())
    (folder / "CONFIGURATION.md").write_text(configuration())
