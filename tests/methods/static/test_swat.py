"""SWAT (swat, 2502.18845): the operator and its gradients, additivity, ring-buffer steps, slopes, and length beyond training."""

from __future__ import annotations

import pytest
import torch
from tests.contract.harness import error, llama, logits, tokens
from tests.methods.prefill.planted import context
from tests.methods.static.grids import masked_dense, qkv
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import saccade
from saccade.methods import build
from saccade.methods.static.swat import SWAT
from saccade.parts.static import CachePlan, window


def plain(q: Tensor, k: Tensor, v: Tensor, w: int, slopes: list[float], keys: slice = slice(None)) -> Tensor:
    """The card's formula with all N x N logits; `keys` leaves only some keys in."""
    n, group = k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    distance = torch.arange(n).unsqueeze(1) - torch.arange(n)
    s = q @ k.mT * q.shape[-1] ** -0.5 + torch.tensor(slopes, dtype=q.dtype).view(-1, 1, 1) * distance
    p = torch.where((distance >= 0) & (distance < w), torch.sigmoid(s), 0.0)
    return p[..., keys] @ v[..., keys, :]


BALANCED = [-0.5, -0.25, 0.5, 0.25]


@pytest.mark.parametrize("w", [1, 7, 40, 200])
@pytest.mark.parametrize("n_q", [101, 33, 1])
def test_the_operator_forward_and_backward(w: int, n_q: int) -> None:
    q, k, v = qkv(101, grad=True)
    part = q[:, :, -n_q:]
    ours = SWAT(window=w).attend(context(part, k, v), part, k, v)
    theirs = plain(q, k, v, w, BALANCED)[:, :, -n_q:]
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=ours.dtype)
    found, expected = ([out, *torch.autograd.grad((out * upstream).sum(), (q, k, v))] for out in (ours, theirs))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(found, expected, strict=True))


def test_outputs_over_disjoint_keys_add_up() -> None:
    """True of sigmoid weights, false of softmax."""
    q, k, v = qkv(60)
    whole = SWAT(window=60).attend(context(q, k, v), q, k, v)
    parts = [plain(q, k, v, 60, BALANCED, keys) for keys in (slice(0, 20), slice(20, None))]
    assert (whole - sum(parts)).abs().max() < 1e-12
    soft = SWAT(window=60, weights="softmax", slopes="none").attend(context(q, k, v), q, k, v)
    pairs = torch.ones(60, 60, dtype=torch.bool).tril()
    halves = [masked_dense(q, k, v, pairs & part)[:, :, 25:] for part in (torch.arange(60) < 20, torch.arange(60) >= 20)]
    assert (soft[:, :, 25:] - sum(halves)).abs().max() > 0.1


def test_without_logits_every_weight_is_one_half() -> None:
    k, v = qkv(50)[1:]
    q = torch.zeros(2, 4, 50, 8, dtype=torch.float64)
    out = SWAT(window=10, slopes="none").attend(context(q, k, v), q, k, v)
    sums = torch.stack([v[:, :, max(0, i - 9) : i + 1].sum(2) for i in range(50)], 2)
    assert (out - 0.5 * sums.repeat_interleave(2, 1)).abs().max() < 1e-12


def test_slopes() -> None:
    found = {name: build(f"swat(slopes={name!r})").head_slopes(4) for name in ("balanced", "negative", "positive", "none")}
    assert found["balanced"].tolist() == BALANCED and found["none"] is None
    assert found["positive"].tolist() == [2**-2, 2**-4, 2**-6, 2**-8] and torch.equal(found["negative"], -found["positive"])
    assert SWAT().head_slopes(5).tolist() == [-0.5, -0.25, -0.125, 0.5, 0.25]


def test_softmax_in_a_window_equals_the_masked_form() -> None:
    q, k, v = qkv(90)
    i, j = torch.arange(90).unsqueeze(1), torch.arange(90)
    exact = masked_dense(q, k, v, (j <= i) & (i - j < 13))
    method = SWAT(window=13, weights="softmax", slopes="none")
    assert (method.attend(context(q, k, v), q, k, v) - exact).abs().max() < 1e-12
    assert torch.equal(method.select(context(q, k, v), q, k, v).dense_mask()[0, 0], (j <= i) & (i - j < 13))


