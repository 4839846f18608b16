"""softmax-as-rnn: the series reaches softmax, norms make the denominator irrelevant, more orders learn better."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import saccade
from saccade.methods.linear.softmax_as_rnn import order_sizes, taylor
from saccade.parts.linear.powers import TensorPowers


def layer(spec: str, seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def twin(spec: str, other):
    """A layer of another kind with the same weights."""
    made = layer(spec)
    made.load_state_dict(other.state_dict(), strict=False)
    return made


@torch.no_grad()
def test_the_series_reaches_softmax_as_fast_as_its_terms_shrink():
    """The error of order n is at most the sum of the terms left out, |x|^(n+1) / (n+1)! e^|x|; at 80 terms it is rounding."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    exact = layer("softmax(rotary=False)")
    y = exact(x)[0]
    q, k = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (exact.q_proj, exact.k_proj))
    s = (q @ k.mT * 8**-0.5).tril()
    errors = []
    for order in (2, 4, 8, 12, 80):
        series = twin(f"softmax-as-rnn(order={order}, cached=True, denominator='sum')", exact)
        errors.append(float((series(x)[0] - y).abs().max()))
        largest = float(s.abs().max())
        left = largest ** (order + 1) / float(math.factorial(order + 1)) * math.exp(largest)
        assert float((taylor(s, order) - s.exp()).abs().max()) <= left + 1e-13
    assert all(b < a / 3 for a, b in pairwise(errors)) and errors[-1] < 1e-13, errors


def test_the_powers_are_the_polynomial():
    torch.manual_seed(1)
    q, k = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(2, 3, 7, 6, dtype=torch.float64)
    for order in range(6):
        phi = TensorPowers(6, order)
        assert phi(q).shape[-1] == phi.width(6) == math.comb(6 + order, order)
        assert (phi(q) @ phi(k).mT - taylor(q @ k.mT * 6**-0.5, order)).abs().max() < 1e-12


