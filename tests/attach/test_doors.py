"""The two front doors: `saccade.attention` on tensors, `saccade.attach` on a model, and what they say about a run."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import saccade
from saccade.ops import attend
from tests.contract.harness import error, greedy, llama, logits, tokens
from tests.contract.models import tiny


def qkv(n_q: int = 90, n_k: int = 90) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, 16, generator=g, dtype=torch.float64) for h, n in ((6, n_q), (2, n_k), (2, n_k))]


def test_attention_is_dense_by_default() -> None:
    q, k, v = qkv()
    assert torch.allclose(saccade.attention(q, k, v), attend(q, k, v, impl="reference").out)
    assert torch.allclose(saccade.attention(q, k, v, causal=False), attend(q, k, v, causal=False, impl="reference").out)
    assert saccade.last_run().density == 1.0


def test_attention_refuses_what_needs_a_model() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"use saccade\.attach"):
        saccade.attention(q, k, v, method="random")
    with pytest.raises(ValueError, match=r"there is no method 'snapkw': did you mean snapkv"):
        saccade.attention(q, k, v, method="snapkw")
    with pytest.raises(ValueError, match="planned but not built"):
        saccade.attention(q, k, v, method="nsa")
    with pytest.raises(ValueError, match=r"saccade\.mixer"):
        saccade.attention(q, k, v, method="kimi-linear")
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        saccade.attention(q[:, :5], k, v)


def test_stats_count_what_was_read_and_held() -> None:
    model = llama()
    with saccade.attach(model, cache="random(budget=0.5, sinks=1, recent=4)") as handle:
        c = DynamicCache(config=model.config)
        model(tokens(2, 100), past_key_values=c)
        full = handle.stats()
        assert (full.prefill_density, full.decode_density, full.tokens_seen) == (1.0, None, 100)
        assert full.kept == [[100, 100], [100, 100]]
        model(tokens(2, 1), past_key_values=c)
        after = handle.stats()
        assert after.kept == [[51, 51], [51, 51]] and after.tokens_seen == 101
        assert after.decode_density == pytest.approx(51 / 101)
        held = sum(x.untyped_storage().nbytes() for layer in c.layers for x in (layer.keys, layer.values))
        assert after.kv_bytes == held < 0.75 * full.kv_bytes
        assert saccade.memory(model) == {"kv": held, "index": after.index_bytes}
        assert handle.cache is c
        del c
        assert handle.cache is None, "the handle must not keep a finished cache alive"
    with pytest.raises(ValueError, match="not attached"):
        saccade.memory(model)


def test_a_closed_prompt_is_compressed_before_the_question_is_known() -> None:
    model, context, question = llama(), tokens(1, 80), tokens(1, 20, seed=2)
    with saccade.attach(model, cache="random(budget=0.25, sinks=1, recent=4)") as handle, torch.no_grad():
        c = DynamicCache(config=model.config)
        model(context, past_key_values=c)
        handle.compress()
        assert handle.stats().kept == [[20, 20]] * 2
        model(question, past_key_values=c)
        assert c.get_seq_length() == 100 and c.layers[0].physical == 40
    with saccade.attach(model) as handle, pytest.raises(ValueError, match="no cache to compress"):
        handle.compress()


def test_assisted_decoding() -> None:
    model, ids = tiny("llama"), tokens(1, 40)
    plain = greedy(model, ids, 10)
    with saccade.attach(model):
        assert torch.equal(greedy(model, ids, 10, assistant_model=tiny("llama-mqa")), plain)
    with saccade.attach(model, cache="random(budget=1.0)"):
        assert torch.equal(greedy(model, ids, 10, assistant_model=tiny("llama-mqa")), plain)
        draft = tiny("llama-mqa")
        with saccade.attach(draft):
            assert torch.equal(greedy(model, ids, 10, assistant_model=draft), plain)


def test_two_models_attached_at_once_do_not_mix() -> None:
    a, b, ids = llama(), tiny("llama-mqa", torch.float64), tokens(1, 50)
    plain = [logits(m, ids, steps=2) for m in (a, b)]
    with saccade.attach(a, cache="random(budget=0.3)") as first, saccade.attach(b) as second:
        logits(a, ids, steps=2)
        assert error(logits(b, ids, steps=2), plain[1]) < 1e-9
        assert first.stats().kept[0] != second.stats().kept[0]
    assert error(logits(a, ids, steps=2), plain[0]) == 0


def test_fresh_state_for_every_sequence() -> None:
    """Two prompts one after the other give what each gives in a block of its own."""
    model, first, second = llama(), tokens(1, 60), tokens(1, 75, seed=7)
    spec = "random(budget=0.4, sinks=1, recent=4)"
    with saccade.attach(model, cache=spec):
        logits(model, first, steps=3)
        together = logits(model, second, steps=3)
    with saccade.attach(model, cache=spec):
        alone = logits(model, second, steps=3)
    assert error(together, alone) == 0


def test_bad_arguments_of_attach() -> None:
    with pytest.raises(ValueError, match="when='later'"):
        saccade.attach(llama(), when="later")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"impl 'magic' is not one of"):
        saccade.attach(llama(), impl="magic")
    with pytest.raises(ValueError, match="no plan at"):
        saccade.attach(llama(), plan="/no/such/plan.safetensors")
    with pytest.raises(ValueError, match=r"budget 0\.0 is not a ratio"):
        saccade.attach(llama(), cache="random(budget=0.0)")
    with pytest.raises(ValueError, match=r"budget 1\.5 is not a ratio"):
        saccade.attach(llama(), cache="random(budget=1.5)")
