"""A BERT-like model in vLLM with our backend: attention without a cache and a causal mask."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from engine import running_engine


def embeddings(
    model: Path, folder: Path, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What vLLM and transformers make of some prompts, and the paths that ran.

    ``model`` lends its tokenizer, which vLLM asks for.
    """
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    bert = BertModel(BertConfig(**shape, num_hidden_layers=2, vocab_size=49152)).eval()
    bert.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(model / name)
    draw = random.Random(1)
    tokens = [[draw.randrange(49152) for _ in range(n)] for n in (1, 5, 17, 64, 130, 300)]
    with torch.no_grad():
        first = [bert(torch.tensor([ids])).last_hidden_state[0, 0] for ids in tokens]
    expected = torch.nn.functional.normalize(torch.stack(first), dim=-1)
    common = {"runner": "pooling", "max_model_len": 512, "attention_backend": "SPARSEK_XFORMERS"}
    with running_engine(folder, **common, **settings) as llm:
        outputs = llm.embed([{"prompt_token_ids": ids} for ids in tokens], use_tqdm=False)
        (counts,) = llm.collective_rpc("sparsek_path_counts")
    return torch.tensor([output.outputs.embedding for output in outputs]), expected, counts
