"""The rotary embedding that is found is the one that the model uses."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from saccade.attach import capture
from saccade.attach.rotary import rotary_of
from saccade.parts.rotary import turn
from tests.contract.models import tiny

_SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@cache
def small(name: str, **changes: object) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**_SMALL, **{k: _plain(v) for k, v in changes.items()}})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _plain(value: object) -> object:
    """Settings are given as tuples, so that they can be cached."""
    if not isinstance(value, tuple):
        return value
    named = all(isinstance(v, tuple) and len(v) == 2 for v in value)
    return {k: _plain(v) for k, v in value} if named else [_plain(v) for v in value]


def rope(kind: str, **more: object) -> tuple[tuple[str, object], ...]:
    return (("rope_type", kind), ("rope_theta", 1e4), *more.items())


MODELS = {
    "llama": lambda: tiny("llama"),
    "qwen3": lambda: tiny("qwen3"),
    "phi3": lambda: tiny("phi3"),
    "phi3, three quarters": lambda: small("Phi3", partial_rotary_factor=0.75),
    "gemma3": lambda: tiny("gemma3"),
    "gpt-neox, a quarter": lambda: tiny("gpt-neox"),
    "llama3 frequencies": lambda: small("Llama", rope_parameters=rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
    )),
    "linear": lambda: small("Llama", rope_parameters=rope("linear", factor=4.0)),
    "yarn, with its scale": lambda: small("Llama", rope_parameters=rope(
        "yarn", factor=8.0, original_max_position_embeddings=512
    )),
    "cohere, neighbours": lambda: small("Cohere"),
    "glm4, half of the neighbours": lambda: small("Glm4", head_dim=16),
    "smollm3, one layer without": lambda: small("SmolLM3"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_turned_keys_are_the_models_own(name: str) -> None:
    """turn(rope(k, p), d) is rope(k, p + d), in every full-attention layer.

    All against turning the key of position 0 in float64. Turning may be at most twice as far off as the model's own
    embedding.
    """
    model, d = MODELS[name](), 731
    places = torch.arange(0, 180, 9)

    def keys(first: int) -> list[torch.Tensor]:
        """Per layer, `(20, Hk, 1, D)`: the key of one and the same token, by itself, at 20 places."""
        first_and_next = torch.stack([places + first, places + first + 1], dim=-1)
        with capture(model) as layers, torch.no_grad():
            model(torch.tensor([[3, 4]]).expand(20, -1), position_ids=first_and_next)
        return [x.k[:, :, :1] for x in layers]

    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 9
    indices = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    for index, zero, near, far in zip(indices, keys(0), keys(5), keys(5 + d), strict=False):
        rotary = rotary_of(model, index)
        assert rotary is not None
        exact = turn(zero[:1].double().expand(20, -1, -1, -1), (places + 5 + d)[:, None, None], rotary)
        own = (far.double() - exact).abs().max()
        ours = (turn(near, d, rotary).double() - exact).abs().max()
        assert own < 1e-3 * exact.abs().max(), "the embedding was misread"
        assert ours <= 2 * own + 1e-6
        moves = float((far - near).abs().max())
        assert (rotary.inv_freq.numel() == 0) == (moves < 1e-4), "a layer without positions has no pairs"


def test_layouts() -> None:
    def facts(name: str) -> list[tuple[int, bool]]:
        model = MODELS[name]()
        found = [rotary_of(model, i) for i in range(model.config.num_hidden_layers)]
        return [(r.inv_freq.numel(), r.interleaved) for r in found if r is not None]

    assert facts("llama") == [(8, False)] * 2
    assert facts("phi3, three quarters") == [(6, False)] * 4
    assert facts("gpt-neox, a quarter") == [(2, False)] * 2
    assert facts("cohere, neighbours") == [(8, True)] * 4
    assert facts("glm4, half of the neighbours") == [(4, True)] * 4
    assert facts("smollm3, one layer without") == [(8, False)] * 3 + [(0, False)]


def test_gemma3_full_and_sliding_layers_have_their_own() -> None:
    model = tiny("gemma3")
    sliding, full = rotary_of(model, 0), rotary_of(model, 1)
    assert sliding is not None and full is not None
    assert not torch.equal(sliding.inv_freq, full.inv_freq)
    assert torch.equal(full.inv_freq, model.model.rotary_emb.full_attention_inv_freq)


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny("gpt2"),
        lambda: tiny("deepseek-v3"),
        lambda: small("Llama", rope_parameters=rope("dynamic", factor=4.0)),
        lambda: small("Phi3", rope_parameters=rope(
            "longrope", short_factor=(1.0,) * 8, long_factor=(2.0,) * 8, original_max_position_embeddings=2048
        )),
    ],
    ids=["learned positions", "latents", "dynamic", "longrope"],
)  # fmt: skip
def test_none_where_keys_cannot_be_turned(model) -> None:
    assert [rotary_of(model(), layer) for layer in range(2)] == [None, None]


def test_low_precision_is_read_alike() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("llama", "gemma3", "gpt-neox"):
            found = rotary_of(tiny(name, dtype), 1)
            exact = rotary_of(tiny(name), 1)
            assert found is not None and exact is not None
            assert (found.inv_freq.shape, found.interleaved) == (exact.inv_freq.shape, exact.interleaved)


def test_the_model_is_left_as_it_was() -> None:
    model = small("Qwen3", head_dim=16)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = model(ids).logits
        state = torch.get_rng_state()
        rotary_of(model, 0)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(ids).logits, before)
    assert all(p.grad is None for p in model.parameters())
