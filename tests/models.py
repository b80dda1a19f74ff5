"""Small models of random weights with the attention of popular ones, and serving them.

What attention sees is as in the model that a case is named after: head size, heads that share
keys, windows and their pattern, softcap, sinks. The rest is small. Weights are drawn ten times as
wide as for training, so that scores differ and a wrong mask shows in the logits.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import result_of

Answers = list[dict[str, Any]]
VOCABULARY = 2048
IMAGE_TOKEN = 3
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A class of transformers, what its configuration has beyond ``COMMON``, how vLLM serves it."""

    architecture: str
    config: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    # What goes with the prompts: "image", "gemma image", "audio", "adapter", or "twice" for all of
    # them again. Or with the model: "eagle", a head that drafts tokens.
    extra: str = ""
    # On a GPU, and how far two backends' logprobs may be apart on average.
    dtype: str = "float16"
    bound: float = 0.01


def heads(query: int, key: int, size: int | None = None) -> dict[str, int]:
    shape = {"num_attention_heads": query, "num_key_value_heads": key}
    return shape if size is None else {**shape, "head_dim": size}


# A window that is one key too wide, or a softcap a tenth too high, moves the logprobs by
# twice the bound or more. Scores stay below 44 softcaps, where CPU_ATTN gives NaN.
MODELS = {
    "gemma 2": Model(
        "Gemma2ForCausalLM",
        {
            **heads(8, 4, 256), "num_hidden_layers": 4, "sliding_window": 48,
            "attn_logit_softcapping": 4.0, "query_pre_attn_scalar": 64,
        },
        dtype="bfloat16", bound=0.04,
    ),
    "gemma 3": Model(
        "Gemma3ForCausalLM",
        {
            **heads(4, 1, 256), "num_hidden_layers": 6, "sliding_window": 48,
            "query_pre_attn_scalar": 24,
        },
        dtype="bfloat16", bound=0.2,
    ),
    # Layers without a window have heads of 512.
    "gemma 4": Model(
        "Gemma4ForCausalLM",
        {
            **heads(8, 4, 256), "num_hidden_layers": 6, "sliding_window": 48,
            "num_global_key_value_heads": 2, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY,
        },
        dtype="bfloat16", bound=0.2,
    ),
    "mistral": Model("MistralForCausalLM", {**heads(8, 2, 128), "sliding_window": 100}),
    "gpt-oss": Model(
        "GptOssForCausalLM",
        {
            **heads(64, 8, 64), "num_hidden_layers": 4, "sliding_window": 48,
            # All of them: which are the best is a matter of rounding.
            "num_local_experts": 4, "num_experts_per_tok": 4,
        },
        bound=0.05,
    ),
    # vLLM 0.26 takes four times as many for granted.
    "phi 2": Model(
        "PhiForCausalLM", {"hidden_size": 320, "intermediate_size": 1280, **heads(4, 4)}
    ),
    "phi 3 mini": Model(
        "Phi3ForCausalLM", {"hidden_size": 384, **heads(4, 4), "sliding_window": 90}
    ),
    "llama 3.1 8b": Model("LlamaForCausalLM", heads(32, 8, 128)),
    "llama 3.2 1b": Model("LlamaForCausalLM", heads(8, 2, 64)),
    "one key head": Model("LlamaForCausalLM", heads(8, 1, 128)),
    "heads of 32": Model("LlamaForCausalLM", heads(8, 2, 32)),
    "heads of 112": Model("LlamaForCausalLM", heads(8, 2, 112)),
    "heads of 120": Model("LlamaForCausalLM", heads(8, 2, 120)),
    "heads of 160": Model("LlamaForCausalLM", heads(8, 2, 160)),
    "heads of 192": Model("LlamaForCausalLM", heads(8, 2, 192)),
    "qwen 2.5 0.5b": Model("Qwen2ForCausalLM", {"hidden_size": 896, **heads(14, 2)}),
    "qwen 3": Model("Qwen3ForCausalLM", heads(16, 8, 128)),
    "qwen 3 moe": Model(
        "Qwen3MoeForCausalLM",
        {
            **heads(32, 4, 128), "num_experts": 4, "num_experts_per_tok": 4,
            "moe_intermediate_size": 128,
        },
    ),
    # States of Mamba beside the keys: on a GPU a page has 272 tokens.
    "granite 4": Model(
        "GraniteMoeHybridForCausalLM",
        {
            "hidden_size": 256, **heads(4, 2), "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "nope",
            "num_local_experts": 0, "shared_intermediate_size": 256,
            "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
            "attention_multiplier": 0.125,
        },
    ),
    # ALiBi.
    "bloom": Model("BloomForCausalLM", {"n_head": 4, "seq_length": 1024}),
    "an adapter": Model("LlamaForCausalLM", heads(8, 2, 64), {"enable_lora": True}, "adapter"),
    "an EAGLE head": Model("LlamaForCausalLM", heads(8, 2, 64), extra="eagle"),
    "weights in fp8": Model(
        "LlamaForCausalLM", heads(32, 8, 128), {"quantization": "fp8"}, bound=0.1
    ),
    "keys in host memory": Model(
        "LlamaForCausalLM", heads(8, 2, 64),
        {"kv_offloading_size": 0.25, "kv_cache_memory_bytes": 4 << 20}, "twice",
    ),
    "llava": Model(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **COMMON, **heads(8, 2, 128)},
            "vision_config": {
                "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14,
                "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
                "num_attention_heads": 2, "initializer_range": 0.2,
            },
            "image_token_index": IMAGE_TOKEN,
        },
        extra="image",
    ),
    # The tokens of an image see each other.
    "gemma 3 with images": Model(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                "model_type": "gemma3_text", **COMMON, **heads(4, 1, 256), "num_hidden_layers": 6,
                "sliding_window": 96, "query_pre_attn_scalar": 24,
            },
            "vision_config": {
                "model_type": "siglip_vision_model", "image_size": 112, "patch_size": 14,
                "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                "num_attention_heads": 2, "vision_use_head": False,
            },
            "mm_tokens_per_image": 64, "boi_token_index": IMAGE_TOKEN,
            "image_token_index": IMAGE_TOKEN + 1, "eoi_token_index": IMAGE_TOKEN + 2,
        },
        extra="gemma image", dtype="bfloat16", bound=0.2,
    ),
    "whisper": Model(
        "WhisperForConditionalGeneration",
        {
            "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
            "init_std": 0.2, "decoder_start_token_id": 1,
        },
        # A step has room for the 30 seconds of a recording.
        {"max_model_len": 448, "max_num_batched_tokens": 2048},
        "audio",
    ),
}  # fmt: skip


