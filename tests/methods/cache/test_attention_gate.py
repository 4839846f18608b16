"""Attention-Gate (attention-gate, 2410.12876): flags in prompt and cache, training with straight-through flags, and what it learns."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.contract.harness import error, greedy, llama, logits, tokens, untrained_plan
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.attach import capture
from saccade.core import Plan
from saccade.methods import build
from saccade.methods.cache.attention_gate import AttentionGate
from saccade.ops import attend
from saccade.parts.token_gate import TokenGate
from saccade.train.attention_gates import attention_gates_plan, flagged_attention, new_gates, train_attention_gates


def plan() -> Plan:
    return untrained_plan(llama(), AttentionGate())


def inputs_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What goes into each layer's attention."""
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda m, a, kw: found.append(kw["hidden_states"]), with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


# -- flags -----------------------------------------------------------------------------------------------------------------


def test_flags_mask_columns_but_never_the_diagonal() -> None:
    """The first layer against a mask written out; its input does not depend on flags."""
    model, ids = llama(), tokens(2, 50)
    hidden, gate = inputs_of(model, ids)[0], TokenGate.read(lambda name: plan().tensor(0, name))
    flags = gate.logits(*gate.features(hidden)).sigmoid() > 0.5
    assert 0.2 < flags.double().mean() < 0.8 and not torch.equal(flags[:, 0], flags[:, 1])
    with capture(model) as layers, torch.no_grad():
        model(ids, use_cache=False)
    q, k, v = layers[0].q, layers[0].k, layers[0].v
    read = (flags.unsqueeze(2) | torch.eye(50, dtype=torch.bool)) & torch.ones(50, 50, dtype=torch.bool).tril()
    bias = torch.zeros(read.shape, dtype=q.dtype).masked_fill(~read, -torch.inf).repeat_interleave(3, 1)
    expected = attend(q, k, v, causal=False, bias=bias, scale=layers[0].scale).out
    got: list[Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: got.append(a[0]))
    with saccade.attach(model, cache="attention-gate", plan=plan()) as handle, torch.no_grad():
        c = model(ids, use_cache=True).past_key_values
        assert handle.stats().kept == [[50, 50]] * 2, "nothing goes before the prompt has ended"
        handle.compress(c)
        kept = handle.stats().per_layer[0]["kept_by_row"]
        density = handle.stats().per_layer[0]["prefill_density"]
    hook.remove()
    assert (got[-1] - expected.transpose(1, 2).flatten(2)).abs().max() < 1e-9
    last = flags.clone()
    last[..., -1] = True
    assert kept == last.sum(-1).tolist()
    # kept columns and the diagonal are all that was computed, beside the gate itself
    assert density == pytest.approx(float(read.sum((-1, -2)).double().mean()) / (50 * 51 / 2))


def test_all_flags_are_the_model_itself() -> None:
    model, ids = llama(), tokens(2, 60)
    dense = logits(model, ids, steps=10)
    with saccade.attach(model, cache="attention-gate(threshold=0)", plan=plan()) as handle:
        assert error(logits(model, ids, steps=10), dense) < 1e-9 and handle.stats().kept == [[60, 60]] * 2
    with saccade.attach(model, cache="attention-gate", plan=plan()):
        assert error(logits(model, ids, steps=10), dense) > 1e-3


def test_generated_tokens_are_kept_and_a_turn_is_judged_again() -> None:
    model, ids = llama(), tokens(1, 50)
    with saccade.attach(model, cache="attention-gate", plan=plan()) as handle:
        c = DynamicCache(config=model.config)
        first = greedy(model, ids, 10, past_key_values=c)
        after = [len_ for layer in handle.stats().kept for len_ in layer]
        with torch.no_grad():
            model(ids, use_cache=True, past_key_values=(p := DynamicCache(config=model.config)))
        handle.compress(p)
        prompt = [len_ for layer in handle.stats().kept for len_ in layer]
        assert after == [n + 9 for n in prompt] and max(prompt) < 50
        greedy(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 2, past_key_values=c)
        second = [len_ for layer in handle.stats().kept for len_ in layer]
    assert all(a + 2 < b < a + 42 for a, b in zip(after, second, strict=True))


def test_memory_is_freed_head_by_head() -> None:
    model, ids = llama(), tokens(1, 300)
    with saccade.attach(model, cache="attention-gate", plan=plan()) as handle, torch.no_grad():
        c = model(ids, use_cache=True).past_key_values
        handle.compress(c)
        stats = handle.stats()
    total = sum(sum(layer) for layer in stats.kept)
    assert len({n for layer in stats.kept for n in layer}) > 1 and stats.kv_bytes == total * 2 * 16 * 8 and total < 0.75 * 4 * 300
    # the gate's own keys and values are gone with the prompt: positions are all that is left
    assert sum(layer.side_bytes for layer in c.layers) == total * 4


def test_taking_tokens_back_and_guesses() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache="attention-gate", plan=plan()), torch.no_grad():
        plain = greedy(model, ids, 16)
        c = DynamicCache(config=model.config)
        model(ids, past_key_values=c)
        once = [model(plain[:, i : i + 1], past_key_values=c).logits for i in range(80, 92)]
        c.crop(-8)
        guessed = model(plain[:, 84:92], past_key_values=c).logits
    assert error(torch.cat(once[4:], 1), guessed) < 1e-6, "guesses on a prompt that has ended are kept, as single tokens are"


# -- training --------------------------------------------------------------------------------------------------------------


