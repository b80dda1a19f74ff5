"""Writes FEATURES.md and CONFIGURATION.md, from the classes that they speak of.

Usage: generate.py [FOLDER]    (default: this file's)
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

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

set_default_config(Config(block_n=32, num_stages=4))
```

| field | default | allowed | variable | |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

A variable that cannot be parsed is a `ValueError` that names it. The tile fields are those of the
prefill kernel; one at its default is chosen by the dispatcher, any other pins a variant, which
compiles once. Tiles that cannot be built are refused with the list of those that can. The portable
kernels use neither TMA nor warp specialisation nor a persistent grid, whatever those three fields
say; Hopper's own (`kernels="hopper"`) use all three, with tiles of their own. A `Config` takes
effect when it is set, not when a field of it changes later.

## More variables

| variable | |
| --- | --- |
| `CUDA_HOME` | the CUDA toolkit to compile with; if set, no other is looked for |
| `CXX` | the C++ compiler beside it |
| `SPARSEK_BUILD` | at installation: 1 makes a missing tool an error, 0 leaves kernels out |
| `MAX_JOBS` | compilers that run at once |
| `VLLM_PLUGINS` | vLLM's: if set, it must contain `sparsek`; `sparsek_metrics` is the metric |
| `XDG_CACHE_HOME` | where the demo model is kept |
"""


def features() -> str:
    from vllm.v1.attention.backend import AttentionType

    from sparsek_vllm import build
    from sparsek_vllm.backends.vllm import SparseKBackend as backend
    from sparsek_vllm.backends.vllm import SparseKMetadataBuilder as builder

    def yes(value: bool) -> str:
        return "yes" if value else "no, refused at start-up"

    def listed(values: object) -> str:
        return ", ".join(str(value).removeprefix("torch.") for value in values)  # type: ignore[attr-defined]

    types = {
        "decoder (causal self-attention)": AttentionType.DECODER,
        "encoder-only (embedding models)": AttentionType.ENCODER_ONLY,
        "encoder of an encoder-decoder model": AttentionType.ENCODER,
        "cross-attention": AttentionType.ENCODER_DECODER,
    }
    graphs = {
        "ALWAYS": "full, any batch",
        "UNIFORM_BATCH": "full for decoding, also of several speculative tokens; piecewise for "
        "mixed batches",
    }
    (block,) = backend.get_supported_kernel_block_sizes()
    rows = [
        ("head size", listed(build.HEAD_DIMS)),
        ("of those, Hopper's own kernels", listed(build.HOPPER_HEAD_DIMS)),
        ("dtype on CUDA", listed(backend.supported_dtypes)),
        ("dtype on CPU", listed(backend.dtypes(on_cpu=True))),
        ("KV cache dtype on CUDA", listed(backend.kv_cache_dtypes(on_cpu=False))),
        ("KV cache dtype on CPU", listed(backend.kv_cache_dtypes(on_cpu=True))),
        ("block size", f"multiples of {block.base}"),
        *((name, yes(backend.supports_attn_type(kind))) for name, kind in types.items()),
        ("sliding window", yes(backend.supports_sliding_window())),
        ("attention without a causal mask", yes(backend.supports_non_causal())),
        ("attention sinks", yes(backend.supports_sink())),
        ("MLA", yes(backend.is_mla())),
        ("bidirectional prefixes (multimodal)", yes(backend.supports_mm_prefix())),
        ("batch invariance", yes(backend.supports_batch_invariance())),
        ("per-head scales of fp8", yes(backend.supports_per_head_quant_scales())),
        ("KV connectors", yes(backend.supports_kv_connector())),
        ("decode context parallelism", yes(backend.supports_dcp())),
        ("CUDA graphs", graphs[builder._cudagraph_support.name]),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""{NOTE}
# Features

What the backend tells vLLM, asked of its classes:

| | SPARSEK_XFORMERS |
| --- | --- |
{table}

What vLLM does around attention, and the test that shows it with this backend:

| | on CPU, in CI | on an H200 |
| --- | --- | --- |
| chunked prefill, prefix caching, mixed batches, preemption | `tests/test_vllm_engine.py` \
| `tests/gpu/test_vllm_features.py` |
| parallel sampling, streaming, clients that hang up | `tests/test_server.py` \
| `tests/gpu/soak.py`, by hand |
| logits softcap, sliding window | `tests/test_vllm_engine.py` | `tests/test_kernels.py` |
| fp8 KV cache | `tests/test_vllm_engine.py` | `tests/gpu/test_vllm_features.py` |
| torch.compile, CUDA graphs | | `tests/gpu/test_vllm_features.py` |
| cross-attention, attention without a causal mask | `tests/test_vllm_attention_types.py` | |
| speculative decoding: n-gram, draft model | | `tests/gpu/test_vllm_features.py` |
| sleep mode, async scheduling, both model runners | | `tests/gpu/test_vllm_features.py` |

| GPU | |
| --- | --- |
| Hopper (sm_90) | runs, tested on an H200 |
| Blackwell (sm_100, sm_103) | compiles, never run |
| later, and sm_120 | through PTX, never run |
| older | refused |
"""


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    (folder / "FEATURES.md").write_text(features())
    (folder / "CONFIGURATION.md").write_text(configuration())