def build(name: str, tokenizer: Path, folder: Path) -> list[int]:
    """Write the model into ``folder``, with the tokenizer of the model in ``tokenizer``.

    Returns:
        The sizes of its heads.
    """
    import transformers

    model = MODELS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, model.architecture)
    settings = {**COMMON, **model.config}
    settings["initializer_range"] *= (COMMON["hidden_size"] / settings["hidden_size"]) ** 0.5
    made = kind(kind.config_class(**settings))
    with torch.no_grad():
        for key, weight in made.named_parameters():
            # Biases are drawn as zeros, norms as ones, sinks as next to nothing.
            if key.endswith("sinks"):
                weight.normal_(1.0, 2.0)
            elif weight.dim() == 1:
                weight += torch.randn_like(weight) * 0.2
            elif key.endswith("mm_input_projection_weight"):  # drawn as zeros too
                weight.normal_(0, 0.2)
            if "q_norm" in key or "k_norm" in key:
                # Gemma 4 does not divide scores by the root of the head size.
                weight.copy_(0.4 * weight if name == "gemma 4" else weight + 0.5)
    made.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).symlink_to(tokenizer / file)
    writers = {
        "adapter": _adapter, "image": _image, "gemma image": _gemma_image, "audio": _audio,
        "eagle": _eagle,
    }  # fmt: skip
    if model.extra in writers:
        writers[model.extra](folder, made.config)
    config = made.config.get_text_config()
    layers = [config]
    if name == "gemma 4":
        layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    sizes = [getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in layers]
    return sorted(set(sizes))