def test_flagged_attention_is_masked_attention_with_a_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 4, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    flags = (torch.rand(1, 2, 12, generator=generator) > 0.5).double()
    read = (flags[:, :, None].bool() | torch.eye(12, dtype=torch.bool)) & torch.ones(12, 12, dtype=torch.bool).tril()
    bias = torch.zeros(read.shape, dtype=q.dtype).masked_fill(~read, -torch.inf).repeat_interleave(2, 1)
    expected = attend(q, k, v, causal=False, bias=bias, scale=0.5).out
    assert (flagged_attention(q, k, v, flags, scale=0.5) - expected).abs().max() < 1e-12
    soft = torch.rand(1, 2, 12, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: flagged_attention(q, k, v, f, scale=0.5), (soft,))


SOURCES, DISTRACTORS = 8, 32  # ids 0 ... 7 and 8 ... 39


def averager() -> PreTrainedModel:
    """One layer with flat attention whose output is the mean of what it sees, as next-token logits: distractors drown the source."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=80, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=80,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        one = model.model.layers[0]
        for parameter in (one.self_attn.q_proj.weight, one.mlp.down_proj.weight, one.self_attn.o_proj.weight, one.self_attn.v_proj.weight):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(40, 80))
        # the mean of the embeddings is written into channels of its own, from which the head reads
        one.self_attn.v_proj.weight[:40, :40] = torch.eye(40)
        one.self_attn.o_proj.weight[40:, :40] = torch.eye(40)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 40:] = 0.4 * torch.eye(40)
    return model


def copy_samples(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """A quarter of the tokens is one source, the rest distractors; what comes last is the source."""
    generator, samples = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        source = torch.randint(SOURCES, (16, 1), generator=generator)
        ids = torch.randint(SOURCES, SOURCES + DISTRACTORS, (16, 33), generator=generator)
        places = torch.rand(16, 32, generator=generator).argsort(1)[:, :8]
        ids.scatter_(1, places, source.expand(-1, 8))
        ids[:, -1:] = source
        answers = torch.zeros(16, 33, dtype=torch.bool)
        answers[:, -2] = True
        samples.append((ids, answers))
    return samples


@cache
def learned() -> tuple[PreTrainedModel, Plan, list[dict[str, float]]]:
    model, steps = averager(), []
    found = train_attention_gates(model, copy_samples(80), steps=80, rate=0.03, beta=0.3, heads=1, dim=8, progress=steps.append)
    return model, found, steps


def test_mean_probability_settles_at_beta() -> None:
    model, _, steps = learned()
    assert abs(steps[-1]["mean"] - 0.3) < 0.03 < abs(steps[0]["mean"] - 0.3) and steps[-1]["task"] < steps[0]["task"]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    again = train_attention_gates(averager(), copy_samples(5), steps=5, heads=1, dim=8)
    other = train_attention_gates(averager(), copy_samples(5), steps=5, heads=1, dim=8)
    assert all(torch.equal(again.tensors[name], x) for name, x in other.tensors.items())


def test_sources_are_kept_and_distractors_are_not() -> None:
    model, found, _ = learned()
    gate = TokenGate.read(lambda name: found.tensor(0, name))
    kept = {"source": [], "distractor": []}
    losses = {"learned": [], "random": []}
    generator = torch.Generator().manual_seed(1)
    for ids, _ in copy_samples(4, seed=5):
        hidden = inputs_of(model, ids[:, :-1])[0]
        flags = (gate.logits(*gate.features(hidden)).sigmoid() > 0.5)[:, 0]
        source = ids[:, :-1] < SOURCES
        kept["source"].append(flags[source].double().mean())
        kept["distractor"].append(flags[~source].double().mean())
        shuffled = torch.stack([row[torch.randperm(32, generator=generator)] for row in flags])
        with capture(model) as layers, torch.no_grad():
            model(ids[:, :-1], use_cache=False)
        q, k, v = layers[0].q, layers[0].k, layers[0].v
        for name, chosen in (("learned", flags), ("random", shuffled)):
            out = flagged_attention(q, k, v, chosen.unsqueeze(1).float(), scale=1.0)[:, 0, -1, :40]
            losses[name].append(F.cross_entropy(out, ids[:, -1]))
        with saccade.attach(model, cache="attention-gate", plan=found), torch.no_grad():
            right = model(ids[:, :-1]).logits[:, -1].argmax(-1) == ids[:, -1]
        assert bool(right.all())
    rate = {name: float(torch.stack(x).mean()) for name, x in kept.items()}
    assert rate["source"] > 0.9 > 0.3 > rate["distractor"], rate
    assert torch.stack(losses["learned"]).mean() < torch.stack(losses["random"]).mean() - 0.2


def test_untrained_gates_keep_nearly_everything() -> None:
    model, ids = llama(), tokens(1, 100)
    fresh = attention_gates_plan(model, new_gates(model))
    with saccade.attach(model, cache="attention-gate", plan=fresh) as handle, torch.no_grad():
        handle.compress(model(ids, use_cache=True).past_key_values)
        assert min(n for layer in handle.stats().kept for n in layer) == 100


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    for threshold in (-0.1, 1.0, True):
        with pytest.raises(ValueError, match=r"attention-gate\(threshold="):
            AttentionGate(threshold=threshold)
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="reads the inputs of a model's layers"):
        saccade.attention(q, q, q, method=build("attention-gate"), plan=plan())
    with pytest.raises(ValueError, match="ended after 1 of 2 steps"):
        train_attention_gates(averager(), copy_samples(1), steps=2)
    with pytest.raises(ValueError, match="beta=0"):
        train_attention_gates(averager(), copy_samples(1), steps=1, beta=0)


def test_hooks_are_gone_afterwards() -> None:
    model, ids = llama(), tokens(1, 40)
    with saccade.attach(model, cache="attention-gate", plan=plan()):
        assert any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
        logits(model, ids)
    assert not any(module._forward_pre_hooks for module in model.modules())
