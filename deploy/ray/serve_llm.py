"""Ray Serve LLM with our backend, on one node or over several.

Every node of the Ray cluster, the head included, needs Ray (``ray[serve,llm]``) beside this
package, for instance on top of deploy/Dockerfile with ``--build-arg VLLM_VERSION=v0.32.0``: Ray
2.60 reads files of vLLM that 0.29 to 0.32 have, and no others. Then, on the head:

    MODEL=Qwen/Qwen3-8B python deploy/ray/serve_llm.py

MODEL is a name on a model hub or a folder that every node has; it is served under that name.
TENSOR_PARALLEL (within a node) and PIPELINE_PARALLEL (across nodes), both 1 by default, tell how
many GPUs a replica takes: Ray places its workers, and vLLM's own executor runs them. DEVICE=cpu is
a trial without a GPU; it takes three processors (``ray start --head --num-cpus 4`` claims them).
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def llm_config() -> LLMConfig:
    model = os.environ["MODEL"]
    workers = {
        "tensor_parallel_size": int(os.environ.get("TENSOR_PARALLEL", "1")),
        "pipeline_parallel_size": int(os.environ.get("PIPELINE_PARALLEL", "1")),
    }
    engine: dict[str, Any] = {"attention_backend": "SPARSEK_XFORMERS", **workers}
    settings: dict[str, Any] = {}
    if os.environ.get("DEVICE") == "cpu":
        engine |= {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
        settings["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    return LLMConfig(
        model_loading_config={"model_id": model, "model_source": model},
        engine_kwargs=engine,
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        **settings,
    )


if __name__ == "__main__":
    serve.run(build_openai_app({"llm_configs": [llm_config()]}), blocking=True)