def test_steps_over_the_ring_equal_the_training_forward() -> None:
    """At once, in chunks and step by step, over everything and over the last tokens only."""
    model, ids, spec = llama(), tokens(2, 150), "swat(window=24)"
    with saccade.attach(model, prefill=spec):
        at_once = logits(model, ids)
        assert error(logits(model, ids, steps=90), at_once) < 1e-9
        assert error(logits(model, ids, chunks=[50, 3, 40, 57]), at_once) < 1e-9
        assert error(logits(model, ids, chunks=[2] + [1] * 148), at_once) < 1e-9
    with saccade.attach(model, prefill=spec, cache=spec):
        assert error(logits(model, ids, steps=90), at_once) < 1e-9
        assert error(logits(model, ids, chunks=[50, 1, 3, 40, 56]), at_once) < 1e-9
    with saccade.attach(model, prefill=spec, cache=spec) as handle:
        logits(model, ids, steps=90)
        assert all(23 <= x <= 27 for x in handle.stats().kept[0])


def test_padded_rows_and_guesses() -> None:
    model, ids = llama(), tokens(2, 80)
    ids[1, :11] = 0
    with saccade.attach(model, prefill="swat(window=24)"):
        both = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=8, do_sample=False)
        assert torch.equal(both[1:, 11:], model.generate(ids[1:, 11:], max_new_tokens=8, do_sample=False))
        repeats = tokens(1, 20).repeat(1, 4)
        straight = model.generate(repeats, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(repeats, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=5), straight)


def test_what_leaves_is_never_read_again() -> None:
    plan = CachePlan(window(24), 2)
    assert plan.evictable and plan.size(99).tolist() == [23, 23]
    for t in range(60):
        kept = plan.keep(torch.arange(t + 1).expand(1, 2, -1), t)[0, 0]
        assert kept.nonzero().flatten().tolist() == list(range(max(0, t + 1 - 23), t + 1))


def test_another_decode_method_is_refused() -> None:
    with pytest.raises(ValueError, match="swat acts on the decode phase too"):
        saccade.attach(llama(), prefill="swat", decode="quest")


def copy_stream(generator: torch.Generator, rows: int, n: int) -> Tensor:
    """A stream in which most tokens repeat the one a few places before: short range, the same at every length."""
    ids = torch.randint(0, 24, (rows, n), generator=generator)
    keep = torch.rand(rows, n, generator=generator) < 0.85
    for i in range(5, n):
        ids[:, i] = torch.where(keep[:, i], ids[:, i - 5], ids[:, i])
    return ids


def trained(n: int, w: int, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    model.train()
    with saccade.attach(model, prefill=f"swat(window={w})"):
        for _ in range(steps):
            ids = copy_stream(generator, 2048 // n, n)
            loss = model(ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def tail_loss(model: LlamaForCausalLM, ids: Tensor, w: int, tail: int) -> float:
    """Nats a token over the last `tail` tokens of ids `(B, n)`."""
    with saccade.attach(model, prefill=f"swat(window={w})"):
        found = model(ids, use_cache=False).logits
    return float(nn.functional.cross_entropy(found[:, -tail - 1 : -1].flatten(0, 1), ids[:, -tail:].flatten()))


@pytest.mark.slow
def test_trained_over_several_windows_it_goes_on_for_sixteen() -> None:
    """Trained at length 4w, the same tokens cost no more at the end of 16w than of 4w. Trained at length w, they do: its window slides."""
    w = 16
    ids = copy_stream(torch.Generator().manual_seed(2), 96, 16 * w)
    slid, short = trained(4 * w, w, 150), trained(w, w, 150)
    assert tail_loss(slid, ids, w, w // 2) < tail_loss(slid, ids[:, -4 * w :], w, w // 2) + 0.01
    assert tail_loss(slid, ids, w, w // 2) < 1.5  # it has learnt something: guessing costs 3.18
    assert tail_loss(short, ids, w, w // 2) > tail_loss(short, ids[:, -w:], w, w // 2) + 0.05


def test_fields_are_checked() -> None:
    for spec, message in (("swat(window=0)", "window=0"), ("swat(slopes='up')", "slopes='up'"), ("swat(weights='relu')", "weights='relu'")):
        with pytest.raises(ValueError, match=message):
            build(spec)