def _adapter(folder: Path, config: Any) -> None:
    """One of peft for the projections of attention, in a folder of its own."""
    from safetensors.torch import save_file

    (folder / "adapter").mkdir()
    wide, narrow = (
        n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    shapes = {
        "q_proj": (config.hidden_size, wide), "k_proj": (config.hidden_size, narrow),
        "v_proj": (config.hidden_size, narrow), "o_proj": (wide, config.hidden_size),
    }  # fmt: skip
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(8, inputs) * inputs**-0.5
            weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 8) * 0.3
    save_file(weights, folder / "adapter" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "bias": "none",
        "target_modules": list(shapes),
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def _eagle(folder: Path, config: Any) -> None:
    """A layer on the model's states and the next token, in a folder of its own. Next to none of its
    drafts is accepted: it is about the batches that they make.
    """
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    draft = LlamaForCausalLM(type(config)(**{**config.to_dict(), "num_hidden_layers": 1}))
    draft.config.architectures = ["LlamaForCausalLM"]
    draft.config.save_pretrained(folder / "draft")
    layer = {k: v for k, v in draft.model.state_dict().items() if k.startswith("layers.")}
    del layer["layers.0.input_layernorm.weight"]  # the first has none
    fc = torch.randn(config.hidden_size, 2 * config.hidden_size) / 16
    save_file({**layer, "fc.weight": fc}, folder / "draft" / "model.safetensors")


def _name_vision_model(folder: Path) -> None:
    """transformers has come to leave out a part of the names that released checkpoints have."""
    from safetensors.torch import load_file, save_file

    saved = load_file(folder / "model.safetensors")
    part = re.compile(r"vision_tower\.(?!vision_model)")
    named = {part.sub("vision_tower.vision_model.", key): value for key, value in saved.items()}
    save_file(named, folder / "model.safetensors")


def _image(folder: Path, config: Any) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    _name_vision_model(folder)
    side = config.vision_config.image_size
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        AutoTokenizer.from_pretrained(folder),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token="<repo_name>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def _gemma_image(folder: Path, config: Any) -> None:
    """Gemma's processor, and a tokenizer with the runs of newlines that it puts around images."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    _name_vision_model(folder)
    named = ["<pad>", "<bos>", "<eos>", "<begin>", "<image>", "<end>"]
    named += ["\n" * count for count in range(1, 5)]
    words = named + [f"word{i}" for i in range(len(named), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in named])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    side = config.vision_config.image_size
    Gemma3Processor(
        Gemma3ImageProcessor(size={"height": side, "width": side}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            extra_special_tokens={
                "boi_token": "<begin>",
                "image_token": "<image>",
                "eoi_token": "<end>",
            },
        ),
        image_seq_length=config.mm_tokens_per_image,
    ).save_pretrained(folder)


def _audio(folder: Path, config: Any) -> None:
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(config.num_mel_bins).save_pretrained(folder)
    # vLLM takes Whisper's own class alone; the tokens may be any.
    (folder / "tokenizer_config.json").unlink()
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "WhisperTokenizer", "unk_token": "<|endoftext|>", **tokens})
    )


def prompts() -> list[list[int]]:
    """Of many lengths; the last two begin as the longest does."""
    draw = random.Random(7)
    lengths = (400, 257, 200, 128, 100, 64, 47, 17, 3, 1)
    alone = [[draw.randrange(20, VOCABULARY) for _ in range(length)] for length in lengths]
    return alone + [alone[0][:300] + [20 + i] * (3 + i) for i in range(2)]


def requests(extra: str) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    if extra == "audio":
        return [
            {
                "encoder_prompt": {
                    "prompt": "",
                    "multi_modal_data": {"audio": (draw.normal(size=16000 * seconds), 16000)},
                },
                "decoder_prompt": {"prompt_token_ids": ids},
            }
            for seconds, ids in zip((30, 3, 12, 7), prompts()[2:6], strict=True)
        ]
    if "image" in extra:
        from PIL import Image

        images = [Image.fromarray(draw.integers(256, size=(56, 56, 3), dtype="u1")) for _ in "abc"]
        return [
            {
                "prompt_token_ids": [*ids[:at], IMAGE_TOKEN, *ids[at:]],
                "multi_modal_data": {"image": image},
            }
            for image, at, ids in zip(images, (3, 50, 0), prompts()[1:4], strict=True)
        ]
    return [{"prompt_token_ids": ids} for ids in prompts()]


def serve(name: str, tokenizer: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Build the model and ask an engine: its answers, the paths that ran, the sizes of heads.

    An answer has the tokens, how far ahead of the second best each was, and the logprobs of the
    prompt and of the tokens.
    """
    head_sizes = build(name, tokenizer, folder)

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = MODELS[name]
    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 512,
        # Long prompts come in chunks, mixed with decoding.
        "max_num_batched_tokens": 512,
        "seed": 0,
        "worker_extension_cls": "sparsek_vllm.backends.vllm_worker.StatsExtension",
    }
    if model.extra == "eagle":
        defaults["disable_log_stats"] = False
        defaults["speculative_config"] = {
            "method": "eagle", "model": str(folder / "draft"), "num_speculative_tokens": 3,
        }  # fmt: skip
    llm = LLM(str(folder), **{**defaults, **settings, **model.settings})

    def generate(prompts: list[dict[str, Any]], **arguments: Any) -> list[Any]:
        # A prompt whose logprobs are asked for is computed anew, and with adapters vLLM on CPU
        # fails to compute them.
        prompt_logprobs = None if model.extra in ("adapter", "twice", "eagle") else 0
        greedy = SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, logprobs=2,
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        return llm.generate(prompts, greedy, use_tqdm=False, **arguments)

    extra = model.extra
    outputs = generate(requests(extra))
    if extra == "adapter":
        # In a call of its own: vLLM on CPU gets batches of prompts with and without one wrong.
        adapter = LoRARequest("adapter", 1, str(folder / "adapter"))
        outputs += generate(requests(extra), lora_request=adapter)
    elif extra == "twice":
        # In between, others take all memory of the GPU.
        generate([{"prompt_token_ids": [20 + i] * 450} for i in range(20)])
        llm.reset_prefix_cache()
        outputs += generate(requests(extra))
    answers = []
    for output in outputs:
        (sample,) = output.outputs
        gaps = []
        for top in sample.logprobs:
            best = sorted((entry.logprob for entry in top.values()), reverse=True)
            gaps.append(best[0] - best[1])
        answers.append(
            {
                "tokens": list(sample.token_ids),
                "gaps": gaps,
                "prompt": chosen(output.prompt_token_ids, output.prompt_logprobs or []),
                "generated": chosen(sample.token_ids, sample.logprobs),
                "cached": output.num_cached_tokens,
            }
        )
    paths, *others = llm.collective_rpc("sparsek_path_counts")  # of each GPU
    assert all(set(other) == set(paths) for other in others)
    if extra == "eagle":
        values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        assert values["vllm:spec_decode_num_draft_tokens"] > 0
    return {"answers": answers, "paths": paths, "head_sizes": head_sizes}


