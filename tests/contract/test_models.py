"""Every model family with every method: it equals dense when opened, or is refused with the right reason."""

from __future__ import annotations

import pytest
import torch

import saccade
from tests.contract.harness import METHODS, SAME, attached, error, greedy, info, logits, opened, sparse, tokens
from tests.contract.models import FAMILIES, tiny

# families that differ in what reaches attention: heads, latents, softcap, windows, no rotary embedding; others run with the slow tests
DIFFERENT = {"gemma2", "gpt2", "deepseek-v3"}

# (family, method) to the reason; "*" stands for every method
REFUSED = {
    ("mistral-sliding", "*"): "every layer of MistralForCausalLM is of kind sliding_attention",
    ("deepseek-v3", "zipcache"): "caches one latent for all heads",
    ("deepseek-v3", "think"): "caches one latent for all heads",
    ("deepseek-v3", "akvq-vl"): "caches one latent for all heads",
    ("deepseek-v3", "zipvl"): "caches one latent for all heads",
    ("deepseek-v3", "kvquant"): "caches one latent for all heads|no rotary embedding",
    ("deepseek-v3", "matryoshkakv"): "caches one latent for all heads",
    ("deepseek-v3", "cskv"): "caches one latent for all heads",
    ("deepseek-v3", "streaming-llm"): "latent",
    ("deepseek-v3", "d2o"): "caches one latent for all heads",
    ("deepseek-v3", "look-m"): "caches one latent for all heads",
    ("deepseek-v3", "kvmerger"): "caches one latent for all heads",
    ("deepseek-v3", "ems"): "caches one latent for all heads",
    ("gemma2", "gemfilter"): "use a model of full-attention layers",
    ("gemma3", "gemfilter"): "use a model of full-attention layers",
    ("gemma2", "adore"): "use a model of full-attention layers",
    ("gemma3", "adore"): "use a model of full-attention layers",
    ("deepseek-v3", "razorattention"): "caches one latent for all heads",
    ("deepseek-v3", "attention-gate"): "caches one latent for all heads",
    ("deepseek-v3", "duoattention"): "caches one latent for all heads",
    ("deepseek-v3", "shadowkv"): "caches one latent for all heads",
    ("deepseek-v3", "ltri-llm"): "caches one latent for all heads",
    ("deepseek-v3", "infllm"): "caches one latent for all heads",
    ("deepseek-v3", "retrievalattention"): "caches one latent for all heads",
    ("gpt2", "streaming-llm"): "rotary",
    ("deepseek-v3", "a2ats"): "rotary",
    ("gpt2", "a2ats"): "rotary",
    ("gpt2", "kvquant"): "rotary",
}


def precision(family: str) -> torch.dtype:
    """float64, but float32 for Gemma-2: transformers' eager attention, which it needs, gives nan for padding in float64."""
    return torch.float32 if family == "gemma2" else torch.float64


# in the fast run each method meets one of the three families that differ most, in the slow one every family
PAIRS = [(family, slug) for family in FAMILIES for slug in sorted(METHODS)]
QUICK = {(family, slug) for i, family in enumerate(sorted(DIFFERENT)) for j, slug in enumerate(sorted(METHODS)) if (i + j) % 3 == 0}


@pytest.mark.parametrize(
    ("family", "slug"), [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_attached_or_refused(family: str, slug: str) -> None:
    dtype = precision(family)
    model = tiny(family, dtype)
    reason = REFUSED.get((family, slug), REFUSED.get((family, "*")))
    if reason is not None:
        with pytest.raises(ValueError, match=reason), attached(sparse(slug), family, dtype):
            greedy(model, tokens(2, 70), 4)
        assert model.config._attn_implementation != "saccade"
        return
    ids = tokens(2, 70)
    ids[0, :9] = 0
    mask = (ids > 0).long()
    dense = greedy(model, ids, 6, attention_mask=mask)
    implementation = model.config._attn_implementation
    with attached(opened(slug), family, dtype):
        assert torch.equal(greedy(model, ids, 6, attention_mask=mask), dense)
    with attached(sparse(slug), family, dtype) as handle:
        assert greedy(model, ids, 6, attention_mask=mask).shape == dense.shape
        assert len(handle.stats().kept) == len(handle.managed)
    assert model.config._attn_implementation == implementation
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral-sliding"])
def test_attached_without_methods_equals_dense(family: str) -> None:
    model, ids = tiny(family, precision(family)), tokens(2, 75)
    plain = logits(model, ids, steps=3)
    same = SAME if precision(family) == torch.float64 else 1e-4
    with saccade.attach(model):
        assert error(logits(model, ids, steps=3), plain) < same
        assert error(logits(model, ids, chunks=[30, 42, 3]), plain) < same
    assert error(logits(model, ids, steps=3), plain) == 0


def test_every_method_names_its_phase() -> None:
    assert {info(slug).phase for slug in METHODS} <= {"prefill", "decode", "cache"}
