"""A byte-level model small enough to run through hundreds of steps in a test: random weights, so it solves nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saccade.models.pocket.tokenizer import build_tokenizer

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
"""Bytes of keys and values of one token."""


@cache
def tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model, in eval mode on the CPU, and the pocket model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
        num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=4096, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # special tokens would end an answer early
    return model, build_tokenizer()


def save_tiny(folder: Path) -> Path:
    """The tiny model as a folder that `from_pretrained` reads."""
    model, tokenizer = tiny()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
