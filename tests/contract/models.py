"""Tiny random-weight models of the families that attach must serve."""

from __future__ import annotations

import os
from functools import cache

import torch
import transformers
from transformers import PreTrainedModel

# SACCADE_TEST_DEVICE=cuda runs the matrix on a GPU
DEVICE = torch.device(os.environ.get("SACCADE_TEST_DEVICE", "cpu"))

_SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "attention_dropout": 0.0, "initializer_range": 0.2,
}  # fmt: skip

_CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 32}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 4}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "hidden_size": 96}),
    "gpt-neox": ("GPTNeoXConfig", {"hidden_size": 96}),
    "gpt2": ("GPT2Config", {"hidden_size": 96}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 6, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
            "v_head_dim": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
}  # fmt: skip

FAMILIES = tuple(_CONFIGS)


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of a family, in eval mode, always with the same weights."""
    return _tiny(family, dtype)


@cache
def _tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    name, changes = _CONFIGS[family]
    settings = {**_SMALL, **changes}
    settings.pop("head_dim") if family in ("phi3", "gpt-neox", "gpt2", "deepseek-v3") else None
    config = getattr(transformers, name)(**settings)
    torch.manual_seed(0)
    # eager: transformers' sdpa path does not know Gemma-2's softcap
    implementation = "eager" if family == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval().to(DEVICE, dtype)
    model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model
