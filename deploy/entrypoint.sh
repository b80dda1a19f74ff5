#!/bin/sh
# Starts vLLM's OpenAI-compatible server with our backend.
#
# MODEL      what to serve: a name on a model hub, a folder, or "demo"
# PORT       default 8000; HOST: default 0.0.0.0
# VLLM_ARGS  more flags, split at spaces
#
# Arguments of the container come last.
set -eu
model=${MODEL:?set MODEL to the name of a model, to a folder, or to demo}
if [ "$model" = demo ]; then
    model=$(python3 -m sparsek_vllm.demo_model)
    set -- --served-model-name demo "$@"
fi
# shellcheck disable=SC2086  # VLLM_ARGS is meant to be split
exec python3 -m vllm.entrypoints.openai.api_server \
    --model "$model" \
    --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}" \
    --attention-backend SPARSEK_XFORMERS \
    ${VLLM_ARGS:-} "$@"