def serve_apart(
    name: str, tokenizer: Path, folder: Path, settings: dict[str, Any], **environment: str
) -> dict[str, Any]:
    """:func:`serve` in a process of its own."""
    command = [sys.executable, __file__, name, str(tokenizer), str(folder), json.dumps(settings)]
    result: dict[str, Any] = result_of(command, **environment)
    return result


def chosen(tokens: Sequence[int], steps: list[Any]) -> list[float]:
    """Logprobs of the tokens that are there; a prompt's first token has none."""
    pairs = zip(tokens, steps, strict=True) if steps else ()
    return [step[token].logprob for token, step in pairs if step is not None]


def compare(ours: Answers, theirs: Answers, near: float) -> float:
    """Mean difference of logprobs; tokens may part only where ``theirs`` had two that were near."""
    differences = []
    for got, expected in zip(ours, theirs, strict=True):
        pairs = zip(got["tokens"], expected["tokens"], strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert same is None or expected["gaps"][same] < near, (same, expected["gaps"][same])
        for key, count in (("prompt", None), ("generated", same)):
            values = zip(got[key][:count], expected[key][:count], strict=True)
            differences += [abs(a - b) for a, b in values]
    return sum(differences) / len(differences)


def halves(answers: Answers) -> tuple[Answers, Answers]:
    """Those without the adapter and with it, or the first time and the second."""
    return answers[: len(answers) // 2], answers[len(answers) // 2 :]


if __name__ == "__main__":
    name, tokenizer, folder, settings = sys.argv[1:]
    result = serve(name, Path(tokenizer), Path(folder), json.loads(settings))
    print("RESULT" + json.dumps(result))