def test_state_and_cache_are_two_forms_of_one_layer():
    x = torch.randn(2, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for rest in ("order=3, denominator='gate'", "order=2, denominator='length', input_gate=True", "order=4, denominator='sum'"):
        state = layer(f"softmax-as-rnn({rest})")
        assert (twin(f"softmax-as-rnn({rest}, cached=True)", state)(x)[0] - state(x)[0]).abs().max() < 1e-12


def test_the_first_order_is_linear_attention_and_exp_over_its_sum_is_softmax():
    x = torch.randn(2, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact = layer("softmax(rotary=False)")
    for name in ("sum", "detached"):
        assert (twin(f"softmax-as-rnn(kernel='exp', denominator='{name}')", exact)(x)[0] - exact(x)[0]).abs().max() < 1e-13
    one = twin("softmax-as-rnn(order=1, denominator='none')", exact)
    q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (exact.q_proj, exact.k_proj, exact.v_proj))
    out = (1 + q @ k.mT * 8**-0.5).tril() @ v
    assert (one(x)[0] - exact.o_proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-12


def test_norms_make_the_denominator_irrelevant():
    """normalise(exp(q k) v) equals normalise(softmax(q k) v): exactly for l2, up to eps for the norms with one."""
    x = torch.randn(2, 50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    exact = layer("softmax(rotary=False)")
    q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (exact.q_proj, exact.k_proj, exact.v_proj))
    divided = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for name, norm in (
        ("l2", lambda y: F.normalize(y, dim=-1)), ("rms", lambda y: F.rms_norm(y, (8,))), ("layer", lambda y: F.layer_norm(y, (8,))),
    ):  # fmt: skip
        y = twin(f"softmax-as-rnn(kernel='exp', denominator='{name}')", exact)(x)[0]
        expected = exact.o_proj(norm(divided).transpose(1, 2).flatten(2))
        assert (y - expected).abs().max() < (1e-12 if name == "l2" else 2e-2), name
    assert (twin("softmax-as-rnn(kernel='exp', denominator='none')", exact)(x)[0] - exact(x)[0]).abs().max() > 0.1


def test_a_detached_denominator_changes_gradients_alone():
    x = torch.randn(1, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for kernel in ("exp", "taylor"):
        whole = layer(f"softmax-as-rnn(kernel='{kernel}', denominator='sum')")
        detached = twin(f"softmax-as-rnn(kernel='{kernel}', denominator='detached')", whole)
        grads = [torch.autograd.grad(m(x, keep=False)[0].square().sum(), m.k_proj.weight)[0] for m in (whole, detached)]
        assert (whole(x)[0] - detached(x)[0]).abs().max() < 1e-13 < 1e-4 < (grads[0] - grads[1]).abs().max()


def test_the_clamp_bounds_what_one_key_can_weigh():
    made = layer("softmax-as-rnn(kernel='exp', denominator='none')")
    s = torch.tensor([[-3.0, 4.0, 5.0, 50.0]])
    assert torch.equal(made.rule.weigh(s, s.amax(-1, keepdim=True)), s.clamp(max=5).exp())


def test_orders_that_carry_the_mass_are_counted():
    """For logits of one size x the mean term is x^n / n! exactly; the largest stand at n = x - 1 and x."""
    q = torch.full((1, 1, 6, 4), 2.0, dtype=torch.float64)
    k = torch.full((1, 1, 6, 4), 1.5, dtype=torch.float64)
    sizes = order_sizes(q, k, 30)
    expected = torch.tensor([6.0**n / math.factorial(n) for n in range(30)], dtype=torch.float64)
    assert (sizes / expected - 1).abs().max() < 1e-12 and set(sizes.topk(2).indices.tolist()) == {5, 6}


def test_a_recurrence_keeps_as_many_bytes_at_every_length():
    made = layer("softmax-as-rnn(order=3)")
    sizes = {made(torch.randn(1, n, 32, dtype=torch.float64))[1].nbytes for n in (4, 40, 80)}
    assert sizes == {8 * 4 * math.comb(11, 3) * 9 + 8}


@pytest.mark.slow
def test_more_orders_learn_better():
    """A tiny model of one layer learns to recall: the loss falls from linear attention to order 2 and again to order 4.

    Order 4 and softmax both learn this task; which of them ends lower depends on the draw, so their order is not asserted.
    """
    losses = {}
    for spec in ("kernel='elu'", "order=2, cached=True", "order=4, cached=True", "kernel='exp'"):
        torch.manual_seed(0)
        embed, read = torch.nn.Embedding(48, 32), torch.nn.Linear(32, 48)
        mixer = saccade.mixer(f"softmax-as-rnn({spec}, denominator='sum')", dim=32, heads=4)
        weights = [*embed.parameters(), *read.parameters(), *mixer.parameters()]
        optimiser = torch.optim.Adam(weights, lr=1e-2)
        draw = torch.Generator().manual_seed(1)
        total = 0.0
        for step in range(200):
            # 16 keys, each with a value beside it in one token; then one key alone, whose value is asked for
            keys = torch.rand(32, 24, generator=draw).argsort(-1)[:, :16]
            values = torch.randint(24, 48, (32, 16), generator=draw)
            asked = torch.randint(0, 16, (32, 1), generator=draw)
            x = torch.cat([embed(keys) + embed(values), embed(keys.gather(1, asked))], dim=1)
            loss = F.cross_entropy(read(mixer(x, keep=False)[0][:, -1]), values.gather(1, asked)[:, 0])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) if step >= 160 else 0.0
        losses[spec] = total / 40
    linear, second, fourth, softmax = losses.values()
    assert linear > 2 * second and second > 2 * max(fourth, softmax), losses


def test_wrong_fields_are_refused():
    for spec, message in (
        ("kernel='cos'", "is not known: use one of taylor"), ("denominator='max'", "use one of sum"), ("order=-1", "at least 0"),
        ("kernel='elu', cached=True", "leave out cached"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            saccade.mixer(f"softmax-as-rnn({spec})", dim=32, heads=4)
